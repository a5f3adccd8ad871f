//! When volumes are scrubbed, and what came of it: a file in the state folder beside that of the volumes.
//!
//! The engine knows no time of day and forgets with its process; here is both. Every few seconds what the
//! engine tells of its scrubs is stored; one that a restart cut off is taken up at its cursor; and where
//! one is due it is started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use cairn_api::v1;
use cairn_engine::block::{Lba, VolumeId};
use cairn_engine::nexus::{ChildId, Finding, Found, ScrubReport, ScrubState};
use cairn_engine::{Command, ScrubAction, VolumeReport};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::clock::now_s;
use crate::config;
use crate::service::Service;

/// How often the engine is asked.
const PERIOD: Duration = Duration::from_secs(2);
/// Where no volume is being scrubbed.
const CALM_PERIOD: Duration = Duration::from_secs(8);
/// Bytes of a block.
const BLOCK: u64 = 4096;

/// A block with which something was wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SavedFinding {
    lba: u64,
    replica: String,
    outcome: String,
}

/// The last scrub of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedScrub {
    volume: String,
    /// When the volume was first seen: from when on its first scrub is due.
    since_s: u64,
    /// When the last one was started; 0: never.
    started_s: u64,
    /// When it ended; 0: it has not.
    finished_s: u64,
    /// It goes on, or is to go on after a restart.
    running: bool,
    compare: bool,
    rate_mib_s: u32,
    cursor: u64,
    blocks: u64,
    bad: u64,
    healed: u64,
    unrecoverable: u64,
    differing: u64,
    findings: Vec<SavedFinding>,
}

#[derive(Debug, Default)]
struct Saved {
    path: PathBuf,
    scrubs: Vec<SavedScrub>,
}

impl Saved {
    fn load(dir: &Path) -> Self {
        let path = dir.join("scrubs.json");
        let scrubs = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                // Nothing depends on it but when the next one runs.
                tracing::warn!(path = %path.display(), %error, "what is known of scrubs is lost");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        Self { path, scrubs }
    }

    fn save(&self) -> Result<()> {
        let staged = self.path.with_extension("json.new");
        let bytes = serde_json::to_vec_pretty(&self.scrubs)?;
        std::fs::write(&staged, bytes)
            .and_then(|()| std::fs::rename(&staged, &self.path))
            .with_context(|| format!("cannot store {}", self.path.display()))
    }

    fn of(&mut self, volume: &str, now_s: u64) -> &mut SavedScrub {
        let at = self.scrubs.iter().position(|s| s.volume == volume).unwrap_or_else(|| {
            self.scrubs.push(SavedScrub {
                volume: volume.to_owned(),
                since_s: now_s,
                ..SavedScrub::default()
            });
            self.scrubs.len() - 1
        });
        &mut self.scrubs[at]
    }
}

impl SavedScrub {
    /// Takes over what the engine tells.
    fn update(&mut self, volume: &VolumeReport, report: &ScrubReport, now_s: u64) {
        let finding = |f: &Finding| SavedFinding {
            lba: f.lba.0,
            replica: volume
                .children
                .iter()
                .find(|c| c.number == f.child.0)
                .map_or_else(String::new, |c| c.replica.to_string()),
            outcome: f.found.word().to_owned(),
        };
        self.compare = report.compare;
        self.rate_mib_s = report.rate_mib_s;
        self.cursor = report.cursor;
        self.blocks = report.blocks;
        self.bad = report.bad;
        self.healed = report.healed;
        self.unrecoverable = report.unrecoverable;
        self.differing = report.differing;
        self.findings = report.findings.iter().map(finding).collect();
        self.running = report.state == ScrubState::Running;
        if report.state == ScrubState::Finished && self.finished_s == 0 {
            self.finished_s = now_s;
        }
    }

    /// What the engine is to go on from.
    fn report(&self, volume: &VolumeReport) -> ScrubReport {
        let finding = |f: &SavedFinding| {
            let child = volume.children.iter().find(|c| c.replica.to_string() == f.replica)?;
            let found = [Found::Healed, Found::NotHealed, Found::Unrecoverable, Found::Differed]
                .into_iter()
                .find(|found| found.word() == f.outcome)?;
            Some(Finding { lba: Lba(f.lba), child: ChildId(child.number), found })
        };
        ScrubReport {
            state: ScrubState::Stopped,
            compare: self.compare,
            rate_mib_s: self.rate_mib_s,
            cursor: self.cursor,
            blocks: self.blocks,
            bad: self.bad,
            healed: self.healed,
            unrecoverable: self.unrecoverable,
            differing: self.differing,
            findings: self.findings.iter().filter_map(finding).collect(),
        }
    }

    fn begin(&mut self, compare: bool, rate_mib_s: u32, now_s: u64) {
        *self = Self {
            volume: std::mem::take(&mut self.volume),
            since_s: self.since_s,
            started_s: now_s,
            running: true,
            compare,
            rate_mib_s,
            ..Self::default()
        };
    }

    /// Whether the volume's moment has come round since the last scrub began. Each volume has its own
    /// within the interval, so that many do not begin at once.
    fn is_due(&self, interval_s: u64, now_s: u64) -> bool {
        if interval_s == 0 || self.running {
            return false;
        }
        let phase = self
            .volume
            .parse::<VolumeId>()
            .map_or(0, |id| u64::try_from(mix(id.0) % u128::from(interval_s)).unwrap_or_default());
        let round = |s: u64| (s + interval_s - phase) / interval_s;
        round(now_s) > round(self.started_s.max(self.since_s))
    }

    fn message(&self) -> v1::Scrub {
        let state = match (self.running, self.started_s, self.finished_s) {
            (true, ..) => "running",
            (false, 0, _) => "never",
            (false, _, 0) => "stopped",
            _ => "finished",
        };
        v1::Scrub {
            state: state.to_owned(),
            compare: self.compare,
            rate_mib_s: self.rate_mib_s,
            started_unix_s: self.started_s,
            finished_unix_s: self.finished_s,
            cursor_bytes: self.cursor * BLOCK,
            verified_bytes: self.blocks * BLOCK,
            bad_blocks: self.bad,
            healed_blocks: self.healed,
            unrecoverable_blocks: self.unrecoverable,
            differing_blocks: self.differing,
            findings: self
                .findings
                .iter()
                .map(|f| v1::ScrubFinding {
                    lba: f.lba,
                    replica_id: f.replica.clone(),
                    outcome: f.outcome.clone(),
                })
                .collect(),
        }
    }
}

/// Spreads ids that people or programs number in order.
fn mix(id: u128) -> u128 {
    let mut x = id ^ (id >> 64);
    for _ in 0..2 {
        x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        x ^= x >> 57;
    }
    x
}

/// What is known of the scrubs of a process's volumes.
#[derive(Debug)]
pub(crate) struct Scrubs {
    saved: Mutex<Saved>,
    interval_s: u64,
    rate_mib_s: u32,
}

impl Scrubs {
    pub(crate) fn new(state_dir: &Path, settings: &config::Nexus) -> Self {
        Self {
            saved: Mutex::new(Saved::load(state_dir)),
            interval_s: settings.scrub_interval.0,
            rate_mib_s: settings.scrub_rate_mib_s(),
        }
    }

    /// What the API tells of a volume's scrub.
    pub(crate) fn message(&self, volume: &VolumeReport) -> v1::Scrub {
        let mut saved = self.saved.lock();
        let scrub = saved.of(&volume.id.to_string(), now_s());
        if let Some(report) = &volume.scrub {
            scrub.update(volume, report, now_s());
        }
        scrub.message()
    }

    /// What to tell the engine where a person starts one: it takes up one that was stopped.
    pub(crate) fn start(&self, volume: &VolumeReport, compare: bool, rate: u32) -> ScrubAction {
        let mut saved = self.saved.lock();
        let scrub = saved.of(&volume.id.to_string(), now_s());
        let stopped = scrub.started_s > 0 && scrub.finished_s == 0 && scrub.compare == compare;
        let rate = if rate > 0 { rate } else { self.rate_mib_s };
        if !stopped {
            scrub.begin(compare, rate, now_s());
        }
        scrub.rate_mib_s = rate;
        scrub.running = true;
        ScrubAction::Start(scrub.report(volume))
    }

    /// It is not to go on after a restart.
    pub(crate) fn stop(&self, volume: &VolumeReport) {
        self.saved.lock().of(&volume.id.to_string(), now_s()).running = false;
    }

    /// Stores what the engine tells; the actions that are due.
    fn look(&self, volumes: &[VolumeReport], now_s: u64) -> Vec<(String, ScrubAction)> {
        let mut saved = self.saved.lock();
        let before = saved.scrubs.clone();
        let mut actions = Vec::new();
        for volume in volumes {
            let scrub = saved.of(&volume.id.to_string(), now_s);
            if let Some(report) = &volume.scrub {
                scrub.update(volume, report, now_s);
            } else if scrub.running && volume.serving {
                actions.push((volume.name.clone(), ScrubAction::Start(scrub.report(volume))));
            }
            if volume.serving && scrub.is_due(self.interval_s, now_s) {
                scrub.begin(false, self.rate_mib_s, now_s);
                actions.push((volume.name.clone(), ScrubAction::Start(scrub.report(volume))));
            }
        }
        saved.scrubs.retain(|s| volumes.iter().any(|v| v.id.to_string() == s.volume));
        if saved.scrubs != before
            && let Err(error) = saved.save()
        {
            tracing::error!("{error:#}");
        }
        actions
    }
}

/// Looks after the scrubs for as long as the process lives.
pub(crate) async fn run(service: Arc<Service>) {
    let mut pause = PERIOD;
    loop {
        tokio::time::sleep(pause).await;
        let Ok(volumes) = service.volume_reports().await else { return };
        let runs = |v: &VolumeReport| {
            v.scrub.as_ref().is_some_and(|s| s.state == ScrubState::Running) || !v.serving
        };
        pause = if volumes.iter().any(runs) { PERIOD } else { CALM_PERIOD };
        for (name, action) in service.scrubs().look(&volumes, now_s()) {
            tracing::info!(volume = %name, "scrub starts");
            let started = service.ask(|reply| Command::ScrubVolume { name, action, reply }).await;
            if let Err(error) = started {
                tracing::warn!(%error, "a scrub did not start; it is tried again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400;

    #[test]
    fn scrubs_are_due_once_an_interval_and_spread() {
        let mut starts = Vec::new();
        for id in 1..50u128 {
            let volume = VolumeId(id).to_string();
            let mut scrub = SavedScrub { volume, since_s: 1_000 * DAY, ..SavedScrub::default() };
            let mut begun = Vec::new();
            for hour in 0..=24 * 21 {
                let now = 1_000 * DAY + hour * 3600;
                if scrub.is_due(7 * DAY, now) {
                    scrub.begin(false, 64, now);
                    scrub.running = false;
                    begun.push(now);
                }
            }
            assert_eq!(begun.len(), 3, "{begun:?}");
            assert!(begun.windows(2).all(|w| w[1] - w[0] == 7 * DAY));
            starts.push(begun[0] / DAY);
        }
        starts.sort_unstable();
        starts.dedup();
        assert!(starts.len() >= 7, "on every day of the week: {starts:?}");
    }

    #[test]
    fn never_is_never() {
        let scrub = SavedScrub { volume: VolumeId(7).to_string(), ..SavedScrub::default() };
        assert!(!scrub.is_due(0, 1 << 40));
        assert!(scrub.is_due(DAY, 10 * DAY));
        assert!(!SavedScrub { running: true, ..scrub }.is_due(DAY, 10 * DAY));
    }
}
