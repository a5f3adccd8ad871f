//! One connection of the target: PDUs in, commands out; completions in, PDUs out.

use std::collections::VecDeque;
use std::fmt;

use cairn_block::{Buf, BufSlice, Memory};

use crate::pdu::{
    Body, DIGEST_LEN, Digests, FLAG_LAST, FLAG_SUCCESS, Fes, Header, MAX_TERM_DATA, PduType,
    Transfer, Violation,
};
use crate::rx::{HeaderReader, Payload};
use crate::sqe::{Cqe, Direction, SGL_IN_CAPSULE, SGL_TRANSPORT, Sqe, opcode};
use crate::status::Status;
use crate::tx::{PushHeader, TxQueue};
use crate::wire::len32;

/// In-capsule data that fabrics and admin commands may carry whatever IOCCSZ says.
pub const ADMIN_IN_CAPSULE_LEN: u32 = 8192;
/// The highest HPDA that the specification allows: 128 bytes.
const MAX_PDA: u8 = 31;
/// In-capsule data of this length is not copied, where memory can keep it as it was received.
const KEEP_LEN: u32 = 4096;
/// Ring space for what belongs to no slot: ICResp, then a TermReq.
const CONNECTION_RESERVE: u32 = 128 + 24 + MAX_TERM_DATA;
/// Windows that one slot may queue: R2T, C2HData, payload, digest and response.
const SLOT_ITEMS: usize = 4;

/// The limits of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// The most data of one command, in bytes: MDTS.
    pub max_data_len: u32,
    /// The most data in an I/O command's capsule, in bytes.
    pub in_capsule_len: u32,
    /// MAXH2CDATA: the most data in one H2CData, in bytes; at least 4096, a multiple of 4.
    pub max_h2c_data: u32,
    /// Commands that may be outstanding; more stall the connection.
    pub max_slots: u16,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_data_len: 1 << 20,
            in_capsule_len: 16 << 10,
            max_h2c_data: 1 << 20,
            max_slots: 256,
        }
    }
}

/// A command's place in its queue, from [`Queue::poll_command`] to [`Queue::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u16);

/// A command whose data has arrived whole.
#[derive(Debug)]
pub struct Command {
    /// Where its completion goes.
    pub slot: SlotId,
    /// The entry.
    pub sqe: Sqe,
    /// The host's data, for host-to-controller commands that have any.
    pub data: Option<Buf>,
}

/// Why a connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The peer broke the protocol; a C2HTermReq is queued.
    Violation(Violation),
    /// The peer sent an H2CTermReq.
    Terminated {
        /// Its Fatal Error Status.
        fes: u16,
        /// Its Fatal Error Information.
        fei: u32,
    },
    /// The host sent Disconnect.
    Disconnected,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Violation(violation) => write!(f, "the host broke the protocol: {violation}"),
            Self::Terminated { fes, fei } => {
                write!(f, "the host ended the connection: FES {fes}, FEI {fei}")
            }
            Self::Disconnected => f.write_str("the host disconnected the queue"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    /// Its data will be asked for once there is a buffer.
    WaitingForMemory,
    /// Its data is on the way.
    Receiving {
        by_r2t: bool,
    },
    /// In `ready` or `parked`.
    Ready,
    /// Handed out.
    Out,
    /// An Asynchronous Event Request that waits for an event.
    Held,
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    sqe: Sqe,
    /// Bytes that SGL1 describes.
    data_len: u32,
    received: u32,
    buf: Option<Buf>,
    /// How the command ends once its data is drained, in place of being handed out.
    failure: Option<Status>,
}

#[derive(Debug)]
enum Stage {
    Header,
    Payload { slot: u16, payload: Payload, destination: Option<BufSlice> },
}

/// Which queue of which controller the connection is, once Connect has said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) controller: u32,
    pub(crate) generation: u64,
    pub(crate) qid: u16,
}

/// The target's side of one connection, which is one queue pair.
#[derive(Debug)]
pub struct Queue {
    config: QueueConfig,
    tx: TxQueue,
    header: HeaderReader,
    stage: Stage,
    /// Agreed on in ICReq and ICResp; nothing before.
    digests: Option<Digests>,
    hpda: u8,
    slots: Vec<Slot>,
    free: Vec<u16>,
    ready: VecDeque<u16>,
    /// Slots whose R2T waits for a buffer.
    waiting: VecDeque<u16>,
    /// Commands given back by [`Queue::park`].
    parked: VecDeque<u16>,
    stalled_for_memory: bool,
    /// Takes in-capsule data when memory has run out. Without it the stream could stall behind a
    /// capsule for ever: what would release memory may be a write whose data comes later in the
    /// stream.
    spare: Option<Buf>,
    out: usize,
    close_reason: Option<CloseReason>,
    pub(crate) binding: Option<Binding>,
    /// A command was answered before a Connect was accepted.
    pub(crate) answered: bool,
    sqhd: u16,
    sq_entries: u16,
    sq_flow_control: bool,
}

impl Queue {
    /// A queue for a connection that was just accepted; nothing where `mem` has no room for its
    /// header ring.
    #[must_use]
    pub fn new<M: Memory>(config: &QueueConfig, mem: &mut M) -> Option<Self> {
        let mut config = *config;
        config.max_data_len = config.max_data_len.min(mem.max_alloc());
        config.max_h2c_data = config.max_h2c_data.max(4096) & !3;
        let n = usize::from(config.max_slots);
        let slot = || Slot {
            state: SlotState::Free,
            sqe: Sqe([0; 64]),
            data_len: 0,
            received: 0,
            buf: None,
            failure: None,
        };
        let tx = TxQueue::new(ring_len(&config, 0), 2 * SLOT_ITEMS * (n + 2), mem)?;
        let Some(spare) = mem.alloc(spare_len(&config)) else {
            tx.close(mem);
            return None;
        };
        Some(Self {
            config,
            tx,
            header: HeaderReader::new(),
            stage: Stage::Header,
            digests: None,
            hpda: 0,
            slots: std::iter::repeat_with(slot).take(n).collect(),
            free: (0..config.max_slots).rev().collect(),
            ready: VecDeque::with_capacity(n),
            waiting: VecDeque::with_capacity(n),
            parked: VecDeque::with_capacity(n),
            stalled_for_memory: false,
            spare: Some(spare),
            out: 0,
            close_reason: None,
            binding: None,
            answered: false,
            sqhd: 0,
            sq_entries: 0,
            sq_flow_control: true,
        })
    }

    /// Feeds received bytes: how many were taken. Fewer than all means that the connection is
    /// stalled, for want of a slot, of ring space or of memory for write data. Keep the rest and
    /// offer it again after a completion, a sent batch or a release.
    pub fn handle_recv<M: Memory>(&mut self, chunk: BufSlice, mem: &mut M) -> u32 {
        let mut at = 0;
        self.stalled_for_memory = false;
        while at < chunk.len() {
            if self.close_reason.is_some() {
                return chunk.len();
            }
            match &mut self.stage {
                Stage::Header => {
                    let digests = self.digests.unwrap_or_default();
                    let (taken, result) = self.header.feed(mem.bytes(chunk.from(at)), digests);
                    at += taken;
                    let step = match result {
                        Ok(None) => continue,
                        Ok(Some(header)) => self.handle_header(&header, chunk.from(at), mem),
                        Err(violation) => Err(violation),
                    };
                    match step {
                        Ok(true) => self.header.reset(),
                        Ok(false) => {
                            self.header.unread();
                            return at - 1;
                        }
                        Err(violation) => self.terminate(violation, mem),
                    }
                }
                Stage::Payload { slot, payload, destination } => {
                    at += payload.feed(chunk.from(at), *destination, mem);
                    if payload.is_done() {
                        let (slot, payload, kept) = (*slot, *payload, destination.is_some());
                        self.stage = Stage::Header;
                        self.handle_payload(slot, &payload, kept, mem);
                    }
                }
            }
        }
        at
    }

    /// Memory may be available again: sends the R2Ts that waited for a buffer, and offers parked
    /// commands once more.
    pub fn retry<M: Memory>(&mut self, mem: &mut M) {
        self.refill_spare(mem);
        while let Some(slot) = self.parked.pop_front() {
            self.ready.push_back(slot);
        }
        while let Some(&slot) = self.waiting.front() {
            if !self.ask_for_data(slot, mem) {
                break;
            }
            self.waiting.pop_front();
        }
    }

    /// Whether something waits for memory: a stalled stream, an R2T, or a parked command.
    #[must_use]
    pub fn is_waiting_for_memory(&self) -> bool {
        self.stalled_for_memory || !self.waiting.is_empty() || !self.parked.is_empty()
    }

    /// The next command whose data has arrived whole.
    pub fn poll_command(&mut self) -> Option<Command> {
        if self.close_reason.is_some() {
            return None;
        }
        let index = self.ready.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        slot.state = SlotState::Out;
        self.out += 1;
        Some(Command { slot: SlotId(index), sqe: slot.sqe, data: slot.buf.take() })
    }

    /// Ends a command without data. A write's buffer had better be released before: it may be what
    /// the next capsule needs.
    ///
    /// # Panics
    /// Where the slot was not handed out, or was completed before.
    pub fn complete<M: Memory>(&mut self, slot: SlotId, status: Status, result: u64, mem: &mut M) {
        self.take_back(slot);
        self.refill_spare(mem);
        self.respond(slot.0, status, result, mem);
    }

    /// Ends a controller-to-host command with success and its data. No more is sent than the
    /// command's SGL holds; the buffer is released when it has gone out.
    ///
    /// # Panics
    /// As [`Queue::complete`].
    pub fn complete_with_data<M: Memory>(&mut self, slot: SlotId, data: Buf, mem: &mut M) {
        let (state, sqe, room) = {
            let s = &self.slots[usize::from(slot.0)];
            (s.state, s.sqe, s.data_len)
        };
        let len = data.len().min(room);
        let reads = sqe.direction() == Direction::ControllerToHost;
        if self.close_reason.is_some() || len == 0 || !reads || state != SlotState::Out {
            mem.release(data);
            return self.complete(slot, Status::SUCCESS, 0, mem);
        }
        self.take_back(slot);
        let digests = self.digests.unwrap_or_default();
        let transfer = Transfer { cccid: sqe.cid(), ttag: 0, offset: 0, len };
        let mut header = Header::new(Body::C2hData(transfer), digests, len, self.hpda);
        // SUCCESS stands for a response, which tells the host SQHD: only where it does not need it.
        let is_response = !self.sq_flow_control;
        header = header.with_flags(FLAG_LAST | if is_response { FLAG_SUCCESS } else { 0 });
        let digest =
            digests.data.then(|| crc32c::crc32c(mem.bytes(data.slice().sub(0, len))).to_le_bytes());
        self.tx.push_header(&header, mem);
        self.tx.push_owned(data, len);
        if let Some(digest) = digest {
            self.tx.push_bytes(&digest, mem);
        }
        if is_response {
            self.release_slot(slot.0);
        } else {
            self.respond(slot.0, Status::SUCCESS, 0, mem);
        }
    }

    /// What there is to send.
    pub fn tx(&mut self) -> &mut TxQueue {
        &mut self.tx
    }

    /// Whether the connection is over: close it once [`Queue::tx`] is idle. No more commands come.
    #[must_use]
    pub fn wants_close(&self) -> bool {
        self.close_reason.is_some()
    }

    /// Why the connection is over.
    #[must_use]
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.close_reason
    }

    /// Commands handed out and not completed; held Asynchronous Event Requests do not count.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.out
    }

    /// Bytes that the SGL of an outstanding command describes.
    #[must_use]
    pub fn data_len(&self, slot: SlotId) -> u32 {
        self.slots[usize::from(slot.0)].data_len
    }

    /// The queue identifier, once Connect has named it.
    #[must_use]
    pub fn qid(&self) -> Option<u16> {
        self.binding.map(|binding| binding.qid)
    }

    /// The digests that were agreed on.
    #[must_use]
    pub fn digests(&self) -> Digests {
        self.digests.unwrap_or_default()
    }

    /// Whether its first command was answered, by whichever end: it is this target's then.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.answered
    }

    /// How many bytes of headers were queued to be sent since the beginning.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.tx.copied()
    }

    /// Takes up a connection that another queue of the same limits began. `received` is all that it was fed, and
    /// `queued` its [`Queue::queued`], all of it sent and no command answered. The same bytes have the same
    /// outcome however they are cut, so what comes of them here has been sent, and is forgotten; the commands are
    /// handed out anew. False where there is not the memory for it, or the peer broke the protocol: then the
    /// connection is of no use.
    #[must_use]
    pub fn resume<M: Memory>(&mut self, received: BufSlice, queued: u64, mem: &mut M) -> bool {
        let whole = self.handle_recv(received, mem) == received.len();
        if !whole || self.close_reason.is_some() || self.queued() != queued {
            return false;
        }
        self.tx.forget(mem);
        true
    }

    /// Gives every buffer back. Nothing of [`Queue::tx`] may be in flight any more.
    pub fn close<M: Memory>(self, mem: &mut M) {
        self.tx.close(mem);
        if let Some(spare) = self.spare {
            mem.release(spare);
        }
        for slot in self.slots {
            if let Some(buf) = slot.buf {
                mem.release(buf);
            }
        }
    }

    /// Connect was accepted.
    pub(crate) fn bind(&mut self, binding: Binding, sqsize: u16, sq_flow_control: bool) {
        self.binding = Some(binding);
        self.sq_entries = sqsize.saturating_add(1);
        self.sq_flow_control = sq_flow_control;
        // Connect was the first entry.
        self.sqhd = 1 % self.sq_entries;
    }

    /// Keeps an Asynchronous Event Request until an event completes it.
    pub(crate) fn hold(&mut self, slot: SlotId) {
        let s = &mut self.slots[usize::from(slot.0)];
        assert_eq!(s.state, SlotState::Out, "held slot {} was not handed out", slot.0);
        s.state = SlotState::Held;
        self.out -= 1;
    }

    /// Takes a command back that could not be answered for want of memory; [`Queue::retry`] offers
    /// it again.
    pub(crate) fn park(&mut self, slot: SlotId, data: Option<Buf>) {
        let s = &mut self.slots[usize::from(slot.0)];
        assert_eq!(s.state, SlotState::Out, "parked slot {} was not handed out", slot.0);
        s.state = SlotState::Ready;
        s.buf = data;
        self.out -= 1;
        self.parked.push_back(slot.0);
    }

    /// I/O commands for a namespace that wait for their data end so once it is here.
    pub(crate) fn abort_incoming(&mut self, nsid: u32, status: Status) {
        if self.is_admin() {
            return;
        }
        for slot in &mut self.slots {
            let waits =
                matches!(slot.state, SlotState::WaitingForMemory | SlotState::Receiving { .. });
            if waits && slot.sqe.nsid() == nsid {
                slot.failure.get_or_insert(status);
            }
        }
    }

    /// The host is done with the connection.
    pub(crate) fn disconnect(&mut self) {
        self.close_reason.get_or_insert(CloseReason::Disconnected);
    }

    /// Whether it is the admin queue, or not known yet.
    fn is_admin(&self) -> bool {
        self.binding.is_none_or(|binding| binding.qid == 0)
    }

    /// Acts on a header, which `rest` follows: true where it was taken, false where it has to wait.
    fn handle_header<M: Memory>(
        &mut self,
        header: &Header,
        rest: BufSlice,
        mem: &mut M,
    ) -> Result<bool, Violation> {
        let kind = header.body.kind();
        if self.digests.is_none() != (kind == PduType::IcReq) && kind != PduType::H2cTermReq {
            return Err(match kind {
                PduType::IcReq | PduType::CapsuleCmd | PduType::H2cData => {
                    Violation::of(Fes::PduSequence)
                }
                _ => Violation::field(0),
            });
        }
        match header.body {
            Body::IcReq { pfv, hpda, dgst, .. } => self.handle_icreq(pfv, hpda, dgst, mem)?,
            Body::CapsuleCmd(sqe) => return self.handle_capsule(header, &sqe, rest, mem),
            Body::H2cData(transfer) => self.handle_h2c_data(header, transfer)?,
            Body::TermReq { from_host: true, fes, fei } => {
                self.close_reason = Some(CloseReason::Terminated { fes, fei });
            }
            // PDUs that only a controller sends.
            _ => return Err(Violation::field(0)),
        }
        Ok(true)
    }

    fn handle_icreq<M: Memory>(
        &mut self,
        pfv: u16,
        hpda: u8,
        dgst: u8,
        mem: &mut M,
    ) -> Result<(), Violation> {
        if pfv != 0 {
            return Err(Violation::unsupported(8));
        }
        if hpda > MAX_PDA {
            return Err(Violation::unsupported(10));
        }
        // Few hosts want data at an alignment, and all connections would keep room for it.
        if !self.tx.enlarge(ring_len(&self.config, hpda), mem) {
            return Err(Violation::unsupported(10));
        }
        let digests = Digests::from_wire(dgst).ok_or(Violation::unsupported(11))?;
        self.digests = Some(digests);
        self.hpda = hpda;
        let maxh2cdata = self.config.max_h2c_data;
        let body = Body::IcResp { pfv: 0, cpda: 0, dgst: digests.to_wire(), maxh2cdata };
        self.tx.push_header(&Header::new(body, digests, 0, 0), mem);
        Ok(())
    }

    /// Whether one more command's PDUs fit the ring, whatever the others still have to send.
    fn has_room(&self) -> bool {
        let in_use = self.config.max_slots - u16::try_from(self.free.len()).unwrap_or(0);
        let slots = u32::from(in_use) + 1;
        self.tx.free() >= slots * slot_reserve(self.hpda) + CONNECTION_RESERVE
            && self.tx.free_items() >= SLOT_ITEMS * (usize::from(in_use) + 2)
    }

    fn handle_capsule<M: Memory>(
        &mut self,
        header: &Header,
        sqe: &Sqe,
        rest: BufSlice,
        mem: &mut M,
    ) -> Result<bool, Violation> {
        let common = header.common();
        let present = common.data_len();
        if present > ADMIN_IN_CAPSULE_LEN.max(self.config.in_capsule_len) {
            return Err(Violation::of(Fes::LimitExceeded));
        }
        if self.free.is_empty() || !self.has_room() {
            return Ok(false);
        }
        let sgl = sqe.sgl();
        let failure = self.check_data(sqe, present);
        let brings_data =
            failure.is_none() && sqe.direction() == Direction::HostToController && sgl.len > 0;
        let in_capsule = present > 0 && brings_data;
        let mut buf = None;
        if in_capsule {
            let whole = Payload::new(&common).whole_data(rest);
            buf = whole.filter(|data| data.len() >= KEEP_LEN).and_then(|data| mem.keep(data));
            if buf.is_none() && self.waiting.is_empty() {
                // Waiting commands asked first.
                buf = mem.alloc(sgl.len);
            }
            buf = buf.or_else(|| self.take_spare(sgl.len));
            if buf.is_none() {
                self.stalled_for_memory = true;
                return Ok(false);
            }
        }
        let Some(index) = self.free.pop() else { return Ok(false) };
        if self.sq_entries > 0 {
            self.sqhd = (self.sqhd + 1) % self.sq_entries;
        }
        let destination = buf.as_ref().map(Buf::slice);
        let slot = &mut self.slots[usize::from(index)];
        *slot = Slot {
            state: SlotState::Receiving { by_r2t: false },
            sqe: *sqe,
            data_len: if sqe.direction() == Direction::None { 0 } else { sgl.len },
            received: 0,
            buf,
            failure,
        };
        if common.plen > common.header_len() {
            let payload = Payload::new(&common);
            if payload.is_done() {
                self.handle_payload(index, &payload, false, mem);
            } else {
                self.stage = Stage::Payload { slot: index, payload, destination };
            }
        } else if brings_data {
            slot.state = SlotState::WaitingForMemory;
            if !self.waiting.is_empty() || !self.ask_for_data(index, mem) {
                self.waiting.push_back(index);
            }
        } else {
            self.finish_receiving(index, mem);
        }
        Ok(true)
    }

    /// Whether the command's SGL and the data in its capsule make sense together.
    fn check_data(&self, sqe: &Sqe, present: u32) -> Option<Status> {
        let sgl = sqe.sgl();
        if sqe.psdt() != 1 || sqe.fuse() != 0 {
            return Some(Status::INVALID_FIELD.with_dnr());
        }
        let direction = sqe.direction();
        if direction == Direction::None || direction == Direction::Both || sgl.len == 0 {
            return (present > 0).then(|| Status::SGL_DATA_LENGTH_INVALID.with_dnr());
        }
        if sgl.len > self.config.max_data_len {
            return Some(Status::INVALID_FIELD.with_dnr());
        }
        match sgl.kind {
            SGL_IN_CAPSULE if direction == Direction::HostToController => {
                let admin = sqe.opcode() == opcode::FABRICS || self.is_admin();
                let limit = if admin { ADMIN_IN_CAPSULE_LEN } else { self.config.in_capsule_len };
                if sgl.address != 0 {
                    Some(Status::SGL_OFFSET_INVALID.with_dnr())
                } else if present != sgl.len || sgl.len > limit {
                    Some(Status::SGL_DATA_LENGTH_INVALID.with_dnr())
                } else {
                    None
                }
            }
            SGL_TRANSPORT if present == 0 => None,
            _ => Some(Status::SGL_DESCRIPTOR_TYPE_INVALID.with_dnr()),
        }
    }

    /// Sends the R2T of a write, for all of its data; false where there is no buffer for it.
    fn ask_for_data<M: Memory>(&mut self, index: u16, mem: &mut M) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        assert_eq!(slot.state, SlotState::WaitingForMemory, "slot {index} does not wait");
        let Some(buf) = mem.alloc(slot.data_len) else { return false };
        slot.buf = Some(buf);
        slot.state = SlotState::Receiving { by_r2t: true };
        let transfer =
            Transfer { cccid: slot.sqe.cid(), ttag: index, offset: 0, len: slot.data_len };
        if self.close_reason.is_none() {
            let digests = self.digests.unwrap_or_default();
            self.tx.push_header(&Header::new(Body::R2t(transfer), digests, 0, 0), mem);
        }
        true
    }

    fn handle_h2c_data(&mut self, header: &Header, transfer: Transfer) -> Result<(), Violation> {
        let common = header.common();
        let Some(slot) = self.slots.get_mut(usize::from(transfer.ttag)) else {
            return Err(Violation::field(10));
        };
        if slot.state != (SlotState::Receiving { by_r2t: true }) {
            return Err(Violation::of(Fes::PduSequence));
        }
        if slot.sqe.cid() != transfer.cccid {
            return Err(Violation::field(8));
        }
        if transfer.len == 0 {
            return Err(Violation::field(16));
        }
        if transfer.len > self.config.max_h2c_data {
            return Err(Violation::of(Fes::LimitExceeded));
        }
        if transfer.offset != slot.received || transfer.len > slot.data_len - slot.received {
            return Err(Violation::of(Fes::OutOfRange));
        }
        if common.data_len() != transfer.len {
            return Err(Violation::field(4));
        }
        let ends = slot.received + transfer.len == slot.data_len;
        if ends != (header.flags & FLAG_LAST != 0) {
            return Err(Violation::field(1));
        }
        let destination =
            slot.buf.as_ref().map(|buf| buf.slice().sub(transfer.offset, transfer.len));
        slot.received += transfer.len;
        let payload = Payload::new(&common);
        self.stage = Stage::Payload { slot: transfer.ttag, payload, destination };
        Ok(())
    }

    /// A PDU of a command's data has ended.
    fn handle_payload<M: Memory>(
        &mut self,
        index: u16,
        payload: &Payload,
        kept: bool,
        mem: &mut M,
    ) {
        let slot = &mut self.slots[usize::from(index)];
        if kept && !payload.digest_matches() {
            slot.failure.get_or_insert(Status::TRANSIENT_TRANSPORT_ERROR);
        }
        let by_r2t = slot.state == SlotState::Receiving { by_r2t: true };
        if !by_r2t || slot.received == slot.data_len {
            self.finish_receiving(index, mem);
        }
    }

    /// All of a command is here: it is handed out, or ends as it must.
    fn finish_receiving<M: Memory>(&mut self, index: u16, mem: &mut M) {
        let slot = &mut self.slots[usize::from(index)];
        slot.state = SlotState::Ready;
        let failure = slot.failure;
        if let Some(status) = failure {
            if let Some(buf) = slot.buf.take() {
                mem.release(buf);
                self.refill_spare(mem);
            }
            self.respond(index, status, 0, mem);
        } else {
            self.ready.push_back(index);
        }
    }

    /// The spare buffer, as one of `len` bytes.
    fn take_spare(&mut self, len: u32) -> Option<Buf> {
        let spare = self.spare.take_if(|spare| len <= spare.len())?;
        Some(Buf::from_parts(spare.slice().offset(), len, spare.order()))
    }

    fn refill_spare<M: Memory>(&mut self, mem: &mut M) {
        if self.spare.is_none() && self.close_reason.is_none() {
            self.spare = mem.alloc(spare_len(&self.config));
        }
    }

    fn take_back(&mut self, slot: SlotId) {
        let s = &mut self.slots[usize::from(slot.0)];
        match s.state {
            SlotState::Out => self.out -= 1,
            SlotState::Held => {}
            _ => panic!("slot {} was completed, but was not handed out", slot.0),
        }
        s.state = SlotState::Ready;
    }

    fn respond<M: Memory>(&mut self, index: u16, status: Status, result: u64, mem: &mut M) {
        if self.close_reason.is_none() {
            let sqhd = if self.sq_flow_control { self.sqhd } else { u16::MAX };
            let cid = self.slots[usize::from(index)].sqe.cid();
            let body = Body::CapsuleResp(Cqe::new(cid, status, result, sqhd));
            let digests = self.digests.unwrap_or_default();
            self.tx.push_header(&Header::new(body, digests, 0, 0), mem);
        }
        self.release_slot(index);
    }

    fn release_slot(&mut self, index: u16) {
        self.slots[usize::from(index)].state = SlotState::Free;
        self.free.push(index);
    }

    /// Answers a violation with a C2HTermReq. The connection takes nothing more.
    fn terminate<M: Memory>(&mut self, violation: Violation, mem: &mut M) {
        self.close_reason = Some(CloseReason::Violation(violation));
        let offending = self.header.bytes();
        let offending = &offending[..offending.len().min(MAX_TERM_DATA as usize)];
        let body =
            Body::TermReq { from_host: false, fes: violation.fes as u16, fei: violation.fei };
        let header = Header::new(body, Digests::default(), len32(offending.len()), 0);
        self.tx.push_header(&header, mem);
        self.tx.push_bytes(offending, mem);
    }
}

/// The most data that a capsule brings.
fn spare_len(config: &QueueConfig) -> u32 {
    ADMIN_IN_CAPSULE_LEN.max(config.in_capsule_len)
}

/// Ring bytes for as many commands as there are slots.
fn ring_len(config: &QueueConfig, pda: u8) -> u32 {
    slot_reserve(pda) * (u32::from(config.max_slots) + 2) + CONNECTION_RESERVE
}

/// Ring bytes that one command may need: R2T, C2HData, data digest, response.
fn slot_reserve(pda: u8) -> u32 {
    let response = 24 + DIGEST_LEN;
    response + response.next_multiple_of((u32::from(pda) + 1) * 4) + DIGEST_LEN + response
}

#[cfg(test)]
mod tests;
