//! The fixed table of host requests in flight.

use cairn_block::IoRequest;
use cairn_block::mutants::{Mutant, on};

use crate::types::ChildId;

/// A set of children, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ChildSet(pub(crate) u16);

impl ChildSet {
    pub(crate) const EMPTY: Self = Self(0);

    pub(crate) const fn of(child: ChildId) -> Self {
        Self(1 << child.0)
    }

    pub(crate) const fn has(self, child: ChildId) -> bool {
        self.0 & Self::of(child).0 != 0
    }

    pub(crate) const fn with(self, child: ChildId) -> Self {
        Self(self.0 | Self::of(child).0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(crate) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// How many of these are a majority of them.
    pub(crate) const fn majority(self) -> usize {
        self.len() / 2 + 1
    }

    /// Whether a majority of these is among `others`.
    pub(crate) fn has_majority_in(self, others: Self) -> bool {
        let needed = if on(Mutant::Minority) { 1 } else { self.majority() };
        self.and(others).len() >= needed
    }

    pub(crate) fn iter(self) -> impl Iterator<Item = ChildId> {
        (0..16).map(ChildId).filter(move |&c| self.has(c))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for a mutation that it overlaps.
    Waiting,
    /// Children work on it.
    Running,
    /// Its range is mended first.
    Mending,
    /// It is to be done whole, and what it writes over is being kept, or taken back.
    Keeping,
    /// A read that is done and waits for a lease.
    Held,
    /// Answered; a child that was given up still uses the buffer.
    Answered,
}

/// One host request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) tag: u64,
    pub(crate) request: IoRequest,
    pub(crate) phase: Phase,
    /// Children whose operation has not come back: the buffer is theirs too.
    pub(crate) outstanding: ChildSet,
    /// Children that completed it.
    pub(crate) ok: ChildSet,
    /// Children that failed it, or took too long.
    pub(crate) failed: ChildSet,
    /// Of those, children that could not read it right, and children that had no space.
    pub(crate) bad: ChildSet,
    pub(crate) full: ChildSet,
    /// A mend uses the buffer.
    pub(crate) mending: bool,
    /// The last failure that a child reported.
    pub(crate) fault: cairn_block::IoStatus,
    /// A child answered, and refused: not only its session was lost.
    pub(crate) refused: bool,
    /// A child did nothing, and is none the worse for it: see `harmless_refusal`.
    pub(crate) declined: bool,
    /// A child may have done it, or a part of it, and has not said so.
    pub(crate) unsure: bool,
    /// A read that nothing may overtake: it has its range for itself.
    pub(crate) alone: bool,
    /// It is done whole or not at all, whatever happens.
    pub(crate) atomic: bool,
    pub(crate) started_ms: u64,
    /// Its place among all changes, from the time when children were asked.
    pub(crate) order: u64,
}

/// Slots by number; nothing is allocated once it is full-grown.
#[derive(Debug)]
pub(crate) struct Slots {
    table: Vec<Option<Slot>>,
    free: Vec<u16>,
}

impl Slots {
    pub(crate) fn new(capacity: u16) -> Self {
        Self { table: vec![None; usize::from(capacity)], free: (0..capacity).rev().collect() }
    }

    pub(crate) fn insert(&mut self, slot: Slot) -> Option<u16> {
        let at = self.free.pop()?;
        self.table[usize::from(at)] = Some(slot);
        Some(at)
    }

    pub(crate) fn slot(&mut self, at: u16) -> &mut Slot {
        self.table[usize::from(at)].as_mut().expect("a slot that is in use")
    }

    pub(crate) fn get(&mut self, at: u16) -> Option<&mut Slot> {
        self.table[usize::from(at)].as_mut()
    }

    pub(crate) fn remove(&mut self, at: u16) -> Slot {
        let slot = self.table[usize::from(at)].take().expect("a slot that is in use");
        self.free.push(at);
        slot
    }

    pub(crate) fn in_use(&self) -> usize {
        self.table.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u16, &Slot)> {
        (0u16..).zip(&self.table).filter_map(|(at, slot)| slot.as_ref().map(|s| (at, s)))
    }

    pub(crate) fn capacity(&self) -> usize {
        self.table.len()
    }
}
