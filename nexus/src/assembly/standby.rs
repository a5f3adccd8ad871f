//! A nexus that stands by: it looks at the registers again and again, promises nothing, and so takes the
//! volume from nobody. It knows what it would serve, and who does; where it is to, it takes over by itself
//! once nobody has for a while.
//!
//! Whoever serves a volume that others stand by for keeps its lease even while there are no reads. A majority
//! of the voters that tells of no lease has a voter in common with every majority that granted one, so the
//! lease is over; and what follows is an assembly like any other, in which one epoch fences another. Two that
//! take over at once cost time and nothing else.

use cairn_block::Epoch;
use cairn_block::mutants::{Mutant, on};

use super::Stage;
use crate::config::Config;
use crate::nexus::Nexus;
use crate::register::RegisterOp;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildReply, Event, MAX_CHILDREN, Purpose, VolumeState};

/// What a nexus that stands by has seen.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// When the look began that is under way.
    looking_ms: Option<u64>,
    /// Who answered in this look, or the last.
    heard: ChildSet,
    /// Until when a lease lasts that a child told of then.
    leased_ms: [u64; MAX_CHILDREN],
    /// Since when a child is away, or says nothing, while a majority is there.
    away_ms: [Option<u64>; MAX_CHILDREN],
    /// Since when it stands by.
    since_ms: Option<u64>,
    /// It takes over by itself, from now on.
    auto: bool,
    /// The highest epoch that was promised, when it was seen first that nobody serves.
    idle: Option<Epoch>,
    /// It takes over by itself: the epoch that it had seen then, and what it stands by as.
    by_itself: Option<(Epoch, Option<u64>)>,
    /// What was told of who serves.
    told: String,
    /// Why it could not serve the volume.
    unfit: Option<String>,
    /// The encryption that a key was looked for last, and why there is none.
    key: Option<(Vec<u8>, String)>,
    /// Why it did not come to serve the volume when it took it over last.
    refused: Option<String>,
}

/// What a look told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// A nexus serves, and its lease lasts until then unless it is renewed.
    Served { until_ms: u64 },
    /// None does. What was promised last may be another's, which is about to.
    Idle(Epoch),
    /// Too few were heard to tell.
    Unknown,
}

impl Nexus {
    /// Takes the volume over from whoever serves it, where this one stands by. False where it does not.
    pub fn activate(&mut self, now_ms: u64) -> bool {
        if !matches!(self.config.purpose, Purpose::StandBy { .. }) {
            return false;
        }
        self.config.purpose = Purpose::Assemble;
        self.watch.by_itself = None;
        self.set_state(VolumeState::Assembling("taking the volume over".to_owned()));
        self.assembly_restart();
        self.settle(now_ms);
        true
    }

    /// Whether another nexus has come first since this one began to take the volume over by itself, by what was
    /// heard: then it stands by again. What it has promised to itself takes the volume from nobody.
    pub(super) fn gives_way(&mut self, refused: bool, now_ms: u64) -> bool {
        let Some((idle, auto_after_ms)) = self.watch.by_itself else { return false };
        let ours = idle.max(self.epoch);
        let registers = self.assembly.iter().flat_map(|a| a.registers.iter().flatten());
        let mut others = registers.filter(|r| r.lease_ms > 0 || r.promised_epoch > ours);
        if !refused && others.next().is_none() || on(Mutant::StandbyIgnoresLeases) {
            return false;
        }
        self.watch.by_itself = None;
        self.watch.looking_ms = None;
        self.config.purpose = Purpose::StandBy { auto_after_ms };
        self.round += 1;
        let round = self.round;
        let assembly = self.assembling();
        (assembly.stage, assembly.round) = (Stage::Watch, round);
        assembly.registers.fill(None);
        assembly.promised = ChildSet::EMPTY;
        assembly.deadline_ms = Some(now_ms);
        self.watch.heard = ChildSet::EMPTY;
        self.watch.idle = None;
        "another nexus is taking the volume over".clone_into(&mut self.watch.told);
        self.tell_watch();
        true
    }

    /// Why it could not serve the volume if it took it over now, where it stands by: then it does not by itself.
    #[must_use]
    pub fn unfit(&self) -> Option<&str> {
        self.watch.unfit.as_deref()
    }

    /// A nexus before this one took the volume over, and could not serve it: that is told.
    pub fn note_refusal(&mut self, why: &str) {
        self.watch.refused = Some(why.to_owned());
    }

    /// How long until the next look.
    fn watch_ms(&self, seen: Seen, now_ms: u64) -> u64 {
        let lease_ms = self.config.lease_ms;
        let often = (lease_ms / 2).max(10);
        match seen {
            // Not a moment later than it is over.
            Seen::Served { until_ms } => often.min(until_ms.saturating_sub(now_ms) + 1),
            Seen::Idle(epoch) if self.watch.auto => {
                (lease_ms / 8).max(10) + self.stagger_ms(epoch, now_ms)
            }
            Seen::Idle(_) | Seen::Unknown => often,
        }
    }

    /// Those that stand by see the end of a lease at the same moment. Two that took over at once would refuse each
    /// other's epoch, again and again: each waits a little for itself.
    fn stagger_ms(&self, epoch: Epoch, now_ms: u64) -> u64 {
        let local = self.config.children.iter().find(|c| c.local).map_or(0, |c| c.replica.0);
        let own = (self.config.holder ^ local).to_le_bytes();
        let seeds = own.into_iter().chain(epoch.0.to_le_bytes()).chain(now_ms.to_le_bytes());
        // FNV-1a.
        let hash = seeds.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (hash >> 32) % (self.config.lease_ms / 8).max(1)
    }

    /// One more child can be looked at.
    pub(crate) fn watch_child(&mut self, child: ChildId) {
        let round = self.assembling().round;
        self.ask(child, round, RegisterOp::Read);
    }

    /// A child went away. How long it is waited for in a takeover counts from now.
    pub(crate) fn watch_lost(&mut self, child: ChildId, now_ms: u64) {
        self.watch.away_ms[usize::from(child.0)].get_or_insert(now_ms);
        self.watch.heard = self.watch.heard.without(ChildSet::of(child));
        self.end_look_if_answered(now_ms);
    }

    /// A child answered.
    pub(crate) fn watch_found(&mut self, child: ChildId) {
        self.watch.away_ms[usize::from(child.0)] = None;
    }

    /// Since when those are away without whom a takeover would go on; now, where that is not known.
    pub(super) fn away_since(&self, missing: ChildSet, now_ms: u64) -> u64 {
        let since = missing.iter().map(|c| self.watch.away_ms[usize::from(c.0)].unwrap_or(now_ms));
        since.max().unwrap_or(now_ms)
    }

    pub(crate) fn watched(&mut self, child: ChildId, reply: ChildReply, now_ms: u64) {
        let Ok(register) = reply else { return };
        let until_ms = if register.lease_ms > 0 { now_ms + register.lease_ms } else { 0 };
        self.watch.leased_ms[usize::from(child.0)] = until_ms;
        self.assembling().registers[usize::from(child.0)] = Some(register);
        self.watch.heard = self.watch.heard.with(child);
        if let Some(found) = self.highest() {
            let config = found.config;
            self.tell_places(&config);
            self.watch.unfit = self.why_unfit(&config);
            if config.block_size != 0 && self.config.block_size == 0 {
                self.config.block_size = config.block_size;
            }
            self.learn_blocks(config.blocks);
        }
        self.end_look_if_answered(now_ms);
    }

    fn end_look_if_answered(&mut self, now_ms: u64) {
        // One that said nothing the last time is not waited for again.
        let away = |c: ChildId| self.watch.away_ms[usize::from(c.0)].is_some();
        let silent = self.connected().without(self.watch.heard);
        let answered = self.watch.looking_ms.is_some() && silent.iter().all(away);
        if answered && self.seen() != Seen::Unknown {
            self.look_over(now_ms);
        }
    }

    /// The volume may have grown. It never shrinks: who tells of a smaller size has missed that.
    pub(crate) fn learn_blocks(&mut self, blocks: u64) {
        if blocks > self.config.blocks {
            self.config.blocks = blocks;
            self.push_event(Event::Resized(blocks));
        }
    }

    /// Why a volume with this configuration could not be served here. A key is looked for once.
    fn why_unfit(&mut self, config: &Config) -> Option<String> {
        let unfit = self.first_unreadable().or_else(|| self.two_lineages());
        if let Some(why) = unfit.or_else(|| self.other_block_size(config)) {
            return Some(why);
        }
        let section = &config.encryption;
        if self.admits(section) {
            self.watch.key = None;
            return None;
        }
        if self.watch.key.as_ref().is_none_or(|(looked_for, _)| looked_for != section) {
            self.watch.key = Some((section.clone(), "its key is being looked for".to_owned()));
            self.locked.clone_from(section);
            self.push_event(Event::Locked);
        }
        self.watch.key.as_ref().map(|(_, why)| why.clone())
    }

    /// Whether it only looks.
    pub(crate) fn watches(&self) -> bool {
        self.assembly.as_ref().is_some_and(|a| a.stage == Stage::Watch)
    }

    /// The key that was looked for is not at hand, or is.
    pub(crate) fn watch_key(&mut self, refused: Option<&str>) {
        match (refused, &mut self.watch.key) {
            (Some(why), Some((_, told))) => why.clone_into(told),
            (Some(_), None) => {}
            (None, key) => *key = None,
        }
        self.watch.unfit = refused.map(str::to_owned);
        self.tell_watch();
    }

    /// It is time for the next look, or for what this one told without those that do not answer.
    pub(crate) fn watch_timeout(&mut self, now_ms: u64) {
        self.watch.since_ms.get_or_insert(now_ms);
        match self.watch.looking_ms {
            Some(_) => self.look_over(now_ms),
            None => self.begin_look(now_ms),
        }
    }

    fn begin_look(&mut self, now_ms: u64) {
        self.round += 1;
        let (round, limit_ms) = (self.round, (self.config.lease_ms / 4).max(10));
        let assembly = self.assembling();
        assembly.round = round;
        assembly.deadline_ms = Some(now_ms + limit_ms);
        self.watch.looking_ms = Some(now_ms);
        self.watch.heard = ChildSet::EMPTY;
        for child in self.connected().iter() {
            self.ask(child, round, RegisterOp::Read);
        }
    }

    /// What a look told: how long until the next, or whether to take over.
    fn look_over(&mut self, now_ms: u64) {
        self.note_who_is_away(now_ms);
        let auto_after_ms = match self.config.purpose {
            Purpose::StandBy { auto_after_ms } => auto_after_ms,
            Purpose::Create | Purpose::Assemble | Purpose::ForceStart { .. } => None,
        };
        let since_ms = self.watch.since_ms.unwrap_or(now_ms);
        self.watch.auto = auto_after_ms.is_some_and(|after| now_ms >= since_ms + after);
        let seen = self.seen();
        let before = self.watch.idle.take();
        if let Seen::Idle(epoch) = seen {
            // Twice, and nobody has begun to come up meanwhile: its first lease may be on its way.
            if self.watch.auto && before == Some(epoch) && self.watch.unfit.is_none() {
                self.activate(now_ms);
                self.watch.by_itself = Some((epoch, auto_after_ms));
                return;
            }
            self.watch.idle = Some(epoch);
        }
        self.watch.told = self.who_serves(seen, auto_after_ms.is_some());
        self.tell_watch();
        let watch_ms = self.watch_ms(seen, now_ms);
        self.assembling().deadline_ms = Some(now_ms + watch_ms);
    }

    /// Where no majority is there, or where that is not known, those that are not count as away from the moment that
    /// one is: a whole cluster that starts is given its time.
    fn note_who_is_away(&mut self, now_ms: u64) {
        let began_ms = self.watch.looking_ms.take().unwrap_or(now_ms);
        let Some(found) = self.highest() else { return };
        let (voters, unknown) = self.voters_of(&found.config);
        let heard = voters.and(self.watch.heard);
        let enough = heard.len() > (voters.len() + unknown.len()) / 2;
        for child in self.everybody().iter() {
            let away = &mut self.watch.away_ms[usize::from(child.0)];
            match enough && !self.watch.heard.has(child) {
                true => *away = Some(away.unwrap_or(began_ms)),
                false => *away = None,
            }
        }
    }

    fn seen(&self) -> Seen {
        let Some(found) = self.highest() else { return Seen::Unknown };
        let (voters, unknown) = self.voters_of(&found.config);
        let heard = voters.and(self.watch.heard);
        let lasts = |c: ChildId| self.watch.leased_ms[usize::from(c.0)];
        let until_ms = heard.iter().map(lasts).max().unwrap_or(0);
        if until_ms > 0 && !on(Mutant::StandbyIgnoresLeases) {
            return Seen::Served { until_ms };
        }
        if heard.len() <= (voters.len() + unknown.len()) / 2 {
            return Seen::Unknown;
        }
        let registers = self.assembly.as_ref().map_or(&[][..], |a| &a.registers);
        let of = |c: ChildId| registers[usize::from(c.0)].as_ref();
        let promised = heard.iter().filter_map(of).map(|r| r.promised_epoch).max();
        Seen::Idle(promised.unwrap_or_default())
    }

    /// Says who serves, and what is in the way of taking over.
    fn tell_watch(&mut self) {
        let mut text = self.watch.told.clone();
        if let Some(why) = &self.watch.unfit {
            text = format!("it cannot be taken over here: {why}; {text}");
        }
        if let Some(why) = &self.watch.refused {
            text =
                format!("{text}; the last time that it was taken over here it was refused: {why}");
        }
        self.set_state(VolumeState::StandBy(text));
    }

    fn who_serves(&self, seen: Seen, auto: bool) -> String {
        match (seen, auto) {
            (Seen::Served { .. }, _) => "another nexus serves the volume".to_owned(),
            (Seen::Idle(_), true) => {
                "no nexus serves the volume; this one takes over in a moment".to_owned()
            }
            (Seen::Idle(_), false) => {
                "no nexus serves the volume; `cairn volume takeover` has this one do it".to_owned()
            }
            (Seen::Unknown, _) => {
                let missing = self.everybody().without(self.watch.heard);
                format!("too few replicas answer; waiting for {}", self.names(missing, ", "))
            }
        }
    }

    /// Starts to look, where this one is to.
    pub(crate) fn begin_watch(&mut self) {
        let stands_by = matches!(self.config.purpose, Purpose::StandBy { .. });
        if let Some(assembly) = self.assembly.as_mut().filter(|_| stands_by) {
            assembly.stage = Stage::Watch;
            // At the first call with the time.
            assembly.deadline_ms = Some(0);
            self.watch.told = "looking for its replicas".to_owned();
            self.state = VolumeState::StandBy(self.watch.told.clone());
        }
    }
}
