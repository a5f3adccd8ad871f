//! Storing a configuration on a majority of the voters.

use cairn_block::IoStatus;
use cairn_block::mutants::{Mutant, on};

use crate::children::ChildState;
use crate::config::{Config, Member};
use crate::nexus::Nexus;
use crate::reconfigure::Wanted;
use crate::register::{Register, RegisterOp};
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildReply, Event};

/// A configuration on its way to the voters.
#[derive(Debug)]
pub(crate) struct Commit {
    pub(crate) round: u32,
    pub(crate) target: ChildSet,
    stored: Wanted,
    members: Vec<Member>,
    register: Register,
    asked: ChildSet,
    acks: ChildSet,
    refused: ChildSet,
    /// Those that vote, and those that vote once it is stored: a majority of each is needed.
    quorums: [ChildSet; 2],
}

impl Commit {
    /// Enough have stored it; one that becomes a voter by it among them, so that every voter has stored
    /// a configuration.
    fn is_stored(&self) -> bool {
        self.to_be_first().is_empty()
            && self.quorums.iter().all(|voters| voters.has_majority_in(self.acks))
    }

    /// The one that becomes a voter by it, until it has stored it. Nobody else is asked before that: whoever
    /// finds a configuration that names it would not count on its word, had it stored nothing.
    fn to_be_first(&self) -> ChildSet {
        self.quorums[1].without(self.quorums[0]).without(self.acks)
    }

    /// Everybody who was asked has answered, and too few have stored it.
    pub(crate) fn is_stuck(&self) -> bool {
        !self.is_stored() && self.asked.without(self.acks).without(self.refused).is_empty()
    }
}

impl Nexus {
    /// Stores the in-sync set without the children that are failing.
    pub(crate) fn start_commit(&mut self) {
        self.commit_wanted();
    }

    /// The members in sync that are neither failing nor being removed.
    pub(crate) fn staying(&self) -> ChildSet {
        self.in_sync.and(self.wanted.voters).without(self.failing())
    }

    pub(crate) fn failing(&self) -> ChildSet {
        (0u8..).zip(&self.children).fold(ChildSet::EMPTY, |set, (i, c)| match c.state {
            ChildState::Failing(_) => set.with(ChildId(i)),
            _ => set,
        })
    }

    /// Stores `target` as the in-sync set; a commit on its way is superseded.
    pub(crate) fn commit_target(&mut self, target: ChildSet) {
        self.seq += 1;
        self.round += 1;
        self.generation += 1;
        let members = self.members_with(target);
        let config = Config {
            volume: self.config.volume,
            blocks: self.wanted.blocks,
            lineage: self.lineage,
            generation: self.generation,
            encryption: self.wanted.encryption.clone(),
            holder: self.config.holder,
            restoring: self.wanted.restoring,
            deleted: self.wanted.deleted.clone(),
            block_size: self.config.block_size,
            reservations: self.wanted.reservations.clone(),
            sanitize: self.wanted.sanitize.clone(),
            undo: self.wanted.undo,
            members: members.clone(),
        };
        let register = Register {
            promised_epoch: self.epoch,
            accepted_epoch: self.epoch,
            seq: self.seq,
            config: config.encode(),
            ..Register::default()
        };
        self.proposed = self.proposed.or(target.without(self.in_sync));
        self.commit = Some(Commit {
            round: self.round,
            target,
            stored: self.wanted.clone(),
            members,
            register,
            asked: ChildSet::EMPTY,
            acks: ChildSet::EMPTY,
            refused: ChildSet::EMPTY,
            quorums: [self.voters, self.wanted.voters],
        });
        // A member that is failing votes too: it may be needed for a majority, and what failed may be
        // its data alone.
        for child in self.connected().iter() {
            self.resume_commit(child);
        }
        self.update_state();
        if on(Mutant::ServeBeforeCommit) && self.assembly.is_some() {
            self.committed();
        }
    }

    /// The members as the next configuration has them, where these are in sync. One that leaves may lack
    /// what is open when that is stored, and all that is settled from then on.
    fn members_with(&self, target: ChildSet) -> Vec<Member> {
        // What was settled long ago is changed by going back to a snapshot, and has its old stamps.
        let restores = self.restoring.is_some();
        // Until the members are alike it counts who lost power before: another nexus may have to do it.
        let alike = self.assembly.is_none() && self.reconcile.is_none();
        self.wanted
            .voters
            .iter()
            .map(|child| {
                let c = &self.children[usize::from(child.0)];
                let in_sync = target.has(child);
                let leaves = !in_sync && self.in_sync.has(child);
                let (replica, witness) = (c.replica, c.witness);
                let place = c.place.or(c.member.place);
                let mut member = Member { replica, witness, in_sync, place, ..c.member };
                if leaves {
                    let late = u64::from(on(Mutant::LeavingNotedLate));
                    let since = if restores { 0 } else { self.generation + late };
                    (member.since, member.copied, member.copied_since) = (since, 0, 0);
                }
                if let Some(copied) = c.cursor {
                    (member.copied, member.copied_since) = (u64::from(copied), self.generation);
                }
                if c.incarnation != 0 && (alike || c.found_life == 0) {
                    member.incarnation = c.incarnation;
                }
                member
            })
            .collect()
    }

    /// Asks one more voter, which has just come back.
    pub(crate) fn resume_commit(&mut self, child: ChildId) {
        let forced = self.is_forced();
        let Some(commit) = self.commit.as_mut() else { return };
        // After a forced start those that it leaves out are told, so that they do not come up without it.
        if !forced && commit.quorums.iter().all(|voters| !voters.has(child)) {
            return;
        }
        if commit.acks.has(child) || commit.asked.without(commit.refused).has(child) {
            return;
        }
        let first = commit.to_be_first();
        if !first.is_empty() && !first.has(child) {
            return;
        }
        commit.asked = commit.asked.with(child);
        commit.refused = commit.refused.without(ChildSet::of(child));
        let (round, register) = (commit.round, commit.register.clone());
        self.ask(child, round, RegisterOp::Accept(register));
    }

    /// Voters that are there and could not store the configuration.
    fn unwilling(&self) -> ChildSet {
        let refused = self.commit.as_ref().map_or(ChildSet::EMPTY, |c| c.refused);
        (0u8..).zip(&self.children).fold(ChildSet::EMPTY, |set, (i, c)| {
            if c.connected && refused.has(ChildId(i)) { set.with(ChildId(i)) } else { set }
        })
    }

    pub(crate) fn has_to_ask_again(&self) -> bool {
        !self.unwilling().is_empty()
    }

    /// Asks the voters again that had no room, or no memory, the last time.
    pub(crate) fn ask_again(&mut self) {
        for child in self.unwilling().iter() {
            self.resume_commit(child);
        }
    }

    /// The voter will not answer any more.
    pub(crate) fn commit_refused(&mut self, child: ChildId) {
        let Some(commit) = self.commit.as_mut() else { return };
        if commit.asked.has(child) && !commit.acks.has(child) {
            commit.refused = commit.refused.with(child);
            self.update_state();
        }
    }

    pub(crate) fn handle_accept_reply(&mut self, child: ChildId, reply: &ChildReply) {
        match reply {
            Ok(_) => {
                self.note_not_offline(child);
                let Some(commit) = self.commit.as_mut() else { return };
                commit.acks = commit.acks.with(child);
                if commit.is_stored() {
                    return self.committed();
                }
                for child in self.connected().iter() {
                    self.resume_commit(child);
                }
                self.update_state();
            }
            Err(IoStatus::Fenced) if self.voters.has(child) => self.fence(),
            Err(_) if on(Mutant::CountRefusal) => {
                self.handle_accept_reply(child, &Ok(Register::default()));
            }
            Err(_) => self.commit_refused(child),
        }
    }

    fn committed(&mut self) {
        let Some(commit) = self.commit.take() else { return };
        let gone = self.in_sync.or(self.joining).without(commit.target);
        let new = commit.target.without(self.in_sync);
        self.in_sync = commit.target;
        self.stored_seq = commit.register.seq;
        self.proposed = ChildSet::EMPTY;
        for member in commit.members {
            // One that was removed, and is a member again in another place, may still have its old one.
            if let Some(child) = self.child_of(member.replica) {
                let child = self.child(child);
                child.member = member;
                child.cursor = None;
            }
        }
        self.take_up(commit.stored);
        self.push_event(Event::Committed { epoch: self.epoch, seq: self.seq });
        for child in gone.iter() {
            if let ChildState::Failing(reason) = self.child(child).state {
                let now_ms = self.now_ms;
                self.child(child).state = ChildState::OutOfSync(reason);
                let c = self.child(child);
                c.trouble.note(now_ms);
                self.push_event(Event::ChildOut(child, reason));
                if self.mirror() == Some(child) {
                    self.abort_rebuild(reason);
                }
            }
        }
        for child in new.iter() {
            self.joined(child);
        }
        if self.assembly.is_some() {
            self.assembled();
        }
        self.update_state();
        self.look_again();
        self.unpark();
        // A member that failed while this was on its way goes by a commit of its own.
        if !self.failing().and(self.in_sync).is_empty() {
            self.start_commit();
        }
        self.advance_voters();
        self.store_lives();
    }

    /// Stores which life each machine is in, where that has changed and the members are alike.
    pub(crate) fn store_lives(&mut self) {
        let alike = self.assembly.is_none() && self.reconcile.is_none();
        let other = |c: ChildId| {
            let c = &self.children[usize::from(c.0)];
            c.incarnation != 0 && c.incarnation != c.member.incarnation
        };
        if alike && self.commit.is_none() && self.in_sync.iter().any(other) {
            self.start_commit();
        }
    }
}
