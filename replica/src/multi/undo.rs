//! The undo logs of replicas, which a nexus reads and writes at addresses of their own: see `cairn_block::undo`.
//!
//! All are in one replica that the pool makes for itself when the first of them is written. Whatever holds for
//! replicas holds for what is in it: a write with FUA is durable when it is answered, what rots is not given out,
//! and it moves off a device that is removed. What was in it on a device that is gone is given up at once.

use std::collections::VecDeque;

use cairn_block::{IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, undo};

use super::control::{Change, Kind, Then};
use super::{Member, MultiPool};
use crate::pool::{PoolState, ReplicaSlot};
use crate::undo::{is_undo_log, spec};

/// Requests to the logs that wait until there is a replica for them, or until what it lost is given up.
#[derive(Debug, Default)]
pub(super) struct UndoLog {
    waiting: VecDeque<(u64, ReplicaSlot, IoRequest)>,
}

impl UndoLog {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}

impl MultiPool {
    /// A request to the undo log of a replica.
    pub(super) fn submit_to_log<M: Memory>(
        &mut self,
        tag: u64,
        slot: ReplicaSlot,
        request: IoRequest,
        mem: &mut M,
    ) {
        let range = request.range;
        let there = self.live_blocks(slot.0).is_some();
        let op = matches!(
            request.op,
            IoOp::Read | IoOp::Write { .. } | IoOp::WriteZeroes { .. } | IoOp::Verify
        );
        let refused = match self.state() {
            PoolState::Failed(_) => Some(IoStatus::MediaError),
            PoolState::Online if !there => Some(IoStatus::PathError),
            PoolState::Online if !op => Some(IoStatus::Unsupported),
            PoolState::Online if range.end() > undo::whole().end() => Some(IoStatus::OutOfRange),
            PoolState::Online => None,
        };
        if let Some(status) = refused {
            return self.answer(tag, status);
        }
        let has = self.log_slot().is_some();
        if !has && !matches!(request.op, IoOp::Write { .. }) {
            // Nothing was ever written to any log.
            if request.op == IoOp::Read {
                mem.bytes_mut(request.buf).fill(0);
            }
            return self.answer(tag, IoStatus::Ok);
        }
        self.undo.waiting.push_back((tag, slot, request));
        let changing = self.jobs.iter().chain(&self.active).any(|job| job.kind.is_of_log());
        if !changing && !has {
            let spec = spec(self.slots);
            self.push_job(None, Kind::Create { spec, slot: 0 });
        } else if let (false, Some(at)) = (changing, self.log_slot())
            && self.has_lost_log(at.0)
        {
            let kind = Kind::members(Change::Lost(at.0, false), Then::GivenUp(at.0));
            self.push_job(None, kind);
        }
        self.settle(mem);
    }

    /// Whether a device that is durably left behind had something of the logs.
    fn has_lost_log(&self, slot: u16) -> bool {
        let had = |m: &Member| m.excluded && !m.has_given_up(slot) && m.pool.mapped_end(slot) > 0;
        self.lost.is_lost(slot) || self.present().any(had)
    }

    fn log_slot(&self) -> Option<ReplicaSlot> {
        self.find(spec(self.slots).id)
    }

    /// Passes on what waited, once nothing changes any more that it waits for.
    pub(super) fn pump_undo<M: Memory>(&mut self, mem: &mut M) {
        let changing =
            |pool: &Self| pool.jobs.iter().chain(&pool.active).any(|j| j.kind.is_of_log());
        while !self.undo.waiting.is_empty() && !changing(self) {
            let at = self.log_slot();
            let Some((tag, slot, request)) = self.undo.waiting.pop_front() else { return };
            let Some(at) = at else {
                // There is no slot for it, or no device any more.
                let failed = self.state() != PoolState::Online;
                self.answer(tag, if failed { IoStatus::MediaError } else { IoStatus::NoSpace });
                continue;
            };
            let first = u64::from(slot.0) * undo::BLOCKS + request.range.start().0 - undo::FIRST;
            let range = LbaRange::new(Lba(first), request.range.blocks());
            let range = range.expect("within the replica of the logs");
            self.pass(tag, at, IoRequest { range, ..request }, mem);
        }
    }
}

impl Kind {
    /// Whether it makes the replica of the undo logs, or has what that lost given up.
    fn is_of_log(&self) -> bool {
        match self {
            Self::Create { spec, .. } => is_undo_log(spec.id),
            Self::Members { then: Then::GivenUp(_), .. } => true,
            Self::Members { then: Then::Start(kind), .. } => kind.is_of_log(),
            _ => false,
        }
    }
}
