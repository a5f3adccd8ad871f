//! What hosts have reserved of a volume, of both transports in one table.
//!
//! A change is tried on a copy, stored by a majority of the volume's voters, and holds from then on: whoever takes the
//! volume over finds it. Changes go one after another.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::reservation::{Change, Effects, Guard, Registrant, Reservations};
use cairn_block::{Buf, IoOp, IoStatus, Memory};
use cairn_iscsi::connection::{NotReserved, SlotId};
use cairn_iscsi::scsi::{ReserveIn, UnitHandle};
use cairn_nexus::ChangeError;
use cairn_nvmf::reservation::{Request, encode_report, refused};
use cairn_nvmf::status::{Status, status_of};
use cairn_nvmf::target::{self, NamespaceHandle};
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export};
use super::tasks::{Waiter, namespace_of};

/// What is asked of a volume's reservations.
#[derive(Debug)]
pub(super) enum Ask {
    Change(Change),
    /// PERSISTENT RESERVE IN.
    In(ReserveIn),
    /// Reservation Report, into this buffer.
    Report(Buf),
    /// Get Features, Reservation Persistence.
    Persistence,
}

#[derive(Debug)]
struct Asked {
    by: Waiter,
    ask: Ask,
}

/// A change that is being stored.
#[derive(Debug)]
struct Storing {
    by: Waiter,
    table: Reservations,
    effects: Effects,
}

/// A volume's table, what is to become of it, and who wants to know.
#[derive(Debug, Default)]
pub(super) struct Reserving {
    table: Reservations,
    queue: VecDeque<Asked>,
    storing: Option<Storing>,
}

impl Reserving {
    /// Whether nothing is reserved, and nobody registered.
    pub(super) fn is_free(&self) -> bool {
        self.table.is_empty()
    }

    /// Whether it is reserved, and by initiators alone.
    pub(super) fn is_held_by_initiators(&self) -> bool {
        let is_host = |r: &Registrant| matches!(r, Registrant::Nvme { .. });
        let mut all = self.table.registrations().iter();
        self.table.reserved().is_some()
            && !all.any(|r| self.table.holds(r) && is_host(&r.registrant))
    }

    /// Whose requests are not over.
    pub(super) fn askers(&self) -> impl Iterator<Item = Waiter> {
        let storing = self.storing.as_ref().map(|storing| storing.by);
        storing.into_iter().chain(self.queue.iter().map(|asked| asked.by))
    }

    /// Whether requests wait.
    pub(super) fn is_waiting(&self) -> bool {
        self.storing.is_none() && !self.queue.is_empty()
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn reserve_for_initiator(
        &mut self,
        (conn, slot): (u32, SlotId),
        unit: UnitHandle,
        ask: Ask,
        now: u64,
    ) {
        let generation = self.initiators.hosts[conn].generation;
        let by = Waiter::Iscsi { conn, generation, slot };
        self.ask_reservations(namespace_of(unit), Asked { by, ask }, now);
    }

    pub(super) fn reserve_for_host(
        &mut self,
        conn: u32,
        slot: target::SlotId,
        namespace: NamespaceHandle,
        request: Request,
        now: u64,
    ) {
        let generation = self.hosts[conn].generation;
        let by = Waiter::Nvme { conn, generation, slot };
        let ask = match request {
            Request::Change(change) => Ask::Change(change),
            Request::Report(data) => Ask::Report(data),
            Request::Persistence => Ask::Persistence,
        };
        self.ask_reservations(namespace, Asked { by, ask }, now);
    }

    /// Somebody wants to change what is reserved of a volume, or to know it.
    fn ask_reservations(&mut self, namespace: NamespaceHandle, asked: Asked, now: u64) {
        let Some(&mut Export::Volume(at)) = self.export(namespace) else {
            return self.refuse_asked(asked, IoStatus::NotReady);
        };
        let Some(volume) = self.volumes.get_mut(at) else {
            return self.refuse_asked(asked, IoStatus::NotReady);
        };
        volume.reserving.queue.push_back(asked);
        self.advance_reservations(at, now);
        self.touch_volume(at);
    }

    /// Ends a request that nothing was done for.
    fn refuse_asked(&mut self, Asked { by, ask }: Asked, status: IoStatus) {
        match ask {
            Ask::In(query) => return self.tell_initiator(by, query, Err(status)),
            Ask::Report(data) => self.release(data),
            Ask::Change(_) | Ask::Persistence => {}
        }
        self.end_change(by, Err(NotReserved::NotStored(status)));
    }

    /// Goes on with what is asked, where that can be now.
    ///
    /// All of it is under the nexus' lease, as reads are: a nexus that took the volume over meanwhile may have another
    /// table, by which a change would not be refused, or be one.
    pub(super) fn advance_reservations(&mut self, at: u32, now: u64) {
        self.drop_aborted(at);
        while self.volumes[at].reserving.is_waiting() {
            let nexus = &mut self.volumes[at].nexus;
            let serves = nexus.state().is_serving();
            if serves && !nexus.has_lease(now) {
                nexus.want_lease(now);
                return self.send_children(at, now);
            }
            let Some(asked) = self.volumes[at].reserving.queue.pop_front() else { return };
            if !serves {
                self.refuse_asked(asked, IoStatus::NotReady);
                continue;
            }
            let Asked { by, ask } = asked;
            let volume = &mut self.volumes[at];
            let change = match ask {
                Ask::Change(change) => change,
                Ask::In(query) => {
                    self.tell_initiator(by, query, Ok(at));
                    continue;
                }
                Ask::Report(data) => {
                    let table = &volume.reserving.table;
                    encode_report(table, self.driver.memory().bytes_mut(data.slice()));
                    self.complete_report(by, data);
                    continue;
                }
                Ask::Persistence => {
                    let aptpl = u64::from(volume.reserving.table.aptpl());
                    self.complete_for_host(by, Status::SUCCESS, aptpl);
                    self.change_drained(by);
                    continue;
                }
            };
            let mut table = volume.reserving.table.clone();
            let effects = match table.apply(&change) {
                Ok(effects) => effects,
                Err(refusal) => {
                    self.end_change(by, Err(NotReserved::Refused(refusal)));
                    continue;
                }
            };
            if table == volume.reserving.table {
                self.end_change(by, Ok(()));
                continue;
            }
            if on(Mutant::ReservationsNotStored) {
                volume.reserving.storing = Some(Storing { by, table, effects });
                self.reservations_stored(at, now);
                continue;
            }
            match volume.nexus.set_reservations(table.encode(), now) {
                Ok(()) => volume.reserving.storing = Some(Storing { by, table, effects }),
                // An earlier change of the volume is being stored.
                Err(ChangeError::Busy | ChangeError::Restoring(_)) => {
                    let ask = Ask::Change(change);
                    return volume.reserving.queue.push_front(Asked { by, ask });
                }
                Err(_) => {
                    self.end_change(by, Err(NotReserved::NotStored(IoStatus::NotReady)));
                }
            }
        }
    }

    /// A table is stored: it holds from now on.
    pub(super) fn reservations_stored(&mut self, at: u32, now: u64) {
        let volume = &mut self.volumes[at];
        let Some(Storing { by, table, effects }) = volume.reserving.storing.take() else {
            return self.load_reservations(at);
        };
        volume.reserving.table = table;
        self.install_reservations(at, &effects);
        self.abort_hosts(at, &effects.abort);
        if effects.abort.is_empty() {
            self.end_change(by, Ok(()));
        } else {
            // What they had sent may still be on its way to the disk.
            self.drain_volume(at, by);
        }
        self.advance_reservations(at, now);
    }

    /// The nexus serves: what is stored is what holds.
    pub(super) fn load_reservations(&mut self, at: u32) {
        let volume = &mut self.volumes[at];
        if volume.reserving.storing.is_some() {
            return;
        }
        let stored = volume.nexus.reservations();
        let table = match stored {
            [] => Reservations::default(),
            _ if on(Mutant::ReservationsForgotten) => Reservations::default(),
            bytes => Reservations::decode(bytes).expect("the nexus takes up no other"),
        };
        if table != volume.reserving.table {
            volume.reserving.table = table;
            self.install_reservations(at, &Effects::default());
        }
    }

    /// Tells the hosts and the units of a volume.
    pub(super) fn install_reservations(&mut self, at: u32, effects: &Effects) {
        let volume = &self.volumes[at];
        let Some((_, handle)) = volume.export else { return };
        self.target.tell_reservations(handle, effects);
        let (unit, table) = (UnitHandle(handle.0), volume.reserving.table.clone());
        // A volume that is no logical unit has nobody to tell.
        if self.initiators.target.reservations(unit).is_some() {
            let set = self.initiators.target.set_reservations(unit, table, effects);
            set.expect("the unit is there");
        }
        self.settle_target();
    }

    /// Hosts were preempted: what they have sent ends as aborted, once nobody works on it any more. Of initiators that
    /// the target sees to.
    fn abort_hosts(&mut self, at: u32, whose: &[Registrant]) {
        let Some((_, namespace)) = self.volumes[at].export else { return };
        let ids = whose.iter().filter_map(|who| match who {
            Registrant::Nvme { host_id, .. } => Some(*host_id),
            Registrant::Iscsi { .. } => None,
        });
        for id in ids {
            for conn in self.hosts.keys() {
                let host = &mut self.hosts[conn];
                if self.target.host_id_of(&host.queue).is_none_or(|(host_id, _)| host_id != id) {
                    continue;
                }
                self.target.abort_incoming(&mut host.queue, namespace);
                let generation = host.generation;
                for io in self.ios_of(namespace) {
                    self.ios[io].preempt(conn, generation);
                }
                self.abort_asked(at, (conn, generation));
            }
        }
    }

    /// What a host asks of the reservations, and was not begun, is not done.
    fn abort_asked(&mut self, at: u32, whose: (u32, u32)) {
        let is_meant = |asked: &Asked| match asked.by {
            Waiter::Nvme { conn, generation, .. } => (conn, generation) == whose,
            Waiter::Iscsi { .. } => false,
        };
        let queue = std::mem::take(&mut self.volumes[at].reserving.queue);
        let (meant, rest): (VecDeque<_>, _) = queue.into_iter().partition(is_meant);
        self.volumes[at].reserving.queue = rest;
        for asked in meant {
            self.refuse_asked(asked, IoStatus::Aborted);
        }
    }

    /// Whoever asked was aborted, perhaps by a change, or is gone: nothing is done for it.
    fn drop_aborted(&mut self, at: u32) {
        for _ in 0..self.volumes[at].reserving.queue.len() {
            let Some(asked) = self.volumes[at].reserving.queue.pop_front() else { return };
            if self.waits(asked.by) {
                self.volumes[at].reserving.queue.push_back(asked);
            } else {
                self.refuse_asked(asked, IoStatus::Aborted);
            }
        }
    }

    /// The volume is served here no more: what is not stored is not done.
    pub(super) fn forget_reservations(&mut self, at: u32, status: IoStatus) {
        let reserving = &mut self.volumes[at].reserving;
        let storing = reserving.storing.take().map(|storing| storing.by);
        let waiting = std::mem::take(&mut reserving.queue);
        if let Some(by) = storing {
            self.end_change(by, Err(NotReserved::NotStored(status)));
        }
        for asked in waiting {
            self.refuse_asked(asked, status);
        }
    }

    /// Whether a request is still to be carried out.
    fn waits(&mut self, by: Waiter) -> bool {
        match by {
            Waiter::Nvme { conn, generation, .. } => self.host_queue(conn, generation).is_some(),
            Waiter::Iscsi { conn, generation, slot } => {
                let host = self.initiators.hosts.get(conn);
                let host = host.filter(|host| host.generation == generation);
                host.is_some_and(|host| !host.conn.is_aborted(slot))
            }
        }
    }

    /// Tells whoever asked for a change what became of it.
    pub(super) fn end_change(&mut self, by: Waiter, result: Result<(), NotReserved>) {
        match by {
            Waiter::Nvme { .. } => {
                let status = match result {
                    Ok(()) => Status::SUCCESS,
                    Err(NotReserved::Refused(refusal)) => refused(refusal),
                    Err(NotReserved::NotStored(IoStatus::Aborted)) => Status::PREEMPTED_AND_ABORTED,
                    Err(NotReserved::NotStored(status)) => status_of(status),
                };
                self.complete_for_host(by, status, 0);
            }
            Waiter::Iscsi { conn, generation, slot } => {
                let host = self.initiators.hosts.get_mut(conn);
                if let Some(host) = host.filter(|host| host.generation == generation) {
                    host.conn.complete_reserve(slot, result, self.driver.memory());
                    self.touch_initiator(conn);
                }
            }
        }
        self.change_drained(by);
    }

    /// Tells an initiator what is reserved of a volume, or why it is not told.
    fn tell_initiator(&mut self, by: Waiter, query: ReserveIn, volume: Result<u32, IoStatus>) {
        if let Waiter::Iscsi { conn, generation, slot } = by {
            let table = match volume {
                Ok(at) => Ok(&self.volumes[at].reserving.table),
                Err(status) => Err(status),
            };
            let host = self.initiators.hosts.get_mut(conn);
            if let Some(host) = host.filter(|host| host.generation == generation) {
                host.conn.complete_reserve_in(slot, query, table, self.driver.memory());
            }
            self.touch_initiator(conn);
        }
        self.change_drained(by);
    }

    fn complete_for_host(&mut self, by: Waiter, status: Status, result: u64) {
        let Waiter::Nvme { conn, generation, slot } = by else { return };
        let host = self.hosts.get_mut(conn).filter(|host| host.generation == generation);
        if let Some(host) = host {
            host.queue.complete(slot, status, result, self.driver.memory());
            self.touch_host(conn);
        }
    }

    fn complete_report(&mut self, by: Waiter, data: Buf) {
        let Waiter::Nvme { conn, generation, slot } = by else { return self.release(data) };
        let memory = self.driver.memory();
        match self.hosts.get_mut(conn).filter(|host| host.generation == generation) {
            Some(host) => host.queue.complete_with_data(slot, data, memory),
            None => memory.release(data),
        }
        self.touch_host(conn);
        self.change_drained(by);
    }

    /// Whether what others have reserved keeps a host of NVMe from a request: then it is told.
    pub(super) fn is_reserved(&mut self, volume: u32, io: u32) -> bool {
        let (asker, op, _) = self.ios[io].wants();
        // Initiators' requests are checked where they come from.
        let Asker::Nvme { conn, generation, slot } = asker else { return false };
        let guard = match op {
            IoOp::Read | IoOp::Verify => Guard::Reads,
            _ => Guard::Writes,
        };
        // A host is known by its id alone.
        let host = self.hosts.get(conn).filter(|host| host.generation == generation);
        let host = host.and_then(|host| self.target.host_id_of(&host.queue));
        let registrant =
            host.map(|(host_id, _)| Registrant::Nvme { host_id, host_nqn: String::new() });
        let namespace = self.ios[io].namespace();
        let table = &self.volumes[volume].reserving.table;
        if !table.conflicts(registrant.as_ref(), guard)
            && !self.initiators.target.is_held(UnitHandle(namespace.0))
        {
            return false;
        }
        self.refuse_host(io, (conn, generation, slot), Status::RESERVATION_CONFLICT.with_dnr());
        true
    }

    /// A request of a host of NVMe, or the rest of one, is not carried out.
    pub(super) fn refuse_host(
        &mut self,
        io: u32,
        (conn, generation, slot): (u32, u32, cairn_nvmf::target::SlotId),
        status: Status,
    ) {
        let namespace = self.ios[io].namespace();
        let preempted = self.ios[io].is_preempted();
        let status = if preempted { Status::PREEMPTED_AND_ABORTED } else { status };
        let memory = self.driver.memory();
        let host = self.hosts.get_mut(conn).filter(|host| host.generation == generation);
        if let Some(host) = host {
            host.queue.complete(slot, status, 0, memory);
        }
        self.touch_host(conn);
        self.drop_io(io);
        // A range of it that is done may have been what a hold waited for.
        self.release_holds(namespace);
    }
}
