//! Many hosts on one thread: sessions of the project's own initiator over one driver.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use cairn_block::{Buf, BufSlice, IoOp, IoRequest, Lba, LbaRange, Memory};
use cairn_engine::nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent, Submit};
use cairn_reactor::{Completion, Driver, DriverConfig, Op, SocketId, Token, UringDriver};
use hdrhistogram::Histogram;

const IO: QueueIndex = QueueIndex(1);
const BLOCK: u32 = 4096;
/// Requests that a host may have in flight.
const QUEUE: u16 = 129;
/// Timers of all hosts are looked at so often.
const TIMERS_NS: u64 = 50_000_000;

/// What a host does.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Task {
    /// Requests that it keeps in flight.
    pub(crate) depth: u16,
    pub(crate) write: bool,
}

/// One of them: it is connected to one volume, over two connections.
struct Host {
    session: Session,
    peer: SocketAddr,
    sockets: [Option<SocketId>; 2],
    sending: [bool; 2],
    ready: bool,
    blocks: u64,
    buf: Buf,
    begun_ns: Vec<u64>,
    free: Vec<u32>,
    in_flight: u16,
    latency: Histogram<u64>,
}

/// All of them.
pub(crate) struct Hosts {
    driver: UringDriver,
    hosts: Vec<Host>,
    completions: Vec<Completion>,
    windows: Vec<BufSlice>,
    random: u64,
    timers_ns: u64,
}

/// What one host's requests took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Took {
    pub(crate) iops: f64,
    pub(crate) mean_us: f64,
    pub(crate) p99_us: f64,
}

impl Hosts {
    /// Connects a host to each of these.
    pub(crate) fn connect(uris: &[String]) -> Result<Self> {
        let config = DriverConfig { arena_len: 256 << 20, spin_ns: 0, ..DriverConfig::default() };
        let mut all = Self {
            driver: UringDriver::new(&config)?,
            hosts: Vec::new(),
            completions: Vec::with_capacity(1024),
            windows: Vec::with_capacity(128),
            random: 0x9e37_79b9_7f4a_7c15,
            timers_ns: 0,
        };
        for (number, uri) in (1_u32..).zip(uris) {
            all.add(number, uri)?;
            // In portions: a listener's backlog has an end.
            if number % 16 == 0 {
                all.await_ready()?;
            }
        }
        all.await_ready()?;
        Ok(all)
    }

    fn add(&mut self, number: u32, uri: &str) -> Result<()> {
        let rest = uri.strip_prefix("nvme+tcp://").context("no target")?;
        let (peer, nqn) = rest.split_once('/').context("no target")?;
        let config = SessionConfig {
            hostnqn: format!("nqn.2026-11.io.cairn:load-{number}"),
            hostid: u128::from(number),
            subnqn: nqn.to_owned(),
            kato_ms: 10_000,
            io_queues: 1,
            queue_entries: QUEUE,
            header_digest: false,
            data_digest: false,
        };
        let memory = self.driver.memory();
        let session = Session::new(config, memory).context("no memory for a session")?;
        // What is read is not looked at, and what is written is all the same: one buffer does.
        let buf = memory.alloc(BLOCK).context("no memory for a block")?;
        memory.bytes_mut(buf.slice()).fill(0xa7);
        self.hosts.push(Host {
            session,
            peer: peer.parse()?,
            sockets: [None; 2],
            sending: [false; 2],
            ready: false,
            blocks: 0,
            buf,
            begun_ns: vec![0; usize::from(QUEUE)],
            free: (0..u32::from(QUEUE) - 1).collect(),
            in_flight: 0,
            latency: Histogram::new_with_bounds(1, 100_000_000_000, 3)?,
        });
        Ok(())
    }

    fn await_ready(&mut self) -> Result<()> {
        let until = self.driver.now_ns() + 20_000_000_000;
        while self.hosts.iter().any(|host| !host.ready) {
            self.turn(Some(self.driver.now_ns() + 10_000_000))?;
            if self.driver.now_ns() > until {
                bail!("not all hosts are connected after 20 s");
            }
        }
        Ok(())
    }

    /// Lets each do its task for so long. Of each: what its requests took.
    pub(crate) fn run(&mut self, tasks: &[Task], seconds: f64) -> Result<Vec<Took>> {
        let begun = self.driver.now_ns();
        let end = begun + u64::try_from(Duration::from_secs_f64(seconds).as_nanos())?;
        self.hosts.iter_mut().for_each(|host| host.latency.reset());
        loop {
            let now = self.driver.now_ns();
            if now < end {
                for at in 0..self.hosts.len() {
                    let task = tasks.get(at).copied().unwrap_or_default();
                    while self.hosts[at].in_flight < task.depth {
                        self.start(at, task.write)?;
                    }
                }
            } else if self.hosts.iter().all(|host| host.in_flight == 0) {
                break;
            } else if now > end + 60_000_000_000 {
                bail!("requests were not answered in 60 s");
            }
            self.turn(Some(now.max(end)))?;
        }
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let took = |host: &Host| Took {
            iops: host.latency.len() as f64 / seconds,
            mean_us: host.latency.mean() / 1000.0,
            p99_us: host.latency.value_at_quantile(0.99) as f64 / 1000.0,
        };
        Ok(self.hosts.iter().map(took).collect())
    }

    fn start(&mut self, at: usize, write: bool) -> Result<()> {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let now = self.driver.now_ns();
        let host = &mut self.hosts[at];
        let tag = host.free.pop().context("more requests than the queue has")?;
        let range = LbaRange::new(Lba(self.random % host.blocks), 1)?;
        let op = if write { IoOp::Write { fua: false } } else { IoOp::Read };
        let request = Submit::Io(IoRequest { op, range, buf: host.buf.slice() });
        let submitted = host.session.submit(IO, tag, request, self.driver.memory());
        submitted.map_err(|error| anyhow!("submitting failed: {error}"))?;
        host.begun_ns[tag as usize] = now;
        host.in_flight += 1;
        Ok(())
    }

    fn turn(&mut self, deadline_ns: Option<u64>) -> Result<()> {
        self.flush();
        let mut completions = std::mem::take(&mut self.completions);
        let next = self.timers_ns + TIMERS_NS;
        let deadline = deadline_ns.map_or(next, |deadline| deadline.min(next));
        self.driver.poll(&mut completions, Some(deadline));
        let now_ns = self.driver.now_ns();
        let timers = now_ns >= next;
        for completion in completions.drain(..) {
            self.handle(completion, now_ns / 1_000_000)?;
        }
        self.completions = completions;
        if timers {
            self.timers_ns = now_ns;
            let memory = self.driver.memory();
            self.hosts
                .iter_mut()
                .for_each(|h| h.session.handle_timeout(now_ns / 1_000_000, memory));
        }
        for at in 0..self.hosts.len() {
            self.events(at, now_ns)?;
        }
        self.flush();
        Ok(())
    }

    fn events(&mut self, at: usize, now_ns: u64) -> Result<()> {
        let host = &mut self.hosts[at];
        while let Some(event) = host.session.poll_event() {
            match event {
                SessionEvent::OpenQueue(QueueIndex(queue)) => {
                    let op = Op::Connect { peer: host.peer, timeout_ms: 5_000 };
                    self.driver.submit(op, token(at, queue));
                }
                SessionEvent::Ready(info) => {
                    host.blocks = info.blocks;
                    host.ready = true;
                }
                SessionEvent::Failed(error) => return Err(error.into()),
            }
        }
        while let Some(done) = host.session.poll_completion() {
            if !done.io_status.is_ok() {
                bail!("a request failed: {}", done.status);
            }
            host.latency.saturating_record(now_ns - host.begun_ns[done.tag as usize]);
            host.free.push(done.tag);
            host.in_flight -= 1;
        }
        Ok(())
    }

    fn handle(&mut self, completion: Completion, now: u64) -> Result<()> {
        match completion {
            Completion::Connected { token, result } => {
                let (at, queue) = parts(token)?;
                let socket = result?;
                let host = &mut self.hosts[at];
                host.sockets[usize::from(queue)] = Some(socket);
                host.session.handle_connected(QueueIndex(queue), now, self.driver.memory());
                self.driver.submit(Op::Receive { socket }, token);
            }
            Completion::Received { token, chunk } => {
                let (at, queue) = parts(token)?;
                let session = &mut self.hosts[at].session;
                let memory = self.driver.memory();
                let taken = session.handle_recv(QueueIndex(queue), chunk.slice, now, memory);
                self.driver.release_chunk(chunk);
                taken?;
            }
            Completion::Sent { token, result } => {
                let (at, queue) = parts(token)?;
                let host = &mut self.hosts[at];
                host.sending[usize::from(queue)] = false;
                host.session.tx(QueueIndex(queue)).handle_sent(self.driver.memory());
                result?;
            }
            Completion::ReceiveEnded { reason, .. } => {
                bail!("the target closed a connection ({reason:?})");
            }
            _ => {}
        }
        Ok(())
    }

    fn flush(&mut self) {
        for (at, host) in self.hosts.iter_mut().enumerate() {
            for queue in 0..2_u16 {
                let i = usize::from(queue);
                let Some(socket) = host.sockets[i].filter(|_| !host.sending[i]) else { continue };
                let tx = host.session.tx(QueueIndex(queue));
                if tx.wants_send() {
                    tx.take_batch(&mut self.windows);
                    host.sending[i] = true;
                    self.driver
                        .submit(Op::Send { socket, windows: &self.windows }, token(at, queue));
                }
            }
        }
    }
}

fn token(at: usize, queue: u16) -> Token {
    Token::new(at as u64 * 2 + u64::from(queue))
}

fn parts(token: Token) -> Result<(usize, u16)> {
    let value = token.value();
    Ok((usize::try_from(value / 2)?, u16::try_from(value % 2)?))
}
