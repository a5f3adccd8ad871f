//! Snapshots, clones, going back, and what they cost; what crashes do to them is in `crash.rs`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{IoOp, IoStatus, ReplicaId, SnapshotId};
use cairn_replica::{ControlError, ReplicaSlot, SnapshotSpec};
use common::{EXTENT_BLOCKS, MIB, Sim, spec};

const WRITE: IoOp = IoOp::Write { fua: false };

fn take(sim: &mut Sim, slot: ReplicaSlot, id: u128) -> ReplicaSlot {
    let tag = sim.tag();
    let spec = SnapshotSpec { id: SnapshotId(id), name: format!("s{id}"), created: 9 };
    sim.pool.create_snapshot(tag, slot, spec, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    let replica = sim.pool.replicas().find(|r| r.slot == slot).unwrap().id;
    sim.pool.find_snapshot(replica, SnapshotId(id)).unwrap()
}

fn clone(sim: &mut Sim, of: u128, snapshot: u128, id: u128, extents: u64) -> ReplicaSlot {
    let tag = sim.tag();
    let mut spec = spec(id, extents * EXTENT_BLOCKS);
    spec.source = Some((ReplicaId(of), SnapshotId(snapshot)));
    sim.pool.create_replica(tag, spec, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    sim.pool.find(ReplicaId(id)).unwrap()
}

fn delete(sim: &mut Sim, snapshot: ReplicaSlot) {
    let tag = sim.tag();
    sim.pool.delete_snapshot(tag, snapshot, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
}

fn allocated(sim: &Sim) -> u64 {
    sim.pool.usage().extents_allocated
}

#[test]
fn a_snapshot_keeps_what_was_there_and_its_deletion_gives_the_space_back() {
    let mut sim = Sim::formatted(64 * MIB, true, 1);
    let slot = sim.create(1, 8);
    for extent in 0..4 {
        assert!(sim.request(slot, WRITE, extent * EXTENT_BLOCKS, 8, 1).is_ok());
    }
    let snapshot = take(&mut sim, slot, 7);
    assert!(sim.request(slot, WRITE, 2, 2, 2).is_ok());
    assert!(sim.request(slot, IoOp::Discard, EXTENT_BLOCKS, EXTENT_BLOCKS, 0).is_ok());
    assert_eq!(sim.read(slot, 2, 1), vec![2; 4096]);
    assert_eq!(sim.read(slot, 4, 1), vec![1; 4096], "the rest of the extent is seen through");
    assert_eq!(sim.read(slot, EXTENT_BLOCKS, 1), vec![0; 4096], "a discard hides what is beneath");
    assert_eq!(sim.read(snapshot, 0, 8), vec![1; 8 * 4096]);
    assert_eq!(sim.read(snapshot, EXTENT_BLOCKS, 8), vec![1; 8 * 4096]);
    assert_eq!(sim.request(snapshot, WRITE, 0, 1, 3), IoStatus::PathError, "it never changes");
    assert_eq!(allocated(&sim), 6);
    delete(&mut sim, snapshot);
    sim.settle();
    assert!(sim.pool.is_idle() && sim.pool.snapshots().next().is_none());
    assert_eq!(allocated(&sim), 4);
    assert_eq!(sim.read(slot, 2, 2), vec![2; 2 * 4096]);
    assert_eq!(sim.read(slot, 4, 4), vec![1; 4 * 4096]);
    assert_eq!(sim.read(slot, EXTENT_BLOCKS, 8), vec![0; 8 * 4096]);
    assert_eq!(sim.read(slot, 3 * EXTENT_BLOCKS, 8), vec![1; 8 * 4096]);
    let used = sim.pool.usage();
    assert_eq!(used.extents_free + used.extents_allocated, used.extents_total);
}

#[test]
fn a_replica_goes_back_and_the_later_snapshot_stays() {
    let mut sim = Sim::formatted(64 * MIB, true, 2);
    let slot = sim.create(1, 4);
    assert!(sim.request(slot, WRITE, 0, 4, 1).is_ok());
    take(&mut sim, slot, 1);
    assert!(sim.request(slot, WRITE, 0, 2, 2).is_ok());
    let second = take(&mut sim, slot, 2);
    assert!(sim.request(slot, WRITE, 1, 1, 3).is_ok());
    let tag = sim.tag();
    sim.pool.revert(tag, slot, SnapshotId(1), &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    assert_eq!(sim.read(slot, 0, 4), vec![1; 4 * 4096]);
    assert_eq!(sim.read(second, 0, 2), vec![2; 2 * 4096]);
    assert!(sim.request(slot, WRITE, 3, 1, 5).is_ok());
    sim.settle();
    assert_eq!(allocated(&sim), 3);
    let disk = sim.disk;
    let mut sim = Sim::open(disk, 3);
    assert_eq!(sim.read(slot, 0, 4), [vec![1; 3 * 4096], vec![5; 4096]].concat());
    assert_eq!(sim.read(second, 0, 4), [vec![2; 2 * 4096], vec![1; 2 * 4096]].concat());
}

#[test]
fn a_snapshot_with_clones_stays_until_one_layer_is_left() {
    let mut sim = Sim::formatted(64 * MIB, true, 3);
    let slot = sim.create(1, 4);
    assert!(sim.request(slot, WRITE, 0, 2, 1).is_ok());
    let snapshot = take(&mut sim, slot, 7);
    let copy = clone(&mut sim, 1, 7, 2, 6);
    assert!(sim.request(copy, WRITE, 1, 1, 2).is_ok());
    delete(&mut sim, snapshot);
    sim.settle();
    assert!(sim.pool.is_idle(), "it waits, and burns nothing");
    assert!(sim.pool.snapshots().all(|s| s.deleting));
    assert_eq!(sim.pool.snapshots().count(), 1);
    sim.delete(slot);
    sim.settle();
    assert_eq!(sim.pool.snapshots().count(), 0);
    assert_eq!(sim.read(copy, 0, 2), [vec![1; 4096], vec![2; 4096]].concat());
    assert_eq!(allocated(&sim), 1);
}

#[test]
fn what_cannot_be_is_refused_and_says_why() {
    let mut sim = Sim::formatted(1024 * MIB, true, 4);
    let slot = sim.create(1, 4);
    for id in 0..63 {
        take(&mut sim, slot, id + 1);
    }
    let refused = |sim: &mut Sim, id: u128| {
        let tag = sim.tag();
        let spec = SnapshotSpec { id: SnapshotId(id), name: String::new(), created: 0 };
        sim.pool.create_snapshot(tag, slot, spec, &mut sim.mem);
        sim.wait(tag).error
    };
    assert_eq!(refused(&mut sim, 5), Some(ControlError::SnapshotExists(SnapshotId(5))));
    assert_eq!(refused(&mut sim, 500), Some(ControlError::TooManySnapshots(64)));
    let tag = sim.tag();
    sim.pool.revert(tag, slot, SnapshotId(99), &mut sim.mem);
    assert_eq!(sim.wait(tag).error, Some(ControlError::NoSuchSnapshot(SnapshotId(99))));
    let tag = sim.tag();
    let mut smaller = spec(2, EXTENT_BLOCKS);
    smaller.source = Some((ReplicaId(1), SnapshotId(1)));
    sim.pool.create_replica(tag, smaller, &mut sim.mem);
    assert!(matches!(sim.wait(tag).error, Some(ControlError::Shrink { .. })));
}

#[test]
fn a_thick_replica_always_finds_room() {
    let mut sim = Sim::formatted(32 * MIB, true, 5);
    let total = sim.pool.usage().extents_total;
    let thin = sim.create(1, total);
    let thick = |sim: &mut Sim, id: u128, extents: u64| {
        let tag = sim.tag();
        let mut spec = spec(id, extents * EXTENT_BLOCKS);
        spec.thick = true;
        sim.pool.create_replica(tag, spec, &mut sim.mem);
        (sim.wait(tag).error, sim.pool.find(ReplicaId(id)))
    };
    let (error, _) = thick(&mut sim, 2, total + 1);
    assert!(matches!(error, Some(ControlError::NoRoom { .. })));
    let (error, slot) = thick(&mut sim, 3, 10);
    assert_eq!((error, sim.pool.usage().extents_reserved), (None, 10));
    let mut written = 0;
    while sim.request(thin, WRITE, written * EXTENT_BLOCKS, 1, 1).is_ok() {
        written += 1;
    }
    assert_eq!(written, total - 10);
    let slot = slot.unwrap();
    for extent in 0..10 {
        assert!(sim.request(slot, WRITE, extent * EXTENT_BLOCKS, 1, 1).is_ok());
    }
    assert_eq!(sim.pool.usage().extents_reserved, 0);
    let tag = sim.tag();
    let spec = SnapshotSpec { id: SnapshotId(1), name: String::new(), created: 0 };
    sim.pool.create_snapshot(tag, slot, spec, &mut sim.mem);
    assert!(matches!(sim.wait(tag).error, Some(ControlError::NoRoom { .. })));
    // Deleting needs no room, and space that comes back is used.
    sim.delete(thin);
    sim.settle();
    take(&mut sim, slot, 1);
    assert_eq!(sim.pool.usage().extents_reserved, 10);
}

/// Copy on write copies nothing: the first write after a snapshot is a first write.
#[test]
fn the_first_write_after_a_snapshot_costs_what_a_first_write_costs() {
    let mut sim = Sim::formatted(64 * MIB, true, 6);
    sim.pool.set_checksum_limits(1000, 1000);
    let slot = sim.create(1, 8);
    let cost = |sim: &mut Sim, lba: u64| {
        let before = sim.disk.written;
        assert!(sim.request(slot, WRITE, lba, 1, 1).is_ok());
        sim.disk.written - before
    };
    let first = cost(&mut sim, 5);
    take(&mut sim, slot, 1);
    assert_eq!(cost(&mut sim, 5), first);
    assert_eq!(cost(&mut sim, 6), 4096, "the next block of the extent is one write");
}

/// The crash tester found it: a snapshot whose deletion begins while what is beneath it moves up into it passed
/// over what had not arrived yet, and took it along when it went.
#[test]
fn two_snapshots_in_a_row_that_are_deleted_together_lose_nothing() {
    for seed in 0..400 {
        let mut sim = Sim::formatted(24 * MIB, true, seed);
        let slot = sim.create(1, 6);
        for extent in 0..6 {
            assert!(sim.request(slot, WRITE, extent * EXTENT_BLOCKS, 2, 1).is_ok());
        }
        let first = take(&mut sim, slot, 1);
        if seed % 2 == 0 {
            assert!(sim.request(slot, WRITE, 1, 1, 2).is_ok());
        }
        let second = take(&mut sim, slot, 2);
        for snapshot in [first, second] {
            let tag = sim.tag();
            sim.pool.delete_snapshot(tag, snapshot, &mut sim.mem);
            for _ in 0..seed / 10 {
                sim.step();
                sim.pool.check();
            }
        }
        sim.settle();
        sim.pool.check();
        for extent in 0..6 {
            let second = if extent == 0 && seed % 2 == 0 { 2 } else { 1 };
            let expected = [vec![1; 4096], vec![second; 4096]].concat();
            assert_eq!(sim.read(slot, extent * EXTENT_BLOCKS, 2), expected);
        }
        assert_eq!(allocated(&sim), 6);
    }
}
