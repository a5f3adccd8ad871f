//! Moving extents off a device that is being removed, while I/O goes on.
//!
//! An extent that moves is closed to changes: they wait. An extent is allocated for it on another device,
//! marked as unfinished on stable storage; the data is copied, flushed, and only then the mark is taken
//! back. Then the old extent is freed, and when that is durable the changes go on, to the new one. So at
//! every moment the old extent is whole or the new one is, and where a crash leaves both, they are equal:
//! open frees the one on the device that is being removed.

use std::collections::BTreeSet;

use cairn_block::{BlockSize, Buf, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};

use super::control::{Change, Kind, Then};
use super::route::Part;
use super::{COPY, MultiPool};
use crate::disk::{BLOCK_LEN, EXTENT, MemberState};
use crate::pool::{PoolState, ReplicaSlot};

/// Extents that move together.
const MAX_COPIES: usize = 4;
/// Bytes that are read at a time.
const CHUNK: u64 = 256 << 10;

/// Where the removal of a device stands.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// That it is being removed is durable.
    begun: bool,
    /// The next logical extent to look at.
    slot: u16,
    logical: u32,
    /// Extents that could not be read.
    bad: BTreeSet<(u16, u32)>,
    /// Free extents of the other devices when there was no room for one.
    stalled: Option<u64>,
}

impl Drain {
    pub(super) fn begin(&mut self) {
        *self = Self { begun: true, ..Self::default() };
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// For the changes that had begun.
    Writers,
    /// An extent is being allocated on the target.
    Import,
    /// For memory.
    Memory,
    Read,
    Write,
    Flush,
    /// The mark that the copy is unfinished is being taken back.
    Arrive,
    /// For the reads that the source has begun: to them a freed extent is zeros.
    Readers,
    /// The source's extent is being freed.
    Free,
    /// The target's extent is being freed: the copy was given up.
    Drop,
}

/// An extent on its way from one device to another.
#[derive(Debug)]
pub(super) struct Copy {
    id: u32,
    source: usize,
    target: usize,
    slot: u16,
    logical: u32,
    /// Blocks of the extent that the replica has.
    blocks: u64,
    /// The size of the replica's blocks.
    block_size: BlockSize,
    stage: Stage,
    writers: u32,
    /// Changes that wait.
    parked: Vec<Part>,
    buf: Option<Buf>,
    /// The first block that is not copied.
    next: u64,
    outstanding: u32,
    failed: bool,
}

impl Copy {
    pub(super) fn park(&mut self, part: Part) {
        self.parked.push(part);
    }

    /// The device that reads go to.
    pub(super) fn serves(&self) -> usize {
        if matches!(self.stage, Stage::Readers | Stage::Free) { self.target } else { self.source }
    }

    pub(super) fn is_on(&self, member: usize) -> bool {
        self.source == member || self.target == member
    }

    fn tag(&self) -> u64 {
        COPY | u64::from(self.id)
    }

    fn range(&self, first: u64, blocks: u64) -> LbaRange {
        let start = u64::from(self.logical) * (EXTENT >> self.block_size.shift()) + first;
        LbaRange::new(Lba(start), blocks).expect("inside the replica")
    }

    fn chunk(&self) -> u64 {
        (CHUNK >> self.block_size.shift()).min(self.blocks - self.next)
    }
}

impl MultiPool {
    /// The copy that is being made of a logical extent.
    pub(super) fn copy_of(&self, slot: u16, logical: u32) -> Option<usize> {
        self.copies.iter().position(|c| c.slot == slot && c.logical == logical)
    }

    /// Whether there is a device for new extents.
    pub(super) fn takes_extents(&self) -> bool {
        self.serving().any(|(_, m)| m.role == MemberState::Live)
    }

    /// Whether a device is being removed and could be further.
    pub(super) fn drains(&self) -> bool {
        (0..self.members.len()).any(|at| {
            self.members[at]
                .as_ref()
                .is_some_and(|m| m.role == MemberState::Draining && m.is_online())
                && self.why_stuck(at).is_none()
        })
    }

    /// Why the removal of a device does not go on.
    pub(super) fn why_stuck(&self, at: usize) -> Option<String> {
        let drain = &self.member(at).drain;
        if drain.stalled == Some(self.room()) {
            return Some("the other devices are full: add one, or delete replicas".to_owned());
        }
        let bad = drain.bad.len();
        (bad > 0 && self.member(at).pool.extents_left() == bad as u64).then(|| {
            format!(
                "{bad} extents cannot be read whole: repair or delete the replicas, then remove the \
                 device once more"
            )
        })
    }

    fn room(&self) -> u64 {
        self.serving()
            .filter(|(_, m)| m.role == MemberState::Live)
            .map(|(_, m)| m.pool.extents_free())
            .sum()
    }

    /// A change of an extent is over.
    pub(super) fn writer_done(&mut self, slot: u16, logical: u32) {
        if let Some(at) = self.copy_of(slot, logical) {
            let copy = &mut self.copies[at];
            copy.writers = copy.writers.saturating_sub(1);
        }
    }

    /// Takes up a copy whose data a crash left on both devices.
    pub(super) fn resume_copy(
        &mut self,
        source: usize,
        target: usize,
        slot: u16,
        logical: u32,
        blocks: u64,
    ) {
        let mut copy = self.copy(source, target, slot, logical, blocks);
        copy.stage = Stage::Readers;
        self.copies.push(copy);
    }

    fn copy(&mut self, source: usize, target: usize, slot: u16, logical: u32, blocks: u64) -> Copy {
        self.next_copy = self.next_copy.wrapping_add(1);
        let block_size = self.block_size(slot);
        let extent_blocks = EXTENT >> block_size.shift();
        Copy {
            id: self.next_copy,
            source,
            target,
            slot,
            logical,
            blocks: (blocks - u64::from(logical) * extent_blocks).min(extent_blocks),
            block_size,
            stage: Stage::Writers,
            writers: 0,
            parked: Vec::new(),
            buf: None,
            next: 0,
            outstanding: 0,
            failed: false,
        }
    }

    /// The next logical extent that is to leave a device. What reads through to it, or what it reads
    /// through to, would have to go with it: so there are no layers while a device is being removed.
    fn next_to_move(&mut self, source: usize) -> Option<(u16, u32)> {
        let (mut slot, mut logical) = {
            let drain = &self.member(source).drain;
            (drain.slot, drain.logical)
        };
        let mut found = None;
        while slot < self.slots && found.is_none() {
            let pool = &self.member(source).pool;
            let end = if self.live_blocks(slot).is_some() { pool.mapped_end(slot) } else { 0 };
            while logical < end && found.is_none() {
                if pool.maps(ReplicaSlot(slot), logical)
                    && self.copy_of(slot, logical).is_none()
                    && !self.member(source).drain.bad.contains(&(slot, logical))
                {
                    found = Some((slot, logical));
                }
                logical += 1;
            }
            if found.is_none() {
                (slot, logical) = (slot + 1, 0);
            }
        }
        let drain = &mut self.member_mut(source).drain;
        (drain.slot, drain.logical) = (slot, logical);
        found
    }

    /// Moves copies on, starts more, and lets devices go that hold nothing any more.
    pub(super) fn pump_copies<M: Memory>(&mut self, mem: &mut M) {
        self.step_copies(mem);
        if self.state != PoolState::Online || self.wants_quiet() || self.is_excluding() {
            return;
        }
        for source in 0..self.members.len() {
            let draining = self.members[source].as_ref().is_some_and(|m| {
                m.role == MemberState::Draining && m.is_serving() && m.drain.begun
            });
            // What was passed straight through is not known by extent.
            if draining && self.direct_io == 0 {
                self.drain(source, mem);
            }
        }
        self.step_copies(mem);
    }

    fn drain<M: Memory>(&mut self, source: usize, mem: &mut M) {
        while self.copies.len() < MAX_COPIES {
            if self.member(source).drain.stalled == Some(self.room()) {
                return;
            }
            let target = self.choose(1 << source).filter(|&at| {
                let member = self.member(at);
                member.role == MemberState::Live && member.pool.extents_free() > 0
            });
            let Some(target) = target else {
                if self.member(source).pool.extents_left() > 0 {
                    self.member_mut(source).drain.stalled = Some(self.room());
                    return;
                }
                break;
            };
            let Some((slot, logical)) = self.next_to_move(source) else { break };
            let Some(blocks) = self.live_blocks(slot) else { continue };
            let mut copy = self.copy(source, target, slot, logical, blocks);
            copy.writers = self.writers(slot, logical);
            self.copies.push(copy);
            self.step_copies(mem);
        }
        let member = self.member(source);
        if !self.copies.is_empty() {
            return;
        }
        if member.pool.extents_left() == 0 && member.pool.is_idle() && self.takes_extents() {
            let change = Change::Set(member.id, MemberState::Removed);
            self.member_mut(source).drain.begun = false;
            self.push_job_first(Kind::members(change, Then::Left(source)));
            self.pump_jobs(mem);
        } else if member.pool.extents_left() > member.drain.bad.len() as u64 {
            // What was passed over may be ready now.
            let drain = &mut self.member_mut(source).drain;
            (drain.slot, drain.logical) = (0, 0);
        }
    }

    fn step_copies<M: Memory>(&mut self, mem: &mut M) {
        for at in (0..self.copies.len()).rev() {
            let Some(copy) = self.copies.get(at) else { continue };
            let (source, target) = (copy.source, copy.target);
            match copy.stage {
                Stage::Writers if copy.writers == 0 => {
                    let (slot, logical, tag) = (copy.slot, copy.logical, copy.tag());
                    if !self.member(source).pool.maps(ReplicaSlot(slot), logical)
                        || !self.member(source).is_online()
                    {
                        self.end_copy(at, mem);
                        continue;
                    }
                    self.copies[at].stage = Stage::Import;
                    self.member_mut(target).pool.import(tag, slot, logical, true, mem);
                }
                Stage::Memory => self.read_chunk(at, mem),
                Stage::Readers if self.readers(at) == 0 => self.free_source(at, mem),
                _ => {}
            }
        }
    }

    /// Reads of the extent that the source has begun.
    fn readers(&self, at: usize) -> usize {
        let copy = &self.copies[at];
        let here = |p: &Part| {
            p.slot == copy.slot && p.logical == copy.logical && p.is_on(copy.source) && p.is_read()
        };
        self.parts.iter().filter(|(_, p)| here(p)).count()
    }

    fn read_chunk<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        let chunk = copy.chunk();
        let len = u32::try_from(copy.block_size.bytes_of(chunk)).expect("a chunk is 256 KiB");
        if copy.buf.is_none() {
            copy.buf = mem.alloc(len);
        }
        let Some(buf) = &copy.buf else { return };
        copy.stage = Stage::Read;
        let request = IoRequest {
            op: IoOp::Read,
            range: copy.range(copy.next, chunk),
            buf: buf.slice().sub(0, len),
        };
        let (source, slot, tag) = (copy.source, ReplicaSlot(copy.slot), copy.tag());
        self.member_mut(source).pool.submit(tag, slot, request, mem);
    }

    /// Writes what was read, less the blocks of zeros.
    fn write_chunk<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        let slice = copy.buf.as_ref().expect("the chunk was read into it").slice();
        let chunk = copy.chunk();
        let mut requests = Vec::new();
        let mut run: Option<(u64, u64)> = None;
        // In whole blocks of the pool, of which the replica's last may be a part.
        let each = BLOCK_LEN as u64 >> copy.block_size.shift();
        let step = usize::try_from(each).expect("1 or 8");
        let bytes = copy.block_size.bytes_of(chunk);
        let bytes = usize::try_from(bytes).expect("a chunk is 256 KiB");
        for (i, block) in (0..chunk).step_by(step).zip(mem.bytes(slice)[..bytes].chunks(BLOCK_LEN))
        {
            let zero = block.iter().all(|&b| b == 0);
            let here = each.min(chunk - i);
            match (&mut run, zero) {
                (Some((_, blocks)), false) => *blocks += here,
                (None, false) => run = Some((i, here)),
                (_, true) => requests.extend(run.take()),
            }
        }
        requests.extend(run);
        copy.stage = Stage::Write;
        copy.outstanding = u32::try_from(requests.len()).expect("at most 64 runs");
        let (target, slot, tag) = (copy.target, ReplicaSlot(copy.slot), copy.tag());
        let next = copy.next;
        if requests.is_empty() {
            return self.chunk_written(at, mem);
        }
        for (first, blocks) in requests {
            let size = self.copies[at].block_size;
            let byte =
                |blocks: u64| u32::try_from(size.bytes_of(blocks)).expect("a chunk is 256 KiB");
            let request = IoRequest {
                op: IoOp::Write { fua: false },
                range: self.copies[at].range(next + first, blocks),
                buf: slice.sub(byte(first), byte(blocks)),
            };
            self.member_mut(target).pool.submit(tag, slot, request, mem);
        }
    }

    fn chunk_written<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        if copy.failed {
            return self.drop_target(at, mem);
        }
        copy.next += copy.chunk();
        if copy.next < copy.blocks {
            return self.read_chunk(at, mem);
        }
        copy.stage = Stage::Flush;
        let (target, slot, tag) = (copy.target, ReplicaSlot(copy.slot), copy.tag());
        let request = IoRequest {
            op: IoOp::Flush,
            range: LbaRange::default(),
            buf: cairn_block::BufSlice::EMPTY,
        };
        self.member_mut(target).pool.submit(tag, slot, request, mem);
    }

    fn free_source<M: Memory>(&mut self, at: usize, mem: &mut M) {
        self.copies[at].stage = Stage::Free;
        self.discard(at, self.copies[at].source, mem);
    }

    fn drop_target<M: Memory>(&mut self, at: usize, mem: &mut M) {
        self.copies[at].stage = Stage::Drop;
        self.discard(at, self.copies[at].target, mem);
    }

    fn discard<M: Memory>(&mut self, at: usize, member: usize, mem: &mut M) {
        let copy = &mut self.copies[at];
        copy.outstanding = 1;
        let (slot, logical, tag) = (ReplicaSlot(copy.slot), copy.logical, copy.tag());
        self.member_mut(member).pool.free_extent(tag, slot, logical, mem);
    }

    pub(super) fn copy_answered<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let Some(at) = self.copies.iter().position(|c| c.id == id) else { return };
        let ok = status.is_ok();
        let copy = &mut self.copies[at];
        let (source, target) = (copy.source, copy.target);
        match copy.stage {
            Stage::Import if ok => self.copies[at].stage = Stage::Memory,
            Stage::Import => {
                let room = self.room();
                self.member_mut(source).drain.stalled =
                    (status == IoStatus::NoSpace).then_some(room);
                self.end_copy(at, mem);
            }
            Stage::Read if ok => self.write_chunk(at, mem),
            Stage::Read => {
                let place = (copy.slot, copy.logical);
                if self.member(source).is_online() {
                    self.member_mut(source).drain.bad.insert(place);
                }
                self.drop_target(at, mem);
            }
            Stage::Write => {
                copy.outstanding -= 1;
                copy.failed |= !ok;
                let over = copy.outstanding == 0;
                if status == IoStatus::NoSpace {
                    let room = self.room();
                    self.member_mut(source).drain.stalled = Some(room);
                }
                if over {
                    self.chunk_written(at, mem);
                }
            }
            Stage::Flush if ok => {
                copy.stage = Stage::Arrive;
                copy.outstanding = 1;
                let (slot, logical, tag) = (copy.slot, copy.logical, copy.tag());
                self.member_mut(target).pool.arrive(tag, slot, logical, mem);
            }
            Stage::Flush => self.drop_target(at, mem),
            Stage::Arrive if ok => copy.stage = Stage::Readers,
            // The target failed: the source has it all.
            Stage::Arrive | Stage::Free | Stage::Drop => self.end_copy(at, mem),
            stage => unreachable!("nothing is asked in {stage:?}"),
        }
    }

    fn end_copy<M: Memory>(&mut self, at: usize, mem: &mut M) {
        let copy = self.copies.remove(at);
        if let Some(buf) = copy.buf {
            mem.release(buf);
        }
        for part in copy.parked {
            self.rerun(part, mem);
        }
    }

    /// The pool failed: what waits is answered; what is at the devices comes back.
    pub(super) fn abort_copies<M: Memory>(&mut self, mem: &mut M) {
        for at in (0..self.copies.len()).rev() {
            if matches!(self.copies[at].stage, Stage::Writers | Stage::Memory | Stage::Readers) {
                self.end_copy(at, mem);
            }
        }
    }
}
