//! Commands of initiators that take several requests: comparisons, what reads before it writes, copies.
//!
//! A job has one request in hand at a time, and goes on once nobody uses that one's buffer any more. What must be one step
//! towards other hosts, of both transports, holds its range meanwhile ([`super::holds`]): COMPARE AND WRITE and ORWRITE.

use std::collections::VecDeque;

use cairn_block::{Buf, BufSlice, IoOp, IoStatus, Lba, LbaRange, Memory};
use cairn_iscsi::connection::Connection;
use cairn_iscsi::scsi::CopySegment;
use cairn_nvmf::target::NamespaceHandle;
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export, HostIo};
use super::table::Table;
use super::tasks::namespace_of;

/// Bytes that a job reads, or fills, at a time.
const PIECE: u32 = 64 << 10;

/// What is to be done.
#[derive(Debug)]
enum Kind {
    WriteAndVerify { fua: bool },
    Compare { repeated: bool },
    CompareAndWrite { fua: bool },
    OrWrite { fua: bool },
    WriteSame { fua: bool },
    Copy { segments: VecDeque<CopySegment>, fua: bool },
}

/// A job as it is asked for.
#[derive(Debug)]
pub(super) struct Work {
    kind: Kind,
    range: LbaRange,
    data: Option<Buf>,
}

impl Work {
    pub(super) fn write_and_verify(range: LbaRange, data: Buf, fua: bool) -> Self {
        Self { kind: Kind::WriteAndVerify { fua }, range, data: Some(data) }
    }

    pub(super) fn compare(range: LbaRange, data: Buf, repeated: bool) -> Self {
        Self { kind: Kind::Compare { repeated }, range, data: Some(data) }
    }

    pub(super) fn compare_and_write(range: LbaRange, data: Buf, fua: bool) -> Self {
        Self { kind: Kind::CompareAndWrite { fua }, range, data: Some(data) }
    }

    pub(super) fn or_write(range: LbaRange, data: Buf, fua: bool) -> Self {
        Self { kind: Kind::OrWrite { fua }, range, data: Some(data) }
    }

    pub(super) fn write_same(range: LbaRange, data: Buf, fua: bool) -> Self {
        Self { kind: Kind::WriteSame { fua }, range, data: Some(data) }
    }

    pub(super) fn copy(segments: Vec<CopySegment>, fua: bool) -> Self {
        Self {
            kind: Kind::Copy { segments: segments.into(), fua },
            range: LbaRange::default(),
            data: None,
        }
    }

    /// Whether nothing may change its range between its requests.
    fn holds(&self) -> bool {
        matches!(self.kind, Kind::CompareAndWrite { .. } | Kind::OrWrite { .. })
    }

    /// Whether it needs a buffer besides its data.
    fn bounces(&self) -> bool {
        !matches!(self.kind, Kind::WriteAndVerify { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It waits for a buffer, or for its range.
    Begin,
    /// A piece is being read.
    Read,
    /// A piece, or all, is being written.
    Write,
    Verify,
    /// It was answered; its last request's buffer may still be in use.
    Over,
}

/// One under way.
#[derive(Debug)]
pub(super) struct Job {
    asker: Asker,
    namespace: NamespaceHandle,
    work: Work,
    step: Step,
    /// Blocks of the range, or of the first segment, that are done, and those of the piece in hand.
    done: u64,
    piece: u64,
    bounce: Option<Buf>,
    /// That buffer is the shard's last one.
    reserve: bool,
    /// It has its range to itself, or waits for that.
    asked: bool,
    status: IoStatus,
}

/// All jobs.
#[derive(Debug)]
pub(super) struct Jobs {
    table: Table<Job>,
    /// Those that go on.
    ready: VecDeque<u32>,
    /// Those that wait for a buffer.
    waiting: VecDeque<u32>,
    reserve: Option<Buf>,
    has_reserve: bool,
}

impl Jobs {
    pub(super) fn new() -> Self {
        Self {
            table: Table::new(),
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            reserve: None,
            has_reserve: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }
}

/// How a job goes on.
enum Next {
    /// With this request.
    Io(NamespaceHandle, IoOp, LbaRange, BufSlice),
    End(Ending),
}

#[derive(Clone, Copy)]
enum Ending {
    Status(IoStatus),
    /// The data differs at this byte.
    Differs(u32),
}

impl<D: Driver> Shard<D> {
    /// Sets a buffer aside: where payload that waits for one has taken all the memory, jobs still go on one by one.
    pub(super) fn reserve_job_buffer(&mut self) {
        if !self.jobs.has_reserve {
            self.jobs.reserve = self.driver.memory().alloc(PIECE);
            self.jobs.has_reserve = self.jobs.reserve.is_some();
        }
    }

    pub(super) fn begin_job(&mut self, asker: Asker, namespace: NamespaceHandle, work: Work) {
        self.reserve_job_buffer();
        let id = self.jobs.table.insert(Job {
            asker,
            namespace,
            work,
            step: Step::Begin,
            done: 0,
            piece: 0,
            bounce: None,
            reserve: false,
            asked: false,
            status: IoStatus::Ok,
        });
        self.jobs.ready.push_back(id);
    }

    /// Its range is its own.
    pub(super) fn job_holds(&mut self, id: u32) {
        self.jobs.ready.push_back(id);
    }

    /// The jobs that are at work on a volume.
    pub(super) fn jobs_of(&self, namespace: NamespaceHandle) -> Vec<u32> {
        let on = |job: &Job| {
            let copies = match &job.work.kind {
                Kind::Copy { segments, .. } => {
                    segments.iter().any(|s| [s.from, s.to].map(namespace_of).contains(&namespace))
                }
                _ => false,
            };
            job.namespace == namespace || copies
        };
        self.jobs.table.iter().filter(|(_, job)| on(job)).map(|(id, _)| id).collect()
    }

    /// A request of a job has ended; its buffer may still be in use.
    pub(super) fn job_answered(&mut self, id: u32, status: IoStatus) {
        let job = &mut self.jobs.table[id];
        job.status = status;
        if !status.is_ok() || job.is_last() {
            self.end_job(id, Ending::Status(status));
        }
    }

    /// Nobody uses its buffer any more.
    pub(super) fn job_released(&mut self, id: u32) {
        self.jobs.ready.push_back(id);
    }

    /// Lets jobs go on. Returns whether any did.
    pub(super) fn run_jobs(&mut self, now: u64) -> bool {
        let mut moved = false;
        while let Some(id) = self.jobs.ready.pop_front() {
            moved = true;
            self.run_job(id, now);
        }
        moved
    }

    /// Tries again what waited for memory.
    pub(super) fn retry_jobs(&mut self, now: u64) -> bool {
        let mut moved = false;
        while let Some(id) = self.jobs.waiting.pop_front() {
            if !self.give_bounce(id) {
                self.jobs.waiting.push_front(id);
                break;
            }
            moved = true;
            self.run_job(id, now);
        }
        moved
    }

    /// Gives a job its buffer; false where there is none now.
    fn give_bounce(&mut self, id: u32) -> bool {
        let job = &mut self.jobs.table[id];
        if job.bounce.is_some() || !job.work.bounces() {
            return true;
        }
        job.bounce = self.driver.memory().alloc(PIECE);
        if job.bounce.is_none() {
            job.bounce = self.jobs.reserve.take();
            job.reserve = job.bounce.is_some();
        }
        job.bounce.is_some()
    }

    fn run_job(&mut self, id: u32, now: u64) {
        if self.jobs.table[id].step == Step::Over {
            return self.drop_job(id);
        }
        if self.is_given_up(id) {
            self.end_job(id, Ending::Status(IoStatus::Aborted));
            return self.drop_job(id);
        }
        if !self.give_bounce(id) {
            self.jobs.waiting.push_back(id);
            return;
        }
        let job = &mut self.jobs.table[id];
        // Only now: whoever holds a range and waits for memory may wait for those that wait for the range.
        if job.work.holds() && !std::mem::replace(&mut job.asked, true) {
            let (namespace, range) = (job.namespace, job.work.range);
            return self.hold(namespace, range, id);
        }
        let next = self.next_of(id);
        match next {
            Next::Io(namespace, op, range, window) => {
                let io = HostIo::new(Asker::Job(id), namespace, op, range).with_window(window);
                self.begin_io(io, now);
            }
            Next::End(ending) => {
                self.end_job(id, ending);
                self.drop_job(id);
            }
        }
    }

    /// Whether nobody waits for a job any more: it was aborted, or its connection is gone.
    fn is_given_up(&self, id: u32) -> bool {
        let Asker::Iscsi { conn, generation, slot } = self.jobs.table[id].asker else {
            return false;
        };
        let host = self.initiators.hosts.get(conn).filter(|host| host.generation == generation);
        host.is_none_or(|host| host.conn.is_aborted(slot))
    }

    /// Acts on what was read, and says what comes next.
    fn next_of(&mut self, id: u32) -> Next {
        let job = &self.jobs.table[id];
        let shift = match &job.work.kind {
            Kind::Copy { segments, .. } => {
                segments.front().and_then(|s| self.block_shift(namespace_of(s.from)))
            }
            _ => self.block_shift(job.namespace),
        };
        let Some(shift) = shift else { return Next::End(Ending::Status(IoStatus::NotReady)) };
        let job = &mut self.jobs.table[id];
        let memory = self.driver.memory();
        match job.work.kind {
            Kind::WriteAndVerify { fua } => job.write_and_verify(fua),
            Kind::Compare { repeated } => job.compare(repeated, shift, memory),
            Kind::CompareAndWrite { fua } => job.compare_and_write(fua, shift, memory),
            Kind::OrWrite { fua } => job.or_write(fua, shift, memory),
            Kind::WriteSame { fua } => job.write_same(fua, shift, memory),
            Kind::Copy { fua, .. } => job.copy(fua, shift),
        }
    }

    /// The size of the blocks of a volume as its hosts see it, as a base-2 logarithm.
    fn block_shift(&self, namespace: NamespaceHandle) -> Option<u8> {
        match self.exports.get(namespace.0 as usize)?.as_ref()? {
            Export::Volume(volume) => Some(self.volumes.get(*volume)?.block_size.shift()),
            Export::Replica { .. } => None,
        }
    }

    /// Tells the initiator. What the job has in hand is let go of later.
    fn end_job(&mut self, id: u32, ending: Ending) {
        let job = &mut self.jobs.table[id];
        job.step = Step::Over;
        let (asker, namespace) = (job.asker, job.namespace);
        if job.work.holds() {
            self.let_go(namespace, id);
        }
        let Asker::Iscsi { conn, generation, slot } = asker else { return };
        let host = self.initiators.hosts.get_mut(conn);
        if let Some(host) = host.filter(|host| host.generation == generation) {
            let memory = self.driver.memory();
            match ending {
                Ending::Status(status) => host.conn.complete(slot, status, memory),
                Ending::Differs(at) => {
                    Connection::complete_miscompare(&mut host.conn, slot, at, memory)
                }
            }
            self.touch_initiator(conn);
        }
    }

    fn drop_job(&mut self, id: u32) {
        let Some(job) = self.jobs.table.remove(id) else { return };
        if let Some(data) = job.work.data {
            self.release(data);
        }
        match job.bounce {
            Some(bounce) if job.reserve => self.jobs.reserve = Some(bounce),
            Some(bounce) => self.release(bounce),
            None => {}
        }
        self.job_drained(id);
    }
}

impl Job {
    /// Whether the request in hand is the last one where it ends well.
    fn is_last(&self) -> bool {
        let all = self.done + self.piece >= self.work.range.blocks();
        match (&self.work.kind, self.step) {
            (Kind::WriteAndVerify { .. }, step) => step == Step::Verify,
            (Kind::CompareAndWrite { .. } | Kind::OrWrite { .. }, step) => step == Step::Write,
            (Kind::WriteSame { .. }, step) => step == Step::Write && all,
            (Kind::Compare { .. } | Kind::Copy { .. }, _) => false,
        }
    }

    fn data(&self) -> BufSlice {
        self.work.data.as_ref().map(Buf::slice).unwrap_or_default()
    }

    /// Cuts the next piece: its blocks, and where it lies in the buffer.
    fn cut(&mut self, blocks: u64, shift: u8) -> BufSlice {
        self.piece = (blocks - self.done).min(u64::from(PIECE >> shift));
        self.window(shift)
    }

    fn window(&self, shift: u8) -> BufSlice {
        let len = u32::try_from(self.piece << shift).expect("no more than a piece");
        self.bounce.as_ref().map(|buf| buf.slice().sub(0, len)).unwrap_or_default()
    }

    fn at(&self, range: LbaRange) -> LbaRange {
        LbaRange::new(Lba(range.start().0 + self.done), self.piece).expect("within the range")
    }

    /// Where in the data the piece in hand is.
    fn offset(&self, shift: u8) -> u32 {
        u32::try_from(self.done << shift).expect("as long as a command's data")
    }

    fn io(&self, op: IoOp, range: LbaRange, window: BufSlice) -> Next {
        Next::Io(self.namespace, op, range, window)
    }

    /// Reads the next piece of the range.
    fn read_on(&mut self, shift: u8) -> Next {
        let window = self.cut(self.work.range.blocks(), shift);
        self.step = Step::Read;
        self.io(IoOp::Read, self.at(self.work.range), window)
    }

    fn write_and_verify(&mut self, fua: bool) -> Next {
        if self.step == Step::Begin {
            self.step = Step::Write;
            return self.io(IoOp::Write { fua }, self.work.range, self.data());
        }
        self.step = Step::Verify;
        self.io(IoOp::Verify, self.work.range, BufSlice::EMPTY)
    }

    /// Compares what was read with the data. The first byte that differs, if one does.
    fn difference<M: Memory>(&self, repeated: bool, shift: u8, memory: &M) -> Option<u32> {
        let read = memory.bytes(self.window(shift));
        let data = memory.bytes(self.data());
        if repeated {
            let blocks = read.chunks(data.len()).enumerate();
            let mut found =
                blocks.filter_map(|(i, block)| Some((i, first_difference(block, data)?)));
            // It is told where in the block that was sent.
            return found.next().map(|(_, at)| at);
        }
        let from = self.offset(shift) as usize;
        first_difference(read, &data[from..][..read.len()]).map(|at| self.offset(shift) + at)
    }

    fn compare<M: Memory>(&mut self, repeated: bool, shift: u8, memory: &M) -> Next {
        if self.step == Step::Read {
            if let Some(at) = self.difference(repeated, shift, memory) {
                return Next::End(Ending::Differs(at));
            }
            self.done += self.piece;
        }
        if self.done == self.work.range.blocks() {
            return Next::End(Ending::Status(IoStatus::Ok));
        }
        self.read_on(shift)
    }

    fn compare_and_write<M: Memory>(&mut self, fua: bool, shift: u8, memory: &M) -> Next {
        if self.step == Step::Read {
            if let Some(at) = self.difference(false, shift, memory) {
                return Next::End(Ending::Differs(at));
            }
            self.done += self.piece;
        }
        if self.done < self.work.range.blocks() {
            return self.read_on(shift);
        }
        self.step = Step::Write;
        let data = self.data();
        let half = data.len() / 2;
        self.io(IoOp::Write { fua }, self.work.range, data.sub(half, half))
    }

    fn or_write<M: Memory>(&mut self, fua: bool, shift: u8, memory: &mut M) -> Next {
        if self.step == Step::Read {
            let window = self.window(shift);
            let into = self.data().sub(self.offset(shift), window.len());
            or(memory, window, into);
            self.done += self.piece;
        }
        if self.done < self.work.range.blocks() {
            return self.read_on(shift);
        }
        self.step = Step::Write;
        self.io(IoOp::Write { fua }, self.work.range, self.data())
    }

    fn write_same<M: Memory>(&mut self, fua: bool, shift: u8, memory: &mut M) -> Next {
        self.done += std::mem::take(&mut self.piece);
        if self.done == self.work.range.blocks() {
            return Next::End(Ending::Status(IoStatus::Ok));
        }
        let window = self.cut(self.work.range.blocks(), shift);
        // Anew for each piece: of an encrypted volume what was written is not the block any more.
        let block = self.data();
        for at in (0..window.len()).step_by(block.len() as usize) {
            memory.copy(block, window.sub(at, block.len()));
        }
        self.step = Step::Write;
        self.io(IoOp::Write { fua }, self.at(self.work.range), window)
    }

    fn copy(&mut self, fua: bool, shift: u8) -> Next {
        let Kind::Copy { segments, .. } = &mut self.work.kind else {
            return Next::End(Ending::Status(IoStatus::Internal));
        };
        let Some(&segment) = segments.front() else {
            return Next::End(Ending::Status(IoStatus::Ok));
        };
        if self.step == Step::Read {
            self.step = Step::Write;
            let (to, window) = (self.at(segment.to_range), self.window(shift));
            return Next::Io(namespace_of(segment.to), IoOp::Write { fua }, to, window);
        }
        self.done += std::mem::take(&mut self.piece);
        if self.done == segment.from_range.blocks() {
            segments.pop_front();
            self.done = 0;
            self.step = Step::Begin;
            return match self.first_segment() {
                true => self.copy(fua, shift),
                false => Next::End(Ending::Status(IoStatus::Ok)),
            };
        }
        let window = self.cut(segment.from_range.blocks(), shift);
        self.step = Step::Read;
        Next::Io(namespace_of(segment.from), IoOp::Read, self.at(segment.from_range), window)
    }

    fn first_segment(&self) -> bool {
        matches!(&self.work.kind, Kind::Copy { segments, .. } if !segments.is_empty())
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<u32> {
    if a == b {
        return None;
    }
    let at = a.iter().zip(b).position(|(a, b)| a != b)?;
    u32::try_from(at).ok()
}

/// Sets the bits of `from` in `to`.
fn or<M: Memory>(memory: &mut M, from: BufSlice, to: BufSlice) {
    const AT_ONCE: usize = 4096;
    let mut bits = [0; AT_ONCE];
    let step = u32::try_from(AT_ONCE).expect("a few");
    for at in (0..from.len()).step_by(AT_ONCE) {
        let len = (from.len() - at).min(step);
        let bits = &mut bits[..len as usize];
        bits.copy_from_slice(memory.bytes(from.sub(at, len)));
        for (to, from) in memory.bytes_mut(to.sub(at, len)).iter_mut().zip(bits) {
            *to |= *from;
        }
    }
}
