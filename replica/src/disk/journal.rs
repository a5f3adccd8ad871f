//! The journal ring: blocks of records, each record the new table entry of one extent.

use cairn_block::PoolId;

use super::table::{Entry, EntryState};
use super::{
    BLOCK_LEN, BlockError, HEADER_LEN, Header, get_u16, get_u32, get_u64, put_u16, put_u32,
    put_u64, seal,
};

/// What a journal block begins with.
pub const JOURNAL_MAGIC: [u8; 8] = *b"CAIRNJNL";
/// Records that fit in a block: the largest group that one commit takes.
pub const RECORDS_PER_BLOCK: usize = 126;

const RECORDS_AT: usize = 64;
const RECORD_LEN: usize = 32;
const KIND_SET: u8 = 1;
const _: () = assert!(HEADER_LEN + 16 == RECORDS_AT);
const _: () = assert!(RECORDS_AT + RECORDS_PER_BLOCK * RECORD_LEN == BLOCK_LEN);

/// A change: this extent has this entry from now on. Applying one twice is applying it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The physical extent.
    pub extent: u32,
    /// Its entry.
    pub entry: Entry,
}

/// The head of a journal block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalBlock {
    /// Its place in the order of commits.
    pub sequence: u64,
    /// How many records it holds.
    pub records: usize,
}

impl JournalBlock {
    /// Encodes a block of records that lies at `address`, in blocks.
    pub fn encode(
        sequence: u64,
        address: u64,
        pool: PoolId,
        records: impl Iterator<Item = Record>,
        block: &mut [u8],
    ) {
        block.fill(0);
        Header { address, sequence, pool }.encode(JOURNAL_MAGIC, block);
        let mut count = 0u32;
        for (record, at) in records.zip((RECORDS_AT..BLOCK_LEN).step_by(RECORD_LEN)) {
            put_u32(block, at, record.extent);
            put_u32(block, at + 4, record.entry.logical);
            put_u16(block, at + 8, record.entry.layer);
            block[at + 10] = record.entry.state.to_byte();
            block[at + 11] = KIND_SET;
            block[at + 12] = record.entry.flags();
            put_u64(block, at + 16, record.entry.stamp);
            put_u64(block, at + 24, record.entry.birth);
            count += 1;
        }
        put_u32(block, 48, count);
        seal(block);
    }

    /// Decodes the block that lies at `address`, in blocks.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn decode(address: u64, pool: PoolId, block: &[u8]) -> Result<Self, BlockError> {
        let header = Header::decode_for(JOURNAL_MAGIC, address, pool, block)?;
        let records = get_u32(block, 48) as usize;
        if records > RECORDS_PER_BLOCK || header.sequence > u64::MAX / 2 {
            return Err(BlockError::Field("record count or sequence"));
        }
        Ok(Self { sequence: header.sequence, records })
    }

    /// Record `i` of a block that has decoded.
    ///
    /// # Errors
    /// [`BlockError::Field`].
    ///
    /// # Panics
    /// Where `i` is past the end of a block.
    pub fn record(block: &[u8], i: usize) -> Result<Record, BlockError> {
        assert!(i < RECORDS_PER_BLOCK, "a record past the end of its block");
        let at = RECORDS_AT + i * RECORD_LEN;
        if block[at + 11] != KIND_SET {
            return Err(BlockError::Field("record kind"));
        }
        let entry = Entry {
            state: EntryState::from_byte(block[at + 10])?,
            layer: get_u16(block, at + 8),
            logical: get_u32(block, at + 4),
            stamp: get_u64(block, at + 16),
            dirty: Entry::dirty_of(block[at + 12]),
            incoming: Entry::incoming_of(block[at + 12]),
            copy: Entry::copy_of(block[at + 12]),
            open: Entry::open_of(block[at + 12]),
            birth: get_u64(block, at + 24),
        };
        Ok(Record { extent: get_u32(block, at), entry })
    }
}
