//! Every short script of operations, crashed at every point in every way.
//!
//! A point is where the states that a crash may leave change, or where more was promised. The states of
//! a power cut are every subset of the writes that no flush covers, and each of those writes torn at 512
//! bytes; those of a kill, every subset of the operations in flight. Where more than [`ALL`] are
//! uncovered, the subsets are those of at most two, those that lack at most two, and [`DRAWN`] drawn by
//! chance. Where a write has more than four blocks, the first two and the last are torn.

use std::fmt::Write as _;

use cairn_replica::{CheckOptions, Device, Problem, Severity, SparseDevice, check_pool};

use super::world::World;
use super::world::script::Step;
use super::{BLOCK, Change, Disk, Next, Rng, apply};

/// Of so many changes all subsets are visited.
const ALL: usize = 10;
/// Subsets of more that are drawn.
const DRAWN: usize = 64;

/// What scripts are made of. Blocks 0 and 1 are in one extent, 256 in another.
pub(crate) const STEPS: [Step; 14] = [
    Step::Write { lba: 0, blocks: 1, fua: false },
    Step::Write { lba: 1, blocks: 2, fua: false },
    Step::Write { lba: 256, blocks: 1, fua: false },
    Step::Write { lba: 0, blocks: 1, fua: true },
    Step::Discard { lba: 0, blocks: 256 },
    Step::Zeroes { lba: 0, blocks: 1, unmap: false },
    Step::Flush,
    Step::Snapshot,
    Step::DeleteSnapshot,
    Step::Register,
    Step::Checkpoint,
    Step::Create,
    Step::Revert,
    Step::Delete,
];

/// How a script is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Which of [`STEPS`], in order.
    pub(crate) script: u64,
    pub(crate) depth: u32,
    pub(crate) variant: u64,
    /// For what is drawn.
    pub(crate) seed: u64,
}

/// Where scripts begin, whether each step waits for the one before, and what the disk does first.
pub(crate) const VARIANTS: u64 = 6;

impl Plan {
    /// Scripts of `depth` steps.
    pub(crate) fn count(depth: u32) -> u64 {
        (STEPS.len() as u64).pow(depth)
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        let mut rest = self.script;
        (0..self.depth)
            .map(|_| {
                let at = usize::try_from(rest % STEPS.len() as u64).unwrap();
                rest /= STEPS.len() as u64;
                STEPS[at]
            })
            .collect()
    }

    /// Whether the steps are all begun before any is answered.
    fn together(&self) -> bool {
        !self.variant.is_multiple_of(3)
    }

    fn next(&self) -> Next {
        if self.variant % 3 == 2 { Next::Newest } else { Next::Oldest }
    }

    /// Whether it begins with data and a snapshot of it, all of it clean.
    fn on_snapshot(&self) -> bool {
        self.variant >= 3
    }
}

/// How many states were visited, and which one it is.
#[derive(Default)]
pub(crate) struct Visits {
    pub(crate) states: u64,
    /// What is being visited: for the report of a violation.
    pub(crate) at: String,
}

/// Runs a script and visits its states. Those of its first steps alone are left to shorter scripts.
pub(crate) fn visit(plan: &Plan, visits: &mut Visits) {
    let mut world = World::small((plan.script + plan.variant).is_multiple_of(2), plan.seed);
    let mut begin = vec![Step::Create];
    if plan.on_snapshot() {
        let write = |lba| Step::Write { lba, blocks: 2, fua: true };
        begin.extend([write(0), write(256), Step::Snapshot, Step::Checkpoint]);
    }
    for step in begin {
        world.perform(step);
        world.settle();
    }
    world.sim.disk.next = plan.next();
    let steps = plan.steps();
    let (last, before) = steps.split_last().expect("at least one step");
    if plan.together() {
        for &step in before {
            world.perform(step);
            world.sim.issue();
        }
    } else {
        for &step in before {
            world.perform(step);
            while world.advance() {}
        }
    }
    if !world.perform(*last) {
        return;
    }
    world.sim.issue();
    let mut seen = None;
    loop {
        let point = (world.sim.disk.changes, world.answers);
        if seen != Some(point) {
            seen = Some(point);
            crash_here(&world, plan, visits);
        }
        if !world.advance() {
            break;
        }
    }
}

/// The changes that no flush covers, in order, and whether one must be there all the same.
fn uncovered(disk: &Disk) -> Vec<(Change, bool)> {
    let logged = disk.log.iter().map(|logged| (logged.change.clone(), logged.must_stay));
    logged.chain(disk.in_flight_changes().map(|change| (change, false))).collect()
}

fn subsets(n: usize, rng: &mut Rng) -> Vec<Vec<bool>> {
    if n <= ALL {
        return (0..1u32 << n).map(|bits| (0..n).map(|i| bits >> i & 1 != 0).collect()).collect();
    }
    let mut all = vec![vec![false; n], vec![true; n]];
    for i in 0..n {
        for j in i..n {
            for base in [false, true] {
                let mut subset = vec![base; n];
                subset[i] = !base;
                subset[j] = !base;
                all.push(subset);
            }
        }
    }
    all.extend((0..DRAWN).map(|_| (0..n).map(|_| rng.chance(50)).collect()));
    all
}

fn crash_here(world: &World, plan: &Plan, visits: &mut Visits) {
    let disk = &world.sim.disk;
    let mut rng = Rng(plan.seed ^ plan.script);
    let changes = uncovered(disk);
    let free = changes.iter().filter(|(_, forced)| !forced).count();
    for subset in subsets(free, &mut rng) {
        let mut dev = disk.stable.clone();
        let mut chosen = subset.iter();
        for (change, forced) in &changes {
            if *forced || *chosen.next().unwrap() {
                apply(&mut dev, change);
            }
        }
        note(visits, plan, world, format_args!("power cut, of the uncovered writes {subset:?}"));
        verify(world, dev, plan, true, visits);
    }
    for (torn, (change, forced)) in changes.iter().enumerate() {
        // The others are all there, or none is, or those before it are.
        for others in 0..3 {
            if *forced || (others == 2 && (torn == 0 || torn + 1 == changes.len())) {
                continue;
            }
            tears(change, |page, sectors, garbage| {
                let mut dev = disk.stable.clone();
                for (i, (other, forced)) in changes.iter().enumerate() {
                    if i == torn {
                        tear_at(&mut dev, change, page, sectors, garbage);
                    } else if *forced || others == 0 || (others == 2 && i < torn) {
                        apply(&mut dev, other);
                    }
                }
                let which = ["all there", "missing", "there if before it"][others];
                let how = format_args!(
                    "power cut, change {torn} torn in block {page}, there are sectors \
                     {sectors:08b} (garbage: {garbage}), the others {which}"
                );
                note(visits, plan, world, how);
                verify(world, dev, plan, true, visits);
            });
        }
    }
    let flying: Vec<Change> = disk.in_flight_changes().collect();
    for subset in subsets(flying.len(), &mut rng) {
        let mut dev = disk.now.clone();
        for (change, _) in flying.iter().zip(&subset).filter(|(_, there)| **there) {
            apply(&mut dev, change);
        }
        note(visits, plan, world, format_args!("killed, of those in flight {subset:?}"));
        verify(world, dev, plan, false, visits);
    }
}

/// The ways in which a power cut tears a write: which block, which of its sectors are there, and whether
/// the first one is garbage.
fn tears(change: &Change, mut each: impl FnMut(usize, u8, bool)) {
    let (at, blocks) = match change {
        Change::Write(at, data) => (*at, data.len() / BLOCK),
        Change::Zero(at, len) => (*at, usize::try_from(*len).unwrap() / BLOCK),
    };
    let pages: Vec<usize> =
        if blocks <= 4 { (0..blocks).collect() } else { vec![0, 1, blocks - 1] };
    for page in pages {
        for k in 1..8 {
            each(page, (1 << k) - 1, false);
        }
        for sector in 1..8 {
            each(page, 1 << sector, false);
        }
        if at < 2 * BLOCK as u64 {
            each(page, 0, true);
        }
    }
}

fn tear_at(dev: &mut SparseDevice, change: &Change, torn: usize, sectors: u8, garbage: bool) {
    let (at, len) = match change {
        Change::Write(at, data) => (*at, data.len()),
        Change::Zero(at, len) => (*at, usize::try_from(*len).unwrap()),
    };
    let mut old = vec![0; BLOCK];
    let offset = at + (torn * BLOCK) as u64;
    dev.read_at(offset, &mut old).unwrap();
    // The rest of it is there.
    apply(dev, change);
    for sector in 0..8 {
        let bytes = sector * 512..(sector + 1) * 512;
        if sectors >> sector & 1 != 0 {
            match change {
                Change::Write(_, data) => {
                    let from = torn * BLOCK + bytes.start;
                    old[bytes].copy_from_slice(&data[from..from + 512]);
                }
                Change::Zero(..) => old[bytes].fill(0),
            }
        }
    }
    if garbage {
        old[..512].fill(0xbd);
    }
    assert!(torn * BLOCK < len);
    dev.write_at(offset, &old).unwrap();
}

fn note(visits: &mut Visits, plan: &Plan, world: &World, how: std::fmt::Arguments<'_>) {
    visits.at.clear();
    let disk = &world.sim.disk;
    write!(
        visits.at,
        "{plan:?} ({:?}), after {} answers and {} changes: {how}",
        plan.steps(),
        world.answers,
        disk.changes
    )
    .unwrap();
}

/// Every so many states the check of a pool looks at it too, and everything is let come to rest.
const LOOKED_AT: u64 = 8;

fn verify(world: &World, dev: SparseDevice, plan: &Plan, power: bool, visits: &mut Visits) {
    visits.states += 1;
    let closely = visits.states.is_multiple_of(LOOKED_AT);
    if closely {
        let options = CheckOptions { repair: false, data: true };
        let report = check_pool(&mut dev.clone(), &options).unwrap();
        for finding in &report.findings {
            let torn =
                matches!(finding.problem, Problem::Superblock { .. } | Problem::CatalogCopy { .. });
            let usual = finding.problem.severity() == Severity::Note || torn;
            assert!(usual, "the check finds after a crash: {}", finding.problem);
        }
    }
    let mut world = world.after_crash(Disk::new(dev), plan.seed + visits.states, power);
    if closely {
        world.settle();
        world.verify_all(false);
    }
}
