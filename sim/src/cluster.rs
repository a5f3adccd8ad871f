//! Processes on machines: replica nodes, a nexus node, hosts; started, run, killed and started again.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::mpsc;

use cairn_block::{BlockSize, HeapMemory, IoOp, IoRequest, Lba, LbaRange, Memory, PoolId};
use cairn_block::{ReplicaId, SnapshotId, SnapshotVerb, VolumeId};
use cairn_engine::crypt::{DATA_KEY_LEN, Kek, VolumeKey};
use cairn_engine::nexus::{Purpose, ScrubReport, ScrubState};
use cairn_engine::replica::{
    DiskOp, FormatOptions, MultiPool, Pool, ReplicaSlot, ReplicaSpec, SnapshotSpec,
    inspect_superblock,
};
use cairn_engine::snapshot::SnapshotCall;
use cairn_engine::{
    ChildAddress, Command, EncryptionSpec, EngineError, PoolMember, Reply, ScrubAction, Shard,
    ShardConfig, VolumeReport, VolumeSpec,
};

use crate::client::{Client, Workload};
use crate::disk::{PAGE, SimDisk};
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
    /// Whether volumes are encrypted.
    pub encrypted: bool,
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
    nexus: Option<NodeId>,
    clients: Vec<NodeId>,
    histories: Vec<Rc<RefCell<History>>>,
    /// How often each machine has lost power.
    lives: Vec<u128>,
    /// Sizes that volumes were to grow to, and what became of it.
    growth: Vec<(usize, u64, Answer)>,
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

/// The machine of the nexus.
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
            disks.push(disk);
        }
        let histories = (0..config.volumes)
            .map(|at| {
                let blocks = usize::try_from(config.blocks).expect("a small volume");
                Rc::new(RefCell::new(History::new(at as u64 + 1, blocks)))
            })
            .collect();
        let mut cluster = Self {
            world,
            lives: vec![0; config.replicas + 2],
            growth: Vec::new(),
            snapshots: Vec::new(),
            taken: Vec::new(),
            processes: Vec::new(),
            disks,
            replicas: vec![None; config.replicas],
            nexus: None,
            clients: Vec::new(),
            histories,
            config,
        };
        for at in 0..cluster.config.replicas {
            if !cluster.is_local(at) {
                cluster.start_replica(at);
                cluster.create_replicas(at);
            }
        }
        cluster.start_nexus(Purpose::Create);
        cluster
    }

    /// The machine of a pool.
    #[must_use]
    pub fn machine_of(&self, pool: usize) -> Machine {
        if self.is_local(pool) { NEXUS } else { Machine(1 + pool) }
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

    /// Whether a pool is in the nexus's process.
    #[must_use]
    pub fn is_local(&self, pool: usize) -> bool {
        self.config.local_replica && pool == 0
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
            pace: cairn_engine::nexus::Pace::default(),
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
        let mut world = self.world.borrow_mut();
        let len = world.disk(device).len();
        let pool = Pool::open(world.disk(device));
        let pool = Box::new(MultiPool::from(pool.expect("a pool opens after a crash")));
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
        let node = if self.is_local(at) { self.nexus } else { self.replicas[at] };
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

    /// Starts the nexus's process and tells it of the volumes.
    ///
    /// # Panics
    /// Where it runs already.
    pub fn start_nexus(&mut self, purpose: Purpose) {
        assert!(self.nexus.is_none(), "it runs already");
        let node = self.start(NEXUS, self.config.arena_len);
        self.nexus = Some(node);
        self.world().say(format_args!("node {} is the nexus", node.0));
        if self.config.local_replica {
            self.add_pool(node, 0);
            if purpose == Purpose::Create {
                self.create_replicas(0);
            }
        }
        for volume in 0..self.config.volumes {
            let children = (0..self.config.replicas).map(|at| {
                let id = replica_id(volume, at);
                let place = if self.is_local(at) {
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
    }

    /// Adds a host of a volume.
    pub fn add_client(&mut self, volume: usize, work: Workload) {
        let rng = self.world().rng.fork();
        let driver = SimDriver::new(&self.world, self.host_machine(), 3 << 20);
        let node = driver.node();
        let history = self.history(volume);
        let nqn = volume_nqn(volume);
        let client = Client::new(driver, address(NEXUS), &nqn, work, rng, history);
        self.add(node, Process::Client(Box::new(client)));
        self.clients.push(node);
        self.run(node);
    }

    /// Has a volume grow, where the nexus runs; what comes of it is looked at in [`Cluster::compare`].
    pub fn grow_volume(&mut self, volume: usize, blocks: u64) {
        let Some(node) = self.nexus else { return };
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

    /// A size that was acked is the volume's, or a larger one is, and its replicas have it.
    fn check_sizes(&self, volume: usize, report: &VolumeReport) {
        let mut possible = vec![self.config.blocks];
        for (_, blocks, answer) in self.growth.iter().filter(|(v, ..)| *v == volume) {
            possible.push(*blocks);
            if let Ok(Ok(())) = answer.try_recv() {
                assert!(
                    report.blocks >= *blocks,
                    "volume {volume} had grown to {blocks}: {report:?}"
                );
            }
        }
        assert!(possible.contains(&report.blocks), "volume {volume}: {report:?}, of {possible:?}");
        for (at, child) in report.children.iter().enumerate() {
            if child.state == "online" {
                let mut disk = self.world().disk(self.disks[at]).clone();
                let pool = Pool::open(&mut disk).expect("the pool opens");
                let id = replica_id(volume, at);
                let has = pool.replicas().find(|r| r.id == id).map_or(0, |r| r.blocks);
                assert!(has >= report.blocks, "replica {at} has {has} blocks: {report:?}");
            }
        }
    }

    /// Kills the process of a pool, if it runs.
    pub fn kill_replica(&mut self, at: usize) {
        if let Some(node) = self.replicas[at].take() {
            self.kill(node);
        }
    }

    /// Kills the process of a pool, if it runs, and what its disk had not been told to flush may be
    /// lost. A nexus does not tell this from a kill yet, and takes the replica back as in sync.
    pub fn cut_power(&mut self, at: usize) {
        self.kill_replica(at);
        let disk = self.disks[at];
        let mut world = self.world();
        world.say(format_args!("pool {at} loses power"));
        let mut rng = world.rng.fork();
        world.disk(disk).lose_power(&mut rng);
        drop(world);
        let machine = self.machine_of(at);
        self.lives[machine.0] += 1;
    }

    /// Kills the nexus, if it runs.
    pub fn kill_nexus(&mut self) {
        if let Some(node) = self.nexus.take() {
            self.kill(node);
            for history in &self.histories {
                history.borrow_mut().nexus_died();
            }
        }
    }

    /// Whether the nexus's process runs.
    #[must_use]
    pub fn nexus_runs(&self) -> bool {
        self.nexus.is_some()
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
        let node = self.nexus.ok_or(EngineError::Stopped)?;
        self.command(node, |reply| Command::ListVolumes { reply })
    }

    /// Flips a bit of a block of data, or of what was data, in a pool.
    pub fn rot(&mut self, at: usize) {
        let disk = self.disks[at];
        let mut world = self.world();
        let copies = inspect_superblock(world.disk(disk)).expect("the disk can be read");
        let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
        let data = superblock.segments[0].data;
        let mut rng = world.rng.fork();
        let page = world.disk(disk).rot(data, &mut rng);
        world.say(format_args!("page {page:?} of pool {at} rots"));
    }

    /// Starts a scrub of every volume.
    ///
    /// # Panics
    /// Where a volume does not serve.
    pub fn scrub(&mut self, compare: bool) {
        let node = self.nexus.expect("the nexus runs");
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

    /// Reads every pool of a volume's in-sync set directly and compares them. With `all`, no block may
    /// differ, whatever hosts were told of it.
    ///
    /// # Panics
    /// Where two of them differ in a block that must be alike, or a replica is smaller than its volume.
    pub fn compare(&mut self, all: bool) {
        let reports = self.volumes().expect("the nexus runs");
        for (volume, report) in reports.iter().enumerate() {
            self.check_sizes(volume, report);
            let members: BTreeSet<usize> = report
                .children
                .iter()
                .enumerate()
                .filter(|(_, child)| child.in_sync)
                .map(|(at, _)| at)
                .collect();
            let contents: Vec<(usize, Vec<u8>)> =
                members.iter().map(|&at| (at, self.contents(volume, at))).collect();
            let history = self.history(volume);
            let Some(((first, a), rest)) = contents.split_first() else { continue };
            for (other, b) in rest {
                for (lba, (x, y)) in (0u64..).zip(a.chunks(PAGE).zip(b.chunks(PAGE))) {
                    let (x, y) = (history.borrow().decode(lba, x), history.borrow().decode(lba, y));
                    assert!(
                        x == y || (!all && history.borrow().may_differ(lba)),
                        "volume {volume} block {lba}: in-sync replica {first} holds {x}, {other} \
                         holds {y}"
                    );
                }
            }
        }
    }

    fn snapshot_call(
        &mut self,
        volume: usize,
        id: SnapshotId,
        verb: SnapshotVerb,
    ) -> Option<Answer> {
        let node = self.nexus?;
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
        let invoked = history.borrow_mut().tick();
        let blocks = history.borrow().blocks() as u64;
        let differing = (0..blocks).filter(|&lba| history.borrow().may_differ(lba)).collect();
        self.world().say(format_args!("snapshot {id:x?} of volume {volume}"));
        if let Some(answer) = self.snapshot_call(volume, id, SnapshotVerb::Create) {
            self.snapshots.push(AskedSnapshot { volume, id, invoked, differing, answer });
        }
    }

    /// A snapshot that was taken is a read of every block by then, and the same on every member.
    ///
    /// # Panics
    /// Where it holds what such a read could not have returned, or members differ.
    pub fn look_at_snapshots(&mut self) {
        use std::sync::mpsc::TryRecvError;
        let mut answered = Vec::new();
        self.snapshots.retain_mut(|asked| match asked.answer.try_recv() {
            Ok(Ok(())) => {
                let differing = std::mem::take(&mut asked.differing);
                answered.push((asked.volume, asked.id, asked.invoked, differing));
                false
            }
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => false,
            Err(TryRecvError::Empty) => true,
        });
        for (volume, id, invoked, differing) in answered {
            let mut first: Option<Vec<u8>> = None;
            for at in 0..self.disks.len() {
                // One that was not in sync has none.
                let Some(bytes) = self.snapshot_contents(volume, at, id) else { continue };
                let history = self.history(volume);
                history.borrow_mut().read_ended(0, &bytes, invoked);
                if let Some(first) = &first {
                    for (lba, (a, b)) in (0u64..).zip(first.chunks(PAGE).zip(bytes.chunks(PAGE))) {
                        assert!(
                            a == b || differing.contains(&lba) || history.borrow().may_differ(lba),
                            "volume {volume} block {lba}: snapshots {id} differ"
                        );
                    }
                }
                first.get_or_insert_with(|| bytes.clone());
                self.taken.push((volume, id, at, bytes));
            }
            assert!(first.is_some(), "snapshot {id} of volume {volume} is nowhere");
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

    /// Snapshots never change.
    ///
    /// # Panics
    /// Where one did.
    pub fn check_snapshots(&mut self) {
        self.look_at_snapshots();
        for (volume, id, at, bytes) in &self.taken {
            let now = self.snapshot_contents(*volume, *at, *id);
            let same = now.is_some_and(|now| now == *bytes);
            assert!(same, "snapshot {id} of volume {volume} in pool {at} has changed, or is gone");
        }
    }

    fn snapshot_contents(&self, volume: usize, at: usize, id: SnapshotId) -> Option<Vec<u8>> {
        self.read_pool(volume, at, |pool| pool.find_snapshot(replica_id(volume, at), id))
    }

    /// What a replica holds, read from its pool as after a crash at this moment, and decrypted.
    fn contents(&self, volume: usize, at: usize) -> Vec<u8> {
        let replica = |pool: &Pool| pool.find(replica_id(volume, at));
        self.read_pool(volume, at, replica).expect("the replica is there")
    }

    fn read_pool(
        &self,
        volume: usize,
        at: usize,
        find: impl Fn(&Pool) -> Option<ReplicaSlot>,
    ) -> Option<Vec<u8>> {
        let mut disk = self.world().disk(self.disks[at]).clone();
        let mut pool = Pool::open(&mut disk).expect("the pool opens");
        let slot = find(&pool)?;
        let mut memory = HeapMemory::new(2 << 20);
        let mut out = Vec::new();
        let step = 256;
        for lba in (0..self.config.blocks).step_by(step) {
            let blocks = (step as u64).min(self.config.blocks - lba);
            let len = u32::try_from(blocks).expect("a short read") * 4096;
            let buf = memory.alloc(len).expect("the arena holds it");
            let range = LbaRange::new(Lba(lba), blocks).expect("inside the volume");
            let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
            pool.submit(0, slot, request, &mut memory);
            let done = loop {
                if let Some(done) = pool.poll_done() {
                    break done;
                }
                let io = pool.poll_disk().expect("a read goes on");
                perform(&mut disk, io.op, &mut memory);
                pool.handle_disk(io.id, Ok(()), &mut memory);
            };
            assert!(done.status.is_ok(), "a read of a healthy pool");
            out.extend_from_slice(memory.bytes(buf.slice()));
            memory.release(buf);
        }
        if self.config.encrypted {
            keys(volume).0.decrypt(Lba(0), BlockSize::B4096, &mut out);
        }
        Some(out)
    }
}

fn perform(disk: &mut SimDisk, op: DiskOp, memory: &mut HeapMemory) {
    use cairn_engine::replica::Device;
    match op {
        DiskOp::Read { offset, buf } => disk.read_at(offset.0, memory.bytes_mut(buf)),
        DiskOp::Write { offset, buf, .. } => disk.write_at(offset.0, memory.bytes(buf)),
        DiskOp::Flush => Device::flush(disk),
        DiskOp::Zero { offset, len, .. } => disk.zero(offset.0, len),
    }
    .expect("inside the disk");
}
