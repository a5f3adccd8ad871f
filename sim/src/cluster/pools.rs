//! Pools on one disk or on several: made, opened as a process does, and looked at from copies of their disks.

use std::sync::mpsc;

use cairn_block::{PoolDeviceId, PoolId};
use cairn_engine::replica::{
    DeviceOptions, FormatOptions, MultiPool, OpenOptions, OpenedSet, Pool, PoolError,
    inspect_superblock,
};
use cairn_engine::{Command, PoolMember, Reply};

use super::{Answer, Cluster, ClusterConfig, Process, pool_name};
use crate::disk::SimDisk;
use crate::world::{DiskRef, World};

/// Disks that a pool ever has.
const MOST: usize = 4;

/// The disk of a pool with this number, as the pool knows it.
fn device_id(pool: usize, number: usize) -> PoolDeviceId {
    PoolDeviceId((pool * MOST + number) as u128 + 1)
}

fn note_data(disk: &mut SimDisk, tears: bool) {
    let copies = inspect_superblock(disk).expect("the disk can be read");
    let superblock = copies.into_iter().find_map(|c| c.content.ok()).expect("a pool");
    disk.whole_from = (!tears).then_some(superblock.segments[0].data);
}

/// Makes the disks of a pool, and the pool.
pub(super) fn format(
    world: &mut World,
    config: &ClusterConfig,
    at: usize,
    len: u64,
) -> Vec<DiskRef> {
    let options = FormatOptions {
        pool_id: PoolId(at as u128 + 1),
        device_is_zeroed: config.zeroed,
        sector_size: 4096,
        force: false,
    };
    if config.wide_pool != Some(at) {
        let disk = world.add_disk(len);
        Pool::format(world.disk(disk), &options).expect("a pool on a new disk");
        note_data(world.disk(disk), config.tears);
        return vec![disk];
    }
    let mut disks = [SimDisk::new(len), SimDisk::new(len)];
    let ids = [0, 1].map(|number| device_options(config, at, number));
    MultiPool::format(&mut disks, &ids, &options).expect("a pool on new disks");
    disks
        .into_iter()
        .map(|mut disk| {
            note_data(&mut disk, config.tears);
            let at = world.add_disk(len);
            *world.disk(at) = disk;
            at
        })
        .collect()
}

fn device_options(config: &ClusterConfig, at: usize, number: usize) -> DeviceOptions {
    DeviceOptions { id: device_id(at, number), device_is_zeroed: config.zeroed, sector_size: 4096 }
}

/// Opens a pool as a process does that starts: without a disk that was removed and not wiped yet.
pub(super) fn open(disks: &mut Vec<SimDisk>) -> OpenedSet {
    loop {
        if let [disk] = disks.as_mut_slice() {
            let pool = MultiPool::from(Pool::open(disk).expect("a pool opens after a crash"));
            return OpenedSet { pool, devices: vec![0], set_aside: Vec::new() };
        }
        match MultiPool::open(disks, &OpenOptions::default()) {
            Ok(opened) => return opened,
            Err(PoolError::MemberRemoved { device, .. }) => {
                let is_removed = |disk: &mut SimDisk| {
                    let copies = inspect_superblock(disk).expect("the disk can be read");
                    let head = copies.into_iter().find_map(|c| c.content.ok());
                    head.is_some_and(|head| head.device == device)
                };
                let place = disks.iter_mut().position(is_removed).expect("it was given");
                // Its place stays: the others are known by theirs. So does what the pool may have lost with it.
                let has_failed = disks[place].has_failed;
                disks[place] = SimDisk::new(disks[place].len());
                disks[place].has_failed = has_failed;
            }
            Err(error) => panic!("a pool does not open after a crash: {error}"),
        }
    }
}

impl Cluster {
    /// Copies of a pool's disks as they are.
    pub(super) fn copies(&self, at: usize) -> Vec<SimDisk> {
        let mut world = self.world();
        self.disks[at].iter().map(|disk| world.disk(*disk).clone()).collect()
    }

    /// Opens a pool on its disks, for its process.
    pub(super) fn open_pool(&mut self, at: usize) -> (MultiPool, Vec<PoolMember<DiskRef>>) {
        let mut world = self.world.borrow_mut();
        let mut take = |disk: &DiskRef| {
            let empty = SimDisk::new(world.disk(*disk).len());
            std::mem::replace(world.disk(*disk), empty)
        };
        let mut disks: Vec<SimDisk> = self.disks[at].iter().map(&mut take).collect();
        let opened = open(&mut disks);
        for (place, disk) in self.disks[at].iter().zip(disks) {
            *world.disk(*place) = disk;
        }
        for aside in &opened.set_aside {
            world.say(format_args!("pool {at} goes without disk {}: {}", aside.index, aside.why));
        }
        let mut devices = Vec::new();
        for index in opened.devices {
            let device = self.disks[at][index];
            let len = world.disk(device).len();
            devices.push(PoolMember { device, len, path: String::new() });
        }
        (opened.pool, devices)
    }

    /// Whether a pool is open in a process that runs, and stores nothing any more.
    pub fn pool_is_offline(&mut self, at: usize) -> bool {
        let Some(node) = self.node_of(at).filter(|node| !self.world().is_paused(*node)) else {
            return false;
        };
        let Process::Shard(shard) = &mut self.processes[node.0] else { return false };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Looked at below.
            let _told = tx.send(result);
        });
        shard.command(Command::ListPools { reply });
        let pools = rx.try_recv().ok().and_then(Result::ok).unwrap_or_default();
        pools.iter().any(|p| p.name == pool_name(at) && p.state.starts_with("failed"))
    }

    /// Whether a pool has several disks, or had.
    #[must_use]
    pub fn is_wide(&self, at: usize) -> bool {
        self.config.wide_pool == Some(at)
    }

    /// Has a disk of a pool that has several be removed from it: what it holds moves to the others.
    pub fn remove_disk(&mut self, at: usize, number: usize) -> Option<Answer> {
        let (pool, device) = (pool_name(at), device_id(at, number));
        self.world().say(format_args!("disk {number} of pool {at} is to be removed"));
        let node = self.node_of(at);
        self.ask(node, |reply| Command::RemoveDevice { pool, device, reply })
    }

    /// Has one more disk be part of a pool that has several.
    pub fn add_disk(&mut self, at: usize) -> Option<Answer> {
        let number = self.disks[at].len();
        let node = self.node_of(at).filter(|_| number < MOST)?;
        let slots = {
            let mut disks = self.copies(at);
            open(&mut disks).pool.slot_count()
        };
        let len = self.config.disk_len;
        let options = device_options(&self.config, at, number);
        let mut disk = SimDisk::new(len);
        MultiPool::format_device(&mut disk, &options, PoolId(at as u128 + 1), slots, false)
            .expect("a new disk");
        note_data(&mut disk, self.config.tears);
        let opened = Box::new(Pool::open(&mut disk).expect("it was just made"));
        let mut world = self.world.borrow_mut();
        world.say(format_args!("disk {number} of pool {at} is added"));
        let device = world.add_disk(len);
        *world.disk(device) = disk;
        drop(world);
        self.disks[at].push(device);
        let device = PoolMember { device, len, path: String::new() };
        let pool = pool_name(at);
        self.ask(Some(node), |reply| Command::AddDevice { pool, device, opened, reply })
    }
}
