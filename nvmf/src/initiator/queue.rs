//! One connection of the initiator: entries in, PDUs out; PDUs in, completions out.

use std::collections::VecDeque;

use cairn_block::{BufSlice, Memory};

use super::SessionError;
use crate::pdu::{
    Body, DIGEST_LEN, Digests, FLAG_LAST, FLAG_SUCCESS, Fes, Header, Transfer, Violation,
};
use crate::rx::{HeaderReader, Payload};
use crate::sqe::{Cqe, SGL_IN_CAPSULE, SGL_TRANSPORT, Sgl, Sqe};
use crate::status::Status;
use crate::tx::{PushHeader, TxQueue};
use crate::wire::len32;

/// Ring space beside that of the entries: ICReq, Connect's data, and the H2CData headers of one
/// large write to a target with a small MAXH2CDATA.
const RING_RESERVE: u32 = 10 << 10;
/// Ring space of one entry: its capsule's header, and H2CData headers.
const ENTRY_RING_LEN: u32 = 160;
/// Windows of one entry: header, payload, and as much for two H2CData.
const ENTRY_ITEMS: usize = 6;

/// Whose command it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The caller's, with its tag.
    User(u32),
    /// The session's way to readiness.
    Setup,
    /// Keep Alive.
    KeepAlive,
}

/// A command's data.
#[derive(Debug, Clone, Copy)]
pub(super) enum Data<'a> {
    None,
    /// From the caller's window.
    Out(BufSlice),
    /// Copied to the ring, and always in the capsule.
    Inline(&'a [u8]),
    /// To the caller's window.
    In(BufSlice),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Nothing for a free entry.
    owner: Option<Owner>,
    window: BufSlice,
    reads: bool,
    /// Bytes of a read that came, or of a write that R2Ts asked for.
    moved: u32,
    /// A data digest did not match.
    damaged: bool,
    /// Ring bytes kept for the H2CData headers to come.
    reserve: u32,
    /// The queue's mark after the last payload.
    mark: u64,
}

impl Entry {
    const FREE: Self = Self {
        owner: None,
        window: BufSlice::EMPTY,
        reads: false,
        moved: 0,
        damaged: false,
        reserve: 0,
        mark: 0,
    };
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) owner: Owner,
    pub(super) status: Status,
    pub(super) result: u64,
    pub(super) data_len: u32,
    /// The data did not arrive as it was sent, or not all of it.
    pub(super) damaged: bool,
}

#[derive(Debug)]
enum Stage {
    Header,
    Payload { cid: u16, payload: Payload, destination: BufSlice, flags: u8 },
}

#[derive(Debug)]
pub(super) struct HostQueue {
    tx: TxQueue,
    header: HeaderReader,
    stage: Stage,
    wanted: Digests,
    /// From ICResp on.
    agreed: Option<Digests>,
    cpda: u8,
    maxh2cdata: u32,
    entries: Vec<Entry>,
    free: Vec<u16>,
    /// Ring bytes kept for all entries.
    reserve: u32,
    done: VecDeque<Done>,
    /// Writes that were answered while the batch with their payload is still being sent, and the mark
    /// that must have been sent.
    unsent: VecDeque<(u64, Done)>,
}

impl HostQueue {
    /// A queue of `len` entries, of which one less may be in use.
    pub(super) fn new<M: Memory>(len: u16, wanted: Digests, mem: &mut M) -> Option<Self> {
        let usable = len.max(2) - 1;
        let n = usize::from(usable);
        let ring_len = u32::from(usable) * ENTRY_RING_LEN + RING_RESERVE;
        Some(Self {
            tx: TxQueue::new(ring_len, ENTRY_ITEMS * (n + 4), mem)?,
            header: HeaderReader::new(),
            stage: Stage::Header,
            wanted,
            agreed: None,
            cpda: 0,
            maxh2cdata: 4096,
            entries: vec![Entry::FREE; n],
            free: (0..usable).rev().collect(),
            reserve: 0,
            done: VecDeque::with_capacity(n),
            unsent: VecDeque::with_capacity(n),
        })
    }

    /// Uses no more than `usable` entries. Only before the first command.
    pub(super) fn limit(&mut self, usable: u16) {
        self.free.retain(|&cid| cid < usable);
    }

    /// SQSIZE: the highest index, for a queue that is one longer than its entries.
    pub(super) fn sqsize(&self) -> u16 {
        u16::try_from(self.free.len()).unwrap_or(u16::MAX)
    }

    /// The connection is up: asks for what was configured.
    pub(super) fn start<M: Memory>(&mut self, mem: &mut M) {
        let body = Body::IcReq { pfv: 0, hpda: 0, dgst: self.wanted.to_wire(), maxr2t: 0 };
        self.tx.push_header(&Header::new(body, Digests::default(), 0, 0), mem);
    }

    pub(super) fn is_agreed(&self) -> bool {
        self.agreed.is_some()
    }

    pub(super) fn tx(&mut self) -> &mut TxQueue {
        &mut self.tx
    }

    pub(super) fn free_slots(&self) -> usize {
        self.free.len()
    }

    pub(super) fn poll_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// The next write whose payload was still being sent when its answer came, and is not any more.
    pub(super) fn poll_sent(&mut self) -> Option<Done> {
        let (mark, _) = self.unsent.front()?;
        if self.tx.was_sent(*mark) { self.poll_unsent() } else { None }
    }

    /// As [`HostQueue::poll_sent`], once nothing is sent any more.
    pub(super) fn poll_unsent(&mut self) -> Option<Done> {
        self.unsent.pop_front().map(|(_, done)| done)
    }

    /// The owners of the commands that never completed, who are told no more of them.
    pub(super) fn abandon(&mut self) -> impl Iterator<Item = Owner> + '_ {
        self.entries.iter_mut().filter_map(|entry| entry.owner.take())
    }

    pub(super) fn close<M: Memory>(self, mem: &mut M) {
        self.tx.close(mem);
    }

    /// Sends a command; false where there is no entry or no ring space for it.
    pub(super) fn submit<M: Memory>(
        &mut self,
        owner: Owner,
        sqe: Sqe,
        data: Data<'_>,
        in_capsule_len: u32,
        mem: &mut M,
    ) -> bool {
        let digests = self.agreed.unwrap_or_default();
        let (in_capsule, in_ring, by_r2t) = match data {
            Data::None | Data::In(_) => (0, 0, 0),
            Data::Inline(bytes) => (len32(bytes.len()), len32(bytes.len()), 0),
            Data::Out(window) if window.len() <= in_capsule_len => (window.len(), 0, 0),
            Data::Out(window) => (0, 0, window.len()),
        };
        let reserve = by_r2t.div_ceil(self.maxh2cdata) * self.h2c_header_len();
        let capsule = (72 + DIGEST_LEN).next_multiple_of(self.pda()) + DIGEST_LEN + in_ring;
        if self.tx.free() < self.reserve + reserve + capsule {
            return false;
        }
        let Some(cid) = self.free.pop() else { return false };
        let sgl = match data {
            Data::None => Sgl { address: 0, len: 0, kind: SGL_TRANSPORT },
            Data::Inline(_) => Sgl { address: 0, len: in_capsule, kind: SGL_IN_CAPSULE },
            Data::Out(_) if in_capsule > 0 => {
                Sgl { address: 0, len: in_capsule, kind: SGL_IN_CAPSULE }
            }
            Data::Out(window) | Data::In(window) => {
                Sgl { address: 0, len: window.len(), kind: SGL_TRANSPORT }
            }
        };
        let body = Body::CapsuleCmd(sqe.with_cid(cid).with_sgl(sgl));
        self.tx.push_header(&Header::new(body, digests, in_capsule, self.cpda), mem);
        let mut entry = Entry { owner: Some(owner), reserve, ..Entry::FREE };
        match data {
            Data::None => {}
            Data::Inline(bytes) => {
                self.tx.push_bytes(bytes, mem);
                if digests.data {
                    self.tx.push_bytes(&crc32c::crc32c(bytes).to_le_bytes(), mem);
                }
            }
            Data::Out(window) => {
                entry.window = window;
                if in_capsule > 0 {
                    entry.moved = in_capsule;
                    self.push_payload(window, mem);
                }
            }
            Data::In(window) => {
                entry.window = window;
                entry.reads = true;
            }
        }
        entry.mark = self.tx.mark();
        self.reserve += reserve;
        self.entries[usize::from(cid)] = entry;
        true
    }

    /// Queues payload by reference, and its digest.
    fn push_payload<M: Memory>(&mut self, window: BufSlice, mem: &mut M) {
        self.tx.push_borrowed(window);
        if self.agreed.is_some_and(|digests| digests.data) {
            let digest = crc32c::crc32c(mem.bytes(window)).to_le_bytes();
            self.tx.push_bytes(&digest, mem);
        }
    }

    /// The alignment of data that the controller wants, in bytes.
    fn pda(&self) -> u32 {
        (u32::from(self.cpda) + 1) * 4
    }

    /// Ring bytes of one H2CData.
    fn h2c_header_len(&self) -> u32 {
        (24 + DIGEST_LEN).next_multiple_of(self.pda()) + DIGEST_LEN
    }

    pub(super) fn handle_recv<M: Memory>(
        &mut self,
        chunk: BufSlice,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        let mut at = 0;
        while at < chunk.len() {
            match &mut self.stage {
                Stage::Header => {
                    let digests = self.agreed.unwrap_or_default();
                    let (taken, result) = self.header.feed(mem.bytes(chunk.from(at)), digests);
                    at += taken;
                    if let Some(header) = result? {
                        self.header.reset();
                        self.handle_header(&header, mem)?;
                    }
                }
                Stage::Payload { cid, payload, destination, flags } => {
                    at += payload.feed(chunk.from(at), Some(*destination), mem);
                    if payload.is_done() {
                        let (cid, flags, matches) = (*cid, *flags, payload.digest_matches());
                        self.stage = Stage::Header;
                        self.handle_payload(cid, flags, matches)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn handle_header<M: Memory>(
        &mut self,
        header: &Header,
        mem: &mut M,
    ) -> Result<(), SessionError> {
        match header.body {
            Body::IcResp { pfv, cpda, dgst, maxh2cdata } if self.agreed.is_none() => {
                if pfv != 0 {
                    return Err(Violation::unsupported(8).into());
                }
                if cpda > 31 {
                    return Err(Violation::unsupported(10).into());
                }
                if dgst != self.wanted.to_wire() {
                    return Err(Violation::unsupported(11).into());
                }
                if maxh2cdata < 4096 || !maxh2cdata.is_multiple_of(4) {
                    return Err(Violation::unsupported(12).into());
                }
                self.agreed = Some(self.wanted);
                self.cpda = cpda;
                self.maxh2cdata = maxh2cdata;
                Ok(())
            }
            Body::TermReq { from_host: false, fes, fei } => {
                Err(SessionError::Terminated { fes, fei })
            }
            _ if self.agreed.is_none() => Err(Violation::of(Fes::PduSequence).into()),
            Body::CapsuleResp(cqe) => self.handle_response(&cqe),
            Body::C2hData(transfer) => self.handle_c2h_data(header, transfer),
            Body::R2t(transfer) => self.handle_r2t(transfer, mem),
            Body::IcResp { .. } => Err(Violation::of(Fes::PduSequence).into()),
            // PDUs that only a host sends.
            _ => Err(Violation::field(0).into()),
        }
    }

    /// The entry that a PDU names.
    fn entry(&mut self, cid: u16) -> Result<&mut Entry, SessionError> {
        self.entries
            .get_mut(usize::from(cid))
            .filter(|entry| entry.owner.is_some())
            .ok_or(SessionError::UnknownCommand { cid })
    }

    fn handle_r2t<M: Memory>(&mut self, r2t: Transfer, mem: &mut M) -> Result<(), SessionError> {
        let (header_len, total) = (self.h2c_header_len(), self.reserve);
        let (maxh2cdata, cpda) = (self.maxh2cdata, self.cpda);
        let free = self.tx.free();
        let entry = self.entry(r2t.cccid)?;
        if entry.reads || r2t.len == 0 {
            return Err(Violation::field(16).into());
        }
        if r2t.offset != entry.moved || r2t.len > entry.window.len() - entry.moved {
            return Err(Violation::of(Fes::OutOfRange).into());
        }
        let need = r2t.len.div_ceil(maxh2cdata) * header_len;
        let released = entry.reserve.min(need);
        // A target that asks for a write in many parts gets them only while the ring has room.
        if free < total - released + need {
            return Err(Violation::of(Fes::LimitExceeded).into());
        }
        entry.reserve -= released;
        entry.moved += r2t.len;
        let window = entry.window.sub(r2t.offset, r2t.len);
        self.reserve -= released;
        let digests = self.agreed.unwrap_or_default();
        let mut at = 0;
        while at < r2t.len {
            let len = (r2t.len - at).min(maxh2cdata);
            let body = Body::H2cData(Transfer { offset: r2t.offset + at, len, ..r2t });
            let last = if at + len == r2t.len { FLAG_LAST } else { 0 };
            let header = Header::new(body, digests, len, cpda).with_flags(last);
            self.tx.push_header(&header, mem);
            self.push_payload(window.sub(at, len), mem);
            at += len;
        }
        let mark = self.tx.mark();
        self.entry(r2t.cccid)?.mark = mark;
        Ok(())
    }

    fn handle_c2h_data(&mut self, header: &Header, transfer: Transfer) -> Result<(), SessionError> {
        let common = header.common();
        let success = header.flags & FLAG_SUCCESS != 0;
        if success && header.flags & FLAG_LAST == 0 {
            return Err(Violation::field(1).into());
        }
        if common.data_len() != transfer.len {
            return Err(Violation::field(4).into());
        }
        let entry = self.entry(transfer.cccid)?;
        if !entry.reads {
            return Err(Violation::of(Fes::PduSequence).into());
        }
        if transfer.offset != entry.moved || transfer.len > entry.window.len() - entry.moved {
            return Err(Violation::of(Fes::OutOfRange).into());
        }
        let destination = entry.window.sub(transfer.offset, transfer.len);
        entry.moved += transfer.len;
        self.stage = Stage::Payload {
            cid: transfer.cccid,
            payload: Payload::new(&common),
            destination,
            flags: header.flags,
        };
        Ok(())
    }

    fn handle_payload(&mut self, cid: u16, flags: u8, matches: bool) -> Result<(), SessionError> {
        let entry = self.entry(cid)?;
        entry.damaged |= !matches;
        if flags & FLAG_SUCCESS != 0 {
            self.finish(cid, Status::SUCCESS, 0)?;
        }
        Ok(())
    }

    fn handle_response(&mut self, cqe: &Cqe) -> Result<(), SessionError> {
        self.finish(cqe.cid(), cqe.status(), cqe.result())
    }

    fn finish(&mut self, cid: u16, status: Status, result: u64) -> Result<(), SessionError> {
        let mark = self.entry(cid)?.mark;
        // The payload is the caller's again once it is told: none of it may still wait to be sent.
        if !self.tx.was_taken(mark) {
            return Err(Violation::of(Fes::PduSequence).into());
        }
        let entry = std::mem::replace(self.entry(cid)?, Entry::FREE);
        let Some(owner) = entry.owner else { return Ok(()) };
        self.reserve -= entry.reserve;
        self.free.push(cid);
        let short = !entry.reads && entry.moved < entry.window.len();
        let damaged = entry.damaged || (status.is_success() && short);
        let data_len = if entry.reads { entry.moved } else { 0 };
        let done = Done { owner, status, result, data_len, damaged };
        // The answer may overtake the report that its payload was sent; until then the payload is the
        // sender's.
        let payload = !entry.reads && !entry.window.is_empty();
        if payload && !self.tx.was_sent(mark) {
            self.unsent.push_back((mark, done));
        } else {
            self.done.push_back(done);
        }
        Ok(())
    }
}
