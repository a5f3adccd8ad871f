//! The allocation table: an entry for each physical extent.

use cairn_block::PoolId;

use super::{
    BLOCK_LEN, BlockError, HEADER_LEN, Header, get_u16, get_u32, get_u64, put_u16, put_u32,
    put_u64, seal,
};

/// What a table page begins with.
pub const TABLE_MAGIC: [u8; 8] = *b"CAIRNTBL";
/// Entries of a table page.
pub const ENTRIES_PER_PAGE: u32 = 125;

const ENTRIES_AT: usize = 96;
const ENTRY_LEN: usize = 32;
const _: () = assert!(HEADER_LEN + 48 == ENTRIES_AT);
const _: () = assert!(ENTRIES_AT + ENTRIES_PER_PAGE as usize * ENTRY_LEN == BLOCK_LEN);

/// What an extent is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryState {
    /// Free, and holds whatever was there before.
    FreeUnzeroed,
    /// Free, and reads as zeros.
    FreeZeroed,
    /// Holds a logical extent of a layer.
    Allocated,
}

impl EntryState {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Self::FreeUnzeroed => 1,
            Self::FreeZeroed => 2,
            Self::Allocated => 3,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Result<Self, BlockError> {
        match byte {
            1 => Ok(Self::FreeUnzeroed),
            2 => Ok(Self::FreeZeroed),
            3 => Ok(Self::Allocated),
            _ => Err(BlockError::Field("extent state")),
        }
    }
}

/// What the table says of one extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it is used for.
    pub state: EntryState,
    /// The layer that it belongs to, where it is allocated.
    pub layer: u16,
    /// Which of the layer's extents, where it is allocated.
    pub logical: u32,
    /// When it was last settled: what whoever settled it said. Zero where it never was.
    pub stamp: u64,
    /// Whether its checksums on the device may be behind its data.
    pub dirty: bool,
    /// Whether it is a copy that is being made of another device's extent, and no part of the replica
    /// until that is done: open frees it.
    pub incoming: bool,
    /// Which copy of its checksum page is current, where it is not dirty.
    pub copy: bool,
    /// Whether it was written and not settled since.
    pub open: bool,
    /// The journal block that allocated it: tells one life of the extent from the next.
    pub birth: u64,
}

/// The bit of an entry's flags that says that it is dirty.
const DIRTY: u8 = 1;
/// The bit that says that it is an unfinished copy.
const INCOMING: u8 = 2;
/// The bit that says that copy B of its checksum page is the current one.
const COPY_B: u8 = 4;
/// The bit that says that it is open.
const OPEN: u8 = 8;

impl Entry {
    pub(crate) fn flags(&self) -> u8 {
        (if self.dirty { DIRTY } else { 0 })
            | (if self.incoming { INCOMING } else { 0 })
            | (if self.copy { COPY_B } else { 0 })
            | (if self.open { OPEN } else { 0 })
    }

    pub(crate) fn dirty_of(flags: u8) -> bool {
        flags & DIRTY != 0
    }

    pub(crate) fn incoming_of(flags: u8) -> bool {
        flags & INCOMING != 0
    }

    pub(crate) fn copy_of(flags: u8) -> bool {
        flags & COPY_B != 0
    }

    pub(crate) fn open_of(flags: u8) -> bool {
        flags & OPEN != 0
    }
}

impl Entry {
    /// A free extent.
    #[must_use]
    pub const fn free(zeroed: bool) -> Self {
        let state = if zeroed { EntryState::FreeZeroed } else { EntryState::FreeUnzeroed };
        Self {
            state,
            layer: 0,
            logical: 0,
            stamp: 0,
            dirty: false,
            incoming: false,
            copy: false,
            open: false,
            birth: 0,
        }
    }
}

/// The head of a table page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TablePage {
    /// One more at each write of the page; its lowest bit is the copy that it is written to.
    pub sequence: u64,
    /// The page's index in the whole table.
    pub index: u32,
    /// Entries in use.
    pub entries: u32,
    /// The checkpoint that wrote it.
    pub checkpoint: u64,
    /// The page's sequence as of the last checkpoint that had completed then.
    pub base: u64,
}

impl TablePage {
    /// Encodes the page with `entries` as the copy that lies at `address`, in blocks.
    pub fn encode(
        &self,
        address: u64,
        pool: PoolId,
        entries: impl Iterator<Item = Entry>,
        block: &mut [u8],
    ) {
        block.fill(0);
        Header { address, sequence: self.sequence, pool }.encode(TABLE_MAGIC, block);
        put_u32(block, 48, self.index);
        put_u32(block, 52, self.entries);
        put_u64(block, 56, self.checkpoint);
        put_u64(block, 64, self.base);
        let mut count = 0;
        for (entry, at) in entries.zip((ENTRIES_AT..).step_by(ENTRY_LEN)) {
            block[at] = entry.state.to_byte();
            block[at + 1] = entry.flags();
            put_u16(block, at + 2, entry.layer);
            put_u32(block, at + 4, entry.logical);
            put_u64(block, at + 8, entry.stamp);
            put_u64(block, at + 16, entry.birth);
            count += 1;
        }
        assert_eq!(count, self.entries, "as many entries as the head says");
        seal(block);
    }

    /// Decodes page `index`, of `entries` entries, that lies at `address`, in blocks.
    ///
    /// # Errors
    /// [`BlockError`]. The entries themselves are read by [`TablePage::entry`].
    pub fn decode(
        index: u32,
        entries: u32,
        address: u64,
        pool: PoolId,
        block: &[u8],
    ) -> Result<Self, BlockError> {
        let header = Header::decode_for(TABLE_MAGIC, address, pool, block)?;
        let page = Self {
            sequence: header.sequence,
            index: get_u32(block, 48),
            entries: get_u32(block, 52),
            checkpoint: get_u64(block, 56),
            base: get_u64(block, 64),
        };
        if page.index != index || page.entries != entries || entries > ENTRIES_PER_PAGE {
            return Err(BlockError::Field("page index or entries"));
        }
        if page.sequence > u64::MAX / 2 || page.checkpoint > u64::MAX / 2 {
            return Err(BlockError::Field("sequence"));
        }
        Ok(page)
    }

    /// Entry `i` of a page that has decoded.
    ///
    /// # Errors
    /// [`BlockError::Field`].
    ///
    /// # Panics
    /// Where `i` is past the end of a page.
    pub fn entry(block: &[u8], i: u32) -> Result<Entry, BlockError> {
        assert!(i < ENTRIES_PER_PAGE, "an entry past the end of its page");
        let at = ENTRIES_AT + i as usize * ENTRY_LEN;
        Ok(Entry {
            state: EntryState::from_byte(block[at])?,
            layer: get_u16(block, at + 2),
            logical: get_u32(block, at + 4),
            stamp: get_u64(block, at + 8),
            dirty: Entry::dirty_of(block[at + 1]),
            incoming: Entry::incoming_of(block[at + 1]),
            copy: Entry::copy_of(block[at + 1]),
            open: Entry::open_of(block[at + 1]),
            birth: get_u64(block, at + 16),
        })
    }
}
