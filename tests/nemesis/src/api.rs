//! The processes' own interface: to make volumes, and to ask how they are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use cairn_api::v1::{self, cairn_client::CairnClient};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::net;
use crate::nodes::{POOL, socket};
use crate::shared::{Phase, Shared};
use crate::volume::View;

pub(crate) type Client = CairnClient<Channel>;

/// How often each process is asked.
const EVERY: Duration = Duration::from_millis(150);
/// A process that does not answer for so long is asked anew.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// The cluster is there within this time.
const SETUP: Duration = Duration::from_secs(60);
/// A block.
const BLOCK: u64 = 4096;

pub(crate) async fn connect(path: &Path) -> Result<Client> {
    let path = path.to_owned();
    let channel = Endpoint::from_static("http://cairn.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await?;
    Ok(CairnClient::new(channel))
}

pub(crate) fn said(status: &tonic::Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Which node a replica is on.
pub(crate) type Places = BTreeMap<String, usize>;

/// Makes the volumes, shared as the seed says. Tells where their replicas are.
pub(crate) fn set_up(shared: &Shared, dir: &Path) -> Result<Places> {
    runtime()?.block_on(async {
        let mut clients = Vec::new();
        let until = Instant::now() + SETUP;
        for node in 0..crate::plan::NODES {
            clients.push(loop {
                match connect(&socket(dir, node)).await {
                    Ok(client) => break client,
                    Err(error) if Instant::now() > until => {
                        return Err(error.context(format!("n{} does not answer", node + 1)));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            });
        }
        let mut places = Places::new();
        for volume in &shared.volumes {
            let (name, id, shape) = {
                let volume = volume.lock();
                (volume.name.clone(), volume.id.clone(), volume.shape.clone())
            };
            let encryption = shape.encrypted.then(|| key(dir, &name)).transpose()?;
            let mut members = Vec::new();
            for node in shape.data.iter().chain(&shape.witness).copied() {
                let witness = shape.witness == Some(node);
                let size_bytes = if witness { BLOCK } else { shared.blocks * BLOCK };
                let request = v1::CreateReplicaRequest {
                    pool: POOL.to_owned(),
                    volume_id: id.clone(),
                    name: name.clone(),
                    size_bytes,
                    ..Default::default()
                };
                let made = clients[node].create_replica(request).await.map_err(|s| said(&s))?;
                let made = made.into_inner();
                places.insert(made.id.clone(), node);
                members.push((node, witness, made.id));
            }
            let as_seen_by = |node: usize, witness: bool| -> Vec<String> {
                let these = members.iter().filter(|(_, is_witness, _)| *is_witness == witness);
                let uri = |(at, _, id): &(usize, bool, String)| match *at == node {
                    true => format!("local:{POOL}/{id}"),
                    false => format!(
                        "nvme+tcp://{}/nqn.2026-11.io.cairn:replica:{id}",
                        net::address(*at)
                    ),
                };
                these.map(uri).collect()
            };
            let request = v1::CreateVolumeRequest {
                name: name.clone(),
                size_bytes: shared.blocks * BLOCK,
                replicas: as_seen_by(shape.home, false),
                witnesses: as_seen_by(shape.home, true),
                id: id.clone(),
                encryption: encryption.clone(),
                ..Default::default()
            };
            clients[shape.home].create_volume(request).await.map_err(|s| said(&s))?;
            let mut sides = shape.standbys.clone();
            sides.push(shape.home);
            let elsewhere = |node: usize| {
                let others = sides.iter().filter(|side| **side != node);
                others.map(|side| net::address(*side).to_string()).collect::<Vec<_>>()
            };
            if shape.standbys.is_empty() {
                continue;
            }
            let sharing = v1::Sharing { elsewhere: elsewhere(shape.home), ..Default::default() };
            let sharing = v1::Sharing { auto: true, auto_after_ms: 1_000, ..sharing };
            let share =
                v1::ShareVolumeRequest { name: name.clone(), sharing: Some(sharing.clone()) };
            clients[shape.home].share_volume(share).await.map_err(|s| said(&s))?;
            for &node in &shape.standbys {
                let request = v1::StandByVolumeRequest {
                    name: name.clone(),
                    id: id.clone(),
                    replicas: as_seen_by(node, false),
                    witnesses: as_seen_by(node, true),
                    block_size: 4096,
                    encryption: encryption.clone(),
                    sharing: Some(v1::Sharing { elsewhere: elsewhere(node), ..sharing.clone() }),
                    ..Default::default()
                };
                let made = clients[node].stand_by_volume(request).await.map_err(|s| said(&s));
                made.with_context(|| format!("n{} is to stand by for {name}", node + 1))?;
            }
        }
        Ok(places)
    })
}

/// Writes a volume's key where all processes find it.
fn key(dir: &Path, name: &str) -> Result<v1::KeySource> {
    let file = dir.join(format!("{name}.key"));
    let digits = format!("{:032x}", uuid::Uuid::new_v4().as_u128());
    std::fs::write(&file, digits.repeat(2)).context("writing a key")?;
    let file = file.display().to_string();
    Ok(v1::KeySource { file, allow_open_file: true, ..Default::default() })
}

/// Asks a process to take a volume over, and does not wait for long.
pub(crate) fn take_over(dir: &Path, node: usize, name: &str) -> Result<()> {
    let request = v1::TakeOverVolumeRequest { name: name.to_owned() };
    runtime()?.block_on(async {
        let ask = async {
            let mut client = connect(&socket(dir, node)).await?;
            client.take_over_volume(request).await.map(drop).map_err(|s| said(&s))
        };
        tokio::time::timeout(PATIENCE, ask).await.unwrap_or(Ok(()))
    })
}

/// Whether a node has a pool that is offline until its process is started again.
pub(crate) fn has_failed_pool(dir: &Path, node: usize) -> Result<bool> {
    runtime()?.block_on(async {
        let ask = async {
            let mut client = connect(&socket(dir, node)).await?;
            let pools = client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
            Ok(pools.into_inner().pools.iter().any(|pool| pool.state == "failed"))
        };
        tokio::time::timeout(PATIENCE, ask).await.unwrap_or(Ok(false))
    })
}

/// Asks a node's process over and over how its volumes are, until the run ends.
pub(crate) fn watch(shared: &Arc<Shared>, dir: &Path, node: usize) -> Result<()> {
    runtime()?.block_on(async {
        let mut client: Option<Client> = None;
        while shared.phase() != Phase::End {
            tokio::time::sleep(EVERY).await;
            if !shared.is_up(node) {
                client = None;
                continue;
            }
            let tenure = shared.tenure(node);
            let asked = Instant::now();
            let ask = async {
                let mut this = match client.take() {
                    Some(client) => client,
                    None => connect(&socket(dir, node)).await?,
                };
                let list = this.list_volumes(v1::ListVolumesRequest {}).await;
                let list = list.map_err(|s| said(&s))?.into_inner().volumes;
                client = Some(this);
                Ok::<_, anyhow::Error>(list)
            };
            let answer = tokio::time::timeout(PATIENCE, ask).await;
            let Ok(Ok(list)) = answer else { continue };
            if shared.tenure(node) != tenure || !shared.is_up(node) {
                continue;
            }
            for told in list {
                let places = shared.places.lock().clone();
                observe(shared, &places, tenure, asked, &told);
            }
        }
        Ok(())
    })
}

fn observe(
    shared: &Shared,
    places: &Places,
    tenure: crate::volume::Tenure,
    asked: Instant,
    told: &v1::Volume,
) {
    let Some(volume) = shared.volumes.iter().find(|v| v.lock().name == told.name) else { return };
    let in_sync = told.children.iter().filter(|c| c.in_sync && !c.witness);
    let in_sync: BTreeSet<usize> =
        in_sync.filter_map(|child| places.get(&child.replica_id).copied()).collect();
    let serves = matches!(told.state.as_str(), "online" | "degraded" | "suspended");
    let children = told.children.iter().map(|child| {
        let at = places.get(&child.replica_id).map_or(0, |node| node + 1);
        format!("n{at} {}", child.state)
    });
    let children = children.collect::<Vec<_>>().join(", ");
    let view = View {
        state: told.state.clone(),
        detail: format!("{} [{children}]", told.detail),
        serving: told.serving && serves,
        epoch: told.epoch,
        in_sync,
    };
    let mut volume = volume.lock();
    if volume.observed(tenure, asked, view, |of| shared.died(of)) {
        let line = format!(
            "n{} has {} {} in epoch {}: {} [{children}]",
            tenure.node + 1,
            told.name,
            told.state,
            told.epoch,
            told.detail
        );
        drop(volume);
        shared.trace.say("state", &line);
    }
}
