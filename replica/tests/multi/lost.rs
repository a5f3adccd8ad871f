//! What a replica lost with a device: what is whole all the same, and giving it up.

use cairn_block::{IoStatus, PoolDeviceId};
use cairn_replica::{ReplicaSlot, change};

use crate::common::{EXTENT_BLOCKS, MIB};
use crate::layers::{revert, taken};
use crate::set::Set;

const DISK: u64 = 24 * MIB;

/// Each of nine extents has its number and one, and a device of three is gone: while the pool is in use, or at its
/// next start.
fn one_gone(at_start: bool) -> (Set, ReplicaSlot) {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 4);
    let slot = set.create(1, 9);
    for extent in 0..9u8 {
        let lba = u64::from(extent) * EXTENT_BLOCKS;
        assert_eq!(set.write(slot, lba, EXTENT_BLOCKS, extent + 1), IoStatus::Ok);
    }
    assert_eq!(set.flush(slot), IoStatus::Ok);
    taken(&mut set, slot, 1, 100);
    let number = set.number(3);
    if at_start {
        let mut disks = set.stop();
        disks.remove(number);
        set = Set::open(disks, 1, &[PoolDeviceId(3)]).unwrap();
    } else {
        set.disks[number].as_mut().unwrap().fail_flush = true;
        for extent in 0..9 {
            let byte = u8::try_from(extent + 1).unwrap();
            set.write(slot, extent * EXTENT_BLOCKS + 1, 1, byte);
        }
        set.flush(slot);
        set.settle();
    }
    assert!((1..9).contains(&lost(&mut set, slot).len()));
    (set, slot)
}

/// The extents that cannot be read.
fn lost(set: &mut Set, slot: ReplicaSlot) -> Vec<u64> {
    (0..9).filter(|e| set.read(slot, e * EXTENT_BLOCKS).is_err()).collect()
}

/// The extents of which is told that they are lost.
fn told(set: &Set, slot: ReplicaSlot) -> Vec<u64> {
    let mut out = [0; 16];
    let len = set.pool.changes(slot, 0, u64::MAX, &mut out).unwrap();
    let lost = |byte: &u8| byte & change::LOST != 0;
    (0..).zip(&out[..len]).filter(|(_, byte)| lost(byte)).map(|(at, _)| at).collect()
}

fn grown(set: &mut Set, slot: ReplicaSlot, extents: u64) {
    let tag = set.tag();
    set.pool.resize_replica(tag, slot, extents * EXTENT_BLOCKS, &mut set.mem);
    assert_eq!(set.wait(tag).error, None);
}

fn given_up(set: &mut Set, slot: ReplicaSlot) -> IoStatus {
    let tag = set.tag();
    set.pool.give_up_lost(tag, slot, &mut set.mem);
    set.wait(tag).status
}

fn restarted(set: Set) -> Set {
    let mut disks = set.stop();
    for disk in &mut disks {
        disk.fail_flush = false;
    }
    Set::open(disks, 8, &[]).unwrap()
}

#[test]
fn what_a_replica_grows_by_afterwards_is_whole() {
    for at_start in [false, true] {
        let (set, slot) = one_gone(at_start);
        // Where a device is gone by its own account what it held is known until the pool is opened again.
        let mut set = restarted(set);
        let gone = lost(&mut set, slot);
        grown(&mut set, slot, 12);
        for restarts in 0..2 {
            assert_eq!((lost(&mut set, slot), told(&set, slot)), (gone.clone(), gone.clone()));
            assert_eq!(set.read(slot, 10 * EXTENT_BLOCKS), Ok(restarts));
            assert_eq!(set.write(slot, 10 * EXTENT_BLOCKS, 1, restarts + 1), IoStatus::Ok);
            set = restarted(set);
        }
        grown(&mut set, slot, 14);
        assert_eq!(
            set.read(slot, 9 * EXTENT_BLOCKS),
            Ok(0),
            "it is known from the first growth on"
        );
        let new = taken(&mut set, slot, 1, 101);
        assert_eq!((set.read(new, 11 * EXTENT_BLOCKS), lost(&mut set, new)), (Ok(0), gone));
        // One more device is gone: it may have had what is mapped nowhere now.
        let number = set.number(2);
        let mut disks = set.stop();
        disks.remove(number);
        let mut set = Set::open(disks, 1, &[PoolDeviceId(2)]).unwrap();
        assert_eq!(set.read(slot, 11 * EXTENT_BLOCKS), Err(IoStatus::MediaError));
        assert_eq!(set.read(new, 11 * EXTENT_BLOCKS), Err(IoStatus::MediaError));
    }
}

#[test]
fn what_is_given_up_reads_as_zeros_and_can_be_written_in_part() {
    for at_start in [false, true] {
        let (mut set, slot) = one_gone(at_start);
        let gone = lost(&mut set, slot);
        assert_eq!(told(&set, slot), gone);
        let part = gone[0] * EXTENT_BLOCKS;
        assert_eq!(set.write(slot, part + 5, 1, 0x55), IoStatus::MediaError);
        assert_eq!(given_up(&mut set, slot), IoStatus::Ok);
        let old = set.pool.find_snapshot(cairn_block::ReplicaId(1), cairn_block::SnapshotId(100));
        let old = old.unwrap();
        for restarts in 0..2 {
            assert_eq!((lost(&mut set, slot), told(&set, slot)), (vec![], vec![]));
            for extent in 0..9 {
                let byte =
                    if gone.contains(&extent) { 0 } else { u8::try_from(extent + 1).unwrap() };
                assert_eq!(set.read(slot, extent * EXTENT_BLOCKS), Ok(byte), "extent {extent}");
            }
            assert_eq!(set.write(slot, part + 5 + restarts, 1, 0x55), IoStatus::Ok);
            assert_eq!(set.read(slot, part + 5), Ok(0x55));
            assert_eq!(lost(&mut set, old), gone, "nobody writes a snapshot anew");
            set = restarted(set);
        }
        // Going back to it brings the loss back.
        assert_eq!(revert(&mut set, slot, 100).error, None);
        assert_eq!(lost(&mut set, slot), gone);
        set = restarted(set);
        assert_eq!(lost(&mut set, slot), gone);
        assert_eq!(given_up(&mut set, ReplicaSlot(200)), IoStatus::InvalidField);
    }
}

#[test]
fn a_new_replica_has_nothing_of_what_a_dead_device_had_in_its_slot() {
    let (mut set, slot) = one_gone(false);
    let tag = set.tag();
    set.pool.delete_replica(tag, slot, &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    set.settle();
    let new = set.create(8, 9);
    assert_eq!(new, slot, "the test is of the same slot");
    assert_eq!((lost(&mut set, new), told(&set, new)), (vec![], vec![]));
    assert_eq!(set.write(new, 3, 1, 1), IoStatus::Ok);
}
