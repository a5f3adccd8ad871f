//! Which mutations and reads are in flight, by range, and who waits for them.

use std::collections::VecDeque;

use cairn_block::LbaRange;
use cairn_block::mutants::{Mutant, on};

use crate::copy::COPY_KEY;
use crate::mend::FIRST_KEY;

/// Ranges of the mutations in flight, and the requests that wait, in the order of their arrival.
#[derive(Debug)]
pub(crate) struct Ranges {
    active: Vec<(LbaRange, u16)>,
    waiting: VecDeque<Waiting>,
    /// Reads that a member is asked for.
    reads: Vec<Reading>,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    range: LbaRange,
    slot: u16,
    /// A mutation that it overlaps has begun since: it may see what is taken back again.
    overtaken: bool,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    range: LbaRange,
    slot: u16,
    mutation: bool,
}

impl Ranges {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            active: Vec::with_capacity(capacity),
            waiting: VecDeque::with_capacity(capacity),
            reads: Vec::with_capacity(capacity),
        }
    }

    /// Whether the request may run now. Otherwise it waits until [`Ranges::poll_ready`] names it.
    ///
    /// A request waits for every earlier mutation that it overlaps, running or waiting.
    pub(crate) fn enter(&mut self, range: LbaRange, slot: u16, mutation: bool) -> bool {
        let blocked = self.active.iter().any(|(held, _)| held.overlaps(range))
            || self.waiting.iter().any(|w| w.mutation && w.range.overlaps(range));
        let blocked = blocked && !(mutation && on(Mutant::NoOrder));
        let blocked = blocked && (mutation || !on(Mutant::ReadOvertakes));
        let blocked = blocked && !(slot >= COPY_KEY && on(Mutant::NoLock));
        if blocked {
            self.waiting.push_back(Waiting { range, slot, mutation });
            return false;
        }
        if mutation {
            self.activate(range, slot);
        }
        true
    }

    fn activate(&mut self, range: LbaRange, slot: u16) {
        self.active.push((range, slot));
        // What a rebuild copies changes no member that is read.
        if !(COPY_KEY..FIRST_KEY).contains(&slot) {
            for read in self.reads.iter_mut().filter(|read| read.range.overlaps(range)) {
                read.overtaken = true;
            }
        }
    }

    /// A member is asked for what the read in `slot` wants.
    pub(crate) fn begin_read(&mut self, range: LbaRange, slot: u16) {
        self.end_read(slot);
        self.reads.push(Reading { range, slot, overtaken: false });
    }

    /// It has answered, or is not waited for any more. Returns whether a mutation has overtaken the read.
    pub(crate) fn end_read(&mut self, slot: u16) -> bool {
        let at = self.reads.iter().position(|read| read.slot == slot);
        at.is_some_and(|at| self.reads.swap_remove(at).overtaken)
    }

    /// The mutation in `slot` is over.
    pub(crate) fn leave(&mut self, slot: u16) {
        if let Some(at) = self.active.iter().position(|&(_, s)| s == slot) {
            self.active.swap_remove(at);
        }
    }

    /// The next request that waits for nothing any more.
    pub(crate) fn poll_ready(&mut self) -> Option<u16> {
        let at = (0..self.waiting.len()).find(|&i| {
            let w = self.waiting[i];
            !self.active.iter().any(|(held, _)| held.overlaps(w.range))
                && !self
                    .waiting
                    .iter()
                    .take(i)
                    .any(|earlier| earlier.mutation && earlier.range.overlaps(w.range))
        })?;
        let ready = self.waiting.remove(at)?;
        if ready.mutation {
            self.activate(ready.range, ready.slot);
        }
        Some(ready.slot)
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.active.clear();
        self.reads.clear();
        self.waiting.clear();
    }

    /// Whether a range is held.
    #[cfg(test)]
    pub(crate) fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_block::Lba;

    fn r(start: u64, blocks: u64) -> LbaRange {
        LbaRange::new(Lba(start), blocks).unwrap()
    }

    #[test]
    fn overlapping_mutations_run_in_the_order_of_arrival() {
        let mut ranges = Ranges::new(8);
        assert!(ranges.enter(r(0, 8), 1, true));
        assert!(!ranges.enter(r(4, 8), 2, true));
        // Clear of the one that runs, but behind one that waits.
        assert!(!ranges.enter(r(10, 1), 3, true));
        assert!(ranges.enter(r(100, 1), 4, true));
        assert_eq!(ranges.poll_ready(), None);
        ranges.leave(1);
        assert_eq!(ranges.poll_ready(), Some(2));
        assert_eq!(ranges.poll_ready(), None);
        ranges.leave(2);
        assert_eq!(ranges.poll_ready(), Some(3));
    }

    #[test]
    fn a_read_that_a_mutation_overtakes_hears_of_it() {
        let mut ranges = Ranges::new(8);
        ranges.begin_read(r(0, 8), 1);
        ranges.begin_read(r(8, 8), 2);
        assert!(ranges.enter(r(7, 1), 3, true));
        assert!(!ranges.enter(r(7, 2), 4, true));
        assert!(ranges.enter(r(100, 8), COPY_KEY, true));
        ranges.begin_read(r(100, 8), 5);
        ranges.leave(3);
        assert!(ranges.end_read(1));
        assert!(!ranges.end_read(1), "once");
        // The one that waited begins.
        assert_eq!(ranges.poll_ready(), Some(4));
        assert!(ranges.end_read(2));
        assert!(!ranges.end_read(5));
        ranges.begin_read(r(8, 8), 2);
        assert!(!ranges.end_read(2), "another try");
    }

    #[test]
    fn reads_wait_for_mutations_and_for_nothing_else() {
        let mut ranges = Ranges::new(8);
        assert!(ranges.enter(r(0, 8), 1, false));
        assert!(ranges.enter(r(0, 8), 2, true));
        assert!(!ranges.enter(r(7, 1), 3, false));
        assert!(!ranges.enter(r(7, 1), 4, false));
        ranges.leave(2);
        assert_eq!(ranges.poll_ready(), Some(3));
        assert_eq!(ranges.poll_ready(), Some(4));
        assert!(!ranges.has_waiting());
    }
}
