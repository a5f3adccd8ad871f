//! Volumes, replicas and pools that grow.

use cairn_block::{IoStatus, PoolDeviceId};
use cairn_nexus::ChildId;
use cairn_reactor::Driver;
use cairn_replica::ReplicaSlot;

use super::Shard;
use super::io::Export;
use super::pools::Waiter;
use super::volumes::PendingChange;
use crate::control::{EngineError, Reply};

impl<D: Driver> Shard<D> {
    pub(super) fn find_volume(&self, name: &str) -> Option<u32> {
        self.volumes.iter().find(|(_, v)| v.spec.name == name).map(|(at, _)| at)
    }

    /// Grows a volume, its replicas first. Answered once hosts see the new size.
    pub(super) fn resize_volume(&mut self, name: &str, blocks: u64, reply: Reply<()>, now: u64) {
        let Some(at) = self.find_volume(name) else {
            reply.send(Err(EngineError::NotFound { kind: "volume", name: name.to_owned() }));
            return;
        };
        let volume = &mut self.volumes[at];
        match volume.nexus.resize(blocks, now) {
            Ok(()) => volume.change = Some(PendingChange::Size(reply)),
            Err(error) => reply.send(Err(EngineError::Busy(error.to_string()))),
        }
        self.touch_volume(at);
    }

    /// The new size is stored by a majority: hosts may use it, and are told.
    pub(super) fn volume_resized(&mut self, at: u32, blocks: u64) {
        let volume = &mut self.volumes[at];
        tracing::info!(volume = %volume.spec.name, blocks, "the volume has grown");
        let export = volume.export;
        let seen = self.host_blocks(at);
        self.resize_unit(at);
        let volume = &mut self.volumes[at];
        if let Some((subsystem, _)) = export
            && let Err(error) = self.target.resize_namespace(subsystem, 1, seen)
        {
            tracing::error!(volume = %volume.spec.name, %error, "hosts cannot be told the size");
        }
        if let Some(PendingChange::Size(reply)) =
            volume.change.take_if(|c| matches!(c, PendingChange::Size(_)))
        {
            reply.send(Ok(()));
        }
        // One that stands by has learnt it.
        self.export_if_due(at);
    }

    pub(super) fn resize_failed(&mut self, at: u32, child: Option<ChildId>, status: IoStatus) {
        let volume = &mut self.volumes[at];
        let what = match child {
            Some(c) => {
                let replica = volume.spec.children[usize::from(c.0)].id;
                format!(
                    "replica {replica} cannot grow ({status:?}); see the log of its process. The \
                     volume stays as it was"
                )
            }
            None => "every replica was lost while it grew; the volume stays as it was".to_owned(),
        };
        tracing::warn!(volume = %volume.spec.name, what, "the volume was not grown");
        volume.fail_change(&what);
    }

    /// A replica of this process has grown, durably: its subsystem says so.
    pub(super) fn replica_resized(&mut self, pool: u16, slot: ReplicaSlot) {
        let blocks = self.replica_blocks(pool, slot);
        let on = |e: &Export| match e {
            Export::Replica { pool: p, slot: s, subsystem, .. } if (*p, *s) == (pool, slot) => {
                Some(*subsystem)
            }
            _ => None,
        };
        if let Some(subsystem) = self.exports.iter().flatten().find_map(on)
            && let Err(error) = self.target.resize_namespace(subsystem, 1, blocks)
        {
            tracing::error!(%error, "the replica's subsystem cannot tell its size");
        }
    }

    /// A replica's size in blocks; 0 where it is not there.
    pub(super) fn replica_blocks(&self, pool: u16, slot: ReplicaSlot) -> u64 {
        let pool = &self.pools[usize::from(pool)].pool;
        pool.replicas().find(|r| r.slot == slot).map_or(0, |r| r.blocks)
    }

    /// Uses a pool's device up to its new end.
    pub(super) fn grow_pool(
        &mut self,
        name: &str,
        (device, device_len): (PoolDeviceId, u64),
        reply: Reply<()>,
    ) {
        let Some(at) = self.pools.iter().position(|p| p.name == name) else {
            reply.send(Err(EngineError::NotFound { kind: "pool", name: name.to_owned() }));
            return;
        };
        let members = self.pools[at].pool.members();
        let found = members.iter().find(|m| m.id == device).and_then(|m| m.number);
        let Some(member) = found else {
            let name = device.to_string();
            reply.send(Err(EngineError::NotFound { kind: "device", name }));
            return;
        };
        let number = u16::try_from(at).expect("fewer than 2^16 pools");
        let tag = self.control_tag(number, Waiter::Grow { reply: Some(reply) });
        self.pools[at].pool.grow(tag, member, device_len, self.driver.memory());
    }
}
