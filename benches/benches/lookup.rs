//! A pool that finds a request's extents: from the request to the device operation that it emits, and back.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use cairn_block::{
    BlockSize, Buf, BufSlice, HeapMemory, IoOp, IoRequest, Lba, LbaRange, Memory, PoolId,
    ReplicaId, VolumeId,
};
use cairn_engine::device::PoolDevice;
use cairn_reactor::{Attach, MemRegion};
use cairn_replica::{DiskOp, FormatOptions, Pool, ReplicaSlot, ReplicaSpec};
use criterion::{Criterion, criterion_group, criterion_main};

const BLOCKS: u64 = 32 << 10;
const PER_EXTENT: u64 = 256;

struct Rig {
    pool: Pool,
    device: PoolDevice,
    memory: HeapMemory,
    slot: ReplicaSlot,
    buf: Buf,
    /// Reads leave the device alone: its copies are none of the pool's work.
    copies: bool,
}

impl Rig {
    fn new() -> Self {
        let region = MemRegion::new(256 << 20).expect("memory for a pool");
        let mut device = PoolDevice(Attach::Memory(region));
        let options = FormatOptions {
            pool_id: PoolId(1),
            device_is_zeroed: true,
            sector_size: 4096,
            force: true,
        };
        Pool::format(&mut device, &options).expect("a pool");
        let mut pool = Pool::open(&mut device).expect("what was just made");
        pool.disable_checksums_for_benchmark();
        let mut memory = HeapMemory::new(64 << 20);
        let buf = memory.alloc(1 << 20).expect("room");
        let spec = ReplicaSpec {
            id: ReplicaId(7),
            volume: VolumeId(8),
            name: "looked up".to_owned(),
            blocks: BLOCKS,
            block_size: BlockSize::B4096,
            thick: false,
            source: None,
        };
        pool.create_replica(1 << 32, spec, &mut memory);
        let slot = ReplicaSlot(0);
        let mut rig = Self { pool, device, memory, slot, buf, copies: true };
        rig.until_done();
        rig.slot = rig.pool.find(ReplicaId(7)).expect("it was made");
        for extent in 0..BLOCKS / PER_EXTENT {
            rig.request(IoOp::Write { fua: false }, extent * PER_EXTENT, PER_EXTENT);
        }
        rig.copies = false;
        rig
    }

    fn disk(&mut self) {
        while let Some(io) = self.pool.poll_disk() {
            use cairn_replica::Device as _;
            let memory = &mut self.memory;
            let result = match io.op {
                _ if !self.copies => Ok(()),
                DiskOp::Read { offset, buf } => {
                    self.device.read_at(offset.0, memory.bytes_mut(buf))
                }
                DiskOp::Write { offset, buf, .. } => {
                    self.device.write_at(offset.0, memory.bytes(buf))
                }
                DiskOp::Flush => Ok(()),
                DiskOp::Zero { offset, len, .. } => self.device.zero(offset.0, len),
            };
            result.expect("memory does not fail");
            self.pool.handle_disk(io.id, Ok(()), memory);
        }
    }

    fn until_done(&mut self) {
        loop {
            self.disk();
            if let Some(done) = self.pool.poll_done() {
                assert!(done.status.is_ok() && done.error.is_none());
                return;
            }
        }
    }

    fn request(&mut self, op: IoOp, lba: u64, blocks: u64) {
        let range = LbaRange::new(Lba(lba), blocks).expect("within the replica");
        let len = u32::try_from(blocks * 4096).expect("an extent at most");
        let buf: BufSlice = self.buf.slice().sub(0, len);
        self.pool.submit(7, self.slot, IoRequest { op, range, buf }, &mut self.memory);
        self.until_done();
    }
}

fn lookup(c: &mut Criterion) {
    let mut rig = Rig::new();
    let mut lba = 0;
    let mut next = move || {
        lba = (lba + 7_919) % (BLOCKS - 64);
        lba
    };
    for (name, op) in [("read", IoOp::Read), ("write", IoOp::Write { fua: false })] {
        c.bench_function(&format!("{name} 4K, anywhere"), |b| {
            b.iter(|| rig.request(op, next(), 1))
        });
        c.bench_function(&format!("{name} 128K, anywhere"), |b| {
            b.iter(|| rig.request(op, next(), 32));
        });
    }
}

criterion_group!(benches, lookup);
criterion_main!(benches);
