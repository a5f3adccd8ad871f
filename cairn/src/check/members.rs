//! Members that come and go, in the cluster of `cairn up --check`: a replica that was killed is rebuilt; two
//! replicas and a witness survive the loss of one, which a spare takes the place of; a replica is replaced
//! while the nexus is killed; and a volume is started by force and made redundant again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cairn_api::v1;
use cairn_engine::block::{BufSlice, IoOp};
use indicatif::ProgressBar;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{UNIT, keep, read_replica, transfer};
use crate::client::{WITNESS_BYTES, connect, said, volumes};
use crate::config::{self, Interval, Spare};
use crate::output::say;
use crate::up::{Cluster, NexusSettings, VOLUME, socket_path};

/// Size of the volume of two replicas.
const SIZE: u64 = 16 << 20;
/// How much of it is written at a time.
const UNITS: u64 = (4 << 20) / UNIT as u64;
const PAIR: &str = "pair";
const COPY: &str = "pair-copy";
const SNAPSHOT: &str = "before";
/// A pool in the nexus' process, for the witness.
const SMALL: &str = "small";
/// What is waited for happens within this time.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The process with the spare pool.
const SPARE: usize = 2;

/// What the nexus is told: a replica that is gone is soon replaced by one at r3.
pub(super) fn settings(folder: &Path) -> Result<NexusSettings> {
    let socket = std::fs::canonicalize(folder)?;
    let spare = Spare { socket: Some(socket_path(&socket, "r3")), pool: "pool".to_owned() };
    let nexus = config::Nexus {
        replace_after: Interval(2),
        spares: vec![spare],
        ..config::Nexus::default()
    };
    Ok(NexusSettings {
        nexus,
        metrics: config::Metrics { listen: Some(([127, 0, 0, 1], 0).into()) },
        ..NexusSettings::default()
    })
}

async fn status(cluster: &mut Cluster, name: &str) -> Result<v1::Volume> {
    let all = volumes(&mut cluster.client).await?;
    all.into_iter().find(|v| v.name == name).with_context(|| format!("volume `{name}` is gone"))
}

/// Waits until a volume is as wanted.
async fn until(
    cluster: &mut Cluster,
    name: &str,
    what: &str,
    wanted: impl Fn(&v1::Volume) -> bool,
) -> Result<v1::Volume> {
    let start = Instant::now();
    loop {
        let volume = status(cluster, name).await?;
        if wanted(&volume) {
            return Ok(volume);
        }
        if start.elapsed() > TIMEOUT {
            bail!("volume `{name}` is not {what}: {volume:?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn in_sync(volume: &v1::Volume) -> usize {
    volume.children.iter().filter(|c| c.in_sync).count()
}

fn has(volume: &v1::Volume, id: &str) -> bool {
    volume.children.iter().any(|c| c.replica_id == id)
}

async fn make(
    cluster: &Cluster,
    process: &str,
    pool: &str,
    volume: &str,
    bytes: u64,
) -> Result<v1::Replica> {
    let mut client = connect(&cluster.socket(process)).await?;
    let request = v1::CreateReplicaRequest {
        pool: pool.to_owned(),
        volume_id: volume.to_owned(),
        name: PAIR.to_owned(),
        size_bytes: bytes,
        id: String::new(),
        thick: false,
    };
    Ok(client.create_replica(request).await.map_err(|s| said(&s))?.into_inner())
}

/// Writes a part of the pair, and flushes.
async fn write(cluster: &mut Cluster, part: u64, seed: u64) -> Result<()> {
    let mut host = keep::host(cluster, PAIR).await?;
    transfer(&mut host, part * UNITS..(part + 1) * UNITS, seed, true, &ProgressBar::hidden())?;
    host.request(IoOp::Flush, 0, 0, BufSlice::EMPTY)
}

fn read(uri: &str, parts: u64, seed: u64) -> Result<()> {
    read_replica(uri, 0..parts * UNITS, seed, &ProgressBar::hidden())
}

async fn scrape(cluster: &mut Cluster) -> Result<String> {
    let info = cluster.client.get_info(v1::GetInfoRequest {}).await.map_err(|s| said(&s))?;
    let address = info.into_inner().metrics;
    let mut stream = tokio::net::TcpStream::connect(&address).await.context("the metrics")?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: cairn\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// What the state file names for the pair, without where it is.
fn remembered(folder: &Path) -> Result<Vec<String>> {
    let state = std::fs::read(folder.join("nexus").join("volumes.json"))?;
    let json: serde_json::Value = serde_json::from_slice(&state)?;
    let all = json["volumes"].as_array().context("no volumes in the state file")?;
    let pair = all.iter().find(|v| v["name"] == PAIR).context("the pair is not remembered")?;
    let uris = ["replicas", "witnesses"].into_iter().filter_map(|list| pair[list].as_array());
    let id = |uri: &serde_json::Value| {
        uri.as_str().and_then(|uri| uri.rsplit([':', '/']).next()).unwrap_or_default().to_owned()
    };
    Ok(uris.flatten().map(id).collect())
}

pub(super) async fn run(
    cluster: &mut Cluster,
    folder: &Path,
    victim: usize,
    read_rebuilt: impl AsyncFnOnce(&mut Cluster) -> Result<()>,
) -> Result<()> {
    cluster.start_replica(victim).await?;
    let whole = |v: &v1::Volume| in_sync(v) == 3;
    let volume = until(cluster, VOLUME, "whole again", whole).await?;
    let record = volume.rebuilt.last().context("no rebuild is told of")?;
    ensure!(record.failed.is_empty(), "the rebuild was given up: {}", record.failed);
    say!("  r{} came back and was rebuilt in {:.1} s", victim + 1, record.took_ms as f64 / 1000.0);
    read_rebuilt(cluster).await?;

    let seed = u64::from(std::process::id()) << 32 | 0x9a1;
    let pair = spare(cluster, folder, victim, seed).await?;
    let request = v1::CreateSnapshotRequest {
        volumes: vec![PAIR.to_owned()],
        name: SNAPSHOT.to_owned(),
        id: String::new(),
    };
    cluster.client.create_snapshot(request).await.map_err(|s| said(&s))?;
    let pair = replaced(cluster, folder, pair, seed).await?;
    partial(cluster, &pair, seed).await?;
    forced(cluster, folder, pair, seed).await
}

/// The pair's replicas.
struct Pair {
    volume_id: String,
    old: v1::Replica,
    witness: v1::Replica,
    spare_uri: String,
}

/// Two replicas and a witness: one is killed, the volume goes on, and a spare takes its place.
async fn spare(cluster: &mut Cluster, folder: &Path, victim: usize, seed: u64) -> Result<Pair> {
    let small = v1::CreatePoolRequest {
        name: SMALL.to_owned(),
        path: std::fs::canonicalize(folder)?.join("nexus").join("small.img").display().to_string(),
        size_bytes: 32 << 20,
        ..v1::CreatePoolRequest::default()
    };
    cluster.client.create_pool(small).await.map_err(|s| said(&s))?;
    let volume_id = uuid::Uuid::new_v4().to_string();
    let first = make(cluster, "r1", "pool", &volume_id, SIZE).await?;
    let second = make(cluster, "r2", "pool", &volume_id, SIZE).await?;
    let witness = make(cluster, "nexus", SMALL, &volume_id, WITNESS_BYTES).await?;
    let request = v1::CreateVolumeRequest {
        name: PAIR.to_owned(),
        size_bytes: SIZE,
        replicas: vec![first.uri.clone(), second.uri.clone()],
        witnesses: vec![format!("local:{SMALL}/{}", witness.id)],
        id: volume_id.clone(),
        ..v1::CreateVolumeRequest::default()
    };
    cluster.client.create_volume(request).await.map_err(|s| said(&s))?;
    let foreign = cluster.replicas.first().context("a replica")?.uri.clone();
    let request = v1::AddReplicaRequest { name: PAIR.to_owned(), uri: foreign, witness: false };
    let refused = cluster.client.add_replica(request).await.err().context("it was added")?;
    ensure!(refused.message().contains("is named for volume `demo`"), "{}", refused.message());
    ensure!(remembered(folder)?.len() == 3, "{:?} are remembered", remembered(folder)?);
    write(cluster, 0, seed).await?;
    cluster.kill(victim)?;
    write(cluster, 1, seed).await?;
    let volume = until(cluster, PAIR, "degraded", |v| v.state == "degraded").await?;
    ensure!(in_sync(&volume) == 1, "{} replicas are in sync", in_sync(&volume));
    say!("  two replicas and a witness: r{} was killed, and no write failed", victim + 1);
    let text = scrape(cluster).await?;
    let line = format!("cairn_volume_state{{volume=\"{PAIR}\",state=\"degraded\"}} 1");
    ensure!(text.contains(&line), "the metrics do not say {line}:\n{text}");

    let taken = |v: &v1::Volume| in_sync(v) == 2 && v.replacement.is_none() && !has(v, &second.id);
    let volume = until(cluster, PAIR, "whole with a spare", taken).await?;
    let all = [&first.id, &witness.id];
    let new = volume.children.iter().find(|c| !all.contains(&&c.replica_id));
    let spare_uri = new.context("no spare")?.uri.clone();
    read(&spare_uri, 2, seed)?;
    say!("  a spare in r{} took its place, and holds every byte", SPARE + 1);
    cluster.start_replica(victim).await?;
    let mut client = connect(&cluster.socket("r2")).await?;
    let request = v1::DeleteReplicaRequest { id: second.id };
    client.delete_replica(request).await.map_err(|s| said(&s))?;
    Ok(Pair { volume_id, old: first, witness, spare_uri })
}

/// The first replica is replaced by a fresh one, and the nexus killed meanwhile.
async fn replaced(
    cluster: &mut Cluster,
    folder: &Path,
    pair: Pair,
    seed: u64,
) -> Result<(Pair, v1::Replica)> {
    let new = make(cluster, "r2", "pool", &pair.volume_id, SIZE).await?;
    // So slow that the nexus is killed in the midst of it.
    let slow = v1::RebuildRateRequest { name: PAIR.to_owned(), rate_mib_s: 1 };
    cluster.client.set_rebuild_rate(slow).await.map_err(|s| said(&s))?;
    let request = v1::ReplaceReplicaRequest {
        name: PAIR.to_owned(),
        replica_id: pair.old.id.clone(),
        uri: new.uri.clone(),
        now: false,
    };
    cluster.client.replace_replica(request.clone()).await.map_err(|s| said(&s))?;
    until(cluster, PAIR, "being rebuilt", |v| v.rebuild.is_some()).await?;
    ensure!(remembered(folder)?.len() == 4, "{:?} are remembered", remembered(folder)?);
    cluster.restart_nexus().await?;
    until(cluster, PAIR, "serving", |v| v.serving).await?;
    let over = |v: &v1::Volume| in_sync(v) == 2 && v.replacement.is_none() && has(v, &new.id);
    let volume = until(cluster, PAIR, "replaced", over).await?;
    ensure!(!has(&volume, &pair.old.id), "the old replica is still a member");
    // Said again, it is done already.
    cluster.client.replace_replica(request).await.map_err(|s| said(&s))?;
    let names = remembered(folder)?;
    ensure!(names.len() == 3 && !names.contains(&pair.old.id), "{names:?} are remembered");
    read(&new.uri, 2, seed)?;
    say!("  a replica was replaced by a fresh one, though the nexus was killed meanwhile");
    Ok((pair, new))
}

/// A snapshot that the fresh replica does not have: it is cloned, and the volume taken back to it.
async fn partial(
    cluster: &mut Cluster,
    (pair, new): &(Pair, v1::Replica),
    seed: u64,
) -> Result<()> {
    write(cluster, 0, seed + 2).await?;
    let mut clone = v1::CloneSnapshotRequest {
        volume: PAIR.to_owned(),
        snapshot: SNAPSHOT.to_owned(),
        name: COPY.to_owned(),
        ..v1::CloneSnapshotRequest::default()
    };
    let mut restore = v1::RestoreSnapshotRequest {
        volume: PAIR.to_owned(),
        snapshot: SNAPSHOT.to_owned(),
        // A host that has just gone may not have been missed yet.
        force: true,
        partial: false,
    };
    let refused = [
        cluster.client.clone_snapshot(clone.clone()).await.err(),
        cluster.client.restore_snapshot(restore.clone()).await.err(),
    ];
    for status in refused {
        let said = status.context("a snapshot that not all replicas have was used")?;
        ensure!(said.message().contains("is on 1 of 2 replicas"), "{}", said.message());
    }
    (clone.partial, restore.partial) = (true, true);
    let copy = cluster.client.clone_snapshot(clone).await.map_err(|s| said(&s))?.into_inner();
    ensure!(copy.children.len() == 1, "the clone has {} replicas", copy.children.len());
    let mut host = keep::host(cluster, COPY).await?;
    transfer(&mut host, 0..2 * UNITS, seed, false, &ProgressBar::hidden())?;
    drop(host);
    let request = v1::DeleteVolumeRequest { name: COPY.to_owned() };
    cluster.client.delete_volume(request).await.map_err(|s| said(&s))?;
    let mut client = connect(&cluster.socket(&format!("r{}", SPARE + 1))).await?;
    let request = v1::DeleteReplicaRequest { id: copy.children[0].replica_id.clone() };
    client.delete_replica(request).await.map_err(|s| said(&s))?;

    let volume = cluster.client.restore_snapshot(restore).await.map_err(|s| said(&s))?;
    ensure!(volume.get_ref().serving, "{:?}", volume.get_ref());
    until(cluster, PAIR, "whole after it was restored", |v| in_sync(v) == 2).await?;
    for uri in [&pair.spare_uri, &new.uri] {
        read(uri, 2, seed)?;
    }
    let request =
        v1::DeleteSnapshotRequest { volume: PAIR.to_owned(), snapshot: SNAPSHOT.to_owned() };
    cluster.client.delete_snapshot(request).await.map_err(|s| said(&s))?;
    say!("  a snapshot that one of two replicas had was cloned, and the volume taken back to it");
    Ok(())
}

/// The only replica with all writes is gone: the volume is taken from the other one.
async fn forced(
    cluster: &mut Cluster,
    folder: &Path,
    (pair, other): (Pair, v1::Replica),
    seed: u64,
) -> Result<()> {
    cluster.kill(SPARE)?;
    // What the spare misses.
    write(cluster, 1, seed + 1).await?;
    until(cluster, PAIR, "degraded", |v| in_sync(v) == 1).await?;
    cluster.kill(1)?;
    cluster.start_replica(SPARE).await?;
    let id = pair.spare_uri.rsplit(':').next().unwrap_or_default().to_owned();
    let there = |v: &v1::Volume| {
        let up = |wanted: bool, id: &str| {
            v.children.iter().any(|c| c.replica_id == id && c.connected == wanted)
        };
        up(true, &id) && up(false, &other.id)
    };
    until(cluster, PAIR, "left to the spare", there).await?;
    let mut request = v1::ForceStartVolumeRequest {
        name: PAIR.to_owned(),
        replica_id: id.clone(),
        lose_writes: false,
    };
    let told = cluster.client.force_start_volume(request.clone()).await;
    let told = told.err().context("it was started by force without being told so")?;
    let expected = "THE CHOSEN ONE, has missed acked writes, and is here";
    ensure!(told.message().contains(expected), "{}", told.message());
    request.lose_writes = true;
    let volume = cluster.client.force_start_volume(request).await.map_err(|s| said(&s))?;
    let volume = volume.into_inner();
    ensure!(volume.serving && volume.children.len() == 1, "after a start by force: {volume:?}");
    ensure!(remembered(folder)? == [id], "{:?} are remembered", remembered(folder)?);
    let mut host = keep::host(cluster, PAIR).await?;
    transfer(&mut host, 0..2 * UNITS, seed, false, &ProgressBar::hidden())?;
    drop(host);

    // The one with the lost writes, as it is: it gets a copy.
    cluster.start_replica(1).await?;
    for (uri, witness) in
        [(other.uri.clone(), false), (format!("local:{SMALL}/{}", pair.witness.id), true)]
    {
        let request = v1::AddReplicaRequest { name: PAIR.to_owned(), uri, witness };
        cluster.client.add_replica(request).await.map_err(|s| said(&s))?;
    }
    until(cluster, PAIR, "whole again", |v| in_sync(v) == 2 && v.children.len() == 3).await?;
    read(&other.uri, 2, seed)?;
    cluster.restart_nexus().await?;
    until(cluster, PAIR, "whole after a restart", |v| v.serving && in_sync(v) == 2).await?;

    // As a nexus that was killed once it had stored that it is to be started by force.
    cluster.kill_nexus()?;
    let state = folder.join("nexus").join("volumes.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&state)?)?;
    let saved = json["volumes"].as_array_mut().context("no volumes in the state file")?;
    let saved = saved.iter_mut().find(|v| v["name"] == PAIR).context("it is not remembered")?;
    saved["forced"] = serde_json::json!({"replica": other.id, "random": 7});
    std::fs::write(&state, serde_json::to_vec(&json)?)?;
    cluster.start_nexus().await?;
    until(cluster, PAIR, "taken from one replica", |v| v.serving && v.children.len() == 1).await?;
    ensure!(remembered(folder)? == [other.id], "{:?} are remembered", remembered(folder)?);
    let mut host = keep::host(cluster, PAIR).await?;
    transfer(&mut host, 0..2 * UNITS, seed, false, &ProgressBar::hidden())?;
    say!(
        "  a volume was started by force, and made redundant again with what had been its replicas"
    );
    Ok(())
}
