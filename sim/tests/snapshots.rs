//! A snapshot is deleted while a replica is away: the replica has it when it comes back, and deletes it.

use cairn_engine::nexus::Purpose;
use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Tuning, Workload, World};

fn cluster(seed: u64, local_replica: bool) -> Cluster {
    let config = ClusterConfig {
        volumes: 1,
        blocks: 1024,
        replicas: 3,
        witness: None,
        wide_pool: None,
        spares: 0,
        local_replica,
        tears: true,
        second: false,
        second_local: false,
        disk_len: 24 << 20,
        child_deadline_ms: 1_000,
        replica_kato_ms: 1_000,
        digests: false,
        queue_entries: 64,
        volume_requests: 64,
        arena_len: 8 << 20,
        zeroed: true,
        encrypted: seed.is_multiple_of(2),
        tuning: Tuning::default(),
        small_pool: None,
    };
    let mut cluster = Cluster::new(World::new(seed), config);
    let work = Workload {
        depth: 8,
        gap_ns: 0,
        hot_blocks: 64,
        requests: 100,
        reads_per_mille: 300,
        kato_ms: 5_000,
        digests: false,
    };
    cluster.add_client(0, work);
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "the writes end");
    cluster
}

/// Two snapshots, of which the first is deleted while a replica is away.
fn missed(seed: u64) -> Cluster {
    let mut cluster = cluster(seed, seed.is_multiple_of(3));
    for id in [71, 72] {
        cluster.take_snapshot(0, id);
        cluster.run_while(2_000 * MS, |_| false);
        cluster.look_at_snapshots();
    }
    cluster.kill_replica(1);
    cluster.run_while(3_000 * MS, |_| false);
    cluster.drop_snapshot();
    cluster.run_while(2_000 * MS, |_| false);
    cluster
}

/// The replica comes back, and the first snapshot is nowhere; the second is everywhere.
fn check(mut cluster: Cluster) {
    cluster.run_while(10_000 * MS, |_| false);
    let report = cluster.volumes().expect("the nexus runs").remove(0);
    assert!(report.children.iter().all(|c| c.in_sync), "{report:?}");
    assert_eq!(cluster.snapshot_left(), None);
    assert_eq!(cluster.snapshots_deleted(), 1);
    cluster.check_snapshots();
}

#[test]
fn a_replica_that_was_away_deletes_what_it_missed() {
    for seed in 0..6 {
        let mut cluster = missed(seed);
        assert_eq!(cluster.snapshot_left(), None, "nobody else has it");
        cluster.start_replica(1);
        check(cluster);
    }
}

#[test]
fn and_so_it_does_under_a_nexus_that_started_anew() {
    for seed in 0..6 {
        let mut cluster = missed(seed);
        cluster.snapshot_left();
        cluster.kill_nexus();
        cluster.start_nexus(Purpose::Assemble);
        cluster.run_while(5_000 * MS, |_| false);
        cluster.start_replica(1);
        check(cluster);
    }
}
