//! Volumes whose members are lost, and which are started by force from what is left.

use cairn_engine::VolumeReport;

use super::{Repair, Run, STUCK_NS};
use crate::checks::{Check, check};
use crate::world::MS;

/// How often whoever looks after the cluster asks whether a volume has to be started by force.
const PERIOD: u64 = 500 * MS;

/// Whether hosts are answered.
fn is_up(report: &VolumeReport) -> bool {
    let has_data = report.children.iter().any(|c| c.in_sync && c.connected);
    report.serving && report.state != "suspended" && has_data
}

impl Run {
    /// Starts each volume by force that has not come up for a while and cannot, since pools are gone.
    pub(super) fn force_what_is_lost(&mut self, now: u64) {
        let forced = (0..self.cluster.volume_count()).any(|volume| self.cluster.is_forced(volume));
        if now < self.next_force || !(forced || self.cluster.any_is_gone()) {
            return;
        }
        self.next_force = now + PERIOD;
        for volume in 0..self.cluster.volume_count() {
            self.look_at_lost(volume, now);
        }
        if forced {
            self.mend(Repair::StartOther);
            self.cluster.supervise();
        }
    }

    fn look_at_lost(&mut self, volume: usize, now: u64) {
        let report = self.cluster.report_of(self.cluster.active(), volume);
        let Some(operator) = self.operator.as_mut() else { return };
        if self.cluster.is_forced(volume) {
            // It may be done, and not be known to be.
            if report.is_some_and(|r| r.serving) && self.cluster.force_serves(volume) {
                self.cluster.force_is_done(volume);
                operator.begin_anew(&mut self.cluster, volume);
                self.forced_at = now;
            }
            return;
        }
        let up = report.as_ref().is_some_and(is_up);
        if !operator.is_stuck(volume, up, now, STUCK_NS) {
            return;
        }
        let Some(left) = self.cluster.what_is_left(volume) else { return };
        if let Some(report) = report.filter(|report| !report.serving) {
            let names = left.missing.iter().all(|id| report.detail.contains(&id.to_string()));
            check!(
                Check::Liveness,
                names || !self.recovering,
                "volume {volume} waits for {:?}, and says: {}",
                left.missing,
                report.detail
            );
        }
        let Some(source) = operator.choose(&left.sources) else { return };
        let random = u32::try_from(self.rng.below(1 << 32)).expect("32 bits");
        self.cluster.start_by_force(volume, source.id, random);
        operator.take_from(volume, source);
        self.forced_at = now;
        self.mend(Repair::StartOther);
    }
}
