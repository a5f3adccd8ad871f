//! A pool of several devices: a layer over one self-contained [`Pool`] for each of them.
//!
//! Every replica is on every device, in the same slot, with the same register; its extents are each on
//! one. What names an extent's device is that device's own map, and nothing else: so there is no index
//! to keep, and a device that is gone takes with it only what it held. What has to be the same
//! everywhere is written everywhere before it is answered, and what a crash left on some devices alone
//! is completed or taken back at open.
//!
//! A pool of one device passes its requests straight through.

mod control;
mod drain;
mod members;
mod open;
mod reserve;
mod route;
mod settle;
mod snapshot;
mod undo;

use std::collections::VecDeque;

use cairn_block::{IoRequest, IoStatus, Memory, PoolDeviceId, PoolId, ReplicaId, SnapshotId};

use crate::disk::{EXTENT, MAX_MEMBERS, MemberState, Membership};
use crate::pool::{DiskId, DiskIo, Done, Pool, PoolState, Register, ReplicaInfo, ReplicaSlot};
use crate::slab::Slab;
use crate::undo::is_undo_log;
use crate::{DiskError, ReplicaState, SnapshotInfo, Usage};

pub use members::{DrainInfo, MemberInfo};
pub use open::{DeviceOptions, OpenOptions, OpenedSet, SetAside};

use control::Job;
use drain::{Copy, Drain};
use route::{Part, Request};
use settle::Settling;
use undo::UndoLog;

/// Devices that a pool can have.
pub const MAX_DEVICES: usize = MAX_MEMBERS;

/// Set in the tags that this layer gives to its devices' pools; never in a caller's.
const INTERNAL: u64 = 1 << 63;
const KIND: u64 = 3 << 56;
const PART: u64 = INTERNAL;
const JOB: u64 = INTERNAL | 1 << 56;
const COPY: u64 = INTERNAL | 2 << 56;
const SETTLE: u64 = INTERNAL | 3 << 56;

/// Requests and parts that are preallocated.
const WARM: usize = 1024;

/// One device.
#[derive(Debug)]
pub(crate) struct Member {
    id: PoolDeviceId,
    pool: Pool,
    /// What it is to the pool, as far as requests go: a change shows here before it is durable where
    /// that keeps new extents away, and after it where it brings them.
    role: MemberState,
    /// It was noticed that it failed.
    failed: bool,
    /// The others have it on stable storage that they go on without it.
    excluded: bool,
    /// It was taken out: it goes when nothing is in flight to it.
    leaving: bool,
    drain: Drain,
    /// A bit for each slot of which it counts for nothing any more what was there: it had failed when the
    /// slot was made ready for something else, or when what it held was given up.
    given_up: Vec<u64>,
}

impl Member {
    fn new(pool: Pool, role: MemberState) -> Self {
        Self {
            id: pool.device_id(),
            pool,
            role,
            failed: false,
            excluded: false,
            leaving: false,
            drain: Drain::default(),
            given_up: Vec::new(),
        }
    }

    /// Whether it holds, or held when it failed, a logical extent.
    fn maps(&self, slot: u16, logical: u32) -> bool {
        !self.has_given_up(slot) && self.pool.maps(ReplicaSlot(slot), logical)
    }

    fn has_given_up(&self, slot: u16) -> bool {
        let word = self.given_up.get(usize::from(slot / 64));
        word.is_some_and(|word| word >> (slot % 64) & 1 != 0)
    }

    fn give_up(&mut self, slot: u16) {
        let word = usize::from(slot / 64);
        self.given_up.resize(self.given_up.len().max(word + 1), 0);
        self.given_up[word] |= 1 << (slot % 64);
    }

    /// Whether it can be asked for anything.
    fn is_online(&self) -> bool {
        self.pool.state() == PoolState::Online
    }

    /// Whether it is part of the pool and works.
    fn is_serving(&self) -> bool {
        self.role.is_needed() && !self.leaving && self.is_online()
    }
}

/// An open pool of one or several devices.
#[derive(Debug)]
pub struct MultiPool {
    id: PoolId,
    /// By number; a number is reused only when nothing of its last device is in flight.
    members: Vec<Option<Member>>,
    /// As all devices have it on stable storage.
    membership: Membership,
    /// Slots whose extents that are mapped nowhere may have been on a device that is not here.
    lost: Membership,
    /// Replica slots that every device has.
    slots: u16,
    state: PoolState,
    /// The only device, where requests can pass straight through.
    direct: Option<usize>,
    /// The device that requests passed straight through to last, until all of them are answered.
    was_direct: Option<usize>,
    /// Requests that were passed through and are not answered.
    direct_io: u64,
    requests: Slab<Request>,
    parts: Slab<Part>,
    /// By slot: a bit for each device that may hold changes that no flush has covered.
    unflushed: Vec<u64>,
    /// By slot: counts changes begun and ended, so that a flush knows whether it covered the last.
    changes: Vec<u64>,
    copies: Vec<Copy>,
    next_copy: u32,
    settlings: Vec<Settling>,
    next_settling: u32,
    /// Commands that wait for their turn.
    jobs: VecDeque<Job>,
    active: Vec<Job>,
    next_job: u32,
    /// Requests to replicas of which a snapshot is to be taken, or which are to go back to one.
    waiting: VecDeque<(u64, ReplicaSlot, IoRequest)>,
    /// Of each Verify over several devices that was answered, by its tag: how many blocks held data.
    verified: Vec<(u64, u32)>,
    /// Answers that wait until the membership without a device that failed is durable.
    held: Vec<Done>,
    done: VecDeque<Done>,
    undo: UndoLog,
    /// Devices that left, to be detached.
    gone: VecDeque<u8>,
    limits: Option<(usize, usize)>,
    /// What is kept for thick replicas is to be counted anew.
    reserve_is_old: bool,
    /// The room that there was when it was not enough for them.
    reserve_lacks: Option<u64>,
    verify: bool,
    /// Where the next device operation is looked for.
    turn: usize,
}

impl From<Pool> for MultiPool {
    /// A pool of one device.
    fn from(pool: Pool) -> Self {
        let membership = pool.membership().clone();
        Self::new(vec![Member::new(pool, MemberState::Live)], membership)
    }
}

impl MultiPool {
    fn new(members: Vec<Member>, membership: Membership) -> Self {
        let slots = members.iter().map(|m| m.pool.slot_count()).min().unwrap_or(0);
        let mut pool = Self {
            id: members[0].pool.id(),
            members: members.into_iter().map(Some).collect(),
            lost: membership.clone(),
            membership,
            slots,
            state: PoolState::Online,
            direct: None,
            was_direct: None,
            direct_io: 0,
            requests: Slab::with_capacity(WARM),
            parts: Slab::with_capacity(WARM),
            unflushed: vec![0; usize::from(slots)],
            changes: vec![0; usize::from(slots)],
            copies: Vec::new(),
            next_copy: 0,
            settlings: Vec::new(),
            next_settling: 0,
            jobs: VecDeque::new(),
            active: Vec::new(),
            next_job: 0,
            waiting: VecDeque::new(),
            verified: Vec::new(),
            held: Vec::new(),
            done: VecDeque::with_capacity(WARM),
            undo: UndoLog::default(),
            gone: VecDeque::new(),
            limits: None,
            reserve_is_old: false,
            reserve_lacks: None,
            verify: true,
            turn: 0,
        };
        pool.refresh_direct();
        pool
    }

    /// The pool's identifier.
    #[must_use]
    pub fn id(&self) -> PoolId {
        self.id
    }

    /// Replica slots: what a device that is to be added must have.
    #[must_use]
    pub fn slot_count(&self) -> u16 {
        self.slots
    }

    /// The devices of the pool as they are durable.
    #[must_use]
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    fn member(&self, at: usize) -> &Member {
        self.members[at].as_ref().expect("the device is there while it is used")
    }

    fn member_mut(&mut self, at: usize) -> &mut Member {
        self.members[at].as_mut().expect("the device is there while it is used")
    }

    /// The devices that are part of the pool and work.
    fn serving(&self) -> impl Iterator<Item = (usize, &Member)> {
        self.members
            .iter()
            .enumerate()
            .filter_map(|(i, m)| m.as_ref().map(|m| (i, m)))
            .filter(|(_, m)| m.is_serving())
    }

    /// The device that is asked what all of them know.
    fn lead(&self) -> Option<&Pool> {
        self.serving().next().map(|(_, m)| &m.pool)
    }

    fn present(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().flatten()
    }

    /// Finds out whether requests can pass straight through.
    fn refresh_direct(&mut self) {
        let mut present = self.members.iter().enumerate().filter(|(_, m)| m.is_some());
        let (first, more) = (present.next(), present.next());
        self.direct = match (first, more) {
            (Some((at, Some(member))), None)
                if member.role == MemberState::Live && self.lost.is_whole() =>
            {
                Some(at)
            }
            _ => None,
        };
        match self.direct {
            Some(at) => self.was_direct = Some(at),
            None => self.passed_through(),
        }
    }

    /// What was passed through, or still is, was not taken note of.
    fn passed_through(&mut self) {
        let Some(at) = self.was_direct else { return };
        if self.direct_io == 0 {
            self.was_direct = None;
        }
        for (bits, change) in self.unflushed.iter_mut().zip(&mut self.changes) {
            *bits |= 1 << at;
            *change += 1;
        }
    }

    /// How full the pool is: its devices together. What is free on a device that is being removed is not
    /// counted as free.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut sum = Usage {
            extents_total: 0,
            extents_free: 0,
            extents_allocated: 0,
            extents_reserved: 0,
            extents_provisioned: 0,
            extent_bytes: u32::try_from(EXTENT).expect("1 MiB"),
        };
        for (_, member) in self.serving() {
            let usage = member.pool.usage();
            sum.extents_total += usage.extents_total;
            sum.extents_allocated += usage.extents_allocated;
            // Every device has every replica.
            sum.extents_provisioned = sum.extents_provisioned.max(usage.extents_provisioned);
            if member.role == MemberState::Live {
                sum.extents_free += usage.extents_free;
                sum.extents_reserved += usage.extents_reserved;
            }
        }
        sum
    }

    /// Whether the pool serves. A device that failed takes down only what it holds: see
    /// [`MultiPool::members`].
    #[must_use]
    pub fn state(&self) -> PoolState {
        match self.direct {
            Some(at) => self.member(at).pool.state(),
            None => self.state,
        }
    }

    /// Whether a device failed, and is still here.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.present().any(|m| m.failed)
    }

    /// The replicas, those on their way in and out among them.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaInfo> {
        let lead = self.lead().or_else(|| self.present().next().map(|m| &m.pool));
        let shown = lead.into_iter().flat_map(Pool::replicas).filter(|info| !is_undo_log(info.id));
        shown.map(|mut info| {
            let slot = info.slot.0;
            let holds = self.present().filter(|m| !m.has_given_up(slot));
            info.allocated_extents = holds.map(|m| m.pool.extents_in(slot)).sum();
            if info.state == ReplicaState::Live {
                match self.live_blocks(slot) {
                    Some(blocks) => info.blocks = blocks,
                    None if self.lead().is_some() => info.state = ReplicaState::Creating,
                    None => {}
                }
            }
            info
        })
    }

    /// The size of a replica that is live on every device: the least of what they say.
    fn live_blocks(&self, slot: u16) -> Option<u64> {
        let mut least = None;
        for (_, member) in self.serving() {
            let blocks = member.pool.live_blocks(slot)?;
            least = Some(least.map_or(blocks, |l: u64| l.min(blocks)));
        }
        least
    }

    /// The slot of a live replica.
    #[must_use]
    pub fn find(&self, id: ReplicaId) -> Option<ReplicaSlot> {
        let lead = self.lead().or_else(|| self.present().next().map(|m| &m.pool))?;
        let slot = lead.find(id)?;
        (self.lead().is_none() || self.live_blocks(slot.0).is_some()).then_some(slot)
    }

    /// The register of a live replica, as it is durable on every device.
    #[must_use]
    pub fn register(&self, slot: ReplicaSlot) -> Option<&Register> {
        if let Some(at) = self.direct {
            return self.member(at).pool.register(slot);
        }
        let mut least: Option<&Register> = None;
        let key = |r: &Register| (r.promised_epoch, r.accepted_epoch, r.seq);
        for (_, member) in self.serving() {
            let register = member.pool.register(slot)?;
            if least.is_none_or(|l| key(register) < key(l)) {
                least = Some(register);
            }
        }
        least.or_else(|| self.present().next()?.pool.register(slot))
    }

    /// The snapshots, those that are being deleted among them.
    pub fn snapshots(&self) -> impl Iterator<Item = SnapshotInfo> {
        let mut found: Vec<SnapshotInfo> = Vec::new();
        for info in self.serving().flat_map(|(_, m)| m.pool.snapshots()) {
            match found.iter_mut().find(|other| other.slot == info.slot) {
                Some(other) => {
                    other.own_extents += info.own_extents;
                    other.deleting |= info.deleting;
                }
                None => found.push(info),
            }
        }
        // One that not every device has is being taken.
        found.retain(|info| info.deleting || self.snapshot_blocks(info.slot.0).is_some());
        found.into_iter()
    }

    /// The slot of a snapshot that every device has.
    #[must_use]
    pub fn find_snapshot(&self, replica: ReplicaId, id: SnapshotId) -> Option<ReplicaSlot> {
        let slot = self.lead()?.find_snapshot(replica, id)?;
        self.snapshot_blocks(slot.0).is_some().then_some(slot)
    }

    /// The size of a snapshot that every device has.
    fn snapshot_blocks(&self, slot: u16) -> Option<u64> {
        let mut blocks = None;
        for (_, member) in self.serving() {
            blocks = Some(member.pool.snapshot_blocks(slot)?);
        }
        blocks
    }

    /// See [`Pool::waits_for_memory`].
    #[must_use]
    pub fn waits_for_memory(&self) -> bool {
        self.present().any(|m| m.pool.waits_for_memory())
    }

    /// See [`Pool::take_verified`].
    pub fn take_verified(&mut self, tag: u64) -> Option<u32> {
        if let Some(at) = self.verified.iter().position(|&(t, _)| t == tag) {
            return Some(self.verified.swap_remove(at).1);
        }
        self.members.iter_mut().flatten().find_map(|m| m.pool.take_verified(tag))
    }

    /// Whether a device holds a logical extent of a replica; see [`Pool::maps`].
    #[must_use]
    pub fn maps(&self, slot: ReplicaSlot, logical: u32) -> bool {
        self.present().any(|m| m.maps(slot.0, logical))
    }

    /// Reads that did not verify since the pool was opened.
    #[must_use]
    pub fn checksum_mismatches(&self) -> u64 {
        self.present().map(|m| m.pool.checksum_mismatches()).sum()
    }

    /// Extents that a crash now would have hashed anew.
    #[must_use]
    pub fn dirty_extents(&self) -> u64 {
        self.present().map(|m| m.pool.dirty_extents()).sum()
    }

    /// See [`Pool::set_checksum_limits`]; each device has its part of them.
    pub fn set_checksum_limits(&mut self, cached_extents: usize, dirty_extents: usize) {
        self.limits = Some((cached_extents, dirty_extents));
        self.share_limits();
    }

    fn share_limits(&mut self) {
        let Some((cached, dirty)) = self.limits else { return };
        let count = self.present().count().max(1);
        for member in self.members.iter_mut().flatten() {
            member.pool.set_checksum_limits(cached.div_ceil(count), dirty.div_ceil(count));
        }
    }

    /// See [`Pool::disable_checksums_for_benchmark`].
    pub fn disable_checksums_for_benchmark(&mut self) {
        self.verify = false;
        for member in self.members.iter_mut().flatten() {
            member.pool.disable_checksums_for_benchmark();
        }
    }

    /// Requests and commands that are not answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let commands = self.jobs.iter().chain(&self.active).filter(|j| j.tag.is_some()).count();
        let direct = usize::try_from(self.direct_io).expect("fewer than 2^32 requests");
        self.requests.len()
            + direct
            + commands
            + self.held.len()
            + self.waiting.len()
            + self.settlings.len()
            + self.undo.len()
    }

    /// Whether nothing is under way: no request, no command, no device operation, no deletion, no copy.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight() == 0
            && self.jobs.is_empty()
            && self.active.is_empty()
            && self.copies.is_empty()
            && !self.drains()
            && self.present().all(|m| m.pool.is_idle() || !m.is_online())
    }

    /// Puts a request in; [`MultiPool::poll_done`] answers it with its tag, which is below 2^63.
    pub fn submit<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        request: IoRequest,
        mem: &mut M,
    ) {
        assert!(tag & INTERNAL == 0, "a caller's tag is below 2^63");
        if cairn_block::undo::is_of_log(request.range) {
            return self.submit_to_log(tag, slot, request, mem);
        }
        if self.is_held(slot.0) {
            self.waiting.push_back((tag, slot, request));
            return;
        }
        self.pass(tag, slot, request, mem);
        if self.direct.is_none() {
            self.settle(mem);
        }
    }

    fn pass<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, request: IoRequest, mem: &mut M) {
        if let Some(at) = self.direct {
            self.direct_io += 1;
            self.member_mut(at).pool.submit(tag, slot, request, mem);
        } else {
            self.submit_parts(tag, slot, request, mem);
        }
    }

    /// The next operation for a device: for which, and what. They may be performed in any order.
    pub fn poll_disk(&mut self) -> Option<(u8, DiskIo)> {
        let count = self.members.len();
        for _ in 0..count {
            let at = self.turn;
            if let Some(io) = self.members[at].as_mut().and_then(|m| m.pool.poll_disk()) {
                return Some((u8::try_from(at).expect("at most 64 devices"), io));
            }
            self.turn = if at + 1 == count { 0 } else { at + 1 };
        }
        None
    }

    /// Takes the result of a device operation.
    ///
    /// # Panics
    /// Where `id` is not in flight to that device.
    pub fn handle_disk<M: Memory>(
        &mut self,
        device: u8,
        id: DiskId,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        let member = self.member_mut(usize::from(device));
        member.pool.handle_disk(id, result, mem);
        if !self.is_quiet() {
            self.settle(mem);
        }
    }

    /// The next answer.
    pub fn poll_done(&mut self) -> Option<Done> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        let at = self.direct.filter(|_| self.is_quiet())?;
        let done = self.member_mut(at).pool.poll_done()?;
        self.direct_io -= 1;
        Some(done)
    }

    /// Whether every answer of a device is its caller's.
    fn is_quiet(&self) -> bool {
        self.direct.is_some()
            && self.active.is_empty()
            && self.jobs.is_empty()
            && self.parts.len() == 0
            && self.copies.is_empty()
            && self.waiting.is_empty()
            && self.settlings.is_empty()
            && self.undo.is_empty()
    }

    /// Tries again whatever waited for memory, and takes up what a crash cut off.
    pub fn retry<M: Memory>(&mut self, mem: &mut M) {
        for member in self.members.iter_mut().flatten() {
            member.pool.retry(mem);
        }
        if !self.is_quiet() {
            self.settle(mem);
        }
    }

    /// Goes on with what waits for memory: the pool's own work, that requests which hold memory may wait
    /// for. Returns whether it could.
    pub fn retry_short<M: Memory>(&mut self, mem: &mut M) -> bool {
        if !self.is_short() {
            return false;
        }
        self.retry(mem);
        !self.is_short() || self.members.iter().flatten().any(|m| m.pool.has_disk_io())
    }

    /// Whether something waits for memory.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.members.iter().flatten().any(|m| m.pool.is_short())
    }

    /// The next device that left the pool: nothing is in flight to it, and nothing will be.
    pub fn poll_gone(&mut self) -> Option<u8> {
        self.gone.pop_front()
    }

    /// Takes what the devices answered, and starts what can start, until nothing moves.
    fn settle<M: Memory>(&mut self, mem: &mut M) {
        loop {
            for at in 0..self.members.len() {
                while let Some(done) = self.members[at].as_mut().and_then(|m| m.pool.poll_done()) {
                    self.member_done(at, done, mem);
                }
            }
            self.notice_failures(mem);
            self.pump_jobs(mem);
            self.go_on(mem);
            self.pump_undo(mem);
            self.pump_copies(mem);
            self.pump_leaving(mem);
            self.pump_reserve();
            if self.present().all(|m| m.pool.done.is_empty()) {
                return;
            }
        }
    }

    fn member_done<M: Memory>(&mut self, at: usize, done: Done, mem: &mut M) {
        if done.tag & INTERNAL == 0 {
            self.direct_io -= 1;
            if self.direct.is_none() {
                self.passed_through();
            }
            self.done.push_back(done);
            return;
        }
        let id = u32::try_from(done.tag & u64::from(u32::MAX)).expect("32 bits");
        match done.tag & (INTERNAL | KIND) {
            PART => self.part_done(id, done.status, done.tag, mem),
            JOB => self.job_answered(id, at, done, mem),
            COPY => self.copy_answered(id, done.status, mem),
            _ => self.settle_answered(id, done.status),
        }
    }

    fn answer(&mut self, tag: u64, status: IoStatus) {
        self.done.push_back(Done { tag, status, error: None });
    }

    /// Asserts what must hold between any two events. Slow: it looks at everything.
    ///
    /// # Panics
    /// Where an invariant is broken.
    pub fn check(&self) {
        for member in self.present() {
            member.pool.check();
        }
        self.check_reserve();
        for slot in 0..self.slots {
            if self.is_going_back(slot) {
                // Some devices have what it gives up, and others what it goes back to.
                continue;
            }
            let end = self.present().map(|m| m.pool.mapped_end(slot)).max().unwrap_or(0);
            for logical in 0..end {
                let holders = self.present().filter(|m| !m.failed && m.maps(slot, logical)).count();
                let copied = self.copy_of(slot, logical).is_some();
                assert!(
                    holders <= 1 || copied,
                    "extent {logical} of slot {slot} is on {holders} devices"
                );
            }
        }
    }
}
