//! Each case by itself.

use cairn_block::{BufSlice, Epoch, IoOp, IoRequest, IoStatus, LbaRange, PoolDeviceId, PoolId};
use cairn_replica::disk::MemberState;
use cairn_replica::{
    ControlError, MultiPool, OpenOptions, Pool, PoolError, PoolState, Probe, Register,
    SparseDevice, change,
};

use crate::common::{Disk, EXTENT_BLOCKS, MIB, Sim, options};
use crate::set::{Set, device, formatted};

const DISK: u64 = 24 * MIB;

fn filled(set: &mut Set, extents: u64) -> cairn_replica::ReplicaSlot {
    let slot = set.create(7, extents);
    for extent in 0..extents {
        let byte = u8::try_from(extent + 1).unwrap();
        assert_eq!(set.write(slot, extent * EXTENT_BLOCKS + 3, 2, byte), IoStatus::Ok);
    }
    assert_eq!(set.flush(slot), IoStatus::Ok);
    slot
}

fn holds(set: &mut Set, slot: cairn_replica::ReplicaSlot, extents: u64) {
    for extent in 0..extents {
        let byte = u8::try_from(extent + 1).unwrap();
        assert_eq!(set.read(slot, extent * EXTENT_BLOCKS + 4), Ok(byte), "extent {extent}");
        assert_eq!(set.read(slot, extent * EXTENT_BLOCKS), Ok(0));
    }
}

fn register(seq: u64) -> Register {
    Register {
        promised_epoch: Epoch(seq),
        accepted_epoch: Epoch(seq),
        seq,
        config: seq.to_le_bytes().to_vec(),
    }
}

#[test]
fn extents_are_spread_and_requests_cross_devices() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 3);
    let slot = filled(&mut set, 9);
    for member in set.pool.members() {
        assert_eq!(member.usage.unwrap().extents_allocated, 3);
    }
    assert_eq!(set.write(slot, EXTENT_BLOCKS - 2, 4, 0x55), IoStatus::Ok);
    let (status, bytes) = set.request(slot, IoOp::Read, EXTENT_BLOCKS - 2, 4, 0);
    assert_eq!((status, bytes), (IoStatus::Ok, vec![0x55; 4 * 4096]));
    let all = set.request(slot, IoOp::Discard, 0, 9 * EXTENT_BLOCKS, 0);
    assert_eq!(all.0, IoStatus::Ok);
    assert_eq!(set.read(slot, 3), Ok(0));
    set.settle();
    let usage = set.pool.usage();
    assert_eq!((usage.extents_allocated, usage.extents_free), (0, usage.extents_total));
    assert!(set.pool.is_idle());
}

#[test]
fn devices_are_known_by_id_in_whatever_order() {
    let mut set = Set::formatted(&[DISK, 2 * DISK, DISK], 3);
    filled(&mut set, 9);
    let mut disks = set.stop();
    for seed in 0..6 {
        let mut set = Set::open(disks, seed, &[]).unwrap();
        let slot = set.pool.find(cairn_block::ReplicaId(7)).unwrap();
        holds(&mut set, slot, 9);
        disks = set.stop();
    }
}

#[test]
fn a_missing_device_is_named_and_the_pool_opens_without_it_on_demand() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 4);
    let slot = filled(&mut set, 9);
    let gone = set.number(2);
    let lost: Vec<u64> = (0..9).filter(|&e| extent_on(&set, slot, e) == gone).collect();
    assert_eq!(lost.len(), 3);
    let tag = set.tag();
    set.pool.write_register(tag, slot, register(5), &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    let mut disks = set.stop();
    let stale = disks.remove(gone);

    let Err(error) = Set::open(disks.clone_all(), 1, &[]) else { panic!("it opened") };
    assert!(matches!(error, PoolError::MemberMissing { device: PoolDeviceId(2), .. }));
    assert!(error.to_string().contains(&PoolDeviceId(2).to_string()), "{error}");

    let mut set = Set::open(disks, 1, &[PoolDeviceId(2)]).unwrap();
    assert_eq!(set.pool.register(slot), Some(&register(5)));
    for extent in 0..9 {
        let read = set.read(slot, extent * EXTENT_BLOCKS + 3);
        if lost.contains(&extent) {
            assert_eq!(read, Err(IoStatus::MediaError), "not zeros: it was on the lost device");
            assert_eq!(set.write(slot, extent * EXTENT_BLOCKS, 1, 1), IoStatus::MediaError);
        } else {
            assert_eq!(read, Ok(u8::try_from(extent + 1).unwrap()));
            // A discard must not make it look lost.
            let op = IoOp::WriteZeroes { fua: true, unmap: true };
            let status = set.request(slot, op, extent * EXTENT_BLOCKS, EXTENT_BLOCKS, 0).0;
            assert_eq!(status, IoStatus::Ok);
            assert_eq!(set.read(slot, extent * EXTENT_BLOCKS + 3), Ok(0));
        }
    }
    // A whole extent may be written, also with zeros, and is there from then on.
    let first = lost[0] * EXTENT_BLOCKS;
    assert_eq!(set.write(slot, first, EXTENT_BLOCKS, 0x77), IoStatus::Ok);
    assert_eq!(set.read(slot, first + 9), Ok(0x77));
    let op = IoOp::WriteZeroes { fua: false, unmap: true };
    let second = lost[1] * EXTENT_BLOCKS;
    assert_eq!(set.request(slot, op, second, EXTENT_BLOCKS, 0).0, IoStatus::Ok);
    assert_eq!(set.read(slot, second + 9), Ok(0));
    // A replica that is made now has lost nothing.
    let new = set.create(8, 4);
    assert_eq!(set.read(new, 0), Ok(0));
    assert_eq!(set.write(new, 1, 1, 1), IoStatus::Ok);
    let tag = set.tag();
    set.pool.write_register(tag, slot, register(6), &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);

    // The device that was left behind returns: it is set aside, and brings nothing back.
    let mut disks = set.stop();
    disks.push(stale);
    let mut set = Set::open(disks, 9, &[]).unwrap();
    assert_eq!(set.aside.len(), 1);
    assert_eq!(set.pool.register(slot), Some(&register(6)));
    assert_eq!(set.read(slot, first + 9), Ok(0x77));
    assert_eq!(set.read(slot, second + 9), Ok(0));
    assert_eq!(set.read(slot, lost[2] * EXTENT_BLOCKS), Err(IoStatus::MediaError));
    assert_eq!(set.state(2), Some(MemberState::Failed));
    let tag = set.remove(2);
    assert_eq!(set.wait(tag).status, IoStatus::Ok, "what is gone can be forgotten");
    assert_eq!(set.state(2), None);
}

/// Copies of disks, to open twice.
trait CloneAll {
    fn clone_all(&self) -> Self;
}

impl CloneAll for Vec<Disk> {
    fn clone_all(&self) -> Self {
        self.iter().map(|d| Disk::new(d.now.clone())).collect()
    }
}

/// The number of the device that holds an extent.
fn extent_on(set: &Set, slot: cairn_replica::ReplicaSlot, extent: u64) -> usize {
    (0..set.disks.len())
        .find(|&at| {
            let mut disk = set.disks[at].as_ref().unwrap().now.clone();
            Pool::open(&mut disk).unwrap().maps(slot, u32::try_from(extent).unwrap())
        })
        .unwrap()
}

#[test]
fn foreign_devices_are_refused() {
    let one = || formatted(&[DISK, DISK]);
    let refused = |mut disks: Vec<Disk>| match MultiPool::open(&mut disks, &OpenOptions::default())
    {
        Ok(_) => panic!("it opened"),
        Err(error) => error,
    };
    // Another pool's.
    let mut disks = one();
    let mut other = SparseDevice::new(DISK);
    let options = cairn_replica::FormatOptions { pool_id: PoolId(9), ..options(true) };
    Pool::format(&mut other, &options).unwrap();
    disks.push(Disk::new(other));
    assert!(matches!(refused(disks), PoolError::OtherPool { .. }));
    // Something else.
    let mut disks = one();
    let mut other = Disk::new(SparseDevice::new(DISK));
    cairn_replica::Device::write_at(&mut other, 0, &[7; 4096]).unwrap();
    disks.push(other);
    assert!(matches!(refused(disks), PoolError::Foreign));
    // The same one twice.
    let mut disks = one();
    let twice = Disk::new(disks[0].now.clone());
    disks.push(twice);
    assert!(matches!(refused(disks), PoolError::MemberTwice(_)));
    // A blank one is left alone.
    let mut disks = one();
    disks.push(Disk::new(SparseDevice::new(DISK)));
    assert_eq!(Set::open(disks, 1, &[]).unwrap().aside.len(), 1);
}

#[test]
fn a_device_is_added_while_in_use() {
    for devices in [1, 2] {
        let mut set = Set::formatted(&[DISK, DISK][..devices], 5);
        let slot = filled(&mut set, 5);
        let tag = set.tag();
        set.pool.write_register(tag, slot, register(3), &mut set.mem);
        let tag = set.add(9, 2 * DISK);
        assert_eq!(set.wait(tag).status, IoStatus::Ok);
        assert_eq!(set.state(9), Some(MemberState::Live));
        holds(&mut set, slot, 5);
        let more = set.create(8, 6);
        for extent in 0..6 {
            assert_eq!(set.write(more, extent * EXTENT_BLOCKS, 1, 1), IoStatus::Ok);
        }
        let number = set.number(9);
        assert!(set.pool.members()[number].usage.unwrap().extents_allocated >= 4);
        let disks = set.stop();
        let mut set = Set::open(disks, 8, &[]).unwrap();
        holds(&mut set, slot, 5);
        assert_eq!(set.pool.register(slot), Some(&register(3)));
    }
}

#[test]
fn a_device_is_removed_while_in_use_and_its_superblock_goes() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 6);
    let slot = filled(&mut set, 9);
    let tag = set.remove(2);
    let left = |set: &Set| {
        let members = set.pool.members();
        members.iter().find_map(|m| m.drain.clone().map(|d| d.extents_left))
    };
    assert_eq!(left(&set), Some(3));
    // Work goes on meanwhile.
    let mut answered = 0;
    for round in 0..40u64 {
        let tag = set.tag();
        let buf = cairn_block::Memory::alloc(&mut set.mem, 4096).unwrap();
        cairn_block::Memory::bytes_mut(&mut set.mem, buf.slice()).fill(0xaa);
        let range = LbaRange::new(cairn_block::Lba((round % 9) * EXTENT_BLOCKS + 9), 1).unwrap();
        let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
        set.pool.submit(tag, slot, request, &mut set.mem);
        for _ in 0..5 {
            set.step();
        }
        while let Some(done) = set.pool.poll_done() {
            assert_eq!(done.status, IoStatus::Ok);
            answered += 1;
        }
    }
    for done in set.settle() {
        assert_eq!(done.status, IoStatus::Ok, "{tag}");
        answered += 1;
    }
    assert_eq!(answered, 41, "40 writes and the removal");
    assert_eq!(set.seen.drained, 1);
    assert_eq!(set.state(2), None);
    holds(&mut set, slot, 9);
    for extent in 0..9 {
        assert_eq!(set.read(slot, extent * EXTENT_BLOCKS + 9), Ok(0xaa));
    }
    assert!(set.pool.is_idle());
    assert_eq!(Pool::probe(&mut set.aside[0]).unwrap(), Probe::Blank);
    let disks = set.stop();
    let mut set = Set::open(disks, 8, &[]).unwrap();
    holds(&mut set, slot, 9);
}

#[test]
fn down_to_one_device_and_up_again() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    let slot = filled(&mut set, 6);
    let tag = set.remove(1);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    holds(&mut set, slot, 6);
    assert_eq!(set.flush(slot), IoStatus::Ok);
    let tag = set.add(3, DISK);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    let tag = set.remove(2);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    holds(&mut set, slot, 6);
    let tag = set.remove(3);
    let done = set.wait(tag);
    assert!(matches!(done.error, Some(ControlError::Device(why)) if why.contains("last one")));
}

#[test]
fn a_removal_is_refused_where_space_is_short() {
    let mut set = Set::formatted(&[64 * MIB, 12 * MIB], 6);
    let slot = filled(&mut set, 30);
    let tag = set.remove(1);
    let done = set.wait(tag);
    let Some(ControlError::Device(why)) = done.error else { panic!("it was not refused") };
    assert!(why.contains("add a device of at least"), "{why}");
    assert_eq!(set.state(1), Some(MemberState::Live));
    holds(&mut set, slot, 30);
}

#[test]
fn a_removed_device_that_returns_is_refused() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    let slot = filled(&mut set, 4);
    let before = set.number(2);
    let copy = set.disks[before].as_ref().unwrap().now.clone();
    let tag = set.remove(2);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    let mut disks = set.stop();
    disks.retain(|d| Pool::open(&mut d.now.clone()).is_ok());
    disks.push(Disk::new(copy));
    let error = MultiPool::open(&mut disks, &OpenOptions::default()).unwrap_err();
    let PoolError::MemberRemoved { device, .. } = error else { panic!("{error}") };
    assert_eq!(device, PoolDeviceId(2));
    disks.pop();
    let mut set = Set::open(disks, 1, &[]).unwrap();
    holds(&mut set, slot, 4);
}

#[test]
fn a_device_that_dies_takes_down_only_what_it_holds() {
    let mut set = Set::formatted(&[DISK, DISK, DISK], 6);
    let slot = filled(&mut set, 9);
    let dead = set.number(3);
    let on_dead: Vec<u64> = (0..9).filter(|&e| extent_on(&set, slot, e) == dead).collect();
    let alive = (0..9).find(|e| !on_dead.contains(e)).unwrap();
    set.disks[dead].as_mut().unwrap().fail_flush = true;
    // It is found out by a write that needs it.
    set.write(slot, on_dead[0] * EXTENT_BLOCKS, 1, 1);
    assert_eq!(set.flush(slot), IoStatus::MediaError);
    assert_eq!(set.state(3), Some(MemberState::Failed));
    assert_eq!(set.pool.state(), PoolState::Online);
    assert_eq!(set.read(slot, on_dead[1] * EXTENT_BLOCKS + 3), Err(IoStatus::MediaError));
    assert_eq!(set.write(slot, on_dead[1] * EXTENT_BLOCKS, 1, 1), IoStatus::MediaError);
    assert_eq!(set.read(slot, alive * EXTENT_BLOCKS + 3), Ok(u8::try_from(alive + 1).unwrap()));
    // Another replica is as good as ever.
    let other = set.create(8, 6);
    for extent in 0..6 {
        assert_eq!(set.write(other, extent * EXTENT_BLOCKS, 1, 9), IoStatus::Ok);
    }
    assert_eq!(set.flush(other), IoStatus::Ok);
    let tag = set.tag();
    set.pool.write_register(tag, slot, register(4), &mut set.mem);
    assert_eq!(set.wait(tag).status, IoStatus::Ok);
    // A rebuild gets it right while the process runs: what was not flushed is told of once and not for ever, all of
    // an extent is written anew elsewhere, and flushed.
    assert_eq!(set.write(slot, on_dead[0] * EXTENT_BLOCKS, 1, 1), IoStatus::MediaError);
    let _told = set.flush(slot);
    let mut marks = vec![0; 9];
    set.pool.changes(slot, 0, u64::MAX, &mut marks).unwrap();
    assert!(on_dead.iter().all(|&e| marks[usize::try_from(e).unwrap()] & change::OPEN != 0));
    assert_eq!(set.write(slot, on_dead[0] * EXTENT_BLOCKS, EXTENT_BLOCKS, 0x31), IoStatus::Ok);
    let op = IoOp::WriteZeroes { fua: true, unmap: true };
    let zeroed = set.request(slot, op, on_dead[2] * EXTENT_BLOCKS, EXTENT_BLOCKS, 0).0;
    assert_eq!(zeroed, IoStatus::Ok);
    assert_eq!(set.flush(slot), IoStatus::Ok);
    assert_eq!(set.read(slot, on_dead[0] * EXTENT_BLOCKS + 7), Ok(0x31));
    assert_eq!(set.read(slot, on_dead[2] * EXTENT_BLOCKS + 7), Ok(0));
    // It returns at the next open, with its old register, and is not listened to.
    let (mut disks, _) = set.cut(false);
    for disk in &mut disks {
        disk.fail_flush = false;
    }
    let mut set = Set::open(disks, 5, &[]).unwrap();
    assert_eq!(set.aside.len(), 1);
    assert_eq!(set.pool.register(slot), Some(&register(4)));
    assert_eq!(set.read(slot, on_dead[1] * EXTENT_BLOCKS + 3), Err(IoStatus::MediaError));
    assert_eq!(set.read(slot, on_dead[0] * EXTENT_BLOCKS + 7), Ok(0x31));
    assert_eq!(set.read(slot, on_dead[2] * EXTENT_BLOCKS + 7), Ok(0));
    assert_eq!(set.read(slot, alive * EXTENT_BLOCKS + 3), Ok(u8::try_from(alive + 1).unwrap()));
    assert_eq!(set.read(other, 1), Ok(0));
    assert_eq!(set.read(other, 0), Ok(9));
}

#[test]
fn the_last_device_that_dies_takes_the_pool_down() {
    for devices in [1, 2] {
        let mut set = Set::formatted(&[DISK, DISK][..devices], 6);
        let slot = filled(&mut set, 4);
        for disk in set.disks.iter_mut().flatten() {
            disk.fail_flush = true;
        }
        for extent in 0..4 {
            set.write(slot, extent * EXTENT_BLOCKS, 1, 1);
        }
        assert_eq!(set.flush(slot), IoStatus::MediaError);
        let tag = set.tag();
        set.pool.write_register(tag, slot, register(4), &mut set.mem);
        assert_eq!(set.wait(tag).status, IoStatus::MediaError);
        assert!(matches!(set.pool.state(), PoolState::Failed(_)), "{devices}");
        assert_eq!(set.read(slot, 3), Err(IoStatus::MediaError));
        assert_eq!(cairn_block::HeapMemory::in_use(&set.mem), 0);
    }
}

/// What a crash leaves of commands that reached some devices: each is made on one device alone.
#[test]
fn commands_that_were_cut_off_are_settled_at_open() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    let slot = filled(&mut set, 4);
    let disks = set.stop();
    let half = |change: &dyn Fn(&mut Sim)| {
        let mut disks = disks.clone_all();
        let mut sim = Sim::open(disks.remove(0), 0);
        change(&mut sim);
        sim.settle();
        disks.push(sim.disk);
        Set::open(disks, 2, &[]).unwrap()
    };
    // A create: taken back.
    let mut set = half(&|sim| {
        sim.create(50, 3);
    });
    assert_eq!(set.pool.find(cairn_block::ReplicaId(50)), None);
    set.settle();
    assert_eq!(set.pool.replicas().count(), 1);
    holds(&mut set, slot, 4);
    // A delete: completed, also where the first device was done with it.
    let mut set = half(&|sim| sim.delete(slot));
    assert_eq!(set.pool.find(cairn_block::ReplicaId(7)), None);
    set.settle();
    assert_eq!(set.pool.replicas().count(), 0);
    assert_eq!(set.pool.usage().extents_allocated, 0);
    // A resize: completed.
    let mut set = half(&|sim| {
        let tag = sim.tag();
        sim.pool.resize_replica(tag, slot, 9 * EXTENT_BLOCKS, &mut sim.mem);
    });
    assert_eq!(set.pool.replicas().next().unwrap().blocks, 9 * EXTENT_BLOCKS);
    assert_eq!(set.write(slot, 9 * EXTENT_BLOCKS - 1, 1, 4), IoStatus::Ok);
    holds(&mut set, slot, 4);
    // A register: the highest is right.
    let set = half(&|sim| {
        let tag = sim.tag();
        sim.pool.write_register(tag, slot, register(8), &mut sim.mem);
    });
    assert_eq!(set.pool.register(slot), Some(&register(8)));
    let disks = set.stop();
    for disk in disks {
        let sim = Sim::open(disk, 0);
        assert_eq!(sim.pool.register(slot), Some(&register(8)), "on every device");
    }
}

#[test]
fn devices_that_went_on_without_each_other_are_not_mixed() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    filled(&mut set, 4);
    let mut disks = set.stop();
    let mut right = vec![disks.pop().unwrap()];
    let ids: Vec<PoolDeviceId> = [&mut disks[0], &mut right[0]]
        .into_iter()
        .map(|d| Pool::open(d).unwrap().device_id())
        .collect();
    let left = Set::open(disks, 1, &[ids[1]]).unwrap().stop();
    let right = Set::open(right, 1, &[ids[0]]).unwrap().stop();
    let both = left.into_iter().chain(right).collect();
    let Err(error) = Set::open(both, 1, &[]) else { panic!("it opened") };
    assert!(matches!(error, PoolError::MembersDisagree { .. }), "{error}");
}

#[test]
fn what_would_be_lost_is_told() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    filled(&mut set, 2);
    let mut disks = set.stop();
    let ids = [device(11), device(12)];
    let (at, error) = MultiPool::format(&mut disks, &ids, &options(true)).unwrap_err();
    assert_eq!(at, 0);
    let text = error.to_string();
    assert!(text.contains("one of the 2 devices of pool"), "{text}");
    assert!(text.contains("1 replica: `r7`"), "{text}");
    let force = cairn_replica::FormatOptions { force: true, ..options(true) };
    MultiPool::format(&mut disks, &ids, &force).unwrap();
    assert_eq!(Set::open(disks, 1, &[]).unwrap().pool.replicas().count(), 0);
}

#[test]
fn a_flush_that_overlaps_another_covers_what_came_before_it() {
    let mut set = Set::formatted(&[DISK, DISK], 6);
    let slot = filled(&mut set, 2);
    assert_eq!(set.write(slot, 0, 1, 7), IoStatus::Ok);
    let flush = IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
    let (first, second) = (set.tag(), set.tag());
    set.pool.submit(first, slot, flush, &mut set.mem);
    set.pool.submit(second, slot, flush, &mut set.mem);
    assert_eq!(set.pool.poll_done(), None, "neither is answered before the device has flushed");
    assert_eq!(set.settle().len(), 2);
}
