//! Which rebuilds ended, and how: a file in the state folder beside that of the volumes.
//!
//! The engine knows no time of day and forgets with its process; here is both.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cairn_api::v1;
use cairn_engine::{RebuildEnded, VolumeReport};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::clock::now_s;

/// Rebuilds of a volume that are remembered.
const KEPT: usize = 100;
/// Those of them that are told.
const TOLD: usize = 32;

/// A rebuild that ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedRebuild {
    replica: String,
    why: String,
    /// Why it was given up; empty where it was done.
    #[serde(default)]
    failed: String,
    ended_s: u64,
    took_ms: u64,
    bytes: u64,
}

/// Those of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct OfVolume {
    volume: String,
    done: u64,
    given_up: u64,
    bytes: u64,
    rebuilds: Vec<SavedRebuild>,
    /// When the last one ended that was taken over, as the engine counts time: it counts anew in each process.
    #[serde(skip)]
    seen_ms: Option<u64>,
}

impl OfVolume {
    /// Takes over what the engine tells. Whether there was anything new.
    fn take(&mut self, told: &[RebuildEnded], now_s: u64) -> bool {
        let seen = self.seen_ms;
        let new = told.iter().filter(|r| seen.is_none_or(|seen| r.ended_ms > seen));
        let before = self.done + self.given_up;
        for record in new {
            match record.failed.as_str() {
                "" => self.done += 1,
                _ => self.given_up += 1,
            }
            self.bytes += record.bytes;
            self.seen_ms = Some(record.ended_ms);
            self.rebuilds.push(SavedRebuild {
                replica: record.replica.to_string(),
                why: record.why.clone(),
                failed: record.failed.clone(),
                ended_s: now_s.saturating_sub(record.ago_ms / 1000),
                took_ms: record.took_ms,
                bytes: record.bytes,
            });
        }
        let over = self.rebuilds.len().saturating_sub(KEPT);
        self.rebuilds.drain(..over);
        self.done + self.given_up != before
    }
}

#[derive(Debug)]
struct Saved {
    path: PathBuf,
    volumes: Vec<OfVolume>,
}

impl Saved {
    fn of(&mut self, volume: &str) -> &mut OfVolume {
        let at = self.volumes.iter().position(|v| v.volume == volume).unwrap_or_else(|| {
            self.volumes.push(OfVolume { volume: volume.to_owned(), ..OfVolume::default() });
            self.volumes.len() - 1
        });
        &mut self.volumes[at]
    }

    fn save(&self) -> Result<()> {
        crate::state::replace(&self.path, &serde_json::to_vec_pretty(&self.volumes)?)
    }

    fn take(&mut self, report: &VolumeReport) {
        if !self.of(&report.id.to_string()).take(&report.rebuilt, now_s()) {
            return;
        }
        if let Err(error) = self.save() {
            tracing::error!("{error:#}");
        }
    }
}

/// What is known of the rebuilds of a process's volumes.
#[derive(Debug)]
pub(crate) struct Rebuilds(Mutex<Saved>);

impl Rebuilds {
    pub(crate) fn new(state_dir: &Path) -> Self {
        let path = state_dir.join("rebuilds.json");
        let volumes = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                // Nothing depends on it.
                tracing::warn!(path = %path.display(), %error, "what is known of rebuilds is lost");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        Self(Mutex::new(Saved { path, volumes }))
    }

    /// Stores what the engine tells, and forgets volumes that are no more.
    pub(crate) fn look(&self, reports: &[VolumeReport], known: &[String]) {
        let mut saved = self.0.lock();
        for report in reports {
            saved.take(report);
        }
        saved.volumes.retain(|v| known.contains(&v.volume));
    }

    /// What the API tells of a volume's rebuilds.
    pub(crate) fn message(
        &self,
        report: &VolumeReport,
    ) -> (Vec<v1::RebuildRecord>, v1::RebuildTotals) {
        let mut saved = self.0.lock();
        saved.take(report);
        let of = saved.of(&report.id.to_string());
        let skipped = of.rebuilds.len().saturating_sub(TOLD);
        let records = of.rebuilds[skipped..].iter().map(|r| v1::RebuildRecord {
            replica_id: r.replica.clone(),
            why: r.why.clone(),
            failed: r.failed.clone(),
            ended_unix_s: r.ended_s,
            took_ms: r.took_ms,
            bytes: r.bytes,
        });
        let totals = v1::RebuildTotals { done: of.done, given_up: of.given_up, bytes: of.bytes };
        (records.collect(), totals)
    }
}

#[cfg(test)]
mod tests {
    use cairn_engine::block::ReplicaId;

    use super::*;

    fn ended(ended_ms: u64, failed: &str) -> RebuildEnded {
        RebuildEnded {
            replica: ReplicaId(7),
            why: "it was away".to_owned(),
            failed: failed.to_owned(),
            took_ms: 10,
            ago_ms: 5_000,
            ended_ms,
            bytes: 100,
        }
    }

    #[test]
    fn each_rebuild_is_counted_once_and_the_last_hundred_are_kept() {
        let mut of = OfVolume::default();
        let mut told = vec![ended(10, ""), ended(20, "its disk failed")];
        assert!(of.take(&told, 1_000));
        assert!(!of.take(&told, 1_001));
        assert_eq!((of.done, of.given_up, of.bytes), (1, 1, 200));
        assert_eq!(of.rebuilds[0].ended_s, 995);
        told.remove(0);
        told.extend((3..200).map(|n| ended(n * 10, "")));
        assert!(of.take(&told, 1_002));
        assert_eq!((of.done, of.given_up, of.rebuilds.len()), (198, 1, KEPT));

        // The next process counts time anew.
        let text = serde_json::to_vec(&of).unwrap();
        let mut of: OfVolume = serde_json::from_slice(&text).unwrap();
        assert!(of.take(&[ended(3, "")], 2_000));
        assert_eq!((of.done, of.rebuilds.len()), (199, KEPT));
    }
}
