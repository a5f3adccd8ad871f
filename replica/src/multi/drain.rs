//! Moving extents off a device that is being removed, while I/O goes on.
//!
//! What moves together is a *family*: of one logical extent, all that layers of the device have which read
//! through to each other. What snapshots have of it never changes, and is copied first, while writes to the
//! rest go on. Then the family is closed to changes: they wait, and what replicas have is copied. Every copy
//! is an extent on another device that is marked as unfinished on stable storage; when all data is flushed,
//! one journal block takes all the marks back, and then one journal block of the old device frees what it
//! had. When that is durable the changes go on, on the new device. So at every moment the family is whole on
//! the old device or on the new one, and where a crash leaves it on both, they are equal: open frees the one
//! on the device that is being removed.
//!
//! A change that would need a new extent on the device that is being removed, since a layer beneath has one
//! there, has its family moved first. Commands that change what layers there are wait for the families that
//! are under way, and those that are not closed yet are given up for them and begun anew later.

use std::collections::BTreeSet;

use cairn_block::{Buf, IoStatus, Memory};

use super::control::{Change, Kind, Then};
use super::route::Part;
use super::{COPY, Member, MultiPool};
use crate::blocks::BlockSet;
use crate::disk::{EXTENT_BLOCKS, MemberState};
use crate::pool::PoolState;
use crate::raw::{Family, MAX_TOGETHER, Raw};

/// Families that move at the same time.
const MAX_COPIES: usize = 4;
/// Blocks that are read at a time.
const CHUNK: u32 = 64;
/// Blocks of an extent.
const BLOCKS: u32 = 256;
const _: () = assert!(EXTENT_BLOCKS == 256);

/// Where the removal of a device stands.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// That it is being removed is durable.
    begun: bool,
    /// The next logical extent to look at.
    slot: u16,
    logical: u32,
    /// Extents that cannot move, by slot.
    bad: BTreeSet<(u16, u32)>,
    /// Room on the other devices when there was not enough for a family.
    stalled: Option<u64>,
}

impl Drain {
    pub(super) fn begin(&mut self) {
        *self = Self { begun: true, ..Self::default() };
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// For its turn.
    Queued,
    /// For the changes that had begun.
    Writers,
    /// An extent is being allocated on the target.
    Import,
    /// For memory.
    Memory,
    Read,
    Write,
    Flush,
    /// The marks that the copies are unfinished are being taken back.
    Arrive,
    /// For the reads that the source has begun: to them a freed extent is zeros.
    Readers,
    /// The source's extents are being freed.
    Free,
    /// The target's extents are being freed: the copy was given up.
    Drop,
}

/// A family on its way from one device to another.
#[derive(Debug)]
pub(super) struct Copy {
    id: u32,
    source: usize,
    target: usize,
    logical: u32,
    family: Family,
    stage: Stage,
    /// The slots whose extents go, in the order in which they are copied: those of snapshots first.
    members: Vec<u16>,
    /// The one that is being copied, and its next block.
    current: usize,
    next: u32,
    /// How many there will be.
    count: u64,
    /// Thick replicas that may write over the family, and for which an extent is kept on the target.
    kept: Vec<u16>,
    /// No change may begin.
    closed: bool,
    /// Changes that wait.
    parked: Vec<Part>,
    buf: Option<Buf>,
    outstanding: u32,
    failed: bool,
}

impl Copy {
    pub(super) fn park(&mut self, part: Part) {
        self.parked.push(part);
    }

    /// The device that reads go to.
    pub(super) fn serves(&self) -> usize {
        if matches!(self.stage, Stage::Readers | Stage::Free) { self.target } else { self.source }
    }

    pub(super) fn is_on(&self, member: usize) -> bool {
        self.source == member || (self.target == member && self.stage != Stage::Queued)
    }

    fn is_of(&self, slot: u16, logical: u32) -> bool {
        self.logical == logical && self.family.readers.binary_search(&slot).is_ok()
    }

    fn is_queued(&self) -> bool {
        self.stage == Stage::Queued
    }

    fn tag(&self) -> u64 {
        COPY | u64::from(self.id)
    }

    /// The member that is being copied.
    fn member(&self) -> u16 {
        self.members[self.current]
    }
}

impl MultiPool {
    /// The copy that is being made of what a slot may read of a logical extent.
    pub(super) fn copy_of(&self, slot: u16, logical: u32) -> Option<usize> {
        self.copies.iter().position(|c| c.is_of(slot, logical))
    }

    /// Whether a change of a slot's logical extent has to wait for a copy of it.
    pub(super) fn is_closed(&self, at: usize, slot: u16, logical: u32) -> bool {
        let copy = &self.copies[at];
        // What gets its first extent only now would not move with the others.
        copy.closed || !self.member(copy.source).pool.has_own(slot, logical)
    }

    /// Extents of a slot that are on two devices, for they are being copied.
    pub(super) fn copied_of(&self, slot: u16) -> u64 {
        let of = |copy: &&Copy| {
            let own = |at: usize| self.member(at).pool.has_own(slot, copy.logical);
            copy.members.contains(&slot) && own(copy.source) && own(copy.target)
        };
        self.copies.iter().filter(of).count() as u64
    }

    /// Whether there is a device for new extents.
    pub(super) fn takes_extents(&self) -> bool {
        self.serving().any(|(_, m)| m.role == MemberState::Live)
    }

    /// Whether a device is being removed and could be further.
    pub(super) fn drains(&self) -> bool {
        (0..self.members.len()).any(|at| {
            self.members[at]
                .as_ref()
                .is_some_and(|m| m.role == MemberState::Draining && m.is_online())
                && self.why_stuck(at).is_none()
        })
    }

    /// Why the removal of a device does not go on.
    pub(super) fn why_stuck(&self, at: usize) -> Option<String> {
        let drain = &self.member(at).drain;
        if drain.stalled == Some(self.room()) {
            return Some("the other devices are full: add one, or delete replicas".to_owned());
        }
        let bad = self.bad_left(at);
        (bad > 0 && self.member(at).pool.extents_left() <= bad).then(|| {
            format!(
                "{bad} extents cannot be read whole, or more than {MAX_TOGETHER} replicas and \
                 snapshots share them: repair or delete the replicas, then remove the device once more"
            )
        })
    }

    /// Extents of a device that cannot move.
    fn bad_left(&self, at: usize) -> u64 {
        let Member { pool, drain, .. } = self.member(at);
        drain.bad.iter().filter(|&&(slot, logical)| pool.has_own(slot, logical)).count() as u64
    }

    fn room(&self) -> u64 {
        self.serving()
            .filter(|(_, m)| m.role == MemberState::Live)
            .map(|(_, m)| m.pool.extents_unreserved())
            .sum()
    }

    /// What is left to move is to fit on the other devices, and what is to be allocated besides.
    pub(super) fn has_room_to_drain(&self) -> bool {
        let draining = |(_, m): &(usize, &Member)| m.role == MemberState::Draining;
        let left: u64 = self.serving().filter(draining).map(|(_, m)| m.pool.extents_left()).sum();
        self.room() > left
    }

    /// Takes up a copy whose data a crash left on both devices.
    pub(super) fn resume_copy(&mut self, source: usize, target: usize, slot: u16, logical: u32) {
        if self.copy_of(slot, logical).is_some() {
            return;
        }
        let Some(mut copy) = self.copy(source, slot, logical) else { return };
        let pool = &self.member(source).pool;
        let own = |slot: &u16| pool.has_own(*slot, logical);
        copy.members = copy.family.readers.iter().copied().filter(own).collect();
        copy.target = target;
        copy.closed = true;
        copy.stage = Stage::Readers;
        self.copies.push(copy);
    }

    fn copy(&mut self, source: usize, slot: u16, logical: u32) -> Option<Copy> {
        let family = self.member(source).pool.family(slot, logical)?;
        self.next_copy = self.next_copy.wrapping_add(1);
        Some(Copy {
            id: self.next_copy,
            source,
            target: source,
            logical,
            family,
            stage: Stage::Queued,
            members: Vec::new(),
            current: 0,
            next: 0,
            count: 0,
            kept: Vec::new(),
            closed: false,
            parked: Vec::new(),
            buf: None,
            outstanding: 0,
            failed: false,
        })
    }

    /// Has the family of a change moved that would need a new extent on a device that is being removed.
    /// Returns the copy that it is to wait for.
    pub(super) fn move_first(&mut self, source: usize, slot: u16, logical: u32) -> Option<usize> {
        let member = self.member(source);
        if !self.is_draining(source)
            || member.pool.has_own(slot, logical)
            || member.drain.stalled == Some(self.room())
            || self.is_held_up()
            || !self.is_tree_at_rest(slot)
        {
            return None;
        }
        let copy = self.copy(source, slot, logical)?;
        let bad = &self.member(source).drain.bad;
        if copy.family.readers.iter().any(|&reader| bad.contains(&(reader, logical))) {
            return None;
        }
        self.copies.push(copy);
        Some(self.copies.len() - 1)
    }

    /// Whether extents are to move off a device now.
    fn is_draining(&self, at: usize) -> bool {
        // What was passed straight through is not known by extent.
        self.direct_io == 0
            && self.members[at]
                .as_ref()
                .is_some_and(|m| m.role == MemberState::Draining && m.is_serving() && m.drain.begun)
    }

    /// Whether no copy is to begin.
    fn is_held_up(&self) -> bool {
        self.state != PoolState::Online || self.wants_quiet() || self.is_excluding()
    }

    /// Whether no device deletes layers that a slot's read through to, or that read through to it.
    fn is_tree_at_rest(&self, slot: u16) -> bool {
        self.serving().all(|(_, m)| m.pool.is_tree_at_rest(slot))
    }

    /// The next extent that is to leave a device: the slot that it belongs to.
    fn next_to_move(&mut self, source: usize) -> Option<(u16, u32)> {
        let (mut slot, mut logical) = {
            let drain = &self.member(source).drain;
            (drain.slot, drain.logical)
        };
        let mut found = None;
        while slot < self.slots && found.is_none() {
            let pool = &self.member(source).pool;
            let end = if pool.is_there(slot) { pool.own_end(slot) } else { 0 };
            let end = if logical < end && self.is_tree_at_rest(slot) { end } else { 0 };
            while logical < end && found.is_none() {
                if pool.has_own(slot, logical)
                    && self.copy_of(slot, logical).is_none()
                    && !self.member(source).drain.bad.contains(&(slot, logical))
                {
                    found = Some((slot, logical));
                }
                logical += 1;
            }
            if found.is_none() {
                (slot, logical) = (slot + 1, 0);
            }
        }
        let drain = &mut self.member_mut(source).drain;
        (drain.slot, drain.logical) = (slot, logical);
        found
    }

    /// Moves copies on, starts more, and lets devices go that hold nothing any more.
    pub(super) fn pump_copies<M: Memory>(&mut self, mem: &mut M) {
        self.step_copies(mem);
        if self.is_held_up() {
            return;
        }
        for source in 0..self.members.len() {
            if self.is_draining(source) {
                self.drain(source, mem);
            }
        }
        self.step_copies(mem);
    }

    fn drain<M: Memory>(&mut self, source: usize, mem: &mut M) {
        while self.copies.len() < MAX_COPIES {
            if self.member(source).drain.stalled == Some(self.room()) {
                return;
            }
            let Some((slot, logical)) = self.next_to_move(source) else { break };
            let Some(copy) = self.copy(source, slot, logical) else { continue };
            let before = (self.copies.len(), self.member(source).drain.bad.len());
            self.copies.push(copy);
            self.step_copies(mem);
            if before == (self.copies.len(), self.member(source).drain.bad.len()) {
                // There is no room until others have arrived.
                break;
            }
        }
        let member = self.member(source);
        if !self.copies.is_empty() {
            return;
        }
        if member.pool.extents_left() == 0 && member.pool.is_idle() && self.takes_extents() {
            let change = Change::Set(member.id, MemberState::Removed);
            self.member_mut(source).drain.begun = false;
            self.push_job_first(Kind::members(change, Then::Left(source)));
            self.pump_jobs(mem);
        } else if member.pool.extents_left() > self.bad_left(source) {
            // What was passed over may be ready now.
            let drain = &mut self.member_mut(source).drain;
            (drain.slot, drain.logical) = (0, 0);
        }
    }

    fn step_copies<M: Memory>(&mut self, mem: &mut M) {
        for at in (0..self.copies.len()).rev() {
            let Some(copy) = self.copies.get(at) else { continue };
            match copy.stage {
                Stage::Queued => self.begin_copy(at, mem),
                Stage::Writers if self.parts_of(at, Part::is_mutation) == 0 => {
                    self.add_written(at, mem);
                }
                Stage::Memory => self.read_chunk(at, mem),
                Stage::Readers if self.parts_of(at, Part::is_read) == 0 => {
                    self.free_source(at, mem)
                }
                _ => {}
            }
        }
    }

    /// Requests that are at the source, of what a copy is made of.
    fn parts_of(&self, at: usize, which: impl Fn(&Part) -> bool) -> usize {
        let copy = &self.copies[at];
        let here = |p: &Part| copy.is_of(p.slot, p.logical) && p.is_on(copy.source) && which(p);
        self.parts.iter().filter(|(_, p)| here(p)).count()
    }

    /// A copy's turn, unless too many are under way.
    fn begin_copy<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let source = self.copies[at].source;
        if self.is_held_up() || !self.is_draining(source) {
            return self.end_copy(at, mem);
        }
        if self.copies.iter().filter(|c| !c.is_queued()).count() >= MAX_COPIES {
            return;
        }
        let logical = self.copies[at].logical;
        // What it is may have changed while it waited.
        let root = self.copies[at].family.root;
        let Some(family) = self.member(source).pool.family(root, logical) else {
            return self.end_copy(at, mem);
        };
        let pool = &self.member(source).pool;
        let (count, frozen) = {
            let own = |slot: &&u16| pool.has_own(**slot, logical);
            let members = family.readers.iter().filter(own);
            let frozen = members.clone().copied().filter(|&slot| pool.is_frozen(slot));
            (members.count(), frozen.collect::<Vec<_>>())
        };
        let readers = family.readers.iter().copied();
        let kept: Vec<u16> = readers.filter(|&slot| self.may_write_again(at, slot)).collect();
        let target = self.target_for(source, count as u64, kept.len() as u64);
        let copy = &mut self.copies[at];
        copy.family = family;
        copy.members = frozen;
        if count > MAX_TOGETHER || target.is_some_and(|target| !self.is_alike(at, target)) {
            return self.give_up(at, mem);
        }
        let Some(target) = target else {
            if self.copies.iter().all(Copy::is_queued) {
                self.member_mut(source).drain.stalled = Some(self.room());
            }
            return self.end_copy(at, mem);
        };
        let copy = &mut self.copies[at];
        copy.target = target;
        copy.count = count as u64;
        for _ in &kept {
            self.member_mut(target).pool.bind_reserve();
        }
        self.copies[at].kept = kept;
        self.next_member(at, mem);
    }

    /// Whether a thick replica may write an extent where the family is, which has none of it yet.
    fn may_write_again(&self, at: usize, slot: u16) -> bool {
        let copy = &self.copies[at];
        let pool = &self.member(copy.source).pool;
        pool.thick(slot).is_some() && !pool.has_own(slot, copy.logical)
    }

    /// The device for so many extents: the one with the most room. There must be room as well for those that
    /// thick replicas will have there, of what is kept for them.
    fn target_for(&self, source: usize, count: u64, bound: u64) -> Option<usize> {
        self.choose(None, 1 << source).filter(|&at| {
            let pool = &self.member(at).pool;
            // What others on their way there will take is not there any more.
            let others = self.copies.iter().filter(|c| !c.is_queued() && c.target == at);
            let to_come = |c: &Copy| c.count - c.count.min(c.current as u64);
            let count = others.fold(count, |n, c| n + to_come(c));
            let free = pool.extents_unreserved();
            free >= count && free + pool.loose() >= count + bound
        })
    }

    /// Whether the family's layers are on top of each other on the target as they are on the source, and have
    /// nothing there.
    fn is_alike(&self, at: usize, target: usize) -> bool {
        let copy = &self.copies[at];
        let (source, target) = (&self.member(copy.source).pool, &self.member(target).pool);
        copy.family.readers.iter().all(|&slot| {
            let beneath =
                slot == copy.family.root || source.parent_slot(slot) == target.parent_slot(slot);
            let there = target.is_there(slot) && target.is_frozen(slot) == source.is_frozen(slot);
            there && beneath && !target.maps(crate::ReplicaSlot(slot), copy.logical)
        })
    }

    /// What cannot move stays where it is, until it is asked for again.
    fn give_up<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &self.copies[at];
        let (source, logical) = (copy.source, copy.logical);
        if self.member(source).is_online() {
            let readers = copy.family.readers.clone();
            let own = |slot: &u16| self.member(source).pool.has_own(*slot, logical);
            let own: Vec<u16> = readers.into_iter().filter(own).collect();
            let bad = &mut self.member_mut(source).drain.bad;
            bad.extend(own.into_iter().map(|slot| (slot, logical)));
        }
        self.drop_target(at, mem);
    }

    /// Copies the next member; then the family is closed, and when all are copied, they are made durable.
    fn next_member<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        copy.next = 0;
        let (target, logical, tag) = (copy.target, copy.logical, copy.tag());
        if let Some(&slot) = copy.members.get(copy.current) {
            copy.stage = Stage::Import;
            self.member_mut(target).pool.import_own(tag, slot, logical, mem);
        } else if !copy.closed {
            copy.closed = true;
            copy.stage = Stage::Writers;
        } else {
            copy.stage = Stage::Flush;
            let root = copy.family.root;
            self.member_mut(target).pool.submit_raw(tag, root, logical, Raw::Flush, mem);
        }
    }

    /// Nothing changes any more: what replicas have goes too.
    fn add_written<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &self.copies[at];
        let member = self.member(copy.source);
        let mut written = Vec::new();
        if member.is_online() {
            let new = |slot: &u16| {
                !copy.members.contains(slot) && member.pool.has_own(*slot, copy.logical)
            };
            written.extend(copy.family.readers.iter().copied().filter(new));
        }
        let count = copy.members.len() + written.len();
        if !member.is_online() || count == 0 {
            return self.drop_target(at, mem);
        }
        if count > MAX_TOGETHER {
            return self.give_up(at, mem);
        }
        // What was written meanwhile is copied to what is kept for it.
        let copy = &mut self.copies[at];
        let before = copy.kept.len();
        copy.kept.retain(|slot| !written.contains(slot));
        let (target, wrote) = (copy.target, before - copy.kept.len());
        copy.members.extend(written);
        for _ in 0..wrote {
            self.member_mut(target).pool.unbind_reserve();
        }
        self.next_member(at, mem);
    }

    fn read_chunk<M: Memory>(&mut self, at: usize, mem: &mut M) {
        if !self.copies[at].closed && self.wants_quiet() {
            return self.drop_target(at, mem);
        }
        let copy = &mut self.copies[at];
        if copy.buf.is_none() {
            copy.buf = mem.alloc(CHUNK << 12);
        }
        let Some(buf) = &copy.buf else { return };
        copy.stage = Stage::Read;
        let raw = Raw::Read { first: copy.next, blocks: CHUNK, buf: buf.slice() };
        let (source, slot, logical, tag) = (copy.source, copy.member(), copy.logical, copy.tag());
        self.member_mut(source).pool.submit_raw(tag, slot, logical, raw, mem);
    }

    /// Writes what was read, and zeroes what reads as zeros whatever is beneath.
    fn write_chunk<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        let (source, target, tag, next) = (copy.source, copy.target, copy.tag(), copy.next);
        let (slot, logical, root) = (copy.member(), copy.logical, copy.family.root);
        let slice = copy.buf.as_ref().expect("the chunk was read into it").slice();
        copy.stage = Stage::Write;
        let owned = self.member_mut(source).pool.take_owned(tag);
        let owned = owned.expect("a read tells what the extent has");
        let chunk = BlockSet::range(next, CHUNK);
        let mut works: Vec<Raw> = Vec::new();
        for (first, blocks) in owned.data.and(chunk).runs() {
            let buf = slice.sub((first - next) << 12, blocks << 12);
            works.push(Raw::Write { first, blocks, buf });
        }
        if slot != root {
            let zeroed = owned.zeroed.and(chunk).runs();
            works.extend(zeroed.map(|(first, blocks)| Raw::Zero { first, blocks }));
        }
        if works.is_empty() {
            return self.chunk_written(at, mem);
        }
        self.copies[at].outstanding = u32::try_from(works.len()).expect("at most 64 runs");
        for work in works {
            self.member_mut(target).pool.submit_raw(tag, slot, logical, work, mem);
        }
    }

    fn chunk_written<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        if copy.failed {
            return self.drop_target(at, mem);
        }
        copy.next += CHUNK;
        if copy.next < BLOCKS {
            return self.read_chunk(at, mem);
        }
        copy.current += 1;
        self.next_member(at, mem);
    }

    fn free_source<M: Memory>(&mut self, at: usize, mem: &mut M) {
        self.copies[at].stage = Stage::Free;
        self.release(at, self.copies[at].source, mem);
    }

    fn drop_target<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        if copy.stage == Stage::Queued {
            return self.end_copy(at, mem);
        }
        copy.stage = Stage::Drop;
        self.release(at, self.copies[at].target, mem);
    }

    fn release<M: Memory>(&mut self, at: usize, member: usize, mem: &mut M) {
        let copy = &self.copies[at];
        let (members, logical, tag) = (copy.members.clone(), copy.logical, copy.tag());
        self.member_mut(member).pool.release_own(tag, &members, logical, mem);
    }

    pub(super) fn copy_answered<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let Some(at) = self.copies.iter().position(|c| c.id == id) else { return };
        let ok = status.is_ok();
        let copy = &mut self.copies[at];
        let (source, target) = (copy.source, copy.target);
        match copy.stage {
            Stage::Import if ok => self.copies[at].stage = Stage::Memory,
            Stage::Import => {
                if status == IoStatus::NoSpace {
                    self.member_mut(source).drain.stalled = Some(self.room());
                }
                self.drop_target(at, mem);
            }
            Stage::Read if ok => self.write_chunk(at, mem),
            Stage::Read => self.give_up(at, mem),
            Stage::Write => {
                copy.outstanding -= 1;
                copy.failed |= !ok;
                let over = copy.outstanding == 0;
                if status == IoStatus::NoSpace {
                    self.member_mut(source).drain.stalled = Some(self.room());
                }
                if over {
                    self.chunk_written(at, mem);
                }
            }
            Stage::Flush if ok => {
                copy.stage = Stage::Arrive;
                let (members, logical, tag) = (copy.members.clone(), copy.logical, copy.tag());
                self.member_mut(target).pool.arrive(tag, &members, logical, mem);
            }
            Stage::Flush => self.drop_target(at, mem),
            Stage::Arrive if ok => copy.stage = Stage::Readers,
            Stage::Free if ok => {
                self.bind_reserve(at);
                self.end_copy(at, mem);
            }
            // The target failed: the source has it all.
            Stage::Arrive | Stage::Free | Stage::Drop => self.end_copy(at, mem),
            stage => unreachable!("nothing is asked in {stage:?}"),
        }
    }

    /// What thick replicas may write over the family is kept where that is now.
    fn bind_reserve(&mut self, at: usize) {
        let Copy { source, target, family, members, kept, .. } = &mut self.copies[at];
        let (source, target, kept) = (*source, *target, std::mem::take(kept));
        let over = family.readers.iter().copied().filter(|slot| !members.contains(slot));
        let over: Vec<u16> = over.collect();
        for slot in over {
            if self.member(target).pool.thick(slot).is_none() {
                continue;
            }
            self.member_mut(source).pool.unbind_reserve();
            // One that a crash cut off begins here.
            if !kept.contains(&slot) {
                self.member_mut(target).pool.bind_reserve();
            }
        }
    }

    fn end_copy<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = self.copies.remove(at);
        if !copy.kept.is_empty() {
            // It was given up: that need not be there.
            self.member_mut(copy.target).pool.loosen_reserve(copy.kept.len() as u64);
            self.recount_reserve();
        }
        if let Some(buf) = copy.buf {
            mem.release(buf);
        }
        for part in copy.parked {
            self.rerun(part, mem);
        }
    }

    /// The pool failed: what waits is answered; what is at the devices comes back.
    pub(super) fn abort_copies<M: Memory>(&mut self, mem: &mut M) {
        for at in (0..self.copies.len()).rev() {
            let waits = [Stage::Queued, Stage::Writers, Stage::Memory, Stage::Readers];
            if self.copies.get(at).is_some_and(|copy| waits.contains(&copy.stage)) {
                self.end_copy(at, mem);
            }
        }
    }
}
