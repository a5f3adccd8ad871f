//! The leases that the replicas of a pool have granted.

use cairn_block::Epoch;
use cairn_replica::{MultiPool, ReplicaSlot};

/// What each replica of a pool has granted, in this process's memory alone: one that has just been opened
/// takes it that it had granted a lease at the last moment.
#[derive(Debug, Default)]
pub(super) struct Leases(Vec<Lease>);

#[derive(Debug)]
struct Lease {
    slot: ReplicaSlot,
    epoch: Epoch,
    until_ms: u64,
}

impl Leases {
    /// Those of a pool that has just been opened. A replica that has promised nothing has granted nothing.
    pub(super) fn assumed(pool: &MultiPool, until_ms: u64) -> Self {
        let promised = pool.replicas().filter_map(|r| {
            let epoch = pool.register(r.slot)?.promised_epoch;
            (epoch > Epoch(0)).then_some(Lease { slot: r.slot, epoch, until_ms })
        });
        Self(promised.collect())
    }

    /// The replica grants one to an epoch, of which there is none newer. Whoever had an earlier one was waited
    /// for by then, but for the same epoch's.
    pub(super) fn grant(&mut self, slot: ReplicaSlot, epoch: Epoch, until_ms: u64) {
        let lease = Lease { slot, epoch, until_ms };
        match self.0.iter_mut().find(|l| l.slot == slot) {
            Some(found) => *found = lease,
            None => self.0.push(lease),
        }
    }

    /// For how long one lasts that was granted to an epoch other than this.
    pub(super) fn left(&self, slot: ReplicaSlot, epoch: Epoch, now_ms: u64) -> u64 {
        let found = self.0.iter().find(|l| l.slot == slot && l.epoch != epoch);
        found.map_or(0, |l| l.until_ms.saturating_sub(now_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_told_to_other_epochs_until_it_is_over_or_given_back() {
        let mut leases = Leases::default();
        let (a, b) = (ReplicaSlot(1), ReplicaSlot(2));
        assert_eq!(leases.left(a, Epoch(5), 0), 0);
        leases.grant(a, Epoch(4), 100);
        assert_eq!(leases.left(a, Epoch(4), 10), 0);
        assert_eq!(leases.left(a, Epoch(5), 10), 90);
        assert_eq!(leases.left(a, Epoch(5), 200), 0);
        assert_eq!(leases.left(b, Epoch(5), 10), 0);
        leases.grant(a, Epoch(4), 20);
        assert_eq!(leases.left(a, Epoch(5), 20), 0);
    }
}
