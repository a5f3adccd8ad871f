//! Standing by for a volume that another process serves, taking it over, and handing it over.
//!
//! Hosts stay connected to every process that shares a volume; which of them they can use the ANA state of its
//! namespace says. A process that hands a volume over first has hosts hold what they send (Change), then lets
//! what is in hand end, gives its lease back, and starts a new nexus that only looks (Inaccessible).

use cairn_block::mutants::{Mutant, on};
use cairn_block::{BlockSize, IoStatus};
use cairn_nexus::{ChildId, Nexus, NexusConfig, Purpose, VolumeState};
use cairn_nvmf::ana::AnaState;
use cairn_nvmf::target::Port;
use cairn_reactor::Driver;

use super::Shard;
use super::volumes::Volume;
use crate::control::{EngineError, Reply, Sharing, VolumeSpec};

/// What whoever waits for something hears.
const HANDED_OVER: &str = "the volume is handed over; whoever serves it goes on with it";
/// What is in hand has so long to end before it is answered as an error of the path.
const QUIESCE_MS: u64 = 2_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// What is in hand ends.
    Quiesce,
    /// The lease is given back.
    Release,
    /// The nexus serves no more, and its sessions end.
    Closed,
}

/// A volume on its way to standing by.
pub(super) struct HandOver {
    reply: Option<Reply<()>>,
    deadline_ms: u64,
    stage: Stage,
    /// It serves again by itself, if nobody else does by then.
    resumes: bool,
}

impl<D: Driver> Shard<D> {
    /// The nexus of a volume.
    pub(super) fn new_nexus(
        &self,
        spec: &VolumeSpec,
        purpose: Purpose,
        encryption: Option<Vec<u8>>,
    ) -> Nexus {
        let child = |r: &crate::control::VolumeReplica| cairn_nexus::ChildSpec {
            replica: r.id,
            local: matches!(r.address, crate::control::ChildAddress::Local { .. }),
            witness: r.witness,
            place: self.place_of(r),
        };
        Nexus::new(NexusConfig {
            volume: spec.id,
            blocks: spec.blocks,
            block_size: spec.block_size.map_or(0, BlockSize::bytes),
            encryption,
            children: spec.children.iter().map(child).collect(),
            purpose,
            child_deadline_ms: spec.child_deadline_ms,
            child_deadline_min_ms: self.config.child_deadline_min_ms,
            lease_ms: self.config.lease_ms,
            shared: spec.sharing.is_some(),
            holder: self.config.holder,
            assembly_wait_ms: self.config.assembly_wait_ms,
            max_requests: self.config.volume_requests,
            pace: self.config.pace,
        })
    }

    fn shared(&mut self, name: &str) -> Result<u32, EngineError> {
        let missing = || EngineError::NotFound { kind: "volume", name: name.to_owned() };
        let at = self.find_volume(name).ok_or_else(missing)?;
        let volume = &self.volumes[at];
        if volume.removing() || volume.hand_over.is_some() {
            let why = format!("volume `{name}` is being removed or handed over; try again");
            return Err(EngineError::Busy(why));
        }
        if volume.spec.sharing.is_none() {
            return Err(EngineError::Invalid(format!(
                "volume `{name}` is this process's alone; `cairn volume share {name}` lets others \
                 stand by for it"
            )));
        }
        Ok(at)
    }

    /// The blocks that hosts are to see are those that the configuration tells of. False where that cannot be done
    /// now.
    pub(super) fn learn_block_size(&mut self, at: u32) -> bool {
        let volume = &mut self.volumes[at];
        let told = match volume.nexus.block_size() {
            0 => return true,
            512 => BlockSize::B512,
            _ => BlockSize::B4096,
        };
        (volume.block_size, volume.spec.block_size) = (told, Some(told));
        told != BlockSize::B512 || self.reserve_sectors()
    }

    /// Lets other processes stand by for a volume.
    pub(super) fn share_volume(&mut self, name: &str, sharing: Sharing) -> Result<(), EngineError> {
        let missing = || EngineError::NotFound { kind: "volume", name: name.to_owned() };
        let at = self.find_volume(name).ok_or_else(missing)?;
        if let Some(export) = &self.volumes[at].spec.iscsi {
            self.check_place(Some(at), export, true)?;
        }
        let volume = &mut self.volumes[at];
        volume.spec.sharing = Some(sharing);
        volume.nexus.set_shared(true);
        self.tell_paths(at);
        self.touch_volume(at);
        Ok(())
    }

    /// Discovery tells of the other processes' addresses.
    pub(super) fn tell_paths(&mut self, at: u32) {
        let volume = &self.volumes[at];
        let (Some((subsystem, _)), Some(sharing)) = (volume.export, &volume.spec.sharing) else {
            return;
        };
        let port =
            |a: &std::net::SocketAddr| Port { traddr: a.ip().to_string(), trsvcid: a.port() };
        let ports = sharing.elsewhere.iter().map(port).collect();
        self.target.set_elsewhere(subsystem, ports).expect("the volume is exported");
        self.update_access(at);
    }

    /// What hosts are told of this path.
    pub(super) fn update_ana(&mut self, at: u32) {
        let volume = &self.volumes[at];
        let Some((subsystem, _)) = volume.export else { return };
        let state = ana_state(volume);
        self.target.set_ana(subsystem, state).expect("the volume is exported");
        self.update_access(at);
    }

    pub(super) fn take_over(&mut self, name: &str, reply: Reply<()>, now: u64) {
        let at = match self.shared(name) {
            Ok(at) => at,
            Err(error) => return reply.send(Err(error)),
        };
        let volume = &mut self.volumes[at];
        if volume.nexus.state().is_serving() {
            return reply.send(Ok(()));
        }
        if volume.activation.is_some() {
            let why = format!("volume `{name}` is being taken over already");
            return reply.send(Err(EngineError::Busy(why)));
        }
        if let Some(why) = volume.nexus.unfit() {
            let why = format!("volume `{name}` cannot be taken over here: {why}");
            return reply.send(Err(EngineError::Busy(why)));
        }
        tracing::info!(volume = %name, "taking the volume over");
        volume.activation = Some(reply);
        match volume.nexus.state() {
            // From the beginning, once what is left of it is over.
            VolumeState::Refused(_) => self.begin_hand_over(at, None, now),
            _ => {
                volume.nexus.activate(now);
            }
        }
        self.touch_volume(at);
    }

    /// Whoever asked for the volume to be taken over hears what came of it.
    pub(super) fn tell_activation(&mut self, at: u32) {
        let volume = &mut self.volumes[at];
        let result = match volume.nexus.state() {
            state if state.is_serving() => Ok(()),
            VolumeState::Fenced => {
                Err("another process has taken the volume over since".to_owned())
            }
            VolumeState::Refused(why) => Err(why.clone()),
            _ => return,
        };
        if let Some(reply) = volume.activation.take() {
            reply.send(result.map_err(EngineError::Storage));
        }
    }

    pub(super) fn stand_by(&mut self, name: &str, reply: Reply<()>, now: u64) {
        let at = match self.shared(name) {
            Ok(at) => at,
            Err(error) => return reply.send(Err(error)),
        };
        if matches!(self.volumes[at].nexus.state(), VolumeState::StandBy(_)) {
            return reply.send(Ok(()));
        }
        tracing::info!(volume = %name, "handing the volume over");
        self.begin_hand_over(at, Some(reply), now);
    }

    /// Another process may serve the volume, which this one cannot know: hosts that still reach it would wait for as
    /// long as it is cut off, and are told to use another path.
    pub(super) fn stand_by_if_cut_off(&mut self, at: u32, now: u64) {
        let volume = &self.volumes[at];
        let free = volume.hand_over.is_none() && !volume.removing() && self.stopping.is_none();
        if free && volume.spec.sharing.is_some() && volume.nexus.is_cut_off(now) {
            tracing::warn!(
                volume = %volume.spec.name,
                "no majority of the replicas can be reached, and another process may serve the volume: this one \
                 stands by, and serves it again if none does"
            );
            self.begin_hand_over(at, None, now);
            if let Some(hand_over) = self.volumes[at].hand_over.as_mut() {
                // What is in hand cannot end.
                (hand_over.resumes, hand_over.deadline_ms) = (true, now);
            }
        }
    }

    /// A newer nexus has taken the volume over, or this one could not: another looks on in its place, and where
    /// it takes over by itself it tries again.
    pub(super) fn stand_by_if_over(&mut self, at: u32, now: u64) {
        let volume = &self.volumes[at];
        let over = matches!(volume.nexus.state(), VolumeState::Fenced | VolumeState::Refused(_));
        let free = volume.hand_over.is_none() && !volume.removing();
        if over && free && volume.spec.sharing.is_some() {
            self.begin_hand_over(at, None, now);
        }
    }

    fn begin_hand_over(&mut self, at: u32, reply: Option<Reply<()>>, now: u64) {
        let deadline_ms = now + QUIESCE_MS;
        self.volumes[at].hand_over =
            Some(HandOver { reply, deadline_ms, stage: Stage::Quiesce, resumes: false });
        self.forget_restore(at, HANDED_OVER);
        self.forget_deletions(at, HANDED_OVER);
        self.update_ana(at);
        self.wants_timeout(Some(deadline_ms));
        self.touch_volume(at);
    }

    /// Goes on with handing a volume over.
    pub(super) fn advance_hand_over(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        // What the nexus does on its own account, a rebuild for one, goes on elsewhere.
        let quiet = volume.nexus.unanswered() == 0 && volume.waiting.is_empty();
        let serves = volume.nexus.state().is_serving();
        let Some(hand_over) = volume.hand_over.as_mut() else { return };
        let deadline_ms = hand_over.deadline_ms;
        let waits = serves && now < deadline_ms;
        if hand_over.stage == Stage::Quiesce {
            let settled = volume.sectors.is_empty() && volume.holds.is_empty();
            let drained = quiet && settled || on(Mutant::HandOverDoesNotDrain);
            if waits && !drained {
                return self.wants_timeout(Some(deadline_ms));
            }
            hand_over.stage = Stage::Release;
            // Whoever takes the volume over need not wait for it then.
            volume.nexus.release_lease();
            self.touch_volume(at);
        }
        let volume = &mut self.volumes[at];
        let Some(hand_over) = volume.hand_over.as_mut() else { return };
        if hand_over.stage == Stage::Release {
            if waits && !volume.nexus.lease_is_back() {
                return self.wants_timeout(Some(deadline_ms));
            }
            hand_over.stage = Stage::Closed;
            // What it answers now is told before another takes its place.
            return self.close_nexus(at, now);
        }
        if self.volumes[at].nexus.in_flight() == 0 {
            self.watch_from_now(at, now);
        }
    }

    /// Ends the nexus and its sessions.
    fn close_nexus(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let left = volume.nexus.unanswered() + volume.waiting.len();
        if left > 0 && volume.nexus.state().is_serving() {
            tracing::warn!(volume = %volume.spec.name, left, "handed over with requests in hand: hosts try them elsewhere");
            volume.cut_off += left as u64;
        }
        self.drop_sectors(at, IoStatus::PathError, now);
        self.forget_reservations(at, IoStatus::PathError);
        self.forget_sanitize(at, IoStatus::PathError);
        self.volumes[at].fail_change("the volume is handed over");
        self.volumes[at].nexus.hand_over();
        self.send_children(at, now);
        self.flush_links();
        self.retire_links(at);
        self.update_ana(at);
        self.touch_volume(at);
    }

    /// The old nexus is over: another looks on in its place.
    fn watch_from_now(&mut self, at: u32, now: u64) {
        // What the old one's links still answer is for nobody.
        self.detach_links(at);
        self.forget_deletions(at, HANDED_OVER);
        self.next_generation = self.next_generation.wrapping_add(1);
        let generation = self.next_generation;
        let volume = &self.volumes[at];
        let resumes = volume.hand_over.as_ref().is_some_and(|h| h.resumes);
        let told = volume.spec.sharing.as_ref().and_then(|s| s.auto_after_ms);
        let auto_after_ms = if resumes { Some(0) } else { told };
        // Its key is at hand, unless it is wrapped with another by then.
        let admitted = volume.spec.encryption.as_ref().map(|_| volume.nexus.encryption().to_vec());
        let spec = VolumeSpec { blocks: volume.nexus.blocks(), ..volume.spec.clone() };
        let nexus = self.new_nexus(&spec, Purpose::StandBy { auto_after_ms }, admitted);
        let volume = &mut self.volumes[at];
        (volume.nexus, volume.generation) = (nexus, generation);
        if let Some(why) = &volume.refusal {
            volume.nexus.note_refusal(why);
        }
        volume.register_replies.clear();
        // A snapshot of several volumes that waited for this one is given up, and holds it no longer.
        volume.frozen = false;
        // The new nexus counts its losses anew.
        volume.losses = 0;
        let reply = volume.hand_over.take().and_then(|h| h.reply);
        tracing::info!(volume = %volume.spec.name, "standing by");
        for child in 0..volume.routes.len() {
            let child = ChildId(u8::try_from(child).expect("at most MAX_CHILDREN"));
            self.route_child(at, child, now);
        }
        self.update_ana(at);
        self.touch_volume(at);
        if let Some(reply) = reply {
            reply.send(Ok(()));
        }
        if self.volumes[at].activation.is_some() {
            self.volumes[at].nexus.activate(now);
        }
    }
}

pub(super) fn ana_state(volume: &Volume) -> AnaState {
    let serves = volume.nexus.state().is_serving() && volume.nexus.restoring().is_none();
    match &volume.hand_over {
        Some(HandOver { stage: Stage::Quiesce | Stage::Release, .. }) if serves => AnaState::Change,
        None if serves => AnaState::Optimized,
        _ => AnaState::Inaccessible,
    }
}
