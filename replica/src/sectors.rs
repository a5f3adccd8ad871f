//! Replicas with blocks of 512 bytes, over blocks of 4096 that are checksummed whole.
//!
//! What covers whole blocks of the pool goes on as it is. A part of a block is read with the rest of its
//! block, verified, changed and written back; meanwhile nothing else changes that block. Requests are
//! cut into pieces, done one after the other: at most a part of a block at either end, and what lies
//! between, through a buffer of our own where the payload does not lie at a multiple of 4096.

use cairn_block::{BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Memory};

use crate::disk::{BLOCK, BLOCK_BYTES};
use crate::pool::{Done, Pool, PoolState};

/// Sectors in a block of the pool.
const SECTORS: u64 = 8;
/// Blocks that are copied through a buffer together.
const MAX_BOUNCE: u64 = 32;
const SECTOR_BYTES: u64 = BlockSize::B512.bytes() as u64;
const _: () = assert!(SECTORS * SECTOR_BYTES == BLOCK);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Its blocks are being changed by another, or there is no memory.
    Waiting,
    /// The block that it changes a part of is being read.
    Rest,
    /// The piece itself is being done.
    Piece,
}

/// A request in sectors.
#[derive(Debug)]
pub(crate) struct SectorRequest {
    tag: u64,
    slot: u16,
    request: IoRequest,
    /// The first sector that is not done, and how many sectors the piece in hand has.
    at: u64,
    piece: u64,
    step: Step,
    bounce: Option<Buf>,
    /// It holds its blocks against other changes.
    locked: bool,
}

impl SectorRequest {
    /// The blocks of the pool that it touches.
    fn blocks(&self) -> core::ops::Range<u64> {
        let range = self.request.range;
        range.start().0 / SECTORS..range.end().0.div_ceil(SECTORS)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.blocks(), other.blocks());
        self.slot == other.slot && a.start < b.end && b.start < a.end
    }

    fn is_partial(&self) -> bool {
        !(self.at.is_multiple_of(SECTORS) && self.piece.is_multiple_of(SECTORS))
    }

    /// The payload of the piece in hand.
    fn window(&self) -> BufSlice {
        let skip = (self.at - self.request.range.start().0) * SECTOR_BYTES;
        let fit = "a request's payload is counted in 32 bits";
        let skip = u32::try_from(skip).expect(fit);
        let len = u32::try_from(self.piece * SECTOR_BYTES).expect(fit);
        self.request.buf.sub(skip, len)
    }
}

impl Pool {
    pub(crate) fn submit_sectors<M: Memory>(
        &mut self,
        tag: u64,
        slot: u16,
        request: IoRequest,
        mem: &mut M,
    ) {
        let request = SectorRequest {
            tag,
            slot,
            at: request.range.start().0,
            piece: 0,
            request,
            step: Step::Waiting,
            bounce: None,
            locked: false,
        };
        let id = self.sectors.insert(request);
        self.sectors_waiting.push_back(id);
        self.start_sectors(mem);
    }

    /// Starts what waits for blocks that nobody changes any more, in the order in which it came.
    fn start_sectors<M: Memory>(&mut self, mem: &mut M) {
        let mut at = 0;
        while let Some(&id) = self.sectors_waiting.get(at) {
            let one = self.sectors.get(id);
            let changes = one.request.op.is_mutation();
            let locked = |o: &SectorRequest| o.locked && o.overlaps(one);
            let before = |&o: &u32| {
                let o = self.sectors.get(o);
                o.request.op.is_mutation() && o.overlaps(one)
            };
            let waits = changes
                && !one.locked
                && (self.sectors.iter().any(|(_, o)| locked(o))
                    || self.sectors_waiting.iter().take(at).any(before));
            if !waits {
                self.sectors.get_mut(id).locked = changes;
                if self.next_piece(id, mem) {
                    self.sectors_waiting.remove(at);
                    continue;
                }
            }
            at += 1;
        }
    }

    /// Begins the next piece. False where there is no memory for it.
    fn next_piece<M: Memory>(&mut self, id: u32, mem: &mut M) -> bool {
        let one = self.sectors.get_mut(id);
        let end = one.request.range.end().0;
        let left = end - one.at;
        let inside = one.at % SECTORS;
        let data = matches!(one.request.op, IoOp::Read | IoOp::Write { .. });
        if inside != 0 || left < SECTORS {
            one.piece = (SECTORS - inside).min(left);
        } else {
            one.piece = left - left % SECTORS;
            if data && !one.window().offset().is_multiple_of(BLOCK_BYTES) {
                one.piece = one.piece.min(MAX_BOUNCE * SECTORS);
            }
        }
        let partial = one.is_partial();
        let bounces = partial || (data && !one.window().offset().is_multiple_of(BLOCK_BYTES));
        if bounces {
            let blocks = one.piece.div_ceil(SECTORS);
            let len = u32::try_from(blocks * BLOCK).expect("at most 32 blocks");
            let Some(buf) = mem.alloc(len) else { return false };
            let slice = buf.slice();
            one.bounce = Some(buf);
            if !partial && one.request.op != IoOp::Read {
                mem.copy(one.window(), slice);
            }
        }
        if partial && one.request.op != IoOp::Read {
            one.step = Step::Rest;
            self.issue_piece(id, IoOp::Read, mem);
        } else {
            one.step = Step::Piece;
            let op = one.request.op;
            self.issue_piece(id, op, mem);
        }
        true
    }

    fn issue_piece<M: Memory>(&mut self, id: u32, op: IoOp, mem: &mut M) {
        let one = self.sectors.get(id);
        let (first, blocks) = (one.at / SECTORS, one.piece.div_ceil(SECTORS));
        let buf = match (&one.bounce, op) {
            (Some(buf), _) => buf.slice(),
            (None, IoOp::Read | IoOp::Write { .. }) => one.window(),
            (None, _) => BufSlice::EMPTY,
        };
        // Zeroing a part of a block writes the block.
        let op = match op {
            IoOp::WriteZeroes { fua, .. } if one.bounce.is_some() => IoOp::Write { fua },
            IoOp::Discard if one.bounce.is_some() => IoOp::Write { fua: false },
            op => op,
        };
        let slot = one.slot;
        self.begin_inner(id, slot, op, first..first + blocks, buf, mem);
    }

    /// Takes the ends of pieces, and begins the next ones.
    pub(crate) fn pump_sectors<M: Memory>(&mut self, mem: &mut M) {
        while let Some((id, status)) = self.sectors_done.pop_front() {
            self.piece_done(id, status, mem);
        }
        if !self.sectors_waiting.is_empty() {
            self.start_sectors(mem);
            while let Some((id, status)) = self.sectors_done.pop_front() {
                self.piece_done(id, status, mem);
            }
        }
    }

    fn piece_done<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let one = self.sectors.get_mut(id);
        if !status.is_ok() || self.state != PoolState::Online {
            return self.end_sectors(id, status, mem);
        }
        let window = match one.request.op {
            IoOp::Read | IoOp::Write { .. } => one.window(),
            _ => BufSlice::EMPTY,
        };
        let inside = u32::try_from(one.at % SECTORS * SECTOR_BYTES).expect("within a block");
        let len = u32::try_from((one.piece * SECTOR_BYTES).min(BLOCK * MAX_BOUNCE));
        let len = len.expect("at most 32 blocks");
        if one.step == Step::Rest {
            let block = one.bounce.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
            let part = block.sub(inside, len);
            if window.is_empty() {
                mem.bytes_mut(part).fill(0);
            } else {
                mem.copy(window, part);
            }
            one.step = Step::Piece;
            let op = one.request.op;
            return self.issue_piece(id, op, mem);
        }
        if let Some(buf) = one.bounce.take() {
            if one.request.op == IoOp::Read {
                mem.copy(buf.slice().sub(inside, len), window);
            }
            mem.release(buf);
        }
        one.at += one.piece;
        if one.at == one.request.range.end().0 {
            self.end_sectors(id, IoStatus::Ok, mem);
        } else if !self.next_piece(id, mem) {
            self.sectors.get_mut(id).step = Step::Waiting;
            self.sectors_waiting.push_front(id);
        }
    }

    fn end_sectors<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let one = self.sectors.remove(id);
        if let Some(buf) = one.bounce {
            mem.release(buf);
        }
        self.slots[usize::from(one.slot)].in_flight -= 1;
        let status = if self.state == PoolState::Online { status } else { IoStatus::MediaError };
        self.done.push_back(Done { tag: one.tag, status, error: None });
    }

    /// The pool failed: what waits is answered. What is at the device is answered when it is back.
    pub(crate) fn give_up_sectors<M: Memory>(&mut self, mem: &mut M) {
        while let Some(id) = self.sectors_waiting.pop_front() {
            self.end_sectors(id, IoStatus::MediaError, mem);
        }
    }
}
