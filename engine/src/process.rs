//! The shards of a process as one: which of them has what, and who is asked.
//!
//! A pool is on one shard, and a volume on the shard of the pools that its local replicas are in. What is where is kept
//! here, on the side of those who ask; a shard knows only what is its own.

use std::net::SocketAddr;
use std::sync::Arc;

use cairn_block::ReplicaId;
use cairn_nexus::Purpose;
use cairn_reactor::Features;
use parking_lot::Mutex;

use crate::control::{
    ChildAddress, Command as AnyCommand, EngineError, IscsiExport, Reply, VolumeReplica,
    VolumeReport, VolumeSpec,
};
use crate::shard::{FRONT, Message, replica_nqn};
use crate::thread::{Command, Input, ShardHandle};

/// Talks to the shards of a running process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    router: Arc<Router>,
    features: Features,
}

impl EngineHandle {
    pub(crate) fn new(shards: Vec<ShardHandle>, features: Features) -> Self {
        let count = u16::try_from(shards.len()).expect("at most MAX_SHARDS");
        let way = move |shard: u16, input| shards[usize::from(shard)].send(input);
        Self { router: Arc::new(Router::new(count, Box::new(way))), features }
    }

    /// Hands a command over. Where a shard has stopped, its reply is dropped unanswered.
    pub fn send(&self, command: Command) {
        self.router.send(command);
    }

    /// Hands over the command that `make` builds around a reply, and waits for the answer.
    ///
    /// # Errors
    /// The command's own; [`EngineError::Stopped`] where a shard that is asked is gone.
    pub fn call<T: Send + 'static>(
        &self,
        make: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, EngineError> {
        let (tx, rx) = crossbeam::channel::bounded(1);
        self.send(make(Reply::new(move |result| {
            // The caller may have given up.
            let _delivered = tx.send(result);
        })));
        rx.recv().unwrap_or(Err(EngineError::Stopped))
    }

    /// Has the pool of this name, once it is added, be on a shard of the caller's choice.
    ///
    /// # Errors
    /// There is no such shard.
    pub fn place_pool(&self, pool: &str, shard: u16) -> Result<(), EngineError> {
        self.router.place_pool(pool, shard)
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> u16 {
        self.router.shards
    }

    /// What the shards use of the kernel.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }
}

/// The way to the shards, by number.
type Way = Box<dyn Fn(u16, Input) + Send + Sync>;

struct Router {
    shards: u16,
    way: Way,
    places: Mutex<Places>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").field("shards", &self.shards).finish_non_exhaustive()
    }
}

/// What is where, in the order in which it came.
#[derive(Debug, Default)]
struct Places {
    pools: Vec<(String, u16)>,
    volumes: Vec<PlacedVolume>,
    /// Where pools are to be that were not added yet.
    wishes: Vec<(String, u16)>,
    next_pool: u16,
    next_serial: u64,
    /// Where the process listens.
    addresses: Vec<SocketAddr>,
}

#[derive(Debug)]
struct PlacedVolume {
    /// Tells it from others that had its name before.
    serial: u64,
    name: String,
    nqn: String,
    shard: u16,
    /// The iSCSI target that it is a unit of.
    target: Option<String>,
    /// It has a replica in this process that it reaches over the network.
    over_network: bool,
}

impl PlacedVolume {
    fn is_of(&self, export: &IscsiExport) -> bool {
        self.target.as_ref().is_some_and(|target| target.eq_ignore_ascii_case(&export.iqn))
    }
}

impl Places {
    /// Whether a replica is named by where this process listens.
    fn is_own(&self, replica: &VolumeReplica) -> bool {
        match &replica.address {
            ChildAddress::Remote { peer, .. } => self.addresses.contains(peer),
            ChildAddress::Local { .. } => false,
        }
    }

    fn pool(&self, name: &str) -> Option<u16> {
        self.pools.iter().find(|(pool, _)| pool == name).map(|&(_, shard)| shard)
    }

    fn forget(&mut self, volume: u64) {
        self.volumes.retain(|placed| placed.serial != volume);
    }

    fn volume(&self, name: &str) -> Option<u16> {
        self.volumes.iter().find(|volume| volume.name == name).map(|volume| volume.shard)
    }

    /// The local children of a volume in pools that are known: whose they are.
    fn local<'a>(
        &'a self,
        children: &'a [VolumeReplica],
    ) -> impl Iterator<Item = (&'a str, u16)> + 'a {
        children.iter().filter_map(|child| match &child.address {
            ChildAddress::Local { pool } => self.pool(pool).map(|shard| (pool.as_str(), shard)),
            ChildAddress::Remote { .. } => None,
        })
    }

    /// The shard with the fewest volumes.
    fn idlest(&self, shards: u16) -> u16 {
        let load = |&shard: &u16| self.volumes.iter().filter(|v| v.shard == shard).count();
        (0..shards).min_by_key(load).unwrap_or(FRONT)
    }

    /// The shard for a volume. One that exists is served wherever its pools are: replicas in pools of other shards are
    /// reached over this process's own address then.
    fn place_volume(&self, spec: &mut VolumeSpec, shards: u16) -> Result<u16, EngineError> {
        let taken = |v: &PlacedVolume| v.name == spec.name || v.nqn == spec.nqn;
        if self.volumes.iter().any(taken) {
            return Err(EngineError::Exists { kind: "volume", name: spec.name.clone() });
        }
        let mut local: Vec<(&str, u16)> = self.local(&spec.children).collect();
        let count = |of: u16| local.iter().filter(|&&(_, shard)| shard == of).count();
        let best = (0..shards).rev().max_by_key(|&shard| count(shard));
        let Some(shard) = best.filter(|&shard| count(shard) > 0) else {
            let beside = spec.iscsi.as_ref().and_then(|export| self.shard_of_target(export));
            return Ok(beside.unwrap_or_else(|| self.idlest(shards)));
        };
        if count(shard) == local.len() {
            return Ok(shard);
        }
        if spec.purpose == Purpose::Create {
            local.dedup();
            let pools: Vec<String> =
                local.iter().map(|(pool, at)| format!("`{pool}` is on shard {at}")).collect();
            return Err(EngineError::Invalid(format!(
                "volume `{}` has replicas in pools of several shards: {}. {ADVICE}",
                spec.name,
                pools.join(", ")
            )));
        }
        let Some(&peer) = self.addresses.first() else { return Ok(shard) };
        for child in &mut spec.children {
            if let ChildAddress::Local { pool } = &child.address
                && let Some(other) = self.pool(pool).filter(|&other| other != shard)
            {
                tracing::warn!(
                    volume = %spec.name, %shard, replica = %child.id, %pool, pool_shard = other,
                    "the volume and a pool of its are on different shards: the replica is reached over {peer}, which is \
                     slower; give the volume's pools the same `shard`"
                );
                child.address = ChildAddress::Remote { peer, nqn: replica_nqn(child.id) };
            }
        }
        Ok(shard)
    }

    /// Whether a replica can become a member of a volume.
    fn check_member(&self, name: &str, replica: &VolumeReplica) -> Result<(), EngineError> {
        let ChildAddress::Local { pool } = &replica.address else { return Ok(()) };
        match (self.volume(name), self.pool(pool)) {
            (Some(volume), Some(shard)) if volume != shard => Err(EngineError::Invalid(format!(
                "volume `{name}` is on shard {volume}, and pool `{pool}` on shard {shard}. {ADVICE}"
            ))),
            _ => Ok(()),
        }
    }

    fn shard_of_target(&self, export: &IscsiExport) -> Option<u16> {
        self.volumes.iter().find(|v| v.is_of(export)).map(|v| v.shard)
    }

    /// Whether a volume on this shard can be a unit of a target.
    fn check_target(
        &self,
        name: &str,
        export: Option<&IscsiExport>,
        shard: u16,
    ) -> Result<(), EngineError> {
        let Some(export) = export else { return Ok(()) };
        let elsewhere = |v: &&PlacedVolume| v.name != name && v.is_of(export) && v.shard != shard;
        match self.volumes.iter().find(elsewhere) {
            None => Ok(()),
            Some(other) => Err(EngineError::Invalid(format!(
                "target {} has volume `{}`, which is on shard {}, and volume `{name}` is on shard {shard}; the volumes of \
                 one target are on one shard: give `{name}` a target of its own, or give the pools of their local \
                 replicas the same `shard` in the configuration file and restart",
                export.iqn, other.name, other.shard
            ))),
        }
    }

    /// A volume becomes a unit of a target, or of none: its shard, and the target that it was of before.
    fn place_target(
        &mut self,
        name: &str,
        export: Option<&IscsiExport>,
    ) -> Result<(u16, Option<String>), EngineError> {
        let shard = self.volume(name).unwrap_or(FRONT);
        self.check_target(name, export, shard)?;
        Ok((shard, self.set_target(name, export.map(|export| export.iqn.clone()))))
    }

    fn set_target(&mut self, name: &str, target: Option<String>) -> Option<String> {
        let volume = self.volumes.iter_mut().find(|volume| volume.name == name)?;
        std::mem::replace(&mut volume.target, target)
    }

    /// The shard that serves all of these volumes.
    fn shard_of_all(&self, names: &[String]) -> Result<u16, EngineError> {
        let known: Vec<(&String, u16)> =
            names.iter().filter_map(|name| Some((name, self.volume(name)?))).collect();
        let Some(&(_, shard)) = known.first() else { return Ok(FRONT) };
        if known.iter().all(|&(_, other)| other == shard) {
            return Ok(shard);
        }
        let told: Vec<String> =
            known.iter().map(|(name, shard)| format!("`{name}` is on shard {shard}")).collect();
        Err(EngineError::Invalid(format!(
            "a snapshot of several volumes at one instant is taken where one shard serves them all: {}. Take one of \
             each, or give the pools of their local replicas the same `shard` in the configuration file and restart",
            told.join(", ")
        )))
    }
}

/// What to do about replicas in pools of other shards.
const ADVICE: &str = "Give the pools the same `shard` in the configuration file and restart, or name the replica by \
                      its nvme+tcp:// URI (`cairn replica list` has it), which is slower";

impl Router {
    fn new(shards: u16, way: Way) -> Self {
        Self { shards, way, places: Mutex::default() }
    }

    fn to(&self, shard: u16, command: Command) {
        (self.way)(shard, Input::Command(command));
    }

    fn place_pool(&self, pool: &str, shard: u16) -> Result<(), EngineError> {
        if shard >= self.shards {
            return Err(EngineError::Invalid(format!(
                "pool `{pool}`: there is no shard {shard}; there are {}, the first is 0",
                self.shards
            )));
        }
        let mut places = self.places.lock();
        places.wishes.retain(|(other, _)| other != pool);
        places.wishes.push((pool.to_owned(), shard));
        Ok(())
    }

    fn send(self: &Arc<Self>, command: Command) {
        if self.shards == 1 {
            return self.to(FRONT, command);
        }
        match command {
            AnyCommand::AddListener { advertise, .. } => {
                self.places.lock().addresses.push(advertise);
                // Before any volume that they serve from now on.
                for shard in (0..self.shards).filter(|&shard| shard != FRONT) {
                    (self.way)(shard, Input::Message(Message::Listening(advertise)));
                }
                self.to(FRONT, command);
            }
            AnyCommand::AddIscsiListener { portal, .. } => {
                for shard in (0..self.shards).filter(|&shard| shard != FRONT) {
                    (self.way)(shard, Input::Message(Message::IscsiPortal(portal)));
                }
                self.to(FRONT, command);
            }
            AnyCommand::ExportIscsi { name, export, reply } => {
                let placed = self.places.lock().place_target(&name, export.as_ref());
                match placed {
                    Ok((shard, before)) => {
                        let router = Arc::clone(self);
                        let of = name.clone();
                        let reply = Reply::new(move |result: Result<(), EngineError>| {
                            if result.is_err() {
                                router.places.lock().set_target(&of, before);
                            }
                            reply.send(result);
                        });
                        self.to(shard, AnyCommand::ExportIscsi { name, export, reply });
                    }
                    Err(error) => reply.send(Err(error)),
                }
            }
            AnyCommand::AddPool { name, devices, pool, reply } => match self.enter_pool(&name) {
                Ok(shard) => {
                    let gone = name.clone();
                    let reply = self.or_forget(reply, move |places| {
                        places.pools.retain(|(pool, _)| *pool != gone);
                    });
                    self.to(shard, AnyCommand::AddPool { name, devices, pool, reply });
                }
                Err(error) => reply.send(Err(error)),
            },
            AnyCommand::AddVolume { mut spec, reply } => match self.enter_volume(&mut spec) {
                Ok((shard, serial)) => {
                    let reply = self.or_forget(reply, move |places| places.forget(serial));
                    self.to(shard, AnyCommand::AddVolume { spec, reply });
                }
                Err(error) => reply.send(Err(error)),
            },
            AnyCommand::RemoveVolume { name, reply } => self.remove_volume(name, reply),
            AnyCommand::AddReplica { name, replica, reply } => {
                let (checked, shard) = {
                    let mut places = self.places.lock();
                    let own = places.is_own(&replica);
                    if let Some(volume) = places.volumes.iter_mut().find(|v| v.name == name) {
                        volume.over_network |= own;
                    }
                    (places.check_member(&name, &replica), places.volume(&name))
                };
                match checked {
                    Ok(()) => self.to(
                        shard.unwrap_or(FRONT),
                        AnyCommand::AddReplica { name, replica, reply },
                    ),
                    Err(error) => reply.send(Err(error)),
                }
            }
            AnyCommand::Snapshot { volumes, verb, call, force, reply } => {
                let shard = self.places.lock().shard_of_all(&volumes);
                match shard {
                    Ok(shard) => {
                        self.to(shard, AnyCommand::Snapshot { volumes, verb, call, force, reply });
                    }
                    Err(error) => reply.send(Err(error)),
                }
            }
            AnyCommand::DeleteReplica { replica, reply } => self.delete_replica(replica, reply),
            AnyCommand::ListPools { reply } => {
                let router = Arc::clone(self);
                let reply =
                    Reply::new(move |told| reply.send(told.map(|pools| router.in_order(pools))));
                self.gather(self.with_pools(), |reply| AnyCommand::ListPools { reply }, reply);
            }
            AnyCommand::ListReplicas { reply } => {
                let list = |reply| AnyCommand::ListReplicas { reply };
                self.gather(self.with_pools(), list, reply);
            }
            AnyCommand::ListVolumes { reply } => self.list_volumes(reply),
            AnyCommand::Shutdown { reply } => self.shut_down(reply),
            command => {
                let shard = {
                    let places = self.places.lock();
                    match subject(&command) {
                        Some(Subject::Pool(name)) => places.pool(name),
                        Some(Subject::Volume(name)) => places.volume(name),
                        None => None,
                    }
                };
                // Any shard says that there is no such thing.
                self.to(shard.unwrap_or(FRONT), command);
            }
        }
    }

    fn enter_pool(&self, name: &str) -> Result<u16, EngineError> {
        let mut places = self.places.lock();
        if places.pool(name).is_some() {
            return Err(EngineError::Exists { kind: "pool", name: name.to_owned() });
        }
        let wish = places.wishes.iter().position(|(pool, _)| pool == name);
        let shard = match wish {
            Some(at) => places.wishes.remove(at).1,
            None => {
                let shard = places.next_pool;
                places.next_pool = (shard + 1) % self.shards;
                shard
            }
        };
        places.pools.push((name.to_owned(), shard));
        Ok(shard)
    }

    fn enter_volume(&self, spec: &mut VolumeSpec) -> Result<(u16, u64), EngineError> {
        let mut places = self.places.lock();
        let shard = places.place_volume(spec, self.shards)?;
        places.check_target(&spec.name, spec.iscsi.as_deref(), shard)?;
        let over_network = spec.children.iter().any(|child| places.is_own(child));
        let (name, nqn) = (spec.name.clone(), spec.nqn.clone());
        places.next_serial += 1;
        let serial = places.next_serial;
        let target = spec.iscsi.as_ref().map(|export| export.iqn.clone());
        places.volumes.push(PlacedVolume { serial, name, nqn, shard, target, over_network });
        Ok((shard, serial))
    }

    /// Passes an answer on; what was to be added is nowhere where that failed.
    fn or_forget(
        self: &Arc<Self>,
        reply: Reply<()>,
        forget: impl FnOnce(&mut Places) + Send + 'static,
    ) -> Reply<()> {
        let router = Arc::clone(self);
        Reply::new(move |result: Result<(), EngineError>| {
            if result.is_err() {
                forget(&mut router.places.lock());
            }
            reply.send(result);
        })
    }

    fn remove_volume(self: &Arc<Self>, name: String, reply: Reply<()>) {
        let placed = |places: &Places| {
            let of = places.volumes.iter().find(|volume| volume.name == name)?;
            Some((of.shard, of.serial))
        };
        // By the time of the answer there may be another of that name.
        let (shard, gone) = placed(&self.places.lock()).unwrap_or((FRONT, 0));
        let router = Arc::clone(self);
        let reply = Reply::new(move |result| {
            if matches!(result, Ok(()) | Err(EngineError::NotFound { .. })) {
                router.places.lock().forget(gone);
            }
            reply.send(result);
        });
        self.to(shard, AnyCommand::RemoveVolume { name, reply });
    }

    /// Deletes a replica, wherever it is. The shard that has it knows of its own volumes alone.
    fn delete_replica(self: &Arc<Self>, replica: ReplicaId, reply: Reply<()>) {
        let router = Arc::clone(self);
        self.list_volumes(Reply::new(move |volumes: Result<Vec<VolumeReport>, _>| {
            let used = volumes.map(|volumes| {
                let used = volumes.into_iter().find(|v| {
                    v.children.iter().any(|child| {
                        child.replica == replica
                            && matches!(child.address, ChildAddress::Remote { .. })
                    })
                });
                used.map(|volume| volume.name)
            });
            match used {
                Ok(None) => router.delete_from(FRONT, replica, reply),
                Ok(Some(name)) => reply.send(Err(in_use(replica, &name))),
                Err(error) => reply.send(Err(error)),
            }
        }));
    }

    /// Asks one shard after the other, until one has it.
    fn delete_from(self: &Arc<Self>, shard: u16, replica: ReplicaId, reply: Reply<()>) {
        let router = Arc::clone(self);
        let reply = Reply::new(move |result| match result {
            Err(EngineError::NotFound { .. }) if shard + 1 < router.shards => {
                router.delete_from(shard + 1, replica, reply);
            }
            result => reply.send(result),
        });
        self.to(shard, AnyCommand::DeleteReplica { replica, reply });
    }

    fn list_volumes(self: &Arc<Self>, reply: Reply<Vec<VolumeReport>>) {
        let router = Arc::clone(self);
        let reply = Reply::new(move |told: Result<Vec<VolumeReport>, _>| {
            reply.send(told.map(|mut volumes| {
                let places = router.places.lock();
                let place = |volume: &VolumeReport| {
                    places.volumes.iter().position(|placed| placed.name == volume.name)
                };
                volumes.sort_by_key(|volume| place(volume).unwrap_or(usize::MAX));
                volumes
            }));
        });
        let volumes = |places: &Places| places.volumes.iter().map(|volume| volume.shard).collect();
        let shards = self.holders(volumes);
        self.gather(shards, |reply| AnyCommand::ListVolumes { reply }, reply);
    }

    fn in_order(&self, mut pools: Vec<crate::PoolReport>) -> Vec<crate::PoolReport> {
        let places = self.places.lock();
        let place = |name: &str| places.pools.iter().position(|(pool, _)| pool == name);
        pools.sort_by_key(|pool| place(&pool.name).unwrap_or(usize::MAX));
        pools
    }

    fn with_pools(&self) -> Vec<u16> {
        self.holders(|places| places.pools.iter().map(|&(_, shard)| shard).collect())
    }

    /// The shards that have something to tell, and the first: it says whether they are still there. One without
    /// anything sleeps on.
    fn holders(&self, of: fn(&Places) -> Vec<u16>) -> Vec<u16> {
        let mut shards = of(&self.places.lock());
        shards.push(FRONT);
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    /// Asks one shard after the other and puts what they tell together.
    fn gather<T: Send + 'static>(
        self: &Arc<Self>,
        shards: Vec<u16>,
        make: fn(Reply<Vec<T>>) -> Command,
        reply: Reply<Vec<T>>,
    ) {
        self.gather_from(shards.into_iter(), Vec::new(), make, reply);
    }

    fn gather_from<T: Send + 'static>(
        self: &Arc<Self>,
        mut left: std::vec::IntoIter<u16>,
        mut told: Vec<T>,
        make: fn(Reply<Vec<T>>) -> Command,
        reply: Reply<Vec<T>>,
    ) {
        let Some(shard) = left.next() else { return reply.send(Ok(told)) };
        let router = Arc::clone(self);
        let next = Reply::new(move |result: Result<Vec<T>, EngineError>| match result {
            Ok(more) => {
                told.extend(more);
                router.gather_from(left, told, make, reply);
            }
            Err(error) => reply.send(Err(error)),
        });
        self.to(shard, make(next));
    }

    /// Stops all shards; first those with volumes that reach replicas of other shards over the network, which would
    /// lose these in the middle of their requests. Answered once all have stopped.
    fn shut_down(self: &Arc<Self>, reply: Reply<()>) {
        let mut first = {
            let places = self.places.lock();
            let over = places.volumes.iter().filter(|volume| volume.over_network);
            over.map(|volume| volume.shard).collect::<Vec<u16>>()
        };
        first.sort_unstable();
        first.dedup();
        let rest: Vec<u16> = (0..self.shards).filter(|shard| !first.contains(shard)).collect();
        if first.is_empty() || rest.is_empty() {
            return self.stop_shards(&[first, rest].concat(), reply);
        }
        let router = Arc::clone(self);
        let then = Reply::new(move |result: Result<(), EngineError>| {
            let last = Reply::new(move |stopped: Result<(), EngineError>| {
                reply.send(result.and(stopped));
            });
            router.stop_shards(&rest, last);
        });
        self.stop_shards(&first, then);
    }

    /// Stops these at once. Answered once all of them have stopped.
    fn stop_shards(&self, shards: &[u16], reply: Reply<()>) {
        let last = Arc::new(Mutex::new((shards.len(), Some(reply), Ok(()))));
        for &shard in shards {
            let last = Arc::clone(&last);
            let reply = Reply::new(move |result: Result<(), EngineError>| {
                let mut last = last.lock();
                last.0 -= 1;
                if result.is_err() {
                    last.2 = result;
                }
                if last.0 == 0 {
                    let outcome = last.2.clone();
                    let reply = last.1.take();
                    drop(last);
                    reply.into_iter().for_each(|reply| reply.send(outcome.clone()));
                }
            });
            self.to(shard, AnyCommand::Shutdown { reply });
        }
    }
}

/// What a command that is one shard's is about.
enum Subject<'a> {
    Pool(&'a str),
    Volume(&'a str),
}

fn subject(command: &Command) -> Option<Subject<'_>> {
    Some(match command {
        AnyCommand::AddDevice { pool, .. }
        | AnyCommand::RemoveDevice { pool, .. }
        | AnyCommand::GrowPool { pool, .. }
        | AnyCommand::CreateReplica { pool, .. }
        | AnyCommand::AddPool { name: pool, .. } => Subject::Pool(pool),
        AnyCommand::ListSnapshots { volume: name, .. }
        | AnyCommand::RemoveVolume { name, .. }
        | AnyCommand::ResizeVolume { name, .. }
        | AnyCommand::AddReplica { name, .. }
        | AnyCommand::RemoveReplica { name, .. }
        | AnyCommand::RotateKey { name, .. }
        | AnyCommand::ShareVolume { name, .. }
        | AnyCommand::StandBy { name, .. }
        | AnyCommand::TakeOver { name, .. }
        | AnyCommand::ScrubVolume { name, .. }
        | AnyCommand::ExportIscsi { name, .. }
        | AnyCommand::RebuildRate { name, .. } => Subject::Volume(name),
        AnyCommand::AddVolume { spec, .. } => Subject::Volume(&spec.name),
        AnyCommand::AddListener { .. }
        | AnyCommand::AddIscsiListener { .. }
        | AnyCommand::DeleteReplica { .. }
        | AnyCommand::ListPools { .. }
        | AnyCommand::ListReplicas { .. }
        | AnyCommand::ListVolumes { .. }
        | AnyCommand::Snapshot { .. }
        | AnyCommand::Shutdown { .. } => return None,
    })
}

/// A replica that is to be deleted is a member of a volume.
pub(crate) fn in_use(replica: ReplicaId, name: &str) -> EngineError {
    EngineError::Busy(format!(
        "replica {replica} belongs to volume `{name}`, which is served here; make it no member first: cairn volume \
         remove-replica {name} {replica}, or delete the volume"
    ))
}

#[cfg(test)]
mod tests;
