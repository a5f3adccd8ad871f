//! A machine that loses power while nothing is written.

use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Workload, World};

fn cluster(seed: u64) -> Cluster {
    let mut cluster = Cluster::new(World::new(seed), ClusterConfig::default());
    cluster.add_client(0, Workload { reads_per_mille: 0, ..Workload::default() });
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "the writes end");
    cluster
}

fn come_back_and_check(mut cluster: Cluster) {
    cluster.start_replica(0);
    cluster.run_while(5_000 * MS, |_| false);
    cluster.verify();
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "every block can be read");
    cluster.compare(false);
    cluster.history(0).borrow_mut().judge_all();
}

/// What a killed process had written stays: it comes back in sync.
#[test]
fn a_replica_that_was_killed_while_idle_is_in_sync() {
    for seed in 0..10 {
        let mut cluster = cluster(seed);
        cluster.kill_replica(0);
        come_back_and_check(cluster);
    }
}

/// What a machine had in its disks' volatile caches does not. No write had failed meanwhile, so the nexus
/// took the replica back as in sync, and acked writes were gone without the host having seen a failure.
/// Now the register tells which life of its machine a replica is in.
#[test]
fn a_replica_that_lost_power_while_idle_is_not_in_sync() {
    for seed in 0..10 {
        let mut cluster = cluster(seed);
        cluster.cut_power(0);
        come_back_and_check(cluster);
    }
}
