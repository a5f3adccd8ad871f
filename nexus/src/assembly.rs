//! Coming up: learn the highest configuration from a majority, take a new epoch, and serve only
//! with members of that configuration's in-sync set.

mod found;
mod standby;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{Epoch, IoStatus};

pub(crate) use self::standby::Watch;
use crate::children::{ChildState, FaultReason};
use crate::commit::Commit;
use crate::config::{Config, Member};
use crate::lease::clock_margin;
use crate::nexus::Nexus;
use crate::reconfigure::Wanted;
use crate::register::{Register, RegisterOp};
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildReply, Event, Purpose, VolumeState};

/// How long to wait before asking again after somebody else took a newer epoch.
const RETRY_MS: u64 = 200;

/// Why a volume cannot be made of replicas that are in use.
const TAKEN: &str = "a replica belongs to a volume already; create the volume from empty replicas";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It stands by.
    Watch,
    /// Registers are being read.
    Gather,
    /// A new epoch is being promised.
    Promise,
    /// A lease of another nexus is waited for.
    Wait,
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
    /// Voters that hold nothing and should: they are not asked.
    blank: ChildSet,
    /// Another nexus may answer reads until then.
    leased_ms: u64,
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
            blank: ChildSet::EMPTY,
            leased_ms: 0,
            deadline_ms: None,
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<u64> {
        self.deadline_ms
    }

    /// A child was added, in this place.
    pub(crate) fn add_child(&mut self, child: ChildId) {
        let at = usize::from(child.0);
        if at == self.registers.len() {
            self.registers.push(None);
        }
        self.registers[at] = None;
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
            Stage::Watch => self.watch_child(child),
            // Those that were heard are not asked again, or one that comes and goes would hold
            // the others up for ever.
            Stage::Gather if round > 0 => {
                self.ask(child, round, RegisterOp::Read);
                self.tell_what_is_missing();
            }
            Stage::Gather | Stage::Stuck => self.gather(),
            // It goes on with who was there; this one is bound once the volume serves.
            Stage::Promise | Stage::Wait => {}
            Stage::Commit => self.resume_commit(child),
        }
    }

    pub(crate) fn assembly_child_down(&mut self, child: ChildId, now_ms: u64) {
        let assembly = self.assembling();
        assembly.registers[usize::from(child.0)] = None;
        assembly.promised = assembly.promised.without(ChildSet::of(child));
        if assembly.stage == Stage::Watch {
            return self.watch_lost(child, now_ms);
        }
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
            self.ask(child, round, RegisterOp::Read);
        }
        self.tell_what_is_missing();
    }

    pub(crate) fn connected(&self) -> ChildSet {
        (0u8..).zip(&self.children).fold(ChildSet::EMPTY, |set, (i, c)| {
            if c.connected { set.with(ChildId(i)) } else { set }
        })
    }

    fn tell_what_is_missing(&mut self) {
        let missing = self.everybody().without(self.connected());
        if !missing.is_empty() {
            let text = format!("waiting for replica {}", self.names(missing, ", "));
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
        if reply.is_ok() {
            self.watch_found(child);
        }
        match (self.assembling().stage, reply) {
            (Stage::Watch, reply) => self.watched(child, reply, now_ms),
            (Stage::Gather, Ok(register)) => {
                self.assembling().registers[usize::from(child.0)] = Some(register);
                self.try_promise(now_ms);
            }
            (Stage::Promise, Ok(register)) => {
                let leased_ms = match register.lease_ms {
                    0 => 0,
                    ms => now_ms + clock_margin(ms),
                };
                let assembly = self.assembling();
                assembly.leased_ms = assembly.leased_ms.max(leased_ms);
                assembly.registers[usize::from(child.0)] = Some(register);
                assembly.promised = assembly.promised.with(child);
                self.try_decide(now_ms);
            }
            (Stage::Promise, Err(IoStatus::Fenced)) => {
                if self.gives_way(true, now_ms) {
                    return;
                }
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
            (Stage::Wait | Stage::Commit | Stage::Stuck, _) => {}
        }
    }

    pub(crate) fn assembly_timeout(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        if assembly.deadline_ms.is_none_or(|at| now_ms < at) {
            return;
        }
        assembly.deadline_ms = None;
        match assembly.stage {
            Stage::Watch => self.watch_timeout(now_ms),
            // One that was needed may have gone meanwhile.
            Stage::Gather => {
                if self.may_promise() {
                    self.promise(now_ms);
                }
            }
            Stage::Stuck => self.gather(),
            Stage::Promise => self.promise_timeout(now_ms),
            // Some may have gone meanwhile.
            Stage::Wait => self.decide(now_ms),
            Stage::Commit => {}
        }
    }

    /// Whether there is any use in taking an epoch from those that were heard.
    fn may_promise(&self) -> bool {
        let heard = self.heard();
        match (self.config.purpose, self.highest()) {
            (Purpose::ForceStart { source, .. }, _) => {
                self.child_of(source).is_some_and(|source| heard.has(source))
            }
            (_, Some(found)) => {
                let (known, missing) = self.voters_of(&found.config);
                known.and(heard).len() > (known.len() + missing.len()) / 2
            }
            // Nobody holds anything: that is said once it is sure.
            (Purpose::Create, None) => false,
            (Purpose::Assemble | Purpose::StandBy { .. }, None) => {
                self.everybody().has_majority_in(heard)
            }
        }
    }

    /// Goes on once everybody was heard whose word counts, or a majority of them and the wait is over.
    fn try_promise(&mut self, now_ms: u64) {
        let heard = self.heard();
        let forced = matches!(self.config.purpose, Purpose::ForceStart { .. });
        let voters = match self.highest().filter(|_| !forced) {
            // After a forced start there may have been another, of which those tell that do not vote.
            Some(found) if found.config.lineage >> 32 != 0 => self.everybody(),
            Some(found) if self.voters_of(&found.config).1.is_empty() => {
                self.voters_of(&found.config).0
            }
            _ => self.everybody(),
        };
        let missing = voters.without(heard);
        if missing.is_empty() {
            self.promise(now_ms);
        } else if self.may_promise() {
            // A nexus that stood by has seen who is away, and since when.
            let at = self.away_since(missing, now_ms) + self.config.assembly_wait_ms;
            if now_ms >= at {
                return self.promise(now_ms);
            }
            let deadline_ms = &mut self.assembling().deadline_ms;
            *deadline_ms = Some(deadline_ms.map_or(at, |before| before.min(at)));
        } else {
            self.tell_who_decides();
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
        if self.gives_way(false, now_ms) {
            return;
        }
        // Before any nexus that serves is fenced: this one has to be able to take its place. A node
        // without the key takes the volume from nobody.
        let found = self.highest();
        if let Some(found) = &found {
            if !self.knows_all(&found.config) {
                self.stuck(now_ms);
                return;
            }
            if let Some(why) = self.other_block_size(&found.config) {
                return self.refuse(&why);
            }
            if !self.admits(&found.config.encryption) {
                self.lock(&found.config.encryption);
                return;
            }
        }
        // Nor does a mistake in a volume's list of replicas take another volume from its nexus.
        let foreign = self.foreign();
        if found.is_none() && !foreign.is_empty() {
            let why = match self.config.purpose {
                Purpose::Create => TAKEN.to_owned(),
                _ => self.why_nothing(),
            };
            return self.refuse(&why);
        }
        for child in foreign.iter() {
            self.assembling().registers[usize::from(child.0)] = None;
        }
        // Those stay as they are until the volume serves, or they could not be told from others.
        let forced = matches!(self.config.purpose, Purpose::ForceStart { .. });
        let blank = found.filter(|_| !forced).map_or(ChildSet::EMPTY, |found| {
            self.voters_of(&found.config).0.and(self.blank(&found.config))
        });
        self.assembling().blank = blank;
        for child in blank.iter() {
            self.assembling().registers[usize::from(child.0)] = None;
        }
        self.round += 1;
        let (round, limit) = (self.round, self.config.child_deadline_ms);
        let assembly = self.assembling();
        assembly.stage = Stage::Promise;
        assembly.round = round;
        assembly.deadline_ms = Some(now_ms + limit);
        assembly.promised = ChildSet::EMPTY;
        assembly.leased_ms = 0;
        let highest =
            assembly.registers.iter().flatten().map(|r| r.promised_epoch).max().unwrap_or_default();
        let heard = assembly.heard();
        let again = on(Mutant::EpochUsedTwice) && highest.0 > 0;
        self.epoch = Epoch(highest.0 + u64::from(!again));
        let epoch = self.epoch;
        for child in heard.iter() {
            self.ask(child, round, RegisterOp::Promise { epoch, again });
        }
    }

    fn try_decide(&mut self, now_ms: u64) {
        let assembly = self.assembling();
        if assembly.heard().without(assembly.promised).is_empty() {
            self.decide(now_ms);
        }
    }

    /// Those that were heard have promised: the highest configuration among them is the volume's, where
    /// a majority of its voters is with them.
    fn decide(&mut self, now_ms: u64) {
        if let Some(why) = self.first_unreadable() {
            self.refuse(&why);
            return;
        }
        match (self.config.purpose, self.highest()) {
            (Purpose::ForceStart { source, random }, found) => {
                self.force_start(source, random, found, now_ms);
            }
            (Purpose::Create, None) => self.decide_new(now_ms),
            (Purpose::Assemble | Purpose::StandBy { .. }, None)
                if self.assembling().promised.is_empty() =>
            {
                self.stuck(now_ms);
            }
            (Purpose::Assemble | Purpose::StandBy { .. }, None) => self.refuse(&self.why_nothing()),
            (_, Some(found)) => match self.two_lineages() {
                Some(why) => self.refuse(&why),
                None => self.adopt(&found.config, now_ms),
            },
        }
    }

    /// Nobody tells of the volume, and it is to be made.
    fn decide_new(&mut self, now_ms: u64) {
        let all = self.assembling().promised;
        if all != self.everybody() {
            self.stuck(now_ms);
            return;
        }
        if self.has_foreign() {
            return self.refuse(TAKEN);
        }
        if let Some(small) = self.first_too_small() {
            self.refuse(&small);
            return;
        }
        if self.config.encryption.is_some() && self.encryption.is_empty() {
            self.lock(&[]);
            return;
        }
        (self.voters, self.wanted.voters) = (all, all);
        let data = self.data_voters();
        if data.is_empty() {
            return self.refuse("a volume needs a replica that holds its data, besides witnesses");
        }
        self.note_lives();
        self.assembling().stage = Stage::Commit;
        self.commit_target(data);
    }

    /// Takes a configuration up, and stores it without the in-sync members that are not here.
    fn adopt(&mut self, config: &Config, now_ms: u64) {
        if !self.knows_all(config) {
            self.stuck(now_ms);
            return;
        }
        if !self.admits(&config.encryption) {
            self.lock(&config.encryption);
            return;
        }
        let (voters, _) = self.voters_of(config);
        // One that was not asked to promise is not here, for all that is decided now.
        let blank = self.assembling().blank.or(self.blank(config));
        let there = self.assembling().promised.without(blank);
        if !voters.has_majority_in(there) {
            self.tell_who_decides();
            self.stuck(now_ms);
            return;
        }
        self.take_config(config, voters);
        let in_sync = self.in_sync;
        let target = in_sync.and(there);
        if target.is_empty() {
            let one = if in_sync.len() == 1 { ", which" } else { ": each of them" };
            let text = format!(
                "the replicas that are here missed writes; waiting for replica {}{one} has them all",
                self.names(in_sync, " or ")
            );
            self.set_state(VolumeState::Assembling(text));
            self.stuck(now_ms);
            return;
        }
        if self.waits_for_lease(config.holder, now_ms) {
            return;
        }
        for child in self.data_voters().without(target).iter() {
            let why = match (in_sync.has(child), blank.has(child)) {
                (_, true) => FaultReason::Blank,
                (true, _) => FaultReason::Unreachable,
                (false, _) => FaultReason::Stale,
            };
            self.child(child).state = ChildState::OutOfSync(why);
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

    /// Whether another nexus may answer reads still. One of this node's is dead, and had waited for those
    /// before it when it stored the configuration that was found.
    fn waits_for_lease(&mut self, holder: u128, now_ms: u64) -> bool {
        let leased_ms = self.assembling().leased_ms;
        let ours = holder != 0 && holder == self.config.holder;
        if ours || now_ms >= leased_ms || on(Mutant::TakeoverDoesNotWait) {
            return false;
        }
        self.assembling().stage = Stage::Wait;
        self.assembling().deadline_ms = Some(leased_ms);
        self.set_state(VolumeState::Assembling(format!(
            "another nexus served the volume a moment ago; waiting for {} ms until it is sure that it \
             answers no reads any more",
            leased_ms - now_ms
        )));
        true
    }

    /// What a configuration says is so from here on.
    fn take_config(&mut self, config: &Config, voters: ChildSet) {
        self.learn_blocks(config.blocks);
        self.config.blocks = config.blocks;
        if config.block_size != 0 {
            self.config.block_size = config.block_size;
        }
        self.encryption.clone_from(&config.encryption);
        (self.lineage, self.generation, self.seq) = (config.lineage, config.generation, 0);
        self.stored_seq = 0;
        let (blocks, encryption) = (config.blocks, config.encryption.clone());
        self.voters = voters;
        self.restoring = config.restoring;
        self.deleted.clone_from(&config.deleted);
        self.reservations.clone_from(&config.reservations);
        self.sanitize.clone_from(&config.sanitize);
        let (restoring, deleted) = (config.restoring, config.deleted.clone());
        let (reservations, sanitize) = (config.reservations.clone(), config.sanitize.clone());
        let undo = config.undo;
        self.undo = undo;
        self.wanted =
            Wanted { blocks, encryption, voters, restoring, deleted, reservations, sanitize, undo };
        self.in_sync = ChildSet::EMPTY;
        let old = self.of_older_lineage(config.lineage);
        for at in 0..self.children.len() {
            let id = ChildId(u8::try_from(at).expect("at most MAX_CHILDREN"));
            let child = &mut self.children[at];
            child.idle = if old.has(id) { FaultReason::OldLineage } else { FaultReason::NotMember };
            let replica = child.replica;
            child.member = Member { replica, ..Member::default() };
            let Some(member) = config.member(replica).filter(|_| voters.has(id)) else { continue };
            (child.member, child.witness) = (*member, member.witness);
            child.found_life = member.incarnation;
            if member.in_sync || on(Mutant::AssembleStale) {
                self.in_sync = self.in_sync.with(id);
            }
        }
    }

    /// Takes the volume from one replica, whatever the others hold.
    fn force_start(
        &mut self,
        replica: cairn_block::ReplicaId,
        random: u32,
        highest: Option<found::Found>,
        now_ms: u64,
    ) {
        let child = self.child_of(replica);
        let Some(source) = child.filter(|&c| self.assembling().promised.has(c)) else {
            let text =
                format!("waiting for replica {replica}, which the volume is to be taken from");
            self.set_state(VolumeState::Assembling(text));
            self.stuck(now_ms);
            return;
        };
        let own = self.configs().into_iter().find(|f| f.child == source);
        let (Some(own), Some(highest)) = (own, highest) else {
            return self.refuse(&format!(
                "replica {replica} holds nothing of this volume; take it from another one"
            ));
        };
        let holds_data = own.config.member(replica).is_none_or(|m| !m.witness);
        if !holds_data {
            return self.refuse(&format!(
                "replica {replica} is a witness and holds no data; take the volume from another one"
            ));
        }
        // How large it is and which key opens it is what was said last: what the source lacks of it
        // reads as zeros.
        if !self.admits(&highest.config.encryption) {
            self.lock(&highest.config.encryption);
            return;
        }
        if self.waits_for_lease(highest.config.holder, now_ms) {
            return;
        }
        let found = self.configs();
        let generation = found.iter().map(|f| f.config.generation).max().unwrap_or_default();
        // Whether it went back to a snapshot is for the source to say.
        let restoring = own.config.restoring;
        // What is in its undo log may be of a time when it was in sync: it is not put back over what it holds.
        let config = Config { restoring, undo: false, ..highest.config.clone() };
        self.take_config(&config, ChildSet::of(source));
        self.child(source).witness = false;
        self.generation = generation;
        self.lineage = ((highest.config.lineage >> 32) + 1) << 32 | u64::from(random);
        self.in_sync = ChildSet::of(source);
        for at in 0..self.children.len() {
            if at != usize::from(source.0) {
                self.children[at].idle = FaultReason::OldLineage;
            }
        }
        let lineage = self.lineage;
        self.push_event(Event::Forced { source: replica, lineage });
        self.note_lives();
        self.assembling().stage = Stage::Commit;
        self.commit_target(ChildSet::of(source));
    }

    /// Whether what is being stored is the first configuration after a forced start.
    pub(crate) fn is_forced(&self) -> bool {
        self.assembly.is_some() && matches!(self.config.purpose, Purpose::ForceStart { .. })
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
        let fresh = self.config.purpose == Purpose::Create;
        for child in promised.iter() {
            let c = self.child(child);
            c.bound = true;
            if !fresh {
                // What it wrote for the nexus before may not be flushed.
                c.written = c.written.max(c.flushed + 1);
            }
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
        for at in 0..self.children.len() {
            let child = ChildId(u8::try_from(at).expect("at most MAX_CHILDREN"));
            let in_sync = self.in_sync.has(child);
            let state = self.child(child).state;
            if !in_sync && matches!(state, ChildState::OutOfSync(_) | ChildState::Removed) {
                continue;
            }
            self.child(child).state = match (self.child(child).connected, promised.has(child)) {
                (true, true) => self.bound_state(child),
                (true, false) => ChildState::Joining,
                (false, _) => ChildState::Disconnected,
            };
            if self.child(child).state == ChildState::Online {
                self.push_event(Event::ChildOnline(child));
            }
        }
        self.begin_reconcile(self.now_ms);
        if let Some(snapshot) = self.restoring {
            self.push_event(Event::Restoring(Some(snapshot)));
        }
        // Those that came while others were promising are not bound to the epoch yet.
        for child in self.connected().without(promised).without(small).iter() {
            self.rejoin(child);
        }
    }
}
