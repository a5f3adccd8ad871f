//! What hosts have reserved of a volume, of both transports in one table.
//!
//! A change is tried on a copy, stored by a majority of the volume's voters, and holds from then on: whoever takes the
//! volume over finds it. Changes go one after another.

use std::collections::VecDeque;

use cairn_block::mutants::{Mutant, on};
use cairn_block::reservation::{Change, Effects, Guard, Registrant, Reservations};
use cairn_block::{IoOp, IoStatus};
use cairn_iscsi::connection::{NotReserved, SlotId};
use cairn_iscsi::scsi::UnitHandle;
use cairn_nexus::ChangeError;
use cairn_nvmf::status::Status;
use cairn_reactor::Driver;

use super::Shard;
use super::io::{Asker, Export};
use super::tasks::{Waiter, namespace_of};

#[derive(Debug)]
struct Asked {
    by: Waiter,
    change: Change,
}

/// A change that is being stored.
#[derive(Debug)]
struct Storing {
    by: Waiter,
    table: Reservations,
    effects: Effects,
}

/// A volume's table, and what is to become of it.
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

    /// Whether somebody has reserved it, not only registered.
    pub(super) fn is_reserved(&self) -> bool {
        self.table.reserved().is_some()
    }

    /// Whose changes are not over.
    pub(super) fn askers(&self) -> impl Iterator<Item = Waiter> {
        let storing = self.storing.as_ref().map(|storing| storing.by);
        storing.into_iter().chain(self.queue.iter().map(|asked| asked.by))
    }

    /// Whether changes wait.
    pub(super) fn is_waiting(&self) -> bool {
        self.storing.is_none() && !self.queue.is_empty()
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn reserve_for_initiator(
        &mut self,
        conn: u32,
        slot: SlotId,
        unit: UnitHandle,
        change: Change,
        now: u64,
    ) {
        let generation = self.initiators.hosts[conn].generation;
        let by = Waiter { conn, generation, slot };
        match self.export(namespace_of(unit)) {
            Some(&mut Export::Volume(at)) => self.change_reservations(at, by, change, now),
            _ => self.end_change(by, Err(NotReserved::NotStored(IoStatus::NotReady))),
        }
    }

    /// A host wants to change what is reserved of a volume.
    pub(super) fn change_reservations(&mut self, at: u32, by: Waiter, change: Change, now: u64) {
        let Some(volume) = self.volumes.get_mut(at) else {
            return self.end_change(by, Err(NotReserved::NotStored(IoStatus::NotReady)));
        };
        volume.reserving.queue.push_back(Asked { by, change });
        self.advance_reservations(at, now);
        self.touch_volume(at);
    }

    /// Begins the next change, where that can be now.
    pub(super) fn advance_reservations(&mut self, at: u32, now: u64) {
        while self.volumes[at].reserving.is_waiting() {
            let Some(Asked { by, change }) = self.volumes[at].reserving.queue.pop_front() else {
                return;
            };
            // Whoever it was that asked was aborted, perhaps by the change before, or is gone.
            if !self.waits(by) {
                self.end_change(by, Err(NotReserved::NotStored(IoStatus::Aborted)));
                continue;
            }
            let volume = &mut self.volumes[at];
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
                    return volume.reserving.queue.push_front(Asked { by, change });
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

    /// Tells the units of a volume.
    pub(super) fn install_reservations(&mut self, at: u32, effects: &Effects) {
        let volume = &self.volumes[at];
        let Some((_, handle)) = volume.export else { return };
        let (unit, table) = (UnitHandle(handle.0), volume.reserving.table.clone());
        // A volume that is no logical unit has nobody to tell.
        if self.initiators.target.reservations(unit).is_some() {
            let set = self.initiators.target.set_reservations(unit, table, effects);
            set.expect("the unit is there");
        }
        self.settle_target();
    }

    /// The volume is served here no more: changes that are not stored are not made.
    pub(super) fn forget_reservations(&mut self, at: u32, status: IoStatus) {
        let reserving = &mut self.volumes[at].reserving;
        let storing = reserving.storing.take().map(|storing| storing.by);
        let waiting: Vec<Waiter> = reserving.queue.drain(..).map(|asked| asked.by).collect();
        for by in storing.into_iter().chain(waiting) {
            self.end_change(by, Err(NotReserved::NotStored(status)));
        }
    }

    /// Whether a request is still to be carried out.
    fn waits(&self, by: Waiter) -> bool {
        let host = self.initiators.hosts.get(by.conn);
        let host = host.filter(|host| host.generation == by.generation);
        host.is_some_and(|host| !host.conn.is_aborted(by.slot))
    }

    /// Tells whoever asked for a change what became of it.
    pub(super) fn end_change(&mut self, by: Waiter, result: Result<(), NotReserved>) {
        let Waiter { conn, generation, slot } = by;
        let host = self.initiators.hosts.get_mut(conn);
        if let Some(host) = host.filter(|host| host.generation == generation) {
            host.conn.complete_reserve(slot, result, self.driver.memory());
            self.touch_initiator(conn);
        }
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
        self.refuse_host(io, (conn, generation, slot), Status::RESERVATION_CONFLICT);
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
