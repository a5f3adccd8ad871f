//! Taking a volume back to a snapshot. Replicas do it one by one, and while some have and others have not the
//! volume must not be used. So it is stored in the configuration first; then every in-sync replica does it,
//! again after a crash or a takeover; then it is stored that all have. Hosts wait all the while, and never
//! is it done over what they write afterwards.

use cairn_block::{IoStatus, Memory, SnapshotId, SnapshotVerb};
use cairn_reactor::Driver;
use cairn_replica::SnapshotSpec;

use super::Shard;
use super::snapshots::{self, SnapshotWork, Told};
use crate::control::{EngineError, Reply};
use crate::snapshot::{self, SnapshotCall};

/// How long until what could not be done is tried again.
const RETRY_MS: u64 = 1_000;

/// A volume's way back.
pub(super) struct Restore {
    snapshot: SnapshotId,
    /// Who asked for it, where that was in this process.
    reply: Option<Reply<()>>,
    /// No replica may have done it yet.
    fresh: bool,
    /// What came of it, once that is known.
    result: Option<Result<(), EngineError>>,
    retry_ms: Option<u64>,
}

impl<D: Driver> Shard<D> {
    /// Stores that the volume goes back; the rest follows once a majority has it.
    pub(super) fn begin_restore(
        &mut self,
        at: u32,
        snapshot: SnapshotId,
        reply: Reply<()>,
        now: u64,
    ) {
        let volume = &mut self.volumes[at];
        match volume.nexus.set_restoring(Some(snapshot), now) {
            Err(error) => reply.send(Err(EngineError::Busy(error.to_string()))),
            Ok(()) => {
                let (reply, result) = (Some(reply), None);
                volume.restore =
                    Some(Restore { snapshot, reply, fresh: true, result, retry_ms: None });
            }
        }
        self.touch_volume(at);
    }

    /// It is stored that the volume goes back, or that it has.
    pub(super) fn restoring_changed(&mut self, at: u32, to: Option<SnapshotId>, now: u64) {
        let volume = &mut self.volumes[at];
        let name = &volume.spec.name;
        match to {
            Some(snapshot) => {
                tracing::info!(volume = %name, %snapshot, "the volume goes back to a snapshot");
                let (reply, result) = (None, None);
                volume.restore.get_or_insert(Restore {
                    snapshot,
                    reply,
                    fresh: false,
                    result,
                    retry_ms: None,
                });
                self.update_ana(at);
                self.ask_restore(at, now);
            }
            None => {
                tracing::info!(volume = %name, "the volume is as the snapshot was");
                let over = volume.restore.take();
                if let Some(Restore { reply: Some(reply), result: Some(result), .. }) = over {
                    reply.send(result);
                }
                self.export_if_due(at);
                self.update_ana(at);
                self.touch_volume(at);
            }
        }
    }

    /// Has the replicas do it.
    fn ask_restore(&mut self, at: u32, now: u64) {
        let Some(restore) = self.volumes[at].restore.as_mut() else { return };
        let snapshot = restore.snapshot;
        let Some(page) = self.own_page() else {
            if let Some(restore) = self.volumes[at].restore.as_mut() {
                restore.retry_ms = Some(now + RETRY_MS);
            }
            return self.wants_timeout(Some(now + RETRY_MS));
        };
        let memory = self.driver.memory();
        let spec = SnapshotSpec { id: snapshot, name: String::new(), created: 0 };
        snapshot::encode(&SnapshotCall { spec, clone: None }, memory.bytes_mut(page.slice()));
        let volumes = vec![(at, self.volumes[at].generation)];
        let work = SnapshotWork::new(SnapshotVerb::Restore, page, &volumes, Told::Restore);
        self.push_snapshot(work, now);
    }

    /// Every in-sync replica has done it, or it failed.
    pub(super) fn restore_answered(&mut self, at: u32, status: IoStatus, now: u64) {
        let name = self.volumes[at].spec.name.clone();
        let Some(restore) = self.volumes[at].restore.as_mut() else { return };
        match status {
            IoStatus::Ok => restore.result = Some(Ok(())),
            // Every replica refused, and has done nothing.
            IoStatus::InvalidField if restore.fresh => {
                restore.result = Some(Err(snapshots::refusal(SnapshotVerb::Restore, status)));
            }
            status => {
                tracing::warn!(volume = %name, ?status, "not taken back yet; it is tried again");
                restore.fresh = false;
                restore.retry_ms = Some(now + RETRY_MS);
                return self.wants_timeout(Some(now + RETRY_MS));
            }
        }
        self.end_restore(at, now);
    }

    /// Stores that it is over.
    fn end_restore(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        if let Err(error) = volume.nexus.set_restoring(None, now) {
            tracing::debug!(volume = %volume.spec.name, %error, "not stored yet");
            if let Some(restore) = volume.restore.as_mut() {
                restore.retry_ms = Some(now + RETRY_MS);
            }
            self.wants_timeout(Some(now + RETRY_MS));
        }
        self.touch_volume(at);
    }

    pub(super) fn retry_restore(&mut self, at: u32, now: u64) {
        let Some(restore) = self.volumes[at].restore.as_mut() else { return };
        match restore.retry_ms {
            Some(due) if due <= now => {
                restore.retry_ms = None;
                match restore.result {
                    None => self.ask_restore(at, now),
                    Some(_) => self.end_restore(at, now),
                }
            }
            later => self.wants_timeout(later),
        }
    }

    /// The volume is not this process's any more: whoever serves it goes on.
    pub(super) fn forget_restore(&mut self, at: u32, why: &str) {
        let restore = self.volumes[at].restore.take();
        if let Some(reply) = restore.and_then(|r| r.reply) {
            reply.send(Err(EngineError::Storage(why.to_owned())));
        }
    }
}
