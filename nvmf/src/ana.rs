//! Asymmetric Namespace Access: which of several paths to a namespace a host had better use, or can use at
//! all. NVM Express Base Specification 2.0, section 8.1.

use crate::status::Status;
use crate::wire::{put, u16_at, u32_at, u64_at};

/// Asymmetric Namespace Access, the log page.
pub const LOG: u8 = 0x0c;
/// The group of every namespace: a subsystem has one.
pub const GROUP: u32 = 1;
/// ANATT: a host waits for so many seconds at most until a change is over.
pub const TRANSITION_TIME_S: u8 = 10;
/// ANACAP: optimized, inaccessible and change are reported; a namespace stays in its group.
pub const CAPABILITIES: u8 = 1 | 1 << 2 | 1 << 4 | 1 << 6;
/// CMIC: ANA is reported.
pub const CMIC: u8 = 1 << 3;

const HEADER: usize = 16;
const DESCRIPTOR: usize = 32;

/// The state of a namespace at a controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AnaState {
    /// Commands are carried out.
    #[default]
    Optimized,
    /// Commands are carried out, slower than elsewhere.
    NonOptimized,
    /// Another path is to be used.
    Inaccessible,
    /// No path will ever lead to it again.
    PersistentLoss,
    /// It is between two of the others.
    Change,
}

impl AnaState {
    const fn to_u8(self) -> u8 {
        match self {
            Self::Optimized => 0x1,
            Self::NonOptimized => 0x2,
            Self::Inaccessible => 0x3,
            Self::PersistentLoss => 0x4,
            Self::Change => 0xf,
        }
    }

    const fn from_u8(value: u8) -> Option<Self> {
        Some(match value & 0xf {
            0x1 => Self::Optimized,
            0x2 => Self::NonOptimized,
            0x3 => Self::Inaccessible,
            0x4 => Self::PersistentLoss,
            0xf => Self::Change,
            _ => return None,
        })
    }

    /// How a command that needs the namespace's data ends in this state; nothing where it is carried out.
    /// Never with DNR: a host is to try another path, or this one again.
    #[must_use]
    pub const fn refusal(self) -> Option<Status> {
        match self {
            Self::Optimized | Self::NonOptimized => None,
            Self::Inaccessible => Some(Status::ANA_INACCESSIBLE),
            Self::PersistentLoss => Some(Status::ANA_PERSISTENT_LOSS),
            Self::Change => Some(Status::ANA_TRANSITION),
        }
    }
}

/// What the log page says of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnaLog {
    /// CHGCNT: counts changes.
    pub changes: u64,
    /// The state of the group.
    pub state: AnaState,
    /// NSIDs of its namespaces, ascending.
    pub nsids: Vec<u32>,
}

impl AnaLog {
    /// The log page. With `groups_only` (LSP bit 0, RGO) it does not list namespaces.
    #[must_use]
    pub fn encode(&self, groups_only: bool) -> Vec<u8> {
        let nsids = if groups_only { &[][..] } else { &self.nsids };
        let mut out = vec![0; HEADER + DESCRIPTOR + 4 * nsids.len()];
        put(&mut out, 0, &self.changes.to_le_bytes());
        put(&mut out, 8, &1u16.to_le_bytes());
        put(&mut out, HEADER, &GROUP.to_le_bytes());
        put(&mut out, HEADER + 4, &crate::wire::len32(nsids.len()).to_le_bytes());
        put(&mut out, HEADER + 8, &self.changes.to_le_bytes());
        out[HEADER + 16] = self.state.to_u8();
        for (entry, nsid) in out[HEADER + DESCRIPTOR..].chunks_exact_mut(4).zip(nsids) {
            entry.copy_from_slice(&nsid.to_le_bytes());
        }
        out
    }

    /// Reads a log page of one group; nothing where it is short, or of more groups.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let head = bytes.get(..HEADER + DESCRIPTOR)?;
        if u16_at(head, 8) != 1 {
            return None;
        }
        let count = usize::try_from(u32_at(head, HEADER + 4)).ok()?;
        let end = count.checked_mul(4)?.checked_add(HEADER + DESCRIPTOR)?;
        let nsids = bytes.get(HEADER + DESCRIPTOR..end)?;
        Some(Self {
            changes: u64_at(head, 0),
            state: AnaState::from_u8(head[HEADER + 16])?,
            nsids: nsids.chunks_exact(4).map(|entry| u32_at(entry, 0)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_log_survives_the_wire(
            changes in any::<u64>(),
            nsids in prop::collection::vec(1u32..1025, 0..5),
            state in prop::sample::select(vec![
                AnaState::Optimized, AnaState::NonOptimized, AnaState::Inaccessible,
                AnaState::PersistentLoss, AnaState::Change,
            ]),
        ) {
            let log = AnaLog { changes, state, nsids };
            prop_assert_eq!(AnaLog::decode(&log.encode(false)), Some(log.clone()));
            let groups = AnaLog { nsids: Vec::new(), ..log.clone() };
            prop_assert_eq!(AnaLog::decode(&log.encode(true)), Some(groups));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = AnaLog::decode(&bytes);
        }
    }

    #[test]
    fn the_log_is_laid_out_as_the_specification_says() {
        let log = AnaLog { changes: 5, state: AnaState::Inaccessible, nsids: vec![1] };
        let bytes = log.encode(false);
        assert_eq!(bytes.len(), 16 + 32 + 4);
        assert_eq!((bytes[0], bytes[8], bytes[16], bytes[20], bytes[24]), (5, 1, 1, 1, 5));
        assert_eq!((bytes[32], bytes[48]), (3, 1));
    }
}
