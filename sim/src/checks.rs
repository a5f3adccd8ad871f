//! What is checked, by name. Each of the invariants in docs/correctness.md has one; a failed check says
//! which.

use core::fmt;

/// A check, by what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// 1, 2: each block is a register, across any change of nexus, and keeps what was acked, or flushed
    /// where everybody loses power. `History` knows what each block may hold; it judges each read when it
    /// ends, and the order of all of them at the end. After the faults every block is read.
    Linearizable,
    /// 3: at most one nexus serves in an epoch. After each turn of a process with volumes its epochs are
    /// noted, for ever.
    OneNexusPerEpoch,
    /// 3, 5: a volume is served by a configuration only once a majority of its voters has it. Looked at where
    /// a nexus goes by another one.
    ConfigIsStored,
    /// 3: epochs and promises never decrease. After each turn, and after each start from the disk as it
    /// was left, a register is compared with what it was.
    RegistersGoOn,
    /// 4: nothing of an earlier epoch is done once a later one serves. No answer may come to what was
    /// asked of a nexus after a later one was known to serve; and what an earlier one left open may not
    /// turn up once it was seen not to be there (2).
    Fencing,
    /// 5, 8: members in sync are alike once it is quiet. The disks of all members are opened as after a
    /// crash at that moment, read whole, and compared.
    MembersAlike,
    /// 6, 7: where members in sync differ, one of them says durably that the extent is open. Looked at
    /// where a nexus has just died, on copies of the disks.
    DifferenceIsMarked,
    /// 9, 12: what is read was written there, to this block of this volume, whole; or is zeros where
    /// nothing was. Each block of payload names its volume, block and value, and is filled from them.
    RightData,
    /// 10: a snapshot is a read of every block at its time, the same on every member, for ever.
    Snapshots,
    /// 11: what a pool says is used is what its maps use. `fsck` over a copy of each disk, at restarts and
    /// at the end.
    PoolIsSound,
    /// 12: a scrub leaves no bad block, and finds no difference.
    Scrub,
    /// 13: a crash while a pool is opened, or once it is, leads to the same state. At some restarts the
    /// disk is opened, crashed at a point of that, and opened again.
    RecoveryIsStable,
    /// 14: once faults stop, everything is served, rebuilt and settled within a bound of virtual time.
    Liveness,
    /// A volume is as large as was acked, and so are its replicas.
    Sizes,
    /// Of two processes that stand by for each other one answers nothing that is asked once the other has acked a
    /// change; a volume stays where it is served well; and where nothing is wrong a hand-over cuts nothing off.
    OneAtATime,
    /// What COMPARE AND WRITE does is one step: no two hosts make the same one, none is lost once it is acked, none is
    /// done in part. Hosts over iSCSI count in a block.
    CompareAndWrite,
    /// Once a host was told that it has a volume to itself, no change that another sends is acked, over either
    /// transport, until it begins to give it up.
    Reservations,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Linearizable,
        Self::OneNexusPerEpoch,
        Self::ConfigIsStored,
        Self::RegistersGoOn,
        Self::Fencing,
        Self::MembersAlike,
        Self::DifferenceIsMarked,
        Self::RightData,
        Self::Snapshots,
        Self::PoolIsSound,
        Self::Scrub,
        Self::RecoveryIsStable,
        Self::Liveness,
        Self::Sizes,
        Self::OneAtATime,
        Self::CompareAndWrite,
        Self::Reservations,
    ];
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linearizable => "linearizable",
            Self::OneNexusPerEpoch => "one-nexus-per-epoch",
            Self::ConfigIsStored => "config-is-stored",
            Self::RegistersGoOn => "registers-go-on",
            Self::Fencing => "fencing",
            Self::MembersAlike => "members-alike",
            Self::DifferenceIsMarked => "difference-is-marked",
            Self::RightData => "right-data",
            Self::Snapshots => "snapshots",
            Self::PoolIsSound => "pool-is-sound",
            Self::Scrub => "scrub",
            Self::RecoveryIsStable => "recovery-is-stable",
            Self::Liveness => "liveness",
            Self::Sizes => "sizes",
            Self::OneAtATime => "one-at-a-time",
            Self::CompareAndWrite => "compare-and-write",
            Self::Reservations => "reservations",
        })
    }
}

/// Asserts what a [`Check`] holds; the message begins with its name in brackets.
macro_rules! check {
    ($check:expr, $holds:expr, $($why:tt)+) => {
        assert!($holds, "[{}] {}", $check, format_args!($($why)+))
    };
}
pub(crate) use check;
