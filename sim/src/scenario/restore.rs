//! Volumes that go back to a snapshot, while members are away, nexuses die, and power is lost.

use super::focus::WRITES;
use super::{Repair, Run};
use crate::client::{Aim, Orders};
use crate::rng::Rng;
use crate::world::MS;

/// What a run does after all else, where its seed says so; drawn apart.
pub(super) fn drawn(seed: u64) -> Option<Rng> {
    let mut rng = Rng::new(seed ^ 0x4e57);
    rng.chance(150).then_some(rng)
}

impl Run {
    /// Rounds that all they draw is from elsewhere for.
    pub(super) fn restore_rounds(&mut self, rng: Rng) {
        let own = std::mem::replace(&mut self.rng, rng);
        for _ in 0..1 + self.rng.below(3) {
            self.restore_round();
        }
        self.rng = own;
    }

    /// A snapshot is taken, more is written, and the volume goes back, while this and that goes wrong.
    pub(super) fn restore_round(&mut self) {
        let volume = self.rng.index(self.cluster.volume_count());
        let aim = if self.rng.chance(400) { Aim::Extents } else { self.area() };
        let requests = 10 + self.rng.below(40);
        self.tell(Orders { requests, depth: 16, aim, ..WRITES });
        self.pass_busy(1_000 * MS);
        if self.rng.chance(250) {
            // It has no part in the snapshot.
            let at = self.any_pool();
            self.leaves(at);
        }
        let id = u128::from(self.now());
        self.cluster.take_snapshot(volume, id);
        let moment = 20 * MS + self.moment() * 4;
        self.pass(moment);
        let aim = if self.rng.chance(400) { Aim::Extents } else { self.area() };
        let requests = 10 + self.rng.below(40);
        self.tell(Orders { requests, depth: 16, aim, ..WRITES });
        if self.rng.chance(600) {
            self.pass_busy(1_000 * MS);
        } else {
            let moment = self.moment();
            self.pass(moment);
        }
        if self.rng.chance(300) {
            let at = self.any_pool();
            self.leaves(at);
            let moment = self.moment();
            self.pass(moment);
        }
        self.slow_down();
        let mut rng = self.rng.fork();
        if !self.cluster.go_back(volume, &mut rng) {
            return self.settle_down();
        }
        for _ in 0..1 + self.rng.below(3) {
            self.disturb_restore();
            if self.rng.chance(300) {
                let longer = self.rng.below(400 * MS);
                self.pass(longer);
            }
            if !self.cluster.goes_back() {
                break;
            }
        }
        let reads_per_mille = [200, 600, 1000][self.rng.index(3)];
        let aim = if self.rng.chance(400) { Aim::Sweep } else { aim };
        self.tell(Orders { requests: 64, depth: 8, reads_per_mille, aim, ..WRITES });
        self.pass_busy(3_000 * MS);
        self.settle_down();
    }

    /// Something happens at a moment of a restore.
    fn disturb_restore(&mut self) {
        let moment = self.moment();
        self.pass(moment);
        if self.rng.chance(300) {
            // They wait, or come before it.
            let aim = self.area();
            self.tell(Orders { requests: 10, depth: 8, aim, ..WRITES });
        }
        let (at, soon) = (self.any_pool(), self.moment());
        match self.rng.below(9) {
            0 | 1 => self.nexus_dies(soon),
            2 => self.loses_power(at, soon),
            3 => self.all_lose_power(soon),
            4 | 5 => self.leaves(at),
            6 => {
                self.nexus_dies(soon);
                self.leaves(at);
            }
            7 if self.cluster.has_second() => {
                let next = 1 - self.cluster.active();
                if self.rng.chance(500) {
                    self.cluster.kill_nexus();
                    self.repairs.push((self.now() + 50 * MS, Repair::StartOther));
                }
                if !self.cluster.process_runs(next) {
                    self.cluster.start_process(next);
                }
                self.cluster.take_over();
            }
            _ => {}
        }
    }
}
