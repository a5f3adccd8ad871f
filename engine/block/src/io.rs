//! A block request and how it ended.

use crate::{BufSlice, LbaRange};

/// What is asked of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOp {
    /// Fill the buffer from the range.
    Read,
    /// Store the buffer in the range; with `fua`, on stable storage before it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Make every write that completed before this one was submitted durable.
    Flush,
    /// Make the range read as zeros; with `unmap`, space may be given back.
    WriteZeroes {
        /// Force unit access.
        fua: bool,
        /// NVMe's DEAC: the range may be deallocated.
        unmap: bool,
    },
    /// The range is no longer needed: it reads as zeros afterwards where whole blocks are covered.
    Discard,
    /// Check that every block of the range can be read right, without giving its data out.
    Verify,
    /// Something about a snapshot of the whole device, between a nexus and its replicas. The payload
    /// says what.
    Snapshot(SnapshotVerb),
}

/// What is done about a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotVerb {
    /// Take one.
    Create,
    /// Delete it.
    Delete,
    /// Give up all that was written since.
    Restore,
    /// Make another device that begins with what it holds.
    Clone,
}

impl IoOp {
    /// Whether the operation changes what later reads of the range return.
    #[must_use]
    pub const fn is_mutation(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Discard | Self::Snapshot(_)
        )
    }
}

/// A request: the operation, its range in blocks, and the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoRequest {
    /// What to do.
    pub op: IoOp,
    /// Where. Empty for a flush.
    pub range: LbaRange,
    /// Where the payload lies: exactly the range's bytes for reads and writes, empty otherwise.
    pub buf: BufSlice,
}

/// How a request ended. `Copy`, no text: this is the data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoStatus {
    /// Done.
    Ok,
    /// The range lies outside the device.
    OutOfRange,
    /// A field of the request makes no sense.
    InvalidField,
    /// This device does not do that.
    Unsupported,
    /// The medium failed, or what it returned did not verify.
    MediaError,
    /// There is no free extent left.
    NoSpace,
    /// The requester's epoch is older than the one promised.
    Fenced,
    /// The path to the device is gone; another path, or a later try, may do.
    PathError,
    /// The deadline passed.
    TimedOut,
    /// The device is not serving now; try again.
    NotReady,
    /// The payload was damaged on its way.
    TransferError,
    /// The request was given up before it ran.
    Aborted,
    /// A fault of the program itself; logged where it was seen.
    Internal,
}

impl IoStatus {
    /// Whether the request did what it was asked.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        matches!(self, Self::Ok)
    }
}
