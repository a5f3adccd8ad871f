//! What a checker looks at between two turns.

use cairn_block::{Epoch, ReplicaId, SnapshotId, VolumeId};
use cairn_nexus::Purpose;
use cairn_reactor::Driver;

use super::Shard;
use super::io::Export;

/// A volume of a process, as a checker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchedVolume {
    /// Which.
    pub id: VolumeId,
    /// The epoch that its nexus took last.
    pub epoch: Epoch,
    /// Whether hosts are served, as far as the nexus knows.
    pub serving: bool,
    /// The number of the configuration that it goes by, within its epoch.
    pub stored: u64,
    /// Whether its nexus goes by a configuration that it knows to be stored.
    pub governs: bool,
    /// The snapshot that the volume is being taken back to, by that configuration.
    pub restoring: Option<SnapshotId>,
    /// Reads that were answered, and changes that were acked.
    pub reads: u64,
    /// See `reads`.
    pub changes: u64,
    /// Requests that were in hand when the volume was handed over, and were not waited for.
    pub cut_off: u64,
}

/// The register of a replica, as a checker sees it: what is stored, or is being stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WatchedRegister {
    /// Whose.
    pub replica: ReplicaId,
    /// The newest epoch that it has promised.
    pub promised: Epoch,
    /// The epoch and the sequence number of its configuration.
    pub accepted: (Epoch, u64),
}

impl<D: Driver> Shard<D> {
    /// Who votes on a volume, by the configuration that it is served by: a majority of them has stored it,
    /// but after a forced start, of which nothing is told.
    #[must_use]
    pub fn watch_voters(&self, id: VolumeId) -> Vec<ReplicaId> {
        let forced = |p: Purpose| matches!(p, Purpose::ForceStart { .. });
        let found = self.volumes.iter().find(|(_, v)| v.spec.id == id && !forced(v.spec.purpose));
        found.map_or(Vec::new(), |(_, volume)| volume.nexus.stored_voters().collect())
    }

    /// The volumes of this process.
    pub fn watch_volumes(&self) -> impl Iterator<Item = WatchedVolume> {
        self.volumes.iter().map(|(_, volume)| WatchedVolume {
            id: volume.spec.id,
            epoch: volume.nexus.status().epoch,
            serving: volume.nexus.state().is_serving() && volume.export.is_some(),
            stored: volume.nexus.stored_seq(),
            governs: volume.nexus.state().is_serving(),
            restoring: volume.nexus.stored_restoring(),
            reads: volume.counters.reads,
            changes: volume.counters.writes + volume.counters.discards,
            cut_off: volume.cut_off,
        })
    }

    /// The registers of the replicas in this process.
    pub fn watch_registers(&self) -> impl Iterator<Item = WatchedRegister> {
        self.exports.iter().flatten().filter_map(|export| {
            let Export::Replica { pool, slot, id, .. } = export else { return None };
            let register = self.pools[usize::from(*pool)].pool.register(*slot)?;
            Some(WatchedRegister {
                replica: *id,
                promised: register.promised_epoch,
                accepted: (register.accepted_epoch, register.seq),
            })
        })
    }
}
