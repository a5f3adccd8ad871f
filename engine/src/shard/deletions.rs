//! Deleting snapshots of a volume. A replica that is away does not hear of it, and must not keep the snapshot
//! for ever. So it is stored in the configuration first that the snapshot is deleted; then every in-sync
//! replica deletes it; and it is stored that nobody has it any more once every replica is in sync and was
//! asked, by this process or by one that took the volume over.

use cairn_block::{IoStatus, Memory, SnapshotId, SnapshotVerb};
use cairn_nexus::{ChangeError, MAX_DELETED};
use cairn_reactor::Driver;
use cairn_replica::SnapshotSpec;

use super::Shard;
use super::snapshots::{self, SnapshotWork, Told};
use crate::control::{EngineError, Reply};
use crate::snapshot::{self, SnapshotCall};

/// How long until what could not be done is tried again.
const RETRY_MS: u64 = 1_000;

/// A volume's snapshots that are being deleted.
#[derive(Default)]
pub(super) struct Deletions {
    /// Those that somebody in this process asked for.
    waiting: Vec<(SnapshotId, Reply<()>)>,
    /// The one that replicas are being asked for, and whether every replica is.
    asked: Option<(SnapshotId, bool)>,
    /// Those to ask replicas for again: one has come back that may have missed it.
    due: Vec<SnapshotId>,
    /// Nobody has these any more.
    gone: Vec<SnapshotId>,
    retry_ms: Option<u64>,
}

impl Deletions {
    fn is_waiting(&self, id: SnapshotId) -> bool {
        self.waiting.iter().any(|(waiting, _)| *waiting == id)
    }

    /// What the configuration is to name, where it names `noted`.
    fn wanted(&self, noted: &[SnapshotId]) -> Vec<SnapshotId> {
        let asked_again = |id| self.is_waiting(id);
        let stays = |id: &&SnapshotId| asked_again(**id) || !self.gone.contains(id);
        let mut wanted: Vec<SnapshotId> = noted.iter().filter(stays).copied().collect();
        for (id, _) in &self.waiting {
            if !wanted.contains(id) && wanted.len() < MAX_DELETED {
                wanted.push(*id);
            }
        }
        wanted
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn begin_deletion(
        &mut self,
        at: u32,
        snapshot: SnapshotId,
        reply: Reply<()>,
        now: u64,
    ) {
        self.volumes[at].deletions.waiting.push((snapshot, reply));
        self.advance_deletions(at, now);
    }

    /// Goes on with what can be done: after a configuration was stored, and where somebody asks.
    pub(super) fn advance_deletions(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let nexus = &volume.nexus;
        let idle = nexus.deleted().is_empty() && volume.deletions.waiting.is_empty();
        let ours = nexus.state().is_serving() && volume.hand_over.is_none() && !volume.removing();
        if idle || !ours || volume.deletions.asked.is_some() {
            return;
        }
        self.forget_oldest(at);
        let volume = &mut self.volumes[at];
        let wanted = volume.deletions.wanted(volume.nexus.deleted());
        if wanted != volume.nexus.deleted() {
            match volume.nexus.set_deleted(wanted, now) {
                Ok(()) => self.touch_volume(at),
                Err(ChangeError::NotServing) if !volume.deletions.waiting.is_empty() => {
                    self.forget_deletions(at, &ChangeError::NotServing.to_string());
                }
                Err(_) => self.delay_deletions(at, now),
            }
            return;
        }
        let (nexus, deletions) = (&volume.nexus, &mut volume.deletions);
        deletions.gone.clear();
        let asked = nexus.deleted().iter().find(|id| deletions.is_waiting(**id));
        deletions.due.retain(|id| nexus.deleted().contains(id));
        if let Some(&id) = asked.or(deletions.due.first()) {
            self.ask_deletion(at, id, now);
        }
    }

    /// Makes room where so many deletions are noted that no more fit: the replica that was away longest keeps
    /// the snapshot that was deleted longest ago, and it is seen in lists once that replica is back.
    fn forget_oldest(&mut self, at: u32) {
        let volume = &mut self.volumes[at];
        let deletions = &mut volume.deletions;
        let noted = volume.nexus.deleted();
        let lacks = deletions.waiting.iter().any(|(id, _)| !noted.contains(id));
        let (true, true, true) = (lacks, noted.len() >= MAX_DELETED, deletions.gone.is_empty())
        else {
            return;
        };
        if let Some(&oldest) = noted.iter().find(|id| !deletions.is_waiting(**id)) {
            tracing::warn!(
                volume = %volume.spec.name, snapshot = %oldest,
                "{MAX_DELETED} snapshots were deleted while a replica was away, and more cannot be \
                 remembered: it will still have this one when it comes back"
            );
            deletions.gone.push(oldest);
        }
    }

    fn ask_deletion(&mut self, at: u32, id: SnapshotId, now: u64) {
        let Some(page) = self.own_page() else {
            return self.delay_deletions(at, now);
        };
        let memory = self.driver.memory();
        let spec = SnapshotSpec { id, name: String::new(), created: 0 };
        snapshot::encode(&SnapshotCall { spec, clone: None }, memory.bytes_mut(page.slice()));
        let volume = &mut self.volumes[at];
        volume.deletions.asked = Some((id, volume.nexus.is_whole()));
        let volumes = vec![(at, volume.generation)];
        let work = SnapshotWork::new(SnapshotVerb::Delete, page, &volumes, Told::Delete);
        self.push_snapshot(work, now);
    }

    /// Every in-sync replica has deleted it, or it failed.
    pub(super) fn deletion_answered(&mut self, at: u32, status: IoStatus, now: u64) {
        let volume = &mut self.volumes[at];
        let Some((id, all)) = volume.deletions.asked.take() else { return };
        let result = match status {
            IoStatus::Ok => Ok(()),
            status => Err(snapshots::refusal(SnapshotVerb::Delete, status)),
        };
        let asked = volume.deletions.is_waiting(id);
        if result.is_ok() {
            volume.deletions.due.retain(|due| *due != id);
        }
        // One that leaves while it is asked may not have done it. Whoever asked for one that is not deleted
        // hears so, and asks again or does not: nothing deletes it behind their back.
        if (result.is_ok() && all && volume.nexus.is_whole()) || (result.is_err() && asked) {
            volume.deletions.gone.push(id);
        }
        if let Err(error) = &result
            && !asked
        {
            tracing::warn!(volume = %volume.spec.name, snapshot = %id, %error, "it is tried again");
            return self.delay_deletions(at, now);
        }
        let waiting = std::mem::take(&mut volume.deletions.waiting).into_iter();
        let (told, others): (Vec<_>, Vec<_>) = waiting.partition(|(of, _)| *of == id);
        volume.deletions.waiting = others;
        for (_, reply) in told {
            reply.send(result.clone());
        }
        self.advance_deletions(at, now);
    }

    /// A replica takes part from now on: it may have missed what was deleted while it did not.
    pub(super) fn deletions_missed(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        if !volume.nexus.deleted().is_empty() {
            volume.deletions.due = volume.nexus.deleted().to_vec();
            self.advance_deletions(at, now);
        }
    }

    fn delay_deletions(&mut self, at: u32, now: u64) {
        self.volumes[at].deletions.retry_ms = Some(now + RETRY_MS);
        self.wants_timeout(Some(now + RETRY_MS));
    }

    pub(super) fn retry_deletions(&mut self, at: u32, now: u64) {
        match self.volumes[at].deletions.retry_ms {
            Some(due) if due <= now => {
                self.volumes[at].deletions.retry_ms = None;
                self.advance_deletions(at, now);
            }
            later => self.wants_timeout(later),
        }
    }

    /// The volume is not this process's any more, or cannot store anything: what is noted is deleted by
    /// whoever serves it.
    pub(super) fn forget_deletions(&mut self, at: u32, why: &str) {
        for (_, reply) in std::mem::take(&mut self.volumes[at].deletions).waiting {
            reply.send(Err(EngineError::Storage(why.to_owned())));
        }
    }
}
