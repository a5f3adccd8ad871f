//! Fabrics commands: Connect, properties, Disconnect.

use cairn_block::Memory;

use super::controller::{CcChange, Controller, Kind};
use super::queue::Binding;
use super::{
    Command, ConnId, Deferred, Outcome, Queue, Status, SubsystemId, Target, answer, is_nqn, refuse,
};
use crate::log::DISCOVERY_NQN;
use crate::sqe::{Sqe, opcode};
use crate::wire::{text_at, u16_at, u64_at, u128_be_at};

/// Bytes of Connect's data.
pub(crate) const CONNECT_DATA_LEN: usize = 1024;
/// CATTR: SQ flow control is disabled.
pub(crate) const CATTR_DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;
/// Properties.
pub(crate) const PROPERTY_CAP: u32 = 0x00;
pub(crate) const PROPERTY_VS: u32 = 0x08;
pub(crate) const PROPERTY_CC: u32 = 0x14;
pub(crate) const PROPERTY_CSTS: u32 = 0x1c;
/// VS: 2.0.0.
pub(super) const VERSION: u32 = 0x0002_0000;
/// CAP: the NVM command set, and the choice of command sets; TO is 7.5 s.
const CAP: u64 = 1 << 43 | 1 << 37 | 0x0f << 24;
/// IATTR of Connect Invalid Parameters: the offset is into the data.
const IATTR_DATA: u64 = 1 << 16;
/// CNTLID FFFFh: the controller chooses.
const CNTLID_DYNAMIC: u16 = 0xffff;

/// A Connect, parsed.
struct Connect {
    qid: u16,
    sqsize: u16,
    sq_flow_control: bool,
    kato_ms: u32,
    hostid: u128,
    cntlid: u16,
    subnqn: String,
    hostnqn: String,
}

/// Why a Connect is refused: the status, and DW0.
type Refusal = (Status, u64);

fn invalid_field(offset: u64) -> Refusal {
    (Status::CONNECT_INVALID_PARAMETERS.with_dnr(), offset)
}

fn invalid_data(offset: u64) -> Refusal {
    (Status::CONNECT_INVALID_PARAMETERS.with_dnr(), IATTR_DATA | offset)
}

/// What is not there now may be there at the next try: a host gives up on DNR.
fn absent(offset: u64) -> Refusal {
    (Status::CONNECT_INVALID_PARAMETERS, IATTR_DATA | offset)
}

/// The subsystem that a Connect names; nothing for any other command.
pub fn connect_subnqn<'m, M: Memory>(cmd: &Command, mem: &'m M) -> Option<&'m str> {
    if cmd.sqe.opcode() != opcode::FABRICS || cmd.sqe.fctype() != opcode::CONNECT {
        return None;
    }
    let bytes = mem.bytes(cmd.data.as_ref()?.slice()).get(..CONNECT_DATA_LEN)?;
    text_at(bytes, 256, 256)
}

impl Connect {
    fn parse(sqe: &Sqe, data: &[u8], max_entries: u16) -> Result<Self, Refusal> {
        if sqe.u16_at(40) != 0 {
            return Err((Status::CONNECT_INCOMPATIBLE_FORMAT.with_dnr(), 0));
        }
        let sqsize = sqe.u16_at(44);
        if sqsize == 0 || sqsize >= max_entries {
            return Err(invalid_field(44));
        }
        let data =
            data.get(..CONNECT_DATA_LEN).ok_or((Status::SGL_DATA_LENGTH_INVALID.with_dnr(), 0))?;
        let nqn = |at: u64, offset: usize| {
            text_at(data, offset, 256)
                .filter(|text| is_nqn(text))
                .map(str::to_owned)
                .ok_or(invalid_data(at))
        };
        Ok(Self {
            qid: sqe.u16_at(42),
            sqsize,
            sq_flow_control: sqe.0[46] & CATTR_DISABLE_SQ_FLOW_CONTROL == 0,
            kato_ms: sqe.cdw(12),
            hostid: u128_be_at(data, 0),
            cntlid: u16_at(data, 16),
            subnqn: nqn(256, 256)?,
            hostnqn: nqn(512, 512)?,
        })
    }
}

impl Target {
    /// A command on a connection that is no queue yet: only Connect will do.
    pub(super) fn handle_unconnected<M: Memory>(
        &mut self,
        conn: ConnId,
        queue: &mut Queue,
        cmd: Command,
        now_ms: u64,
        mem: &mut M,
    ) -> Outcome {
        // Only the first: another target can take up the connection from its beginning alone.
        if !std::mem::replace(&mut queue.answered, true)
            && let Some(owner) = connect_subnqn(&cmd, mem).and_then(|nqn| self.owner_of(nqn))
        {
            if let Some(data) = cmd.data {
                mem.release(data);
            }
            return Outcome::Elsewhere(owner);
        }
        if cmd.sqe.opcode() != opcode::FABRICS || cmd.sqe.fctype() != opcode::CONNECT {
            return refuse(queue, cmd, Status::COMMAND_SEQUENCE_ERROR.with_dnr(), mem);
        }
        let data = cmd.data.as_ref().map_or(&[][..], |data| mem.bytes(data.slice()));
        let result = Connect::parse(&cmd.sqe, data, self.config.max_queue_entries)
            .and_then(|connect| self.connect(conn, queue, &connect, now_ms));
        match result {
            Ok(cntlid) => answer(queue, cmd, Status::SUCCESS, u64::from(cntlid), mem),
            Err((status, dw0)) => answer(queue, cmd, status, dw0, mem),
        }
    }

    fn connect(
        &mut self,
        conn: ConnId,
        queue: &mut Queue,
        connect: &Connect,
        now_ms: u64,
    ) -> Result<u16, Refusal> {
        let kind = if connect.subnqn == DISCOVERY_NQN {
            Kind::Discovery
        } else {
            let id = self.subsystem_by_nqn(&connect.subnqn).ok_or(absent(256))?;
            if !self.subsystem(id).is_some_and(|s| s.allows(&connect.hostnqn)) {
                return Err((Status::CONNECT_INVALID_HOST.with_dnr(), 0));
            }
            Kind::Nvm(id)
        };
        let index = if connect.qid == 0 {
            self.connect_admin(kind, conn, connect, now_ms)?
        } else {
            self.connect_io(kind, conn, connect, now_ms)?
        };
        let controller = self.controllers[index].as_ref().ok_or(absent(16))?;
        let binding = Binding {
            controller: crate::wire::len32(index),
            generation: controller.generation,
            qid: connect.qid,
        };
        queue.bind(binding, connect.sqsize, connect.sq_flow_control);
        Ok(controller.cntlid)
    }

    fn connect_admin(
        &mut self,
        kind: Kind,
        conn: ConnId,
        connect: &Connect,
        now_ms: u64,
    ) -> Result<usize, Refusal> {
        if connect.cntlid != CNTLID_DYNAMIC {
            return Err(invalid_data(16));
        }
        const BUSY: Refusal = (Status::CONNECT_CONTROLLER_BUSY, 0);
        let index = match self.controllers.iter().position(Option::is_none) {
            Some(index) => index,
            None if self.controllers.len() < self.config.max_controllers => {
                self.controllers.push(None);
                self.controllers.len() - 1
            }
            None => return Err(BUSY),
        };
        let cntlid = self.free_cntlid(kind).ok_or(BUSY)?;
        self.generation += 1;
        let mut controller = Controller::new(kind, self.generation, cntlid, conn, now_ms);
        controller.hostnqn.clone_from(&connect.hostnqn);
        controller.hostid = connect.hostid;
        controller.set_kato(connect.kato_ms);
        self.controllers[index] = Some(controller);
        Ok(index)
    }

    /// A CNTLID that no controller of the subsystem has. It comes round to a used one as late as can
    /// be, so that a host's late Connect does not find another's controller.
    fn free_cntlid(&mut self, kind: Kind) -> Option<u16> {
        let (min, max, next) = match kind {
            Kind::Discovery => (1, 0xffef, self.next_discovery_cntlid),
            Kind::Nvm(id) => {
                let s = self.subsystem(id)?;
                (s.config.cntlid_min, s.config.cntlid_max, s.next_cntlid)
            }
        };
        let taken = |cntlid| {
            self.controllers.iter().flatten().any(|c| c.kind == kind && c.cntlid == cntlid)
        };
        let cntlid = (next..=max).chain(min..next).find(|&cntlid| !taken(cntlid))?;
        let following = if cntlid == max { min } else { cntlid + 1 };
        match kind {
            Kind::Discovery => self.next_discovery_cntlid = following,
            Kind::Nvm(id) => self.subsystem_mut(id).ok()?.next_cntlid = following,
        }
        Some(cntlid)
    }

    fn connect_io(
        &mut self,
        kind: Kind,
        conn: ConnId,
        connect: &Connect,
        now_ms: u64,
    ) -> Result<usize, Refusal> {
        if kind == Kind::Discovery || connect.qid > self.config.max_io_queues {
            return Err(invalid_field(42));
        }
        let index = self
            .controllers
            .iter()
            .position(|c| c.as_ref().is_some_and(|c| c.kind == kind && c.cntlid == connect.cntlid))
            .ok_or(absent(16))?;
        let controller = self.controllers[index].as_mut().ok_or(absent(16))?;
        if controller.hostnqn != connect.hostnqn {
            return Err(invalid_data(512));
        }
        if controller.hostid != connect.hostid {
            return Err(invalid_data(0));
        }
        if !controller.is_ready() {
            return Err((Status::COMMAND_SEQUENCE_ERROR, 0));
        }
        controller.last_seen_ms = now_ms;
        let at = usize::from(connect.qid) - 1;
        if controller.io_queues.len() <= at {
            controller.io_queues.resize(at + 1, None);
        }
        // A host that reconnects may be faster than the end of its old connection.
        self.closing.extend(controller.io_queues[at].replace(conn));
        Ok(index)
    }

    /// A fabrics command on a connected queue.
    pub(super) fn handle_fabrics<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let is_admin = queue.qid() == Some(0);
        let (status, result) = match cmd.sqe.fctype() {
            opcode::CONNECT => (Status::COMMAND_SEQUENCE_ERROR.with_dnr(), 0),
            opcode::PROPERTY_GET if is_admin => self.property_get(index, &cmd.sqe),
            opcode::PROPERTY_SET if is_admin => (self.property_set(index, &cmd.sqe), 0),
            opcode::DISCONNECT if !is_admin => {
                let outcome = answer(queue, cmd, Status::SUCCESS, 0, mem);
                queue.disconnect();
                return outcome;
            }
            _ => (Status::INVALID_FIELD.with_dnr(), 0),
        };
        answer(queue, cmd, status, result, mem)
    }

    fn property_get(&self, index: usize, sqe: &Sqe) -> (Status, u64) {
        const INVALID: (Status, u64) = (Status::INVALID_FIELD.with_dnr(), 0);
        let Some(controller) = &self.controllers[index] else { return INVALID };
        let wide = sqe.0[40] & 7 == 1;
        let value = match (sqe.cdw(11), wide) {
            (PROPERTY_CAP, true) => {
                CAP | u64::from(self.config.max_queue_entries.saturating_sub(1))
            }
            (PROPERTY_VS, false) => u64::from(VERSION),
            (PROPERTY_CC, false) => u64::from(controller.cc()),
            (PROPERTY_CSTS, false) => u64::from(controller.csts()),
            _ => return INVALID,
        };
        (Status::SUCCESS, value)
    }

    fn property_set(&mut self, index: usize, sqe: &Sqe) -> Status {
        let Some(controller) = &mut self.controllers[index] else {
            return Status::INVALID_FIELD.with_dnr();
        };
        if sqe.0[40] & 7 != 0 || sqe.cdw(11) != PROPERTY_CC {
            return Status::INVALID_FIELD.with_dnr();
        }
        let [a, b, c, d, ..] = u64_at(&sqe.0, 48).to_le_bytes();
        let cc = u32::from_le_bytes([a, b, c, d]);
        // CSS: the NVM command set, or all that are supported; MPS: 4 KiB.
        if cc & 1 != 0 && (!matches!(cc >> 4 & 7, 0 | 6) || cc >> 7 & 0xf != 0) {
            return Status::INVALID_FIELD.with_dnr();
        }
        if controller.set_cc(cc) == CcChange::ResetOrShutdown {
            for queue in &mut controller.io_queues {
                self.closing.extend(queue.take());
            }
            if let Some(conn) = controller.admin {
                let status = Status::ABORTED_SQ_DELETION;
                let held = controller.take_held();
                self.deferred.extend(held.map(|slot| Deferred { conn, slot, status, result: 0 }));
            }
        }
        Status::SUCCESS
    }

    /// The subsystem of a controller that has namespaces.
    pub(super) fn subsystem_of(&self, index: usize) -> Option<(SubsystemId, &super::Subsystem)> {
        match self.controllers[index].as_ref()?.kind {
            Kind::Nvm(id) => Some((id, self.subsystem(id)?)),
            Kind::Discovery => None,
        }
    }
}
