//! What the nemesis does to a process from inside (docs/nemesis.md): compiled with the feature `nemesis` only.
//!
//! A process is told by the environment variable [`VARIABLE`] where its control file is: lines of `key=value`. What
//! is said of its life (`boot`, `mutant`, `cache`, `tears`, `seed`, `rate_ppm`) is read once; what is wrong at the
//! moment (`slow_ms`, `eio_read`, `eio_write`, `full`, `clock_s`) is read again whenever it may have changed.

#[cfg(not(debug_assertions))]
compile_error!(
    "the feature `nemesis` is for development builds: a release must not hold deliberate bugs"
);

mod disk;
mod driver;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use driver::FaultyDriver;

/// Names the control file.
pub const VARIABLE: &str = "CAIRN_NEMESIS";

/// What the control file says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Control {
    said: BTreeMap<String, String>,
}

impl Control {
    /// As it is now. A file that is not there, or is being written, says nothing.
    pub(crate) fn read() -> Self {
        let text = path().and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self { said: pairs.map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned())).collect() }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.said.get(key).map(String::as_str)
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    /// A range of bytes, `FROM..TO`.
    fn range(&self, key: &str) -> Option<std::ops::Range<u64>> {
        let (from, to) = self.text(key)?.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    }
}

fn path() -> Option<PathBuf> {
    std::env::var_os(VARIABLE).map(PathBuf::from)
}

/// The boot of the machine that this process is to believe in: another one stands for a loss of power.
#[must_use]
pub fn boot_id() -> Option<u128> {
    Control::read().number::<uuid_text::Uuid>("boot").map(|id| id.0)
}

/// Seconds that the wall clock is wrong by.
#[must_use]
pub fn clock_offset_s() -> i64 {
    Control::read().number("clock_s").unwrap_or(0)
}

/// Gives the calling thread the deliberate bug that is asked for.
///
/// # Panics
/// Where there is none of that name: a run that tests nothing must not pass.
pub fn choose_mutant() {
    use cairn_block::mutants::{Mutant, choose};
    let control = Control::read();
    let Some(name) = control.text("mutant") else { return };
    let found = Mutant::ALL.iter().find(|m| format!("{m:?}") == name);
    assert!(found.is_some(), "there is no deliberate bug called {name}");
    tracing::warn!(mutant = name, "this process has a deliberate bug");
    choose(found.copied());
}

mod uuid_text {
    /// 32 hexadecimal digits.
    pub(super) struct Uuid(pub(super) u128);

    impl std::str::FromStr for Uuid {
        type Err = std::num::ParseIntError;

        fn from_str(text: &str) -> Result<Self, Self::Err> {
            u128::from_str_radix(text, 16).map(Self)
        }
    }
}

/// The one source of chance: splitmix64.
#[derive(Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_file_says_what_it_says() {
        let control = Control::parse("slow_ms=20\neio_read = 0..4096\nnonsense\nclock_s=-3600\n");
        assert_eq!(control.number("slow_ms"), Some(20));
        assert_eq!(control.range("eio_read"), Some(0..4096));
        assert_eq!(control.number("clock_s"), Some(-3600));
        assert_eq!(control.number::<u64>("full"), None);
    }
}
