//! Block checksums: kept in memory for the extents in use, verified at every read, written lazily.
//!
//! An extent whose checksums on the device may be behind is *dirty*, and is so on stable storage
//! before its first write: by the record of its allocation, or by a mark of its own. So a steady
//! overwrite logs nothing. A dirty extent is *washed* when the cache or the number of dirty extents
//! outgrows its limit, and at a clean stop: its page is written, flushed, and then its mark is taken
//! back. After a crash the extents that are dirty are read and hashed anew before they are read from. What
//! is written to one before that need not be hashed: it waits until somebody reads, or the pool has nothing
//! else to do, and a member that is written from end to end by a rebuild is not read first.

mod load;
mod wash;

use std::collections::VecDeque;

use cairn_block::{BufSlice, Memory};

use crate::blocks::BlockSet;
use crate::data::Part;
use crate::disk::{BLOCK, BLOCK_BYTES, BLOCK_LEN, BlockSums, block_crc};
use crate::extents::{NIL, Opened, extent_offset};
use crate::journal::Owner;
use crate::pool::{DiskOp, Pool, Purpose};
use crate::raw::Owned;
use crate::slab::Slab;

/// Extents whose checksums are kept in memory, unless more are dirty.
const CACHE_LIMIT: usize = 16_384;
/// How far the number of extents whose checksums are in memory may exceed the limit for a while.
const CACHE_SLACK: usize = 1024;
/// Dirty extents at most, as far as washing keeps up: what a crash makes the next open hash.
const DIRTY_LIMIT: usize = 4_096;
/// Extents that are washed together.
const MAX_WASHING: u32 = 32;
/// Extents that are hashed in the background together after a crash.
const MAX_HASHING: u32 = 2;
/// While the pool has requests, one more is hashed in the background for so many of them.
const REQUESTS_PER_HASH: u32 = 256;
/// A read that keeps meeting writes of its blocks is given up after so many tries.
const MAX_TRIES: u8 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SumState {
    /// Its pages are being read.
    Loading,
    /// It was dirty at a crash, or a write of it failed: its blocks are being read and hashed.
    Hashing,
    /// It was dirty at a crash, and only what was written since is known.
    Partial,
    /// Its page is damaged: one is being written that says so.
    Condemned,
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
    /// No mutation is to begin.
    held: bool,
    /// Pages that are still to be written while it is dirty: it is not washed before.
    owed: u32,
    /// Counts mutations, so that a read knows that it met one.
    version: u32,
    /// A write of its page is under way, whatever has become of the state since.
    in_wash: bool,
    /// The sequence of its newest page.
    page: u64,
    /// A write failed: hash anew once none is in flight.
    rehash: bool,
    /// Whether all of it is to be hashed, once no mutation is in flight: somebody reads, or it is its turn.
    wanted: bool,
    /// What was written since the crash, of an extent that is not hashed yet.
    fresh: BlockSet,
    /// What was copied from the parent is durable: the next page need not mention it.
    arrived: bool,
    /// The page that is being written does not mention it.
    clears: bool,
    /// Zeroings of half-copied blocks under way, and whether one failed.
    cleaning: (u32, bool),
    /// Used since the cache last looked.
    used: bool,
    sums: BlockSums,
}

impl Sum {
    /// Whether the extent is not hashed, and these blocks were written since.
    fn knows(&self, first: u32, blocks: u32) -> bool {
        let unknown = BlockSet::range(first, blocks).minus(self.fresh);
        self.state == SumState::Partial && !self.rehash && unknown.is_empty()
    }
}

/// Whether a part may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ready {
    Now(u32),
    Wait(u32),
}

/// What became of a mutation that was to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// It is in flight.
    Plain,
    /// The extent's page has to be written first: blocks are zeroed that a parent layer may have, or
    /// what was copied from it is overwritten.
    Note,
    /// One that overlaps is in flight.
    Conflict,
}

/// Who waits until zeroed blocks are noted durably.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PersistFor {
    /// A part of a request: this is issued then.
    Operation(DiskOp, Purpose),
    Merge(u32),
    /// The request's part is done then.
    Request(u32),
}

/// Blocks that were written though nothing was known of them.
#[derive(Debug)]
struct Redeemed {
    extent: u32,
    range: BlockSet,
    request: u32,
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
    /// Written since, and not hashed yet.
    partial: VecDeque<u32>,
    hashing: u32,
    /// Requests since an extent was hashed in the background.
    pub(crate) answered: u32,
    /// Extents whose checksums are on their way here.
    loading: usize,
    dirty: usize,
    washing: u32,
    mutating: Vec<(u32, u32, u32)>,
    /// Mutations that overlap one in flight.
    conflicts: VecDeque<Part>,
    /// Who waits for a page to be written, and for one that is being written.
    unnoted: Vec<(u32, PersistFor)>,
    /// Extents whose page is to say that nothing is known of them.
    condemned: Vec<u32>,
    redeemed: Vec<Redeemed>,
    noting: Vec<(u32, PersistFor)>,
    /// Checkpoints that wait until everything has been washed, and how far that is.
    pub(crate) commands: Vec<u64>,
    cursor: u32,
    /// Of layers' own extents that were read: what they have.
    pub(crate) told: Vec<Owned>,
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
            partial: VecDeque::new(),
            hashing: 0,
            answered: 0,
            loading: 0,
            dirty: 0,
            washing: 0,
            mutating: Vec::with_capacity(1024),
            conflicts: VecDeque::new(),
            unnoted: Vec::new(),
            condemned: Vec::new(),
            redeemed: Vec::new(),
            noting: Vec::new(),
            commands: Vec::new(),
            cursor: 0,
            told: Vec::new(),
            verify: true,
            cache_limit: CACHE_LIMIT,
            dirty_limit: DIRTY_LIMIT,
            mismatches: 0,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        let hashed = self.stale.is_empty() && self.partial.is_empty();
        self.to_load.is_empty() && hashed && self.commands.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.to_load.clear();
        self.stale.clear();
        self.partial.clear();
        self.conflicts.clear();
        self.mutating.clear();
        self.unnoted.clear();
        self.condemned.clear();
        self.redeemed.clear();
        self.noting.clear();
        self.told.clear();
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
        (self.sums.dirty + self.sums.stale.len() + self.sums.partial.len()) as u64
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
                held: false,
                owed: 0,
                version: 0,
                in_wash: false,
                page: 0,
                rehash: false,
                wanted: false,
                fresh: BlockSet::default(),
                arrived: false,
                clears: false,
                cleaning: (0, false),
                used: true,
                sums: BlockSums::default(),
            })
        };
        let mut sum = self.sums.spare.pop().unwrap_or_else(fresh);
        sum.extent = extent;
        sum.state = state;
        sum.rehash = false;
        sum.wanted = false;
        sum.fresh = BlockSet::default();
        sum.held = false;
        sum.owed = 0;
        sum.arrived = false;
        sum.clears = false;
        sum.cleaning = (0, false);
        sum.in_wash = false;
        sum.page = 0;
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
        let at = match e.sum {
            NIL => self.begin_load(extent),
            at => at,
        };
        let sum = self.sums.cache.get_mut(at);
        sum.used = true;
        // Whoever comes this way needs to know all of it.
        sum.wanted = true;
        if sum.rehash || (sum.held && mutation) {
            return Ready::Wait(at);
        }
        match (sum.state, mutation) {
            (SumState::Partial, _) => {
                self.hash_when_quiet(extent);
                Ready::Wait(at)
            }
            (SumState::Dirty, false)
            | (SumState::Clean | SumState::Washing | SumState::Unmarking, false) => Ready::Now(at),
            (
                SumState::Loading | SumState::Hashing | SumState::Condemned | SumState::Marking,
                _,
            )
            | (SumState::Unmarking, true) => Ready::Wait(at),
            (SumState::Dirty | SumState::Washing, true) => {
                if e.opened != Opened::Fresh && !self.open_for_change(extent) {
                    return Ready::Wait(at);
                }
                let sum = self.sums.cache.get_mut(at);
                if sum.state == SumState::Washing {
                    // What is being written is behind already; the mark stays.
                    sum.state = SumState::Dirty;
                    self.sums.dirty += 1;
                }
                Ready::Now(at)
            }
            (SumState::Clean, true) if e.opened == Opened::Closing => Ready::Wait(at),
            (SumState::Clean, true) => {
                sum.state = SumState::Marking;
                self.open_with_mark(extent);
                self.extents.get_mut(extent).pins += 1;
                self.journal.push(Owner::Mark(extent));
                Ready::Wait(at)
            }
        }
    }

    /// As [`Pool::prepare`], for a write to a layer that has no parent: what else is in the extent need not be
    /// known for it.
    pub(crate) fn prepare_write(&mut self, extent: u32) -> Ready {
        let e = *self.extents.get(extent);
        if e.sum == NIL && e.dirty {
            return Ready::Wait(self.begin_load(extent));
        }
        let known = e.sum == NIL || {
            let sum = self.sums.cache.get(e.sum);
            let read = matches!(sum.state, SumState::Loading | SumState::Partial);
            !read || sum.rehash || sum.held || sum.wanted
        };
        if known {
            return self.prepare(extent, true);
        }
        let sum = self.sums.cache.get_mut(e.sum);
        sum.used = true;
        if sum.state == SumState::Loading
            || (e.opened != Opened::Fresh && !self.open_for_change(extent))
        {
            return Ready::Wait(e.sum);
        }
        Ready::Now(e.sum)
    }

    /// As [`Pool::prepare`], for a read from a layer that is looked at alone: what was written since the crash can be
    /// read whatever becomes of the rest.
    pub(crate) fn prepare_read(&mut self, extent: u32, first: u32, blocks: u32) -> Ready {
        let at = self.extents.get(extent).sum;
        if let Some(sum) = self.sum_of(extent)
            && sum.knows(first, blocks)
        {
            return Ready::Now(at);
        }
        self.prepare(extent, false)
    }

    /// Has an extent read and hashed of which only a part is known, as soon as no mutation is in flight.
    fn hash_when_quiet(&mut self, extent: u32) {
        let Some(sum) = self.sum_of(extent) else { return };
        sum.wanted = true;
        if sum.writers == 0 {
            sum.state = SumState::Hashing;
            self.extents.get_mut(extent).pins += 1;
            self.sums.loading += 1;
            self.sums.to_load.push_back(extent);
        }
    }

    fn begin_load(&mut self, extent: u32) -> u32 {
        self.extents.get_mut(extent).pins += 1;
        self.sums.loading += 1;
        let at = self.insert_sum(extent, SumState::Loading);
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

    pub(crate) fn run_sum_waiters<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        let Some(sum) = self.sum_of(extent) else { return };
        let first = core::mem::replace(&mut sum.first, NIL);
        sum.last = NIL;
        self.run_waiting(first, mem);
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

    /// Takes note of a mutation that begins now. `layered` says that there is a parent layer.
    pub(crate) fn begin_mutation<M: Memory>(
        &mut self,
        at: u32,
        first: u32,
        blocks: u32,
        data: Option<BufSlice>,
        layered: bool,
        mem: &M,
    ) -> Begun {
        let verify = self.sums.verify;
        let sum = self.sums.cache.get_mut(at);
        let extent = sum.extent;
        let overlaps =
            |&(e, f, n): &(u32, u32, u32)| e == extent && f < first + blocks && first < f + n;
        if sum.writers > 0 && self.sums.mutating.iter().any(overlaps) {
            return Begun::Conflict;
        }
        sum.writers += 1;
        sum.version = sum.version.wrapping_add(1);
        self.sums.mutating.push((extent, first, blocks));
        let start = extent_offset(&self.superblock.segments, extent) / BLOCK + u64::from(first);
        let range = BlockSet::range(first, blocks);
        if sum.state == SumState::Partial {
            sum.fresh = sum.fresh.or(range);
            if sum.fresh == BlockSet::range(0, 256) {
                // There is nothing in it that was there at the crash.
                sum.fresh = BlockSet::default();
                sum.state = SumState::Dirty;
                self.sums.dirty += 1;
            }
        }
        // What was copied here is vouched for by its checksum alone: not when something else is there.
        let copied = !BlockSet(sum.sums.incoming).and(range).is_empty();
        sum.sums.incoming = BlockSet(sum.sums.incoming).minus(range).0;
        let mut zeros = data.is_none();
        match data {
            Some(window) => {
                let payload = mem.bytes(window).chunks_exact(BLOCK_LEN);
                for ((block, bytes), address) in (first as usize..).zip(payload).zip(start..) {
                    let crc = if verify { block_crc(address, bytes) } else { 0 };
                    if layered && is_zeros(bytes) {
                        sum.sums.clear(block);
                        zeros = true;
                    }
                    sum.sums.set(block, crc);
                }
            }
            None => (first..first + blocks).for_each(|block| sum.sums.clear(block as usize)),
        }
        if copied || (zeros && layered) { Begun::Note } else { Begun::Plain }
    }

    /// The blocks that hold data.
    pub(crate) fn valid_in(&self, at: u32) -> BlockSet {
        BlockSet(self.sums.cache.get(at).sums.valid)
    }

    /// The blocks that are not looked for in the parent layer.
    pub(crate) fn owned_by(&self, at: u32) -> BlockSet {
        self.valid_in(at).or(BlockSet(self.sums.cache.get(at).sums.zeroed))
    }

    /// Keeps a dirty extent dirty, until [`Pool::repay`]: the table says which page of a clean one counts,
    /// and another is to be written.
    pub(crate) fn owe(&mut self, extent: u32) {
        if let Some(sum) = self.sum_of(extent) {
            sum.owed += 1;
        }
    }

    pub(crate) fn repay(&mut self, extent: u32) {
        if let Some(sum) = self.sum_of(extent) {
            // The extent may have been read anew meanwhile, and owe nothing.
            sum.owed = sum.owed.saturating_sub(1);
        }
    }

    /// Lets no mutation of the extent begin, until [`Pool::admit_mutations`].
    pub(crate) fn hold_mutations(&mut self, extent: u32) {
        if let Some(sum) = self.sum_of(extent) {
            sum.held = true;
        }
    }

    pub(crate) fn admit_mutations<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        if let Some(sum) = self.sum_of(extent) {
            sum.held = false;
            self.run_sum_waiters(extent, mem);
        }
    }

    pub(crate) fn has_writers(&mut self, extent: u32) -> bool {
        self.sum_of(extent).is_some_and(|sum| sum.writers > 0 || sum.rehash)
    }

    /// Whether an extent holds no data, and nobody is about to change that.
    pub(crate) fn is_empty_and_quiet(&mut self, extent: u32) -> bool {
        self.sum_of(extent).is_some_and(|sum| {
            let busy = sum.writers > 0 || sum.owed > 0 || sum.in_wash || sum.held || sum.rehash;
            sum.state == SumState::Dirty && !busy && sum.first == NIL && sum.sums.valid == [0; 4]
        })
    }

    /// Takes note of blocks that are being copied here.
    pub(crate) fn note_incoming(&mut self, at: u32, blocks: BlockSet) {
        let sum = self.sums.cache.get_mut(at);
        sum.arrived = false;
        sum.sums.incoming = BlockSet(sum.sums.incoming).or(blocks).0;
    }

    /// What was copied here is durable.
    pub(crate) fn note_arrived(&mut self, extent: u32) {
        if let Some(sum) = self.sum_of(extent) {
            sum.arrived = true;
        }
    }

    /// Takes note of blocks that read as zeros here, whatever the parent layer has.
    pub(crate) fn note_zeroed(&mut self, at: u32, blocks: BlockSet) {
        let sum = self.sums.cache.get_mut(at);
        sum.version = sum.version.wrapping_add(1);
        sum.sums.zeroed = BlockSet(sum.sums.zeroed).or(blocks).0;
    }

    /// Whether something is on its way that says what state the extent's checksums are in.
    pub(crate) fn is_noting(&mut self, extent: u32) -> bool {
        self.sum_of(extent).is_some_and(|sum| {
            let marks = matches!(
                sum.state,
                SumState::Condemned | SumState::Marking | SumState::Washing | SumState::Unmarking
            );
            marks || sum.in_wash
        })
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
            let (state, partial) = (sum.state, sum.state == SumState::Partial);
            assert!(partial || state == SumState::Dirty, "an extent is written that is not dirty");
            sum.fresh = BlockSet::default();
            self.sums.dirty -= usize::from(!partial);
            self.hash_when_quiet(extent);
        } else if sum.state == SumState::Partial && sum.wanted {
            self.hash_when_quiet(extent);
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
        let unread = match sum.state {
            SumState::Loading | SumState::Hashing | SumState::Condemned => true,
            SumState::Partial => !sum.knows(first, window.len() / BLOCK_BYTES),
            _ => false,
        };
        if unread || sum.rehash {
            return if tries < MAX_TRIES { Verdict::Again } else { Verdict::Bad };
        }
        let mut verdict = Verdict::Good;
        let bytes = mem.bytes_mut(window).chunks_exact_mut(BLOCK_LEN);
        for ((block, bytes), address) in (first as usize..).zip(bytes).zip(start..) {
            if sum.sums.bad[block / 64] >> (block % 64) & 1 != 0 {
                verdict = Verdict::Bad;
                break;
            } else if !sum.sums.is_valid(block) {
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
}

/// Whether a block is all zeros. The first word tells, nearly always.
fn is_zeros(bytes: &[u8]) -> bool {
    bytes[..8] == [0; 8] && bytes.chunks(64).all(|c| c.iter().fold(0, |all, b| all | b) == 0)
}
