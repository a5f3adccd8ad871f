//! A snapshot is deleted while a replica is away: the replica has it when it comes back, and deletes it.

mod common;

use cairn_engine::nexus::Purpose;
use cairn_sim::Cluster;
use cairn_sim::world::MS;
use common::cluster;

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
