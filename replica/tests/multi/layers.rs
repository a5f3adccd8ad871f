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

pub(crate) fn taken(set: &mut Set, slot: ReplicaSlot, of: u128, id: u128) -> ReplicaSlot {
    let done = take(set, slot, id);
    assert_eq!(done.error, None);
    set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap()
}

pub(crate) fn revert(set: &mut Set, slot: ReplicaSlot, id: u128) -> Done {
    let tag = set.tag();
    set.pool.revert(tag, slot, SnapshotId(id), &mut set.mem);
    set.wait(tag)
}

pub(crate) fn clone(set: &mut Set, of: u128, snapshot: u128, id: u128, blocks: u64) -> ReplicaSlot {
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

/// Whether each device that is left maps a logical extent for all of these, or for none.
fn together(set: &Set, slots: &[ReplicaSlot], extents: u32) {
    for disk in set.disks.iter().flatten() {
        let pool = Pool::open(&mut disk.now.clone()).unwrap();
        for logical in 0..extents {
            let first = pool.maps(slots[0], logical);
            assert!(
                slots.iter().all(|&slot| pool.maps(slot, logical) == first),
                "extent {logical}"
            );
        }
    }
}

#[test]
fn a_device_leaves_beneath_snapshots_and_clones() {
    let mut set = Set::formatted(&[DISK, DISK, 2 * DISK], 3);
    let slot = set.create(1, 6);
    fill(&mut set, slot, 6, 1);
    let first = taken(&mut set, slot, 1, 100);
    // Zeros over what the snapshot has, and a hole that only the snapshot fills.
    for extent in 0..5 {
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, 0), IoStatus::Ok);
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS + 1, 1, 2), IoStatus::Ok);
    }
    let second = taken(&mut set, slot, 1, 101);
    fill(&mut set, slot, 2, 3);
    let copy = clone(&mut set, 1, 100, 2, 6 * EXTENT_BLOCKS);
    let other = clone(&mut set, 1, 101, 3, 6 * EXTENT_BLOCKS);
    fill(&mut set, copy, 4, 4);
    // It is kept for its clone.
    delete_snapshot(&mut set, first);
    set.settle();
    let before = set.pool.usage().extents_allocated;
    for gone in [1, 2] {
        let tag = set.remove(gone);
        assert_eq!(set.wait(tag).error, None);
        set.settle();
        assert_eq!(set.state(gone), None);
        together(&set, &[slot, second, copy, other], 6);
        holds(&mut set, slot, 2, 3);
        holds(&mut set, copy, 4, 4);
        for of in [second, other] {
            holds(&mut set, of, 5, 0);
            assert_eq!(set.read(of, 5 * EXTENT_BLOCKS), Ok(1));
            assert_eq!(set.read(of, EXTENT_BLOCKS + 1), Ok(2));
        }
        assert_eq!(set.read(copy, 4 * EXTENT_BLOCKS), Ok(1));
        assert_eq!(set.read(slot, 4 * EXTENT_BLOCKS), Ok(0));
        assert_eq!(set.pool.usage().extents_allocated, before);
    }
    assert_eq!(set.seen.drained, 2);
    let disks = set.stop();
    let mut set = Set::open(disks, 5, &[]).unwrap();
    holds(&mut set, slot, 2, 3);
    holds(&mut set, copy, 4, 4);
    assert_eq!(set.read(other, 5 * EXTENT_BLOCKS), Ok(1));
    assert_eq!(revert(&mut set, slot, 101).error, None);
    holds(&mut set, slot, 5, 0);
    delete_snapshot(&mut set, second);
    for slot in [slot, copy, other] {
        let tag = set.tag();
        set.pool.delete_replica(tag, slot, &mut set.mem);
        assert_eq!(set.wait(tag).error, None);
    }
    set.settle();
    let usage = set.pool.usage();
    assert_eq!((usage.extents_allocated, usage.extents_free), (0, usage.extents_total));
}

/// What is asked for while a device leaves works, and needs nothing of that device.
#[test]
fn snapshots_and_clones_are_made_while_a_device_leaves() {
    for seed in 0..40 {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let slot = set.create(1, 8);
        fill(&mut set, slot, 8, 1);
        let first = taken(&mut set, slot, 1, 100);
        fill(&mut set, slot, 4, 2);
        let tag = set.remove(1);
        let mut answered = false;
        for _ in 0..1000 {
            answered |= std::iter::from_fn(|| set.pool.poll_done()).any(|done| done.tag == tag);
            if answered {
                break;
            }
            set.step();
        }
        for _ in 0..seed * 4 {
            set.step();
        }
        let second = taken_soon(&mut set, slot, 1, 101);
        let leaves = |set: &Set| {
            let members = set.pool.members();
            let of = members.iter().find(|m| m.id == PoolDeviceId(1));
            of.and_then(|m| m.usage).map_or(0, |usage| usage.extents_allocated)
        };
        let left = leaves(&set);
        // First writes over what the snapshot has, some of it on the device that leaves.
        for extent in 0..8 {
            write_soon(&mut set, slot, extent * EXTENT_BLOCKS, 3);
            assert!(leaves(&set) <= left, "the device that leaves got an extent");
        }
        set.settle();
        assert_eq!(set.state(1), None);
        holds(&mut set, first, 8, 1);
        holds(&mut set, second, 4, 2);
        holds(&mut set, slot, 8, 3);
    }
}

/// Until the snapshot is answered, and no further.
fn taken_soon(set: &mut Set, slot: ReplicaSlot, of: u128, id: u128) -> ReplicaSlot {
    let tag = set.tag();
    let spec = SnapshotSpec { id: SnapshotId(id), name: String::new(), created: 1 };
    set.pool.create_snapshot(tag, slot, spec, &mut set.mem);
    until(set, tag);
    set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap()
}

fn write_soon(set: &mut Set, slot: ReplicaSlot, lba: u64, byte: u8) {
    let tag = set.tag();
    let buf = set.mem.alloc(4096).unwrap();
    set.mem.bytes_mut(buf.slice()).fill(byte);
    let range = LbaRange::new(Lba(lba), 1).unwrap();
    let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
    set.pool.submit(tag, slot, request, &mut set.mem);
    until(set, tag);
    set.mem.release(buf);
}

fn until(set: &mut Set, tag: u64) {
    for _ in 0..100_000 {
        if let Some(done) = set.pool.poll_done() {
            assert_eq!((done.status, &done.error), (IoStatus::Ok, &None));
            if done.tag == tag {
                return;
            }
        } else if !set.step() {
            set.pool.retry(&mut set.mem);
        }
    }
    panic!("never answered");
}

/// A device that joins when a snapshot is deleted already, and kept for its clones.
#[test]
fn what_is_kept_for_clones_moves_to_a_device_that_joined_later() {
    let mut set = Set::formatted(&[DISK], 3);
    let slot = set.create(1, 4);
    fill(&mut set, slot, 4, 1);
    let first = taken(&mut set, slot, 1, 100);
    let copies = [2, 3].map(|id| clone(&mut set, 1, 100, id, 4 * EXTENT_BLOCKS));
    delete_snapshot(&mut set, first);
    set.settle();
    let tag = set.add(9, DISK);
    assert_eq!(set.wait(tag).error, None);
    fill(&mut set, copies[0], 2, 5);
    let tag = set.remove(1);
    assert_eq!(set.wait(tag).error, None);
    set.settle();
    assert_eq!(set.state(1), None);
    for extent in 0..4 {
        let byte = if extent < 2 { 5 } else { 1 };
        assert_eq!(set.read(copies[0], extent * EXTENT_BLOCKS), Ok(byte));
        assert_eq!(set.read(copies[1], extent * EXTENT_BLOCKS), Ok(1));
        assert_eq!(set.read(slot, extent * EXTENT_BLOCKS), Ok(1));
    }
    assert_eq!(set.pool.usage().extents_allocated, 6);
}

/// A crash cuts a snapshot off, and the next one cuts off the deletion of its replica: what is left of the
/// snapshot is no damage.
#[test]
fn a_deletion_after_a_snapshot_that_was_cut_off_may_be_cut_off_too() {
    for (seed, power) in (0..6).flat_map(|seed| [(seed, false), (seed, true)]) {
        for (taken, deleted) in (0..8).flat_map(|taken| (0..8).map(move |deleted| (taken, deleted)))
        {
            let mut set = Set::formatted(&[MIB * 8], seed);
            let slot = set.create(7, 1);
            fill(&mut set, slot, 1, 1);
            let tag = set.tag();
            let spec = SnapshotSpec { id: SnapshotId(5), name: "s".to_owned(), created: 1 };
            set.pool.create_snapshot(tag, slot, spec, &mut set.mem);
            (0..taken).for_each(|_| _ = set.step());
            let mut set = Set::open(set.cut(power).0, seed, &[]).unwrap();
            let slot = set.pool.find(ReplicaId(7)).unwrap();
            let tag = set.tag();
            set.pool.delete_replica(tag, slot, &mut set.mem);
            (0..deleted).for_each(|_| _ = set.step());
            let set = Set::open(set.cut(power).0, seed, &[]);
            assert!(set.is_ok(), "seed {seed}, {taken} and {deleted} steps: {:?}", set.err());
        }
    }
}

fn thick(set: &mut Set, id: u128, extents: u64) -> Result<ReplicaSlot, ControlError> {
    let tag = set.tag();
    let mut spec = spec(id, extents * EXTENT_BLOCKS);
    spec.thick = true;
    set.pool.create_replica(tag, spec, &mut set.mem);
    match set.wait(tag).error {
        None => Ok(set.pool.find(ReplicaId(id)).unwrap()),
        Some(error) => Err(error),
    }
}

/// Writes until there is no room; returns how many extents there was room for.
fn fill_up(set: &mut Set, slot: ReplicaSlot, from: u64) -> u64 {
    (from..).find(|extent| !set.write(slot, extent * EXTENT_BLOCKS, 1, 9).is_ok()).unwrap() - from
}

#[test]
fn a_thick_replica_has_room_on_all_devices_together() {
    let mut set = Set::formatted(&[DISK, DISK / 2, DISK], 3);
    let total = set.pool.usage().extents_total;
    let thin = set.create(1, 4 * total);
    let refused = thick(&mut set, 2, total + 1);
    assert_eq!(refused, Err(ControlError::NoRoom { needed: total + 1, free: total }));
    // More than a device has.
    let size = total - 6;
    let slot = thick(&mut set, 3, size).unwrap();
    assert_eq!(set.pool.usage().extents_reserved, size);
    assert!(thick(&mut set, 4, 7).is_err());
    assert_eq!(fill_up(&mut set, thin, 0), 6);
    for extent in 0..size {
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, 3), IoStatus::Ok, "{extent}");
        set.pool.check();
    }
    assert_eq!(set.pool.usage().extents_reserved, 0);
    // A snapshot of it needs as much again.
    assert!(matches!(take(&mut set, slot, 100).error, Some(ControlError::NoRoom { .. })));
    let tag = set.tag();
    let range = LbaRange::new(Lba(0), (size - 10) * EXTENT_BLOCKS).unwrap();
    let request = IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY };
    set.pool.submit(tag, slot, request, &mut set.mem);
    assert!(set.wait(tag).status.is_ok());
    set.settle();
    assert_eq!(set.pool.usage().extents_reserved, size - 10);
    let disks = set.stop();
    let mut set = Set::open(disks, 4, &[]).unwrap();
    assert_eq!(set.pool.usage().extents_reserved, size - 10);
    assert_eq!(fill_up(&mut set, thin, 10), 0);
    for extent in 0..size {
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, 4), IoStatus::Ok, "{extent}");
    }
}

/// Requests that ask one device for more than it has left, because they wait there together behind one that
/// waits for room to come back, get it on another: also those that wait for one and the same extent.
#[test]
fn requests_that_wait_together_get_the_room_of_another_device() {
    for seed in 0..12 {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let total = set.pool.usage().extents_total;
        let thin = set.create(1, 4 * total);
        let slot = thick(&mut set, 2, 6).unwrap();
        assert_eq!(fill_up(&mut set, thin, 0), total - 6);
        let buf = set.mem.alloc(4096).unwrap();
        let mut tags = Vec::new();
        let write = IoOp::Write { fua: false };
        let late = 2 * total;
        let asked = [(thin, IoOp::Discard, seed / 2), (thin, write, late), (thin, write, late + 1)];
        for (of, op, extent) in asked.into_iter().chain((0..12).map(|n| (slot, write, n / 2))) {
            let tag = set.tag();
            let part =
                if op == write { (1, buf.slice()) } else { (EXTENT_BLOCKS, BufSlice::EMPTY) };
            let range = LbaRange::new(Lba(extent * EXTENT_BLOCKS), part.0).unwrap();
            set.pool.submit(tag, of, IoRequest { op, range, buf: part.1 }, &mut set.mem);
            tags.extend((of == slot).then_some(tag));
            if op == IoOp::Discard {
                // The extent is on its way back.
                (0..seed % 2).for_each(|_| assert!(set.step()));
            }
        }
        let done = set.settle();
        for tag in tags {
            let done = done.iter().find(|d| d.tag == tag).unwrap();
            assert_eq!(done.status, IoStatus::Ok, "seed {seed}");
        }
        set.mem.release(buf);
    }
}

/// What a thick replica discards on a device that is being removed it can write again, though what it was to
/// move to has been taken by others.
#[test]
fn a_thick_replica_keeps_what_it_discards_on_a_device_that_is_being_removed() {
    for seed in 0..8 {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let total = set.pool.usage().extents_total;
        let thin = set.create(1, 4 * total);
        let slot = thick(&mut set, 2, 6).unwrap();
        fill(&mut set, slot, 6, 1);
        let tag = set.remove(1);
        // Requests for all of the other device's room are there before the first extent moves.
        let buf = set.mem.alloc(4096).unwrap();
        for extent in 0..total {
            let range = LbaRange::new(Lba(extent * EXTENT_BLOCKS), 1).unwrap();
            let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
            let tag = set.tag();
            set.pool.submit(tag, thin, request, &mut set.mem);
        }
        set.wait(tag);
        set.mem.release(buf);
        for extent in 0..6 {
            let first = extent * EXTENT_BLOCKS;
            let gone = set.request(slot, IoOp::Discard, first, EXTENT_BLOCKS, 0);
            assert_eq!(gone.0, IoStatus::Ok);
            assert_eq!(set.read(slot, first), Ok(0));
            fill_up(&mut set, thin, 2 * total);
            assert_eq!(set.write(slot, first, 1, 2), IoStatus::Ok, "seed {seed}, extent {extent}");
        }
    }
}

/// What a thick replica is just being given is not kept for it once more, and the rest not where there is none:
/// nobody else gets it.
#[test]
fn the_reserve_is_counted_anew_while_extents_are_being_taken() {
    for (seed, steps) in (0..6).flat_map(|seed| (0..6).map(move |steps| (seed, steps))) {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let total = set.pool.usage().extents_total;
        let thin = set.create(1, 4 * total);
        let slot = thick(&mut set, 2, 6).unwrap();
        assert_eq!(fill_up(&mut set, thin, 0), total - 6);
        let buf = set.mem.alloc(4096).unwrap();
        let write = |set: &mut Set, extent: u64| {
            let tag = set.tag();
            let range = LbaRange::new(Lba(extent * EXTENT_BLOCKS), 1).unwrap();
            let op = IoOp::Write { fua: false };
            let request = IoRequest { op, range, buf: buf.slice() };
            set.pool.submit(tag, slot, request, &mut set.mem);
            tag
        };
        let mut tags: Vec<u64> = (0..4).map(|extent| write(&mut set, extent)).collect();
        (0..steps).for_each(|_| _ = set.step());
        let other = set.tag();
        set.pool.create_replica(other, spec(3, EXTENT_BLOCKS), &mut set.mem);
        let mut done = set.settle();
        assert_eq!(fill_up(&mut set, thin, 2 * total), 0, "seed {seed}, {steps} steps");
        tags.extend((4..6).map(|extent| write(&mut set, extent)));
        done.extend(set.settle());
        for tag in tags {
            let done = done.iter().find(|d| d.tag == tag).unwrap();
            assert_eq!(done.status, IoStatus::Ok, "seed {seed}, {steps} steps");
        }
        set.mem.release(buf);
    }
}

#[test]
fn a_thick_replica_with_snapshots_has_room_where_they_are() {
    for devices in 2..=3 {
        let mut set = Set::formatted(&[DISK, DISK, DISK][..devices], 5);
        let total = set.pool.usage().extents_total;
        let thin = set.create(1, 4 * total);
        let slot = thick(&mut set, 2, 14).unwrap();
        fill(&mut set, slot, 12, 1);
        let first = taken(&mut set, slot, 2, 100);
        assert_eq!(set.pool.usage().extents_reserved, 14);
        fill(&mut set, slot, 3, 2);
        assert_eq!(fill_up(&mut set, thin, 0), total - 12 - 14);
        fill(&mut set, slot, 14, 3);
        holds(&mut set, first, 12, 1);
        assert_eq!(set.pool.usage().extents_reserved, 0);
    }
}

#[test]
fn a_device_leaves_only_where_the_others_have_room_for_what_is_kept() {
    let mut set = Set::formatted(&[DISK, DISK], 3);
    let total = set.pool.usage().extents_total;
    let thin = set.create(1, 4 * total);
    let slot = thick(&mut set, 2, total / 2 + 4).unwrap();
    fill(&mut set, slot, 4, 1);
    let tag = set.remove(1);
    let done = set.wait(tag);
    assert!(why(&done).contains("kept for thick replicas"), "{}", why(&done));
    assert_eq!(set.state(1), Some(MemberState::Live));
    // A device may be added beneath it, and then there is room.
    let tag = set.add(9, DISK);
    assert_eq!(set.wait(tag).error, None);
    let first = taken(&mut set, slot, 2, 100);
    let kept = set.pool.usage().extents_reserved;
    assert_eq!(kept, total / 2 + 4);
    let tag = set.remove(1);
    assert_eq!(set.wait(tag).error, None);
    assert_eq!(set.state(1), None);
    assert_eq!(set.pool.usage().extents_reserved, kept);
    assert_eq!(fill_up(&mut set, thin, 0), set.pool.usage().extents_total - 4 - kept);
    fill(&mut set, slot, total / 2 + 4, 2);
    holds(&mut set, first, 4, 1);
}

/// A clone or a snapshot that is made when a device fails is not on it: what it had there is an error.
#[test]
fn what_is_made_while_a_device_dies_reads_as_errors_there() {
    let mut lost = 0;
    for seed in 0..60 {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let slot = set.create(1, 6);
        fill(&mut set, slot, 6, 1);
        taken(&mut set, slot, 1, 100);
        assert_eq!(set.flush(slot), IoStatus::Ok);
        let dead = set.number(2);
        set.disks[dead].as_mut().unwrap().fail_flush = true;
        let (copy, snapshot) = (set.tag(), set.tag());
        let mut clone = spec(2, 6 * EXTENT_BLOCKS);
        clone.source = Some((ReplicaId(1), SnapshotId(100)));
        set.pool.create_replica(copy, clone, &mut set.mem);
        if seed % 2 == 0 {
            let spec = SnapshotSpec { id: SnapshotId(101), name: String::new(), created: 1 };
            set.pool.create_snapshot(snapshot, slot, spec, &mut set.mem);
        }
        set.settle();
        assert_eq!(set.state(2), Some(MemberState::Failed));
        let copy = set.pool.find(ReplicaId(2));
        let new = set.pool.find_snapshot(ReplicaId(1), SnapshotId(101));
        for of in copy.into_iter().chain(new) {
            for extent in 0..6 {
                // A part of what is lost cannot be written either.
                set.write(of, extent * EXTENT_BLOCKS + 9, 1, 7);
                match set.read(of, extent * EXTENT_BLOCKS) {
                    Ok(byte) => assert_eq!(byte, 1, "seed {seed}, extent {extent}"),
                    Err(_) => lost += 1,
                }
            }
        }
    }
    assert!(lost > 0);
}

/// A replica goes back to what was on a device that fails meanwhile, or has failed before.
#[test]
fn what_is_gone_back_to_reads_as_errors_where_its_device_is_dead() {
    let mut lost = 0;
    for seed in 0..60 {
        let mut set = Set::formatted(&[DISK, DISK], seed);
        let slot = set.create(1, 6);
        taken(&mut set, slot, 1, 100);
        fill(&mut set, slot, 6, 1);
        taken(&mut set, slot, 1, 101);
        assert_eq!(revert(&mut set, slot, 100).error, None);
        let dead = set.number(2);
        set.disks[dead].as_mut().unwrap().fail_flush = true;
        if seed % 3 == 0 {
            set.write(slot, 0, 1, 2);
            set.flush(slot);
            set.settle();
        }
        let tag = set.tag();
        set.pool.revert(tag, slot, SnapshotId(101), &mut set.mem);
        let done = set.settle().into_iter().find(|d| d.tag == tag).unwrap();
        assert_eq!(set.state(2), Some(MemberState::Failed));
        if done.error.is_some() {
            continue;
        }
        for extent in 0..6 {
            set.write(slot, extent * EXTENT_BLOCKS + 9, 1, 7);
            match set.read(slot, extent * EXTENT_BLOCKS) {
                Ok(byte) => assert_eq!(byte, 1, "seed {seed}, extent {extent}"),
                Err(_) => lost += 1,
            }
        }
    }
    assert!(lost > 0);
}

/// What a replica goes back to may be on another device than what it gives up, and a crash leaves both.
#[test]
fn a_way_back_that_is_cut_off_is_no_extent_on_two_devices() {
    for steps in 0..60 {
        let mut set = Set::formatted(&[DISK, DISK], 3);
        let slot = set.create(1, 8);
        taken(&mut set, slot, 1, 100);
        assert_eq!(set.write(slot, 0, 1, 1), IoStatus::Ok);
        taken(&mut set, slot, 1, 101);
        assert_eq!(revert(&mut set, slot, 100).error, None);
        // The other device has more room now.
        assert_eq!(set.write(slot, 0, 1, 2), IoStatus::Ok);
        assert_eq!(set.flush(slot), IoStatus::Ok);
        let tag = set.tag();
        set.pool.revert(tag, slot, SnapshotId(101), &mut set.mem);
        for _ in 0..steps {
            set.step();
        }
        let (disks, _) = set.cut(steps % 2 == 0);
        let mut set = Set::open(disks, 7, &[]).unwrap();
        let found = set.read(slot, 0).unwrap();
        assert!(found == 1 || found == 2, "{found} after {steps} steps");
        set.settle();
        assert_eq!(set.read(slot, 0), Ok(found));
    }
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
