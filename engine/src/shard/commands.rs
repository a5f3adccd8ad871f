//! What the control side asks for.

use std::net::SocketAddr;

use cairn_nexus::{
    ChildState, FaultReason, RebuildEnd, RebuildRecord, RebuildStage, Status, VolumeState,
};
use cairn_nvmf::target::Port;
use cairn_reactor::{Driver, Op};
use cairn_replica::{PoolState, ReplicaSpec, ReplicaState};

use super::io::Export;
use super::pools::Waiter;
use super::volumes::{Route, Volume};
use super::{Shard, Subject, token};
use crate::control::{
    ChildAddress, ChildReport, Command, EngineError, HostReport, PoolReport, RebuildEnded,
    RebuildStatus, ReplicaReport, Reply, ScrubAction, VolumeReport,
};

impl<D: Driver> Shard<D> {
    pub(super) fn handle_command(&mut self, command: Command<D::Listener, D::Device>, now: u64) {
        let stopping = self.stopping.is_some();
        match command {
            Command::ListPools { reply } => reply.send(Ok(self.pool_reports())),
            Command::ListReplicas { reply } => reply.send(Ok(self.replica_reports())),
            Command::ShareVolume { name, sharing, reply } => {
                reply.send(self.share_volume(&name, sharing));
            }
            Command::StandBy { name, reply } => self.stand_by(&name, reply, now),
            Command::TakeOver { name, reply } => self.take_over(&name, reply, now),
            Command::ListSnapshots { volume, reply } => self.list_snapshots(&volume, reply),
            Command::Snapshot { reply, .. } if stopping => reply.send(Err(EngineError::Stopped)),
            Command::Snapshot { volumes, verb, call, force, reply } => {
                self.snapshot_volumes(&volumes, (verb, &call), force, reply, now);
            }
            Command::ListVolumes { reply } => reply.send(Ok(self.volume_reports(now))),
            Command::RebuildRate { name, mib_s, reply } => {
                reply.send(self.set_rebuild_rate(name, mib_s));
            }
            Command::Shutdown { reply } => self.begin_shutdown(reply, now),
            Command::AddListener { reply, .. }
            | Command::AddIscsiListener { reply, .. }
            | Command::ExportIscsi { reply, .. }
            | Command::AddPool { reply, .. }
            | Command::DeleteReplica { reply, .. }
            | Command::AddVolume { reply, .. }
            | Command::RemoveVolume { reply, .. }
            | Command::GrowPool { reply, .. }
            | Command::ResizeVolume { reply, .. }
            | Command::AddReplica { reply, .. }
            | Command::RemoveReplica { reply, .. }
            | Command::RotateKey { reply, .. }
                if stopping =>
            {
                reply.send(Err(EngineError::Stopped));
            }
            Command::AddDevice { reply, .. } | Command::RemoveDevice { reply, .. } if stopping => {
                reply.send(Err(EngineError::Stopped));
            }
            Command::CreateReplica { reply, .. } if stopping => {
                reply.send(Err(EngineError::Stopped));
            }
            Command::AddListener { listener, advertise, reply } => {
                reply.send(self.add_listener(listener, advertise));
            }
            Command::AddIscsiListener { listener, portal, reply } => {
                reply.send(self.add_iscsi_listener(listener, portal.address, portal.group));
            }
            Command::ExportIscsi { name, export, reply } => {
                reply.send(self.export_iscsi(&name, export));
            }
            Command::AddPool { name, devices, pool, reply } => {
                reply.send(self.add_pool(name, devices, *pool));
            }
            Command::AddDevice { pool, device, opened, reply } => {
                self.add_device(&pool, device, *opened, reply);
            }
            Command::RemoveDevice { pool, device, reply } => {
                self.remove_device(&pool, device, reply);
            }
            Command::CreateReplica { pool, spec, reply } => {
                self.create_replica(&pool, spec, reply);
            }
            Command::DeleteReplica { replica, reply } => self.delete_replica(replica, reply),
            Command::AddVolume { spec, reply } => {
                let added = self.add_volume(spec, now);
                reply.send(added);
            }
            Command::GrowPool { pool, device, device_len, reply } => {
                self.grow_pool(&pool, (device, device_len), reply);
            }
            Command::ResizeVolume { name, blocks, reply } => {
                self.resize_volume(&name, blocks, reply, now);
            }
            Command::AddReplica { name, replica, reply } => {
                self.add_replica(name, replica, reply, now);
            }
            Command::RemoveReplica { name, replica, reply } => {
                self.remove_replica(name, replica, reply, now);
            }
            Command::RotateKey { name, kek, nonce, reply } => {
                self.rotate_key(&name, &kek, nonce, reply, now);
            }
            Command::ScrubVolume { name, action, reply } => {
                reply.send(self.scrub_volume(name, action, now));
            }
            Command::RemoveVolume { name, reply } => {
                let found = self.volumes.iter().find(|(_, v)| v.spec.name == name);
                match found.map(|(at, _)| at) {
                    Some(at) => self.remove_volume(at, reply, now),
                    None => reply.send(Err(EngineError::NotFound { kind: "volume", name })),
                }
            }
        }
    }

    fn scrub_volume(
        &mut self,
        name: String,
        action: ScrubAction,
        now: u64,
    ) -> Result<(), EngineError> {
        let found = self.volumes.iter().find(|(_, v)| v.spec.name == name).map(|(at, _)| at);
        let Some(at) = found else {
            return Err(EngineError::NotFound { kind: "volume", name });
        };
        let nexus = &mut self.volumes[at].nexus;
        match action {
            ScrubAction::Start(_) if !nexus.state().is_serving() => {
                return Err(EngineError::Busy(format!(
                    "volume `{name}` is {}; it is scrubbed once it is online",
                    nexus.state().word()
                )));
            }
            ScrubAction::Start(report) => nexus.start_scrub(report, now),
            ScrubAction::Stop => nexus.stop_scrub(),
            ScrubAction::Rate(rate) => nexus.set_scrub_rate(rate),
        }
        self.touch_volume(at);
        Ok(())
    }

    fn add_listener(
        &mut self,
        listener: D::Listener,
        advertise: SocketAddr,
    ) -> Result<(), EngineError> {
        let id = self
            .driver
            .attach_listener(listener)
            .map_err(|e| EngineError::Invalid(format!("listening failed: {e}")))?;
        self.addresses.push(advertise);
        let port = Port { traddr: advertise.ip().to_string(), trsvcid: advertise.port() };
        self.listeners.push((id, port));
        let ports = self.listeners.iter().map(|(_, port)| port.clone()).collect();
        self.target.set_ports(ports);
        self.submit(Op::Accept { listener: id }, token(Subject::Accept, 0, id.0));
        Ok(())
    }

    fn create_replica(&mut self, pool: &str, spec: ReplicaSpec, reply: Reply<ReplicaReport>) {
        let Some(at) = self.pools.iter().position(|p| p.name == pool) else {
            reply.send(Err(EngineError::NotFound { kind: "pool", name: pool.to_owned() }));
            return;
        };
        if let Err(error) = self.check_promise(at, &spec) {
            reply.send(Err(error));
            return;
        }
        let number = u16::try_from(at).expect("fewer than 2^16 pools");
        let tag = self.control_tag(number, Waiter::Create { id: spec.id, reply });
        self.pools[at].pool.create_replica(tag, spec, self.driver.memory());
    }

    fn delete_replica(&mut self, id: cairn_block::ReplicaId, reply: Reply<()>) {
        let Some((pool, slot, handle)) = self.find_replica(id) else {
            reply.send(Err(EngineError::NotFound { kind: "replica", name: id.to_string() }));
            return;
        };
        let user = self.volumes.iter().find(|(_, v)| {
            v.routes
                .iter()
                .any(|r| matches!(r, Route::Local(l) if (l.pool, l.slot) == (pool, slot)))
        });
        if let Some((_, volume)) = user {
            reply.send(Err(crate::process::in_use(id, &volume.spec.name)));
            return;
        }
        if let Some(Export::Replica { subsystem, .. }) = self.exports[handle].take() {
            for conn in self.target.remove_subsystem(subsystem) {
                self.close_host(conn.0);
            }
        }
        let tag = self.control_tag(pool, Waiter::Delete { reply });
        self.pools[usize::from(pool)].pool.delete_replica(tag, slot, self.driver.memory());
    }

    fn pool_reports(&self) -> Vec<PoolReport> {
        self.pools
            .iter()
            .map(|local| PoolReport {
                name: local.name.clone(),
                id: local.pool.id(),
                usage: local.pool.usage(),
                warning: super::space::warning(&local.pool.usage()),
                dirty_extents: local.pool.dirty_extents(),
                open_extents: local.pool.open_extents(),
                checksum_mismatches: local.pool.checksum_mismatches(),
                slots: local.pool.slot_count(),
                devices: local.device_reports(),
                shard: self.config.shard,
                state: match local.pool.state() {
                    PoolState::Failed(why) => format!("failed: {why}"),
                    PoolState::Online if local.is_degraded() => "degraded".to_owned(),
                    PoolState::Online => "online".to_owned(),
                },
            })
            .collect()
    }

    pub(super) fn replica_reports(&self) -> Vec<ReplicaReport> {
        let mut reports = Vec::new();
        for (at, local) in self.pools.iter().enumerate() {
            let extent_bytes = u64::from(local.pool.usage().extent_bytes);
            for info in local.pool.replicas() {
                let counters = self.exports.iter().flatten().find_map(|export| match export {
                    Export::Replica { pool, slot, counters, .. }
                        if usize::from(*pool) == at && *slot == info.slot =>
                    {
                        Some(*counters)
                    }
                    _ => None,
                });
                reports.push(ReplicaReport {
                    pool: local.name.clone(),
                    id: info.id,
                    volume: info.volume,
                    nqn: Self::replica_nqn(info.id),
                    state: if info.state == ReplicaState::Live { "live" } else { "deleting" }
                        .to_owned(),
                    blocks: info.blocks,
                    block_size: info.block_size,
                    allocated_bytes: info.allocated_extents * extent_bytes,
                    name: info.name,
                    counters: counters.unwrap_or_default(),
                });
            }
        }
        reports
    }

    fn set_rebuild_rate(&mut self, name: String, mib_s: u32) -> Result<(), EngineError> {
        let Some(at) = self.find_volume(&name) else {
            return Err(EngineError::NotFound { kind: "volume", name });
        };
        self.volumes[at].nexus.set_rebuild_rate(mib_s);
        self.touch_volume(at);
        Ok(())
    }

    fn volume_reports(&self, now: u64) -> Vec<VolumeReport> {
        self.volumes.iter().map(|(at, volume)| self.volume_report(at, volume, now)).collect()
    }

    fn volume_report(&self, at: u32, volume: &Volume, now: u64) -> VolumeReport {
        let Status { state, epoch, children, requests, .. } = volume.nexus.status();
        let mut unreachable = String::new();
        let children = (0u8..)
            .zip(children)
            .zip(&volume.spec.children)
            .zip(&volume.routes)
            .filter(|(((_, child), _), _)| child.state != ChildState::Removed)
            .map(|(((number, child), replica), route)| {
                let (word, mut reason) = describe(child.state);
                if child.failures > 1 {
                    let join = if reason.is_empty() { "" } else { "; " };
                    reason = format!("{reason}{join}it went out {} times lately", child.failures);
                }
                let connected = match route {
                    Route::Remote { link } => !child.offline && self.link_report(*link).0 == "up",
                    Route::Local(local) => {
                        let pool = &self.pools[usize::from(local.pool)].pool;
                        !local.leaving && !matches!(pool.state(), PoolState::Failed(_))
                    }
                    Route::Gone => false,
                };
                if let (Route::Gone, ChildAddress::Local { pool }) = (route, &replica.address) {
                    let join = if reason.is_empty() { "" } else { "; " };
                    reason = format!(
                        "{reason}{join}it is not in this process: have pool `{pool}` opened at its start"
                    );
                }
                if let Route::Remote { link } = route {
                    let (_, error) = self.link_report(*link);
                    if !error.is_empty() {
                        let join = if reason.is_empty() { "" } else { "; " };
                        reason = format!("{reason}{join}{error}");
                        unreachable = format!("{unreachable}; replica {}: {error}", replica.id);
                    }
                }
                ChildReport {
                    number,
                    replica: replica.id,
                    witness: child.witness,
                    address: replica.address.clone(),
                    state: word.to_owned(),
                    reason,
                    in_sync: child.in_sync,
                    connected,
                    load: child.load,
                }
            })
            .collect();
        // Who is missing is said by the nexus; why, only the links know.
        if !matches!(state, VolumeState::Assembling(_)) {
            unreachable.clear();
        }
        let back = volume.nexus.restoring().map_or_else(String::new, |snapshot| {
            format!("being taken back to snapshot {snapshot}; hosts wait")
        });
        let mut detail = format!("{}{unreachable}", state.detail());
        for text in [back.as_str(), &volume.sanitize_text()] {
            if !text.is_empty() {
                detail = format!("{detail}; {text}");
            }
        }
        let hosts = volume.export.map_or_else(Vec::new, |(subsystem, _)| {
            self.target
                .controllers(subsystem)
                .into_iter()
                .map(|c| HostReport {
                    nqn: c.hostnqn,
                    controller: c.cntlid,
                    io_queues: c.io_queues,
                })
                .collect()
        });
        VolumeReport {
            id: volume.spec.id,
            name: volume.spec.name.clone(),
            nqn: volume.spec.nqn.clone(),
            blocks: volume.nexus.blocks(),
            state: state.word().to_owned(),
            detail,
            unfit: volume.nexus.unfit().unwrap_or_default().to_owned(),
            serving: state.is_serving() && volume.export.is_some() && back.is_empty(),
            epoch: epoch.0,
            children,
            hosts,
            iscsi: self.iscsi_report(at),
            counters: volume.counters,
            in_flight: requests,
            block_size: volume.block_size,
            encryption: super::keys::report(volume.nexus.encryption(), volume.nexus.locked()),
            mends: volume.nexus.mend_counters(),
            scrub: volume.nexus.scrub().cloned(),
            rebuild: volume.nexus.rebuild().map(|r| RebuildStatus {
                replica: volume.spec.children[usize::from(r.child.0)].id,
                stage: match r.stage {
                    RebuildStage::Listing => "listing",
                    RebuildStage::Copying => "copying",
                    RebuildStage::Joining => "joining",
                },
                bytes_total: r.bytes_total,
                bytes_done: r.bytes_done,
                bytes_per_s: r.bytes_per_s,
                running_ms: now.saturating_sub(r.started_ms),
            }),
            rebuilt: volume.nexus.rebuild_history().iter().map(|r| rebuilt(r, now)).collect(),
            unreconciled: volume.nexus.unreconciled(),
            shard: self.config.shard,
        }
    }
}

fn rebuilt(record: &RebuildRecord, now: u64) -> RebuildEnded {
    RebuildEnded {
        replica: record.replica,
        why: record.why.to_string(),
        failed: match record.end {
            RebuildEnd::Done => String::new(),
            RebuildEnd::Aborted(why) => why.to_string(),
        },
        took_ms: record.ended_ms.saturating_sub(record.started_ms),
        ago_ms: now.saturating_sub(record.ended_ms),
        ended_ms: record.ended_ms,
        bytes: record.bytes,
    }
}

fn describe(state: ChildState) -> (&'static str, String) {
    match state {
        ChildState::Disconnected => ("disconnected", String::new()),
        ChildState::Joining => ("joining", String::new()),
        ChildState::Online => ("online", String::new()),
        ChildState::Failing(reason) => ("failing", reason.to_string()),
        ChildState::OutOfSync(reason) => ("out-of-sync", reason.to_string()),
        ChildState::Rebuilding => ("rebuilding", String::new()),
        ChildState::Witness => ("witness", String::new()),
        ChildState::Offline => ("offline", FaultReason::PoolOffline.to_string()),
        ChildState::Idle(reason) => ("idle", reason.to_string()),
        ChildState::Removed => ("removed", String::new()),
    }
}
