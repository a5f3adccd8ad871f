//! The steps of an atomic write.
//!
//! Each step is asked of every member that counts for acks, and is over when all of them have done it: one that
//! does not leaves the in-sync set first, durably. So no entry is forgotten by one member while another that counts
//! may still hold it, and the write acked.

use cairn_block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, LbaRange, Memory, undo};

use super::{
    ASK_AGAIN_MS, Atomic, BLOCK, PIECE_BLOCKS, RECOVERY, Stage, bytes, is_final, is_unknown,
};
use crate::children::{ChildState, FaultReason};
use crate::nexus::Nexus;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp};
use crate::upkeep::{Answered, Asked, EXTENT_BLOCKS};

impl Atomic {
    /// Begins a stage. What is still on its way for the last one comes too late.
    pub(super) fn go_to(&mut self, stage: Stage) {
        self.stage = stage;
        self.at = 0;
        self.next_turn();
        self.bufs.extend(self.data.take());
    }

    fn next_turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        (self.outstanding, self.done) = (ChildSet::EMPTY, ChildSet::EMPTY);
        (self.failed, self.passed) = (ChildSet::EMPTY, ChildSet::EMPTY);
        self.differ = ChildSet::EMPTY;
    }

    /// The piece in hand is done. Returns whether it was the last one.
    fn next_piece(&mut self) -> bool {
        self.at += self.blocks;
        self.next_turn();
        self.bufs.extend(self.data.take());
        self.at >= self.range.blocks()
    }

    /// Settles how long the piece in hand is: it lies in one extent.
    fn cut(&mut self) {
        let first = self.range.start().0 + self.at;
        let left = (self.range.blocks() - self.at).min(EXTENT_BLOCKS - first % EXTENT_BLOCKS);
        self.blocks = left.min(PIECE_BLOCKS);
    }

    /// It cannot be kept, so it is not done. A head may be somewhere where that was begun.
    fn refuse(&mut self) {
        let headed = self.stage == Stage::Head;
        self.go_to(if headed { Stage::Clear } else { Stage::Drop });
    }

    /// Where the piece in hand is in the volume.
    fn piece(&self) -> LbaRange {
        let first = cairn_block::Lba(self.range.start().0 + self.at);
        LbaRange::new(first, self.blocks).expect("within the range")
    }

    /// Where it is in the log.
    fn kept(&self) -> LbaRange {
        undo::payload_of(self.entry, self.at, self.blocks)
    }

    /// Whether a piece that was read is what was kept: what is in the log may have been lost with a device while
    /// its head was not. Of what is about to be written over, the sums are taken here.
    fn is_kept(&mut self, data: &[u8]) -> bool {
        let sums = data.chunks_exact(BLOCK as usize).map(crc32c::crc32c);
        let at = usize::try_from(self.at).expect("within the range");
        if self.stage == Stage::Fetch && self.slot.is_some() {
            self.sums.truncate(at);
            self.sums.extend(sums);
            return true;
        }
        sums.eq(self.sums.iter().skip(at).take(data.len() / BLOCK as usize).copied())
    }

    /// A buffer of a piece's length.
    fn take_buf<M: Memory>(&mut self, mem: &mut M) -> Option<Buf> {
        self.bufs.pop().or_else(|| mem.alloc(super::piece_bytes(self.range)))
    }
}

impl Nexus {
    /// Those that have to do what is done to all: the members, and one that is being taken back.
    fn counted(&self) -> ChildSet {
        self.in_sync.or(self.joining)
    }

    /// Those of whom this step can be asked now.
    fn askable(&mut self, at: usize, now_ms: u64) -> ChildSet {
        let a = &self.atomics.table[at];
        let (key, slot, waits) = (a.key, a.slot, now_ms < a.again_ms);
        let missing = self.counted().without(a.done).without(a.outstanding);
        let mut askable = ChildSet::EMPTY;
        for child in missing.iter() {
            let c = &self.children[usize::from(child.0)];
            let joins = self.joining.has(child) && c.connected;
            if self.upkeep.waits_for_atomic(Some(key), child) {
                // What it was asked before must not come after this.
                continue;
            }
            if self.is_usable(child) || joins {
                askable = askable.with(child);
            } else {
                self.fail_if_away(child, now_ms);
                if let Some(slot) = slot {
                    // So that it is noticed where it does not come to take part.
                    self.park(slot);
                }
            }
        }
        if waits { ChildSet::EMPTY } else { askable }
    }

    /// One that is not there leaves, or that does not come to take part while nothing is served; unless nobody else
    /// is there either.
    pub(super) fn fail_if_away(&mut self, child: ChildId, now_ms: u64) {
        let waited = now_ms.saturating_sub(self.reconcile_since());
        let late = self.atomics.recovery.is_some() && waited > self.config.child_deadline_ms;
        let away = late || self.child(child).state == ChildState::Disconnected;
        let others = self.in_sync.without(ChildSet::of(child));
        if away && self.one_is_there(others, now_ms) {
            self.fail_child(child, FaultReason::Unreachable);
        }
    }

    fn is_done_by_all(&self, at: usize) -> bool {
        self.counted().without(self.atomics.table[at].done).is_empty()
    }

    /// One step. Returns whether there may be another.
    pub(super) fn step_atomic<M: Memory>(&mut self, at: usize, mem: &mut M, now_ms: u64) -> bool {
        match self.atomics.table[at].stage {
            Stage::Lock | Stage::Place | Stage::Over => false,
            Stage::Configure => self.configure(at, now_ms),
            Stage::Fetch | Stage::Recall => self.read_old(at, mem, now_ms),
            Stage::Keep => self.keep(at, mem, now_ms),
            Stage::Head => self.write_heads(at, mem, now_ms),
            Stage::Restore => self.restore_old(at, mem, now_ms),
            Stage::Clear => self.clear(at, now_ms),
            Stage::Drop => {
                let key = self.atomics.table[at].key;
                let busy = |child| self.upkeep.waits_for_atomic(Some(key), child);
                if !self.counted().iter().any(busy) {
                    self.atomics.table[at].stage = Stage::Over;
                }
                false
            }
        }
    }

    /// The configuration says that there are undo logs, before there is one: whoever does not know of them does not
    /// serve the volume. What is in them from before that is of another time, and is forgotten first.
    fn configure(&mut self, at: usize, now_ms: u64) -> bool {
        if self.undo {
            self.atomics.table[at].go_to(Stage::Fetch);
            return true;
        }
        // One does it for all: it must not come after what another keeps.
        if at > 0 || self.wanted.undo {
            return false;
        }
        if self.is_done_by_all(at) {
            self.wanted.undo = true;
            self.commit_wanted();
            return false;
        }
        for child in self.askable(at, now_ms).iter() {
            let op = IoOp::WriteZeroes { fua: true, unmap: true };
            self.ask_atomic(at, child, op, undo::whole(), None, now_ms);
        }
        false
    }

    /// Has a piece of what the range holds read, or of what was kept of it.
    fn read_old<M: Memory>(&mut self, at: usize, mem: &mut M, now_ms: u64) -> bool {
        let counted = self.counted();
        let busy = self.atomics.table[at].slot.map(|slot| self.slots.slot(slot).outstanding);
        let a = &mut self.atomics.table[at];
        let recalls = a.stage == Stage::Recall;
        if a.data.is_some() {
            a.next_turn();
            a.stage = if recalls { Stage::Restore } else { Stage::Keep };
            return true;
        }
        if recalls && busy.is_some_and(|busy| !busy.and(counted).is_empty()) {
            // A member that is only late would write after it was put back.
            return false;
        }
        if !a.outstanding.and(counted).is_empty() {
            return false;
        }
        // Of one that was given up nothing is expected.
        a.outstanding = ChildSet::EMPTY;
        let logged = recalls || a.slot.is_none();
        let from =
            if a.slot.is_none() && !recalls { self.in_sync.and(a.holders) } else { self.in_sync };
        let (failed, passed, again_ms) = (a.failed, a.passed, a.again_ms);
        let left = from.without(failed);
        if left.is_empty() {
            return self.unreadable(at);
        }
        if now_ms < again_ms {
            return false;
        }
        let usable = |&child: &ChildId| self.is_usable(child);
        let fresh = left.without(passed).iter().find(usable);
        let Some(child) = fresh.or_else(|| left.iter().find(usable)) else {
            for child in left.iter() {
                self.fail_if_away(child, now_ms);
            }
            return false;
        };
        let a = &mut self.atomics.table[at];
        if fresh.is_none() {
            a.passed = ChildSet::EMPTY;
        }
        a.cut();
        let range = if logged { a.kept() } else { a.piece() };
        let Some(buf) = a.take_buf(mem) else {
            self.mends.short = true;
            return false;
        };
        self.ask_atomic(at, child, IoOp::Read, range, Some(buf), now_ms);
        false
    }

    /// No member can read it. A write that has not begun is refused; what was to be put back, and cannot be, is
    /// more than one fault in one place.
    fn unreadable(&mut self, at: usize) -> bool {
        let a = &mut self.atomics.table[at];
        if a.status.is_ok() {
            a.status = IoStatus::MediaError;
        }
        let begun = a.stage == Stage::Recall || a.slot.is_none();
        a.go_to(if begun { Stage::Clear } else { Stage::Drop });
        true
    }

    /// Has every member keep the piece in hand.
    fn keep<M: Memory>(&mut self, at: usize, mem: &mut M, now_ms: u64) -> bool {
        if self.is_done_by_all(at) {
            let a = &mut self.atomics.table[at];
            if a.next_piece() {
                a.go_to(Stage::Head);
            } else {
                a.stage = Stage::Fetch;
            }
            return true;
        }
        for child in self.askable(at, now_ms).iter() {
            let range = self.atomics.table[at].kept();
            if !self.write_copy(at, child, range, mem, now_ms) {
                return false;
            }
        }
        false
    }

    /// Sends a child the piece in hand. False where there is no memory.
    fn write_copy<M: Memory>(
        &mut self,
        at: usize,
        child: ChildId,
        range: LbaRange,
        mem: &mut M,
        now_ms: u64,
    ) -> bool {
        let a = &mut self.atomics.table[at];
        let Some(buf) = a.take_buf(mem) else {
            self.mends.short = true;
            return false;
        };
        let len = bytes(a.blocks);
        let data = a.data.as_ref().expect("the piece was read").slice().sub(0, len);
        mem.copy(data, buf.slice().sub(0, len));
        self.ask_atomic(at, child, IoOp::Write { fua: true }, range, Some(buf), now_ms);
        true
    }

    /// Has every member make the entry valid; then the write goes to its place.
    fn write_heads<M: Memory>(&mut self, at: usize, mem: &mut M, now_ms: u64) -> bool {
        if self.is_done_by_all(at) {
            let a = &mut self.atomics.table[at];
            let Some(slot) = a.slot else {
                a.go_to(Stage::Recall);
                return true;
            };
            a.go_to(Stage::Place);
            self.start(slot, now_ms);
            return true;
        }
        let volume = self.config.volume;
        for child in self.askable(at, now_ms).iter() {
            let a = &mut self.atomics.table[at];
            let (range, head) = (a.range, undo::head_of(a.entry));
            let Some(buf) = a.take_buf(mem) else {
                self.mends.short = true;
                return false;
            };
            let block = mem.bytes_mut(buf.slice().sub(0, BLOCK));
            undo::encode_head(volume, range, &a.sums, block);
            self.ask_atomic(at, child, IoOp::Write { fua: true }, head, Some(buf), now_ms);
        }
        false
    }

    /// Puts a piece back where a member has something else there. Where it has, it has an extent there; elsewhere a
    /// write might find no room.
    fn restore_old<M: Memory>(&mut self, at: usize, mem: &mut M, now_ms: u64) -> bool {
        if self.is_done_by_all(at) {
            let a = &mut self.atomics.table[at];
            let over = a.next_piece();
            if over {
                a.go_to(Stage::Clear);
            } else {
                a.stage = Stage::Recall;
            }
            return true;
        }
        for child in self.askable(at, now_ms).iter() {
            let a = &mut self.atomics.table[at];
            let piece = a.piece();
            let asked = if a.differ.has(child) {
                self.write_copy(at, child, piece, mem, now_ms)
            } else if let Some(buf) = a.take_buf(mem) {
                self.ask_atomic(at, child, IoOp::Read, piece, Some(buf), now_ms);
                true
            } else {
                self.mends.short = true;
                false
            };
            if !asked {
                return false;
            }
        }
        false
    }

    /// Has every member forget the entry.
    fn clear(&mut self, at: usize, now_ms: u64) -> bool {
        if self.is_done_by_all(at) {
            self.atomics.table[at].stage = Stage::Over;
            return false;
        }
        let head = undo::head_of(self.atomics.table[at].entry);
        for child in self.askable(at, now_ms).iter() {
            let op = IoOp::WriteZeroes { fua: true, unmap: true };
            self.ask_atomic(at, child, op, head, None, now_ms);
        }
        false
    }

    fn ask_atomic(
        &mut self,
        at: usize,
        child: ChildId,
        op: IoOp,
        range: LbaRange,
        buf: Option<Buf>,
        now_ms: u64,
    ) {
        let a = &mut self.atomics.table[at];
        a.outstanding = a.outstanding.with(child);
        let (key, turn) = (a.key, a.turn);
        self.ask_log(child, (key, turn), op, range, buf, now_ms);
    }

    /// Asks a member for the head of one of its entries.
    pub(super) fn ask_head(&mut self, child: ChildId, entry: u64, buf: Buf, now_ms: u64) {
        let Some(recovery) = self.atomics.recovery.as_mut() else { return };
        recovery.outstanding = recovery.outstanding.with(child);
        let of = (RECOVERY, recovery.turn);
        self.ask_log(child, of, IoOp::Read, undo::head_of(entry), Some(buf), now_ms);
    }

    fn ask_log(
        &mut self,
        child: ChildId,
        (key, turn): (u16, u32),
        op: IoOp,
        range: LbaRange,
        buf: Option<Buf>,
        now_ms: u64,
    ) {
        let window =
            buf.as_ref().map_or(BufSlice::EMPTY, |b| b.slice().sub(0, bytes(range.blocks())));
        let op = ChildOp::Io(IoRequest { op, range, buf: window });
        self.ask_with(child, Asked::Atomic(key, turn), op, buf, now_ms);
    }

    /// A child has answered. Its buffer is taken back, or left to be released.
    pub(crate) fn atomic_answered<M: Memory>(
        &mut self,
        (key, turn): (u16, u32),
        answer: &mut Answered,
        mem: &M,
    ) {
        let (child, status) = (answer.child, answer.status);
        if key == RECOVERY {
            let head = answer.buf.as_ref().filter(|_| status.is_ok()).and_then(|buf| {
                undo::decode_head(self.config.volume, mem.bytes(buf.slice().sub(0, BLOCK)))
            });
            return self.told_head(child, status, head);
        }
        let now_ms = self.now_ms;
        let Some(a) = self.atomics.table.iter_mut().find(|a| a.key == key) else { return };
        if a.turn != turn || a.stage == Stage::Over {
            a.bufs.extend(answer.buf.take());
            return;
        }
        a.outstanding = a.outstanding.without(ChildSet::of(child));
        if status == IoStatus::PathError {
            // It is gone, or on its way out: not at once, in case it is closing.
            a.again_ms = now_ms + ASK_AGAIN_MS;
            a.bufs.extend(answer.buf.take());
            return;
        }
        match a.stage {
            Stage::Fetch | Stage::Recall => {
                let len = bytes(a.blocks);
                let data = answer.buf.as_ref().filter(|_| status.is_ok());
                if data.is_some_and(|buf| a.is_kept(mem.bytes(buf.slice().sub(0, len)))) {
                    a.data = answer.buf.take();
                    if a.stage == Stage::Fetch {
                        a.status = IoStatus::Ok;
                    }
                    return;
                }
                let begun = a.stage == Stage::Recall || a.slot.is_none();
                if !begun {
                    a.status = status;
                }
                if status.is_ok() || is_final(status) || !begun {
                    a.failed = a.failed.with(child);
                } else {
                    a.passed = a.passed.with(child);
                    a.again_ms = now_ms + ASK_AGAIN_MS;
                }
            }
            Stage::Restore
                if !a.differ.has(child) && (status.is_ok() || status == IoStatus::MediaError) =>
            {
                let len = bytes(a.blocks);
                let window = |buf: &Option<Buf>| {
                    buf.as_ref().map(|buf| buf.slice().sub(0, len)).unwrap_or_default()
                };
                let same = mem.bytes(window(&a.data)) == mem.bytes(window(&answer.buf));
                if status.is_ok() && same {
                    a.done = a.done.with(child);
                } else {
                    a.differ = a.differ.with(child);
                }
            }
            _ if status.is_ok() => a.done = a.done.with(child),
            _ => {
                a.bufs.extend(answer.buf.take());
                return self.atomic_failed(key, child, status);
            }
        }
        a.bufs.extend(answer.buf.take());
    }

    /// A child has not done its step.
    fn atomic_failed(&mut self, key: u16, child: ChildId, status: IoStatus) {
        let now_ms = self.now_ms;
        let Some(a) = self.atomics.table.iter_mut().find(|a| a.key == key) else { return };
        a.again_ms = now_ms + ASK_AGAIN_MS;
        let keeps = matches!(a.stage, Stage::Configure | Stage::Keep | Stage::Head);
        // One that joins is given up instead: the members can keep it.
        let member = self.in_sync.has(child);
        let refused = member && (status == IoStatus::NoSpace || is_unknown(status));
        if keeps && refused && a.slot.is_some() {
            // Nothing is in place yet: the host is told, and no member is the worse for it.
            let unknown = status != IoStatus::NoSpace;
            a.status = if unknown { IoStatus::Unsupported } else { status };
            return a.refuse();
        }
        self.fail_child(child, FaultReason::Failed(status));
        let stays = self.staying().has(child);
        let Some(a) = self.atomics.table.iter_mut().find(|a| a.key == key) else { return };
        if !stays {
            return;
        }
        // It is the only one left.
        match (a.stage, a.slot) {
            (Stage::Configure | Stage::Keep | Stage::Head, Some(_)) => {
                a.status = status;
                a.refuse();
            }
            // What cannot be put back there stays as it is: the host hears of an error, or its disk has failed
            // besides.
            (Stage::Restore | Stage::Keep | Stage::Head, _) if is_final(status) => {
                a.done = a.done.with(child);
            }
            // It may do it another time. Were it not forgotten, later writes would be taken back one day.
            _ => {}
        }
    }
}
