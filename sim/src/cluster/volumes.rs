//! Volumes: served by a machine, taken over by the other, worked on by hosts, grown, scrubbed, snapshotted.

use std::rc::Rc;
use std::sync::mpsc;

use cairn_block::{BlockSize, SnapshotId, SnapshotVerb, VolumeId};
use cairn_engine::nexus::{Purpose, ScrubReport, ScrubState};
use cairn_engine::replica::SnapshotSpec;
use cairn_engine::snapshot::SnapshotCall;
use cairn_engine::{Command, EngineError, Reply, ScrubAction, VolumeReport, VolumeSpec};

use super::{
    Answer, AskedSnapshot, Cluster, NEXUS, Process, Seat, address, encryption, pool_name,
    volume_nqn,
};
use crate::client::{Client, Workload};
use crate::driver::SimDriver;

impl Cluster {
    pub(super) fn create_replicas(&mut self, at: usize) {
        let node = self.node_of(at).expect("it runs");
        let all: Vec<(usize, Seat)> = (0..self.config.volumes)
            .flat_map(|volume| self.seats[volume].iter().map(move |seat| (volume, *seat)))
            .filter(|(_, seat)| seat.pool == at)
            .collect();
        for (volume, seat) in all {
            let spec = self.replica_spec(volume, seat);
            self.command(node, |reply| Command::CreateReplica { pool: pool_name(at), spec, reply })
                .expect("an empty pool has room");
        }
    }

    /// Starts the process of the machine that is to serve, and tells it of the volumes.
    ///
    /// # Panics
    /// Where it runs already.
    pub fn start_nexus(&mut self, purpose: Purpose) {
        let which = self.active;
        self.start_process(which);
        if purpose == Purpose::Create {
            for at in self.pools_in(which) {
                self.create_replicas(at);
            }
        }
        self.add_volumes(which, purpose);
    }

    /// Has the volumes served by the other machine from now on, whatever the one that serves them does.
    pub fn take_over(&mut self) {
        if self.stands_by() {
            let to = 1 - self.active;
            return self.tell_to_take_over(to);
        }
        self.active = 1 - self.active;
        self.world().say(format_args!("nexus {} takes over", self.active));
        self.supervise();
    }

    /// What whoever looks after the cluster does now and then: the machine that is to serve the volumes is
    /// told of them, anew where another nexus has fenced it.
    pub fn supervise(&mut self) {
        if self.stands_by() {
            return self.supervise_standbys();
        }
        let Some(node) = self.nexuses[self.active] else { return };
        if self.world().is_paused(node) {
            return;
        }
        let reports = self.reports();
        for volume in 0..self.config.volumes {
            let name = format!("volume{volume}");
            match reports.iter().find(|r| r.name == name) {
                None => self.add_volume(self.active, volume, Purpose::Assemble),
                Some(report) if ["fenced", "refused"].contains(&report.state.as_str()) => {
                    self.remove_volume(1 - self.active, volume);
                    self.remove_volume(self.active, volume);
                }
                Some(_) => {}
            }
        }
    }

    /// Asks the machine that is not to serve the volumes to let go of them.
    pub fn retire_other(&mut self) {
        if self.stands_by() {
            return;
        }
        for volume in 0..self.config.volumes {
            self.remove_volume(1 - self.active, volume);
        }
    }

    pub(super) fn remove_volume(&mut self, which: usize, volume: usize) {
        let Some(node) = self.nexuses[which] else { return };
        if self.world().is_paused(node) {
            return;
        }
        let Process::Shard(shard) = &mut self.processes[node.0] else { return };
        // Whether it is there, or goes at once, is seen when it is added again.
        let reply = Reply::new(drop);
        shard.command(Command::RemoveVolume { name: format!("volume{volume}"), reply });
        self.run(node);
    }

    pub(super) fn add_volumes(&mut self, which: usize, purpose: Purpose) {
        for volume in 0..self.config.volumes {
            self.add_volume(which, volume, purpose);
        }
    }

    pub(super) fn add_volume(&mut self, which: usize, volume: usize, purpose: Purpose) {
        let Some(node) = self.nexuses[which] else { return };
        let children = self.named[which][volume].iter().map(|seat| self.place_of(which, *seat));
        let (sharing, purpose) = self.role_of(which, purpose);
        let purpose = match self.forced[volume] {
            Some(forced) => forced.purpose(),
            None => purpose,
        };
        let spec = VolumeSpec {
            id: VolumeId(volume as u128 + 1),
            name: format!("volume{volume}"),
            nqn: volume_nqn(volume),
            blocks: self.config.blocks,
            block_size: Some(BlockSize::B4096),
            sharing,
            iscsi: self.export(volume),
            children: children.collect(),
            purpose,
            child_deadline_ms: self.config.child_deadline_ms,
            allowed_hosts: None,
            encryption: self.config.encrypted.then(|| encryption(volume, purpose)),
        };
        self.command(node, |reply| Command::AddVolume { spec, reply })
            .expect("the volume is new to the process");
    }

    /// Adds a host of a volume.
    pub fn add_client(&mut self, volume: usize, work: Workload) {
        let rng = self.world().rng.fork();
        let driver = SimDriver::new(&self.world, self.host_machine(), 3 << 20);
        let node = driver.node();
        let history = self.history(volume);
        let nqn = volume_nqn(volume);
        let mut peers = vec![(address(NEXUS), 0)];
        if self.config.second {
            peers.push((address(self.nexus_machine(1)), 1));
        }
        let serving = (Rc::clone(&self.serving), VolumeId(volume as u128 + 1));
        let mut client = Client::new(driver, peers, &nqn, work, rng, history, serving);
        client.respect(Rc::clone(&self.units[volume].reserved));
        if self.stands_by() {
            client.roles_change(Rc::clone(&self.standing.changed));
        }
        self.add(node, Process::Client(Box::new(client)));
        self.clients.push(node);
        self.run(node);
    }

    /// Has a volume grow, where the nexus runs; what comes of it is looked at in [`Cluster::compare`].
    pub fn grow_volume(&mut self, volume: usize, blocks: u64) {
        let Some(node) = self.nexuses[self.active] else { return };
        let Process::Shard(shard) = &mut self.processes[node.0] else { return };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Nobody may look.
            let _told = tx.send(result);
        });
        shard.command(Command::ResizeVolume { name: format!("volume{volume}"), blocks, reply });
        self.growth.push((volume, blocks, rx));
        self.run(node);
    }

    /// What the nexus that is to serve says of its volumes at this moment; nothing where it does not run.
    pub(super) fn reports(&mut self) -> Vec<VolumeReport> {
        let Some(node) = self.nexuses[self.active] else { return Vec::new() };
        let Process::Shard(shard) = &mut self.processes[node.0] else { return Vec::new() };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Looked at below.
            let _told = tx.send(result);
        });
        shard.command(Command::ListVolumes { reply });
        rx.try_recv().ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Whether every host has made its requests and got its answers.
    #[must_use]
    pub fn clients_are_done(&self) -> bool {
        self.clients.iter().chain(&self.initiators).all(|node| match &self.processes[node.0] {
            Process::Client(client) => client.is_done(),
            Process::Initiator(initiator) => initiator.is_done(),
            Process::Dead | Process::Shard(_) => true,
        })
    }

    /// Requests that hosts saw fail.
    #[must_use]
    pub fn client_errors(&self) -> u64 {
        let errors = self.clients.iter().map(|node| match &self.processes[node.0] {
            Process::Client(client) => client.errors,
            Process::Dead | Process::Shard(_) | Process::Initiator(_) => 0,
        });
        errors.sum()
    }

    /// Has every host read its whole volume.
    pub fn verify(&mut self) {
        for node in self.clients.clone() {
            if let Process::Client(client) = &mut self.processes[node.0] {
                client.verify();
            }
            self.run(node);
        }
        self.verify_counters();
    }

    /// Has every host make so many requests more.
    pub fn work_more(&mut self, requests: u64) {
        for node in self.clients.clone() {
            if let Process::Client(client) = &mut self.processes[node.0] {
                client.work_more(requests);
            }
            self.run(node);
        }
    }

    /// What the nexus says of its volumes.
    ///
    /// # Errors
    /// Where there is no nexus.
    pub fn volumes(&mut self) -> Result<Vec<VolumeReport>, EngineError> {
        let node = self.nexuses[self.active].ok_or(EngineError::Stopped)?;
        self.command(node, |reply| Command::ListVolumes { reply })
    }

    /// Starts a scrub of every volume.
    ///
    /// # Panics
    /// Where a volume does not serve.
    pub fn scrub(&mut self, compare: bool) {
        let node = self.nexuses[self.active].expect("the nexus runs");
        for volume in 0..self.config.volumes {
            let report = ScrubReport { compare, rate_mib_s: 64, ..ScrubReport::default() };
            let name = format!("volume{volume}");
            let action = ScrubAction::Start(report);
            self.command(node, |reply| Command::ScrubVolume { name, action, reply })
                .expect("the volume serves");
        }
    }

    /// Whether every scrub has come to its end.
    ///
    /// # Panics
    /// Where the nexus does not run.
    pub fn scrubs_are_done(&mut self) -> bool {
        let volumes = self.volumes().expect("the nexus runs");
        let done = |s: &ScrubReport| s.state == ScrubState::Finished;
        volumes.iter().all(|v| v.scrub.as_ref().is_some_and(done))
    }

    pub(super) fn snapshot_call(
        &mut self,
        volume: usize,
        id: SnapshotId,
        verb: SnapshotVerb,
    ) -> Option<Answer> {
        let node = self.nexuses[self.active]?;
        let Process::Shard(shard) = &mut self.processes[node.0] else { return None };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Nobody may look.
            let _told = tx.send(result);
        });
        let spec = SnapshotSpec { id, name: format!("{id}"), created: 1 };
        let call = SnapshotCall { spec, clone: None };
        let volumes = vec![format!("volume{volume}")];
        // Hosts stay connected to what goes back.
        let force = verb == SnapshotVerb::Restore;
        shard.command(Command::Snapshot { volumes, verb, call, force, reply });
        self.run(node);
        Some(rx)
    }

    /// Asks for a snapshot while the hosts work; [`Cluster::look_at_snapshots`] sees what becomes of it.
    pub fn take_snapshot(&mut self, volume: usize, id: u128) {
        let id = SnapshotId(id);
        let history = self.history(volume);
        // It may be the first that is heard of this epoch.
        let wanted = VolumeId(volume as u128 + 1);
        let report = self.reports().into_iter().find(|r| r.id == wanted && r.serving);
        if let Some(report) = report {
            history.borrow_mut().epoch_serves(self.era(volume, report.epoch));
        }
        let invoked = history.borrow_mut().tick();
        let blocks = history.borrow().blocks();
        let differing = (0..blocks).filter(|&lba| history.borrow().may_differ(lba)).collect();
        self.world().say(format_args!("snapshot {id:x?} of volume {volume}"));
        if let Some(answer) = self.snapshot_call(volume, id, SnapshotVerb::Create) {
            self.snapshots.push(AskedSnapshot { volume, id, invoked, differing, answer });
        }
    }

    /// Deletes one of the snapshots that were taken.
    pub fn drop_snapshot(&mut self) {
        let Some((volume, id, ..)) = self.taken.first() else { return };
        let (volume, id) = (*volume, *id);
        self.taken.retain(|(v, i, ..)| (*v, *i) != (volume, id));
        if let Some(answer) = self.snapshot_call(volume, id, SnapshotVerb::Delete) {
            self.dropped.push((volume, id, answer));
        }
    }
}
