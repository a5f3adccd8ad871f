//! A simulated disk that reorders and forgets, and a pool on it.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, reason = "tests")]

pub(crate) mod exhaustive;
pub(crate) mod marks;
pub(crate) mod model;
pub(crate) mod world;

use cairn_block::{
    BlockSize, Buf, BufSlice, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, PoolId,
    ReplicaId, VolumeId,
};
use cairn_replica::{
    Device, DiskError, DiskIo, DiskOp, Done, FormatOptions, Pool, ReplicaSlot, ReplicaSpec,
    SparseDevice,
};

pub(crate) const BLOCK: usize = 4096;
pub(crate) const EXTENT_BLOCKS: u64 = 256;
pub(crate) const MIB: u64 = 1 << 20;

/// SplitMix64.
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap()
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

pub(crate) fn options(zeroed: bool) -> FormatOptions {
    FormatOptions {
        pool_id: PoolId(0xca1),
        device_is_zeroed: zeroed,
        sector_size: 512,
        force: false,
    }
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
}

struct Logged {
    change: Change,
    must_stay: bool,
}

struct InFlight {
    io: DiskIo,
    data: Vec<u8>,
    /// For a flush: how much of the log it covers.
    covers: usize,
}

/// Which of the operations in flight is performed next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Any,
    Oldest,
    Newest,
}

/// Performs operations in any order, and knows what a power cut would leave.
pub(crate) struct Disk {
    pub(crate) next: Next,
    /// Counts what changes the states that a power cut may leave.
    pub(crate) changes: u64,
    pub(crate) now: SparseDevice,
    stable: SparseDevice,
    log: Vec<Logged>,
    flying: Vec<InFlight>,
    /// Fail flushes from now on.
    pub(crate) fail_flush: bool,
    /// Fail metadata and data writes.
    pub(crate) fail_write: bool,
    pub(crate) fail_zero: Option<DiskError>,
    pub(crate) flushes: u64,
    /// Bytes that were written.
    pub(crate) written: u64,
    /// Bytes read.
    pub(crate) read: u64,
    /// Reads of this byte fail.
    pub(crate) fail_reads: Option<u64>,
}

fn apply(dev: &mut SparseDevice, change: &Change) {
    match change {
        Change::Write(at, data) => dev.write_at(*at, data).unwrap(),
        Change::Zero(at, len) => dev.zero(*at, *len).unwrap(),
    }
}

/// Applies a change as a power cut may leave it: any of its 512-byte sectors.
fn tear(dev: &mut SparseDevice, change: &Change, rng: &mut Rng) {
    let (at, len) = match change {
        Change::Write(at, data) => (*at, data.len()),
        Change::Zero(at, len) => (*at, usize::try_from(*len).unwrap()),
    };
    let mut page = vec![0; BLOCK];
    for p in (0..len).step_by(BLOCK) {
        let mode = rng.below(3);
        if mode == 0 {
            continue;
        }
        dev.read_at(at + p as u64, &mut page).unwrap();
        for s in (0..BLOCK).step_by(512) {
            if mode == 2 || rng.chance(50) {
                match change {
                    Change::Write(_, data) => {
                        page[s..s + 512].copy_from_slice(&data[p + s..p + s + 512]);
                    }
                    Change::Zero(..) => page[s..s + 512].fill(0),
                }
            }
        }
        // A superblock changes in its first sector only: a sector cut off may also be garbage.
        if at < 2 * BLOCK as u64 && mode == 1 && rng.chance(50) {
            page[..512].fill(0xbd);
        }
        dev.write_at(at + p as u64, &page).unwrap();
    }
}

impl Disk {
    pub(crate) fn new(dev: SparseDevice) -> Self {
        Self {
            next: Next::Any,
            changes: 0,
            stable: dev.clone(),
            now: dev,
            log: Vec::new(),
            flying: Vec::new(),
            fail_flush: false,
            fail_write: false,
            fail_zero: None,
            flushes: 0,
            written: 0,
            read: 0,
            fail_reads: None,
        }
    }

    pub(crate) fn issue(&mut self, io: DiskIo, mem: &HeapMemory) {
        let data = match io.op {
            DiskOp::Write { buf, .. } => mem.bytes(buf).to_vec(),
            _ => Vec::new(),
        };
        self.written += data.len() as u64;
        self.changes += u64::from(matches!(io.op, DiskOp::Write { .. } | DiskOp::Zero { .. }));
        self.flying.push(InFlight { io, data, covers: self.log.len() });
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// Performs one of the operations in flight.
    pub(crate) fn complete(
        &mut self,
        rng: &mut Rng,
        mem: &mut HeapMemory,
    ) -> (DiskIo, Result<(), DiskError>) {
        let flying = match self.next {
            Next::Any => self.flying.swap_remove(rng.index(self.flying.len())),
            Next::Oldest => self.flying.remove(0),
            Next::Newest => self.flying.pop().unwrap(),
        };
        let io = flying.io;
        match io.op {
            DiskOp::Read { offset, buf } => {
                self.read += u64::from(buf.len());
                let bad = |at: u64| (offset.0..offset.0 + u64::from(buf.len())).contains(&at);
                if self.fail_reads.is_some_and(bad) {
                    return (io, Err(DiskError::Io));
                }
                self.now.read_at(offset.0, mem.bytes_mut(buf)).unwrap();
            }
            DiskOp::Write { offset, buf, fua } => {
                if self.fail_write {
                    return (io, Err(DiskError::Io));
                }
                assert_eq!(mem.bytes(buf), flying.data, "a buffer in flight changed");
                self.changes += u64::from(fua);
                self.change(Change::Write(offset.0, flying.data), fua);
            }
            DiskOp::Zero { offset, len, .. } => {
                if let Some(error) = self.fail_zero {
                    return (io, Err(error));
                }
                self.change(Change::Zero(offset.0, len), false);
            }
            DiskOp::Flush => {
                if self.fail_flush {
                    return (io, Err(DiskError::Io));
                }
                self.flushes += 1;
                self.changes += 1;
                let covers = flying.covers.min(self.log.len());
                for logged in self.log.drain(..covers) {
                    apply(&mut self.stable, &logged.change);
                }
                for other in &mut self.flying {
                    other.covers = other.covers.saturating_sub(covers);
                }
            }
        }
        (io, Ok(()))
    }

    fn change(&mut self, change: Change, must_stay: bool) {
        apply(&mut self.now, &change);
        self.log.push(Logged { change, must_stay });
    }

    fn unfinished(self) -> impl Iterator<Item = Change> {
        self.flying.into_iter().filter_map(|f| match f.io.op {
            DiskOp::Write { offset, .. } => Some(Change::Write(offset.0, f.data)),
            DiskOp::Zero { offset, len, .. } => Some(Change::Zero(offset.0, len)),
            _ => None,
        })
    }

    /// What is in flight and may take effect, in the order in which it was issued.
    fn in_flight_changes(&self) -> impl Iterator<Item = Change> {
        self.flying.iter().filter_map(|f| match f.io.op {
            DiskOp::Write { offset, .. } => Some(Change::Write(offset.0, f.data.clone())),
            DiskOp::Zero { offset, len, .. } => Some(Change::Zero(offset.0, len)),
            _ => None,
        })
    }

    /// The program is killed: what completed is there; what did not, may be.
    pub(crate) fn kill(self, rng: &mut Rng) -> Self {
        let mut now = self.now.clone();
        let stable = self.stable.clone();
        let mut log: Vec<Logged> = Vec::new();
        let mut this = self;
        log.append(&mut this.log);
        for change in this.unfinished() {
            if rng.chance(50) {
                apply(&mut now, &change);
                log.push(Logged { change, must_stay: false });
            }
        }
        // The device still has its cache: a power cut may come before the next flush.
        Self { now, stable, log, ..Self::new(SparseDevice::new(0)) }
    }

    /// The power is cut: of what no flush covered, any sectors are there.
    pub(crate) fn cut(mut self, rng: &mut Rng) -> Self {
        let mut stable = self.stable.clone();
        for logged in core::mem::take(&mut self.log) {
            if logged.must_stay {
                apply(&mut stable, &logged.change);
            } else {
                tear(&mut stable, &logged.change, rng);
            }
        }
        for change in self.unfinished() {
            tear(&mut stable, &change, rng);
        }
        Self::new(stable)
    }
}

/// What open, inspect and format use: the same disk, synchronously.
impl Device for Disk {
    fn len(&self) -> u64 {
        self.now.len()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.now.read_at(offset, buf)
    }

    fn write_at(&mut self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        self.change(Change::Write(offset, buf.to_vec()), false);
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        for logged in self.log.drain(..) {
            apply(&mut self.stable, &logged.change);
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.change(Change::Zero(offset, len), false);
        Ok(())
    }
}

/// A pool on a simulated disk.
pub(crate) struct Sim {
    pub(crate) pool: Pool,
    pub(crate) disk: Disk,
    pub(crate) mem: HeapMemory,
    pub(crate) rng: Rng,
    pub(crate) check: bool,
    pub(crate) next_tag: u64,
}

impl Sim {
    pub(crate) fn formatted(len: u64, zeroed: bool, seed: u64) -> Self {
        let mut dev = SparseDevice::new(len);
        Pool::format(&mut dev, &options(zeroed)).unwrap();
        Self::open(Disk::new(dev), seed)
    }

    pub(crate) fn open(mut disk: Disk, seed: u64) -> Self {
        let mut pool = Pool::open(&mut disk).unwrap();
        // Most runs wash and evict all the time.
        match seed % 4 {
            0 => {}
            1 => pool.set_checksum_limits(0, 0),
            2 => pool.set_checksum_limits(2, 1),
            _ => pool.set_checksum_limits(16, 2),
        }
        pool.check();
        let mem = HeapMemory::new(4 << 20);
        Self { pool, disk, mem, rng: Rng(seed), check: true, next_tag: 1 }
    }

    pub(crate) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    pub(crate) fn issue(&mut self) {
        while let Some(io) = self.pool.poll_disk() {
            self.disk.issue(io, &self.mem);
        }
    }

    /// One event. Returns whether there was one.
    pub(crate) fn step(&mut self) -> bool {
        self.issue();
        if self.disk.in_flight() == 0 {
            return false;
        }
        let (io, result) = self.disk.complete(&mut self.rng, &mut self.mem);
        self.pool.handle_disk(io.id, result, &mut self.mem);
        if self.check {
            self.pool.check();
        }
        self.issue();
        true
    }

    pub(crate) fn settle(&mut self) -> Vec<Done> {
        self.pool.retry(&mut self.mem);
        let mut done = Vec::new();
        let mut steps = 0;
        while self.step() {
            done.extend(std::iter::from_fn(|| self.pool.poll_done()));
            steps += 1;
            assert!(steps < 1_000_000, "it never ends");
        }
        done.extend(std::iter::from_fn(|| self.pool.poll_done()));
        done
    }

    /// Runs until `tag` is answered.
    pub(crate) fn wait(&mut self, tag: u64) -> Done {
        let done = self.settle();
        done.into_iter().find(|d| d.tag == tag).expect("every command is answered")
    }

    pub(crate) fn create(&mut self, id: u128, extents: u64) -> ReplicaSlot {
        let tag = self.tag();
        self.pool.create_replica(tag, spec(id, extents * EXTENT_BLOCKS), &mut self.mem);
        let done = self.wait(tag);
        assert_eq!(done.status, IoStatus::Ok, "{:?}", done.error);
        self.pool.find(ReplicaId(id)).unwrap()
    }

    pub(crate) fn delete(&mut self, slot: ReplicaSlot) {
        let tag = self.tag();
        self.pool.delete_replica(tag, slot, &mut self.mem);
        assert_eq!(self.wait(tag).status, IoStatus::Ok);
    }

    pub(crate) fn request(
        &mut self,
        slot: ReplicaSlot,
        op: IoOp,
        lba: u64,
        blocks: u64,
        byte: u8,
    ) -> IoStatus {
        let len = u32::try_from(blocks).unwrap() * 4096;
        let payload = matches!(op, IoOp::Write { .. } | IoOp::Read);
        let buf = payload.then(|| self.mem.alloc(len).unwrap());
        let slice = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        if payload {
            self.mem.bytes_mut(slice).fill(byte);
        }
        let tag = self.tag();
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        self.pool.submit(tag, slot, IoRequest { op, range, buf: slice }, &mut self.mem);
        let done = self.wait(tag);
        if let Some(buf) = buf {
            self.mem.release(buf);
        }
        done.status
    }

    pub(crate) fn read(&mut self, slot: ReplicaSlot, lba: u64, blocks: u64) -> Vec<u8> {
        let buf = self.mem.alloc(u32::try_from(blocks).unwrap() * 4096).unwrap();
        let tag = self.tag();
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
        self.pool.submit(tag, slot, request, &mut self.mem);
        assert_eq!(self.wait(tag).status, IoStatus::Ok);
        let bytes = self.mem.bytes(buf.slice()).to_vec();
        self.mem.release(buf);
        bytes
    }

    pub(crate) fn checkpoint(&mut self) {
        let tag = self.tag();
        self.pool.checkpoint(tag, &mut self.mem);
        assert_eq!(self.wait(tag).status, IoStatus::Ok);
    }
}

pub(crate) fn spec(id: u128, blocks: u64) -> ReplicaSpec {
    ReplicaSpec {
        id: ReplicaId(id),
        volume: VolumeId(id + 1000),
        name: format!("r{id}"),
        blocks,
        block_size: BlockSize::B4096,
        thick: false,
        source: None,
    }
}
