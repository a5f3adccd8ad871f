//! Volumes that hosts see in blocks of 512 bytes, over replicas in blocks of 4096.
//!
//! What covers whole blocks of the replicas goes on as it is. A part of a block is read with the rest of
//! its block, changed and written back; meanwhile nothing else changes that block. Requests are cut into
//! pieces, done one after the other: at most a part of a block at either end, and what lies between,
//! through a buffer of our own where the payload does not lie at a multiple of 4096. The nexus, and what
//! encrypts, only see whole blocks.

use std::collections::VecDeque;

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, undo,
};
use cairn_reactor::Driver;

use super::Shard;
use super::volumes::{Asked, Volume};

/// Set in the tags of pieces.
pub(super) const PIECE: u64 = 1 << 41;
/// Bytes of a block of the replicas, and host blocks in it.
const BLOCK: u32 = BlockSize::B4096.bytes();
const SECTORS: u64 = 8;
/// Blocks that are copied through a buffer together.
const MAX_BOUNCE: u64 = 32;
/// An atomic write whose buffer is not there after so long is refused: it is one piece, and what waits for its blocks
/// may hold the memory.
const MEMORY_WAIT_MS: u64 = 2_000;
const SECTOR_BYTES: u64 = BlockSize::B512.bytes() as u64;
const _: () = assert!(SECTORS * SECTOR_BYTES == BLOCK as u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Its blocks are being changed by another, or there is no memory.
    Waiting,
    /// The block that it changes a part of is being read.
    Rest,
    /// The piece itself is being done.
    Piece,
}

/// A host's request in blocks of 512 bytes.
#[derive(Debug)]
pub(super) struct SectorIo {
    volume: u32,
    /// The host's command.
    io: u32,
    request: IoRequest,
    /// It is a write that is to be done whole or not at all: one piece, whatever it begins and ends with.
    atomic: bool,
    /// The first host block that is not done, and how many the piece in hand has.
    at: u64,
    piece: u64,
    step: Step,
    bounce: Option<Buf>,
    /// That buffer is the shard's last one.
    reserve: bool,
    /// Since when it waits for memory, where it is atomic.
    short_ms: Option<u64>,
    /// It holds its blocks against other changes.
    locked: bool,
    /// How the piece in hand ended; its buffer may still be in use.
    status: Option<IoStatus>,
}

impl SectorIo {
    /// The blocks of the replicas that it touches.
    fn blocks(&self) -> std::ops::Range<u64> {
        let range = self.request.range;
        range.start().0 / SECTORS..range.end().0.div_ceil(SECTORS)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.blocks(), other.blocks());
        self.volume == other.volume && a.start < b.end && b.start < a.end
    }

    /// Whether it touches no more blocks than may be written atomically, which is so of any other request.
    fn fits_log(&self) -> bool {
        let blocks = self.blocks();
        !self.atomic || blocks.end - blocks.start <= undo::MAX_BLOCKS
    }

    /// Whether it has waited for memory for too long.
    fn gives_up(&self, now: u64) -> bool {
        let since = |since: u64| now.saturating_sub(since) >= MEMORY_WAIT_MS;
        self.short_ms.is_some_and(since)
    }

    fn has_data(&self) -> bool {
        matches!(self.request.op, IoOp::Read | IoOp::Write { .. })
    }

    fn is_partial(&self) -> bool {
        !(self.at.is_multiple_of(SECTORS) && self.piece.is_multiple_of(SECTORS))
    }

    fn is_last(&self) -> bool {
        self.at + self.piece == self.request.range.end().0
    }

    /// The blocks of the piece in hand.
    fn range(&self) -> LbaRange {
        LbaRange::new(Lba(self.at / SECTORS), self.held()).expect("inside the volume")
    }

    /// How many blocks the piece in hand touches.
    fn held(&self) -> u64 {
        (self.at + self.piece).div_ceil(SECTORS) - self.at / SECTORS
    }

    /// The payload of the piece in hand.
    fn window(&self) -> BufSlice {
        if !self.has_data() {
            return BufSlice::EMPTY;
        }
        let fit = "a request's payload is counted in 32 bits";
        let skip = (self.at - self.request.range.start().0) * SECTOR_BYTES;
        let len = u32::try_from(self.piece * SECTOR_BYTES).expect(fit);
        self.request.buf.sub(u32::try_from(skip).expect(fit), len)
    }

    /// The buffer of our own, where there is one, as long as the blocks of the piece in hand.
    fn bounce(&self) -> Option<BufSlice> {
        let len = self.held() * u64::from(BLOCK);
        let len = u32::try_from(len).expect("a request's payload is counted in 32 bits");
        self.bounce.as_ref().map(|buf| buf.slice().sub(0, len))
    }

    /// Where in its block the piece in hand begins, in bytes.
    fn inside(&self) -> u32 {
        u32::try_from(self.at % SECTORS * SECTOR_BYTES).expect("within a block")
    }

    /// Settles how far the next piece reaches. Returns whether it needs a buffer of our own.
    fn cut(&mut self) -> bool {
        let left = self.request.range.end().0 - self.at;
        if self.atomic {
            self.piece = left;
            return self.is_partial() || !self.window().offset().is_multiple_of(BLOCK);
        }
        let inside = self.at % SECTORS;
        if inside != 0 || left < SECTORS {
            self.piece = (SECTORS - inside).min(left);
            // A Verify of a part is one of the block.
            return self.request.op != IoOp::Verify;
        }
        self.piece = left - left % SECTORS;
        let crooked = self.has_data() && !self.window().offset().is_multiple_of(BLOCK);
        if crooked {
            self.piece = self.piece.min(MAX_BOUNCE * SECTORS);
        }
        crooked
    }
}

/// What waits on a volume, in the order in which it came.
pub(super) type Waiting = VecDeque<u32>;

impl<D: Driver> Shard<D> {
    pub(super) fn submit_sectors(
        &mut self,
        volume: u32,
        io: u32,
        (request, atomic): Asked,
        now: u64,
    ) {
        let range = request.range;
        if request.op == IoOp::Flush || range.is_empty() {
            let request = IoRequest { range: LbaRange::default(), ..request };
            self.submit_to_volume(volume, u64::from(io), (request, false), now);
            return;
        }
        let one = SectorIo {
            volume,
            io,
            at: range.start().0,
            piece: 0,
            request,
            atomic,
            step: Step::Waiting,
            bounce: None,
            reserve: false,
            short_ms: None,
            locked: false,
            status: None,
        };
        if !one.fits_log() {
            self.host_io_done(io, IoStatus::InvalidField, now);
            return self.host_io_released(io, now);
        }
        let id = self.sectors.insert(one);
        self.volumes[volume].sectors.push_back(id);
        self.start_sectors(volume, now);
    }

    /// Sets a buffer aside: where payload that waits for one has taken all the memory, requests still go on
    /// one by one.
    pub(super) fn reserve_sectors(&mut self) -> bool {
        if self.sector_reserve.is_none() && self.sectors.is_empty() {
            let len = u32::try_from(MAX_BOUNCE).expect("a few") * BLOCK;
            self.sector_reserve = self.driver.memory().alloc(len);
        }
        self.sector_reserve.is_some() || !self.sectors.is_empty()
    }

    fn give_back(&mut self, bounce: Buf, reserve: bool) {
        if reserve {
            self.sector_reserve = Some(bounce);
        } else {
            self.release(bounce);
        }
    }

    /// Tries again what waited for memory. Returns whether anything began.
    pub(super) fn retry_sectors(&mut self, now: u64) -> bool {
        if self.sectors.is_empty() {
            return false;
        }
        let mut moved = false;
        for volume in self.volumes.keys() {
            let before = self.volumes[volume].sectors.len();
            if before > 0 {
                self.start_sectors(volume, now);
                moved |= self.volumes[volume].sectors.len() < before;
            }
        }
        moved
    }

    /// Starts what waits for blocks that nobody changes any more, or for memory.
    pub(super) fn start_sectors(&mut self, volume: u32, now: u64) {
        let mut at = 0;
        while let Some(&id) = self.volumes.get(volume).and_then(|v| v.sectors.get(at)) {
            let waiting = &self.volumes[volume].sectors;
            let one = &self.sectors[id];
            let changes = one.request.op.is_mutation();
            let before = |&o: &u32| {
                let o = &self.sectors[o];
                o.request.op.is_mutation() && o.overlaps(one)
            };
            let waits = changes
                && !one.locked
                && (self.sectors.iter().any(|(_, o)| o.locked && o.overlaps(one))
                    || waiting.iter().take(at).any(before));
            if !waits {
                self.sectors[id].locked = changes;
                if self.next_piece(id, now) {
                    self.volumes[volume].sectors.remove(at);
                    continue;
                }
                let one = &mut self.sectors[id];
                if one.atomic {
                    let since = *one.short_ms.get_or_insert(now);
                    if one.gives_up(now) {
                        self.volumes[volume].sectors.remove(at);
                        self.drop_one(id, IoStatus::NotReady, now);
                        continue;
                    }
                    self.wants_timeout(Some(since + MEMORY_WAIT_MS));
                }
            }
            at += 1;
        }
    }

    /// Begins the next piece. False where there is no memory for it.
    fn next_piece(&mut self, id: u32, now: u64) -> bool {
        let one = &mut self.sectors[id];
        let bounces = one.cut();
        let partial = one.is_partial();
        if bounces {
            let len = one.held() * u64::from(BLOCK);
            let len = u32::try_from(len).expect("a request's payload is counted in 32 bits");
            let memory = self.driver.memory();
            let spare = memory.alloc(len);
            one.reserve = spare.is_none();
            let fits = |buf: &mut Buf| buf.slice().len() >= len;
            let Some(buf) = spare.or_else(|| self.sector_reserve.take_if(fits)) else {
                return false;
            };
            one.bounce = Some(buf);
            if !partial && one.request.op != IoOp::Read {
                memory.copy(one.window(), one.bounce().unwrap_or_default());
            }
        }
        if bounces && partial && one.request.op != IoOp::Read {
            one.step = Step::Rest;
            self.issue_piece(id, IoOp::Read, now);
        } else {
            one.step = Step::Piece;
            let op = one.request.op;
            self.issue_piece(id, op, now);
        }
        true
    }

    fn issue_piece(&mut self, id: u32, op: IoOp, now: u64) {
        let one = &mut self.sectors[id];
        one.status = None;
        let buf = match (one.bounce(), op) {
            (Some(buf), _) => buf,
            (None, IoOp::Read | IoOp::Write { .. }) => one.window(),
            (None, _) => BufSlice::EMPTY,
        };
        // Zeroing a part of a block writes the block.
        let op = match op {
            IoOp::WriteZeroes { fua, .. } if one.bounce.is_some() => IoOp::Write { fua },
            IoOp::Discard if one.bounce.is_some() => IoOp::Write { fua: false },
            op => op,
        };
        let (volume, range) = (one.volume, one.range());
        let atomic = one.atomic && one.step == Step::Piece;
        self.seal(volume, op, range, buf);
        let request = IoRequest { op, range, buf };
        self.submit_to_volume(volume, PIECE | u64::from(id), (request, atomic), now);
    }

    /// The nexus has answered a piece; its buffer may still be in use.
    pub(super) fn piece_done(&mut self, id: u32, status: IoStatus, now: u64) {
        let Some(one) = self.sectors.get_mut(id) else { return };
        one.status = Some(status);
        let reads = one.step == Step::Rest || one.request.op == IoOp::Read;
        let whole = one.bounce().unwrap_or_else(|| one.window());
        let (volume, io, range) = (one.volume, one.io, one.range());
        if status.is_ok() && reads && self.volumes.get(volume).is_some_and(|v| v.key.is_some()) {
            self.unseal(volume, range, whole);
        }
        let one = &self.sectors[id];
        if status.is_ok() && one.step == Step::Piece && one.request.op == IoOp::Read {
            let (inside, window) = (one.inside(), one.window());
            if let Some(bounce) = one.bounce() {
                let part = bounce.sub(inside, window.len());
                self.driver.memory().copy(part, window);
            }
        }
        let one = &self.sectors[id];
        if !status.is_ok() || (one.step == Step::Piece && one.is_last()) {
            self.host_io_done(io, status, now);
        }
    }

    /// Nobody uses the piece's buffer any more.
    pub(super) fn piece_released(&mut self, id: u32, now: u64) {
        let Some(one) = self.sectors.get_mut(id) else { return };
        let volume = one.volume;
        let ok = one.status.is_some_and(IoStatus::is_ok);
        if ok && one.step == Step::Rest {
            let len = u32::try_from(one.piece * SECTOR_BYTES).expect("within its blocks");
            let (inside, window, op) = (one.inside(), one.window(), one.request.op);
            let block = one.bounce().unwrap_or_default();
            let memory = self.driver.memory();
            let part = block.sub(inside, len);
            if window.is_empty() {
                memory.bytes_mut(part).fill(0);
            } else {
                memory.copy(window, part);
            }
            one.step = Step::Piece;
            self.issue_piece(id, op, now);
            return;
        }
        if let Some(bounce) = self.sectors[id].bounce.take() {
            self.give_back(bounce, self.sectors[id].reserve);
        }
        let one = &mut self.sectors[id];
        let removing = self.volumes.get(volume).is_none_or(Volume::removing);
        if ok && !one.is_last() && removing {
            // Nobody would start it again where it had to wait for memory.
            let io = one.io;
            self.host_io_done(io, IoStatus::NotReady, now);
        } else if ok && !one.is_last() {
            one.at += one.piece;
            if !self.next_piece(id, now) {
                self.sectors[id].step = Step::Waiting;
                self.volumes[volume].sectors.push_front(id);
            }
            return;
        }
        let Some(one) = self.sectors.remove(id) else { return };
        self.host_io_released(one.io, now);
        self.start_sectors(volume, now);
    }

    /// The volume is going: what waits and has not begun is answered.
    pub(super) fn drop_sectors(&mut self, volume: u32, status: IoStatus, now: u64) {
        while let Some(id) = self.volumes[volume].sectors.pop_front() {
            self.drop_one(id, status, now);
        }
    }

    /// Answers one that waits.
    fn drop_one(&mut self, id: u32, status: IoStatus, now: u64) {
        if let Some(one) = self.sectors.remove(id) {
            if let Some(bounce) = one.bounce {
                self.give_back(bounce, one.reserve);
            }
            self.host_io_done(one.io, status, now);
            self.host_io_released(one.io, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn atomic_write(start: u64, sectors: u64) -> SectorIo {
        let range = LbaRange::new(Lba(start), sectors).unwrap();
        let request = IoRequest { op: IoOp::Write { fua: true }, range, buf: BufSlice::EMPTY };
        SectorIo {
            volume: 0,
            io: 0,
            request,
            atomic: true,
            at: start,
            piece: 0,
            step: Step::Waiting,
            bounce: None,
            reserve: false,
            short_ms: None,
            locked: false,
            status: None,
        }
    }

    /// One of 2048 sectors that began within a block waited for ever for a buffer that there is not, with its
    /// blocks locked.
    #[test]
    fn an_atomic_write_that_touches_too_many_blocks_does_not_fit() {
        assert!(atomic_write(8, 2048).fits_log());
        assert!(atomic_write(9, 2047).fits_log());
        assert!(!atomic_write(9, 2048).fits_log());
        assert!(SectorIo { atomic: false, ..atomic_write(9, 2048) }.fits_log());
    }

    #[test]
    fn an_atomic_write_waits_for_memory_for_a_while() {
        let mut one = atomic_write(1, 8);
        assert!(!one.gives_up(u64::MAX), "it does not wait for memory");
        one.short_ms = Some(5);
        assert!(!one.gives_up(5 + MEMORY_WAIT_MS - 1));
        assert!(one.gives_up(5 + MEMORY_WAIT_MS));
    }
}
