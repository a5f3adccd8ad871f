//! What a connection answers.

use cairn_block::{Buf, Memory};

use super::task::{OutData, State};
use super::{
    CONNECTION_RESERVE, CloseReason, Connection, Phase, RESPONSE_ITEMS, RESPONSE_RESERVE,
    RING_SEGMENT, Request, SlotId,
};
use crate::keys::Params;
use crate::login::FULL_FEATURE;
use crate::pdu::{
    BHS_LEN, Body, Header, LoginRequest, LoginResponse, NO_TAG, RejectReason, Residual, Sn,
};
use crate::scsi::sense::Status;
use crate::wire::{len32, pad_len};

/// The most text in one response.
const TEXT_SEGMENT: u32 = 4000;
/// iSCSI response code: the command was completed at the target.
const COMPLETED: u8 = 0;

/// How far the data of a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pushed {
    /// There is more in its buffer.
    Some,
    /// Its buffer is; the next step follows once that is sent.
    Part,
    /// All of it is, and its status.
    All,
}

impl Connection {
    /// Whether `len` more bytes fit the ring beside the responses of all tasks, and what belongs to
    /// none: the PDU that is being received may need that once it is whole.
    pub(super) fn has_room(&self, len: u32) -> bool {
        let in_use = self.tasks.len() - self.free.len();
        self.tx.free() >= RESPONSE_RESERVE * len32(in_use) + CONNECTION_RESERVE + len
            && self.tx.free_items() >= RESPONSE_ITEMS * in_use + 8
    }

    fn sn(&self) -> Sn {
        Sn { stat: self.stat_sn, exp_cmd: self.exp_cmd_sn, max_cmd: self.max_cmd_sn }
    }

    /// The sequence numbers of a PDU that has a status.
    fn next_sn(&mut self) -> Sn {
        let sn = self.sn();
        self.stat_sn = self.stat_sn.wrapping_add(1);
        sn
    }

    fn push_header<M: Memory>(&mut self, header: &Header, mem: &mut M) {
        let bytes = header.encode();
        self.tx.push_bytes(&bytes, mem);
        if self.is_logged_in() && self.params.digests.header {
            self.tx.push_bytes(&crc32c::crc32c(&bytes).to_le_bytes(), mem);
        }
    }

    /// A data segment that goes through the ring.
    fn push_segment<M: Memory>(&mut self, data: &[u8], mem: &mut M) {
        if data.is_empty() {
            return;
        }
        self.tx.push_bytes(data, mem);
        self.push_tail(crc32c::crc32c(data), len32(data.len()), mem);
    }

    /// Padding and digest after `len` bytes of data whose CRC is `crc`.
    fn push_tail<M: Memory>(&mut self, crc: u32, len: u32, mem: &mut M) {
        let pad = &[0; 3][..pad_len(len) as usize];
        self.tx.push_bytes(pad, mem);
        if self.is_logged_in() && self.params.digests.data {
            self.tx.push_bytes(&crc32c::crc32c_append(crc, pad).to_le_bytes(), mem);
        }
    }

    /// Rejects the PDU whose header was read last.
    pub(super) fn push_reject<M: Memory>(&mut self, reason: RejectReason, mem: &mut M) {
        self.push_reject_of(&self.header.bhs(), reason, mem);
    }

    fn push_reject_of<M: Memory>(
        &mut self,
        offending: &[u8; BHS_LEN],
        reason: RejectReason,
        mem: &mut M,
    ) {
        let sn = self.next_sn();
        let body = Body::Reject { reason: reason as u8, sn };
        self.push_header(&Header::new(NO_TAG, len32(offending.len()), body), mem);
        self.push_segment(offending, mem);
    }

    pub(super) fn push_async<M: Memory>(&mut self, event: u8, parameters: [u16; 3], mem: &mut M) {
        if self.close_reason.is_some() || !self.is_logged_in() || !self.has_room(128) {
            return;
        }
        let sn = self.next_sn();
        let body = Body::Async { event, vcode: 0, sn, parameters };
        self.push_header(&Header::new(NO_TAG, 0, body), mem);
    }

    /// Asks whether the initiator is there.
    /// False where there is no room for that.
    pub(super) fn ping<M: Memory>(&mut self, mem: &mut M) -> bool {
        if !self.has_room(128) {
            return false;
        }
        // StatSN is told, and not used up. The tag tells the answer from others.
        let body = Body::NopIn { ttt: 1, sn: self.sn() };
        self.push_header(&Header::new(NO_TAG, 0, body), mem);
        true
    }

    pub(super) fn answer_ping<M: Memory>(
        &mut self,
        header: &Header,
        buf: Option<Buf>,
        mem: &mut M,
    ) {
        let len = buf.as_ref().map_or(0, Buf::len).min(self.params.max_send_segment);
        let sn = self.next_sn();
        let body = Body::NopIn { ttt: NO_TAG, sn };
        self.push_header(&Header::new(header.itt, len, body).with_lun(header.lun), mem);
        if let Some(buf) = buf {
            let crc = crc32c::crc32c(mem.bytes(buf.slice().sub(0, len)));
            self.tx.push_owned(buf, len);
            self.push_tail(crc, len, mem);
            self.echoed = self.tx.mark();
        }
    }

    pub(super) fn push_r2t<M: Memory>(&mut self, slot: u16, mem: &mut M) {
        let sn = self.sn();
        let task = &mut self.tasks[usize::from(slot)];
        let body = Body::R2t {
            ttt: task.ttt,
            sn,
            r2t_sn: task.r2t_sn,
            offset: task.received,
            len: task.burst_end - task.received,
        };
        task.r2t_sn += 1;
        let header = Header::new(self.itts[usize::from(slot)], 0, body).with_lun(task.lun);
        self.push_header(&header, mem);
    }

    /// Ends a command without data.
    pub(crate) fn respond<M: Memory>(&mut self, slot: SlotId, status: Status, mem: &mut M) {
        if !self.take_back(slot, mem) {
            return;
        }
        if self.close_reason.is_none() {
            self.push_response(slot.0, status, mem);
        }
        self.release_slot(slot.0);
    }

    /// How much less or more a task transferred than the initiator expected, where the command
    /// moved `data_in` bytes to it.
    fn residual(&self, slot: u16, data_in: u32) -> Residual {
        let task = &self.tasks[usize::from(slot)];
        let actual = if task.wanted > 0 { task.wanted } else { u64::from(data_in) };
        Residual::of(actual, if task.read || task.write { task.edtl } else { 0 })
    }

    pub(super) fn push_response<M: Memory>(&mut self, slot: u16, status: Status, mem: &mut M) {
        // Of a read that takes several steps some may have been sent.
        let residual = self.residual(slot, self.tasks[usize::from(slot)].sent);
        let task = &self.tasks[usize::from(slot)];
        let exp_data_sn = task.r2t_sn + task.data_in_sn;
        let mut sense = [0; 2 + crate::scsi::sense::MAX_SENSE_LEN];
        let mut len = 0;
        if let Status::Check(s) = status {
            let (bytes, n) = s.encode(task.descriptors);
            sense[1] = n.to_le_bytes()[0];
            sense[2..2 + n].copy_from_slice(&bytes[..n]);
            len = 2 + n;
        }
        let itt = self.itts[usize::from(slot)];
        let sn = self.next_sn();
        let body = Body::ScsiResponse {
            response: COMPLETED,
            status: status.code(),
            sn: Sn { max_cmd: self.max_after(slot), ..sn },
            exp_data_sn,
            residual,
        };
        self.push_header(&Header::new(itt, len32(len), body), mem);
        self.push_segment(&sense[..len], mem);
    }

    /// MaxCmdSN once the task has ended: its response tells so already.
    fn max_after(&self, slot: u16) -> u32 {
        let more = u32::from(!self.tasks[usize::from(slot)].immediate);
        self.max_cmd_sn.wrapping_add(more)
    }

    /// Ends a command with data that the target made, cut to the CDB's allocation length before.
    pub(crate) fn respond_with<M: Memory>(&mut self, slot: SlotId, data: Vec<u8>, mem: &mut M) {
        self.send_data(slot, OutData::Made(data), mem);
    }

    pub(super) fn send_data<M: Memory>(&mut self, slot: SlotId, data: OutData, mem: &mut M) {
        let task = &self.tasks[usize::from(slot.0)];
        let left = task.edtl - task.start.min(task.edtl);
        let len = if task.read { data.len().min(left) } else { 0 };
        if task.aborted.is_some() || self.close_reason.is_some() || len == 0 {
            let all = data.len();
            if let OutData::Buf(buf) = data {
                mem.release(buf);
            }
            if !self.take_back(slot, mem) {
                return;
            }
            if self.close_reason.is_none() {
                // Nothing of it can be sent: the residual says how much there was.
                self.tasks[usize::from(slot.0)].wanted = u64::from(all);
                self.push_response(slot.0, Status::Good, mem);
            }
            return self.release_slot(slot.0);
        }
        self.take_back(slot, mem);
        let task = &mut self.tasks[usize::from(slot.0)];
        task.state = State::Sending;
        task.out_data = Some(data);
        self.sending.push_back(slot.0);
        self.pump(mem);
    }

    /// Sends data that waits, and what comes after it, in order, while there is room for its headers.
    pub(super) fn pump<M: Memory>(&mut self, mem: &mut M) {
        while let Some(&slot) = self.sending.front() {
            let task = &self.tasks[usize::from(slot)];
            let (request, answer) = (task.request, task.answer);
            // Each task has room for an answer without data.
            let room = match request {
                Request::TaskManagement { .. } | Request::Logout { .. } => 0,
                _ => RING_SEGMENT + 64,
            };
            if self.close_reason.is_some() || room > 0 && !self.has_room(room) {
                return;
            }
            let done = match request {
                Request::TaskManagement { function, .. } => {
                    self.push_task_management(slot, function, answer, mem)
                }
                Request::Logout { .. } => self.push_logout(slot, answer, mem),
                Request::Text => self.push_text(slot, mem),
                _ => match self.push_data_in(slot, mem) {
                    Pushed::Some => false,
                    Pushed::All => true,
                    Pushed::Part => {
                        self.sending.pop_front();
                        continue;
                    }
                },
            };
            if done {
                self.sending.pop_front();
                self.release_slot(slot);
            }
        }
    }

    /// Ends a request that is no command, after all data that waits: what it says of other tasks is
    /// true only once their ends have been told.
    fn respond_in_turn<M: Memory>(&mut self, slot: SlotId, answer: u8, mem: &mut M) {
        if !self.take_back(slot, mem) {
            return;
        }
        if self.close_reason.is_some() {
            return self.release_slot(slot.0);
        }
        let task = &mut self.tasks[usize::from(slot.0)];
        task.state = State::Sending;
        task.answer = answer;
        self.sending.push_back(slot.0);
        self.pump(mem);
    }

    /// Sends the next Data-In of a task.
    fn push_data_in<M: Memory>(&mut self, slot: u16, mem: &mut M) -> Pushed {
        let Params { max_send_segment, max_burst, .. } = self.params;
        let digest = self.params.digests.data;
        let at = usize::from(slot);
        let task = &mut self.tasks[at];
        let Some(data) = task.out_data.take() else { return Pushed::All };
        let all = task.start + data.len();
        let total = all.min(task.edtl);
        // A step of several: the status comes with the last.
        let part = all < task.end;
        let offset = task.sent;
        let burst_left = max_burst - offset % max_burst;
        let mut len = (total - offset).min(max_send_segment).min(burst_left);
        if matches!(data, OutData::Made(_)) {
            len = len.min(RING_SEGMENT);
        }
        task.sent += len;
        let data_sn = task.data_in_sn;
        task.data_in_sn += 1;
        let done = task.sent == total;
        let last = done && !part;
        let all = all.max(task.whole);
        let start = task.start;
        let ends_burst = last || task.sent.is_multiple_of(max_burst);
        let status = last.then(|| Status::Good.code());
        let residual = if last { self.residual(slot, all) } else { Residual::None };
        let sn = if last { self.next_sn() } else { Sn { stat: 0, ..self.sn() } };
        let max_cmd = if last { self.max_after(slot) } else { sn.max_cmd };
        let body = Body::DataIn {
            last: ends_burst,
            status,
            ttt: NO_TAG,
            sn: Sn { max_cmd, ..sn },
            data_sn,
            offset,
            residual,
        };
        self.push_header(&Header::new(self.itts[at], len, body), mem);
        match data {
            OutData::Made(bytes) => {
                self.push_segment(&bytes[offset as usize..(offset + len) as usize], mem);
                self.tasks[at].out_data = (!last).then_some(OutData::Made(bytes));
            }
            OutData::Buf(buf) => {
                let window = buf.slice().sub(offset - start, len);
                let crc = if digest { crc32c::crc32c(mem.bytes(window)) } else { 0 };
                if done {
                    self.tx.push_last(buf, window);
                } else {
                    self.tx.push_borrowed(window);
                    self.tasks[at].out_data = Some(OutData::Buf(buf));
                }
                self.push_tail(crc, len, mem);
                if done && part {
                    self.parts.push((slot, self.tx.mark()));
                    return Pushed::Part;
                }
            }
        }
        if last { Pushed::All } else { Pushed::Some }
    }

    /// Answers a Text Request. `text` is sent in as many parts as the initiator asks for.
    pub(crate) fn respond_text<M: Memory>(&mut self, slot: SlotId, text: Vec<u8>, mem: &mut M) {
        if !self.text.is_empty() || self.text_out.is_empty() {
            self.text_out = text;
        }
        self.text.clear();
        self.respond_in_turn(slot, 0, mem);
    }

    /// Ends a Text Request that makes no sense.
    pub(crate) fn reject_text<M: Memory>(&mut self, slot: SlotId, mem: &mut M) {
        self.text.clear();
        if !self.take_back(slot, mem) {
            return;
        }
        self.release_slot(slot.0);
        if self.close_reason.is_none() {
            let offending = self.text_header;
            self.push_reject_of(&offending, RejectReason::ProtocolError, mem);
        }
    }

    fn push_text<M: Memory>(&mut self, slot: u16, mem: &mut M) -> bool {
        // In one response where that can be: not every initiator asks for the rest.
        let most = self.params.max_send_segment.min(mem.max_alloc());
        let mut len = self.text_out.len().min(most as usize);
        let mut buf = None;
        if len > TEXT_SEGMENT as usize {
            buf = mem.alloc(len32(len));
        }
        if buf.is_none() {
            len = len.min(TEXT_SEGMENT as usize);
        }
        let rest = self.text_out.split_off(len);
        let part = std::mem::replace(&mut self.text_out, rest);
        let (itt, lun) = (self.itts[usize::from(slot)], self.tasks[usize::from(slot)].lun);
        let last = self.text_out.is_empty();
        let max_cmd = self.max_after(slot);
        self.push_text_header(itt, lun, len32(part.len()), last, max_cmd, mem);
        let Some(buf) = buf else {
            self.push_segment(&part, mem);
            return true;
        };
        mem.bytes_mut(buf.slice()).copy_from_slice(&part);
        self.tx.push_owned(buf, len32(part.len()));
        self.push_tail(crc32c::crc32c(&part), len32(part.len()), mem);
        true
    }

    /// Asks for the rest of a text that came in part.
    pub(super) fn ask_for_text<M: Memory>(&mut self, itt: u32, lun: u64, mem: &mut M) {
        self.push_text_header(itt, lun, 0, false, self.max_cmd_sn, mem);
    }

    /// The header of a Text Response; where it is not the last, the initiator asks for the next.
    fn push_text_header<M: Memory>(
        &mut self,
        itt: u32,
        lun: u64,
        len: u32,
        last: bool,
        max_cmd: u32,
        mem: &mut M,
    ) {
        let sn = Sn { max_cmd, ..self.next_sn() };
        // C where text was cut.
        let more = !last && len > 0;
        let body = Body::TextResponse { last, more, ttt: if last { NO_TAG } else { 1 }, sn };
        self.push_header(&Header::new(itt, len, body).with_lun(lun), mem);
    }

    pub(crate) fn respond_task_management<M: Memory>(
        &mut self,
        slot: SlotId,
        response: u8,
        mem: &mut M,
    ) {
        self.respond_in_turn(slot, response, mem);
    }

    fn push_task_management<M: Memory>(
        &mut self,
        slot: u16,
        function: u8,
        response: u8,
        mem: &mut M,
    ) -> bool {
        const TARGET_COLD_RESET: u8 = 7;
        let sn = Sn { max_cmd: self.max_after(slot), ..self.next_sn() };
        let body = Body::TaskManagementResponse { response, sn };
        self.push_header(&Header::new(self.itts[usize::from(slot)], 0, body), mem);
        if response == 0 && function == TARGET_COLD_RESET {
            self.fail(CloseReason::Dropped);
        }
        true
    }

    pub(crate) fn respond_logout<M: Memory>(&mut self, slot: SlotId, response: u8, mem: &mut M) {
        self.respond_in_turn(slot, response, mem);
    }

    fn push_logout<M: Memory>(&mut self, slot: u16, response: u8, mem: &mut M) -> bool {
        let sn = Sn { max_cmd: self.max_after(slot), ..self.next_sn() };
        let body = Body::LogoutResponse { response, sn, time2wait: 2, time2retain: 0 };
        self.push_header(&Header::new(self.itts[usize::from(slot)], 0, body), mem);
        if response == 0 {
            self.fail(CloseReason::LoggedOut);
        }
        true
    }

    /// Answers a login request; with `transit_to` the full feature phase it is over.
    #[expect(clippy::too_many_arguments, reason = "a response has this many fields")]
    pub(crate) fn push_login<M: Memory>(
        &mut self,
        itt: u32,
        request: &LoginRequest,
        transit_to: Option<u8>,
        status: (u8, u8),
        tsih: u16,
        text: &[u8],
        mem: &mut M,
    ) {
        let sn = self.next_sn();
        let body = Body::LoginResponse(LoginResponse {
            transit: transit_to.is_some(),
            more: false,
            csg: request.csg,
            nsg: transit_to.unwrap_or(0),
            isid: request.isid,
            tsih,
            sn,
            status,
        });
        self.push_header(&Header::new(itt, len32(text.len()), body), mem);
        self.push_segment(text, mem);
    }

    /// Ends a login request that was handed out.
    pub(crate) fn respond_login<M: Memory>(
        &mut self,
        slot: SlotId,
        request: &LoginRequest,
        outcome: Result<(Option<u8>, u16, &[u8]), crate::login::LoginStatus>,
        mem: &mut M,
    ) {
        let itt = self.itts[usize::from(slot.0)];
        if !self.take_back(slot, mem) {
            return;
        }
        self.release_slot(slot.0);
        self.text.clear();
        match outcome {
            Ok((transit_to, tsih, text)) => {
                if transit_to == Some(FULL_FEATURE) {
                    // The last response tells the window of the session.
                    let window = u32::from(self.config.max_tasks);
                    self.max_cmd_sn = self.exp_cmd_sn.wrapping_add(window - 1);
                }
                self.push_login(itt, request, transit_to, (0, 0), tsih, text, mem);
                if transit_to == Some(FULL_FEATURE)
                    && let Some(login) = self.login.take()
                {
                    self.params = login.params();
                    self.phase = Phase::FullFeature { discovery: login.is_discovery() };
                    self.deadline_ms = None;
                }
            }
            Err(status) => {
                self.push_login(itt, request, None, status.code(), 0, &[], mem);
                self.fail(CloseReason::Login(status));
            }
        }
    }
}
