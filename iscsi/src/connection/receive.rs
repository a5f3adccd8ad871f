//! The stream of PDUs that an initiator sends.

use cairn_block::{Buf, BufSlice, Memory};

use super::task::State;
use super::{
    CONNECTION_RESERVE, CloseReason, Connection, IMMEDIATE_TASKS, MAX_TRANSFER_LEN, Phase,
    RESPONSE_ITEMS, RESPONSE_RESERVE, RejectReason, Request, ScsiCommand,
};
use crate::keys::DEFAULT_SEGMENT_LEN;
use crate::login::LoginStatus;
use crate::pdu::{Body, CmdSn, Header, LoginRequest, NO_TAG, decode_lun, lengths};
use crate::rx::Payload;
use crate::scsi::cdb::{comes_in_steps, data_out_len};
use crate::scsi::sense::{Sense, Status};
use crate::target::session::MAX_LOGIN_TEXT;
use crate::text::MAX_TEXT_LEN;
use crate::wire::{serial_lt, u16_at};

#[derive(Debug)]
pub(super) enum Stage {
    Header,
    Payload { sink: Sink, payload: Payload },
}

/// Where the data of the PDU goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// Nowhere.
    Drop,
    /// To a task's buffer, from byte `at` of its data on.
    Task { slot: u16, at: u32, last: bool },
    /// To the text; then the request is complete, unless `more` follows.
    Text { header: Header, more: bool },
    /// To the initiator again.
    Ping { header: Header, buf: Option<Buf> },
}

/// Whether a header was taken, or has to wait.
type Taken = bool;

/// What the command number of a request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Take,
    Ignore,
    Gap,
}

impl Connection {
    /// Feeds received bytes: how many were taken. Fewer than all means that the connection is
    /// stalled, for want of memory for write data or of room for responses. Keep the rest and offer
    /// it again after a completion, a sent batch or a release.
    pub fn handle_recv<M: Memory>(&mut self, chunk: BufSlice, mem: &mut M) -> u32 {
        self.stalled_for_memory = false;
        self.heard |= !chunk.is_empty();
        let taken = self.take(chunk, mem);
        self.stalled = taken < chunk.len();
        taken
    }

    fn take<M: Memory>(&mut self, chunk: BufSlice, mem: &mut M) -> u32 {
        let mut at = 0;
        while at < chunk.len() {
            if self.close_reason.is_some() {
                return chunk.len();
            }
            match &mut self.stage {
                Stage::Header => {
                    let digest = self.is_logged_in() && self.params.digests.header;
                    let (taken, result) = self.header.feed(mem.bytes(chunk.from(at)), digest);
                    at += crate::wire::len32(taken);
                    match result {
                        Ok(false) => {}
                        Ok(true) => {
                            if !self.handle_header(mem) {
                                self.header.unread();
                                return at - 1;
                            }
                            self.header.reset();
                            // A PDU without data ends here.
                            self.finish_if_done(mem);
                        }
                        Err(_) => self.fail(CloseReason::HeaderDigest),
                    }
                }
                Stage::Payload { sink, payload } => {
                    let (tasks, text) = (&mut self.tasks, &mut self.text);
                    at += payload.feed(chunk.from(at), mem, |mem, pos, source| match sink {
                        Sink::Drop => {}
                        Sink::Task { slot, at, .. } => {
                            let task = &tasks[usize::from(*slot)];
                            keep(task.buf.as_ref(), *at + pos - task.start, source, mem);
                        }
                        Sink::Text { .. } => text.extend_from_slice(mem.bytes(source)),
                        Sink::Ping { buf, .. } => keep(buf.as_ref(), pos, source, mem),
                    });
                    self.finish_if_done(mem);
                }
            }
        }
        at
    }

    /// Ends the PDU whose last byte was taken.
    fn finish_if_done<M: Memory>(&mut self, mem: &mut M) {
        let Stage::Payload { payload, .. } = &self.stage else { return };
        if !payload.is_done() {
            return;
        }
        let intact = payload.digest_matches();
        let Stage::Payload { sink, .. } = std::mem::replace(&mut self.stage, Stage::Header) else {
            return;
        };
        if !intact && !matches!(sink, Sink::Drop) {
            self.push_reject(RejectReason::DataDigestError, mem);
        }
        match sink {
            Sink::Drop => {}
            Sink::Task { slot, last, .. } => {
                let task = &mut self.tasks[usize::from(slot)];
                if !intact {
                    task.failure.get_or_insert(Sense::CRC_ERROR.into());
                }
                self.after_data(slot, last, mem);
            }
            Sink::Text { header, .. } if !intact => {
                // It takes no slot whose end would give its number back.
                self.text.clear();
                self.give_back(header.immediate);
            }
            Sink::Text { header, more } => self.finish_text(&header, more, mem),
            Sink::Ping { buf: Some(buf), .. } if !intact => mem.release(buf),
            Sink::Ping { header, buf } => self.answer_ping(&header, buf, mem),
        }
    }

    /// Acts on a header: false where it has to wait.
    fn handle_header<M: Memory>(&mut self, mem: &mut M) -> Taken {
        // Whatever comes is answered with less than this.
        let in_use = self.tasks.len() - self.free.len();
        let mut reserve = RESPONSE_RESERVE * (crate::wire::len32(in_use) + 1) + CONNECTION_RESERVE;
        if self.phase == Phase::Login {
            // But for the text of a login.
            reserve += crate::wire::len32(MAX_LOGIN_TEXT);
        }
        if self.tx.free() < reserve || self.tx.free_items() < RESPONSE_ITEMS * (in_use + 4) + 8 {
            return false;
        }
        let bhs = self.header.bhs();
        let (_, data_len) = lengths(&bhs);
        let limit = match self.phase {
            Phase::Login => DEFAULT_SEGMENT_LEN,
            Phase::FullFeature { .. } => self.params.max_recv_segment.max(DEFAULT_SEGMENT_LEN),
        };
        if data_len > limit {
            self.violation("a data segment is longer than MaxRecvDataSegmentLength", mem);
            return true;
        }
        let header = match Header::decode(&bhs) {
            Ok(header) => header,
            Err(_) if self.is_logged_in() => {
                self.push_reject(RejectReason::CommandNotSupported, mem);
                self.drop_data(data_len);
                return true;
            }
            Err(_) => {
                self.violation("the first PDU is no Login Request", mem);
                return true;
            }
        };
        let Phase::FullFeature { discovery } = self.phase else {
            match header.body {
                Body::Login(request) => self.handle_login(&header, request, mem),
                _ => self.violation("a PDU before the login was complete", mem),
            }
            return true;
        };
        let sn = match header.body {
            Body::NopOut { sn, .. }
            | Body::ScsiCommand { sn, .. }
            | Body::TaskManagement { sn, .. }
            | Body::Text { sn, .. }
            | Body::Logout { sn, .. } => sn,
            Body::DataOut { last, ttt, data_sn, offset, .. } => {
                self.handle_data_out(&header, last, ttt, data_sn, offset, mem);
                return true;
            }
            Body::Snack => {
                self.push_reject(RejectReason::SnackReject, mem);
                self.drop_data(data_len);
                return true;
            }
            Body::Login(_) => {
                self.violation("a Login Request after the login", mem);
                return true;
            }
            // PDUs that only a target sends.
            _ => {
                self.push_reject(RejectReason::CommandNotSupported, mem);
                self.drop_data(data_len);
                return true;
            }
        };
        match self.admit(header.immediate, sn) {
            Admission::Take => {}
            Admission::Ignore => {
                self.drop_data(data_len);
                return true;
            }
            Admission::Gap => {
                self.violation("a command number was left out", mem);
                return true;
            }
        }
        if discovery
            && matches!(header.body, Body::ScsiCommand { .. } | Body::TaskManagement { .. })
        {
            self.violation("a SCSI request in a discovery session", mem);
            return true;
        }
        if !matches!(header.body, Body::NopOut { .. })
            && (header.itt == NO_TAG || self.slot_of(header.itt).is_some())
        {
            self.consume(header.immediate);
            let free = header.itt == NO_TAG;
            self.push_reject(
                if free { RejectReason::InvalidPduField } else { RejectReason::TaskInProgress },
                mem,
            );
            self.drop_data(data_len);
            return true;
        }
        if header.immediate
            && !matches!(header.body, Body::NopOut { .. })
            && self.immediates == usize::from(IMMEDIATE_TASKS)
        {
            // The window holds the others back.
            self.push_reject(RejectReason::ImmediateCommandReject, mem);
            self.drop_data(data_len);
            return true;
        }
        match header.body {
            Body::NopOut { .. } => {
                if data_len > 0 && !self.tx.was_sent(self.echoed) {
                    // The data of one ping at a time: whoever reads nothing takes no more memory.
                    return false;
                }
                self.consume(header.immediate);
                self.handle_nop_out(&header, mem);
            }
            Body::ScsiCommand { .. } => return self.handle_scsi(&header, mem),
            Body::TaskManagement { function, rtt, ref_cmd_sn, .. } => {
                let lun = header.lun;
                let request = Request::TaskManagement { function, lun, rtt, ref_cmd_sn };
                self.queue_request(&header, request);
                self.drop_data(data_len);
            }
            Body::Text { last, more, ttt, .. } => {
                if ttt == NO_TAG {
                    self.text_out.clear();
                }
                if self.text.len() + data_len as usize > MAX_TEXT_LEN {
                    self.violation("a Text Request is too long", mem);
                    return true;
                }
                self.advance(header.immediate);
                let more = more || !last;
                self.receive(Sink::Text { header, more }, data_len);
            }
            Body::Logout { reason, cid, .. } => {
                self.queue_request(&header, Request::Logout { reason, cid });
                self.drop_data(data_len);
            }
            _ => {}
        }
        true
    }

    fn admit(&self, immediate: bool, sn: CmdSn) -> Admission {
        if immediate || sn.cmd == self.exp_cmd_sn && !serial_lt(self.max_cmd_sn, sn.cmd) {
            return Admission::Take;
        }
        if serial_lt(sn.cmd, self.exp_cmd_sn) || serial_lt(self.max_cmd_sn, sn.cmd) {
            return Admission::Ignore;
        }
        Admission::Gap
    }

    /// The command number is used up, by a request that takes a slot.
    fn advance(&mut self, immediate: bool) {
        if !immediate {
            self.exp_cmd_sn = self.exp_cmd_sn.wrapping_add(1);
        }
    }

    /// The command number is used up, by a request that takes none.
    fn consume(&mut self, immediate: bool) {
        self.advance(immediate);
        self.give_back(immediate);
    }

    /// What had this number has ended: another fits the window.
    fn give_back(&mut self, immediate: bool) {
        if !immediate {
            self.max_cmd_sn = self.max_cmd_sn.wrapping_add(1);
        }
    }

    fn receive(&mut self, sink: Sink, data_len: u32) {
        let digest = self.is_logged_in() && self.params.digests.data;
        self.stage = Stage::Payload { sink, payload: Payload::new(data_len, digest) };
    }

    fn drop_data(&mut self, data_len: u32) {
        self.receive(Sink::Drop, data_len);
    }

    fn queue_request(&mut self, header: &Header, request: Request) {
        if let Some(index) = self.start(header.itt, header.immediate, request) {
            self.tasks[usize::from(index)].lun = header.lun;
            self.advance(header.immediate);
            self.ready.push_back(index);
        }
    }

    fn handle_login<M: Memory>(&mut self, header: &Header, request: LoginRequest, mem: &mut M) {
        if self.slot_of(header.itt).is_some() || self.free.len() < self.tasks.len() {
            return self.violation("a Login Request before the answer to the last", mem);
        }
        if self.text.len() + header.data_len as usize > MAX_TEXT_LEN || header.itt == NO_TAG {
            return self.violation("the text of a login is too long", mem);
        }
        // The first command of the session has the login's number.
        self.exp_cmd_sn = request.sn.cmd;
        self.max_cmd_sn = request.sn.cmd;
        self.cid = request.cid;
        self.receive(Sink::Text { header: *header, more: request.more }, header.data_len);
    }

    /// The text of a login or of a Text Request is here, or a part of it.
    fn finish_text<M: Memory>(&mut self, header: &Header, more: bool, mem: &mut M) {
        match header.body {
            Body::Login(request) if more => {
                if request.transit {
                    return self.fail(CloseReason::Login(LoginStatus::InitiatorError));
                }
                self.push_login(header.itt, &request, None, (0, 0), 0, &[], mem);
            }
            Body::Login(request) => {
                // Logins have no number in the window.
                if let Some(index) = self.start(header.itt, true, Request::Login(request)) {
                    self.ready.push_back(index);
                }
            }
            _ if more => {
                self.give_back(header.immediate);
                self.ask_for_text(header.itt, header.lun, mem);
            }
            _ => {
                self.text_header = header.encode();
                if let Some(index) = self.start(header.itt, header.immediate, Request::Text) {
                    self.tasks[usize::from(index)].lun = header.lun;
                    self.ready.push_back(index);
                }
            }
        }
    }

    fn handle_nop_out<M: Memory>(&mut self, header: &Header, mem: &mut M) {
        if header.itt == NO_TAG {
            // The answer to our own question: that it came is all.
            return self.drop_data(header.data_len);
        }
        let mut buf = None;
        if header.data_len > 0 {
            buf = mem.alloc(header.data_len);
            if buf.is_none() {
                self.push_reject(RejectReason::ImmediateCommandReject, mem);
                return self.drop_data(header.data_len);
            }
        }
        self.receive(Sink::Ping { header: *header, buf }, header.data_len);
    }

    fn handle_scsi<M: Memory>(&mut self, header: &Header, mem: &mut M) -> Taken {
        let Body::ScsiCommand { last, read, write, edtl, cdb, .. } = header.body else {
            return true;
        };
        let Some(extended) = extended_cdb(self.header.ahs()) else {
            self.consume(header.immediate);
            self.push_reject(RejectReason::InvalidPduField, mem);
            self.drop_data(header.data_len);
            return true;
        };
        let present = header.data_len;
        let shift = decode_lun(header.lun)
            .and_then(|lun| self.shifts.get(usize::from(lun)).copied())
            .unwrap_or(0);
        let wanted = if extended || shift == 0 && is_sized_in_blocks(&cdb) {
            0
        } else {
            data_out_len(&cdb, shift)
        };
        let step = self.config.max_data_len;
        // What comes unasked is to fit the first step.
        let most = if comes_in_steps(cdb[0]) && self.params.first_burst <= step {
            step.max(MAX_TRANSFER_LEN)
        } else {
            step
        };
        // A command that wants more than any may is refused without its data.
        let end = match u32::try_from(wanted) {
            Ok(wanted) if write && wanted <= most => wanted.min(edtl),
            _ => 0,
        };
        let need = end.min(step);
        let failure = self.check_unsolicited(write, last, present, edtl);
        let early = failure.is_none() && need > 0 && (present > 0 || !last);
        let mut failure = failure;
        let mut buf = None;
        if early {
            buf = if self.waiting.is_empty() { mem.alloc(need) } else { None };
            if buf.is_none() && self.receiving == 0 {
                // Nothing that holds memory waits for this stream: it may stop.
                self.stalled_for_memory = true;
                return false;
            }
            if buf.is_none() {
                failure = Some(Status::TaskSetFull);
            }
        }
        let lun = header.lun;
        let scsi =
            ScsiCommand { lun, cdb, extended, edtl, wanted, received: 0, done: 0, flushed: false };
        let Some(slot) = self.start(header.itt, header.immediate, Request::Scsi(scsi)) else {
            return false;
        };
        self.advance(header.immediate);
        let task = &mut self.tasks[usize::from(slot)];
        task.state = State::Receiving;
        if buf.is_some() {
            self.receiving += 1;
        }
        (task.lun, task.edtl, task.read, task.write) = (lun, edtl, read, write);
        (task.wanted, task.need, task.buf, task.failure) = (wanted, need, buf, failure);
        task.end = end;
        task.unsolicited = write && !last;
        self.receive(Sink::Task { slot, at: 0, last: false }, present);
        true
    }

    /// Whether the data that comes with a command, or right after it, is what was agreed on.
    fn check_unsolicited(
        &self,
        write: bool,
        last: bool,
        present: u32,
        edtl: u32,
    ) -> Option<Status> {
        let too_much = present > 0
            && (!write
                || !self.params.immediate_data
                || present > self.params.first_burst.min(edtl));
        let unexpected = write && !last && self.params.initial_r2t;
        (too_much || unexpected).then(|| Sense::UNEXPECTED_UNSOLICITED.into())
    }

    fn handle_data_out<M: Memory>(
        &mut self,
        header: &Header,
        last: bool,
        ttt: u32,
        data_sn: u32,
        offset: u32,
        mem: &mut M,
    ) {
        let len = header.data_len;
        let slot = match ttt {
            NO_TAG => self.slot_of(header.itt),
            _ => u16::try_from(ttt & 0xffff).ok(),
        };
        let found = slot.and_then(|slot| {
            let task = self.tasks.get(usize::from(slot))?;
            let expected = match ttt {
                NO_TAG => task.unsolicited,
                _ => task.ttt == ttt && task.burst_end > 0 && !task.unsolicited,
            };
            let itt = self.itts[usize::from(slot)];
            (task.state == State::Receiving && expected && itt == header.itt).then_some(slot)
        });
        let Some(slot) = found else {
            // Its task was aborted, or has ended.
            return self.drop_data(len);
        };
        let (first_burst, initial_r2t) = (self.params.first_burst, self.params.initial_r2t);
        let task = &mut self.tasks[usize::from(slot)];
        let end = if task.unsolicited {
            if initial_r2t { task.received } else { first_burst.min(task.edtl) }
        } else {
            task.burst_end
        };
        let fits = offset == task.received && len <= end.saturating_sub(task.received);
        if task.failure.is_none() && (data_sn != task.data_sn || !fits) {
            task.failure = Some(Sense::DATA_PHASE_ERROR.into());
        }
        task.data_sn = task.data_sn.wrapping_add(1);
        task.quiet = 0;
        let sink = match task.failure {
            Some(_) => Sink::Task { slot, at: u32::MAX - len, last },
            None => Sink::Task { slot, at: offset, last },
        };
        self.receive(sink, len);
        let _ = mem;
    }

    /// A PDU with data of a task has ended: its own, or a Data-Out.
    fn after_data<M: Memory>(&mut self, slot: u16, last: bool, mem: &mut M) {
        let header = self.header.bhs();
        let (_, len) = lengths(&header);
        let task = &mut self.tasks[usize::from(slot)];
        task.received = task.received.saturating_add(len);
        if task.unsolicited {
            task.unsolicited = !last;
            if last {
                task.data_sn = 0;
            } else {
                return;
            }
        } else if task.burst_end > 0 {
            match (last, task.received.cmp(&task.burst_end)) {
                (false, std::cmp::Ordering::Less) => return,
                (true, std::cmp::Ordering::Equal) => {}
                _ if task.failure.is_some() && !last => return,
                _ => {
                    task.failure.get_or_insert(Sense::NOT_ENOUGH_DATA.into());
                }
            }
        }
        if task.failure.is_none() && task.received < task.need {
            task.state = State::Waiting;
            if task.buf.is_some() {
                // It has its buffer: nobody without one may hold it up.
                self.receiving -= 1;
                self.waiting.push_front(slot);
            } else {
                self.waiting.push_back(slot);
            }
            return self.serve_waiting(mem);
        }
        if task.buf.is_some() {
            self.receiving -= 1;
        }
        self.finish_receiving(slot, mem);
    }

    /// All of a command is here: it is handed out, or ends as it must.
    fn finish_receiving<M: Memory>(&mut self, slot: u16, mem: &mut M) {
        let task = &mut self.tasks[usize::from(slot)];
        task.state = State::Ready;
        if let Some(status) = task.failure {
            if let Some(buf) = task.buf.take() {
                mem.release(buf);
            }
            self.push_response(slot, status, mem);
            self.release_slot(slot);
        } else {
            self.ready.push_back(slot);
        }
    }

    /// Asks for the data of the tasks that wait, in order, while there is memory and room.
    pub(super) fn serve_waiting<M: Memory>(&mut self, mem: &mut M) {
        while let Some(&slot) = self.waiting.front() {
            if self.close_reason.is_some() || !self.has_room(48 + 4) {
                return;
            }
            let task = &mut self.tasks[usize::from(slot)];
            if task.buf.is_none() {
                let Some(buf) = mem.alloc(task.need - task.start) else { return };
                task.buf = Some(buf);
            }
            self.waiting.pop_front();
            self.receiving += 1;
            let max_burst = self.params.max_burst;
            let task = &mut self.tasks[usize::from(slot)];
            task.state = State::Receiving;
            task.quiet = 0;
            task.burst_end = task.need.min(task.received.saturating_add(max_burst));
            task.data_sn = 0;
            self.push_r2t(slot, mem);
        }
    }
}

/// Copies what of `source` belongs to `buf`, `at` bytes into it.
fn keep<M: Memory>(buf: Option<&Buf>, at: u32, source: BufSlice, mem: &mut M) {
    let Some(buf) = buf else { return };
    let n = buf.len().saturating_sub(at).min(source.len());
    if n > 0 {
        mem.copy(source.sub(0, n), buf.slice().sub(at, n));
    }
}

/// Whether additional header segments hold a longer CDB; nothing where they make no sense.
fn extended_cdb(mut ahs: &[u8]) -> Option<bool> {
    const EXTENDED_CDB: u8 = 1;
    const BIDIRECTIONAL: u8 = 2;
    let mut extended = false;
    while !ahs.is_empty() {
        let len = usize::from(u16_at(ahs.get(..4)?, 0));
        match ahs[2] & 0x3f {
            EXTENDED_CDB if len > 1 && !extended => extended = true,
            BIDIRECTIONAL if len == 5 => {}
            _ => return None,
        }
        // The length counts what follows the type, and segments fill whole words.
        ahs = ahs.get((3 + len).next_multiple_of(4)..)?;
    }
    Some(extended)
}

/// Whether the data of a command is measured in blocks.
fn is_sized_in_blocks(cdb: &[u8; 16]) -> bool {
    data_out_len(cdb, 0) != data_out_len(cdb, 9)
}
