//! What the nexus asks children on its own account: rounds that settle what was written, what differs
//! after a crash, and what a member that returns lacks. Each question is remembered until it is answered,
//! with its buffer.

use cairn_block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, LbaRange, Memory};

use crate::nexus::Nexus;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, ChildIo, ChildOp, Ticket};

/// Blocks of a logical extent: what is open, settled and copied is counted in these.
pub const EXTENT_BLOCKS: u64 = 256;
/// Bytes of an answer that tells of extents, one for each.
pub(crate) const PAGE: u32 = 4096;

/// For whom a question was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A settling round's step.
    Settle,
    /// What may differ after a crash.
    Learn,
    /// What a rebuild's source or target has.
    List,
    /// A rebuild's target is to give up what its pool has lost.
    GiveUp,
    /// A rebuild's target is to forget what is in its undo log.
    Forget,
    /// A rebuild's last step.
    Join,
    /// The undo log, for the write of this number; an answer to an earlier turn counts no more.
    Atomic(u16, u32),
}

#[derive(Debug)]
struct Question {
    serial: u32,
    child: ChildId,
    what: Asked,
    buf: Option<Buf>,
    /// For a flush: what the child had done when it was sent.
    covers: Option<u64>,
    since_ms: u64,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) child: ChildId,
    pub(crate) what: Asked,
    pub(crate) status: IoStatus,
    pub(crate) buf: Option<Buf>,
}

/// The questions that are open, and the answers that were not looked at.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {
    open: Vec<Question>,
    answered: Vec<Answered>,
    serial: u32,
}

impl Upkeep {
    pub(crate) fn in_use(&self) -> usize {
        self.open.len() + self.answered.len()
    }

    /// Whether a child still owes an answer to such a question.
    pub(crate) fn waits(&self, what: Asked) -> bool {
        self.open.iter().any(|q| q.what == what)
    }

    pub(crate) fn waits_for(&self, what: Asked, child: ChildId) -> bool {
        self.open.iter().any(|q| q.what == what && q.child == child)
    }

    /// Whether a child still owes an answer of an atomic write: of this one, or of any.
    pub(crate) fn waits_for_atomic(&self, key: Option<u16>, child: ChildId) -> bool {
        let of =
            |q: &&Question| matches!(q.what, Asked::Atomic(k, _) if key.is_none_or(|key| key == k));
        self.open.iter().filter(of).any(|q| q.child == child)
    }
}

impl Nexus {
    /// Blocks of the volume in logical extents, the last one perhaps not whole.
    pub(crate) fn extents(&self) -> u32 {
        u32::try_from(self.config.blocks.div_ceil(EXTENT_BLOCKS)).unwrap_or(u32::MAX)
    }

    /// Asks a child.
    pub(crate) fn ask_upkeep(&mut self, child: ChildId, what: Asked, op: ChildOp, now_ms: u64) {
        self.ask_with(child, what, op, None, now_ms);
    }

    /// Asks a child to flush.
    pub(crate) fn ask_flush(&mut self, child: ChildId, what: Asked, now_ms: u64) {
        let request =
            IoRequest { op: IoOp::Flush, range: LbaRange::default(), buf: BufSlice::EMPTY };
        self.ask_upkeep(child, what, ChildOp::Io(request), now_ms);
    }

    /// Asks a child about its extents from `first` on. False where there is no memory.
    pub(crate) fn ask_changes<M: Memory>(
        &mut self,
        child: ChildId,
        what: Asked,
        (first, since): (u32, u64),
        mem: &mut M,
        now_ms: u64,
    ) -> bool {
        let Some(buf) = mem.alloc(PAGE) else {
            self.mends.short = true;
            return false;
        };
        let op = ChildOp::Changes { first, since, buf: buf.slice() };
        self.ask_with(child, what, op, Some(buf), now_ms);
        true
    }

    pub(crate) fn ask_with(
        &mut self,
        child: ChildId,
        what: Asked,
        op: ChildOp,
        buf: Option<Buf>,
        now_ms: u64,
    ) {
        let flush = matches!(&op, ChildOp::Io(request) if request.op == IoOp::Flush);
        let covers = flush.then(|| self.child(child).written);
        self.upkeep.serial = (self.upkeep.serial + 1) & Ticket::UPKEEP_SERIALS;
        let serial = self.upkeep.serial;
        let since_ms = now_ms;
        self.upkeep.open.push(Question { serial, child, what, buf, covers, since_ms });
        self.child_ios.push_back(ChildIo { child, ticket: Ticket::upkeep(serial), op });
    }

    /// A question is answered; [`Nexus::run_mends`] looks at it.
    pub(crate) fn handle_upkeep(&mut self, child: ChildId, serial: u32, status: IoStatus) {
        let at = self.upkeep.open.iter().position(|q| q.serial == serial && q.child == child);
        let question = self.upkeep.open.swap_remove(at.expect("an answer to what was asked"));
        if let (true, Some(covers)) = (status.is_ok(), question.covers) {
            let c = self.child(child);
            c.flushed = c.flushed.max(covers);
        }
        self.child(child).suspect |= status == IoStatus::MediaError;
        if status == IoStatus::Fenced {
            self.fence();
        }
        let Question { what, buf, .. } = question;
        self.upkeep.answered.push(Answered { child, what, status, buf });
    }

    pub(crate) fn next_answer(&mut self) -> Option<Answered> {
        self.upkeep.answered.pop()
    }

    /// Children that owe an answer for longer than the limit.
    pub(crate) fn late_in_upkeep(&self, now_ms: u64) -> ChildSet {
        let limit = self.config.child_deadline_ms;
        let late = |q: &&Question| now_ms.saturating_sub(q.since_ms) >= limit;
        self.upkeep.open.iter().filter(late).fold(ChildSet::EMPTY, |set, q| set.with(q.child))
    }

    /// Whether everything that changes blocks, or flushes, and was begun before `before` is over, as far as
    /// these children go.
    pub(crate) fn drained(&self, before: u64, whom: ChildSet) -> bool {
        let slots = self.slots.iter().all(|(_, slot)| {
            let earlier = slot.order < before;
            let over = slot.phase == Phase::Answered && slot.outstanding.and(whom).is_empty();
            !earlier || over
        });
        slots && self.mends_drained(before, whom)
    }

    /// The number of the next change.
    pub(crate) fn take_order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }
}
