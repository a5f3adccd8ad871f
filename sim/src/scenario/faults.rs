//! What goes wrong.

use cairn_engine::nexus::Purpose;

use super::{Repair, Run, WORK_NS};
use crate::world::{MS, Machine};

/// What may go wrong next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nexus,
    Replica,
    Hosts,
    Everything,
    Rot,
    Takeover,
    Pause,
    Partition,
    Blackout,
    Storm,
    Slip,
}

impl Run {
    /// Whether the volumes may be left without a majority that is well: whoever looks after the cluster
    /// restarts what has gone offline or hangs.
    pub(super) fn needs_help(&self) -> bool {
        let f = self.faults;
        let several = f.everywhere || f.takeover || f.pause || f.partition || f.blackout || f.storm;
        // One error may take the pool offline of which there is no other.
        several || f.slips || self.operator.is_some() || self.cluster.voters() < 3
    }

    pub(super) fn restart_victim(&mut self) {
        self.cluster.world().heal();
        self.mend(Repair::Disk(self.victim));
        if let Some(which) = self.cluster.home(self.victim) {
            self.cluster.kill_process(which);
        } else {
            self.cluster.kill_replica(self.victim);
            self.mend(Repair::StartReplica(self.victim));
        }
        self.mend(Repair::StartNexus);
        self.mend(Repair::StartOther);
    }

    pub(super) fn mend(&mut self, what: Repair) {
        match what {
            Repair::StartNexus if !self.cluster.nexus_runs() => {
                self.cluster.start_nexus(Purpose::Assemble);
            }
            Repair::StartOther if self.cluster.has_second() => {
                let other = 1 - self.cluster.active();
                if !self.cluster.process_runs(other) {
                    self.cluster.start_process(other);
                }
            }
            Repair::StartReplica(at)
                if !self.cluster.is_local(at)
                    && !self.cluster.is_gone(at)
                    && !self.cluster.replica_runs(at) =>
            {
                self.cluster.start_replica(at);
            }
            Repair::Disk(at) => {
                for disk in self.cluster.disks(at).to_vec() {
                    self.cluster.world().disk(disk).trouble = crate::disk::DiskTrouble::default();
                }
            }
            Repair::StartNexus | Repair::StartOther | Repair::StartReplica(_) => {}
        }
    }

    fn later(&mut self, most_ns: u64, what: Repair) {
        let at = self.cluster.world().now_ns() + MS + self.rng.below(most_ns);
        self.repairs.push((at, what));
    }

    pub(super) fn hurt(&mut self) {
        let f = self.faults;
        let kinds = [
            (f.nexus, Kind::Nexus),
            (f.replica, Kind::Replica),
            (f.replica, Kind::Replica),
            (f.host, Kind::Hosts),
            (f.everywhere, Kind::Everything),
            (self.rots(), Kind::Rot),
            (self.rots(), Kind::Rot),
            (f.takeover, Kind::Takeover),
            (f.takeover, Kind::Takeover),
            (f.pause, Kind::Pause),
            (f.partition, Kind::Partition),
            (f.blackout, Kind::Blackout),
            (f.storm, Kind::Storm),
            (f.slips, Kind::Slip),
        ];
        let kinds: Vec<Kind> = kinds.iter().filter(|(on, _)| *on).map(|(_, kind)| *kind).collect();
        if kinds.is_empty() {
            self.most = 0;
            return;
        }
        self.count += 1;
        match kinds[self.rng.index(kinds.len())] {
            Kind::Nexus => {
                self.cluster.kill_nexus();
                let most = [5 * MS, 200 * MS, 3_000 * MS][self.rng.index(3)];
                self.later(most, Repair::StartNexus);
            }
            Kind::Replica => self.hurt_replica(),
            Kind::Hosts => self.hurt_hosts(),
            Kind::Rot => {
                for _ in 0..1 + self.rng.below(12) {
                    self.cluster.rot(self.rotten());
                }
            }
            Kind::Everything => self.hurt_everything(),
            Kind::Takeover => self.take_over(),
            Kind::Pause => self.pause(),
            Kind::Partition => self.part(),
            Kind::Blackout => self.black_out(),
            Kind::Storm => self.storm(),
            Kind::Slip => self.slip(),
        }
    }

    /// The replica whose blocks rot: not the one that may be lost, so that a third has each block; and
    /// not one that a crash may make take what it finds for right, since its extents were dirty.
    fn rotten(&self) -> usize {
        (self.victim + 1) % self.cluster.replicas()
    }

    pub(super) fn rots(&self) -> bool {
        let can = self.cluster.replicas() >= 3 && !self.cluster.is_local(self.rotten());
        // Nor where two others may go: one that fails while another is full.
        let f = self.faults;
        let two = f.everywhere || f.full && f.replica;
        let crashes = f.takeover || f.pause || f.partition || f.blackout || f.storm;
        f.rot && !two && !crashes && can
    }

    fn short(&mut self) -> (u64, u64) {
        let long = [20 * MS, 300 * MS, 4_000 * MS][self.rng.index(3)];
        (self.rng.below(long), long)
    }

    /// The other machine takes the volumes, while the one that has them lives, is stopped, is cut off
    /// alone or with some replicas, or has just died.
    fn take_over(&mut self) {
        let old = self.cluster.active();
        let old_machine = self.cluster.active_machine();
        let (short, long) = self.short();
        match self.rng.below(6) {
            0 => {
                self.cluster.kill_nexus();
                self.later(long, Repair::StartOther);
            }
            1 => self.cluster.pause_process(old, short),
            2 => {
                // Hosts may still reach it, or may not; some replicas too.
                let mut others = self.machines();
                others.retain(|m| *m != old_machine);
                let with = self.rng.below(others.len() as u64 + 1);
                for other in others {
                    if self.rng.below(self.cluster.replicas() as u64 + 2) >= with {
                        self.cut(old_machine, other, short);
                    }
                }
            }
            _ => {}
        }
        if !self.cluster.process_runs(1 - old) {
            self.cluster.start_process(1 - old);
        }
        self.cluster.take_over();
        if self.rng.chance(500) {
            self.cluster.retire_other();
        }
    }

    /// All machines but the hosts'.
    pub(super) fn machines(&self) -> Vec<Machine> {
        let pools = (0..self.cluster.pools()).map(|at| self.cluster.machine_of(at));
        let mut all: Vec<Machine> = pools.collect();
        all.push(self.cluster.nexus_machine(0));
        if self.cluster.has_second() {
            all.push(self.cluster.nexus_machine(1));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Nothing passes between two machines, or nothing one way.
    fn cut(&mut self, a: Machine, b: Machine, for_ns: u64) {
        let way = self.rng.below(4);
        let mut world = self.cluster.world();
        if way != 1 {
            world.block(a, b, for_ns);
        }
        if way != 2 {
            world.block(b, a, for_ns);
        }
    }

    fn pause(&mut self) {
        let (short, _) = self.short();
        match self.rng.below(4) {
            0 => self.cluster.pause_replica(self.victim, short),
            1 => self.cluster.pause_process(1 - self.cluster.active(), short),
            _ => self.cluster.pause_process(self.cluster.active(), short),
        }
    }

    /// The machines, hosts too, fall into two islands.
    fn part(&mut self) {
        let (short, _) = self.short();
        let mut machines = self.machines();
        machines.push(self.cluster.host_machine());
        let here: Vec<bool> = machines.iter().map(|_| self.rng.chance(500)).collect();
        for (a, a_here) in machines.iter().zip(&here) {
            for (b, b_here) in machines.iter().zip(&here) {
                if *a_here && !*b_here {
                    self.cut(*a, *b, short);
                }
            }
        }
    }

    fn black_out(&mut self) {
        self.cluster.cut_all_power();
        let most = [5 * MS, 200 * MS, 3_000 * MS][self.rng.index(3)];
        for at in 0..self.cluster.pools() {
            self.later(most, Repair::StartReplica(at));
        }
        self.later(most, Repair::StartNexus);
        self.later(most, Repair::StartOther);
    }

    /// Nexuses and replicas die in one moment or within a few, and come back in any order.
    fn storm(&mut self) {
        let most = [5 * MS, 100 * MS, 2_000 * MS][self.rng.index(3)];
        let gap = [0, 200_000, 3 * MS][self.rng.index(3)];
        for _ in 0..2 + self.rng.below(4) {
            let at = self.rng.index(self.cluster.pools() + 2);
            match at.checked_sub(self.cluster.pools()) {
                None if !self.cluster.is_local(at) => {
                    self.cluster.kill_replica(at);
                    self.later(most, Repair::StartReplica(at));
                }
                None => {}
                Some(0) => {
                    self.cluster.kill_nexus();
                    self.later(most, Repair::StartNexus);
                }
                Some(_) => {
                    let other = 1 - self.cluster.active();
                    self.cluster.kill_process(other);
                    self.later(most, Repair::StartOther);
                }
            }
            let now = self.cluster.world().now_ns();
            let pause = self.rng.below(gap.max(1));
            self.cluster.run_until(now + pause);
        }
    }

    /// Single operations of one disk fail, or its writes end up elsewhere on it.
    fn slip(&mut self) {
        let at = self.rotten();
        if self.rots() && self.rng.chance(500) {
            let writes = 1 + u32::try_from(self.rng.below(3)).expect("a few");
            self.cluster.misdirect(at, writes);
            return;
        }
        let times = 1 + u32::try_from(self.rng.below(3)).expect("a few");
        let disk = self.cluster.disk(self.victim);
        let mut world = self.cluster.world();
        world.say(format_args!("{times} operations of pool {} fail", self.victim));
        world.disk(disk).trouble.eio_next = times;
    }

    fn hurt_replica(&mut self) {
        let victim = self.victim;
        let machine = self.cluster.machine_of(victim);
        let nexus = self.cluster.active_machine();
        let disk = self.cluster.disk(victim);
        let (short, long) = self.short();
        let for_good = !self.faults.everywhere && self.rng.chance(200);
        // One of several disks that fails is left behind, with what only it held.
        let copies = self.cluster.replicas() > 1 && self.operator.is_none();
        let stays = self.cluster.is_wide(victim) && !copies;
        let kind = match self.rng.below(8) {
            5 | 7 if stays => 3,
            kind => kind,
        };
        match kind {
            0 if !self.cluster.is_local(victim) => {
                self.cluster.kill_replica(victim);
                self.later(long, Repair::StartReplica(victim));
            }
            1 if machine != nexus => self.cluster.world().reset(nexus, machine, 700),
            2 if machine != nexus => {
                let way = self.rng.below(3);
                let mut world = self.cluster.world();
                if way != 1 {
                    world.block(nexus, machine, short);
                }
                if way != 2 {
                    world.block(machine, nexus, short);
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
            6 if !self.cluster.is_local(victim) => {
                self.cluster.cut_power(victim);
                self.later(long, Repair::StartReplica(victim));
            }
            _ if stays => {}
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
        let nexus = self.cluster.active_machine();
        let hosts = self.cluster.host_machine();
        let (short, _) = self.short();
        let way = self.rng.below(6);
        let mut world = self.cluster.world();
        match way {
            0 => world.block(nexus, hosts, short),
            1 => world.block(hosts, nexus, short),
            2 => {
                world.block(nexus, hosts, short);
                world.block(hosts, nexus, short);
            }
            _ => world.reset(nexus, hosts, 500),
        }
    }

    /// What cuts off every replica at once: no write can be done, and none may be half done later.
    fn hurt_everything(&mut self) {
        let slow = self.rng.below(80 * MS);
        let pools = 0..self.cluster.pools();
        let nexus = self.cluster.active_machine();
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
                    self.cluster.world().reset(nexus, machine, 1000);
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
}
