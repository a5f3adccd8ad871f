//! Where a replica keeps what a nexus is about to write over: the undo log of atomic writes.
//!
//! A replica takes reads, writes and zeroes of blocks of 4096 bytes at addresses past anything that a volume can
//! have. What is there is no part of the volume: neither its size nor its snapshots tell of it. Whoever does not
//! know of the log refuses the address.
//!
//! The log has [`ENTRIES`] entries of [`ENTRY_BLOCKS`] blocks: a head, and then what the range held that the head
//! names. Blocks that were never written read as zeros, which is no head.
//!
//! ```text
//!  0  magic "CRNUNDO\0"
//!  8  volume id (16 bytes)
//! 24  first block of the range (u64)     32  blocks of it (u64)
//! 40  of each block of the range: CRC-32C of what the entry holds for it (u32)
//! ```
//!
//! A head may outlive what it tells of, where a replica lost a device that had some of that: what does not have
//! the head's sums is not put back.

use crate::{Lba, LbaRange, VolumeId};

/// The address of the log's first block.
pub const FIRST: u64 = 1 << 48;
/// Atomic writes that a volume has in hand at once.
pub const ENTRIES: u64 = 4;
/// The distance of one entry from the next: two extents of a pool, of which a short range takes one.
pub const ENTRY_BLOCKS: u64 = 512;
/// Blocks of the log.
pub const BLOCKS: u64 = ENTRIES * ENTRY_BLOCKS;
/// Blocks of a range at most.
pub const MAX_BLOCKS: u64 = 256;

const MAGIC: [u8; 8] = *b"CRNUNDO\0";
const SUMS: usize = 40;
const _: () = assert!(MAX_BLOCKS < ENTRY_BLOCKS);
const _: () = assert!(SUMS as u64 + MAX_BLOCKS * 4 <= 4096);

/// What a head tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The range that is written over.
    pub range: LbaRange,
    /// CRC-32C of each of its blocks, as the entry holds it.
    pub sums: Vec<u32>,
}

/// Whether a request to a replica is for its log.
#[inline]
#[must_use]
pub const fn is_of_log(range: LbaRange) -> bool {
    range.start().0 >= FIRST
}

/// All of the log.
#[must_use]
pub fn whole() -> LbaRange {
    LbaRange::new(Lba(FIRST), BLOCKS).expect("far from the last address")
}

/// The head of an entry.
#[must_use]
pub fn head_of(entry: u64) -> LbaRange {
    LbaRange::new(Lba(FIRST + entry * ENTRY_BLOCKS), 1).expect("far from the last address")
}

/// `blocks` blocks of what an entry holds, from the one after the first `skip`.
#[must_use]
pub fn payload_of(entry: u64, skip: u64, blocks: u64) -> LbaRange {
    let first = FIRST + entry * ENTRY_BLOCKS + 1 + skip;
    LbaRange::new(Lba(first), blocks).expect("far from the last address")
}

/// Writes a head over the block `out`, with a sum of each block of `range`.
///
/// # Panics
/// Where `out` is no block, or there are more than [`MAX_BLOCKS`] sums.
pub fn encode_head(volume: VolumeId, range: LbaRange, sums: &[u32], out: &mut [u8]) {
    out.fill(0);
    out[..8].copy_from_slice(&MAGIC);
    out[8..24].copy_from_slice(&volume.to_bytes());
    out[24..32].copy_from_slice(&range.start().0.to_le_bytes());
    out[32..SUMS].copy_from_slice(&range.blocks().to_le_bytes());
    for (at, sum) in out[SUMS..].chunks_exact_mut(4).zip(sums) {
        at.copy_from_slice(&sum.to_le_bytes());
    }
}

/// What a head of this volume tells; none where it is none.
#[must_use]
pub fn decode_head(volume: VolumeId, block: &[u8]) -> Option<Head> {
    let word = |at: usize| Some(u64::from_le_bytes(*block.get(at..at + 8)?.first_chunk()?));
    if *block.get(..8)? != MAGIC || *block.get(8..24)? != volume.to_bytes() {
        return None;
    }
    let range = LbaRange::new(Lba(word(24)?), word(32)?).ok()?;
    let blocks = usize::try_from(range.blocks()).ok()?;
    if !(1..=MAX_BLOCKS).contains(&range.blocks()) {
        return None;
    }
    let sums = block.get(SUMS..SUMS + blocks * 4)?.chunks_exact(4);
    let sums = sums.filter_map(|sum| Some(u32::from_le_bytes(*sum.first_chunk()?))).collect();
    Some(Head { range, sums })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_of_its_volume_and_names_a_range_that_fits() {
        let range = LbaRange::new(Lba(0x1234), 256).unwrap();
        let mut block = [0xff; 4096];
        let sums: Vec<u32> = (1..=256u32).map(|n| n.wrapping_mul(0x0102_0304)).collect();
        encode_head(VolumeId(7), range, &sums, &mut block);
        assert_eq!(block[40..48], [4, 3, 2, 1, 8, 6, 4, 2], "the first two sums");
        assert_eq!(block[1064..], [0; 4096 - 1064]);
        assert_eq!(decode_head(VolumeId(7), &block), Some(Head { range, sums }));
        assert_eq!(decode_head(VolumeId(8), &block), None);
        assert_eq!(decode_head(VolumeId(7), &block[..39]), None);
        assert_eq!(decode_head(VolumeId(7), &block[..1063]), None);
        block[33] = 2;
        assert_eq!(decode_head(VolumeId(7), &block), None, "more blocks than an entry has");
        assert_eq!(decode_head(VolumeId(0), &[0; 4096]), None);
    }

    #[test]
    fn entries_lie_side_by_side() {
        assert!(is_of_log(whole()) && is_of_log(head_of(0)));
        assert_eq!(head_of(3).start().0 + ENTRY_BLOCKS, whole().end().0);
        assert_eq!(payload_of(1, 0, 2).start().0, head_of(1).end().0);
        assert!(!payload_of(0, 0, MAX_BLOCKS).overlaps(head_of(1)));
    }
}
