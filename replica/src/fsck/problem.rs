//! What a check can find, how bad it is, and what it means.

use cairn_block::ReplicaId;

use crate::disk::BlockError;
use crate::inspect::BadBlock;
use crate::survey::{Damaged, Fault};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Usual after a crash: the next start puts it right, or nothing needs it.
    Note,
    /// Damage that a repair mends without guessing.
    Mendable,
    /// Damage that stays.
    Damage,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub problem: Problem,
    /// It has been mended.
    pub repaired: bool,
}

/// What is not as it should be. Blocks are counted from the start of the device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the texts tell of the fields")]
pub enum Problem {
    #[error("the copy of the superblock at block {address} is damaged: {why}")]
    Superblock { address: u64, why: BlockError },
    #[error("the copy of the superblock at block {address} is older ({sequence}) than the newest")]
    SuperblockBehind { address: u64, sequence: u64 },
    #[error("copy {copy} of the catalog page of slot {slot} is damaged: {why}")]
    CatalogCopy { slot: u16, copy: u8, why: Fault },
    #[error("copy {copy} of the catalog page of slot {slot} is older than its twin")]
    CatalogBehind { slot: u16, copy: u8 },
    #[error("the copies of the catalog page of slot {slot} are equally new and differ")]
    CatalogTwins { slot: u16 },
    #[error("both copies of the catalog page of slot {slot} are damaged: {why}")]
    CatalogLost { slot: u16, why: Fault },
    #[error("copy {copy} of table page {page} is damaged: {why}")]
    TableCopy { page: u32, copy: u8, why: Fault },
    #[error("both copies of table page {page} are damaged")]
    TableLost { page: u32 },
    #[error("{}", old_table(*page))]
    TableOld { page: Option<u32> },
    #[error("journal block {sequence} is lost, and block {later} comes after it")]
    JournalHole { sequence: u64, later: u64 },
    #[error("journal block {sequence} verifies, and names extents or states that do not exist")]
    JournalRecords { sequence: u64 },
    #[error("slot {slot} was to take a replica's layer, and the replica still has it")]
    SlotReleased { slot: u16 },
    #[error("slot {slot} names layer {layer}, which is another's or does not exist")]
    LayerTaken { slot: u16, layer: u16 },
    #[error("layer {layer} has layer {parent} as its parent, which is not a snapshot's")]
    Parent { layer: u16, parent: u16 },
    #[error("layer {layer} is among its own parents")]
    Circle { layer: u16 },
    #[error("a read of layer {layer} looks through {depth} layers, more than are allowed")]
    TooDeep { layer: u16, depth: usize },
    #[error("what extent {extent} is used for is not known: its entry is damaged")]
    ExtentUnknown { extent: u32 },
    #[error("extent {extent} is free, and its entry still tells of a use")]
    FreeEntry { extent: u32, certain: bool },
    #[error(
        "extent {extent} was allocated by journal block {birth}, and the next one to write is {head}"
    )]
    Unborn { extent: u32, birth: u64, head: u64 },
    #[error("extent {extent} belongs to layer {layer}, which nobody has")]
    Orphan { extent: u32, layer: u16, certain: bool },
    #[error(
        "extent {extent} is extent {logical} of layer {layer}, whose owner ends after {end} extents"
    )]
    PastEnd { extent: u32, layer: u16, logical: u32, end: u64 },
    #[error("extents {other} and {extent} are both said to be in one place of one layer")]
    Double { extent: u32, other: u32 },
    #[error("extent {extent}: the {page}")]
    Checksums { extent: u32, page: Damaged },
    #[error("{}", bad_block(*extent, *layer, *replica, bad))]
    Block { extent: u32, layer: u16, replica: Option<ReplicaId>, bad: BadBlock },
    #[error("extent {extent} is free and should read as zeros, and does not")]
    NotZeroed { extent: u32, certain: bool },
}

fn old_table(page: Option<u32>) -> String {
    let text = "the allocation table is not the one that the superblock was written with";
    match page {
        Some(page) => format!("{text}; a copy of page {page} is damaged"),
        None => text.to_owned(),
    }
}

fn bad_block(extent: u32, layer: u16, replica: Option<ReplicaId>, bad: &BadBlock) -> String {
    let how = if bad.unreadable { "is not read by the device" } else { "does not verify" };
    let of = match (replica, bad.lba) {
        (Some(replica), Some(lba)) => format!("block {lba} of replica {replica}"),
        _ => "of no replica".to_owned(),
    };
    let (block, offset) = (bad.block, bad.offset);
    format!("block {block} of extent {extent} (byte {offset}; layer {layer}, {of}) {how}")
}

impl Problem {
    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::SuperblockBehind { .. }
            | Self::CatalogBehind { .. }
            | Self::TableCopy { .. }
            | Self::SlotReleased { .. } => Severity::Note,
            Self::Superblock { .. } | Self::CatalogCopy { .. } => Severity::Mendable,
            Self::FreeEntry { certain, .. }
            | Self::Orphan { certain, .. }
            | Self::NotZeroed { certain, .. } => {
                if *certain {
                    Severity::Mendable
                } else {
                    Severity::Damage
                }
            }
            _ => Severity::Damage,
        }
    }

    /// The extent that a journal record mends it for: *free, to be zeroed before use*.
    pub(crate) fn frees(&self) -> Option<u32> {
        match *self {
            Self::FreeEntry { extent, certain: true }
            | Self::Orphan { extent, certain: true, .. }
            | Self::NotZeroed { extent, certain: true } => Some(extent),
            _ => None,
        }
    }

    /// What it means for who uses the pool, and what to do.
    #[must_use]
    pub fn meaning(&self) -> &'static str {
        match self {
            Self::Superblock { .. } => {
                "another copy is whole and the pool opens; repair rewrites it, so that the next one \
                 may fail"
            }
            Self::SuperblockBehind { .. } => "usual: nothing waits for the older copies",
            Self::CatalogCopy { .. } => {
                "its twin is whole and the pool opens; repair, or the next start, rewrites it"
            }
            Self::CatalogBehind { .. } => "usual after a crash: the next start brings it up",
            Self::CatalogTwins { .. } => {
                "one of them was not written by Cairn; which one holds is not known here: use the \
                 replicas on other pools, and make this one anew"
            }
            Self::CatalogLost { .. } => {
                "the pool does not open: which replica was there, and what it promised, is lost; \
                 use the replicas on other pools, and make this pool anew"
            }
            Self::TableCopy { .. } => {
                "nothing needs it if the rest of the table is whole: the next checkpoint writes it"
            }
            Self::TableLost { .. } | Self::TableOld { .. } | Self::ExtentUnknown { .. } => {
                "the pool does not open: where data is cannot be told; use the replicas on other \
                 pools, and make this one anew"
            }
            Self::JournalHole { .. } | Self::JournalRecords { .. } => {
                "the pool does not open: allocations that were promised are lost; use the replicas \
                 on other pools, and make this one anew"
            }
            Self::SlotReleased { .. } => {
                "a crash cut off a snapshot that was being taken: the next start releases the slot"
            }
            Self::LayerTaken { .. } | Self::Parent { .. } | Self::Circle { .. } => {
                "the pool does not open: whose data it is cannot be told; use the replicas on other \
                 pools, and make this one anew"
            }
            Self::TooDeep { .. } => "reads work and are slow; delete snapshots",
            Self::FreeEntry { certain, .. } => {
                mended(*certain, "it is zeroed before it is used again")
            }
            Self::Unborn { .. } => {
                "the journal or the superblock was put back to an older state; what the extent \
                 holds is not to be trusted until it has been compared with its peers"
            }
            Self::Orphan { certain, .. } => {
                mended(*certain, "no page of the catalog names the layer: repair frees the extent")
            }
            Self::PastEnd { .. } => {
                "the pool does not open: the replica's size or the extent's entry is wrong, and \
                 which one is not known"
            }
            Self::Double { .. } => {
                "the pool does not open: which of the two holds the data is not known"
            }
            Self::Checksums { .. } => {
                "reads of the extent are errors and stay so, for no checksum can be made up; a \
                 volume answers from another replica, and a discard of the extent gives it back"
            }
            Self::Block { .. } => {
                "reads of the block are errors; a volume answers from another replica, and a write \
                 of the block mends it"
            }
            Self::NotZeroed { certain, .. } => {
                mended(*certain, "repair has it zeroed before it is used")
            }
        }
    }
}

fn mended(certain: bool, text: &'static str) -> &'static str {
    if certain {
        text
    } else {
        "it is left as it is, since other damage makes it uncertain whose it is"
    }
}
