//! Reconcile: after a nexus that was not closed in order, what its last changes reached may differ.
//!
//! Every replica says what is open there. Where an extent is open on one of the members, or one has
//! something in it and another has not (it was discarded whole, and a mark went with it), the members are made
//! alike before anybody reads it; the rest is served at once. Nothing else is looked at.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::{IoStatus, Lba, LbaRange, Memory};

use crate::bits::Bits;
use crate::children::{ChildState, FaultReason};
use crate::nexus::Nexus;
use crate::slots::ChildSet;
use crate::types::{ChildId, Event, MAX_CHILDREN, VolumeState, change};
use crate::upkeep::{Answered, Asked, EXTENT_BLOCKS, PAGE};

/// Extents that are made alike at once, unless a host waits for one.
const AT_ONCE: usize = 3;

/// A child that could not tell is asked again after so long.
const ASK_AGAIN_MS: u64 = 50;

/// What is being done about it.
#[derive(Debug)]
pub(crate) struct Reconcile {
    /// Members are still telling.
    learning: bool,
    /// How far each has told.
    told: [u32; MAX_CHILDREN],
    since_ms: u64,
    /// After an answer of no use nobody is asked before then.
    again_ms: u64,
    /// What is open, what any member has something in, and what a member has nothing in.
    pending: Bits,
    any: Bits,
    lacking: Bits,
    /// Who is believed first: whose machine did not lose power since the configuration was stored.
    preferred: ChildSet,
    total: usize,
    /// Being made alike.
    running: Vec<u32>,
    scan: u32,
    /// Extents that somebody waits for, and who.
    urgent: VecDeque<u32>,
    waiting: Vec<u16>,
}

impl Nexus {
    /// Whether it is not known yet what may differ: nothing is served.
    pub(crate) fn learns(&self) -> bool {
        self.reconcile.as_ref().is_some_and(|r| r.learning)
    }

    /// Extents that may still differ, and how many there were.
    #[must_use]
    pub fn unreconciled(&self) -> (usize, usize) {
        self.reconcile.as_ref().map_or((0, 0), |r| (r.pending.len(), r.total))
    }

    /// The epoch's first configuration is stored: find out what may differ.
    pub(crate) fn begin_reconcile(&mut self, now_ms: u64) {
        let extents = self.extents();
        let steady = |c: &ChildId| {
            let child = &self.children[usize::from(c.0)];
            child.found_life == 0 || child.found_life == child.incarnation
        };
        let preferred = self.in_sync.iter().filter(steady).fold(ChildSet::EMPTY, ChildSet::with);
        self.reconcile = Some(Reconcile {
            learning: true,
            told: [0; MAX_CHILDREN],
            since_ms: now_ms,
            again_ms: 0,
            pending: Bits::with_len(extents),
            any: Bits::with_len(extents),
            lacking: Bits::with_len(extents),
            preferred,
            total: 0,
            running: Vec::new(),
            scan: 0,
            urgent: VecDeque::new(),
            waiting: Vec::new(),
        });
        // What the marks say is settled once all is alike.
        self.note_change(now_ms);
        self.begin_recovery();
    }

    /// Whether a request has to wait until what it touches is alike; then it is remembered here.
    pub(crate) fn waits_for_reconcile(&mut self, at: u16, range: LbaRange) -> bool {
        let Some(r) = self.reconcile.as_mut() else { return false };
        if on(Mutant::ReadBeforeReconcile) {
            return false;
        }
        let (mut extent, end) = span(range);
        let mut waits = false;
        while let Some(next) = r.pending.next(extent).filter(|&next| next < end) {
            // One that touches everything does not make all of it urgent.
            if r.urgent.len() < 64 && !r.urgent.contains(&next) {
                r.urgent.push_back(next);
            }
            waits = true;
            extent = next + 1;
            if r.urgent.len() >= 64 {
                break;
            }
        }
        if waits {
            r.waiting.push(at);
            self.mends.kick();
        }
        waits
    }

    /// Moves it on. Returns whether anything changed.
    pub(crate) fn pump_reconcile<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        if self.reconcile.is_none() || self.assembly.is_some() {
            return false;
        }
        if let Some(moved) = self.pump_recovery(mem, now_ms) {
            return moved;
        }
        if self.learns() { self.learn(mem, now_ms) } else { self.make_alike(now_ms) }
    }

    fn learn<M: Memory>(&mut self, mem: &mut M, now_ms: u64) -> bool {
        let extents = self.extents();
        let limit = self.config.child_deadline_ms;
        let mut moved = false;
        let mut done = true;
        for child in self.in_sync.without(self.failing()).iter() {
            let Some(r) = self.reconcile.as_ref() else { return moved };
            let first = r.told[usize::from(child.0)];
            if first >= extents || self.in_sync.len() == 1 {
                continue;
            }
            done = false;
            if now_ms < r.again_ms {
                continue;
            }
            if self.upkeep.waits_for(Asked::Learn, child) {
                continue;
            }
            if self.is_usable(child) {
                moved |= self.ask_changes(child, Asked::Learn, (first, u64::MAX), mem, now_ms);
            } else if self.child(child).state == ChildState::Disconnected
                || now_ms.saturating_sub(self.reconcile_since()) > limit
            {
                // Nothing is served from one that does not say what it has; the others go on.
                self.fail_child(child, FaultReason::Unreachable);
            }
        }
        // One that is on its way out may still be believed by a reader.
        if done && self.commit.is_none() && self.failing().and(self.in_sync).is_empty() {
            self.learnt();
            return true;
        }
        moved
    }

    /// Since when it is waited for what members are to tell, or to put back.
    pub(crate) fn reconcile_since(&self) -> u64 {
        self.reconcile.as_ref().map_or(0, |r| r.since_ms)
    }

    /// A step is over: for the next one members are waited for anew.
    pub(crate) fn learn_from(&mut self, now_ms: u64) {
        if let Some(r) = self.reconcile.as_mut() {
            r.since_ms = now_ms;
        }
    }

    /// A member has told of some extents.
    pub(crate) fn learn_answered<M: Memory>(&mut self, answer: &Answered, mem: &mut M) {
        let child = answer.child;
        match (answer.status, &answer.buf) {
            (IoStatus::Ok, Some(buf)) => {
                let extents = self.extents();
                let Some(r) = self.reconcile.as_mut().filter(|r| r.learning) else { return };
                let first = r.told[usize::from(child.0)];
                let count = extents.saturating_sub(first).min(PAGE);
                let bytes = mem.bytes(buf.slice());
                for (extent, &byte) in (first..first + count).zip(bytes) {
                    if byte & change::OPEN != 0 {
                        r.pending.insert(extent);
                    }
                    let side = if byte & change::MAPPED != 0 { &mut r.any } else { &mut r.lacking };
                    side.insert(extent);
                }
                r.told[usize::from(child.0)] = first + count;
            }
            (status, _) => {
                let again_ms = self.now_ms + ASK_AGAIN_MS;
                if let Some(r) = self.reconcile.as_mut() {
                    r.again_ms = again_ms;
                }
                if status != IoStatus::PathError {
                    // The last one is asked again: there is nobody else.
                    self.fail_child(child, FaultReason::Failed(status));
                }
            }
        }
    }

    /// Everybody has told.
    fn learnt(&mut self) {
        let alone = self.in_sync.len() == 1;
        let Some(r) = self.reconcile.as_mut() else { return };
        let mut from = 0;
        while let Some(extent) = r.any.next(from) {
            if r.lacking.has(extent) && !on(Mutant::ReconcileOpenOnly) {
                r.pending.insert(extent);
            }
            from = extent + 1;
        }
        (r.any, r.lacking) = (Bits::default(), Bits::default());
        r.learning = false;
        r.total = r.pending.len();
        if alone {
            r.pending = Bits::default();
        }
        if on(Mutant::ReconcileSkipped) {
            r.pending = Bits::default();
        }
        let total = r.pending.len();
        self.push_event(Event::Reconciling(total as u64));
        self.update_state();
        self.mends.kick();
    }

    fn make_alike(&mut self, now_ms: u64) -> bool {
        let alone = self.in_sync.len() == 1;
        let blocks = self.config.blocks;
        let mut moved = false;
        loop {
            let Some(r) = self.reconcile.as_mut() else { return moved };
            if alone && r.running.is_empty() {
                r.pending = Bits::default();
            }
            if r.pending.is_empty() {
                let waiting = core::mem::take(&mut r.waiting);
                self.reconcile = None;
                self.push_event(Event::Reconciled);
                self.store_lives();
                self.go_on(waiting, now_ms);
                return true;
            }
            if r.running.len() >= AT_ONCE {
                return moved;
            }
            let wanted = loop {
                match r.urgent.pop_front() {
                    Some(at) if r.running.contains(&at) || !r.pending.has(at) => {}
                    other => break other,
                }
            };
            let next = wanted.or_else(|| {
                let mut at = r.pending.next(r.scan).or_else(|| r.pending.next(0));
                for _ in 0..=AT_ONCE {
                    match at {
                        Some(extent) if r.running.contains(&extent) => {
                            at = r.pending.next(extent + 1);
                        }
                        _ => break,
                    }
                }
                at
            });
            let Some(extent) = next else { return moved };
            let start = u64::from(extent) * EXTENT_BLOCKS;
            if start >= blocks {
                r.pending.remove(extent);
                continue;
            }
            let len = EXTENT_BLOCKS.min(blocks - start);
            let range = LbaRange::new(Lba(start), len).expect("inside the volume");
            let preferred = r.preferred;
            if !self.begin_alike(range, preferred) {
                return moved;
            }
            let Some(r) = self.reconcile.as_mut() else { return moved };
            r.running.push(extent);
            r.scan = extent + 1;
            moved = true;
        }
    }

    /// The members are alike in this range; or, where it is not sure, it is done again.
    pub(crate) fn made_alike(&mut self, range: LbaRange, sure: bool, now_ms: u64) {
        let Some(r) = self.reconcile.as_mut() else { return };
        let (extent, _) = span(range);
        r.running.retain(|&other| other != extent);
        if !sure {
            return;
        }
        r.pending.remove(extent);
        let free = |range: LbaRange| {
            let (first, end) = span(range);
            r.pending.next(first).is_none_or(|next| next >= end)
        };
        let slots = &mut self.slots;
        let go = r
            .waiting
            .iter()
            .copied()
            .filter(|&at| slots.get(at).is_some_and(|slot| free(slot.request.range)))
            .collect::<Vec<u16>>();
        r.waiting.retain(|at| !go.contains(at));
        // Those that wait for more name the next.
        if let Some(&at) = r.waiting.first()
            && r.urgent.is_empty()
            && let Some(slot) = slots.get(at)
        {
            let (first, end) = span(slot.request.range);
            r.urgent.extend(r.pending.next(first).filter(|&next| next < end));
        }
        self.go_on(go, now_ms);
    }

    fn go_on(&mut self, waiting: Vec<u16>, now_ms: u64) {
        for at in waiting {
            self.admit(at, now_ms);
        }
        self.settle(now_ms);
    }

    /// Nothing waits any more: every request was answered.
    pub(crate) fn abandon_reconcile(&mut self) {
        if self.learns() {
            // Nothing is to be served of what was not looked at.
            self.reconcile = None;
        }
        if let Some(r) = self.reconcile.as_mut() {
            r.waiting.clear();
        }
    }

    /// What is told while it is being learnt.
    pub(crate) fn learning_state(&self) -> VolumeState {
        let learning = || "learning what was being written when it was last served".to_owned();
        VolumeState::Assembling(self.undoing_text().unwrap_or_else(learning))
    }
}

/// The extents that a range touches.
pub(crate) fn span(range: LbaRange) -> (u32, u32) {
    let extent = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
    let first = extent(range.start().0 / EXTENT_BLOCKS);
    (first, extent(range.end().0.div_ceil(EXTENT_BLOCKS)))
}
