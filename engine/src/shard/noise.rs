//! How often the log speaks of a disk that fails.

use cairn_reactor::DiskFault;

/// The same failure of a device is said again after so long.
const AGAIN_MS: u64 = 10_000;

/// A disk that is dead fails every operation: that is said once, and then now and then.
#[derive(Debug, Default)]
pub(super) struct Noise {
    /// The failure that was said last, and when.
    said: Option<(DiskFault, u64)>,
    /// How many like it were not.
    unsaid: u64,
}

impl Noise {
    /// A failure. Where it is to be said: how many were not, since the last that was.
    pub(super) fn note(&mut self, fault: DiskFault, now_ms: u64) -> Option<u64> {
        if self.said.is_some_and(|(said, at)| said == fault && now_ms < at + AGAIN_MS) {
            self.unsaid += 1;
            return None;
        }
        self.said = Some((fault, now_ms));
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_failure_is_said_now_and_then_and_another_one_at_once() {
        let mut noise = Noise::default();
        let (dead, full) = (DiskFault::Errno(5), DiskFault::NoSpace);
        assert_eq!(noise.note(dead, 100), Some(0));
        for now in 101..150 {
            assert_eq!(noise.note(dead, now), None);
        }
        assert_eq!(noise.note(full, 150), Some(49));
        assert_eq!(noise.note(full, 150 + AGAIN_MS - 1), None);
        assert_eq!(noise.note(full, 150 + AGAIN_MS), Some(1));
    }
}
