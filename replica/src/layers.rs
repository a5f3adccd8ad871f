//! Layers: where each logical extent is.
//!
//! A replica writes to a layer of its own. What that does not hold is read from the parent layer, which
//! is a snapshot's and never changes, and so on; what none holds reads as zeros. A snapshot takes the
//! replica's layer and leaves it a new one on top; a clone begins with a new one on top of a
//! snapshot's. Every slot of the catalog has one layer, and they are never shared.

use crate::extents::NIL;
use crate::pool::{HOLE, Mapping, PENDING, Pool, PoolState, Slot};

/// Layers that a read may have to look through. More snapshots in a row are refused.
pub(crate) const MAX_DEPTH: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Layer {
    /// Where each logical extent is. Grows up to the last one that was written.
    pub(crate) map: Vec<u32>,
    pub(crate) allocated: u32,
    /// Extents that were its own and are on their way to a free list.
    pub(crate) returning: u32,
    /// Allocations, and extents on their way here from the parent.
    pub(crate) allocs: u32,
    /// Those of them that have a free extent.
    pub(crate) taken: u32,
    /// Extents on their way to the layer on top.
    pub(crate) leaving: u32,
    /// Copies into it from the parent that are under way.
    pub(crate) copies: u32,
    pub(crate) parent: Option<u16>,
    /// Layers whose parent it is.
    pub(crate) children: u32,
    /// The slot that it belongs to.
    pub(crate) owner: u16,
}

impl Layer {
    pub(crate) fn mapping(&self, logical: u32) -> Mapping {
        match self.map.get(logical as usize).copied().unwrap_or(HOLE) {
            HOLE => Mapping::Hole,
            entry if entry & PENDING != 0 => Mapping::Pending(entry & !PENDING),
            entry => Mapping::Extent(entry),
        }
    }

    /// Extents that it has, or is about to.
    pub(crate) fn extents(&self) -> u64 {
        u64::from(self.allocated) + u64::from(self.taken)
    }

    pub(crate) fn map_to(&mut self, logical: u32, entry: u32) {
        let at = logical as usize;
        if at >= self.map.len() {
            self.map.resize(at + 1, HOLE);
        }
        self.map[at] = entry;
    }
}

impl Pool {
    pub(crate) fn layer(&self, layer: u16) -> &Layer {
        &self.layers[usize::from(layer)]
    }

    pub(crate) fn layer_mut(&mut self, layer: u16) -> &mut Layer {
        &mut self.layers[usize::from(layer)]
    }

    pub(crate) fn layer_of(&self, slot: u16) -> u16 {
        self.slots[usize::from(slot)].layer
    }

    /// A layer and those beneath it, from the top.
    pub(crate) fn chain(&self, layer: u16) -> impl Iterator<Item = u16> {
        core::iter::successors(Some(layer), |&at| self.layer(at).parent)
    }

    /// Whether a layer beneath this one holds something of a logical extent.
    pub(crate) fn covered(&self, layer: u16, logical: u32) -> bool {
        self.chain(layer).skip(1).any(|at| self.layer(at).mapping(logical) != Mapping::Hole)
    }

    /// The first logical extent from which on neither the layer nor those beneath it hold anything.
    pub(crate) fn mapped_len(&self, layer: u16) -> u64 {
        self.chain(layer).map(|at| self.layer(at).map.len() as u64).max().unwrap_or(0)
    }

    /// Takes an extent out of its layer's map. The caller says so in the journal, or the catalog does.
    pub(crate) fn unmap(&mut self, layer: u16, logical: u32) {
        self.take_out(layer, logical);
        self.reserve_again(layer, false);
    }

    /// The same where another device of the pool has it instead.
    pub(crate) fn take_out(&mut self, layer: u16, logical: u32) {
        let at = self.layer_mut(layer);
        at.map_to(logical, HOLE);
        at.allocated -= 1;
        at.returning += 1;
        self.extents.allocated -= 1;
        self.extents.returning += 1;
    }

    /// A child of `layer` is gone. Where the layer was kept only for its children, its deletion goes on.
    pub(crate) fn lose_child(&mut self, layer: u16) {
        let at = self.layer_mut(layer);
        at.children -= 1;
        let owner = usize::from(at.owner);
        self.unpark(owner);
    }

    // ---- thick replicas

    /// Extents that the thick replica that owns a layer may still write, or nothing.
    pub(crate) fn reserved_by(&self, slot: u16) -> u64 {
        let of = &self.slots[usize::from(slot)];
        if !of.is_live() || !of.is_thick() {
            return 0;
        }
        if of.frozen {
            // It is about to begin anew.
            return of.extents();
        }
        of.extents().saturating_sub(self.layer(of.layer).extents())
    }

    pub(crate) fn is_reserving(&self, layer: u16) -> bool {
        let slot = &self.slots[usize::from(self.layer(layer).owner)];
        slot.is_live() && slot.is_thick() && slot.layer == layer
    }

    /// Whether what the layer gets or gives up changes its replica's reserve.
    fn is_counted(&self, layer: u16) -> bool {
        self.is_reserving(layer) && !self.slots[usize::from(self.layer(layer).owner)].frozen
    }

    /// The layer has taken an extent: it needs no reserve any more. `bound` says that it could be nowhere but
    /// here.
    pub(crate) fn use_reserve(&mut self, layer: u16, bound: bool) {
        if !self.is_counted(layer) {
            return;
        }
        if bound && self.bound > 0 {
            self.bound -= 1;
            self.reserved -= 1;
        } else if self.reserved > self.bound {
            // Otherwise the reserve for it lies on another device.
            self.reserved -= 1;
        }
    }

    /// The layer has given an extent back.
    pub(crate) fn reserve_again(&mut self, layer: u16, bound: bool) {
        if self.is_counted(layer) {
            self.reserved += 1;
            self.bound += u64::from(bound && self.shared);
        }
    }

    /// Counts the reserve and what is promised anew, after a command that changes which replicas there are,
    /// how large, or which are thick.
    pub(crate) fn count_reserve(&mut self) {
        self.provisioned = self.slots.iter().filter(|s| s.is_promised()).map(Slot::extents).sum();
        if !self.shared {
            self.reserved = self.wanted_reserve();
            self.bound = 0;
        }
    }

    /// What the thick replicas are to have, those among them that are on their way.
    pub(crate) fn wanted_reserve(&self) -> u64 {
        let there: u64 = (0..self.superblock.slots).map(|slot| self.reserved_by(slot)).sum();
        there + self.reserve_to_come()
    }

    /// Extents that a thick replica may still write where a layer beneath its own has one here: they can be
    /// nowhere else.
    pub(crate) fn bound_by(&self, slot: u16) -> u64 {
        let of = &self.slots[usize::from(slot)];
        if !of.is_live() || !of.is_thick() || self.state != PoolState::Online {
            return 0;
        }
        self.bound_above(self.layer(of.layer).parent, of.layer)
    }

    /// Logical extents that the layers from `top` on hold, and that `own` does not.
    fn bound_above(&self, top: Option<u16>, own: u16) -> u64 {
        let Some(top) = top else { return 0 };
        let own = self.layer(own);
        let end = self.mapped_end_of(top);
        let there = |l: &u32| self.chain(top).any(|at| self.layer(at).mapping(*l) != Mapping::Hole);
        let lacks = |l: &u32| match own.mapping(*l) {
            Mapping::Hole => true,
            Mapping::Pending(alloc) => !self.allocs.get(alloc).has_taken(),
            Mapping::Extent(_) => false,
        };
        (0..end).filter(lacks).filter(there).count() as u64
    }

    /// What a clone of a snapshot would have here beneath it.
    pub(crate) fn bound_on_top_of(&self, snapshot: u16) -> u64 {
        let top = self.layer_of(snapshot);
        let end = self.mapped_end_of(top);
        let there = |l: &u32| self.chain(top).any(|at| self.layer(at).mapping(*l) != Mapping::Hole);
        (0..end).filter(there).count() as u64
    }

    fn mapped_end_of(&self, layer: u16) -> u32 {
        u32::try_from(self.mapped_len(layer)).expect("a map has at most 2^31 entries")
    }

    /// Whether the layer may take a free extent: the last ones are kept for thick replicas, and of those some
    /// for what cannot be on another device.
    pub(crate) fn may_allocate(&self, layer: u16, bound: bool) -> bool {
        let free = u64::from(self.extents.free());
        match (self.is_reserving(layer), bound) {
            (false, _) => free > self.reserved,
            (true, false) => free > self.bound,
            (true, true) => free > 0,
        }
    }

    /// Free extents that an extent of a slot that may be on any device may have.
    pub(crate) fn extents_for(&self, slot: u16) -> u64 {
        let of = &self.slots[usize::from(slot)];
        let kept = if of.is_live() && of.is_thick() { self.bound } else { self.reserved };
        u64::from(self.extents.free()).saturating_sub(kept)
    }

    /// Extents that nobody holds and that are reserved for nobody.
    pub(crate) fn unreserved(&self) -> u64 {
        u64::from(self.extents.free() + self.extents.returning).saturating_sub(self.reserved)
    }
}

const _: () = assert!(NIL == HOLE);
