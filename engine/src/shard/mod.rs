//! One thread's worth of engine: everything that it serves, over one [`Driver`].
//!
//! A turn ([`Shard::turn`]) takes what completed, lets the state machines decide until nothing moves
//! any more, and then sends what has piled up on each connection as one batch.

mod commands;
mod deletions;
mod events;
mod holds;
mod hosts;
mod initiators;
mod io;
mod jobs;
mod keys;
mod leases;
mod links;
mod members;
mod moves;
mod noise;
mod pools;
mod provisioning;
mod registers;
mod reservations;
mod reserve;
mod resize;
mod restore;
mod sanitize;
mod sectors;
mod snapshots;
mod space;
mod standby;
mod stream;
mod table;
mod targets;
mod tasks;
mod upkeep;
mod volumes;
mod watch;

use std::collections::VecDeque;
use std::net::SocketAddr;

use cairn_block::{Buf, BufSlice, Memory};
use cairn_iscsi::chap::Chap;
use cairn_iscsi::target::{Target as IscsiTarget, TargetConfig as IscsiTargetConfig, TargetError};
use cairn_nvmf::target::{ConnId, NamespaceHandle, Port, Target, TargetConfig};
use cairn_reactor::{Completion, Driver, ListenerId, Op, Token};

use crate::control::{Command, EngineError, Reply};
use hosts::Host;
use initiators::Initiators;
use io::HostIo;
use jobs::Jobs;
use links::Link;
pub use moves::{FRONT, Message, Moved};
use pools::LocalPool;
pub(crate) use pools::replica_nqn;
use table::Table;
use volumes::Volume;
pub use watch::{WatchedRegister, WatchedVolume};

/// Windows in one send at most: what the driver takes.
const SEND_WINDOWS: usize = 128;
/// Completions in one turn, where what comes of them goes to hosts alone. A host that has sent 32 requests and waits
/// gets to work while three quarters of them are still worked on here; with more in a turn both sides take turns,
/// each asleep while the other works, and with fewer a send carries less than it costs. docs/performance.md has figures.
const BATCH: usize = 8;
/// Where there are replicas elsewhere: a write goes out on three connections more.
const LINKED_BATCH: usize = 128;
/// Hosts are given so long to see their I/O finished when the shard stops, in milliseconds.
const DRAIN_MS: u64 = 10_000;

/// How a shard is set up.
#[derive(Debug, Clone)]
pub struct ShardConfig {
    /// Names this process towards replicas: the host NQN of its initiators.
    pub node_nqn: String,
    /// The host identifier of its initiators.
    pub node_id: u128,
    /// Which life of the machine this is: another one after a loss of power, the same after a restart
    /// of the process alone.
    pub incarnation: u128,
    /// First of the controller ids that this process hands out; nodes that serve one subsystem
    /// must not overlap.
    pub cntlid_min: u16,
    /// Last of them.
    pub cntlid_max: u16,
    /// Keep-alive timeout towards replicas: a dead peer is noticed in about this time.
    pub replica_kato_ms: u32,
    /// Entries of each queue towards a replica.
    pub replica_queue_entries: u16,
    /// A replica that has answered fast lately is taken out before its volume's deadline, but never before so
    /// long.
    pub child_deadline_min_ms: u64,
    /// A nexus answers reads for so long after it has asked its voters for a lease; and a replica that has
    /// just been opened takes it that it had granted one as long. All nodes are to have the same.
    pub lease_ms: u64,
    /// Tells this node from others, where no two processes can say the same at once and no process that said
    /// it before is alive; 0 where that is not sure. A volume that was served by this node before is taken
    /// up again without waiting for its own lease.
    pub holder: u128,
    /// Header digests towards replicas.
    pub replica_header_digest: bool,
    /// Data digests towards replicas.
    pub replica_data_digest: bool,
    /// Host requests in flight on one volume; more wait.
    pub volume_requests: u16,
    /// How long assembly waits for the rest of the replicas once a majority is there.
    pub assembly_wait_ms: u64,
    /// How many times its size may be promised of a pool to the replicas in it; 0: any.
    pub overcommit: u32,
    /// How often nexuses do what nobody asks for, and how fast.
    pub pace: cairn_nexus::Pace,
    /// A volume that is being overwritten is at most so fast, in MiB a second; 0: as fast as it can.
    pub sanitize_mib_s: u32,
    /// Which shard of its process it is. The first one listens for all.
    pub shard: u16,
    /// How many there are.
    pub shards: u16,
    /// What initiators of iSCSI meet.
    pub iscsi: IscsiConfig,
}

/// How a process serves iSCSI.
#[derive(Debug, Clone, Default)]
pub struct IscsiConfig {
    /// Its portal groups, which are also relative target ports: no other process that serves a volume of its has one of
    /// them. The first one names its target port group.
    pub portal_groups: Vec<u16>,
    /// Random, and known to nobody: makes the challenges of CHAP.
    pub entropy: [u8; 32],
    /// What initiators prove that ask which targets there are: see [`IscsiConfig::check`].
    pub discovery_chap: Option<Chap>,
    /// After how long a silence an initiator is asked whether it is there, and after how long again it is given up; 0: as
    /// long as is usual.
    pub nop_interval_ms: u64,
}

impl IscsiConfig {
    /// Whether initiators can prove what they are to.
    ///
    /// # Errors
    /// What is wrong with the secrets.
    pub fn check(&self) -> Result<(), EngineError> {
        self.target().map(drop).map_err(|error| EngineError::Invalid(error.to_string()))
    }

    fn target(&self) -> Result<IscsiTarget, TargetError> {
        let discovery_chap = self.discovery_chap.clone();
        IscsiTarget::new(IscsiTargetConfig { discovery_chap, ..IscsiTargetConfig::default() })
    }
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            node_nqn: "nqn.2026-11.io.cairn:node".to_owned(),
            node_id: 1,
            incarnation: 0,
            cntlid_min: 1,
            cntlid_max: 0xffef,
            replica_kato_ms: 5_000,
            replica_queue_entries: 256,
            child_deadline_min_ms: 1_000,
            lease_ms: 3_000,
            holder: 0,
            replica_header_digest: false,
            replica_data_digest: false,
            pace: cairn_nexus::Pace::default(),
            volume_requests: 512,
            assembly_wait_ms: 2_000,
            overcommit: 0,
            sanitize_mib_s: 0,
            shard: FRONT,
            shards: 1,
            iscsi: IscsiConfig::default(),
        }
    }
}

/// What a token is about: its top byte (below the driver's own).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Subject {
    Accept = 1,
    HostReceive = 2,
    HostSend = 3,
    HostClose = 4,
    LinkConnect = 5,
    LinkReceive = 6,
    LinkSend = 7,
    LinkClose = 8,
    PoolDisk = 9,
    InitiatorAccept = 10,
    InitiatorReceive = 11,
    InitiatorSend = 12,
    InitiatorClose = 13,
}

fn token(subject: Subject, a: u16, b: u32) -> Token {
    Token::new((u64::from(subject as u8) << 48) | (u64::from(a) << 32) | u64::from(b))
}

fn parts(token: Token) -> (u8, u16, u32) {
    let bytes = token.value().to_le_bytes();
    let a = u16::from_le_bytes([bytes[4], bytes[5]]);
    let b = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (bytes[6], a, b)
}

/// Everything that one thread serves.
pub struct Shard<D: Driver> {
    driver: D,
    config: ShardConfig,
    target: Target,
    listeners: Vec<(ListenerId, Port)>,
    /// Where the process listens, as others are told.
    addresses: Vec<SocketAddr>,
    /// What other shards are to be told.
    outbox: moves::Outbox<D::Socket>,
    hosts: Table<Host>,
    initiators: Initiators,
    ios: Table<HostIo>,
    jobs: Jobs,
    /// Volumes with holds that are over.
    freed_volumes: Vec<NamespaceHandle>,
    volumes: Table<Volume>,
    links: Table<Link>,
    pools: Vec<LocalPool>,
    /// What namespace handles stand for.
    exports: Vec<Option<io::Export>>,
    /// Host requests that wait for a buffer.
    waiting_ios: VecDeque<u32>,
    /// Promises that wait for earlier requests to end.
    drains: Vec<registers::Drain>,
    /// Snapshots being taken, and lists of them being put together.
    snapshots: Vec<snapshots::SnapshotWork>,
    lists: Vec<snapshots::ListWork>,
    next_snapshot: u64,
    /// How full each pool was when it was last looked at.
    pool_levels: Vec<usize>,
    /// Requests of hosts in blocks of 512 bytes.
    sectors: Table<sectors::SectorIo>,
    sector_reserve: Option<Buf>,
    /// What mends of all volumes fall back on where there is no memory, and whether it was set aside.
    mend_reserve: Option<Buf>,
    has_mend_reserve: bool,
    /// What payload cannot take.
    reserve: reserve::Reserve,
    /// Volumes with a mend that waits for memory.
    short_volumes: Vec<u32>,
    /// Connections with bytes that could not be taken yet.
    stalled: Vec<u32>,
    /// Connections, links, volumes and pools that something happened to in this turn.
    busy_hosts: Vec<u32>,
    busy_links: Vec<u32>,
    busy_volumes: Vec<u32>,
    /// The earliest time at which some state machine wants to be called.
    next_timeout_ms: u64,
    completions: Vec<Completion>,
    windows: Vec<BufSlice>,
    next_generation: u32,
    stopping: Option<Stopping>,
    stopped: bool,
}

/// A shutdown under way.
struct Stopping {
    reply: Option<Reply<()>>,
    deadline_ms: u64,
    checkpoints: usize,
    closing: bool,
}

impl<D: Driver> std::fmt::Debug for Shard<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard")
            .field("hosts", &self.hosts.len())
            .field("volumes", &self.volumes.len())
            .field("pools", &self.pools.len())
            .finish_non_exhaustive()
    }
}

impl<D: Driver> Shard<D> {
    /// An empty shard over `driver`.
    #[must_use]
    pub fn new(driver: D, config: ShardConfig) -> Self {
        let mut target = Target::new(TargetConfig::default());
        if config.shard != FRONT {
            target.announce_subsystems();
        }
        Self {
            driver,
            target,
            initiators: Initiators::new(&config),
            jobs: Jobs::new(),
            freed_volumes: Vec::new(),
            config,
            listeners: Vec::new(),
            addresses: Vec::new(),
            outbox: VecDeque::new(),
            hosts: Table::new(),
            ios: Table::new(),
            volumes: Table::new(),
            links: Table::new(),
            pools: Vec::new(),
            exports: Vec::new(),
            waiting_ios: VecDeque::with_capacity(1024),
            drains: Vec::new(),
            snapshots: Vec::new(),
            lists: Vec::new(),
            next_snapshot: 0,
            pool_levels: Vec::new(),
            sectors: Table::new(),
            sector_reserve: None,
            mend_reserve: None,
            has_mend_reserve: false,
            reserve: reserve::Reserve::default(),
            short_volumes: Vec::new(),
            stalled: Vec::with_capacity(64),
            busy_hosts: Vec::with_capacity(256),
            busy_links: Vec::with_capacity(256),
            busy_volumes: Vec::with_capacity(256),
            next_timeout_ms: u64::MAX,
            completions: Vec::with_capacity(1024),
            windows: Vec::with_capacity(SEND_WINDOWS),
            next_generation: 0,
            stopping: None,
            stopped: false,
        }
    }

    /// The driver, for whoever set it up.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Whether a shutdown is complete.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn now_ms(&self) -> u64 {
        self.driver.now_ns() / 1_000_000
    }

    /// Waits for something to happen and acts on it. Returns whether another thread woke the shard.
    pub fn turn(&mut self) -> bool {
        let deadline = match self.next_timeout_ms {
            u64::MAX => None,
            at => Some(at.saturating_mul(1_000_000)),
        };
        self.driver.set_batch(if self.links.is_empty() { BATCH } else { LINKED_BATCH });
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.poll(&mut completions, deadline);
        let now = self.now_ms();
        let mut woken = false;
        for completion in completions.drain(..) {
            woken |= matches!(completion, Completion::Woken);
            self.handle_completion(completion, now);
        }
        self.completions = completions;
        for local in &mut self.pools {
            local.busy |= local.pool.waits_for_memory();
        }
        self.settle(now);
        woken
    }

    /// Acts on a command, as if it had come in a turn of its own.
    pub fn command(&mut self, command: Command<D::Listener, D::Device>) {
        let now = self.now_ms();
        self.handle_command(command, now);
        self.settle(now);
    }

    fn handle_completion(&mut self, completion: Completion, now: u64) {
        match completion {
            Completion::Disk { token, result } => {
                let (_, pool, id) = parts(token);
                self.handle_disk(pool, id, result);
            }
            Completion::Accepted { token, result } => {
                let (subject, _, listener) = parts(token);
                if subject == Subject::InitiatorAccept as u8 {
                    self.initiator_accepted(ListenerId(listener), result, now);
                } else {
                    self.handle_accepted(result);
                }
            }
            Completion::Connected { token, result } => {
                let (_, queue, link) = parts(token);
                self.handle_link_connected(link, queue, result, now);
            }
            Completion::Received { token, chunk } => {
                let (subject, queue, at) = parts(token);
                if subject == Subject::HostReceive as u8 {
                    self.handle_host_bytes(at, chunk, now);
                } else if subject == Subject::InitiatorReceive as u8 {
                    self.handle_initiator_bytes(at, chunk, now);
                } else {
                    self.handle_link_bytes(at, queue, chunk, now);
                }
            }
            Completion::ReceiveEnded { token, reason } => {
                let (subject, _, at) = parts(token);
                if subject == Subject::HostReceive as u8 {
                    self.handle_host_receive_ended(at, reason);
                } else if subject == Subject::InitiatorReceive as u8 {
                    self.initiator_receive_ended(at, reason);
                } else {
                    self.fail_link(at, &format!("the connection ended: {reason:?}"));
                }
            }
            Completion::Sent { token, result } => {
                let (subject, queue, at) = parts(token);
                if subject == Subject::HostSend as u8 {
                    self.handle_host_sent(at, result);
                } else if subject == Subject::InitiatorSend as u8 {
                    self.initiator_sent(at, result);
                } else {
                    self.handle_link_sent(at, queue, result);
                }
            }
            Completion::Closed { token } => {
                let (subject, queue, at) = parts(token);
                if subject == Subject::HostClose as u8 {
                    self.handle_host_closed(at);
                } else if subject == Subject::InitiatorClose as u8 {
                    self.initiator_closed(at);
                } else {
                    self.handle_link_closed(at, queue, now);
                }
            }
            Completion::Woken => {}
        }
    }

    /// Lets everything run until nothing moves, then sends.
    fn settle(&mut self, now: u64) {
        self.keep_reserve();
        if now >= self.next_timeout_ms {
            self.handle_timeouts(now);
        }
        loop {
            let mut moved = self.run_pools(now);
            moved |= self.run_volumes(now);
            moved |= self.run_links(now);
            moved |= self.run_target(now);
            moved |= self.run_freed(now);
            moved |= self.run_jobs(now);
            if !moved {
                moved = self.retry_waiting(now);
            }
            if !moved {
                break;
            }
        }
        self.flush_hosts();
        self.flush_initiators();
        self.flush_links();
        if self.stopping.is_some() {
            self.advance_shutdown(now);
        }
    }

    fn wants_timeout(&mut self, at: Option<u64>) {
        if let Some(at) = at {
            self.next_timeout_ms = self.next_timeout_ms.min(at);
        }
    }

    fn handle_timeouts(&mut self, now: u64) {
        self.next_timeout_ms = u64::MAX;
        self.target.handle_timeout(now);
        self.wants_timeout(self.target.poll_timeout());
        self.initiator_timeouts(now);
        if !self.is_closing() {
            self.volume_timeouts(now);
        }
        let mut from = 0;
        while let Some(at) = self.links.next_key(from) {
            from = at + 1;
            self.link_timeout(at, now);
        }
        if let Some(stopping) = &self.stopping {
            let at = stopping.deadline_ms;
            self.wants_timeout(Some(at));
        }
    }

    fn volume_timeouts(&mut self, now: u64) {
        let mut from = 0;
        while let Some(at) = self.volumes.next_key(from) {
            from = at + 1;
            let volume = &mut self.volumes[at];
            volume.nexus.handle_timeout(now);
            let next = volume.nexus.poll_timeout(now);
            self.wants_timeout(next);
            self.stand_by_if_cut_off(at, now);
            self.retry_restore(at, now);
            self.retry_deletions(at, now);
            self.touch_volume(at);
        }
    }

    /// Tries again what waited for memory or for room. Returns whether anything moved.
    fn retry_waiting(&mut self, now: u64) -> bool {
        let mut moved = false;
        while let Some(&io) = self.waiting_ios.front() {
            if !self.start_read(io, now) {
                break;
            }
            self.waiting_ios.pop_front();
            moved = true;
        }
        moved |= self.retry_pools();
        let mut short = std::mem::take(&mut self.short_volumes);
        short.retain(|&at| {
            let mends = self.retry_mends(at, now);
            moved |= mends;
            if mends {
                self.touch_volume(at);
            }
            // A volume that is run says again that it is short.
            !mends && self.volumes.get(at).is_some_and(|v| v.nexus.waits_for_memory())
        });
        self.short_volumes.append(&mut short);
        moved |= self.retry_sectors(now);
        moved |= self.retry_jobs(now);
        let stalled = std::mem::take(&mut self.stalled);
        for at in stalled {
            moved |= self.retry_host(at, now);
        }
        moved | self.retry_initiators(now)
    }

    // ---- shutdown

    fn begin_shutdown(&mut self, reply: Reply<()>, now: u64) {
        if self.stopping.is_some() {
            reply.send(Err(EngineError::Stopped));
            return;
        }
        for (listener, _) in self.listeners.drain(..) {
            self.driver.detach_listener(listener);
        }
        self.stop_listening_for_initiators();
        let deadline_ms = now + DRAIN_MS;
        self.stopping =
            Some(Stopping { reply: Some(reply), deadline_ms, checkpoints: 0, closing: false });
        self.wants_timeout(Some(deadline_ms));
    }

    /// Whether what was in hand is over, and connections and links are being closed.
    fn is_closing(&self) -> bool {
        self.stopping.as_ref().is_some_and(|stopping| stopping.closing)
    }

    /// Moves a shutdown on: drain, close, write the tables, stop.
    fn advance_shutdown(&mut self, now: u64) {
        let drained = self.ios.is_empty() && self.jobs.is_empty();
        let Some(stopping) = self.stopping.as_mut() else { return };
        if !stopping.closing {
            if !drained && now < stopping.deadline_ms {
                return;
            }
            stopping.closing = true;
            stopping.checkpoints = self.pools.len();
            for at in self.hosts.keys() {
                self.close_host(at);
            }
            for at in self.initiators.hosts.keys() {
                self.close_initiator(at);
            }
            // Sent before the links are closed, as far as they take it now.
            self.release_leases(now);
            for at in self.links.keys() {
                self.retire_link(at);
            }
            self.checkpoint_pools();
            self.run_pools(now);
        }
        let Some(stopping) = self.stopping.as_mut() else { return };
        let alone = self.hosts.is_empty() && self.initiators.hosts.is_empty();
        let quiet = alone && self.links.is_empty() && stopping.checkpoints == 0;
        if quiet || now >= stopping.deadline_ms + DRAIN_MS {
            self.stopped = true;
            if let Some(reply) = stopping.reply.take() {
                reply.send(Ok(()));
            }
        } else {
            let at = stopping.deadline_ms + DRAIN_MS;
            self.wants_timeout(Some(at));
        }
    }

    fn checkpoint_done(&mut self) {
        if let Some(stopping) = self.stopping.as_mut() {
            stopping.checkpoints = stopping.checkpoints.saturating_sub(1);
        }
    }

    fn touch_host(&mut self, at: u32) {
        if let Some(host) = self.hosts.get_mut(at)
            && host.stream.touch()
        {
            self.busy_hosts.push(at);
        }
    }

    fn touch_link(&mut self, at: u32) {
        if let Some(link) = self.links.get_mut(at)
            && !link.busy
        {
            link.busy = true;
            self.busy_links.push(at);
        }
    }

    fn touch_volume(&mut self, at: u32) {
        if let Some(volume) = self.volumes.get_mut(at)
            && !volume.busy
        {
            volume.busy = true;
            self.busy_volumes.push(at);
        }
    }

    fn submit(&mut self, op: Op<'_>, token: Token) {
        self.driver.submit(op, token);
    }

    fn memory(&mut self) -> &mut D::Memory {
        self.driver.memory()
    }

    fn release(&mut self, buf: cairn_block::Buf) {
        self.driver.memory().release(buf);
    }

    /// Moves what the target itself decided: events that fire and connections to close.
    fn run_target(&mut self, _now: u64) -> bool {
        let mut moved = false;
        while let Some(deferred) = self.target.poll_deferred() {
            let ConnId(at) = deferred.conn;
            if let Some(host) = self.hosts.get_mut(at) {
                let (status, result) = (deferred.status, deferred.result);
                host.queue.complete(deferred.slot, status, result, self.driver.memory());
                self.touch_host(at);
            }
            moved = true;
        }
        while let Some(ConnId(at)) = self.target.poll_close() {
            self.close_host(at);
            moved = true;
        }
        moved
    }
}
