//! What a pool does when it is full, starved, failing, growing or very large.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{BufSlice, Epoch, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId};
use cairn_replica::{
    ControlError, DiskError, DiskOp, Pool, PoolState, Register, ReplicaSlot, SparseDevice,
};
use common::{Disk, EXTENT_BLOCKS, MIB, Sim, options, spec};

const WRITE: IoOp = IoOp::Write { fua: false };

fn flush_request() -> IoRequest {
    IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY }
}

#[test]
fn a_full_pool_says_so_and_recovers() {
    for zeroed in [true, false] {
        let mut sim = Sim::formatted(16 * MIB, zeroed, 1);
        let total = sim.pool.usage().extents_total;
        assert!(total >= 13, "{total} extents of 16");
        let (a, b) = (sim.create(1, 100), sim.create(2, 100));
        for extent in 0..total {
            assert_eq!(sim.request(a, WRITE, extent * 256, 1, 1), IoStatus::Ok);
        }
        assert_eq!(sim.request(b, WRITE, 0, 1, 2), IoStatus::NoSpace);
        assert_eq!(sim.request(a, WRITE, 5, 1, 3), IoStatus::Ok, "no new extent is needed");
        assert_eq!(sim.read(b, 0, 1), vec![0; 4096]);
        // A discard's space is waited for, not refused.
        let tags = [sim.tag(), sim.tag()];
        let range = LbaRange::new(Lba(0), 256).unwrap();
        let discard = IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY };
        sim.pool.submit(tags[0], a, discard, &mut sim.mem);
        let buf = sim.mem.alloc(4096).unwrap();
        let range = LbaRange::new(Lba(0), 1).unwrap();
        let write = IoRequest { op: WRITE, range, buf: buf.slice() };
        sim.pool.submit(tags[1], b, write, &mut sim.mem);
        let done = sim.settle();
        assert!(done.len() == 2 && done.iter().all(|d| d.status.is_ok()), "{done:?}");
        sim.mem.release(buf);
        sim.delete(a);
        assert_eq!(sim.pool.usage().extents_free, total - 1);
        for extent in 1..total {
            assert_eq!(sim.request(b, WRITE, extent * 256, 1, 4), IoStatus::Ok);
            assert_eq!(sim.read(b, extent * 256 + 1, 255), vec![0; 255 * 4096]);
        }
        assert_eq!(sim.pool.replicas().count(), 1);
    }
}

#[test]
fn a_discard_of_everything_gives_everything_back() {
    let mut sim = Sim::formatted(256 * MIB, true, 1);
    let slot = sim.create(1, 200);
    let free = sim.pool.usage().extents_free;
    for extent in 0..200 {
        assert!(sim.request(slot, WRITE, extent * 256 + 7, 1, 1).is_ok());
    }
    assert!(sim.request(slot, IoOp::Discard, 0, 200 * 256, 0).is_ok());
    assert_eq!(sim.pool.usage().extents_free, free);
    assert_eq!(sim.read(slot, 0, 256), vec![0; 256 * 4096]);
}

#[test]
fn a_request_over_many_extents_is_one_request() {
    let mut sim = Sim::formatted(32 * MIB, false, 3);
    let slot = sim.create(1, 8);
    assert!(sim.request(slot, WRITE, 200, 256, 9).is_ok());
    let bytes = sim.read(slot, 199, 256);
    assert!(bytes[..4096].iter().all(|&b| b == 0) && bytes[4096..].iter().all(|&b| b == 9));
    assert!(sim.request(slot, IoOp::Discard, 201, 3, 0).is_ok());
    let zeroes = IoOp::WriteZeroes { fua: true, unmap: true };
    assert!(sim.request(slot, zeroes, 205, 400, 0).is_ok());
    let bytes = sim.read(slot, 200, 6);
    let firsts: Vec<u8> = bytes.chunks(4096).map(|b| b[0]).collect();
    assert_eq!(firsts, [9, 0, 0, 0, 9, 0]);
}

#[test]
fn first_writes_that_come_together_share_a_commit() {
    let mut sim = Sim::formatted(256 * MIB, true, 4);
    let slot = sim.create(1, 200);
    let before = sim.disk.flushes;
    let mut bufs = Vec::new();
    for extent in 0..100u64 {
        let buf = sim.mem.alloc(4096).unwrap();
        let range = LbaRange::new(Lba(extent * 256), 1).unwrap();
        let request = IoRequest { op: WRITE, range, buf: buf.slice() };
        sim.pool.submit(extent, slot, request, &mut sim.mem);
        bufs.push(buf);
    }
    assert_eq!(sim.settle().len(), 100);
    assert_eq!(sim.disk.flushes - before, 2, "the first alone, and all the others");
    for buf in bufs {
        sim.mem.release(buf);
    }
    // So do flushes: one is under way, all the others share the next.
    let before = sim.disk.flushes;
    for tag in 0..50 {
        sim.pool.submit(tag, slot, flush_request(), &mut sim.mem);
    }
    assert_eq!(sim.settle().len(), 50);
    assert_eq!(sim.disk.flushes - before, 2);
}

#[test]
fn a_write_to_an_allocated_extent_is_one_operation() {
    let mut sim = Sim::formatted(16 * MIB, true, 4);
    let slot = sim.create(1, 2);
    assert!(sim.request(slot, WRITE, 0, 1, 1).is_ok());
    let buf = sim.mem.alloc(4096).unwrap();
    let range = LbaRange::new(Lba(3), 1).unwrap();
    let op = IoOp::Write { fua: true };
    sim.pool.submit(1, slot, IoRequest { op, range, buf: buf.slice() }, &mut sim.mem);
    let io = sim.pool.poll_disk().unwrap();
    assert!(matches!(io.op, DiskOp::Write { fua: true, .. }));
    sim.pool.handle_disk(io.id, Ok(()), &mut sim.mem);
    assert_eq!(sim.pool.poll_disk(), None);
    assert_eq!(sim.pool.poll_done().unwrap().status, IoStatus::Ok);
    sim.mem.release(buf);
}

#[test]
fn bad_requests_are_refused() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 2);
    assert_eq!(sim.request(slot, WRITE, 511, 2, 0), IoStatus::OutOfRange);
    assert_eq!(sim.request(slot, IoOp::Discard, u64::MAX - 4, 3, 0), IoStatus::OutOfRange);
    assert_eq!(sim.request(ReplicaSlot(4), IoOp::Discard, 0, 1, 0), IoStatus::PathError);
    assert_eq!(sim.request(ReplicaSlot(999), IoOp::Discard, 0, 1, 0), IoStatus::PathError);
    let range = LbaRange::new(Lba(0), 2).unwrap();
    let request = IoRequest { op: IoOp::Read, range, buf: BufSlice::new(0, 4096) };
    sim.pool.submit(1, slot, request, &mut sim.mem);
    assert_eq!(sim.pool.poll_done().unwrap().status, IoStatus::InvalidField);
    assert_eq!(sim.request(slot, IoOp::Discard, 3, 0, 0), IoStatus::Ok);
}

#[test]
fn bad_commands_are_refused() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 2);
    let mut refused = |spec| {
        let tag = sim.tag();
        sim.pool.create_replica(tag, spec, &mut sim.mem);
        sim.wait(tag).error.expect("it is refused")
    };
    assert_eq!(refused(spec(1, 5)), ControlError::Exists(ReplicaId(1)));
    assert!(matches!(refused(spec(2, 0)), ControlError::BadSize { .. }));
    assert!(matches!(refused(spec(2, u64::MAX)), ControlError::BadSize { .. }));
    let mut long = spec(2, 5);
    long.name = "x".repeat(65);
    assert!(matches!(refused(long), ControlError::NameTooLong { len: 65, max: 64 }));
    let mut small = spec(2, 5);
    small.block_size = cairn_block::BlockSize::B512;
    assert_eq!(refused(small), ControlError::BlockSize(512));
    let tag = sim.tag();
    sim.pool.resize_replica(tag, slot, 5, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, Some(ControlError::Shrink { has: 512, asked: 5 }));
    let tag = sim.tag();
    let register = Register { config: vec![0; 3585], ..Register::default() };
    sim.pool.write_register(tag, slot, register, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, Some(ControlError::ConfigTooLong { len: 3585, max: 3584 }));
    let tag = sim.tag();
    sim.pool.grow(tag, 16 * MIB, &mut sim.mem);
    assert!(matches!(sim.wait(tag).error, Some(ControlError::NothingToGrow { .. })));
    for id in 2..=16 {
        sim.create(id, 1);
    }
    let tag = sim.tag();
    sim.pool.create_replica(tag, spec(99, 5), &mut sim.mem);
    assert_eq!(sim.wait(tag).error, Some(ControlError::NoFreeSlot(16)));
    sim.delete(slot);
    sim.create(99, 1);
}

#[test]
fn commands_survive_a_reopen() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 2);
    for n in 1..6u64 {
        let register = Register {
            promised_epoch: Epoch(n),
            accepted_epoch: Epoch(n - 1),
            seq: n * 7,
            config: vec![7; 2048],
        };
        let tag = sim.tag();
        sim.pool.write_register(tag, slot, register.clone(), &mut sim.mem);
        assert!(sim.wait(tag).status.is_ok());
        assert_eq!(sim.pool.register(slot), Some(&register));
        let tag = sim.tag();
        sim.pool.resize_replica(tag, slot, 512 + n * 100, &mut sim.mem);
        assert!(sim.wait(tag).status.is_ok());
        let disk = sim.disk.kill(&mut sim.rng);
        sim = Sim::open(disk, n);
        assert_eq!(sim.pool.register(slot), Some(&register));
        assert_eq!(sim.pool.replicas().next().unwrap().blocks, 512 + n * 100);
        assert_eq!(sim.pool.replicas().next().unwrap().name, "r1");
    }
}

#[test]
fn a_pool_grows_under_load() {
    let mut dev = SparseDevice::new(16 * MIB);
    Pool::format(&mut dev, &options(true)).unwrap();
    for (round, len) in [17 * MIB, 64 * MIB, 64 * MIB + 4096, 500 * MIB].into_iter().enumerate() {
        let mut longer = SparseDevice::new(len);
        copy(&mut dev, &mut longer);
        let mut sim = Sim::open(Disk::new(longer), round as u64);
        let slot = match sim.pool.find(ReplicaId(1)) {
            Some(slot) => slot,
            None => sim.create(1, 400),
        };
        let before = sim.pool.usage();
        let tag = sim.tag();
        sim.pool.grow(tag, len, &mut sim.mem);
        for extent in 0..before.extents_free.min(20) {
            let range = LbaRange::new(Lba((round as u64 * 40 + extent) * 256), 1).unwrap();
            let buf = sim.mem.alloc(4096).unwrap();
            sim.mem.bytes_mut(buf.slice()).fill(3);
            let request = IoRequest { op: WRITE, range, buf: buf.slice() };
            sim.pool.submit(1000 + extent, slot, request, &mut sim.mem);

            // Never released: the memory ends with this round.
        }
        let done = sim.settle();
        assert!(done.iter().all(|d| d.status.is_ok()), "{done:?}");
        assert!(sim.pool.usage().extents_total >= before.extents_total);
        assert_eq!(sim.pool.device_len(), len);
        let allocated = sim.pool.usage().extents_allocated;
        let disk = sim.disk.cut(&mut sim.rng);
        let sim = Sim::open(disk, 1);
        assert_eq!(sim.pool.usage().extents_allocated, allocated);
        assert_eq!(sim.pool.device_len(), len);
        dev = sim.disk.now;
    }
    let total = Pool::open(&mut dev).unwrap().usage().extents_total;
    assert!(total > 480, "{total} extents of 500");
}

fn copy(from: &mut SparseDevice, to: &mut SparseDevice) {
    use cairn_replica::Device;
    let mut page = vec![0; 4096];
    for at in (0..from.len()).step_by(4096) {
        from.read_at(at, &mut page).unwrap();
        if page.iter().any(|&b| b != 0) {
            to.write_at(at, &page).unwrap();
        }
    }
}

#[test]
fn a_grow_cut_off_anywhere_happened_or_did_not() {
    for steps in 0..40 {
        let mut dev = SparseDevice::new(16 * MIB);
        Pool::format(&mut dev, &options(true)).unwrap();
        let mut longer = SparseDevice::new(600 * MIB);
        copy(&mut dev, &mut longer);
        let mut sim = Sim::open(Disk::new(longer), steps);
        sim.pool.grow(1, 600 * MIB, &mut sim.mem);
        for _ in 0..steps {
            sim.step();
        }
        let done = sim.pool.poll_done().is_some();
        let disk = sim.disk.cut(&mut sim.rng);
        let sim = Sim::open(disk, 1);
        let len = sim.pool.device_len();
        assert!(len == 600 * MIB || (!done && len == 16 * MIB));
    }
}

#[test]
fn a_failed_flush_is_the_end() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 4);
    assert!(sim.request(slot, WRITE, 0, 1, 1).is_ok());
    sim.disk.fail_flush = true;
    assert_eq!(sim.request(slot, IoOp::Flush, 0, 0, 0), IoStatus::MediaError);
    assert!(matches!(sim.pool.state(), PoolState::Failed(_)));
    sim.disk.fail_flush = false;
    assert_eq!(sim.request(slot, IoOp::Flush, 0, 0, 0), IoStatus::MediaError);
    assert_eq!(sim.request(slot, IoOp::Read, 0, 1, 0), IoStatus::MediaError);
    let tag = sim.tag();
    sim.pool.create_replica(tag, spec(2, 5), &mut sim.mem);
    assert!(matches!(sim.wait(tag).error, Some(ControlError::PoolFailed(_))));
}

/// Everything is answered and every buffer comes back, whatever fails when.
#[test]
fn a_pool_that_fails_under_load_answers_everything() {
    for seed in 0..200 {
        let mut dev = SparseDevice::new(16 * MIB);
        Pool::format(&mut dev, &options(seed % 2 == 0)).unwrap();
        let mut longer = SparseDevice::new(32 * MIB);
        copy(&mut dev, &mut longer);
        let mut sim = Sim::open(Disk::new(longer), seed);
        let (a, b) = (sim.create(1, 8), sim.create(2, 8));
        let mut bufs = Vec::new();
        let mut asked = 0;
        for tag in 0..40u64 {
            let lba = sim.rng.below(8 * 256 - 2);
            let range = LbaRange::new(Lba(lba), 2).unwrap();
            let slot = if tag % 2 == 0 { a } else { b };
            if tag % 7 == 0 {
                sim.pool.submit(tag, slot, flush_request(), &mut sim.mem);
            } else if tag % 11 == 0 {
                let range = LbaRange::new(Lba(0), 8 * 256).unwrap();
                let request = IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY };
                sim.pool.submit(tag, slot, request, &mut sim.mem);
            } else {
                let buf = sim.mem.alloc(8192).unwrap();
                let request = IoRequest { op: WRITE, range, buf: buf.slice() };
                sim.pool.submit(tag, slot, request, &mut sim.mem);
                bufs.push(buf);
            }
            asked += 1;
            match tag {
                10 => sim.pool.write_register(100, a, Register::default(), &mut sim.mem),
                20 => sim.pool.checkpoint(101, &mut sim.mem),
                30 => sim.pool.delete_replica(102, b, &mut sim.mem),
                35 => sim.pool.grow(103, 32 * MIB, &mut sim.mem),
                _ => {}
            }
            if sim.rng.chance(60) {
                sim.step();
            }
            if sim.rng.chance(5) {
                sim.disk.fail_flush = true;
            }
        }
        sim.disk.fail_write = seed % 3 == 0;
        let mut done = sim.settle();
        done.extend(std::iter::from_fn(|| sim.pool.poll_done()));
        // Those answered in between were taken by nobody: `step` leaves them in the queue.
        assert_eq!(done.len(), asked + 4, "seed {seed}");
        assert_eq!(sim.pool.in_flight(), 0);
        for buf in bufs {
            sim.mem.release(buf);
        }
        assert_eq!(sim.mem.in_use(), 0, "seed {seed}");
    }
}

/// A discard of what a discard under way has unmapped already is answered at once. A flush after it
/// covers it all the same.
#[test]
fn a_flush_covers_a_discard_that_is_not_logged_yet() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 8);
    assert!(sim.request(slot, WRITE, 0, 1, 1).is_ok());
    let range = LbaRange::new(Lba(0), 256).unwrap();
    let discard = IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY };
    sim.pool.submit(1, slot, discard, &mut sim.mem);
    sim.pool.submit(2, slot, discard, &mut sim.mem);
    assert_eq!(sim.pool.poll_done().map(|d| d.tag), Some(2));
    sim.pool.submit(3, slot, flush_request(), &mut sim.mem);
    while sim.step() {
        if let Some(done) = sim.pool.poll_done() {
            assert_eq!(done.tag, 1, "the flush comes after the discard");
            break;
        }
    }
    assert_eq!(sim.settle().len(), 1);
}

#[test]
fn no_space_beneath_the_device_is_no_space() {
    let mut sim = Sim::formatted(16 * MIB, false, 1);
    let slot = sim.create(1, 8);
    sim.disk.fail_zero = Some(DiskError::NoSpace);
    assert_eq!(sim.request(slot, WRITE, 0, 1, 1), IoStatus::NoSpace);
    sim.disk.fail_zero = None;
    assert_eq!(sim.request(slot, WRITE, 0, 1, 1), IoStatus::Ok);
    // A punch that fails leaves an extent that is free and zeroed later.
    sim.disk.fail_zero = Some(DiskError::Io);
    let free = sim.pool.usage().extents_free;
    assert_eq!(sim.request(slot, IoOp::Discard, 0, 256, 0), IoStatus::Ok);
    assert_eq!(sim.pool.usage().extents_free, free + 1);
    assert_eq!(sim.request(slot, WRITE, 0, 1, 1), IoStatus::MediaError);
    assert_eq!(sim.pool.state(), PoolState::Online);
    sim.disk.fail_zero = None;
    assert_eq!(sim.request(slot, WRITE, 0, 1, 1), IoStatus::Ok);
    assert_eq!(sim.read(slot, 1, 255), vec![0; 255 * 4096]);
}

#[test]
fn metadata_waits_for_memory() {
    let mut sim = Sim::formatted(16 * MIB, true, 1);
    let slot = sim.create(1, 8);
    let write = sim.mem.alloc(4096).unwrap();
    let mut hog = Vec::new();
    for size in [1 << 20, 4096] {
        hog.extend(std::iter::from_fn(|| sim.mem.alloc(size)));
    }
    let range = LbaRange::new(Lba(0), 1).unwrap();
    let request = IoRequest { op: WRITE, range, buf: write.slice() };
    sim.pool.submit(1, slot, request, &mut sim.mem);
    sim.pool.checkpoint(2, &mut sim.mem);
    sim.pool.write_register(3, slot, Register::default(), &mut sim.mem);
    assert!(sim.settle().is_empty(), "nothing can be written");
    sim.mem.release(hog.pop().unwrap());
    let done = sim.settle();
    assert_eq!(done.len(), 3, "one page is enough");
    for buf in hog {
        sim.mem.release(buf);
    }
    sim.mem.release(write);
    assert_eq!(sim.mem.in_use(), 0);
}

#[test]
fn the_journal_wraps_many_times() {
    let mut sim = Sim::formatted(16 * MIB, true, 5);
    let slot = sim.create(1, 4);
    for round in 0..400u64 {
        let extent = round % 4;
        assert!(sim.request(slot, WRITE, extent * 256, 1, 8).is_ok());
        assert!(sim.request(slot, IoOp::Discard, extent * 256, 256, 0).is_ok());
    }
    assert!(sim.request(slot, WRITE, 3, 1, 8).is_ok());
    let disk = sim.disk.kill(&mut sim.rng);
    let mut sim = Sim::open(disk, 1);
    assert_eq!(sim.read(slot, 3, 1), vec![8; 4096]);
    assert_eq!(sim.pool.usage().extents_allocated, 1);
}

#[test]
fn a_terabyte_opens_and_takes_its_last_block() {
    let mut dev = SparseDevice::new(1 << 40);
    Pool::format(&mut dev, &options(true)).unwrap();
    let pool = Pool::open(&mut dev).unwrap();
    let usage = pool.usage();
    assert!(usage.extents_total > 1_039_000 && usage.extents_free == usage.extents_total);
    let mut sim = Sim::open(Disk::new(dev), 1);
    sim.check = false;
    let slot = sim.create(1, 1 << 20);
    assert!(sim.request(slot, WRITE, (1 << 20) * EXTENT_BLOCKS - 1, 1, 1).is_ok());
    assert_eq!(sim.read(slot, (1 << 20) * EXTENT_BLOCKS - 1, 1), vec![1; 4096]);
}

/// A checkpoint that does not get on must not let the ring run over what is not in the table yet.
#[test]
fn a_full_ring_waits_for_the_checkpoint() {
    let mut sim = Sim::formatted(16 * MIB, true, 4);
    let slot = sim.create(1, 4);
    let (mut held, mut answered) = (Vec::new(), 0);
    let range = LbaRange::new(Lba(0), 256).unwrap();
    let buf = sim.mem.alloc(1 << 20).unwrap();
    sim.mem.bytes_mut(buf.slice()).fill(6);
    for tag in 0..200u64 {
        let request = if tag % 2 == 0 {
            IoRequest { op: WRITE, range, buf: buf.slice() }
        } else {
            IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY }
        };
        sim.pool.submit(tag, slot, request, &mut sim.mem);
        while let Some(io) = sim.pool.poll_disk() {
            if matches!(io.op, DiskOp::Write { offset, .. } if offset.0 < 8192) {
                held.push(io);
                continue;
            }
            sim.disk.issue(io, &sim.mem);
            let (io, result) = sim.disk.complete(&mut sim.rng, &mut sim.mem);
            sim.pool.handle_disk(io.id, result, &mut sim.mem);
        }
        answered += usize::from(sim.pool.poll_done().is_some());
    }
    // The ring of so small a pool has 64 blocks, and each of these took one.
    assert_eq!((held.len(), answered), (1, 64));
    for io in held {
        sim.disk.issue(io, &sim.mem);
    }
    assert_eq!(sim.settle().len(), 200 - 64);
    assert!(sim.request(slot, WRITE, 5, 1, 7).is_ok());
    let disk = sim.disk.kill(&mut sim.rng);
    let mut sim = Sim::open(disk, 1);
    assert_eq!(sim.read(slot, 5, 1), vec![7; 4096]);
    assert_eq!(sim.read(slot, 6, 250), vec![0; 250 * 4096]);
}

#[test]
fn an_extent_that_is_discarded_piece_by_piece_comes_back() {
    let mut sim = Sim::formatted(16 * MIB, true, 7);
    let slot = sim.create(1, 4);
    assert!(sim.request(slot, WRITE, 0, 8, 1).is_ok());
    for lba in (0..8).rev() {
        assert_eq!(sim.pool.usage().extents_allocated, 1);
        assert!(sim.request(slot, IoOp::Discard, lba, 1, 0).is_ok());
    }
    sim.settle();
    let usage = sim.pool.usage();
    assert_eq!((usage.extents_allocated, usage.extents_free), (0, usage.extents_total));
    assert!(sim.request(slot, WRITE, 3, 1, 5).is_ok());
    assert_eq!(sim.read(slot, 2, 2), [vec![0; 4096], vec![5; 4096]].concat());
}
