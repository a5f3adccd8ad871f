//! Volumes as logical units of iSCSI targets: which target has which, who may log in, and what initiators are told of the
//! ports that lead there.

use std::net::SocketAddr;

use cairn_block::reservation::Effects;
use cairn_block::{BlockSize, undo};
use cairn_iscsi::scsi::ports::{AccessState, PortGroup};
use cairn_iscsi::scsi::{UnitConfig, UnitHandle};
use cairn_iscsi::target::{ConnId, Initiators as Allowed, NodeConfig, NodeId, Portal};
use cairn_nvmf::ana::AnaState;
use cairn_reactor::Driver;

use super::Shard;
use super::moves::{FRONT, Message};
use super::standby::ana_state;
use super::volumes::Volume;
use crate::control::{
    EngineError, IscsiExport, IscsiPortal, IscsiReport, IscsiSession, IscsiTarget,
};

/// A volume that is a logical unit, or will be once it is there.
#[derive(Debug)]
pub(super) struct Place {
    /// The volume's number.
    volume: u32,
    iqn: String,
    lun: u16,
    /// Whether the unit is there.
    there: bool,
}

/// A target of another shard, as initiators that look for targets are told here.
#[derive(Debug)]
pub(super) struct Foreign {
    shard: u16,
    iqn: String,
    /// Without units: logins are the other shard's.
    node: NodeId,
}

fn same(a: &str, b: &str) -> bool {
    a.eq_ignore_ascii_case(b)
}

pub(super) fn portal(of: &IscsiPortal) -> Portal {
    Portal { address: of.address.ip().to_string(), port: of.address.port(), group: of.group }
}

fn node_config(export: &IscsiExport, groups: &[u16]) -> NodeConfig {
    NodeConfig {
        iqn: export.iqn.clone(),
        alias: None,
        initiators: allowed(export),
        chap: export.chap.clone(),
        portal_groups: groups.to_vec(),
        port_groups: Vec::new(),
    }
}

fn allowed(export: &IscsiExport) -> Allowed {
    match export.initiators.as_slice() {
        [] => Allowed::Nobody,
        [any] if any == "*" => Allowed::Any,
        names => Allowed::Named(names.to_vec()),
    }
}

/// The state of the port group that leads to a volume here.
fn access_state(ana: AnaState) -> AccessState {
    match ana {
        AnaState::Optimized => AccessState::Optimized,
        AnaState::NonOptimized => AccessState::NonOptimized,
        AnaState::Change => AccessState::Transitioning,
        // A port that is unavailable does not tell how large the unit is and whether it has a cache: Linux would take
        // it for an empty disk without one, and drop the flushes that it sends there once it is served there.
        AnaState::Inaccessible => AccessState::Standby,
        AnaState::PersistentLoss => AccessState::Unavailable,
    }
}

fn state_word(state: AccessState) -> &'static str {
    match state {
        AccessState::Optimized => "active/optimized",
        AccessState::NonOptimized => "active/non-optimized",
        AccessState::Standby => "standby",
        AccessState::Unavailable => "unavailable",
        AccessState::Transitioning => "transitioning",
    }
}

impl<D: Driver> Shard<D> {
    // ---- portals

    pub(super) fn add_iscsi_listener(
        &mut self,
        listener: D::Listener,
        address: SocketAddr,
        group: u16,
    ) -> Result<(), EngineError> {
        let portal = portal(&IscsiPortal { address, group });
        self.listen_for_initiators(listener, portal)
            .map_err(|e| EngineError::Invalid(format!("listening for initiators failed: {e}")))
    }

    /// The process listens there.
    pub(super) fn add_portal(&mut self, portal: Portal) {
        self.initiators.portals.push(portal);
        self.initiators.target.set_portals(self.initiators.portals.clone());
    }

    // ---- logical units

    /// Whether a volume can be a logical unit there.
    pub(super) fn check_place(
        &self,
        volume: Option<u32>,
        export: &IscsiExport,
        shared: bool,
    ) -> Result<(), EngineError> {
        let others: Vec<&Place> = self
            .initiators
            .places
            .iter()
            .filter(|p| Some(p.volume) != volume && same(&p.iqn, &export.iqn))
            .collect();
        if let Some(taken) = others.iter().find(|p| p.lun == export.lun) {
            let of = &self.volumes[taken.volume].spec.name;
            return Err(EngineError::Busy(format!(
                "target {} has a LUN {} already, volume `{of}`; choose another (--lun)",
                export.iqn, export.lun
            )));
        }
        let shares = |p: &&&Place| self.volumes[p.volume].spec.sharing.is_some();
        if !others.is_empty() && (shared || others.iter().any(|p| shares(&p))) {
            return Err(EngineError::Invalid(format!(
                "target {} would have several volumes, and one of them is shared with other processes: where such a \
                 volume is served is told for a target as a whole, so give it a target of its own",
                export.iqn
            )));
        }
        if let Some(foreign) = self.initiators.foreign.iter().find(|f| same(&f.iqn, &export.iqn)) {
            return Err(EngineError::Invalid(format!(
                "target {} is on shard {}, and the volume on shard {}; one target's volumes are on one shard",
                export.iqn, foreign.shard, self.config.shard
            )));
        }
        self.check_node(export)
    }

    /// Whether a target can be so.
    fn check_node(&self, export: &IscsiExport) -> Result<(), EngineError> {
        use cairn_iscsi::target::{Target, TargetConfig};
        // One of its own finds what there is to say.
        let probe = Target::new(TargetConfig::default());
        let added = probe.and_then(|mut probe| probe.add_node(node_config(export, &[])));
        added.map(drop).map_err(|error| EngineError::Invalid(error.to_string()))?;
        if export.lun > cairn_iscsi::scsi::MAX_LUN {
            let most = cairn_iscsi::scsi::MAX_LUN;
            return Err(EngineError::Invalid(format!("LUN {}: from 0 to {most}", export.lun)));
        }
        Ok(())
    }

    /// Makes a volume a logical unit, or none, or changes who may log in.
    pub(super) fn export_iscsi(
        &mut self,
        name: &str,
        export: Option<IscsiExport>,
    ) -> Result<(), EngineError> {
        let missing = || EngineError::NotFound { kind: "volume", name: name.to_owned() };
        let at = self.find_volume(name).ok_or_else(missing)?;
        let volume = &self.volumes[at];
        if volume.removing() {
            return Err(EngineError::Busy(format!("volume `{name}` is being removed")));
        }
        if export.is_none() && volume.reserving.is_held_by_initiators() {
            return Err(EngineError::Busy(format!(
                "volume `{name}` is reserved by an initiator, which could not end that any more: have it released or \
                 preempted first (`sg_persist --out --release` or `--preempt`, `nvme resv-acquire --racqa=1`)"
            )));
        }
        if let Some(export) = &export {
            self.check_place(Some(at), export, volume.spec.sharing.is_some())?;
        }
        let moved = match (&volume.spec.iscsi, &export) {
            (Some(a), Some(b)) => !same(&a.iqn, &b.iqn) || a.lun != b.lun,
            _ => true,
        };
        if moved {
            self.remove_unit(at);
        }
        self.volumes[at].spec.iscsi = export.map(Box::new);
        if moved {
            self.declare_unit(at);
            self.add_unit(at);
        }
        self.set_access(at);
        Ok(())
    }

    /// The volume will have its unit.
    pub(super) fn declare_unit(&mut self, at: u32) {
        if let Some(export) = &self.volumes[at].spec.iscsi {
            let (iqn, lun) = (export.iqn.clone(), export.lun);
            self.initiators.places.push(Place { volume: at, iqn, lun, there: false });
            self.reserve_job_buffer();
            // Whoever asks for it there comes here, and is told to come again.
            self.announce_target(at);
        }
    }

    /// The volume is exported: it gets its unit, and the target is there from then on.
    pub(super) fn add_unit(&mut self, at: u32) {
        let volume = &self.volumes[at];
        let (Some(export), Some((_, handle))) = (&volume.spec.iscsi, volume.export) else { return };
        let target = &mut self.initiators.target;
        let groups = &self.config.iscsi.portal_groups;
        let added = match target.node_by_name(&export.iqn) {
            Some(node) => Ok(node),
            None => target.add_node(node_config(export, groups)),
        };
        let unit = UnitConfig {
            lun: export.lun,
            handle: UnitHandle(handle.0),
            blocks: self.host_blocks(at),
            block_size: volume.block_size,
            physical_block_size: BlockSize::B4096,
            id: volume.spec.id.0,
            volatile_write_cache: true,
            read_only: export.read_only,
            removable: export.removable,
            atomic_blocks: u32::try_from(undo::MAX_BLOCKS).unwrap_or(1),
        };
        let target = &mut self.initiators.target;
        if let Err(error) = added.and_then(|node| target.add_unit(node, unit)) {
            let name = &self.volumes[at].spec.name;
            tracing::error!(volume = %name, %error, "the volume cannot be exported over iSCSI");
            return;
        }
        if let Some(place) = self.initiators.places.iter_mut().find(|p| p.volume == at) {
            place.there = true;
        }
        self.install_reservations(at, &Effects::default());
        self.install_sanitize(at);
        self.update_access(at);
        self.announce_target(at);
    }

    /// The volume's unit is gone, and its target, where that has no other.
    pub(super) fn remove_unit(&mut self, at: u32) {
        let places = &mut self.initiators.places;
        let Some(place) = places.iter().position(|p| p.volume == at) else { return };
        let Place { iqn, lun, there, .. } = places.swap_remove(place);
        if !places.iter().any(|p| same(&p.iqn, &iqn)) {
            self.tell_front(&iqn, None);
        }
        let target = &mut self.initiators.target;
        let Some(node) = target.node_by_name(&iqn).filter(|_| there) else { return };
        target.remove_unit(node, lun).expect("it was added");
        if !self.initiators.places.iter().any(|p| p.there && same(&p.iqn, &iqn)) {
            for ConnId(conn) in self.initiators.target.remove_node(node) {
                self.close_initiator(conn);
            }
        }
        self.settle_target();
    }

    pub(super) fn resize_unit(&mut self, at: u32) {
        let blocks = self.host_blocks(at);
        let Some((node, lun)) = self.unit_of(at) else { return };
        self.initiators.target.resize_unit(node, lun, blocks).expect("the unit is there");
    }

    fn unit_of(&self, at: u32) -> Option<(NodeId, u16)> {
        let place = self.initiators.places.iter().find(|p| p.volume == at && p.there)?;
        Some((self.initiators.target.node_by_name(&place.iqn)?, place.lun))
    }

    /// Who may log in to a volume's target has changed, for all its volumes, or what they may do with this one.
    fn set_access(&mut self, at: u32) {
        let (Some(export), Some((node, lun))) = (&self.volumes[at].spec.iscsi, self.unit_of(at))
        else {
            return;
        };
        let (names, chap) = (allowed(export), export.chap.clone());
        let (read_only, removable) = (export.read_only, export.removable);
        let target = &mut self.initiators.target;
        target.set_access(node, names, chap).expect("it was checked");
        target.set_read_only(node, lun, read_only).expect("the unit is there");
        target.set_removable(node, lun, removable).expect("the unit is there");
        self.announce_target(at);
    }

    /// What initiators are told of the ports that lead to a volume.
    pub(super) fn update_access(&mut self, at: u32) {
        let Some((node, _)) = self.unit_of(at) else { return };
        let groups = self.port_groups(&self.volumes[at]);
        let elsewhere = self.elsewhere(&self.volumes[at]);
        let target = &mut self.initiators.target;
        target.set_port_groups(node, groups).expect("the target is there");
        let portals = elsewhere.iter().map(portal).collect();
        target.set_elsewhere(node, portals).expect("the target is there");
        self.announce_target(at);
    }

    fn elsewhere(&self, volume: &Volume) -> Vec<IscsiPortal> {
        volume.spec.sharing.as_ref().map_or_else(Vec::new, |s| s.iscsi_elsewhere.clone())
    }

    /// The target port groups: of this process one, and one for each portal group of others.
    fn port_groups(&self, volume: &Volume) -> Vec<PortGroup> {
        let ports = self.config.iscsi.portal_groups.clone();
        let Some(&id) = ports.first() else { return Vec::new() };
        let here = access_state(ana_state(volume));
        let mut groups = vec![PortGroup { id, state: here, ports }];
        let mut tags: Vec<u16> = self.elsewhere(volume).iter().map(|p| p.group).collect();
        tags.sort_unstable();
        tags.dedup();
        // While this one serves nobody else does. While it does not, the only other does; of several it is not known
        // which, and each tells of itself.
        let there = match (here, tags.len()) {
            (AccessState::Optimized, _) => AccessState::Standby,
            (_, 1) => AccessState::Optimized,
            _ => return groups,
        };
        groups.extend(tags.into_iter().map(|tag| PortGroup {
            id: tag,
            state: there,
            ports: vec![tag],
        }));
        groups
    }

    // ---- several shards

    /// The shard that listens tells initiators of all targets.
    fn announce_target(&mut self, at: u32) {
        if self.config.shard == FRONT {
            return;
        }
        let volume = &self.volumes[at];
        let Some(export) = &volume.spec.iscsi else { return };
        let iqn = export.iqn.clone();
        let told =
            IscsiTarget { export: IscsiExport::clone(export), elsewhere: self.elsewhere(volume) };
        self.tell_front(&iqn, Some(told));
    }

    fn tell_front(&mut self, iqn: &str, target: Option<IscsiTarget>) {
        if self.config.shard != FRONT {
            let message = Message::IscsiTarget {
                shard: self.config.shard,
                iqn: iqn.to_owned(),
                target: target.map(Box::new),
            };
            self.outbox.push_back((FRONT, message));
        }
    }

    /// Another shard of the process tells of a target.
    pub(super) fn handle_foreign_target(
        &mut self,
        shard: u16,
        iqn: String,
        target: Option<Box<IscsiTarget>>,
    ) {
        let initiators = &mut self.initiators;
        let known = initiators.foreign.iter().position(|f| f.shard == shard && same(&f.iqn, &iqn));
        let node = match (target, known) {
            (None, Some(at)) => {
                let gone = initiators.foreign.swap_remove(at);
                initiators.target.remove_node(gone.node);
                return;
            }
            (None, None) => return,
            (Some(told), Some(at)) => (initiators.foreign[at].node, told),
            (Some(told), None) => {
                let groups = &self.config.iscsi.portal_groups;
                match initiators.target.add_node(node_config(&told.export, groups)) {
                    Ok(node) => {
                        initiators.foreign.push(Foreign { shard, iqn, node });
                        (node, told)
                    }
                    Err(error) => {
                        tracing::error!(target = %iqn, %error, "a target of another shard is not told of");
                        return;
                    }
                }
            }
        };
        let (node, told) = node;
        let (names, chap) = (allowed(&told.export), told.export.chap.clone());
        let portals = told.elsewhere.iter().map(portal).collect();
        let target = &mut initiators.target;
        target.set_access(node, names, chap).expect("the other shard has checked it");
        target.set_elsewhere(node, portals).expect("the target is known");
    }

    /// The shard that has a target, where it is another.
    pub(super) fn foreign_shard(&self, iqn: &str) -> Option<u16> {
        self.initiators.foreign.iter().find(|f| same(&f.iqn, iqn)).map(|f| f.shard)
    }

    /// Whether a target has units that are not there yet.
    pub(super) fn is_coming(&self, iqn: &str) -> bool {
        self.initiators.places.iter().any(|p| !p.there && same(&p.iqn, iqn))
    }

    // ---- what is told

    /// The name of the initiator of a connection.
    pub(super) fn initiator_name(&self, conn: u32) -> Option<String> {
        let target = &self.initiators.target;
        let mut nodes = self.initiators.places.iter().filter(|p| p.there);
        nodes.find_map(|p| {
            let sessions = target.sessions(target.node_by_name(&p.iqn)?);
            sessions.into_iter().find(|s| s.conn == ConnId(conn)).map(|s| s.initiator)
        })
    }

    /// How many sessions a volume's target has.
    pub(super) fn session_count(&self, at: u32) -> usize {
        self.unit_of(at).map_or(0, |(node, _)| self.initiators.target.sessions(node).len())
    }

    pub(super) fn iscsi_report(&self, at: u32) -> Option<IscsiReport> {
        let volume = &self.volumes[at];
        let export = volume.spec.iscsi.as_ref()?;
        let target = &self.initiators.target;
        let node = self.unit_of(at).map(|(node, _)| node);
        let session = |info: cairn_iscsi::target::SessionInfo| {
            let conn = self.initiators.hosts.get(info.conn.0).map(|host| &host.conn);
            IscsiSession {
                initiator: info.initiator,
                isid: info.isid,
                tsih: info.tsih,
                portal_group: conn.map_or(0, |conn| conn.portal_group()),
                header_digest: conn.is_some_and(|conn| conn.params().digests.header),
                data_digest: conn.is_some_and(|conn| conn.params().digests.data),
            }
        };
        Some(IscsiReport {
            iqn: export.iqn.clone(),
            lun: export.lun,
            initiators: export.initiators.clone(),
            read_only: export.read_only,
            removable: export.removable,
            chap: export.chap.is_some(),
            mutual_chap: export.chap.as_ref().is_some_and(|chap| chap.target.is_some()),
            state: if node.is_some() { state_word(access_state(ana_state(volume))) } else { "" },
            port_group: self.config.iscsi.portal_groups.first().copied().unwrap_or(0),
            sessions: node.map_or_else(Vec::new, |node| {
                target.sessions(node).into_iter().map(session).collect()
            }),
        })
    }
}
