//! What a nexus knows of each child.

use core::fmt;

use cairn_block::{IoStatus, ReplicaId};

/// Where a child stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildState {
    /// No session with it yet, or none any more.
    Disconnected,
    /// There is a session; its register is being read or promised.
    Joining,
    /// It takes I/O.
    Online,
    /// It failed; the configuration that leaves it out is being stored.
    Failing(FaultReason),
    /// It is not in the in-sync set: it may lack acked writes, and is not read.
    OutOfSync(FaultReason),
}

/// Why a child is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultReason {
    /// A request came back with this status.
    Failed(IoStatus),
    /// A request did not come back in time.
    DeadlineMissed,
    /// A write came while there was no session with it.
    Unreachable,
    /// The configuration that the volume was assembled from leaves it out.
    Stale,
    /// It is not the replica that it should be.
    Foreign,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(status) => write!(f, "a request failed: {status:?}"),
            Self::DeadlineMissed => f.write_str("a request missed its deadline"),
            Self::Unreachable => f.write_str("a write came while it was unreachable"),
            Self::Stale => f.write_str("it missed writes while it was away"),
            Self::Foreign => f.write_str("it belongs to another volume or has another size"),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) replica: ReplicaId,
    pub(crate) local: bool,
    pub(crate) connected: bool,
    pub(crate) state: ChildState,
    /// Reads and writes that it has not answered.
    pub(crate) load: u32,
    /// Counts sessions, so that an answer of an earlier one is known as such.
    pub(crate) session: u32,
}
