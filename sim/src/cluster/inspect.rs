//! What is looked at from outside: disks as after a crash at that moment, registers, epochs.

use std::sync::mpsc::TryRecvError;

use cairn_block::{
    BlockSize, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId, SnapshotId,
};
use cairn_engine::VolumeReport;
use cairn_engine::replica::{DiskOp, MultiPool, OpenedSet, Register, ReplicaSlot, change};

use super::members::pool_of;
use super::{Cluster, keys, pools, volume_of};
use crate::checks::{Check, check};
use crate::disk::{PAGE, SimDisk};

/// Stands for what cannot be read.
const UNREADABLE: u8 = 0xee;
/// Blocks of a pool's extent.
const EXTENT_BLOCKS: usize = 256;

impl Cluster {
    /// A size that was acked is the volume's, or a larger one is, and its replicas have it.
    fn check_sizes(&self, volume: usize, report: &VolumeReport) {
        let mut possible = vec![self.config.blocks];
        for (_, blocks, answer) in self.growth.iter().filter(|(v, ..)| *v == volume) {
            possible.push(*blocks);
            if let Ok(Ok(())) = answer.try_recv() {
                check!(
                    Check::Sizes,
                    report.blocks >= *blocks,
                    "volume {volume} had grown to {blocks}: {report:?}"
                );
            }
        }
        check!(
            Check::Sizes,
            possible.contains(&report.blocks),
            "volume {volume}: {report:?}, of {possible:?}"
        );
        for child in &report.children {
            if child.state == "online" {
                let id = child.replica;
                let at = pool_of(id);
                let pool = pools::open(&mut self.copies(at)).pool;
                let has = pool.replicas().find(|r| r.id == id).map_or(0, |r| r.blocks);
                check!(
                    Check::Sizes,
                    has >= report.blocks,
                    "replica {at} has {has} blocks: {report:?}"
                );
            }
        }
    }

    /// Reads every pool of a volume's in-sync set directly and compares them. With `all`, no block may
    /// differ, whatever hosts were told of it.
    ///
    /// # Panics
    /// Where two of them differ in a block that must be alike, or a replica is smaller than its volume.
    pub fn compare(&mut self, all: bool) {
        let reports = self.volumes().expect("the nexus runs");
        for volume in 0..self.config.volumes {
            let name = format!("volume{volume}");
            let report = reports.iter().find(|r| r.name == name).expect("it is served");
            self.check_sizes(volume, report);
            let members = report.children.iter().filter(|child| child.in_sync);
            let members = members.map(|child| child.replica);
            let contents: Vec<(ReplicaId, Vec<u8>)> = members
                .filter(|id| !self.astray.contains(&pool_of(*id)))
                .map(|id| (id, self.contents(volume, id)))
                .collect();
            let history = self.history(volume);
            let Some(((first, a), rest)) = contents.split_first() else { continue };
            for (other, b) in rest {
                for (lba, (x, y)) in (0u64..).zip(a.chunks(PAGE).zip(b.chunks(PAGE))) {
                    if history.borrow().may_be_torn(lba) {
                        continue;
                    }
                    if x == y {
                        continue;
                    }
                    if history.borrow().is_others(lba) {
                        check!(
                            Check::MembersAlike,
                            !all,
                            "volume {volume} block {lba}: replicas {first} and {other} differ"
                        );
                        continue;
                    }
                    // What was lost with a disk is read from others, and heals.
                    let lost = |id: &ReplicaId, copy: &[u8]| {
                        self.may_have_lost(pool_of(*id)) && copy.iter().all(|b| *b == UNREADABLE)
                    };
                    if lost(first, x) || lost(other, y) {
                        continue;
                    }
                    let (x, y) = (self.decrypted(volume, lba, x), self.decrypted(volume, lba, y));
                    let (x, y) =
                        (history.borrow().decode(lba, &x), history.borrow().decode(lba, &y));
                    check!(
                        Check::MembersAlike,
                        x == y || (!all && history.borrow().may_differ(lba)),
                        "volume {volume} block {lba}: in-sync replica {first} holds {x}, {other} \
                         holds {y}"
                    );
                }
            }
        }
    }

    /// A snapshot that was taken is a read of every block by then, and the same on every member.
    ///
    /// # Panics
    /// Where it holds what such a read could not have returned, or members differ.
    pub fn look_at_snapshots(&mut self) {
        let mut answered = Vec::new();
        self.snapshots.retain_mut(|asked| match asked.answer.try_recv() {
            Ok(Ok(())) => {
                let differing = std::mem::take(&mut asked.differing);
                answered.push((asked.volume, asked.id, asked.invoked, differing));
                false
            }
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => false,
            Err(TryRecvError::Empty) => true,
        });
        for (volume, id, invoked, differing) in answered {
            if !differing.is_empty() {
                self.doubtful.insert(id);
            }
            if self.history(volume).borrow().alone {
                self.unknown.insert(id, differing.clone());
            }
            // One that went out while it was taken may lose it again.
            let reports = self.volumes().unwrap_or_default();
            let children =
                reports.iter().filter(|r| volume_of(r.id) == volume).flat_map(|r| &r.children);
            let sure: Vec<ReplicaId> = children.filter(|c| c.in_sync).map(|c| c.replica).collect();
            let mut first: Option<Vec<u8>> = None;
            let replicas: Vec<ReplicaId> = self.seats[volume].iter().map(|s| s.id).collect();
            for at in replicas {
                // One that was not in sync has none.
                let Some(bytes) = self.snapshot_contents(volume, at, id) else { continue };
                let history = self.history(volume);
                let doubtful = self.config.tears || self.config.is_lone();
                let torn = |lba| doubtful && differing.contains(&lba);
                history.borrow_mut().read_ended_but(0, &bytes, invoked, torn);
                if let Some(first) = &first {
                    for (lba, (a, b)) in (0u64..).zip(first.chunks(PAGE).zip(bytes.chunks(PAGE))) {
                        check!(
                            Check::Snapshots,
                            a == b || differing.contains(&lba) || history.borrow().may_differ(lba),
                            "volume {volume} block {lba}: snapshots {id} differ"
                        );
                    }
                }
                first.get_or_insert_with(|| bytes.clone());
                if sure.contains(&at) {
                    self.taken.push((volume, id, at, bytes));
                }
            }
            // Where only a member had it whose disk died, it is lost.
            check!(
                Check::Snapshots,
                first.is_some() || self.config.wide_pool.is_some_and(|at| self.may_have_lost(at)),
                "snapshot {id} of volume {volume} is nowhere"
            );
        }
    }

    /// Snapshots never change.
    ///
    /// # Panics
    /// Where one did.
    pub fn check_snapshots(&mut self) {
        self.look_at_snapshots();
        for (volume, id, at, bytes) in &self.taken {
            if self.gone.contains(&pool_of(*at)) {
                continue;
            }
            let now = self.snapshot_contents(*volume, *at, *id);
            let same = match now {
                Some(now) => {
                    (0u64..).zip(now.chunks(PAGE).zip(bytes.chunks(PAGE))).all(|(lba, (a, b))| {
                        a == b || self.unknown.get(id).is_some_and(|blocks| blocks.contains(&lba))
                    })
                }
                None => self.is_wide(pool_of(*at)),
            };
            check!(
                Check::Snapshots,
                same,
                "snapshot {id} of replica {at} of volume {volume} has changed, or is gone"
            );
        }
    }

    /// A snapshot whose deletion was answered, and a replica of a volume that is whole which has it still.
    pub fn snapshot_left(&mut self) -> Option<(SnapshotId, ReplicaId)> {
        let reports = self.volumes().ok()?;
        // What was not answered yet is looked at again; what failed is nobody's promise.
        let mut done = Vec::new();
        self.dropped.retain(|(volume, id, answer)| match answer.try_recv() {
            Ok(Ok(())) => {
                done.push((*volume, *id));
                false
            }
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => false,
            Err(TryRecvError::Empty) => true,
        });
        self.deleted.extend(done);
        let whole = |volume: usize| {
            let report = reports.iter().find(|r| volume_of(r.id) == volume && r.serving);
            report.is_some_and(|r| r.children.iter().all(|c| c.in_sync || c.witness))
        };
        let seats = |volume: usize| self.seats[volume].iter().filter(|s| !s.witness);
        let there = |of: ReplicaId, id| {
            let lost = self.gone.contains(&pool_of(of)) || self.is_wide(pool_of(of));
            !lost && self.read_pool(pool_of(of), |pool| pool.find_snapshot(of, id)).is_some()
        };
        let mut deleted = self.deleted.iter().filter(|(volume, _)| whole(*volume));
        deleted
            .find_map(|&(volume, id)| seats(volume).find(|s| there(s.id, id)).map(|s| (id, s.id)))
    }

    /// How many snapshots were deleted, as far as [`Cluster::snapshot_left`] has looked.
    #[must_use]
    pub fn snapshots_deleted(&self) -> usize {
        self.deleted.len()
    }

    /// Where members in sync differ now that their nexus is dead, one of them says that the extent is open,
    /// or has nothing there.
    ///
    /// # Panics
    /// Where a difference would not be found.
    pub(super) fn check_marks(&self, reports: &[VolumeReport]) {
        let disks: Vec<Vec<SimDisk>> = (0..self.disks.len()).map(|at| self.copies(at)).collect();
        self.check_marks_on(reports, &disks);
    }

    /// The same, of the pools' disks as they could be left by now.
    pub(super) fn check_marks_on(&self, reports: &[VolumeReport], disks: &[Vec<SimDisk>]) {
        for report in reports.iter().filter(|report| report.serving) {
            let volume = volume_of(report.id);
            let members = report.children.iter().filter(|child| child.in_sync);
            let members: Vec<ReplicaId> = members.map(|child| child.replica).collect();
            if members.len() < 2 {
                continue;
            }
            let of = |id: ReplicaId| disks[pool_of(id)].clone();
            let contents: Vec<Vec<u8>> =
                members.iter().map(|&id| self.image_on(id, of(id)).bytes).collect();
            let told: Vec<Vec<u8>> = members.iter().map(|&id| self.changes(id, of(id))).collect();
            let extent = EXTENT_BLOCKS * PAGE;
            for at in 0..contents[0].len().div_ceil(extent) {
                let part = |bytes: &Vec<u8>| at * extent..(at * extent + extent).min(bytes.len());
                let first = &contents[0][part(&contents[0])];
                let alike = |bytes: &Vec<u8>| {
                    let part = &bytes[part(bytes)];
                    *part == *first || self.are_alike(volume, at, part, first)
                };
                if contents.iter().all(alike) {
                    continue;
                }
                let open = told.iter().any(|told| told[at] & change::OPEN != 0);
                let mapped = told.iter().filter(|told| told[at] & change::MAPPED != 0).count();
                check!(
                    Check::DifferenceIsMarked,
                    open || (mapped > 0 && mapped < told.len()),
                    "volume {volume} extent {at}: members {members:?} differ, and none says that it is open"
                );
            }
        }
    }

    fn changes(&self, id: ReplicaId, mut disks: Vec<SimDisk>) -> Vec<u8> {
        let pool = pools::open(&mut disks).pool;
        let extents = self.config.blocks.div_ceil(EXTENT_BLOCKS as u64);
        let mut out = vec![0; usize::try_from(extents).expect("a small volume")];
        let slot = pool.find(id).expect("the replica is there");
        pool.changes(slot, 0, u64::MAX, &mut out).expect("the pool tells");
        out
    }

    fn snapshot_contents(&self, volume: usize, of: ReplicaId, id: SnapshotId) -> Option<Vec<u8>> {
        let image = self.read_pool(pool_of(of), |pool| pool.find_snapshot(of, id))?;
        // A part of it may have been lost with a disk.
        let lost = self.is_wide(pool_of(of)) && !image.whole;
        check!(Check::Scrub, image.whole || lost, "snapshot {id} of replica {of} cannot be read");
        image.whole.then(|| self.decrypted(volume, 0, &image.bytes))
    }

    /// What hosts see of these blocks.
    pub(super) fn decrypted(&self, volume: usize, lba: u64, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        if self.config.encrypted {
            keys(volume).0.decrypt(Lba(lba), BlockSize::B4096, &mut bytes);
        }
        bytes
    }

    /// Whether hosts see the same of two extents.
    fn are_alike(&self, volume: usize, extent: usize, a: &[u8], b: &[u8]) -> bool {
        let blocks = a.chunks(PAGE).zip(b.chunks(PAGE)).zip((extent * EXTENT_BLOCKS) as u64..);
        let mut differing = blocks.filter(|((a, b), _)| a != b);
        let encrypted = self.config.encrypted;
        differing.all(|((a, b), lba)| {
            encrypted && self.decrypted(volume, lba, a) == self.decrypted(volume, lba, b)
        })
    }

    /// What a replica holds, read from its pool as after a crash at this moment; as it is on the disk.
    pub(super) fn contents(&self, volume: usize, id: ReplicaId) -> Vec<u8> {
        let image = self.image_on(id, self.copies(pool_of(id)));
        let lost = self.may_have_lost(pool_of(id));
        check!(Check::Scrub, image.whole || lost, "replica {id} of volume {volume} cannot be read");
        image.bytes
    }

    /// Whether a disk of a pool that has several has failed, and may be left behind with what it held.
    pub fn may_have_lost(&self, at: usize) -> bool {
        let mut world = self.world();
        self.is_wide(at) && self.disks[at].iter().any(|disk| world.disk(*disk).has_failed)
    }

    fn image_on(&self, id: ReplicaId, disks: Vec<SimDisk>) -> Image {
        let find = |pool: &MultiPool| pool.find(id);
        Self::read_image(disks, self.config.blocks, find).expect("the replica is there")
    }

    fn read_pool(
        &self,
        at: usize,
        find: impl Fn(&MultiPool) -> Option<ReplicaSlot>,
    ) -> Option<Image> {
        Self::read_image(self.copies(at), self.config.blocks, find)
    }

    /// Every replica's register and bytes in a pool, whose disks these are.
    pub(super) fn image(
        &self,
        at: usize,
        disks: &[SimDisk],
    ) -> Vec<(Option<Register>, Option<Image>)> {
        let here = self.seats.iter().flatten().filter(|seat| seat.pool == at);
        here.map(|seat| {
            let pool = pools::open(&mut disks.to_vec()).pool;
            let slot = pool.find(seat.id);
            let register = slot.and_then(|slot| pool.register(slot).cloned());
            // A witness holds none.
            let blocks = if seat.witness { 0 } else { self.config.blocks };
            let find = |pool: &MultiPool| pool.find(seat.id);
            (register, Self::read_image(disks.to_vec(), blocks, find))
        })
        .collect()
    }

    fn read_image(
        mut disks: Vec<SimDisk>,
        blocks: u64,
        find: impl Fn(&MultiPool) -> Option<ReplicaSlot>,
    ) -> Option<Image> {
        let mut opened = pools::open(&mut disks);
        let slot = find(&opened.pool)?;
        // A pool that moves extents from one disk to another takes some for that.
        let mut memory = HeapMemory::new(if disks.len() > 1 { 8 << 20 } else { 2 << 20 });
        let (mut out, mut whole) = (Vec::new(), true);
        let step = 256;
        for lba in (0..blocks).step_by(step) {
            let blocks = (step as u64).min(blocks - lba);
            let status =
                read_range(&mut opened, slot, &mut disks, &mut memory, (lba, blocks), &mut out);
            if status.is_ok() {
                continue;
            }
            // Of a block whose last write failed nothing is known.
            let failed = disks.iter().any(|disk| disk.has_failed);
            whole &= failed && disks.len() == 1;
            for lba in lba..lba + blocks {
                let status = match failed {
                    true => {
                        read_range(&mut opened, slot, &mut disks, &mut memory, (lba, 1), &mut out)
                    }
                    false => IoStatus::MediaError,
                };
                if !status.is_ok() {
                    out.extend_from_slice(&[UNREADABLE; PAGE]);
                }
            }
        }
        Some(Image { bytes: out, whole })
    }
}

/// Adds what is in these blocks.
fn read_range(
    opened: &mut OpenedSet,
    slot: ReplicaSlot,
    disks: &mut [SimDisk],
    memory: &mut HeapMemory,
    (lba, blocks): (u64, u64),
    out: &mut Vec<u8>,
) -> IoStatus {
    let pool = &mut opened.pool;
    let len = u32::try_from(blocks).expect("a short read") * 4096;
    let buf = memory.alloc(len).expect("the arena holds it");
    let range = LbaRange::new(Lba(lba), blocks).expect("inside the volume");
    let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
    pool.submit(0, slot, request, memory);
    let mut waits = 0;
    let done = loop {
        if let Some(done) = pool.poll_done() {
            break done;
        }
        let Some((number, io)) = pool.poll_disk() else {
            // What is read may be on its way from one disk to another: that goes on first.
            pool.retry(memory);
            waits += 1;
            assert!(waits < 3, "a read does not go on");
            continue;
        };
        waits = 0;
        perform(&mut disks[opened.devices[usize::from(number)]], io.op, memory);
        pool.handle_disk(number, io.id, Ok(()), memory);
    };
    if done.status.is_ok() {
        out.extend_from_slice(memory.bytes(buf.slice()));
    }
    memory.release(buf);
    done.status
}

/// What a replica or a snapshot holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    bytes: Vec<u8>,
    /// All of it could be read: no disk that held a part is gone.
    whole: bool,
}

fn perform(disk: &mut SimDisk, op: DiskOp, memory: &mut HeapMemory) {
    use cairn_engine::replica::Device;
    match op {
        DiskOp::Read { offset, buf } => disk.read_at(offset.0, memory.bytes_mut(buf)),
        DiskOp::Write { offset, buf, .. } => disk.write_at(offset.0, memory.bytes(buf)),
        DiskOp::Flush => Device::flush(disk),
        DiskOp::Zero { offset, len, .. } => disk.zero(offset.0, len),
    }
    .expect("inside the disk");
}
