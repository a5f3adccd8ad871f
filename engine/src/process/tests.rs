use std::sync::mpsc;

use cairn_block::{Epoch, PoolDeviceId, SnapshotVerb, VolumeId};
use cairn_replica::SnapshotSpec;

use super::*;
use crate::control::{ChildReport, ExportCounters, ScrubAction};
use crate::snapshot::SnapshotCall;

/// What reached which shard.
type Seen = mpsc::Receiver<(u16, Input)>;

fn router(shards: u16) -> (Arc<Router>, Seen) {
    let (tx, rx) = mpsc::channel();
    let tx = Mutex::new(tx);
    let way = move |shard, input| tx.lock().send((shard, input)).unwrap();
    (Arc::new(Router::new(shards, Box::new(way))), rx)
}

/// An answer, and where it is to be seen.
fn answer<T: Send + 'static>() -> (Reply<T>, mpsc::Receiver<Result<T, EngineError>>) {
    let (tx, rx) = mpsc::channel();
    (Reply::new(move |result| tx.send(result).unwrap()), rx)
}

fn next(seen: &Seen) -> (u16, Command) {
    match seen.try_recv().expect("a command is on its way") {
        (shard, Input::Command(command)) => (shard, command),
        (_, Input::Message(message)) => panic!("{message:?}"),
    }
}

fn child(pool: &str, id: u128) -> VolumeReplica {
    (ReplicaId(id), ChildAddress::Local { pool: pool.to_owned() }).into()
}

fn far(id: u128) -> VolumeReplica {
    let peer = "192.0.2.1:4420".parse().unwrap();
    (ReplicaId(id), ChildAddress::Remote { peer, nqn: replica_nqn(ReplicaId(id)) }).into()
}

fn spec(name: &str, children: Vec<VolumeReplica>) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId(1),
        name: name.to_owned(),
        nqn: format!("nqn.2026-11.io.cairn:{name}"),
        blocks: 1,
        block_size: None,
        children,
        encryption: None,
        purpose: Purpose::Create,
        child_deadline_ms: 1,
        allowed_hosts: None,
        sharing: None,
        iscsi: None,
    }
}

/// Adds a volume; the shard that was asked, which answers so.
fn add(router: &Arc<Router>, seen: &Seen, spec: VolumeSpec, said: &Result<(), EngineError>) -> u16 {
    let (reply, told) = answer();
    router.send(AnyCommand::AddVolume { spec, reply });
    let (shard, command) = next(seen);
    let AnyCommand::AddVolume { reply, .. } = command else { panic!("{command:?}") };
    reply.send(said.clone());
    assert_eq!(told.recv().unwrap(), *said);
    shard
}

fn refused(router: &Arc<Router>, seen: &Seen, spec: VolumeSpec) -> EngineError {
    let (reply, told) = answer();
    router.send(AnyCommand::AddVolume { spec, reply });
    assert!(seen.try_recv().is_err(), "nobody is asked");
    told.recv().unwrap().unwrap_err()
}

/// With pools `p0`, `p1`, ... one after the other.
fn with_pools(shards: u16, pools: usize) -> (Arc<Router>, Seen) {
    let (router, seen) = router(shards);
    for at in 0..pools {
        router.enter_pool(&format!("p{at}")).unwrap();
    }
    (router, seen)
}

#[test]
fn pools_go_round_and_where_they_are_wished() {
    let (router, _seen) = router(3);
    router.place_pool("fast", 2).unwrap();
    let refused = router.place_pool("slow", 3).unwrap_err().to_string();
    assert!(refused.contains("no shard 3"), "{refused}");
    let shards: Vec<u16> =
        ["a", "fast", "b", "c", "d"].iter().map(|pool| router.enter_pool(pool).unwrap()).collect();
    assert_eq!(shards, [0, 2, 1, 2, 0]);
    let again = router.enter_pool("a").unwrap_err();
    assert!(matches!(again, EngineError::Exists { kind: "pool", .. }), "{again:?}");
}

#[test]
fn a_pool_that_could_not_be_added_is_nowhere() {
    let (router, _seen) = with_pools(2, 1);
    let (reply, told) = answer();
    let reply = router.or_forget(reply, |places| {
        places.pools.retain(|(pool, _)| pool != "p0");
    });
    reply.send(Err(EngineError::Stopped));
    assert_eq!(told.recv().unwrap(), Err(EngineError::Stopped));
    router.enter_pool("p0").unwrap();
}

#[test]
fn a_volume_is_where_its_pools_are_and_the_others_are_spread() {
    let (router, seen) = with_pools(3, 4);
    assert_eq!(add(&router, &seen, spec("local", vec![far(9), child("p1", 1)]), &Ok(())), 1);
    let both = spec("both", vec![child("p0", 2), child("p3", 3)]);
    assert_eq!(add(&router, &seen, both, &Ok(())), 0, "both pools are there");
    assert_eq!(add(&router, &seen, spec("x", vec![far(4)]), &Ok(())), 2, "it has the fewest");
    assert_eq!(add(&router, &seen, spec("y", vec![far(5)]), &Ok(())), 0);
    // Of a pool that is not there the shard knows what to say.
    assert_eq!(add(&router, &seen, spec("z", vec![child("nowhere", 6)]), &Ok(())), 1);

    let taken = refused(&router, &seen, spec("x", vec![far(7)]));
    assert!(matches!(taken, EngineError::Exists { kind: "volume", .. }), "{taken:?}");
    let apart = refused(&router, &seen, spec("apart", vec![child("p0", 7), child("p2", 8)]));
    let text = apart.to_string();
    assert!(text.contains("`p0` is on shard 0, `p2` is on shard 2"), "{text}");

    // One that is refused leaves nothing behind.
    let no = Err(EngineError::Invalid("no".to_owned()));
    assert_eq!(add(&router, &seen, spec("w", vec![far(7)]), &no), 2);
    assert_eq!(add(&router, &seen, spec("w", vec![far(7)]), &Ok(())), 2);
}

#[test]
fn a_volume_that_exists_reaches_pools_of_other_shards_over_the_network() {
    let (router, seen) = with_pools(2, 3);
    let advertise: SocketAddr = "192.0.2.7:4420".parse().unwrap();
    router.places.lock().addresses.push(advertise);
    let (reply, _told) = answer();
    let children = vec![child("p1", 1), child("p0", 2), child("p2", 3), far(4)];
    let spec = VolumeSpec { purpose: Purpose::Assemble, ..spec("v", children) };
    router.send(AnyCommand::AddVolume { spec, reply });
    let (shard, command) = next(&seen);
    let AnyCommand::AddVolume { spec, .. } = command else { panic!("{command:?}") };
    assert_eq!(shard, 0, "most of its replicas are there");
    let over = ChildAddress::Remote { peer: advertise, nqn: replica_nqn(ReplicaId(1)) };
    let addresses: Vec<_> = spec.children.into_iter().map(|c| c.address).collect();
    assert_eq!(addresses, [over, child("p0", 2).address, child("p2", 3).address, far(4).address]);
}

#[test]
fn commands_go_to_the_shard_of_what_they_name() {
    let (router, seen) = with_pools(4, 4);
    for (at, pool) in ["p3", "p2"].iter().enumerate() {
        add(&router, &seen, spec(&format!("v{at}"), vec![child(pool, at as u128)]), &Ok(()));
    }
    let volume = |of: &str| of.to_owned();
    let commands: Vec<(u16, Command)> = vec![
        (3, AnyCommand::RemoveVolume { name: volume("v0"), reply: answer().0 }),
        (2, AnyCommand::ResizeVolume { name: volume("v1"), blocks: 2, reply: answer().0 }),
        (3, AnyCommand::StandBy { name: volume("v0"), reply: answer().0 }),
        (2, AnyCommand::TakeOver { name: volume("v1"), reply: answer().0 }),
        (3, AnyCommand::ListSnapshots { volume: volume("v0"), reply: answer().0 }),
        (2, AnyCommand::RebuildRate { name: volume("v1"), mib_s: 1, reply: answer().0 }),
        (
            3,
            AnyCommand::ScrubVolume {
                name: volume("v0"),
                action: ScrubAction::Stop,
                reply: answer().0,
            },
        ),
        (
            3,
            AnyCommand::ShareVolume {
                name: volume("v0"),
                sharing: crate::Sharing::default(),
                reply: answer().0,
            },
        ),
        (
            3,
            AnyCommand::RemoveReplica {
                name: volume("v0"),
                replica: ReplicaId(0),
                reply: answer().0,
            },
        ),
        (
            3,
            AnyCommand::AddReplica {
                name: volume("v0"),
                replica: child("p3", 7),
                reply: answer().0,
            },
        ),
        (
            1,
            AnyCommand::RemoveDevice {
                pool: volume("p1"),
                device: PoolDeviceId(1),
                reply: answer().0,
            },
        ),
        (
            2,
            AnyCommand::GrowPool {
                pool: volume("p2"),
                device: PoolDeviceId(1),
                device_len: 1,
                reply: answer().0,
            },
        ),
        // The first says that there is none.
        (0, AnyCommand::StandBy { name: volume("none"), reply: answer().0 }),
    ];
    for (wanted, command) in commands {
        let what = format!("{command:?}");
        router.send(command);
        assert_eq!(next(&seen).0, wanted, "{what}");
    }
    let (reply, told) = answer();
    let (name, replica) = (volume("v0"), child("p1", 8));
    router.send(AnyCommand::AddReplica { name, replica, reply });
    let refused = told.recv().unwrap().unwrap_err().to_string();
    assert!(refused.contains("volume `v0` is on shard 3, and pool `p1` on shard 1"), "{refused}");
    assert!(seen.try_recv().is_err());
}

#[test]
fn a_volume_is_forgotten_once_it_is_removed() {
    let (router, seen) = with_pools(2, 2);
    add(&router, &seen, spec("v", vec![child("p1", 1)]), &Ok(()));
    for (said, known) in
        [(Err(EngineError::Busy("it is being removed".to_owned())), true), (Ok(()), false)]
    {
        let (reply, told) = answer();
        router.send(AnyCommand::RemoveVolume { name: "v".to_owned(), reply });
        let (shard, command) = next(&seen);
        let AnyCommand::RemoveVolume { reply, .. } = command else { panic!("{command:?}") };
        assert_eq!(shard, 1);
        reply.send(said.clone());
        assert_eq!(told.recv().unwrap(), said);
        assert_eq!(router.places.lock().volume("v").is_some(), known);
    }
}

/// Two remove it, and somebody adds another of its name before the second is told that it is gone.
#[test]
fn a_late_answer_forgets_nothing_that_came_since() {
    let (router, seen) = with_pools(2, 2);
    add(&router, &seen, spec("v", vec![child("p1", 1)]), &Ok(()));
    let remove = || {
        let (reply, told) = answer::<()>();
        router.send(AnyCommand::RemoveVolume { name: "v".to_owned(), reply });
        match next(&seen) {
            (1, AnyCommand::RemoveVolume { reply, .. }) => (reply, told),
            other => panic!("{other:?}"),
        }
    };
    let (first, second) = (remove(), remove());
    first.0.send(Ok(()));
    add(&router, &seen, spec("v", vec![child("p0", 2)]), &Ok(()));
    second.0.send(Err(EngineError::NotFound { kind: "volume", name: "v".to_owned() }));
    assert_eq!(router.places.lock().volume("v"), Some(0));
}

#[test]
fn a_listener_is_the_first_shards_and_all_hear_of_it_before() {
    let (router, seen) = router(3);
    let (listener, advertise) = crate::thread::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    router.send(AnyCommand::AddListener { listener, advertise, reply: answer().0 });
    for wanted in [1, 2] {
        let (shard, input) = seen.try_recv().unwrap();
        assert_eq!(shard, wanted);
        assert!(matches!(input, Input::Message(Message::Listening(a)) if a == advertise));
    }
    assert!(matches!(next(&seen), (0, AnyCommand::AddListener { .. })));
}

fn report(name: &str, children: Vec<ChildReport>) -> VolumeReport {
    VolumeReport {
        id: VolumeId(1),
        name: name.to_owned(),
        nqn: String::new(),
        blocks: 1,
        state: String::new(),
        detail: String::new(),
        unfit: String::new(),
        serving: true,
        epoch: Epoch(1).0,
        children,
        hosts: Vec::new(),
        iscsi: None,
        counters: ExportCounters::default(),
        in_flight: 0,
        block_size: cairn_block::BlockSize::B4096,
        encryption: None,
        mends: cairn_nexus::MendCounters::default(),
        scrub: None,
        rebuild: None,
        rebuilt: Vec::new(),
        unreconciled: (0, 0),
        shard: 0,
    }
}

/// Answers the lists of volumes that all shards are asked for.
fn list(seen: &Seen, told: Vec<Vec<VolumeReport>>) {
    for (wanted, volumes) in told.into_iter().enumerate() {
        let (shard, command) = next(seen);
        let AnyCommand::ListVolumes { reply } = command else { panic!("{command:?}") };
        assert_eq!(usize::from(shard), wanted);
        reply.send(Ok(volumes));
    }
}

#[test]
fn lists_are_put_together_in_the_order_in_which_things_came() {
    let (router, seen) = with_pools(2, 2);
    for (name, pool) in [("first", "p1"), ("second", "p0"), ("third", "p1")] {
        add(&router, &seen, spec(name, vec![child(pool, 1)]), &Ok(()));
    }
    let (reply, told) = answer();
    router.send(AnyCommand::ListVolumes { reply });
    let of = |name| report(name, Vec::new());
    list(&seen, vec![vec![of("second")], vec![of("third"), of("first")]]);
    let names: Vec<_> = told.recv().unwrap().unwrap().into_iter().map(|v| v.name).collect();
    assert_eq!(names, ["first", "second", "third"]);

    // Where a shard is gone nobody takes the rest for everything.
    let (reply, told) = answer::<Vec<VolumeReport>>();
    router.send(AnyCommand::ListVolumes { reply });
    drop(next(&seen));
    assert!(told.recv().is_err());
}

#[test]
fn who_has_nothing_is_not_woken_for_a_list() {
    let (router, seen) = with_pools(8, 5);
    add(&router, &seen, spec("v", vec![child("p3", 1)]), &Ok(()));
    let (reply, told) = answer();
    router.send(AnyCommand::ListVolumes { reply });
    for wanted in [0, 3] {
        let (shard, command) = next(&seen);
        let AnyCommand::ListVolumes { reply } = command else { panic!("{command:?}") };
        assert_eq!(shard, wanted);
        reply.send(Ok(Vec::new()));
    }
    assert_eq!(told.recv().unwrap(), Ok(Vec::new()));
    let (reply, told) = answer();
    router.send(AnyCommand::ListReplicas { reply });
    for wanted in 0..5 {
        let (shard, command) = next(&seen);
        let AnyCommand::ListReplicas { reply } = command else { panic!("{command:?}") };
        assert_eq!(shard, wanted);
        reply.send(Ok(Vec::new()));
    }
    assert_eq!(told.recv().unwrap(), Ok(Vec::new()));
}

#[test]
fn a_replica_is_deleted_by_whoever_has_it() {
    let (router, seen) = with_pools(3, 3);
    for (name, pool) in [("x", "p0"), ("v", "p1"), ("y", "p2")] {
        add(&router, &seen, spec(name, vec![child(pool, 1)]), &Ok(()));
    }
    let ask = |volumes: Vec<Vec<VolumeReport>>| {
        let (reply, told) = answer();
        router.send(AnyCommand::DeleteReplica { replica: ReplicaId(7), reply });
        list(&seen, volumes);
        told
    };
    let none = || vec![Vec::new(), Vec::new(), Vec::new()];
    let missing = || Err(EngineError::NotFound { kind: "replica", name: ReplicaId(7).to_string() });
    let asked = |wanted: u16, said| {
        let (shard, command) = next(&seen);
        let AnyCommand::DeleteReplica { reply, .. } = command else { panic!("{command:?}") };
        assert_eq!(shard, wanted);
        reply.send(said);
    };
    let told = ask(none());
    asked(0, missing());
    asked(1, Ok(()));
    assert_eq!(told.recv().unwrap(), Ok(()));

    let told = ask(none());
    for shard in 0..3 {
        asked(shard, missing());
    }
    assert_eq!(told.recv().unwrap(), missing());

    let used = ChildReport {
        number: 0,
        replica: ReplicaId(7),
        witness: false,
        address: far(7).address,
        state: String::new(),
        reason: String::new(),
        in_sync: true,
        connected: true,
        load: 0,
    };
    let told = ask(vec![Vec::new(), vec![report("v", vec![used])], Vec::new()]);
    let busy = told.recv().unwrap().unwrap_err();
    assert!(busy.to_string().contains("belongs to volume `v`"), "{busy}");
    assert!(seen.try_recv().is_err());
}

#[test]
fn a_snapshot_of_several_volumes_is_one_shards() {
    let (router, seen) = with_pools(2, 4);
    for (name, pool) in [("a", "p0"), ("b", "p2"), ("c", "p1")] {
        add(&router, &seen, spec(name, vec![child(pool, 1)]), &Ok(()));
    }
    let take = |volumes: &[&str]| {
        let (reply, told) = answer();
        let call = SnapshotCall {
            spec: SnapshotSpec { id: cairn_block::SnapshotId(1), name: String::new(), created: 0 },
            clone: None,
        };
        let volumes = volumes.iter().map(|&name| name.to_owned()).collect();
        let verb = SnapshotVerb::Create;
        router.send(AnyCommand::Snapshot { volumes, verb, call, force: false, reply });
        told
    };
    for (volumes, shard) in [(&["a", "b"][..], 0), (&["c"], 1), (&["none"], 0), (&["c", "none"], 1)]
    {
        let _told = take(volumes);
        assert_eq!(next(&seen).0, shard, "{volumes:?}");
    }
    let refused = take(&["a", "c"]).recv().unwrap().unwrap_err().to_string();
    assert!(refused.contains("`a` is on shard 0, `c` is on shard 1"), "{refused}");
    assert!(seen.try_recv().is_err());
}

#[test]
fn all_shards_stop_before_that_is_told() {
    let (router, seen) = router(3);
    let (reply, told) = answer();
    router.send(AnyCommand::Shutdown { reply });
    for shard in 0..3 {
        assert!(told.try_recv().is_err());
        let (of, command) = next(&seen);
        let AnyCommand::Shutdown { reply } = command else { panic!("{command:?}") };
        assert_eq!(of, shard);
        reply.send(Ok(()));
    }
    assert_eq!(told.recv().unwrap(), Ok(()));
}

#[test]
fn volumes_that_use_other_shards_stop_before_those() {
    let (router, seen) = with_pools(3, 3);
    router.places.lock().addresses.push("192.0.2.1:4420".parse().unwrap());
    add(&router, &seen, spec("v", vec![child("p1", 1), far(2)]), &Ok(()));
    let (reply, told) = answer();
    router.send(AnyCommand::Shutdown { reply });
    let stop = |wanted: u16| {
        let (of, command) = next(&seen);
        let AnyCommand::Shutdown { reply } = command else { panic!("{command:?}") };
        assert_eq!(of, wanted);
        reply
    };
    let first = stop(1);
    assert!(seen.try_recv().is_err(), "the others wait");
    first.send(Ok(()));
    let rest = [stop(0), stop(2)];
    assert!(told.try_recv().is_err());
    rest.into_iter().for_each(|reply| reply.send(Ok(())));
    assert_eq!(told.recv().unwrap(), Ok(()));
}

#[test]
fn one_shard_gets_everything() {
    let (router, seen) = router(1);
    let (reply, _told) = answer();
    router.send(AnyCommand::AddVolume { spec: spec("v", vec![far(1)]), reply });
    assert!(matches!(next(&seen), (0, AnyCommand::AddVolume { .. })));
    router.send(AnyCommand::ListVolumes { reply: answer().0 });
    assert!(matches!(next(&seen), (0, AnyCommand::ListVolumes { .. })));
    assert!(router.places.lock().volumes.is_empty());
}
