//! Replicas that are gone for long are replaced by ones in spare pools.
//!
//! How long one is gone is counted while the process runs and the volume serves, so that a nexus that was
//! away itself replaces nobody at its start.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cairn_api::v1;
use cairn_engine::VolumeReport;
use cairn_engine::block::{BlockSize, ReplicaId};
use cairn_engine::control::Command;
use cairn_engine::replica::ReplicaSpec;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

use super::{BLOCK, Service};
use crate::client::connect;
use crate::config::{self, Spare};
use crate::state::SavedReplacement;

/// Another process must answer within this time.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// How exactly it is stored how long a replica has been gone.
const STORED_S: u64 = 10;
/// More than this between two looks is not counted: the machine slept.
const MAX_STEP: Duration = Duration::from_secs(30);
/// How long until the spare pools are looked at again after none was fit.
const RETRY: Duration = Duration::from_secs(30);

/// A replica that is out of sync and cannot be reached, or was, and how it went on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Gone {
    volume: String,
    replica: String,
    for_s: u64,
    /// It was replaced, or somebody decided that it is not to be.
    settled: bool,
}

#[derive(Debug, Default)]
struct Saved {
    path: PathBuf,
    gone: Vec<Gone>,
    /// What is not in the file yet.
    counted: Vec<(String, Duration)>,
    looked: Option<Instant>,
    /// Spares that refused a replica, by the replica that was to be replaced.
    refused: Vec<(String, String)>,
    /// Why there is none for a replica, and when that is looked at again.
    said: Vec<(String, String, Instant)>,
}

/// What is known of replicas that are gone.
#[derive(Debug)]
pub(super) struct Spares {
    saved: Mutex<Saved>,
    after_s: u64,
    pools: Vec<Spare>,
}

impl Spares {
    pub(super) fn new(state_dir: &Path, settings: &config::Nexus) -> Self {
        let path = state_dir.join("spares.json");
        let gone = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                // It is counted anew.
                tracing::warn!(path = %path.display(), %error, "how long replicas are gone is lost");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        Self {
            saved: Mutex::new(Saved { path, gone, ..Saved::default() }),
            after_s: settings.replace_after.0,
            pools: settings.spares.clone(),
        }
    }

    /// What there is to say of a replica.
    pub(super) fn said_of(&self, replica: ReplicaId) -> Option<String> {
        let replica = replica.to_string();
        let saved = self.saved.lock();
        saved.said.iter().find(|(of, ..)| *of == replica).map(|(_, text, _)| text.clone())
    }

    /// It is not to be replaced before it has been in sync again.
    pub(super) fn leave_alone(&self, replica: &str) {
        let mut saved = self.saved.lock();
        for gone in saved.gone.iter_mut().filter(|g| g.replica == replica) {
            gone.settled = true;
        }
        saved.store();
    }

    fn refuse(&self, old: &str, spare: &str) {
        self.saved.lock().refused.push((old.to_owned(), spare.to_owned()));
    }

    /// Counts. The replica of each volume that has been gone for too long.
    fn look(&self, reports: &[VolumeReport], now: Instant) -> Vec<(String, String)> {
        let mut saved = self.saved.lock();
        let step = saved.looked.map_or(Duration::ZERO, |at| now.duration_since(at)).min(MAX_STEP);
        saved.looked = Some(now);
        saved.count(reports, step);
        let due = |g: &&Gone| !g.settled && g.for_s >= self.after_s;
        let due = saved.gone.iter().filter(due).map(|g| (g.volume.clone(), g.replica.clone()));
        let due: Vec<_> = due.collect();
        let waits = |replica: &String| {
            saved.said.iter().any(|(of, _, until)| of == replica && now < *until)
        };
        due.into_iter().filter(|(_, replica)| !waits(replica)).collect()
    }
}

impl Saved {
    fn count(&mut self, reports: &[VolumeReport], step: Duration) {
        let before = self.gone.clone();
        for report in reports.iter().filter(|r| r.serving) {
            let id = report.id.to_string();
            let there =
                |g: &Gone| report.children.iter().any(|c| c.replica.to_string() == g.replica);
            self.gone.retain(|g| g.volume != id || there(g));
            for child in report.children.iter().filter(|c| !c.witness && c.state != "idle") {
                let replica = child.replica.to_string();
                let known = self.gone.iter().position(|g| g.volume == id && g.replica == replica);
                match known {
                    Some(at) if child.in_sync => {
                        self.gone.remove(at);
                    }
                    // It is being rebuilt, or will be.
                    Some(at) if child.connected => self.gone[at].for_s = 0,
                    Some(at) => self.gone[at].for_s += self.whole_seconds(&replica, step),
                    None if child.in_sync || child.connected => {}
                    None => self.gone.push(Gone {
                        volume: id.clone(),
                        replica: replica.clone(),
                        for_s: 0,
                        settled: false,
                    }),
                }
            }
        }
        let gone = &self.gone;
        let is_gone = |replica: &String| {
            gone.iter().any(|g| g.replica == *replica && (g.for_s > 0 || !g.settled))
        };
        self.counted.retain(|(replica, _)| is_gone(replica));
        self.refused.retain(|(replica, _)| is_gone(replica));
        self.said.retain(|(replica, ..)| is_gone(replica));
        let key = |g: &Gone| (g.volume.clone(), g.replica.clone(), g.for_s / STORED_S, g.settled);
        if !before.iter().map(key).eq(self.gone.iter().map(key)) {
            self.store();
        }
    }

    /// Adds to what was counted of it; takes the whole seconds.
    fn whole_seconds(&mut self, replica: &str, step: Duration) -> u64 {
        let at = self.counted.iter().position(|(of, _)| of == replica).unwrap_or_else(|| {
            self.counted.push((replica.to_owned(), Duration::ZERO));
            self.counted.len() - 1
        });
        let sum = self.counted[at].1 + step;
        self.counted[at].1 = Duration::from_nanos(u64::from(sum.subsec_nanos()));
        sum.as_secs()
    }

    fn store(&self) {
        let stored = serde_json::to_vec_pretty(&self.gone)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| crate::state::replace(&self.path, &bytes));
        if let Err(error) = stored {
            tracing::error!("{error:#}");
        }
    }
}

impl Service {
    /// Begins to replace what has been gone for too long, one at a time.
    pub(super) async fn look_for_spares(&self, reports: &[VolumeReport]) {
        let spares = &self.members.spares;
        if spares.after_s == 0 {
            return;
        }
        for (volume, old) in spares.look(reports, Instant::now()) {
            let saved = self.state.lock().volumes.clone();
            let by_itself = |r: &SavedReplacement| !r.spare.is_empty();
            if saved.iter().filter_map(|v| v.replacement.as_ref()).any(by_itself) {
                return;
            }
            let Some(report) = reports.iter().find(|r| r.id.to_string() == volume) else {
                continue;
            };
            let Some(of) = saved.iter().find(|v| v.id == volume) else { continue };
            let busy = of.replacement.is_some() || of.forced.is_some();
            if busy || report.state != "degraded" {
                continue;
            }
            match self.choose_spare(report, &old).await {
                Ok(spare) => self.begin_with_spare(report, &old, &spare),
                Err(why) => {
                    let text = format!("it is not replaced: {why}");
                    tracing::warn!(volume = %report.name, replica = %old, "{text}");
                    let mut saved = spares.saved.lock();
                    saved.said.retain(|(of, ..)| *of != old);
                    // All of them are asked again then.
                    saved.refused.retain(|(of, _)| *of != old);
                    saved.said.push((old, text, Instant::now() + RETRY));
                }
            }
        }
    }

    fn begin_with_spare(&self, report: &VolumeReport, old: &str, spare: &Spare) {
        let name = &report.name;
        let new = uuid::Uuid::new_v4().to_string();
        tracing::warn!(
            volume = %name, %old, %new, %spare,
            "a replica has been gone for too long and is replaced by one in a spare pool"
        );
        let replacement = SavedReplacement {
            old: old.to_owned(),
            new,
            uri: String::new(),
            now: false,
            spare: spare.to_string(),
        };
        let stored = self.change_one(name, |volume| volume.replacement = Some(replacement));
        match stored {
            Ok(()) => self.members.wake(),
            Err(error) => tracing::error!(volume = %name, "{}", error.message()),
        }
    }

    /// The first spare pool that answers and has no replica of the volume yet.
    async fn choose_spare(&self, report: &VolumeReport, old: &str) -> Result<Spare, String> {
        let mut why = Vec::new();
        for spare in &self.members.spares.pools {
            let refused = {
                let saved = self.members.spares.saved.lock();
                saved.refused.iter().any(|(of, by)| of == old && *by == spare.to_string())
            };
            if refused {
                why.push(format!("{spare} refused"));
                continue;
            }
            let volume = report.id.to_string();
            match self.replicas_in(spare).await {
                Ok(replicas) if replicas.iter().any(|r| r.volume_id == volume) => {
                    why.push(format!("{spare} has a replica of the volume already"));
                }
                Ok(_) => return Ok(spare.clone()),
                Err(status) => why.push(format!("{spare}: {}", status.message())),
            }
        }
        Err(format!("no spare pool is fit ({})", why.join("; ")))
    }

    /// The replicas in a spare pool; an error where it is not to be had.
    async fn replicas_in(&self, spare: &Spare) -> Result<Vec<v1::Replica>, Status> {
        let (pools, replicas) = match &spare.socket {
            None => {
                let pools = self.ask(|reply| Command::ListPools { reply }).await?;
                let replicas = self.ask(|reply| Command::ListReplicas { reply }).await?;
                (
                    pools.into_iter().map(Self::pool_message).collect(),
                    replicas.into_iter().map(|r| self.replica_message(r)).collect(),
                )
            }
            Some(socket) => {
                within(async {
                    let mut peer = connect(socket).await.map_err(unreachable)?;
                    let pools = peer.list_pools(v1::ListPoolsRequest {}).await?;
                    let replicas = peer.list_replicas(v1::ListReplicasRequest {}).await?;
                    Ok((pools.into_inner().pools, replicas.into_inner().replicas))
                })
                .await?
            }
        };
        let found = pools.iter().find(|p| p.name == spare.pool);
        match found.map(|p: &v1::Pool| p.state.as_str()) {
            None => Err(Status::not_found(format!("there is no pool `{}`", spare.pool))),
            Some("online" | "degraded") => {
                Ok(replicas.into_iter().filter(|r: &v1::Replica| r.pool == spare.pool).collect())
            }
            Some(state) => Err(Status::failed_precondition(format!("the pool is {state}"))),
        }
    }

    /// Makes the replica in its spare pool, or finds it there, and remembers where it is.
    pub(super) async fn make_spare(
        &self,
        report: &VolumeReport,
        replacement: &SavedReplacement,
    ) -> Result<(), Status> {
        let spare = Spare::try_from(replacement.spare.clone()).map_err(Status::internal)?;
        let made = self.make_in(&spare, report, &replacement.new).await;
        let found = match made {
            Err(status) if matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable) => {
                return Err(status);
            }
            Err(status) => {
                // A call that was cut off may have made it.
                let all = self.replicas_in(&spare).await?;
                let Some(found) = all.into_iter().find(|r| r.id == replacement.new) else {
                    self.members.spares.refuse(&replacement.old, &replacement.spare);
                    self.change_one(&report.name, |volume| volume.replacement = None)?;
                    return Err(status);
                };
                found
            }
            Ok(made) => made,
        };
        let uri = match spare.socket {
            // One of another shard is reached as one of another process.
            None if self.pool_report(&spare.pool).await?.shard == report.shard => {
                format!("local:{}/{}", spare.pool, found.id)
            }
            _ => found.uri,
        };
        self.change_one(&report.name, |volume| {
            volume.replacement.iter_mut().for_each(|r| r.uri.clone_from(&uri));
        })?;
        self.members.wake();
        Ok(())
    }

    async fn make_in(
        &self,
        spare: &Spare,
        report: &VolumeReport,
        id: &str,
    ) -> Result<v1::Replica, Status> {
        let wrong = |_| Status::internal("the id of the new replica cannot be read");
        let Some(socket) = &spare.socket else {
            let pool = spare.pool.clone();
            let spec = ReplicaSpec {
                id: id.parse().map_err(wrong)?,
                volume: report.id,
                name: report.name.clone(),
                blocks: report.blocks,
                block_size: BlockSize::B4096,
                thick: false,
                source: None,
            };
            let made = self.ask(|reply| Command::CreateReplica { pool, spec, reply }).await?;
            return Ok(self.replica_message(made));
        };
        let request = v1::CreateReplicaRequest {
            pool: spare.pool.clone(),
            volume_id: report.id.to_string(),
            name: report.name.clone(),
            size_bytes: report.blocks * BLOCK,
            id: id.to_owned(),
            thick: false,
        };
        within(async {
            let mut peer = connect(socket).await.map_err(unreachable)?;
            Ok(peer.create_replica(request).await?.into_inner())
        })
        .await
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to map_err")]
fn unreachable(error: anyhow::Error) -> Status {
    Status::unavailable(format!("{error:#}"))
}

async fn within<T>(work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded("the process of the spare pool does not answer");
    tokio::time::timeout(PEER_TIMEOUT, work).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use super::super::members::samples::{child, report};
    use super::*;

    /// A folder of its own.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cairn-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _removed = std::fs::remove_dir_all(&self.0);
        }
    }

    fn spares(folder: &Folder) -> Spares {
        let replace_after = config::Interval(60);
        Spares::new(&folder.0, &config::Nexus { replace_after, ..config::Nexus::default() })
    }

    #[test]
    fn what_is_gone_for_long_is_due_once_and_what_comes_back_is_not() {
        let folder = Folder::new("spares");
        let well = child(1, "online", true);
        let gone = child(2, "out-of-sync", false);
        let mut back = gone.clone();
        back.connected = true;
        let with = |other: &_| [report(9, "db", &[well.clone(), Clone::clone(other)])];
        let due = vec![(cairn_engine::block::VolumeId(9).to_string(), gone.replica.to_string())];
        let mut now = Instant::now();
        let mut look = |spares: &Spares, reports: &[VolumeReport], steps: u32| {
            let mut last = Vec::new();
            for _ in 0..steps {
                now += Duration::from_millis(1_500);
                last = spares.look(reports, now);
            }
            last
        };

        let first = spares(&folder);
        // The first look only begins to count.
        assert_eq!(look(&first, &with(&gone), 1 + 39), []);
        // It was reached for a moment: it is counted anew.
        assert_eq!(look(&first, &with(&back), 1), []);
        assert_eq!(look(&first, &with(&gone), 30), []);

        // A restart forgets ten seconds at most, and its own absence does not count.
        let second = spares(&folder);
        assert_eq!(look(&second, &with(&gone), 10), []);
        assert_eq!(look(&second, &with(&gone), 7), due);
        // Not while the volume does not serve, nor for a long pause of the machine alone.
        let mut down = with(&gone);
        down[0].serving = false;
        assert_eq!(look(&second, &down, 1), due, "it is still known, and not acted on");

        // Somebody decided otherwise: not before it has been in sync.
        second.leave_alone(&gone.replica.to_string());
        assert_eq!(look(&second, &with(&gone), 50), []);
        let third = spares(&folder);
        assert_eq!(look(&third, &with(&gone), 50), []);
        assert_eq!(look(&third, &with(&back), 50), []);
        let mut whole = gone.clone();
        (whole.in_sync, whole.connected) = (true, true);
        assert_eq!(look(&third, &with(&whole), 1), []);
        assert_eq!(look(&third, &with(&gone), 42), due);

        // A witness, and what is no member.
        let mut witness = gone.clone();
        witness.witness = true;
        let fourth = spares(&Folder::new("spares-of-witnesses"));
        assert_eq!(look(&fourth, &with(&witness), 50), []);
        assert_eq!(look(&fourth, &with(&child(3, "idle", false)), 50), []);
    }
}
