//! Reading a pool's structures without opening it: read-only, and on damaged pools too.

mod checksums;
mod dirty;
mod map;
mod raw;

pub use checksums::{BadBlock, BlockCheck, ChecksumCopy, ChecksumInfo, inspect_checksums};
pub(crate) use checksums::{Pages, check_blocks};
pub use dirty::{DirtyInfo, MarkedBy, inspect_dirty};
pub use map::{LayerMap, MappedExtent, Source, inspect_map};
pub use raw::{
    CatalogInfo, ExtentInfo, JournalInfo, PageInfo, SuperblockInfo, inspect_catalog,
    inspect_extents, inspect_journal, inspect_superblock,
};

use crate::survey::Damaged;

/// What was found, and what could not be read on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection<T> {
    /// What could be read.
    pub found: T,
    /// What could not.
    pub damaged: Vec<Damaged>,
}
