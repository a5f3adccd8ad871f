//! A sanitize of a volume (SBC-4, section 4.11): what is done to its blocks, and how far it is. A plain value, and its
//! bytes, which the volume's voters keep.
//!
//! ```text
//!      0        1        2        3        4        5        6        7
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |method  |flags   |passes  |pass    |     bytes of the pattern, u32     |
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |                the first block of the pass that is not done           |
//!  +--------+--------+--------+--------+--------+--------+--------+--------+
//!  |  the pattern ...
//! ```
//!
//! Little-endian. `method`: 1 erases, 2 overwrites. `flags`: 1 the failure may be left, 2 it failed, 4 the pattern is
//! inverted in every other pass.

const ERASE: u8 = 1;
const OVERWRITE: u8 = 2;
const UNRESTRICTED: u8 = 1;
const FAILED: u8 = 2;
const INVERT: u8 = 4;
const HEADER_LEN: usize = 16;
/// The most bytes after which what a block is overwritten with begins again: so many are kept beside the rest of a
/// volume's configuration.
pub const MAX_PATTERN: usize = 512;
/// The most bytes of a sanitize.
pub const MAX_SANITIZE: usize = HEADER_LEN + MAX_PATTERN;
/// Passes of an overwrite at most: five bits tell them.
const MAX_PASSES: u8 = 31;

/// What is done to every block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// BLOCK ERASE: it is unmapped, and reads as zeros.
    Erase,
    /// OVERWRITE: it is written.
    Overwrite {
        /// What with, as often as it fits in a block.
        pattern: Pattern,
        /// How many times, 1 to 31.
        passes: u8,
        /// Every other time with the bits inverted.
        invert: bool,
    },
}

/// What blocks are overwritten with: 1 to [`MAX_PATTERN`] bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Vec<u8>);

impl Pattern {
    /// That fills a block of `block_len` bytes as `bytes` do, again and again from its start. Nothing where that is not
    /// the same with [`MAX_PATTERN`] bytes or fewer.
    #[must_use]
    pub fn of(bytes: &[u8], block_len: usize) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let block: Vec<u8> = bytes.iter().copied().cycle().take(block_len).collect();
        let repeats = |len: &usize| block[*len..].iter().zip(&block).all(|(a, b)| a == b);
        let len = (1..=MAX_PATTERN.min(block_len)).find(repeats)?;
        Some(Self(block[..len].to_vec()))
    }

    /// Fills one block.
    fn fill(&self, inverted: bool, block: &mut [u8]) {
        let flip = if inverted { 0xff } else { 0 };
        for (byte, of) in block.iter_mut().zip(self.0.iter().cycle()) {
            *byte = of ^ flip;
        }
    }
}

/// A sanitize that is under way, or failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sanitize {
    /// What is done.
    pub method: Method,
    /// AUSE: where it fails, EXIT FAILURE MODE lets hosts use the volume again.
    pub unrestricted: bool,
    /// It failed: hosts use nothing of the volume before another one is done.
    pub failed: bool,
    /// The pass that is being done, from 0.
    pub pass: u8,
    /// The first block of it that is not done.
    pub next: u64,
}

/// Bytes that are no sanitize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what is stored of the volume's sanitize makes no sense: it is damaged")]
pub struct NotSanitize;

impl Sanitize {
    /// One that begins.
    #[must_use]
    pub fn new(method: Method, unrestricted: bool) -> Self {
        Self { method, unrestricted, failed: false, pass: 0, next: 0 }
    }

    /// How many times each block is done.
    #[must_use]
    pub fn passes(&self) -> u8 {
        match self.method {
            Method::Erase => 1,
            Method::Overwrite { passes, .. } => passes,
        }
    }

    /// Fills one block as the pass has it; leaves it alone where nothing is written.
    pub fn fill(&self, block: &mut [u8]) {
        if let Method::Overwrite { pattern, invert, .. } = &self.method {
            pattern.fill(*invert && self.pass % 2 == 1, block);
        }
    }

    /// How much is done of a volume of so many blocks, in 65536ths (PROGRESS INDICATION).
    #[must_use]
    pub fn progress(&self, blocks: u64) -> u16 {
        let all = u128::from(blocks.max(1)) * u128::from(self.passes());
        let done = u128::from(blocks) * u128::from(self.pass) + u128::from(self.next);
        u16::try_from((done << 16) / all).unwrap_or(u16::MAX)
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (method, pattern, invert) = match &self.method {
            Method::Erase => (ERASE, [].as_slice(), false),
            Method::Overwrite { pattern, invert, .. } => (OVERWRITE, pattern.0.as_slice(), *invert),
        };
        let flags = [(self.unrestricted, UNRESTRICTED), (self.failed, FAILED), (invert, INVERT)];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        let mut out = vec![method, flags, self.passes(), self.pass];
        let len = u32::try_from(pattern.len()).expect("a pattern is short");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&self.next.to_le_bytes());
        out.extend_from_slice(pattern);
        out
    }

    /// Of bytes.
    ///
    /// # Errors
    /// Bytes that make no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, NotSanitize> {
        let (header, pattern) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(NotSanitize)?;
        let [method, flags, passes, pass, a, b, c, d, next @ ..] = *header;
        let long = usize::try_from(u32::from_le_bytes([a, b, c, d])) != Ok(pattern.len());
        if long || flags & !(UNRESTRICTED | FAILED | INVERT) != 0 || pass >= passes {
            return Err(NotSanitize);
        }
        let method = match (method, pattern.len(), passes) {
            (ERASE, 0, 1) if flags & INVERT == 0 => Method::Erase,
            (OVERWRITE, 1..=MAX_PATTERN, 1..=MAX_PASSES) => Method::Overwrite {
                pattern: Pattern(pattern.to_vec()),
                passes,
                invert: flags & INVERT != 0,
            },
            _ => return Err(NotSanitize),
        };
        Ok(Self {
            method,
            unrestricted: flags & UNRESTRICTED != 0,
            failed: flags & FAILED != 0,
            pass,
            next: u64::from_le_bytes(next),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overwrite(bytes: &[u8], passes: u8, invert: bool) -> Sanitize {
        let pattern = Pattern::of(bytes, 512).unwrap();
        Sanitize::new(Method::Overwrite { pattern, passes, invert }, true)
    }

    #[test]
    fn a_sanitize_survives_its_encoding_and_damage_is_told() {
        let whole: Vec<u8> = (0..512_u32).map(|n| (n * n / 7).to_le_bytes()[0]).collect();
        let failed = Sanitize { failed: true, pass: 2, next: 9, ..overwrite(&whole, 3, true) };
        for one in [Sanitize::new(Method::Erase, false), overwrite(&[1, 2], 31, false), failed] {
            let bytes = one.encode();
            assert!(bytes.len() <= MAX_SANITIZE);
            assert_eq!(Sanitize::decode(&bytes), Ok(one));
            for len in 0..bytes.len() {
                assert_eq!(Sanitize::decode(&bytes[..len]), Err(NotSanitize), "{len}");
            }
            for (at, wrong) in [(0, 3), (1, 8), (2, 0), (2, 32), (3, 31), (4, 9)] {
                let mut bad = bytes.clone();
                bad[at] = wrong;
                assert_eq!(Sanitize::decode(&bad), Err(NotSanitize), "byte {at}");
            }
        }
    }

    #[test]
    fn a_pattern_is_kept_as_far_as_it_does_not_repeat() {
        let kept = |bytes: &[u8], block| Pattern::of(bytes, block).map(|pattern| pattern.0);
        assert_eq!(kept(&[7; 512], 512), Some(vec![7]));
        assert_eq!(kept(&[1, 2, 1, 2], 512), Some(vec![1, 2]));
        // Cut where the block ends, and begun anew in the next.
        assert_eq!(kept(&[1, 2, 3], 512), Some(vec![1, 2, 3]));
        assert_eq!(kept(&[], 512), None);
        let mut long = vec![0; 4096];
        long[513] = 1;
        assert_eq!(kept(&long, 4096), None, "it does not repeat within what is kept");
        assert_eq!(kept(&long[..512], 4096), Some(vec![0]));
        let mut block = [0; 5];
        Pattern::of(&[1, 2, 3], 5).unwrap().fill(false, &mut block);
        assert_eq!(block, [1, 2, 3, 1, 2]);
    }

    #[test]
    fn every_other_pass_is_inverted_where_that_is_asked() {
        let mut block = [0; 2];
        let mut filled = |pass, invert| {
            Sanitize { pass, ..overwrite(&[0xf0], 3, invert) }.fill(&mut block);
            block[1]
        };
        assert_eq!([0, 1, 2].map(|pass| filled(pass, true)), [0xf0, 0x0f, 0xf0]);
        assert_eq!([0, 1, 2].map(|pass| filled(pass, false)), [0xf0; 3]);
    }

    #[test]
    fn progress_is_of_all_passes() {
        let at = |pass, next| Sanitize { pass, next, ..overwrite(&[0], 2, false) }.progress(100);
        assert_eq!([at(0, 0), at(0, 50), at(1, 0), at(1, 100)], [0, 0x4000, 0x8000, 0xffff]);
        assert_eq!(Sanitize::new(Method::Erase, false).progress(0), 0);
    }
}
