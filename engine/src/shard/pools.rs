//! Local pools: disk operations to the driver, requests from hosts, from local nexuses, and
//! register operations.

use std::collections::VecDeque;

use cairn_block::{PoolDeviceId, ReplicaId};
use cairn_nexus::{ChildId, Ticket};
use cairn_nvmf::target::{NamespaceConfig, SubsystemConfig};
use cairn_reactor::{DeviceId, DiskFault, Driver, Op};
use cairn_replica::disk::MemberState;
use cairn_replica::{
    DiskError, DiskId, DiskOp, MultiPool, Pool, PoolState, ReplicaSlot, ReplicaState,
};

use super::io::Export;
use super::leases::Leases;
use super::noise::Noise;
use super::registers::Asked;
use super::snapshots::SnapshotOrigin;
use super::{Shard, Subject, token};
use crate::control::{DeviceReport, EngineError, PoolMember, ReplicaReport, Reply};

/// A pool of this process.
pub(super) struct LocalPool {
    pub(super) name: String,
    /// By their numbers in the pool.
    devices: Vec<Option<Attached>>,
    pub(super) pool: MultiPool,
    /// Something was submitted or completed since it was last run.
    pub(super) busy: bool,
    failed: bool,
    /// Devices of which it was logged that they failed, a bit for each number.
    failed_devices: u64,
    /// Register operations, one at a time: each sees what the one before it stored.
    pub(super) registers: VecDeque<Asked>,
    pub(super) register_busy: bool,
    pub(super) leases: Leases,
    control: Vec<(u32, Waiter)>,
    next_control: u32,
}

/// A device of a pool.
struct Attached {
    device: DeviceId,
    path: String,
    noise: Noise,
}

impl LocalPool {
    /// Where the device of this number is.
    pub(super) fn path(&self, number: u8) -> String {
        let device = self.devices.get(usize::from(number)).and_then(Option::as_ref);
        device.map_or_else(String::new, |attached| attached.path.clone())
    }

    /// Whether a device failed or is missing.
    pub(super) fn is_degraded(&self) -> bool {
        self.pool.members().iter().any(|m| m.state == MemberState::Failed)
    }

    pub(super) fn device_reports(&self) -> Vec<DeviceReport> {
        let report = |member: cairn_replica::MemberInfo| {
            let path = member.number.map_or_else(String::new, |number| self.path(number));
            let extent = member.usage.map_or(0, |u| u64::from(u.extent_bytes));
            let state = match member.state {
                MemberState::Live => "live",
                MemberState::Draining => "draining",
                MemberState::Failed if member.number.is_none() => "missing",
                MemberState::Failed => "failed",
                MemberState::Removed => "removed",
                MemberState::Joining => "joining",
            };
            DeviceReport {
                id: member.id,
                path,
                state: state.to_owned(),
                reason: member.reason,
                device_len: member.device_len,
                size_bytes: member.usage.map_or(0, |u| u.extents_total * extent),
                free_bytes: member.usage.map_or(0, |u| u.extents_free * extent),
                extents_left: member.drain.map(|drain| drain.extents_left),
            }
        };
        self.pool.members().into_iter().map(report).collect()
    }

    fn log_failed(&mut self) {
        for member in self.pool.members() {
            let Some(number) = member.number else { continue };
            if member.state == MemberState::Failed && self.failed_devices >> number & 1 == 0 {
                self.failed_devices |= 1 << number;
                let (path, why) = (self.path(number), member.reason);
                tracing::error!(pool = %self.name, device = %member.id, %path, %why, "a device failed");
            }
        }
    }
}

/// A token names a pool in so many bits, and the number of its device in those above.
const POOL_BITS: u32 = 10;

/// Who waits for a control operation of a pool.
pub(super) enum Waiter {
    Create {
        id: ReplicaId,
        reply: Reply<ReplicaReport>,
    },
    Delete {
        reply: Reply<()>,
    },
    Checkpoint,
    Grow {
        reply: Option<Reply<()>>,
    },
    Devices {
        what: &'static str,
        reply: Reply<()>,
    },
    Snapshot {
        origin: SnapshotOrigin,
        slot: ReplicaSlot,
        made: Option<ReplicaId>,
    },
    Settle {
        origin: SnapshotOrigin,
        slot: ReplicaSlot,
    },
    /// Nobody.
    Orphan,
}

/// Whose a tag is that a pool completes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Owner {
    Host { io: u32 },
    Child { volume: u32, child: ChildId, ticket: Ticket },
    Register,
    Control { id: u32 },
}

impl Owner {
    pub(super) fn tag(self) -> u64 {
        match self {
            Self::Host { io } => u64::from(io),
            Self::Child { volume, child, ticket } => {
                assert!(volume < 1 << 16, "more than 2^16 volumes");
                (1 << 56)
                    | (u64::from(volume) << 40)
                    | (u64::from(child.0) << 32)
                    | u64::from(ticket.0)
            }
            Self::Register => 2 << 56,
            Self::Control { id } => (3 << 56) | u64::from(id),
        }
    }

    fn of(tag: u64) -> Self {
        let b = tag.to_le_bytes();
        let low = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        match b[7] {
            0 => Self::Host { io: low },
            1 => Self::Child {
                volume: u32::from(u16::from_le_bytes([b[5], b[6]])),
                child: ChildId(b[4]),
                ticket: Ticket(low),
            },
            2 => Self::Register,
            _ => Self::Control { id: low },
        }
    }
}

/// The subsystem of a replica.
pub(crate) fn replica_nqn(id: ReplicaId) -> String {
    format!("nqn.2026-11.io.cairn:replica:{id}")
}

impl<D: Driver> Shard<D> {
    /// Serves an opened pool: its live replicas become subsystems.
    pub(super) fn add_pool(
        &mut self,
        name: String,
        members: Vec<PoolMember<D::Device>>,
        pool: MultiPool,
    ) -> Result<(), EngineError> {
        if self.pools.iter().any(|p| p.name == name) {
            return Err(EngineError::Exists { kind: "pool", name });
        }
        if self.pools.len() >= 1 << POOL_BITS {
            return Err(EngineError::Invalid("a process serves at most 1024 pools".to_owned()));
        }
        let lens: Vec<u64> = members.iter().map(|member| member.len).collect();
        let mut devices = Vec::new();
        for member in members {
            match self.driver.attach_device(member.device) {
                Ok(device) => devices.push(Some(Attached {
                    device,
                    path: member.path,
                    noise: Noise::default(),
                })),
                Err(e) => {
                    for attached in devices.into_iter().flatten() {
                        self.driver.detach_device(attached.device);
                    }
                    return Err(EngineError::Storage(format!(
                        "pool `{name}` at {}: {e}",
                        member.path
                    )));
                }
            }
        }
        let slots: Vec<ReplicaSlot> = pool.replicas().map(|r| r.slot).collect();
        let leases = Leases::assumed(&pool, self.now_ms() + self.config.lease_ms);
        self.pools.push(LocalPool {
            name,
            devices,
            pool,
            busy: true,
            failed: false,
            failed_devices: 0,
            registers: VecDeque::new(),
            register_busy: false,
            leases,
            control: Vec::new(),
            next_control: 0,
        });
        let at = u16::try_from(self.pools.len() - 1).expect("fewer than 2^16 pools");
        for slot in slots {
            self.export_replica(at, slot)?;
        }
        self.drop_orphans(at);
        let found = self.pools[usize::from(at)].pool.members();
        for (number, len) in (0u8..).zip(lens) {
            let used = found.iter().find(|m| m.number == Some(number)).map_or(0, |m| m.device_len);
            if used > 0 && len / 4096 > used / 4096 {
                let tag = self.control_tag(at, Waiter::Grow { reply: None });
                self.pools[usize::from(at)].pool.grow(tag, number, len, self.driver.memory());
            }
        }
        Ok(())
    }

    fn pool_named(&self, name: &str) -> Result<u16, EngineError> {
        let at = self
            .pools
            .iter()
            .position(|p| p.name == name)
            .ok_or_else(|| EngineError::NotFound { kind: "pool", name: name.to_owned() })?;
        Ok(u16::try_from(at).expect("at most 1024 pools"))
    }

    /// Takes a device into a pool.
    pub(super) fn add_device(
        &mut self,
        name: &str,
        member: PoolMember<D::Device>,
        opened: Pool,
        reply: Reply<()>,
    ) {
        let at = match self.pool_named(name) {
            Ok(at) => at,
            Err(error) => return reply.send(Err(error)),
        };
        let device = match self.driver.attach_device(member.device) {
            Ok(device) => device,
            Err(e) => {
                return reply.send(Err(EngineError::Storage(format!("{}: {e}", member.path))));
            }
        };
        let waiter = Waiter::Devices { what: "a device was added", reply };
        let tag = self.control_tag(at, waiter);
        let local = &mut self.pools[usize::from(at)];
        match local.pool.add_device(tag, opened, self.driver.memory()) {
            Ok(number) => {
                let number = usize::from(number);
                if local.devices.len() <= number {
                    local.devices.resize_with(number + 1, || None);
                }
                local.devices[number] =
                    Some(Attached { device, path: member.path, noise: Noise::default() });
            }
            Err(error) => {
                self.driver.detach_device(device);
                if let Some((_, waiter)) = self.pools[usize::from(at)].control.pop() {
                    self.control_done(at, waiter, Err(EngineError::Invalid(error.to_string())));
                }
            }
        }
    }

    /// Begins to remove a device from a pool.
    pub(super) fn remove_device(&mut self, name: &str, device: PoolDeviceId, reply: Reply<()>) {
        let at = match self.pool_named(name) {
            Ok(at) => at,
            Err(error) => return reply.send(Err(error)),
        };
        let waiter = Waiter::Devices { what: "the removal of a device has begun", reply };
        let tag = self.control_tag(at, waiter);
        self.pools[usize::from(at)].pool.remove_device(tag, device, self.driver.memory());
    }

    /// The subsystem of a replica.
    pub(super) fn replica_nqn(id: ReplicaId) -> String {
        replica_nqn(id)
    }

    pub(super) fn export_replica(
        &mut self,
        pool: u16,
        slot: ReplicaSlot,
    ) -> Result<(), EngineError> {
        let local = &self.pools[usize::from(pool)].pool;
        let info =
            local.replicas().find(|r| r.slot == slot).filter(|r| r.state == ReplicaState::Live);
        let Some(info) = info else { return Ok(()) };
        let subsystem = self
            .target
            .add_subsystem(SubsystemConfig {
                nqn: Self::replica_nqn(info.id),
                serial: serial_of(info.id.0),
                cntlid_min: self.config.cntlid_min,
                cntlid_max: self.config.cntlid_max,
                allowed_hosts: None,
                vendor_commands: true,
                discoverable: false,
                ana: None,
            })
            .map_err(|e| EngineError::Invalid(e.to_string()))?;
        let handle = self.export_handle(Export::Replica {
            pool,
            slot,
            id: info.id,
            subsystem,
            counters: crate::control::ExportCounters::default(),
        });
        let namespace = NamespaceConfig {
            nsid: 1,
            handle,
            blocks: info.blocks,
            block_size: info.block_size,
            id: info.id.0,
            volatile_write_cache: true,
            reservations: false,
        };
        self.target
            .add_namespace(subsystem, namespace)
            .map_err(|e| EngineError::Invalid(e.to_string()))
    }

    /// Where a replica is exported: its pool and its handle.
    pub(super) fn find_replica(&self, id: ReplicaId) -> Option<(u16, ReplicaSlot, usize)> {
        self.exports.iter().enumerate().find_map(|(at, export)| match export {
            Some(Export::Replica { pool, slot, id: found, .. }) if *found == id => {
                Some((*pool, *slot, at))
            }
            _ => None,
        })
    }

    pub(super) fn handle_disk(&mut self, place: u16, id: u32, result: Result<(), DiskFault>) {
        let number = u8::try_from(place >> POOL_BITS).expect("six bits");
        let now = if result.is_err() { self.now_ms() } else { 0 };
        let local = &mut self.pools[usize::from(place & ((1 << POOL_BITS) - 1))];
        let result = result.map_err(|fault| {
            let device = local.devices.get_mut(usize::from(number)).and_then(Option::as_mut);
            let said = device.map_or(Some(0), |attached| attached.noise.note(fault, now));
            if let Some(unsaid) = said {
                let path = local.path(number);
                tracing::error!(pool = %local.name, %path, %fault, unsaid, "a disk operation failed");
            }
            match fault {
                DiskFault::NoSpace => DiskError::NoSpace,
                DiskFault::Errno(_) | DiskFault::Short => DiskError::Io,
            }
        });
        local.pool.handle_disk(number, DiskId(id), result, self.driver.memory());
        local.busy = true;
        self.keep_lifeline();
    }

    /// Moves every pool on: completions out, disk operations down.
    pub(super) fn run_pools(&mut self, now: u64) -> bool {
        let mut moved = false;
        for at in 0..self.pools.len() {
            if !std::mem::take(&mut self.pools[at].busy) {
                continue;
            }
            moved = true;
            let number = u16::try_from(at).expect("fewer than 2^16 pools");
            self.pools[at].pool.retry(self.driver.memory());
            while let Some(done) = self.pools[at].pool.poll_done() {
                self.pool_done(number, done, now);
            }
            self.next_register_op(number);
            let local = &mut self.pools[at];
            while let Some((device_number, io)) = local.pool.poll_disk() {
                let attached = local.devices[usize::from(device_number)].as_ref();
                let device = attached.expect("a device is attached while it is used").device;
                let op = match io.op {
                    DiskOp::Read { offset, buf } => Op::Read { device, offset, buf },
                    DiskOp::Write { offset, buf, fua } => Op::Write { device, offset, buf, fua },
                    DiskOp::Flush => Op::Flush { device },
                    DiskOp::Zero { offset, len, punch } => Op::Zero { device, offset, len, punch },
                };
                let place = number | u16::from(device_number) << POOL_BITS;
                self.driver.submit(op, token(Subject::PoolDisk, place, io.id.0));
            }
            while let Some(device_number) = local.pool.poll_gone() {
                if let Some(attached) = local.devices[usize::from(device_number)].take() {
                    tracing::info!(pool = %local.name, path = %attached.path, "the device has left");
                    self.driver.detach_device(attached.device);
                }
                local.failed_devices &= !(1 << device_number);
            }
            if local.devices.len() > 1 && local.pool.has_failed() {
                local.log_failed();
            }
            self.watch_space(at);
            let local = &mut self.pools[at];
            if let (PoolState::Failed(why), false) = (local.pool.state(), local.failed) {
                local.failed = true;
                tracing::error!(pool = %local.name, why, "the pool is offline");
            }
        }
        moved
    }

    fn pool_done(&mut self, pool: u16, done: cairn_replica::Done, now: u64) {
        let verified = self.pools[usize::from(pool)].pool.take_verified(done.tag);
        match Owner::of(done.tag) {
            Owner::Host { io } => {
                self.host_io_verified(io, verified);
                self.host_io_done(io, done.status, now);
                self.host_io_released(io, now);
            }
            Owner::Child { volume, child, ticket } => {
                self.child_verified(volume, ticket, u64::from(verified.unwrap_or_default()));
                self.local_child_done(volume, child);
                self.child_io_done(volume, child, ticket, done.status, now);
            }
            Owner::Register => self.register_stored(pool, done.status, now),
            Owner::Control { id } => {
                let local = &mut self.pools[usize::from(pool)];
                let Some(at) = local.control.iter().position(|(i, _)| *i == id) else { return };
                let (_, waiter) = local.control.swap_remove(at);
                if let Waiter::Settle { origin, .. } = waiter {
                    self.snapshot_answered(origin, done.status, now);
                    self.finish_drains();
                    return;
                }
                if let Waiter::Snapshot { origin, made, .. } = waiter {
                    if let Some(error) = &done.error {
                        tracing::warn!(pool = %local.name, %error, "a snapshot call was refused");
                    }
                    self.snapshot_done(pool, (origin, made), done.status, now);
                    self.finish_drains();
                    return;
                }
                let result = match (done.status.is_ok(), done.error) {
                    (true, _) => Ok(()),
                    (false, Some(error)) => Err(EngineError::Invalid(error.to_string())),
                    (false, None) => {
                        Err(EngineError::Storage(format!("the pool refused: {:?}", done.status)))
                    }
                };
                self.control_done(pool, waiter, result);
            }
        }
    }

    /// A tag for a control operation on a pool, whose end `waiter` is told.
    pub(super) fn control_tag(&mut self, pool: u16, waiter: Waiter) -> u64 {
        let local = &mut self.pools[usize::from(pool)];
        local.next_control = local.next_control.wrapping_add(1);
        let id = local.next_control;
        local.control.push((id, waiter));
        local.busy = true;
        Owner::Control { id }.tag()
    }

    /// Takes back a tag that was not used.
    pub(super) fn forget_control(&mut self, pool: u16, tag: u64) {
        if let Owner::Control { id } = Owner::of(tag) {
            self.pools[usize::from(pool)].control.retain(|(i, _)| *i != id);
        }
    }

    /// Whether a snapshot call or the end of a round of settling is under way for a replica.
    pub(super) fn has_snapshot_call(&self, pool: u16, slot: ReplicaSlot) -> bool {
        let on = |w: &Waiter| match w {
            Waiter::Snapshot { slot: s, .. } | Waiter::Settle { slot: s, .. } => *s == slot,
            _ => false,
        };
        self.pools[usize::from(pool)].control.iter().any(|(_, w)| on(w))
    }

    fn control_done(&mut self, pool: u16, waiter: Waiter, result: Result<(), EngineError>) {
        match waiter {
            Waiter::Create { id, reply } => {
                let result = result.and_then(|()| {
                    let slot = self.pools[usize::from(pool)].pool.find(id);
                    slot.map_or(Ok(()), |slot| self.export_replica(pool, slot))?;
                    self.replica_reports().into_iter().find(|r| r.id == id).ok_or_else(|| {
                        EngineError::Storage("the replica was made but is not there".to_owned())
                    })
                });
                reply.send(result);
            }
            Waiter::Delete { reply } => {
                reply.send(result);
                self.drop_orphans(pool);
            }
            Waiter::Snapshot { .. } | Waiter::Settle { .. } => unreachable!("answered before"),
            Waiter::Devices { what, reply } => {
                match &result {
                    Ok(()) => tracing::info!(pool = %self.pools[usize::from(pool)].name, "{what}"),
                    Err(error) => {
                        let pool = &self.pools[usize::from(pool)].name;
                        tracing::warn!(%pool, %error, "the devices of the pool stay as they are");
                    }
                }
                reply.send(result);
            }
            Waiter::Orphan => {
                if let Err(error) = result {
                    tracing::warn!(%error, "the snapshot of a replica that is gone stays");
                }
            }
            Waiter::Checkpoint => self.checkpoint_done(),
            Waiter::Grow { reply: Some(reply) } => reply.send(result),
            Waiter::Grow { reply: None } => {
                if let Err(error) = result {
                    let pool = &self.pools[usize::from(pool)].name;
                    tracing::error!(%pool, %error, "the pool did not grow with its device");
                }
            }
        }
    }

    pub(super) fn checkpoint_pools(&mut self) {
        for at in 0..self.pools.len() {
            let number = u16::try_from(at).expect("fewer than 2^16 pools");
            let tag = self.control_tag(number, Waiter::Checkpoint);
            self.pools[at].pool.checkpoint(tag, self.driver.memory());
        }
    }
}

/// Twenty characters that tell one subsystem from another.
pub(super) fn serial_of(id: u128) -> String {
    format!("CRN{:016x}", (id >> 64) ^ (id & u128::from(u64::MAX)))
}
