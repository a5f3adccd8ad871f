//! The journal at run time: one block in flight, and everyone who came meanwhile shares the next.

use std::collections::VecDeque;

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
    /// An extent is marked dirty.
    Mark(u32),
    /// The mark is taken back: this copy of the checksum page is current.
    Unmark { extent: u32, copy: bool },
    /// A copy is finished: its extent belongs to its replica.
    Arrived { extent: u32, tag: u64 },
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
        let Some(buf) = mem.alloc(BLOCK_BYTES) else { return };
        let mut records = 0;
        while records < RECORDS_PER_BLOCK {
            // A record is made of the entry as it is durable. So the end of a copy, which changes the
            // flag beside the mark, shares no block with a record that changes the mark.
            let alone = matches!(self.journal.pending.front(), Some(Owner::Arrived { .. }));
            if alone && records > 0 {
                break;
            }
            let Some(owner) = self.journal.pending.pop_front() else { break };
            records += usize::from(!matches!(owner, Owner::Request(_)));
            self.journal.batch.push(owner);
            if alone {
                break;
            }
        }
        let sequence = self.journal.head;
        let address = self.superblock.journal_address(sequence);
        let (allocs, table) = (&self.allocs, &self.extents);
        let records = self.journal.batch.iter().filter_map(|owner| match *owner {
            Owner::Alloc(id) => {
                let alloc = allocs.get(id);
                let entry = match alloc.from {
                    Some(_) => Entry { layer: alloc.layer, ..table.entry(alloc.extent) },
                    None => Entry {
                        state: EntryState::Allocated,
                        layer: alloc.layer,
                        logical: alloc.logical,
                        dirty: true,
                        incoming: alloc.import.is_some_and(|import| import.incoming),
                        birth: sequence,
                        ..Entry::free(false)
                    },
                };
                Some(Record { extent: alloc.extent, entry })
            }
            Owner::Free { extent, .. } => Some(Record { extent, entry: Entry::free(false) }),
            Owner::Mark(extent) => {
                let entry = Entry { dirty: true, ..table.entry(extent) };
                Some(Record { extent, entry })
            }
            Owner::Unmark { extent, copy } => {
                let entry = Entry { dirty: false, copy, ..table.entry(extent) };
                Some(Record { extent, entry })
            }
            Owner::Arrived { extent, .. } => {
                Some(Record { extent, entry: Entry { incoming: false, ..table.entry(extent) } })
            }
            Owner::Request(_) => None,
        });
        let pool = self.superblock.pool;
        JournalBlock::encode(sequence, address, pool, records, mem.bytes_mut(buf.slice()));
        self.journal.busy = true;
        let offset = ByteOffset(address * BLOCK);
        let op = DiskOp::Write { offset, buf: buf.slice(), fua: false };
        self.issue(op, Purpose::Journal, Some(buf));
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
                    if request != NIL {
                        self.part_done(request, IoStatus::Ok, mem);
                    }
                }
                Owner::Mark(extent) => self.mark_durable(extent, mem),
                Owner::Unmark { extent, copy } => self.unmark_durable(extent, copy, mem),
                Owner::Arrived { extent, tag } => self.arrived(extent, tag),
                Owner::Request(request) => self.flusher.next.push(Waiter::Request(request)),
            }
        }
        self.journal.batch = batch;
    }
}
