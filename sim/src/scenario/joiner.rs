//! What hosts write and read the moment that a member is taken back.

use super::focus::WRITES;
use super::{Repair, Run};
use crate::client::{Aim, Orders};
use crate::cluster::Cluster;
use crate::rng::Rng;
use crate::world::MS;

impl Run {
    /// A member was away for a moment, lacks little and joins; nothing reaches it any more before that is stored,
    /// and then the nexus dies. What was acked meanwhile, it must have.
    pub(super) fn joiner_round(&mut self, rng: &mut Rng) {
        let pools = self.cluster.replicas();
        let away: Vec<usize> = (0..pools).filter(|&at| !self.cluster.is_local(at)).collect();
        if away.is_empty() {
            return;
        }
        // The first is the one whose copy is taken where members differ.
        let victim = if rng.chance(500) { away[0] } else { away[rng.index(away.len())] };
        let aim = Aim::Within(rng.below(1000), 1 + rng.below(20));
        self.cluster.kill_replica(victim);
        self.repairs.push((self.now() + 30 * MS, Repair::StartReplica(victim)));
        self.tell(Orders { requests: 10, gap_ns: MS, aim, ..WRITES });
        if !self.pass_until(4_000 * MS, Cluster::lacks_a_member) {
            return;
        }
        let slow_ns = [3 * MS, 10 * MS, 25 * MS][rng.index(3)];
        for at in 0..pools {
            let disk = self.cluster.disk(at);
            let slow_ns = if at == victim { slow_ns } else { 0 };
            self.cluster.world().disk(disk).trouble.slow_ns = slow_ns;
        }
        let busy = Orders { requests: 20_000, depth: 16, gap_ns: MS, aim, ..WRITES };
        self.tell(busy);
        if !self.pass_until(3_000 * MS, Cluster::joins) {
            return;
        }
        self.pass(rng.below(2 * slow_ns));
        let (machine, nexus) = (self.cluster.machine_of(victim), self.cluster.active_machine());
        self.cluster.world().block(nexus, machine, 400 * MS);
        self.pass_until(100 * MS, |cluster| !cluster.lacks_a_member());
        self.tell(Orders { requests: 0, ..busy });
        if pools == 3 {
            // Nor do two others outvote it.
            if let Some(&other) = away.iter().rfind(|&&at| at != victim) {
                self.cluster.kill_replica(other);
                self.repairs.push((self.now() + 1_500 * MS, Repair::StartReplica(other)));
            }
        }
        self.nexus_dies(1);
        self.cluster.world().heal();
        self.tell(Orders { requests: 60, reads_per_mille: 1_000, ..busy });
        self.pass_busy(2_000 * MS);
    }
}
