//! What is looked at from outside: disks as after a crash at that moment, registers, epochs.

use std::collections::BTreeSet;

use cairn_block::{
    BlockSize, HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, SnapshotId,
};
use cairn_engine::VolumeReport;
use cairn_engine::replica::{DiskOp, Pool, Register, ReplicaSlot, change};

use super::{Cluster, keys, replica_id};
use crate::checks::{Check, check};
use crate::disk::{PAGE, SimDisk};

/// Blocks of a pool's extent.
const EXTENT_BLOCKS: usize = 256;
/// Stands for a block whose last write failed.
const UNREADABLE: u8 = 0xee;

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
        for (at, child) in report.children.iter().enumerate() {
            if child.state == "online" {
                let mut disk = self.world().disk(self.disks[at]).clone();
                let pool = Pool::open(&mut disk).expect("the pool opens");
                let id = replica_id(volume, at);
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
            let members: BTreeSet<usize> = report
                .children
                .iter()
                .enumerate()
                .filter(|(at, child)| child.in_sync && !self.astray.contains(at))
                .map(|(at, _)| at)
                .collect();
            let contents: Vec<(usize, Vec<u8>)> =
                members.iter().map(|&at| (at, self.contents(volume, at))).collect();
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
        use std::sync::mpsc::TryRecvError;
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
            let mut first: Option<Vec<u8>> = None;
            for at in 0..self.disks.len() {
                // One that was not in sync has none.
                let Some(bytes) = self.snapshot_contents(volume, at, id) else { continue };
                let history = self.history(volume);
                let torn = |lba| self.config.tears && differing.contains(&lba);
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
                self.taken.push((volume, id, at, bytes));
            }
            check!(
                Check::Snapshots,
                first.is_some(),
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
            let now = self.snapshot_contents(*volume, *at, *id);
            let same = now.is_some_and(|now| now == *bytes);
            check!(
                Check::Snapshots,
                same,
                "snapshot {id} of volume {volume} in pool {at} has changed, or is gone"
            );
        }
    }

    /// Where members in sync differ now that their nexus is dead, one of them says that the extent is open,
    /// or has nothing there.
    ///
    /// # Panics
    /// Where a difference would not be found.
    pub(super) fn check_marks(&self, reports: &[VolumeReport]) {
        let disks: Vec<SimDisk> =
            self.disks.iter().map(|disk| self.world().disk(*disk).clone()).collect();
        self.check_marks_on(reports, &disks);
    }

    /// The same, of disks that are as they could be left by now.
    pub(super) fn check_marks_on(&self, reports: &[VolumeReport], disks: &[SimDisk]) {
        for report in reports.iter().filter(|report| report.serving) {
            let volume = usize::try_from(report.id.0 - 1).expect("a small number");
            let children = report.children.iter().enumerate();
            let members: Vec<usize> =
                children.filter(|(_, c)| c.in_sync).map(|(at, _)| at).collect();
            if members.len() < 2 {
                continue;
            }
            let contents: Vec<Vec<u8>> =
                members.iter().map(|&at| self.contents_on(volume, at, disks[at].clone())).collect();
            let told: Vec<Vec<u8>> =
                members.iter().map(|&at| self.changes(volume, at, disks[at].clone())).collect();
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

    fn changes(&self, volume: usize, at: usize, mut disk: SimDisk) -> Vec<u8> {
        let pool = Pool::open(&mut disk).expect("the pool opens");
        let extents = self.config.blocks.div_ceil(EXTENT_BLOCKS as u64);
        let mut out = vec![0; usize::try_from(extents).expect("a small volume")];
        let slot = pool.find(replica_id(volume, at)).expect("the replica is there");
        pool.changes(slot, 0, u64::MAX, &mut out).expect("the pool tells");
        out
    }

    fn snapshot_contents(&self, volume: usize, at: usize, id: SnapshotId) -> Option<Vec<u8>> {
        let find = |pool: &Pool| pool.find_snapshot(replica_id(volume, at), id);
        self.read_pool(volume, at, find).map(|bytes| self.decrypted(volume, 0, &bytes))
    }

    /// What hosts see of these blocks.
    fn decrypted(&self, volume: usize, lba: u64, bytes: &[u8]) -> Vec<u8> {
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
    pub(super) fn contents(&self, volume: usize, at: usize) -> Vec<u8> {
        let replica = |pool: &Pool| pool.find(replica_id(volume, at));
        self.read_pool(volume, at, replica).expect("the replica is there")
    }

    fn contents_on(&self, volume: usize, at: usize, disk: SimDisk) -> Vec<u8> {
        let id = replica_id(volume, at);
        self.read_image(volume, disk, |pool| pool.find(id)).expect("the replica is there")
    }

    fn read_pool(
        &self,
        volume: usize,
        at: usize,
        find: impl Fn(&Pool) -> Option<ReplicaSlot>,
    ) -> Option<Vec<u8>> {
        let disk = self.world().disk(self.disks[at]).clone();
        self.read_image(volume, disk, find)
    }

    /// Every replica's register and bytes in a pool, whose disk this is.
    pub(super) fn image(
        &self,
        at: usize,
        disk: &SimDisk,
    ) -> Vec<(Option<Register>, Option<Vec<u8>>)> {
        (0..self.config.volumes)
            .map(|volume| {
                let id = replica_id(volume, at);
                let pool = Pool::open(&mut disk.clone()).expect("the pool opens");
                let register = pool.find(id).and_then(|slot| pool.register(slot).cloned());
                (register, self.read_image(volume, disk.clone(), |pool| pool.find(id)))
            })
            .collect()
    }

    fn read_image(
        &self,
        volume: usize,
        mut disk: SimDisk,
        find: impl Fn(&Pool) -> Option<ReplicaSlot>,
    ) -> Option<Vec<u8>> {
        let mut pool = Pool::open(&mut disk).expect("the pool opens");
        let slot = find(&pool)?;
        let mut memory = HeapMemory::new(2 << 20);
        let mut out = Vec::new();
        let step = 256;
        for lba in (0..self.config.blocks).step_by(step) {
            let blocks = (step as u64).min(self.config.blocks - lba);
            let range = (lba, blocks);
            let status = read_range((&mut pool, slot), &mut disk, &mut memory, range, &mut out);
            if status.is_ok() {
                continue;
            }
            check!(
                Check::Scrub,
                disk.has_failed,
                "a read of volume {volume} in a pool: {status:?}"
            );
            for lba in lba..lba + blocks {
                let range = (lba, 1);
                let status = read_range((&mut pool, slot), &mut disk, &mut memory, range, &mut out);
                if !status.is_ok() {
                    out.extend_from_slice(&[UNREADABLE; PAGE]);
                }
            }
        }
        Some(out)
    }
}

/// Adds what is in these blocks.
fn read_range(
    (pool, slot): (&mut Pool, ReplicaSlot),
    disk: &mut SimDisk,
    memory: &mut HeapMemory,
    (lba, blocks): (u64, u64),
    out: &mut Vec<u8>,
) -> IoStatus {
    let len = u32::try_from(blocks).expect("a short read") * 4096;
    let buf = memory.alloc(len).expect("the arena holds it");
    let range = LbaRange::new(Lba(lba), blocks).expect("inside the volume");
    let request = IoRequest { op: IoOp::Read, range, buf: buf.slice() };
    pool.submit(0, slot, request, memory);
    let done = loop {
        if let Some(done) = pool.poll_done() {
            break done;
        }
        let io = pool.poll_disk().expect("a read goes on");
        perform(disk, io.op, memory);
        pool.handle_disk(io.id, Ok(()), memory);
    };
    if done.status.is_ok() {
        out.extend_from_slice(memory.bytes(buf.slice()));
    }
    memory.release(buf);
    done.status
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
