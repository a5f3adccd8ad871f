//! What connections have in common, whatever is spoken on them: a socket, what arrived on it and was not taken yet, and
//! what is under way.

use std::collections::VecDeque;

use cairn_block::BufSlice;
use cairn_reactor::{Chunk, Driver, Op, SocketId, Token};

/// A connection's socket and what came of it.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) socket: SocketId,
    /// Received and not yet taken, and how much of the first chunk is.
    pub(super) backlog: VecDeque<Chunk>,
    pub(super) taken: u32,
    pub(super) receiving: bool,
    pub(super) pausing: bool,
    /// It is on the list of those that wait for memory or for room.
    pub(super) stalled: bool,
    pub(super) sending: bool,
    /// It is on the list of those that may have something to send.
    pub(super) busy: bool,
}

impl Stream {
    pub(super) fn new(socket: SocketId) -> Self {
        Self {
            socket,
            backlog: VecDeque::with_capacity(8),
            taken: 0,
            receiving: false,
            pausing: false,
            stalled: false,
            sending: false,
            busy: false,
        }
    }

    /// Has what arrives be reported.
    pub(super) fn receive<D: Driver>(&mut self, driver: &mut D, token: Token) {
        self.receiving = true;
        driver.submit(Op::Receive { socket: self.socket }, token);
    }

    /// Stops that: the peer's own window does the rest.
    pub(super) fn pause<D: Driver>(&mut self, driver: &mut D, token: Token) {
        if self.receiving && !self.pausing {
            self.pausing = true;
            driver.submit(Op::PauseReceive { socket: self.socket }, token);
        }
    }

    /// Whether receiving can begin anew: nothing is left over, and nothing is under way.
    pub(super) fn is_drained(&self) -> bool {
        self.backlog.is_empty() && !self.receiving && !self.pausing
    }

    /// What is to be taken next.
    pub(super) fn front(&self) -> Option<BufSlice> {
        self.backlog.front().map(|chunk| chunk.slice.from(self.taken))
    }

    /// So many bytes of it were taken. Whether that was all of the chunk, which is given back.
    pub(super) fn take<D: Driver>(&mut self, bytes: u32, driver: &mut D) -> bool {
        self.taken += bytes;
        let all = self.backlog.front().is_some_and(|chunk| self.taken == chunk.slice.len());
        if all {
            self.taken = 0;
            if let Some(chunk) = self.backlog.pop_front() {
                driver.release_chunk(chunk);
            }
        }
        all
    }

    /// Gives back what was not taken.
    pub(super) fn forget<D: Driver>(&mut self, driver: &mut D) {
        self.taken = 0;
        while let Some(chunk) = self.backlog.pop_front() {
            driver.release_chunk(chunk);
        }
    }

    /// Sends a batch.
    pub(super) fn send<D: Driver>(&mut self, windows: &[BufSlice], driver: &mut D, token: Token) {
        self.sending = true;
        driver.submit(Op::Send { socket: self.socket, windows }, token);
    }

    /// Whether it is to be put on the list of those that may have something to send.
    pub(super) fn touch(&mut self) -> bool {
        !std::mem::replace(&mut self.busy, true)
    }

    /// Whether it is to be put on the list of those that wait.
    pub(super) fn stall(&mut self) -> bool {
        !std::mem::replace(&mut self.stalled, true)
    }
}
