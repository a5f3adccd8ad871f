//! Admin commands.

use cairn_block::Memory;

use super::controller::{Held, KEEP_ALIVE_GRANULARITY_MS, Kind};
use super::fabrics::VERSION;
use super::io::{IO_OPCODES, MUTATING_OPCODES};
use super::reservations::RESERVATION_OPCODES;
use super::{
    Command, MAX_AERS, MAX_NSID, NamespaceConfig, Outcome, Queue, Status, Target, answer, refuse,
};
use crate::ana::{self, AnaLog};
use crate::features;
use crate::identify::{
    self, CNTRLTYPE_DISCOVERY, CNTRLTYPE_IO, IDENTIFY_LEN, IdentifyController, IdentifyNamespace,
    cns,
};
use crate::log::{self, DISCOVERY_NQN};
use crate::reservation;
use crate::sqe::{Sqe, opcode};
use crate::wire::put;

const ADMIN_OPCODES: [u8; 7] = [
    opcode::GET_LOG_PAGE,
    opcode::IDENTIFY,
    opcode::ABORT,
    opcode::SET_FEATURES,
    opcode::GET_FEATURES,
    opcode::ASYNC_EVENT_REQUEST,
    opcode::KEEP_ALIVE,
];
const LOG_PAGES: [u8; 6] = [
    log::SUPPORTED,
    log::ERROR_INFORMATION,
    log::HEALTH,
    log::FIRMWARE_SLOT,
    log::CHANGED_NAMESPACES,
    log::COMMAND_EFFECTS,
];
/// CTRATT: 128-bit host identifiers, Traffic Based Keep Alive.
const CTRATT: u32 = 1 | 1 << 6;
/// LPA: the Command Effects log page, and offsets and long reads of log pages.
const LPA: u8 = 1 << 1 | 1 << 2;
/// ONCS: Dataset Management, Write Zeroes, Verify.
const ONCS: u16 = 1 << 2 | 1 << 3 | 1 << 7;
/// ONCS: reservations.
const ONCS_RESERVATIONS: u16 = 1 << 5;
/// SGLS: supported; offsets for in-capsule data.
const SGLS: u32 = 1 | 1 << 20;
/// Broadcast NSID.
pub(super) const NSID_ALL: u32 = u32::MAX;

/// How an admin command without data ends.
type Answer = Result<u64, Status>;

impl Target {
    /// A command of an admin queue.
    pub(super) fn handle_admin<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let sqe = cmd.sqe;
        let discovery = self.controllers[index].as_ref().is_some_and(|c| c.kind == Kind::Discovery);
        let result = match sqe.opcode() {
            opcode::IDENTIFY => return self.identify(index, queue, cmd, mem),
            opcode::GET_LOG_PAGE => return self.get_log_page(index, queue, cmd, mem),
            opcode::ASYNC_EVENT_REQUEST => return self.async_event_request(index, queue, cmd, mem),
            opcode::GET_FEATURES | opcode::SET_FEATURES
                if sqe.cdw(10).to_le_bytes()[0] == features::RESERVATION_PERSISTENCE =>
            {
                return self.persistence(index, queue, cmd, mem);
            }
            opcode::GET_FEATURES => match self.get_features(index, &sqe) {
                Ok(Feature::Value(dw0)) => Ok(u64::from(dw0)),
                Ok(Feature::Data(bytes)) => return send(queue, cmd, &bytes, mem),
                Err(status) => Err(status),
            },
            opcode::SET_FEATURES => self.set_features(index, &sqe),
            opcode::KEEP_ALIVE => Ok(0),
            // DW0 b0: the command was not aborted.
            opcode::ABORT if !discovery => Ok(1),
            code if code >= opcode::VENDOR_FIRST => return self.vendor(index, queue, cmd, mem),
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        };
        match result {
            Ok(dw) => answer(queue, cmd, Status::SUCCESS, dw, mem),
            Err(status) => refuse(queue, cmd, status, mem),
        }
    }

    fn vendor<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let Some((_, subsystem)) = self.subsystem_of(index) else {
            return refuse(queue, cmd, Status::INVALID_OPCODE.with_dnr(), mem);
        };
        if !subsystem.config.vendor_commands {
            return refuse(queue, cmd, Status::INVALID_OPCODE.with_dnr(), mem);
        }
        match subsystem.namespace(cmd.sqe.nsid()) {
            Some(ns) => {
                let Command { slot, sqe, data } = cmd;
                Outcome::Vendor { slot, namespace: ns.handle, sqe, data }
            }
            None => refuse(queue, cmd, Status::INVALID_NAMESPACE.with_dnr(), mem),
        }
    }

    fn async_event_request<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let held = self.controllers[index].as_mut().map_or(Held::TooMany, |c| c.hold(cmd.slot));
        match held {
            Held::Waits => {
                if let Some(data) = cmd.data {
                    mem.release(data);
                }
                queue.hold(cmd.slot);
                Outcome::Done
            }
            Held::Fires(event) => answer(queue, cmd, Status::SUCCESS, u64::from(event), mem),
            Held::TooMany => refuse(queue, cmd, Status::AER_LIMIT_EXCEEDED.with_dnr(), mem),
        }
    }

    fn identify<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let mut page = [0; IDENTIFY_LEN];
        match self.identify_page(index, &cmd.sqe, &mut page) {
            Ok(()) => send(queue, cmd, &page, mem),
            Err(status) => refuse(queue, cmd, status, mem),
        }
    }

    /// Fills `page`, which is all zeros.
    fn identify_page(&self, index: usize, sqe: &Sqe, page: &mut [u8]) -> Result<(), Status> {
        let invalid_field = Status::INVALID_FIELD.with_dnr();
        let invalid_namespace = Status::INVALID_NAMESPACE.with_dnr();
        let code = sqe.cdw(10).to_le_bytes()[0];
        let csi = sqe.cdw(11).to_le_bytes()[3];
        if code == cns::CONTROLLER {
            self.identify_controller(index).ok_or(invalid_field)?.encode(page);
            return Ok(());
        }
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid_field)?;
        let nsid = sqe.nsid();
        let valid = (1..=MAX_NSID).contains(&nsid);
        match code {
            cns::ACTIVE_NAMESPACES_CSI | cns::CONTROLLER_CSI | cns::NAMESPACE_CSI if csi != 0 => {
                return Err(invalid_field);
            }
            cns::ACTIVE_NAMESPACES | cns::ACTIVE_NAMESPACES_CSI => {
                if nsid >= NSID_ALL - 1 {
                    return Err(invalid_namespace);
                }
                let nsids = subsystem.namespaces.iter().map(|ns| ns.nsid);
                identify::encode_active_namespaces(nsids, nsid, page);
            }
            cns::CONTROLLER_CSI => identify::encode_nvm_controller(page),
            // Bit 0 of the first combination: the NVM command set.
            cns::COMMAND_SETS => page[0] = 1,
            _ if !valid => return Err(invalid_namespace),
            cns::NAMESPACE => {
                // An inactive namespace is all zeros.
                if let Some(ns) = subsystem.namespace(nsid) {
                    let block_size = Some(ns.block_size);
                    let blocks = ns.blocks;
                    let ana_group = if subsystem.config.ana.is_some() { ana::GROUP } else { 0 };
                    IdentifyNamespace {
                        blocks,
                        block_size,
                        metadata_len: 0,
                        nguid: ns.id,
                        ana_group,
                        rescap: rescap(ns),
                    }
                    .encode(page);
                }
            }
            cns::NAMESPACE_DESCRIPTORS => {
                let ns = subsystem.namespace(nsid).ok_or(invalid_namespace)?;
                identify::encode_descriptors(ns.id, page);
            }
            cns::NAMESPACE_CSI => {
                subsystem.namespace(nsid).ok_or(invalid_namespace)?;
            }
            cns::NAMESPACE_INDEPENDENT => {
                if let Some(ns) = subsystem.namespace(nsid) {
                    let group = if subsystem.config.ana.is_some() { ana::GROUP } else { 0 };
                    identify::encode_independent(ns.volatile_write_cache, group, rescap(ns), page);
                }
            }
            _ => return Err(invalid_field),
        }
        Ok(())
    }

    fn identify_controller(&self, index: usize) -> Option<IdentifyController> {
        let controller = self.controllers[index].as_ref()?;
        let config = &self.config;
        let mut identity = IdentifyController {
            model: config.model.clone(),
            firmware: config.firmware.clone(),
            mdts: u8::try_from((config.max_data_len / 4096).max(1).ilog2()).unwrap_or(0),
            cntlid: controller.cntlid,
            version: VERSION,
            ctratt: CTRATT,
            lpa: LPA,
            aerl: u8::try_from(MAX_AERS - 1).unwrap_or(0),
            kas: u16::try_from(KEEP_ALIVE_GRANULARITY_MS / 100).unwrap_or(u16::MAX),
            maxcmd: config.max_queue_entries,
            sgls: SGLS,
            ..IdentifyController::default()
        };
        match self.subsystem_of(index) {
            None => {
                identity.serial = "discovery".into();
                identity.subnqn = DISCOVERY_NQN.into();
                identity.cntrltype = CNTRLTYPE_DISCOVERY;
                identity.oaes = features::AEN_DISCOVERY_CHANGE;
            }
            Some((_, subsystem)) => {
                identity.serial.clone_from(&subsystem.config.serial);
                identity.subnqn.clone_from(&subsystem.config.nqn);
                identity.cntrltype = CNTRLTYPE_IO;
                identity.oaes = features::AEN_NAMESPACE_ATTRIBUTE;
                // CMIC b1: the subsystem may have more controllers.
                identity.cmic = 1 << 1;
                if subsystem.config.ana.is_some() {
                    identity.cmic |= ana::CMIC;
                    identity.oaes |= features::AEN_ANA_CHANGE;
                    identity.anatt = ana::TRANSITION_TIME_S;
                    identity.anacap = ana::CAPABILITIES;
                    identity.anagrpmax = 1;
                    identity.nanagrpid = 1;
                }
                identity.acl = 3;
                identity.elpe = 127;
                identity.sqes = 0x66;
                identity.cqes = 0x44;
                identity.nn = MAX_NSID;
                identity.mnan = MAX_NSID;
                identity.oncs = ONCS;
                if subsystem.has_reservations() {
                    identity.oncs |= ONCS_RESERVATIONS;
                }
                // VWC b2:1: Flush does not take the broadcast NSID.
                let volatile = subsystem.namespaces.iter().any(|ns| ns.volatile_write_cache);
                identity.vwc = 2 << 1 | u8::from(volatile);
                identity.ioccsz = (64 + config.in_capsule_len) / 16;
                identity.iorcsz = 1;
                identity.msdbd = 1;
                // OFCS b0: Disconnect.
                identity.ofcs = 1;
            }
        }
        Some(identity)
    }

    fn get_log_page<M: Memory>(
        &mut self,
        index: usize,
        queue: &mut Queue,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let sqe = cmd.sqe;
        let [lid, lsp, numdl0, numdl1] = sqe.cdw(10).to_le_bytes();
        let [numdu0, numdu1, ..] = sqe.cdw(11).to_le_bytes();
        let dwords = u64::from(u32::from_le_bytes([numdl0, numdl1, numdu0, numdu1])) + 1;
        let offset = u64::from(sqe.cdw(12)) | u64::from(sqe.cdw(13)) << 32;
        let wanted = u64::from(queue.data_len(cmd.slot)).min(4 * dwords);
        let page = match self.log_page(index, lid, lsp) {
            Ok(page) => page,
            Err(status) => return refuse(queue, cmd, status, mem),
        };
        let Some(rest) = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(4))
            .and_then(|offset| page.get(offset..))
        else {
            return refuse(queue, cmd, Status::INVALID_FIELD.with_dnr(), mem);
        };
        let wanted = usize::try_from(wanted).unwrap_or(0);
        let Some(outcome) = try_send(queue, &cmd, &rest[..rest.len().min(wanted)], mem) else {
            queue.park(cmd.slot, cmd.data);
            return Outcome::Done;
        };
        // Retain Asynchronous Event.
        if lsp & 0x80 == 0
            && let Some(controller) = &mut self.controllers[index]
        {
            match lid {
                log::CHANGED_NAMESPACES => controller.forget_changed_namespaces(),
                log::DISCOVERY => controller.unmask(features::AEN_DISCOVERY_CHANGE),
                ana::LOG => controller.unmask(features::AEN_ANA_CHANGE),
                log::RESERVATION_NOTIFICATION => controller.forget_notification(),
                _ => {}
            }
        }
        outcome
    }

    fn log_page(&self, index: usize, lid: u8, lsp: u8) -> Result<Vec<u8>, Status> {
        let invalid = Status::INVALID_LOG_PAGE.with_dnr();
        let controller = self.controllers[index].as_ref().ok_or(invalid)?;
        if controller.kind == Kind::Discovery {
            return match lid {
                log::SUPPORTED => Ok(log::supported(&[log::SUPPORTED, log::DISCOVERY])),
                log::DISCOVERY => Ok(self.discovery_log(&controller.hostnqn)),
                _ => Err(invalid),
            };
        }
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid)?;
        let reserves = subsystem.has_reservations();
        match (lid, subsystem.config.ana) {
            (log::SUPPORTED, ana) => {
                let mut pages = LOG_PAGES.to_vec();
                pages.extend(ana.map(|_| ana::LOG));
                pages.extend(reserves.then_some(log::RESERVATION_NOTIFICATION));
                return Ok(log::supported(&pages));
            }
            (ana::LOG, Some(state)) => {
                let nsids = subsystem.namespaces.iter().map(|ns| ns.nsid).collect();
                let log = AnaLog { changes: subsystem.ana_changes, state, nsids };
                return Ok(log.encode(lsp & 1 != 0));
            }
            _ => {}
        }
        match lid {
            log::RESERVATION_NOTIFICATION if reserves => Ok(controller.notification_log()),
            // ELPE is 0's based; no error was ever logged.
            log::ERROR_INFORMATION => Ok(vec![0; 64 * 128]),
            log::HEALTH => Ok(log::health()),
            log::FIRMWARE_SLOT => Ok(log::firmware_slot(&self.config.firmware)),
            log::CHANGED_NAMESPACES => Ok(log::changed_namespaces(controller.changed_namespaces())),
            log::COMMAND_EFFECTS => {
                let mut io = IO_OPCODES.to_vec();
                if reserves {
                    io.extend(RESERVATION_OPCODES);
                }
                Ok(log::command_effects(&ADMIN_OPCODES, &io, &MUTATING_OPCODES))
            }
            _ => Err(invalid),
        }
    }

    fn get_features(&self, index: usize, sqe: &Sqe) -> Result<Feature, Status> {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let controller = self.controllers[index].as_ref().ok_or(invalid)?;
        let [fid, sel, ..] = sqe.cdw(10).to_le_bytes();
        // ONCS says that only current values can be asked for.
        if sel & 7 != 0 {
            return Err(invalid);
        }
        match fid {
            features::ASYNC_EVENT_CONFIG => return Ok(Feature::Value(controller.event_config)),
            features::KEEP_ALIVE_TIMER => return Ok(Feature::Value(controller.kato_ms)),
            _ => {}
        }
        let (_, subsystem) = self.subsystem_of(index).ok_or(invalid)?;
        match fid {
            features::ARBITRATION
            | features::POWER_MANAGEMENT
            | features::TEMPERATURE_THRESHOLD
            | features::ERROR_RECOVERY => Ok(Feature::Value(0)),
            features::VOLATILE_WRITE_CACHE => {
                let volatile = subsystem.namespaces.iter().any(|ns| ns.volatile_write_cache);
                Ok(Feature::Value(u32::from(volatile)))
            }
            features::NUMBER_OF_QUEUES => {
                Ok(Feature::Value(features::number_of_queues(self.config.max_io_queues)))
            }
            features::HOST_BEHAVIOR => Ok(Feature::Data(vec![0; 512])),
            features::RESERVATION_NOTIFICATION_MASK => {
                self.notification_mask(index, sqe.nsid()).map(Feature::Value)
            }
            // EXHID: fabrics has 128-bit host identifiers only.
            features::HOST_IDENTIFIER if sqe.cdw(11) & 1 != 0 => {
                Ok(Feature::Data(controller.hostid.to_be_bytes().to_vec()))
            }
            _ => Err(invalid),
        }
    }

    fn set_features(&mut self, index: usize, sqe: &Sqe) -> Answer {
        let invalid = Status::INVALID_FIELD.with_dnr();
        let reports_ana = self.subsystem_of(index).is_some_and(|(_, s)| s.config.ana.is_some());
        let controller = self.controllers[index].as_mut().ok_or(invalid)?;
        let [fid, .., save] = sqe.cdw(10).to_le_bytes();
        if save & 0x80 != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
        }
        let discovery = controller.kind == Kind::Discovery;
        let value = sqe.cdw(11);
        match fid {
            features::RESERVATION_NOTIFICATION_MASK if !discovery => {
                self.set_notification_mask(index, sqe.nsid(), value)
            }
            features::ASYNC_EVENT_CONFIG => {
                let supported = if discovery {
                    features::AEN_DISCOVERY_CHANGE
                } else {
                    // The low byte is of SMART warnings, which never come.
                    let ana = if reports_ana { features::AEN_ANA_CHANGE } else { 0 };
                    features::AEN_NAMESPACE_ATTRIBUTE | ana | 0xff
                };
                if value & !supported != 0 {
                    return Err(invalid);
                }
                controller.event_config = value;
                Ok(0)
            }
            features::KEEP_ALIVE_TIMER => {
                controller.set_kato(value);
                Ok(0)
            }
            features::NUMBER_OF_QUEUES if !discovery => {
                let [a, b, c, d] = value.to_le_bytes();
                let (submission, completion) =
                    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                if submission == u16::MAX || completion == u16::MAX {
                    return Err(invalid);
                }
                let queues = (submission.min(completion) + 1).min(self.config.max_io_queues);
                Ok(u64::from(features::number_of_queues(queues)))
            }
            features::ARBITRATION
            | features::POWER_MANAGEMENT
            | features::TEMPERATURE_THRESHOLD
            | features::ERROR_RECOVERY
            | features::HOST_BEHAVIOR
                if !discovery =>
            {
                Ok(0)
            }
            features::VOLATILE_WRITE_CACHE if !discovery => {
                Err(Status::FEATURE_NOT_CHANGEABLE.with_dnr())
            }
            // Connect has set it.
            features::HOST_IDENTIFIER => Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr()),
            _ => Err(invalid),
        }
    }
}

/// What a namespace can do of reservations.
fn rescap(namespace: &NamespaceConfig) -> u8 {
    if namespace.reservations { reservation::CAPABILITIES } else { 0 }
}

enum Feature {
    Value(u32),
    Data(Vec<u8>),
}

/// Sends `bytes`, filled up with zeros to what the host's SGL holds. Without memory for them the
/// command waits.
fn send<M: Memory>(queue: &mut Queue, cmd: Command, bytes: &[u8], mem: &mut M) -> Outcome {
    match try_send(queue, &cmd, bytes, mem) {
        Some(outcome) => outcome,
        None => {
            queue.park(cmd.slot, cmd.data);
            Outcome::Done
        }
    }
}

fn try_send<M: Memory>(
    queue: &mut Queue,
    cmd: &Command,
    bytes: &[u8],
    mem: &mut M,
) -> Option<Outcome> {
    let len = queue.data_len(cmd.slot);
    if len == 0 {
        queue.complete(cmd.slot, Status::INVALID_FIELD.with_dnr(), 0, mem);
        return Some(Outcome::Done);
    }
    let data = mem.alloc(len)?;
    let window = mem.bytes_mut(data.slice());
    window.fill(0);
    let n = bytes.len().min(window.len());
    put(window, 0, &bytes[..n]);
    queue.complete_with_data(cmd.slot, data, mem);
    Some(Outcome::Done)
}
