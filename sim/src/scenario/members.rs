//! Shapes with witnesses and spare pools, and an operator: replicas are added, removed and replaced while
//! hosts work and things go wrong, and pools are lost for good.
//!
//! The operator has a goal for each volume, the members that it is to have, and asks for one step towards it at a
//! time, as `cairn/src/service` does: make a replica, add it, wait for its data, remove what is no goal.

use std::sync::mpsc::{Receiver, TryRecvError};

use cairn_block::ReplicaId;
use cairn_engine::{EngineError, VolumeReport};

use super::{Faults, Repair, Run};
use crate::cluster::{Cluster, ClusterConfig, Seat, WitnessPlace, is_member, is_whole};
use crate::rng::Rng;
use crate::world::MS;

/// How often the operator looks.
const PERIOD: u64 = 50 * MS;
/// An answer that takes longer is not waited for: the nexus may be dead.
const PATIENCE: u64 = 8_000 * MS;

/// Gives a cluster witnesses and spare pools, drawn apart: most have neither.
pub(super) fn shape(seed: u64, faults: &Faults, config: &mut ClusterConfig) {
    let mut rng = Rng::new(seed ^ 0x3e3b);
    if rng.chance(200) && (2..=3).contains(&config.replicas) {
        config.witness = Some(match rng.index(4) {
            0 if !config.local_replica => WitnessPlace::First,
            1 if config.second && !config.second_local => WitnessPlace::Second,
            _ => WitnessPlace::Apart,
        });
        if rng.chance(700) {
            config.replicas = 2;
        }
    }
    // A copy of what rots, or of what runs full, may be the one that is taken away.
    let calm = !faults.rot && !faults.slips && !faults.full;
    if rng.chance(250) && calm {
        config.spares = 1 + rng.index(2);
    }
    if rng.chance(150) && calm {
        config.wide_pool = Some(rng.index(config.replicas));
    }
}

/// Whether a seed ends with a forced start, drawn apart.
pub(super) fn ends_by_force(seed: u64, faults: &Faults) -> bool {
    let calm = !faults.rot && !faults.slips && !faults.full;
    calm && Rng::new(seed ^ 0xf0bc).chance(150)
}

/// What is to become of a volume's members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Add,
    Remove,
    Replace,
    AddWitness,
    RemoveWitness,
    /// A pool is lost for good, and what it held replaced.
    Lose,
    /// The machine that is not to serve the volume is asked for another change.
    Elsewhere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Make(Seat),
    Add(Seat),
    Remove,
}

/// Whether a replica was not added since it has promised an epoch of an older lineage.
fn told_newer(error: &EngineError) -> bool {
    error.to_string().contains("it has promised a newer epoch")
}

/// What was asked, and when.
#[derive(Debug)]
struct Asked {
    step: Step,
    answer: Receiver<Result<(), EngineError>>,
    since: u64,
    /// Of which of the two machines.
    which: usize,
}

#[derive(Debug, Default)]
struct Volume {
    goal: Vec<Seat>,
    /// What it was to have before it was started by force.
    before: Vec<Seat>,
    /// Replicas that were made.
    made: Vec<ReplicaId>,
    asked: Option<Asked>,
    /// Since when it was seen not to answer hosts.
    down_since: Option<u64>,
    /// How often whoever would start it by force has waited once more.
    waits: u32,
    /// What is no goal is removed at once, and not when the others have all data.
    at_once: bool,
}

/// Whoever changes the members of volumes.
#[derive(Debug)]
pub(super) struct Operator {
    rng: Rng,
    plan: Vec<(u64, usize, Wish)>,
    volumes: Vec<Volume>,
    next_look: u64,
    /// A pool was lost.
    lost: bool,
    /// Changes that were asked for.
    pub(super) asked: u64,
}

impl Operator {
    /// One with wishes.
    pub(super) fn drawn(seed: u64, cluster: &Cluster, now: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x09e2);
        let most = [100, 600, 3_000][rng.index(3)] * MS;
        let volumes = cluster.volume_count();
        let wishes = [
            Wish::Add,
            Wish::Remove,
            Wish::Replace,
            Wish::Replace,
            Wish::AddWitness,
            Wish::RemoveWitness,
            Wish::Lose,
            Wish::Elsewhere,
        ];
        let plan = (0..1 + rng.index(5))
            .map(|_| (now + rng.below(most), rng.index(volumes), wishes[rng.index(wishes.len())]))
            .collect();
        let volume = |at| {
            let goal = cluster.first_seats(at);
            let made = goal.iter().map(|seat| seat.id).collect();
            Volume { goal, made, ..Volume::default() }
        };
        let volumes = (0..volumes).map(volume).collect();
        Self { rng, plan, volumes, next_look: now, lost: false, asked: 0 }
    }

    /// One without wishes, who leaves the members as they are.
    pub(super) fn quiet(cluster: &Cluster, now: u64) -> Self {
        let mut operator = Self::drawn(0, cluster, now);
        operator.rng = Rng::new(now);
        operator.plan.clear();
        operator
    }

    /// When it looks next.
    pub(super) fn next_look(&self) -> u64 {
        self.next_look
    }

    /// Nothing more is wished for.
    pub(super) fn stop_wishing(&mut self) {
        self.plan.clear();
    }

    /// Whether a volume's members are those that it is to have.
    pub(super) fn is_content(&self, volume: usize, report: &VolumeReport) -> bool {
        let volume = &self.volumes[volume];
        volume.plan_is_met(&report.children.iter().map(|c| c.replica).collect::<Vec<_>>())
    }

    /// Nothing is to be in a pool that is gone.
    pub(super) fn give_up_gone(&mut self, cluster: &Cluster) {
        for volume in &mut self.volumes {
            volume.goal.retain(|seat| !cluster.is_gone(seat.pool));
        }
    }

    /// Whether a volume has been seen not to answer hosts for so long.
    pub(super) fn is_stuck(&mut self, volume: usize, up: bool, now: u64, for_ns: u64) -> bool {
        let since = &mut self.volumes[volume].down_since;
        if up {
            *since = None;
        }
        !up && now >= *since.get_or_insert(now) + for_ns
    }

    /// Waits once more, a few times at most.
    pub(super) fn asks_again(&mut self, volume: usize) -> bool {
        let volume = &mut self.volumes[volume];
        (volume.down_since, volume.waits) = (None, volume.waits + 1);
        volume.waits < 4
    }

    /// One of several replicas, to start a volume from by force.
    pub(super) fn choose(&mut self, sources: &[Seat]) -> Option<Seat> {
        (!sources.is_empty()).then(|| sources[self.rng.index(sources.len())])
    }

    /// A volume is started by force from a replica, and nothing else is a member.
    pub(super) fn take_from(&mut self, volume: usize, source: Seat) {
        let volume = &mut self.volumes[volume];
        volume.before.extend(std::mem::take(&mut volume.goal));
        volume.before.retain(|seat| seat.id != source.id);
        (volume.goal, volume.asked, volume.down_since) = (vec![source], None, None);
    }

    /// A volume that was started by force is made redundant again: with what were its replicas, as they are,
    /// or with new ones.
    pub(super) fn begin_anew(&mut self, cluster: &mut Cluster, volume: usize) {
        for seat in std::mem::take(&mut self.volumes[volume].before) {
            if cluster.is_gone(seat.pool) || self.volumes[volume].goal.len() > 2 {
                continue;
            }
            let seat = match self.rng.chance(600) {
                true => seat,
                false => cluster.new_seat(volume, seat.pool, seat.witness),
            };
            self.volumes[volume].goal.push(seat);
        }
    }

    /// A pool in which a volume is to have nothing.
    fn free_pool(&mut self, cluster: &Cluster, volume: usize) -> Option<usize> {
        let used = |at: &usize| self.volumes[volume].goal.iter().any(|seat| seat.pool == *at);
        let free: Vec<usize> =
            (0..cluster.pools()).filter(|at| !used(at) && !cluster.is_gone(*at)).collect();
        (!free.is_empty()).then(|| free[self.rng.index(free.len())])
    }

    /// One of the goal that is a witness, or is none.
    fn any(&mut self, volume: usize, witness: bool) -> Option<usize> {
        let goal = &self.volumes[volume].goal;
        let some = goal.iter().enumerate().filter(|(_, seat)| seat.witness == witness);
        let some: Vec<usize> = some.map(|(at, _)| at).collect();
        (!some.is_empty()).then(|| some[self.rng.index(some.len())])
    }

    fn seat(&mut self, cluster: &mut Cluster, volume: usize, witness: bool) -> Option<Seat> {
        let pool = self.free_pool(cluster, volume)?;
        Some(cluster.new_seat(volume, pool, witness))
    }

    fn wish(&mut self, cluster: &mut Cluster, volume: usize, wish: Wish) {
        cluster.world().say(format_args!("operator: {wish:?} for volume {volume}"));
        self.volumes[volume].at_once = self.rng.chance(300);
        let goal = &self.volumes[volume].goal;
        let data = goal.iter().filter(|seat| !seat.witness).count();
        match wish {
            Wish::Add | Wish::AddWitness if goal.len() < 6 => {
                let seat = self.seat(cluster, volume, wish == Wish::AddWitness);
                self.volumes[volume].goal.extend(seat);
            }
            Wish::Remove if data > 2 => {
                if let Some(at) = self.any(volume, false) {
                    self.volumes[volume].goal.remove(at);
                }
            }
            Wish::RemoveWitness => {
                if let Some(at) = self.any(volume, true) {
                    self.volumes[volume].goal.remove(at);
                }
            }
            Wish::Replace => {
                let witness = self.rng.chance(150);
                let Some(at) = self.any(volume, witness) else { return };
                let Some(seat) = self.seat(cluster, volume, witness) else { return };
                self.volumes[volume].goal[at] = seat;
            }
            Wish::Lose => self.lose(cluster),
            Wish::Elsewhere => self.ask_elsewhere(cluster, volume),
            Wish::Add | Wish::AddWitness | Wish::Remove => {}
        }
    }

    /// A pool is lost for good. What is to be somewhere else, is made there.
    fn lose(&mut self, cluster: &mut Cluster) {
        let at = self.rng.index(cluster.pools());
        if self.lost || cluster.is_local(at) {
            return;
        }
        cluster.take_away(at);
        let hopeless = |volume| cluster.what_is_left(volume).is_some_and(|l| l.sources.is_empty());
        if (0..self.volumes.len()).any(hopeless) {
            // Nobody else has ever held the volume.
            cluster.come_back(at);
            cluster.start_replica(at);
            return;
        }
        self.lost = true;
        for volume in 0..self.volumes.len() {
            let goal = &self.volumes[volume].goal;
            let Some(place) = goal.iter().position(|seat| seat.pool == at) else { continue };
            let witness = goal[place].witness;
            self.volumes[volume].at_once = self.rng.chance(500);
            match self.seat(cluster, volume, witness) {
                Some(seat) => self.volumes[volume].goal[place] = seat,
                None => drop(self.volumes[volume].goal.remove(place)),
            }
        }
    }

    /// Two operators that do not know of each other.
    fn ask_elsewhere(&mut self, cluster: &mut Cluster, volume: usize) {
        let other = 1 - cluster.active();
        if self.rng.chance(500) {
            if let Some(at) = self.any(volume, false) {
                let id = self.volumes[volume].goal[at].id;
                cluster.remove_member(other, volume, id);
            }
        } else if let Some(seat) = self.seat(cluster, volume, false) {
            // It may not be made in time: then the nexus gives it up.
            cluster.make_replica(volume, seat);
            cluster.add_member(other, volume, seat);
        }
    }

    /// What is due; whether something was asked of the nexus that serves.
    pub(super) fn look(&mut self, cluster: &mut Cluster, now: u64) -> bool {
        if now < self.next_look {
            return false;
        }
        self.next_look = now + PERIOD;
        let due: Vec<_> = self.plan.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, volume, wish) in due {
            self.wish(cluster, volume, wish);
        }
        let before = self.asked;
        for volume in 0..self.volumes.len() {
            self.go_on(cluster, volume, now);
        }
        self.asked > before
    }

    fn go_on(&mut self, cluster: &mut Cluster, at: usize, now: u64) {
        let which = cluster.active();
        if let Some(asked) = &self.volumes[at].asked {
            match asked.answer.try_recv() {
                Err(TryRecvError::Empty)
                    if now < asked.since + PATIENCE && asked.which == which =>
                {
                    return;
                }
                Ok(Ok(())) => {
                    if let Step::Make(seat) = asked.step {
                        self.volumes[at].made.push(seat.id);
                    }
                }
                Ok(Err(error)) => {
                    cluster.world().say(format_args!("operator: {error}"));
                    // Of an older lineage: it can be had as a new one only.
                    if let (Step::Add(seat), true) = (asked.step, told_newer(&error)) {
                        let new = cluster.new_seat(at, seat.pool, seat.witness);
                        let goal = self.volumes[at].goal.iter_mut();
                        goal.filter(|other| other.id == seat.id).for_each(|other| *other = new);
                    }
                }
                Err(_) => {}
            }
            self.volumes[at].asked = None;
        }
        let Some(report) = cluster.report_of(which, at) else { return };
        if !report.serving {
            // Another machine has added it.
            let Some((before, after)) = report.detail.split_once("not among those named") else {
                return;
            };
            // Its name is before that, or several are after it.
            let text = if before.contains("has a replica") { before } else { after };
            let text = text.split(';').next().unwrap_or_default();
            let named = |seat: &&Seat| text.contains(&seat.id.to_string());
            let unknown: Vec<Seat> = cluster.seats(at).iter().filter(named).copied().collect();
            for seat in unknown {
                cluster.add_member(which, at, seat);
            }
            return;
        }
        cluster.forget_strangers(which, at, &report);
        let volume = &mut self.volumes[at];
        let member =
            |id: ReplicaId| report.children.iter().find(|c| c.replica == id && is_member(c));
        let is_gone = |seat: &Seat| cluster.is_gone(seat.pool);
        let missing = volume.goal.iter().find(|seat| member(seat.id).is_none() && !is_gone(seat));
        let (step, answer) = if let Some(&seat) = missing {
            if volume.made.contains(&seat.id) {
                (Step::Add(seat), cluster.add_member(which, at, seat))
            } else {
                (Step::Make(seat), cluster.make_replica(at, seat))
            }
        } else {
            let goal = |id: ReplicaId| volume.goal.iter().any(|seat| seat.id == id);
            // Also those that are none, and are known to its machine.
            let extra = report.children.iter().filter(|c| !goal(c.replica));
            // Those that cannot be had go first.
            let extra = extra.min_by_key(|c| !cluster.is_gone(cluster.pool_of(c.replica)));
            let whole = report.children.iter().all(|c| is_whole(c) || !goal(c.replica));
            let Some(extra) = extra.filter(|_| whole || volume.at_once) else { return };
            (Step::Remove, cluster.remove_member(which, at, extra.replica))
        };
        if let Some(answer) = answer {
            self.asked += u64::from(!matches!(step, Step::Make(_)));
            self.volumes[at].asked = Some(Asked { step, answer, since: now, which });
        }
    }

    /// Replicas that are no members, and that can be deleted.
    pub(super) fn retired(&self, cluster: &Cluster, volume: usize) -> Vec<ReplicaId> {
        let v = &self.volumes[volume];
        let idle = |id: &ReplicaId| v.goal.iter().all(|seat| seat.id != *id);
        let there = |id: &ReplicaId| !cluster.is_gone(cluster.pool_of(*id));
        v.made.iter().copied().filter(idle).filter(there).collect()
    }
}

impl Volume {
    fn plan_is_met(&self, members: &[ReplicaId]) -> bool {
        let goal = self.goal.iter().all(|seat| members.contains(&seat.id));
        goal && members.len() == self.goal.len()
    }
}

impl Run {
    /// The operator looks; where it has asked for a change, the nexus may die of it, or be taken over.
    pub(super) fn operate(&mut self, now: u64) {
        self.force_what_is_lost(now);
        let Some(operator) = self.operator.as_mut() else { return };
        let asked = operator.look(&mut self.cluster, now);
        if !asked || self.recovering {
            return;
        }
        let (dies, other) = (operator.rng.chance(200), operator.rng.chance(200));
        let soon = [0, 300_000, 3 * MS, 60 * MS][operator.rng.index(4)];
        let soon = now + operator.rng.below(soon.max(1));
        let back = soon + MS + operator.rng.below(1_000 * MS);
        if dies && self.faults.nexus {
            self.cluster.run_until(soon);
            self.cluster.kill_nexus();
            self.repairs.push((back, Repair::StartNexus));
        } else if other && self.faults.takeover {
            self.cluster.run_until(soon);
            if !self.cluster.process_runs(1 - self.cluster.active()) {
                self.cluster.start_process(1 - self.cluster.active());
            }
            self.cluster.take_over();
        }
    }

    /// Whether every volume has the members that it is to have.
    pub(super) fn members_are_met(&self, reports: &[VolumeReport]) -> bool {
        let Some(operator) = &self.operator else { return true };
        (0..self.cluster.volume_count()).all(|volume| {
            let report = reports.iter().find(|r| r.name == format!("volume{volume}"));
            report.is_some_and(|report| operator.is_content(volume, report))
        })
    }

    /// What is no member any more can be deleted, and gives its space back.
    pub(super) fn delete_retired(&mut self) {
        let Some(operator) = &self.operator else { return };
        let mut answers = Vec::new();
        for volume in 0..self.cluster.volume_count() {
            for id in operator.retired(&self.cluster, volume) {
                answers.push((id, self.cluster.delete_replica(volume, id)));
            }
        }
        let soon = self.cluster.world().now_ns() + 10_000 * MS;
        self.cluster.run_until(soon);
        for (id, answer) in answers {
            let Some(answer) = answer else { continue };
            let told = answer.try_recv();
            let gone = matches!(told, Ok(Ok(()) | Err(EngineError::NotFound { .. })));
            assert!(gone, "replica {id} cannot be deleted: {told:?}");
        }
    }
}
