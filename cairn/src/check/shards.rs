//! A process with several shards, in the folder of `cairn up --check`: volumes on each of them, killed, and started
//! again with fewer and with more.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use cairn_api::v1::{self, cairn_client::CairnClient};
use indicatif::ProgressBar;
use tonic::transport::Channel;

use super::{UNIT, transfer};
use crate::client::{said, volumes};
use crate::config::{Engine, Pool};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::up::{Cluster, NexusSettings};

const SIZE: u64 = 32 << 20;
const UNITS: u64 = SIZE / UNIT as u64;
const POOLS: [&str; 2] = ["left", "right"];
const TIMEOUT: Duration = Duration::from_secs(60);

fn settings(folder: &Path, shards: u16, places: [Option<u16>; 2]) -> NexusSettings {
    let pools = POOLS.into_iter().zip(places).map(|(name, shard)| {
        let path = folder.join(format!("{name}.img")).display().to_string();
        Pool { shard, ..Pool::new(name, path, Some(ByteSize::mib(192)), true) }
    });
    let engine = Engine { shards, ..Engine::default() };
    NexusSettings { engine, pools: pools.collect(), ..NexusSettings::default() }
}

async fn replica(
    client: &mut CairnClient<Channel>,
    pool: &str,
    volume: &str,
) -> Result<v1::Replica> {
    let request = v1::CreateReplicaRequest {
        pool: pool.to_owned(),
        volume_id: volume.to_owned(),
        name: pool.to_owned(),
        size_bytes: SIZE,
        id: String::new(),
        thick: false,
    };
    Ok(client.create_replica(request).await.map_err(|s| said(&s))?.into_inner())
}

/// Makes a volume with a replica in each of these pools.
async fn make(
    client: &mut CairnClient<Channel>,
    name: &str,
    pools: &[&str],
    by_uri: bool,
) -> Result<v1::Volume> {
    let id = uuid::Uuid::new_v4().to_string();
    let mut replicas = Vec::new();
    for pool in pools {
        let made = replica(client, pool, &id).await?;
        replicas.push(if by_uri { made.uri } else { format!("local:{pool}/{}", made.id) });
    }
    let request = v1::CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes: SIZE,
        replicas,
        id,
        ..v1::CreateVolumeRequest::default()
    };
    Ok(client.create_volume(request).await.map_err(|s| said(&s))?.into_inner())
}

/// The volumes of the process, each once it is online.
async fn online(client: &mut CairnClient<Channel>, count: usize) -> Result<Vec<v1::Volume>> {
    let start = Instant::now();
    loop {
        let all = volumes(client).await?;
        if all.len() == count && all.iter().all(|v| v.state == "online") {
            return Ok(all);
        }
        if start.elapsed() > TIMEOUT {
            bail!("{count} volumes are to be online: {all:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes to all volumes, or reads them, each from a thread of its own.
fn work(volumes: &[v1::Volume], write: bool) -> Result<()> {
    let one = |volume: &v1::Volume, seed: u64| -> Result<()> {
        let peer = volume.addresses.first().context("it is exported nowhere")?.parse()?;
        let digests =
            HostConfig { header_digest: true, data_digest: true, ..HostConfig::default() };
        let config = if seed.is_multiple_of(2) { digests } else { HostConfig::default() };
        let mut host = Host::connect(&Target { peer, nqn: volume.nqn.clone() }, &config)?;
        transfer(&mut host, 0..UNITS, seed, write, &ProgressBar::hidden())
            .with_context(|| volume.name.clone())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = volumes
            .iter()
            .zip(77u64..)
            .map(|(volume, seed)| scope.spawn(move || one(volume, seed)))
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a host panicked"))??;
        }
        Ok(())
    })
}

fn places(volumes: &[v1::Volume]) -> Vec<u32> {
    volumes.iter().map(|volume| volume.shard).collect()
}

pub(super) async fn run(cluster: &Cluster, folder: &Path) -> Result<()> {
    let name = "several";
    // Round and round.
    let mut two = settings(folder, 2, [None, None]);
    let (mut process, mut client) = cluster.start_other(name, &two).await?;
    // Its own replicas are known by where it is.
    let port = process.address.parse::<SocketAddr>().context("its address")?.port();
    two.port = port;
    make(&mut client, "on-left", &POOLS[..1], false).await?;
    make(&mut client, "on-right", &POOLS[1..], false).await?;
    let made = make(&mut client, "apart", &POOLS, false).await;
    let refused = made.err().context("a volume with local replicas on two shards was made")?;
    let text = format!("{refused:#}");
    ensure!(text.contains("`left` is on shard 0, `right` is on shard 1"), "refused: {text}");
    make(&mut client, "by-uri", &POOLS, true).await?;
    let all = online(&mut client, 3).await?;
    ensure!(places(&all) == [0, 1, 0], "they are on shards {:?}", places(&all));
    work(&all, true)?;
    work(&all, false)?;
    let info = client.get_info(v1::GetInfoRequest {}).await.map_err(|s| said(&s))?.into_inner();
    ensure!(info.shards == 2, "it has {} shards", info.shards);

    // It dies, and comes back; then with one shard, where replicas of both pools are local to all.
    process.kill()?;
    let (mut process, mut client) = cluster.start_other(name, &two).await?;
    work(&online(&mut client, 3).await?, false)?;
    process.kill()?;
    let one = NexusSettings { port, ..settings(folder, 1, [None, None]) };
    let (mut process, mut client) = cluster.start_other(name, &one).await?;
    make(&mut client, "apart", &POOLS, false).await?;
    let all = online(&mut client, 4).await?;
    ensure!(places(&all) == [0; 4], "they are on shards {:?}", places(&all));
    work(&all[..3], false)?;
    work(&all, true)?;

    // With more shards again, and each pool elsewhere: what was made for one shard is served all the same.
    process.kill()?;
    let three = NexusSettings { port, ..settings(folder, 3, [Some(2), Some(1)]) };
    let (mut process, mut client) = cluster.start_other(name, &three).await?;
    let all = online(&mut client, 4).await?;
    ensure!(places(&all)[..2] == [2, 1], "they are on shards {:?}", places(&all));
    let far = all[3].children.iter().filter(|c| c.uri.starts_with("nvme+tcp://")).count();
    ensure!(far == 1, "of `apart` {far} replicas are reached over the network");
    work(&all, false)?;
    work(&all, true)?;

    let request = v1::DeleteVolumeRequest { name: "on-right".to_owned() };
    client.delete_volume(request).await.map_err(|s| said(&s))?;
    let held = client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
    let held = held.into_inner().replicas;
    let delete = |id: &str| v1::DeleteReplicaRequest { id: id.to_owned() };
    for child in &all[1].children {
        client.delete_replica(delete(&child.replica_id)).await.map_err(|s| said(&s))?;
    }
    for child in &all[3].children {
        let refused = client.delete_replica(delete(&child.replica_id)).await;
        ensure!(refused.is_err(), "a replica of `apart` was deleted, of {held:?}");
    }
    work(&online(&mut client, 3).await?[..1], false)?;

    // A pool of a call is where it is wished, and stays there.
    let pool = |shard| v1::CreatePoolRequest {
        name: "made".to_owned(),
        path: folder.join("made.img").display().to_string(),
        size_bytes: 32 << 20,
        shard: Some(shard),
        ..v1::CreatePoolRequest::default()
    };
    let refused = client.create_pool(pool(3)).await;
    let said_why = refused.as_ref().is_err_and(|s| s.message().contains("from 0 to 2"));
    ensure!(said_why, "a pool is on a shard that is not there: {refused:?}");
    client.create_pool(pool(1)).await.map_err(|s| said(&s))?;
    process.kill()?;
    let (mut process, mut client) = cluster.start_other(name, &three).await?;
    let pools = client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
    let pools: Vec<_> = pools.into_inner().pools.into_iter().map(|p| (p.name, p.shard)).collect();
    let wanted = [("left", 2), ("right", 1), ("made", 1)].map(|(name, at)| (name.to_owned(), at));
    ensure!(pools == wanted, "pools are on {pools:?}");
    process.kill()?;
    say!(
        "  several shards in a process: volumes on each, killed, and started with fewer and with more"
    );
    Ok(())
}
