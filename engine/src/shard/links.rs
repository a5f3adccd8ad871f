//! Links to remote replicas: an NVMe/TCP session each, opened again with backoff when it fails.

use std::collections::VecDeque;
use std::net::SocketAddr;

use cairn_block::{Buf, IoOp, IoRequest, IoStatus, Memory, ReplicaId};
use cairn_nexus::{ChildId, ChildOp, Register, RegisterOp, Ticket};
use cairn_nvmf::initiator::{
    Completed, NamespaceInfo, QueueIndex, Session, SessionConfig, SessionEvent, Submit,
    SubmitError, VendorData,
};
use cairn_reactor::{Chunk, Driver, Op, SocketFault, SocketId};

use super::upkeep::Upkeep;
use super::volumes::Route;
use super::{Shard, Subject, token};
use crate::{register, snapshot};

/// A connect that takes longer is given up.
const CONNECT_TIMEOUT_MS: u32 = 3_000;
/// Wait before the first try again, in milliseconds.
const BACKOFF_MIN_MS: u64 = 50;
/// The wait doubles up to this.
const BACKOFF_MAX_MS: u64 = 1_000;
/// The queue that block I/O goes on.
const IO_QUEUE: QueueIndex = QueueIndex(1);
/// The volume of a link that has none any more: the number may be another volume's by then.
const NO_VOLUME: u32 = u32::MAX;
/// The queue that register commands go on.
pub(super) const ADMIN_QUEUE: QueueIndex = QueueIndex(0);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for its time to try.
    Idle,
    /// The session is being set up.
    Connecting,
    /// The nexus uses it.
    Ready,
    /// Its sockets are being closed.
    Closing,
}

#[derive(Debug, Default, Clone, Copy)]
struct LinkQueue {
    socket: Option<SocketId>,
    connecting: bool,
    sending: bool,
}

/// The way to one remote replica.
pub(super) struct Link {
    volume: u32,
    child: ChildId,
    replica: ReplicaId,
    peer: SocketAddr,
    /// Where it may be instead: tried in turn.
    other: Option<SocketAddr>,
    nqn: String,
    stage: Stage,
    session: Option<Session>,
    /// The next one, made while the memory of the last was free: payload may have taken all the rest by then.
    next: Option<Session>,
    queues: [LinkQueue; 2],
    backoff_ms: u64,
    retry_at_ms: u64,
    /// Since when the nexus uses the session.
    ready_ms: Option<u64>,
    /// Requests for which the queue has no free slot.
    waiting: VecDeque<(Ticket, IoRequest)>,
    /// Pages of register commands in flight.
    pages: Vec<(u32, Buf)>,
    pub(super) upkeep: Upkeep,
    /// The same failure is logged once, not at every try.
    last_error: String,
    retired: bool,
    pub(super) busy: bool,
}

impl Link {
    /// The session, where it can take requests.
    pub(super) fn ready_session(&mut self) -> Option<&mut Session> {
        self.session.as_mut().filter(|_| self.stage == Stage::Ready)
    }

    /// Whose it is.
    pub(super) fn nexus(&self) -> (u32, ChildId) {
        (self.volume, self.child)
    }

    /// The replica may be there.
    pub(super) fn try_also(&mut self, peer: SocketAddr) {
        if peer != self.peer {
            self.other = Some(peer);
        }
    }

    pub(super) fn new(
        volume: u32,
        child: ChildId,
        replica: ReplicaId,
        peer: SocketAddr,
        nqn: String,
        now: u64,
    ) -> Self {
        Self {
            volume,
            child,
            replica,
            peer,
            other: None,
            nqn,
            stage: Stage::Idle,
            session: None,
            next: None,
            queues: [LinkQueue::default(); 2],
            backoff_ms: BACKOFF_MIN_MS,
            retry_at_ms: now,
            ready_ms: None,
            waiting: VecDeque::with_capacity(64),
            pages: Vec::new(),
            upkeep: Upkeep::default(),
            last_error: String::new(),
            retired: false,
            busy: false,
        }
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn link_timeout(&mut self, at: u32, now: u64) {
        let link = &mut self.links[at];
        if link.stage == Stage::Idle {
            if now >= link.retry_at_ms {
                self.open_link(at, now);
            }
        } else if let Some(session) = link.session.as_mut() {
            session.handle_timeout(now, self.driver.memory());
        }
        self.touch_link(at);
        self.link_wants_timeout(at);
    }

    fn link_wants_timeout(&mut self, at: u32) {
        let link = &self.links[at];
        let next = match link.stage {
            Stage::Idle => Some(link.retry_at_ms),
            _ => link.session.as_ref().and_then(Session::poll_timeout),
        };
        self.wants_timeout(next);
    }

    fn new_session(&mut self, at: u32) -> Option<Session> {
        let config = SessionConfig {
            hostnqn: self.config.node_nqn.clone(),
            hostid: self.config.node_id,
            subnqn: self.links[at].nqn.clone(),
            kato_ms: self.config.replica_kato_ms,
            io_queues: 1,
            queue_entries: self.config.replica_queue_entries,
            header_digest: self.config.replica_header_digest,
            data_digest: self.config.replica_data_digest,
        };
        Session::new(config, self.driver.memory())
    }

    fn open_link(&mut self, at: u32, now: u64) {
        let session = self.links[at].next.take().or_else(|| self.new_session(at));
        let link = &mut self.links[at];
        match session {
            Some(session) => {
                link.session = Some(session);
                link.stage = Stage::Connecting;
            }
            None => link.retry_at_ms = now + BACKOFF_MAX_MS,
        }
        self.touch_link(at);
    }

    pub(super) fn handle_link_connected(
        &mut self,
        at: u32,
        queue: u16,
        result: Result<SocketId, SocketFault>,
        now: u64,
    ) {
        let Some(link) = self.links.get_mut(at) else { return };
        let slot = &mut link.queues[usize::from(queue)];
        slot.connecting = false;
        match result {
            Ok(socket) => {
                slot.socket = Some(socket);
                if link.stage == Stage::Closing {
                    self.submit(Op::Close { socket }, token(Subject::LinkClose, queue, at));
                    return;
                }
                if let Some(session) = link.session.as_mut() {
                    session.handle_connected(QueueIndex(queue), now, self.driver.memory());
                }
                self.submit(Op::Receive { socket }, token(Subject::LinkReceive, queue, at));
                self.touch_link(at);
            }
            Err(fault) => {
                let why = format!("connecting failed: {fault}");
                self.fail_link(at, &why);
                self.finish_link_if_closed(at, now);
            }
        }
    }

    pub(super) fn handle_link_bytes(&mut self, at: u32, queue: u16, chunk: Chunk, now: u64) {
        let Some(link) = self.links.get_mut(at) else {
            self.driver.release_chunk(chunk);
            return;
        };
        let mut failed = None;
        if link.stage != Stage::Closing
            && let Some(session) = link.session.as_mut()
        {
            let memory = self.driver.memory();
            failed = session.handle_recv(QueueIndex(queue), chunk.slice, now, memory).err();
        }
        self.driver.release_chunk(chunk);
        if let Some(error) = failed {
            self.fail_link(at, &error.to_string());
        }
        self.touch_link(at);
    }

    pub(super) fn handle_link_sent(
        &mut self,
        at: u32,
        queue: u16,
        result: Result<(), SocketFault>,
    ) {
        let Some(link) = self.links.get_mut(at) else { return };
        link.queues[usize::from(queue)].sending = false;
        if let Some(session) = link.session.as_mut() {
            session.tx(QueueIndex(queue)).handle_sent(self.driver.memory());
        }
        if let Err(fault) = result {
            self.fail_link(at, &format!("sending failed: {fault}"));
        }
        self.touch_link(at);
    }

    pub(super) fn handle_link_closed(&mut self, at: u32, queue: u16, now: u64) {
        if let Some(link) = self.links.get_mut(at) {
            link.queues[usize::from(queue)].socket = None;
            self.finish_link_if_closed(at, now);
        }
    }

    /// Gives the session up. What was in flight is answered once the sockets are closed: only then
    /// does the kernel not use the payload any more.
    pub(super) fn fail_link(&mut self, at: u32, why: &str) {
        let Some(link) = self.links.get_mut(at) else { return };
        if matches!(link.stage, Stage::Idle | Stage::Closing) {
            return;
        }
        if link.last_error != why && !link.retired {
            tracing::warn!(replica = %link.replica, peer = %link.peer, why, "replica link down");
            why.clone_into(&mut link.last_error);
        }
        link.stage = Stage::Closing;
        for (queue, slot) in (0u16..).zip(link.queues) {
            if let Some(socket) = slot.socket {
                self.driver.submit(Op::Close { socket }, token(Subject::LinkClose, queue, at));
            }
        }
        self.touch_link(at);
    }

    /// Takes a link down for good.
    pub(super) fn retire_link(&mut self, at: u32) {
        let Some(link) = self.links.get_mut(at) else { return };
        link.retired = true;
        if link.stage == Stage::Idle {
            self.drop_link(at);
        } else {
            self.fail_link(at, "the volume is being closed");
            let now = self.now_ms();
            self.finish_link_if_closed(at, now);
        }
    }

    /// A link that was taken down for good has no sockets any more.
    fn drop_link(&mut self, at: u32) {
        let Some(link) = self.links.remove(at) else { return };
        let (volume, child) = (link.volume, link.child);
        if let Some(next) = link.next {
            next.close(self.driver.memory());
        }
        if !self.is_way_to(at, volume, child) {
            return;
        }
        if let Some(v) = self.volumes.get_mut(volume).filter(|v| !v.removing()) {
            v.nexus.forget_child(child);
        }
    }

    /// Whether a link is the way to its child still, or was the last: one that had nothing in hand is retired
    /// while its child's place is another's already.
    fn is_way_to(&self, at: u32, volume: u32, child: ChildId) -> bool {
        let routes = self.volumes.get(volume).map(|v| v.routes.as_slice());
        match routes.and_then(|routes| routes.get(usize::from(child.0))) {
            Some(Route::Remote { link }) => *link == at,
            Some(Route::Gone) => true,
            Some(Route::Local(_)) | None => false,
        }
    }

    /// The volume is gone: what its links still answer is for nobody.
    pub(super) fn detach_links(&mut self, volume: u32) {
        for at in self.links.keys() {
            if self.links[at].volume == volume {
                self.links[at].volume = NO_VOLUME;
                self.retire_link(at);
            }
        }
    }

    /// A child's place is another's from now on: so are none of the links that it had.
    pub(super) fn detach_child_links(&mut self, volume: u32, child: ChildId) {
        for at in self.links.keys() {
            if self.links[at].nexus() == (volume, child) {
                self.links[at].volume = NO_VOLUME;
                self.retire_link(at);
            }
        }
    }

    fn finish_link_if_closed(&mut self, at: u32, now: u64) {
        let Some(link) = self.links.get_mut(at) else { return };
        let open = link.queues.iter().any(|q| q.socket.is_some() || q.connecting);
        if link.stage != Stage::Closing || open {
            return;
        }
        let (volume, child) = (link.volume, link.child);
        if let Some(mut session) = link.session.take() {
            session.fail();
            while let Some(done) = session.poll_completion() {
                self.link_completed(at, done, now);
            }
            while let Some(tag) = session.poll_abandoned() {
                self.link_abandoned(at, Ticket(tag), now);
            }
            session.close(self.driver.memory());
            if !self.links[at].retired {
                self.links[at].next = self.new_session(at);
            }
        }
        while let Some((ticket, _)) = self.links[at].waiting.pop_front() {
            self.child_io_done(volume, child, ticket, IoStatus::PathError, now);
        }
        while let Some((ticket, _)) = self.links[at].upkeep.waiting.pop_front() {
            self.child_io_done(volume, child, ticket, IoStatus::PathError, now);
        }
        let current = self.is_way_to(at, volume, child);
        if let Some(v) = self.volumes.get_mut(volume).filter(|_| current) {
            v.nexus.handle_child_down(child, now);
            self.touch_volume(volume);
        }
        let link = &mut self.links[at];
        link.stage = Stage::Idle;
        link.queues = [LinkQueue::default(); 2];
        // One that comes up and is given up at once is not tried again and again: its pool is offline, say.
        let ready_ms = link.ready_ms.take();
        if ready_ms.is_some_and(|since| now >= since + BACKOFF_MAX_MS) {
            link.backoff_ms = BACKOFF_MIN_MS;
        }
        if let (None, Some(other)) = (ready_ms, link.other.as_mut()) {
            std::mem::swap(&mut link.peer, other);
        }
        link.retry_at_ms = now + link.backoff_ms;
        link.backoff_ms = (link.backoff_ms * 2).min(BACKOFF_MAX_MS);
        if link.retired {
            self.drop_link(at);
        } else {
            self.link_wants_timeout(at);
        }
    }

    fn link_abandoned(&mut self, at: u32, ticket: Ticket, now: u64) {
        let link = &mut self.links[at];
        let (volume, child) = (link.volume, link.child);
        if Self::is_list(ticket.0) {
            self.list_answered(at, ticket.0, None);
        } else if ticket.is_register() {
            if let Some(page) = take_page(&mut link.pages, ticket.0) {
                self.driver.memory().release(page);
            }
            self.register_reply(volume, child, ticket, Err(IoStatus::PathError));
        } else {
            let status = self.upkeep_over(at, ticket, IoStatus::PathError);
            self.child_io_done(volume, child, ticket, status, now);
        }
    }

    fn register_reply(
        &mut self,
        volume: u32,
        child: ChildId,
        ticket: Ticket,
        reply: cairn_nexus::ChildReply,
    ) {
        if let Some(v) = self.volumes.get_mut(volume) {
            v.register_replies.push_back((child, ticket, reply));
            self.touch_volume(volume);
        }
    }

    /// An operation for a replica whose link is gone.
    pub(super) fn refuse_remote(&mut self, volume: u32, child: ChildId, ticket: Ticket, now: u64) {
        if ticket.is_register() {
            self.register_reply(volume, child, ticket, Err(IoStatus::PathError));
        } else {
            self.child_io_done(volume, child, ticket, IoStatus::PathError, now);
        }
    }

    /// An operation of the nexus for this replica.
    pub(super) fn send_remote(&mut self, at: u32, ticket: Ticket, op: ChildOp, now: u64) {
        let Some(link) = self.links.get_mut(at) else { return };
        let (volume, child) = (link.volume, link.child);
        match op {
            ChildOp::Io(request) => {
                if let IoOp::Snapshot(verb) = request.op {
                    let command = Submit::Vendor {
                        opcode: snapshot::opcode(verb),
                        cdw10: 0,
                        cdw11: 0,
                        data: VendorData::Out(request.buf),
                    };
                    let sent = link.ready_session().is_some_and(|s| {
                        s.submit(ADMIN_QUEUE, ticket.0, command, self.driver.memory()).is_ok()
                    });
                    if sent {
                        self.touch_link(at);
                    } else {
                        self.child_io_done(volume, child, ticket, IoStatus::PathError, now);
                    }
                    return;
                }
                let full = match link.session.as_mut().filter(|_| link.stage == Stage::Ready) {
                    None => Err(SubmitError::NotReady),
                    Some(_) if !link.waiting.is_empty() => Err(SubmitError::Full),
                    Some(session) => session.submit(
                        IO_QUEUE,
                        ticket.0,
                        Submit::Io(request),
                        self.driver.memory(),
                    ),
                };
                match full {
                    Ok(()) => self.touch_link(at),
                    Err(SubmitError::Full) => self.links[at].waiting.push_back((ticket, request)),
                    Err(_) => self.child_io_done(volume, child, ticket, IoStatus::PathError, now),
                }
            }
            ChildOp::Changes { .. }
            | ChildOp::SettleBegin { .. }
            | ChildOp::SettleEnd { .. }
            | ChildOp::GiveUpLost => {
                self.send_upkeep(at, ticket, op, now);
            }
            ChildOp::Register(op) => {
                if self.send_register(at, ticket, &op).is_none() {
                    self.register_reply(volume, child, ticket, Err(IoStatus::PathError));
                }
            }
        }
    }

    fn send_register(&mut self, at: u32, ticket: Ticket, op: &RegisterOp) -> Option<()> {
        self.links.get_mut(at)?.ready_session()?;
        let page = self.own_page()?;
        let link = self.links.get_mut(at)?;
        let session = link.session.as_mut()?;
        let memory = self.driver.memory();
        let window = page.slice();
        let (opcode, cdw10, cdw11, data) = match op {
            RegisterOp::Promise { epoch, again } => {
                let [low, high] = halves(epoch.0);
                let high = if *again { high | register::AGAIN } else { high };
                (register::OPCODE_PROMISE, low, high, VendorData::In(window))
            }
            RegisterOp::Accept(register) => {
                register::encode(register, memory.bytes_mut(window));
                (register::OPCODE_ACCEPT, 0, 0, VendorData::Out(window))
            }
            RegisterOp::Renew { epoch, lease_ms } => {
                let asked =
                    Register { accepted_epoch: *epoch, lease_ms: *lease_ms, ..Register::default() };
                register::encode(&asked, memory.bytes_mut(window));
                (register::OPCODE_RENEW, 0, 0, VendorData::Out(window))
            }
            RegisterOp::Resize { epoch, blocks } => {
                let asked =
                    Register { accepted_epoch: *epoch, blocks: *blocks, ..Register::default() };
                register::encode(&asked, memory.bytes_mut(window));
                (register::OPCODE_RESIZE, 0, 0, VendorData::Out(window))
            }
            RegisterOp::Read => (register::OPCODE_READ, 0, 0, VendorData::In(window)),
        };
        let command = Submit::Vendor { opcode, cdw10, cdw11, data };
        let submitted = session.submit(ADMIN_QUEUE, ticket.0, command, memory);
        if submitted.is_err() {
            memory.release(page);
            return None;
        }
        link.pages.push((ticket.0, page));
        self.touch_link(at);
        Some(())
    }

    pub(super) fn run_links(&mut self, now: u64) -> bool {
        let mut moved = false;
        // Those that stay busy are flushed after everything has settled.
        for i in 0..self.busy_links.len() {
            let at = self.busy_links[i];
            moved |= self.run_link(at, now);
        }
        moved
    }

    fn run_link(&mut self, at: u32, now: u64) -> bool {
        let mut moved = false;
        loop {
            let Some(link) = self.links.get_mut(at) else { return moved };
            if link.stage == Stage::Closing {
                // It may have failed with no socket to close.
                self.finish_link_if_closed(at, now);
                return moved;
            }
            let Some(session) = link.session.as_mut() else { return moved };
            if let Some(done) = session.poll_completion() {
                self.link_completed(at, done, now);
                moved = true;
                continue;
            }
            let Some(event) = session.poll_event() else { break };
            moved = true;
            match event {
                SessionEvent::OpenQueue(QueueIndex(queue)) => {
                    link.queues[usize::from(queue)].connecting = true;
                    let op = Op::Connect { peer: link.peer, timeout_ms: CONNECT_TIMEOUT_MS };
                    self.driver.submit(op, token(Subject::LinkConnect, queue, at));
                }
                SessionEvent::Ready(info) => self.link_ready(at, &info, now),
                SessionEvent::Failed(error) => {
                    self.fail_link(at, &error.to_string());
                    self.finish_link_if_closed(at, now);
                    return true;
                }
            }
        }
        moved |= self.send_waiting(at, now);
        moved |= self.send_waiting_upkeep(at, now);
        self.link_wants_timeout(at);
        moved
    }

    fn link_ready(&mut self, at: u32, info: &NamespaceInfo, now: u64) {
        let link = &mut self.links[at];
        let (volume, child) = (link.volume, link.child);
        let Some(v) = self.volumes.get_mut(volume) else { return };
        // One that is too small grows before the nexus uses it.
        if info.id != link.replica.0 {
            let why = format!("{} at {} is not replica {}", link.nqn, link.peer, link.replica);
            self.fail_link(at, &why);
            return;
        }
        let peer = link.peer;
        link.stage = Stage::Ready;
        link.ready_ms = Some(now);
        if !link.last_error.is_empty() {
            tracing::info!(replica = %link.replica, peer = %link.peer, "replica link up again");
            link.last_error.clear();
        }
        v.nexus.handle_child_up(child, now);
        self.child_moved(volume, child, peer);
        self.touch_volume(volume);
    }

    fn link_completed(&mut self, at: u32, done: Completed, now: u64) {
        let link = &mut self.links[at];
        let (volume, child, ticket) = (link.volume, link.child, Ticket(done.tag));
        if Self::is_list(done.tag) {
            self.list_answered(at, done.tag, Some(done.status));
            return;
        }
        if !ticket.is_register() {
            self.child_verified(volume, ticket, done.result);
            let status = self.upkeep_over(at, ticket, done.io_status);
            self.child_io_done(volume, child, ticket, status, now);
            return;
        }
        let page = take_page(&mut link.pages, done.tag);
        let memory = self.driver.memory();
        let held = page.as_ref().and_then(|p| register::decode(memory.bytes(p.slice())));
        if let Some(page) = page {
            memory.release(page);
        }
        let reply = match (done.status.is_success(), held) {
            (true, Some(register)) => Ok(register),
            (true, None) => Err(IoStatus::InvalidField),
            (false, _) => Err(done.io_status),
        };
        self.register_reply(volume, child, ticket, reply);
    }

    /// Sends what waited for a free slot. Returns whether anything was sent.
    fn send_waiting(&mut self, at: u32, now: u64) -> bool {
        let mut moved = false;
        while let Some(link) = self.links.get_mut(at)
            && link.stage == Stage::Ready
            && let Some(&(ticket, request)) = link.waiting.front()
            && let Some(session) = link.session.as_mut()
        {
            let submitted =
                session.submit(IO_QUEUE, ticket.0, Submit::Io(request), self.driver.memory());
            match submitted {
                Err(SubmitError::Full) => break,
                Ok(()) => {
                    link.waiting.pop_front();
                }
                Err(_) => {
                    let (volume, child) = (link.volume, link.child);
                    link.waiting.pop_front();
                    self.child_io_done(volume, child, ticket, IoStatus::PathError, now);
                }
            }
            moved = true;
        }
        moved
    }

    /// Sends what has piled up on each link, a batch each.
    pub(super) fn flush_links(&mut self) {
        while let Some(at) = self.busy_links.pop() {
            let Some(link) = self.links.get_mut(at) else { continue };
            link.busy = false;
            if link.stage == Stage::Closing {
                continue;
            }
            let Some(session) = link.session.as_mut() else { continue };
            for (queue, slot) in (0u16..).zip(&mut link.queues) {
                let Some(socket) = slot.socket.filter(|_| !slot.sending) else { continue };
                let tx = session.tx(QueueIndex(queue));
                if tx.wants_send() {
                    tx.take_batch(&mut self.windows);
                    slot.sending = true;
                    let op = Op::Send { socket, windows: &self.windows };
                    self.driver.submit(op, token(Subject::LinkSend, queue, at));
                }
            }
        }
    }

    /// `connecting`, `online`, ... of a link, and the last failure.
    pub(super) fn link_report(&self, at: u32) -> (&'static str, String) {
        let Some(link) = self.links.get(at) else { return ("gone", String::new()) };
        let word = match link.stage {
            Stage::Ready => "up",
            Stage::Idle | Stage::Closing => "down",
            Stage::Connecting => "connecting",
        };
        (word, link.last_error.clone())
    }
}

fn take_page(pages: &mut Vec<(u32, Buf)>, tag: u32) -> Option<Buf> {
    let at = pages.iter().position(|(t, _)| *t == tag)?;
    Some(pages.swap_remove(at).1)
}

fn halves(value: u64) -> [u32; 2] {
    let b = value.to_le_bytes();
    [u32::from_le_bytes([b[0], b[1], b[2], b[3]]), u32::from_le_bytes([b[4], b[5], b[6], b[7]])]
}
