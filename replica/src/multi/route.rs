//! The data path over several devices: each part of a request goes to the device that holds its extent.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{BlockSize, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};

use super::{Member, MultiPool, PART};
use crate::disk::{EXTENT, MemberState};
use crate::pool::{PoolState, ReplicaSlot};

/// Parts of one request in flight: a discard of everything must not take all the memory.
const MAX_PARTS: u32 = 64;

#[derive(Debug)]
pub(super) struct Request {
    tag: u64,
    slot: u16,
    op: IoOp,
    /// The first block that is not yet a part of it, and the block after its last.
    next: u64,
    end: u64,
    /// The size of the replica when it came.
    blocks: u64,
    /// Its blocks in an extent.
    extent_blocks: u64,
    /// Blocks of a Verify that were read.
    verified: u32,
    /// What is left of the payload.
    buf: BufSlice,
    outstanding: u32,
    status: IoStatus,
    /// Its last step, a flush of every device that it needs, has begun.
    flushing: bool,
}

/// A piece of a request within one extent, or a flush of one device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    request: u32,
    pub(super) slot: u16,
    pub(super) logical: u32,
    member: usize,
    op: IoOp,
    range: LbaRange,
    buf: BufSlice,
    /// All of its extent, as far as the replica has it.
    whole: bool,
    /// Devices that had no room for it.
    tried: u64,
    /// Of a flush: the slot's changes when it began.
    changes: u64,
}

impl Part {
    pub(super) fn is_mutation(&self) -> bool {
        self.op.is_mutation()
    }

    pub(super) fn is_read(&self) -> bool {
        matches!(self.op, IoOp::Read | IoOp::Verify)
    }

    pub(super) fn is_on(&self, member: usize) -> bool {
        self.member == member
    }
}

impl MultiPool {
    pub(super) fn submit_parts<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        request: IoRequest,
        mem: &mut M,
    ) {
        let (blocks, block_size) = match self.admit(slot, &request) {
            Ok(found) => found,
            Err(status) => return self.answer(tag, status),
        };
        let id = self.requests.insert(Request {
            tag,
            slot: slot.0,
            op: request.op,
            next: request.range.start().0,
            end: request.range.end().0,
            blocks,
            extent_blocks: EXTENT >> block_size.shift(),
            verified: 0,
            buf: request.buf,
            outstanding: 0,
            status: IoStatus::Ok,
            flushing: false,
        });
        self.advance(id, mem);
    }

    /// The replica's size, where the request can be met, and that of its blocks.
    fn admit(&self, slot: ReplicaSlot, request: &IoRequest) -> Result<(u64, BlockSize), IoStatus> {
        if self.state != PoolState::Online {
            return Err(IoStatus::MediaError);
        }
        let reads = matches!(request.op, IoOp::Read | IoOp::Verify);
        let blocks = self
            .live_blocks(slot.0)
            .or_else(|| self.snapshot_blocks(slot.0).filter(|_| reads))
            .ok_or(IoStatus::PathError)?;
        let block_size = self.block_size(slot.0);
        if request.op == IoOp::Flush {
            return Ok((blocks, block_size));
        }
        if matches!(request.op, IoOp::Snapshot(_)) {
            return Err(IoStatus::Unsupported);
        }
        let range = request.range;
        LbaRange::within(range.start(), range.blocks(), blocks)
            .map_err(|_| IoStatus::OutOfRange)?;
        let payload = matches!(request.op, IoOp::Read | IoOp::Write { .. });
        if payload && u64::from(request.buf.len()) != block_size.bytes_of(range.blocks()) {
            return Err(IoStatus::InvalidField);
        }
        Ok((blocks, block_size))
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
            let (slot, next) = (request.slot, request.next / request.extent_blocks);
            let allocates = matches!(request.op, IoOp::Read | IoOp::Write { .. });
            if !allocates && !self.lost.is_lost(slot) {
                let end = self.present().map(|m| m.pool.mapped_end(slot)).max().unwrap_or(0);
                if next >= u64::from(end) {
                    // Nothing was ever written from here on.
                    let request = self.requests.get_mut(id);
                    request.next = request.end;
                    break;
                }
            }
            let part = next_part(id, self.requests.get_mut(id));
            match self.run_part(part, mem) {
                Ok(waits) => self.requests.get_mut(id).outstanding += u32::from(waits),
                Err(status) => {
                    let request = self.requests.get_mut(id);
                    request.status = worse(request.status, status);
                    request.next = request.end;
                }
            }
        }
        let request = self.requests.get(id);
        if request.next < request.end || request.outstanding > 0 {
            return;
        }
        let flush = match request.op {
            _ if request.flushing => false,
            IoOp::Flush => true,
            IoOp::WriteZeroes { fua, .. } => fua && request.status.is_ok(),
            _ => false,
        };
        if flush {
            self.flush_devices(id, mem);
        }
        let request = self.requests.get(id);
        if request.outstanding == 0 {
            let request = self.requests.remove(id);
            if request.op == IoOp::Verify {
                self.verified.push((request.tag, request.verified));
            }
            self.answer(request.tag, request.status);
        }
    }

    /// Flushes every device on which the replica may have changed.
    fn flush_devices<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let request = self.requests.get_mut(id);
        request.flushing = true;
        let slot = request.slot;
        let changes = self.changes[usize::from(slot)];
        for member in 0..self.members.len() {
            if self.unflushed[usize::from(slot)] >> member & 1 == 0 {
                continue;
            }
            if self.members[member].is_none() {
                self.unflushed[usize::from(slot)] &= !(1 << member);
                continue;
            }
            if !self.member(member).is_online() {
                // What was not flushed is lost with the device. Whoever asks hears of it now; what is written
                // from here on is on others, and can be flushed.
                self.unflushed[usize::from(slot)] &= !(1 << member);
                let request = self.requests.get_mut(id);
                request.status = worse(request.status, IoStatus::MediaError);
                continue;
            }
            let part = Part {
                request: id,
                slot,
                logical: 0,
                member,
                op: IoOp::Flush,
                range: LbaRange::default(),
                buf: BufSlice::EMPTY,
                whole: false,
                tried: 0,
                changes,
            };
            self.requests.get_mut(id).outstanding += 1;
            self.send(part, mem);
        }
    }

    /// Starts a part. Returns whether it is now in flight or waits; otherwise it is done.
    fn run_part<M: Memory>(&mut self, mut part: Part, mem: &mut M) -> Result<bool, IoStatus> {
        let mut lost = self.may_be_lost(part.slot, part.logical);
        let holder = match self.copy_of(part.slot, part.logical) {
            Some(at) if part.is_mutation() && self.is_closed(at, part.slot, part.logical) => {
                self.copies[at].park(part);
                return Ok(true);
            }
            Some(at) => Some(self.copies[at].serves()),
            None => self.holder(part.slot, part.logical),
        };
        // All of an extent that was on a device which is durably left behind is written anew, on another.
        let writes = matches!(part.op, IoOp::Write { .. } | IoOp::WriteZeroes { .. });
        let anew = holder.filter(|&at| {
            let holder = self.member(at);
            writes && part.whole && holder.excluded && !holder.is_online()
        });
        lost |= anew.is_some();
        if let Some(member) = holder.filter(|_| anew.is_none()) {
            if part.is_mutation() && self.adds_to_drain(member, &part) {
                if let Some(at) = self.move_first(member, part.slot, part.logical) {
                    self.copies[at].park(part);
                    return Ok(true);
                }
                // What a thick replica needs is kept for it.
                let thick = self.member(member).pool.thick(part.slot).is_some();
                if !thick && !self.has_room_to_drain() {
                    return Err(IoStatus::NoSpace);
                }
            }
            part.member = member;
            // What is mapped nowhere would read as an error.
            if (lost && part.whole) || self.keeps_on_drain(member, &part) {
                part.op = kept(part.op);
            }
            self.send(part, mem);
            return Ok(true);
        }
        match part.op {
            IoOp::Read | IoOp::Verify if lost => Err(IoStatus::MediaError),
            IoOp::Verify => Ok(false),
            IoOp::Read => {
                mem.bytes_mut(part.buf).fill(0);
                Ok(false)
            }
            // Nothing is promised of what is discarded here but that it is no other data.
            IoOp::Discard | IoOp::Flush | IoOp::Snapshot(_) => Ok(false),
            IoOp::Write { .. } | IoOp::WriteZeroes { .. } if lost && !part.whole => {
                Err(IoStatus::MediaError)
            }
            IoOp::Write { .. } => {
                let of = Some(part.slot);
                part.member = self.choose(of, part.tried).ok_or(IoStatus::NoSpace)?;
                self.send(part, mem);
                Ok(true)
            }
            IoOp::WriteZeroes { .. } if lost => {
                // Its zeros must be told from what was lost, so they take an extent.
                let of = Some(part.slot);
                part.member = self.choose(of, part.tried).ok_or(IoStatus::NoSpace)?;
                self.note_change(&part);
                let id = self.parts.insert(part);
                let pool = &mut self.member_mut(part.member).pool;
                pool.import(PART | u64::from(id), part.slot, part.logical, mem);
                Ok(true)
            }
            IoOp::WriteZeroes { .. } => Ok(false),
        }
    }

    /// Whether a logical extent that is mapped nowhere may have been on a device that is not here.
    pub(super) fn may_be_lost(&self, slot: u16, logical: u32) -> bool {
        if !self.lost.is_lost(slot) || on(Mutant::LostReadsAsZeros) {
            return false;
        }
        let losses = self.membership.losses();
        // Grown by some devices and not by others, it has the size that it had.
        let whole = |m: &Member| {
            let whole = m.pool.page(slot).whole;
            whole.from != 0 && whole.losses == losses && logical >= whole.from
        };
        !self.serving().all(|(_, member)| whole(member))
    }

    /// Whether a change needs a new extent on a device that is being removed.
    fn adds_to_drain(&self, member: usize, part: &Part) -> bool {
        let on = self.member(member);
        on.role == MemberState::Draining
            && on.is_online()
            && !on.pool.has_own(part.slot, part.logical)
    }

    /// Whether a change is of what a thick replica has on a device that is being removed: given back, there
    /// would be nothing for it when it is written again, for the room that it was to move to is anybody's.
    fn keeps_on_drain(&self, member: usize, part: &Part) -> bool {
        let on = self.member(member);
        on.role == MemberState::Draining
            && on.is_online()
            && on.pool.thick(part.slot).is_some()
            && on.pool.has_own(part.slot, part.logical)
    }

    fn note_change(&mut self, part: &Part) {
        self.unflushed[usize::from(part.slot)] |= 1 << part.member;
        self.changes[usize::from(part.slot)] += 1;
    }

    fn send<M: Memory>(&mut self, part: Part, mem: &mut M) {
        if part.is_mutation() {
            self.note_change(&part);
        }
        let id = self.parts.insert(part);
        let request = IoRequest { op: part.op, range: part.range, buf: part.buf };
        let pool = &mut self.member_mut(part.member).pool;
        pool.submit(PART | u64::from(id), ReplicaSlot(part.slot), request, mem);
    }

    /// The device that holds a logical extent. Where one that failed and another both say that they do,
    /// the extent had just been copied off the first.
    pub(super) fn holder(&self, slot: u16, logical: u32) -> Option<usize> {
        let mut failed = None;
        for (at, member) in self.members.iter().enumerate() {
            if let Some(member) = member
                && member.maps(slot, logical)
            {
                if member.is_online() {
                    return Some(at);
                }
                failed = Some(at);
            }
        }
        failed
    }

    /// The device for a new extent, of a replica or of nobody in particular: the one with the most space that
    /// is free for it, not one of `tried`.
    pub(super) fn choose(&self, of: Option<u16>, tried: u64) -> Option<usize> {
        let mut best: Option<(usize, (u64, bool))> = None;
        for (at, member) in self.serving() {
            if tried >> at & 1 != 0 || member.role != MemberState::Live {
                continue;
            }
            let pool = &member.pool;
            let free = of.map_or_else(|| pool.extents_unreserved(), |slot| pool.extents_for(slot));
            let key = (free, pool.extents_are_returning());
            if best.is_none_or(|(_, b)| b < key) {
                best = Some((at, key));
            }
        }
        best.map(|(at, _)| at)
    }

    pub(super) fn part_done<M: Memory>(
        &mut self,
        id: u32,
        status: IoStatus,
        tag: u64,
        mem: &mut M,
    ) {
        let mut part = self.parts.remove(id);
        if part.op == IoOp::Verify {
            let blocks = self.member_mut(part.member).pool.take_verified(tag).unwrap_or(0);
            self.requests.get_mut(part.request).verified += blocks;
        }
        if part.op == IoOp::Flush {
            let slot = usize::from(part.slot);
            if status.is_ok() && self.changes[slot] == part.changes {
                self.unflushed[slot] &= !(1 << part.member);
            }
        } else if part.is_mutation() {
            self.note_change(&part);
            let slot = ReplicaSlot(part.slot);
            if status == IoStatus::NoSpace
                && !self.member(part.member).pool.maps(slot, part.logical)
            {
                // It got no extent there; another device may have room, or give it to a part that waited with
                // this one.
                part.tried |= 1 << part.member;
                let next = self.choose(Some(part.slot), part.tried);
                if self.holder(part.slot, part.logical).is_some()
                    || next.is_some_and(|m| self.has_room(m, part.slot))
                {
                    self.rerun(part, mem);
                    return;
                }
            }
        }
        self.part_over(part.request, status, mem);
    }

    fn has_room(&self, member: usize, slot: u16) -> bool {
        let pool = &self.member(member).pool;
        pool.extents_for(slot) > 0 || pool.extents_are_returning()
    }

    /// Runs a part that is counted as outstanding already.
    pub(super) fn rerun<M: Memory>(&mut self, part: Part, mem: &mut M) {
        match self.run_part(part, mem) {
            Ok(true) => {}
            Ok(false) => self.part_over(part.request, IoStatus::Ok, mem),
            Err(status) => self.part_over(part.request, status, mem),
        }
    }

    fn part_over<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let slot = self.requests.get(id).slot;
        let gone = self.live_blocks(slot).is_none() && self.snapshot_blocks(slot).is_none();
        let request = self.requests.get_mut(id);
        assert!(request.outstanding > 0, "a part completed twice");
        request.outstanding -= 1;
        request.status = worse(request.status, status);
        if gone && request.next < request.end {
            // The replica is going: what has begun ends, nothing more is begun.
            request.next = request.end;
            request.status = worse(request.status, IoStatus::PathError);
        }
        self.advance(id, mem);
    }

    /// Whether a request of a replica is not answered, those that wait for a snapshot left aside.
    pub(super) fn has_requests(&self, slot: u16) -> bool {
        self.requests.iter().any(|(_, request)| request.slot == slot)
    }

    /// The size of a replica's blocks.
    pub(super) fn block_size(&self, slot: u16) -> BlockSize {
        self.lead().map_or(BlockSize::B4096, |lead| lead.page(slot).block_size)
    }
}

/// The same without giving the extent back.
fn kept(op: IoOp) -> IoOp {
    match op {
        IoOp::Discard => IoOp::WriteZeroes { fua: false, unmap: false },
        IoOp::WriteZeroes { fua, .. } => IoOp::WriteZeroes { fua, unmap: false },
        op => op,
    }
}

/// Cuts the next part off a request: as far as its extent reaches.
fn next_part(id: u32, request: &mut Request) -> Part {
    let logical = request.next / request.extent_blocks;
    let first = request.next % request.extent_blocks;
    let blocks = (request.extent_blocks - first).min(request.end - request.next);
    let fit = "an extent has 1 MiB, and a replica at most 2^31 extents";
    let buf = if request.buf.is_empty() {
        BufSlice::EMPTY
    } else {
        let len = u32::try_from(blocks * (EXTENT / request.extent_blocks)).expect(fit);
        let head = request.buf.sub(0, len);
        request.buf = request.buf.from(len);
        head
    };
    let range = LbaRange::new(Lba(request.next), blocks).expect("inside the replica");
    request.next += blocks;
    let op = match request.op {
        // The request ends with a flush of its own.
        IoOp::WriteZeroes { unmap, .. } => IoOp::WriteZeroes { fua: false, unmap },
        op => op,
    };
    Part {
        request: id,
        slot: request.slot,
        logical: u32::try_from(logical).expect(fit),
        member: 0,
        op,
        range,
        buf,
        whole: first == 0 && (blocks == request.extent_blocks || request.next == request.blocks),
        tried: 0,
        changes: 0,
    }
}

/// Which of two statuses a request reports.
fn worse(a: IoStatus, b: IoStatus) -> IoStatus {
    let severity = |status| match status {
        IoStatus::Ok => 0,
        IoStatus::PathError => 1,
        IoStatus::NoSpace => 2,
        _ => 3,
    };
    if severity(b) > severity(a) { b } else { a }
}
