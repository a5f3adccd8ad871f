//! What a run is about: most seeds draw one situation that is rare where everything goes wrong by chance, and
//! bring it about again and again.

use super::{Faults, Repair, Run, standby};
use crate::client::{Aim, Orders, Workload};
use crate::cluster::{Cluster, ClusterConfig};
use crate::rng::Rng;
use crate::world::{MS, US};

/// Blocks of a volume.
const BLOCKS: u64 = 1024;

/// What a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    /// Whatever the faults are.
    Everything,
    /// Members that are away for a while and are rebuilt under load, and what happens the moment they are back.
    Rebuild,
    /// A nexus that is cut off or stopped while hosts still read from it.
    Takeover,
    /// Losses of power just after something was answered, and before anything else is written.
    Power,
    /// A nexus that dies with much on its way to few blocks, which are read at once.
    Reconcile,
    /// Extents that are discarded, allocated and settled all the time, and snapshots of that.
    Churn,
    /// Two processes that stand by for each other; only where it is asked for.
    Standby,
    /// One replica, whose disk fails single operations; only where it is asked for.
    Lone,
    /// Volumes that go back to snapshots; only where it is asked for, but for rounds at the end of some seeds.
    Restore,
    /// Whatever the faults are, and a pool on two disks of which one dies; only where it is asked for.
    Disks,
    /// Whatever the faults are, and processes whose connections go from the shard that listens to another one; only
    /// where it is asked for.
    Shards,
    /// Whatever the faults are, and hosts over iSCSI beside the others, which count in a block and reserve the volume;
    /// only where it is asked for.
    Initiators,
    /// Writes that are done whole or not at all; only where it is asked for.
    Whole,
}

impl Focus {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Everything,
        Self::Rebuild,
        Self::Takeover,
        Self::Power,
        Self::Reconcile,
        Self::Churn,
        Self::Standby,
        Self::Lone,
        Self::Restore,
        Self::Disks,
        Self::Shards,
        Self::Initiators,
        Self::Whole,
    ];
    /// Those that seeds draw.
    const DRAWN: &[Self] = Self::ALL.split_at(6).0;

    /// What the run of a seed is about; drawn apart.
    #[must_use]
    pub fn drawn(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xf0c5);
        if rng.chance(250) {
            Self::Everything
        } else {
            Self::DRAWN[1 + rng.index(Self::DRAWN.len() - 1)]
        }
    }

    /// Whether hosts work while faults come by chance, and nothing is brought about.
    pub(super) fn is_chance(self) -> bool {
        matches!(self, Self::Everything | Self::Disks | Self::Shards | Self::Initiators)
    }

    /// The faults that go with it.
    pub(super) fn keep(self, faults: Faults, seed: u64) -> Faults {
        if matches!(self, Self::Everything | Self::Shards) {
            return faults;
        }
        let mut rng = Rng::new(seed ^ 0xfa17);
        // Where something rots, disks cannot be compared at any moment.
        let faults = Faults { rot: false, slips: false, full: false, ..faults };
        match self {
            Self::Disks => return Faults { replica: true, ..faults },
            Self::Initiators => return Faults { nexus: true, ..faults },
            _ => {}
        }
        let takeover = self == Self::Takeover || rng.chance(200);
        let faults = Faults { takeover, nexus: true, replica: true, storm: true, ..faults };
        let pure = rng.chance(600);
        if pure { Faults { everywhere: false, partition: false, ..faults } } else { faults }
    }

    /// The cluster for it.
    pub(super) fn shape(self, config: ClusterConfig, seed: u64) -> ClusterConfig {
        if self == Self::Everything {
            return config;
        }
        if self == Self::Shards {
            // Of two seeds one has a replica in the process of the volume, on another shard.
            let apart = seed % 2 == 1;
            let local_replica = config.local_replica || apart;
            return ClusterConfig { fronts: true, pools_in_front: apart, local_replica, ..config };
        }
        if self == Self::Initiators {
            let (replicas, fronts) = (config.replicas.max(2), seed.is_multiple_of(4));
            let blocks = config.blocks + 1;
            return ClusterConfig { replicas, fronts, blocks, initiators: true, ..config };
        }
        let mut rng = Rng::new(seed ^ 0x54a9);
        if self == Self::Disks {
            let replicas = config.replicas.max(2);
            return ClusterConfig { replicas, wide_pool: Some(rng.index(replicas)), ..config };
        }
        let mut tuning = config.tuning;
        tuning.pace.settle_ms = [5, 20, 100, 1_000][rng.index(4)];
        tuning.pace.checkpoint_ms = [20, 200, 10_000][rng.index(3)];
        tuning.pace.rebuild_mib_s = [0, 2, 8, 32][rng.index(4)];
        tuning.looks_each = 4;
        tuning.dirty_extents = [None, Some(0), Some(1), Some(2)][rng.index(4)];
        // A nexus that hears of nothing for a second has not given up its replicas yet.
        let patient = matches!(self, Self::Takeover | Self::Standby) && rng.chance(700);
        let (deadline, kato) = (config.child_deadline_ms, config.replica_kato_ms);
        let mut config = ClusterConfig {
            child_deadline_ms: if patient { 3_000 } else { deadline },
            replica_kato_ms: if patient { 4_000 } else { kato },
            volumes: if rng.chance(850) { 1 } else { config.volumes },
            tears: config.tears && rng.chance(400),
            local_replica: rng.chance(if self == Self::Takeover { 600 } else { 250 }),
            second_local: config.second_local && (self != Self::Takeover || rng.chance(200)),
            blocks: BLOCKS,
            // What was given back is used again soon.
            disk_len: if self == Self::Churn && rng.chance(500) { 12 << 20 } else { 24 << 20 },
            tuning,
            ..config
        };
        match self {
            Self::Standby => standby::shape(&mut config, seed),
            Self::Lone => (config.replicas, config.second_local) = (1, false),
            _ => {}
        }
        config
    }

    /// How many hosts each volume has.
    pub(super) fn hosts(self, drawn: usize) -> usize {
        if self.is_chance() { drawn } else { 2 }
    }

    /// What hosts do until they are told: nothing.
    pub(super) fn work(self, drawn: Workload) -> Workload {
        match self {
            focus if focus.is_chance() => drawn,
            _ => Workload { depth: 32, requests: 0, ..drawn },
        }
    }
}

/// Writes and few reads.
pub(super) const WRITES: Orders = Orders {
    requests: 30,
    depth: 8,
    gap_ns: 0,
    reads_per_mille: 100,
    flushes_per_mille: 10,
    fua_per_mille: 50,
    aim: Aim::Each(0, BLOCKS),
};

/// Every block, by each host.
const READ_ALL: Orders = Orders {
    requests: BLOCKS / 16,
    depth: 4,
    gap_ns: 0,
    reads_per_mille: 1000,
    flushes_per_mille: 0,
    fua_per_mille: 0,
    aim: Aim::Sweep,
};

impl Run {
    /// Has hosts do what the situation needs, and brings it about a few times.
    pub(super) fn work_at(&mut self, focus: Focus) {
        self.cluster.world().say(format_args!("it is about {focus:?}"));
        self.await_serving();
        let aim = self.area();
        let requests = 10 + self.rng.below(40);
        self.tell(Orders { requests, depth: 32, aim, ..WRITES });
        self.pass_busy(2_000 * MS);
        let most = if focus == Focus::Power { 5 } else { 3 };
        for _ in 0..1 + self.rng.below(most) {
            match focus {
                Focus::Everything | Focus::Disks | Focus::Shards | Focus::Initiators => {}
                Focus::Rebuild => self.rebuilds_round(),
                Focus::Takeover => self.takeover_round(),
                Focus::Power if self.rng.chance(250) => self.vigil(),
                Focus::Power => self.power_round(),
                Focus::Reconcile => self.reconcile_round(),
                Focus::Churn => self.churn_round(),
                Focus::Standby => self.standby_round(),
                Focus::Lone => self.lone_round(),
                Focus::Restore => self.restore_round(),
                Focus::Whole => self.whole_round(),
            }
            if self.rng.chance(150) {
                self.hurt();
            }
        }
        if let Some(rng) = self.restores.take() {
            self.restore_rounds(rng);
        }
        self.tell(Orders { requests: 0, ..WRITES });
        self.most = self.count;
        self.await_hosts();
    }

    // ---- what rounds are made of

    /// Some blocks: a few, those of an extent or two, or all of them.
    pub(super) fn area(&mut self) -> Aim {
        let extents = 1 + self.rng.below(4);
        let first = 256 * self.rng.below(5 - extents);
        match self.rng.below(4) {
            0 => Aim::Within(first + self.rng.below(200), 1 + self.rng.below(30)),
            1 => Aim::Within(first, 256 * extents),
            _ => Aim::Each(first, 256 * extents),
        }
    }

    pub(super) fn tell(&mut self, orders: Orders) {
        for host in 0..self.cluster.hosts() {
            self.cluster.order(host, orders);
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.cluster.world().now_ns()
    }

    /// Lets time pass, and looks after what is due.
    pub(super) fn pass(&mut self, for_ns: u64) {
        self.pass_until(for_ns, |_| false);
    }

    /// Lets time pass until the hosts have done what they were told to.
    pub(super) fn pass_busy(&mut self, most_ns: u64) {
        self.pass_until(most_ns, |cluster| cluster.clients_are_done());
    }

    /// Lets time pass until something is so. Returns whether it is.
    pub(super) fn pass_until(
        &mut self,
        most_ns: u64,
        mut so: impl FnMut(&mut Cluster) -> bool,
    ) -> bool {
        let end = self.now() + most_ns;
        loop {
            if so(&mut self.cluster) {
                return true;
            }
            let now = self.now();
            if now >= end {
                return false;
            }
            let next = self.tend(now).min(end).min(now + 5 * MS);
            self.cluster.run_until(next.max(now + 1));
        }
    }

    /// A moment: none, or one that something takes which was just begun, or one like a settling round's.
    pub(super) fn moment(&mut self) -> u64 {
        let most = [1, 300 * US, 3 * MS, 30 * MS][self.rng.index(4)];
        self.rng.below(most)
    }

    pub(super) fn any_pool(&mut self) -> usize {
        self.rng.index(self.cluster.replicas())
    }

    /// Operations of a disk, or of all, take a while, each another one.
    pub(super) fn slow_down(&mut self) {
        let slow_ns = [0, 300 * US, 3 * MS, 25 * MS][self.rng.index(4)];
        let one = self.rng.chance(600).then(|| self.any_pool());
        for at in 0..self.cluster.replicas() {
            let disk = self.cluster.disk(at);
            let slow_ns = if one.is_none_or(|one| one == at) { slow_ns } else { 0 };
            self.cluster.world().disk(disk).trouble.slow_ns = slow_ns;
        }
    }

    /// A pool's process dies, is cut off, or loses its connections, for a while.
    pub(super) fn leaves(&mut self, at: usize) {
        let machine = self.cluster.machine_of(at);
        let nexus = self.cluster.active_machine();
        let most = [20 * MS, 300 * MS, 1_500 * MS][self.rng.index(3)];
        let for_ns = self.rng.below(most);
        match self.rng.below(4) {
            0 | 1 if !self.cluster.is_local(at) => {
                self.cluster.kill_replica(at);
                self.repairs.push((self.now() + for_ns, Repair::StartReplica(at)));
            }
            2 if machine != nexus => {
                self.cluster.world().block(machine, nexus, for_ns);
                self.cluster.world().block(nexus, machine, for_ns);
                self.cluster.world().reset(nexus, machine, 1000);
            }
            _ if machine != nexus => self.cluster.world().reset(nexus, machine, 1000),
            _ => {
                let disk = self.cluster.disk(at);
                let until = self.now() + for_ns;
                self.cluster.world().disk(disk).trouble.hung_until_ns = until;
            }
        }
    }

    pub(super) fn loses_power(&mut self, at: usize, soon_ns: u64) {
        if let Some(which) = self.cluster.home(at) {
            let what = if which == self.cluster.active() {
                Repair::StartNexus
            } else {
                Repair::StartOther
            };
            self.repairs.push((self.now() + soon_ns, what));
        } else {
            self.repairs.push((self.now() + soon_ns, Repair::StartReplica(at)));
        }
        self.cluster.cut_power(at);
    }

    pub(super) fn all_lose_power(&mut self, soon_ns: u64) {
        self.cluster.cut_all_power();
        let soon = self.now() + soon_ns;
        for at in 0..self.cluster.replicas() {
            self.repairs.push((soon, Repair::StartReplica(at)));
        }
        self.repairs.push((soon, Repair::StartNexus));
        self.repairs.push((soon, Repair::StartOther));
    }

    pub(super) fn nexus_dies(&mut self, soon_ns: u64) {
        self.cluster.kill_nexus();
        self.repairs.push((self.now() + soon_ns, Repair::StartNexus));
    }

    /// Where nothing is under way, members in sync are alike, whatever is open.
    pub(super) fn look_when_quiet(&mut self) {
        let quiet = |r: &cairn_engine::VolumeReport| {
            let online = |c: &cairn_engine::ChildReport| !c.in_sync || c.state == "online";
            r.serving && r.unreconciled.0 == 0 && r.in_flight == 0 && r.children.iter().all(online)
        };
        let all = self.cluster.glance();
        let served = all.len() == self.cluster.volume_count() && all.iter().all(quiet);
        if served
            && self.cluster.all_pools_run()
            && self.cluster.clients_are_done()
            && !self.cluster.goes_back()
        {
            self.cluster.compare(false);
        }
    }

    // ---- the rounds

    /// A member is away, misses this and that, is rebuilt while hosts go on, and is back.
    fn rebuilds_round(&mut self) {
        let mut apart = Rng::new(self.now() ^ 0x101e);
        if apart.chance(250) {
            self.joiner_round(&mut apart);
            return self.settle_down();
        }
        let victim = self.any_pool();
        self.slow_down();
        self.leaves(victim);
        // What it misses: some of it is settled by the time that it is back.
        for _ in 0..1 + self.rng.below(2) {
            let aim = self.area();
            let requests = 2 + self.rng.below(15);
            self.tell(Orders { requests, gap_ns: MS, aim, ..WRITES });
            self.pass_busy(1_000 * MS);
            let settle = self.moment() + 10 * self.moment();
            self.pass(settle);
        }
        if self.rng.chance(250) {
            // Its successor does not know how often the member went out.
            let soon = self.moment();
            self.nexus_dies(soon);
        }
        let until = 3_000 * MS;
        if !self.pass_until(until, Cluster::rebuilds) {
            return;
        }
        let aim = match self.rng.below(3) {
            0 => Aim::Within(self.rng.below(1000), 1 + self.rng.below(8)),
            1 => Aim::Within(0, BLOCKS),
            _ => Aim::Each(0, BLOCKS),
        };
        let reads_per_mille = [0, 100, 500][self.rng.index(3)];
        let requests = 50 + self.rng.below(250);
        let gap_ns = [0, 100 * US, 2 * MS][self.rng.index(3)];
        let depth = [4, 16, 32][self.rng.index(3)];
        self.tell(Orders { requests, depth, gap_ns, reads_per_mille, aim, ..WRITES });
        if self.rng.chance(250) {
            let soon = self.moment() * 4;
            self.pass(soon);
            match self.rng.below(3) {
                0 => self.leaves(victim),
                1 => self.loses_power(victim, soon),
                _ => self.nexus_dies(soon),
            }
        }
        // The moment that it is back is not to be missed.
        for _ in 0..8 {
            let before = self.cluster.config_of(0);
            let changed = |cluster: &Cluster| cluster.config_of(0) != before;
            if !self.cluster.run_while(1_000 * MS, changed) || !self.cluster.lacks_a_member() {
                break;
            }
        }
        let moment = self.moment();
        match self.rng.below(8) {
            4 | 5 => {
                // And nothing is written after that.
                self.tell(Orders { requests: 0, ..WRITES });
                let machine = self.cluster.machine_of(victim);
                let nexus = self.cluster.active_machine();
                self.cluster.world().reset(nexus, machine, 1000);
            }
            0 => self.all_lose_power(moment),
            1 => {
                self.nexus_dies(moment);
                self.loses_power(victim, 0);
            }
            2 => self.loses_power(victim, moment),
            3 => self.check_members(),
            _ => {}
        }
        self.pass_busy(1_000 * MS);
        self.settle_down();
    }

    /// Waits until hosts are done, a while longer, and looks.
    pub(super) fn settle_down(&mut self) {
        self.slow_down();
        self.tell(Orders { requests: 0, ..WRITES });
        self.pass_busy(1_000 * MS);
        let settle = self.moment() * 2;
        self.pass(settle);
        self.look_when_quiet();
    }

    fn check_members(&mut self) {
        let mut rng = self.rng.fork();
        self.cluster.check_members(&mut rng);
    }

    /// Hosts read from a nexus that is cut off or stopped, and others write through the next one.
    fn takeover_round(&mut self) {
        let old = self.cluster.active();
        let old_machine = self.cluster.active_machine();
        let hot = Aim::Within(self.rng.below(1000), 1 + self.rng.below(8));
        let reading = Orders {
            requests: 500,
            depth: 2,
            gap_ns: 15 * MS,
            reads_per_mille: 1000,
            aim: hot,
            ..WRITES
        };
        let writing = Orders { reads_per_mille: 200, ..reading };
        let first = [reading, writing][self.rng.index(2)];
        self.tell(first);
        self.pass(30 * MS);
        self.tell(reading);
        let mut others = self.machines();
        others.retain(|m| *m != old_machine);
        let long = 500 * MS + self.rng.below(2_500 * MS);
        let next = self.cluster.nexus_machine(1 - old);
        match self.rng.below(8) {
            0 => self.cluster.pause_process(old, long / 2),
            2..=4 => {
                // The answers to its last renewals are late, and it can ask for no more.
                let mut soon = self.rng.below(520 * MS);
                let mut late = soon + self.rng.below(400 * MS);
                // Drawn apart: nothing else changes with it. Hosts have just begun to read: the renewal that is due
                // after half of the lease is sent, granted, and its answer comes when others may serve.
                let mut later = Rng::new(self.now() ^ 0x1ea5);
                if later.chance(600) {
                    soon = 450 * MS + later.below(80 * MS);
                    late = soon + 150 * MS + later.below(600 * MS);
                }
                for other in &others {
                    let late = if *other == next { long } else { late };
                    self.cluster.world().block(*other, old_machine, late);
                }
                self.pass(soon);
                for other in &others {
                    self.cluster.world().block(old_machine, *other, long);
                }
            }
            1 => {}
            _ => {
                // One replica may be cut off with it.
                let with = self.rng.chance(500).then(|| self.rng.index(others.len()));
                for (at, other) in others.iter().enumerate() {
                    if with != Some(at) {
                        self.cluster.world().block(old_machine, *other, long);
                        self.cluster.world().block(*other, old_machine, long);
                    }
                }
            }
        }
        if !self.cluster.process_runs(1 - old) {
            self.cluster.start_process(1 - old);
        }
        self.cluster.take_over();
        // A host that finds the next one not serving yet goes back to the old one, and what it writes there holds up
        // who reads the same blocks: most wait.
        if Rng::new(self.now() ^ 0x4a17).chance(700) {
            let volumes = self.cluster.volume_count();
            self.pass_until(3_000 * MS, |cluster| {
                let all = cluster.glance();
                all.len() == volumes && all.iter().all(|r| r.serving)
            });
        }
        for host in 0..self.cluster.hosts() {
            if host % 2 == 1 {
                self.cluster.move_host(host);
                self.cluster.order(host, writing);
            }
        }
        let most = 1_500 * MS + self.rng.below(1_500 * MS);
        self.pass(most);
        if self.rng.chance(500) {
            self.cluster.world().heal();
            self.cluster.world().resume_all();
            self.pass(200 * MS);
        }
        if self.rng.chance(500) {
            self.cluster.retire_other();
        }
        self.tell(Orders { requests: 0, ..WRITES });
        self.pass_busy(500 * MS);
        self.look_when_quiet();
    }

    /// Something is written and answered, nothing else is, and then power is lost.
    fn power_round(&mut self) {
        self.slow_down();
        let aim = self.area();
        let fua_per_mille = [0, 300, 1000][self.rng.index(3)];
        let flushes_per_mille = [0, 0, 100][self.rng.index(3)];
        let requests = 1 + self.rng.below(25);
        let gap_ns = [0, 3 * MS][self.rng.index(2)];
        let orders = Orders {
            requests,
            gap_ns,
            reads_per_mille: 0,
            flushes_per_mille,
            fua_per_mille,
            aim,
            ..WRITES
        };
        self.tell(orders);
        if self.rng.chance(750) {
            self.pass_busy(1_000 * MS);
            if self.rng.chance(200) {
                let last = Orders { requests: 1, flushes_per_mille: 1000, ..orders };
                self.tell(last);
                self.pass_busy(1_000 * MS);
            }
        }
        let moment = self.moment();
        self.pass(moment);
        if self.rng.chance(300) {
            self.check_members();
        }
        let moment = self.moment();
        let at = self.any_pool();
        match self.rng.below(6) {
            0..=2 => self.loses_power(at, moment.min(MS)),
            3 => {
                self.nexus_dies(moment);
                self.loses_power(at, 0);
            }
            _ => self.all_lose_power(moment),
        }
        if self.rng.chance(500) {
            // Which settling rounds see before any host does.
            let settle = self.moment() + 20 * MS;
            self.pass(settle);
        }
        self.tell(READ_ALL);
        self.pass_busy(1_500 * MS);
        self.settle_down();
    }

    /// Hosts write now and then, all of which is settled, and any moment may be the one of a crash.
    fn vigil(&mut self) {
        self.slow_down();
        let aim = self.area();
        let requests = 20 + self.rng.below(60);
        self.tell(Orders {
            requests,
            gap_ns: 6 * MS,
            depth: 4,
            aim,
            flushes_per_mille: 0,
            ..WRITES
        });
        for _ in 0..3 {
            let moment = self.moment() * 3;
            self.pass(moment);
            self.check_members();
        }
        self.settle_down();
    }

    /// A nexus dies with much on its way, and what it left is read at once.
    fn reconcile_round(&mut self) {
        let mut apart = Rng::new(self.now() ^ 0x0e7a);
        if apart.chance(250) {
            self.overtaken_round(&mut apart);
            return self.settle_down();
        }
        self.slow_down();
        let aim = if self.rng.chance(700) {
            Aim::Within(self.rng.below(1000), 1 + self.rng.below(12))
        } else {
            self.area()
        };
        let reads_per_mille = [0, 300][self.rng.index(2)];
        let requests = 20 + self.rng.below(100);
        self.tell(Orders { requests, depth: 32, reads_per_mille, aim, ..WRITES });
        if self.rng.chance(400) {
            // One gets it later than the others.
            let at = self.any_pool();
            let (machine, nexus) = (self.cluster.machine_of(at), self.cluster.active_machine());
            let late = self.moment() * 2;
            if machine != nexus {
                self.cluster.world().block(nexus, machine, late);
            }
        }
        let moment = self.moment();
        self.pass(moment);
        if self.rng.chance(300) {
            self.check_members();
        }
        let soon = [1, self.moment()][self.rng.index(2)];
        if self.cluster.has_second() && self.rng.chance(500) {
            if self.rng.chance(500) {
                self.cluster.kill_nexus();
                self.repairs.push((self.now() + 50 * MS, Repair::StartOther));
            }
            let next = 1 - self.cluster.active();
            if !self.cluster.process_runs(next) {
                self.cluster.start_process(next);
            }
            self.cluster.take_over();
        } else {
            self.nexus_dies(soon);
        }
        let at = self.any_pool();
        if self.rng.chance(250) && !self.cluster.is_local(at) {
            self.leaves(at);
        }
        let reads_per_mille = [1000, 900][self.rng.index(2)];
        self.tell(Orders {
            requests: 60,
            depth: 8,
            gap_ns: 2 * MS,
            reads_per_mille,
            aim,
            ..WRITES
        });
        self.pass_busy(2_500 * MS);
        self.settle_down();
    }

    /// Extents come and go, and are settled; snapshots are taken meanwhile; processes die.
    fn churn_round(&mut self) {
        self.slow_down();
        let requests = 20 + self.rng.below(80);
        let gap_ns = [0, 300 * US, 3 * MS][self.rng.index(3)];
        let depth = [1, 4, 16, 32][self.rng.index(4)];
        self.tell(Orders {
            requests,
            depth,
            gap_ns,
            reads_per_mille: 300,
            aim: Aim::Extents,
            ..WRITES
        });
        for _ in 0..self.rng.below(4) {
            let moment = self.moment();
            self.pass(moment);
            match self.rng.below(4) {
                0 => {
                    let volume = self.rng.index(self.cluster.volume_count());
                    let id = u128::from(self.now());
                    self.cluster.take_snapshot(volume, id);
                }
                1 => self.cluster.drop_snapshot(),
                2 => self.check_members(),
                _ => {}
            }
        }
        let (moment, soon) = (self.moment(), self.moment());
        if self.rng.chance(400) {
            // What is given up is settled, and no mark tells of it.
            self.tell(Orders { requests: 0, ..WRITES });
            self.pass_busy(300 * MS);
            self.pass(40 * MS);
            let at = self.any_pool();
            let (machine, nexus) = (self.cluster.machine_of(at), self.cluster.active_machine());
            if machine != nexus {
                // One does not hear of it from this nexus.
                self.cluster.world().block(nexus, machine, 30 * MS);
            }
            self.tell(Orders { requests: 3, reads_per_mille: 0, aim: Aim::Discards, ..WRITES });
            self.pass(MS + moment);
            if self.rng.chance(600) {
                self.nexus_dies(soon);
            }
        } else {
            self.pass(moment);
        }
        let at = self.any_pool();
        match self.rng.below(5) {
            0 | 1 => self.nexus_dies(soon),
            2 => self.leaves(at),
            3 => self.all_lose_power(soon),
            _ => {}
        }
        let requests = 20 + self.rng.below(30);
        let reads_per_mille = [300, 1000][self.rng.index(2)];
        self.tell(Orders { requests, reads_per_mille, aim: Aim::Extents, ..WRITES });
        self.pass_busy(1_500 * MS);
        if self.rng.chance(500) {
            self.tell(READ_ALL);
            self.pass_busy(1_000 * MS);
        }
        self.settle_down();
    }
}
