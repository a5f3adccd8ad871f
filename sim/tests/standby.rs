//! Two machines that share a volume, and a network that is cut.

use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Roles, Tuning, Workload, World};

fn work(requests: u64) -> Workload {
    Workload { requests, kato_ms: 60_000, ..Workload::default() }
}

fn cluster(seed: u64) -> Cluster {
    let config = ClusterConfig {
        local_replica: true,
        tears: false,
        second: true,
        second_local: true,
        tuning: Tuning {
            roles: Some(Roles { auto_after_ms: [Some(500), Some(500)] }),
            ..Tuning::default()
        },
        ..ClusterConfig::default()
    };
    let mut cluster = Cluster::new(World::new(seed), config);
    cluster.add_client(0, work(100));
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "the writes end");
    cluster.run_while(5_000 * MS, |_| false);
    cluster
}

/// A host whose connection to the process that served was whole waited for as long as that one was cut off from the
/// replicas: it held what the host sent, while another process served the volume. And where it gave that up with
/// nothing left to wait for, what it answered was lost.
#[test]
fn a_process_that_is_cut_off_from_the_replicas_tells_its_hosts() {
    for seed in 0..10 {
        let mut cluster = cluster(seed);
        let cut_off = cluster.active_machine();
        for at in 0..cluster.pools() {
            let other = cluster.machine_of(at);
            if other != cut_off {
                cluster.world().block(cut_off, other, 600_000 * MS);
                cluster.world().block(other, cut_off, 600_000 * MS);
            }
        }
        cluster.work_more(50);
        let done = cluster.run_while(20_000 * MS, Cluster::clients_are_done);
        assert!(done, "seed {seed}: a host waits for a process that is cut off");
        cluster.history(0).borrow_mut().judge_all();
    }
}
