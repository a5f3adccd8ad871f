//! A model of what replicas must hold, beside a pool that is worked at random.

pub(crate) mod script;

use std::collections::{BTreeMap, BTreeSet};

use cairn_block::{
    Buf, BufSlice, Epoch, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId, SnapshotId,
};
use cairn_replica::{
    Device, Done, Pool, PoolState, Register, ReplicaSlot, ReplicaState, RoundEnd, SnapshotSpec,
    SparseDevice,
};

use super::marks::{Ended, Marks};
use super::model::{Blocks, Held, Since, holds, settle_block, verify};
use super::{BLOCK, Disk, EXTENT_BLOCKS, MIB, Sim, options, spec};

#[derive(Clone, Default)]
struct ModelReplica {
    blocks: Blocks,
    size: u64,
    slot: Option<ReplicaSlot>,
    registers: Vec<(u64, bool)>,
    delete_asked: bool,
    /// It is a clone, or a snapshot of it was asked for.
    layered: bool,
    /// What it holds if it was taken back to a snapshot, which is not answered.
    reverting: Option<(Blocks, Marks)>,
    marks: Marks,
}

/// A snapshot: of which replica, and what it must hold.
#[derive(Clone)]
struct ModelSnapshot {
    /// The replica had layers beneath it before.
    layered: bool,
    blocks: Blocks,
    marks: Marks,
    size: u64,
    answered: bool,
    delete_asked: bool,
}

impl ModelReplica {
    fn held(&mut self, lba: u64) -> &mut Vec<Held> {
        self.blocks.entry(lba).or_insert_with(|| vec![Held { order: 0, value: 0, certain: true }])
    }
}

enum Asked {
    Change {
        id: u128,
        range: LbaRange,
        order: u64,
        durable: bool,
        buf: Option<Buf>,
    },
    Read {
        id: u128,
        range: LbaRange,
        buf: Buf,
    },
    Flush {
        covered: Vec<(u128, u64, u64)>,
    },
    Create(u128),
    Delete(u128),
    Register(u128, u64),
    Snapshot(u128, u128),
    Unsnapshot(u128, u128),
    Revert(u128),
    /// Nothing, where the round is not the one that began.
    Settle(u128, Option<Ended>),
    Other,
}

/// Random requests on random replicas, and what must be read afterwards.
pub(crate) struct World {
    pub(crate) sim: Sim,
    replicas: BTreeMap<u128, ModelReplica>,
    snapshots: BTreeMap<(u128, u128), ModelSnapshot>,
    asked: BTreeMap<u64, Asked>,
    next_id: u128,
    order: u64,
    pub(crate) len: u64,
    /// The size of replicas in extents.
    extents: u64,
    /// Of each extent, the blocks that are read to verify it.
    looked_at: u64,
    /// Requests and commands that were answered.
    pub(crate) answers: u64,
}

const REPLICA_EXTENTS: u64 = 6;

impl World {
    pub(crate) fn new(len: u64, zeroed: bool, seed: u64) -> Self {
        let mut dev = SparseDevice::new(len);
        if !zeroed {
            // Somebody else's bytes, which must never be seen.
            let noise = vec![0xee; 64 << 10];
            for at in (MIB..len - MIB).step_by(256 << 10) {
                dev.write_at(at, &noise).unwrap();
            }
        }
        Pool::format(&mut dev, &options(zeroed)).unwrap();
        Self {
            sim: Sim::open(Disk::new(dev), seed),
            replicas: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_id: 1,
            order: 0,
            len,
            extents: REPLICA_EXTENTS,
            looked_at: EXTENT_BLOCKS,
            answers: 0,
        }
    }

    fn busy(&self, id: u128, range: LbaRange) -> bool {
        self.asked.values().any(|a| match a {
            Asked::Change { id: i, range: r, .. } | Asked::Read { id: i, range: r, .. } => {
                *i == id && r.overlaps(range)
            }
            _ => false,
        })
    }

    /// One random action.
    pub(crate) fn act(&mut self) {
        match self.sim.rng.below(100) {
            0..45 => {
                self.sim.step();
            }
            45..47 if self.replicas.len() < 4 => self.create(),
            47..50 => self.snapshot_work(),
            50 => self.delete(),
            51 => self.register(),
            52..55 => self.checkpoint(),
            55..61 => self.flush(),
            61..64 => self.settle_work(),
            _ => self.io(),
        }
        if self.sim.check {
            self.sim.pool.check();
            self.check_marks();
        }
        self.collect();
    }

    fn create(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let size = self.extents * EXTENT_BLOCKS - self.sim.rng.below(3);
        let tag = self.sim.tag();
        self.replicas.insert(id, ModelReplica { size, ..ModelReplica::default() });
        self.asked.insert(tag, Asked::Create(id));
        self.sim.pool.create_replica(tag, spec(id, size), &mut self.sim.mem);
    }

    fn snapshot_work(&mut self) {
        let known: Vec<(u128, u128)> = self
            .snapshots
            .iter()
            .filter(|(_, s)| s.answered && !s.delete_asked)
            .map(|(key, _)| *key)
            .collect();
        let one = known.get(self.sim.rng.index(known.len().max(1))).copied();
        match (self.sim.rng.below(6), one) {
            (0, Some((of, id))) => {
                self.delete_snapshot((of, id));
            }
            (1, Some(from)) if self.replicas.len() < 4 => self.clone_of(from),
            (2, Some(to)) => self.revert(to),
            _ if self.snapshots.len() < 5 => self.take(),
            _ => {}
        }
    }

    fn delete_snapshot(&mut self, (of, id): (u128, u128)) {
        let slot = self.sim.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap();
        self.snapshots.get_mut(&(of, id)).unwrap().delete_asked = true;
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Unsnapshot(of, id));
        self.sim.pool.delete_snapshot(tag, slot, &mut self.sim.mem);
    }

    fn checkpoint(&mut self) {
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Other);
        self.sim.pool.checkpoint(tag, &mut self.sim.mem);
    }

    fn take(&mut self) {
        let Some((of, slot)) = self.pick() else { return };
        let id = self.next_id;
        self.next_id += 1;
        let tag = self.sim.tag();
        let replica = self.replicas.get_mut(&of).unwrap();
        let layered = std::mem::replace(&mut replica.layered, true);
        let taken = ModelSnapshot {
            layered,
            blocks: replica.blocks.clone(),
            marks: replica.marks.clone(),
            size: replica.size,
            answered: false,
            delete_asked: false,
        };
        self.snapshots.insert((of, id), taken);
        self.asked.insert(tag, Asked::Snapshot(of, id));
        let spec = SnapshotSpec { id: SnapshotId(id), name: format!("s{id}"), created: 7 };
        self.sim.pool.create_snapshot(tag, slot, spec, &mut self.sim.mem);
    }

    fn clone_of(&mut self, (of, snapshot): (u128, u128)) {
        let id = self.next_id;
        self.next_id += 1;
        let tag = self.sim.tag();
        let from = &self.snapshots[&(of, snapshot)];
        let (size, blocks) = (from.size, from.blocks.clone());
        let marks = Marks::of_clone(self.order);
        self.replicas.insert(
            id,
            ModelReplica { size, blocks, layered: true, marks, ..ModelReplica::default() },
        );
        self.asked.insert(tag, Asked::Create(id));
        let mut spec = spec(id, size);
        spec.source = Some((ReplicaId(of), SnapshotId(snapshot)));
        self.sim.pool.create_replica(tag, spec, &mut self.sim.mem);
    }

    fn revert(&mut self, (of, snapshot): (u128, u128)) {
        let in_use = self.asked.values().any(|asked| match asked {
            Asked::Change { id, .. } | Asked::Read { id, .. } => *id == of,
            Asked::Snapshot(id, _) | Asked::Revert(id) => *id == of,
            Asked::Flush { .. } => true,
            _ => false,
        });
        let Some(replica) = self.replicas.get_mut(&of) else { return };
        let Some(slot) = replica.slot else { return };
        if in_use || replica.delete_asked {
            return;
        }
        let to = &self.snapshots[&(of, snapshot)];
        replica.reverting = Some((to.blocks.clone(), to.marks.clone()));
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Revert(of));
        self.sim.pool.revert(tag, slot, SnapshotId(snapshot), &mut self.sim.mem);
    }

    fn pick(&mut self) -> Option<(u128, ReplicaSlot)> {
        let live: Vec<_> = self
            .replicas
            .iter()
            .filter(|(_, r)| !r.delete_asked && r.reverting.is_none())
            .filter_map(|(id, r)| Some((*id, r.slot?)))
            .collect();
        if live.is_empty() { None } else { Some(live[self.sim.rng.index(live.len())]) }
    }

    fn delete(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        self.replicas.get_mut(&id).unwrap().delete_asked = true;
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Delete(id));
        self.sim.pool.delete_replica(tag, slot, &mut self.sim.mem);
    }

    fn register(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        self.order += 1;
        let value = self.order;
        self.replicas.get_mut(&id).unwrap().registers.push((value, false));
        let register = Register {
            promised_epoch: Epoch(value),
            accepted_epoch: Epoch(value),
            seq: value,
            // Over many sectors, so that it can be torn.
            config: value.to_le_bytes().repeat(200),
        };
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Register(id, value));
        self.sim.pool.write_register(tag, slot, register, &mut self.sim.mem);
    }

    fn flush(&mut self) {
        let Some((_, slot)) = self.pick() else { return };
        let mut covered = Vec::new();
        for (id, replica) in &self.replicas {
            for (lba, held) in &replica.blocks {
                let last = held.iter().rev().find(|h| h.certain).unwrap();
                covered.push((*id, *lba, last.order));
            }
        }
        let tag = self.sim.tag();
        self.asked.insert(tag, Asked::Flush { covered });
        let request =
            IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
        self.sim.pool.submit(tag, slot, request, &mut self.sim.mem);
    }

    /// Begins a round of settling, or ends it.
    fn settle_work(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        self.order += 1;
        let order = self.order;
        let rng = &mut self.sim.rng;
        let (ends, strays) = (rng.chance(60), rng.chance(10));
        let replica = self.replicas.get_mut(&id).unwrap();
        let (asked, tag) = (&self.asked, self.sim.tag());
        if ends && strays {
            self.asked.insert(tag, Asked::Settle(id, None));
            self.sim.pool.settle_end(
                tag,
                slot,
                RoundEnd { round: order, stamp: order, below: u32::MAX },
                &mut self.sim.mem,
            );
            return;
        }
        let ended =
            if ends { replica.marks.end(order, |tag| asked.contains_key(&tag)) } else { None };
        if let Some(ended) = ended {
            for (_, snapshot) in self.snapshots.iter_mut().filter(|((of, _), _)| *of == id) {
                snapshot.marks.settled(order);
            }
            if let Some((_, marks)) = &mut replica.reverting {
                marks.settled(order);
            }
            let round = ended.id;
            self.asked.insert(tag, Asked::Settle(id, Some(ended)));
            self.sim.pool.settle_end(
                tag,
                slot,
                RoundEnd { round, stamp: order, below: u32::MAX },
                &mut self.sim.mem,
            );
        } else if self.sim.pool.settle_begin(slot, order).is_ok() {
            let in_flight = self.asked.iter().filter_map(|(tag, asked)| match asked {
                Asked::Change { id: of, range, .. } if *of == id => Some((*tag, *range)),
                _ => None,
            });
            replica.marks.begin(order, order, in_flight);
        }
    }

    /// Holds what the pool tells of changes to what was promised.
    fn check_marks(&self) {
        for (&id, replica) in &self.replicas {
            if let (Some(slot), false, None) =
                (replica.slot, replica.delete_asked, &replica.reverting)
            {
                replica.marks.check(id, told(&self.sim.pool, slot));
            }
        }
    }

    fn io(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        let size = self.replicas[&id].size;
        let rng = &mut self.sim.rng;
        let extent = rng.below(self.extents);
        let (op, start, blocks) = match rng.below(10) {
            0 => (IoOp::Discard, extent * EXTENT_BLOCKS, EXTENT_BLOCKS * (1 + rng.below(3))),
            1 => {
                let (unmap, fua) = (rng.chance(50), rng.chance(30));
                let op = IoOp::WriteZeroes { unmap, fua };
                if rng.chance(50) {
                    (op, extent * EXTENT_BLOCKS, EXTENT_BLOCKS)
                } else {
                    (op, extent * EXTENT_BLOCKS + rng.below(4), 1 + rng.below(4))
                }
            }
            2 => (IoOp::Discard, extent * EXTENT_BLOCKS + rng.below(4), 1 + rng.below(4)),
            3..5 => (IoOp::Read, extent * EXTENT_BLOCKS + rng.below(4), 1 + rng.below(4)),
            // Sometimes over the edge of an extent.
            5 => (
                IoOp::Write { fua: rng.chance(20) },
                extent * EXTENT_BLOCKS + 254,
                1 + rng.below(4),
            ),
            _ => (
                IoOp::Write { fua: rng.chance(20) },
                extent * EXTENT_BLOCKS + rng.below(6),
                1 + rng.below(3),
            ),
        };
        self.io_at(id, slot, op, start, blocks.min(size.saturating_sub(start)));
    }

    /// A request, unless one that overlaps is under way. Whether there is one now.
    fn io_at(&mut self, id: u128, slot: ReplicaSlot, op: IoOp, start: u64, blocks: u64) -> bool {
        if blocks == 0 {
            return false;
        }
        let size = self.replicas[&id].size;
        let range = LbaRange::new(Lba(start), blocks).unwrap();
        if self.busy(id, range) {
            return false;
        }
        let payload = matches!(op, IoOp::Read | IoOp::Write { .. });
        let mut buf = None;
        if payload {
            let Some(b) = self.sim.mem.alloc(u32::try_from(blocks).unwrap() * 4096) else {
                return false;
            };
            buf = Some(b);
        }
        let slice = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        self.order += 1;
        let order = self.order;
        let tag = self.sim.tag();
        let replica = self.replicas.get_mut(&id).unwrap();
        match op {
            IoOp::Read => {
                self.asked.insert(tag, Asked::Read { id, range, buf: buf.take().unwrap() });
            }
            IoOp::Write { fua } => {
                let zeros = self.sim.rng.chance(10);
                let value = if zeros { 0 } else { (u64::try_from(id).unwrap() << 48) | order };
                let bytes = self.sim.mem.bytes_mut(slice);
                for word in bytes.chunks_mut(8) {
                    word.copy_from_slice(&value.to_le_bytes());
                }
                for lba in start..start + blocks {
                    replica.held(lba).push(Held { order, value, certain: false });
                }
                replica.marks.submitted(range, order);
                self.asked.insert(tag, Asked::Change { id, range, order, durable: fua, buf });
            }
            _ => {
                let durable = matches!(op, IoOp::WriteZeroes { fua: true, .. });
                for (lba, held) in replica.blocks.range_mut(start..start + blocks) {
                    assert!(*lba < size);
                    held.push(Held { order, value: 0, certain: false });
                }
                replica.marks.submitted(range, order);
                self.asked.insert(tag, Asked::Change { id, range, order, durable, buf: None });
            }
        }
        self.sim.pool.submit(tag, slot, IoRequest { op, range, buf: slice }, &mut self.sim.mem);
        true
    }

    pub(crate) fn collect(&mut self) {
        while let Some(done) = self.sim.pool.poll_done() {
            let asked = self.asked.remove(&done.tag).expect("answered once");
            self.answers += 1;
            self.answered(asked, &done);
        }
    }

    fn answered(&mut self, asked: Asked, done: &Done) {
        let ok = done.status.is_ok();
        match asked {
            Asked::Change { id, range, order, durable, buf } => {
                if let Some(buf) = buf {
                    self.sim.mem.release(buf);
                }
                let Some(replica) = self.replicas.get_mut(&id) else { return };
                assert!(
                    ok || done.status == IoStatus::NoSpace || replica.delete_asked,
                    "{:?}",
                    done.status
                );
                if !ok {
                    replica.marks.failed(order);
                    for (_, snapshot) in self.snapshots.iter_mut().filter(|((of, _), _)| *of == id)
                    {
                        snapshot.marks.failed(order);
                    }
                    return;
                }
                replica.marks.changed(range, done.tag);
                for (_, snapshot) in self.snapshots.iter_mut().filter(|((of, _), _)| *of == id) {
                    let in_it = |held: &Vec<Held>| held.iter().any(|h| h.order == order);
                    if snapshot.blocks.values().any(in_it) {
                        snapshot.marks.changed(range, done.tag);
                    }
                }
                let snapshots = self.snapshots.iter_mut().filter(|((of, _), _)| *of == id);
                let copies = snapshots.flat_map(|(_, s)| s.blocks.values_mut());
                for held in replica.blocks.values_mut().chain(copies) {
                    if let Some(at) = held.iter().position(|h| h.order == order) {
                        held[at].certain = true;
                        if durable {
                            held.drain(..at);
                        }
                    }
                }
            }
            Asked::Read { id, range, buf } => {
                let bytes = self.sim.mem.bytes(buf.slice()).to_vec();
                self.sim.mem.release(buf);
                let Some(replica) = self.replicas.get(&id) else { return };
                if ok {
                    for (lba, block) in (range.start().0..).zip(bytes.chunks(BLOCK)) {
                        verify(id, &replica.blocks, lba, block, Since::Kill);
                    }
                } else {
                    assert!(replica.delete_asked, "{:?}", done.status);
                }
            }
            Asked::Flush { covered } => {
                if !ok {
                    return;
                }
                for (id, lba, order) in covered {
                    let Some(replica) = self.replicas.get_mut(&id) else { continue };
                    let Some(held) = replica.blocks.get_mut(&lba) else { continue };
                    if let Some(at) = held.iter().position(|h| h.order == order) {
                        held.drain(..at);
                    }
                }
            }
            Asked::Snapshot(of, id) => {
                if !ok {
                    assert!(no_room(done), "{:?}", done.error);
                    self.snapshots.remove(&(of, id));
                    return;
                }
                let snapshot = self.snapshots.get_mut(&(of, id)).unwrap();
                snapshot.answered = true;
                for held in snapshot.blocks.values_mut() {
                    // What it was taken of was flushed with it.
                    let last = held.iter().rposition(|h| h.certain).unwrap();
                    held.drain(..last);
                }
            }
            Asked::Unsnapshot(of, id) => {
                assert!(ok, "{:?}", done.error);
                self.snapshots.remove(&(of, id));
            }
            Asked::Revert(id) => {
                let replica = self.replicas.get_mut(&id).unwrap();
                let back = replica.reverting.take().unwrap();
                if ok {
                    (replica.blocks, replica.marks) = back;
                } else {
                    assert!(no_room(done), "{:?}", done.error);
                }
            }
            Asked::Settle(id, ended) => {
                let Some(replica) = self.replicas.get(&id) else { return };
                assert!(ok || replica.delete_asked, "{:?}", done.status);
                let (Some(ended), Some(slot)) = (ended, replica.slot) else { return };
                if ok && !replica.delete_asked && !replica.layered {
                    replica.marks.check_ended(id, &ended, told(&self.sim.pool, slot));
                }
            }
            Asked::Create(id) => {
                if !ok {
                    assert!(no_room(done), "{:?}", done.error);
                    self.replicas.remove(&id);
                    return;
                }
                let slot = self.sim.pool.find(ReplicaId(id)).unwrap();
                self.replicas.get_mut(&id).unwrap().slot = Some(slot);
            }
            Asked::Delete(id) => {
                if !ok {
                    assert!(no_room(done), "{:?}", done.error);
                    self.replicas.get_mut(&id).unwrap().delete_asked = false;
                    return;
                }
                assert_eq!(self.sim.pool.find(ReplicaId(id)), None);
                self.replicas.remove(&id);
            }
            Asked::Register(id, value) => {
                let Some(replica) = self.replicas.get_mut(&id) else { return };
                assert!(ok || replica.delete_asked, "{:?}", done.error);
                if ok {
                    let at = replica.registers.iter().position(|r| r.0 == value).unwrap();
                    replica.registers.drain(..at);
                    replica.registers[0].1 = true;
                }
            }
            Asked::Other => assert!(ok, "{:?}", done.error),
        }
    }

    /// Crashes, opens again, and verifies all that was promised.
    pub(crate) fn crash(mut self, power: bool) -> Self {
        let rng = &mut self.sim.rng;
        let seed = rng.next();
        let empty = Disk::new(SparseDevice::new(0));
        let disk = core::mem::replace(&mut self.sim.disk, empty);
        let disk = if power { disk.cut(rng) } else { disk.kill(rng) };
        self.recover(disk, seed, power)
    }

    /// Opens what a crash left, and verifies all that was promised.
    pub(crate) fn recover(self, disk: Disk, seed: u64, power: bool) -> Self {
        // `flush` at open makes the survivors durable; a second cut in between is the next round's.
        let sim = Sim::open(disk, seed);
        let world = Self { sim, asked: BTreeMap::new(), ..self };
        world.recovered(power)
    }

    fn recovered(self, power: bool) -> Self {
        let mut world = self;
        let creating: Vec<u128> =
            world.replicas.iter().filter(|(_, r)| r.slot.is_none()).map(|(id, _)| *id).collect();
        for id in creating {
            if world.sim.pool.find(ReplicaId(id)).is_none() {
                world.replicas.remove(&id);
            }
        }
        let deleting: Vec<u128> =
            world.replicas.iter().filter(|(_, r)| r.delete_asked).map(|(id, _)| *id).collect();
        for id in deleting {
            if world.sim.pool.find(ReplicaId(id)).is_none() {
                world.replicas.remove(&id);
            } else {
                world.replicas.get_mut(&id).unwrap().delete_asked = false;
            }
        }
        let live: BTreeSet<u128> = world
            .sim
            .pool
            .replicas()
            .filter(|r| r.state == ReplicaState::Live)
            .map(|r| r.id.0)
            .collect();
        assert!(live.iter().copied().eq(world.replicas.keys().copied()), "replicas came or went");
        let mut gone = Vec::new();
        for (&(of, id), snapshot) in &mut world.snapshots {
            let there = world.sim.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).is_some();
            assert!(there || !snapshot.answered || snapshot.delete_asked, "a snapshot went");
            snapshot.delete_asked = false;
            if !there {
                gone.push((of, id));
            }
        }
        for key in gone {
            world.snapshots.remove(&key);
        }
        if world.sim.rng.chance(50) {
            world.go_on_unread();
        }
        world.verify_all(power);
        world
    }

    /// Changes some of what the crash left before any of it is read: extents whose checksums nobody has looked at yet
    /// are written to in part, and given back.
    fn go_on_unread(&mut self) {
        for (&id, replica) in &mut self.replicas {
            replica.slot = self.sim.pool.find(ReplicaId(id));
            replica.marks.crashed(self.order);
        }
        for snapshot in self.snapshots.values_mut() {
            snapshot.marks.crashed(self.order);
        }
        for _ in 0..self.sim.rng.below(60) {
            let first = self.sim.rng.below(self.extents) * EXTENT_BLOCKS;
            match self.sim.rng.below(10) {
                0..4 => {
                    self.sim.step();
                }
                4 if self.sim.rng.chance(20) => self.delete(),
                of => {
                    let Some((id, slot)) = self.pick() else { break };
                    let left = self.replicas[&id].size.saturating_sub(first);
                    let (op, blocks) = match of {
                        4..6 => (IoOp::Discard, EXTENT_BLOCKS),
                        _ => (IoOp::Write { fua: false }, 1 + self.sim.rng.below(3)),
                    };
                    self.io_at(id, slot, op, first, blocks.min(left));
                }
            }
            self.collect();
        }
        self.end_all();
        // What is read next is taken to be durable.
        if let Some((_, slot)) = self.pick() {
            let tag = self.sim.tag();
            self.asked.insert(tag, Asked::Other);
            let request =
                IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
            self.sim.pool.submit(tag, slot, request, &mut self.sim.mem);
            self.end_all();
        }
    }

    fn end_all(&mut self) {
        for done in self.sim.settle() {
            let asked = self.asked.remove(&done.tag).expect("answered once");
            self.answered(asked, &done);
        }
    }

    /// Reads everything. What is read becomes what is held.
    pub(crate) fn verify_all(&mut self, power: bool) {
        let ids: Vec<u128> = self.replicas.keys().copied().collect();
        let mut again = false;
        for id in ids {
            let mut went_back = None;
            let slot = self.sim.pool.find(ReplicaId(id)).unwrap();
            let register = self.sim.pool.register(slot).unwrap();
            assert!(register.config.chunks(8).all(|c| c == register.seq.to_le_bytes()));
            let register = register.seq;
            let replica = self.replicas.get_mut(&id).unwrap();
            replica.slot = Some(slot);
            let allowed = &mut replica.registers;
            let known = allowed.iter().any(|r| r.0 == register)
                || (register == 0 && allowed.iter().all(|r| !r.1));
            assert!(known, "register {register} of {id}, not one of {allowed:?}");
            *allowed = vec![(register, true)];
            let size = replica.size;
            for start in (0..size).step_by(256) {
                let blocks = self.looked_at.min(size - start);
                let bytes = self.sim.read(slot, start, blocks);
                let replica = self.replicas.get_mut(&id).unwrap();
                if let Some((back, _)) = &replica.reverting {
                    let since = Since::crash(power, replica.layered);
                    let was = holds(&replica.blocks, start, &bytes, since);
                    let is = holds(back, start, &bytes, since);
                    went_back = match (was, is) {
                        (true, true) => went_back,
                        (true, false) if went_back != Some(true) => Some(false),
                        (false, true) if went_back != Some(false) => Some(true),
                        _ => panic!("replica {id} is neither what it was nor its snapshot"),
                    };
                    continue;
                }
                for (lba, block) in (start..).zip(bytes.chunks(BLOCK)) {
                    verify(id, &replica.blocks, lba, block, Since::crash(power, replica.layered));
                    replica.marks.read(&replica.blocks, lba, block);
                    settle_block(&mut replica.blocks, lba, block);
                }
            }
            let replica = self.replicas.get_mut(&id).unwrap();
            if let Some(back) = replica.reverting.take() {
                match went_back {
                    Some(true) => (replica.blocks, replica.marks) = back,
                    Some(false) => {}
                    // It may be either.
                    None => replica.marks.forget(),
                }
                again = true;
            }
        }
        if again {
            return self.verify_all(power);
        }
        for replica in self.replicas.values_mut() {
            replica.marks.crashed(self.order);
        }
        for snapshot in self.snapshots.values_mut() {
            snapshot.marks.crashed(self.order);
        }
        self.check_marks();
        for (&(of, id), snapshot) in &mut self.snapshots {
            if snapshot.delete_asked {
                continue;
            }
            let slot = self.sim.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap();
            for start in (0..snapshot.size).step_by(256) {
                let bytes = self.sim.read(slot, start, self.looked_at.min(snapshot.size - start));
                for (lba, block) in (start..).zip(bytes.chunks(BLOCK)) {
                    let since = Since::crash(power && !snapshot.answered, snapshot.layered);
                    verify(id, &snapshot.blocks, lba, block, since);
                    settle_block(&mut snapshot.blocks, lba, block);
                }
            }
            snapshot.answered = true;
        }
    }

    /// Lets everything end. All space that no replica holds must be free again.
    pub(crate) fn settle(&mut self) {
        self.end_all();
        assert!(self.asked.is_empty(), "{} requests are never answered", self.asked.len());
        assert!(self.sim.pool.is_idle());
        assert_eq!(self.sim.pool.state(), PoolState::Online);
        assert_eq!(self.sim.mem.in_use(), 0, "buffers leaked");
        self.sim.pool.check();
        let usage = self.sim.pool.usage();
        assert_eq!(usage.extents_free + usage.extents_allocated, usage.extents_total);
    }
}

/// What the pool says of a logical extent's changes since a stamp.
fn told(pool: &Pool, slot: ReplicaSlot) -> impl Fn(u32, u64) -> u8 {
    move |extent, since| {
        let mut byte = [0xff];
        pool.changes(slot, extent, since, &mut byte).map_or(0, |_| byte[0])
    }
}

/// Refused, with no effect: no slot is free, or another command is under way.
fn no_room(done: &Done) -> bool {
    use cairn_replica::ControlError;
    matches!(
        done.error,
        Some(
            ControlError::NoFreeSlot(_)
                | ControlError::SnapshotUnderWay
                | ControlError::NoSuchSnapshot(_)
                | ControlError::NoSuchReplica(_)
        )
    )
}
