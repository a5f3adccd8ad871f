//! The journal at run time: one block in flight, and everyone who came meanwhile shares the next.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{ByteOffset, IoStatus, Memory};

use crate::disk::{BLOCK, BLOCK_BYTES, Entry, EntryState, JournalBlock, RECORDS_PER_BLOCK, Record};
use crate::extents::NIL;
use crate::flush::Waiter;
use crate::pool::{DiskOp, Pool, Purpose};

/// Who is told when a record is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// An extent is allocated.
    Alloc(u32),
    /// An extent is given up by part of this request, or by nobody's ([`NIL`]).
    Free { extent: u32, request: u32 },
    /// An extent is marked dirty, and opened.
    Mark(u32),
    /// A dirty extent is opened.
    Open(u32),
    /// An extent is closed by the settling of this number, with this stamp.
    Settle { extent: u32, settling: u32, stamp: u64 },
    /// The mark is taken back: this copy of the checksum page is current.
    Unmark { extent: u32, copy: bool },
    /// A copy is finished: its extent belongs to its replica.
    Arrived { extent: u32, tag: Option<u64> },
    /// Not a record: so many records that follow are in one block.
    Together(usize),
    /// Not a record: this request waits for those before it.
    Request(u32),
}

#[derive(Debug)]
pub(crate) struct Journal {
    /// The sequence of the next block.
    pub(crate) head: u64,
    pending: VecDeque<Owner>,
    /// What the block in flight holds.
    batch: Vec<Owner>,
    /// Its records, while it is made.
    pub(crate) records: Vec<Record>,
    busy: bool,
    /// Releases that are not durable yet.
    pub(crate) frees: u32,
}

impl Journal {
    pub(crate) fn new(head: u64) -> Self {
        Self {
            head,
            pending: VecDeque::with_capacity(1024),
            batch: Vec::with_capacity(1024),
            records: Vec::with_capacity(RECORDS_PER_BLOCK),
            busy: false,
            frees: 0,
        }
    }

    pub(crate) fn push(&mut self, owner: Owner) {
        if matches!(owner, Owner::Free { .. }) {
            self.frees += 1;
        }
        self.pending.push_back(owner);
    }

    /// The next records, so many, go into one block: a crash leaves all of them or none.
    pub(crate) fn push_together(&mut self, records: usize) {
        assert!(records <= RECORDS_PER_BLOCK, "a block has so many records at most");
        self.pending.push_back(Owner::Together(records));
    }

    pub(crate) fn push_waiter(&mut self, request: u32) {
        self.pending.push_back(Owner::Request(request));
    }

    /// Extents whose release is not durable yet.
    pub(crate) fn freeing(&self) -> impl Iterator<Item = u32> {
        let waits = if self.frees > 0 { usize::MAX } else { 0 };
        self.pending.iter().chain(&self.batch).take(waits).filter_map(|owner| match *owner {
            Owner::Free { extent, .. } => Some(extent),
            _ => None,
        })
    }

    pub(crate) fn clear(&mut self) {
        self.pending.clear();
        self.batch.clear();
        self.frees = 0;
    }
}

impl Pool {
    /// Blocks of the ring that a checkpoint has not freed.
    pub(crate) fn journal_used(&self) -> u64 {
        self.journal.head - self.superblock.journal_tail
    }

    /// Writes the next block, if there is something to log, room in the ring, and memory.
    ///
    /// A full ring waits for the checkpoint, which itself logs nothing; so releases need no reserve.
    pub(crate) fn pump_journal<M: Memory>(&mut self, mem: &mut M) {
        if self.journal.busy {
            return;
        }
        while let Some(&Owner::Request(request)) = self.journal.pending.front() {
            self.journal.pending.pop_front();
            self.flusher.next.push(Waiter::Request(request));
        }
        if self.journal.pending.is_empty() || self.journal_used() >= self.superblock.journal_blocks
        {
            return;
        }
        let Some(buf) = mem.alloc(BLOCK_BYTES) else {
            self.short = true;
            return;
        };
        let sequence = self.journal.head;
        let address = self.superblock.journal_address(sequence);
        self.journal.records.clear();
        while self.journal.records.len() < RECORDS_PER_BLOCK {
            let Some(owner) = self.journal.pending.pop_front() else { break };
            if let Owner::Together(records) = owner {
                if self.journal.records.len() + records > RECORDS_PER_BLOCK {
                    self.journal.pending.push_front(owner);
                    break;
                }
                continue;
            }
            self.journal.batch.push(owner);
            if matches!(owner, Owner::Mark(_)) && on(Mutant::NoDirtyMark) {
                continue;
            }
            if let Some(record) = self.record_of(owner, sequence) {
                self.journal.records.push(record);
            }
        }
        let pool = self.superblock.pool;
        let records = self.journal.records.iter().copied();
        JournalBlock::encode(sequence, address, pool, records, mem.bytes_mut(buf.slice()));
        self.journal.busy = true;
        let offset = ByteOffset(address * BLOCK);
        let op = DiskOp::Write { offset, buf: buf.slice(), fua: false };
        self.issue(op, Purpose::Journal, Some(buf));
    }

    /// What a record says: the extent's whole entry. Each owner changes its own part of the entry as it is
    /// durable, or as an earlier record of the same block leaves it: several records of one extent in a
    /// block must not take back what the others say. Blocks go out one after the other, so what is
    /// in flight is durable, and in the table in memory, before the next one is made.
    pub(crate) fn record_of(&self, owner: Owner, sequence: u64) -> Option<Record> {
        let earlier = |extent: u32| {
            let found = self.journal.records.iter().rev().find(|record| record.extent == extent);
            let entry = found.map_or_else(|| self.extents.entry(extent), |record| record.entry);
            // What is free by now has nothing to say: its deletion needs no record.
            (entry.state == EntryState::Allocated).then_some(entry)
        };
        let (extent, entry) = match owner {
            Owner::Alloc(id) => {
                let alloc = self.allocs.get(id);
                let entry = match alloc.from {
                    Some(_) => Entry { layer: alloc.layer, ..earlier(alloc.extent)? },
                    None => Entry {
                        state: EntryState::Allocated,
                        layer: alloc.layer,
                        logical: alloc.logical,
                        dirty: true,
                        open: true,
                        incoming: alloc.import.is_some_and(|import| import.incoming),
                        birth: sequence,
                        ..Entry::free(false)
                    },
                };
                (alloc.extent, entry)
            }
            Owner::Free { extent, .. } => (extent, Entry::free(false)),
            Owner::Mark(extent) => (extent, Entry { dirty: true, open: true, ..earlier(extent)? }),
            Owner::Open(extent) => (extent, Entry { open: true, ..earlier(extent)? }),
            Owner::Settle { extent, stamp, .. } => {
                (extent, Entry { open: false, stamp, ..earlier(extent)? })
            }
            Owner::Unmark { extent, copy } => {
                (extent, Entry { dirty: false, copy, ..earlier(extent)? })
            }
            Owner::Arrived { extent, .. } => {
                (extent, Entry { incoming: false, ..earlier(extent)? })
            }
            Owner::Request(_) | Owner::Together(_) => return None,
        };
        Some(Record { extent, entry })
    }

    /// The block in flight is on stable storage.
    pub(crate) fn journal_durable<M: Memory>(&mut self, mem: &mut M) {
        self.journal.busy = false;
        self.journal.head += 1;
        let mut batch = core::mem::take(&mut self.journal.batch);
        for owner in batch.drain(..) {
            match owner {
                Owner::Alloc(id) => self.alloc_durable(id, mem),
                Owner::Free { extent, request } => {
                    self.journal.frees -= 1;
                    self.free_durable(extent);
                    self.released(extent);
                    if request != NIL {
                        self.part_done(request, IoStatus::Ok, mem);
                    }
                }
                Owner::Mark(extent) => self.mark_durable(extent, mem),
                Owner::Open(extent) => self.open_durable(extent, mem),
                Owner::Settle { extent, settling, stamp } => {
                    self.settle_durable(extent, settling, stamp, mem);
                }
                Owner::Unmark { extent, copy } => self.unmark_durable(extent, copy, mem),
                Owner::Arrived { extent, tag } => self.arrived(extent, tag),
                Owner::Request(request) => self.flusher.next.push(Waiter::Request(request)),
                Owner::Together(_) => {}
            }
        }
        self.journal.batch = batch;
    }
}

#[cfg(test)]
mod tests {
    use cairn_block::{HeapMemory, PoolId};

    use super::*;
    use crate::extents::ExtentState;
    use crate::{FormatOptions, SparseDevice};

    /// What goes together goes into one block, whatever is before it.
    #[test]
    fn records_that_go_together_are_in_one_block() {
        for before in [0, 1, RECORDS_PER_BLOCK - 10, RECORDS_PER_BLOCK - 9, RECORDS_PER_BLOCK] {
            let mut dev = SparseDevice::new(16 << 20);
            let pool_id = PoolId(7);
            let options =
                FormatOptions { pool_id, device_is_zeroed: true, sector_size: 512, force: false };
            Pool::format(&mut dev, &options).expect("an empty device");
            let mut pool = Pool::open(&mut dev).expect("a pool");
            let mut mem = HeapMemory::new(1 << 20);
            for extent in [3, 4] {
                pool.extents.get_mut(extent).state = ExtentState::Allocated;
            }
            (0..before).for_each(|_| pool.journal.push(Owner::Open(3)));
            pool.journal.push_together(10);
            (0..10).for_each(|_| pool.journal.push(Owner::Open(4)));
            pool.journal.push(Owner::Open(3));
            let (mut blocks, mut together) = (0, Vec::new());
            while !pool.journal.pending.is_empty() {
                pool.journal.busy = false;
                pool.journal.batch.clear();
                pool.pump_journal(&mut mem);
                blocks += 1;
                let of = pool.journal.records.iter().filter(|record| record.extent == 4);
                together.push(of.count());
            }
            together.retain(|&count| count > 0);
            assert_eq!(together, [10], "after {before} others");
            assert!(blocks <= 3, "{blocks} blocks");
        }
    }
}
