//! What is written of checksums: pages, lazily or as notes that something waits for, and the marks that
//! say which extents' pages are behind.

use cairn_block::{ByteOffset, IoStatus, Memory};

use super::{CACHE_SLACK, MAX_WASHING, PersistFor, SumState};
use crate::disk::{BLOCK, BLOCK_BYTES, PageOf};
use crate::extents::{ExtentState, NIL, sums_address};
use crate::flush::Waiter;
use crate::journal::Owner;
use crate::pool::{DiskOp, Pool, Purpose};

impl Pool {
    /// The mark is durable.
    pub(crate) fn mark_durable<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        self.extents.get_mut(extent).dirty = true;
        self.note_open(extent);
        self.dirty_page(extent);
        if let Some(sum) = self.sum_of(extent)
            && sum.state == SumState::Marking
        {
            sum.state = SumState::Dirty;
            self.sums.dirty += 1;
        }
        self.unpin(extent);
        self.run_sum_waiters(extent, mem);
    }

    /// The mark is taken back durably.
    pub(crate) fn unmark_durable<M: Memory>(&mut self, extent: u32, copy: bool, mem: &mut M) {
        self.extents.get_mut(extent).dirty = false;
        self.dirty_page(extent);
        self.sums.washing -= 1;
        self.extents.get_mut(extent).copy = copy;
        if let Some(sum) = self.sum_of(extent) {
            if sum.state == SumState::Condemned {
                self.unpin(extent);
                return self.condemned(extent, mem);
            }
            assert_eq!(sum.state, SumState::Unmarking, "an extent is washed twice");
            sum.state = SumState::Clean;
        }
        self.unpin(extent);
        self.run_sum_waiters(extent, mem);
    }

    pub(super) fn pump_washing<M: Memory>(&mut self, mem: &mut M) {
        if !self.sums.commands.is_empty() {
            while self.sums.cursor < self.extents.len() && self.sums.washing < MAX_WASHING {
                if !self.wash(self.sums.cursor, mem) {
                    return;
                }
                self.sums.cursor += 1;
            }
            if self.sums.cursor == self.extents.len() && self.sums.washing == 0 {
                let commands = core::mem::take(&mut self.sums.commands);
                for tag in commands {
                    self.begin_checkpoint(tag);
                }
            }
            return;
        }
        let mut looked = 0;
        while (self.cache_is_full() || self.sums.dirty > self.sums.dirty_limit)
            && looked < 64
            && self.sums.washing < MAX_WASHING
        {
            looked += 1;
            let Some(extent) = self.sums.order.pop_front() else { return };
            let pins = self.extents.get(extent).pins;
            let Some(sum) = self.sum_of(extent) else { continue };
            let (state, used) = (sum.state, core::mem::take(&mut sum.used));
            if state == SumState::Clean && pins == 0 && !used && self.cache_is_full() {
                let at = core::mem::replace(&mut self.extents.get_mut(extent).sum, NIL);
                let sum = self.sums.cache.remove(at);
                self.keep_spare(sum);
                continue;
            }
            self.sums.order.push_back(extent);
            if !used && !self.wash(extent, mem) {
                return;
            }
        }
    }

    /// Whether checksums are to be dropped. Not while some are on their way: a read through several
    /// layers needs those of all of them together.
    fn cache_is_full(&self) -> bool {
        let (len, limit) = (self.sums.cache.len(), self.sums.cache_limit);
        len > limit && (self.sums.loading == 0 || len > 2 * limit + CACHE_SLACK)
    }

    /// Begins to wash an extent, if it is dirty and nobody writes to it. False where there is no memory.
    fn wash<M: Memory>(&mut self, extent: u32, mem: &mut M) -> bool {
        if self.extents.get(extent).state != ExtentState::Allocated {
            return true;
        }
        let Some(sum) = self.sum_of(extent) else { return true };
        let busy = sum.in_wash || sum.writers > 0 || sum.owed > 0 || sum.rehash;
        if sum.state != SumState::Dirty || busy {
            return true;
        }
        if !self.write_page(extent, mem) {
            return false;
        }
        if let Some(sum) = self.sum_of(extent) {
            sum.state = SumState::Washing;
            self.sums.dirty -= 1;
        }
        true
    }

    /// Writes the page of an extent, to the copy that is not the newest one. False where there is no
    /// memory.
    fn write_page<M: Memory>(&mut self, extent: u32, mem: &mut M) -> bool {
        let address = sums_address(&self.superblock.segments, extent);
        let pool = self.superblock.pool;
        let birth = self.extents.get(extent).birth;
        let Some(sum) = self.sum_of(extent) else { return true };
        assert!(!sum.in_wash, "the two copies of a page are written one after the other");
        let Some(buf) = mem.alloc(BLOCK_BYTES) else {
            self.short = true;
            return false;
        };
        let of = PageOf { extent, birth, sequence: sum.page + 1 };
        let address = address + (of.sequence & 1);
        let mut sums = sum.sums;
        if sum.arrived {
            sums.incoming = [0; 4];
        }
        sum.clears = sum.arrived;
        sums.encode(&of, address, pool, mem.bytes_mut(buf.slice()));
        sum.in_wash = true;
        self.sums.washing += 1;
        self.extents.get_mut(extent).pins += 1;
        let (unnoted, noting) = (&mut self.sums.unnoted, &mut self.sums.noting);
        noting.extend(unnoted.extract_if(.., |(e, _)| *e == extent));
        let op =
            DiskOp::Write { offset: ByteOffset(address * BLOCK), buf: buf.slice(), fua: false };
        self.issue(op, Purpose::SumWrite(extent), Some(buf));
        true
    }

    /// Asks that what was zeroed in an extent be on stable storage.
    pub(crate) fn persist_zeros(&mut self, extent: u32, who: PersistFor) {
        self.extents.get_mut(extent).pins += 1;
        self.sums.unnoted.push((extent, who));
    }

    pub(super) fn pump_notes<M: Memory>(&mut self, mem: &mut M) {
        while let Some(&extent) = self.sums.condemned.last() {
            if !self.write_page(extent, mem) {
                return;
            }
            self.sums.condemned.pop();
        }
        let mut at = 0;
        while let Some(&(extent, who)) = self.sums.unnoted.get(at) {
            match self.sum_of(extent).map(|sum| sum.in_wash) {
                Some(true) => at += 1,
                Some(false) => {
                    if !self.write_page(extent, mem) {
                        return;
                    }
                    at = 0;
                }
                None => {
                    // The extent could not be read any more.
                    self.sums.unnoted.swap_remove(at);
                    self.noted(extent, who, IoStatus::MediaError, mem);
                }
            }
        }
    }

    fn noted<M: Memory>(&mut self, extent: u32, who: PersistFor, status: IoStatus, mem: &mut M) {
        match who {
            PersistFor::Operation(op, purpose) if status.is_ok() => self.issue(op, purpose, None),
            PersistFor::Operation(_, Purpose::Data { request, .. }) => {
                self.part_done(request, status, mem);
            }
            PersistFor::Operation(..) => unreachable!("only parts of requests wait for it"),
            PersistFor::Merge(merge) => self.merge_noted(merge, status, mem),
            PersistFor::Request(request) => {
                // Its extent stays pinned until here, once for the note and once for the flush.
                self.repay(extent);
                self.unpin(extent);
                self.part_done(request, status, mem);
            }
        }
        self.unpin(extent);
    }

    pub(crate) fn sum_written(&mut self, extent: u32) {
        self.flusher.next.push(Waiter::Sum(extent));
    }

    /// The page is durable, and so is every write that it tells of.
    pub(crate) fn sum_flushed<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        let allocated = self.extents.get(extent).state == ExtentState::Allocated;
        let mut unmark = None;
        let mut given_up = false;
        if let Some(sum) = self.sum_of(extent) {
            sum.in_wash = false;
            sum.page += 1;
            if core::mem::take(&mut sum.clears) && sum.arrived {
                sum.sums.incoming = [0; 4];
            }
            if sum.state == SumState::Condemned {
                if allocated {
                    unmark = Some(sum.page & 1 == 1);
                } else {
                    given_up = true;
                }
            } else if sum.state == SumState::Washing {
                if allocated {
                    sum.state = SumState::Unmarking;
                    unmark = Some(sum.page & 1 == 1);
                } else {
                    sum.state = SumState::Dirty;
                    self.sums.dirty += 1;
                }
            }
        }
        if let Some(copy) = unmark {
            self.journal.push(Owner::Unmark { extent, copy });
        } else {
            self.sums.washing -= 1;
            self.unpin(extent);
        }
        if given_up {
            self.condemned(extent, mem);
        }
        while let Some(at) = self.sums.noting.iter().position(|(e, _)| *e == extent) {
            let (_, who) = self.sums.noting.swap_remove(at);
            self.noted(extent, who, IoStatus::Ok, mem);
        }
    }

    /// Washes everything, then makes a checkpoint that answers `tag`.
    pub(crate) fn wash_all(&mut self, tag: u64) {
        self.sums.commands.push(tag);
        self.sums.cursor = 0;
    }
}
