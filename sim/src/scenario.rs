//! One run: a cluster, its hosts, and what goes wrong, all drawn from a seed.

mod disks;
mod faults;
mod focus;
mod force;
mod joiner;
mod lone;
mod members;
mod overtaken;
mod restore;
mod standby;
mod whole;

use cairn_engine::ChildReport;
use cairn_engine::nexus::{Finding, Found};

use crate::checks::{Check, check};
use crate::client::Workload;
use crate::cluster::{Cluster, ClusterConfig, Tuning, is_member, is_whole};
use crate::net::NetManners;
use crate::rng::Rng;
use crate::world::{MS, Sink, US, World};
use disks::Disks;
use members::Operator;

pub use focus::Focus;

/// Once nothing is wrong any more, everything is answered within this time.
const RECOVERY_NS: u64 = 60_000 * MS;
/// Members that are there are in sync again within this time: one that failed often is left alone for minutes.
const REBUILD_NS: u64 = 700_000 * MS;
/// A volume that cannot come up is looked at after this time.
const STUCK_NS: u64 = 5_000 * MS;
/// The hosts' work ends within this time, whatever goes wrong.
const WORK_NS: u64 = 300_000 * MS;

/// How a run went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Stands for everything that happened.
    pub trace_hash: u64,
    /// Events of the world.
    pub steps: u64,
    /// Writes that hosts got acked.
    pub acked: u64,
    /// Blocks read and judged.
    pub judged: u64,
    /// Requests that hosts saw fail.
    pub errors: u64,
    /// Things that went wrong.
    pub faults: u64,
    /// Copies of blocks that the last nexus healed.
    pub healed: u64,
    /// Writes that met a full pool at the last nexus, after which the replicas were made alike.
    pub converged: u64,
    /// Changes of members that were asked for.
    pub changes: u64,
    /// Volumes that were started by force.
    pub forced: u64,
    /// Virtual time that passed, in milliseconds.
    pub virtual_ms: u64,
}

/// What may go wrong in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// The nexus's process is killed.
    pub nexus: bool,
    /// One replica is killed, cut off, slow, hung, or fails.
    pub replica: bool,
    /// Hosts lose their connections.
    pub host: bool,
    /// Every replica loses its connections at once.
    pub everywhere: bool,
    /// Blocks of one replica rot.
    pub rot: bool,
    /// One pool runs full.
    pub full: bool,
    /// Another machine takes the volumes over, whatever becomes of the one that serves them.
    pub takeover: bool,
    /// Processes are stopped for a while and go on.
    pub pause: bool,
    /// Machines are cut off from each other, both ways or one.
    pub partition: bool,
    /// Everybody loses power.
    pub blackout: bool,
    /// Several processes die within a moment.
    pub storm: bool,
    /// Single disk operations of one replica fail, or its writes land elsewhere.
    pub slips: bool,
}

impl Faults {
    /// Nothing goes wrong.
    pub const NONE: Self = Self {
        nexus: false,
        replica: false,
        host: false,
        everywhere: false,
        rot: false,
        full: false,
        takeover: false,
        pause: false,
        partition: false,
        blackout: false,
        storm: false,
        slips: false,
    };

    fn drawn(rng: &mut Rng, seed: u64) -> Self {
        // Drawn apart: nothing else changes with it.
        let mut later = Rng::new(seed ^ 0x7a3e);
        let wild = later.chance(600);
        let mut more = |per_mille| wild && later.chance(per_mille);
        Self {
            takeover: more(600),
            pause: more(400),
            partition: more(400),
            blackout: more(200),
            storm: more(300),
            slips: more(300),
            nexus: rng.chance(500),
            replica: rng.chance(800),
            host: rng.chance(400),
            everywhere: rng.chance(200),
            rot: rng.chance(250),
            full: rng.chance(150),
        }
    }
}

/// What puts an end to a fault, and when.
#[derive(Debug, Clone, Copy)]
enum Repair {
    StartNexus,
    StartOther,
    StartReplica(usize),
    Disk(usize),
}

/// When a volume is to grow, and to how many blocks.
type Growth = (u64, usize, u64);

/// Growth while the hosts work, drawn apart: nothing else changes with it where there is none.
fn growth(seed: u64, volumes: usize, now_ns: u64) -> Vec<Growth> {
    let mut rng = Rng::new(seed ^ 0x9706);
    if !rng.chance(250) {
        return Vec::new();
    }
    let at = |rng: &mut Rng| {
        let most = [50, 500, 4_000][rng.index(3)] * MS;
        now_ns + rng.below(most)
    };
    (0..1 + rng.index(4))
        .map(|_| (at(&mut rng), rng.index(volumes), 1025 + rng.below(3000)))
        .collect()
}

/// Snapshots while the hosts work, drawn apart: when, and of which volume.
fn snapshots(seed: u64, volumes: usize, now_ns: u64) -> Vec<(u64, usize)> {
    let mut rng = Rng::new(seed ^ 0x5a95);
    if !rng.chance(250) {
        return Vec::new();
    }
    let most = [50, 500, 4_000][rng.index(3)] * MS;
    (0..1 + rng.index(5)).map(|_| (now_ns + rng.below(most), rng.index(volumes))).collect()
}

/// Runs the cluster of a seed, and checks it.
///
/// # Panics
/// Where an invariant does not hold.
pub fn run(seed: u64, sink: Option<Sink>) -> Outcome {
    run_at(seed, Focus::drawn(seed), sink)
}

/// As [`run`], about this.
///
/// # Panics
/// Where an invariant does not hold.
pub fn run_at(seed: u64, focus: Focus, sink: Option<Sink>) -> Outcome {
    // What is about one thing has the members that its volumes are made with.
    let members_change = focus == Focus::Everything;
    run_in(seed, focus.keep(drawn(seed), seed), focus, members_change, sink)
}

/// As [`run`], about nothing more than anything else, with the members that volumes are made with, none of them a
/// witness, and no forced start.
///
/// # Panics
/// Where an invariant does not hold.
pub fn run_plain(seed: u64, sink: Option<Sink>) -> Outcome {
    run_in(seed, drawn(seed), Focus::Everything, false, sink)
}

fn drawn(seed: u64) -> Faults {
    let mut rng = Rng::new(seed ^ 0xca12);
    if rng.chance(100) { Faults::NONE } else { Faults::drawn(&mut rng, seed) }
}

/// As [`run_plain`], with these faults and no others.
///
/// # Panics
/// Where an invariant does not hold.
pub fn run_with(seed: u64, faults: Faults, sink: Option<Sink>) -> Outcome {
    run_in(seed, faults, Focus::Everything, false, sink)
}

fn run_in(
    seed: u64,
    faults: Faults,
    focus: Focus,
    members_change: bool,
    sink: Option<Sink>,
) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut world = World::new(rng.next_u64());
    if let Some(sink) = sink {
        world.trace_to(sink);
    }
    world.set_net_manners(NetManners {
        latency_ns: 5 * US + rng.below(200 * US),
        late_per_mille: rng.below(20),
        short_per_mille: if rng.chance(200) { 900 } else { rng.below(200) },
    });
    let replicas = if rng.chance(850) { 3 } else { 2 + rng.index(2) };
    // Drawn apart: nothing else changes with it.
    let mut later = Rng::new(seed ^ 0x51e5);
    let replicas = match later.below(20) {
        0 => 1,
        1 | 2 => 5,
        _ => replicas,
    };
    // What cannot be read of the only replica, or of the only one that was not late, is read of no other.
    let slips = faults.slips && replicas > 1 && !faults.everywhere;
    let faults = Faults { slips, ..faults };
    let mut config = ClusterConfig {
        volumes: 1 + rng.index(2),
        blocks: 1024,
        replicas,
        witness: None,
        wide_pool: None,
        spares: 0,
        local_replica: rng.chance(300),
        tears: later.chance(300),
        second: faults.takeover || later.chance(100),
        second_local: replicas > 1 && later.chance(300),
        disk_len: 24 << 20,
        small_pool: faults.full.then(|| Rng::new(seed ^ 0xf011).index(replicas)),
        child_deadline_ms: 200 + rng.below(1500),
        replica_kato_ms: u32::try_from(300 + rng.below(2000)).expect("a short time"),
        digests: rng.chance(300),
        queue_entries: if rng.chance(300) { 8 } else { 64 },
        volume_requests: if rng.chance(200) { 4 } else { 64 },
        arena_len: if rng.chance(200) { 5 << 20 } else { 8 << 20 },
        zeroed: rng.chance(500),
        // Drawn apart: nothing else changes with it.
        encrypted: Rng::new(seed ^ 0xc1f3).chance(300),
        initiators: false,
        fronts: false,
        pools_in_front: false,
        tuning: Tuning::default(),
    };
    if members_change {
        members::shape(seed, &faults, &mut config);
    }
    let config = focus.shape(config, seed);
    world.say(format_args!("{config:?} {faults:?}"));
    let (volumes, small, pools) = (config.volumes, config.small_pool, config.pools());
    let (spares, wide) = (config.spares > 0, config.wide_pool);
    // Nor is one started by force from what is left after that.
    let copies = config.replicas > 1 && !spares;
    let lone = config.is_lone();
    let mut cluster = Cluster::new(world, config);
    for volume in 0..volumes {
        for _ in 0..focus.hosts(1 + rng.index(2)) {
            let work = focus.work(workload(&mut rng));
            cluster.add_client(volume, Workload { atomic_per_mille: atomic(seed, focus), ..work });
        }
        if focus == Focus::Initiators {
            let steps = 20 + rng.below(60);
            for reserves in [true, false] {
                cluster.add_initiator(volume, steps, reserves);
            }
        }
    }
    let growth = growth(seed, volumes, cluster.world().now_ns());
    // What rots in a snapshot alone is not looked for here.
    let snapshots = match faults.rot || focus == Focus::Initiators {
        false => snapshots(seed, volumes, cluster.world().now_ns()),
        true => Vec::new(),
    };
    let now = cluster.world().now_ns();
    let operator = spares.then(|| Operator::drawn(seed, &cluster, now));
    let mut run = Run {
        cluster,
        operator,
        disks: Disks::default(),
        recovering: false,
        forced_at: 0,
        next_force: 0,
        forced: 0,
        rng,
        faults,
        victim: 0,
        repairs: Vec::new(),
        next_look: 0,
        growth,
        snapshots,
        slips: lone::slips(seed, lone, now),
        lone,
        // A counter that goes back would be none.
        restores: match focus {
            Focus::Standby | Focus::Initiators => None,
            _ => restore::drawn(seed),
        },
        count: 0,
        most: 0,
        small,
        mended: (0, 0),
    };
    run.most = 1 + run.rng.below(25);
    run.victim = run.rng.index(pools);
    if let Some(pool) = wide {
        // Drawn apart: nothing else changes with it.
        let dies = focus == Focus::Disks;
        if dies || Rng::new(seed ^ 0x71de).chance(600) {
            run.victim = pool;
        }
        run.disks = Disks::drawn(seed, pool, now, run.victim == pool && faults.replica && copies);
        if dies {
            run.disks.lose_one(seed, now);
        }
    }
    match focus {
        focus if focus.is_chance() => run.work(),
        focus => run.work_at(focus),
    }
    run.recover();
    if focus == Focus::Standby {
        run.stays_where_it_is();
    }
    if members_change && members::ends_by_force(seed, &faults) {
        run.end_by_force();
    }
    run.judge();
    let world = run.cluster.world();
    let mut outcome = Outcome {
        trace_hash: world.trace_hash(),
        steps: world.steps(),
        acked: run.cluster.steps(),
        judged: 0,
        errors: run.cluster.client_errors(),
        faults: run.count,
        healed: run.mended.0,
        converged: run.mended.1,
        virtual_ms: world.now_ns() / MS,
        changes: run.operator.as_ref().map_or(0, |operator| operator.asked),
        forced: run.forced,
    };
    drop(world);
    for volume in 0..volumes {
        let history = run.cluster.history(volume);
        outcome.acked += history.borrow().acked;
        outcome.judged += history.borrow().judged;
    }
    outcome
}

/// Of a thousand writes of several blocks so many are to be whole. Drawn apart: nothing else changes with it.
fn atomic(seed: u64, focus: Focus) -> u64 {
    if focus == Focus::Whole {
        return 900;
    }
    [0, 0, 300, 900][Rng::new(seed ^ 0xa701).index(4)]
}

fn workload(rng: &mut Rng) -> Workload {
    Workload {
        depth: [1, 2, 8, 32][rng.index(4)],
        gap_ns: [0, 100 * US, 2 * MS, 10 * MS][rng.index(4)],
        hot_blocks: [8, 32, 64, 200][rng.index(4)],
        requests: 100 + rng.below(250),
        reads_per_mille: 200 + rng.below(500),
        atomic_per_mille: 0,
        kato_ms: u32::try_from(500 + rng.below(5000)).expect("a short time"),
        digests: rng.chance(200),
    }
}

struct Run {
    cluster: Cluster,
    /// Whoever changes the members of volumes.
    operator: Option<Operator>,
    disks: Disks,
    /// Nothing more goes wrong.
    recovering: bool,
    /// When a volume was last started by force, and when it is looked for others that have to be.
    forced_at: u64,
    next_force: u64,
    forced: u64,
    rng: Rng,
    faults: Faults,
    /// The one replica that may be lost.
    victim: usize,
    repairs: Vec<(u64, Repair)>,
    /// When whoever looks after the cluster looks next.
    next_look: u64,
    growth: Vec<Growth>,
    snapshots: Vec<(u64, usize)>,
    /// What fails where there is one replica, and whether there is.
    slips: Vec<(u64, lone::Slip)>,
    lone: bool,
    /// What rounds draw from in which volumes go back to snapshots.
    restores: Option<Rng>,
    /// Faults so far, and how many there are to be.
    count: u64,
    most: u64,
    /// The pool that runs full.
    small: Option<usize>,
    /// Copies healed, and writes that met a full pool.
    mended: (u64, u64),
}

impl Run {
    /// Lets the hosts work while things go wrong.
    fn work(&mut self) {
        self.await_serving();
        self.await_hosts();
    }

    /// Until the hosts have done what they were to do.
    fn await_hosts(&mut self) {
        let limit = self.cluster.world().now_ns() + WORK_NS;
        let pace = [10, 60, 400][self.rng.index(3)] * MS;
        let mut next_fault = self.cluster.world().now_ns() + self.rng.below(2 * pace);
        while !self.cluster.clients_are_done() {
            let now = self.cluster.world().now_ns();
            check!(
                Check::Liveness,
                now < limit,
                "the hosts' work does not end: {:?}",
                self.cluster.volumes()
            );
            if now >= next_fault && self.count == self.most {
                // Three replicas go on without one. Where there is no majority besides, whoever looks
                // after the cluster restarts a process whose pool has gone offline or hangs.
                if self.count > 0 && self.needs_help() {
                    self.restart_victim();
                }
                next_fault = now + 5_000 * MS;
            } else if now >= next_fault {
                self.hurt();
                let last = self.count == self.most;
                next_fault = now + if last { 10_000 * MS } else { MS + self.rng.below(2 * pace) };
            }
            let next = self.tend(now).min(next_fault);
            self.cluster.run_while(next.max(now + 1) - now, Cluster::clients_are_done);
        }
    }

    /// Does what is due, besides faults. Returns when something is again.
    fn tend(&mut self, now: u64) -> u64 {
        self.repair(now);
        if self.cluster.has_second() && now >= self.next_look {
            self.cluster.supervise();
            self.next_look = now + 200 * MS;
        }
        self.operate(now);
        self.change_disks(now);
        self.grow(now);
        self.snapshot(now);
        self.slip_alone(now);
        let growth = self.growth.iter().map(|(at, ..)| *at);
        let snapshots = self.snapshots.iter().map(|(at, _)| *at);
        let slips = self.slips.iter().map(|(at, _)| *at);
        let repairs = self.repairs.iter().map(|(at, _)| *at).chain(slips);
        let look = if self.cluster.has_second() { self.next_look } else { u64::MAX };
        let look = self.operator.as_ref().map_or(look, |o| look.min(o.next_look()));
        let look = look.min(self.disks.next());
        repairs.chain(growth).chain(snapshots).fold(look, u64::min)
    }

    /// A volume whose making is interrupted is the control side's to make again: not tested here.
    fn await_serving(&mut self) {
        for _ in 0..1000 {
            let volumes = self.cluster.volumes().expect("the nexus runs");
            if volumes.iter().all(|volume| volume.serving) {
                return;
            }
            let next = self.cluster.world().now_ns() + 10 * MS;
            self.cluster.run_until(next);
        }
        panic!("new volumes do not come up: {:?}", self.cluster.volumes());
    }

    fn repair(&mut self, now: u64) {
        let due: Vec<Repair> =
            self.repairs.iter().filter(|(at, _)| *at <= now).map(|(_, what)| *what).collect();
        self.repairs.retain(|(at, _)| *at > now);
        for what in due {
            self.mend(what);
        }
    }

    fn grow(&mut self, now: u64) {
        let due: Vec<Growth> = self.growth.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, volume, blocks) in due {
            self.cluster.grow_volume(volume, blocks);
        }
    }

    fn snapshot(&mut self, now: u64) {
        self.cluster.look_at_snapshots();
        self.cluster.look_at_back();
        let due: Vec<_> = self.snapshots.extract_if(.., |(at, _)| *at <= now).collect();
        for (at, volume) in due {
            if at.is_multiple_of(4) {
                self.cluster.drop_snapshot();
            }
            self.cluster.take_snapshot(volume, u128::from(at));
        }
    }

    /// A scrub leaves no bad block, and one that compares no difference.
    fn scrub(&mut self) {
        let deep = self.rng.chance(400);
        self.cluster.scrub(deep);
        let limit = self.cluster.world().now_ns() + RECOVERY_NS;
        while !self.cluster.scrubs_are_done() {
            let now = self.cluster.world().now_ns();
            check!(
                Check::Liveness,
                now < limit,
                "a scrub does not end: {:?}",
                self.cluster.volumes()
            );
            self.cluster.run_until(now + 50 * MS);
        }
        let calm = Faults { full: self.faults.full, rot: self.faults.rot, ..Faults::NONE };
        for volume in self.cluster.volumes().expect("the nexus runs") {
            let everybody = volume.children.iter().all(|c| is_whole(c) || !is_member(c));
            let calm = self.faults == calm;
            check!(Check::MembersAlike, !calm || everybody, "a replica was taken out: {volume:?}");
            let report = volume.scrub.as_ref().expect("a scrub ran");
            // A replica whose pool has gone offline is taken out by what it could not heal.
            let left = report.findings.iter().filter(|f| {
                let child = volume.children.iter().find(|c| c.number == f.child.0);
                let out = child.is_none_or(|c| !c.in_sync);
                // What a full pool has no room for stays different.
                let full = |c: &ChildReport| self.small == Some(self.cluster.pool_of(c.replica));
                let full = deep && child.is_some_and(full);
                f.found == Found::Unrecoverable || f.found == Found::NotHealed && !out && !full
            });
            // Of the only copy a block whose write failed stays bad until it is written again.
            let history = self.cluster.history(self.cluster.number_of(&volume));
            let lost = |f: &&Finding| history.borrow().may_be_unreadable(f.lba.0);
            let (lost, left): (Vec<&Finding>, Vec<&Finding>) = left.partition(lost);
            let unrecoverable = report.unrecoverable.saturating_sub(lost.len() as u64);
            check!(Check::Scrub, left.is_empty() && unrecoverable == 0, "{report:?}");
            self.mended.0 += volume.mends.healed;
            self.mended.1 += volume.mends.converged;
        }
        self.cluster.compare(deep && self.small.is_none());
        self.cluster.check_snapshots();
        self.check_deletions();
    }

    /// A snapshot that was deleted goes from replicas that were away, too.
    fn check_deletions(&mut self) {
        let limit = self.cluster.world().now_ns() + RECOVERY_NS;
        while let Some((id, replica)) = self.cluster.snapshot_left() {
            let now = self.cluster.world().now_ns();
            check!(
                Check::Snapshots,
                now < limit,
                "replica {replica} has deleted snapshot {id} still"
            );
            self.cluster.run_until(now + 200 * MS);
        }
    }

    /// Every member is back in sync, and nothing that a nexus left different is open any more.
    fn await_rebuilds(&mut self) {
        if self.faults.full {
            // A full pool has no room for what it lacks.
            return;
        }
        let start = self.cluster.world().now_ns();
        let mut restarted = false;
        loop {
            let now = self.cluster.world().now_ns();
            let state = self.cluster.volumes().expect("the nexus runs");
            // A pool may be full: volumes grow.
            let is_full = |c: &ChildReport| c.reason.contains("NoSpace");
            let is_settled = |c: &ChildReport| is_whole(c) || !is_member(c);
            let all = state
                .iter()
                .all(|v| v.serving && v.children.iter().all(|c| is_settled(c) || is_full(c)));
            // One that was taken from this machine is taken up again first.
            let whole = all && state.len() == self.cluster.volume_count();
            if whole && !self.cluster.goes_back() && self.members_are_met(&state) {
                return;
            }
            check!(
                Check::Liveness,
                now < start + REBUILD_NS,
                "a member is not in sync again: {:?}",
                state.iter().flat_map(|v| &v.children).filter(|c| !is_whole(c)).collect::<Vec<_>>()
            );
            self.operate(now);
            if now > start + REBUILD_NS / 4 && !restarted {
                // Its pool may be offline.
                restarted = true;
                self.restart_victim();
            }
            if self.cluster.has_second() {
                self.cluster.supervise();
            }
            self.cluster.run_until(now + 500 * MS);
        }
    }

    /// The volumes are served where they are to be, and nowhere else is an attempt made to.
    fn come_to_rest(&mut self) {
        let limit = self.cluster.world().now_ns() + RECOVERY_NS;
        if self.cluster.has_second() {
            self.cluster.retire_other();
            let soon = self.cluster.world().now_ns() + 100 * MS;
            self.cluster.run_until(soon);
        }
        loop {
            let state = self.cluster.volumes();
            let all = state.as_ref().is_ok_and(|all| all.iter().all(|v| v.serving));
            if all && state.is_ok_and(|all| all.len() == self.cluster.volume_count()) {
                return;
            }
            let state = self.cluster.volumes();
            let now = self.cluster.world().now_ns();
            let limit = limit.max(self.forced_at + RECOVERY_NS);
            check!(Check::Liveness, now < limit, "a volume does not come up: {state:?}");
            self.operate(now);
            self.cluster.retire_other();
            // What a process that was killed had asked for may come late, and fence its successor for good: somebody
            // has that one begin anew.
            self.cluster.supervise();
            self.cluster.run_until(now + 200 * MS);
        }
    }

    fn judge(&mut self) {
        for volume in 0..self.cluster.volume_count() {
            self.cluster.history(volume).borrow_mut().judge_all();
        }
    }

    /// Hosts read every block.
    fn verify(&mut self) {
        self.cluster.verify();
        let start = self.cluster.world().now_ns();
        let limit = start + RECOVERY_NS;
        let (mut verified, mut restarted) = (false, false);
        while !verified && self.cluster.world().now_ns() < limit.max(self.forced_at + RECOVERY_NS) {
            if self.cluster.has_second() {
                self.cluster.supervise();
            }
            let now = self.cluster.world().now_ns();
            self.operate(now);
            if now > start + RECOVERY_NS / 4 && !restarted && self.needs_help() {
                // What a pool had failed to do is seen only now.
                restarted = true;
                self.restart_victim();
            }
            verified = self.cluster.run_while(200 * MS, Cluster::clients_are_done);
        }
        let state = self.cluster.volumes();
        let verified = verified || self.is_lost_with_a_disk();
        check!(Check::Liveness, verified, "not every block can be read: {state:?}");
    }

    /// Nothing goes wrong any more: everything is served again, and is right.
    fn recover(&mut self) {
        self.cluster.world().say(format_args!("faults stop"));
        self.recovering = true;
        self.disks.stop();
        self.slips.clear();
        if let Some(operator) = self.operator.as_mut() {
            operator.stop_wishing();
        }
        self.cluster.world().heal();
        self.cluster.world().resume_all();
        for at in 0..self.cluster.pools() {
            self.mend(Repair::Disk(at));
            if !self.cluster.is_local(at) {
                self.mend(Repair::StartReplica(at));
            }
        }
        self.mend(Repair::StartNexus);
        self.mend(Repair::StartOther);
        // Where a pool has gone offline and its replica was the last in sync, somebody must.
        // And nobody sees that of a witness's before its vote is needed.
        let unseen = self.cluster.is_witness_pool(self.victim);
        let hurt = self.faults.replica || self.faults.slips;
        if hurt && (unseen || self.needs_help() || self.rng.chance(300)) {
            self.restart_victim();
        }
        if self.lone {
            self.start_what_is_offline();
        }
        self.come_to_rest();
        self.verify();
        if self.is_lost_with_a_disk() {
            return;
        }
        self.await_rebuilds();
        self.delete_retired();
        // What the verification left behind settles.
        let quiet = self.cluster.world().now_ns() + 5_000 * MS;
        self.cluster.run_until(quiet);
        // What a nexus that was told to go had asked of a replica may have come late, and fenced the other.
        self.come_to_rest();
        self.await_rebuilds();
        self.scrub();
    }
}
