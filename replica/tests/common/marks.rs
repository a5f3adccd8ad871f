//! A model of the extents that must be open: changed, and not settled since.

use std::collections::{BTreeMap, BTreeSet};

use cairn_block::LbaRange;
use cairn_replica::change::{MAPPED, OPEN, SINCE};

use super::EXTENT_BLOCKS;
use super::model::{Blocks, Held};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// It is open, where it is mapped at all.
    Open,
    /// It was, or may have been, settled with this stamp: it is open, or has this stamp or a later one.
    Settled(u64),
}

/// What a pool must tell of a replica's extents.
#[derive(Clone, Default)]
pub(crate) struct Marks {
    marks: BTreeMap<u64, Mark>,
    /// When a change of an extent was last asked for.
    touched: BTreeMap<u64, u64>,
    round: Option<Round>,
    begins: u64,
    /// The order at the last crash, or when it was made, and the changes since that were refused.
    crashed: u64,
    failed: BTreeSet<u64>,
}

/// A round that began last, and has not ended.
#[derive(Clone)]
struct Round {
    id: u64,
    begun: u64,
    /// Changes that were in flight when it began: it ends after them.
    waits: BTreeSet<u64>,
    busy: BTreeSet<u64>,
    /// Extents that were changed since.
    changed: BTreeSet<u64>,
}

/// A round whose end was asked for.
pub(crate) struct Ended {
    pub(crate) id: u64,
    begun: u64,
    begins: u64,
    busy: BTreeSet<u64>,
    stamp: u64,
}

fn extents(range: LbaRange) -> impl Iterator<Item = u64> {
    range.start().0 / EXTENT_BLOCKS..range.end().0.div_ceil(EXTENT_BLOCKS)
}

impl Marks {
    /// Those of a clone, which has changed nothing of its own.
    pub(crate) fn of_clone(order: u64) -> Self {
        Self { crashed: order, ..Self::default() }
    }

    /// A change was asked for.
    pub(crate) fn submitted(&mut self, range: LbaRange, order: u64) {
        self.touched.extend(extents(range).map(|extent| (extent, order)));
    }

    /// A change was made.
    pub(crate) fn changed(&mut self, range: LbaRange, tag: u64) {
        self.marks.extend(extents(range).map(|extent| (extent, Mark::Open)));
        if let Some(round) = self.round.as_mut().filter(|round| !round.waits.contains(&tag)) {
            round.changed.extend(extents(range));
        }
    }

    /// A change was refused: some of it may have been made all the same, before a round that ended since.
    pub(crate) fn failed(&mut self, order: u64) {
        self.failed.insert(order);
    }

    /// A block was read after a crash. If it shows what was not answered, that was written.
    pub(crate) fn read(&mut self, blocks: &Blocks, lba: u64, block: &[u8]) {
        let Some(held) = blocks.get(&lba) else { return };
        let last = held.iter().rposition(|h| h.certain).unwrap_or(0);
        let under_way = |order: u64| order > self.crashed && !self.failed.contains(&order);
        let ahead = |value: u64| {
            let of = |h: &&Held| h.value == value;
            let known = held.iter().enumerate().filter(|(i, h)| *i <= last || !under_way(h.order));
            !known.map(|(_, h)| h).any(|h| of(&h)) && held[last..].iter().any(|h| of(&h))
        };
        let value = |sector: &[u8]| u64::from_le_bytes(sector[..8].try_into().unwrap());
        if block.chunks(512).any(|sector| ahead(value(sector))) {
            self.marks.insert(lba / EXTENT_BLOCKS, Mark::Open);
        }
    }

    /// Whatever was under way is over.
    pub(crate) fn crashed(&mut self, order: u64) {
        self.round = None;
        self.crashed = order;
        self.failed.clear();
    }

    /// Nothing is known.
    pub(crate) fn forget(&mut self) {
        self.marks.clear();
        self.round = None;
    }

    pub(crate) fn begin(
        &mut self,
        id: u64,
        order: u64,
        in_flight: impl Iterator<Item = (u64, LbaRange)>,
    ) {
        self.begins += 1;
        let mut round = Round {
            id,
            begun: order,
            waits: BTreeSet::new(),
            busy: BTreeSet::new(),
            changed: BTreeSet::new(),
        };
        for (tag, range) in in_flight {
            round.waits.insert(tag);
            round.busy.extend(extents(range));
        }
        self.round = Some(round);
    }

    /// The end of the round is asked for, unless there is none or something is still waited for.
    pub(crate) fn end(&mut self, stamp: u64, in_flight: impl Fn(u64) -> bool) -> Option<Ended> {
        let over = |round: &mut Round| !round.waits.iter().any(|&tag| in_flight(tag));
        let round = self.round.take_if(over)?;
        for (extent, mark) in &mut self.marks {
            if *mark == Mark::Open && !round.changed.contains(extent) {
                *mark = Mark::Settled(stamp);
            }
        }
        let (begun, begins) = (round.begun, self.begins);
        Some(Ended { id: round.id, begun, begins, busy: round.busy, stamp })
    }

    /// A round of which this may be a part ends.
    pub(crate) fn settled(&mut self, stamp: u64) {
        for mark in self.marks.values_mut().filter(|mark| **mark == Mark::Open) {
            *mark = Mark::Settled(stamp);
        }
    }

    /// Holds what the pool tells of the replica to what was promised.
    pub(crate) fn check(&self, id: u128, changes: impl Fn(u32, u64) -> u8) {
        for (&extent, &mark) in &self.marks {
            let at = u32::try_from(extent).unwrap();
            let told = changes(at, 0);
            assert!(told == 0 || told & MAPPED != 0, "extent {extent} of {id}: {told}");
            let good = match mark {
                _ if told & MAPPED == 0 => true,
                Mark::Open => told & OPEN != 0,
                Mark::Settled(stamp) => told & OPEN != 0 || changes(at, stamp) & SINCE != 0,
            };
            assert!(good, "extent {extent} of {id} is {mark:?}, and told as {told}");
        }
    }

    /// A round's end is answered: what was quiet is not open any more.
    pub(crate) fn check_ended(&self, id: u128, ended: &Ended, changes: impl Fn(u32, u64) -> u8) {
        if self.begins != ended.begins {
            return;
        }
        for (&extent, &mark) in &self.marks {
            let touched = self.touched.get(&extent).is_some_and(|&order| order > ended.begun);
            if touched || ended.busy.contains(&extent) {
                continue;
            }
            let told = changes(u32::try_from(extent).unwrap(), ended.stamp);
            assert_eq!(
                told & OPEN,
                0,
                "extent {extent} of {id} stays open, and was quiet: {mark:?}"
            );
        }
    }
}
