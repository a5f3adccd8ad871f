//! The world that every node shares: the clock, the queue of what happens next, disks, and the trace.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::net::SocketAddr;

use cairn_block::BufSlice;
use cairn_engine::reactor::{DiskFault, EndReason, SocketFault, SocketId, Token};

use crate::checks::{Check, check};
use crate::disk::{PAGE, Page, SimDisk};
use crate::net::{Net, NetEvent};
use crate::rng::{Rng, mix};

/// A process. The number is never used again: a restarted process is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// A disk of the world; outlives the processes that use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskRef(pub usize);

/// A machine: partitions separate machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Machine(pub usize);

/// Bytes of a receive buffer.
pub(crate) const CHUNK: usize = 8192;
/// Receive buffers of a node.
pub(crate) const CHUNKS: u16 = 24;
/// Of these, for connections that a node made itself.
pub(crate) const CHUNKS_OF_CONNECTED: usize = 8;

/// Microseconds in nanoseconds.
pub(crate) const US: u64 = 1_000;
/// Milliseconds in nanoseconds.
pub const MS: u64 = 1_000_000;

/// What waits for a node's next poll.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Inbox {
    Disk { op: usize },
    Accepted { token: Token, socket: SocketId },
    Connected { token: Token, result: Result<SocketId, SocketFault> },
    Received { socket: SocketId, token: Token, chunk: u16, len: usize },
    ReceiveEnded { socket: SocketId, token: Token, reason: EndReason },
    Sent { socket: SocketId, token: Token, result: Result<(), SocketFault> },
    Closed { token: Token },
    Woken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Wake(NodeId),
    Timer(NodeId),
    Resume(NodeId),
    Disk { op: usize, serial: u64 },
    Net(NetEvent),
}

/// A disk operation in flight.
#[derive(Debug)]
pub(crate) struct DiskOp {
    pub(crate) serial: u64,
    pub(crate) node: NodeId,
    pub(crate) disk: usize,
    pub(crate) token: Token,
    pub(crate) work: DiskWork,
    pub(crate) result: Result<(), DiskFault>,
}

#[derive(Debug)]
pub(crate) enum DiskWork {
    Read { page: u64, buf: BufSlice, data: Vec<Page> },
    Write { page: u64, buf: BufSlice, data: Vec<Page>, fua: bool },
    Flush { mark: u64 },
    Zero { page: u64, pages: u64 },
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) machine: Machine,
    pub(crate) alive: bool,
    pub(crate) inbox: VecDeque<Inbox>,
    /// Until when the last poll was willing to wait.
    pub(crate) deadline: Option<u64>,
    /// It is stopped until then: what comes for it waits.
    paused_until: u64,
    wake_scheduled: bool,
    timer_at: Option<u64>,
    /// Where received bytes wait for the node's poll, a buffer for each chunk.
    pub(crate) staging: Vec<Vec<u8>>,
    pub(crate) free_chunks: Vec<u16>,
}

/// Takes the lines of a trace.
pub type Sink = Box<dyn FnMut(u64, fmt::Arguments<'_>)>;

/// Everything that nodes share.
pub struct World {
    pub(crate) now: u64,
    pub(crate) rng: Rng,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    next_event: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) disks: Vec<SimDisk>,
    pub(crate) disk_ops: Vec<Option<DiskOp>>,
    free_ops: Vec<usize>,
    /// Disks that have lost what was not flushed, by a flush that failed.
    forgot: Vec<usize>,
    next_op: u64,
    pub(crate) net: Net,
    hash: u64,
    steps: u64,
    sink: Option<Sink>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("now", &self.now).finish_non_exhaustive()
    }
}

impl World {
    /// An empty world in which chance is ruled by `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            // Not zero, as a clock of a machine that has been up for a while is not.
            now: 1_000 * MS,
            rng: Rng::new(seed),
            events: BinaryHeap::new(),
            next_event: 0,
            nodes: Vec::new(),
            disks: Vec::new(),
            disk_ops: Vec::new(),
            free_ops: Vec::new(),
            forgot: Vec::new(),
            next_op: 0,
            net: Net::default(),
            hash: mix(seed),
            steps: 0,
            sink: None,
        }
    }

    /// Sends a line for each event to `sink`.
    pub fn trace_to(&mut self, sink: Sink) {
        self.sink = Some(sink);
    }

    /// Nanoseconds of the virtual clock.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now
    }

    /// A number that stands for all that has happened: equal runs have equal numbers.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.hash
    }

    /// Events that have happened.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Chance, for whoever sets up faults.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    pub(crate) fn note(&mut self, what: u64, a: u64, b: u64) {
        self.hash = mix(self.hash ^ mix(what ^ self.now).wrapping_add(mix(a) ^ b));
    }

    /// Writes a line to the trace.
    pub fn say(&mut self, line: fmt::Arguments<'_>) {
        if let Some(sink) = self.sink.as_mut() {
            sink(self.now, line);
        }
    }

    /// Adds a disk of `len` bytes.
    pub fn add_disk(&mut self, len: u64) -> DiskRef {
        self.disks.push(SimDisk::new(len));
        DiskRef(self.disks.len() - 1)
    }

    /// A disk, to look at it or to hurt it.
    pub fn disk(&mut self, disk: DiskRef) -> &mut SimDisk {
        &mut self.disks[disk.0]
    }

    pub(crate) fn add_node(&mut self, machine: Machine) -> NodeId {
        self.nodes.push(Node {
            machine,
            alive: true,
            inbox: VecDeque::with_capacity(64),
            deadline: None,
            paused_until: 0,
            wake_scheduled: false,
            timer_at: None,
            staging: (0..CHUNKS).map(|_| Vec::with_capacity(CHUNK)).collect(),
            free_chunks: (0..CHUNKS).collect(),
        });
        NodeId(self.nodes.len() - 1)
    }

    fn at(&mut self, time: u64, event: Event) {
        self.next_event += 1;
        self.events.push(Reverse((time, self.next_event, event)));
    }

    pub(crate) fn net_at(&mut self, time: u64, event: NetEvent) {
        self.at(time, Event::Net(event));
    }

    /// Puts something in a node's inbox; the node runs soon.
    pub(crate) fn deliver(&mut self, node: NodeId, item: Inbox) {
        let target = &mut self.nodes[node.0];
        if !target.alive {
            return;
        }
        target.inbox.push_back(item);
        if !target.wake_scheduled {
            target.wake_scheduled = true;
            let delay =
                if self.rng.chance(20) { self.rng.below(500 * US) } else { self.rng.below(4 * US) };
            self.at(self.now + delay, Event::Wake(node));
        }
    }

    /// A poll that found nothing waits until `deadline`.
    pub(crate) fn wait_until(&mut self, node: NodeId, deadline: Option<u64>) {
        let target = &mut self.nodes[node.0];
        target.deadline = deadline;
        if let Some(at) = deadline
            && target.timer_at.is_none_or(|timer| at < timer)
        {
            let at = at.max(self.now);
            self.nodes[node.0].timer_at = Some(at);
            self.at(at, Event::Timer(node));
        }
    }

    /// Whether a poll of the node would return at once.
    #[must_use]
    pub fn is_due(&self, node: NodeId) -> bool {
        let node = &self.nodes[node.0];
        let runs = node.alive && node.paused_until <= self.now;
        runs && (!node.inbox.is_empty() || node.deadline.is_some_and(|at| at <= self.now))
    }

    /// Lets time pass until a node has something to do, at most until `limit_ns`.
    pub fn step(&mut self, limit_ns: u64) -> Option<NodeId> {
        loop {
            match self.events.peek() {
                Some(Reverse((time, _, _))) if *time <= limit_ns => {}
                _ => {
                    self.now = self.now.max(limit_ns);
                    return None;
                }
            }
            let Reverse((time, _, event)) = self.events.pop()?;
            self.now = self.now.max(time);
            self.steps += 1;
            check!(
                Check::Liveness,
                self.steps < MAX_STEPS,
                "{MAX_STEPS} events happened by {} ms and it is not over",
                self.now / 1_000_000
            );
            let node = match event {
                Event::Wake(node) => {
                    self.nodes[node.0].wake_scheduled = false;
                    node
                }
                Event::Timer(node) => {
                    // One that an earlier one took the place of has nothing more to say.
                    if self.nodes[node.0].timer_at != Some(self.now) {
                        continue;
                    }
                    self.nodes[node.0].timer_at = None;
                    let deadline = self.nodes[node.0].deadline;
                    if deadline.is_some_and(|at| at > self.now) {
                        self.wait_until(node, deadline);
                        continue;
                    }
                    node
                }
                Event::Resume(node) => {
                    if self.is_paused(node) {
                        continue;
                    }
                    let deadline = self.nodes[node.0].deadline;
                    if !self.is_due(node) {
                        self.wait_until(node, deadline);
                        continue;
                    }
                    node
                }
                Event::Disk { op, serial } => {
                    self.disk_done(op, serial);
                    continue;
                }
                Event::Net(event) => {
                    self.net_event(event);
                    continue;
                }
            };
            if self.is_due(node) {
                self.note(1, node.0 as u64, self.nodes[node.0].inbox.len() as u64);
                return Some(node);
            }
        }
    }

    // ---- disks

    pub(crate) fn submit_disk(&mut self, node: NodeId, disk: usize, token: Token, work: DiskWork) {
        let trouble = self.disks[disk].trouble;
        let is_write = matches!(work, DiskWork::Write { .. } | DiskWork::Zero { .. });
        let fits = match &work {
            DiskWork::Read { page, buf, .. } | DiskWork::Write { page, buf, .. } => {
                self.disks[disk].holds(page * PAGE as u64, u64::from(buf.len()))
            }
            DiskWork::Zero { page, pages } => {
                self.disks[disk].holds(page * PAGE as u64, pages * PAGE as u64)
            }
            DiskWork::Flush { .. } => true,
        };
        let is_flush = matches!(work, DiskWork::Flush { .. });
        let flushes = &mut self.disks[disk].trouble.eio_flushes;
        let fails = is_flush && *flushes > 0;
        *flushes -= u32::from(fails);
        let once = &mut self.disks[disk].trouble.eio_next;
        let result = if !fits {
            Err(DiskFault::Short)
        } else if fails {
            Err(DiskFault::Errno(EIO))
        } else if *once > 0 {
            *once -= 1;
            Err(DiskFault::Errno(EIO))
        } else if self.rng.chance(trouble.eio_per_mille) {
            Err(DiskFault::Errno(EIO))
        } else if is_write && self.rng.chance(trouble.no_space_per_mille) {
            Err(DiskFault::NoSpace)
        } else {
            Ok(())
        };
        if is_write && result.is_err() {
            self.disks[disk].has_failed = true;
        }
        self.next_op += 1;
        let serial = self.next_op;
        let entry = DiskOp { serial, node, disk, token, work, result };
        let op = match self.free_ops.pop() {
            Some(op) => {
                self.disk_ops[op] = Some(entry);
                op
            }
            None => {
                self.disk_ops.push(Some(entry));
                self.disk_ops.len() - 1
            }
        };
        let quick = 10 * US + self.rng.below(100 * US);
        let latency = if self.rng.chance(15) { quick + self.rng.below(5 * MS) } else { quick };
        let start = self.now.max(trouble.hung_until_ns);
        let mut slow = self.rng.below(trouble.slow_ns.max(1));
        if self.rng.chance(trouble.late_per_mille) {
            slow += self.rng.below(trouble.late_ns.max(1));
        }
        self.at(start + latency + slow, Event::Disk { op, serial });
    }

    fn disk_done(&mut self, op: usize, serial: u64) {
        let Some(entry) = self.disk_ops[op].as_mut().filter(|o| o.serial == serial) else { return };
        let (node, result) = (entry.node, entry.result);
        let disk = &mut self.disks[entry.disk];
        match &mut entry.work {
            DiskWork::Read { page, buf, data } => {
                let pages = u64::from(buf.len()) / PAGE as u64;
                data.extend((*page..*page + pages).map(|number| disk.page(number)));
            }
            DiskWork::Write { page, data, fua, .. } => {
                let astray = disk.goes_astray(*page, &mut self.rng).filter(|_| result.is_ok());
                let page = &astray.unwrap_or(*page);
                for (number, page) in (*page..).zip(data.iter()) {
                    // A write that failed may have been done in part.
                    if result.is_ok() || self.rng.chance(300) {
                        disk.write_page(number, page.clone(), *fua && result.is_ok());
                    }
                }
            }
            DiskWork::Flush { mark } => {
                if result.is_ok() {
                    disk.flush_to(*mark);
                } else if disk.trouble.forgets {
                    disk.lose_power(&mut self.rng);
                    self.forgot.push(entry.disk);
                }
            }
            DiskWork::Zero { page, pages } => {
                for number in *page..*page + *pages {
                    if result.is_ok() || self.rng.chance(300) {
                        disk.write_page(number, None, false);
                    }
                }
            }
        }
        if result.is_err() {
            self.say(format_args!("disk of node {}: {result:?}", node.0));
        }
        self.note(2, serial, u64::from(result.is_ok()));
        self.deliver(node, Inbox::Disk { op });
    }

    pub(crate) fn take_forgotten(&mut self) -> Option<usize> {
        self.forgot.pop()
    }

    pub(crate) fn take_disk_op(&mut self, op: usize) -> DiskOp {
        self.free_ops.push(op);
        self.disk_ops[op].take().expect("an operation in flight")
    }

    /// What becomes of the operations that a dead process left at its disks: each page of a write is
    /// done or it is not.
    fn settle_disks(&mut self, node: NodeId) {
        for at in 0..self.disk_ops.len() {
            if self.disk_ops[at].as_ref().is_none_or(|op| op.node != node) {
                continue;
            }
            let entry = self.take_disk_op(at);
            let disk = &mut self.disks[entry.disk];
            match entry.work {
                DiskWork::Write { page, data, .. } => {
                    let share = self.rng.below(1001);
                    for (number, page) in (page..).zip(data) {
                        if self.rng.chance(share) {
                            disk.write_page(number, page, false);
                        }
                    }
                }
                DiskWork::Zero { page, pages } => {
                    let share = self.rng.below(1001);
                    for number in page..page + pages {
                        if self.rng.chance(share) {
                            disk.write_page(number, None, false);
                        }
                    }
                }
                DiskWork::Flush { .. } | DiskWork::Read { .. } => {}
            }
        }
    }

    // ---- nodes

    /// Kills a process as `kill -9` does: what is on its disks stays, what is at its disks may or may
    /// not get there, what its sockets hold goes out.
    pub fn kill(&mut self, node: NodeId) {
        self.say(format_args!("kill -9 node {}", node.0));
        self.note(3, node.0 as u64, 0);
        // What had completed at the device but was not yet seen is on the disk already.
        let target = &mut self.nodes[node.0];
        target.alive = false;
        let seen = std::mem::take(&mut target.inbox);
        for item in seen {
            if let Inbox::Disk { op } = item {
                self.take_disk_op(op);
            }
        }
        self.settle_disks(node);
        self.kill_sockets(node);
    }

    /// Stops a process for so long, as SIGSTOP does, or a hypervisor: it goes on with what it knew. Its disk
    /// operations end meanwhile, and it hears of that afterwards; its sockets fill up; its clock runs on.
    pub fn pause(&mut self, node: NodeId, for_ns: u64) {
        self.say(format_args!("node {} is stopped for {} ms", node.0, for_ns / MS));
        let until = self.now + for_ns;
        self.nodes[node.0].paused_until = until;
        self.at(until, Event::Resume(node));
    }

    /// Lets every stopped process go on.
    pub fn resume_all(&mut self) {
        for at in 0..self.nodes.len() {
            if self.is_paused(NodeId(at)) {
                self.nodes[at].paused_until = self.now;
                self.at(self.now, Event::Resume(NodeId(at)));
            }
        }
    }

    /// Whether a process is stopped.
    #[must_use]
    pub fn is_paused(&self, node: NodeId) -> bool {
        self.nodes[node.0].paused_until > self.now
    }

    /// The machine that a process runs on.
    pub(crate) fn machine(&self, node: NodeId) -> Machine {
        self.nodes[node.0].machine
    }

    /// Whether somebody listens there.
    #[must_use]
    pub fn is_listening(&self, address: SocketAddr) -> bool {
        self.net.listener(address).is_some()
    }
}

const EIO: i32 = 5;
/// Events in a run, before it is taken for one that does nothing but run.
const MAX_STEPS: u64 = 5_000_000;
