//! The target: its nodes with their logical units, and the sessions.
//!
//! [`Connection`] is one connection, at the level of PDUs. [`Target`] gives its requests their
//! meaning: it answers what it can itself and hands out the rest as [`Outcome`]s.

mod execute;
mod medium;
pub(crate) mod session;
mod tasks;

use std::collections::{BTreeMap, VecDeque};

use cairn_block::reservation::{Change, Effects, Reservations};
use cairn_block::{Buf, Memory};

use self::session::Session;
use crate::chap::{Chap, MIN_SECRET_LEN};
use crate::connection::{CloseReason, Command, Connection, Request, SlotId};
use crate::login::{MAX_NAME_LEN, is_name};
use crate::pdu::encode_lun;
use crate::scsi::inquiry::Product;
use crate::scsi::ports::{AccessState, PortGroup};
use crate::scsi::sense::Status;
use crate::scsi::unit::{Attention, MAX_LUN, NexusId, Unit, UnitConfig, UnitHandle};
use crate::scsi::{IoCommand, ReserveIn, SanitizeCommand, SanitizeState};
use crate::wire::len32;

/// Names a connection; whoever owns the sockets chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u32);

/// Names a node of one [`Target`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// What all nodes have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetConfig {
    /// What INQUIRY says.
    pub product: Product,
    /// Sessions that may exist at once, but for those of discovery, of which there are few.
    pub max_sessions: usize,
    /// What discovery sessions have to prove.
    pub discovery_chap: Option<Chap>,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self {
            product: Product {
                vendor: "CAIRN".into(),
                product: "VOLUME".into(),
                revision: env!("CARGO_PKG_VERSION").chars().take(4).collect(),
            },
            max_sessions: 1024,
            discovery_chap: None,
        }
    }
}

/// An address that initiators reach the target at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Portal {
    /// The IP address; never a wildcard, for initiators connect to what discovery tells them.
    pub address: String,
    /// The TCP port.
    pub port: u16,
    /// TargetPortalGroupTag.
    pub group: u16,
}

/// Which initiators may log in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Initiators {
    /// Those of these names; none at first.
    Named(Vec<String>),
    /// Any.
    Any,
    /// None yet.
    #[default]
    Nobody,
}

impl Initiators {
    fn allows(&self, name: &str) -> bool {
        match self {
            Self::Named(names) => names.iter().any(|n| n.eq_ignore_ascii_case(name)),
            Self::Any => true,
            Self::Nobody => false,
        }
    }
}

/// A target node: what an iSCSI name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeConfig {
    /// The iSCSI name.
    pub iqn: String,
    /// TargetAlias.
    pub alias: Option<String>,
    /// Who may log in.
    pub initiators: Initiators,
    /// What they have to prove.
    pub chap: Option<Chap>,
    /// The portal groups of this target that lead to it.
    pub portal_groups: Vec<u16>,
    /// The target port groups, those of other targets that lead to the same units among them. Nothing
    /// for one group, active/optimized, with all portal groups.
    pub port_groups: Vec<PortGroup>,
}

/// Why the configuration was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The name is no iSCSI name.
    #[error(
        "`{iqn}` is not an iSCSI name; it begins with `iqn.`, `eui.` or `naa.` and has at most {MAX_NAME_LEN} bytes"
    )]
    InvalidName {
        /// What was given.
        iqn: String,
    },
    /// The name is taken.
    #[error("there is a target `{iqn}` already")]
    DuplicateName {
        /// What was given.
        iqn: String,
    },
    /// A CHAP secret is too short.
    #[error("the CHAP secret of `{name}` has fewer than {MIN_SECRET_LEN} bytes; take a longer one")]
    ShortSecret {
        /// Whose.
        name: String,
    },
    /// Both ends would prove themselves with one secret.
    #[error("the CHAP secrets of initiator and target are the same; take two")]
    SameSecret,
    /// There is no such node.
    #[error("there is no such target")]
    UnknownNode,
    /// The LUN cannot be used.
    #[error("LUN {lun} is not within 0 to {MAX_LUN}")]
    InvalidLun {
        /// What was given.
        lun: u16,
    },
    /// The LUN is taken.
    #[error("the target has a LUN {lun} already")]
    DuplicateLun {
        /// What was given.
        lun: u16,
    },
    /// There is no such LUN.
    #[error("the target has no LUN {lun}")]
    UnknownLun {
        /// What was given.
        lun: u16,
    },
    /// No LUN has such a handle.
    #[error("the volume is no logical unit of any target")]
    UnknownUnit,
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It was answered, or waits for memory.
    Done,
    /// A request of the disk to carry out and complete.
    Io(Io),
    /// Tasks were aborted, or a session ends, or takes the place of one: complete `slot` when every
    /// request of these units that was handed out before has been completed, whatever became of its
    /// connection. A copy is a request of all units that it reads or writes, and of its own.
    Drain {
        /// Where the completion goes.
        slot: SlotId,
        /// The units.
        units: Vec<UnitHandle>,
    },
    /// The reservations of a unit are to be changed: [`Reservations::apply`] the change to what the
    /// unit's volume has, store what comes of it, and install it with [`Target::set_reservations`].
    /// Then, and where the effects abort anything once every request of the unit that was handed out
    /// before has been completed, [`Connection::complete_reserve`] `slot`. Changes of one volume go one
    /// after another; each is a request of its unit until it is completed.
    Reserve {
        /// Where the completion goes.
        slot: SlotId,
        /// The unit.
        unit: UnitHandle,
        /// What is asked.
        change: Change,
    },
    /// What backs a unit is to be sanitized: [`Target::set_sanitize`] as soon as nothing else is to be begun, and with how
    /// far it is from time to time; [`Connection::complete_sanitize`] as the command says.
    Sanitize {
        /// Where the completion goes.
        slot: SlotId,
        /// The unit.
        unit: UnitHandle,
        /// What is asked.
        command: SanitizeCommand,
    },
    /// The reservations of a unit are asked for: [`Connection::complete_reserve_in`] `slot` with them, once those that
    /// were to be changed before are, and once it is sure that nobody else has changed them. It is a request of its
    /// unit until then.
    ReserveIn {
        /// Where the completion goes.
        slot: SlotId,
        /// The unit.
        unit: UnitHandle,
        /// What of them.
        query: ReserveIn,
    },
}

/// A request of a unit's disk.
#[derive(Debug)]
pub struct Io {
    /// Where its completion goes.
    pub slot: SlotId,
    /// What backs the logical unit.
    pub unit: UnitHandle,
    /// What to do.
    pub command: IoCommand,
}

/// Tasks to abort on another connection than the one whose request it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abort {
    /// The connection: pass the rest on to its [`Connection::abort`].
    pub conn: ConnId,
    /// The logical unit's eight bytes; nothing for all.
    pub lun: Option<u64>,
}

/// A session, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// TSIH.
    pub tsih: u16,
    /// InitiatorName.
    pub initiator: String,
    /// InitiatorAlias.
    pub alias: Option<String>,
    /// Initiator session id.
    pub isid: [u8; 6],
    /// Its connection.
    pub conn: ConnId,
}

#[derive(Debug)]
struct Node {
    config: NodeConfig,
    /// Ascending by LUN.
    units: Vec<Unit>,
    /// Where else initiators reach it, at other targets.
    elsewhere: Vec<Portal>,
}

impl Node {
    fn unit(&self, lun: u16) -> Option<&Unit> {
        self.units.binary_search_by_key(&lun, |u| u.config.lun).ok().map(|i| &self.units[i])
    }

    fn unit_mut(&mut self, lun: u16) -> Option<&mut Unit> {
        let at = self.units.binary_search_by_key(&lun, |u| u.config.lun).ok()?;
        self.units.get_mut(at)
    }

    fn handles(&self) -> Vec<UnitHandle> {
        self.units.iter().map(|unit| unit.config.handle).collect()
    }

    /// The port groups, and which of them a portal group belongs to.
    fn port_groups(&self) -> Vec<PortGroup> {
        if self.config.port_groups.is_empty() {
            let ports = self.config.portal_groups.clone();
            return vec![PortGroup { id: 1, state: AccessState::Optimized, ports }];
        }
        self.config.port_groups.clone()
    }

    /// The target port group of a portal group, and its state.
    fn access(&self, portal_group: u16) -> (u16, AccessState) {
        let group = self.config.port_groups.iter().find(|g| g.ports.contains(&portal_group));
        group.map_or((1, AccessState::Optimized), |g| (g.id, g.state))
    }
}

/// What all logical units of one handle have in common.
#[derive(Debug, Default)]
struct Volume {
    /// How many there are.
    units: usize,
    reservations: Reservations,
    /// Who holds RESERVE.
    reserved_by: Option<NexusId>,
    /// It is being sanitized, or that failed.
    sanitize: Option<SanitizeState>,
}

/// The nodes and sessions of one shard.
#[derive(Debug)]
pub struct Target {
    config: TargetConfig,
    portals: Vec<Portal>,
    /// By [`NodeId`]; ids are not used again.
    nodes: Vec<Option<Node>>,
    /// Those that are a logical unit somewhere.
    volumes: BTreeMap<UnitHandle, Volume>,
    /// Whether one of them is held by RESERVE.
    any_held: bool,
    sessions: Vec<Option<Session>>,
    /// Counts sessions, so that a connection notices that its place has a new one.
    generation: u64,
    next_tsih: u16,
    /// Counts changes of the units.
    units_changed: u64,
    closing: VecDeque<ConnId>,
    aborts: VecDeque<Abort>,
}

impl Target {
    /// A target without nodes.
    ///
    /// # Errors
    /// Secrets that cannot be used.
    pub fn new(config: TargetConfig) -> Result<Self, TargetError> {
        check_secrets(config.discovery_chap.as_ref())?;
        Ok(Self {
            config,
            portals: Vec::new(),
            nodes: Vec::new(),
            volumes: BTreeMap::new(),
            any_held: false,
            sessions: Vec::new(),
            generation: 0,
            next_tsih: 1,
            units_changed: 1,
            closing: VecDeque::new(),
            aborts: VecDeque::new(),
        })
    }

    /// Sets the addresses that discovery tells initiators.
    pub fn set_portals(&mut self, portals: Vec<Portal>) {
        self.portals = portals;
    }

    /// Adds a node, without logical units.
    ///
    /// # Errors
    /// A name or secrets that cannot be used.
    pub fn add_node(&mut self, mut config: NodeConfig) -> Result<NodeId, TargetError> {
        config.iqn.make_ascii_lowercase();
        if !is_name(&config.iqn) {
            return Err(TargetError::InvalidName { iqn: config.iqn });
        }
        if self.node_by_name(&config.iqn).is_some() {
            return Err(TargetError::DuplicateName { iqn: config.iqn });
        }
        check_secrets(config.chap.as_ref())?;
        let id = NodeId(len32(self.nodes.len()));
        self.nodes.push(Some(Node { config, units: Vec::new(), elsewhere: Vec::new() }));
        Ok(id)
    }

    /// Removes a node and its sessions: the connections to close.
    pub fn remove_node(&mut self, id: NodeId) -> Vec<ConnId> {
        let slot = self.nodes.get_mut(id.0 as usize).and_then(Option::take);
        let Some(node) = slot else { return Vec::new() };
        for unit in node.units {
            self.forget_unit(unit.config.handle);
        }
        self.units_changed += 1;
        let mut closing = Vec::new();
        for slot in &mut self.sessions {
            if let Some(session) = slot.take_if(|s| s.node == Some(id)) {
                closing.push(session.conn);
            }
        }
        closing
    }

    /// The node of this name.
    #[must_use]
    pub fn node_by_name(&self, iqn: &str) -> Option<NodeId> {
        self.nodes
            .iter()
            .position(|n| n.as_ref().is_some_and(|n| n.config.iqn.eq_ignore_ascii_case(iqn)))
            .map(|i| NodeId(len32(i)))
    }

    /// Changes who may log in, and what they have to prove. Sessions that exist stay.
    ///
    /// # Errors
    /// An unknown node, or secrets that cannot be used.
    pub fn set_access(
        &mut self,
        id: NodeId,
        initiators: Initiators,
        chap: Option<Chap>,
    ) -> Result<(), TargetError> {
        check_secrets(chap.as_ref())?;
        let config = &mut self.node_mut(id)?.config;
        config.initiators = initiators;
        config.chap = chap;
        Ok(())
    }

    /// Adds a logical unit, and tells the initiators.
    ///
    /// # Errors
    /// A LUN that cannot be used, or an unknown node.
    pub fn add_unit(&mut self, id: NodeId, unit: UnitConfig) -> Result<(), TargetError> {
        let (lun, handle) = (unit.lun, unit.handle);
        if lun > MAX_LUN {
            return Err(TargetError::InvalidLun { lun });
        }
        let units = &mut self.node_mut(id)?.units;
        match units.binary_search_by_key(&lun, |u| u.config.lun) {
            Ok(_) => return Err(TargetError::DuplicateLun { lun }),
            Err(at) => units.insert(at, Unit::new(unit)),
        }
        self.volumes.entry(handle).or_default().units += 1;
        self.units_changed += 1;
        self.attend(id, None, None, Attention::LunsChanged);
        Ok(())
    }

    /// Removes a logical unit, tells the initiators, and aborts its tasks: see [`Target::poll_abort`].
    /// Requests that were handed out are the caller's to end.
    ///
    /// # Errors
    /// An unknown node or unit.
    pub fn remove_unit(&mut self, id: NodeId, lun: u16) -> Result<(), TargetError> {
        let units = &mut self.node_mut(id)?.units;
        let removed = match units.binary_search_by_key(&lun, |u| u.config.lun) {
            Ok(at) => units.remove(at),
            Err(_) => return Err(TargetError::UnknownLun { lun }),
        };
        self.forget_unit(removed.config.handle);
        self.units_changed += 1;
        // What comes at this LUN next must not get what was meant for this one.
        self.abort_sessions(id, None, Some(encode_lun(lun)));
        self.attend(id, None, None, Attention::LunsChanged);
        Ok(())
    }

    /// A logical unit is gone; what its volume had goes with the last of them.
    fn forget_unit(&mut self, handle: UnitHandle) {
        if let Some(volume) = self.volumes.get_mut(&handle) {
            volume.units -= 1;
            if volume.units == 0 {
                self.volumes.remove(&handle);
                self.count_held();
            }
        }
    }

    /// RESERVE or RELEASE was carried out, or what ends a reservation.
    fn count_held(&mut self) {
        self.any_held = self.volumes.values().any(|volume| volume.reserved_by.is_some());
    }

    /// Whether any initiator holds a logical unit by RESERVE: only then [`Target::is_held`] has to be asked.
    #[must_use]
    pub fn any_held(&self) -> bool {
        self.any_held
    }

    /// Whether an initiator holds the logical units of a handle by RESERVE: hosts of other transports are to be kept
    /// out, from reads as well (SPC-2, section 5.5.1).
    #[must_use]
    pub fn is_held(&self, unit: UnitHandle) -> bool {
        self.volumes.get(&unit).is_some_and(|volume| volume.reserved_by.is_some())
    }

    /// Changes a logical unit's capacity, and tells the initiators.
    ///
    /// # Errors
    /// An unknown node or unit.
    pub fn resize_unit(&mut self, id: NodeId, lun: u16, blocks: u64) -> Result<(), TargetError> {
        let node = self.node_mut(id)?;
        let unit = node.unit_mut(lun).ok_or(TargetError::UnknownLun { lun })?;
        if unit.config.blocks != blocks {
            unit.config.blocks = blocks;
            self.attend(id, Some(lun), None, Attention::CapacityChanged);
        }
        Ok(())
    }

    /// Changes whether a logical unit takes no writes, and tells the initiators. Requests that were handed out go on.
    ///
    /// # Errors
    /// An unknown node or unit.
    pub fn set_read_only(
        &mut self,
        id: NodeId,
        lun: u16,
        read_only: bool,
    ) -> Result<(), TargetError> {
        let node = self.node_mut(id)?;
        let unit = node.unit_mut(lun).ok_or(TargetError::UnknownLun { lun })?;
        if std::mem::replace(&mut unit.config.read_only, read_only) != read_only {
            self.attend(id, Some(lun), None, Attention::ModeChanged);
        }
        Ok(())
    }

    /// Changes the target port groups of a node, and tells the initiators. Requests that were handed
    /// out are the caller's to end. Where its units stand by here from then on, media that were taken out are there again.
    ///
    /// # Errors
    /// An unknown node.
    pub fn set_port_groups(
        &mut self,
        id: NodeId,
        groups: Vec<PortGroup>,
    ) -> Result<(), TargetError> {
        let config = &mut self.node_mut(id)?.config;
        if config.port_groups != groups {
            config.port_groups = groups;
            self.attend(id, None, None, Attention::AccessStateChanged);
            self.restart_idle_media(id)?;
        }
        Ok(())
    }

    /// Sets where else initiators reach a node, at other targets: discovery tells of those too.
    ///
    /// # Errors
    /// An unknown node.
    pub fn set_elsewhere(&mut self, id: NodeId, portals: Vec<Portal>) -> Result<(), TargetError> {
        self.node_mut(id)?.elsewhere = portals;
        Ok(())
    }

    /// The reservations in force at the logical units of a handle.
    #[must_use]
    pub fn reservations(&self, unit: UnitHandle) -> Option<&Reservations> {
        self.volumes.get(&unit).map(|volume| &volume.reservations)
    }

    /// Sets the reservations of all logical units of a handle, tells those that lost something by it,
    /// and marks whose tasks to abort: see [`Target::poll_abort`]. What was stored is set, without
    /// effects, right after the first unit was added; later on each change that has been stored,
    /// whatever transport its host came by.
    ///
    /// # Errors
    /// There is no such unit.
    pub fn set_reservations(
        &mut self,
        unit: UnitHandle,
        reservations: Reservations,
        effects: &Effects,
    ) -> Result<(), TargetError> {
        let volume = self.volumes.get_mut(&unit).ok_or(TargetError::UnknownUnit)?;
        volume.reservations = reservations;
        let mut preempted = Vec::new();
        for session in self.sessions.iter_mut().flatten() {
            let node = session.node.and_then(|id| self.nodes.get(id.0 as usize)?.as_ref());
            let units = node.map(|node| node.units.as_slice()).unwrap_or_default();
            for lun in units.iter().filter(|u| u.config.handle == unit).map(|u| u.config.lun) {
                for (registrant, notice) in &effects.notices {
                    if session.registrant.is(registrant) {
                        session.raise(lun, (*notice).into());
                    }
                }
                if effects.abort.iter().any(|registrant| session.registrant.is(registrant)) {
                    let lun = Some(encode_lun(lun));
                    self.aborts.push_back(Abort { conn: session.conn, lun });
                    preempted.push(session.nexus());
                }
            }
        }
        self.allow_removal(unit, &preempted);
        Ok(())
    }

    /// Sets how far the sanitize of what backs a unit is: until there is none, initiators are told so, and little else is
    /// carried out. Nothing happens where there is no such unit.
    pub fn set_sanitize(&mut self, unit: UnitHandle, state: Option<SanitizeState>) {
        if let Some(volume) = self.volumes.get_mut(&unit) {
            volume.sanitize = state;
        }
    }

    /// The sessions of a node, by TSIH.
    #[must_use]
    pub fn sessions(&self, id: NodeId) -> Vec<SessionInfo> {
        let of_node = self.sessions.iter().flatten().filter(|s| s.node == Some(id));
        let mut infos: Vec<_> = of_node.map(Session::info).collect();
        infos.sort_by_key(|info| info.tsih);
        infos
    }

    /// Carries out a request that `conn`, which the caller calls `id`, has received.
    pub fn handle_command<M: Memory>(
        &mut self,
        id: ConnId,
        conn: &mut Connection,
        cmd: Command,
        mem: &mut M,
    ) -> Outcome {
        let Command { slot, request, data } = cmd;
        if let Request::Login(login) = request {
            return self.handle_login(id, conn, slot, &login, mem);
        }
        let Some(index) = self.session_of(id, conn) else {
            // It was replaced, or its node is gone.
            release(data, mem);
            conn.fail(CloseReason::Dropped);
            conn.respond(slot, Status::TaskAborted, mem);
            return Outcome::Done;
        };
        match request {
            Request::Scsi(scsi) => self.handle_scsi(index, conn, slot, &scsi, data, mem),
            Request::TaskManagement { function, lun, rtt, .. } => {
                self.handle_task_management(index, conn, slot, function, lun, rtt, mem)
            }
            Request::Text => {
                self.handle_text(index, conn, slot, mem);
                Outcome::Done
            }
            Request::Logout { reason, cid } => {
                self.handle_logout(index, conn, slot, reason, cid, mem)
            }
            Request::Login(_) => Outcome::Done,
        }
    }

    /// A connection is gone, and its session with it.
    pub fn handle_disconnect(&mut self, id: ConnId) {
        self.closing.retain(|c| *c != id);
        self.aborts.retain(|a| a.conn != id);
        for index in 0..self.sessions.len() {
            if self.sessions[index].as_ref().is_some_and(|s| s.conn == id) {
                self.end_session(index);
            }
        }
    }

    /// The next connection to close: its session was reinstated on another, or reset.
    pub fn poll_close(&mut self) -> Option<ConnId> {
        self.closing.pop_front()
    }

    /// The next connection whose tasks are to be aborted. Ask after every request, every
    /// [`Target::set_reservations`] and [`Target::remove_unit`], before anything else is done.
    pub fn poll_abort(&mut self) -> Option<Abort> {
        self.aborts.pop_front()
    }

    fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0 as usize).and_then(Option::as_ref)
    }

    fn node_mut(&mut self, id: NodeId) -> Result<&mut Node, TargetError> {
        let slot = self.nodes.get_mut(id.0 as usize).and_then(Option::as_mut);
        slot.ok_or(TargetError::UnknownNode)
    }
}

fn release<M: Memory>(data: Option<Buf>, mem: &mut M) {
    if let Some(data) = data {
        mem.release(data);
    }
}

fn check_secrets(chap: Option<&Chap>) -> Result<(), TargetError> {
    let Some(chap) = chap else { return Ok(()) };
    for credentials in std::iter::once(&chap.initiator).chain(&chap.target) {
        if credentials.secret.len() < MIN_SECRET_LEN {
            return Err(TargetError::ShortSecret { name: credentials.name.clone() });
        }
    }
    if chap.target.as_ref().is_some_and(|t| t.secret == chap.initiator.secret) {
        return Err(TargetError::SameSecret);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
