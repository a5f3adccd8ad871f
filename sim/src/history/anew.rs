//! A volume that is started by force: what one replica holds is the volume from then on.

use super::{Block, History, PAGE, Write, words};

impl History {
    /// The volume is from now on these bytes, whatever was written before: each block holds something that
    /// was written to it once, or zeros. What is still under way for earlier nexuses is never done.
    ///
    /// # Panics
    /// Where a block holds anything else.
    pub fn starts_anew(&mut self, bytes: &[u8]) {
        let now = self.tick();
        // What that took is not there any more.
        self.power_lost = false;
        self.forget_wholes();
        for (at, bytes) in bytes.chunks(PAGE).enumerate() {
            self.judge(at);
            let lba = at as u64;
            let torn = self.tears && !self.is_whole(lba, bytes);
            let value = if torn { 0 } else { self.decode(lba, bytes) };
            let write = Write {
                value,
                invoked: now,
                ended: now,
                maybe: false,
                epoch: 0,
                // Its disk may not have been flushed.
                durable: false,
                fua: false,
                lottery: 0,
                host: 0,
                owed: false,
            };
            let tainted_at = torn.then_some(now);
            self.blocks[at] =
                Block { writes: vec![write], tainted_at, torn, since: now, ..Block::default() };
        }
    }

    /// Whether a block holds one value, and not parts of several.
    fn is_whole(&self, lba: u64, bytes: &[u8]) -> bool {
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("eight bytes"));
        let value = word(&bytes[..8]);
        if value == 0 {
            return bytes.iter().all(|&byte| byte == 0);
        }
        words(self.volume, lba, value).zip(bytes.chunks_exact(8)).all(|(w, got)| w == word(got))
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

    fn two_writes() -> (History, u64, u64) {
        let mut history = History::new(1, 1);
        let mut write = || {
            let value = history.fresh_value();
            let at = history.write_began((0, 1), value, (1, 1), false);
            history.write_acked(0, 1, at);
            value
        };
        let (a, b) = (write(), write());
        (history, a, b)
    }

    #[test]
    fn what_the_source_holds_is_read_from_then_on() {
        let (mut history, a, _) = two_writes();
        let bytes = page(&history, a);
        let late = history.write_began((0, 1), a + 7, (1, 1), false);
        history.starts_anew(&bytes);
        history.write_acked(0, 1, late);
        let invoked = history.tick();
        history.read_ended(0, &bytes, invoked);
        history.judge_all();
        assert_eq!(history.judged, 1);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_was_lost_by_force_does_not_come_back() {
        let (mut history, a, b) = two_writes();
        let (old, new) = (page(&history, a), page(&history, b));
        history.starts_anew(&old);
        let invoked = history.tick();
        history.read_ended(0, &new, invoked);
    }
}
