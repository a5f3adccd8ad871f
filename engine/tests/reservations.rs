//! Reservations of hosts of NVMe/TCP and of initiators of iSCSI, on one volume.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use cairn_engine::block::ReplicaId;
use cairn_engine::control::Command;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::sqe::{Sqe, opcode};
use cairn_engine::nvmf::status::Status;
use cairn_engine::{ChildAddress, IscsiExport, Sharing, VolumeSpec};
use common::cable::Cable;
use common::host::NvmeHost;
use common::initiator::Initiator;
use common::{Engine, PATIENCE, config_for_initiators, replica_nqn};

const ALICE: &str = "iqn.2026-11.io.example:alice";
const IQN: &str = "iqn.2026-11.io.cairn:v";
const REGISTER: u8 = opcode::RESERVATION_REGISTER;
const ACQUIRE: u8 = opcode::RESERVATION_ACQUIRE;
const RELEASE: u8 = opcode::RESERVATION_RELEASE;
/// RTYPE, in CDW10 of Acquire and Release.
const WRITE_EXCLUSIVE: u32 = 1 << 8;
const WRITE_EXCLUSIVE_REGISTRANTS: u32 = 3 << 8;
const PREEMPT: u32 = 1;
const PREEMPT_AND_ABORT: u32 = 2;

fn export() -> IscsiExport {
    IscsiExport {
        iqn: IQN.to_owned(),
        lun: 0,
        initiators: vec!["*".to_owned()],
        ..IscsiExport::default()
    }
}

fn spec(engine: &Engine, purpose: Purpose) -> VolumeSpec {
    let child = match purpose {
        Purpose::Create => engine.add_replica("p", 1, 1),
        _ => (ReplicaId(1), ChildAddress::Local { pool: "p".to_owned() }),
    };
    VolumeSpec { iscsi: Some(Box::new(export())), purpose, ..Engine::spec("v", 1, vec![child]) }
}

/// A process, and where initiators reach it.
fn process(group: u16) -> (Engine, SocketAddr) {
    let engine = Engine::start_with(1, config_for_initiators(group));
    let address = engine.listen_for_initiators(group);
    (engine, address)
}

/// A process with a volume, and where initiators reach it.
fn start() -> (Engine, SocketAddr) {
    let (engine, address) = process(7);
    engine.add_pool("p");
    let volume = spec(&engine, Purpose::Create);
    engine.add_volume(volume);
    (engine, address)
}

/// Two processes for one volume whose only replica is in a third: one that serves it, over a cable, and one that stands
/// by. Each with where initiators reach it.
fn cluster() -> (Engine, Cable, [(Engine, SocketAddr); 2]) {
    let replicas = Engine::start(1);
    replicas.add_pool("p");
    let (id, _) = replicas.add_replica("p", 1, 1);
    let cable = Cable::to(replicas.address);
    let nodes = [(7, cable.address), (8, replicas.address)].map(|(group, peer)| {
        let (engine, at) = process(group);
        let serves = group == 7;
        let sharing = (!serves).then(Sharing::default);
        let child = ChildAddress::Remote { peer, nqn: replica_nqn(1) };
        let purpose = match serves {
            true => Purpose::Create,
            false => Purpose::StandBy { auto_after_ms: None },
        };
        let spec = VolumeSpec {
            iscsi: Some(Box::new(export())),
            purpose,
            sharing,
            ..Engine::spec("v", 1, vec![(id, child)])
        };
        engine.call(|reply| Command::AddVolume { spec, reply }).unwrap();
        engine.wait("v", |v| v.serving == serves && !v.iscsi.as_ref().unwrap().state.is_empty());
        (engine, at)
    });
    (replicas, cable, nodes)
}

fn host(engine: &Engine, id: u128) -> NvmeHost {
    NvmeHost::connect(engine.address, "v", id)
}

fn feature(set: bool, fid: u32, value: u32) -> Sqe {
    let code = if set { opcode::SET_FEATURES } else { opcode::GET_FEATURES };
    Sqe::new(code).with_cdw(10, fid).with_cdw(11, value)
}

/// The type of the oldest notification, which is forgotten by that.
fn notice(host: &mut NvmeHost) -> u8 {
    host.admin(Sqe::new(opcode::GET_LOG_PAGE).with_cdw(10, 0x80 | 15 << 16), 64).data[8]
}

#[test]
fn hosts_reserve_and_what_they_reserved_outlives_the_process_that_serves() {
    let (engine, _) = start();
    let (mut a, mut b) = (host(&engine, 0xa), host(&engine, 0xb));
    assert!(a.reserve(REGISTER, 0, &[0, 7]).is_good());
    assert!(b.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[0, 0]).is_conflict(), "it is not registered");
    assert!(a.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[7, 0]).is_good());
    assert!(b.write(1, 2).is_conflict());
    assert!(a.write(1, 1).is_good());
    assert_eq!(b.read(1).data, [1; 4096]);
    assert!(a.admin(feature(true, 0x83, 1), 0).is_good());
    assert_eq!(b.admin(feature(false, 0x83, 0), 0).result, 1);
    // Another controller of the same host.
    let mut again = host(&engine, 0xa);
    assert!(again.write(1, 3).is_good());
    assert!(again.reserve(REGISTER, 0, &[0, 8]).is_conflict());
    let reserved = (1, vec![(0xa, 7, true)]);
    assert_eq!(b.report(), reserved);

    drop((a, again, b));
    engine.remove_volume("v");
    let volume = spec(&engine, Purpose::Assemble);
    engine.add_volume(volume);
    let (mut a, mut b) = (host(&engine, 0xa), host(&engine, 0xb));
    assert_eq!(b.report(), reserved);
    assert_eq!(b.admin(feature(false, 0x83, 0), 0).result, 1);
    assert!(b.write(1, 2).is_conflict());
    assert!(a.write(1, 4).is_good());
    // Replaced, released, unregistered.
    assert!(a.reserve(REGISTER, 2, &[7, 9]).is_good());
    assert!(a.reserve(RELEASE, WRITE_EXCLUSIVE_REGISTRANTS, &[9]).status.is(Status::INVALID_FIELD));
    assert!(a.reserve(RELEASE, WRITE_EXCLUSIVE, &[9]).is_good());
    assert!(b.write(1, 5).is_good());
    assert!(a.reserve(REGISTER, 1, &[9, 0]).is_good());
    assert_eq!(b.report(), (0, vec![]));
}

#[test]
fn hosts_and_initiators_preempt_each_other() {
    let (engine, at) = start();
    let (mut a, mut b) = (host(&engine, 0xa), host(&engine, 0xb));
    let mut alice = Initiator::ready(at, ALICE, IQN);
    assert!(a.reserve(REGISTER, 0, &[0, 7]).is_good());
    assert!(alice.reserve_out(0, 0, 0, 0xa11ce).is_good());
    assert_eq!(alice.keys(), [7, 0xa11ce]);
    assert!(a.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[7, 0]).is_good());
    assert!(alice.write(1, &[1; 4096], 4096).is_conflict());
    assert!(b.write(1, 1).is_conflict());
    // READ FULL STATUS: the host's name, and that it holds.
    let full = alice.command(&[0x5e, 3, 0, 0, 0, 0, 0, 2, 0, 0], &[], 512).data;
    assert_eq!((full[8 + 7], full[8 + 12], full[8 + 13]), (7, 1, 1));
    assert!(full[36..].starts_with(b"nqn."));

    // PREEMPT.
    a.await_event();
    assert!(alice.reserve_out(4, 1, 0xa11ce, 7).is_good());
    assert_eq!((a.event(), notice(&mut a)), (0x0080_0006, 1), "its registration is gone");
    assert!(a.write(1, 1).is_conflict());
    assert!(alice.write(1, &[1; 4096], 4096).is_good());
    assert_eq!(b.report(), (1, vec![(0, 0xa11ce, true)]));
    // And back.
    assert!(b.reserve(REGISTER, 0, &[0, 9]).is_good());
    assert!(b.reserve(ACQUIRE, WRITE_EXCLUSIVE | PREEMPT, &[9, 0xa11ce]).is_good());
    assert_eq!(alice.write(1, &[2; 4096], 4096).sense, (6, 0x2a, 5), "registrations preempted");
    assert!(alice.write(1, &[2; 4096], 4096).is_conflict());
    assert!(b.write(1, 2).is_good());
    // Cleared by an initiator, which the host hears of, and released by a host, which the initiator does.
    assert!(alice.reserve_out(0, 0, 0, 0xa11ce).is_good());
    assert!(alice.reserve_out(3, 0, 0xa11ce, 0).is_good());
    assert_eq!(notice(&mut b), 3);
    assert!(b.reserve(REGISTER, 0, &[0, 9]).is_good());
    assert!(alice.reserve_out(0, 0, 0, 0xa11ce).is_good());
    assert!(b.reserve(ACQUIRE, WRITE_EXCLUSIVE_REGISTRANTS, &[9, 0]).is_good());
    assert!(b.reserve(RELEASE, WRITE_EXCLUSIVE_REGISTRANTS, &[9]).is_good());
    assert_eq!(alice.write(1, &[3; 4096], 4096).sense, (6, 0x2a, 4), "reservations released");
}

/// Nothing of a host that was preempted and aborted comes after that.
#[test]
fn what_a_preempted_host_has_begun_is_over_before_it_is_said() {
    const BLOCKS: u64 = 16;
    let (engine, at) = start();
    let (mut a, mut b) = (host(&engine, 0xa), host(&engine, 0xb));
    let mut alice = Initiator::ready(at, ALICE, IQN);
    for round in 0..40 {
        assert!(a.reserve(REGISTER, 0, &[0, 7]).is_good());
        assert!(b.reserve(REGISTER, 0, &[0, 9]).is_good());
        assert!(alice.reserve_out(0, 0, 0, 0xa11ce).is_good());
        assert!(a.reserve(ACQUIRE, WRITE_EXCLUSIVE, &[7, 0]).is_good());
        // One whose data is yet to come, and some on their way. What comes late is kept out.
        let announced = a.announce_write(0);
        let begun: Vec<u16> = (1..BLOCKS).map(|lba| a.begin_write(lba, round + 1)).collect();
        if round % 2 == 0 {
            assert!(b.reserve(ACQUIRE, WRITE_EXCLUSIVE | PREEMPT_AND_ABORT, &[9, 7]).is_good());
        } else {
            assert!(alice.reserve_out(5, 1, 0xa11ce, 7).is_good());
        }
        let seen =
            |b: &mut NvmeHost| -> Vec<u8> { (0..BLOCKS).map(|l| b.read(l).data[0]).collect() };
        let then = seen(&mut b);
        let ends: Vec<_> = begun.iter().map(|_| a.finish()).collect();
        a.send_data(announced, &[0xff; 4096]);
        assert_eq!(a.finish().status, Status::PREEMPTED_AND_ABORTED);
        for end in &ends {
            let aborted = end.status.is(Status::PREEMPTED_AND_ABORTED);
            assert!(end.is_good() || end.is_conflict() || aborted, "{end:?}");
        }
        assert_eq!(seen(&mut b), then);
        assert!(a.write(0, 0).is_conflict());
        assert!(b.reserve(RELEASE, 1, &[9]).is_good());
        while alice.command(&[0; 6], &[], 0).sense.0 == 6 {}
    }
}

/// A process that is cut off does not know what is reserved, and what is not: whoever took the volume over may.
#[test]
fn a_process_that_is_cut_off_tells_nothing_of_reservations() {
    let (replicas, cable, [(first, a), (second, b)]) = cluster();
    let mut old = Initiator::ready(a, ALICE, IQN);
    let mut asks = Initiator::ready(a, "iqn.2026-11.io.example:bob", IQN);
    let mut host = host(&first, 0xa);
    assert!(old.reserve_out(0, 0, 0, 1).is_good());
    assert_eq!((old.keys(), host.report()), (vec![1], (0, vec![(0, 1, false)])));

    cable.hold(true);
    second.call(|reply| Command::TakeOver { name: "v".to_owned(), reply }).unwrap();
    second.wait("v", |v| v.serving);
    let mut new = Initiator::ready(b, ALICE, IQN);
    let begun = Instant::now();
    while !new.reserve_out(0, 0, 0, 2).is_good() {
        assert!(begun.elapsed() < PATIENCE, "it is served there");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(new.keys(), [1, 2]);
    // PERSISTENT RESERVE IN; RELEASE of nothing, which changes nothing; Reservation Report.
    asks.begin(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0], &[], 256);
    old.begin_reserve_out(2, 1, 1, 0);
    host.begin_report();
    let wait = Duration::from_millis(200);
    assert!(asks.is_silent(wait) && old.is_silent(wait) && host.is_silent(wait));
    cable.hold(false);
    assert!(!asks.finish().is_good() && !old.finish().is_good() && !host.finish().is_good());
    assert_eq!(new.keys(), [1, 2]);
    drop((asks, old, new, host));
    for engine in [&first, &second] {
        engine.remove_volume("v");
    }
    drop((first, second, cable, replicas));
}

/// What was aborted while an earlier change was being stored is not done after it.
#[test]
fn aborted_changes_are_never_made() {
    let (replicas, cable, [(first, at), (second, _)]) = cluster();
    let session = |name: &str| Initiator::ready(at, &format!("iqn.2026-11.io.example:{name}"), IQN);
    let (mut alice, mut bob, mut carol) = (session("alice"), session("bob"), session("carol"));
    let (mut host, mut other) = (host(&first, 0xa), host(&first, 0xb));
    for (session, key) in [(&mut alice, 1), (&mut bob, 2)] {
        assert!(session.reserve_out(0, 0, 0, key).is_good());
    }
    assert!(host.reserve(REGISTER, 0, &[0, 7]).is_good());
    let settle = || thread::sleep(Duration::from_millis(100));

    // Behind a change that is being stored: one that its initiator aborts, one whose session goes.
    cable.hold(true);
    alice.begin_reserve_out(0, 0, 1, 11);
    settle();
    let task = bob.begin_reserve_out(0, 0, 2, 22);
    carol.begin_reserve_out(0, 0, 0, 3);
    settle();
    bob.begin_abort(task);
    drop(carol);
    settle();
    cable.hold(false);
    assert!(alice.finish().is_good());
    assert_eq!(bob.finish_abort(), 0, "function complete");
    assert_eq!(alice.keys(), [11, 2, 7]);

    // Behind a preemption that aborts: those of who is preempted, of both transports.
    cable.hold(true);
    alice.begin_reserve_out(5, 1, 11, 2);
    settle();
    bob.begin_reserve_out(6, 0, 0, 22);
    other.begin_reserve(REGISTER, 0, &[0, 9]);
    settle();
    cable.hold(false);
    assert!(alice.finish().is_good());
    assert_eq!(bob.finish().status, 0x40, "task aborted");
    assert!(other.finish().is_good(), "it was not preempted");
    assert_eq!(alice.keys(), [11, 7, 9]);
    cable.hold(true);
    alice.begin_reserve_out(5, 1, 11, 7);
    settle();
    host.begin_reserve(REGISTER, 0, &[0, 77]);
    settle();
    cable.hold(false);
    assert!(alice.finish().is_good());
    assert_eq!(host.finish().status, Status::PREEMPTED_AND_ABORTED);
    assert_eq!(alice.keys(), [11, 9]);
    drop((alice, bob, host, other));
    for engine in [&first, &second] {
        engine.remove_volume("v");
    }
    drop((first, second, cable, replicas));
}
