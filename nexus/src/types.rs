//! What goes into a nexus and what comes out of it.

use cairn_block::{BufSlice, Epoch, IoRequest, IoStatus, Lba, ReplicaId, SnapshotId, VolumeId};

use crate::children::{ChildState, FaultReason};
use crate::config::Place;
use crate::register::{Register, RegisterOp};
use crate::scrub::Found;

/// Replicas of a volume at most.
pub const MAX_CHILDREN: usize = 8;

/// A child of this nexus: its place in [`NexusConfig::children`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChildId(pub u8);

/// One replica of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildSpec {
    /// Which.
    pub replica: ReplicaId,
    /// Whether it is in this process: then it is read first.
    pub local: bool,
    /// Whether it votes and holds no data, where it becomes a voter: what the stored configuration says of
    /// one that is a voter goes before this.
    pub witness: bool,
    /// Where it is, for whoever takes the volume over.
    pub place: Place,
}

/// Why the nexus comes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The volume is new: every replica must be there and empty.
    Create,
    /// The volume exists: its configuration is learnt from its replicas.
    Assemble,
    /// The volume exists, and another nexus serves it: this one takes its place when it is told to.
    StandBy {
        /// It takes over by itself once nobody serves the volume, but not before it has stood by for so long;
        /// nothing: it does not.
        auto_after_ms: Option<u64>,
    },
    /// The volume exists, and is to be had from this replica alone, whatever the others hold: acked writes
    /// may be lost. It begins a new lineage; the other replicas are to be added anew.
    ForceStart {
        /// Which.
        source: ReplicaId,
        /// Tells the new lineage from another that was begun elsewhere at the same time.
        random: u32,
    },
}

/// How a nexus is set up.
#[derive(Debug, Clone)]
pub struct NexusConfig {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in blocks.
    pub blocks: u64,
    /// Bytes of the blocks that hosts see, opaque here; 0: what the configuration says that is found.
    pub block_size: u32,
    /// Whether it is encrypted; then what its first configuration says of it, where the volume is new and
    /// a key is at hand.
    pub encryption: Option<Vec<u8>>,
    /// Its replicas, at most [`MAX_CHILDREN`].
    pub children: Vec<ChildSpec>,
    /// Why it comes up.
    pub purpose: Purpose,
    /// A child that does not answer a request for so long is taken out.
    pub child_deadline_ms: u64,
    /// One that has answered reads and writes fast lately is taken out earlier, but never before so long.
    pub child_deadline_min_ms: u64,
    /// Reads are answered for so long after a majority of the voters was asked for a lease. All nodes are to
    /// have the same.
    pub lease_ms: u64,
    /// Others stand by for the volume: the lease is kept while there are no reads, so that they see that it
    /// is served.
    pub shared: bool,
    /// Tells the nexuses of one node from those of others, where no two processes can have the same at
    /// once; 0 where that is not sure.
    pub holder: u128,
    /// How long assembly waits for the rest once a majority is there.
    pub assembly_wait_ms: u64,
    /// Host requests in flight at most; more wait outside.
    pub max_requests: u16,
    /// How often things are done that nobody asks for.
    pub pace: Pace,
}

/// How often a nexus does what nobody asks for, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// What was written is settled so long after it was: a crash of the nexus makes its successor compare
    /// what was not.
    pub settle_ms: u64,
    /// A rebuild remembers so often how far it is.
    pub checkpoint_ms: u64,
    /// A rebuild copies at most so many MiB a second; 0: as fast as it can.
    pub rebuild_mib_s: u32,
    /// Pieces that a rebuild copies at once, while no host waits for anything.
    pub rebuild_depth: u16,
    /// Whether members that are out of sync and there are rebuilt.
    pub rebuild: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            settle_ms: 5_000,
            checkpoint_ms: 10_000,
            rebuild_mib_s: 0,
            rebuild_depth: 8,
            rebuild: true,
        }
    }
}

/// Names a child operation when its answer comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub u32);

/// Set in tickets of register operations.
pub(crate) const REGISTER: u32 = 1 << 31;
/// Set in tickets of mends.
const MEND: u32 = 1 << 30;
/// Never set in a ticket: whoever shares the way to the children marks its own with it.
pub const FOREIGN_TICKET: u32 = 1 << 29;
/// Set in tickets of what the nexus asks on its own account.
const UPKEEP: u32 = 1 << 28;
/// Set in tickets of copies to a member that is rebuilt.
const COPY: u32 = 1 << 27;

impl Ticket {
    pub(crate) fn io(slot: u16) -> Self {
        Self(u32::from(slot))
    }

    pub(crate) fn of_mend(at: u16) -> Self {
        Self(MEND | u32::from(at))
    }

    /// Numbers of questions that a ticket can tell apart.
    pub(crate) const UPKEEP_SERIALS: u32 = COPY - 1;

    pub(crate) fn upkeep(serial: u32) -> Self {
        Self(UPKEEP | serial)
    }

    pub(crate) fn of_copy(at: u16) -> Self {
        Self(COPY | u32::from(at))
    }

    pub(crate) fn kind(self) -> TicketKind {
        let low = |mask: u32| u16::try_from(self.0 & !mask).expect("a place in a table");
        if self.is_register() {
            TicketKind::Register(self.0 & !REGISTER)
        } else if self.0 & MEND != 0 {
            TicketKind::Mend
        } else if self.0 & UPKEEP != 0 {
            TicketKind::Upkeep(self.0 & !UPKEEP)
        } else if self.0 & COPY != 0 {
            TicketKind::Copy(low(COPY))
        } else {
            TicketKind::Slot(low(0))
        }
    }

    pub(crate) fn is_mend(self) -> bool {
        self.kind() == TicketKind::Mend
    }

    pub(crate) fn mend(self) -> usize {
        usize::from(u16::try_from(self.0 & !MEND).expect("a place of a mend"))
    }

    pub(crate) fn register(round: u32) -> Self {
        Self(REGISTER | round)
    }

    /// Whether the operation was on the register.
    #[must_use]
    pub fn is_register(self) -> bool {
        self.0 & REGISTER != 0
    }
}

/// Whose a ticket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TicketKind {
    Slot(u16),
    Mend,
    Copy(u16),
    Upkeep(u32),
    Register(u32),
}

/// What a child is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildOp {
    /// A block request.
    Io(IoRequest),
    /// Something of its register.
    Register(RegisterOp),
    /// Tell of each logical extent from `first` on, in a byte each as far as `buf` goes, whether it is
    /// mapped, open, and settled with a stamp of `since` or later: see [`change`]. Answered as a block request.
    Changes {
        /// The first logical extent.
        first: u32,
        /// The generation from which on a stamp counts.
        since: u64,
        /// For the answer.
        buf: BufSlice,
    },
    /// Begin a round: what is open now and is not written again before its end is to be settled. Answered
    /// as a block request.
    SettleBegin {
        /// Which.
        round: u64,
    },
    /// All members hold all that was written before the round began, on stable storage: what is open since
    /// before it and was not written since is not open any more, and was settled in this generation.
    /// Answered as a block request, once that is durable.
    SettleEnd {
        /// Which.
        round: u64,
        /// The generation.
        stamp: u64,
        /// Only logical extents below this one.
        below: u32,
    },
    /// What the replica had on devices that are gone is given up: see [`change::LOST`]. Answered as a block
    /// request, once that is durable.
    GiveUpLost,
}

/// What a byte of the answer to [`ChildOp::Changes`] says of a logical extent.
pub mod change {
    /// The replica has something there: else it reads as zeros.
    pub const MAPPED: u8 = 1;
    /// It was written, and not settled since.
    pub const OPEN: u8 = 2;
    /// It was settled in the generation that was asked for, or in a later one.
    pub const SINCE: u8 = 4;
    /// It cannot be read, nor can a part of it be written: a device of its pool that is gone had it, or may have
    /// had it. Once that is given up, it reads as zeros.
    pub const LOST: u8 = 8;
}

/// An operation for one child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildIo {
    /// For which.
    pub child: ChildId,
    /// Comes back with the answer.
    pub ticket: Ticket,
    /// What to do.
    pub op: ChildOp,
}

/// A child's answer to a register operation: what the register holds now.
pub type ChildReply = Result<Register, IoStatus>;

/// The answer for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// As submitted.
    pub tag: u64,
    /// How it ended.
    pub status: IoStatus,
}

/// What happened, for logs and for whoever manages the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The volume's state changed.
    State(VolumeState),
    /// A child failed; it is being taken out.
    ChildFailing(ChildId, FaultReason),
    /// A child is out of the in-sync set, durably.
    ChildOut(ChildId, FaultReason),
    /// A child takes I/O.
    ChildOnline(ChildId),
    /// The only member that is left came back from a loss of power, or of its pool: what was acked and not flushed may be gone. See
    /// [`Nexus::losses`](crate::Nexus::losses).
    WritesLost(ChildId),
    /// A child has said that its pool is offline.
    ChildOffline(ChildId),
    /// The session with a child is to be ended: it did not answer.
    ResetChild(ChildId),
    /// A configuration was stored by a majority.
    Committed {
        /// Its epoch.
        epoch: Epoch,
        /// Its number within the epoch.
        seq: u64,
    },
    /// The configuration that was found is of an encrypted volume, or is not and should be: see
    /// [`Nexus::locked`](crate::Nexus::locked). Assembly waits.
    Locked,
    /// A member of the configuration that was found, and where it is: either it is no child, and
    /// [`Nexus::add_child`](crate::Nexus::add_child) is to be called; or it does not come up, and may be there.
    Place {
        /// Which.
        replica: ReplicaId,
        /// Whether it is a witness.
        witness: bool,
        /// Where.
        place: Place,
    },
    /// The volume has another size: this many blocks.
    Resized(u64),
    /// The volume could not be grown: a replica refused, or none could be reached any more.
    ResizeFailed(Option<ChildId>, IoStatus),
    /// Another wrapping of the volume's key is stored.
    KeyChanged,
    /// What hosts have reserved is stored.
    Reserved,
    /// How far a sanitize is, or that there is none any more, is stored: see
    /// [`Nexus::sanitize`](crate::Nexus::sanitize).
    Sanitize,
    /// It is stored that the volume is being taken back to this snapshot: every in-sync member is to be asked
    /// to, and then [`Nexus::set_restoring`](crate::Nexus::set_restoring) to be called with none. With none:
    /// it is over, and requests of hosts may be submitted.
    Restoring(Option<SnapshotId>),
    /// The child is a voter now.
    VoterAdded(ChildId),
    /// The child is no voter any more: its session is to be ended for good, and then
    /// [`Nexus::forget_child`](crate::Nexus::forget_child) to be called.
    VoterRemoved(ChildId),
    /// The voters stay as they were; the text says why.
    VotersUnchanged(ChildId, String),
    /// The volume was taken from one replica by force, and has this lineage now.
    Forced {
        /// From which.
        source: ReplicaId,
        /// See [`Config::lineage`](crate::Config::lineage).
        lineage: u64,
    },
    /// Something was wrong with a block of a child.
    Found {
        /// The block.
        lba: Lba,
        /// Whose copy.
        child: ChildId,
        /// What it was, and what became of it.
        found: Found,
    },
    /// A scrub has come to the end of the volume.
    ScrubFinished,
    /// So many extents were being written when the volume was last served, and are made alike now.
    Reconciling(u64),
    /// They are.
    Reconciled,
    /// A child that is out of sync gets what it lacks.
    RebuildStarted(ChildId, FaultReason),
    /// It has it, and so many bytes were copied.
    RebuildFinished(ChildId, u64),
    /// It was given up.
    RebuildAborted(ChildId, FaultReason),
}

/// Where the volume stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeState {
    /// Another nexus is to serve it; the text says whether one does.
    StandBy(String),
    /// Its configuration is being learnt; the text says what is missing.
    Assembling(String),
    /// Serving, every replica in sync.
    Online,
    /// Serving with fewer replicas than it has.
    Degraded,
    /// A replica failed and no majority can store that, reads are to be answered and no majority grants a
    /// lease, or no replica in sync is there: requests are held.
    Suspended,
    /// A newer nexus has taken the volume over: nothing is served here.
    Fenced,
    /// It cannot be served; the text says why.
    Refused(String),
}

impl VolumeState {
    /// Whether host requests are taken.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(self, Self::Online | Self::Degraded | Self::Suspended)
    }

    /// One word for tables.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::StandBy(_) => "standby",
            Self::Assembling(_) => "assembling",
            Self::Online => "online",
            Self::Degraded => "degraded",
            Self::Suspended => "suspended",
            Self::Fenced => "fenced",
            Self::Refused(_) => "refused",
        }
    }

    /// What a person wants to know besides the word.
    #[must_use]
    pub fn detail(&self) -> &str {
        match self {
            Self::StandBy(text) | Self::Assembling(text) | Self::Refused(text) => text,
            Self::Online => "every replica is in sync",
            Self::Degraded => "serving with fewer replicas than configured",
            Self::Suspended => {
                "requests are held until the replicas are back: too few can be reached to record \
                 that one failed, or to be sure that no other nexus serves; or none that is in sync"
            }
            Self::Fenced => "a newer nexus has taken this volume over",
        }
    }
}

/// A child as a person sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildStatus {
    /// Which replica.
    pub replica: ReplicaId,
    /// Whether it votes and holds no data.
    pub witness: bool,
    /// Where it stands.
    pub state: ChildState,
    /// Whether it holds every acked write.
    pub in_sync: bool,
    /// Whether it has said, in this session, that its pool is offline.
    pub offline: bool,
    /// Requests that it has not answered.
    pub load: u32,
    /// How often it went out of the in-sync set lately.
    pub failures: u32,
}

/// The volume as a person sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Where it stands.
    pub state: VolumeState,
    /// The epoch that it serves in.
    pub epoch: Epoch,
    /// The number of the last configuration within the epoch.
    pub seq: u64,
    /// Its children, in order.
    pub children: Vec<ChildStatus>,
    /// Host requests in flight.
    pub requests: usize,
}
