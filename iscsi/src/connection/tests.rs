use proptest::prelude::*;

use super::time::{LINGER_MS, MAX_UNSENT};
use super::*;
use crate::login::OPERATIONAL;
use crate::loopback::{BLOCK, NOBODY, World, read10, write10};
use crate::pdu::{Body, CmdSn, Header, Residual, encode_lun};
use crate::scsi::IoCommand;
use crate::target::Outcome;

const DIGESTS: [(&str, &str); 4] = [
    ("HeaderDigest", "CRC32C"),
    ("DataDigest", "CRC32C"),
    ("InitialR2T", "No"),
    ("MaxRecvDataSegmentLength", "4096"),
];

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| i.to_le_bytes()[0].wrapping_mul(31).wrapping_add(seed)).collect()
}

/// What a session comes to: login, a write that needs R2Ts, a read in several PDUs.
fn session(cuts: Vec<usize>, keys: &[(&str, &str)]) -> Vec<u8> {
    let mut world = World::new();
    let mut i = 0;
    world.cut = Box::new(move || {
        i += 1;
        cuts[i % cuts.len()]
    });
    let h = world.join_with(1, keys);
    let data = pattern(200 * BLOCK, 3);
    let reply = world.scsi(h, 0, &write10(7, 200), &data, 0);
    assert_eq!((reply.status, reply.residual), (0, Residual::None), "{reply:?}");
    let reply = world.scsi(h, 0, &read10(7, 200), &[], 200 * 512);
    assert_eq!((reply.status, reply.residual), (0, Residual::None));
    assert_eq!(reply.data, data);
    world.close();
    reply.data
}

#[test]
fn data_goes_out_and_comes_back() {
    session(vec![64 << 10], &[("InitialR2T", "No"), ("MaxBurstLength", "16384")]);
    session(vec![64 << 10], &DIGESTS);
    session(vec![64 << 10], &[("ImmediateData", "Yes"), ("InitialR2T", "Yes")]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// However the stream is cut, the same comes of it.
    #[test]
    fn any_split_gives_the_same(cuts in prop::collection::vec(1usize..3000, 1..40)) {
        session(cuts, &DIGESTS);
    }
}

#[test]
fn bursts_are_as_long_as_agreed() {
    let mut world = World::new();
    let h = world.join_with(1, &[("MaxBurstLength", "4096"), ("MaxRecvDataSegmentLength", "1024")]);
    let data = pattern(32 * BLOCK, 1);
    let reply = world.scsi_edtl(h, 0, &write10(0, 32), &data, 16384, 0);
    assert_eq!((reply.status, reply.r2ts), (0, 4));
    let reply = world.scsi(h, 0, &read10(0, 32), &[], 16384);
    assert_eq!((reply.data_ins, reply.data), (16, data));
    world.close();
}

/// Unsolicited Data-Out follows the command; the rest is asked for.
#[test]
fn unsolicited_data_is_taken() {
    let (mut world, h) = World::ready();
    let data = pattern(64 * BLOCK, 5);
    let (itt, sn) = world.next_sn(h);
    let mut cdb = [0; 16];
    cdb[..10].copy_from_slice(&write10(0, 64));
    let edtl = 32768;
    let command =
        Body::ScsiCommand { last: false, read: false, write: true, attr: 1, edtl, sn, cdb };
    world.send(h, Header::new(itt, 0, command), &data[..4096]);
    world.send_data(h, itt, crate::pdu::NO_TAG, 4096, &data[4096..16384]);
    world.run();
    let reply = world.finish(h, itt, &data);
    assert_eq!((reply.status, reply.r2ts), (0, 1));
    assert_eq!(world.disks[0][..data.len()], data);
    world.close();
}

#[test]
fn too_much_unsolicited_data_ends_the_command() {
    let mut world = World::new();
    let h = world.join_with(1, &[("ImmediateData", "No")]);
    let reply = world.scsi(h, 0, &write10(0, 2), &[1; 1024], 0);
    assert_eq!(reply.key(), (0x0b, 0x0c, 0x0c));
    assert_eq!(world.disks[0][0], 0);
    world.close();
}

#[test]
fn residuals_tell_both_ways() {
    let (mut world, h) = World::ready();
    let read = |world: &mut World, edtl| world.scsi(h, 0, &read10(0, 1), &[], edtl);
    let reply = read(&mut world, 10_000);
    assert_eq!((reply.data.len(), reply.residual), (512, Residual::Underflow(9488)));
    let reply = read(&mut world, 200);
    assert_eq!((reply.data.len(), reply.residual), (200, Residual::Overflow(312)));
    let reply = read(&mut world, 0);
    assert_eq!((reply.status, reply.residual), (0, Residual::Overflow(512)));
    // Writes: what is sent is written; whole blocks only.
    let write = |world: &mut World, blocks, len: usize| {
        world.scsi_edtl(h, 0, &write10(0, blocks), &pattern(len, 9), u32::try_from(len).unwrap(), 0)
    };
    let reply = write(&mut world, 2, 512);
    assert_eq!((reply.status, reply.residual), (0, Residual::Overflow(512)));
    assert_eq!((world.disks[0][0], world.disks[0][512]), (9, 0));
    let reply = write(&mut world, 1, 200);
    assert_eq!((reply.key(), reply.residual), ((5, 0x0e, 3), Residual::Overflow(312)));
    let reply = write(&mut world, 1, 10_000);
    assert_eq!((reply.status, reply.residual), (0, Residual::Underflow(9488)));
    // A command that fails has transferred nothing.
    let reply = world.scsi(h, 0, &read10(0x00ff_ffff, 1), &[], 512);
    assert_eq!((reply.key(), reply.residual), ((5, 0x21, 0), Residual::Underflow(512)));
    world.close();
}

#[test]
fn data_out_of_sequence_ends_the_command() {
    let (mut world, h) = World::ready();
    for (data_sn, offset) in [(5, 0), (0, 512)] {
        let itt = world.start(h, 0, &write10(0, 8), &[1; 4096], 4096, 0);
        world.run();
        let ttt = world.r2t(h);
        let body = Body::DataOut { last: true, ttt, exp_stat_sn: 0, data_sn, offset };
        world.send(h, Header::new(itt, 0, body), &[1; 1024]);
        world.run();
        assert_eq!(world.finish(h, itt, &[]).key(), (0x0b, 0x4b, 0));
    }
    // A Data-Out that nobody asked for is passed over.
    let body = Body::DataOut { last: true, ttt: 77, exp_stat_sn: 0, data_sn: 0, offset: 0 };
    world.send(h, Header::new(1, 0, body), &[1; 1024]);
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).status, 0);
    world.close();
}

#[test]
fn a_damaged_header_ends_the_connection_and_damaged_data_the_command() {
    let mut world = World::new();
    let h = world.join_with(1, &DIGESTS);
    let itt = world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    let end = world.hosts[h].to_target.len() - 10;
    world.hosts[h].to_target[end] ^= 1;
    world.run();
    let reject = world.receive(h).unwrap().0;
    assert!(matches!(reject.body, Body::Reject { reason: 2, .. }), "{reject:?}");
    assert_eq!(world.finish(h, itt, &[]).key(), (0x0b, 0x47, 5));
    world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    world.hosts[h].to_target[20] ^= 1;
    world.run();
    let conn = world.hosts[h].conn.as_ref().unwrap();
    assert_eq!(conn.close_reason(), Some(CloseReason::HeaderDigest));
    world.close();
}

#[test]
fn the_command_window_holds() {
    let (mut world, h) = World::ready();
    let window = world.hosts[h].max_cmd_sn.wrapping_sub(world.hosts[h].cmd_sn);
    assert!(window >= 127, "{window}");
    let test_unit_ready = |world: &mut World, cmd: u32| {
        let sn = CmdSn { cmd, exp_stat: 0 };
        let cdb = [0; 16];
        let body =
            Body::ScsiCommand { last: true, read: false, write: false, attr: 1, edtl: 0, sn, cdb };
        world.send(h, Header::new(5000, 0, body), &[]);
        world.run();
    };
    let next = world.hosts[h].cmd_sn;
    test_unit_ready(&mut world, next.wrapping_sub(1));
    let past = world.hosts[h].max_cmd_sn.wrapping_add(1);
    test_unit_ready(&mut world, past);
    assert!(world.receive(h).is_none(), "both are ignored");
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).status, 0);
    // A gap cannot be filled on the only connection.
    test_unit_ready(&mut world, next.wrapping_add(5));
    let reject = world.receive(h).unwrap().0;
    assert!(matches!(reject.body, Body::Reject { reason: 4, .. }));
    assert!(world.hosts[h].conn.as_ref().unwrap().wants_close());
    world.close();
}

#[test]
fn many_commands_at_once_come_back_and_more_than_the_window_wait() {
    let (mut world, h) = World::ready();
    world.hold = true;
    for _ in 0..128 {
        world.start(h, 0, &read10(0, 16), &[], 8192, 0);
    }
    world.run();
    assert_eq!(world.held.len(), 128);
    world.start(h, 0, &read10(0, 16), &[], 8192, 0);
    world.run();
    assert_eq!(world.held.len(), 128, "it is past the window");
    // Its number comes again.
    world.hosts[h].cmd_sn = world.hosts[h].cmd_sn.wrapping_sub(1);
    world.release_held();
    world.run();
    for itt in 0..128 {
        let (header, data) = world.receive(h).unwrap();
        assert!(matches!(header.body, Body::DataIn { last: true, status: Some(0), .. }), "{itt}");
        assert_eq!(data.len(), 8192);
    }
    world.hold = false;
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).status, 0);
    world.close();
}

#[test]
fn pings_go_both_ways() {
    let (mut world, h) = World::ready();
    let (itt, sn) = world.next_sn(h);
    world.send(h, Header::new(itt, 0, Body::NopOut { ttt: NO_TAG, sn }), b"are you there?");
    world.run();
    let (header, data) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::NopIn { ttt: NO_TAG, .. }) && header.itt == itt);
    assert_eq!(data, b"are you there?");
    let interval = world.config.nop_interval_ms;
    world.at(0);
    world.at(interval);
    world.at(2 * interval);
    world.run();
    let (header, _) = world.receive(h).expect("it was silent for an interval");
    let Body::NopIn { ttt, .. } = header.body else { panic!("{header:?}") };
    assert_eq!(header.itt, NO_TAG);
    let sn = CmdSn { cmd: world.hosts[h].cmd_sn, exp_stat: 0 };
    let mut answer = Header::new(NO_TAG, 0, Body::NopOut { ttt, sn });
    answer.immediate = true;
    world.send(h, answer, &[]);
    world.run();
    world.at(3 * interval);
    assert!(!world.conn(h).wants_close());
    world.at(4 * interval);
    world.run();
    world.at(5 * interval);
    let conn = world.hosts[h].conn.as_ref().unwrap();
    assert_eq!(conn.close_reason(), Some(CloseReason::Silent));
    world.close();
}

#[test]
fn a_login_that_takes_too_long_ends() {
    let mut world = World::new();
    let h = world.connect(1);
    let World { hosts, mem, config, .. } = &mut world;
    let conn = hosts[h].conn.as_mut().unwrap();
    conn.handle_timeout(1, mem);
    assert_eq!(conn.poll_timeout(), 1 + config.login_timeout_ms);
    conn.handle_timeout(1 + config.login_timeout_ms, mem);
    assert_eq!(conn.close_reason(), Some(CloseReason::LoginTimeout));
    world.close();
}

#[test]
fn what_a_target_does_not_know_is_rejected() {
    let (mut world, h) = World::ready();
    let reject = |world: &mut World| match world.receive(h) {
        Some((Header { body: Body::Reject { reason, .. }, .. }, data)) => {
            assert_eq!(data.len(), 48, "the header that was wrong");
            reason
        }
        other => panic!("{other:?}"),
    };
    world.send(h, Header::new(1, 0, Body::Snack), &[]);
    world.run();
    assert_eq!(reject(&mut world), 3);
    let mut unknown = Header::new(1, 0, Body::Snack).encode();
    unknown[0] = 0x1c;
    world.hosts[h].to_target.extend_from_slice(&unknown);
    world.run();
    assert_eq!(reject(&mut world), 5);
    // One tag for two tasks.
    world.hold = true;
    let itt = world.start(h, 0, &read10(0, 1), &[], 512, 0);
    world.hosts[h].next_itt = itt - 1;
    world.start(h, 0, &read10(0, 1), &[], 512, 0);
    world.run();
    assert_eq!(reject(&mut world), 7);
    world.hold = false;
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, 0);
    assert_eq!(world.task_management(h, 1, 0, NOBODY), 1);
    world.close();
}

/// Without memory a stream stops where nothing that holds memory waits for it; elsewhere its
/// commands are told to come again. Either way all gets done in the end.
#[test]
fn writes_wait_for_memory() {
    let (mut world, h) = World::ready();
    let mut hogs = world.hog();
    let itt = world.start(h, 0, &write10(0, 8), &[1; 4096], 4096, 4096);
    world.run();
    let conn = world.hosts[h].conn.as_ref().unwrap();
    assert!(conn.is_waiting_for_memory() && !world.hosts[h].to_target.is_empty());
    world.mem.release(hogs.pop().unwrap());
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, 0);
    // One waits for its R2T's data and holds the only buffer; the next brings data along.
    let first = world.start(h, 0, &write10(0, 8), &[2; 4096], 4096, 0);
    world.run();
    let second = world.start(h, 0, &write10(8, 8), &[3; 4096], 4096, 4096);
    let third = world.start(h, 0, &write10(16, 8), &[4; 4096], 4096, 0);
    world.run();
    let ttt = world.r2t(h);
    assert_eq!(world.finish(h, second, &[]).status, 0x28, "TASK SET FULL");
    assert!(world.hosts[h].conn.as_ref().unwrap().is_waiting_for_memory());
    world.send_data(h, first, ttt, 0, &[2; 4096]);
    world.run();
    assert_eq!(world.finish(h, first, &[]).status, 0);
    assert_eq!(world.finish(h, third, &[4; 4096]).status, 0);
    for hog in hogs {
        world.mem.release(hog);
    }
    world.close();
}

#[test]
fn a_command_with_a_longer_cdb_is_refused_and_malformed_segments_rejected() {
    let (mut world, h) = World::ready();
    for (segment, reason) in [
        ([0, 17, 1, 0].as_slice(), None),
        (&[0, 17, 9, 0], Some(9)),
        (&[0, 200, 1, 0], Some(9)),
        (&[0, 5, 2, 0, 0, 0, 2, 0], None),
    ] {
        let mut ahs = segment.to_vec();
        ahs.resize(if segment.len() == 8 { 8 } else { 20 }, 0);
        let (itt, sn) = world.next_sn(h);
        let cdb = [0x7f; 16];
        let body =
            Body::ScsiCommand { last: true, read: false, write: false, attr: 1, edtl: 0, sn, cdb };
        let header = Header { ahs_len: len32(ahs.len()), ..Header::new(itt, 0, body) };
        world.hosts[h].to_target.extend_from_slice(&header.with_lun(encode_lun(0)).encode());
        world.hosts[h].to_target.extend_from_slice(&ahs);
        world.run();
        match reason {
            None => assert_eq!(world.finish(h, itt, &[]).key(), (5, 0x20, 0)),
            Some(reason) => {
                let header = world.receive(h).unwrap().0;
                assert!(matches!(header.body, Body::Reject { reason: r, .. } if r == reason));
            }
        }
    }
    world.close();
}

/// The stream stops when there is no room for answers; when the initiator reads again, it goes on.
#[test]
fn an_initiator_that_does_not_read_stops_the_stream() {
    let (mut world, h) = World::ready();
    world.deaf = true;
    let mut asked = 0;
    for n in 0..120 {
        world.start(h, 0, &read10(0, 16), &[], 8192, 0);
        let (itt, sn) = world.next_sn(h);
        let mut ping = Header::new(itt, 0, Body::NopOut { ttt: NO_TAG, sn });
        ping.immediate = true;
        world.hosts[h].cmd_sn = world.hosts[h].cmd_sn.wrapping_sub(1);
        world.send(h, ping, &[7; 100]);
        world.send(h, Header::new(n, 0, Body::Snack), &[]);
        asked += 3;
    }
    world.run();
    assert!(!world.hosts[h].to_target.is_empty(), "more answers than there is room for");
    world.deaf = false;
    world.run();
    assert!(world.hosts[h].to_target.is_empty());
    let mut answers = 0;
    while let Some((header, _)) = world.receive(h) {
        let done = match header.body {
            Body::DataIn { status, .. } => status == Some(0),
            Body::NopIn { .. } | Body::Reject { reason: 3, .. } => true,
            other => panic!("{other:?}"),
        };
        answers += usize::from(done);
    }
    assert_eq!(answers, asked);
    world.close();
}

/// A stranger whose login has many keys that nobody knows gets a long answer to each request, and
/// reads none.
#[test]
fn a_login_that_is_not_read_stops_the_stream() {
    let mut world = World::new();
    let h = world.connect(1);
    world.deaf = true;
    let name = world.hosts[h].initiator.clone();
    let mut keys = format!("InitiatorName={name}\0SessionType=Discovery\0");
    let mut asked = 0;
    while world.hosts[h].to_target.is_empty() {
        for key in 0..45 {
            keys += &format!("X-{asked:02}-{key:02}-{}=1\0", "a".repeat(54));
        }
        let request = world.login_request(h, OPERATIONAL, None);
        world.send(h, Header::new(0, 0, Body::Login(request)), keys.as_bytes());
        // One at a time: the next may come once this one is answered.
        world.run();
        keys.clear();
        asked += 1;
    }
    assert!(asked > 2, "more answers than there is room for");
    world.deaf = false;
    world.run();
    for n in 0..asked {
        let (header, _) = world.receive(h).expect("an answer");
        assert!(matches!(header.body, Body::LoginResponse(r) if r.status == (0, 0)), "{n}");
    }
    world.close();
}

/// Pings whose data is sent back: whoever does not read it takes no more memory than for one.
#[test]
fn pings_that_are_not_read_take_little_memory() {
    let (mut world, h) = World::ready();
    world.deaf = true;
    let (before, len) = (world.mem.in_use(), 256 << 10);
    for _ in 0..10 {
        let (itt, sn) = world.next_sn(h);
        world.hosts[h].cmd_sn = world.hosts[h].cmd_sn.wrapping_sub(1);
        let mut ping = Header::new(itt, 0, Body::NopOut { ttt: NO_TAG, sn });
        ping.immediate = true;
        world.send(h, ping, &vec![7; len]);
    }
    world.run();
    assert!(world.mem.in_use() - before <= len32(len), "{} bytes", world.mem.in_use() - before);
    world.deaf = false;
    world.run();
    let mut answers = 0;
    while let Some((header, _)) = world.receive(h) {
        assert!(matches!(header.body, Body::NopIn { .. }));
        answers += 1;
    }
    assert_eq!(answers, 10);
    world.close();
}

/// The last PDU of a host that has read nothing while data for it waited for room.
fn last_after_data(body: impl Fn(CmdSn) -> Body) -> (Body, bool) {
    let mut world = World::new();
    let h = world.join_with(1, &[("MaxRecvDataSegmentLength", "512")]);
    world.deaf = true;
    world.start(h, 0, &read10(0, 2048), &[], 1 << 20, 0);
    let (itt, sn) = world.next_sn(h);
    world.send(h, Header::new(itt, 0, body(sn)), &[]);
    world.run();
    world.deaf = false;
    world.run();
    let (mut last, mut ended) = (Body::Snack, false);
    while let Some((header, _)) = world.receive(h) {
        ended |= matches!(header.body, Body::DataIn { status: Some(0), .. });
        last = header.body;
    }
    world.close();
    (last, ended)
}

/// What is said of other tasks comes after their ends, though their data had to wait.
#[test]
fn answers_do_not_overtake_data() {
    let abort = |sn| Body::TaskManagement { function: 2, rtt: NO_TAG, sn, ref_cmd_sn: 0 };
    let (last, ended) = last_after_data(abort);
    assert!(matches!(last, Body::TaskManagementResponse { response: 0, .. }), "{last:?}");
    assert!(ended);
    let (last, ended) = last_after_data(|sn| Body::Logout { reason: 0, cid: 9, sn });
    assert!(matches!(last, Body::LogoutResponse { response: 0, .. }), "{last:?}");
    assert!(ended, "the data is not lost");
}

#[test]
fn a_command_that_was_aborted_and_given_back_is_not_offered_again() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let itt = world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    world.run();
    let (_, Outcome::Io(io)) = world.held.remove(0) else { panic!("no request") };
    let IoCommand::Write { data, .. } = io.command else { panic!("no write") };
    world.manage(h, 1, 0, itt);
    assert!(world.conn(h).is_aborted(io.slot));
    world.conn(h).park(io.slot, Some(data));
    world.release_held();
    world.run();
    assert!(world.held.is_empty(), "it was offered again");
    let (header, _) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::TaskManagementResponse { response: 0, .. }));
    assert!(world.receive(h).is_none() && world.conn(h).outstanding() == 0);
    world.close();
}

#[test]
fn what_is_left_to_send_has_its_time() {
    let (mut world, h) = World::ready();
    world.at(0);
    world.deaf = true;
    world.start(h, 0, &read10(0, 1), &[], 512, 0);
    world.run();
    let World { hosts, mem, .. } = &mut world;
    hosts[h].conn.as_mut().unwrap().drop_session(mem);
    assert_eq!(world.conn(h).poll_timeout(), 0, "at once");
    world.at(1_000_000);
    assert_eq!(world.conn(h).poll_timeout(), 1_000_000 + LINGER_MS);
    assert!(!world.conn(h).is_over());
    world.at(1_000_000 + LINGER_MS);
    assert!(world.conn(h).is_over());
    assert_eq!(world.conn(h).poll_timeout(), u64::MAX, "there is nothing to do any more");
    world.close();
    let (mut world, h) = World::ready();
    let World { hosts, mem, .. } = &mut world;
    hosts[h].conn.as_mut().unwrap().drop_session(mem);
    assert!(!world.conn(h).is_over());
    world.run();
    assert!(world.conn(h).is_over(), "it is sent");
    world.close();
}

/// It is the target that takes nothing: the answer to its question may be among what it has not read.
#[test]
fn nobody_is_silent_whom_the_target_does_not_hear() {
    let (mut world, h) = World::ready();
    let hogs = world.hog();
    let itt = world.start(h, 0, &write10(0, 8), &[1; 4096], 4096, 4096);
    world.run();
    assert!(world.conn(h).is_waiting_for_memory());
    for n in 0..20 {
        world.at(n * world.config.nop_interval_ms);
    }
    assert!(!world.conn(h).wants_close());
    for hog in hogs {
        world.mem.release(hog);
    }
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, 0);
    world.close();
}

/// What it was asked has not gone out, so it cannot have answered; but that has its bound too.
#[test]
fn an_initiator_that_does_not_read_is_waited_for_longer() {
    let (mut world, h) = World::ready();
    world.deaf = true;
    let mut now = 0;
    for _ in 0..2 + MAX_UNSENT {
        assert!(!world.conn(h).wants_close(), "at {now}");
        now += world.config.nop_interval_ms;
        world.at(now);
        world.run();
    }
    assert!(!world.conn(h).wants_close());
    for _ in 0..2 {
        now += world.config.nop_interval_ms;
        world.at(now);
    }
    assert_eq!(world.conn(h).close_reason(), Some(CloseReason::Silent));
    world.close();
}

#[test]
fn data_that_never_comes_is_not_waited_for_for_ever() {
    let (mut world, h) = World::ready();
    let itt = world.start(h, 0, &write10(0, 16), &[1; 8192], 8192, 0);
    world.run();
    let ttt = world.r2t(h);
    let mut now = 0;
    let mut pass = |world: &mut World, intervals| {
        for _ in 0..intervals {
            // It is there: it only does not send.
            let (itt, sn) = world.next_sn(h);
            world.send(h, Header::new(itt, 0, Body::NopOut { ttt: NO_TAG, sn }), &[]);
            world.run();
            world.at(now);
            now += world.config.nop_interval_ms;
        }
    };
    pass(&mut world, 6);
    let body = Body::DataOut { last: false, ttt, exp_stat_sn: 0, data_sn: 0, offset: 0 };
    world.send(h, Header::new(itt, 0, body), &[1; 4096]);
    pass(&mut world, 6);
    assert!(!world.conn(h).wants_close(), "some of it came");
    pass(&mut world, 2);
    assert_eq!(world.conn(h).close_reason(), Some(CloseReason::DataTimeout));
    world.close();
}

/// Immediate commands have their own places, and not those of the window.
#[test]
fn immediate_commands_leave_the_window_alone() {
    let (mut world, h) = World::ready();
    world.hold = true;
    for _ in 0..IMMEDIATE_TASKS + 1 {
        let (itt, sn) = world.next_sn(h);
        world.hosts[h].cmd_sn = world.hosts[h].cmd_sn.wrapping_sub(1);
        let mut cdb = [0; 16];
        cdb[..10].copy_from_slice(&read10(0, 1));
        let body =
            Body::ScsiCommand { last: true, read: true, write: false, attr: 1, edtl: 512, sn, cdb };
        let mut header = Header::new(itt, 0, body);
        header.immediate = true;
        world.send(h, header, &[]);
    }
    world.run();
    let reject = world.receive(h).unwrap().0;
    assert!(matches!(reject.body, Body::Reject { reason: 6, .. }), "{reject:?}");
    assert_eq!(world.held.len(), usize::from(IMMEDIATE_TASKS));
    for _ in 0..128 {
        world.start(h, 0, &read10(0, 1), &[], 512, 0);
    }
    world.run();
    assert!(world.receive(h).is_none(), "the window is whole");
    assert_eq!(world.held.len(), usize::from(IMMEDIATE_TASKS) + 128);
    world.close();
}

#[test]
fn a_damaged_text_request_leaves_the_window_as_it_was() {
    let mut world = World::new();
    let h = world.join_with(1, &DIGESTS);
    let window = |world: &World| world.hosts[h].max_cmd_sn.wrapping_sub(world.hosts[h].cmd_sn);
    let before = window(&world);
    let (itt, sn) = world.next_sn(h);
    let body = Body::Text { last: true, more: false, ttt: NO_TAG, sn };
    world.send(h, Header::new(itt, 0, body), b"SendTargets=All\0");
    let end = world.hosts[h].to_target.len() - 8;
    world.hosts[h].to_target[end] ^= 1;
    world.run();
    let reject = world.receive(h).unwrap().0;
    assert!(matches!(reject.body, Body::Reject { reason: 2, .. }), "{reject:?}");
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).status, 0);
    assert_eq!(window(&world), before);
    world.close();
}
