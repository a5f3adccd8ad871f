//! A session and a target in one memory, with wires between them that a test can cut and bend.

use cairn_block::reservation::Reservations;
use cairn_block::{BlockSize, Buf, BufSlice, HeapMemory, IoOp, IoRequest, Lba, LbaRange, Memory};

use crate::initiator::{
    Completed, NamespaceInfo, QueueIndex, Session, SessionConfig, SessionError, SessionEvent,
    Submit,
};
use crate::log::DISCOVERY_NQN;
use crate::reservation::{Request, encode_report, refused};
use crate::status::Status;
use crate::target::{
    ConnId, IoCommand, NamespaceConfig, NamespaceHandle, Outcome, Port, Queue, QueueConfig, SlotId,
    SubsystemConfig, SubsystemId, Target, TargetConfig, dsm_range,
};

pub(crate) const NQN: &str = "nqn.2025-01.io.cairn:volume-1";
pub(crate) const HOST: &str =
    "nqn.2014-08.org.nvmexpress:uuid:3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10";
pub(crate) const ID: u128 = 0x3f2c_1a60_5d1c_4b6e_9f0a_2b7f_6f1f_9a10;
pub(crate) const BLOCKS: u64 = 1024;

/// One connection: the target's end, and what is on the wires.
pub(crate) struct Conn {
    pub(crate) id: ConnId,
    pub(crate) queue: Option<Queue>,
    pub(crate) to_target: Vec<u8>,
    pub(crate) to_host: Vec<u8>,
}

pub(crate) struct World {
    pub(crate) mem: HeapMemory,
    pub(crate) target: Target,
    pub(crate) subsystem: SubsystemId,
    pub(crate) session: Option<Session>,
    pub(crate) conns: Vec<Conn>,
    pub(crate) disk: Vec<u8>,
    pub(crate) flushes: usize,
    pub(crate) reservations: Reservations,
    pub(crate) now_ms: u64,
    pub(crate) ready: Option<NamespaceInfo>,
    pub(crate) error: Option<SessionError>,
    pub(crate) completions: Vec<Completed>,
    /// The most bytes that one delivery takes; called for each.
    pub(crate) cut: Box<dyn FnMut() -> usize>,
    pub(crate) queue_config: QueueConfig,
    pub(crate) cut_off: bool,
    /// No memory becomes available.
    pub(crate) starved: bool,
    chunk: Option<Buf>,
    batch: Vec<BufSlice>,
}

pub(crate) fn subsystem() -> SubsystemConfig {
    SubsystemConfig {
        nqn: NQN.into(),
        serial: "CAIRN0001".into(),
        cntlid_min: 1,
        cntlid_max: 100,
        allowed_hosts: None,
        vendor_commands: true,
        discoverable: true,
        ana: None,
    }
}

pub(crate) fn namespace() -> NamespaceConfig {
    NamespaceConfig {
        nsid: 1,
        handle: NamespaceHandle(7),
        blocks: BLOCKS,
        block_size: BlockSize::B4096,
        id: ID,
        volatile_write_cache: true,
        reservations: true,
    }
}

pub(crate) fn target() -> (Target, SubsystemId) {
    let mut target = Target::new(TargetConfig::default());
    target.set_ports(vec![Port { traddr: "192.0.2.1".into(), trsvcid: 4420 }]);
    let id = target.add_subsystem(subsystem()).unwrap();
    target.add_namespace(id, namespace()).unwrap();
    (target, id)
}

pub(crate) fn session_config() -> SessionConfig {
    SessionConfig {
        hostnqn: HOST.into(),
        hostid: 42,
        subnqn: NQN.into(),
        kato_ms: 5000,
        io_queues: 2,
        queue_entries: 32,
        header_digest: false,
        data_digest: false,
    }
}

impl World {
    pub(crate) fn new(config: SessionConfig) -> Self {
        let mut mem = HeapMemory::new(32 << 20);
        let (target, subsystem) = target();
        let session = Session::new(config, &mut mem);
        let chunk = mem.alloc(64 << 10);
        Self {
            mem,
            target,
            subsystem,
            session,
            conns: Vec::new(),
            disk: vec![0; usize::try_from(BLOCKS).unwrap() * 4096],
            flushes: 0,
            reservations: Reservations::default(),
            now_ms: 1000,
            ready: None,
            error: None,
            completions: Vec::new(),
            cut: Box::new(|| 64 << 10),
            queue_config: QueueConfig::default(),
            cut_off: false,
            starved: false,
            chunk,
            batch: Vec::with_capacity(5),
        }
    }

    /// A world whose session is ready.
    pub(crate) fn connected(config: SessionConfig) -> Self {
        let mut world = Self::new(config);
        world.run();
        assert_eq!(world.error, None);
        assert!(world.ready.is_some(), "the session is not ready");
        world
    }

    pub(crate) fn session(&mut self) -> &mut Session {
        self.session.as_mut().unwrap()
    }

    /// Until nothing moves any more.
    pub(crate) fn run(&mut self) {
        while self.step() {}
    }

    pub(crate) fn step(&mut self) -> bool {
        let mut moved = self.poll_session();
        moved |= self.collect();
        if !self.cut_off {
            moved |= self.deliver_to_target();
            moved |= self.deliver_to_host();
        }
        moved
    }

    fn poll_session(&mut self) -> bool {
        let mut moved = false;
        let Some(session) = self.session.as_mut() else { return false };
        while let Some(event) = session.poll_event() {
            moved = true;
            match event {
                SessionEvent::OpenQueue(q) => {
                    assert_eq!(usize::from(q.0), self.conns.len());
                    self.conns.push(Conn {
                        id: ConnId(u32::from(q.0) + 100),
                        queue: Queue::new(&self.queue_config, &mut self.mem),
                        to_target: Vec::new(),
                        to_host: Vec::new(),
                    });
                    session.handle_connected(q, self.now_ms, &mut self.mem);
                }
                SessionEvent::Ready(info) => self.ready = Some(info),
                SessionEvent::Failed(error) => self.error = Some(error),
            }
        }
        while let Some(completed) = session.poll_completion() {
            moved = true;
            self.completions.push(completed);
        }
        moved
    }

    /// Moves what both ends have to send onto the wires.
    pub(crate) fn collect(&mut self) -> bool {
        let mut moved = false;
        for (q, conn) in self.conns.iter_mut().enumerate() {
            if let Some(session) = self.session.as_mut() {
                let tx = session.tx(QueueIndex(u16::try_from(q).unwrap()));
                while tx.wants_send() {
                    moved = true;
                    tx.take_batch(&mut self.batch);
                    for window in &self.batch {
                        conn.to_target.extend_from_slice(self.mem.bytes(*window));
                    }
                    tx.handle_sent(&mut self.mem);
                }
            }
            if let Some(queue) = conn.queue.as_mut() {
                let tx = queue.tx();
                while tx.wants_send() {
                    moved = true;
                    tx.take_batch(&mut self.batch);
                    for window in &self.batch {
                        conn.to_host.extend_from_slice(self.mem.bytes(*window));
                    }
                    tx.handle_sent(&mut self.mem);
                }
            }
        }
        moved
    }

    pub(crate) fn deliver_to_target(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.conns.len() {
            let conn = &mut self.conns[at];
            let Some(queue) = conn.queue.as_mut() else { continue };
            let n = conn.to_target.len().min((self.cut)()).min(64 << 10);
            if n > 0 {
                let chunk = self.chunk.as_ref().unwrap().slice().sub(0, u32::try_from(n).unwrap());
                self.mem.bytes_mut(chunk).copy_from_slice(&conn.to_target[..n]);
                let taken = queue.handle_recv(chunk, &mut self.mem) as usize;
                conn.to_target.drain(..taken);
                moved |= taken > 0;
            }
            if !self.starved {
                queue.retry(&mut self.mem);
            }
            moved |= self.serve(at);
        }
        while let Some(deferred) = self.target.poll_deferred() {
            moved = true;
            if let Some(conn) = self.conns.iter_mut().find(|c| c.id == deferred.conn)
                && let Some(queue) = conn.queue.as_mut()
            {
                queue.complete(deferred.slot, deferred.status, deferred.result, &mut self.mem);
            }
        }
        moved
    }

    fn serve(&mut self, at: usize) -> bool {
        let mut moved = false;
        let conn = &mut self.conns[at];
        let queue = conn.queue.as_mut().unwrap();
        while let Some(cmd) = queue.poll_command() {
            moved = true;
            let outcome =
                self.target.handle_command(conn.id, queue, cmd, self.now_ms, &mut self.mem);
            match outcome {
                Outcome::Done => {}
                Outcome::Elsewhere(owner) => panic!("{owner:?} is asked, and there is none"),
                Outcome::Io(io) => {
                    assert_eq!(io.namespace, NamespaceHandle(7));
                    carry_out(
                        io.slot,
                        io.command,
                        queue,
                        &mut self.disk,
                        &mut self.flushes,
                        &mut self.mem,
                    );
                }
                Outcome::Reserve { slot, namespace, request } => {
                    let table = &mut self.reservations;
                    let (status, result) = match request {
                        Request::Report(data) => {
                            encode_report(table, self.mem.bytes_mut(data.slice()));
                            queue.complete_with_data(slot, data, &mut self.mem);
                            continue;
                        }
                        Request::Persistence => (Status::SUCCESS, u64::from(table.aptpl())),
                        Request::Change(change) => match table.apply(&change) {
                            Ok(effects) => {
                                self.target.tell_reservations(namespace, &effects);
                                (Status::SUCCESS, 0)
                            }
                            Err(refusal) => (refused(refusal), 0),
                        },
                    };
                    queue.complete(slot, status, result, &mut self.mem);
                }
                Outcome::Vendor { slot, sqe, data, .. } => match data {
                    // The answer tells what came.
                    Some(data) => {
                        let first = u64::from(self.mem.bytes(data.slice())[0]);
                        self.mem.release(data);
                        queue.complete(slot, Status::SUCCESS, first, &mut self.mem);
                    }
                    None if queue.data_len(slot) > 0 => {
                        let data = self.mem.alloc(queue.data_len(slot)).unwrap();
                        self.mem.bytes_mut(data.slice()).fill(sqe.cdw(10).to_le_bytes()[0]);
                        queue.complete_with_data(slot, data, &mut self.mem);
                    }
                    None => {
                        let result = u64::from(sqe.cdw(10)) | u64::from(sqe.cdw(11)) << 32;
                        queue.complete(slot, Status::SUCCESS, result, &mut self.mem);
                    }
                },
            }
        }
        moved
    }

    pub(crate) fn deliver_to_host(&mut self) -> bool {
        let mut moved = false;
        for at in 0..self.conns.len() {
            let Some(session) = self.session.as_mut() else { break };
            let conn = &mut self.conns[at];
            let n = conn.to_host.len().min((self.cut)()).min(64 << 10);
            if n > 0 {
                let chunk = self.chunk.as_ref().unwrap().slice().sub(0, u32::try_from(n).unwrap());
                self.mem.bytes_mut(chunk).copy_from_slice(&conn.to_host[..n]);
                conn.to_host.drain(..n);
                moved = true;
                let q = QueueIndex(u16::try_from(at).unwrap());
                if let Err(error) = session.handle_recv(q, chunk, self.now_ms, &mut self.mem) {
                    self.error = Some(error);
                }
            }
        }
        moved
    }

    /// Submits on I/O queue 1 and runs until it has ended.
    pub(crate) fn io(&mut self, op: IoOp, lba: u64, blocks: u64, buf: BufSlice) -> Completed {
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        self.request(QueueIndex(1), Submit::Io(IoRequest { op, range, buf }))
    }

    pub(crate) fn request(&mut self, q: QueueIndex, request: Submit) -> Completed {
        let Self { session, mem, .. } = self;
        session.as_mut().unwrap().submit(q, 77, request, mem).unwrap();
        self.run();
        assert_eq!(self.error, None);
        assert_eq!(self.completions.len(), 1, "one completion of one request");
        let completed = self.completions.remove(0);
        assert_eq!((completed.tag, completed.queue), (77, q));
        completed
    }

    /// Ends everything; nothing may have leaked.
    pub(crate) fn close(mut self) {
        if let Some(mut session) = self.session.take() {
            session.fail();
            session.close(&mut self.mem);
        }
        for conn in &mut self.conns {
            self.target.handle_disconnect(conn.id);
            if let Some(queue) = conn.queue.take() {
                queue.close(&mut self.mem);
            }
        }
        if let Some(chunk) = self.chunk.take() {
            self.mem.release(chunk);
        }
        assert_eq!(self.mem.in_use(), 0, "a buffer has leaked");
    }

    pub(crate) fn discovery(mut config: SessionConfig) -> Self {
        config.subnqn = DISCOVERY_NQN.into();
        Self::new(config)
    }
}

fn bytes_of(range: LbaRange) -> std::ops::Range<usize> {
    let at = |lba: Lba| usize::try_from(lba.0 * 4096).unwrap();
    at(range.start())..at(range.end())
}

pub(crate) fn carry_out(
    slot: SlotId,
    command: IoCommand,
    queue: &mut Queue,
    disk: &mut [u8],
    flushes: &mut usize,
    mem: &mut HeapMemory,
) {
    match command {
        IoCommand::Read { range, len } => {
            let Some(data) = mem.alloc(len) else {
                return queue.complete(slot, Status::NAMESPACE_NOT_READY, 0, mem);
            };
            mem.bytes_mut(data.slice()).copy_from_slice(&disk[bytes_of(range)]);
            return queue.complete_with_data(slot, data, mem);
        }
        IoCommand::Write { range, data, .. } => {
            disk[bytes_of(range)].copy_from_slice(mem.bytes(data.slice()));
            mem.release(data);
        }
        IoCommand::Flush => *flushes += 1,
        IoCommand::Verify { range } if disk[bytes_of(range)].contains(&0xbd) => {
            // As if blocks with this byte were damaged.
            return queue.complete(slot, Status::UNRECOVERED_READ_ERROR.with_dnr(), 0, mem);
        }
        IoCommand::Verify { .. } => {}
        IoCommand::WriteZeroes { range, .. } => disk[bytes_of(range)].fill(0),
        IoCommand::Discard { ranges, count } => {
            for i in 0..usize::from(count) {
                let (lba, blocks) = dsm_range(mem.bytes(ranges.slice()), i).unwrap();
                let range = LbaRange::new(Lba(lba), u64::from(blocks)).unwrap();
                disk[bytes_of(range)].fill(0);
            }
            mem.release(ranges);
        }
    }
    queue.complete(slot, Status::SUCCESS, 0, mem);
}
