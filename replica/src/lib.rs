#![forbid(unsafe_code)]
//! The replica store: a pool on a device, and the thin replicas that live in it.
//!
//! Pure state machines. [`Pool::submit`] and the commands put work in, [`Pool::poll_disk`] gives device
//! operations out, [`Pool::handle_disk`] takes their results, [`Pool::poll_done`] gives the answers. No
//! clock, no thread, no file: what runs in production runs in the simulator.
//!
//! What holds, whatever is cut off when:
//! - an extent is never readable by a replica before it reads as zeros on stable storage;
//! - an allocation is on stable storage before the first byte of data goes to its extent;
//! - an extent is reused only after its release is on stable storage and its I/O has drained;
//! - a failed flush or metadata write takes the pool offline: nothing is retried, nothing is guessed.
//!
//! The bytes on the device are drawn in `docs/format.md`.

mod alloc;
mod blocks;
mod check;
mod clean;
mod control;
mod data;
mod device;
pub mod disk;
mod error;
mod extents;
mod flush;
mod format;
mod fsck;
mod inspect;
mod journal;
mod layers;
mod maintain;
mod member;
mod merge;
mod multi;
mod open;
mod pool;
mod raw;
mod settle;
mod slab;
mod snapshot;
mod sums;
mod survey;
mod undo;

pub use device::{Device, MemDevice, SparseDevice};
pub use error::{ControlError, DiskError, PoolError};
pub use format::{FormatOptions, Probe};
pub use fsck::{CheckOptions, CheckReport, Checked, Finding, Problem, Severity, check_pool};
pub use inspect::{
    BadBlock, BlockCheck, CatalogInfo, ChecksumCopy, ChecksumInfo, DirtyInfo, ExtentInfo,
    Inspection, JournalInfo, LayerMap, MappedExtent, MarkedBy, PageInfo, Source, SuperblockInfo,
    inspect_catalog, inspect_checksums, inspect_dirty, inspect_extents, inspect_journal,
    inspect_map, inspect_superblock,
};
pub use multi::{
    DeviceOptions, DrainInfo, MAX_DEVICES, MemberInfo, MultiPool, OpenOptions, OpenedSet, SetAside,
};
pub use pool::{
    DiskId, DiskIo, DiskOp, Done, Pool, PoolState, Register, ReplicaInfo, ReplicaSlot, ReplicaSpec,
    ReplicaState, Usage,
};
pub use settle::{RoundEnd, change};
pub use snapshot::{SnapshotInfo, SnapshotSpec};
pub use survey::{Damaged, Fault, Structure};
