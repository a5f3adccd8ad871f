//! Two machines that stand by for each other: which serves is for them and their operator to find out, and never
//! do both.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use cairn_block::VolumeId;
use cairn_engine::nexus::Purpose;
use cairn_engine::{Command, EngineError, Reply, Sharing, WatchedVolume};

use super::{Cluster, Process, address, volume_of};
use crate::checks::{Check, check};
use crate::world::{MS, NodeId};

/// How the two machines stand by for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// When each takes over by itself; nothing: when it is told to.
    pub auto_after_ms: [Option<u64>; 2],
}

/// The newest epoch of each volume in which a change was acked, and when it was the first time.
pub type Changed = Rc<RefCell<BTreeMap<VolumeId, (u64, u64)>>>;

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// See [`Changed`].
    pub(super) changed: Changed,
    /// What a process had answered of a volume when it was looked at last, and in which epoch it served then.
    seen: BTreeMap<(NodeId, VolumeId), (WatchedVolume, u64)>,
    /// Requests that were cut off when a volume was handed over.
    cut_off: u64,
    /// Nobody has served since then.
    idle_since: Option<u64>,
}

impl Cluster {
    /// Whether the two machines stand by for each other.
    #[must_use]
    pub fn stands_by(&self) -> bool {
        self.config.tuning.roles.is_some()
    }

    /// How a volume is shared, and why a machine comes to it.
    pub(super) fn role_of(&self, which: usize, purpose: Purpose) -> (Option<Sharing>, Purpose) {
        let Some(roles) = self.config.tuning.roles else { return (None, purpose) };
        let auto_after_ms = roles.auto_after_ms[which];
        let elsewhere = vec![address(self.nexus_machine(1 - which))];
        let purpose = match purpose {
            // What it served it serves again.
            Purpose::Assemble if which == self.active => {
                Purpose::StandBy { auto_after_ms: Some(0) }
            }
            Purpose::Assemble => Purpose::StandBy { auto_after_ms },
            purpose => purpose,
        };
        (Some(Sharing { auto_after_ms, elsewhere, ..Sharing::default() }), purpose)
    }

    /// What whoever looks after such a cluster does: both machines are told of the volumes, and where nobody
    /// serves for long one is told to.
    pub(super) fn supervise_standbys(&mut self) {
        let mut serves = None;
        for which in 0..2 {
            let Some(node) = self.nexuses[which] else { continue };
            if self.world().is_paused(node) {
                continue;
            }
            for volume in 0..self.config.volumes {
                match self.report_of(which, volume) {
                    None => self.add_volume(which, volume, Purpose::Assemble),
                    Some(report) if report.serving => serves = Some(which),
                    Some(_) => {}
                }
            }
        }
        let now = self.world().now_ns();
        if let Some(which) = serves {
            // One that is cut off does not know yet that the other has taken over.
            if self.report_of(self.active, 0).is_none_or(|r| !r.serving) {
                self.active = which;
            }
            self.standing.idle_since = None;
            return;
        }
        let since = *self.standing.idle_since.get_or_insert(now);
        if now > since + 8_000 * MS {
            self.standing.idle_since = None;
            let which =
                if self.nexuses[self.active].is_some() { self.active } else { 1 - self.active };
            self.tell_to_take_over(which);
        }
    }

    fn tell_role(
        &mut self,
        which: usize,
        make: impl Fn(String, Reply<()>) -> super::SimCommand,
    ) -> Vec<std::sync::mpsc::Receiver<Result<(), EngineError>>> {
        let Some(node) = self.nexuses[which] else { return Vec::new() };
        if self.world().is_paused(node) {
            return Vec::new();
        }
        let mut answers = Vec::new();
        for volume in 0..self.config.volumes {
            let Process::Shard(shard) = &mut self.processes[node.0] else { return Vec::new() };
            let (tx, rx) = std::sync::mpsc::channel();
            let reply = Reply::new(move |result| {
                // Nobody may look.
                let _told = tx.send(result);
            });
            shard.command(make(format!("volume{volume}"), reply));
            answers.push(rx);
        }
        self.run(node);
        answers
    }

    /// Tells a machine to take the volumes over, whoever serves them.
    pub fn tell_to_take_over(&mut self, which: usize) {
        self.world().say(format_args!("nexus {which} is told to take over"));
        self.tell_role(which, |name, reply| Command::TakeOver { name, reply });
    }

    /// Tells a machine to hand the volumes over.
    pub fn tell_to_stand_by(&mut self, which: usize) {
        self.world().say(format_args!("nexus {which} is told to hand over"));
        self.tell_role(which, |name, reply| Command::StandBy { name, reply });
    }

    /// Hands the volumes over as `cairn volume takeover --to` does: the other is told once this one stands by, or has
    /// not answered for so long.
    pub fn hand_over(&mut self, from: usize, patience_ns: u64) {
        self.world().say(format_args!("nexus {from} hands over to {}", 1 - from));
        let answers = self.tell_role(from, |name, reply| Command::StandBy { name, reply });
        let mut open = answers.len();
        self.run_while(patience_ns, |_| {
            open -= answers.iter().filter(|answer| answer.try_recv().is_ok()).count();
            open == 0
        });
        self.tell_to_take_over(1 - from);
    }

    /// Requests that were cut off by hand-overs since this was asked last.
    pub fn take_cut_off(&mut self) -> u64 {
        std::mem::take(&mut self.standing.cut_off)
    }

    /// Looks at what a process has answered since it was looked at last: nothing is read from a nexus once a later
    /// one has acked a change.
    pub(super) fn watch_roles(&mut self, node: NodeId, found: WatchedVolume) {
        let epoch = self.era(volume_of(found.id), found.epoch.0);
        let before = self.standing.seen.get(&(node, found.id)).copied();
        let (last, served) = before.unwrap_or((found, epoch));
        let served = if found.serving { epoch } else { served };
        self.standing.seen.insert((node, found.id), (found, served));
        self.standing.cut_off += found.cut_off.saturating_sub(last.cut_off);
        let now = self.world().now_ns();
        let mut changed = self.standing.changed.borrow_mut();
        let newest = changed.entry(found.id).or_default();
        check!(
            Check::OneAtATime,
            found.reads == last.reads || served >= newest.0,
            "volume {}: node {} answers reads in epoch {served:#x}, and one of epoch {:#x} has acked changes \
             since {} ns",
            found.id,
            node.0,
            newest.0,
            newest.1
        );
        if found.changes != last.changes && served > newest.0 {
            *newest = (served, now);
        }
    }
}
