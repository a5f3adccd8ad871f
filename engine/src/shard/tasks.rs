//! What initiators ask of a unit's disk: one request, or a job of several, and tasks that others wait for.

use cairn_block::{IoOp, IoStatus, LbaRange};
use cairn_iscsi::connection::SlotId;
use cairn_iscsi::scsi::{IoCommand, UnitHandle};
use cairn_iscsi::target::Io;
use cairn_nvmf::target::{self, NamespaceHandle};
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export, HostIo};
use super::jobs::Work;

/// A request that is answered once those before it are over: some were aborted.
#[derive(Debug)]
pub(super) struct TaskDrain {
    by: Aborter,
    ios: Vec<u32>,
    jobs: Vec<u32>,
    /// Changes of reservations.
    changes: Vec<Waiter>,
}

/// Who had tasks aborted.
#[derive(Debug, Clone, Copy)]
enum Aborter {
    /// A task management function, or whatever else the target has wait for tasks.
    Function { conn: u32, generation: u32, slot: SlotId },
    /// A preemption.
    Reserver(Waiter),
    /// A sanitize, by the volume's number and its own.
    Sanitize(u32, u64),
}

/// A connection's request that waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiter {
    /// A host's.
    Nvme { conn: u32, generation: u32, slot: target::SlotId },
    /// An initiator's.
    Iscsi { conn: u32, generation: u32, slot: SlotId },
}

/// What a unit stands for.
pub(super) fn namespace_of(unit: UnitHandle) -> NamespaceHandle {
    NamespaceHandle(unit.0)
}

impl<D: Driver> Shard<D> {
    /// Starts what an initiator asks, whose data, if any, has all arrived.
    pub(super) fn start_task(&mut self, conn: u32, io: Io, now: u64) {
        let host = &self.initiators.hosts[conn];
        let asker = Asker::Iscsi { conn, generation: host.generation, slot: io.slot };
        let namespace = namespace_of(io.unit);
        match &io.command {
            IoCommand::Read { .. } => {}
            IoCommand::Copy { segments, .. } => {
                segments.iter().for_each(|s| self.note_writing_initiator(conn, namespace_of(s.to)));
            }
            _ => self.note_writing_initiator(conn, namespace),
        }
        let new = |op, range| HostIo::new(asker, namespace, op, range);
        let one = match io.command {
            IoCommand::Read { range, len } => new(IoOp::Read, range).with_room(len),
            IoCommand::Write { range, data, fua, verify: false, atomic } => {
                new(IoOp::Write { fua }, range).with_buf(data).with_atomic(atomic)
            }
            IoCommand::Flush => new(IoOp::Flush, LbaRange::default()),
            IoCommand::Verify { range } => new(IoOp::Verify, range),
            IoCommand::WriteZeroes { range, fua, unmap } => {
                new(IoOp::WriteZeroes { fua, unmap }, range)
            }
            IoCommand::Unmap { ranges, count, fua } => {
                new(IoOp::Discard, LbaRange::default()).with_buf(ranges).with_ranges(count, fua)
            }
            IoCommand::LbaStatus { range, max_extents } => {
                return self.answer_lba_status(asker, namespace, range, max_extents);
            }
            IoCommand::Write { range, data, fua, verify: true, .. } => {
                return self.begin_job(asker, namespace, Work::write_and_verify(range, data, fua));
            }
            IoCommand::Compare { range, data, repeated } => {
                return self.begin_job(asker, namespace, Work::compare(range, data, repeated));
            }
            IoCommand::CompareAndWrite { range, data, fua } => {
                return self.begin_job(asker, namespace, Work::compare_and_write(range, data, fua));
            }
            IoCommand::OrWrite { range, data, fua } => {
                return self.begin_job(asker, namespace, Work::or_write(range, data, fua));
            }
            IoCommand::WriteSame { range, data, fua } => {
                return self.begin_job(asker, namespace, Work::write_same(range, data, fua));
            }
            IoCommand::Copy { segments, fua } => {
                return self.begin_job(asker, namespace, Work::copy(segments, fua));
            }
        };
        self.begin_io(one, now);
    }

    /// The initiator of a connection writes to a volume.
    fn note_writing_initiator(&mut self, conn: u32, namespace: NamespaceHandle) {
        if self.initiators.hosts[conn].written.contains(&namespace) {
            return;
        }
        let Some(&mut Export::Volume(volume)) = self.export(namespace) else { return };
        let Some(name) = self.initiator_name(conn) else { return };
        self.add_writer(volume, &name);
        let host = &mut self.initiators.hosts[conn];
        host.writer = Some(name.into());
        host.written.push(namespace);
    }

    /// Tasks were aborted: `slot` is answered once all that was handed out for these units is over.
    pub(super) fn drain_tasks(&mut self, conn: u32, slot: SlotId, units: &[UnitHandle]) {
        let generation = self.initiators.hosts[conn].generation;
        let by = Aborter::Function { conn, generation, slot };
        let namespaces: Vec<_> = units.iter().map(|&unit| namespace_of(unit)).collect();
        let mut changes = Vec::new();
        for &namespace in &namespaces {
            if let Some(&mut Export::Volume(volume)) = self.export(namespace) {
                changes.extend(
                    self.volumes.get(volume).into_iter().flat_map(|v| v.reserving.askers()),
                );
                // Those that wait for something else are dropped there.
                self.touch_volume(volume);
            }
        }
        self.end_aborted_sanitizes();
        self.drain(by, &namespaces, changes);
    }

    /// A volume is to be sanitized: that waits for all that is in hand.
    pub(super) fn drain_for_sanitize(&mut self, at: u32, number: u64) {
        let namespace = self.volumes[at].export.map(|(_, handle)| handle);
        let by = Aborter::Sanitize(at, number);
        self.drain(by, namespace.as_slice(), Vec::new());
    }

    /// Hosts were preempted: whoever did it is answered once nothing is in hand any more.
    pub(super) fn drain_volume(&mut self, at: u32, by: Waiter) {
        let namespace = self.volumes[at].export.map(|(_, handle)| handle);
        // Theirs that wait to be made never are.
        self.drain(Aborter::Reserver(by), namespace.as_slice(), Vec::new());
    }

    fn drain(&mut self, by: Aborter, namespaces: &[NamespaceHandle], changes: Vec<Waiter>) {
        let mut drain = TaskDrain { by, ios: Vec::new(), jobs: Vec::new(), changes };
        for &namespace in namespaces {
            drain.ios.append(&mut self.ios_of(namespace));
            drain.jobs.append(&mut self.jobs_of(namespace));
        }
        self.initiators.drains.push(drain);
        self.finish_task_drains();
    }

    /// A request is over.
    pub(super) fn tasks_drained(&mut self, io: u32) {
        if self.initiators.drains.is_empty() {
            return;
        }
        for drain in &mut self.initiators.drains {
            drain.ios.retain(|&other| other != io);
        }
        self.finish_task_drains();
    }

    /// A job is over.
    pub(super) fn job_drained(&mut self, job: u32) {
        for drain in &mut self.initiators.drains {
            drain.jobs.retain(|&other| other != job);
        }
        self.finish_task_drains();
    }

    /// A change of reservations is over.
    pub(super) fn change_drained(&mut self, change: Waiter) {
        for drain in &mut self.initiators.drains {
            drain.changes.retain(|&other| other != change);
        }
        self.finish_task_drains();
    }

    fn finish_task_drains(&mut self) {
        let over = |d: &TaskDrain| d.ios.is_empty() && d.jobs.is_empty() && d.changes.is_empty();
        while let Some(at) = self.initiators.drains.iter().position(over) {
            let TaskDrain { by, .. } = self.initiators.drains.swap_remove(at);
            let (conn, generation, slot) = match by {
                Aborter::Function { conn, generation, slot } => (conn, generation, slot),
                Aborter::Reserver(by) => {
                    self.end_change(by, Ok(()));
                    continue;
                }
                Aborter::Sanitize(volume, number) => {
                    self.sanitize_drained(volume, number);
                    continue;
                }
            };
            let host = self.initiators.hosts.get_mut(conn);
            if let Some(host) = host.filter(|host| host.generation == generation) {
                host.conn.complete(slot, IoStatus::Ok, self.driver.memory());
                self.touch_initiator(conn);
            }
        }
    }
}
