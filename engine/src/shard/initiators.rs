//! Connections from iSCSI initiators.

mod moves;

use cairn_iscsi::chap::Algorithm;
use cairn_iscsi::connection::{Connection, ConnectionConfig, Request};
use cairn_iscsi::login::target_name;
use cairn_iscsi::target::{ConnId, Outcome, Portal, Target};
use cairn_nvmf::target::NamespaceHandle;
use cairn_reactor::{Chunk, Driver, EndReason, ListenerId, Op, SocketFault, SocketId, Token};

use self::moves::Early;
pub(super) use self::moves::MovedInitiator;
use super::reservations::Ask;
use super::stream::Stream;
use super::table::Table;
use super::targets::{Foreign, Place};
use super::tasks::TaskDrain;
use super::{Shard, ShardConfig, Subject, token};

/// Connections of initiators at once: those of as many sessions as a target has, and some that are logging in.
const MAX_CONNECTIONS: usize = 1280;
/// Those of them that have not logged in yet, and may be anybody's.
const MAX_STRANGERS: usize = 128;
/// Timers of connections are looked at so often at most: they are seconds.
const TIMER_GRAIN_MS: u64 = 250;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It is this shard's.
    Settled,
    /// Its first request may name what another shard has.
    New,
    /// It goes to another shard, once it is quiet.
    Moving,
    Closing,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Initiator {
    pub(super) stream: Stream,
    /// Tells this connection from earlier ones with its number.
    pub(super) generation: u32,
    pub(super) conn: Connection,
    pub(super) phase: Phase,
    /// What arrived until it was known whose it is, where several shards share a listener.
    early: Option<Box<Early>>,
    /// Its name, once a volume knows it as one that writes, and those that do.
    pub(super) writer: Option<Box<str>>,
    pub(super) written: Vec<NamespaceHandle>,
}

/// All that has to do with iSCSI.
#[derive(Debug)]
pub(super) struct Initiators {
    pub(super) target: Target,
    pub(super) hosts: Table<Initiator>,
    pub(super) portals: Vec<Portal>,
    /// Listeners, and the portal group of each.
    listeners: Vec<(ListenerId, u16)>,
    /// What volumes have logical units here, or will have once they are there.
    pub(super) places: Vec<Place>,
    /// Targets of other shards.
    pub(super) foreign: Vec<Foreign>,
    pub(super) drains: Vec<TaskDrain>,
    /// Connections that something happened to in this turn, and those that wait for memory.
    busy: Vec<u32>,
    pub(super) stalled: Vec<u32>,
    next_timeout_ms: u64,
    config: ConnectionConfig,
    challenges: u64,
}

impl Initiators {
    pub(super) fn new(config: &ShardConfig) -> Self {
        let usual = ConnectionConfig::default();
        let nop_interval_ms = match config.iscsi.nop_interval_ms {
            0 => usual.nop_interval_ms,
            asked => asked,
        };
        Self {
            target: config.iscsi.target().expect("the secrets were checked"),
            hosts: Table::new(),
            portals: Vec::new(),
            listeners: Vec::new(),
            places: Vec::new(),
            foreign: Vec::new(),
            drains: Vec::new(),
            busy: Vec::new(),
            stalled: Vec::new(),
            next_timeout_ms: u64::MAX,
            config: ConnectionConfig { nop_interval_ms, ..usual },
            challenges: 0,
        }
    }
}

fn receive_token(at: u32) -> Token {
    token(Subject::InitiatorReceive, 0, at)
}

impl<D: Driver> Shard<D> {
    /// Listens for initiators, in this portal group.
    pub(super) fn listen_for_initiators(
        &mut self,
        listener: D::Listener,
        portal: Portal,
    ) -> std::io::Result<()> {
        let id = self.driver.attach_listener(listener)?;
        self.initiators.listeners.push((id, portal.group));
        self.add_portal(portal);
        self.submit(Op::Accept { listener: id }, token(Subject::InitiatorAccept, 0, id.0));
        Ok(())
    }

    pub(super) fn stop_listening_for_initiators(&mut self) {
        for (listener, _) in self.initiators.listeners.drain(..) {
            self.driver.detach_listener(listener);
        }
    }

    pub(super) fn initiator_accepted(
        &mut self,
        listener: ListenerId,
        result: Result<SocketId, SocketFault>,
        now: u64,
    ) {
        let socket = match result {
            Ok(socket) => socket,
            Err(fault) => {
                tracing::warn!(%fault, "an initiator's connection could not be accepted");
                return;
            }
        };
        let group = self.initiators.listeners.iter().find(|(id, _)| *id == listener);
        let Some(&(_, group)) = group else { return self.close_stranger(socket) };
        let early = (self.config.shards > 1).then(Box::default);
        if let Some(at) = self.add_initiator(socket, group, early, now) {
            self.receive_initiator(at);
        }
    }

    fn close_stranger(&mut self, socket: SocketId) {
        self.submit(Op::Close { socket }, token(Subject::InitiatorClose, 0, u32::MAX));
    }

    /// A connection that is not received from yet; nothing where there is no room for it.
    fn add_initiator(
        &mut self,
        socket: SocketId,
        group: u16,
        early: Option<Box<Early>>,
        now: u64,
    ) -> Option<u32> {
        let entropy = self.challenge();
        let hosts = &self.initiators.hosts;
        let strangers = hosts.iter().filter(|(_, host)| !host.conn.is_logged_in()).count();
        let full = hosts.len() >= MAX_CONNECTIONS || strangers >= MAX_STRANGERS;
        let memory = self.driver.memory();
        let conn = if full {
            None
        } else {
            Connection::new(&self.initiators.config, group, &entropy, memory)
        };
        let Some(mut conn) = conn else {
            tracing::warn!(
                "no room for another connection of an initiator; it is closed (there may be {MAX_CONNECTIONS}, \
                 {MAX_STRANGERS} of them not logged in yet, and each takes memory of `buffers`)"
            );
            self.close_stranger(socket);
            return None;
        };
        conn.handle_timeout(now, memory);
        let due = conn.poll_timeout();
        self.next_generation = self.next_generation.wrapping_add(1);
        let at = self.initiators.hosts.insert(Initiator {
            stream: Stream::new(socket),
            generation: self.next_generation,
            conn,
            phase: if early.is_some() { Phase::New } else { Phase::Settled },
            early,
            writer: None,
            written: Vec::new(),
        });
        self.note_initiator_timeout(due);
        Some(at)
    }

    /// What makes a challenge: nobody can guess it who does not know the process's secret, and no two are the same.
    fn challenge(&mut self) -> [u8; 32] {
        self.initiators.challenges += 1;
        let mut text = [0; 10];
        text[..8].copy_from_slice(&self.initiators.challenges.to_le_bytes());
        text[8..].copy_from_slice(&self.config.shard.to_le_bytes());
        let hash = Algorithm::Sha256.respond(0, &self.config.iscsi.entropy, &text);
        hash.try_into().unwrap_or([0; 32])
    }

    fn receive_initiator(&mut self, at: u32) {
        self.initiators.hosts[at].stream.receive(&mut self.driver, receive_token(at));
    }

    pub(super) fn handle_initiator_bytes(&mut self, at: u32, chunk: Chunk, now: u64) {
        match self.initiators.hosts.get_mut(at) {
            Some(host) if host.phase == Phase::Settled => {
                host.stream.backlog.push_back(chunk);
                self.pump_initiator(at, now);
            }
            Some(host) if host.phase < Phase::Closing => self.early_initiator(at, chunk, now),
            _ => self.driver.release_chunk(chunk),
        }
    }

    /// Feeds what was received to the connection, and acts on the requests that come of it. Returns whether anything was
    /// taken.
    fn pump_initiator(&mut self, at: u32, now: u64) -> bool {
        let mut moved = false;
        loop {
            let Some(host) = self.initiators.hosts.get_mut(at) else { return moved };
            if host.phase >= Phase::Moving {
                return moved;
            }
            let Some(rest) = host.stream.front() else { break };
            let taken = host.conn.handle_recv(rest, self.driver.memory());
            moved |= taken > 0;
            let all = host.stream.take(taken, &mut self.driver);
            self.take_requests(at, now);
            if !all {
                self.stall_initiator(at);
                break;
            }
        }
        let Some(host) = self.initiators.hosts.get_mut(at) else { return moved };
        if host.stream.is_drained() && host.phase < Phase::Moving {
            self.receive_initiator(at);
        }
        self.touch_initiator(at);
        moved
    }

    /// Stops receiving until there is room.
    fn stall_initiator(&mut self, at: u32) {
        let Some(host) = self.initiators.hosts.get_mut(at) else { return };
        if host.phase >= Phase::Moving {
            return;
        }
        host.stream.pause(&mut self.driver, receive_token(at));
        if host.stream.stall() {
            self.initiators.stalled.push(at);
        }
    }

    fn pause_initiator(&mut self, at: u32) {
        self.initiators.hosts[at].stream.pause(&mut self.driver, receive_token(at));
    }

    /// Tries again what waited for memory or for room. Returns whether anything moved.
    pub(super) fn retry_initiators(&mut self, now: u64) -> bool {
        let mut moved = false;
        for at in std::mem::take(&mut self.initiators.stalled) {
            let Some(host) = self.initiators.hosts.get_mut(at) else { continue };
            host.stream.stalled = false;
            if host.phase >= Phase::Moving {
                continue;
            }
            host.conn.retry(self.driver.memory());
            self.take_requests(at, now);
            moved |= self.pump_initiator(at, now);
        }
        moved
    }

    /// Carries out the requests that are complete.
    fn take_requests(&mut self, at: u32, now: u64) {
        while let Some(host) = self.initiators.hosts.get_mut(at) {
            let Some(command) = host.conn.poll_command() else { break };
            if matches!(command.request, Request::Login(_)) && self.sort_login(at) {
                return;
            }
            let Some(host) = self.initiators.hosts.get_mut(at) else { return };
            let memory = self.driver.memory();
            let target = &mut self.initiators.target;
            match target.handle_command(ConnId(at), &mut host.conn, command, memory) {
                Outcome::Done => {}
                Outcome::Io(io) => self.start_task(at, io, now),
                Outcome::Sanitize { slot, unit, command } => {
                    self.sanitize_for_initiator((at, slot), unit, command, now);
                }
                Outcome::Drain { slot, units } => self.drain_tasks(at, slot, &units),
                Outcome::Reserve { slot, unit, change } => {
                    self.reserve_for_initiator((at, slot), unit, Ask::Change(change), now);
                }
                Outcome::ReserveIn { slot, unit, query } => {
                    self.reserve_for_initiator((at, slot), unit, Ask::In(query), now);
                }
            }
            self.settle_target();
        }
        self.touch_initiator(at);
    }

    /// Whether a login is not for here: the connection moves, or ends.
    fn sort_login(&mut self, at: u32) -> bool {
        let host = &self.initiators.hosts[at];
        let name = target_name(host.conn.login_text());
        if let Some(name) = name {
            if let Some(shard) = self.foreign_shard(name) {
                self.move_initiator(at, shard);
                return true;
            }
            if self.is_coming(name) {
                // An initiator whose connection breaks tries again; one that is told that there is no such target, or
                // no such unit, may not.
                tracing::info!(connection = at, target = %name, "an initiator asks for a target that is not up yet");
                self.close_initiator(at);
                return true;
            }
        }
        let host = &mut self.initiators.hosts[at];
        if host.phase == Phase::New {
            (host.phase, host.early) = (Phase::Settled, None);
        }
        false
    }

    /// Does what the target asks for: connections that are to end, and tasks that are to be aborted.
    pub(super) fn settle_target(&mut self) {
        let mut aborts = false;
        while let Some(abort) = self.initiators.target.poll_abort() {
            aborts = true;
            let ConnId(at) = abort.conn;
            if let Some(host) = self.initiators.hosts.get_mut(at) {
                host.conn.abort(abort.lun, self.driver.memory());
                self.touch_initiator(at);
            }
        }
        if aborts {
            self.end_aborted_sanitizes();
        }
        while let Some(ConnId(at)) = self.initiators.target.poll_close() {
            self.close_initiator(at);
        }
    }

    pub(super) fn initiator_receive_ended(&mut self, at: u32, reason: EndReason) {
        let Some(host) = self.initiators.hosts.get_mut(at) else { return };
        (host.stream.receiving, host.stream.pausing) = (false, false);
        if reason != EndReason::Paused {
            self.close_initiator(at);
        } else if host.phase == Phase::Moving {
            self.touch_initiator(at);
        } else if host.stream.backlog.is_empty() && host.phase < Phase::Closing {
            self.receive_initiator(at);
        }
    }

    pub(super) fn initiator_sent(&mut self, at: u32, result: Result<(), SocketFault>) {
        let Some(host) = self.initiators.hosts.get_mut(at) else { return };
        host.stream.sending = false;
        host.conn.handle_sent(self.driver.memory());
        match result {
            // A long read goes on once what it had is sent.
            Ok(()) if host.phase < Phase::Moving => self.take_requests(at, self.now_ms()),
            Ok(()) => self.touch_initiator(at),
            Err(_) => self.close_initiator(at),
        }
    }

    /// Ends a connection. Its requests in flight run on; their answers find nobody.
    pub(super) fn close_initiator(&mut self, at: u32) {
        let Some(host) = self.initiators.hosts.get_mut(at) else { return };
        if host.phase == Phase::Closing {
            return;
        }
        host.phase = Phase::Closing;
        host.early = None;
        if let Some(reason) = host.conn.close_reason() {
            tracing::info!(connection = at, %reason, "an initiator's connection is closed");
        }
        let socket = host.stream.socket;
        host.stream.forget(&mut self.driver);
        self.initiators.target.handle_disconnect(ConnId(at));
        self.submit(Op::Close { socket }, token(Subject::InitiatorClose, 0, at));
    }

    pub(super) fn initiator_closed(&mut self, at: u32) {
        let Some(host) = self.initiators.hosts.remove(at) else { return };
        host.conn.close(self.driver.memory());
        self.initiators.stalled.retain(|&s| s != at);
    }

    /// Sends what has piled up on each connection, a batch each.
    pub(super) fn flush_initiators(&mut self) {
        while let Some(at) = self.initiators.busy.pop() {
            let Some(host) = self.initiators.hosts.get_mut(at) else { continue };
            host.stream.busy = false;
            if host.phase == Phase::Closing {
                continue;
            }
            if !host.stream.sending && host.conn.wants_send() {
                host.conn.take_batch(&mut self.windows);
                let token = token(Subject::InitiatorSend, 0, at);
                host.stream.send(&self.windows, &mut self.driver, token);
            } else if host.phase == Phase::Moving {
                self.move_initiator_if_quiet(at);
            } else if host.conn.is_over() {
                self.close_initiator(at);
            }
        }
    }

    pub(super) fn touch_initiator(&mut self, at: u32) {
        let Some(host) = self.initiators.hosts.get_mut(at) else { return };
        if host.conn.is_waiting_for_memory() && host.stream.stall() {
            self.initiators.stalled.push(at);
        }
        if host.stream.touch() {
            self.initiators.busy.push(at);
        }
    }

    // ---- time

    fn note_initiator_timeout(&mut self, due: u64) {
        let Some(due) = due.checked_next_multiple_of(TIMER_GRAIN_MS) else { return };
        self.initiators.next_timeout_ms = self.initiators.next_timeout_ms.min(due);
        self.wants_timeout(Some(self.initiators.next_timeout_ms));
    }

    /// Says what time it is to the connections, where one wants to know.
    pub(super) fn initiator_timeouts(&mut self, now: u64) {
        if now < self.initiators.next_timeout_ms {
            return self.wants_timeout(Some(self.initiators.next_timeout_ms));
        }
        self.initiators.next_timeout_ms = u64::MAX;
        let mut from = 0;
        while let Some(at) = self.initiators.hosts.next_key(from) {
            from = at + 1;
            let host = &mut self.initiators.hosts[at];
            if host.phase == Phase::Closing {
                continue;
            }
            if host.conn.poll_timeout() <= now {
                host.conn.handle_timeout(now, self.driver.memory());
                self.touch_initiator(at);
            }
            let due = self.initiators.hosts[at].conn.poll_timeout().max(now + TIMER_GRAIN_MS);
            self.note_initiator_timeout(due);
        }
    }
}
