//! Volumes: a nexus each, its children in local pools or behind links.

use std::collections::VecDeque;

use cairn_block::{BlockSize, Epoch, IoOp, IoRequest, IoStatus, Memory, ReplicaId};
use cairn_crypt::VolumeKey;
use cairn_nexus::{ChildId, ChildOp, ChildReply, MEND_RESERVE, Nexus, Purpose, Ticket};
use cairn_nvmf::target::{MAX_NQN_LEN, NamespaceHandle, SubsystemId};
use cairn_reactor::Driver;
use cairn_replica::ReplicaSlot;

use super::Shard;
use super::deletions::Deletions;
use super::holds::Holds;
use super::io::Asker;
use super::keys;
use super::pools::Owner;
use super::registers::Origin;
use super::reservations::Reserving;
use super::restore::Restore;
use super::sanitize::Sanitizing;
use super::sectors;
use super::snapshots::SnapshotOrigin;
use super::standby::HandOver;
use crate::control::{
    ChildAddress, EncryptionSpec, EngineError, ExportCounters, Reply, VolumeReplica, VolumeSpec,
};
use crate::snapshot;

/// Hosts of a volume that are told, each, when what they wrote may be lost.
const MAX_WRITERS: usize = 64;

/// A request for a nexus, and whether it is a write that is to be done whole or not at all.
pub(super) type Asked = (IoRequest, bool);

/// How a child is reached.
#[derive(Debug, Clone, Copy)]
pub(super) enum Route {
    Local(LocalRoute),
    Remote {
        link: u32,
    },
    /// The volume is being removed; the link's number may be another's.
    Gone,
}

/// The way to a replica in a pool of this process.
///
/// Whether the replica has promised a newer epoch than the nexus's is noted here when it does, so that a
/// request costs a compare and no look-up.
#[derive(Debug, Clone, Copy)]
pub(super) struct LocalRoute {
    pub(super) pool: u16,
    pub(super) slot: ReplicaSlot,
    /// The epoch that the replica has promised to this nexus.
    pub(super) epoch: Epoch,
    /// Nothing was promised to it yet, or something newer to another since.
    pub(super) fenced: bool,
    /// It is no child any more, once its requests are over.
    pub(super) leaving: bool,
    /// Requests that the pool has not answered: a promise to another waits for them.
    pub(super) in_flight: u32,
}

/// A change of a volume's configuration that somebody waits for.
pub(super) enum PendingChange {
    Size(Reply<()>),
    Key(Reply<()>),
    Member(Reply<()>),
}

/// One volume.
pub(super) struct Volume {
    pub(super) spec: VolumeSpec,
    pub(super) nexus: Nexus,
    /// Tells this volume from earlier ones with its number.
    pub(super) generation: u32,
    pub(super) routes: Vec<Route>,
    /// Set once it has served: hosts can connect from then on.
    pub(super) export: Option<(SubsystemId, NamespaceHandle)>,
    pub(super) counters: ExportCounters,
    pub(super) register_replies: VecDeque<(ChildId, Ticket, ChildReply)>,
    /// Hosts that have written, those that are to hear that what they wrote may be lost, and of how many losses
    /// that is.
    writers: Vec<String>,
    owed: Vec<String>,
    pub(super) losses: u64,
    /// Host requests that the nexus has no room for.
    pub(super) waiting: VecDeque<(u64, Asked)>,
    /// Ranges that commands of several requests have for themselves.
    pub(super) holds: Holds,
    /// What hosts have reserved.
    pub(super) reserving: Reserving,
    /// What this process has to do with sanitizing it.
    pub(super) sanitizing: Sanitizing,
    /// Requests in blocks of 512 bytes that wait for others, or for memory.
    pub(super) sectors: sectors::Waiting,
    removing: Option<Reply<()>>,
    pub(super) change: Option<PendingChange>,
    /// Encrypts and decrypts, where the volume is encrypted and its key is at hand.
    pub(super) key: Option<Box<VolumeKey>>,
    /// The blocks that hosts see.
    pub(super) block_size: BlockSize,
    /// Requests wait: a snapshot of several volumes is being taken.
    pub(super) frozen: bool,
    /// It is being taken back to a snapshot.
    pub(super) restore: Option<Restore>,
    /// Snapshots of it that are being deleted.
    pub(super) deletions: Deletions,
    /// It is being handed over to another process.
    pub(super) hand_over: Option<HandOver>,
    /// Requests that were cut off when it was handed over.
    pub(super) cut_off: u64,
    /// Who waits for it to be taken over.
    pub(super) activation: Option<Reply<()>>,
    /// Why it could not be taken over the last time.
    pub(super) refusal: Option<String>,
    pub(super) busy: bool,
}

impl Volume {
    /// Whether requests of hosts go to the nexus. One that does not serve, or does not any more, refuses them:
    /// nobody waits for a restore that goes on elsewhere.
    fn admits(&self) -> bool {
        let waits = self.frozen || self.nexus.restoring().is_some();
        !waits || !self.nexus.state().is_serving()
    }

    /// Whether a request of a host needs a look: at what others hold, or have reserved, or whether it is being sanitized.
    pub(super) fn is_guarded(&self) -> bool {
        !self.holds.is_empty() || !self.reserving.is_free() || self.is_sanitizing()
    }

    pub(super) fn removing(&self) -> bool {
        self.removing.is_some()
    }

    /// Whoever waits for a change hears that it was not made.
    pub(super) fn fail_change(&mut self, why: &str) {
        use PendingChange::{Key, Member, Size};
        if let Some(Size(reply) | Key(reply) | Member(reply)) = self.change.take() {
            reply.send(Err(EngineError::Storage(why.to_owned())));
        }
    }

    /// Whoever waits for a replica to become a member, or none, hears what became of it.
    pub(super) fn member_changed(&mut self, result: Result<(), EngineError>) {
        let change = self.change.take_if(|c| matches!(c, PendingChange::Member(_)));
        if let Some(PendingChange::Member(reply)) = change {
            reply.send(result);
        }
    }
}

impl<D: Driver> Shard<D> {
    pub(super) fn add_volume(&mut self, mut spec: VolumeSpec, now: u64) -> Result<(), EngineError> {
        let taken =
            self.volumes.iter().any(|(_, v)| v.spec.name == spec.name || v.spec.nqn == spec.nqn);
        if taken {
            return Err(EngineError::Exists { kind: "volume", name: spec.name });
        }
        if spec.children.is_empty() || spec.children.len() > cairn_nexus::MAX_CHILDREN {
            return Err(EngineError::Invalid(format!(
                "volume `{}` names {} replicas; it needs 1 to {}",
                spec.name,
                spec.children.len(),
                cairn_nexus::MAX_CHILDREN
            )));
        }
        let mut children: Vec<ReplicaId> = Vec::new();
        for replica in &spec.children {
            let id = replica.id;
            if children.contains(&id) {
                return Err(EngineError::Invalid(format!(
                    "volume `{}` names replica {id} twice",
                    spec.name
                )));
            }
            match self.check_child(replica, &spec) {
                // Its pool is gone: the volume comes up without it, as without any that is away.
                Err(EngineError::NotFound { .. }) if spec.purpose != Purpose::Create => {}
                checked => checked?,
            }
            children.push(id);
        }
        if let Some(export) = &spec.iscsi {
            let checked = self.check_place(None, export, spec.sharing.is_some());
            match checked {
                Err(error) if spec.purpose != Purpose::Create => {
                    let name = &spec.name;
                    tracing::error!(volume = %name, "the volume is served, and not over iSCSI: {error}");
                    spec.iscsi = None;
                }
                checked => checked?,
            }
        }
        let key = keys::new_key(&spec)?;
        let section =
            |e: &EncryptionSpec| e.new.as_ref().map_or(Vec::new(), |new| new.encode().to_vec());
        let block_size = spec.block_size.unwrap_or(BlockSize::B4096);
        if block_size == BlockSize::B512 && !self.reserve_sectors() {
            return Err(EngineError::Busy(format!(
                "volume `{}` needs a buffer for its blocks of 512 bytes, and there is none now; try \
                 again",
                spec.name
            )));
        }
        let encryption = spec.encryption.as_ref().map(section);
        let nexus = self.new_nexus(&spec, spec.purpose, encryption);
        if !self.has_mend_reserve {
            self.mend_reserve = self.driver.memory().alloc(MEND_RESERVE);
            self.has_mend_reserve = self.mend_reserve.is_some();
        }
        self.next_generation = self.next_generation.wrapping_add(1);
        let routes = vec![Route::Gone; spec.children.len()];
        let at = self.volumes.insert(Volume {
            spec,
            nexus,
            generation: self.next_generation,
            routes,
            export: None,
            counters: ExportCounters::default(),
            register_replies: VecDeque::with_capacity(16),
            writers: Vec::new(),
            owed: Vec::new(),
            losses: 0,
            waiting: VecDeque::with_capacity(64),
            holds: Holds::default(),
            reserving: Reserving::default(),
            sanitizing: Sanitizing::default(),
            sectors: sectors::Waiting::new(),
            removing: None,
            change: None,
            key,
            block_size,
            frozen: false,
            restore: None,
            deletions: Deletions::default(),
            hand_over: None,
            cut_off: 0,
            activation: None,
            refusal: None,
            busy: false,
        });
        self.declare_unit(at);
        for child in 0..self.volumes[at].routes.len() {
            let child = ChildId(u8::try_from(child).expect("at most MAX_CHILDREN"));
            self.route_child(at, child, now);
        }
        self.touch_volume(at);
        Ok(())
    }

    /// Whether a replica can be a child of the volume, as far as that is known here.
    pub(super) fn check_child(
        &self,
        replica: &VolumeReplica,
        spec: &VolumeSpec,
    ) -> Result<(), EngineError> {
        match &replica.address {
            ChildAddress::Local { pool } => self.check_local(pool, replica, spec),
            ChildAddress::Remote { nqn, .. } if nqn.len() > MAX_NQN_LEN => {
                let id = replica.id;
                Err(EngineError::Invalid(format!(
                    "replica {id}: an NQN has at most {MAX_NQN_LEN} bytes"
                )))
            }
            ChildAddress::Remote { .. } => Ok(()),
        }
    }

    /// Whether a replica in a pool of this process can be a child of a volume so large.
    fn check_local(
        &self,
        name: &str,
        replica: &VolumeReplica,
        spec: &VolumeSpec,
    ) -> Result<(), EngineError> {
        let id = replica.id;
        let missing =
            || EngineError::NotFound { kind: "replica", name: format!("local:{name}/{id}") };
        let (pool, slot, _) = self.find_replica(id).ok_or_else(missing)?;
        let local = &self.pools[usize::from(pool)];
        if local.name != name {
            return Err(EngineError::Invalid(format!(
                "replica {id} is in pool `{}`, not in `{name}`",
                local.name
            )));
        }
        let pool = &local.pool;
        let found = pool.replicas().find(|r| r.slot == slot).ok_or_else(missing)?;
        // One of a volume that exists may have missed that it grew: it does so when it joins.
        let small = !replica.witness && found.blocks < spec.blocks;
        if spec.purpose == Purpose::Create && small {
            return Err(EngineError::Invalid(format!(
                "replica {id} is too small: it has {} blocks, the volume {}",
                found.blocks, spec.blocks
            )));
        }
        Ok(())
    }

    /// Stops serving: hosts and replicas are cut off at once, what is held is let go of, what is in
    /// flight ends, then the volume is gone.
    pub(super) fn remove_volume(&mut self, at: u32, reply: Reply<()>, now: u64) {
        let volume = &mut self.volumes[at];
        if volume.removing.is_some() {
            reply.send(Err(EngineError::Busy("the volume is being removed already".to_owned())));
            return;
        }
        volume.removing = Some(reply);
        self.remove_unit(at);
        if let Some((subsystem, handle)) = self.volumes[at].export.take() {
            for conn in self.target.remove_subsystem(subsystem) {
                self.close_host(conn.0);
            }
            self.exports[handle.0 as usize] = None;
        }
        self.drop_holds(at, now);
        self.forget_reservations(at, IoStatus::NotReady);
        self.forget_sanitize(at, IoStatus::NotReady);
        self.drop_sectors(at, IoStatus::NotReady, now);
        self.volumes[at].nexus.close();
        self.send_children(at, now);
        self.flush_links();
        self.retire_links(at);
        self.touch_volume(at);
    }

    /// The links to a volume's replicas end once what was sent on them is out.
    pub(super) fn retire_links(&mut self, at: u32) {
        for child in 0..self.volumes[at].routes.len() {
            if let Route::Remote { link } = self.volumes[at].routes[child] {
                self.volumes[at].routes[child] = Route::Gone;
                self.retire_link(link);
            }
        }
    }

    pub(super) fn submit_to_volume(&mut self, at: u32, tag: u64, asked: Asked, now: u64) {
        let Some(volume) = self.volumes.get_mut(at) else { return };
        if volume.nexus.has_room() && volume.waiting.is_empty() && volume.admits() {
            self.submit_now(at, tag, asked, now);
        } else {
            volume.waiting.push_back((tag, asked));
        }
        self.touch_volume(at);
    }

    fn submit_now(&mut self, at: u32, tag: u64, (request, atomic): Asked, now: u64) {
        if request.op == IoOp::Flush
            && let Ok(io) = u32::try_from(tag)
            && self.owes_an_error(at, io)
        {
            self.host_io_done(io, IoStatus::MediaError, now);
            self.host_io_released(io, now);
            return;
        }
        if atomic {
            self.volumes[at].nexus.submit_atomic(tag, request, now);
        } else {
            self.volumes[at].nexus.submit(tag, request, now);
        }
    }

    /// Whether the host of a flush is to hear that what it wrote before may be lost; once.
    fn owes_an_error(&mut self, at: u32, io: u32) -> bool {
        let volume = &mut self.volumes[at];
        let losses = volume.nexus.losses();
        if std::mem::replace(&mut volume.losses, losses) < losses {
            volume.owed.clone_from(&volume.writers);
        }
        if volume.owed.is_empty() {
            return false;
        }
        let Some(host) = self.host_of(self.ios[io].asker()) else { return false };
        let owed = &mut self.volumes[at].owed;
        let before = owed.len();
        owed.retain(|other| *other != host);
        owed.len() < before
    }

    /// The name of whoever asks.
    fn host_of(&self, asker: Asker) -> Option<String> {
        match asker {
            Asker::Nvme { conn, generation, .. } => {
                let host = self.hosts.get(conn).filter(|h| h.generation == generation)?;
                self.target.host_of(&host.queue).map(str::to_owned)
            }
            Asker::Iscsi { conn, generation, .. } => {
                let host = self.initiators.hosts.get(conn);
                let host = host.filter(|h| h.generation == generation)?;
                host.writer.as_deref().map(str::to_owned)
            }
            Asker::Job(_) | Asker::Sanitize { .. } => None,
        }
    }

    /// The host of a connection writes to the volume.
    pub(super) fn note_writer(&mut self, conn: u32, at: u32) {
        self.hosts[conn].noted = true;
        let host = self.target.host_of(&self.hosts[conn].queue).map(str::to_owned);
        if let Some(host) = host {
            self.add_writer(at, &host);
        }
    }

    /// A host that writes to the volume.
    pub(super) fn add_writer(&mut self, at: u32, host: &str) {
        let Some(volume) = self.volumes.get_mut(at) else { return };
        if volume.writers.iter().all(|other| other != host) {
            if volume.writers.len() == MAX_WRITERS {
                volume.writers.remove(0);
            }
            volume.writers.push(host.to_owned());
        }
    }

    /// A Verify of a child, whose answer comes next, found data in so many blocks.
    pub(super) fn child_verified(&mut self, volume: u32, ticket: Ticket, blocks: u64) {
        if blocks > 0
            && let Some(v) = self.volumes.get_mut(volume)
        {
            v.nexus.handle_verified(ticket, blocks);
        }
    }

    pub(super) fn child_io_done(
        &mut self,
        volume: u32,
        child: ChildId,
        ticket: Ticket,
        status: IoStatus,
        now: u64,
    ) {
        if let Some(v) = self.volumes.get_mut(volume) {
            v.nexus.handle_io(child, ticket, status, now);
            self.touch_volume(volume);
        }
    }

    /// Moves every volume on: child I/O down, answers up.
    pub(super) fn run_volumes(&mut self, now: u64) -> bool {
        let mut moved = false;
        if self.is_closing() {
            // A volume that lost its links would take up its members, or what another process serves, anew.
            return moved;
        }
        while let Some(at) = self.busy_volumes.pop() {
            let Some(volume) = self.volumes.get_mut(at) else { continue };
            volume.busy = false;
            moved = true;
            self.run_volume(at, now);
        }
        moved
    }

    fn run_volume(&mut self, at: u32, now: u64) {
        while let Some((child, ticket, reply)) = self.volumes[at].register_replies.pop_front() {
            self.volumes[at].nexus.handle_register(child, ticket, reply, now);
        }
        loop {
            let mut moved = self.run_mends(at, now);
            while let Some(io) = self.volumes[at].nexus.poll_child() {
                let route = self.volumes[at].routes[usize::from(io.child.0)];
                self.send_child(at, route, io, now);
                moved = true;
            }
            while let Some(done) = self.volumes[at].nexus.poll_done() {
                match (u32::try_from(done.tag), piece_of(done.tag)) {
                    (Ok(io), _) => self.host_io_done(io, done.status, now),
                    (_, Some(piece)) => self.piece_done(piece, done.status, now),
                    _ => self.own_request_done(done.tag, Some(done.status)),
                }
                moved = true;
            }
            while let Some(tag) = self.volumes[at].nexus.poll_release() {
                match (u32::try_from(tag), piece_of(tag)) {
                    (Ok(io), _) => self.host_io_released(io, now),
                    (_, Some(piece)) => self.piece_released(piece, now),
                    _ => self.own_request_done(tag, None),
                }
                moved = true;
            }
            while self.volumes[at].admits()
                && self.volumes[at].nexus.has_room()
                && let Some((tag, asked)) = self.volumes[at].waiting.pop_front()
            {
                self.submit_now(at, tag, asked, now);
                moved = true;
            }
            if !moved {
                break;
            }
        }
        while let Some(event) = self.volumes[at].nexus.poll_event() {
            self.volume_event(at, event, now);
        }
        if self.volumes[at].reserving.is_waiting() {
            self.advance_reservations(at, now);
        }
        self.advance_sanitize(at, now);
        if !self.snapshots.is_empty() {
            self.advance_snapshots(now);
        }
        self.advance_hand_over(at, now);
        let volume = &mut self.volumes[at];
        if volume.nexus.waits_for_memory() && !self.short_volumes.contains(&at) {
            self.short_volumes.push(at);
        }
        let next = volume.nexus.poll_timeout(now);
        let finished =
            volume.removing.is_some() && volume.nexus.in_flight() == 0 && volume.waiting.is_empty();
        if finished {
            self.drop_volume(at);
        } else {
            self.wants_timeout(next);
        }
    }

    /// Moves a volume's mends on; false where nothing can be done now.
    pub(super) fn run_mends(&mut self, at: u32, now: u64) -> bool {
        let Some(volume) = self.volumes.get_mut(at) else { return false };
        volume.nexus.run_mends(self.driver.memory(), &mut self.mend_reserve, now)
    }

    fn drop_volume(&mut self, at: u32) {
        let gone = "the volume was removed meanwhile";
        self.forget_restore(at, gone);
        self.forget_deletions(at, gone);
        self.remove_unit(at);
        let Some(mut volume) = self.volumes.remove(at) else { return };
        volume.fail_change(gone);
        if let Some(reply) = volume.activation.take() {
            reply.send(Err(EngineError::Storage(gone.to_owned())));
        }
        self.detach_links(at);
        if let Some(reply) = volume.removing {
            reply.send(Ok(()));
        }
    }

    fn send_child(&mut self, at: u32, route: Route, io: cairn_nexus::ChildIo, now: u64) {
        match (route, io.op) {
            (Route::Local(LocalRoute { leaving: true, .. }), _) => {
                self.refuse_remote(at, io.child, io.ticket, now);
            }
            // Whatever touches the device of a replica that has promised a newer epoch is refused here.
            (
                Route::Local(LocalRoute { fenced: true, .. }),
                ChildOp::Io(_)
                | ChildOp::Changes { .. }
                | ChildOp::SettleBegin { .. }
                | ChildOp::SettleEnd { .. }
                | ChildOp::GiveUpLost,
            ) => {
                self.child_io_done(at, io.child, io.ticket, IoStatus::Fenced, now);
            }
            (
                Route::Local(LocalRoute { pool, slot, .. }),
                ChildOp::Io(IoRequest { op: IoOp::Snapshot(verb), buf, .. }),
            ) => {
                let (child, ticket) = (io.child, io.ticket);
                let origin = SnapshotOrigin::Child { volume: at, child, ticket };
                let call = snapshot::decode(self.driver.memory().bytes(buf));
                self.snapshot_on_replica((pool, slot), origin, verb, call, now);
            }
            (Route::Local(LocalRoute { pool, slot, .. }), ChildOp::Io(request)) => {
                self.local_child_started(at, io.child);
                let tag = Owner::Child { volume: at, child: io.child, ticket: io.ticket }.tag();
                let local = &mut self.pools[usize::from(pool)];
                local.pool.submit(tag, slot, request, self.driver.memory());
                local.busy = true;
            }
            (Route::Local(LocalRoute { pool, slot, .. }), op) => {
                let generation = self.volumes[at].generation;
                let (child, ticket) = (io.child, io.ticket);
                let origin = Origin::Volume { volume: at, generation, child, ticket };
                match op {
                    ChildOp::Register(op) => self.register_op(origin, pool, slot, op),
                    op => self.upkeep_on_local((pool, slot), (at, child, ticket), &op, now),
                }
            }
            (Route::Remote { link }, op) => self.send_remote(link, io.ticket, op, now),
            (Route::Gone, _) => self.refuse_remote(at, io.child, io.ticket, now),
        }
    }

    /// Sends what the nexus has for its children.
    pub(super) fn send_children(&mut self, at: u32, now: u64) {
        while let Some(io) = self.volumes[at].nexus.poll_child() {
            let route = self.volumes[at].routes[usize::from(io.child.0)];
            self.send_child(at, route, io, now);
        }
    }

    /// The nexuses of this process answer no more reads, and nobody has to wait for them.
    pub(super) fn release_leases(&mut self, now: u64) {
        for at in self.volumes.keys() {
            self.volumes[at].nexus.release_lease();
            self.send_children(at, now);
        }
        self.flush_links();
    }

    /// A request goes to a local replica, outside of snapshot calls.
    fn local_child_started(&mut self, at: u32, child: ChildId) {
        if let Route::Local(local) = &mut self.volumes[at].routes[usize::from(child.0)] {
            local.in_flight += 1;
        }
    }

    /// The pool has answered one.
    pub(super) fn local_child_done(&mut self, volume: u32, child: ChildId) {
        let Some(v) = self.volumes.get_mut(volume) else { return };
        if let Route::Local(local) = &mut v.routes[usize::from(child.0)] {
            local.in_flight -= 1;
            if local.in_flight == 0 {
                if local.leaving {
                    v.routes[usize::from(child.0)] = Route::Gone;
                }
                self.finish_drains();
            }
        }
    }

    /// A replica of this process has promised `epoch` to whoever `origin` is: nexuses of older ones here do
    /// not get at it any more.
    pub(super) fn fence_routes(
        &mut self,
        replica: (u16, ReplicaSlot),
        epoch: Epoch,
        origin: Option<Origin>,
    ) {
        let bound = match origin {
            Some(Origin::Volume { volume, generation, child, .. }) => {
                Some((volume, generation, child))
            }
            _ => None,
        };
        for at in self.volumes.keys() {
            let volume = &mut self.volumes[at];
            let generation = volume.generation;
            for (child, route) in (0u8..).zip(&mut volume.routes) {
                let Route::Local(local) = route else { continue };
                if (local.pool, local.slot) != replica {
                    continue;
                }
                if bound == Some((at, generation, ChildId(child))) {
                    (local.epoch, local.fenced) = (epoch, false);
                } else if local.epoch < epoch {
                    local.fenced = true;
                }
            }
        }
    }

    /// Whether a nexus of this process has requests in hand at a replica of it.
    pub(super) fn has_local_io(&self, replica: (u16, ReplicaSlot)) -> bool {
        let mut routes = self.volumes.iter().flat_map(|(_, v)| &v.routes);
        routes.any(|route| match route {
            Route::Local(l) => (l.pool, l.slot) == replica && l.in_flight > 0,
            _ => false,
        })
    }
}

/// The piece of a request in smaller blocks that a tag names, if it does.
fn piece_of(tag: u64) -> Option<u32> {
    if tag & sectors::PIECE == 0 {
        return None;
    }
    u32::try_from(tag & !sectors::PIECE).ok()
}
