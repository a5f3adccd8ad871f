//! Deliberate bugs, for the simulator to find: a checker that lets one pass has a hole.
//!
//! Each place where the right thing is done and a mutant would not do it asks [`on`]. Without the feature
//! `mutants` the answer is a constant, and the question is not compiled.

macro_rules! mutants {
    ($($(#[doc = $what:literal])+ $name:ident,)+) => {
        /// A deliberate bug.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Mutant {
            $($(#[doc = $what])+ $name,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// What it does.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($what),+).trim_ascii(),)+
                }
            }
        }
    };
}

mutants! {
    /// The nexus acks before the configuration without the failed member is stored.
    AckBeforeCommit,
    /// The nexus acks once all members but one have a write.
    AckBeforeAll,
    /// The nexus does not put overlapping writes in order.
    NoOrder,
    /// A read overtakes writes that it overlaps.
    ReadOvertakes,
    /// A read that a write has overtaken is answered with what it saw.
    ReadOvertaken,
    /// Mends and copies do not wait for the range that they change.
    NoLock,
    /// The nexus answers a flush without asking anybody.
    FlushAtNexus,
    /// A flush succeeds although the last member has lost what was acked before.
    LossNotTold,
    /// The nexus reads from a member that is out of sync.
    ReadOutOfSync,
    /// A member that lost power stays in sync.
    PowerLossForgotten,
    /// A write that met a full pool is answered without the replicas being made alike.
    NoConvergence,
    /// A write that is to be done whole or not at all is done as any other.
    AtomicInPlace,
    /// What was being written whole when a nexus died is left as it is.
    UndoForgotten,
    /// A nexus goes on when it learns that it is fenced.
    GoOnWhenFenced,
    /// One vote is a majority.
    Minority,
    /// A vote that was refused is counted.
    CountRefusal,
    /// Assembly takes members that are not in sync.
    AssembleStale,
    /// Assembly serves before its first configuration is stored.
    ServeBeforeCommit,
    /// Assembly takes an epoch that was taken before.
    EpochUsedTwice,
    /// A configuration says that a member left a generation later than it did.
    LeavingNotedLate,
    /// What a nexus left different stays so.
    ReconcileSkipped,
    /// Extents that one member has and another has not are not made alike.
    ReconcileOpenOnly,
    /// Requests do not wait until what they touch is alike.
    ReadBeforeReconcile,
    /// A settling round does not wait for the writes before it.
    SettleWithoutDrain,
    /// A settling round does not flush.
    SettleWithoutFlush,
    /// What is settled gets no stamp.
    StampForgotten,
    /// Reads are answered without a lease.
    NoLease,
    /// A lease is counted from the answer to the renewal.
    LeaseFromAnswer,
    /// Assembly does not wait until the lease of an earlier nexus is over.
    TakeoverDoesNotWait,
    /// A process that stands by takes over although another has a lease.
    StandbyIgnoresLeases,
    /// A volume is handed over without waiting for what is in hand.
    HandOverDoesNotDrain,
    /// A command that reads and then writes does not keep others from what it has read.
    HoldsNothing,
    /// Whoever takes a volume over does not know who has reserved it.
    ReservationsForgotten,
    /// A reservation holds before it is stored, and is not.
    ReservationsNotStored,
    /// The target of a rebuild does not get what hosts write.
    MirrorMissesWrites,
    /// A member that joins does not count for acks before it has joined.
    JoinerNotAwaited,
    /// A member joins before it has flushed.
    JoinBeforeFlush,
    /// A rebuild leaves out the last extent that is needed.
    RebuildSkipsLast,
    /// A rebuild copies nothing because it is open.
    RebuildIgnoresOpen,
    /// A rebuild copies nothing because of its stamp.
    RebuildIgnoresStamps,
    /// The replica answers a promise and does not keep it.
    PromiseNotStored,
    /// The replica does not drain before it answers a promise.
    NoDrain,
    /// The replica does not compare a request's epoch with its promise.
    NoFence,
    /// The replica stores a configuration of an epoch that it has promised away.
    AcceptOldEpoch,
    /// The replica answers before what it stores is on stable storage.
    RegisterNotFlushed,
    /// The replica answers a flush without flushing its disk.
    FlushAtReplica,
    /// The replica ignores that a write is to be durable when it is answered.
    IgnoreFua,
    /// A journal record counts as durable before it was flushed.
    JournalNotFlushed,
    /// The mark of a dirty extent is not stored.
    NoDirtyMark,
    /// An extent that is settled is changed without being opened.
    NoOpenMark,
    /// A write to an extent that is being settled does not keep it open.
    CandidateStays,
    /// An extent that is allocated is not zeroed.
    StaleExtent,
    /// What a pool has lost with one of its devices reads as zeros.
    LostReadsAsZeros,
    /// A discard of a whole extent leaves what was there.
    DiscardKeepsData,
    /// What does not verify is answered as it is.
    BadDataReturned,
    /// A snapshot does not hold the writes that come while it is taken, neither at the nexus nor at replicas.
    SnapshotLetsWriteThrough,
}

#[cfg(feature = "mutants")]
std::thread_local! {
    static CHOSEN: core::cell::Cell<Option<Mutant>> = const { core::cell::Cell::new(None) };
}

/// Whether the code is to be wrong in this way.
#[cfg(feature = "mutants")]
#[must_use]
pub fn on(mutant: Mutant) -> bool {
    CHOSEN.get() == Some(mutant)
}

/// Whether the code is to be wrong in this way: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
#[must_use]
pub const fn on(_: Mutant) -> bool {
    false
}

/// Chooses the bug that this thread has from now on.
#[cfg(feature = "mutants")]
pub fn choose(mutant: Option<Mutant>) {
    CHOSEN.set(mutant);
}
