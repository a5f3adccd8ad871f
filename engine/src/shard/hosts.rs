//! Connections from hosts (and from other processes' nexuses): socket and queue pair.

use cairn_nvmf::target::{self, ConnId, Outcome};
use cairn_reactor::{Chunk, Driver, EndReason, Op, SocketFault, SocketId, Token};

use super::moves::Early;
use super::stream::Stream;
use super::{Shard, Subject, token};
use crate::{register, snapshot, upkeep};

/// Where a connection is in its life. What arrives is taken up to [`Phase::New`], with more looked at then; what was
/// queued is sent up to [`Phase::Moving`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It is this shard's.
    Settled,
    /// Its first command may be a Connect to what another shard has.
    New,
    /// It goes to another shard, once it is quiet.
    Moving,
    Closing,
}

/// One connection.
pub(super) struct Host {
    pub(super) stream: Stream,
    /// Tells this connection from earlier ones with its number.
    pub(super) generation: u32,
    pub(super) queue: target::Queue,
    pub(super) phase: Phase,
    /// What arrived until it was known whose it is, where several shards share a listener.
    pub(super) early: Option<Box<Early>>,
    /// Its volume knows the host as one that writes.
    pub(super) noted: bool,
}

fn receive_token(at: u32) -> Token {
    token(Subject::HostReceive, 0, at)
}

impl<D: Driver> Shard<D> {
    pub(super) fn handle_accepted(&mut self, result: Result<SocketId, SocketFault>) {
        let socket = match result {
            Ok(socket) => socket,
            Err(fault) => {
                tracing::warn!(%fault, "a connection could not be accepted");
                return;
            }
        };
        let Some(queue) = self.new_queue() else {
            tracing::warn!("no buffer for another connection; it is closed (see `buffers`)");
            self.submit(Op::Close { socket }, token(Subject::HostClose, 0, u32::MAX));
            return;
        };
        let early = (self.config.shards > 1).then(Box::default);
        let at = self.add_host(socket, queue, early);
        self.start_receive(at);
    }

    /// A connection that is not received from yet.
    pub(super) fn add_host(
        &mut self,
        socket: SocketId,
        queue: target::Queue,
        early: Option<Box<Early>>,
    ) -> u32 {
        self.next_generation = self.next_generation.wrapping_add(1);
        self.hosts.insert(Host {
            stream: Stream::new(socket),
            generation: self.next_generation,
            queue,
            phase: if early.is_some() { Phase::New } else { Phase::Settled },
            early,
            noted: false,
        })
    }

    pub(super) fn start_receive(&mut self, at: u32) {
        self.hosts[at].stream.receive(&mut self.driver, receive_token(at));
    }

    pub(super) fn handle_host_bytes(&mut self, at: u32, chunk: Chunk, now: u64) {
        match self.hosts.get_mut(at) {
            Some(host) if host.phase == Phase::Settled => {
                host.stream.backlog.push_back(chunk);
                self.pump_host(at, now);
            }
            Some(host) if host.phase < Phase::Closing => self.handle_early_bytes(at, chunk, now),
            _ => self.driver.release_chunk(chunk),
        }
    }

    /// Feeds what was received to the queue, and acts on the commands that come of it. Returns
    /// whether anything was taken.
    pub(super) fn pump_host(&mut self, at: u32, now: u64) -> bool {
        let mut moved = false;
        loop {
            let Some(host) = self.hosts.get_mut(at) else { return moved };
            if host.phase >= Phase::Moving {
                return moved;
            }
            let Some(rest) = host.stream.front() else { break };
            let taken = host.queue.handle_recv(rest, self.driver.memory());
            moved |= taken > 0;
            let all = host.stream.take(taken, &mut self.driver);
            self.take_commands(at, now);
            if !all {
                self.stall_host(at);
                break;
            }
        }
        let Some(host) = self.hosts.get_mut(at) else { return moved };
        if host.queue.is_waiting_for_memory() && host.stream.stall() {
            self.stalled.push(at);
        }
        let host = &mut self.hosts[at];
        if host.stream.is_drained() && host.phase < Phase::Moving {
            self.start_receive(at);
        }
        self.touch_host(at);
        moved
    }

    /// Stops receiving until there is room: the peer's own window does the rest.
    fn stall_host(&mut self, at: u32) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        if host.phase >= Phase::Moving {
            return;
        }
        self.pause_receive(at);
        if self.hosts[at].stream.stall() {
            self.stalled.push(at);
        }
    }

    pub(super) fn pause_receive(&mut self, at: u32) {
        self.hosts[at].stream.pause(&mut self.driver, receive_token(at));
    }

    pub(super) fn retry_host(&mut self, at: u32, now: u64) -> bool {
        let Some(host) = self.hosts.get_mut(at) else { return false };
        host.stream.stalled = false;
        // What its queue holds is another shard's to carry out.
        if host.phase == Phase::Moving {
            return false;
        }
        host.queue.retry(self.driver.memory());
        self.take_commands(at, now);
        self.pump_host(at, now)
    }

    /// Carries out the commands that are complete.
    pub(super) fn take_commands(&mut self, at: u32, now: u64) {
        while let Some(host) = self.hosts.get_mut(at) {
            let Some(command) = host.queue.poll_command() else { break };
            let memory = self.driver.memory();
            match self.target.handle_command(ConnId(at), &mut host.queue, command, now, memory) {
                Outcome::Done => {
                    let next = self.target.poll_timeout();
                    self.wants_timeout(next);
                }
                Outcome::Io(io) => self.start_host_io(at, io, now),
                Outcome::Reserve { slot, namespace, request } => {
                    self.reserve_for_host(at, slot, namespace, request, now);
                }
                Outcome::Elsewhere(owner) => return self.begin_move(at, owner),
                Outcome::Vendor { slot, namespace, sqe, data } => {
                    let opcode = sqe.opcode();
                    if snapshot::verb(opcode).is_some() || opcode == snapshot::OPCODE_LIST {
                        self.start_snapshot_command((at, slot), namespace, &sqe, data, now);
                    } else if matches!(opcode, upkeep::OPCODE_SETTLE | upkeep::OPCODE_CHANGES) {
                        self.start_upkeep_command((at, slot), namespace, &sqe, data, now);
                    } else {
                        self.start_register_command(at, slot, namespace, &sqe, data);
                    }
                }
            }
        }
        self.touch_host(at);
    }

    pub(super) fn handle_host_receive_ended(&mut self, at: u32, reason: EndReason) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        (host.stream.receiving, host.stream.pausing) = (false, false);
        if reason == EndReason::Paused {
            if host.phase == Phase::Moving {
                self.touch_host(at);
            } else if host.stream.backlog.is_empty() && host.phase < Phase::Closing {
                // A retry has emptied the backlog meanwhile.
                self.start_receive(at);
            }
        } else {
            self.close_host(at);
        }
    }

    pub(super) fn handle_host_sent(&mut self, at: u32, result: Result<(), SocketFault>) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        host.stream.sending = false;
        // Sent or given up: nothing uses the buffers any more.
        host.queue.tx().handle_sent(self.driver.memory());
        match result {
            Ok(()) => self.touch_host(at),
            Err(_) => self.close_host(at),
        }
    }

    /// Ends a connection. Its requests in flight run on; their answers find nobody.
    pub(super) fn close_host(&mut self, at: u32) {
        let Some(host) = self.hosts.get_mut(at) else { return };
        if host.phase == Phase::Closing {
            return;
        }
        host.phase = Phase::Closing;
        host.early = None;
        if let Some(reason) = host.queue.close_reason() {
            tracing::info!(connection = at, %reason, "connection closed");
        }
        let socket = host.stream.socket;
        host.stream.forget(&mut self.driver);
        self.target.handle_disconnect(ConnId(at));
        self.submit(Op::Close { socket }, token(Subject::HostClose, 0, at));
    }

    pub(super) fn handle_host_closed(&mut self, at: u32) {
        let Some(host) = self.hosts.remove(at) else { return };
        host.queue.close(self.driver.memory());
        self.stalled.retain(|&s| s != at);
    }

    /// Sends what has piled up on each connection, a batch each.
    pub(super) fn flush_hosts(&mut self) {
        while let Some(at) = self.busy_hosts.pop() {
            let Some(host) = self.hosts.get_mut(at) else { continue };
            host.stream.busy = false;
            if host.phase == Phase::Closing {
                continue;
            }
            if !host.stream.sending && host.queue.tx().wants_send() {
                host.queue.tx().take_batch(&mut self.windows);
                let token = token(Subject::HostSend, 0, at);
                host.stream.send(&self.windows, &mut self.driver, token);
            } else if host.phase == Phase::Moving {
                self.move_if_quiet(at);
            } else if host.queue.wants_close() && host.queue.tx().is_idle() {
                self.close_host(at);
            }
        }
    }

    /// Whether the connection that a request came from is still there.
    pub(super) fn host_queue(&mut self, at: u32, generation: u32) -> Option<&mut target::Queue> {
        self.hosts
            .get_mut(at)
            .filter(|host| host.generation == generation && host.phase < Phase::Closing)
            .map(|host| &mut host.queue)
    }

    fn start_register_command(
        &mut self,
        at: u32,
        slot: target::SlotId,
        namespace: target::NamespaceHandle,
        sqe: &cairn_nvmf::sqe::Sqe,
        data: Option<cairn_block::Buf>,
    ) {
        let page = data.map(|buf| {
            let register = register::decode(cairn_block::Memory::bytes(self.memory(), buf.slice()));
            self.release(buf);
            register
        });
        let generation = self.hosts[at].generation;
        let asked = super::registers::Origin::Host { conn: at, generation, slot };
        self.register_command(asked, namespace, sqe, page.flatten());
    }
}
