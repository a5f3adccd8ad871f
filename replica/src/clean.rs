//! Giving extents back: drained, zeroed, flushed, and only then free.

use cairn_block::{ByteOffset, Memory};

use crate::DiskError;
use crate::disk::EXTENT;
use crate::extents::{ExtentState, extent_offset};
use crate::flush::Waiter;
use crate::pool::{Deletion, DiskOp, HOLE, Mapping, Pool, Purpose};

/// Extents that deletions have under way together.
const MAX_DELETING: u32 = 32;

impl Pool {
    /// The record that an extent is free is durable.
    pub(crate) fn free_durable(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        assert_eq!(e.state, ExtentState::Freeing, "an extent is freed that was not being freed");
        self.dirty_page(extent);
        self.clean_when_drained(extent);
    }

    fn clean_when_drained(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        e.state = ExtentState::Cleaning;
        if e.pins == 0 {
            self.to_clean.push_back(extent);
        }
    }

    pub(crate) fn pump_clean(&mut self) {
        while let Some(extent) = self.to_clean.pop_front() {
            let offset = ByteOffset(extent_offset(&self.superblock.segments, extent));
            let op = DiskOp::Zero { offset, len: EXTENT, punch: true };
            self.issue(op, Purpose::CleanZero(extent), None);
        }
    }

    pub(crate) fn clean_zeroed(&mut self, extent: u32, result: Result<(), DiskError>) {
        match result {
            Ok(()) => self.flusher.next.push(Waiter::Clean(extent)),
            // It is free all the same, and is zeroed before it is used.
            Err(_) => self.return_extent(extent, false),
        }
    }

    pub(crate) fn cleaned(&mut self, extent: u32) {
        self.return_extent(extent, true);
    }

    fn return_extent(&mut self, extent: u32, zeroed: bool) {
        assert_eq!(
            self.extents.get(extent).state,
            ExtentState::Cleaning,
            "extent {extent} is given back twice"
        );
        let layer = self.extents.get(extent).layer;
        self.layer_mut(layer).returning -= 1;
        self.extents.returning -= 1;
        self.drop_sum(extent);
        self.extents.put_free(extent, zeroed);
        self.dirty_page(extent);
    }

    /// Takes every deletion as far as it can go.
    pub(crate) fn pump_deletions<M: Memory>(&mut self, mem: &mut M) {
        if self.deleting == 0 {
            return;
        }
        for slot in 0u16..self.superblock.slots {
            let at = &self.slots[usize::from(slot)];
            match at.deletion {
                _ if at.parked => {}
                Deletion::No | Deletion::Page | Deletion::Parent => {}
                Deletion::Extents(from) => match self.layer(at.layer).children {
                    0 => self.delete_extents(slot, from),
                    1 => self.merge_up(slot, mem),
                    _ => self.park(slot),
                },
                Deletion::Checkpoint(n) => {
                    if self.maintenance.completed >= n {
                        self.slots[usize::from(slot)].deletion = Deletion::Page;
                        self.free_slot(slot);
                    }
                }
            }
        }
    }

    /// Sets a deletion aside until something changes.
    pub(crate) fn park(&mut self, slot: u16) {
        let slot = &mut self.slots[usize::from(slot)];
        assert!(slot.deleting && !slot.parked, "a deletion is set aside twice");
        slot.parked = true;
        self.deleting -= 1;
    }

    pub(crate) fn unpark(&mut self, slot: usize) {
        let slot = &mut self.slots[slot];
        if core::mem::take(&mut slot.parked) {
            self.deleting += 1;
            // It may have become one that is simply given back.
            slot.deletion = Deletion::Extents(0);
        }
    }

    /// Gives back the extents of a layer that no other layer reads. The catalog says durably that they
    /// are going, so no record is needed: after a crash the deletion begins again, with what the table
    /// still names.
    fn delete_extents(&mut self, index: u16, from: usize) {
        let layer = self.layer_of(index);
        if self.layer(layer).copies > 0 {
            return;
        }
        let mut at = from;
        while self.extents.returning < MAX_DELETING {
            let Some(&entry) = self.layer(layer).map.get(at) else { break };
            at += 1;
            if entry == HOLE {
                continue;
            }
            let logical = u32::try_from(at - 1).expect("a replica has at most 2^31 extents");
            match self.layer(layer).mapping(logical) {
                Mapping::Hole => {}
                Mapping::Pending(_) => {
                    // It is on its way to being allocated; come back when it is.
                    at -= 1;
                    break;
                }
                Mapping::Extent(extent) => {
                    if self.extents.get(extent).state == ExtentState::Moving {
                        at -= 1;
                        break;
                    }
                    self.unmap(layer, logical);
                    self.dirty_page(extent);
                    self.clean_when_drained(extent);
                }
            }
        }
        self.slots[usize::from(index)].deletion = Deletion::Extents(at);
        let of = self.layer(layer);
        if at < of.map.len() || of.allocs > 0 || of.returning > 0 {
            return;
        }
        assert_eq!(of.allocated, 0, "a layer is deleted that still has extents");
        self.forget_layer(index);
    }

    /// The layer is empty: from here the table must forget it before its number is used again.
    pub(crate) fn forget_layer(&mut self, index: u16) {
        let number = self.maintenance.want();
        let slot = &mut self.slots[usize::from(index)];
        slot.deletion = Deletion::Checkpoint(number);
        let layer = slot.layer;
        self.layer_mut(layer).map = Vec::new();
    }
}
