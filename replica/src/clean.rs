//! Giving extents back: drained, zeroed, flushed, and only then free.

use cairn_block::ByteOffset;

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
        let slot = self.extents.get(extent).slot;
        self.slots[usize::from(slot)].returning -= 1;
        self.extents.returning -= 1;
        self.drop_sum(extent);
        self.extents.put_free(extent, zeroed);
        self.dirty_page(extent);
    }

    /// Takes every deletion as far as it can go.
    pub(crate) fn pump_deletions(&mut self) {
        if self.deleting == 0 {
            return;
        }
        for slot in 0u16..self.superblock.slots {
            match self.slots[usize::from(slot)].deletion {
                Deletion::No | Deletion::Page => {}
                Deletion::Extents(from) => self.delete_extents(slot, from),
                Deletion::Checkpoint(n) => {
                    if self.maintenance.completed >= n {
                        self.slots[usize::from(slot)].deletion = Deletion::Page;
                        self.free_slot(slot);
                    }
                }
            }
        }
    }

    /// Gives back a replica's extents. The catalog says durably that they are going, so no record is
    /// needed: after a crash the deletion begins again, with what the table still names.
    fn delete_extents(&mut self, index: u16, from: usize) {
        let mut at = from;
        while self.extents.returning < MAX_DELETING {
            let slot = &mut self.slots[usize::from(index)];
            let Some(&entry) = slot.map.get(at) else { break };
            at += 1;
            if entry == HOLE {
                continue;
            }
            let logical = u32::try_from(at - 1).expect("a replica has at most 2^31 extents");
            match slot.mapping(logical) {
                Mapping::Hole => {}
                Mapping::Pending(_) => {
                    // It is on its way to being allocated; come back when it is.
                    at -= 1;
                    break;
                }
                Mapping::Extent(extent) => {
                    slot.map[at - 1] = HOLE;
                    slot.allocated -= 1;
                    slot.returning += 1;
                    self.extents.allocated -= 1;
                    self.extents.returning += 1;
                    self.dirty_page(extent);
                    self.clean_when_drained(extent);
                }
            }
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.deletion = Deletion::Extents(at);
        if at < slot.map.len() || slot.allocs > 0 || slot.returning > 0 {
            return;
        }
        assert_eq!(slot.allocated, 0, "a replica is deleted that still has extents");
        // From here the table must forget the slot before the slot is used again.
        slot.deletion = Deletion::Checkpoint(self.maintenance.want());
        slot.map = Vec::new();
    }
}
