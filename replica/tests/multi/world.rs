//! A model of what replicas must hold, beside a pool of several devices that is worked at random.

use std::collections::{BTreeMap, BTreeSet};

use cairn_block::{
    Buf, BufSlice, Epoch, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId, SnapshotId,
};
use cairn_replica::disk::MemberState;
use cairn_replica::{
    ControlError, Done, MultiPool, Pool, PoolState, Register, ReplicaSlot, ReplicaState, RoundEnd,
    SnapshotSpec,
};

use crate::common::marks::{Ended, Marks};
use crate::common::model::{Blocks, Held, Since, holds, settle_block, verify};
use crate::common::{BLOCK, Disk, EXTENT_BLOCKS, MIB, Rng, spec};
use crate::set::{Seen, Set, formatted};

#[derive(Default)]
struct ModelReplica {
    blocks: Blocks,
    size: u64,
    slot: Option<ReplicaSlot>,
    registers: Vec<(u64, bool)>,
    delete_asked: bool,
    /// It has all of its room.
    thick: bool,
    /// It is a clone, or a snapshot of it was asked for.
    layered: bool,
    /// What it holds if it was taken back to a snapshot, which is not answered.
    reverting: Option<(Blocks, Marks)>,
    marks: Marks,
}

/// A snapshot: of which replica, and what it must hold.
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
    Add,
    Remove,
    Other,
}

/// Random requests on random replicas, and what must be read afterwards.
pub(crate) struct World {
    pub(crate) set: Set,
    replicas: BTreeMap<u128, ModelReplica>,
    snapshots: BTreeMap<(u128, u128), ModelSnapshot>,
    /// Snapshots are taken.
    pub(crate) layers: bool,
    asked: BTreeMap<u64, Asked>,
    next_id: u128,
    order: u64,
    next_device: u128,
    /// Devices may die.
    pub(crate) deaths: bool,
    /// One did: what it held may be errors, and nothing else.
    died: bool,
    /// A device was to be removed: what it had was copied elsewhere, and is open there.
    drained: bool,
    total: Seen,
}

const REPLICA_EXTENTS: u64 = 6;

impl World {
    pub(crate) fn new(lens: &[u64], seed: u64) -> Self {
        Self {
            set: Set::open(formatted(lens), seed, &[]).unwrap(),
            replicas: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            layers: false,
            asked: BTreeMap::new(),
            next_id: 1,
            order: 0,
            next_device: 100,
            deaths: false,
            died: false,
            drained: false,
            total: Seen::default(),
        }
    }

    pub(crate) fn seen(&self) -> Seen {
        let mut seen = self.total;
        seen.add(&self.set.seen);
        seen
    }

    /// Adds a device, or begins to remove one; or lets one die.
    fn change_devices(&mut self) {
        let members = self.set.pool.members();
        let live: Vec<_> =
            members.iter().filter(|m| m.state == MemberState::Live && m.number.is_some()).collect();
        let joining = members.iter().any(|m| m.state == MemberState::Joining);
        match self.set.rng.below(if self.deaths { 12 } else { 8 }) {
            0..3 if live.len() < 4 && !joining => {
                if self.set.pool.state() != PoolState::Online {
                    return;
                }
                self.next_device += 1;
                let len = (8 + self.set.rng.below(16)) * MIB;
                let tag = self.set.add(self.next_device, len);
                self.asked.insert(tag, Asked::Add);
            }
            3..=7 if live.len() > 1 => {
                let id = live[self.set.rng.index(live.len())].id;
                self.drained = true;
                let tag = self.set.remove(id.0);
                self.asked.insert(tag, Asked::Remove);
            }
            8.. if live.len() > 1 && !self.died => {
                let number = live[self.set.rng.index(live.len())].number.unwrap();
                let disk = self.set.disks[usize::from(number)].as_mut().unwrap();
                if self.set.rng.chance(50) {
                    disk.fail_flush = true;
                } else {
                    disk.fail_write = true;
                }
                self.died = true;
            }
            _ => {}
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
        match self.set.rng.below(100) {
            0..45 => {
                self.set.step();
            }
            45..48 if self.replicas.len() < 4 => self.create(),
            48 => self.delete(),
            49..52 => self.register(),
            52..55 => {
                let tag = self.set.tag();
                self.asked.insert(tag, Asked::Other);
                self.set.pool.checkpoint(tag, &mut self.set.mem);
            }
            55..60 => self.flush(),
            60..62 => self.change_devices(),
            62 => self.set.pool.retry(&mut self.set.mem),
            63..67 if self.layers => self.snapshot_work(),
            67..70 => self.settle_work(),
            _ => self.io(),
        }
        if self.set.check {
            self.set.pool.check();
            self.check_marks();
        }
        self.collect();
    }

    fn create(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let size = REPLICA_EXTENTS * EXTENT_BLOCKS - self.set.rng.below(3);
        let tag = self.set.tag();
        let thick = self.set.rng.chance(25);
        self.replicas.insert(id, ModelReplica { size, thick, ..ModelReplica::default() });
        self.asked.insert(tag, Asked::Create(id));
        let mut spec = spec(id, size);
        spec.thick = thick;
        self.set.pool.create_replica(tag, spec, &mut self.set.mem);
    }

    fn snapshot_work(&mut self) {
        let known: Vec<(u128, u128)> = self
            .snapshots
            .iter()
            .filter(|(_, s)| s.answered && !s.delete_asked)
            .map(|(key, _)| *key)
            .collect();
        let one = known.get(self.set.rng.index(known.len().max(1))).copied();
        match (self.set.rng.below(6), one) {
            (0, Some((of, id))) => {
                let slot = self.set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap();
                self.snapshots.get_mut(&(of, id)).unwrap().delete_asked = true;
                let tag = self.set.tag();
                self.asked.insert(tag, Asked::Unsnapshot(of, id));
                self.set.pool.delete_snapshot(tag, slot, &mut self.set.mem);
            }
            (1, Some(from)) if self.replicas.len() < 4 => self.clone_of(from),
            (2, Some(to)) => self.revert(to),
            _ if self.snapshots.len() < 5 => self.take(),
            _ => {}
        }
    }

    fn take(&mut self) {
        let Some((of, slot)) = self.pick() else { return };
        let id = self.next_id;
        self.next_id += 1;
        let tag = self.set.tag();
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
        self.set.pool.create_snapshot(tag, slot, spec, &mut self.set.mem);
    }

    fn clone_of(&mut self, (of, snapshot): (u128, u128)) {
        let id = self.next_id;
        self.next_id += 1;
        let tag = self.set.tag();
        let from = &self.snapshots[&(of, snapshot)];
        let (size, blocks) = (from.size, from.blocks.clone());
        let marks = Marks::of_clone(self.order);
        let thick = self.set.rng.chance(25);
        self.replicas.insert(
            id,
            ModelReplica { size, blocks, thick, layered: true, marks, ..ModelReplica::default() },
        );
        self.asked.insert(tag, Asked::Create(id));
        let mut spec = spec(id, size);
        spec.source = Some((ReplicaId(of), SnapshotId(snapshot)));
        spec.thick = thick;
        self.set.pool.create_replica(tag, spec, &mut self.set.mem);
    }

    /// Goes back to a snapshot, and is cut off soon.
    pub(crate) fn revert_some(&mut self) {
        let known: Vec<(u128, u128)> = self
            .snapshots
            .iter()
            .filter(|((of, _), s)| s.answered && !s.delete_asked && self.replicas.contains_key(of))
            .map(|(key, _)| *key)
            .collect();
        if known.is_empty() {
            return;
        }
        let (of, id) = known[self.set.rng.index(known.len())];
        for _ in 0..2000 {
            if !self.in_use(of) || !self.set.step() {
                break;
            }
            self.collect();
        }
        if self.snapshots.contains_key(&(of, id)) {
            self.revert((of, id));
        }
        for _ in 0..self.set.rng.below(80) {
            self.set.step();
            self.collect();
        }
    }

    /// Begins to remove a device, is at work meanwhile, and is cut off soon.
    pub(crate) fn drain_some(&mut self) {
        let members = self.set.pool.members();
        let live: Vec<_> =
            members.iter().filter(|m| m.state == MemberState::Live && m.number.is_some()).collect();
        if live.len() < 2 || self.set.pool.state() != PoolState::Online {
            return;
        }
        let id = live[self.set.rng.index(live.len())].id;
        self.drained = true;
        let tag = self.set.remove(id.0);
        self.asked.insert(tag, Asked::Remove);
        // Now and then it is cut off between two steps of a move that follow each other closely.
        let aims = self.layers && self.set.rng.chance(15);
        for step in 0..self.set.rng.below(600) {
            self.set.step();
            self.collect();
            if aims && step % 4 == 0 && doubles(&self.set).1 > 0 {
                return;
            }
            match self.set.rng.below(60) {
                0 if self.layers => self.snapshot_work(),
                1..4 => self.io(),
                _ => {}
            }
        }
    }

    fn in_use(&self, of: u128) -> bool {
        self.asked.values().any(|asked| match asked {
            Asked::Change { id, .. } | Asked::Read { id, .. } => *id == of,
            Asked::Snapshot(id, _) | Asked::Revert(id) => *id == of,
            Asked::Flush { .. } => true,
            _ => false,
        })
    }

    fn revert(&mut self, (of, snapshot): (u128, u128)) {
        let in_use = self.in_use(of);
        let Some(replica) = self.replicas.get_mut(&of) else { return };
        let Some(slot) = replica.slot else { return };
        if in_use || replica.delete_asked {
            return;
        }
        let to = &self.snapshots[&(of, snapshot)];
        replica.reverting = Some((to.blocks.clone(), to.marks.clone()));
        let tag = self.set.tag();
        self.asked.insert(tag, Asked::Revert(of));
        self.set.pool.revert(tag, slot, SnapshotId(snapshot), &mut self.set.mem);
    }

    fn pick(&mut self) -> Option<(u128, ReplicaSlot)> {
        let live: Vec<_> = self
            .replicas
            .iter()
            .filter(|(_, r)| !r.delete_asked && r.reverting.is_none())
            .filter_map(|(id, r)| Some((*id, r.slot?)))
            .collect();
        if live.is_empty() { None } else { Some(live[self.set.rng.index(live.len())]) }
    }

    fn delete(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        self.replicas.get_mut(&id).unwrap().delete_asked = true;
        let tag = self.set.tag();
        self.asked.insert(tag, Asked::Delete(id));
        self.set.pool.delete_replica(tag, slot, &mut self.set.mem);
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
        let tag = self.set.tag();
        self.asked.insert(tag, Asked::Register(id, value));
        self.set.pool.write_register(tag, slot, register, &mut self.set.mem);
    }

    fn flush(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        let mut covered = Vec::new();
        for (lba, held) in &self.replicas[&id].blocks {
            let last = held.iter().rev().find(|h| h.certain).unwrap();
            covered.push((id, *lba, last.order));
        }
        let tag = self.set.tag();
        self.asked.insert(tag, Asked::Flush { covered });
        let request =
            IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
        self.set.pool.submit(tag, slot, request, &mut self.set.mem);
    }

    /// Begins a round of settling, or ends it.
    fn settle_work(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        self.order += 1;
        let order = self.order;
        let rng = &mut self.set.rng;
        let (ends, strays) = (rng.chance(60), rng.chance(10));
        let replica = self.replicas.get_mut(&id).unwrap();
        let (asked, tag) = (&self.asked, self.set.tag());
        if ends && strays {
            self.asked.insert(tag, Asked::Settle(id, None));
            self.set.pool.settle_end(
                tag,
                slot,
                RoundEnd { round: order, stamp: order, below: u32::MAX },
                &mut self.set.mem,
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
            self.set.pool.settle_end(
                tag,
                slot,
                RoundEnd { round, stamp: order, below: u32::MAX },
                &mut self.set.mem,
            );
        } else if self.set.pool.settle_begin(slot, order).is_ok() {
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
                replica.marks.check(id, told(&self.set.pool, slot));
            }
        }
    }

    fn io(&mut self) {
        let Some((id, slot)) = self.pick() else { return };
        let size = self.replicas[&id].size;
        let rng = &mut self.set.rng;
        let extent = rng.below(REPLICA_EXTENTS);
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
        let blocks = blocks.min(size.saturating_sub(start));
        if blocks == 0 {
            return;
        }
        let range = LbaRange::new(Lba(start), blocks).unwrap();
        if self.busy(id, range) {
            return;
        }
        let payload = matches!(op, IoOp::Read | IoOp::Write { .. });
        let mut buf = None;
        if payload {
            let Some(b) = self.set.mem.alloc(u32::try_from(blocks).unwrap() * 4096) else {
                return;
            };
            buf = Some(b);
        }
        let slice = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        self.order += 1;
        let order = self.order;
        let tag = self.set.tag();
        let replica = self.replicas.get_mut(&id).unwrap();
        match op {
            IoOp::Read => {
                self.asked.insert(tag, Asked::Read { id, range, buf: buf.take().unwrap() });
            }
            IoOp::Write { fua } => {
                let zeros = self.set.rng.chance(10);
                let value = if zeros { 0 } else { (u64::try_from(id).unwrap() << 48) | order };
                let bytes = self.set.mem.bytes_mut(slice);
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
        self.set.pool.submit(tag, slot, IoRequest { op, range, buf: slice }, &mut self.set.mem);
    }

    pub(crate) fn collect(&mut self) {
        while let Some(done) = self.set.pool.poll_done() {
            let asked = self.asked.remove(&done.tag).expect("answered once");
            self.answered(asked, &done);
        }
    }

    fn answered(&mut self, asked: Asked, done: &Done) {
        let ok = done.status.is_ok();
        match asked {
            Asked::Change { id, range, order, durable, buf } => {
                if let Some(buf) = buf {
                    self.set.mem.release(buf);
                }
                let Some(replica) = self.replicas.get_mut(&id) else { return };
                assert!(
                    ok || done.status == IoStatus::NoSpace || replica.delete_asked || self.died,
                    "{:?}",
                    done.status
                );
                if !ok {
                    let kept = replica.thick && !replica.delete_asked && !self.died;
                    assert!(
                        !kept,
                        "no room for what is kept for {id}: {range:?} {:?}",
                        self.set.pool.members()
                    );
                    self.set.seen.no_space += 1;
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
                let bytes = self.set.mem.bytes(buf.slice()).to_vec();
                self.set.mem.release(buf);
                let Some(replica) = self.replicas.get(&id) else { return };
                if ok {
                    for (lba, block) in (range.start().0..).zip(bytes.chunks(BLOCK)) {
                        verify(id, &replica.blocks, lba, block, Since::Kill);
                    }
                    self.set.seen.good_reads += 1;
                } else {
                    assert!(replica.delete_asked || self.died, "{:?}", done.status);
                    self.set.seen.lost_reads += 1;
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
            Asked::Snapshot(of, id) if !ok => {
                assert!(self.died || no_room(done), "{:?}", done.error);
                if !self.died {
                    self.snapshots.remove(&(of, id));
                }
            }
            Asked::Snapshot(of, id) => {
                self.set.seen.snapshots += 1;
                let snapshot = self.snapshots.get_mut(&(of, id)).unwrap();
                snapshot.answered = true;
                for held in snapshot.blocks.values_mut() {
                    // What it was taken of was flushed with it.
                    let last = held.iter().rposition(|h| h.certain).unwrap();
                    held.drain(..last);
                }
            }
            Asked::Unsnapshot(of, id) => {
                assert!(ok || self.died, "{:?}", done.error);
                if ok {
                    self.snapshots.remove(&(of, id));
                }
            }
            Asked::Revert(id) => {
                let Some(replica) = self.replicas.get_mut(&id) else { return };
                assert!(ok || self.died || no_room(done), "{:?}", done.error);
                // Where a device died it may have gone back or not: the next open tells.
                if ok || !self.died {
                    let back = replica.reverting.take().unwrap();
                    if ok {
                        (replica.blocks, replica.marks) = back;
                        self.set.seen.reverts += 1;
                    }
                }
            }
            Asked::Settle(id, ended) => {
                let Some(replica) = self.replicas.get(&id) else { return };
                assert!(ok || replica.delete_asked || self.died, "{:?}", done.status);
                let (Some(ended), Some(slot)) = (ended, replica.slot) else { return };
                if ok && !replica.delete_asked && !replica.layered && !self.died && !self.drained {
                    replica.marks.check_ended(id, &ended, told(&self.set.pool, slot));
                }
            }
            Asked::Create(id) if !ok => {
                assert!(self.died || no_room(done), "{:?}", done.error);
                if self.died {
                    self.replicas.get_mut(&id).unwrap().slot = None;
                } else {
                    self.replicas.remove(&id);
                }
            }
            Asked::Create(id) => {
                let slot = self.set.pool.find(ReplicaId(id)).unwrap();
                self.replicas.get_mut(&id).unwrap().slot = Some(slot);
            }
            Asked::Delete(id) if !ok => {
                assert!(self.died || no_room(done), "{:?}", done.error);
                if !self.died {
                    self.replicas.get_mut(&id).unwrap().delete_asked = false;
                }
            }
            Asked::Delete(id) => {
                assert_eq!(self.set.pool.find(ReplicaId(id)), None);
                self.replicas.remove(&id);
            }
            Asked::Register(id, value) => {
                let Some(replica) = self.replicas.get_mut(&id) else { return };
                assert!(ok || replica.delete_asked || self.died, "{:?}", done.error);
                if ok {
                    let at = replica.registers.iter().position(|r| r.0 == value).unwrap();
                    replica.registers.drain(..at);
                    replica.registers[0].1 = true;
                }
            }
            Asked::Add => {
                assert!(ok || self.died, "{:?}", done.error);
                self.set.seen.adds += u64::from(ok);
            }
            // Where space is short, or it is the last.
            Asked::Remove => {}
            Asked::Other => assert!(ok || self.died, "{:?}", done.error),
        }
    }

    /// Crashes, opens again, and verifies all that was promised.
    pub(crate) fn crash(mut self, power: bool) -> Self {
        let seed = self.set.rng.next();
        self.total.add(&self.set.seen);
        let failed = self.set.pool.members().iter().any(|m| m.state == MemberState::Failed);
        self.total.failed += u64::from(failed && self.died);
        let (mut disks, _) = self.set.cut(power);
        for disk in &mut disks {
            (disk.fail_flush, disk.fail_write) = (false, false);
        }
        // `flush` at open makes the survivors durable; a second cut in between is the next round's.
        let mut set = Set::open(disks, seed, &[]).unwrap();
        set.rng = Rng(seed);
        let (doubles, families) = doubles(&set);
        set.seen.doubles += doubles;
        set.seen.families += families;
        let mut world = Self { set, asked: BTreeMap::new(), ..self };
        let creating: Vec<u128> =
            world.replicas.iter().filter(|(_, r)| r.slot.is_none()).map(|(id, _)| *id).collect();
        for id in creating {
            if world.set.pool.find(ReplicaId(id)).is_none() {
                world.replicas.remove(&id);
            }
        }
        let deleting: Vec<u128> =
            world.replicas.iter().filter(|(_, r)| r.delete_asked).map(|(id, _)| *id).collect();
        for id in deleting {
            if world.set.pool.find(ReplicaId(id)).is_none() {
                world.replicas.remove(&id);
            } else {
                world.replicas.get_mut(&id).unwrap().delete_asked = false;
            }
        }
        let live: BTreeSet<u128> = world
            .set
            .pool
            .replicas()
            .filter(|r| r.state == ReplicaState::Live)
            .map(|r| r.id.0)
            .collect();
        assert!(live.iter().copied().eq(world.replicas.keys().copied()), "replicas came or went");
        let mut gone = Vec::new();
        for (&(of, id), snapshot) in &mut world.snapshots {
            let there = world.set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).is_some();
            assert!(there || !snapshot.answered || snapshot.delete_asked, "a snapshot went");
            snapshot.delete_asked = false;
            if !there {
                gone.push((of, id));
            }
        }
        for key in gone {
            world.snapshots.remove(&key);
        }
        world.verify_all(power);
        world
    }

    /// Reads everything. What is read becomes what is held.
    pub(crate) fn verify_all(&mut self, power: bool) {
        let ids: Vec<u128> = self.replicas.keys().copied().collect();
        let mut again = false;
        for id in ids {
            let mut went_back = None;
            let slot = self.set.pool.find(ReplicaId(id)).unwrap();
            let register = self.set.pool.register(slot).unwrap();
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
                let blocks = EXTENT_BLOCKS.min(size - start);
                let bytes = self.read(slot, start, blocks);
                let replica = self.replicas.get_mut(&id).unwrap();
                if let Some((back, _)) = &replica.reverting {
                    let Some(bytes) = bytes else { continue };
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
                let Some(bytes) = bytes else {
                    // Lost: nothing is known of it until it is written.
                    for held in replica.blocks.range_mut(start..start + blocks) {
                        for h in held.1.iter_mut() {
                            h.certain = false;
                        }
                        held.1[0].certain = true;
                    }
                    continue;
                };
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
        let snapshots: Vec<(u128, u128)> = self.snapshots.keys().copied().collect();
        for (of, id) in snapshots {
            if self.snapshots[&(of, id)].delete_asked {
                continue;
            }
            let slot = self.set.pool.find_snapshot(ReplicaId(of), SnapshotId(id)).unwrap();
            let size = self.snapshots[&(of, id)].size;
            for start in (0..size).step_by(256) {
                let bytes = self.read(slot, start, EXTENT_BLOCKS.min(size - start));
                let snapshot = self.snapshots.get_mut(&(of, id)).unwrap();
                let Some(bytes) = bytes else { continue };
                for (lba, block) in (start..).zip(bytes.chunks(BLOCK)) {
                    let since = Since::crash(power && !snapshot.answered, snapshot.layered);
                    verify(id, &snapshot.blocks, lba, block, since);
                    settle_block(&mut snapshot.blocks, lba, block);
                }
            }
            self.snapshots.get_mut(&(of, id)).unwrap().answered = true;
        }
    }

    /// What is read; nothing where a device that died had it.
    fn read(&mut self, slot: ReplicaSlot, lba: u64, blocks: u64) -> Option<Vec<u8>> {
        let buf = self.set.mem.alloc(u32::try_from(blocks).unwrap() * 4096).unwrap();
        let tag = self.set.tag();
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
        self.set.pool.submit(tag, slot, request, &mut self.set.mem);
        // Not until all is settled: what comes next is to meet a drain that is still going on.
        let status = loop {
            if let Some(done) = self.set.pool.poll_done() {
                if done.tag == tag {
                    break done.status;
                }
                let asked = self.asked.remove(&done.tag).expect("answered once");
                self.answered(asked, &done);
            } else if !self.set.step() {
                self.set.pool.retry(&mut self.set.mem);
            }
        };
        let bytes = self.set.mem.bytes(buf.slice()).to_vec();
        self.set.mem.release(buf);
        assert!(status.is_ok() || (self.died && status == IoStatus::MediaError), "{status:?}");
        self.set.seen.lost_reads += u64::from(!status.is_ok());
        self.set.seen.good_reads += u64::from(status.is_ok());
        status.is_ok().then_some(bytes)
    }

    /// Lets everything end. All space that no replica holds must be free again.
    pub(crate) fn settle(&mut self) {
        for done in self.set.settle() {
            let asked = self.asked.remove(&done.tag).expect("answered once");
            self.answered(asked, &done);
        }
        assert!(self.asked.is_empty(), "{} requests are never answered", self.asked.len());
        assert_eq!(self.set.pool.state(), PoolState::Online);
        assert!(self.set.pool.is_idle(), "{:?}", self.set.pool.members());
        assert_eq!(self.set.mem.in_use(), 0, "buffers leaked");
        self.set.pool.check();
        let usage = self.set.pool.usage();
        let draining = self.set.pool.members().iter().any(|m| m.drain.is_some());
        if !draining {
            assert_eq!(usage.extents_free + usage.extents_allocated, usage.extents_total);
        }
        let thick = self.set.pool.replicas().filter(|r| r.thick);
        let kept: u64 = thick.map(|r| r.blocks.div_ceil(EXTENT_BLOCKS) - r.allocated_extents).sum();
        if !self.died {
            // What could not be moved yet is kept twice.
            assert!(
                usage.extents_reserved == kept || draining,
                "{} for {kept}",
                usage.extents_reserved
            );
            assert!(usage.extents_reserved >= kept, "{} for {kept}", usage.extents_reserved);
        }
    }
}

/// What the pool says of a logical extent's changes since a stamp.
fn told(pool: &MultiPool, slot: ReplicaSlot) -> impl Fn(u32, u64) -> u8 {
    move |extent, since| {
        let mut byte = [0xff];
        pool.changes(slot, extent, since, &mut byte).map_or(0, |_| byte[0])
    }
}

/// Refused, with no effect: no slot is free, a device is being removed, or a command before it took away
/// what it is about.
fn no_room(done: &Done) -> bool {
    matches!(
        done.error,
        Some(
            ControlError::NoFreeSlot(_)
                | ControlError::NoRoom { .. }
                | ControlError::SnapshotUnderWay
                | ControlError::NoSuchSnapshot(_)
                | ControlError::NoSuchReplica(_)
                | ControlError::Device(_)
        )
    )
}

/// Extents that a crash left on two devices, of replicas and of snapshots.
fn doubles(set: &Set) -> (u64, u64) {
    if !set.pool.members().iter().any(|m| m.drain.is_some()) {
        return (0, 0);
    }
    let pools: Vec<Pool> = set
        .disks
        .iter()
        .flatten()
        // One that is being added, or has left, is not to be opened.
        .filter_map(|disk| Pool::open(&mut Disk::new(disk.now.clone())).ok())
        .collect();
    let count = |slot: ReplicaSlot| -> u64 {
        let held = |logical| pools.iter().filter(|p| p.maps(slot, logical)).count();
        (0..8).map(|logical| u64::from(held(logical) > 1)).sum()
    };
    let doubles = set.pool.replicas().map(|r| count(r.slot)).sum();
    (doubles, set.pool.snapshots().map(|s| count(s.slot)).sum())
}
