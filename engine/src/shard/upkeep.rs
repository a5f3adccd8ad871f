//! What was written and not settled: asked of local pools and of replicas behind links, and answered to
//! nexuses elsewhere.

use std::collections::VecDeque;

use cairn_block::{Buf, BufSlice, IoStatus, Memory};
use cairn_nexus::{ChildId, ChildOp, Ticket};
use cairn_nvmf::initiator::{Submit, SubmitError, VendorData};
use cairn_nvmf::sqe::Sqe;
use cairn_nvmf::target::{NamespaceHandle, SlotId, status_of};
use cairn_reactor::Driver;
use cairn_replica::{ReplicaSlot, RoundEnd};

use super::Shard;
use super::io::Export;
use super::links::ADMIN_QUEUE;
use super::pools::Waiter;
use super::snapshots::SnapshotOrigin;
use crate::upkeep::{self, SettleCall};

/// What a link has under way for its nexus on the admin queue.
#[derive(Default)]
pub(super) struct Upkeep {
    /// Operations that wait for a free slot, or for memory. A nexus has a few of them under way at most.
    pub(super) waiting: VecDeque<(Ticket, ChildOp)>,
    /// Pages of Settle, until they are answered.
    pages: Vec<(u32, Buf)>,
    /// Where the answers of Changes go.
    answers: Vec<(u32, BufSlice)>,
}

/// What a settle operation is on the wire.
fn call_of(op: &ChildOp) -> Option<SettleCall> {
    match *op {
        ChildOp::SettleBegin { round } => Some(SettleCall::Begin { round }),
        ChildOp::SettleEnd { round, stamp, below } => Some(SettleCall::End { round, stamp, below }),
        ChildOp::GiveUpLost => Some(SettleCall::GiveUp),
        _ => None,
    }
}

impl<D: Driver> Shard<D> {
    // ---- of a nexus, to a pool of this process

    /// An operation of a nexus for a replica of this process.
    pub(super) fn upkeep_on_local(
        &mut self,
        (pool, replica): (u16, ReplicaSlot),
        (volume, child, ticket): (u32, ChildId, Ticket),
        op: &ChildOp,
        now: u64,
    ) {
        let origin = SnapshotOrigin::Child { volume, child, ticket };
        match (op, call_of(op)) {
            (_, Some(call)) => self.settle_on_replica((pool, replica), origin, call, now),
            (&ChildOp::Changes { first, since, buf }, _) => {
                let local = &self.pools[usize::from(pool)].pool;
                let bytes = self.driver.memory().bytes_mut(buf);
                let told = local.changes(replica, first, since, bytes);
                let status = told.map_or(IoStatus::MediaError, |_| IoStatus::Ok);
                self.child_io_done(volume, child, ticket, status, now);
            }
            _ => self.child_io_done(volume, child, ticket, IoStatus::Unsupported, now),
        }
    }

    fn settle_on_replica(
        &mut self,
        (pool, replica): (u16, ReplicaSlot),
        origin: SnapshotOrigin,
        call: SettleCall,
        now: u64,
    ) {
        match call {
            SettleCall::Begin { round } => {
                let begun = self.pools[usize::from(pool)].pool.settle_begin(replica, round);
                self.snapshot_answered(origin, begun.err().unwrap_or(IoStatus::Ok), now);
            }
            SettleCall::End { round, stamp, below } => {
                let tag = self.control_tag(pool, Waiter::Settle { origin, slot: replica });
                let local = &mut self.pools[usize::from(pool)];
                let end = RoundEnd { round, stamp, below };
                local.pool.settle_end(tag, replica, end, self.driver.memory());
            }
            SettleCall::GiveUp => {
                let tag = self.control_tag(pool, Waiter::Settle { origin, slot: replica });
                let local = &mut self.pools[usize::from(pool)];
                local.pool.give_up_lost(tag, replica, self.driver.memory());
            }
        }
    }

    // ---- of a nexus elsewhere

    /// A command from a connection.
    pub(super) fn start_upkeep_command(
        &mut self,
        (conn, slot): (u32, SlotId),
        namespace: NamespaceHandle,
        sqe: &Sqe,
        data: Option<Buf>,
        now: u64,
    ) {
        let generation = self.hosts[conn].generation;
        let origin = SnapshotOrigin::Host { conn, generation, slot };
        let call =
            data.as_ref().and_then(|buf| upkeep::decode(self.driver.memory().bytes(buf.slice())));
        if let Some(buf) = data {
            self.release(buf);
        }
        let Some(&mut Export::Replica { pool, slot: replica, .. }) = self.export(namespace) else {
            return self.snapshot_answered(origin, IoStatus::Unsupported, now);
        };
        if self.is_fenced(conn, generation, pool, replica) {
            return self.snapshot_answered(origin, IoStatus::Fenced, now);
        }
        match (sqe.opcode(), call) {
            (upkeep::OPCODE_CHANGES, _) => self.answer_changes(origin, (pool, replica), sqe, now),
            (_, Some(call)) => self.settle_on_replica((pool, replica), origin, call, now),
            (_, None) => self.snapshot_answered(origin, IoStatus::InvalidField, now),
        }
    }

    fn answer_changes(
        &mut self,
        origin: SnapshotOrigin,
        (pool, replica): (u16, ReplicaSlot),
        sqe: &Sqe,
        now: u64,
    ) {
        let SnapshotOrigin::Host { conn, slot, .. } = origin else { return };
        let memory = self.driver.memory();
        let queue = &mut self.hosts[conn].queue;
        let len = queue.data_len(slot);
        if len == 0 || len > upkeep::CHANGES_MAX {
            return self.snapshot_answered(origin, IoStatus::InvalidField, now);
        }
        let page = if len <= upkeep::PAGE { self.own_page() } else { memory.alloc(len) };
        let Some(page) = page else {
            return self.snapshot_answered(origin, IoStatus::NotReady, now);
        };
        let memory = self.driver.memory();
        let queue = &mut self.hosts[conn].queue;
        let (first, since) = (sqe.cdw(10), u64::from(sqe.cdw(11)));
        let local = &self.pools[usize::from(pool)].pool;
        match local.changes(replica, first, since, memory.bytes_mut(page.slice())) {
            Some(_) => queue.complete_with_data(slot, page, memory),
            None => {
                memory.release(page);
                queue.complete(slot, status_of(IoStatus::MediaError), 0, memory);
            }
        }
        self.touch_host(conn);
    }

    // ---- of a nexus, to a replica behind a link

    /// Sends an operation, or has it wait for a free slot of the admin queue.
    pub(super) fn send_upkeep(&mut self, at: u32, ticket: Ticket, op: ChildOp, now: u64) {
        let Some(link) = self.links.get_mut(at) else { return };
        let (volume, child) = link.nexus();
        let sent = if link.upkeep.waiting.is_empty() {
            self.try_upkeep(at, ticket, &op)
        } else {
            Err(SubmitError::Full)
        };
        match sent {
            Ok(()) => {}
            Err(SubmitError::Full) => self.links[at].upkeep.waiting.push_back((ticket, op)),
            Err(_) => self.child_io_done(volume, child, ticket, IoStatus::PathError, now),
        }
    }

    fn try_upkeep(&mut self, at: u32, ticket: Ticket, op: &ChildOp) -> Result<(), SubmitError> {
        self.links.get_mut(at).and_then(|l| l.ready_session()).ok_or(SubmitError::NotReady)?;
        let call = call_of(op);
        let kept = if call.is_some() { self.own_page() } else { None };
        let memory = self.driver.memory();
        let link = self.links.get_mut(at).ok_or(SubmitError::NotReady)?;
        let mut page = None;
        let command = match (op, call) {
            (_, Some(call)) => {
                let buf = kept.ok_or(SubmitError::Full)?;
                upkeep::encode(call, memory.bytes_mut(buf.slice()));
                let data = VendorData::Out(buf.slice());
                page = Some(buf);
                Submit::Vendor { opcode: upkeep::OPCODE_SETTLE, cdw10: 0, cdw11: 0, data }
            }
            (&ChildOp::Changes { first, since, buf }, _) if buf.len() <= upkeep::CHANGES_MAX => {
                let (opcode, cdw11) = (upkeep::OPCODE_CHANGES, upkeep::since_dword(since));
                Submit::Vendor { opcode, cdw10: first, cdw11, data: VendorData::In(buf) }
            }
            _ => return Err(SubmitError::Invalid),
        };
        let sent = match link.ready_session() {
            Some(session) => session.submit(ADMIN_QUEUE, ticket.0, command, memory),
            None => Err(SubmitError::NotReady),
        };
        if let Err(error) = sent {
            if let Some(page) = page {
                memory.release(page);
            }
            return Err(error);
        }
        if let Some(page) = page {
            link.upkeep.pages.push((ticket.0, page));
        }
        if let ChildOp::Changes { buf, .. } = *op {
            link.upkeep.answers.push((ticket.0, buf));
        }
        self.touch_link(at);
        Ok(())
    }

    /// Sends what waited. Returns whether anything was sent.
    pub(super) fn send_waiting_upkeep(&mut self, at: u32, now: u64) -> bool {
        let mut moved = false;
        while let Some(link) = self.links.get_mut(at)
            && link.ready_session().is_some()
            && let Some((ticket, op)) = link.upkeep.waiting.pop_front()
        {
            let (volume, child) = link.nexus();
            match self.try_upkeep(at, ticket, &op) {
                Ok(()) => {}
                Err(SubmitError::Full) => {
                    self.links[at].upkeep.waiting.push_front((ticket, op));
                    break;
                }
                Err(_) => self.child_io_done(volume, child, ticket, IoStatus::PathError, now),
            }
            moved = true;
        }
        moved
    }

    /// A command on the link is over, or will never be: what it used is let go of. Returns how it ended, which
    /// is an error where the answer makes no sense.
    pub(super) fn upkeep_over(&mut self, at: u32, ticket: Ticket, status: IoStatus) -> IoStatus {
        let Some(link) = self.links.get_mut(at) else { return status };
        let of = |(t, _): &(u32, Buf)| *t == ticket.0;
        if let Some(i) = link.upkeep.pages.iter().position(of) {
            let (_, page) = link.upkeep.pages.swap_remove(i);
            self.driver.memory().release(page);
            return status;
        }
        let Some(i) = link.upkeep.answers.iter().position(|(t, _)| *t == ticket.0) else {
            return status;
        };
        let (_, answer) = link.upkeep.answers.swap_remove(i);
        if status.is_ok() && !upkeep::is_changes(self.driver.memory().bytes(answer)) {
            return IoStatus::InvalidField;
        }
        status
    }
}
