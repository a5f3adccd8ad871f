//! Taking a volume back to a snapshot. Replicas do it one by one, and while some have and others have not
//! the volume must not be used. So it is remembered first, done by a task of the process rather than by
//! the call, done again after a crash before hosts are served, and hosts go on once it is remembered that
//! it is over: never is it done again over what they write.

use std::time::Duration;

use cairn_api::v1;
use cairn_engine::block::{SnapshotId, SnapshotVerb};
use cairn_engine::control::Command;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tonic::{Code, Status};

use super::Service;
use super::snapshots::call;

/// How long until one that could not be done is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// A call that waits, and for which volume.
type Caller = (String, oneshot::Sender<Result<(), Status>>);

/// Calls that wait for the task.
#[derive(Debug, Default)]
pub(super) struct Restores {
    wake: Notify,
    callers: Mutex<Vec<Caller>>,
}

impl Service {
    pub(super) async fn restore(
        &self,
        request: v1::RestoreSnapshotRequest,
    ) -> Result<v1::Volume, Status> {
        let name = request.volume;
        let found = self.find(&name, &request.snapshot).await?;
        if found.replicas < found.of_replicas {
            return Err(Status::failed_precondition(format!(
                "snapshot `{}` is on {} of {} replicas: those without it would be lost",
                found.name, found.replicas, found.of_replicas
            )));
        }
        let report = self.known(&name).await?;
        if !report.serving {
            return Err(Status::failed_precondition(format!(
                "volume `{name}` is not being served"
            )));
        }
        if !report.hosts.is_empty() && !request.force {
            return Err(Status::failed_precondition(format!(
                "{} hosts are connected to volume `{name}`, and would go on with what they have in \
                 memory; disconnect them first, or use force",
                report.hosts.len()
            )));
        }
        let answer = self.begin_restore(&name, found.id)?;
        self.restores.wake.notify_one();
        answer.await.map_err(|_| Status::aborted("the volume or the process has gone"))??;
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Remembers what is to be done, and who waits for it: the task sees both or neither.
    fn begin_restore(
        &self,
        name: &str,
        id: SnapshotId,
    ) -> Result<oneshot::Receiver<Result<(), Status>>, Status> {
        let mut callers = self.restores.callers.lock();
        let mut taken = false;
        self.change(|volumes| {
            for volume in volumes.iter_mut().filter(|v| v.name == name && v.restoring.is_none()) {
                volume.restoring = Some(id.to_string());
                taken = true;
            }
        })?;
        if !taken {
            return Err(Status::failed_precondition(format!(
                "volume `{name}` is being restored already"
            )));
        }
        let (told, answer) = oneshot::channel();
        callers.push((name.to_owned(), told));
        Ok(answer)
    }

    /// Does what is remembered, as long as the process runs.
    pub(crate) async fn finish_restores(&self) {
        // What is there at the start was begun by a process before: some replicas may have done it.
        let mut begun: Vec<String> = self.restoring().into_iter().map(|(name, _)| name).collect();
        loop {
            let mut again = false;
            for (name, id) in self.restoring() {
                let before = begun.contains(&name);
                if !before {
                    begun.push(name.clone());
                }
                let over = match self.restore_one(&name, id).await {
                    Ok(()) => self.restored(&name, Ok(())).await,
                    // Every replica refused, and has done nothing.
                    Err(status) if !before && status.code() == Code::InvalidArgument => {
                        self.restored(&name, Err(status)).await
                    }
                    Err(status) => {
                        tracing::warn!(volume = %name, "not restored yet: {}", status.message());
                        false
                    }
                };
                again |= !over;
                begun.retain(|other| !over || *other != name);
            }
            self.answer_for_the_gone();
            if again {
                tokio::time::sleep(RETRY).await;
            } else {
                self.restores.wake.notified().await;
            }
        }
    }

    fn restoring(&self) -> Vec<(String, SnapshotId)> {
        let state = self.state.lock();
        let one = |v: &crate::state::SavedVolume| {
            Some((v.name.clone(), v.restoring.as_ref()?.parse().ok()?))
        };
        state.volumes.iter().filter_map(one).collect()
    }

    async fn restore_one(&self, name: &str, id: SnapshotId) -> Result<(), Status> {
        let volumes = vec![name.to_owned()];
        self.snapshot(volumes, SnapshotVerb::Restore, call(id, ""), true).await
    }

    /// It is over: remembered first, and then hosts go on. False where it could not be remembered.
    async fn restored(&self, name: &str, result: Result<(), Status>) -> bool {
        let forgotten = self.change(|volumes| {
            volumes.iter_mut().filter(|v| v.name == name).for_each(|v| v.restoring = None);
        });
        if let Err(error) = forgotten {
            tracing::error!(volume = %name, "hosts wait: {}", error.message());
            return false;
        }
        let wanted = name.to_owned();
        let released = self.ask(|reply| Command::ReleaseVolume { name: wanted, reply }).await;
        self.tell(name, &result.and(released));
        true
    }

    /// Whoever waits for a volume that is not there any more hears so.
    fn answer_for_the_gone(&self) {
        let mut callers = self.restores.callers.lock();
        let known = self.restoring();
        callers.retain(|(volume, _)| known.iter().any(|(name, _)| name == volume));
    }

    fn tell(&self, name: &str, result: &Result<(), Status>) {
        let callers = std::mem::take(&mut *self.restores.callers.lock());
        let (those, others): (Vec<_>, Vec<_>) =
            callers.into_iter().partition(|(volume, _)| volume == name);
        self.restores.callers.lock().extend(others);
        for (_, told) in those {
            // The caller may have hung up.
            let _delivered = told.send(result.clone());
        }
    }
}
