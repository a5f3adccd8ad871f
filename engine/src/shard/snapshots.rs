//! Snapshots of volumes: the same call goes to every replica, at one point in the order of writes.

use cairn_block::{Buf, IoOp, IoRequest, IoStatus, Lba, LbaRange, Memory, ReplicaId, SnapshotVerb};
use cairn_nexus::{ChildId, ChildState, Ticket};
use cairn_nvmf::initiator::{Submit, VendorData};
use cairn_nvmf::sqe::Sqe;
use cairn_nvmf::status::Status;
use cairn_nvmf::target::{NamespaceHandle, SlotId, status_of};
use cairn_reactor::Driver;
use cairn_replica::{
    MultiPool, PoolState, ReplicaInfo, ReplicaSlot, ReplicaSpec, ReplicaState, SnapshotInfo,
};

use super::Shard;
use super::io::Export;
use super::links::ADMIN_QUEUE;
use super::pools::Waiter;
use super::volumes::{LocalRoute, Route};
use crate::control::{EngineError, Reply, SnapshotReport};
use crate::snapshot::{self, SnapshotCall, SnapshotEntry};

/// Set in the tags of the shard's own requests to a nexus.
pub(super) const OWN: u64 = 1 << 40;
/// Set in the tickets of the shard's own commands on links.
const LIST: u32 = cairn_nexus::FOREIGN_TICKET;
/// Volumes of which a snapshot is taken together at most: each has a place in the tags.
const MAX_VOLUMES: usize = 64;
/// Snapshots of a volume that a list takes from a replica at most: more cannot be in a pool.
const MAX_LISTED: usize = 4096;
/// Several volumes are held still together for at most so long.
const FREEZE_MS: u64 = 5_000;

/// Who asked a pool for something about a snapshot.
#[derive(Debug, Clone, Copy)]
pub(super) enum SnapshotOrigin {
    Host { conn: u32, generation: u32, slot: SlotId },
    Child { volume: u32, child: ChildId, ticket: Ticket },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Not asked yet.
    No,
    Asked,
    Done(IoStatus),
    /// And its nexus no longer uses the page.
    Released(IoStatus),
}

/// One call, on one volume or several.
pub(super) struct SnapshotWork {
    id: u64,
    verb: SnapshotVerb,
    page: Option<Buf>,
    /// Number, generation, and what the volume said.
    volumes: Vec<(u32, u32, Answer)>,
    deadline_ms: u64,
    told: Option<Told>,
}

/// Who hears what came of a call.
pub(super) enum Told {
    Caller(Reply<()>),
    /// The volume that goes back to a snapshot.
    Restore,
    /// The volume whose snapshot is deleted.
    Delete,
}

impl SnapshotWork {
    /// A call on volumes, by number and generation, whose page is written.
    pub(super) fn new(verb: SnapshotVerb, page: Buf, volumes: &[(u32, u32)], told: Told) -> Self {
        let volumes = volumes.iter().map(|&(at, generation)| (at, generation, Answer::No));
        let volumes = volumes.collect();
        Self { id: 0, verb, page: Some(page), volumes, deadline_ms: 0, told: Some(told) }
    }
}

/// A list being put together.
pub(super) struct ListWork {
    ticket: u32,
    volume: u32,
    /// Links that have not answered.
    links: Vec<ListedLink>,
    found: Vec<(ReplicaId, Vec<SnapshotEntry>)>,
    /// Replicas that are asked.
    asked: usize,
    /// One of them shares blocks: it has a snapshot, or is a clone.
    shares: bool,
    told: Option<Listed>,
}

/// Who hears what replicas list.
enum Listed {
    Caller(Reply<Vec<SnapshotReport>>),
    /// The volume's sanitize of this number.
    Sanitize(u64),
}

struct ListedLink {
    link: u32,
    replica: ReplicaId,
    /// What it has told.
    entries: Vec<SnapshotEntry>,
    /// That it fills next.
    page: Option<Buf>,
}

impl<D: Driver> Shard<D> {
    /// Carries out a call on volumes; on several, a snapshot of all at one instant.
    pub(super) fn snapshot_volumes(
        &mut self,
        names: &[String],
        (verb, call): (SnapshotVerb, &SnapshotCall),
        force: bool,
        reply: Reply<()>,
        now: u64,
    ) {
        let volumes = match self.check_snapshot(names, verb, force) {
            Ok(volumes) => volumes,
            Err(error) => return reply.send(Err(error)),
        };
        match (verb, volumes.as_slice()) {
            (SnapshotVerb::Restore, &[(at, _)]) => {
                return self.begin_restore(at, call.spec.id, reply, now);
            }
            (SnapshotVerb::Delete, &[(at, _)]) => {
                return self.begin_deletion(at, call.spec.id, reply, now);
            }
            _ => {}
        }
        let id = call.spec.id;
        let left = |&&(at, _): &&(u32, u32)| self.volumes[at].nexus.deleted().contains(&id);
        if let (SnapshotVerb::Create, Some(&(at, _))) = (verb, volumes.iter().find(left)) {
            let name = &self.volumes[at].spec.name;
            return reply.send(Err(EngineError::Busy(format!(
                "volume `{name}` had a snapshot {id} that was deleted, and a replica may still have it: \
                 use another id, or try again when every replica is in sync"
            ))));
        }
        let Some(page) = self.own_page() else {
            let busy = "there is no buffer free for the call; try again".to_owned();
            return reply.send(Err(EngineError::Busy(busy)));
        };
        snapshot::encode(call, self.driver.memory().bytes_mut(page.slice()));
        if names.len() > 1 {
            for &(at, _) in &volumes {
                self.volumes[at].frozen = true;
                self.touch_volume(at);
            }
        }
        self.push_snapshot(SnapshotWork::new(verb, page, &volumes, Told::Caller(reply)), now);
    }

    pub(super) fn push_snapshot(&mut self, work: SnapshotWork, now: u64) {
        self.next_snapshot += 1;
        let (id, deadline_ms) = (self.next_snapshot, now + FREEZE_MS);
        self.snapshots.push(SnapshotWork { id, deadline_ms, ..work });
        self.wants_timeout(Some(deadline_ms));
        self.advance_snapshots(now);
    }

    fn check_snapshot(
        &self,
        names: &[String],
        verb: SnapshotVerb,
        force: bool,
    ) -> Result<Vec<(u32, u32)>, EngineError> {
        if names.len() > MAX_VOLUMES {
            return Err(EngineError::Invalid(format!(
                "a snapshot is taken of at most {MAX_VOLUMES} volumes together, not of {}",
                names.len()
            )));
        }
        if matches!(verb, SnapshotVerb::Restore | SnapshotVerb::Delete) && names.len() != 1 {
            let one = "snapshots are deleted, and volumes taken back to them, one volume at a time";
            return Err(EngineError::Invalid(one.to_owned()));
        }
        let mut volumes: Vec<(u32, u32)> = Vec::new();
        for name in names {
            let missing = || EngineError::NotFound { kind: "volume", name: name.clone() };
            let at = self.find_volume(name).ok_or_else(missing)?;
            let volume = &self.volumes[at];
            if !volume.nexus.status().state.is_serving() || volume.removing() {
                return Err(EngineError::Busy(format!("volume `{name}` is not being served")));
            }
            if let Some(snapshot) = volume.nexus.restoring() {
                return Err(EngineError::Busy(format!(
                    "volume `{name}` is being taken back to snapshot {snapshot}; try again when it is"
                )));
            }
            if volume.is_sanitizing() {
                return Err(EngineError::Busy(format!(
                    "volume `{name}` is {}; try again when they can use it",
                    volume.sanitize_text()
                )));
            }
            if volume.frozen || volumes.iter().any(|(other, ..)| *other == at) {
                return Err(EngineError::Busy(format!(
                    "a snapshot of volume `{name}` is being taken already"
                )));
            }
            let hosts = volume.export.map_or(0, |(s, _)| self.target.controllers(s).len());
            let hosts = hosts + self.session_count(at);
            if verb == SnapshotVerb::Restore && hosts > 0 && !force {
                return Err(EngineError::Busy(format!(
                    "{hosts} hosts are connected to volume `{name}`, and would go on with what they \
                     have in memory; disconnect them first, or use force"
                )));
            }
            volumes.push((at, volume.generation));
        }
        Ok(volumes)
    }

    /// Goes on with the calls that can: what several volumes are asked waits until all are still.
    pub(super) fn advance_snapshots(&mut self, now: u64) {
        let mut i = 0;
        while i < self.snapshots.len() {
            self.ask_snapshot(i, now);
            let work = &self.snapshots[i];
            let waits = |a: &Answer| matches!(a, Answer::No | Answer::Asked);
            if !work.volumes.iter().any(|(.., a)| waits(a)) {
                self.answer_snapshot(i, now);
            }
            let used = |a: &Answer| !matches!(a, Answer::Released(_));
            if self.snapshots[i].volumes.iter().any(|(.., a)| used(a)) {
                i += 1;
                continue;
            }
            let work = self.snapshots.swap_remove(i);
            if let Some(page) = work.page {
                self.release(page);
            }
        }
    }

    fn ask_snapshot(&mut self, i: usize, now: u64) {
        let work = &self.snapshots[i];
        if work.volumes.iter().all(|(.., a)| *a != Answer::No) {
            return;
        }
        let there = |at: u32, generation: u32| {
            self.volumes.get(at).is_some_and(|v| v.generation == generation && !v.removing())
        };
        let gone = work.volumes.iter().any(|&(at, generation, _)| !there(at, generation));
        let several = work.volumes.len() > 1;
        let ready = !gone
            && work.volumes.iter().all(|&(at, ..)| {
                let nexus = &self.volumes[at].nexus;
                nexus.has_room() && (!several || nexus.unanswered() == 0)
            });
        if gone || (!ready && now >= work.deadline_ms) {
            for (.., answer) in &mut self.snapshots[i].volumes {
                *answer = Answer::Released(IoStatus::NotReady);
            }
            return;
        }
        if !ready {
            self.wants_timeout(Some(self.snapshots[i].deadline_ms));
            return;
        }
        let (id, verb) = (work.id, work.verb);
        let buf = work.page.as_ref().map(Buf::slice).unwrap_or_default();
        for v in 0..self.snapshots[i].volumes.len() {
            let (at, ..) = self.snapshots[i].volumes[v];
            self.snapshots[i].volumes[v].2 = Answer::Asked;
            let volume = &mut self.volumes[at];
            let range = LbaRange::new(Lba(0), volume.nexus.blocks()).unwrap_or_default();
            let index = u64::try_from(v).expect("a few volumes");
            let request = IoRequest { op: IoOp::Snapshot(verb), range, buf };
            volume.nexus.submit(OWN | (id << 8) | index, request, now);
            self.touch_volume(at);
        }
    }

    /// A nexus has answered one of the shard's own requests, or let go of its buffer.
    pub(super) fn own_request_done(&mut self, tag: u64, status: Option<IoStatus>) {
        let id = (tag & !OWN) >> 8;
        let index = usize::try_from(tag & 0xff).expect("8 bits");
        let Some(work) = self.snapshots.iter_mut().find(|work| work.id == id) else { return };
        let answer = &mut work.volumes[index].2;
        *answer = match (status, *answer) {
            (Some(status), _) => Answer::Done(status),
            (None, Answer::Done(status)) => Answer::Released(status),
            (None, other) => other,
        };
    }

    fn answer_snapshot(&mut self, i: usize, now: u64) {
        let Some(told) = self.snapshots[i].told.take() else { return };
        let work = &self.snapshots[i];
        let verb = work.verb;
        let status = work.volumes.iter().find_map(|(.., a)| match a {
            Answer::Done(status) | Answer::Released(status) if !status.is_ok() => Some(*status),
            _ => None,
        });
        let mut several = Vec::new();
        for &(at, generation, _) in &work.volumes {
            if self.volumes.get(at).is_some_and(|v| v.generation == generation) {
                several.push(at);
            }
        }
        for &at in &several {
            self.volumes[at].frozen = false;
            self.touch_volume(at);
        }
        match (told, several.as_slice(), status) {
            (Told::Caller(reply), _, None) => reply.send(Ok(())),
            (Told::Caller(reply), _, Some(status)) => reply.send(Err(refusal(verb, status))),
            (Told::Restore, &[at], status) => {
                self.restore_answered(at, status.unwrap_or(IoStatus::Ok), now);
            }
            (Told::Delete, &[at], status) => {
                self.deletion_answered(at, status.unwrap_or(IoStatus::Ok), now);
            }
            (Told::Restore | Told::Delete, ..) => {}
        }
    }

    // ---- at the replica

    /// Asks a pool. What it says comes to [`Shard::snapshot_answered`].
    pub(super) fn snapshot_on_replica(
        &mut self,
        (pool, slot): (u16, ReplicaSlot),
        origin: SnapshotOrigin,
        verb: SnapshotVerb,
        call: Option<SnapshotCall>,
        now: u64,
    ) {
        let Some(call) = call else {
            return self.snapshot_answered(origin, IoStatus::InvalidField, now);
        };
        let local = &self.pools[usize::from(pool)].pool;
        let Some(of) = local.replicas().find(|r| r.slot == slot) else {
            return self.snapshot_answered(origin, IoStatus::NotReady, now);
        };
        if local.state() != PoolState::Online {
            // It finds none, and has them still when it is back.
            return self.snapshot_answered(origin, IoStatus::MediaError, now);
        }
        let id = call.spec.id;
        let found = local.find_snapshot(of.id, id);
        let clone = call.clone.map(|clone| ReplicaSpec {
            id: snapshot::clone_id(clone.volume, of.id),
            volume: clone.volume,
            name: call.spec.name.clone(),
            blocks: clone.blocks,
            block_size: of.block_size,
            thick: of.thick,
            source: Some((of.id, id)),
        });
        // A call that is repeated, because its answer was lost, is done already.
        let done = match (verb, &clone) {
            (SnapshotVerb::Create, _) => found.is_some(),
            (SnapshotVerb::Delete, _) => found.is_none(),
            (SnapshotVerb::Clone, Some(spec)) => {
                let missing = found.is_none() && call.clone.is_some_and(|clone| clone.partial);
                missing || local.find(spec.id).is_some()
            }
            _ => false,
        };
        if done {
            return self.snapshot_answered(origin, IoStatus::Ok, now);
        }
        let cloned = clone.as_ref().filter(|_| verb == SnapshotVerb::Clone);
        if let Some(Err(error)) = cloned.map(|spec| self.check_promise(usize::from(pool), spec)) {
            tracing::warn!(%error, "no clone was made");
            return self.snapshot_answered(origin, IoStatus::NoSpace, now);
        }
        let made = clone.as_ref().map(|spec| spec.id).filter(|_| verb == SnapshotVerb::Clone);
        let tag = self.control_tag(pool, Waiter::Snapshot { origin, slot, made });
        let memory = self.driver.memory();
        let local = &mut self.pools[usize::from(pool)].pool;
        match (verb, found, clone) {
            (SnapshotVerb::Create, ..) => local.create_snapshot(tag, slot, call.spec, memory),
            (SnapshotVerb::Delete, Some(found), _) => local.delete_snapshot(tag, found, memory),
            (SnapshotVerb::Restore, ..) => local.revert(tag, slot, id, memory),
            (SnapshotVerb::Clone, _, Some(spec)) => local.create_replica(tag, spec, memory),
            (SnapshotVerb::Delete, None, _) | (SnapshotVerb::Clone, _, None) => {
                self.forget_control(pool, tag);
                self.snapshot_answered(origin, IoStatus::InvalidField, now);
            }
        }
    }

    /// The pool has carried out a call, or refused it.
    pub(super) fn snapshot_done(
        &mut self,
        pool: u16,
        (origin, made): (SnapshotOrigin, Option<ReplicaId>),
        status: IoStatus,
        now: u64,
    ) {
        let mut status = status;
        if let Some(id) = made.filter(|_| status.is_ok()) {
            let slot = self.pools[usize::from(pool)].pool.find(id);
            let exported = slot.map_or(Ok(()), |slot| self.export_replica(pool, slot));
            if let Err(error) = exported {
                tracing::error!(replica = %id, %error, "the clone cannot be exported");
                status = IoStatus::Internal;
            }
        }
        self.snapshot_answered(origin, status, now);
    }

    pub(super) fn snapshot_answered(&mut self, origin: SnapshotOrigin, status: IoStatus, now: u64) {
        match origin {
            SnapshotOrigin::Child { volume, child, ticket } => {
                self.child_io_done(volume, child, ticket, status, now);
            }
            SnapshotOrigin::Host { conn, generation, slot } => {
                if self.host_queue(conn, generation).is_none() {
                    return;
                }
                let memory = self.driver.memory();
                let queue = &mut self.hosts[conn].queue;
                queue.complete(slot, status_of(status), 0, memory);
                self.touch_host(conn);
            }
        }
    }

    /// A snapshot command from a connection.
    pub(super) fn start_snapshot_command(
        &mut self,
        (conn, slot): (u32, SlotId),
        namespace: NamespaceHandle,
        sqe: &Sqe,
        data: Option<Buf>,
        now: u64,
    ) {
        let generation = self.hosts[conn].generation;
        let origin = SnapshotOrigin::Host { conn, generation, slot };
        let call =
            data.as_ref().and_then(|buf| snapshot::decode(self.driver.memory().bytes(buf.slice())));
        if let Some(buf) = data {
            self.release(buf);
        }
        let Some(&mut Export::Replica { pool, slot: replica, .. }) = self.export(namespace) else {
            return self.snapshot_answered(origin, IoStatus::Unsupported, now);
        };
        if self.is_fenced(conn, generation, pool, replica) {
            return self.snapshot_answered(origin, IoStatus::Fenced, now);
        }
        match snapshot::verb(sqe.opcode()) {
            Some(verb) => self.snapshot_on_replica((pool, replica), origin, verb, call, now),
            None => self.answer_list((conn, slot), (pool, replica), sqe.cdw(10), now),
        }
    }

    fn answer_list(
        &mut self,
        (conn, slot): (u32, SlotId),
        (pool, replica): (u16, ReplicaSlot),
        first: u32,
        now: u64,
    ) {
        let entries = entries_of(&self.pools[usize::from(pool)].pool, replica);
        let memory = self.driver.memory();
        let queue = &mut self.hosts[conn].queue;
        if queue.data_len(slot) != snapshot::PAGE {
            let generation = self.hosts[conn].generation;
            let origin = SnapshotOrigin::Host { conn, generation, slot };
            return self.snapshot_answered(origin, IoStatus::InvalidField, now);
        }
        match memory.alloc(snapshot::PAGE) {
            Some(page) => {
                let first = usize::try_from(first).unwrap_or(usize::MAX);
                let shares = shares(&self.pools[usize::from(pool)].pool, replica);
                let page_bytes = memory.bytes_mut(page.slice());
                snapshot::encode_list(&entries, first, shares, page_bytes);
                queue.complete_with_data(slot, page, memory);
            }
            None => queue.complete(slot, status_of(IoStatus::NotReady), 0, memory),
        }
        self.touch_host(conn);
    }

    // ---- lists

    /// Asks every replica of a volume that is there for its snapshots.
    pub(super) fn list_snapshots(&mut self, name: &str, reply: Reply<Vec<SnapshotReport>>) {
        let Some(at) = self.find_volume(name) else {
            reply.send(Err(EngineError::NotFound { kind: "volume", name: name.to_owned() }));
            return;
        };
        self.ask_replicas(at, Listed::Caller(reply));
    }

    /// Asks every replica of a volume that is there whether it shares blocks with snapshots: see
    /// [`Shard::looked_for_shared`].
    pub(super) fn look_for_shared(&mut self, at: u32, number: u64) {
        self.ask_replicas(at, Listed::Sanitize(number));
    }

    /// Whether something is being done about a volume's snapshots.
    pub(super) fn has_snapshot_work(&self, at: u32) -> bool {
        self.snapshots.iter().any(|work| work.volumes.iter().any(|(volume, ..)| *volume == at))
    }

    fn ask_replicas(&mut self, at: u32, told: Listed) {
        self.next_snapshot += 1;
        let number = u32::try_from(self.next_snapshot & 0x00ff_ffff).expect("24 bits");
        let mut work = ListWork {
            ticket: LIST | number,
            volume: at,
            links: Vec::new(),
            found: Vec::new(),
            asked: 0,
            shares: false,
            told: Some(told),
        };
        let routes = self.volumes[at].routes.clone();
        let children = self.volumes[at].nexus.status().children;
        for (route, child) in routes.into_iter().zip(children) {
            if !child.in_sync || child.state != ChildState::Online {
                continue;
            }
            work.asked += 1;
            match route {
                Route::Local(LocalRoute { pool, slot, .. }) => {
                    work.shares |= shares(&self.pools[usize::from(pool)].pool, slot);
                    let entries = entries_of(&self.pools[usize::from(pool)].pool, slot);
                    work.found.push((child.replica, entries));
                }
                Route::Remote { link } => {
                    let (replica, entries) = (child.replica, Vec::new());
                    work.links.push(ListedLink { link, replica, entries, page: None });
                }
                Route::Gone => {}
            }
        }
        let links: Vec<u32> = work.links.iter().map(|one| one.link).collect();
        let ticket = work.ticket;
        self.lists.push(work);
        for link in links {
            if !self.ask_list(ticket, link) {
                self.listed(ticket, link, None);
            }
        }
        self.finish_list(ticket);
    }

    fn ask_list(&mut self, ticket: u32, at: u32) -> bool {
        let Some(work) = self.lists.iter_mut().find(|work| work.ticket == ticket) else {
            return false;
        };
        let Some(one) = work.links.iter_mut().find(|one| one.link == at) else { return false };
        let first = u32::try_from(one.entries.len()).expect("at most 4096 slots");
        let memory = self.driver.memory();
        let Some(page) = memory.alloc(snapshot::PAGE) else { return false };
        let command = Submit::Vendor {
            opcode: snapshot::OPCODE_LIST,
            cdw10: first,
            cdw11: 0,
            data: VendorData::In(page.slice()),
        };
        let sent = self
            .links
            .get_mut(at)
            .and_then(|link| link.ready_session())
            .is_some_and(|s| s.submit(ADMIN_QUEUE, ticket, command, memory).is_ok());
        if !sent {
            memory.release(page);
            return false;
        }
        one.page = Some(page);
        self.touch_link(at);
        true
    }

    /// Whether a link's ticket is one of these.
    pub(super) fn is_list(ticket: u32) -> bool {
        ticket & LIST != 0 && ticket & !(LIST | 0x00ff_ffff) == 0
    }

    /// A link has answered a list, or cannot any more.
    pub(super) fn list_answered(&mut self, at: u32, ticket: u32, status: Option<Status>) {
        let Some(work) = self.lists.iter_mut().find(|work| work.ticket == ticket) else { return };
        let Some(one) = work.links.iter_mut().find(|one| one.link == at) else { return };
        let Some(page) = one.page.take() else { return };
        let memory = self.driver.memory();
        let told = snapshot::decode_list(memory.bytes(page.slice()));
        memory.release(page);
        let told = told.filter(|_| status.is_some_and(|s| s.is_success()));
        let more = match told {
            None => {
                self.listed(ticket, at, None);
                self.finish_list(ticket);
                return;
            }
            Some((total, shares, entries)) => {
                work.shares |= shares;
                let some = !entries.is_empty();
                one.entries.extend(entries);
                some && one.entries.len() < total.min(MAX_LISTED)
            }
        };
        if !more || !self.ask_list(ticket, at) {
            self.listed(ticket, at, Some(()));
            self.finish_list(ticket);
        }
    }

    fn listed(&mut self, ticket: u32, at: u32, all: Option<()>) {
        let Some(work) = self.lists.iter_mut().find(|work| work.ticket == ticket) else { return };
        let Some(i) = work.links.iter().position(|one| one.link == at) else { return };
        let one = work.links.swap_remove(i);
        if all.is_some() {
            work.found.push((one.replica, one.entries));
        }
    }

    fn finish_list(&mut self, ticket: u32) {
        let Some(i) = self.lists.iter().position(|work| work.ticket == ticket) else { return };
        if !self.lists[i].links.is_empty() {
            return;
        }
        let mut work = self.lists.swap_remove(i);
        let reply = match work.told.take() {
            Some(Listed::Caller(reply)) => reply,
            Some(Listed::Sanitize(number)) => {
                // Nobody to ask is nobody who says no.
                let all = work.asked > 0 && work.found.len() == work.asked;
                let shares = (work.shares || all).then_some(work.shares);
                return self.looked_for_shared(work.volume, number, shares);
            }
            None => return,
        };
        if work.found.is_empty() {
            let name = self.volumes.get(work.volume).map_or("", |v| &v.spec.name);
            reply.send(Err(EngineError::Busy(format!(
                "no replica of volume `{name}` can be asked now"
            ))));
            return;
        }
        let of_replicas = work.found.len();
        let volume = self.volumes.get(work.volume);
        let deleted = volume.map_or(&[][..], |v| v.nexus.deleted());
        let mut reports: Vec<SnapshotReport> = Vec::new();
        let found = work.found.into_iter();
        let found = found.flat_map(|(of, entries)| entries.into_iter().map(move |e| (of, e)));
        for (holder, entry) in found {
            // A replica that missed its deletion has it still; it is deleted there, too.
            if deleted.contains(&entry.id) {
                continue;
            }
            match reports.iter_mut().find(|r| r.id == entry.id) {
                Some(report) => {
                    report.holders.push(holder);
                    report.own_bytes = report.own_bytes.max(entry.own_bytes);
                    report.deleting |= entry.deleting;
                }
                None => reports.push(SnapshotReport {
                    id: entry.id,
                    name: entry.name,
                    created: entry.created,
                    blocks: entry.blocks,
                    own_bytes: entry.own_bytes,
                    deleting: entry.deleting,
                    holders: vec![holder],
                    of_replicas,
                }),
            }
        }
        reports.sort_by_key(|r| (r.created, r.id));
        reply.send(Ok(reports));
    }

    /// Snapshots whose replica is gone go too, as far as no clone needs them.
    pub(super) fn drop_orphans(&mut self, pool: u16) {
        let local = &self.pools[usize::from(pool)].pool;
        let there = |r: &ReplicaInfo| r.state != ReplicaState::Deleting;
        let known = |replica| local.replicas().any(|r| r.id == replica && there(&r));
        let orphans: Vec<SnapshotInfo> =
            local.snapshots().filter(|s| !s.deleting && !known(s.replica)).collect();
        for orphan in orphans {
            tracing::info!(snapshot = %orphan.id, replica = %orphan.replica, "deleting the snapshot of a replica that is gone");
            let tag = self.control_tag(pool, Waiter::Orphan);
            let local = &mut self.pools[usize::from(pool)].pool;
            local.delete_snapshot(tag, orphan.slot, self.driver.memory());
        }
    }
}

/// Whether a replica has blocks in common with others: it has snapshots, or is a clone.
fn shares(pool: &MultiPool, slot: ReplicaSlot) -> bool {
    let Some(replica) = pool.replicas().find(|r| r.slot == slot) else { return false };
    replica.source.is_some() || pool.snapshots().any(|s| s.replica == replica.id)
}

fn entries_of(pool: &MultiPool, slot: ReplicaSlot) -> Vec<SnapshotEntry> {
    let Some(replica) = pool.replicas().find(|r| r.slot == slot) else { return Vec::new() };
    let extent_bytes = u64::from(pool.usage().extent_bytes);
    pool.snapshots()
        .filter(|s| s.replica == replica.id && s.id.0 != 0)
        .map(|s| SnapshotEntry {
            id: s.id,
            name: s.name,
            created: s.created,
            own_bytes: s.own_extents * extent_bytes,
            blocks: s.blocks,
            deleting: s.deleting,
        })
        .collect()
}

pub(super) fn refusal(verb: SnapshotVerb, status: IoStatus) -> EngineError {
    let what = match verb {
        SnapshotVerb::Create => "the snapshot was not taken",
        SnapshotVerb::Delete => "the snapshot was not deleted",
        SnapshotVerb::Restore => "the volume was not restored",
        SnapshotVerb::Clone => "no clone was made",
    };
    match status {
        IoStatus::NoSpace => EngineError::Invalid(format!(
            "{what}: a replica's pool has no room for it; `cairn pool list` on its process tells more"
        )),
        IoStatus::InvalidField => EngineError::Invalid(format!(
            "{what}: a replica refused; the log of its process says why"
        )),
        IoStatus::NotReady => EngineError::Busy(format!(
            "{what}: the volume did not come to rest in time, or is being removed; try again"
        )),
        status => EngineError::Storage(format!("{what}: {status:?}")),
    }
}
