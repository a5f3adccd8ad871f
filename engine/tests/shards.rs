//! A process with several shards on io_uring, over loopback: what is where, and connections that the shard which listens
//! hands to the one that has their subsystem.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use cairn_engine::block::{
    IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory as _, ReplicaId, SnapshotId, SnapshotVerb,
};
use cairn_engine::control::Command;
use cairn_engine::nexus::Purpose;
use cairn_engine::nvmf::initiator::{QueueIndex, Submit};
use cairn_engine::nvmf::log::{self, DISCOVERY_NQN, DiscoveryEntry, DiscoveryHeader};
use cairn_engine::replica::SnapshotSpec;
use cairn_engine::snapshot::SnapshotCall;
use cairn_engine::{ChildAddress, EngineError, VolumeReplica, VolumeSpec};
use common::{BLOCKS, Client, Engine, HOST, PATIENCE, replica_nqn, volume_nqn};

/// The subsystems that discovery lists for a host.
fn discover(engine: &Engine, host: &str) -> Vec<String> {
    let found = Client::connect(engine.address, DISCOVERY_NQN, host, false, usize::MAX);
    let mut client = found.unwrap();
    let buf = client.mem.alloc(16 << 10).unwrap();
    let page = Submit::GetLog { lid: log::DISCOVERY, offset: 0, data: buf.slice() };
    assert_eq!(client.wait(0, page), IoStatus::Ok);
    let bytes = client.mem.bytes(buf.slice());
    let count = usize::try_from(DiscoveryHeader::decode(bytes).unwrap().numrec).unwrap();
    let entries = bytes[1024..].chunks(1024).take(count);
    let entries = entries.map(|entry| DiscoveryEntry::decode(entry).unwrap());
    entries.skip(1).map(|entry| entry.subnqn).collect()
}

/// Two pools, and a volume in each: `a` on the first shard, `b` on the second.
fn two() -> Engine {
    let engine = Engine::start(2);
    for (pool, volume, id) in [("p", "a", 1), ("q", "b", 2)] {
        engine.add_pool(pool);
        let child = engine.add_replica(pool, id, id);
        engine.add_volume(Engine::spec(volume, id, vec![child]));
    }
    engine
}

#[test]
fn volumes_of_all_shards_are_found_at_one_address() {
    let engine = two();
    let shards: Vec<_> = engine.volumes().iter().map(|v| (v.name.clone(), v.shard)).collect();
    assert_eq!(shards, [("a".to_owned(), 0), ("b".to_owned(), 1)]);
    let pools = engine.call(|reply| Command::ListPools { reply }).unwrap();
    assert_eq!(pools.iter().map(|p| p.shard).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(discover(&engine, HOST), [volume_nqn("a"), volume_nqn("b")]);

    let mut hosts: Vec<Client> = ["a", "b", "b"].map(|v| Client::to(&engine, v)).into();
    for (host, with) in hosts.iter_mut().zip([1, 2, 3]) {
        host.write(u64::from(with), with);
    }
    assert_eq!([hosts[1].read(3), hosts[2].read(2), hosts[0].read(2)], [3, 2, 0]);
    for (volume, count) in [("a", 1), ("b", 2)] {
        let told = engine.wait(volume, |v| v.hosts.iter().all(|h| h.io_queues == 1));
        assert_eq!(told.hosts.len(), count, "{told:#?}");
        let mut ids: Vec<u16> = told.hosts.iter().map(|h| h.controller).collect();
        ids.dedup();
        assert_eq!(ids.len(), count, "each has a controller of its own");
    }

    engine.remove_volume("b");
    assert_eq!(discover(&engine, HOST), [volume_nqn("a")]);
    let gone = Client::connect(engine.address, &volume_nqn("b"), HOST, false, usize::MAX);
    assert!(gone.is_err(), "nobody has it");
    assert_eq!(hosts[0].read(1), 1);
}

#[test]
fn a_host_is_let_in_by_the_shard_that_has_the_volume() {
    let engine = two();
    for (volume, pool, id) in [("c", "p", 3), ("d", "q", 4)] {
        let child = engine.add_replica(pool, id, id);
        let mut spec = Engine::spec(volume, id, vec![child]);
        spec.allowed_hosts = Some(vec![format!("{HOST}:{volume}")]);
        engine.add_volume(spec);
    }
    assert_eq!(discover(&engine, HOST), [volume_nqn("a"), volume_nqn("b")]);
    assert_eq!(discover(&engine, &format!("{HOST}:d")).len(), 3);
    for volume in ["c", "d"] {
        let connect = |host: &str| {
            Client::connect(engine.address, &volume_nqn(volume), host, true, usize::MAX)
        };
        let refused = connect(HOST).map(|_| ()).unwrap_err();
        assert!(refused.contains("Host") || refused.contains("host"), "{refused}");
        connect(&format!("{HOST}:{volume}")).unwrap().write(0, 9);
    }
}

/// A connection moves wherever its bytes are cut.
#[test]
fn a_connection_moves_however_its_bytes_arrive() {
    let engine = two();
    for piece in [1, 7, 100, 128, 129, 500] {
        for digests in [false, true] {
            for volume in ["a", "b"] {
                let nqn = volume_nqn(volume);
                let mut host = Client::connect(engine.address, &nqn, HOST, digests, piece).unwrap();
                host.write(1, 5);
                assert_eq!(host.read(1), 5);
            }
        }
    }
}

#[test]
fn many_connections_move_at_once() {
    let engine = two();
    let address = engine.address;
    let hosts: Vec<_> = (0u8..8)
        .map(|at| {
            thread::spawn(move || {
                for round in 0..8u64 {
                    let nqn = volume_nqn(["a", "b"][usize::from(at % 2)]);
                    let mut host =
                        Client::connect(address, &nqn, HOST, at & 2 == 0, usize::MAX).unwrap();
                    host.write(u64::from(at) * 8 + round, at + 1);
                    assert_eq!(host.read(u64::from(at) * 8 + round), at + 1);
                }
            })
        })
        .collect();
    hosts.into_iter().for_each(|host| host.join().unwrap());
    // All are gone again, and nothing is left of them.
    for volume in ["a", "b"] {
        engine.wait(volume, |v| v.hosts.is_empty());
    }
}

/// A peer that says much and asks for nothing would have it all kept.
#[test]
fn what_a_host_sends_before_its_connect_has_a_bound() {
    let engine = two();
    let mut stream = TcpStream::connect(engine.address).unwrap();
    let mut icreq = [0; 128];
    (icreq[2], icreq[4]) = (128, 128);
    stream.write_all(&icreq).unwrap();
    stream.read_exact(&mut [0; 128]).unwrap();
    // The head of a capsule with 8 KiB of data in it, which arrives without end.
    let mut capsule = vec![0; 72];
    (capsule[0], capsule[2], capsule[3]) = (4, 72, 72);
    capsule[4..8].copy_from_slice(&(72u32 + 8192).to_le_bytes());
    capsule.resize(4096, 0);
    stream.write_all(&capsule).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = Vec::new();
    // Closed, or reset where some of it was not read.
    let _end = stream.read_to_end(&mut rest);
    assert!(rest.len() <= 256, "{rest:?}");
    assert_eq!(discover(&engine, HOST).len(), 2, "the others are served as before");
}

fn local(pool: &str, id: u128) -> (ReplicaId, ChildAddress) {
    (ReplicaId(id), ChildAddress::Local { pool: pool.to_owned() })
}

/// What has replicas in pools of two shards is not made; what exists is served all the same.
#[test]
fn a_volume_is_on_the_shard_of_its_pools() {
    let engine = two();
    for (pool, id) in [("p", 11), ("q", 12), ("q", 13)] {
        engine.add_replica(pool, id, 9);
    }
    let apart = || vec![local("p", 11), local("q", 12)];
    let spec = Engine::spec("v", 9, apart());
    let refused = engine.call(|reply| Command::AddVolume { spec, reply }).unwrap_err().to_string();
    assert!(
        refused.contains("`p` is on shard 0, `q` is on shard 1") && refused.contains("nvme+tcp"),
        "{refused}"
    );

    // By its URI it is a replica like any other.
    let peer = engine.address;
    let by_uri = (ReplicaId(12), ChildAddress::Remote { peer, nqn: replica_nqn(12) });
    let volume = engine.add_volume(Engine::spec("v", 9, vec![local("p", 11), by_uri]));
    assert_eq!((volume.shard, volume.children.len()), (0, 2), "{volume:#?}");
    Client::to(&engine, "v").write(3, 7);
    let replica: VolumeReplica = local("q", 13).into();
    let name = "v".to_owned();
    let refused = engine.call(|reply| Command::AddReplica { name, replica, reply }).unwrap_err();
    assert!(refused.to_string().contains("volume `v` is on shard 0, and pool `q`"), "{refused}");
    engine.remove_volume("v");

    let spec = VolumeSpec { purpose: Purpose::Assemble, ..Engine::spec("v", 9, apart()) };
    engine.add_volume(spec);
    let volume = engine.wait("v", |v| v.state == "online");
    let far = ChildAddress::Remote { peer, nqn: replica_nqn(12) };
    assert_eq!((volume.shard, &volume.children[1].address), (0, &far), "{volume:#?}");
    assert_eq!(Client::to(&engine, "v").read(3), 7);

    // It is used, though by another shard than the one that has it.
    for id in [11, 12] {
        let used = engine.delete_replica(id).unwrap_err().to_string();
        assert!(used.contains("belongs to volume `v`"), "{used}");
    }
    engine.remove_volume("v");
    for id in [12, 11] {
        engine.delete_replica(id).unwrap();
    }
    let gone = engine.delete_replica(12);
    assert!(matches!(gone, Err(EngineError::NotFound { .. })), "{gone:?}");
}

#[test]
fn volumes_without_local_replicas_are_spread() {
    let (far, near) = (two(), Engine::start(3));
    for (at, id) in (20..26).enumerate() {
        // Of both shards of the other process.
        far.add_replica(["p", "q"][at % 2], id, id);
        let child = ChildAddress::Remote { peer: far.address, nqn: replica_nqn(id) };
        let name = format!("v{id}");
        near.add_volume(Engine::spec(&name, id, vec![(ReplicaId(id), child)]));
        Client::to(&near, &name).write(0, 1);
    }
    let shards: Vec<u16> = near.volumes().iter().map(|v| v.shard).collect();
    assert_eq!(shards, [0, 1, 2, 0, 1, 2]);
    assert_eq!(discover(&near, HOST).len(), 6);
}

#[test]
fn a_snapshot_of_volumes_on_several_shards_is_refused() {
    let engine = two();
    let take = |volumes: &[&str], id| {
        let call = SnapshotCall {
            spec: SnapshotSpec { id: SnapshotId(id), name: "s".to_owned(), created: 1 },
            clone: None,
        };
        let volumes = volumes.iter().map(|&v| v.to_owned()).collect();
        let verb = SnapshotVerb::Create;
        engine.call(|reply| Command::Snapshot { volumes, verb, call, force: false, reply })
    };
    let refused = take(&["a", "b"], 1).unwrap_err().to_string();
    assert!(refused.contains("`a` is on shard 0, `b` is on shard 1"), "{refused}");
    take(&["b"], 2).unwrap();
    let told =
        engine.call(|reply| Command::ListSnapshots { volume: "b".to_owned(), reply }).unwrap();
    assert_eq!(told.len(), 1);
}

/// The replica's shard went first, and the volume's waited for it until it gave up, after ten seconds.
#[test]
fn a_volume_over_the_network_stops_at_once_under_load() {
    let engine = two();
    engine.add_replica("p", 31, 30);
    engine.add_replica("q", 32, 30);
    let by_uri =
        (ReplicaId(32), ChildAddress::Remote { peer: engine.address, nqn: replica_nqn(32) });
    engine.add_volume(Engine::spec("v", 30, vec![local("p", 31), by_uri]));
    let mut host = Client::to(&engine, "v");
    let writer = thread::spawn(move || {
        // Until it is cut off.
        for at in 0u64.. {
            let buf = host.mem.alloc(4096).unwrap();
            let range = LbaRange::new(Lba(at % BLOCKS), 1).unwrap();
            let request = IoRequest { op: IoOp::Write { fua: false }, range, buf: buf.slice() };
            let queued = host.session.submit(QueueIndex(1), 1, Submit::Io(request), &mut host.mem);
            while queued.is_ok() && host.session.poll_completion().is_none() {
                if host.turn().is_err() || host.closed {
                    return;
                }
            }
            host.mem.release(buf);
        }
    });
    thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(5), "it took {:?}", start.elapsed());
    writer.join().unwrap();
}
