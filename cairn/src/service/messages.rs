//! What the API tells of pools, replicas and volumes.

use cairn_api::v1;
use cairn_engine::{DeviceReport, ExportCounters, PoolReport, ReplicaReport, VolumeReport};

use super::uri::replica_uri;
use super::{BLOCK, Service};

impl Service {
    pub(super) fn pool_message(report: PoolReport) -> v1::Pool {
        let extent = u64::from(report.usage.extent_bytes);
        let paths: Vec<&str> =
            report.devices.iter().map(|d| d.path.as_str()).filter(|p| !p.is_empty()).collect();
        v1::Pool {
            path: paths.join(" "),
            name: report.name,
            id: report.id.to_string(),
            state: report.state,
            capacity_bytes: report.usage.extents_total * extent,
            free_bytes: report.usage.extents_free * extent,
            extent_bytes: report.usage.extent_bytes,
            dirty_extents: report.dirty_extents,
            open_extents: report.open_extents,
            checksum_mismatches: report.checksum_mismatches,
            devices: report.devices.into_iter().map(device_message).collect(),
            reserved_bytes: report.usage.extents_reserved * extent,
            provisioned_bytes: report.usage.extents_provisioned * extent,
            warning: report.warning,
            shard: u32::from(report.shard),
        }
    }

    pub(super) fn replica_message(&self, report: ReplicaReport) -> v1::Replica {
        let uri = self
            .addresses
            .first()
            .map_or_else(String::new, |address| format!("nvme+tcp://{address}/{}", report.nqn));
        v1::Replica {
            id: report.id.to_string(),
            volume_id: report.volume.to_string(),
            name: report.name,
            pool: report.pool,
            state: report.state,
            size_bytes: report.blocks * u64::from(report.block_size.bytes()),
            block_size: report.block_size.bytes(),
            allocated_bytes: report.allocated_bytes,
            nqn: report.nqn,
            uri,
            counters: Some(counters_message(report.counters)),
        }
    }

    pub(super) fn volume_message(&self, report: VolumeReport) -> v1::Volume {
        let scrub = self.scrubs.message(&report);
        let (rebuilt, totals) = self.rebuilds.message(&report);
        let replacement = self.replacement_message(&report);
        let saved = self.saved(&report.name).ok().and_then(|volume| volume.shared);
        let sharing = saved.map(|shared| shared.message());
        let iscsi = report.iscsi.map(|unit| self.unit_message(&report.name, unit));
        let children = report.children.into_iter().map(|child| v1::Child {
            replica_id: child.replica.to_string(),
            uri: replica_uri(child.replica, &child.address),
            state: child.state,
            reason: self.members.reason(child.replica, child.reason),
            in_sync: child.in_sync,
            load: child.load,
            witness: child.witness,
            connected: child.connected,
        });
        let hosts = report.hosts.into_iter().map(|host| v1::Host {
            nqn: host.nqn,
            controller: u32::from(host.controller),
            io_queues: u32::from(host.io_queues),
        });
        v1::Volume {
            sharing,
            iscsi,
            id: report.id.to_string(),
            name: report.name,
            nqn: report.nqn,
            size_bytes: report.blocks * BLOCK,
            block_size: report.block_size.bytes(),
            state: report.state,
            detail: report.detail,
            epoch: report.epoch,
            children: children.collect(),
            hosts: hosts.collect(),
            counters: Some(counters_message(report.counters)),
            in_flight: report.in_flight as u64,
            addresses: self.addresses.iter().map(ToString::to_string).collect(),
            serving: report.serving,
            unfit: report.unfit,
            encryption: report.encryption.map(|e| v1::Encryption {
                cipher: e.cipher.to_owned(),
                key_id: e.key_id.to_string(),
            }),
            mends: Some(v1::Mends {
                attempted: report.mends.heals,
                healed_blocks: report.mends.healed,
                unrecoverable_blocks: report.mends.unrecoverable,
                converged_writes: report.mends.converged,
            }),
            scrub: Some(scrub),
            rebuild: report.rebuild.map(|r| v1::Rebuild {
                replica_id: r.replica.to_string(),
                stage: r.stage.to_owned(),
                bytes_total: r.bytes_total,
                bytes_done: r.bytes_done,
                bytes_per_s: r.bytes_per_s,
                running_ms: r.running_ms,
            }),
            rebuilt,
            rebuild_totals: Some(totals),
            replacement,
            unreconciled_mib: report.unreconciled.0 as u64,
            reconcile_mib: report.unreconciled.1 as u64,
            shard: u32::from(report.shard),
        }
    }
}

fn device_message(report: DeviceReport) -> v1::Device {
    v1::Device {
        id: report.id.to_string(),
        path: report.path,
        state: report.state,
        reason: report.reason,
        size_bytes: report.size_bytes,
        free_bytes: report.free_bytes,
        extents_left: report.extents_left,
    }
}

fn counters_message(counters: ExportCounters) -> v1::IoCounters {
    v1::IoCounters {
        reads: counters.reads,
        writes: counters.writes,
        flushes: counters.flushes,
        discards: counters.discards,
        read_bytes: counters.read_bytes,
        written_bytes: counters.written_bytes,
        errors: counters.errors,
    }
}
