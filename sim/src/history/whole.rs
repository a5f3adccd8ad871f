//! Writes that are done whole or not at all: what reads see of one block of such a write they see of all of them.

use super::{History, OPEN};
use crate::checks::{Check, check};

/// Writes that are remembered: those that reads may still tell of.
const MAX_REMEMBERED: usize = 128;

/// A write that is to be whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole {
    lba: u64,
    blocks: u64,
    value: u64,
    invoked: u64,
    epoch: u64,
    /// When it was first known to be done.
    done: u64,
    /// From when on it is done, or never will be, and when it was first known not to be.
    closed: u64,
    undone: u64,
}

impl History {
    /// The write of `value` that was submitted at `invoked` is to be whole.
    pub fn whole_began(&mut self, (lba, blocks): (u64, u64), value: u64, epoch: u64, invoked: u64) {
        if self.wholes.len() >= MAX_REMEMBERED {
            self.wholes.remove(0);
        }
        let (done, closed, undone) = (OPEN, OPEN, OPEN);
        self.wholes.push(Whole { lba, blocks, value, invoked, epoch, done, closed, undone });
    }

    /// It was answered: it is done; or, where it met a full pool, it is not, and never will be; or nothing is known.
    pub fn whole_ended(&mut self, invoked: u64, done: Option<bool>) {
        let now = self.tick();
        let Some(at) = self.wholes.iter().position(|w| w.invoked == invoked) else { return };
        let whole = &mut self.wholes[at];
        match done {
            Some(true) => whole.done = whole.done.min(now),
            Some(false) => (whole.closed, whole.undone) = (whole.closed.min(now), now),
            None => {
                self.wholes.remove(at);
            }
        }
    }

    /// A nexus of a later epoch serves.
    pub(super) fn close_wholes(&mut self, epoch: u64, now: u64) {
        for whole in self.wholes.iter_mut().filter(|w| w.epoch < epoch) {
            whole.closed = whole.closed.min(now);
        }
    }

    /// Nothing is known any more of what was there before.
    pub(super) fn forget_wholes(&mut self) {
        self.wholes.clear();
    }

    /// A read that began at `invoked` and ended at `now` saw these values of the blocks from `first` on; of those
    /// that are none nothing is known.
    ///
    /// # Panics
    /// Where it saw a part of a write that is to be whole, or a part of it was seen and another is not.
    pub(super) fn judge_wholes(
        &mut self,
        first: u64,
        values: &[Option<u64>],
        (invoked, now): (u64, u64),
    ) {
        let mut wholes = core::mem::take(&mut self.wholes);
        for whole in &mut wholes {
            let (mut seen, mut older) = (None, None);
            for (lba, value) in (first..).zip(values) {
                let Some(value) = *value else { continue };
                if lba < whole.lba || lba >= whole.lba + whole.blocks {
                    continue;
                }
                if value == whole.value {
                    seen = Some(lba);
                } else if self.is_older(lba, value, whole.invoked) {
                    older = Some((lba, value));
                }
            }
            let done = seen.is_some() || whole.done < invoked;
            check!(
                Check::Linearizable,
                !(done && older.is_some()),
                "volume {}: a read ({invoked}..{now}) saw of {whole:?} block {seen:?}, and of another block what was \
                 there before: {older:?}",
                self.volume
            );
            check!(
                Check::Linearizable,
                seen.is_none() || whole.undone >= invoked,
                "volume {}: a read ({invoked}..{now}) saw block {seen:?} of {whole:?}, which was known not to be done",
                self.volume
            );
            if seen.is_some() {
                whole.done = whole.done.min(now);
            }
            if older.is_some() && whole.closed < invoked {
                whole.undone = whole.undone.min(now);
            }
        }
        self.wholes = wholes;
    }

    /// Whether what a block holds was there for sure before a write was submitted, and was not written again since.
    fn is_older(&self, lba: u64, value: u64, invoked: u64) -> bool {
        let block = &self.blocks[usize::try_from(lba).expect("a small volume")];
        let mut of = block.writes.iter().filter(|w| w.value == value).peekable();
        // Zeros that met a full pool are remembered in no other way.
        block.tainted_at.is_none()
            && of.peek().is_some()
            && of.all(|w| w.ended < invoked && !w.maybe)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::PAGE;

    /// A write of two blocks that is to be whole, over others that were acked.
    fn begun() -> (History, u64, [u64; 2]) {
        let mut history = History::new(1, 2);
        history.epoch_serves(1);
        let old = history.fresh_value();
        let at = history.write_began((0, 2), old, (1, 1), true);
        history.write_acked(0, 2, at);
        let new = history.fresh_value();
        let at = history.write_began((0, 2), new, (1, 1), true);
        history.whole_began((0, 2), new, 1, at);
        (history, at, [old, new])
    }

    fn read(history: &mut History, values: &[u64]) {
        let invoked = history.tick();
        let mut bytes = vec![0; values.len() * PAGE];
        for (lba, (value, block)) in (0..).zip(values.iter().zip(bytes.chunks_mut(PAGE))) {
            history.encode(lba, *value, block);
        }
        history.read_ended(0, &bytes, invoked);
    }

    #[test]
    fn a_whole_write_is_seen_or_not() {
        let (mut history, at, [old, new]) = begun();
        read(&mut history, &[old, old]);
        read(&mut history, &[new, new]);
        history.write_acked(0, 2, at);
        history.whole_ended(at, Some(true));
        read(&mut history, &[new, new]);
    }

    #[test]
    #[should_panic(expected = "what was there before")]
    fn half_of_one_is_caught() {
        let (mut history, _, [old, new]) = begun();
        history.epoch_serves(2);
        read(&mut history, &[new, old]);
    }

    #[test]
    #[should_panic(expected = "what was there before")]
    fn half_of_one_in_two_reads_is_caught() {
        let (mut history, _, [old, new]) = begun();
        history.epoch_serves(2);
        read(&mut history, &[new]);
        let invoked = history.tick();
        let mut block = vec![0; PAGE];
        history.encode(1, old, &mut block);
        history.read_ended(1, &block, invoked);
    }

    #[test]
    #[should_panic(expected = "known not to be done")]
    fn one_that_was_refused_and_is_there_is_caught() {
        let (mut history, at, [_, new]) = begun();
        history.write_found_no_space(0, 2, at);
        history.whole_ended(at, Some(false));
        read(&mut history, &[new, new]);
    }
}
