//! Steps that are told instead of drawn, and the states that a crash during them may leave.

use super::*;

/// What a script may do to the replica that was made first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Create,
    Write { lba: u64, blocks: u64, fua: bool },
    Discard { lba: u64, blocks: u64 },
    Zeroes { lba: u64, blocks: u64, unmap: bool },
    Flush,
    Snapshot,
    DeleteSnapshot,
    Revert,
    Delete,
    Register,
    Checkpoint,
}

impl World {
    /// A small world for scripts: replicas of two extents, of which the first blocks are looked at.
    pub(crate) fn small(zeroed: bool, seed: u64) -> Self {
        let mut world = Self::new(8 * MIB, zeroed, seed);
        world.extents = 2;
        world.looked_at = 8;
        world.sim.check = false;
        world
    }

    /// Begins a step. False where there is nothing that it could be done to.
    pub(crate) fn perform(&mut self, step: Step) -> bool {
        let before = self.sim.next_tag;
        let snapshot =
            self.snapshots.iter().find(|(_, s)| s.answered && !s.delete_asked).map(|(key, _)| *key);
        match (step, snapshot) {
            (Step::Create, _) => self.create(),
            (Step::Flush, _) => self.flush(),
            (Step::Snapshot, _) => self.take(),
            (Step::DeleteSnapshot, Some(of)) => self.delete_snapshot(of),
            (Step::Revert, Some(of)) => self.revert(of),
            (Step::DeleteSnapshot | Step::Revert, None) => {}
            (Step::Delete, _) => self.delete(),
            (Step::Register, _) => self.register(),
            (Step::Checkpoint, _) => self.checkpoint(),
            (Step::Write { lba, blocks, fua }, _) => self.io_by(IoOp::Write { fua }, lba, blocks),
            (Step::Discard { lba, blocks }, _) => self.io_by(IoOp::Discard, lba, blocks),
            (Step::Zeroes { lba, blocks, unmap }, _) => {
                self.io_by(IoOp::WriteZeroes { unmap, fua: false }, lba, blocks);
            }
        }
        self.sim.next_tag > before
    }

    fn io_by(&mut self, op: IoOp, lba: u64, blocks: u64) {
        let Some((id, slot)) = self.pick() else { return };
        self.io_at(id, slot, op, lba, blocks);
    }

    /// Whether something is under way.
    pub(crate) fn is_busy(&self) -> bool {
        self.sim.disk.in_flight() > 0
    }

    /// One event, its answers taken. False where nothing is under way.
    pub(crate) fn advance(&mut self) -> bool {
        let moved = self.sim.step();
        self.collect();
        moved
    }

    /// What a start makes of `disk`, as a crash may leave it now; all that was promised is verified.
    pub(crate) fn after_crash(&self, disk: Disk, seed: u64, power: bool) -> Self {
        let mut sim = Sim::open(disk, seed);
        sim.check = false;
        let world = Self {
            sim,
            replicas: self.replicas.clone(),
            snapshots: self.snapshots.clone(),
            asked: BTreeMap::new(),
            ..*self
        };
        world.recovered(power)
    }
}
