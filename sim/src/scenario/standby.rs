//! Two machines that stand by for each other: the volumes are handed over, taken over by hand and by themselves,
//! while the one that serves dies, stops, or is cut off.

use super::focus::WRITES;
use super::{Repair, Run};
use crate::checks::{Check, check};
use crate::client::{Aim, Orders};
use crate::cluster::{Cluster, ClusterConfig, Roles};
use crate::rng::Rng;
use crate::world::MS;

/// Two machines that stand by for each other, in place of whatever else serves the volumes.
pub(super) fn shape(config: &mut ClusterConfig, seed: u64) {
    let mut rng = Rng::new(seed ^ 0x57b1);
    let auto = |rng: &mut Rng| rng.chance(700).then(|| [0, 500, 3_000][rng.index(3)]);
    let roles = Roles { auto_after_ms: [auto(&mut rng), auto(&mut rng)] };
    config.tuning.roles = Some(roles);
    config.second = true;
    // Who is cut off reads its own replica.
    config.local_replica = rng.chance(600);
    // Of several each may be served by another machine.
    config.volumes = 1;
}

impl Run {
    /// The volume changes hands, in one way or another.
    pub(super) fn standby_round(&mut self) {
        let old = self.cluster.active();
        let hot = Aim::Within(self.rng.below(1000), 1 + self.rng.below(8));
        let gap_ns = [0, MS, 15 * MS][self.rng.index(3)];
        let reading =
            Orders { requests: 500, depth: 4, gap_ns, reads_per_mille: 900, aim: hot, ..WRITES };
        let writing = Orders { reads_per_mille: 200, ..reading };
        let first = [reading, writing][self.rng.index(2)];
        self.tell(first);
        let moment = 30 * MS + self.moment();
        self.pass(moment);
        if !self.cluster.process_runs(1 - old) {
            self.mend(Repair::StartOther);
            self.cluster.supervise();
            self.pass(50 * MS);
        }
        let long = 500 * MS + self.rng.below(3_500 * MS);
        let calm = self.rng.chance(300);
        if calm {
            self.calm_hand_over(old);
        } else {
            if self.rng.chance(400) {
                self.slow_down();
            }
            if self.rng.chance(300) {
                let at = self.any_pool();
                self.leaves(at);
            }
            if self.rng.chance(600) {
                // A write that hangs would keep a host from reading on.
                self.tell(Orders { reads_per_mille: 1000, gap_ns: 15 * MS, ..reading });
            }
            self.disturb(old, long, writing);
        }
        for host in 0..self.cluster.hosts() {
            if self.rng.chance(500) {
                self.cluster.move_host(host);
                self.cluster.order(host, writing);
            }
        }
        let most = 1_500 * MS + self.rng.below(3_000 * MS);
        self.pass(most);
        if self.rng.chance(500) {
            self.cluster.world().heal();
            self.cluster.world().resume_all();
            self.pass(200 * MS);
        }
        self.tell(Orders { requests: 0, ..WRITES });
        self.pass_busy(500 * MS);
        self.look_when_quiet();
    }

    /// Nothing goes wrong: what hosts have sent is answered before the volume changes hands.
    fn calm_hand_over(&mut self, from: usize) {
        let quiet = |cluster: &mut Cluster| {
            let all = cluster.glance();
            all.len() == cluster.volume_count() && all.iter().all(|r| r.state == "online")
        };
        self.cluster.world().heal();
        self.cluster.world().resume_all();
        for at in 0..self.cluster.pools() {
            self.mend(Repair::Disk(at));
            self.mend(Repair::StartReplica(at));
        }
        if !self.pass_until(3_000 * MS, quiet) || self.cluster.active() != from {
            return;
        }
        self.cluster.take_cut_off();
        self.cluster.hand_over(from, 3_000 * MS);
        let cut_off = self.cluster.take_cut_off();
        check!(
            Check::OneAtATime,
            cut_off == 0,
            "{cut_off} requests were cut off when the volume was handed over, and nothing was wrong"
        );
    }

    /// Something happens to the one that serves, and perhaps somebody tells the machines to change roles.
    fn disturb(&mut self, old: usize, long: u64, writing: Orders) {
        let old_machine = self.cluster.active_machine();
        let mut others = self.machines();
        others.retain(|m| *m != old_machine);
        let kind = self.rng.below(12);
        match kind {
            0 | 1 => {
                let patience = [0, 3 * MS, 300 * MS, 3_000 * MS][self.rng.index(4)];
                self.cluster.hand_over(old, patience);
            }
            2 => self.cluster.tell_to_take_over(1 - old),
            3 => {
                self.cluster.tell_to_stand_by(old);
                let moment = self.moment();
                self.pass(moment);
                self.nexus_dies(long);
            }
            4 => self.nexus_dies(long),
            5 => self.cluster.pause_process(old, long),
            6 => {
                // It hears of nobody, and may still be heard for a while.
                let soon = self.rng.below(520 * MS);
                for other in &others {
                    self.cluster.world().block(*other, old_machine, long);
                }
                self.pass(soon);
                for other in &others {
                    self.cluster.world().block(old_machine, *other, long);
                }
            }
            7 | 10 | 11 => {
                // One replica may be cut off with it.
                let with = self.rng.chance(500).then(|| self.rng.index(others.len()));
                for (at, other) in others.iter().enumerate() {
                    if with != Some(at) {
                        self.cluster.world().block(old_machine, *other, long);
                        self.cluster.world().block(*other, old_machine, long);
                    }
                }
            }
            8 => {
                // Both are told at once, and the one that serves dies perhaps.
                self.cluster.tell_to_stand_by(old);
                self.cluster.tell_to_take_over(1 - old);
                self.cluster.tell_to_take_over(old);
            }
            _ => {
                self.cluster.hand_over(old, 3_000 * MS);
                let moment = self.moment();
                self.pass(moment);
                self.cluster.hand_over(1 - old, 300 * MS);
            }
        }
        if matches!(kind, 5..=7 | 10 | 11) && self.rng.chance(600) {
            // Whoever is told now has to wait: the other answers reads still.
            let moment = self.moment() * 3;
            self.pass(moment);
            self.cluster.tell_to_take_over(1 - old);
            for host in (1..self.cluster.hosts()).step_by(2) {
                self.cluster.move_host(host);
                self.cluster.order(host, writing);
            }
            self.pass(1_500 * MS);
            return;
        }
        if self.rng.chance(300) {
            let moment = 10 * self.moment();
            self.pass(moment);
            let which = self.rng.index(2);
            self.cluster.tell_to_take_over(which);
        }
        if self.rng.chance(150) {
            let moment = 10 * self.moment();
            self.pass(moment);
            self.cluster.kill_process(1 - old);
            self.repairs.push((self.now() + long, Repair::StartOther));
        }
    }

    /// Nobody takes a volume from one that serves it and reaches everybody.
    pub(super) fn stays_where_it_is(&mut self) {
        let epochs = |cluster: &mut Cluster| -> Vec<(bool, u64)> {
            cluster.glance().iter().map(|r| (r.serving, r.epoch)).collect()
        };
        let before = epochs(&mut self.cluster);
        let end = self.now() + 4_000 * MS;
        while self.now() < end {
            self.cluster.supervise();
            let next = self.now() + 200 * MS;
            self.cluster.run_until(next);
        }
        let after = epochs(&mut self.cluster);
        check!(
            Check::OneAtATime,
            before == after,
            "the volume was taken from one that served it and reached everybody: {before:?}, then {after:?}"
        );
    }
}
