//! Mend: making replicas alike, and right, where a child said that they are not.
//!
//! A mend takes a range under the lock that orders it against mutations, and goes through it piece by
//! piece: it finds which members cannot read a block (or, where a write met a full pool, which differ),
//! reads the block from one that can, and writes it to those. Pieces are of [`PIECE_BLOCKS`]; one with
//! something wrong in it is gone through block by block, so that blocks that are bad on different
//! replicas still come out right.

mod steps;

use cairn_block::{Buf, BufSlice, IoStatus, LbaRange, Memory};

use crate::nexus::Nexus;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, MAX_CHILDREN, Ticket};
use crate::upkeep::Asked;

/// Blocks of a piece: 64 KiB from each child.
pub(crate) const PIECE_BLOCKS: u64 = 16;
/// Bytes of a block.
const BLOCK: u32 = 4096;
/// Bytes that mends of all volumes keep for when there is no memory: a block of each child.
#[expect(clippy::cast_possible_truncation, reason = "8 children")]
pub const MEND_RESERVE: u32 = MAX_CHILDREN as u32 * BLOCK;
/// Mends at work at once that wait for a lock, and as many again that work under one that they were
/// given. Two kinds, since the first may wait for the second.
const MAX_MENDS: usize = 4;
/// Places in the table: what hangs at a child that was given up keeps its place.
const MAX_PLACES: usize = 256;
/// Keys of mends in the table of ranges begin here; below are slots.
pub(crate) const FIRST_KEY: u16 = u16::MAX - 256;

/// What has been mended since the nexus came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MendCounters {
    /// Blocks of which a replica's copy did not verify, and that were taken up.
    pub heals: u64,
    /// Copies of blocks that were written anew and verify now.
    pub healed: u64,
    /// Blocks of which no copy verifies.
    pub unrecoverable: u64,
    /// Writes that met a full pool, after which the replicas were made alike.
    pub converged: u64,
}

/// For whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// A host's read that a child could not answer; its buffer is used.
    Read(u16),
    /// A host's Verify that found something.
    Verify(u16),
    /// A mutation for which a child had no space. The slot holds the lock.
    Converge(u16),
    /// A part of a scrub.
    Scrub,
    /// A part of a scrub that compares.
    Compare,
    /// An extent that may differ since a crash.
    Alike,
    /// A piece that a rebuild could not read.
    Heal,
    /// Nobody waits for it any more.
    Nobody,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Every member verifies the whole range, without the lock.
    Scan,
    /// Waits for the lock.
    Lock,
    /// The next piece is to be begun.
    Piece,
    /// Every member verifies the piece.
    Probe,
    /// A member reads the piece.
    Fetch,
    /// Every member reads the piece.
    Gather,
    /// Members that are bad, or differ, are written.
    Rewrite,
    /// Members that had no room are read once more: what they were to write may be there all the same.
    Reread,
    /// What was written is verified.
    Recheck,
    /// Waits until a member comes back, or is out.
    Held,
    /// What children still have in hand is waited for.
    Over,
}

/// One mend.
#[derive(Debug)]
pub(crate) struct Mend {
    task: Task,
    range: LbaRange,
    step: Step,
    locked: bool,
    piece: LbaRange,
    /// Where the next piece begins.
    next: u64,
    /// Pieces that begin before here are single blocks.
    single_until: u64,
    /// The buffer, and whether it is the reserve.
    buf: Option<(Buf, bool)>,
    /// Children whose operation of this step has not come back.
    outstanding: ChildSet,
    /// How the others of this step ended: done, unreadable or unwritable, no space, anything else.
    ok: ChildSet,
    media: ChildSet,
    full: ChildSet,
    gone: ChildSet,
    /// Members whose copy of this piece does not verify.
    bad: ChildSet,
    /// Members that could not be asked about this piece.
    away: ChildSet,
    /// Members whose copy of this piece is in their window.
    known: ChildSet,
    /// Members that have no room for this piece, and those whose copy was tried on the others.
    stuck: ChildSet,
    tried: ChildSet,
    source: ChildId,
    /// Who is asked first.
    first: ChildSet,
    /// Children that are out and have not answered, and what they may use.
    stale: ChildSet,
    stale_bufs: Vec<(Buf, bool)>,
    gave_up: ChildSet,
    started_ms: u64,
    /// The place of its last write among all changes.
    order: u64,
    /// Blocks that no member can read, and those that could not be decided.
    lost: u64,
    unsure: u64,
    /// Blocks of a scrub's part that are not in holes, on the replica that has most.
    data: u64,
}

/// The mends of a nexus.
#[derive(Debug, Default)]
pub(crate) struct Mends {
    table: Vec<Option<Mend>>,
    /// Slots that wait for a place.
    queue: Vec<Task>,
    /// Something has changed that held mends wait for.
    kick: bool,
    pub(crate) short: bool,
    pub(crate) counters: MendCounters,
}

impl Mends {
    pub(crate) fn is_idle(&self) -> bool {
        self.in_use() == 0 && self.queue.is_empty()
    }

    pub(crate) fn in_use(&self) -> usize {
        self.table.iter().flatten().count()
    }

    pub(crate) fn kick(&mut self) {
        self.kick = true;
    }

    pub(crate) fn scrubs(&self) -> bool {
        let scrubs = |m: &Mend| matches!(m.task, Task::Scrub | Task::Compare);
        self.table.iter().flatten().any(scrubs)
    }

    fn place(&mut self, mend: Mend) -> u16 {
        let free = self.table.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.table.push(None);
            self.table.len() - 1
        });
        self.table[at] = Some(mend);
        u16::try_from(at).expect("few mends")
    }

    fn has_place(&self, converges: bool) -> bool {
        let same =
            |m: &&Mend| m.step != Step::Over && matches!(m.task, Task::Converge(_)) == converges;
        self.table.iter().flatten().filter(same).count() < MAX_MENDS && self.in_use() < MAX_PLACES
    }
}

impl Mend {
    fn new(task: Task, range: LbaRange, step: Step) -> Self {
        Self {
            task,
            range,
            step,
            locked: false,
            piece: LbaRange::default(),
            next: range.start().0,
            single_until: 0,
            buf: None,
            outstanding: ChildSet::EMPTY,
            ok: ChildSet::EMPTY,
            media: ChildSet::EMPTY,
            full: ChildSet::EMPTY,
            gone: ChildSet::EMPTY,
            bad: ChildSet::EMPTY,
            away: ChildSet::EMPTY,
            known: ChildSet::EMPTY,
            stuck: ChildSet::EMPTY,
            tried: ChildSet::EMPTY,
            source: ChildId(0),
            first: ChildSet::EMPTY,
            stale: ChildSet::EMPTY,
            stale_bufs: Vec::new(),
            gave_up: ChildSet::EMPTY,
            started_ms: 0,
            order: u64::MAX,
            lost: 0,
            unsure: 0,
            data: 0,
        }
    }

    /// Where a child's copy of the piece lies; one for all but where copies are compared.
    fn window(&self, child: ChildId, host: BufSlice) -> BufSlice {
        let len = bytes(self.piece.blocks());
        match (&self.buf, self.task) {
            (_, Task::Read(_)) => host.sub(bytes(self.piece.start().0 - self.range.start().0), len),
            (Some((buf, _)), Task::Converge(_) | Task::Compare | Task::Alike) => {
                buf.slice().sub(u32::from(child.0) * len, len)
            }
            (Some((buf, _)), _) => buf.slice().sub(0, len),
            (None, _) => BufSlice::EMPTY,
        }
    }

    /// Goes on to the next piece.
    fn advance(&mut self) {
        self.next = self.piece.end().0;
        self.step = Step::Piece;
    }

    /// Goes through the piece block by block.
    fn split(&mut self) {
        self.single_until = self.piece.end().0;
        self.step = Step::Piece;
    }

    /// Whether somebody waits for it, and has for longer than `limit_ms` in this step.
    fn is_late(&self, now_ms: u64, limit_ms: u64) -> bool {
        self.step != Step::Over && now_ms.saturating_sub(self.started_ms) >= limit_ms
    }

    fn is_single(&self) -> bool {
        self.piece.blocks() == 1
    }

    fn set_outcome(&mut self, child: ChildId, status: IoStatus) {
        let set = match status {
            IoStatus::Ok => &mut self.ok,
            IoStatus::MediaError => &mut self.media,
            IoStatus::NoSpace => &mut self.full,
            _ => &mut self.gone,
        };
        *set = set.with(child);
    }
}

fn bytes(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("a piece, or a host's transfer") * BLOCK
}

impl Nexus {
    /// Moves the mends and the scrub on. To be called after every event, until it returns false, with
    /// the memory that they get their buffers from and a reserve of [`MEND_RESERVE`] bytes that all
    /// volumes share.
    pub fn run_mends<M: Memory>(
        &mut self,
        mem: &mut M,
        reserve: &mut Option<Buf>,
        now_ms: u64,
    ) -> bool {
        let before = self.child_ios.len();
        self.now_ms = now_ms;
        let upkeep = self.run_upkeep(mem, now_ms);
        if self.mends.is_idle() && !self.scrub_runs() {
            return upkeep || self.child_ios.len() > before;
        }
        let kick = core::mem::take(&mut self.mends.kick);
        let mut ended = self.admit_mends();
        ended |= self.pump_scrub(now_ms);
        for at in 0..self.mends.table.len() {
            let Some(mut mend) = self.mends.table[at].take() else { continue };
            if kick && mend.step == Step::Held {
                mend.step = Step::Piece;
            }
            let key = u16::try_from(at).expect("few mends");
            if self.run_mend(key, &mut mend, mem, reserve, now_ms) {
                ended = true;
            } else {
                self.mends.table[at] = Some(mend);
            }
        }
        self.settle(now_ms);
        ended || upkeep || self.child_ios.len() > before || self.mends.kick
    }

    /// Whether a mend waits for memory: [`Nexus::run_mends`] is to be called when some may be free.
    #[must_use]
    pub fn waits_for_memory(&self) -> bool {
        self.mends.short
    }

    /// What has been mended.
    #[must_use]
    pub fn mend_counters(&self) -> MendCounters {
        self.mends.counters
    }

    /// The slot's request cannot be answered before its range is mended.
    pub(crate) fn begin_mend(&mut self, task: Task) {
        if let Task::Read(at) | Task::Verify(at) | Task::Converge(at) = task {
            self.slots.slot(at).phase = Phase::Mending;
        }
        self.mends.queue.push(task);
    }

    /// Moves on what the nexus does on its own account. Returns whether anything changed.
    fn run_upkeep<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        self.mends.short = false;
        let mut moved = false;
        while let Some(mut answer) = self.next_answer() {
            moved = true;
            match answer.what {
                Asked::Settle => self.settle_answered(answer.child, answer.status),
                Asked::Learn => self.learn_answered(&answer, mem),
                Asked::List => self.list_answered(&answer, mem),
                Asked::GiveUp => self.given_up(answer.child, answer.status),
                Asked::Forget => self.forgotten(answer.child, answer.status),
                Asked::Join => self.join_answered(answer.child, answer.status),
                Asked::Atomic(key, turn) => self.atomic_answered((key, turn), &mut answer, mem),
            }
            if let Some(buf) = answer.buf {
                mem.release(buf);
            }
        }
        if !self.copies.is_empty() {
            moved |= self.pump_copies(mem, now_ms);
            self.settle(now_ms);
        }
        moved |= self.pump_atomics(mem, now_ms);
        if !self.state.is_serving() && !self.learns() {
            return moved;
        }
        moved |= self.pump_reconcile(mem, now_ms);
        moved |= self.pump_settle(now_ms);
        moved |= self.pump_rebuild(mem, now_ms);
        moved
    }

    /// Whether every write of a mend from before `before` is over, as far as these children go.
    pub(crate) fn mends_drained(&self, before: u64, whom: ChildSet) -> bool {
        // What hangs since an earlier step is from before, whatever the mend has done since.
        let over = |m: &Mend| {
            let current = m.order >= before || m.outstanding.and(whom).is_empty();
            current && m.stale.and(whom).is_empty()
        };
        self.mends.table.iter().flatten().all(over)
    }

    /// Makes the members alike in an extent; the preferred ones are believed first.
    pub(crate) fn begin_alike(&mut self, range: LbaRange, preferred: ChildSet) -> bool {
        if !self.mends.has_place(false) {
            return false;
        }
        let mut mend = Mend::new(Task::Alike, range, Step::Lock);
        mend.first = preferred;
        self.place_locked(mend);
        true
    }

    /// Mends a range of which a rebuild could not read something.
    pub(crate) fn begin_heal(&mut self, range: LbaRange) -> bool {
        if !self.mends.has_place(false) {
            return false;
        }
        self.place_locked(Mend::new(Task::Heal, range, Step::Lock));
        true
    }

    /// Begins a part of the scrub.
    pub(crate) fn begin_scrub_part(&mut self, range: LbaRange, compare: bool) -> bool {
        if !self.mends.has_place(false) {
            return false;
        }
        if compare {
            self.place_locked(Mend::new(Task::Compare, range, Step::Lock));
        } else {
            self.mends.place(Mend::new(Task::Scrub, range, Step::Scan));
        }
        true
    }

    fn admit_mends(&mut self) -> bool {
        let mut moved = false;
        let mut i = 0;
        while let Some(&task) = self.mends.queue.get(i) {
            if !self.mends.has_place(matches!(task, Task::Converge(_))) {
                i += 1;
                continue;
            }
            self.mends.queue.remove(i);
            moved = true;
            let (Task::Read(at) | Task::Verify(at) | Task::Converge(at)) = task else { continue };
            let slot = self.slots.slot(at);
            let mut mend = Mend::new(task, slot.request.range, Step::Lock);
            mend.first = slot.bad;
            if let Task::Converge(_) = task {
                mend.step = Step::Piece;
                mend.first = slot.full;
                self.mends.place(mend);
                continue;
            }
            slot.mending = matches!(task, Task::Read(_));
            self.place_locked(mend);
        }
        moved
    }

    /// Puts a mend in that goes on once it has the lock.
    fn place_locked(&mut self, mend: Mend) {
        let range = mend.range;
        let at = self.mends.place(mend);
        if self.ranges.enter(range, FIRST_KEY + at, true) {
            self.mend_locked(FIRST_KEY + at);
        }
    }

    /// The mend whose key this is has its range.
    pub(crate) fn mend_locked(&mut self, key: u16) {
        let mend = self.mends.table[usize::from(key - FIRST_KEY)].as_mut();
        let mend = mend.expect("a mend that waits for its lock");
        mend.locked = true;
        mend.step = Step::Piece;
        self.mends.kick = true;
    }

    /// A Verify of a child, whose answer comes next, found data in so many blocks: what it cost.
    pub fn handle_verified(&mut self, ticket: Ticket, blocks: u64) {
        if ticket.is_mend()
            && let Some(mend) = self.mends.table[ticket.mend()].as_mut()
        {
            mend.data = mend.data.max(blocks);
        }
    }

    /// A child's operation for a mend is answered.
    pub(crate) fn handle_mend_io(&mut self, child: ChildId, ticket: Ticket, status: IoStatus) {
        let mend = self.mends.table[ticket.mend()].as_mut().expect("a mend that waits for a child");
        let writes = matches!(mend.step, Step::Rewrite | Step::Over);
        if mend.stale.has(child) {
            mend.stale = mend.stale.without(ChildSet::of(child));
        } else {
            assert!(mend.outstanding.has(child), "an answer that no mend waits for");
            mend.outstanding = mend.outstanding.without(ChildSet::of(child));
            mend.set_outcome(child, status);
        }
        let c = self.child(child);
        c.load -= 1;
        if writes {
            c.note_tried();
        }
    }

    /// Children with an operation of a mend that has missed its deadline.
    pub(crate) fn late_in_mends(&self, now_ms: u64) -> ChildSet {
        let limit = self.config.child_deadline_ms;
        self.mends
            .table
            .iter()
            .flatten()
            .filter(|m| m.is_late(now_ms, limit))
            .fold(ChildSet::EMPTY, |set, m| set.or(m.outstanding.without(m.gave_up)))
    }

    /// The late children were given up; hosts that wait for a mend at a local disk that hangs ask again.
    pub(crate) fn give_up_mends(&mut self, now_ms: u64) {
        let limit = self.config.child_deadline_ms;
        for at in 0..self.mends.table.len() {
            let Some(mend) = self.mends.table[at].as_mut() else { continue };
            if !mend.is_late(now_ms, limit) {
                continue;
            }
            let missed = mend.outstanding.without(mend.gave_up);
            mend.gave_up = mend.outstanding;
            let local = missed.iter().any(|c| self.children[usize::from(c.0)].local);
            if let (true, Task::Read(slot) | Task::Verify(slot)) = (local, mend.task) {
                mend.step = Step::Over;
                if mend.task == Task::Verify(slot) {
                    mend.task = Task::Nobody;
                }
                self.answer(slot, IoStatus::NotReady);
            }
        }
        self.mends.kick = true;
    }

    /// Every request was answered: mends only wait for what children have in hand.
    pub(crate) fn abandon_mends(&mut self) {
        self.mends.queue.clear();
        for mend in self.mends.table.iter_mut().flatten() {
            mend.step = Step::Over;
            mend.locked = false;
            if !matches!(mend.task, Task::Read(_)) {
                mend.task = Task::Nobody;
            }
        }
        self.mends.kick = true;
    }
}
