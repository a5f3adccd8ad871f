//! Arenas that hosts fill while links to replicas break.

use cairn_sim::world::MS;
use cairn_sim::{Aim, Cluster, ClusterConfig, Orders, Workload, World};

/// Hosts of the volume, each with 2 MiB on its way.
const HOSTS: usize = 6;

fn cluster(seed: u64, local_replica: bool) -> Cluster {
    let config = ClusterConfig {
        local_replica,
        tears: false,
        child_deadline_ms: 2_000,
        replica_kato_ms: 2_000,
        arena_len: 5 << 20,
        ..ClusterConfig::default()
    };
    let mut cluster = Cluster::new(World::new(seed), config);
    let work = Workload {
        depth: 32,
        requests: 0,
        reads_per_mille: 0,
        kato_ms: 60_000,
        ..Workload::default()
    };
    for _ in 0..HOSTS {
        cluster.add_client(0, work.clone());
    }
    cluster.run_while(500 * MS, |_| false);
    cluster
}

/// Held requests took all memory, and no link to a replica could be made: nothing went on until hosts gave up.
#[test]
fn links_come_up_again_while_hosts_hold_all_memory() {
    for seed in 0..4 {
        let mut cluster = cluster(seed, seed % 2 == 1);
        for host in 0..HOSTS {
            let reads_per_mille = if host % 3 == 2 { 500 } else { 0 };
            cluster.order(
                host,
                Orders {
                    requests: 2_000,
                    depth: 32,
                    gap_ns: 0,
                    reads_per_mille,
                    flushes_per_mille: 0,
                    fua_per_mille: 0,
                    aim: Aim::Sweep,
                },
            );
        }
        let nexus = cluster.active_machine();
        let mut resets = 0;
        let mut silent = false;
        for _ in 0..400 {
            if cluster.clients_are_done() {
                break;
            }
            // Long enough for hosts to fill the memory that is left, or not at all.
            let for_ns = [0, 40 * MS, 300 * MS][resets % 3];
            resets += 1;
            for at in 0..cluster.pools() {
                let machine = cluster.machine_of(at);
                if machine == nexus {
                    continue;
                }
                let mut world = cluster.world();
                if for_ns > 0 {
                    world.block(nexus, machine, for_ns);
                    world.block(machine, nexus, for_ns);
                }
                world.reset(nexus, machine, 1000);
            }
            silent |= !cluster.run_while(for_ns + 150 * MS, Cluster::clients_are_done);
        }
        assert!(silent && resets > 6, "seed {seed}: {resets} resets");
        let done = cluster.run_while(20_000 * MS, Cluster::clients_are_done);
        assert!(done, "seed {seed}: {:?}", cluster.volumes());
        assert_eq!(cluster.client_errors(), 0, "seed {seed}");
        cluster.verify();
        assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "all can be read");
        cluster.history(0).borrow_mut().judge_all();
    }
}
