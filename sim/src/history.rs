//! What hosts did to a volume and what they saw, and whether a register per block explains it.
//!
//! Each write carries a value of its own, so a read tells which write it saw. A request belongs to the
//! epoch of the nexus that it was sent to. What an epoch had not answered when a later one served was done
//! by then, or never is: once a read has shown which, it stays so. A loss of power of everybody leaves,
//! of the writes since the last flush, one for each block, and that one stays.
//!
//! A block is *tainted* by a write that failed: it may have reached some replicas and not others, and the
//! block may read either way until a later write is acked.

mod anew;
mod back;
mod forget;
mod whole;

use crate::checks::{Check, check};
use crate::disk::PAGE;
use crate::rng::mix;

/// Whether a nexus makes alike what an earlier one left different.
const RECONCILES: bool = true;
/// Whether a nexus that was cut off stops reads before another serves.
const LEASES: bool = true;
/// A write that has not ended.
const OPEN: u64 = u64::MAX;

#[derive(Debug, Clone, Copy)]
struct Write {
    value: u64,
    invoked: u64,
    ended: u64,
    /// It was done by `ended`, or never will be.
    maybe: bool,
    /// Of the nexus that it was sent to.
    epoch: u64,
    /// A flush that began after it had ended was acked, or it was itself to be durable.
    durable: bool,
    fua: bool,
    /// The loss of power of whose candidates it is one; 0: of none.
    lottery: u32,
    /// The host that it is from.
    host: u128,
    /// It was acked when power was lost under a nexus that lives: a flush of its host that is acked before one has
    /// failed says that it is there.
    owed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Read {
    value: u64,
    invoked: u64,
    ended: u64,
}

#[derive(Debug, Default)]
struct Block {
    writes: Vec<Write>,
    reads: Vec<Read>,
    tainted_at: Option<u64>,
    /// What a read has shown not to be there, and no flush has seen off: the next loss of power may bring it
    /// back, since what took its place may not have been flushed.
    ghosts: Vec<Write>,
    /// It may hold parts of several writes.
    torn: bool,
    /// Reads that began earlier are not judged.
    since: u64,
}

/// All that happened to one volume.
#[derive(Debug)]
pub struct History {
    volume: u64,
    blocks: Vec<Block>,
    clock: u64,
    next_value: u64,
    /// The epochs that were seen to serve, each later than the one before it, and when.
    epochs: Vec<(u64, u64)>,
    lotteries: u32,
    /// Power was lost somewhere, and the epoch of then has not ended yet.
    power_lost: bool,
    /// Whether replicas that a nexus left different are made alike before they are read.
    reconciles: bool,
    /// Whether a loss of power leaves parts of blocks.
    pub tears: bool,
    /// Nobody has a second copy: a block whose write failed may not be readable before it is written again.
    pub alone: bool,
    /// Blocks at the end that others change, of which nothing is known here.
    pub others: u64,
    /// What each block is once the volume is back at a snapshot, while it goes there.
    coming: Vec<u64>,
    /// Writes that are to be done whole or not at all.
    wholes: Vec<whole::Whole>,
    /// Reads that were judged.
    pub judged: u64,
    /// Writes that were acked.
    pub acked: u64,
}

impl History {
    /// A new volume of `blocks` blocks, all of them zeros.
    #[must_use]
    pub fn new(volume: u64, blocks: usize) -> Self {
        let zeros = Write {
            value: 0,
            invoked: 0,
            ended: 0,
            maybe: false,
            epoch: 0,
            durable: true,
            fua: true,
            lottery: 0,
            host: 0,
            owed: false,
        };
        let fresh = || Block { writes: vec![zeros], ..Block::default() };
        Self {
            volume,
            blocks: (0..blocks).map(|_| fresh()).collect(),
            clock: 1,
            next_value: 1,
            epochs: Vec::new(),
            lotteries: 0,
            power_lost: false,
            reconciles: RECONCILES,
            tears: false,
            alone: false,
            others: 0,
            coming: Vec::new(),
            wholes: Vec::new(),
            judged: 0,
            acked: 0,
        }
    }

    /// Size in blocks, without those that others change.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64 - self.others
    }

    /// Whether a block is changed by others.
    #[must_use]
    pub fn is_others(&self, lba: u64) -> bool {
        lba >= self.blocks()
    }

    /// The time of an event: each has its own.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A value that was never written.
    pub fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// A write of `value` (0: of zeros) to each of the blocks was submitted to the nexus of `epoch`.
    /// Returns its time.
    pub fn write_began(
        &mut self,
        (lba, blocks): (u64, u64),
        value: u64,
        (host, epoch): (u128, u64),
        fua: bool,
    ) -> u64 {
        let invoked = self.tick();
        for block in self.range(lba, blocks) {
            block.writes.push(Write {
                value,
                invoked,
                ended: OPEN,
                maybe: false,
                epoch,
                durable: false,
                fua,
                lottery: 0,
                host,
                owed: false,
            });
        }
        invoked
    }

    /// The write was acked.
    pub fn write_acked(&mut self, lba: u64, blocks: u64, invoked: u64) {
        let now = self.tick();
        self.acked += 1;
        for block in self.range(lba, blocks) {
            let Some(write) = block.writes.iter_mut().find(|w| w.invoked == invoked) else {
                continue;
            };
            // A later epoch served before its answer came: it was done by then.
            // What was on its way when everybody lost power may have been done before, and be lost.
            write.maybe = write.ended == OPEN && write.lottery != 0 && !write.fua;
            write.ended = write.ended.min(now);
            write.durable |= write.fua;
            let sure = !write.maybe;
            if sure && block.tainted_at.is_some_and(|at| at < invoked) {
                block.tainted_at = None;
                block.torn = false;
                block.since = now;
                block.reads.clear();
                block.writes.retain(|w| w.ended >= invoked);
            }
        }
    }

    /// A flush of a host that began at `invoked` failed: what was lost before is not owed to it any more.
    pub fn flush_failed(&mut self, host: u128, invoked: u64) {
        self.forgive(|w| w.host == host && w.ended < invoked);
    }

    fn forgive(&mut self, whom: impl Fn(&Write) -> bool) {
        for block in &mut self.blocks {
            for write in block.writes.iter_mut().chain(&mut block.ghosts).filter(|w| whom(w)) {
                write.owed = false;
            }
        }
    }

    /// A flush of a host that began at `invoked` was acked.
    ///
    /// # Panics
    /// Where it covers what a read has shown to be lost.
    pub fn flush_acked(&mut self, host: u128, invoked: u64) {
        for (lba, block) in self.blocks.iter_mut().enumerate() {
            let covered = |w: &Write| w.owed && w.host == host && w.ended < invoked;
            // Unless something was written over it that may be there.
            let over = |w: &Write| block.writes.iter().any(|o| o.ended >= w.invoked);
            let lost = block.ghosts.iter().find(|w| covered(w) && !over(w));
            check!(
                Check::Linearizable,
                lost.is_none(),
                "volume {} block {lba}: a flush ({invoked}) was acked, and what was written before is lost: \
                 {lost:?}",
                self.volume
            );
            for write in block.writes.iter_mut().filter(|w| covered(w)) {
                (write.owed, write.maybe, write.lottery) = (false, false, 0);
            }
            for write in &mut block.writes {
                write.durable |= write.ended < invoked && !write.maybe;
            }
            block.ghosts.retain(|g| g.ended >= invoked);
        }
    }

    /// A nexus of `epoch` serves. What earlier ones have not answered was done by now, or never is.
    pub fn epoch_serves(&mut self, epoch: u64) {
        if self.epochs.last().is_some_and(|(last, _)| *last >= epoch) {
            return;
        }
        let now = self.tick();
        self.epochs.push((epoch, now));
        self.close_wholes(epoch, now);
        // As from any disk that is away for a while.
        self.forgive(|w| w.epoch < epoch);
        if std::mem::take(&mut self.power_lost) {
            self.draw_lots(now, false);
        }
        for at in 0..self.blocks.len() {
            let left = |w: &Write| w.ended == OPEN && w.epoch < epoch;
            if !self.reconciles {
                self.taint(at as u64, now, left);
                continue;
            }
            let block = &mut self.blocks[at];
            for write in block.writes.iter_mut().filter(|w| left(w)) {
                // What a read has seen was done.
                let seen = write.value != 0 && block.reads.iter().any(|r| r.value == write.value);
                (write.maybe, write.ended) = (!seen, now);
            }
        }
    }

    /// An answer came from the nexus of `epoch` to what was asked at `invoked`.
    ///
    /// # Panics
    /// Where a later nexus was known to serve when it was asked.
    pub fn answered(&self, epoch: u64, invoked: u64) {
        let newer = self.epochs.iter().find(|(e, at)| *e > epoch && *at < invoked);
        check!(
            Check::Fencing,
            newer.is_none() || !LEASES,
            "volume {}: the nexus of epoch {epoch} answered what was asked of it at {invoked}, when another \
             was known to serve: {newer:?}",
            self.volume
        );
    }

    /// Replicas lost what their disks had not flushed. Where the nexus lives, it takes them out; the next
    /// one may find that nobody has what was not flushed.
    /// Where there is nobody else (`alone`) this one serves on without it.
    pub fn power_was_lost(&mut self, alone: bool) {
        self.power_lost = true;
        if alone {
            let now = self.tick();
            self.draw_lots(now, true);
        }
    }

    /// Likewise, and the nexus died with them: its hosts have seen their controllers go, and no flush tells them.
    pub fn power_was_lost_with_the_nexus(&mut self) {
        self.power_lost = true;
        self.forgive(|_| true);
        let now = self.tick();
        self.draw_lots(now, false);
    }

    /// Of what was written to a block and not flushed, any one may be left.
    fn draw_lots(&mut self, now: u64, lives: bool) {
        self.lotteries += 1;
        let lottery = self.lotteries;
        let last = self.epochs.last().map_or(0, |(epoch, _)| *epoch);
        for at in 0..self.blocks.len() {
            self.judge(at);
            let block = &mut self.blocks[at];
            let kept = |w: &Write| {
                let over = |d: &Write| d.durable && !d.maybe && d.invoked > w.ended;
                !block.writes.iter().any(over)
            };
            let all = block.ghosts.iter().chain(&block.writes);
            let mut candidates: Vec<Write> = all.copied().filter(kept).collect();
            candidates.sort_by_key(|w| w.invoked);
            block.writes = candidates;
            block.ghosts.clear();
            block.reads.clear();
            block.since = now;
            // Where a write that failed was written over, what was there before that is not known.
            let unknown = !block.writes.iter().any(|w| w.durable && !w.maybe);
            // Nor what a write that failed left of itself.
            block.torn |= self.tears && block.tainted_at.is_some();
            if block.writes.len() < 2 && !unknown {
                continue;
            }
            if self.tears || !self.reconciles || unknown {
                block.tainted_at = Some(now);
                block.torn = self.tears;
                continue;
            }
            // One that is still on its way is done by a nexus that lives, or is closed with its epoch.
            for write in &mut block.writes {
                write.lottery = lottery;
                if write.ended != OPEN {
                    write.owed |= !write.maybe && !write.durable && write.epoch >= last && lives;
                    write.maybe = true;
                    write.ended = write.ended.min(now);
                }
            }
        }
    }

    /// The write was answered with an error: it may have been done in part, and must not be done later.
    pub fn write_failed(&mut self, lba: u64, blocks: u64, invoked: u64) {
        let now = self.tick();
        for at in lba..lba + blocks {
            self.taint(at, now, |w| w.invoked == invoked);
        }
    }

    /// The write met a full pool: each block has it or has not, and stays so. (What zeros a read saw
    /// cannot be told, so a write of zeros counts as one that may go either way.)
    pub fn write_found_no_space(&mut self, lba: u64, blocks: u64, invoked: u64) {
        let now = self.tick();
        for at in lba..lba + blocks {
            let block = &mut self.blocks[usize::try_from(at).expect("a small volume")];
            match block.writes.iter_mut().find(|w| w.invoked == invoked) {
                Some(write) if write.value != 0 => {
                    write.ended = now;
                    write.maybe = true;
                }
                _ => self.taint(at, now, |w| w.invoked == invoked),
            }
        }
    }

    fn taint(&mut self, lba: u64, now: u64, gone: impl Fn(&Write) -> bool) {
        let at = usize::try_from(lba).expect("a small volume");
        if self.blocks[at].writes.iter().any(&gone) {
            self.judge(at);
            let block = &mut self.blocks[at];
            block.writes.retain(|w| !gone(w));
            block.reads.clear();
            block.tainted_at = Some(now);
        }
    }

    /// Whether a loss of power may have left parts of several writes.
    #[must_use]
    pub fn may_be_torn(&self, lba: u64) -> bool {
        self.blocks[usize::try_from(lba).expect("a small volume")].torn
    }

    /// Whether a block may not be readable: a write to it failed, or may have without anybody having been told, and
    /// nobody has a second copy.
    #[must_use]
    pub fn may_be_unreadable(&self, lba: u64) -> bool {
        let block = &self.blocks[usize::try_from(lba).expect("a small volume")];
        let unsure = |w: &Write| w.maybe || w.ended == OPEN;
        self.alone && (block.tainted_at.is_some() || block.writes.iter().any(unsure))
    }

    /// Whether replicas may differ in this block.
    #[must_use]
    pub fn may_differ(&self, lba: u64) -> bool {
        let block = &self.blocks[usize::try_from(lba).expect("a small volume")];
        let last = self.epochs.last().map_or(0, |(epoch, _)| *epoch);
        let open = |w: &Write| w.ended == OPEN && (!self.reconciles || w.epoch >= last);
        let lots = self.power_lost && !self.reconciles;
        lots || block.tainted_at.is_some() || block.writes.iter().any(open)
    }

    /// A read that began at `invoked` returned `bytes`.
    ///
    /// # Panics
    /// Where it returned what it must not.
    pub fn read_ended(&mut self, lba: u64, bytes: &[u8], invoked: u64) {
        self.read_ended_but(lba, bytes, invoked, |_| false);
    }

    /// As [`History::read_ended`], where nothing is known of some blocks.
    ///
    /// # Panics
    /// Where it returned what it must not.
    pub fn read_ended_but(
        &mut self,
        lba: u64,
        bytes: &[u8],
        invoked: u64,
        unknown: impl Fn(u64) -> bool,
    ) {
        let now = self.tick();
        if !self.wholes.is_empty() && self.coming.is_empty() {
            let torn = |lba: u64| {
                let block = &self.blocks[usize::try_from(lba).expect("a small volume")];
                block.torn || self.tears && invoked < block.since || unknown(lba)
            };
            let known = (lba..).zip(bytes.chunks(PAGE));
            let values: Vec<Option<u64>> =
                known.map(|(lba, b)| (!torn(lba)).then(|| self.decode(lba, b))).collect();
            self.judge_wholes(lba, &values, (invoked, now));
        }
        for (lba, bytes) in (lba..).zip(bytes.chunks(PAGE)) {
            let at = usize::try_from(lba).expect("a small volume");
            // A read that was asked for while it was torn may have seen that.
            let was_torn = self.tears && invoked < self.blocks[at].since;
            if self.blocks[at].torn || was_torn || unknown(lba) {
                continue;
            }
            let value = self.decode(lba, bytes);
            let block = &mut self.blocks[usize::try_from(lba).expect("a small volume")];
            let is_back = self.coming.get(at).is_some_and(|then| *then == value);
            if block.tainted_at.is_some() || invoked < block.since || is_back {
                continue;
            }
            let admissible = block.writes.iter().any(|w| {
                let over = |later: &Write| {
                    let later_for_sure = later.invoked > w.ended && later.ended < invoked;
                    later.value != value && !later.maybe && later_for_sure
                };
                w.value == value && w.invoked < now && !block.writes.iter().any(over)
            });
            check!(
                Check::Linearizable,
                admissible,
                "volume {} block {lba}: a read ({invoked}..{now}) returned {value}; writes: {:?}",
                self.volume,
                block.writes
            );
            block.reads.push(Read { value, invoked, ended: now });
            // A write that may have been done was, where it was read; and was not, where something older
            // was read after it had ended.
            let before = block.writes.iter().filter(|w| w.value == value).map(|w| w.ended).max();
            let older = before.unwrap_or(OPEN);
            let ghosts = &mut block.ghosts;
            let gone =
                |w: &Write| w.maybe && w.value != value && older < w.invoked && w.ended < invoked;
            ghosts.extend(block.writes.extract_if(.., |w| gone(w)).filter(|w| !w.durable));
            // Which zeros a read saw cannot be told, where there are several.
            let same = block.writes.iter().filter(|w| w.value == value).count();
            let mut won = 0;
            for write in block.writes.iter_mut().filter(|w| w.value == value && same == 1) {
                write.maybe = false;
                won = std::mem::take(&mut write.lottery);
            }
            // One that is still on its way is done later perhaps.
            let lost = |w: &Write| won != 0 && w.lottery == won && w.ended != OPEN;
            ghosts.extend(block.writes.extract_if(.., |w| lost(w)));
            self.judged += 1;
        }
    }

    /// Judges what has not been judged.
    ///
    /// # Panics
    /// Where a block's reads went back.
    pub fn judge_all(&mut self) {
        for at in 0..self.blocks.len() {
            self.judge(at);
        }
    }

    /// Each value has a zone: from when it was first known to be there to when it last was. Zones of
    /// values that were there for a while do not overlap, and no value comes and goes inside another's.
    fn judge(&mut self, at: usize) {
        let block = &self.blocks[at];
        let mut zones = Vec::with_capacity(block.writes.len());
        for write in block.writes.iter().filter(|w| !w.maybe) {
            let (mut first_end, mut last_begin) = (write.ended, write.invoked);
            if write.value != 0 {
                for read in block.reads.iter().filter(|r| r.value == write.value) {
                    first_end = first_end.min(read.ended);
                    last_begin = last_begin.max(read.invoked);
                }
            }
            if first_end != OPEN {
                zones.push((first_end, last_begin, write.value));
            }
        }
        for &(end, begin, value) in zones.iter().filter(|(end, begin, _)| end < begin) {
            for &(other_end, other_begin, other) in &zones {
                if (other_end, other_begin, other) == (end, begin, value) {
                    continue;
                }
                // Two that were there for a while overlap, or one came and went inside the other.
                let clash = end < other_begin && other_end < begin;
                check!(
                    Check::Linearizable,
                    !clash,
                    "volume {} block {at}: value {value} was there from {end} to {begin}, and \
                     {other} meanwhile ({other_end}, {other_begin}); writes {:?}, reads {:?}",
                    self.volume,
                    block.writes,
                    block.reads
                );
            }
        }
    }

    fn range(&mut self, lba: u64, blocks: u64) -> &mut [Block] {
        let at = |n: u64| usize::try_from(n).expect("a small volume");
        &mut self.blocks[at(lba)..at(lba + blocks)]
    }

    /// Fills a block with what a write of `value` puts there.
    pub fn encode(&self, lba: u64, value: u64, out: &mut [u8]) {
        for (i, word) in words(self.volume, lba, value).zip(out.chunks_exact_mut(8)) {
            word.copy_from_slice(&i.to_le_bytes());
        }
    }

    /// The value that a block holds.
    ///
    /// # Panics
    /// Where the block holds what was never written there.
    #[must_use]
    pub fn decode(&self, lba: u64, bytes: &[u8]) -> u64 {
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("eight bytes"));
        let value = word(&bytes[..8]);
        let right = if value == 0 {
            bytes == [0; PAGE]
        } else {
            words(self.volume, lba, value)
                .zip(bytes.chunks_exact(8))
                .all(|(want, got)| want == word(got))
        };
        let (volume, block) = (word(&bytes[8..16]), word(&bytes[16..24]));
        check!(
            Check::RightData,
            right,
            "volume {} block {lba} holds a block that was never written there: value {value}, \
             of volume {volume} block {block}, or a part of it",
            self.volume
        );
        assert!(value <= self.next_value, "volume {} block {lba} holds {value}", self.volume);
        value
    }
}

fn words(volume: u64, lba: u64, value: u64) -> impl Iterator<Item = u64> {
    let seed = mix(value ^ mix(lba ^ mix(volume)));
    (0..PAGE as u64 / 8).map(move |i| match i {
        0 => value,
        1 => volume,
        2 => lba,
        _ => seed.wrapping_mul(2 * i + 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(history: &mut History, value: u64) {
        let invoked = history.tick();
        read_since(history, value, invoked);
    }

    fn read_since(history: &mut History, value: u64, invoked: u64) {
        let mut page = [0; PAGE];
        if value != 0 {
            history.encode(0, value, &mut page);
        }
        history.read_ended(0, &page, invoked);
    }

    fn write(history: &mut History) -> u64 {
        let value = history.fresh_value();
        let at = history.write_began((0, 1), value, (1, 1), false);
        history.write_acked(0, 1, at);
        value
    }

    #[test]
    fn reads_see_the_last_write_or_a_concurrent_one() {
        let mut history = History::new(1, 1);
        read(&mut history, 0);
        let a = write(&mut history);
        read(&mut history, a);
        let b = history.fresh_value();
        let at = history.write_began((0, 1), b, (1, 1), false);
        read(&mut history, a);
        read(&mut history, b);
        history.write_acked(0, 1, at);
        read(&mut history, b);
        history.judge_all();
        assert_eq!(history.judged, 5);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn a_stale_read_is_caught() {
        let mut history = History::new(1, 1);
        let a = write(&mut history);
        let _b = write(&mut history);
        read(&mut history, a);
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn a_lost_first_write_is_caught() {
        let mut history = History::new(1, 1);
        let _a = write(&mut history);
        read(&mut history, 0);
    }

    #[test]
    #[should_panic(expected = "meanwhile")]
    fn a_read_that_goes_back_is_caught() {
        let mut history = History::new(1, 1);
        let a = write(&mut history);
        let b = history.fresh_value();
        let at = history.write_began((0, 1), b, (1, 1), false);
        read(&mut history, b);
        read(&mut history, a);
        history.write_acked(0, 1, at);
        history.judge_all();
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn what_a_read_saw_of_a_dead_nexus_stays() {
        let mut history = History::new(1, 1);
        history.epoch_serves(1);
        let a = write(&mut history);
        let b = history.fresh_value();
        let _at = history.write_began((0, 1), b, (1, 1), false);
        read(&mut history, b);
        history.epoch_serves(2);
        read(&mut history, a);
    }

    #[test]
    fn after_a_failure_anything_goes_until_the_next_ack() {
        let mut history = History::new(1, 1);
        let a = write(&mut history);
        let b = history.fresh_value();
        let at = history.write_began((0, 1), b, (1, 1), false);
        history.write_failed(0, 1, at);
        read(&mut history, a);
        read(&mut history, b);
        read(&mut history, a);
        assert!(history.may_differ(0));
        let c = write(&mut history);
        read(&mut history, c);
        history.judge_all();
        assert!(!history.may_differ(0));
    }

    #[test]
    #[should_panic(expected = "a read")]
    fn a_failed_write_that_lands_later_is_caught() {
        let mut history = History::new(1, 1);
        let b = history.fresh_value();
        let at = history.write_began((0, 1), b, (1, 1), false);
        history.write_failed(0, 1, at);
        let _c = write(&mut history);
        read(&mut history, b);
    }
}
