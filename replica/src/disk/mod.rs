//! The bytes on the device, as `docs/format.md` draws them: encoders, and decoders that trust nothing.
//!
//! Every metadata block begins with one header: what it is, a checksum over all of it, where it
//! belongs, how new it is, and whose it is. A block in the wrong place, of another pool, or torn, does
//! not decode.

mod catalog;
mod journal;
mod sums;
mod superblock;
mod table;

pub use catalog::{
    CATALOG_MAGIC, CONFIG_MAX, CatalogPage, CatalogState, Claim, FLAG_REVERTED, FLAG_REVERTING,
    FLAG_SNAPSHOT, FLAG_THICK, MAX_REPLICA_BYTES, NAME_MAX, Whole,
};
pub use journal::{JOURNAL_MAGIC, JournalBlock, RECORDS_PER_BLOCK, Record};
pub use sums::{BlockSums, PageOf, SUMS_MAGIC, block_crc};
pub use superblock::{
    COMPAT_KNOWN, INCOMPAT_CHECKSUMS, INCOMPAT_KNOWN, MAX_MEMBERS, MAX_SEGMENTS, MemberEntry,
    MemberState, Membership, SUPERBLOCK_MAGIC, Segment, Superblock, VERSION,
};
pub(crate) use superblock::{MAX_EXTENTS, MAX_SLOTS};
pub use table::{ENTRIES_PER_PAGE, Entry, EntryState, TABLE_MAGIC, TablePage};

use cairn_block::PoolId;

/// Bytes of a metadata block, and of a replica's block.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`], for slices.
pub const BLOCK_LEN: usize = 4096;
/// [`BLOCK`], for buffers.
pub const BLOCK_BYTES: u32 = 4096;
/// Bytes of an extent: the unit of allocation.
pub const EXTENT: u64 = 1 << 20;
/// Metadata blocks in an extent.
pub const EXTENT_BLOCKS: u64 = EXTENT / BLOCK;
/// Bytes of the header that every metadata block begins with.
pub const HEADER_LEN: usize = 48;

const CRC_AT: usize = 8;
const _: () = assert!(EXTENT.is_multiple_of(BLOCK));
const _: () = assert!(HEADER_LEN == 6 * 8);

/// Why a block does not decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// Another magic, or none.
    #[error("the block does not carry the magic that belongs here")]
    Magic,
    /// The checksum does not match: torn or rotten.
    #[error("the block's checksum does not match")]
    Checksum,
    /// It verifies, and belongs to another place.
    #[error("the block belongs to another address")]
    Address,
    /// It verifies, and belongs to another pool.
    #[error("the block belongs to another pool")]
    Pool,
    /// A later format version.
    #[error("the block has format version {0}")]
    Version(u16),
    /// A field holds what no writer writes.
    #[error("a field of the block makes no sense: {0}")]
    Field(&'static str),
}

/// The header of a metadata block, less its magic and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The block's own address, in blocks from the start of the device.
    pub address: u64,
    /// The higher of two valid copies is the newer one.
    pub sequence: u64,
    /// The pool that it belongs to.
    pub pool: PoolId,
}

impl Header {
    fn encode(&self, magic: [u8; 8], block: &mut [u8]) {
        assert_eq!(block.len(), BLOCK_LEN, "a metadata block");
        block[..8].copy_from_slice(&magic);
        put_u32(block, CRC_AT, 0);
        put_u16(block, 12, VERSION);
        put_u16(block, 14, 0);
        put_u64(block, 16, self.address);
        put_u64(block, 24, self.sequence);
        block[32..48].copy_from_slice(&self.pool.to_bytes());
    }

    /// Reads and verifies the header of a block that should lie at `address`.
    fn decode(magic: [u8; 8], address: u64, block: &[u8]) -> Result<Self, BlockError> {
        if block.len() != BLOCK_LEN || block[..8] != magic {
            return Err(BlockError::Magic);
        }
        if get_u32(block, CRC_AT) != checksum(block) {
            return Err(BlockError::Checksum);
        }
        let version = get_u16(block, 12);
        if version > VERSION {
            return Err(BlockError::Version(version));
        }
        if get_u64(block, 16) != address {
            return Err(BlockError::Address);
        }
        let pool = PoolId::from_bytes(get_bytes(block, 32));
        Ok(Self { address, sequence: get_u64(block, 24), pool })
    }

    fn decode_for(
        magic: [u8; 8],
        address: u64,
        pool: PoolId,
        block: &[u8],
    ) -> Result<Self, BlockError> {
        let header = Self::decode(magic, address, block)?;
        if header.pool != pool {
            return Err(BlockError::Pool);
        }
        Ok(header)
    }
}

/// The CRC-32 of a block, its checksum field taken as zero.
fn checksum(block: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block[..CRC_AT]);
    hasher.update(&[0; 4]);
    hasher.update(&block[CRC_AT + 4..]);
    hasher.finalize()
}

fn seal(block: &mut [u8]) {
    let crc = checksum(block);
    put_u32(block, CRC_AT, crc);
}

/// Recomputes the checksum of a block that was changed by hand: for tests and fuzzing.
pub fn reseal(block: &mut [u8]) {
    if block.len() == BLOCK_LEN {
        seal(block);
    }
}

fn get_bytes<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}

fn get_u16(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(get_bytes(block, at))
}

fn get_u32(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get_bytes(block, at))
}

fn get_u64(block: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get_bytes(block, at))
}

fn put_u16(block: &mut [u8], at: usize, value: u16) {
    block[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put_u32(block: &mut [u8], at: usize, value: u32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put_u64(block: &mut [u8], at: usize, value: u64) {
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests;
