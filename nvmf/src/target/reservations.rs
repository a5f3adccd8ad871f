//! Reservation commands and features, and what hosts are told of changes.

use cairn_block::Memory;
use cairn_block::reservation::{Action, Change, Effects, Registrant};

use super::admin::NSID_ALL;
use super::controller::Kind;
use super::{
    Command, NamespaceConfig, NamespaceHandle, Outcome, Queue, Status, SubsystemId, Target, refuse,
};
use crate::ana::AnaState;
use crate::reservation::{NOTICES, Request, change, report_len};
use crate::sqe::opcode;

/// I/O commands of namespaces that can be reserved.
pub(super) const RESERVATION_OPCODES: [u8; 4] = [
    opcode::RESERVATION_REGISTER,
    opcode::RESERVATION_REPORT,
    opcode::RESERVATION_ACQUIRE,
    opcode::RESERVATION_RELEASE,
];

impl Target {
    /// A reservation command for a namespace that there is.
    pub(super) fn handle_reservation<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        mut cmd: Command,
        namespace: &NamespaceConfig,
        mem: &mut M,
    ) -> Outcome {
        if !namespace.reservations {
            return refuse(queue, cmd, Status::INVALID_OPCODE.with_dnr(), mem);
        }
        let (slot, namespace) = (cmd.slot, namespace.handle);
        let request = if cmd.sqe.opcode() == opcode::RESERVATION_REPORT {
            match report_len(&cmd.sqe) {
                Ok(len) => {
                    let room = queue.data_len(slot);
                    let len = u32::try_from(len).unwrap_or(u32::MAX).min(room);
                    if len == 0 {
                        return refuse(queue, cmd, Status::INVALID_FIELD.with_dnr(), mem);
                    }
                    let Some(data) = mem.alloc(len) else {
                        queue.park(slot, cmd.data);
                        return Outcome::Done;
                    };
                    Ok(Request::Report(data))
                }
                Err(status) => Err(status),
            }
        } else {
            let data = cmd.data.take();
            let bytes = data.as_ref().map(|data| mem.bytes(data.slice())).unwrap_or_default();
            let asked = self.registrant(index).and_then(|who| change(who, &cmd.sqe, bytes));
            if let Some(data) = data {
                mem.release(data);
            }
            asked.map(Request::Change)
        };
        match request {
            Ok(request) => Outcome::Reserve { slot, namespace, request },
            Err(status) => refuse(queue, cmd, status, mem),
        }
    }

    /// The host of a controller, as reservations know it: all of its controllers are one.
    fn registrant(&self, index: usize) -> Result<Registrant, Status> {
        let controller = self.controllers[index].as_ref();
        let controller = controller.filter(|controller| controller.hostid != 0);
        // Without an identifier nobody could tell that the next controller is the same host's.
        let controller = controller.ok_or(Status::COMMAND_SEQUENCE_ERROR.with_dnr())?;
        let (host_id, host_nqn) = (controller.hostid, controller.hostnqn.clone());
        Ok(Registrant::Nvme { host_id, host_nqn })
    }

    /// Get or Set Features, Reservation Persistence.
    pub(super) fn persistence<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let asked = self.ask_persistence(index, &cmd);
        match asked {
            Ok((namespace, request)) => {
                let slot = cmd.slot;
                if let Some(data) = cmd.data {
                    mem.release(data);
                }
                Outcome::Reserve { slot, namespace, request }
            }
            Err(status) => refuse(queue, cmd, status, mem),
        }
    }

    fn ask_persistence(
        &self,
        index: usize,
        cmd: &Command,
    ) -> Result<(NamespaceHandle, Request), Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let (sqe, sets) = (&cmd.sqe, cmd.sqe.opcode() == opcode::SET_FEATURES);
        let [_, sel, _, save] = sqe.cdw(10).to_le_bytes();
        if sets && save & 0x80 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        if !sets && sel & 7 != 0 || sets && sqe.cdw(11) & !1 != 0 {
            return Err(invalid);
        }
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid)?;
        let all: Vec<_> = subsystem.namespaces.iter().filter(|ns| ns.reservations).collect();
        let namespace = match (sqe.nsid(), all.as_slice()) {
            // One command changes one namespace here.
            (NSID_ALL, &[only]) if sets => only,
            (NSID_ALL, _) => return Err(invalid),
            (nsid, all) => all.iter().find(|ns| ns.nsid == nsid).copied().ok_or(invalid)?,
        };
        if let Some(status) = subsystem.config.ana.and_then(AnaState::refusal) {
            return Err(status);
        }
        if !sets {
            return Ok((namespace.handle, Request::Persistence));
        }
        let registrant = self.registrant(index)?;
        let action = Action::Persist(sqe.cdw(11) & 1 != 0);
        Ok((namespace.handle, Request::Change(Change { registrant, key: 0, action })))
    }

    /// Get Features, Reservation Notification Mask.
    pub(super) fn notification_mask(&self, index: usize, nsid: u32) -> Result<u32, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid)?;
        subsystem.namespace(nsid).filter(|ns| ns.reservations).ok_or(invalid)?;
        Ok(self.controllers[index].as_ref().ok_or(invalid)?.notification_mask(nsid))
    }

    /// Set Features, Reservation Notification Mask.
    pub(super) fn set_notification_mask(
        &mut self,
        index: usize,
        nsid: u32,
        mask: u32,
    ) -> Result<u64, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid)?;
        let meant = |ns: &&NamespaceConfig| ns.reservations && [ns.nsid, NSID_ALL].contains(&nsid);
        let nsids: Vec<u32> = subsystem.namespaces.iter().filter(meant).map(|ns| ns.nsid).collect();
        let controller = self.controllers[index].as_mut().ok_or(invalid)?;
        if nsids.is_empty() || mask & !NOTICES != 0 {
            return Err(invalid);
        }
        for nsid in nsids {
            controller.set_notification_mask(nsid, mask);
        }
        Ok(0)
    }

    /// The host of a queue was preempted: commands for a namespace whose data is still on its way are not handed out,
    /// and end as aborted.
    pub fn abort_incoming(&self, queue: &mut Queue, namespace: NamespaceHandle) {
        let Some(binding) = queue.binding.filter(|_| self.host_id_of(queue).is_some()) else {
            return;
        };
        let subsystem = self.subsystem_of(binding.controller as usize);
        let found =
            subsystem.and_then(|(_, s)| s.namespaces.iter().find(|ns| ns.handle == namespace));
        if let Some(nsid) = found.map(|ns| ns.nsid) {
            queue.abort_incoming(nsid, Status::PREEMPTED_AND_ABORTED);
        }
    }

    /// The reservations of a namespace were changed: tells the hosts that lost something by it.
    pub fn tell_reservations(&mut self, namespace: NamespaceHandle, effects: &Effects) {
        for at in 0..self.subsystems.len() {
            let Some(subsystem) = &self.subsystems[at] else { continue };
            let found = subsystem.namespaces.iter().find(|ns| ns.handle == namespace);
            let Some(nsid) = found.map(|ns| ns.nsid) else { continue };
            let kind = Kind::Nvm(SubsystemId(crate::wire::len32(at)));
            for controller in self.controllers.iter_mut().flatten().filter(|c| c.kind == kind) {
                for (who, notice) in &effects.notices {
                    let is_meant = matches!(
                        who,
                        Registrant::Nvme { host_id, .. } if *host_id == controller.hostid
                    );
                    if is_meant {
                        self.deferred.extend(controller.notify(nsid, *notice));
                    }
                }
            }
        }
    }
}
