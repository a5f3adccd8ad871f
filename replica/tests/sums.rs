//! Block checksums: what rot, a misdirected write, a crash and a clean stop come to.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use cairn_replica::{Device, ReplicaSlot, inspect_checksums, inspect_superblock};
use common::{Disk, EXTENT_BLOCKS, MIB, Sim};

const WRITE: IoOp = IoOp::Write { fua: false };

/// Reads one block; its bytes, or how it failed.
fn read(sim: &mut Sim, slot: ReplicaSlot, lba: u64) -> Result<Vec<u8>, IoStatus> {
    let buf = sim.mem.alloc(4096).unwrap();
    let tag = sim.tag();
    let range = LbaRange::new(Lba(lba), 1).unwrap();
    let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
    sim.pool.submit(tag, slot, request, &mut sim.mem);
    let status = sim.wait(tag).status;
    let bytes = sim.mem.bytes(buf.slice()).to_vec();
    sim.mem.release(buf);
    if status.is_ok() { Ok(bytes) } else { Err(status) }
}

/// The first byte of the data on the device.
fn data_start(sim: &mut Sim) -> u64 {
    let copies = inspect_superblock(&mut sim.disk.now).unwrap();
    copies[0].content.as_ref().unwrap().segments[0].data * 4096
}

/// The first byte of the checksum page of the first extent that counts.
fn sums_start(sim: &mut Sim) -> u64 {
    let pages = inspect_checksums(&mut sim.disk.now, Some(0), false).unwrap().found;
    (pages[0].block + u64::from(pages[0].current.unwrap())) * 4096
}

fn flip(disk: &mut Disk, byte: u64, bit: u8) {
    let at = byte & !4095;
    let mut block = vec![0; 4096];
    disk.now.read_at(at, &mut block).unwrap();
    block[usize::try_from(byte - at).unwrap()] ^= 1 << bit;
    disk.now.write_at(at, &block).unwrap();
}

/// What block `lba` of a full extent holds.
fn value(lba: u64) -> u8 {
    u8::try_from(lba % 250 + 1).unwrap()
}

/// A pool with one replica whose first extent is full.
fn full_extent(seed: u64) -> (Sim, ReplicaSlot) {
    let mut sim = Sim::formatted(16 * MIB, true, seed);
    let slot = sim.create(1, 8);
    for lba in 0..EXTENT_BLOCKS {
        assert!(sim.request(slot, WRITE, lba, 1, value(lba)).is_ok());
    }
    (sim, slot)
}

#[test]
fn every_flipped_bit_is_seen_and_nothing_else_is_refused() {
    for seed in 0..4 {
        let (mut sim, slot) = full_extent(seed);
        let start = data_start(&mut sim);
        let mut bad = std::collections::BTreeSet::new();
        for _ in 0..60 {
            let byte = sim.rng.below(MIB);
            let bit = u8::try_from(sim.rng.below(8)).unwrap();
            if bad.insert(byte / 4096) {
                flip(&mut sim.disk, start + byte, bit);
            }
        }
        for lba in 0..EXTENT_BLOCKS {
            let found = read(&mut sim, slot, lba);
            if bad.contains(&lba) {
                assert_eq!(found, Err(IoStatus::MediaError), "block {lba}");
            } else {
                assert_eq!(found.unwrap(), vec![value(lba); 4096], "block {lba}");
            }
        }
        assert_eq!(sim.pool.checksum_mismatches(), bad.len() as u64);
        // Written again it is right again.
        for &lba in &bad {
            assert!(sim.request(slot, WRITE, lba, 1, 9).is_ok());
            assert!(read(&mut sim, slot, lba).is_ok());
        }
    }
}

#[test]
fn a_block_in_anothers_place_does_not_verify() {
    let (mut sim, slot) = full_extent(0);
    let start = data_start(&mut sim);
    let mut block = vec![0; 4096];
    sim.disk.now.read_at(start + 3 * 4096, &mut block).unwrap();
    sim.disk.now.write_at(start + 4 * 4096, &block).unwrap();
    assert!(read(&mut sim, slot, 3).is_ok());
    assert_eq!(read(&mut sim, slot, 4), Err(IoStatus::MediaError));
}

#[test]
fn a_block_that_was_never_written_reads_as_zeros_whatever_is_there() {
    let mut sim = Sim::formatted(16 * MIB, true, 0);
    let slot = sim.create(1, 8);
    assert!(sim.request(slot, WRITE, 0, 1, 7).is_ok());
    let start = data_start(&mut sim);
    flip(&mut sim.disk, start + 5 * 4096, 3);
    assert_eq!(read(&mut sim, slot, 5), Ok(vec![0; 4096]));
    // In one request with a block that was.
    assert_eq!(sim.read(slot, 0, 8)[4096..], vec![0; 7 * 4096]);
}

#[test]
fn a_clean_stop_leaves_nothing_to_hash_and_a_kill_does() {
    for kill in [false, true] {
        let (mut sim, slot) = full_extent(0);
        if !kill {
            sim.checkpoint();
            assert_eq!(sim.pool.dirty_extents(), 0);
        }
        let disk = sim.disk.kill(&mut sim.rng);
        let mut sim = Sim::open(disk, 0);
        assert_eq!(sim.pool.dirty_extents(), u64::from(kill));
        for lba in (0..EXTENT_BLOCKS).rev() {
            assert_eq!(read(&mut sim, slot, lba).unwrap(), vec![value(lba); 4096]);
        }
        // And what is read from a clean page is held to it.
        let start = data_start(&mut sim);
        flip(&mut sim.disk, start + 77 * 4096 + 9, 0);
        assert_eq!(read(&mut sim, slot, 77), Err(IoStatus::MediaError));
    }
}

/// A pool whose first extent was full and dirty when its process died.
fn killed(seed: u64) -> (Sim, ReplicaSlot) {
    let (sim, slot) = full_extent(seed);
    let Sim { disk, mut rng, .. } = sim;
    (Sim::open(disk.kill(&mut rng), seed), slot)
}

/// Submits writes of `byte`, all at once: first block and blocks of each. Not waited for.
fn submit_writes(sim: &mut Sim, slot: ReplicaSlot, writes: &[(u64, u64)], byte: u8) {
    for &(lba, blocks) in writes {
        // Never given back: the memory is the test's own.
        let buf = sim.mem.alloc(u32::try_from(blocks * 4096).unwrap()).unwrap();
        sim.mem.bytes_mut(buf.slice()).fill(byte);
        let tag = sim.tag();
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        let request = IoRequest { op: WRITE, range, buf: buf.slice() };
        sim.pool.submit(tag, slot, request, &mut sim.mem);
    }
}

/// A rebuild writes a member from end to end that has just come back: reading it all first would take as much of
/// the disk as the copy.
#[test]
fn what_is_written_from_end_to_end_after_a_crash_is_not_read() {
    let (mut sim, slot) = killed(0);
    let before = sim.disk.read;
    submit_writes(&mut sim, slot, &[(0, 64), (64, 64), (192, 64), (128, 64)], 0xee);
    assert!(sim.settle().iter().all(|done| done.status.is_ok()));
    assert!(sim.disk.read - before < 32 << 10, "{} bytes read", sim.disk.read - before);
    assert_eq!(sim.pool.dirty_extents(), 1);
    for lba in 0..EXTENT_BLOCKS {
        assert_eq!(read(&mut sim, slot, lba).unwrap(), vec![0xee; 4096]);
    }
    // And it is held to what was written.
    let start = data_start(&mut sim);
    flip(&mut sim.disk, start + 77 * 4096 + 9, 0);
    assert_eq!(read(&mut sim, slot, 77), Err(IoStatus::MediaError));
}

/// An extent that is discarded whole while a part of it is known and the rest not was hashed while it was zeroed: it was
/// given back in use, or zeroed again under its next owner.
#[test]
fn what_is_discarded_before_it_is_hashed_is_left_alone() {
    for seed in 0..200 {
        let (mut sim, slot) = killed(4 * seed);
        submit_writes(&mut sim, slot, &[(100 + seed % 50, 1)], 0xee);
        submit_writes(&mut sim, slot, &[(3 * EXTENT_BLOCKS, 1)], 0xdd);
        for _ in 0..seed % 7 {
            sim.step();
        }
        let tag = sim.tag();
        let range = LbaRange::new(Lba(0), EXTENT_BLOCKS).unwrap();
        let request = IoRequest { op: IoOp::Discard, range, buf: cairn_block::BufSlice::EMPTY };
        sim.pool.submit(tag, slot, request, &mut sim.mem);
        for _ in 0..seed % 11 {
            sim.step();
        }
        submit_writes(&mut sim, slot, &[(5 * EXTENT_BLOCKS, 2)], 0xcc);
        assert!(sim.settle().iter().all(|done| done.status.is_ok()));
        assert_eq!(read(&mut sim, slot, 7).unwrap(), vec![0; 4096]);
        assert_eq!(read(&mut sim, slot, 3 * EXTENT_BLOCKS).unwrap(), vec![0xdd; 4096]);
        assert_eq!(read(&mut sim, slot, 5 * EXTENT_BLOCKS + 1).unwrap(), vec![0xcc; 4096]);
    }
}

/// A block that cannot be read keeps the rest of its extent from being known after a crash, but not what was written since.
#[test]
fn what_was_written_since_a_crash_is_read_though_the_rest_cannot_be() {
    let (mut sim, slot) = killed(0);
    let start = data_start(&mut sim);
    sim.disk.fail_reads = Some(start + 9 * 4096);
    submit_writes(&mut sim, slot, &[(40, 8)], 0xee);
    assert!(sim.settle().iter().all(|done| done.status.is_ok()));
    for _ in 0..2 {
        assert_eq!(read(&mut sim, slot, 9), Err(IoStatus::MediaError));
        assert_eq!(read(&mut sim, slot, 44).unwrap(), vec![0xee; 4096]);
    }
    // Once it can be read again, all of it is there.
    sim.disk.fail_reads = None;
    assert_eq!(read(&mut sim, slot, 9).unwrap(), vec![value(9); 4096]);
    assert_eq!(read(&mut sim, slot, 44).unwrap(), vec![0xee; 4096]);
}

/// What is written before an extent is hashed, is read and discarded among it, and another crash.
#[test]
fn a_part_written_before_it_is_hashed() {
    for seed in 0..64 {
        let (mut sim, slot) = killed(4 * seed);
        let mut expected: Vec<u8> = (0..EXTENT_BLOCKS).map(value).collect();
        for round in 0..2 {
            let mut writes = Vec::new();
            let mut at = sim.rng.below(24);
            while at + 24 < EXTENT_BLOCKS {
                let blocks = 1 + sim.rng.below(23);
                writes.push((at, blocks));
                at += blocks + sim.rng.below(24);
            }
            let byte = 0xe0 + round;
            for &(lba, blocks) in &writes {
                for block in lba..lba + blocks {
                    expected[usize::try_from(block).unwrap()] = byte;
                }
            }
            submit_writes(&mut sim, slot, &writes, byte);
            // Reads come among them: each sees what is older, or newer, and never anything else.
            for _ in 0..sim.rng.below(3) {
                let steps = sim.rng.below(6);
                for _ in 0..steps {
                    sim.step();
                }
                let lba = sim.rng.below(EXTENT_BLOCKS);
                let found = read(&mut sim, slot, lba).unwrap();
                assert_eq!(found, vec![expected[usize::try_from(lba).unwrap()]; 4096]);
            }
            assert!(sim.settle().iter().all(|done| done.status.is_ok()));
            if sim.rng.chance(30) {
                let lba = sim.rng.below(EXTENT_BLOCKS);
                let discard = IoOp::Discard;
                assert!(sim.request(slot, discard, lba, 1, 0).is_ok());
                expected[usize::try_from(lba).unwrap()] = 0;
            }
            if sim.rng.chance(50) {
                let Sim { disk, mut rng, .. } = sim;
                sim = Sim::open(disk.kill(&mut rng), 4 * seed);
            }
        }
        for (lba, &byte) in (0..).zip(&expected) {
            assert_eq!(read(&mut sim, slot, lba).unwrap(), vec![byte; 4096], "block {lba}");
        }
    }
}

#[test]
fn a_rotten_checksum_page_is_an_error_and_not_a_wrong_read() {
    let (mut sim, slot) = full_extent(0);
    sim.checkpoint();
    let disk = sim.disk.kill(&mut sim.rng);
    let mut sim = Sim::open(disk, 0);
    let at = sums_start(&mut sim);
    flip(&mut sim.disk, at + 300, 2);
    flip(&mut sim.disk, at + 4096 + 300, 2);
    assert_eq!(read(&mut sim, slot, 1), Err(IoStatus::MediaError));
    // The rest of the pool serves.
    assert!(sim.request(slot, WRITE, 5 * EXTENT_BLOCKS, 1, 3).is_ok());
    assert!(read(&mut sim, slot, 5 * EXTENT_BLOCKS).is_ok());
}

/// Steady overwrites of extents that are dirty write their data and nothing else.
#[test]
fn a_steady_overwrite_logs_nothing() {
    let (mut sim, slot) = full_extent(0);
    sim.settle();
    let flushes = sim.disk.flushes;
    for round in 0..200 {
        let lba = sim.rng.below(EXTENT_BLOCKS);
        assert!(sim.request(slot, WRITE, lba, 1, round).is_ok());
    }
    assert_eq!(sim.disk.flushes, flushes);
}

#[test]
fn verify_finds_what_rotted_and_costs_nothing_in_holes() {
    let (mut sim, slot) = full_extent(9);
    let tag = sim.tag() + 1;
    assert!(sim.request(slot, IoOp::Verify, 0, 8 * EXTENT_BLOCKS, 0).is_ok());
    assert_eq!(sim.pool.take_verified(tag), Some(256), "holes do not count");
    let start = data_start(&mut sim);
    for lba in [0u64, 33, 255] {
        flip(&mut sim.disk, start + lba * 4096 + 7, 3);
        assert_eq!(sim.request(slot, IoOp::Verify, 0, EXTENT_BLOCKS, 0), IoStatus::MediaError);
        assert_eq!(sim.request(slot, IoOp::Verify, lba, 1, 0), IoStatus::MediaError);
        assert!(sim.request(slot, IoOp::Verify, (lba + 1) % 256, 1, 0).is_ok());
        // Written again it is good again.
        assert!(sim.request(slot, WRITE, lba, 1, 1).is_ok());
        assert!(sim.request(slot, IoOp::Verify, 0, EXTENT_BLOCKS, 0).is_ok());
    }
    // A hole reads nothing from the device; nor does a discarded extent.
    assert!(sim.request(slot, IoOp::Discard, 0, EXTENT_BLOCKS, 0).is_ok());
    sim.settle();
    let tag = sim.tag();
    let range = LbaRange::new(Lba(0), 8 * EXTENT_BLOCKS).unwrap();
    let request = IoRequest { op: IoOp::Verify, range, buf: cairn_block::BufSlice::EMPTY };
    sim.pool.submit(tag, slot, request, &mut sim.mem);
    assert!(sim.pool.poll_disk().is_none());
    assert!(sim.wait(tag).status.is_ok());
    assert_eq!(sim.pool.take_verified(tag), Some(0));
}

#[test]
fn a_verify_waits_for_a_scratch_buffer_and_meets_writes() {
    let (mut sim, slot) = full_extent(10);
    let mut held = Vec::new();
    while let Some(buf) = sim.mem.alloc(4096) {
        held.push(buf);
    }
    let tag = sim.tag();
    let range = LbaRange::new(Lba(0), EXTENT_BLOCKS).unwrap();
    let request = IoRequest { op: IoOp::Verify, range, buf: cairn_block::BufSlice::EMPTY };
    sim.pool.submit(tag, slot, request, &mut sim.mem);
    assert!(sim.pool.poll_disk().is_none());
    assert!(sim.pool.waits_for_memory());
    held.into_iter().for_each(|buf| sim.mem.release(buf));
    sim.pool.retry(&mut sim.mem);
    assert!(!sim.pool.waits_for_memory());
    sim.issue();
    // Blocks that are overwritten while they are verified are good before and after.
    for lba in 0..EXTENT_BLOCKS {
        assert!(sim.request(slot, WRITE, lba, 1, value(lba + 1)).is_ok());
    }
    sim.settle();
    assert_eq!(sim.pool.checksum_mismatches(), 0);
    assert!(sim.pool.is_idle());
}

/// A damaged page costs what its extent held, not the extent: what is written can be read again, and a
/// crash at any time takes nothing unknown for good.
#[test]
fn an_extent_with_a_rotten_page_is_written_anew_block_by_block() {
    for seed in 0..40 {
        let (mut sim, slot) = full_extent(seed);
        sim.checkpoint();
        let disk = sim.disk.kill(&mut sim.rng);
        let mut sim = Sim::open(disk, seed);
        let at = sums_start(&mut sim);
        flip(&mut sim.disk, at + 300, 2);
        flip(&mut sim.disk, at + 4096 + 300, 2);
        let mut known = [false; 256];
        for round in 0..6 {
            for _ in 0..sim.rng.below(8) {
                let lba = sim.rng.below(EXTENT_BLOCKS);
                assert!(sim.request(slot, WRITE, lba, 1, 0x60).is_ok(), "seed {seed}");
                known[usize::try_from(lba).unwrap()] = true;
            }
            for (lba, known) in (0..).zip(known) {
                let expected = if known { Ok(vec![0x60; 4096]) } else { Err(IoStatus::MediaError) };
                assert!(read(&mut sim, slot, lba) == expected, "seed {seed}, block {lba}");
            }
            // What was answered is flushed with the page that tells of it.
            let disk = if round % 2 == 0 { sim.disk.cut(&mut sim.rng) } else { sim.disk };
            sim = Sim::open(disk, seed);
        }
        for lba in 0..EXTENT_BLOCKS {
            assert!(sim.request(slot, WRITE, lba, 1, 0x60).is_ok());
        }
        sim.checkpoint();
        let disk = sim.disk;
        let mut sim = Sim::open(disk, seed);
        assert!((0..EXTENT_BLOCKS).all(|lba| read(&mut sim, slot, lba).is_ok()));
        assert!(sim.request(slot, IoOp::Discard, 0, EXTENT_BLOCKS, 0).is_ok());
        sim.settle();
        assert!(sim.pool.is_idle());
    }
}
