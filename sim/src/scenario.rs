//! One run: a cluster, its hosts, and what goes wrong, all drawn from a seed.

use cairn_engine::nexus::{Found, Purpose};

use crate::client::Workload;
use crate::cluster::{Cluster, ClusterConfig, NEXUS};
use crate::net::NetManners;
use crate::rng::Rng;
use crate::world::{MS, Sink, US, World};

/// Once nothing is wrong any more, everything is answered within this time.
const RECOVERY_NS: u64 = 60_000 * MS;
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
    };

    fn drawn(rng: &mut Rng) -> Self {
        Self {
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
    let mut rng = Rng::new(seed ^ 0xca12);
    let faults = if rng.chance(100) { Faults::NONE } else { Faults::drawn(&mut rng) };
    run_with(seed, faults, sink)
}

/// As [`run`], with these faults and no others.
///
/// # Panics
/// Where an invariant does not hold.
pub fn run_with(seed: u64, faults: Faults, sink: Option<Sink>) -> Outcome {
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
    let config = ClusterConfig {
        volumes: 1 + rng.index(2),
        blocks: 1024,
        replicas,
        local_replica: rng.chance(300),
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
    };
    world.say(format_args!("{config:?} {faults:?}"));
    let (volumes, small) = (config.volumes, config.small_pool);
    let mut cluster = Cluster::new(world, config);
    for volume in 0..volumes {
        for _ in 0..1 + rng.index(2) {
            cluster.add_client(volume, workload(&mut rng));
        }
    }
    let growth = growth(seed, volumes, cluster.world().now_ns());
    // What rots in a snapshot alone is not looked for here.
    let snapshots = match faults.rot {
        false => snapshots(seed, volumes, cluster.world().now_ns()),
        true => Vec::new(),
    };
    let mut run = Run {
        cluster,
        rng,
        faults,
        victim: 0,
        repairs: Vec::new(),
        growth,
        snapshots,
        count: 0,
        most: 0,
        small,
        mended: (0, 0),
    };
    run.most = 1 + run.rng.below(25);
    run.victim = run.rng.index(replicas);
    run.work();
    run.recover();
    let world = run.cluster.world();
    let mut outcome = Outcome {
        trace_hash: world.trace_hash(),
        steps: world.steps(),
        acked: 0,
        judged: 0,
        errors: run.cluster.client_errors(),
        faults: run.count,
        healed: run.mended.0,
        converged: run.mended.1,
        virtual_ms: world.now_ns() / MS,
    };
    drop(world);
    for volume in 0..volumes {
        let history = run.cluster.history(volume);
        outcome.acked += history.borrow().acked;
        outcome.judged += history.borrow().judged;
    }
    outcome
}

fn workload(rng: &mut Rng) -> Workload {
    Workload {
        depth: [1, 2, 8, 32][rng.index(4)],
        gap_ns: [0, 100 * US, 2 * MS, 10 * MS][rng.index(4)],
        hot_blocks: [8, 32, 64, 200][rng.index(4)],
        requests: 100 + rng.below(250),
        reads_per_mille: 200 + rng.below(500),
        kato_ms: u32::try_from(500 + rng.below(5000)).expect("a short time"),
        digests: rng.chance(200),
    }
}

struct Run {
    cluster: Cluster,
    rng: Rng,
    faults: Faults,
    /// The one replica that may be lost.
    victim: usize,
    repairs: Vec<(u64, Repair)>,
    growth: Vec<Growth>,
    snapshots: Vec<(u64, usize)>,
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
        let limit = self.cluster.world().now_ns() + WORK_NS;
        let pace = [10, 60, 400][self.rng.index(3)] * MS;
        let mut next_fault = self.cluster.world().now_ns() + self.rng.below(2 * pace);
        while !self.cluster.clients_are_done() {
            let now = self.cluster.world().now_ns();
            assert!(now < limit, "the hosts' work does not end: {:?}", self.cluster.volumes());
            if now >= next_fault && self.count == self.most {
                // Three replicas go on without one. Where there is no majority besides, whoever looks
                // after the cluster restarts a process whose pool has gone offline or hangs.
                if self.count > 0 && (self.cluster.replicas() < 3 || self.faults.everywhere) {
                    self.restart_victim();
                }
                next_fault = now + 5_000 * MS;
            } else if now >= next_fault {
                self.hurt();
                let last = self.count == self.most;
                next_fault = now + if last { 10_000 * MS } else { MS + self.rng.below(2 * pace) };
            }
            self.repair(now);
            self.grow(now);
            self.snapshot(now);
            let growth = self.growth.iter().map(|(at, ..)| *at);
            let snapshots = self.snapshots.iter().map(|(at, _)| *at);
            let repairs = self.repairs.iter().map(|(at, _)| *at);
            let next = repairs.chain(growth).chain(snapshots).fold(next_fault, u64::min);
            self.cluster.run_while(next.max(now + 1) - now, Cluster::clients_are_done);
        }
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
        let due: Vec<_> = self.snapshots.extract_if(.., |(at, _)| *at <= now).collect();
        for (at, volume) in due {
            if at.is_multiple_of(4) {
                self.cluster.drop_snapshot();
            }
            self.cluster.take_snapshot(volume, u128::from(at));
        }
    }

    fn restart_victim(&mut self) {
        self.cluster.world().heal();
        self.mend(Repair::Disk(self.victim));
        if self.cluster.is_local(self.victim) {
            self.cluster.kill_nexus();
        } else {
            self.cluster.kill_replica(self.victim);
            self.mend(Repair::StartReplica(self.victim));
        }
        self.mend(Repair::StartNexus);
    }

    fn mend(&mut self, what: Repair) {
        match what {
            Repair::StartNexus if !self.cluster.nexus_runs() => {
                self.cluster.start_nexus(Purpose::Assemble);
            }
            Repair::StartReplica(at) if !self.cluster.replica_runs(at) => {
                self.cluster.start_replica(at);
            }
            Repair::Disk(at) => {
                let disk = self.cluster.disk(at);
                self.cluster.world().disk(disk).trouble = crate::disk::DiskTrouble::default();
            }
            Repair::StartNexus | Repair::StartReplica(_) => {}
        }
    }

    fn later(&mut self, most_ns: u64, what: Repair) {
        let at = self.cluster.world().now_ns() + MS + self.rng.below(most_ns);
        self.repairs.push((at, what));
    }

    fn hurt(&mut self) {
        let kinds = [
            (self.faults.nexus, 0),
            (self.faults.replica, 1),
            (self.faults.replica, 1),
            (self.faults.host, 2),
            (self.faults.everywhere, 3),
            (self.rots(), 4),
            (self.rots(), 4),
        ];
        let kinds: Vec<u8> = kinds.iter().filter(|(on, _)| *on).map(|(_, kind)| *kind).collect();
        if kinds.is_empty() {
            self.most = 0;
            return;
        }
        self.count += 1;
        match kinds[self.rng.index(kinds.len())] {
            0 => {
                self.cluster.kill_nexus();
                let most = [5 * MS, 200 * MS, 3_000 * MS][self.rng.index(3)];
                self.later(most, Repair::StartNexus);
            }
            1 => self.hurt_replica(),
            2 => self.hurt_hosts(),
            4 => {
                for _ in 0..1 + self.rng.below(12) {
                    self.cluster.rot(self.rotten());
                }
            }
            _ => self.hurt_everything(),
        }
    }

    /// The replica whose blocks rot: not the one that may be lost, so that a third has each block; and
    /// not one that a crash may make take what it finds for right, since its extents were dirty.
    fn rotten(&self) -> usize {
        (self.victim + 1) % self.cluster.replicas()
    }

    fn rots(&self) -> bool {
        let can = self.cluster.replicas() == 3 && !self.cluster.is_local(self.rotten());
        // Nor where two others may go: one that fails while another is full.
        let two = self.faults.everywhere || self.faults.full && self.faults.replica;
        self.faults.rot && !two && can
    }

    fn hurt_replica(&mut self) {
        let victim = self.victim;
        let machine = self.cluster.machine_of(victim);
        let disk = self.cluster.disk(victim);
        let long = [20 * MS, 300 * MS, 4_000 * MS][self.rng.index(3)];
        let short = self.rng.below(long);
        let for_good = !self.faults.everywhere && self.rng.chance(200);
        match self.rng.below(7) {
            0 if !self.cluster.is_local(victim) => {
                self.cluster.kill_replica(victim);
                self.later(long, Repair::StartReplica(victim));
            }
            1 if machine != NEXUS => self.cluster.world().reset(NEXUS, machine, 700),
            2 if machine != NEXUS => {
                let way = self.rng.below(3);
                let mut world = self.cluster.world();
                if way != 1 {
                    world.block(NEXUS, machine, short);
                }
                if way != 2 {
                    world.block(machine, NEXUS, short);
                }
            }
            3 => {
                let mut world = self.cluster.world();
                world.say(format_args!("pool {victim} is slow"));
                world.disk(disk).trouble.slow_ns = short;
                drop(world);
                self.later(long, Repair::Disk(victim));
            }
            4 => {
                let mut world = self.cluster.world();
                // For good, as far as this run goes, or for a while.
                let time = if for_good { 2 * WORK_NS } else { short };
                let until = world.now_ns() + time;
                world.say(format_args!("pool {victim} hangs for {} ms", time / MS));
                world.disk(disk).trouble.hung_until_ns = until;
            }
            5 => {
                let rate = 20 + self.rng.below(500);
                let mut world = self.cluster.world();
                world.say(format_args!("pool {victim} fails {rate} in 1000"));
                world.disk(disk).trouble.eio_per_mille = rate;
                drop(world);
                self.later(long, Repair::Disk(victim));
            }
            _ => {
                let rate = 20 + self.rng.below(500);
                let mut world = self.cluster.world();
                world.say(format_args!("pool {victim} has no room {rate} in 1000 times"));
                world.disk(disk).trouble.no_space_per_mille = rate;
                drop(world);
                self.later(long, Repair::Disk(victim));
            }
        }
    }

    fn hurt_hosts(&mut self) {
        let hosts = self.cluster.host_machine();
        let long = [20 * MS, 300 * MS, 4_000 * MS][self.rng.index(3)];
        let short = self.rng.below(long);
        let way = self.rng.below(6);
        let mut world = self.cluster.world();
        match way {
            0 => world.block(NEXUS, hosts, short),
            1 => world.block(hosts, NEXUS, short),
            2 => {
                world.block(NEXUS, hosts, short);
                world.block(hosts, NEXUS, short);
            }
            _ => world.reset(NEXUS, hosts, 500),
        }
    }

    /// What cuts off every replica at once: no write can be done, and none may be half done later.
    fn hurt_everything(&mut self) {
        let slow = self.rng.below(80 * MS);
        let pools = 0..self.cluster.replicas();
        match self.rng.below(3) {
            0 => {
                let late = self.rng.below(2_000 * MS);
                for at in pools {
                    let disk = self.cluster.disk(at);
                    let mut world = self.cluster.world();
                    world.disk(disk).trouble.late_per_mille = 50;
                    world.disk(disk).trouble.late_ns = late;
                    drop(world);
                    self.later(4_000 * MS, Repair::Disk(at));
                }
                let ms = late / MS;
                self.cluster.world().say(format_args!("every pool is late now and then ({ms} ms)"));
            }
            1 => {
                for at in pools {
                    let machine = self.cluster.machine_of(at);
                    self.cluster.world().reset(NEXUS, machine, 1000);
                }
            }
            _ => {
                for at in pools {
                    let disk = self.cluster.disk(at);
                    self.cluster.world().disk(disk).trouble.slow_ns = slow;
                    self.later(200 * MS, Repair::Disk(at));
                }
                self.cluster.world().say(format_args!("every pool is slow"));
            }
        }
    }

    /// A scrub leaves no bad block, and one that compares no difference.
    fn scrub(&mut self) {
        let deep = self.rng.chance(400);
        self.cluster.scrub(deep);
        let limit = self.cluster.world().now_ns() + RECOVERY_NS;
        while !self.cluster.scrubs_are_done() {
            let now = self.cluster.world().now_ns();
            assert!(now < limit, "a scrub does not end: {:?}", self.cluster.volumes());
            self.cluster.run_until(now + 50 * MS);
        }
        let calm = Faults { full: self.faults.full, rot: self.faults.rot, ..Faults::NONE };
        for volume in self.cluster.volumes().expect("the nexus runs") {
            let everybody = volume.children.iter().all(|c| c.in_sync);
            assert!(self.faults != calm || everybody, "a replica was taken out: {volume:?}");
            let report = volume.scrub.expect("a scrub ran");
            // A replica whose pool has gone offline is taken out by what it could not heal.
            let left = report.findings.iter().filter(|f| {
                let out = !volume.children[usize::from(f.child.0)].in_sync;
                // What a full pool has no room for stays different.
                let full = deep && self.small == Some(usize::from(f.child.0));
                f.found == Found::Unrecoverable || f.found == Found::NotHealed && !out && !full
            });
            assert_eq!((left.count(), report.unrecoverable), (0, 0), "{report:?}");
            self.mended.0 += volume.mends.healed;
            self.mended.1 += volume.mends.converged;
        }
        self.cluster.compare(deep && self.small.is_none());
        self.cluster.check_snapshots();
    }

    /// Nothing goes wrong any more: everything is served again, and is right.
    fn recover(&mut self) {
        self.cluster.world().say(format_args!("faults stop"));
        self.cluster.world().heal();
        for at in 0..self.cluster.replicas() {
            self.mend(Repair::Disk(at));
            if !self.cluster.is_local(at) {
                self.mend(Repair::StartReplica(at));
            }
        }
        self.mend(Repair::StartNexus);
        // Where a pool has gone offline and its replica was the last in sync, somebody must.
        let alone = self.faults.everywhere || self.cluster.replicas() < 3;
        if self.faults.replica && (alone || self.rng.chance(300)) {
            self.restart_victim();
        }
        self.cluster.verify();
        let verified = self.cluster.run_while(RECOVERY_NS, Cluster::clients_are_done);
        let state = self.cluster.volumes();
        assert!(verified, "not every block can be read: {state:?}");
        // What the verification left behind settles.
        let quiet = self.cluster.world().now_ns() + 5_000 * MS;
        self.cluster.run_until(quiet);
        self.scrub();
        for volume in 0..self.cluster.volume_count() {
            self.cluster.history(volume).borrow_mut().judge_all();
        }
    }
}
