//! Copies of pieces to a member that is rebuilt: each reads from a member and writes to the target, under the
//! lock of its range.

use cairn_block::{Buf, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};

use crate::children::FaultReason;
use crate::mend::FIRST_KEY;
use crate::nexus::Nexus;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildIo, ChildOp, Ticket};
use crate::upkeep::EXTENT_BLOCKS;

/// Blocks of a piece, where there is memory for it: 256 KiB.
const PIECE: u64 = 64;
/// After an answer of no use a member is asked again after so long: its session may be closing.
pub(crate) const ASK_AGAIN_MS: u64 = 10;
/// Copies at once at most.
const MAX_COPIES: u16 = 64;
/// Keys of copies in the table of ranges begin here; below are slots.
pub(crate) const COPY_KEY: u16 = FIRST_KEY - MAX_COPIES;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Lock,
    /// A member is to be asked.
    Ask,
    Read,
    /// It is there, to be written.
    Fetched,
    Write,
    Over,
}

#[derive(Debug)]
struct Copy {
    range: LbaRange,
    step: Step,
    locked: bool,
    buf: Buf,
    outstanding: ChildSet,
    status: IoStatus,
    started_ms: u64,
    /// Nobody is asked before then.
    again_ms: u64,
}

/// The copies that are under way.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    table: Vec<Option<Copy>>,
}

impl Copies {
    pub(crate) fn len(&self) -> usize {
        self.table.iter().flatten().count()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first extent that one is at.
    pub(crate) fn first_extent(&self) -> Option<u32> {
        let starts = self.table.iter().flatten().map(|c| c.range.start().0 / EXTENT_BLOCKS);
        starts.min().map(|at| u32::try_from(at).unwrap_or(u32::MAX))
    }
}

impl Nexus {
    /// Begins to copy a piece from `block` on. Returns how many blocks it has; nothing where there is no
    /// room for one now.
    pub(crate) fn begin_copy<M: Memory>(
        &mut self,
        block: u64,
        end: u64,
        mem: &mut M,
        now_ms: u64,
    ) -> Option<u64> {
        if self.copies.len() >= usize::from(MAX_COPIES) {
            return None;
        }
        let whole = (end - block).min(PIECE - block % PIECE);
        // The memory first: what waits for the range may have all that there is.
        let lens = [whole, whole.min(16), 1];
        let found = lens.into_iter().find_map(|len| mem.alloc(bytes(len)).map(|buf| (len, buf)));
        let Some((len, buf)) = found else {
            self.mends.short = true;
            return None;
        };
        let range = LbaRange::new(Lba(block), len).expect("inside the volume");
        let copy = Copy {
            range,
            step: Step::Lock,
            locked: false,
            buf,
            outstanding: ChildSet::EMPTY,
            status: IoStatus::Ok,
            started_ms: now_ms,
            again_ms: 0,
        };
        let free = self.copies.table.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.copies.table.push(None);
            self.copies.table.len() - 1
        });
        self.copies.table[at] = Some(copy);
        let key = COPY_KEY + u16::try_from(at).expect("few copies");
        if self.ranges.enter(range, key, true) {
            self.copy_locked(key);
        }
        Some(len)
    }

    /// The copy whose key this is has its range.
    pub(crate) fn copy_locked(&mut self, key: u16) {
        let copy = self.copies.table[usize::from(key - COPY_KEY)].as_mut();
        let copy = copy.expect("a copy that waits for its lock");
        copy.locked = true;
        if copy.step == Step::Lock {
            copy.step = Step::Ask;
        }
        self.mends.kick();
    }

    /// A child's operation for a copy is answered.
    pub(crate) fn handle_copy_io(&mut self, child: ChildId, at: u16, status: IoStatus) {
        let c = self.child(child);
        c.load -= 1;
        let copy = self.copies.table[usize::from(at)].as_mut().expect("a copy that waits");
        assert!(copy.outstanding.has(child), "an answer that no copy waits for");
        copy.outstanding = copy.outstanding.without(ChildSet::of(child));
        copy.status = status;
        if copy.step == Step::Write && status.is_ok() {
            self.child(child).note_done(0, IoOp::Write { fua: false });
        }
    }

    /// Moves every copy on. Returns whether anything changed.
    pub(crate) fn pump_copies<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        let mut moved = false;
        for at in 0..self.copies.table.len() {
            let Some(mut copy) = self.copies.table[at].take() else { continue };
            let place = u16::try_from(at).expect("few copies");
            if self.run_copy(place, &mut copy, mem, now_ms) {
                mem.release(copy.buf);
                moved = true;
            } else {
                self.copies.table[at] = Some(copy);
            }
        }
        moved
    }

    /// Moves a copy as far as it goes. Returns whether it has ended.
    fn run_copy<M: Memory>(&mut self, at: u16, c: &mut Copy, mem: &mut M, now_ms: u64) -> bool {
        loop {
            if !c.outstanding.is_empty() {
                return false;
            }
            match c.step {
                Step::Lock => return false,
                Step::Ask if now_ms < c.again_ms => return false,
                Step::Ask => {
                    let usable = self.in_sync.iter().filter(|&m| self.is_usable(m));
                    let best = usable.min_by_key(|m| self.children[usize::from(m.0)].load);
                    let Some(source) = best else { return false };
                    c.step = Step::Read;
                    self.ask_copy(at, c, source, IoOp::Read, now_ms);
                }
                Step::Read => match c.status {
                    IoStatus::Ok => c.step = Step::Fetched,
                    IoStatus::MediaError => {
                        c.step = Step::Over;
                        self.heal_for_rebuild(c.range);
                    }
                    // It is gone, or on its way out: another is asked. Not at once: until it is known to be
                    // gone it would be asked again and again in one turn.
                    IoStatus::PathError | IoStatus::TimedOut => {
                        c.again_ms = now_ms + ASK_AGAIN_MS;
                        c.step = Step::Ask;
                    }
                    status => {
                        c.step = Step::Over;
                        self.abort_rebuild(FaultReason::Failed(status));
                    }
                },
                Step::Fetched => {
                    let Some(target) = self.mirror() else {
                        c.step = Step::Over;
                        continue;
                    };
                    let data = mem.bytes(c.buf.slice().sub(0, bytes(c.range.blocks())));
                    let zeros = data.first() == Some(&0) && data[1..] == data[..data.len() - 1];
                    let op = if zeros {
                        IoOp::WriteZeroes { fua: false, unmap: true }
                    } else {
                        IoOp::Write { fua: false }
                    };
                    c.step = Step::Write;
                    self.ask_copy(at, c, target, op, now_ms);
                }
                Step::Write => {
                    c.step = Step::Over;
                    if c.status.is_ok() {
                        self.copied(u64::from(bytes(c.range.blocks())), now_ms);
                    } else if let Some(target) = self.mirror() {
                        self.mirror_failed(target, c.status);
                    }
                }
                Step::Over => {
                    if c.locked {
                        c.locked = false;
                        self.ranges.leave(COPY_KEY + at);
                    }
                    return true;
                }
            }
        }
    }

    fn ask_copy(&mut self, at: u16, c: &mut Copy, child: ChildId, op: IoOp, now_ms: u64) {
        self.child(child).load += 1;
        c.outstanding = ChildSet::of(child);
        c.started_ms = now_ms;
        let buf = match op {
            IoOp::WriteZeroes { .. } => cairn_block::BufSlice::EMPTY,
            _ => c.buf.slice().sub(0, bytes(c.range.blocks())),
        };
        let op = ChildOp::Io(IoRequest { op, range: c.range, buf });
        self.child_ios.push_back(ChildIo { child, ticket: Ticket::of_copy(at), op });
    }

    /// Children that owe a copy an answer for longer than the limit.
    pub(crate) fn late_in_copies(&self, now_ms: u64) -> ChildSet {
        let limit = self.config.child_deadline_ms;
        let late = |c: &&Copy| now_ms.saturating_sub(c.started_ms) >= limit;
        let late = self.copies.table.iter().flatten().filter(late);
        late.fold(ChildSet::EMPTY, |set, c| set.or(c.outstanding))
    }

    /// The rebuild was given up: nothing new is asked, and nobody waits for what a copy still waits for.
    pub(crate) fn abandon_copies(&mut self) {
        for at in 0..self.copies.table.len() {
            let Some(copy) = self.copies.table[at].as_mut() else { continue };
            if copy.step == Step::Lock {
                // Its lock will come to it, and go at once.
                continue;
            }
            copy.step = Step::Over;
            if core::mem::take(&mut copy.locked) {
                let key = COPY_KEY + u16::try_from(at).expect("few copies");
                self.ranges.leave(key);
            }
        }
        self.mends.kick();
    }

    /// As [`Nexus::abandon_copies`], where the table of ranges is cleared.
    pub(crate) fn drop_copies(&mut self) {
        for copy in self.copies.table.iter_mut().flatten() {
            copy.step = Step::Over;
            copy.locked = false;
        }
        self.mends.kick();
    }
}

fn bytes(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("a piece") * 4096
}
