//! Blocks that tell where they belong and which write made them.

/// Every block is this long.
pub(crate) const BLOCK: usize = 4096;
/// First bytes of a block.
const MAGIC: u64 = u64::from_le_bytes(*b"CairnPat");

/// What a block is meant to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The run that wrote it.
    pub(crate) seed: u64,
    /// The block's address.
    pub(crate) lba: u64,
    /// Which write of that block it was, from 1.
    pub(crate) sequence: u64,
}

/// What is wrong with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error("block {lba} reads as zeros; write {sequence} of it was acked")]
    Zeros { lba: u64, sequence: u64 },
    #[error("block {lba} holds no pattern")]
    Foreign { lba: u64 },
    #[error(
        "block {lba} holds write {found_sequence} of block {found_lba} (run {found_seed:x}), not its \
         own write {sequence}"
    )]
    Other { lba: u64, sequence: u64, found_lba: u64, found_sequence: u64, found_seed: u64 },
    #[error("block {lba} is damaged from byte {at}")]
    Damaged { lba: u64, at: usize },
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn words(stamp: Stamp) -> impl Iterator<Item = u64> {
    let mut state = mix(stamp.seed ^ mix(stamp.lba) ^ mix(stamp.sequence).rotate_left(17));
    let body = std::iter::repeat_with(move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        state
    });
    [MAGIC, stamp.seed, stamp.lba, stamp.sequence].into_iter().chain(body).take(BLOCK / 8)
}

/// Fills one block.
pub(crate) fn fill(block: &mut [u8], stamp: Stamp) {
    for (chunk, word) in block.chunks_exact_mut(8).zip(words(stamp)) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

/// The address in a block that this run wrote.
pub(crate) fn lba_of(block: &[u8], seed: u64) -> Option<u64> {
    (word(block, 0) == MAGIC && word(block, 1) == seed).then(|| word(block, 2))
}

fn word(block: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at * 8..at * 8 + 8]);
    u64::from_le_bytes(bytes)
}

/// Checks one block.
pub(crate) fn check(block: &[u8], stamp: Stamp) -> Result<(), Mismatch> {
    let Stamp { lba, sequence, .. } = stamp;
    let wrong = block
        .chunks_exact(8)
        .zip(words(stamp))
        .position(|(chunk, word)| chunk != word.to_le_bytes());
    let Some(at) = wrong else { return Ok(()) };
    if block.iter().all(|&b| b == 0) {
        return Err(Mismatch::Zeros { lba, sequence });
    }
    if word(block, 0) != MAGIC {
        return Err(Mismatch::Foreign { lba });
    }
    let found = Stamp { seed: word(block, 1), lba: word(block, 2), sequence: word(block, 3) };
    if found == stamp {
        return Err(Mismatch::Damaged { lba, at: at * 8 });
    }
    Err(Mismatch::Other {
        lba,
        sequence,
        found_lba: found.lba,
        found_sequence: found.sequence,
        found_seed: found.seed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_wrong_block_is_told() {
        let stamp = Stamp { seed: 7, lba: 12, sequence: 3 };
        let mut block = vec![0; BLOCK];
        assert_eq!(check(&block, stamp), Err(Mismatch::Zeros { lba: 12, sequence: 3 }));
        fill(&mut block, stamp);
        assert_eq!(check(&block, stamp), Ok(()));
        let later = Stamp { sequence: 4, ..stamp };
        assert!(matches!(check(&block, later), Err(Mismatch::Other { found_sequence: 3, .. })));
        block[4000] ^= 1;
        assert_eq!(check(&block, stamp), Err(Mismatch::Damaged { lba: 12, at: 4000 }));
        block[0] ^= 1;
        assert_eq!(check(&block, stamp), Err(Mismatch::Foreign { lba: 12 }));
    }
}
