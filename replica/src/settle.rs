//! Which extents were written and not settled since: the marks that tell what replicas may differ in.
//!
//! An extent is *open* on stable storage before its first change, by the record of its allocation, of its
//! dirty mark, or one of its own. It stays so until whoever keeps the replicas alike says that all of them
//! have what was written: what was open when a round began, and was not changed since, is closed and stamped
//! by its end. Steady overwrites of an open extent log nothing. Where nobody settles, extents stay open.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{IoStatus, Memory};

use crate::extents::{ExtentState, NIL, Opened};
use crate::journal::Owner;
use crate::pool::{Done, HOLE, PENDING, Pool, PoolState, ReplicaSlot};

/// Records of settling extents on their way: fewer than fit in a journal block, so that others have room.
const MAX_CLOSING: u32 = 64;

/// What a byte of [`Pool::changes`] says of a logical extent.
pub mod change {
    /// Something is there: else it reads as zeros.
    pub const MAPPED: u8 = 1;
    /// It was changed, and not settled since.
    pub const OPEN: u8 = 2;
    /// It was settled with the stamp that was asked for, or a later one.
    pub const SINCE: u8 = 4;
    /// It cannot be read, nor can a part of it be written: a device that is gone had it, or may have had it.
    pub const LOST: u8 = 8;
}

/// How a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundEnd {
    /// Which round.
    pub round: u64,
    /// What its extents are stamped with.
    pub stamp: u64,
    /// Only logical extents below this one are settled.
    pub below: u32,
}

/// The end of a round under way.
#[derive(Debug)]
struct Settling {
    id: u32,
    tag: u64,
    slot: u16,
    stamp: u64,
    /// Candidates that no record was made for.
    todo: Vec<u32>,
    /// Records that are not durable.
    in_flight: u32,
}

#[derive(Debug)]
pub(crate) struct Settle {
    /// Every extent that is open, and some that no longer are: those are struck off when a round begins.
    open: Vec<u32>,
    running: Vec<Settling>,
    next: u32,
    /// Records of all of them that are not durable.
    in_flight: u32,
}

impl Settle {
    pub(crate) fn new() -> Self {
        Self { open: Vec::with_capacity(1024), running: Vec::new(), next: 0, in_flight: 0 }
    }

    /// Ends of rounds that are not answered.
    pub(crate) fn commands(&self) -> usize {
        self.running.len()
    }

    /// The pool failed. Returns the tags of what is not answered.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        self.in_flight = 0;
        core::mem::take(&mut self.running).iter().map(|settling| settling.tag).collect()
    }
}

impl Pool {
    /// Begins a round: what is open of the replica now and is not changed before the round's end is to be
    /// settled by it. A round that has begun before is given up.
    ///
    /// # Errors
    /// [`IoStatus::PathError`] where there is no such replica, [`IoStatus::MediaError`] where the pool failed.
    pub fn settle_begin(&mut self, slot: ReplicaSlot, round: u64) -> Result<(), IoStatus> {
        self.check_settle(slot)?;
        for settling in &mut self.settle.running {
            // What became a candidate anew is not what that round was about.
            if settling.slot == slot.0 {
                settling.todo.clear();
            }
        }
        self.slots[usize::from(slot.0)].round = Some(round);
        let mut open = core::mem::take(&mut self.settle.open);
        open.retain(|&extent| {
            let own = self.is_of(extent, slot.0);
            let e = self.extents.get_mut(extent);
            match e.opened {
                Opened::Closed => e.listed = false,
                Opened::Fresh if own => e.opened = Opened::Candidate,
                _ => {}
            }
            e.listed
        });
        self.settle.open = open;
        Ok(())
    }

    /// Ends a round: what is still as it was when it began is closed, and stamped. Everything that was written
    /// to it is on stable storage, here and on every other replica that counts. Answers `tag` once that is
    /// durable. A round that is not the one begun last settles nothing.
    pub fn settle_end<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        end: RoundEnd,
        mem: &mut M,
    ) {
        let RoundEnd { round, stamp, below } = end;
        if let Err(status) = self.check_settle(slot) {
            self.done.push_back(Done { tag, status, error: None });
            return;
        }
        let known = &mut self.slots[usize::from(slot.0)].round;
        let mut todo = Vec::new();
        if known.take_if(|known| *known == round).is_some() {
            let candidate = |extent: &u32| self.extents.get(*extent).opened == Opened::Candidate;
            let own = |extent: &u32| {
                self.is_of(*extent, slot.0) && self.extents.get(*extent).link < below
            };
            todo.extend(self.settle.open.iter().copied().filter(candidate).filter(own));
        }
        self.settle.next = self.settle.next.wrapping_add(1);
        let id = self.settle.next;
        self.settle.running.push(Settling { id, tag, slot: slot.0, stamp, todo, in_flight: 0 });
        self.pump(mem);
    }

    /// Tells of each logical extent from `first` on, in a byte each, whether something is there, whether it is
    /// open, and whether it was settled with a stamp of `since` or later: the bits of [`change`]. Where `since`
    /// is 0, all that is there counts. Returns how many extents of the replica that are; the rest of `out` is
    /// zeros. None where the pool has no such replica, or failed.
    #[must_use]
    pub fn changes(
        &self,
        slot: ReplicaSlot,
        first: u32,
        since: u64,
        out: &mut [u8],
    ) -> Option<usize> {
        out.fill(0);
        self.add_changes(slot, first, since, out)
    }

    /// The same, added to what other devices of the pool said.
    pub(crate) fn add_changes(
        &self,
        slot: ReplicaSlot,
        first: u32,
        since: u64,
        out: &mut [u8],
    ) -> Option<usize> {
        self.check_settle(slot).ok()?;
        let of = &self.slots[usize::from(slot.0)];
        let left = of.extents().saturating_sub(u64::from(first));
        let len = usize::try_from(left).map_or(out.len(), |left| left.min(out.len()));
        let there = if since == 0 { change::MAPPED | change::SINCE } else { change::MAPPED };
        for layer in self.chain(of.layer) {
            let owner = &self.slots[usize::from(self.layer(layer).owner)];
            let own = owner.page.replica == of.page.replica;
            let at = self.layer(layer);
            let map = at.map.get(first as usize..).unwrap_or_default();
            for (&entry, byte) in map.iter().zip(&mut out[..len]) {
                if entry == HOLE {
                    continue;
                }
                *byte |= there;
                if !own {
                    continue;
                }
                let extent = if entry & PENDING == 0 {
                    entry
                } else {
                    *byte |= change::OPEN;
                    match self.allocs.get(entry & !PENDING) {
                        alloc if alloc.from.is_some() => alloc.extent,
                        _ => NIL,
                    }
                };
                if extent != NIL {
                    let e = self.extents.get(extent);
                    *byte |= if e.opened == Opened::Closed { 0 } else { change::OPEN };
                    *byte |= if e.stamp >= since { change::SINCE } else { 0 };
                }
            }
        }
        Some(len)
    }

    /// Extents that are open.
    #[must_use]
    pub fn open_extents(&self) -> u64 {
        let open = |e: &&u32| self.extents.get(**e).opened.is_durable();
        self.settle.open.iter().filter(open).count() as u64
    }

    fn check_settle(&self, slot: ReplicaSlot) -> Result<(), IoStatus> {
        if self.state != PoolState::Online {
            return Err(IoStatus::MediaError);
        }
        let slot = self.slots.get(usize::from(slot.0));
        slot.filter(|slot| slot.is_live()).map(|_| ()).ok_or(IoStatus::PathError)
    }

    /// Whether an extent is in a layer of the replica's own history: the live one, or a snapshot's.
    fn is_of(&self, extent: u32, slot: u16) -> bool {
        let e = self.extents.get(extent);
        if !matches!(e.state, ExtentState::Allocated | ExtentState::Moving) {
            return false;
        }
        let owner = &self.slots[usize::from(self.layer(e.layer).owner)];
        owner.page.replica == self.slots[usize::from(slot)].page.replica
    }

    // ---- opening

    /// Takes note of the extents that were found open.
    pub(crate) fn list_open(&mut self) {
        let open = self.extents.iter().filter(|(_, e)| e.opened.is_durable()).map(|(i, _)| i);
        self.settle.open = open.collect();
        for &extent in &self.settle.open {
            self.extents.get_mut(extent).listed = true;
        }
    }

    /// An extent is open on stable storage.
    pub(crate) fn note_open(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        if matches!(e.opened, Opened::Closed | Opened::Opening) {
            e.opened = Opened::Fresh;
        }
        if !e.listed {
            e.listed = true;
            self.settle.open.push(extent);
        }
    }

    /// Whether a dirty extent may be changed now: it is open, and no candidate from here on. Otherwise what is
    /// missing is begun, and whoever waits for the extent's checksums goes on when it is there.
    pub(crate) fn open_for_change(&mut self, extent: u32) -> bool {
        let e = self.extents.get_mut(extent);
        match e.opened {
            Opened::Fresh => true,
            Opened::Candidate => {
                if !on(Mutant::CandidateStays) {
                    e.opened = Opened::Fresh;
                }
                true
            }
            Opened::Closed if on(Mutant::NoOpenMark) => true,
            Opened::Closed => {
                e.opened = Opened::Opening;
                e.pins += 1;
                self.journal.push(Owner::Open(extent));
                false
            }
            Opened::Opening | Opened::Closing => false,
        }
    }

    /// A record that marks an extent dirty is on its way, and opens it too.
    pub(crate) fn open_with_mark(&mut self, extent: u32) {
        let e = self.extents.get_mut(extent);
        match e.opened {
            Opened::Closed => e.opened = Opened::Opening,
            Opened::Candidate => e.opened = Opened::Fresh,
            Opened::Opening | Opened::Fresh | Opened::Closing => {}
        }
    }

    /// The record that an extent is open is durable.
    pub(crate) fn open_durable<M: Memory>(&mut self, extent: u32, mem: &mut M) {
        self.note_open(extent);
        self.dirty_page(extent);
        self.unpin(extent);
        self.run_sum_waiters(extent, mem);
    }

    // ---- closing

    /// Logs the closing of more candidates, and answers the rounds that have no more.
    pub(crate) fn pump_settle(&mut self) {
        let mut at = 0;
        while at < self.settle.running.len() {
            while self.settle.in_flight < MAX_CLOSING
                && let Some(extent) = self.settle.running[at].todo.pop()
            {
                self.close(extent, at);
            }
            let (before, rest) = self.settle.running.split_at(at);
            let settling = &rest[0];
            // What an earlier round closes is closed when a later one is answered.
            let first = before.iter().all(|earlier| earlier.slot != settling.slot);
            if first && settling.todo.is_empty() && settling.in_flight == 0 {
                let Settling { tag, .. } = self.settle.running.remove(at);
                self.done.push_back(Done { tag, status: IoStatus::Ok, error: None });
            } else {
                at += 1;
            }
        }
    }

    fn close(&mut self, extent: u32, at: usize) {
        let state = self.extents.get(extent).state;
        let there = matches!(state, ExtentState::Allocated | ExtentState::Moving);
        // What is being written now is settled by a later round.
        if !there || self.has_writers(extent) {
            return;
        }
        let e = self.extents.get_mut(extent);
        if e.opened != Opened::Candidate {
            return;
        }
        e.opened = Opened::Closing;
        e.pins += 1;
        let settling = &mut self.settle.running[at];
        settling.in_flight += 1;
        let (id, stamp) = (settling.id, settling.stamp);
        self.settle.in_flight += 1;
        self.journal.push(Owner::Settle { extent, settling: id, stamp });
    }

    /// The record that an extent is closed is durable.
    pub(crate) fn settle_durable<M: Memory>(
        &mut self,
        extent: u32,
        settling: u32,
        stamp: u64,
        mem: &mut M,
    ) {
        let e = self.extents.get_mut(extent);
        assert_eq!(
            e.opened,
            Opened::Closing,
            "extent {extent} is closed that was not being closed"
        );
        e.opened = Opened::Closed;
        e.stamp = stamp;
        self.settle.in_flight -= 1;
        let of = self.settle.running.iter_mut().find(|of| of.id == settling);
        of.expect("a round is answered after its records").in_flight -= 1;
        self.dirty_page(extent);
        self.unpin(extent);
        // A write that came meanwhile opens it again.
        self.run_sum_waiters(extent, mem);
    }

    /// Asserts that the list of open extents has them all, once each.
    pub(crate) fn check_open(&self) {
        let mut listed = 0;
        for (i, e) in self.extents.iter() {
            let free = matches!(e.state, ExtentState::FreeZeroed | ExtentState::FreeUnzeroed);
            assert!(!free || e.opened == Opened::Closed, "extent {i} is free and open");
            assert!(e.listed || !e.opened.is_durable(), "extent {i} is open and not listed");
            listed += usize::from(e.listed);
        }
        assert_eq!(listed, self.settle.open.len(), "the pool lists its open extents once");
    }
}

#[cfg(test)]
mod tests {
    use cairn_block::PoolId;

    use super::*;
    use crate::disk::{Entry, Record};
    use crate::{FormatOptions, SparseDevice};

    fn pool() -> Pool {
        let mut dev = SparseDevice::new(16 << 20);
        let pool_id = PoolId(7);
        let options =
            FormatOptions { pool_id, device_is_zeroed: true, sector_size: 512, force: false };
        Pool::format(&mut dev, &options).expect("an empty device");
        let mut pool = Pool::open(&mut dev).expect("a pool");
        pool.extents.get_mut(3).state = ExtentState::Allocated;
        pool
    }

    /// What is replayed where these share a block.
    fn last(pool: &mut Pool, owners: &[Owner]) -> Option<Entry> {
        pool.journal.records.clear();
        for &owner in owners {
            if let Some(record) = pool.record_of(owner, 9) {
                pool.journal.records.push(record);
            }
        }
        pool.journal.records.last().map(|&Record { entry, .. }| entry)
    }

    #[test]
    fn records_of_one_extent_in_one_block_leave_what_the_others_say() {
        let mut pool = pool();
        let settle = Owner::Settle { extent: 3, settling: 1, stamp: 5 };
        let unmark = Owner::Unmark { extent: 3, copy: true };
        let of = |entry: Option<Entry>| {
            let entry = entry.expect("it is allocated");
            (entry.dirty, entry.open, entry.copy, entry.stamp)
        };
        assert_eq!(of(last(&mut pool, &[Owner::Mark(3)])), (true, true, false, 0));
        assert_eq!(of(last(&mut pool, &[Owner::Mark(3), settle])), (true, false, false, 5));
        assert_eq!(of(last(&mut pool, &[Owner::Open(3), unmark])), (false, true, true, 0));
        assert_eq!(of(last(&mut pool, &[unmark, Owner::Open(3)])), (false, true, true, 0));
        assert_eq!(of(last(&mut pool, &[settle, Owner::Open(3)])), (false, true, false, 5));
        assert_eq!(of(last(&mut pool, &[Owner::Mark(3), unmark, settle])), (false, false, true, 5));
        pool.extents.incoming.push(3);
        let arrived = Owner::Arrived { extent: 3, tag: None };
        let entry = last(&mut pool, &[arrived, Owner::Mark(3), Owner::Open(3)]);
        assert!(entry.is_some_and(|entry| !entry.incoming && entry.dirty && entry.open));
        // What is freed in the same block, or is gone without a record, stays so.
        let free = Owner::Free { extent: 3, request: NIL };
        assert_eq!(last(&mut pool, &[free, settle, Owner::Mark(3)]), Some(Entry::free(false)));
        pool.extents.get_mut(3).state = ExtentState::Cleaning;
        assert_eq!(last(&mut pool, &[settle, Owner::Open(3), unmark]), None);
    }
}
