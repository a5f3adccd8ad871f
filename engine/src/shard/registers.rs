//! The registers of local replicas: one operation at a time each, promises drained before they are answered.

use cairn_block::mutants::{Mutant, on};
use cairn_block::{Epoch, IoStatus, Memory};
use cairn_nexus::{ChildId, ChildReply, Register, RegisterOp, Ticket, Verdict, consider};
use cairn_nvmf::sqe::Sqe;
use cairn_nvmf::status::Status;
use cairn_nvmf::target::{NamespaceHandle, SlotId, status_of};
use cairn_reactor::Driver;
use cairn_replica::{PoolState, ReplicaSlot};

use super::Shard;
use super::io::Export;
use super::pools::Owner;
use crate::register;

/// Who asked for a register operation.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    Host { conn: u32, generation: u32, slot: SlotId },
    Volume { volume: u32, generation: u32, child: ChildId, ticket: Ticket },
}

/// A promise that is stored, but not answered before what the replica had in hand for earlier
/// sessions is over: none of it may land after the first write of the new one.
#[derive(Debug)]
pub(super) struct Drain {
    origin: Origin,
    epoch: Epoch,
    answer: Register,
    /// Requests to wait for.
    ios: Vec<u32>,
    /// On this replica.
    replica: (u16, ReplicaSlot),
}

#[derive(Debug)]
pub(super) struct Asked {
    origin: Origin,
    slot: ReplicaSlot,
    op: RegisterOp,
}

impl<D: Driver> Shard<D> {
    /// A register command from a connection.
    pub(super) fn register_command(
        &mut self,
        origin: Origin,
        namespace: NamespaceHandle,
        sqe: &Sqe,
        page: Option<Register>,
    ) {
        let Some(&mut Export::Replica { pool, slot, .. }) = self.export(namespace) else {
            self.answer_register(origin, Err(IoStatus::Unsupported));
            return;
        };
        let op = match (sqe.opcode(), page) {
            (register::OPCODE_READ, _) => RegisterOp::Read,
            (register::OPCODE_PROMISE, _) => {
                let (low, high) = (sqe.cdw(10), sqe.cdw(11));
                let epoch = (u64::from(high & !register::AGAIN) << 32) | u64::from(low);
                let again = high & register::AGAIN != 0;
                RegisterOp::Promise { epoch: Epoch(epoch), again }
            }
            (register::OPCODE_ACCEPT, Some(page)) => RegisterOp::Accept(page),
            (register::OPCODE_RENEW, Some(page)) => {
                RegisterOp::Renew { epoch: page.accepted_epoch, lease_ms: page.lease_ms }
            }
            (register::OPCODE_RESIZE, Some(page)) => {
                RegisterOp::Resize { epoch: page.accepted_epoch, blocks: page.blocks }
            }
            (register::OPCODE_ACCEPT | register::OPCODE_RESIZE | register::OPCODE_RENEW, None) => {
                self.answer_register(origin, Err(IoStatus::InvalidField));
                return;
            }
            _ => {
                self.answer_register(origin, Err(IoStatus::Unsupported));
                return;
            }
        };
        self.register_op(origin, pool, slot, op);
    }

    pub(super) fn register_op(
        &mut self,
        origin: Origin,
        pool: u16,
        slot: ReplicaSlot,
        op: RegisterOp,
    ) {
        let local = &mut self.pools[usize::from(pool)];
        local.registers.push_back(Asked { origin, slot, op });
        local.busy = true;
    }

    /// Starts the register operations that can be answered, up to one that must be stored.
    pub(super) fn next_register_op(&mut self, pool: u16) {
        let life = self.config.incarnation;
        loop {
            let local = &mut self.pools[usize::from(pool)];
            if local.register_busy {
                return;
            }
            let Some(&Asked { origin, slot, ref op }) = local.registers.front() else { return };
            // Reads wait for leases: nothing is copied for one.
            let renews = matches!(op, RegisterOp::Renew { .. });
            // Whoever asked is gone, and with it perhaps the replica: the slot may be another's now.
            if let Origin::Host { conn, generation, .. } = origin
                && self.host_queue(conn, generation).is_none()
            {
                self.pools[usize::from(pool)].registers.pop_front();
                continue;
            }
            let blocks = if renews { 0 } else { self.replica_blocks(pool, slot) };
            let now = self.now_ms();
            let local = &mut self.pools[usize::from(pool)];
            let Some(asked) = local.registers.front() else { return };
            let held = local.pool.register(slot).map(|r| match renews {
                true => Register { promised_epoch: r.promised_epoch, ..Register::default() },
                false => to_nexus(r, life, blocks),
            });
            let reads = matches!(asked.op, RegisterOp::Read);
            // What is held can be told still; what is granted or promised could not be stored, nor what comes next.
            let offline = matches!(local.pool.state(), PoolState::Failed(_)) && !reads;
            let verdict = match held {
                Some(held) => match consider(held, &asked.op) {
                    Verdict::Answer(Err(status)) => Verdict::Answer(Err(status)),
                    _ if offline => Verdict::Answer(Err(IoStatus::MediaError)),
                    verdict => verdict,
                },
                None => Verdict::Answer(Err(IoStatus::NotReady)),
            };
            let answer = match verdict {
                // Whoever stands by looks whether anybody has a lease.
                Verdict::Answer(Ok(held)) if reads => {
                    Ok(Register { lease_ms: local.leases.left(slot, Epoch(0), now), ..held })
                }
                Verdict::Answer(answer) => answer,
                Verdict::Grant { epoch, lease_ms } => {
                    local.leases.grant(slot, epoch, now + lease_ms);
                    Ok(Register::default())
                }
                Verdict::Store(register) => return self.store_register(pool, slot, register),
                Verdict::Grow(blocks) => {
                    local.register_busy = true;
                    local.busy = true;
                    let tag = Owner::Register.tag();
                    return local.pool.resize_replica(tag, slot, blocks, self.driver.memory());
                }
            };
            let Some(asked) = local.registers.pop_front() else { return };
            self.finish_register_op(pool, &asked, answer);
        }
    }

    fn store_register(&mut self, pool: u16, slot: ReplicaSlot, register: Register) {
        let local = &mut self.pools[usize::from(pool)];
        local.register_busy = true;
        let stored = cairn_replica::Register {
            promised_epoch: register.promised_epoch,
            accepted_epoch: register.accepted_epoch,
            seq: register.seq,
            config: register.config,
        };
        local.pool.write_register(Owner::Register.tag(), slot, stored, self.driver.memory());
        local.busy = true;
    }

    pub(super) fn register_stored(&mut self, pool: u16, status: IoStatus, _now: u64) {
        let life = self.config.incarnation;
        let local = &mut self.pools[usize::from(pool)];
        local.register_busy = false;
        local.busy = true;
        let Some(asked) = local.registers.pop_front() else { return };
        match (&asked.op, status) {
            (RegisterOp::Resize { .. }, IoStatus::Ok) => self.replica_resized(pool, asked.slot),
            // An accepted configuration is a promise of its epoch, too.
            (RegisterOp::Accept(new), IoStatus::Ok) => {
                self.fence_routes((pool, asked.slot), new.accepted_epoch, None);
            }
            _ => {}
        }
        let blocks = self.replica_blocks(pool, asked.slot);
        let local = &self.pools[usize::from(pool)];
        let held = local.pool.register(asked.slot).map(|r| to_nexus(r, life, blocks));
        let answer = match (status, held) {
            (IoStatus::Ok, Some(held)) => Ok(held),
            (IoStatus::Ok, None) => Err(IoStatus::NotReady),
            // Of a pool that goes on without the device that failed, it can be asked again.
            (IoStatus::MediaError, _) if !matches!(local.pool.state(), PoolState::Failed(_)) => {
                Err(IoStatus::NotReady)
            }
            (status, _) => Err(status),
        };
        self.finish_register_op(pool, &asked, answer);
    }

    /// Answers; a promise only once nothing is in hand for the sessions before it.
    fn finish_register_op(&mut self, pool: u16, asked: &Asked, answer: ChildReply) {
        let &Asked { origin, slot, ref op } = asked;
        let (RegisterOp::Promise { epoch, .. }, Ok(answer)) = (op, &answer) else {
            self.answer_register(origin, answer);
            return;
        };
        // From here on, what comes on an earlier session of this host is refused.
        self.bind_epoch(origin, *epoch);
        self.fence_routes((pool, slot), *epoch, Some(origin));
        let ios = if on(Mutant::NoDrain) { Vec::new() } else { self.ios_on(pool, slot) };
        let replica = (pool, slot);
        let now = self.now_ms();
        let lease_ms = self.pools[usize::from(pool)].leases.left(slot, *epoch, now);
        let answer = Register { lease_ms, ..answer.clone() };
        let drain = Drain { origin, epoch: *epoch, answer, ios, replica };
        self.drains.push(drain);
        self.finish_drains();
    }

    /// A host's request is over.
    pub(super) fn drained(&mut self, io: u32) {
        if self.drains.is_empty() {
            return;
        }
        for drain in &mut self.drains {
            drain.ios.retain(|&other| other != io);
        }
        self.finish_drains();
    }

    pub(super) fn finish_drains(&mut self) {
        while let Some(at) = self.drains.iter().position(|drain| {
            // Only what was in hand before the promise is counted: its nexus sends nothing before
            // the answer, and any other's is refused.
            drain.ios.is_empty()
                && !self.has_snapshot_call(drain.replica.0, drain.replica.1)
                && !self.has_local_io(drain.replica)
        }) {
            let Drain { origin, epoch, answer, .. } = self.drains.swap_remove(at);
            tracing::debug!(%epoch, "promised, and drained");
            self.answer_register(origin, Ok(answer));
        }
    }

    fn answer_register(&mut self, origin: Origin, answer: Result<Register, IoStatus>) {
        match origin {
            Origin::Volume { volume, generation, child, ticket } => {
                if let Some(v) = self.volumes.get_mut(volume).filter(|v| v.generation == generation)
                {
                    v.register_replies.push_back((child, ticket, answer));
                    self.touch_volume(volume);
                }
            }
            Origin::Host { conn, generation, slot } => {
                if self.host_queue(conn, generation).is_none() {
                    return;
                }
                let tells = answer.is_ok() && self.hosts[conn].queue.data_len(slot) > 0;
                let page = if tells { self.own_page() } else { None };
                let memory = self.driver.memory();
                let queue = &mut self.hosts[conn].queue;
                match answer {
                    Err(status) => queue.complete(slot, status_of(status), 0, memory),
                    Ok(_) if !tells => queue.complete(slot, Status::SUCCESS, 0, memory),
                    Ok(register) => match page {
                        Some(page) => {
                            register::encode(&register, memory.bytes_mut(page.slice()));
                            queue.complete_with_data(slot, page, memory);
                        }
                        None => queue.complete(slot, status_of(IoStatus::NotReady), 0, memory),
                    },
                }
                self.touch_host(conn);
            }
        }
    }

    /// From now on the controller of this connection speaks for `epoch`.
    fn bind_epoch(&mut self, origin: Origin, epoch: Epoch) {
        if let Origin::Host { conn, generation, .. } = origin
            && self.host_queue(conn, generation).is_some()
        {
            self.target.set_mark(&self.hosts[conn].queue, epoch.0);
        }
    }

    /// Whether a connection speaks for an older epoch than the replica has promised.
    pub(super) fn is_fenced(
        &self,
        conn: u32,
        generation: u32,
        pool: u16,
        slot: ReplicaSlot,
    ) -> bool {
        let promised = self.pools[usize::from(pool)]
            .pool
            .register(slot)
            .map_or(0, |register| register.promised_epoch.0);
        let host = self.hosts.get(conn).filter(|host| host.generation == generation);
        let speaks_for = host.map_or(0, |host| self.target.mark(&host.queue));
        promised > speaks_for && !on(Mutant::NoFence)
    }
}

fn to_nexus(register: &cairn_replica::Register, incarnation: u128, blocks: u64) -> Register {
    Register {
        promised_epoch: register.promised_epoch,
        accepted_epoch: register.accepted_epoch,
        seq: register.seq,
        config: register.config.clone(),
        incarnation,
        blocks,
        lease_ms: 0,
    }
}
