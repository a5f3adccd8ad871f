//! Deleting a snapshot that one layer still reads: what that layer does not have itself moves up.
//!
//! An extent where the upper layer has none is handed over by one record. Where both have one, the
//! blocks that the upper one lacks are copied into it and flushed, and then the lower one is freed. The
//! upper extent's page says before each copy which blocks come and what their checksums are, so a copy
//! that a crash tore is told from data, and the lower extent still has it. The upper layer may be a live
//! replica's: a block that it writes meanwhile is its own, and is not copied.

use cairn_block::{Buf, BufSlice, ByteOffset, IoStatus, Memory};

use crate::DiskError;
use crate::blocks::BlockSet;
use crate::disk::BLOCK;
use crate::extents::{ExtentState, NIL, extent_offset};
use crate::flush::Waiter;
use crate::pool::{Deletion, DiskOp, Mapping, Pool, Purpose};
use crate::sums::{Begun, PersistFor, Ready, Verdict};

/// Extents that are handed over together.
const MAX_LEAVING: u32 = 64;
/// Blocks that are copied together.
const MAX_BLOCKS: u32 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Looks for the next blocks to copy.
    Look,
    Reading,
    /// Has been read.
    Ready,
    /// The upper extent's page is being written: it says what comes.
    Noting,
    Writing,
    /// Waits until no write to the upper extent is in flight.
    Draining,
    /// What was copied or written to the upper extent is being flushed.
    Flushing,
    /// The upper extent's page is being written: it says that everything is there.
    Settling,
}

/// The copying of one extent's blocks.
#[derive(Debug)]
pub(crate) struct Merge {
    slot: u16,
    lower: u32,
    upper: u32,
    to: u16,
    stage: Stage,
    run: (u32, u32),
    version: u32,
    tries: u8,
    buf: Option<Buf>,
    /// The upper extent was changed.
    changed: bool,
    /// A block cannot be read or written: the snapshot stays.
    stuck: bool,
}

impl Pool {
    /// Moves what a deleted layer has to the only layer on top of it.
    pub(crate) fn merge_up<M: Memory>(&mut self, slot: u16, mem: &mut M) {
        let from = self.layer_of(slot);
        let Some(to) = self.child_of(from) else { return };
        if self.slots[usize::from(self.layer(to).owner)].deleting {
            // Nothing need be kept for it, beyond what has begun. Its end brings this deletion back.
            if self.merging(slot) {
                self.pump_merge(slot, mem);
            } else if self.layer(from).leaving == 0 {
                self.park(slot);
            }
            return;
        }
        if self.merging(slot) {
            return self.pump_merge(slot, mem);
        }
        if self.layer(from).copies > 0 {
            // What it began to take over from the layer beneath is to be whole before it moves on.
            return;
        }
        let Deletion::Extents(mut at) = self.slots[usize::from(slot)].deletion else { return };
        while at < self.layer(from).map.len() {
            let logical = u32::try_from(at).expect("a replica has at most 2^31 extents");
            let lower = match self.layer(from).mapping(logical) {
                Mapping::Extent(lower) => lower,
                Mapping::Hole => {
                    at += 1;
                    continue;
                }
                // It is on its way here from the layer beneath: come back when it is there.
                Mapping::Pending(_) => break,
            };
            if self.extents.get(lower).state == ExtentState::Moving {
                at += 1;
                continue;
            }
            match self.layer(to).mapping(logical) {
                Mapping::Pending(_) => break,
                Mapping::Hole => {
                    if self.layer(from).leaving >= MAX_LEAVING || self.is_noting(lower) {
                        break;
                    }
                    self.start_move(from, to, logical, lower);
                    at += 1;
                }
                Mapping::Extent(upper) => {
                    self.layer_mut(to).copies += 1;
                    self.merges.insert(Merge {
                        slot,
                        lower,
                        upper,
                        to,
                        stage: Stage::Look,
                        run: (0, 0),
                        version: 0,
                        tries: 0,
                        buf: None,
                        changed: false,
                        stuck: false,
                    });
                    at += 1;
                    break;
                }
            }
        }
        self.slots[usize::from(slot)].deletion = Deletion::Extents(at);
        if self.merging(slot) {
            return self.pump_merge(slot, mem);
        }
        let of = self.layer(from);
        if at < of.map.len() || of.allocs > 0 || of.leaving > 0 || of.returning > 0 {
            return;
        }
        if of.allocated > 0 {
            // A block could not be read: what is left stays until the pool is opened again.
            return self.park(slot);
        }
        let owner = self.layer(to).owner;
        if !self.slots[usize::from(owner)].frozen {
            self.slots[usize::from(slot)].deletion = Deletion::Parent;
            self.adopt(owner, slot);
        }
    }

    /// The page of the layer on top is durable and no longer names the empty one as its parent.
    pub(crate) fn adopted(&mut self, layer: u16, parent: Option<u16>, from: u16) {
        self.layer_mut(layer).parent = parent;
        if let Some(parent) = parent {
            self.layer_mut(parent).children += 1;
        }
        let empty = self.layer_of(from);
        self.layer_mut(empty).children -= 1;
        self.forget_layer(from);
    }

    fn child_of(&self, layer: u16) -> Option<u16> {
        (0..self.superblock.slots).find(|&at| self.layer(at).parent == Some(layer))
    }

    fn merging(&self, slot: u16) -> bool {
        self.merges.iter().any(|(_, merge)| merge.slot == slot)
    }

    fn pump_merge<M: Memory>(&mut self, slot: u16, mem: &mut M) {
        let of = self.merges.iter().find(|(_, merge)| merge.slot == slot).map(|(id, _)| id);
        if let Some(id) = of {
            self.step_merge(id, mem);
        }
    }

    fn step_merge<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let merge = self.merges.get(id);
        let (lower, upper, stuck) = (merge.lower, merge.upper, merge.stuck);
        match merge.stage {
            Stage::Look => {
                let (Ready::Now(low), Ready::Now(up)) =
                    (self.prepare(lower, false), self.prepare(upper, true))
                else {
                    // It goes on with the event that brings what is missing.
                    return;
                };
                let has = self.owned_by(up);
                let data = self.valid_in(low).minus(has);
                let zeroed = self.owned_by(low).minus(self.valid_in(low)).minus(has);
                if let (Some((first, blocks)), false) = (data.run(0), stuck) {
                    self.merge_read(id, first, blocks.min(MAX_BLOCKS), mem);
                    return;
                }
                let logical = self.extents.get(lower).link;
                let layer = self.extents.get(lower).layer;
                if !zeroed.is_empty() && self.covered(layer, logical) {
                    self.note_zeroed(up, zeroed);
                    self.owe_once(id);
                }
                self.finish_merge(id, mem);
            }
            Stage::Ready => self.merge_write(id, mem),
            Stage::Draining => self.drain_merge(id, mem),
            Stage::Reading | Stage::Noting | Stage::Writing | Stage::Flushing | Stage::Settling => {
            }
        }
    }

    fn merge_read<M: Memory>(&mut self, id: u32, first: u32, blocks: u32, mem: &mut M) {
        let Some(buf) = mem.alloc(blocks << 12) else {
            self.short = true;
            return;
        };
        let lower = self.merges.get(id).lower;
        let version = self.sum_version(self.extents.get(lower).sum);
        let start = extent_offset(&self.superblock.segments, lower);
        let offset = ByteOffset(start + u64::from(first) * BLOCK);
        let op = DiskOp::Read { offset, buf: buf.slice() };
        let merge = self.merges.get_mut(id);
        merge.stage = Stage::Reading;
        merge.run = (first, blocks);
        merge.version = version;
        merge.buf = Some(buf);
        self.issue(op, Purpose::Merge { merge: id, extent: lower }, None);
    }

    /// Writes what was read, if the upper extent still lacks all of it.
    fn merge_write<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let merge = self.merges.get(id);
        let (upper, to, (first, blocks)) = (merge.upper, merge.to, merge.run);
        let window = merge.buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        let Ready::Now(sum) = self.prepare(upper, true) else { return };
        if !self.owned_by(sum).and(BlockSet::range(first, blocks)).is_empty() {
            // The layer was written meanwhile.
            return self.look_again(id, mem);
        }
        let layered = self.layer(to).parent.is_some();
        let begun = self.begin_mutation(sum, first, blocks, Some(window), layered, mem);
        // A mutation owns its blocks from its beginning on.
        assert_ne!(begun, Begun::Conflict, "nobody writes to blocks that nobody has");
        self.note_incoming(sum, BlockSet::range(first, blocks));
        self.owe_once(id);
        self.merges.get_mut(id).stage = Stage::Noting;
        self.persist_zeros(upper, PersistFor::Merge(id));
    }

    /// The upper extent's page is durable.
    pub(crate) fn merge_noted<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let merge = self.merges.get_mut(id);
        if !status.is_ok() {
            merge.stuck = true;
        }
        if merge.stage == Stage::Settling {
            return self.end_merge(id);
        }
        assert_eq!(
            merge.stage,
            Stage::Noting,
            "a page was written for a merge that waits for none"
        );
        let (upper, (first, _)) = (merge.upper, merge.run);
        if merge.stuck {
            self.end_mutation(upper, first, true, mem);
            return self.look_again(id, mem);
        }
        merge.stage = Stage::Writing;
        let window = merge.buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        let start = extent_offset(&self.superblock.segments, upper);
        let offset = ByteOffset(start + u64::from(first) * BLOCK);
        let op = DiskOp::Write { offset, buf: window, fua: false };
        self.issue(op, Purpose::Merge { merge: id, extent: upper }, None);
    }

    fn look_again<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let merge = self.merges.get_mut(id);
        merge.stage = Stage::Look;
        if let Some(buf) = merge.buf.take() {
            mem.release(buf);
        }
    }

    pub(crate) fn merge_io_done<M: Memory>(
        &mut self,
        id: u32,
        extent: u32,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        let merge = self.merges.get(id);
        let ((first, _), version, tries) = (merge.run, merge.version, merge.tries);
        let window = merge.buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        match merge.stage {
            Stage::Reading => {
                let verdict = match result {
                    Ok(()) => self.verify(extent, first, window, version, tries, mem),
                    Err(_) => Verdict::Bad,
                };
                let merge = self.merges.get_mut(id);
                match verdict {
                    Verdict::Good => merge.stage = Stage::Ready,
                    Verdict::Again => {
                        merge.tries += 1;
                        self.look_again(id, mem);
                    }
                    Verdict::Bad => {
                        merge.stuck = true;
                        self.look_again(id, mem);
                    }
                }
            }
            Stage::Writing => {
                let space = result == Err(DiskError::NoSpace);
                self.end_mutation(extent, first, space, mem);
                self.merges.get_mut(id).stuck |= result.is_err();
                self.look_again(id, mem);
            }
            stage => unreachable!("a merge has no I/O in stage {stage:?}"),
        }
        self.unpin(extent);
        // The next step follows with the pump at the end of the event.
    }

    /// Nothing is left to copy. What the upper extent has instead of the lower one's blocks must be
    /// durable before those are given up.
    fn finish_merge<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let merge = self.merges.get_mut(id);
        if merge.stuck {
            return self.end_merge(id);
        }
        merge.stage = Stage::Draining;
        let upper = merge.upper;
        self.hold_mutations(upper);
        self.drain_merge(id, mem);
    }

    fn drain_merge<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let upper = self.merges.get(id).upper;
        if self.has_writers(upper) {
            return;
        }
        self.merges.get_mut(id).stage = Stage::Flushing;
        self.flusher.next.push(Waiter::Merge(id));
        self.admit_mutations(upper, mem);
    }

    /// What the upper extent has is durable. What was copied may be overwritten once its page says so.
    pub(crate) fn merge_flushed(&mut self, id: u32) {
        let merge = self.merges.get_mut(id);
        if !merge.changed {
            return self.end_merge(id);
        }
        merge.stage = Stage::Settling;
        let upper = merge.upper;
        self.note_arrived(upper);
        self.persist_zeros(upper, PersistFor::Merge(id));
    }

    /// From the first change on the upper extent stays dirty, until the last page of the merge.
    fn owe_once(&mut self, id: u32) {
        let merge = self.merges.get_mut(id);
        let upper = merge.upper;
        if !core::mem::replace(&mut merge.changed, true) {
            self.owe(upper);
        }
    }

    fn end_merge(&mut self, id: u32) {
        let merge = self.merges.remove(id);
        if merge.changed {
            self.repay(merge.upper);
        }
        self.layer_mut(merge.to).copies -= 1;
        if merge.stuck {
            return;
        }
        let e = self.extents.get(merge.lower);
        let (layer, logical) = (e.layer, e.link);
        self.unmap(layer, logical);
        self.log_free(merge.lower, NIL);
    }

    /// The pool failed.
    pub(crate) fn clear_merges<M: Memory>(&mut self, mem: &mut M) {
        let mut flying = Vec::new();
        for (id, merge) in self.merges.iter_mut() {
            if let Some(buf) = merge.buf.take() {
                flying.push((id, buf));
            }
        }
        // A buffer that the device may still use is kept until its operation is back.
        for (id, buf) in flying {
            let used = self.issued.iter_mut().find(
                |(_, issued)| matches!(issued.purpose, Purpose::Merge { merge, .. } if merge == id),
            );
            match used {
                Some((_, issued)) => issued.buf = Some(buf),
                None => mem.release(buf),
            }
        }
        self.merges.clear();
    }
}
