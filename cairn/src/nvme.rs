//! An NVMe/TCP host in this process: the project's own initiator on a driver of its own.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow, bail};
use cairn_engine::block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use cairn_engine::nvmf::initiator::{
    Completed, NamespaceInfo, QueueIndex, Session, SessionConfig, SessionEvent, Submit, VendorData,
};
use cairn_engine::reactor::{
    Arena, Completion, Driver, DriverConfig, Op, SocketId, Token, UringDriver,
};
use cairn_engine::register;

use crate::service::resolve;

/// A connect, or a request of set-up, that takes longer has failed.
const TIMEOUT_MS: u64 = 10_000;
/// The queue for I/O.
const IO: QueueIndex = QueueIndex(1);
/// The queue for admin commands.
const ADMIN: QueueIndex = QueueIndex(0);
/// Windows in one send.
const SEND_WINDOWS: usize = 128;

/// What to connect to: `nvme+tcp://HOST:PORT/NQN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) peer: SocketAddr,
    pub(crate) nqn: String,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no target; write nvme+tcp://HOST:PORT/NQN");
        let rest = text.strip_prefix("nvme+tcp://").ok_or_else(wrong)?;
        let (peer, nqn) = rest.split_once('/').ok_or_else(wrong)?;
        let peer = resolve(peer).ok_or_else(wrong)?;
        if nqn.is_empty() {
            return Err(wrong());
        }
        Ok(Self { peer, nqn: nqn.to_owned() })
    }
}

/// How a host is set up.
#[derive(Debug, Clone)]
pub(crate) struct HostConfig {
    pub(crate) queue_entries: u16,
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
    pub(crate) arena_len: u32,
    pub(crate) spin_us: u64,
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            queue_entries: 256,
            header_digest: false,
            data_digest: false,
            arena_len: 64 << 20,
            spin_us: 0,
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Socket {
    id: Option<SocketId>,
    sending: bool,
}

/// A connected host with one I/O queue. It lives on the thread that made it.
#[derive(Debug)]
pub(crate) struct Host {
    driver: UringDriver,
    session: Option<Session>,
    sockets: [Socket; 2],
    info: NamespaceInfo,
    completions: Vec<Completion>,
    windows: Vec<BufSlice>,
    next_tag: u32,
}

impl Host {
    /// Connects, and learns what the namespace is.
    pub(crate) fn connect(target: &Target, config: &HostConfig) -> Result<Self> {
        let driver = UringDriver::new(&DriverConfig {
            arena_len: config.arena_len,
            spin_ns: config.spin_us * 1_000,
            ..DriverConfig::default()
        })?;
        let mut host = Self {
            driver,
            session: None,
            sockets: [Socket::default(); 2],
            info: NamespaceInfo::default(),
            completions: Vec::with_capacity(256),
            windows: Vec::with_capacity(SEND_WINDOWS),
            next_tag: 0,
        };
        let id = uuid::Uuid::new_v4();
        let session = Session::new(
            SessionConfig {
                hostnqn: format!("nqn.2014-08.org.nvmexpress:uuid:{id}"),
                hostid: id.as_u128(),
                subnqn: target.nqn.clone(),
                kato_ms: 10_000,
                io_queues: 1,
                queue_entries: config.queue_entries,
                header_digest: config.header_digest,
                data_digest: config.data_digest,
            },
            host.driver.memory(),
        );
        host.session = Some(session.context("no memory for a session")?);
        host.set_up(target)
            .with_context(|| format!("connecting to {} at {}", target.nqn, target.peer))?;
        Ok(host)
    }

    /// What was learnt of the namespace.
    pub(crate) fn namespace(&self) -> &NamespaceInfo {
        &self.info
    }

    pub(crate) fn memory(&mut self) -> &mut Arena {
        self.driver.memory()
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.driver.now_ns()
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("set in `connect`")
    }

    fn set_up(&mut self, target: &Target) -> Result<()> {
        let until = self.now_ms() + TIMEOUT_MS;
        loop {
            while let Some(event) = self.session().poll_event() {
                match event {
                    SessionEvent::OpenQueue(QueueIndex(queue)) => {
                        let op = Op::Connect { peer: target.peer, timeout_ms: 5_000 };
                        self.driver.submit(op, Token::new(u64::from(queue)));
                    }
                    SessionEvent::Ready(info) => {
                        self.info = info;
                        return Ok(());
                    }
                    SessionEvent::Failed(error) => return Err(error.into()),
                }
            }
            if self.now_ms() > until {
                bail!("no answer in {} s", TIMEOUT_MS / 1000);
            }
            self.turn(Some(self.now_ns() + 100_000_000))?;
        }
    }

    fn now_ms(&self) -> u64 {
        self.driver.now_ns() / 1_000_000
    }

    /// Sends what is queued, waits for something to happen, and takes what came.
    fn turn(&mut self, deadline_ns: Option<u64>) -> Result<()> {
        self.flush();
        let mut completions = std::mem::take(&mut self.completions);
        let timer = self.session().poll_timeout().map(|ms| ms.saturating_mul(1_000_000));
        let wake = match (deadline_ns, timer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.driver.poll(&mut completions, wake);
        let now = self.now_ms();
        let mut result = Ok(());
        for completion in completions.drain(..) {
            let one = self.handle(completion, now);
            result = result.and(one);
        }
        self.completions = completions;
        let session = self.session.as_mut().expect("set in `connect`");
        session.handle_timeout(now, self.driver.memory());
        self.flush();
        result
    }

    fn handle(&mut self, completion: Completion, now: u64) -> Result<()> {
        let session = self.session.as_mut().expect("set in `connect`");
        let queue_of = |token: Token| u16::try_from(token.value()).expect("a queue number");
        match completion {
            Completion::Connected { token, result } => {
                let queue = queue_of(token);
                let socket = result?;
                self.sockets[usize::from(queue)].id = Some(socket);
                session.handle_connected(QueueIndex(queue), now, self.driver.memory());
                self.driver.submit(Op::Receive { socket }, token);
            }
            Completion::Received { token, chunk } => {
                let queue = QueueIndex(queue_of(token));
                let taken = session.handle_recv(queue, chunk.slice, now, self.driver.memory());
                self.driver.release_chunk(chunk);
                taken?;
            }
            Completion::Sent { token, result } => {
                let queue = queue_of(token);
                self.sockets[usize::from(queue)].sending = false;
                session.tx(QueueIndex(queue)).handle_sent(self.driver.memory());
                result?;
            }
            Completion::ReceiveEnded { reason, .. } => {
                bail!("the target closed the connection ({reason:?})");
            }
            _ => {}
        }
        Ok(())
    }

    fn flush(&mut self) {
        let session = self.session.as_mut().expect("set in `connect`");
        for (queue, socket) in (0u16..).zip(&mut self.sockets) {
            let Some(id) = socket.id.filter(|_| !socket.sending) else { continue };
            let tx = session.tx(QueueIndex(queue));
            if tx.wants_send() {
                tx.take_batch(&mut self.windows);
                socket.sending = true;
                let op = Op::Send { socket: id, windows: &self.windows };
                self.driver.submit(op, Token::new(u64::from(queue)));
            }
        }
    }

    /// Requests that can be submitted now.
    pub(crate) fn free_slots(&mut self) -> usize {
        self.session().free_slots(IO)
    }

    /// Starts a request; its answer comes from [`Host::poll`].
    pub(crate) fn submit(&mut self, tag: u32, request: IoRequest) -> Result<()> {
        let session = self.session.as_mut().expect("set in `connect`");
        session
            .submit(IO, tag, Submit::Io(request), self.driver.memory())
            .map_err(|e| anyhow!("submitting failed: {e}"))
    }

    /// Waits for answers, at most until the deadline, and appends them to `out`.
    pub(crate) fn poll(
        &mut self,
        out: &mut Vec<Completed>,
        deadline_ns: Option<u64>,
    ) -> Result<()> {
        let before = out.len();
        self.drain(out)?;
        if out.len() == before {
            self.turn(deadline_ns)?;
            self.drain(out)?;
        }
        Ok(())
    }

    fn drain(&mut self, out: &mut Vec<Completed>) -> Result<()> {
        let session = self.session();
        while let Some(done) = session.poll_completion() {
            out.push(done);
        }
        while let Some(event) = session.poll_event() {
            if let SessionEvent::Failed(error) = event {
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Does one request and waits for it.
    pub(crate) fn request(&mut self, op: IoOp, lba: u64, blocks: u64, buf: BufSlice) -> Result<()> {
        self.next_tag = (self.next_tag + 1) & 0xffff;
        let (tag, range) = (self.next_tag, LbaRange::new(Lba(lba), blocks)?);
        self.submit(tag, IoRequest { op, range, buf })?;
        let done = self.await_tag(tag)?;
        if done.io_status == IoStatus::Ok {
            Ok(())
        } else {
            bail!("{op:?} of {blocks} blocks at {lba}: {}", done.status)
        }
    }

    fn await_tag(&mut self, tag: u32) -> Result<Completed> {
        let mut out = Vec::new();
        let until = self.now_ns() + 60_000_000_000;
        loop {
            self.poll(&mut out, Some(until))?;
            if let Some(done) = out.iter().find(|done| done.tag == tag) {
                return Ok(*done);
            }
            if self.now_ns() > until {
                bail!("no answer in 60 s");
            }
        }
    }

    pub(crate) fn alloc(&mut self, len: u32) -> Result<Buf> {
        self.memory().alloc(len).with_context(|| format!("no buffer of {len} bytes"))
    }

    /// Takes up the epoch that a replica has promised, so that it can be read beside its nexus.
    pub(crate) fn join_epoch(&mut self) -> Result<u64> {
        let page = self.alloc(register::PAGE)?;
        let window = page.slice();
        let (mut low, mut high) = (0, 0);
        let mut epoch = 0;
        for opcode in [register::OPCODE_READ, register::OPCODE_PROMISE] {
            self.next_tag = (self.next_tag + 1) & 0xffff;
            let tag = self.next_tag;
            let data = VendorData::In(window);
            let command = Submit::Vendor { opcode, cdw10: low, cdw11: high, data };
            let session = self.session.as_mut().expect("set in `connect`");
            session
                .submit(ADMIN, tag, command, self.driver.memory())
                .map_err(|e| anyhow!("submitting failed: {e}"))?;
            let done = self.await_tag(tag)?;
            if !done.status.is_success() {
                bail!("the replica refused its register: {}", done.status);
            }
            let held = register::decode(self.memory().bytes(window))
                .context("the replica's register cannot be read")?;
            epoch = held.promised_epoch.0;
            low = u32::try_from(epoch & 0xffff_ffff)?;
            high = u32::try_from(epoch >> 32)? | register::AGAIN;
        }
        self.memory().release(page);
        Ok(epoch)
    }
}
