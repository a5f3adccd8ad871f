//! A nexus that stands by: it looks at the registers again and again, promises nothing, and so takes the
//! volume from nobody. It knows what it would serve, and who does; where it is to, it takes over by itself
//! once nobody has for a while.
//!
//! Whoever serves a volume that others stand by for keeps its lease even while there are no reads. A majority
//! of the voters that tells of no lease has a voter in common with every majority that granted one, so the
//! lease is over; and what follows is an assembly like any other, in which one epoch fences another. Two that
//! take over at once cost time and nothing else.

use super::Stage;
use crate::nexus::Nexus;
use crate::slots::ChildSet;
use crate::types::{ChildId, ChildOp, ChildReply, Event, Purpose, VolumeState};

/// What a nexus that stands by has seen.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Who answered in this round.
    heard: ChildSet,
    /// Since when it stands by.
    since_ms: Option<u64>,
    /// Since when nobody was seen to serve.
    idle_since_ms: Option<u64>,
}

impl Nexus {
    /// Takes the volume over from whoever serves it, where this one stands by. False where it does not.
    pub fn activate(&mut self, now_ms: u64) -> bool {
        if !matches!(self.config.purpose, Purpose::StandBy { .. }) {
            return false;
        }
        self.config.purpose = Purpose::Assemble;
        self.set_state(VolumeState::Assembling("taking the volume over".to_owned()));
        self.assembly_restart();
        self.settle(now_ms);
        true
    }

    /// How long between two looks.
    fn watch_ms(&self) -> u64 {
        (self.config.lease_ms / 2).max(10)
    }

    /// One more child can be looked at.
    pub(crate) fn watch_child(&mut self, child: ChildId) {
        let round = self.assembling().round;
        self.ask(child, round, ChildOp::ReadRegister);
    }

    pub(crate) fn watched(&mut self, child: ChildId, reply: ChildReply) {
        let Ok(register) = reply else { return };
        self.assembling().registers[usize::from(child.0)] = Some(register);
        self.watch.heard = self.watch.heard.with(child);
        self.learn_size();
    }

    /// The volume may have grown.
    fn learn_size(&mut self) {
        let Some(found) = self.highest() else { return };
        let blocks = found.config.blocks;
        if blocks != self.config.blocks {
            self.config.blocks = blocks;
            self.push_event(Event::Resized(blocks));
        }
    }

    /// A round is over: what it told, and the next.
    pub(crate) fn watch_timeout(&mut self, now_ms: u64) {
        let since_ms = *self.watch.since_ms.get_or_insert(now_ms);
        let served = self.is_served();
        match served {
            Some(false) => {
                self.watch.idle_since_ms.get_or_insert(now_ms);
            }
            Some(true) | None => self.watch.idle_since_ms = None,
        }
        let auto = match self.config.purpose {
            Purpose::StandBy { auto_after_ms } => auto_after_ms,
            Purpose::Create | Purpose::Assemble | Purpose::ForceStart { .. } => None,
        };
        // Twice, lest the first lease of a nexus that has just come up be on its way.
        let idle = self.watch.idle_since_ms.is_some_and(|since| now_ms >= since + self.watch_ms());
        if idle && auto.is_some_and(|after| now_ms >= since_ms + after) {
            self.activate(now_ms);
            return;
        }
        self.tell_who_serves(served, auto.is_some());
        self.round += 1;
        let (round, watch_ms) = (self.round, self.watch_ms());
        let assembly = self.assembling();
        assembly.round = round;
        assembly.deadline_ms = Some(now_ms + watch_ms);
        self.watch.heard = ChildSet::EMPTY;
        for child in self.connected().iter() {
            self.ask(child, round, ChildOp::ReadRegister);
        }
    }

    /// Whether a nexus serves the volume; nothing where too few were heard to tell.
    fn is_served(&self) -> Option<bool> {
        let found = self.highest()?;
        let (voters, unknown) = self.voters_of(&found.config);
        let heard = voters.and(self.watch.heard);
        let registers = self.assembly.as_ref().map_or(&[][..], |a| &a.registers);
        let leased = heard
            .iter()
            .any(|c| registers[usize::from(c.0)].as_ref().is_some_and(|r| r.lease_ms > 0));
        if leased {
            return Some(true);
        }
        (heard.len() > (voters.len() + unknown.len()) / 2).then_some(false)
    }

    fn tell_who_serves(&mut self, served: Option<bool>, auto: bool) {
        let text = match (served, auto) {
            (Some(true), _) => "another nexus serves the volume".to_owned(),
            (Some(false), true) => {
                "no nexus serves the volume; this one takes over in a moment".to_owned()
            }
            (Some(false), false) => {
                "no nexus serves the volume; `cairn volume takeover` has this one do it".to_owned()
            }
            (None, _) => {
                let missing = self.everybody().without(self.watch.heard);
                format!("too few replicas answer; waiting for {}", self.names(missing, ", "))
            }
        };
        self.set_state(VolumeState::StandBy(text));
    }

    /// Starts to look, where this one is to.
    pub(crate) fn begin_watch(&mut self) {
        let stands_by = matches!(self.config.purpose, Purpose::StandBy { .. });
        if let Some(assembly) = self.assembly.as_mut().filter(|_| stands_by) {
            assembly.stage = Stage::Watch;
            // At the first call with the time.
            assembly.deadline_ms = Some(0);
            self.state = VolumeState::StandBy("looking for its replicas".to_owned());
        }
    }
}
