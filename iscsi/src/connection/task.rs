//! A request and its data, from the header to the last byte of the response.

use cairn_block::{Buf, Memory};

use super::receive::{Sink, Stage};
use super::{Connection, Request, SlotId};
use crate::pdu::{NO_TAG, decode_lun};
use crate::scsi::UnitHandle;
use crate::scsi::sense::Status;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    /// In `waiting`: its data will be asked for once there is a buffer and room for the R2T.
    Waiting,
    /// Its data is on the way.
    Receiving,
    /// In `ready` or `parked`.
    Ready,
    /// Handed out.
    Out,
    /// In `sending`.
    Sending,
}

/// Data on its way to the initiator.
#[derive(Debug)]
pub(super) enum OutData {
    /// Block data.
    Buf(Buf),
    /// What the target made itself.
    Made(Vec<u8>),
}

impl OutData {
    pub(super) fn len(&self) -> u32 {
        match self {
            Self::Buf(buf) => buf.len(),
            Self::Made(bytes) => crate::wire::len32(bytes.len()),
        }
    }
}

/// Who aborted a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// Its own session, which gets no answer.
    Own,
    /// Another, or the target: TASK ABORTED is its answer.
    Other,
}

#[derive(Debug)]
pub(super) struct Task {
    pub(super) state: State,
    pub(super) request: Request,
    pub(super) immediate: bool,
    pub(super) lun: u64,
    /// Expected Data Transfer Length.
    pub(super) edtl: u32,
    /// Whether the initiator sends, and whether it expects, data.
    pub(super) write: bool,
    pub(super) read: bool,
    /// Bytes that the CDB wants from the initiator.
    pub(super) wanted: u64,
    /// As much of it as is taken, and how much is before the step in hand. The buffer is as long as the step.
    pub(super) need: u32,
    pub(super) start: u32,
    /// All of it that is taken, or read, in steps.
    pub(super) end: u32,
    /// What a READ that takes several would give, were there room for all of it.
    pub(super) whole: u32,
    /// Bytes that came; they come in order.
    pub(super) received: u32,
    pub(super) buf: Option<Buf>,
    /// Unsolicited Data-Out is still to come.
    pub(super) unsolicited: bool,
    /// Where the burst ends that was asked for.
    pub(super) burst_end: u32,
    /// DataSN of the next Data-Out.
    pub(super) data_sn: u32,
    pub(super) r2t_sn: u32,
    /// Target Transfer Tag.
    pub(super) ttt: u32,
    /// How the command ends once its data is drained, in place of being handed out.
    pub(super) failure: Option<Status>,
    pub(super) aborted: Option<By>,
    /// What carries it out.
    pub(super) unit: Option<UnitHandle>,
    /// The other logical units that a copy reads or writes.
    pub(super) reaches: Vec<u64>,
    /// How often the time was looked at since data of it came last.
    pub(super) quiet: u32,
    /// The response code of a request that is no command.
    pub(super) answer: u8,
    /// Sense data goes in descriptor format.
    pub(super) descriptors: bool,
    /// It is offered again once what it was handed out for is done.
    pub(super) comes_back: bool,
    /// The status of success.
    pub(super) good: Status,
    pub(super) out_data: Option<OutData>,
    /// Bytes of it that were sent, and the sequence number of the next PDU.
    pub(super) sent: u32,
    pub(super) data_in_sn: u32,
}

impl Task {
    pub(super) fn free() -> Self {
        Self {
            state: State::Free,
            request: Request::Text,
            immediate: false,
            lun: 0,
            edtl: 0,
            write: false,
            read: false,
            wanted: 0,
            need: 0,
            start: 0,
            end: 0,
            whole: 0,
            received: 0,
            buf: None,
            unsolicited: false,
            burst_end: 0,
            data_sn: 0,
            r2t_sn: 0,
            ttt: 0,
            failure: None,
            aborted: None,
            unit: None,
            reaches: Vec::new(),
            quiet: 0,
            answer: 0,
            descriptors: false,
            comes_back: false,
            good: Status::Good,
            out_data: None,
            sent: 0,
            data_in_sn: 0,
        }
    }
}

/// Copies that are remembered.
const MAX_COPIES: usize = 16;

/// An EXTENDED COPY, for whoever asks what became of it.
#[derive(Debug)]
pub(super) struct CopyRecord {
    /// LIST IDENTIFIER.
    list: u8,
    segments: u16,
    state: CopyState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyState {
    Running(SlotId),
    Done,
    Failed,
}

impl Connection {
    /// Remembers a copy that was handed out, and which other logical units it reaches.
    pub(crate) fn begin_copy(
        &mut self,
        slot: SlotId,
        list: u8,
        segments: usize,
        reaches: Vec<u64>,
    ) {
        self.tasks[usize::from(slot.0)].reaches = reaches;
        self.copies.retain(|copy| copy.list != list);
        if self.copies.len() == MAX_COPIES {
            self.copies.pop_front();
        }
        let segments = u16::try_from(segments).unwrap_or(u16::MAX);
        self.copies.push_back(CopyRecord { list, segments, state: CopyState::Running(slot) });
    }

    pub(super) fn end_copy(&mut self, slot: SlotId, ok: bool) {
        for copy in &mut self.copies {
            if copy.state == CopyState::Running(slot) {
                copy.state = if ok { CopyState::Done } else { CopyState::Failed };
            }
        }
    }

    /// The parameter data of RECEIVE COPY RESULTS, COPY STATUS (LID1).
    pub(crate) fn copy_status(&self, list: u8) -> Option<Vec<u8>> {
        let copy = self.copies.iter().find(|copy| copy.list == list)?;
        let (state, segments) = match copy.state {
            CopyState::Running(_) => (0, 0),
            CopyState::Done => (1, copy.segments),
            CopyState::Failed => (2, 0),
        };
        let mut b = vec![0; 12];
        b[3] = 8;
        b[4] = state;
        crate::wire::put(&mut b, 5, &segments.to_be_bytes());
        Some(b)
    }
}

/// What became of a task that was to be aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aborted {
    /// There is none, or its answer is on its way.
    Nothing,
    /// It was not carried out.
    Before,
    /// It is being carried out, by this unit: what it does to the disk has to be waited for.
    During(Option<UnitHandle>),
}

impl Task {
    /// Whether what is being sent of it is not the last step.
    pub(super) fn is_part(&self) -> bool {
        let len = self.out_data.as_ref().map_or(0, OutData::len);
        self.end > 0 && !self.write && self.start + len < self.end
    }
}

impl Connection {
    /// Goes on with a command that takes several steps, one of which has been written: asks for the data of the next.
    pub(super) fn next_write<M: Memory>(&mut self, slot: SlotId, mem: &mut M) {
        if !self.take_back(slot, mem) {
            return;
        }
        if self.close_reason.is_some() {
            return self.release_slot(slot.0);
        }
        let most = self.config.max_data_len;
        let task = &mut self.tasks[usize::from(slot.0)];
        task.start = task.need;
        task.need = task.end.min(task.start.saturating_add(most));
        task.state = State::Waiting;
        self.waiting.push_back(slot.0);
        self.serve_waiting(mem);
    }

    /// What a command was to wait for is durable: it is offered again, once the connection is tried again.
    pub(super) fn come_back<M: Memory>(&mut self, slot: SlotId, mem: &mut M) {
        if !self.take_back(slot, mem) {
            return;
        }
        if self.close_reason.is_some() {
            return self.release_slot(slot.0);
        }
        let task = &mut self.tasks[usize::from(slot.0)];
        task.comes_back = false;
        if let Request::Scsi(scsi) = &mut task.request {
            scsi.flushed = true;
        }
        self.parked.push_back(slot.0);
    }

    /// Goes on with reads of which a step has been sent.
    pub(super) fn next_reads<M: Memory>(&mut self, mem: &mut M) {
        let mut at = 0;
        while let Some(&(slot, mark)) = self.parts.get(at) {
            if !self.tx.was_sent(mark) {
                at += 1;
                continue;
            }
            self.parts.swap_remove(at);
            let task = &mut self.tasks[usize::from(slot)];
            task.start = task.sent;
            task.state = State::Ready;
            match task.aborted {
                Some(by) => self.end_aborted(slot, by, mem),
                None => self.ready.push_back(slot),
            }
        }
    }

    /// Takes a slot for a request.
    pub(super) fn start(&mut self, itt: u32, immediate: bool, request: Request) -> Option<u16> {
        let index = self.free.pop()?;
        self.itts[usize::from(index)] = itt;
        let tag = u32::from(self.next_tag);
        self.next_tag = self.next_tag.wrapping_add(1) & 0x7fff;
        self.immediates += usize::from(immediate);
        self.tasks[usize::from(index)] = Task {
            request,
            immediate,
            ttt: tag << 16 | u32::from(index),
            state: State::Ready,
            ..Task::free()
        };
        Some(index)
    }

    pub(super) fn slot_of(&self, itt: u32) -> Option<u16> {
        let at = self.itts.iter().position(|i| *i == itt)?;
        u16::try_from(at).ok()
    }

    pub(super) fn release_slot(&mut self, index: u16) {
        let at = usize::from(index);
        let task = &mut self.tasks[at];
        assert_ne!(task.state, State::Free, "slot {index} was released twice");
        task.state = State::Free;
        self.itts[at] = NO_TAG;
        if task.immediate {
            self.immediates -= 1;
        } else {
            self.max_cmd_sn = self.max_cmd_sn.wrapping_add(1);
        }
        self.free.push(index);
    }

    /// Takes a slot back that was handed out; false where its task was aborted and ends here.
    pub(super) fn take_back<M: Memory>(&mut self, slot: SlotId, mem: &mut M) -> bool {
        let task = &mut self.tasks[usize::from(slot.0)];
        assert_eq!(task.state, State::Out, "slot {} was completed, but not handed out", slot.0);
        self.out -= 1;
        task.state = State::Ready;
        match task.aborted {
            Some(by) => self.end_aborted(slot.0, by, mem),
            None => return true,
        }
        false
    }

    /// Ends a task that was aborted and is not being carried out.
    pub(super) fn end_aborted<M: Memory>(&mut self, index: u16, by: By, mem: &mut M) {
        if let Some(buf) = self.tasks[usize::from(index)].buf.take() {
            mem.release(buf);
        }
        if by == By::Other && self.close_reason.is_none() {
            self.push_response(index, Status::TaskAborted, mem);
        }
        self.release_slot(index);
    }

    /// The task's tag of a Task Management request, if there is such a task on this logical unit.
    pub(crate) fn abort_task<M: Memory>(&mut self, itt: u32, lun: u64, mem: &mut M) -> Aborted {
        match self.slot_of(itt) {
            Some(index) if same_lun(self.tasks[usize::from(index)].lun, lun) => {
                self.abort_slot(index, By::Own, mem)
            }
            _ => Aborted::Nothing,
        }
    }

    /// Aborts all SCSI tasks of its own on a logical unit, or on all; whether one is being carried out.
    pub(crate) fn abort_tasks<M: Memory>(&mut self, lun: Option<u64>, mem: &mut M) -> bool {
        self.abort_where(By::Own, mem, |task| lun.is_none_or(|lun| same_lun(lun, task.lun)))
    }

    /// Aborts the tasks on a logical unit, and the copies that reach it, or all: see
    /// [`crate::target::Target::poll_abort`]. They end with TASK ABORTED; those that are being carried
    /// out when they are completed, as ever.
    pub fn abort<M: Memory>(&mut self, lun: Option<u64>, mem: &mut M) {
        self.abort_where(By::Other, mem, |task| {
            lun.is_none_or(|lun| {
                same_lun(lun, task.lun) || task.reaches.iter().any(|other| same_lun(lun, *other))
            })
        });
    }

    /// Whether a command that was handed out has been aborted: what takes several steps may end early,
    /// with whatever status.
    ///
    /// # Panics
    /// Where there is no such slot.
    #[must_use]
    pub fn is_aborted(&self, slot: SlotId) -> bool {
        self.tasks[usize::from(slot.0)].aborted.is_some()
    }

    fn abort_where<M: Memory>(
        &mut self,
        by: By,
        mem: &mut M,
        is_meant: impl Fn(&Task) -> bool,
    ) -> bool {
        let mut during = false;
        for index in 0..crate::wire::len32(self.tasks.len()) {
            let Ok(index) = u16::try_from(index) else { break };
            let task = &self.tasks[usize::from(index)];
            if is_meant(task) {
                during |= matches!(self.abort_slot(index, by, mem), Aborted::During(_));
            }
        }
        during
    }

    /// Aborts one SCSI task.
    fn abort_slot<M: Memory>(&mut self, index: u16, by: By, mem: &mut M) -> Aborted {
        let task = &mut self.tasks[usize::from(index)];
        if !matches!(task.request, Request::Scsi(_)) {
            return Aborted::Nothing;
        }
        match task.state {
            // The next steps of it are not begun.
            State::Sending if task.is_part() => {
                task.aborted.get_or_insert(by);
                return Aborted::Before;
            }
            State::Free | State::Sending => return Aborted::Nothing,
            State::Out => {
                if task.aborted != Some(By::Own) {
                    task.aborted = Some(by);
                }
                return Aborted::During(task.unit);
            }
            State::Receiving => {
                if task.buf.is_some() {
                    self.receiving -= 1;
                }
                // A PDU of its data may be half here.
                if let Stage::Payload { sink, .. } = &mut self.stage
                    && matches!(sink, Sink::Task { slot, .. } if *slot == index)
                {
                    *sink = Sink::Drop;
                }
            }
            State::Waiting => self.waiting.retain(|i| *i != index),
            State::Ready => {
                self.ready.retain(|i| *i != index);
                self.parked.retain(|i| *i != index);
            }
        }
        self.end_aborted(index, by, mem);
        Aborted::Before
    }
}

/// Whether two logical unit numbers are the same, in whatever form they came.
fn same_lun(a: u64, b: u64) -> bool {
    a == b || decode_lun(a).is_some_and(|lun| decode_lun(b) == Some(lun))
}
