//! Sessions: how they begin and end, and what they ask of the target itself.

use cairn_block::Memory;
use cairn_block::reservation::Registrant;

use super::{ConnId, Node, NodeId, Outcome, Portal, SessionInfo, Target};
use crate::connection::{Binding, Connection, SlotId};
use crate::login::{FULL_FEATURE, LoginStatus, Names, Terms, is_name};
use crate::pdu::LoginRequest;
use crate::scsi::unit::{Attention, Attentions, NexusId};
use crate::text;
use crate::wire::len32;

/// Discovery sessions that may exist at once: nobody is kept from a target because strangers ask for
/// them, and none ends another's.
const MAX_DISCOVERY_SESSIONS: usize = 64;
/// The most text that answers a login request.
pub(crate) const MAX_LOGIN_TEXT: usize = 4096;

#[derive(Debug)]
pub(super) struct Session {
    pub(super) conn: ConnId,
    pub(super) generation: u64,
    pub(super) tsih: u16,
    /// Nothing for a discovery session.
    pub(super) node: Option<NodeId>,
    /// The initiator port and the target port, as reservations know them.
    pub(super) registrant: Registrant,
    pub(super) isid: [u8; 6],
    pub(super) portal_group: u16,
    pub(super) alias: Option<String>,
    /// By LUN; those that have any.
    pub(super) attentions: Vec<(u16, Attentions)>,
}

impl Session {
    pub(super) fn nexus(&self) -> NexusId {
        NexusId(self.generation)
    }

    pub(super) fn info(&self) -> SessionInfo {
        SessionInfo {
            tsih: self.tsih,
            initiator: self.registrant.name().to_owned(),
            alias: self.alias.clone(),
            isid: self.isid,
            conn: self.conn,
        }
    }

    /// The attentions that wait at a logical unit.
    pub(super) fn attentions(&mut self, lun: u16) -> Option<&mut Attentions> {
        self.attentions.iter_mut().find(|(l, _)| *l == lun).map(|(_, a)| a)
    }

    pub(super) fn raise(&mut self, lun: u16, attention: Attention) {
        match self.attentions(lun) {
            Some(attentions) => attentions.raise(attention),
            None => {
                let mut attentions = Attentions::default();
                attentions.raise(attention);
                self.attentions.push((lun, attentions));
            }
        }
    }
}

impl Target {
    /// The session of a connection, where it is still that one's.
    pub(super) fn session_of(&self, id: ConnId, conn: &Connection) -> Option<usize> {
        let binding = conn.binding?;
        let index = binding.session as usize;
        let session = self.sessions.get(index)?.as_ref()?;
        (session.generation == binding.generation && session.conn == id).then_some(index)
    }

    pub(super) fn handle_login<M: Memory>(
        &mut self,
        id: ConnId,
        conn: &mut Connection,
        slot: SlotId,
        request: &LoginRequest,
        mem: &mut M,
    ) -> Outcome {
        let Some(mut login) = conn.login.take() else {
            let over = Err(LoginStatus::InvalidDuringLogin);
            conn.respond_login(slot, request, over, mem);
            return Outcome::Done;
        };
        let offer = conn.offer();
        let portal_group = conn.portal_group();
        let outcome = login
            .handle(request, conn.login_text(), &offer, |names| self.terms(names, portal_group))
            .and_then(|reply| {
                if reply.text.len() > MAX_LOGIN_TEXT {
                    return Err(LoginStatus::InitiatorError);
                }
                if reply.transit_to != Some(FULL_FEATURE) {
                    return Ok((reply, 0));
                }
                // What was true at the first request may not be so any more.
                let terms = self.terms(login.names(), portal_group)?;
                if terms.chap.as_ref() != login.chap() {
                    return Err(LoginStatus::AuthenticationFailure);
                }
                let tsih = self.begin_session(id, conn, login.names(), portal_group)?;
                Ok((reply, tsih))
            });
        let node = login.names().target.as_ref().and_then(|name| self.node_by_name(name));
        conn.login = Some(login);
        if let Ok((reply, tsih)) = &outcome
            && reply.transit_to == Some(FULL_FEATURE)
            && let Some(node) = node.and_then(|node| self.node(node))
            && !node.units.is_empty()
        {
            // What a session before this one has begun is over before its first command.
            conn.welcome(*tsih, reply.text.clone());
            return Outcome::Drain { slot, units: node.handles() };
        }
        let outcome = outcome.as_ref().map(|(r, tsih)| (r.transit_to, *tsih, r.text.as_slice()));
        conn.respond_login(slot, request, outcome.map_err(|status| *status), mem);
        Outcome::Done
    }

    /// What a login has to do to get in, if it may at all.
    fn terms(&self, names: &Names, portal_group: u16) -> Result<Terms, LoginStatus> {
        let known = |s: &Session| {
            s.tsih == names.tsih && s.isid == names.isid && s.registrant.name() == names.initiator
        };
        if names.tsih != 0 {
            let exists = self.sessions.iter().flatten().any(known);
            return Err(if exists {
                LoginStatus::TooManyConnections
            } else {
                LoginStatus::SessionDoesNotExist
            });
        }
        let Some(name) = &names.target else {
            let chap = self.config.discovery_chap.clone();
            return Ok(Terms { portal_group: None, alias: None, chap });
        };
        let node = self
            .node_by_name(name)
            .and_then(|id| self.node(id))
            .filter(|node| node.config.portal_groups.contains(&portal_group))
            .ok_or(LoginStatus::NotFound)?;
        if !node.config.initiators.allows(&names.initiator) {
            return Err(LoginStatus::AuthorizationFailure);
        }
        Ok(Terms {
            portal_group: Some(portal_group),
            alias: node.config.alias.clone(),
            chap: node.config.chap.clone(),
        })
    }

    /// A login has succeeded: its TSIH. A session of the same initiator port ends.
    fn begin_session(
        &mut self,
        id: ConnId,
        conn: &mut Connection,
        names: &Names,
        portal_group: u16,
    ) -> Result<u16, LoginStatus> {
        let node = names.target.as_ref().and_then(|name| self.node_by_name(name));
        let registrant = Registrant::Iscsi {
            initiator: names.initiator.clone(),
            isid: names.isid,
            port_group: portal_group,
        };
        for index in 0..self.sessions.len() {
            let same = self.sessions[index]
                .as_ref()
                .is_some_and(|s| node.is_some() && s.node == node && s.registrant == registrant);
            if same && let Some(old) = self.end_session(index) {
                self.closing.push_back(old);
            }
        }
        let alike = self.sessions.iter().flatten().filter(|s| s.node.is_some() == node.is_some());
        let most = match node {
            Some(_) => self.config.max_sessions,
            None => MAX_DISCOVERY_SESSIONS,
        };
        if alike.count() >= most {
            return Err(LoginStatus::OutOfResources);
        }
        let index = self.sessions.iter().position(Option::is_none).unwrap_or_else(|| {
            self.sessions.push(None);
            self.sessions.len() - 1
        });
        let tsih = self.free_tsih();
        self.generation += 1;
        let generation = self.generation;
        conn.binding = Some(Binding { session: len32(index), generation });
        let mut session = Session {
            conn: id,
            generation,
            tsih,
            node,
            registrant,
            isid: names.isid,
            portal_group,
            alias: names.alias.clone(),
            attentions: Vec::new(),
        };
        if let Some(node) = node.and_then(|node| self.node(node)) {
            for unit in &node.units {
                session.raise(unit.config.lun, Attention::PowerOn);
            }
        }
        self.sessions[index] = Some(session);
        self.refresh(index, conn);
        Ok(tsih)
    }

    fn free_tsih(&mut self) -> u16 {
        // There are fewer sessions than handles.
        loop {
            let tsih = self.next_tsih;
            self.next_tsih = self.next_tsih.checked_add(1).unwrap_or(1);
            if !self.sessions.iter().flatten().any(|s| s.tsih == tsih) {
                return tsih;
            }
        }
    }

    /// Tells the connection what it has to know of the units.
    pub(super) fn refresh(&self, index: usize, conn: &mut Connection) {
        if conn.shifts_of == self.units_changed {
            return;
        }
        let node = self.sessions[index].as_ref().and_then(|s| s.node).and_then(|n| self.node(n));
        let units = node.map(|n| n.units.as_slice()).unwrap_or_default();
        let shifts = units.iter().map(|u| (u.config.lun, u.shift()));
        conn.set_shifts(shifts, self.units_changed);
    }

    /// Forgets a session: its connection.
    pub(super) fn end_session(&mut self, index: usize) -> Option<ConnId> {
        let session = self.sessions[index].take()?;
        for volume in self.volumes.values_mut() {
            volume.reserved_by.take_if(|by| *by == session.nexus());
        }
        let node = session.node.and_then(|id| self.node_mut(id).ok());
        for unit in node.into_iter().flat_map(|node| &mut node.units) {
            unit.medium.allow(session.nexus());
        }
        self.count_held();
        Some(session.conn)
    }

    /// Raises an attention for the sessions of a node, except one, at a LUN or at all.
    pub(super) fn attend(
        &mut self,
        id: NodeId,
        lun: Option<u16>,
        except: Option<usize>,
        attention: Attention,
    ) {
        let Some(node) = self.nodes.get(id.0 as usize).and_then(Option::as_ref) else { return };
        for (index, session) in self.sessions.iter_mut().enumerate() {
            let Some(session) = session else { continue };
            if session.node != Some(id) || except == Some(index) {
                continue;
            }
            for unit in &node.units {
                if lun.is_none_or(|lun| lun == unit.config.lun) {
                    session.raise(unit.config.lun, attention);
                }
            }
        }
    }

    pub(super) fn handle_logout<M: Memory>(
        &mut self,
        index: usize,
        conn: &mut Connection,
        slot: SlotId,
        reason: u8,
        cid: u16,
        mem: &mut M,
    ) -> Outcome {
        const CLOSE_SESSION: u8 = 0;
        const CLOSE_CONNECTION: u8 = 1;
        const CID_NOT_FOUND: u8 = 1;
        const RECOVERY_NOT_SUPPORTED: u8 = 2;
        let response = match reason {
            CLOSE_SESSION => 0,
            CLOSE_CONNECTION if cid == conn.cid() => 0,
            CLOSE_CONNECTION => CID_NOT_FOUND,
            _ => RECOVERY_NOT_SUPPORTED,
        };
        if response == 0 {
            let node = self.sessions[index].as_ref().and_then(|s| self.node(s.node?));
            let units = node.map(Node::handles).unwrap_or_default();
            self.end_session(index);
            // Nothing of the session is under way any more when it has ended.
            if conn.outstanding() > 1 && !units.is_empty() {
                conn.leave();
                return Outcome::Drain { slot, units };
            }
        }
        conn.respond_logout(slot, response, mem);
        Outcome::Done
    }

    /// SendTargets, and what else a Text Request may ask.
    pub(super) fn handle_text<M: Memory>(
        &self,
        index: usize,
        conn: &mut Connection,
        slot: SlotId,
        mem: &mut M,
    ) {
        let mut out = Vec::new();
        let mut sense = true;
        match (&self.sessions[index], text::parse(conn.login_text())) {
            (Some(session), Ok(pairs)) => {
                for (key, value) in pairs {
                    sense &= self.answer(session, key, value, &mut out);
                }
            }
            _ => sense = false,
        }
        if sense {
            conn.respond_text(slot, out, mem);
        } else {
            conn.reject_text(slot, mem);
        }
    }

    /// Answers one key of a Text Request; false where it makes no sense.
    fn answer(&self, session: &Session, key: &str, value: &str, out: &mut Vec<u8>) -> bool {
        match key {
            "SendTargets" if matches!(value, "All" | "") || is_name(value) => {
                self.send_targets(session, value, out);
                true
            }
            // A key of somebody's own. Of the others none is negotiated here any more.
            _ if key.starts_with("X-") || key.starts_with("X#") => {
                text::push(out, key, "NotUnderstood");
                true
            }
            _ => false,
        }
    }

    fn send_targets(&self, session: &Session, value: &str, out: &mut Vec<u8>) {
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(node) = node else { continue };
            let asked = match value {
                "All" => true,
                "" => session.node == Some(NodeId(len32(i))),
                name => name.eq_ignore_ascii_case(&node.config.iqn),
            };
            // Who may not log in is told nothing.
            if asked && node.config.initiators.allows(session.registrant.name()) {
                self.push_node(node, out);
            }
        }
    }

    fn push_node(&self, node: &Node, out: &mut Vec<u8>) {
        text::push(out, "TargetName", &node.config.iqn);
        let here = self.portals.iter().filter(|p| node.config.portal_groups.contains(&p.group));
        for portal in here.chain(&node.elsewhere) {
            text::push(out, "TargetAddress", &address(portal));
        }
    }
}

/// An address as TargetAddress has it; IPv6 in brackets.
fn address(portal: &Portal) -> String {
    let Portal { address, port, group } = portal;
    if address.contains(':') && !address.starts_with('[') {
        format!("[{address}]:{port},{group}")
    } else {
        format!("{address}:{port},{group}")
    }
}
