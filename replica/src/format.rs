//! Making a pool, and looking whether there is one.

use cairn_block::{PoolDeviceId, PoolId};

use crate::disk::{
    BLOCK, BLOCK_LEN, CatalogPage, CatalogState, ENTRIES_PER_PAGE, EXTENT, EXTENT_BLOCKS, Entry,
    MAX_SLOTS, MemberState, Membership, SUPERBLOCK_MAGIC, Segment, Superblock, TablePage, VERSION,
};
use crate::{Device, PoolError};

/// How to format a device.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// The new pool's identifier.
    pub pool_id: PoolId,
    /// Every byte of the device reads as zero: a new sparse file, or a device just discarded whose
    /// discards are known to zero. Otherwise extents are zeroed at their first use.
    pub device_is_zeroed: bool,
    /// Bytes of the device's sectors.
    pub sector_size: u32,
    /// Destroy whatever is there.
    pub force: bool,
}

/// What a device holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Zeros, as far as a superblock and its neighbours would reach.
    Blank,
    /// A pool.
    Pool {
        /// Its identifier; zero where no copy of the superblock verifies.
        id: PoolId,
        /// Its format version.
        version: u16,
        /// Which device of the pool it is; zero where no copy of the superblock verifies.
        device: PoolDeviceId,
        /// The devices of the pool, as this one knows them.
        membership: Membership,
        /// The replicas in it, by name and id, as far as the catalog can be read: what would be lost.
        replicas: Vec<String>,
    },
    /// Something else.
    Foreign,
}

/// The least that holds the metadata and a few extents.
pub(crate) const MIN_DEVICE: u64 = 8 << 20;
/// The most that extents can be counted in.
const MAX_DEVICE: u64 = ((1 << 31) - 4096) * EXTENT;
/// What `probe` and `format` look at.
const HEAD_LEN: usize = 64 << 10;
/// Pages written or read at a time by format and open.
pub(crate) const CHUNK_PAGES: u32 = 256;
/// The sequence of a table page that format wrote: even, so that it is copy A.
pub(crate) const FIRST_PAGE_SEQUENCE: u64 = 2;

pub(crate) fn probe<D: Device>(dev: &mut D) -> Result<Probe, PoolError> {
    let len = usize::try_from(dev.len()).map_or(HEAD_LEN, |l| l.min(HEAD_LEN)) & !(BLOCK_LEN - 1);
    let mut head = vec![0; len];
    if len > 0 {
        dev.read_at(0, &mut head)?;
    }
    let mut marked = None;
    let mut best: Option<(Superblock, u16)> = None;
    for (address, block) in (0u64..2).zip(head.chunks(BLOCK_LEN)) {
        if block[..8] == SUPERBLOCK_MAGIC {
            let version = u16::from_le_bytes([block[12], block[13]]);
            match Superblock::decode(address, block) {
                Ok(superblock) => {
                    if best.as_ref().is_none_or(|(b, _)| b.sequence < superblock.sequence) {
                        best = Some((superblock, version));
                    }
                }
                Err(_) => marked = Some(version),
            }
        }
    }
    if let Some((superblock, version)) = best {
        let replicas = replicas_of(dev, &superblock)?;
        let (id, device, membership) = (superblock.pool, superblock.device, superblock.membership);
        return Ok(Probe::Pool { id, version, device, membership, replicas });
    }
    if let Some(version) = marked {
        return Ok(Probe::Pool {
            id: PoolId(0),
            version,
            device: PoolDeviceId(0),
            membership: Membership::default(),
            replicas: Vec::new(),
        });
    }
    let blank = head.iter().all(|&b| b == 0);
    Ok(if blank { Probe::Blank } else { Probe::Foreign })
}

/// The replicas that the catalog names: the newer copy of each page that verifies.
fn replicas_of<D: Device>(dev: &mut D, superblock: &Superblock) -> Result<Vec<String>, PoolError> {
    let mut found = Vec::new();
    if superblock.segments.is_empty() {
        // It has features unknown here: where its catalog is was not looked at.
        return Ok(found);
    }
    let mut block = vec![0; BLOCK_LEN];
    for slot in 0..superblock.slots {
        let mut best: Option<CatalogPage> = None;
        for copy in [0, 1] {
            let address = superblock.catalog_address(slot, copy);
            if (address + 1) * BLOCK > dev.len() {
                return Ok(found);
            }
            dev.read_at(address * BLOCK, &mut block)?;
            if let Ok(page) = CatalogPage::decode(slot, address, superblock.pool, &block)
                && best.as_ref().is_none_or(|b| b.sequence < page.sequence)
            {
                best = Some(page);
            }
        }
        if let Some(page) = best.filter(|page| page.state == CatalogState::Live) {
            found.push(if page.name.is_empty() {
                page.replica.to_string()
            } else {
                format!("`{}` ({})", page.name, page.replica)
            });
        }
    }
    Ok(found)
}

/// What a person reads of replicas that would be lost.
pub(crate) fn told(replicas: &[String]) -> String {
    const SHOWN: usize = 4;
    if replicas.is_empty() {
        return "no replica".to_owned();
    }
    let what = if replicas.len() == 1 { "replica" } else { "replicas" };
    let names = replicas[..replicas.len().min(SHOWN)].join(", ");
    let more = match replicas.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("{} {what}: {names}{more}", replicas.len())
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Blank => write!(f, "nothing"),
            Self::Foreign => write!(f, "data that is not a pool"),
            Self::Pool { id, .. } if id.0 == 0 => {
                write!(f, "a pool whose superblock is damaged or of another version")
            }
            Self::Pool { id, membership, replicas, .. } => {
                match membership.members.iter().filter(|m| m.state.is_needed()).count() {
                    0 | 1 => write!(f, "pool {id}")?,
                    n => write!(f, "one of the {n} devices of pool {id}")?,
                }
                write!(f, " with {}", told(replicas))
            }
        }
    }
}

/// A segment in `blocks`, which begin at block `start`: as many extents as fit with their table.
pub(crate) fn plan_segment(start: u64, end: u64) -> Option<Segment> {
    let room = end.checked_sub(start)? / EXTENT_BLOCKS;
    let mut extents = u32::try_from(room).ok()?;
    while extents > 0 {
        let pages = u64::from(extents.div_ceil(ENTRIES_PER_PAGE));
        let data = (start + 2 * pages + 2 * u64::from(extents)).next_multiple_of(EXTENT_BLOCKS);
        let segment = Segment { table: start, data, extents };
        if segment.end() <= end {
            return Some(segment);
        }
        let over = (segment.end() - end).div_ceil(EXTENT_BLOCKS);
        extents = extents.saturating_sub(u32::try_from(over).unwrap_or(u32::MAX));
    }
    None
}

/// Where everything lies on a new pool. Small pools get a small catalog and a small journal.
fn plan(options: &FormatOptions, identity: &Identity, len: u64) -> Result<Superblock, PoolError> {
    if len < MIN_DEVICE {
        return Err(PoolError::TooSmall { len, min: MIN_DEVICE });
    }
    if len > MAX_DEVICE {
        return Err(PoolError::TooLarge { len, max: MAX_DEVICE });
    }
    let slots = identity.slots.unwrap_or_else(|| slots_for(len));
    let journal_blocks = (len / 64).clamp(256 << 10, 4 << 20) / BLOCK;
    let catalog = 2;
    let journal = catalog + 2 * u64::from(slots);
    let segment = plan_segment(journal + journal_blocks, len / BLOCK - 1)
        .ok_or(PoolError::TooSmall { len, min: MIN_DEVICE })?;
    let digest = (0..segment.pages())
        .fold(0u64, |sum, page| sum.wrapping_add(digest_of(page, FIRST_PAGE_SEQUENCE)));
    Ok(Superblock {
        pool: options.pool_id,
        sequence: 1,
        compat: 0,
        incompat: crate::disk::INCOMPAT_CHECKSUMS,
        device_len: len,
        sector_size: options.sector_size,
        slots,
        catalog,
        journal,
        journal_blocks,
        journal_tail: 1,
        checkpoint: 0,
        table_digest: digest,
        segments: vec![segment],
        device: identity.device,
        membership: identity.membership.clone(),
    })
}

/// Which device a new pool, or a new part of one, is.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) device: PoolDeviceId,
    pub(crate) membership: Membership,
    /// Replica slots, where the other devices of the pool say how many.
    pub(crate) slots: Option<u16>,
}

impl Identity {
    /// A pool of one device, which has the pool's id.
    pub(crate) fn alone(pool: PoolId) -> Self {
        let device = PoolDeviceId(pool.0);
        Self { device, membership: Membership::alone(device, MemberState::Live), slots: None }
    }
}

/// Replica slots of a pool on a device of `len` bytes.
pub(crate) fn slots_for(len: u64) -> u16 {
    let slots = (len >> 20).clamp(16, 256).max((len >> 28).min(u64::from(MAX_SLOTS)));
    u16::try_from(slots).expect("at most 4096")
}

/// What one page adds to the table's digest. Any mixing will do that makes sums of pages differ.
pub(crate) fn digest_of(page: u32, sequence: u64) -> u64 {
    let mut x = (u64::from(page) << 40) ^ sequence ^ 0x9e37_79b9_7f4a_7c15;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn entries_of_page(segment: &Segment, page: u32) -> u32 {
    (segment.extents - page * ENTRIES_PER_PAGE).min(ENTRIES_PER_PAGE)
}

/// Whether `format` with these options would be refused, and why.
pub(crate) fn check<D: Device>(
    dev: &mut D,
    options: &FormatOptions,
    identity: &Identity,
) -> Result<Superblock, PoolError> {
    if ![512, 1024, 2048, 4096].contains(&options.sector_size) {
        return Err(PoolError::SectorSize(options.sector_size));
    }
    let superblock = plan(options, identity, dev.len())?;
    if !options.force {
        match probe(dev)? {
            Probe::Blank => {}
            Probe::Foreign => return Err(PoolError::HoldsData),
            probe @ Probe::Pool { id, .. } => {
                return Err(PoolError::HoldsPool { id, what: probe.to_string() });
            }
        }
    }
    Ok(superblock)
}

pub(crate) fn format<D: Device>(
    dev: &mut D,
    options: &FormatOptions,
    identity: &Identity,
) -> Result<(), PoolError> {
    let superblock = check(dev, options, identity)?;
    // The superblocks go first and come last: a format cut off half-way leaves no pool behind.
    dev.zero(0, 2 * BLOCK)?;
    dev.flush()?;
    let segment = superblock.segments[0];
    let head = 2 * BLOCK;
    dev.zero(head, segment.data * BLOCK - head)?;
    write_catalog(dev, &superblock)?;
    write_table(dev, &superblock, &segment, options.device_is_zeroed)?;
    let mut block = vec![0; BLOCK_LEN];
    superblock.encode(superblock.backup(), &mut block);
    dev.write_at(superblock.backup() * BLOCK, &block)?;
    dev.flush()?;
    for address in [0, 1] {
        superblock.encode(address, &mut block);
        dev.write_at(address * BLOCK, &block)?;
    }
    dev.flush()?;
    Ok(())
}

fn write_catalog<D: Device>(dev: &mut D, superblock: &Superblock) -> Result<(), PoolError> {
    let mut pages = vec![0; usize::from(superblock.slots) * 2 * BLOCK_LEN];
    for (slot, pair) in (0u16..).zip(pages.chunks_mut(2 * BLOCK_LEN)) {
        for (copy, block) in (0u64..).zip(pair.chunks_mut(BLOCK_LEN)) {
            let address = superblock.catalog_address(slot, copy);
            let empty = CatalogPage { layer: slot, ..CatalogPage::default() };
            empty.encode(slot, address, superblock.pool, block);
        }
    }
    Ok(dev.write_at(superblock.catalog * BLOCK, &pages)?)
}

fn write_table<D: Device>(
    dev: &mut D,
    superblock: &Superblock,
    segment: &Segment,
    zeroed: bool,
) -> Result<(), PoolError> {
    let mut chunk = vec![0; CHUNK_PAGES as usize * BLOCK_LEN];
    let mut first = 0;
    while first < segment.pages() {
        let count = CHUNK_PAGES.min(segment.pages() - first);
        let bytes = &mut chunk[..count as usize * BLOCK_LEN];
        for (index, block) in (first..).zip(bytes.chunks_mut(BLOCK_LEN)) {
            let page = TablePage {
                sequence: FIRST_PAGE_SEQUENCE,
                index,
                entries: entries_of_page(segment, index),
                checkpoint: 0,
                base: FIRST_PAGE_SEQUENCE,
            };
            let entries = (0..page.entries).map(|_| Entry::free(zeroed));
            page.encode(segment.page_address(index, 0), superblock.pool, entries, block);
        }
        dev.write_at(segment.page_address(first, 0) * BLOCK, bytes)?;
        first += count;
    }
    Ok(())
}

const _: () = assert!(VERSION == 1, "a new version needs a reader of the old one");
