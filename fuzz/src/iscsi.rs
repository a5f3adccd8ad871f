//! Entry points for the bytes that an iSCSI initiator sends. None may panic, whatever it is given.

use cairn_block::reservation::{Action, Change, Registrant, ReservationType, Reservations};
use cairn_block::sanitize::Sanitize;
use cairn_block::{BlockSize, Buf, BufSlice, HeapMemory, IoStatus, Memory};
use cairn_iscsi::chap::{Chap, Credentials};
use cairn_iscsi::connection::{Connection, ConnectionConfig, LbaExtent, NotReserved};
use cairn_iscsi::pdu::{BHS_LEN, Body, CmdSn, Header, LoginRequest, NO_TAG};
use cairn_iscsi::scsi::{
    IoCommand, SanitizeCommand, SanitizeEnd, SanitizeState, UnitConfig, UnitHandle, unmap_range,
};
use cairn_iscsi::target::{ConnId, Initiators, Io, NodeConfig, Outcome, Target, TargetConfig};
use cairn_iscsi::text;

const IQN: &str = "iqn.2025-01.io.cairn:fuzz";
const HOST: &str = "iqn.2025-01.io.cairn:host";
/// How much time passes with each turn.
const TURN_MS: u64 = 700;
/// Of so many writes and copies one is given back at first.
const PARK_EVERY: usize = 13;
/// The most bytes of an input that one delivery takes.
const CHUNK_LEN: u32 = 4096;
/// Operation codes that reach deep, for the stateful target.
const CODES: [u8; 33] = [
    0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x16, 0x17, 0x1a, 0x1b, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x34,
    0x35, 0x41, 0x42, 0x48, 0x55, 0x5a, 0x5e, 0x5f, 0x83, 0x84, 0x88, 0x89, 0x8a, 0x8b, 0x93, 0x9e,
    0xa3,
];

fn target(chap: Option<Chap>) -> Option<Target> {
    let mut target = Target::new(TargetConfig::default()).ok()?;
    let node = NodeConfig {
        iqn: IQN.to_owned(),
        initiators: Initiators::Any,
        chap,
        portal_groups: vec![1],
        ..NodeConfig::default()
    };
    if let Ok(id) = target.add_node(node) {
        for lun in 0..2 {
            let unit = UnitConfig {
                lun,
                handle: UnitHandle(u32::from(lun)),
                blocks: 1 << 16,
                block_size: if lun == 0 { BlockSize::B512 } else { BlockSize::B4096 },
                physical_block_size: BlockSize::B4096,
                id: u128::from(lun) + 1,
                volatile_write_cache: true,
                read_only: false,
                removable: lun == 1,
                atomic_blocks: 8,
            };
            // It is fixed and valid.
            let _ = target.add_unit(id, unit);
        }
    }
    Some(target)
}

/// A target, a connection to it, and what is being carried out.
struct World {
    mem: HeapMemory,
    target: Target,
    conn: Connection,
    chunk: Buf,
    batch: Vec<BufSlice>,
    /// Requests that were handed out and have not ended.
    held: Vec<Outcome>,
    /// Of so many requests one is held for a while.
    hold_every: usize,
    count: usize,
    now_ms: u64,
    /// The initiator takes what it is sent only when nothing else moves.
    slow: bool,
}

impl World {
    fn new(memory: u32, chap: Option<Chap>) -> Option<Self> {
        let mut mem = HeapMemory::new(memory);
        let conn = Connection::new(&ConnectionConfig::default(), 1, &[1; 32], &mut mem)?;
        let chunk = mem.alloc(CHUNK_LEN)?;
        Some(Self {
            mem,
            target: target(chap)?,
            conn,
            chunk,
            batch: Vec::with_capacity(8),
            held: Vec::new(),
            hold_every: 0,
            count: 0,
            now_ms: 0,
            slow: false,
        })
    }

    /// Delivers `rest` in parts of at most `cut` bytes, until it is taken or nothing moves.
    fn deliver(&mut self, mut rest: &[u8], cut: u32) {
        let mut stalls = 0;
        while !rest.is_empty() && stalls < 4 {
            let n = u32::try_from(rest.len()).unwrap_or(u32::MAX).min(cut.clamp(1, CHUNK_LEN));
            let window = self.chunk.slice().sub(0, n);
            self.mem.bytes_mut(window).copy_from_slice(&rest[..n as usize]);
            let taken = self.conn.handle_recv(window, &mut self.mem);
            assert!(taken <= n, "more was taken than came");
            rest = &rest[taken as usize..];
            stalls = if taken == 0 { stalls + 1 } else { 0 };
            self.turn(taken == 0);
        }
    }

    fn turn(&mut self, release: bool) {
        while let Some(cmd) = self.conn.poll_command() {
            let outcome = self.target.handle_command(ConnId(0), &mut self.conn, cmd, &mut self.mem);
            self.count += 1;
            if self.hold_every > 0 && self.count.is_multiple_of(self.hold_every) {
                self.held.push(outcome);
            } else {
                self.carry_out(outcome);
            }
        }
        if release || self.held.len() > 8 {
            for outcome in std::mem::take(&mut self.held) {
                self.carry_out(outcome);
            }
        }
        while let Some(abort) = self.target.poll_abort() {
            assert_ne!(abort.conn, ConnId(0), "there is no other connection");
        }
        while self.conn.wants_send() && (release || !self.slow) {
            self.conn.take_batch(&mut self.batch);
            self.conn.handle_sent(&mut self.mem);
        }
        self.now_ms += TURN_MS;
        self.conn.handle_timeout(self.now_ms, &mut self.mem);
        self.conn.retry(&mut self.mem);
    }

    fn carry_out(&mut self, outcome: Outcome) {
        let Self { mem, conn, target, .. } = self;
        let Io { slot, command, .. } = match outcome {
            Outcome::Done => return,
            Outcome::Drain { slot, .. } => return conn.complete(slot, IoStatus::Ok, mem),
            Outcome::Reserve { slot, unit, change } => {
                let mut table = target.reservations(unit).cloned().unwrap_or_default();
                let result = table.apply(&change).map_err(NotReserved::Refused);
                if let Ok(effects) = &result {
                    assert_eq!(Reservations::decode(&table.encode()).as_ref(), Ok(&table));
                    assert_eq!(target.set_reservations(unit, table, effects), Ok(()));
                }
                return conn.complete_reserve(slot, result.map(|_| ()), mem);
            }
            Outcome::Sanitize { slot, unit, command } => {
                let state = match command {
                    SanitizeCommand::Begin { immediate: true, sanitize } => {
                        assert_eq!(Sanitize::decode(&sanitize.encode()).as_ref(), Ok(&sanitize));
                        let unrestricted = sanitize.unrestricted;
                        Some(SanitizeState::Failed { unrestricted })
                    }
                    _ => None,
                };
                target.set_sanitize(unit, state);
                return conn.complete_sanitize(slot, SanitizeEnd::Good, mem);
            }
            Outcome::ReserveIn { slot, unit, query } => {
                let table = target.reservations(unit).ok_or(IoStatus::NotReady);
                return conn.complete_reserve_in(slot, query, table, mem);
            }
            Outcome::Io(io) => io,
        };
        match command {
            IoCommand::Write { data, .. } if self.count.is_multiple_of(PARK_EVERY) => {
                conn.park(slot, Some(data));
            }
            IoCommand::Copy { .. } if self.count.is_multiple_of(PARK_EVERY) => {
                conn.park(slot, None)
            }
            IoCommand::Read { len, .. } => match mem.alloc(len) {
                Some(data) => conn.complete_with_data(slot, data, mem),
                None => conn.complete(slot, IoStatus::NotReady, mem),
            },
            IoCommand::Write { data, .. }
            | IoCommand::OrWrite { data, .. }
            | IoCommand::WriteSame { data, .. } => {
                mem.release(data);
                conn.complete(slot, IoStatus::Ok, mem);
            }
            IoCommand::Compare { data, .. } | IoCommand::CompareAndWrite { data, .. } => {
                mem.release(data);
                conn.complete_miscompare(slot, 1, mem);
            }
            IoCommand::Unmap { ranges, count, .. } => {
                for i in 0..usize::from(count) {
                    assert!(unmap_range(mem.bytes(ranges.slice()), i).is_some(), "range {i}");
                }
                mem.release(ranges);
                conn.complete(slot, IoStatus::NoSpace, mem);
            }
            IoCommand::LbaStatus { .. } => {
                let extents = [LbaExtent { blocks: 8, mapped: true }];
                conn.complete_lba_status(slot, &extents, mem);
            }
            IoCommand::Copy { .. } => conn.complete(slot, IoStatus::MediaError, mem),
            IoCommand::Flush | IoCommand::Verify { .. } | IoCommand::WriteZeroes { .. } => {
                conn.complete(slot, IoStatus::Ok, mem)
            }
        }
    }

    fn close(mut self) {
        for outcome in std::mem::take(&mut self.held) {
            self.carry_out(outcome);
        }
        self.target.handle_disconnect(ConnId(0));
        self.conn.close(&mut self.mem);
        self.mem.release(self.chunk);
        assert_eq!(self.mem.in_use(), 0, "the target lost a buffer");
    }
}

/// A whole byte stream of an initiator, from the login on. The first byte chooses how it is cut, and
/// whether the initiator has to prove itself.
///
/// # Panics
/// Where the target does, or where it loses a buffer: that is what fuzzing looks for.
pub fn target_stream(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else { return };
    let credentials =
        |name: &str, secret: &[u8]| Credentials { name: name.to_owned(), secret: secret.to_vec() };
    let chap = (first & 0x80 != 0).then(|| Chap {
        initiator: credentials("host", b"a secret of some length"),
        target: Some(credentials("disk", b"another of some length")),
    });
    let Some(mut world) = World::new(4 << 20, chap) else { return };
    world.hold_every = usize::from(first & 3);
    world.slow = first & 0x20 != 0;
    world.deliver(rest, if first & 0x40 != 0 { 7 } else { CHUNK_LEN });
    world.close();
}

/// A session that has logged in: each 24 bytes of the input make one PDU whose sequence numbers,
/// lengths and tags are mostly right, so that the commands behind them are reached.
///
/// # Panics
/// As [`target_stream`].
pub fn session(data: &[u8]) {
    let Some((&first, steps)) = data.split_first() else { return };
    // Little memory, so that writes have to wait for it.
    let memory = if first & 1 == 0 { 4 << 20 } else { 256 << 10 };
    let Some(mut world) = World::new(memory, None) else { return };
    world.hold_every = usize::from(first >> 1 & 7);
    world.slow = first & 0x10 != 0;
    world.deliver(&login(if first & 0x80 != 0 { "No" } else { "Yes" }), CHUNK_LEN);
    // The login is answered, though that be held.
    world.turn(true);
    let mut cmd_sn = 1;
    let mut stream = Vec::new();
    for (itt, step) in (2_u32..).zip(steps.chunks_exact(24)) {
        stream.extend(pdu(step, itt, &mut cmd_sn));
    }
    world.deliver(&stream, u32::from(first) * 16 + 1);
    world.turn(true);
    world.close();
}

/// One PDU of a session.
fn pdu(step: &[u8], itt: u32, cmd_sn: &mut u32) -> Vec<u8> {
    let sn = CmdSn { cmd: *cmd_sn, exp_stat: 1 };
    let mut data = vec![step[23]; usize::from(step[22]) * 4];
    for (to, from) in data.iter_mut().zip(step) {
        *to = *from;
    }
    let itt = if step[1] & 0x40 != 0 { u32::from(step[2]) } else { itt };
    let numbered = !matches!(step[0] & 7, 3 | 4);
    let body = match step[0] & 7 {
        0..=2 => {
            let mut cdb = [0; 16];
            cdb.copy_from_slice(&step[4..20]);
            cdb[0] = CODES[usize::from(step[3]) % CODES.len()];
            let edtl = u32::from(step[20]) << 8 | u32::from(step[21]);
            let (last, write) = (step[1] & 1 == 0, step[1] & 2 != 0);
            Body::ScsiCommand { last, read: !write, write, attr: 1, edtl, sn, cdb }
        }
        3 | 4 => Body::DataOut {
            last: step[1] & 1 == 0,
            ttt: if step[1] & 2 == 0 {
                NO_TAG
            } else {
                u32::from(step[4]) << 16 | u32::from(step[3])
            },
            exp_stat_sn: 0,
            data_sn: u32::from(step[5]),
            offset: u32::from(step[6]) * 512,
        },
        5 => Body::TaskManagement {
            function: step[3] & 15,
            rtt: u32::from(step[4]),
            sn,
            ref_cmd_sn: 0,
        },
        6 if step[3] < 250 => Body::Text { last: true, more: step[1] & 1 != 0, ttt: NO_TAG, sn },
        6 => Body::Logout { reason: step[3] & 3, cid: 0, sn },
        _ => Body::NopOut { ttt: NO_TAG, sn },
    };
    if numbered {
        *cmd_sn = cmd_sn.wrapping_add(1);
    }
    let len = u32::try_from(data.len()).unwrap_or(0);
    let header = Header::new(itt, len, body).with_lun(u64::from(step[1] >> 5 & 1) << 48);
    let mut out = header.encode().to_vec();
    out.extend_from_slice(&data);
    out
}

fn login(initial_r2t: &str) -> Vec<u8> {
    let mut keys = Vec::new();
    text::push(&mut keys, "InitiatorName", HOST);
    text::push(&mut keys, "TargetName", IQN);
    text::push(&mut keys, "InitialR2T", initial_r2t);
    text::push(&mut keys, "MaxRecvDataSegmentLength", "512");
    let request = LoginRequest {
        transit: true,
        csg: 1,
        nsg: 3,
        isid: [0x40, 0, 0, 0, 0, 1],
        sn: CmdSn { cmd: 1, exp_stat: 0 },
        ..LoginRequest::default()
    };
    let len = u32::try_from(keys.len()).unwrap_or(0);
    let mut out = Header::new(1, len, Body::Login(request)).encode().to_vec();
    keys.resize(keys.len().next_multiple_of(4), 0);
    out.extend_from_slice(&keys);
    out
}

/// One header: what is decoded can be encoded and decoded again.
///
/// # Panics
/// Where that is not so.
pub fn header(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<BHS_LEN>() else { return };
    if let Ok(header) = Header::decode(bytes) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
}

/// The reservations that a volume's voters keep: what is read for some is what is written again.
///
/// # Panics
/// Where that is not so.
pub fn reservations(data: &[u8]) {
    if let Ok(table) = Reservations::decode(data) {
        assert_eq!(table.encode(), data);
    }
}

/// Three hosts of both transports, one of which holds the reservation.
fn reserved() -> Vec<u8> {
    let mut table = Reservations::default();
    let nvme = Registrant::Nvme { host_id: 3, host_nqn: "nqn.2025-01.io.cairn:host".to_owned() };
    let iscsi =
        |port_group| Registrant::Iscsi { initiator: HOST.to_owned(), isid: [1; 6], port_group };
    let register = Action::Register { new_key: 7, aptpl: Some(true) };
    for registrant in [iscsi(1), iscsi(2), nvme] {
        // Each is registered once, and one reserves.
        let _ = table.apply(&Change { registrant, key: 0, action: register });
    }
    let action = Action::Reserve(ReservationType::WriteExclusiveRegistrantsOnly);
    let _ = table.apply(&Change { registrant: iscsi(2), key: 7, action });
    table.encode()
}

/// Well-formed inputs of a target of this module.
#[must_use]
pub fn seeds(name: &str) -> Vec<Vec<u8>> {
    let step = |kind: u8, flags: u8, code: u8| {
        let mut step = vec![0; 24];
        (step[0], step[1], step[3], step[12]) = (kind, flags, code, 1);
        (step[20], step[22]) = (2, 128);
        step
    };
    let mut steps = vec![0];
    // A write with immediate data, a read, INQUIRY, a write that waits for its data, UNMAP.
    for (kind, flags, code) in
        [(0, 2, 12), (0, 0, 11), (0, 0, 4), (0, 3, 12), (3, 0, 0), (0, 2, 18), (5, 0, 5), (6, 0, 0)]
    {
        steps.extend(step(kind, flags, code));
    }
    // More requests than a ring has room for the answers of.
    for n in 0..100 {
        steps.extend(step(if n % 2 == 0 { 6 } else { 7 }, 0, 0));
    }
    match name {
        "session" => (0..=255)
            .step_by(37)
            .map(|first| {
                let mut seed = steps.clone();
                seed[0] = first;
                seed
            })
            .collect(),
        "reservations" => vec![reserved(), Reservations::default().encode()],
        "header" => vec![login("No")[..BHS_LEN].to_vec()],
        _ => [0, 0x41, 0x80]
            .map(|first| {
                let mut stream = vec![first];
                stream.extend(login("No"));
                let mut cmd_sn = 1;
                for (itt, step) in (2..).zip(steps[1..].chunks_exact(24)) {
                    stream.extend(pdu(step, itt, &mut cmd_sn));
                }
                stream
            })
            .into(),
    }
}
