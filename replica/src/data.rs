//! The data path: requests, and the parts that they fall into at the bounds of extents.

pub(crate) mod verify;

use core::ops::Range;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{BufSlice, ByteOffset, IoOp, IoRequest, IoStatus, LbaRange, Memory};

use crate::DiskError;
use crate::blocks::BlockSet;
use crate::disk::{BLOCK, EXTENT_BLOCKS};
use crate::extents::{ExtentState, NIL, extent_offset};
use crate::flush::Waiter;
use crate::journal::Owner;
use crate::pool::{DiskOp, Done, Mapping, PENDING, Pool, PoolState, Purpose, ReplicaSlot};
use crate::sums::{Begun, PersistFor, Ready, Verdict};

/// Parts of one request in flight: a discard of everything must not take all the memory.
const MAX_PARTS: u32 = 64;

/// What a request is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    /// A replica, or a snapshot, through all of its layers.
    Layered,
    /// One layer's own extent.
    Raw,
}

#[derive(Debug)]
pub(crate) struct Request {
    tag: u64,
    slot: u16,
    op: IoOp,
    kind: RequestKind,
    /// The first block that is not yet a part of it, and the block after its last.
    next: u64,
    end: u64,
    /// What is left of the payload.
    buf: BufSlice,
    /// Parts in flight or waiting.
    pub(crate) outstanding: u32,
    status: IoStatus,
    /// Its last step, a flush, has begun.
    flushing: bool,
    /// Blocks of a Verify that were read.
    verified: u32,
}

impl Request {
    /// The pool failed: only what is at the device is still waited for.
    pub(crate) fn give_up(&mut self) {
        self.next = self.end;
        self.outstanding = 0;
        self.status = IoStatus::MediaError;
    }
}

/// What a part does to its extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Read,
    Verify,
    Write {
        fua: bool,
    },
    Zero {
        punch: bool,
    },
    /// The whole extent is given up.
    Free,
}

/// A piece of a request within one extent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) request: u32,
    pub(crate) slot: u16,
    pub(crate) logical: u32,
    /// Blocks from the extent's start.
    first: u32,
    blocks: u32,
    buf: BufSlice,
    pub(crate) action: Action,
    /// How often it met a write of its blocks, where it reads.
    tries: u8,
    /// The next one that waits for the same allocation, or for the same checksums.
    pub(crate) next: u32,
}

impl Pool {
    /// Puts a request in; [`Pool::poll_done`] answers it with its tag.
    pub fn submit<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        request: IoRequest,
        mem: &mut M,
    ) {
        self.submit_one(tag, slot, request, mem);
        self.pump(mem);
    }

    pub(crate) fn submit_one<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        request: IoRequest,
        mem: &mut M,
    ) {
        if let Err(status) = self.admit(slot, &request) {
            self.done.push_back(Done { tag, status, error: None });
            return;
        }
        let frozen = self.slots[usize::from(slot.0)].frozen;
        if frozen && !on(Mutant::SnapshotLetsWriteThrough) {
            self.held.push_back((tag, slot, request));
            return;
        }
        self.slots[usize::from(slot.0)].in_flight += 1;
        let blocks = request.range.start().0..request.range.end().0;
        self.begin(tag, slot.0, request.op, blocks, request.buf, RequestKind::Layered, mem);
    }

    #[expect(clippy::too_many_arguments, reason = "a request has so many parts")]
    pub(crate) fn begin<M: Memory>(
        &mut self,
        tag: u64,
        slot: u16,
        op: IoOp,
        blocks: Range<u64>,
        buf: BufSlice,
        kind: RequestKind,
        mem: &mut M,
    ) {
        let request = self.requests.insert(Request {
            tag,
            slot,
            op,
            kind,
            next: blocks.start,
            end: blocks.end,
            buf,
            outstanding: 0,
            status: IoStatus::Ok,
            flushing: false,
            verified: 0,
        });
        self.advance(request, mem);
    }

    fn admit(&self, slot: ReplicaSlot, request: &IoRequest) -> Result<(), IoStatus> {
        if self.state != PoolState::Online {
            return Err(IoStatus::MediaError);
        }
        let replica = self
            .slots
            .get(usize::from(slot.0))
            .filter(|s| {
                let reads = matches!(request.op, IoOp::Read | IoOp::Verify);
                s.is_live() || (s.is_snapshot() && reads)
            })
            .ok_or(IoStatus::PathError)?;
        if request.op == IoOp::Flush {
            return Ok(());
        }
        if matches!(request.op, IoOp::Snapshot(_)) {
            return Err(IoStatus::Unsupported);
        }
        let range = request.range;
        LbaRange::within(range.start(), range.blocks(), replica.page.blocks)
            .map_err(|_| IoStatus::OutOfRange)?;
        let payload = matches!(request.op, IoOp::Read | IoOp::Write { .. });
        let bytes = replica.page.block_size.bytes_of(range.blocks());
        if payload && u64::from(request.buf.len()) != bytes {
            return Err(IoStatus::InvalidField);
        }
        Ok(())
    }

    /// Cuts parts off a request until enough are in flight, and ends it when there is nothing left.
    fn advance<M: Memory>(&mut self, id: u32, mem: &mut M) {
        loop {
            let request = self.requests.get_mut(id);
            if request.op == IoOp::Flush {
                request.next = request.end;
            }
            if request.next >= request.end || request.outstanding >= MAX_PARTS {
                break;
            }
            let (slot, at) = (request.slot, request.next / EXTENT_BLOCKS);
            let keeps = !matches!(request.op, IoOp::Read | IoOp::Write { .. });
            if keeps && at >= self.mapped_len(self.layer_of(slot)) {
                // Nothing was ever written from here on.
                let request = self.requests.get_mut(id);
                request.next = request.end;
                break;
            }
            let size = self.slots[usize::from(slot)].page.bytes().div_ceil(BLOCK);
            let part = next_part(id, self.requests.get_mut(id), size);
            match self.run_part(part, mem) {
                Ok(parts) => self.requests.get_mut(id).outstanding += parts,
                Err(status) => {
                    let request = self.requests.get_mut(id);
                    request.status = status;
                    request.next = request.end;
                }
            }
        }
        let request = self.requests.get(id);
        if request.next < request.end || request.outstanding > 0 || request.flushing {
            return;
        }
        let flush = !on(Mutant::FlushAtReplica)
            && match request.op {
                IoOp::Flush => true,
                IoOp::WriteZeroes { fua, .. } => fua && request.status.is_ok(),
                _ => false,
            };
        if flush {
            self.requests.get_mut(id).flushing = true;
            if self.journal.frees > 0 {
                // A discard was answered, or will be seen as done, whose record is not durable yet.
                self.journal.push_waiter(id);
            } else {
                self.flusher.next.push(Waiter::Request(id));
            }
        } else {
            self.finish(id);
        }
    }

    /// Starts a part. Returns how many pieces of it are now in flight or wait; at none it is done.
    fn run_part<M: Memory>(&mut self, part: Part, mem: &mut M) -> Result<u32, IoStatus> {
        let request = self.requests.get(part.request);
        if request.kind == RequestKind::Raw {
            let tag = request.tag;
            return self.run_raw(part, tag, mem);
        }
        let slot = &self.slots[usize::from(part.slot)];
        let live = slot.is_live();
        let reads = matches!(part.action, Action::Read | Action::Verify);
        if reads && !live && !slot.is_snapshot() {
            // To a read that waited while its replica was deleted, what is gone is not zeros.
            return Err(IoStatus::PathError);
        }
        let layer = self.layer_of(part.slot);
        let mapping = self.layer(layer).mapping(part.logical);
        if reads && self.layer(layer).parent.is_some() {
            return Ok(self.read_through(part, layer, mem));
        }
        Ok(match (mapping, part.action) {
            (Mapping::Hole | Mapping::Pending(_), Action::Read) => {
                mem.bytes_mut(part.buf).fill(0);
                0
            }
            (Mapping::Hole | Mapping::Pending(_), Action::Verify) => 0,
            (Mapping::Hole, Action::Zero { .. } | Action::Free)
                if !self.covered(layer, part.logical) =>
            {
                0
            }
            (Mapping::Hole, _) if !live => return Err(IoStatus::PathError),
            (Mapping::Hole, _) => {
                let alloc = self.start_alloc(layer, part.logical);
                self.wait_for_alloc(alloc, part);
                1
            }
            (Mapping::Pending(alloc), _) => {
                self.wait_for_alloc(alloc, part);
                1
            }
            (Mapping::Extent(_), Action::Free) if on(Mutant::DiscardKeepsData) => 0,
            (Mapping::Extent(extent), Action::Free) if !self.covered(layer, part.logical) => {
                self.start_free(part, extent, layer);
                1
            }
            (Mapping::Extent(extent), Action::Read | Action::Verify) => {
                self.read_extent(part, extent, mem)
            }
            (Mapping::Extent(extent), _) => self.mutate(part, extent, layer, mem),
        })
    }

    /// Reads from the one extent that there is.
    pub(crate) fn read_extent<M: Memory>(&mut self, part: Part, extent: u32, mem: &mut M) -> u32 {
        let sum = match self.prepare_read(extent, part.first, part.blocks) {
            Ready::Now(sum) => sum,
            Ready::Wait(sum) => {
                self.wait_for_sum(sum, part);
                return 1;
            }
        };
        if self.reads_zeros(sum, part.first, part.blocks) {
            if part.action == Action::Read {
                mem.bytes_mut(part.buf).fill(0);
            }
            return 0;
        }
        self.issue_read(&part, extent, (part.first, part.blocks), mem);
        1
    }

    /// Reads each block from the uppermost layer that has it.
    fn read_through<M: Memory>(&mut self, part: Part, layer: u16, mem: &mut M) -> u32 {
        let wanted = BlockSet::range(part.first, part.blocks);
        // First see that every checksum page is there: nothing is issued before that.
        let mut need = wanted;
        let mut at = Some(layer);
        while let Some(l) = at
            && !need.is_empty()
        {
            if let Mapping::Extent(extent) = self.layer(l).mapping(part.logical) {
                match self.prepare(extent, false) {
                    Ready::Now(sum) => need = need.minus(self.owned_by(sum)),
                    Ready::Wait(sum) => {
                        self.wait_for_sum(sum, part);
                        return 1;
                    }
                }
            }
            at = self.layer(l).parent;
        }
        let mut issued = 0;
        let mut zeros = need;
        need = wanted;
        at = Some(layer);
        while let Some(l) = at
            && !need.is_empty()
        {
            if let Mapping::Extent(extent) = self.layer(l).mapping(part.logical) {
                let sum = self.extents.get(extent).sum;
                let data = need.and(self.valid_in(sum));
                zeros = zeros.or(need.and(self.owned_by(sum)).minus(data));
                for (first, blocks) in data.runs() {
                    self.issue_read(&part, extent, (first, blocks), mem);
                    issued += 1;
                }
                need = need.minus(self.owned_by(sum));
            }
            at = self.layer(l).parent;
        }
        if part.action == Action::Read {
            for (first, blocks) in zeros.runs() {
                mem.bytes_mut(window(&part, first, blocks)).fill(0);
            }
        }
        issued
    }

    fn issue_read<M: Memory>(
        &mut self,
        part: &Part,
        extent: u32,
        (first, blocks): (u32, u32),
        mem: &mut M,
    ) {
        let sum = self.extents.get(extent).sum;
        let version = self.sum_version(sum);
        if part.action == Action::Verify {
            return self.start_verify(Part { first, blocks, ..*part }, extent, version, mem);
        }
        let start = extent_offset(&self.superblock.segments, extent);
        let offset = ByteOffset(start + u64::from(first) * BLOCK);
        let op = DiskOp::Read { offset, buf: window(part, first, blocks) };
        let purpose = Purpose::Data { request: part.request, extent, version, tries: part.tries };
        self.issue(op, purpose, None);
    }

    /// Writes or zeroes blocks of an extent of the replica's own layer.
    pub(crate) fn mutate<M: Memory>(
        &mut self,
        part: Part,
        extent: u32,
        layer: u16,
        mem: &mut M,
    ) -> u32 {
        let layered = self.layer(layer).parent.is_some();
        let ready = if layered { self.prepare(extent, true) } else { self.prepare_write(extent) };
        let sum = match ready {
            Ready::Now(sum) => sum,
            Ready::Wait(sum) => {
                self.wait_for_sum(sum, part);
                return 1;
            }
        };
        let data = matches!(part.action, Action::Write { .. }).then_some(part.buf);
        let begun = self.begin_mutation(sum, part.first, part.blocks, data, layered, mem);
        if begun == Begun::Conflict {
            self.hold_conflict(part);
            return 1;
        }
        let version = self.sum_version(sum);
        let start = extent_offset(&self.superblock.segments, extent);
        let offset = ByteOffset(start + u64::from(part.first) * BLOCK);
        let len = u64::from(part.blocks) * BLOCK;
        let op = match part.action {
            Action::Write { fua } => {
                let fua = fua && !on(Mutant::IgnoreFua);
                DiskOp::Write { offset, buf: part.buf, fua }
            }
            Action::Zero { punch } => DiskOp::Zero { offset, len, punch },
            Action::Free => DiskOp::Zero { offset, len, punch: true },
            Action::Read | Action::Verify => unreachable!("a read changes nothing"),
        };
        let purpose = Purpose::Data { request: part.request, extent, version, tries: part.tries };
        if begun == Begun::Note {
            // Zeros on the device do not tell a block that was zeroed from one that the parent has: it
            // is noted before they are there.
            self.persist_zeros(extent, PersistFor::Operation(op, purpose));
        } else {
            self.issue(op, purpose, None);
        }
        1
    }

    /// A device operation on an extent's data is over.
    pub(crate) fn data_done<M: Memory>(
        &mut self,
        op: DiskOp,
        request: u32,
        extent: u32,
        (version, tries): (u32, u8),
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        if self.state != PoolState::Online {
            self.unpin(extent);
            self.part_done(request, IoStatus::MediaError, mem);
            return;
        }
        let mut status = match result {
            Ok(()) => IoStatus::Ok,
            Err(DiskError::NoSpace) => IoStatus::NoSpace,
            Err(DiskError::Io) => IoStatus::MediaError,
        };
        let start = extent_offset(&self.superblock.segments, extent);
        let block = |offset: ByteOffset| {
            u32::try_from((offset.0 - start) / BLOCK).expect("an extent has 256 blocks")
        };
        let mutated = match op {
            DiskOp::Write { buf, .. } => buf,
            _ => BufSlice::EMPTY,
        };
        match op {
            DiskOp::Read { offset, buf } if status.is_ok() => {
                let first = block(offset);
                match self.verify(extent, first, buf, version, tries, mem) {
                    Verdict::Good => {}
                    Verdict::Bad if on(Mutant::BadDataReturned) => {}
                    Verdict::Bad => status = IoStatus::MediaError,
                    Verdict::Again => {
                        let part = Part {
                            request,
                            slot: self.requests.get(request).slot,
                            logical: self.extents.get(extent).link,
                            first,
                            blocks: buf.len() >> 12,
                            buf,
                            action: Action::Read,
                            tries: tries + 1,
                            next: NIL,
                        };
                        self.unpin(extent);
                        self.rerun(part, mem);
                        return;
                    }
                }
            }
            DiskOp::Write { offset, .. } | DiskOp::Zero { offset, .. } => {
                let space = status == IoStatus::NoSpace;
                let first = block(offset);
                self.end_mutation(extent, first, space, mem);
                let blocks = match op {
                    DiskOp::Zero { len, .. } => u32::try_from(len / BLOCK).expect("256 blocks"),
                    _ => mutated.len() >> 12,
                };
                if status.is_ok() && self.redeem(extent, first, blocks, request) {
                    self.unpin(extent);
                    return;
                }
                if matches!(op, DiskOp::Zero { punch: true, .. }) && status.is_ok() {
                    self.free_if_empty(extent);
                }
            }
            DiskOp::Read { .. } | DiskOp::Flush => {}
        }
        self.unpin(extent);
        self.part_done(request, status, mem);
    }

    /// Runs a part that is counted as outstanding already.
    pub(crate) fn rerun<M: Memory>(&mut self, part: Part, mem: &mut M) {
        match self.run_part(part, mem) {
            Ok(0) => self.part_done(part.request, IoStatus::Ok, mem),
            Ok(parts) => self.requests.get_mut(part.request).outstanding += parts - 1,
            Err(status) => self.part_done(part.request, status, mem),
        }
    }

    /// Takes an extent out of its replica's map. Reads see zeros from here on; the request is answered
    /// when the record is durable; the extent is reused when its I/O has drained as well.
    fn start_free(&mut self, part: Part, extent: u32, layer: u16) {
        self.unmap(layer, part.logical);
        self.log_free(extent, part.request);
    }

    /// Gives an extent back whose last data was discarded, piece by piece.
    fn free_if_empty(&mut self, extent: u32) {
        let e = self.extents.get(extent);
        let (state, layer, logical) = (e.state, e.layer, e.link);
        let of = self.layer(layer);
        let owner = &self.slots[usize::from(of.owner)];
        let live = owner.is_live() && owner.layer == layer && !owner.frozen && of.copies == 0;
        if state == ExtentState::Allocated
            && live
            && !self.covered(layer, logical)
            && self.is_empty_and_quiet(extent)
        {
            self.unmap(layer, logical);
            self.log_free(extent, NIL);
        }
    }

    /// Logs that an extent, which no map has any more, is free.
    pub(crate) fn log_free(&mut self, extent: u32, request: u32) {
        let e = self.extents.get_mut(extent);
        assert_eq!(e.state, ExtentState::Allocated, "extent {extent} is mapped and not allocated");
        e.state = ExtentState::Freeing;
        self.journal.push(Owner::Free { extent, request });
    }

    pub(crate) fn wait_for_alloc(&mut self, alloc: u32, mut part: Part) {
        part.next = NIL;
        let id = self.parts.insert(part);
        let alloc = self.allocs.get_mut(alloc);
        if alloc.last == NIL {
            alloc.first = id;
        } else {
            self.parts.get_mut(alloc.last).next = id;
        }
        alloc.last = id;
    }

    /// Runs the parts that waited for an allocation, in the order in which they came.
    pub(crate) fn run_waiting<M: Memory>(&mut self, first: u32, mem: &mut M) {
        let mut at = first;
        while at != NIL {
            let part = self.parts.remove(at);
            at = part.next;
            self.rerun(part, mem);
        }
    }

    /// Fails the parts that waited for an allocation.
    pub(crate) fn fail_waiting<M: Memory>(&mut self, first: u32, status: IoStatus, mem: &mut M) {
        let mut at = first;
        while at != NIL {
            let part = self.parts.remove(at);
            at = part.next;
            self.part_done(part.request, status, mem);
        }
    }

    pub(crate) fn part_done<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let request = self.requests.get_mut(id);
        assert!(request.outstanding > 0, "a part completed twice");
        request.outstanding -= 1;
        if severity(status) > severity(request.status) {
            request.status = status;
        }
        if self.state != PoolState::Online {
            if request.outstanding == 0 {
                self.finish(id);
            }
            return;
        }
        let slot = &self.slots[usize::from(request.slot)];
        let deleted = !slot.is_live() && !slot.is_snapshot();
        if deleted && request.next < request.end {
            // The replica is going: what has begun ends, nothing more is begun.
            request.next = request.end;
            request.status = IoStatus::PathError;
        }
        self.advance(id, mem);
    }

    /// Answers a request.
    pub(crate) fn finish(&mut self, id: u32) {
        let request = self.requests.remove(id);
        assert_eq!(request.outstanding, 0, "a request is answered with parts in flight");
        if request.op == IoOp::Verify {
            self.verifier.note_done(request.tag, request.verified);
        }
        self.slots[usize::from(request.slot)].in_flight -= 1;
        self.sums.answered = self.sums.answered.saturating_add(1);
        self.done.push_back(Done { tag: request.tag, status: request.status, error: None });
    }

    /// Maps a logical extent to an allocation that is under way.
    pub(crate) fn map_pending(&mut self, layer: u16, logical: u32, alloc: u32) {
        self.layer_mut(layer).map_to(logical, PENDING | alloc);
    }
}

/// The window of a part's buffer for some of its blocks, counted from the extent's start.
fn window(part: &Part, first: u32, blocks: u32) -> BufSlice {
    part.buf.sub((first - part.first) << 12, blocks << 12)
}

/// Cuts the next part off a request: as far as its extent reaches.
fn next_part(id: u32, request: &mut Request, size: u64) -> Part {
    let logical = request.next / EXTENT_BLOCKS;
    let first = request.next % EXTENT_BLOCKS;
    let most = if request.op == IoOp::Verify { verify::MAX_BLOCKS } else { EXTENT_BLOCKS };
    let blocks = most.min(EXTENT_BLOCKS - first).min(request.end - request.next);
    // The last extent of a replica is whole even where the replica ends inside it.
    let whole = first == 0 && (blocks == EXTENT_BLOCKS || request.next + blocks == size);
    let action = match request.op {
        IoOp::Read => Action::Read,
        IoOp::Verify => Action::Verify,
        IoOp::Write { fua } => Action::Write { fua },
        IoOp::Discard | IoOp::WriteZeroes { unmap: true, .. } if whole => Action::Free,
        IoOp::Discard => Action::Zero { punch: true },
        IoOp::WriteZeroes { unmap, .. } => Action::Zero { punch: unmap },
        IoOp::Flush | IoOp::Snapshot(_) => unreachable!("it has no parts"),
    };
    let fit = "an extent has 256 blocks, and a replica at most 2^31 extents";
    let blocks = u32::try_from(blocks).expect(fit);
    let buf = if request.buf.is_empty() {
        BufSlice::EMPTY
    } else {
        let len = blocks << 12;
        let head = request.buf.sub(0, len);
        request.buf = request.buf.from(len);
        head
    };
    request.next += u64::from(blocks);
    Part {
        request: id,
        slot: request.slot,
        logical: u32::try_from(logical).expect(fit),
        first: u32::try_from(first).expect(fit),
        blocks,
        buf,
        action,
        tries: 0,
        next: NIL,
    }
}

/// Which of two statuses a request reports.
fn severity(status: IoStatus) -> u8 {
    match status {
        IoStatus::Ok => 0,
        IoStatus::PathError => 1,
        IoStatus::NoSpace => 2,
        _ => 3,
    }
}
