//! Every structure damaged in turn: a clear error, or nothing lost; never a panic.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{Epoch, IoOp, PoolId};
use cairn_replica::disk::{CatalogPage, JournalBlock, Superblock, reseal};
use cairn_replica::{
    Device, FormatOptions, MemDevice, Pool, PoolError, Probe, Register, SparseDevice,
    inspect_extents, inspect_journal, inspect_superblock,
};
use common::{BLOCK, Disk, MIB, Sim, options};

const LEN: u64 = 16 * MIB;

/// A pool with a replica whose extents went through a checkpoint, and more in the journal.
fn used_pool() -> (SparseDevice, Superblock) {
    let mut sim = Sim::formatted(LEN, true, 4);
    let slot = sim.create(7, 8);
    let tag = sim.tag();
    let register = Register { promised_epoch: Epoch(9), seq: 3, ..Register::default() };
    sim.pool.write_register(tag, slot, register, &mut sim.mem);
    assert!(sim.wait(tag).status.is_ok());
    let write = IoOp::Write { fua: true };
    for extent in 0..3 {
        assert!(sim.request(slot, write, extent * 256, 4, 0x11).is_ok());
    }
    sim.checkpoint();
    for extent in 3..6 {
        assert!(sim.request(slot, write, extent * 256, 4, 0x22).is_ok());
    }
    let mut dev = sim.disk.now;
    let copies = inspect_superblock(&mut dev).unwrap();
    let newest = copies.into_iter().filter_map(|c| c.content.ok()).max_by_key(|s| s.sequence);
    (dev, newest.unwrap())
}

fn edit(dev: &mut SparseDevice, block: u64, change: impl FnOnce(&mut [u8])) {
    let mut bytes = vec![0; BLOCK];
    dev.read_at(block * 4096, &mut bytes).unwrap();
    change(&mut bytes);
    dev.write_at(block * 4096, &bytes).unwrap();
}

fn flip(dev: &mut SparseDevice, block: u64) {
    edit(dev, block, |b| b[100] ^= 0x40);
}

fn intact(dev: SparseDevice) {
    let mut sim = Sim::open(Disk::new(dev), 4);
    let slot = sim.pool.find(cairn_block::ReplicaId(7)).unwrap();
    assert_eq!(sim.pool.register(slot).unwrap().promised_epoch, Epoch(9));
    for extent in 0..6u64 {
        let byte = if extent < 3 { 0x11 } else { 0x22 };
        assert!(sim.read(slot, extent * 256, 4).iter().all(|&b| b == byte), "extent {extent}");
        assert!(sim.read(slot, extent * 256 + 4, 4).iter().all(|&b| b == 0));
    }
}

fn error(mut dev: SparseDevice) -> PoolError {
    Pool::open(&mut dev).expect_err("the damage is noticed")
}

#[test]
fn an_undamaged_pool_opens() {
    intact(used_pool().0);
}

#[test]
fn one_superblock_is_enough() {
    for copy in [0, 1] {
        let (mut dev, _) = used_pool();
        flip(&mut dev, copy);
        intact(dev);
    }
    let (mut dev, superblock) = used_pool();
    flip(&mut dev, 0);
    flip(&mut dev, 1);
    let before = dev.clone();
    intact(dev);
    let mut dev = before;
    flip(&mut dev, superblock.backup());
    assert!(matches!(error(dev), PoolError::SuperblockDamaged));
}

#[test]
fn what_is_not_ours_is_said_to_be() {
    assert!(matches!(error(SparseDevice::new(LEN)), PoolError::Blank));
    let mut dev = SparseDevice::new(LEN);
    dev.write_at(4096, &[1; 4096]).unwrap();
    assert!(matches!(error(dev.clone()), PoolError::Foreign));
    assert_eq!(Pool::probe(&mut dev).unwrap(), Probe::Foreign);
    assert!(matches!(Pool::format(&mut dev, &options(true)), Err(PoolError::HoldsData)));
    let force = FormatOptions { force: true, ..options(true) };
    Pool::format(&mut dev, &force).unwrap();
    assert!(matches!(
        Pool::format(&mut dev, &options(true)),
        Err(PoolError::HoldsPool { id: PoolId(0xca1), .. })
    ));
    assert!(matches!(error(SparseDevice::new(4096)), PoolError::TooSmall { .. }));
    let mut small = MemDevice::new(1 << 20);
    assert!(matches!(Pool::format(&mut small, &options(true)), Err(PoolError::TooSmall { .. })));
}

#[test]
fn a_later_version_or_feature_is_refused() {
    let (mut dev, _) = used_pool();
    for copy in [0, 1] {
        edit(&mut dev, copy, |b| {
            b[12] = 2;
            reseal(b);
        });
    }
    assert!(matches!(error(dev), PoolError::NewerVersion { found: 2, known: 1 }));
    let (mut dev, _) = used_pool();
    for copy in [0, 1] {
        edit(&mut dev, copy, |b| {
            b[56] = 4;
            reseal(b);
        });
    }
    assert!(matches!(error(dev), PoolError::UnknownFeature { bits: 4 }));
    // A compatible feature is none of our business.
    let (mut dev, _) = used_pool();
    for copy in [0, 1] {
        edit(&mut dev, copy, |b| {
            b[48] = 4;
            reseal(b);
        });
    }
    intact(dev);
}

#[test]
fn a_shorter_device_is_refused() {
    let (mut dev, _) = used_pool();
    let mut short = SparseDevice::new(LEN - MIB);
    let mut page = vec![0; BLOCK];
    for at in (0..LEN - MIB).step_by(BLOCK) {
        dev.read_at(at, &mut page).unwrap();
        short.write_at(at, &page).unwrap();
    }
    assert!(matches!(
        error(short),
        PoolError::DeviceShrunk { recorded: LEN, found } if found == LEN - MIB
    ));
}

#[test]
fn a_catalog_page_has_a_twin() {
    for copy in [0, 1] {
        let (mut dev, superblock) = used_pool();
        flip(&mut dev, superblock.catalog_address(0, copy));
        let twin = dev.clone();
        intact(dev);
        // Open repaired it.
        let mut dev = twin;
        Pool::open(&mut dev).unwrap();
        flip(&mut dev, superblock.catalog_address(0, 1 - copy));
        intact(dev);
    }
    let (mut dev, superblock) = used_pool();
    flip(&mut dev, superblock.catalog_address(3, 0));
    flip(&mut dev, superblock.catalog_address(3, 1));
    assert!(matches!(error(dev), PoolError::CatalogDamaged { slot: 3 }));
}

#[test]
fn a_current_table_page_that_rots_is_noticed() {
    let (dev, superblock) = used_pool();
    let segment = superblock.segments[0];
    let outcomes = [0, 1].map(|copy| {
        let mut dev = dev.clone();
        flip(&mut dev, segment.page_address(0, copy));
        match Pool::open(&mut dev) {
            Ok(_) => {
                intact(dev);
                true
            }
            Err(PoolError::TableDamaged { page: 0 }) => false,
            Err(other) => panic!("{other}"),
        }
    });
    // The older copy is not needed; the newer one is.
    assert_eq!(outcomes.iter().filter(|&&ok| ok).count(), 1);
    let mut dev = dev;
    flip(&mut dev, segment.page_address(0, 0));
    flip(&mut dev, segment.page_address(0, 1));
    assert!(matches!(error(dev), PoolError::TableDamaged { page: 0 }));
}

#[test]
fn a_hole_in_the_journal_is_noticed() {
    let (mut dev, superblock) = used_pool();
    let blocks = inspect_journal(&mut dev).unwrap();
    let live: Vec<_> = blocks.iter().filter(|b| !b.checkpointed).collect();
    assert_eq!(live.len(), 3);
    let mut holed = dev.clone();
    flip(&mut holed, live[0].address);
    let tail = superblock.journal_tail;
    assert!(matches!(error(holed), PoolError::JournalDamaged { sequence } if sequence == tail));
    // A record that verifies and names an extent that is not there.
    edit(&mut dev, live[2].address, |b| {
        b[64..68].copy_from_slice(&u32::MAX.to_le_bytes());
        reseal(b);
    });
    assert!(matches!(error(dev), PoolError::JournalDamaged { .. }));
}

#[test]
fn contradictions_are_refused() {
    let (mut dev, superblock) = used_pool();
    let mut block = vec![0; BLOCK];
    // The replica's catalog page says that nothing is there.
    for copy in [0, 1] {
        let address = superblock.catalog_address(0, copy);
        let empty = CatalogPage { sequence: 50, ..CatalogPage::default() };
        empty.encode(0, address, superblock.pool, &mut block);
        dev.write_at(address * 4096, &block).unwrap();
    }
    assert!(matches!(error(dev), PoolError::Inconsistent(_)));
    // Two extents in one place.
    let (mut dev, superblock) = used_pool();
    let blocks = inspect_journal(&mut dev).unwrap();
    let last = blocks.last().unwrap();
    let mut record = last.records[0];
    record.entry.logical = 0;
    let sequence = last.sequence + 1;
    let address = superblock.journal_address(sequence);
    let records = [record].into_iter();
    JournalBlock::encode(sequence, address, superblock.pool, records, &mut block);
    dev.write_at(address * 4096, &block).unwrap();
    assert!(matches!(error(dev), PoolError::Inconsistent(_)));
}

#[test]
fn inspection_reads_damaged_pools() {
    let (mut dev, superblock) = used_pool();
    flip(&mut dev, superblock.segments[0].page_address(0, 1));
    flip(&mut dev, 0);
    assert_eq!(inspect_superblock(&mut dev).unwrap().len(), 3);
    let (pages, extents) = inspect_extents(&mut dev).unwrap();
    assert_eq!(pages.len(), 2);
    assert_eq!(extents.len(), superblock.extents() as usize);
    inspect_extents(&mut SparseDevice::new(LEN)).unwrap_err();
}

#[test]
fn any_byte_of_the_metadata_may_change() {
    let (dev, superblock) = used_pool();
    let metadata = superblock.segments[0].data;
    for block in (0..metadata).chain([superblock.backup()]) {
        for byte in [0, 9, 12, 17, 25, 33, 49, 51, 57, 65, 97, 129, 4095] {
            let mut dev = dev.clone();
            edit(&mut dev, block, |b| b[byte] ^= 0x81);
            let _ = Pool::open(&mut dev);
            // As a hostile writer would have it.
            edit(&mut dev, block, reseal);
            let _ = Pool::open(&mut dev);
            let _ = inspect_journal(&mut dev);
        }
    }
}
