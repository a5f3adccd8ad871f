//! Opening a pool: the newest of everything that verifies, then the journal over it.

use crate::control::register_of;
use crate::disk::{
    BLOCK, BLOCK_LEN, BlockError, CatalogPage, CatalogState, Claim, EntryState, INCOMPAT_CHECKSUMS,
    INCOMPAT_KNOWN, JournalBlock, SUPERBLOCK_MAGIC, Segment, Superblock, TablePage, VERSION,
};
use crate::extents::{ExtentState, Extents, Page, page_of};
use crate::format::{CHUNK_PAGES, digest_of, entries_of_page};
use crate::journal::Journal;
use crate::layers::Layer;
use crate::maintain::Maintenance;
use crate::pool::{Deletion, Mapping, Pool, Slot};
use crate::{Device, PoolError};

pub(crate) fn open<D: Device>(dev: &mut D) -> Result<Pool, PoolError> {
    // What is read below may still be in the device's cache, after a crash of the program alone. It is
    // built upon, so it has to be durable first.
    dev.flush()?;
    let (superblock, copy) = read_superblock(dev)?;
    let mut table = read_table(dev, &superblock)?;
    let (mut slots, repairs) = read_catalog(dev, &superblock)?;
    let head = replay(dev, &superblock, &mut table.extents)?;
    let mut layers = assign_layers(&mut slots)?;
    build_maps(&slots, &mut layers, &table.extents)?;
    table.extents.link_free(0);
    let stale = table.extents.iter().filter(|(_, e)| e.dirty).map(|(i, _)| i).collect();
    for (address, block) in &repairs {
        dev.write_at(address * BLOCK, block)?;
    }
    if !repairs.is_empty() {
        dev.flush()?;
    }
    let maintenance = Maintenance::new(&superblock, table.last_checkpoint, table.digest);
    let replicas = (slots, layers);
    Ok(Pool::new(superblock, copy, table.extents, replicas, Journal::new(head), maintenance, stale))
}

/// The newest superblock that verifies, and which copy it is.
pub(crate) fn read_superblock<D: Device>(dev: &mut D) -> Result<(Superblock, u64), PoolError> {
    if dev.len() < 2 * BLOCK {
        return Err(PoolError::TooSmall { len: dev.len(), min: crate::format::MIN_DEVICE });
    }
    let mut block = vec![0; BLOCK_LEN];
    let mut best: Option<(Superblock, u64)> = None;
    let mut marked = false;
    let mut blank = true;
    for address in [0, 1, dev.len() / BLOCK - 1] {
        if address > 1 && (best.is_some() || !marked) {
            // The backup is for two damaged copies, not for a device that is something else by now.
            break;
        }
        dev.read_at(address * BLOCK, &mut block)?;
        blank &= block.iter().all(|&b| b == 0);
        marked |= block[..8] == SUPERBLOCK_MAGIC;
        match Superblock::decode(address, &block) {
            Ok(superblock) => {
                if best.as_ref().is_none_or(|(b, _)| b.sequence < superblock.sequence) {
                    best = Some((superblock, address.min(1)));
                }
            }
            Err(BlockError::Version(found)) => {
                return Err(PoolError::NewerVersion { found, known: VERSION });
            }
            Err(_) => {}
        }
    }
    let Some((superblock, copy)) = best else {
        return Err(match (marked, blank) {
            (true, _) => PoolError::SuperblockDamaged,
            (false, true) => PoolError::Blank,
            (false, false) => PoolError::Foreign,
        });
    };
    let unknown = superblock.incompat & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(PoolError::UnknownFeature { bits: unknown });
    }
    if superblock.incompat & INCOMPAT_CHECKSUMS == 0 {
        return Err(PoolError::NoChecksums);
    }
    if superblock.device_len > dev.len() {
        return Err(PoolError::DeviceShrunk { recorded: superblock.device_len, found: dev.len() });
    }
    Ok((superblock, copy))
}

pub(crate) struct Table {
    pub(crate) extents: Extents,
    pub(crate) digest: u64,
    pub(crate) last_checkpoint: u64,
}

/// Streams the table. A copy that does not verify was torn by a checkpoint that did not complete, or
/// has rotted since: the digest in the superblock tells which.
pub(crate) fn read_table<D: Device>(
    dev: &mut D,
    superblock: &Superblock,
) -> Result<Table, PoolError> {
    let mut table =
        Table { extents: Extents::default(), digest: 0, last_checkpoint: superblock.checkpoint };
    let pages = superblock.segments.iter().map(Segment::pages).sum();
    table.extents.reserve(superblock.extents(), pages);
    let mut completed = 0u64;
    let mut suspect = None;
    let chunk = CHUNK_PAGES as usize * BLOCK_LEN;
    let mut copies = [vec![0; chunk], vec![0; chunk]];
    for segment in &superblock.segments {
        let before = u32::try_from(table.extents.pages.len()).expect("counted in 31 bits");
        for local in 0..segment.pages() {
            let at = local % CHUNK_PAGES;
            if at == 0 {
                let bytes = CHUNK_PAGES.min(segment.pages() - local) as usize * BLOCK_LEN;
                for (copy, buf) in (0u64..).zip(&mut copies) {
                    dev.read_at(segment.page_address(local, copy) * BLOCK, &mut buf[..bytes])?;
                }
            }
            let at = at as usize * BLOCK_LEN;
            let blocks = [&copies[0][at..at + BLOCK_LEN], &copies[1][at..at + BLOCK_LEN]];
            let global = before + local;
            let (page, block, bad) = choose_page(superblock, segment, local, blocks)
                .ok_or(PoolError::TableDamaged { page: global })?;
            if bad && suspect.is_none() {
                suspect = Some(global);
            }
            let durable =
                if page.checkpoint <= superblock.checkpoint { page.sequence } else { page.base };
            completed = completed.wrapping_add(digest_of(global, durable));
            table.digest = table.digest.wrapping_add(digest_of(global, page.sequence));
            table.last_checkpoint = table.last_checkpoint.max(page.checkpoint);
            table.extents.pages.push(Page {
                sequence: page.sequence,
                checkpoint: page.checkpoint,
                base: page.base,
                dirty: false,
            });
            for i in 0..page.entries {
                let entry = TablePage::entry(block, i)
                    .map_err(|_| PoolError::TableDamaged { page: global })?;
                table.extents.push(entry);
            }
        }
    }
    if completed != superblock.table_digest {
        return Err(match suspect {
            Some(page) => PoolError::TableDamaged { page },
            None => PoolError::Inconsistent("the allocation table is older than the superblock"),
        });
    }
    Ok(table)
}

/// The newer copy of a page that verifies, and whether the other one holds something that does not.
fn choose_page<'a>(
    superblock: &Superblock,
    segment: &Segment,
    local: u32,
    blocks: [&'a [u8]; 2],
) -> Option<(TablePage, &'a [u8], bool)> {
    let entries = entries_of_page(segment, local);
    let mut best: Option<(TablePage, &[u8])> = None;
    let mut bad = false;
    for (copy, block) in (0u64..).zip(blocks) {
        let address = segment.page_address(local, copy);
        match TablePage::decode(local, entries, address, superblock.pool, block) {
            Ok(page) if page.sequence & 1 == copy => {
                if best.is_none_or(|(b, _)| b.sequence < page.sequence) {
                    best = Some((page, block));
                }
            }
            _ => bad |= block.iter().any(|&b| b != 0),
        }
    }
    best.map(|(page, block)| (page, block, bad))
}

/// Slots, and the copies of their pages that should be rewritten from their twins.
type Catalog = (Vec<Slot>, Vec<(u64, Vec<u8>)>);

pub(crate) fn read_catalog<D: Device>(
    dev: &mut D,
    superblock: &Superblock,
) -> Result<Catalog, PoolError> {
    let mut bytes = vec![0; usize::from(superblock.slots) * 2 * BLOCK_LEN];
    dev.read_at(superblock.catalog * BLOCK, &mut bytes)?;
    let mut slots = Vec::with_capacity(usize::from(superblock.slots));
    let mut repairs = Vec::new();
    for (index, pair) in (0u16..).zip(bytes.chunks(2 * BLOCK_LEN)) {
        let read = |copy: u64, block| {
            let address = superblock.catalog_address(index, copy);
            CatalogPage::decode(index, address, superblock.pool, block).ok()
        };
        let (a, b) = pair.split_at(BLOCK_LEN);
        let (page, copy, repair) = match (read(0, a), read(1, b)) {
            (Some(a), Some(b)) if b.sequence > a.sequence => (b, 1, true),
            (Some(a), Some(b)) => {
                let differ = a.sequence != b.sequence;
                (a, 0, differ)
            }
            (Some(a), None) => (a, 0, true),
            (None, Some(b)) => (b, 1, true),
            (None, None) => return Err(PoolError::CatalogDamaged { slot: index }),
        };
        if repair {
            let address = superblock.catalog_address(index, 1 - copy);
            let mut block = vec![0; BLOCK_LEN];
            page.encode(index, address, superblock.pool, &mut block);
            repairs.push((address, block));
        }
        let deleting = page.state == CatalogState::Deleting;
        let deletion = if deleting { Deletion::Extents(0) } else { Deletion::No };
        let register = register_of(&page);
        slots.push(Slot {
            page,
            register,
            durable_copy: copy,
            deleting,
            deletion,
            ..Slot::default()
        });
    }
    Ok((slots, repairs))
}

/// Applies the journal from its tail. Returns the sequence of the next block.
fn replay<D: Device>(
    dev: &mut D,
    superblock: &Superblock,
    extents: &mut Extents,
) -> Result<u64, PoolError> {
    let blocks = superblock.journal_blocks;
    let fit = |_| PoolError::Inconsistent("the journal does not fit in memory");
    let mut ring = vec![0; usize::try_from(blocks * BLOCK).map_err(fit)?];
    dev.read_at(superblock.journal * BLOCK, &mut ring)?;
    let mut next = superblock.journal_tail;
    for _ in 0..blocks {
        let at = usize::try_from(next % blocks).map_err(fit)? * BLOCK_LEN;
        let block = &ring[at..at + BLOCK_LEN];
        let address = superblock.journal_address(next);
        match JournalBlock::decode(address, superblock.pool, block) {
            Ok(head) if head.sequence == next => {
                for i in 0..head.records {
                    let applied = JournalBlock::record(block, i)
                        .is_ok_and(|record| extents.replay(record.extent, record.entry));
                    if !applied {
                        return Err(PoolError::JournalDamaged { sequence: next });
                    }
                    let record = JournalBlock::record(block, i).expect("read just now");
                    let page = page_of(&superblock.segments, record.extent);
                    extents.pages[page as usize].dirty = true;
                }
            }
            _ => break,
        }
        next += 1;
    }
    // A block is written only once those before it are durable. So a block that does not verify was
    // the last one, torn; unless a later one is there.
    for (address, block) in (superblock.journal..).zip(ring.chunks(BLOCK_LEN)) {
        if let Ok(head) = JournalBlock::decode(address, superblock.pool, block)
            && head.sequence >= next
        {
            return Err(PoolError::JournalDamaged { sequence: next });
        }
    }
    Ok(next)
}

/// Gives every slot its layer, and every layer its parent.
///
/// A snapshot whose page takes the layer that its replica still has is what a crash left of one that was
/// being taken, whether the replica lives or has been deleted since: it is released. It and the free slots
/// get the numbers that nobody has.
fn assign_layers(slots: &mut [Slot]) -> Result<Vec<Layer>, PoolError> {
    let other = |s: &&Slot| {
        s.page.state != CatalogState::Free && s.page.block_size != cairn_block::BlockSize::B4096
    };
    if slots.iter().any(|s| other(&s)) {
        return Err(PoolError::Inconsistent("a replica has a block size that is not served"));
    }
    let mut layers: Vec<Layer> = slots.iter().map(|_| Layer::default()).collect();
    let mut owned = vec![false; slots.len()];
    let mut without = Vec::new();
    for claim in Claim::ORDER {
        let of = |(_, slot): &(u16, &mut Slot)| slot.page.claim() == Some(claim);
        for (index, slot) in (0u16..).zip(&mut *slots).filter(of) {
            let layer = usize::from(slot.page.layer);
            match owned.get_mut(layer) {
                Some(owned) if !*owned => *owned = true,
                Some(_) if claim.may_be_void() => {
                    slot.deleting = true;
                    slot.deletion = Deletion::Checkpoint(0);
                    without.push(index);
                    continue;
                }
                _ => return Err(PoolError::Inconsistent("two replicas have one layer")),
            }
            slot.layer = slot.page.layer;
            layers[layer].owner = index;
            layers[layer].parent = slot.page.parent;
        }
    }
    let free = (0u16..).zip(&*slots).filter(|(_, s)| s.page.state == CatalogState::Free);
    without.extend(free.map(|(index, _)| index));
    let mut spare = (0u16..).zip(&owned).filter(|(_, owned)| !**owned).map(|(layer, _)| layer);
    for index in without {
        let layer = spare.next().ok_or(PoolError::Inconsistent("layers are missing"))?;
        slots[usize::from(index)].layer = layer;
        layers[usize::from(layer)].owner = index;
    }
    for at in 0..layers.len() {
        let Some(parent) = layers[at].parent.map(usize::from) else { continue };
        let there = owned.get(parent).is_some_and(|&owned| owned)
            && slots[usize::from(layers[parent].owner)].page.state != CatalogState::Live;
        if !there {
            return Err(PoolError::Inconsistent("a layer's parent is not a snapshot's"));
        }
        layers[parent].children += 1;
    }
    for layer in &layers {
        let chain = core::iter::successors(Some(layer), |at| {
            at.parent.map(|parent| &layers[usize::from(parent)])
        });
        if chain.take(layers.len() + 1).count() > layers.len() {
            return Err(PoolError::Inconsistent("layers are each other's parents"));
        }
    }
    Ok(layers)
}

/// Builds each layer's map out of the table, which names each physical extent once.
fn build_maps(slots: &[Slot], layers: &mut [Layer], extents: &Extents) -> Result<(), PoolError> {
    for (index, extent) in extents.iter() {
        if extent.state != ExtentState::Allocated {
            continue;
        }
        debug_assert_eq!(extents.entry(index).state, EntryState::Allocated);
        let layer = layers
            .get_mut(usize::from(extent.layer))
            .ok_or(PoolError::Inconsistent("an extent belongs to a layer that is not there"))?;
        let slot = &slots[usize::from(layer.owner)];
        if slot.page.state == CatalogState::Free || slot.page.layer != slot.layer {
            return Err(PoolError::Inconsistent(
                "an extent belongs to a replica that is not there",
            ));
        }
        if u64::from(extent.link) >= slot.extents() {
            return Err(PoolError::Inconsistent("an extent lies past the end of its replica"));
        }
        if layer.mapping(extent.link) != Mapping::Hole {
            return Err(PoolError::Inconsistent("two extents claim one place in a replica"));
        }
        layer.map_to(extent.link, index);
        layer.allocated += 1;
    }
    Ok(())
}
