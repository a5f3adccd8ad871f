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
    /// The nexus answers a flush without asking anybody.
    FlushAtNexus,
    /// The nexus reads from a member that is out of sync.
    ReadOutOfSync,
    /// The nexus writes to a member that came back without binding it to the epoch.
    RejoinWithoutPromise,
    /// A member that lost power stays in sync.
    PowerLossForgotten,
    /// Assembly goes on with less than a majority.
    AssembleMinority,
    /// Assembly takes members that are not in sync.
    AssembleStale,
    /// Assembly serves before its first configuration is stored.
    ServeBeforeCommit,
    /// Assembly takes an epoch that was taken before.
    EpochUsedTwice,
    /// A vote that was refused is counted.
    CountRefusal,
    /// A nexus goes on when it learns that it is fenced.
    GoOnWhenFenced,
    /// A mend writes without the lock of its range.
    MendWithoutLock,
    /// A write that met a full pool is answered without the replicas being made alike.
    NoConvergence,
    /// The replica answers a promise before it is durable.
    PromiseNotDurable,
    /// The replica does not drain before it answers a promise.
    NoDrain,
    /// The replica does not compare a request's epoch with its promise.
    NoFence,
    /// The replica stores a configuration of an epoch that it has promised away.
    AcceptOldEpoch,
    /// The replica answers a flush without flushing its disk.
    FlushAtReplica,
    /// The replica ignores that a write is to be durable when it is answered.
    IgnoreFua,
    /// An allocation is used before its journal record is durable.
    DataBeforeRecord,
    /// An extent that is given up is used again before its record is durable.
    ReuseEarly,
    /// A read of what does not verify is answered with what is there.
    BadDataReturned,
    /// The checksum of a block that was written is not remembered.
    ChecksumForgotten,
    /// An extent that is allocated is not zeroed.
    StaleExtent,
    /// A discard leaves what was there to be read.
    DiscardKeepsData,
    /// A snapshot does not wait for the writes before it.
    SnapshotLetsWriteThrough,
    /// What is written after a snapshot lands in the snapshot.
    WriteIntoSnapshot,
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
