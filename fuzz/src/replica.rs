//! What a damaged or hostile device can hold: every decoder of the pool's structures, and open.

use cairn_block::{
    BlockSize, BufSlice, HeapMemory, IoOp, IoRequest, Lba, LbaRange, Memory, PoolId, ReplicaId,
    VolumeId,
};
use cairn_replica::disk::{
    BLOCK_LEN, CatalogPage, ENTRIES_PER_PAGE, JournalBlock, Superblock, TablePage, reseal,
};
use cairn_replica::{
    CheckOptions, Device, DiskOp, FormatOptions, MemDevice, Pool, ReplicaSlot, ReplicaSpec,
    check_pool, inspect_checksums, inspect_dirty, inspect_extents, inspect_journal, inspect_map,
    inspect_superblock,
};

const POOL: PoolId = PoolId(0xca1);
const DEVICE_LEN: usize = 8 << 20;
/// Device operations and mutations of one run.
const MAX_STEPS: usize = 4096;

/// The first 4096 bytes of `data`, with zeros after what there is, and with a checksum that is right.
fn block(data: &[u8]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_LEN];
    let len = data.len().min(BLOCK_LEN);
    block[..len].copy_from_slice(&data[..len]);
    reseal(&mut block);
    block
}

/// Where the block says that it belongs, so that the address does not end every run.
fn address(block: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[16..24]);
    u64::from_le_bytes(bytes)
}

fn pool(block: &[u8]) -> PoolId {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&block[32..48]);
    PoolId::from_bytes(bytes)
}

/// A superblock: what decodes encodes to what decodes the same.
pub fn superblock(data: &[u8]) {
    let mut bytes = block(data);
    let at = address(&bytes);
    if let Ok(decoded) = Superblock::decode(at, &bytes)
        && !decoded.segments.is_empty()
    {
        decoded.encode(at, &mut bytes);
        assert_eq!(Superblock::decode(at, &bytes).as_ref(), Ok(&decoded));
        let _ = (decoded.backup(), decoded.extents());
        let _ = decoded.catalog_address(decoded.slots - 1, 1);
        let _ = decoded.journal_address(decoded.journal_tail);
    }
}

/// A journal block and its records.
pub fn journal(data: &[u8]) {
    let bytes = block(data);
    if let Ok(head) = JournalBlock::decode(address(&bytes), pool(&bytes), &bytes) {
        for i in 0..head.records {
            let _ = JournalBlock::record(&bytes, i);
        }
    }
}

/// A catalog page: what decodes encodes to what decodes the same.
pub fn catalog_page(data: &[u8]) {
    let mut bytes = block(data);
    let (at, pool) = (address(&bytes), pool(&bytes));
    let slot = u16::from_le_bytes([bytes[48], bytes[49]]);
    if let Ok(page) = CatalogPage::decode(slot, at, pool, &bytes) {
        page.encode(slot, at, pool, &mut bytes);
        assert_eq!(CatalogPage::decode(slot, at, pool, &bytes), Ok(page));
    }
}

/// A table page and its entries.
pub fn table_page(data: &[u8]) {
    let bytes = block(data);
    let u32_at =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let (index, entries) = (u32_at(48), u32_at(52));
    let decoded = TablePage::decode(index, entries, address(&bytes), pool(&bytes), &bytes);
    if decoded.is_ok() {
        for i in 0..entries.min(ENTRIES_PER_PAGE) {
            let _ = TablePage::entry(&bytes, i);
        }
    }
}

/// Mutates a small pool, opens it, and reads, writes and deletes everything in it. Each mutation is 6
/// bytes: a block (u16), a place in it (u16, whose top bit asks for a right checksum), a mask, and a
/// count of repetitions.
pub fn open_damaged(data: &[u8]) {
    let Some(mut dev) = small_pool() else { return };
    for mutation in data.chunks_exact(6).take(MAX_STEPS) {
        let word = |i: usize| u16::from_le_bytes([mutation[i], mutation[i + 1]]);
        let at = (usize::from(word(0)) % (DEVICE_LEN / BLOCK_LEN)) * BLOCK_LEN;
        let place = usize::from(word(2)) % BLOCK_LEN;
        let end = BLOCK_LEN.min(place + 1 + usize::from(mutation[5]));
        for byte in &mut dev.0[at + place..at + end] {
            *byte ^= mutation[4];
        }
        if word(2) & 0x8000 != 0 {
            reseal(&mut dev.0[at..at + BLOCK_LEN]);
        }
    }
    let _ = Pool::probe(&mut dev);
    let _ = inspect_superblock(&mut dev);
    let _ = inspect_journal(&mut dev);
    let _ = inspect_extents(&mut dev);
    let _ = inspect_map(&mut dev, None);
    let _ = inspect_dirty(&mut dev);
    let _ = inspect_checksums(&mut dev, None, true);
    let mut mended = dev.clone();
    if let Ok(report) = check_pool(&mut mended, &CheckOptions { repair: true, data: false })
        && !report.is_damaged()
        && let Err(error) = Pool::open(&mut mended)
    {
        panic!("the check finds no damage left ({:?}), and open says: {error}", report.findings);
    }
    if let Ok(mut pool) = Pool::open(&mut dev) {
        pool.check();
        use_everything(&mut pool, &mut dev);
    }
}

fn use_everything(pool: &mut Pool, dev: &mut MemDevice) {
    let mut mem = HeapMemory::new(1 << 20);
    let Some(buf) = mem.alloc(8192) else { return };
    let replicas: Vec<_> = pool.replicas().collect();
    for replica in &replicas {
        for extent in 0..replica.blocks.div_ceil(256).min(16) {
            let lba = Lba(extent * 256);
            let blocks = 2.min(replica.blocks - lba.0);
            let Ok(range) = LbaRange::new(lba, blocks) else { continue };
            let slice = if blocks == 2 { buf.slice() } else { buf.slice().sub(0, 4096) };
            for op in [IoOp::Read, IoOp::Write { fua: true }, IoOp::Discard] {
                let request = IoRequest { op, range, buf: slice };
                pool.submit(0, replica.slot, request, &mut mem);
                run(pool, dev, &mut mem);
            }
        }
        pool.delete_replica(1, replica.slot, &mut mem);
        run(pool, dev, &mut mem);
    }
    pool.checkpoint(2, &mut mem);
    run(pool, dev, &mut mem);
    pool.check();
}

fn run(pool: &mut Pool, dev: &mut MemDevice, mem: &mut HeapMemory) {
    for _ in 0..MAX_STEPS {
        let Some(io) = pool.poll_disk() else { break };
        let result = match io.op {
            DiskOp::Read { offset, buf } => dev.read_at(offset.0, mem.bytes_mut(buf)),
            DiskOp::Write { offset, buf, .. } => dev.write_at(offset.0, mem.bytes(buf)),
            DiskOp::Flush => Ok(()),
            DiskOp::Zero { offset, len, .. } => dev.zero(offset.0, len),
        };
        result.expect("a pool stays within its device");
        pool.handle_disk(io.id, Ok(()), mem);
    }
    while pool.poll_done().is_some() {}
}

/// A pool with a replica that has extents, in the table and in the journal.
fn small_pool() -> Option<MemDevice> {
    let mut dev = MemDevice::new(DEVICE_LEN);
    let options =
        FormatOptions { pool_id: POOL, device_is_zeroed: true, sector_size: 512, force: false };
    Pool::format(&mut dev, &options).ok()?;
    let mut pool = Pool::open(&mut dev).ok()?;
    let mut mem = HeapMemory::new(1 << 20);
    let spec = ReplicaSpec {
        id: ReplicaId(1),
        volume: VolumeId(2),
        name: "fuzzed".to_owned(),
        blocks: 1000,
        block_size: BlockSize::B4096,
        thick: false,
        source: None,
    };
    pool.create_replica(1, spec, &mut mem);
    run(&mut pool, &mut dev, &mut mem);
    let buf = mem.alloc(4096)?;
    mem.bytes_mut(buf.slice()).fill(0x5a);
    for lba in [0, 300, 600] {
        let range = LbaRange::new(Lba(lba), 1).ok()?;
        let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
        pool.submit(2, ReplicaSlot(0), request, &mut mem);
        run(&mut pool, &mut dev, &mut mem);
        if lba == 300 {
            pool.checkpoint(3, &mut mem);
            run(&mut pool, &mut dev, &mut mem);
        }
    }
    let range = LbaRange::new(Lba(256), 256).ok()?;
    let request = IoRequest { op: IoOp::Discard, range, buf: BufSlice::EMPTY };
    pool.submit(4, ReplicaSlot(0), request, &mut mem);
    run(&mut pool, &mut dev, &mut mem);
    mem.release(buf);
    Some(dev)
}

/// One block of each kind out of a pool in use, and a few mutations for [`open_damaged`].
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    if let Some(mut dev) = small_pool() {
        let copies = inspect_superblock(&mut dev).unwrap_or_default();
        if let Some(superblock) = copies.into_iter().find_map(|copy| copy.content.ok()) {
            let segment = superblock.segments[0];
            let addresses = [
                0,
                superblock.catalog_address(0, 0),
                superblock.journal_address(1),
                segment.page_address(0, 0),
                segment.page_address(0, 1),
            ];
            for address in addresses {
                let at = usize::try_from(address).map_or(0, |a| a * BLOCK_LEN);
                seeds.push(dev.0[at..at + BLOCK_LEN].to_vec());
            }
        }
    }
    for block in [0u8, 1, 2, 3, 34, 98, 99] {
        seeds.push(vec![block, 0, 100, 0x80, 0x41, 0]);
        seeds.push(vec![block, 0, 100, 0, 0x41, 7]);
    }
    seeds
}
