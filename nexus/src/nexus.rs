//! The nexus itself: requests in, child I/O out, answers back.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{Epoch, IoOp, IoRequest, IoStatus, ReplicaId, VolumeId};

use crate::assembly::{Assembly, Watch};
use crate::atomic::Atomics;
use crate::children::{Child, ChildState, FaultReason};
use crate::commit::Commit;
use crate::copy::{COPY_KEY, Copies};
use crate::lease::Lease;
use crate::mend::Mends;
use crate::ranges::Ranges;
use crate::rebuild::{Rebuild, RebuildRecord};
use crate::reconcile::Reconcile;
use crate::reconfigure::{Growing, Wanted};
use crate::register::RegisterOp;
use crate::requests::harmless_refusal;
use crate::scrub::Scrub;
use crate::settle::Settle;
use crate::slots::{ChildSet, Phase, Slot, Slots};
use crate::types::{
    ChildId, ChildIo, ChildOp, ChildReply, ChildStatus, Done, Event, MAX_CHILDREN, NexusConfig,
    Status, Ticket, TicketKind, VolumeState,
};
use crate::upkeep::Upkeep;
use crate::voters::Changing;

/// One volume's nexus.
#[derive(Debug)]
pub struct Nexus {
    pub(crate) config: NexusConfig,
    pub(crate) state: VolumeState,
    pub(crate) children: Vec<Child>,
    /// Of the configuration committed last.
    pub(crate) in_sync: ChildSet,
    /// Who was read from last, and how many times in a row.
    pub(crate) reader: (ChildId, u32),
    pub(crate) epoch: Epoch,
    pub(crate) seq: u64,
    /// Of the configuration that is known to be stored.
    pub(crate) stored_seq: u64,
    pub(crate) lineage: u64,
    /// Of the configuration that was stored last, or is being stored.
    pub(crate) generation: u64,
    /// What the configuration says of encryption; empty where the volume has none.
    pub(crate) encryption: Vec<u8>,
    /// The one whose key is at hand.
    pub(crate) admitted: Vec<u8>,
    /// The one whose key is looked for.
    pub(crate) locked: Vec<u8>,
    /// Those that vote, by the configuration committed last: all that it names.
    pub(crate) voters: ChildSet,
    /// What every commit from now on says besides the in-sync set.
    pub(crate) wanted: Wanted,
    /// A change of the voters that is under way.
    pub(crate) changing: Option<Changing>,
    pub(crate) growing: Option<Growing>,
    /// By the configuration committed last: see [`Config::restoring`](crate::Config::restoring).
    pub(crate) restoring: Option<cairn_block::SnapshotId>,
    /// By the configuration committed last: see [`Config::deleted`](crate::Config::deleted).
    pub(crate) deleted: Vec<cairn_block::SnapshotId>,
    /// By the configuration committed last: see [`Config::reservations`](crate::Config::reservations).
    pub(crate) reservations: Vec<u8>,
    /// By the configuration committed last: see [`Config::sanitize`](crate::Config::sanitize).
    pub(crate) sanitize: Vec<u8>,
    /// By the configuration committed last: see [`Config::undo`](crate::Config::undo).
    pub(crate) undo: bool,
    pub(crate) atomics: Atomics,
    pub(crate) round: u32,
    pub(crate) commit: Option<Commit>,
    pub(crate) assembly: Option<Assembly>,
    pub(crate) slots: Slots,
    /// Slots of answered requests whose buffer a child that was given up still has.
    pub(crate) lingering: usize,
    pub(crate) ranges: Ranges,
    pub(crate) mends: Mends,
    pub(crate) scrub: Option<Scrub>,
    pub(crate) upkeep: Upkeep,
    pub(crate) settle: Settle,
    pub(crate) reconcile: Option<Reconcile>,
    pub(crate) rebuild: Option<Rebuild>,
    pub(crate) rebuilt: Vec<RebuildRecord>,
    pub(crate) copies: Copies,
    /// The target of a rebuild that is being taken back: no change is acked without it.
    pub(crate) joining: ChildSet,
    /// Those that a configuration names as in sync which was given up for a later one, and may be stored all the
    /// same for as long as that is not.
    pub(crate) proposed: ChildSet,
    /// Counts changes.
    pub(crate) order: u64,
    losses: u64,
    /// The time when something happened last.
    pub(crate) now_ms: u64,
    pub(crate) lease: Lease,
    /// Members that are late are given up once another has answered something.
    pub(crate) probes: bool,
    /// When they were asked to last.
    pub(crate) probed_ms: u64,
    pub(crate) watch: Watch,
    /// Slots to look at again before control goes back to the caller.
    pub(crate) ready: VecDeque<u16>,
    /// Requests that wait for a child which is joining, or for any to come back.
    pub(crate) parked: Vec<u16>,
    pub(crate) child_ios: VecDeque<ChildIo>,
    pub(crate) done: VecDeque<Done>,
    pub(crate) released: VecDeque<u64>,
    pub(crate) events: VecDeque<Event>,
}

impl Nexus {
    /// A nexus whose children are not connected yet.
    ///
    /// # Panics
    /// Where there is no child, or more than [`MAX_CHILDREN`].
    #[must_use]
    pub fn new(config: NexusConfig) -> Self {
        let n = config.children.len();
        assert!(n > 0 && n <= MAX_CHILDREN, "a volume has 1 to {MAX_CHILDREN} replicas, not {n}");
        let deadline_ms = config.child_deadline_ms;
        let children = config.children.iter().map(|&spec| Child::new(spec, deadline_ms)).collect();
        let encryption = config.encryption.clone().unwrap_or_default();
        let queue = usize::from(config.max_requests);
        // What a hung child has in hand when it is given up keeps its slots for as long as it hangs.
        let slots = u16::try_from(queue * (n + 1)).unwrap_or(u16::MAX).min(COPY_KEY);
        let mut nexus = Self {
            state: VolumeState::Assembling("waiting for its replicas".to_owned()),
            children,
            in_sync: ChildSet::EMPTY,
            reader: (ChildId(0), 0),
            epoch: Epoch(0),
            seq: 0,
            stored_seq: 0,
            lineage: 1,
            generation: 0,
            admitted: encryption.clone(),
            locked: Vec::new(),
            voters: ChildSet::EMPTY,
            wanted: Wanted {
                blocks: config.blocks,
                encryption: encryption.clone(),
                voters: ChildSet::EMPTY,
                restoring: None,
                deleted: Vec::new(),
                reservations: Vec::new(),
                sanitize: Vec::new(),
                undo: false,
            },
            changing: None,
            encryption,
            restoring: None,
            deleted: Vec::new(),
            reservations: Vec::new(),
            sanitize: Vec::new(),
            undo: false,
            atomics: Atomics::default(),
            growing: None,
            round: 0,
            commit: None,
            assembly: Some(Assembly::new(n)),
            slots: Slots::new(slots),
            lingering: 0,
            ranges: Ranges::new(queue),
            mends: Mends::default(),
            scrub: None,
            upkeep: Upkeep::default(),
            settle: Settle::default(),
            reconcile: None,
            rebuild: None,
            rebuilt: Vec::new(),
            copies: Copies::default(),
            joining: ChildSet::EMPTY,
            proposed: ChildSet::EMPTY,
            order: 0,
            losses: 0,
            now_ms: 0,
            lease: Lease::new(queue),
            probes: false,
            probed_ms: 0,
            watch: Watch::default(),
            ready: VecDeque::with_capacity(queue),
            parked: Vec::with_capacity(queue),
            child_ios: VecDeque::with_capacity(queue * n),
            done: VecDeque::with_capacity(queue),
            released: VecDeque::with_capacity(queue),
            events: VecDeque::with_capacity(16),
            config,
        };
        nexus.begin_watch();
        nexus
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        self.config.volume
    }

    /// Its size in blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.config.blocks
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> &VolumeState {
        &self.state
    }

    /// All that a person wants to know.
    #[must_use]
    pub fn status(&self) -> Status {
        let children = (0u8..).zip(&self.children).map(|(i, c)| ChildStatus {
            replica: c.replica,
            witness: c.witness,
            state: c.shown(),
            in_sync: self.in_sync.has(ChildId(i)),
            offline: c.offline,
            load: c.load,
            failures: c.trouble.times(),
        });
        Status {
            state: self.state.clone(),
            epoch: self.epoch,
            seq: self.seq,
            children: children.collect(),
            requests: self.slots.in_use(),
        }
    }

    /// The number of the configuration that it goes by, within its epoch; 0 before the first is stored.
    #[must_use]
    pub fn stored_seq(&self) -> u64 {
        self.stored_seq
    }

    /// The voters of the configuration that it goes by.
    pub fn stored_voters(&self) -> impl Iterator<Item = ReplicaId> {
        self.voters.iter().map(|c| self.children[usize::from(c.0)].replica)
    }

    /// Whether [`Nexus::submit`] takes one more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.unanswered() < usize::from(self.config.max_requests)
            && self.slots.in_use() < self.slots.capacity()
    }

    /// Host requests that are not answered yet.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.slots.in_use() - self.lingering
    }

    /// How often what was acked and not flushed may have been lost. Whoever wrote before is to be told by the next
    /// flush; those that were in hand at the time have been answered so.
    #[must_use]
    pub fn losses(&self) -> u64 {
        self.losses
    }

    pub(crate) fn note_loss(&mut self, child: ChildId) {
        if on(Mutant::LossNotTold) {
            return;
        }
        self.losses += 1;
        self.push_event(Event::WritesLost(child));
        let flush = |s: &Slot| s.request.op == IoOp::Flush && s.phase == Phase::Running;
        let flushes: Vec<u16> =
            self.slots.iter().filter(|(_, slot)| flush(slot)).map(|(at, _)| at).collect();
        for at in flushes {
            self.answer(at, IoStatus::MediaError);
        }
    }

    /// Requests and mends that still use a buffer or await an answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let own = self.mends.in_use() + self.upkeep.in_use() + self.copies.len();
        self.slots.in_use() + self.atomics.in_use() + own
    }

    /// Takes a host request. Its buffer belongs to the nexus until [`Nexus::poll_release`] names it.
    ///
    /// # Panics
    /// Where [`Nexus::has_room`] is false.
    pub fn submit(&mut self, tag: u64, request: IoRequest, now_ms: u64) {
        self.submit_as(tag, request, false, now_ms);
    }

    pub(crate) fn submit_as(&mut self, tag: u64, request: IoRequest, atomic: bool, now_ms: u64) {
        let elsewhere = matches!(self.state, VolumeState::Fenced | VolumeState::StandBy(_));
        let refused = if elsewhere {
            Some(IoStatus::PathError)
        } else if !self.state.is_serving() {
            Some(IoStatus::NotReady)
        } else if request.range.end().0 > self.config.blocks {
            Some(IoStatus::OutOfRange)
        } else {
            None
        };
        if let Some(status) = refused {
            self.done.push_back(Done { tag, status });
            self.released.push_back(tag);
            return;
        }
        if request.op == IoOp::Read && now_ms >= self.lease.renew_at_ms {
            self.renew_if_due(now_ms);
        }
        let slot = Slot {
            tag,
            request,
            phase: Phase::Waiting,
            outstanding: ChildSet::EMPTY,
            ok: ChildSet::EMPTY,
            failed: ChildSet::EMPTY,
            bad: ChildSet::EMPTY,
            full: ChildSet::EMPTY,
            mending: false,
            fault: IoStatus::PathError,
            refused: false,
            declined: false,
            unsure: false,
            alone: false,
            atomic,
            started_ms: now_ms,
            order: u64::MAX,
        };
        let at = self.slots.insert(slot).expect("the caller asked `has_room`");
        if !self.waits_for_reconcile(at, request.range) {
            self.admit(at, now_ms);
        }
        self.settle(now_ms);
    }

    /// Lets a request take its turn.
    pub(crate) fn admit(&mut self, at: u16, now_ms: u64) {
        if self.slots.slot(at).atomic && !self.atomics.has(at) {
            // It gets what it needs before it has its range.
            return self.queue_atomic(at);
        }
        let request = self.slots.slot(at).request;
        let through =
            on(Mutant::SnapshotLetsWriteThrough) && matches!(request.op, IoOp::Snapshot(_));
        if through || self.ranges.enter(request.range, at, request.op.is_mutation()) {
            self.start(at, now_ms);
        }
    }

    /// A session with the child is up; nothing was sent on it yet.
    pub fn handle_child_up(&mut self, child: ChildId, now_ms: u64) {
        let c = self.child(child);
        c.connected = true;
        c.offline = false;
        c.session += 1;
        if !matches!(
            c.state,
            ChildState::Failing(_) | ChildState::OutOfSync(_) | ChildState::Removed
        ) {
            c.state = ChildState::Joining;
        }
        if self.assembly.is_some() {
            self.assembly_child_up(child);
        } else {
            self.rejoin(child);
        }
        self.settle(now_ms);
    }

    /// The session with the child is gone. Each of its operations is answered on its own, with
    /// [`IoStatus::PathError`], before or after this.
    pub fn handle_child_down(&mut self, child: ChildId, now_ms: u64) {
        let c = self.child(child);
        if !c.connected {
            return;
        }
        c.connected = false;
        (c.bound, c.looked, c.rejoining) = (false, false, None);
        c.offline = false;
        if self.mirror() == Some(child) {
            self.fail_child(child, FaultReason::Unreachable);
        }
        let c = self.child(child);
        if !matches!(
            c.state,
            ChildState::Failing(_) | ChildState::OutOfSync(_) | ChildState::Removed
        ) {
            c.state = ChildState::Disconnected;
        }
        if self.assembly.is_some() {
            self.assembly_child_down(child, now_ms);
        }
        (self.child(child).growing, self.child(child).grown_to) = (None, 0);
        self.grow_over(child, Err(IoStatus::PathError));
        self.commit_refused(child);
        if self.assembly.is_some() {
            self.assembly_check_commit(now_ms);
        }
        self.update_state();
        self.unpark();
        self.settle(now_ms);
    }

    /// A block request of a child is answered.
    pub fn handle_io(&mut self, child: ChildId, ticket: Ticket, status: IoStatus, now_ms: u64) {
        let at = match ticket.kind() {
            TicketKind::Slot(at) => at,
            TicketKind::Mend => {
                self.handle_mend_io(child, ticket, status);
                self.check_fenced(status);
                return;
            }
            TicketKind::Copy(at) => {
                self.handle_copy_io(child, at, status);
                self.check_fenced(status);
                return;
            }
            TicketKind::Upkeep(serial) => return self.handle_upkeep(child, serial, status),
            TicketKind::Register(_) => unreachable!("a block request's ticket"),
        };
        let slot = self.slots.slot(at);
        let (op, took_ms) = (slot.request.op, now_ms.saturating_sub(slot.started_ms));
        let c = self.child(child);
        if status != IoStatus::PathError {
            c.heard_ms = now_ms;
        }
        c.load -= 1;
        Self::note_latency(c, op, took_ms);
        c.suspect |= status == IoStatus::MediaError && (op.is_mutation() || op == IoOp::Flush);
        if status.is_ok() {
            c.note_done(at, op);
        } else if op == IoOp::Flush {
            c.flushing.retain(|&(slot, _)| slot != at);
        } else if op.is_mutation() && !matches!(op, IoOp::Snapshot(_)) {
            c.note_tried();
        }
        let mirrors = self.mirrors().without(self.in_sync).has(child);
        let slot = self.slots.slot(at);
        assert!(slot.outstanding.has(child), "an answer that nobody waits for");
        slot.outstanding = slot.outstanding.without(ChildSet::of(child));
        if mirrors && !status.is_ok() && status != IoStatus::Fenced {
            let range = slot.request.range;
            let lost = status == IoStatus::MediaError && !range.is_empty();
            if !(lost && self.is_copied_later(child, range)) {
                let slot = self.slots.slot(at);
                slot.failed = slot.failed.with(child);
                self.mirror_failed(child, status);
            }
        }
        let over = self.slots.slot(at).phase == Phase::Answered;
        let fenced = self.check_fenced(status);
        if over {
            self.leave_if_over(at);
            self.release_if_free(at);
        }
        if over || fenced {
            self.settle(now_ms);
            return;
        }
        let slot = self.slots.slot(at);
        if !slot.failed.has(child) {
            if status.is_ok() {
                slot.ok = slot.ok.with(child);
            } else if harmless_refusal(op, status) {
                // It has done nothing, and is as good a member as before.
                slot.ok = slot.ok.with(child);
                (slot.fault, slot.declined) = (status, true);
            } else {
                slot.failed = slot.failed.with(child);
                if !slot.declined {
                    slot.fault = status;
                }
                match status {
                    IoStatus::MediaError => slot.bad = slot.bad.with(child),
                    IoStatus::NoSpace if op.is_mutation() => slot.full = slot.full.with(child),
                    _ => {}
                }
                slot.refused |= status != IoStatus::PathError;
                let unsure = [IoStatus::PathError, IoStatus::TimedOut, IoStatus::MediaError];
                slot.unsure |= op.is_mutation() && unsure.contains(&status);
            }
        }
        // The plain case, first: everybody in sync has done it.
        self.look(at, now_ms);
        self.settle(now_ms);
    }

    /// A register operation of a child is answered.
    pub fn handle_register(
        &mut self,
        child: ChildId,
        ticket: Ticket,
        reply: ChildReply,
        now_ms: u64,
    ) {
        let TicketKind::Register(round) = ticket.kind() else {
            unreachable!("a register operation's ticket")
        };
        self.now_ms = now_ms;
        self.child(child).asked -= 1;
        if !matches!(reply, Err(IoStatus::PathError)) {
            self.child(child).heard_ms = now_ms;
        }
        if matches!(reply, Err(IoStatus::MediaError)) {
            self.note_offline(child);
        }
        if self.child(child).growing.is_some_and(|(asked, _)| asked == round) {
            self.handle_grow_reply(child, &reply, now_ms);
        } else if self.lease.is_asked(child, round) {
            self.handle_renew_reply(child, &reply, now_ms);
        } else if self.commit.as_ref().is_some_and(|c| c.round == round) {
            self.handle_accept_reply(child, &reply);
        } else if self.assembly.is_some() {
            self.handle_assembly_reply(child, round, reply, now_ms);
        } else {
            self.handle_rejoin_reply(child, round, &reply, now_ms);
        }
        if self.assembly.is_some() {
            self.assembly_check_commit(now_ms);
        }
        self.settle(now_ms);
        if core::mem::take(&mut self.probes) {
            // And nothing else: a voter that refuses at once, as a replica of this process does whose pool is offline,
            // would be asked again for ever.
            self.give_up_late(now_ms);
            self.settle(now_ms);
        }
    }

    /// Gives up who has not answered for too long, where somebody else is there.
    fn give_up_late(&mut self, now_ms: u64) {
        let late = self.late_children(now_ms).or(self.late_in_mends(now_ms));
        let late = late.or(self.late_in_joining(now_ms)).or(self.late_in_upkeep(now_ms));
        let late = late.or(self.late_in_copies(now_ms));
        self.give_up_mirror(late.or(self.late_at_mirror(now_ms)));
        // Where everybody who is there is late nobody is given up: there would be nobody to serve instead. One
        // that is away may come back without what it had not flushed.
        let left = self.in_sync.without(self.failing()).without(late);
        if late.is_empty() || self.one_is_there(left, now_ms) {
            self.give_up(late, now_ms);
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now_ms: u64) {
        self.give_up_late(now_ms);
        self.ask_again();
        self.growth_timeout(now_ms);
        self.voters_timeout(now_ms);
        self.renew_for_held(now_ms);
        self.keep_lease(now_ms);
        self.unpark();
        if self.assembly.is_some() {
            self.assembly_timeout(now_ms);
        }
        self.settle(now_ms);
    }

    /// When [`Nexus::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self, now_ms: u64) -> Option<u64> {
        let tick = (self.least_deadline_ms() / 8).max(10);
        let busy = self.in_flight() > 0 || self.has_to_ask_again() || self.growing.is_some();
        let busy = busy || self.changing.is_some() || self.lease.is_waited_for();
        let scrub = self.scrub_timeout(now_ms);
        let assembly = self.assembly.as_ref().and_then(Assembly::poll_timeout);
        let upkeep = [self.settle_timeout(now_ms), self.rebuild_timeout(now_ms)];
        let learning = self.learns().then_some(now_ms + tick);
        let lease = self.lease_timeout(now_ms);
        let all = [assembly, scrub, learning, lease, busy.then_some(now_ms + tick)];
        all.into_iter().chain(upkeep).flatten().min()
    }

    /// Stops for good: what is in flight is answered, and buffers are released as the children
    /// let go of them.
    pub fn close(&mut self) {
        self.release_lease();
        self.set_state(VolumeState::Refused("it is being removed".to_owned()));
        self.answer_all(IoStatus::NotReady);
    }

    /// Serves no more, and another nexus may at once: what is in flight is answered as an error of the path,
    /// which has hosts try another one.
    pub fn hand_over(&mut self) {
        self.set_state(VolumeState::StandBy("handing the volume over".to_owned()));
        self.answer_all(IoStatus::PathError);
    }

    /// Whether others stand by for the volume.
    pub fn set_shared(&mut self, shared: bool) {
        self.config.shared = shared;
    }

    /// The next operation for a child.
    pub fn poll_child(&mut self) -> Option<ChildIo> {
        self.child_ios.pop_front()
    }

    /// The next answer for the host.
    pub fn poll_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// The next request whose buffer nobody uses any more; never before its answer.
    pub fn poll_release(&mut self) -> Option<u64> {
        self.released.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    // ---- requests

    pub(crate) fn child(&mut self, child: ChildId) -> &mut Child {
        &mut self.children[usize::from(child.0)]
    }

    pub(crate) fn push_event(&mut self, event: Event) {
        self.events.push_back(event);
    }

    pub(crate) fn ask(&mut self, child: ChildId, round: u32, op: RegisterOp) {
        let ticket = Ticket::register(round);
        self.child(child).asked += 1;
        self.child_ios.push_back(ChildIo { child, ticket, op: ChildOp::Register(op) });
    }

    /// Children with a request that has missed its deadline.
    fn late_children(&self, now_ms: u64) -> ChildSet {
        let slots = self.slots.iter();
        slots.fold(ChildSet::EMPTY, |set, (_, slot)| set.or(self.missed_by(slot, now_ms)))
    }

    /// Members that came back and do not answer what they are asked before they take part, while requests
    /// wait for them: a hung disk, say.
    fn late_in_joining(&mut self, now_ms: u64) -> ChildSet {
        let limit = self.config.child_deadline_ms;
        let mut late = ChildSet::EMPTY;
        for (at, child) in (0u8..).zip(&mut self.children) {
            if child.state != ChildState::Joining {
                child.joining_ms = None;
                continue;
            }
            let since = *child.joining_ms.get_or_insert(now_ms);
            if now_ms.saturating_sub(since) > limit && !self.parked.is_empty() {
                late = late.with(ChildId(at));
            }
        }
        late.and(self.in_sync)
    }

    /// The target of a rebuild, where it has not done something that hosts do not wait for.
    fn late_at_mirror(&self, now_ms: u64) -> ChildSet {
        let limit = self.config.child_deadline_ms;
        let mirrors = self.mirrors().without(self.in_sync);
        let late = |s: &crate::slots::Slot| {
            let apart = matches!(s.phase, Phase::Answered | Phase::Keeping);
            apart && now_ms.saturating_sub(s.started_ms) >= limit
        };
        let late = self.slots.iter().filter(|(_, s)| late(s));
        late.fold(ChildSet::EMPTY, |set, (_, s)| set.or(s.outstanding.and(mirrors)))
    }

    /// Ends the rebuild of a target that is late, and its session.
    fn give_up_mirror(&mut self, late: ChildSet) {
        for child in late.and(self.mirrors().without(self.in_sync)).iter() {
            self.fail_child(child, FaultReason::DeadlineMissed);
            self.events.push_back(Event::ResetChild(child));
        }
    }

    fn give_up(&mut self, late: ChildSet, now_ms: u64) {
        for child in late.iter() {
            self.fail_child(child, FaultReason::DeadlineMissed);
            self.events.push_back(Event::ResetChild(child));
        }
        for at in 0..self.slots.capacity() {
            let at = u16::try_from(at).expect("as many slots as a u16 counts");
            let Some(slot) = self.slots.get(at).copied() else { continue };
            let missed = self.missed_by(&slot, now_ms);
            if !missed.is_empty() {
                let slot = self.slots.slot(at);
                slot.failed = ChildSet(slot.failed.0 | missed.0);
                slot.fault = IoStatus::TimedOut;
                let reads = matches!(slot.request.op, IoOp::Read | IoOp::Verify);
                if reads && missed.iter().any(|c| self.children[usize::from(c.0)].local) {
                    // No session can be reset to get the buffer back from a local disk that hangs, so
                    // the read cannot go to another member itself: the host asks again, and that
                    // one does.
                    self.answer(at, IoStatus::NotReady);
                }
                self.look(at, now_ms);
            }
        }
        self.give_up_mends(now_ms);
    }
}
