//! Volumes that are taken back to a snapshot.

use std::rc::Rc;
use std::sync::mpsc::TryRecvError;

use cairn_block::{ReplicaId, SnapshotId, SnapshotVerb};
use cairn_engine::{EngineError, WatchedVolume};

use super::{Answer, Cluster, volume_of};
use crate::checks::{Check, check};
use crate::rng::Rng;

/// A volume that somebody asked to go back.
pub(super) struct GoingBack {
    volume: usize,
    id: SnapshotId,
    /// What each block was.
    bytes: Vec<u8>,
    /// What whoever asked was told; nothing once that is known.
    answer: Option<Answer>,
    told: Option<Told>,
    /// The epoch of the nexus that was asked, or of the last one that is known to go on with it.
    epoch: u64,
    /// It is known to be stored: so it goes back, whoever serves it.
    stored: bool,
}

/// What whoever asked for a restore was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Done,
    Refused,
    /// It may have been done, or be done by another nexus.
    Unsure,
}

impl Told {
    fn of(answer: &Result<(), EngineError>) -> Self {
        match answer {
            Ok(()) => Self::Done,
            Err(EngineError::Storage(_)) => Self::Unsure,
            Err(_) => Self::Refused,
        }
    }
}

impl Cluster {
    /// Whether a volume may be on its way back to a snapshot: then members may differ.
    #[must_use]
    pub fn goes_back(&self) -> bool {
        !self.back.is_empty()
    }

    /// Asks for a volume to be taken back to one of its snapshots, whatever its hosts do. False where there is none of
    /// which all that have it hold the same.
    pub fn go_back(&mut self, volume: usize, rng: &mut Rng) -> bool {
        self.look_at_snapshots();
        if self.goes_back() {
            return false;
        }
        let mut found: Vec<(SnapshotId, &Vec<u8>)> = Vec::new();
        let mut differ = Vec::new();
        for (_, id, _, bytes) in self.taken.iter().filter(|(of, ..)| *of == volume) {
            match found.iter().find(|(other, _)| other == id) {
                Some((_, same)) if *same == bytes => {}
                Some(_) => differ.push(*id),
                None => found.push((*id, bytes)),
            }
        }
        found.retain(|(id, _)| !differ.contains(id) && !self.doubtful.contains(id));
        if found.is_empty() {
            return false;
        }
        let (id, bytes) = found.swap_remove(rng.index(found.len()));
        let bytes = bytes.clone();
        let report = self.reports().into_iter().find(|r| volume_of(r.id) == volume && r.serving);
        let Some(report) = report else { return false };
        let epoch = self.era(volume, report.epoch);
        self.history(volume).borrow_mut().epoch_serves(epoch);
        self.world().say(format_args!("volume {volume} goes back to snapshot {id:x?}"));
        self.back.push(GoingBack {
            volume,
            id,
            bytes,
            answer: None,
            told: None,
            epoch,
            stored: false,
        });
        let answer = self.snapshot_call(volume, id, SnapshotVerb::Restore);
        if let Some(back) = self.back.first_mut() {
            back.answer = answer;
        }
        true
    }

    /// After a turn of a nexus: whether it is stored that a volume goes back, or that it has.
    pub(super) fn watch_back(&mut self, found: &WatchedVolume) {
        let volume = volume_of(found.id);
        let epoch = self.era(volume, found.epoch.0);
        let Some(at) = self.back.iter().position(|back| back.volume == volume) else { return };
        // One that was stopped meanwhile does not know better.
        let newest = self
            .serving
            .borrow()
            .iter()
            .filter(|((id, _), _)| *id == found.id)
            .map(|(_, e)| *e)
            .max();
        if !found.governs || newest.is_some_and(|newest| newest > epoch) {
            return;
        }
        let back = &mut self.back[at];
        if epoch < back.epoch {
            return;
        }
        match found.restoring {
            Some(id) if id == back.id => {
                back.epoch = epoch;
                if !std::mem::replace(&mut back.stored, true) {
                    let history = Rc::clone(&self.histories[volume]);
                    history.borrow_mut().epoch_serves(epoch);
                    history.borrow_mut().may_go_back(&back.bytes);
                    self.world().say(format_args!("it is stored that volume {volume} goes back"));
                }
            }
            _ if back.stored || epoch > back.epoch => {
                let back = self.back.swap_remove(at);
                let done = back.stored && self.is_back(found, back, epoch);
                let what = if done { "is back" } else { "is not taken back" };
                self.world().say(format_args!("volume {volume} {what}"));
            }
            _ => {}
        }
    }

    /// It is stored that a restore is over, and hosts may go on: it was done, on all members, or every one of those
    /// that were there refused, and nothing was.
    fn is_back(&mut self, found: &WatchedVolume, back: GoingBack, epoch: u64) -> bool {
        let GoingBack { volume, id, bytes, answer, told, .. } = back;
        let told = told
            .or_else(|| answer.and_then(|answer| answer.try_recv().ok()).as_ref().map(Told::of));
        let reports = self.reports();
        let report = reports.iter().find(|r| r.id == found.id);
        let members = report.map_or(&[][..], |r| &r.children).iter().filter(|c| c.in_sync);
        let members: Vec<ReplicaId> = members.map(|c| c.replica).collect();
        let now = members.first().map(|member| {
            let bytes = self.contents(volume, *member);
            self.decrypted(volume, 0, &bytes)
        });
        let done = now.is_none_or(|now| now == bytes);
        check!(
            Check::Snapshots,
            if done { told != Some(Told::Refused) } else { told != Some(Told::Done) },
            "volume {volume} is as snapshot {id} was: {done}; who asked for it was told: {told:?}"
        );
        let history = self.history(volume);
        history.borrow_mut().epoch_serves(epoch);
        if done {
            history.borrow_mut().goes_back(&bytes);
        } else {
            history.borrow_mut().stays();
        }
        done
    }

    /// Looks at what whoever asked was told.
    ///
    /// # Panics
    /// Where it was told that a volume is back which is not.
    pub fn look_at_back(&mut self) {
        self.back.retain_mut(|back| {
            let Some(answer) = back.answer.as_ref() else { return true };
            let told = match answer.try_recv() {
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => Told::Unsure,
                Ok(told) => Told::of(&told),
            };
            (back.answer, back.told) = (None, Some(told));
            check!(
                Check::Snapshots,
                told != Told::Done || back.stored,
                "volume {} is said to be back at snapshot {}, and that was not stored",
                back.volume,
                back.id
            );
            back.stored || told == Told::Unsure
        });
    }
}
