//! Snapshots of volumes, and volumes made of them.

use cairn_api::v1;
use cairn_engine::block::{ReplicaId, SnapshotId, SnapshotVerb, VolumeId};
use cairn_engine::control::{Command, SnapshotReport};
use cairn_engine::replica::SnapshotSpec;
use cairn_engine::snapshot::{CloneSpec, SnapshotCall, clone_id};
use cairn_engine::{ChildAddress, VolumeReport};
use tonic::Status;

use super::uri::replica_uri;
use super::{BLOCK, Service, check_name, id_or_new};
use crate::state::SavedVolume;

/// Bytes of a snapshot's name.
const NAME_MAX: usize = 64;

pub(super) fn call(id: SnapshotId, name: &str) -> SnapshotCall {
    let created = crate::clock::now_s();
    SnapshotCall { spec: SnapshotSpec { id, name: name.to_owned(), created }, clone: None }
}

impl Service {
    pub(super) async fn take_snapshots(
        &self,
        request: v1::CreateSnapshotRequest,
    ) -> Result<v1::ListSnapshotsResponse, Status> {
        let name = request.name;
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Status::invalid_argument(format!(
                "a snapshot's name has 1 to {NAME_MAX} bytes, not {}",
                name.len()
            )));
        }
        if request.volumes.is_empty() {
            return Err(Status::invalid_argument("name a volume to take a snapshot of"));
        }
        for volume in &request.volumes {
            if self.snapshots_of(volume).await?.iter().any(|s| s.name == name && !s.deleting) {
                return Err(Status::already_exists(format!(
                    "volume `{volume}` has a snapshot `{name}` already"
                )));
            }
        }
        let id = SnapshotId(id_or_new(&request.id)?);
        let volumes = request.volumes.clone();
        let taken = self.snapshot(volumes, SnapshotVerb::Create, call(id, &name), false).await;
        if let Err(status) = taken {
            // Some replicas may have it: nobody is to find half a snapshot.
            for volume in &request.volumes {
                let verb = SnapshotVerb::Delete;
                let undone = self.snapshot(vec![volume.clone()], verb, call(id, ""), false).await;
                if let Err(error) = undone {
                    tracing::warn!(%volume, snapshot = %id, %error, "half a snapshot may be left");
                }
            }
            return Err(status);
        }
        let mut snapshots = Vec::new();
        for volume in &request.volumes {
            let all = self.snapshots_of(volume).await?;
            snapshots.extend(all.into_iter().filter(|s| s.id == id).map(|s| message(volume, s)));
        }
        Ok(v1::ListSnapshotsResponse { snapshots })
    }

    pub(super) async fn snapshots(
        &self,
        request: v1::ListSnapshotsRequest,
    ) -> Result<v1::ListSnapshotsResponse, Status> {
        let volumes = match request.volume {
            name if name.is_empty() => {
                let all = self.volume_reports().await?;
                all.into_iter().filter(|v| v.serving).map(|v| v.name).collect()
            }
            name => vec![name],
        };
        let mut snapshots = Vec::new();
        for volume in &volumes {
            let all = self.snapshots_of(volume).await?;
            snapshots.extend(all.into_iter().map(|s| message(volume, s)));
        }
        Ok(v1::ListSnapshotsResponse { snapshots })
    }

    pub(super) async fn drop_snapshot(
        &self,
        request: v1::DeleteSnapshotRequest,
    ) -> Result<v1::DeleteSnapshotResponse, Status> {
        let found = self.find(&request.volume, &request.snapshot).await?;
        let volumes = vec![request.volume];
        self.snapshot(volumes, SnapshotVerb::Delete, call(found.id, ""), false).await?;
        Ok(v1::DeleteSnapshotResponse {})
    }

    /// Takes a volume back to a snapshot.
    pub(super) async fn restore(
        &self,
        request: v1::RestoreSnapshotRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.volume;
        let found = self.find(&name, &request.snapshot).await?;
        if found.is_partial() && !request.partial {
            return Err(Status::failed_precondition(format!(
                "{}; with --partial the others leave the volume, and are rebuilt once it is restored",
                where_it_is(&found)
            )));
        }
        let volumes = vec![name.clone()];
        let verb = SnapshotVerb::Restore;
        self.snapshot(volumes, verb, call(found.id, ""), request.force).await?;
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Makes a volume of a snapshot: a replica in each pool that has one of the snapshot.
    pub(super) async fn clone_volume(
        &self,
        request: v1::CloneSnapshotRequest,
    ) -> Result<v1::Volume, Status> {
        check_name("volume", &request.name)?;
        if self.state.lock().volumes.iter().any(|v| v.name == request.name) {
            let name = request.name;
            return Err(Status::already_exists(format!("volume `{name}` exists already")));
        }
        let found = self.find(&request.volume, &request.snapshot).await?;
        if found.is_partial() && !request.partial {
            return Err(Status::failed_precondition(format!(
                "{}; with --partial the clone has no more replicas than that",
                where_it_is(&found)
            )));
        }
        let origin = self.known(&request.volume).await?;
        let id = VolumeId(id_or_new(&request.id)?);
        let mut call = call(found.id, &request.name);
        call.clone = Some(CloneSpec { volume: id, blocks: found.blocks, partial: request.partial });
        let of = self.state.lock().volumes.iter().find(|v| v.name == request.volume).cloned();
        let encryption = match (of.and_then(|v| v.encryption), &origin.encryption) {
            (Some(saved), Some(report)) => Some(saved.for_clone(&report.envelope)),
            _ => None,
        };
        let saved = SavedVolume {
            id: id.to_string(),
            name: request.name.clone(),
            size_bytes: found.blocks * BLOCK,
            block_size: origin.block_size.bytes(),
            replicas: replicas_of(&origin, id, &found.holders),
            allowed_hosts: request.allowed_hosts,
            encryption,
            ..SavedVolume::default()
        };
        // Remembered first: a crash now leaves a volume that is seen, and goes on, or can be deleted.
        self.remember(saved.clone())?;
        let volumes = vec![request.volume.clone()];
        let cloned = self.snapshot(volumes, SnapshotVerb::Clone, call, false).await;
        if let Err(status) = cloned {
            self.forget(&request.name)?;
            return Err(status);
        }
        self.serve_new(saved).await
    }

    /// A snapshot of a volume, by its id or its name.
    pub(super) async fn find(&self, volume: &str, wanted: &str) -> Result<SnapshotReport, Status> {
        let all = self.snapshots_of(volume).await?;
        let by_id = wanted.parse::<SnapshotId>().ok();
        let mut found =
            all.into_iter().filter(|s| !s.deleting && (Some(s.id) == by_id || s.name == wanted));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            (Some(_), Some(_)) => Err(Status::failed_precondition(format!(
                "volume `{volume}` has several snapshots `{wanted}`; name one by its id"
            ))),
            (None, _) => Err(Status::not_found(format!(
                "volume `{volume}` has no snapshot `{wanted}`; `cairn snapshot list {volume}` tells \
                 which it has"
            ))),
        }
    }

    pub(super) async fn snapshot(
        &self,
        volumes: Vec<String>,
        verb: SnapshotVerb,
        call: SnapshotCall,
        force: bool,
    ) -> Result<(), Status> {
        self.ask(|reply| Command::Snapshot { volumes, verb, call, force, reply }).await
    }

    async fn snapshots_of(&self, volume: &str) -> Result<Vec<SnapshotReport>, Status> {
        let volume = volume.to_owned();
        self.ask(|reply| Command::ListSnapshots { volume, reply }).await
    }

    pub(super) async fn known(&self, name: &str) -> Result<VolumeReport, Status> {
        self.report(name).await?.ok_or_else(|| {
            Status::not_found(format!("there is no volume `{name}` in this process"))
        })
    }
}

fn where_it_is(found: &SnapshotReport) -> String {
    let (here, all) = (found.holders.len(), found.of_replicas);
    format!("snapshot `{}` is on {here} of {all} replicas in sync", found.name)
}

/// Where the replicas of a clone are: beside those that have the snapshot.
fn replicas_of(origin: &VolumeReport, clone: VolumeId, holders: &[ReplicaId]) -> Vec<String> {
    let members = origin.children.iter().filter(|c| holders.contains(&c.replica));
    members
        .map(|child| {
            let id = clone_id(clone, child.replica);
            let address = match &child.address {
                ChildAddress::Local { pool } => ChildAddress::Local { pool: pool.clone() },
                ChildAddress::Remote { peer, nqn } => {
                    ChildAddress::Remote { peer: *peer, nqn: nqn_beside(nqn, id) }
                }
            };
            replica_uri(id, &address)
        })
        .collect()
}

fn nqn_beside(nqn: &str, id: ReplicaId) -> String {
    let stem = nqn.rsplit_once("replica:").map_or(nqn, |(stem, _)| stem);
    format!("{stem}replica:{id}")
}

fn message(volume: &str, report: SnapshotReport) -> v1::Snapshot {
    let state = match (report.deleting, report.is_partial()) {
        (true, _) => "deleting",
        (false, true) => "partial",
        (false, false) => "complete",
    };
    v1::Snapshot {
        id: report.id.to_string(),
        name: report.name,
        volume: volume.to_owned(),
        created_unix_s: report.created,
        size_bytes: report.blocks * BLOCK,
        own_bytes: report.own_bytes,
        state: state.to_owned(),
        replicas: u32::try_from(report.holders.len()).unwrap_or(u32::MAX),
        of_replicas: u32::try_from(report.of_replicas).unwrap_or(u32::MAX),
    }
}
