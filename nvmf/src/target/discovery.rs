//! The discovery log.

use super::{Port, Target};
use crate::log::{DISCOVERY_NQN, DiscoveryEntry, DiscoveryHeader, Subtype, TRTYPE_TCP};

impl Target {
    /// The discovery log page as `hostnqn` may see it.
    pub(super) fn discovery_log(&self, hostnqn: &str) -> Vec<u8> {
        let mut entries = Vec::new();
        let mut list = |subtype, subnqn: &str, elsewhere: &[Port]| {
            for (i, port) in self.ports.iter().chain(elsewhere).enumerate() {
                let entry = DiscoveryEntry {
                    trtype: TRTYPE_TCP,
                    subtype,
                    portid: u16::try_from(i + 1).unwrap_or(u16::MAX),
                    trsvcid: port.trsvcid.to_string(),
                    traddr: port.traddr.clone(),
                    subnqn: subnqn.to_owned(),
                };
                entries.push(entry.encode());
            }
        };
        list(Subtype::Current, DISCOVERY_NQN, &[]);
        for subsystem in self.subsystems.iter().flatten() {
            if subsystem.config.discoverable && subsystem.allows(hostnqn) {
                list(Subtype::Nvm, &subsystem.config.nqn, &subsystem.elsewhere);
            }
        }
        for (nqn, elsewhere) in self.listed_elsewhere(hostnqn) {
            list(Subtype::Nvm, nqn, elsewhere);
        }
        let header = DiscoveryHeader { genctr: self.genctr, numrec: entries.len() as u64 };
        let mut page = header.encode().to_vec();
        page.extend(entries.iter().flatten());
        page
    }
}
