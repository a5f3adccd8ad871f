//! A pool, something that performs its operations, and a host that keeps requests in flight.

use std::collections::VecDeque;
use std::path::Path;

use anyhow::{Result, bail};
use cairn_block::{
    BlockSize, Buf, BufSlice, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, PoolId,
    ReplicaId, VolumeId,
};
use cairn_engine::device::PoolDevice;
use cairn_reactor::{
    Attach, BlockFile, Completion, DeviceId, Driver, DriverConfig, IoMode, Op, Token, UringDriver,
};
use cairn_replica::{
    Device, DiskId, DiskOp, FormatOptions, Pool, PoolState, ReplicaSlot, ReplicaSpec, SnapshotSpec,
    SparseDevice,
};

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const EXTENT: u64 = 1 << 20;

/// Performs a pool's operations.
pub(crate) trait Disk {
    type Memory: Memory;

    fn memory(&mut self) -> &mut Self::Memory;

    /// Takes what the pool wants done and brings back at least one result, if anything is under way.
    /// Whether anything was.
    fn turn(&mut self, pool: &mut Pool) -> Result<bool>;
}

/// A disk in memory that counts. All that is at it when a turn begins completes in that turn, as a
/// queue with one latency for everything does; what that lets the pool begin is the next turn's.
#[derive(Debug)]
pub(crate) struct Counting {
    pub(crate) dev: SparseDevice,
    mem: HeapMemory,
    pub(crate) counted: Counted,
    metadata_end: u64,
}

/// What went to the disk.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counted {
    pub(crate) data: u64,
    pub(crate) metadata: u64,
    pub(crate) zeroed: u64,
    pub(crate) flushes: u64,
}

impl Counting {
    pub(crate) fn new(len: u64) -> Result<(Self, Pool)> {
        let mut dev = SparseDevice::new(len);
        Pool::format(&mut dev, &options(true))?;
        let copies = cairn_replica::inspect_superblock(&mut dev)?;
        let superblock = copies.into_iter().find_map(|copy| copy.content.ok());
        let metadata_end = superblock.map_or(0, |s| s.segments[0].data * BLOCK);
        let pool = Pool::open(&mut dev)?;
        let mem = HeapMemory::new(16 << 20);
        Ok((Self { dev, mem, counted: Counted::default(), metadata_end }, pool))
    }
}

impl Disk for Counting {
    type Memory = HeapMemory;

    fn memory(&mut self) -> &mut HeapMemory {
        &mut self.mem
    }

    fn turn(&mut self, pool: &mut Pool) -> Result<bool> {
        let batch: Vec<_> = std::iter::from_fn(|| pool.poll_disk()).collect();
        for io in &batch {
            match io.op {
                DiskOp::Read { offset, buf } => {
                    self.dev.read_at(offset.0, self.mem.bytes_mut(buf))?
                }
                DiskOp::Write { offset, buf, .. } => {
                    let bytes = self.mem.bytes(buf);
                    let metadata = offset.0 < self.metadata_end;
                    let count =
                        if metadata { &mut self.counted.metadata } else { &mut self.counted.data };
                    *count += bytes.len() as u64;
                    self.dev.write_at(offset.0, bytes)?;
                }
                DiskOp::Flush => self.counted.flushes += 1,
                DiskOp::Zero { offset, len, .. } => {
                    self.counted.zeroed += len;
                    self.dev.zero(offset.0, len)?;
                }
            }
        }
        for io in &batch {
            pool.handle_disk(io.id, Ok(()), &mut self.mem);
        }
        Ok(!batch.is_empty())
    }
}

/// The driver that serves in production.
#[derive(Debug)]
pub(crate) struct Real {
    driver: UringDriver,
    device: DeviceId,
    out: Vec<Completion>,
    in_flight: usize,
}

impl Real {
    pub(crate) fn driver() -> Result<UringDriver> {
        let config = DriverConfig { arena_len: 64 << 20, ..DriverConfig::default() };
        Ok(UringDriver::new(&config)?)
    }

    pub(crate) fn open(device: Attach) -> Result<(Self, Pool)> {
        Self::open_with(Self::driver()?, device)
    }

    pub(crate) fn open_with(mut driver: UringDriver, device: Attach) -> Result<(Self, Pool)> {
        let mut device = PoolDevice(device);
        let pool = Pool::open(&mut device)?;
        let device = driver.attach_device(device.0)?;
        Ok((Self { driver, device, out: Vec::with_capacity(256), in_flight: 0 }, pool))
    }
}

impl Disk for Real {
    type Memory = <UringDriver as Driver>::Memory;

    fn memory(&mut self) -> &mut Self::Memory {
        self.driver.memory()
    }

    fn turn(&mut self, pool: &mut Pool) -> Result<bool> {
        let device = self.device;
        while let Some(io) = pool.poll_disk() {
            let op = match io.op {
                DiskOp::Read { offset, buf } => Op::Read { device, offset, buf },
                DiskOp::Write { offset, buf, fua } => Op::Write { device, offset, buf, fua },
                DiskOp::Flush => Op::Flush { device },
                DiskOp::Zero { offset, len, punch } => Op::Zero { device, offset, len, punch },
            };
            self.driver.submit(op, Token::new(u64::from(io.id.0)));
            self.in_flight += 1;
        }
        if self.in_flight == 0 {
            return Ok(false);
        }
        self.driver.poll(&mut self.out, None);
        let mut out = std::mem::take(&mut self.out);
        for completion in out.drain(..) {
            if let Completion::Disk { token, result } = completion {
                self.in_flight -= 1;
                if let Err(fault) = result {
                    bail!("the device failed: {fault}");
                }
                let id = DiskId(u32::try_from(token.value())?);
                pool.handle_disk(id, Ok(()), self.driver.memory());
            }
        }
        self.out = out;
        Ok(true)
    }
}

pub(crate) fn options(zeroed: bool) -> FormatOptions {
    FormatOptions {
        pool_id: PoolId(0xca1),
        device_is_zeroed: zeroed,
        sector_size: 4096,
        force: true,
    }
}

/// A new pool in a sparse file.
pub(crate) fn make_file(path: &Path, len: u64) -> Result<()> {
    // A leftover of an earlier run is replaced.
    let _removed = std::fs::remove_file(path);
    BlockFile::create(path, len)?;
    let file = BlockFile::open(path, IoMode::Direct)?;
    Pool::format(&mut PoolDevice(Attach::File(file)), &options(true))?;
    Ok(())
}

/// SplitMix64: the same requests every time.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    }
}

/// A request of the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    pub(crate) op: IoOp,
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
}

impl Ask {
    pub(crate) fn write(lba: u64, blocks: u64) -> Self {
        Self { op: IoOp::Write { fua: false }, lba, blocks }
    }

    pub(crate) fn read(lba: u64) -> Self {
        Self { op: IoOp::Read, lba, blocks: 1 }
    }
}

/// A pool with a disk and one replica.
#[derive(Debug)]
pub(crate) struct Rig<D: Disk> {
    pub(crate) pool: Pool,
    pub(crate) disk: D,
    pub(crate) slot: ReplicaSlot,
    tag: u64,
    /// Of the host, by tag less one: 0 is a command's.
    free: VecDeque<u64>,
    bufs: Vec<Buf>,
    most: u64,
}

/// Requests that a host has in flight.
pub(crate) const DEPTH: usize = 32;
/// Tags of commands begin here.
const COMMANDS: u64 = 1 << 32;
const REPLICA: ReplicaId = ReplicaId(7);

impl<D: Disk> Rig<D> {
    /// Makes the replica, or finds it.
    /// Requests have `longest` bytes at most.
    pub(crate) fn new(pool: Pool, disk: D, bytes: u64, longest: u32) -> Result<Self> {
        let mut rig = Self {
            pool,
            disk,
            slot: ReplicaSlot(0),
            tag: COMMANDS,
            free: (0..DEPTH as u64).collect(),
            bufs: Vec::new(),
            most: u64::from(longest) / BLOCK,
        };
        for _ in 0..DEPTH {
            let Some(buf) = rig.disk.memory().alloc(longest) else { bail!("no memory") };
            rig.bufs.push(buf);
        }
        if rig.pool.find(REPLICA).is_none() {
            let spec = ReplicaSpec {
                id: REPLICA,
                volume: VolumeId(8),
                name: "measured".to_owned(),
                blocks: bytes / BLOCK,
                block_size: BlockSize::B4096,
                thick: false,
                source: None,
            };
            rig.command(|pool, tag, mem| pool.create_replica(tag, spec, mem))?;
        }
        let Some(slot) = rig.pool.find(REPLICA) else { bail!("the replica is not there") };
        rig.slot = slot;
        Ok(rig)
    }

    /// Runs a command to its end.
    pub(crate) fn command(
        &mut self,
        ask: impl FnOnce(&mut Pool, u64, &mut D::Memory),
    ) -> Result<()> {
        self.tag += 1;
        let tag = self.tag;
        ask(&mut self.pool, tag, self.disk.memory());
        loop {
            while let Some(done) = self.pool.poll_done() {
                if done.tag == tag {
                    if let Some(error) = done.error {
                        bail!("{error}");
                    }
                    return Ok(());
                }
            }
            if !self.disk.turn(&mut self.pool)? {
                bail!("a command is not answered");
            }
        }
    }

    pub(crate) fn snapshot(&mut self, id: u128) -> Result<()> {
        let slot = self.slot;
        let spec =
            SnapshotSpec { id: cairn_block::SnapshotId(id), name: String::new(), created: 0 };
        self.command(|pool, tag, mem| pool.create_snapshot(tag, slot, spec, mem))
    }

    /// Washes everything and makes a checkpoint.
    pub(crate) fn checkpoint(&mut self) -> Result<()> {
        self.command(|pool, tag, mem| pool.checkpoint(tag, mem))
    }

    /// Fills the buffers with bytes that are no zeros.
    pub(crate) fn fill(&mut self) {
        for (n, buf) in (1u8..).zip(&self.bufs) {
            self.disk.memory().bytes_mut(buf.slice()).fill(n);
        }
    }

    /// Puts requests in, `depth` in flight, until there are no more and all are answered. Returns how
    /// many there were.
    pub(crate) fn run(
        &mut self,
        depth: usize,
        mut next: impl FnMut() -> Option<Ask>,
    ) -> Result<u64> {
        let (mut count, mut flying, mut more) = (0, 0, true);
        loop {
            while more && flying < depth {
                let Some(ask) = next() else {
                    more = false;
                    break;
                };
                let Some(at) = self.free.pop_front() else { break };
                self.submit(at, ask)?;
                flying += 1;
                count += 1;
            }
            if flying == 0 && !more {
                return Ok(count);
            }
            let moved = self.disk.turn(&mut self.pool)?;
            let mut answered = false;
            while let Some(done) = self.pool.poll_done() {
                if done.status != IoStatus::Ok {
                    bail!("a request failed: {:?}", done.status);
                }
                self.free.push_back(done.tag);
                flying -= 1;
                answered = true;
            }
            if !moved && !answered {
                if let PoolState::Failed(why) = self.pool.state() {
                    bail!("the pool failed: {why}");
                }
                bail!("requests are not answered");
            }
        }
    }

    fn submit(&mut self, at: u64, ask: Ask) -> Result<()> {
        let range = LbaRange::new(Lba(ask.lba), ask.blocks)?;
        let payload = matches!(ask.op, IoOp::Read | IoOp::Write { .. });
        let buf = if payload {
            if ask.blocks > self.most {
                bail!("a request is longer than its buffer");
            }
            let len = u32::try_from(ask.blocks * BLOCK)?;
            self.bufs[usize::try_from(at)?].slice().sub(0, len)
        } else {
            BufSlice::EMPTY
        };
        let request = IoRequest { op: ask.op, range, buf };
        self.pool.submit(at, self.slot, request, self.disk.memory());
        Ok(())
    }

    /// Lets everything come to rest.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.pool.retry(self.disk.memory());
        while self.disk.turn(&mut self.pool)? {}
        Ok(())
    }
}
