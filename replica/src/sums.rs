//! Block checksums: kept in memory for the extents in use, verified at every read, written lazily.
//!
//! An extent whose checksums on the device may be behind is *dirty*, and is so on stable storage
//! before its first write: by the record of its allocation, or by a mark of its own. So a steady
//! overwrite logs nothing. A dirty extent is *washed* when the cache or the number of dirty extents
//! outgrows its limit, and at a clean stop: its page is written, flushed, and then its mark is taken
//! back. After a crash the extents that are dirty are read and hashed anew before they are used.

use std::collections::VecDeque;

use cairn_block::{BufSlice, ByteOffset, IoStatus, Memory};

use crate::DiskError;
use crate::data::Part;
use crate::disk::{BLOCK, BLOCK_BYTES, BLOCK_LEN, BlockSums, EXTENT, EXTENT_BLOCKS, block_crc};
use crate::extents::{ExtentState, NIL, extent_offset, sums_address};
use crate::flush::Waiter;
use crate::journal::Owner;
use crate::pool::{DiskOp, Pool, Purpose};
use crate::slab::Slab;

/// Extents whose checksums are kept in memory, unless more are dirty.
const CACHE_LIMIT: usize = 16_384;
/// Dirty extents at most, as far as washing keeps up: what a crash makes the next open hash.
const DIRTY_LIMIT: usize = 4_096;
/// Extents that are washed together.
const MAX_WASHING: u32 = 32;
/// Extents that are hashed in the background together after a crash.
const MAX_HASHING: u32 = 2;
/// A read that keeps meeting writes of its blocks is given up after so many tries.
const MAX_TRIES: u8 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SumState {
    /// Its page is being read.
    Loading,
    /// It was dirty at a crash, or a write of it failed: its blocks are being read and hashed.
    Hashing,
    /// As on the device.
    Clean,
    /// The mark that it is dirty is on its way to the journal.
    Marking,
    /// Ahead of the device.
    Dirty,
    /// Its page is being written and flushed.
    Washing,
    /// The page is durable; the record that takes the mark back is on its way.
    Unmarking,
}

/// The checksums of one extent.
#[derive(Debug)]
pub(crate) struct Sum {
    extent: u32,
    pub(crate) state: SumState,
    /// Parts that wait for it: a list through [`Part::next`].
    first: u32,
    last: u32,
    /// Mutations in flight.
    writers: u32,
    /// Counts mutations, so that a read knows that it met one.
    version: u32,
    /// A write of its page is under way, whatever has become of the state since.
    in_wash: bool,
    /// A write failed: hash anew once none is in flight.
    rehash: bool,
    /// Used since the cache last looked.
    used: bool,
    sums: BlockSums,
}

/// Whether a part may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    Now(u32),
    Wait(u32),
}

/// What a read turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    /// A write was in flight with it: read again.
    Again,
    Bad,
}

#[derive(Debug)]
pub(crate) struct Sums {
    cache: Slab<Box<Sum>>,
    #[expect(clippy::vec_box, reason = "what moves between here and the cache is a kilobyte")]
    spare: Vec<Box<Sum>>,
    /// The cached extents, for the clock hand.
    order: VecDeque<u32>,
    to_load: VecDeque<u32>,
    /// Dirty since before the pool was opened, and not hashed yet.
    stale: VecDeque<u32>,
    hashing: u32,
    dirty: usize,
    washing: u32,
    mutating: Vec<(u32, u32, u32)>,
    /// Mutations that overlap one in flight.
    conflicts: VecDeque<Part>,
    /// Checkpoints that wait until everything has been washed, and how far that is.
    pub(crate) commands: Vec<u64>,
    cursor: u32,
    verify: bool,
    cache_limit: usize,
    dirty_limit: usize,
    /// Reads that did not verify.
    pub(crate) mismatches: u64,
}

impl Sums {
    pub(crate) fn new(stale: VecDeque<u32>) -> Self {
        Self {
            cache: Slab::with_capacity(1024),
            spare: Vec::new(),
            order: VecDeque::with_capacity(1024),
            to_load: VecDeque::new(),
            stale,
            hashing: 0,
            dirty: 0,
            washing: 0,
            mutating: Vec::with_capacity(1024),
            conflicts: VecDeque::new(),
            commands: Vec::new(),
            cursor: 0,
            verify: true,
            cache_limit: CACHE_LIMIT,
            dirty_limit: DIRTY_LIMIT,
            mismatches: 0,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.to_load.is_empty() && self.stale.is_empty() && self.commands.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.to_load.clear();
        self.stale.clear();
        self.conflicts.clear();
        self.mutating.clear();
    }
}

impl Pool {
    /// Switches the hashing and verifying of blocks off: for measuring what they cost, and for nothing
    /// else. What is written meanwhile does not verify later.
    pub fn disable_checksums_for_benchmark(&mut self) {
        self.sums.verify = false;
    }

    /// Sets how many extents' checksums are kept in memory (about 1.1 KiB each), and how many extents
    /// may be dirty: what a crash makes the next open read and hash again. Defaults: 16384 and 4096.
    pub fn set_checksum_limits(&mut self, cached_extents: usize, dirty_extents: usize) {
        self.sums.cache_limit = cached_extents;
        self.sums.dirty_limit = dirty_extents;
    }

    /// Reads that did not verify since the pool was opened.
    #[must_use]
    pub fn checksum_mismatches(&self) -> u64 {
        self.sums.mismatches
    }

    /// Extents that a crash now would have hashed anew.
    #[must_use]
    pub fn dirty_extents(&self) -> u64 {
        (self.sums.dirty + self.sums.stale.len()) as u64
    }

    fn sum_of(&mut self, extent: u32) -> Option<&mut Sum> {
        match self.extents.get(extent).sum {
            NIL => None,
            at => Some(self.sums.cache.get_mut(at)),
        }
    }

    fn insert_sum(&mut self, extent: u32, state: SumState) -> u32 {
        let fresh = || {
            Box::new(Sum {
                extent,
                state,
                first: NIL,
                last: NIL,
                writers: 0,
                version: 0,
                in_wash: false,
                rehash: false,
                used: true,
                sums: BlockSums::default(),
            })
        };
        let mut sum = self.sums.spare.pop().unwrap_or_else(fresh);
        sum.extent = extent;
        sum.state = state;
        sum.rehash = false;
        sum.used = true;
        sum.sums = BlockSums::default();
        assert!(sum.first == NIL && sum.writers == 0, "a checksum entry is reused while in use");
        let at = self.sums.cache.insert(sum);
        self.extents.get_mut(extent).sum = at;
        if self.sums.order.len() > 2 * self.sums.cache.len() + 64 {
            let extents = &self.extents;
            self.sums.order.retain(|&e| extents.get(e).sum != NIL);
        }
        self.sums.order.push_back(extent);
        at
    }

    /// A new extent: dirty by the record of its allocation, and all zeros.
    pub(crate) fn sum_allocated(&mut self, extent: u32) {
        self.extents.get_mut(extent).dirty = true;
        self.insert_sum(extent, SumState::Dirty);
        self.sums.dirty += 1;
    }

    /// The extent is going to a free list.
    pub(crate) fn drop_sum(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        e.dirty = false;
        let at = core::mem::replace(&mut e.sum, NIL);
        if at == NIL {
            return;
        }
        let sum = self.sums.cache.remove(at);
        assert!(sum.first == NIL && sum.writers == 0, "extent {extent} is freed while in use");
        if matches!(sum.state, SumState::Dirty) {
            self.sums.dirty -= 1;
        }
        self.keep_spare(sum);
    }

    fn keep_spare(&mut self, sum: Box<Sum>) {
        if self.sums.spare.len() < 1024 {
            self.sums.spare.push(sum);
        }
    }

    /// Whether the extent's checksums are there, and for a mutation whether it is marked dirty. What
    /// is missing is begun.
    pub(crate) fn prepare(&mut self, extent: u32, mutation: bool) -> Ready {
        let e = *self.extents.get(extent);
        let at = e.sum;
        if at == NIL {
            let at = self.begin_load(extent);
            return Ready::Wait(at);
        }
        let sum = self.sums.cache.get_mut(at);
        sum.used = true;
        if sum.rehash {
            return Ready::Wait(at);
        }
        match (sum.state, mutation) {
            (SumState::Dirty, _)
            | (SumState::Clean | SumState::Washing | SumState::Unmarking, false) => Ready::Now(at),
            (SumState::Loading | SumState::Hashing | SumState::Marking, _)
            | (SumState::Unmarking, true) => Ready::Wait(at),
            (SumState::Washing, true) => {
                // What is being written is behind already; the mark stays.
                sum.state = SumState::Dirty;
                self.sums.dirty += 1;
                Ready::Now(at)
            }
            (SumState::Clean, true) => {
                sum.state = SumState::Marking;
                self.extents.get_mut(extent).pins += 1;
                self.journal.push(Owner::Mark(extent));
                Ready::Wait(at)
            }
        }
    }

    fn begin_load(&mut self, extent: u32) -> u32 {
        let e = self.extents.get_mut(extent);
        e.pins += 1;
        let state = if e.dirty { SumState::Hashing } else { SumState::Loading };
        let at = self.insert_sum(extent, state);
        self.sums.to_load.push_back(extent);
        at
    }

    /// Parks a part until its extent's checksums are as it needs them.
    pub(crate) fn wait_for_sum(&mut self, at: u32, mut part: Part) {
        part.next = NIL;
        let id = self.parts.insert(part);
        let sum = self.sums.cache.get_mut(at);
        if sum.last == NIL {
            sum.first = id;
        } else {
            self.parts.get_mut(sum.last).next = id;
        }
        sum.last = id;
    }

    fn run_sum_waiters<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        let Some(sum) = self.sum_of(extent) else { return };
        let first = core::mem::replace(&mut sum.first, NIL);
        sum.last = NIL;
        self.run_waiting(first, mem);
    }

    // ---- loading and hashing

    pub(crate) fn pump_sums<M: Memory>(&mut self, mem: &mut M) {
        while self.sums.hashing < MAX_HASHING && self.sums.to_load.is_empty() {
            let Some(extent) = self.sums.stale.pop_front() else { break };
            let e = self.extents.get(extent);
            if e.dirty && e.sum == NIL && e.state == ExtentState::Allocated {
                self.begin_load(extent);
            }
        }
        while let Some(&extent) = self.sums.to_load.front() {
            let hashing = self.sum_of(extent).is_some_and(|s| s.state == SumState::Hashing);
            let start = extent_offset(&self.superblock.segments, extent);
            let (offset, len) = if hashing {
                (start, u32::try_from(EXTENT).expect("1 MiB"))
            } else {
                (sums_address(&self.superblock.segments, extent) * BLOCK, BLOCK_BYTES)
            };
            let Some(buf) = mem.alloc(len) else { break };
            self.sums.to_load.pop_front();
            self.sums.hashing += u32::from(hashing);
            let op = DiskOp::Read { offset: ByteOffset(offset), buf: buf.slice() };
            self.issue(op, Purpose::SumLoad(extent), Some(buf));
        }
        self.pump_washing(mem);
    }

    /// The page, or the whole extent, has been read into `bytes`.
    pub(crate) fn sum_loaded<M: Memory>(
        &mut self,
        extent: u32,
        result: Result<(), DiskError>,
        bytes: BufSlice,
        mem: &mut M,
    ) {
        let address = sums_address(&self.superblock.segments, extent);
        let start = extent_offset(&self.superblock.segments, extent) / BLOCK;
        let pool = self.superblock.pool;
        let at = self.extents.get(extent).sum;
        let sum = self.sums.cache.get_mut(at);
        let hashed = sum.state == SumState::Hashing;
        let loaded = result.is_ok()
            && if hashed {
                hash(&mut sum.sums, start, mem.bytes(bytes));
                sum.state = SumState::Dirty;
                sum.rehash = false;
                true
            } else {
                match BlockSums::decode(extent, address, pool, mem.bytes(bytes)) {
                    Ok(sums) => {
                        sum.sums = sums;
                        sum.state = SumState::Clean;
                        true
                    }
                    Err(_) => false,
                }
            };
        self.sums.hashing -= u32::from(hashed);
        self.sums.dirty += usize::from(hashed && loaded);
        self.unpin(extent);
        if loaded {
            self.run_sum_waiters(extent, mem);
            return;
        }
        // Nothing in the extent can be verified: whoever asks is told, and a peer has the data.
        let sum = self.sums.cache.get_mut(at);
        let first = core::mem::replace(&mut sum.first, NIL);
        sum.last = NIL;
        self.extents.get_mut(extent).sum = NIL;
        let sum = self.sums.cache.remove(at);
        self.keep_spare(sum);
        self.sums.mismatches += 1;
        self.fail_waiting(first, IoStatus::MediaError, mem);
    }

    // ---- the data path

    /// Whether none of the blocks holds data: a read of them needs no device.
    pub(crate) fn reads_zeros(&mut self, at: u32, first: u32, blocks: u32) -> bool {
        let sums = &self.sums.cache.get(at).sums;
        (first..first + blocks).all(|b| !sums.is_valid(b as usize))
    }

    pub(crate) fn sum_version(&self, at: u32) -> u32 {
        self.sums.cache.get(at).version
    }

    /// Takes note of a mutation that begins now; false where one that overlaps is in flight.
    pub(crate) fn begin_mutation<M: Memory>(
        &mut self,
        at: u32,
        first: u32,
        blocks: u32,
        data: Option<BufSlice>,
        mem: &M,
    ) -> bool {
        let verify = self.sums.verify;
        let sum = self.sums.cache.get_mut(at);
        let extent = sum.extent;
        let overlaps =
            |&(e, f, n): &(u32, u32, u32)| e == extent && f < first + blocks && first < f + n;
        if sum.writers > 0 && self.sums.mutating.iter().any(overlaps) {
            return false;
        }
        sum.writers += 1;
        sum.version = sum.version.wrapping_add(1);
        self.sums.mutating.push((extent, first, blocks));
        let start = extent_offset(&self.superblock.segments, extent) / BLOCK + u64::from(first);
        match data {
            Some(window) => {
                let payload = mem.bytes(window).chunks_exact(BLOCK_LEN);
                for ((block, bytes), address) in (first as usize..).zip(payload).zip(start..) {
                    let crc = if verify { block_crc(address, bytes) } else { 0 };
                    sum.sums.set(block, crc);
                }
            }
            None => (first..first + blocks).for_each(|block| sum.sums.clear(block as usize)),
        }
        true
    }

    pub(crate) fn hold_conflict(&mut self, part: Part) {
        self.sums.conflicts.push_back(part);
    }

    /// A mutation is over. Where it failed for want of space the old data may be there still, or the
    /// new: the blocks are hashed anew.
    pub(crate) fn end_mutation<M: Memory>(
        &mut self,
        extent: u32,
        first: u32,
        failed_for_space: bool,
        mem: &mut M,
    ) {
        let found = self.sums.mutating.iter().position(|&(e, f, _)| e == extent && f == first);
        if let Some(i) = found {
            self.sums.mutating.swap_remove(i);
        }
        let Some(sum) = self.sum_of(extent) else { return };
        sum.writers -= 1;
        sum.rehash |= failed_for_space;
        if sum.rehash && sum.writers == 0 {
            assert_eq!(sum.state, SumState::Dirty, "an extent is written that is not dirty");
            sum.state = SumState::Hashing;
            self.sums.dirty -= 1;
            self.extents.get_mut(extent).pins += 1;
            self.sums.to_load.push_back(extent);
        }
        for _ in 0..self.sums.conflicts.len() {
            let Some(part) = self.sums.conflicts.pop_front() else { break };
            self.rerun(part, mem);
        }
    }

    /// Checks what was read, and fills in the zeros of blocks that hold no data.
    pub(crate) fn verify<M: Memory>(
        &mut self,
        extent: u32,
        first: u32,
        window: BufSlice,
        version: u32,
        tries: u8,
        mem: &mut M,
    ) -> Verdict {
        let start = extent_offset(&self.superblock.segments, extent) / BLOCK + u64::from(first);
        let check = self.sums.verify;
        let Some(sum) = self.sum_of(extent) else { return Verdict::Again };
        if matches!(sum.state, SumState::Loading | SumState::Hashing) || sum.rehash {
            return if tries < MAX_TRIES { Verdict::Again } else { Verdict::Bad };
        }
        let mut verdict = Verdict::Good;
        let bytes = mem.bytes_mut(window).chunks_exact_mut(BLOCK_LEN);
        for ((block, bytes), address) in (first as usize..).zip(bytes).zip(start..) {
            if !sum.sums.is_valid(block) {
                bytes.fill(0);
            } else if check && block_crc(address, bytes) != sum.sums.crc[block] {
                let raced = sum.version != version || sum.writers > 0;
                verdict = if raced && tries < MAX_TRIES { Verdict::Again } else { Verdict::Bad };
                break;
            }
        }
        self.sums.mismatches += u64::from(verdict == Verdict::Bad);
        verdict
    }

    // ---- marks

    /// The mark is durable.
    pub(crate) fn mark_durable<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        self.extents.get_mut(extent).dirty = true;
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
    pub(crate) fn unmark_durable<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        self.extents.get_mut(extent).dirty = false;
        self.dirty_page(extent);
        self.sums.washing -= 1;
        if let Some(sum) = self.sum_of(extent) {
            assert_eq!(sum.state, SumState::Unmarking, "an extent is washed twice");
            sum.state = SumState::Clean;
        }
        self.unpin(extent);
        self.run_sum_waiters(extent, mem);
    }

    // ---- washing

    fn pump_washing<M: Memory>(&mut self, mem: &mut M) {
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
        while (self.sums.cache.len() > self.sums.cache_limit
            || self.sums.dirty > self.sums.dirty_limit)
            && looked < 64
            && self.sums.washing < MAX_WASHING
        {
            looked += 1;
            let Some(extent) = self.sums.order.pop_front() else { return };
            let pins = self.extents.get(extent).pins;
            let Some(sum) = self.sum_of(extent) else { continue };
            let (state, used) = (sum.state, core::mem::take(&mut sum.used));
            if state == SumState::Clean && pins == 0 && !used {
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

    /// Begins to wash an extent, if it is dirty and nobody writes to it. False where there is no memory.
    fn wash<M: Memory>(&mut self, extent: u32, mem: &mut M) -> bool {
        if self.extents.get(extent).state != ExtentState::Allocated {
            return true;
        }
        let address = sums_address(&self.superblock.segments, extent);
        let pool = self.superblock.pool;
        let Some(sum) = self.sum_of(extent) else { return true };
        if sum.state != SumState::Dirty || sum.in_wash || sum.writers > 0 || sum.rehash {
            return true;
        }
        let Some(buf) = mem.alloc(BLOCK_BYTES) else { return false };
        sum.sums.encode(extent, address, pool, mem.bytes_mut(buf.slice()));
        sum.state = SumState::Washing;
        sum.in_wash = true;
        self.sums.dirty -= 1;
        self.sums.washing += 1;
        self.extents.get_mut(extent).pins += 1;
        let op =
            DiskOp::Write { offset: ByteOffset(address * BLOCK), buf: buf.slice(), fua: false };
        self.issue(op, Purpose::SumWrite(extent), Some(buf));
        true
    }

    pub(crate) fn sum_written(&mut self, extent: u32) {
        self.flusher.next.push(Waiter::Sum(extent));
    }

    /// The page is durable, and so is every write that it tells of.
    pub(crate) fn sum_flushed(&mut self, extent: u32) {
        let allocated = self.extents.get(extent).state == ExtentState::Allocated;
        if let Some(sum) = self.sum_of(extent) {
            sum.in_wash = false;
        }
        if let Some(sum) = self.sum_of(extent)
            && sum.state == SumState::Washing
        {
            if allocated {
                sum.state = SumState::Unmarking;
                self.journal.push(Owner::Unmark(extent));
                return;
            }
            sum.state = SumState::Dirty;
            self.sums.dirty += 1;
        }
        self.sums.washing -= 1;
        self.unpin(extent);
    }

    /// Washes everything, then makes a checkpoint that answers `tag`.
    pub(crate) fn wash_all(&mut self, tag: u64) {
        self.sums.commands.push(tag);
        self.sums.cursor = 0;
    }
}

/// Hashes a whole extent. A block of zeros is one that holds no data.
fn hash(sums: &mut BlockSums, start: u64, bytes: &[u8]) {
    assert_eq!(bytes.len() as u64, EXTENT_BLOCKS * BLOCK, "a whole extent");
    for ((block, bytes), address) in bytes.chunks_exact(BLOCK_LEN).enumerate().zip(start..) {
        if bytes.iter().all(|&b| b == 0) {
            sums.clear(block);
        } else {
            sums.set(block, block_crc(address, bytes));
        }
    }
}
