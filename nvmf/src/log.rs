//! Log pages.

use crate::wire::{put, put_text, text_at, u16_at, u64_at};

/// Supported Log Pages.
pub const SUPPORTED: u8 = 0x00;
/// Error Information.
pub const ERROR_INFORMATION: u8 = 0x01;
/// SMART / Health Information.
pub const HEALTH: u8 = 0x02;
/// Firmware Slot Information.
pub const FIRMWARE_SLOT: u8 = 0x03;
/// Changed Attached Namespace List.
pub const CHANGED_NAMESPACES: u8 = 0x04;
/// Commands Supported and Effects.
pub const COMMAND_EFFECTS: u8 = 0x05;
/// Discovery.
pub const DISCOVERY: u8 = 0x70;
/// Reservation Notification.
pub const RESERVATION_NOTIFICATION: u8 = 0x80;

/// The NQN of every discovery subsystem.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// Bytes of the discovery log's header, and of each of its entries.
pub const DISCOVERY_ENTRY_LEN: usize = 1024;

/// TRTYPE: TCP.
pub const TRTYPE_TCP: u8 = 3;

/// SUBTYPE of a discovery log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subtype {
    /// Another discovery subsystem.
    Referral,
    /// An NVM subsystem.
    Nvm,
    /// The discovery subsystem that is being read.
    Current,
    /// Any other value.
    Other(u8),
}

impl Subtype {
    const fn to_u8(self) -> u8 {
        match self {
            Self::Referral => 1,
            Self::Nvm => 2,
            Self::Current => 3,
            Self::Other(other) => other,
        }
    }

    const fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::Referral,
            2 => Self::Nvm,
            3 => Self::Current,
            other => Self::Other(other),
        }
    }
}

/// The header of the discovery log page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoveryHeader {
    /// GENCTR: a reader that sees it move starts again.
    pub genctr: u64,
    /// NUMREC.
    pub numrec: u64,
}

impl DiscoveryHeader {
    /// Its 1024 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; DISCOVERY_ENTRY_LEN] {
        let mut out = [0; DISCOVERY_ENTRY_LEN];
        put(&mut out, 0, &self.genctr.to_le_bytes());
        put(&mut out, 8, &self.numrec.to_le_bytes());
        out
    }

    /// Reads a header; nothing where it is short or its record format is not 0.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..18)?;
        (u16_at(bytes, 16) == 0)
            .then(|| Self { genctr: u64_at(bytes, 0), numrec: u64_at(bytes, 8) })
    }
}

/// An entry of the discovery log page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// TRTYPE.
    pub trtype: u8,
    /// SUBTYPE.
    pub subtype: Subtype,
    /// PORTID.
    pub portid: u16,
    /// TRSVCID: the TCP port, in decimal.
    pub trsvcid: String,
    /// TRADDR: the IP address.
    pub traddr: String,
    /// SUBNQN.
    pub subnqn: String,
}

impl DiscoveryEntry {
    /// Its 1024 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; DISCOVERY_ENTRY_LEN] {
        let mut out = [0; DISCOVERY_ENTRY_LEN];
        out[0] = self.trtype;
        // ADRFAM: IPv6 is 2, IPv4 is 1.
        out[1] = if self.traddr.contains(':') { 2 } else { 1 };
        out[2] = self.subtype.to_u8();
        // TREQ b2: SQ flow control may be disabled.
        out[3] = 1 << 2;
        put(&mut out, 4, &self.portid.to_le_bytes());
        // CNTLID: the dynamic controller model.
        put(&mut out, 6, &u16::MAX.to_le_bytes());
        put(&mut out, 8, &32u16.to_le_bytes());
        put_text(&mut out, 32, 32, &self.trsvcid, 0);
        put_text(&mut out, 256, 256, &self.subnqn, 0);
        put_text(&mut out, 512, 256, &self.traddr, 0);
        out
    }

    /// Reads an entry; nothing where it is short or a text is not UTF-8.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..DISCOVERY_ENTRY_LEN)?;
        Some(Self {
            trtype: bytes[0],
            subtype: Subtype::from_u8(bytes[2]),
            portid: u16_at(bytes, 4),
            trsvcid: text_at(bytes, 32, 32)?.to_owned(),
            subnqn: text_at(bytes, 256, 256)?.to_owned(),
            traddr: text_at(bytes, 512, 256)?.to_owned(),
        })
    }
}

/// The Supported Log Pages log page: which of `pages` there are.
#[must_use]
pub fn supported(pages: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 1024];
    for &page in pages {
        out[4 * usize::from(page)] = 1;
    }
    out
}

/// The Health log page: nothing wears out here, so only the spare is stated.
#[must_use]
pub fn health() -> Vec<u8> {
    let mut out = vec![0; 512];
    out[3] = 100;
    out
}

/// The Firmware Slot log page: slot 1 runs `firmware`.
#[must_use]
pub fn firmware_slot(firmware: &str) -> Vec<u8> {
    let mut out = vec![0; 512];
    out[0] = 1;
    put_text(&mut out, 8, 8, firmware, b' ');
    out
}

/// The Commands Supported and Effects log page. `mutating` I/O commands change the data.
#[must_use]
pub fn command_effects(admin: &[u8], io: &[u8], mutating: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 4096];
    for &opcode in admin {
        out[4 * usize::from(opcode)] = 1;
    }
    for &opcode in io {
        out[1024 + 4 * usize::from(opcode)] = if mutating.contains(&opcode) { 3 } else { 1 };
    }
    out
}

/// The Changed Attached Namespace List log page, from ascending ids; more than fit are told as one
/// FFFFFFFFh.
#[must_use]
pub fn changed_namespaces(nsids: &[u32]) -> Vec<u8> {
    let mut out = vec![0; 4096];
    if nsids.len() > 1024 {
        put(&mut out, 0, &u32::MAX.to_le_bytes());
    } else {
        for (entry, nsid) in out.chunks_exact_mut(4).zip(nsids) {
            entry.copy_from_slice(&nsid.to_le_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_survive_the_wire(
            subtype in any::<u8>(),
            portid in any::<u16>(),
            port in any::<u16>(),
            traddr in "[0-9a-f:.]{1,40}",
            subnqn in "nqn\\.[a-z0-9.:-]{4,200}",
        ) {
            let made = DiscoveryEntry {
                trtype: TRTYPE_TCP,
                subtype: Subtype::from_u8(subtype),
                portid,
                trsvcid: port.to_string(),
                traddr,
                subnqn,
            };
            prop_assert_eq!(DiscoveryEntry::decode(&made.encode()), Some(made));
            let header = DiscoveryHeader { genctr: u64::from(portid), numrec: 3 };
            prop_assert_eq!(DiscoveryHeader::decode(&header.encode()), Some(header));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
            let _ = DiscoveryEntry::decode(&bytes);
            let _ = DiscoveryHeader::decode(&bytes);
        }
    }

    #[test]
    fn too_many_changes_are_told_as_one() {
        let many: Vec<u32> = (1..=1025).collect();
        assert_eq!(changed_namespaces(&many)[..8], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(changed_namespaces(&[2, 7])[..12], [2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    }
}
