//! Entry points for the bytes that an NVMe/TCP peer sends. None may panic, whatever it is given.

use cairn_block::reservation::Reservations;
use cairn_block::{Buf, BufSlice, HeapMemory, Memory};
use cairn_nvmf::identify::{
    IDENTIFY_LEN, IdentifyController, IdentifyNamespace, active_namespaces, descriptor_id,
};
use cairn_nvmf::initiator::{QueueIndex, Session, SessionConfig, SessionEvent};
use cairn_nvmf::log::{DiscoveryEntry, DiscoveryHeader, Subtype, TRTYPE_TCP};
use cairn_nvmf::pdu::{Body, Digests, Header, Transfer};
use cairn_nvmf::reservation::{Request, encode_report, refused};
use cairn_nvmf::sqe::{Cqe, SGL_IN_CAPSULE, SGL_TRANSPORT, Sgl, Sqe, opcode};
use cairn_nvmf::status::Status;
use cairn_nvmf::target::{
    ConnId, IoCommand, NamespaceConfig, NamespaceHandle, Outcome, Queue, QueueConfig,
    SubsystemConfig, Target, TargetConfig,
};
use cairn_nvmf::tx::TxQueue;

const NQN: &str = "nqn.2025-01.io.cairn:fuzz";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10";
/// The most bytes of an input that one delivery takes.
const CHUNK_LEN: u32 = 4096;

/// Sends what is queued to nowhere.
fn drain(tx: &mut TxQueue, batch: &mut Vec<BufSlice>, mem: &mut HeapMemory) {
    while tx.wants_send() {
        tx.take_batch(batch);
        tx.handle_sent(mem);
    }
}

/// Copies the next bytes of `rest` to `chunk`.
fn deliver(chunk: &Buf, rest: &[u8], mem: &mut HeapMemory) -> BufSlice {
    let n = u32::try_from(rest.len()).unwrap_or(CHUNK_LEN).min(CHUNK_LEN);
    let window = chunk.slice().sub(0, n);
    mem.bytes_mut(window).copy_from_slice(&rest[..n as usize]);
    window
}

fn target() -> Target {
    let mut target = Target::new(TargetConfig::default());
    let subsystem = SubsystemConfig {
        nqn: NQN.to_owned(),
        serial: "FUZZ".to_owned(),
        cntlid_min: 1,
        cntlid_max: 9,
        allowed_hosts: None,
        vendor_commands: true,
        discoverable: true,
        ana: None,
    };
    if let Ok(id) = target.add_subsystem(subsystem) {
        let namespace = NamespaceConfig {
            nsid: 1,
            handle: NamespaceHandle(0),
            blocks: 1 << 20,
            block_size: cairn_block::BlockSize::B4096,
            id: 1,
            volatile_write_cache: true,
            reservations: true,
        };
        // Both are fixed and valid.
        let _ = target.add_namespace(id, namespace);
    }
    target
}

/// A host's byte stream on one connection, up to the commands and their answers.
///
/// # Panics
/// Where the target does, or where it loses a buffer: that is what fuzzing looks for.
pub fn target_stream(data: &[u8]) {
    let mut mem = HeapMemory::new(4 << 20);
    let mut target = target();
    let mut reservations = Reservations::default();
    let conn = ConnId(0);
    let (Some(chunk), Some(mut queue)) =
        (mem.alloc(CHUNK_LEN), Queue::new(&QueueConfig::default(), &mut mem))
    else {
        return;
    };
    let mut batch = Vec::with_capacity(16);
    let mut rest = data;
    let mut stalls = 0;
    while !rest.is_empty() && stalls < 4 {
        let window = deliver(&chunk, rest, &mut mem);
        let taken = queue.handle_recv(window, &mut mem);
        rest = &rest[taken as usize..];
        stalls = if taken == 0 { stalls + 1 } else { 0 };
        while let Some(cmd) = queue.poll_command() {
            let slot = cmd.slot;
            match target.handle_command(conn, &mut queue, cmd, 0, &mut mem) {
                Outcome::Done => continue,
                Outcome::Io(io) => match io.command {
                    IoCommand::Read { len, .. } => {
                        if let Some(data) = mem.alloc(len) {
                            queue.complete_with_data(slot, data, &mut mem);
                            continue;
                        }
                    }
                    IoCommand::Write { data, .. } | IoCommand::Discard { ranges: data, .. } => {
                        mem.release(data);
                    }
                    IoCommand::Flush | IoCommand::Verify { .. } | IoCommand::WriteZeroes { .. } => {
                    }
                },
                Outcome::Reserve { request: Request::Report(data), .. } => {
                    encode_report(&reservations, mem.bytes_mut(data.slice()));
                    queue.complete_with_data(slot, data, &mut mem);
                    continue;
                }
                Outcome::Reserve { request: Request::Persistence, .. } => {}
                Outcome::Reserve { namespace, request: Request::Change(change), .. } => {
                    match reservations.apply(&change) {
                        Ok(effects) => target.tell_reservations(namespace, &effects),
                        Err(refusal) => {
                            queue.complete(slot, refused(refusal), 0, &mut mem);
                            continue;
                        }
                    }
                }
                // No other target was told of.
                Outcome::Elsewhere(_) => return,
                Outcome::Vendor { data, .. } => {
                    if let Some(data) = data {
                        mem.release(data);
                    }
                }
            }
            queue.complete(slot, Status::SUCCESS, 0, &mut mem);
        }
        while let Some(deferred) = target.poll_deferred() {
            queue.complete(deferred.slot, deferred.status, deferred.result, &mut mem);
        }
        drain(queue.tx(), &mut batch, &mut mem);
        queue.retry(&mut mem);
    }
    target.handle_disconnect(conn);
    queue.close(&mut mem);
    mem.release(chunk);
    assert_eq!(mem.in_use(), 0, "the target lost a buffer");
}

/// A controller's byte stream on the admin queue. The first byte chooses the digests.
///
/// # Panics
/// Where the initiator does, or where it loses a buffer.
pub fn initiator_stream(data: &[u8]) {
    let Some((&first, mut rest)) = data.split_first() else { return };
    let mut mem = HeapMemory::new(4 << 20);
    let config = SessionConfig {
        hostnqn: HOST.to_owned(),
        hostid: 1,
        subnqn: NQN.to_owned(),
        kato_ms: 5000,
        io_queues: 1,
        queue_entries: 32,
        header_digest: first & 1 != 0,
        data_digest: first & 2 != 0,
    };
    let Some(chunk) = mem.alloc(CHUNK_LEN) else { return };
    let Some(mut session) = Session::new(config, &mut mem) else { return };
    let mut batch = Vec::with_capacity(16);
    let q = QueueIndex(0);
    session.handle_connected(q, 0, &mut mem);
    let mut now_ms = 0;
    while !rest.is_empty() {
        drain(session.tx(q), &mut batch, &mut mem);
        // Small pieces, so that answers come after what they answer was sent.
        let piece = &rest[..rest.len().min(128)];
        let window = deliver(&chunk, piece, &mut mem);
        rest = &rest[piece.len()..];
        now_ms += 10;
        if session.handle_recv(q, window, now_ms, &mut mem).is_err() {
            break;
        }
        session.handle_timeout(now_ms, &mut mem);
        while let Some(event) = session.poll_event() {
            if let SessionEvent::OpenQueue(other) = event {
                session.handle_connected(other, now_ms, &mut mem);
            }
        }
        while session.poll_completion().is_some() {}
    }
    session.fail();
    while session.poll_abandoned().is_some() {}
    session.close(&mut mem);
    mem.release(chunk);
    assert_eq!(mem.in_use(), 0, "the initiator lost a buffer");
}

/// One PDU header; what decodes encodes to the bytes that it was read from, but for reserved fields.
///
/// # Panics
/// Where a header changes on its way through the encoder.
pub fn pdu_header(data: &[u8]) {
    let Ok(header) = Header::decode(data) else { return };
    // The padding of a peer may be longer than any that Cairn writes.
    if u32::from(header.pdo) <= 128 && header.common().pad_len() <= 64 {
        let again = Header::decode(header.encode().as_bytes());
        assert_eq!(again, Ok(header));
    }
}

/// The data of Identify.
pub fn identify(data: &[u8]) {
    let _ = IdentifyController::decode(data);
    let _ = IdentifyNamespace::decode(data);
    let _ = active_namespaces(data).count();
    let _ = descriptor_id(data);
}

/// The discovery log page.
pub fn discovery(data: &[u8]) {
    let _ = DiscoveryHeader::decode(data);
    let _ = DiscoveryEntry::decode(data);
}

/// Valid inputs of the entry point of this name, to start from; none for a name that is unknown.
#[must_use]
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "target_stream" => [0, 1, 2, 3].map(host_stream).to_vec(),
        "initiator_stream" => [0, 1, 2, 3].map(controller_stream).to_vec(),
        "pdu_header" => {
            let t = Transfer { cccid: 1, ttag: 2, offset: 0, len: 4096 };
            [
                (Body::IcReq { pfv: 0, hpda: 0, dgst: 3, maxr2t: 0 }, 0),
                (Body::IcResp { pfv: 0, cpda: 0, dgst: 3, maxh2cdata: 4096 }, 0),
                (Body::CapsuleCmd(Sqe::new(opcode::WRITE)), 4096),
                (Body::CapsuleResp(Cqe::new(1, Status::SUCCESS, 0, 0)), 0),
                (Body::H2cData(t), 4096),
                (Body::C2hData(t), 4096),
                (Body::R2t(t), 0),
                (Body::TermReq { from_host: true, fes: 1, fei: 0 }, 24),
            ]
            .map(|(body, len)| {
                let digests = Digests { header: true, data: true };
                Header::new(body, digests, len, 0).encode().as_bytes().to_vec()
            })
            .to_vec()
        }
        "identify" => vec![identify_controller_page(), identify_namespace_page()],
        "discovery" => {
            let entry = DiscoveryEntry {
                trtype: TRTYPE_TCP,
                subtype: Subtype::Nvm,
                portid: 1,
                trsvcid: "4420".to_owned(),
                traddr: "192.0.2.1".to_owned(),
                subnqn: NQN.to_owned(),
            };
            let header = DiscoveryHeader { genctr: 1, numrec: 1 };
            vec![entry.encode().to_vec(), header.encode().to_vec()]
        }
        _ => Vec::new(),
    }
}

fn digests_of(bits: u8) -> Digests {
    Digests { header: bits & 1 != 0, data: bits & 2 != 0 }
}

fn push(out: &mut Vec<u8>, body: Body, data: &[u8], flags: u8, digests: Digests) {
    let len = u32::try_from(data.len()).unwrap_or(0);
    let header = Header::new(body, digests, len, 0).with_flags(flags);
    out.extend_from_slice(header.encode().as_bytes());
    out.extend_from_slice(data);
    if header.common().has_data_digest() {
        // Wrong on purpose where digests are on: the seed then covers that path.
        out.extend_from_slice(&[0; 4]);
    }
}

/// ICReq, Connect, enable, Identify, a log page and Keep Alive.
fn host_stream(bits: u8) -> Vec<u8> {
    let digests = digests_of(bits);
    let mut out = Vec::new();
    let icreq = Body::IcReq { pfv: 0, hpda: 0, dgst: digests.to_wire(), maxr2t: 0 };
    push(&mut out, icreq, &[], 0, digests);
    let mut data = vec![0; 1024];
    data[0] = 1;
    data[16..18].fill(0xff);
    data[256..256 + NQN.len()].copy_from_slice(NQN.as_bytes());
    data[512..512 + HOST.len()].copy_from_slice(HOST.as_bytes());
    let connect = Sqe::fabrics(opcode::CONNECT).with_bytes(44, &[31, 0]).with_sgl(Sgl {
        address: 0,
        len: 1024,
        kind: SGL_IN_CAPSULE,
    });
    push(&mut out, Body::CapsuleCmd(connect), &data, 0, digests);
    let enable = Sqe::fabrics(opcode::PROPERTY_SET).with_cdw(11, 0x14).with_cdw(12, 0x0046_0001);
    push(&mut out, Body::CapsuleCmd(enable), &[], 0, digests);
    let page = Sgl { address: 0, len: 4096, kind: SGL_TRANSPORT };
    for cns in [0, 1, 2, 3, 5, 6, 7, 8, 0x1c] {
        let sqe = Sqe::new(opcode::IDENTIFY).with_nsid(1).with_cdw(10, cns).with_sgl(page);
        push(&mut out, Body::CapsuleCmd(sqe), &[], 0, digests);
    }
    let (set, get) = (opcode::SET_FEATURES, opcode::GET_FEATURES);
    for (code, fid, value) in [(set, 0x82, 2), (set, 0x83, 1), (get, 0x82, 0), (get, 0x83, 0)] {
        let sqe = Sqe::new(code).with_nsid(1).with_cdw(10, fid).with_cdw(11, value);
        push(&mut out, Body::CapsuleCmd(sqe), &[], 0, digests);
    }
    for lid in (0..6).chain([0x80]) {
        let sqe = Sqe::new(opcode::GET_LOG_PAGE).with_cdw(10, lid | 127 << 16).with_sgl(page);
        push(&mut out, Body::CapsuleCmd(sqe), &[], 0, digests);
    }
    for code in [opcode::ASYNC_EVENT_REQUEST, opcode::KEEP_ALIVE, opcode::ABORT, 0xc0] {
        push(&mut out, Body::CapsuleCmd(Sqe::new(code).with_nsid(1)), &[], 0, digests);
    }
    out
}

/// ICResp and the answers to the commands of an initiator, as far as they can be foreseen.
fn controller_stream(bits: u8) -> Vec<u8> {
    let digests = digests_of(bits);
    let mut out = vec![bits];
    let icresp = Body::IcResp { pfv: 0, cpda: 0, dgst: digests.to_wire(), maxh2cdata: 1 << 20 };
    push(&mut out, icresp, &[], 0, digests);
    let response = |result| Body::CapsuleResp(Cqe::new(0, Status::SUCCESS, result, u16::MAX));
    // Connect, CAP, CC, CSTS.
    for result in [1, 0x820_0f00_007f, 0, 1] {
        push(&mut out, response(result), &[], 0, digests);
    }
    let mut list = vec![0; IDENTIFY_LEN];
    list[0] = 1;
    for page in [identify_controller_page(), list, identify_namespace_page()] {
        let transfer = Transfer { cccid: 0, ttag: 0, offset: 0, len: 4096 };
        push(&mut out, Body::C2hData(transfer), &page, 0x0c, digests);
    }
    push(&mut out, response(0), &[], 0, digests);
    out
}

fn identify_controller_page() -> Vec<u8> {
    let controller = IdentifyController {
        serial: "FUZZ".to_owned(),
        model: "Cairn".to_owned(),
        firmware: "0.1.0".to_owned(),
        cntlid: 1,
        cntrltype: 1,
        ioccsz: 1028,
        mdts: 8,
        subnqn: NQN.to_owned(),
        ..IdentifyController::default()
    };
    let mut page = vec![0; IDENTIFY_LEN];
    controller.encode(&mut page);
    page
}

fn identify_namespace_page() -> Vec<u8> {
    let namespace = IdentifyNamespace {
        blocks: 1024,
        block_size: Some(cairn_block::BlockSize::B4096),
        metadata_len: 0,
        ana_group: 1,
        rescap: 0xff,
        nguid: 1,
    };
    let mut page = vec![0; IDENTIFY_LEN];
    namespace.encode(&mut page);
    page
}
