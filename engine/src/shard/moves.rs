//! What the shards of one process tell each other: connections that are another's, subsystems, and where the process
//! listens. One shard listens; it learns only from a connection's Connect whose it is.
//!
//! A connection that moves is received from no more, has sent its ICResp, and goes with all that arrived on it. The
//! shard that gets it feeds that to a queue of its own, which is then where the first one was, and answers the
//! Connect. From then on nothing of the connection crosses shards.

use std::collections::VecDeque;
use std::net::SocketAddr;

use cairn_block::Memory as _;
use cairn_nvmf::target::{Listing, Owner};
use cairn_reactor::{Chunk, Driver, Op};

use super::hosts::Phase;
use super::initiators::MovedInitiator;
use super::{Shard, Subject, token};
use crate::control::{IscsiPortal, IscsiTarget};

/// The shard that listens, and tells hosts of all subsystems.
pub const FRONT: u16 = 0;
/// Bytes that may arrive before a Connect is answered. ICReq and Connect have about 1.3 KiB, and a host waits for both
/// answers.
const MAX_EARLY: usize = super::reserve::PAGE as usize;

/// What one shard of a process tells another. `S` is the driver's socket.
#[derive(Debug)]
pub enum Message<S> {
    /// A connection is yours.
    Connection(Moved<S>),
    /// A shard has a subsystem, or has it no more.
    Subsystem {
        /// Which shard.
        shard: u16,
        /// What of it.
        listing: Listing,
    },
    /// The process listens there: volumes tell others that their replicas are there.
    Listening(SocketAddr),
    /// An initiator's connection is yours.
    Initiator(MovedInitiator<S>),
    /// A shard has an iSCSI target, or has it no more.
    IscsiTarget {
        /// Which shard.
        shard: u16,
        /// The target's name.
        iqn: String,
        /// What of it; nothing: it is gone.
        target: Option<Box<IscsiTarget>>,
    },
    /// The process listens for initiators there.
    IscsiPortal(IscsiPortal),
}

/// A connection on its way from one shard to another.
#[derive(Debug)]
pub struct Moved<S> {
    socket: S,
    /// All that arrived on it.
    received: Vec<u8>,
    /// How much of that the queue here was fed, and what it had sent.
    fed: usize,
    queued: u64,
}

/// What arrived on a connection until it was known whose it is.
#[derive(Debug, Default)]
pub(super) struct Early {
    received: Vec<u8>,
    fed: usize,
    owner: Option<Owner>,
}

/// Messages of a shard that were not fetched yet, each with the shard that it is for.
pub(super) type Outbox<S> = VecDeque<(u16, Message<S>)>;

impl<D: Driver> Shard<D> {
    /// What another shard of the process is to be told next, and which. Ask after every turn, command and message.
    pub fn poll_message(&mut self) -> Option<(u16, Message<D::Socket>)> {
        if let Some(listing) = self.target.poll_listing() {
            return Some((FRONT, Message::Subsystem { shard: self.config.shard, listing }));
        }
        self.outbox.pop_front()
    }

    /// Acts on what another shard of the process tells.
    pub fn handle_message(&mut self, message: Message<D::Socket>) {
        let now = self.now_ms();
        match message {
            Message::Connection(moved) => self.take_up(moved, now),
            Message::Subsystem { shard, listing } => {
                self.target.handle_listing(Owner(shard), listing);
            }
            Message::Listening(address) => self.addresses.push(address),
            Message::Initiator(moved) => self.take_up_initiator(moved, now),
            Message::IscsiTarget { shard, iqn, target } => {
                self.handle_foreign_target(shard, iqn, target);
            }
            Message::IscsiPortal(portal) => self.add_portal(super::targets::portal(&portal)),
        }
        self.settle(now);
    }

    /// Bytes of a connection of which it is not known yet whose it is, or that goes to another shard.
    pub(super) fn handle_early_bytes(&mut self, at: u32, chunk: Chunk, now: u64) {
        let host = &mut self.hosts[at];
        if host.phase == Phase::New && host.queue.is_settled() {
            (host.phase, host.early) = (Phase::Settled, None);
            return self.handle_host_bytes(at, chunk, now);
        }
        let moving = host.phase == Phase::Moving;
        let Some(early) = host.early.as_mut() else {
            self.driver.release_chunk(chunk);
            return self.close_host(at);
        };
        let bytes = self.driver.memory().bytes(chunk.slice);
        if early.received.len() + bytes.len() > MAX_EARLY {
            tracing::warn!(
                connection = at,
                "a host sent more than {MAX_EARLY} bytes before its Connect was answered; its connection is closed"
            );
            self.driver.release_chunk(chunk);
            return self.close_host(at);
        }
        early.received.extend_from_slice(bytes);
        if moving {
            return self.driver.release_chunk(chunk);
        }
        host.stream.backlog.push_back(chunk);
        self.pump_host(at, now);
    }

    /// A connection's Connect names a subsystem of another shard.
    pub(super) fn begin_move(&mut self, at: u32, owner: Owner) {
        let host = &mut self.hosts[at];
        let Some(early) = host.early.as_mut() else { return self.close_host(at) };
        let left: usize = host.stream.backlog.iter().map(|chunk| chunk.slice.len() as usize).sum();
        early.fed = early.received.len() - (left - host.stream.taken as usize);
        early.owner = Some(owner);
        host.phase = Phase::Moving;
        host.stream.forget(&mut self.driver);
        self.pause_receive(at);
        self.touch_host(at);
    }

    /// Hands a connection over, once nothing arrives on it or is being sent.
    pub(super) fn move_if_quiet(&mut self, at: u32) {
        let host = &mut self.hosts[at];
        if host.stream.receiving || host.stream.sending || !host.queue.tx().is_idle() {
            return;
        }
        let (Some(early), Some(socket)) =
            (host.early.take(), self.driver.detach_socket(host.stream.socket))
        else {
            return self.close_host(at);
        };
        let Early { received, fed, owner } = *early;
        let Owner(shard) = owner.expect("it moves to somebody");
        let host = self.hosts.remove(at).expect("it was there");
        let moved = Moved { socket, received, fed, queued: host.queue.queued() };
        host.queue.close(self.driver.memory());
        self.stalled.retain(|&s| s != at);
        self.outbox.push_back((shard, Message::Connection(moved)));
    }

    /// A connection that another shard accepted is this one's.
    fn take_up(&mut self, moved: Moved<D::Socket>, now: u64) {
        let Moved { socket, received, fed, queued } = moved;
        let socket = match self.driver.attach_socket(socket) {
            Ok(socket) => socket,
            Err(fault) => {
                tracing::warn!(%fault, "a connection of another shard could not be taken up");
                return;
            }
        };
        let queue = if self.stopping.is_some() { None } else { self.new_queue() };
        let Some(queue) = queue else {
            if self.stopping.is_none() {
                tracing::warn!("no buffer for another connection; it is closed (see `buffers`)");
            }
            self.submit(Op::Close { socket }, token(Subject::HostClose, 0, u32::MAX));
            return;
        };
        let at = self.add_host(socket, queue, None);
        if self.feed_again(at, &received, fed, queued, now) {
            // What it asked may have been refused for good.
            if self.hosts[at].phase < Phase::Closing {
                self.start_receive(at);
                self.touch_host(at);
            }
        } else {
            tracing::warn!(
                connection = at,
                "a connection of another shard could not be taken up, for want of a buffer or since what arrived on it is \
                 not what it was; it is closed"
            );
            self.close_host(at);
        }
    }

    /// Brings a connection's queue to where it was at the other shard, and goes on. False where there is no memory
    /// for that.
    fn feed_again(&mut self, at: u32, received: &[u8], fed: usize, queued: u64, now: u64) -> bool {
        let Some(page) = self.own_page() else { return false };
        let memory = self.driver.memory();
        memory.bytes_mut(page.slice())[..received.len()].copy_from_slice(received);
        let [fed, len] = [fed, received.len()]
            .map(|len| u32::try_from(len).expect("no more than MAX_EARLY is kept"));
        let queue = &mut self.hosts[at].queue;
        let mut taken = queue.resume(page.slice().sub(0, fed), queued, memory);
        if taken {
            self.take_commands(at, now);
            let rest = page.slice().sub(fed, len - fed);
            let memory = self.driver.memory();
            taken = self.hosts[at].queue.handle_recv(rest, memory) == rest.len();
        }
        self.release(page);
        if taken {
            self.take_commands(at, now);
        }
        taken
    }
}
