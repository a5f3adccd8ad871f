//! Snapshots, clones, small blocks and Verify over several devices.

use cairn_block::{
    BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, PoolDeviceId, ReplicaId, SnapshotId,
};
use cairn_replica::disk::MemberState;
use cairn_replica::{ControlError, Done, Pool, ReplicaSlot, SnapshotSpec};

use crate::common::{EXTENT_BLOCKS, MIB, spec};
use crate::set::Set;

const DISK: u64 = 24 * MIB;

fn take(set: &mut Set, slot: ReplicaSlot, id: u128) -> Done {
    let tag = set.tag();
    let spec = SnapshotSpec { id: SnapshotId(id), name: format!("s{id}"), created: 1 };
    set.pool.create_snapshot(tag, slot, spec, &mut set.mem);
    set.wait(tag)
}

fn taken(set: &mut Set, slot: ReplicaSlot, of: u128, id: u128) -> ReplicaSlot {
    let done = take(set, slot, id);
    assert_eq!(done.error, None);
    set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap()
}

fn revert(set: &mut Set, slot: ReplicaSlot, id: u128) -> Done {
    let tag = set.tag();
    set.pool.revert(tag, slot, SnapshotId(id), &mut set.mem);
    set.wait(tag)
}

fn clone(set: &mut Set, of: u128, snapshot: u128, id: u128, blocks: u64) -> ReplicaSlot {
    let tag = set.tag();
    let mut spec = spec(id, blocks);
    spec.source = Some((ReplicaId(of), SnapshotId(snapshot)));
    set.pool.create_replica(tag, spec, &mut set.mem);
    assert_eq!(set.wait(tag).error, None);
    set.pool.find(ReplicaId(id)).unwrap()
}

fn delete_snapshot(set: &mut Set, slot: ReplicaSlot) {
    let tag = set.tag();
    set.pool.delete_snapshot(tag, slot, &mut set.mem);
    assert_eq!(set.wait(tag).error, None);
}

fn fill(set: &mut Set, slot: ReplicaSlot, extents: u64, byte: u8) {
    for extent in 0..extents {
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, byte), IoStatus::Ok);
    }
}

fn holds(set: &mut Set, slot: ReplicaSlot, extents: u64, byte: u8) {
    for extent in 0..extents {
        assert_eq!(set.read(slot, extent * EXTENT_BLOCKS), Ok(byte), "extent {extent}");
    }
}

fn why(done: &Done) -> String {
    match &done.error {
        Some(ControlError::Device(why)) => why.clone(),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_snapshot_is_of_all_devices_and_its_children_stay_with_it() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 3);
    let slot = set.create(1, 6);
    fill(&mut set, slot, 6, 1);
    let first = taken(&mut set, slot, 1, 100);
    fill(&mut set, slot, 6, 2);
    holds(&mut set, first, 6, 1);
    holds(&mut set, slot, 6, 2);
    assert_eq!(set.write(first, 0, 1, 9), IoStatus::PathError);
    let copy = clone(&mut set, 1, 100, 2, 6 * EXTENT_BLOCKS);
    fill(&mut set, copy, 3, 3);
    let info = set.pool.snapshots().next().unwrap();
    assert_eq!((info.slot, info.own_extents, info.deleting), (first, 6, false));
    for disk in set.disks.iter().flatten() {
        let pool = Pool::open(&mut disk.now.clone()).unwrap();
        for logical in 0..6 {
            // The clone's write to it began with a block of the snapshot's beneath it.
            assert_eq!(pool.maps(slot, logical), pool.maps(first, logical));
            assert_eq!(pool.maps(copy, logical), pool.maps(first, logical));
        }
    }
    let disks = set.stop();
    let mut set = Set::open(disks, 5, &[]).unwrap();
    holds(&mut set, first, 6, 1);
    holds(&mut set, slot, 6, 2);
    holds(&mut set, copy, 3, 3);
    assert_eq!(revert(&mut set, slot, 100).error, None);
    holds(&mut set, slot, 6, 1);
    assert_eq!(
        revert(&mut set, slot, 101).error,
        Some(ControlError::NoSuchSnapshot(SnapshotId(101)))
    );
    delete_snapshot(&mut set, first);
    holds(&mut set, slot, 6, 1);
    assert_eq!(set.read(copy, 5 * EXTENT_BLOCKS), Ok(1));
    for slot in [slot, copy] {
        let tag = set.tag();
        set.pool.delete_replica(tag, slot, &mut set.mem);
        assert_eq!(set.wait(tag).error, None);
    }
    set.settle();
    assert_eq!(set.pool.snapshots().count(), 0);
    let usage = set.pool.usage();
    assert_eq!((usage.extents_allocated, usage.extents_free), (0, usage.extents_total));
}

#[test]
fn what_is_asked_while_a_snapshot_is_taken_comes_after_it() {
    let mut set = Set::formatted(&[DISK, DISK], 3);
    let slot = set.create(1, 4);
    fill(&mut set, slot, 4, 1);
    let (snapshot, write, second) = (set.tag(), set.tag(), set.tag());
    let spec = |id| SnapshotSpec { id: SnapshotId(id), name: String::new(), created: 1 };
    set.pool.create_snapshot(snapshot, slot, spec(100), &mut set.mem);
    let buf = set.mem.alloc(4096).unwrap();
    set.mem.bytes_mut(buf.slice()).fill(2);
    let range = LbaRange::new(Lba(0), 1).unwrap();
    let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
    set.pool.submit(write, slot, request, &mut set.mem);
    set.pool.create_snapshot(second, slot, spec(101), &mut set.mem);
    let done = set.settle();
    let of = |tag| done.iter().find(|d| d.tag == tag).unwrap();
    assert!(of(snapshot).status.is_ok() && of(write).status.is_ok());
    assert_eq!(of(second).error, Some(ControlError::SnapshotUnderWay));
    set.mem.release(buf);
    let taken = set.pool.find_snapshot(ReplicaId(1), SnapshotId(100)).unwrap();
    assert_eq!((set.read(taken, 0), set.read(slot, 0)), (Ok(1), Ok(2)));
}

#[test]
fn a_device_that_joins_gets_the_snapshots_and_the_clones() {
    let mut set = Set::formatted(&[DISK], 3);
    let slot = set.create(1, 8);
    fill(&mut set, slot, 3, 1);
    let first = taken(&mut set, slot, 1, 100);
    let copy = clone(&mut set, 1, 100, 2, 8 * EXTENT_BLOCKS);
    fill(&mut set, slot, 3, 2);
    let tag = set.add(9, 2 * DISK);
    assert_eq!(set.wait(tag).error, None);
    fill(&mut set, slot, 8, 4);
    fill(&mut set, copy, 8, 5);
    let second = taken(&mut set, slot, 1, 101);
    fill(&mut set, slot, 8, 6);
    holds(&mut set, first, 3, 1);
    assert_eq!(set.read(first, 5 * EXTENT_BLOCKS), Ok(0));
    holds(&mut set, second, 8, 4);
    assert!(set.pool.members().iter().all(|m| m.usage.unwrap().extents_allocated > 0));
    // A block that was only in what is given up reads as zeros again.
    assert_eq!(revert(&mut set, slot, 100).error, None);
    let disks = set.stop();
    let mut set = Set::open(disks, 6, &[]).unwrap();
    holds(&mut set, slot, 3, 1);
    assert_eq!(set.read(slot, 5 * EXTENT_BLOCKS), Ok(0));
    holds(&mut set, copy, 8, 5);
    let other = clone(&mut set, 1, 101, 3, 8 * EXTENT_BLOCKS);
    holds(&mut set, other, 8, 4);
}

#[test]
fn no_device_is_removed_beneath_snapshots_and_none_is_taken_above_a_removal() {
    let mut set = Set::formatted(&[DISK, DISK], 3);
    let slot = set.create(1, 4);
    fill(&mut set, slot, 4, 1);
    let first = taken(&mut set, slot, 1, 100);
    fill(&mut set, slot, 4, 2);
    let tag = set.remove(1);
    let done = set.wait(tag);
    let text = why(&done);
    assert!(text.contains("delete the snapshots"), "{text}");
    assert_eq!(set.state(1), Some(MemberState::Live));
    delete_snapshot(&mut set, first);
    set.settle();
    let tag = set.remove(1);
    let snapshot = set.tag();
    let spec = SnapshotSpec { id: SnapshotId(101), name: String::new(), created: 1 };
    set.pool.create_snapshot(snapshot, slot, spec, &mut set.mem);
    let done = set.settle();
    assert_eq!(done.iter().find(|d| d.tag == tag).unwrap().error, None);
    let text = why(done.iter().find(|d| d.tag == snapshot).unwrap());
    assert!(text.contains("when the device has left"), "{text}");
    assert_eq!(set.seen.drained, 1);
    holds(&mut set, slot, 4, 2);
    taken(&mut set, slot, 1, 102);
}

#[test]
fn thick_replicas_are_for_pools_of_one_device() {
    let mut set = Set::formatted(&[DISK, DISK], 3);
    let tag = set.tag();
    let mut thick = spec(1, EXTENT_BLOCKS);
    thick.thick = true;
    set.pool.create_replica(tag, thick.clone(), &mut set.mem);
    let done = set.wait(tag);
    assert!(why(&done).contains("make it thin"));
    let mut set = Set::formatted(&[DISK], 3);
    let tag = set.tag();
    set.pool.create_replica(tag, thick, &mut set.mem);
    assert_eq!(set.wait(tag).error, None);
    assert_eq!(set.pool.usage().extents_reserved, 1);
    let refused = set.try_add(9, DISK).unwrap_err();
    assert!(refused.to_string().contains("thick"), "{refused}");
}

#[test]
fn verify_counts_what_all_devices_read() {
    for devices in 1..=3 {
        let mut set = Set::formatted(&[DISK, DISK, DISK][..devices], 3);
        let slot = set.create(1, 6);
        fill(&mut set, slot, 5, 1);
        let tag = set.tag();
        let range = LbaRange::new(Lba(0), 6 * EXTENT_BLOCKS).unwrap();
        let request = IoRequest { op: IoOp::Verify, range, buf: BufSlice::EMPTY };
        set.pool.submit(tag, slot, request, &mut set.mem);
        let done = set.wait(tag);
        assert_eq!(done.status, IoStatus::Ok);
        let read = set.pool.take_verified(tag).unwrap();
        assert!((5..6 * 256).contains(&read), "{read}");
        assert_eq!(set.pool.take_verified(tag), None);
    }
}

/// A snapshot that is taken when a device is gone must not read as zeros what was on it.
#[test]
fn what_a_dead_device_held_is_an_error_in_later_snapshots_and_clones_too() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 6);
    let slot = set.create(1, 9);
    fill(&mut set, slot, 9, 1);
    let old = taken(&mut set, slot, 1, 100);
    assert_eq!(set.flush(slot), IoStatus::Ok);
    let dead = set.number(3);
    set.disks[dead].as_mut().unwrap().fail_flush = true;
    fill(&mut set, slot, 2, 1);
    for extent in 0..9 {
        set.write(slot, extent * EXTENT_BLOCKS + 1, 1, 1);
    }
    set.flush(slot);
    assert_eq!(set.state(3), Some(MemberState::Failed));
    let new = taken(&mut set, slot, 1, 101);
    let copy = clone(&mut set, 1, 101, 2, 9 * EXTENT_BLOCKS);
    let lost = |set: &mut Set, slot| -> Vec<u64> {
        (0..9)
            .filter(|e| match set.read(slot, e * EXTENT_BLOCKS) {
                Ok(byte) => {
                    assert_eq!(byte, 1, "extent {e}");
                    false
                }
                Err(_) => true,
            })
            .collect()
    };
    let gone = lost(&mut set, slot);
    assert_eq!(gone.len(), 3);
    for of in [old, new, copy] {
        assert_eq!(lost(&mut set, of), gone, "{of:?}");
    }
    let (mut disks, _) = set.cut(false);
    for disk in &mut disks {
        disk.fail_flush = false;
    }
    let mut set = Set::open(disks, 5, &[]).unwrap();
    assert_eq!(set.pool.membership().state_of(PoolDeviceId(3)), Some(MemberState::Failed));
    for of in [slot, old, new, copy] {
        assert_eq!(lost(&mut set, of), gone, "{of:?}");
    }
    assert_eq!(revert(&mut set, slot, 100).error, None);
    assert_eq!(lost(&mut set, slot), gone);
}
