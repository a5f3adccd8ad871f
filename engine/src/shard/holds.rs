//! Ranges of a volume that a command of several requests holds against changes by others, whatever transport they come on.
//!
//! A hold is asked for first: changes that begin later wait behind it. It is had once those that began before are over. So
//! a volume without holds costs a request one look at an empty list, and nobody waits for ever. Reads are not held up:
//! what is changed is changed by one request.

use std::collections::VecDeque;

use cairn_block::LbaRange;
use cairn_block::mutants::{Mutant, on};
use cairn_nvmf::target::NamespaceHandle;
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export};

#[derive(Debug, Clone, Copy)]
struct Hold {
    range: LbaRange,
    job: u32,
    order: u64,
    /// It is had.
    granted: bool,
}

/// The holds of one volume, in the order in which they were asked for, and the requests that wait.
#[derive(Debug, Default)]
pub(super) struct Holds {
    holds: Vec<Hold>,
    waiting: VecDeque<u32>,
    /// Counts holds, and requests that met one.
    order: u64,
}

impl Holds {
    pub(super) fn is_empty(&self) -> bool {
        self.holds.is_empty()
    }

    fn next_order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    /// Whether a request that came so early has to wait. One that is waiting goes before holds that were asked for since.
    fn blocks(&self, range: LbaRange, order: u64) -> bool {
        let goes_first = |hold: &Hold| hold.granted || hold.order < order;
        self.holds.iter().any(|hold| goes_first(hold) && hold.range.overlaps(range))
    }
}

impl<D: Driver> Shard<D> {
    fn holds_of(&mut self, namespace: NamespaceHandle) -> Option<&mut Holds> {
        let Some(&mut Export::Volume(volume)) = self.export(namespace) else { return None };
        self.volumes.get_mut(volume).map(|v| &mut v.holds)
    }

    /// A job is to have a range for itself: it hears of it when it has.
    pub(super) fn hold(&mut self, namespace: NamespaceHandle, range: LbaRange, job: u32) {
        match self.holds_of(namespace) {
            Some(holds) => {
                let order = holds.next_order();
                holds.holds.push(Hold { range, job, order, granted: false });
                self.release_holds(namespace);
            }
            // Its requests fail.
            None => self.job_holds(job),
        }
    }

    /// A job has done what it held a range for.
    pub(super) fn let_go(&mut self, namespace: NamespaceHandle, job: u32) {
        if let Some(holds) = self.holds_of(namespace) {
            holds.holds.retain(|hold| hold.job != job);
            self.freed_volumes.push(namespace);
        }
        // A hand-over may have waited for it.
        if let Some(&mut Export::Volume(volume)) = self.export(namespace) {
            self.touch_volume(volume);
        }
    }

    /// A request of a volume is over: a hold may have waited for that.
    pub(super) fn release_holds(&mut self, namespace: NamespaceHandle) {
        let mut at = 0;
        while let Some(&hold) = self.holds_of(namespace).and_then(|h| h.holds.get(at)) {
            let earlier = !on(Mutant::HoldsNothing)
                && self.holds_of(namespace).is_some_and(|h| {
                    h.holds.iter().take(at).any(|other| other.range.overlaps(hold.range))
                });
            if !hold.granted && !earlier && !self.is_changing(namespace, &hold) {
                if let Some(holds) = self.holds_of(namespace) {
                    holds.holds[at].granted = true;
                }
                self.job_holds(hold.job);
            }
            at += 1;
        }
    }

    /// Whether a change of the range is under way, or waits and came before the hold.
    fn is_changing(&mut self, namespace: NamespaceHandle, hold: &Hold) -> bool {
        let Some(holds) = self.holds_of(namespace) else { return false };
        let waiting = std::mem::take(&mut holds.waiting);
        let changes = |(at, io): (u32, &super::io::HostIo)| {
            io.changes(namespace, hold.range) && (!waiting.contains(&at) || io.order < hold.order)
        };
        let found = self.ios.iter().any(changes);
        if let Some(holds) = self.holds_of(namespace) {
            holds.waiting = waiting;
        }
        found
    }

    /// Whether a request has to wait for a hold: then it does.
    pub(super) fn is_held(&mut self, volume: u32, io: u32) -> bool {
        let holds = &mut self.volumes[volume].holds;
        let one = &mut self.ios[io];
        if one.order == 0 {
            one.order = holds.next_order();
        }
        let (asker, op, range) = one.wants();
        let own = |hold: &Hold| matches!(asker, Asker::Job(job) if job == hold.job);
        let held = op.is_mutation()
            && !holds.holds.iter().any(own)
            && holds.blocks(range, self.ios[io].order);
        if held {
            holds.waiting.push_back(io);
        }
        held
    }

    /// The volume is going: whoever waits goes on, and is refused.
    pub(super) fn drop_holds(&mut self, volume: u32, now: u64) {
        let Holds { holds, waiting, .. } = std::mem::take(&mut self.volumes[volume].holds);
        for hold in holds.iter().filter(|hold| !hold.granted) {
            self.job_holds(hold.job);
        }
        for io in waiting {
            self.dispatch(io, now);
        }
    }

    /// Lets go on what waited for holds that are over. Returns whether anything did.
    pub(super) fn run_freed(&mut self, now: u64) -> bool {
        let mut moved = false;
        while let Some(namespace) = self.freed_volumes.pop() {
            moved = true;
            // Those that began to wait first go first. The holds behind wait for what goes on now.
            let waiting = self.holds_of(namespace).map(|h| std::mem::take(&mut h.waiting));
            for io in waiting.unwrap_or_default() {
                self.dispatch(io, now);
            }
            self.release_holds(namespace);
        }
        moved
    }
}
