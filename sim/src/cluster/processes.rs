//! Processes: started, run, killed, stopped, and started again from the disks that they left.

use std::sync::mpsc;

use cairn_block::ReplicaId;
use cairn_engine::replica::{CheckOptions, PoolError, check_pool, inspect_superblock};
use cairn_engine::{Command, EngineError, Message, Reply, Shard, ShardConfig, WatchedVolume};

use super::initiators::{iscsi_config, portal};
use super::members::pool_of;
use super::{Cluster, Process, SimCommand, address, pool_name, pools, volume_of};
use crate::checks::{Check, check};
use crate::driver::SimDriver;
use crate::net::SimSocket;
use crate::world::{Inbox, MS, Machine, NodeId};

/// Turns in one moment, before it is taken for a busy loop.
const MAX_TURNS: usize = 200;

impl Cluster {
    pub(super) fn shard_config(&self, machine: Machine) -> ShardConfig {
        let number = u16::try_from(machine.0).expect("few machines");
        ShardConfig {
            node_nqn: format!("nqn.2026-11.io.cairn:node:{}", machine.0),
            node_id: machine.0 as u128 + 1,
            // 0 would say that it is not told.
            incarnation: self.lives[machine.0] + 1,
            cntlid_min: 1 + number * 1000,
            cntlid_max: 1000 + number * 1000,
            replica_kato_ms: self.config.replica_kato_ms,
            replica_queue_entries: self.config.queue_entries,
            child_deadline_min_ms: 1_000,
            lease_ms: 1_000,
            // A process of a machine is started only where the one before it is dead.
            holder: machine.0 as u128 + 1,
            replica_header_digest: self.config.digests,
            replica_data_digest: self.config.digests,
            volume_requests: self.config.volume_requests,
            assembly_wait_ms: 300,
            overcommit: 0,
            sanitize_mib_s: 0,
            pace: self.config.tuning.pace,
            shard: 0,
            shards: 1,
            iscsi: iscsi_config(machine),
        }
    }

    pub(super) fn start(&mut self, machine: Machine, arena_len: u32) -> NodeId {
        let listener = address(machine);
        let (front, node) = if self.config.fronts {
            let front = self.start_shard(machine, arena_len, (0, 2));
            let node = self.start_shard(machine, arena_len, (1, 2));
            self.partners.extend([(front, node), (node, front)]);
            self.tell(node, Message::Listening(listener));
            self.run(node);
            (front, node)
        } else {
            let node = self.start_shard(machine, arena_len, (0, 1));
            (node, node)
        };
        self.command(front, |reply| Command::AddListener { listener, advertise: listener, reply })
            .expect("the address is free");
        if self.config.initiators {
            let (listener, portal) = portal(machine);
            self.command(front, |reply| Command::AddIscsiListener { listener, portal, reply })
                .expect("the address is free");
        }
        node
    }

    fn start_shard(
        &mut self,
        machine: Machine,
        arena_len: u32,
        (shard, shards): (u16, u16),
    ) -> NodeId {
        let driver = SimDriver::new(&self.world, machine, arena_len);
        let node = driver.node();
        let config = ShardConfig { shard, shards, ..self.shard_config(machine) };
        self.add(node, Process::Shard(Box::new(Shard::new(driver, config))));
        node
    }

    /// Has a shard hear something from another one of its process.
    fn tell(&mut self, node: NodeId, message: Message<SimSocket>) {
        self.mail.entry(node).or_default().push_back(message);
        self.world().deliver(node, Inbox::Woken);
    }

    /// Passes on what a shard tells the other one of its process.
    fn pass_on(&mut self, node: NodeId) {
        let Some(&partner) = self.partners.get(&node) else { return };
        loop {
            let Process::Shard(shard) = &mut self.processes[node.0] else { return };
            let Some((_, message)) = shard.poll_message() else { return };
            self.tell(partner, message);
        }
    }

    /// All shards of a process.
    fn shards_of(&self, node: NodeId) -> impl Iterator<Item = NodeId> + use<> {
        std::iter::once(node).chain(self.partners.get(&node).copied())
    }

    pub(super) fn add(&mut self, node: NodeId, process: Process) {
        assert_eq!(node.0, self.processes.len(), "nodes are numbered as they start");
        self.processes.push(process);
    }

    pub(super) fn add_pool(&mut self, node: NodeId, at: usize) {
        self.check_recovery(at);
        let (mut pool, devices) = self.open_pool(at);
        if let Some(dirty) = self.config.tuning.dirty_extents {
            pool.set_checksum_limits(dirty.max(2), dirty);
        }
        let pool = Box::new(pool);
        let name = pool_name(at);
        self.command(node, |reply| Command::AddPool { name, devices, pool, reply })
            .expect("the pool is new to the process");
    }

    /// Starts the process of a pool.
    ///
    /// # Panics
    /// Where it runs already.
    pub fn start_replica(&mut self, at: usize) {
        assert!(self.replicas[at].is_none() && !self.is_local(at), "it runs already");
        let machine = self.machine_of(at);
        let node = self.start(machine, self.config.arena_len / 2);
        self.add_pool(node, at);
        self.replicas[at] = Some(node);
        self.world().say(format_args!("node {} serves pool {at}", node.0));
    }

    /// Starts the process of a machine that can serve, with its pool and without volumes.
    ///
    /// # Panics
    /// Where it runs already.
    pub fn start_process(&mut self, which: usize) {
        assert!(self.nexuses[which].is_none(), "it runs already");
        let node = self.start(self.nexus_machine(which), self.config.arena_len);
        self.nexuses[which] = Some(node);
        self.world().say(format_args!("node {} is nexus {which}", node.0));
        for at in self.pools_in(which) {
            let node = self.node_of(at).expect("it was just started");
            self.add_pool(node, at);
        }
    }

    /// Kills the process of a pool, if it runs.
    pub fn kill_replica(&mut self, at: usize) {
        if let Some(node) = self.replicas[at].take() {
            self.kill(node);
        }
    }

    /// Kills the process of a pool, if it runs, and what its disk had not been told to flush may be
    /// lost.
    pub fn cut_power(&mut self, at: usize) {
        match self.home(at) {
            Some(which) => self.kill_process(which),
            None => self.kill_replica(at),
        }
        let others = self.others_in_sync(at);
        let mut world = self.world();
        world.say(format_args!("pool {at} loses power"));
        let mut rng = world.rng.fork();
        for disk in &self.disks[at] {
            world.disk(*disk).lose_power(&mut rng);
        }
        drop(world);
        let machine = self.machine_of(at);
        self.lives[machine.0] += 1;
        self.note_loss(at, others);
    }

    /// Whether every pool has a process: one whose machine lost power ends no connection.
    #[must_use]
    pub fn all_pools_run(&self) -> bool {
        (0..self.pools()).all(|at| self.node_of(at).is_some())
    }

    /// A pool has lost what was not flushed.
    fn note_loss(&self, at: usize, others: bool) {
        for (volume, history) in self.histories.iter().enumerate() {
            // A witness has nothing to lose but its word, which is durable.
            if self.seats[volume].iter().any(|seat| seat.pool == at && !seat.witness) {
                history.borrow_mut().power_was_lost(!others);
            }
        }
    }

    /// Whether each volume is served with a member in sync in another pool.
    pub(super) fn others_in_sync(&mut self, at: usize) -> bool {
        if self.config.replicas == 2 {
            // The other may be cut off before it is known that this one lost something.
            return false;
        }
        // Where members come and go, so may one of two others.
        let wanted = if self.config.spares > 0 { 2 } else { 1 };
        let reports = self.reports();
        reports.iter().all(|report| {
            let others = report.children.iter().filter(|c| pool_of(c.replica) != at);
            report.serving && others.filter(|c| c.in_sync && c.state == "online").count() >= wanted
        })
    }

    /// Cuts the power of everybody but the hosts.
    pub fn cut_all_power(&mut self) {
        for which in 0..2 {
            self.kill_process(which);
        }
        for at in 0..self.config.pools() {
            self.cut_power(at);
        }
    }

    /// Kills the nexus that is to serve, if it runs.
    pub fn kill_nexus(&mut self) {
        let reports = self.reports();
        self.kill_process(self.active);
        if !self.spoilt && self.world().rng.chance(300) && !self.goes_back() {
            self.check_marks(&reports);
        }
    }

    /// Kills a nexus, if it runs.
    pub fn kill_process(&mut self, which: usize) {
        if let Some(node) = self.nexuses[which].take() {
            self.kill(node);
        }
    }

    /// Whether the process runs that is to serve.
    #[must_use]
    pub fn nexus_runs(&self) -> bool {
        self.nexuses[self.active].is_some()
    }

    /// Whether the process of a machine that can serve runs.
    #[must_use]
    pub fn process_runs(&self, which: usize) -> bool {
        self.nexuses[which].is_some()
    }

    /// Stops the process of a nexus for so long.
    pub fn pause_process(&mut self, which: usize, for_ns: u64) {
        if let Some(node) = self.nexuses[which] {
            self.pause_all(node, for_ns);
        }
    }

    /// Stops the process of a pool for so long.
    pub fn pause_replica(&mut self, at: usize, for_ns: u64) {
        if let Some(node) = self.node_of(at) {
            self.pause_all(node, for_ns);
        }
    }

    fn pause_all(&mut self, node: NodeId, for_ns: u64) {
        for node in self.shards_of(node) {
            self.world().pause(node, for_ns);
        }
    }

    /// Whether a pool's process runs.
    #[must_use]
    pub fn replica_runs(&self, at: usize) -> bool {
        self.replicas[at].is_some()
    }

    pub(super) fn kill(&mut self, node: NodeId) {
        for node in self.shards_of(node) {
            self.processes[node.0] = Process::Dead;
            self.world().kill(node);
            self.mail.remove(&node);
        }
    }

    /// Gives a node its turns for this moment.
    pub(super) fn run(&mut self, node: NodeId) {
        for _ in 0..MAX_TURNS {
            let due = self.world().is_due(node);
            match &mut self.processes[node.0] {
                Process::Dead => return,
                Process::Shard(shard) => {
                    if shard.turn()
                        && let Some(mail) = self.mail.remove(&node)
                    {
                        mail.into_iter().for_each(|message| shard.handle_message(message));
                    }
                    self.watch(node);
                    self.pass_on(node);
                }
                Process::Client(client) => client.turn(),
                Process::Initiator(initiator) => initiator.turn(),
            }
            // A turn without anything to do has only told how long it would wait.
            if !due {
                return;
            }
        }
        panic!("node {} has something to do {MAX_TURNS} times in one moment", node.0);
    }

    /// Looks at what a process serves, and at its registers.
    pub(super) fn watch(&mut self, node: NodeId) {
        let (mut new_truths, mut watched, mut backs) = (Vec::new(), Vec::new(), Vec::new());
        let Process::Shard(shard) = &self.processes[node.0] else { return };
        for found in shard.watch_registers() {
            let (promised, accepted) = (found.promised.0, (found.accepted.0.0, found.accepted.1));
            let was = self.registers.entry(found.replica).or_default();
            check!(
                Check::RegistersGoOn,
                promised >= was.0 && accepted >= was.1 && promised >= accepted.0,
                "replica {}: its register held {was:?} and holds {promised}, {accepted:?}",
                found.replica
            );
            *was = (promised, accepted);
        }
        if let Some(which) = self.nexuses.iter().position(|n| *n == Some(node)) {
            if self.config.tuning.roles.is_some() {
                watched.extend(shard.watch_volumes());
            }
            for found in shard.watch_volumes() {
                if !self.back.is_empty() {
                    backs.push(found);
                }
                let WatchedVolume { id, epoch, serving, stored, .. } = found;
                if !serving {
                    continue;
                }
                let volume = volume_of(id);
                let by = (epoch.0, stored);
                let epoch = self.era(volume, epoch.0);
                self.serving.borrow_mut().insert((id, which), epoch);
                if self.configs.insert((id, which), by) != Some(by) {
                    let voters = shard.watch_voters(id);
                    let known = |r: &&ReplicaId| self.registers.get(r).is_some_and(|r| r.1 >= by);
                    let have = voters.iter().filter(known).count();
                    check!(
                        Check::ConfigIsStored,
                        voters.is_empty() || have > voters.len() / 2,
                        "volume {id} is served by the configuration {by:?}, which {have} of {} voters \
                         have: {:?}",
                        voters.len(),
                        self.registers
                    );
                    self.histories[volume].borrow_mut().epoch_serves(epoch);
                }
                let first = *self.served.entry((id, epoch)).or_insert(node);
                check!(
                    Check::OneNexusPerEpoch,
                    first == node,
                    "volume {id} is served by node {} and by node {} in epoch {epoch:#x}",
                    first.0,
                    node.0
                );
                let forced = &mut self.forced[volume];
                if let Some(forced) = forced.as_mut().filter(|f| !f.serves) {
                    forced.serves = true;
                    new_truths.push(volume);
                }
            }
        }
        for found in watched {
            self.watch_roles(node, found);
        }
        for found in backs {
            self.watch_back(&found);
        }
        for volume in new_truths {
            self.take_truth_from_source(volume);
        }
    }

    /// A pool that is about to be opened is sound, and a crash on the way leads to the same.
    pub(super) fn check_recovery(&mut self, at: usize) {
        self.starts += 1;
        if !self.starts.is_multiple_of(self.config.tuning.looks_each.max(1)) {
            return;
        }
        let mut disks = self.copies(at);
        let superblocks = disks.iter_mut().map(|disk| {
            let copies = inspect_superblock(disk).unwrap_or_default();
            copies
                .into_iter()
                .filter_map(|c| c.content.ok())
                .max_by_key(|s| s.membership.generation)
        });
        let superblocks: Vec<_> = superblocks.collect();
        let members = superblocks.iter().flatten().map(|s| &s.membership);
        let members = members.max_by_key(|m| m.generation).cloned();
        for (disk, own) in disks.iter().zip(&superblocks) {
            // One that has left, or is not a member yet, may be half blank.
            let state = own.as_ref().map(|own| members.as_ref()?.state_of(own.device));
            if disks.len() > 1 && state.is_some_and(|s| !s.is_some_and(|s| s.is_needed())) {
                continue;
            }
            let mut checked = disk.clone();
            let options = CheckOptions { repair: true, data: false };
            // One that was removed from its pool is blank.
            let report = match check_pool(&mut checked, &options) {
                Err(PoolError::Blank | PoolError::SuperblockDamaged) if disks.len() > 1 => continue,
                report => report.expect("a pool can be checked"),
            };
            check!(
                Check::PoolIsSound,
                !report.is_damaged(),
                "pool {at} as it is started: {:?}",
                report.findings
            );
        }
        let before = self.image(at, &disks);
        pools::open(&mut disks);
        let mut rng = self.world().rng.clone();
        disks.iter_mut().for_each(|disk| disk.lose_power(&mut rng));
        let after = self.image(at, &disks);
        check!(
            Check::RecoveryIsStable,
            before == after,
            "pool {at} holds something else once it was opened and lost power"
        );
    }

    /// Lets the cluster run until `time_ns`.
    pub fn run_until(&mut self, time_ns: u64) {
        loop {
            let Some(node) = self.step(time_ns) else { return };
            self.run(node);
        }
    }

    pub(super) fn step(&mut self, limit: u64) -> Option<NodeId> {
        let node = self.world.borrow_mut().step(limit);
        self.note_forgotten();
        node
    }

    /// Disks have lost what was not flushed, by a flush that failed.
    fn note_forgotten(&mut self) {
        loop {
            let Some(disk) = self.world().take_forgotten() else { return };
            let Some(at) = self.disks.iter().position(|all| all.iter().any(|d| d.0 == disk)) else {
                continue;
            };
            self.world().say(format_args!("pool {at} has lost what a flush was to cover"));
            let others = self.others_in_sync(at);
            self.note_loss(at, others);
        }
    }

    /// Lets the cluster run until `done`, at most for so long. Returns whether it was.
    pub fn run_while(&mut self, for_ns: u64, mut done: impl FnMut(&Self) -> bool) -> bool {
        let limit = self.world().now_ns() + for_ns;
        while !done(self) {
            match self.step(limit) {
                Some(node) => self.run(node),
                None => return done(self),
            }
        }
        true
    }

    pub(super) fn command<T: Send + 'static>(
        &mut self,
        node: NodeId,
        make: impl FnOnce(Reply<T>) -> SimCommand,
    ) -> Result<T, EngineError> {
        let (tx, rx) = mpsc::channel();
        let command = make(Reply::new(move |result| {
            // Whoever asked waits below.
            let _told = tx.send(result);
        }));
        let Process::Shard(shard) = &mut self.processes[node.0] else {
            return Err(EngineError::Stopped);
        };
        shard.command(command);
        self.run(node);
        let mut answer = rx.try_recv().ok();
        self.run_while(10_000 * MS, |_| {
            answer = answer.take().or_else(|| rx.try_recv().ok());
            answer.is_some()
        });
        answer.unwrap_or(Err(EngineError::Stopped))
    }

    /// Flips a bit of a block of data, or of what was data, in a pool.
    pub fn rot(&mut self, at: usize) {
        self.spoilt = true;
        let disk = self.disks[at][0];
        let mut world = self.world();
        let copies = inspect_superblock(world.disk(disk)).expect("the disk can be read");
        let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
        let data = superblock.segments[0].data;
        let mut rng = world.rng.fork();
        let page = world.disk(disk).rot(data, &mut rng);
        world.say(format_args!("page {page:?} of pool {at} rots"));
    }

    /// Has the next writes to a pool's data end up on other pages of it.
    pub fn misdirect(&mut self, at: usize, writes: u32) {
        let disk = self.disks[at][0];
        self.astray.insert(at);
        self.spoilt = true;
        let mut world = self.world();
        let copies = inspect_superblock(world.disk(disk)).expect("the disk can be read");
        let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
        let trouble = &mut world.disk(disk).trouble;
        (trouble.astray, trouble.data) = (writes, superblock.segments[0].data);
        world.say(format_args!("{writes} writes of pool {at} go astray"));
    }
}
