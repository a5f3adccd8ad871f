//! A volume's configuration: what its register holds.

use cairn_block::reservation::Reservations;
use cairn_block::sanitize::Sanitize;
use cairn_block::{ReplicaId, SnapshotId, VolumeId};

use crate::MAX_CHILDREN;

/// First bytes of an encoded configuration.
const MAGIC: [u8; 4] = *b"CNFG";
/// Version of the encoding. Earlier ones were of programs that were never released.
const VERSION: u16 = 3;
/// Bytes before the list of members.
const HEADER: usize = 48;
/// Bytes of a member.
const MEMBER: usize = 64;
/// Flags of a member.
const IN_SYNC: u8 = 1;
const WITNESS: u8 = 2;
/// Bytes of a section before what it holds: its kind and how many bytes follow.
const SECTION: usize = 8;
/// A section: how the volume is encrypted, opaque here.
const SECTION_ENCRYPTION: u16 = 1;
/// A section: who stored the configuration.
const SECTION_HOLDER: u16 = 2;
/// A section: to which snapshot the volume is being taken back.
const SECTION_RESTORING: u16 = 3;
/// A section: where the members are.
const SECTION_PLACES: u16 = 4;
/// A section: the blocks that hosts see.
const SECTION_BLOCK_SIZE: u16 = 5;
/// A section: snapshots that were deleted, and that a replica may still have.
const SECTION_DELETED: u16 = 6;
/// A section: the hosts' reservations.
const SECTION_RESERVATIONS: u16 = 7;
/// A section: the sanitize that is under way, or failed.
const SECTION_SANITIZE: u16 = 8;
/// A section: members may have something in their undo logs.
const SECTION_UNDO: u16 = 9;
/// Deleted snapshots that a configuration names at most: so many fit in a register beside the rest.
pub const MAX_DELETED: usize = 32;
/// Bytes of an encoded configuration at most, whatever it says: a register holds so many.
pub const MAX_CONFIG: usize = 3584;
/// Bytes of a [`Place`].
pub const PLACE: usize = 18;

/// Where a member is reached, opaque here; zeros where that is not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Place(pub [u8; PLACE]);

impl Place {
    /// Whether it says where.
    #[must_use]
    pub fn is_told(self) -> bool {
        self != Self::default()
    }

    /// This, or the other where this says nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        if self.is_told() { self } else { other }
    }
}

/// A voter of the volume, as its configuration has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Member {
    /// Which.
    pub replica: ReplicaId,
    /// It votes and holds no data.
    pub witness: bool,
    /// It holds every acked write.
    pub in_sync: bool,
    /// The generation of the configuration in which it left the in-sync set: it may lack what was written
    /// to an extent that is open, or was settled in this generation or a later one. 0: it may lack all.
    pub since: u64,
    /// Its logical extents below this one were copied to it since, and lack only what was written to them
    /// in `copied_since` or a later generation, or is open.
    pub copied: u64,
    /// See `copied`.
    pub copied_since: u64,
    /// The life of its machine when this was stored; 0 where it was not there.
    pub incarnation: u128,
    /// Where whoever stored this reaches it.
    pub place: Place,
}

/// Who holds the volume's data, and how large it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub blocks: u64,
    /// Changes when an operator forces a start from a stale member: data of another lineage is
    /// never merged. Its upper half counts, its lower half is random.
    pub lineage: u64,
    /// One more than that of the configuration before it: orders what was written against who was there.
    pub generation: u64,
    /// The volume's wrapped key, opaque here; empty where it is not encrypted.
    pub encryption: Vec<u8>,
    /// Who stored it: see [`NexusConfig::holder`](crate::NexusConfig::holder). 0: not told.
    pub holder: u128,
    /// The snapshot that the volume is being taken back to. Some replicas may have done it and others not:
    /// all do it before hosts are served.
    pub restoring: Option<SnapshotId>,
    /// Snapshots that were deleted, and that a replica which was away may still have: at most
    /// [`MAX_DELETED`].
    pub deleted: Vec<SnapshotId>,
    /// Bytes of the blocks that hosts see; 0 where that is not told.
    pub block_size: u32,
    /// The hosts' reservations, as [`Reservations::encode`] has them; empty where there never were any.
    pub reservations: Vec<u8>,
    /// The sanitize that is under way or failed, as [`Sanitize::encode`] has it; empty where there is none. Hosts use
    /// nothing of the volume meanwhile, nothing is being restored, and no deleted snapshots are named.
    pub sanitize: Vec<u8>,
    /// Hosts have written atomically: members may have something in their undo logs.
    pub undo: bool,
    /// All its voters.
    pub members: Vec<Member>,
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
    #[error("the configuration has version {0}; this program knows version 3: upgrade it")]
    Version(u16),
    /// Something in it that this program cannot act on.
    #[error(
        "the configuration has a section of kind {0}, which this program does not know: upgrade it"
    )]
    Section(u16),
    /// A member has a flag that this program does not know.
    #[error(
        "a member of the configuration has flags {0:#x}, which this program does not know: upgrade it"
    )]
    Flags(u8),
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
    /// Section 1: encryption. Section 2: the holder (16 bytes), where it is told. Section 3: the snapshot that
    /// the volume is being taken back to (16 bytes), where it is. Section 4: the place of each member, in their
    /// order, where one is told. Section 5: bytes of the blocks that hosts see, u32, where they are told.
    /// Section 6: the deleted snapshots that a replica may still have (16 bytes each), where there are any. Section 7:
    /// the hosts' reservations, where there were any; `engine/block/src/reservation/encoding.rs` draws them. Section 8: the
    /// sanitize that is under way or failed, where there is one; `engine/block/src/sanitize.rs` draws it.
    /// Section 9, empty: hosts have written atomically, and members may have something in their undo logs.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.members.len() * MEMBER);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        let members = u16::try_from(self.members.len()).unwrap_or(u16::MAX);
        out.extend_from_slice(&members.to_le_bytes());
        out.extend_from_slice(&self.volume.to_bytes());
        for word in [self.blocks, self.lineage, self.generation] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for m in &self.members {
            let flags = (u8::from(m.in_sync) * IN_SYNC) | (u8::from(m.witness) * WITNESS);
            out.extend_from_slice(&m.replica.to_bytes());
            out.extend_from_slice(&[flags, 0, 0, 0, 0, 0, 0, 0]);
            for word in [m.since, m.copied, m.copied_since] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&m.incarnation.to_le_bytes());
        }
        if !self.encryption.is_empty() {
            push_section(&mut out, SECTION_ENCRYPTION, &self.encryption);
        }
        if self.holder != 0 {
            push_section(&mut out, SECTION_HOLDER, &self.holder.to_le_bytes());
        }
        if let Some(id) = self.restoring {
            push_section(&mut out, SECTION_RESTORING, &id.to_bytes());
        }
        if !self.deleted.is_empty() {
            let ids: Vec<u8> = self.deleted.iter().flat_map(|id| id.to_bytes()).collect();
            push_section(&mut out, SECTION_DELETED, &ids);
        }
        if self.members.iter().any(|m| m.place.is_told()) {
            let places: Vec<u8> = self.members.iter().flat_map(|m| m.place.0).collect();
            push_section(&mut out, SECTION_PLACES, &places);
        }
        if self.block_size != 0 {
            push_section(&mut out, SECTION_BLOCK_SIZE, &self.block_size.to_le_bytes());
        }
        if !self.reservations.is_empty() {
            push_section(&mut out, SECTION_RESERVATIONS, &self.reservations);
        }
        if !self.sanitize.is_empty() {
            push_section(&mut out, SECTION_SANITIZE, &self.sanitize);
        }
        if self.undo {
            push_section(&mut out, SECTION_UNDO, &[]);
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
        if header[..4] != MAGIC {
            return Err(ConfigError::Magic);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(ConfigError::Version(version));
        }
        let count = usize::from(u16::from_le_bytes([header[6], header[7]]));
        if count == 0 || count > MAX_CHILDREN {
            return Err(ConfigError::Members(count));
        }
        let expected = HEADER + count * MEMBER;
        let short = ConfigError::Length { found: bytes.len(), expected };
        let (head, sections) = bytes.split_at_checked(expected).ok_or(short)?;
        let found = decode_sections(sections, expected, count)?;
        let mut places = found.places.chunks_exact(PLACE);
        let mut members = Vec::with_capacity(count);
        for m in head[HEADER..].chunks_exact(MEMBER) {
            if m[16] & !(IN_SYNC | WITNESS) != 0 {
                return Err(ConfigError::Flags(m[16]));
            }
            members.push(Member {
                replica: ReplicaId::from_bytes(bytes_at(m, 0)),
                in_sync: m[16] & IN_SYNC != 0,
                witness: m[16] & WITNESS != 0,
                since: u64::from_le_bytes(bytes_at(m, 24)),
                copied: u64::from_le_bytes(bytes_at(m, 32)),
                copied_since: u64::from_le_bytes(bytes_at(m, 40)),
                incarnation: u128::from_le_bytes(bytes_at(m, 48)),
                place: places.next().map_or(Place::default(), |place| Place(bytes_at(place, 0))),
            });
        }
        Ok(Self {
            volume: VolumeId::from_bytes(bytes_at(header, 8)),
            blocks: u64::from_le_bytes(bytes_at(header, 24)),
            lineage: u64::from_le_bytes(bytes_at(header, 32)),
            generation: u64::from_le_bytes(bytes_at(header, 40)),
            encryption: found.encryption,
            holder: found.holder,
            restoring: found.restoring,
            deleted: found.deleted,
            block_size: found.block_size,
            reservations: found.reservations,
            sanitize: found.sanitize,
            undo: found.undo,
            members,
        })
    }

    /// The member of this id.
    #[must_use]
    pub fn member(&self, replica: ReplicaId) -> Option<&Member> {
        self.members.iter().find(|m| m.replica == replica)
    }
}

/// The `N` bytes at `at` of what is known to be long enough.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..].first_chunk().expect("the length was checked")
}

fn push_section(out: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("a section is short");
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(bytes);
}

/// What is told after the members.
#[derive(Default)]
struct Sections {
    encryption: Vec<u8>,
    holder: u128,
    restoring: Option<SnapshotId>,
    deleted: Vec<SnapshotId>,
    /// Of each member.
    places: Vec<u8>,
    block_size: u32,
    reservations: Vec<u8>,
    sanitize: Vec<u8>,
    undo: bool,
}

/// Whether these are some ids, and not too many.
fn is_list(ids: &[u8]) -> bool {
    !ids.is_empty() && ids.len().is_multiple_of(16) && ids.len() / 16 <= MAX_DELETED
}

/// What the sections say of so many members. They begin `at` bytes into the configuration.
fn decode_sections(mut rest: &[u8], at: usize, members: usize) -> Result<Sections, ConfigError> {
    let whole = rest.len();
    let mut found = Sections::default();
    while !rest.is_empty() {
        let done = at + whole - rest.len();
        let short = |expected| ConfigError::Length { found: at + whole, expected };
        let header = rest.first_chunk::<SECTION>().ok_or(short(done + SECTION))?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let end = usize::try_from(len).ok().and_then(|len| len.checked_add(SECTION));
        let end = end.unwrap_or(usize::MAX);
        let bytes = rest.get(SECTION..end).ok_or(short(done.saturating_add(end)))?;
        match (kind, <[u8; 16]>::try_from(bytes)) {
            (SECTION_ENCRYPTION, _) if !bytes.is_empty() && found.encryption.is_empty() => {
                found.encryption = bytes.to_vec();
            }
            (SECTION_HOLDER, Ok(id)) if found.holder == 0 => found.holder = u128::from_le_bytes(id),
            (SECTION_RESTORING, Ok(id)) if found.restoring.is_none() => {
                found.restoring = Some(SnapshotId::from_bytes(id));
            }
            (SECTION_DELETED, _) if found.deleted.is_empty() && is_list(bytes) => {
                let ids = bytes.as_chunks().0.iter();
                found.deleted = ids.map(|&id| SnapshotId::from_bytes(id)).collect();
            }
            (SECTION_PLACES, _) if bytes.len() == members * PLACE && found.places.is_empty() => {
                found.places = bytes.to_vec();
            }
            (SECTION_BLOCK_SIZE, _) if found.block_size == 0 => {
                let size = bytes.try_into().map_err(|_| ConfigError::Section(kind))?;
                found.block_size = u32::from_le_bytes(size);
                // Blocks of another size would be looked for in the wrong place.
                if !matches!(found.block_size, 512 | 4096) {
                    return Err(ConfigError::Section(kind));
                }
            }
            // Whoever does not know what is reserved would let hosts do what others rely on that they cannot.
            (SECTION_RESERVATIONS, _)
                if found.reservations.is_empty() && Reservations::decode(bytes).is_ok() =>
            {
                found.reservations = bytes.to_vec();
            }
            // Nor may they use what is being overwritten.
            (SECTION_SANITIZE, _)
                if found.sanitize.is_empty() && Sanitize::decode(bytes).is_ok() =>
            {
                found.sanitize = bytes.to_vec();
            }
            // Whoever does not know of it would leave a write half done that is to be undone.
            (SECTION_UNDO, _) if bytes.is_empty() && !found.undo => found.undo = true,
            _ => return Err(ConfigError::Section(kind)),
        }
        rest = &rest[end..];
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use cairn_block::reservation::{Action, Change, MAX_ENCODED, Registrant};
    use cairn_block::sanitize::{MAX_PATTERN, MAX_SANITIZE, Method, Pattern};

    use super::*;

    #[test]
    fn a_configuration_survives_its_encoding_and_damage_is_told() {
        let config = Config {
            volume: VolumeId(7),
            blocks: 1 << 18,
            lineage: 3,
            encryption: Vec::new(),
            holder: 0,
            restoring: None,
            deleted: Vec::new(),
            block_size: 0,
            reservations: Vec::new(),
            sanitize: Vec::new(),
            undo: false,
            generation: 41,
            members: vec![
                Member {
                    replica: ReplicaId(1),
                    in_sync: true,
                    incarnation: 9,
                    ..Member::default()
                },
                Member {
                    replica: ReplicaId(2),
                    since: 40,
                    copied: 7,
                    copied_since: 41,
                    ..Member::default()
                },
                Member { replica: ReplicaId(3), witness: true, ..Member::default() },
            ],
        };
        let bytes = config.encode();
        assert_eq!(Config::decode(&bytes), Ok(config.clone()));
        for len in 0..bytes.len() {
            assert!(Config::decode(&bytes[..len]).is_err());
        }
        let mut bad = bytes.clone();
        bad[0] ^= 1;
        assert_eq!(Config::decode(&bad), Err(ConfigError::Magic));
        let mut newer = bytes.clone();
        newer[4] = 9;
        assert_eq!(Config::decode(&newer), Err(ConfigError::Version(9)));
        let mut strange = bytes;
        strange[HEADER + 16] |= 0x80;
        assert_eq!(Config::decode(&strange), Err(ConfigError::Flags(0x81)));

        let encrypted = Config { encryption: vec![7; 136], ..config };
        let bytes = encrypted.encode();
        assert_eq!(Config::decode(&bytes), Ok(encrypted));
        // Without its section it would be one of a volume that is not encrypted.
        let end = HEADER + 3 * MEMBER;
        for len in (0..bytes.len()).filter(|&len| len != end) {
            assert!(Config::decode(&bytes[..len]).is_err(), "{len}");
        }
        for (at, kind) in [(end, 6), (end + 1, 257)] {
            let mut unknown = bytes.clone();
            unknown[at] = unknown[at].wrapping_add(if at == end { 5 } else { 1 });
            assert_eq!(Config::decode(&unknown), Err(ConfigError::Section(kind)));
        }
        let held = Config { holder: 5, ..Config::decode(&bytes).unwrap() };
        assert_eq!(Config::decode(&held.encode()), Ok(held.clone()));
        let undo = Config { undo: true, ..held.clone() };
        assert_eq!(Config::decode(&undo.encode()), Ok(undo.clone()));
        let twice = [undo.encode(), vec![9, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(Config::decode(&twice), Err(ConfigError::Section(SECTION_UNDO)));
        let restoring = Config { restoring: Some(SnapshotId(6)), ..held };
        assert_eq!(Config::decode(&restoring.encode()), Ok(restoring.clone()));
        let mut deleted =
            Config { deleted: vec![SnapshotId(8), SnapshotId(9)], ..restoring.clone() };
        assert_eq!(Config::decode(&deleted.encode()), Ok(deleted.clone()));
        deleted.deleted = vec![SnapshotId(8); MAX_DELETED + 1];
        assert_eq!(Config::decode(&deleted.encode()), Err(ConfigError::Section(SECTION_DELETED)));
        let mut placed = Config { block_size: 512, ..restoring };
        placed.members[1].place = Place([7; PLACE]);
        let other = Config { block_size: 1024, ..placed.clone() };
        assert_eq!(Config::decode(&other.encode()), Err(ConfigError::Section(SECTION_BLOCK_SIZE)));
        let told = placed.encode();
        assert_eq!(Config::decode(&told), Ok(placed.clone()));
        assert!(
            Config { members: vec![placed.members[1]; MAX_CHILDREN], ..placed }.encode().len()
                < 1024
        );
        let fewer = told.len() - SECTION - 4 - PLACE;
        let mut short = told[..fewer].to_vec();
        let places = fewer - 2 * PLACE;
        short[places - 4..places].copy_from_slice(&36u32.to_le_bytes());
        assert_eq!(Config::decode(&short), Err(ConfigError::Section(SECTION_PLACES)));
        let mut long = bytes.clone();
        long[end + 4..end + 8].fill(0xff);
        assert!(Config::decode(&long).is_err());
    }

    /// As many registrations as there is room for.
    fn table() -> Reservations {
        let mut table = Reservations::default();
        for host in 1.. {
            let action = Action::RegisterAndIgnore { new_key: host, aptpl: Some(true) };
            let registrant = Registrant::Iscsi {
                initiator: "iqn.2026-11.io.example:a-host-of-some-name".to_owned(),
                isid: [7; 6],
                port_group: u16::try_from(host).unwrap(),
            };
            if table.apply(&Change { registrant, key: 0, action }).is_err() {
                return table;
            }
        }
        table
    }

    #[test]
    fn the_largest_configuration_fits_in_a_register() {
        let reservations = table().encode();
        assert!(reservations.len() > MAX_ENCODED - 100, "{}", reservations.len());
        let member = Member { place: Place([7; PLACE]), ..Member::default() };
        let config = Config {
            volume: VolumeId(7),
            blocks: 1 << 40,
            lineage: 3,
            encryption: vec![7; 136],
            holder: 5,
            restoring: Some(SnapshotId(6)),
            deleted: vec![SnapshotId(8); MAX_DELETED],
            block_size: 512,
            reservations,
            sanitize: Vec::new(),
            undo: true,
            generation: 41,
            members: vec![member; MAX_CHILDREN],
        };
        let bytes = config.encode();
        let spare = MAX_ENCODED - config.reservations.len();
        assert!(bytes.len() + spare <= MAX_CONFIG, "{} bytes, and {spare}", bytes.len());
        assert_eq!(Config::decode(&bytes), Ok(config.clone()));

        let mut damaged = config.clone();
        damaged.reservations[0] ^= 0xff;
        let wrong = Err(ConfigError::Section(SECTION_RESERVATIONS));
        assert_eq!(Config::decode(&damaged.encode()), wrong);

        // Nothing is restored or deleted during a sanitize.
        let pattern: Vec<u8> =
            (0..MAX_PATTERN).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
        let pattern = Pattern::of(&pattern, MAX_PATTERN).unwrap();
        let method = Method::Overwrite { pattern, passes: 31, invert: true };
        let sanitize = Sanitize::new(method, true).encode();
        let mut sanitized = Config { restoring: None, deleted: Vec::new(), sanitize, ..config };
        let bytes = sanitized.encode();
        let longer = MAX_SANITIZE - sanitized.sanitize.len();
        assert!(bytes.len() + spare + longer <= MAX_CONFIG, "{} bytes, and {spare}", bytes.len());
        assert_eq!(Config::decode(&bytes), Ok(sanitized.clone()));
        sanitized.sanitize[0] = 0;
        let wrong = Err(ConfigError::Section(SECTION_SANITIZE));
        assert_eq!(Config::decode(&sanitized.encode()), wrong);
    }
}
