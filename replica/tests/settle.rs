//! Open marks and stamps: what replicas may differ in; what crashes do to them is in `crash.rs`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use cairn_block::{
    BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId, SnapshotId,
};
use cairn_replica::change::{MAPPED, OPEN, SINCE};
use cairn_replica::{ReplicaSlot, RoundEnd, SnapshotSpec, inspect_dirty, inspect_journal};
use common::{EXTENT_BLOCKS, MIB, Sim, spec};

const WRITE: IoOp = IoOp::Write { fua: false };

fn write(sim: &mut Sim, slot: ReplicaSlot, extent: u64) {
    assert!(sim.request(slot, WRITE, extent * EXTENT_BLOCKS, 2, 7).is_ok());
}

fn end(sim: &mut Sim, slot: ReplicaSlot, round: u64, stamp: u64) {
    let tag = sim.tag();
    sim.pool.settle_end(tag, slot, RoundEnd { round, stamp, below: u32::MAX }, &mut sim.mem);
    assert_eq!(sim.wait(tag).status, IoStatus::Ok);
    sim.pool.check();
}

/// Settles all that is quiet.
fn round(sim: &mut Sim, slot: ReplicaSlot, stamp: u64) {
    sim.pool.settle_begin(slot, stamp).unwrap();
    end(sim, slot, stamp, stamp);
}

fn told(sim: &Sim, slot: ReplicaSlot, since: u64) -> Vec<u8> {
    let mut out = [0xff; 8];
    let len = sim.pool.changes(slot, 0, since, &mut out).unwrap();
    assert!(out[len..].iter().all(|&byte| byte == 0));
    out[..len].to_vec()
}

/// Submits a write of two blocks and lets nothing happen yet.
fn submit(sim: &mut Sim, slot: ReplicaSlot, extent: u64) -> u64 {
    let buf = sim.mem.alloc(8192).unwrap();
    sim.mem.bytes_mut(buf.slice()).fill(9);
    let tag = sim.tag();
    let range = LbaRange::new(Lba(extent * EXTENT_BLOCKS), 2).unwrap();
    let request = IoRequest { op: WRITE, range, buf: buf.slice() };
    sim.pool.submit(tag, slot, request, &mut sim.mem);
    tag
}

#[test]
fn what_is_written_is_open_until_a_round_ends_in_which_it_was_quiet() {
    let mut sim = Sim::formatted(64 * MIB, true, 1);
    let slot = sim.create(1, 5);
    for extent in [0, 1, 3] {
        write(&mut sim, slot, extent);
    }
    let open = MAPPED | OPEN | SINCE;
    assert_eq!(told(&sim, slot, 0), [open, open, 0, open, 0]);
    assert_eq!(told(&sim, slot, 1), [MAPPED | OPEN, MAPPED | OPEN, 0, MAPPED | OPEN, 0]);
    sim.pool.settle_begin(slot, 1).unwrap();
    write(&mut sim, slot, 1);
    end(&mut sim, slot, 1, 6);
    assert_eq!(sim.pool.open_extents(), 1);
    assert_eq!(told(&sim, slot, 6), [MAPPED | SINCE, MAPPED | OPEN, 0, MAPPED | SINCE, 0]);
    assert_eq!(told(&sim, slot, 7), [MAPPED, MAPPED | OPEN, 0, MAPPED, 0]);
    // What was settled is opened by its next change, and keeps its stamp meanwhile.
    assert!(sim.request(slot, IoOp::Discard, 0, 1, 0).is_ok());
    write(&mut sim, slot, 0);
    assert_eq!(told(&sim, slot, 6)[0], open);
    // A whole discard leaves nothing to be marked.
    assert!(sim.request(slot, IoOp::Discard, 3 * EXTENT_BLOCKS, EXTENT_BLOCKS, 0).is_ok());
    assert_eq!(told(&sim, slot, 0), [open, open, 0, 0, 0]);
    let (disk, before) = (sim.disk, [MAPPED | OPEN | SINCE, MAPPED | OPEN]);
    let mut sim = Sim::open(disk, 2);
    assert_eq!(told(&sim, slot, 6)[..2], before);
    let mut dev = sim.disk.now.clone();
    let found = inspect_dirty(&mut dev).unwrap().found;
    assert_eq!(
        found.iter().map(|d| (d.logical, d.open, d.stamp)).collect::<Vec<_>>(),
        [(0, true, 6), (1, true, 0)]
    );
    round(&mut sim, slot, 9);
    assert_eq!((told(&sim, slot, 9)[..2].to_vec(), sim.pool.open_extents()), (vec![5, 5], 0));
}

#[test]
fn another_round_than_the_last_settles_nothing() {
    let mut sim = Sim::formatted(64 * MIB, true, 3);
    let slot = sim.create(1, 2);
    write(&mut sim, slot, 0);
    end(&mut sim, slot, 0, 5);
    sim.pool.settle_begin(slot, 1).unwrap();
    sim.pool.settle_begin(slot, 2).unwrap();
    end(&mut sim, slot, 1, 5);
    assert_eq!(sim.pool.open_extents(), 1);
    let disk = sim.disk;
    let mut sim = Sim::open(disk, 4);
    end(&mut sim, slot, 2, 5);
    assert_eq!(sim.pool.open_extents(), 1, "a round ends with the pool's life");
    round(&mut sim, slot, 6);
    assert_eq!(sim.pool.open_extents(), 0);
    let nobody = ReplicaSlot(9);
    assert_eq!(sim.pool.settle_begin(nobody, 1), Err(IoStatus::PathError));
    assert_eq!(sim.pool.changes(nobody, 0, 0, &mut [0; 4]), None);
}

/// Overwrites log nothing: not those of what is open, and of what was settled only the first.
#[test]
fn a_settled_extent_is_opened_by_one_record() {
    let mut sim = Sim::formatted(64 * MIB, true, 5);
    sim.pool.set_checksum_limits(1000, 1000);
    let slot = sim.create(1, 2);
    let blocks = |sim: &Sim| inspect_journal(&mut sim.disk.now.clone()).unwrap().len();
    write(&mut sim, slot, 0);
    round(&mut sim, slot, 1);
    let before = blocks(&sim);
    for _ in 0..20 {
        write(&mut sim, slot, 0);
    }
    assert_eq!(blocks(&sim), before + 1);
    // Washed, it is clean and still open: its mark is one record too.
    sim.checkpoint();
    let before = blocks(&sim);
    for _ in 0..20 {
        write(&mut sim, slot, 0);
    }
    assert_eq!(blocks(&sim), before + 1);
    assert_eq!(sim.pool.open_extents(), 1);
}

/// A write that comes while the record that closes its extent is on its way opens it again, on stable storage,
/// before its data is there.
#[test]
fn a_write_during_the_end_of_a_round_opens_its_extent_again() {
    for seed in 0..200 {
        let mut sim = Sim::formatted(64 * MIB, true, seed);
        let slot = sim.create(1, 3);
        write(&mut sim, slot, 0);
        write(&mut sim, slot, 1);
        if seed % 2 == 0 {
            sim.checkpoint();
        }
        assert!(sim.request(slot, IoOp::Flush, 0, 0, 0).is_ok());
        sim.pool.settle_begin(slot, 1).unwrap();
        let round = sim.tag();
        sim.pool.settle_end(
            round,
            slot,
            RoundEnd { round: 1, stamp: 4, below: u32::MAX },
            &mut sim.mem,
        );
        let tag = submit(&mut sim, slot, 0);
        for _ in 0..seed / 10 {
            sim.step();
        }
        let mut answered = false;
        while let Some(done) = sim.pool.poll_done() {
            answered |= done.tag == tag;
        }
        let mut rng = common::Rng(seed);
        let disk = sim.disk.kill(&mut rng);
        let mut sim = Sim::open(disk, seed);
        let written = sim.read(slot, 0, 1) == vec![9; 4096];
        assert!(written || !answered);
        assert!(!written || told(&sim, slot, 0)[0] & OPEN != 0, "seed {seed}");
    }
}

fn take(sim: &mut Sim, slot: ReplicaSlot, id: u128) -> ReplicaSlot {
    let tag = sim.tag();
    let spec = SnapshotSpec { id: SnapshotId(id), name: format!("s{id}"), created: 9 };
    sim.pool.create_snapshot(tag, slot, spec, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    sim.pool.find_snapshot(ReplicaId(1), SnapshotId(id)).unwrap()
}

#[test]
fn a_round_covers_a_replicas_snapshots_and_not_what_its_clones_wrote() {
    let mut sim = Sim::formatted(64 * MIB, true, 7);
    let slot = sim.create(1, 4);
    write(&mut sim, slot, 0);
    write(&mut sim, slot, 1);
    let snapshot = take(&mut sim, slot, 5);
    write(&mut sim, slot, 1);
    let tag = sim.tag();
    let mut of = spec(2, 4 * EXTENT_BLOCKS);
    of.source = Some((ReplicaId(1), SnapshotId(5)));
    sim.pool.create_replica(tag, of, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    let clone = sim.pool.find(ReplicaId(2)).unwrap();
    assert_eq!(
        told(&sim, clone, 1),
        [MAPPED, MAPPED, 0, 0],
        "what is its origin's is not open in it"
    );
    assert_eq!(told(&sim, clone, 0), [MAPPED | SINCE, MAPPED | SINCE, 0, 0]);
    write(&mut sim, clone, 0);
    assert_eq!(told(&sim, slot, 1), [MAPPED | OPEN, MAPPED | OPEN, 0, 0]);
    round(&mut sim, slot, 3);
    assert_eq!(told(&sim, slot, 3), [MAPPED | SINCE, MAPPED | SINCE, 0, 0]);
    assert_eq!(told(&sim, clone, 3), [MAPPED | OPEN, MAPPED, 0, 0]);
    // What moves up takes its mark and its stamp along, and what is copied opens what it is copied into.
    sim.delete(clone);
    sim.settle();
    let tag = sim.tag();
    sim.pool.delete_snapshot(tag, snapshot, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    sim.settle();
    assert_eq!(sim.pool.usage().extents_allocated, 2);
    assert_eq!(told(&sim, slot, 3)[0], MAPPED | SINCE);
    round(&mut sim, slot, 4);
    assert_eq!(sim.pool.open_extents(), 0);
    assert_eq!(told(&sim, slot, 3)[1], MAPPED | SINCE);
    let request = IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
    let tag = sim.tag();
    sim.pool.submit(tag, slot, request, &mut sim.mem);
    assert!(sim.wait(tag).status.is_ok());
}

#[test]
fn many_extents_are_settled_in_one_round_beside_writes() {
    let mut sim = Sim::formatted(400 * MIB, true, 8);
    let slot = sim.create(1, 320);
    for extent in 0..320 {
        write(&mut sim, slot, extent);
    }
    sim.pool.settle_begin(slot, 1).unwrap();
    let tag = sim.tag();
    sim.pool.settle_end(tag, slot, RoundEnd { round: 1, stamp: 2, below: u32::MAX }, &mut sim.mem);
    write(&mut sim, slot, 5);
    let done = sim.settle();
    assert!(done.iter().any(|done| done.tag == tag) || sim.pool.in_flight() == 0);
    sim.pool.check();
    let mut out = vec![0; 320];
    assert_eq!(sim.pool.changes(slot, 0, 2, &mut out), Some(320));
    let open: Vec<usize> = (0..320).filter(|&i| out[i] & OPEN != 0).collect();
    assert_eq!(open, [5]);
    assert!(out.iter().enumerate().all(|(i, byte)| i == 5 || *byte == MAPPED | SINCE));
}
