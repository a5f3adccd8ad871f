//! Asymmetric logical unit access: which ports lead to a target's units, and how well.

use super::opcodes::Access;
use super::sense::{Sense, key};
use crate::wire::{len32, put};

/// The state of a target port group (SPC-5, section 5.17.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessState {
    /// Active/optimized.
    #[default]
    Optimized,
    /// Active/non-optimized.
    NonOptimized,
    /// Standby.
    Standby,
    /// Unavailable.
    Unavailable,
    /// On the way from one state to another.
    Transitioning,
}

impl AccessState {
    const fn code(self) -> u8 {
        match self {
            Self::Optimized => 0x0,
            Self::NonOptimized => 0x1,
            Self::Standby => 0x2,
            Self::Unavailable => 0x3,
            Self::Transitioning => 0xf,
        }
    }

    /// How a command ends that cannot be carried out in this state.
    pub(crate) fn refusal(self, access: Access) -> Option<Sense> {
        let ascq = match (self, access) {
            (Self::Optimized | Self::NonOptimized, _) | (_, Access::Any) => return None,
            (Self::Standby, Access::Standby) => return None,
            (Self::Standby, Access::Active) => 0x0b,
            (Self::Unavailable, _) => 0x0c,
            (Self::Transitioning, _) => 0x0a,
        };
        Some(Sense::new(key::NOT_READY, 0x04, ascq))
    }
}

/// A target port group: ports of one state. Those of one node, usually.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortGroup {
    /// TARGET PORT GROUP.
    pub id: u16,
    /// Its state.
    pub state: AccessState,
    /// Its relative target ports, which are target portal group tags.
    pub ports: Vec<u16>,
}

/// The parameter data of REPORT TARGET PORT GROUPS.
///
/// # Errors
/// INVALID FIELD IN CDB for a parameter data format that there is not.
pub(crate) fn report(cdb: &[u8; 16], groups: &[PortGroup]) -> Result<Vec<u8>, Sense> {
    // T_SUP, O_SUP off, U_SUP, S_SUP, AN_SUP, AO_SUP.
    const SUPPORTED: u8 = 0x80 | 0x08 | 0x04 | 0x02 | 0x01;
    /// How long a transition takes at most, in seconds.
    const TRANSITION_TIME_S: u8 = 60;
    let mut b = match cdb[1] >> 5 {
        0 => vec![0; 4],
        1 => vec![0, 0, 0, 0, 0x10, TRANSITION_TIME_S, 0, 0],
        _ => return Err(Sense::invalid_cdb(1, 7)),
    };
    for group in groups {
        let mut d = [0; 8];
        d[0] = group.state.code();
        d[1] = SUPPORTED;
        put(&mut d, 2, &group.id.to_be_bytes());
        // STATUS CODE: changed by implicit behavior.
        d[5] = 0x02;
        d[7] = group.ports.len().to_le_bytes()[0];
        b.extend_from_slice(&d);
        for port in &group.ports {
            let [high, low] = port.to_be_bytes();
            b.extend_from_slice(&[0, 0, high, low]);
        }
    }
    let len = len32(b.len() - 4);
    put(&mut b, 0, &len.to_be_bytes());
    Ok(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_reported_in_both_formats() {
        let groups = [
            PortGroup { id: 1, state: AccessState::Optimized, ports: vec![1] },
            PortGroup { id: 2, state: AccessState::Standby, ports: vec![2, 3] },
        ];
        let mut cdb = [0; 16];
        cdb[1] = 0x0a;
        let b = report(&cdb, &groups).unwrap();
        assert_eq!((b.len(), b[3]), (4 + 12 + 16, 28));
        assert_eq!(b[4..16], [0, 0x8f, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1]);
        assert_eq!(b[16], 2);
        cdb[1] = 0x2a;
        let b = report(&cdb, &groups).unwrap();
        assert_eq!((b[3], b[4], b[5]), (32, 0x10, 60));
        cdb[1] = 0x4a;
        assert!(report(&cdb, &groups).is_err());
    }

    #[test]
    fn a_state_lets_through_what_it_may() {
        let ascq = |s: AccessState, a| s.refusal(a).map(|s| s.ascq);
        assert_eq!(ascq(AccessState::Standby, Access::Active), Some(0x0b));
        assert_eq!(ascq(AccessState::Standby, Access::Standby), None);
        assert_eq!(ascq(AccessState::Unavailable, Access::Standby), Some(0x0c));
        assert_eq!(ascq(AccessState::Transitioning, Access::Active), Some(0x0a));
        assert_eq!(ascq(AccessState::Transitioning, Access::Any), None);
        assert_eq!(ascq(AccessState::NonOptimized, Access::Active), None);
    }
}
