//! What the control side asks a shard, and what it hears back. None of this is on the data path.

use std::net::SocketAddr;

use cairn_block::{BlockSize, PoolDeviceId, PoolId, ReplicaId, SnapshotId, SnapshotVerb, VolumeId};
use cairn_crypt::{Envelope, Kek, KeyId};
use cairn_iscsi::chap::Chap;
use cairn_nexus::{MendCounters, Purpose, ScrubReport};
use cairn_replica::{MultiPool, Pool, ReplicaSpec, Usage};

use crate::snapshot::SnapshotCall;

/// Why a command was not carried out. Each says what was wrong with what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// There is no such pool, replica or volume.
    #[error("there is no {kind} `{name}` in this process")]
    NotFound {
        /// What was looked for.
        kind: &'static str,
        /// By which name.
        name: String,
    },
    /// There is one of that name already.
    #[error("{kind} `{name}` exists already")]
    Exists {
        /// What was to be made.
        kind: &'static str,
        /// Under which name.
        name: String,
    },
    /// It is in use.
    #[error("{0}")]
    Busy(String),
    /// The request cannot be met; the text says why.
    #[error("{0}")]
    Invalid(String),
    /// A device failed, or a pool is offline.
    #[error("{0}")]
    Storage(String),
    /// The shard is stopping, or has stopped.
    #[error("the engine is shutting down")]
    Stopped,
}

/// Carries one answer back to whoever asked.
pub struct Reply<T>(Box<dyn FnOnce(Result<T, EngineError>) + Send>);

impl<T> Reply<T> {
    /// An answer that is handed to `then`, on the shard's thread: it must not block.
    pub fn new(then: impl FnOnce(Result<T, EngineError>) + Send + 'static) -> Self {
        Self(Box::new(then))
    }

    /// Answers.
    pub fn send(self, result: Result<T, EngineError>) {
        (self.0)(result);
    }
}

impl<T> std::fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reply")
    }
}

/// Where a child of a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildAddress {
    /// In a pool of this process: its I/O skips the network.
    Local {
        /// The pool's name.
        pool: String,
    },
    /// Behind NVMe/TCP.
    Remote {
        /// The process that has it.
        peer: SocketAddr,
        /// The replica's subsystem.
        nqn: String,
    },
}

/// How an encrypted volume's key is had.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncryptionSpec {
    /// The key-encryption keys to try; more than one while a change of the key is not known to be done.
    pub keks: Vec<Kek>,
    /// Why a key is not among them; empty where all are.
    pub missing: String,
    /// The key of a volume that is to be made, wrapped with one of `keks`.
    pub new: Option<Box<Envelope>>,
    /// The volume that the key was made for, where it is another: a clone's origin.
    pub owner: Option<VolumeId>,
}

/// How a volume is encrypted, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptionReport {
    /// The cipher's name.
    pub cipher: &'static str,
    /// The id of the key that the volume's key is wrapped with.
    pub key_id: KeyId,
    /// Its key, wrapped.
    pub envelope: Envelope,
}

/// A replica of a volume, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeReplica {
    /// Which.
    pub id: ReplicaId,
    /// Where.
    pub address: ChildAddress,
    /// Whether it votes and holds no data: then it may be as small as a block. What the volume's stored
    /// configuration says of a member goes before this.
    pub witness: bool,
}

impl From<(ReplicaId, ChildAddress)> for VolumeReplica {
    /// One that holds data.
    fn from((id, address): (ReplicaId, ChildAddress)) -> Self {
        Self { id, address, witness: false }
    }
}

/// A volume to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// Its name, for people.
    pub name: String,
    /// The subsystem that hosts connect to.
    pub nqn: String,
    /// Size in blocks of 4096 bytes, which is what its replicas have.
    pub blocks: u64,
    /// The blocks that hosts see; `None`: those that its configuration tells of, or 4096.
    pub block_size: Option<BlockSize>,
    /// Its replicas and where they are.
    pub children: Vec<VolumeReplica>,
    /// Whether it is encrypted, and how its key is had.
    pub encryption: Option<EncryptionSpec>,
    /// Whether it is new.
    pub purpose: Purpose,
    /// A replica that does not answer for so long is taken out.
    pub child_deadline_ms: u64,
    /// Host NQNs that may connect; `None`: any.
    pub allowed_hosts: Option<Vec<String>>,
    /// Other processes may serve it in this one's place.
    pub sharing: Option<Sharing>,
    /// Initiators reach it too.
    pub iscsi: Option<Box<IscsiExport>>,
}

/// A volume as a logical unit of an iSCSI target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IscsiExport {
    /// The target's name. Volumes of one target are on one shard.
    pub iqn: String,
    /// The unit's number.
    pub lun: u16,
    /// Names of the initiators that may log in: none, nobody; `*`, any. Of the target as a whole: what was said last
    /// of one of its volumes.
    pub initiators: Vec<String>,
    /// What they have to prove; likewise.
    pub chap: Option<Chap>,
    /// Initiators may read the volume, and not write to it; of this unit alone. Hosts of NVMe are not affected.
    pub read_only: bool,
    /// Initiators may have the medium taken out of this unit, and put in again: they are told so, and nothing else happens.
    pub removable: bool,
}

/// An address that initiators reach a process at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IscsiPortal {
    /// Where.
    pub address: SocketAddr,
    /// Its portal group, which is also a relative target port.
    pub group: u16,
}

/// What a shard is told of a target of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiTarget {
    /// It, and who may log in.
    pub export: IscsiExport,
    /// Where else initiators reach it.
    pub elsewhere: Vec<IscsiPortal>,
}

/// A volume's logical unit, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiReport {
    /// The target's name.
    pub iqn: String,
    /// The unit's number.
    pub lun: u16,
    /// Names of the initiators that may log in.
    pub initiators: Vec<String>,
    /// Whether initiators may not write to it.
    pub read_only: bool,
    /// Whether they may have its medium taken out.
    pub removable: bool,
    /// Whether they have to prove who they are.
    pub chap: bool,
    /// Whether the target proves who it is, to those who ask.
    pub mutual_chap: bool,
    /// The access state of this process's ports; empty where the unit is not there yet.
    pub state: &'static str,
    /// The target port group of this process.
    pub port_group: u16,
    /// The initiators that are logged in.
    pub sessions: Vec<IscsiSession>,
}

/// A session of an initiator, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiSession {
    /// Its name.
    pub initiator: String,
    /// Tells its sessions apart.
    pub isid: [u8; 6],
    /// The session's handle here.
    pub tsih: u16,
    /// The portal group that it came in at.
    pub portal_group: u16,
    /// Whether headers have digests.
    pub header_digest: bool,
    /// Whether data has.
    pub data_digest: bool,
}

/// How a volume is shared with other processes, of which one serves it at a time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sharing {
    /// While this one stands by it takes over by itself once nobody serves the volume, but not before it has
    /// stood by for so long; `None`: it does not.
    pub auto_after_ms: Option<u64>,
    /// Where hosts reach the others: discovery tells of these.
    pub elsewhere: Vec<SocketAddr>,
    /// Where initiators do.
    pub iscsi_elsewhere: Vec<IscsiPortal>,
}

/// I/O counted since the start of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExportCounters {
    /// Reads answered.
    pub reads: u64,
    /// Writes and write-zeroes answered.
    pub writes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Discards answered.
    pub discards: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// A pool, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolReport {
    /// Its name in this process.
    pub name: String,
    /// Its id on disk.
    pub id: PoolId,
    /// How full it is.
    pub usage: Usage,
    /// What is to be said of that; empty while there is room.
    pub warning: String,
    /// Extents that a crash now would make the next start read and hash.
    pub dirty_extents: u64,
    /// Extents that were written and are not settled among their volume's replicas.
    pub open_extents: u64,
    /// Reads that did not verify since the pool was opened.
    pub checksum_mismatches: u64,
    /// `online`, `degraded` where a device failed or is missing, or why it is neither.
    pub state: String,
    /// Replica slots: what a device that is to be added must have.
    pub slots: u16,
    /// Its devices.
    pub devices: Vec<DeviceReport>,
    /// The shard that has it.
    pub shard: u16,
}

/// A device of a pool, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its id.
    pub id: PoolDeviceId,
    /// Where it was found; empty where it is not there.
    pub path: String,
    /// `live`, `draining`, ...
    pub state: String,
    /// What there is to say of that.
    pub reason: String,
    /// Its length in bytes, as far as the pool uses it; zero where it is not there.
    pub device_len: u64,
    /// Bytes of it that the pool uses for data.
    pub size_bytes: u64,
    /// Bytes that can be allocated.
    pub free_bytes: u64,
    /// Where it is being removed: extents that are still on it.
    pub extents_left: Option<u64>,
}

/// A device that a pool lies on.
#[derive(Debug)]
pub struct PoolMember<D> {
    /// The device.
    pub device: D,
    /// Its length in bytes: the pool grows where it is longer than it was.
    pub len: u64,
    /// Where it was found, for people.
    pub path: String,
}

/// A replica, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaReport {
    /// The pool that it is in.
    pub pool: String,
    /// Its id.
    pub id: ReplicaId,
    /// Of which volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Size in blocks.
    pub blocks: u64,
    /// Bytes in a block.
    pub block_size: BlockSize,
    /// Bytes of the pool that it uses.
    pub allocated_bytes: u64,
    /// `live` or `deleting`.
    pub state: String,
    /// Its subsystem.
    pub nqn: String,
    /// I/O so far.
    pub counters: ExportCounters,
}

/// A child, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildReport {
    /// Its number in the volume's nexus; those of children that have gone are not told.
    pub number: u8,
    /// Which replica.
    pub replica: ReplicaId,
    /// Whether it votes and holds no data.
    pub witness: bool,
    /// Where it is.
    pub address: ChildAddress,
    /// `online`, `out-of-sync`, ...
    pub state: String,
    /// Why it is in that state, where there is something to say.
    pub reason: String,
    /// Whether it holds every acked write.
    pub in_sync: bool,
    /// Whether it can be reached: its session is up, or its pool in this process works.
    pub connected: bool,
    /// Requests that it has not answered.
    pub load: u32,
}

/// A host connected to a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// Its NQN.
    pub nqn: String,
    /// The controller that it got.
    pub controller: u16,
    /// Its I/O queues.
    pub io_queues: u16,
}

/// A volume, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeReport {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Its subsystem.
    pub nqn: String,
    /// Size in blocks.
    pub blocks: u64,
    /// `online`, `degraded`, ...
    pub state: String,
    /// What the state means, or what is missing.
    pub detail: String,
    /// Where it is another's to serve: why this process could not take it over; empty where it could.
    pub unfit: String,
    /// Whether hosts are served.
    pub serving: bool,
    /// The epoch that it serves in.
    pub epoch: u64,
    /// Its replicas.
    pub children: Vec<ChildReport>,
    /// Its hosts.
    pub hosts: Vec<HostReport>,
    /// How initiators reach it, where they do.
    pub iscsi: Option<IscsiReport>,
    /// I/O so far.
    pub counters: ExportCounters,
    /// Requests in flight.
    pub in_flight: usize,
    /// The blocks that hosts see.
    pub block_size: BlockSize,
    /// How it is encrypted; nothing where it is not, or that is not known yet.
    pub encryption: Option<EncryptionReport>,
    /// What has been mended.
    pub mends: MendCounters,
    /// The scrub that runs, or the last one since the process started.
    pub scrub: Option<ScrubReport>,
    /// The rebuild that runs.
    pub rebuild: Option<RebuildStatus>,
    /// Rebuilds that ended since the process started, the last one last.
    pub rebuilt: Vec<RebuildEnded>,
    /// Extents that may still differ since the nexus that served the volume last died, and how many did.
    pub unreconciled: (usize, usize),
    /// The shard that serves it.
    pub shard: u16,
}

/// A rebuild that runs, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RebuildStatus {
    /// Which replica gets what it lacks.
    pub replica: ReplicaId,
    /// `listing`, `copying` or `joining`.
    pub stage: &'static str,
    /// Bytes to copy, as far as is known.
    pub bytes_total: u64,
    /// Bytes copied.
    pub bytes_done: u64,
    /// Bytes a second, lately.
    pub bytes_per_s: u64,
    /// For how long it has run.
    pub running_ms: u64,
}

/// A rebuild that ended, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RebuildEnded {
    /// Of which replica.
    pub replica: ReplicaId,
    /// Why it was out of sync.
    pub why: String,
    /// Why it was given up; empty where it was done.
    pub failed: String,
    /// How long it took.
    pub took_ms: u64,
    /// How long ago it ended.
    pub ago_ms: u64,
    /// When it ended, as the shard counts time: tells it from the others of its volume.
    pub ended_ms: u64,
    /// Bytes copied.
    pub bytes: u64,
}

/// A snapshot of a volume, as told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Which.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// Size of the volume then, in blocks.
    pub blocks: u64,
    /// Bytes that are kept for it alone, on the replica that keeps most.
    pub own_bytes: u64,
    /// It is being deleted, or waits for its clones to be.
    pub deleting: bool,
    /// The replicas in sync that have it.
    pub holders: Vec<ReplicaId>,
    /// Of how many that were asked.
    pub of_replicas: usize,
}

impl SnapshotReport {
    /// Whether a replica in sync does not have it.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.holders.len() < self.of_replicas
    }
}

/// What to do about a volume's scrub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScrubAction {
    /// Start one, or take one up: the report says how, and at which block.
    Start(ScrubReport),
    /// Stop it where it is.
    Stop,
    /// Go on at so many MiB a second.
    Rate(u32),
}

/// Something asked of a shard. `L` and `D` are the driver's listener and device.
#[derive(Debug)]
pub enum Command<L, D> {
    /// Listen for hosts. `advertise` is what discovery tells them.
    AddListener {
        /// The bound socket.
        listener: L,
        /// Address told to hosts.
        advertise: SocketAddr,
        /// The answer.
        reply: Reply<()>,
    },
    /// Listen for iSCSI initiators.
    AddIscsiListener {
        /// The bound socket.
        listener: L,
        /// What initiators are told, and the portal group: one of [`IscsiConfig`](crate::shard::IscsiConfig).
        portal: IscsiPortal,
        /// The answer.
        reply: Reply<()>,
    },
    /// Make a volume a logical unit, or none, or change who may log in.
    ExportIscsi {
        /// The volume, by name.
        name: String,
        /// How.
        export: Option<IscsiExport>,
        /// The answer.
        reply: Reply<()>,
    },
    /// Serve an opened pool and export its replicas.
    AddPool {
        /// Its name in this process.
        name: String,
        /// What it lies on, in the order of its devices' numbers.
        devices: Vec<PoolMember<D>>,
        /// The opened pool.
        pool: Box<MultiPool>,
        /// The answer.
        reply: Reply<()>,
    },
    /// Take a device into a pool.
    AddDevice {
        /// The pool.
        pool: String,
        /// The device.
        device: PoolMember<D>,
        /// It, as it was made for the pool and opened by itself.
        opened: Box<Pool>,
        /// The answer: that it is a device of the pool.
        reply: Reply<()>,
    },
    /// Remove a device from a pool.
    RemoveDevice {
        /// The pool.
        pool: String,
        /// Which.
        device: PoolDeviceId,
        /// The answer: that it has begun.
        reply: Reply<()>,
    },
    /// Tell of the pools.
    ListPools {
        /// The answer.
        reply: Reply<Vec<PoolReport>>,
    },
    /// Use a pool's device up to its new end.
    GrowPool {
        /// Which.
        pool: String,
        /// Which of its devices.
        device: PoolDeviceId,
        /// Its new length in bytes.
        device_len: u64,
        /// The answer, once the space can be used.
        reply: Reply<()>,
    },
    /// Tell of the replicas.
    ListReplicas {
        /// The answer.
        reply: Reply<Vec<ReplicaReport>>,
    },
    /// Make a replica and export it.
    CreateReplica {
        /// In which pool.
        pool: String,
        /// What it is to be.
        spec: ReplicaSpec,
        /// The answer.
        reply: Reply<ReplicaReport>,
    },
    /// Delete a replica; its space returns to the pool.
    DeleteReplica {
        /// Which.
        replica: ReplicaId,
        /// The answer.
        reply: Reply<()>,
    },
    /// Serve a volume.
    AddVolume {
        /// Which.
        spec: VolumeSpec,
        /// The answer: that it is coming up, not that it is up.
        reply: Reply<()>,
    },
    /// Stop serving a volume.
    RemoveVolume {
        /// By name.
        name: String,
        /// The answer.
        reply: Reply<()>,
    },
    /// Grow a volume and its replicas.
    ResizeVolume {
        /// By name.
        name: String,
        /// Its new size in blocks.
        blocks: u64,
        /// The answer, once a majority has stored it and hosts are told.
        reply: Reply<()>,
    },
    /// Make a replica a member of a volume.
    AddReplica {
        /// The volume, by name.
        name: String,
        /// Which.
        replica: VolumeReplica,
        /// The answer, once a majority has stored it, of the members before and of those after it. The
        /// replica gets its data after that.
        reply: Reply<()>,
    },
    /// Make a replica no member of its volume any more.
    RemoveReplica {
        /// The volume, by name.
        name: String,
        /// Which.
        replica: ReplicaId,
        /// The answer, once a majority has stored it, of the members before and of those after it.
        reply: Reply<()>,
    },
    /// Wrap a volume's key with another key-encryption key.
    RotateKey {
        /// By name.
        name: String,
        /// The new one.
        kek: Kek,
        /// Random.
        nonce: [u8; 12],
        /// The answer, once a majority has stored it.
        reply: Reply<()>,
    },
    /// Take, delete, restore or clone a snapshot; take one of several volumes at one instant. Hosts of a
    /// volume that is restored wait until every in-sync replica has gone back, also where another process
    /// serves it by then.
    Snapshot {
        /// Of which volumes; more than one only where snapshots are taken.
        volumes: Vec<String>,
        /// What to do.
        verb: SnapshotVerb,
        /// About which snapshot.
        call: SnapshotCall,
        /// Restore though hosts are connected.
        force: bool,
        /// The answer: every in-sync replica has done it.
        reply: Reply<()>,
    },
    /// Change how a volume is shared.
    ShareVolume {
        /// By name.
        name: String,
        /// From now on.
        sharing: Sharing,
        /// The answer.
        reply: Reply<()>,
    },
    /// Stop serving a volume that is shared, without an error at its hosts, and stand by for it.
    StandBy {
        /// By name.
        name: String,
        /// The answer, once another process may take over.
        reply: Reply<()>,
    },
    /// Serve a volume that this process stands by for, whoever serves it now.
    TakeOver {
        /// By name.
        name: String,
        /// The answer, once hosts are served.
        reply: Reply<()>,
    },
    /// Tell of a volume's snapshots.
    ListSnapshots {
        /// By name.
        volume: String,
        /// The answer.
        reply: Reply<Vec<SnapshotReport>>,
    },
    /// Start, stop or pace a volume's scrub.
    ScrubVolume {
        /// By name.
        name: String,
        /// What to do.
        action: ScrubAction,
        /// The answer.
        reply: Reply<()>,
    },
    /// Set how fast a volume is rebuilt.
    RebuildRate {
        /// By name.
        name: String,
        /// MiB a second at most; 0: as fast as it can.
        mib_s: u32,
        /// The answer.
        reply: Reply<()>,
    },
    /// Tell of the volumes.
    ListVolumes {
        /// The answer.
        reply: Reply<Vec<VolumeReport>>,
    },
    /// Finish what is in flight, close every connection, write the pools' tables, and stop.
    Shutdown {
        /// The answer, just before the shard stops.
        reply: Reply<()>,
    },
}
