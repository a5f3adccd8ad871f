#![forbid(unsafe_code)]
//! The data engine: a [`Shard`] composes NVMe/TCP targets and initiators, nexuses and replica pools
//! over a [`Driver`](reactor::Driver), and a thread runs it on io_uring.
//!
//! A write's way through: bytes from a host's socket make a command in the target's queue; the
//! volume's nexus turns it into one child request per replica; a remote child goes out through an
//! initiator session, a local one straight to its pool; each completion comes back the same way.

pub mod control;
pub mod device;
#[cfg(feature = "nemesis")]
pub mod nemesis;
pub mod process;
pub mod register;
pub mod shard;
pub mod snapshot;
pub mod thread;
pub mod upkeep;

pub use cairn_block as block;
pub use cairn_crypt as crypt;
pub use cairn_iscsi as iscsi;
pub use cairn_nexus as nexus;
pub use cairn_nvmf as nvmf;
pub use cairn_reactor as reactor;
pub use cairn_replica as replica;

pub use control::{
    ChildAddress, ChildReport, Command, DeviceReport, EncryptionReport, EncryptionSpec,
    EngineError, ExportCounters, HostReport, IscsiExport, IscsiPortal, IscsiReport, IscsiSession,
    IscsiTarget, PoolMember, PoolReport, RebuildEnded, RebuildStatus, ReplicaReport, Reply,
    ScrubAction, Sharing, SnapshotReport, VolumeReplica, VolumeReport, VolumeSpec,
};
pub use process::EngineHandle;
pub use shard::{IscsiConfig, Message, Shard, ShardConfig, WatchedRegister, WatchedVolume};
pub use thread::{MAX_SHARDS, start, start_shards};
