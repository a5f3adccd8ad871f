//! A small cluster that hosts have written to.

use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Workload, World};

/// One volume on three replicas, of which the first may be in the process of the nexus.
pub(crate) fn cluster(seed: u64, local_replica: bool) -> Cluster {
    let config = ClusterConfig {
        local_replica,
        encrypted: seed.is_multiple_of(2),
        ..ClusterConfig::default()
    };
    let mut cluster = Cluster::new(World::new(seed), config);
    cluster.add_client(0, Workload::default());
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "the writes end");
    cluster
}
