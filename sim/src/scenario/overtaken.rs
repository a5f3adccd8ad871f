//! Reads that a write overtakes on the member that is asked, while no other member gets the write.

use super::Run;
use super::focus::WRITES;
use crate::client::{Aim, Orders};
use crate::rng::Rng;
use crate::world::MS;

impl Run {
    /// One member is slow, and the only one that is reached; then the nexus dies. What the others never got may
    /// have been read nowhere.
    pub(super) fn overtaken_round(&mut self, rng: &mut Rng) {
        let pools = self.cluster.replicas();
        let local = (0..pools).find(|&at| self.cluster.is_local(at));
        let asked = local.unwrap_or_else(|| rng.index(pools));
        for at in 0..pools {
            let disk = self.cluster.disk(at);
            let slow_ns = if at == asked { [3 * MS, 25 * MS][rng.index(2)] } else { 0 };
            self.cluster.world().disk(disk).trouble.slow_ns = slow_ns;
        }
        let aim = Aim::Within(rng.below(1000), 1 + rng.below(3));
        let reading = Orders { requests: 12, depth: 4, reads_per_mille: 1000, aim, ..WRITES };
        self.tell(reading);
        self.pass(rng.below(4 * MS));
        let nexus = self.cluster.active_machine();
        for at in (0..pools).filter(|&at| at != asked) {
            let machine = self.cluster.machine_of(at);
            if machine != nexus {
                self.cluster.world().block(nexus, machine, 400 * MS);
            }
        }
        self.tell(Orders { requests: 60, depth: 16, reads_per_mille: 500, ..reading });
        self.pass(5 * MS + rng.below(55 * MS));
        self.nexus_dies(1);
        self.tell(Orders { requests: 60, depth: 8, gap_ns: 2 * MS, ..reading });
        self.pass_busy(2_500 * MS);
    }
}
