//! The superblock: what the pool is and where everything in it lies.

use cairn_block::{PoolDeviceId, PoolId};

use super::{
    BLOCK, BlockError, ENTRIES_PER_PAGE, EXTENT_BLOCKS, HEADER_LEN, Header, get_bytes, get_u16,
    get_u32, get_u64, put_u16, put_u32, put_u64, seal,
};

/// What a superblock begins with.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"CAIRNPSB";
/// The newest format version known here.
pub const VERSION: u16 = 1;
/// Features that an older program may ignore.
pub const COMPAT_KNOWN: u64 = 0;
/// Features without which the pool must not be opened.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_CHECKSUMS;
/// Every block has a checksum: see the checksum pages. Every pool has this feature.
pub const INCOMPAT_CHECKSUMS: u64 = 1;
/// Segments that fit: the first, and one for each time the pool was grown.
pub const MAX_SEGMENTS: usize = 64;
/// Devices that a pool can have, and member entries that fit.
pub const MAX_MEMBERS: usize = 64;

/// More extents than this cannot be mapped: the map's top bit is taken.
pub(crate) const MAX_EXTENTS: u64 = (1 << 31) - 2;
pub(crate) const MAX_SLOTS: u16 = 4096;
const MAX_JOURNAL_BLOCKS: u64 = 1 << 14;
/// The deepest a segment may lie, so that no sum of addresses overflows.
const MAX_ADDRESS: u64 = 1 << 44;

const FIXED: usize = HEADER_LEN + 12 * 8;
const SEGMENT_LEN: usize = 24;
const _: () = assert!(FIXED == 144);
const DEVICE_AT: usize = FIXED + MAX_SEGMENTS * SEGMENT_LEN;
const MEMBERS_AT: usize = DEVICE_AT + 32;
const LOST_AT: usize = MEMBERS_AT + MAX_MEMBERS * MEMBER_LEN;
const LOST_WORDS: usize = MAX_SLOTS as usize / 64;
const MEMBER_LEN: usize = 24;
const _: () = assert!(DEVICE_AT == 1680 && MEMBERS_AT == 1712 && LOST_AT == 3248);
const _: () = assert!(LOST_AT + 8 * LOST_WORDS <= 4096);

/// What a device is to its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberState {
    /// It holds extents and gets new ones.
    Live,
    /// Its extents are on their way to other devices; it gets no new ones.
    Draining,
    /// The pool went on without it: what it holds is out of date.
    Failed,
    /// It was drained and taken out.
    Removed,
    /// Made for the pool, and not taken in yet. Only ever in its own superblock.
    Joining,
}

impl MemberState {
    fn to_byte(self) -> u8 {
        match self {
            Self::Live => 1,
            Self::Draining => 2,
            Self::Failed => 3,
            Self::Removed => 4,
            Self::Joining => 5,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, BlockError> {
        match byte {
            1 => Ok(Self::Live),
            2 => Ok(Self::Draining),
            3 => Ok(Self::Failed),
            4 => Ok(Self::Removed),
            5 => Ok(Self::Joining),
            _ => Err(BlockError::Field("state of a member")),
        }
    }

    /// Whether the pool cannot be whole without it.
    #[must_use]
    pub fn is_needed(self) -> bool {
        matches!(self, Self::Live | Self::Draining)
    }
}

/// A device of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberEntry {
    /// The device.
    pub id: PoolDeviceId,
    /// What it is to the pool.
    pub state: MemberState,
}

/// The devices of a pool, as all of them are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The highest is right. Its upper half counts how often the pool went on without a device, so that
    /// whatever a device that was left behind may have stored last is never the highest.
    pub generation: u64,
    /// A bit for each replica slot: its extents that are mapped nowhere may have been on a device that
    /// is gone, and do not read as zeros.
    pub lost: Box<[u64; LOST_WORDS]>,
    /// At most [`MAX_MEMBERS`], none twice.
    pub members: Vec<MemberEntry>,
}

impl Default for Membership {
    fn default() -> Self {
        Self { generation: 0, lost: Box::new([0; LOST_WORDS]), members: Vec::new() }
    }
}

impl Membership {
    /// Whether of no slot anything may have been lost.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        *self.lost == [0; LOST_WORDS]
    }

    /// One device alone.
    #[must_use]
    pub fn alone(id: PoolDeviceId, state: MemberState) -> Self {
        Self { members: vec![MemberEntry { id, state }], ..Self::default() }
    }

    /// What `id` is to the pool; nothing where the pool does not know it.
    #[must_use]
    pub fn state_of(&self, id: PoolDeviceId) -> Option<MemberState> {
        self.members.iter().find(|m| m.id == id).map(|m| m.state)
    }

    /// Whether what `slot` does not map may have been lost.
    #[must_use]
    pub fn is_lost(&self, slot: u16) -> bool {
        self.lost.get(usize::from(slot / 64)).is_some_and(|word| word >> (slot % 64) & 1 != 0)
    }

    /// Takes note whether what `slot` does not map may have been lost.
    pub fn set_lost(&mut self, slot: u16, lost: bool) {
        let word = &mut self.lost[usize::from(slot / 64)];
        *word &= !(1 << (slot % 64));
        *word |= u64::from(lost) << (slot % 64);
    }

    /// Gives a device a state. The oldest of those that are gone makes room for a new one.
    pub fn set(&mut self, id: PoolDeviceId, state: MemberState) {
        if let Some(member) = self.members.iter_mut().find(|m| m.id == id) {
            member.state = state;
            return;
        }
        if self.members.len() >= MAX_MEMBERS
            && let Some(at) = self.members.iter().position(|m| !m.state.is_needed())
        {
            self.members.remove(at);
        }
        self.members.push(MemberEntry { id, state });
    }

    /// How many times the pool has gone on without a device.
    #[must_use]
    pub fn losses(&self) -> u32 {
        u32::try_from(self.generation >> 32).expect("the upper half")
    }

    /// The next generation of an orderly change.
    pub fn advance(&mut self) {
        self.generation += 1;
    }

    /// The next generation where a device is left behind.
    pub fn leave_behind(&mut self) {
        self.generation = ((self.generation >> 32) + 1) << 32;
    }
}

/// A run of extents, and the part of the allocation table that describes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first block of its table: all pages' A copies, then all their B copies.
    pub table: u64,
    /// The first block of its first extent.
    pub data: u64,
    /// How many extents.
    pub extents: u32,
}

impl Segment {
    /// Pages of its table.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.extents.div_ceil(ENTRIES_PER_PAGE)
    }

    /// The block after its last extent.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.data + u64::from(self.extents) * EXTENT_BLOCKS
    }

    /// Where copy A of the checksum page of its extent `local` lies; copy B is next to it.
    #[must_use]
    pub fn sums_address(&self, local: u32) -> u64 {
        self.table + 2 * u64::from(self.pages()) + 2 * u64::from(local)
    }

    /// Where copy `copy` (0 or 1) of its page `page` lies.
    #[must_use]
    pub fn page_address(&self, page: u32, copy: u64) -> u64 {
        self.table + copy * u64::from(self.pages()) + u64::from(page)
    }
}

/// A decoded superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The pool.
    pub pool: PoolId,
    /// Higher is newer.
    pub sequence: u64,
    /// Features that may be ignored.
    pub compat: u64,
    /// Features that may not.
    pub incompat: u64,
    /// Length in bytes of the device, as the pool uses it.
    pub device_len: u64,
    /// The device's sector size in bytes.
    pub sector_size: u32,
    /// Slots in the catalog, for replicas and snapshots.
    pub slots: u16,
    /// The first block of the catalog.
    pub catalog: u64,
    /// The first block of the journal ring.
    pub journal: u64,
    /// Blocks of the journal ring.
    pub journal_blocks: u64,
    /// Replay begins with the journal block of this sequence.
    pub journal_tail: u64,
    /// The last checkpoint that completed.
    pub checkpoint: u64,
    /// A sum over the sequence of every table page as of that checkpoint.
    pub table_digest: u64,
    /// The extents, oldest segment first.
    pub segments: Vec<Segment>,
    /// The device that this superblock is on.
    pub device: PoolDeviceId,
    /// It and the others of the pool.
    pub membership: Membership,
}

impl Superblock {
    /// Encodes it as the copy that lies at `address`, in blocks.
    pub fn encode(&self, address: u64, block: &mut [u8]) {
        block.fill(0);
        Header { address, sequence: self.sequence, pool: self.pool }
            .encode(SUPERBLOCK_MAGIC, block);
        put_u64(block, 48, self.compat);
        put_u64(block, 56, self.incompat);
        put_u64(block, 64, self.device_len);
        put_u32(block, 72, self.sector_size);
        put_u16(block, 76, self.slots);
        block[78] = 12;
        block[79] = 20;
        put_u64(block, 80, self.catalog);
        put_u64(block, 88, self.journal);
        put_u64(block, 96, self.journal_blocks);
        put_u64(block, 104, self.journal_tail);
        put_u64(block, 112, self.checkpoint);
        put_u64(block, 120, self.table_digest);
        assert!(self.segments.len() <= MAX_SEGMENTS, "segments are counted before they are added");
        put_u32(block, 128, u32::try_from(self.segments.len()).expect("at most 64"));
        for (i, segment) in self.segments.iter().enumerate() {
            let at = FIXED + i * SEGMENT_LEN;
            put_u64(block, at, segment.table);
            put_u64(block, at + 8, segment.data);
            put_u32(block, at + 16, segment.extents);
        }
        block[DEVICE_AT..DEVICE_AT + 16].copy_from_slice(&self.device.to_bytes());
        put_u64(block, DEVICE_AT + 16, self.membership.generation);
        let members = &self.membership.members;
        assert!(members.len() <= MAX_MEMBERS, "members are counted before they are added");
        put_u32(block, DEVICE_AT + 24, u32::try_from(members.len()).expect("at most 64"));
        for (i, word) in self.membership.lost.iter().enumerate() {
            put_u64(block, LOST_AT + 8 * i, *word);
        }
        for (i, member) in members.iter().enumerate() {
            let at = MEMBERS_AT + i * MEMBER_LEN;
            block[at..at + 16].copy_from_slice(&member.id.to_bytes());
            block[at + 16] = member.state.to_byte();
        }
        seal(block);
    }

    /// Decodes the copy that lies at `address`, in blocks. A feature that is unknown is not an error here.
    ///
    /// # Errors
    /// [`BlockError`]: a decoded superblock describes structures that do not overlap and fit the device.
    pub fn decode(address: u64, block: &[u8]) -> Result<Self, BlockError> {
        let header = Header::decode(SUPERBLOCK_MAGIC, address, block)?;
        let mut superblock = Self {
            pool: header.pool,
            sequence: header.sequence,
            compat: get_u64(block, 48),
            incompat: get_u64(block, 56),
            device_len: get_u64(block, 64),
            sector_size: get_u32(block, 72),
            slots: get_u16(block, 76),
            catalog: get_u64(block, 80),
            journal: get_u64(block, 88),
            journal_blocks: get_u64(block, 96),
            journal_tail: get_u64(block, 104),
            checkpoint: get_u64(block, 112),
            table_digest: get_u64(block, 120),
            segments: Vec::new(),
            device: PoolDeviceId::from_bytes(get_bytes(block, DEVICE_AT)),
            membership: Membership::default(),
        };
        if superblock.incompat & !INCOMPAT_KNOWN != 0 {
            // What follows may mean something else.
            return Ok(superblock);
        }
        if block[78] != 12 || block[79] != 20 {
            return Err(BlockError::Field("block or extent size"));
        }
        let count = get_u32(block, 128) as usize;
        if count == 0 || count > MAX_SEGMENTS {
            return Err(BlockError::Field("segment count"));
        }
        for i in 0..count {
            let at = FIXED + i * SEGMENT_LEN;
            superblock.segments.push(Segment {
                table: get_u64(block, at),
                data: get_u64(block, at + 8),
                extents: get_u32(block, at + 16),
            });
        }
        superblock.membership = decode_membership(block)?;
        if superblock.membership.members.is_empty() {
            // Written before pools had several devices: it is the only one.
            superblock.device = PoolDeviceId(superblock.pool.0);
            superblock.membership = Membership::alone(superblock.device, MemberState::Live);
        }
        if superblock.membership.state_of(superblock.device).is_none() {
            return Err(BlockError::Field("the device is not one of its own members"));
        }
        superblock.verify()?;
        Ok(superblock)
    }

    fn verify(&self) -> Result<(), BlockError> {
        let end = self.device_len / BLOCK;
        if end > MAX_ADDRESS {
            return Err(BlockError::Field("device length"));
        }
        if self.slots == 0 || self.slots > MAX_SLOTS || self.catalog < 2 || self.catalog > end {
            return Err(BlockError::Field("catalog"));
        }
        let after_catalog = self.catalog + 2 * u64::from(self.slots);
        if self.journal < after_catalog
            || self.journal > end
            || self.journal_blocks < 4
            || self.journal_blocks > MAX_JOURNAL_BLOCKS
            || self.journal_tail == 0
            || self.journal_tail > u64::MAX / 2
        {
            return Err(BlockError::Field("journal"));
        }
        if self.sequence > u64::MAX / 2 || self.checkpoint > u64::MAX / 2 {
            return Err(BlockError::Field("sequence"));
        }
        let mut at = self.journal + self.journal_blocks;
        let mut extents = 0u64;
        for segment in &self.segments {
            extents += u64::from(segment.extents);
            if segment.extents == 0 || extents > MAX_EXTENTS {
                return Err(BlockError::Field("extents of a segment"));
            }
            if segment.table < at || segment.table > end || segment.data > end {
                return Err(BlockError::Field("a segment's place"));
            }
            if segment.data < segment.sums_address(segment.extents) {
                return Err(BlockError::Field("a segment's table"));
            }
            at = segment.end();
            if at > end {
                return Err(BlockError::Field("a segment's length"));
            }
        }
        Ok(())
    }

    /// Extents in all.
    #[must_use]
    pub fn extents(&self) -> u32 {
        self.segments.iter().map(|s| s.extents).sum()
    }

    /// Where the backup copy lies: the last whole block of the device.
    #[must_use]
    pub fn backup(&self) -> u64 {
        self.device_len / BLOCK - 1
    }

    /// Where copy `copy` (0 or 1) of the catalog page of `slot` lies.
    #[must_use]
    pub fn catalog_address(&self, slot: u16, copy: u64) -> u64 {
        self.catalog + 2 * u64::from(slot) + copy
    }

    /// Where the journal block of `sequence` lies.
    #[must_use]
    pub fn journal_address(&self, sequence: u64) -> u64 {
        self.journal + sequence % self.journal_blocks
    }
}

fn decode_membership(block: &[u8]) -> Result<Membership, BlockError> {
    let mut membership =
        Membership { generation: get_u64(block, DEVICE_AT + 16), ..Membership::default() };
    let count = get_u32(block, DEVICE_AT + 24) as usize;
    if count > MAX_MEMBERS || membership.generation > u64::MAX / 2 {
        return Err(BlockError::Field("count or generation of the members"));
    }
    for (i, word) in membership.lost.iter_mut().enumerate() {
        *word = get_u64(block, LOST_AT + 8 * i);
    }
    for i in 0..count {
        let at = MEMBERS_AT + i * MEMBER_LEN;
        let id = PoolDeviceId::from_bytes(get_bytes(block, at));
        if membership.state_of(id).is_some() {
            return Err(BlockError::Field("a device is a member twice"));
        }
        let state = MemberState::from_byte(block[at + 16])?;
        membership.members.push(MemberEntry { id, state });
    }
    Ok(membership)
}
