//! Sanitizing volumes, over loopback: what hosts of both transports see, and that it goes on.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use cairn_engine::block::{BlockSize, ReplicaId, SnapshotId, SnapshotVerb};
use cairn_engine::control::Command;
use cairn_engine::nexus::Purpose;
use cairn_engine::{ChildAddress, EngineError, IscsiExport, ShardConfig, VolumeSpec};
use cairn_engine::{replica::SnapshotSpec, snapshot::SnapshotCall};
use common::cable::Cable;
use common::initiator::{Answer, Initiator};
use common::{BLOCKS, Client, Engine, PATIENCE, config_for_initiators, replica_nqn};

const ALICE: &str = "iqn.2026-11.io.example:alice";
const BOB: &str = "iqn.2026-11.io.example:bob";
const IN_PROGRESS: (u8, u8, u8) = (2, 0x04, 0x1b);
const IMMED: u8 = 0x80;
const AUSE: u8 = 0x20;
const OVERWRITE: u8 = 1;
const ERASE: u8 = 2;
const EXIT: u8 = 0x1f;

fn iqn(volume: &str) -> String {
    format!("iqn.2026-11.io.cairn:{volume}")
}

/// A process that overwrites so many MiB a second.
fn start(sanitize_mib_s: u32) -> (Engine, SocketAddr) {
    let config = ShardConfig { sanitize_mib_s, ..config_for_initiators(7) };
    let engine = Engine::start_with(1, config);
    let address = engine.listen_for_initiators(7);
    (engine, address)
}

fn spec(name: &str, id: u128, children: &[(ReplicaId, ChildAddress)]) -> VolumeSpec {
    let export = IscsiExport {
        iqn: iqn(name),
        initiators: vec![ALICE.to_owned(), BOB.to_owned()],
        ..IscsiExport::default()
    };
    VolumeSpec { iscsi: Some(Box::new(export)), ..Engine::spec(name, id, children.to_vec()) }
}

/// A volume of two replicas.
fn mirrored(engine: &Engine, block_size: BlockSize) -> Vec<(ReplicaId, ChildAddress)> {
    let children: Vec<_> = [("p", 1), ("q", 2)]
        .map(|(pool, id)| {
            engine.add_pool(pool);
            engine.add_replica(pool, id, 1)
        })
        .into();
    engine.add_volume(VolumeSpec { block_size: Some(block_size), ..spec("v", 1, &children) });
    children
}

fn sanitize(session: &mut Initiator, action: u8, list: &[u8]) -> Answer {
    let [high, low] = u16::try_from(list.len()).unwrap().to_be_bytes();
    session.command(&[0x48, action, 0, 0, 0, 0, 0, high, low, 0], list, 0)
}

/// Waits until a unit is ready; whether it was being sanitized all the while.
fn until_ready(session: &mut Initiator) -> bool {
    let begun = Instant::now();
    let mut waited = false;
    loop {
        let answer = session.command(&[0; 6], &[], 0);
        if answer.is_good() {
            return waited;
        }
        if answer.sense.0 != 6 {
            assert_eq!(answer.sense, IN_PROGRESS);
            waited = true;
        }
        assert!(begun.elapsed() < PATIENCE, "it ends");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Reads all of a volume, and hands over each block.
fn each_block(session: &mut Initiator, block: usize, check: impl Fn(&[u8])) {
    let blocks = usize::try_from(BLOCKS).unwrap() * 4096 / block;
    for lba in (0..blocks).step_by(128) {
        let answer = session.read(u32::try_from(lba).unwrap(), 128, block);
        assert!(answer.is_good(), "{answer:?}");
        answer.data.chunks(block).for_each(&check);
    }
}

fn snapshot(engine: &Engine, verb: SnapshotVerb) -> Result<(), EngineError> {
    let spec = SnapshotSpec { id: SnapshotId(5), name: "s".to_owned(), created: 1 };
    let call = SnapshotCall { spec, clone: None };
    engine.call(|reply| Command::Snapshot {
        volumes: vec!["v".to_owned()],
        verb,
        call,
        force: true,
        reply,
    })
}

#[test]
fn every_block_of_either_size_is_overwritten_and_then_erased() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let (engine, at) = start(0);
        mirrored(&engine, block_size);
        let block = block_size.bytes() as usize;
        let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
        assert!(alice.write(3, &vec![1; 8 * block], block).is_good());
        // Two passes, the second one inverted.
        assert!(sanitize(&mut alice, OVERWRITE, &[0x82, 0, 0, 3, 1, 2, 3]).is_good());
        each_block(&mut alice, block, |bytes| {
            let of = [0xfe, 0xfd, 0xfc].into_iter().cycle();
            assert!(bytes.iter().zip(of).all(|(byte, of)| *byte == of));
        });
        assert!(sanitize(&mut alice, ERASE, &[]).is_good());
        each_block(&mut alice, block, |bytes| assert!(bytes.iter().all(|byte| *byte == 0)));
        // GET LBA STATUS: one extent, deallocated, to the end.
        let cdb = [0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
        let told = alice.command(&cdb, &[], 64).data;
        let blocks = u32::try_from(BLOCKS * 4096).unwrap() / block_size.bytes();
        assert_eq!((&told[16..20], told[20]), (&blocks.to_be_bytes()[..], 1));
        assert!(alice.write(0, &vec![7; block], block).is_good());
    }
}

#[test]
fn nobody_uses_the_volume_meanwhile_and_resets_and_restarts_do_not_end_it() {
    let (engine, at) = start(4);
    let children = mirrored(&engine, BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let mut bob = Initiator::ready(at, BOB, &iqn("v"));
    let mut host = Client::to(&engine, "v");
    host.write(1, 1);
    // Without IMMED: it is answered in the end.
    alice.begin(&[0x48, OVERWRITE, 0, 0, 0, 0, 0, 0, 5, 0], &[1, 0, 0, 1, 0xaa], 0);
    engine.wait("v", |v| v.detail.contains("in sync; being overwritten, pass 1 of 1"));
    assert_eq!(bob.read(1, 1, 4096).sense, IN_PROGRESS);
    assert_eq!(bob.reserve_out(0, 0, 0, 0xb0b).sense, IN_PROGRESS);
    assert!(!host.try_write(1, 2), "a host of the other transport is kept out");
    let sense = bob.command(&[0x03, 0, 0, 0, 18, 0], &[], 18).data;
    assert_eq!((sense[2], sense[12], sense[13], sense[15]), (2, 0x04, 0x1b, 0x80));

    let busy = |result: Result<(), EngineError>| {
        let Err(EngineError::Busy(why)) = result else { panic!("{result:?}") };
        assert!(why.contains("sanitized") || why.contains("overwritten"), "{why}");
    };
    busy(snapshot(&engine, SnapshotVerb::Create));
    busy(snapshot(&engine, SnapshotVerb::Restore));
    let (name, blocks) = ("v".to_owned(), 2 * BLOCKS);
    busy(engine.call(|reply| Command::ResizeVolume { name, blocks, reply }));

    assert_eq!(bob.reset_unit(), 0, "LOGICAL UNIT RESET");
    assert_eq!(alice.finish().status, 0x40, "TASK ABORTED");
    assert!(matches!(bob.command(&[0; 6], &[], 0).sense, (6, 0x29, _)));
    assert_eq!(bob.command(&[0; 6], &[], 0).sense, IN_PROGRESS, "it goes on");

    // The nexus ends, and another one takes its place.
    engine.remove_volume("v");
    drop((alice, bob, host));
    engine.add_volume(VolumeSpec { purpose: Purpose::Assemble, ..spec("v", 1, &children) });
    let mut alice = Initiator::login(at, ALICE, &iqn("v")).unwrap();
    assert!(until_ready(&mut alice), "it goes on");
    each_block(&mut alice, 4096, |bytes| assert!(bytes.iter().all(|byte| *byte == 0xaa)));
    let mut host = Client::to(&engine, "v");
    assert_eq!(host.read(1), 0xaa);
    host.write(1, 3);
    // And nothing of it is left for the next nexus.
    engine.remove_volume("v");
    engine.add_volume(VolumeSpec { purpose: Purpose::Assemble, ..spec("v", 1, &children) });
    assert_eq!(Client::to(&engine, "v").read(1), 3);
}

#[test]
fn a_volume_with_snapshots_is_not_sanitized() {
    let (engine, at) = start(0);
    mirrored(&engine, BlockSize::B4096);
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    assert!(alice.write(1, &[1; 4096], 4096).is_good());
    snapshot(&engine, SnapshotVerb::Create).unwrap();
    assert_eq!(sanitize(&mut alice, ERASE, &[]).sense, (5, 0x2c, 0));
    assert_eq!(alice.read(1, 1, 4096).data, [1; 4096], "nothing was begun");
    snapshot(&engine, SnapshotVerb::Delete).unwrap();
    let begun = Instant::now();
    // What the snapshot had is given back in the background.
    while !sanitize(&mut alice, ERASE | IMMED, &[]).is_good() {
        assert!(begun.elapsed() < PATIENCE, "it is gone in the end");
        thread::sleep(Duration::from_millis(10));
    }
    until_ready(&mut alice);
    assert_eq!(alice.read(1, 1, 4096).data, [0; 4096]);
}

#[test]
fn a_sanitize_that_fails_keeps_hosts_out_until_it_is_left() {
    const MEDIUM: (u8, u8, u8) = (3, 0x31, 0x03);
    let (engine, at) = start(0);
    engine.add_pool("p");
    // More than the pool has room for, together.
    let mut full = None;
    for id in 1..=8 {
        let name = format!("v{id}");
        let child = engine.add_replica("p", id, id);
        engine.add_volume(spec(&name, id, &[child]));
        let mut alice = Initiator::ready(at, ALICE, &iqn(&name));
        let answer = sanitize(&mut alice, OVERWRITE | AUSE, &[1, 0, 0, 1, 0xaa]);
        if !answer.is_good() {
            assert_eq!(answer.sense, MEDIUM);
            full = Some((name, id, alice));
            break;
        }
    }
    let (name, id, mut alice) = full.expect("the pool is full");
    let mut host = Client::to(&engine, &name);
    assert_eq!(alice.read(1, 1, 4096).sense, MEDIUM);
    assert!(!host.try_write(1, 1));
    let told = engine.wait(&name, |v| v.detail.contains("could not be sanitized"));
    assert!(told.detail.contains("EXIT FAILURE MODE"), "{}", told.detail);

    // It is stored that it failed.
    engine.remove_volume(&name);
    drop((alice, host));
    let child = (ReplicaId(id), ChildAddress::Local { pool: "p".to_owned() });
    engine.add_volume(VolumeSpec { purpose: Purpose::Assemble, ..spec(&name, id, &[child]) });
    let mut alice = Initiator::login(at, ALICE, &iqn(&name)).unwrap();
    assert_eq!(alice.command(&[0; 6], &[], 0).sense.0, 6);
    assert_eq!(alice.command(&[0; 6], &[], 0).sense, MEDIUM);
    assert!(sanitize(&mut alice, EXIT, &[]).is_good());
    assert!(alice.read(1, 1, 4096).is_good());

    // In the restricted mode only another one helps.
    assert_eq!(sanitize(&mut alice, OVERWRITE, &[1, 0, 0, 1, 0xaa]).sense, MEDIUM);
    assert_eq!(sanitize(&mut alice, EXIT, &[]).sense, (5, 0x24, 0));
    assert!(sanitize(&mut alice, ERASE, &[]).is_good());
    assert_eq!(alice.read(1, 1, 4096).data, [0; 4096]);
}

/// A replica that is away has what was there before: it is waited for, until it is no member any more.
#[test]
fn a_sanitize_is_not_over_before_every_replica_has_it() {
    let (engine, at) = start(4);
    let away = Engine::start(1);
    away.add_pool("r");
    away.add_replica("r", 3, 1);
    let mut children: Vec<_> = [("p", 1), ("q", 2)]
        .map(|(pool, id)| {
            engine.add_pool(pool);
            engine.add_replica(pool, id, 1)
        })
        .into();
    let peer = away.address;
    children.push((ReplicaId(3), ChildAddress::Remote { peer, nqn: replica_nqn(3) }));
    engine.add_volume(spec("v", 1, &children));
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let list = [1, 0, 0, 1, 0xaa];
    assert!(sanitize(&mut alice, OVERWRITE | IMMED, &list).is_good(), "it has begun");
    drop(away);
    engine.wait("v", |v| v.detail.contains("sanitized but for replicas that are not in sync"));
    assert_eq!(alice.read(1, 1, 4096).sense, IN_PROGRESS);
    let (name, replica) = ("v".to_owned(), ReplicaId(3));
    engine.call(|reply| Command::RemoveReplica { name, replica, reply }).unwrap();
    until_ready(&mut alice);
    each_block(&mut alice, 4096, |bytes| assert!(bytes.iter().all(|byte| *byte == 0xaa)));
}

/// The only replica's machine lost power, and what was overwritten there was not flushed: the sanitize went on after it, and
/// what had been there before could be read.
#[test]
fn what_may_be_lost_is_sanitized_again() {
    let folder = std::env::temp_dir().join(format!("cairn-sanitize-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let machine = |incarnation| Engine::machine(&folder, incarnation);
    let replicas = machine(1);
    replicas.add_replica("p", 1, 1);
    let cable = Cable::to(replicas.address);
    let (engine, at) = start(1);
    let peer = ChildAddress::Remote { peer: cable.address, nqn: replica_nqn(1) };
    engine.add_volume(spec("v", 1, &[(ReplicaId(1), peer)]));
    let mut alice = Initiator::ready(at, ALICE, &iqn("v"));
    let percent = || -> u64 {
        let detail = engine.wait("v", |_| true).detail;
        let told = detail.split_once("overwritten").and_then(|(_, rest)| rest.split_once(" %"));
        let told = told.and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok());
        told.unwrap_or(100)
    };
    let list = [1, 0, 0, 1, 0xaa];
    assert!(sanitize(&mut alice, OVERWRITE | IMMED, &list).is_good(), "it has begun");
    let until = Instant::now() + PATIENCE;
    while percent() < 60 {
        assert!(Instant::now() < until, "it goes on");
        thread::sleep(Duration::from_millis(5));
    }
    cable.plug(false);
    drop(replicas);
    let replicas = machine(2);
    cable.lead_to(replicas.address);
    cable.plug(true);
    while percent() >= 60 {
        assert!(Instant::now() < until, "it begins again");
        thread::sleep(Duration::from_millis(5));
    }
    until_ready(&mut alice);
    each_block(&mut alice, 4096, |bytes| assert!(bytes.iter().all(|byte| *byte == 0xaa)));
    engine.remove_volume("v");
    drop((engine, replicas));
    std::fs::remove_dir_all(&folder).unwrap();
}
