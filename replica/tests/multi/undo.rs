//! Undo logs: at addresses of their own, out of everybody's sight, and as durable as anything else.

use cairn_block::{IoOp, IoStatus, ReplicaId, undo};
use cairn_replica::{CheckOptions, SnapshotSpec, check_pool};

use crate::common::{EXTENT_BLOCKS, MIB};
use crate::set::{Set, formatted};

const DISK: u64 = 24 * MIB;
const WRITE: IoOp = IoOp::Write { fua: true };

fn entry(n: u64) -> (u64, u64) {
    let range = undo::payload_of(n, 0, 20);
    (range.start().0, range.blocks())
}

#[test]
fn logs_are_apart_from_replicas_and_from_each_other() {
    for disks in 1..3 {
        let mut set = Set::formatted(&vec![DISK; disks], 3);
        let slots = [set.create(7, 2), set.create(8, 2)];
        let (first, blocks) = entry(1);
        let read = set.request(slots[0], IoOp::Read, first, blocks, 0xdd);
        assert_eq!(read, (IoStatus::Ok, vec![0; 20 * 4096]), "nobody has written to it");
        assert_eq!(set.request(slots[0], IoOp::Verify, first, blocks, 0).0, IoStatus::Ok);
        let zeroes = IoOp::WriteZeroes { fua: true, unmap: true };
        let whole = undo::whole();
        let all = (whole.start().0, whole.blocks());
        assert_eq!(set.request(slots[0], zeroes, all.0, all.1, 0).0, IoStatus::Ok);
        set.settle();
        assert_eq!(set.pool.usage().extents_allocated, 0, "and it takes nothing");

        for (slot, byte) in slots.into_iter().zip([0x11, 0x22]) {
            assert_eq!(set.request(slot, WRITE, first, blocks, byte).0, IoStatus::Ok);
        }
        assert_eq!(set.write(slots[0], 0, 2, 0x33), IoStatus::Ok);
        for (slot, byte) in slots.into_iter().zip([0x11, 0x22]) {
            let read = set.request(slot, IoOp::Read, first, blocks, 0xdd);
            assert_eq!(read, (IoStatus::Ok, vec![byte; 20 * 4096]));
        }
        assert_eq!(set.request(slots[0], zeroes, all.0, all.1, 0).0, IoStatus::Ok);
        assert_eq!(set.read(slots[0], first), Ok(0));
        assert_eq!((set.read(slots[1], first), set.read(slots[0], 1)), (Ok(0x22), Ok(0x33)));

        let ids: Vec<ReplicaId> = set.pool.replicas().map(|replica| replica.id).collect();
        assert_eq!(ids, [ReplicaId(7), ReplicaId(8)], "nobody is shown where the logs are");
        assert_eq!(set.pool.usage().extents_provisioned, 4, "nor promised room for them");
        let past = undo::FIRST + undo::BLOCKS;
        assert_eq!(set.request(slots[0], WRITE, past - 1, 2, 1).0, IoStatus::OutOfRange);
        assert_eq!(set.request(slots[0], IoOp::Discard, first, 1, 1).0, IoStatus::Unsupported);
        let nobody = cairn_replica::ReplicaSlot(9);
        assert_eq!(set.request(nobody, WRITE, first, 1, 1).0, IoStatus::PathError);
        // A replica that there is no room beside for a log.
        assert_eq!(set.write(slots[0], EXTENT_BLOCKS, 1, 0x44), IoStatus::Ok);
    }
}

#[test]
fn what_a_log_holds_survives_any_crash() {
    for seed in 0..60 {
        let lens = vec![DISK; 1 + usize::from(seed % 3 == 0)];
        let mut set = Set::open(formatted(&lens), seed, &[]).unwrap();
        let slot = set.create(7, 2);
        let mut acked = 0;
        for round in 1..4 {
            let (first, blocks) = entry(round % 2);
            let (status, _) = set.request(slot, WRITE, first, blocks, 0x10);
            assert_eq!(status, IoStatus::Ok);
            // One that is cut off, of the same blocks.
            let buf = set.mem.alloc(20 * 4096).unwrap();
            use cairn_block::Memory;
            set.mem.bytes_mut(buf.slice()).fill(0x10);
            let tag = set.tag();
            let range = undo::payload_of(round % 2, 0, 20);
            let request = cairn_block::IoRequest { op: WRITE, range, buf: buf.slice() };
            set.pool.submit(tag, slot, request, &mut set.mem);
            for _ in 0..set.rng.below(12) {
                set.step();
            }
            acked = first;
            let power = set.rng.chance(50);
            let (mut disks, mut rng) = set.cut(power);
            for disk in &mut disks {
                let report = check_pool(disk, &CheckOptions::default()).unwrap();
                let errors: Vec<_> = report.findings.iter().map(|f| format!("{f:?}")).collect();
                assert!(!report.is_damaged(), "seed {seed}: {errors:?}");
            }
            set = Set::open(disks, rng.next(), &[]).unwrap();
            assert_eq!(set.read(slot, acked), Ok(0x10), "seed {seed}");
        }
        assert_eq!(set.read(slot, acked + 19), Ok(0x10));
        assert_eq!(set.pool.replicas().count(), 1);
    }
}

#[test]
fn a_log_is_no_part_of_a_snapshot_and_moves_off_a_device_that_is_removed() {
    let mut set = Set::formatted(&[DISK, DISK], 5);
    let slot = set.create(7, 2);
    let (first, blocks) = entry(0);
    assert_eq!(set.request(slot, WRITE, first, blocks, 0x11).0, IoStatus::Ok);
    let tag = set.tag();
    let spec = SnapshotSpec { id: cairn_block::SnapshotId(1), name: "s".to_owned(), created: 1 };
    set.pool.create_snapshot(tag, slot, spec, &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    assert_eq!(set.request(slot, WRITE, first, blocks, 0x22).0, IoStatus::Ok);
    let tag = set.tag();
    set.pool.revert(tag, slot, cairn_block::SnapshotId(1), &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    assert_eq!(set.read(slot, first), Ok(0x22), "it is of now");
    for id in [1, 2] {
        if id == 2 {
            let tag = set.add(3, DISK);
            assert_eq!(set.wait(tag).status, IoStatus::Ok);
        }
        let tag = set.remove(id);
        assert_eq!(set.wait(tag).status, IoStatus::Ok);
        set.settle();
        assert_eq!(set.read(slot, first + 19), Ok(0x22));
    }
}

#[test]
fn where_there_is_no_room_for_a_log_it_says_so() {
    let mut set = Set::formatted(&[8 * MIB], 3);
    let slot = set.create(7, 20);
    let mut extents = 0;
    while set.write(slot, extents * EXTENT_BLOCKS, 1, 1).is_ok() {
        extents += 1;
    }
    let (first, blocks) = entry(0);
    assert_eq!(set.request(slot, WRITE, first, blocks, 0x11).0, IoStatus::NoSpace);
    assert_eq!(set.write(slot, 0, 1, 2), IoStatus::Ok);
}

#[test]
fn a_log_that_a_device_took_with_it_can_be_written_again() {
    let mut set = Set::formatted(&[DISK, DISK], 5);
    let slot = set.create(7, 6);
    for extent in 0..6 {
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, 1), IoStatus::Ok);
    }
    for n in 0..undo::ENTRIES {
        let (first, blocks) = entry(n);
        assert_eq!(set.request(slot, WRITE, first, blocks, 0x11).0, IoStatus::Ok);
    }
    let gone = set.number(2);
    let disk = set.disks[gone].as_mut().unwrap();
    (disk.fail_write, disk.fail_flush) = (true, true);
    // Notices it, and leaves it behind.
    for extent in 0..6 {
        set.request(slot, WRITE, extent * EXTENT_BLOCKS, 1, 2);
    }
    set.flush(slot);
    set.settle();
    for n in 0..undo::ENTRIES {
        let (first, blocks) = entry(n);
        set.request(slot, WRITE, first, blocks, 0x22);
        assert_eq!(set.request(slot, WRITE, first, blocks, 0x33).0, IoStatus::Ok, "entry {n}");
        assert_eq!(set.read(slot, first), Ok(0x33));
    }
}
