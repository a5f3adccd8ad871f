//! Standbys that the configuration file names, in the cluster of `cairn up --check`: set up before the process that
//! serves is there, taking over when it is dead from the start; and what a standby learns by itself, and says that
//! it lacks: blocks of another size, the key, members that came later or are elsewhere.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cairn_api::v1::{self, cairn_client::CairnClient};
use cairn_engine::block::BlockSize;
use tonic::transport::Channel;

use super::keep;
use crate::client::{WITNESS_BYTES, connect, said, volumes};
use crate::config::{Interval, Standby};
use crate::nvme::{Host, HostConfig, Target};
use crate::output::say;
use crate::up::{Cluster, NexusSettings, REPLICAS};

const NAME: &str = "stand";
/// The process of the cluster whose replica moves.
const MOVES: usize = 1;
/// What is waited for happens within this time.
const TIMEOUT: Duration = Duration::from_secs(60);

async fn until(
    client: &mut CairnClient<Channel>,
    what: &str,
    wanted: impl Fn(&v1::Volume) -> bool,
) -> Result<v1::Volume> {
    let start = Instant::now();
    loop {
        let all = volumes(client).await?;
        let volume = all.into_iter().find(|v| v.name == NAME);
        match volume {
            Some(volume) if wanted(&volume) => return Ok(volume),
            volume if start.elapsed() > TIMEOUT => bail!("`{NAME}` is not {what}: {volume:?}"),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A call that is to be refused, and why.
async fn refused(
    client: &mut CairnClient<Channel>,
    request: v1::StandByVolumeRequest,
    says: &str,
) -> Result<()> {
    match client.stand_by_volume(request).await {
        Ok(_) => bail!("it stands by, and was to be refused: {says}"),
        Err(status) => {
            ensure!(status.message().contains(says), "refused for another reason: {status}");
            let left = volumes(client).await?;
            ensure!(left.iter().all(|v| v.name != NAME), "what was refused is left behind");
            Ok(())
        }
    }
}

fn standing(standby: Standby) -> NexusSettings {
    NexusSettings { standbys: vec![standby], ..NexusSettings::default() }
}

pub(super) async fn run(cluster: &mut Cluster, folder: &Path) -> Result<()> {
    let (right, wrong) = (folder.join("standby.key"), folder.join("other.key"));
    keep::write_key(&right, &[7; 32])?;
    keep::write_key(&wrong, &[8; 32])?;
    keep::make_of(cluster, NAME, Some(keep::key_file(&right)), 512).await?;
    let here = until(&mut cluster.client, "online", |v| v.state == "online").await?;
    let uri = here.children.first().context("a replica")?.uri.clone();

    // What it lacks it says at once; and one replica tells of all others.
    let mut r1 = connect(&cluster.socket("r1")).await?;
    let request = v1::StandByVolumeRequest {
        name: NAME.to_owned(),
        id: here.id.clone(),
        replicas: vec![uri.clone()],
        ..v1::StandByVolumeRequest::default()
    };
    refused(&mut r1, request.clone(), "no key was given").await?;
    let key = Some(keep::key_file(&right));
    let large = v1::StandByVolumeRequest { block_size: 4096, encryption: key, ..request.clone() };
    refused(&mut r1, large, "blocks of 512 bytes").await?;

    // The configuration names it, and nobody is there to ask at first.
    let named = Standby {
        volume: NAME.to_owned(),
        from: Some(cluster.nexus_socket()),
        id: None,
        replicas: Vec::new(),
        witnesses: Vec::new(),
        take_over_after: Interval(1),
        elsewhere: Vec::new(),
        iscsi_elsewhere: Vec::new(),
        key_file: Some(right.display().to_string()),
        key_command: Vec::new(),
    };
    cluster.kill_nexus()?;
    let settings = standing(named.clone());
    let (mut first, mut client) = cluster.start_other("s1", &settings).await?;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    ensure!(volumes(&mut client).await?.is_empty(), "nobody could tell it of the volume");
    cluster.start_nexus().await?;
    let shared = |v: &v1::Volume| v.serving && v.sharing.is_some();
    until(&mut cluster.client, "served, and shared", shared).await?;
    let stands =
        until(&mut client, "a standby", |v| v.state == "standby" && v.size_bytes > 0).await?;
    ensure!(stands.block_size == 512, "its blocks have {} bytes", stands.block_size);
    ensure!(stands.children.len() == REPLICAS, "it knows {:?}", stands.children);
    until(&mut cluster.client, "shared with it", |v| {
        v.sharing.as_ref().is_some_and(|s| s.elsewhere == stands.addresses)
    })
    .await?;

    // Both die, and only the standby comes back: it knows where the members are.
    first.kill()?;
    cluster.kill_nexus()?;
    let (mut first, mut client) = cluster.start_other("s1", &settings).await?;
    let serves = until(&mut client, "taken over", |v| v.serving).await?;
    let address = serves.addresses.first().context("it exports nothing")?.parse()?;
    let host = Host::connect(&Target { peer: address, nqn: serves.nqn }, &HostConfig::default())?;
    ensure!(host.namespace().block_size == BlockSize::B512, "hosts see other blocks");
    drop(host);

    // Another one, told of one replica and with the wrong key.
    let other = Standby {
        from: None,
        id: Some(here.id.clone()),
        replicas: vec![uri],
        key_file: Some(wrong.display().to_string()),
        ..named
    };
    let (_second, mut second) = cluster.start_other("s2", &standing(other)).await?;
    let stands =
        until(&mut second, "in want of the key", |v| v.detail.contains("expected key id")).await?;
    ensure!(stands.state == "standby", "it is {}: {}", stands.state, stands.detail);
    ensure!(stands.unfit.contains("expected key id"), "it is unfit: {}", stands.unfit);
    let take = v1::TakeOverVolumeRequest { name: NAME.to_owned() };
    let taken = second.take_over_volume(take.clone()).await;
    let said_why = taken.as_ref().is_err_and(|s| s.message().contains("expected key id"));
    ensure!(said_why, "taken over without the key: {taken:?}");
    let key = Some(keep::key_file(&right));
    let unlock = v1::UnlockVolumeRequest { name: NAME.to_owned(), key };
    second.unlock_volume(unlock).await.map_err(|s| said(&s)).context("unlocking a standby")?;
    let all = until(&mut second, "told of all members", |v| v.children.len() == REPLICAS).await?;
    ensure!(all.unfit.is_empty() && !all.detail.contains("key"), "it says: {}", all.detail);

    // A member comes, and another one is elsewhere now.
    let mut r3 = connect(&cluster.socket("r3")).await?;
    let witness = v1::CreateReplicaRequest {
        pool: "pool".to_owned(),
        volume_id: here.id.clone(),
        name: NAME.to_owned(),
        size_bytes: WITNESS_BYTES,
        id: String::new(),
        thick: false,
    };
    let witness = r3.create_replica(witness).await.map_err(|s| said(&s))?.into_inner();
    let add = |uri: String, witness| v1::AddReplicaRequest { name: NAME.to_owned(), uri, witness };
    client.add_replica(add(witness.uri, true)).await.map_err(|s| said(&s))?;
    let old: SocketAddr = cluster.processes[MOVES].address.parse()?;
    cluster.kill(MOVES)?;
    cluster.move_replica(MOVES, 0).await?;
    let new = cluster.processes[MOVES].address.clone();
    ensure!(new != old.to_string(), "it has the same port again");
    let moved = here.children.get(MOVES).context("a replica")?;
    let id = moved.replica_id.clone();
    let remove = v1::RemoveReplicaRequest { name: NAME.to_owned(), replica_id: id.clone() };
    client.remove_replica(remove).await.map_err(|s| said(&s))?;
    let uri = moved.uri.replace(&old.to_string(), &new);
    client.add_replica(add(uri.clone(), false)).await.map_err(|s| said(&s))?;
    let whole = |v: &v1::Volume| {
        let there = |c: &v1::Child| c.replica_id == id && c.uri == uri;
        v.children.len() == REPLICAS + 1 && v.children.iter().any(there)
    };
    until(&mut client, "served by all", |v| whole(v) && v.state == "online").await?;
    until(&mut second, "told of who came and who moved", whole).await?;
    first.kill()?;
    let serves = until(&mut second, "taken over", |v| v.state == "online").await?;
    ensure!(serves.children.iter().all(|c| c.connected), "it lacks some: {:?}", serves.children);
    say!(
        "  standbys of the configuration file: set up late, taken over from the dead, members and blocks learnt, \
         wrong keys told"
    );

    let delete = v1::DeleteVolumeRequest { name: NAME.to_owned() };
    second.delete_volume(delete.clone()).await.map_err(|s| said(&s))?;
    cluster.start_nexus().await?;
    cluster.client.delete_volume(delete).await.map_err(|s| said(&s))?;
    cluster.kill(MOVES)?;
    cluster.move_replica(MOVES, old.port()).await?;
    for i in 1..=REPLICAS {
        let mut client = connect(&cluster.socket(&format!("r{i}"))).await?;
        let reply = client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
        for replica in reply.into_inner().replicas.into_iter().filter(|r| r.name == NAME) {
            let request = v1::DeleteReplicaRequest { id: replica.id };
            client.delete_replica(request).await.map_err(|s| said(&s))?;
        }
    }
    Ok(())
}
