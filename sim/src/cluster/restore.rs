//! Volumes that are taken back to a snapshot.

use std::sync::mpsc::TryRecvError;

use cairn_block::{SnapshotId, SnapshotVerb};
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
    /// The epoch of the nexus that was asked, or of the last one that is known to go on with it.
    epoch: u64,
    /// It is known to be stored: so it goes back, whoever serves it.
    stored: bool,
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
        self.back.push(GoingBack { volume, id, bytes, answer: None, epoch, stored: false });
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
                    let bytes = std::mem::take(&mut back.bytes);
                    let history = self.history(volume);
                    history.borrow_mut().epoch_serves(epoch);
                    history.borrow_mut().goes_back(&bytes);
                    self.world().say(format_args!("it is stored that volume {volume} goes back"));
                }
            }
            _ if back.stored || epoch > back.epoch => {
                let what = if back.stored { "is back" } else { "does not go back" };
                self.back.swap_remove(at);
                self.world().say(format_args!("volume {volume} {what}"));
            }
            _ => {}
        }
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
                Err(TryRecvError::Disconnected) => None,
                Ok(told) => Some(told),
            };
            back.answer = None;
            check!(
                Check::Snapshots,
                told.as_ref().is_none_or(|told| told.is_err() || back.stored),
                "volume {} is said to be back at snapshot {}, and that was not stored",
                back.volume,
                back.id
            );
            // What was begun by a nexus that has lost the volume may go on elsewhere.
            let begun = matches!(told, None | Some(Ok(()) | Err(EngineError::Storage(_))));
            begun || back.stored
        });
    }
}
