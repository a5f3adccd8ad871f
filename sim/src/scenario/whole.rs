//! Writes that are done whole or not at all, over the bound of two extents, while everybody loses power or the nexus dies.

use super::Run;
use super::focus::WRITES;
use crate::client::{Aim, Orders};
use crate::world::MS;

/// Blocks on each side of the bound.
const BESIDE: u64 = 12;

impl Run {
    pub(super) fn whole_round(&mut self) {
        let bound = 256 * (1 + self.rng.below(3));
        let aim = Aim::Within(bound - BESIDE, BESIDE);
        let reads = Orders { requests: 16, depth: 4, reads_per_mille: 1000, aim, ..WRITES };
        self.slow_down();
        for _ in 0..1 + self.rng.below(4) {
            // A few at once, so that what each finds there was written before it.
            let depth = [1, 1, 3][self.rng.index(3)];
            let requests = 4 + self.rng.below(12);
            self.tell(Orders { requests, depth, reads_per_mille: 0, aim, ..WRITES });
            let moment = self.moment() * [1, 10][self.rng.index(2)];
            self.pass(5 * MS + moment);
            let soon = self.moment();
            match self.rng.below(4) {
                0 => self.nexus_dies(soon),
                1 => {
                    self.nexus_dies(soon);
                    let at = self.any_pool();
                    self.loses_power(at, soon / 2);
                }
                _ => self.all_lose_power(soon),
            }
            self.tell(reads);
            self.pass_busy(2_000 * MS);
        }
        self.settle_down();
    }
}
