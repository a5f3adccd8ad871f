//! Replicas with blocks of 512 bytes: neighbours within a block of the pool are not harmed, however
//! requests are mixed and wherever the work is cut off.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::BTreeMap;

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId,
};
use cairn_replica::{Device, ReplicaSlot};
use common::{MIB, Sim, spec};

const SECTOR: usize = 512;
const SIZE: u64 = 3 * 2048 - 5;

fn create(sim: &mut Sim) -> ReplicaSlot {
    let tag = sim.tag();
    let mut spec = spec(1, SIZE);
    spec.block_size = BlockSize::B512;
    sim.pool.create_replica(tag, spec, &mut sim.mem);
    assert_eq!(sim.wait(tag).error, None);
    sim.pool.find(ReplicaId(1)).unwrap()
}

struct InFlight {
    op: IoOp,
    first: u64,
    sectors: u64,
    buf: Option<Buf>,
    value: u64,
}

/// What each sector holds, and what it may hold since a write that was not answered.
struct World {
    sim: Sim,
    slot: ReplicaSlot,
    held: BTreeMap<u64, Vec<u64>>,
    asked: BTreeMap<u64, InFlight>,
    value: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut sim = Sim::formatted(16 * MIB, true, seed);
        sim.check = false;
        let slot = create(&mut sim);
        Self { sim, slot, held: BTreeMap::new(), asked: BTreeMap::new(), value: 0 }
    }

    fn act(&mut self) {
        if self.sim.rng.chance(50) {
            self.sim.step();
        } else {
            self.submit();
        }
        while let Some(done) = self.sim.pool.poll_done() {
            let asked = self.asked.remove(&done.tag).unwrap();
            self.answered(asked, done.status);
        }
    }

    fn submit(&mut self) {
        let rng = &mut self.sim.rng;
        // Much of it within a few blocks, some over the edge of an extent and at the end.
        let base = [0, 2040, SIZE - 60][rng.index(3)];
        let first = base + rng.below(40);
        let long = rng.chance(20);
        let sectors = (1 + rng.below(if long { 700 } else { 20 })).min(SIZE - first);
        let overlaps = |a: &InFlight| a.first < first + sectors && first < a.first + a.sectors;
        if self.asked.values().any(overlaps) {
            return;
        }
        let op = match rng.below(8) {
            0..3 => IoOp::Read,
            3 => IoOp::Discard,
            4 => IoOp::WriteZeroes { fua: false, unmap: rng.chance(50) },
            _ => IoOp::Write { fua: rng.chance(20) },
        };
        self.value += 1;
        let data = matches!(op, IoOp::Read | IoOp::Write { .. });
        let value = if matches!(op, IoOp::Write { .. }) { self.value } else { 0 };
        let buf = if data {
            let Some(buf) = self.sim.mem.alloc(u32::try_from(sectors).unwrap() * 512) else {
                return;
            };
            for word in self.sim.mem.bytes_mut(buf.slice()).chunks_mut(8) {
                word.copy_from_slice(&value.to_le_bytes());
            }
            Some(buf)
        } else {
            None
        };
        if op != IoOp::Read {
            for sector in first..first + sectors {
                self.held.entry(sector).or_insert_with(|| vec![0]).push(value);
            }
        }
        let tag = self.sim.tag();
        let slice = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        let range = LbaRange::new(Lba(first), sectors).unwrap();
        self.asked.insert(tag, InFlight { op, first, sectors, buf, value });
        let request = IoRequest { op, range, buf: slice };
        self.sim.pool.submit(tag, self.slot, request, &mut self.sim.mem);
    }

    fn answered(&mut self, asked: InFlight, status: IoStatus) {
        assert_eq!(status, IoStatus::Ok);
        if asked.op == IoOp::Read {
            let bytes = self.sim.mem.bytes(asked.buf.as_ref().unwrap().slice()).to_vec();
            self.verify(asked.first, &bytes);
        } else {
            for sector in asked.first..asked.first + asked.sectors {
                self.held.insert(sector, vec![asked.value]);
            }
        }
        if let Some(buf) = asked.buf {
            self.sim.mem.release(buf);
        }
    }

    fn verify(&mut self, first: u64, bytes: &[u8]) {
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR)) {
            let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let known = self.held.get(&sector).map_or(&[0][..], |held| held);
            let uniform = bytes[8..] == bytes[..SECTOR - 8];
            assert!(uniform && known.contains(&value), "{sector}: {value}, not {known:?}");
            self.held.insert(sector, vec![value]);
        }
    }

    fn read_all(&mut self) {
        for first in (0..SIZE).step_by(256) {
            let sectors = 256.min(SIZE - first);
            let tag = self.sim.tag();
            let buf = self.sim.mem.alloc(u32::try_from(sectors).unwrap() * 512).unwrap();
            let range = LbaRange::new(Lba(first), sectors).unwrap();
            let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
            self.sim.pool.submit(tag, self.slot, request, &mut self.sim.mem);
            assert!(self.sim.wait(tag).status.is_ok());
            let bytes = self.sim.mem.bytes(buf.slice()).to_vec();
            self.sim.mem.release(buf);
            self.verify(first, &bytes);
        }
    }
}

#[test]
fn it_is_the_model() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        for _ in 0..600 {
            world.act();
        }
        for done in world.sim.settle() {
            let asked = world.asked.remove(&done.tag).unwrap();
            world.answered(asked, done.status);
        }
        assert!(world.asked.is_empty() && world.sim.pool.is_idle());
        assert_eq!(world.sim.mem.in_use(), 0, "buffers leaked");
        world.read_all();
    }
}

#[test]
fn a_kill_leaves_each_sector_as_it_was_or_as_it_was_to_be() {
    for seed in 1000..1200 {
        let mut world = World::new(seed);
        let actions = world.sim.rng.below(300);
        for _ in 0..actions {
            world.act();
        }
        let disk = world.sim.disk.kill(&mut world.sim.rng);
        world.sim = Sim::open(disk, seed);
        world.asked.clear();
        world.read_all();
    }
}

#[test]
fn rot_in_a_block_fails_the_write_of_a_part_of_it() {
    let mut world = World::new(3);
    let submit = |world: &mut World, op, first, sectors: u64| {
        let buf = world.sim.mem.alloc(u32::try_from(sectors).unwrap() * 512).unwrap();
        world.sim.mem.bytes_mut(buf.slice()).fill(7);
        let range = LbaRange::new(Lba(first), sectors).unwrap();
        let tag = world.sim.tag();
        let request = IoRequest { op, range, buf: buf.slice() };
        world.sim.pool.submit(tag, world.slot, request, &mut world.sim.mem);
        let status = world.sim.wait(tag).status;
        world.sim.mem.release(buf);
        status
    };
    assert!(submit(&mut world, IoOp::Write { fua: false }, 0, 16).is_ok());
    world.sim.checkpoint();
    let mut block = vec![0; 4096];
    let disk = &mut world.sim.disk.now;
    let at = (0..16 * MIB).step_by(4096).find(|&at| {
        disk.read_at(at, &mut block).unwrap();
        block == [7; 4096]
    });
    block[100] ^= 1;
    disk.write_at(at.unwrap(), &block).unwrap();
    // The rest of the block cannot be vouched for; a whole block can be written.
    assert_eq!(submit(&mut world, IoOp::Write { fua: false }, 1, 1), IoStatus::MediaError);
    assert!(submit(&mut world, IoOp::Write { fua: false }, 0, 8).is_ok());
    assert!(submit(&mut world, IoOp::Read, 0, 16).is_ok());
}
