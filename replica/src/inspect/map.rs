//! Where each replica's and snapshot's extents are, layer by layer.

use std::collections::BTreeSet;

use cairn_block::{ReplicaId, SnapshotId};

use super::Inspection;
use super::checksums::Pages;
use crate::blocks::BlockSet;
use crate::disk::{CatalogState, EXTENT, EXTENT_BLOCKS};
use crate::extents::extent_offset;
use crate::survey::Survey;
use crate::{Device, PoolError};

/// An extent that answers reads of a logical extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The layer that has it.
    pub layer: u16,
    /// The physical extent.
    pub extent: u32,
    /// Its first byte on the device.
    pub offset: u64,
    /// Of the 256 blocks, those that are answered from here. Unknown where the checksum page that
    /// tells may be behind, or is damaged, here or in a layer above.
    pub blocks: Option<u32>,
}

/// A logical extent that is not a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedExtent {
    /// The logical extent.
    pub logical: u32,
    /// What answers its reads, the topmost layer first.
    pub sources: Vec<Source>,
}

/// A replica or a snapshot, and where its extents are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMap {
    /// The catalog slot.
    pub slot: u16,
    /// What the slot holds.
    pub state: CatalogState,
    /// The replica, or the one that the snapshot was taken of.
    pub replica: ReplicaId,
    /// The snapshot; of a replica, the one that it is a clone of.
    pub snapshot: SnapshotId,
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its layer.
    pub layer: u16,
    /// The layer beneath.
    pub parent: Option<u16>,
    /// Layers that a read may look through, its own counted.
    pub depth: usize,
    /// Its layers are each other's parents: they cannot be read.
    pub circular: bool,
    /// What is not a hole.
    pub extents: Vec<MappedExtent>,
}

/// Every replica and snapshot, or those of `only` one replica, the journal applied.
///
/// # Errors
/// [`PoolError`] where no superblock says where things are.
pub fn inspect_map<D: Device>(
    dev: &mut D,
    only: Option<ReplicaId>,
) -> Result<Inspection<Vec<LayerMap>>, PoolError> {
    let survey = Survey::read(dev)?;
    let mut found = Vec::new();
    for slot in 0..survey.superblock.slots {
        let Some((page, _)) = survey.page(slot) else { continue };
        if page.state == CatalogState::Free || only.is_some_and(|only| only != page.replica) {
            continue;
        }
        let mut chain: Vec<u16> = survey.chain(page.layer).collect();
        let seen: BTreeSet<u16> = chain.iter().copied().collect();
        let circular = seen.len() < chain.len();
        chain.truncate(seen.len());
        found.push(LayerMap {
            slot,
            state: page.state,
            replica: page.replica,
            snapshot: page.snapshot,
            name: page.name.clone(),
            bytes: page.bytes(),
            layer: page.layer,
            parent: page.parent,
            depth: chain.len(),
            circular,
            extents: map_of(dev, &survey, &chain, page.bytes().div_ceil(EXTENT)),
        });
    }
    Ok(Inspection { found, damaged: survey.damaged() })
}

fn map_of<D: Device>(
    dev: &mut D,
    survey: &Survey,
    chain: &[u16],
    extents: u64,
) -> Vec<MappedExtent> {
    let maps = chain.iter().filter_map(|&layer| survey.layers.get(usize::from(layer)));
    let mapped: BTreeSet<u32> = maps.flat_map(|layer| layer.map.keys().copied()).collect();
    mapped
        .into_iter()
        .filter(|&logical| u64::from(logical) < extents)
        .map(|logical| MappedExtent { logical, sources: sources(dev, survey, chain, logical) })
        .collect()
}

fn sources<D: Device>(dev: &mut D, survey: &Survey, chain: &[u16], logical: u32) -> Vec<Source> {
    let all = u32::try_from(EXTENT_BLOCKS).expect("256");
    let mut left = Some(BlockSet::range(0, all));
    let mut sources = Vec::new();
    for &layer in chain {
        let facts = survey.layers.get(usize::from(layer));
        let Some(&extent) = facts.and_then(|facts| facts.map.get(&logical)) else { continue };
        let known = survey.extents[extent as usize].expect("the map was built of what is known");
        let mut blocks = None;
        if let Some(before) = left {
            let pages = Pages::read(dev, survey, extent, &known);
            let sums = pages.sums().filter(|_| !known.entry.dirty);
            let here = sums.map(|s| BlockSet(s.valid).or(BlockSet(s.zeroed)).and(before));
            blocks = here.map(|here| here.0.iter().map(|word| word.count_ones()).sum());
            left = here.map(|here| before.minus(here));
        }
        let offset = extent_offset(&survey.superblock.segments, extent);
        sources.push(Source { layer, extent, offset, blocks });
    }
    sources
}
