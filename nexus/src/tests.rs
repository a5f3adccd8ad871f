//! The nexus against children that are played by hand.

use std::collections::VecDeque;

use cairn_block::{BufSlice, Epoch, IoOp, IoRequest, IoStatus, Lba, LbaRange, ReplicaId, VolumeId};

use super::*;

const DEADLINE: u64 = 1000;
const WAIT: u64 = 500;

/// A nexus and its children: registers that obey the rules, I/O that the test answers itself.
struct Bench {
    nexus: Nexus,
    registers: Vec<Register>,
    up: Vec<bool>,
    io: VecDeque<ChildIo>,
    done: Vec<Done>,
    released: Vec<u64>,
    events: Vec<Event>,
    now: u64,
}

fn config(n: u8, purpose: Purpose) -> NexusConfig {
    NexusConfig {
        volume: VolumeId(99),
        blocks: 1000,
        children: (0..n)
            .map(|i| ChildSpec { replica: ReplicaId(u128::from(i) + 1), local: false })
            .collect(),
        purpose,
        child_deadline_ms: DEADLINE,
        assembly_wait_ms: WAIT,
        max_requests: 16,
    }
}

impl Bench {
    fn new(n: u8, purpose: Purpose, registers: Vec<Register>) -> Self {
        Self {
            nexus: Nexus::new(config(n, purpose)),
            registers,
            up: vec![false; usize::from(n)],
            io: VecDeque::new(),
            done: Vec::new(),
            released: Vec::new(),
            events: Vec::new(),
            now: 0,
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

    fn pump(&mut self) {
        while let Some(io) = self.nexus.poll_child() {
            let at = usize::from(io.child.0);
            let reply = match &io.op {
                ChildOp::Io(_) => {
                    self.io.push_back(io);
                    continue;
                }
                _ if !self.up[at] => Err(IoStatus::PathError),
                ChildOp::ReadRegister => Ok(self.registers[at].clone()),
                ChildOp::Promise { epoch, again } => {
                    let promised = &mut self.registers[at].promised_epoch;
                    if *epoch > *promised || (*again && *epoch == *promised) {
                        *promised = *epoch;
                        Ok(self.registers[at].clone())
                    } else {
                        Err(IoStatus::Fenced)
                    }
                }
                ChildOp::Accept(register) => {
                    if register.accepted_epoch >= self.registers[at].promised_epoch {
                        self.registers[at] = register.clone();
                        Ok(register.clone())
                    } else {
                        Err(IoStatus::Fenced)
                    }
                }
            };
            self.nexus.handle_register(io.child, io.ticket, reply, self.now);
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

    fn submit(&mut self, tag: u64, op: IoOp, start: u64, blocks: u64) {
        let range = LbaRange::new(Lba(start), blocks).unwrap();
        self.nexus.submit(tag, IoRequest { op, range, buf: BufSlice::EMPTY }, self.now);
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
        config.members.iter().map(|m| m.1).collect()
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
fn a_failure_of_all_is_the_hosts_to_know_and_nobody_is_dropped() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::NoSpace);
    b.answer(1, IoStatus::NoSpace);
    assert_eq!(b.status_of(1), Some(IoStatus::NoSpace));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
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
    assert_eq!(b.pending(0), 0);
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
    assert_eq!(b.status_of(1), Some(IoStatus::NotReady));
    b.write(2, 0, 1);
    assert_eq!(b.status_of(2), Some(IoStatus::NotReady));
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
    // And a volume is not created over one that exists.
    let registers = b.registers.clone();
    let mut b = Bench::new(2, Purpose::Create, registers);
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
