//! Volumes whose members are lost, and which are started by force from what is left.

use cairn_engine::VolumeReport;

use super::members::Operator;
use super::{Repair, Run, STUCK_NS, WORK_NS};
use crate::checks::{Check, check};
use crate::cluster::is_member;
use crate::world::MS;

/// How often whoever looks after the cluster asks whether a volume has to be started by force.
const PERIOD: u64 = 500 * MS;

/// Whether hosts are answered.
fn is_up(report: &VolumeReport) -> bool {
    let has_data = report.children.iter().any(|c| c.in_sync && c.connected);
    report.serving && report.state != "suspended" && has_data
}

impl Run {
    /// Starts each volume by force that has not come up for a while and cannot, since pools are gone.
    pub(super) fn force_what_is_lost(&mut self, now: u64) {
        let forced = (0..self.cluster.volume_count()).any(|volume| self.cluster.is_forced(volume));
        if now < self.next_force || !(forced || self.cluster.any_is_gone()) {
            return;
        }
        self.next_force = now + PERIOD;
        for volume in 0..self.cluster.volume_count() {
            self.look_at_lost(volume, now);
        }
        if forced {
            self.mend(Repair::StartOther);
            self.cluster.supervise();
        }
    }

    fn look_at_lost(&mut self, volume: usize, now: u64) {
        let report = self.cluster.report_of(self.cluster.active(), volume);
        let Some(operator) = self.operator.as_mut() else { return };
        if self.cluster.is_forced(volume) {
            // It may be done, and not be known to be.
            if report.is_some_and(|r| r.serving) && self.cluster.force_serves(volume) {
                self.cluster.force_is_done(volume);
                operator.begin_anew(&mut self.cluster, volume);
                self.forced_at = now;
            }
            return;
        }
        let up = report.as_ref().is_some_and(is_up);
        if !operator.is_stuck(volume, up, now, STUCK_NS) {
            return;
        }
        let Some(left) = self.cluster.what_is_left(volume) else { return };
        if let Some(report) = report.filter(|report| !report.serving) {
            let names = left.missing.iter().all(|id| report.detail.contains(&id.to_string()));
            // A nexus that has just been started has not heard who is missing.
            if !names && operator.asks_again(volume) {
                return;
            }
            // Nor does one that is not told of any replica that is left.
            let hears = left.sources.iter().any(|seat| self.cluster.is_named(volume, seat.id));
            check!(
                Check::Liveness,
                names || !self.recovering || !hears,
                "volume {volume} waits for {:?}, and says: {}",
                left.missing,
                report.detail
            );
        }
        let Some(source) = operator.choose(&left.sources) else { return };
        let random = u32::try_from(self.rng.below(1 << 32)).expect("32 bits");
        self.cluster.start_by_force(volume, source, random);
        operator.take_from(volume, source);
        self.forced += 1;
        self.forced_at = now;
        self.mend(Repair::StartOther);
    }
}

/// Each phase of a forced start ends within this time.
const PHASE_NS: u64 = 60_000 * MS;

impl Run {
    /// Every member in sync is lost, for good or until it is too late, and one is left that missed writes: the
    /// volumes wait for those that are lost, and say so, until they are started by force from it. Then they
    /// are what that one holds, and what comes back of the others is never taken for a part of them.
    pub(super) fn end_by_force(&mut self) {
        let Some(source) = self.source_of_all() else { return };
        let now = self.cluster.world().now_ns();
        let operator = self.operator.take();
        self.operator = Some(operator.unwrap_or_else(|| Operator::quiet(&self.cluster, now)));
        self.cluster.world().say(format_args!("all but pool {source} will be lost"));
        self.miss_writes(source);
        let others: Vec<usize> =
            (0..self.cluster.pools()).filter(|&at| at != source && self.holds_data(at)).collect();
        // Everything dies, or only those.
        if self.rng.chance(500) {
            self.cluster.kill_process(0);
            self.cluster.kill_process(1);
        }
        for at in &others {
            if self.rng.chance(300) {
                self.cluster.cut_power(*at);
            }
            self.cluster.take_away(*at);
        }
        self.mend(Repair::StartReplica(source));
        self.mend(Repair::StartNexus);
        self.mend(Repair::StartOther);
        self.await_refusal();
        self.await_force();
        let mut back = others.clone();
        back.retain(|_| self.rng.chance(600));
        for at in back {
            self.cluster.come_back(at);
            match self.cluster.home(at) {
                Some(which) => self.cluster.kill_process(which),
                None => self.mend(Repair::StartReplica(at)),
            }
        }
        if let Some(operator) = self.operator.as_mut() {
            operator.give_up_gone(&self.cluster);
        }
        if self.rng.chance(500) {
            self.stir();
        }
        self.mend(Repair::StartNexus);
        self.mend(Repair::StartOther);
        self.verify();
        self.cluster.work_more(40 + self.rng.below(100));
        self.await_work();
        self.come_to_rest();
        self.verify();
        self.await_rebuilds();
        self.delete_retired();
        let quiet = self.cluster.world().now_ns() + 5_000 * MS;
        self.cluster.run_until(quiet);
        self.scrub();
    }

    fn holds_data(&mut self, at: usize) -> bool {
        let reports = self.cluster.volumes().unwrap_or_default();
        let mut children = reports.iter().flat_map(|report| &report.children);
        children.any(|c| is_member(c) && !c.witness && self.cluster.pool_of(c.replica) == at)
    }

    /// A pool with a member of every volume, where each has others.
    fn source_of_all(&mut self) -> Option<usize> {
        let reports = self.cluster.volumes().ok()?;
        let holds = |at: usize, r: &VolumeReport| {
            let data = r.children.iter().filter(|c| c.in_sync);
            let pools: Vec<usize> = data.map(|c| self.cluster.pool_of(c.replica)).collect();
            pools.len() > 1 && pools.contains(&at)
        };
        let all = 0..self.cluster.pools();
        let all: Vec<usize> = all.filter(|&at| reports.iter().all(|r| holds(at, r))).collect();
        (!all.is_empty()).then(|| all[self.rng.index(all.len())])
    }

    /// The pool is away while hosts write, where the others may go on without it.
    fn miss_writes(&mut self, source: usize) {
        if self.cluster.is_local(source) {
            return;
        }
        self.cluster.kill_replica(source);
        let reports = self.cluster.volumes().unwrap_or_default();
        let few = |r: &VolumeReport| r.children.iter().filter(|c| is_member(c)).count() < 3;
        if reports.iter().any(few) {
            return;
        }
        self.cluster.work_more(20 + self.rng.below(80));
        self.await_work();
    }

    fn await_work(&mut self) {
        let limit = self.cluster.world().now_ns() + WORK_NS;
        while !self.cluster.clients_are_done() {
            let now = self.cluster.world().now_ns();
            check!(
                Check::Liveness,
                now < limit,
                "the work does not end: {:?}",
                self.cluster.volumes()
            );
            self.repair(now);
            if self.cluster.has_second() {
                self.cluster.supervise();
            }
            self.operate(now);
            self.cluster.run_while(50 * MS, crate::cluster::Cluster::clients_are_done);
        }
    }

    /// No volume serves, and each says which replicas it waits for; that is looked at where it is started by
    /// force.
    fn await_refusal(&mut self) {
        let until = self.cluster.world().now_ns() + STUCK_NS / 2;
        // One that is alive still may serve until it misses them; and one may have missed nothing.
        let mut seen_down = vec![false; self.cluster.volume_count()];
        while self.cluster.world().now_ns() < until {
            let now = self.cluster.world().now_ns();
            for (volume, seen_down) in seen_down.iter_mut().enumerate() {
                let report = self.cluster.report_of(self.cluster.active(), volume);
                let up = report.as_ref().is_some_and(is_up);
                check!(
                    Check::Linearizable,
                    !up || !*seen_down,
                    "volume {volume} serves without those that had its writes: {report:?}"
                );
                *seen_down |= !up && self.cluster.what_is_left(volume).is_some();
            }
            self.cluster.run_until(now + 100 * MS);
        }
    }

    /// Each is started by force, while the nexus may die.
    fn await_force(&mut self) {
        let limit = self.cluster.world().now_ns() + PHASE_NS;
        let mut dies = self.cluster.world().now_ns() + self.rng.below(2 * STUCK_NS);
        loop {
            let now = self.cluster.world().now_ns();
            check!(
                Check::Liveness,
                now < limit,
                "a volume is not started by force: {:?}",
                self.cluster.volumes()
            );
            self.operate(now);
            let reports = self.cluster.volumes().unwrap_or_default();
            let volumes = self.cluster.volume_count();
            let done = reports.len() == volumes && reports.iter().all(is_up);
            if done && (0..volumes).all(|volume| !self.cluster.is_forced(volume)) {
                return;
            }
            if now >= dies {
                // In the midst of it, with luck.
                dies = u64::MAX;
                self.stir();
            }
            let soon = [MS / 10, MS, 20 * MS][self.rng.index(3)];
            self.cluster.run_until(now + soon);
        }
    }

    /// The nexus dies and is started again.
    fn stir(&mut self) {
        self.cluster.kill_nexus();
        let now = self.cluster.world().now_ns();
        self.cluster.run_until(now + self.rng.below(300 * MS));
        self.mend(Repair::StartNexus);
    }
}
