//! A small cluster that hosts have written to.

use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Tuning, Workload, World};

/// One volume on three replicas, of which the first may be in the process of the nexus.
pub(crate) fn cluster(seed: u64, local_replica: bool) -> Cluster {
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
