//! Snapshots in the cluster of `cairn up --check`: one of two volumes at one instant, one of them
//! encrypted; written over, cloned, restored, deleted; and what a restart of the nexus leaves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cairn_api::v1;
use cairn_engine::block::{BufSlice, IoOp};
use indicatif::ProgressBar;

use super::keep::{host, key_file, make, write_key};
use super::transfer;
use crate::client::{connect, said};
use crate::output::say;
use crate::up::{Cluster, REPLICAS};

/// Units that are written.
const UNITS: u64 = 16;
const NAMES: [&str; 2] = ["data", "log"];
const CLONE: &str = "copy";
const FIRST: u64 = 0x51;
const SECOND: u64 = 0x52;

async fn fill(cluster: &mut Cluster, name: &str, seed: u64, write: bool) -> Result<()> {
    let mut host = host(cluster, name).await?;
    let what = if write { "writing" } else { "reading" };
    transfer(&mut host, 0..UNITS, seed, write, &ProgressBar::hidden())
        .with_context(|| format!("{what} volume `{name}`"))?;
    host.request(IoOp::Flush, 0, 0, BufSlice::EMPTY)?;
    Ok(())
}

async fn list(cluster: &mut Cluster, volume: &str) -> Result<Vec<v1::Snapshot>> {
    let request = v1::ListSnapshotsRequest { volume: volume.to_owned() };
    let reply = cluster.client.list_snapshots(request).await.map_err(|s| said(&s))?;
    Ok(reply.into_inner().snapshots)
}

async fn restore(cluster: &mut Cluster, volume: &str, snapshot: &str) -> Result<()> {
    let request = v1::RestoreSnapshotRequest {
        volume: volume.to_owned(),
        snapshot: snapshot.to_owned(),
        force: false,
        partial: false,
    };
    // A host that has just gone may not have been missed yet.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match cluster.client.restore_snapshot(request.clone()).await {
            Ok(_) => return Ok(()),
            Err(status)
                if status.message().contains("hosts are connected") && Instant::now() < until =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(status) => return Err(said(&status)),
        }
    }
}

pub(super) async fn run(cluster: &mut Cluster, folder: &std::path::Path) -> Result<()> {
    let key = folder.join("snapshots.key");
    write_key(&key, &[7; 32])?;
    make(cluster, NAMES[0], Some(key_file(&key))).await?;
    make(cluster, NAMES[1], None).await?;
    for name in NAMES {
        fill(cluster, name, FIRST, true).await?;
    }
    let volumes = NAMES.map(str::to_owned).to_vec();
    let request =
        v1::CreateSnapshotRequest { volumes, name: "first".to_owned(), id: String::new() };
    let taken = cluster.client.create_snapshot(request.clone()).await.map_err(|s| said(&s))?;
    let taken = taken.into_inner().snapshots;
    let whole = |s: &v1::Snapshot| s.state == "complete" && s.replicas as usize == REPLICAS;
    ensure!(taken.len() == 2 && taken.iter().all(whole), "not two whole snapshots: {taken:?}");
    let again = cluster.client.create_snapshot(request).await;
    ensure!(again.is_err(), "a second snapshot of one name was taken");
    for name in NAMES {
        fill(cluster, name, SECOND, true).await?;
    }
    say!("  a snapshot of two volumes at one instant is on {REPLICAS} replicas each");

    let request = v1::CloneSnapshotRequest {
        volume: NAMES[0].to_owned(),
        snapshot: "first".to_owned(),
        name: CLONE.to_owned(),
        ..v1::CloneSnapshotRequest::default()
    };
    cluster.client.clone_snapshot(request).await.map_err(|s| said(&s))?;
    fill(cluster, CLONE, FIRST, false).await.context("a clone of an encrypted volume")?;
    fill(cluster, NAMES[0], SECOND, false).await?;
    cluster.restart_nexus().await?;
    fill(cluster, CLONE, FIRST, false).await.context("after a restart of the nexus")?;
    fill(cluster, CLONE, SECOND, true).await?;

    restore(cluster, NAMES[0], "first").await?;
    fill(cluster, NAMES[0], FIRST, false).await.context("restored")?;
    fill(cluster, NAMES[1], SECOND, false).await.context("not restored")?;
    fill(cluster, CLONE, SECOND, false).await.context("a clone whose origin was restored")?;
    cut_off(cluster).await?;
    for name in NAMES {
        let request =
            v1::DeleteSnapshotRequest { volume: name.to_owned(), snapshot: "first".to_owned() };
        cluster.client.delete_snapshot(request).await.map_err(|s| said(&s))?;
    }
    fill(cluster, NAMES[0], FIRST, false).await.context("after its snapshot was deleted")?;
    fill(cluster, NAMES[1], SECOND, false).await.context("after its snapshot was deleted")?;
    fill(cluster, CLONE, SECOND, false).await.context("after its snapshot was deleted")?;
    ensure!(
        list(cluster, NAMES[1]).await?.is_empty(),
        "a snapshot that was deleted and has no clone is still there"
    );
    for volume in [CLONE, NAMES[0], NAMES[1]] {
        let request = v1::DeleteVolumeRequest { name: volume.to_owned() };
        cluster.client.delete_volume(request).await.map_err(|s| said(&s))?;
    }
    drop_replicas(cluster).await?;
    say!("  cloned, restored and deleted snapshots, one volume encrypted; every byte is right");
    Ok(())
}

/// A restore that the nexus's process did not outlive: some replicas may be back, others not. It is done
/// before hosts are served, and then never again.
async fn cut_off(cluster: &mut Cluster) -> Result<()> {
    for delay_ms in [0, 1, 3, 10] {
        fill(cluster, NAMES[0], SECOND, true).await?;
        let mut client = connect(&cluster.socket("nexus")).await?;
        let request = v1::RestoreSnapshotRequest {
            volume: NAMES[0].to_owned(),
            snapshot: "first".to_owned(),
            force: true,
            partial: false,
        };
        let asked = tokio::spawn(async move { client.restore_snapshot(request).await });
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        cluster.kill_nexus()?;
        let answer = asked.await?;
        cluster.start_nexus().await?;
        let back = fill(cluster, NAMES[0], FIRST, false).await;
        if answer.is_ok() {
            back.context("a restore that was acked, and then the nexus was killed")?;
        } else if back.is_err() {
            fill(cluster, NAMES[0], SECOND, false)
                .await
                .context("neither restored nor as it was")?;
        }
        fill(cluster, NAMES[0], SECOND, true).await?;
        cluster.restart_nexus().await?;
        fill(cluster, NAMES[0], SECOND, false).await.context("a restore that was done again")?;
    }
    restore(cluster, NAMES[0], "first").await
}

/// Deletes the replicas of the volumes made here, their snapshots with them.
async fn drop_replicas(cluster: &mut Cluster) -> Result<()> {
    for i in 1..=REPLICAS {
        let mut client = connect(&cluster.socket(&format!("r{i}"))).await?;
        let reply = client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
        let made = |name: &str| NAMES.contains(&name) || name == CLONE;
        for replica in reply.into_inner().replicas.into_iter().filter(|r| made(&r.name)) {
            let request = v1::DeleteReplicaRequest { id: replica.id };
            client.delete_replica(request).await.map_err(|s| said(&s))?;
        }
    }
    Ok(())
}
