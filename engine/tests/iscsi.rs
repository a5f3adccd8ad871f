//! Volumes as logical units of iSCSI targets, over loopback: beside NVMe/TCP, on several shards, from process to process.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use cairn_engine::block::{BlockSize, ReplicaId};
use cairn_engine::control::Command;
use cairn_engine::nexus::Purpose;
use cairn_engine::{ChildAddress, EngineError, IscsiExport, IscsiPortal, Sharing, VolumeSpec};
use common::cable::Cable;
use common::initiator::{Answer, Initiator};
use common::{Client, Engine, HOST, PATIENCE, config_for_initiators, replica_nqn, volume_nqn};

const ALICE: &str = "iqn.2026-11.io.example:alice";
const BOB: &str = "iqn.2026-11.io.example:bob";

fn iqn(volume: &str) -> String {
    format!("iqn.2026-11.io.cairn:{volume}")
}

fn export(volume: &str, initiators: &[&str]) -> IscsiExport {
    IscsiExport {
        iqn: iqn(volume),
        lun: 0,
        initiators: initiators.iter().map(|&name| name.to_owned()).collect(),
        chap: None,
        read_only: false,
        removable: false,
    }
}

/// A process that listens for initiators, in a portal group of this tag; and where.
fn start(shards: u16, group: u16) -> (Engine, SocketAddr) {
    let engine = Engine::start_with(shards, config_for_initiators(group));
    let address = engine.listen_for_initiators(group);
    (engine, address)
}

/// A volume of one replica, which both may log in to.
fn volume(name: &str, id: u128, pool: &str, engine: &Engine) -> VolumeSpec {
    let child = engine.add_replica(pool, id, id);
    VolumeSpec {
        iscsi: Some(Box::new(export(name, &[ALICE, BOB]))),
        ..Engine::spec(name, id, vec![child])
    }
}

/// A process with one volume, of blocks of this size.
fn one(block_size: BlockSize) -> (Engine, SocketAddr) {
    let (engine, at) = start(1, 7);
    engine.add_pool("p");
    let spec = volume("v", 1, "p", &engine);
    engine.add_volume(VolumeSpec { block_size: Some(block_size), ..spec });
    (engine, at)
}

fn change_export(
    engine: &Engine,
    volume: &str,
    export: Option<IscsiExport>,
) -> Result<(), EngineError> {
    engine.call(|reply| Command::ExportIscsi { name: volume.to_owned(), export, reply })
}

#[test]
fn targets_of_all_shards_are_found_by_those_who_may_log_in() {
    let (engine, at) = start(2, 7);
    for (pool, name, id) in [("p", "a", 1), ("q", "b", 2)] {
        engine.add_pool(pool);
        let spec = volume(name, id, pool, &engine);
        engine.add_volume(spec);
    }
    let shards: Vec<u16> = engine.volumes().iter().map(|v| v.shard).collect();
    assert_eq!(shards, [0, 1]);
    let address = format!("{at},7");
    let mut found = Initiator::discover(at, ALICE);
    found.sort();
    assert_eq!(found, [(iqn("a"), address.clone()), (iqn("b"), address)]);
    assert_eq!(Initiator::discover(at, "iqn.2026-11.io.example:eve"), []);

    // A connection moves to the other shard wherever its bytes are cut.
    for piece in [1, 7, 47, 48, 49, usize::MAX] {
        for name in ["a", "b"] {
            let mut alice = Initiator::login_in(at, ALICE, &iqn(name), piece).unwrap();
            assert_eq!(alice.command(&[0; 6], &[], 0).sense, (6, 0x29, 0), "power on");
            assert!(alice.command(&[0; 6], &[], 0).is_good());
        }
    }
    let mut sessions: Vec<Initiator> =
        ["a", "b"].map(|name| Initiator::ready(at, ALICE, &iqn(name))).into();
    for (session, with) in sessions.iter_mut().zip([1, 2]) {
        assert!(session.write(3, &[with; 8192], 4096).is_good());
    }
    let read = |session: &mut Initiator| session.read(3, 2, 4096).data;
    assert_eq!(read(&mut sessions[0]), [1; 8192]);
    assert_eq!(read(&mut sessions[1]), [2; 8192]);
    let told = engine.wait("b", |v| v.iscsi.as_ref().unwrap().sessions.len() == 1);
    let unit = told.iscsi.unwrap();
    assert_eq!((unit.state, unit.port_group), ("active/optimized", 7));
    assert_eq!((unit.sessions[0].initiator.as_str(), unit.sessions[0].portal_group), (ALICE, 7));

    for name in ["a", "b", "c"] {
        let refused = Initiator::login(at, "iqn.2026-11.io.example:eve", &iqn(name)).err();
        assert!(matches!(refused, Some(Some((2, _)))), "{refused:?}");
    }
    // Nobody is the default, and a change holds at once, also for what discovery tells.
    change_export(&engine, "b", Some(export("b", &[]))).unwrap();
    assert!(matches!(Initiator::login(at, ALICE, &iqn("b")).err(), Some(Some((2, _)))));
    let deadline = Instant::now() + PATIENCE;
    while Initiator::discover(at, ALICE).len() != 1 {
        assert!(Instant::now() < deadline, "the shard that listens hears of it");
    }
    // Two shards' volumes are no units of one target.
    let apart = IscsiExport { lun: 1, ..export("a", &[ALICE]) };
    let refused = change_export(&engine, "b", Some(apart)).unwrap_err().to_string();
    assert!(refused.contains("on shard 0") && refused.contains("on shard 1"), "{refused}");
}

#[test]
fn a_unit_comes_and_goes_while_the_process_runs() {
    let (engine, at) = one(BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    assert!(alice.write(0, &[1; 4096], 4096).is_good());
    change_export(&engine, "v", None).unwrap();
    assert!(matches!(Initiator::login(at, ALICE, &iqn("v")).err(), Some(Some((2, 3)))));
    assert_eq!(Initiator::discover(at, ALICE), []);

    // Another volume takes its place, and is not taken for it.
    change_export(&engine, "v", Some(IscsiExport { lun: 3, ..export("w", &[ALICE]) })).unwrap();
    let mut alice = Initiator::login(at, ALICE, &iqn("w")).unwrap();
    let luns = alice.command(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], &[], 64).data;
    assert_eq!(luns[..16], [0, 0, 0, 8, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0]);
    let child = engine.add_replica("p", 2, 2);
    let taken = VolumeSpec {
        iscsi: Some(Box::new(IscsiExport { lun: 3, ..export("w", &[]) })),
        ..Engine::spec("w", 2, vec![child])
    };
    let refused = engine.call(|reply| Command::AddVolume { spec: taken, reply }).unwrap_err();
    assert!(refused.to_string().contains("has a LUN 3 already"), "{refused}");
    for (wrong, says) in [
        (IscsiExport { iqn: "v".to_owned(), ..export("v", &[]) }, "not an iSCSI name"),
        (IscsiExport { lun: 256, ..export("v", &[]) }, "from 0 to 255"),
    ] {
        let refused = change_export(&engine, "v", Some(wrong)).unwrap_err().to_string();
        assert!(refused.contains(says), "{refused}");
    }

    // One that is not up yet may be in a moment: its initiators try again where the connection ends.
    engine.remove_volume("v");
    let gone = (ReplicaId(99), ChildAddress::Local { pool: "p".to_owned() });
    let spec = VolumeSpec {
        iscsi: Some(Box::new(export("v", &[ALICE]))),
        purpose: Purpose::Assemble,
        ..Engine::spec("v", 1, vec![gone])
    };
    engine.call(|reply| Command::AddVolume { spec, reply }).unwrap();
    assert_eq!(Initiator::login(at, ALICE, &iqn("v")).err(), Some(None));
}

/// A counter in one block that everybody adds to, and one beside it in the same block of the replicas.
#[test]
fn compare_and_write_is_one_step_among_initiators_and_hosts() {
    const ROUNDS: u64 = 150;
    for size in [BlockSize::B512, BlockSize::B4096] {
        let (engine, at) = one(size);
        let block = size.bytes() as usize;
        let counter = |n: u64| {
            let mut bytes = vec![0; block];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            bytes
        };
        let adders: Vec<_> = [ALICE, BOB]
            .map(|name| {
                thread::spawn(move || {
                    let mut session = Initiator::ready(at, name, &iqn("v"));
                    let mut done = 0;
                    while done < ROUNDS {
                        let now = session.read(8, 1, block).data;
                        let n = u64::from_le_bytes(now[..8].try_into().unwrap());
                        let answer = session.compare_and_write(8, &now, &counter_of(n + 1, block));
                        match answer {
                            Answer { status: 0, .. } => done += 1,
                            Answer { sense: (0xe, 0x1d, 0), .. } => {}
                            other => panic!("{other:?}"),
                        }
                    }
                })
            })
            .into();
        // Meanwhile a host writes other blocks: of 512 bytes, they are in the same block of the replicas.
        let mut host = Client::to(&engine, "v");
        let mut with = 0;
        while !adders.iter().all(thread::JoinHandle::is_finished) {
            with = with % 255 + 1;
            host.write_sized(9, with, size);
        }
        adders.into_iter().for_each(|adder| adder.join().unwrap());
        let mut session = Initiator::ready(at, ALICE, &iqn("v"));
        assert_eq!(session.read(8, 1, block).data, counter(2 * ROUNDS), "{size:?}");
        assert_eq!(session.read(9, 1, block).data, vec![with; block]);
    }
}

fn counter_of(n: u64, block: usize) -> Vec<u8> {
    let mut bytes = vec![0; block];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes
}

/// Changes of the same blocks by both transports, with what holds ranges in between: all of it ends, and as whole blocks.
#[test]
fn or_write_loses_no_bit() {
    let (engine, at) = one(BlockSize::B4096);
    let setters: Vec<_> = [(ALICE, 0), (BOB, 4)]
        .map(|(name, first)| {
            thread::spawn(move || {
                let mut session = Initiator::ready(at, name, &iqn("v"));
                for bit in first..first + 4 {
                    // ORWRITE (16) of 16 blocks.
                    let mut cdb = [0; 16];
                    (cdb[0], cdb[9], cdb[13]) = (0x8b, 32, 16);
                    for _ in 0..20 {
                        assert!(session.command(&cdb, &vec![1 << bit; 65536], 0).is_good());
                    }
                }
            })
        })
        .into();
    let mut host = Client::to(&engine, "v");
    while !setters.iter().all(thread::JoinHandle::is_finished) {
        // Beside them, and over them where they are all set.
        host.write(48, 3);
        host.write(31, 3);
    }
    setters.into_iter().for_each(|setter| setter.join().unwrap());
    let mut session = Initiator::ready(at, ALICE, &iqn("v"));
    assert_eq!(session.read(32, 16, 4096).data, vec![0xff; 65536]);
}

#[test]
fn reservations_hold_for_both_transports_and_over_a_restart() {
    const WRITE_EXCLUSIVE: u8 = 1;
    let (engine, at) = one(BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let mut bob = Initiator::ready(at, BOB, &iqn("v"));
    let mut host = Client::to(&engine, "v");
    host.write(1, 1);
    // REGISTER, then RESERVE.
    assert!(alice.reserve_out(0, 0, 0, 0xa11ce).is_good());
    assert!(alice.reserve_out(1, WRITE_EXCLUSIVE, 0xa11ce, 0).is_good());
    assert!(bob.write(1, &[2; 4096], 4096).is_conflict());
    assert!(!host.try_write(1, 2), "a host of the other transport is kept out");
    assert_eq!((host.read(1), bob.read(1, 1, 4096).data[0]), (1, 1), "reads go on");
    assert!(alice.write(1, &[3; 4096], 4096).is_good());

    engine.remove_volume("v");
    drop((alice, bob, host));
    let child = (ReplicaId(1), ChildAddress::Local { pool: "p".to_owned() });
    let spec = VolumeSpec {
        iscsi: Some(Box::new(export("v", &[ALICE, BOB]))),
        purpose: Purpose::Assemble,
        ..Engine::spec("v", 1, vec![child])
    };
    engine.add_volume(spec);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let mut bob = Initiator::ready(at, BOB, &iqn("v"));
    let mut host = Client::to(&engine, "v");
    assert_eq!(bob.keys(), [0xa11ce]);
    assert!(bob.write(1, &[2; 4096], 4096).is_conflict());
    assert!(!host.try_write(1, 2));
    assert!(alice.write(1, &[4; 4096], 4096).is_good());

    // Preempted and aborted: it is the other's, and the first one is told.
    assert!(bob.reserve_out(0, 0, 0, 0xb0b).is_good());
    assert!(bob.reserve_out(5, WRITE_EXCLUSIVE, 0xb0b, 0xa11ce).is_good());
    assert_eq!(alice.write(1, &[5; 4096], 4096).sense.0, 6, "a unit attention");
    assert!(alice.write(1, &[5; 4096], 4096).is_conflict());
    assert!(bob.write(1, &[6; 4096], 4096).is_good());
    // CLEAR.
    assert!(bob.reserve_out(3, 0, 0xb0b, 0).is_good());
    assert!(host.try_write(1, 7));
    assert_eq!((host.read(1), bob.keys()), (7, vec![]));

    // RESERVE (10), and RELEASE (10); it ends with the session, too.
    let (reserve, release) = ([0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert!(bob.command(&reserve, &[], 0).is_good());
    assert!(!host.try_write(1, 8));
    assert!(bob.write(1, &[9; 4096], 4096).is_good());
    assert!(bob.command(&release, &[], 0).is_good());
    assert!(host.try_write(1, 10));
    assert!(bob.command(&reserve, &[], 0).is_good());
    drop(bob);
    let begun = Instant::now();
    while !host.try_write(1, 11) {
        assert!(begun.elapsed() < PATIENCE, "a session that is gone keeps nothing");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes of a report of target port groups: for each its state and its number.
fn port_groups(session: &mut Initiator) -> Vec<(u8, u16)> {
    let answer = session.command(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], &[], 64);
    let mut rest = &answer.data[4..];
    let mut groups = Vec::new();
    while let [state, _, high, low, _, _, _, ports, ..] = rest {
        groups.push((state & 0xf, u16::from_be_bytes([*high, *low])));
        rest = &rest[8 + 4 * usize::from(*ports)..];
    }
    groups
}

#[test]
fn a_unit_goes_where_its_volume_does_with_what_is_reserved() {
    const OPTIMIZED: u8 = 0;
    const STANDBY: u8 = 2;
    let (first, a) = start(1, 7);
    let (second, b) = start(1, 8);
    first.add_pool("p");
    let sharing = |address, group| {
        Some(Sharing {
            auto_after_ms: None,
            elsewhere: Vec::new(),
            iscsi_elsewhere: vec![IscsiPortal { address, group }],
        })
    };
    let spec = volume("v", 1, "p", &first);
    first.add_volume(VolumeSpec { sharing: sharing(b, 8), ..spec });
    let child = ChildAddress::Remote { peer: first.address, nqn: replica_nqn(1) };
    let spec = VolumeSpec {
        iscsi: Some(Box::new(export("v", &[ALICE, BOB]))),
        sharing: sharing(a, 7),
        purpose: Purpose::StandBy { auto_after_ms: None },
        ..Engine::spec("v", 1, vec![(ReplicaId(1), child)])
    };
    second.call(|reply| Command::AddVolume { spec, reply }).unwrap();
    second.wait("v", |v| v.iscsi.as_ref().unwrap().state == "standby");
    let both = |at: SocketAddr| {
        let found = Initiator::discover(at, ALICE);
        assert_eq!(found.len(), 1, "one target");
    };
    both(a);
    both(b);

    let mut here = Initiator::ready(a, ALICE, &iqn("v"));
    let mut there = Initiator::login(b, ALICE, &iqn("v")).unwrap();
    assert!(here.write(1, &[1; 4096], 4096).is_good());
    assert!(here.reserve_out(0, 0, 0, 0xa11ce).is_good());
    assert_eq!(port_groups(&mut here), [(OPTIMIZED, 7), (STANDBY, 8)]);
    assert_eq!(there.read(1, 1, 4096).sense.0, 6, "a unit attention");
    assert_eq!(there.read(1, 1, 4096).sense, (2, 4, 0x0b), "standby");
    assert_eq!(port_groups(&mut there), [(STANDBY, 8), (OPTIMIZED, 7)]);

    first.call(|reply| Command::StandBy { name: "v".to_owned(), reply }).unwrap();
    second.call(|reply| Command::TakeOver { name: "v".to_owned(), reply }).unwrap();
    second.wait("v", |v| v.serving);
    let deadline = Instant::now() + PATIENCE;
    while !there.read(1, 1, 4096).is_good() {
        assert!(Instant::now() < deadline, "it is served there");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(there.read(1, 1, 4096).data, [1; 4096]);
    assert_eq!(port_groups(&mut there), [(OPTIMIZED, 8), (STANDBY, 7)]);
    assert_eq!(there.keys(), [0xa11ce], "what is reserved came along");
    assert_eq!(here.read(1, 1, 4096).sense.0, 6, "a unit attention");
    assert_eq!(here.read(1, 1, 4096).sense, (2, 4, 0x0b), "standby");
    drop((here, there));
    second.remove_volume("v");
    drop(second);
    first.remove_volume("v");
}

#[test]
fn copies_fills_and_what_takes_space() {
    let (engine, at) = one(BlockSize::B4096);
    let child = engine.add_replica("p", 2, 2);
    let beside = IscsiExport { lun: 1, ..export("v", &[ALICE, BOB]) };
    engine.add_volume(VolumeSpec {
        iscsi: Some(Box::new(beside)),
        ..Engine::spec("w", 2, vec![child])
    });
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    // WRITE SAME (16) of 300 blocks.
    let mut cdb = [0; 16];
    cdb[0] = 0x93;
    (cdb[12], cdb[13]) = (1, 44);
    assert!(alice.command(&cdb, &[9; 4096], 0).is_good());
    assert_eq!(alice.read(299, 2, 4096).data[..], [[9; 4096], [0; 4096]].concat());
    // GET LBA STATUS: two extents of the replica, and nothing after them.
    let mut status = [0; 16];
    (status[0], status[1], status[13]) = (0x9e, 0x12, 64);
    let told = alice.command(&status, &[], 64).data;
    let extent = |at: usize| {
        let blocks = u32::from_be_bytes(told[at + 8..at + 12].try_into().unwrap());
        (blocks, told[at + 12])
    };
    assert_eq!([extent(8), extent(24)], [(512, 0), (1536, 1)]);

    // VERIFY (10) with BYTCHK 1, and what differs.
    let mut verify = [0; 10];
    (verify[0], verify[1], verify[8]) = (0x2f, 2, 1);
    assert!(alice.command(&verify, &[9; 4096], 0).is_good());
    let mut other = [9; 4096];
    other[4000] = 8;
    assert_eq!(alice.command(&verify, &other, 0).sense, (0xe, 0x1d, 0));
    // WRITE AND VERIFY (10).
    let mut cdb = [0; 10];
    (cdb[0], cdb[5], cdb[8]) = (0x2e, 7, 1);
    assert!(alice.command(&cdb, &[5; 4096], 0).is_good());
    assert_eq!(alice.read(7, 1, 4096).data, [5; 4096]);

    // UNMAP of two ranges.
    let mut list = [0; 40];
    (list[1], list[3]) = (38, 32);
    (list[15], list[19]) = (7, 1);
    (list[31], list[35]) = (20, 2);
    assert!(alice.command(&[0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0], &list, 0).is_good());
    assert_eq!(alice.read(7, 2, 4096).data[..], [[0; 4096], [9; 4096]].concat());
    assert_eq!(alice.read(21, 2, 4096).data[..], [[0; 4096], [9; 4096]].concat());

    let mut host = Client::to(&engine, "v");
    assert_eq!((host.read(6), host.read(7), host.read(299)), (9, 0, 9));
    let mut host =
        Client::connect(engine.address, &volume_nqn("w"), HOST, true, usize::MAX).unwrap();
    assert_eq!(host.read(6), 0);
}

/// A request of several ranges is between two of them when a comparison asks for what both are in.
#[test]
fn ranges_of_a_request_and_what_holds_one_do_not_wait_for_each_other() {
    let (_engine, at) = one(BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    // UNMAP of the same block in each of three ranges.
    let mut list = [0; 56];
    (list[1], list[3]) = (54, 48);
    for range in [8, 24, 40] {
        (list[range + 7], list[range + 11]) = (7, 1);
    }
    let mut compare = [0; 16];
    (compare[0], compare[9], compare[13]) = (0x89, 7, 1);
    for _ in 0..200 {
        alice.begin(&[0x42, 0, 0, 0, 0, 0, 0, 0, 56, 0], &list, 0);
        alice.begin(&compare, &[[0; 4096], [3; 4096]].concat(), 0);
        let answers = [alice.finish(), alice.finish()];
        assert!(answers.iter().all(Answer::is_good), "{answers:?}");
        assert!(alice.write(7, &[0; 4096], 4096).is_good());
    }
}

#[test]
fn a_read_of_more_than_a_request_takes_is_one_command() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let (engine, at) = one(block_size);
        let block = block_size.bytes() as usize;
        let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
        // 5 MiB and a block, from a block that is none of the replicas'.
        let blocks = u32::try_from((5 << 20) / block + 1).unwrap();
        let of = |lba: u32| (lba % 251).to_le_bytes()[0];
        for first in (0..=blocks + 3).step_by(16) {
            let data: Vec<u8> = (first..first + 16).flat_map(|lba| vec![of(lba); block]).collect();
            assert!(alice.write(first, &data, block).is_good());
        }
        let answer = alice.read(3, u16::try_from(blocks).unwrap(), block);
        assert!(answer.is_good());
        assert_eq!(answer.data.len(), blocks as usize * block);
        let read = answer.data.chunks(block).zip(3..);
        assert!(read.into_iter().all(|(data, lba)| data.iter().all(|byte| *byte == of(lba))));
        drop(engine);
    }
}

#[test]
fn initiators_of_a_read_only_export_read_and_hosts_write() {
    let (engine, at) = one(BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let mut host = Client::to(&engine, "v");
    assert!(alice.write(1, &[1; 4096], 4096).is_good());
    change_export(&engine, "v", Some(IscsiExport { read_only: true, ..export("v", &[ALICE]) }))
        .unwrap();
    assert_eq!(alice.command(&[0; 6], &[], 0).sense, (6, 0x2a, 1), "it is told");
    assert_eq!(alice.write(1, &[2; 4096], 4096).sense, (7, 0x27, 0));
    let modes = alice.command(&[0x1a, 0, 8, 0, 32, 0], &[], 32).data;
    assert_eq!(modes[2] & 0x80, 0x80, "WP");
    assert!(host.try_write(1, 3));
    assert_eq!(alice.read(1, 1, 4096).data, [3; 4096]);
    assert!(engine.wait("v", |_| true).iscsi.unwrap().read_only);
    change_export(&engine, "v", Some(export("v", &[ALICE]))).unwrap();
    assert_eq!(alice.command(&[0; 6], &[], 0).sense, (6, 0x2a, 1));
    assert!(alice.write(1, &[4; 4096], 4096).is_good());
}

/// Writers are known for each unit of a session, by name: what is lost is told in the next session, too.
#[test]
fn what_may_be_lost_of_a_second_unit_is_told_there() {
    let folder = std::env::temp_dir().join(format!("cairn-engine-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    // The machine of the replicas, in one life after another.
    let machine = |incarnation| Engine::machine(&folder, incarnation);
    let replicas = machine(1);
    let cable = Cable::to(replicas.address);
    let (engine, at) = start(1, 7);
    for (lun, name, id) in [(0, "v", 1), (1, "w", 2)] {
        replicas.add_replica("p", id, id);
        let child = ChildAddress::Remote { peer: cable.address, nqn: replica_nqn(id) };
        engine.add_volume(VolumeSpec {
            iscsi: Some(Box::new(IscsiExport { lun, ..export("v", &[ALICE, BOB]) })),
            ..Engine::spec(name, id, vec![(ReplicaId(id), child)])
        });
    }
    let ready = |name, lun| {
        let mut session = Initiator::ready(at, name, &iqn("v"));
        session.lun = lun;
        while session.command(&[0; 6], &[], 0).sense.0 == 6 {}
        session
    };
    let flush =
        |session: &mut Initiator| session.command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0);
    let mut alice = ready(ALICE, 0);
    let mut bob = ready(BOB, 1);
    assert!(alice.write(0, &[1; 4096], 4096).is_good());
    alice.lun = 1;
    while alice.command(&[0; 6], &[], 0).sense.0 == 6 {}
    assert!(alice.write(0, &[2; 4096], 4096).is_good());
    assert!(bob.write(1, &[3; 4096], 4096).is_good());

    cable.plug(false);
    drop(replicas);
    let replicas = machine(2);
    cable.lead_to(replicas.address);
    cable.plug(true);
    for name in ["v", "w"] {
        engine.wait(name, |v| v.serving && v.children[0].state == "online");
    }
    assert!(!flush(&mut alice).is_good(), "what it wrote may be lost");
    assert!(flush(&mut alice).is_good(), "that was told");
    alice.lun = 0;
    assert!(!flush(&mut alice).is_good());
    // Another session of the same initiator.
    drop(bob);
    let mut bob = ready(BOB, 1);
    assert!(!flush(&mut bob).is_good());
    assert!(flush(&mut bob).is_good());
    drop((alice, bob));
    for name in ["v", "w"] {
        engine.remove_volume(name);
    }
    drop((engine, replicas));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// EXTENDED COPY of 32 blocks of a volume, to its beginning: the parameter list.
fn copy_list(volume: u128) -> Vec<u8> {
    let mut list = vec![0; 16 + 32 + 28];
    (list[3], list[11]) = (32, 28);
    let target = &mut list[16..48];
    // An identification descriptor with a UUID; blocks of 4096.
    (target[0], target[5], target[7], target[30]) = (0xe4, 0x0a, 18, 0x10);
    target[10..26].copy_from_slice(&volume.to_be_bytes());
    let segment = &mut list[48..];
    (segment[0], segment[3], segment[11], segment[18]) = (2, 24, 32, 1);
    list
}

/// Writes whose data does not come have most of the memory. What held a range waited for a buffer, and whoever had one waited
/// for the range.
#[test]
fn jobs_end_with_little_memory() {
    const ROUNDS: usize = 20;
    let engine = Engine::start_in(8 << 20, 1, config_for_initiators(7));
    let at = engine.listen_for_initiators(7);
    engine.add_pool("p");
    let spec = volume("v", 1, "p", &engine);
    engine.add_volume(VolumeSpec { iscsi: Some(Box::new(export("v", &["*"]))), ..spec });
    let ready = |n| Initiator::ready(at, &format!("iqn.2026-11.io.example:{n}"), &iqn("v"));
    // Room for the data of what follows and for three buffers; all else goes to others.
    let (mut session, mut room, mut hog) = (ready(0), ready(1), ready(2));
    assert!(room.announce_write(64));
    for blocks in [256, 128, 64, 32, 16] {
        while hog.announce_write(blocks) {}
    }
    drop(room);
    let mut copy = [0; 16];
    (copy[0], copy[13]) = (0x83, 76);
    let mut compare = [0; 16];
    (compare[0], compare[9], compare[13]) = (0x89, 3, 1);
    for _ in 0..ROUNDS {
        session.cork();
        for _ in 0..2 {
            // EXTENDED COPY over the block that COMPARE AND WRITE holds.
            for _ in 0..4 {
                session.begin(&copy, &copy_list(1), 0);
            }
            session.begin(&compare, &[0; 8192], 0);
        }
        session.uncork();
        let answers = [0; 10].map(|_| session.finish());
        assert!(answers.iter().all(Answer::is_good), "{answers:?}");
    }
    drop(hog);
    assert_eq!(session.read(0, 16, 4096).data, vec![0; 65536]);
}
