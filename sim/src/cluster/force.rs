//! Volumes that are started by force, and whether they have to be.

use cairn_block::{Epoch, ReplicaId, VolumeId};
use cairn_engine::nexus::{Config, Purpose};

use super::{Cluster, Seat, pools, volume_of};

/// What whoever starts a volume by force has noted of it, until it is known to be done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forced {
    source: ReplicaId,
    random: u32,
    /// It was seen to serve: what the source holds is the volume.
    pub(super) serves: bool,
}

impl Forced {
    pub(super) fn purpose(self) -> Purpose {
        Purpose::ForceStart { source: self.source, random: self.random }
    }
}

/// What registers say of a volume whose other replicas are gone.
#[derive(Debug, Clone)]
pub struct Left {
    /// Replicas that the newest configuration waits for, and that are gone.
    pub missing: Vec<ReplicaId>,
    /// Replicas that are there and hold data of the volume; the newest last.
    pub sources: Vec<Seat>,
}

impl Cluster {
    /// Orders epochs of a volume across forced starts.
    pub(super) fn era(&self, volume: usize, epoch: u64) -> u64 {
        self.lineages[volume] << 32 | epoch
    }

    /// The configurations that the replicas of a volume hold which are not gone, the newest last.
    fn stored(&self, volume: usize) -> Vec<(Seat, (u64, Epoch, u64), Config)> {
        let there = self.seats[volume].iter().filter(|seat| !self.gone.contains(&seat.pool));
        let mut all: Vec<_> = there
            .filter_map(|seat| {
                let pool = pools::open(&mut self.copies(seat.pool)).pool;
                let register = pool.find(seat.id).and_then(|slot| pool.register(slot).cloned())?;
                let config = Config::decode(&register.config).ok()?;
                let rank = (config.lineage >> 32, register.accepted_epoch, register.seq);
                (volume_of(config.volume) == volume).then_some((*seat, rank, config))
            })
            .collect();
        all.sort_by_key(|(_, rank, _)| *rank);
        all
    }

    /// What is left of a volume that can not come up, since what it needs is gone; nothing where it can.
    #[must_use]
    pub fn what_is_left(&self, volume: usize) -> Option<Left> {
        let stored = self.stored(volume);
        let Some((_, _, newest)) = stored.last() else {
            return Some(Left { missing: Vec::new(), sources: Vec::new() });
        };
        let is_gone = |id: ReplicaId| self.gone.contains(&super::members::pool_of(id));
        let voters = newest.members.len();
        let here = newest.members.iter().filter(|m| !is_gone(m.replica)).count();
        let in_sync = newest.members.iter().filter(|m| m.in_sync);
        let missing: Vec<ReplicaId> = if here <= voters / 2 {
            newest.members.iter().map(|m| m.replica).filter(|id| is_gone(*id)).collect()
        } else if in_sync.clone().all(|m| is_gone(m.replica)) {
            in_sync.map(|m| m.replica).collect()
        } else {
            return None;
        };
        let sources = stored.iter().filter(|(seat, ..)| !seat.witness).map(|(seat, ..)| *seat);
        Some(Left { missing, sources: sources.collect() })
    }

    /// Starts a volume by force from one replica. The other machine that serves volumes has let go of it.
    pub fn start_by_force(&mut self, volume: usize, seat: Seat, random: u32) {
        let source = seat.id;
        // One that was a member once may have been forgotten.
        let named = &mut self.named[self.active][volume];
        named.retain(|other| other.id != source);
        named.push(seat);
        self.world().say(format_args!("volume {volume} is started by force from {source}"));
        let other = 1 - self.active;
        self.kill_process(other);
        self.lineages[volume] += 1;
        self.serving.borrow_mut().retain(|(id, _), _| *id != VolumeId(volume as u128 + 1));
        self.forced[volume] = Some(Forced { source, random, serves: false });
        self.snapshots.retain(|asked| asked.volume != volume);
        self.taken.retain(|(of, ..)| *of != volume);
        self.dropped.retain(|(of, ..)| *of != volume);
        self.deleted.retain(|(of, _)| *of != volume);
        self.remove_volume(self.active, volume);
    }

    /// Whether the machine that is to serve a volume is told of a replica.
    #[must_use]
    pub fn is_named(&self, volume: usize, id: ReplicaId) -> bool {
        self.named[self.active][volume].iter().any(|seat| seat.id == id)
    }

    /// Whether a volume is being started by force.
    #[must_use]
    pub fn is_forced(&self, volume: usize) -> bool {
        self.forced[volume].is_some()
    }

    /// Whether a volume was seen to serve that is being started by force.
    #[must_use]
    pub fn force_serves(&self, volume: usize) -> bool {
        self.forced[volume].is_some_and(|forced| forced.serves)
    }

    /// It is known to serve: only the source is named from now on, wherever.
    pub fn force_is_done(&mut self, volume: usize) {
        let Some(forced) = self.forced[volume].take() else { return };
        for named in &mut self.named {
            named[volume].retain(|seat| seat.id == forced.source);
        }
    }

    /// The volume serves that was started by force: from now on it is what its source holds.
    pub(super) fn take_truth_from_source(&mut self, volume: usize) {
        let Some(forced) = self.forced[volume] else { return };
        let bytes = self.contents(volume, forced.source);
        let bytes = self.decrypted(volume, 0, &bytes);
        self.histories[volume].borrow_mut().starts_anew(&bytes);
    }
}
