//! The checksum page of an extent: a CRC-32C for each of its blocks.

use cairn_block::PoolId;
use crc_fast::{CrcAlgorithm, Digest};

use super::{
    BLOCK_LEN, BlockError, EXTENT_BLOCKS, HEADER_LEN, Header, get_u32, get_u64, put_u32, put_u64,
    seal,
};

/// What a checksum page begins with.
pub const SUMS_MAGIC: [u8; 8] = *b"CAIRNSUM";

const BIRTH_AT: usize = 56;
const VALID_AT: usize = 64;
const SUMS_AT: usize = 96;
const ZEROED_AT: usize = SUMS_AT + 4 * BLOCKS;
const INCOMING_AT: usize = ZEROED_AT + BLOCKS / 8;
const BAD_AT: usize = INCOMING_AT + BLOCKS / 8;
const BLOCKS: usize = 256;
const _: () = assert!(EXTENT_BLOCKS == BLOCKS as u64);
const _: () = assert!(HEADER_LEN + 16 == VALID_AT && VALID_AT + BLOCKS / 8 == SUMS_AT);
const _: () = assert!(BAD_AT + BLOCKS / 8 <= BLOCK_LEN);

/// Which extent a page is of, in which of its lives, and how new the page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageOf {
    /// The extent.
    pub extent: u32,
    /// [`Entry::birth`](super::Entry::birth) of the extent.
    pub birth: u64,
    /// One more at each write of the page; its lowest bit is the copy that it is written to.
    pub sequence: u64,
}

/// The checksums of an extent's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSums {
    /// A bit for each block that holds data.
    pub valid: [u64; 4],
    /// A bit for each block that was zeroed here: where it holds no data it reads as zeros, and what the
    /// parent layer has is not seen. Once set it stays.
    pub zeroed: [u64; 4],
    /// A bit for each block that is being copied here from the parent layer: after a crash it holds data
    /// only where its checksum is right, whatever is in it.
    pub incoming: [u64; 4],
    /// A bit for each block of which nothing is known, since the page before was damaged: it cannot be
    /// read until it is written.
    pub bad: [u64; 4],
    /// The CRC-32C of each block that holds data.
    pub crc: [u32; BLOCKS],
}

impl Default for BlockSums {
    fn default() -> Self {
        Self { valid: [0; 4], zeroed: [0; 4], incoming: [0; 4], bad: [0; 4], crc: [0; BLOCKS] }
    }
}

/// The CRC-32C of the block at `address` (in blocks from the start of the device). The address seeds
/// it, so that a block in another's place does not verify.
#[must_use]
pub fn block_crc(address: u64, block: &[u8]) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    let seed = (address as u32) ^ ((address >> 32) as u32).wrapping_mul(0x9e37_79b1);
    // An earlier CRC goes in complemented, as it comes out.
    let begun = u64::from(!seed);
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, begun);
    digest.update(block);
    #[expect(clippy::cast_possible_truncation, reason = "a CRC of 32 bits")]
    let crc = digest.finalize() as u32;
    crc
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

    /// Of an extent whose page is damaged: every block may hold something, and none can be read.
    #[must_use]
    pub fn unknown() -> Self {
        Self { valid: [u64::MAX; 4], bad: [u64::MAX; 4], ..Self::default() }
    }

    /// Whether anything but data has been noted: what was zeroed, is being copied, or is not known.
    #[must_use]
    pub fn tells_of_layers(&self) -> bool {
        [self.zeroed, self.incoming, self.bad].into_iter().flatten().any(|bits| bits != 0)
    }

    /// Block `at` was never written here.
    pub fn forget(&mut self, at: usize) {
        self.valid[at / 64] &= !(1 << (at % 64));
        self.crc[at] = 0;
    }

    /// Block `at` was zeroed: it reads as zeros.
    pub fn clear(&mut self, at: usize) {
        self.zeroed[at / 64] |= 1 << (at % 64);
        self.valid[at / 64] &= !(1 << (at % 64));
        self.crc[at] = 0;
    }

    /// Encodes the page of `of` that lies at `address`, in blocks.
    pub fn encode(&self, of: &PageOf, address: u64, pool: PoolId, block: &mut [u8]) {
        block.fill(0);
        Header { address, sequence: of.sequence, pool }.encode(SUMS_MAGIC, block);
        put_u32(block, 48, of.extent);
        put_u64(block, BIRTH_AT, of.birth);
        for (i, word) in self.zeroed.iter().enumerate() {
            put_u64(block, ZEROED_AT + i * 8, *word);
        }
        for (i, word) in self.bad.iter().enumerate() {
            put_u64(block, BAD_AT + i * 8, *word);
        }
        for (i, word) in self.incoming.iter().enumerate() {
            put_u64(block, INCOMING_AT + i * 8, *word);
        }
        for (i, word) in self.valid.iter().enumerate() {
            put_u64(block, VALID_AT + i * 8, *word);
        }
        for (i, crc) in self.crc.iter().enumerate() {
            put_u32(block, SUMS_AT + i * 4, *crc);
        }
        seal(block);
    }

    /// When the extent was allocated of which this is a page, as it says. The block need not decode.
    pub(crate) fn stored_birth(block: &[u8]) -> u64 {
        get_u64(block, BIRTH_AT)
    }

    /// Decodes the page of extent `extent`, born at `birth`, that lies at `address`, in blocks. Also
    /// returns its sequence.
    ///
    /// # Errors
    /// [`BlockError`].
    pub fn decode(
        extent: u32,
        birth: u64,
        address: u64,
        pool: PoolId,
        block: &[u8],
    ) -> Result<(Self, u64), BlockError> {
        let header = Header::decode_for(SUMS_MAGIC, address, pool, block)?;
        if get_u32(block, 48) != extent || get_u64(block, BIRTH_AT) != birth {
            return Err(BlockError::Field("extent, or when it was allocated"));
        }
        if header.sequence > u64::MAX / 2 {
            return Err(BlockError::Field("sequence"));
        }
        let mut sums = Self::default();
        for (i, word) in sums.valid.iter_mut().enumerate() {
            *word = get_u64(block, VALID_AT + i * 8);
        }
        for (i, crc) in sums.crc.iter_mut().enumerate() {
            *crc = get_u32(block, SUMS_AT + i * 4);
        }
        for (i, word) in sums.bad.iter_mut().enumerate() {
            *word = get_u64(block, BAD_AT + i * 8);
        }
        for (i, word) in sums.incoming.iter_mut().enumerate() {
            *word = get_u64(block, INCOMING_AT + i * 8);
        }
        for (i, word) in sums.zeroed.iter_mut().enumerate() {
            *word = get_u64(block, ZEROED_AT + i * 8);
        }
        Ok((sums, header.sequence))
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
        let of = PageOf { extent: 3, birth: 5, sequence: 9 };
        sums.encode(&of, 40, PoolId(1), &mut block);
        assert_eq!(BlockSums::decode(3, 5, 40, PoolId(1), &block), Ok((sums, 9)));
        assert!(BlockSums::decode(4, 5, 40, PoolId(1), &block).is_err());
        assert!(BlockSums::decode(3, 6, 40, PoolId(1), &block).is_err());
        block[200] ^= 1;
        assert_eq!(BlockSums::decode(3, 5, 40, PoolId(1), &block), Err(BlockError::Checksum));
    }

    /// CRC-32C of 32 zeros, and of 32 bytes of 0xff, from RFC 3720, B.4.
    #[test]
    fn the_crc_is_crc32c() {
        assert_eq!(block_crc(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(block_crc(0, &[0xff; 32]), 0x62a8_ab43);
        // Begun with the CRC of what comes before, it goes on with it.
        let before = block_crc(0, b"12345");
        assert_eq!(block_crc(u64::from(before), b"6789"), 0xe306_9283);
    }

    #[test]
    fn the_address_is_part_of_a_blocks_checksum() {
        let block = [5; BLOCK_LEN];
        assert_ne!(block_crc(1, &block), block_crc(2, &block));
        assert_ne!(block_crc(1, &block), block_crc(1 + (1 << 32), &block));
    }
}
