//! Processes on machines: replica nodes, a nexus node, hosts; started, run, killed and started again.

mod direct;
mod force;
mod initiators;
mod inspect;
mod members;
mod pools;
mod processes;
mod restore;
mod standby;
mod volumes;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::mpsc;

use cairn_block::{ReplicaId, SnapshotId, VolumeId};
use cairn_engine::crypt::{DATA_KEY_LEN, Kek, VolumeKey};
use cairn_engine::nexus::{Pace, Purpose};
use cairn_engine::{Command, EncryptionSpec, EngineError, Message, Shard, VolumeReport};

use crate::client::{Client, Serving};
use crate::driver::SimDriver;
use crate::history::History;
use crate::initiator::{Initiator, Unit};
use crate::net::SimSocket;
use crate::world::{DiskRef, Machine, NodeId, World};
use force::Forced;
pub use members::Seat;
use members::first_seats;
pub(crate) use members::{is_member, is_whole};
use standby::Standing;
pub use standby::{Changed, Roles};

/// Where a node listens on its machine.
const PORT: u16 = 4420;
/// Bytes of the smallest pool.
const SMALL_POOL: u64 = 8 << 20;

/// A command for a simulated shard.
pub type SimCommand = Command<SocketAddr, DiskRef>;

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Volumes; each has a replica in each of the first pools.
    pub volumes: usize,
    /// Blocks of a volume.
    pub blocks: u64,
    /// Pools with a replica of each volume at first.
    pub replicas: usize,
    /// Where there is a pool with a witness of each volume, the pool after those.
    pub witness: Option<WitnessPlace>,
    /// A pool on two disks.
    pub wide_pool: Option<usize>,
    /// Pools after that one in which no volume has anything at first.
    pub spares: usize,
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
    /// Whether volumes are exported to initiators as well, with a block more than other hosts know of.
    pub initiators: bool,
    /// Whether each process has two shards: one that listens, and one that has the pools and the volumes.
    pub fronts: bool,
    /// Whether the pools of processes that serve volumes are on the shard that listens, so that a volume reaches a replica
    /// of its own process over the network.
    pub pools_in_front: bool,
    /// What is otherwise as it is in a process of the program.
    pub tuning: Tuning,
}

/// How often things happen that usually take seconds, or much data.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tuning {
    /// Of the nexus.
    pub pace: Pace,
    /// The two machines that serve volumes stand by for each other.
    pub roles: Option<Roles>,
    /// Each how many starts of a pool are looked at.
    pub looks_each: usize,
    /// Extents of a pool whose checksums are in memory only, at most; nothing: as usual.
    pub dirty_extents: Option<usize>,
}

impl Default for ClusterConfig {
    /// A small volume on three replicas in processes of their own.
    fn default() -> Self {
        Self {
            volumes: 1,
            blocks: 1024,
            replicas: 3,
            witness: None,
            wide_pool: None,
            spares: 0,
            local_replica: false,
            tears: true,
            second: false,
            second_local: false,
            disk_len: 24 << 20,
            small_pool: None,
            child_deadline_ms: 1_000,
            replica_kato_ms: 1_000,
            digests: false,
            queue_entries: 64,
            volume_requests: 64,
            arena_len: 8 << 20,
            zeroed: true,
            encrypted: false,
            initiators: false,
            fronts: false,
            pools_in_front: false,
            tuning: Tuning::default(),
        }
    }
}

impl ClusterConfig {
    /// Whether nothing has a second copy, or will have.
    #[must_use]
    pub fn is_lone(&self) -> bool {
        self.replicas == 1 && self.spares == 0 && self.witness.is_none() && self.wide_pool.is_none()
    }

    /// How many pools there are.
    #[must_use]
    pub fn pools(&self) -> usize {
        self.replicas + usize::from(self.witness.is_some()) + self.spares
    }
}

/// Where a pool with witnesses is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WitnessPlace {
    /// On a machine of its own.
    Apart,
    /// In the process of the first machine that serves volumes.
    First,
    /// In that of the second one.
    Second,
}

/// What a command will have answered.
type Answer = mpsc::Receiver<Result<(), EngineError>>;

enum Process {
    Dead,
    Shard(Box<Shard<SimDriver>>),
    Client(Box<Client>),
    Initiator(Box<Initiator>),
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
    /// The other shard of the same process.
    partners: BTreeMap<NodeId, NodeId>,
    /// What shards are told by others, and have not looked at yet.
    mail: BTreeMap<NodeId, VecDeque<Message<SimSocket>>>,
    disks: Vec<Vec<DiskRef>>,
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
    /// The hosts over iSCSI, and what they work on.
    initiators: Vec<NodeId>,
    units: Vec<Unit>,
    histories: Vec<Rc<RefCell<History>>>,
    /// How often each machine has lost power.
    lives: Vec<u128>,
    /// Sizes that volumes were to grow to, and what became of it.
    growth: Vec<(usize, u64, Answer)>,
    /// Pools of which a write went astray: what it hit may be taken for data after a crash.
    astray: BTreeSet<usize>,
    /// Something rotted or went astray: what disks hold is not what was written.
    spoilt: bool,
    /// Pools that were started.
    starts: usize,
    /// Snapshots that were asked for.
    snapshots: Vec<AskedSnapshot>,
    /// Snapshots that were taken: of which replica, and what each holds.
    taken: Vec<(usize, SnapshotId, ReplicaId, Vec<u8>)>,
    /// Blocks of which nothing is known in a snapshot: a write to them had failed, and nobody has a second copy.
    unknown: BTreeMap<SnapshotId, BTreeSet<u64>>,
    /// Snapshots that were asked to be deleted, and those of them that were.
    dropped: Vec<(usize, SnapshotId, Answer)>,
    deleted: Vec<(usize, SnapshotId)>,
    /// Volumes that may be on their way back to a snapshot.
    back: Vec<restore::GoingBack>,
    /// Snapshots of which it is not known what each block was.
    doubtful: BTreeSet<SnapshotId>,
    /// The replicas of each volume, whatever became of them.
    seats: Vec<Vec<Seat>>,
    /// Those that each of the machines that serve volumes is told of.
    named: [Vec<Vec<Seat>>; 2],
    /// How often each volume was started by force: epochs of different lineages are not compared.
    lineages: Vec<u64>,
    /// Volumes that are to be started by force.
    forced: Vec<Option<Forced>>,
    /// Pools that are not to be had: for good, or until they come back.
    gone: BTreeSet<usize>,
    standing: Standing,
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

/// The first replica of a volume in a pool.
fn replica_id(volume: usize, pool: usize) -> ReplicaId {
    ReplicaId((volume as u128 + 1) << 64 | (pool as u128 + 1))
}

/// The number of a volume.
fn volume_of(id: VolumeId) -> usize {
    usize::try_from(id.0 - 1).expect("a small number")
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
        for at in 0..config.pools() {
            let small = config.small_pool == Some(at);
            let len = if small { SMALL_POOL } else { config.disk_len };
            disks.push(pools::format(&mut world.borrow_mut(), &config, at, len));
        }
        let seats: Vec<Vec<Seat>> =
            (0..config.volumes).map(|volume| first_seats(&config, volume)).collect();
        let histories = (0..config.volumes)
            .map(|at| {
                let blocks = usize::try_from(config.blocks).expect("a small volume");
                let mut history = History::new(at as u64 + 1, blocks);
                history.tears = config.tears;
                history.others = u64::from(config.initiators);
                history.alone = config.is_lone();
                Rc::new(RefCell::new(history))
            })
            .collect();
        let mut cluster = Self {
            world,
            lives: vec![0; config.pools() + 3],
            growth: Vec::new(),
            astray: BTreeSet::new(),
            spoilt: false,
            starts: 0,
            snapshots: Vec::new(),
            taken: Vec::new(),
            unknown: BTreeMap::new(),
            dropped: Vec::new(),
            deleted: Vec::new(),
            back: Vec::new(),
            doubtful: BTreeSet::new(),
            named: [seats.clone(), seats.clone()],
            lineages: vec![0; config.volumes],
            forced: vec![None; config.volumes],
            gone: BTreeSet::new(),
            standing: Standing::default(),
            seats,
            processes: Vec::new(),
            partners: BTreeMap::new(),
            mail: BTreeMap::new(),
            disks,
            replicas: vec![None; config.pools()],
            nexuses: [None; 2],
            active: 0,
            serving: Serving::default(),
            served: BTreeMap::new(),
            configs: BTreeMap::new(),
            registers: BTreeMap::new(),
            clients: Vec::new(),
            initiators: Vec::new(),
            units: Vec::new(),
            histories,
            config,
        };
        cluster.units = (0..cluster.config.volumes).map(|volume| cluster.unit(volume)).collect();
        if cluster.config.second {
            cluster.start_process(1);
        }
        for at in 0..cluster.config.pools() {
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
        // The machines of the hosts and of the second nexus are between.
        let own = if pool < self.config.replicas { 1 + pool } else { 3 + pool };
        self.home(pool).map_or(Machine(own), |which| self.nexus_machine(which))
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
            at if at == self.config.replicas => match self.config.witness? {
                WitnessPlace::Apart => None,
                WitnessPlace::First => Some(0),
                WitnessPlace::Second => Some(1),
            },
            _ => None,
        }
    }

    /// The pools in the process of a machine that serves volumes, but those that are gone.
    fn pools_in(&self, which: usize) -> Vec<usize> {
        let there = |at: &usize| self.home(*at) == Some(which) && !self.gone.contains(at);
        (0..self.config.pools()).filter(there).collect()
    }

    /// The shard of a pool, where its process runs.
    fn node_of(&self, pool: usize) -> Option<NodeId> {
        let Some(which) = self.home(pool) else { return self.replicas[pool] };
        let node = self.nexuses[which]?;
        if self.config.pools_in_front { self.partners.get(&node).copied() } else { Some(node) }
    }

    /// How many pools have a replica of each volume at first.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.config.replicas
    }

    /// How many pools there are.
    #[must_use]
    pub fn pools(&self) -> usize {
        self.config.pools()
    }

    /// Whether a pool was made for witnesses.
    #[must_use]
    pub fn is_witness_pool(&self, pool: usize) -> bool {
        self.config.witness.is_some() && pool == self.config.replicas
    }

    /// How many replicas and witnesses a volume has at first.
    #[must_use]
    pub fn voters(&self) -> usize {
        self.config.replicas + usize::from(self.config.witness.is_some())
    }

    /// Which volume a report is of.
    #[must_use]
    pub fn number_of(&self, report: &VolumeReport) -> usize {
        volume_of(report.id)
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

    /// The disk of a pool; of several the one that has trouble.
    #[must_use]
    pub fn disk(&self, pool: usize) -> DiskRef {
        let all = &self.disks[pool];
        all[1 % all.len()]
    }

    /// All disks of a pool.
    #[must_use]
    pub fn disks(&self, pool: usize) -> &[DiskRef] {
        &self.disks[pool]
    }

    /// What happened to a volume.
    #[must_use]
    pub fn history(&self, volume: usize) -> Rc<RefCell<History>> {
        Rc::clone(&self.histories[volume])
    }
}
