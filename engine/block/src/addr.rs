//! Addresses and lengths, each a type of its own so that a block number is never taken for a byte.

/// The size of a logical block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum BlockSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    #[default]
    B4096,
}

impl BlockSize {
    /// Bytes in one block.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        1 << self.shift()
    }

    /// Bytes in `blocks` blocks.
    #[must_use]
    pub const fn bytes_of(self, blocks: u64) -> u64 {
        blocks << self.shift()
    }

    /// The base-2 logarithm of the size: NVMe's LBADS.
    #[must_use]
    pub const fn shift(self) -> u8 {
        match self {
            Self::B512 => 9,
            Self::B4096 => 12,
        }
    }

    /// The block size of `bytes`, if it is one that Cairn serves.
    #[must_use]
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        match bytes {
            512 => Some(Self::B512),
            4096 => Some(Self::B4096),
            _ => None,
        }
    }
}

/// A byte position on a device or in a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteOffset(pub u64);

impl ByteOffset {
    /// This position moved on by `bytes`, or nothing where it would overflow.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

/// A logical block address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lba(pub u64);

impl Lba {
    /// Where this block begins, or nothing where it lies past 2^64 bytes.
    #[must_use]
    pub const fn byte_offset(self, size: BlockSize) -> Option<ByteOffset> {
        match self.0.checked_mul(size.bytes() as u64) {
            Some(bytes) => Some(ByteOffset(bytes)),
            None => None,
        }
    }
}

/// Why a range is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The last block would lie past 2^64 - 1.
    #[error("the range ends past the last block address")]
    Overflow,
    /// The range reaches past the end of what it addresses.
    #[error("the range ends past the end of the volume")]
    PastEnd,
}

/// Blocks `start .. start + blocks`. The end never overflows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LbaRange {
    start: Lba,
    blocks: u64,
}

impl LbaRange {
    /// The range of `blocks` blocks from `start`.
    ///
    /// # Errors
    /// [`RangeError::Overflow`] where the end is past 2^64 - 1.
    pub const fn new(start: Lba, blocks: u64) -> Result<Self, RangeError> {
        match start.0.checked_add(blocks) {
            Some(_) => Ok(Self { start, blocks }),
            None => Err(RangeError::Overflow),
        }
    }

    /// As [`LbaRange::new`], and within a volume of `capacity` blocks.
    ///
    /// # Errors
    /// [`RangeError::Overflow`] and [`RangeError::PastEnd`].
    pub const fn within(start: Lba, blocks: u64, capacity: u64) -> Result<Self, RangeError> {
        match Self::new(start, blocks) {
            Ok(range) if range.end().0 <= capacity => Ok(range),
            Ok(_) => Err(RangeError::PastEnd),
            Err(e) => Err(e),
        }
    }

    /// The first block.
    #[must_use]
    pub const fn start(self) -> Lba {
        self.start
    }

    /// How many blocks.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        self.blocks
    }

    /// The block after the last one.
    #[must_use]
    pub const fn end(self) -> Lba {
        Lba(self.start.0 + self.blocks)
    }

    /// Whether there is no block in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.blocks == 0
    }

    /// Whether the two have a block in common.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_refuse_to_overflow() {
        assert_eq!(LbaRange::new(Lba(u64::MAX), 1), Err(RangeError::Overflow));
        assert_eq!(LbaRange::within(Lba(8), 3, 10), Err(RangeError::PastEnd));
        assert!(LbaRange::within(Lba(8), 2, 10).is_ok());
        assert_eq!(Lba(u64::MAX).byte_offset(BlockSize::B4096), None);
        assert_eq!(ByteOffset(u64::MAX).checked_add(1), None);
    }

    #[test]
    fn overlap_is_of_half_open_ranges() {
        let r = |s, n| LbaRange::new(Lba(s), n).unwrap();
        assert!(r(0, 4).overlaps(r(3, 1)));
        assert!(!r(0, 4).overlaps(r(4, 1)));
        assert!(!r(2, 0).overlaps(r(0, 4)) || r(2, 0).is_empty());
    }
}
