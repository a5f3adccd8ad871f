//! A request, from its turn to its answer: which children it goes to, and what their answers make of it.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{IoOp, IoRequest, IoStatus, SnapshotVerb};

use crate::children::{Child, ChildState, FaultReason};
use crate::copy::COPY_KEY;
use crate::mend::{FIRST_KEY, Task};
use crate::nexus::Nexus;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, ChildIo, ChildOp, Done, Ticket};

/// Reads that go to one child in a row, and by how many it may be ahead of the others for that.
const READ_RUN: u32 = 8;

impl Nexus {
    /// The slot's turn has come: hand it to the children.
    pub(crate) fn start(&mut self, at: u16, now_ms: u64) {
        if self.slots.slot(at).atomic && !self.atomics.is_placing(at) {
            return self.begin_atomic(at, now_ms);
        }
        let slot = self.slots.slot(at);
        slot.phase = Phase::Running;
        slot.started_ms = now_ms;
        if slot.request.op == IoOp::Read {
            self.read(at, now_ms);
            return;
        }
        if slot.request.op == IoOp::Flush && on(Mutant::FlushAtNexus) {
            return self.answer(at, IoStatus::Ok);
        }
        if slot.request.op == IoOp::Verify {
            self.verify(at);
            return;
        }
        let joining = |c: ChildId| self.children[usize::from(c.0)].state == ChildState::Joining;
        if self.in_sync.iter().any(joining) || !self.in_sync.iter().any(|c| self.is_usable(c)) {
            self.park(at);
            return;
        }
        let request = self.slots.slot(at).request;
        if matches!(request.op, IoOp::Snapshot(_)) && !self.may_snapshot(request.op) {
            self.park(at);
            return;
        }
        if request.op.is_mutation() {
            self.note_change(now_ms);
        }
        // A flush too: a member that joins while it runs was never sent it.
        // One that is done again, since nobody was left, may have reached somebody before.
        if self.slots.slot(at).order == u64::MAX {
            self.slots.slot(at).order = self.take_order();
        }
        for child in self.in_sync.iter() {
            if self.is_usable(child) {
                self.emit(child, at, request);
            } else {
                let slot = self.slots.slot(at);
                slot.failed = slot.failed.with(child);
            }
        }
        if !matches!(request.op, IoOp::Snapshot(_)) {
            let forgets = on(Mutant::MirrorMissesWrites);
            for child in self.mirrors().without(self.in_sync).iter().filter(|_| !forgets) {
                self.emit(child, at, request);
            }
        }
        self.look(at, now_ms);
    }

    /// Whether a snapshot call may go to the members now.
    fn may_snapshot(&mut self, op: IoOp) -> bool {
        if self.joins(op) {
            return false;
        }
        if op == IoOp::Snapshot(SnapshotVerb::Restore) {
            if self.forget_what_is_settled() {
                self.commit_wanted();
            }
            return self.commit.is_none();
        }
        true
    }

    /// Lets every member that is there verify the range.
    fn verify(&mut self, at: u16) {
        let request = self.slots.slot(at).request;
        for child in self.in_sync.iter() {
            if self.is_usable(child) {
                self.emit(child, at, request);
            }
        }
        if self.slots.slot(at).outstanding.is_empty() {
            self.park(at);
        }
    }

    pub(crate) fn is_usable(&self, child: ChildId) -> bool {
        self.children[usize::from(child.0)].is_usable()
    }

    fn emit(&mut self, child: ChildId, at: u16, request: IoRequest) {
        let c = self.child(child);
        c.load += 1;
        if request.op == IoOp::Flush {
            c.flushing.push((at, c.written));
        }
        let slot = self.slots.slot(at);
        slot.outstanding = slot.outstanding.with(child);
        let op = ChildOp::Io(request);
        self.child_ios.push_back(ChildIo { child, ticket: Ticket::io(at), op });
    }

    /// Who of `from` is read from next: a local child, else the least loaded; the next ones in a row from the
    /// same, since what goes to one child together is one send there.
    fn reader(&mut self, from: ChildSet) -> Option<ChildId> {
        let usable = from.iter().filter(|&c| self.is_usable(c));
        let (last, run) = self.reader;
        let best = usable.min_by_key(|&c| {
            let child = &self.children[usize::from(c.0)];
            let load = if c == last && run < READ_RUN {
                child.load.saturating_sub(READ_RUN)
            } else {
                child.load
            };
            // Of equals whoever comes after the last one.
            (!child.local, load, c != last || run >= READ_RUN, c <= last)
        })?;
        self.reader = if best == last && run < READ_RUN { (best, run + 1) } else { (best, 1) };
        Some(best)
    }

    /// Sends a read to the best child that has not failed it.
    fn read(&mut self, at: u16, now_ms: u64) {
        let slot = self.slots.slot(at);
        let (tried, request, fault, refused) =
            (slot.failed, slot.request, slot.fault, slot.refused);
        slot.started_ms = now_ms;
        let from = if on(Mutant::ReadOutOfSync) { self.connected() } else { self.in_sync };
        let best = self.reader(from.without(tried));
        if best.is_none() {
            self.read_ended(at);
        }
        match best {
            Some(child) => {
                self.ranges.begin_read(request.range, at);
                self.emit(child, at, request);
            }
            // Who is away may come back with it, or leave the in-sync set.
            None if !refused || self.in_sync.iter().any(|c| !self.is_usable(c)) => {
                self.park(at);
            }
            None => self.answer(at, fault),
        }
    }

    /// A member has answered a read, or will not. Returns whether a mutation has overtaken it.
    fn read_ended(&mut self, at: u16) -> bool {
        if core::mem::take(&mut self.slots.slot(at).alone) {
            self.ranges.leave(at);
        }
        self.ranges.end_read(at) && !on(Mutant::ReadOvertaken)
    }

    /// What was read may be of a mutation that began meanwhile, and that may come to nothing: it is read
    /// once more, and nothing may overtake that.
    fn read_again(&mut self, at: u16, now_ms: u64) {
        let slot = self.slots.slot(at);
        (slot.phase, slot.alone) = (Phase::Waiting, true);
        (slot.ok, slot.failed, slot.bad) = (ChildSet::EMPTY, ChildSet::EMPTY, ChildSet::EMPTY);
        let range = slot.request.range;
        if self.ranges.enter(range, at, true) {
            self.start(at, now_ms);
        }
    }

    /// Decides what becomes of a running request.
    pub(crate) fn look(&mut self, at: u16, now_ms: u64) {
        let slot = self.slots.slot(at);
        if slot.phase != Phase::Running {
            return;
        }
        let (ok, failed, fault, outstanding) = (slot.ok, slot.failed, slot.fault, slot.outstanding);
        if slot.request.op == IoOp::Read {
            if ok.is_empty() && !outstanding.is_empty() {
                return;
            }
            let bad = !slot.bad.is_empty();
            let overtaken = self.read_ended(at);
            if !ok.is_empty() && !overtaken {
                self.answer_read(at, now_ms);
            } else if ok.is_empty() && bad {
                self.begin_mend(Task::Read(at));
            } else if overtaken {
                // Where nobody answered, too: another member would be asked in the middle of the mutation.
                self.read_again(at, now_ms);
            } else {
                self.read(at, now_ms);
            }
            return;
        }
        if slot.request.op == IoOp::Verify {
            if !outstanding.is_empty() {
                return;
            }
            if !slot.bad.is_empty() {
                self.begin_mend(Task::Verify(at));
            } else if !ok.is_empty() {
                self.answer(at, IoStatus::Ok);
            } else if slot.refused {
                self.answer(at, fault);
            } else {
                // Everybody went away.
                slot.failed = ChildSet::EMPTY;
                self.park(at);
            }
            return;
        }
        let in_sync = self.in_sync;
        let missing = in_sync.without(ok);
        let all_but_one = on(Mutant::AckBeforeAll) && missing.len() == 1 && in_sync.len() > 1;
        let missing = if all_but_one { ChildSet::EMPTY } else { missing };
        let owed = self.joining.without(in_sync).without(ok);
        let owed = if on(Mutant::JoinerNotAwaited) { ChildSet::EMPTY } else { owed };
        if missing.is_empty() && !owed.is_empty() && !matches!(slot.request.op, IoOp::Snapshot(_)) {
            // Whoever is being taken back has it too, or is out again, before it is acked.
            return;
        }
        if missing.is_empty() {
            // Those that failed otherwise are out of sync by now, and the others did it.
            let declined = slot.declined;
            self.answer(at, if declined { fault } else { IoStatus::Ok });
            return;
        }
        if !missing.without(failed).is_empty() {
            return;
        }
        let full = slot.full.and(missing);
        if !full.is_empty() && !matches!(slot.request.op, IoOp::Snapshot(_)) {
            self.look_full(at, full);
            return;
        }
        if missing == in_sync && !slot.refused {
            // Every session was lost: who has it and who has not is not known. It is done again
            // when somebody is back.
            if outstanding.is_empty() {
                (slot.ok, slot.failed) = (ChildSet::EMPTY, ChildSet::EMPTY);
                self.park(at);
            }
            return;
        }
        let unsure = slot.unsure && !matches!(slot.request.op, IoOp::Snapshot(_));
        if missing == in_sync && unsure && in_sync.len() > 1 {
            // Nobody said that it was done, and some may have done it: they are made alike, and the host is
            // told.
            if outstanding.and(in_sync).is_empty() {
                self.converge(at);
            }
            return;
        }
        if missing == in_sync {
            // Nobody did it: the members are as alike as before, and the host is told.
            self.answer(at, fault);
            return;
        }
        // Some did it and some did not: those that did not must go before the ack.
        let reason = |child: &Child| match (child.connected, fault) {
            (false, _) => FaultReason::Unreachable,
            (true, IoStatus::TimedOut) => FaultReason::DeadlineMissed,
            (true, status) => FaultReason::Failed(status),
        };
        for child in missing.iter() {
            let why = reason(&self.children[usize::from(child.0)]);
            self.fail_child(child, why);
        }
        if on(Mutant::AckBeforeCommit) {
            self.answer(at, IoStatus::Ok);
        }
    }

    /// Members had no space for a mutation that others took, and every member has answered: whoever
    /// failed it otherwise goes, and the rest are made alike before the host is told.
    fn look_full(&mut self, at: u16, full: ChildSet) {
        let slot = self.slots.slot(at);
        let others = self.in_sync.without(slot.ok).without(full);
        if !slot.outstanding.and(self.in_sync).is_empty() {
            return;
        }
        if others.is_empty() {
            if on(Mutant::NoConvergence) {
                return self.answer(at, IoStatus::NoSpace);
            }
            return self.converge(at);
        }
        for child in others.iter() {
            let connected = self.children[usize::from(child.0)].connected;
            let fault = IoStatus::MediaError;
            let why = if connected { FaultReason::Failed(fault) } else { FaultReason::Unreachable };
            self.fail_child(child, why);
        }
    }

    /// Makes the members alike that may differ in what a request was to change.
    fn converge(&mut self, at: u16) {
        let slot = self.slots.slot(at);
        if slot.atomic {
            // It is taken back on all of them, which makes them alike.
            let fault = if slot.full.is_empty() { slot.fault } else { IoStatus::NoSpace };
            return self.answer(at, fault);
        }
        // The target of a rebuild has it perhaps, and is not to be taken back in the middle of this.
        let range = self.slots.slot(at).request.range;
        self.mirror_is_behind(range);
        self.begin_mend(Task::Converge(at));
    }

    pub(crate) fn answer(&mut self, at: u16, status: IoStatus) {
        if self.slots.slot(at).atomic && self.atomics.is_placing(at) {
            return self.placed(at, status);
        }
        let slot = self.slots.slot(at);
        slot.phase = Phase::Answered;
        let (tag, op, range) = (slot.tag, slot.request.op, slot.request.range);
        if !status.is_ok() && op.is_mutation() && !matches!(op, IoOp::Snapshot(_)) {
            // The target of a rebuild may have done what the members did not.
            self.mirror_is_behind(range);
        }
        self.lingering += 1;
        self.parked.retain(|&parked| parked != at);
        if op == IoOp::Read {
            self.read_ended(at);
        }
        self.done.push_back(Done { tag, status });
        self.leave_if_over(at);
        self.release_if_free(at);
    }

    /// Lets requests that overlap an answered mutation go on, once no member is still at work on it: a
    /// member that is only late could otherwise do it after them.
    pub(crate) fn leave_if_over(&mut self, at: u16) {
        let slot = self.slots.slot(at);
        let mutation = slot.request.op.is_mutation();
        let outstanding = slot.outstanding;
        if mutation && outstanding.and(self.in_sync.or(self.mirrors())).is_empty() {
            self.ranges.leave(at);
        }
    }

    pub(crate) fn release_if_free(&mut self, at: u16) {
        let slot = self.slots.slot(at);
        if slot.phase == Phase::Answered && slot.outstanding.is_empty() && !slot.mending {
            let slot = self.slots.remove(at);
            self.lingering -= 1;
            self.released.push_back(slot.tag);
        }
    }

    /// Looks again at every mutation that runs: the in-sync set has changed.
    pub(crate) fn look_again(&mut self) {
        let answered = self.slots.iter().filter(|(_, s)| s.phase == Phase::Answered);
        let answered: Vec<u16> = answered.map(|(at, _)| at).collect();
        for at in answered {
            self.leave_if_over(at);
        }
        let running = self.slots.iter().filter(|(_, s)| s.phase == Phase::Running);
        self.ready.extend(running.map(|(at, _)| at));
        self.mends.kick();
    }

    pub(crate) fn park(&mut self, at: u16) {
        if !self.parked.contains(&at) {
            self.parked.push(at);
        }
    }

    /// Looks again at what waited for a child to join or to come back.
    pub(crate) fn unpark(&mut self) {
        self.ready.extend(self.parked.drain(..));
        self.mends.kick();
    }

    /// Runs what can run until nothing more can.
    pub(crate) fn settle(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        loop {
            if let Some(at) = self.ready.pop_front() {
                let fresh = self.slots.get(at).is_some_and(|slot| {
                    slot.phase == Phase::Running
                        && slot.outstanding.is_empty()
                        && slot.ok.is_empty()
                        && slot.failed.is_empty()
                });
                if fresh && self.slots.slot(at).request.op == IoOp::Read {
                    // While it waited for a member, a mutation may have begun.
                    self.read_again(at, now_ms);
                } else if fresh {
                    self.start(at, now_ms);
                } else if self.slots.get(at).is_some() {
                    self.look(at, now_ms);
                }
            } else if self.ranges.has_waiting()
                && let Some(at) = self.ranges.poll_ready()
            {
                if at >= FIRST_KEY {
                    self.mend_locked(at);
                } else if at >= COPY_KEY {
                    self.copy_locked(at);
                } else {
                    self.start(at, now_ms);
                }
            } else {
                return;
            }
        }
    }
}

/// Whether a replica that answers so has refused what the others may have done, and differs from them in
/// nothing that is read from the volume: a snapshot that it did not take, say.
pub(crate) fn harmless_refusal(op: IoOp, status: IoStatus) -> bool {
    use SnapshotVerb::{Clone, Create, Delete};
    match op {
        IoOp::Snapshot(Create | Delete | Clone) => {
            matches!(status, IoStatus::InvalidField | IoStatus::NoSpace | IoStatus::Unsupported)
        }
        _ => false,
    }
}
