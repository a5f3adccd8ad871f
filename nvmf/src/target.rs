//! The target: subsystems with their namespaces and controllers, and the discovery subsystem.
//!
//! [`Queue`] is one connection, at the level of PDUs. [`Target`] gives its commands their meaning:
//! it answers fabrics and admin commands itself and hands out the rest as [`Outcome`]s.

mod admin;
mod controller;
mod discovery;
mod elsewhere;
mod fabrics;
mod io;
mod mark;
mod queue;
mod reservations;

use std::collections::VecDeque;

use cairn_block::{BlockSize, Buf, LbaRange, Memory};

use self::controller::{Controller, Kind};
pub use self::elsewhere::{Listing, Owner};
pub use self::fabrics::connect_subnqn;
pub(crate) use self::fabrics::{
    CATTR_DISABLE_SQ_FLOW_CONTROL, CONNECT_DATA_LEN, PROPERTY_CAP, PROPERTY_CC, PROPERTY_CSTS,
};
pub use self::io::dsm_range;
pub(crate) use self::io::encode_dsm_range;
pub use self::queue::{ADMIN_IN_CAPSULE_LEN, CloseReason, Command, Queue, QueueConfig, SlotId};
use crate::ana::AnaState;
use crate::features;
use crate::reservation::Request;
use crate::sqe::{Sqe, opcode};
pub use crate::status::{Status, status_of};

/// Names a connection; whoever owns the sockets chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u32);

/// Names what backs a namespace; whoever adds the namespace chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceHandle(pub u32);

/// Names a subsystem of one [`Target`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubsystemId(pub u32);

/// NN: the highest namespace identifier.
pub const MAX_NSID: u32 = 1024;
/// Asynchronous Event Requests that a controller holds.
pub const MAX_AERS: usize = 4;
/// The longest NQN, in bytes.
pub const MAX_NQN_LEN: usize = 223;

/// What all subsystems have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetConfig {
    /// MN, at most 40 bytes.
    pub model: String,
    /// FR, at most 8 bytes.
    pub firmware: String,
    /// MDTS in bytes: a power of two, at least 4096. The queues' limit is the same or more.
    pub max_data_len: u32,
    /// The most data in an I/O command's capsule, in bytes; as the queues'.
    pub in_capsule_len: u32,
    /// Entries of a queue: MQES and MAXCMD; as the queues' slots.
    pub max_queue_entries: u16,
    /// I/O queues of one controller.
    pub max_io_queues: u16,
    /// Controllers that may exist at once.
    pub max_controllers: usize,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            model: "Cairn".into(),
            firmware: env!("CARGO_PKG_VERSION").into(),
            max_data_len: 1 << 20,
            in_capsule_len: 16 << 10,
            max_queue_entries: 256,
            max_io_queues: 64,
            max_controllers: 1024,
        }
    }
}

/// An address that hosts reach the target at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The IP address; never a wildcard, for hosts connect to what discovery tells them.
    pub traddr: String,
    /// The TCP port.
    pub trsvcid: u16,
}

/// A subsystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsystemConfig {
    /// NQN.
    pub nqn: String,
    /// SN, at most 20 bytes.
    pub serial: String,
    /// The lowest CNTLID to give out. Nodes that serve one subsystem have ranges of their own.
    pub cntlid_min: u16,
    /// The highest CNTLID to give out, at most FFEFh.
    pub cntlid_max: u16,
    /// The host NQNs that may connect; nothing for any.
    pub allowed_hosts: Option<Vec<String>>,
    /// Whether admin opcodes C0h to FFh are handed out.
    pub vendor_commands: bool,
    /// Whether the discovery log lists it.
    pub discoverable: bool,
    /// The state of its namespaces at this target, where there are other paths to them; nothing where
    /// there are none, and hosts are told nothing of states.
    pub ana: Option<AnaState>,
}

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceConfig {
    /// NSID, 1 to [`MAX_NSID`].
    pub nsid: u32,
    /// What backs it.
    pub handle: NamespaceHandle,
    /// Capacity.
    pub blocks: u64,
    /// The size of a block.
    pub block_size: BlockSize,
    /// UUID and NGUID.
    pub id: u128,
    /// Whether writes need a Flush to be durable.
    pub volatile_write_cache: bool,
    /// Whether hosts can reserve it.
    pub reservations: bool,
}

/// Why the configuration was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The NQN is no NQN.
    #[error("`{nqn}` is not an NQN; it begins with `nqn.` and has at most 223 bytes")]
    InvalidNqn {
        /// What was given.
        nqn: String,
    },
    /// The NQN is taken.
    #[error("there is a subsystem `{nqn}` already")]
    DuplicateNqn {
        /// What was given.
        nqn: String,
    },
    /// The range of controller identifiers is empty or reaches into the reserved ones.
    #[error("controller ids {min} to {max} are no range within 1 to 65519")]
    InvalidCntlidRange {
        /// Lowest.
        min: u16,
        /// Highest.
        max: u16,
    },
    /// There is no such subsystem.
    #[error("there is no such subsystem")]
    UnknownSubsystem,
    /// The NSID cannot be used.
    #[error("namespace id {nsid} is not within 1 to {MAX_NSID}")]
    InvalidNsid {
        /// What was given.
        nsid: u32,
    },
    /// The NSID is taken.
    #[error("the subsystem has a namespace {nsid} already")]
    DuplicateNsid {
        /// What was given.
        nsid: u32,
    },
    /// There is no such namespace.
    #[error("the subsystem has no namespace {nsid}")]
    UnknownNamespace {
        /// What was given.
        nsid: u32,
    },
}

/// A connected controller, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControllerInfo {
    /// CNTLID.
    pub cntlid: u16,
    /// The host's NQN.
    pub hostnqn: String,
    /// The host's identifier.
    pub hostid: u128,
    /// I/O queues that are connected.
    pub io_queues: u16,
    /// Keep Alive Timeout in milliseconds; 0 for none.
    pub kato_ms: u32,
}

/// What became of a command.
#[derive(Debug)]
pub enum Outcome {
    /// It was answered, or is held as an Asynchronous Event Request, or waits for memory.
    Done,
    /// Block I/O to carry out and complete.
    Io(Io),
    /// A vendor specific admin command to carry out and complete.
    Vendor {
        /// Where its completion goes.
        slot: SlotId,
        /// The namespace that the command names.
        namespace: NamespaceHandle,
        /// The entry.
        sqe: Sqe,
        /// The host's data.
        data: Option<Buf>,
    },
    /// Something about the reservations of a namespace to carry out and complete, each after those before it. The
    /// target keeps none: I/O that is handed out is the caller's to check against them.
    Reserve {
        /// Where its completion goes.
        slot: SlotId,
        /// The namespace's backing.
        namespace: NamespaceHandle,
        /// What is asked.
        request: Request,
    },
    /// The connection's first command is a Connect to a subsystem that another target of the process has: it gets
    /// the connection as it was received, and answers. The queue hands out nothing that is to be carried out here.
    Elsewhere(Owner),
}

/// A block request of a host.
#[derive(Debug)]
pub struct Io {
    /// Where its completion goes.
    pub slot: SlotId,
    /// The namespace's backing.
    pub namespace: NamespaceHandle,
    /// What to do.
    pub command: IoCommand,
}

/// What a host asks of a namespace. Ranges lie within it.
#[derive(Debug)]
pub enum IoCommand {
    /// Read: complete with `len` bytes.
    Read {
        /// Where.
        range: LbaRange,
        /// The range in bytes.
        len: u32,
    },
    /// Write.
    Write {
        /// Where.
        range: LbaRange,
        /// Force unit access.
        fua: bool,
        /// The range's bytes.
        data: Buf,
        /// Whether it is to be done whole or not at all.
        atomic: bool,
    },
    /// Flush.
    Flush,
    /// Verify: check the range's integrity; no data is transferred.
    Verify {
        /// Where; at most what VSL allows.
        range: LbaRange,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Where.
        range: LbaRange,
        /// Force unit access.
        fua: bool,
        /// DEAC: the range may be deallocated.
        unmap: bool,
    },
    /// Dataset Management, Deallocate.
    Discard {
        /// The range list; read it with [`dsm_range`].
        ranges: Buf,
        /// How many ranges, 1 to 256.
        count: u16,
    },
}

/// A command that was held and now ends: pass it on to [`Queue::complete`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deferred {
    /// The connection.
    pub conn: ConnId,
    /// The command.
    pub slot: SlotId,
    /// Its status.
    pub status: Status,
    /// Its DW0 and DW1.
    pub result: u64,
}

#[derive(Debug)]
struct Subsystem {
    config: SubsystemConfig,
    /// Ascending by NSID.
    namespaces: Vec<NamespaceConfig>,
    next_cntlid: u16,
    /// Changes of the ANA state.
    ana_changes: u64,
    /// Where else hosts reach it, at other targets.
    elsewhere: Vec<Port>,
}

impl Subsystem {
    fn namespace(&self, nsid: u32) -> Option<&NamespaceConfig> {
        self.namespaces.binary_search_by_key(&nsid, |ns| ns.nsid).ok().map(|i| &self.namespaces[i])
    }

    fn has_reservations(&self) -> bool {
        self.namespaces.iter().any(|ns| ns.reservations)
    }

    fn allows(&self, hostnqn: &str) -> bool {
        self.config.allowed_hosts.as_ref().is_none_or(|hosts| hosts.iter().any(|h| h == hostnqn))
    }
}

/// The subsystems and controllers of one shard.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    ports: Vec<Port>,
    /// By [`SubsystemId`]; ids are not used again.
    subsystems: Vec<Option<Subsystem>>,
    controllers: Vec<Option<Controller>>,
    /// Counts controllers, so that a queue notices that its slot has a new one.
    generation: u64,
    /// GENCTR of the discovery log.
    genctr: u64,
    next_discovery_cntlid: u16,
    elsewhere: elsewhere::Elsewhere,
    closing: VecDeque<ConnId>,
    deferred: VecDeque<Deferred>,
}

impl Target {
    /// A target without subsystems.
    #[must_use]
    pub fn new(config: TargetConfig) -> Self {
        Self {
            config,
            ports: Vec::new(),
            subsystems: Vec::new(),
            controllers: Vec::new(),
            generation: 0,
            genctr: 1,
            next_discovery_cntlid: 1,
            elsewhere: elsewhere::Elsewhere::default(),
            closing: VecDeque::new(),
            deferred: VecDeque::new(),
        }
    }

    /// Sets the addresses that the discovery log tells hosts.
    pub fn set_ports(&mut self, ports: Vec<Port>) {
        if self.ports != ports {
            self.ports = ports;
            self.discovery_changed();
        }
    }

    /// Adds a subsystem, without namespaces.
    ///
    /// # Errors
    /// An NQN or a range of controller ids that cannot be used.
    pub fn add_subsystem(&mut self, config: SubsystemConfig) -> Result<SubsystemId, TargetError> {
        if !is_nqn(&config.nqn) {
            return Err(TargetError::InvalidNqn { nqn: config.nqn });
        }
        if self.subsystem_by_nqn(&config.nqn).is_some() || config.nqn == crate::log::DISCOVERY_NQN {
            return Err(TargetError::DuplicateNqn { nqn: config.nqn });
        }
        let (min, max) = (config.cntlid_min, config.cntlid_max);
        if min == 0 || min > max || max > 0xffef {
            return Err(TargetError::InvalidCntlidRange { min, max });
        }
        let id = SubsystemId(crate::wire::len32(self.subsystems.len()));
        let discoverable = config.discoverable;
        self.subsystems.push(Some(Subsystem {
            config,
            namespaces: Vec::new(),
            next_cntlid: min,
            ana_changes: 1,
            elsewhere: Vec::new(),
        }));
        self.announce(id);
        if discoverable {
            self.discovery_changed();
        }
        Ok(id)
    }

    /// Removes a subsystem and its controllers: the connections to close.
    pub fn remove_subsystem(&mut self, id: SubsystemId) -> Vec<ConnId> {
        let Some(subsystem) = self.subsystems.get_mut(id.0 as usize).and_then(Option::take) else {
            return Vec::new();
        };
        let mut closing = Vec::new();
        for slot in &mut self.controllers {
            if let Some(controller) = slot.take_if(|c| c.kind == Kind::Nvm(id)) {
                closing.extend(controller.connections());
            }
        }
        self.deferred.retain(|d| !closing.contains(&d.conn));
        self.announce_removed(&subsystem.config.nqn);
        if subsystem.config.discoverable {
            self.discovery_changed();
        }
        closing
    }

    /// The subsystem of this NQN.
    #[must_use]
    pub fn subsystem_by_nqn(&self, nqn: &str) -> Option<SubsystemId> {
        self.subsystems
            .iter()
            .position(|s| s.as_ref().is_some_and(|s| s.config.nqn == nqn))
            .map(|i| SubsystemId(crate::wire::len32(i)))
    }

    /// Adds a namespace, and tells the hosts.
    ///
    /// # Errors
    /// An NSID that cannot be used, or an unknown subsystem.
    pub fn add_namespace(
        &mut self,
        id: SubsystemId,
        namespace: NamespaceConfig,
    ) -> Result<(), TargetError> {
        let nsid = namespace.nsid;
        if nsid == 0 || nsid > MAX_NSID {
            return Err(TargetError::InvalidNsid { nsid });
        }
        let namespaces = &mut self.subsystem_mut(id)?.namespaces;
        match namespaces.binary_search_by_key(&nsid, |ns| ns.nsid) {
            Ok(_) => return Err(TargetError::DuplicateNsid { nsid }),
            Err(at) => namespaces.insert(at, namespace),
        }
        self.namespace_changed(id, nsid);
        Ok(())
    }

    /// Removes a namespace, and tells the hosts. I/O that was handed out is the caller's to end.
    ///
    /// # Errors
    /// An unknown subsystem or namespace.
    pub fn remove_namespace(&mut self, id: SubsystemId, nsid: u32) -> Result<(), TargetError> {
        let namespaces = &mut self.subsystem_mut(id)?.namespaces;
        match namespaces.binary_search_by_key(&nsid, |ns| ns.nsid) {
            Ok(at) => namespaces.remove(at),
            Err(_) => return Err(TargetError::UnknownNamespace { nsid }),
        };
        self.namespace_changed(id, nsid);
        Ok(())
    }

    /// Changes a namespace's capacity, and tells the hosts.
    ///
    /// # Errors
    /// An unknown subsystem or namespace.
    pub fn resize_namespace(
        &mut self,
        id: SubsystemId,
        nsid: u32,
        blocks: u64,
    ) -> Result<(), TargetError> {
        let namespaces = &mut self.subsystem_mut(id)?.namespaces;
        match namespaces.binary_search_by_key(&nsid, |ns| ns.nsid) {
            Ok(at) => namespaces[at].blocks = blocks,
            Err(_) => return Err(TargetError::UnknownNamespace { nsid }),
        }
        self.namespace_changed(id, nsid);
        Ok(())
    }

    /// Changes the state of a subsystem's namespaces at this target, and tells the hosts. Commands that were
    /// handed out are the caller's to end.
    ///
    /// # Errors
    /// An unknown subsystem.
    pub fn set_ana(&mut self, id: SubsystemId, state: AnaState) -> Result<(), TargetError> {
        let subsystem = self.subsystem_mut(id)?;
        if subsystem.config.ana.replace(state) == Some(state) {
            return Ok(());
        }
        subsystem.ana_changes += 1;
        for controller in self.controllers.iter_mut().flatten().filter(|c| c.kind == Kind::Nvm(id))
        {
            let event = features::EVENT_ANA_CHANGED;
            self.deferred.extend(controller.raise(features::AEN_ANA_CHANGE, event));
        }
        Ok(())
    }

    /// Sets where else hosts reach a subsystem, at other targets: the discovery log tells of those too.
    ///
    /// # Errors
    /// An unknown subsystem.
    pub fn set_elsewhere(&mut self, id: SubsystemId, ports: Vec<Port>) -> Result<(), TargetError> {
        let subsystem = self.subsystem_mut(id)?;
        if subsystem.elsewhere != ports {
            subsystem.elsewhere = ports;
            self.announce(id);
            self.discovery_changed();
        }
        Ok(())
    }

    /// The controllers of a subsystem, by CNTLID.
    #[must_use]
    pub fn controllers(&self, id: SubsystemId) -> Vec<ControllerInfo> {
        let mut infos: Vec<_> = self
            .controllers
            .iter()
            .flatten()
            .filter(|c| c.kind == Kind::Nvm(id))
            .map(Controller::info)
            .collect();
        infos.sort_by_key(|info| info.cntlid);
        infos
    }

    /// Carries out a command that `queue`, which is connection `conn`, has received.
    pub fn handle_command<M: Memory>(
        &mut self,
        conn: ConnId,
        queue: &mut Queue,
        cmd: Command,
        now_ms: u64,
        mem: &mut M,
    ) -> Outcome {
        let Some(binding) = queue.binding else {
            return self.handle_unconnected(conn, queue, cmd, now_ms, mem);
        };
        let index = binding.controller as usize;
        let Some(controller) = self.controllers.get_mut(index).and_then(Option::as_mut) else {
            return refuse(queue, cmd, Status::ABORTED_SQ_DELETION, mem);
        };
        if !controller.owns(conn, &binding) {
            return refuse(queue, cmd, Status::ABORTED_SQ_DELETION, mem);
        }
        // Traffic Based Keep Alive: any command will do.
        controller.last_seen_ms = now_ms;
        if cmd.sqe.opcode() == opcode::FABRICS {
            return self.handle_fabrics(index, queue, cmd, mem);
        }
        if !controller.is_ready() {
            return refuse(queue, cmd, Status::COMMAND_SEQUENCE_ERROR, mem);
        }
        if binding.qid > 0 {
            self.handle_io(index, queue, cmd, mem)
        } else {
            self.handle_admin(index, queue, cmd, mem)
        }
    }

    /// A connection is gone. With its admin queue a controller ends: see [`Target::poll_close`].
    pub fn handle_disconnect(&mut self, conn: ConnId) {
        self.closing.retain(|&c| c != conn);
        self.deferred.retain(|d| d.conn != conn);
        for index in 0..self.controllers.len() {
            let Some(controller) = &mut self.controllers[index] else { continue };
            if controller.admin == Some(conn) {
                controller.admin = None;
                self.remove_controller(index);
            } else {
                controller.forget_io_queue(conn);
            }
        }
    }

    /// Ends the controllers whose Keep Alive Timeout has passed.
    pub fn handle_timeout(&mut self, now_ms: u64) {
        for index in 0..self.controllers.len() {
            let expired = self.controllers[index]
                .as_ref()
                .and_then(Controller::deadline_ms)
                .is_some_and(|deadline| deadline <= now_ms);
            if expired {
                self.remove_controller(index);
            }
        }
    }

    /// When [`Target::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        self.controllers.iter().flatten().filter_map(Controller::deadline_ms).min()
    }

    /// The next connection to close: its controller expired, was reset, was shut down or lost its
    /// admin queue, or another connection took its queue.
    pub fn poll_close(&mut self) -> Option<ConnId> {
        self.closing.pop_front()
    }

    /// The next held command to complete.
    pub fn poll_deferred(&mut self) -> Option<Deferred> {
        self.deferred.pop_front()
    }

    fn subsystem(&self, id: SubsystemId) -> Option<&Subsystem> {
        self.subsystems.get(id.0 as usize).and_then(Option::as_ref)
    }

    fn subsystem_mut(&mut self, id: SubsystemId) -> Result<&mut Subsystem, TargetError> {
        let slot = self.subsystems.get_mut(id.0 as usize).and_then(Option::as_mut);
        slot.ok_or(TargetError::UnknownSubsystem)
    }

    /// Forgets a controller; its connections are to be closed.
    fn remove_controller(&mut self, index: usize) {
        if let Some(controller) = self.controllers[index].take() {
            self.closing.extend(controller.connections());
            self.deferred.retain(|d| Some(d.conn) != controller.admin);
        }
    }

    fn namespace_changed(&mut self, id: SubsystemId, nsid: u32) {
        for controller in self.controllers.iter_mut().flatten() {
            if controller.kind == Kind::Nvm(id) {
                controller.note_changed_namespace(nsid);
                let event = features::EVENT_NAMESPACE_CHANGED;
                self.deferred.extend(controller.raise(features::AEN_NAMESPACE_ATTRIBUTE, event));
            }
        }
    }

    fn discovery_changed(&mut self) {
        self.genctr += 1;
        for controller in self.controllers.iter_mut().flatten() {
            if controller.kind == Kind::Discovery {
                let event = features::EVENT_DISCOVERY_CHANGED;
                self.deferred.extend(controller.raise(features::AEN_DISCOVERY_CHANGE, event));
            }
        }
    }
}

/// Ends a command with an error, and its data with it.
fn refuse<M: Memory>(queue: &mut Queue, cmd: Command, status: Status, mem: &mut M) -> Outcome {
    answer(queue, cmd, status, 0, mem)
}

/// Ends a command, and its data with it.
fn answer<M: Memory>(
    queue: &mut Queue,
    cmd: Command,
    status: Status,
    result: u64,
    mem: &mut M,
) -> Outcome {
    if let Some(data) = cmd.data {
        mem.release(data);
    }
    queue.complete(cmd.slot, status, result, mem);
    Outcome::Done
}

fn is_nqn(text: &str) -> bool {
    text.starts_with("nqn.") && text.len() <= MAX_NQN_LEN && !text.contains('\0')
}

#[cfg(test)]
mod tests;
