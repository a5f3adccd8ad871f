//! Settling: what was written becomes known to be alike, and on stable storage, everywhere.
//!
//! A replica marks an extent open before it changes it. A round takes the marks back: every member in sync
//! (and the target of a rebuild) begins it, whereupon what is open there is a candidate; some time is let go
//! by; all changes that were submitted before the last of them had begun are waited for; everybody flushes;
//! and then each takes back the marks of the candidates that were not written meanwhile. So a mark is cleared
//! only after a flush that all members acknowledged covers it, and nothing is held up. What is written all
//! the time stays open: to open it anew the next write would have to wait for a record.
//!
//! The extents whose marks are taken back get the generation of the configuration as their stamp. Whoever
//! left the in-sync set by that configuration or an earlier one was not among those that flushed. So it may
//! lack what is stamped with the generation in which it left, or a later one, or is still open; and
//! nothing else.
//!
//! A round is also how a rebuild remembers how far it is: between the flush and the end, the
//! configuration says what the target has.

use cairn_block::IoStatus;
use cairn_block::mutants::{Mutant, on};

use crate::nexus::Nexus;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp, VolumeState};
use crate::upkeep::Asked;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Stage {
    #[default]
    Idle,
    /// Members are told that the round begins.
    Begin,
    /// It is seen what is written again.
    Hold,
    /// Changes that were submitted before are waited for.
    Drain,
    Flush,
    /// It is being stored how far the rebuild is.
    Commit,
    /// Members take marks back.
    End,
}

#[derive(Debug, Default)]
pub(crate) struct Settle {
    stage: Stage,
    round: u64,
    members: ChildSet,
    /// The target of a rebuild, and how far it is.
    target: Option<(ChildId, u32)>,
    before: u64,
    /// It is seen until then what is written again.
    hold_ms: u64,
    failed: bool,
    /// The next round is to begin then; none where nothing was written.
    due_ms: Option<u64>,
    /// Rounds that came to their end.
    pub(crate) rounds: u64,
}

impl Settle {
    pub(crate) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }
}

impl Nexus {
    /// Something is being written.
    pub(crate) fn note_change(&mut self, now_ms: u64) {
        if self.settle.due_ms.is_none() {
            self.settle.due_ms = Some(now_ms + self.half_ms());
        }
    }

    /// A round begins so long after a write, and takes so long at least.
    fn half_ms(&self) -> u64 {
        self.config.pace.settle_ms / 2
    }

    /// A round is to remember how far the rebuild is.
    pub(crate) fn settle_by(&mut self, at_ms: u64) {
        let due = self.settle.due_ms.map_or(at_ms, |due| due.min(at_ms));
        self.settle.due_ms = Some(due);
        self.settle.hold_ms = self.settle.hold_ms.min(at_ms);
    }

    pub(crate) fn settle_timeout(&self, now_ms: u64) -> Option<u64> {
        let due = match self.settle.stage {
            Stage::Hold => Some(self.settle.hold_ms),
            Stage::Idle => self.settle.due_ms,
            _ => None,
        };
        let due = due.filter(|_| self.settle_may())?;
        Some(if due > now_ms { due } else { now_ms + self.config.pace.settle_ms })
    }

    /// Whether marks may be taken back: every member of the stored configuration is there, and nothing of an
    /// earlier nexus is left that may differ.
    fn settle_may(&self) -> bool {
        matches!(self.state, VolumeState::Online | VolumeState::Degraded)
            && self.assembly.is_none()
            && self.reconcile.is_none()
            && self.commit.is_none()
            && self.in_sync.iter().all(|c| self.is_usable(c))
    }

    /// Moves the round on. Returns whether anything changed.
    pub(crate) fn pump_settle(&mut self, now_ms: u64) -> bool {
        let due = self.settle.due_ms.is_some_and(|due| now_ms >= due);
        if self.settle.is_idle() {
            return due && self.settle_may() && self.begin_round(now_ms);
        }
        if self.settle.members != self.in_sync
            || !self.in_sync.iter().all(|c| self.is_usable(c))
            || self.settle.failed
        {
            return self.give_up_round(now_ms);
        }
        if let Some((target, _)) = self.settle.target
            && self.mirror() != Some(target)
        {
            self.settle.target = None;
        }
        // One that is out and hangs is not waited for.
        let whom = self.taking_part();
        if whom.iter().any(|child| self.upkeep.waits_for(Asked::Settle, child)) {
            return false;
        }
        match self.settle.stage {
            Stage::Idle => false,
            Stage::Begin => {
                self.settle.before = self.take_order();
                // How far a rebuild is is remembered soon.
                let soon = self.settle.target.is_some() || due;
                let hold_ms = if soon { 0 } else { self.half_ms() };
                self.settle.hold_ms = now_ms + hold_ms;
                self.settle.stage = Stage::Hold;
                true
            }
            Stage::Hold => {
                let over = now_ms >= self.settle.hold_ms;
                if over {
                    self.settle.stage = Stage::Drain;
                }
                over
            }
            Stage::Drain => {
                if !self.drained(self.settle.before, whom) && !on(Mutant::SettleWithoutDrain) {
                    return false;
                }
                self.settle.stage = Stage::Flush;
                let flushes = !on(Mutant::SettleWithoutFlush);
                for child in whom.iter().filter(|_| flushes) {
                    self.ask_flush(child, Asked::Settle, now_ms);
                }
                true
            }
            Stage::Flush => match self.settle.target {
                Some(_) if self.commit.is_some() => false,
                Some((target, copied)) => {
                    self.child(target).cursor = Some(copied);
                    self.settle.stage = Stage::Commit;
                    self.commit_target(self.in_sync);
                    true
                }
                None => self.end_round(now_ms),
            },
            // Where another configuration was stored in its place, that one said it too.
            Stage::Commit => self.commit.is_none() && self.end_round(now_ms),
            Stage::End => {
                self.settle.stage = Stage::Idle;
                self.settle.rounds += 1;
                true
            }
        }
    }

    fn taking_part(&self) -> ChildSet {
        let target = self.settle.target.map_or(ChildSet::EMPTY, |(child, _)| ChildSet::of(child));
        self.settle.members.or(target)
    }

    fn begin_round(&mut self, now_ms: u64) -> bool {
        let s = &mut self.settle;
        s.round += 1;
        s.stage = Stage::Begin;
        s.failed = false;
        s.due_ms = None;
        s.members = self.in_sync;
        s.target = None;
        if let Some((child, copied)) = self.rebuilt_so_far() {
            self.settle.target = Some((child, copied));
        }
        let round = self.settle.round;
        for child in self.taking_part().iter() {
            self.ask_upkeep(child, Asked::Settle, ChildOp::SettleBegin { round }, now_ms);
        }
        // Where nobody reads, voters without data are heard of by this alone.
        self.renew_if_due(now_ms);
        true
    }

    /// Everybody that takes part has it all on stable storage.
    fn end_round(&mut self, now_ms: u64) -> bool {
        if self.commit.is_some() {
            // Who is on its way out has not taken part in vain: what it lacks is stamped later.
            return false;
        }
        self.settle.stage = Stage::End;
        let stamp = if on(Mutant::StampForgotten) { 0 } else { self.generation };
        let round = self.settle.round;
        for child in self.settle.members.iter() {
            let op = ChildOp::SettleEnd { round, stamp, below: u32::MAX };
            self.ask_upkeep(child, Asked::Settle, op, now_ms);
        }
        // What is open at the target beyond what was copied is from before: it is copied because of that.
        if let Some((target, below)) = self.settle.target {
            let op = ChildOp::SettleEnd { round, stamp, below };
            self.ask_upkeep(target, Asked::Settle, op, now_ms);
        }
        true
    }

    /// The target of a rebuild lacks something from this extent on that it had when the round began.
    pub(crate) fn settle_is_behind(&mut self, extent: u32) {
        self.settle.target.take_if(|&mut (_, copied)| extent < copied);
    }

    fn give_up_round(&mut self, now_ms: u64) -> bool {
        self.settle.stage = Stage::Idle;
        self.settle.failed = false;
        self.settle.due_ms = Some(now_ms + self.config.pace.settle_ms);
        true
    }

    pub(crate) fn settle_answered(&mut self, child: ChildId, status: IoStatus) {
        let target = self.settle.target.is_some_and(|(target, _)| target == child);
        if !status.is_ok() && !target {
            self.settle.failed = true;
        } else if !status.is_ok() {
            self.settle.target = None;
        }
    }
}
