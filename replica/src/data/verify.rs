//! Verify: the blocks of a range are read into a scratch buffer and their checksums compared; the data
//! goes nowhere. Holes, and blocks that were never written, cost nothing.

use std::collections::VecDeque;

use cairn_block::{Buf, ByteOffset, IoStatus, Memory};

use super::{Action, Part};
use crate::DiskError;
use crate::disk::BLOCK;
use crate::extents::{NIL, extent_offset};
use crate::pool::{DiskOp, Pool, Purpose};
use crate::sums::Verdict;

/// Blocks that are verified with one scratch buffer at most: 128 KiB are to be had where the arena is
/// nearly used up, too.
pub(super) const MAX_BLOCKS: u64 = 32;
/// Scratch buffers of a pool at once: what hosts wait for comes first.
const MAX_SCRATCH: u32 = 4;

/// Parts that wait for a scratch buffer, and how many are in use.
#[derive(Debug, Default)]
pub(crate) struct Verifier {
    waiting: VecDeque<Part>,
    in_use: u32,
    /// Of each request that has ended, by its tag: how many blocks held data.
    results: Vec<(u64, u32)>,
}

impl Verifier {
    /// The pool failed: nobody waits any more. What is at the device still comes back.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.in_use = 0;
    }

    pub(super) fn note_done(&mut self, tag: u64, blocks: u32) {
        self.results.push((tag, blocks));
    }

    /// Whether a part waits for memory that another user of the arena has.
    pub(crate) fn is_short(&self) -> bool {
        !self.waiting.is_empty() && self.in_use == 0
    }
}

impl Pool {
    /// Whether something waits for memory that this pool does not hold itself: [`Pool::retry`] is to be
    /// called when some may be free.
    #[must_use]
    pub fn waits_for_memory(&self) -> bool {
        self.verifier.is_short()
    }

    /// After a Verify was answered: how many of its blocks were not in holes, for whoever paces a scrub.
    /// To be asked for each of them.
    pub fn take_verified(&mut self, tag: u64) -> Option<u32> {
        let results = &mut self.verifier.results;
        let at = results.iter().position(|&(t, _)| t == tag)?;
        Some(results.swap_remove(at).1)
    }

    /// Reads a part's blocks into a scratch buffer, or lets it wait for one.
    pub(super) fn start_verify<M: Memory>(
        &mut self,
        part: Part,
        extent: u32,
        version: u32,
        mem: &mut M,
    ) {
        let busy = self.verifier.in_use >= MAX_SCRATCH;
        let Some(buf) = (if busy { None } else { mem.alloc(part.blocks << 12) }) else {
            self.verifier.waiting.push_back(part);
            return;
        };
        self.verifier.in_use += 1;
        let start = extent_offset(&self.superblock.segments, extent);
        let offset = ByteOffset(start + u64::from(part.first) * BLOCK);
        let Part { request, tries, blocks, .. } = part;
        if tries == 0 {
            self.requests.get_mut(request).verified += blocks;
        }
        let op = DiskOp::Read { offset, buf: buf.slice() };
        self.issue(op, Purpose::Data { request, extent, version, tries }, Some(buf));
    }

    /// Tries again what waited for a scratch buffer.
    pub(crate) fn pump_verify<M: Memory>(&mut self, mem: &mut M) {
        for _ in 0..self.verifier.waiting.len() {
            if self.verifier.in_use >= MAX_SCRATCH {
                return;
            }
            let before = (self.verifier.in_use, self.verifier.waiting.len());
            let Some(part) = self.verifier.waiting.pop_front() else { return };
            // Its extent may have gone meanwhile: it is looked up anew.
            self.rerun(part, mem);
            let after = (self.verifier.in_use, self.verifier.waiting.len());
            if after.0 == before.0 && after.1 >= before.1 {
                // There is no memory for it, and so there is none for the next.
                return;
            }
        }
    }

    /// The scratch buffer is filled, or the device failed.
    pub(crate) fn verify_done<M: Memory>(
        &mut self,
        op: DiskOp,
        (request, extent): (u32, u32),
        (version, tries): (u32, u8),
        result: Result<(), DiskError>,
        scratch: Buf,
        mem: &mut M,
    ) {
        self.verifier.in_use = self.verifier.in_use.saturating_sub(1);
        let verdict = match (op, result) {
            _ if self.state != crate::PoolState::Online => Verdict::Bad,
            (DiskOp::Read { offset, .. }, Ok(())) => {
                let start = extent_offset(&self.superblock.segments, extent);
                let first = u32::try_from((offset.0 - start) / BLOCK).expect("256 blocks");
                let window = scratch.slice();
                match self.verify(extent, first, window, version, tries, mem) {
                    Verdict::Again => {
                        let logical = self.extents.get(extent).link;
                        let part = Part {
                            request,
                            slot: self.requests.get(request).slot,
                            logical,
                            first,
                            blocks: window.len() >> 12,
                            buf: cairn_block::BufSlice::EMPTY,
                            action: Action::Verify,
                            tries: tries + 1,
                            next: NIL,
                        };
                        mem.release(scratch);
                        self.unpin(extent);
                        self.rerun(part, mem);
                        return;
                    }
                    verdict => verdict,
                }
            }
            _ => Verdict::Bad,
        };
        mem.release(scratch);
        self.unpin(extent);
        let status = if verdict == Verdict::Good { IoStatus::Ok } else { IoStatus::MediaError };
        self.part_done(request, status, mem);
    }
}
