//! Snapshots over several devices, and going back to them.
//!
//! What is taken must be of one point in time. Each device holds still by itself, but not at the same
//! moment; so requests to the replica wait here from the call on, those that had begun are answered first, and
//! only then the devices are asked. Layers are each device's own: only the slots are the same everywhere.
//!
//! Going back cannot be undone where it is done, so a crash must not leave it done on some devices
//! without a trace. First every device takes durable note that it is to come, then each does it, which
//! turns the note into another one, and then all forget it. Open completes it where a device has done
//! it, and else forgets it.

use cairn_block::{IoStatus, Memory, SnapshotId};

use super::control::{Job, Kind};
use super::{JOB, MultiPool};
use crate::disk::{FLAG_REVERTED, FLAG_REVERTING};
use crate::pool::{PoolState, ReplicaSlot};
use crate::{ControlError, SnapshotSpec};

/// Why a device goes offline that refuses to go back to a snapshot as the others did.
const DIFFERS: &str = "it could not go back to a snapshot that the other devices went back to";

/// Going back to a snapshot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Revert {
    pub(super) slot: u16,
    pub(super) to: SnapshotId,
    /// Takes what is given up.
    pub(super) with: u16,
    pub(super) step: Step,
    /// A crash had cut it off: it has to be done.
    pub(super) resumed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Every device takes note of what is to come.
    Mark,
    /// Every device goes back.
    Switch,
    /// Every device forgets it.
    Clear,
}

impl MultiPool {
    /// Takes a snapshot of a replica: what every request that was answered before has left, on all
    /// devices. Requests that come while it is taken wait for it.
    pub fn create_snapshot<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        spec: SnapshotSpec,
        mem: &mut M,
    ) {
        self.hold(tag, slot, Kind::Snapshot { slot: slot.0, spec, with: 0 }, mem);
    }

    /// Deletes a snapshot. Answered when there is no way back; its space returns after that.
    pub fn delete_snapshot<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, mem: &mut M) {
        self.push_job(Some(tag), Kind::DeleteSnapshot(slot.0));
        self.settle(mem);
    }

    /// Takes a replica back to one of its snapshots: all that was written since is given up.
    pub fn revert<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        snapshot: SnapshotId,
        mem: &mut M,
    ) {
        let (step, resumed) = (Step::Mark, false);
        let revert = Revert { slot: slot.0, to: snapshot, with: 0, step, resumed };
        self.hold(tag, slot, Kind::Revert(revert), mem);
    }

    fn hold<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, kind: Kind, mem: &mut M) {
        if self.is_held(slot.0) {
            // What waits for the first one would be on the wrong side of the second.
            let error = Some(ControlError::SnapshotUnderWay);
            self.finish(Some(tag), IoStatus::InvalidField, error);
        } else {
            self.push_job(Some(tag), kind);
        }
        self.settle(mem);
    }

    /// Does on the devices that have not done it what others have.
    pub(super) fn resume_revert(&mut self, slot: u16, to: SnapshotId) {
        let step = Step::Switch;
        self.push_job(None, Kind::Revert(Revert { slot, to, with: 0, step, resumed: true }));
    }

    /// Whether a replica is going back to a snapshot, or is to.
    pub(super) fn is_going_back(&self, slot: u16) -> bool {
        let goes = |job: &Job| matches!(&job.kind, Kind::Revert(revert) if revert.slot == slot);
        self.active.iter().chain(&self.jobs).any(goes)
    }

    pub(super) fn check_snapshot(
        &self,
        slot: u16,
        spec: &SnapshotSpec,
    ) -> Result<u16, ControlError> {
        let with = self.free_slot()?;
        for (_, member) in self.serving() {
            member.pool.check_snapshot(ReplicaSlot(slot), spec, Some(with))?;
        }
        Ok(with)
    }

    pub(super) fn check_revert(&self, revert: &Revert) -> Result<u16, ControlError> {
        let with = self.free_slot()?;
        for (_, member) in self.serving() {
            if member.pool.page(revert.slot).flags & FLAG_REVERTED == 0 {
                member.pool.check_revert(ReplicaSlot(revert.slot), revert.to, Some(with))?;
            }
        }
        Ok(with)
    }

    /// A slot that is free on every device.
    pub(super) fn free_slot(&self) -> Result<u16, ControlError> {
        (0..self.slots)
            .find(|&slot| self.serving().all(|(_, m)| m.pool.is_slot_free(slot)))
            .ok_or(ControlError::NoFreeSlot(usize::from(self.slots)))
    }

    // ---- holding still

    /// Whether nothing is in flight to a replica that is held.
    pub(super) fn is_at_rest(&self, slot: u16) -> bool {
        // The only device holds still by itself what passes straight through to it.
        !self.has_requests(slot) && (self.direct.is_some() || self.direct_io == 0)
    }

    /// Lets requests go on that nothing holds any more.
    pub(super) fn go_on<M: Memory>(&mut self, mem: &mut M) {
        for _ in 0..self.waiting.len() {
            let Some((tag, slot, request)) = self.waiting.pop_front() else { return };
            if self.is_held(slot.0) {
                self.waiting.push_back((tag, slot, request));
            } else {
                self.pass(tag, slot, request, mem);
            }
        }
    }

    /// The pool failed: what was held is answered.
    pub(super) fn give_up_waiting(&mut self) {
        for (tag, ..) in core::mem::take(&mut self.waiting) {
            self.answer(tag, IoStatus::MediaError);
        }
    }

    // ---- going back

    /// Asks the devices for the next step. Returns on how many.
    pub(super) fn ask_revert<M: Memory>(&mut self, revert: &Revert, id: u32, mem: &mut M) -> u32 {
        let members: Vec<usize> = self.serving().map(|(at, _)| at).collect();
        let tag = JOB | u64::from(id);
        let mut asked = 0;
        for at in members {
            let pool = &mut self.member_mut(at).pool;
            let flags = pool.page(revert.slot).flags;
            match revert.step {
                Step::Mark => pool.mark_revert(tag, revert.slot, Some(revert.to), mem),
                Step::Switch if flags & FLAG_REVERTED != 0 => continue,
                Step::Switch => {
                    let slot = ReplicaSlot(revert.slot);
                    pool.revert_in(tag, Some(revert.with), slot, revert.to, mem);
                }
                Step::Clear if flags & (FLAG_REVERTED | FLAG_REVERTING) == 0 => continue,
                Step::Clear => pool.mark_revert(tag, revert.slot, None, mem),
            }
            asked += 1;
        }
        asked
    }

    /// The first step that there is: a note is of use where there are several devices.
    pub(super) fn first_step(&self, revert: &mut Revert) {
        if revert.step == Step::Mark && self.serving().count() == 1 {
            revert.step = Step::Switch;
        }
    }

    /// Every device has answered.
    pub(super) fn revert_over<M: Memory>(&mut self, mut job: Job, revert: Revert, mem: &mut M) {
        let (ok, refused) = (job.ok, job.refused);
        let step = match revert.step {
            Step::Mark if job.error.is_none() && ok != 0 => Step::Switch,
            Step::Mark => Step::Clear,
            Step::Switch => {
                if revert.resumed && refused != 0 {
                    self.give_up_resumed(revert.slot, mem);
                } else if ok != 0 && refused != 0 {
                    for at in (0..self.members.len()).filter(|at| refused >> at & 1 != 0) {
                        self.member_mut(at).pool.fail(DIFFERS, mem);
                    }
                    job.error = None;
                }
                Step::Clear
            }
            Step::Clear => return self.revert_ended(job, revert.slot),
        };
        if ok == 0 && job.error.is_none() && !(revert.resumed && step == Step::Clear) {
            job.error = Some((IoStatus::MediaError, None));
        }
        let revert = Revert { step, ..revert };
        if self.state != PoolState::Online {
            return self.revert_ended(job, revert.slot);
        }
        job.waiting = self.ask_revert(&revert, job.id, mem);
        (job.ok, job.refused) = (0, 0);
        if job.waiting == 0 {
            return self.revert_ended(job, revert.slot);
        }
        job.kind = Kind::Revert(revert);
        self.active.push(job);
    }

    /// Devices that cannot follow those that have gone back must not be read.
    pub(super) fn give_up_resumed<M: Memory>(&mut self, slot: u16, mem: &mut M) {
        for member in self.members.iter_mut().flatten().filter(|m| m.is_serving()) {
            if member.pool.page(slot).flags & FLAG_REVERTED == 0 {
                member.pool.fail(DIFFERS, mem);
            }
        }
    }

    fn revert_ended(&mut self, job: Job, slot: u16) {
        // A device that failed tells what the replica had there before, not what the snapshot has.
        if self.present().any(|m| !m.is_online()) {
            self.lost.set_lost(slot, true);
            self.refresh_direct();
        }
        let (status, error) = job.error.unwrap_or((IoStatus::Ok, None));
        self.finish(job.tag, status, error);
    }
}
