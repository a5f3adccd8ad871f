//! What one layer holds of a logical extent, by itself: how it goes from one device of a pool to another.
//!
//! A host's request sees a replica through its layers; what is done here sees one layer's own extent, of a
//! snapshot too, with what it says of zeros. What moves together arrives together, and is given up
//! together: by the records of one journal block, which a crash leaves all or none of.

use cairn_block::{BufSlice, IoOp, IoStatus, Memory};

use crate::ControlError;
use crate::blocks::BlockSet;
use crate::data::{Action, Part, RequestKind};
use crate::disk::{CatalogState, EXTENT_BLOCKS, RECORDS_PER_BLOCK};
use crate::extents::{ExtentState, NIL};
use crate::journal::Owner;
use crate::member::Import;
use crate::pool::{Mapping, Pool, PoolState, ReplicaSlot};
use crate::sums::Ready;

/// Extents that arrive or are given up together at most: what surely fits in a journal block.
pub(crate) const MAX_TOGETHER: usize = RECORDS_PER_BLOCK - 6;

/// What an extent itself has of its blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owned {
    tag: u64,
    pub(crate) data: BlockSet,
    pub(crate) zeroed: BlockSet,
}

/// What is to be done with a layer's own extent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Raw {
    /// Blocks are read; what the extent does not have itself is zeros. [`Pool::take_owned`] tells what it has.
    Read {
        first: u32,
        blocks: u32,
        buf: BufSlice,
    },
    Write {
        first: u32,
        blocks: u32,
        buf: BufSlice,
    },
    /// Blocks read as zeros, whatever is beneath.
    Zero {
        first: u32,
        blocks: u32,
    },
    /// All that was written to the device is made durable.
    Flush,
}

/// The layers that have something of a logical extent and read through to each other, by slot.
#[derive(Debug, Clone, Default)]
pub(crate) struct Family {
    /// What the others read through to.
    pub(crate) root: u16,
    /// Whose reads may come here, in order: those that have nothing themselves among them.
    pub(crate) readers: Vec<u16>,
}

impl Pool {
    /// Works on a layer's own extent. Who asks sees to it that nobody else changes it meanwhile.
    pub(crate) fn submit_raw<M: Memory>(
        &mut self,
        tag: u64,
        slot: u16,
        logical: u32,
        raw: Raw,
        mem: &mut M,
    ) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        self.sums.told.retain(|owned| owned.tag != tag);
        self.slots[usize::from(slot)].in_flight += 1;
        let start = u64::from(logical) * EXTENT_BLOCKS;
        let (op, first, blocks, buf) = match raw {
            Raw::Read { first, blocks, buf } => (IoOp::Read, first, blocks, buf),
            Raw::Write { first, blocks, buf } => (IoOp::Write { fua: false }, first, blocks, buf),
            Raw::Zero { first, blocks } => {
                let op = IoOp::WriteZeroes { unmap: false, fua: false };
                (op, first, blocks, BufSlice::EMPTY)
            }
            Raw::Flush => (IoOp::Flush, 0, 0, BufSlice::EMPTY),
        };
        let first = start + u64::from(first);
        let range = first..first + u64::from(blocks);
        self.begin(tag, slot, op, range, buf, RequestKind::Raw, mem);
        self.pump(mem);
    }

    /// What the extent has of its blocks that was read last with this tag.
    pub(crate) fn take_owned(&mut self, tag: u64) -> Option<Owned> {
        let told = &mut self.sums.told;
        let at = told.iter().position(|owned| owned.tag == tag)?;
        Some(told.swap_remove(at))
    }

    /// A part of what [`Pool::submit_raw`] put in.
    pub(crate) fn run_raw<M: Memory>(
        &mut self,
        part: Part,
        tag: u64,
        mem: &mut M,
    ) -> Result<u32, IoStatus> {
        let layer = self.layer_of(part.slot);
        Ok(match (self.layer(layer).mapping(part.logical), part.action) {
            (Mapping::Hole, _) => return Err(IoStatus::PathError),
            (Mapping::Pending(alloc), _) => {
                self.wait_for_alloc(alloc, part);
                1
            }
            (Mapping::Extent(extent), Action::Read) => {
                let sum = match self.prepare(extent, false) {
                    Ready::Now(sum) => sum,
                    Ready::Wait(sum) => {
                        self.wait_for_sum(sum, part);
                        return Ok(1);
                    }
                };
                let data = self.valid_in(sum);
                let zeroed = self.owned_by(sum).minus(data);
                self.sums.told.retain(|owned| owned.tag != tag);
                self.sums.told.push(Owned { tag, data, zeroed });
                self.read_extent(part, extent, mem)
            }
            (Mapping::Extent(extent), _) => self.mutate(part, extent, layer, mem),
        })
    }

    /// Allocates an extent that reads as zeros for what a layer has nothing of: an unfinished copy, which the
    /// next open frees unless it has arrived.
    pub(crate) fn import_own<M: Memory>(&mut self, tag: u64, slot: u16, logical: u32, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        if !self.is_there(slot) || self.has_own(slot, logical) {
            let error = ControlError::NoSuchReplica(slot);
            return self.refuse(tag, IoStatus::PathError, error);
        }
        let alloc = self.start_alloc(self.layer_of(slot), logical);
        self.allocs.get_mut(alloc).import = Some(Import { tag, incoming: true });
        self.moves.push(tag);
        self.pump(mem);
    }

    /// The extents of these slots in a logical extent, as far as they have one that is mapped.
    fn own_extents(&self, slots: &[u16], logical: u32) -> Vec<u32> {
        slots
            .iter()
            .filter_map(|&slot| match self.layer(self.layer_of(slot)).mapping(logical) {
                Mapping::Extent(extent) => Some(extent),
                _ => None,
            })
            .collect()
    }

    /// Copies are whole and durable: they are their layers' from now on, all of them.
    pub(crate) fn arrive<M: Memory>(&mut self, tag: u64, slots: &[u16], logical: u32, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        let extents = self.own_extents(slots, logical);
        if extents.len() != slots.len() || extents.is_empty() {
            return self.refuse(tag, IoStatus::PathError, ControlError::NoSuchReplica(slots[0]));
        }
        self.moves.push(tag);
        self.journal.push_together(extents.len());
        for (left, extent) in (0..extents.len()).rev().zip(extents) {
            self.journal.push(Owner::Arrived { extent, tag: (left == 0).then_some(tag) });
        }
        self.pump(mem);
    }

    /// Gives up what these layers have of a logical extent, whatever is above or beneath: all of it or,
    /// after a crash, none.
    pub(crate) fn release_own<M: Memory>(
        &mut self,
        tag: u64,
        slots: &[u16],
        logical: u32,
        mem: &mut M,
    ) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        let extents = self.own_extents(slots, logical);
        let Some(&last) = extents.last() else {
            return self.import_done(tag, IoStatus::Ok);
        };
        self.moves.push(tag);
        self.journal.push_together(extents.len());
        for extent in extents {
            let layer = self.extents.get(extent).layer;
            self.take_out(layer, logical);
            if extent == last {
                self.releases.push((extent, tag));
            }
            self.log_free(extent, NIL);
        }
        self.pump(mem);
    }

    /// The record that an extent is free is durable.
    pub(crate) fn released(&mut self, extent: u32) {
        if let Some(at) = self.releases.iter().position(|&(e, _)| e == extent) {
            let (_, tag) = self.releases.swap_remove(at);
            self.import_done(tag, IoStatus::Ok);
        }
    }

    // ---- what belongs together

    /// Whether a slot's layer counts: a replica's or a snapshot's, one that is being deleted among them.
    pub(crate) fn is_there(&self, slot: u16) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(|s| {
            s.page.state != CatalogState::Free && !s.creating && s.page.layer == s.layer
        })
    }

    /// Whether a slot's own layer has something of a logical extent.
    pub(crate) fn has_own(&self, slot: u16, logical: u32) -> bool {
        let there = self.slots.get(usize::from(slot));
        there.is_some_and(|s| self.layer(s.layer).mapping(logical) != Mapping::Hole)
    }

    /// The logical extent after the last one that a slot's own layer can have.
    pub(crate) fn own_end(&self, slot: u16) -> u32 {
        let len = self.slots.get(usize::from(slot)).map_or(0, |s| self.layer(s.layer).map.len());
        u32::try_from(len).expect("a map has at most 2^31 entries")
    }

    /// Whether nothing writes to a slot any more: it is a snapshot's, or what is left of one.
    pub(crate) fn is_frozen(&self, slot: u16) -> bool {
        self.slots[usize::from(slot)].page.state != CatalogState::Live
    }

    /// Whether a deleted snapshot is kept, or still there, for the layers above it.
    pub(crate) fn is_kept_for_others(&self, slot: u16) -> bool {
        let of = &self.slots[usize::from(slot)];
        self.is_there(slot)
            && of.page.state == CatalogState::Deleting
            && self.layer(of.layer).children > 0
    }

    /// The slot of the layer that a slot's layer reads through to.
    pub(crate) fn parent_slot(&self, slot: u16) -> Option<u16> {
        let slot = self.slots.get(usize::from(slot))?;
        self.layer(slot.layer).parent.map(|parent| self.layer(parent).owner)
    }

    /// Whether no deletion is under way among the layers that read through to each other and that a slot
    /// belongs to. One that waits for layers above it is not.
    pub(crate) fn is_tree_at_rest(&self, slot: u16) -> bool {
        if self.deleting == 0 {
            return true;
        }
        let bottom = |layer| self.chain(layer).last();
        let tree = bottom(self.layer_of(slot));
        let under_way = |s: &&crate::pool::Slot| s.deleting && !s.parked;
        !self.slots.iter().filter(under_way).any(|s| bottom(s.layer) == tree)
    }

    /// What must move together where a slot's layer has something of a logical extent, or one beneath it.
    pub(crate) fn family(&self, slot: u16, logical: u32) -> Option<Family> {
        let own = self.layer_of(slot);
        let there = |layer: &u16| self.layer(*layer).mapping(logical) != Mapping::Hole;
        let root = self.chain(own).filter(there).last()?;
        let mut readers = vec![self.layer(root).owner];
        if self.layer(root).children > 0 {
            let above = |layer: u16| self.layer(layer).parent.is_some();
            let through = |layer: u16| above(layer) && self.chain(layer).skip(1).any(|l| l == root);
            let slots = (0..self.superblock.slots).filter(|&s| self.is_there(s));
            readers.extend(slots.filter(|&s| through(self.layer_of(s))));
            readers.sort_unstable();
        }
        Some(Family { root: self.layer(root).owner, readers })
    }

    /// Allocates an extent of zeros for a logical extent that is mapped nowhere.
    pub(crate) fn import<M: Memory>(&mut self, tag: u64, slot: u16, logical: u32, mem: &mut M) {
        if let PoolState::Failed(reason) = self.state {
            return self.refuse(tag, IoStatus::MediaError, ControlError::PoolFailed(reason));
        }
        if !self.slots[usize::from(slot)].is_live() || self.maps(ReplicaSlot(slot), logical) {
            let error = ControlError::NoSuchReplica(slot);
            return self.refuse(tag, IoStatus::PathError, error);
        }
        let alloc = self.start_alloc(self.layer_of(slot), logical);
        self.allocs.get_mut(alloc).import = Some(Import { tag, incoming: false });
        self.moves.push(tag);
        self.pump(mem);
    }

    pub(crate) fn import_done(&mut self, tag: u64, status: IoStatus) {
        self.moves.retain(|&t| t != tag);
        self.done.push_back(crate::pool::Done { tag, status, error: None });
    }

    /// The record that an extent is no copy any more is durable.
    pub(crate) fn arrived(&mut self, extent: u32, tag: Option<u64>) {
        if self.extents.get(extent).state == ExtentState::Allocated {
            self.extents.incoming.retain(|&i| i != extent);
            self.dirty_page(extent);
        }
        if let Some(tag) = tag {
            self.import_done(tag, IoStatus::Ok);
        }
    }
}
