//! The nexus against children that are played by hand.

use std::collections::VecDeque;

use cairn_block::{
    Buf, BufSlice, Epoch, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId,
    VolumeId,
};

use super::*;
use crate::slots::ChildSet;

mod assembly;
mod atomic;
mod force;
mod lease;
mod mend;
mod rebuild;
mod reconfigure;
mod requests;
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
    /// One that fails the flushes of settling rounds.
    no_flush: Option<u8>,
    /// How replicas answer what empties their undo log.
    forgets: IoStatus,
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
            no_flush: None,
            forgets: IoStatus::Ok,
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
        let fails = lists && self.no_list == Some(io.child.0)
            || matches!(io.op, ChildOp::Io(_)) && self.no_flush == Some(io.child.0);
        let status = if fails { IoStatus::MediaError } else { status };
        let empties = |request: &IoRequest| request.range == cairn_block::undo::whole();
        let status = match &io.op {
            ChildOp::Io(request) if empties(request) => self.forgets,
            _ => status,
        };
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
            ChildOp::GiveUpLost => {
                for mark in marks.iter_mut().filter(|mark| **mark & change::LOST != 0) {
                    *mark = 0;
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
