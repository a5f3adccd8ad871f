//! A process with several shards on io_uring, over loopback: what is where, and connections that the shard which listens
//! hands to the one that has their subsystem.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cairn_engine::block::{
    BlockSize, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory as _, PoolId,
    ReplicaId, SnapshotId, SnapshotVerb, VolumeId,
};
use cairn_engine::control::{Command, Reply};
use cairn_engine::device::PoolDevice;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent, Submit};
use cairn_engine::nvmf::log::{self, DISCOVERY_NQN, DiscoveryEntry, DiscoveryHeader};
use cairn_engine::reactor::{Attach, DriverConfig, MemRegion};
use cairn_engine::replica::{
    Device as _, FormatOptions, MultiPool, Pool, ReplicaSpec, SnapshotSpec,
};
use cairn_engine::snapshot::SnapshotCall;
use cairn_engine::{
    ChildAddress, EngineError, EngineHandle, PoolMember, ShardConfig, VolumeReplica, VolumeReport,
    VolumeSpec,
};

const BLOCKS: u64 = 2048;
const PATIENCE: Duration = Duration::from_secs(20);
const HOST: &str = "nqn.2026-11.io.cairn:host";

fn volume_nqn(name: &str) -> String {
    format!("nqn.2026-11.io.cairn:{name}")
}

fn replica_nqn(id: u128) -> String {
    format!("nqn.2026-11.io.cairn:replica:{}", ReplicaId(id))
}

/// A process in miniature, with so many shards.
struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
}

impl Engine {
    fn start(shards: u16) -> Self {
        let driver = DriverConfig { arena_len: 16 << 20, ..DriverConfig::default() };
        let config = ShardConfig { assembly_wait_ms: 200, ..ShardConfig::default() };
        let (handle, thread) = cairn_engine::start_shards(&driver, &config, shards).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (listener, address) = cairn_engine::thread::listen(any).unwrap();
        let engine = Self { handle, thread: Some(thread), address };
        engine.call(|reply| Command::AddListener { listener, advertise: address, reply }).unwrap();
        engine
    }

    fn call<T: Send + 'static>(
        &self,
        make: impl FnOnce(Reply<T>) -> cairn_engine::thread::Command,
    ) -> Result<T, EngineError> {
        self.handle.call(make)
    }

    /// A pool in memory.
    fn add_pool(&self, name: &str) {
        let mut device = PoolDevice(Attach::Memory(MemRegion::new(64 << 20).unwrap()));
        let options = FormatOptions {
            pool_id: PoolId(u128::from(name.as_bytes()[0])),
            device_is_zeroed: true,
            sector_size: 4096,
            force: false,
        };
        Pool::format(&mut device, &options).unwrap();
        let pool = Box::new(MultiPool::from(Pool::open(&mut device).unwrap()));
        let len = device.len();
        let devices = vec![PoolMember { device: device.0, len, path: String::new() }];
        let name = name.to_owned();
        self.call(|reply| Command::AddPool { name, devices, pool, reply }).unwrap();
    }

    fn add_replica(&self, pool: &str, id: u128, volume: u128) -> (ReplicaId, ChildAddress) {
        let spec = ReplicaSpec {
            id: ReplicaId(id),
            volume: VolumeId(volume),
            name: String::new(),
            blocks: BLOCKS,
            block_size: BlockSize::B4096,
            thick: false,
            source: None,
        };
        let pool = pool.to_owned();
        let address = ChildAddress::Local { pool: pool.clone() };
        self.call(|reply| Command::CreateReplica { pool, spec, reply }).unwrap();
        (ReplicaId(id), address)
    }

    fn spec(name: &str, id: u128, children: Vec<(ReplicaId, ChildAddress)>) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId(id),
            name: name.to_owned(),
            nqn: volume_nqn(name),
            blocks: BLOCKS,
            block_size: Some(BlockSize::B4096),
            children: children.into_iter().map(Into::into).collect(),
            purpose: Purpose::Create,
            child_deadline_ms: 2_000,
            allowed_hosts: None,
            sharing: None,
            iscsi: None,
            encryption: None,
        }
    }

    fn add_volume(&self, spec: VolumeSpec) -> VolumeReport {
        let name = spec.name.clone();
        self.call(|reply| Command::AddVolume { spec, reply }).unwrap();
        self.wait(&name, |v| v.serving)
    }

    fn remove_volume(&self, name: &str) {
        self.call(|reply| Command::RemoveVolume { name: name.to_owned(), reply }).unwrap();
    }

    fn volumes(&self) -> Vec<VolumeReport> {
        self.call(|reply| Command::ListVolumes { reply }).unwrap()
    }

    fn wait(&self, name: &str, wanted: impl Fn(&VolumeReport) -> bool) -> VolumeReport {
        let until = Instant::now() + PATIENCE;
        loop {
            let volume = self.volumes().into_iter().find(|v| v.name == name).unwrap();
            if wanted(&volume) {
                return volume;
            }
            assert!(Instant::now() < until, "{volume:#?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn delete_replica(&self, id: u128) -> Result<(), EngineError> {
        self.call(|reply| Command::DeleteReplica { replica: ReplicaId(id), reply })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let stopped = self.call(|reply| Command::Shutdown { reply });
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            if !thread::panicking() {
                stopped.unwrap();
                joined.unwrap();
            }
        }
    }
}

/// A host, on plain sockets.
struct Client {
    session: Session,
    mem: HeapMemory,
    peer: SocketAddr,
    streams: [Option<TcpStream>; 2],
    next_tag: u32,
    /// A connection has ended.
    closed: bool,
    /// What is sent before the session is ready goes out in pieces so long.
    piece: usize,
}

impl Client {
    fn start(peer: SocketAddr, nqn: &str, host: &str, digests: bool, piece: usize) -> Self {
        let mut mem = HeapMemory::new(1 << 20);
        let config = SessionConfig {
            hostnqn: host.to_owned(),
            hostid: 5,
            subnqn: nqn.to_owned(),
            kato_ms: 0,
            io_queues: 1,
            queue_entries: 32,
            header_digest: digests,
            data_digest: digests,
        };
        let session = Session::new(config, &mut mem).unwrap();
        Self { session, mem, peer, streams: [None, None], next_tag: 0, closed: false, piece }
    }

    /// The session once it is ready, or why it is not.
    fn connect(
        peer: SocketAddr,
        nqn: &str,
        host: &str,
        digests: bool,
        piece: usize,
    ) -> Result<Self, String> {
        let mut client = Self::start(peer, nqn, host, digests, piece);
        let deadline = Instant::now() + PATIENCE;
        while !client.turn()? {
            assert!(Instant::now() < deadline, "no session");
        }
        client.piece = usize::MAX;
        Ok(client)
    }

    fn to(engine: &Engine, volume: &str) -> Self {
        Self::connect(engine.address, &volume_nqn(volume), HOST, true, usize::MAX).unwrap()
    }

    /// Moves bytes both ways. Whether the session became ready.
    fn turn(&mut self) -> Result<bool, String> {
        let mut ready = false;
        while let Some(event) = self.session.poll_event() {
            match event {
                SessionEvent::OpenQueue(q) => {
                    let stream = TcpStream::connect(self.peer).unwrap();
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
                    self.streams[usize::from(q.0)] = Some(stream);
                    self.session.handle_connected(q, 0, &mut self.mem);
                }
                SessionEvent::Ready(_) => ready = true,
                SessionEvent::Failed(error) => return Err(error.to_string()),
            }
        }
        for (q, stream) in (0u16..).map(QueueIndex).zip(&mut self.streams) {
            let Some(stream) = stream else { continue };
            let mut windows = Vec::with_capacity(64);
            while self.session.tx(q).wants_send() {
                self.session.tx(q).take_batch(&mut windows);
                let bytes: Vec<u8> =
                    windows.iter().flat_map(|&w| self.mem.bytes(w)).copied().collect();
                for piece in bytes.chunks(self.piece.min(bytes.len())) {
                    if let Err(error) = stream.write_all(piece) {
                        return Err(error.to_string());
                    }
                    if self.piece < bytes.len() {
                        thread::sleep(Duration::from_micros(200));
                    }
                }
                self.session.tx(q).handle_sent(&mut self.mem);
            }
            let buf = self.mem.alloc(64 << 10).unwrap();
            if let Ok(n) = stream.read(self.mem.bytes_mut(buf.slice())) {
                self.closed |= n == 0;
                let got = buf.slice().sub(0, u32::try_from(n).unwrap());
                if let Err(error) = self.session.handle_recv(q, got, 0, &mut self.mem) {
                    return Err(error.to_string());
                }
            }
            self.mem.release(buf);
        }
        Ok(ready)
    }

    fn wait(&mut self, q: u16, request: Submit) -> IoStatus {
        self.next_tag += 1;
        self.session.submit(QueueIndex(q), self.next_tag, request, &mut self.mem).unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.turn().unwrap();
            if let Some(done) = self.session.poll_completion() {
                assert_eq!(done.tag, self.next_tag);
                return done.io_status;
            }
            assert!(Instant::now() < deadline, "no answer");
        }
    }

    fn write(&mut self, lba: u64, with: u8) {
        let buf = self.mem.alloc(4096).unwrap();
        self.mem.bytes_mut(buf.slice()).fill(with);
        let range = LbaRange::new(Lba(lba), 1).unwrap();
        let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
        assert_eq!(self.wait(1, Submit::Io(request)), IoStatus::Ok);
        self.mem.release(buf);
    }

    fn read(&mut self, lba: u64) -> u8 {
        let buf = self.mem.alloc(4096).unwrap();
        let range = LbaRange::new(Lba(lba), 1).unwrap();
        let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
        assert_eq!(self.wait(1, Submit::Io(request)), IoStatus::Ok);
        let bytes = self.mem.bytes(buf.slice());
        let first = bytes[0];
        assert!(bytes.iter().all(|&byte| byte == first));
        self.mem.release(buf);
        first
    }
}

/// The subsystems that discovery lists for a host.
fn discover(engine: &Engine, host: &str) -> Vec<String> {
    let found = Client::connect(engine.address, DISCOVERY_NQN, host, false, usize::MAX);
    let mut client = found.unwrap();
    let buf = client.mem.alloc(16 << 10).unwrap();
    let page = Submit::GetLog { lid: log::DISCOVERY, offset: 0, data: buf.slice() };
    assert_eq!(client.wait(0, page), IoStatus::Ok);
    let bytes = client.mem.bytes(buf.slice());
    let count = usize::try_from(DiscoveryHeader::decode(bytes).unwrap().numrec).unwrap();
    let entries = bytes[1024..].chunks(1024).take(count);
    let entries = entries.map(|entry| DiscoveryEntry::decode(entry).unwrap());
    entries.skip(1).map(|entry| entry.subnqn).collect()
}

/// Two pools, and a volume in each: `a` on the first shard, `b` on the second.
fn two() -> Engine {
    let engine = Engine::start(2);
    for (pool, volume, id) in [("p", "a", 1), ("q", "b", 2)] {
        engine.add_pool(pool);
        let child = engine.add_replica(pool, id, id);
        engine.add_volume(Engine::spec(volume, id, vec![child]));
    }
    engine
}

#[test]
fn volumes_of_all_shards_are_found_at_one_address() {
    let engine = two();
    let shards: Vec<_> = engine.volumes().iter().map(|v| (v.name.clone(), v.shard)).collect();
    assert_eq!(shards, [("a".to_owned(), 0), ("b".to_owned(), 1)]);
    let pools = engine.call(|reply| Command::ListPools { reply }).unwrap();
    assert_eq!(pools.iter().map(|p| p.shard).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(discover(&engine, HOST), [volume_nqn("a"), volume_nqn("b")]);

    let mut hosts: Vec<Client> = ["a", "b", "b"].map(|v| Client::to(&engine, v)).into();
    for (host, with) in hosts.iter_mut().zip([1, 2, 3]) {
        host.write(u64::from(with), with);
    }
    assert_eq!([hosts[1].read(3), hosts[2].read(2), hosts[0].read(2)], [3, 2, 0]);
    for (volume, count) in [("a", 1), ("b", 2)] {
        let told = engine.wait(volume, |v| v.hosts.iter().all(|h| h.io_queues == 1));
        assert_eq!(told.hosts.len(), count, "{told:#?}");
        let mut ids: Vec<u16> = told.hosts.iter().map(|h| h.controller).collect();
        ids.dedup();
        assert_eq!(ids.len(), count, "each has a controller of its own");
    }

    engine.remove_volume("b");
    assert_eq!(discover(&engine, HOST), [volume_nqn("a")]);
    let gone = Client::connect(engine.address, &volume_nqn("b"), HOST, false, usize::MAX);
    assert!(gone.is_err(), "nobody has it");
    assert_eq!(hosts[0].read(1), 1);
}

#[test]
fn a_host_is_let_in_by_the_shard_that_has_the_volume() {
    let engine = two();
    for (volume, pool, id) in [("c", "p", 3), ("d", "q", 4)] {
        let child = engine.add_replica(pool, id, id);
        let mut spec = Engine::spec(volume, id, vec![child]);
        spec.allowed_hosts = Some(vec![format!("{HOST}:{volume}")]);
        engine.add_volume(spec);
    }
    assert_eq!(discover(&engine, HOST), [volume_nqn("a"), volume_nqn("b")]);
    assert_eq!(discover(&engine, &format!("{HOST}:d")).len(), 3);
    for volume in ["c", "d"] {
        let connect = |host: &str| {
            Client::connect(engine.address, &volume_nqn(volume), host, true, usize::MAX)
        };
        let refused = connect(HOST).map(|_| ()).unwrap_err();
        assert!(refused.contains("Host") || refused.contains("host"), "{refused}");
        connect(&format!("{HOST}:{volume}")).unwrap().write(0, 9);
    }
}

/// A connection moves wherever its bytes are cut.
#[test]
fn a_connection_moves_however_its_bytes_arrive() {
    let engine = two();
    for piece in [1, 7, 100, 128, 129, 500] {
        for digests in [false, true] {
            for volume in ["a", "b"] {
                let nqn = volume_nqn(volume);
                let mut host = Client::connect(engine.address, &nqn, HOST, digests, piece).unwrap();
                host.write(1, 5);
                assert_eq!(host.read(1), 5);
            }
        }
    }
}

#[test]
fn many_connections_move_at_once() {
    let engine = two();
    let address = engine.address;
    let hosts: Vec<_> = (0u8..8)
        .map(|at| {
            thread::spawn(move || {
                for round in 0..8u64 {
                    let nqn = volume_nqn(["a", "b"][usize::from(at % 2)]);
                    let mut host =
                        Client::connect(address, &nqn, HOST, at & 2 == 0, usize::MAX).unwrap();
                    host.write(u64::from(at) * 8 + round, at + 1);
                    assert_eq!(host.read(u64::from(at) * 8 + round), at + 1);
                }
            })
        })
        .collect();
    hosts.into_iter().for_each(|host| host.join().unwrap());
    // All are gone again, and nothing is left of them.
    for volume in ["a", "b"] {
        engine.wait(volume, |v| v.hosts.is_empty());
    }
}

/// A peer that says much and asks for nothing would have it all kept.
#[test]
fn what_a_host_sends_before_its_connect_has_a_bound() {
    let engine = two();
    let mut stream = TcpStream::connect(engine.address).unwrap();
    let mut icreq = [0; 128];
    (icreq[2], icreq[4]) = (128, 128);
    stream.write_all(&icreq).unwrap();
    stream.read_exact(&mut [0; 128]).unwrap();
    // The head of a capsule with 8 KiB of data in it, which arrives without end.
    let mut capsule = vec![0; 72];
    (capsule[0], capsule[2], capsule[3]) = (4, 72, 72);
    capsule[4..8].copy_from_slice(&(72u32 + 8192).to_le_bytes());
    capsule.resize(4096, 0);
    stream.write_all(&capsule).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    // Closed, or reset where some of it was not read.
    let _end = stream.read_to_end(&mut rest);
    assert!(rest.len() <= 256, "{rest:?}");
    assert_eq!(discover(&engine, HOST).len(), 2, "the others are served as before");
}

fn local(pool: &str, id: u128) -> (ReplicaId, ChildAddress) {
    (ReplicaId(id), ChildAddress::Local { pool: pool.to_owned() })
}

/// What has replicas in pools of two shards is not made; what exists is served all the same.
#[test]
fn a_volume_is_on_the_shard_of_its_pools() {
    let engine = two();
    for (pool, id) in [("p", 11), ("q", 12), ("q", 13)] {
        engine.add_replica(pool, id, 9);
    }
    let apart = || vec![local("p", 11), local("q", 12)];
    let spec = Engine::spec("v", 9, apart());
    let refused = engine.call(|reply| Command::AddVolume { spec, reply }).unwrap_err().to_string();
    assert!(
        refused.contains("`p` is on shard 0, `q` is on shard 1") && refused.contains("nvme+tcp"),
        "{refused}"
    );

    // By its URI it is a replica like any other.
    let peer = engine.address;
    let by_uri = (ReplicaId(12), ChildAddress::Remote { peer, nqn: replica_nqn(12) });
    let volume = engine.add_volume(Engine::spec("v", 9, vec![local("p", 11), by_uri]));
    assert_eq!((volume.shard, volume.children.len()), (0, 2), "{volume:#?}");
    Client::to(&engine, "v").write(3, 7);
    let replica: VolumeReplica = local("q", 13).into();
    let name = "v".to_owned();
    let refused = engine.call(|reply| Command::AddReplica { name, replica, reply }).unwrap_err();
    assert!(refused.to_string().contains("volume `v` is on shard 0, and pool `q`"), "{refused}");
    engine.remove_volume("v");

    let spec = VolumeSpec { purpose: Purpose::Assemble, ..Engine::spec("v", 9, apart()) };
    engine.add_volume(spec);
    let volume = engine.wait("v", |v| v.state == "online");
    let far = ChildAddress::Remote { peer, nqn: replica_nqn(12) };
    assert_eq!((volume.shard, &volume.children[1].address), (0, &far), "{volume:#?}");
    assert_eq!(Client::to(&engine, "v").read(3), 7);

    // It is used, though by another shard than the one that has it.
    for id in [11, 12] {
        let used = engine.delete_replica(id).unwrap_err().to_string();
        assert!(used.contains("belongs to volume `v`"), "{used}");
    }
    engine.remove_volume("v");
    for id in [12, 11] {
        engine.delete_replica(id).unwrap();
    }
    let gone = engine.delete_replica(12);
    assert!(matches!(gone, Err(EngineError::NotFound { .. })), "{gone:?}");
}

#[test]
fn volumes_without_local_replicas_are_spread() {
    let (far, near) = (two(), Engine::start(3));
    for (at, id) in (20..26).enumerate() {
        // Of both shards of the other process.
        far.add_replica(["p", "q"][at % 2], id, id);
        let child = ChildAddress::Remote { peer: far.address, nqn: replica_nqn(id) };
        let name = format!("v{id}");
        near.add_volume(Engine::spec(&name, id, vec![(ReplicaId(id), child)]));
        Client::to(&near, &name).write(0, 1);
    }
    let shards: Vec<u16> = near.volumes().iter().map(|v| v.shard).collect();
    assert_eq!(shards, [0, 1, 2, 0, 1, 2]);
    assert_eq!(discover(&near, HOST).len(), 6);
}

#[test]
fn a_snapshot_of_volumes_on_several_shards_is_refused() {
    let engine = two();
    let take = |volumes: &[&str], id| {
        let call = SnapshotCall {
            spec: SnapshotSpec { id: SnapshotId(id), name: "s".to_owned(), created: 1 },
            clone: None,
        };
        let volumes = volumes.iter().map(|&v| v.to_owned()).collect();
        let verb = SnapshotVerb::Create;
        engine.call(|reply| Command::Snapshot { volumes, verb, call, force: false, reply })
    };
    let refused = take(&["a", "b"], 1).unwrap_err().to_string();
    assert!(refused.contains("`a` is on shard 0, `b` is on shard 1"), "{refused}");
    take(&["b"], 2).unwrap();
    let told =
        engine.call(|reply| Command::ListSnapshots { volume: "b".to_owned(), reply }).unwrap();
    assert_eq!(told.len(), 1);
}

/// The replica's shard went first, and the volume's waited for it until it gave up, after ten seconds.
#[test]
fn a_volume_over_the_network_stops_at_once_under_load() {
    let engine = two();
    engine.add_replica("p", 31, 30);
    engine.add_replica("q", 32, 30);
    let by_uri =
        (ReplicaId(32), ChildAddress::Remote { peer: engine.address, nqn: replica_nqn(32) });
    engine.add_volume(Engine::spec("v", 30, vec![local("p", 31), by_uri]));
    let mut host = Client::to(&engine, "v");
    let writer = thread::spawn(move || {
        // Until it is cut off.
        for at in 0u64.. {
            let buf = host.mem.alloc(4096).unwrap();
            let range = LbaRange::new(Lba(at % BLOCKS), 1).unwrap();
            let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
            let queued = host.session.submit(QueueIndex(1), 1, Submit::Io(request), &mut host.mem);
            while queued.is_ok() && host.session.poll_completion().is_none() {
                if host.turn().is_err() || host.closed {
                    return;
                }
            }
            host.mem.release(buf);
        }
    });
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    writer.join().unwrap();
}
