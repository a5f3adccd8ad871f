//! How long a child is waited for, and how soon one that went out is taken back.

use cairn_block::IoOp;

use crate::children::Child;
use crate::nexus::Nexus;
use crate::slots::{ChildSet, Phase, Slot};
use crate::types::ChildId;

/// A request may take so many times what requests took lately.
const FACTOR: u64 = 32;
/// What requests took lately is counted in this part of a millisecond: most take less than one.
const PARTS: u64 = 256;
/// The last request counts for so much of it.
const WEIGHT: u64 = 64;

/// A child that went out is taken back after so long at the earliest,
const HOLD_OFF_MS: u64 = 1_000;
/// which doubles each time, up to this,
const HOLD_OFF_MAX_MS: u64 = 300_000;
/// and begins anew after so long without another.
const FORGET_MS: u64 = 600_000;

/// What requests of a child took lately.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    parts: u64,
}

impl Latency {
    /// Of a child of which nothing is known: it is waited for as long as may be.
    pub(crate) const fn new(most_ms: u64) -> Self {
        Self { parts: most_ms * PARTS / FACTOR }
    }

    /// A request took so long.
    pub(crate) const fn note(&mut self, ms: u64) {
        // A slow one counts at once as a little, and for long.
        self.parts = self.parts - self.parts / WEIGHT + ms * PARTS / WEIGHT;
    }

    const fn limit_ms(self) -> u64 {
        self.parts * FACTOR / PARTS
    }
}

/// How often a child went out of the in-sync set lately.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Trouble {
    times: u32,
    last_ms: u64,
    until_ms: u64,
}

impl Trouble {
    /// It went out.
    pub(crate) fn note(&mut self, now_ms: u64) {
        if now_ms.saturating_sub(self.last_ms) >= FORGET_MS {
            self.times = 0;
        }
        let wait_ms = HOLD_OFF_MS << self.times.min(16);
        self.times += 1;
        self.last_ms = now_ms;
        self.until_ms = now_ms + wait_ms.min(HOLD_OFF_MAX_MS);
    }

    /// Until when it is not to be taken back.
    pub(crate) const fn until_ms(&self) -> u64 {
        self.until_ms
    }

    pub(crate) const fn times(&self) -> u32 {
        self.times
    }
}

/// Requests that take about as long as others do; what the rest take depends on much else.
const fn is_paced(op: IoOp) -> bool {
    matches!(op, IoOp::Read | IoOp::Write { .. })
}

impl Nexus {
    /// For how many milliseconds more a child that went out is not to be taken back; nothing where it may be
    /// now. One that goes out again and again is held off for longer each time.
    #[must_use]
    pub fn hold_off_ms(&self, child: ChildId, now_ms: u64) -> Option<u64> {
        let trouble = self.children[usize::from(child.0)].trouble;
        (now_ms < trouble.until_ms).then(|| trouble.until_ms - now_ms)
    }

    /// No child is given up sooner.
    pub(crate) fn least_deadline_ms(&self) -> u64 {
        self.config.child_deadline_min_ms.min(self.config.child_deadline_ms)
    }

    /// A child has done a request.
    pub(crate) fn note_latency(child: &mut Child, op: IoOp, ms: u64) {
        if is_paced(op) {
            child.latency.note(ms);
        }
    }

    /// Whether one of these is there: it answered something a moment ago. One whose session is up may have lost
    /// power, with the connection not ended yet, or this nexus have been stopped for longer than anything
    /// may take; whoever is late may be better than that. Where none has answered they are asked.
    pub(crate) fn one_is_there(&mut self, left: ChildSet, now_ms: u64) -> bool {
        let moment = (self.least_deadline_ms() / 4).max(20);
        let there = |c: ChildId| {
            let c = &self.children[usize::from(c.0)];
            c.connected && (c.local || now_ms <= c.heard_ms + moment)
        };
        if left.iter().any(there) || self.lease.is_released() {
            return left.iter().any(|c| self.children[usize::from(c.0)].connected);
        }
        if !left.and(self.connected()).is_empty() {
            self.probes = true;
            if now_ms >= self.probed_ms + moment / 2 {
                self.probed_ms = now_ms;
                self.lease.renew_at_ms = 0;
                self.renew_if_due(now_ms);
            }
        }
        false
    }

    /// The children that a request has waited for in vain for too long.
    pub(crate) fn missed_by(&self, slot: &Slot, now_ms: u64) -> ChildSet {
        let waits = slot.outstanding.without(slot.failed);
        let ms = now_ms.saturating_sub(slot.started_ms);
        let (least, most) = (self.least_deadline_ms(), self.config.child_deadline_ms);
        if slot.phase != Phase::Running || ms < least {
            return ChildSet::EMPTY;
        }
        waits.iter().fold(ChildSet::EMPTY, |set, child| {
            let own = self.children[usize::from(child.0)].latency.limit_ms();
            let limit = if is_paced(slot.request.op) { own.clamp(least, most) } else { most };
            if ms >= limit { set.with(child) } else { set }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_child_is_given_less_time_than_a_slow_one() {
        let mut latency = Latency::new(5_000);
        assert_eq!(latency.limit_ms(), 5_000);
        (0..1_000).for_each(|_| latency.note(1));
        assert!((25..=40).contains(&latency.limit_ms()), "{}", latency.limit_ms());
        // One that is slow for once does not change that much, one that has become slow does.
        latency.note(100);
        assert!((60..=90).contains(&latency.limit_ms()), "{}", latency.limit_ms());
        (0..1_000).for_each(|_| latency.note(100));
        assert!((3_000..=3_300).contains(&latency.limit_ms()), "{}", latency.limit_ms());
    }

    #[test]
    fn a_child_that_goes_out_again_and_again_is_held_off_for_longer() {
        let mut trouble = Trouble::default();
        let mut now = 1_000_000;
        let mut waits = Vec::new();
        for _ in 0..12 {
            trouble.note(now);
            waits.push(trouble.until_ms - now);
            now = trouble.until_ms;
        }
        assert_eq!(&waits[..4], [1_000, 2_000, 4_000, 8_000]);
        assert_eq!(waits[11], HOLD_OFF_MAX_MS);
        trouble.note(now + FORGET_MS);
        assert_eq!((trouble.times(), trouble.until_ms), (1, now + FORGET_MS + 1_000));
    }
}
