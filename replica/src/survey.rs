//! All that a pool's structures say, as far as they can be read. Nothing is refused and nothing is
//! written: for inspection and for the check. What open does with the same bytes is in `open.rs`.

use std::collections::BTreeMap;
use std::fmt;

use crate::disk::{
    BLOCK, BLOCK_LEN, BlockError, CatalogPage, CatalogState, Claim, Entry, EntryState,
    JournalBlock, Superblock, TablePage,
};
use crate::format::{CHUNK_PAGES, digest_of, entries_of_page};
use crate::open::read_superblock;
use crate::{Device, PoolError};

/// Why a metadata block cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It does not decode.
    #[error("{0}")]
    Block(#[from] BlockError),
    /// The device does not read it.
    #[error("the device does not read the block")]
    Unreadable,
}

/// A structure on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Structure {
    /// A copy of the superblock.
    Superblock,
    /// A copy of a slot's catalog page.
    Catalog {
        /// The slot.
        slot: u16,
        /// 0 or 1.
        copy: u8,
    },
    /// Both copies of a table page, counted over all segments.
    Table {
        /// The page.
        page: u32,
    },
    /// A block of the journal.
    Journal {
        /// The sequence that it should have.
        sequence: u64,
    },
    /// A copy of an extent's checksum page.
    Checksums {
        /// The extent.
        extent: u32,
        /// 0 or 1.
        copy: u8,
    },
}

/// The name of a copy.
fn letter(copy: u8) -> char {
    if copy == 0 { 'A' } else { 'B' }
}

impl fmt::Display for Structure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Superblock => f.write_str("superblock"),
            Self::Catalog { slot, copy } => write!(f, "catalog slot {slot} copy {}", letter(copy)),
            Self::Table { page } => write!(f, "table page {page}"),
            Self::Journal { sequence } => write!(f, "journal block {sequence}"),
            Self::Checksums { extent, copy } => {
                write!(f, "checksum page of extent {extent} copy {}", letter(copy))
            }
        }
    }
}

/// A structure that could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged {
    /// What.
    pub what: Structure,
    /// Where, in blocks from the start of the device.
    pub block: u64,
    /// Why.
    pub why: Fault,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (block {}): {}", self.what, self.block, self.why)
    }
}

/// A copy of a table page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableCopy {
    Whole(TablePage),
    Blank,
    Bad(Fault),
}

/// The copies of a table page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TableFacts {
    /// Where copies A and B lie.
    pub(crate) addresses: [u64; 2],
    pub(crate) copies: [TableCopy; 2],
    /// The newer one that verifies.
    pub(crate) chosen: Option<TablePage>,
}

/// An extent's entry, and the journal block that it is from; none where it is the table's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) entry: Entry,
    pub(crate) journal: Option<u64>,
}

/// A layer as the catalog has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerFacts {
    /// The slot that it belongs to; none where no page that counts names it.
    pub(crate) owner: Option<u16>,
    pub(crate) parent: Option<u16>,
    /// Its extents by logical extent.
    pub(crate) map: BTreeMap<u32, u32>,
}

#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) superblock: Superblock,
    /// Both copies of each slot's page.
    pub(crate) catalog: Vec<[Result<CatalogPage, Fault>; 2]>,
    pub(crate) table: Vec<TableFacts>,
    /// Whether the pages that were read are the ones that the superblock's digest is of.
    pub(crate) digest_holds: bool,
    /// Each extent, the journal applied; none where its table page is lost and no record tells.
    pub(crate) extents: Vec<Option<Known>>,
    /// Extents whose entry in the table is lost, whatever the journal says of them.
    pub(crate) lost: Vec<u32>,
    /// The sequence of the next journal block.
    pub(crate) head: u64,
    /// A later block is there, so the one at `head` was lost.
    pub(crate) journal_hole: Option<u64>,
    /// Journal blocks that verify and whose records make no sense.
    pub(crate) bad_records: Vec<u64>,
    pub(crate) layers: Vec<LayerFacts>,
    /// Slots whose page names a layer that another one has, and that counts for nothing.
    pub(crate) released: Vec<u16>,
    /// Slots whose page contradicts another's.
    pub(crate) clashes: Vec<u16>,
    /// Extents in a place where another one is.
    pub(crate) doubles: Vec<(u32, u32)>,
}

/// Reads blocks; those that the device does not read are `None`.
pub(crate) fn read_blocks<D: Device>(
    dev: &mut D,
    address: u64,
    count: usize,
) -> Vec<Option<Vec<u8>>> {
    let mut all = vec![0; count * BLOCK_LEN];
    if dev.read_at(address * BLOCK, &mut all).is_ok() {
        return all.chunks(BLOCK_LEN).map(|block| Some(block.to_vec())).collect();
    }
    (address..)
        .take(count)
        .map(|at| {
            let mut block = vec![0; BLOCK_LEN];
            dev.read_at(at * BLOCK, &mut block).is_ok().then_some(block)
        })
        .collect()
}

impl Survey {
    /// Reads everything but the data and the checksums.
    pub(crate) fn read<D: Device>(dev: &mut D) -> Result<Self, PoolError> {
        let (superblock, _) = read_superblock(dev)?;
        let slots = usize::from(superblock.slots);
        let mut survey = Self {
            catalog: Vec::with_capacity(slots),
            table: Vec::new(),
            digest_holds: false,
            extents: Vec::with_capacity(superblock.extents() as usize),
            lost: Vec::new(),
            head: superblock.journal_tail,
            journal_hole: None,
            bad_records: Vec::new(),
            layers: vec![LayerFacts::default(); slots],
            released: Vec::new(),
            clashes: Vec::new(),
            doubles: Vec::new(),
            superblock,
        };
        survey.read_table(dev);
        let unread = (0u32..).zip(&survey.extents).filter(|(_, known)| known.is_none());
        survey.lost = unread.map(|(extent, _)| extent).collect();
        survey.read_catalog(dev);
        survey.read_journal(dev);
        survey.assign_layers();
        survey.map_extents();
        Ok(survey)
    }

    fn read_table<D: Device>(&mut self, dev: &mut D) {
        let mut completed = 0u64;
        let mut global = 0u32;
        for segment in self.superblock.segments.clone() {
            let mut copies = [Vec::new(), Vec::new()];
            for local in 0..segment.pages() {
                let at = (local % CHUNK_PAGES) as usize;
                if at == 0 {
                    let count = CHUNK_PAGES.min(segment.pages() - local) as usize;
                    for (copy, blocks) in (0u64..).zip(&mut copies) {
                        *blocks = read_blocks(dev, segment.page_address(local, copy), count);
                    }
                }
                let entries = entries_of_page(&segment, local);
                let addresses = [0, 1].map(|copy| segment.page_address(local, copy));
                let facts = [0usize, 1].map(|copy| {
                    let block = copies[copy][at].as_deref();
                    self.table_copy(local, entries, addresses[copy], copy as u64, block)
                });
                let newer = match facts {
                    [TableCopy::Whole(a), TableCopy::Whole(b)] if b.sequence > a.sequence => {
                        Some((b, 1usize))
                    }
                    [TableCopy::Whole(a), _] => Some((a, 0)),
                    [_, TableCopy::Whole(b)] => Some((b, 1)),
                    _ => None,
                };
                let block = newer.and_then(|(_, copy)| copies[copy][at].as_deref());
                self.extents.extend((0..entries).map(|i| {
                    let entry = TablePage::entry(block?, i).ok()?;
                    Some(Known { entry, journal: None })
                }));
                if let Some((page, _)) = newer {
                    let done = page.checkpoint <= self.superblock.checkpoint;
                    let durable = if done { page.sequence } else { page.base };
                    completed = completed.wrapping_add(digest_of(global, durable));
                }
                let chosen = newer.map(|(page, _)| page);
                self.table.push(TableFacts { addresses, copies: facts, chosen });
                global += 1;
            }
        }
        self.digest_holds = completed == self.superblock.table_digest;
    }

    fn table_copy(
        &self,
        local: u32,
        entries: u32,
        address: u64,
        copy: u64,
        block: Option<&[u8]>,
    ) -> TableCopy {
        let Some(block) = block else { return TableCopy::Bad(Fault::Unreadable) };
        match TablePage::decode(local, entries, address, self.superblock.pool, block) {
            Ok(page) if page.sequence & 1 != copy => {
                TableCopy::Bad(BlockError::Field("sequence").into())
            }
            Ok(page) => TableCopy::Whole(page),
            Err(_) if block.iter().all(|&b| b == 0) => TableCopy::Blank,
            Err(error) => TableCopy::Bad(error.into()),
        }
    }

    fn read_catalog<D: Device>(&mut self, dev: &mut D) {
        for slot in 0..self.superblock.slots {
            let address = self.superblock.catalog_address(slot, 0);
            let blocks = read_blocks(dev, address, 2);
            let decode = |copy: usize| {
                let block = blocks[copy].as_deref().ok_or(Fault::Unreadable)?;
                let at = address + copy as u64;
                Ok(CatalogPage::decode(slot, at, self.superblock.pool, block)?)
            };
            self.catalog.push([decode(0), decode(1)]);
        }
    }

    fn read_journal<D: Device>(&mut self, dev: &mut D) {
        let superblock = &self.superblock;
        let count = usize::try_from(superblock.journal_blocks).expect("at most 16384");
        let ring = read_blocks(dev, superblock.journal, count);
        let decode = |address: u64| {
            let at = usize::try_from(address - superblock.journal).expect("within the ring");
            let block = ring[at].as_deref()?;
            let head = JournalBlock::decode(address, superblock.pool, block).ok()?;
            Some((head, block))
        };
        for _ in 0..count {
            let sequence = self.head;
            let found = decode(superblock.journal_address(sequence));
            let Some((head, block)) = found.filter(|(head, _)| head.sequence == sequence) else {
                break;
            };
            for i in 0..head.records {
                let record = JournalBlock::record(block, i).ok();
                let place = record.and_then(|r| self.extents.get_mut(r.extent as usize));
                match (record, place) {
                    (Some(record), Some(place)) => {
                        *place = Some(Known { entry: record.entry, journal: Some(sequence) });
                    }
                    _ => self.bad_records.push(sequence),
                }
            }
            self.head += 1;
        }
        self.bad_records.dedup();
        self.journal_hole = (superblock.journal..)
            .take(count)
            .filter_map(|address| decode(address).map(|(head, _)| head.sequence))
            .filter(|&sequence| sequence >= self.head)
            .max();
    }

    fn assign_layers(&mut self) {
        for claim in Claim::ORDER {
            for slot in 0..self.superblock.slots {
                let Some((page, _)) = self.page(slot) else { continue };
                if page.claim() != Some(claim) {
                    continue;
                }
                let (layer, parent) = (usize::from(page.layer), page.parent);
                match self.layers.get_mut(layer) {
                    Some(facts) if facts.owner.is_none() => {
                        facts.owner = Some(slot);
                        facts.parent = parent;
                    }
                    Some(_) if claim.may_be_void() => self.released.push(slot),
                    _ => self.clashes.push(slot),
                }
            }
        }
    }

    fn map_extents(&mut self) {
        for (extent, known) in (0u32..).zip(&self.extents) {
            // A copy that was cut off is free at the next open; another may have been begun since.
            let holds = |e: &Entry| e.state == EntryState::Allocated && !e.incoming;
            let Some(known) = known.filter(|k| holds(&k.entry)) else { continue };
            let Some(layer) = self.layers.get_mut(usize::from(known.entry.layer)) else { continue };
            if let Some(&other) = layer.map.get(&known.entry.logical) {
                self.doubles.push((extent, other));
            } else {
                layer.map.insert(known.entry.logical, extent);
            }
        }
    }

    /// The newer copy of a slot's page that verifies, and which it is.
    pub(crate) fn page(&self, slot: u16) -> Option<(&CatalogPage, u8)> {
        match &self.catalog[usize::from(slot)] {
            [Ok(a), Ok(b)] if b.sequence > a.sequence => Some((b, 1)),
            [Ok(a), _] => Some((a, 0)),
            [_, Ok(b)] => Some((b, 1)),
            _ => None,
        }
    }

    /// The page of the slot that a layer belongs to.
    pub(crate) fn owner(&self, layer: u16) -> Option<&CatalogPage> {
        let slot = self.layers.get(usize::from(layer))?.owner?;
        self.page(slot).map(|(page, _)| page)
    }

    /// Whether the layer's extents are being zeroed, while the table still names them: it is being
    /// deleted, and no other is on top of it.
    pub(crate) fn is_leaving(&self, layer: u16) -> bool {
        self.owner(layer).is_some_and(|page| page.state == CatalogState::Deleting)
            && !self.layers.iter().any(|at| at.owner.is_some() && at.parent == Some(layer))
    }

    /// A layer and those beneath it, from the top; ends where it comes round again.
    pub(crate) fn chain(&self, layer: u16) -> impl Iterator<Item = u16> {
        core::iter::successors(Some(layer), |&at| self.layers.get(usize::from(at))?.parent)
            .take(self.layers.len())
    }

    /// The extents that a layer holds.
    pub(crate) fn allocated(&self) -> impl Iterator<Item = (u32, &Known)> {
        (0u32..).zip(&self.extents).filter_map(|(extent, known)| {
            let known = known.as_ref()?;
            let holds = known.entry.state == EntryState::Allocated && !known.entry.incoming;
            holds.then_some((extent, known))
        })
    }

    /// What could not be read, copies left out whose twin is whole.
    pub(crate) fn damaged(&self) -> Vec<Damaged> {
        let mut damaged = Vec::new();
        for (slot, pair) in (0u16..).zip(&self.catalog) {
            for (copy, page) in (0u8..).zip(pair) {
                if let (Err(why), None) = (page, self.page(slot)) {
                    let block = self.superblock.catalog_address(slot, u64::from(copy));
                    let what = Structure::Catalog { slot, copy };
                    damaged.push(Damaged { what, block, why: *why });
                }
            }
        }
        for (page, facts) in (0u32..).zip(&self.table) {
            if facts.chosen.is_none() {
                let bad = facts.copies.iter().zip(facts.addresses).find_map(|(c, at)| match c {
                    TableCopy::Bad(why) => Some((*why, at)),
                    _ => None,
                });
                let (why, block) =
                    bad.unwrap_or((Fault::Block(BlockError::Magic), facts.addresses[0]));
                damaged.push(Damaged { what: Structure::Table { page }, block, why });
            }
        }
        if self.journal_hole.is_some() {
            damaged.push(self.journal_damage(self.head, BlockError::Checksum));
        }
        for &sequence in &self.bad_records {
            damaged.push(self.journal_damage(sequence, BlockError::Field("a record")));
        }
        damaged
    }

    fn journal_damage(&self, sequence: u64, why: BlockError) -> Damaged {
        Damaged {
            what: Structure::Journal { sequence },
            block: self.superblock.journal_address(sequence),
            why: why.into(),
        }
    }
}
