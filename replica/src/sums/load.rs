//! Reading an extent's checksums, or hashing it anew; and what becomes of one whose page is damaged.

use cairn_block::{BufSlice, ByteOffset, IoStatus, Memory, PoolId};

use super::{MAX_HASHING, PersistFor, REQUESTS_PER_HASH, Redeemed, Sum, SumState, is_zeros};
use crate::DiskError;
use crate::blocks::BlockSet;
use crate::disk::{BLOCK, BLOCK_BYTES, BLOCK_LEN, BlockSums, EXTENT, EXTENT_BLOCKS, block_crc};
use crate::extents::{Extent, ExtentState, NIL, extent_offset, sums_address};
use crate::flush::Waiter;
use crate::pool::{DiskOp, Pool, Purpose};

impl Pool {
    pub(crate) fn pump_sums<M: Memory>(&mut self, mem: &mut M) {
        if !self.sums.stale.is_empty() || !self.sums.partial.is_empty() {
            self.hash_in_background();
        }
        while let Some(&extent) = self.sums.to_load.front() {
            let hashing = self.sum_of(extent).is_some_and(|s| s.state == SumState::Hashing);
            let start = extent_offset(&self.superblock.segments, extent);
            let (offset, len) = if hashing {
                (start, u32::try_from(EXTENT).expect("1 MiB"))
            } else {
                (sums_address(&self.superblock.segments, extent) * BLOCK, 2 * BLOCK_BYTES)
            };
            let Some(buf) = mem.alloc(len) else {
                self.short = true;
                break;
            };
            self.sums.to_load.pop_front();
            self.sums.hashing += u32::from(hashing);
            let op = DiskOp::Read { offset: ByteOffset(offset), buf: buf.slice() };
            self.issue(op, Purpose::SumLoad(extent), Some(buf));
        }
        self.pump_notes(mem);
        self.pump_washing(mem);
    }

    /// Hashes what was dirty at a crash, little by little where the pool has requests: what they write need not
    /// be read before.
    fn hash_in_background(&mut self) {
        while self.sums.hashing < MAX_HASHING && self.sums.to_load.is_empty() {
            if self.requests.len() > 0 && self.sums.answered < REQUESTS_PER_HASH {
                return;
            }
            if let Some(extent) = self.sums.stale.pop_front() {
                let e = self.extents.get(extent);
                if e.dirty && e.sum == NIL && e.state == ExtentState::Allocated {
                    let at = self.begin_load(extent);
                    self.sums.cache.get_mut(at).wanted = true;
                    self.sums.answered = 0;
                }
            } else if let Some(extent) = self.sums.partial.pop_front() {
                // One that is on its way to a free list is no business of this: it is being zeroed.
                let allocated = self.extents.get(extent).state == ExtentState::Allocated;
                let partial = |sum: &mut Sum| sum.state == SumState::Partial;
                if allocated && self.sum_of(extent).is_some_and(partial) {
                    self.hash_when_quiet(extent);
                    self.sums.answered = 0;
                }
            } else {
                return;
            }
        }
    }

    /// The pages, or the whole extent, has been read into `bytes`.
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
        let e = *self.extents.get(extent);
        let at = e.sum;
        let sum = self.sums.cache.get_mut(at);
        let hashed = sum.state == SumState::Hashing;
        let loaded = result.is_ok();
        if loaded && hashed {
            let fresh = core::mem::take(&mut sum.fresh);
            let junk = hash(&mut sum.sums, fresh, start, mem.bytes(bytes));
            sum.rehash = false;
            if !junk.is_empty() {
                self.clean_junk(extent, junk);
                return;
            }
        } else if loaded {
            let newest = newest_page(&e, extent, address, pool, mem.bytes(bytes));
            if let Some((sums, sequence)) = newest {
                sum.sums = sums;
                sum.page = sequence;
                sum.state = SumState::Clean;
            }
            let plain = newest.as_ref().is_none_or(|(sums, _)| !sums.tells_of_layers());
            if e.dirty && plain && !sum.wanted {
                sum.state = SumState::Partial;
                self.sums.partial.push_back(extent);
                self.sums.loading -= 1;
                self.unpin(extent);
                return self.run_sum_waiters(extent, mem);
            }
            if e.dirty {
                // Only what was zeroed or copied is taken from it: the rest may be behind the data.
                sum.state = SumState::Hashing;
                self.sums.to_load.push_back(extent);
                return;
            }
            if newest.is_none() {
                let next = next_page(&e, extent, address, pool, mem.bytes(bytes));
                return self.condemn(extent, next);
            }
        }
        self.sum_settled(extent, loaded, mem);
    }

    /// The page of a clean extent does not verify. None of its blocks can be read any more, but each that
    /// is written can be: a page that says so is made durable first, for a crash would otherwise have
    /// what is there hashed anew, and taken for good.
    fn condemn(&mut self, extent: u32, next: u64) {
        self.sums.mismatches += 1;
        if let Some(sum) = self.sum_of(extent) {
            sum.state = SumState::Condemned;
            sum.sums = BlockSums::unknown();
            sum.page = next - 1;
        }
        self.sums.condemned.push(extent);
    }

    /// A page is durable that tells what is unknown of its extent, or that it is no longer.
    pub(super) fn condemned<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        self.sums.loading -= 1;
        if let Some(sum) = self.sum_of(extent) {
            sum.state = SumState::Clean;
        }
        self.unpin(extent);
        self.run_sum_waiters(extent, mem);
    }

    /// Blocks were written of which nothing was known. Whoever wrote them is answered once a page says
    /// so durably, after what was written is: a crash leaves them unknown, or right.
    pub(crate) fn redeem(&mut self, extent: u32, first: u32, blocks: u32, request: u32) -> bool {
        let Some(sum) = self.sum_of(extent) else { return false };
        let range = BlockSet::range(first, blocks);
        if BlockSet(sum.sums.bad).and(range).is_empty() {
            return false;
        }
        self.owe(extent);
        self.extents.get_mut(extent).pins += 1;
        self.sums.redeemed.push(Redeemed { extent, range, request });
        self.flusher.next.push(Waiter::Redeemed { extent, request });
        true
    }

    /// What was written is durable: the next page says that it is known again.
    pub(crate) fn redeemed(&mut self, extent: u32, request: u32) {
        let of = |r: &Redeemed| r.extent == extent && r.request == request;
        let Some(at) = self.sums.redeemed.iter().position(of) else { return };
        let Redeemed { range, .. } = self.sums.redeemed.swap_remove(at);
        if let Some(sum) = self.sum_of(extent) {
            sum.sums.bad = BlockSet(sum.sums.bad).minus(range).0;
        }
        self.persist_zeros(extent, PersistFor::Request(request));
    }

    /// A copy from the parent layer was cut off by a crash: what it left must not be taken for data.
    fn clean_junk(&mut self, extent: u32, junk: BlockSet) {
        let start = extent_offset(&self.superblock.segments, extent);
        let mut count = 0;
        for (first, blocks) in junk.runs() {
            let offset = ByteOffset(start + u64::from(first) * BLOCK);
            let op = DiskOp::Zero { offset, len: u64::from(blocks) * BLOCK, punch: true };
            self.issue(op, Purpose::SumClean(extent), None);
            count += 1;
        }
        if let Some(sum) = self.sum_of(extent) {
            sum.cleaning = (count, false);
        }
    }

    pub(crate) fn sum_cleaned<M: Memory>(
        &mut self,
        extent: u32,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        let Some(sum) = self.sum_of(extent) else { return };
        sum.cleaning.0 -= 1;
        sum.cleaning.1 |= result.is_err();
        match sum.cleaning {
            (0, false) => self.flusher.next.push(Waiter::SumClean(extent)),
            (0, true) => self.sum_settled(extent, false, mem),
            _ => {}
        }
    }

    /// Whoever waits for the extent's checksums goes on, or is told that there are none.
    pub(crate) fn sum_settled<M: Memory>(&mut self, extent: u32, loaded: bool, mem: &mut M) {
        let at = self.extents.get(extent).sum;
        let sum = self.sums.cache.get_mut(at);
        let hashed = sum.state == SumState::Hashing;
        if hashed && loaded {
            sum.state = SumState::Dirty;
            self.sums.dirty += 1;
        }
        self.sums.loading -= 1;
        self.sums.hashing -= u32::from(hashed);
        self.unpin(extent);
        if loaded {
            self.run_sum_waiters(extent, mem);
            return;
        }
        // Nothing in the extent can be verified: whoever asks is told, and a peer has the data.
        let sum = self.sums.cache.get_mut(at);
        let first = core::mem::replace(&mut sum.first, NIL);
        sum.last = NIL;
        if hashed && !sum.fresh.is_empty() {
            // But for what was written since the crash. Nobody tries to hash it again before somebody reads the rest.
            (sum.state, sum.wanted) = (SumState::Partial, false);
            self.sums.mismatches += 1;
            return self.fail_waiting(first, IoStatus::MediaError, mem);
        }
        self.extents.get_mut(extent).sum = NIL;
        let sum = self.sums.cache.remove(at);
        self.keep_spare(sum);
        self.sums.mismatches += 1;
        self.fail_waiting(first, IoStatus::MediaError, mem);
    }
}

/// The current page of an extent, and its sequence. Where the extent is clean the table says which copy
/// that is; where it is dirty the newer one that verifies will do.
fn newest_page(
    e: &Extent,
    extent: u32,
    address: u64,
    pool: PoolId,
    bytes: &[u8],
) -> Option<(BlockSums, u64)> {
    let (a, b) = bytes.split_at(BLOCK_LEN);
    let decode = |copy: u64, block| {
        let (sums, sequence) =
            BlockSums::decode(extent, e.birth, address + copy, pool, block).ok()?;
        (sequence & 1 == copy).then_some((sums, sequence))
    };
    match (e.dirty, e.copy) {
        (false, false) => decode(0, a),
        (false, true) => decode(1, b),
        (true, _) => match (decode(0, a), decode(1, b)) {
            (Some(a), Some(b)) => Some(if a.1 > b.1 { a } else { b }),
            (a, b) => a.or(b),
        },
    }
}

/// The sequence of the page that replaces a damaged one: it goes to the other copy, which is older.
fn next_page(e: &Extent, extent: u32, address: u64, pool: PoolId, bytes: &[u8]) -> u64 {
    let copy = u64::from(!e.copy);
    let (a, b) = bytes.split_at(BLOCK_LEN);
    let other = if e.copy { a } else { b };
    match BlockSums::decode(extent, e.birth, address + copy, pool, other) {
        Ok((_, sequence)) if sequence & 1 == copy => sequence + 2,
        _ => 2 - copy,
    }
}

/// Hashes a whole extent, but what is known of it. A block of zeros is one that holds no data. Returns the
/// blocks whose copying from the parent layer was cut off.
fn hash(sums: &mut BlockSums, known: BlockSet, start: u64, bytes: &[u8]) -> BlockSet {
    assert_eq!(bytes.len() as u64, EXTENT_BLOCKS * BLOCK, "a whole extent");
    let mut junk = BlockSet::default();
    for ((block, bytes), address) in (0u32..).zip(bytes.chunks_exact(BLOCK_LEN)).zip(start..) {
        if known.contains(block) {
            continue;
        }
        let at = block as usize;
        let crc = block_crc(address, bytes);
        if is_zeros(bytes) {
            sums.forget(at);
        } else if BlockSet(sums.incoming).contains(block) && sums.crc[at] != crc {
            sums.forget(at);
            junk = junk.or(BlockSet::range(block, 1));
        } else {
            sums.set(at, crc);
        }
    }
    junk
}
