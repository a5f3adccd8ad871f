//! Snapshots on the wire: vendor-specific admin commands of a replica's subsystem.
//!
//! | opcode | name | data |
//! |---|---|---|
//! | D1h | Snapshot Create | snapshot page to the controller: id, when, name |
//! | D5h | Snapshot Delete | snapshot page to the controller: id |
//! | D9h | Snapshot Restore | snapshot page to the controller: id |
//! | DDh | Snapshot Clone | snapshot page to the controller: id, and the replica to make |
//! | D2h | Snapshot List | list page to the host; CDW10: the first one wanted, counted from 0 |
//!
//! They are refused, as reads and writes are, to a controller whose epoch is older than the one that
//! was promised. The pages, little-endian, identifiers in UUID order:
//!
//! ```text
//! snapshot page                          list page
//! 0  magic "CRNSNAP\0"                   0  magic "CRNSNPL\0"
//! 8  snapshot id (16 bytes)              8  how many there are (u32), how many are here (u32)
//! 24 when, seconds since 1970            16 entries of 128 bytes:
//! 32 length of the name (u32), zero         0  id   16 when   24 bytes of its own
//! 40 name, 64 bytes                         32 size in blocks  40 length of the name (u32)
//! 104 clone: replica id                     44 1: being deleted (u32)  48 name
//! 120 clone: volume id
//! 136 clone: size in blocks
//! 144 clone: 1: a replica without the snapshot has nothing to do (u8)
//!                                           4095 1: the replica has snapshots, or is a clone (u8)
//! ```

use cairn_block::{ReplicaId, SnapshotId, SnapshotVerb, VolumeId};
use cairn_replica::SnapshotSpec;

/// Takes a snapshot.
pub const OPCODE_CREATE: u8 = 0xd1;
/// Deletes one.
pub const OPCODE_DELETE: u8 = 0xd5;
/// Takes the replica back to one.
pub const OPCODE_RESTORE: u8 = 0xd9;
/// Makes a replica of one.
pub const OPCODE_CLONE: u8 = 0xdd;
/// Lists them.
pub const OPCODE_LIST: u8 = 0xd2;
/// Bytes of a page.
pub const PAGE: u32 = 4096;
/// Entries of a list page.
pub const LIST_MAX: usize = (PAGE as usize - LIST_AT) / ENTRY;

const MAGIC: [u8; 8] = *b"CRNSNAP\0";
const LIST_MAGIC: [u8; 8] = *b"CRNSNPL\0";
const NAME_MAX: usize = 64;
const NAME_AT: usize = 40;
const CLONE_AT: usize = NAME_AT + NAME_MAX;
const LIST_AT: usize = 16;
const ENTRY: usize = 128;
const SHARES_AT: usize = PAGE as usize - 1;
const _: () = assert!(LIST_AT + LIST_MAX * ENTRY <= SHARES_AT);

/// What is asked of each replica of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCall {
    /// Which snapshot, and what a new one is called.
    pub spec: SnapshotSpec,
    /// What a clone is to be.
    pub clone: Option<CloneSpec>,
}

/// What a clone is to be. The id of its replica is made of the volume's and that of the replica asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloneSpec {
    /// The new volume.
    pub volume: VolumeId,
    /// Its size in blocks.
    pub blocks: u64,
    /// A replica that does not have the snapshot has nothing to do; otherwise it refuses.
    pub partial: bool,
}

/// A snapshot of a replica, as it tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Which.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// Bytes that are kept for it alone.
    pub own_bytes: u64,
    /// Its size in blocks.
    pub blocks: u64,
    /// It is being deleted.
    pub deleting: bool,
}

/// The replica of a clone: every replica of the snapshot's volume gives one, each its own.
#[must_use]
pub fn clone_id(volume: VolumeId, of: ReplicaId) -> ReplicaId {
    ReplicaId(volume.0 ^ of.0.rotate_left(64) ^ 0x636c_6f6e_6500_0000_0000_0000_0000_0001)
}

/// The opcode of a call.
#[must_use]
pub const fn opcode(verb: SnapshotVerb) -> u8 {
    match verb {
        SnapshotVerb::Create => OPCODE_CREATE,
        SnapshotVerb::Delete => OPCODE_DELETE,
        SnapshotVerb::Restore => OPCODE_RESTORE,
        SnapshotVerb::Clone => OPCODE_CLONE,
    }
}

/// What an opcode asks, if it is one of these.
#[must_use]
pub const fn verb(opcode: u8) -> Option<SnapshotVerb> {
    match opcode {
        OPCODE_CREATE => Some(SnapshotVerb::Create),
        OPCODE_DELETE => Some(SnapshotVerb::Delete),
        OPCODE_RESTORE => Some(SnapshotVerb::Restore),
        OPCODE_CLONE => Some(SnapshotVerb::Clone),
        _ => None,
    }
}

fn u32_at(page: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*page.get(at..at + 4)?.first_chunk()?))
}

fn u64_at(page: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*page.get(at..at + 8)?.first_chunk()?))
}

fn id_at(page: &[u8], at: usize) -> Option<[u8; 16]> {
    page.get(at..at + 16)?.first_chunk().copied()
}

fn name_at(page: &[u8], at: usize, len: u32) -> Option<String> {
    let len = usize::try_from(len).ok().filter(|&len| len <= NAME_MAX)?;
    String::from_utf8(page.get(at..at + len)?.to_vec()).ok()
}

fn put_name(page: &mut [u8], len_at: usize, at: usize, name: &str) {
    let mut end = name.len().min(NAME_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let len = u32::try_from(end).expect("at most 64");
    page[len_at..len_at + 4].copy_from_slice(&len.to_le_bytes());
    page[at..at + end].copy_from_slice(&name.as_bytes()[..end]);
}

/// Writes a call over the page `out`.
pub fn encode(call: &SnapshotCall, out: &mut [u8]) {
    out.fill(0);
    out[..8].copy_from_slice(&MAGIC);
    out[8..24].copy_from_slice(&call.spec.id.to_bytes());
    out[24..32].copy_from_slice(&call.spec.created.to_le_bytes());
    put_name(out, 32, NAME_AT, &call.spec.name);
    if let Some(clone) = call.clone {
        out[CLONE_AT + 16..CLONE_AT + 32].copy_from_slice(&clone.volume.to_bytes());
        out[CLONE_AT + 32..CLONE_AT + 40].copy_from_slice(&clone.blocks.to_le_bytes());
        out[CLONE_AT + 40] = u8::from(clone.partial);
    }
}

/// The call that a page holds, or nothing where it holds none.
#[must_use]
pub fn decode(page: &[u8]) -> Option<SnapshotCall> {
    if page.len() != PAGE as usize || page[..8] != MAGIC {
        return None;
    }
    let spec = SnapshotSpec {
        id: SnapshotId::from_bytes(id_at(page, 8)?),
        created: u64_at(page, 24)?,
        name: name_at(page, NAME_AT, u32_at(page, 32)?)?,
    };
    let volume = VolumeId::from_bytes(id_at(page, CLONE_AT + 16)?);
    let blocks = u64_at(page, CLONE_AT + 32)?;
    let clone = CloneSpec { volume, blocks, partial: page[CLONE_AT + 40] != 0 };
    Some(SnapshotCall { spec, clone: (volume.0 != 0).then_some(clone) })
}

/// Writes the entries from `first` on over the list page `out`, and whether the replica shares blocks with others.
pub fn encode_list(all: &[SnapshotEntry], first: usize, shares: bool, out: &mut [u8]) {
    out.fill(0);
    out[..8].copy_from_slice(&LIST_MAGIC);
    let here = all.get(first..).unwrap_or_default();
    let here = &here[..here.len().min(LIST_MAX)];
    let count = |n: usize| u32::try_from(n).expect("at most 4096 slots").to_le_bytes();
    out[8..12].copy_from_slice(&count(all.len()));
    out[12..16].copy_from_slice(&count(here.len()));
    for (entry, bytes) in here.iter().zip(out[LIST_AT..].chunks_exact_mut(ENTRY)) {
        bytes[..16].copy_from_slice(&entry.id.to_bytes());
        bytes[16..24].copy_from_slice(&entry.created.to_le_bytes());
        bytes[24..32].copy_from_slice(&entry.own_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&entry.blocks.to_le_bytes());
        bytes[44..48].copy_from_slice(&u32::from(entry.deleting).to_le_bytes());
        put_name(bytes, 40, 48, &entry.name);
    }
    out[SHARES_AT] = u8::from(shares);
}

/// How many there are in all, whether the replica shares blocks with others, and the entries of a list page; nothing
/// where it is none.
#[must_use]
pub fn decode_list(page: &[u8]) -> Option<(usize, bool, Vec<SnapshotEntry>)> {
    if page.len() != PAGE as usize || page[..8] != LIST_MAGIC {
        return None;
    }
    let here = usize::try_from(u32_at(page, 12)?).ok().filter(|&n| n <= LIST_MAX)?;
    let entry = |bytes: &[u8]| {
        Some(SnapshotEntry {
            id: SnapshotId::from_bytes(id_at(bytes, 0)?),
            created: u64_at(bytes, 16)?,
            own_bytes: u64_at(bytes, 24)?,
            blocks: u64_at(bytes, 32)?,
            deleting: u32_at(bytes, 44)? != 0,
            name: name_at(bytes, 48, u32_at(bytes, 40)?)?,
        })
    };
    let entries: Option<Vec<_>> =
        page[LIST_AT..].chunks_exact(ENTRY).take(here).map(entry).collect();
    let shares = page[SHARES_AT] != 0;
    Some((usize::try_from(u32_at(page, 8)?).ok()?, shares, entries?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_lists_survive_their_pages() {
        let mut page = vec![0xff; PAGE as usize];
        let spec = SnapshotSpec { id: SnapshotId(7), name: "täglich".to_owned(), created: 9 };
        let whole = CloneSpec { volume: VolumeId(8), blocks: 77, partial: false };
        for clone in [None, Some(whole), Some(CloneSpec { partial: true, ..whole })] {
            let call = SnapshotCall { spec: spec.clone(), clone };
            encode(&call, &mut page);
            assert_eq!(decode(&page), Some(call));
        }
        page[33] = 1;
        assert_eq!(decode(&page), None);
        assert_eq!(decode(&[]), None);
        let all: Vec<_> = (0..50u64)
            .map(|i| SnapshotEntry {
                id: SnapshotId(u128::from(i)),
                name: "x".repeat(64),
                created: i,
                own_bytes: i << 20,
                blocks: 1000,
                deleting: i % 2 == 0,
            })
            .collect();
        let mut found = Vec::new();
        while found.len() < all.len() {
            encode_list(&all, found.len(), true, &mut page);
            let (total, true, mut entries) = decode_list(&page).expect("it is a list") else {
                panic!("it shares blocks");
            };
            assert!(total == 50 && !entries.is_empty());
            found.append(&mut entries);
        }
        assert_eq!(found, all);
        encode_list(&all, 50, false, &mut page);
        assert_eq!(decode_list(&page), Some((50, false, Vec::new())));
    }

    #[test]
    fn opcodes_say_where_their_data_goes() {
        for (verb, code) in [
            (SnapshotVerb::Create, OPCODE_CREATE),
            (SnapshotVerb::Delete, OPCODE_DELETE),
            (SnapshotVerb::Restore, OPCODE_RESTORE),
            (SnapshotVerb::Clone, OPCODE_CLONE),
        ] {
            assert_eq!((opcode(verb), super::verb(code), code & 3), (code, Some(verb), 1));
        }
        assert_eq!((verb(OPCODE_LIST), OPCODE_LIST & 3), (None, 2));
    }
}
