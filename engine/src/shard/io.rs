//! A host's block command on its way: from its queue to a volume or a replica, and back.

use cairn_block::{
    BlockSize, Buf, BufSlice, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId,
};
use cairn_nvmf::target::{Io, IoCommand, NamespaceHandle, SlotId, dsm_range, status_of};
use cairn_reactor::Driver;
use cairn_replica::ReplicaSlot;

use super::Shard;
use super::pools::Owner;
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

/// A host's command in flight.
#[derive(Debug)]
pub(super) struct HostIo {
    conn: u32,
    generation: u32,
    slot: SlotId,
    namespace: NamespaceHandle,
    op: IoOp,
    range: LbaRange,
    /// Payload: the host's for a write, ours for a read, the ranges of a discard.
    buf: Option<Buf>,
    /// Bytes of a read, allocated when there is room.
    read_len: u32,
    /// Ranges of a discard that are still to be done, and the next one's index.
    discards: (u16, u16),
    /// The encrypted volume that it is for, once it was handed over: a write is encrypted by then, and
    /// what comes of a read is to be decrypted.
    sealed: Option<u32>,
    /// Blocks that a Verify found data in: told in DW0 of the completion, where a nexus looks.
    verified: u32,
    answered: bool,
}

impl HostIo {
    /// The connection that it came on.
    pub(super) fn origin(&self) -> (u32, u32) {
        (self.conn, self.generation)
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
        let mut entry = HostIo {
            conn,
            generation,
            slot: io.slot,
            namespace: io.namespace,
            op: IoOp::Flush,
            range: LbaRange::default(),
            buf: None,
            read_len: 0,
            discards: (0, 0),
            sealed: None,
            verified: 0,
            answered: false,
        };
        match io.command {
            IoCommand::Read { range, len } => {
                entry.op = IoOp::Read;
                entry.range = range;
                entry.read_len = len;
                let at = self.ios.insert(entry);
                // Nobody overtakes those that wait for a buffer.
                if !self.waiting_ios.is_empty() || !self.start_read(at, now) {
                    self.waiting_ios.push_back(at);
                }
                return;
            }
            IoCommand::Write { range, fua, data } => {
                entry.op = IoOp::Write { fua };
                entry.range = range;
                entry.buf = Some(data);
            }
            IoCommand::Flush => {}
            IoCommand::Verify { range } => {
                entry.op = IoOp::Verify;
                entry.range = range;
            }
            IoCommand::WriteZeroes { range, fua, unmap } => {
                entry.op = IoOp::WriteZeroes { fua, unmap };
                entry.range = range;
            }
            IoCommand::Discard { ranges, count } => {
                entry.op = IoOp::Discard;
                entry.buf = Some(ranges);
                entry.discards = (count, 0);
                let at = self.ios.insert(entry);
                self.next_discard(at, now);
                return;
            }
        }
        let at = self.ios.insert(entry);
        self.dispatch(at, now);
    }

    /// Gives a read its buffer and starts it; false where there is no buffer now.
    pub(super) fn start_read(&mut self, at: u32, now: u64) -> bool {
        let len = self.ios[at].read_len;
        let Some(buf) = self.driver.memory().alloc(len) else { return false };
        self.ios[at].buf = Some(buf);
        self.dispatch(at, now);
        true
    }

    /// Starts the next range of a discard, or answers when all are done.
    fn next_discard(&mut self, at: u32, now: u64) {
        let io = &self.ios[at];
        let (count, next) = io.discards;
        let ranges = io.buf.as_ref().map(Buf::slice).unwrap_or_default();
        if next == count {
            self.finish(at, IoStatus::Ok, now);
            return;
        }
        let found = dsm_range(self.driver.memory().bytes(ranges), usize::from(next));
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
    fn dispatch(&mut self, at: u32, now: u64) {
        let io = &self.ios[at];
        let buf = match io.op {
            IoOp::Read | IoOp::Write { .. } => io.buf.as_ref().map(Buf::slice).unwrap_or_default(),
            _ => BufSlice::EMPTY,
        };
        let request = IoRequest { op: io.op, range: io.range, buf };
        let (namespace, conn, generation) = (io.namespace, io.conn, io.generation);
        match self.exports.get(namespace.0 as usize).and_then(Option::as_ref) {
            Some(&Export::Volume(volume)) => {
                if self.volumes.get(volume).is_some_and(|v| v.block_size == BlockSize::B512) {
                    return self.submit_sectors(volume, at, request, now);
                }
                // Once, here: from here on the nexus may hold the request and send it again, and its
                // children only ever see what is encrypted. (A discard comes by once for each range.)
                let io = &self.ios[at];
                let fresh = io.sealed.is_none();
                if fresh && self.seal(volume, request.op, request.range, request.buf) {
                    self.ios[at].sealed = Some(volume);
                }
                self.submit_to_volume(volume, u64::from(at), request, now);
            }
            Some(&Export::Replica { pool, slot, .. }) => {
                if self.is_fenced(conn, generation, pool, slot) {
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
        if let (Some(volume), IoOp::Read, IoStatus::Ok, Some(buf)) =
            (io.sealed, io.op, status, io.buf.as_ref())
        {
            let (range, data) = (io.range, buf.slice());
            self.unseal(volume, range, data);
        }
        let io = &self.ios[at];
        let more = io.op == IoOp::Discard && status.is_ok() && io.discards.1 < io.discards.0;
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

    fn finish(&mut self, at: u32, status: IoStatus, _now: u64) {
        self.answer(at, status);
        self.drop_io(at);
    }

    fn drop_io(&mut self, at: u32) {
        if let Some(buf) = self.ios.remove(at).and_then(|io| io.buf) {
            self.release(buf);
        }
        self.drained(at);
    }

    /// The host requests in hand that are for a replica.
    pub(super) fn ios_on(&self, pool: u16, slot: ReplicaSlot) -> Vec<u32> {
        let on = |io: &HostIo| {
            let export = self.exports.get(io.namespace.0 as usize).and_then(Option::as_ref);
            matches!(export, Some(Export::Replica { pool: p, slot: s, .. }) if (*p, *s) == (pool, slot))
        };
        self.ios.iter().filter(|(_, io)| on(io)).map(|(at, _)| at).collect()
    }

    fn answer(&mut self, at: u32, status: IoStatus) {
        let io = &mut self.ios[at];
        io.answered = true;
        let (conn, generation, slot, namespace) = (io.conn, io.generation, io.slot, io.namespace);
        let (op, len) = (io.op, io.buf.as_ref().map_or(0, Buf::len));
        let verified = u64::from(io.verified);
        let data = if op == IoOp::Read && status.is_ok() { io.buf.take() } else { None };
        if let Some(counters) = self.counters(namespace) {
            count(counters, op, len, status);
        }
        let memory = self.driver.memory();
        let queue = self
            .hosts
            .get_mut(conn)
            .filter(|host| host.generation == generation)
            .map(|host| &mut host.queue);
        match (queue, data) {
            (Some(queue), Some(data)) => queue.complete_with_data(slot, data, memory),
            (Some(queue), None) => queue.complete(slot, status_of(status), verified, memory),
            (None, Some(data)) => memory.release(data),
            (None, None) => {}
        }
        self.touch_host(conn);
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
