//! For runs that last: what can never be asked for again is forgotten, and requests that nobody will ever answer
//! are closed.

use std::collections::BTreeMap;

use super::{Block, History, OPEN, Read};

impl History {
    /// A write that nobody answered was done by now, or never is: whoever could have done it is gone.
    pub fn write_is_over(&mut self, lba: u64, blocks: u64, invoked: u64) {
        let now = self.tick();
        for block in self.range(lba, blocks) {
            let open = |w: &&mut super::Write| w.invoked == invoked && w.ended == OPEN;
            if let Some(write) = block.writes.iter_mut().find(open) {
                (write.maybe, write.ended) = (true, now);
            }
        }
    }

    /// Forgets writes that were certainly written over before `oldest`, when the oldest request that is under
    /// way was made, by what no loss of power takes back; and reads that lie between two others of one value.
    ///
    /// # Panics
    /// Where a block's reads went back.
    pub fn forget(&mut self, oldest: u64) {
        for at in 0..self.blocks.len() {
            self.judge(at);
            let block = &mut self.blocks[at];
            if block.tainted_at.is_none() {
                forget_writes(block, oldest);
            }
            keep_the_ends(&mut block.reads);
        }
    }
}

fn forget_writes(block: &mut Block, oldest: u64) {
    let certain = block.writes.iter().filter(|w| w.durable && !w.maybe && w.ended < oldest);
    let Some(latest) = certain.map(|w| w.invoked).max() else { return };
    block.writes.retain(|w| w.ended >= latest);
    let writes = &block.writes;
    block.reads.retain(|r| writes.iter().any(|w| w.value == r.value));
}

/// Of the reads of one value only the one that ended first and the one that began last tell anything.
fn keep_the_ends(reads: &mut Vec<Read>) {
    let mut ends: BTreeMap<u64, (Read, Read)> = BTreeMap::new();
    for read in reads.drain(..) {
        let (first, last) = ends.entry(read.value).or_insert((read, read));
        if read.ended < first.ended {
            *first = read;
        }
        if read.invoked > last.invoked {
            *last = read;
        }
    }
    for (first, last) in ends.into_values() {
        reads.push(first);
        if (first.invoked, first.ended) != (last.invoked, last.ended) {
            reads.push(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::PAGE;

    fn write(history: &mut History) -> u64 {
        let value = history.fresh_value();
        let at = history.write_began((0, 1), value, (1, 1), true);
        history.write_acked(0, 1, at);
        value
    }

    fn read(history: &mut History, value: u64) {
        let mut page = [0; PAGE];
        history.encode(0, value, &mut page);
        let invoked = history.tick();
        history.read_ended(0, &page, invoked);
    }

    #[test]
    fn what_is_over_is_forgotten_and_what_counts_is_not() {
        let mut history = History::new(1, 1);
        for _ in 0..100 {
            let value = write(&mut history);
            for _ in 0..10 {
                read(&mut history, value);
            }
        }
        let oldest = history.tick();
        let last = write(&mut history);
        history.forget(oldest);
        assert_eq!(history.blocks[0].writes.len(), 2);
        assert_eq!(history.blocks[0].reads.len(), 2);
        read(&mut history, last);
        history.judge_all();
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_was_forgotten_does_not_come_back() {
        let mut history = History::new(1, 1);
        let a = write(&mut history);
        write(&mut history);
        let oldest = history.tick();
        history.forget(oldest);
        read(&mut history, a);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_is_over_does_not_come_later() {
        let mut history = History::new(1, 1);
        let lost = history.fresh_value();
        let at = history.write_began((0, 1), lost, (1, 1), false);
        history.write_is_over(0, 1, at);
        let kept = write(&mut history);
        read(&mut history, kept);
        read(&mut history, lost);
    }
}
