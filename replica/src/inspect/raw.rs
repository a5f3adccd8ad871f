//! The structures themselves, copy by copy.

use crate::disk::{
    BLOCK, BLOCK_LEN, BlockError, CatalogPage, Entry, JournalBlock, Record, Superblock, TablePage,
};
use crate::format::entries_of_page;
use crate::open::read_superblock;
use crate::{Device, PoolError};

/// A copy of the superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuperblockInfo {
    /// Where it lies, in blocks.
    pub address: u64,
    /// What it holds, or why it does not decode.
    pub content: Result<Superblock, BlockError>,
}

/// A copy of a catalog page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogInfo {
    /// The replica slot.
    pub slot: u16,
    /// Where it lies, in blocks.
    pub address: u64,
    /// What it holds, or why it does not decode.
    pub content: Result<CatalogPage, BlockError>,
}

/// A journal block that decodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalInfo {
    /// Where it lies, in blocks.
    pub address: u64,
    /// Its place in the order of commits.
    pub sequence: u64,
    /// Whether it is before the tail: the table has it all.
    pub checkpointed: bool,
    /// Its records; it may hold fewer than it says where some do not decode.
    pub records: Vec<Record>,
}

/// A copy of a table page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageInfo {
    /// Where it lies, in blocks.
    pub address: u64,
    /// Its head, or why it does not decode.
    pub head: Result<TablePage, BlockError>,
    /// All zeros: a copy that was never written.
    pub blank: bool,
}

/// What the table says of an extent, the journal not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentInfo {
    /// The physical extent.
    pub extent: u32,
    /// Its first byte on the device.
    pub offset: u64,
    /// Its entry in the newer copy that verifies.
    pub entry: Entry,
}

/// All copies of the superblock.
///
/// # Errors
/// [`PoolError::Device`].
pub fn inspect_superblock<D: Device>(dev: &mut D) -> Result<Vec<SuperblockInfo>, PoolError> {
    let mut copies = Vec::new();
    let mut block = vec![0; BLOCK_LEN];
    for address in [Some(0), Some(1), (dev.len() / BLOCK).checked_sub(1)].into_iter().flatten() {
        if (address + 1) * BLOCK > dev.len() {
            continue;
        }
        dev.read_at(address * BLOCK, &mut block)?;
        copies.push(SuperblockInfo { address, content: Superblock::decode(address, &block) });
    }
    Ok(copies)
}

/// Every copy of every catalog page.
///
/// # Errors
/// [`PoolError`] where no superblock says where the catalog is.
pub fn inspect_catalog<D: Device>(dev: &mut D) -> Result<Vec<CatalogInfo>, PoolError> {
    let (superblock, _) = read_superblock(dev)?;
    let mut copies = Vec::new();
    let mut block = vec![0; BLOCK_LEN];
    for slot in 0..superblock.slots {
        for copy in [0, 1] {
            let address = superblock.catalog_address(slot, copy);
            dev.read_at(address * BLOCK, &mut block)?;
            let content = CatalogPage::decode(slot, address, superblock.pool, &block);
            copies.push(CatalogInfo { slot, address, content });
        }
    }
    Ok(copies)
}

/// The journal blocks that decode, oldest first.
///
/// # Errors
/// [`PoolError`] where no superblock says where the journal is.
pub fn inspect_journal<D: Device>(dev: &mut D) -> Result<Vec<JournalInfo>, PoolError> {
    let (superblock, _) = read_superblock(dev)?;
    let mut found = Vec::new();
    let mut block = vec![0; BLOCK_LEN];
    for address in superblock.journal..superblock.journal + superblock.journal_blocks {
        dev.read_at(address * BLOCK, &mut block)?;
        if let Ok(head) = JournalBlock::decode(address, superblock.pool, &block) {
            found.push(JournalInfo {
                address,
                sequence: head.sequence,
                checkpointed: head.sequence < superblock.journal_tail,
                records: (0..head.records)
                    .filter_map(|i| JournalBlock::record(&block, i).ok())
                    .collect(),
            });
        }
    }
    found.sort_by_key(|info| info.sequence);
    Ok(found)
}

/// The table: every copy of every page, and the entries of those that decode.
///
/// # Errors
/// [`PoolError`] where no superblock says where the table is.
pub fn inspect_extents<D: Device>(
    dev: &mut D,
) -> Result<(Vec<PageInfo>, Vec<ExtentInfo>), PoolError> {
    let (superblock, _) = read_superblock(dev)?;
    let (mut pages, mut extents) = (Vec::new(), Vec::new());
    let mut first = 0;
    let mut block = vec![0; BLOCK_LEN];
    for segment in &superblock.segments {
        for local in 0..segment.pages() {
            let count = entries_of_page(segment, local);
            let mut best: Option<(u64, Vec<ExtentInfo>)> = None;
            for copy in [0, 1] {
                let address = segment.page_address(local, copy);
                dev.read_at(address * BLOCK, &mut block)?;
                let head = TablePage::decode(local, count, address, superblock.pool, &block);
                if let Ok(page) = &head
                    && best.as_ref().is_none_or(|(sequence, _)| *sequence < page.sequence)
                {
                    let entries = (0..count).filter_map(|i| {
                        let extent = first + i;
                        let entry = TablePage::entry(&block, i).ok()?;
                        let offset = crate::extents::extent_offset(&superblock.segments, extent);
                        Some(ExtentInfo { extent, offset, entry })
                    });
                    best = Some((page.sequence, entries.collect()));
                }
                let blank = block.iter().all(|&b| b == 0);
                pages.push(PageInfo { address, head, blank });
            }
            extents.extend(best.into_iter().flat_map(|(_, entries)| entries));
            first += count;
        }
    }
    Ok((pages, extents))
}
