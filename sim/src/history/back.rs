//! A volume that goes back to a snapshot: each block is what it was then, whatever was written since.

use super::{Block, History, OPEN, PAGE, Write};

impl History {
    /// It is stored that the volume goes back to these bytes: what comes from now on waits until it has. Reads that
    /// are under way may be from before or from after that.
    pub fn may_go_back(&mut self, bytes: &[u8]) {
        let values = (0..).zip(bytes.chunks(PAGE)).map(|(lba, bytes)| self.decode(lba, bytes));
        self.coming = values.collect();
    }

    /// It is stored that it does not go there any more, and has not.
    pub fn stays(&mut self) {
        self.coming.clear();
    }

    /// The volume is back at these bytes, and nobody has read or written anything since. What is under way for the
    /// nexus of now may be done yet; what was for earlier ones is not done any more.
    ///
    /// # Panics
    /// Where the reads of a block went back before.
    pub fn goes_back(&mut self, bytes: &[u8]) {
        self.coming.clear();
        self.forget_wholes();
        let now = self.tick();
        let last = self.epochs.last().map_or(0, |(epoch, _)| *epoch);
        for (at, bytes) in bytes.chunks(PAGE).enumerate() {
            self.judge(at);
            let value = self.decode(at as u64, bytes);
            let then = Write {
                value,
                invoked: now,
                ended: now,
                maybe: false,
                epoch: 0,
                durable: true,
                fua: true,
                lottery: 0,
                host: 0,
                owed: false,
            };
            let late = |w: &&Write| w.ended == OPEN && w.epoch >= last && w.value != value;
            let mut writes = vec![then];
            writes.extend(self.blocks[at].writes.iter().filter(late));
            self.blocks[at] = Block { writes, since: now, ..Block::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(history: &History, value: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        if value != 0 {
            history.encode(0, value, &mut page);
        }
        page
    }

    fn read(history: &mut History, value: u64) {
        let (bytes, invoked) = (page(history, value), history.tick());
        history.read_ended(0, &bytes, invoked);
    }

    fn write(history: &mut History) -> u64 {
        let value = history.fresh_value();
        let at = history.write_began((0, 1), value, (1, 1), false);
        history.write_acked(0, 1, at);
        value
    }

    #[test]
    fn what_was_then_is_read_and_what_is_under_way_may_be() {
        let mut history = History::new(1, 1);
        let then = write(&mut history);
        let bytes = page(&history, then);
        write(&mut history);
        let late = history.fresh_value();
        let at = history.write_began((0, 1), late, (1, 1), false);
        history.goes_back(&bytes);
        read(&mut history, then);
        history.write_acked(0, 1, at);
        read(&mut history, late);
        let next = write(&mut history);
        read(&mut history, next);
        history.judge_all();
    }

    #[test]
    fn a_read_that_is_under_way_meanwhile_sees_one_or_the_other() {
        let mut history = History::new(1, 1);
        let then = write(&mut history);
        let bytes = page(&history, then);
        let since = write(&mut history);
        let invoked = history.tick();
        history.may_go_back(&bytes);
        let late = page(&history, since);
        history.read_ended(0, &bytes, invoked);
        history.read_ended(0, &late, invoked);
        history.goes_back(&bytes);
        read(&mut history, then);
        history.judge_all();
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_was_written_since_is_gone() {
        let mut history = History::new(1, 1);
        let then = write(&mut history);
        let bytes = page(&history, then);
        let since = write(&mut history);
        history.goes_back(&bytes);
        read(&mut history, since);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn it_does_not_go_back_over_what_is_written_afterwards() {
        let mut history = History::new(1, 1);
        let then = write(&mut history);
        let bytes = page(&history, then);
        history.goes_back(&bytes);
        write(&mut history);
        read(&mut history, then);
    }
}
