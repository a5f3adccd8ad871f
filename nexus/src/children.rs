//! What a nexus knows of each child.

use core::fmt;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{IoOp, IoStatus, ReplicaId};

use crate::config::{Member, Place};
use crate::patience::{Latency, Trouble};
use crate::types::ChildSpec;

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
    /// It gets what it lacks, and every change meanwhile.
    Rebuilding,
    /// It votes, and holds no data.
    Witness,
    /// It can be reached, and its pool is offline: it stores nothing, and grants no lease.
    Offline,
    /// It is there, and neither votes nor takes I/O.
    Idle(FaultReason),
    /// It was removed; its place is another's next.
    Removed,
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
    /// Its machine, or its pool after an error, started anew, and writes that no flush had covered may be gone.
    LostPower,
    /// Its pool is offline: it stores nothing any more.
    PoolOffline,
    /// It was not asked for something that changed the others.
    Behind,
    /// A block that it lacks cannot be read from anybody.
    SourceUnreadable,
    /// The volume's configuration does not name it.
    NotMember,
    /// Another replica was taken by force since it was a member.
    OldLineage,
    /// The configuration says that it holds the volume, and it holds nothing.
    Blank,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(status) => write!(f, "a request failed: {status:?}"),
            Self::DeadlineMissed => f.write_str("a request missed its deadline"),
            Self::Unreachable => f.write_str("a write came while it was unreachable"),
            Self::Stale => f.write_str("it missed writes while it was away"),
            Self::LostPower => {
                f.write_str(
                    "its machine, or its pool after an error, started anew with writes that were not flushed yet",
                )
            }
            Self::PoolOffline => f.write_str(
                "its pool is offline: see `cairn pool list` there; start its process again, or replace it",
            ),
            Self::Behind => f.write_str("the others were changed in a way that it did not take part in"),
            Self::SourceUnreadable => f.write_str(
                "a block that it lacks cannot be read from any replica: `cairn volume scrub` names it; write it anew",
            ),
            Self::NotMember => f.write_str("it is not a member of the volume; add it to make it one"),
            Self::OldLineage => f.write_str(
                "it belongs to an older lineage since a forced start; add it anew, and it gets a copy",
            ),
            Self::Blank => f.write_str("it is empty: it was made anew since it held the volume"),
            Self::Foreign => f.write_str("it belongs to another volume or has another size"),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) replica: ReplicaId,
    /// As the configuration stored last has it.
    pub(crate) member: Member,
    /// Where it is reached.
    pub(crate) place: Place,
    pub(crate) local: bool,
    /// It votes, or is to vote, and holds no data.
    pub(crate) witness: bool,
    /// Why it is no voter, where it is none.
    pub(crate) idle: FaultReason,
    /// It was removed, and its session has ended.
    pub(crate) vacant: bool,
    pub(crate) connected: bool,
    pub(crate) state: ChildState,
    /// Since when it was seen to be joining; nothing where it is not.
    pub(crate) joining_ms: Option<u64>,
    /// It has said, in this session, that its pool is offline.
    pub(crate) offline: bool,
    /// It has failed to store something. A pool that goes offline by that may have lost what no flush has covered:
    /// a disk that fails a flush may have forgotten what that was to cover, and be well at the next.
    pub(crate) suspect: bool,
    /// Its session is bound to the epoch.
    pub(crate) bound: bool,
    /// The question that binds it, where it is asked.
    pub(crate) rejoining: Option<u32>,
    /// Its register was read in this session, and is not another volume's.
    pub(crate) looked: bool,
    /// How far its rebuild is, where the next configuration is to say so.
    pub(crate) cursor: Option<u32>,
    /// The life of its machine as the configuration had it that was found.
    pub(crate) found_life: u128,
    /// Reads and writes that it has not answered.
    pub(crate) load: u32,
    /// What its requests took lately, and how often it went out.
    pub(crate) latency: Latency,
    pub(crate) trouble: Trouble,
    /// Register operations likewise.
    pub(crate) asked: u32,
    /// The round of the request to grow that it has in hand, and whether its session is taken up after it.
    pub(crate) growing: Option<(u32, bool)>,
    /// What it has said, in this session, to have grown to.
    pub(crate) grown_to: u64,
    /// When it last answered anything.
    pub(crate) heard_ms: u64,
    /// Counts sessions, so that an answer of an earlier one is known as such.
    pub(crate) session: u32,
    /// Which life of its machine the last session was with.
    pub(crate) incarnation: u128,
    /// Writes that it has completed, and how many of them a flush has covered.
    pub(crate) written: u64,
    pub(crate) flushed: u64,
    /// Flushes under way: the slot, and the writes completed when it was sent.
    pub(crate) flushing: Vec<(u16, u64)>,
}

impl Child {
    /// One with which there is no session yet.
    pub(crate) fn new(spec: ChildSpec, deadline_ms: u64) -> Self {
        Self {
            replica: spec.replica,
            member: Member { replica: spec.replica, ..Member::default() },
            place: spec.place,
            local: spec.local,
            witness: spec.witness,
            idle: FaultReason::NotMember,
            vacant: false,
            connected: false,
            state: ChildState::Disconnected,
            joining_ms: None,
            offline: false,
            suspect: false,
            bound: false,
            rejoining: None,
            looked: false,
            cursor: None,
            found_life: 0,
            load: 0,
            latency: Latency::new(deadline_ms),
            trouble: Trouble::default(),
            asked: 0,
            growing: None,
            grown_to: 0,
            heard_ms: 0,
            session: 0,
            incarnation: 0,
            written: 0,
            flushed: 0,
            flushing: Vec::with_capacity(16),
        }
    }

    /// Where it stands, as a person is told.
    pub(crate) fn shown(&self) -> ChildState {
        match self.state {
            ChildState::Online | ChildState::Witness if self.offline => ChildState::Offline,
            state => state,
        }
    }

    /// Whether it takes block requests.
    pub(crate) fn is_usable(&self) -> bool {
        let reads_all = on(Mutant::ReadOutOfSync) && matches!(self.state, ChildState::OutOfSync(_));
        self.connected && (self.state == ChildState::Online || reads_all)
    }

    /// A request that it was sent is done.
    pub(crate) fn note_done(&mut self, at: u16, op: IoOp) {
        match op {
            IoOp::Write { fua: true }
            | IoOp::WriteZeroes { fua: true, .. }
            | IoOp::Read
            | IoOp::Snapshot(_)
            | IoOp::Verify => {}
            IoOp::Write { .. } | IoOp::WriteZeroes { .. } | IoOp::Discard => self.written += 1,
            IoOp::Flush => {
                let found = self.flushing.iter().position(|&(slot, _)| slot == at);
                if let Some(i) = found {
                    let (_, covered) = self.flushing.swap_remove(i);
                    self.flushed = self.flushed.max(covered);
                }
            }
        }
    }

    /// It has changed something, or has failed to: what failed may have been done in part.
    pub(crate) fn note_tried(&mut self) {
        self.written += 1;
    }

    /// Whether it comes back from a loss of power, or of its pool, that may have cost it acked writes.
    pub(crate) fn lost_writes(&self, incarnation: u128) -> bool {
        (self.incarnation != incarnation || self.suspect) && self.written > self.flushed
    }
}
