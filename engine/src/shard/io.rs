//! A host's block command on its way: from its queue to a volume or a replica, and back.

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId,
};
use cairn_iscsi::scsi::unmap_range;
use cairn_nvmf::status::Status;
use cairn_nvmf::target::{Io, IoCommand, NamespaceHandle, SlotId, dsm_range, status_of};
use cairn_reactor::Driver;
use cairn_replica::ReplicaSlot;

use super::Shard;
use super::pools::Owner;
use super::volumes::Volume;
use crate::control::ExportCounters;

/// What a namespace stands for.
#[derive(Debug)]
pub(super) enum Export {
    /// A volume, by its number.
    Volume(u32),
    /// A replica in a local pool.
    Replica {
        pool: u16,
        slot: ReplicaSlot,
        id: ReplicaId,
        subsystem: cairn_nvmf::target::SubsystemId,
        counters: ExportCounters,
    },
}

/// Who hears how a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// A host, on a connection of NVMe/TCP.
    Nvme { conn: u32, generation: u32, slot: SlotId },
    /// An initiator, on a connection of iSCSI.
    Iscsi { conn: u32, generation: u32, slot: cairn_iscsi::connection::SlotId },
    /// A command that takes several requests, of which this is one.
    Job(u32),
    /// What sanitizes a volume.
    Sanitize { volume: u32, generation: u32 },
}

/// A host's command in flight.
#[derive(Debug)]
pub(super) struct HostIo {
    asker: Asker,
    namespace: NamespaceHandle,
    op: IoOp,
    range: LbaRange,
    /// Payload that goes with the request: the host's for a write, ours for a read, the ranges of a discard.
    buf: Option<Buf>,
    /// Where the payload lies: in `buf`, or in what is a job's.
    window: BufSlice,
    /// Bytes of a read, allocated when there is room.
    read_len: u32,
    /// Ranges of a discard that are still to be done, and the next one's index.
    discards: (u16, u16),
    /// The encrypted volume that it is for, once it was handed over: a write is encrypted by then, and
    /// what comes of a read is to be decrypted.
    sealed: Option<u32>,
    /// Blocks that a Verify found data in: told in DW0 of the completion, where a nexus looks.
    verified: u32,
    /// What a discard is followed by: its ranges are to be durable.
    flushes: bool,
    /// A write that is to be done whole or not at all.
    atomic: bool,
    /// When it came, among those that met a hold; 0: it met none.
    pub(super) order: u64,
    answered: bool,
    /// Its host was preempted, and its commands aborted: it hears that, however this one ended.
    preempted: bool,
}

impl HostIo {
    pub(super) fn new(asker: Asker, namespace: NamespaceHandle, op: IoOp, range: LbaRange) -> Self {
        Self {
            asker,
            namespace,
            op,
            range,
            buf: None,
            window: BufSlice::EMPTY,
            read_len: 0,
            discards: (0, 0),
            sealed: None,
            verified: 0,
            flushes: false,
            atomic: false,
            order: 0,
            answered: false,
            preempted: false,
        }
    }

    /// With payload that is released with it.
    pub(super) fn with_buf(self, buf: Buf) -> Self {
        Self { window: buf.slice(), buf: Some(buf), ..self }
    }

    /// With payload of somebody's who keeps it until the request is released.
    pub(super) fn with_window(self, window: BufSlice) -> Self {
        Self { window, ..self }
    }

    /// Of so many ranges, told in its payload.
    pub(super) fn with_ranges(self, count: u16, flushes: bool) -> Self {
        Self { discards: (count, 0), flushes, ..self }
    }

    /// Done whole or not at all, where it is a write and that is asked.
    pub(super) fn with_atomic(self, atomic: bool) -> Self {
        Self { atomic, ..self }
    }

    /// Into a buffer that is yet to be had.
    pub(super) fn with_room(self, read_len: u32) -> Self {
        Self { read_len, ..self }
    }

    /// Who asks for what, and where.
    pub(super) fn wants(&self) -> (Asker, IoOp, LbaRange) {
        (self.asker, self.op, self.range)
    }

    pub(super) fn namespace(&self) -> NamespaceHandle {
        self.namespace
    }

    pub(super) fn asker(&self) -> Asker {
        self.asker
    }

    /// Whether its host was preempted, and its commands aborted.
    pub(super) fn is_preempted(&self) -> bool {
        self.preempted
    }

    /// The host of this connection was preempted.
    pub(super) fn preempt(&mut self, of: u32, its_generation: u32) {
        self.preempted |= matches!(
            self.asker,
            Asker::Nvme { conn, generation, .. } if (conn, generation) == (of, its_generation)
        );
    }

    /// Whether it changes a range of what this stands for, and is not done.
    pub(super) fn changes(&self, namespace: NamespaceHandle, range: LbaRange) -> bool {
        self.namespace == namespace
            && !self.answered
            && self.op.is_mutation()
            && self.range.overlaps(range)
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn export_handle(&mut self, export: Export) -> NamespaceHandle {
        // A handle is not used again: requests that wait, and discards that go on range by range,
        // name what they are for by it.
        let at = self.exports.len();
        self.exports.push(Some(export));
        NamespaceHandle(u32::try_from(at).expect("fewer than 2^32 exports"))
    }

    pub(super) fn export(&mut self, handle: NamespaceHandle) -> Option<&mut Export> {
        self.exports.get_mut(handle.0 as usize)?.as_mut()
    }

    /// Starts a command whose host data, if any, has all arrived.
    pub(super) fn start_host_io(&mut self, conn: u32, io: Io, now: u64) {
        let generation = self.hosts[conn].generation;
        if !self.hosts[conn].noted
            && !matches!(io.command, IoCommand::Read { .. })
            && let Some(&Export::Volume(volume)) =
                self.exports.get(io.namespace.0 as usize).and_then(Option::as_ref)
        {
            self.note_writer(conn, volume);
        }
        let asker = Asker::Nvme { conn, generation, slot: io.slot };
        let new = |op, range| HostIo::new(asker, io.namespace, op, range);
        let entry = match io.command {
            IoCommand::Read { range, len } => new(IoOp::Read, range).with_room(len),
            IoCommand::Write { range, fua, data, atomic } => {
                new(IoOp::Write { fua }, range).with_buf(data).with_atomic(atomic)
            }
            IoCommand::Flush => new(IoOp::Flush, LbaRange::default()),
            IoCommand::Verify { range } => new(IoOp::Verify, range),
            IoCommand::WriteZeroes { range, fua, unmap } => {
                new(IoOp::WriteZeroes { fua, unmap }, range)
            }
            IoCommand::Discard { ranges, count } => {
                new(IoOp::Discard, LbaRange::default()).with_buf(ranges).with_ranges(count, false)
            }
        };
        self.begin_io(entry, now);
    }

    /// Starts a request, or has it wait for its buffer.
    pub(super) fn begin_io(&mut self, io: HostIo, now: u64) {
        let (op, read_len) = (io.op, io.read_len);
        let at = self.ios.insert(io);
        match op {
            IoOp::Read if read_len > 0 => {
                // Nobody overtakes those that wait for a buffer.
                if !self.waiting_ios.is_empty() || !self.start_read(at, now) {
                    self.waiting_ios.push_back(at);
                }
            }
            IoOp::Discard => self.next_discard(at, now),
            _ => self.dispatch(at, now),
        }
    }

    /// Gives a read its buffer and starts it; false where there is no buffer now.
    pub(super) fn start_read(&mut self, at: u32, now: u64) -> bool {
        let len = self.ios[at].read_len;
        let Some(buf) = self.driver.memory().alloc(len) else { return false };
        let io = &mut self.ios[at];
        io.window = buf.slice();
        io.buf = Some(buf);
        self.dispatch(at, now);
        true
    }

    /// Starts the next range of a discard, or answers when all are done.
    fn next_discard(&mut self, at: u32, now: u64) {
        let io = &self.ios[at];
        let (count, next) = io.discards;
        if next == count {
            if std::mem::take(&mut self.ios[at].flushes) {
                let io = &mut self.ios[at];
                (io.op, io.range) = (IoOp::Flush, LbaRange::default());
                return self.dispatch(at, now);
            }
            self.finish(at, IoStatus::Ok, now);
            return;
        }
        let range_of = match io.asker {
            Asker::Iscsi { .. } => unmap_range,
            Asker::Nvme { .. } | Asker::Job(_) | Asker::Sanitize { .. } => dsm_range,
        };
        let found = range_of(self.driver.memory().bytes(io.window), usize::from(next));
        let range = found.and_then(|(lba, blocks)| LbaRange::new(Lba(lba), u64::from(blocks)).ok());
        let io = &mut self.ios[at];
        io.discards.1 += 1;
        match range {
            Some(range) if range.is_empty() => self.next_discard(at, now),
            Some(range) => {
                io.range = range;
                self.dispatch(at, now);
            }
            None => self.finish(at, IoStatus::OutOfRange, now),
        }
    }

    /// Hands the request to what it is for.
    pub(super) fn dispatch(&mut self, at: u32, now: u64) {
        let io = &self.ios[at];
        let buf = match io.op {
            IoOp::Read | IoOp::Write { .. } => io.window,
            _ => BufSlice::EMPTY,
        };
        let request = IoRequest { op: io.op, range: io.range, buf };
        let (namespace, asker, atomic) = (io.namespace, io.asker, io.atomic);
        match self.exports.get(namespace.0 as usize).and_then(Option::as_ref) {
            Some(&Export::Volume(volume)) => {
                let held = self.initiators.target.any_held();
                if held || self.volumes.get(volume).is_some_and(Volume::is_guarded) {
                    if self.is_sanitized(volume, at, now) || self.is_reserved(volume, at) {
                        return;
                    }
                    if self.is_held(volume, at) {
                        // A range of it that is done may have been what a hold waited for.
                        return self.release_holds(namespace);
                    }
                }
                if self.volumes.get(volume).is_some_and(|v| v.block_size == BlockSize::B512) {
                    return self.submit_sectors(volume, at, (request, atomic), now);
                }
                // Once, here: from here on the nexus may hold the request and send it again, and its
                // children only ever see what is encrypted. (A discard comes by once for each range.)
                let io = &self.ios[at];
                let fresh = io.sealed.is_none();
                if fresh && self.seal(volume, request.op, request.range, request.buf) {
                    self.ios[at].sealed = Some(volume);
                }
                self.submit_to_volume(volume, u64::from(at), (request, atomic), now);
            }
            Some(&Export::Replica { pool, slot, .. }) => {
                if self.asker_is_fenced(asker, pool, slot) {
                    self.finish(at, IoStatus::Fenced, now);
                } else {
                    let tag = Owner::Host { io: at }.tag();
                    let local = &mut self.pools[usize::from(pool)];
                    local.pool.submit(tag, slot, request, self.driver.memory());
                    local.busy = true;
                }
            }
            None => self.finish(at, IoStatus::NotReady, now),
        }
    }

    /// The request, or one range of a discard, is done; its buffer may still be in use.
    pub(super) fn host_io_done(&mut self, at: u32, status: IoStatus, _now: u64) {
        let io = &self.ios[at];
        if let (Some(volume), IoOp::Read, IoStatus::Ok) = (io.sealed, io.op, status) {
            let (range, data) = (io.range, io.window);
            self.unseal(volume, range, data);
        }
        let io = &self.ios[at];
        let (count, next) = io.discards;
        let more = io.op == IoOp::Discard && status.is_ok() && (next < count || io.flushes);
        if !more {
            self.answer(at, status);
        }
    }

    pub(super) fn host_io_verified(&mut self, at: u32, blocks: Option<u32>) {
        if let Some(blocks) = blocks {
            self.ios[at].verified = blocks;
        }
    }

    /// Nobody uses the request's buffer any more.
    pub(super) fn host_io_released(&mut self, at: u32, now: u64) {
        if self.ios[at].answered {
            self.drop_io(at);
        } else {
            self.next_discard(at, now);
        }
    }

    pub(super) fn finish(&mut self, at: u32, status: IoStatus, _now: u64) {
        self.answer(at, status);
        self.drop_io(at);
    }

    pub(super) fn drop_io(&mut self, at: u32) {
        if let Some(io) = self.ios.remove(at) {
            if let Some(buf) = io.buf {
                self.release(buf);
            }
            match io.asker {
                Asker::Job(job) => self.job_released(job),
                Asker::Sanitize { volume, generation } => {
                    self.sanitize_released(volume, generation)
                }
                Asker::Nvme { .. } | Asker::Iscsi { .. } => {}
            }
        }
        self.drained(at);
        self.tasks_drained(at);
    }

    /// The host requests in hand that are for a replica.
    pub(super) fn ios_on(&self, pool: u16, slot: ReplicaSlot) -> Vec<u32> {
        let on = |io: &HostIo| {
            let export = self.exports.get(io.namespace.0 as usize).and_then(Option::as_ref);
            matches!(export, Some(Export::Replica { pool: p, slot: s, .. }) if (*p, *s) == (pool, slot))
        };
        self.ios.iter().filter(|(_, io)| on(io)).map(|(at, _)| at).collect()
    }

    /// The host requests in hand that are for a volume.
    pub(super) fn ios_of(&self, namespace: NamespaceHandle) -> Vec<u32> {
        self.ios.iter().filter(|(_, io)| io.namespace == namespace).map(|(at, _)| at).collect()
    }

    fn asker_is_fenced(&self, asker: Asker, pool: u16, slot: ReplicaSlot) -> bool {
        match asker {
            Asker::Nvme { conn, generation, .. } => self.is_fenced(conn, generation, pool, slot),
            // A replica is no logical unit.
            Asker::Iscsi { .. } | Asker::Job(_) | Asker::Sanitize { .. } => true,
        }
    }

    fn answer(&mut self, at: u32, status: IoStatus) {
        let io = &mut self.ios[at];
        io.answered = true;
        let (asker, namespace) = (io.asker, io.namespace);
        let (op, len) = (io.op, io.window.len());
        let (verified, preempted) = (u64::from(io.verified), io.preempted);
        let own = matches!(asker, Asker::Sanitize { .. });
        let gives = op == IoOp::Read && status.is_ok() && !preempted;
        let data = if gives { io.buf.take() } else { None };
        if let Some(counters) = self.counters(namespace).filter(|_| !own) {
            count(counters, op, len, status);
        }
        if op != IoOp::Read {
            self.release_holds(namespace);
        }
        let memory = self.driver.memory();
        match asker {
            Asker::Nvme { conn, generation, slot } => {
                let host = self.hosts.get_mut(conn).filter(|host| host.generation == generation);
                match (host.map(|host| &mut host.queue), data) {
                    (Some(queue), Some(data)) => queue.complete_with_data(slot, data, memory),
                    (Some(queue), None) if preempted => {
                        queue.complete(slot, Status::PREEMPTED_AND_ABORTED, 0, memory);
                    }
                    (Some(queue), None) => {
                        queue.complete(slot, status_of(status), verified, memory);
                    }
                    (None, Some(data)) => memory.release(data),
                    (None, None) => {}
                }
                self.touch_host(conn);
            }
            Asker::Iscsi { conn, generation, slot } => {
                let host = self.initiators.hosts.get_mut(conn);
                let host = host.filter(|host| host.generation == generation);
                match (host.map(|host| &mut host.conn), data) {
                    (Some(conn), Some(data)) => conn.complete_with_data(slot, data, memory),
                    (Some(conn), None) => conn.complete(slot, status, memory),
                    (None, Some(data)) => memory.release(data),
                    (None, None) => {}
                }
                self.touch_initiator(conn);
            }
            Asker::Job(job) => self.job_answered(job, status),
            Asker::Sanitize { volume, generation } => {
                self.sanitize_answered(volume, generation, status);
            }
        }
    }

    fn counters(&mut self, namespace: NamespaceHandle) -> Option<&mut ExportCounters> {
        match self.exports.get_mut(namespace.0 as usize)?.as_mut()? {
            Export::Replica { counters, .. } => Some(counters),
            Export::Volume(volume) => self.volumes.get_mut(*volume).map(|v| &mut v.counters),
        }
    }
}

fn count(counters: &mut ExportCounters, op: IoOp, len: u32, status: IoStatus) {
    if !status.is_ok() {
        counters.errors += 1;
        return;
    }
    match op {
        IoOp::Read => {
            counters.reads += 1;
            counters.read_bytes += u64::from(len);
        }
        IoOp::Write { .. } | IoOp::WriteZeroes { .. } => {
            counters.writes += 1;
            counters.written_bytes += u64::from(len);
        }
        IoOp::Flush => counters.flushes += 1,
        IoOp::Discard => counters.discards += 1,
        IoOp::Snapshot(_) => {}
        IoOp::Verify => {}
    }
}
