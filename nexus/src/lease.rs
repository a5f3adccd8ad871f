//! The lease that a nexus answers reads under.
//!
//! A nexus that was cut off, together with a member that missed writes since, must not answer reads
//! from it: that the member itself does not refuse is no proof that no newer nexus serves. So a read is
//! answered only while a majority of the voters has granted a renewal that was sent less than
//! [`NexusConfig::lease_ms`](crate::NexusConfig::lease_ms) ago. Each of them tells whoever asks it to promise a newer epoch for how long
//! what it granted lasts; a majority that promises has a voter in common with every majority that granted,
//! and the new nexus stores nothing, and serves nothing, before that is over. Clocks are compared
//! nowhere, only spans; [`clock_margin`] is for clocks that run at different rates.
//!
//! Writes need no lease: a write is acked once every in-sync member of the newest configuration has it, and
//! a nexus that takes over has bound one of them to its epoch, which refuses it. Of a read only one
//! member is asked.
//!
//! The data is read at once and only the answer waits, so a read costs a compare where there is a lease.
//! Renewals are sent while there are reads, once half of the lease is over, and with each round of settling: an
//! idle volume sends none, unless another nexus stands by for it. They also tell of voters that are asked
//! nothing else, as witnesses are: one whose pool is offline refuses.
//!
//! That nothing is stored before the wait is over has a use: who has stored the configuration that is
//! found, has waited. Where that was an earlier process of the same node, which is known to be dead, nobody
//! is left that could answer reads, and there is no wait.

use cairn_block::IoStatus;
use cairn_block::mutants::{Mutant, on};

use crate::children::{ChildState, FaultReason};
use crate::nexus::Nexus;
use crate::register::RegisterOp;
use crate::slots::{ChildSet, Phase};
use crate::types::{ChildId, ChildReply, MAX_CHILDREN, VolumeState};

/// Where nobody answers, renewals are sent again after this part of the lease.
const AGAIN: u64 = 8;

/// What a lease of so many milliseconds, measured by another clock, lasts at most by this one: 5 % more.
pub(crate) const fn clock_margin(ms: u64) -> u64 {
    ms + ms / 20 + 1
}

#[derive(Debug, Default)]
pub(crate) struct Lease {
    /// Reads are answered before this time.
    pub(crate) until_ms: u64,
    /// A read that is submitted at this time or later has renewals sent.
    pub(crate) renew_at_ms: u64,
    /// When the last renewal was sent that each child granted.
    granted: [Option<u64>; MAX_CHILDREN],
    /// Those that are not answered: their round, and when they were sent.
    asked: [Option<(u32, u64)>; MAX_CHILDREN],
    /// Children that have promised a newer epoch.
    refused: ChildSet,
    /// Reads that are done and wait to be answered.
    held: Vec<u16>,
    /// Somebody waits for it who is to be told something else.
    wanted: bool,
    /// It was given back.
    released: bool,
}

impl Lease {
    pub(crate) fn new(requests: usize) -> Self {
        Self { held: Vec::with_capacity(requests), ..Self::default() }
    }

    /// A child in this place was not there before.
    pub(crate) fn forget(&mut self, child: ChildId) {
        self.granted[usize::from(child.0)] = None;
        self.asked[usize::from(child.0)] = None;
        self.refused = self.refused.without(ChildSet::of(child));
    }

    pub(crate) fn is_asked(&self, child: ChildId, round: u32) -> bool {
        self.asked[usize::from(child.0)].is_some_and(|(asked, _)| asked == round)
    }

    pub(crate) fn is_released(&self) -> bool {
        self.released
    }

    pub(crate) fn holds_reads(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether anybody waits for it.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.wanted || self.holds_reads()
    }

    pub(crate) fn drop_held(&mut self) {
        self.held.clear();
        self.wanted = false;
    }
}

impl Nexus {
    /// The read's data is in its buffer: it is answered now, or as soon as there is a lease.
    pub(crate) fn answer_read(&mut self, at: u16, now_ms: u64) {
        if now_ms < self.lease.until_ms || on(Mutant::NoLease) {
            self.answer(at, IoStatus::Ok);
            return;
        }
        self.slots.slot(at).phase = Phase::Held;
        self.lease.held.push(at);
        self.renew_if_due(now_ms);
        self.update_state();
    }

    /// Asks the voters for a lease, where that is due.
    pub(crate) fn renew_if_due(&mut self, now_ms: u64) {
        if now_ms < self.lease.renew_at_ms || self.lease.released {
            return;
        }
        let lease_ms = self.config.lease_ms;
        self.lease.renew_at_ms = now_ms + (lease_ms / AGAIN).max(1);
        for child in self.voters.and(self.connected()).iter() {
            let place = usize::from(child.0);
            let joins = self.child(child).state == ChildState::Joining;
            if joins || self.lease.asked[place].is_some() {
                continue;
            }
            self.round += 1;
            let (round, epoch) = (self.round, self.epoch);
            self.lease.asked[place] = Some((round, now_ms));
            self.ask(child, round, RegisterOp::Renew { epoch, lease_ms });
        }
    }

    /// Whether what is stored of the volume may be told: nobody has stored anything else since. Where it may not,
    /// [`Nexus::want_lease`], and ask again after the next [`Nexus::handle_register`].
    #[must_use]
    pub fn has_lease(&self, now_ms: u64) -> bool {
        self.state.is_serving() && (now_ms < self.lease.until_ms || on(Mutant::NoLease))
    }

    /// Has the voters be asked for a lease until there is one.
    pub fn want_lease(&mut self, now_ms: u64) {
        self.lease.wanted = true;
        self.renew_if_due(now_ms);
    }

    /// Asks again where somebody waits: a voter may be back.
    pub(crate) fn renew_for_held(&mut self, now_ms: u64) {
        if self.lease.is_waited_for() {
            self.renew_if_due(now_ms);
        }
    }

    /// Keeps the lease, where others look at it.
    pub(crate) fn keep_lease(&mut self, now_ms: u64) {
        if self.keeps_lease() {
            self.renew_if_due(now_ms);
        }
    }

    fn keeps_lease(&self) -> bool {
        let over = |s: &VolumeState| {
            matches!(s, VolumeState::Fenced | VolumeState::Refused(_) | VolumeState::StandBy(_))
        };
        self.config.shared && self.assembly.is_none() && !over(&self.state)
    }

    /// When the lease is to be kept next.
    pub(crate) fn lease_timeout(&self, now_ms: u64) -> Option<u64> {
        let keeps = self.keeps_lease() && !self.lease.released;
        keeps.then(|| self.lease.renew_at_ms.max(now_ms + 1))
    }

    pub(crate) fn handle_renew_reply(&mut self, child: ChildId, reply: &ChildReply, now_ms: u64) {
        let asked = self.lease.asked[usize::from(child.0)].take();
        match reply {
            // It misses the next write, if it has not missed one.
            Err(IoStatus::MediaError) if self.assembly.is_none() && self.state.is_serving() => {
                self.fail_child(child, FaultReason::PoolOffline);
            }
            Err(IoStatus::MediaError | IoStatus::PathError) => {}
            Ok(_) | Err(_) => self.note_not_offline(child),
        }
        match (reply, asked) {
            (Ok(_), Some((_, sent_ms))) => {
                let sent_ms = if on(Mutant::LeaseFromAnswer) { now_ms } else { sent_ms };
                self.lease.granted[usize::from(child.0)] = Some(sent_ms);
                self.lease.refused = self.lease.refused.without(ChildSet::of(child));
                self.count_lease(now_ms);
            }
            (Err(IoStatus::Fenced), _) => {
                self.lease.refused = self.lease.refused.with(child);
                if self.voters.has_majority_in(self.lease.refused) && self.state.is_serving() {
                    self.fence();
                }
            }
            _ => {}
        }
    }

    /// Until when reads are answered, by what a majority has granted.
    pub(crate) fn count_lease(&mut self, now_ms: u64) {
        let mut sent = [0; MAX_CHILDREN];
        let mut count = 0;
        for child in self.voters.iter() {
            if let Some(sent_ms) = self.lease.granted[usize::from(child.0)] {
                sent[count] = sent_ms;
                count += 1;
            }
        }
        let needed = self.voters.majority();
        if count < needed || self.lease.released {
            self.lease.until_ms = 0;
            return;
        }
        // The newest that a majority has granted, or something newer.
        sent[..count].sort_unstable();
        let until_ms = sent[count - needed] + self.config.lease_ms;
        self.lease.until_ms = until_ms;
        if now_ms < until_ms {
            let half = until_ms - self.config.lease_ms / 2;
            self.lease.renew_at_ms = self.lease.renew_at_ms.max(half);
            self.lease.wanted = false;
            let waited = self.lease.holds_reads();
            while let Some(at) = self.lease.held.pop() {
                self.answer(at, IoStatus::Ok);
            }
            if waited {
                self.update_state();
            }
        }
    }

    /// Whether reads wait, and too few voters are there to let them go on.
    pub(crate) fn lacks_lease(&self) -> bool {
        self.lease.holds_reads() && !self.voters.has_majority_in(self.able())
    }

    /// Whether another nexus may serve by now, since this one can reach no majority and its lease has been over for
    /// long enough that one which stands by would have taken the volume over.
    #[must_use]
    pub fn is_cut_off(&self, now_ms: u64) -> bool {
        // Who gives its lease back ends, or hands the volume over.
        let keeps = self.keeps_lease() && !self.lease.released;
        let over_ms = self.lease.until_ms + self.config.lease_ms / 2;
        keeps && now_ms >= over_ms && !self.voters.has_majority_in(self.connected())
    }

    /// Whether every voter that is there knows that the lease was given back.
    #[must_use]
    pub fn lease_is_back(&self) -> bool {
        let asked = |c: ChildId| self.lease.asked[usize::from(c.0)].is_some();
        self.lease.released && !self.voters.and(self.connected()).iter().any(asked)
    }

    /// Answers no more reads, and has the voters know: whoever takes the volume over need not wait.
    pub fn release_lease(&mut self) {
        let granted = self.lease.granted.iter().any(Option::is_some);
        (self.lease.until_ms, self.lease.released) = (0, true);
        if !granted || !self.state.is_serving() {
            return;
        }
        for child in self.voters.and(self.connected()).iter() {
            self.round += 1;
            let (round, epoch) = (self.round, self.epoch);
            self.lease.asked[usize::from(child.0)] = Some((round, 0));
            self.ask(child, round, RegisterOp::Renew { epoch, lease_ms: 0 });
        }
    }
}
