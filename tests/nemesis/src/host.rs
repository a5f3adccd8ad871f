//! A host with a path to each process that shares a volume: the project's own initiator, with what multipath does.
//! A request that loses its path, or is not answered in time, is made again on the next one, with a new value, so
//! that a read tells which attempt it saw.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use cairn_engine::block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory};
use cairn_engine::nvmf::initiator::{
    Completed, QueueIndex, Session, SessionConfig, SessionEvent, Submit,
};
use cairn_engine::reactor::{Completion, Driver, DriverConfig, Op, SocketId, Token, UringDriver};
use cairn_sim::Rng;
use cairn_sim::disk::PAGE;

use crate::shared::{Phase, Shared};
use crate::trace::{Io, Outcome};
use crate::volume::Tenure;

const IO: QueueIndex = QueueIndex(1);
const SEND_WINDOWS: usize = 128;
const CONNECT_TIMEOUT_MS: u32 = 700;
const KATO_MS: u32 = 2_000;
/// A path whose oldest request is older than this is left, by a host that writes and by one that reads.
const REQUEST_TIMEOUT: [Duration; 2] = [Duration::from_millis(1_500), Duration::from_secs(4)];
/// The longest request, in blocks.
const MAX_BLOCKS: u64 = 16;
/// How often what a lost write was to change is looked at, where it is not made again.
const LOOKS: u8 = 6;
/// A clone is read within this time, or not at all.
const CLONE: Duration = Duration::from_secs(10);
/// Blocks of an extent: a discard of a whole one gives it back.
const EXTENT_BLOCKS: u64 = 256;
const MS: u64 = 1_000_000;
/// A host looks at what it is to do this often at least.
const TICK_NS: u64 = 20 * MS;

/// What a host does.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub(crate) depth: usize,
    /// The longest pause between two requests, in nanoseconds.
    pub(crate) gap_ns: u64,
    pub(crate) hot_blocks: u64,
    pub(crate) reads_per_mille: u64,
}

impl Work {
    /// The first host of a volume writes more, the second reads: one that only reads stays where it is answered.
    pub(crate) fn drawn(rng: &mut Rng, number: usize) -> Self {
        let reader = number > 0;
        Self {
            depth: if reader { 4 } else { [4, 8, 16][rng.index(3)] },
            gap_ns: [4, 8, 12][rng.index(3)] * MS,
            hot_blocks: [8, 32, 128][rng.index(3)],
            reads_per_mille: if reader { 1_000 } else { 300 },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle { retry_ns: u64 },
    Connecting,
    Ready,
    Closing,
}

#[derive(Debug, Default, Clone, Copy)]
struct Socket {
    id: Option<SocketId>,
    connecting: bool,
    sending: bool,
}

#[derive(Debug)]
struct Attempt {
    invoked: u64,
    value: u64,
    sent: Instant,
    began: SystemTime,
    buf: Option<Buf>,
}

/// A request, from its first attempt until it is answered.
#[derive(Debug)]
struct Request {
    op: IoOp,
    lba: u64,
    blocks: u64,
    first: Instant,
    attempt: Option<Attempt>,
    /// It is made so often again once it is answered.
    looks: u8,
}

/// A host of one volume.
#[derive(Debug)]
pub(crate) struct Host {
    driver: UringDriver,
    shared: Arc<Shared>,
    volume: usize,
    number: usize,
    id: u128,
    nqn: String,
    paths: Vec<(SocketAddr, usize)>,
    path: usize,
    /// Of the process that it is connected to.
    tenure: Tenure,
    work: Work,
    rng: Rng,
    stage: Stage,
    since: Instant,
    session: Option<Session>,
    sockets: [Socket; 2],
    requests: Vec<Option<Request>>,
    /// What is read next, once all is read.
    verify: u64,
    /// It reads a snapshot that was asked for then, and nothing else; and blocks that it has read.
    snapshot: Option<u64>,
    read: u64,
    next_ns: u64,
    completions: Vec<Completion>,
    windows: Vec<BufSlice>,
    failover: bool,
}

/// What a host did.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Did {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) trims: u64,
    pub(crate) retries: u64,
    pub(crate) errors: u64,
    pub(crate) moves: u64,
    pub(crate) longest: Duration,
}

impl Host {
    pub(crate) fn new(
        shared: Arc<Shared>,
        volume: usize,
        number: usize,
        nqn: String,
        paths: Vec<(SocketAddr, usize)>,
        mut rng: Rng,
    ) -> Result<Self> {
        let work = Work::drawn(&mut rng, number);
        let driver = UringDriver::new(&DriverConfig {
            arena_len: 8 << 20,
            spin_ns: 0,
            ring_entries: 128,
            recv_buffers: 64,
            max_sockets: 64,
            ..DriverConfig::default()
        })
        .context("a host's io_uring")?;
        Ok(Self {
            driver,
            shared,
            volume,
            number,
            id: uuid::Uuid::new_v4().as_u128(),
            nqn,
            path: rng.index(paths.len()),
            paths,
            tenure: Tenure { node: 0, life: 0 },
            requests: (0..work.depth).map(|_| None).collect(),
            work,
            rng,
            stage: Stage::Idle { retry_ns: 0 },
            since: Instant::now(),
            session: None,
            sockets: [Socket::default(); 2],
            verify: 0,
            snapshot: None,
            read: 0,
            next_ns: 0,
            completions: Vec::new(),
            windows: Vec::with_capacity(SEND_WINDOWS),
            failover: false,
        })
    }

    /// Works until it is told to end.
    pub(crate) fn run(&mut self) {
        let mut forgot = Instant::now();
        loop {
            let phase = self.shared.phase();
            let idle = self.requests.iter().all(Option::is_none);
            if phase == Phase::End || phase == Phase::Drain && idle {
                break;
            }
            if phase == Phase::Verify && self.number == 0 && self.verified() && idle {
                break;
            }
            if phase == Phase::Verify && self.number > 0 && idle {
                break;
            }
            self.turn();
            if self.number == 0 && forgot.elapsed() > Duration::from_secs(1) {
                forgot = Instant::now();
                self.shared.volumes[self.volume].lock().forget();
            }
        }
        self.fail();
        let until = Instant::now() + Duration::from_secs(2);
        while self.stage == Stage::Closing && Instant::now() < until {
            self.turn();
        }
    }

    /// Reads a clone of the snapshot that was asked for at `invoked`, and has it judged as a read of the volume
    /// since then. Returns how many blocks could be read in time.
    pub(crate) fn read_clone(mut self, invoked: u64) -> u64 {
        self.snapshot = Some(invoked);
        let until = Instant::now() + CLONE;
        loop {
            let idle = self.requests.iter().all(Option::is_none);
            let over = self.shared.phase() != Phase::Work || Instant::now() > until;
            if over || self.verified() && idle {
                break;
            }
            self.turn();
        }
        self.fail();
        let until = Instant::now() + Duration::from_secs(2);
        while self.stage == Stage::Closing && Instant::now() < until {
            self.turn();
        }
        self.read
    }

    fn reads_all(&self) -> bool {
        self.snapshot.is_some() || self.shared.phase() == Phase::Verify
    }

    fn verified(&self) -> bool {
        self.verify >= self.shared.blocks
    }

    fn turn(&mut self) {
        let now_ns = self.driver.now_ns();
        let mut deadline = now_ns + TICK_NS;
        if self.stage == Stage::Ready && self.wants_more() {
            deadline = deadline.min(self.next_ns);
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, Some(deadline));
        for completion in completions.drain(..) {
            self.handle(completion);
        }
        self.completions = completions;
        let now = self.driver.now_ns();
        if let Stage::Idle { retry_ns } = self.stage
            && now >= retry_ns
        {
            self.open();
        }
        if let Some(session) = self.session.as_mut().filter(|_| self.stage != Stage::Closing) {
            session.handle_timeout(now / MS, self.driver.memory());
        }
        let patience = REQUEST_TIMEOUT[self.number.min(1)];
        let oldest = self.requests.iter().flatten().filter_map(|r| r.attempt.as_ref());
        let late = oldest.map(|a| a.sent).min().is_some_and(|at| at.elapsed() > patience);
        let stuck = self.stage == Stage::Connecting && self.since.elapsed() > patience;
        if late && self.stage == Stage::Ready || stuck {
            self.fail();
        }
        self.run_session();
        self.flush();
    }

    fn wants_more(&self) -> bool {
        let waiting = self.requests.iter().flatten().any(|r| r.attempt.is_none());
        let free = self.requests.iter().any(Option::is_none);
        let new = match self.shared.phase() {
            _ if self.snapshot.is_some() => !self.verified(),
            Phase::Work => true,
            Phase::Verify => self.number == 0 && !self.verified(),
            Phase::Drain | Phase::End => false,
        };
        waiting || free && new
    }

    // ---- the connection

    fn open(&mut self) {
        let config = SessionConfig {
            hostnqn: format!("nqn.2026-11.io.cairn:nemesis:{:x}", self.id),
            hostid: self.id,
            subnqn: self.nqn.clone(),
            kato_ms: KATO_MS,
            io_queues: 1,
            queue_entries: 64,
            header_digest: self.number == 0,
            data_digest: self.number == 0,
        };
        self.session = Session::new(config, self.driver.memory());
        assert!(self.session.is_some(), "the host has no memory for a session");
        self.tenure = self.shared.tenure(self.paths[self.path].1);
        self.since = Instant::now();
        self.stage = Stage::Connecting;
    }

    fn handle(&mut self, completion: Completion) {
        let queue_of = |token: Token| u16::try_from(token.value()).expect("a queue number");
        let now = self.driver.now_ns() / MS;
        match completion {
            Completion::Connected { token, result } => {
                let queue = queue_of(token);
                let socket = &mut self.sockets[usize::from(queue)];
                socket.connecting = false;
                match result {
                    Ok(id) => {
                        socket.id = Some(id);
                        if self.stage == Stage::Closing {
                            self.driver.submit(Op::Close { socket: id }, token);
                            return;
                        }
                        if let Some(session) = self.session.as_mut() {
                            let memory = self.driver.memory();
                            session.handle_connected(QueueIndex(queue), now, memory);
                        }
                        self.driver.submit(Op::Receive { socket: id }, token);
                    }
                    Err(_) => self.fail(),
                }
            }
            Completion::Received { token, chunk } => {
                let queue = QueueIndex(queue_of(token));
                let mut failed = false;
                if self.stage != Stage::Closing
                    && let Some(session) = self.session.as_mut()
                {
                    let memory = self.driver.memory();
                    failed = session.handle_recv(queue, chunk.slice, now, memory).is_err();
                }
                self.driver.release_chunk(chunk);
                if failed {
                    self.fail();
                }
            }
            Completion::Sent { token, result } => {
                let queue = queue_of(token);
                self.sockets[usize::from(queue)].sending = false;
                if let Some(session) = self.session.as_mut() {
                    session.tx(QueueIndex(queue)).handle_sent(self.driver.memory());
                }
                if result.is_err() {
                    self.fail();
                }
            }
            Completion::ReceiveEnded { .. } => self.fail(),
            Completion::Closed { token } => {
                self.sockets[usize::from(queue_of(token))].id = None;
            }
            Completion::Disk { .. } | Completion::Accepted { .. } | Completion::Woken => {}
        }
        self.finish_close();
    }

    fn fail(&mut self) {
        if matches!(self.stage, Stage::Idle { .. } | Stage::Closing) {
            return;
        }
        self.stage = Stage::Closing;
        self.path = (self.path + 1) % self.paths.len();
        for (queue, socket) in (0u64..).zip(&self.sockets) {
            if let Some(id) = socket.id {
                self.driver.submit(Op::Close { socket: id }, Token::new(queue));
            }
        }
        self.finish_close();
    }

    fn finish_close(&mut self) {
        let open = self.sockets.iter().any(|s| s.id.is_some() || s.connecting);
        if self.stage != Stage::Closing || open {
            return;
        }
        self.did(|did| did.moves += 1);
        if let Some(mut session) = self.session.take() {
            session.fail();
            while let Some(done) = session.poll_completion() {
                self.completed(&done);
            }
            while let Some(tag) = session.poll_abandoned() {
                self.path_lost(tag as usize);
            }
            session.close(self.driver.memory());
        }
        self.sockets = [Socket::default(); 2];
        let wait = (5 + self.rng.below(100)) * MS;
        self.stage = Stage::Idle { retry_ns: self.driver.now_ns() + wait };
    }

    fn run_session(&mut self) {
        while let Some(session) = self.session.as_mut().filter(|_| self.stage != Stage::Closing) {
            if let Some(done) = session.poll_completion() {
                self.completed(&done);
                continue;
            }
            let Some(event) = session.poll_event() else { break };
            match event {
                SessionEvent::OpenQueue(QueueIndex(queue)) => {
                    self.sockets[usize::from(queue)].connecting = true;
                    let peer = self.paths[self.path].0;
                    let op = Op::Connect { peer, timeout_ms: CONNECT_TIMEOUT_MS };
                    self.driver.submit(op, Token::new(u64::from(queue)));
                }
                SessionEvent::Ready(_) => {
                    // A process that was started again meanwhile is not the one that was asked for.
                    if self.shared.tenure(self.paths[self.path].1) == self.tenure {
                        self.stage = Stage::Ready;
                    } else {
                        self.fail();
                    }
                }
                SessionEvent::Failed(_) => self.fail(),
            }
        }
        if std::mem::take(&mut self.failover) {
            self.fail();
        }
        self.finish_close();
        let now = self.driver.now_ns();
        while self.stage == Stage::Ready && self.wants_more() && self.next_ns <= now {
            let free = self.session.as_ref().map_or(0, |session| session.free_slots(IO));
            if free == 0 || !self.start_request() {
                self.next_ns = now + MS;
                break;
            }
            let gap = if self.reads_all() { 1 } else { self.work.gap_ns };
            self.next_ns = now + self.rng.below(gap);
        }
    }

    fn flush(&mut self) {
        let Some(session) = self.session.as_mut().filter(|_| self.stage != Stage::Closing) else {
            return;
        };
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

    // ---- the work

    fn choose(&mut self) -> (IoOp, u64, u64) {
        let volume = self.shared.blocks;
        if self.reads_all() {
            let lba = self.verify;
            let blocks = MAX_BLOCKS.min(volume - lba);
            self.verify += blocks;
            return (IoOp::Read, lba, blocks);
        }
        let rng = &mut self.rng;
        let fua = rng.chance(150);
        let op = if rng.chance(self.work.reads_per_mille) {
            IoOp::Read
        } else {
            match rng.below(20) {
                0 | 1 => return (IoOp::Flush, 0, 0),
                2 => IoOp::Discard,
                3 => IoOp::WriteZeroes { fua, unmap: rng.chance(500) },
                _ => IoOp::Write { fua },
            }
        };
        if op == IoOp::Discard && rng.chance(200) {
            let extent = rng.below(volume / EXTENT_BLOCKS);
            return (op, extent * EXTENT_BLOCKS, EXTENT_BLOCKS);
        }
        let blocks = if rng.chance(700) { 1 } else { 1 + rng.below(MAX_BLOCKS) };
        let within = if rng.chance(800) { self.work.hot_blocks } else { volume };
        // The hot blocks of all hosts lie around the bound of two extents.
        let start = rng.below(within) + (EXTENT_BLOCKS - self.work.hot_blocks / 2);
        let lba = start % volume;
        (op, lba, blocks.min(volume - lba))
    }

    /// Sends a request, one that lost its path first; false where there is no room for it now.
    fn start_request(&mut self) -> bool {
        let waiting = self
            .requests
            .iter()
            .position(|r| r.as_ref().is_some_and(|request| request.attempt.is_none()));
        let tag = match waiting {
            Some(tag) => tag,
            None => {
                let Some(tag) = self.requests.iter().position(Option::is_none) else {
                    return false;
                };
                let (op, lba, blocks) = self.choose();
                let first = Instant::now();
                self.requests[tag] =
                    Some(Request { op, lba, blocks, first, attempt: None, looks: 0 });
                tag
            }
        };
        let Some(request) = &mut self.requests[tag] else { return false };
        let (op, lba, blocks) = (request.op, request.lba, request.blocks);
        let len = u32::try_from(blocks).expect("a short request") * 4096;
        let buf = if matches!(op, IoOp::Read | IoOp::Write { .. }) {
            let Some(buf) = self.driver.memory().alloc(len) else { return false };
            Some(buf)
        } else {
            None
        };
        let window = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        let mut volume = self.shared.volumes[self.volume].lock();
        let history = &mut volume.history;
        let mut value = 0;
        let invoked = match op {
            IoOp::Write { fua } => {
                value = history.fresh_value();
                let bytes = self.driver.memory().bytes_mut(window);
                for (lba, block) in (lba..).zip(bytes.chunks_mut(PAGE)) {
                    history.encode(lba, value, block);
                }
                history.write_began((lba, blocks), value, (self.id, 1), fua)
            }
            IoOp::WriteZeroes { fua, .. } => {
                history.write_began((lba, blocks), 0, (self.id, 1), fua)
            }
            IoOp::Discard => history.write_began((lba, blocks), 0, (self.id, 1), false),
            _ => self.snapshot.unwrap_or_else(|| history.tick()),
        };
        volume.under_way.insert(invoked);
        drop(volume);
        let range = LbaRange::new(Lba(lba), blocks).expect("inside the volume");
        let session = self.session.as_mut().expect("the session is ready");
        let tag32 = u32::try_from(tag).expect("a small depth");
        let submit = Submit::Io(IoRequest { op, range, buf: window });
        let taken = session.submit(IO, tag32, submit, self.driver.memory());
        let (sent, began) = (Instant::now(), SystemTime::now());
        request.attempt = Some(Attempt { invoked, value, sent, began, buf });
        if taken.is_err() {
            self.path_lost(tag);
            self.failover = true;
            return false;
        }
        true
    }

    fn did(&self, change: impl FnOnce(&mut Did)) {
        change(&mut self.shared.did.lock());
    }

    /// Takes an attempt back, and writes down how it ended.
    fn end_attempt(&mut self, tag: usize, outcome: Outcome) -> Option<Io> {
        let request = self.requests[tag].as_mut()?;
        let attempt = request.attempt.take()?;
        let mut io = Io {
            began: attempt.began,
            ended: SystemTime::now(),
            host: self.number,
            node: self.tenure.node,
            op: request.op,
            lba: request.lba,
            blocks: request.blocks,
            invoked: attempt.invoked,
            value: attempt.value,
            seen: Vec::new(),
            outcome,
        };
        let mut volume = self.shared.volumes[self.volume].lock();
        if self.snapshot.is_none() {
            volume.under_way.remove(&io.invoked);
        } else if io.outcome == Outcome::Done {
            self.read += io.blocks;
        }
        let read = io.op == IoOp::Read && io.outcome == Outcome::Done;
        let word = |page: &[u8]| page.first_chunk().map_or(0, |w| u64::from_le_bytes(*w));
        let (lba, blocks, invoked) = (io.lba, io.blocks, io.invoked);
        let bytes = match &attempt.buf {
            Some(buf) if read => self.driver.memory().bytes(buf.slice()).to_vec(),
            _ => Vec::new(),
        };
        io.seen = bytes.chunks(PAGE).map(word).collect();
        volume.requests.push(io.clone());
        match (&io.outcome, io.op.is_mutation()) {
            (Outcome::Done, true) => volume.history.write_acked(lba, blocks, invoked),
            (Outcome::Done, false) if io.op == IoOp::Flush => {
                volume.history.flush_acked(self.id, invoked)
            }
            (Outcome::Done, false) => volume.history.read_ended(lba, &bytes, invoked),
            (Outcome::Unknown, true) => volume.lost_path(lba, blocks, invoked, self.tenure),
            (Outcome::Failed(why), true) if why.contains("Capacity") => {
                volume.history.write_found_no_space(lba, blocks, invoked);
            }
            (Outcome::Failed(_), true) => volume.history.write_failed(lba, blocks, invoked),
            (_, false) => {}
        }
        drop(volume);
        if let Some(buf) = attempt.buf {
            self.driver.memory().release(buf);
        }
        Some(io)
    }

    fn path_lost(&mut self, tag: usize) {
        self.did(|did| did.retries += 1);
        self.end_attempt(tag, Outcome::Unknown);
        let look = self.rng.chance(500);
        if let Some(request) = &mut self.requests[tag]
            && request.op.is_mutation()
            && look
        {
            // Made again it would hide what it left different.
            request.op = IoOp::Read;
            request.blocks = request.blocks.min(MAX_BLOCKS);
            request.looks = LOOKS;
        }
    }

    fn completed(&mut self, done: &Completed) {
        let tag = done.tag as usize;
        if matches!(done.io_status, IoStatus::NotReady | IoStatus::PathError) {
            self.path_lost(tag);
            self.failover = true;
            return;
        }
        let outcome = match done.io_status {
            IoStatus::Ok => Outcome::Done,
            IoStatus::NoSpace => Outcome::Failed("Capacity Exceeded".to_owned()),
            _ => Outcome::Failed(done.status.to_string()),
        };
        let failed = outcome != Outcome::Done;
        let Some(io) = self.end_attempt(tag, outcome) else { return };
        let verifies = self.shared.phase() == Phase::Verify;
        if failed && verifies {
            // Everything is well by now: it is read until it can be.
            self.next_ns = self.driver.now_ns() + 50 * MS;
            return;
        }
        let Some(mut request) = self.requests[tag].take() else { return };
        let took = request.first.elapsed();
        if !failed && request.looks > 0 {
            (request.looks, request.first) = (request.looks - 1, Instant::now());
            self.requests[tag] = Some(request);
        }
        self.did(|did| {
            did.longest = did.longest.max(took);
            did.errors += u64::from(failed);
            match io.op {
                IoOp::Read => did.reads += 1,
                IoOp::Flush => did.flushes += 1,
                IoOp::Write { .. } => did.writes += 1,
                _ => did.trims += 1,
            }
        });
    }
}
