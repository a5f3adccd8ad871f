//! Commands over several devices: each goes to all of them and is answered when all have it.
//!
//! Two kinds of command do not run beside each other. A *shared* one (a register, a checkpoint, a grow)
//! runs beside other shared ones; an *exclusive* one, which changes what replicas or devices there are,
//! runs alone, with no copy under way. They start in the order in which they came.
//!
//! What a crash cuts off, open settles: see `open.rs`.

use cairn_block::{IoStatus, Memory, PoolDeviceId};

use super::snapshot::Revert;
use super::{JOB, Member, MultiPool};
use crate::control::check_size;
use crate::disk::{CONFIG_MAX, MemberState, Membership};
use crate::pool::{Done, PoolState, Register, ReplicaSlot, ReplicaSpec};
use crate::{ControlError, SnapshotSpec};

/// A command on its way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: u32,
    /// Nobody, where nobody asked.
    pub(super) tag: Option<u64>,
    pub(super) kind: Kind,
    /// Answers of devices that are awaited.
    pub(super) waiting: u32,
    /// Devices that did it, and those that work and did not.
    pub(super) ok: u64,
    pub(super) refused: u64,
    pub(super) error: Option<(IoStatus, Option<ControlError>)>,
}

#[derive(Debug)]
pub(super) enum Kind {
    Create {
        spec: ReplicaSpec,
        slot: u16,
    },
    /// A create or a snapshot that some devices refused is taken back on the others.
    Undo,
    Delete(u16),
    Snapshot {
        slot: u16,
        spec: SnapshotSpec,
        /// The slot that it gets.
        with: u16,
    },
    DeleteSnapshot(u16),
    Revert(Revert),
    Resize(u16, u64),
    Register(u16, Register),
    Checkpoint,
    Grow {
        member: usize,
        len: u64,
    },
    /// A new list of devices goes to all of them; to the one that joins last of all, so that where it
    /// has it, everybody has.
    Members {
        change: Change,
        /// Made of the list as it is when the command's turn comes.
        next: Membership,
        joins: Option<usize>,
        then: Then,
    },
    /// A new device gets every replica, then their registers, and is a member then.
    Join {
        member: usize,
        registers: bool,
    },
    Wipe {
        member: usize,
    },
}

/// How the list of devices changes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Set(PoolDeviceId, MemberState),
    /// What the slot does not map may be lost, or is zeros.
    Lost(u16, bool),
    /// Without the devices that failed.
    Exclude,
}

/// What follows when a list of devices is durable.
#[derive(Debug)]
pub(super) enum Then {
    Nothing,
    Joined(usize),
    Drains(usize),
    Left(usize),
    /// The command that a slot was made ready for.
    Start(Box<Kind>),
    /// Devices that failed are left behind.
    Excluded,
    /// What they had of a slot is given up.
    GivenUp(u16),
}

impl Kind {
    pub(super) fn members(change: Change, then: Then) -> Self {
        Self::Members { change, next: Membership::default(), joins: None, then }
    }

    /// The replica whose requests it holds.
    fn holds(&self) -> Option<u16> {
        match self {
            Self::Snapshot { slot, .. } => Some(*slot),
            Self::Revert(revert) => Some(revert.slot),
            Self::Members { then: Then::Start(kind), .. } => kind.holds(),
            _ => None,
        }
    }

    /// The slot that it makes something new in.
    fn fills(&self) -> Option<u16> {
        match self {
            Self::Create { slot, .. } | Self::Snapshot { with: slot, .. } => Some(*slot),
            _ => None,
        }
    }

    pub(super) fn is_exclusive(&self) -> bool {
        !matches!(self, Self::Register(..) | Self::Checkpoint | Self::Grow { .. })
    }
}

impl MultiPool {
    /// Creates a replica: thin, and reading as zeros.
    pub fn create_replica<M: Memory>(&mut self, tag: u64, spec: ReplicaSpec, mem: &mut M) {
        self.push_job(Some(tag), Kind::Create { spec, slot: 0 });
        self.settle(mem);
    }

    /// Deletes a replica. Answered when there is no way back; its extents return after that.
    pub fn delete_replica<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, mem: &mut M) {
        self.push_job(Some(tag), Kind::Delete(slot.0));
        self.settle(mem);
    }

    /// Grows a replica to `blocks` blocks.
    pub fn resize_replica<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        blocks: u64,
        mem: &mut M,
    ) {
        self.push_job(Some(tag), Kind::Resize(slot.0, blocks));
        self.settle(mem);
    }

    /// Replaces a replica's register on every device. Two writes to one replica become durable in the
    /// order in which they came.
    pub fn write_register<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        register: Register,
        mem: &mut M,
    ) {
        self.push_job(Some(tag), Kind::Register(slot.0, register));
        self.settle(mem);
    }

    /// Gives up what a replica had on devices that are gone: what is mapped nowhere reads as zeros from now on,
    /// and can be written in part. For whoever copies to it what others have: a hole here that is none there, and
    /// whatever is open, needs it. Answered when it is durable.
    pub fn give_up_lost<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, mem: &mut M) {
        let kind = Kind::members(Change::Lost(slot.0, false), Then::GivenUp(slot.0));
        self.push_job(Some(tag), kind);
        self.settle(mem);
    }

    /// See [`crate::Pool::checkpoint`]: of every device.
    pub fn checkpoint<M: Memory>(&mut self, tag: u64, mem: &mut M) {
        self.push_job(Some(tag), Kind::Checkpoint);
        self.settle(mem);
    }

    /// Uses a device that has become `device_len` bytes long.
    pub fn grow<M: Memory>(&mut self, tag: u64, device: u8, device_len: u64, mem: &mut M) {
        self.push_job(Some(tag), Kind::Grow { member: usize::from(device), len: device_len });
        self.settle(mem);
    }

    pub(super) fn push_job(&mut self, tag: Option<u64>, kind: Kind) {
        let job = self.job(tag, kind);
        self.jobs.push_back(job);
    }

    /// Before all that waits.
    pub(super) fn push_job_first(&mut self, kind: Kind) {
        let job = self.job(None, kind);
        self.jobs.push_front(job);
    }

    fn job(&mut self, tag: Option<u64>, kind: Kind) -> Job {
        self.next_job = self.next_job.wrapping_add(1);
        Job { id: self.next_job, tag, kind, waiting: 0, ok: 0, refused: 0, error: None }
    }

    /// Whether a command waits that must not find copies under way.
    pub(super) fn wants_quiet(&self) -> bool {
        self.jobs.iter().chain(&self.active).any(|job| job.kind.is_exclusive())
    }

    /// Whether a device failed that the others do not know yet to go on without.
    pub(super) fn is_excluding(&self) -> bool {
        self.state == PoolState::Online
            && self.lead().is_some()
            && self.present().any(|m| {
                let away = m.excluded || m.leaving;
                let member = !matches!(m.role, MemberState::Removed | MemberState::Joining);
                !m.is_online() && member && !away
            })
    }

    /// Takes note of devices that failed.
    pub(super) fn notice_failures<M: Memory>(&mut self, mem: &mut M) {
        let mut found = false;
        for member in self.members.iter_mut().flatten() {
            let left = member.leaving || member.role == MemberState::Removed;
            if member.failed || left || member.is_online() {
                continue;
            }
            member.failed = true;
            if member.role != MemberState::Joining {
                member.role = MemberState::Failed;
                found = true;
            }
        }
        if !found {
            return;
        }
        self.recount_reserve();
        if self.lead().is_none() {
            let reason = self
                .present()
                .find_map(|m| match m.pool.state() {
                    PoolState::Failed(reason) => Some(reason),
                    PoolState::Online => None,
                })
                .unwrap_or("no device is left");
            self.fail(reason, mem);
        }
    }

    /// No device works any more.
    fn fail<M: Memory>(&mut self, reason: &'static str, mem: &mut M) {
        self.state = PoolState::Failed(reason);
        self.abort_copies(mem);
        self.give_up_waiting();
        for job in core::mem::take(&mut self.jobs) {
            self.finish(job.tag, IoStatus::MediaError, Some(ControlError::PoolFailed(reason)));
        }
        for done in core::mem::take(&mut self.held) {
            let error = Some(ControlError::PoolFailed(reason));
            self.done.push_back(Done { status: IoStatus::MediaError, error, ..done });
        }
    }

    /// Starts the commands whose turn it is.
    pub(super) fn pump_jobs<M: Memory>(&mut self, mem: &mut M) {
        loop {
            let exclusive = self.active.iter().any(|job| job.kind.is_exclusive());
            if exclusive {
                return;
            }
            if self.is_excluding() {
                if self.active.is_empty() {
                    self.exclude(mem);
                }
                return;
            }
            let Some(front) = self.jobs.front() else { return };
            if front.kind.is_exclusive() && !(self.active.is_empty() && self.copies.is_empty()) {
                return;
            }
            if let Some(slot) = front.kind.holds()
                && !self.is_at_rest(slot)
            {
                return;
            }
            if let Some(Job { kind: Kind::Revert(revert), .. }) = self.jobs.front()
                && revert.resumed
                && self.free_slot().is_err()
            {
                // What is being deleted gives a slot back.
                return;
            }
            let Some(job) = self.jobs.pop_front() else { return };
            self.start(job, mem);
        }
    }

    /// The membership without the devices that failed goes to the others. What had been mapped nowhere
    /// when the pool is next opened may have been on them.
    fn exclude<M: Memory>(&mut self, mem: &mut M) {
        let job = self.job(None, Kind::members(Change::Exclude, Then::Excluded));
        self.start(job, mem);
    }

    fn changed(&self, change: Change) -> Membership {
        let mut next = self.membership.clone();
        match change {
            Change::Set(id, state) => next.set(id, state),
            Change::Lost(slot, lost) => next.set_lost(slot, lost),
            Change::Exclude => {
                next.leave_behind();
                for member in self.present().filter(|m| m.role == MemberState::Failed) {
                    next.set(member.id, MemberState::Failed);
                }
                for slot in 0..self.slots {
                    if self.is_used(slot) {
                        next.set_lost(slot, true);
                    }
                }
                revive(&mut next);
            }
        }
        next.advance();
        next
    }

    fn start<M: Memory>(&mut self, mut job: Job, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            let error = ControlError::PoolFailed(reason);
            return self.finish(job.tag, IoStatus::MediaError, Some(error));
        }
        // What the command before has changed counts.
        self.pump_reserve();
        let checked = self.check_job(&mut job.kind).and_then(|()| self.keep_for(&job.kind));
        if let Err(error) = checked {
            match job.kind {
                Kind::Members { then: Then::Drains(at), .. } if self.still_serves(at) => {
                    self.member_mut(at).role = MemberState::Live;
                }
                Kind::Join { member, .. } => self.member_mut(member).leaving = true,
                Kind::Revert(revert) if revert.resumed => self.give_up_resumed(revert.slot, mem),
                _ => {}
            }
            let status = match error {
                ControlError::PoolFailed(_) => IoStatus::MediaError,
                ControlError::NoFreeSlot(_) | ControlError::NoRoom { .. } => IoStatus::NoSpace,
                _ => IoStatus::InvalidField,
            };
            return self.finish(job.tag, status, Some(error));
        }
        if let Some(slot) = job.kind.fills() {
            for member in self.members.iter_mut().flatten().filter(|m| m.failed) {
                member.give_up(slot);
            }
        }
        if let Some((slot, lost)) = self.inherits(&job.kind) {
            if self.membership.is_lost(slot) != lost {
                let kind = core::mem::replace(&mut job.kind, Kind::Checkpoint);
                job.kind = Kind::members(Change::Lost(slot, lost), Then::Start(Box::new(kind)));
            } else {
                self.lost.set_lost(slot, lost);
                self.refresh_direct();
            }
        }
        if let Kind::Revert(revert) = &mut job.kind {
            self.first_step(revert);
        }
        if let Kind::Members { change, next, .. } = &mut job.kind {
            *next = self.changed(*change);
        }
        let members: Vec<usize> = match &job.kind {
            Kind::Grow { member, .. } | Kind::Join { member, .. } | Kind::Wipe { member } => {
                vec![*member]
            }
            Kind::Members { next, joins, .. } => {
                // Not to one that leaves: it must not be the only one that knows.
                let stays = |id| next.state_of(id).is_some_and(MemberState::is_needed);
                self.serving()
                    .filter(|(i, m)| Some(*i) != *joins && stays(m.id))
                    .map(|(i, _)| i)
                    .collect()
            }
            _ => self.serving().map(|(i, _)| i).collect(),
        };
        if let Kind::Join { member, registers } = job.kind {
            return self.start_join(job, member, registers, mem);
        }
        if let Kind::Revert(revert) = &job.kind {
            job.waiting = self.ask_revert(revert, job.id, mem);
            if job.waiting == 0 {
                return self.job_over(job, mem);
            }
            return self.active.push(job);
        }
        job.waiting = u32::try_from(members.len()).expect("at most 64 devices");
        let tag = JOB | u64::from(job.id);
        for at in members {
            let pool = &mut self.member_mut(at).pool;
            match &job.kind {
                Kind::Create { spec, slot } => pool.create_in(tag, Some(*slot), spec.clone(), mem),
                Kind::Delete(slot) => pool.delete_replica(tag, ReplicaSlot(*slot), mem),
                Kind::Snapshot { slot, spec, with } => {
                    let slot = ReplicaSlot(*slot);
                    pool.create_snapshot_in(tag, Some(*with), slot, spec.clone(), mem);
                }
                Kind::DeleteSnapshot(slot) => pool.delete_snapshot(tag, ReplicaSlot(*slot), mem),
                Kind::Resize(slot, blocks) => {
                    pool.resize_replica(tag, ReplicaSlot(*slot), *blocks, mem);
                }
                Kind::Register(slot, register) => {
                    pool.write_register(tag, ReplicaSlot(*slot), register.clone(), mem);
                }
                Kind::Checkpoint => pool.checkpoint(tag, mem),
                Kind::Grow { len, .. } => pool.grow(tag, *len, mem),
                Kind::Members { next, .. } => pool.set_membership(tag, next.clone(), mem),
                Kind::Wipe { .. } => pool.wipe(tag, mem),
                Kind::Undo | Kind::Join { .. } | Kind::Revert(_) => {
                    unreachable!("started elsewhere")
                }
            }
        }
        if job.waiting == 0 {
            return self.job_over(job, mem);
        }
        self.active.push(job);
    }

    /// Refuses what every device would refuse, so that none is changed; and finds a slot for a create.
    fn check_job(&self, kind: &mut Kind) -> Result<(), ControlError> {
        let live = |slot: u16| self.live_blocks(slot).ok_or(ControlError::NoSuchReplica(slot));
        match kind {
            Kind::Create { spec, slot } => {
                *slot = self.check_create(spec)?;
            }
            Kind::Delete(slot) => {
                live(*slot)?;
            }
            Kind::Resize(slot, blocks) => {
                let has = live(*slot)?;
                check_size(self.block_size(*slot), *blocks)?;
                if *blocks < has {
                    return Err(ControlError::Shrink { has, asked: *blocks });
                }
            }
            Kind::Snapshot { slot, spec, with } => {
                live(*slot)?;
                *with = self.check_snapshot(*slot, spec)?;
            }
            Kind::DeleteSnapshot(slot) => {
                self.snapshot_blocks(*slot).ok_or(ControlError::NoSuchReplica(*slot))?;
            }
            Kind::Revert(revert) => {
                live(revert.slot)?;
                revert.with = self.check_revert(revert)?;
            }
            Kind::Register(slot, register) => {
                live(*slot)?;
                let len = register.config.len();
                if len > CONFIG_MAX {
                    return Err(ControlError::ConfigTooLong { len, max: CONFIG_MAX });
                }
            }
            Kind::Members { then: Then::GivenUp(slot), .. } => {
                live(*slot)?;
            }
            Kind::Members { then: Then::Drains(at), .. } if !self.still_serves(*at) => {
                let why = "the device has failed, or has left, meanwhile";
                return Err(ControlError::Device(why.to_owned()));
            }
            Kind::Members { then: Then::Drains(_), .. } if !self.takes_extents() => {
                let why = "the other devices have failed meanwhile: it is the last that takes data";
                return Err(ControlError::Device(why.to_owned()));
            }
            // The commands before may have taken the room.
            Kind::Members { then: Then::Drains(at), .. } => {
                self.check_removal(*at).map_err(ControlError::Device)?;
            }
            Kind::Grow { member, .. } if self.members.get(*member).is_none_or(Option::is_none) => {
                return Err(ControlError::Device("the device has left the pool".to_owned()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a device is there still, and serves: one that is to be removed may have left before it is its
    /// turn.
    fn still_serves(&self, at: usize) -> bool {
        self.members.get(at).and_then(Option::as_ref).is_some_and(Member::is_serving)
    }

    fn check_create(&self, spec: &ReplicaSpec) -> Result<u16, ControlError> {
        if self.find(spec.id).is_some() {
            return Err(ControlError::Exists(spec.id));
        }
        let slot = self.free_slot()?;
        for (_, member) in self.serving() {
            member.pool.check_create(spec, Some(slot))?;
        }
        Ok(slot)
    }

    /// Whether what a slot does not map may be lost once it is made, or has gone back: where that is so of what it
    /// is made of.
    fn inherits(&self, kind: &Kind) -> Option<(u16, bool)> {
        match kind {
            Kind::Create { spec, slot } => {
                let of = spec.source.and_then(|(replica, id)| self.find_snapshot(replica, id));
                Some((*slot, of.is_some_and(|of| self.membership.is_lost(of.0))))
            }
            Kind::Snapshot { slot, with, .. } => Some((*with, self.membership.is_lost(*slot))),
            Kind::Revert(revert) => {
                let replica = self.lead()?.page(revert.slot).replica;
                let to = self.find_snapshot(replica, revert.to);
                let lost = |slot| self.membership.is_lost(slot);
                Some((revert.slot, lost(revert.slot) || to.is_some_and(|to| lost(to.0))))
            }
            _ => None,
        }
    }

    /// Whether a slot holds a replica or a snapshot.
    fn is_used(&self, slot: u16) -> bool {
        self.serving().any(|(_, m)| m.pool.is_used(slot))
    }

    /// Whether a command holds the requests of a replica.
    pub(super) fn is_held(&self, slot: u16) -> bool {
        self.active.iter().chain(&self.jobs).any(|job| job.kind.holds() == Some(slot))
    }

    /// A new device gets every replica in its slot, and then, once that is durable, their registers.
    fn start_join<M: Memory>(&mut self, mut job: Job, at: usize, registers: bool, mem: &mut M) {
        let mut pages = Vec::new();
        for slot in 0..self.slots {
            let Some(lead) = self.lead() else { break };
            let mut page = lead.page(slot).clone();
            let kept = self.snapshot_blocks(slot).is_some() || lead.is_kept_for_others(slot);
            if kept && !registers {
                pages.push((slot, page, Register::default()));
            } else if let Some(blocks) = self.live_blocks(slot) {
                page.blocks = blocks;
                let register = self.register(ReplicaSlot(slot)).cloned().unwrap_or_default();
                pages.push((slot, page, register));
            }
        }
        if registers {
            pages.retain(|(_, _, register)| *register != Register::default());
        }
        job.waiting = u32::try_from(pages.len()).expect("at most 4096 slots");
        let tag = JOB | u64::from(job.id);
        let lead = self.lead();
        let parents: Vec<Option<u16>> =
            pages.iter().map(|(slot, ..)| lead.and_then(|lead| lead.parent_slot(*slot))).collect();
        let pool = &mut self.member_mut(at).pool;
        for ((slot, page, register), parent) in pages.into_iter().zip(parents) {
            if registers {
                pool.write_register(tag, ReplicaSlot(slot), register, mem);
            } else {
                pool.adopt_page(tag, slot, &page, parent, mem);
            }
        }
        if job.waiting == 0 {
            return self.job_over(job, mem);
        }
        self.active.push(job);
    }

    /// A device has answered.
    pub(super) fn job_answered<M: Memory>(
        &mut self,
        id: u32,
        member: usize,
        done: Done,
        mem: &mut M,
    ) {
        let at = self.active.iter().position(|j| j.id == id).expect("a command is answered once");
        let job = &mut self.active[at];
        job.waiting -= 1;
        if done.status.is_ok() {
            job.ok |= 1 << member;
        } else if self.members[member].as_ref().is_some_and(Member::is_online) {
            job.refused |= 1 << member;
            job.error.get_or_insert((done.status, done.error));
        }
        if self.active[at].waiting == 0 {
            let job = self.active.remove(at);
            self.job_over(job, mem);
        }
    }

    /// Every device has answered.
    fn job_over<M: Memory>(&mut self, job: Job, mem: &mut M) {
        if job.kind.is_exclusive() || matches!(job.kind, Kind::Grow { .. }) {
            self.recount_reserve();
        }
        let job = match job {
            Job { kind: Kind::Revert(revert), .. } => {
                let job = Job { kind: Kind::Undo, ..job };
                return self.revert_over(job, revert, mem);
            }
            job => job,
        };
        let Job { id, tag, kind, ok, error, .. } = job;
        let offline = || (IoStatus::MediaError, None);
        let one_failed = matches!(
            kind,
            Kind::Join { member, .. } | Kind::Wipe { member } | Kind::Grow { member, .. }
                if !self.member(member).is_online() && !matches!(kind, Kind::Wipe { .. } if ok != 0)
        );
        match kind {
            Kind::Create { slot, .. } | Kind::Snapshot { with: slot, .. }
                if error.is_some() && ok != 0 =>
            {
                let snapshot = matches!(kind, Kind::Snapshot { .. });
                let waiting = ok.count_ones();
                self.active.push(Job {
                    id,
                    tag,
                    kind: Kind::Undo,
                    waiting,
                    ok: 0,
                    refused: 0,
                    error,
                });
                let (tag, slot) = (JOB | u64::from(id), ReplicaSlot(slot));
                for at in (0..self.members.len()).filter(|at| ok >> at & 1 != 0) {
                    let pool = &mut self.member_mut(at).pool;
                    if snapshot {
                        pool.delete_snapshot(tag, slot, mem);
                    } else {
                        pool.delete_replica(tag, slot, mem);
                    }
                }
            }
            // Nobody has it, for nobody is left.
            Kind::Members { .. } if ok == 0 => {
                let (status, error) = error.unwrap_or_else(offline);
                self.finish(tag, status, error);
            }
            Kind::Members { change, next, joins: Some(joins), then } => {
                // Everybody else has it.
                let kind = Kind::Members { change, next: next.clone(), joins: None, then };
                self.active.push(Job { id, tag, kind, waiting: 1, ok, refused: 0, error });
                let pool = &mut self.member_mut(joins).pool;
                pool.set_membership(JOB | u64::from(id), next, mem);
            }
            Kind::Members { next, then, .. } => self.members_stored(tag, next, then, mem),
            Kind::Join { member, .. } if one_failed || error.is_some() => {
                self.member_mut(member).leaving = true;
                let (status, _) = error.unwrap_or_else(offline);
                let why = ControlError::Device("the new device failed; it was not added".into());
                self.finish(tag, status, Some(why));
            }
            Kind::Join { member, registers: false } => {
                let kind = Kind::Join { member, registers: true };
                let job = Job { id, tag, kind, waiting: 0, ok: 0, refused: 0, error: None };
                self.start_join(job, member, true, mem);
            }
            Kind::Join { member, .. } => {
                let kind = Kind::Members {
                    change: Change::Set(self.member(member).id, MemberState::Live),
                    next: Membership::default(),
                    joins: Some(member),
                    then: Then::Joined(member),
                };
                self.start(Job { id, tag, kind, waiting: 0, ok: 0, refused: 0, error: None }, mem);
            }
            Kind::Wipe { member } => {
                self.member_mut(member).leaving = true;
                self.finish(tag, IoStatus::Ok, None);
            }
            _ => {
                let (status, error) = match error {
                    Some(error) => error,
                    None if ok == 0 || one_failed => offline(),
                    None => (IoStatus::Ok, None),
                };
                self.finish(tag, status, error);
            }
        }
    }

    fn members_stored<M: Memory>(
        &mut self,
        tag: Option<u64>,
        next: Membership,
        then: Then,
        mem: &mut M,
    ) {
        self.membership = next;
        match then {
            Then::Nothing => {}
            Then::Joined(member) => {
                let joined = self.member_mut(member);
                joined.role =
                    if joined.is_online() { MemberState::Live } else { MemberState::Failed };
                self.share_limits();
            }
            Then::Drains(member) => {
                let member = self.member_mut(member);
                if member.role.is_needed() {
                    member.role = MemberState::Draining;
                }
                member.drain.begin();
            }
            Then::Left(member) => self.left(member),
            Then::Start(kind) => {
                let job = self.job(tag, *kind);
                return self.start(job, mem);
            }
            Then::Excluded => {
                let membership = &self.membership;
                for member in self.members.iter_mut().flatten() {
                    let state = membership.state_of(member.id);
                    member.excluded |= state == Some(MemberState::Failed);
                    if member.role == MemberState::Draining && state == Some(MemberState::Live) {
                        member.role = MemberState::Live;
                        member.drain = super::Drain::default();
                    }
                }
                // A device that failed tells what it held, but not of what was made when it failed.
                for slot in 0..self.slots {
                    let knows = |m: &Member| m.is_online() || m.pool.is_used(slot);
                    let known = !self.is_used(slot) || self.present().all(knows);
                    if !known && self.membership.is_lost(slot) {
                        self.lost.set_lost(slot, true);
                    }
                }
                if !self.is_excluding() {
                    self.done.extend(self.held.drain(..));
                }
            }
            Then::GivenUp(slot) => {
                self.lost.set_lost(slot, false);
                for member in self.members.iter_mut().flatten().filter(|m| m.excluded) {
                    member.give_up(slot);
                }
            }
        }
        self.refresh_direct();
        self.finish(tag, IoStatus::Ok, None);
    }

    /// Answers; or, where a device failed meanwhile, as soon as it cannot come back with what it missed.
    pub(super) fn finish(
        &mut self,
        tag: Option<u64>,
        status: IoStatus,
        error: Option<ControlError>,
    ) {
        let Some(tag) = tag else { return };
        let done = Done { tag, status, error };
        if self.is_excluding() && status.is_ok() {
            self.held.push(done);
        } else {
            self.done.push_back(done);
        }
    }
}

/// Where the last devices that take new extents are gone, those that were being removed stay.
pub(super) fn revive(next: &mut Membership) {
    if next.members.iter().any(|m| m.state == MemberState::Live) {
        return;
    }
    for member in &mut next.members {
        if member.state == MemberState::Draining {
            member.state = MemberState::Live;
        }
    }
}
