//! Who votes: the replicas that the configuration names, which are some of those that the nexus knows.
//!
//! A change of the voters adds or removes one, and is stored by a majority of those before it and of
//! those after it. Why the highest configuration that an assembly hears from a majority of *its own*
//! voters is the newest one that was committed, or comes after it:
//!
//! Let K be a committed configuration, and N the next one that is committed. A nexus commits the voters
//! that it found, in its own epoch, before it changes any; it changes them once at a time, and gives a
//! change up only by committing the voters as they were. So whatever was ever proposed after K and before
//! N has K's voters, or those of one change of K's, V', which are one more or one less; and a majority
//! of the one and a majority of the other have a voter in common. N was stored by a majority of K's
//! voters or of V' (of both where it changes them). An assembly that decides by a configuration D
//! between K and N has promises of a majority of D's voters, hence of one that has stored N, or will. If
//! it had stored N when it promised, N would have been heard and D not be the highest. If it stored
//! N after, then N's epoch is newer, and a majority of voters that intersects every majority of D's has
//! promised it: nothing can be committed in the assembly's epoch any more, and it never serves.
//!
//! One that is added stores the configuration before anybody else is asked to. So a voter that has stored
//! nothing has lost what it had, whatever the configuration is that names it, and is not counted.

use cairn_block::ReplicaId;

use crate::children::{Child, ChildState, FaultReason};
use crate::config::{Config, Member};
use crate::nexus::Nexus;
use crate::reconfigure::ChangeError;
use crate::register::Register;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildSpec, Event, MAX_CHILDREN};

/// A change of the voters takes at most so many deadlines of a child; then they stay as they were.
const PATIENCE: u64 = 2;

/// A change of the voters that was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Changing {
    child: ChildId,
    since_ms: u64,
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The replica is to come, to be bound to the epoch, and to be large enough.
    Joining,
    /// It is, and is a voter by the next configuration.
    Ready,
    /// It is to be no voter by the next configuration.
    Leaving,
    /// That configuration is being stored.
    Storing,
    /// It was not stored in time: the voters as they were are.
    GivingUp,
}

impl Nexus {
    fn set_of(&self, wanted: impl Fn(&Child) -> bool) -> ChildSet {
        let all = (0u8..).zip(&self.children).filter(|(_, c)| wanted(c));
        all.fold(ChildSet::EMPTY, |set, (i, _)| set.with(ChildId(i)))
    }

    /// The child that is this replica.
    pub(crate) fn child_of(&self, replica: ReplicaId) -> Option<ChildId> {
        let found = (0u8..).zip(&self.children);
        let mut found = found.filter(|(_, c)| c.state != ChildState::Removed);
        found.find(|(_, c)| c.replica == replica).map(|(i, _)| ChildId(i))
    }

    /// The voters that hold the volume's data, or are to.
    pub(crate) fn data_voters(&self) -> ChildSet {
        self.voters.without(self.set_of(|c| c.witness))
    }

    /// Whether the child holds the volume's data, or is to: as a voter, or one that is being added.
    pub(crate) fn holds_data(&self, child: ChildId) -> bool {
        let added = self.changing.is_some_and(|c| c.child == child && c.step == Step::Joining);
        let votes = self.voters.or(self.wanted.voters).has(child) || added;
        votes && !self.children[usize::from(child.0)].witness
    }

    /// Where a child stands whose session is bound to the epoch.
    pub(crate) fn bound_state(&self, child: ChildId) -> ChildState {
        let c = &self.children[usize::from(child.0)];
        if self.in_sync.has(child) {
            ChildState::Online
        } else if !self.voters.has(child) {
            ChildState::Idle(c.idle)
        } else if c.witness {
            ChildState::Witness
        } else {
            ChildState::OutOfSync(FaultReason::Stale)
        }
    }

    /// Why a child does not vote, by what it holds.
    pub(crate) fn note_why_idle(&mut self, child: ChildId, held: &Register) {
        if self.voters.has(child) || held.config.is_empty() {
            return;
        }
        let (volume, lineage) = (self.config.volume, self.lineage);
        self.child(child).idle = match Config::decode(&held.config) {
            Ok(config) if config.volume == volume && config.lineage == lineage => {
                FaultReason::NotMember
            }
            Ok(config) if config.volume == volume => FaultReason::OldLineage,
            _ => FaultReason::Foreign,
        };
    }

    // ---- children that come and go

    /// One more replica, which neither votes nor takes I/O before it is added as a voter; nothing where
    /// there are [`MAX_CHILDREN`]. Its session is to be set up like any other's.
    pub fn add_child(&mut self, spec: ChildSpec) -> Option<ChildId> {
        let free = |c: &Child| c.vacant && !c.connected && c.load == 0 && c.asked == 0;
        let vacant = self.children.iter().position(free);
        let at = vacant.unwrap_or(self.children.len());
        let child = ChildId(u8::try_from(at).ok().filter(|_| at < MAX_CHILDREN)?);
        if vacant.is_some() {
            // An answer that is late is of an earlier session.
            let session = self.children[at].session;
            let deadline_ms = self.config.child_deadline_ms;
            self.children[at] = Child { session, ..Child::new(spec, deadline_ms) };
            self.lease.forget(child);
            self.watch_found(child);
        } else {
            self.children.push(Child::new(spec, self.config.child_deadline_ms));
        }
        if let Some(assembly) = self.assembly.as_mut() {
            assembly.add_child(child);
        }
        Some(child)
    }

    /// The session with a child that is to go has ended for good: its place may be another's. Returns
    /// false for a voter, which has to be removed as such first.
    pub fn forget_child(&mut self, child: ChildId) -> bool {
        if self.voters.or(self.wanted.voters).has(child) {
            return false;
        }
        let c = self.child(child);
        (c.state, c.vacant) = (ChildState::Removed, true);
        true
    }

    // ---- changes of the voters

    /// Makes a child a voter, once it is there. One that holds data begins out of sync, with nothing copied.
    /// [`Event::VoterAdded`] tells that it is done, [`Event::VotersUnchanged`] that it was given up.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn add_voter(&mut self, child: ChildId, now_ms: u64) -> Result<(), ChangeError> {
        self.check_change()?;
        let replica = self.child(child).replica;
        if self.voters.has(child) {
            return Err(ChangeError::Member(replica));
        }
        if self.child(child).state == ChildState::Removed {
            return Err(ChangeError::NotMember(replica));
        }
        self.changing = Some(Changing { child, since_ms: now_ms, step: Step::Joining });
        if self.child(child).connected {
            // Also where it is bound already: it may be too small.
            self.child(child).state = ChildState::Joining;
            self.rejoin(child);
        }
        self.settle(now_ms);
        Ok(())
    }

    /// Makes a voter none. [`Event::VoterRemoved`] tells that it is done, [`Event::VotersUnchanged`] that
    /// it was given up.
    ///
    /// # Errors
    /// [`ChangeError`] where it cannot be now; then nothing was begun.
    pub fn remove_voter(&mut self, child: ChildId, now_ms: u64) -> Result<(), ChangeError> {
        self.check_change()?;
        let replica = self.child(child).replica;
        if !self.voters.has(child) {
            return Err(ChangeError::NotMember(replica));
        }
        let leaving = ChildSet::of(child);
        if self.staying().without(leaving).is_empty() {
            return Err(ChangeError::LastInSync(replica));
        }
        if !self.voters.without(leaving).has_majority_in(self.able()) {
            return Err(ChangeError::NoMajority(replica));
        }
        self.changing = Some(Changing { child, since_ms: now_ms, step: Step::Leaving });
        self.advance_voters();
        self.settle(now_ms);
        Ok(())
    }

    /// A child has promised the epoch, and is as large as it has to be.
    pub(crate) fn voter_is_bound(&mut self, child: ChildId, held: &Register, now_ms: u64) {
        let waits = |c: &Changing| c.child == child && c.step == Step::Joining;
        if !self.changing.as_ref().is_some_and(waits) {
            return;
        }
        let volume = self.config.volume;
        let other = Config::decode(&held.config).ok().map(|c| c.volume).filter(|v| *v != volume);
        let text = match other {
            Some(v) => format!("it belongs to volume {v}; make an empty replica and add that"),
            None if !held.config.is_empty() && Config::decode(&held.config).is_err() => {
                "its register cannot be read; make an empty replica and add that".to_owned()
            }
            None => {
                let step = Step::Ready;
                self.changing = Some(Changing { child, since_ms: now_ms, step });
                return self.advance_voters();
            }
        };
        self.voters_unchanged(&text);
    }

    /// A child that is no voter has promised an epoch newer than this one.
    pub(crate) fn voter_refused(&mut self, child: ChildId) {
        self.child(child).state = ChildState::Idle(self.child(child).idle);
        if self.changing.is_some_and(|c| c.child == child && c.step == Step::Joining) {
            self.voters_unchanged(
                "it has promised a newer epoch to somebody; have the volume come up anew while it is \
                 there, or make an empty replica, and add that",
            );
        }
    }

    /// Stores the voters that are wanted, where nothing else is being stored.
    pub(crate) fn advance_voters(&mut self) {
        let Some(change) = self.changing.filter(|_| self.commit.is_none()) else { return };
        let child = change.child;
        match change.step {
            Step::Ready => {
                self.wanted.voters = self.voters.with(child);
                let c = self.child(child);
                let (replica, witness) = (c.replica, c.witness);
                c.member = Member { replica, witness, ..Member::default() };
            }
            Step::Leaving => self.wanted.voters = self.voters.without(ChildSet::of(child)),
            Step::Joining | Step::Storing | Step::GivingUp => return,
        }
        self.changing = Some(Changing { step: Step::Storing, ..change });
        self.commit_wanted();
    }

    /// Gives a change of the voters up that takes too long.
    pub(crate) fn voters_timeout(&mut self, now_ms: u64) {
        let limit = self.config.child_deadline_ms * PATIENCE;
        let Some(change) = self.changing.filter(|c| now_ms >= c.since_ms + limit) else { return };
        match change.step {
            Step::Joining => self.voters_unchanged("it does not answer"),
            Step::Ready | Step::Leaving => {
                self.voters_unchanged("another change of the volume was not stored in time");
            }
            Step::Storing => {
                // Some may have stored it: the voters are as they were only once that is stored over it.
                self.changing = Some(Changing { step: Step::GivingUp, ..change });
                self.wanted.voters = self.voters;
                self.commit_wanted();
            }
            Step::GivingUp => {}
        }
    }

    fn voters_unchanged(&mut self, why: &str) {
        if let Some(change) = self.changing.take() {
            self.push_event(Event::VotersUnchanged(change.child, why.to_owned()));
        }
    }

    /// A configuration with these voters is stored.
    pub(crate) fn take_up_voters(&mut self, voters: ChildSet) {
        let (added, removed) = (voters.without(self.voters), self.voters.without(voters));
        self.voters = voters;
        // The majority is another one; whoever is new to it has granted nothing.
        self.count_lease(u64::MAX);
        self.lease.renew_at_ms = 0;
        if self.assembly.is_some() {
            return;
        }
        for child in added.iter() {
            if self.child(child).connected && self.child(child).state != ChildState::Joining {
                self.child(child).state = self.bound_state(child);
            }
            self.push_event(Event::VoterAdded(child));
        }
        for child in removed.iter() {
            if self.mirror() == Some(child) {
                self.abort_rebuild(FaultReason::NotMember);
            }
            self.child(child).state = ChildState::Removed;
            self.push_event(Event::VoterRemoved(child));
        }
        match self.changing.map(|c| c.step) {
            Some(Step::Storing) if !added.or(removed).is_empty() => self.changing = None,
            Some(Step::GivingUp) if added.or(removed).is_empty() => {
                self.voters_unchanged("too few voters have stored that");
            }
            _ => {}
        }
    }
}
