//! Commands on replicas: each is a new catalog page, durable before it is answered.
//!
//! A page goes to the copy that is not known to be durable, then a flush, then the answer; then the
//! other copy is brought up to it, so that a page that rots later has a twin. A crash leaves the old
//! page or the new one.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{BlockSize, ByteOffset, Epoch, IoStatus, Memory, ReplicaId, SnapshotId};

use crate::ControlError;
use crate::disk::{
    BLOCK, BLOCK_BYTES, CONFIG_MAX, CatalogPage, CatalogState, EXTENT, FLAG_REVERTED,
    FLAG_REVERTING, FLAG_THICK, MAX_REPLICA_BYTES, NAME_MAX, Whole,
};
use crate::flush::Waiter;
use crate::layers::MAX_DEPTH;
use crate::pool::{
    Deletion, DiskOp, Done, Pool, PoolState, Purpose, Register, ReplicaSlot, ReplicaSpec, Slot,
};

#[derive(Debug)]
enum Change {
    Create,
    Delete,
    /// A free slot takes a replica's layer.
    Capture,
    /// A replica gets another layer, on top of this one.
    Layer {
        layer: u16,
        parent: Option<u16>,
    },
    /// The owner of a layer reads through to another parent, since this slot's layer is empty.
    Adopt {
        parent: Option<u16>,
        from: u16,
    },
    /// To so many blocks; and what of it is whole then.
    Resize(u64, Whole),
    Register(Register),
    /// The replica is about to go back to this snapshot, on all devices of the pool; or has done so.
    Mark(Option<SnapshotId>),
    /// Nothing is left of the replica.
    Release,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// For its turn, or for memory.
    Waiting,
    First,
    /// For memory, once more.
    Second,
    SecondWrite,
}

/// A catalog page on its way.
#[derive(Debug)]
pub(crate) struct Job {
    /// Nobody, once it was answered, or where nobody asked.
    pub(crate) tag: Option<u64>,
    slot: u16,
    change: Change,
    stage: Stage,
    page: CatalogPage,
}

impl Pool {
    /// Creates a replica: thin, and reading as zeros.
    pub fn create_replica<M: Memory>(&mut self, tag: u64, spec: ReplicaSpec, mem: &mut M) {
        self.create_in(tag, None, spec, mem);
    }

    /// Creates a replica in a slot of the caller's choice, which is free, or in the first that is.
    pub(crate) fn create_in<M: Memory>(
        &mut self,
        tag: u64,
        wanted: Option<u16>,
        spec: ReplicaSpec,
        mem: &mut M,
    ) {
        let (slot, parent) = match self.check_create(&spec, wanted) {
            Ok(found) => found,
            Err(error) => return self.refuse_command(tag, error),
        };
        self.slots[usize::from(slot)].creating = true;
        let source = spec.source.and_then(|(replica, id)| self.find_snapshot(replica, id));
        let page = CatalogPage {
            state: CatalogState::Live,
            replica: spec.id,
            volume: spec.volume,
            name: spec.name,
            blocks: spec.blocks,
            block_size: spec.block_size,
            flags: if spec.thick { FLAG_THICK } else { 0 },
            layer: self.layer_of(slot),
            parent,
            snapshot: spec.source.map_or(SnapshotId(0), |(_, snapshot)| snapshot),
            whole: source.map_or(Whole::default(), |of| self.page(of.0).whole),
            ..CatalogPage::default()
        };
        if let Some(parent) = parent {
            self.layer_mut(parent).children += 1;
        }
        self.push_job(Some(tag), slot, Change::Create, page);
        self.count_reserve();
        self.pump(mem);
    }

    pub(crate) fn check_create(
        &self,
        spec: &ReplicaSpec,
        wanted: Option<u16>,
    ) -> Result<(u16, Option<u16>), ControlError> {
        if let PoolState::Failed(reason) = self.state {
            return Err(ControlError::PoolFailed(reason));
        }
        if spec.block_size != BlockSize::B4096 {
            return Err(ControlError::BlockSize(spec.block_size.bytes()));
        }
        if spec.name.len() > NAME_MAX {
            return Err(ControlError::NameTooLong { len: spec.name.len(), max: NAME_MAX });
        }
        check_size(spec.block_size, spec.blocks)?;
        let taken = self.find(spec.id).is_some()
            || self.jobs.iter().any(|j| {
                matches!(j.change, Change::Create) && j.page.replica == spec.id && j.tag.is_some()
            });
        if taken {
            return Err(ControlError::Exists(spec.id));
        }
        let needed = spec.block_size.bytes_of(spec.blocks).div_ceil(EXTENT);
        if spec.thick && !self.shared && needed > self.unreserved() {
            return Err(ControlError::NoRoom { needed, free: self.unreserved() });
        }
        let parent = match spec.source {
            None => None,
            Some((replica, snapshot)) => Some(self.check_source(spec, replica, snapshot)?),
        };
        Ok((self.free_slot_for_create(wanted)?, parent))
    }

    /// The layer that a clone begins on top of.
    fn check_source(
        &self,
        spec: &ReplicaSpec,
        replica: ReplicaId,
        snapshot: SnapshotId,
    ) -> Result<u16, ControlError> {
        let found = self.find_snapshot(replica, snapshot);
        let slot = found.ok_or(ControlError::NoSuchSnapshot(snapshot))?;
        let page = &self.slots[usize::from(slot.0)].page;
        if spec.blocks < page.blocks {
            return Err(ControlError::Shrink { has: page.blocks, asked: spec.blocks });
        }
        let layer = self.layer_of(slot.0);
        if self.chain(layer).count() >= MAX_DEPTH {
            return Err(ControlError::TooManySnapshots(MAX_DEPTH));
        }
        Ok(layer)
    }

    /// The wanted slot, or the first, where it is free.
    pub(crate) fn free_slot_for_create(&self, wanted: Option<u16>) -> Result<u16, ControlError> {
        (0u16..)
            .zip(&self.slots)
            .find(|&(i, slot)| slot.is_free() && wanted.is_none_or(|w| w == i))
            .map(|(i, _)| i)
            .ok_or(ControlError::NoFreeSlot(self.slots.len()))
    }

    /// Deletes a replica. Answered when there is no way back; its extents return after that.
    pub fn delete_replica<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, mem: &mut M) {
        if let Err(error) = self.check_live(slot) {
            return self.refuse_command(tag, error);
        }
        if self.slots[usize::from(slot.0)].frozen {
            return self.refuse_command(tag, ControlError::SnapshotUnderWay);
        }
        self.delete_slot(tag, slot.0, mem);
    }

    pub(crate) fn delete_slot<M: Memory>(&mut self, tag: u64, slot: u16, mem: &mut M) {
        self.slots[usize::from(slot)].deleting = true;
        self.slots[usize::from(slot)].round = None;
        self.deleting += 1;
        self.count_reserve();
        self.abandon_waiting_allocs(self.layer_of(slot), mem);
        self.push_job(Some(tag), slot, Change::Delete, CatalogPage::default());
        self.pump(mem);
    }

    pub(crate) fn capture(&mut self, tag: u64, slot: u16, page: CatalogPage) {
        self.push_job(Some(tag), slot, Change::Capture, page);
    }

    pub(crate) fn take_layer(&mut self, tag: u64, slot: u16, layer: u16, parent: Option<u16>) {
        let change = Change::Layer { layer, parent };
        self.push_job(Some(tag), slot, change, CatalogPage::default());
    }

    /// The owner of a layer is to read through to what is beneath the layer of `from`.
    pub(crate) fn adopt(&mut self, owner: u16, from: u16) {
        let parent = self.layer(self.layer_of(from)).parent;
        let change = Change::Adopt { parent, from };
        self.push_job(None, owner, change, CatalogPage::default());
    }

    /// Takes note on stable storage that a replica is about to go back to a snapshot, or forgets it.
    pub(crate) fn mark_revert<M: Memory>(
        &mut self,
        tag: u64,
        slot: u16,
        to: Option<SnapshotId>,
        mem: &mut M,
    ) {
        if let Err(error) = self.check_live(ReplicaSlot(slot)) {
            return self.refuse_command(tag, error);
        }
        self.push_job(Some(tag), slot, Change::Mark(to), CatalogPage::default());
        self.pump(mem);
    }

    /// Gives a free slot the page of a replica or a snapshot of which this device holds nothing, on top of
    /// the layer of another slot.
    pub(crate) fn adopt_page<M: Memory>(
        &mut self,
        tag: u64,
        slot: u16,
        page: &CatalogPage,
        parent: Option<u16>,
        mem: &mut M,
    ) {
        if let Err(error) = self.free_slot_for_create(Some(slot)) {
            return self.refuse_command(tag, error);
        }
        self.slots[usize::from(slot)].creating = true;
        let parent = parent.map(|parent| self.layer_of(parent));
        if let Some(parent) = parent {
            self.layer_mut(parent).children += 1;
        }
        let page = CatalogPage {
            layer: self.layer_of(slot),
            parent,
            promised_epoch: Epoch(0),
            accepted_epoch: Epoch(0),
            register_seq: 0,
            config: Vec::new(),
            ..page.clone()
        };
        self.push_job(Some(tag), slot, Change::Create, page);
        self.pump(mem);
    }

    pub(crate) fn has_job(&self, slot: u16) -> bool {
        self.jobs.iter().any(|job| job.slot == slot)
    }

    /// Grows a replica to `blocks` blocks.
    pub fn resize_replica<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        blocks: u64,
        mem: &mut M,
    ) {
        let checked = self.check_live(slot).and_then(|()| {
            let page = &self.slots[usize::from(slot.0)].page;
            let has = page.blocks;
            check_size(page.block_size, blocks)?;
            if blocks < has {
                return Err(ControlError::Shrink { has, asked: blocks });
            }
            self.check_grown(slot.0, blocks)
        });
        if let Err(error) = checked {
            return self.refuse_command(tag, error);
        }
        let whole = self.whole_when_grown(slot.0);
        self.push_job(Some(tag), slot.0, Change::Resize(blocks, whole), CatalogPage::default());
        self.count_reserve();
        self.pump(mem);
    }

    /// What is whole of a replica once it is grown: where some of it may be lost, what it grows by.
    fn whole_when_grown(&self, slot: u16) -> Whole {
        let of = &self.slots[usize::from(slot)];
        let losses = self.membership().losses();
        let told = of.page.whole.from != 0 && of.page.whole.losses == losses;
        if told || !self.membership().is_lost(slot) {
            return of.page.whole;
        }
        Whole { from: u32::try_from(of.extents()).expect("at most 2^28 extents"), losses }
    }

    /// Replaces a replica's register. Nothing is compared: that is the caller's part. Two writes to one
    /// replica become durable in the order in which they came.
    pub fn write_register<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        register: Register,
        mem: &mut M,
    ) {
        let len = register.config.len();
        let checked = self.check_live(slot).and({
            if len > CONFIG_MAX {
                Err(ControlError::ConfigTooLong { len, max: CONFIG_MAX })
            } else {
                Ok(())
            }
        });
        if let Err(error) = checked {
            return self.refuse_command(tag, error);
        }
        self.push_job(Some(tag), slot.0, Change::Register(register), CatalogPage::default());
        self.pump(mem);
    }

    /// A thick replica needs room for all that it grows by.
    fn check_grown(&self, slot: u16, blocks: u64) -> Result<(), ControlError> {
        let slot = &self.slots[usize::from(slot)];
        let grown = slot.page.block_size.bytes_of(blocks).div_ceil(EXTENT);
        let needed = grown.saturating_sub(slot.extents());
        if slot.is_thick() && !self.shared && needed > self.unreserved() {
            return Err(ControlError::NoRoom { needed, free: self.unreserved() });
        }
        Ok(())
    }

    /// What thick replicas are to have that are being made, or grow: others must not take it meanwhile.
    pub(crate) fn reserve_to_come(&self) -> u64 {
        let extents = |page: &CatalogPage| page.bytes().div_ceil(EXTENT);
        let of = |job: &Job| {
            let slot = &self.slots[usize::from(job.slot)];
            match job.change {
                Change::Create if slot.creating && job.page.flags & FLAG_THICK != 0 => {
                    extents(&job.page)
                }
                Change::Resize(blocks, _) if slot.is_live() && slot.is_thick() => {
                    let grown = slot.page.block_size.bytes_of(blocks).div_ceil(EXTENT);
                    grown.saturating_sub(slot.extents())
                }
                _ => 0,
            }
        };
        self.jobs.iter().map(of).sum()
    }

    pub(crate) fn check_live(&self, slot: ReplicaSlot) -> Result<(), ControlError> {
        if let PoolState::Failed(reason) = self.state {
            return Err(ControlError::PoolFailed(reason));
        }
        match self.slots.get(usize::from(slot.0)) {
            Some(s) if s.is_live() => Ok(()),
            _ => Err(ControlError::NoSuchReplica(slot.0)),
        }
    }

    pub(crate) fn refuse_command(&mut self, tag: u64, error: ControlError) {
        let status = match error {
            ControlError::PoolFailed(_) => IoStatus::MediaError,
            ControlError::NoFreeSlot(_) | ControlError::NoRoom { .. } => IoStatus::NoSpace,
            _ => IoStatus::InvalidField,
        };
        self.refuse(tag, status, error);
    }

    /// The extents of a deleted replica are back, and the table names it no more.
    pub(crate) fn free_slot(&mut self, slot: u16) {
        self.push_job(None, slot, Change::Release, CatalogPage::default());
    }

    /// The page of a replica that is being created.
    pub(crate) fn created(&self, slot: u16) -> Option<&CatalogPage> {
        self.jobs
            .iter()
            .find(|j| j.slot == slot && matches!(j.change, Change::Create))
            .map(|j| &j.page)
    }

    fn push_job(&mut self, tag: Option<u64>, slot: u16, change: Change, page: CatalogPage) {
        self.jobs.push_back(Job { tag, slot, change, stage: Stage::Waiting, page });
    }

    /// Starts the pages whose turn it is.
    pub(crate) fn pump_catalog<M: Memory>(&mut self, mem: &mut M) {
        for i in 0..self.jobs.len() {
            let job = &mut self.jobs[i];
            let slot = &mut self.slots[usize::from(job.slot)];
            let second = match job.stage {
                Stage::Waiting if !slot.busy => false,
                Stage::Second => true,
                _ => continue,
            };
            let Some(buf) = mem.alloc(BLOCK_BYTES) else {
                self.short = true;
                return;
            };
            if second {
                job.stage = Stage::SecondWrite;
            } else {
                slot.busy = true;
                job.stage = Stage::First;
                next_page(job, slot);
            }
            let address = self.superblock.catalog_address(job.slot, 1 - slot.durable_copy);
            let bytes = mem.bytes_mut(buf.slice());
            job.page.encode(job.slot, address, self.superblock.pool, bytes);
            let purpose = Purpose::Catalog { slot: job.slot, second };
            let offset = ByteOffset(address * BLOCK);
            let op = DiskOp::Write { offset, buf: buf.slice(), fua: false };
            self.issue(op, purpose, Some(buf));
        }
    }

    pub(crate) fn catalog_written(&mut self, slot: u16, second: bool) {
        if !second {
            if on(Mutant::RegisterNotFlushed) {
                return self.catalog_durable(slot);
            }
            return self.flusher.next.push(Waiter::Catalog(slot));
        }
        self.slots[usize::from(slot)].busy = false;
        let at = self.job_in(slot, Stage::SecondWrite);
        self.jobs.remove(at);
    }

    fn job_in(&self, slot: u16, stage: Stage) -> usize {
        self.jobs
            .iter()
            .position(|j| j.slot == slot && j.stage == stage)
            .expect("a catalog write belongs to a job")
    }

    /// The new page is on stable storage.
    pub(crate) fn catalog_durable(&mut self, index: u16) {
        let at = self.job_in(index, Stage::First);
        let job = &mut self.jobs[at];
        let slot = &mut self.slots[usize::from(index)];
        slot.page = job.page.clone();
        slot.durable_copy = 1 - slot.durable_copy;
        slot.register = register_of(&slot.page);
        job.stage = Stage::Second;
        let tag = job.tag.take();
        match job.change {
            Change::Create => {
                slot.creating = false;
                let (layer, parent) = (slot.layer, slot.page.parent);
                if slot.page.state == CatalogState::Deleting {
                    // A device that joins gets what others wait to delete, too.
                    slot.deleting = true;
                    slot.deletion = Deletion::Extents(0);
                    self.deleting += 1;
                }
                self.layer_mut(layer).parent = parent;
                self.count_reserve();
            }
            Change::Delete => slot.deletion = Deletion::Extents(0),
            Change::Release => {
                slot.deletion = Deletion::No;
                slot.deleting = false;
                let layer = slot.layer;
                self.deleting -= 1;
                if let Some(parent) = self.layer_mut(layer).parent.take() {
                    self.lose_child(parent);
                }
            }
            Change::Resize(..) => self.count_reserve(),
            Change::Register(_) | Change::Mark(_) => {}
            Change::Capture => {
                return self.captured(index, tag.expect("a snapshot is asked for"));
            }
            Change::Layer { .. } => self.swapped(index),
            Change::Adopt { parent, from } => {
                let layer = slot.layer;
                self.adopted(layer, parent, from);
            }
        }
        if let Some(tag) = tag {
            self.done.push_back(Done { tag, status: IoStatus::Ok, error: None });
        }
    }
}

pub(crate) fn register_of(page: &CatalogPage) -> Register {
    Register {
        promised_epoch: page.promised_epoch,
        accepted_epoch: page.accepted_epoch,
        seq: page.register_seq,
        config: page.config.clone(),
    }
}

/// What the slot's page becomes.
fn next_page(job: &mut Job, slot: &Slot) {
    let mut page = match job.change {
        Change::Create | Change::Capture => core::mem::take(&mut job.page),
        Change::Release => CatalogPage { layer: slot.layer, ..CatalogPage::default() },
        _ => slot.page.clone(),
    };
    match &mut job.change {
        Change::Create | Change::Capture | Change::Release => {}
        Change::Layer { layer, parent } => {
            page.layer = *layer;
            page.parent = *parent;
            if page.flags & FLAG_REVERTING != 0 {
                page.flags ^= FLAG_REVERTING | FLAG_REVERTED;
            }
        }
        Change::Mark(to) => {
            page.flags &= !(FLAG_REVERTING | FLAG_REVERTED);
            page.flags |= if to.is_some() { FLAG_REVERTING } else { 0 };
            page.target = to.unwrap_or(SnapshotId(0));
        }
        Change::Adopt { parent, .. } => page.parent = *parent,
        Change::Delete => page.state = CatalogState::Deleting,
        Change::Resize(blocks, whole) => {
            page.blocks = page.blocks.max(*blocks);
            page.whole = *whole;
        }
        Change::Register(register) => {
            page.promised_epoch = register.promised_epoch;
            page.accepted_epoch = register.accepted_epoch;
            page.register_seq = register.seq;
            page.config = core::mem::take(&mut register.config);
        }
    }
    page.sequence = slot.page.sequence + 1;
    job.page = page;
}

pub(crate) fn check_size(block_size: BlockSize, blocks: u64) -> Result<(), ControlError> {
    let max = MAX_REPLICA_BYTES >> block_size.shift();
    if blocks == 0 || blocks > max {
        return Err(ControlError::BadSize { blocks, max });
    }
    Ok(())
}
