//! Coming up: learn the highest configuration from a majority, take a new epoch, and serve only
//! with members of that configuration's in-sync set.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{Epoch, IoStatus};

use crate::children::{ChildState, FaultReason};
use crate::commit::Commit;
use crate::config::{Config, Register};
use crate::nexus::Nexus;
use crate::reconfigure::Wanted;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp, ChildReply, Event, Purpose, VolumeState};

/// How long to wait before asking again after somebody else took a newer epoch.
const RETRY_MS: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Registers are being read.
    Gather,
    /// A new epoch is being promised.
    Promise,
    /// The first configuration of the epoch is being stored.
    Commit,
    /// Not possible now; looked at again when a child comes or goes.
    Stuck,
}

#[derive(Debug)]
pub(crate) struct Assembly {
    stage: Stage,
    round: u32,
    /// What each child's register held when it was last heard.
    registers: Vec<Option<Register>>,
    promised: ChildSet,
    /// Go on with who is there at this time.
    deadline_ms: Option<u64>,
}

impl Assembly {
    pub(crate) fn new(children: usize) -> Self {
        Self {
            stage: Stage::Gather,
            round: 0,
            registers: vec![None; children],
            promised: ChildSet::EMPTY,
            deadline_ms: None,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<u64> {
        self.deadline_ms
    }

    fn heard(&self) -> ChildSet {
        (0u8..).zip(&self.registers).fold(ChildSet::EMPTY, |set, (i, r)| {
            if r.is_some() { set.with(ChildId(i)) } else { set }
        })
    }
}

impl Nexus {
    fn assembling(&mut self) -> &mut Assembly {
        self.assembly.as_mut().expect("called while assembling")
    }

    pub(crate) fn assembly_child_up(&mut self, child: ChildId) {
        let (stage, round) = (self.assembling().stage, self.assembling().round);
        match stage {
            // Those that were heard are not asked again, or one that comes and goes would hold
            // the others up for ever.
            Stage::Gather if round > 0 => {
                self.ask(child, round, ChildOp::ReadRegister);
                self.tell_what_is_missing();
            }
            Stage::Gather | Stage::Stuck => self.gather(),
            // It goes on with who was there; this one is bound once the volume serves.
            Stage::Promise => {}
            Stage::Commit => self.resume_commit(child),
        }
    }

    pub(crate) fn assembly_child_down(&mut self, child: ChildId, now_ms: u64) {
        let assembly = self.assembling();
        assembly.registers[usize::from(child.0)] = None;
        assembly.promised = assembly.promised.without(ChildSet::of(child));
        // It may have been the last whose promise was waited for.
        if assembly.stage == Stage::Promise {
            self.try_decide(now_ms);
        }
    }

    /// Starts over where the first configuration can no longer reach a majority.
    pub(crate) fn assembly_check_commit(&mut self, now_ms: u64) {
        let stuck = self.commit.as_ref().is_some_and(Commit::is_stuck);
        if stuck && self.assembling().stage == Stage::Commit {
            self.commit = None;
            self.stuck(now_ms);
        }
    }

    pub(crate) fn assembly_restart(&mut self) {
        self.gather();
    }

    /// Starts over with everybody who is connected.
    fn gather(&mut self) {
        self.round += 1;
        let round = self.round;
        let assembly = self.assembling();
        assembly.stage = Stage::Gather;
        assembly.round = round;
        assembly.registers.fill(None);
        assembly.promised = ChildSet::EMPTY;
        assembly.deadline_ms = None;
        self.commit = None;
        for child in self.connected().iter() {
            self.ask(child, round, ChildOp::ReadRegister);
        }
        self.tell_what_is_missing();
    }

    pub(crate) fn connected(&self) -> ChildSet {
        (0u8..).zip(&self.children).fold(ChildSet::EMPTY, |set, (i, c)| {
            if c.connected { set.with(ChildId(i)) } else { set }
        })
    }

    fn tell_what_is_missing(&mut self) {
        let connected = self.connected();
        let missing: Vec<String> = (0u8..)
            .zip(&self.children)
            .filter(|(i, _)| !connected.has(ChildId(*i)))
            .map(|(_, c)| c.replica.to_string())
            .collect();
        if !missing.is_empty() {
            let text = format!("waiting for replica {}", missing.join(", "));
            self.set_state(VolumeState::Assembling(text));
        }
    }

    pub(crate) fn handle_assembly_reply(
        &mut self,
        child: ChildId,
        round: u32,
        reply: ChildReply,
        now_ms: u64,
    ) {
        if self.assembling().round != round {
            return;
        }
        match (self.assembling().stage, reply) {
            (Stage::Gather, Ok(register)) => {
                self.assembling().registers[usize::from(child.0)] = Some(register);
                self.try_promise(now_ms);
            }
            (Stage::Promise, Ok(register)) => {
                let assembly = self.assembling();
                assembly.registers[usize::from(child.0)] = Some(register);
                assembly.promised = assembly.promised.with(child);
                self.try_decide(now_ms);
            }
            (Stage::Promise, Err(IoStatus::Fenced)) => {
                // Somebody took a newer epoch between the read and the promise: look again.
                let assembly = self.assembling();
                assembly.stage = Stage::Stuck;
                assembly.deadline_ms = Some(now_ms + RETRY_MS);
            }
            (Stage::Gather | Stage::Promise, Err(_)) => {
                // One that cannot store its promise does not keep a majority from going on.
                self.assembly_child_down(child, now_ms);
                self.push_event(Event::ResetChild(child));
            }
            (Stage::Commit | Stage::Stuck, _) => {}
        }
    }

    pub(crate) fn assembly_timeout(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        if assembly.deadline_ms.is_none_or(|at| now_ms < at) {
            return;
        }
        assembly.deadline_ms = None;
        match assembly.stage {
            Stage::Gather => self.promise(now_ms),
            Stage::Stuck => self.gather(),
            Stage::Promise => self.promise_timeout(now_ms),
            Stage::Commit => {}
        }
    }

    /// Goes on once everybody was heard, or a majority and the wait is over.
    fn try_promise(&mut self, now_ms: u64) {
        let (all, majority) = (self.children.len(), self.majority());
        let (create, wait) = (self.is_new(), self.config.assembly_wait_ms);
        let assembly = self.assembling();
        let heard = assembly.heard().len();
        if heard == all {
            self.promise(now_ms);
        } else if !create && heard >= majority && assembly.deadline_ms.is_none() {
            assembly.deadline_ms = Some(now_ms + wait);
        }
    }

    /// Goes on without those that do not answer: their disk hangs, or what they drain does.
    fn promise_timeout(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        for child in assembly.heard().without(assembly.promised).iter() {
            self.assembling().registers[usize::from(child.0)] = None;
            self.push_event(Event::ResetChild(child));
        }
        self.try_decide(now_ms);
    }

    fn promise(&mut self, now_ms: u64) {
        // A node without the key takes the volume from nobody.
        let found = self.highest().and_then(|r| Config::decode(&r.config).ok());
        let ours = found.filter(|c| c.volume == self.config.volume);
        if let Some(section) = ours.map(|c| c.encryption)
            && !self.admits(&section)
        {
            self.lock(&section);
            return;
        }
        self.round += 1;
        let (round, limit) = (self.round, self.config.child_deadline_ms);
        let assembly = self.assembling();
        assembly.stage = Stage::Promise;
        assembly.round = round;
        assembly.deadline_ms = Some(now_ms + limit);
        assembly.promised = ChildSet::EMPTY;
        let highest =
            assembly.registers.iter().flatten().map(|r| r.promised_epoch).max().unwrap_or_default();
        let heard = assembly.heard();
        let again = on(Mutant::EpochUsedTwice) && highest.0 > 0;
        self.epoch = Epoch(highest.0 + u64::from(!again));
        let epoch = self.epoch;
        for child in heard.iter() {
            self.ask(child, round, ChildOp::Promise { epoch, again });
        }
    }

    fn try_decide(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        if assembly.heard().without(assembly.promised).is_empty() {
            self.decide(now_ms);
        }
    }

    /// A majority has promised: the highest configuration among them is the volume's.
    fn decide(&mut self, now_ms: u64) {
        if self.assembling().promised.len() < self.majority() {
            self.stuck(now_ms);
            return;
        }
        let highest = self.highest().cloned();
        match (self.config.purpose, highest) {
            (Purpose::Create, None) => {
                if let Some(small) = self.first_too_small() {
                    self.refuse(&small);
                    return;
                }
                if self.config.encryption.is_some() && self.encryption.is_empty() {
                    self.lock(&[]);
                    return;
                }
                let all = self.assembling().promised;
                if all.len() < self.children.len() {
                    self.stuck(now_ms);
                    return;
                }
                self.note_lives();
                self.assembling().stage = Stage::Commit;
                self.commit_target(all);
            }
            (Purpose::Create, Some(_)) if self.is_new() => self.refuse(
                "a replica belongs to a volume already; create the volume from empty replicas",
            ),
            (Purpose::Assemble, None) => {
                self.refuse(
                    "no replica holds a configuration; the volume was never created on them",
                );
            }
            (_, Some(register)) => match Config::decode(&register.config) {
                Ok(config) => self.adopt(&config, now_ms),
                Err(e) => self.refuse(&format!("the stored configuration cannot be read: {e}")),
            },
        }
    }

    /// The highest configuration that was heard of.
    fn highest(&self) -> Option<&Register> {
        let registers = self.assembly.iter().flat_map(|a| &a.registers).flatten();
        registers.filter(|r| !r.config.is_empty()).max_by_key(|r| (r.accepted_epoch, r.seq))
    }

    /// A replica that cannot hold a new volume, in words.
    fn first_too_small(&self) -> Option<String> {
        let registers = self.assembly.iter().flat_map(|a| &a.registers);
        let small = |r: &Register| r.blocks > 0 && r.blocks < self.config.blocks;
        let mut children = self.children.iter().zip(registers);
        children.find_map(|(c, r)| r.as_ref().filter(|r| small(r)).map(|r| (c, r))).map(|(c, r)| {
            format!(
                "replica {} is too small: it has {} blocks, the volume {}; make a larger replica",
                c.replica, r.blocks, self.config.blocks
            )
        })
    }

    /// Whether the volume is to be made and nobody tells of it yet. A process that was killed may
    /// not have lived to remember that it had made it.
    fn is_new(&self) -> bool {
        let mut registers = self.assembly.iter().flat_map(|a| &a.registers).flatten();
        let ours = |register: &Register| {
            Config::decode(&register.config).is_ok_and(|c| c.volume == self.config.volume)
        };
        self.config.purpose == Purpose::Create && !registers.any(ours)
    }

    fn adopt(&mut self, config: &Config, now_ms: u64) {
        let same = config.members.len() == self.children.len()
            && config.members.iter().all(|m| self.children.iter().any(|c| c.replica == m.replica));
        if config.volume != self.config.volume || !same {
            self.refuse(&format!(
                "the replicas hold a configuration of volume {} with other members; check the \
                 replicas that are named for volume {}",
                config.volume, self.config.volume
            ));
            return;
        }
        if !self.admits(&config.encryption) {
            self.lock(&config.encryption);
            return;
        }
        self.config.blocks = config.blocks;
        self.encryption.clone_from(&config.encryption);
        self.wanted = Wanted { blocks: config.blocks, encryption: config.encryption.clone() };
        self.lineage = config.lineage;
        self.generation = config.generation;
        self.seq = 0;
        let mut in_sync = ChildSet::EMPTY;
        for (i, child) in (0u8..).zip(&mut self.children) {
            child.member = config.member(child.replica).copied().expect("the members are the same");
            child.found_life = child.member.incarnation;
            if child.member.in_sync || on(Mutant::AssembleStale) {
                in_sync = in_sync.with(ChildId(i));
            }
        }
        // Who leaves now leaves by the configuration that is stored next.
        self.in_sync = in_sync;
        let there = self.assembling().promised;
        let target = in_sync.and(there);
        if target.is_empty() {
            let needed: Vec<String> = in_sync
                .iter()
                .map(|c| self.children[usize::from(c.0)].replica.to_string())
                .collect();
            self.set_state(VolumeState::Assembling(format!(
                "the replicas that are here missed writes; waiting for one that has them all: {}",
                needed.join(" or ")
            )));
            self.stuck(now_ms);
            return;
        }
        for i in 0..self.children.len() {
            let child = ChildId(u8::try_from(i).expect("at most MAX_CHILDREN"));
            if !target.has(child) {
                let why =
                    if in_sync.has(child) { FaultReason::Unreachable } else { FaultReason::Stale };
                self.child(child).state = ChildState::OutOfSync(why);
            }
        }
        self.note_lives();
        self.assembling().stage = Stage::Commit;
        self.commit_target(target);
    }

    /// The next configuration says which life each machine is in.
    fn note_lives(&mut self) {
        let Some(assembly) = &self.assembly else { return };
        for (child, register) in self.children.iter_mut().zip(&assembly.registers) {
            child.incarnation = register.as_ref().map_or(0, |r| r.incarnation);
        }
    }

    fn stuck(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        assembly.stage = Stage::Stuck;
        assembly.deadline_ms = Some(now_ms + RETRY_MS * 5);
    }

    pub(crate) fn refuse(&mut self, why: &str) {
        self.assembly_stop();
        self.set_state(VolumeState::Refused(why.to_owned()));
    }

    /// Waits for a child to come, or to be told to go on.
    pub(crate) fn assembly_stop(&mut self) {
        self.assembling().stage = Stage::Stuck;
    }

    /// The epoch's first configuration is stored: serve.
    pub(crate) fn assembled(&mut self) {
        let Some(assembly) = self.assembly.take() else { return };
        let promised = assembly.promised;
        for child in promised.iter() {
            self.child(child).bound = true;
        }
        // Those that were away when the volume grew grow now, and join after that.
        let mut small = ChildSet::EMPTY;
        for child in promised.and(self.connected()).iter() {
            let register = assembly.registers[usize::from(child.0)].as_ref();
            if self.grows_first(child, register.map_or(0, |r| r.blocks)) {
                small = small.with(child);
            }
        }
        let promised = promised.without(small);
        for child in self.in_sync.iter() {
            self.child(child).state = match (self.child(child).connected, promised.has(child)) {
                (true, true) => ChildState::Online,
                (true, false) => ChildState::Joining,
                (false, _) => ChildState::Disconnected,
            };
            if self.child(child).state == ChildState::Online {
                self.push_event(Event::ChildOnline(child));
            }
        }
        self.begin_reconcile(self.now_ms);
        // Those that came while others were promising are not bound to the epoch yet.
        for child in self.connected().without(promised).without(small).iter() {
            self.rejoin(child);
        }
    }
}
