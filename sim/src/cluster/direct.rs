//! Hosts that are told what to do, and what a scenario looks at to know when.

use cairn_block::VolumeId;
use cairn_engine::VolumeReport;

use super::{Cluster, Process};
use crate::client::{Client, Orders};
use crate::rng::Rng;

impl Cluster {
    /// How many hosts there are.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.clients.len()
    }

    /// Tells a host what to do from now on.
    pub fn order(&mut self, host: usize, orders: Orders) {
        self.with_host(host, |client| client.order(orders));
    }

    /// Sends a host to the other machine that serves its volume.
    pub fn move_host(&mut self, host: usize) {
        self.with_host(host, Client::move_on);
    }

    fn with_host(&mut self, host: usize, what: impl FnOnce(&mut Client)) {
        let node = self.clients[host];
        if let Process::Client(client) = &mut self.processes[node.0] {
            what(client);
        }
        self.run(node);
    }

    /// The epoch and the number of the configuration that a volume is served by where it is to be.
    #[must_use]
    pub fn config_of(&self, volume: usize) -> (u64, u64) {
        let id = VolumeId(volume as u128 + 1);
        self.configs.get(&(id, self.active)).copied().unwrap_or_default()
    }

    /// What the nexus that is to serve says of its volumes, where it says so at once.
    pub fn glance(&mut self) -> Vec<VolumeReport> {
        self.reports()
    }

    /// Whether a member is being rebuilt.
    pub fn rebuilds(&mut self) -> bool {
        self.reports().iter().any(|report| report.rebuild.is_some())
    }

    /// Whether a member is about to be in sync again.
    pub fn joins(&mut self) -> bool {
        self.reports()
            .iter()
            .any(|report| report.rebuild.as_ref().is_some_and(|r| r.stage == "joining"))
    }

    /// Whether a volume is served with a member that is not in sync.
    pub fn lacks_a_member(&mut self) -> bool {
        let out = |r: &VolumeReport| r.serving && r.children.iter().any(|c| !c.in_sync);
        self.reports().iter().any(out)
    }

    /// Where members in sync would differ if their nexus died now, and some of them lost power, one of them
    /// says durably that the extent is open.
    ///
    /// # Panics
    /// Where a difference would not be found.
    pub fn check_members(&mut self, rng: &mut Rng) {
        if self.spoilt || self.goes_back() {
            return;
        }
        let reports = self.reports();
        let most = rng.below(3) * 500;
        let mut disks = Vec::new();
        for at in 0..self.disks.len() {
            let mut copies = self.copies(at);
            if rng.chance(most) {
                copies.iter_mut().for_each(|disk| disk.lose_power(rng));
            }
            disks.push(copies);
        }
        self.check_marks_on(&reports, &disks);
    }
}
