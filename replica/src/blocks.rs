//! A set of the blocks of one extent.

use crate::disk::EXTENT_BLOCKS;

/// Some of an extent's 256 blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct BlockSet(pub(crate) [u64; 4]);

const _: () = assert!(EXTENT_BLOCKS == 4 * 64);

impl BlockSet {
    /// `blocks` blocks from `first`.
    pub(crate) fn range(first: u32, blocks: u32) -> Self {
        let mut set = Self::default();
        for (word, base) in set.0.iter_mut().zip((0u32..).step_by(64)) {
            let from = first.clamp(base, base + 64) - base;
            let to = (first + blocks).clamp(base, base + 64) - base;
            if from < to {
                *word = (u64::MAX >> (64 - (to - from))) << from;
            }
        }
        set
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == [0; 4]
    }

    pub(crate) fn contains(self, block: u32) -> bool {
        self.0[block as usize / 64] >> (block % 64) & 1 != 0
    }

    fn with(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self(core::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    pub(crate) fn and(self, other: Self) -> Self {
        self.with(other, |a, b| a & b)
    }

    pub(crate) fn or(self, other: Self) -> Self {
        self.with(other, |a, b| a | b)
    }

    pub(crate) fn minus(self, other: Self) -> Self {
        self.with(other, |a, b| a & !b)
    }

    /// The first run of neighbours at or after `from`: its first block and its length.
    pub(crate) fn run(self, from: u32) -> Option<(u32, u32)> {
        const END: u32 = 256;
        let first = (from..END).find(|&b| self.contains(b))?;
        let end = (first..END).find(|&b| !self.contains(b)).unwrap_or(END);
        Some((first, end - first))
    }

    /// All runs of neighbours.
    pub(crate) fn runs(self) -> impl Iterator<Item = (u32, u32)> {
        let mut from = 0;
        core::iter::from_fn(move || {
            let (first, len) = self.run(from)?;
            from = first + len;
            Some((first, len))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_runs_are_each_others_inverse() {
        for (first, len) in [(0, 1), (0, 256), (63, 2), (64, 64), (1, 255), (200, 7), (60, 140)] {
            let set = BlockSet::range(first, len);
            assert_eq!(set.runs().collect::<Vec<_>>(), [(first, len)]);
            assert_eq!((0..256).filter(|&b| set.contains(b)).count(), len as usize);
        }
        assert!(BlockSet::range(9, 0).is_empty());
        let two =
            BlockSet::range(3, 4).or(BlockSet::range(100, 100)).minus(BlockSet::range(120, 1));
        assert_eq!(two.runs().collect::<Vec<_>>(), [(3, 4), (100, 20), (121, 79)]);
        assert_eq!(two.and(BlockSet::range(0, 5)).run(0), Some((3, 2)));
        assert_eq!(two.run(200), None);
    }
}
