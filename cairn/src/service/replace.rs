//! A replica that is replaced by another: added, rebuilt, and then the old one removed.
//!
//! What is to be done is stored, and how far it is is seen from the volume's members: cut off anywhere, it goes
//! on where it was.

use std::time::{Duration, Instant};

use cairn_api::v1;
use cairn_engine::VolumeReport;
use cairn_engine::block::ReplicaId;
use cairn_engine::control::ChildReport;
use tonic::Status;

use super::Service;
use super::members::{child_of, is_member, parse_id};
use super::uri::{parse_replica_uri, replica_uri};
use crate::state::SavedReplacement;

/// How long until a step that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Make,
    Add,
    /// The new one gets its data.
    Wait,
    Remove,
    Done,
}

impl Step {
    fn word(self) -> &'static str {
        match self {
            Self::Make => "making",
            Self::Add => "adding",
            Self::Wait => "rebuilding",
            Self::Remove | Self::Done => "removing",
        }
    }
}

/// Whether it has all that it is to have.
fn is_whole(child: &ChildReport) -> bool {
    child.in_sync || (child.witness && child.state == "witness")
}

fn next_step(replacement: &SavedReplacement, report: &VolumeReport) -> Step {
    let find = |text: &str| text.parse().ok().and_then(|id: ReplicaId| child_of(report, id));
    let (old, new) = (find(&replacement.old), find(&replacement.new));
    match (old, new.filter(|c| is_member(c))) {
        (None, Some(_)) => Step::Done,
        (_, Some(new)) if replacement.now || is_whole(new) => Step::Remove,
        (_, Some(_)) => Step::Wait,
        (_, None) if replacement.uri.is_empty() => Step::Make,
        (_, None) => Step::Add,
    }
}

/// Why the new one does not get its data now, where that is known.
fn why_not_rebuilt(
    replacement: &SavedReplacement,
    step: Step,
    report: &VolumeReport,
) -> Option<String> {
    if step != Step::Wait || report.rebuild.is_some() {
        return None;
    }
    let of = |r: &&cairn_engine::RebuildEnded| r.replica.to_string() == replacement.new;
    let failed = report.rebuilt.iter().rfind(of).filter(|r| !r.failed.is_empty())?;
    Some(format!(
        "its rebuild was given up and is tried again later: {}; to give the replacement up: cairn volume \
         remove-replica {} {}",
        failed.failed, report.name, replacement.new
    ))
}

impl Service {
    pub(super) async fn replace(
        &self,
        request: v1::ReplaceReplicaRequest,
    ) -> Result<v1::Volume, Status> {
        let v1::ReplaceReplicaRequest { name, replica_id, uri, now } = request;
        let old = parse_id(&replica_id)?;
        let (new, address) = parse_replica_uri(&uri).map_err(Status::invalid_argument)?;
        let uri = replica_uri(new, &address);
        let turn = self.members.turn(&name).await;
        let report = self.known(&name).await?;
        let running = self.saved(&name)?.replacement;
        let same = |r: &SavedReplacement| (&r.old, &r.new) == (&old.to_string(), &new.to_string());
        match &running {
            // Said again: it goes on, or goes on faster.
            Some(running) if same(running) => {
                if now && !running.now {
                    self.change_one(&name, |v| {
                        v.replacement.iter_mut().for_each(|r| r.now = true)
                    })?;
                }
            }
            Some(running) => {
                return Err(Status::failed_precondition(format!(
                    "replica {} of volume `{name}` is being replaced by {}; wait until that is done, or \
                     give it up: cairn volume remove-replica {name} {}",
                    running.old, running.new, running.new
                )));
            }
            None => {
                if old == new {
                    return Err(Status::invalid_argument("the new replica is the old one"));
                }
                let there = child_of(&report, new).is_some_and(is_member);
                let Some(child) = child_of(&report, old) else {
                    if there {
                        // An earlier call has done it.
                        return Ok(self.volume_message(report));
                    }
                    return Err(Status::not_found(format!(
                        "replica {old} is not a member of volume `{name}`; `cairn volume status {name}` \
                         shows those that are. Nothing was changed"
                    )));
                };
                if !there {
                    self.add_voter(&name, &uri, child.witness).await?;
                }
                let replacement = SavedReplacement {
                    old: old.to_string(),
                    new: new.to_string(),
                    uri,
                    now,
                    spare: String::new(),
                };
                self.change_one(&name, |volume| volume.replacement = Some(replacement))?;
            }
        }
        drop(turn);
        self.members.problems.lock().remove(&name);
        self.members.wake();
        Ok(self.volume_message(self.known(&name).await?))
    }

    /// Does what can be done now. The caller has the volume's turn.
    pub(super) async fn go_on_replacing(&self, name: &str) {
        let waits = |(_, until): &(String, Instant)| Instant::now() < *until;
        if self.members.problems.lock().get(name).is_some_and(waits) {
            return;
        }
        match self.replace_step(name).await {
            Ok(()) => {
                self.members.problems.lock().remove(name);
            }
            Err(status) => {
                let text = status.message().to_owned();
                let mut problems = self.members.problems.lock();
                let before =
                    problems.insert(name.to_owned(), (text.clone(), Instant::now() + RETRY));
                if before.is_none_or(|(before, _)| before != text) {
                    tracing::warn!(volume = %name, "the replacement of a replica waits: {text}");
                }
            }
        }
    }

    async fn replace_step(&self, name: &str) -> Result<(), Status> {
        let Some(replacement) = self.saved(name)?.replacement else { return Ok(()) };
        let Some(report) = self.report(name).await?.filter(|r| r.serving) else { return Ok(()) };
        let (old, new) = (parse_id(&replacement.old)?, parse_id(&replacement.new)?);
        match next_step(&replacement, &report) {
            Step::Make => self.make_spare(&report, &replacement).await,
            Step::Add => {
                let witness = child_of(&report, old).is_some_and(|c| c.witness);
                tracing::info!(volume = %name, %old, %new, "replacing: the new replica is added");
                self.add_voter(name, &replacement.uri, witness).await
            }
            Step::Wait => Ok(()),
            Step::Remove => {
                tracing::info!(volume = %name, %old, %new, "replacing: the old replica is removed");
                self.remove_voter(name, old).await?;
                self.replaced(name, &replacement)
            }
            Step::Done => self.replaced(name, &replacement),
        }
    }

    fn replaced(&self, name: &str, replacement: &SavedReplacement) -> Result<(), Status> {
        tracing::info!(volume = %name, old = %replacement.old, new = %replacement.new, "replaced");
        self.change_one(name, |volume| volume.replacement = None)
    }

    /// What the API tells of a volume's replacement.
    pub(super) fn replacement_message(&self, report: &VolumeReport) -> Option<v1::Replacement> {
        let replacement = self.saved(&report.name).ok()?.replacement?;
        let problem = self.members.problems.lock().get(&report.name).map(|(text, _)| text.clone());
        let step = next_step(&replacement, report);
        let problem = problem.or_else(|| why_not_rebuilt(&replacement, step, report));
        Some(v1::Replacement {
            stage: step.word().to_owned(),
            old_replica_id: replacement.old,
            new_replica_id: replacement.new,
            uri: replacement.uri,
            spare: replacement.spare,
            problem: problem.unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::members::samples::{child, report};
    use super::*;

    fn replacement(uri: &str, now: bool) -> SavedReplacement {
        SavedReplacement {
            old: ReplicaId(1).to_string(),
            new: ReplicaId(2).to_string(),
            uri: uri.to_owned(),
            now,
            spare: String::new(),
        }
    }

    #[test]
    fn a_replacement_goes_on_from_what_the_members_are() {
        let old = child(1, "out-of-sync", false);
        let step = |r: &SavedReplacement, children: &[ChildReport]| {
            next_step(r, &report(7, "db", children))
        };
        let (patient, now) = (replacement("local:p/x", false), replacement("local:p/x", true));
        assert_eq!(step(&replacement("", false), std::slice::from_ref(&old)), Step::Make);
        assert_eq!(step(&patient, std::slice::from_ref(&old)), Step::Add);
        // It is known and no member: an earlier attempt was given up.
        assert_eq!(step(&patient, &[old.clone(), child(2, "idle", false)]), Step::Add);
        let behind = [old.clone(), child(2, "rebuilding", false)];
        assert_eq!(step(&patient, &behind), Step::Wait);
        assert_eq!(step(&now, &behind), Step::Remove);
        assert_eq!(step(&patient, &[old, child(2, "online", true)]), Step::Remove);
        assert_eq!(step(&patient, &[child(2, "online", true)]), Step::Done);

        // Its pool is full.
        let mut full = report(7, "db", &behind);
        assert_eq!(why_not_rebuilt(&patient, Step::Wait, &full), None);
        full.rebuilt.push(cairn_engine::RebuildEnded {
            replica: ReplicaId(2),
            why: String::new(),
            failed: "a request failed: NoSpace".to_owned(),
            took_ms: 1,
            ago_ms: 1,
            ended_ms: 1,
            bytes: 0,
        });
        let why = why_not_rebuilt(&patient, Step::Wait, &full).unwrap();
        assert!(why.contains("NoSpace") && why.contains("remove-replica db"), "{why}");

        let mut witness = child(2, "joining", false);
        witness.witness = true;
        assert_eq!(step(&patient, &[child(1, "witness", false), witness.clone()]), Step::Wait);
        witness.state = "witness".to_owned();
        assert_eq!(step(&patient, &[child(1, "witness", false), witness]), Step::Remove);
    }
}
