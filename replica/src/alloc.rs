//! First writes: an extent is found, zeroed where it must be, and logged before any data goes to it.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{ByteOffset, IoStatus, Memory};

use crate::DiskError;
use crate::disk::EXTENT;
use crate::extents::{ExtentState, NIL, extent_offset};
use crate::flush::Waiter;
use crate::journal::Owner;
use crate::member::Import;
use crate::pool::{DiskOp, HOLE, Pool, Purpose};

/// An allocation under way.
#[derive(Debug)]
pub(crate) struct Alloc {
    pub(crate) layer: u16,
    pub(crate) logical: u32,
    /// The extent, or [`NIL`] until there is one.
    pub(crate) extent: u32,
    /// The layer that it comes from, where it is not a free one.
    pub(crate) from: Option<u16>,
    /// The parts that wait for it.
    pub(crate) first: u32,
    pub(crate) last: u32,
    /// What it wants can be nowhere but here.
    pub(crate) bound: bool,
    /// It was asked for by itself, not by a write.
    pub(crate) import: Option<Import>,
}

impl Alloc {
    /// Whether it is for a copy of what another device holds, and has its reserve there.
    fn is_copy(&self) -> bool {
        self.import.is_some_and(|import| import.incoming)
    }

    /// Whether it has a free extent, and its replica needs no reserve for it any more.
    pub(crate) fn has_taken(&self) -> bool {
        self.extent != NIL && self.from.is_none() && !self.is_copy()
    }
}

impl Pool {
    pub(crate) fn start_alloc(&mut self, layer: u16, logical: u32) -> u32 {
        let id = self.new_alloc(layer, logical, NIL, None);
        self.need_extent.push_back(id);
        id
    }

    fn new_alloc(&mut self, layer: u16, logical: u32, extent: u32, from: Option<u16>) -> u32 {
        let alloc = Alloc {
            layer,
            logical,
            extent,
            from,
            first: NIL,
            last: NIL,
            bound: false,
            import: None,
        };
        let id = self.allocs.insert(alloc);
        self.map_pending(layer, logical, id);
        self.layer_mut(layer).allocs += 1;
        id
    }

    /// Hands an extent from one layer to the one on top of it, which has nothing there.
    pub(crate) fn start_move(&mut self, from: u16, to: u16, logical: u32, extent: u32) {
        let e = self.extents.get_mut(extent);
        assert_eq!(e.state, ExtentState::Allocated, "an extent is moved that is not there");
        e.state = ExtentState::Moving;
        self.layer_mut(from).leaving += 1;
        let id = self.new_alloc(to, logical, extent, Some(from));
        self.journal.push(Owner::Alloc(id));
    }

    /// Hands free extents to the allocations that wait for one.
    pub(crate) fn pump_allocs<M: Memory>(&mut self, mem: &mut M) {
        while let Some(&id) = self.need_extent.front() {
            let alloc = self.allocs.get(id);
            let bound = self.covered(alloc.layer, alloc.logical);
            let may = if alloc.is_copy() {
                u64::from(self.extents.free()) > self.reserved
            } else {
                self.may_allocate(alloc.layer, bound)
            };
            let taken = if may { self.extents.take_free() } else { None };
            let Some((extent, zeroed)) = taken else {
                if self.extents_are_returning() {
                    return;
                }
                self.need_extent.pop_front();
                self.abandon_alloc(id, IoStatus::NoSpace, mem);
                continue;
            };
            self.need_extent.pop_front();
            let alloc = self.allocs.get_mut(id);
            (alloc.extent, alloc.bound) = (extent, bound);
            let (layer, taken) = (alloc.layer, alloc.has_taken());
            if taken {
                self.layer_mut(layer).taken += 1;
                self.use_reserve(layer, bound);
            }
            if zeroed || on(Mutant::StaleExtent) {
                self.log_alloc(id);
            } else {
                let offset = ByteOffset(extent_offset(&self.superblock.segments, extent));
                let op = DiskOp::Zero { offset, len: EXTENT, punch: false };
                self.issue(op, Purpose::AllocZero(id), None);
            }
        }
    }

    /// Whether waiting will bring an extent.
    pub(crate) fn extents_are_returning(&self) -> bool {
        self.extents.returning > 0
            || self.merges.len() > 0
            || (self.deleting > 0 && {
                // One that is read from above gives back only what is being merged: it may itself wait
                // for an allocation above it.
                let gives = |s: &crate::pool::Slot| {
                    let layer = self.layer(s.layer);
                    s.deleting && layer.children == 0 && layer.allocated > 0
                };
                self.slots.iter().any(gives)
            })
    }

    pub(crate) fn alloc_zeroed<M: Memory>(
        &mut self,
        id: u32,
        result: Result<(), DiskError>,
        mem: &mut M,
    ) {
        let extent = self.allocs.get(id).extent;
        match result {
            Ok(()) => self.flusher.next.push(Waiter::Alloc(id)),
            Err(DiskError::NoSpace) => {
                self.extents.put_free(extent, false);
                self.abandon_alloc(id, IoStatus::NoSpace, mem);
            }
            Err(DiskError::Io) => {
                // Not on the free list: the next write would meet the same bad spot.
                self.extents.get_mut(extent).state = ExtentState::Quarantined;
                self.abandon_alloc(id, IoStatus::MediaError, mem);
            }
        }
    }

    /// The extent reads as zeros durably: log that it is taken.
    pub(crate) fn log_alloc(&mut self, id: u32) {
        self.journal.push(Owner::Alloc(id));
    }

    fn abandon_alloc<M: Memory>(&mut self, id: u32, status: IoStatus, mem: &mut M) {
        let alloc = self.allocs.remove(id);
        if alloc.has_taken() {
            self.layer_mut(alloc.layer).taken -= 1;
            self.reserve_again(alloc.layer, alloc.bound);
        }
        let layer = self.layer_mut(alloc.layer);
        layer.map_to(alloc.logical, HOLE);
        layer.allocs -= 1;
        if let Some(import) = alloc.import {
            self.import_done(import.tag, status);
        }
        self.fail_waiting(alloc.first, status, mem);
    }

    /// Gives up the allocations of a replica that is being deleted and that have no extent yet.
    pub(crate) fn abandon_waiting_allocs<M: Memory>(&mut self, layer: u16, mem: &mut M) {
        for _ in 0..self.need_extent.len() {
            let Some(id) = self.need_extent.pop_front() else { return };
            if self.allocs.get(id).layer == layer {
                self.abandon_alloc(id, IoStatus::PathError, mem);
            } else {
                self.need_extent.push_back(id);
            }
        }
    }

    /// The record is durable: the extent is the replica's, and what waited may be written.
    pub(crate) fn alloc_durable<M: Memory>(&mut self, id: u32, mem: &mut M) {
        let alloc = self.allocs.remove(id);
        let birth = self.journal.head - 1;
        let e = self.extents.get_mut(alloc.extent);
        e.layer = alloc.layer;
        if let Some(from) = alloc.from {
            assert_eq!(e.state, ExtentState::Moving, "an extent arrives that was not sent");
            e.state = ExtentState::Allocated;
            let from = self.layer_mut(from);
            from.map_to(alloc.logical, HOLE);
            from.allocated -= 1;
            from.leaving -= 1;
        } else {
            assert_eq!(e.state, ExtentState::Taken, "an extent is allocated that was not taken");
            e.state = ExtentState::Allocated;
            e.link = alloc.logical;
            e.birth = birth;
            self.extents.allocated += 1;
            self.sum_allocated(alloc.extent);
            self.note_open(alloc.extent);
        }
        self.dirty_page(alloc.extent);
        let taken = u32::from(alloc.has_taken());
        let layer = self.layer_mut(alloc.layer);
        layer.map_to(alloc.logical, alloc.extent);
        layer.allocs -= 1;
        layer.taken -= taken;
        layer.allocated += 1;
        if alloc.from.is_some() {
            self.use_reserve(alloc.layer, true);
        }
        if let Some(import) = alloc.import {
            if import.incoming {
                self.extents.incoming.push(alloc.extent);
            }
            self.import_done(import.tag, IoStatus::Ok);
        }
        self.run_waiting(alloc.first, mem);
    }
}
