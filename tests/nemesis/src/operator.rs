//! What an operator does meanwhile: snapshots, whose clones are read and judged, and members that are replaced.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use cairn_api::v1;

use crate::api::{Client, connect, runtime, said};
use crate::host::Host;
use crate::net::address;
use crate::nodes::{POOL, socket};
use crate::plan::NODES;
use crate::shared::Shared;
use cairn_sim::Rng;

/// A call that is not answered for so long is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// A block.
const BLOCK: u64 = 4096;

/// A call and its answer, in time.
async fn ask<T>(
    what: &str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T> {
    let answer = tokio::time::timeout(PATIENCE, call).await;
    let answer = answer.map_err(|_| anyhow!("{what}: no answer"))?;
    answer.map(tonic::Response::into_inner).map_err(|s| said(&s)).context(what.to_owned())
}

async fn reach(dir: &Path, node: usize) -> Result<Client> {
    let client = tokio::time::timeout(PATIENCE, connect(&socket(dir, node))).await;
    client.map_err(|_| anyhow!("n{} does not answer", node + 1))?
}

/// A replica as a process reaches it.
fn uri(from: usize, at: usize, id: &str) -> String {
    match from == at {
        true => format!("local:{POOL}/{id}"),
        false => {
            format!("nvme+tcp://{}/nqn.2026-11.io.cairn:replica:{id}", address(at))
        }
    }
}

/// A snapshot is a read of every block at its time: one is taken, and its clone read and judged.
pub(crate) fn snapshot(shared: &Arc<Shared>, dir: &Path, volume: usize, number: u64) -> Result<()> {
    let (name, server, invoked) = {
        let mut of = shared.volumes[volume].lock();
        let server = of.server().context("nobody is known to serve the volume")?;
        let invoked = of.history.tick();
        // What was there when it was taken is not to be forgotten before it is judged.
        of.under_way.insert(invoked);
        (of.name.clone(), server, invoked)
    };
    let done = look_at_one(shared, dir, (volume, &name, server), number, invoked);
    shared.volumes[volume].lock().under_way.remove(&invoked);
    done
}

fn look_at_one(
    shared: &Arc<Shared>,
    dir: &Path,
    (volume, name, server): (usize, &str, usize),
    number: u64,
    invoked: u64,
) -> Result<()> {
    let snapshot = format!("s{number}");
    let copy = format!("{name}-c{number}");
    let runtime = runtime()?;
    let clone = runtime.block_on(async {
        let mut client = reach(dir, server).await?;
        let request = v1::CreateSnapshotRequest {
            volumes: vec![name.to_owned()],
            name: snapshot.clone(),
            ..Default::default()
        };
        ask("a snapshot", client.create_snapshot(request)).await?;
        let request = v1::CloneSnapshotRequest {
            volume: name.to_owned(),
            snapshot: snapshot.clone(),
            name: copy.clone(),
            partial: true,
            ..Default::default()
        };
        ask("a clone", client.clone_snapshot(request)).await
    })?;
    let paths = vec![(address(server), server)];
    let host =
        Host::new(Arc::clone(shared), volume, 1, clone.nqn.clone(), paths, Rng::new(number))?;
    let read = host.read_clone(invoked);
    *shared.snapshots.lock() += u64::from(read == shared.blocks);
    shared
        .trace
        .say("note", &format!("{read} blocks of snapshot {snapshot} of {name} were judged"));
    // What cannot be deleted now stays.
    runtime.block_on(async {
        let mut client = reach(dir, server).await?;
        let request = v1::DeleteVolumeRequest { name: copy };
        ask("deleting a clone", client.delete_volume(request)).await?;
        for node in 0..NODES {
            delete_all_but(dir, node, &clone.id, &[]).await?;
        }
        let request = v1::DeleteSnapshotRequest { volume: name.to_owned(), snapshot };
        ask("deleting a snapshot", client.delete_snapshot(request)).await.map(drop)
    })
}

/// Deletes the replicas of a volume on a node, but these.
async fn delete_all_but(dir: &Path, node: usize, volume: &str, kept: &[String]) -> Result<()> {
    let mut client = reach(dir, node).await?;
    let all = ask("the replicas", client.list_replicas(v1::ListReplicasRequest {})).await?;
    let of = all.replicas.into_iter().filter(|r| r.volume_id == volume && !kept.contains(&r.id));
    for replica in of {
        let request = v1::DeleteReplicaRequest { id: replica.id };
        ask("deleting a replica", client.delete_replica(request)).await?;
    }
    Ok(())
}

/// The replica of a volume on a node is replaced by a new one there.
pub(crate) fn replace(
    shared: &Shared,
    dir: &Path,
    (volume, node): (usize, usize),
    now: bool,
) -> Result<()> {
    let (name, id, server, blocks) = {
        let of = shared.volumes[volume].lock();
        let server = of.server().context("nobody is known to serve the volume")?;
        (of.name.clone(), of.id.clone(), server, shared.blocks)
    };
    runtime()?.block_on(async {
        let mut client = reach(dir, server).await?;
        let list = ask("the volumes", client.list_volumes(v1::ListVolumesRequest {})).await?;
        let told = list.volumes.into_iter().find(|v| v.name == name).context("it is not there")?;
        let members: Vec<String> = told.children.iter().map(|c| c.replica_id.clone()).collect();
        let here = |id: &String| shared.places.lock().get(id) == Some(&node);
        let old = told.children.iter().filter(|c| !c.witness && here(&c.replica_id));
        let old: Vec<String> = old.map(|c| c.replica_id.clone()).collect();
        let [old] = old.as_slice() else { bail!("{} replicas are there", old.len()) };
        // Those that were replaced before.
        delete_all_but(dir, node, &id, &members).await?;
        let request = v1::CreateReplicaRequest {
            pool: POOL.to_owned(),
            volume_id: id,
            name: name.clone(),
            size_bytes: blocks * BLOCK,
            ..Default::default()
        };
        let new = ask("a replica", reach(dir, node).await?.create_replica(request)).await?.id;
        shared.places.lock().insert(new.clone(), node);
        let request = v1::ReplaceReplicaRequest {
            name,
            replica_id: old.clone(),
            uri: uri(server, node, &new),
            now,
        };
        ask("a replacement", client.replace_replica(request)).await?;
        *shared.replaced.lock() += 1;
        Ok(())
    })
}
