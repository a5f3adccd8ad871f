//! A small initiator and a target in one memory, with wires between them that a test can cut.

use cairn_block::reservation::Change;
use cairn_block::sanitize::Method;
use cairn_block::{BlockSize, Buf, BufSlice, HeapMemory, IoStatus, Lba, LbaRange, Memory};

use crate::connection::{Connection, ConnectionConfig, LbaExtent, NotReserved, SlotId};
use crate::login::{FULL_FEATURE, OPERATIONAL, SECURITY};
use crate::pdu::{
    BHS_LEN, Body, CmdSn, Header, LoginRequest, LoginResponse, NO_TAG, Residual, encode_lun,
    lengths,
};
use crate::rx::Digests;
use crate::scsi::{IoCommand, SanitizeCommand, SanitizeEnd, UnitConfig, UnitHandle, unmap_range};
use crate::target::{
    ConnId, Initiators, Io, NodeConfig, NodeId, Outcome, Portal, Target, TargetConfig,
};
use crate::text;
use crate::wire::{len32, pad_len};

pub(crate) const IQN: &str = "iqn.2025-01.io.cairn:volume-1";
pub(crate) const BLOCKS: u64 = 4096;
pub(crate) const BLOCK: usize = 512;

pub(crate) fn node_config() -> NodeConfig {
    NodeConfig {
        iqn: IQN.into(),
        initiators: Initiators::Any,
        portal_groups: vec![1],
        ..NodeConfig::default()
    }
}

pub(crate) fn unit(lun: u16) -> UnitConfig {
    UnitConfig {
        lun,
        handle: UnitHandle(u32::from(lun)),
        blocks: BLOCKS,
        block_size: BlockSize::B512,
        physical_block_size: BlockSize::B4096,
        id: 0x3f2c_1a60_5d1c_4b6e_9f0a_2b7f_6f1f_9a10 + u128::from(lun),
        volatile_write_cache: true,
        read_only: false,
        removable: false,
        atomic_blocks: 8,
    }
}

/// The initiator's end of a connection, and the target's.
pub(crate) struct Host {
    pub(crate) id: ConnId,
    pub(crate) conn: Option<Connection>,
    pub(crate) to_target: Vec<u8>,
    pub(crate) to_host: Vec<u8>,
    pub(crate) initiator: String,
    pub(crate) isid: [u8; 6],
    pub(crate) digests: Digests,
    pub(crate) cmd_sn: u32,
    pub(crate) exp_stat_sn: u32,
    pub(crate) max_cmd_sn: u32,
    pub(crate) next_itt: u32,
    /// The most data in one PDU to the target.
    pub(crate) segment: usize,
}

/// How a SCSI command ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Reply {
    pub(crate) status: u8,
    /// Sense data, without its length.
    pub(crate) sense: Vec<u8>,
    pub(crate) data: Vec<u8>,
    pub(crate) residual: Residual,
    pub(crate) r2ts: u32,
    pub(crate) data_ins: u32,
}

impl Reply {
    /// Sense key, ASC and ASCQ of fixed format sense data.
    pub(crate) fn key(&self) -> (u8, u8, u8) {
        assert_eq!(self.status, 2, "{self:?}");
        (self.sense[2], self.sense[12], self.sense[13])
    }
}

pub(crate) struct World {
    pub(crate) mem: HeapMemory,
    pub(crate) target: Target,
    pub(crate) node: NodeId,
    pub(crate) hosts: Vec<Host>,
    pub(crate) disks: Vec<Vec<u8>>,
    pub(crate) config: ConnectionConfig,
    /// The most bytes that one delivery takes; called for each.
    pub(crate) cut: Box<dyn FnMut() -> usize>,
    /// Requests of the disk are kept and not carried out.
    pub(crate) hold: bool,
    /// The initiators take nothing that they are sent.
    pub(crate) deaf: bool,
    pub(crate) held: Vec<(usize, Outcome)>,
    /// No change of reservations can be stored.
    pub(crate) cut_off: bool,
    /// Each change of reservations, as it was stored.
    pub(crate) stored: Vec<Vec<u8>>,
    pub(crate) flushes: usize,
    chunk: Buf,
    batch: Vec<BufSlice>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(node_config(), TargetConfig::default())
    }

    pub(crate) fn with(node: NodeConfig, config: TargetConfig) -> Self {
        let mut mem = HeapMemory::new(32 << 20);
        let chunk = mem.alloc(64 << 10).unwrap();
        let mut target = Target::new(config).unwrap();
        target.set_portals(vec![
            Portal { address: "192.0.2.1".into(), port: 3260, group: 1 },
            Portal { address: "2001:db8::1".into(), port: 3260, group: 1 },
        ]);
        let node = target.add_node(node).unwrap();
        for lun in 0..2 {
            target.add_unit(node, unit(lun)).unwrap();
        }
        let size = usize::try_from(BLOCKS).unwrap() * BLOCK;
        Self {
            mem,
            target,
            node,
            hosts: Vec::new(),
            disks: vec![vec![0; size]; 2],
            config: ConnectionConfig::default(),
            cut: Box::new(|| 64 << 10),
            hold: false,
            deaf: false,
            held: Vec::new(),
            cut_off: false,
            stored: Vec::new(),
            flushes: 0,
            chunk,
            batch: Vec::with_capacity(7),
        }
    }

    /// A connection of host number `n`, which has not logged in.
    pub(crate) fn connect(&mut self, n: u8) -> usize {
        let id = ConnId(100 + len32(self.hosts.len()));
        let conn = Connection::new(&self.config, 1, &[7; 32], &mut self.mem);
        self.hosts.push(Host {
            id,
            conn,
            to_target: Vec::new(),
            to_host: Vec::new(),
            initiator: format!("iqn.2025-01.io.cairn:host-{n}"),
            isid: [0x40, 0, 0, 0, 0, n],
            digests: Digests::default(),
            cmd_sn: 0xffff_fff0,
            exp_stat_sn: 0,
            max_cmd_sn: 0,
            next_itt: 1,
            segment: 8192,
        });
        self.hosts.len() - 1
    }

    /// A world with one host that has logged in, and been told all attentions.
    pub(crate) fn ready() -> (Self, usize) {
        let mut world = Self::new();
        let h = world.join(1);
        (world, h)
    }

    /// A host that logs in with the usual keys.
    pub(crate) fn join(&mut self, n: u8) -> usize {
        self.join_with(
            n,
            &[
                ("HeaderDigest", "None"),
                ("InitialR2T", "No"),
                ("ImmediateData", "Yes"),
                ("MaxRecvDataSegmentLength", "8192"),
                ("MaxBurstLength", "65536"),
                ("FirstBurstLength", "16384"),
            ],
        )
    }

    pub(crate) fn join_with(&mut self, n: u8, keys: &[(&str, &str)]) -> usize {
        let h = self.connect(n);
        let (response, text) = self.login(h, OPERATIONAL, Some(FULL_FEATURE), keys, true);
        assert_eq!(response.status, (0, 0), "{text:?}");
        assert_eq!((response.transit, response.nsg), (true, FULL_FEATURE));
        self.settle(h, &text);
        if !keys.contains(&("SessionType", "Discovery")) {
            self.clear_attentions(h);
        }
        h
    }

    /// Takes over what was agreed on.
    pub(crate) fn settle(&mut self, h: usize, text: &[(String, String)]) {
        let host = &mut self.hosts[h];
        let on = |key: &str| text.iter().any(|(k, v)| k == key && v == "CRC32C");
        host.digests = Digests { header: on("HeaderDigest"), data: on("DataDigest") };
    }

    pub(crate) fn clear_attentions(&mut self, h: usize) {
        for lun in 0..2 {
            while self.scsi(h, lun, &[0; 6], &[], 0).status == 2 {}
        }
    }

    /// One login request and its answer.
    pub(crate) fn login(
        &mut self,
        h: usize,
        csg: u8,
        nsg: Option<u8>,
        keys: &[(&str, &str)],
        first: bool,
    ) -> (LoginResponse, Vec<(String, String)>) {
        let host = &self.hosts[h];
        let mut out = Vec::new();
        let named = |key: &str| keys.iter().any(|(k, _)| *k == key);
        if first && !named("InitiatorName") {
            text::push(&mut out, "InitiatorName", &host.initiator);
        }
        if first && !named("SessionType") && !named("TargetName") {
            text::push(&mut out, "TargetName", IQN);
        }
        for (key, value) in keys {
            text::push(&mut out, key, value);
        }
        let request = self.login_request(h, csg, nsg);
        self.send(h, Header::new(0, 0, Body::Login(request)), &out);
        self.run();
        let (header, data) = self.receive(h).expect("a login response");
        let Body::LoginResponse(response) = header.body else { panic!("{header:?}") };
        let pairs = text::parse(&data).unwrap();
        (response, pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    pub(crate) fn login_request(&self, h: usize, csg: u8, nsg: Option<u8>) -> LoginRequest {
        let host = &self.hosts[h];
        LoginRequest {
            transit: nsg.is_some(),
            csg,
            nsg: nsg.unwrap_or(SECURITY),
            isid: host.isid,
            cid: 9,
            sn: CmdSn { cmd: host.cmd_sn, exp_stat: host.exp_stat_sn },
            ..LoginRequest::default()
        }
    }

    /// Puts a PDU on the wire.
    pub(crate) fn send(&mut self, h: usize, header: Header, data: &[u8]) {
        let host = &mut self.hosts[h];
        let header = Header { data_len: len32(data.len()), ..header };
        let bytes = header.encode();
        host.to_target.extend_from_slice(&bytes);
        let logged_in = host.conn.as_ref().is_some_and(Connection::is_logged_in);
        if host.digests.header && logged_in {
            host.to_target.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        }
        let mut segment = data.to_vec();
        segment.resize(data.len() + pad_len(len32(data.len())) as usize, 0);
        host.to_target.extend_from_slice(&segment);
        if host.digests.data && logged_in && !data.is_empty() {
            host.to_target.extend_from_slice(&crc32c::crc32c(&segment).to_le_bytes());
        }
    }

    /// The next PDU that came, its digests checked.
    pub(crate) fn receive(&mut self, h: usize) -> Option<(Header, Vec<u8>)> {
        let host = &mut self.hosts[h];
        let bhs: [u8; BHS_LEN] = host.to_host.get(..BHS_LEN)?.try_into().unwrap();
        let (ahs, len) = lengths(&bhs);
        assert_eq!(ahs, 0);
        let mut at = BHS_LEN;
        if host.digests.header {
            assert_eq!(host.to_host[at..at + 4], crc32c::crc32c(&bhs).to_le_bytes());
            at += 4;
        }
        let whole = at + (len + pad_len(len)) as usize;
        let data = host.to_host[at..at + len as usize].to_vec();
        if host.digests.data && len > 0 {
            let crc = crc32c::crc32c(&host.to_host[at..whole]).to_le_bytes();
            assert_eq!(host.to_host[whole..whole + 4], crc);
        }
        let digest = if host.digests.data && len > 0 { 4 } else { 0 };
        host.to_host.drain(..whole + digest);
        let header = Header::decode(&bhs).unwrap();
        let (Body::NopIn { sn, .. }
        | Body::ScsiResponse { sn, .. }
        | Body::TaskManagementResponse { sn, .. }
        | Body::LoginResponse(LoginResponse { sn, .. })
        | Body::TextResponse { sn, .. }
        | Body::DataIn { sn, .. }
        | Body::LogoutResponse { sn, .. }
        | Body::R2t { sn, .. }
        | Body::Async { sn, .. }
        | Body::Reject { sn, .. }) = header.body
        else {
            panic!("a target sent {header:?}");
        };
        host.max_cmd_sn = sn.max_cmd;
        host.exp_stat_sn = host.exp_stat_sn.max(sn.stat.wrapping_add(1));
        Some((header, data))
    }

    /// The sequence numbers of the next command.
    pub(crate) fn next_sn(&mut self, h: usize) -> (u32, CmdSn) {
        let host = &mut self.hosts[h];
        let sn = CmdSn { cmd: host.cmd_sn, exp_stat: host.exp_stat_sn };
        host.cmd_sn = host.cmd_sn.wrapping_add(1);
        host.next_itt += 1;
        (host.next_itt, sn)
    }

    /// Starts a SCSI command whose `out` goes along as immediate data as far as `immediate` says.
    pub(crate) fn start(
        &mut self,
        h: usize,
        lun: u16,
        cdb: &[u8],
        out: &[u8],
        edtl: u32,
        immediate: usize,
    ) -> u32 {
        let (itt, sn) = self.next_sn(h);
        let mut full = [0; 16];
        full[..cdb.len()].copy_from_slice(cdb);
        let write = !out.is_empty();
        let read = !write && edtl > 0;
        let body = Body::ScsiCommand { last: true, read, write, attr: 1, edtl, sn, cdb: full };
        let header = Header::new(itt, 0, body).with_lun(encode_lun(lun));
        self.send(h, header, &out[..immediate.min(out.len())]);
        itt
    }

    /// A whole SCSI command: its data goes out, part of it at once, and its end comes in. `room` is
    /// for data that comes in.
    pub(crate) fn scsi(&mut self, h: usize, lun: u16, cdb: &[u8], out: &[u8], room: u32) -> Reply {
        let edtl = if out.is_empty() { room } else { len32(out.len()) };
        self.scsi_edtl(h, lun, cdb, out, edtl, 1000)
    }

    pub(crate) fn scsi_edtl(
        &mut self,
        h: usize,
        lun: u16,
        cdb: &[u8],
        out: &[u8],
        edtl: u32,
        immediate: usize,
    ) -> Reply {
        let itt = self.start(h, lun, cdb, out, edtl, immediate);
        self.run();
        self.finish(h, itt, out)
    }

    /// Answers R2Ts with `out` until the command has ended.
    pub(crate) fn finish(&mut self, h: usize, itt: u32, out: &[u8]) -> Reply {
        let mut reply = Reply::default();
        loop {
            let (header, data) = self.receive(h).expect("the command ended");
            assert_eq!(header.itt, itt, "{header:?}");
            match header.body {
                Body::R2t { ttt, r2t_sn, offset, len, .. } => {
                    assert_eq!(r2t_sn, reply.r2ts);
                    reply.r2ts += 1;
                    self.send_data(h, itt, ttt, offset, &out[offset as usize..][..len as usize]);
                    self.run();
                }
                Body::DataIn { status, data_sn, offset, residual, .. } => {
                    assert_eq!((data_sn, offset), (reply.data_ins, len32(reply.data.len())));
                    reply.data_ins += 1;
                    reply.data.extend(data);
                    if let Some(status) = status {
                        (reply.status, reply.residual) = (status, residual);
                        return reply;
                    }
                }
                Body::ScsiResponse { response: 0, status, residual, .. } => {
                    (reply.status, reply.residual) = (status, residual);
                    reply.sense = data.get(2..).unwrap_or_default().to_vec();
                    return reply;
                }
                _ => panic!("{header:?}"),
            }
        }
    }

    /// The tag of the R2T that has come.
    pub(crate) fn r2t(&mut self, h: usize) -> u32 {
        match self.receive(h) {
            Some((Header { body: Body::R2t { ttt, .. }, .. }, _)) => ttt,
            other => panic!("no R2T, but {other:?}"),
        }
    }

    /// Takes all memory.
    pub(crate) fn hog(&mut self) -> Vec<Buf> {
        std::iter::from_fn(|| self.mem.alloc(4096)).collect()
    }

    /// A sequence of Data-Out.
    pub(crate) fn send_data(&mut self, h: usize, itt: u32, ttt: u32, offset: u32, data: &[u8]) {
        let segment = self.hosts[h].segment;
        let count = data.len().div_ceil(segment);
        for (i, part) in data.chunks(segment).enumerate() {
            let body = Body::DataOut {
                last: i + 1 == count,
                ttt,
                exp_stat_sn: 0,
                data_sn: len32(i),
                offset: offset + len32(i * segment),
            };
            self.send(h, Header::new(itt, 0, body), part);
        }
    }

    /// Asks for a task management function.
    pub(crate) fn manage(&mut self, h: usize, function: u8, lun: u16, rtt: u32) {
        let (itt, sn) = self.next_sn(h);
        let body = Body::TaskManagement { function, rtt, sn, ref_cmd_sn: 0 };
        self.send(h, Header::new(itt, 0, body).with_lun(encode_lun(lun)), &[]);
        self.run();
    }

    /// A task management function and its response.
    pub(crate) fn task_management(&mut self, h: usize, function: u8, lun: u16, rtt: u32) -> u8 {
        self.manage(h, function, lun, rtt);
        match self.receive(h) {
            Some((Header { body: Body::TaskManagementResponse { response, .. }, .. }, _)) => {
                response
            }
            other => panic!("{other:?}"),
        }
    }

    /// The connection of a host.
    pub(crate) fn conn(&mut self, h: usize) -> &mut Connection {
        self.hosts[h].conn.as_mut().unwrap()
    }

    /// It is so late now, for all.
    pub(crate) fn at(&mut self, now_ms: u64) {
        for conn in self.hosts.iter_mut().filter_map(|host| host.conn.as_mut()) {
            conn.handle_timeout(now_ms, &mut self.mem);
        }
    }

    /// Until nothing moves any more.
    pub(crate) fn run(&mut self) {
        while self.step() {}
    }

    pub(crate) fn step(&mut self) -> bool {
        let mut moved = false;
        for h in 0..self.hosts.len() {
            moved |= self.deliver(h);
            moved |= self.serve(h);
            moved |= self.collect(h);
        }
        self.pass_aborts();
        while let Some(id) = self.target.poll_close() {
            let h = self.hosts.iter().position(|host| host.id == id).unwrap();
            self.hang_up(h);
        }
        moved
    }

    /// Ends a connection.
    pub(crate) fn hang_up(&mut self, h: usize) {
        self.target.handle_disconnect(self.hosts[h].id);
        if let Some(conn) = self.hosts[h].conn.take() {
            conn.close(&mut self.mem);
        }
    }

    fn deliver(&mut self, h: usize) -> bool {
        let n = self.hosts[h].to_target.len().min((self.cut)()).min(64 << 10);
        let host = &mut self.hosts[h];
        let Some(conn) = host.conn.as_mut() else { return false };
        conn.retry(&mut self.mem);
        if n == 0 {
            return false;
        }
        let chunk = self.chunk.slice().sub(0, len32(n));
        self.mem.bytes_mut(chunk).copy_from_slice(&host.to_target[..n]);
        let taken = conn.handle_recv(chunk, &mut self.mem) as usize;
        host.to_target.drain(..taken);
        taken > 0
    }

    fn serve(&mut self, h: usize) -> bool {
        let mut moved = false;
        loop {
            let Host { id, conn: Some(conn), .. } = &mut self.hosts[h] else { return moved };
            let Some(cmd) = conn.poll_command() else { return moved };
            moved = true;
            let outcome = self.target.handle_command(*id, conn, cmd, &mut self.mem);
            match outcome {
                Outcome::Done => {}
                Outcome::Reserve { slot, unit, change } => self.reserve(h, slot, unit, &change),
                Outcome::ReserveIn { slot, unit, query } if !self.hold => {
                    let table = self.target.reservations(unit).ok_or(IoStatus::NotReady);
                    conn.complete_reserve_in(slot, query, table, &mut self.mem);
                }
                outcome if self.hold => self.held.push((h, outcome)),
                Outcome::Sanitize { slot, unit, command } => self.sanitize(h, slot, unit, &command),
                outcome => self.carry_out(h, outcome),
            }
        }
    }

    fn collect(&mut self, h: usize) -> bool {
        let host = &mut self.hosts[h];
        let Some(conn) = host.conn.as_mut() else { return false };
        let mut moved = false;
        while conn.wants_send() && !self.deaf {
            moved = true;
            conn.take_batch(&mut self.batch);
            for window in &self.batch {
                host.to_host.extend_from_slice(self.mem.bytes(*window));
            }
            conn.handle_sent(&mut self.mem);
        }
        moved
    }

    /// Changes, stores and installs reservations. The command ends once what is aborted has: where
    /// requests are held, it is too.
    fn reserve(&mut self, h: usize, slot: SlotId, unit: UnitHandle, change: &Change) {
        let mut table = self.target.reservations(unit).unwrap().clone();
        let mut applied = table.apply(change).map_err(NotReserved::Refused);
        if applied.is_ok() && self.cut_off {
            applied = Err(NotReserved::NotStored(IoStatus::NotReady));
        }
        if let Ok(effects) = &applied {
            self.stored.push(table.encode());
            self.target.set_reservations(unit, table, effects).unwrap();
            self.pass_aborts();
            if self.hold && !effects.abort.is_empty() {
                let change = change.clone();
                return self.held.push((h, Outcome::Reserve { slot, unit, change }));
            }
        }
        let conn = self.hosts[h].conn.as_mut().unwrap();
        conn.complete_reserve(slot, applied.map(|_| ()), &mut self.mem);
    }

    /// Does all of a sanitize at once, or leaves one that failed.
    fn sanitize(&mut self, h: usize, slot: SlotId, unit: UnitHandle, command: &SanitizeCommand) {
        let disk = &mut self.disks[unit.0 as usize];
        match command {
            SanitizeCommand::Begin { sanitize, .. } if sanitize.method == Method::Erase => {
                disk.fill(0);
            }
            SanitizeCommand::Begin { sanitize, .. } => {
                disk.chunks_mut(BLOCK).for_each(|block| sanitize.fill(block));
            }
            SanitizeCommand::Exit => {}
        }
        self.target.set_sanitize(unit, None);
        let conn = self.hosts[h].conn.as_mut().unwrap();
        conn.complete_sanitize(slot, SanitizeEnd::Good, &mut self.mem);
    }

    fn pass_aborts(&mut self) {
        while let Some(abort) = self.target.poll_abort() {
            let host = self.hosts.iter_mut().find(|host| host.id == abort.conn);
            if let Some(conn) = host.and_then(|host| host.conn.as_mut()) {
                conn.abort(abort.lun, &mut self.mem);
            }
        }
    }

    /// Carries out what was held back.
    pub(crate) fn release_held(&mut self) {
        for (h, outcome) in std::mem::take(&mut self.held) {
            self.carry_out(h, outcome);
        }
    }

    pub(crate) fn carry_out(&mut self, h: usize, outcome: Outcome) {
        let mem = &mut self.mem;
        let Some(conn) = self.hosts[h].conn.as_mut() else { return self.carry_on(outcome) };
        let io = match outcome {
            Outcome::Done => return,
            Outcome::Drain { slot, .. } => return conn.complete(slot, IoStatus::Ok, mem),
            Outcome::Reserve { slot, .. } => return conn.complete_reserve(slot, Ok(()), mem),
            Outcome::Sanitize { slot, unit, command } => {
                return self.sanitize(h, slot, unit, &command);
            }
            Outcome::ReserveIn { slot, unit, query } => {
                let table = self.target.reservations(unit).ok_or(IoStatus::NotReady);
                return conn.complete_reserve_in(slot, query, table, mem);
            }
            Outcome::Io(io) => io,
        };
        let slot = io.slot;
        let at = |range: LbaRange| bytes_of(range);
        let disk = &mut self.disks[io.unit.0 as usize];
        match io.command {
            IoCommand::Read { range, len } => {
                let Some(data) = mem.alloc(len) else {
                    return conn.complete(slot, IoStatus::NotReady, mem);
                };
                mem.bytes_mut(data.slice()).copy_from_slice(&disk[at(range)]);
                return conn.complete_with_data(slot, data, mem);
            }
            IoCommand::Write { range, data, .. } => {
                disk[at(range)].copy_from_slice(mem.bytes(data.slice()));
                mem.release(data);
            }
            IoCommand::Flush => self.flushes += 1,
            // As if blocks with this byte were damaged.
            IoCommand::Verify { range } if disk[at(range)].contains(&0xbd) => {
                return conn.complete(slot, IoStatus::MediaError, mem);
            }
            IoCommand::Verify { .. } => {}
            IoCommand::Compare { range, data, repeated } => {
                let want = mem.bytes(data.slice());
                let same = |i: usize| want[if repeated { i % want.len() } else { i }];
                let differs = disk[at(range)].iter().enumerate().find(|(i, b)| **b != same(*i));
                let differs = differs.map(|(i, _)| i);
                mem.release(data);
                return end_comparison(conn, slot, differs, mem);
            }
            IoCommand::CompareAndWrite { range, data, .. } => {
                let bytes = mem.bytes(data.slice());
                let (want, new) = bytes.split_at(bytes.len() / 2);
                let old = &mut disk[at(range)];
                let differs = old.iter().zip(want).position(|(a, b)| a != b);
                if differs.is_none() {
                    old.copy_from_slice(new);
                }
                mem.release(data);
                return end_comparison(conn, slot, differs, mem);
            }
            IoCommand::OrWrite { range, data, .. } => {
                for (old, new) in disk[at(range)].iter_mut().zip(mem.bytes(data.slice())) {
                    *old |= new;
                }
                mem.release(data);
            }
            IoCommand::WriteSame { range, data, .. } => {
                for block in disk[at(range)].chunks_mut(BLOCK) {
                    block.copy_from_slice(mem.bytes(data.slice()));
                }
                mem.release(data);
            }
            IoCommand::WriteZeroes { range, .. } => disk[at(range)].fill(0),
            IoCommand::Unmap { ranges, count, .. } => {
                for i in 0..usize::from(count) {
                    let (lba, n) = unmap_range(mem.bytes(ranges.slice()), i).unwrap();
                    disk[at(LbaRange::new(Lba(lba), u64::from(n)).unwrap())].fill(0);
                }
                mem.release(ranges);
            }
            IoCommand::LbaStatus { range, .. } => {
                // Every other 8 blocks are mapped.
                let first = 8 - range.start().0 % 8;
                let mapped = range.start().0 / 8 % 2 == 0;
                let extents = [
                    LbaExtent { blocks: u32::try_from(first).unwrap(), mapped },
                    LbaExtent { blocks: 8, mapped: !mapped },
                ];
                return conn.complete_lba_status(slot, &extents, mem);
            }
            IoCommand::Copy { segments, .. } => {
                for s in segments {
                    let data = self.disks[s.from.0 as usize][at(s.from_range)].to_vec();
                    self.disks[s.to.0 as usize][at(s.to_range)].copy_from_slice(&data);
                }
            }
        }
        conn.complete(slot, IoStatus::Ok, mem);
    }

    /// A write whose connection is gone goes on; nobody is told of its end.
    fn carry_on(&mut self, outcome: Outcome) {
        if let Outcome::Io(Io { unit, command: IoCommand::Write { range, data, .. }, .. }) = outcome
        {
            let disk = &mut self.disks[unit.0 as usize];
            disk[bytes_of(range)].copy_from_slice(self.mem.bytes(data.slice()));
            self.mem.release(data);
        }
    }

    /// Ends everything; nothing may have leaked.
    pub(crate) fn close(mut self) {
        self.release_held();
        for h in 0..self.hosts.len() {
            self.hang_up(h);
        }
        self.mem.release(self.chunk);
        assert_eq!(self.mem.in_use(), 0, "a buffer has leaked");
    }
}

fn end_comparison(conn: &mut Connection, slot: SlotId, at: Option<usize>, mem: &mut HeapMemory) {
    match at {
        Some(at) => conn.complete_miscompare(slot, len32(at), mem),
        None => conn.complete(slot, IoStatus::Ok, mem),
    }
}

fn bytes_of(range: LbaRange) -> std::ops::Range<usize> {
    let at = |lba: Lba| usize::try_from(lba.0).unwrap() * BLOCK;
    at(range.start())..at(range.end())
}

/// READ (10).
pub(crate) fn read10(lba: u32, blocks: u16) -> Vec<u8> {
    ten(0x28, lba, blocks)
}

/// WRITE (10).
pub(crate) fn write10(lba: u32, blocks: u16) -> Vec<u8> {
    ten(0x2a, lba, blocks)
}

pub(crate) fn ten(code: u8, lba: u32, blocks: u16) -> Vec<u8> {
    let mut cdb = vec![code, 0];
    cdb.extend_from_slice(&lba.to_be_bytes());
    cdb.push(0);
    cdb.extend_from_slice(&blocks.to_be_bytes());
    cdb.push(0);
    cdb
}

/// A tag that names no task.
pub(crate) const NOBODY: u32 = NO_TAG - 1;
