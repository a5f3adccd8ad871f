//! Shards and a host on one thread, without a kernel, for benches that count what a request costs.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::mpsc;

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, Lba, LbaRange, Memory, PoolDeviceId, PoolId,
    ReplicaId, VolumeId,
};
use cairn_engine::device::PoolDevice;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent, Submit};
use cairn_engine::replica::{
    Device as _, DeviceOptions, FormatOptions, MultiPool, OpenOptions, ReplicaSpec,
};
use cairn_engine::{
    ChildAddress, Command, EngineError, PoolMember, Reply, Shard, ShardConfig, VolumeSpec,
};
use cairn_reactor::{Attach, Completion, Driver, MemRegion, Op, SocketId, Token};

use crate::memory::{MemoryDriver, Wires};

/// Blocks of the volume.
pub const BLOCKS: u64 = 2 << 10;
const POOL: usize = 24 << 20;
const ARENA: u32 = 16 << 20;
const IO: QueueIndex = QueueIndex(1);
const VOLUME: VolumeId = VolumeId(7);

/// What serves the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A replica, without a nexus.
    Replica,
    /// A volume of so many replicas in the pools of its process.
    Local(u8),
    /// A volume of so many replicas, each in a process of its own.
    Remote(u8),
}

impl Shape {
    /// What is measured.
    pub const ALL: [Self; 4] = [Self::Replica, Self::Local(1), Self::Local(3), Self::Remote(3)];

    /// For people.
    #[must_use]
    pub fn title(self) -> String {
        match self {
            Self::Replica => "a replica".to_owned(),
            Self::Local(n) => format!("a volume of {n}, local"),
            Self::Remote(n) => format!("a volume of {n}, remote"),
        }
    }
}

/// Everything, connected and warm.
#[derive(Debug)]
pub struct Cluster {
    wires: Rc<RefCell<Wires>>,
    shards: Vec<Shard<MemoryDriver>>,
    host: Option<Host>,
    next: u64,
}

impl Cluster {
    /// Brings it up, connects a host with so many requests in flight, and writes every block.
    ///
    /// # Panics
    /// Where anything of that does not work.
    #[must_use]
    pub fn new(shape: Shape, depth: u32, request_blocks: u64) -> Self {
        let mut cluster = Self { wires: Wires::new(), shards: Vec::new(), host: None, next: 0 };
        let (nqn, address) = match shape {
            Shape::Replica => {
                let (at, address) = cluster.add();
                let id = cluster.add_replica(at, 0);
                (replica_nqn(id), address)
            }
            Shape::Local(count) => {
                let (at, address) = cluster.add();
                let mut children = Vec::new();
                for i in 0..count {
                    let id = cluster.add_replica(at, i);
                    children.push((id, ChildAddress::Local { pool: pool_name(i) }).into());
                }
                (cluster.add_volume(at, children), address)
            }
            Shape::Remote(count) => {
                let mut children = Vec::new();
                for _ in 0..count {
                    let (at, peer) = cluster.add();
                    let id = cluster.add_replica(at, 0);
                    let nqn = replica_nqn(id);
                    children.push((id, ChildAddress::Remote { peer, nqn }).into());
                }
                let (at, address) = cluster.add();
                (cluster.add_volume(at, children), address)
            }
        };
        let mut host = Host::new(&cluster.wires, address, &nqn, depth, request_blocks);
        while !host.ready {
            host.turn();
            cluster.turn();
        }
        cluster.host = Some(host);
        let requests = BLOCKS / request_blocks;
        cluster.run(IoOp::Write { fua: false }, requests);
        cluster.run(IoOp::Read, requests / 4);
        cluster
    }

    /// Whether instructions are counted from now on: see [`Wires::count`].
    pub fn count(&mut self, counting: bool) {
        self.wires.borrow_mut().count(counting);
    }

    fn turn(&mut self) {
        for shard in &mut self.shards {
            shard.turn();
        }
    }

    /// Makes so many requests and waits for all.
    ///
    /// # Panics
    /// Where one of them fails.
    pub fn run(&mut self, op: IoOp, count: u64) {
        let mut host = self.host.take().expect("set when it is up");
        let (mut started, mut ended) = (0, 0);
        while ended < count {
            while started < count && host.start(op, self.next) {
                // Every block once before any again, and not in order.
                self.next += 1;
                started += 1;
            }
            host.turn();
            self.turn();
            ended += host.answered();
        }
        self.host = Some(host);
    }

    fn add(&mut self) -> (usize, SocketAddr) {
        let number = u16::try_from(self.shards.len()).expect("few shards");
        let config = ShardConfig {
            node_id: u128::from(number) + 1,
            cntlid_min: 1 + number * 100,
            cntlid_max: 100 + number * 100,
            ..ShardConfig::default()
        };
        self.shards.push(Shard::new(MemoryDriver::new(&self.wires, ARENA), config));
        let at = self.shards.len() - 1;
        let address = SocketAddr::from(([10, 0, 0, 1], number + 1));
        self.command(at, |reply| Command::AddListener {
            listener: address,
            advertise: address,
            reply,
        });
        (at, address)
    }

    fn command<T: Send + 'static>(
        &mut self,
        at: usize,
        make: impl FnOnce(Reply<T>) -> Command<SocketAddr, Attach>,
    ) -> T {
        let (tx, rx) = mpsc::channel::<Result<T, EngineError>>();
        self.shards[at].command(make(Reply::new(move |result| {
            let _told = tx.send(result);
        })));
        loop {
            if let Ok(result) = rx.try_recv() {
                return result.expect("the command is carried out");
            }
            self.turn();
        }
    }

    /// A pool with a replica in it.
    fn add_replica(&mut self, at: usize, pool: u8) -> ReplicaId {
        let id = (at as u128 + 1) << 8 | u128::from(pool);
        let options = FormatOptions {
            pool_id: PoolId(id),
            device_is_zeroed: true,
            sector_size: 4096,
            force: false,
        };
        let region = MemRegion::new(POOL).expect("memory for a pool");
        let mut devices = vec![PoolDevice(Attach::Memory(region))];
        let ids =
            [DeviceOptions { id: PoolDeviceId(id), device_is_zeroed: true, sector_size: 4096 }];
        MultiPool::format(&mut devices, &ids, &options).expect("a pool");
        let opened = MultiPool::open(&mut devices, &OpenOptions::default());
        let opened = Box::new(opened.expect("what was just made").pool);
        let devices = devices
            .into_iter()
            .map(|d| PoolMember { len: d.len(), device: d.0, path: String::new() })
            .collect();
        let name = pool_name(pool);
        self.command(at, |reply| Command::AddPool { name, devices, pool: opened, reply });
        let spec = ReplicaSpec {
            id: ReplicaId(id),
            volume: VOLUME,
            name: "volume".to_owned(),
            blocks: BLOCKS,
            block_size: BlockSize::B4096,
            thick: false,
            source: None,
        };
        let pool = pool_name(pool);
        self.command(at, |reply| Command::CreateReplica { pool, spec, reply });
        ReplicaId(id)
    }

    fn add_volume(&mut self, at: usize, children: Vec<cairn_engine::VolumeReplica>) -> String {
        let nqn = "nqn.2026-11.io.cairn:volume".to_owned();
        let spec = VolumeSpec {
            id: VOLUME,
            name: "volume".to_owned(),
            nqn: nqn.clone(),
            blocks: BLOCKS,
            block_size: Some(BlockSize::B4096),
            sharing: None,
            iscsi: None,
            children,
            purpose: Purpose::Create,
            child_deadline_ms: 10_000,
            allowed_hosts: None,
            encryption: None,
        };
        self.command(at, |reply| Command::AddVolume { spec, reply });
        while !self.command(at, |reply| Command::ListVolumes { reply })[0].serving {
            self.turn();
        }
        nqn
    }
}

fn pool_name(at: u8) -> String {
    format!("p{at}")
}

fn replica_nqn(id: ReplicaId) -> String {
    format!("nqn.2026-11.io.cairn:replica:{id}")
}

/// A host with one queue.
#[derive(Debug)]
struct Host {
    driver: MemoryDriver,
    session: Session,
    sockets: [Option<SocketId>; 2],
    sending: [bool; 2],
    ready: bool,
    windows: Vec<BufSlice>,
    completions: Vec<Completion>,
    buffers: Vec<Buf>,
    free: Vec<u32>,
    blocks: u64,
    peer: SocketAddr,
}

impl Host {
    fn new(
        wires: &Rc<RefCell<Wires>>,
        peer: SocketAddr,
        nqn: &str,
        depth: u32,
        blocks: u64,
    ) -> Self {
        let mut driver = MemoryDriver::new(wires, ARENA);
        let config = SessionConfig {
            hostnqn: "nqn.2026-11.io.cairn:host".to_owned(),
            hostid: 99,
            subnqn: nqn.to_owned(),
            kato_ms: 60_000,
            io_queues: 1,
            queue_entries: 256,
            header_digest: false,
            data_digest: false,
        };
        let session = Session::new(config, driver.memory()).expect("memory for a session");
        let len = u32::try_from(blocks * 4096).expect("short requests");
        let buffers = (0..depth).map(|_| driver.memory().alloc(len).expect("room")).collect();
        Self {
            driver,
            session,
            sockets: [None; 2],
            sending: [false; 2],
            ready: false,
            windows: Vec::with_capacity(128),
            completions: Vec::with_capacity(1024),
            buffers,
            free: (0..depth).collect(),
            blocks,
            peer,
        }
    }

    /// Starts the next request, where there is room for it.
    fn start(&mut self, op: IoOp, number: u64) -> bool {
        let Some(tag) = self.free.pop() else { return false };
        let requests = BLOCKS / self.blocks;
        let lba = number.wrapping_mul(37) % requests * self.blocks;
        let range = LbaRange::new(Lba(lba), self.blocks).expect("within the volume");
        let buf = self.buffers[tag as usize].slice();
        let request = Submit::Io(IoRequest { op, range, buf });
        let memory = self.driver.memory();
        self.session.submit(IO, tag, request, memory).expect("as many as the queue takes");
        true
    }

    fn answered(&mut self) -> u64 {
        let mut count = 0;
        while let Some(done) = self.session.poll_completion() {
            assert!(done.io_status.is_ok(), "{}", done.status);
            self.free.push(done.tag);
            count += 1;
        }
        count
    }

    fn turn(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, None);
        let now = self.driver.now_ns() / 1_000_000;
        for completion in completions.drain(..) {
            self.handle(completion, now);
        }
        self.completions = completions;
        while let Some(event) = self.session.poll_event() {
            match event {
                SessionEvent::OpenQueue(QueueIndex(queue)) => {
                    let op = Op::Connect { peer: self.peer, timeout_ms: 5_000 };
                    self.driver.submit(op, Token::new(u64::from(queue)));
                }
                SessionEvent::Ready(_) => self.ready = true,
                SessionEvent::Failed(error) => panic!("{error}"),
            }
        }
        self.session.handle_timeout(now, self.driver.memory());
        for queue in 0..2_u16 {
            let at = usize::from(queue);
            let Some(socket) = self.sockets[at].filter(|_| !self.sending[at]) else { continue };
            let tx = self.session.tx(QueueIndex(queue));
            if tx.wants_send() {
                tx.take_batch(&mut self.windows);
                self.sending[at] = true;
                let op = Op::Send { socket, windows: &self.windows };
                self.driver.submit(op, Token::new(u64::from(queue)));
            }
        }
    }

    fn handle(&mut self, completion: Completion, now: u64) {
        let queue = |token: Token| u16::try_from(token.value()).expect("a queue");
        match completion {
            Completion::Connected { token, result } => {
                let socket = result.expect("the connection is taken");
                self.sockets[usize::from(queue(token))] = Some(socket);
                let at = QueueIndex(queue(token));
                self.session.handle_connected(at, now, self.driver.memory());
                self.driver.submit(Op::Receive { socket }, token);
            }
            Completion::Received { token, chunk } => {
                let at = QueueIndex(queue(token));
                let taken = self.session.handle_recv(at, chunk.slice, now, self.driver.memory());
                taken.expect("the target speaks NVMe/TCP");
                self.driver.release_chunk(chunk);
            }
            Completion::Sent { token, result } => {
                result.expect("it arrives");
                self.sending[usize::from(queue(token))] = false;
                let tx = self.session.tx(QueueIndex(queue(token)));
                tx.handle_sent(self.driver.memory());
            }
            other => panic!("{other:?}"),
        }
    }
}
