//! What becomes of a connection as time passes.

use cairn_block::Memory;

use super::task::State;
use super::{CloseReason, Connection, Phase};

/// How long what is left to send has, once the connection is over.
pub(super) const LINGER_MS: u64 = 5_000;
/// For so many intervals an initiator may take nothing of what it is sent.
pub(super) const MAX_UNSENT: u32 = 6;
/// How long data that was asked for may take to begin to come.
const DATA_TIMEOUT_MS: u64 = 60_000;

impl Connection {
    /// Whether to close the connection now: nothing is left to send, or the initiator has not taken it for
    /// so long that nobody waits for it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.close_reason.is_some() && (self.tx.is_idle() || self.lingered)
    }

    /// Says what time it is: a login that takes too long ends, and so does an initiator that does
    /// not answer, or does not send the data that it was asked for.
    pub fn handle_timeout<M: Memory>(&mut self, now_ms: u64, mem: &mut M) {
        let interval = match self.phase {
            _ if self.close_reason.is_some() => LINGER_MS,
            Phase::Login => self.config.login_timeout_ms,
            Phase::FullFeature { .. } => self.config.nop_interval_ms,
        };
        let Some(deadline) = self.deadline_ms else {
            self.deadline_ms = Some(now_ms.saturating_add(interval));
            return;
        };
        if now_ms < deadline || self.lingered {
            return;
        }
        self.deadline_ms = Some(now_ms.saturating_add(interval));
        match self.phase {
            _ if self.close_reason.is_some() => self.lingered = true,
            Phase::Login => self.fail(CloseReason::LoginTimeout),
            Phase::FullFeature { .. } => {
                self.look_for_data();
                self.look_for_life(mem);
            }
        }
    }

    /// An interval has passed: an initiator that was not heard of is asked whether it is there.
    fn look_for_life<M: Memory>(&mut self, mem: &mut M) {
        if std::mem::take(&mut self.heard) {
            self.pinged = None;
            self.unsent = 0;
            return;
        }
        if self.stalled && self.tx.is_idle() {
            // It is the target that does not read.
            return;
        }
        let asked = self.pinged.is_some_and(|mark| self.tx.was_sent(mark));
        if asked || self.unsent == MAX_UNSENT {
            return self.fail(CloseReason::Silent);
        }
        if self.pinged.is_none() && self.ping(mem) {
            self.pinged = Some(self.tx.mark());
        } else {
            // What it is sent does not go out: it cannot be asked.
            self.unsent += 1;
        }
    }

    /// An interval has passed: an initiator that does not send what it owes is not waited for.
    fn look_for_data(&mut self) {
        if self.stalled || !self.tx.is_idle() {
            // It may have sent it; it may not have been asked.
            return;
        }
        let intervals = DATA_TIMEOUT_MS.div_ceil(self.config.nop_interval_ms.max(1));
        let mut late = false;
        for task in self.tasks.iter_mut().filter(|task| task.state == State::Receiving) {
            task.quiet += 1;
            late |= u64::from(task.quiet) > intervals;
        }
        if late {
            self.fail(CloseReason::DataTimeout);
        }
    }

    /// When [`Connection::handle_timeout`] has something to do; at once where that is not known.
    #[must_use]
    pub fn poll_timeout(&self) -> u64 {
        if self.lingered { u64::MAX } else { self.deadline_ms.unwrap_or(0) }
    }
}
