//! Making the devices of a pool, and opening them together.
//!
//! A crash leaves what is the same everywhere on some devices alone. What was not answered may become
//! either; what it becomes is decided here, the same way whoever decides, and stored before the pool
//! serves:
//!
//! - a list of devices: the highest generation is right;
//! - a replica or a snapshot that is not on every device was being made or being deleted: it is deleted;
//! - a replica that went back to a snapshot on some devices does so on the others;
//! - a size: the largest is right, for replicas only grow;
//! - a register: the highest promise, and the highest of what was accepted, are right;
//! - an extent on two devices, with all that moves with it: the device that is being removed frees it;
//! - a layer that is on top of another one on some devices only: it is on the others too;
//! - an unfinished copy: the device's own open frees it.

use cairn_block::{PoolDeviceId, PoolId, SnapshotId};

use super::control::revive;
use super::{MAX_DEVICES, Member, MultiPool};
use crate::disk::{
    CatalogPage, CatalogState, FLAG_REVERTED, FLAG_REVERTING, MemberEntry, MemberState, Membership,
    Superblock,
};
use crate::format::{self, FormatOptions, Identity, slots_for};
use crate::open::read_superblock;
use crate::pool::{Pool, ReplicaSlot};
use crate::{Device, PoolError};

/// A device that is to be part of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Its id: a new one.
    pub id: PoolDeviceId,
    /// See [`FormatOptions::device_is_zeroed`].
    pub device_is_zeroed: bool,
    /// Bytes of its sectors.
    pub sector_size: u32,
}

/// How to open a pool.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Devices to go on without, for good: the operator has said so.
    pub without: Vec<PoolDeviceId>,
}

/// A device that was given and is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Which of those that were given.
    pub index: usize,
    /// Why, for a person.
    pub why: String,
}

/// A pool that was opened.
#[derive(Debug)]
pub struct OpenedSet {
    /// The pool.
    pub pool: MultiPool,
    /// For each number of a device in the pool, which of those that were given it is.
    pub devices: Vec<usize>,
    /// The others.
    pub set_aside: Vec<SetAside>,
}

impl MultiPool {
    /// Makes an empty pool of whole devices. Each is looked at before any is written to. Of `options`,
    /// what is said of the device is said by `ids`.
    ///
    /// # Errors
    /// [`PoolError`], and which device it is about.
    pub fn format<D: Device>(
        devs: &mut [D],
        ids: &[DeviceOptions],
        options: &FormatOptions,
    ) -> Result<(), (usize, PoolError)> {
        let given = devs.len();
        if given == 0 || given > MAX_DEVICES || given != ids.len() {
            return Err((0, PoolError::MemberCount { given, max: MAX_DEVICES }));
        }
        let members =
            ids.iter().map(|d| MemberEntry { id: d.id, state: MemberState::Live }).collect();
        let membership = Membership { members, ..Membership::default() };
        // The smallest device has to have room for the pages.
        let slots = devs.iter().map(|d| slots_for(d.len())).min();
        let identity = |id| Identity { device: id, membership: membership.clone(), slots };
        for (i, (dev, of)) in devs.iter_mut().zip(ids).enumerate() {
            format::check(dev, &of.options(options), &identity(of.id)).map_err(|e| (i, e))?;
        }
        for (i, (dev, of)) in devs.iter_mut().zip(ids).enumerate() {
            format::format(dev, &of.options(options), &identity(of.id)).map_err(|e| (i, e))?;
        }
        Ok(())
    }

    /// Makes a device that [`MultiPool::add_device`] takes, for a pool of this id and so many slots.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn format_device<D: Device>(
        dev: &mut D,
        device: &DeviceOptions,
        pool: PoolId,
        slots: u16,
        force: bool,
    ) -> Result<(), PoolError> {
        let identity = Identity {
            device: device.id,
            membership: Membership::alone(device.id, MemberState::Joining),
            slots: Some(slots),
        };
        let options = FormatOptions {
            pool_id: pool,
            device_is_zeroed: device.device_is_zeroed,
            sector_size: device.sector_size,
            force,
        };
        format::format(dev, &options, &identity)
    }

    /// Opens a pool on its devices, given in any order, and makes good what a crash left behind.
    ///
    /// # Errors
    /// [`PoolError`]; among others where a device is missing that the pool is not whole without.
    pub fn open<D: Device>(devs: &mut [D], options: &OpenOptions) -> Result<OpenedSet, PoolError> {
        let given = devs.len();
        if given == 0 || given > MAX_DEVICES {
            return Err(PoolError::MemberCount { given, max: MAX_DEVICES });
        }
        let (mut set_aside, mut damaged) = (Vec::new(), false);
        let mut heads: Vec<(usize, Superblock)> = Vec::new();
        for (index, dev) in devs.iter_mut().enumerate() {
            dev.flush()?;
            match read_superblock(dev) {
                Ok((superblock, _)) => heads.push((index, superblock)),
                // One that was wiped when it was removed, perhaps.
                Err(PoolError::Blank) if given > 1 => {
                    set_aside.push(SetAside { index, why: "it is blank".to_owned() });
                }
                // Its wiping may have been cut off. Where a device is missing then, this was it.
                Err(PoolError::SuperblockDamaged) if given > 1 => {
                    damaged = true;
                    let why = PoolError::SuperblockDamaged.to_string();
                    set_aside.push(SetAside { index, why });
                }
                Err(error) => return Err(error),
            }
        }
        if heads.is_empty() && damaged {
            return Err(PoolError::SuperblockDamaged);
        }
        let newest = newest(&heads)?;
        let pool = heads[0].1.pool;
        let mut next = newest.clone();
        let mut used: Vec<usize> = Vec::new();
        for (index, head) in &heads {
            let device = head.device;
            let mut aside = |why: &str| set_aside.push(SetAside { index: *index, why: why.into() });
            match newest.state_of(device) {
                _ if options.without.contains(&device) => {
                    aside("the pool was to be opened without it");
                }
                Some(state) if state.is_needed() => used.push(*index),
                Some(MemberState::Failed) => aside(
                    "the pool went on without it after it had failed or was missing, so what it holds \
                     is out of date; add it anew with force, or remove it",
                ),
                Some(MemberState::Removed) => {
                    return Err(PoolError::MemberRemoved { pool, device });
                }
                _ if is_joining(head) => aside("adding it to the pool was cut off; add it anew"),
                _ => return Err(PoolError::MemberUnknown { pool, device }),
            }
        }
        let here = |id: PoolDeviceId| {
            heads.iter().any(|(index, head)| head.device == id && used.contains(index))
        };
        let mut left_behind = false;
        for member in newest.members.iter().filter(|m| m.state.is_needed() && !here(m.id)) {
            if !options.without.contains(&member.id) && damaged {
                return Err(PoolError::MemberDamaged { pool, device: member.id });
            }
            if !options.without.contains(&member.id) {
                return Err(PoolError::MemberMissing { pool, device: member.id });
            }
            next.set(member.id, MemberState::Failed);
            left_behind = true;
        }
        if used.is_empty() {
            let device = newest.members[0].id;
            return Err(PoolError::MemberMissing { pool, device });
        }
        let mut pools = Vec::new();
        for &index in &used {
            pools.push(Pool::open(&mut devs[index])?);
        }
        if left_behind {
            next.leave_behind();
            for slot in 0..pools.iter().map(Pool::slot_count).min().unwrap_or(0) {
                if pools.iter().any(|p| p.is_used(slot)) {
                    next.set_lost(slot, true);
                }
            }
        }
        if !next.members.iter().any(|m| m.state == MemberState::Live) {
            revive(&mut next);
            next.advance();
        }
        let reverts = settle_catalogs(devs, &used, &mut pools)?;
        settle_layers(devs, &used, &mut pools)?;
        for (pool, &index) in pools.iter_mut().zip(&used) {
            if *pool.membership() != next {
                pool.rewrite_membership(&mut devs[index], &next)?;
            }
        }
        let members = pools
            .into_iter()
            .map(|pool| {
                let role = next.state_of(pool.device_id()).unwrap_or(MemberState::Live);
                let mut member = Member::new(pool, role);
                if role == MemberState::Draining {
                    member.drain.begin();
                }
                member
            })
            .collect();
        let mut pool = Self::new(members, next);
        for (slot, to) in reverts {
            pool.resume_revert(slot, to);
        }
        pool.find_doubles()?;
        pool.share_reserve();
        pool.recount_reserve();
        Ok(OpenedSet { pool, devices: used, set_aside })
    }

    /// Finds the extents that a copy left on two devices.
    fn find_doubles(&mut self) -> Result<(), PoolError> {
        if self.members.len() < 2 {
            return Ok(());
        }
        for slot in 0..self.slots {
            // The extents of what is being deleted go anyway.
            if self.live_blocks(slot).is_none() && self.snapshot_blocks(slot).is_none() {
                continue;
            }
            let end = self.present().map(|m| m.pool.mapped_end(slot)).max().unwrap_or(0);
            for logical in 0..end {
                let holders: Vec<usize> = (0..self.members.len())
                    .filter(|&at| self.member(at).pool.maps(ReplicaSlot(slot), logical))
                    .collect();
                // One that is going back to a snapshot may have been written elsewhere since.
                if holders.len() > 1 && !self.is_going_back(slot) {
                    self.settle_double(slot, logical, &holders)?;
                }
            }
        }
        Ok(())
    }

    fn settle_double(
        &mut self,
        slot: u16,
        logical: u32,
        holders: &[usize],
    ) -> Result<(), PoolError> {
        let claimed = PoolError::Inconsistent("two devices claim one extent of a replica");
        let draining = |at: &&usize| self.member(**at).role == MemberState::Draining;
        let source = holders.iter().find(draining);
        let target = holders.iter().find(|at| !draining(at));
        let (Some(&source), Some(&target), 2) = (source, target, holders.len()) else {
            return Err(claimed);
        };
        // A copy is of all that reads through to each other, and is whole.
        let (from, to) = (&self.member(source).pool, &self.member(target).pool);
        let family = from.family(slot, logical).map(|family| family.readers).unwrap_or_default();
        let own = |pool: &Pool, reader: &u16| pool.has_own(*reader, logical);
        if !family.iter().all(|reader| own(from, reader) == own(to, reader)) {
            return Err(claimed);
        }
        self.resume_copy(source, target, slot, logical);
        Ok(())
    }
}

impl DeviceOptions {
    fn options(&self, pool: &FormatOptions) -> FormatOptions {
        FormatOptions {
            device_is_zeroed: self.device_is_zeroed,
            sector_size: self.sector_size,
            ..pool.clone()
        }
    }
}

/// Made for the pool, and not told that it was taken in.
fn is_joining(head: &Superblock) -> bool {
    head.membership.state_of(head.device) == Some(MemberState::Joining)
}

/// The newest list of devices that there is, where the devices are of one pool.
fn newest(heads: &[(usize, Superblock)]) -> Result<Membership, PoolError> {
    let Some((_, first)) = heads.first() else { return Err(PoolError::Blank) };
    let mut best: Option<&Superblock> = None;
    for (i, (_, head)) in heads.iter().enumerate() {
        if head.pool != first.pool {
            let (device, found, wanted) = (head.device, head.pool, first.pool);
            return Err(PoolError::OtherPool { device, found, wanted });
        }
        if heads[..i].iter().any(|(_, other)| other.device == head.device) {
            return Err(PoolError::MemberTwice(head.device));
        }
        if is_joining(head) {
            continue;
        }
        let generation = head.membership.generation;
        match best {
            Some(b) if b.membership.generation > generation => {}
            Some(b) if b.membership.generation == generation => {
                if b.membership != head.membership {
                    return Err(PoolError::MembersDisagree {
                        pool: head.pool,
                        first: b.device,
                        second: head.device,
                    });
                }
            }
            _ => best = Some(head),
        }
    }
    let unknown = PoolError::MemberUnknown { pool: first.pool, device: first.device };
    Ok(best.ok_or(unknown)?.membership.clone())
}

/// Makes the catalogs the same. Returns the replicas that went back to a snapshot on some devices only,
/// and to which.
fn settle_catalogs<D: Device>(
    devs: &mut [D],
    used: &[usize],
    pools: &mut [Pool],
) -> Result<Vec<(u16, SnapshotId)>, PoolError> {
    let mut reverts = Vec::new();
    let slots = pools.iter().map(Pool::slot_count).max().unwrap_or(0);
    for slot in 0..slots {
        // A page that takes a layer whose owner still has it is what is left of a snapshot that was
        // being taken: that device does not have it.
        let pages: Vec<Option<(CatalogPage, bool)>> = pools
            .iter()
            .map(|p| (slot < p.slot_count()).then(|| (p.page(slot).clone(), p.is_used(slot))))
            .map(|page| page.filter(|(page, _)| page.state != CatalogState::Free))
            .collect();
        let Some((first, _)) = pages.iter().flatten().next() else { continue };
        if pages.iter().flatten().any(|(page, _)| page.replica != first.replica) {
            return Err(PoolError::Inconsistent("two devices have different replicas in one slot"));
        }
        let there = pages.iter().all(|p| p.as_ref().is_some_and(|(_, used)| *used));
        let same = |page: &CatalogPage| {
            page.state == first.state
                && (page.state == CatalogState::Live || page.snapshot == first.snapshot)
        };
        if there && !pages.iter().flatten().all(|(page, _)| same(page)) {
            return Err(PoolError::Inconsistent("two devices have different replicas in one slot"));
        }
        let right = there.then(|| merge(pages.iter().flatten().map(|(page, _)| page)));
        // Every device has the note before one goes back, and has gone back before one forgets it.
        let with = |flag| pages.iter().flatten().find(|(page, _)| page.flags & flag != 0);
        let goes_on = there && with(FLAG_REVERTED).is_some();
        if let Some((page, _)) = with(FLAG_REVERTING).filter(|_| goes_on) {
            reverts.push((slot, page.target));
        }
        let keeps = goes_on && with(FLAG_REVERTING).is_some();
        for ((pool, page), &index) in pools.iter_mut().zip(&pages).zip(used) {
            let Some((page, used)) = page else { continue };
            let mut wanted = match &right {
                Some(right) => CatalogPage {
                    sequence: page.sequence,
                    layer: page.layer,
                    parent: page.parent,
                    flags: page.flags,
                    target: page.target,
                    ..CatalogPage::clone(right)
                },
                None if *used => CatalogPage { state: CatalogState::Deleting, ..page.clone() },
                None => continue,
            };
            if !keeps {
                wanted.flags &= !(FLAG_REVERTING | FLAG_REVERTED);
                wanted.target = SnapshotId(0);
            }
            if wanted != *page {
                pool.rewrite_page(&mut devs[index], slot, wanted)?;
            }
        }
    }
    Ok(reverts)
}

/// Has layers read through to each other on each device as they do on the others: one that joined when they
/// were there already, and holds nothing of them, may not know.
fn settle_layers<D: Device>(
    devs: &mut [D],
    used: &[usize],
    pools: &mut [Pool],
) -> Result<(), PoolError> {
    for slot in 0..pools.iter().map(Pool::slot_count).min().unwrap_or(0) {
        if !pools.iter().all(|pool| pool.is_used(slot)) {
            continue;
        }
        let Some(parent) = pools.iter().find_map(|pool| pool.parent_slot(slot)) else { continue };
        if !pools.iter().all(|pool| pool.snapshot_blocks(parent).is_some()) {
            continue;
        }
        for (pool, &index) in pools.iter_mut().zip(used) {
            pool.put_on_top_of(&mut devs[index], slot, parent)?;
        }
    }
    Ok(())
}

/// What the pages of one replica say together.
fn merge<'a>(mut pages: impl Iterator<Item = &'a CatalogPage>) -> CatalogPage {
    let mut right = pages.next().cloned().unwrap_or_default();
    for page in pages {
        right.blocks = right.blocks.max(page.blocks);
        right.promised_epoch = right.promised_epoch.max(page.promised_epoch);
        let accepted = (page.accepted_epoch, page.register_seq);
        if accepted > (right.accepted_epoch, right.register_seq) {
            right.accepted_epoch = page.accepted_epoch;
            right.register_seq = page.register_seq;
            right.config.clone_from(&page.config);
        }
    }
    right
}
