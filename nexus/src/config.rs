//! A volume's configuration and the register that each voter stores it in.

use cairn_block::{Epoch, ReplicaId, VolumeId};

use crate::MAX_CHILDREN;

/// First bytes of an encoded configuration.
const MAGIC: [u8; 4] = *b"CNFG";
/// Version of the encoding.
const VERSION: u16 = 1;
/// The version of one with sections after its members. A program that knows version 1 alone refuses it.
const VERSION_SECTIONS: u16 = 2;
/// Bytes before the list of voters.
const HEADER: usize = 48;
/// Bytes of a voter: its id and whether it is in sync.
const VOTER: usize = 24;
/// Bytes of a section before what it holds: its kind and how many bytes follow.
const SECTION: usize = 8;
/// A section: how the volume is encrypted, opaque here.
const SECTION_ENCRYPTION: u16 = 1;

/// What one voter holds of the volume's register. `accepted_epoch` and `seq` order configurations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Register {
    /// No configuration of an older epoch is accepted any more.
    pub promised_epoch: Epoch,
    /// The epoch of the accepted configuration; 0 where there is none yet.
    pub accepted_epoch: Epoch,
    /// Counts the configurations within an epoch.
    pub seq: u64,
    /// The accepted configuration, encoded; empty where there is none yet.
    pub config: Vec<u8>,
    /// Told with every answer and stored nowhere: which life of the replica's machine this is. A
    /// machine that lost power has another one, and its disks' volatile caches are empty.
    pub incarnation: u128,
    /// Told and stored likewise: the replica's size in blocks; 0 where it is not told.
    pub blocks: u64,
}

/// Who holds the volume's data, and how large it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub blocks: u64,
    /// Changes when an operator forces a start from a stale member: data of another lineage is
    /// never merged.
    pub lineage: u64,
    /// The volume's wrapped key, opaque here; empty where it is not encrypted.
    pub encryption: Vec<u8>,
    /// All replicas, in order, each with whether it holds every acked write.
    pub members: Vec<(ReplicaId, bool)>,
}

/// Why bytes are no configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// They end too early or go on too long.
    #[error("the configuration has {found} bytes, not {expected}")]
    Length {
        /// Bytes there.
        found: usize,
        /// Bytes that the header tells of.
        expected: usize,
    },
    /// They begin with something else.
    #[error("the configuration does not begin with its magic")]
    Magic,
    /// A later format.
    #[error("the configuration has version {0}; this program knows versions 1 and 2: upgrade it")]
    Version(u16),
    /// Something in it that this program cannot act on.
    #[error(
        "the configuration has a section of kind {0}, which this program does not know: upgrade it"
    )]
    Section(u16),
    /// No members, or more than a volume can have.
    #[error("the configuration names {0} members")]
    Members(usize),
}

impl Config {
    /// The bytes that voters store, little-endian:
    ///
    /// ```text
    /// 0  magic "CNFG"   4  version u16   6  members u16   8  volume id (16 bytes)
    /// 24 blocks u64     32 lineage u64   40 zero u64
    /// 48 per member: replica id (16 bytes), in sync u8, zeros (7 bytes)
    /// version 2, after the members, sections: kind u16, zero u16, bytes u32, and so many bytes
    /// ```
    ///
    /// Version 1 where there is no section. Section 1: encryption.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.members.len() * VOTER);
        out.extend_from_slice(&MAGIC);
        let version = if self.encryption.is_empty() { VERSION } else { VERSION_SECTIONS };
        out.extend_from_slice(&version.to_le_bytes());
        let members = u16::try_from(self.members.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&members.to_le_bytes());
        out.extend_from_slice(&self.volume.to_bytes());
        out.extend_from_slice(&self.blocks.to_le_bytes());
        out.extend_from_slice(&self.lineage.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        for (id, in_sync) in &self.members {
            out.extend_from_slice(&id.to_bytes());
            out.extend_from_slice(&[u8::from(*in_sync), 0, 0, 0, 0, 0, 0, 0]);
        }
        if !self.encryption.is_empty() {
            push_section(&mut out, SECTION_ENCRYPTION, &self.encryption);
        }
        out
    }

    /// The configuration that `bytes` hold.
    ///
    /// # Errors
    /// [`ConfigError`] where they are damaged or of a later version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ConfigError> {
        let short = ConfigError::Length { found: bytes.len(), expected: HEADER };
        let header = bytes.first_chunk::<HEADER>().ok_or(short)?;
        let field = |at: usize, len: usize| &header[at..at + len];
        let u64_at = |at: usize| {
            let mut b = [0; 8];
            b.copy_from_slice(field(at, 8));
            u64::from_le_bytes(b)
        };
        if field(0, 4) != MAGIC {
            return Err(ConfigError::Magic);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION && version != VERSION_SECTIONS {
            return Err(ConfigError::Version(version));
        }
        let count = usize::from(u16::from_le_bytes([header[6], header[7]]));
        if count == 0 || count > MAX_CHILDREN {
            return Err(ConfigError::Members(count));
        }
        let expected = HEADER + count * VOTER;
        let short = ConfigError::Length { found: bytes.len(), expected };
        let (head, sections) = bytes.split_at_checked(expected).ok_or(short)?;
        if version == VERSION && !sections.is_empty() {
            return Err(ConfigError::Length { found: bytes.len(), expected });
        }
        let encryption = decode_sections(sections, expected)?;
        let mut id = [0; 16];
        id.copy_from_slice(field(8, 16));
        let volume = VolumeId::from_bytes(id);
        let members = head[HEADER..]
            .chunks_exact(VOTER)
            .map(|m| {
                let mut id = [0; 16];
                id.copy_from_slice(&m[..16]);
                (ReplicaId::from_bytes(id), m[16] != 0)
            })
            .collect();
        Ok(Self { volume, blocks: u64_at(24), lineage: u64_at(32), encryption, members })
    }
}

fn push_section(out: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("a section is short");
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(bytes);
}

/// What the sections say of encryption. They begin `at` bytes into the configuration.
fn decode_sections(mut rest: &[u8], at: usize) -> Result<Vec<u8>, ConfigError> {
    let whole = rest.len();
    let mut encryption = Vec::new();
    while !rest.is_empty() {
        let done = at + whole - rest.len();
        let short = |expected| ConfigError::Length { found: at + whole, expected };
        let header = rest.first_chunk::<SECTION>().ok_or(short(done + SECTION))?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let end = usize::try_from(len).ok().and_then(|len| len.checked_add(SECTION));
        let end = end.unwrap_or(usize::MAX);
        let bytes = rest.get(SECTION..end).ok_or(short(done.saturating_add(end)))?;
        if kind != SECTION_ENCRYPTION || bytes.is_empty() || !encryption.is_empty() {
            return Err(ConfigError::Section(kind));
        }
        encryption = bytes.to_vec();
        rest = &rest[end..];
    }
    Ok(encryption)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_its_encoding_and_damage_is_told() {
        let config = Config {
            volume: VolumeId(7),
            blocks: 1 << 18,
            lineage: 3,
            encryption: Vec::new(),
            members: vec![(ReplicaId(1), true), (ReplicaId(2), false), (ReplicaId(3), true)],
        };
        let bytes = config.encode();
        assert_eq!(Config::decode(&bytes), Ok(config.clone()));
        for len in 0..bytes.len() {
            assert!(Config::decode(&bytes[..len]).is_err());
        }
        let mut bad = bytes.clone();
        bad[0] ^= 1;
        assert_eq!(Config::decode(&bad), Err(ConfigError::Magic));
        let mut newer = bytes;
        newer[4] = 9;
        assert_eq!(Config::decode(&newer), Err(ConfigError::Version(9)));

        let encrypted = Config { encryption: vec![7; 136], ..config };
        let bytes = encrypted.encode();
        assert_eq!(Config::decode(&bytes), Ok(encrypted));
        // Without its section it would be of version 1.
        for len in (0..bytes.len()).filter(|&len| len != 48 + 3 * 24) {
            assert!(Config::decode(&bytes[..len]).is_err(), "{len}");
        }
        for (at, kind) in [(120, 6), (121, 257)] {
            let mut unknown = bytes.clone();
            unknown[at] = unknown[at].wrapping_add(if at == 120 { 5 } else { 1 });
            assert_eq!(Config::decode(&unknown), Err(ConfigError::Section(kind)));
        }
        let mut long = bytes.clone();
        long[124..128].fill(0xff);
        assert!(Config::decode(&long).is_err());
    }
}
