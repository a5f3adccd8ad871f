//! A pool of several simulated disks.

use cairn_block::{Buf, BufSlice, ReplicaId};
use cairn_block::{
    HeapMemory, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, PoolDeviceId, PoolId,
};
use cairn_replica::disk::{FLAG_REVERTING, MemberState, Superblock};
use cairn_replica::{
    ControlError, DeviceOptions, Done, MultiPool, OpenOptions, Pool, PoolError, ReplicaSlot,
    SparseDevice, inspect_catalog, inspect_superblock,
};

use crate::common::{Disk, EXTENT_BLOCKS, Rng, options, spec};

pub(crate) fn device(id: u128) -> DeviceOptions {
    DeviceOptions { id: PoolDeviceId(id), device_is_zeroed: id.is_multiple_of(2), sector_size: 512 }
}

/// What happened at opens, to see that the tests meet what they are for.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) opens: u64,
    pub(crate) draining: u64,
    pub(crate) doubles: u64,
    pub(crate) no_space: u64,
    pub(crate) families: u64,
    pub(crate) joining: u64,
    pub(crate) removed: u64,
    pub(crate) adds: u64,
    pub(crate) drained: u64,
    pub(crate) failed: u64,
    pub(crate) lost_reads: u64,
    pub(crate) good_reads: u64,
    pub(crate) snapshots: u64,
    pub(crate) reverts: u64,
    pub(crate) resumed: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, other: &Self) {
        self.opens += other.opens;
        self.draining += other.draining;
        self.doubles += other.doubles;
        self.no_space += other.no_space;
        self.families += other.families;
        self.joining += other.joining;
        self.removed += other.removed;
        self.adds += other.adds;
        self.drained += other.drained;
        self.failed += other.failed;
        self.lost_reads += other.lost_reads;
        self.good_reads += other.good_reads;
        self.snapshots += other.snapshots;
        self.reverts += other.reverts;
        self.resumed += other.resumed;
    }
}

/// Several disks and the pool on them.
pub(crate) struct Set {
    pub(crate) pool: MultiPool,
    /// By number.
    pub(crate) disks: Vec<Option<Disk>>,
    /// Disks that left, or were set aside.
    pub(crate) aside: Vec<Disk>,
    pub(crate) mem: HeapMemory,
    pub(crate) rng: Rng,
    pub(crate) check: bool,
    pub(crate) seen: Seen,
    next_tag: u64,
}

fn superblock(disk: &mut Disk) -> Option<Superblock> {
    inspect_superblock(disk).unwrap().into_iter().find_map(|copy| copy.content.ok())
}

/// Whether a replica has gone back to a snapshot on a device and not on another.
fn resumes(disks: &mut [Disk]) -> bool {
    let pages = disks.iter_mut().flat_map(|disk| inspect_catalog(disk).unwrap_or_default());
    pages.filter_map(|page| page.content.ok()).any(|page| page.flags & FLAG_REVERTING != 0)
}

pub(crate) fn formatted(lens: &[u64]) -> Vec<Disk> {
    let mut devs: Vec<SparseDevice> = lens.iter().map(|&len| SparseDevice::new(len)).collect();
    let ids: Vec<DeviceOptions> = (1..).take(devs.len()).map(device).collect();
    MultiPool::format(&mut devs, &ids, &options(true)).unwrap();
    devs.into_iter().map(Disk::new).collect()
}

impl Set {
    pub(crate) fn formatted(lens: &[u64], seed: u64) -> Self {
        Self::open(formatted(lens), seed, &[]).unwrap()
    }

    /// Opens the disks in any order, leaving out those that were removed.
    pub(crate) fn open(
        mut disks: Vec<Disk>,
        seed: u64,
        without: &[PoolDeviceId],
    ) -> Result<Self, PoolError> {
        let mut rng = Rng(seed);
        for i in (1..disks.len()).rev() {
            let other = rng.index(i + 1);
            disks.swap(i, other);
        }
        let mut seen = Seen { opens: 1, ..Seen::default() };
        let mut aside = Vec::new();
        let set = loop {
            let options = OpenOptions { without: without.to_vec() };
            match MultiPool::open(&mut disks, &options) {
                Ok(set) => break set,
                Err(PoolError::MemberRemoved { device, .. }) => {
                    seen.removed += 1;
                    let at = disks
                        .iter_mut()
                        .position(|d| superblock(d).is_some_and(|s| s.device == device))
                        .unwrap();
                    aside.push(disks.remove(at));
                }
                // A wiping that was torn may leave neither zeros nor a superblock.
                Err(PoolError::Foreign) => {
                    let foreign =
                        |d: &mut Disk| matches!(Pool::probe(d), Ok(cairn_replica::Probe::Foreign));
                    let at = disks.iter_mut().position(foreign).unwrap();
                    aside.push(disks.remove(at));
                }
                Err(error) => return Err(error),
            }
        };
        for skipped in &set.set_aside {
            seen.joining += u64::from(skipped.why.contains("cut off"));
        }
        let mut pool = set.pool;
        match seed % 4 {
            0 => {}
            1 => pool.set_checksum_limits(0, 0),
            2 => pool.set_checksum_limits(2, 1),
            _ => pool.set_checksum_limits(16, 2),
        }
        pool.check();
        seen.resumed += u64::from(resumes(&mut disks));
        seen.draining += u64::from(pool.members().iter().any(|m| m.drain.is_some()));
        let mut numbered: Vec<Option<Disk>> = disks.into_iter().map(Some).collect();
        let disks = set.devices.iter().map(|&i| numbered[i].take()).collect();
        aside.extend(numbered.into_iter().flatten());
        let mem = HeapMemory::new(8 << 20);
        Ok(Self { pool, disks, aside, mem, rng, check: true, seen, next_tag: 1 })
    }

    pub(crate) fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    pub(crate) fn issue(&mut self) {
        while let Some((at, io)) = self.pool.poll_disk() {
            self.disks[usize::from(at)].as_mut().unwrap().issue(io, &self.mem);
        }
        while let Some(at) = self.pool.poll_gone() {
            let disk = self.disks[usize::from(at)].take().unwrap();
            assert_eq!(disk.in_flight(), 0, "a device left with operations in flight");
            self.seen.drained += 1;
            self.aside.push(disk);
        }
    }

    /// One event. Returns whether there was one.
    pub(crate) fn step(&mut self) -> bool {
        self.issue();
        let busy: Vec<usize> = (0..self.disks.len())
            .filter(|&i| self.disks[i].as_ref().is_some_and(|d| d.in_flight() > 0))
            .collect();
        if busy.is_empty() {
            return false;
        }
        let at = busy[self.rng.index(busy.len())];
        let disk = self.disks[at].as_mut().unwrap();
        let (io, result) = disk.complete(&mut self.rng, &mut self.mem);
        self.pool.handle_disk(u8::try_from(at).unwrap(), io.id, result, &mut self.mem);
        if self.check {
            self.pool.check();
        }
        self.issue();
        true
    }

    pub(crate) fn settle(&mut self) -> Vec<Done> {
        let mut done = Vec::new();
        let mut steps = 0;
        loop {
            self.pool.retry(&mut self.mem);
            let mut moved = false;
            while self.step() {
                moved = true;
                done.extend(std::iter::from_fn(|| self.pool.poll_done()));
                steps += 1;
                assert!(steps < 1_000_000, "it never ends");
            }
            done.extend(std::iter::from_fn(|| self.pool.poll_done()));
            if !moved {
                return done;
            }
        }
    }

    pub(crate) fn wait(&mut self, tag: u64) -> Done {
        let done = self.settle();
        done.into_iter().find(|d| d.tag == tag).expect("every command is answered")
    }

    pub(crate) fn create(&mut self, id: u128, extents: u64) -> ReplicaSlot {
        let tag = self.tag();
        self.pool.create_replica(tag, spec(id, extents * EXTENT_BLOCKS), &mut self.mem);
        let done = self.wait(tag);
        assert_eq!(done.status, IoStatus::Ok, "{:?}", done.error);
        self.pool.find(ReplicaId(id)).unwrap()
    }

    pub(crate) fn request(
        &mut self,
        slot: ReplicaSlot,
        op: IoOp,
        lba: u64,
        blocks: u64,
        byte: u8,
    ) -> (IoStatus, Vec<u8>) {
        let len = u32::try_from(blocks).unwrap() * 4096;
        let payload = matches!(op, IoOp::Write { .. } | IoOp::Read);
        let buf = payload.then(|| self.mem.alloc(len).unwrap());
        let slice = buf.as_ref().map_or(BufSlice::EMPTY, Buf::slice);
        if payload {
            self.mem.bytes_mut(slice).fill(byte);
        }
        let tag = self.tag();
        let range = LbaRange::new(Lba(lba), blocks).unwrap();
        self.pool.submit(tag, slot, IoRequest { op, range, buf: slice }, &mut self.mem);
        let done = self.wait(tag);
        let bytes = self.mem.bytes(slice).to_vec();
        if let Some(buf) = buf {
            self.mem.release(buf);
        }
        (done.status, bytes)
    }

    pub(crate) fn write(&mut self, slot: ReplicaSlot, lba: u64, blocks: u64, byte: u8) -> IoStatus {
        self.request(slot, IoOp::Write { fua: false }, lba, blocks, byte).0
    }

    pub(crate) fn read(&mut self, slot: ReplicaSlot, lba: u64) -> Result<u8, IoStatus> {
        let (status, bytes) = self.request(slot, IoOp::Read, lba, 1, 0xdd);
        if !status.is_ok() {
            return Err(status);
        }
        assert!(bytes.iter().all(|&b| b == bytes[0]));
        Ok(bytes[0])
    }

    pub(crate) fn flush(&mut self, slot: ReplicaSlot) -> IoStatus {
        self.request(slot, IoOp::Flush, 0, 0, 0).0
    }

    /// A new disk in the pool; the tag that is answered.
    pub(crate) fn add(&mut self, id: u128, len: u64) -> u64 {
        self.try_add(id, len).unwrap()
    }

    pub(crate) fn try_add(&mut self, id: u128, len: u64) -> Result<u64, ControlError> {
        let mut dev = SparseDevice::new(len);
        MultiPool::format_device(
            &mut dev,
            &device(id),
            PoolId(0xca1),
            self.pool.slot_count(),
            false,
        )
        .unwrap();
        let mut disk = Disk::new(dev);
        let opened = Pool::open(&mut disk).unwrap();
        let tag = self.tag();
        let number = usize::from(self.pool.next_number());
        let given = self.pool.add_device(tag, opened, &mut self.mem)?;
        assert_eq!(usize::from(given), number);
        if number == self.disks.len() {
            self.disks.push(None);
        }
        self.disks[number] = Some(disk);
        Ok(tag)
    }

    pub(crate) fn remove(&mut self, id: u128) -> u64 {
        let tag = self.tag();
        self.pool.remove_device(tag, PoolDeviceId(id), &mut self.mem);
        tag
    }

    /// The number of a device.
    pub(crate) fn number(&self, id: u128) -> usize {
        let members = self.pool.members();
        let found = members.iter().find(|m| m.id == PoolDeviceId(id)).unwrap();
        usize::from(found.number.unwrap())
    }

    pub(crate) fn state(&self, id: u128) -> Option<MemberState> {
        let found = self.pool.members().into_iter().find(|m| m.id == PoolDeviceId(id));
        found.map(|m| m.state)
    }

    /// All the disks, as they are after a kill or a power cut.
    pub(crate) fn cut(mut self, power: bool) -> (Vec<Disk>, Rng) {
        let mut disks = Vec::new();
        for disk in self.disks.into_iter().flatten().chain(self.aside) {
            let rng = &mut self.rng;
            disks.push(if power { disk.cut(rng) } else { disk.kill(rng) });
        }
        (disks, self.rng)
    }

    /// The disks, everything having been written.
    pub(crate) fn stop(mut self) -> Vec<Disk> {
        self.settle();
        self.disks.into_iter().flatten().chain(self.aside).collect()
    }
}
