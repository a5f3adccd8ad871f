//! Storing a configuration on a majority of the voters.

use cairn_block::IoStatus;
use cairn_block::mutants::{Mutant, on};

use crate::children::ChildState;
use crate::config::{Config, Member, Register};
use crate::nexus::Nexus;
use crate::reconfigure::Wanted;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp, ChildReply, Event};

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
    majority: usize,
}

impl Commit {
    /// Everybody who was asked has answered, and too few have stored it.
    pub(crate) fn is_stuck(&self) -> bool {
        self.acks.len() < self.majority
            && self.asked.without(self.acks).without(self.refused).is_empty()
    }
}

impl Nexus {
    pub(crate) fn majority(&self) -> usize {
        if on(Mutant::Minority) { 1 } else { self.children.len() / 2 + 1 }
    }

    /// Stores the in-sync set without the children that are failing.
    pub(crate) fn start_commit(&mut self) {
        let failing = self.failing();
        let target = self.in_sync.without(failing);
        if target.is_empty() {
            return;
        }
        self.commit_target(target);
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
            members: members.clone(),
        };
        let register = Register {
            promised_epoch: self.epoch,
            accepted_epoch: self.epoch,
            seq: self.seq,
            config: config.encode(),
            ..Register::default()
        };
        self.commit = Some(Commit {
            round: self.round,
            target,
            stored: self.wanted.clone(),
            members,
            register,
            asked: ChildSet::EMPTY,
            acks: ChildSet::EMPTY,
            refused: ChildSet::EMPTY,
            majority: self.majority(),
        });
        // A member that is failing votes too: it may be needed for a majority, and what failed may be
        // its data alone.
        let voters: Vec<ChildId> = (0u8..)
            .zip(&self.children)
            .filter(|(_, c)| c.connected)
            .map(|(i, _)| ChildId(i))
            .collect();
        for child in voters {
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
        (0u8..)
            .zip(&self.children)
            .map(|(i, c)| {
                let in_sync = target.has(ChildId(i));
                let leaves = !in_sync && self.in_sync.has(ChildId(i));
                let mut member = Member { replica: c.replica, in_sync, ..c.member };
                if leaves && !on(Mutant::LeavingNotNoted) {
                    (member.since, member.copied, member.copied_since) = (self.generation, 0, 0);
                }
                if let Some(copied) = c.cursor {
                    (member.copied, member.copied_since) = (u64::from(copied), self.generation);
                }
                if c.incarnation != 0 {
                    member.incarnation = c.incarnation;
                }
                member
            })
            .collect()
    }

    /// Asks one more voter, which has just come back.
    pub(crate) fn resume_commit(&mut self, child: ChildId) {
        let Some(commit) = self.commit.as_mut() else { return };
        if commit.acks.has(child) || commit.asked.without(commit.refused).has(child) {
            return;
        }
        commit.asked = commit.asked.with(child);
        commit.refused = commit.refused.without(ChildSet::of(child));
        let (round, register) = (commit.round, commit.register.clone());
        self.ask(child, round, ChildOp::Accept(register));
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
                let Some(commit) = self.commit.as_mut() else { return };
                commit.acks = commit.acks.with(child);
                if commit.acks.len() == commit.majority {
                    self.committed();
                } else {
                    self.update_state();
                }
            }
            Err(IoStatus::Fenced) => self.fence(),
            Err(_) if on(Mutant::CountRefusal) => {
                self.handle_accept_reply(child, &Ok(Register::default()))
            }
            Err(_) => self.commit_refused(child),
        }
    }

    fn committed(&mut self) {
        let Some(commit) = self.commit.take() else { return };
        let gone = self.in_sync.or(self.joining).without(commit.target);
        let new = commit.target.without(self.in_sync);
        self.in_sync = commit.target;
        self.take_up(commit.stored);
        for (child, member) in self.children.iter_mut().zip(commit.members) {
            child.member = member;
            child.cursor = None;
        }
        self.push_event(Event::Committed { epoch: self.epoch, seq: self.seq });
        for child in gone.iter() {
            if let ChildState::Failing(reason) = self.child(child).state {
                self.child(child).state = ChildState::OutOfSync(reason);
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
    }
}
