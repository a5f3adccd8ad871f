//! Nothing is allocated on the heap for a read or a write once everything is warm: counted inside
//! [`Shard::turn`], over io_uring and loopback, with every shard on this thread.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "../../../engine/tests/common/initiator.rs"]
#[allow(dead_code, reason = "the tests of the engine use more of it")]
mod initiator;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, Lba, LbaRange, Memory, PoolDeviceId, PoolId,
    ReplicaId, VolumeId,
};
use cairn_engine::crypt::{Kek, VolumeKey};
use cairn_engine::device::PoolDevice;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent, Submit};
use cairn_engine::reactor::{
    Arena, Attach, Chunk, Completion, DeviceId, Driver, DriverConfig, ListenerId, MemRegion, Op,
    SocketFault, SocketId, Token, UringDriver,
};
use cairn_engine::replica::{
    Device, DeviceOptions, FormatOptions, MultiPool, OpenOptions, ReplicaSpec,
};
use cairn_engine::{
    ChildAddress, Command, EncryptionSpec, EngineError, IscsiConfig, IscsiExport, IscsiPortal,
    PoolMember, Reply, Shard, ShardConfig, VolumeSpec,
};
use initiator::Initiator;

const BLOCKS: u64 = 1024;
const DEPTH: usize = 8;
const WARM: usize = 4000;
const MEASURED: usize = 2000;
const IO: QueueIndex = QueueIndex(1);
const PATIENCE: Duration = Duration::from_secs(20);
const PORTAL_GROUP: u16 = 1;

/// A driver whose poll does not wait, so that several take turns on one thread.
struct Quick(UringDriver);

impl Quick {
    fn new() -> Self {
        let config = DriverConfig { arena_len: 32 << 20, spin_ns: 0, ..DriverConfig::default() };
        Self(UringDriver::new(&config).expect("io_uring works here"))
    }
}

impl Driver for Quick {
    type Memory = Arena;
    type Device = Attach;
    type Listener = TcpListener;
    type Socket = TcpStream;

    fn memory(&mut self) -> &mut Arena {
        self.0.memory()
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        self.0.submit(op, token);
    }

    fn poll(&mut self, out: &mut Vec<Completion>, _deadline_ns: Option<u64>) {
        self.0.poll(out, Some(0));
    }

    fn now_ns(&self) -> u64 {
        self.0.now_ns()
    }

    fn release_chunk(&mut self, chunk: Chunk) {
        self.0.release_chunk(chunk);
    }

    fn attach_device(&mut self, device: Attach) -> std::io::Result<DeviceId> {
        self.0.attach_device(device)
    }

    fn detach_device(&mut self, device: DeviceId) -> Option<Attach> {
        self.0.detach_device(device)
    }

    fn attach_listener(&mut self, listener: TcpListener) -> std::io::Result<ListenerId> {
        self.0.attach_listener(listener)
    }

    fn detach_listener(&mut self, listener: ListenerId) {
        self.0.detach_listener(listener);
    }

    fn detach_socket(&mut self, socket: SocketId) -> Option<TcpStream> {
        self.0.detach_socket(socket)
    }

    fn attach_socket(&mut self, socket: TcpStream) -> Result<SocketId, SocketFault> {
        self.0.attach_socket(socket)
    }
}

/// All shards, and what their turns have allocated.
struct Shards {
    shards: Vec<Shard<Quick>>,
    allocations: u64,
}

impl Shards {
    fn turn(&mut self) {
        for shard in &mut self.shards {
            let counted = allocation_counter::measure(|| {
                shard.turn();
            });
            self.allocations += counted.count_total;
        }
    }

    fn add(&mut self) -> (usize, SocketAddr) {
        let number = u16::try_from(self.shards.len()).unwrap();
        let config = ShardConfig {
            node_id: u128::from(number) + 1,
            cntlid_min: 1 + number * 100,
            cntlid_max: 100 + number * 100,
            // Renewed within the measure, too.
            lease_ms: 100,
            iscsi: IscsiConfig { portal_groups: vec![PORTAL_GROUP], ..IscsiConfig::default() },
            ..ShardConfig::default()
        };
        self.shards.push(Shard::new(Quick::new(), config));
        let at = self.shards.len() - 1;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        self.command(at, |reply| Command::AddListener { listener, advertise: address, reply });
        (at, address)
    }

    fn command<T: Send + 'static>(
        &mut self,
        at: usize,
        make: impl FnOnce(Reply<T>) -> Command<TcpListener, Attach>,
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

    /// A shard with a pool and a replica in it.
    fn add_replica(&mut self) -> (ReplicaId, SocketAddr) {
        self.add_replica_on(1)
    }

    /// The pool has so many devices.
    fn add_replica_on(&mut self, count: u128) -> (ReplicaId, SocketAddr) {
        let (at, address) = self.add();
        let options = FormatOptions {
            pool_id: PoolId(at as u128 + 1),
            device_is_zeroed: true,
            sector_size: 4096,
            force: false,
        };
        let memory = || PoolDevice(Attach::Memory(MemRegion::new(32 << 20).unwrap()));
        let mut devices: Vec<PoolDevice> = (0..count).map(|_| memory()).collect();
        let ids: Vec<DeviceOptions> = (1..=count)
            .map(|id| DeviceOptions {
                id: PoolDeviceId(id),
                device_is_zeroed: true,
                sector_size: 4096,
            })
            .collect();
        MultiPool::format(&mut devices, &ids, &options).unwrap();
        let pool = Box::new(MultiPool::open(&mut devices, &OpenOptions::default()).unwrap().pool);
        let name = "pool".to_owned();
        let devices = devices
            .into_iter()
            .map(|d| PoolMember { len: Device::len(&d), device: d.0, path: String::new() })
            .collect();
        self.command(at, |reply| Command::AddPool { name, devices, pool, reply });
        let id = ReplicaId(at as u128 + 1);
        let spec = ReplicaSpec {
            id,
            volume: VolumeId(7),
            name: "volume".to_owned(),
            blocks: BLOCKS,
            block_size: BlockSize::B4096,
            thick: false,
            source: None,
        };
        self.command(at, |reply| Command::CreateReplica { pool: "pool".to_owned(), spec, reply });
        (id, address)
    }
}

/// A host that keeps requests of one kind outstanding.
struct Host {
    driver: Quick,
    session: Session,
    sockets: [Option<SocketId>; 2],
    sending: [bool; 2],
    ready: bool,
    windows: Vec<BufSlice>,
    completions: Vec<Completion>,
    buffers: Vec<Buf>,
    peer: SocketAddr,
}

impl Host {
    fn new(peer: SocketAddr, nqn: &str) -> Self {
        let mut driver = Quick::new();
        let config = SessionConfig {
            hostnqn: "nqn.2026-11.io.cairn:host".to_owned(),
            hostid: 99,
            subnqn: nqn.to_owned(),
            kato_ms: 60_000,
            io_queues: 1,
            queue_entries: 64,
            header_digest: false,
            data_digest: false,
        };
        let session = Session::new(config, driver.memory()).unwrap();
        let buffers = (0..DEPTH).map(|_| driver.memory().alloc(4096).unwrap()).collect();
        Self {
            driver,
            session,
            sockets: [None; 2],
            sending: [false; 2],
            ready: false,
            windows: Vec::with_capacity(128),
            completions: Vec::new(),
            buffers,
            peer,
        }
    }

    fn turn(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, None);
        let now = self.driver.now_ns() / 1_000_000;
        for completion in completions.drain(..) {
            match completion {
                Completion::Connected { token, result } => {
                    let queue = usize::try_from(token.value()).unwrap();
                    let socket = result.expect("the connection is taken");
                    self.sockets[queue] = Some(socket);
                    let at = QueueIndex(u16::try_from(queue).unwrap());
                    self.session.handle_connected(at, now, self.driver.memory());
                    self.driver.submit(Op::Receive { socket }, token);
                }
                Completion::Received { token, chunk } => {
                    let at = QueueIndex(u16::try_from(token.value()).unwrap());
                    let memory = self.driver.memory();
                    self.session.handle_recv(at, chunk.slice, now, memory).unwrap();
                    self.driver.release_chunk(chunk);
                }
                Completion::Sent { token, result } => {
                    result.unwrap();
                    let queue = usize::try_from(token.value()).unwrap();
                    self.sending[queue] = false;
                    let at = QueueIndex(u16::try_from(queue).unwrap());
                    self.session.tx(at).handle_sent(self.driver.memory());
                }
                other => panic!("{other:?}"),
            }
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
        for queue in 0..2 {
            let Some(socket) = self.sockets[queue].filter(|_| !self.sending[queue]) else {
                continue;
            };
            let tx = self.session.tx(QueueIndex(u16::try_from(queue).unwrap()));
            if tx.wants_send() {
                tx.take_batch(&mut self.windows);
                self.sending[queue] = true;
                let op = Op::Send { socket, windows: &self.windows };
                self.driver.submit(op, Token::new(queue as u64));
            }
        }
    }

    fn connect(&mut self, shards: &mut Shards) {
        while !self.ready {
            self.turn();
            shards.turn();
        }
    }

    /// Makes so many requests and waits for all.
    fn run(&mut self, shards: &mut Shards, op: IoOp, count: usize) {
        let (mut started, mut ended) = (0, 0);
        let mut free: Vec<u32> = (0..u32::try_from(DEPTH).unwrap()).collect();
        while ended < count {
            while started < count
                && let Some(tag) = free.pop()
            {
                let lba = (started as u64 * 37) % BLOCKS;
                let range = LbaRange::new(Lba(lba), 1).unwrap();
                let buf = self.buffers[tag as usize].slice();
                let request = Submit::Io(IoRequest { op, range, buf });
                self.session.submit(IO, tag, request, self.driver.memory()).unwrap();
                started += 1;
            }
            self.turn();
            shards.turn();
            while let Some(done) = self.session.poll_completion() {
                assert!(done.io_status.is_ok(), "{}", done.status);
                free.push(done.tag);
                ended += 1;
            }
        }
    }
}

fn measure(shards: &mut Shards, host: &mut Host) {
    host.connect(shards);
    assert!(shards.allocations > 0, "setting up allocates, or the count does not work");
    let write = IoOp::Write { fua: false };
    for op in [write, IoOp::Read] {
        host.run(shards, op, WARM);
    }
    for (what, op) in [("read", IoOp::Read), ("write", write)] {
        shards.allocations = 0;
        host.run(shards, op, MEASURED);
        let count = shards.allocations;
        assert_eq!(count, 0, "{count} allocations in {MEASURED} warm {what}s of 4 KiB");
    }
}

fn replica_nqn(id: ReplicaId) -> String {
    format!("nqn.2026-11.io.cairn:replica:{id}")
}

#[test]
fn a_replica_serves_without_allocating() {
    let mut shards = Shards { shards: Vec::new(), allocations: 0 };
    let (id, address) = shards.add_replica();
    let mut host = Host::new(address, &replica_nqn(id));
    measure(&mut shards, &mut host);
}

/// Its requests are cut at the bounds of extents, some of which are on the one device and some on the
/// other.
#[test]
fn a_replica_on_two_devices_serves_without_allocating() {
    let mut shards = Shards { shards: Vec::new(), allocations: 0 };
    let (id, address) = shards.add_replica_on(2);
    let mut host = Host::new(address, &replica_nqn(id));
    measure(&mut shards, &mut host);
}

#[test]
fn a_volume_of_three_replicas_serves_without_allocating() {
    measure_volume(None);
}

#[test]
fn an_encrypted_volume_serves_without_allocating() {
    let kek = Kek::parse(&[7; 32]).unwrap();
    let key = VolumeKey::new(std::array::from_fn(|i| u8::try_from(i).unwrap())).unwrap();
    let new = Box::new(kek.wrap(&key, VolumeId(7), [1; 12]));
    measure_volume(Some(EncryptionSpec {
        keks: vec![kek],
        new: Some(new),
        ..EncryptionSpec::default()
    }));
}

fn measure_volume(encryption: Option<EncryptionSpec>) {
    let mut shards = Shards { shards: Vec::new(), allocations: 0 };
    let (_, address, nqn) = add_volume(&mut shards, encryption, None);
    let mut host = Host::new(address, &nqn);
    measure(&mut shards, &mut host);
}

/// A volume of three replicas: the shard that serves it, where it listens, and its name.
fn add_volume(
    shards: &mut Shards,
    encryption: Option<EncryptionSpec>,
    iscsi: Option<Box<IscsiExport>>,
) -> (usize, SocketAddr, String) {
    let replicas: Vec<(ReplicaId, SocketAddr)> = (0..3).map(|_| shards.add_replica()).collect();
    let (nexus, address) = shards.add();
    let nqn = "nqn.2026-11.io.cairn:volume".to_owned();
    let spec = VolumeSpec {
        id: VolumeId(7),
        name: "volume".to_owned(),
        nqn: nqn.clone(),
        blocks: BLOCKS,
        block_size: Some(BlockSize::B4096),
        sharing: None,
        iscsi,
        children: replicas
            .into_iter()
            .map(|(id, peer)| (id, ChildAddress::Remote { peer, nqn: replica_nqn(id) }).into())
            .collect(),
        purpose: Purpose::Create,
        child_deadline_ms: 10_000,
        allowed_hosts: None,
        encryption,
    };
    shards.command(nexus, |reply| Command::AddVolume { spec, reply });
    while !shards.command(nexus, |reply| Command::ListVolumes { reply })[0].serving {
        shards.turn();
    }
    (nexus, address, nqn)
}

/// An initiator on a thread of its own, which is not counted. It is registered, so that what is reserved is looked at.
#[test]
fn an_initiator_is_served_without_allocating() {
    const IQN: &str = "iqn.2026-11.io.cairn:volume";
    const READ: u8 = 0x28;
    const WRITE: u8 = 0x2a;
    let mut shards = Shards { shards: Vec::new(), allocations: 0 };
    let export = IscsiExport {
        iqn: IQN.to_owned(),
        lun: 0,
        initiators: vec!["*".to_owned()],
        ..IscsiExport::default()
    };
    let (nexus, ..) = add_volume(&mut shards, None, Some(Box::new(export)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let portal = IscsiPortal { address, group: PORTAL_GROUP };
    shards.command(nexus, |reply| Command::AddIscsiListener { listener, portal, reply });
    let (asks, asked) = mpsc::channel::<(u8, usize)>();
    let (says, said) = mpsc::channel();
    let client = thread::spawn(move || {
        let mut session = Initiator::ready(address, "iqn.2026-11.io.example:host", IQN);
        assert!(session.reserve_out(0, 0, 0, 1).is_good());
        says.send(()).unwrap();
        while let Ok((code, count)) = asked.recv() {
            for batch in 0..count / DEPTH {
                for at in 0..DEPTH {
                    let lba = (batch * DEPTH + at) as u64 * 37 % BLOCKS;
                    let [low, high, ..] = lba.to_le_bytes();
                    let cdb = [code, 0, 0, 0, high, low, 0, 0, 1, 0];
                    match code {
                        WRITE => session.begin(&cdb, &[1; 4096], 0),
                        _ => session.begin(&cdb, &[], 4096),
                    };
                }
                for _ in 0..DEPTH {
                    let answer = session.finish();
                    assert!(answer.is_good(), "{answer:?}");
                }
            }
            says.send(()).unwrap();
        }
    });
    let wait = |shards: &mut Shards| {
        while said.try_recv().is_err() {
            assert!(!client.is_finished(), "the initiator has failed");
            shards.turn();
        }
    };
    wait(&mut shards);
    assert!(shards.allocations > 0, "a login allocates, or the count does not work");
    for code in [WRITE, READ] {
        asks.send((code, WARM)).unwrap();
        wait(&mut shards);
    }
    for (what, code) in [("read", READ), ("write", WRITE)] {
        shards.allocations = 0;
        asks.send((code, MEASURED)).unwrap();
        wait(&mut shards);
        let count = shards.allocations;
        assert_eq!(count, 0, "{count} allocations in {MEASURED} warm {what}s of 4 KiB");
    }
    drop(asks);
    client.join().unwrap();
}
