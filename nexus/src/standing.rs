//! How children and the volume stand: who is taken out and comes back, and when the volume is online,
//! degraded, suspended or fenced.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{IoOp, IoStatus};

use crate::children::{ChildState, FaultReason};
use crate::commit::Commit;
use crate::nexus::Nexus;
use crate::register::{Register, RegisterOp};
use crate::slots::{ChildSet, Phase, Slot};
use crate::types::{ChildId, ChildReply, Event, VolumeState};

impl Nexus {
    /// Whether nobody but this member would be left once those that are failing are out. It is not
    /// given up: there would be nobody to serve instead.
    fn is_last(&self, child: ChildId) -> bool {
        self.staying().without(ChildSet::of(child)).is_empty()
    }

    /// The child is to leave the in-sync set. Nothing that it missed is acked before that is stored.
    pub(crate) fn fail_child(&mut self, child: ChildId, reason: FaultReason) {
        let last = self.is_last(child);
        let holds_data = self.holds_data(child);
        let proposed = self.proposed.has(child);
        if self.mirror() == Some(child) && !self.in_sync.has(child) && !proposed {
            self.abort_rebuild(reason);
            return;
        }
        let c = self.child(child);
        if last
            || !holds_data
            || matches!(c.state, ChildState::Failing(_) | ChildState::OutOfSync(_))
        {
            return;
        }
        c.state = ChildState::Failing(reason);
        self.push_event(Event::ChildFailing(child, reason));
        self.start_commit();
    }

    /// The child has said that its pool is offline: it cannot be counted on for anything that is to be
    /// stored.
    pub(crate) fn note_offline(&mut self, child: ChildId) {
        let c = self.child(child);
        if !c.connected || core::mem::replace(&mut c.offline, true) {
            return;
        }
        self.child(child).suspect = true;
        self.push_event(Event::ChildOffline(child));
    }

    /// It would store something, or has: its pool is not offline after all.
    pub(crate) fn note_not_offline(&mut self, child: ChildId) {
        let c = self.child(child);
        c.offline = false;
        if c.state == ChildState::Offline {
            c.state = ChildState::Joining;
            self.rejoin(child);
        }
    }

    /// The children that can be reached, and whose pool is not offline as far as is known.
    pub(crate) fn able(&self) -> ChildSet {
        let offline = (0u8..).zip(&self.children).filter(|(_, c)| c.offline);
        offline.fold(self.connected(), |set, (i, _)| set.without(ChildSet::of(ChildId(i))))
    }

    /// A child came back while the volume serves: bind its session to the epoch.
    pub(crate) fn rejoin(&mut self, child: ChildId) {
        self.round += 1;
        let (round, epoch) = (self.round, self.epoch);
        self.child(child).rejoining = Some(round);
        // A promise would take another volume from its nexus, where this is a replica of that.
        let known = self.voters.has(child) || self.child(child).looked;
        let op = if known { RegisterOp::Promise { epoch, again: true } } else { RegisterOp::Read };
        self.ask(child, round, op);
    }

    /// The register of a child that is no voter is read: it is bound to the epoch, unless it is another
    /// volume's.
    fn looked_at(&mut self, child: ChildId, held: &Register, now_ms: u64) {
        self.note_why_idle(child, held);
        if self.child(child).idle == FaultReason::Foreign {
            self.child(child).state = ChildState::Idle(FaultReason::Foreign);
            self.voter_is_bound(child, held, now_ms);
            return;
        }
        self.child(child).looked = true;
        self.rejoin(child);
    }

    pub(crate) fn handle_rejoin_reply(
        &mut self,
        child: ChildId,
        round: u32,
        reply: &ChildReply,
        now_ms: u64,
    ) {
        // What a configuration that was given up is answered with binds no session.
        let asked = self.child(child).rejoining == Some(round);
        if !self.child(child).connected || !asked && !matches!(reply, Err(IoStatus::Fenced)) {
            return;
        }
        self.child(child).rejoining = None;
        match reply {
            Ok(held) if asked && !self.voters.has(child) && !self.child(child).looked => {
                self.looked_at(child, held, now_ms);
            }
            Ok(_) if self.child(child).growing.is_some() => {
                // It is bound once it has grown.
                let c = self.child(child);
                c.growing = c.growing.map(|(round, _)| (round, true));
                self.resume_commit(child);
            }
            Ok(held) if self.grows_first(child, held.blocks) => {}
            // Also one that is on its way out, and whose new session is up before that is stored.
            Ok(held)
                if matches!(self.child(child).state, ChildState::Failing(_))
                    || !self.in_sync.has(child)
                        && self.child(child).state != ChildState::Joining =>
            {
                let c = self.child(child);
                (c.incarnation, c.suspect) = (held.incarnation, false);
                (c.bound, c.written, c.flushed) = (true, 0, 0);
                self.resume_commit(child);
            }
            Ok(held) if self.child(child).state == ChildState::Joining => {
                let lost = self.child(child).lost_writes(held.incarnation);
                let c = self.child(child);
                (c.incarnation, c.suspect) = (held.incarnation, false);
                let lost = lost && !on(Mutant::PowerLossForgotten);
                if lost && self.in_sync.has(child) && !self.is_last(child) {
                    // Once it is out it is rebuilt in this session.
                    let c = self.child(child);
                    (c.bound, c.written, c.flushed) = (true, 0, 0);
                    self.fail_child(child, FaultReason::LostPower);
                    self.unpark();
                    self.resume_commit(child);
                    return;
                }
                if lost
                    && self.in_sync.has(child)
                    && let Some(target) = self.mirror()
                {
                    // Nobody else is left. What it lost was copied to the target perhaps, and is taken back.
                    self.fail_child(target, FaultReason::Behind);
                }
                if lost && self.in_sync.has(child) {
                    self.note_loss(child);
                    self.forget_what_it_did(child);
                }
                if self.in_sync.has(child) {
                    self.push_event(Event::ChildOnline(child));
                }
                self.note_why_idle(child, held);
                self.child(child).state = self.bound_state(child);
                self.child(child).bound = true;
                for &at in &self.parked {
                    let slot = self.slots.slot(at);
                    slot.failed = slot.failed.without(ChildSet::of(child));
                }
                self.unpark();
                self.update_state();
                self.resume_commit(child);
                self.voter_is_bound(child, held, now_ms);
                self.lease.renew_at_ms = 0;
                self.renew_for_held(now_ms);
                self.store_lives();
            }
            Ok(held) => {
                // It is on its way out of the in-sync set: once it is, it is rebuilt in this session.
                let c = self.child(child);
                (c.incarnation, c.suspect) = (held.incarnation, false);
                (c.bound, c.written, c.flushed) = (true, 0, 0);
                self.resume_commit(child);
            }
            // One that is no voter may have promised an epoch that came to nothing.
            Err(IoStatus::Fenced) if !self.voters.has(child) => self.voter_refused(child),
            Err(IoStatus::Fenced) => self.fence(),
            // Nothing comes of asking again before its process is started anew, and that ends the session.
            Err(IoStatus::MediaError) if self.voters.has(child) && !self.holds_data(child) => {
                self.child(child).state = ChildState::Offline;
            }
            Err(_) => self.push_event(Event::ResetChild(child)),
        }
    }

    /// A member lost power, and nobody else is left: what it had done of requests that are not answered yet
    /// is not done, and they are done again.
    fn forget_what_it_did(&mut self, child: ChildId) {
        let lost = |s: &Slot| {
            let changes = s.request.op.is_mutation() || s.request.op == IoOp::Flush;
            s.phase == Phase::Running && changes && s.ok.has(child)
        };
        let lost: Vec<u16> =
            self.slots.iter().filter(|(_, slot)| lost(slot)).map(|(at, _)| at).collect();
        for at in lost {
            let slot = self.slots.slot(at);
            slot.ok = slot.ok.without(ChildSet::of(child));
            slot.failed = slot.failed.with(child);
            self.ready.push_back(at);
        }
    }

    /// A newer epoch was promised elsewhere: stop, and say so. Hosts hear of an error of the path, and try
    /// another: there is a nexus that serves.
    pub(crate) fn fence(&mut self) {
        if on(Mutant::GoOnWhenFenced) {
            return;
        }
        self.set_state(VolumeState::Fenced);
        self.answer_all(IoStatus::PathError);
    }

    /// A replica that refuses a request for its epoch has promised a newer one: nothing is served here
    /// any more, whatever the others say.
    pub(crate) fn check_fenced(&mut self, status: IoStatus) -> bool {
        let fenced = status == IoStatus::Fenced && self.state.is_serving();
        if fenced {
            self.fence();
        }
        fenced
    }

    pub(crate) fn answer_all(&mut self, status: IoStatus) {
        self.commit = None;
        self.growing = None;
        self.rebuild = None;
        self.joining = ChildSet::EMPTY;
        self.changing = None;
        self.abandon_atomics();
        let open: Vec<u16> = self
            .slots
            .iter()
            .filter(|(_, s)| s.phase != Phase::Answered)
            .map(|(at, _)| at)
            .collect();
        for at in open {
            self.answer(at, status);
        }
        self.lease.drop_held();
        self.abandon_mends();
        self.drop_copies();
        self.abandon_reconcile();
        self.ranges.clear();
        self.ready.clear();
        self.parked.clear();
    }

    pub(crate) fn set_state(&mut self, state: VolumeState) {
        if self.state != state {
            self.state = state.clone();
            self.push_event(Event::State(state));
        }
    }

    /// Online, degraded or suspended, by the in-sync set and what could not be stored.
    pub(crate) fn update_state(&mut self) {
        let over = matches!(
            self.state,
            VolumeState::Fenced | VolumeState::Refused(_) | VolumeState::StandBy(_)
        );
        if self.assembly.is_some() || over {
            return;
        }
        if self.learns() {
            let state = self.learning_state();
            return self.set_state(state);
        }
        let stuck = self.commit.as_ref().is_some_and(Commit::is_stuck);
        let alone = !self.in_sync.iter().any(|c| self.children[usize::from(c.0)].connected);
        let state = if stuck || alone || self.lacks_lease() {
            VolumeState::Suspended
        } else if self.in_sync == self.data_voters() {
            VolumeState::Online
        } else {
            VolumeState::Degraded
        };
        self.set_state(state);
    }
}
