//! Replicas that become members of a volume, and that are none any more.
//!
//! The state file names all that the stored configuration may name, wherever a crash cuts this off: a
//! replica is written there before it is asked to be a member, and leaves once the nexus, which is serving
//! and hence knows all members, does not know it any more. What is there beyond the members does no harm.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cairn_api::v1;
use cairn_engine::block::ReplicaId;
use cairn_engine::control::{ChildReport, Command};
use cairn_engine::{VolumeReplica, VolumeReport};
use parking_lot::Mutex;
use tokio::sync::{Mutex as Turn, Notify, OwnedMutexGuard};
use tonic::{Code, Status};

use super::uri::{parse_replica_uri, replica_uri};
use super::{CHANGE_TIMEOUT, Service};
use crate::config::Config;
use crate::state::SavedVolume;

/// How often the task looks at what it has to do.
const PERIOD: Duration = Duration::from_secs(1);
/// Where every volume is served and whole: whatever happens, the engine deals with at once.
const CALM_PERIOD: Duration = Duration::from_secs(4);

/// What is known of changes of members.
#[derive(Debug)]
pub(crate) struct Members {
    /// One change of a volume at a time.
    turns: Mutex<HashMap<String, Arc<Turn<()>>>>,
    /// Why a volume's replacement does not go on, and when it is tried again.
    pub(super) problems: Mutex<HashMap<String, (String, Instant)>>,
    /// Since when a volume that is to be started by force does not serve.
    pub(super) forcing: Mutex<HashMap<String, Instant>>,
    pub(super) spares: super::spares::Spares,
    wake: Notify,
}

impl Members {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            turns: Mutex::default(),
            problems: Mutex::default(),
            forcing: Mutex::default(),
            spares: super::spares::Spares::new(&config.state_dir, &config.nexus),
            wake: Notify::new(),
        }
    }

    fn turn_of(&self, volume: &str) -> Arc<Turn<()>> {
        let mut turns = self.turns.lock();
        turns.retain(|name, turn| name == volume || Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(volume.to_owned()).or_default())
    }

    /// Waits for a volume's turn.
    pub(super) async fn turn(&self, volume: &str) -> OwnedMutexGuard<()> {
        self.turn_of(volume).lock_owned().await
    }

    /// A volume's turn, where nobody has it.
    pub(super) fn try_turn(&self, volume: &str) -> Option<OwnedMutexGuard<()>> {
        self.turn_of(volume).try_lock_owned().ok()
    }

    /// Has the task look now.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// What there is to say of a replica, with what is said of it already.
    pub(super) fn reason(&self, replica: ReplicaId, reason: String) -> String {
        match self.spares.said_of(replica) {
            Some(said) if reason.is_empty() => said,
            Some(said) => format!("{reason}; {said}"),
            None => reason,
        }
    }
}

/// The replica that a URI of the state file names.
pub(super) fn id_of(uri: &str) -> Option<ReplicaId> {
    parse_replica_uri(uri).ok().map(|(id, _)| id)
}

/// Whether a URI names this replica; nothing is resolved for that.
fn names(uri: &str, replica: ReplicaId) -> bool {
    uri.ends_with(&replica.to_string())
}

/// Whether a URI of a replica elsewhere has an address in it, not a name.
fn is_literal(uri: &str) -> bool {
    let rest = uri.strip_prefix("nvme+tcp://").and_then(|rest| rest.split_once('/'));
    rest.is_some_and(|(peer, _)| peer.parse::<std::net::SocketAddr>().is_ok())
}

/// Whether it is a member, or may be: all that the nexus knows while it does not serve.
pub(super) fn is_member(child: &ChildReport) -> bool {
    child.state != "idle"
}

pub(super) fn child_of(report: &VolumeReport, id: ReplicaId) -> Option<&ChildReport> {
    report.children.iter().find(|c| c.replica == id)
}

pub(super) fn parse_id(text: &str) -> Result<ReplicaId, Status> {
    text.parse().map_err(|_| {
        Status::invalid_argument(format!(
            "`{text}` is no replica's id; `cairn volume status` shows those of a volume"
        ))
    })
}

impl Service {
    /// The volume as it is remembered.
    pub(super) fn saved(&self, name: &str) -> Result<SavedVolume, Status> {
        let found = self.state.lock().volumes.iter().find(|v| v.name == name).cloned();
        found.ok_or_else(|| {
            Status::not_found(format!("there is no volume `{name}` in this process"))
        })
    }

    /// Changes what is remembered of a volume.
    pub(super) fn change_one(
        &self,
        name: &str,
        change: impl FnOnce(&mut SavedVolume),
    ) -> Result<(), Status> {
        self.change(|volumes| {
            if let Some(volume) = volumes.iter_mut().find(|v| v.name == name) {
                change(volume);
            }
        })
    }

    pub(super) async fn add_member(
        &self,
        request: v1::AddReplicaRequest,
    ) -> Result<v1::Volume, Status> {
        let v1::AddReplicaRequest { name, uri, witness } = request;
        let turn = self.members.turn(&name).await;
        self.add_voter(&name, &uri, witness).await?;
        drop(turn);
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Makes a replica a member. The caller has the volume's turn.
    pub(super) async fn add_voter(
        &self,
        name: &str,
        uri: &str,
        witness: bool,
    ) -> Result<(), Status> {
        let (id, address) = parse_replica_uri(uri).map_err(Status::invalid_argument)?;
        if self.saved(name)?.forced.is_some() {
            return Err(Status::failed_precondition(format!(
                "volume `{name}` is being started by force; add replicas once it serves"
            )));
        }
        let report = self.known(name).await?;
        if let Some(child) = child_of(&report, id).filter(|c| is_member(c)) {
            return Err(Status::already_exists(format!(
                "replica {id} is a member of volume `{name}` already, at {}; to have it somewhere else, \
                 remove it first",
                replica_uri(id, &child.address)
            )));
        }
        self.not_of_another(name, &[id]).await?;
        // As it is compared and shown: a name is resolved now.
        let uri = replica_uri(id, &address);
        self.change_one(name, |volume| {
            for uris in [&mut volume.replicas, &mut volume.witnesses] {
                uris.retain(|other| id_of(other) != Some(id));
            }
            let uris = if witness { &mut volume.witnesses } else { &mut volume.replicas };
            uris.push(uri);
        })?;
        let replica = VolumeReplica { id, address, witness };
        let wanted = name.to_owned();
        let asked = self.ask(|reply| Command::AddReplica { name: wanted, replica, reply });
        let asked = tokio::time::timeout(CHANGE_TIMEOUT, asked).await;
        self.forget_strangers(name).await;
        asked.unwrap_or_else(|_| Err(still_storing(name)))
    }

    /// Refuses replicas of other volumes that are served here: a nexus that asks them takes them from those
    /// before it learns whose they are.
    pub(super) async fn not_of_another(
        &self,
        name: &str,
        replicas: &[ReplicaId],
    ) -> Result<(), Status> {
        for other in self.volume_reports().await?.iter().filter(|v| v.name != name) {
            let taken = other.children.iter().find(|c| replicas.contains(&c.replica));
            if let Some(child) = taken {
                return Err(Status::failed_precondition(format!(
                    "replica {} is named for volume `{}`, which is served here; make an empty one for \
                     volume `{name}`",
                    child.replica, other.name
                )));
            }
        }
        Ok(())
    }

    pub(super) async fn remove_member(
        &self,
        request: v1::RemoveReplicaRequest,
    ) -> Result<v1::Volume, Status> {
        let v1::RemoveReplicaRequest { name, replica_id } = request;
        let id = parse_id(&replica_id)?;
        // Whoever removes one of the two has decided otherwise.
        let replacement = self.saved(&name)?.replacement;
        let given_up = replacement.filter(|r| [&r.old, &r.new].contains(&&id.to_string()));
        if let Some(replacement) = &given_up {
            self.members.spares.leave_alone(&replacement.old);
            self.change_one(&name, |volume| volume.replacement = None)?;
        }
        let turn = self.members.turn(&name).await;
        match self.remove_voter(&name, id).await {
            // The new one of a replacement that had not come to it.
            Err(status) if given_up.is_some() && status.code() == Code::NotFound => {}
            removed => removed?,
        }
        drop(turn);
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Makes a replica no member any more. The caller has the volume's turn.
    pub(super) async fn remove_voter(&self, name: &str, replica: ReplicaId) -> Result<(), Status> {
        let report = self.known(name).await?;
        let there = child_of(&report, replica).is_some();
        let saved = self.saved(name)?;
        let remembered =
            saved.replicas.iter().chain(&saved.witnesses).any(|uri| id_of(uri) == Some(replica));
        if !there && !remembered {
            return Err(Status::not_found(format!(
                "replica {replica} is not a member of volume `{name}`; `cairn volume status {name}` \
                 shows those that are"
            )));
        }
        let mut asked = Ok(Ok(()));
        if there {
            let wanted = name.to_owned();
            let asking = self.ask(|reply| Command::RemoveReplica { name: wanted, replica, reply });
            asked = tokio::time::timeout(CHANGE_TIMEOUT, asking).await;
        }
        self.forget_strangers(name).await;
        asked.unwrap_or_else(|_| Err(still_storing(name)))
    }

    /// Drops from the state file what is no child of the volume any more. The caller has the volume's turn:
    /// nothing is there that the nexus is still to hear of.
    pub(super) async fn forget_strangers(&self, name: &str) {
        let Ok(Some(report)) = self.report(name).await else { return };
        let Ok(saved) = self.saved(name) else { return };
        if !has_strangers(&saved, &report) {
            return;
        }
        let stranger = |uri: &String| is_stranger(uri, &report);
        let stored = self.change_one(name, |volume| {
            volume.replicas.retain(|uri| !stranger(uri));
            volume.witnesses.retain(|uri| !stranger(uri));
        });
        if let Err(error) = stored {
            tracing::warn!(volume = %name, "a replica that has gone is still named: {error}");
        }
    }

    /// Writes down what the nexus has learnt from the volume's configuration: members that nobody has named here, and
    /// that are elsewhere now, and the blocks that hosts see; and that this process serves it.
    fn remember_learnt(&self, saved: &SavedVolume, report: &VolumeReport) {
        if !saved.created || saved.forced.is_some() {
            return;
        }
        let mut learnt = saved.clone();
        for child in report.children.iter().filter(|c| is_member(c)) {
            let uri = replica_uri(child.replica, &child.address);
            let mut known = learnt.replicas.iter_mut().chain(&mut learnt.witnesses);
            match known.find(|uri| names(uri, child.replica)) {
                Some(known) if child.connected && is_literal(known) => *known = uri,
                Some(_) => {}
                None if child.witness => learnt.witnesses.push(uri),
                None => learnt.replicas.push(uri),
            }
        }
        if saved.block_size == 0 && report.serving {
            learnt.block_size = report.block_size.bytes();
        }
        if let Some(shared) = learnt.shared.as_mut().filter(|_| report.serving) {
            shared.standby = false;
        }
        if learnt == *saved {
            return;
        }
        let stored = self.change_one(&saved.name, |volume| {
            if volume == saved {
                *volume = learnt;
            }
        });
        if let Err(error) = stored {
            tracing::warn!(volume = %saved.name, "what was learnt of it is not stored: {error}");
        }
    }

    /// What is to be done by itself, for as long as the process lives.
    pub(crate) async fn look_after_members(&self) {
        let mut pause = PERIOD;
        loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.members.wake.notified() => {}
            }
            let Ok(reports) = self.volume_reports().await else { return };
            let saved = self.state.lock().volumes.clone();
            let changes = saved.iter().any(|v| v.forced.is_some() || v.replacement.is_some());
            let calm = !changes && saved.len() == reports.len() && reports.iter().all(is_calm);
            pause = if calm { CALM_PERIOD } else { PERIOD };
            let known: Vec<String> = saved.iter().map(|v| v.id.clone()).collect();
            self.rebuilds.look(&reports, &known);
            for volume in &saved {
                let name = &volume.name;
                let Some(turn) = self.members.try_turn(name) else { continue };
                if let Some(report) = reports.iter().find(|r| r.name == *name) {
                    self.remember_learnt(volume, report);
                    // One may be on its way to become a member: the engine is asked again under the turn.
                    if has_strangers(volume, report) {
                        self.forget_strangers(name).await;
                    }
                }
                if volume.forced.is_some() {
                    self.go_on_with_force(name).await;
                }
                if volume.replacement.is_some() {
                    self.go_on_replacing(name).await;
                }
                drop(turn);
            }
            self.look_for_spares(&reports).await;
        }
    }
}

/// Whether nothing is to be expected of a volume.
fn is_calm(report: &VolumeReport) -> bool {
    report.serving
        && report.rebuild.is_none()
        && report.children.iter().all(|c| c.in_sync || c.witness)
}

/// Whether a replica is named that is no child of the volume any more. A nexus that serves knows all members, and
/// whoever may become one.
fn has_strangers(saved: &SavedVolume, report: &VolumeReport) -> bool {
    let mut named = saved.replicas.iter().chain(&saved.witnesses);
    report.serving && named.any(|uri| is_stranger(uri, report))
}

fn is_stranger(uri: &str, report: &VolumeReport) -> bool {
    id_of(uri).is_none_or(|id| child_of(report, id).is_none())
}

fn still_storing(name: &str) -> Status {
    Status::deadline_exceeded(format!(
        "the change of the members of volume `{name}` is not stored by a majority yet; it goes on, or is \
         given up, by itself: see `cairn volume status {name}`"
    ))
}

/// Volumes as the engine tells of them.
#[cfg(test)]
pub(super) mod samples {
    use cairn_engine::block::{BlockSize, VolumeId};
    use cairn_engine::nexus::MendCounters;
    use cairn_engine::{ChildAddress, ExportCounters};

    use super::*;

    pub(in super::super) fn child(id: u128, state: &str, in_sync: bool) -> ChildReport {
        ChildReport {
            number: 0,
            replica: ReplicaId(id),
            witness: false,
            address: ChildAddress::Local { pool: "p".to_owned() },
            state: state.to_owned(),
            reason: String::new(),
            in_sync,
            connected: in_sync,
            load: 0,
        }
    }

    pub(in super::super) fn report(id: u128, name: &str, children: &[ChildReport]) -> VolumeReport {
        VolumeReport {
            id: VolumeId(id),
            name: name.to_owned(),
            nqn: String::new(),
            blocks: 1,
            state: "degraded".to_owned(),
            detail: String::new(),
            unfit: String::new(),
            serving: true,
            epoch: 1,
            children: children.to_vec(),
            hosts: Vec::new(),
            iscsi: None,
            counters: ExportCounters::default(),
            in_flight: 0,
            block_size: BlockSize::B4096,
            encryption: None,
            mends: MendCounters::default(),
            scrub: None,
            rebuild: None,
            rebuilt: Vec::new(),
            unreconciled: (0, 0),
            shard: 0,
        }
    }
}
