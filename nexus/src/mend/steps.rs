//! What a mend does, step by step. Each step asks children something and is looked at when all of them
//! have answered, or are out.

use core::cmp::Reverse;

use cairn_block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};

use super::{FIRST_KEY, Mend, PIECE_BLOCKS, Step, Task, bytes};
use crate::children::{ChildState, FaultReason};
use crate::nexus::Nexus;
use crate::scrub::Found;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, ChildIo, ChildOp, Ticket};

impl Nexus {
    /// Moves one mend as far as it goes. Returns whether it has ended.
    pub(super) fn run_mend<M: Memory>(
        &mut self,
        at: u16,
        m: &mut Mend,
        mem: &mut M,
        reserve: &mut Option<Buf>,
        now_ms: u64,
    ) -> bool {
        loop {
            if m.step == Step::Over {
                return self.end_mend(at, m, mem, reserve);
            }
            if !m.outstanding.is_empty() {
                if !m.outstanding.and(self.in_sync).is_empty() {
                    return false;
                }
                // Who has not answered is out: nothing more is asked of it, and what it uses is not
                // used for anything else.
                if let Task::Read(slot) = m.task {
                    if !m.outstanding.iter().any(|c| self.children[usize::from(c.0)].local) {
                        // Its session is being reset, which answers it.
                        return false;
                    }
                    self.answer(slot, IoStatus::NotReady);
                    m.step = Step::Over;
                    continue;
                }
                m.stale = m.stale.or(m.outstanding);
                m.outstanding = ChildSet::EMPTY;
                m.stale_bufs.extend(m.buf.take());
                if m.step == Step::Scan {
                    m.unsure += 1;
                    self.finish_mend(m, now_ms);
                    continue;
                }
                m.step = Step::Piece;
            }
            match m.step {
                Step::Lock | Step::Held => return false,
                Step::Scan => {
                    if self.scan(at, m, now_ms) {
                        return false;
                    }
                }
                Step::Piece => {
                    if !self.begin_piece(at, m, mem, reserve, now_ms) {
                        return false;
                    }
                }
                Step::Probe => self.probed(m),
                Step::Fetch => {
                    if !self.fetched(at, m, mem, reserve, now_ms) {
                        return false;
                    }
                }
                Step::Gather => self.gathered(at, m, mem, now_ms),
                Step::Rewrite => self.rewritten(at, m, mem, now_ms),
                Step::Reread => self.reread(at, m, mem, now_ms),
                Step::Recheck => self.rechecked(m),
                Step::Over => {}
            }
        }
    }

    fn end_mend<M: Memory>(
        &mut self,
        at: u16,
        m: &mut Mend,
        mem: &mut M,
        reserve: &mut Option<Buf>,
    ) -> bool {
        let out = m.outstanding.or(m.stale);
        if m.locked && out.and(self.in_sync).is_empty() {
            m.locked = false;
            self.ranges.leave(FIRST_KEY + at);
        }
        if !out.is_empty() {
            return false;
        }
        for (buf, is_reserve) in m.buf.take().into_iter().chain(m.stale_bufs.drain(..)) {
            if is_reserve {
                *reserve = Some(buf);
            } else {
                mem.release(buf);
            }
        }
        if let Task::Read(slot) = m.task {
            self.slots.slot(slot).mending = false;
            self.release_if_free(slot);
        }
        true
    }

    /// Members that can be asked.
    fn members(&self, m: &Mend) -> ChildSet {
        let usable = self.in_sync.iter().filter(|&c| self.is_usable(c));
        usable.fold(ChildSet::EMPTY, ChildSet::with).without(m.stale)
    }

    fn ask_all(&mut self, at: u16, m: &mut Mend, whom: ChildSet, op: IoOp, now_ms: u64) {
        m.ok = ChildSet::EMPTY;
        m.media = ChildSet::EMPTY;
        m.full = ChildSet::EMPTY;
        m.gone = ChildSet::EMPTY;
        m.gave_up = ChildSet::EMPTY;
        m.started_ms = now_ms;
        if let IoOp::Write { .. } = op {
            m.order = self.take_order();
            self.note_change(now_ms);
        }
        let host = match m.task {
            Task::Read(slot) => self.slots.slot(slot).request.buf,
            _ => BufSlice::EMPTY,
        };
        let range = if m.step == Step::Scan { m.range } else { m.piece };
        for child in whom.iter() {
            let c = self.child(child);
            c.load += 1;
            let buf = match op {
                IoOp::Read => m.window(child, host),
                IoOp::Write { .. } => m.window(m.source, host),
                _ => BufSlice::EMPTY,
            };
            m.outstanding = m.outstanding.with(child);
            let op = ChildOp::Io(IoRequest { op, range, buf });
            self.child_ios.push_back(ChildIo { child, ticket: Ticket::of_mend(at), op });
        }
    }

    /// Lets every member verify the range, or looks at what they said. Returns whether they are at it.
    fn scan(&mut self, at: u16, m: &mut Mend, now_ms: u64) -> bool {
        if m.ok.or(m.media).or(m.full).or(m.gone).is_empty() {
            let members = self.members(m);
            if members.is_empty() {
                m.unsure += 1;
                self.finish_mend(m, now_ms);
                return false;
            }
            self.ask_all(at, m, members, IoOp::Verify, now_ms);
            return true;
        }
        if m.media.is_empty() {
            m.unsure += u64::from(m.ok.is_empty());
            self.finish_mend(m, now_ms);
            return false;
        }
        m.step = Step::Lock;
        if self.ranges.enter(m.range, FIRST_KEY + at, true) {
            m.locked = true;
            m.step = Step::Piece;
        }
        false
    }

    /// Begins the next piece, or ends the mend. Returns whether it can go on at once.
    fn begin_piece<M: Memory>(
        &mut self,
        at: u16,
        m: &mut Mend,
        mem: &mut M,
        reserve: &mut Option<Buf>,
        now_ms: u64,
    ) -> bool {
        if m.next >= m.range.end().0 {
            self.finish_mend(m, now_ms);
            return true;
        }
        let converges = matches!(m.task, Task::Converge(_) | Task::Alike);
        if converges && self.in_sync.len() == 1 {
            self.finish_mend(m, now_ms);
            return true;
        }
        if converges && !self.all_here() {
            m.step = Step::Held;
            return false;
        }
        let members = self.members(m);
        if members.is_empty() {
            if let Task::Read(slot) = m.task {
                self.restart_read(slot, m);
                return true;
            }
            m.step = Step::Held;
            return false;
        }
        let whole = ((m.next / PIECE_BLOCKS + 1) * PIECE_BLOCKS).min(m.range.end().0);
        let end = if m.next < m.single_until { m.next + 1 } else { whole };
        m.piece = LbaRange::new(Lba(m.next), end - m.next).expect("inside the volume");
        m.bad = ChildSet::EMPTY;
        m.away = ChildSet::EMPTY;
        m.known = ChildSet::EMPTY;
        m.stuck = ChildSet::EMPTY;
        m.tried = ChildSet::EMPTY;
        match m.task {
            Task::Read(_) => self.fetch(at, m, now_ms),
            Task::Converge(_) | Task::Compare | Task::Alike => {
                let windows = self.children.len() as u64;
                if !self.get_buf(m, windows, mem, reserve) {
                    if m.is_single() {
                        self.mends.short = true;
                        return false;
                    }
                    // There may be memory for less.
                    m.single_until = m.piece.end().0;
                    return true;
                }
                m.step = Step::Gather;
                self.ask_all(at, m, members, IoOp::Read, now_ms);
            }
            _ => {
                m.step = Step::Probe;
                self.ask_all(at, m, members, IoOp::Verify, now_ms);
            }
        }
        true
    }

    /// Whether every member can be asked. One that cannot is given up, as where a write would miss it.
    fn all_here(&mut self) -> bool {
        let mut all = true;
        for child in self.in_sync.iter() {
            if self.is_usable(child) {
                continue;
            }
            all = false;
            if self.child(child).state == ChildState::Disconnected {
                self.fail_child(child, FaultReason::Unreachable);
            }
        }
        all
    }

    /// Sees to it that there is a buffer for so many copies of the piece.
    fn get_buf<M: Memory>(
        &mut self,
        m: &mut Mend,
        windows: u64,
        mem: &mut M,
        reserve: &mut Option<Buf>,
    ) -> bool {
        let len = bytes(m.piece.blocks() * windows);
        if m.buf.as_ref().is_some_and(|(buf, _)| buf.len() >= len) {
            return true;
        }
        if let Some((buf, is_reserve)) = m.buf.take() {
            if is_reserve {
                *reserve = Some(buf);
            } else {
                mem.release(buf);
            }
        }
        m.buf = mem.alloc(len).map(|buf| (buf, false));
        if m.buf.is_none() && m.is_single() {
            m.buf = reserve.take().map(|buf| (buf, true));
        }
        m.buf.is_some()
    }

    fn probed(&mut self, m: &mut Mend) {
        m.bad = m.media;
        m.away = m.gone.or(m.full);
        m.unsure += u64::from(m.ok.is_empty() && m.bad.is_empty());
        if m.bad.is_empty() {
            m.advance();
        } else if m.is_single() {
            self.mends.counters.heals += 1;
            // Nothing is outstanding: the next look sends the read.
            m.ok = ChildSet::EMPTY;
            m.media = ChildSet::EMPTY;
            m.gone = ChildSet::EMPTY;
            m.step = Step::Fetch;
        } else {
            m.split();
        }
    }

    /// Reads the piece from the best member that has not failed to.
    fn fetch(&mut self, at: u16, m: &mut Mend, now_ms: u64) {
        let left = self.members(m).without(m.bad).without(m.away);
        let best = left.iter().min_by_key(|&c| {
            let child = &self.children[usize::from(c.0)];
            (!m.first.has(c), !child.local, child.load)
        });
        m.step = Step::Fetch;
        if let Some(child) = best {
            m.source = child;
            self.ask_all(at, m, ChildSet::of(child), IoOp::Read, now_ms);
            return;
        }
        let undecided = !m.away.is_empty() || self.in_sync.iter().any(|c| !self.is_usable(c));
        match m.task {
            // Who is away may come back with it.
            Task::Read(slot) if undecided => self.restart_read(slot, m),
            _ if undecided => {
                m.unsure += 1;
                self.note_found(m, m.bad, Found::NotHealed);
                m.advance();
            }
            _ => {
                m.lost += 1;
                self.mends.counters.unrecoverable += 1;
                self.note_found(m, m.bad, Found::Unrecoverable);
                m.advance();
            }
        }
    }

    /// Reads from the next best member, or writes what was read. Returns whether it can go on at once.
    fn fetched<M: Memory>(
        &mut self,
        at: u16,
        m: &mut Mend,
        mem: &mut M,
        reserve: &mut Option<Buf>,
        now_ms: u64,
    ) -> bool {
        if !m.media.is_empty() {
            if !m.is_single() {
                m.split();
                return true;
            }
            if m.bad.is_empty() {
                self.mends.counters.heals += 1;
            }
        }
        m.bad = m.bad.or(m.media);
        m.away = m.away.or(m.gone).or(m.full);
        if m.ok.is_empty() {
            if !matches!(m.task, Task::Read(_)) && !self.get_buf(m, 1, mem, reserve) {
                self.mends.short = true;
                return false;
            }
            self.fetch(at, m, now_ms);
            return true;
        }
        let targets = m.bad.and(self.members(m));
        if targets.is_empty() {
            m.advance();
            return true;
        }
        m.step = Step::Rewrite;
        self.ask_all(at, m, targets, IoOp::Write { fua: false }, now_ms);
        true
    }

    /// The copies are all there: finds those that differ.
    fn gathered<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        let converges = matches!(m.task, Task::Converge(_) | Task::Alike);
        if converges && !m.gone.or(m.full).is_empty() {
            for child in m.gone.or(m.full).iter() {
                self.fail_child(child, FaultReason::Unreachable);
            }
            m.step = Step::Held;
            return;
        }
        m.known = m.ok;
        m.bad = m.media;
        let copy = |c: ChildId| m.window(c, BufSlice::EMPTY);
        let mut alike = m.known.iter();
        let first = alike.next();
        let same = first.is_none_or(|f| alike.all(|c| mem.bytes(copy(f)) == mem.bytes(copy(c))));
        if same && m.bad.is_empty() {
            m.advance();
            return;
        }
        if !m.is_single() {
            m.split();
            return;
        }
        self.mends.counters.heals += u64::from(!m.bad.is_empty());
        let Some(lowest) = first else {
            m.lost += 1;
            self.mends.counters.unrecoverable += 1;
            self.note_found(m, m.bad, Found::Unrecoverable);
            m.advance();
            return;
        };
        let votes = |c: ChildId| {
            m.known.iter().filter(|&o| mem.bytes(copy(o)) == mem.bytes(copy(c))).count()
        };
        m.source = if m.task == Task::Alike {
            let believed = m.known.and(m.first);
            let believed = if believed.is_empty() { m.known } else { believed };
            believed.iter().max_by_key(|&c| (votes(c), Reverse(c))).unwrap_or(lowest)
        } else if converges {
            m.known.and(m.first).iter().next().unwrap_or(lowest)
        } else {
            m.known.iter().max_by_key(|&c| (votes(c), Reverse(c))).unwrap_or(lowest)
        };
        self.spread(at, m, mem, now_ms);
    }

    /// Writes the source's copy to those that differ from it or are bad.
    fn spread<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        let copy = |c: ChildId| mem.bytes(m.window(c, BufSlice::EMPTY));
        let differ = m.known.iter().filter(|&c| copy(c) != copy(m.source));
        let differ = differ.fold(ChildSet::EMPTY, ChildSet::with);
        m.tried = m.tried.with(m.source);
        let targets = differ.or(m.bad.without(m.stuck)).and(self.members(m));
        if targets.is_empty() {
            m.advance();
            return;
        }
        m.step = Step::Rewrite;
        self.mirror_is_behind(m.piece);
        self.ask_all(at, m, targets, IoOp::Write { fua: false }, now_ms);
    }

    fn rewritten<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        for child in m.media.iter() {
            self.fail_child(child, FaultReason::Failed(IoStatus::MediaError));
        }
        if let Task::Converge(_) | Task::Alike = m.task {
            self.converged(at, m, mem, now_ms);
            return;
        }
        let failed = m.media.or(m.full).or(m.gone);
        self.note_found(m, failed, Found::NotHealed);
        if m.task == Task::Compare {
            self.note_found(m, m.ok.without(m.bad), Found::Differed);
        }
        let again = m.ok.and(self.members(m));
        if again.is_empty() {
            m.advance();
            return;
        }
        m.step = Step::Recheck;
        self.ask_all(at, m, again, IoOp::Verify, now_ms);
    }

    fn rechecked(&mut self, m: &mut Mend) {
        for child in m.media.iter() {
            self.fail_child(child, FaultReason::Failed(IoStatus::MediaError));
        }
        let healed = m.ok.and(m.bad);
        self.mends.counters.healed += healed.len() as u64;
        self.note_found(m, healed, Found::Healed);
        let not = m.media.or(m.full).or(m.gone).and(m.bad);
        self.note_found(m, not, Found::NotHealed);
        m.advance();
    }

    /// The members that could take the source's copy have it. Those that have no room keep what they
    /// hold, and the others get that.
    fn converged<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        for child in m.gone.iter() {
            self.fail_child(child, FaultReason::Unreachable);
        }
        if !m.gone.or(m.media).is_empty() {
            m.step = Step::Held;
            return;
        }
        for child in m.ok.iter().filter(|&c| c != m.source) {
            let (from, to) =
                (m.window(m.source, BufSlice::EMPTY), m.window(child, BufSlice::EMPTY));
            mem.copy(from, to);
        }
        m.known = m.known.or(m.ok);
        m.bad = m.bad.without(m.ok);
        m.stuck = m.stuck.or(m.full);
        if m.full.is_empty() {
            return self.set_apart(at, m, mem, now_ms);
        }
        if !m.full.without(self.members(m)).is_empty() {
            m.step = Step::Held;
            return;
        }
        m.step = Step::Reread;
        self.ask_all(at, m, m.full, IoOp::Read, now_ms);
    }

    /// What those hold now that had no room.
    fn reread<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        for child in m.gone.or(m.full).iter() {
            self.fail_child(child, FaultReason::Unreachable);
        }
        for child in m.media.and(m.known).iter() {
            self.fail_child(child, FaultReason::Failed(IoStatus::NoSpace));
        }
        if !m.gone.or(m.full).or(m.media.and(m.known)).is_empty() {
            m.step = Step::Held;
            return;
        }
        m.known = m.known.or(m.ok);
        m.bad = m.bad.without(m.ok);
        self.set_apart(at, m, mem, now_ms);
    }

    /// Those that have no room, and hold something else than the source, keep that.
    fn set_apart<M: Memory>(&mut self, at: u16, m: &mut Mend, mem: &mut M, now_ms: u64) {
        let copy = |c: ChildId| mem.bytes(m.window(c, BufSlice::EMPTY));
        let apart = m.stuck.and(m.known).iter().filter(|&c| copy(c) != copy(m.source));
        let apart = apart.fold(ChildSet::EMPTY, ChildSet::with);
        if apart.is_empty() {
            m.advance();
            return;
        }
        if let Some(next) = apart.without(m.tried).iter().next() {
            m.source = next;
            self.spread(at, m, mem, now_ms);
            return;
        }
        for child in apart.iter() {
            self.fail_child(child, FaultReason::Failed(IoStatus::NoSpace));
        }
        m.step = Step::Held;
    }

    // ---- the end

    /// The read begins anew: who could answer it is away.
    fn restart_read(&mut self, at: u16, m: &mut Mend) {
        let slot = self.slots.slot(at);
        slot.mending = false;
        slot.phase = Phase::Running;
        (slot.ok, slot.failed, slot.bad) = (ChildSet::EMPTY, ChildSet::EMPTY, ChildSet::EMPTY);
        m.task = Task::Nobody;
        m.step = Step::Over;
        self.park(at);
    }

    fn finish_mend(&mut self, m: &mut Mend, now_ms: u64) {
        m.step = Step::Over;
        let task = core::mem::replace(&mut m.task, Task::Nobody);
        let status = match (m.lost, m.unsure) {
            (0, 0) => IoStatus::Ok,
            (0, _) => IoStatus::NotReady,
            _ => IoStatus::MediaError,
        };
        match task {
            Task::Read(slot) => {
                self.slots.slot(slot).mending = false;
                match status {
                    IoStatus::Ok => self.answer_read(slot, now_ms),
                    status => self.answer(slot, status),
                }
            }
            Task::Verify(slot) => self.answer(slot, status),
            Task::Converge(slot) => {
                let of = self.slots.slot(slot);
                let met_full = !of.full.is_empty();
                let status = if met_full { IoStatus::NoSpace } else { of.fault };
                self.mends.counters.converged += u64::from(met_full);
                self.answer(slot, status);
            }
            Task::Alike => self.made_alike(m.range, m.unsure == 0, now_ms),
            Task::Heal => self.healed_for_rebuild(m.lost, m.unsure == 0),
            Task::Scrub | Task::Compare => {
                let data = if task == Task::Compare { m.range.blocks() } else { m.data };
                self.scrub_part_done(m.range, m.unsure == 0, (m.lost, data), now_ms);
            }
            Task::Nobody => {}
        }
    }

    fn note_found(&mut self, m: &Mend, children: ChildSet, found: Found) {
        let scrubs = matches!(m.task, Task::Scrub | Task::Compare);
        for child in children.iter() {
            self.found(m.piece.start(), child, found, scrubs);
        }
    }
}
