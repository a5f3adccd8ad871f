//! One connection of the target: bytes in, commands out; completions in, PDUs out.
//!
//! A session has one connection here, so what belongs to the session (command numbering, what was
//! agreed on) is kept with it.

mod receive;
mod send;
mod task;
mod time;

use std::collections::VecDeque;
use std::fmt;

use cairn_block::reservation::{Refusal, Reservations};
use cairn_block::{Buf, BufSlice, IoStatus, Memory, TxQueue};

use self::receive::Stage;
pub(crate) use self::task::Aborted;
use self::task::{CopyRecord, OutData, State, Task};
use crate::keys::{Offer, Params};
use crate::login::{FULL_FEATURE, Login, LoginStatus};
use crate::pdu::{BHS_LEN, LoginRequest, NO_TAG, RejectReason};
use crate::rx::HeaderReader;
use crate::scsi::inquiry::Limits;
use crate::scsi::opcodes::allocation_len;
use crate::scsi::sense::{Sense, Status};
use crate::scsi::{ReserveIn, SanitizeEnd, UnitHandle};
use crate::wire::{len32, put, u64_at};

/// Tasks that immediate commands may take beside those of the command window.
const IMMEDIATE_TASKS: u16 = 16;
/// Ring bytes that the end of any task takes at most: those of a Reject with the header that it
/// rejects, and two digests. A SCSI Response with sense data takes less.
const RESPONSE_RESERVE: u32 = 48 + 4 + 48 + 4;
/// Ring bytes for what belongs to no task: a Reject, a NOP-In, an Async message.
const CONNECTION_RESERVE: u32 = 512;
/// The most data of one PDU that goes through the ring, in bytes.
const RING_SEGMENT: u32 = 4096;
/// Windows that the end of a task may queue.
const RESPONSE_ITEMS: usize = 2;

/// The most data of a command that is carried out in steps, in bytes.
pub(crate) const MAX_TRANSFER_LEN: u32 = 16 << 20;

/// The limits of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionConfig {
    /// The most data of one request of the disk, in bytes: a longer READ or WRITE is several, one after the other.
    pub max_data_len: u32,
    /// What the keys are negotiated from.
    pub offer: Offer,
    /// Commands that may be outstanding: the command window.
    pub max_tasks: u16,
    /// How long a login may take.
    pub login_timeout_ms: u64,
    /// After how long a silence the initiator is asked whether it is there; as long again and the
    /// connection ends.
    pub nop_interval_ms: u64,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            max_data_len: 1 << 20,
            offer: Offer::default(),
            max_tasks: 128,
            login_timeout_ms: 15_000,
            nop_interval_ms: 10_000,
        }
    }
}

/// A command's place in its connection, from [`Connection::poll_command`] to its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u16);

/// A request whose data has arrived whole.
#[derive(Debug)]
pub struct Command {
    /// Where its completion goes.
    pub slot: SlotId,
    /// What is asked.
    pub request: Request,
    /// The initiator's data, of commands that bring any.
    pub data: Option<Buf>,
}

/// What an initiator asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// A Login Request; [`Connection::login_text`] has its text.
    Login(LoginRequest),
    /// A Text Request.
    Text,
    /// A Logout Request.
    Logout {
        /// Reason code: 0 closes the session, 1 the connection, 2 removes it for recovery.
        reason: u8,
        /// The connection to close.
        cid: u16,
    },
    /// A Task Management Function Request.
    TaskManagement {
        /// Function.
        function: u8,
        /// The logical unit's eight bytes.
        lun: u64,
        /// Referenced Task Tag.
        rtt: u32,
        /// RefCmdSN.
        ref_cmd_sn: u32,
    },
    /// A SCSI command.
    Scsi(ScsiCommand),
}

/// A SCSI command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScsiCommand {
    /// The logical unit's eight bytes.
    pub lun: u64,
    /// The CDB, or the first 16 bytes of a longer one.
    pub cdb: [u8; 16],
    /// Whether the CDB is longer than 16 bytes.
    pub extended: bool,
    /// Expected Data Transfer Length.
    pub edtl: u32,
    /// Bytes that the CDB wants of the initiator, by what was known of the unit when it came.
    pub wanted: u64,
    /// Bytes that have come of them.
    pub received: u32,
    /// Bytes of the command's data that are done: of a later step than the first.
    pub done: u32,
    /// What was written before it has been made durable for it: of a command that was handed out as a flush.
    pub flushed: bool,
}

/// Blocks that follow each other and are all mapped, or all not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LbaExtent {
    /// How many.
    pub blocks: u32,
    /// Whether they take space.
    pub mapped: bool,
}

/// Why the reservations are as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotReserved {
    /// The change was refused.
    Refused(Refusal),
    /// What came of it could not be stored.
    NotStored(IoStatus),
}

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The login failed; the response says so.
    Login(LoginStatus),
    /// The initiator logged out.
    LoggedOut,
    /// A header was damaged on its way.
    HeaderDigest,
    /// The initiator broke the protocol.
    Protocol(&'static str),
    /// The login took too long.
    LoginTimeout,
    /// The initiator went silent.
    Silent,
    /// Data that the initiator was asked for did not come.
    DataTimeout,
    /// The target ended the session.
    Dropped,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Login(status) => write!(f, "the login failed: {status}"),
            Self::LoggedOut => f.write_str("the initiator logged out"),
            Self::HeaderDigest => f.write_str("a header's digest did not match"),
            Self::Protocol(what) => write!(f, "the initiator broke the protocol: {what}"),
            Self::LoginTimeout => f.write_str("the initiator did not log in in time"),
            Self::Silent => f.write_str("the initiator did not answer any more"),
            Self::DataTimeout => {
                f.write_str("the initiator did not send the data that it was asked for")
            }
            Self::Dropped => f.write_str("the target ended the session"),
        }
    }
}

/// Which session the connection is, once it has logged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) session: u32,
    pub(crate) generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Login,
    FullFeature { discovery: bool },
}

/// The target's side of one connection.
#[derive(Debug)]
pub struct Connection {
    config: ConnectionConfig,
    tx: TxQueue,
    header: HeaderReader,
    stage: Stage,
    phase: Phase,
    pub(crate) login: Option<Box<Login>>,
    params: Params,
    cid: u16,
    portal_group: u16,
    tasks: Vec<Task>,
    /// The tag of each task, close together for they are searched.
    itts: Vec<u32>,
    free: Vec<u16>,
    ready: VecDeque<u16>,
    /// Tasks whose R2T waits for a buffer, or for room to send it.
    waiting: VecDeque<u16>,
    /// Tasks whose data waits for room to be sent.
    sending: VecDeque<u16>,
    /// Commands given back by [`Connection::park`], or that have waited for a flush.
    parked: VecDeque<u16>,
    /// Reads of which a step is on its way, and how far that is: the next one begins once it is sent.
    parts: Vec<(u16, u64)>,
    /// The text of a login or of a Text Request.
    text: Vec<u8>,
    /// The header of the last Text Request.
    text_header: [u8; BHS_LEN],
    /// What is left to send of a text response.
    text_out: Vec<u8>,
    stalled_for_memory: bool,
    /// Tasks that hold a buffer and wait for data of this stream.
    receiving: usize,
    out: usize,
    stat_sn: u32,
    exp_cmd_sn: u32,
    max_cmd_sn: u32,
    /// Counts tasks, so that a late Data-Out does not meet the next task of its slot.
    next_tag: u16,
    close_reason: Option<CloseReason>,
    pub(crate) binding: Option<Binding>,
    /// The block size of each LUN, as a base-2 logarithm: it says how much data a command wants.
    shifts: Vec<u8>,
    /// The state of the configuration that `shifts` is of.
    pub(crate) shifts_of: u64,
    /// The last copies, for RECEIVE COPY RESULTS.
    copies: VecDeque<CopyRecord>,
    /// Tasks of immediate requests.
    immediates: usize,
    /// The stream was not taken to its end.
    stalled: bool,
    /// A logout is under way.
    leaving: bool,
    /// The answer to a login that has succeeded: TSIH and text.
    welcome: Option<(u16, Vec<u8>)>,
    /// Up to here is sent what the last ping with data brought.
    echoed: u64,
    heard: bool,
    /// The initiator was asked whether it is there, and this far is sent then.
    pinged: Option<u64>,
    /// Intervals in which nothing went out, though there was something to send.
    unsent: u32,
    deadline_ms: Option<u64>,
    /// It is over, and what is left to send has had its time.
    lingered: bool,
}

impl Connection {
    /// A connection that was just accepted, at a portal of this group; nothing where `mem` has no
    /// room for its header ring. `entropy` makes the challenge that the initiator has to answer: random, and used once.
    #[must_use]
    pub fn new<M: Memory>(
        config: &ConnectionConfig,
        portal_group: u16,
        entropy: &[u8; 32],
        mem: &mut M,
    ) -> Option<Self> {
        let mut config = *config;
        config.max_data_len = config.max_data_len.min(mem.max_alloc());
        let n = config.max_tasks + IMMEDIATE_TASKS;
        let ring = u32::from(n) * RESPONSE_RESERVE + CONNECTION_RESERVE + 2 * RING_SEGMENT;
        let tx = TxQueue::new(ring, RESPONSE_ITEMS * usize::from(n) + 256, mem)?;
        Some(Self {
            config,
            tx,
            header: HeaderReader::new(),
            stage: Stage::Header,
            phase: Phase::Login,
            login: Some(Box::new(Login::new(entropy))),
            params: Params::default(),
            cid: 0,
            portal_group,
            tasks: std::iter::repeat_with(Task::free).take(usize::from(n)).collect(),
            itts: vec![NO_TAG; usize::from(n)],
            free: (0..n).rev().collect(),
            ready: VecDeque::with_capacity(usize::from(n)),
            waiting: VecDeque::with_capacity(usize::from(n)),
            sending: VecDeque::with_capacity(usize::from(n)),
            parked: VecDeque::with_capacity(usize::from(n)),
            parts: Vec::new(),
            text: Vec::new(),
            text_header: [0; BHS_LEN],
            text_out: Vec::new(),
            stalled_for_memory: false,
            receiving: 0,
            out: 0,
            stat_sn: 1,
            exp_cmd_sn: 0,
            max_cmd_sn: 0,
            next_tag: 0,
            close_reason: None,
            binding: None,
            shifts: Vec::new(),
            shifts_of: 0,
            copies: VecDeque::new(),
            immediates: 0,
            stalled: false,
            leaving: false,
            welcome: None,
            echoed: 0,
            heard: false,
            pinged: None,
            unsent: 0,
            deadline_ms: None,
            lingered: false,
        })
    }

    /// The next request whose data has arrived whole.
    pub fn poll_command(&mut self) -> Option<Command> {
        if self.close_reason.is_some() || self.leaving {
            return None;
        }
        let index = self.ready.pop_front()?;
        let task = &mut self.tasks[usize::from(index)];
        task.state = State::Out;
        self.out += 1;
        let mut request = task.request;
        if let Request::Scsi(scsi) = &mut request {
            scsi.wanted = task.wanted;
            scsi.received = task.received.min(task.need);
            scsi.done = task.start;
        }
        Some(Command { slot: SlotId(index), request, data: task.buf.take() })
    }

    /// Ends a request of the disk that brings no data. The command's buffer had better be released
    /// before: it may be what the next one needs.
    ///
    /// # Panics
    /// Where the slot was not handed out, or was completed before.
    pub fn complete<M: Memory>(&mut self, slot: SlotId, status: IoStatus, mem: &mut M) {
        self.end_copy(slot, status.is_ok());
        let task = &self.tasks[usize::from(slot.0)];
        match task.request {
            Request::TaskManagement { .. } => self.respond_task_management(slot, 0, mem),
            Request::Logout { .. } => self.respond_logout(slot, 0, mem),
            Request::Login(request) => self.let_in(slot, &request, status, mem),
            _ if status.is_ok() && task.comes_back => self.come_back(slot, mem),
            _ if status.is_ok() && task.need < task.end => self.next_write(slot, mem),
            _ if status.is_ok() => self.respond(slot, task.good, mem),
            _ => self.respond(slot, Status::of(status), mem),
        }
    }

    /// Ends a read with its data; the buffer is released when it has gone out.
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_with_data<M: Memory>(&mut self, slot: SlotId, data: Buf, mem: &mut M) {
        self.send_data(slot, OutData::Buf(data), mem);
    }

    /// Ends a comparison that found a difference: the first byte, from the start of the data that
    /// the initiator sent, that differs.
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_miscompare<M: Memory>(&mut self, slot: SlotId, offset: u32, mem: &mut M) {
        self.respond(slot, Sense::miscompare(u64::from(offset)).into(), mem);
    }

    /// Ends a change of the reservations ([`crate::target::Outcome::Reserve`]).
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_reserve<M: Memory>(
        &mut self,
        slot: SlotId,
        result: Result<(), NotReserved>,
        mem: &mut M,
    ) {
        let status = match result {
            Ok(()) => Status::Good,
            Err(NotReserved::Refused(refusal)) => refusal.into(),
            Err(NotReserved::NotStored(status)) => Status::of(status),
        };
        self.respond(slot, status, mem);
    }

    /// Ends a SANITIZE ([`crate::target::Outcome::Sanitize`]).
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_sanitize<M: Memory>(&mut self, slot: SlotId, end: SanitizeEnd, mem: &mut M) {
        self.respond(slot, end.into(), mem);
    }

    /// Tells what is reserved ([`crate::target::Outcome::ReserveIn`]), or why that is not known.
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_reserve_in<M: Memory>(
        &mut self,
        slot: SlotId,
        query: ReserveIn,
        table: Result<&Reservations, IoStatus>,
        mem: &mut M,
    ) {
        match table {
            Ok(table) => self.respond_with(slot, query.answer(table), mem),
            Err(status) => self.respond(slot, Status::of(status), mem),
        }
    }

    /// Whether there is something to send and nothing is being sent.
    #[must_use]
    pub fn wants_send(&self) -> bool {
        self.tx.wants_send()
    }

    /// Fills `out` with the next windows to send, as [`TxQueue::take_batch`].
    ///
    /// # Panics
    /// Where a batch is in flight already.
    pub fn take_batch(&mut self, out: &mut Vec<BufSlice>) {
        self.tx.take_batch(out);
    }

    /// The whole batch went out.
    pub fn handle_sent<M: Memory>(&mut self, mem: &mut M) {
        self.tx.handle_sent(mem);
        self.unsent = 0;
        if !self.parts.is_empty() {
            self.next_reads(mem);
        }
        self.serve_waiting(mem);
        self.pump(mem);
    }

    /// Whether nothing is left to send.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.tx.is_idle()
    }

    /// Memory may be available again: asks for the data that waited for a buffer, and offers parked
    /// commands once more.
    pub fn retry<M: Memory>(&mut self, mem: &mut M) {
        while let Some(slot) = self.parked.pop_front() {
            match self.tasks[usize::from(slot)].aborted {
                Some(by) => self.end_aborted(slot, by, mem),
                None => self.ready.push_back(slot),
            }
        }
        self.serve_waiting(mem);
    }

    /// Whether something waits for memory, or to be offered again: a stalled stream, an R2T, or a parked command.
    #[must_use]
    pub fn is_waiting_for_memory(&self) -> bool {
        self.stalled_for_memory || !self.waiting.is_empty() || !self.parked.is_empty()
    }

    /// Whether the connection is to be closed, once what is left to send is sent: see
    /// [`Connection::is_over`]. No more commands come.
    #[must_use]
    pub fn wants_close(&self) -> bool {
        self.close_reason.is_some()
    }

    /// Why the connection is over.
    #[must_use]
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.close_reason
    }

    /// Commands handed out and not completed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.out
    }

    /// Whether the login has succeeded.
    #[must_use]
    pub fn is_logged_in(&self) -> bool {
        self.phase != Phase::Login
    }

    /// What was agreed on.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The text that came with a login request: whoever moves connections between shards finds the
    /// target's name in it ([`crate::login::target_name`]).
    #[must_use]
    pub fn login_text(&self) -> &[u8] {
        &self.text
    }

    /// Asks the initiator to log out within `seconds`: the target is about to go away.
    pub fn request_logout<M: Memory>(&mut self, seconds: u16, mem: &mut M) {
        self.push_async(1, [0, 0, seconds], mem);
    }

    /// Tells the initiator that its session is over, and ends the connection.
    pub fn drop_session<M: Memory>(&mut self, mem: &mut M) {
        if self.close_reason.is_none() {
            // Parameter 1: nothing; 2 and 3: wait 2 seconds, retain nothing.
            self.push_async(3, [0, 2, 0], mem);
            self.fail(CloseReason::Dropped);
        }
    }

    /// Gives every buffer back. Nothing that was taken for sending may be in flight any more.
    pub fn close<M: Memory>(self, mem: &mut M) {
        self.tx.close(mem);
        if let Stage::Payload { sink: receive::Sink::Ping { buf: Some(buf), .. }, .. } = self.stage
        {
            mem.release(buf);
        }
        for task in self.tasks {
            if let Some(buf) = task.buf {
                mem.release(buf);
            }
            if let Some(OutData::Buf(buf)) = task.out_data {
                mem.release(buf);
            }
        }
    }

    /// Takes a command back that could not be carried out for want of memory, with its data;
    /// [`Connection::retry`] offers it again.
    ///
    /// # Panics
    /// Where the slot was not handed out.
    pub fn park(&mut self, slot: SlotId, data: Option<Buf>) {
        let task = &mut self.tasks[usize::from(slot.0)];
        assert_eq!(task.state, State::Out, "parked slot {} was not handed out", slot.0);
        task.state = State::Ready;
        task.buf = data;
        self.out -= 1;
        self.parked.push_back(slot.0);
    }

    /// The block sizes by LUN, as base-2 logarithms, as of state `of` of the configuration.
    pub(crate) fn set_shifts(&mut self, shifts: impl Iterator<Item = (u16, u8)>, of: u64) {
        self.shifts.clear();
        for (lun, shift) in shifts {
            let at = usize::from(lun);
            if self.shifts.len() <= at {
                self.shifts.resize(at + 1, 0);
            }
            self.shifts[at] = shift;
        }
        self.shifts_of = of;
    }

    /// A READ has so much data, of which what is handed out is the next step.
    pub(crate) fn set_read_len(&mut self, slot: SlotId, len: u32) {
        let task = &mut self.tasks[usize::from(slot.0)];
        task.end = len.min(task.edtl);
        task.whole = len;
    }

    /// Which sense format a command's logical unit is set to, and what its success is.
    pub(crate) fn set_ending(&mut self, slot: SlotId, descriptors: bool, good: Status) {
        let task = &mut self.tasks[usize::from(slot.0)];
        task.descriptors = descriptors;
        task.good = good;
    }

    /// A command is handed out as a flush, and to be offered again after that.
    pub(crate) fn come_back_later(&mut self, slot: SlotId) {
        self.tasks[usize::from(slot.0)].comes_back = true;
    }

    /// The tag of the portal group that it came in at.
    #[must_use]
    pub fn portal_group(&self) -> u16 {
        self.portal_group
    }

    pub(crate) fn offer(&self) -> Offer {
        self.config.offer
    }

    pub(crate) fn limits(&self) -> Limits {
        let step = self.config.max_data_len;
        // What comes unasked is to fit the first step.
        let fits = self.params.first_burst <= step;
        let max_transfer_len = if fits { step.max(MAX_TRANSFER_LEN) } else { step };
        Limits { max_data_len: step, max_transfer_len }
    }

    /// Ends GET LBA STATUS with the extents from the first block that was asked for on, in order.
    ///
    /// # Panics
    /// As [`Connection::complete`].
    pub fn complete_lba_status<M: Memory>(
        &mut self,
        slot: SlotId,
        extents: &[LbaExtent],
        mem: &mut M,
    ) {
        let Request::Scsi(scsi) = self.tasks[usize::from(slot.0)].request else {
            return self.complete(slot, IoStatus::Internal, mem);
        };
        let mut lba = u64_at(&scsi.cdb, 2);
        let mut data = vec![0; 8];
        for extent in extents {
            let mut d = [0; 16];
            put(&mut d, 0, &lba.to_be_bytes());
            put(&mut d, 8, &extent.blocks.to_be_bytes());
            d[12] = u8::from(!extent.mapped);
            data.extend_from_slice(&d);
            lba += u64::from(extent.blocks);
        }
        let len = len32(data.len() - 4);
        put(&mut data, 0, &len.to_be_bytes());
        data.truncate(allocation_len(&scsi.cdb));
        self.send_data(slot, OutData::Made(data), mem);
    }

    /// The connection id that the initiator gave.
    pub(crate) fn cid(&self) -> u16 {
        self.cid
    }

    pub(crate) fn fail(&mut self, reason: CloseReason) {
        if self.close_reason.is_none() {
            self.close_reason = Some(reason);
            // What is left to send has its own time.
            self.deadline_ms = None;
        }
    }

    /// What carries a command out.
    pub(crate) fn set_unit(&mut self, slot: SlotId, unit: UnitHandle) {
        self.tasks[usize::from(slot.0)].unit = Some(unit);
    }

    /// A logout is answered once what was asked before is over: nothing else is begun.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    /// A login has succeeded, and is answered once [`Connection::complete`]d.
    pub(crate) fn welcome(&mut self, tsih: u16, text: Vec<u8>) {
        self.welcome = Some((tsih, text));
    }

    fn let_in<M: Memory>(
        &mut self,
        slot: SlotId,
        request: &LoginRequest,
        status: IoStatus,
        mem: &mut M,
    ) {
        let (tsih, text) = self.welcome.take().unwrap_or_default();
        let outcome = match status.is_ok() {
            true => Ok((Some(FULL_FEATURE), tsih, text.as_slice())),
            false => Err(LoginStatus::ServiceUnavailable),
        };
        self.respond_login(slot, request, outcome, mem);
    }

    /// The initiator broke the protocol: it is told, and the connection ends, for there is nothing
    /// else at error recovery level 0.
    fn violation<M: Memory>(&mut self, what: &'static str, mem: &mut M) {
        if self.is_logged_in() {
            self.push_reject(RejectReason::ProtocolError, mem);
        }
        self.fail(CloseReason::Protocol(what));
    }
}

#[cfg(test)]
mod tests;
