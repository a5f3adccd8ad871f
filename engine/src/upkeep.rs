//! What keeps replicas alike, on the wire: vendor-specific admin commands of a replica's subsystem.
//!
//! | opcode | name | data | command dwords |
//! |---|---|---|---|
//! | E1h | Settle | settle page to the controller | |
//! | E2h | Changes | a byte for each logical extent to the host, at most 64 KiB | CDW10: the first extent; CDW11: since which stamp |
//!
//! They are refused, as reads and writes are, to a controller whose epoch is older than the one that was
//! promised. Settle completes when what it says is durable. The bits of the bytes of Changes are those of
//! [`cairn_nexus::change`]; extents past the end of the replica are zeros. A stamp that does not fit in CDW11 is
//! lowered until it does, which tells of more extents, and never of fewer. The settle page, little-endian:
//!
//! ```text
//! 0  magic "CRNSETL\0"
//! 8  1: begin a round, 2: end it, 3: give up what was lost with a device of the pool (u32), zero (u32)
//! 16 round              24 stamp of what is settled: where it ends
//! 32 only logical extents below this one are settled (u32): likewise
//! ```

use cairn_nexus::change;

/// Begins or ends a round of settling.
pub const OPCODE_SETTLE: u8 = 0xe1;
/// Tells what was written and not settled.
pub const OPCODE_CHANGES: u8 = 0xe2;
/// Bytes of a settle page.
pub const PAGE: u32 = 4096;
/// Bytes that Changes answers at most.
pub const CHANGES_MAX: u32 = 64 << 10;

const MAGIC: [u8; 8] = *b"CRNSETL\0";
const BEGIN: u32 = 1;
const END: u32 = 2;
const GIVE_UP: u32 = 3;

/// What a settle page asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettleCall {
    /// A round begins.
    Begin {
        /// Which.
        round: u64,
    },
    /// A round ends: what was quiet since it began is settled.
    End {
        /// Which.
        round: u64,
        /// When that was, as configurations count.
        stamp: u64,
        /// Only logical extents below this one.
        below: u32,
    },
    /// What the replica had on devices that are gone is given up: it reads as zeros.
    GiveUp,
}

/// Writes a call over the page `out`.
pub fn encode(call: SettleCall, out: &mut [u8]) {
    let (kind, round, stamp, below) = match call {
        SettleCall::Begin { round } => (BEGIN, round, 0, 0),
        SettleCall::End { round, stamp, below } => (END, round, stamp, below),
        SettleCall::GiveUp => (GIVE_UP, 0, 0, 0),
    };
    out.fill(0);
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&kind.to_le_bytes());
    out[16..24].copy_from_slice(&round.to_le_bytes());
    out[24..32].copy_from_slice(&stamp.to_le_bytes());
    out[32..36].copy_from_slice(&below.to_le_bytes());
}

/// The call that a page holds, or nothing where it holds none.
#[must_use]
pub fn decode(page: &[u8]) -> Option<SettleCall> {
    if page.len() != PAGE as usize || page[..8] != MAGIC {
        return None;
    }
    let word = |at: usize| Some(u64::from_le_bytes(*page.get(at..at + 8)?.first_chunk()?));
    let (round, stamp) = (word(16)?, word(24)?);
    match u32::from_le_bytes(*page[8..].first_chunk()?) {
        BEGIN => Some(SettleCall::Begin { round }),
        END => {
            let below = u32::from_le_bytes(*page[32..].first_chunk()?);
            Some(SettleCall::End { round, stamp, below })
        }
        GIVE_UP => Some(SettleCall::GiveUp),
        _ => None,
    }
}

/// A stamp as CDW11 tells it.
#[must_use]
pub fn since_dword(since: u64) -> u32 {
    u32::try_from(since).unwrap_or(u32::MAX)
}

/// Whether bytes can be an answer of Changes: they have no bits but those that are known.
#[must_use]
pub fn is_changes(bytes: &[u8]) -> bool {
    let known = change::MAPPED | change::OPEN | change::SINCE | change::LOST;
    bytes.iter().all(|byte| byte & !known == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_survive_their_page() {
        let mut page = vec![0xff; PAGE as usize];
        let end = SettleCall::End { round: 8, stamp: u64::MAX, below: 9 };
        for call in [SettleCall::Begin { round: 7 }, end, SettleCall::GiveUp] {
            encode(call, &mut page);
            assert_eq!(decode(&page), Some(call));
        }
        page[9] = 1;
        assert_eq!(decode(&page), None);
        assert_eq!(decode(&[]), None);
        assert_eq!((OPCODE_SETTLE & 3, OPCODE_CHANGES & 3), (1, 2), "they say where data goes");
    }

    #[test]
    fn an_answer_with_unknown_bits_is_none_and_a_late_stamp_is_lowered() {
        assert!(is_changes(&[0, 1, 3, 5, 7, 11]) && !is_changes(&[1, 16]));
        assert_eq!((since_dword(9), since_dword(u64::MAX)), (9, u32::MAX));
        assert_eq!(change::MAPPED, cairn_replica::change::MAPPED);
        assert_eq!(change::OPEN, cairn_replica::change::OPEN);
        assert_eq!(change::SINCE, cairn_replica::change::SINCE);
        assert_eq!(change::LOST, cairn_replica::change::LOST);
    }
}
