//! A host: the project's own initiator over a [`SimDriver`], and the work that it does.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;

use cairn_block::{Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, VolumeId};
use cairn_engine::nvmf::initiator::{
    Completed, QueueIndex, Session, SessionConfig, SessionEvent, Submit,
};
use cairn_engine::reactor::{Completion, Driver, Op, SocketId, Token};

use crate::checks::{Check, check};
use crate::cluster::Changed;
use crate::disk::PAGE;
use crate::driver::SimDriver;
use crate::history::History;
use crate::initiator::{Reserved, check_reserved};
use crate::rng::{Rng, mix};
use crate::world::{MS, NodeId};

const IO: QueueIndex = QueueIndex(1);
const SEND_WINDOWS: usize = 128;
const CONNECT_TIMEOUT_MS: u32 = 500;
/// The longest data transfer, in blocks.
const MAX_BLOCKS: u64 = 16;
/// Blocks of a pool's extent: a discard that covers one gives it back.
const EXTENT_BLOCKS: u64 = 256;
/// A prime: from block to block where each is met once.
const STEP: u64 = 389;

/// What a host does.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Requests outstanding at most.
    pub depth: usize,
    /// The longest pause between two requests, in nanoseconds.
    pub gap_ns: u64,
    /// Blocks that get most of the requests.
    pub hot_blocks: u64,
    /// Requests to make.
    pub requests: u64,
    /// Of a thousand requests so many are reads.
    pub reads_per_mille: u64,
    /// Of a thousand writes of several blocks so many are to be done whole or not at all.
    pub atomic_per_mille: u64,
    /// Keep-alive timeout in milliseconds.
    pub kato_ms: u32,
    /// Header and data digests.
    pub digests: bool,
}

impl Default for Workload {
    /// Some requests to few blocks.
    fn default() -> Self {
        Self {
            depth: 8,
            gap_ns: 0,
            hot_blocks: 64,
            requests: 100,
            reads_per_mille: 300,
            atomic_per_mille: 0,
            kato_ms: 5_000,
            digests: false,
        }
    }
}

/// What a host does for a while in place of its workload.
#[derive(Debug, Clone, Copy)]
pub struct Orders {
    /// Requests to make.
    pub requests: u64,
    /// Requests outstanding at most, where the workload has so many.
    pub depth: usize,
    /// The longest pause between two requests, in nanoseconds.
    pub gap_ns: u64,
    /// Of a thousand requests so many are reads,
    pub reads_per_mille: u64,
    /// and of the others so many are flushes.
    pub flushes_per_mille: u64,
    /// Of a thousand writes so many are durable when they are answered.
    pub fua_per_mille: u64,
    /// Which blocks.
    pub aim: Aim,
}

/// Which blocks a host goes for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// So many from this one on, again and again, a few at once.
    Within(u64, u64),
    /// So many from this one on, each once before any is met twice.
    Each(u64, u64),
    /// Whole extents are discarded, parts of them are written and zeroed.
    Extents,
    /// Whole extents are discarded, and nothing else is done.
    Discards,
    /// All of them in order, as many at once as can be.
    Sweep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle { retry_at: u64 },
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Work,
    /// Read every block; the next one.
    Verify(u64),
}

#[derive(Debug)]
struct Request {
    op: IoOp,
    /// It is to be done whole or not at all.
    atomic: bool,
    lba: u64,
    blocks: u64,
    invoked: u64,
    buf: Option<Buf>,
    /// When it was sent.
    sent_ns: u64,
}

/// The epoch that each volume is served in by each of the machines.
pub type Serving = Rc<RefCell<BTreeMap<(VolumeId, usize), u64>>>;

/// A host with one volume.
#[derive(Debug)]
pub struct Client {
    driver: SimDriver,
    /// The paths to the volume, and the one in use.
    peers: Vec<(SocketAddr, usize)>,
    path: usize,
    serving: (Serving, VolumeId),
    /// Of the nexus that it is connected to.
    epoch: u64,
    /// Where connections stay while the volume changes hands: who acked what last. What is sent may be done in any
    /// epoch from then on.
    changed: Option<Changed>,
    /// Who has the volume to itself.
    reserved: Reserved,
    nqn: String,
    number: u128,
    work: Workload,
    goal: Goal,
    rng: Rng,
    history: Rc<RefCell<History>>,
    stage: Stage,
    session: Option<Session>,
    sockets: [Socket; 2],
    requests: Vec<Option<Request>>,
    left: u64,
    orders: Option<Orders>,
    /// Requests that were made by orders.
    ordered: u64,
    next_at: u64,
    completions: Vec<Completion>,
    windows: Vec<BufSlice>,
    /// The nexus does not serve: another may.
    failover: bool,
    /// Requests that were answered with an error.
    pub errors: u64,
}

impl Client {
    /// A host that connects to a volume and works on it.
    #[must_use]
    pub fn new(
        driver: SimDriver,
        peers: Vec<(SocketAddr, usize)>,
        nqn: &str,
        work: Workload,
        rng: Rng,
        history: Rc<RefCell<History>>,
        serving: (Serving, VolumeId),
    ) -> Self {
        let number = driver.node().0 as u128;
        Self {
            driver,
            peers,
            path: 0,
            serving,
            epoch: 0,
            changed: None,
            reserved: Reserved::default(),
            nqn: nqn.to_owned(),
            number,
            left: work.requests,
            requests: (0..work.depth).map(|_| None).collect(),
            work,
            goal: Goal::Work,
            rng,
            history,
            stage: Stage::Idle { retry_at: 0 },
            session: None,
            sockets: [Socket::default(); 2],
            orders: None,
            ordered: 0,
            next_at: 0,
            completions: Vec::new(),
            windows: Vec::with_capacity(SEND_WINDOWS),
            failover: false,
            errors: 0,
        }
    }

    /// Connections stay while the volume changes hands.
    pub fn roles_change(&mut self, changed: Changed) {
        self.changed = Some(changed);
        self.epoch = u64::MAX;
    }

    /// Others may have the volume to themselves.
    pub fn respect(&mut self, reserved: Reserved) {
        self.reserved = reserved;
    }

    /// No change is acked by a nexus which was asked for it when a later one had acked another.
    fn check_acked(&self, request: &Request) {
        let Some(changed) = &self.changed else { return };
        let volume = self.serving.1;
        let Some((newest, at_ns)) = changed.borrow().get(&volume).copied() else { return };
        let here = (volume, self.peers[self.path].1);
        let serves = self.serving.0.borrow().get(&here).copied().unwrap_or(0);
        check!(
            Check::OneAtATime,
            serves >= newest || request.sent_ns <= at_ns,
            "volume {volume}: the machine of epoch {serves:#x} acks {:?} of block {}, sent at {} ns, and one of \
             epoch {newest:#x} has acked changes since {at_ns} ns",
            request.op,
            request.lba,
            request.sent_ns
        );
    }

    /// Which process this is.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.driver.node()
    }

    /// Whether all requests were made and answered.
    #[must_use]
    pub fn is_done(&self) -> bool {
        let over = match self.goal {
            Goal::Work => self.left == 0,
            Goal::Verify(next) => next >= self.history.borrow().blocks(),
        };
        over && self.requests.iter().all(Option::is_none)
    }

    /// From now on does this, and then nothing.
    pub fn order(&mut self, orders: Orders) {
        self.left = orders.requests;
        self.orders = Some(orders);
        self.next_at = self.driver.now_ns();
    }

    /// Goes to the next path, as where somebody has said that the volume has moved.
    pub fn move_on(&mut self) {
        self.fail();
        self.finish_close();
    }

    /// From now on reads every block once.
    pub fn verify(&mut self) {
        self.left = 0;
        self.goal = Goal::Verify(0);
    }

    /// From now on makes so many requests more.
    pub fn work_more(&mut self, requests: u64) {
        self.left = requests;
        self.goal = Goal::Work;
    }

    /// One turn: takes what came, acts, and tells the world when to come again.
    pub fn turn(&mut self) {
        let deadline = self.deadline();
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, deadline);
        for completion in completions.drain(..) {
            self.handle(completion);
        }
        self.completions = completions;
        let now = self.now_ms();
        if let Stage::Idle { retry_at } = self.stage
            && self.driver.now_ns() >= retry_at
        {
            self.open();
        }
        if let Some(session) = self.session.as_mut().filter(|_| self.stage != Stage::Closing) {
            session.handle_timeout(now, self.driver.memory());
        }
        self.run();
        self.flush();
    }

    fn deadline(&self) -> Option<u64> {
        if let Stage::Idle { retry_at } = self.stage {
            return Some(retry_at);
        }
        let timer = self.session.as_ref().filter(|_| self.stage != Stage::Closing);
        let timer = timer.and_then(Session::poll_timeout).map(|ms| ms * MS);
        let next = (self.stage == Stage::Ready && self.wants_more()).then_some(self.next_at);
        match (timer, next) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn wants_more(&self) -> bool {
        let more = match self.goal {
            Goal::Work => self.left > 0,
            Goal::Verify(next) => next < self.history.borrow().blocks(),
        };
        let most = match self.goal {
            Goal::Work => self.orders.map_or(usize::MAX, |orders| orders.depth),
            // So that what many hosts have read does not fill the memory of a nexus.
            Goal::Verify(_) => self.orders.map_or(usize::MAX, |_| 8),
        };
        let busy = self.requests.iter().flatten().count();
        more && busy < self.requests.len().min(most)
    }

    fn now_ms(&self) -> u64 {
        self.driver.now_ns() / MS
    }

    // ---- the connection

    fn open(&mut self) {
        let config = SessionConfig {
            hostnqn: format!("nqn.2026-11.io.cairn:host:{}", self.number),
            hostid: self.number,
            subnqn: self.nqn.clone(),
            kato_ms: self.work.kato_ms,
            io_queues: 1,
            queue_entries: 64,
            header_digest: self.work.digests,
            data_digest: self.work.digests,
        };
        self.session = Session::new(config, self.driver.memory());
        assert!(self.session.is_some(), "the host has no memory for a session");
        self.stage = Stage::Connecting;
    }

    fn handle(&mut self, completion: Completion) {
        let queue_of = |token: Token| u16::try_from(token.value()).expect("a queue number");
        let now = self.now_ms();
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
            Completion::Disk { .. } | Completion::Accepted { .. } | Completion::Woken => {
                unreachable!("a host has neither disk nor listener")
            }
        }
        self.finish_close();
    }

    fn fail(&mut self) {
        if matches!(self.stage, Stage::Idle { .. } | Stage::Closing) {
            return;
        }
        self.stage = Stage::Closing;
        self.path = (self.path + 1) % self.peers.len();
        for (queue, socket) in (0u64..).zip(&self.sockets) {
            if let Some(id) = socket.id {
                self.driver.submit(Op::Close { socket: id }, Token::new(queue));
            }
        }
    }

    fn finish_close(&mut self) {
        let open = self.sockets.iter().any(|s| s.id.is_some() || s.connecting);
        if self.stage != Stage::Closing || open {
            return;
        }
        if let Some(mut session) = self.session.take() {
            session.fail();
            while let Some(done) = session.poll_completion() {
                self.completed(&done);
            }
            while let Some(tag) = session.poll_abandoned() {
                // Whether it was done is not known: it stays open in the history.
                self.drop_request(tag);
            }
            session.close(self.driver.memory());
        }
        self.sockets = [Socket::default(); 2];
        let wait = (5 + self.rng.below(100)) * MS;
        self.stage = Stage::Idle { retry_at: self.driver.now_ns() + wait };
    }

    fn run(&mut self) {
        while let Some(session) = self.session.as_mut().filter(|_| self.stage != Stage::Closing) {
            if let Some(done) = session.poll_completion() {
                self.completed(&done);
                continue;
            }
            let Some(event) = session.poll_event() else { break };
            match event {
                SessionEvent::OpenQueue(QueueIndex(queue)) => {
                    self.sockets[usize::from(queue)].connecting = true;
                    let op = Op::Connect {
                        peer: self.peers[self.path].0,
                        timeout_ms: CONNECT_TIMEOUT_MS,
                    };
                    self.driver.submit(op, Token::new(u64::from(queue)));
                }
                SessionEvent::Ready(_) => {
                    self.stage = Stage::Ready;
                    let at = (self.serving.1, self.peers[self.path].1);
                    let epoch = self.serving.0.borrow().get(&at).copied().unwrap_or(0);
                    self.history.borrow_mut().epoch_serves(epoch);
                    self.epoch = if self.changed.is_some() { u64::MAX } else { epoch };
                }
                SessionEvent::Failed(_) => self.fail(),
            }
        }
        if std::mem::take(&mut self.failover) {
            self.fail();
        }
        self.finish_close();
        let now = self.driver.now_ns();
        while self.stage == Stage::Ready && self.wants_more() && self.next_at <= now {
            let free = self.session.as_ref().map_or(0, |session| session.free_slots(IO));
            if free == 0 || !self.start_request() {
                // Something is in flight whose end brings us here again.
                self.next_at = now + MS;
                break;
            }
            let gap_ns = self.orders.map_or(self.work.gap_ns, |orders| orders.gap_ns);
            self.next_at = now + self.rng.below(gap_ns.max(1));
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

    /// What to do next: an operation and its range.
    fn choose(&mut self) -> (IoOp, u64, u64) {
        let volume = self.history.borrow().blocks();
        if let Goal::Verify(next) = self.goal {
            return (IoOp::Read, next, self.readable_together(next, MAX_BLOCKS.min(volume - next)));
        }
        if let Some(orders) = self.orders {
            return self.choose_by(&orders, volume);
        }
        let rng = &mut self.rng;
        let op = if rng.chance(self.work.reads_per_mille) {
            IoOp::Read
        } else {
            let fua = rng.chance(100);
            match rng.below(20) {
                0 => IoOp::Flush,
                1 => IoOp::Discard,
                2 => IoOp::WriteZeroes { fua, unmap: rng.chance(500) },
                _ => IoOp::Write { fua },
            }
        };
        if op == IoOp::Flush {
            return (op, 0, 0);
        }
        if op == IoOp::Discard && rng.chance(200) {
            let extent = rng.below(volume / EXTENT_BLOCKS);
            return (op, extent * EXTENT_BLOCKS, EXTENT_BLOCKS);
        }
        let blocks = if rng.chance(600) { 1 } else { 1 + rng.below(MAX_BLOCKS) };
        let within = if rng.chance(800) { self.work.hot_blocks.min(volume) } else { volume };
        // The hot blocks lie around the bound of two extents.
        let start = rng.below(within) + (EXTENT_BLOCKS - self.work.hot_blocks / 2);
        let lba = start % volume;
        (op, lba, blocks.min(volume - lba))
    }

    /// How many blocks are read at once: one that may not be readable alone.
    fn readable_together(&self, first: u64, blocks: u64) -> u64 {
        let history = self.history.borrow();
        let bad = (first..first + blocks).find(|&lba| history.may_be_unreadable(lba));
        bad.map_or(blocks, |lba| (lba - first).max(1))
    }

    /// The same, by orders.
    fn choose_by(&mut self, orders: &Orders, volume: u64) -> (IoOp, u64, u64) {
        self.ordered += 1;
        let (rng, turn) = (&mut self.rng, self.ordered);
        let fua = rng.chance(orders.fua_per_mille);
        let op = if rng.chance(orders.reads_per_mille) {
            IoOp::Read
        } else if rng.chance(orders.flushes_per_mille) {
            return (IoOp::Flush, 0, 0);
        } else {
            IoOp::Write { fua }
        };
        let (lba, blocks) = match orders.aim {
            // What is sent at once overtakes what is asked for first.
            Aim::Within(first, blocks) => {
                let most = [1, 1, 4, MAX_BLOCKS][rng.index(4)];
                (first + rng.below(blocks), 1 + rng.below(most))
            }
            // A step that has no divisor in common with any range comes by everything.
            Aim::Each(first, blocks) => (first + turn * STEP % blocks, 1),
            Aim::Sweep => (turn * MAX_BLOCKS % volume, MAX_BLOCKS),
            Aim::Discards => {
                let first = rng.below(volume / EXTENT_BLOCKS) * EXTENT_BLOCKS;
                return (IoOp::Discard, first, EXTENT_BLOCKS);
            }
            Aim::Extents => {
                let first = rng.below(volume / EXTENT_BLOCKS) * EXTENT_BLOCKS;
                let lba = first + rng.below(EXTENT_BLOCKS);
                match (op, rng.below(10)) {
                    (IoOp::Read, _) => (lba, 1 + rng.below(MAX_BLOCKS)),
                    (_, 0..=2) => return (IoOp::Discard, first, EXTENT_BLOCKS),
                    (_, 3) => {
                        let unmap = rng.chance(500);
                        let blocks = 1 + rng.below(volume - lba).min(EXTENT_BLOCKS);
                        return (IoOp::WriteZeroes { fua, unmap }, lba, blocks.min(volume - lba));
                    }
                    (_, 4) => (lba, MAX_BLOCKS),
                    _ => (lba, 1 + rng.below(3)),
                }
            }
        };
        let lba = lba % volume;
        (op, lba, blocks.min(volume - lba))
    }

    /// Submits a request; false where there is no room for it now.
    fn start_request(&mut self) -> bool {
        let (op, lba, blocks) = self.choose();
        let has_data = matches!(op, IoOp::Read | IoOp::Write { .. });
        let len = u32::try_from(blocks).expect("a short request") * 4096;
        let buf = if has_data {
            let Some(buf) = self.driver.memory().alloc(len) else { return false };
            Some(buf)
        } else {
            None
        };
        let Some(tag) = self.requests.iter().position(Option::is_none) else { return false };
        let window = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        let mut history = self.history.borrow_mut();
        let (mut op, mut atomic) = (op, false);
        let invoked = match op {
            IoOp::Write { .. } => {
                let value = history.fresh_value();
                // Not drawn: nothing else changes with it.
                atomic = blocks > 1 && mix(value) % 1000 < self.work.atomic_per_mille;
                if atomic {
                    // It is durable once it is acked.
                    op = IoOp::Write { fua: true };
                }
                let bytes = self.driver.memory().bytes_mut(window);
                for (lba, block) in (lba..).zip(bytes.chunks_mut(PAGE)) {
                    history.encode(lba, value, block);
                }
                let whose = (self.number, self.epoch);
                let invoked = history.write_began((lba, blocks), value, whose, is_durable(op));
                if atomic {
                    history.whole_began((lba, blocks), value, self.epoch, invoked);
                }
                invoked
            }
            IoOp::WriteZeroes { .. } | IoOp::Discard => {
                history.write_began((lba, blocks), 0, (self.number, self.epoch), is_durable(op))
            }
            IoOp::Read | IoOp::Flush | IoOp::Verify | IoOp::Snapshot(_) => history.tick(),
        };
        drop(history);
        let range = LbaRange::new(Lba(lba), blocks).expect("inside the volume");
        let request = IoRequest { op, range, buf: window };
        let sent_ns = self.driver.now_ns();
        let session = self.session.as_mut().expect("the session is ready");
        let tag32 = u32::try_from(tag).expect("a small depth");
        let submit = if atomic { Submit::Atomic(request) } else { Submit::Io(request) };
        let taken = session.submit(IO, tag32, submit, self.driver.memory());
        self.requests[tag] = Some(Request { op, atomic, lba, blocks, invoked, buf, sent_ns });
        if taken.is_err() {
            // Nothing was sent: as good as an error that changed nothing.
            if op.is_mutation() {
                self.history.borrow_mut().write_failed(lba, blocks, invoked);
                self.history.borrow_mut().whole_ended(invoked, None);
            }
            self.drop_request(tag32);
            return false;
        }
        match &mut self.goal {
            Goal::Work => self.left -= 1,
            Goal::Verify(next) => *next += blocks,
        }
        true
    }

    fn drop_request(&mut self, tag: u32) {
        let Some(request) = self.requests[tag as usize].take() else { return };
        self.again(&request, None);
        if let Some(buf) = request.buf {
            self.driver.memory().release(buf);
        }
    }

    /// A block of the last check that was not read is read again.
    fn again(&mut self, request: &Request, status: Option<IoStatus>) {
        let unreadable = status == Some(IoStatus::MediaError)
            && request.blocks == 1
            && self.history.borrow().may_be_unreadable(request.lba);
        if let Goal::Verify(next) = &mut self.goal
            && request.op == IoOp::Read
            && !unreadable
        {
            *next = (*next).min(request.lba);
        }
    }

    fn completed(&mut self, done: &Completed) {
        let Some(request) = self.requests[done.tag as usize].take() else {
            panic!("request {} was answered twice", done.tag);
        };
        let (lba, blocks, invoked) = (request.lba, request.blocks, request.invoked);
        let ok = done.io_status.is_ok();
        // Where the session fails the path is the next one's already.
        if ok && self.stage != Stage::Closing {
            self.check_acked(&request);
        }
        if ok && request.op.is_mutation() {
            let what = format_args!("{:?} of block {lba}", request.op);
            check_reserved(*self.reserved.borrow(), request.sent_ns, what);
        }
        let mut history = self.history.borrow_mut();
        if ok {
            history.answered(self.epoch, invoked);
        }
        let unsaid = matches!(done.io_status, IoStatus::NotReady | IoStatus::PathError);
        if request.atomic && !unsaid {
            let known = ok || done.io_status == IoStatus::NoSpace;
            history.whole_ended(invoked, known.then_some(ok));
        }
        match (request.op.is_mutation(), ok) {
            // It may have been done, until the next nexus serves.
            (true, false) if unsaid => {}
            (true, true) => history.write_acked(lba, blocks, invoked),
            (true, false) if done.io_status == IoStatus::NoSpace => {
                history.write_found_no_space(lba, blocks, invoked);
            }
            (true, false) => history.write_failed(lba, blocks, invoked),
            (false, true) if request.op == IoOp::Flush => history.flush_acked(self.number, invoked),
            (false, false) if request.op == IoOp::Flush && !unsaid => {
                history.flush_failed(self.number, invoked);
            }
            (false, true) => {
                if let (IoOp::Read, Some(buf)) = (request.op, &request.buf) {
                    let bytes = self.driver.memory().bytes(buf.slice());
                    history.read_ended(lba, bytes, invoked);
                }
            }
            (false, false) => {}
        }
        drop(history);
        if unsaid && self.peers.len() > 1 {
            self.failover = true;
        }
        if !ok {
            self.errors += 1;
            self.again(&request, Some(done.io_status));
            self.next_at = self.driver.now_ns() + self.rng.below(20 * MS);
        }
        if let Some(buf) = request.buf {
            self.driver.memory().release(buf);
        }
    }
}

/// Whether an ack of it means that it is durable.
fn is_durable(op: IoOp) -> bool {
    matches!(op, IoOp::Write { fua: true } | IoOp::WriteZeroes { fua: true, .. })
}
