//! What a pool is asked for where it is one device of several: see [`crate::MultiPool`].

use cairn_block::PoolDeviceId;

use crate::disk::{BLOCK, BLOCK_LEN, CatalogPage, CatalogState, Membership};
use crate::extents::ExtentState;
use crate::pool::{Deletion, Mapping, Pool, ReplicaSlot};
use crate::{Device, PoolError};

/// An allocation that is asked for by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Import {
    pub(crate) tag: u64,
    /// The extent is to be a copy: it is its layer's only once [`Pool::arrive`] says so.
    pub(crate) incoming: bool,
}

impl Pool {
    /// Whether this device holds a logical extent of a replica, or is about to: the replica's layer or
    /// one beneath it has an extent for it, or an allocation under way, or one whose release is not
    /// durable yet. Where it does, no other device of the pool may get one.
    #[must_use]
    pub fn maps(&self, slot: ReplicaSlot, logical: u32) -> bool {
        let Some(slot) = self.slots.get(usize::from(slot.0)) else { return false };
        let there = |layer| self.layer(layer).mapping(logical) != Mapping::Hole;
        self.chain(slot.layer).any(there)
            || self.journal.freeing().any(|extent| {
                let e = self.extents.get(extent);
                e.link == logical && self.chain(slot.layer).any(|layer| layer == e.layer)
            })
    }

    /// The logical extent after the last one that a replica can have here.
    pub(crate) fn mapped_end(&self, slot: u16) -> u32 {
        let len = self.slots.get(usize::from(slot)).map_or(0, |slot| self.mapped_len(slot.layer));
        u32::try_from(len).expect("a map has at most 2^31 entries")
    }

    /// The pool failed: what was being freed may still be mapped on stable storage, so no other device
    /// may take its place.
    pub(crate) fn map_unfreed(&mut self) {
        let layers = &mut self.layers;
        for (index, extent) in self.extents.iter().filter(|(_, e)| e.state == ExtentState::Freeing)
        {
            layers[usize::from(extent.layer)].map_to(extent.link, index);
        }
    }

    /// Extents of a replica on this device, those on their way among them, without its snapshots'.
    pub(crate) fn extents_in(&self, slot: u16) -> u64 {
        self.slots.get(usize::from(slot)).map_or(0, |slot| {
            let layer = self.layer(slot.layer);
            u64::from(layer.allocated) + u64::from(layer.allocs)
        })
    }

    /// A thick replica's size in extents, and how many of them it has here, or is about to.
    pub(crate) fn thick(&self, slot: u16) -> Option<(u64, u64)> {
        let of = self.slots.get(usize::from(slot)).filter(|s| s.is_live() && s.is_thick())?;
        Some((of.extents(), self.layer(of.layer).extents()))
    }

    /// What is to be kept free here for thick replicas: as one device of several.
    pub(crate) fn keep_free(&mut self, bound: u64, more: u64) {
        self.shared = true;
        self.bound = bound;
        self.reserved = bound + more;
    }

    /// It is the only device, and keeps free itself what is to be.
    pub(crate) fn keep_alone(&mut self) {
        self.shared = false;
        self.count_reserve();
    }

    /// A thick replica's extent came here from another device, where it could be written over: from here on
    /// that is so here.
    pub(crate) fn bind_reserve(&mut self) {
        self.reserved += u64::from(self.reserved == self.bound);
        self.bound += 1;
    }

    /// What it could be written over has gone to another device.
    pub(crate) fn unbind_reserve(&mut self) {
        if self.bound > 0 {
            self.bound -= 1;
            self.reserved -= 1;
        }
    }

    /// So much of what is kept here need not be.
    pub(crate) fn loosen_reserve(&mut self, extents: u64) {
        self.bound = self.bound.saturating_sub(extents);
    }

    /// Free extents that are kept for nobody.
    pub(crate) fn extents_unreserved(&self) -> u64 {
        u64::from(self.extents.free()).saturating_sub(self.reserved)
    }

    /// What is kept free here, and could be on another device.
    pub(crate) fn loose(&self) -> u64 {
        self.reserved - self.bound
    }

    /// One extent of what is kept here, and could be on another device, is kept here or there from now on.
    pub(crate) fn move_loose(&mut self, here: bool) {
        if here {
            self.reserved += 1;
        } else {
            self.reserved -= 1;
        }
    }

    /// Free extents, and those that are about to be.
    pub(crate) fn extents_available(&self) -> u64 {
        u64::from(self.extents.free()) + u64::from(self.extents.returning)
    }

    /// Whether a slot holds a replica or a snapshot that is not being deleted.
    pub(crate) fn is_used(&self, slot: u16) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(|s| s.is_live() || s.is_snapshot())
    }

    /// The size in blocks of a snapshot.
    pub(crate) fn snapshot_blocks(&self, slot: u16) -> Option<u64> {
        self.slots.get(usize::from(slot)).filter(|s| s.is_snapshot()).map(|s| s.page.blocks)
    }

    /// Extents that have to leave before the device can.
    pub(crate) fn extents_left(&self) -> u64 {
        u64::from(self.extents.allocated) + self.allocs.len() as u64
    }

    pub(crate) fn slot_count(&self) -> u16 {
        self.superblock.slots
    }

    pub(crate) fn is_slot_free(&self, slot: u16) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(crate::pool::Slot::is_free)
    }

    /// The size in blocks of a live replica.
    pub(crate) fn live_blocks(&self, slot: u16) -> Option<u64> {
        self.slots.get(usize::from(slot)).filter(|s| s.is_live()).map(|s| s.page.blocks)
    }

    pub(crate) fn page(&self, slot: u16) -> &CatalogPage {
        &self.slots[usize::from(slot)].page
    }

    /// Operations at the device.
    pub(crate) fn at_device(&self) -> usize {
        self.issued.len() - self.out.len()
    }

    /// Which device this is.
    #[must_use]
    pub fn device_id(&self) -> PoolDeviceId {
        self.superblock.device
    }

    /// The devices of the pool, as this one knows them.
    #[must_use]
    pub fn membership(&self) -> &Membership {
        &self.superblock.membership
    }

    // ---- at open

    /// Replaces a catalog page, durably, before the pool serves.
    pub(crate) fn rewrite_page<D: Device>(
        &mut self,
        dev: &mut D,
        index: u16,
        mut page: CatalogPage,
    ) -> Result<(), PoolError> {
        let slot = &mut self.slots[usize::from(index)];
        page.sequence = slot.page.sequence + 1;
        let mut block = vec![0; BLOCK_LEN];
        for copy in [1 - slot.durable_copy, slot.durable_copy] {
            let address = self.superblock.catalog_address(index, copy);
            page.encode(index, address, self.superblock.pool, &mut block);
            dev.write_at(address * BLOCK, &block)?;
            dev.flush()?;
        }
        slot.register = crate::control::register_of(&page);
        if page.state == CatalogState::Deleting && !slot.deleting {
            slot.deleting = true;
            slot.deletion = Deletion::Extents(0);
            self.deleting += 1;
        }
        slot.page = page;
        self.count_reserve();
        Ok(())
    }

    /// Has a slot's layer read through to another slot's, durably, before the pool serves.
    pub(crate) fn put_on_top_of<D: Device>(
        &mut self,
        dev: &mut D,
        index: u16,
        parent: u16,
    ) -> Result<(), PoolError> {
        let (layer, beneath) = (self.layer_of(index), self.layer_of(parent));
        if self.layer(layer).parent.is_some() || self.chain(beneath).any(|at| at == layer) {
            return Ok(());
        }
        let page = CatalogPage { parent: Some(beneath), ..self.page(index).clone() };
        self.rewrite_page(dev, index, page)?;
        self.layer_mut(layer).parent = Some(beneath);
        self.layer_mut(beneath).children += 1;
        Ok(())
    }

    /// Replaces the list of devices, durably, before the pool serves.
    pub(crate) fn rewrite_membership<D: Device>(
        &mut self,
        dev: &mut D,
        membership: &Membership,
    ) -> Result<(), PoolError> {
        self.superblock.membership.clone_from(membership);
        self.superblock.sequence += 1;
        let mut block = vec![0; BLOCK_LEN];
        for address in [1 - self.superblock_copy, self.superblock_copy, self.superblock.backup()] {
            self.superblock.encode(address, &mut block);
            dev.write_at(address * BLOCK, &block)?;
            dev.flush()?;
        }
        Ok(())
    }
}
