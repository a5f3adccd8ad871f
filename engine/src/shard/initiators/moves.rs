//! Connections of initiators that are another shard's. One shard listens; whose a connection is it learns from the target
//! that its first Login Request names. Nothing was sent on it by then, so it goes with all that arrived on it, and begins
//! anew there.

use cairn_block::Memory as _;
use cairn_reactor::{Chunk, Driver};

use super::Phase;
use crate::shard::Shard;
use crate::shard::moves::Message;

/// Bytes that may arrive before a connection's first request is whole: a Login Request and its text.
const MAX_EARLY: usize = 64 << 10;

/// What arrived on a connection until it was known whose it is.
#[derive(Debug, Default)]
pub(super) struct Early {
    received: Vec<u8>,
    shard: u16,
}

/// An initiator's connection on its way from one shard to another.
#[derive(Debug)]
pub struct MovedInitiator<S> {
    socket: S,
    /// The portal group that it came in at.
    group: u16,
    /// All that arrived on it.
    received: Vec<u8>,
}

impl<D: Driver> Shard<D> {
    /// Bytes of a connection of which it is not known yet whose it is, or that goes to another shard.
    pub(super) fn early_initiator(&mut self, at: u32, chunk: Chunk, now: u64) {
        let host = &mut self.initiators.hosts[at];
        let moving = host.phase == Phase::Moving;
        let bytes = self.driver.memory().bytes(chunk.slice);
        let room = |early: &Early| early.received.len() + bytes.len() <= MAX_EARLY;
        let Some(early) = host.early.as_mut().filter(|early| room(early)) else {
            tracing::warn!(
                connection = at,
                "an initiator sent more than {MAX_EARLY} bytes before its login was answered; its connection is closed"
            );
            self.driver.release_chunk(chunk);
            return self.close_initiator(at);
        };
        early.received.extend_from_slice(bytes);
        if moving {
            return self.driver.release_chunk(chunk);
        }
        host.stream.backlog.push_back(chunk);
        self.pump_initiator(at, now);
    }

    /// A connection's login names a target of another shard.
    pub(super) fn move_initiator(&mut self, at: u32, shard: u16) {
        let host = &mut self.initiators.hosts[at];
        let fresh = host.conn.is_idle() && !host.stream.sending;
        let Some(early) = host.early.as_mut().filter(|_| fresh) else {
            tracing::warn!(
                connection = at,
                "an initiator named a target of another shard late in its login; its connection is closed"
            );
            return self.close_initiator(at);
        };
        early.shard = shard;
        host.phase = Phase::Moving;
        host.stream.forget(&mut self.driver);
        self.pause_initiator(at);
        self.touch_initiator(at);
    }

    /// Hands a connection over, once nothing arrives on it.
    pub(super) fn move_initiator_if_quiet(&mut self, at: u32) {
        let host = &mut self.initiators.hosts[at];
        if host.stream.receiving {
            return;
        }
        let (Some(early), Some(socket)) =
            (host.early.take(), self.driver.detach_socket(host.stream.socket))
        else {
            return self.close_initiator(at);
        };
        let Early { received, shard } = *early;
        let Some(host) = self.initiators.hosts.remove(at) else { return };
        let moved = MovedInitiator { socket, group: host.conn.portal_group(), received };
        host.conn.close(self.driver.memory());
        self.initiators.stalled.retain(|&s| s != at);
        self.outbox.push_back((shard, Message::Initiator(moved)));
    }

    /// A connection that another shard accepted is this one's.
    pub(in crate::shard) fn take_up_initiator(
        &mut self,
        moved: MovedInitiator<D::Socket>,
        now: u64,
    ) {
        let MovedInitiator { socket, group, received } = moved;
        let socket = match self.driver.attach_socket(socket) {
            Ok(socket) => socket,
            Err(fault) => {
                tracing::warn!(%fault, "a connection of another shard could not be taken up");
                return;
            }
        };
        if self.stopping.is_some() {
            return self.close_stranger(socket);
        }
        let Some(at) = self.add_initiator(socket, group, None, now) else { return };
        if self.feed_initiator(at, &received, now) {
            // What it asked may have been refused for good.
            if self.initiators.hosts[at].phase < Phase::Closing {
                self.receive_initiator(at);
                self.touch_initiator(at);
            }
        } else {
            tracing::warn!(
                connection = at,
                "a connection of another shard could not be taken up, for want of a buffer; it is closed"
            );
            self.close_initiator(at);
        }
    }

    /// Feeds what arrived at the other shard. False where there is no memory for that.
    fn feed_initiator(&mut self, at: u32, received: &[u8], now: u64) -> bool {
        let Some(page) = self.own_page() else { return false };
        let size = page.slice().len() as usize;
        let mut all = true;
        for part in received.chunks(size) {
            let memory = self.driver.memory();
            let len = u32::try_from(part.len()).expect("within a page");
            let window = page.slice().sub(0, len);
            memory.bytes_mut(window).copy_from_slice(part);
            let Some(host) = self.initiators.hosts.get_mut(at) else { break };
            all &= host.conn.handle_recv(window, memory) == len;
            self.take_requests(at, now);
        }
        self.release(page);
        all
    }
}
