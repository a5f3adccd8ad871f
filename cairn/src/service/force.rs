//! Volumes that are taken from one replica, whatever the others hold.
//!
//! What is to be done is stored first. A process that dies meanwhile does it again at its next start; as long
//! as it is not known to be done nothing else is a member, so doing it twice gives up nothing more.

use std::time::{Duration, Instant};

use cairn_api::v1;
use cairn_engine::VolumeReport;
use cairn_engine::block::ReplicaId;
use cairn_engine::control::Command;
use tonic::Status;

use super::members::{child_of, id_of, parse_id};
use super::{Service, child_reasons, keys};
use crate::state::SavedForce;

/// A lease of another node may have to be waited for, which is a minute at most.
const FORCE_TIMEOUT: Duration = Duration::from_secs(90);
/// A volume must be let go of within this time.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(20);

impl Service {
    pub(super) async fn force_start(
        &self,
        request: v1::ForceStartVolumeRequest,
    ) -> Result<v1::Volume, Status> {
        let v1::ForceStartVolumeRequest { name, replica_id, lose_writes } = request;
        let source = parse_id(&replica_id)?;
        let turn = self.members.turn(&name).await;
        let saved = self.saved(&name)?;
        if saved.witnesses.iter().any(|uri| id_of(uri) == Some(source)) {
            return Err(Status::invalid_argument(format!(
                "replica {source} is a witness and holds no data; take the volume from another one"
            )));
        }
        if !saved.replicas.iter().any(|uri| id_of(uri) == Some(source)) {
            return Err(Status::not_found(format!(
                "replica {source} is not among those named for volume `{name}`; `cairn volume status \
                 {name}` shows them"
            )));
        }
        let report = self.report(&name).await?;
        if let Some(report) = &report {
            self.may_be_forced(report, source, lose_writes)?;
        } else if !lose_writes {
            return Err(Status::failed_precondition(warning(&name, source)));
        }
        let random = u32::try_from(uuid::Uuid::new_v4().as_u128() >> 96).unwrap_or(u32::MAX);
        tracing::warn!(volume = %name, replica = %source, "starting by force");
        self.change_one(&name, |volume| {
            volume.forced = Some(SavedForce { replica: source.to_string(), random });
            volume.replacement = None;
        })?;
        self.serve_again(&name).await?;
        match self.await_serving_for(&name, FORCE_TIMEOUT).await {
            Ok(_) => self.force_is_done(&name).await?,
            Err(status) => {
                self.give_force_up(&name).await?;
                return Err(Status::failed_precondition(format!(
                    "not started by force: {}. The volume waits for its replicas as before",
                    status.message()
                )));
            }
        }
        drop(turn);
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Whether there is any use in it, and whoever asks knows what it costs.
    fn may_be_forced(
        &self,
        report: &VolumeReport,
        source: ReplicaId,
        lose_writes: bool,
    ) -> Result<(), Status> {
        let name = &report.name;
        let has_data = report.children.iter().any(|c| c.in_sync && c.connected);
        if report.serving && report.state != "suspended" && has_data {
            return Err(Status::failed_precondition(format!(
                "volume `{name}` is {} and serves: there is nothing to force",
                report.state
            )));
        }
        let child = child_of(report, source);
        if let Some(child) = child.filter(|c| !c.connected) {
            return Err(Status::failed_precondition(format!(
                "replica {source} cannot be reached{}{}; start the process that has it first",
                if child.reason.is_empty() { "" } else { ": " },
                child.reason
            )));
        }
        if lose_writes {
            Ok(())
        } else {
            Err(Status::failed_precondition(what_is_known(report, source)))
        }
    }

    /// The volume waits for its replicas as before. What was stored counts: then it has been started by force
    /// after all, and comes up so.
    async fn give_force_up(&self, name: &str) -> Result<(), Status> {
        self.change_one(name, |volume| volume.forced = None)?;
        self.serve_again(name).await
    }

    /// Has the engine serve the volume as it is remembered now.
    async fn serve_again(&self, name: &str) -> Result<(), Status> {
        let saved = self.saved(name)?;
        let spec = self.spec_of(&saved, keys::spec_of(&saved).await?).map_err(Status::internal)?;
        if self.report(name).await?.is_some() {
            let name = name.to_owned();
            let removing = self.ask(|reply| Command::RemoveVolume { name, reply });
            tokio::time::timeout(REMOVE_TIMEOUT, removing).await.map_err(|_| {
                Status::deadline_exceeded(
                    "a replica still has requests of the volume; it is started by force once they end",
                )
            })??;
        }
        self.ask(|reply| Command::AddVolume { spec, reply }).await
    }

    /// The volume serves from one replica: only that is named from now on.
    async fn force_is_done(&self, name: &str) -> Result<(), Status> {
        let Some(forced) = self.saved(name)?.forced else { return Ok(()) };
        let source = parse_id(&forced.replica)?;
        self.change_one(name, |volume| {
            volume.replicas.retain(|uri| id_of(uri) == Some(source));
            volume.witnesses.clear();
            (volume.forced, volume.created) = (None, true);
        })?;
        for child in self.known(name).await?.children {
            if child.replica == source {
                continue;
            }
            let (name, replica) = (name.to_owned(), child.replica);
            // It is not a member any more; one that stays on is told as idle.
            let gone = self.ask(|reply| Command::RemoveReplica { name, replica, reply }).await;
            if let Err(error) = gone {
                tracing::warn!(%replica, %error, "not let go of after the start by force");
            }
        }
        Ok(())
    }

    /// Takes up what a call or a process before this one has begun. The caller has the volume's turn.
    pub(super) async fn go_on_with_force(&self, name: &str) {
        let Ok(report) = self.report(name).await else { return };
        let since =
            *self.members.forcing.lock().entry(name.to_owned()).or_insert_with(Instant::now);
        let result = match report {
            Some(report) if report.serving => {
                self.members.forcing.lock().remove(name);
                self.force_is_done(name).await
            }
            Some(_) if since.elapsed() < FORCE_TIMEOUT => return,
            Some(report) => {
                self.members.forcing.lock().remove(name);
                let why = &report.detail;
                tracing::warn!(volume = %name, "not started by force: {why}; it waits as before");
                self.give_force_up(name).await
            }
            None => self.serve_again(name).await,
        };
        if let Err(error) = result {
            tracing::warn!(volume = %name, "not started by force yet: {}", error.message());
        }
    }
}

fn warning(name: &str, source: ReplicaId) -> String {
    format!(
        "this takes volume `{name}` from replica {source} alone. Acked writes that it lacks are lost for good, \
         and what the other replicas hold does not count any more: they get a copy when they are added again. \
         Make sure that no other node serves the volume. To do it, say so: --yes-i-lose-writes"
    )
}

/// What it costs, as far as the nexus has heard.
fn what_is_known(report: &VolumeReport, source: ReplicaId) -> String {
    let mut text = format!("volume `{}` is {}: {}\n", report.name, report.state, report.detail);
    let heard = report.children.iter().any(|c| c.in_sync);
    for child in &report.children {
        let holds = match (child.witness, heard, child.in_sync) {
            (true, ..) => "is a witness and holds no data",
            (_, true, true) => "holds every acked write",
            (_, true, false) => "has missed acked writes",
            (_, false, _) => "may have missed acked writes: not enough replicas are here to tell",
        };
        let reach = if child.connected { "is here" } else { "cannot be reached" };
        let chosen = if child.replica == source { ", THE CHOSEN ONE," } else { "" };
        text.push_str(&format!("replica {}{chosen} {holds}, and {reach}\n", child.replica));
    }
    text.push_str(
        &child_reasons(report).trim_start_matches("; ").replace("; replica", "\nreplica"),
    );
    format!("{}\n\n{}", text.trim_end(), warning(&report.name, source))
}
