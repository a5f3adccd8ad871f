//! The time of day: for what people read, and for when a scrub is due. Nothing that must be right hangs on it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970, as the machine's clock has it.
pub(crate) fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    #[cfg(feature = "nemesis")]
    let now = now.saturating_add_signed(cairn_engine::nemesis::clock_offset_s());
    now
}
