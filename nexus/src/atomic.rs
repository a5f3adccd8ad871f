//! Atomic writes: of several blocks, done whole or not at all, whatever dies and when.
//!
//! What a write is to change is kept first, in an entry of the undo log of every member that counts
//! (`cairn_block::undo`), durably; then the write goes to its place as any other, durably; then the entry's head
//! is zeroed, and the host is told. So whoever takes the volume over after a crash finds the entry on a member that
//! counts, or the write is in place everywhere, or nowhere. Where it finds one it brings all members to have it, then puts
//! back what it holds, and forgets it, before anything is served ([`crate::reconcile`]). A write that a member had
//! no room for is taken back in the same way.
//!
//! A write holds its range from the first of these steps to the last: reads that overlap it wait. It gets its
//! buffers before that, so that what waits for its range cannot starve it of memory.

mod steps;

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::undo::{self, Head};
use cairn_block::{Buf, IoOp, IoRequest, IoStatus, LbaRange, Memory};

use crate::children::FaultReason;
use crate::nexus::Nexus;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, MAX_CHILDREN};

/// Blocks that are kept, or put back, at a time.
const PIECE_BLOCKS: u64 = 64;
/// Bytes of a block.
const BLOCK: u32 = 4096;
/// An atomic write whose buffers are not there after so long is refused.
const MEMORY_WAIT_MS: u64 = 2_000;
/// After an answer of no use a child is not asked again before then.
const ASK_AGAIN_MS: u64 = 50;
/// The number of what recovery asks.
const RECOVERY: u16 = u16::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for its range.
    Lock,
    /// Where there were none before: the logs are emptied, and the configuration is to say that there are some.
    Configure,
    /// A piece of what is to be written over is being read.
    Fetch,
    /// And is being kept by every member.
    Keep,
    /// The entry is being made valid.
    Head,
    /// The write itself is under way.
    Place,
    /// A piece of what was kept is being read.
    Recall,
    /// And is being put back where a member has something else.
    Restore,
    /// The entry is being forgotten.
    Clear,
    /// It was refused before there was an entry; what members still do of it is waited for.
    Drop,
    /// Nobody waits for it any more.
    Over,
}

/// One atomic write on its way, or what an earlier nexus has left of one.
#[derive(Debug)]
struct Atomic {
    key: u16,
    /// The host's request; none where an earlier nexus had it.
    slot: Option<u16>,
    range: LbaRange,
    entry: u64,
    /// CRC-32C of each block of what the range held: what does not have it is not what was kept.
    sums: Vec<u32>,
    stage: Stage,
    /// Counts steps: answers to an earlier one come too late.
    turn: u32,
    /// Blocks that are done in this stage, and of the piece in hand.
    at: u64,
    blocks: u64,
    /// Where an earlier nexus had it: the members that have the entry.
    holders: ChildSet,
    /// Children that have not answered in this turn, that have done what it is about, and that failed it.
    outstanding: ChildSet,
    done: ChildSet,
    failed: ChildSet,
    /// Children that could not read it this time.
    passed: ChildSet,
    /// Children that have something else in the piece than what was kept.
    differ: ChildSet,
    data: Option<Buf>,
    bufs: Vec<Buf>,
    status: IoStatus,
    again_ms: u64,
}

/// The atomic writes of a nexus.
#[derive(Debug, Default)]
pub(crate) struct Atomics {
    table: Vec<Atomic>,
    /// Slots that wait for an entry, or for memory, and since when the first does for memory.
    waiting: VecDeque<u16>,
    short_ms: Option<u64>,
    recovery: Option<Recovery>,
    next_key: u16,
}

/// What an earlier nexus has left in the members' undo logs is being looked for.
#[derive(Debug, Default)]
struct Recovery {
    /// Entries that each member has told of.
    told: [u64; MAX_CHILDREN],
    outstanding: ChildSet,
    again_ms: u64,
    turn: u32,
    /// Entries, what their heads tell, where that can be known, and who has them.
    found: Vec<(u64, Option<Head>, ChildSet)>,
    /// All was found, and is being undone.
    undoing: bool,
    /// Who could not tell, and is asked again.
    asked_again: Option<(ChildId, IoStatus)>,
}

impl Atomics {
    fn place_of(&self, slot: u16) -> Option<usize> {
        self.table.iter().position(|a| a.slot == Some(slot))
    }

    /// Whether the request in this slot has what it needs to begin.
    pub(crate) fn has(&self, slot: u16) -> bool {
        self.place_of(slot).is_some()
    }

    /// Whether the request in this slot is with the members, as any other.
    pub(crate) fn is_placing(&self, slot: u16) -> bool {
        self.place_of(slot).is_some_and(|at| self.table[at].stage == Stage::Place)
    }

    pub(crate) fn in_use(&self) -> usize {
        self.table.len()
    }

    fn free_entry(&self) -> Option<u64> {
        (0..undo::ENTRIES).find(|&entry| self.table.iter().all(|a| a.entry != entry))
    }
}

impl Nexus {
    /// Takes a host's write that is to be done whole or not at all, of at most [`undo::MAX_BLOCKS`] blocks; otherwise
    /// as [`Nexus::submit`].
    ///
    /// # Panics
    /// Where [`Nexus::has_room`] is false.
    pub fn submit_atomic(&mut self, tag: u64, request: IoRequest, now_ms: u64) {
        // A block is written whole as it is.
        let plain = request.range.blocks() <= 1 || on(Mutant::AtomicInPlace);
        if request.range.blocks() > undo::MAX_BLOCKS {
            self.done.push_back(crate::types::Done { tag, status: IoStatus::InvalidField });
            self.released.push_back(tag);
            return;
        }
        let op = if plain { request.op } else { IoOp::Write { fua: true } };
        self.submit_as(tag, IoRequest { op, ..request }, !plain, now_ms);
    }

    /// The request in a slot waits for an entry of the log, and for memory.
    pub(crate) fn queue_atomic(&mut self, at: u16) {
        self.atomics.waiting.push_back(at);
        self.mends.kick();
    }

    /// The range of the request in a slot is free.
    pub(crate) fn begin_atomic(&mut self, at: u16, now_ms: u64) {
        let order = self.take_order();
        let slot = self.slots.slot(at);
        slot.phase = Phase::Keeping;
        slot.started_ms = now_ms;
        if slot.order == u64::MAX {
            slot.order = order;
        }
        let place = self.atomics.place_of(at).expect("it has its entry before its range");
        let atomic = &mut self.atomics.table[place];
        if atomic.stage == Stage::Lock {
            atomic.stage = Stage::Configure;
        }
        self.mends.kick();
    }

    /// The members have done the write itself, or have not: it is forgotten, or taken back, and then answered.
    pub(crate) fn placed(&mut self, at: u16, status: IoStatus) {
        self.slots.slot(at).phase = Phase::Keeping;
        let place = self.atomics.place_of(at).expect("it is being placed");
        let atomic = &mut self.atomics.table[place];
        atomic.status = status;
        atomic.go_to(if status.is_ok() { Stage::Clear } else { Stage::Recall });
        self.mends.kick();
    }

    /// Every request was answered: what is on its way is for whoever serves the volume next.
    pub(crate) fn abandon_atomics(&mut self) {
        self.atomics.waiting.clear();
        self.atomics.recovery = None;
        for atomic in &mut self.atomics.table {
            atomic.slot = None;
            atomic.go_to(Stage::Over);
        }
        self.mends.kick();
    }

    /// Moves them on. Returns whether anything changed.
    pub(crate) fn pump_atomics<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        if self.atomics.table.is_empty() && self.atomics.waiting.is_empty() {
            return false;
        }
        let mut moved = self.admit_atomics(mem, now_ms);
        for at in (0..self.atomics.table.len()).rev() {
            // Steps take it out of the table: what they call looks for others there, and not for it.
            let mut steps = false;
            while self.step_atomic(at, mem, now_ms) {
                steps = true;
            }
            moved |= steps;
        }
        let over = |a: &mut Atomic| a.stage == Stage::Over;
        for atomic in self.atomics.table.extract_if(.., over).collect::<Vec<_>>() {
            for buf in atomic.bufs.into_iter().chain(atomic.data) {
                mem.release(buf);
            }
            moved = true;
            if let Some(at) = atomic.slot {
                self.slots.slot(at).atomic = false;
                self.answer(at, atomic.status);
            }
        }
        self.settle(now_ms);
        moved
    }

    /// Gives those that wait an entry and buffers, and lets them take their turn.
    fn admit_atomics<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        let mut moved = false;
        // What an earlier nexus has left may be in any entry. And while the volume goes back to a snapshot nothing is to be
        // written that came before: it would be done between that and its end, and be lost where it is done again.
        while self.atomics.recovery.is_none()
            && self.restoring().is_none()
            && let Some(&at) = self.atomics.waiting.front()
            && let Some(entry) = self.atomics.free_entry()
        {
            let range = self.slots.slot(at).request.range;
            let wanted = self.in_sync.len() + 1;
            let Some(bufs) = take_bufs(wanted, piece_bytes(range), mem) else {
                let since = *self.atomics.short_ms.get_or_insert(now_ms);
                if now_ms.saturating_sub(since) < MEMORY_WAIT_MS {
                    self.mends.short = true;
                    return moved;
                }
                // The next one waits as long.
                self.atomics.short_ms = None;
                self.atomics.waiting.pop_front();
                self.slots.slot(at).atomic = false;
                self.answer(at, IoStatus::NotReady);
                moved = true;
                continue;
            };
            self.atomics.short_ms = None;
            self.atomics.waiting.pop_front();
            let mut atomic = self.new_atomic(range, entry);
            atomic.slot = Some(at);
            atomic.bufs = bufs;
            self.atomics.table.push(atomic);
            self.admit(at, now_ms);
            moved = true;
        }
        moved
    }

    fn new_atomic(&mut self, range: LbaRange, entry: u64) -> Atomic {
        self.atomics.next_key = (self.atomics.next_key + 1) % RECOVERY;
        Atomic {
            key: self.atomics.next_key,
            slot: None,
            range,
            entry,
            sums: Vec::new(),
            stage: Stage::Lock,
            turn: 0,
            at: 0,
            blocks: 0,
            holders: ChildSet::EMPTY,
            outstanding: ChildSet::EMPTY,
            done: ChildSet::EMPTY,
            failed: ChildSet::EMPTY,
            passed: ChildSet::EMPTY,
            differ: ChildSet::EMPTY,
            data: None,
            bufs: Vec::new(),
            status: IoStatus::Ok,
            again_ms: 0,
        }
    }

    // ---- what an earlier nexus has left

    /// The members' undo logs are looked at before anything else is done.
    pub(crate) fn begin_recovery(&mut self) {
        if self.undo && !on(Mutant::UndoForgotten) {
            self.atomics.recovery = Some(Recovery::default());
        }
    }

    /// Moves it on. Returns whether anything changed; none where there is nothing left to do.
    pub(crate) fn pump_recovery<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> Option<bool> {
        let recovery = self.atomics.recovery.as_ref()?;
        if recovery.undoing {
            if self.atomics.table.is_empty() {
                self.atomics.recovery = None;
                self.learn_from(now_ms);
                return Some(true);
            }
            return Some(false);
        }
        let (mut moved, mut done) = (false, true);
        for child in self.in_sync.iter() {
            let recovery = self.atomics.recovery.as_ref()?;
            let entry = recovery.told[usize::from(child.0)];
            if entry >= undo::ENTRIES {
                continue;
            }
            done = false;
            if recovery.outstanding.has(child) || now_ms < recovery.again_ms {
                continue;
            }
            if !self.is_usable(child) {
                self.fail_if_away(child, now_ms);
                continue;
            }
            let Some(buf) = mem.alloc(BLOCK) else {
                self.mends.short = true;
                return Some(moved);
            };
            self.ask_head(child, entry, buf, now_ms);
            moved = true;
        }
        if done && self.commit.is_none() && self.failing().and(self.in_sync).is_empty() {
            self.undo_found();
            self.learn_from(now_ms);
            moved = true;
        }
        Some(moved)
    }

    fn undo_found(&mut self) {
        let Some(recovery) = self.atomics.recovery.as_mut() else { return };
        recovery.undoing = true;
        // One that can be put back is forgotten after that, and not before.
        recovery.found.sort_by_key(|(_, head, _)| head.is_none());
        for (entry, head, holders) in core::mem::take(&mut recovery.found) {
            let range = head.as_ref().map_or(LbaRange::default(), |head| head.range);
            let mut atomic = self.new_atomic(range, entry);
            if let Some(head) = head {
                atomic.sums = head.sums;
                atomic.holders = holders;
                atomic.stage = Stage::Fetch;
            } else if self.atomics.table.iter().any(|other| other.entry == entry) {
                continue;
            } else {
                atomic.stage = Stage::Clear;
            }
            self.atomics.table.push(atomic);
        }
        self.mends.kick();
    }

    fn told_head(&mut self, child: ChildId, status: IoStatus, head: Option<Head>) {
        let (now_ms, blocks) = (self.now_ms, self.config.blocks);
        if !status.is_ok() && status != IoStatus::PathError && self.atomics.recovery.is_some() {
            self.fail_child(child, FaultReason::Failed(status));
        }
        let alone = self.staying().has(child);
        let Some(recovery) = self.atomics.recovery.as_mut() else { return };
        recovery.outstanding = recovery.outstanding.without(ChildSet::of(child));
        let told = &mut recovery.told[usize::from(child.0)];
        let found = match status {
            IoStatus::Ok => head.map(|head| (head.range.end().0 <= blocks).then_some(head)),
            // It is not known what was being written. It is forgotten: what cannot be read now might be one day, and
            // later writes be taken back.
            IoStatus::MediaError if alone => Some(None),
            // Another time it can tell, or it leaves.
            _ => {
                recovery.again_ms = now_ms + ASK_AGAIN_MS;
                recovery.asked_again = Some((child, status));
                return self.update_state();
            }
        };
        recovery.asked_again.take_if(|(other, _)| *other == child);
        let entry = *told;
        *told += 1;
        let Some(head) = found else { return };
        match recovery.found.iter_mut().find(|f| f.0 == entry && f.1 == head) {
            Some((_, _, holders)) => *holders = holders.with(child),
            None => recovery.found.push((entry, head, ChildSet::of(child))),
        }
    }
}

impl Nexus {
    /// What is told while undo logs are looked at.
    pub(crate) fn undoing_text(&self) -> Option<String> {
        let recovery = self.atomics.recovery.as_ref()?;
        let text = "looking for atomic writes that were cut off, to undo them";
        Some(match recovery.asked_again {
            None => text.to_owned(),
            Some((child, status)) => {
                let replica = self.children[usize::from(child.0)].replica;
                format!("{text}; replica {replica} answers {status:?} and is asked again")
            }
        })
    }
}

/// Whether a child that answers so knows of no undo log.
pub(crate) fn is_unknown(status: IoStatus) -> bool {
    matches!(status, IoStatus::OutOfRange | IoStatus::InvalidField | IoStatus::Unsupported)
}

/// Whether a child that is asked again will answer the same.
fn is_final(status: IoStatus) -> bool {
    matches!(status, IoStatus::MediaError | IoStatus::NoSpace) || is_unknown(status)
}

fn piece_bytes(range: LbaRange) -> u32 {
    bytes(range.blocks().min(PIECE_BLOCKS))
}

fn bytes(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("a piece") * BLOCK
}

/// So many buffers, or none.
fn take_bufs<M: Memory>(count: usize, len: u32, mem: &mut M) -> Option<Vec<Buf>> {
    let mut bufs = Vec::with_capacity(count);
    for _ in 0..count {
        match mem.alloc(len) {
            Some(buf) => bufs.push(buf),
            None => {
                bufs.into_iter().for_each(|buf| mem.release(buf));
                return None;
            }
        }
    }
    Some(bufs)
}
