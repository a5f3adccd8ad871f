//! What goes wrong and when: pure data, drawn from a seed.

use std::fmt;

use cairn_sim::Rng;

/// Nodes of the cluster.
pub(crate) const NODES: usize = 3;
/// Between two kills, in milliseconds, at least and at most.
const KILL_EVERY: (u64, u64) = (3_500, 6_000);
/// Between two other faults.
const FAULT_EVERY: (u64, u64) = (2_000, 5_000);

/// Between two things that an operator does.
const OPERATOR_EVERY: (u64, u64) = (3_000, 9_000);

/// Before everybody loses power the caches are volatile for so long at least.
const CACHED_FOR: u64 = 2_000;

/// A volume of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeShape {
    /// Which nodes have a replica with data.
    pub(crate) data: Vec<usize>,
    /// Which one has a witness.
    pub(crate) witness: Option<usize>,
    /// Who serves it first.
    pub(crate) home: usize,
    /// Who stands by for it.
    pub(crate) standbys: Vec<usize>,
    pub(crate) encrypted: bool,
}

/// The cluster that a seed means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) volumes: Vec<VolumeShape>,
    pub(crate) lease_ms: u64,
    pub(crate) settle_ms: u64,
    pub(crate) child_deadline_ms: u64,
    /// Whether a loss of power tears pages.
    pub(crate) tears: bool,
}

/// How one life of a process is, from its start to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    /// What its disk has not flushed dies with it.
    pub(crate) volatile: bool,
    /// Its clock is too fast by so many parts in a million.
    pub(crate) rate_ppm: i64,
    pub(crate) seed: u64,
}

/// Who does not hear whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nobody hears the node, and it hears nobody.
    Node,
    /// The node and the other nodes do not hear each other; hosts do.
    Peers,
    /// The node and the hosts do not hear each other.
    Hosts,
    /// The node hears nobody, and is heard.
    Deaf,
    /// The node is heard by nobody, and hears.
    Mute,
    /// Of a hundred packets to and from the node so many are lost.
    Lossy(u64),
}

/// What goes wrong. What has an `aim` hits whoever serves that volume at the time, where that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL, and a start later. Of a process whose disk has a volatile cache it is a loss of power.
    Kill { nodes: Vec<usize>, down_ms: u64 },
    /// From now on the disks of these have volatile caches, until they are started again.
    Cache { nodes: Vec<usize> },
    /// SIGSTOP, and SIGCONT later.
    Pause { node: usize, aim: Option<usize>, for_ms: u64 },
    /// Packets are dropped.
    Partition { node: usize, aim: Option<usize>, cut: Cut, for_ms: u64 },
    /// Each disk operation takes about so long.
    SlowDisk { node: usize, ms: u64, for_ms: u64 },
    /// Reads, writes or both of a part of the disk fail; in units of 64 KiB.
    DiskError { node: usize, read: bool, write: bool, from: u64, units: u64, for_ms: u64 },
    /// The disk has no room for what was never written.
    FullDisk { node: usize, for_ms: u64 },
    /// The wall clock jumps, and stays so.
    ClockJump { node: usize, seconds: i64 },
    /// Somebody who stands by takes a volume over.
    TakeOver { volume: usize, standby: usize },
    /// A snapshot is taken, and its clone is read.
    Snapshot { volume: usize, number: u64 },
    /// A replica is replaced by a new one on its node; with `now`, at once.
    Replace { volume: usize, node: usize, now: bool },
}

impl Fault {
    /// Its name, in Jepsen's words where it has one.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Kill { nodes, .. } if nodes.len() == NODES => "kill-all",
            Self::Kill { .. } => "kill",
            Self::Cache { .. } => "volatile-caches",
            Self::Pause { .. } => "pause",
            Self::Partition { cut: Cut::Lossy(_), .. } => "packet-loss",
            Self::Partition { cut: Cut::Deaf | Cut::Mute, .. } => "partition-one-way",
            Self::Partition { .. } => "partition",
            Self::SlowDisk { .. } => "slow-disk",
            Self::DiskError { .. } => "disk-error",
            Self::FullDisk { .. } => "full-disk",
            Self::ClockJump { .. } => "clock-jump",
            Self::TakeOver { .. } => "take-over",
            Self::Snapshot { .. } => "snapshot",
            Self::Replace { .. } => "replace",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A fault and its time, in milliseconds from the start of the faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) at_ms: u64,
    pub(crate) fault: Fault,
}

impl Shape {
    pub(crate) fn drawn(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x5ba9e);
        let mut volumes: Vec<_> = (0..2).map(|index| VolumeShape::drawn(&mut rng, index)).collect();
        // Drawn apart: nothing else changes with it.
        let mut apart = Rng::new(seed ^ 0xc4e9);
        for volume in &mut volumes {
            volume.encrypted = apart.chance(400);
        }
        Self {
            volumes,
            lease_ms: [400, 800, 1_600][rng.index(3)],
            settle_ms: [300, 1_000, 5_000][rng.index(3)],
            child_deadline_ms: [1_000, 2_000, 5_000][rng.index(3)],
            tears: rng.chance(300),
        }
    }
}

impl VolumeShape {
    /// The first volume always has three replicas, and somebody who stands by.
    fn drawn(rng: &mut Rng, index: usize) -> Self {
        let home = rng.index(NODES);
        let (a, b) = ((home + 1) % NODES, (home + 2) % NODES);
        let three = index == 0 || rng.chance(400);
        let data = match (three, rng.index(3)) {
            (true, _) => vec![0, 1, 2],
            (false, 0) => vec![home, a],
            (false, 1) => vec![home, b],
            (false, _) => vec![a, b],
        };
        let witness = (0..NODES).find(|node| !data.contains(node));
        let standbys = match (index, rng.index(3)) {
            (0, 0 | 1) | (_, 1) => vec![a],
            (_, 2) => vec![a, b],
            _ => Vec::new(),
        };
        Self { data, witness, home, standbys, encrypted: false }
    }
}

impl Life {
    /// The `number`-th life of a node.
    pub(crate) fn drawn(seed: u64, node: usize, number: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x11fe ^ (node as u64) << 48 ^ number << 20);
        let ppm = i64::try_from(rng.below(40_001)).expect("a small number") - 20_000;
        Self { volatile: rng.chance(500), rate_ppm: ppm, seed: rng.next_u64() }
    }
}

/// The faults of a run of so many milliseconds.
pub(crate) fn drawn(seed: u64, shape: &Shape, run_ms: u64) -> Vec<Event> {
    let mut rng = Rng::new(seed ^ 0xfa017);
    let mut events = Vec::new();
    let mut at_ms = 1_500;
    while at_ms < run_ms {
        let fault = kill(&mut rng);
        if let Fault::Kill { nodes, .. } = &fault
            && nodes.len() == NODES
            && rng.chance(700)
        {
            // So that everybody loses power.
            let fault = Fault::Cache { nodes: nodes.clone() };
            events.push(Event { at_ms: at_ms.saturating_sub(CACHED_FOR), fault });
        }
        events.push(Event { at_ms, fault });
        at_ms += rng.range(KILL_EVERY.0, KILL_EVERY.1);
    }
    let mut at_ms = 2_500;
    while at_ms < run_ms {
        events.push(Event { at_ms, fault: other(&mut rng, shape) });
        at_ms += rng.range(FAULT_EVERY.0, FAULT_EVERY.1);
    }
    operator(seed, shape, run_ms, &mut events);
    events.sort_by_key(|event| event.at_ms);
    events
}

/// What an operator does meanwhile; drawn apart: nothing else changes with it.
fn operator(seed: u64, shape: &Shape, run_ms: u64, events: &mut Vec<Event>) {
    let mut rng = Rng::new(seed ^ 0x09e7a);
    let (mut at_ms, mut number) = (3_000, 0);
    while at_ms < run_ms {
        let volume = rng.index(shape.volumes.len());
        let of = &shape.volumes[volume];
        number += 1;
        let fault = if rng.chance(600) {
            Fault::Snapshot { volume, number }
        } else {
            let node = of.data[rng.index(of.data.len())];
            Fault::Replace { volume, node, now: rng.chance(300) }
        };
        events.push(Event { at_ms, fault });
        at_ms += rng.range(OPERATOR_EVERY.0, OPERATOR_EVERY.1);
    }
}

fn kill(rng: &mut Rng) -> Fault {
    let first = rng.index(NODES);
    let nodes = match rng.below(20) {
        0..=13 => vec![first],
        14..=16 => vec![first, (first + 1) % NODES],
        _ => (0..NODES).collect(),
    };
    let down_ms = [20, 20, 300, 1_500][rng.index(4)] + rng.below(300);
    Fault::Kill { nodes, down_ms }
}

fn other(rng: &mut Rng, shape: &Shape) -> Fault {
    let node = rng.index(NODES);
    let aim = rng.chance(500).then(|| rng.index(shape.volumes.len()));
    let short = rng.range(200, 2_500);
    // Longer than a lease, and than what is waited for a replica.
    let long = rng.range(shape.lease_ms, shape.lease_ms + 4_000);
    match rng.below(20) {
        0..=3 => Fault::Pause { node, aim, for_ms: if rng.chance(500) { short } else { long } },
        4..=9 => {
            let cut = match rng.below(9) {
                0 | 1 => Cut::Node,
                2..=4 => Cut::Peers,
                5 => Cut::Hosts,
                6 => Cut::Deaf,
                7 => Cut::Mute,
                _ => Cut::Lossy(rng.range(2, 30)),
            };
            Fault::Partition { node, aim, cut, for_ms: long }
        }
        10..=12 => Fault::SlowDisk { node, ms: rng.range(2, 150), for_ms: long },
        13 | 14 => {
            let (read, write) = [(true, false), (false, true), (true, true)][rng.index(3)];
            let from = if rng.chance(200) { 0 } else { rng.below(1024) };
            let units = [1, 16, 1024][rng.index(3)];
            Fault::DiskError { node, read, write, from, units, for_ms: short }
        }
        15 => Fault::FullDisk { node, for_ms: short },
        16 | 17 => {
            let seconds = i64::try_from(rng.below(2_000_000)).expect("a small number") - 1_000_000;
            Fault::ClockJump { node, seconds }
        }
        _ => {
            let volume = rng.index(shape.volumes.len());
            let of = &shape.volumes[volume];
            let mut sides = of.standbys.clone();
            sides.push(of.home);
            Fault::TakeOver { volume, standby: sides[rng.index(sides.len())] }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_one_plan_with_enough_kills() {
        for seed in 0..50 {
            let shape = Shape::drawn(seed);
            let plan = drawn(seed, &shape, 600_000);
            assert_eq!(plan, drawn(seed, &shape, 600_000));
            let kills = plan.iter().filter(|e| matches!(e.fault, Fault::Kill { .. })).count();
            assert!(kills >= 115, "seed {seed}: {kills} kills");
            for volume in &shape.volumes {
                let members = volume.data.len() + usize::from(volume.witness.is_some());
                assert_eq!(members, 3, "a majority is left without one of them");
                assert!(!volume.standbys.contains(&volume.home));
            }
        }
    }
}
