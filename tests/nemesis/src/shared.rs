//! What the threads of a run share.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use crate::api::Places;
use crate::host::Did;
use crate::plan::NODES;
use crate::trace::Trace;
use crate::volume::{Tenure, Volume};

/// What hosts do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// They make requests.
    Work = 0,
    /// They end what is under way.
    Drain = 1,
    /// They read every block.
    Verify = 2,
    /// They stop at once.
    End = 3,
}

/// What the threads of a run share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) volumes: Vec<Mutex<Volume>>,
    /// Size of each volume.
    pub(crate) blocks: u64,
    pub(crate) trace: Trace,
    pub(crate) did: Mutex<Did>,
    /// Where replicas are, also those that came later.
    pub(crate) places: Mutex<Places>,
    /// Snapshots that were read whole, and replicas that were replaced.
    pub(crate) snapshots: Mutex<u64>,
    pub(crate) replaced: Mutex<u64>,
    /// For each node the ends of its lives so far; the number of ends, if it is up, is its life's.
    lives: [Mutex<Lives>; NODES],
    phase: AtomicU8,
    failure: Mutex<Option<Failure>>,
}

#[derive(Debug, Default)]
struct Lives {
    ends: Vec<Instant>,
    up: bool,
}

/// Why a run failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// As `[check] what`.
    pub(crate) what: String,
    pub(crate) volume: Option<usize>,
}

impl Shared {
    pub(crate) fn new(volumes: Vec<Volume>, blocks: u64, trace: Trace) -> Self {
        Self {
            volumes: volumes.into_iter().map(Mutex::new).collect(),
            blocks,
            trace,
            did: Mutex::new(Did::default()),
            places: Mutex::default(),
            snapshots: Mutex::default(),
            replaced: Mutex::default(),
            lives: Default::default(),
            phase: AtomicU8::new(Phase::Work as u8),
            failure: Mutex::new(None),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Work,
            1 => Phase::Drain,
            2 => Phase::Verify,
            _ => Phase::End,
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The run has failed; the first reason counts.
    pub(crate) fn fail(&self, what: String, volume: Option<usize>) {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            self.trace.say("FAILED", &what);
            *failure = Some(Failure { what, volume });
        }
        self.set_phase(Phase::End);
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.failure.lock().clone()
    }

    /// The process that a node has, or would have next.
    pub(crate) fn tenure(&self, node: usize) -> Tenure {
        Tenure { node, life: self.lives[node].lock().ends.len() as u64 }
    }

    pub(crate) fn began(&self, node: usize) {
        self.lives[node].lock().up = true;
    }

    pub(crate) fn ended(&self, node: usize) {
        let mut lives = self.lives[node].lock();
        lives.up = false;
        lives.ends.push(Instant::now());
    }

    pub(crate) fn is_up(&self, node: usize) -> bool {
        self.lives[node].lock().up
    }

    /// When a process ended.
    pub(crate) fn died(&self, of: Tenure) -> Option<Instant> {
        let life = usize::try_from(of.life).ok()?;
        self.lives[of.node].lock().ends.get(life).copied()
    }
}
