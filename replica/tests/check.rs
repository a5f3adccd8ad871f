//! The check of a pool: damage in every structure, what is told of it, and what a repair makes of it.
//! And inspection of the same pools.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{Epoch, IoOp, IoStatus, ReplicaId, SnapshotId};
use cairn_replica::disk::{
    CatalogPage, CatalogState, Entry, EntryState, JournalBlock, Record, Superblock, reseal,
};
use cairn_replica::{
    CheckOptions, CheckReport, Device, MarkedBy, Pool, Problem, Register, Severity, SnapshotSpec,
    SparseDevice, check_pool, inspect_checksums, inspect_dirty, inspect_extents, inspect_journal,
    inspect_map, inspect_superblock,
};
use common::world::World;
use common::{BLOCK, Disk, MIB, Sim};

const LEN: u64 = 16 * MIB;
const WRITE: IoOp = IoOp::Write { fua: true };

/// Three extents of a snapshot, washed and clean; one of them written over since; and one more extent
/// that is dirty by the journal.
fn used_pool() -> (SparseDevice, Superblock) {
    let mut sim = Sim::formatted(LEN, true, 4);
    let slot = sim.create(7, 6);
    let tag = sim.tag();
    let register = Register { promised_epoch: Epoch(9), seq: 3, ..Register::default() };
    sim.pool.write_register(tag, slot, register, &mut sim.mem);
    assert!(sim.wait(tag).status.is_ok());
    for extent in 0..3 {
        assert!(sim.request(slot, WRITE, extent * 256, 4, 0x11).is_ok());
    }
    let tag = sim.tag();
    let spec = SnapshotSpec { id: SnapshotId(5), name: "s".to_owned(), created: 1 };
    sim.pool.create_snapshot(tag, slot, spec, &mut sim.mem);
    assert!(sim.wait(tag).status.is_ok());
    assert!(sim.request(slot, WRITE, 256, 1, 0x22).is_ok());
    let zeros = IoOp::WriteZeroes { unmap: false, fua: true };
    assert!(sim.request(slot, zeros, 257, 1, 0).is_ok());
    sim.checkpoint();
    assert!(sim.request(slot, WRITE, 4 * 256, 2, 0x33).is_ok());
    let mut dev = sim.disk.now;
    let superblock = newest(&mut dev);
    (dev, superblock)
}

fn newest(dev: &mut SparseDevice) -> Superblock {
    let copies = inspect_superblock(dev).unwrap();
    copies.into_iter().filter_map(|c| c.content.ok()).max_by_key(|s| s.sequence).unwrap()
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

/// The entry that holds now for the layer's extent; replica 7 is in slot 0.
fn extent_of(dev: &mut SparseDevice, state: CatalogState, logical: u32) -> u32 {
    let maps = inspect_map(dev, None).unwrap().found;
    let map = maps.iter().find(|map| map.state == state).unwrap();
    let extent = map.extents.iter().find(|e| e.logical == logical).unwrap();
    extent.sources.first().unwrap().extent
}

/// Says something of an extent in a journal block after the last one.
fn log(dev: &mut SparseDevice, records: &[Record]) {
    let superblock = newest(dev);
    let last = inspect_journal(dev).unwrap().last().map_or(0, |block| block.sequence);
    let sequence = superblock.journal_tail.max(last + 1);
    let address = superblock.journal_address(sequence);
    let mut block = vec![0; BLOCK];
    let records = records.iter().copied();
    JournalBlock::encode(sequence, address, superblock.pool, records, &mut block);
    dev.write_at(address * 4096, &block).unwrap();
}

fn check(dev: &mut SparseDevice) -> CheckReport {
    check_pool(dev, &CheckOptions { repair: false, data: true }).unwrap()
}

fn repair(dev: &mut SparseDevice) -> CheckReport {
    check_pool(dev, &CheckOptions { repair: true, data: true }).unwrap()
}

fn intact(dev: SparseDevice) {
    let mut sim = Sim::open(Disk::new(dev), 4);
    let slot = sim.pool.find(ReplicaId(7)).unwrap();
    assert_eq!(sim.pool.register(slot).unwrap().promised_epoch, Epoch(9));
    let all = |bytes: &[u8], byte| bytes.iter().all(|&b| b == byte);
    assert!(all(&sim.read(slot, 0, 4), 0x11));
    assert!(all(&sim.read(slot, 256, 1), 0x22));
    assert!(all(&sim.read(slot, 257, 1), 0));
    assert!(all(&sim.read(slot, 258, 2), 0x11));
    assert!(all(&sim.read(slot, 4 * 256, 2), 0x33));
    let snapshot = sim.pool.find_snapshot(ReplicaId(7), SnapshotId(5)).unwrap();
    assert!(all(&sim.read(snapshot, 256, 4), 0x11));
}

/// The damage is told as `severity`; without a repair nothing is written. A repair leaves nothing behind
/// but notes, and the pool opens with all that it had.
fn is_mended(mut dev: SparseDevice, found: impl Fn(&Problem) -> bool) {
    let before = dev.clone();
    let report = check(&mut dev);
    let finding = report.findings.iter().find(|f| found(&f.problem));
    let problem = &finding.unwrap_or_else(|| panic!("{:?}", report.findings)).problem;
    assert_eq!(problem.severity(), Severity::Mendable, "{problem}");
    assert!(report.is_damaged() && !report.is_repaired());
    assert!(!problem.meaning().is_empty());
    assert_same(&before, &dev);
    let report = repair(&mut dev);
    assert!(report.is_repaired() && !report.is_damaged(), "{:?}", report.findings);
    let report = check(&mut dev);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    intact(dev);
}

/// The damage is told and stays, and a repair changes nothing of it.
fn stays(mut dev: SparseDevice, found: impl Fn(&Problem) -> bool) {
    for round in 0..2 {
        let report = if round == 0 { check(&mut dev) } else { repair(&mut dev) };
        let finding = report.findings.iter().find(|f| found(&f.problem));
        let finding = finding.unwrap_or_else(|| panic!("{:?}", report.findings));
        assert_eq!(finding.problem.severity(), Severity::Damage);
        assert!(!finding.repaired && report.is_damaged());
    }
}

fn assert_same(a: &SparseDevice, b: &SparseDevice) {
    let (mut a, mut b) = (a.clone(), b.clone());
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..LEN).step_by(1 << 20) {
        a.read_at(at, &mut left).unwrap();
        b.read_at(at, &mut right).unwrap();
        assert!(left == right, "a check without repair wrote at {at}");
    }
}

#[test]
fn an_undamaged_pool_is_clean() {
    let (mut dev, _) = used_pool();
    let report = check(&mut dev);
    assert!(!report.is_damaged(), "{:?}", report.findings);
    assert_eq!((report.checked.replicas, report.checked.snapshots), (1, 1));
    assert_eq!(report.checked.allocated, 5);
    assert_eq!(report.checked.dirty, 1);
    assert_eq!(report.checked.good_blocks, 3 * 4 + 1);
    intact(dev);
}

#[test]
fn superblocks_are_rewritten_from_one_that_is_whole() {
    let (dev, superblock) = used_pool();
    let copies = [0, 1, superblock.backup()];
    for damaged in [vec![0], vec![1], vec![superblock.backup()], vec![0, 1]] {
        let mut dev = dev.clone();
        // The older copies follow before one of them has to do.
        repair(&mut dev);
        damaged.iter().for_each(|&copy| flip(&mut dev, copy));
        let mut mended = dev.clone();
        is_mended(
            dev,
            |p| matches!(p, Problem::Superblock { address, .. } if damaged.contains(address)),
        );
        repair(&mut mended);
        for other in copies {
            let mut dev = mended.clone();
            copies.iter().filter(|&&c| c != other).for_each(|&c| flip(&mut dev, c));
            if other != superblock.backup() {
                intact(dev);
            }
        }
    }
    let mut dev = dev;
    copies.iter().for_each(|&copy| flip(&mut dev, copy));
    check_pool(&mut dev, &CheckOptions::default()).unwrap_err();
}

#[test]
fn a_catalog_page_is_rewritten_from_its_twin() {
    let (dev, superblock) = used_pool();
    for slot in [0, 1, 9] {
        for copy in [0u8, 1] {
            let mut dev = dev.clone();
            flip(&mut dev, superblock.catalog_address(slot, u64::from(copy)));
            is_mended(
                dev,
                |p| matches!(p, Problem::CatalogCopy { slot: s, copy: c, .. } if (*s, *c) == (slot, copy)),
            );
        }
        let mut dev = dev.clone();
        flip(&mut dev, superblock.catalog_address(slot, 0));
        flip(&mut dev, superblock.catalog_address(slot, 1));
        stays(dev, |p| matches!(p, Problem::CatalogLost { slot: s, .. } if *s == slot));
    }
    // Equally new, and different.
    let mut dev = dev;
    edit(&mut dev, superblock.catalog_address(0, 1), |b| {
        b[96] ^= 1;
        reseal(b);
    });
    stays(dev, |p| matches!(p, Problem::CatalogTwins { slot: 0 }));
}

#[test]
fn a_lost_table_page_is_told_and_an_older_copy_is_not_needed() {
    let (dev, superblock) = used_pool();
    let places = [0, 1].map(|copy| superblock.segments[0].page_address(0, copy));
    let mut told = 0;
    for place in places {
        let mut dev = dev.clone();
        flip(&mut dev, place);
        let report = check(&mut dev);
        let note = report.findings.iter().any(|f| matches!(f.problem, Problem::TableCopy { .. }));
        let old = |p: &Problem| {
            matches!(p, Problem::TableOld { page: Some(0) } | Problem::TableLost { .. })
        };
        if report.is_damaged() {
            told += 1;
            Pool::open(&mut dev.clone()).unwrap_err();
            stays(dev, old);
        } else {
            assert!(note);
            intact(dev);
        }
    }
    assert_eq!(told, 1);
    let mut dev = dev;
    places.iter().for_each(|&place| flip(&mut dev, place));
    stays(dev.clone(), |p| matches!(p, Problem::TableLost { page: 0 }));
    stays(dev, |p| matches!(p, Problem::ExtentUnknown { extent: 0 }));
}

#[test]
fn a_damaged_journal_is_told() {
    let (mut dev, superblock) = used_pool();
    log(&mut dev, &[]);
    let live: Vec<_> =
        inspect_journal(&mut dev).unwrap().into_iter().filter(|b| !b.checkpointed).collect();
    assert_eq!(live.len(), 2);
    let mut holed = dev.clone();
    flip(&mut holed, live[0].address);
    stays(holed.clone(), |p| matches!(p, Problem::JournalHole { .. }));
    let tail = superblock.journal_tail;
    let damaged = inspect_dirty(&mut holed).unwrap().damaged;
    assert!(damaged.iter().any(|d| d.to_string().contains(&format!("journal block {tail}"))));
    edit(&mut dev, live[1].address, |b| {
        b[48] = 1;
        b[64..68].copy_from_slice(&u32::MAX.to_le_bytes());
        reseal(b);
    });
    stays(dev, |p| matches!(p, Problem::JournalRecords { .. }));
}

fn stray(layer: u16, logical: u32) -> Entry {
    Entry {
        state: EntryState::Allocated,
        layer,
        logical,
        birth: 1,
        dirty: true,
        ..Entry::free(false)
    }
}

#[test]
fn an_extent_of_a_layer_that_nobody_has_is_freed() {
    for layer in [12, 900] {
        let (mut dev, _) = used_pool();
        log(&mut dev, &[Record { extent: 9, entry: stray(layer, 0) }]);
        Pool::open(&mut dev.clone()).unwrap_err();
        is_mended(dev, |p| matches!(p, Problem::Orphan { extent: 9, .. }));
    }
    // Not where the page is lost that might have the layer.
    let (mut dev, superblock) = used_pool();
    log(&mut dev, &[Record { extent: 9, entry: stray(12, 0) }]);
    flip(&mut dev, superblock.catalog_address(12, 0));
    flip(&mut dev, superblock.catalog_address(12, 1));
    stays(dev, |p| matches!(p, Problem::Orphan { extent: 9, certain: false, .. }));
}

#[test]
fn a_free_extent_that_is_not_free_of_everything_is_zeroed_again() {
    let (mut dev, _) = used_pool();
    let entry = Entry { logical: 3, ..Entry::free(false) };
    log(&mut dev, &[Record { extent: 9, entry }]);
    is_mended(dev, |p| matches!(p, Problem::FreeEntry { extent: 9, .. }));
    let (mut dev, superblock) = used_pool();
    dev.write_at((superblock.segments[0].data + 9 * 256 + 3) * 4096, &[7; 4096]).unwrap();
    is_mended(dev, |p| matches!(p, Problem::NotZeroed { extent: 9, .. }));
}

/// A device that takes another's extents was killed twice: each time a copy of one was cut off, and `fsck` called the
/// two of them damage that no pool opens with. Opening frees them.
#[test]
fn copies_that_were_cut_off_are_no_contradiction() {
    let (mut dev, _) = used_pool();
    let layer = inspect_map(&mut dev.clone(), Some(ReplicaId(7))).unwrap().found[0].layer;
    for extent in [9, 10] {
        let entry = Entry { incoming: true, ..stray(layer, 1) };
        log(&mut dev, &[Record { extent, entry }]);
    }
    assert!(!check(&mut dev).is_damaged(), "{:?}", check(&mut dev).findings);
    Pool::open(&mut dev).unwrap();
}

#[test]
fn contradictions_between_extents_stay() {
    let (dev, _) = used_pool();
    let layer = inspect_map(&mut dev.clone(), Some(ReplicaId(7))).unwrap().found[0].layer;
    let mut double = dev.clone();
    log(&mut double, &[Record { extent: 9, entry: stray(layer, 1) }]);
    Pool::open(&mut double.clone()).unwrap_err();
    stays(double, |p| matches!(p, Problem::Double { extent: 9, .. }));
    let mut beyond = dev.clone();
    log(&mut beyond, &[Record { extent: 9, entry: stray(layer, 6) }]);
    Pool::open(&mut beyond.clone()).unwrap_err();
    stays(beyond, |p| matches!(p, Problem::PastEnd { extent: 9, logical: 6, end: 6, .. }));
    let mut unborn = dev;
    log(&mut unborn, &[Record { extent: 9, entry: Entry { birth: 1 << 40, ..stray(layer, 5) } }]);
    stays(unborn, |p| matches!(p, Problem::Unborn { extent: 9, .. }));
}

/// Changes both copies of a slot's page.
fn edit_page(dev: &mut SparseDevice, slot: u16, change: impl Fn(&mut CatalogPage)) {
    let superblock = newest(dev);
    for copy in [0, 1] {
        let address = superblock.catalog_address(slot, copy);
        edit(dev, address, |block| {
            let mut page = CatalogPage::decode(slot, address, superblock.pool, block).unwrap();
            change(&mut page);
            page.encode(slot, address, superblock.pool, block);
        });
    }
}

#[test]
fn contradictions_between_layers_stay() {
    let (dev, _) = used_pool();
    let maps = inspect_map(&mut dev.clone(), None).unwrap().found;
    let of = |state| maps.iter().find(|map| map.state == state).unwrap();
    let (live, snapshot) = (of(CatalogState::Live), of(CatalogState::Snapshot));
    assert_eq!(live.parent, Some(snapshot.layer));

    let mut taken = dev.clone();
    edit_page(&mut taken, 3, |page| {
        page.state = CatalogState::Live;
        page.layer = live.layer;
    });
    Pool::open(&mut taken.clone()).unwrap_err();
    stays(taken, |p| matches!(p, Problem::LayerTaken { .. }));

    let mut parent = dev.clone();
    edit_page(&mut parent, live.slot, |page| page.parent = Some(14));
    Pool::open(&mut parent.clone()).unwrap_err();
    stays(parent, |p| matches!(p, Problem::Parent { parent: 14, .. }));

    let mut circle = dev.clone();
    edit_page(&mut circle, snapshot.slot, |page| page.parent = Some(page.layer));
    Pool::open(&mut circle.clone()).unwrap_err();
    let map = inspect_map(&mut circle, None).unwrap().found;
    assert!(map.iter().all(|map| map.circular));
    stays(circle, |p| matches!(p, Problem::Circle { .. }));

    // What a crash leaves of a snapshot that was being taken.
    let mut half = dev;
    edit_page(&mut half, 3, |page| {
        *page = CatalogPage {
            state: CatalogState::Snapshot,
            flags: 2,
            layer: live.layer,
            blocks: 256,
            sequence: page.sequence,
            ..CatalogPage::default()
        };
    });
    let report = check(&mut half);
    assert!(report.findings.iter().any(|f| matches!(f.problem, Problem::SlotReleased { slot: 3 })));
    assert!(!report.is_damaged());
    intact(half);
}

#[test]
fn a_damaged_checksum_page_keeps_its_reads_errors() {
    let (mut dev, superblock) = used_pool();
    let extent = extent_of(&mut dev, CatalogState::Snapshot, 2);
    let info = inspect_checksums(&mut dev, Some(extent), true).unwrap();
    assert_eq!(info.found.len(), 1);
    let page = &info.found[0];
    let current = page.current.unwrap();
    let copy = page.copies[usize::from(current)].unwrap();
    assert_eq!((copy.valid, copy.zeroed, copy.incoming), (4, 0, 0));
    assert_eq!(page.blocks.as_ref().unwrap().good, 4);
    // The other copy is not needed.
    let other = superblock.segments[0].sums_address(extent) + u64::from(1 - current);
    let mut dev_other = dev.clone();
    flip(&mut dev_other, other);
    assert!(!check(&mut dev_other).is_damaged());
    let block = superblock.segments[0].sums_address(extent) + u64::from(current);
    flip(&mut dev, block);
    stays(dev.clone(), |p| matches!(p, Problem::Checksums { extent: e, .. } if *e == extent));
    let info = inspect_checksums(&mut dev, None, true).unwrap();
    assert_eq!(info.found.len(), 5);
    assert!(info.damaged.iter().any(|d| d.block == block));
    assert!(info.found.iter().any(|i| i.extent == extent && i.is_lost()));
    let mut sim = Sim::open(Disk::new(dev), 4);
    let slot = sim.pool.find(ReplicaId(7)).unwrap();
    assert_eq!(sim.request(slot, IoOp::Read, 2 * 256, 4, 0), IoStatus::MediaError);
    assert!(sim.request(slot, IoOp::Read, 0, 4, 0).is_ok());
}

#[test]
fn a_block_that_rots_is_found_with_its_place() {
    let (mut dev, superblock) = used_pool();
    let extent = extent_of(&mut dev, CatalogState::Snapshot, 2);
    let block = superblock.segments[0].data + u64::from(extent) * 256 + 3;
    flip(&mut dev, block);
    let report = check_pool(&mut dev, &CheckOptions::default()).unwrap();
    assert!(!report.is_damaged(), "the data was not asked for");
    stays(dev.clone(), |p| {
        matches!(p, Problem::Block { replica: Some(ReplicaId(7)), bad, .. }
            if bad.offset == block * 4096 && bad.lba == Some(2 * 256 + 3))
    });
    let info = inspect_checksums(&mut dev, Some(extent), true).unwrap();
    let blocks = info.found[0].blocks.as_ref().unwrap();
    assert_eq!((blocks.good, blocks.bad.len()), (3, 1));
    assert_eq!(blocks.bad[0].lba, Some(2 * 256 + 3));
}

#[test]
fn the_map_says_which_layer_answers() {
    let (mut dev, _) = used_pool();
    let maps = inspect_map(&mut dev, Some(ReplicaId(7))).unwrap();
    assert!(maps.damaged.is_empty());
    let live = maps.found.iter().find(|m| m.state == CatalogState::Live).unwrap();
    let snapshot = maps.found.iter().find(|m| m.state == CatalogState::Snapshot).unwrap();
    assert_eq!((live.depth, snapshot.depth), (2, 1));
    let logicals: Vec<u32> = live.extents.iter().map(|e| e.logical).collect();
    assert_eq!(logicals, [0, 1, 2, 4]);
    let sources = &live.extents[1].sources;
    // Written and zeroed over the snapshot, and the rest of it beneath.
    assert_eq!((sources[0].layer, sources[0].blocks), (live.layer, Some(2)));
    assert_eq!((sources[1].layer, sources[1].blocks), (snapshot.layer, Some(2)));
    assert_eq!(live.extents[0].sources.len(), 1);
    assert_eq!(live.extents[0].sources[0].layer, snapshot.layer);
    assert_eq!(live.extents[3].sources[0].blocks, None, "it is dirty: its page may be behind");
    assert!(inspect_map(&mut dev, Some(ReplicaId(8))).unwrap().found.is_empty());
}

#[test]
fn dirty_extents_are_those_of_the_table_and_of_the_journal_after_it() {
    let (mut dev, superblock) = used_pool();
    let dirty =
        inspect_dirty(&mut dev).unwrap().found.into_iter().filter(|d| d.dirty).collect::<Vec<_>>();
    assert_eq!(dirty.len(), 1);
    assert_eq!(dirty[0].logical, 4);
    assert_eq!(dirty[0].marked_by, MarkedBy::Journal(superblock.journal_tail));
    assert_eq!(dirty[0].replica, Some(ReplicaId(7)));
    let pool = Pool::open(&mut dev).unwrap();
    assert_eq!(pool.dirty_extents(), dirty.len() as u64);
}

#[test]
fn inspection_and_check_read_whatever_is_damaged() {
    let (dev, superblock) = used_pool();
    let metadata = superblock.segments[0].data;
    for block in (0..metadata).chain([superblock.backup()]) {
        for byte in [0, 12, 25, 49, 51, 57, 65, 97, 99, 101, 121, 123, 129, 4095] {
            let mut dev = dev.clone();
            edit(&mut dev, block, |b| b[byte] ^= 0x81);
            for _ in 0..2 {
                let _ = inspect_map(&mut dev, None);
                let _ = inspect_dirty(&mut dev);
                let _ = inspect_checksums(&mut dev, None, false);
                let _ = inspect_extents(&mut dev);
                let _ = check_pool(&mut dev.clone(), &CheckOptions { repair: true, data: false });
                // As a hostile writer would have it.
                edit(&mut dev, block, reseal);
            }
        }
    }
}

/// Whatever is cut off when, the check finds nothing that a crash does not leave; and what a repair
/// leaves opens.
#[test]
fn a_crash_leaves_nothing_to_mend_but_torn_copies() {
    for seed in 0..60 {
        let mut world = World::new(24 * MIB, seed % 2 == 0, seed);
        world.sim.check = false;
        for _ in 0..250 {
            world.act();
        }
        let power = seed % 3 != 0;
        let disk = &mut world.sim.disk;
        let disk = std::mem::replace(disk, Disk::new(SparseDevice::new(0)));
        let mut rng = common::Rng(seed);
        let mut disk = if power { disk.cut(&mut rng) } else { disk.kill(&mut rng) };
        let report = check_pool(&mut disk, &CheckOptions { repair: false, data: true }).unwrap();
        for finding in &report.findings {
            let problem = &finding.problem;
            let torn = matches!(problem, Problem::Superblock { .. } | Problem::CatalogCopy { .. });
            assert!(problem.severity() == Severity::Note || torn, "seed {seed}: {problem}");
        }
        let report = check_pool(&mut disk, &CheckOptions { repair: true, data: false }).unwrap();
        assert!(!report.is_damaged());
        let mut world = world.recover(disk, seed, power);
        world.settle();
        world.verify_all(false);
    }
}
