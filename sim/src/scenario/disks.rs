//! A pool on several disks: disks are added and removed while hosts work, and one may die.

use super::Run;
use crate::rng::Rng;
use crate::world::MS;

/// What becomes of the disks of the pool that has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// What a disk holds moves to the others, and it leaves.
    Remove(usize),
    Add,
    /// Nothing can be done with one any more: what only it held is lost, and its pool goes on.
    Die,
}

/// What is planned for them, and when.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pool: usize,
    plan: Vec<(u64, Wish)>,
}

impl Disks {
    /// For a pool that has several. One dies only in the pool that may be lost, and where others have what it held.
    pub(super) fn drawn(seed: u64, pool: usize, now: u64, may_die: bool) -> Self {
        let mut rng = Rng::new(seed ^ 0xd15c);
        let most = [50, 400, 2_000][rng.index(3)] * MS;
        let mut wish = || match rng.index(4) {
            0 if may_die => Wish::Die,
            0 | 1 => Wish::Add,
            _ => Wish::Remove(rng.index(3)),
        };
        let wishes: Vec<Wish> = (0..3).map(|_| wish()).collect();
        let count = rng.index(4);
        let plan = wishes.into_iter().take(count).map(|wish| (now + rng.below(most), wish));
        Self { pool, plan: plan.collect() }
    }

    /// One dies whatever else is drawn.
    pub(super) fn lose_one(&mut self, seed: u64, now: u64) {
        let mut rng = Rng::new(seed ^ 0xd1e5);
        self.plan.push((now + rng.below(500 * MS), Wish::Die));
    }

    /// When something is to be done next.
    pub(super) fn next(&self) -> u64 {
        self.plan.iter().map(|(at, _)| *at).min().unwrap_or(u64::MAX)
    }

    /// Nothing more is planned.
    pub(super) fn stop(&mut self) {
        self.plan.clear();
    }
}

impl Run {
    /// Whether a volume has no member in sync but those in a pool that has lost a disk: the others were out when it
    /// died, or before that was seen. What only that disk had is gone then, and is an error for ever.
    pub(super) fn is_lost_with_a_disk(&mut self) -> bool {
        let reports = self.cluster.volumes().unwrap_or_default();
        reports.iter().any(|report| {
            // A process that does not serve the volume knows of no member in sync.
            let mut left = report.children.iter().filter(|c| c.in_sync && !c.witness).peekable();
            left.peek().is_some()
                && left.all(|c| self.cluster.may_have_lost(self.cluster.pool_of(c.replica)))
        })
    }

    /// Does what is planned for the disks of a pool.
    pub(super) fn change_disks(&mut self, now: u64) {
        let due: Vec<_> = self.disks.plan.extract_if(.., |(at, _)| *at <= now).collect();
        let pool = self.disks.pool;
        for (_, wish) in due {
            // What comes of it is the pool's to remember: a process that dies takes it up again.
            match wish {
                Wish::Remove(number) => drop(self.cluster.remove_disk(pool, number)),
                Wish::Add => drop(self.cluster.add_disk(pool)),
                Wish::Die => {
                    let disk = self.cluster.disk(pool);
                    let mut world = self.cluster.world();
                    world.say(format_args!("a disk of pool {pool} dies"));
                    let disk = world.disk(disk);
                    (disk.trouble.eio_per_mille, disk.has_failed) = (1000, true);
                }
            }
        }
    }
}
