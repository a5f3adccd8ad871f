//! The devices of a pool: what they are doing, and how they come and go.

use cairn_block::{IoStatus, Memory, PoolDeviceId};

use super::control::{Change, Kind, Then};
use super::{INTERNAL, MAX_DEVICES, Member, MultiPool};
use crate::ControlError;
use crate::disk::MemberState;
use crate::pool::{Pool, PoolState, Usage};

/// How far a removal has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrainInfo {
    /// Extents that are still on the device.
    pub extents_left: u64,
    /// Why it does not go on; nothing where it does.
    pub stuck: Option<String>,
}

/// A device of a pool, to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberInfo {
    /// Its number while the pool is open. Nothing where it is not there.
    pub number: Option<u8>,
    /// Its id.
    pub id: PoolDeviceId,
    /// What it is to the pool.
    pub state: MemberState,
    /// What a person should know of that state.
    pub reason: String,
    /// How full it is. Nothing where it is not there.
    pub usage: Option<Usage>,
    /// Its length in bytes as far as the pool uses it, or zero.
    pub device_len: u64,
    /// Where it is being removed.
    pub drain: Option<DrainInfo>,
}

impl MultiPool {
    /// The devices: those that are there, then those that the pool is without.
    #[must_use]
    pub fn members(&self) -> Vec<MemberInfo> {
        let mut infos = Vec::new();
        for (at, member) in self.members.iter().enumerate() {
            let Some(member) = member else { continue };
            let drain = (member.role == MemberState::Draining).then(|| DrainInfo {
                extents_left: member.pool.extents_left(),
                stuck: self.why_stuck(at),
            });
            let reason = match (member.pool.state(), &drain) {
                (PoolState::Failed(_), _) if member.leaving => "it has left the pool".to_owned(),
                (PoolState::Failed(why), _) => {
                    format!("{why}; what only it holds cannot be read")
                }
                (_, Some(DrainInfo { stuck: Some(why), .. })) => why.clone(),
                (_, Some(drain)) => format!("{} extents left", drain.extents_left),
                _ => String::new(),
            };
            infos.push(MemberInfo {
                number: Some(u8::try_from(at).expect("at most 64 devices")),
                id: member.id,
                state: if member.failed && !member.leaving {
                    MemberState::Failed
                } else {
                    member.role
                },
                reason,
                usage: Some(member.pool.usage()),
                device_len: member.pool.device_len(),
                drain,
            });
        }
        for entry in &self.membership.members {
            if entry.state == MemberState::Removed || infos.iter().any(|i| i.id == entry.id) {
                continue;
            }
            infos.push(MemberInfo {
                number: None,
                id: entry.id,
                state: entry.state,
                reason: "the pool was opened without it; what only it held is lost".to_owned(),
                usage: None,
                device_len: 0,
                drain: None,
            });
        }
        infos
    }

    /// What the next device gets as its number: none that [`MultiPool::poll_gone`] has yet to tell of.
    #[must_use]
    pub fn next_number(&self) -> u8 {
        let number = |at: usize| u8::try_from(at).expect("at most 64 devices");
        let free = (0..self.members.len())
            .find(|&at| self.members[at].is_none() && !self.gone.contains(&number(at)));
        number(free.unwrap_or(self.members.len()))
    }

    /// Takes a device in that [`MultiPool::format_device`] made for this pool and that was opened by
    /// itself. It gets every replica and takes new extents from then on. Returns its number, under which
    /// its operations come; the answer to `tag` says whether it is a member.
    ///
    /// # Errors
    /// [`ControlError::Device`].
    pub fn add_device<M: Memory>(
        &mut self,
        tag: u64,
        pool: Pool,
        mem: &mut M,
    ) -> Result<u8, ControlError> {
        assert!(tag & INTERNAL == 0, "a caller's tag is below 2^63");
        let refuse = |why: String| Err(ControlError::Device(why));
        let id = pool.device_id();
        if pool.id() != self.id {
            return refuse(format!(
                "device {id} was made for pool {}, not for this one",
                pool.id()
            ));
        }
        if self.membership.state_of(id).is_some_and(MemberState::is_needed)
            || self.present().any(|m| m.id == id)
        {
            return refuse(format!("device {id} is in the pool already"));
        }
        if pool.membership().state_of(id) != Some(MemberState::Joining)
            || pool.replicas().next().is_some()
        {
            return refuse(format!("device {id} was not made to be added: format it anew"));
        }
        if pool.slot_count() < self.slots {
            return refuse(format!(
                "device {id} has {} replica slots, the pool {}: format it for this pool",
                pool.slot_count(),
                self.slots
            ));
        }
        let used = self.membership.members.iter().filter(|m| m.state.is_needed()).count();
        if used >= MAX_DEVICES || usize::from(self.next_number()) >= MAX_DEVICES {
            return refuse(format!("the pool has {used} devices; it can have {MAX_DEVICES}"));
        }
        if let PoolState::Failed(reason) = self.state() {
            return Err(ControlError::PoolFailed(reason));
        }
        let number = self.next_number();
        let mut member = Member::new(pool, MemberState::Joining);
        member.pool.keep_free(0, 0);
        if !self.verify {
            member.pool.disable_checksums_for_benchmark();
        }
        match self.members.get_mut(usize::from(number)) {
            Some(free) => *free = Some(member),
            None => self.members.push(Some(member)),
        }
        self.refresh_direct();
        self.push_job(Some(tag), Kind::Join { member: usize::from(number), registers: false });
        self.settle(mem);
        Ok(number)
    }

    /// Begins to remove a device: what it holds moves to the others, and then it leaves, by
    /// [`MultiPool::poll_gone`]. Answered when that has begun, durably; a removal that a crash cuts off
    /// goes on at the next open. A device that is not there any more is forgotten.
    pub fn remove_device<M: Memory>(&mut self, tag: u64, id: PoolDeviceId, mem: &mut M) {
        if let Err(why) = self.begin_removal(tag, id) {
            let error = Some(ControlError::Device(why));
            self.finish(Some(tag), IoStatus::InvalidField, error);
        }
        self.settle(mem);
    }

    fn begin_removal(&mut self, tag: u64, id: PoolDeviceId) -> Result<(), String> {
        let at = self.members.iter().position(|m| m.as_ref().is_some_and(|m| m.id == id));
        let Some(at) = at else {
            return match self.membership.state_of(id) {
                Some(MemberState::Failed) => {
                    let change = Change::Set(id, MemberState::Removed);
                    self.push_job(Some(tag), Kind::members(change, Then::Nothing));
                    Ok(())
                }
                _ => Err(format!("there is no device {id} in the pool")),
            };
        };
        let member = self.member(at);
        if member.leaving || member.role == MemberState::Joining {
            return Err(format!("device {id} is on its way in or out; wait for that to end"));
        }
        if member.role == MemberState::Failed {
            if !member.excluded {
                return Err(format!(
                    "device {id} failed, and no other device could take note of that yet"
                ));
            }
            let change = Change::Set(id, MemberState::Removed);
            self.push_job(Some(tag), Kind::members(change, Then::Left(at)));
            return Ok(());
        }
        if member.role == MemberState::Draining {
            // Asked again: what could not be copied is tried again.
            self.member_mut(at).drain.begin();
            self.finish(Some(tag), IoStatus::Ok, None);
            return Ok(());
        }
        self.member_mut(at).role = MemberState::Draining;
        if let Err(why) = self.check_removal(at) {
            self.member_mut(at).role = MemberState::Live;
            return Err(why);
        }
        self.keep_without(at);
        let change = Change::Set(id, MemberState::Draining);
        self.push_job(Some(tag), Kind::members(change, Then::Drains(at)));
        Ok(())
    }

    /// Whether the other devices have room for what a device that is to be removed has, and for what is promised.
    pub(super) fn check_removal(&self, at: usize) -> Result<(), String> {
        let id = self.member(at).id;
        // What other removals still have to move needs room as well.
        let leaving = |(_, m): &(usize, &Member)| m.role == MemberState::Draining;
        let needed: u64 = self.serving().filter(leaving).map(|(_, m)| m.pool.extents_left()).sum();
        let (mut others, mut free) = (0, 0);
        for (_, member) in self.serving().filter(|(_, m)| m.role == MemberState::Live) {
            others += 1;
            free += member.pool.usage().extents_free;
        }
        if others == 0 {
            return Err(format!(
                "device {id} is the last one of the pool that takes data; add another first"
            ));
        }
        if free < needed {
            return Err(format!(
                "{needed} MiB have to move and the other devices have {free} MiB free: add a \
                 device of at least {} MiB first, or delete replicas",
                needed - free
            ));
        }
        let (promise, to_come) = (self.promised(), self.promised_soon());
        let kept = promise.sum() + to_come;
        if kept > 0 && !self.fits(&promise, needed + to_come) {
            return Err(format!(
                "{needed} MiB have to move, {kept} MiB are kept for thick replicas, and the other devices \
                 have {free} MiB free: add a device first, or delete replicas",
            ));
        }
        Ok(())
    }

    /// The pool knows durably that it is without this device.
    pub(super) fn left(&mut self, at: usize) {
        self.lost = self.membership.clone();
        // All that was on it is flushed elsewhere, or lost.
        for bits in &mut self.unflushed {
            *bits &= !(1 << at);
        }
        if self.member(at).is_online() {
            self.member_mut(at).role = MemberState::Removed;
            self.push_job_first(Kind::Wipe { member: at });
        } else {
            self.member_mut(at).leaving = true;
        }
    }

    /// Lets devices go that have left and that nothing is in flight to.
    pub(super) fn pump_leaving<M: Memory>(&mut self, _mem: &mut M) {
        for at in 0..self.members.len() {
            let Some(member) = &self.members[at] else { continue };
            let busy = self.parts.iter().any(|(_, part)| part.is_on(at))
                || self.copies.iter().any(|copy| copy.is_on(at));
            if !member.leaving
                || busy
                || member.pool.at_device() > 0
                || !member.pool.done.is_empty()
            {
                continue;
            }
            self.members[at] = None;
            self.reserve_is_old = true;
            for bits in &mut self.unflushed {
                *bits &= !(1 << at);
            }
            self.gone.push_back(u8::try_from(at).expect("at most 64 devices"));
            self.share_limits();
            self.refresh_direct();
        }
    }
}
