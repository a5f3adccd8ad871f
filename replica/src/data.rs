//! The data path: requests, and the parts that they fall into at the bounds of extents.

pub(crate) mod verify;

use cairn_block::{BufSlice, ByteOffset, IoOp, IoRequest, IoStatus, LbaRange, Memory};

use crate::DiskError;
use crate::disk::{BLOCK, EXTENT_BLOCKS};
use crate::extents::{ExtentState, NIL, extent_offset};
use crate::flush::Waiter;
use crate::journal::Owner;
use crate::pool::{
    DiskOp, Done, HOLE, Mapping, PENDING, Pool, PoolState, Purpose, ReplicaSlot, Slot,
};
use crate::sums::{Ready, Verdict};

/// Parts of one request in flight: a discard of everything must not take all the memory.
const MAX_PARTS: u32 = 64;

#[derive(Debug)]
pub(crate) struct Request {
    tag: u64,
    slot: u16,
    op: IoOp,
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
enum Action {
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
    slot: u16,
    logical: u32,
    /// Blocks from the extent's start.
    first: u32,
    blocks: u32,
    buf: BufSlice,
    action: Action,
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
        if let Err(status) = self.admit(slot, &request) {
            self.done.push_back(Done { tag, status, error: None });
            return;
        }
        let request = self.requests.insert(Request {
            tag,
            slot: slot.0,
            op: request.op,
            next: request.range.start().0,
            end: request.range.end().0,
            buf: request.buf,
            outstanding: 0,
            status: IoStatus::Ok,
            flushing: false,
            verified: 0,
        });
        self.advance(request, mem);
        self.pump(mem);
    }

    fn admit(&self, slot: ReplicaSlot, request: &IoRequest) -> Result<(), IoStatus> {
        if self.state != PoolState::Online {
            return Err(IoStatus::MediaError);
        }
        let replica = self
            .slots
            .get(usize::from(slot.0))
            .filter(|s| s.is_live())
            .ok_or(IoStatus::PathError)?;
        if request.op == IoOp::Flush {
            return Ok(());
        }
        let range = request.range;
        LbaRange::within(range.start(), range.blocks(), replica.page.blocks)
            .map_err(|_| IoStatus::OutOfRange)?;
        let payload = matches!(request.op, IoOp::Read | IoOp::Write { .. });
        if payload && u64::from(request.buf.len()) != range.blocks() * BLOCK {
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
            let slot = &self.slots[usize::from(request.slot)];
            if !matches!(request.op, IoOp::Read | IoOp::Write { .. })
                && request.next / EXTENT_BLOCKS >= slot.map.len() as u64
            {
                // Nothing was ever written from here on.
                request.next = request.end;
                break;
            }
            let part = next_part(id, request, slot);
            match self.run_part(part, mem) {
                Ok(waits) => self.requests.get_mut(id).outstanding += u32::from(waits),
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
        let flush = match request.op {
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

    /// Starts a part. Returns whether it is now in flight or waits; otherwise it is done.
    fn run_part<M: Memory>(&mut self, part: Part, mem: &mut M) -> Result<bool, IoStatus> {
        let slot = &self.slots[usize::from(part.slot)];
        Ok(match (slot.mapping(part.logical), part.action) {
            (Mapping::Hole, Action::Write { .. }) if !slot.is_live() => {
                return Err(IoStatus::PathError);
            }
            (Mapping::Hole | Mapping::Pending(_), Action::Read) => {
                mem.bytes_mut(part.buf).fill(0);
                false
            }
            (Mapping::Hole, Action::Zero { .. } | Action::Free | Action::Verify)
            | (Mapping::Pending(_), Action::Verify) => false,
            (Mapping::Hole, Action::Write { .. }) => {
                let alloc = self.start_alloc(part.slot, part.logical);
                self.wait_for_alloc(alloc, part);
                true
            }
            (Mapping::Pending(alloc), _) => {
                self.wait_for_alloc(alloc, part);
                true
            }
            (Mapping::Extent(extent), Action::Free) => {
                self.start_free(part, extent);
                true
            }
            (Mapping::Extent(extent), action) => {
                let sum =
                    match self.prepare(extent, !matches!(action, Action::Read | Action::Verify)) {
                        Ready::Now(sum) => sum,
                        Ready::Wait(sum) => {
                            self.wait_for_sum(sum, part);
                            return Ok(true);
                        }
                    };
                if action == Action::Verify {
                    if !self.reads_zeros(sum, part.first, part.blocks) {
                        let version = self.sum_version(sum);
                        self.start_verify(part, extent, version, mem);
                        return Ok(true);
                    }
                    return Ok(false);
                }
                if action == Action::Read {
                    if self.reads_zeros(sum, part.first, part.blocks) {
                        mem.bytes_mut(part.buf).fill(0);
                        return Ok(false);
                    }
                } else {
                    let data = matches!(action, Action::Write { .. }).then_some(part.buf);
                    if !self.begin_mutation(sum, part.first, part.blocks, data, mem) {
                        self.hold_conflict(part);
                        return Ok(true);
                    }
                }
                let version = self.sum_version(sum);
                let start = extent_offset(&self.superblock.segments, extent);
                let offset = ByteOffset(start + u64::from(part.first) * BLOCK);
                let op = match action {
                    Action::Read => DiskOp::Read { offset, buf: part.buf },
                    Action::Write { fua } => DiskOp::Write { offset, buf: part.buf, fua },
                    Action::Zero { punch } => {
                        DiskOp::Zero { offset, len: u64::from(part.blocks) * BLOCK, punch }
                    }
                    Action::Free | Action::Verify => unreachable!("handled above"),
                };
                let purpose =
                    Purpose::Data { request: part.request, extent, version, tries: part.tries };
                self.issue(op, purpose, None);
                true
            }
        })
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
        match op {
            DiskOp::Read { offset, buf } if status.is_ok() => {
                let first = block(offset);
                match self.verify(extent, first, buf, version, tries, mem) {
                    Verdict::Good => {}
                    Verdict::Bad => status = IoStatus::MediaError,
                    Verdict::Again => {
                        let e = *self.extents.get(extent);
                        let part = Part {
                            request,
                            slot: e.slot,
                            logical: e.link,
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
                self.end_mutation(extent, block(offset), space, mem);
            }
            DiskOp::Read { .. } | DiskOp::Flush => {}
        }
        self.unpin(extent);
        self.part_done(request, status, mem);
    }

    /// Runs a part that is counted as outstanding already.
    pub(crate) fn rerun<M: Memory>(&mut self, part: Part, mem: &mut M) {
        match self.run_part(part, mem) {
            Ok(true) => {}
            Ok(false) => self.part_done(part.request, IoStatus::Ok, mem),
            Err(status) => self.part_done(part.request, status, mem),
        }
    }

    /// Takes an extent out of its replica's map. Reads see zeros from here on; the request is answered
    /// when the record is durable; the extent is reused when its I/O has drained as well.
    fn start_free(&mut self, part: Part, extent: u32) {
        let slot = &mut self.slots[usize::from(part.slot)];
        slot.map_to(part.logical, HOLE);
        slot.allocated -= 1;
        slot.returning += 1;
        self.extents.allocated -= 1;
        self.extents.returning += 1;
        let e = self.extents.get_mut(extent);
        assert_eq!(e.state, ExtentState::Allocated, "extent {extent} is mapped and not allocated");
        e.state = ExtentState::Freeing;
        self.journal.push(Owner::Free { extent, request: part.request });
    }

    fn wait_for_alloc(&mut self, alloc: u32, mut part: Part) {
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
        let deleted = !self.slots[usize::from(request.slot)].is_live();
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
        self.done.push_back(Done { tag: request.tag, status: request.status, error: None });
    }

    /// Maps a logical extent to an allocation that is under way.
    pub(crate) fn map_pending(&mut self, slot: u16, logical: u32, alloc: u32) {
        self.slots[usize::from(slot)].map_to(logical, PENDING | alloc);
    }
}

/// Cuts the next part off a request: as far as its extent reaches.
fn next_part(id: u32, request: &mut Request, slot: &Slot) -> Part {
    let logical = request.next / EXTENT_BLOCKS;
    let first = request.next % EXTENT_BLOCKS;
    let most = if request.op == IoOp::Verify { verify::MAX_BLOCKS } else { EXTENT_BLOCKS };
    let blocks = most.min(EXTENT_BLOCKS - first).min(request.end - request.next);
    // The last extent of a replica is whole even where the replica ends inside it.
    let whole =
        first == 0 && (blocks == EXTENT_BLOCKS || request.next + blocks == slot.page.blocks);
    let action = match request.op {
        IoOp::Read => Action::Read,
        IoOp::Verify => Action::Verify,
        IoOp::Write { fua } => Action::Write { fua },
        IoOp::Discard | IoOp::WriteZeroes { unmap: true, .. } if whole => Action::Free,
        IoOp::Discard => Action::Zero { punch: true },
        IoOp::WriteZeroes { unmap, .. } => Action::Zero { punch: unmap },
        IoOp::Flush => unreachable!("a flush has no parts"),
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
