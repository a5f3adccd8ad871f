//! The check of a pool that nobody has open: every structure against every other, and the mending of
//! what has a good twin or belongs to nobody.
//!
//! Mending guesses nothing. It writes metadata in the ways in which the pool itself does, so a crash
//! meanwhile leaves the old state or the new one, and it never writes data. What remains is told.

use crate::disk::{
    BLOCK, BLOCK_LEN, BlockError, CatalogState, EXTENT, Entry, EntryState, JournalBlock,
    RECORDS_PER_BLOCK, Record, Superblock,
};
use crate::extents::{extent_offset, sums_address};
use crate::inspect::{BlockCheck, Pages, check_blocks};
use crate::layers::MAX_DEPTH;
use crate::survey::{Damaged, Fault, Structure, Survey, TableCopy};
use crate::{Device, PoolError};

mod problem;

pub use problem::{Finding, Problem, Severity};

/// What to check, and whether to mend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Mend what can be mended without guessing.
    pub repair: bool,
    /// Read every block that holds data, and every extent that is said to be zeroed.
    pub data: bool,
}

/// What was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    /// Extents of the pool.
    pub extents: u64,
    /// Those that a layer holds.
    pub allocated: u64,
    /// Those of them that are dirty: their blocks are hashed anew at the next start.
    pub dirty: u64,
    /// Those of them that are open: written, and not settled among the replicas since.
    pub open: u64,
    /// Live replicas.
    pub replicas: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Blocks that were read and verify.
    pub good_blocks: u64,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// What is not as it should be.
    pub findings: Vec<Finding>,
    /// What was looked at.
    pub checked: Checked,
}

impl CheckReport {
    /// Whether damage was mended.
    #[must_use]
    pub fn is_repaired(&self) -> bool {
        self.findings.iter().any(|f| f.problem.severity() != Severity::Note && f.repaired)
    }

    /// Whether damage is left, that which could be mended included.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|f| f.problem.severity() != Severity::Note && !f.repaired)
    }
}

/// Checks a pool that nobody has open, and with `repair` mends it.
///
/// # Errors
/// [`PoolError`] where there is no superblock to go by, it is a later version's, or a repair cannot be
/// written.
pub fn check_pool<D: Device>(
    dev: &mut D,
    options: &CheckOptions,
) -> Result<CheckReport, PoolError> {
    // As at open: what is read may be in the device's cache only, and is about to be built upon.
    dev.flush()?;
    let survey = Survey::read(dev)?;
    let mut check = Check { survey, findings: Vec::new(), checked: Checked::default() };
    check.superblocks(dev)?;
    check.catalog();
    check.table();
    check.journal();
    let sound = check.layers();
    check.extents(sound);
    check.checksums(dev, options.data);
    if options.repair {
        check.repair(dev)?;
    }
    Ok(CheckReport { findings: check.findings, checked: check.checked })
}

struct Check {
    survey: Survey,
    findings: Vec<Finding>,
    checked: Checked,
}

impl Check {
    fn find(&mut self, problem: Problem) {
        self.findings.push(Finding { problem, repaired: false });
    }

    fn superblocks<D: Device>(&mut self, dev: &mut D) -> Result<(), PoolError> {
        let newest = self.survey.superblock.sequence;
        let pool = self.survey.superblock.pool;
        let mut block = vec![0; BLOCK_LEN];
        for address in [0, 1, self.survey.superblock.backup()] {
            dev.read_at(address * BLOCK, &mut block)?;
            match Superblock::decode(address, &block) {
                Ok(copy) if copy.pool != pool => {
                    self.find(Problem::Superblock { address, why: BlockError::Pool });
                }
                // What follows the newest copy is not waited for.
                Ok(copy) if copy.sequence < newest => {
                    self.find(Problem::SuperblockBehind { address, sequence: copy.sequence });
                }
                Ok(_) => {}
                Err(why) => self.find(Problem::Superblock { address, why }),
            }
        }
        Ok(())
    }

    fn catalog(&mut self) {
        let mut found = Vec::new();
        for (slot, pair) in (0u16..).zip(&self.survey.catalog) {
            let copies = || (0u8..).zip(pair);
            match pair {
                [Ok(a), Ok(b)] if a.sequence == b.sequence => {
                    // The same sequence on two pages that differ: a writer that was not ours.
                    if a != b {
                        found.push(Problem::CatalogTwins { slot });
                    }
                }
                [Ok(a), Ok(b)] => {
                    let copy = u8::from(a.sequence > b.sequence);
                    found.push(Problem::CatalogBehind { slot, copy });
                }
                [Err(_), Err(_)] => {
                    let why = copies().find_map(|(_, page)| page.as_ref().err().copied());
                    let why = why.unwrap_or(Fault::Unreadable);
                    found.push(Problem::CatalogLost { slot, why });
                }
                _ => found.extend(copies().filter_map(|(copy, page)| {
                    let why = *page.as_ref().err()?;
                    Some(Problem::CatalogCopy { slot, copy, why })
                })),
            }
        }
        found.into_iter().for_each(|problem| self.find(problem));
        let pages = (0..self.survey.superblock.slots).filter_map(|slot| self.survey.page(slot));
        for (page, _) in pages {
            match page.state {
                CatalogState::Live => self.checked.replicas += 1,
                CatalogState::Snapshot => self.checked.snapshots += 1,
                CatalogState::Free | CatalogState::Deleting => {}
            }
        }
    }

    fn table(&mut self) {
        let mut found = Vec::new();
        for (page, facts) in (0u32..).zip(&self.survey.table) {
            for (copy, state) in (0u8..).zip(&facts.copies) {
                match state {
                    TableCopy::Bad(why) if facts.chosen.is_some() => {
                        found.push(Problem::TableCopy { page, copy, why: *why });
                    }
                    _ => {}
                }
            }
            if facts.chosen.is_none() {
                found.push(Problem::TableLost { page });
            }
        }
        if !self.survey.digest_holds && self.survey.table.iter().all(|f| f.chosen.is_some()) {
            let suspect = (0u32..).zip(&self.survey.table).find(|(_, facts)| {
                facts.copies.iter().any(|copy| matches!(copy, TableCopy::Bad(_)))
            });
            found.push(Problem::TableOld { page: suspect.map(|(page, _)| page) });
        }
        found.into_iter().for_each(|problem| self.find(problem));
    }

    fn journal(&mut self) {
        if let Some(later) = self.survey.journal_hole {
            self.find(Problem::JournalHole { sequence: self.survey.head, later });
        }
        for sequence in self.survey.bad_records.clone() {
            self.find(Problem::JournalRecords { sequence });
        }
    }

    /// Whether the layers are what they should be, so that an extent of none is nobody's.
    fn layers(&mut self) -> bool {
        let survey = &self.survey;
        let mut found = Vec::new();
        for &slot in &survey.released {
            found.push(Problem::SlotReleased { slot });
        }
        for &slot in &survey.clashes {
            let layer = survey.page(slot).map_or(0, |(page, _)| page.layer);
            found.push(Problem::LayerTaken { slot, layer });
        }
        for (layer, facts) in (0u16..).zip(&survey.layers) {
            let (Some(_), Some(parent)) = (facts.owner, facts.parent) else { continue };
            match survey.owner(parent).map(|page| page.state) {
                Some(CatalogState::Snapshot | CatalogState::Deleting) => {}
                _ => found.push(Problem::Parent { layer, parent }),
            }
            let depth = survey.chain(layer).count();
            if depth >= survey.layers.len() && depth > 1 && self.comes_round(layer) {
                found.push(Problem::Circle { layer });
            } else if depth > MAX_DEPTH {
                found.push(Problem::TooDeep { layer, depth });
            }
        }
        let sound = found.iter().all(|problem| problem.severity() != Severity::Damage);
        found.into_iter().for_each(|problem| self.find(problem));
        sound
    }

    fn comes_round(&self, layer: u16) -> bool {
        let seen: std::collections::BTreeSet<u16> = self.survey.chain(layer).collect();
        seen.len() < self.survey.chain(layer).count()
    }

    fn extents(&mut self, layers_are_sound: bool) {
        let survey = &self.survey;
        let mut found = Vec::new();
        let mut checked = self.checked;
        // Where a page of the catalog, the table or the journal is lost, so may be the layer's owner.
        let certain = layers_are_sound
            && survey.digest_holds
            && survey.journal_hole.is_none()
            && survey.bad_records.is_empty()
            && survey.lost.is_empty()
            && (0..survey.superblock.slots).all(|slot| survey.page(slot).is_some());
        checked.extents = u64::from(survey.superblock.extents());
        for (extent, known) in (0u32..).zip(&survey.extents) {
            let Some(known) = known else { continue };
            let entry = known.entry;
            if entry.state != EntryState::Allocated {
                let zeroed = entry.state == EntryState::FreeZeroed;
                if entry != Entry::free(zeroed) {
                    found.push(Problem::FreeEntry { extent, certain });
                }
                continue;
            }
            checked.allocated += 1;
            checked.dirty += u64::from(entry.dirty);
            checked.open += u64::from(entry.open);
            let (layer, logical) = (entry.layer, entry.logical);
            if entry.birth >= survey.head {
                found.push(Problem::Unborn { extent, birth: entry.birth, head: survey.head });
            }
            match survey.owner(layer) {
                None => found.push(Problem::Orphan { extent, layer, certain }),
                Some(page) => {
                    let end = page.bytes().div_ceil(EXTENT);
                    if u64::from(logical) >= end {
                        found.push(Problem::PastEnd { extent, layer, logical, end });
                    }
                }
            }
        }
        found.extend(survey.lost.iter().map(|&extent| Problem::ExtentUnknown { extent }));
        for &(extent, other) in &survey.doubles {
            found.push(Problem::Double { extent, other });
        }
        self.checked = checked;
        found.into_iter().for_each(|problem| self.find(problem));
    }

    fn checksums<D: Device>(&mut self, dev: &mut D, data: bool) {
        let mut found = Vec::new();
        for (extent, known) in self.survey.allocated() {
            if known.entry.dirty || self.survey.is_leaving(known.entry.layer) {
                continue;
            }
            let pages = Pages::read(dev, &self.survey, extent, known);
            let Some(sums) = pages.sums() else {
                let copy = u8::from(known.entry.copy);
                let why = pages.copies[usize::from(copy)].as_ref().err().copied();
                let block = sums_address(&self.survey.superblock.segments, extent);
                let what = Structure::Checksums { extent, copy };
                let why = why.unwrap_or(Fault::Block(BlockError::Field("birth")));
                let page = Damaged { what, block: block + u64::from(copy), why };
                found.push(Problem::Checksums { extent, page });
                continue;
            };
            if data {
                let BlockCheck { good, bad } = check_blocks(dev, &self.survey, extent, known, sums);
                self.checked.good_blocks += u64::from(good);
                let replica = self.survey.owner(known.entry.layer).map(|page| page.replica);
                let layer = known.entry.layer;
                let blocks = bad.into_iter();
                found.extend(blocks.map(|bad| Problem::Block { extent, layer, replica, bad }));
            }
        }
        if data {
            let certain = self.survey.journal_hole.is_none() && self.survey.bad_records.is_empty();
            let mut bytes = vec![0; usize::try_from(EXTENT).expect("1 MiB")];
            for (extent, known) in (0u32..).zip(&self.survey.extents) {
                let zeroed = known.is_some_and(|k| k.entry.state == EntryState::FreeZeroed);
                if !zeroed {
                    continue;
                }
                let start = extent_offset(&self.survey.superblock.segments, extent);
                let read = dev.read_at(start, &mut bytes);
                if read.is_err() || bytes.iter().any(|&b| b != 0) {
                    found.push(Problem::NotZeroed { extent, certain });
                }
            }
        }
        found.into_iter().for_each(|problem| self.find(problem));
    }

    // ---- mending

    fn repair<D: Device>(&mut self, dev: &mut D) -> Result<(), PoolError> {
        self.mend_catalog(dev)?;
        self.free_extents(dev)?;
        // Where the table and the journal are not those that the superblock tells of, a damaged copy may
        // be all that is left of the superblock that does.
        if self.survey.digest_holds && self.survey.journal_hole.is_none() {
            self.mend_superblocks(dev)?;
        }
        Ok(())
    }

    fn mend_superblocks<D: Device>(&mut self, dev: &mut D) -> Result<(), PoolError> {
        let mut block = vec![0; BLOCK_LEN];
        for finding in &mut self.findings {
            let (Problem::Superblock { address, .. } | Problem::SuperblockBehind { address, .. }) =
                finding.problem
            else {
                continue;
            };
            self.survey.superblock.encode(address, &mut block);
            dev.write_at(address * BLOCK, &block)?;
            // One after the other: a cut in between tears one copy at most.
            dev.flush()?;
            finding.repaired = true;
        }
        Ok(())
    }

    fn mend_catalog<D: Device>(&mut self, dev: &mut D) -> Result<(), PoolError> {
        let superblock = &self.survey.superblock;
        let mut block = vec![0; BLOCK_LEN];
        for finding in &mut self.findings {
            let (Problem::CatalogCopy { slot, copy, .. } | Problem::CatalogBehind { slot, copy }) =
                finding.problem
            else {
                continue;
            };
            let Some((page, _)) = self.survey.page(slot) else { continue };
            let address = superblock.catalog_address(slot, u64::from(copy));
            page.encode(slot, address, superblock.pool, &mut block);
            dev.write_at(address * BLOCK, &block)?;
            finding.repaired = true;
        }
        Ok(dev.flush()?)
    }

    /// Says in the journal that extents are free, to be zeroed before use.
    fn free_extents<D: Device>(&mut self, dev: &mut D) -> Result<(), PoolError> {
        let superblock = &self.survey.superblock;
        let mut mended: Vec<(usize, u32)> = Vec::new();
        for (at, finding) in self.findings.iter().enumerate() {
            if let Some(extent) = finding.problem.frees() {
                mended.push((at, extent));
            }
        }
        let mut block = vec![0; BLOCK_LEN];
        for group in mended.chunks(RECORDS_PER_BLOCK) {
            let sequence = self.survey.head;
            if sequence - superblock.journal_tail >= superblock.journal_blocks {
                // The next start makes a checkpoint, and then there is room.
                return Ok(());
            }
            let address = superblock.journal_address(sequence);
            let records =
                group.iter().map(|&(_, extent)| Record { extent, entry: Entry::free(false) });
            JournalBlock::encode(sequence, address, superblock.pool, records, &mut block);
            dev.write_at(address * BLOCK, &block)?;
            dev.flush()?;
            self.survey.head += 1;
            for &(at, _) in group {
                self.findings[at].repaired = true;
            }
        }
        Ok(())
    }
}
