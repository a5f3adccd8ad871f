//! Room for thick replicas, over several devices.
//!
//! What a thick replica has yet to write can be on any device, but where a snapshot beneath it has an extent:
//! there it has to be on the snapshot's device. So of what is kept free on each device one part is *bound* to
//! it, and of the rest each has a share, after the room that it has. A device counts its part down itself as
//! its extents are allocated; the shares are set anew when replicas, snapshots or devices come or go.
//!
//! What is bound to a device that is being removed is kept there, and on the others as well: for it is to be
//! wherever its snapshots' extents go.

use super::control::{Kind, Then};
use super::snapshot::Revert;
use super::{Member, MultiPool};
use crate::ControlError;
use crate::disk::{EXTENT, MemberState};
use crate::pool::ReplicaSlot;

/// What is to be kept free.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Promise {
    /// By device: what cannot be on another.
    bound: Vec<u64>,
    /// What can be on any.
    loose: u64,
    /// By device: what comes back there and is not to go to others.
    returning: Vec<u64>,
}

impl Promise {
    pub(super) fn sum(&self) -> u64 {
        self.bound.iter().sum::<u64>() + self.loose
    }
}

impl MultiPool {
    /// Whether a device takes new extents.
    fn keeps(&self, at: usize) -> bool {
        self.members[at].as_ref().is_some_and(|m| m.is_serving() && m.role == MemberState::Live)
    }

    /// What the thick replicas that there are have yet to write.
    pub(super) fn promised(&self) -> Promise {
        let none = vec![0; self.members.len()];
        let mut promise = Promise { bound: none.clone(), loose: 0, returning: none };
        for slot in 0..self.slots {
            let Some((extents, _)) = self.lead().and_then(|lead| lead.thick(slot)) else {
                continue;
            };
            let here = self.present().filter_map(|m| m.pool.thick(slot)).map(|(_, here)| here);
            let here = here.sum::<u64>().saturating_sub(self.copied_of(slot));
            let mut left = extents.saturating_sub(here);
            for at in (0..self.members.len()).filter(|&at| self.keeps(at)) {
                let bound = self.member(at).pool.bound_by(slot).min(left);
                promise.bound[at] += bound;
                left -= bound;
            }
            promise.loose += left;
        }
        promise
    }

    /// Whether a command needs more room to be kept than there is. Otherwise it is kept from here on.
    pub(super) fn keep_for(&mut self, kind: &Kind) -> Result<(), ControlError> {
        if !self.is_shared() {
            // The only device sees to it itself.
            return Ok(());
        }
        let mut promise = self.promised();
        let before = promise.sum();
        match kind {
            Kind::Create { spec, .. } if spec.thick => {
                let mut left = spec.block_size.bytes_of(spec.blocks).div_ceil(EXTENT);
                let source = spec.source.and_then(|(of, id)| self.find_snapshot(of, id));
                if let Some(ReplicaSlot(source)) = source {
                    for at in 0..self.members.len() {
                        let there = self.members[at].as_ref().filter(|m| m.is_serving());
                        let Some(there) = there else { continue };
                        let bound = there.pool.bound_on_top_of(source).min(left);
                        if self.keeps(at) {
                            promise.bound[at] += bound;
                            left -= bound;
                            continue;
                        }
                        // Until the snapshot has left it.
                        let (needed, free) =
                            (self.bound_on(at) + bound, there.pool.extents_available());
                        if needed > free {
                            return Err(ControlError::NoRoom { needed, free });
                        }
                    }
                }
                promise.loose += left;
            }
            Kind::Resize(slot, blocks) => {
                let Some((extents, _)) = self.lead().and_then(|lead| lead.thick(*slot)) else {
                    return Ok(());
                };
                let grown = self.block_size(*slot).bytes_of(*blocks).div_ceil(EXTENT);
                promise.loose += grown.saturating_sub(extents);
            }
            // All that it has written it may write again, over the snapshot: on a device that is being removed
            // until the snapshot has left it, and then elsewhere.
            Kind::Snapshot { slot, .. } => {
                for at in 0..self.members.len() {
                    let there = self.members[at].as_ref().filter(|m| m.is_serving());
                    let Some((_, here)) = there.and_then(|m| m.pool.thick(*slot)) else { continue };
                    if self.keeps(at) {
                        promise.bound[at] += here;
                        continue;
                    }
                    promise.loose += here;
                    let (needed, free) =
                        (self.bound_on(at) + here, self.member(at).pool.extents_available());
                    if needed > free {
                        return Err(ControlError::NoRoom { needed, free });
                    }
                }
            }
            Kind::Revert(revert) => return self.keep_for_revert(revert, promise),
            _ => return Ok(()),
        }
        if promise.sum() > before {
            let free = self.room_beyond(before);
            if !self.fits(&promise, 0) {
                return Err(ControlError::NoRoom { needed: promise.sum() - before, free });
            }
            self.keep(&promise);
            if let Kind::Snapshot { slot, .. } = kind {
                self.keep_on_draining(*slot);
            }
        }
        Ok(())
    }

    /// What a thick replica goes back to may be on a device without room for it to be written over. What it
    /// gives up comes back on one device sooner than on another: it is kept for it, whatever room there is.
    fn keep_for_revert(
        &mut self,
        revert: &Revert,
        mut promise: Promise,
    ) -> Result<(), ControlError> {
        let replica = self.lead().map(|lead| lead.page(revert.slot).replica);
        let to = replica.and_then(|replica| self.find_snapshot(replica, revert.to));
        for at in 0..self.members.len() {
            let Some(member) = self.members[at].as_ref().filter(|m| m.is_serving()) else {
                continue;
            };
            let Some((_, here)) = member.pool.thick(revert.slot) else { continue };
            let bound = if self.keeps(at) { promise.bound[at] } else { self.bound_on(at) };
            let after = to.map_or(0, |to| member.pool.bound_on_top_of(to.0));
            let needed = bound - member.pool.bound_by(revert.slot).min(bound) + after;
            let free = member.pool.extents_available() + here;
            if needed > free && !revert.resumed {
                return Err(ControlError::NoRoom { needed, free });
            }
            if self.keeps(at) {
                promise.bound[at] = needed.max(bound);
                promise.returning[at] = here;
            }
        }
        self.keep(&promise);
        Ok(())
    }

    /// What commands under way will promise.
    pub(super) fn promised_soon(&self) -> u64 {
        let lead = |slot: u16| self.lead().and_then(|lead| lead.thick(slot));
        let of = |kind: &Kind| match kind {
            Kind::Create { spec, .. } if spec.thick => {
                spec.block_size.bytes_of(spec.blocks).div_ceil(EXTENT)
            }
            Kind::Resize(slot, blocks) => lead(*slot).map_or(0, |(extents, _)| {
                let grown = self.block_size(*slot).bytes_of(*blocks).div_ceil(EXTENT);
                grown.saturating_sub(extents)
            }),
            Kind::Snapshot { slot, .. } => {
                self.present().filter_map(|m| m.pool.thick(*slot)).map(|(_, here)| here).sum()
            }
            _ => 0,
        };
        let kinds = self.active.iter().map(|job| match &job.kind {
            Kind::Members { then: Then::Start(kind), .. } => kind,
            kind => kind,
        });
        kinds.map(of).sum()
    }

    /// What thick replicas may write only on this device.
    fn bound_on(&self, at: usize) -> u64 {
        (0..self.slots).map(|slot| self.member(at).pool.bound_by(slot)).sum()
    }

    /// Of a replica that is to have a snapshot beneath it.
    fn keep_on_draining(&mut self, slot: u16) {
        for at in 0..self.members.len() {
            let there = self.members[at].as_ref().filter(|m| m.is_serving());
            if let (Some((_, here)), false) =
                (there.and_then(|m| m.pool.thick(slot)), self.keeps(at))
            {
                let bound = self.bound_on(at) + here;
                self.member_mut(at).pool.keep_free(bound, 0);
            }
        }
    }

    /// Room on the devices that take extents, less what is kept of it.
    pub(super) fn room_beyond(&self, kept: u64) -> u64 {
        self.available().saturating_sub(kept)
    }

    fn available(&self) -> u64 {
        (0..self.members.len())
            .filter(|&at| self.keeps(at))
            .map(|at| self.member(at).pool.extents_available())
            .sum()
    }

    /// Whether there is room for all that is promised, and so much besides.
    pub(super) fn fits(&self, promise: &Promise, besides: u64) -> bool {
        let bound = |at: usize| promise.bound[at] <= self.member(at).pool.extents_available();
        (0..self.members.len()).filter(|&at| self.keeps(at)).all(bound)
            && self.available() >= promise.sum() + besides
    }

    /// Asserts that what is kept is at least what is promised.
    pub(super) fn check_reserve(&self) {
        let busy = self.reserve_is_old || !self.copies.is_empty() || self.wants_quiet();
        // Where devices failed there may be no room for what they took.
        if busy || !self.is_shared() || self.has_failed() {
            return;
        }
        let kept = (0..self.members.len()).filter(|&at| self.keeps(at));
        let kept: u64 = kept.map(|at| self.member(at).pool.usage().extents_reserved).sum();
        let promised = self.promised();
        assert!(kept >= promised.sum(), "{kept} extents are kept for {promised:?}");
    }

    fn is_shared(&self) -> bool {
        self.serving().nth(1).is_some()
    }

    /// Something changed that the reserve depends on. It is counted when no extent is on its way.
    pub(super) fn recount_reserve(&mut self) {
        self.reserve_is_old = true;
    }

    pub(super) fn pump_reserve(&mut self) {
        // What a command under way needs is kept since it began.
        let begun = self.active.iter().any(|job| job.kind.is_exclusive());
        if self.reserve_is_old && self.copies.is_empty() && !begun {
            self.reserve_is_old = false;
            self.share_reserve();
        }
        self.take_from_draining();
        // Where it is not all there yet, what comes back belongs to it.
        if let Some(before) = self.reserve_lacks
            && before != self.available()
            && !begun
        {
            self.share_reserve();
        }
    }

    /// What is kept on a device that is to be removed is kept on the others from now on.
    pub(super) fn keep_without(&mut self, at: usize) {
        if self.copies.is_empty() && !self.active.iter().any(|job| job.kind.is_exclusive()) {
            return self.share_reserve();
        }
        // What a command or a move under way needs is kept besides, and counted when it is over.
        for _ in 0..self.member(at).pool.bound {
            if let Some(to) = self.roomiest() {
                self.member_mut(to).pool.move_loose(true);
            }
        }
        self.recount_reserve();
        self.take_from_draining();
    }

    /// The device for new extents with the most room.
    fn roomiest(&self) -> Option<usize> {
        let room = |&to: &usize| {
            let pool = &self.member(to).pool;
            (pool.extents_unreserved(), pool.extents_available())
        };
        (0..self.members.len()).filter(|&to| self.keeps(to)).max_by_key(room)
    }

    /// What thick replicas give back on a device that is being removed they may write again, on another.
    fn take_from_draining(&mut self) {
        for at in 0..self.members.len() {
            let draining = |m: &&Member| m.role == MemberState::Draining && m.is_serving();
            let loose = self.members[at].as_ref().filter(draining).map_or(0, |m| m.pool.loose());
            for _ in 0..loose {
                let Some(to) = self.roomiest() else { return };
                self.member_mut(at).pool.move_loose(false);
                self.member_mut(to).pool.move_loose(true);
            }
        }
    }

    /// Has each device keep free what is its part.
    pub(super) fn share_reserve(&mut self) {
        if self.is_shared() {
            let promise = self.promised();
            self.keep(&promise);
        } else {
            for member in self.members.iter_mut().flatten() {
                if member.is_serving() {
                    member.pool.keep_alone();
                } else {
                    member.pool.keep_free(0, 0);
                }
            }
            self.reserve_lacks = None;
        }
    }

    fn keep(&mut self, promise: &Promise) {
        let room = |pool: &Self, at: usize| {
            let available = pool.member(at).pool.extents_available();
            if pool.keeps(at) { available.saturating_sub(promise.bound[at]) } else { 0 }
        };
        let rooms: Vec<u64> = (0..self.members.len())
            .map(|at| if self.members[at].is_some() { room(self, at) } else { 0 })
            .collect();
        let (mut left, mut all) = (promise.loose, rooms.iter().sum::<u64>());
        self.reserve_lacks = (left > all).then(|| self.available());
        let last = (0..self.members.len()).rfind(|&at| self.keeps(at));
        for (at, room) in rooms.into_iter().enumerate() {
            if self.members[at].is_none() {
                continue;
            }
            // The last one has the rest: all of it, where devices that failed took the room for it.
            let share = match (self.keeps(at), Some(at) == last) {
                (false, _) => 0,
                (true, true) => left,
                (true, false) => portion(left, room, all),
            };
            left -= share;
            all -= room;
            let bound = if self.keeps(at) { promise.bound[at] } else { self.bound_on(at) };
            let share = share + promise.returning[at];
            self.member_mut(at).pool.keep_free(bound, share);
        }
    }
}

/// The part of `left` for a device with so much of all the room there is, rounded up as far as it has room.
fn portion(left: u64, room: u64, all: u64) -> u64 {
    let part = u128::from(left) * u128::from(room);
    let part = part.div_ceil(u128::from(all.max(1)));
    u64::try_from(part).unwrap_or(u64::MAX).min(left).min(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fit_where_there_is_room_for_all() {
        for left in 0..40 {
            for rooms in [[10, 10, 20], [0, 30, 10], [40, 0, 0], [1, 1, 38], [13, 14, 13]] {
                let (mut rest, mut all) = (left, 40);
                for (i, room) in rooms.into_iter().enumerate() {
                    let share = if i == 2 { rest } else { portion(rest, room, all) };
                    assert!(share <= room, "{left} over {rooms:?}");
                    rest -= share;
                    all -= room;
                }
                assert_eq!(rest, 0);
            }
        }
        assert_eq!(portion(5, 0, 0), 0);
        assert_eq!(portion(u64::MAX, u64::MAX, u64::MAX), u64::MAX);
    }
}
