//! The initiator: a [`Session`] is one association with a controller of a subsystem.
//!
//! The caller owns the TCP connections, one for each queue. It opens them when
//! [`SessionEvent::OpenQueue`] asks for it, and tells which bytes came on which.

mod queue;
mod setup;

use std::collections::VecDeque;

use cairn_block::{BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Memory};

use self::queue::{Data, Done, HostQueue, Owner};
use self::setup::Step;
use crate::log::DISCOVERY_NQN;
use crate::pdu::{Digests, Violation};
use crate::sqe::{Sqe, opcode};
use crate::status::Status;
use crate::target::{ADMIN_IN_CAPSULE_LEN, MAX_NQN_LEN};
use crate::tx::TxQueue;

/// Entries of the admin queue.
const ADMIN_ENTRIES: u16 = 32;
/// Entries of the admin queue that are the session's own.
const ADMIN_RESERVED: usize = 2;
/// How long the controller may take for one answer on the way to readiness.
const ANSWER_TIMEOUT_MS: u64 = 10_000;
/// The most blocks of one command: NLB has 16 bits.
const MAX_BLOCKS: u64 = 1 << 16;

/// One queue of a session: 0 is the admin queue, the others are I/O queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u16);

/// What to connect to, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// The host's NQN.
    pub hostnqn: String,
    /// The host's identifier.
    pub hostid: u128,
    /// The subsystem's NQN, or that of discovery.
    pub subnqn: String,
    /// Keep Alive Timeout in milliseconds; 0 for none.
    pub kato_ms: u32,
    /// I/O queues to ask for; the controller may grant fewer.
    pub io_queues: u16,
    /// Entries of an I/O queue; one less may be outstanding.
    pub queue_entries: u16,
    /// Whether to use header digests.
    pub header_digest: bool,
    /// Whether to use data digests.
    pub data_digest: bool,
}

/// Why an association has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The controller broke the protocol.
    #[error("the controller broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The controller sent a C2HTermReq.
    #[error("the controller ended the connection: FES {fes}, FEI {fei}")]
    Terminated {
        /// Its Fatal Error Status.
        fes: u16,
        /// Its Fatal Error Information.
        fei: u32,
    },
    /// A PDU names a command that is not outstanding.
    #[error("the controller answers command {cid}, which is not outstanding")]
    UnknownCommand {
        /// Its command identifier.
        cid: u16,
    },
    /// The controller refused a command without which there is no association.
    #[error("the controller refused {command}: {status}, result {result:#x}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its status.
        status: Status,
        /// Its DW0 and DW1.
        result: u64,
    },
    /// The subsystem has no active namespace.
    #[error("the subsystem has no namespace for this host")]
    NoNamespace,
    /// What the controller says of itself cannot be used.
    #[error("the controller states something unusable: {what}")]
    Unusable {
        /// What it is.
        what: &'static str,
    },
    /// An answer is overdue.
    #[error("the controller did not answer {command} in time")]
    Overdue {
        /// The command.
        command: &'static str,
    },
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is no entry or no header space left; try after a completion or a sent batch.
    #[error("the queue is full")]
    Full,
    /// The queue is not ready, or the association has failed.
    #[error("the queue is not ready")]
    NotReady,
    /// The request cannot be said in one command: too long, or its buffer does not fit its range.
    #[error("the request does not fit one command")]
    Invalid,
}

/// What the session asks of its caller, or tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// Open a connection for this queue; then [`Session::handle_connected`].
    OpenQueue(QueueIndex),
    /// I/O may begin.
    Ready(NamespaceInfo),
    /// The association has failed: close its connections and call [`Session::fail`].
    Failed(SessionError),
}

/// What the session is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceInfo {
    /// NSID; 0 for a discovery controller.
    pub nsid: u32,
    /// Capacity in blocks.
    pub blocks: u64,
    /// The size of a block.
    pub block_size: BlockSize,
    /// The most data of one command, in bytes.
    pub max_transfer: u32,
    /// Whether writes need a Flush to be durable.
    pub volatile_write_cache: bool,
    /// NGUID.
    pub id: u128,
    /// The subsystem's serial number.
    pub serial: String,
    /// The subsystem's model number.
    pub model: String,
    /// CNTLID.
    pub cntlid: u16,
    /// I/O queues that are connected: 1 to this.
    pub io_queues: u16,
}

/// The data of a vendor specific command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VendorData {
    /// There is none.
    None,
    /// To the controller.
    Out(BufSlice),
    /// From the controller.
    In(BufSlice),
}

/// A request. Its windows are the caller's; they must stay as they are until it completes, or until
/// its connection is closed and nothing of it is in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submit {
    /// Block I/O, on an I/O queue. A discard is of one range.
    Io(IoRequest),
    /// A write that is done whole or not at all, on an I/O queue: of a volume, which says so or refuses.
    Atomic(IoRequest),
    /// A vendor specific command, on the admin queue. Bits 1:0 of its opcode say where its data goes.
    Vendor {
        /// C0h to FFh.
        opcode: u8,
        /// CDW10.
        cdw10: u32,
        /// CDW11.
        cdw11: u32,
        /// Its data.
        data: VendorData,
    },
    /// Get Log Page, on the admin queue.
    GetLog {
        /// Log Page Identifier.
        lid: u8,
        /// Bytes from the start of the page, a multiple of 4.
        offset: u64,
        /// Where it goes: its length, a multiple of 4, is what is asked for.
        data: BufSlice,
    },
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// The queue it was submitted on.
    pub queue: QueueIndex,
    /// The caller's tag.
    pub tag: u32,
    /// What the controller said.
    pub status: Status,
    /// What it means. `TransferError` where data was damaged, whatever the controller said.
    pub io_status: IoStatus,
    /// DW0 and DW1.
    pub result: u64,
    /// Bytes that came.
    pub data_len: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    /// ICReq or Connect is on its way.
    Connecting,
    Up,
}

/// One association with a controller.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    /// The admin queue first.
    queues: Vec<HostQueue>,
    links: Vec<Link>,
    step: Step,
    /// When the answer that `step` waits for is overdue.
    deadline_ms: Option<u64>,
    /// When to ask for CSTS again.
    poll_ready_ms: Option<u64>,
    /// When the controller must be ready.
    ready_by_ms: u64,
    next_keep_alive_ms: Option<u64>,
    keep_alive_by_ms: Option<u64>,
    /// Where Identify puts its answers.
    scratch: Buf,
    info: NamespaceInfo,
    in_capsule_len: u32,
    events: VecDeque<SessionEvent>,
    completions: VecDeque<Completed>,
    abandoned: Vec<u32>,
}

impl Session {
    /// An association that asks for its first connection; nothing where `mem` has no room for the
    /// header rings.
    ///
    /// # Panics
    /// Where an NQN of `config` has more than 223 bytes.
    #[must_use]
    pub fn new<M: Memory>(config: SessionConfig, mem: &mut M) -> Option<Self> {
        assert!(
            config.hostnqn.len() <= MAX_NQN_LEN && config.subnqn.len() <= MAX_NQN_LEN,
            "an NQN has at most {MAX_NQN_LEN} bytes"
        );
        let wanted = Digests { header: config.header_digest, data: config.data_digest };
        let io_queues = if config.subnqn == DISCOVERY_NQN { 0 } else { config.io_queues };
        let scratch = mem.alloc(4096)?;
        let mut queues = Vec::with_capacity(usize::from(io_queues) + 1);
        let mut slots = 0;
        for q in 0..=io_queues {
            let len = if q == 0 { ADMIN_ENTRIES } else { config.queue_entries };
            slots += usize::from(len);
            let Some(queue) = HostQueue::new(len, wanted, mem) else {
                queues.into_iter().for_each(|queue: HostQueue| queue.close(mem));
                mem.release(scratch);
                return None;
            };
            queues.push(queue);
        }
        let mut events = VecDeque::with_capacity(queues.len() + 2);
        events.push_back(SessionEvent::OpenQueue(QueueIndex(0)));
        Some(Self {
            links: vec![Link::Down; queues.len()],
            queues,
            config,
            step: Step::Start,
            deadline_ms: None,
            poll_ready_ms: None,
            ready_by_ms: 0,
            next_keep_alive_ms: None,
            keep_alive_by_ms: None,
            scratch,
            info: NamespaceInfo::default(),
            in_capsule_len: 0,
            events,
            completions: VecDeque::with_capacity(slots),
            abandoned: Vec::with_capacity(slots),
        })
    }

    /// What to do, or what has happened.
    pub fn poll_event(&mut self) -> Option<SessionEvent> {
        self.events.pop_front()
    }

    /// The connection of a queue is up.
    pub fn handle_connected<M: Memory>(&mut self, q: QueueIndex, now_ms: u64, mem: &mut M) {
        let at = usize::from(q.0);
        if self.step == Step::Failed || self.links.get(at) != Some(&Link::Down) {
            return;
        }
        self.links[at] = Link::Connecting;
        self.queues[at].start(mem);
        self.deadline_ms = Some(now_ms.saturating_add(ANSWER_TIMEOUT_MS));
        if q.0 == 0 {
            self.step = Step::AdminConnect;
        }
    }

    /// Takes bytes that came on a queue. The data of reads is copied to where they want it.
    ///
    /// # Errors
    /// The association has failed: close its connections and call [`Session::fail`].
    pub fn handle_recv<M: Memory>(
        &mut self,
        q: QueueIndex,
        chunk: BufSlice,
        now_ms: u64,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        let at = usize::from(q.0);
        if self.step == Step::Failed || at >= self.queues.len() || self.links[at] == Link::Down {
            return Ok(());
        }
        let was_agreed = self.queues[at].is_agreed();
        let received = self.queues[at].handle_recv(chunk, mem);
        let result = received.and_then(|()| {
            if !was_agreed && self.queues[at].is_agreed() {
                self.send_connect(q, mem);
            }
            while let Some(done) = self.queues[at].poll_done() {
                self.handle_done(q, &done, now_ms, mem)?;
            }
            Ok(())
        });
        if result.is_err() {
            self.step = Step::Failed;
        }
        result
    }

    /// What there is to send on a queue.
    ///
    /// # Panics
    /// Where the session has no such queue.
    pub fn tx(&mut self, q: QueueIndex) -> &mut TxQueue {
        self.queues[usize::from(q.0)].tx()
    }

    /// Sends a Keep Alive that is due, polls readiness, and notices what is overdue.
    pub fn handle_timeout<M: Memory>(&mut self, now_ms: u64, mem: &mut M) {
        if self.step == Step::Failed {
            return;
        }
        if self.deadline_ms.is_some_and(|at| at <= now_ms) {
            return self.give_up(SessionError::Overdue { command: self.step.command() });
        }
        if self.keep_alive_by_ms.is_some_and(|at| at <= now_ms) {
            return self.give_up(SessionError::Overdue { command: "Keep Alive" });
        }
        if self.poll_ready_ms.is_some_and(|at| at <= now_ms) {
            self.poll_ready_ms = None;
            self.ask_csts(now_ms, mem);
        }
        if self.next_keep_alive_ms.is_some_and(|at| at <= now_ms) {
            let sqe = Sqe::new(opcode::KEEP_ALIVE);
            let sent = self.queues[0].submit(Owner::KeepAlive, sqe, Data::None, 0, mem);
            let kato = u64::from(self.config.kato_ms);
            self.plan_keep_alive(now_ms);
            if sent && self.keep_alive_by_ms.is_none() {
                self.keep_alive_by_ms = Some(now_ms.saturating_add(kato));
            }
        }
    }

    /// The next Keep Alive is due within half of the timeout, where the clock is a multiple of that: all sessions of a
    /// process send theirs together, and an idle one wakes up once for all.
    fn plan_keep_alive(&mut self, now_ms: u64) {
        let half = u64::from(self.config.kato_ms / 2).max(1);
        self.next_keep_alive_ms = Some((now_ms / half).saturating_add(1).saturating_mul(half));
    }

    /// When [`Session::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        if self.step == Step::Failed {
            return None;
        }
        [self.deadline_ms, self.keep_alive_by_ms, self.poll_ready_ms, self.next_keep_alive_ms]
            .into_iter()
            .flatten()
            .min()
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The request was not taken, and nothing of it was sent.
    pub fn submit<M: Memory>(
        &mut self,
        q: QueueIndex,
        tag: u32,
        request: Submit,
        mem: &mut M,
    ) -> Result<(), SubmitError> {
        if self.step != Step::Ready || self.links.get(usize::from(q.0)) != Some(&Link::Up) {
            return Err(SubmitError::NotReady);
        }
        if self.free_slots(q) == 0 {
            return Err(SubmitError::Full);
        }
        let range;
        let (sqe, data) = match request {
            Submit::Io(request) if q.0 > 0 => {
                if request.op == IoOp::Discard {
                    let blocks =
                        u32::try_from(request.range.blocks()).map_err(|_| SubmitError::Invalid)?;
                    range = crate::target::encode_dsm_range(request.range.start().0, blocks);
                    let ad = Sqe::new(opcode::DATASET_MANAGEMENT).with_cdw(11, 1 << 2);
                    (ad.with_nsid(self.info.nsid), Data::Inline(&range[..]))
                } else {
                    self.encode_io(&request)?
                }
            }
            Submit::Atomic(request) if q.0 > 0 && matches!(request.op, IoOp::Write { .. }) => {
                let (mut sqe, data) = self.encode_io(&request)?;
                sqe.0[0] = opcode::WRITE_ATOMIC;
                (sqe, data)
            }
            Submit::Vendor { opcode: code, cdw10, cdw11, data } if q.0 == 0 => {
                let sqe = Sqe::new(code)
                    .with_nsid(self.info.nsid)
                    .with_cdw(10, cdw10)
                    .with_cdw(11, cdw11);
                let data = match (data, code & 3) {
                    (VendorData::None, _) => Data::None,
                    (VendorData::Out(window), 1) if !window.is_empty() => Data::Out(window),
                    (VendorData::In(window), 2) if !window.is_empty() => Data::In(window),
                    _ => return Err(SubmitError::Invalid),
                };
                (sqe, data)
            }
            Submit::GetLog { lid, offset, data } if q.0 == 0 => {
                (encode_get_log(lid, offset, data)?, Data::In(data))
            }
            _ => return Err(SubmitError::Invalid),
        };
        let limit = if q.0 == 0 { ADMIN_IN_CAPSULE_LEN } else { self.in_capsule_len };
        let queue = &mut self.queues[usize::from(q.0)];
        if queue.submit(Owner::User(tag), sqe, data, limit, mem) {
            Ok(())
        } else {
            Err(SubmitError::Full)
        }
    }

    /// Requests that a queue can take; 0 where it is not ready.
    #[must_use]
    pub fn free_slots(&self, q: QueueIndex) -> usize {
        let at = usize::from(q.0);
        if self.step != Step::Ready || self.links.get(at) != Some(&Link::Up) {
            return 0;
        }
        let reserved = if q.0 == 0 { ADMIN_RESERVED } else { 0 };
        self.queues[at].free_slots().saturating_sub(reserved)
    }

    /// The next request that has ended. To be asked after received bytes and after a sent batch.
    pub fn poll_completion(&mut self) -> Option<Completed> {
        if let Some(completed) = self.completions.pop_front() {
            return Some(completed);
        }
        let sent = (0u16..).zip(&mut self.queues);
        let mut sent = sent.filter_map(|(q, queue)| Some((QueueIndex(q), queue.poll_sent()?)));
        sent.next().and_then(|(q, done)| completed(q, &done))
    }

    /// After [`Session::fail`]: the tag of the next request that will never complete. Whether it was
    /// carried out is not known.
    pub fn poll_abandoned(&mut self) -> Option<u32> {
        self.abandoned.pop()
    }

    /// The association is over. What completed before can still be polled.
    pub fn fail(&mut self) {
        self.step = Step::Failed;
        self.events.clear();
        for (q, queue) in (0u16..).zip(&mut self.queues) {
            while let Some(done) = queue.poll_unsent() {
                self.completions.extend(completed(QueueIndex(q), &done));
            }
            self.abandoned.extend(queue.abandon().filter_map(|owner| match owner {
                Owner::User(tag) => Some(tag),
                Owner::Setup | Owner::KeepAlive => None,
            }));
        }
    }

    /// Gives every buffer back. Nothing of any queue may be in flight any more.
    pub fn close<M: Memory>(self, mem: &mut M) {
        mem.release(self.scratch);
        for queue in self.queues {
            queue.close(mem);
        }
    }

    fn give_up(&mut self, error: SessionError) {
        self.step = Step::Failed;
        self.events.push_back(SessionEvent::Failed(error));
    }

    fn encode_io(&self, request: &IoRequest) -> Result<(Sqe, Data<'static>), SubmitError> {
        let (code, flags, data) = match request.op {
            IoOp::Flush => {
                return Ok((Sqe::new(opcode::FLUSH).with_nsid(self.info.nsid), Data::None));
            }
            IoOp::Read => (opcode::READ, 0, Data::In(request.buf)),
            IoOp::Write { fua } => (opcode::WRITE, u32::from(fua) << 30, Data::Out(request.buf)),
            IoOp::WriteZeroes { fua, unmap } => {
                let flags = u32::from(fua) << 30 | u32::from(unmap) << 25;
                (opcode::WRITE_ZEROES, flags, Data::None)
            }
            IoOp::Discard | IoOp::Snapshot(_) => return Err(SubmitError::Invalid),
            IoOp::Verify => (opcode::VERIFY, 0, Data::None),
        };
        let blocks = request.range.blocks();
        if blocks == 0 || blocks > MAX_BLOCKS {
            return Err(SubmitError::Invalid);
        }
        if !matches!(data, Data::None) {
            let len = blocks << self.info.block_size.shift();
            if len != u64::from(request.buf.len()) || request.buf.len() > self.info.max_transfer {
                return Err(SubmitError::Invalid);
            }
        }
        let nlb = u32::try_from(blocks - 1).map_err(|_| SubmitError::Invalid)?;
        let sqe = Sqe::new(code)
            .with_nsid(self.info.nsid)
            .with_slba(request.range.start().0)
            .with_cdw(12, nlb | flags);
        Ok((sqe, data))
    }

    fn handle_done<M: Memory>(
        &mut self,
        q: QueueIndex,
        done: &Done,
        now_ms: u64,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        match done.owner {
            Owner::User(_) => {
                self.completions.extend(completed(q, done));
                Ok(())
            }
            Owner::KeepAlive => {
                self.keep_alive_by_ms = None;
                refused_unless_success("Keep Alive", done)
            }
            Owner::Setup => self.handle_setup(q, done, now_ms, mem),
        }
    }
}

/// What the caller is told of a command of its own.
fn completed(queue: QueueIndex, done: &Done) -> Option<Completed> {
    let Owner::User(tag) = done.owner else { return None };
    let io_status = if done.damaged { IoStatus::TransferError } else { done.status.io_status() };
    let Done { status, result, data_len, .. } = *done;
    Some(Completed { queue, tag, status, io_status, result, data_len })
}

fn refused_unless_success(command: &'static str, done: &Done) -> Result<(), SessionError> {
    if done.damaged {
        return Err(SessionError::Unusable { what: "damaged data" });
    }
    if done.status.is_success() {
        return Ok(());
    }
    Err(SessionError::Refused { command, status: done.status, result: done.result })
}

fn encode_get_log(lid: u8, offset: u64, data: BufSlice) -> Result<Sqe, SubmitError> {
    if data.is_empty() || !data.len().is_multiple_of(4) {
        return Err(SubmitError::Invalid);
    }
    let numd = data.len() / 4 - 1;
    let [o0, o1, o2, o3, o4, o5, o6, o7] = offset.to_le_bytes();
    Ok(Sqe::new(opcode::GET_LOG_PAGE)
        .with_cdw(10, u32::from(lid) | (numd & 0xffff) << 16)
        .with_cdw(11, numd >> 16)
        .with_cdw(12, u32::from_le_bytes([o0, o1, o2, o3]))
        .with_cdw(13, u32::from_le_bytes([o4, o5, o6, o7])))
}

#[cfg(test)]
mod tests;
