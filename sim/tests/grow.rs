//! A volume grows while one of its replicas is away and nothing is written: the replica stays in sync, and
//! is too small when it comes back.

mod common;

use cairn_engine::nexus::Purpose;
use cairn_sim::Cluster;
use cairn_sim::world::MS;
use common::cluster;

fn check(mut cluster: Cluster) {
    cluster.run_while(10_000 * MS, |_| false);
    cluster.verify();
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "every block can be read");
    let report = cluster.volumes().expect("the nexus runs").remove(0);
    assert_eq!((report.blocks, report.state.as_str()), (5000, "online"), "{report:?}");
    // Sizes among the rest.
    cluster.compare(false);
}

#[test]
fn a_replica_that_was_away_grows_when_it_is_back() {
    for seed in 0..10 {
        let mut cluster = cluster(seed, seed % 3 == 0);
        cluster.kill_replica(1);
        cluster.run_while(3_000 * MS, |_| false);
        cluster.grow_volume(0, 5000);
        cluster.run_while(3_000 * MS, |_| false);
        cluster.start_replica(1);
        check(cluster);
    }
}

#[test]
fn and_so_it_does_under_a_nexus_that_started_anew() {
    for seed in 0..10 {
        let mut cluster = cluster(seed, seed % 3 == 0);
        cluster.kill_replica(1);
        cluster.run_while(3_000 * MS, |_| false);
        cluster.grow_volume(0, 5000);
        cluster.run_while(3_000 * MS, |_| false);
        cluster.kill_nexus();
        cluster.start_replica(1);
        cluster.start_nexus(Purpose::Assemble);
        check(cluster);
    }
}
