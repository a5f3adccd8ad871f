mod reservations;

use cairn_block::Memory;
use proptest::prelude::*;

use super::*;
use crate::ana::AnaLog;
use crate::identify::{IdentifyController, IdentifyNamespace, active_namespaces, descriptor_id};
use crate::log::{CHANGED_NAMESPACES, DISCOVERY, DISCOVERY_NQN, DiscoveryEntry};
use crate::loopback::{Conn, HOST, ID, NQN, World, namespace, session_config, subsystem};
use crate::pdu::{Body, Digests, FLAG_SUCCESS, Header};
use crate::sqe::{Cqe, SGL_IN_CAPSULE, SGL_TRANSPORT, Sgl};

/// A host that says what a test writes by hand.
struct Host {
    world: World,
}

/// The answer to one command.
#[derive(Debug, PartialEq)]
struct Answer {
    cqe: Cqe,
    data: Vec<u8>,
}

impl Host {
    fn new() -> Self {
        let mut world = World::new(session_config());
        if let Some(session) = world.session.take() {
            session.close(&mut world.mem);
        }
        Self { world }
    }

    /// As [`Host::new`], with another subsystem.
    fn with(config: SubsystemConfig) -> Self {
        let mut host = Self::new();
        let target = &mut host.world.target;
        target.remove_subsystem(host.world.subsystem);
        host.world.subsystem = target.add_subsystem(config).unwrap();
        target.add_namespace(host.world.subsystem, namespace()).unwrap();
        host
    }

    /// Opens a connection, up to ICResp.
    fn open(&mut self) -> usize {
        let q = self.world.conns.len();
        self.world.conns.push(Conn {
            id: ConnId(u32::try_from(q).unwrap() + 100),
            queue: Queue::new(&self.world.queue_config, &mut self.world.mem),
            to_target: Vec::new(),
            to_host: Vec::new(),
        });
        // type 0, hlen 128, plen 128, PFV 0, HPDA 0, no digests, MAXR2T 0.
        let mut icreq = [0; 128];
        icreq[2] = 128;
        icreq[4] = 128;
        self.send(q, &icreq);
        let answer = std::mem::take(&mut self.world.conns[q].to_host);
        assert_eq!(answer[..12], [1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer.len(), 128);
        q
    }

    fn send(&mut self, q: usize, bytes: &[u8]) {
        self.world.conns[q].to_target.extend_from_slice(bytes);
        self.world.run();
    }

    /// Sends a command capsule as Linux lays it out.
    fn capsule(&mut self, q: usize, sqe: Sqe, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let header = Header::new(Body::CapsuleCmd(sqe), Digests::default(), len, 0);
        let bytes = [header.encode().as_bytes(), data].concat();
        self.send(q, &bytes);
    }

    /// What the target has sent: responses, and data.
    fn answers(&mut self, q: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        let mut data = Vec::new();
        let bytes = std::mem::take(&mut self.world.conns[q].to_host);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let header = Header::decode(rest).unwrap();
            let body = &rest[usize::from(header.pdo)..header.plen as usize];
            match header.body {
                Body::C2hData(_) => {
                    assert_eq!(header.flags & FLAG_SUCCESS, 0, "SQ flow control is not disabled");
                    data.extend_from_slice(body);
                }
                Body::CapsuleResp(cqe) => {
                    answers.push(Answer { cqe, data: std::mem::take(&mut data) });
                }
                ref other => panic!("{other:?}"),
            }
            rest = &rest[header.plen as usize..];
        }
        answers
    }

    /// One command, and its one answer.
    fn command(&mut self, q: usize, sqe: Sqe, data: &[u8]) -> Answer {
        self.capsule(q, sqe, data);
        let mut answers = self.answers(q);
        assert_eq!(answers.len(), 1, "{answers:?}");
        let answer = answers.remove(0);
        assert_eq!(answer.cqe.cid(), sqe.cid());
        answer
    }

    fn ok(&mut self, q: usize, sqe: Sqe, data: &[u8]) -> Answer {
        let answer = self.command(q, sqe, data);
        assert!(answer.cqe.status().is_success(), "{sqe:?}: {:?}", answer.cqe);
        answer
    }

    fn connect(&mut self, qid: u16, cntlid: u16, subnqn: &str) -> (usize, Answer) {
        let q = self.open();
        let (sqe, data) = connect_capsule(qid, cntlid, subnqn, HOST);
        (q, self.command(q, sqe, &data))
    }

    /// The admin queue of an enabled controller: its connection, and its CNTLID.
    fn enabled(&mut self, subnqn: &str) -> (usize, u16) {
        let (q, answer) = self.connect(0, 0xffff, subnqn);
        assert!(answer.cqe.status().is_success(), "{:?}", answer.cqe);
        self.ok(q, property_set(0x0046_0061), &[]);
        (q, u16::try_from(answer.cqe.result()).unwrap())
    }

    fn closing(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.world.target.poll_close()).map(|conn| conn.0 - 100).collect()
    }
}

pub(super) fn connect_capsule(
    qid: u16,
    cntlid: u16,
    subnqn: &str,
    hostnqn: &str,
) -> (Sqe, Vec<u8>) {
    let mut sqe = [0; 64];
    sqe[0] = 0x7f;
    sqe[1] = 0x40;
    sqe[4] = 0x01;
    sqe[32..36].copy_from_slice(&1024u32.to_le_bytes());
    sqe[39] = 0x01;
    sqe[42..44].copy_from_slice(&qid.to_le_bytes());
    sqe[44..46].copy_from_slice(&(if qid == 0 { 31u16 } else { 127 }).to_le_bytes());
    if qid == 0 {
        sqe[48..52].copy_from_slice(&5000u32.to_le_bytes());
    }
    let mut data = vec![0; 1024];
    data[..16].copy_from_slice(&ID.to_be_bytes());
    data[16..18].copy_from_slice(&cntlid.to_le_bytes());
    data[256..256 + subnqn.len()].copy_from_slice(subnqn.as_bytes());
    data[512..512 + hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
    (Sqe(sqe), data)
}

pub(super) fn property_get(offset: u32, wide: bool) -> Sqe {
    let mut sqe = [0; 64];
    sqe[0] = 0x7f;
    sqe[1] = 0x40;
    sqe[4] = 0x04;
    sqe[40] = u8::from(wide);
    sqe[44..48].copy_from_slice(&offset.to_le_bytes());
    Sqe(sqe)
}

fn property_set(cc: u32) -> Sqe {
    let mut sqe = [0; 64];
    sqe[0] = 0x7f;
    sqe[1] = 0x40;
    sqe[44..48].copy_from_slice(&0x14u32.to_le_bytes());
    sqe[48..52].copy_from_slice(&cc.to_le_bytes());
    Sqe(sqe)
}

fn reading(sqe: Sqe, len: u32) -> Sqe {
    sqe.with_sgl(Sgl { address: 0, len, kind: SGL_TRANSPORT })
}

fn identify(cns: u32, nsid: u32) -> Sqe {
    reading(Sqe::new(0x06).with_nsid(nsid).with_cdw(10, cns), 4096)
}

fn log_page(lid: u8, len: u32) -> Sqe {
    reading(Sqe::new(0x02).with_cdw(10, u32::from(lid) | (len / 4 - 1) << 16), len)
}

/// The commands in the order and with the fields in which a Linux 6.12 host sends them.
#[test]
fn a_linux_host_finds_its_way() {
    let mut host = Host::new();
    let (admin, answer) = host.connect(0, 0xffff, NQN);
    let cntlid = answer.cqe.result();
    assert_eq!((answer.cqe.status(), cntlid), (Status::SUCCESS, 1));
    let cap = host.ok(admin, property_get(0, true), &[]).cqe.result();
    assert_eq!(cap, 0x820_0f00_00ff);
    host.ok(admin, property_set(0x0046_0060), &[]);
    host.ok(admin, property_get(0, true), &[]);
    host.ok(admin, property_set(0x0046_0061), &[]);
    assert_eq!(host.ok(admin, property_get(0x1c, false), &[]).cqe.result(), 1);
    assert_eq!(host.ok(admin, property_get(0x08, false), &[]).cqe.result(), 0x0002_0000);

    let page = host.ok(admin, identify(0x01, 0), &[]).data;
    let controller = IdentifyController::decode(&page).unwrap();
    assert_eq!(u64::from(controller.cntlid), cntlid);
    assert_eq!((controller.serial.as_str(), controller.model.as_str()), ("CAIRN0001", "Cairn"));
    assert_eq!((controller.subnqn.as_str(), controller.firmware.as_str()), (NQN, "0.1.0"));
    assert_eq!((controller.sqes, controller.cqes, controller.kas), (0x66, 0x44, 10));
    assert_eq!((controller.ioccsz, controller.iorcsz, controller.icdoff), (1028, 1, 0));
    assert_eq!((controller.mdts, controller.maxcmd, controller.cntrltype), (8, 256, 1));
    assert!(controller.sgls & 1 == 1 && controller.lpa & 2 == 2 && controller.vwc & 1 == 1);

    let effects = host.ok(admin, log_page(0x05, 4096), &[]).data;
    assert_eq!(effects[1024 + 4], 3, "Write changes data");
    host.ok(admin, log_page(0x02, 512), &[]);
    let queues = Sqe::new(0x09).with_cdw(10, 7).with_cdw(11, 0x0003_0003);
    assert_eq!(host.ok(admin, queues, &[]).cqe.result(), 0x0003_0003);
    let cntlid = u16::try_from(cntlid).unwrap();
    let (io, answer) = host.connect(1, cntlid, NQN);
    assert_eq!(answer.cqe.status(), Status::SUCCESS);
    // SQHD counts, for SQ flow control is on.
    assert_eq!(answer.cqe.sqhd(), 1);
    host.ok(admin, Sqe::new(0x09).with_cdw(10, 0x0b).with_cdw(11, 0x100), &[]);
    host.capsule(admin, Sqe::new(0x0c).with_cid(0x1f), &[]);
    assert_eq!(host.answers(admin), []);

    // ONCS bit 7 and VSL: Verify, 1 MiB at most.
    assert_ne!(page[520] & 1 << 7, 0);
    assert_eq!(host.ok(admin, identify(0x06, 0), &[]).data[0], 8);
    let list = host.ok(admin, identify(0x02, 0), &[]).data;
    assert_eq!(active_namespaces(&list).collect::<Vec<_>>(), [1]);
    assert_eq!(descriptor_id(&host.ok(admin, identify(0x03, 1), &[]).data), Some(ID));
    let page = host.ok(admin, identify(0x00, 1), &[]).data;
    let ns = IdentifyNamespace::decode(&page).unwrap();
    assert_eq!((ns.blocks, ns.block_size, ns.nguid), (1024, Some(BlockSize::B4096), ID));
    host.ok(admin, identify(0x08, 1), &[]);
    host.ok(admin, identify(0x05, 1), &[]);
    host.ok(admin, identify(0x07, 0), &[]);
    assert_eq!(host.ok(admin, identify(0x1c, 0), &[]).data[0], 1);
    for lid in [0x00, 0x01, 0x03, 0x04] {
        host.ok(admin, log_page(lid, 512), &[]);
    }
    let host_id = reading(Sqe::new(0x0a).with_cdw(10, 0x81).with_cdw(11, 1), 16);
    assert_eq!(host.ok(admin, host_id, &[]).data, ID.to_be_bytes());
    assert_eq!(host.ok(admin, Sqe::new(0x0a).with_cdw(10, 0x0f), &[]).cqe.result(), 5000);
    assert_eq!(host.ok(admin, Sqe::new(0x08).with_cid(3), &[]).cqe.result(), 1);
    host.ok(admin, Sqe::new(0x18), &[]);

    // I/O: a write in the capsule, then a read.
    let sgl = Sgl { address: 0, len: 4096, kind: SGL_IN_CAPSULE };
    let write = Sqe::new(0x01).with_nsid(1).with_slba(3).with_sgl(sgl).with_cid(9);
    assert_eq!(host.ok(io, write, &[0x33; 4096]).cqe.sqhd(), 2);
    let read = reading(Sqe::new(0x02).with_nsid(1).with_slba(3), 4096).with_cid(10);
    assert_eq!(host.ok(io, read, &[]).data, [0x33; 4096]);

    // A namespace appears: the event that waits says so.
    let second = NamespaceConfig { nsid: 2, id: ID + 1, ..namespace() };
    host.world.target.add_namespace(host.world.subsystem, second).unwrap();
    host.world.target.resize_namespace(host.world.subsystem, 1, 2048).unwrap();
    host.world.run();
    let events = host.answers(admin);
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].cqe.cid(), events[0].cqe.result()), (0x1f, 0x0004_0002));
    // Nothing more is told until the list is read.
    host.capsule(admin, Sqe::new(0x0c).with_cid(0x1e), &[]);
    assert_eq!(host.answers(admin), []);
    let changed = host.ok(admin, log_page(CHANGED_NAMESPACES, 4096), &[]).data;
    assert_eq!(changed[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    host.world.target.remove_namespace(host.world.subsystem, 2).unwrap();
    host.world.run();
    assert_eq!(host.answers(admin)[0].cqe.cid(), 0x1e);

    // `nvme disconnect`.
    host.ok(admin, property_set(0x0046_4061), &[]);
    assert_eq!(host.ok(admin, property_get(0x1c, false), &[]).cqe.result(), 2 << 2 | 1);
    assert_eq!(host.closing(), [u32::try_from(io).unwrap()]);
    host.world.target.handle_disconnect(ConnId(100));
    assert_eq!(host.world.target.controllers(host.world.subsystem), []);
    host.world.close();
}

#[test]
fn a_reset_ends_the_io_queues_and_the_held_requests() {
    let mut host = Host::new();
    let (admin, cntlid) = host.enabled(NQN);
    let (io, _) = host.connect(2, cntlid, NQN);
    host.capsule(admin, Sqe::new(0x0c).with_cid(5), &[]);
    host.capsule(admin, property_set(0x0046_0060).with_cid(6), &[]);
    let answers = host.answers(admin);
    let statuses: Vec<_> = answers.iter().map(|a| (a.cqe.cid(), a.cqe.status())).collect();
    assert_eq!(statuses, [(6, Status::SUCCESS), (5, Status::ABORTED_SQ_DELETION)]);
    assert_eq!(host.closing(), [u32::try_from(io).unwrap()]);
    assert_eq!(host.ok(admin, property_get(0x1c, false), &[]).cqe.result(), 0);
    let answer = host.command(admin, identify(1, 0), &[]);
    assert_eq!(answer.cqe.status(), Status::COMMAND_SEQUENCE_ERROR);
    // The old queue is no queue any more.
    let flush = host.command(io, Sqe::new(0).with_nsid(1), &[]);
    assert_eq!(flush.cqe.status(), Status::ABORTED_SQ_DELETION);
    host.world.close();
}

#[test]
fn a_new_connect_takes_over_a_queue() {
    let mut host = Host::new();
    let (_, cntlid) = host.enabled(NQN);
    let (old, _) = host.connect(1, cntlid, NQN);
    let (new, answer) = host.connect(1, cntlid, NQN);
    assert!(answer.cqe.status().is_success());
    assert_eq!(host.closing(), [u32::try_from(old).unwrap()]);
    let flush = Sqe::new(0).with_nsid(1);
    assert_eq!(host.command(old, flush, &[]).cqe.status(), Status::ABORTED_SQ_DELETION);
    host.ok(new, flush, &[]);
    // The end of the old connection does not take the new one with it.
    host.world.target.handle_disconnect(ConnId(u32::try_from(old).unwrap() + 100));
    host.ok(new, flush, &[]);
    host.world.close();
}

#[test]
fn connect_says_what_is_wrong() {
    let mut host = Host::new();
    let closed = SubsystemConfig {
        nqn: format!("{NQN}-closed"),
        allowed_hosts: Some(vec![]),
        ..subsystem()
    };
    host.world.target.add_subsystem(closed).unwrap();
    let (good, data) = connect_capsule(0, 0xffff, NQN, HOST);
    let dnr = Status::CONNECT_INVALID_PARAMETERS.with_dnr();
    let retry = Status::CONNECT_INVALID_PARAMETERS;
    let with =
        |qid, cntlid, subnqn: &str, hostnqn: &str| connect_capsule(qid, cntlid, subnqn, hostnqn);
    let closed_nqn = format!("{NQN}-closed");
    let table = [
        (
            good.with_bytes(40, &[1]),
            data.clone(),
            Status::CONNECT_INCOMPATIBLE_FORMAT.with_dnr(),
            0,
        ),
        (good.with_bytes(44, &[0, 0]), data.clone(), dnr, 44),
        (good.with_bytes(44, &[0, 1]), data.clone(), dnr, 44),
        (with(0, 1, NQN, HOST).0, with(0, 1, NQN, HOST).1, dnr, 0x1_0010),
        (good, with(0, 0xffff, NQN, "host").1, dnr, 0x1_0200),
        (good, with(0, 0xffff, "nqn.x", HOST).1, retry, 0x1_0100),
        (good, with(0, 0xffff, &closed_nqn, HOST).1, Status::CONNECT_INVALID_HOST.with_dnr(), 0),
        (with(1, 9, NQN, HOST).0, with(1, 9, NQN, HOST).1, retry, 0x1_0010),
        (with(65, 9, NQN, HOST).0, with(65, 9, NQN, HOST).1, dnr, 42),
        (with(1, 1, DISCOVERY_NQN, HOST).0, with(1, 1, DISCOVERY_NQN, HOST).1, dnr, 42),
    ];
    for (i, (sqe, data, status, result)) in table.into_iter().enumerate() {
        let q = host.open();
        let cqe = host.command(q, sqe, &data).cqe;
        assert_eq!((cqe.status(), cqe.result()), (status, result), "row {i}: {cqe:?}");
    }
    let q = host.open();
    let status = Status::COMMAND_SEQUENCE_ERROR.with_dnr();
    assert_eq!(host.command(q, property_get(0, true), &[]).cqe.status(), status);
    // Another host's Connect does not reach a controller; nor one before it is enabled.
    let (_, answer) = host.connect(0, 0xffff, NQN);
    let cntlid = u16::try_from(answer.cqe.result()).unwrap();
    let (_, answer) = host.connect(1, cntlid, NQN);
    assert_eq!(answer.cqe.status(), Status::COMMAND_SEQUENCE_ERROR);
    let q = host.open();
    let (sqe, data) = connect_capsule(1, cntlid, NQN, "nqn.2014-08.org.nvmexpress:thief");
    assert_eq!(host.command(q, sqe, &data).cqe.result(), 0x1_0200);
    host.world.close();
}

#[test]
fn controller_ids_stay_in_their_range() {
    let mut target = Target::new(TargetConfig::default());
    let narrow = SubsystemConfig { cntlid_min: 7, cntlid_max: 9, ..subsystem() };
    let id = target.add_subsystem(narrow).unwrap();
    let mut host = Host::new();
    host.world.target = target;
    host.world.subsystem = id;
    let ids: Vec<u64> = (0..4)
        .map(|_| {
            let (_, answer) = host.connect(0, 0xffff, NQN);
            if answer.cqe.status().is_success() { answer.cqe.result() } else { 0 }
        })
        .collect();
    assert_eq!(ids, [7, 8, 9, 0]);
    host.world.target.handle_disconnect(ConnId(101));
    let (_, answer) = host.connect(0, 0xffff, NQN);
    assert_eq!(answer.cqe.result(), 8);
    host.world.close();
}

#[test]
fn commands_that_make_no_sense_end_alone() {
    let mut host = Host::new();
    let (admin, cntlid) = host.enabled(NQN);
    let (io, _) = host.connect(1, cntlid, NQN);
    let dnr = Status::with_dnr;
    let read = |len| reading(Sqe::new(0x02).with_nsid(1), len);
    let in_capsule =
        |len| Sqe::new(0x01).with_nsid(1).with_sgl(Sgl { address: 0, len, kind: SGL_IN_CAPSULE });
    let mut no_sgl = read(4096);
    no_sgl.0[1] = 0;
    let mut fused = read(4096);
    fused.0[1] |= 1;
    let offset = Sgl { address: 8, len: 4096, kind: SGL_IN_CAPSULE };
    let table: [(usize, Sqe, usize, Status); 17] = [
        (io, Sqe::new(0x05).with_nsid(1), 0, dnr(Status::INVALID_OPCODE)),
        (io, read(8192), 0, dnr(Status::SGL_DATA_LENGTH_INVALID)),
        (io, read(0), 0, dnr(Status::SGL_DATA_LENGTH_INVALID)),
        (io, read(4096).with_nsid(2), 0, dnr(Status::INVALID_NAMESPACE)),
        (io, read(4096).with_slba(u64::MAX), 0, dnr(Status::LBA_OUT_OF_RANGE)),
        (io, read(2 << 20), 0, dnr(Status::INVALID_FIELD)),
        (io, no_sgl, 0, dnr(Status::INVALID_FIELD)),
        (io, fused, 0, dnr(Status::INVALID_FIELD)),
        (io, read(4096), 64, dnr(Status::SGL_DESCRIPTOR_TYPE_INVALID)),
        (io, in_capsule(4096), 512, dnr(Status::SGL_DATA_LENGTH_INVALID)),
        (io, in_capsule(4096), 0, dnr(Status::SGL_DATA_LENGTH_INVALID)),
        (io, in_capsule(4096).with_sgl(offset), 4096, dnr(Status::SGL_OFFSET_INVALID)),
        (io, in_capsule(2 << 20), 4096, dnr(Status::INVALID_FIELD)),
        (admin, identify(0x55, 1), 0, dnr(Status::INVALID_FIELD)),
        (admin, identify(0, 0), 0, dnr(Status::INVALID_NAMESPACE)),
        (admin, log_page(0xc0, 512), 0, dnr(Status::INVALID_LOG_PAGE)),
        (admin, Sqe::new(0x84), 0, dnr(Status::INVALID_OPCODE)),
    ];
    for (i, (q, sqe, data, status)) in table.into_iter().enumerate() {
        let answer = host.command(q, sqe, &vec![0; data]);
        assert_eq!(answer.cqe.status(), status, "row {i}: {:?}", answer.cqe);
    }
    // And both queues still work.
    assert_eq!(host.ok(io, read(4096), &[]).data.len(), 4096);
    host.ok(admin, identify(1, 0), &[]);
    for cid in 0..4 {
        host.capsule(admin, Sqe::new(0x0c).with_cid(cid), &[]);
    }
    let fifth = host.command(admin, Sqe::new(0x0c).with_cid(4), &[]);
    assert_eq!(fifth.cqe.status(), dnr(Status::AER_LIMIT_EXCEEDED));
    let queue = host.world.conns[admin].queue.as_ref().unwrap();
    assert_eq!(queue.outstanding(), 0, "held requests do not keep a connection open");
    host.world.close();
}

#[test]
fn a_path_that_cannot_be_used_says_so_and_when_it_can() {
    let mut host = Host::with(SubsystemConfig { ana: Some(AnaState::Inaccessible), ..subsystem() });
    let (admin, cntlid) = host.enabled(NQN);
    let page = host.ok(admin, identify(0x01, 0), &[]).data;
    let controller = IdentifyController::decode(&page).unwrap();
    assert_eq!((controller.cmic, controller.oaes), (0b1010, 1 << 8 | 1 << 11));
    assert_eq!((controller.anatt, controller.anagrpmax, controller.nanagrpid), (10, 1, 1));
    let page = host.ok(admin, identify(0x00, 1), &[]).data;
    assert_eq!(IdentifyNamespace::decode(&page).unwrap().ana_group, 1);
    // What Linux reads: 16 + 32 * NANAGRPID + 4 * MNAN.
    let log = |host: &mut Host| {
        AnaLog::decode(&host.ok(admin, log_page(0x0c, 16 + 32 + 4096), &[]).data).unwrap()
    };
    let first = AnaLog { changes: 1, state: AnaState::Inaccessible, nsids: vec![1] };
    assert_eq!(log(&mut host), first);
    host.ok(admin, Sqe::new(0x09).with_cdw(10, 0x0b).with_cdw(11, 0x900), &[]);
    host.capsule(admin, Sqe::new(0x0c).with_cid(5), &[]);

    let (io, _) = host.connect(1, cntlid, NQN);
    let read = reading(Sqe::new(0x02).with_nsid(1).with_slba(3), 4096);
    let status = |host: &mut Host| host.command(io, read, &[]).cqe.status();
    assert_eq!(status(&mut host), Status::ANA_INACCESSIBLE);
    let subsystem = host.world.subsystem;
    for (state, expected, changes) in
        [(AnaState::Change, Status::ANA_TRANSITION, 2), (AnaState::Optimized, Status::SUCCESS, 3)]
    {
        host.world.target.set_ana(subsystem, state).unwrap();
        host.world.target.set_ana(subsystem, state).unwrap();
        host.world.run();
        assert_eq!(host.answers(admin).remove(0).cqe.result(), 0x0c_0302);
        assert_eq!(log(&mut host), AnaLog { changes, state, nsids: vec![1] });
        assert_eq!(status(&mut host), expected);
        host.capsule(admin, Sqe::new(0x0c).with_cid(5), &[]);
    }
    host.world.close();
}

#[test]
fn discovery_tells_of_paths_elsewhere() {
    let mut host = Host::new();
    let port = |traddr: &str| Port { traddr: traddr.to_owned(), trsvcid: 4420 };
    let subsystem = host.world.subsystem;
    host.world.target.set_ports(vec![port("192.0.2.1")]);
    host.world.target.set_elsewhere(subsystem, vec![port("192.0.2.2")]).unwrap();
    let (admin, _) = host.enabled(DISCOVERY_NQN);
    let page = host.ok(admin, log_page(DISCOVERY, 4096), &[]).data;
    let entries = page.chunks(1024).skip(1).map(|bytes| DiscoveryEntry::decode(bytes).unwrap());
    let found: Vec<_> = entries.map(|e| (e.subnqn, e.traddr, e.portid)).collect();
    let expected = [
        (DISCOVERY_NQN.to_owned(), "192.0.2.1".to_owned(), 1),
        (NQN.to_owned(), "192.0.2.1".to_owned(), 1),
        (NQN.to_owned(), "192.0.2.2".to_owned(), 2),
    ];
    assert_eq!(found, expected);
    host.world.close();
}

#[test]
fn a_discovery_controller_tells_of_changes() {
    let mut host = Host::new();
    let (admin, _) = host.enabled(DISCOVERY_NQN);
    let controller = IdentifyController::decode(&host.ok(admin, identify(1, 0), &[]).data).unwrap();
    assert_eq!((controller.cntrltype, controller.oaes), (2, 1 << 31));
    host.ok(admin, Sqe::new(0x09).with_cdw(10, 0x0b).with_cdw(11, 1 << 31), &[]);
    host.capsule(admin, Sqe::new(0x0c).with_cid(2), &[]);
    let another = SubsystemConfig { nqn: format!("{NQN}-2"), ..subsystem() };
    host.world.target.add_subsystem(another).unwrap();
    host.world.run();
    let event = host.answers(admin).remove(0).cqe;
    assert_eq!((event.cid(), event.result()), (2, 0x0070_f002));
    // An event that finds no request waits for one.
    host.ok(admin, log_page(DISCOVERY, 1024), &[]);
    host.world.target.set_ports(Vec::new());
    let late = host.ok(admin, Sqe::new(0x0c).with_cid(3), &[]);
    assert_eq!(late.cqe.result(), 0x0070_f002);
    assert!(!host.command(admin, identify(2, 0), &[]).cqe.status().is_success());
    host.world.close();
}

#[test]
fn a_removed_subsystem_names_its_connections() {
    let mut host = Host::new();
    let (_, cntlid) = host.enabled(NQN);
    let (io, _) = host.connect(1, cntlid, NQN);
    let id = host.world.subsystem;
    assert_eq!(host.world.target.remove_subsystem(id), [ConnId(100), ConnId(101)]);
    assert_eq!(host.world.target.remove_subsystem(id), []);
    let flush = host.command(io, Sqe::new(0).with_nsid(1), &[]);
    assert_eq!(flush.cqe.status(), Status::ABORTED_SQ_DELETION);
    assert_eq!(host.world.target.subsystem_by_nqn(NQN), None);
    host.world.close();
}

/// Identify finds no memory: it is answered once there is some, and not with an error, for Linux
/// would drop the namespace.
#[test]
fn an_admin_command_waits_for_memory() {
    let mut host = Host::new();
    let (admin, _) = host.enabled(NQN);
    let mut hoard = Vec::new();
    for len in [1 << 20, 4096] {
        hoard.extend(std::iter::from_fn(|| host.world.mem.alloc(len)));
    }
    host.world.starved = true;
    host.capsule(admin, identify(1, 0), &[]);
    assert_eq!(host.answers(admin), []);
    assert!(host.world.conns[admin].queue.as_ref().unwrap().is_waiting_for_memory());
    for buf in hoard {
        host.world.mem.release(buf);
    }
    host.world.starved = false;
    host.world.run();
    assert_eq!(host.answers(admin).len(), 1);
    host.world.close();
}

#[test]
fn a_queue_can_be_disconnected() {
    let mut host = Host::new();
    let (_, cntlid) = host.enabled(NQN);
    let (io, _) = host.connect(1, cntlid, NQN);
    host.ok(io, Sqe::fabrics(8), &[]);
    let queue = host.world.conns[io].queue.as_ref().unwrap();
    assert_eq!(queue.close_reason(), Some(CloseReason::Disconnected));
    host.world.close();
}

#[test]
fn the_configuration_is_checked() {
    let mut target = Target::new(TargetConfig::default());
    let bad = SubsystemConfig { nqn: "volume-1".into(), ..subsystem() };
    assert!(matches!(target.add_subsystem(bad), Err(TargetError::InvalidNqn { .. })));
    let bad = SubsystemConfig { cntlid_min: 9, cntlid_max: 8, ..subsystem() };
    assert!(matches!(target.add_subsystem(bad), Err(TargetError::InvalidCntlidRange { .. })));
    let id = target.add_subsystem(subsystem()).unwrap();
    assert!(matches!(target.add_subsystem(subsystem()), Err(TargetError::DuplicateNqn { .. })));
    target.add_namespace(id, namespace()).unwrap();
    let again = target.add_namespace(id, namespace());
    assert_eq!(again, Err(TargetError::DuplicateNsid { nsid: 1 }));
    let bad = NamespaceConfig { nsid: 0, ..namespace() };
    assert_eq!(target.add_namespace(id, bad), Err(TargetError::InvalidNsid { nsid: 0 }));
    let unknown = target.remove_namespace(id, 5);
    assert_eq!(unknown, Err(TargetError::UnknownNamespace { nsid: 5 }));
    let unknown = target.add_namespace(SubsystemId(9), namespace());
    assert_eq!(unknown, Err(TargetError::UnknownSubsystem));
}

proptest! {
    /// Whatever a host says, the target neither panics nor loses a buffer.
    #[test]
    fn no_command_panics(
        commands in prop::collection::vec((any::<[u8; 32]>(), any::<[u8; 32]>(), 0usize..600, 0usize..8), 1..20),
    ) {
        let mut host = Host::new();
        let (admin, cntlid) = host.enabled(NQN);
        let (io, _) = host.connect(1, cntlid, NQN);
        for (a, b, len, mode) in commands {
            let mut sqe = [0; 64];
            sqe[..32].copy_from_slice(&a);
            sqe[32..].copy_from_slice(&b);
            // Near to something valid, so that it goes deeper.
            sqe[1] = 0x40;
            sqe[0] %= 0x20;
            sqe[4..8].copy_from_slice(&[1, 0, 0, 0]);
            sqe[34..36].fill(0);
            sqe[39] = if mode & 2 == 0 { 0x5a } else { 0x01 };
            if mode & 4 == 0 {
                sqe[42..48].fill(0);
            }
            host.capsule(if mode & 1 == 0 { admin } else { io }, Sqe(sqe), &vec![0; len]);
        }
        host.world.close();
    }
}
