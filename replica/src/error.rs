//! What can go wrong, for the caller to match on and for a person to read.

use std::io;

/// Why a pool could not be formatted, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Made before blocks had checksums.
    #[error(
        "the pool was made by a development version without block checksums; copy its data off \
         with that version and make the pool anew"
    )]
    NoChecksums,
    /// The device could not be read or written.
    #[error("the device failed: {0}")]
    Device(#[from] io::Error),
    /// The device is all zeros where a superblock would be.
    #[error("the device is blank: it holds no pool; format it first")]
    Blank,
    /// The device holds something that is not a pool.
    #[error("the device holds data that is not a Cairn pool; nothing was touched")]
    Foreign,
    /// Format was refused, because a pool is there.
    #[error("the device already holds {what}; to destroy that, use force")]
    HoldsPool {
        /// The pool that is there.
        id: cairn_block::PoolId,
        /// What of it would be lost.
        what: String,
    },
    /// Format was refused, because something else is there.
    #[error(
        "the device holds data in its first 64 KiB that is not a Cairn pool; use force to destroy it"
    )]
    HoldsData,
    /// The device is too short for a pool.
    #[error("the device has {len} bytes; a pool needs at least {min}")]
    TooSmall {
        /// The device's length in bytes.
        len: u64,
        /// The least that is needed.
        min: u64,
    },
    /// The device is longer than extents can be counted.
    #[error("the device has {len} bytes; a pool has at most {max}")]
    TooLarge {
        /// The device's length in bytes.
        len: u64,
        /// The most that can be used.
        max: u64,
    },
    /// The sector size is not one that 4 KiB metadata blocks suit.
    #[error("a sector size of {0} bytes is not supported; it must be 512, 1024, 2048 or 4096")]
    SectorSize(u32),
    /// A later Cairn wrote this pool.
    #[error("the pool has format version {found}; this program knows up to {known}: upgrade it")]
    NewerVersion {
        /// The version on the device.
        found: u16,
        /// The newest version known here.
        known: u16,
    },
    /// The pool uses a feature that this program does not have.
    #[error("the pool uses features {bits:#x} that this program does not have: upgrade it")]
    UnknownFeature {
        /// The unknown incompatible feature bits.
        bits: u64,
    },
    /// The device is shorter than the pool.
    #[error(
        "the device has {found} bytes but the pool was made for {recorded}: it was truncated, or is the wrong one"
    )]
    DeviceShrunk {
        /// The length in the superblock.
        recorded: u64,
        /// The length now.
        found: u64,
    },
    /// No copy of the superblock verifies.
    #[error("all copies of the superblock are damaged; inspect the device before anything else")]
    SuperblockDamaged,
    /// Both copies of a replica's catalog page are damaged.
    #[error("both copies of the catalog page of replica slot {slot} are damaged")]
    CatalogDamaged {
        /// The replica's slot.
        slot: u16,
    },
    /// Journal blocks are damaged that later blocks prove to have been written.
    #[error(
        "journal block {sequence} is damaged, and later blocks are there: records would be lost"
    )]
    JournalDamaged {
        /// The sequence number of the missing block.
        sequence: u64,
    },
    /// Both copies of an allocation table page are damaged, or the current one is.
    #[error("page {page} of the allocation table is damaged")]
    TableDamaged {
        /// The page's index.
        page: u32,
    },
    /// A device that the pool cannot be whole without was not given.
    #[error(
        "device {device} of pool {pool} is missing: give its path too. Where it is gone for good, open \
         the pool without it (`without = [\"{device}\"]`): what only it held is then lost"
    )]
    MemberMissing {
        /// The pool.
        pool: cairn_block::PoolId,
        /// The device.
        device: cairn_block::PoolDeviceId,
    },
    /// A device that the pool cannot be whole without is missing, and a damaged one was given.
    #[error(
        "device {device} of pool {pool} is missing, and all copies of the superblock are damaged on one \
         of the devices that were given: inspect that one. Where the device is gone for good, open the \
         pool without it (`without = [\"{device}\"]`): what only it held is then lost"
    )]
    MemberDamaged {
        /// The pool.
        pool: cairn_block::PoolId,
        /// The device.
        device: cairn_block::PoolDeviceId,
    },
    /// Two devices that are not of one pool were given.
    #[error(
        "device {device} belongs to pool {found}, not to pool {wanted} as the devices before it; give \
         only devices of one pool"
    )]
    OtherPool {
        /// The device.
        device: cairn_block::PoolDeviceId,
        /// Its pool.
        found: cairn_block::PoolId,
        /// The others' pool.
        wanted: cairn_block::PoolId,
    },
    /// The same device was given twice, or one is a copy of another.
    #[error("device {0} was given twice, or a copy of it: give each device once")]
    MemberTwice(cairn_block::PoolDeviceId),
    /// A device that the pool does not have any more.
    #[error(
        "device {device} was removed from pool {pool} and holds nothing of it: leave it out, or add it \
         anew with force"
    )]
    MemberRemoved {
        /// The pool.
        pool: cairn_block::PoolId,
        /// The device.
        device: cairn_block::PoolDeviceId,
    },
    /// A device of the right pool that the pool has never heard of.
    #[error(
        "device {device} says that it belongs to pool {pool}, whose other devices do not know it: it is \
         out of date; leave it out"
    )]
    MemberUnknown {
        /// The pool.
        pool: cairn_block::PoolId,
        /// The device.
        device: cairn_block::PoolDeviceId,
    },
    /// Devices went on without each other.
    #[error(
        "devices {first} and {second} of pool {pool} went on without each other: their lists of devices \
         differ and neither is newer. Open the pool with one side's devices only"
    )]
    MembersDisagree {
        /// The pool.
        pool: cairn_block::PoolId,
        /// A device of one side.
        first: cairn_block::PoolDeviceId,
        /// A device of the other.
        second: cairn_block::PoolDeviceId,
    },
    /// More devices, or fewer, than a pool can have.
    #[error("a pool has from 1 to {max} devices; {given} were given")]
    MemberCount {
        /// How many were given.
        given: usize,
        /// The most.
        max: usize,
    },
    /// The structures verify one by one and contradict each other.
    #[error("the pool's metadata contradicts itself: {0}")]
    Inconsistent(&'static str),
}

/// Why a command was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A replica of this identifier is there already.
    #[error("replica {0} exists already in this pool")]
    Exists(cairn_block::ReplicaId),
    /// Every catalog slot is taken.
    #[error("the pool holds {0} replicas, which is all it has room for")]
    NoFreeSlot(usize),
    /// No replica lives in this slot.
    #[error("there is no replica in slot {0}, or it is being deleted")]
    NoSuchReplica(u16),
    /// The size is nothing, or more than can be mapped.
    #[error("a size of {blocks} blocks is not possible; it must be between 1 and {max}")]
    BadSize {
        /// What was asked.
        blocks: u64,
        /// The largest possible.
        max: u64,
    },
    /// Replicas only grow.
    #[error("the replica has {has} blocks; it cannot shrink to {asked}")]
    Shrink {
        /// The size now.
        has: u64,
        /// What was asked.
        asked: u64,
    },
    /// Replicas have blocks of 4096 bytes.
    #[error("replicas have blocks of 4096 bytes, not of {0}; volumes can have smaller ones")]
    BlockSize(u32),
    /// The name does not fit its field.
    #[error("the name has {len} bytes; at most {max} fit")]
    NameTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that fit.
        max: usize,
    },
    /// The configuration does not fit its field.
    #[error("the configuration has {len} bytes; at most {max} fit")]
    ConfigTooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that fit.
        max: usize,
    },
    /// The device is not longer than it was.
    #[error("the device has {asked} bytes and the pool uses {has}: there is nothing to grow into")]
    NothingToGrow {
        /// The pool's device length.
        has: u64,
        /// What was asked.
        asked: u64,
    },
    /// The superblock has no room for another segment, or extents cannot be counted.
    #[error("the pool was grown {0} times already, or would have too many extents")]
    GrowLimit(usize),
    /// The command about a device of the pool cannot be carried out; the text says why.
    #[error("{0}")]
    Device(String),
    /// The replica has a snapshot of this identifier already.
    #[error("snapshot {0} exists already")]
    SnapshotExists(cairn_block::SnapshotId),
    /// There is no such snapshot of the replica.
    #[error("there is no snapshot {0} of this replica in this pool, or it is being deleted")]
    NoSuchSnapshot(cairn_block::SnapshotId),
    /// A snapshot is being taken of the replica, or it is being taken back to one.
    #[error("a snapshot of the replica is being taken or restored; try again")]
    SnapshotUnderWay,
    /// A read would have to look through too many layers.
    #[error("the replica has {0} snapshots on top of each other already; delete one first")]
    TooManySnapshots(usize),
    /// A thick replica has to have room for all of itself.
    #[error("{needed} extents of 1 MiB have to be reserved, and {free} are free")]
    NoRoom {
        /// Extents that would be reserved.
        needed: u64,
        /// Extents that are free and reserved for nobody.
        free: u64,
    },
    /// The pool is offline.
    #[error("the pool is offline: {0}")]
    PoolFailed(&'static str),
}

/// How a device operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The file system beneath a sparse file is full.
    #[error("there is no space beneath the device")]
    NoSpace,
    /// Anything else.
    #[error("the device failed")]
    Io,
}
