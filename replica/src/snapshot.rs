//! Snapshots, clones and going back to a snapshot: a replica changes its layer.
//!
//! Two catalog pages change, and the second decides. First a free slot takes the replica's layer, as a
//! snapshot or as something to delete; that page counts for nothing while the replica still has the
//! layer. Then the replica's page names the free slot's layer as its own, with its new parent. Each is
//! flushed before the next, so a crash leaves the one state or the other. Requests to the replica are
//! held meanwhile, and what was in flight is waited for, so a snapshot holds all that was answered.

use cairn_block::{BlockSize, IoStatus, Memory, ReplicaId, SnapshotId, VolumeId};

use crate::ControlError;
use crate::disk::{CatalogPage, CatalogState, FLAG_SNAPSHOT, NAME_MAX};
use crate::layers::MAX_DEPTH;
use crate::pool::{Deletion, Done, Pool, ReplicaSlot};

/// What to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// Its identifier: the same on every replica of the volume.
    pub id: SnapshotId,
    /// A name for people, at most 64 bytes.
    pub name: String,
    /// When it is taken, in seconds since 1970. Kept, and not looked at.
    pub created: u64,
}

/// A snapshot, to list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its slot: it can be read like a replica's.
    pub slot: ReplicaSlot,
    /// Its identifier.
    pub id: SnapshotId,
    /// The replica that it was taken of.
    pub replica: ReplicaId,
    /// The volume that that is a replica of.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// Its size in blocks.
    pub blocks: u64,
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// Extents that hold what was written between the snapshot before and this one, and is kept for it.
    pub own_extents: u64,
    /// It is being deleted. Where clones still read it, that lasts until they are gone.
    pub deleting: bool,
}

/// A change of a replica's layer under way.
#[derive(Debug)]
pub(crate) struct Swap {
    pub(crate) tag: u64,
    replica: u16,
    /// The slot that takes the old layer.
    with: u16,
    /// The parent that the replica's new layer gets.
    parent: Option<u16>,
    /// The free slot's page, less its parent, until its write has begun.
    page: Option<CatalogPage>,
}

impl Swap {
    /// Whether nothing is under way for it that would answer its tag.
    pub(crate) fn is_waiting(&self) -> bool {
        self.page.is_some()
    }
}

impl Pool {
    /// The snapshots, those that are being deleted among them.
    pub fn snapshots(&self) -> impl Iterator<Item = SnapshotInfo> {
        (0u16..).zip(&self.slots).filter_map(|(i, slot)| {
            let page = &slot.page;
            let there = page.state == CatalogState::Snapshot
                || (page.state == CatalogState::Deleting && page.flags & FLAG_SNAPSHOT != 0);
            if !there || page.layer != slot.layer || slot.creating {
                return None;
            }
            Some(SnapshotInfo {
                slot: ReplicaSlot(i),
                id: page.snapshot,
                replica: page.replica,
                volume: page.volume,
                name: page.name.clone(),
                created: page.created,
                blocks: page.blocks,
                block_size: page.block_size,
                own_extents: u64::from(self.layer(slot.layer).allocated),
                deleting: slot.deleting,
            })
        })
    }

    /// The slot of a snapshot that is not being deleted.
    #[must_use]
    pub fn find_snapshot(&self, replica: ReplicaId, id: SnapshotId) -> Option<ReplicaSlot> {
        (0u16..)
            .zip(&self.slots)
            .find(|(_, s)| s.is_snapshot() && s.page.replica == replica && s.page.snapshot == id)
            .map(|(i, _)| ReplicaSlot(i))
    }

    /// Takes a snapshot of a replica: what every request that was answered before has left. Requests
    /// that come while it is taken wait for it.
    pub fn create_snapshot<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        spec: SnapshotSpec,
        mem: &mut M,
    ) {
        self.create_snapshot_in(tag, None, slot, spec, mem);
    }

    /// Takes a snapshot into a slot of the caller's choice, or into the first that is free.
    pub(crate) fn create_snapshot_in<M: Memory>(
        &mut self,
        tag: u64,
        wanted: Option<u16>,
        slot: ReplicaSlot,
        spec: SnapshotSpec,
        mem: &mut M,
    ) {
        let checked = self.check_snapshot(slot, &spec, wanted);
        let (with, layer) = match checked {
            Ok(found) => found,
            Err(error) => return self.refuse_command(tag, error),
        };
        let of = &self.slots[usize::from(slot.0)].page;
        let page = CatalogPage {
            state: CatalogState::Snapshot,
            flags: FLAG_SNAPSHOT,
            snapshot: spec.id,
            name: spec.name,
            created: spec.created,
            whole: of.whole,
            replica: of.replica,
            volume: of.volume,
            blocks: of.blocks,
            block_size: of.block_size,
            layer,
            ..CatalogPage::default()
        };
        self.start_swap(tag, slot.0, with, Some(layer), page, mem);
    }

    pub(crate) fn check_snapshot(
        &self,
        slot: ReplicaSlot,
        spec: &SnapshotSpec,
        wanted: Option<u16>,
    ) -> Result<(u16, u16), ControlError> {
        let layer = self.check_swap(slot)?;
        if spec.name.len() > NAME_MAX {
            return Err(ControlError::NameTooLong { len: spec.name.len(), max: NAME_MAX });
        }
        let of = &self.slots[usize::from(slot.0)];
        if self.find_snapshot(of.page.replica, spec.id).is_some() {
            return Err(ControlError::SnapshotExists(spec.id));
        }
        if self.chain(layer).count() >= MAX_DEPTH {
            return Err(ControlError::TooManySnapshots(MAX_DEPTH));
        }
        let again = u64::from(self.layer(layer).allocated) + u64::from(self.layer(layer).allocs);
        if of.is_thick() && !self.shared && self.unreserved() < again {
            return Err(ControlError::NoRoom { needed: again, free: self.unreserved() });
        }
        Ok((self.free_slot_for_create(wanted)?, layer))
    }

    fn check_swap(&self, slot: ReplicaSlot) -> Result<u16, ControlError> {
        self.check_live(slot)?;
        let of = &self.slots[usize::from(slot.0)];
        if of.frozen {
            return Err(ControlError::SnapshotUnderWay);
        }
        Ok(of.layer)
    }

    /// Takes a replica back to one of its snapshots: all that was written since is given up. The
    /// replica keeps its size.
    pub fn revert<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        snapshot: SnapshotId,
        mem: &mut M,
    ) {
        self.revert_in(tag, None, slot, snapshot, mem);
    }

    /// The replica's layer, the snapshot's, and the slot that takes what is given up.
    pub(crate) fn check_revert(
        &self,
        slot: ReplicaSlot,
        snapshot: SnapshotId,
        wanted: Option<u16>,
    ) -> Result<(u16, u16, u16), ControlError> {
        let layer = self.check_swap(slot)?;
        let of = self.slots[usize::from(slot.0)].page.replica;
        let to = self.find_snapshot(of, snapshot).ok_or(ControlError::NoSuchSnapshot(snapshot))?;
        Ok((layer, self.layer_of(to.0), self.free_slot_for_create(wanted)?))
    }

    /// Takes a replica back to a snapshot; what is given up goes to a slot of the caller's choice.
    pub(crate) fn revert_in<M: Memory>(
        &mut self,
        tag: u64,
        wanted: Option<u16>,
        slot: ReplicaSlot,
        snapshot: SnapshotId,
        mem: &mut M,
    ) {
        let (layer, parent, with) = match self.check_revert(slot, snapshot, wanted) {
            Ok(found) => found,
            Err(error) => return self.refuse_command(tag, error),
        };
        let of = &self.slots[usize::from(slot.0)].page;
        let page = CatalogPage {
            state: CatalogState::Deleting,
            flags: FLAG_SNAPSHOT,
            replica: of.replica,
            volume: of.volume,
            blocks: of.blocks,
            block_size: of.block_size,
            layer,
            ..CatalogPage::default()
        };
        self.layer_mut(parent).children += 1;
        self.start_swap(tag, slot.0, with, Some(parent), page, mem);
    }

    fn start_swap<M: Memory>(
        &mut self,
        tag: u64,
        replica: u16,
        with: u16,
        parent: Option<u16>,
        page: CatalogPage,
        mem: &mut M,
    ) {
        self.slots[usize::from(with)].creating = true;
        self.slots[usize::from(replica)].frozen = true;
        self.swaps.push(Swap { tag, replica, with, parent, page: Some(page) });
        self.count_reserve();
        self.pump(mem);
    }

    /// Begins to write where nothing is in flight any more.
    pub(crate) fn pump_swaps<M: Memory>(&mut self, mem: &mut M) {
        for at in 0..self.swaps.len() {
            let (replica, with) = (self.swaps[at].replica, self.swaps[at].with);
            let slot = &self.slots[usize::from(replica)];
            if slot.in_flight > 0 || self.layer(slot.layer).allocs > 0 || self.has_job(replica) {
                continue;
            }
            let parent = self.layer(slot.layer).parent;
            if let Some(mut page) = self.swaps[at].page.take() {
                page.parent = parent;
                self.capture(self.swaps[at].tag, with, page);
            }
        }
        // Nothing is held any more by a replica that is not frozen.
        while let Some(at) =
            self.held.iter().position(|(_, slot, _)| !self.slots[usize::from(slot.0)].frozen)
        {
            let Some((tag, slot, request)) = self.held.remove(at) else { return };
            self.submit_one(tag, slot, request, mem);
        }
    }

    /// The free slot's page is durable: the replica's is next.
    pub(crate) fn captured(&mut self, with: u16, tag: u64) {
        let found = self.swaps.iter().find(|swap| swap.with == with);
        let swap = found.expect("a slot takes a layer for somebody");
        let (replica, parent) = (swap.replica, swap.parent);
        let layer = self.layer_of(with);
        self.take_layer(tag, replica, layer, parent);
    }

    /// The replica's page is durable: the layers have changed hands.
    pub(crate) fn swapped(&mut self, replica: u16) {
        let at = self.swaps.iter().position(|swap| swap.replica == replica);
        let swap = self.swaps.swap_remove(at.expect("a replica changes its layer on request"));
        let (old, new) = (self.layer_of(replica), self.layer_of(swap.with));
        let slot = &mut self.slots[usize::from(replica)];
        slot.layer = new;
        slot.frozen = false;
        let taker = &mut self.slots[usize::from(swap.with)];
        taker.layer = old;
        taker.creating = false;
        let deleted = taker.page.state == CatalogState::Deleting;
        if deleted {
            taker.deleting = true;
            taker.deletion = Deletion::Extents(0);
            self.deleting += 1;
        }
        self.layer_mut(old).owner = swap.with;
        let top = self.layer_mut(new);
        top.owner = replica;
        top.parent = swap.parent;
        if !deleted {
            self.layer_mut(old).children += 1;
        }
        self.count_reserve();
    }

    /// The pool failed: what was held is answered.
    pub(crate) fn give_up_held(&mut self) {
        let held = core::mem::take(&mut self.held);
        self.done.extend(held.into_iter().map(|(tag, ..)| Done {
            tag,
            status: IoStatus::MediaError,
            error: None,
        }));
    }

    /// Deletes a snapshot. Answered when there is no way back; its space returns after that, less what
    /// the layer on top of it still reads.
    pub fn delete_snapshot<M: Memory>(&mut self, tag: u64, slot: ReplicaSlot, mem: &mut M) {
        match self.slots.get(usize::from(slot.0)) {
            Some(s) if s.is_snapshot() => self.delete_slot(tag, slot.0, mem),
            _ => self.refuse_command(tag, ControlError::NoSuchReplica(slot.0)),
        }
    }
}
