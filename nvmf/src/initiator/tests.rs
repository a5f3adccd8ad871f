use cairn_block::{BufSlice, IoOp, IoStatus, Memory};
use proptest::prelude::*;

use super::*;
use crate::log::{self, DiscoveryEntry, DiscoveryHeader, Subtype};
use crate::loopback::{BLOCKS, HOST, ID, NQN, World, namespace, session_config};
use crate::pdu::{Body, Header, Transfer};

fn pattern(len: u32, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512).to_le_bytes()[0] ^ i.to_le_bytes()[0] ^ seed).collect()
}

fn with_digests(header: bool, data: bool) -> SessionConfig {
    SessionConfig { header_digest: header, data_digest: data, ..session_config() }
}

/// Writes, reads back, zeroes and discards; everything that a session says on the way.
fn script(world: &mut World) -> Vec<Completed> {
    let mut seen = Vec::new();
    let buf = world.mem.alloc(1 << 20).unwrap();
    for (seed, len) in [(1, 4096), (2, 16 << 10), (3, 128 << 10), (4, 1 << 20)] {
        let window = buf.slice().sub(0, len);
        let blocks = u64::from(len / 4096);
        let data = pattern(len, seed);
        world.mem.bytes_mut(window).copy_from_slice(&data);
        seen.push(world.io(IoOp::Write { fua: false }, 8, blocks, window));
        assert_eq!(world.disk[8 * 4096..][..len as usize], data);
        world.mem.bytes_mut(window).fill(0);
        seen.push(world.io(IoOp::Read, 8, blocks, window));
        assert!(world.mem.bytes(window) == data, "{len} bytes read back");
    }
    seen.push(world.io(IoOp::Flush, 0, 0, BufSlice::EMPTY));
    seen.push(world.io(IoOp::WriteZeroes { fua: true, unmap: true }, 8, 4, BufSlice::EMPTY));
    seen.push(world.io(IoOp::Discard, 20, 3, BufSlice::EMPTY));
    assert!(world.disk[8 * 4096..12 * 4096].iter().all(|&b| b == 0));
    assert!(world.disk[20 * 4096..23 * 4096].iter().all(|&b| b == 0));
    assert!(world.disk[12 * 4096..20 * 4096].iter().any(|&b| b != 0));
    assert_eq!(world.flushes, 1);
    world.mem.release(buf);
    assert!(seen.iter().all(|c| c.io_status == IoStatus::Ok && c.status.is_success()), "{seen:?}");
    seen
}

#[test]
fn every_size_and_operation_with_every_digest() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut world = World::connected(with_digests(header, data));
        script(&mut world);
        world.close();
    }
}

#[test]
fn verify_transfers_nothing_and_tells_what_is_damaged() {
    let mut world = World::connected(session_config());
    world.disk[40 * 4096] = 0xbd;
    let good = world.io(IoOp::Verify, 8, 32, BufSlice::EMPTY);
    assert_eq!((good.io_status, good.data_len), (IoStatus::Ok, 0));
    let bad = world.io(IoOp::Verify, 8, 33, BufSlice::EMPTY);
    assert_eq!(bad.io_status, IoStatus::MediaError);
    // VSL: 1 MiB.
    let most = world.io(IoOp::Verify, 41, 256, BufSlice::EMPTY);
    assert_eq!(most.io_status, IoStatus::Ok);
    let long = world.io(IoOp::Verify, 41, 257, BufSlice::EMPTY);
    assert_eq!(long.io_status, IoStatus::InvalidField);
    world.close();
}

#[test]
fn writes_are_cut_to_maxh2cdata() {
    for digests in [false, true] {
        let mut world = World::new(with_digests(digests, digests));
        world.queue_config.max_h2c_data = 4096;
        world.run();
        script(&mut world);
        world.close();
    }
}

#[test]
fn readiness_tells_what_was_found() {
    let mut world = World::connected(session_config());
    let info = world.ready.clone().unwrap();
    assert_eq!((info.nsid, info.blocks, info.block_size), (1, BLOCKS, BlockSize::B4096));
    assert_eq!((info.max_transfer, info.volatile_write_cache), (1 << 20, true));
    assert_eq!((info.id, info.io_queues), (ID, 2));
    assert_eq!((info.serial.as_str(), info.model.as_str()), ("CAIRN0001", "Cairn"));
    let controllers = world.target.controllers(world.subsystem);
    assert_eq!(controllers.len(), 1);
    assert_eq!((controllers[0].hostnqn.as_str(), controllers[0].io_queues), (HOST, 2));
    assert_eq!(world.session().free_slots(QueueIndex(1)), 31);
    world.close();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever way the streams are cut, both ends do and say the same.
    #[test]
    fn any_split_gives_the_same_result(
        header in any::<bool>(),
        data in any::<bool>(),
        cuts in prop::collection::vec(prop_oneof![1usize..40, 1usize..5000, 30_000usize..65_536], 1..40),
    ) {
        let mut whole = World::connected(with_digests(header, data));
        let expected = script(&mut whole);
        let mut split = World::new(with_digests(header, data));
        let mut at = 0;
        split.cut = Box::new(move || {
            at += 1;
            cuts[at % cuts.len()]
        });
        split.run();
        prop_assert_eq!(&split.ready, &whole.ready);
        prop_assert_eq!(script(&mut split), expected);
        prop_assert!(split.disk == whole.disk);
        whole.close();
        split.close();
    }

    /// A controller that says anything at all ends the session at worst.
    #[test]
    fn no_bytes_of_a_controller_panic(noise in prop::collection::vec(any::<u8>(), 1..400), after in 0usize..4) {
        let mut world = World::new(with_digests(after % 2 == 1, false));
        for _ in 0..after * 3 {
            world.step();
        }
        for conn in &mut world.conns {
            conn.to_host.extend_from_slice(&noise);
        }
        world.deliver_to_host();
        world.close();
    }
}

#[test]
fn a_full_queue_says_so_and_recovers() {
    let mut world = World::connected(session_config());
    world.cut_off = true;
    let buf = world.mem.alloc(4096).unwrap();
    let request = Submit::Io(IoRequest {
        op: IoOp::Read,
        range: cairn_block::LbaRange::new(cairn_block::Lba(0), 1).unwrap(),
        buf: buf.slice(),
    });
    let q = QueueIndex(2);
    for tag in 0..31 {
        let World { session, mem, .. } = &mut world;
        assert_eq!(session.as_mut().unwrap().submit(q, tag, request, mem), Ok(()));
    }
    let World { session, mem, .. } = &mut world;
    assert_eq!(session.as_mut().unwrap().submit(q, 31, request, mem), Err(SubmitError::Full));
    world.cut_off = false;
    world.run();
    let mut tags: Vec<u32> = world.completions.iter().map(|c| c.tag).collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..31).collect::<Vec<_>>());
    assert_eq!(world.session().free_slots(q), 31);
    world.mem.release(buf);
    world.close();
}

#[test]
fn a_replica_does_no_write_as_a_whole() {
    let mut world = World::connected(session_config());
    let buf = world.mem.alloc(8192).unwrap();
    let range = cairn_block::LbaRange::new(cairn_block::Lba(0), 2).unwrap();
    let op = IoOp::Write { fua: true };
    let write = Submit::Atomic(IoRequest { op, range, buf: buf.slice() });
    let done = world.request(QueueIndex(1), write);
    assert_eq!(done.status, Status::INVALID_OPCODE.with_dnr(), "what makes it whole is a nexus");
    world.mem.release(buf);
    world.close();
}

#[test]
fn what_never_completed_is_abandoned() {
    let mut world = World::connected(session_config());
    world.cut_off = true;
    let World { session, mem, .. } = &mut world;
    let session = session.as_mut().unwrap();
    let flush = Submit::Io(IoRequest {
        op: IoOp::Flush,
        range: cairn_block::LbaRange::default(),
        buf: BufSlice::EMPTY,
    });
    session.submit(QueueIndex(1), 5, flush, mem).unwrap();
    session.submit(QueueIndex(2), 6, flush, mem).unwrap();
    assert_eq!(session.poll_abandoned(), None);
    session.fail();
    let mut tags: Vec<_> = std::iter::from_fn(|| session.poll_abandoned()).collect();
    tags.sort_unstable();
    assert_eq!(tags, [5, 6]);
    assert_eq!(session.submit(QueueIndex(1), 7, flush, mem), Err(SubmitError::NotReady));
    world.close();
}

#[test]
fn requests_that_fit_no_command_are_refused() {
    let mut world = World::connected(session_config());
    let World { session, mem, .. } = &mut world;
    let session = session.as_mut().unwrap();
    let range = cairn_block::LbaRange::new(cairn_block::Lba(0), 2).unwrap();
    let buf = BufSlice::new(0, 4096);
    let read = Submit::Io(IoRequest { op: IoOp::Read, range, buf });
    assert_eq!(session.submit(QueueIndex(1), 0, read, mem), Err(SubmitError::Invalid));
    assert_eq!(session.submit(QueueIndex(0), 0, read, mem), Err(SubmitError::Invalid));
    let log = Submit::GetLog { lid: 2, offset: 0, data: buf };
    assert_eq!(session.submit(QueueIndex(1), 0, log, mem), Err(SubmitError::Invalid));
    assert_eq!(session.submit(QueueIndex(3), 0, read, mem), Err(SubmitError::NotReady));
    world.close();
}

#[test]
fn vendor_commands_carry_data_both_ways() {
    let mut world = World::connected(session_config());
    let q = QueueIndex(0);
    let buf = world.mem.alloc(16 << 10).unwrap();
    world.mem.bytes_mut(buf.slice()).fill(0x5e);
    // In the capsule, and by R2T.
    for len in [512, 16 << 10] {
        let data = VendorData::Out(buf.slice().sub(0, len));
        let vendor = Submit::Vendor { opcode: 0xc1, cdw10: 0, cdw11: 0, data };
        assert_eq!(world.request(q, vendor).result, 0x5e);
    }
    let data = VendorData::In(buf.slice());
    let vendor = Submit::Vendor { opcode: 0xc2, cdw10: 0x77, cdw11: 0, data };
    assert_eq!(world.request(q, vendor).data_len, 16 << 10);
    assert!(world.mem.bytes(buf.slice()).iter().all(|&b| b == 0x77));
    let vendor = Submit::Vendor { opcode: 0xc0, cdw10: 3, cdw11: 4, data: VendorData::None };
    assert_eq!(world.request(q, vendor).result, 4 << 32 | 3);
    world.mem.release(buf);
    world.close();
}

#[test]
fn errors_come_back_as_they_were_meant() {
    let mut world = World::connected(session_config());
    let buf = world.mem.alloc(8192).unwrap();
    let completed = world.io(IoOp::Read, BLOCKS - 1, 2, buf.slice());
    assert_eq!(completed.io_status, IoStatus::OutOfRange);
    assert!(completed.status.dnr());
    let completed = world.io(IoOp::Write { fua: false }, BLOCKS, 2, buf.slice());
    assert_eq!(completed.io_status, IoStatus::OutOfRange);
    let completed = world.io(IoOp::Discard, BLOCKS - 1, 2, BufSlice::EMPTY);
    assert_eq!(completed.io_status, IoStatus::OutOfRange);
    world.target.remove_namespace(world.subsystem, 1).unwrap();
    let completed = world.io(IoOp::Read, 0, 2, buf.slice());
    assert_eq!(completed.io_status, IoStatus::NotReady);
    world.mem.release(buf);
    world.close();
}

/// Flips a byte of what goes to one end, `from_end` bytes before the end of the wire.
fn bend(wire: &mut [u8], from_end: usize) {
    let at = wire.len() - from_end;
    wire[at] ^= 0x40;
}

#[test]
fn damaged_write_data_fails_the_write_and_nothing_else() {
    // In the capsule; by R2T in one PDU; by R2T in the first of several.
    for (len, max_h2c_data, from_end) in
        [(4096, 1 << 20, 100), (64 << 10, 1 << 20, 9), (64 << 10, 8192, 50_000)]
    {
        let mut world = World::new(with_digests(true, true));
        world.queue_config.max_h2c_data = max_h2c_data;
        world.run();
        let buf = world.mem.alloc(len).unwrap();
        world.mem.bytes_mut(buf.slice()).fill(0x11);
        let range = cairn_block::LbaRange::new(cairn_block::Lba(0), u64::from(len / 4096)).unwrap();
        let op = IoOp::Write { fua: false };
        let write = Submit::Io(IoRequest { op, range, buf: buf.slice() });
        let World { session, mem, .. } = &mut world;
        session.as_mut().unwrap().submit(QueueIndex(1), 1, write, mem).unwrap();
        world.collect();
        if len > 16 << 10 {
            world.deliver_to_target();
            world.collect();
            world.deliver_to_host();
            world.collect();
        }
        bend(&mut world.conns[1].to_target, from_end);
        world.run();
        let completed = world.completions.remove(0);
        assert!(completed.status.is(Status::TRANSIENT_TRANSPORT_ERROR), "{}", completed.status);
        assert_eq!(completed.io_status, IoStatus::TransferError);
        assert!(world.disk.iter().all(|&b| b == 0), "damaged data was handed out");
        let completed = world.io(op, 0, u64::from(len / 4096), buf.slice());
        assert_eq!(completed.io_status, IoStatus::Ok);
        world.mem.release(buf);
        world.close();
    }
}

#[test]
fn damaged_read_data_is_a_transfer_error() {
    let mut world = World::connected(with_digests(false, true));
    let buf = world.mem.alloc(8192).unwrap();
    let range = cairn_block::LbaRange::new(cairn_block::Lba(0), 2).unwrap();
    let read = Submit::Io(IoRequest { op: IoOp::Read, range, buf: buf.slice() });
    let World { session, mem, .. } = &mut world;
    session.as_mut().unwrap().submit(QueueIndex(1), 1, read, mem).unwrap();
    world.collect();
    world.deliver_to_target();
    world.collect();
    bend(&mut world.conns[1].to_host, 1000);
    world.run();
    assert_eq!(world.completions.remove(0).io_status, IoStatus::TransferError);
    assert_eq!(world.io(IoOp::Read, 0, 2, buf.slice()).io_status, IoStatus::Ok);
    world.mem.release(buf);
    world.close();
}

#[test]
fn keep_alives_keep_the_controller() {
    let mut world = World::connected(session_config());
    for _ in 0..10 {
        let at = world.session().poll_timeout().unwrap();
        assert!(at <= world.now_ms + 2500);
        world.now_ms = at;
        let World { session, mem, target, now_ms, .. } = &mut world;
        session.as_mut().unwrap().handle_timeout(*now_ms, mem);
        target.handle_timeout(*now_ms);
        world.run();
    }
    assert_eq!(world.error, None);
    assert_eq!(world.target.poll_close(), None);
    world.close();
}

#[test]
fn an_unanswered_keep_alive_fails_the_session_and_the_controller() {
    let mut world = World::connected(session_config());
    world.cut_off = true;
    let start = world.now_ms;
    while world.error.is_none() {
        let at = world.session().poll_timeout().unwrap();
        assert!(at <= start + 7500 + 1, "the session waits for ever");
        world.now_ms = at;
        let World { session, mem, .. } = &mut world;
        session.as_mut().unwrap().handle_timeout(at, mem);
        world.step();
    }
    assert_eq!(world.error, Some(SessionError::Overdue { command: "Keep Alive" }));
    let at = world.target.poll_timeout().unwrap();
    assert_eq!(at, start + 5000);
    world.target.handle_timeout(at - 1);
    assert_eq!(world.target.poll_close(), None);
    world.target.handle_timeout(at);
    let closing: Vec<_> = std::iter::from_fn(|| world.target.poll_close()).collect();
    assert_eq!(closing.len(), 3, "the admin queue and two I/O queues");
    assert_eq!(world.target.poll_timeout(), None);
    world.close();
}

#[test]
fn a_silent_controller_is_overdue() {
    let mut world = World::new(session_config());
    world.cut_off = true;
    world.run();
    let at = world.session().poll_timeout().unwrap();
    let World { session, mem, .. } = &mut world;
    session.as_mut().unwrap().handle_timeout(at, mem);
    world.run();
    let command = "Connect of the admin queue";
    assert_eq!(world.error, Some(SessionError::Overdue { command }));
    world.close();
}

#[test]
fn a_refused_host_learns_why() {
    let mut world = World::new(SessionConfig { subnqn: format!("{NQN}-x"), ..session_config() });
    world.run();
    let Some(SessionError::Refused { status, result, .. }) = world.error else {
        panic!("{:?}", world.error);
    };
    // No DNR: the volume may come back here.
    assert_eq!((status, result), (Status::CONNECT_INVALID_PARAMETERS, 1 << 16 | 256));
    world.close();
}

#[test]
fn the_discovery_log_lists_what_a_host_may_see() {
    let mut world = World::discovery(session_config());
    let hidden = crate::target::SubsystemConfig {
        nqn: format!("{NQN}-other"),
        allowed_hosts: Some(vec!["nqn.2014-08.org.nvmexpress:other".into()]),
        ..crate::loopback::subsystem()
    };
    world.target.add_subsystem(hidden).unwrap();
    let replica = crate::target::SubsystemConfig {
        nqn: format!("{NQN}-replica"),
        discoverable: false,
        ..crate::loopback::subsystem()
    };
    world.target.add_subsystem(replica).unwrap();
    world.run();
    assert_eq!(world.ready.as_ref().map(|info| info.nsid), Some(0));
    let buf = world.mem.alloc(4096).unwrap();
    let get =
        |offset, len| Submit::GetLog { lid: log::DISCOVERY, offset, data: buf.slice().sub(0, len) };
    assert_eq!(world.request(QueueIndex(0), get(0, 1024)).data_len, 1024);
    let header = DiscoveryHeader::decode(world.mem.bytes(buf.slice())).unwrap();
    assert_eq!(header.numrec, 2);
    // As hosts do: the entries by offset, then the header again.
    world.request(QueueIndex(0), get(1024, 2048));
    let bytes = world.mem.bytes(buf.slice());
    let entries: Vec<_> =
        bytes[..2048].chunks_exact(1024).map(|e| DiscoveryEntry::decode(e).unwrap()).collect();
    assert_eq!(entries[0].subtype, Subtype::Current);
    assert_eq!((entries[1].subtype, entries[1].subnqn.as_str()), (Subtype::Nvm, NQN));
    assert_eq!((entries[1].traddr.as_str(), entries[1].trsvcid.as_str()), ("192.0.2.1", "4420"));
    world.target.set_ports(Vec::new());
    world.request(QueueIndex(0), get(0, 1024));
    let moved = DiscoveryHeader::decode(world.mem.bytes(buf.slice())).unwrap();
    assert!(moved.genctr > header.genctr && moved.numrec == 0);
    world.mem.release(buf);
    world.close();
}

#[test]
fn a_changed_capacity_is_seen_by_a_new_session() {
    let mut world = World::new(session_config());
    world.target.resize_namespace(world.subsystem, 1, 16).unwrap();
    // A session takes the first namespace.
    let second = crate::target::NamespaceConfig { nsid: 2, id: ID + 1, ..namespace() };
    world.target.add_namespace(world.subsystem, second).unwrap();
    world.run();
    assert_eq!(world.ready.as_ref().map(|info| (info.nsid, info.blocks)), Some((1, 16)));
    world.close();
}

/// What a controller must not say, and what the session makes of it.
#[test]
fn a_controller_that_breaks_the_protocol_is_left() {
    let transfer = Transfer { cccid: 0, ttag: 0, offset: 0, len: 4096 };
    let digests = Digests::default();
    let table: [(Header, u16); 5] = [
        (Header::new(Body::R2t(transfer), digests, 0, 0), 1),
        (Header::new(Body::R2t(Transfer { cccid: 900, ..transfer }), digests, 0, 0), 0),
        (Header::new(Body::C2hData(Transfer { offset: 4, ..transfer }), digests, 4096, 0), 4),
        (Header::new(Body::C2hData(transfer), digests, 8192, 0), 1),
        (Header::new(Body::H2cData(transfer), digests, 4096, 0), 1),
    ];
    for (header, fes) in table {
        let mut world = World::connected(session_config());
        let buf = world.mem.alloc(4096).unwrap();
        let range = cairn_block::LbaRange::new(cairn_block::Lba(0), 1).unwrap();
        let read = Submit::Io(IoRequest { op: IoOp::Read, range, buf: buf.slice() });
        let World { session, mem, .. } = &mut world;
        session.as_mut().unwrap().submit(QueueIndex(1), 1, read, mem).unwrap();
        world.collect();
        world.conns[1].to_host = header.encode().as_bytes().to_vec();
        world.deliver_to_host();
        match world.error.take() {
            Some(SessionError::Violation(v)) => assert_eq!(v.fes as u16, fes, "{header:?}: {v}"),
            Some(SessionError::UnknownCommand { cid: 900 }) => assert_eq!(fes, 0),
            other => panic!("{header:?}: {other:?}"),
        }
        world.mem.release(buf);
        world.close();
    }
}
