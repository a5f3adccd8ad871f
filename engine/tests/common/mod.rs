//! A process in miniature, and hosts on plain sockets.

#![allow(clippy::unwrap_used, dead_code, reason = "tests, of which each uses a part")]

pub(crate) mod cable;
pub(crate) mod host;
pub(crate) mod initiator;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cairn_engine::block::{
    BlockSize, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory as _, PoolId,
    ReplicaId, VolumeId,
};
use cairn_engine::control::{Command, Reply};
use cairn_engine::device::PoolDevice;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent, Submit};
use cairn_engine::reactor::{Attach, BlockFile, DriverConfig, IoMode, MemRegion};
use cairn_engine::replica::{Device as _, FormatOptions, MultiPool, Pool, ReplicaSpec};
use cairn_engine::shard::IscsiConfig;
use cairn_engine::{
    ChildAddress, EngineError, EngineHandle, IscsiPortal, PoolMember, ShardConfig, VolumeReport,
    VolumeSpec,
};

pub(crate) const BLOCKS: u64 = 2048;
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const HOST: &str = "nqn.2026-11.io.cairn:host";

pub(crate) fn volume_nqn(name: &str) -> String {
    format!("nqn.2026-11.io.cairn:{name}")
}

/// Of a process that initiators reach through a portal group of this tag.
pub(crate) fn config_for_initiators(group: u16) -> ShardConfig {
    let iscsi = IscsiConfig { portal_groups: vec![group], ..IscsiConfig::default() };
    ShardConfig {
        iscsi,
        cntlid_min: group * 100,
        cntlid_max: group * 100 + 99,
        holder: u128::from(group),
        lease_ms: 500,
        ..ShardConfig::default()
    }
}

pub(crate) fn replica_nqn(id: u128) -> String {
    format!("nqn.2026-11.io.cairn:replica:{}", ReplicaId(id))
}

/// A process in miniature, with so many shards.
pub(crate) struct Engine {
    pub(crate) handle: EngineHandle,
    pub(crate) thread: Option<JoinHandle<()>>,
    pub(crate) address: SocketAddr,
}

impl Engine {
    pub(crate) fn start(shards: u16) -> Self {
        Self::start_with(shards, ShardConfig::default())
    }

    pub(crate) fn start_with(shards: u16, config: ShardConfig) -> Self {
        Self::start_in(16 << 20, shards, config)
    }

    /// With so many bytes of buffers.
    pub(crate) fn start_in(arena_len: u32, shards: u16, config: ShardConfig) -> Self {
        let driver = DriverConfig { arena_len, ..DriverConfig::default() };
        let config = ShardConfig { assembly_wait_ms: 200, ..config };
        let (handle, thread) = cairn_engine::start_shards(&driver, &config, shards).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (listener, address) = cairn_engine::thread::listen(any).unwrap();
        let engine = Self { handle, thread: Some(thread), address };
        engine.call(|reply| Command::AddListener { listener, advertise: address, reply }).unwrap();
        engine
    }

    /// A machine in one of its lives, with a pool `p` in a folder.
    pub(crate) fn machine(folder: &Path, incarnation: u128) -> Self {
        let engine = Self::start_with(1, ShardConfig { incarnation, ..ShardConfig::default() });
        engine.add_pool_in("p", &folder.join("pool"));
        engine
    }

    /// Listens for initiators in a portal group; and where.
    pub(crate) fn listen_for_initiators(&self, group: u16) -> SocketAddr {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (listener, address) = cairn_engine::thread::listen(any).unwrap();
        let portal = IscsiPortal { address, group };
        self.call(|reply| Command::AddIscsiListener { listener, portal, reply }).unwrap();
        address
    }

    pub(crate) fn call<T: Send + 'static>(
        &self,
        make: impl FnOnce(Reply<T>) -> cairn_engine::thread::Command,
    ) -> Result<T, EngineError> {
        self.handle.call(make)
    }

    /// A pool in memory.
    pub(crate) fn add_pool(&self, name: &str) {
        let mut device = PoolDevice(Attach::Memory(MemRegion::new(64 << 20).unwrap()));
        Self::format(&mut device, name);
        self.open_pool(name, device);
    }

    fn format(device: &mut PoolDevice, name: &str) {
        let options = FormatOptions {
            pool_id: PoolId(u128::from(name.as_bytes()[0])),
            device_is_zeroed: true,
            sector_size: 4096,
            force: false,
        };
        Pool::format(device, &options).unwrap();
    }

    /// A pool in a file, which is made anew where it is not there.
    pub(crate) fn add_pool_in(&self, name: &str, path: &Path) {
        let fresh = !path.exists();
        if fresh {
            BlockFile::create(path, 64 << 20).unwrap();
        }
        let begun = Instant::now();
        let file = loop {
            match BlockFile::open(path, IoMode::Buffered) {
                Ok(file) => break file,
                // The kernel lets go of what a ring has used a moment after that is gone.
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        let mut device = PoolDevice(Attach::File(file));
        if fresh {
            Self::format(&mut device, name);
        }
        self.open_pool(name, device);
    }

    fn open_pool(&self, name: &str, mut device: PoolDevice) {
        let pool = Box::new(MultiPool::from(Pool::open(&mut device).unwrap()));
        let len = device.len();
        let devices = vec![PoolMember { device: device.0, len, path: String::new() }];
        let name = name.to_owned();
        self.call(|reply| Command::AddPool { name, devices, pool, reply }).unwrap();
    }

    pub(crate) fn add_replica(
        &self,
        pool: &str,
        id: u128,
        volume: u128,
    ) -> (ReplicaId, ChildAddress) {
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

    pub(crate) fn spec(
        name: &str,
        id: u128,
        children: Vec<(ReplicaId, ChildAddress)>,
    ) -> VolumeSpec {
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

    pub(crate) fn add_volume(&self, spec: VolumeSpec) -> VolumeReport {
        let name = spec.name.clone();
        self.call(|reply| Command::AddVolume { spec, reply }).unwrap();
        self.wait(&name, |v| v.serving)
    }

    pub(crate) fn remove_volume(&self, name: &str) {
        self.call(|reply| Command::RemoveVolume { name: name.to_owned(), reply }).unwrap();
    }

    pub(crate) fn volumes(&self) -> Vec<VolumeReport> {
        self.call(|reply| Command::ListVolumes { reply }).unwrap()
    }

    pub(crate) fn wait(&self, name: &str, wanted: impl Fn(&VolumeReport) -> bool) -> VolumeReport {
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

    pub(crate) fn delete_replica(&self, id: u128) -> Result<(), EngineError> {
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
pub(crate) struct Client {
    pub(crate) session: Session,
    pub(crate) mem: HeapMemory,
    pub(crate) peer: SocketAddr,
    pub(crate) streams: [Option<TcpStream>; 2],
    pub(crate) next_tag: u32,
    /// A connection has ended.
    pub(crate) closed: bool,
    /// What is sent before the session is ready goes out in pieces so long.
    pub(crate) piece: usize,
}

impl Client {
    pub(crate) fn start(
        peer: SocketAddr,
        nqn: &str,
        host: &str,
        digests: bool,
        piece: usize,
    ) -> Self {
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
    pub(crate) fn connect(
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

    pub(crate) fn to(engine: &Engine, volume: &str) -> Self {
        Self::connect(engine.address, &volume_nqn(volume), HOST, true, usize::MAX).unwrap()
    }

    /// Moves bytes both ways. Whether the session became ready.
    pub(crate) fn turn(&mut self) -> Result<bool, String> {
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

    pub(crate) fn wait(&mut self, q: u16, request: Submit) -> IoStatus {
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

    pub(crate) fn write(&mut self, lba: u64, with: u8) {
        self.write_sized(lba, with, BlockSize::B4096);
    }

    pub(crate) fn write_sized(&mut self, lba: u64, with: u8, size: BlockSize) {
        assert_eq!(self.write_status(lba, with, size), IoStatus::Ok);
    }

    pub(crate) fn try_write(&mut self, lba: u64, with: u8) -> bool {
        self.write_status(lba, with, BlockSize::B4096).is_ok()
    }

    fn write_status(&mut self, lba: u64, with: u8, size: BlockSize) -> IoStatus {
        let buf = self.mem.alloc(size.bytes()).unwrap();
        self.mem.bytes_mut(buf.slice()).fill(with);
        let range = LbaRange::new(Lba(lba), 1).unwrap();
        let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
        let status = self.wait(1, Submit::Io(request));
        self.mem.release(buf);
        status
    }

    pub(crate) fn read(&mut self, lba: u64) -> u8 {
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
