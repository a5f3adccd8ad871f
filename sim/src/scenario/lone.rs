//! A volume of one replica, whose disk fails single operations: there is no other to heal it from. A read that fails is
//! an error or is right, never wrong data; a write that fails is done or is not; what a flush that failed was to cover
//! may be lost, and no flush is acked over it.

use super::{Repair, Run};
use crate::client::{Aim, Orders};
use crate::rng::Rng;
use crate::scenario::focus::WRITES;
use crate::world::MS;

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slip {
    /// So many operations, whatever they are.
    Some(u32),
    /// A flush; what it was to cover may be lost by that.
    Flush,
    /// Whoever looks after the cluster starts the process anew whose pool is offline.
    Look,
}

fn drawn(rng: &mut Rng) -> Slip {
    if rng.chance(400) {
        Slip::Flush
    } else {
        Slip::Some(1 + u32::try_from(rng.below(3)).expect("a few"))
    }
}

/// What fails in a volume that has one replica, and when; drawn apart: nothing else changes with it.
pub(super) fn slips(seed: u64, lone: bool, now: u64) -> Vec<(u64, Slip)> {
    let mut rng = Rng::new(seed ^ 0x10ae);
    if !lone || !rng.chance(600) {
        return Vec::new();
    }
    let most = [50, 500, 4_000][rng.index(3)] * MS;
    let mut plan = Vec::new();
    for _ in 0..1 + rng.index(4) {
        let at = now + rng.below(most);
        plan.push((at, drawn(&mut rng)));
        plan.push((at + MS + rng.below(2_000 * MS), Slip::Look));
    }
    plan
}

/// Between seeing that a pool is offline and starting its process anew: the process has told by then what its disk
/// failed to do. Nobody would know of it where it died at that very moment.
const REACTION_NS: u64 = 20 * MS;

impl Run {
    /// Has fail what is to.
    pub(super) fn slip_alone(&mut self, now: u64) {
        let due: Vec<_> = self.slips.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, slip) in due {
            self.fail_once(slip);
        }
    }

    fn fail_once(&mut self, slip: Slip) {
        let disk = self.cluster.disk(0);
        let mut world = self.cluster.world();
        world.say(format_args!("the only replica: {slip:?}"));
        let trouble = &mut world.disk(disk).trouble;
        match slip {
            Slip::Some(times) => trouble.eio_next = times,
            Slip::Flush => (trouble.eio_flushes, trouble.forgets) = (1, true),
            Slip::Look => {
                drop(world);
                self.start_what_is_offline();
            }
        }
    }

    /// Starts the processes anew whose pool is offline.
    pub(super) fn start_what_is_offline(&mut self) {
        if (0..self.cluster.pools()).any(|at| self.cluster.pool_is_offline(at)) {
            let soon = self.cluster.world().now_ns() + REACTION_NS;
            self.cluster.run_until(soon);
        }
        for at in 0..self.cluster.pools() {
            if !self.cluster.pool_is_offline(at) {
                continue;
            }
            match self.cluster.home(at) {
                Some(which) => self.cluster.kill_process(which),
                None => self.cluster.kill_replica(at),
            }
            self.mend(Repair::Disk(at));
            self.mend(Repair::StartReplica(at));
        }
        self.mend(Repair::StartNexus);
        self.mend(Repair::StartOther);
    }

    /// Hosts write, flush and read while something fails once; somebody notices, sooner or later.
    pub(super) fn lone_round(&mut self) {
        self.slow_down();
        let aim = match self.rng.below(3) {
            0 => Aim::Within(self.rng.below(1000), 1 + self.rng.below(12)),
            1 => Aim::Extents,
            _ => Aim::Each(0, 1024),
        };
        let flushes_per_mille = [0, 10, 100, 400][self.rng.index(4)];
        let gap_ns = [0, MS, 5 * MS][self.rng.index(3)];
        let depth = [1, 4, 32][self.rng.index(3)];
        let requests = 20 + self.rng.below(80);
        let reads_per_mille = [100, 500][self.rng.index(2)];
        let work =
            Orders { requests, depth, gap_ns, reads_per_mille, flushes_per_mille, aim, ..WRITES };
        self.tell(work);
        let moment = self.moment();
        self.pass(moment);
        let slip = drawn(&mut self.rng.fork());
        self.fail_once(slip);
        if self.rng.chance(300) {
            // Settling rounds flush; hosts do not.
            self.tell(Orders { flushes_per_mille: 0, fua_per_mille: 0, ..work });
        }
        let moment = self.moment() * 4;
        self.pass(moment);
        if self.rng.chance(150) {
            let soon = self.moment();
            self.nexus_dies(soon);
        }
        self.start_what_is_offline();
        let moment = self.moment();
        self.pass(moment);
        // The next flush tells what was lost.
        self.tell(Orders { requests: 20, flushes_per_mille: 600, ..work });
        self.pass_busy(1_000 * MS);
        self.start_what_is_offline();
        self.tell(Orders { requests: 64, reads_per_mille: 1000, aim: Aim::Sweep, ..work });
        self.pass_busy(1_000 * MS);
        self.start_what_is_offline();
        self.settle_down();
    }
}
