//! What a start after a crash now would read and hash, and what replicas may differ in.

use cairn_block::ReplicaId;

use super::Inspection;
use crate::extents::extent_offset;
use crate::survey::Survey;
use crate::{Device, PoolError};

/// What says that an extent is dirty, or open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkedBy {
    /// Its entry in the table.
    Table,
    /// The journal block of this sequence.
    Journal(u64),
}

/// An extent whose checksums may be behind its data, or that was written and not settled since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyInfo {
    /// The physical extent.
    pub extent: u32,
    /// Its first byte on the device.
    pub offset: u64,
    /// The layer that it belongs to.
    pub layer: u16,
    /// The replica that the layer is of, or was taken of; none where no slot has the layer.
    pub replica: Option<ReplicaId>,
    /// Which of the layer's extents.
    pub logical: u32,
    /// Its checksums may be behind its data.
    pub dirty: bool,
    /// It was written, and not settled since.
    pub open: bool,
    /// When it was last settled; 0: never.
    pub stamp: u64,
    /// What says so.
    pub marked_by: MarkedBy,
}

/// The extents that are dirty or open, the journal applied. Each dirty one is 1 MiB that the next open has
/// hashed.
///
/// # Errors
/// [`PoolError`] where no superblock says where things are.
pub fn inspect_dirty<D: Device>(dev: &mut D) -> Result<Inspection<Vec<DirtyInfo>>, PoolError> {
    let survey = Survey::read(dev)?;
    let found = survey
        .allocated()
        .filter(|(_, known)| known.entry.dirty || known.entry.open)
        .map(|(extent, known)| DirtyInfo {
            extent,
            offset: extent_offset(&survey.superblock.segments, extent),
            layer: known.entry.layer,
            replica: survey.owner(known.entry.layer).map(|page| page.replica),
            logical: known.entry.logical,
            dirty: known.entry.dirty,
            open: known.entry.open,
            stamp: known.entry.stamp,
            marked_by: known.journal.map_or(MarkedBy::Table, MarkedBy::Journal),
        })
        .collect();
    Ok(Inspection { found, damaged: survey.damaged() })
}
