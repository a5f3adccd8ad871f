//! The gRPC service: turns calls into commands for the engine, and remembers the volumes.

mod force;
mod grow;
mod iscsi;
mod keys;
mod members;
mod messages;
mod replace;
mod share;
mod snapshots;
mod spares;
mod standbys;
mod uri;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use cairn_api::v1::{self, cairn_server::Cairn};
use cairn_engine::block::{BlockSize, PoolDeviceId, ReplicaId, VolumeId};
use cairn_engine::control::{Command, Reply};
use cairn_engine::nexus::Purpose;
use cairn_engine::replica::ReplicaSpec;
use cairn_engine::{
    EncryptionSpec, EngineError, EngineHandle, IscsiPortal, PoolReport, ScrubAction, VolumeReplica,
    VolumeReport, VolumeSpec,
};
use parking_lot::Mutex;
use tonic::{Request, Response, Status};

use self::members::Members;
use self::uri::parse_replica_uri;
pub(crate) use self::uri::resolve;
use crate::config::{self, Config, Io, Paths};
use crate::metrics::Told;
use crate::pools;
use crate::rebuilds::Rebuilds;
use crate::scrub::Scrubs;
use crate::state::{SavedPool, SavedSharing, SavedVolume, State};

/// A new volume must be served within this time, or the call fails and says what is missing.
const CREATE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often its state is looked at meanwhile.
const CREATE_POLL: Duration = Duration::from_millis(20);
/// A change of a volume must be stored within this time, or the call fails and says so; it may go on.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);
/// All volumes have blocks of this size.
const BLOCK: u64 = 4096;

/// The service of one process.
#[derive(Debug)]
pub(crate) struct Service {
    name: String,
    engine: EngineHandle,
    addresses: Vec<SocketAddr>,
    iscsi_portals: Vec<IscsiPortal>,
    child_deadline_ms: u64,
    state: Mutex<State>,
    scrubs: Scrubs,
    rebuilds: Rebuilds,
    members: Members,
    standbys: standbys::Standbys,
    metrics: Mutex<Option<SocketAddr>>,
}

/// The subsystem that hosts of a volume connect to.
pub(crate) fn volume_nqn(name: &str) -> String {
    format!("nqn.2026-11.io.cairn:{name}")
}

impl Service {
    pub(crate) fn new(
        config: &Config,
        engine: EngineHandle,
        addresses: Vec<SocketAddr>,
        iscsi_portals: Vec<IscsiPortal>,
        state: State,
    ) -> Self {
        Self {
            name: config.name.clone(),
            engine,
            addresses,
            iscsi_portals,
            child_deadline_ms: config.nexus.child_deadline_ms,
            state: Mutex::new(state),
            scrubs: Scrubs::new(&config.state_dir, &config.nexus),
            rebuilds: Rebuilds::new(&config.state_dir),
            members: Members::new(config),
            standbys: standbys::Standbys::new(config),
            metrics: Mutex::new(None),
        }
    }

    /// Serves again what was served before.
    pub(crate) fn resume_volumes(&self) {
        let saved = self.state.lock().volumes.clone();
        for volume in saved {
            tracing::info!(volume = %volume.name, "serving the volume again");
            let spec = keys::spec_now(&volume).and_then(|keys| self.spec_of(&volume, keys));
            let added = spec.map_err(anyhow::Error::msg).and_then(|spec| {
                Ok(self.engine.call(|reply| Command::AddVolume { spec, reply })?)
            });
            // The other volumes are served all the same.
            if let Err(error) = added {
                tracing::error!(volume = %volume.name, "the volume is not served: {error:#}");
            }
        }
    }

    fn spec_of(
        &self,
        volume: &SavedVolume,
        encryption: Option<EncryptionSpec>,
    ) -> Result<VolumeSpec, String> {
        let mut children = Vec::new();
        for (uris, witness) in [(&volume.replicas, false), (&volume.witnesses, true)] {
            for uri in uris {
                let (id, address) = parse_replica_uri(uri)?;
                children.push(VolumeReplica { id, address, witness });
            }
        }
        let sharing = volume.shared.as_ref().map(SavedSharing::sharing).transpose()?;
        let purpose = match &volume.forced {
            Some(forced) => Purpose::ForceStart {
                source: forced
                    .replica
                    .parse()
                    .map_err(|_| "the replica that it is started from")?,
                random: forced.random,
            },
            None => match (&volume.shared, &sharing) {
                (Some(saved), Some(sharing)) if volume.created => saved.purpose(sharing),
                _ if volume.created => Purpose::Assemble,
                _ => Purpose::Create,
            },
        };
        let deadline = match volume.child_deadline_ms {
            0 => self.child_deadline_ms,
            ms => ms,
        };
        Ok(VolumeSpec {
            id: volume.id.parse().map_err(|e: cairn_engine::block::ParseIdError| e.to_string())?,
            name: volume.name.clone(),
            nqn: volume_nqn(&volume.name),
            blocks: volume.size_bytes / BLOCK,
            block_size: volume.block_size()?,
            children,
            encryption,
            purpose,
            child_deadline_ms: deadline,
            allowed_hosts: match volume.allowed_hosts.as_slice() {
                [] => None,
                hosts => Some(hosts.to_vec()),
            },
            sharing,
            iscsi: volume.iscsi.as_ref().map(|iscsi| Box::new(iscsi.export_now(&volume.name))),
        })
    }

    /// Asks the engine without blocking the runtime.
    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        make: impl FnOnce(Reply<T>) -> cairn_engine::thread::Command,
    ) -> Result<T, Status> {
        let (tx, rx) = tokio::sync::oneshot::channel();
        self.engine.send(make(Reply::new(move |result| {
            // The caller may have hung up.
            let _delivered = tx.send(result);
        })));
        rx.await.unwrap_or(Err(EngineError::Stopped)).map_err(|e| status_of(&e))
    }

    /// The process serves its metrics there.
    pub(crate) fn note_metrics(&self, address: SocketAddr) {
        *self.metrics.lock() = Some(address);
    }

    /// What is known of scrubs.
    pub(crate) fn scrubs(&self) -> &Scrubs {
        &self.scrubs
    }

    /// What metrics tell of.
    pub(crate) async fn told(&self) -> Result<Told> {
        let said = |status: Status| anyhow::anyhow!("{}", status.message());
        let volumes = self.volume_reports().await.map_err(said)?;
        let pools = self.ask(|reply| Command::ListPools { reply }).await.map_err(said)?;
        Ok(Told {
            volumes: volumes.into_iter().map(|v| self.volume_message(v)).collect(),
            pools: pools.into_iter().map(Self::pool_message).collect(),
        })
    }

    pub(crate) async fn volume_reports(&self) -> Result<Vec<VolumeReport>, Status> {
        self.ask(|reply| Command::ListVolumes { reply }).await
    }

    /// Waits until the volume is served.
    async fn await_serving(&self, name: &str) -> Result<VolumeReport, Status> {
        self.await_serving_for(name, CREATE_TIMEOUT).await
    }

    async fn await_serving_for(&self, name: &str, limit: Duration) -> Result<VolumeReport, Status> {
        let until = Instant::now() + limit;
        loop {
            let report = self.volume_reports().await?.into_iter().find(|v| v.name == name);
            let Some(report) = report else {
                return Err(Status::aborted(format!("volume `{name}` was removed meanwhile")));
            };
            if report.serving {
                return Ok(report);
            }
            if report.state == "refused" || Instant::now() > until {
                return Err(Status::failed_precondition(format!(
                    "volume `{name}` is {}: {}{}",
                    report.state,
                    report.detail,
                    child_reasons(&report)
                )));
            }
            tokio::time::sleep(CREATE_POLL).await;
        }
    }

    fn forget(&self, name: &str) -> Result<(), Status> {
        self.change(|volumes| volumes.retain(|v| v.name != name))
    }

    /// Changes the list of volumes. Where it cannot be stored it stays as it was.
    fn change(&self, change: impl FnOnce(&mut Vec<SavedVolume>)) -> Result<(), Status> {
        let mut state = self.state.lock();
        let before = state.volumes.clone();
        change(&mut state.volumes);
        state.save().map_err(|e| {
            state.volumes = before;
            Status::internal(format!("{e:#}"))
        })
    }

    fn remember(&self, volume: SavedVolume) -> Result<(), Status> {
        self.change(|volumes| {
            volumes.retain(|v| v.name != volume.name);
            volumes.push(volume);
        })
    }

    /// The pools, and the one of this name.
    async fn pool_report(&self, name: &str) -> Result<PoolReport, Status> {
        let pools = self.ask(|reply| Command::ListPools { reply }).await?;
        let found = pools.into_iter().find(|p| p.name == name);
        found.ok_or_else(|| Status::not_found(format!("there is no pool `{name}` in this process")))
    }

    /// Writes down where a pool's devices are, for the next start. Memory is not there then.
    fn remember_pool(&self, pool: SavedPool) -> Result<(), Status> {
        if pool.paths.iter().any(|path| path.starts_with("mem:")) {
            return Ok(());
        }
        let mut state = self.state.lock();
        let before = state.pools.clone();
        state.pools.retain(|p| p.name != pool.name);
        state.pools.push(pool);
        state.save().map_err(|e| {
            state.pools = before;
            Status::internal(format!("{e:#}"))
        })
    }

    /// What is written down of a pool, or would be.
    fn saved_pool(&self, report: &PoolReport) -> SavedPool {
        let saved = self.state.lock().pools.iter().find(|p| p.name == report.name).cloned();
        let paths = report.devices.iter().map(|d| d.path.clone()).filter(|p| !p.is_empty());
        let buffered = saved.is_some_and(|saved| saved.buffered);
        let pool = pools::saved(&report.name, paths.collect(), buffered);
        SavedPool { shard: self.shard_to_save(report), ..pool }
    }

    fn check_shard(&self, shard: u32) -> Result<u16, Status> {
        let shards = self.engine.shards();
        u16::try_from(shard).ok().filter(|&shard| shard < shards).ok_or_else(|| {
            Status::invalid_argument(format!(
                "there is no shard {shard}: this process has {shards}, from 0 to {} ([engine] shards = ... in its \
                 configuration file)",
                shards - 1
            ))
        })
    }

    /// One of one is not chosen: there may be more at the next start.
    fn shard_to_save(&self, report: &PoolReport) -> Option<u16> {
        (self.engine.shards() > 1).then_some(report.shard)
    }

    /// Brings up a volume of replicas that have no configuration yet, and remembers it.
    async fn serve_new(&self, mut saved: SavedVolume) -> Result<v1::Volume, Status> {
        let keys = keys::spec_of(&saved).await?;
        let spec = self.spec_of(&saved, keys).map_err(Status::invalid_argument)?;
        // Remembered first: a crash now leaves a volume whose making is taken up again.
        self.remember(saved.clone())?;
        let added = self.ask(|reply| Command::AddVolume { spec, reply }).await;
        let served = match added {
            Ok(()) => self.await_serving(&saved.name).await,
            Err(status) => {
                self.forget(&saved.name)?;
                return Err(status);
            }
        };
        match served {
            Ok(report) => {
                saved.created = true;
                self.remember(saved)?;
                Ok(self.volume_message(report))
            }
            Err(status) => {
                let name = saved.name.clone();
                self.ask(|reply| Command::RemoveVolume { name, reply }).await?;
                self.forget(&saved.name)?;
                Err(status)
            }
        }
    }
}

fn child_reasons(report: &VolumeReport) -> String {
    report
        .children
        .iter()
        .filter(|c| !c.reason.is_empty())
        .map(|c| format!("; replica {}: {}", c.replica, c.reason))
        .collect()
}

fn status_of(error: &EngineError) -> Status {
    let text = error.to_string();
    match error {
        EngineError::NotFound { .. } => Status::not_found(text),
        EngineError::Exists { .. } => Status::already_exists(text),
        EngineError::Busy(_) => Status::failed_precondition(text),
        EngineError::Invalid(_) => Status::invalid_argument(text),
        EngineError::Storage(_) => Status::internal(text),
        EngineError::Stopped => Status::unavailable(text),
    }
}

fn check_name(kind: &str, name: &str) -> Result<(), Status> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(Status::invalid_argument(format!(
            "{kind} name `{name}`: use 1 to 64 letters, digits, '-', '_' and '.'"
        )));
    }
    Ok(())
}

fn blocks_of(size_bytes: u64) -> Result<u64, Status> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK) {
        return Err(Status::invalid_argument(format!(
            "size {size_bytes}: a positive multiple of {BLOCK} bytes"
        )));
    }
    Ok(size_bytes / BLOCK)
}

fn id_or_new(text: &str) -> Result<u128, Status> {
    if text.is_empty() {
        return Ok(uuid::Uuid::new_v4().as_u128());
    }
    text.parse::<VolumeId>().map(|id| id.0).map_err(|e| Status::invalid_argument(e.to_string()))
}

#[tonic::async_trait]
impl Cairn for Service {
    async fn get_info(
        &self,
        _request: Request<v1::GetInfoRequest>,
    ) -> Result<Response<v1::GetInfoResponse>, Status> {
        let f = self.engine.features();
        let features = [
            (f.deferred_task_work, "deferred-task-work"),
            (f.multishot_accept, "multishot-accept"),
            (f.multishot_receive, "multishot-receive"),
            (f.registered_files, "registered-files"),
            (f.registered_buffers, "registered-buffers"),
        ];
        Ok(Response::new(v1::GetInfoResponse {
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            nvmf: self.addresses.iter().map(ToString::to_string).collect(),
            iscsi: self.portals(),
            pid: std::process::id(),
            features: features
                .iter()
                .filter(|(on, _)| *on)
                .map(|(_, name)| (*name).to_owned())
                .collect(),
            metrics: self.metrics.lock().map_or_else(String::new, |a| a.to_string()),
            shards: u32::from(self.engine.shards()),
        }))
    }

    async fn list_pools(
        &self,
        _request: Request<v1::ListPoolsRequest>,
    ) -> Result<Response<v1::ListPoolsResponse>, Status> {
        let pools = self.ask(|reply| Command::ListPools { reply }).await?;
        let pools = pools.into_iter().map(Self::pool_message).collect();
        Ok(Response::new(v1::ListPoolsResponse { pools }))
    }

    async fn create_pool(
        &self,
        request: Request<v1::CreatePoolRequest>,
    ) -> Result<Response<v1::Pool>, Status> {
        let request = request.into_inner();
        check_name("pool", &request.name)?;
        let pools = self.ask(|reply| Command::ListPools { reply }).await?;
        if pools.iter().any(|p| p.name == request.name) {
            return Err(Status::already_exists(format!("pool `{}` exists already", request.name)));
        }
        let size = (request.size_bytes > 0).then_some(bytesize::ByteSize(request.size_bytes));
        let mut spec = config::Pool::new(&request.name, String::new(), size, true);
        spec.shard = request.shard.map(|shard| self.check_shard(shard)).transpose()?;
        let mut paths = vec![request.path];
        paths.extend(request.more_paths);
        spec.path = Paths::Many(paths.clone());
        for id in &request.without {
            let id = id.parse::<PoolDeviceId>();
            spec.without.push(id.map_err(|e| Status::invalid_argument(e.to_string()))?);
        }
        if request.buffered {
            spec.io = Io::Buffered;
        }
        let engine = self.engine.clone();
        // Formatting and opening read and write the devices.
        let made =
            tokio::task::spawn_blocking(move || pools::create(&engine, &spec, request.force));
        made.await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(|e| Status::failed_precondition(format!("{e:#}")))?;
        let saved = pools::saved(&request.name, paths, request.buffered);
        self.remember_pool(saved.clone())?;
        let report = self.pool_report(&request.name).await?;
        self.remember_pool(SavedPool { shard: self.shard_to_save(&report), ..saved })?;
        Ok(Response::new(Self::pool_message(report)))
    }

    async fn add_device(
        &self,
        request: Request<v1::AddDeviceRequest>,
    ) -> Result<Response<v1::Pool>, Status> {
        let request = request.into_inner();
        let report = self.pool_report(&request.pool).await?;
        let in_memory = request.path.starts_with("mem:");
        if !in_memory && report.devices.iter().any(|d| d.path == request.path) {
            return Err(Status::already_exists(format!(
                "{} is in pool `{}` already",
                request.path, request.pool
            )));
        }
        let size = (request.size_bytes > 0).then_some(bytesize::ByteSize(request.size_bytes));
        let mut spec = config::Pool::new(&request.pool, request.path.clone(), size, true);
        if request.buffered {
            spec.io = Io::Buffered;
        }
        let (id, slots) = (report.id, report.slots);
        let made = tokio::task::spawn_blocking(move || {
            pools::make_device(&spec, id, slots, request.force)
        });
        let (device, opened) = made
            .await
            .map_err(|e| Status::internal(e.to_string()))?
            .map_err(|e| Status::failed_precondition(format!("{}: {e:#}", request.path)))?;
        // Written down first: once the pool has taken it in, it is not whole without it.
        let mut saved = self.saved_pool(&report);
        saved.buffered |= request.buffered;
        let before = saved.clone();
        saved.paths.push(request.path);
        self.remember_pool(saved)?;
        let pool = request.pool.clone();
        let added = self.ask(|reply| Command::AddDevice { pool, device, opened, reply }).await;
        if let Err(status) = added {
            self.remember_pool(before)?;
            return Err(status);
        }
        let report = self.pool_report(&request.pool).await?;
        Ok(Response::new(Self::pool_message(report)))
    }

    async fn remove_device(
        &self,
        request: Request<v1::RemoveDeviceRequest>,
    ) -> Result<Response<v1::Pool>, Status> {
        let request = request.into_inner();
        let report = self.pool_report(&request.pool).await?;
        let wanted = request.device.parse::<PoolDeviceId>().ok();
        let found = report
            .devices
            .iter()
            .find(|d| Some(d.id) == wanted || (!d.path.is_empty() && d.path == request.device));
        let Some(device) = found.map(|d| d.id) else {
            return Err(Status::not_found(format!(
                "pool `{}` has no device `{}`; `cairn pool list --devices` tells which it has",
                request.pool, request.device
            )));
        };
        // What is left of it on disk is found out at the next start.
        self.remember_pool(self.saved_pool(&report))?;
        let pool = request.pool.clone();
        self.ask(|reply| Command::RemoveDevice { pool, device, reply }).await?;
        let report = self.pool_report(&request.pool).await?;
        Ok(Response::new(Self::pool_message(report)))
    }

    async fn grow_pool(
        &self,
        request: Request<v1::GrowPoolRequest>,
    ) -> Result<Response<v1::Pool>, Status> {
        self.grow_device(request.into_inner()).await.map(Response::new)
    }

    async fn list_replicas(
        &self,
        _request: Request<v1::ListReplicasRequest>,
    ) -> Result<Response<v1::ListReplicasResponse>, Status> {
        let replicas = self.ask(|reply| Command::ListReplicas { reply }).await?;
        let replicas = replicas.into_iter().map(|r| self.replica_message(r)).collect();
        Ok(Response::new(v1::ListReplicasResponse { replicas }))
    }

    async fn create_replica(
        &self,
        request: Request<v1::CreateReplicaRequest>,
    ) -> Result<Response<v1::Replica>, Status> {
        let request = request.into_inner();
        let spec = ReplicaSpec {
            id: ReplicaId(id_or_new(&request.id)?),
            volume: VolumeId(id_or_new(&request.volume_id)?),
            name: request.name,
            blocks: blocks_of(request.size_bytes)?,
            block_size: BlockSize::B4096,
            thick: request.thick,
            source: None,
        };
        let pool = request.pool;
        let report = self.ask(|reply| Command::CreateReplica { pool, spec, reply }).await?;
        Ok(Response::new(self.replica_message(report)))
    }

    async fn delete_replica(
        &self,
        request: Request<v1::DeleteReplicaRequest>,
    ) -> Result<Response<v1::DeleteReplicaResponse>, Status> {
        let id = request.into_inner().id;
        let replica =
            id.parse::<ReplicaId>().map_err(|e| Status::invalid_argument(e.to_string()))?;
        self.ask(|reply| Command::DeleteReplica { replica, reply }).await?;
        Ok(Response::new(v1::DeleteReplicaResponse {}))
    }

    async fn list_volumes(
        &self,
        _request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let volumes = self.volume_reports().await?;
        let volumes = volumes.into_iter().map(|v| self.volume_message(v)).collect();
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let request = request.into_inner();
        check_name("volume", &request.name)?;
        blocks_of(request.size_bytes)?;
        if self.state.lock().volumes.iter().any(|v| v.name == request.name) {
            return Err(Status::already_exists(format!(
                "volume `{}` exists already",
                request.name
            )));
        }
        let uris = request.replicas.iter().chain(&request.witnesses);
        let replicas: Vec<_> = uris.filter_map(|uri| members::id_of(uri)).collect();
        self.not_of_another(&request.name, &replicas).await?;
        let encryption = keys::for_new(request.encryption).await?;
        let saved = SavedVolume {
            id: VolumeId(id_or_new(&request.id)?).to_string(),
            name: request.name.clone(),
            size_bytes: request.size_bytes,
            block_size: request.block_size,
            replicas: request.replicas,
            witnesses: request.witnesses,
            allowed_hosts: request.allowed_hosts,
            child_deadline_ms: request.child_deadline_ms,
            encryption,
            ..SavedVolume::default()
        };
        self.serve_new(saved).await.map(Response::new)
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.resize(request.into_inner()).await.map(Response::new)
    }

    async fn unlock_volume(
        &self,
        request: Request<v1::UnlockVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.unlock(request.into_inner()).await.map(Response::new)
    }

    async fn rotate_volume_key(
        &self,
        request: Request<v1::RotateVolumeKeyRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.rotate(request.into_inner()).await.map(Response::new)
    }

    async fn scrub_volume(
        &self,
        request: Request<v1::ScrubVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        use v1::scrub_volume_request::Action;
        let request = request.into_inner();
        let find =
            |volumes: Vec<VolumeReport>| volumes.into_iter().find(|v| v.name == request.name);
        let missing =
            || Status::not_found(format!("there is no volume `{}` in this process", request.name));
        let volume = find(self.volume_reports().await?).ok_or_else(missing)?;
        let rate = request.rate_mib_s;
        let action = match request.action() {
            Action::Unspecified => None,
            _ if !volume.serving => {
                return Err(Status::failed_precondition(format!(
                    "volume `{}` is {}; it is scrubbed once it is online",
                    volume.name, volume.state
                )));
            }
            Action::Start => Some(self.scrubs.start(&volume, false, rate)),
            Action::Compare => Some(self.scrubs.start(&volume, true, rate)),
            Action::Stop => {
                self.scrubs.stop(&volume);
                Some(ScrubAction::Stop)
            }
            Action::Rate => Some(ScrubAction::Rate(rate)),
        };
        if let Some(action) = action {
            let name = request.name.clone();
            self.ask(|reply| Command::ScrubVolume { name, action, reply }).await?;
        }
        let report = find(self.volume_reports().await?).ok_or_else(missing)?;
        Ok(Response::new(self.volume_message(report)))
    }

    async fn set_rebuild_rate(
        &self,
        request: Request<v1::RebuildRateRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        let v1::RebuildRateRequest { name, rate_mib_s: mib_s } = request.into_inner();
        let of = name.clone();
        self.ask(|reply| Command::RebuildRate { name: of, mib_s, reply }).await?;
        let report = self.volume_reports().await?.into_iter().find(|v| v.name == name);
        let report = report.ok_or_else(|| Status::not_found("the volume is gone"))?;
        Ok(Response::new(self.volume_message(report)))
    }

    async fn add_replica(
        &self,
        request: Request<v1::AddReplicaRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.add_member(request.into_inner()).await.map(Response::new)
    }

    async fn remove_replica(
        &self,
        request: Request<v1::RemoveReplicaRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.remove_member(request.into_inner()).await.map(Response::new)
    }

    async fn replace_replica(
        &self,
        request: Request<v1::ReplaceReplicaRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.replace(request.into_inner()).await.map(Response::new)
    }

    async fn force_start_volume(
        &self,
        request: Request<v1::ForceStartVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.force_start(request.into_inner()).await.map(Response::new)
    }

    async fn share_volume(
        &self,
        request: Request<v1::ShareVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.share(request.into_inner()).await.map(Response::new)
    }

    async fn stand_by_volume(
        &self,
        request: Request<v1::StandByVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.stand_by(request.into_inner()).await.map(Response::new)
    }

    async fn take_over_volume(
        &self,
        request: Request<v1::TakeOverVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.take_over(request.into_inner().name).await.map(Response::new)
    }

    async fn export_volume(
        &self,
        request: Request<v1::ExportVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.export(request.into_inner()).await.map(Response::new)
    }

    async fn unexport_volume(
        &self,
        request: Request<v1::UnexportVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.unexport(request.into_inner().name).await.map(Response::new)
    }

    async fn hand_over_volume(
        &self,
        request: Request<v1::HandOverVolumeRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.hand_over(request.into_inner().name).await.map(Response::new)
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::CreateSnapshotRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        self.take_snapshots(request.into_inner()).await.map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::ListSnapshotsRequest>,
    ) -> Result<Response<v1::ListSnapshotsResponse>, Status> {
        self.snapshots(request.into_inner()).await.map(Response::new)
    }

    async fn delete_snapshot(
        &self,
        request: Request<v1::DeleteSnapshotRequest>,
    ) -> Result<Response<v1::DeleteSnapshotResponse>, Status> {
        self.drop_snapshot(request.into_inner()).await.map(Response::new)
    }

    async fn restore_snapshot(
        &self,
        request: Request<v1::RestoreSnapshotRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.restore(request.into_inner()).await.map(Response::new)
    }

    async fn clone_snapshot(
        &self,
        request: Request<v1::CloneSnapshotRequest>,
    ) -> Result<Response<v1::Volume>, Status> {
        self.clone_volume(request.into_inner()).await.map(Response::new)
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        let name = request.into_inner().name;
        self.standbys.leave_alone(&name);
        let wanted = name.clone();
        let removed = self.ask(|reply| Command::RemoveVolume { name: wanted, reply }).await;
        match removed {
            // It could not be served, or an earlier call could not store that it was removed.
            Err(status)
                if status.code() == tonic::Code::NotFound
                    && self.state.lock().volumes.iter().any(|v| v.name == name) => {}
            removed => removed?,
        }
        self.forget(&name)?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }
}
