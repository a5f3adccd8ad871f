//! Processes on machines: replica nodes, a nexus node, hosts; started, run, killed and started again.

mod direct;
mod inspect;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::mpsc;

use cairn_block::{BlockSize, PoolId, ReplicaId, SnapshotId, SnapshotVerb, VolumeId};
use cairn_engine::crypt::{DATA_KEY_LEN, Kek, VolumeKey};
use cairn_engine::nexus::{Pace, Purpose, ScrubReport, ScrubState};
use cairn_engine::replica::{
    CheckOptions, FormatOptions, MultiPool, Pool, ReplicaSpec, SnapshotSpec, check_pool,
    inspect_superblock,
};
use cairn_engine::snapshot::SnapshotCall;
use cairn_engine::{
    ChildAddress, Command, EncryptionSpec, EngineError, PoolMember, Reply, ScrubAction, Shard,
    ShardConfig, VolumeReport, VolumeSpec, WatchedVolume,
};

use crate::checks::{Check, check};
use crate::client::{Client, Serving, Workload};
use crate::driver::SimDriver;
use crate::history::History;
use crate::world::{DiskRef, MS, Machine, NodeId, World};

/// Where a node listens on its machine.
const PORT: u16 = 4420;
/// Bytes of the smallest pool.
const SMALL_POOL: u64 = 8 << 20;
/// Turns in one moment, before it is taken for a busy loop.
const MAX_TURNS: usize = 200;

/// A command for a simulated shard.
pub type SimCommand = Command<SocketAddr, DiskRef>;

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Volumes; each has a replica in every pool.
    pub volumes: usize,
    /// Blocks of a volume.
    pub blocks: u64,
    /// Pools.
    pub replicas: usize,
    /// Whether the first pool is in the nexus's own process.
    pub local_replica: bool,
    /// Whether there is a second machine that can serve the volumes.
    pub second: bool,
    /// Whether the second pool is in the process of that one.
    pub second_local: bool,
    /// Bytes of each pool's disk.
    pub disk_len: u64,
    /// A pool whose disk is as small as a pool can be: it runs full.
    pub small_pool: Option<usize>,
    /// The nexus takes a replica out that does not answer for so long.
    pub child_deadline_ms: u64,
    /// Keep-alive timeout between the nexus and replicas.
    pub replica_kato_ms: u32,
    /// Header and data digests between the nexus and replicas.
    pub digests: bool,
    /// Entries of a queue between the nexus and a replica.
    pub queue_entries: u16,
    /// Host requests on a volume at once.
    pub volume_requests: u16,
    /// Bytes of the nexus's arena; of a replica node's it is half.
    pub arena_len: u32,
    /// Whether pools are formatted as on a device known to be zeroed.
    pub zeroed: bool,
    /// Whether a loss of power leaves parts of blocks of data.
    pub tears: bool,
    /// Whether volumes are encrypted.
    pub encrypted: bool,
    /// What is otherwise as it is in a process of the program.
    pub tuning: Tuning,
}

/// How often things happen that usually take seconds, or much data.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tuning {
    /// Of the nexus.
    pub pace: Pace,
    /// Each how many starts of a pool are looked at.
    pub looks_each: usize,
    /// Extents of a pool whose checksums are in memory only, at most; nothing: as usual.
    pub dirty_extents: Option<usize>,
}

/// What a command will have answered.
type Answer = mpsc::Receiver<Result<(), EngineError>>;

enum Process {
    Dead,
    Shard(Box<Shard<SimDriver>>),
    Client(Box<Client>),
}

/// A snapshot that was asked for.
struct AskedSnapshot {
    volume: usize,
    id: SnapshotId,
    invoked: u64,
    /// Blocks in which replicas might differ then.
    differing: BTreeSet<u64>,
    answer: Answer,
}

/// A running cluster.
pub struct Cluster {
    world: Rc<RefCell<World>>,
    config: ClusterConfig,
    processes: Vec<Process>,
    disks: Vec<DiskRef>,
    replicas: Vec<Option<NodeId>>,
    /// The processes of the two machines that serve volumes.
    nexuses: [Option<NodeId>; 2],
    /// Which of them is to serve.
    active: usize,
    /// The epoch of each volume at each of them.
    serving: Serving,
    /// Which process served a volume in an epoch.
    served: BTreeMap<(VolumeId, u64), NodeId>,
    /// The epoch and the number of the configuration that each of them serves it by.
    configs: BTreeMap<(VolumeId, usize), (u64, u64)>,
    /// The epoch that each replica has promised, and the place of its configuration.
    registers: BTreeMap<ReplicaId, (u64, (u64, u64))>,
    clients: Vec<NodeId>,
    histories: Vec<Rc<RefCell<History>>>,
    /// How often each machine has lost power.
    lives: Vec<u128>,
    /// Sizes that volumes were to grow to, and what became of it.
    growth: Vec<(usize, u64, Answer)>,
    /// Pools of which a write went astray: what it hit may be taken for data after a crash.
    astray: BTreeSet<usize>,
    /// Pools that were started.
    starts: usize,
    /// Something rotted or went astray: what disks hold is not what was written.
    spoilt: bool,
    /// Snapshots that were asked for.
    snapshots: Vec<AskedSnapshot>,
    /// Snapshots that were taken: on which pool, and what each holds.
    taken: Vec<(usize, SnapshotId, usize, Vec<u8>)>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The machine of the first nexus.
pub const NEXUS: Machine = Machine(0);

fn address(machine: Machine) -> SocketAddr {
    let last = u8::try_from(machine.0 + 1).expect("few machines");
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), PORT)
}

fn pool_name(at: usize) -> String {
    format!("pool{at}")
}

fn replica_id(volume: usize, pool: usize) -> ReplicaId {
    ReplicaId((volume as u128 + 1) << 64 | (pool as u128 + 1))
}

fn volume_nqn(volume: usize) -> String {
    format!("nqn.2026-11.io.cairn:volume:{volume}")
}

/// The key of a volume, and the one that it is wrapped with.
fn keys(volume: usize) -> (VolumeKey, Kek) {
    let number = u8::try_from(volume).expect("few volumes");
    let mut bytes = [number; DATA_KEY_LEN];
    bytes[0] ^= 1;
    let key = VolumeKey::new(bytes).expect("its halves differ");
    (key, Kek::parse(&[number; 32]).expect("a key has 32 bytes"))
}

fn encryption(volume: usize, purpose: Purpose) -> EncryptionSpec {
    let (key, kek) = keys(volume);
    let wrap = || Box::new(kek.wrap(&key, VolumeId(volume as u128 + 1), [0; 12]));
    let new = (purpose == Purpose::Create).then(wrap);
    EncryptionSpec { new, keks: vec![kek], ..EncryptionSpec::default() }
}

impl Cluster {
    /// Formats the pools, makes the replicas, and starts the nexus on new volumes.
    ///
    /// # Panics
    /// Where any of that fails: nothing is broken yet.
    #[must_use]
    pub fn new(world: World, config: ClusterConfig) -> Self {
        let world = Rc::new(RefCell::new(world));
        let mut disks = Vec::new();
        for at in 0..config.replicas {
            let mut w = world.borrow_mut();
            let small = config.small_pool == Some(at);
            let disk = w.add_disk(if small { SMALL_POOL } else { config.disk_len });
            let options = FormatOptions {
                pool_id: PoolId(at as u128 + 1),
                device_is_zeroed: config.zeroed,
                sector_size: 4096,
                force: false,
            };
            Pool::format(w.disk(disk), &options).expect("a pool on a new disk");
            let copies = inspect_superblock(w.disk(disk)).expect("the disk can be read");
            let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
            w.disk(disk).whole_from = (!config.tears).then_some(superblock.segments[0].data);
            disks.push(disk);
        }
        let histories = (0..config.volumes)
            .map(|at| {
                let blocks = usize::try_from(config.blocks).expect("a small volume");
                let mut history = History::new(at as u64 + 1, blocks);
                history.tears = config.tears;
                Rc::new(RefCell::new(history))
            })
            .collect();
        let mut cluster = Self {
            world,
            lives: vec![0; config.replicas + 3],
            growth: Vec::new(),
            astray: BTreeSet::new(),
            spoilt: false,
            starts: 0,
            snapshots: Vec::new(),
            taken: Vec::new(),
            processes: Vec::new(),
            disks,
            replicas: vec![None; config.replicas],
            nexuses: [None; 2],
            active: 0,
            serving: Serving::default(),
            served: BTreeMap::new(),
            configs: BTreeMap::new(),
            registers: BTreeMap::new(),
            clients: Vec::new(),
            histories,
            config,
        };
        if cluster.config.second {
            cluster.start_process(1);
        }
        for at in 0..cluster.config.replicas {
            match cluster.home(at) {
                Some(0) => continue,
                Some(_) => {}
                None => cluster.start_replica(at),
            }
            cluster.create_replicas(at);
        }
        cluster.start_nexus(Purpose::Create);
        cluster
    }

    /// The machine of a pool.
    #[must_use]
    pub fn machine_of(&self, pool: usize) -> Machine {
        self.home(pool).map_or(Machine(1 + pool), |which| self.nexus_machine(which))
    }

    /// A machine that serves volumes.
    #[must_use]
    pub fn nexus_machine(&self, which: usize) -> Machine {
        if which == 0 { NEXUS } else { Machine(2 + self.config.replicas) }
    }

    /// The machine that is to serve the volumes now.
    #[must_use]
    pub fn active_machine(&self) -> Machine {
        self.nexus_machine(self.active)
    }

    /// Which of the two is to serve.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active
    }

    /// Whether there is a second machine to serve volumes.
    #[must_use]
    pub fn has_second(&self) -> bool {
        self.config.second
    }

    /// The nexus's process that a pool is in, where it is in one.
    #[must_use]
    pub fn home(&self, pool: usize) -> Option<usize> {
        match pool {
            0 if self.config.local_replica => Some(0),
            1 if self.config.second && self.config.second_local => Some(1),
            _ => None,
        }
    }

    /// The process of a pool, where it runs.
    fn node_of(&self, pool: usize) -> Option<NodeId> {
        self.home(pool).map_or(self.replicas[pool], |which| self.nexuses[which])
    }

    /// How many pools there are.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.config.replicas
    }

    /// How many volumes there are.
    #[must_use]
    pub fn volume_count(&self) -> usize {
        self.config.volumes
    }

    /// The machine of all hosts.
    #[must_use]
    pub fn host_machine(&self) -> Machine {
        Machine(1 + self.config.replicas)
    }

    /// Whether a pool is in a nexus's process.
    #[must_use]
    pub fn is_local(&self, pool: usize) -> bool {
        self.home(pool).is_some()
    }

    /// The world.
    #[must_use]
    pub fn world(&self) -> std::cell::RefMut<'_, World> {
        self.world.borrow_mut()
    }

    /// The disk of a pool.
    #[must_use]
    pub fn disk(&self, pool: usize) -> DiskRef {
        self.disks[pool]
    }

    /// What happened to a volume.
    #[must_use]
    pub fn history(&self, volume: usize) -> Rc<RefCell<History>> {
        Rc::clone(&self.histories[volume])
    }

    fn shard_config(&self, machine: Machine) -> ShardConfig {
        let number = u16::try_from(machine.0).expect("few machines");
        ShardConfig {
            node_nqn: format!("nqn.2026-11.io.cairn:node:{}", machine.0),
            node_id: machine.0 as u128 + 1,
            incarnation: self.lives[machine.0],
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
            pace: self.config.tuning.pace,
        }
    }

    fn start(&mut self, machine: Machine, arena_len: u32) -> NodeId {
        let driver = SimDriver::new(&self.world, machine, arena_len);
        let node = driver.node();
        let shard = Shard::new(driver, self.shard_config(machine));
        self.add(node, Process::Shard(Box::new(shard)));
        let listener = address(machine);
        self.command(node, |reply| Command::AddListener { listener, advertise: listener, reply })
            .expect("the address is free");
        node
    }

    fn add(&mut self, node: NodeId, process: Process) {
        assert_eq!(node.0, self.processes.len(), "nodes are numbered as they start");
        self.processes.push(process);
    }

    fn add_pool(&mut self, node: NodeId, at: usize) {
        let device = self.disks[at];
        self.check_recovery(at);
        let mut world = self.world.borrow_mut();
        let len = world.disk(device).len();
        let pool = Pool::open(world.disk(device));
        let mut pool = Box::new(MultiPool::from(pool.expect("a pool opens after a crash")));
        if let Some(dirty) = self.config.tuning.dirty_extents {
            pool.set_checksum_limits(dirty.max(2), dirty);
        }
        drop(world);
        self.command(node, |reply| Command::AddPool {
            name: pool_name(at),
            devices: vec![PoolMember { device, len, path: String::new() }],
            pool,
            reply,
        })
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

    fn create_replicas(&mut self, at: usize) {
        let node = self.node_of(at);
        for volume in 0..self.config.volumes {
            let spec = ReplicaSpec {
                id: replica_id(volume, at),
                volume: VolumeId(volume as u128 + 1),
                name: format!("volume{volume}"),
                blocks: self.config.blocks,
                block_size: BlockSize::B4096,
                thick: false,
                source: None,
            };
            self.command(node.expect("it runs"), |reply| Command::CreateReplica {
                pool: pool_name(at),
                spec,
                reply,
            })
            .expect("an empty pool has room");
        }
    }

    /// Starts the process of the machine that is to serve, and tells it of the volumes.
    ///
    /// # Panics
    /// Where it runs already.
    pub fn start_nexus(&mut self, purpose: Purpose) {
        let which = self.active;
        self.start_process(which);
        if which == 0 && self.config.local_replica && purpose == Purpose::Create {
            self.create_replicas(0);
        }
        self.add_volumes(which, purpose);
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
        if self.home(which) == Some(which) {
            self.add_pool(node, which);
        }
    }

    /// Has the volumes served by the other machine from now on, whatever the one that serves them does.
    pub fn take_over(&mut self) {
        self.active = 1 - self.active;
        self.world().say(format_args!("nexus {} takes over", self.active));
        self.supervise();
    }

    /// What whoever looks after the cluster does now and then: the machine that is to serve the volumes is
    /// told of them, anew where another nexus has fenced it.
    pub fn supervise(&mut self) {
        let Some(node) = self.nexuses[self.active] else { return };
        if self.world().is_paused(node) {
            return;
        }
        let reports = self.reports();
        for volume in 0..self.config.volumes {
            let name = format!("volume{volume}");
            match reports.iter().find(|r| r.name == name) {
                None => self.add_volume(self.active, volume, Purpose::Assemble),
                Some(report) if ["fenced", "refused"].contains(&report.state.as_str()) => {
                    self.remove_volume(1 - self.active, volume);
                    self.remove_volume(self.active, volume);
                }
                Some(_) => {}
            }
        }
    }

    /// Asks the machine that is not to serve the volumes to let go of them.
    pub fn retire_other(&mut self) {
        for volume in 0..self.config.volumes {
            self.remove_volume(1 - self.active, volume);
        }
    }

    fn remove_volume(&mut self, which: usize, volume: usize) {
        let Some(node) = self.nexuses[which] else { return };
        if self.world().is_paused(node) {
            return;
        }
        let Process::Shard(shard) = &mut self.processes[node.0] else { return };
        // Whether it is there, or goes at once, is seen when it is added again.
        let reply = Reply::new(drop);
        shard.command(Command::RemoveVolume { name: format!("volume{volume}"), reply });
        self.run(node);
    }

    fn add_volumes(&mut self, which: usize, purpose: Purpose) {
        for volume in 0..self.config.volumes {
            self.add_volume(which, volume, purpose);
        }
    }

    fn add_volume(&mut self, which: usize, volume: usize, purpose: Purpose) {
        let Some(node) = self.nexuses[which] else { return };
        let children = (0..self.config.replicas).map(|at| {
            let id = replica_id(volume, at);
            let place = if self.home(at) == Some(which) {
                ChildAddress::Local { pool: pool_name(at) }
            } else {
                ChildAddress::Remote {
                    peer: address(self.machine_of(at)),
                    nqn: format!("nqn.2026-11.io.cairn:replica:{id}"),
                }
            };
            (id, place).into()
        });
        let spec = VolumeSpec {
            id: VolumeId(volume as u128 + 1),
            name: format!("volume{volume}"),
            nqn: volume_nqn(volume),
            blocks: self.config.blocks,
            block_size: BlockSize::B4096,
            held: false,
            children: children.collect(),
            purpose,
            child_deadline_ms: self.config.child_deadline_ms,
            allowed_hosts: None,
            encryption: self.config.encrypted.then(|| encryption(volume, purpose)),
        };
        self.command(node, |reply| Command::AddVolume { spec, reply })
            .expect("the volume is new to the process");
    }

    /// Adds a host of a volume.
    pub fn add_client(&mut self, volume: usize, work: Workload) {
        let rng = self.world().rng.fork();
        let driver = SimDriver::new(&self.world, self.host_machine(), 3 << 20);
        let node = driver.node();
        let history = self.history(volume);
        let nqn = volume_nqn(volume);
        let mut peers = vec![(address(NEXUS), 0)];
        if self.config.second {
            peers.push((address(self.nexus_machine(1)), 1));
        }
        let serving = (Rc::clone(&self.serving), VolumeId(volume as u128 + 1));
        let client = Client::new(driver, peers, &nqn, work, rng, history, serving);
        self.add(node, Process::Client(Box::new(client)));
        self.clients.push(node);
        self.run(node);
    }

    /// Has a volume grow, where the nexus runs; what comes of it is looked at in [`Cluster::compare`].
    pub fn grow_volume(&mut self, volume: usize, blocks: u64) {
        let Some(node) = self.nexuses[self.active] else { return };
        let Process::Shard(shard) = &mut self.processes[node.0] else { return };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Nobody may look.
            let _told = tx.send(result);
        });
        shard.command(Command::ResizeVolume { name: format!("volume{volume}"), blocks, reply });
        self.growth.push((volume, blocks, rx));
        self.run(node);
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
        let disk = self.disks[at];
        let mut world = self.world();
        world.say(format_args!("pool {at} loses power"));
        let mut rng = world.rng.fork();
        world.disk(disk).lose_power(&mut rng);
        drop(world);
        let machine = self.machine_of(at);
        self.lives[machine.0] += 1;
        for history in &self.histories {
            history.borrow_mut().power_was_lost(!others);
        }
    }

    /// Whether each volume is served with a member in sync in another pool.
    fn others_in_sync(&mut self, at: usize) -> bool {
        if self.config.replicas == 2 {
            // The other may be cut off before it is known that this one lost something.
            return false;
        }
        let reports = self.reports();
        reports.iter().all(|report| {
            let mut children = report.children.iter().enumerate();
            report.serving && children.any(|(i, c)| i != at && c.in_sync && c.state == "online")
        })
    }

    /// What the nexus that is to serve says of its volumes at this moment; nothing where it does not run.
    fn reports(&mut self) -> Vec<VolumeReport> {
        let Some(node) = self.nexuses[self.active] else { return Vec::new() };
        let Process::Shard(shard) = &mut self.processes[node.0] else { return Vec::new() };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Looked at below.
            let _told = tx.send(result);
        });
        shard.command(Command::ListVolumes { reply });
        rx.try_recv().ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Cuts the power of everybody but the hosts.
    pub fn cut_all_power(&mut self) {
        for which in 0..2 {
            self.kill_process(which);
        }
        for at in 0..self.config.replicas {
            self.cut_power(at);
        }
    }

    /// Kills the nexus that is to serve, if it runs.
    pub fn kill_nexus(&mut self) {
        let reports = self.reports();
        self.kill_process(self.active);
        if !self.spoilt && self.world().rng.chance(300) {
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
            self.world().pause(node, for_ns);
        }
    }

    /// Stops the process of a pool for so long.
    pub fn pause_replica(&mut self, at: usize, for_ns: u64) {
        if let Some(node) = self.node_of(at) {
            self.world().pause(node, for_ns);
        }
    }

    /// Whether a pool's process runs.
    #[must_use]
    pub fn replica_runs(&self, at: usize) -> bool {
        self.replicas[at].is_some()
    }

    fn kill(&mut self, node: NodeId) {
        self.processes[node.0] = Process::Dead;
        self.world().kill(node);
    }

    /// Gives a node its turns for this moment.
    fn run(&mut self, node: NodeId) {
        for _ in 0..MAX_TURNS {
            let due = self.world().is_due(node);
            match &mut self.processes[node.0] {
                Process::Dead => return,
                Process::Shard(shard) => {
                    shard.turn();
                    self.watch(node);
                }
                Process::Client(client) => client.turn(),
            }
            // A turn without anything to do has only told how long it would wait.
            if !due {
                return;
            }
        }
        panic!("node {} has something to do {MAX_TURNS} times in one moment", node.0);
    }

    /// Looks at what a process serves, and at its registers.
    fn watch(&mut self, node: NodeId) {
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
            for WatchedVolume { id, epoch, serving, stored } in shard.watch_volumes() {
                if !serving {
                    continue;
                }
                self.serving.borrow_mut().insert((id, which), epoch.0);
                let by = (epoch.0, stored);
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
                    let volume = usize::try_from(id.0 - 1).expect("a small number");
                    self.histories[volume].borrow_mut().epoch_serves(epoch.0);
                }
                let first = *self.served.entry((id, epoch.0)).or_insert(node);
                check!(
                    Check::OneNexusPerEpoch,
                    first == node,
                    "volume {id} is served by node {} and by node {} in epoch {epoch}",
                    first.0,
                    node.0
                );
            }
        }
    }

    /// A pool that is about to be opened is sound, and a crash on the way leads to the same.
    fn check_recovery(&mut self, at: usize) {
        self.starts += 1;
        if !self.starts.is_multiple_of(self.config.tuning.looks_each.max(1)) {
            return;
        }
        let mut disk = self.world().disk(self.disks[at]).clone();
        let mut checked = disk.clone();
        let options = CheckOptions { repair: true, data: false };
        let report = check_pool(&mut checked, &options).expect("a pool can be checked");
        check!(
            Check::PoolIsSound,
            !report.is_damaged(),
            "pool {at} as it is started: {:?}",
            report.findings
        );
        let before = self.image(at, &disk);
        Pool::open(&mut disk).expect("a pool opens");
        let mut rng = self.world().rng.clone();
        disk.lose_power(&mut rng);
        let after = self.image(at, &disk);
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

    fn step(&mut self, limit: u64) -> Option<NodeId> {
        self.world.borrow_mut().step(limit)
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

    fn command<T: Send + 'static>(
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

    /// Whether every host has made its requests and got its answers.
    #[must_use]
    pub fn clients_are_done(&self) -> bool {
        self.clients.iter().all(|node| match &self.processes[node.0] {
            Process::Client(client) => client.is_done(),
            Process::Dead | Process::Shard(_) => true,
        })
    }

    /// Requests that hosts saw fail.
    #[must_use]
    pub fn client_errors(&self) -> u64 {
        let errors = self.clients.iter().map(|node| match &self.processes[node.0] {
            Process::Client(client) => client.errors,
            Process::Dead | Process::Shard(_) => 0,
        });
        errors.sum()
    }

    /// Has every host read its whole volume.
    pub fn verify(&mut self) {
        for node in self.clients.clone() {
            if let Process::Client(client) = &mut self.processes[node.0] {
                client.verify();
            }
            self.run(node);
        }
    }

    /// What the nexus says of its volumes.
    ///
    /// # Errors
    /// Where there is no nexus.
    pub fn volumes(&mut self) -> Result<Vec<VolumeReport>, EngineError> {
        let node = self.nexuses[self.active].ok_or(EngineError::Stopped)?;
        self.command(node, |reply| Command::ListVolumes { reply })
    }

    /// Flips a bit of a block of data, or of what was data, in a pool.
    pub fn rot(&mut self, at: usize) {
        self.spoilt = true;
        let disk = self.disks[at];
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
        let disk = self.disks[at];
        self.astray.insert(at);
        self.spoilt = true;
        let mut world = self.world();
        let copies = inspect_superblock(world.disk(disk)).expect("the disk can be read");
        let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
        let trouble = &mut world.disk(disk).trouble;
        (trouble.astray, trouble.data) = (writes, superblock.segments[0].data);
        world.say(format_args!("{writes} writes of pool {at} go astray"));
    }

    /// Starts a scrub of every volume.
    ///
    /// # Panics
    /// Where a volume does not serve.
    pub fn scrub(&mut self, compare: bool) {
        let node = self.nexuses[self.active].expect("the nexus runs");
        for volume in 0..self.config.volumes {
            let report = ScrubReport { compare, rate_mib_s: 64, ..ScrubReport::default() };
            let name = format!("volume{volume}");
            let action = ScrubAction::Start(report);
            self.command(node, |reply| Command::ScrubVolume { name, action, reply })
                .expect("the volume serves");
        }
    }

    /// Whether every scrub has come to its end.
    ///
    /// # Panics
    /// Where the nexus does not run.
    pub fn scrubs_are_done(&mut self) -> bool {
        let volumes = self.volumes().expect("the nexus runs");
        let done = |s: &ScrubReport| s.state == ScrubState::Finished;
        volumes.iter().all(|v| v.scrub.as_ref().is_some_and(done))
    }

    fn snapshot_call(
        &mut self,
        volume: usize,
        id: SnapshotId,
        verb: SnapshotVerb,
    ) -> Option<Answer> {
        let node = self.nexuses[self.active]?;
        let Process::Shard(shard) = &mut self.processes[node.0] else { return None };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Nobody may look.
            let _told = tx.send(result);
        });
        let spec = SnapshotSpec { id, name: format!("{id}"), created: 1 };
        let call = SnapshotCall { spec, clone: None };
        let volumes = vec![format!("volume{volume}")];
        shard.command(Command::Snapshot { volumes, verb, call, force: false, reply });
        self.run(node);
        Some(rx)
    }

    /// Asks for a snapshot while the hosts work; [`Cluster::look_at_snapshots`] sees what becomes of it.
    pub fn take_snapshot(&mut self, volume: usize, id: u128) {
        let id = SnapshotId(id);
        let history = self.history(volume);
        // It may be the first that is heard of this epoch.
        let wanted = VolumeId(volume as u128 + 1);
        let report = self.reports().into_iter().find(|r| r.id == wanted && r.serving);
        if let Some(report) = report {
            history.borrow_mut().epoch_serves(report.epoch);
        }
        let invoked = history.borrow_mut().tick();
        let blocks = history.borrow().blocks() as u64;
        let differing = (0..blocks).filter(|&lba| history.borrow().may_differ(lba)).collect();
        self.world().say(format_args!("snapshot {id:x?} of volume {volume}"));
        if let Some(answer) = self.snapshot_call(volume, id, SnapshotVerb::Create) {
            self.snapshots.push(AskedSnapshot { volume, id, invoked, differing, answer });
        }
    }

    /// Deletes one of the snapshots that were taken.
    pub fn drop_snapshot(&mut self) {
        let Some((volume, id, ..)) = self.taken.first() else { return };
        let (volume, id) = (*volume, *id);
        self.taken.retain(|(v, i, ..)| (*v, *i) != (volume, id));
        // Whether it is done does not matter.
        self.snapshot_call(volume, id, SnapshotVerb::Delete);
    }
}
