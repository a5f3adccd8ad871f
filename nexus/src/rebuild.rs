//! Rebuild: a member that is out of sync gets what it lacks, while hosts go on, and is taken back.
//!
//! The target gets every change from the first moment, outside the rule for acks: what it fails to do aborts
//! the rebuild and nothing else. Changes that were submitted before are waited for. Then both sides tell of their extents;
//! needed is what is open at the source, or at the target (it may have what nobody else has), or was settled
//! since the target left, or is on one side only. So a member that was away for a moment gets what was
//! written in it, and an empty one everything; holes stay holes. What the target's pool lost with one of its devices
//! can be neither read there nor changed in part: the target gives it up first, and has holes there.
//!
//! To join, the target counts for acks first; what was submitted before that is waited for, the target
//! flushes, and then the configuration with it is stored. From that moment it is read.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{BufSlice, IoOp, IoRequest, IoStatus, LbaRange, Memory, ReplicaId, undo};

use crate::atomic::is_unknown;

use crate::bits::Bits;
use crate::children::{ChildState, FaultReason};
use crate::copy::ASK_AGAIN_MS;
use crate::nexus::Nexus;
use crate::reconcile::span;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp, Event, VolumeState, change};
use crate::upkeep::{Answered, Asked, EXTENT_BLOCKS, PAGE};

/// Rebuilds that are remembered.
const MAX_HISTORY: usize = 32;
/// What could not be read, and not be mended either, is tried again after so long.
const HEAL_AGAIN_MS: u64 = 1_000;
/// A rate is averaged over about so long.
const RATE_MS: u64 = 2_000;
/// Before an extent that could not be read is copied again.
const HEAL_PAUSE_MS: u64 = 20;

/// What a rebuild is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebuildStage {
    /// Finding out what the target lacks.
    Listing,
    /// Copying.
    Copying,
    /// The target is being taken back.
    Joining,
}

/// How a rebuild stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebuildReport {
    /// Whose.
    pub child: ChildId,
    /// What it is at.
    pub stage: RebuildStage,
    /// Bytes to copy in all, as far as is known: whole extents.
    pub bytes_total: u64,
    /// Bytes copied so far.
    pub bytes_done: u64,
    /// Bytes a second, lately.
    pub bytes_per_s: u64,
    /// When it began, as the nexus counts time.
    pub started_ms: u64,
}

/// How a rebuild ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebuildEnd {
    /// The target is in sync.
    Done,
    /// It was given up for this reason.
    Aborted(FaultReason),
}

/// A rebuild that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebuildRecord {
    /// Whose.
    pub replica: ReplicaId,
    /// Why the target was out of sync.
    pub why: FaultReason,
    /// When it began and ended, as the nexus counts time.
    pub started_ms: u64,
    /// See `started_ms`.
    pub ended_ms: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// How it ended.
    pub end: RebuildEnd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Changes that the target did not get are waited for.
    Drain(u64),
    /// Both sides tell.
    List,
    /// The target gives up what its pool has lost with a device.
    GiveUp,
    Copy,
    /// The target forgets what an earlier nexus left in its undo log.
    Forget,
    /// The target counts for acks; changes from before that are waited for.
    JoinDrain(u64),
    JoinFlush,
    JoinCommit,
}

#[derive(Debug)]
pub(crate) struct Rebuild {
    child: ChildId,
    why: FaultReason,
    stage: Stage,
    list_at: u32,
    source: ChildId,
    /// It was asked for lists: those of an earlier rebuild may still be on their way.
    listing: bool,
    pages: [Option<Vec<u8>>; 2],
    /// After an answer of no use nobody is asked before then: a source that fails at once would be asked for
    /// ever in one turn.
    again_ms: u64,
    needed: Bits,
    /// The target has given up what its pool had lost.
    gave_up: bool,
    /// An extent of which pieces are still to be begun, and the next block.
    part: Option<(u32, u64)>,
    extents_total: u64,
    bytes: u64,
    rate: (u64, u64, u64),
    started_ms: u64,
    next_us: u64,
    checkpoint_ms: u64,
    /// A block that the source could not read is being mended.
    healing: bool,
}

impl Nexus {
    /// The child that gets every change though it is not in sync.
    pub(crate) fn mirror(&self) -> Option<ChildId> {
        self.rebuild.as_ref().map(|r| r.child)
    }

    pub(crate) fn mirrors(&self) -> ChildSet {
        self.mirror().map_or(ChildSet::EMPTY, ChildSet::of)
    }

    /// The rebuild that runs.
    #[must_use]
    pub fn rebuild(&self) -> Option<RebuildReport> {
        let r = self.rebuild.as_ref()?;
        let stage = match r.stage {
            Stage::Drain(_) | Stage::List | Stage::GiveUp => RebuildStage::Listing,
            Stage::Copy => RebuildStage::Copying,
            Stage::Forget | Stage::JoinDrain(_) | Stage::JoinFlush | Stage::JoinCommit => {
                RebuildStage::Joining
            }
        };
        Some(RebuildReport {
            child: r.child,
            stage,
            bytes_total: (r.extents_total << 20).max(r.bytes),
            bytes_done: r.bytes,
            bytes_per_s: r.rate.2,
            started_ms: r.started_ms,
        })
    }

    /// The rebuilds that ended, the last one last.
    #[must_use]
    pub fn rebuild_history(&self) -> &[RebuildRecord] {
        &self.rebuilt
    }

    /// Sets how many MiB a second a rebuild copies at most; 0: as fast as it can.
    pub fn set_rebuild_rate(&mut self, mib_s: u32) {
        self.config.pace.rebuild_mib_s = mib_s;
    }

    /// Whether a rebuild can begin, but for its target.
    fn rebuild_may(&self) -> bool {
        matches!(self.state, VolumeState::Online | VolumeState::Degraded)
            && self.assembly.is_none()
            && self.reconcile.is_none()
            && self.commit.is_none()
            && self.copies.is_empty()
            && self.config.pace.rebuild
            && self.in_sync.iter().any(|c| self.is_usable(c))
    }

    /// A child that is there and out of sync.
    fn rebuild_target(&self, now_ms: u64) -> Option<(ChildId, FaultReason)> {
        (0u8..).zip(&self.children).find_map(|(i, c)| match c.state {
            ChildState::OutOfSync(why)
                if c.bound && c.connected && !c.offline && c.trouble.until_ms() <= now_ms =>
            {
                Some((ChildId(i), why))
            }
            _ => None,
        })
    }

    /// When a rebuild is to be begun, or goes on.
    pub(crate) fn rebuild_timeout(&self, now_ms: u64) -> Option<u64> {
        if let Some(r) = &self.rebuild {
            let paced = (r.next_us / 1000).max(now_ms + 1).min(now_ms + 100);
            return Some(paced);
        }
        let held = self.children.iter().filter(|c| {
            matches!(c.state, ChildState::OutOfSync(_)) && c.bound && c.trouble.until_ms() > now_ms
        });
        held.map(|c| c.trouble.until_ms()).min()
    }

    /// Moves the rebuild on. Returns whether anything changed.
    pub(crate) fn pump_rebuild<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        let Some(r) = self.rebuild.as_ref() else {
            if self.in_sync.len() < self.data_voters().len()
                && self.rebuild_may()
                && let Some((child, why)) = self.rebuild_target(now_ms)
            {
                self.begin_rebuild(child, why, now_ms);
                return true;
            }
            return false;
        };
        let child = r.child;
        match r.stage {
            Stage::Drain(before) => {
                // What hangs there of an atomic write would come after what is copied.
                let drained = self.drained(before, self.in_sync.with(child))
                    && !self.upkeep.waits_for_atomic(None, child);
                if drained {
                    self.set_stage(Stage::List);
                }
                drained
            }
            Stage::List => self.list(mem, now_ms),
            Stage::GiveUp | Stage::Forget => false,
            Stage::Copy => self.copy_more(mem, now_ms),
            Stage::JoinDrain(before) => {
                // The answer to a flush of an earlier rebuild, at a disk that hung, is not to be taken for this
                // one's.
                let drained = self.drained(before, self.in_sync.with(child))
                    && !self.upkeep.waits_for(Asked::Join, child);
                if drained {
                    self.set_stage(Stage::JoinFlush);
                    self.ask_flush(child, Asked::Join, now_ms);
                    if on(Mutant::JoinBeforeFlush) {
                        self.set_stage(Stage::JoinCommit);
                    }
                }
                drained
            }
            Stage::JoinFlush => false,
            Stage::JoinCommit => {
                let proposed = self.commit.as_ref().is_some_and(|c| c.target.has(child));
                let may = self.commit.is_none()
                    && self.child(child).state == ChildState::Rebuilding
                    && self.failing().and(self.in_sync).is_empty();
                if !proposed && may {
                    self.commit_target(self.in_sync.with(child));
                }
                !proposed && may
            }
        }
    }

    fn set_stage(&mut self, stage: Stage) {
        if let Some(r) = self.rebuild.as_mut() {
            r.stage = stage;
        }
    }

    fn begin_rebuild(&mut self, child: ChildId, why: FaultReason, now_ms: u64) {
        let before = self.take_order();
        self.child(child).state = ChildState::Rebuilding;
        let extents = self.extents();
        self.rebuild = Some(Rebuild {
            child,
            why,
            stage: Stage::Drain(before),
            list_at: 0,
            source: child,
            listing: false,
            pages: [None, None],
            again_ms: 0,
            needed: Bits::with_len(extents),
            gave_up: false,
            part: None,
            extents_total: 0,
            bytes: 0,
            rate: (now_ms, 0, 0),
            started_ms: now_ms,
            next_us: now_ms * 1000,
            checkpoint_ms: now_ms + self.config.pace.checkpoint_ms,
            healing: false,
        });
        self.push_event(Event::RebuildStarted(child, why));
    }

    // ---- what is needed

    fn list<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        // What the target gives up because an earlier rebuild asked for it is to be told as such.
        if self.upkeep.waits(Asked::List) || self.upkeep.waits(Asked::GiveUp) {
            return false;
        }
        let extents = self.extents();
        let usable = |c: &ChildId| self.is_usable(*c);
        let source = self.in_sync.iter().find(usable);
        let Some(r) = self.rebuild.as_mut() else { return false };
        if let [Some(source), Some(target)] = &mut r.pages {
            let (source, target) = (core::mem::take(source), core::mem::take(target));
            r.pages = [None, None];
            if target.iter().any(|byte| byte & change::LOST != 0) {
                self.lost_at_target(now_ms);
                return true;
            }
            for (extent, (s, t)) in (r.list_at..).zip(source.iter().zip(&target)) {
                if is_needed(*s, *t) {
                    r.needed.insert(extent);
                }
            }
            r.list_at += u32::try_from(source.len()).expect("at most a page");
        }
        if r.list_at >= extents {
            if on(Mutant::RebuildSkipsLast) {
                let last = (0..extents).rev().find(|at| r.needed.has(*at));
                r.needed.remove(last.unwrap_or(extents));
            }
            r.extents_total = r.needed.len() as u64;
            r.stage = Stage::Copy;
            return true;
        }
        let Some(source) = source.filter(|_| now_ms >= r.again_ms) else { return false };
        (r.source, r.listing) = (source, true);
        let (child, first) = (r.child, r.list_at);
        let [has_source, has_target] = [r.pages[0].is_some(), r.pages[1].is_some()];
        let member = self.child(child).member;
        let copied = u64::from(first) + u64::from(PAGE) <= member.copied;
        let since = if copied { member.copied_since } else { member.since };
        let mut moved = false;
        if !has_source {
            moved |= self.ask_changes(source, Asked::List, (first, since), mem, now_ms);
        }
        if !has_target {
            moved |= self.ask_changes(child, Asked::List, (first, u64::MAX), mem, now_ms);
        }
        moved
    }

    /// The target's pool has lost a device. A part of what it had there could not be changed, so the target gives
    /// it up: it is a hole then, where the source has something, or it was written since and is open.
    fn lost_at_target(&mut self, now_ms: u64) {
        let Some(r) = self.rebuild.as_mut() else { return };
        if r.gave_up {
            // One more device is gone.
            return self.abort_rebuild(FaultReason::Failed(IoStatus::MediaError));
        }
        r.stage = Stage::GiveUp;
        let child = r.child;
        self.ask_upkeep(child, Asked::GiveUp, ChildOp::GiveUpLost, now_ms);
    }

    /// The target has given up what it lost, or has not.
    pub(crate) fn given_up(&mut self, child: ChildId, status: IoStatus) {
        let before = self.take_order();
        let Some(r) = self.rebuild.as_mut() else { return };
        if r.child != child || r.stage != Stage::GiveUp {
            return;
        }
        if status.is_ok() {
            // What it failed to do before is waited for: it is copied.
            (r.gave_up, r.list_at, r.stage) = (true, 0, Stage::Drain(before));
        } else {
            self.abort_rebuild(FaultReason::Failed(status));
        }
    }

    /// A side has told of its extents.
    pub(crate) fn list_answered<M: Memory>(&mut self, answer: &Answered, mem: &mut M) {
        let (extents, now_ms) = (self.extents(), self.now_ms);
        let Some(r) = self.rebuild.as_mut() else { return };
        // One that was given up may have been answered late.
        if r.stage != Stage::List || !r.listing {
            return;
        }
        let is_target = answer.child == r.child;
        match (answer.status, &answer.buf) {
            (IoStatus::Ok, Some(buf)) => {
                let count = extents.saturating_sub(r.list_at).min(PAGE);
                let bytes = mem.bytes(buf.slice().sub(0, count)).to_vec();
                r.pages[usize::from(is_target)] = Some(bytes);
            }
            // Another source is asked, or this one once more: not at once, in case it is closing.
            (IoStatus::PathError, _) if !is_target => r.again_ms = now_ms + ASK_AGAIN_MS,
            (status, _) => self.abort_rebuild(FaultReason::Failed(status)),
        }
    }

    // ---- copying

    /// How far it is, where that is worth remembering: all logical extents before this one are copied.
    pub(crate) fn rebuilt_so_far(&self) -> Option<(ChildId, u32)> {
        let r = self.rebuild.as_ref().filter(|r| r.stage == Stage::Copy)?;
        let mut at = r.needed.next(0).unwrap_or(self.extents());
        at = at.min(r.part.map_or(u32::MAX, |(extent, _)| extent));
        at = at.min(self.copies.first_extent().unwrap_or(u32::MAX));
        (u64::from(at) > self.children[usize::from(r.child.0)].member.copied)
            .then_some((r.child, at))
    }

    fn copy_more<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        let blocks = self.config.blocks;
        let depth = self.rebuild_depth();
        let rate = u64::from(self.config.pace.rebuild_mib_s) << 20;
        let checkpoint = self.config.pace.checkpoint_ms;
        let mut moved = false;
        let Some(r) = self.rebuild.as_mut() else { return false };
        if now_ms >= r.checkpoint_ms {
            r.checkpoint_ms = now_ms + checkpoint;
            self.settle_by(now_ms);
        }
        loop {
            let running = self.copies.len();
            let Some(r) = self.rebuild.as_mut() else { return moved };
            if r.healing || now_ms < r.again_ms {
                return moved;
            }
            let next = r.part.or_else(|| {
                let extent = r.needed.next(0)?;
                r.needed.remove(extent);
                Some((extent, u64::from(extent) * EXTENT_BLOCKS))
            });
            let Some((extent, block)) = next else {
                if running == 0 {
                    return self.forget_log(now_ms) || moved;
                }
                return moved;
            };
            r.part = Some((extent, block));
            let end = ((u64::from(extent) + 1) * EXTENT_BLOCKS).min(blocks);
            if block >= end {
                r.part = None;
                continue;
            }
            if running >= depth || (rate > 0 && r.next_us > now_ms * 1000) {
                return moved;
            }
            let Some(copied) = self.begin_copy(block, end, mem, now_ms) else { return moved };
            let Some(r) = self.rebuild.as_mut() else { return moved };
            r.part = Some((extent, block + copied));
            if let Some(us) = (copied * 4096 * 1_000_000).checked_div(rate) {
                // Time that was lost is made up for, up to a tenth of a second.
                let least = (now_ms * 1000).saturating_sub(100_000);
                r.next_us = r.next_us.max(least) + us;
            }
            moved = true;
        }
    }

    /// Pieces at once: few where hosts wait for something.
    fn rebuild_depth(&self) -> usize {
        let depth = usize::from(self.config.pace.rebuild_depth.max(1));
        let busy = self.slots.in_use() > self.lingering;
        if busy { (depth / 4).max(1) } else { depth }
    }

    /// So many bytes were copied.
    pub(crate) fn copied(&mut self, bytes: u64, now_ms: u64) {
        let Some(r) = self.rebuild.as_mut() else { return };
        r.bytes += bytes;
        let (since, at_bytes, rate) = r.rate;
        let passed = now_ms.saturating_sub(since);
        if passed >= RATE_MS || rate == 0 && passed >= 100 {
            r.rate = (now_ms, r.bytes, (r.bytes - at_bytes) * 1000 / passed.max(1));
        }
    }

    /// What was copied in this range is copied again: the members were changed there without the target.
    pub(crate) fn mirror_is_behind(&mut self, range: LbaRange) {
        self.settle_is_behind(span(range).0);
        let Some(r) = self.rebuild.as_mut() else { return };
        match r.stage {
            Stage::Drain(_) => {}
            Stage::List | Stage::GiveUp | Stage::Copy => {
                let (first, end) = span(range);
                for extent in first..end {
                    r.needed.insert(extent);
                }
            }
            _ => {
                let child = r.child;
                self.fail_child(child, FaultReason::Behind);
            }
        }
    }

    /// The range of a copy could not be read: it is mended first.
    pub(crate) fn heal_for_rebuild(&mut self, range: LbaRange) {
        if self.rebuild.is_none() {
            return;
        }
        let (begun, now_ms) = (self.begin_heal(range), self.now_ms);
        let Some(r) = self.rebuild.as_mut() else { return };
        r.healing = begun;
        r.again_ms = now_ms + HEAL_PAUSE_MS;
        let (first, end) = span(range);
        for extent in first..end {
            r.needed.insert(extent);
        }
    }

    /// It is mended, or so many of its blocks are lost; or it could not be decided, since a member is away.
    pub(crate) fn healed_for_rebuild(&mut self, lost: u64, sure: bool) {
        let now_ms = self.now_ms;
        let Some(r) = self.rebuild.as_mut() else { return };
        r.healing = false;
        if !sure {
            r.again_ms = now_ms + HEAL_AGAIN_MS;
        }
        if lost > 0 {
            self.abort_rebuild(FaultReason::SourceUnreadable);
        }
    }

    // ---- the end

    /// What is in the target's undo log is of a time when it was in sync.
    fn forget_log(&mut self, now_ms: u64) -> bool {
        let Some(child) = self.mirror() else { return false };
        if self.upkeep.waits_for(Asked::Forget, child) {
            // One of an earlier rebuild must not come after what is yet to be in the log.
            return false;
        }
        self.set_stage(Stage::Forget);
        if self.wanted.undo || self.undo || self.atomics.in_use() > 0 {
            let op = IoOp::WriteZeroes { fua: true, unmap: true };
            let request = IoRequest { op, range: undo::whole(), buf: BufSlice::EMPTY };
            self.ask_upkeep(child, Asked::Forget, ChildOp::Io(request), now_ms);
        } else {
            self.begin_join();
        }
        true
    }

    /// The target has forgotten it, or knows of no log where there is none yet; or it has not.
    pub(crate) fn forgotten(&mut self, child: ChildId, status: IoStatus) {
        if self.rebuild.as_ref().is_none_or(|r| r.child != child || r.stage != Stage::Forget) {
            return;
        }
        let none = !self.undo && !self.wanted.undo && is_unknown(status);
        if status.is_ok() || none {
            self.begin_join();
        } else {
            self.abort_rebuild(FaultReason::Failed(status));
        }
    }

    fn begin_join(&mut self) {
        let before = self.take_order();
        let Some(r) = self.rebuild.as_mut() else { return };
        r.stage = Stage::JoinDrain(before);
        self.joining = ChildSet::of(r.child);
    }

    /// The target has flushed, or has not.
    pub(crate) fn join_answered(&mut self, child: ChildId, status: IoStatus) {
        let Some(r) = self.rebuild.as_mut() else { return };
        if r.child != child || r.stage != Stage::JoinFlush {
            return;
        }
        if status.is_ok() {
            r.stage = Stage::JoinCommit;
        } else {
            self.abort_rebuild(FaultReason::Failed(status));
        }
    }

    /// The configuration with the target is stored.
    pub(crate) fn joined(&mut self, child: ChildId) {
        if self.mirror() != Some(child) {
            return;
        }
        self.joining = ChildSet::EMPTY;
        if self.child(child).state == ChildState::Rebuilding {
            self.child(child).state = ChildState::Online;
            self.push_event(Event::ChildOnline(child));
        }
        self.end_rebuild(RebuildEnd::Done);
        self.note_change(self.now_ms);
    }

    /// Whether what the target could not do is copied to it anyhow: its pool may have lost what was there, and it
    /// is not known yet what it lacks.
    pub(crate) fn is_copied_later(&mut self, child: ChildId, range: LbaRange) -> bool {
        let Some(r) = self.rebuild.as_mut().filter(|r| r.child == child) else { return false };
        if matches!(
            r.stage,
            Stage::Copy
                | Stage::Forget
                | Stage::JoinDrain(_)
                | Stage::JoinFlush
                | Stage::JoinCommit
        ) {
            return false;
        }
        let (first, end) = span(range);
        for extent in first..end {
            r.needed.insert(extent);
        }
        true
    }

    /// The target failed an operation that a host does not wait for.
    pub(crate) fn mirror_failed(&mut self, child: ChildId, status: IoStatus) {
        if status == IoStatus::Fenced {
            self.fence();
        } else if self.mirror() == Some(child) {
            let connected = self.child(child).connected;
            let lost = !connected || status == IoStatus::PathError;
            let why = if lost { FaultReason::Unreachable } else { FaultReason::Failed(status) };
            self.fail_child(child, why);
        }
    }

    /// Gives the rebuild up. Nothing depends on its target, unless the configuration with it is on its way.
    pub(crate) fn abort_rebuild(&mut self, why: FaultReason) {
        let Some(child) = self.mirror() else { return };
        let now_ms = self.now_ms;
        let c = self.child(child);
        c.state = ChildState::OutOfSync(why);
        c.trouble.note(now_ms);
        self.joining = ChildSet::EMPTY;
        self.push_event(Event::RebuildAborted(child, why));
        self.end_rebuild(RebuildEnd::Aborted(why));
        self.abandon_copies();
        self.look_again();
        self.unpark();
    }

    fn end_rebuild(&mut self, end: RebuildEnd) {
        let Some(r) = self.rebuild.take() else { return };
        if self.rebuilt.len() >= MAX_HISTORY {
            self.rebuilt.remove(0);
        }
        self.rebuilt.push(RebuildRecord {
            replica: self.children[usize::from(r.child.0)].replica,
            why: r.why,
            started_ms: r.started_ms,
            ended_ms: self.now_ms,
            bytes: r.bytes,
            end,
        });
        if end == RebuildEnd::Done {
            self.push_event(Event::RebuildFinished(r.child, r.bytes));
        }
    }

    /// Whether a snapshot has to wait: the target that is being taken back would be asked for none.
    pub(crate) fn joins(&self, op: IoOp) -> bool {
        matches!(op, IoOp::Snapshot(_)) && !self.joining.is_empty()
    }

    /// To go back to a snapshot changes what was settled long ago: whoever is out of sync gets everything
    /// anew. True where that has to be stored first.
    pub(crate) fn forget_what_is_settled(&mut self) -> bool {
        let mut forgets = false;
        for at in 0..self.children.len() {
            let child = ChildId(u8::try_from(at).expect("few children"));
            if self.in_sync.has(child) {
                continue;
            }
            // Nor is it stored how far a rebuild was before.
            forgets |= self.child(child).cursor.take().is_some();
            let member = &mut self.child(child).member;
            forgets |= member.since != 0 || member.copied != 0;
            (member.since, member.copied, member.copied_since) = (0, 0, 0);
        }
        if self.rebuild.is_some() {
            self.abort_rebuild(FaultReason::Behind);
            forgets = true;
        }
        forgets
    }
}

/// Whether a rebuild copies an extent: what the source says of it, and the target.
fn is_needed(source: u8, target: u8) -> bool {
    let (here, there) = (source & change::MAPPED != 0, target & change::MAPPED != 0);
    let open = if on(Mutant::RebuildIgnoresOpen) { 0 } else { change::OPEN };
    let since = if on(Mutant::RebuildIgnoresStamps) { 0 } else { change::SINCE };
    let changed = (source | target) & open != 0 || source & since != 0;
    here != there || here && changed
}
