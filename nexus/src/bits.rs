//! A set of logical extents.

/// A bit for each logical extent of a volume, and how many are set.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bits {
    words: Vec<u64>,
    count: usize,
}

impl Bits {
    pub(crate) fn with_len(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], count: 0 }
    }

    /// How many are in it.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn has(&self, at: u32) -> bool {
        self.words.get(at as usize / 64).is_some_and(|w| w >> (at % 64) & 1 != 0)
    }

    pub(crate) fn insert(&mut self, at: u32) {
        let word = at as usize / 64;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        if self.words[word] >> (at % 64) & 1 == 0 {
            self.words[word] |= 1 << (at % 64);
            self.count += 1;
        }
    }

    pub(crate) fn remove(&mut self, at: u32) {
        if self.has(at) {
            self.words[at as usize / 64] &= !(1 << (at % 64));
            self.count -= 1;
        }
    }

    /// The first one at or after `from`.
    pub(crate) fn next(&self, from: u32) -> Option<u32> {
        let (mut word, mut skip) = (from as usize / 64, from % 64);
        while let Some(&bits) = self.words.get(word) {
            let left = bits >> skip << skip;
            if left != 0 {
                let at = word * 64 + left.trailing_zeros() as usize;
                return Some(u32::try_from(at).expect("extents are counted in 32 bits"));
            }
            (word, skip) = (word + 1, 0);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_in_order() {
        let mut bits = Bits::with_len(100);
        for at in [0, 63, 64, 99, 300, 64] {
            bits.insert(at);
        }
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(at) = bits.next(from) {
            found.push(at);
            from = at + 1;
        }
        assert_eq!((found, bits.len()), (vec![0, 63, 64, 99, 300], 5));
        bits.remove(64);
        bits.remove(65);
        assert!(!bits.has(64) && bits.has(63) && bits.len() == 4 && !bits.is_empty());
    }
}
