//! The nexus against children that are played by hand.

use std::collections::VecDeque;

use cairn_block::{
    Buf, BufSlice, Epoch, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId,
    VolumeId,
};

use super::*;
use crate::slots::ChildSet;

mod force;
mod lease;
mod mend;
mod rebuild;
mod reconfigure;
mod standby;
mod voters;

const DEADLINE: u64 = 1000;
const WAIT: u64 = 500;
/// A mark of the bench's replicas: open since before the round that runs.
const CANDIDATE: u8 = 0x80;
const LEASE: u64 = 300;

/// A nexus and its children: registers that obey the rules, I/O that the test answers itself.
struct Bench {
    nexus: Nexus,
    registers: Vec<Register>,
    up: Vec<bool>,
    io: VecDeque<ChildIo>,
    /// Register operations are kept for the test to answer, instead of by the rules at once.
    hold_registers: bool,
    held: VecDeque<ChildIo>,
    /// Replicas whose register cannot be written.
    broken: Vec<bool>,
    done: Vec<Done>,
    released: Vec<u64>,
    events: Vec<Event>,
    now: u64,
    mem: HeapMemory,
    reserve: Option<Buf>,
    /// What each replica tells of its extents, and what the nexus asked on its own account.
    extents: Vec<Vec<u8>>,
    stamps: Vec<Vec<u64>>,
    asked: Vec<ChildIo>,
    /// Children whose lists of extents are late, and one that cannot tell of its own.
    late_lists: ChildSet,
    late: Vec<ChildIo>,
    no_list: Option<u8>,
}

fn config(n: u8, purpose: Purpose) -> NexusConfig {
    NexusConfig {
        volume: VolumeId(99),
        blocks: 1000,
        block_size: 0,
        encryption: None,
        children: (0..n)
            .map(|i| ChildSpec {
                replica: ReplicaId(u128::from(i) + 1),
                local: false,
                witness: false,
                place: Place::default(),
            })
            .collect(),
        purpose,
        child_deadline_ms: DEADLINE,
        child_deadline_min_ms: DEADLINE,
        lease_ms: LEASE,
        shared: false,
        holder: 0,
        assembly_wait_ms: WAIT,
        max_requests: 16,
        pace: Pace { rebuild: false, ..Pace::default() },
    }
}

impl Bench {
    fn new(n: u8, purpose: Purpose, registers: Vec<Register>) -> Self {
        Self {
            nexus: Nexus::new(config(n, purpose)),
            registers,
            up: vec![false; usize::from(n)],
            io: VecDeque::new(),
            hold_registers: false,
            held: VecDeque::new(),
            broken: vec![false; usize::from(n)],
            done: Vec::new(),
            released: Vec::new(),
            events: Vec::new(),
            now: 0,
            mem: HeapMemory::new(2 << 20),
            reserve: None,
            extents: vec![Vec::new(); usize::from(n)],
            stamps: vec![Vec::new(); usize::from(n)],
            asked: Vec::new(),
            late_lists: ChildSet::EMPTY,
            late: Vec::new(),
            no_list: None,
        }
    }

    /// A new volume with every replica there.
    fn online(n: u8) -> Self {
        let mut b = Self::new(n, Purpose::Create, vec![Register::default(); usize::from(n)]);
        (0..n).for_each(|i| b.connect(i));
        assert_eq!(*b.nexus.state(), VolumeState::Online);
        b
    }

    /// The same replicas under a new nexus.
    fn restarted(self) -> Self {
        let n = u8::try_from(self.up.len()).unwrap();
        Self::new(n, Purpose::Assemble, self.registers)
    }

    fn connect(&mut self, child: u8) {
        self.up[usize::from(child)] = true;
        self.nexus.handle_child_up(ChildId(child), self.now);
        self.pump();
    }

    fn disconnect(&mut self, child: u8) {
        self.up[usize::from(child)] = false;
        let lost: Vec<ChildIo> =
            self.io.iter().filter(|i| i.child == ChildId(child)).cloned().collect();
        self.io.retain(|i| i.child != ChildId(child));
        for io in lost {
            self.nexus.handle_io(io.child, io.ticket, IoStatus::PathError, self.now);
        }
        self.nexus.handle_child_down(ChildId(child), self.now);
        self.pump();
    }

    /// What the nexus asks on its own account, answered as a replica does that keeps marks and stamps.
    fn answer_upkeep(&mut self, io: &ChildIo) {
        let child = usize::from(io.child.0);
        let status = if self.up[child] { IoStatus::Ok } else { IoStatus::PathError };
        let lists = matches!(io.op, ChildOp::Changes { .. });
        if lists && self.late_lists.has(io.child) {
            self.late.push(io.clone());
            return;
        }
        let fails = lists && self.no_list == Some(io.child.0);
        let status = if fails { IoStatus::MediaError } else { status };
        let children = self.up.len().max(self.extents.len());
        self.extents.resize(children, Vec::new());
        self.stamps.resize(children, Vec::new());
        self.extents[child].resize(16, 0);
        self.stamps[child].resize(16, 0);
        let marks = &mut self.extents[child];
        match io.op {
            ChildOp::Changes { first, since, buf } => {
                let wanted = self.mem.bytes_mut(buf).iter_mut().take(16);
                for (at, byte) in (first as usize..).zip(wanted) {
                    let after = self.stamps[child][at] >= since;
                    *byte = marks[at] & !CANDIDATE | if after { change::SINCE } else { 0 };
                }
            }
            ChildOp::SettleBegin { .. } => {
                for mark in marks.iter_mut().filter(|mark| **mark & change::OPEN != 0) {
                    *mark |= CANDIDATE;
                }
            }
            ChildOp::SettleEnd { stamp, below, .. } => {
                for (at, mark) in (0u32..below.min(16)).zip(marks) {
                    if *mark & CANDIDATE != 0 {
                        *mark = change::MAPPED;
                        self.stamps[child][at as usize] = stamp;
                    }
                }
            }
            _ => {}
        }
        self.asked.push(io.clone());
        self.nexus.handle_io(io.child, io.ticket, status, self.now);
    }

    fn pump(&mut self) {
        while self.nexus.run_mends(&mut self.mem, &mut self.reserve, self.now) {}
        while let Some(io) = self.nexus.poll_child() {
            let own = matches!(io.ticket.kind(), crate::types::TicketKind::Upkeep(_));
            if own {
                self.answer_upkeep(&io);
                while self.nexus.run_mends(&mut self.mem, &mut self.reserve, self.now) {}
            } else if matches!(io.op, ChildOp::Io(_)) {
                self.io.push_back(io);
            } else if self.hold_registers {
                self.held.push_back(io);
            } else {
                let reply = self.obey(&io);
                self.nexus.handle_register(io.child, io.ticket, reply, self.now);
                while self.nexus.run_mends(&mut self.mem, &mut self.reserve, self.now) {}
            }
        }
        while let Some(d) = self.nexus.poll_done() {
            self.done.push(d);
        }
        while let Some(r) = self.nexus.poll_release() {
            self.released.push(r);
        }
        while let Some(e) = self.nexus.poll_event() {
            self.events.push(e);
        }
    }

    /// What a replica's register answers.
    fn obey(&mut self, io: &ChildIo) -> ChildReply {
        let at = usize::from(io.child.0);
        let broken = self.broken[at];
        if !self.up[at] {
            return Err(IoStatus::PathError);
        }
        let held = self.registers[at].clone();
        let ChildOp::Register(op) = io.op.clone() else {
            panic!("{:?} is not of a register", io.op)
        };
        let changed = match consider(held.clone(), &op) {
            Verdict::Answer(answer) => return answer,
            _ if broken => return Err(IoStatus::MediaError),
            Verdict::Grant { .. } => return Ok(Register::default()),
            Verdict::Grow(blocks) => Register { blocks, ..held },
            Verdict::Store(new) => {
                Register { blocks: held.blocks, incarnation: held.incarnation, ..new }
            }
        };
        self.registers[at] = changed.clone();
        Ok(changed)
    }

    /// Answers the register operations that were held, by the rules, and those that come of it.
    fn answer_registers(&mut self) {
        self.hold_registers = false;
        while let Some(io) = self.held.pop_front() {
            let reply = self.obey(&io);
            self.nexus.handle_register(io.child, io.ticket, reply, self.now);
            self.pump();
        }
    }

    fn submit(&mut self, tag: u64, op: IoOp, start: u64, blocks: u64) {
        let range = LbaRange::new(Lba(start), blocks).unwrap();
        // Nobody looks at what lies there.
        let len = if op == IoOp::Read { u32::try_from(blocks).unwrap() * 4096 } else { 0 };
        let buf = BufSlice::new(0, len);
        self.nexus.submit(tag, IoRequest { op, range, buf }, self.now);
        self.pump();
    }

    fn write(&mut self, tag: u64, start: u64, blocks: u64) {
        self.submit(tag, IoOp::Write { fua: false }, start, blocks);
    }

    /// Answers the oldest request of a child.
    fn answer(&mut self, child: u8, status: IoStatus) {
        let at = self.io.iter().position(|i| i.child == ChildId(child)).expect("a request");
        let io = self.io.remove(at).unwrap();
        self.nexus.handle_io(io.child, io.ticket, status, self.now);
        self.pump();
    }

    fn pass(&mut self, ms: u64) {
        self.now += ms;
        self.nexus.handle_timeout(self.now);
        self.pump();
    }

    fn status_of(&self, tag: u64) -> Option<IoStatus> {
        self.done.iter().find(|d| d.tag == tag).map(|d| d.status)
    }

    fn pending(&self, child: u8) -> usize {
        self.io.iter().filter(|i| i.child == ChildId(child)).count()
    }

    fn stored_in_sync(&self, child: usize) -> Vec<bool> {
        let config = Config::decode(&self.registers[child].config).unwrap();
        config.members.iter().map(|m| m.in_sync).collect()
    }
}

#[test]
fn a_write_is_acked_when_the_last_replica_has_it() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(1), None);
    b.answer(2, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.released, [1]);
}

/// One replica refused, and the nexus took it for a fault of that replica's: it left it out, told the
/// others so, and went on.
#[test]
fn one_replica_that_has_promised_a_newer_epoch_ends_it_all() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.submit(2, IoOp::Read, 100, 1);
    b.answer(1, IoStatus::Fenced);
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    // Of the path, not of the volume: a host looks for another nexus.
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    assert_eq!(b.status_of(2), Some(IoStatus::PathError));
    assert_eq!(b.stored_in_sync(0), [true, true, true]);
    b.write(3, 0, 8);
    assert_eq!(b.status_of(3), Some(IoStatus::PathError));
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!(b.released.len(), 3);
    assert_eq!(b.nexus.in_flight(), 0);
}

#[test]
fn flush_and_fua_reach_every_replica() {
    let mut b = Bench::online(3);
    b.submit(1, IoOp::Flush, 0, 0);
    b.submit(2, IoOp::Write { fua: true }, 0, 1);
    for child in 0..3 {
        assert_eq!(b.pending(child), 2);
    }
    assert!(
        b.io.iter()
            .any(|i| matches!(i.op, ChildOp::Io(IoRequest { op: IoOp::Write { fua: true }, .. })))
    );
}

#[test]
fn a_failed_replica_is_out_on_a_majority_before_the_ack() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(2, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    // The bench answers registers at once; what counts is that they hold it.
    assert_eq!(b.stored_in_sync(0), [true, false, true]);
    assert_eq!(b.stored_in_sync(2), [true, false, true]);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    let committed = b.events.iter().rposition(|e| matches!(e, Event::Committed { .. })).unwrap();
    let failing = b.events.iter().position(|e| matches!(e, Event::ChildFailing(..))).unwrap();
    assert!(failing < committed);
    // Later writes go to the two that are left.
    b.write(2, 0, 8);
    assert_eq!(b.pending(1), 0);
}

#[test]
fn without_a_majority_the_write_is_held_until_one_is_back() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.disconnect(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(1), None);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    b.connect(2);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(b.stored_in_sync(2), [true, false, false]);
}

#[test]
fn a_replica_that_is_late_is_reset_and_taken_out_but_keeps_the_buffer() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.pass(DEADLINE);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert!(b.events.contains(&Event::ResetChild(ChildId(2))));
    assert!(b.released.is_empty(), "the late replica may still read the buffer");
    b.disconnect(2);
    assert_eq!(b.released, [1]);
}

#[test]
fn a_replica_that_was_fast_is_given_up_sooner_and_a_flush_has_its_time() {
    let mut b = Bench::online(3);
    let fast = NexusConfig { child_deadline_min_ms: 100, ..config(3, Purpose::Assemble) };
    b.nexus.config = fast;
    for tag in 0..500 {
        b.write(tag, 0, 1);
        (0..3).for_each(|child| b.answer(child, IoStatus::Ok));
    }
    b.submit(1000, IoOp::Flush, 0, 0);
    (0..2).for_each(|child| b.answer(child, IoStatus::Ok));
    b.pass(DEADLINE - 101);
    assert_eq!(b.status_of(1000), None);
    assert_eq!(b.stored_in_sync(0), [true; 3]);
    b.write(1001, 0, 1);
    (0..2).for_each(|child| b.answer(child, IoStatus::Ok));
    b.pass(100);
    assert_eq!(b.status_of(1001), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, true, false]);
    assert_eq!(b.nexus.status().children[2].failures, 1);
    assert!(b.nexus.hold_off_ms(ChildId(2), b.now).is_some_and(|ms| ms <= 1_000));
    assert_eq!(b.nexus.hold_off_ms(ChildId(1), b.now), None);
}

#[test]
fn a_failure_of_all_is_the_hosts_to_know_and_nobody_is_dropped() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::MediaError);
    b.answer(1, IoStatus::MediaError);
    assert_eq!(b.status_of(1), None, "a part may be done, and they are made alike first");
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!(b.status_of(1), Some(IoStatus::MediaError));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.write(2, 0, 8);
    b.answer(0, IoStatus::InvalidField);
    b.answer(1, IoStatus::InvalidField);
    assert_eq!(b.status_of(2), Some(IoStatus::InvalidField));
}

/// A snapshot call: one that has it not to do is as good a member as before, one that fails is out.
#[test]
fn snapshot_calls_tell_a_refusal_from_a_failure() {
    use cairn_block::SnapshotVerb::{Clone, Create, Restore};
    let call = |b: &mut Bench, tag, verb, second| {
        let blocks = b.nexus.blocks();
        b.submit(tag, IoOp::Snapshot(verb), 0, blocks);
        b.answer(0, IoStatus::Ok);
        b.answer(1, second);
        (b.status_of(tag), b.nexus.is_whole())
    };
    for verb in [Create, Clone] {
        let mut b = Bench::online(3);
        b.disconnect(2);
        b.write(1, 0, 1);
        (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
        let told = call(&mut b, 2, verb, IoStatus::InvalidField);
        assert_eq!(told.0, Some(IoStatus::InvalidField), "{verb:?}");
        assert_eq!(b.nexus.status().children.iter().filter(|c| c.in_sync).count(), 2);
    }
    for (verb, status) in [(Create, IoStatus::MediaError), (Restore, IoStatus::InvalidField)] {
        let mut b = Bench::online(3);
        b.disconnect(2);
        b.write(1, 0, 1);
        (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
        b.connect(2);
        let told = call(&mut b, 2, verb, status);
        assert_eq!(told.0, Some(IoStatus::Ok), "{verb:?}: whoever is in sync has done it");
        assert_eq!(b.nexus.status().children.iter().filter(|c| c.in_sync).count(), 1);
    }
}

#[test]
fn overlapping_writes_reach_every_replica_in_one_order() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.write(2, 4, 8);
    b.write(3, 100, 1);
    assert_eq!(b.pending(0), 2, "the overlapping one waits");
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.pending(0), 2, "and runs when its turn has come");
}

#[test]
fn a_read_waits_for_a_write_in_flight_that_it_overlaps() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.submit(2, IoOp::Read, 7, 1);
    assert_eq!(b.io.len(), 2);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.io.len(), 1);
    assert_eq!(b.status_of(2), None);
}

#[test]
fn reads_spread_over_the_least_loaded_and_are_retried_elsewhere() {
    let mut b = Bench::online(3);
    for tag in 0..3 {
        b.submit(tag, IoOp::Read, tag, 1);
    }
    assert!((0..3).all(|c| b.pending(c) == 1));
    b.answer(0, IoStatus::MediaError);
    assert_eq!(b.status_of(0), None);
    assert_eq!(b.pending(0), 1, "it is asked again under the lock");
    b.answer(1, IoStatus::MediaError);
    b.answer(2, IoStatus::MediaError);
    while let Some(io) = b.io.front().map(|io| io.child.0) {
        b.answer(io, IoStatus::MediaError);
    }
    for tag in 0..3 {
        assert_eq!(b.status_of(tag), Some(IoStatus::MediaError));
    }
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn a_local_replica_is_read_first() {
    let mut cfg = config(3, Purpose::Create);
    cfg.children[2].local = true;
    let mut b = Bench::new(3, Purpose::Create, vec![Register::default(); 3]);
    b.nexus = Nexus::new(cfg);
    (0..3).for_each(|i| b.connect(i));
    for tag in 0..4 {
        b.submit(tag, IoOp::Read, 0, 1);
    }
    assert_eq!(b.pending(2), 4);
}

#[test]
fn a_restart_takes_a_newer_epoch_and_serves_the_same_members() {
    let mut b = Bench::online(3);
    let epoch = b.nexus.status().epoch;
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    let status = b.nexus.status();
    assert!(status.epoch > epoch);
    assert!(!status.children[2].in_sync, "a stale member stays out");
    assert_eq!(status.children[2].state, ChildState::OutOfSync(FaultReason::Stale));
}

#[test]
fn a_stale_member_never_starts_a_volume() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    let mut b = b.restarted();
    b.connect(1);
    b.connect(2);
    b.pass(WAIT);
    let VolumeState::Assembling(why) = b.nexus.state() else { panic!("{:?}", b.nexus.state()) };
    assert!(why.contains(&ReplicaId(1).to_string()), "{why}");
    b.connect(0);
    b.pass(WAIT * 10);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert!(b.nexus.status().children[0].in_sync);
}

#[test]
fn two_nexuses_cannot_both_serve() {
    let mut b = Bench::online(3);
    let epoch = b.nexus.status().epoch;
    // Another nexus has taken the volume over behind this one's back.
    for r in &mut b.registers {
        r.promised_epoch = Epoch(epoch.0 + 1);
    }
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::Fenced);
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    b.write(2, 0, 1);
    assert_eq!(b.status_of(2), Some(IoStatus::PathError));
}

#[test]
fn replicas_of_another_volume_are_refused() {
    let b = Bench::online(2);
    let mut cfg = config(2, Purpose::Assemble);
    cfg.volume = VolumeId(5);
    let mut b = b.restarted();
    b.nexus = Nexus::new(cfg);
    b.connect(0);
    b.connect(1);
    assert!(matches!(b.nexus.state(), VolumeState::Refused(_)));
    // And a volume is not created over another one.
    let registers = b.registers.clone();
    let mut cfg = config(2, Purpose::Create);
    cfg.volume = VolumeId(5);
    let mut b = Bench::new(2, Purpose::Create, registers);
    b.nexus = Nexus::new(cfg);
    b.connect(0);
    b.connect(1);
    assert!(matches!(b.nexus.state(), VolumeState::Refused(_)));
}

#[test]
fn a_short_absence_without_writes_costs_nothing() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.write(1, 0, 1);
    assert_eq!(b.pending(1), 1);
}

/// Both replicas failed a write of their own before the first failure was recorded. The second, by
/// then the only member left, was marked as failing too; nothing ever took that mark away, and the
/// volume served nothing any more, not even when its replica was healthy again.
#[test]
fn the_last_member_is_never_given_up() {
    let mut b = Bench::online(2);
    b.write(1, 0, 1);
    b.write(2, 8, 1);
    b.hold_registers = true;
    b.answer(0, IoStatus::MediaError);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    assert_eq!((b.status_of(1), b.status_of(2)), (None, None));
    b.answer_registers();
    assert_eq!(b.status_of(1), Some(IoStatus::Ok), "the member that stays has it");
    assert_eq!(b.status_of(2), Some(IoStatus::MediaError), "only the one that left has it");
    assert!(b.nexus.status().children[1].state == ChildState::Online);
    b.write(3, 0, 1);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
}

/// All replicas stood still for longer than the deadline (their machine was suspended, a switch
/// rebooted). Each was given up, the last one too; the write was answered with an error while every
/// replica could still carry it out, and a later write to the same blocks could be overtaken by it.
#[test]
fn when_everybody_is_late_nobody_is_given_up() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.pass(DEADLINE * 3);
    assert_eq!(b.status_of(1), None);
    assert!(!b.events.iter().any(|e| matches!(e, Event::ResetChild(_) | Event::ChildFailing(..))));
    b.write(2, 0, 8);
    assert_eq!(b.pending(0), 1, "the later write still waits for its turn");
    (0..3).for_each(|c| b.answer(c, IoStatus::Ok));
    (0..3).for_each(|c| b.answer(c, IoStatus::Ok));
    assert_eq!((b.status_of(1), b.status_of(2)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

/// A late last member: as above, with one replica in sync.
/// A nexus was stopped while one of three lost power: to it the other two were late, it went on with the third alone, and
/// what that one had lost was gone.
#[test]
fn nobody_is_given_up_for_one_that_is_silent() {
    let mut b = Bench::online(3);
    b.submit(1, IoOp::Read, 0, 1);
    b.submit(2, IoOp::Read, 8, 1);
    b.submit(3, IoOp::Flush, 0, 0);
    b.answer(2, IoStatus::Ok);
    assert_eq!([b.pending(0), b.pending(1), b.pending(2)], [2, 2, 0]);
    b.hold_registers = true;
    b.pass(DEADLINE * 2);
    assert_eq!(b.stored_in_sync(0), [true; 3]);
    let asked: Vec<u8> = b.held.iter().map(|io| io.child.0).collect();
    assert_eq!(asked, [0, 1, 2], "whether they are there");
    b.pass(DEADLINE);
    assert_eq!(b.held.len(), 3, "once");
    b.held.retain(|io| io.child == ChildId(2));
    b.answer_registers();
    assert_eq!(b.stored_in_sync(2), [false, false, true], "one is, and goes on");
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
}

/// The only member that was left came back from a loss of power, and the next flush was acked.
#[test]
fn a_flush_does_not_succeed_over_what_was_lost() {
    let mut b = Bench::online(1);
    b.registers[0].incarnation = 1;
    b.disconnect(0);
    b.connect(0);
    let losses = b.nexus.losses();
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.submit(2, IoOp::Flush, 0, 0);
    b.disconnect(0);
    b.registers[0].incarnation = 2;
    b.connect(0);
    assert_eq!(b.nexus.losses(), losses + 1);
    assert_eq!(b.status_of(2), Some(IoStatus::MediaError));
    // What is written from now on is there, and a loss of nothing is none.
    b.submit(3, IoOp::Flush, 0, 0);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
    b.disconnect(0);
    b.registers[0].incarnation = 3;
    b.connect(0);
    assert_eq!(b.nexus.losses(), losses + 1);
}

#[test]
fn a_late_last_member_answers_in_the_end() {
    let mut b = Bench::online(1);
    b.submit(1, IoOp::Read, 0, 1);
    b.write(2, 8, 1);
    b.pass(DEADLINE * 2);
    b.answer(0, IoStatus::Ok);
    b.answer(0, IoStatus::Ok);
    assert_eq!((b.status_of(1), b.status_of(2)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
}

/// Two of three pools failed in the same moment. Replicas that failed were not asked to store the
/// configuration, though they were there; no majority was left, and the write hung for ever.
#[test]
fn a_replica_that_failed_a_write_still_votes() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
}

/// A voter could not store the configuration just then (no memory for the page, say). It was never
/// asked again while its session lived, and the writes that waited for the commit hung.
#[test]
fn a_voter_that_refused_is_asked_again() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.broken = vec![true; 3];
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    assert!(b.nexus.poll_timeout(b.now).is_some());
    b.broken = vec![false; 3];
    b.pass(DEADLINE / 8);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(1), [true, true, false]);
}

/// Every session is lost for a moment, as when the replicas' machine restarts. What was in flight
/// and what came meanwhile was answered with a path error, which a Linux host without another path
/// repeats five times in a row and then makes an I/O error of.
#[test]
fn requests_wait_while_no_member_is_there() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.submit(2, IoOp::Read, 8, 1);
    (0..3).for_each(|c| b.disconnect(c));
    b.write(3, 16, 1);
    b.submit(4, IoOp::Read, 24, 1);
    b.pass(DEADLINE * 2);
    assert!(b.done.is_empty(), "{:?}", b.done);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    (0..3).for_each(|c| b.connect(c));
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    for tag in 1..=4 {
        assert_eq!(b.status_of(tag), Some(IoStatus::Ok), "{tag}");
    }
    // Whoever is back first has it all; the others went when the writes were done without them.
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(b.nexus.in_flight(), 0);
    b.released.sort_unstable();
    assert_eq!(b.released, [1, 2, 3, 4]);
}

/// The disk of one replica is dead: its register can be read and not written. The promise failed
/// there, assembly began again with everybody, failed there again, and so on for ever.
#[test]
fn a_replica_with_a_dead_disk_does_not_hold_up_assembly() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.broken[2] = true;
    (0..3).for_each(|i| b.connect(i));
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert_eq!(b.stored_in_sync(0), [true, true, false]);
    // A new volume still wants all of them.
    let mut b = Bench::new(2, Purpose::Create, vec![Register::default(); 2]);
    b.broken[1] = true;
    (0..2).for_each(|i| b.connect(i));
    b.pass(WAIT * 10);
    assert!(!b.nexus.state().is_serving());
}

/// A replica that comes and goes. Each time it came assembly began again, so the wait for it never
/// ended.
#[test]
fn a_replica_that_flaps_does_not_hold_up_assembly() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    for _ in 0..4 {
        b.pass(WAIT / 4);
        b.hold_registers = true;
        b.connect(2);
        b.disconnect(2);
        b.answer_registers();
    }
    b.pass(WAIT / 4);
    assert!(b.nexus.state().is_serving(), "{:?}", b.nexus.state());
}

/// The sessions with two of three replicas are lost while the epoch's first configuration is being
/// stored. They came back and were not asked again: the volume never came up. And the one of them
/// whose answer was not needed any more was used without its new session being bound to the epoch:
/// its first write was refused, and that took it out of the volume.
#[test]
fn a_replica_that_comes_back_while_the_first_configuration_is_stored() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    b.hold_registers = true;
    b.connect(2);
    // The registers are read and promised; then the answers to the commit are lost.
    while !b.held.iter().any(|io| matches!(io.op, ChildOp::Register(RegisterOp::Accept(_)))) {
        let io = b.held.pop_front().unwrap();
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
    }
    let lost: Vec<ChildIo> = b.held.drain(..).filter(|io| io.child != ChildId(0)).collect();
    for io in &lost {
        b.nexus.handle_register(io.child, io.ticket, Err(IoStatus::PathError), b.now);
    }
    b.disconnect(1);
    b.disconnect(2);
    b.connect(1);
    b.connect(2);
    let mut bound = Vec::new();
    while let Some(io) = b.held.pop_front() {
        if matches!(io.op, ChildOp::Register(RegisterOp::Promise { again: true, .. })) {
            bound.push(io.child.0);
        }
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
        if b.nexus.state().is_serving() {
            break;
        }
    }
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    // They are before they tell what they have.
    assert_eq!(bound, [1, 2]);
    b.answer_registers();
    b.write(1, 0, 1);
    assert_eq!((b.pending(0), b.pending(1), b.pending(2)), (1, 1, 1));
}

/// A process makes a volume and is killed before it remembers that it did. At its next start it
/// found its own volume on the replicas and refused to create it over itself: the data on it could
/// not be reached any more.
#[test]
fn a_volume_that_was_created_already_is_taken_up() {
    let b = Bench::online(3);
    let mut b = Bench::new(3, Purpose::Create, b.registers);
    b.connect(0);
    b.connect(1);
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded, "and one of three may be missing");
}

/// A volume is removed while its requests are held for want of a majority: they were never answered
/// and the removal never ended.
#[test]
fn a_closed_nexus_lets_go_of_what_it_held() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.disconnect(2);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.write(2, 0, 1);
    assert!(b.done.is_empty());
    b.nexus.close();
    b.pump();
    assert_eq!((b.nexus.in_flight(), b.released.len()), (0, 2));
}

/// What it saw may be taken back, and it must not be the only one that ever saw it.
#[test]
fn a_read_that_a_write_overtakes_is_done_again_after_it() {
    let mut b = Bench::online(2);
    b.submit(1, IoOp::Read, 10, 4);
    let asked = b.io.front().unwrap().child.0;
    b.write(2, 12, 1);
    b.answer(asked, IoStatus::Ok);
    assert_eq!(b.status_of(1), None, "it waits for the write");
    // And another write waits for it.
    b.write(3, 12, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
    assert_eq!(b.io.len(), 1);
    let again = b.io.front().unwrap().clone();
    assert!(matches!(again.op, ChildOp::Io(IoRequest { op: IoOp::Read, .. })));
    b.answer(again.child.0, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
    // One that does not overlap overtakes nothing.
    b.submit(4, IoOp::Read, 10, 4);
    b.write(5, 14, 1);
    let asked = b.io.front().unwrap().child.0;
    b.answer(asked, IoStatus::Ok);
    assert_eq!(b.status_of(4), Some(IoStatus::Ok));
}

#[test]
fn a_read_that_has_its_range_for_itself_gives_it_back_where_nobody_can_answer() {
    let mut b = Bench::online(2);
    b.submit(1, IoOp::Read, 10, 4);
    let asked = b.io.front().unwrap().child.0;
    b.write(2, 12, 1);
    b.answer(asked, IoStatus::Ok);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.disconnect(0);
    b.disconnect(1);
    assert_eq!(b.status_of(1), None);
    b.write(3, 12, 1);
    b.connect(0);
    b.connect(1);
    while let Some(io) = b.io.front() {
        let child = io.child.0;
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!((b.status_of(1), b.status_of(3)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
}

/// It may have lost power meanwhile, and they have all.
#[test]
fn members_that_are_late_are_not_given_up_for_one_that_is_away() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.disconnect(0);
    b.pass(DEADLINE * 2);
    assert_eq!(b.nexus.in_sync.iter().count(), 3);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
}
