//! The pool: its state, its queues, and what its owner calls.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{
    BlockSize, Buf, BufSlice, ByteOffset, Epoch, IoRequest, IoStatus, Memory, PoolId, ReplicaId,
    SnapshotId, VolumeId,
};

use crate::alloc::Alloc;
use crate::control::Job;
use crate::data::verify::Verifier;
use crate::data::{Part, Request};
use crate::disk::{CatalogPage, CatalogState, EXTENT, FLAG_SNAPSHOT, FLAG_THICK, Superblock};
use crate::extents::{ExtentState, Extents, page_of};
use crate::flush::{Flusher, Waiter};
use crate::journal::Journal;
use crate::layers::Layer;
use crate::maintain::Maintenance;
use crate::merge::Merge;
use crate::settle::Settle;
use crate::slab::Slab;
use crate::snapshot::Swap;
use crate::sums::Sums;
use crate::{ControlError, Device, DiskError, FormatOptions, PoolError, Probe};

/// Where a replica's catalog page is; names the replica while the pool is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaSlot(pub u16);

/// Names a device operation from [`Pool::poll_disk`] to [`Pool::handle_disk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskId(pub u32);

/// What the device is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// Fill the buffer.
    Read {
        /// From here.
        offset: ByteOffset,
        /// The bytes.
        buf: BufSlice,
    },
    /// Write the buffer.
    Write {
        /// To here.
        offset: ByteOffset,
        /// The bytes.
        buf: BufSlice,
        /// On stable storage before it completes.
        fua: bool,
    },
    /// Everything that completed before this was issued goes to stable storage.
    Flush,
    /// The range reads as zeros afterwards.
    Zero {
        /// From here.
        offset: ByteOffset,
        /// Length in bytes.
        len: u64,
        /// The space beneath may be given back.
        punch: bool,
    },
}

/// A device operation to perform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskIo {
    /// To hand back with the result.
    pub id: DiskId,
    /// What to do.
    pub op: DiskOp,
}

/// The answer to a request or a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// As it was given.
    pub tag: u64,
    /// How it ended.
    pub status: IoStatus,
    /// Why, for a command that did not do what it was asked.
    pub error: Option<ControlError>,
}

/// Whether the pool serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolState {
    /// It does.
    Online,
    /// It does not, for this reason, until it is opened again.
    Failed(&'static str),
}

/// How full the pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// All extents.
    pub extents_total: u64,
    /// Extents that can be allocated now.
    pub extents_free: u64,
    /// Extents that hold a replica's data. The rest is on its way from one to the other.
    pub extents_allocated: u64,
    /// Free extents that are kept for thick replicas.
    pub extents_reserved: u64,
    /// Extents that the live replicas would take if they were full.
    pub extents_provisioned: u64,
    /// Bytes of an extent.
    pub extent_bytes: u32,
}

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaState {
    /// Its catalog page is being written.
    Creating,
    /// Serving.
    Live,
    /// Giving back its extents.
    Deleting,
}

/// A replica, to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Its slot.
    pub slot: ReplicaSlot,
    /// Its identifier.
    pub id: ReplicaId,
    /// The volume that it is a replica of.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size in blocks.
    pub blocks: u64,
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// Extents that it takes, those of its snapshots not counted.
    pub allocated_extents: u64,
    /// Whether its whole size is reserved for it.
    pub thick: bool,
    /// The snapshot that it is a clone of.
    pub source: Option<SnapshotId>,
    /// What it is doing.
    pub state: ReplicaState,
}

/// What to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaSpec {
    /// Its identifier.
    pub id: ReplicaId,
    /// The volume that it is a replica of.
    pub volume: VolumeId,
    /// A name for people, at most 64 bytes.
    pub name: String,
    /// Its size in blocks.
    pub blocks: u64,
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// Reserve its whole size.
    pub thick: bool,
    /// Begin with what this snapshot of this replica holds.
    pub source: Option<(ReplicaId, SnapshotId)>,
}

/// A replica's part in its volume's authority: what it promised and what it accepted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Register {
    /// Nothing of an older epoch is admitted.
    pub promised_epoch: Epoch,
    /// The epoch of the accepted configuration.
    pub accepted_epoch: Epoch,
    /// Its sequence.
    pub seq: u64,
    /// The configuration, opaque here, at most [`CONFIG_MAX`](crate::disk::CONFIG_MAX) bytes.
    pub config: Vec<u8>,
}

/// A logical extent that is mapped to nothing.
pub(crate) const HOLE: u32 = u32::MAX;
/// Set in a map entry whose other bits name an [`Alloc`].
pub(crate) const PENDING: u32 = 1 << 31;

/// What a logical extent is mapped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    Hole,
    Pending(u32),
    Extent(u32),
}

/// A catalog slot in memory.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// As it is durable.
    pub(crate) page: CatalogPage,
    pub(crate) register: Register,
    /// Which copy is known to be durable; the next write goes to the other.
    pub(crate) durable_copy: u64,
    /// A create was accepted and is not durable yet.
    pub(crate) creating: bool,
    /// A delete was accepted: nothing new is admitted.
    pub(crate) deleting: bool,
    /// A catalog write is under way.
    pub(crate) busy: bool,
    /// What was written to it. Differs from the page's while a snapshot is being taken.
    pub(crate) layer: u16,
    /// Requests that were admitted and are not answered.
    pub(crate) in_flight: u32,
    /// A snapshot is being taken: requests wait.
    pub(crate) frozen: bool,
    pub(crate) deletion: Deletion,
    /// The round of settling that began last, until its end.
    pub(crate) round: Option<u64>,
    /// The deletion waits: several layers still read what it holds, or a block of it cannot be read.
    pub(crate) parked: bool,
}

/// How far a deletion has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Deletion {
    /// There is none, or it is not durable yet.
    #[default]
    No,
    /// Giving back extents; the next to look at.
    Extents(usize),
    /// Waits for the page of the layer on top, which no longer names it as its parent.
    Parent,
    /// Waits for this checkpoint, after which the table no longer names the slot.
    Checkpoint(u64),
    /// Waits for the catalog page.
    Page,
}

impl Slot {
    pub(crate) fn is_live(&self) -> bool {
        self.page.state == CatalogState::Live && !self.deleting
    }

    pub(crate) fn is_snapshot(&self) -> bool {
        self.page.state == CatalogState::Snapshot && !self.deleting && !self.creating
    }

    pub(crate) fn is_thick(&self) -> bool {
        self.page.flags & FLAG_THICK != 0
    }

    /// Extents that it takes where it is full.
    pub(crate) fn extents(&self) -> u64 {
        self.page.bytes().div_ceil(EXTENT)
    }

    pub(crate) fn is_free(&self) -> bool {
        self.page.state == CatalogState::Free && !self.creating && !self.busy
    }
}

/// Why a device operation was issued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Part of a request, on the data of this extent.
    Data {
        request: u32,
        extent: u32,
        /// Of the extent's checksums when it was issued.
        version: u32,
        /// How often a read met a write of its blocks.
        tries: u8,
    },
    /// Reads the checksum pages of an extent, or all of the extent to hash it.
    SumLoad(u32),
    /// Zeroes blocks of an extent that a copy cut off by a crash left.
    SumClean(u32),
    /// Writes the checksum page of an extent.
    SumWrite(u32),
    /// Reads or writes blocks of an extent for this merge.
    Merge {
        merge: u32,
        extent: u32,
    },
    Flush,
    Journal,
    /// Zeroes an extent for this allocation.
    AllocZero(u32),
    /// Zeroes an extent that was freed.
    CleanZero(u32),
    Maintain,
    /// Writes the catalog page of a slot; the second copy, or the first.
    Catalog {
        slot: u16,
        second: bool,
    },
}

#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) op: DiskOp,
    pub(crate) purpose: Purpose,
    /// A metadata buffer that the operation uses.
    pub(crate) buf: Option<Buf>,
}

/// Requests, parts and operations that are preallocated.
const WARM: usize = 1024;

/// An open pool.
#[derive(Debug)]
pub struct Pool {
    pub(crate) superblock: Superblock,
    /// Which of copies A and B is known to be durable.
    pub(crate) superblock_copy: u64,
    pub(crate) state: PoolState,
    pub(crate) extents: Extents,
    pub(crate) slots: Vec<Slot>,
    pub(crate) layers: Vec<Layer>,
    /// Free extents that are kept for thick replicas.
    pub(crate) reserved: u64,
    /// Those of them that must be here: for what a thick replica may write over a snapshot's extents.
    pub(crate) bound: u64,
    /// It is one device of several, and what it keeps free is said by [`crate::MultiPool`].
    pub(crate) shared: bool,
    /// Extents that the live replicas would take if they were full.
    pub(crate) provisioned: u64,
    pub(crate) swaps: Vec<Swap>,
    /// Requests that wait until a snapshot has been taken.
    pub(crate) held: VecDeque<(u64, ReplicaSlot, IoRequest)>,
    pub(crate) merges: Slab<Merge>,
    /// How many of them are being deleted, those that wait for their children left out.
    pub(crate) deleting: usize,
    pub(crate) requests: Slab<Request>,
    pub(crate) parts: Slab<Part>,
    pub(crate) issued: Slab<Issued>,
    pub(crate) allocs: Slab<Alloc>,
    /// Allocations that wait for an extent.
    pub(crate) need_extent: VecDeque<u32>,
    /// Extents to zero before they are free.
    pub(crate) to_clean: VecDeque<u32>,
    pub(crate) journal: Journal,
    pub(crate) flusher: Flusher,
    pub(crate) maintenance: Maintenance,
    pub(crate) sums: Sums,
    pub(crate) settle: Settle,
    /// Something waits for memory.
    pub(crate) short: bool,
    pub(crate) verifier: Verifier,
    pub(crate) jobs: VecDeque<Job>,
    /// Tags of allocations and arrivals that were asked for by themselves.
    pub(crate) moves: Vec<u64>,
    /// Who is told when the record is durable that an extent is free.
    pub(crate) releases: Vec<(u32, u64)>,
    pub(crate) out: VecDeque<u32>,
    pub(crate) done: VecDeque<Done>,
}

impl Pool {
    /// What the device holds. Changes nothing.
    ///
    /// # Errors
    /// [`PoolError::Device`].
    pub fn probe<D: Device>(dev: &mut D) -> Result<Probe, PoolError> {
        crate::format::probe(dev)
    }

    /// Makes an empty pool of the whole device. Its device id is the pool's id.
    ///
    /// # Errors
    /// [`PoolError`]: among others where the device holds something and `force` is not set.
    pub fn format<D: Device>(dev: &mut D, options: &FormatOptions) -> Result<(), PoolError> {
        crate::format::format(dev, options, &crate::format::Identity::alone(options.pool_id))
    }

    /// Opens the pool on a device, and recovers what a crash left behind. Deletions that were cut off
    /// go on with the first [`Pool::retry`] or any other call that takes the memory.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn open<D: Device>(dev: &mut D) -> Result<Self, PoolError> {
        crate::open::open(dev)
    }

    pub(crate) fn new(
        superblock: Superblock,
        superblock_copy: u64,
        extents: Extents,
        (slots, layers): (Vec<Slot>, Vec<Layer>),
        journal: Journal,
        maintenance: Maintenance,
        stale: VecDeque<u32>,
    ) -> Self {
        let deleting = slots.iter().filter(|s| s.deleting).count();
        let mut pool = Self {
            deleting,
            superblock,
            superblock_copy,
            state: PoolState::Online,
            extents,
            slots,
            layers,
            reserved: 0,
            bound: 0,
            shared: false,
            provisioned: 0,
            swaps: Vec::new(),
            held: VecDeque::new(),
            merges: Slab::with_capacity(0),
            requests: Slab::with_capacity(WARM),
            parts: Slab::with_capacity(WARM),
            issued: Slab::with_capacity(WARM),
            allocs: Slab::with_capacity(WARM),
            need_extent: VecDeque::with_capacity(WARM),
            to_clean: VecDeque::with_capacity(WARM),
            journal,
            flusher: Flusher::with_capacity(WARM),
            maintenance,
            sums: Sums::new(stale),
            settle: Settle::new(),
            short: false,
            verifier: Verifier::default(),
            jobs: VecDeque::new(),
            moves: Vec::new(),
            releases: Vec::new(),
            out: VecDeque::with_capacity(WARM),
            done: VecDeque::with_capacity(WARM),
        };
        pool.count_reserve();
        pool.list_open();
        pool
    }

    /// The pool's identifier.
    #[must_use]
    pub fn id(&self) -> PoolId {
        self.superblock.pool
    }

    /// The device's length in bytes, as far as the pool uses it.
    #[must_use]
    pub fn device_len(&self) -> u64 {
        self.superblock.device_len
    }

    /// How full the pool is.
    #[must_use]
    pub fn usage(&self) -> Usage {
        Usage {
            extents_total: u64::from(self.extents.len()),
            extents_free: u64::from(self.extents.free()),
            extents_allocated: u64::from(self.extents.allocated),
            extents_reserved: self.reserved,
            extents_provisioned: self.provisioned,
            extent_bytes: u32::try_from(EXTENT).expect("1 MiB"),
        }
    }

    /// Whether the pool serves.
    #[must_use]
    pub fn state(&self) -> PoolState {
        self.state
    }

    /// The replicas, those on their way in and out among them.
    pub fn replicas(&self) -> impl Iterator<Item = ReplicaInfo> {
        (0u16..).zip(&self.slots).filter_map(|(i, slot)| {
            let page = match (slot.page.state, slot.creating) {
                (CatalogState::Free, false) | (CatalogState::Snapshot, _) => return None,
                _ if slot.page.flags & FLAG_SNAPSHOT != 0 => return None,
                (CatalogState::Free, true) => self.created(i)?,
                _ => &slot.page,
            };
            let state = match page.state {
                _ if slot.creating => ReplicaState::Creating,
                CatalogState::Deleting => ReplicaState::Deleting,
                _ if slot.deleting => ReplicaState::Deleting,
                _ => ReplicaState::Live,
            };
            Some(ReplicaInfo {
                slot: ReplicaSlot(i),
                id: page.replica,
                volume: page.volume,
                name: page.name.clone(),
                blocks: page.blocks,
                block_size: page.block_size,
                allocated_extents: u64::from(self.layer(slot.layer).allocated),
                thick: page.flags & FLAG_THICK != 0,
                source: Some(page.snapshot).filter(|s| s.0 != 0),
                state,
            })
        })
    }

    /// The slot of a live replica.
    #[must_use]
    pub fn find(&self, id: ReplicaId) -> Option<ReplicaSlot> {
        (0u16..)
            .zip(&self.slots)
            .find(|(_, slot)| slot.is_live() && slot.page.replica == id)
            .map(|(i, _)| ReplicaSlot(i))
    }

    /// The register of a live replica, as it is durable.
    #[must_use]
    pub fn register(&self, slot: ReplicaSlot) -> Option<&Register> {
        self.slots.get(usize::from(slot.0)).filter(|s| s.is_live()).map(|s| &s.register)
    }

    /// Requests and commands that are not answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len()
            + self.jobs.iter().filter(|job| job.tag.is_some()).count()
            + self.maintenance.commands()
            + self.sums.commands.len()
            + self.settle.commands()
            + self.moves.len()
            + self.swaps.iter().filter(|swap| swap.is_waiting()).count()
            + self.held.len()
    }

    /// Whether nothing is under way: no request, no command, no device operation, no deletion.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_flight() == 0
            && self.issued.len() == 0
            && self.jobs.is_empty()
            && self.deleting == 0
            && self.merges.len() == 0
            && self.maintenance.is_idle()
            && self.sums.is_idle()
    }

    /// The next operation for the device. They may be performed in any order.
    pub fn poll_disk(&mut self) -> Option<DiskIo> {
        let id = self.out.pop_front()?;
        Some(DiskIo { id: DiskId(id), op: self.issued.get(id).op })
    }

    /// The next answer.
    pub fn poll_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// Takes the result of a device operation.
    ///
    /// # Panics
    /// Where `id` is not in flight.
    pub fn handle_disk<M: Memory>(
        &mut self,
        id: DiskId,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        let issued = self.issued.remove(id.0);
        let buf = issued.buf;
        if let Purpose::Data { request, extent, version, tries } = issued.purpose {
            let of = (request, extent);
            match buf {
                Some(scratch) => {
                    self.verify_done(issued.op, of, (version, tries), result, scratch, mem);
                }
                None => self.data_done(issued.op, request, extent, (version, tries), result, mem),
            }
        } else if let (Purpose::SumLoad(extent), true) =
            (issued.purpose, self.state == PoolState::Online)
        {
            let buf = buf.expect("checksums are read into a buffer");
            self.sum_loaded(extent, result, buf.slice(), mem);
            mem.release(buf);
        } else {
            if let Some(buf) = buf {
                mem.release(buf);
            }
            if self.state == PoolState::Online {
                self.handle_internal(issued.purpose, result, mem);
            }
        }
        self.pump(mem);
    }

    fn handle_internal<M: Memory>(
        &mut self,
        purpose: Purpose,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        match purpose {
            Purpose::Data { .. } | Purpose::SumLoad(_) => unreachable!("handled before"),
            Purpose::Merge { merge, extent } => self.merge_io_done(merge, extent, result, mem),
            Purpose::SumClean(extent) => self.sum_cleaned(extent, result, mem),
            Purpose::SumWrite(extent) => match result {
                Ok(()) => self.sum_written(extent),
                Err(_) => self.fail("a write of checksums failed", mem),
            },
            Purpose::AllocZero(alloc) => self.alloc_zeroed(alloc, result, mem),
            Purpose::CleanZero(extent) => self.clean_zeroed(extent, result),
            Purpose::Flush => match result {
                Ok(()) => self.flushed(mem),
                Err(_) => self.fail("a device flush failed", mem),
            },
            Purpose::Journal => match result {
                Ok(()) if on(Mutant::JournalNotFlushed) => self.journal_durable(mem),
                Ok(()) => self.flusher.next.push(Waiter::Journal),
                Err(_) => self.fail("a journal write failed", mem),
            },
            Purpose::Maintain => match result {
                Ok(()) => self.maintain_written(),
                Err(_) => self.fail("a write of the allocation table or superblock failed", mem),
            },
            Purpose::Catalog { slot, second } => match result {
                Ok(()) => self.catalog_written(slot, second),
                Err(_) => self.fail("a catalog write failed", mem),
            },
        }
    }

    fn flushed<M: Memory>(&mut self, mem: &mut M) {
        self.flusher.in_flight = false;
        // Nothing is added to `current` while it is drained: new waiters go to `next`.
        let mut waiters = core::mem::take(&mut self.flusher.current);
        for waiter in waiters.drain(..) {
            match waiter {
                Waiter::Request(request) => self.finish(request),
                Waiter::Journal => self.journal_durable(mem),
                Waiter::Alloc(alloc) => self.log_alloc(alloc),
                Waiter::Clean(extent) => self.cleaned(extent),
                Waiter::Sum(extent) => self.sum_flushed(extent, mem),
                Waiter::SumClean(extent) => self.sum_settled(extent, true, mem),
                Waiter::Redeemed { extent, request } => self.redeemed(extent, request),
                Waiter::Merge(merge) => self.merge_flushed(merge),
                Waiter::Maintain => self.maintain_flushed(),
                Waiter::Catalog(slot) => self.catalog_durable(slot),
            }
        }
        self.flusher.current = waiters;
        if self.maintenance.wiped {
            self.fail("the device was removed from its pool", mem);
        }
    }

    /// Tries again whatever waited for memory.
    pub fn retry<M: Memory>(&mut self, mem: &mut M) {
        self.pump(mem);
    }

    /// Moves on everything that can move. Called at the end of every event.
    /// Whether something waits for memory that requests which hold memory may wait for.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Whether [`Pool::poll_disk`] has something.
    pub(crate) fn has_disk_io(&self) -> bool {
        !self.out.is_empty()
    }

    pub(crate) fn pump<M: Memory>(&mut self, mem: &mut M) {
        self.short = false;
        if self.state != PoolState::Online {
            return;
        }
        self.pump_swaps(mem);
        self.pump_deletions(mem);
        self.pump_clean();
        self.pump_allocs(mem);
        self.pump_sums(mem);
        self.pump_verify(mem);
        self.pump_settle();
        self.pump_journal(mem);
        self.pump_maintenance(mem);
        self.pump_catalog(mem);
        if self.flusher.start() {
            self.issue(DiskOp::Flush, Purpose::Flush, None);
        }
    }

    pub(crate) fn issue(&mut self, op: DiskOp, purpose: Purpose, buf: Option<Buf>) {
        if let Purpose::Data { extent, .. } | Purpose::Merge { extent, .. } = purpose {
            self.extents.get_mut(extent).pins += 1;
        }
        let id = self.issued.insert(Issued { op, purpose, buf });
        self.out.push_back(id);
    }

    pub(crate) fn unpin(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        assert!(e.pins > 0, "I/O on extent {extent} completed twice");
        e.pins -= 1;
        if e.pins == 0 && e.state == ExtentState::Cleaning {
            self.to_clean.push_back(extent);
        }
    }

    pub(crate) fn dirty_page(&mut self, extent: u32) {
        let page = page_of(&self.superblock.segments, extent);
        self.extents.pages[page as usize].dirty = true;
    }

    /// Takes the pool offline. What waits is answered now; what is at the device, when it comes back.
    pub(crate) fn fail<M: Memory>(&mut self, reason: &'static str, mem: &mut M) {
        if self.state != PoolState::Online {
            return;
        }
        self.state = PoolState::Failed(reason);
        while let Some(id) = self.out.pop_front() {
            let issued = self.issued.remove(id);
            if let Purpose::Data { extent, .. } | Purpose::Merge { extent, .. } = issued.purpose {
                self.extents.get_mut(extent).pins -= 1;
            }
            if let Some(buf) = issued.buf {
                mem.release(buf);
            }
        }
        self.map_unfreed();
        self.give_up_held();
        self.clear_merges(mem);
        self.parts.clear();
        self.allocs.clear();
        for layer in &mut self.layers {
            layer.taken = 0;
        }
        self.need_extent.clear();
        self.to_clean.clear();
        self.journal.clear();
        self.releases.clear();
        self.sums.clear();
        self.verifier.clear();
        self.flusher.clear();
        for (_, request) in self.requests.iter_mut() {
            request.give_up();
        }
        for (_, issued) in self.issued.iter() {
            if let Purpose::Data { request, .. } = issued.purpose {
                self.requests.get_mut(request).outstanding += 1;
            }
        }
        let idle: Vec<u32> = self
            .requests
            .iter()
            .filter(|(_, request)| request.outstanding == 0)
            .map(|(i, _)| i)
            .collect();
        for request in idle {
            self.finish(request);
        }
        let jobs = core::mem::take(&mut self.jobs);
        let washing = core::mem::take(&mut self.sums.commands);
        let swaps = core::mem::take(&mut self.swaps);
        let tags = jobs
            .iter()
            .filter_map(|job| job.tag)
            .chain(self.maintenance.take_commands())
            .chain(washing)
            .chain(self.settle.clear())
            .chain(core::mem::take(&mut self.moves))
            .chain(swaps.iter().filter(|swap| swap.is_waiting()).map(|swap| swap.tag));
        let error = ControlError::PoolFailed(reason);
        self.done.extend(tags.map(|tag| Done {
            tag,
            status: IoStatus::MediaError,
            error: Some(error.clone()),
        }));
    }

    pub(crate) fn refuse(&mut self, tag: u64, status: IoStatus, error: ControlError) {
        self.done.push_back(Done { tag, status, error: Some(error) });
    }
}
