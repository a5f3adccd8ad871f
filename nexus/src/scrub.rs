//! Scrub: the whole volume is verified on every in-sync member, part by part, and mended.
//!
//! It runs beside the hosts: at a rate, one part at a time, and later where many requests are in
//! flight. A part is verified without the lock; only where something is found the range is locked.

use cairn_block::{Lba, LbaRange};

use crate::mend::PIECE_BLOCKS;
use crate::nexus::Nexus;
use crate::types::{ChildId, Event, VolumeState};

/// Blocks of a part that is verified: 1 MiB, as much as a Verify may name.
const PART_BLOCKS: u64 = 256;
/// Bytes of a block.
const BLOCK: u64 = 4096;
/// Findings that a report holds.
pub const MAX_FINDINGS: usize = 64;
/// A part that nobody could answer is tried again after so long, so often.
const RETRY_MS: u64 = 1000;
const MAX_TRIES: u32 = 5;
/// Where many host requests are in flight a part waits so much longer at most.
const YIELD_MS: u64 = 1000;
const LOOK_AGAIN_MS: u64 = 10;
/// A scrub that was late goes faster for at most so long.
const CATCH_UP_US: u64 = 20_000;
/// What a part takes that is a hole on every replica: so that a large hole does not keep the thread.
const HOLE_US: u64 = 50;

/// What was found in a block of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It did not verify; it was written anew and verifies now.
    Healed,
    /// It did not verify and could not be written, or not be decided: a replica was away.
    NotHealed,
    /// It does not verify on any replica.
    Unrecoverable,
    /// It verified and held something else than most others: it was written anew.
    Differed,
}

impl Found {
    /// One word for tables.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Healed => "healed",
            Self::NotHealed => "not-healed",
            Self::Unrecoverable => "unrecoverable",
            Self::Differed => "differed",
        }
    }
}

/// A block with which something was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    /// Its address in the volume.
    pub lba: Lba,
    /// On which replica.
    pub child: ChildId,
    /// What became of it.
    pub found: Found,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScrubState {
    /// It goes on.
    Running,
    /// It was stopped, and can be taken up at its cursor.
    #[default]
    Stopped,
    /// It has come to the end of the volume.
    Finished,
}

/// A scrub, how far it is and what it found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScrubReport {
    /// How far.
    pub state: ScrubState,
    /// Whether replicas are compared with each other.
    pub compare: bool,
    /// At most so many MiB of the volume in a second.
    pub rate_mib_s: u32,
    /// The block at which it goes on.
    pub cursor: u64,
    /// Blocks of the volume that were looked at, those in holes among them (which cost no time).
    pub blocks: u64,
    /// Copies of blocks that did not verify.
    pub bad: u64,
    /// Those of them that were written anew.
    pub healed: u64,
    /// Blocks of which no copy verifies.
    pub unrecoverable: u64,
    /// Copies that were different from most others.
    pub differing: u64,
    /// The first [`MAX_FINDINGS`] of all these.
    pub findings: Vec<Finding>,
}

#[derive(Debug, Default)]
pub(crate) struct Scrub {
    report: ScrubReport,
    next_us: u64,
    tries: u32,
}

impl Nexus {
    /// Starts a scrub, or takes one up: `report` says how and where; what it found so far is kept.
    pub fn start_scrub(&mut self, report: ScrubReport, now_ms: u64) {
        let report = ScrubReport {
            state: ScrubState::Running,
            rate_mib_s: report.rate_mib_s.max(1),
            ..report
        };
        self.scrub = Some(Scrub { report, next_us: now_ms * 1000, tries: 0 });
    }

    /// Stops the scrub; it can be taken up.
    pub fn stop_scrub(&mut self) {
        if let Some(scrub) = self.scrub.as_mut().filter(|s| s.report.state == ScrubState::Running) {
            scrub.report.state = ScrubState::Stopped;
        }
    }

    /// Sets how many MiB of the volume a running scrub goes through in a second.
    pub fn set_scrub_rate(&mut self, rate_mib_s: u32) {
        if let Some(scrub) = self.scrub.as_mut() {
            scrub.report.rate_mib_s = rate_mib_s.max(1);
        }
    }

    /// The scrub that runs, or the last one.
    #[must_use]
    pub fn scrub(&self) -> Option<&ScrubReport> {
        self.scrub.as_ref().map(|scrub| &scrub.report)
    }

    pub(crate) fn scrub_runs(&self) -> bool {
        self.scrub.as_ref().is_some_and(|s| s.report.state == ScrubState::Running)
    }

    /// When the scrub wants to go on.
    pub(crate) fn scrub_timeout(&self, now_ms: u64) -> Option<u64> {
        let may = self.scrub_runs() && self.scrub_may() && !self.mends.scrubs();
        let scrub = self.scrub.as_ref().filter(|_| may)?;
        let next_ms = scrub.next_us.div_ceil(1000);
        Some(if next_ms > now_ms { next_ms } else { now_ms + LOOK_AGAIN_MS })
    }

    /// Whether the volume is in a state in which it is scrubbed; otherwise the scrub waits.
    fn scrub_may(&self) -> bool {
        matches!(self.state, VolumeState::Online | VolumeState::Degraded)
    }

    /// Begins the next part where its time has come. Returns whether anything changed.
    pub(crate) fn pump_scrub(&mut self, now_ms: u64) -> bool {
        if !self.scrub_runs() || self.mends.scrubs() {
            return false;
        }
        let unanswered = self.slots.in_use() - self.lingering;
        let crowded = unanswered * 2 > usize::from(self.config.max_requests);
        let serving = self.scrub_may();
        let Some(scrub) = self.scrub.as_mut() else { return false };
        let late_us = (now_ms * 1000).checked_sub(scrub.next_us);
        let Some(late_us) = late_us.filter(|&us| serving && (!crowded || us > YIELD_MS * 1000))
        else {
            return false;
        };
        let report = &mut scrub.report;
        if report.cursor >= self.config.blocks {
            report.state = ScrubState::Finished;
            self.push_event(Event::ScrubFinished);
            return true;
        }
        let (compare, cursor) = (report.compare, report.cursor);
        // Where copies are compared the lock is held meanwhile: for less at once.
        let most = if compare { PIECE_BLOCKS } else { PART_BLOCKS };
        let blocks = (most - cursor % most).min(self.config.blocks - cursor);
        // Time that was lost to the hosts is not made up for.
        scrub.next_us += late_us.saturating_sub(CATCH_UP_US);
        let range = LbaRange::new(Lba(cursor), blocks).expect("inside the volume");
        self.begin_scrub_part(range, compare)
    }

    /// A part is over: so many of its blocks were lost, and so many held data.
    pub(crate) fn scrub_part_done(
        &mut self,
        range: LbaRange,
        sure: bool,
        (lost, data): (u64, u64),
        now_ms: u64,
    ) {
        let Some(scrub) = self.scrub.as_mut() else { return };
        let report = &mut scrub.report;
        if report.cursor != range.start().0 {
            // Another scrub was started meanwhile.
            return;
        }
        report.unrecoverable += lost;
        if !sure && scrub.tries < MAX_TRIES {
            scrub.tries += 1;
            scrub.next_us = (now_ms + RETRY_MS) * 1000;
            return;
        }
        scrub.tries = 0;
        let us =
            data.min(range.blocks()) * BLOCK * 1_000_000 / (u64::from(report.rate_mib_s) << 20);
        scrub.next_us += us.max(HOLE_US);
        report.cursor = range.end().0;
        report.blocks += range.blocks();
    }

    /// Something was wrong with a block of a child.
    pub(crate) fn found(&mut self, lba: Lba, child: ChildId, found: Found, by_scrub: bool) {
        self.push_event(Event::Found { lba, child, found });
        let Some(scrub) = self.scrub.as_mut().filter(|_| by_scrub) else { return };
        let report = &mut scrub.report;
        match found {
            Found::Healed => {
                report.bad += 1;
                report.healed += 1;
            }
            Found::NotHealed | Found::Unrecoverable => report.bad += 1,
            Found::Differed => report.differing += 1,
        }
        if report.findings.len() < MAX_FINDINGS {
            report.findings.push(Finding { lba, child, found });
        }
    }
}
