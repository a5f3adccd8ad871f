//! The checksum page of an extent: a CRC-32C for each of its blocks.

use cairn_block::PoolId;

use super::{
    BLOCK_LEN, BlockError, EXTENT_BLOCKS, HEADER_LEN, Header, get_u32, get_u64, put_u32, put_u64,
    seal,
};

/// What a checksum page begins with.
pub const SUMS_MAGIC: [u8; 8] = *b"CAIRNSUM";

const VALID_AT: usize = 64;
const SUMS_AT: usize = 96;
const BLOCKS: usize = 256;
const _: () = assert!(EXTENT_BLOCKS == BLOCKS as u64);
const _: () = assert!(HEADER_LEN + 16 == VALID_AT && VALID_AT + BLOCKS / 8 == SUMS_AT);
const _: () = assert!(SUMS_AT + BLOCKS * 4 <= BLOCK_LEN);

/// The checksums of an extent's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSums {
    /// A bit for each block that holds data; the others read as zeros.
    pub valid: [u64; 4],
    /// The CRC-32C of each block that holds data.
    pub crc: [u32; BLOCKS],
}

impl Default for BlockSums {
    fn default() -> Self {
        Self { valid: [0; 4], crc: [0; BLOCKS] }
    }
}

/// The CRC-32C of the block at `address` (in blocks from the start of the device). The address seeds
/// it, so that a block in another's place does not verify.
#[must_use]
pub fn block_crc(address: u64, block: &[u8]) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    let seed = (address as u32) ^ ((address >> 32) as u32).wrapping_mul(0x9e37_79b1);
    crc32c::crc32c_append(seed, block)
}

impl BlockSums {
    /// Whether block `at` holds data.
    #[must_use]
    pub fn is_valid(&self, at: usize) -> bool {
        self.valid[at / 64] >> (at % 64) & 1 != 0
    }

    /// Block `at` holds data with this checksum.
    pub fn set(&mut self, at: usize, crc: u32) {
        self.valid[at / 64] |= 1 << (at % 64);
        self.crc[at] = crc;
    }

    /// Block `at` reads as zeros.
    pub fn clear(&mut self, at: usize) {
        self.valid[at / 64] &= !(1 << (at % 64));
        self.crc[at] = 0;
    }

    /// Encodes the page of extent `extent` that lies at `address`, in blocks.
    pub fn encode(&self, extent: u32, address: u64, pool: PoolId, block: &mut [u8]) {
        block.fill(0);
        Header { address, sequence: 0, pool }.encode(SUMS_MAGIC, block);
        put_u32(block, 48, extent);
        for (i, word) in self.valid.iter().enumerate() {
            put_u64(block, VALID_AT + i * 8, *word);
        }
        for (i, crc) in self.crc.iter().enumerate() {
            put_u32(block, SUMS_AT + i * 4, *crc);
        }
        seal(block);
    }

    /// Decodes the page of extent `extent` that lies at `address`, in blocks.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn decode(
        extent: u32,
        address: u64,
        pool: PoolId,
        block: &[u8],
    ) -> Result<Self, BlockError> {
        Header::decode_for(SUMS_MAGIC, address, pool, block)?;
        if get_u32(block, 48) != extent {
            return Err(BlockError::Field("extent"));
        }
        let mut sums = Self::default();
        for (i, word) in sums.valid.iter_mut().enumerate() {
            *word = get_u64(block, VALID_AT + i * 8);
        }
        for (i, crc) in sums.crc.iter_mut().enumerate() {
            *crc = get_u32(block, SUMS_AT + i * 4);
        }
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_survives_and_a_flipped_bit_is_seen() {
        let mut sums = BlockSums::default();
        sums.set(0, 7);
        sums.set(255, 9);
        sums.set(100, 1);
        sums.clear(100);
        let mut block = vec![0; BLOCK_LEN];
        sums.encode(3, 40, PoolId(1), &mut block);
        assert_eq!(BlockSums::decode(3, 40, PoolId(1), &block), Ok(sums));
        assert!(BlockSums::decode(4, 40, PoolId(1), &block).is_err());
        block[200] ^= 1;
        assert_eq!(BlockSums::decode(3, 40, PoolId(1), &block), Err(BlockError::Checksum));
    }

    #[test]
    fn the_address_is_part_of_a_blocks_checksum() {
        let block = [5; BLOCK_LEN];
        assert_ne!(block_crc(1, &block), block_crc(2, &block));
        assert_ne!(block_crc(1, &block), block_crc(1 + (1 << 32), &block));
    }
}
