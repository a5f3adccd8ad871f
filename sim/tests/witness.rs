//! A witness whose pool goes offline.

use cairn_sim::cluster::WitnessPlace;
use cairn_sim::world::MS;
use cairn_sim::{Cluster, ClusterConfig, Workload, World};

const WITNESS: usize = 4;

fn cluster(seed: u64) -> Cluster {
    let config = ClusterConfig {
        replicas: WITNESS,
        witness: Some(WitnessPlace::Apart),
        ..ClusterConfig::default()
    };
    let mut cluster = Cluster::new(World::new(seed), config);
    let work = Workload { reads_per_mille: 0, ..Workload::default() };
    cluster.add_client(0, work);
    assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "the writes end");
    cluster
}

/// The state of the witness, whether it is connected, and where the volume stands.
fn witness(cluster: &mut Cluster) -> (String, bool, String) {
    let volume = cluster.volumes().expect("the nexus runs").remove(0);
    let child = volume.children.into_iter().find(|c| c.witness).expect("there is a witness");
    (child.state, child.connected, volume.state)
}

/// Its register could not be stored, and renewals of the lease were answered from memory: it showed as healthy, and
/// was counted on.
#[test]
fn a_witness_whose_pool_is_offline_shows_as_such_until_it_is_started_again() {
    for seed in 0..10 {
        let mut cluster = cluster(seed);
        let state = witness(&mut cluster);
        assert_eq!(state, ("witness".to_owned(), true, "online".to_owned()), "seed {seed}");
        let disk = cluster.disk(WITNESS);
        cluster.world().disk(disk).trouble.eio_per_mille = 1000;
        // Something is to be stored: a replica is out, and comes back.
        cluster.kill_replica(0);
        cluster.work_more(100);
        assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "three are a majority");
        cluster.start_replica(0);
        // Hosts only write, or read, too.
        if seed % 2 == 0 {
            cluster.verify();
        }
        cluster.run_while(30_000 * MS, |_| false);
        let state = witness(&mut cluster);
        assert_eq!(state, ("offline".to_owned(), false, "online".to_owned()), "seed {seed}");
        cluster.world().disk(disk).trouble.eio_per_mille = 0;
        cluster.kill_replica(WITNESS);
        cluster.start_replica(WITNESS);
        cluster.run_while(10_000 * MS, |_| false);
        let state = witness(&mut cluster);
        assert_eq!(state, ("witness".to_owned(), true, "online".to_owned()), "seed {seed}");
        cluster.verify();
        assert!(cluster.run_while(20_000 * MS, Cluster::clients_are_done), "all can be read");
        cluster.compare(false);
        cluster.history(0).borrow_mut().judge_all();
    }
}
