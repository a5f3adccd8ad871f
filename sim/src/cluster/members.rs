//! Replicas that become members of a volume and that are none any more: what an operator, or whoever looks
//! after the cluster, asks for. Nothing here waits: an answer comes while the cluster runs.

use std::sync::mpsc::{self, Receiver};

use cairn_block::{BlockSize, ReplicaId, VolumeId};
use cairn_engine::replica::ReplicaSpec;
use cairn_engine::{
    ChildAddress, ChildReport, Command, EngineError, Reply, VolumeReplica, VolumeReport,
};

use super::{Answer, Cluster, ClusterConfig, Process, SimCommand, address, pool_name, replica_id};
use crate::world::NodeId;

/// A replica of a volume: which, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// Which.
    pub id: ReplicaId,
    /// In which pool.
    pub pool: usize,
    /// Whether it is to be a witness.
    pub witness: bool,
}

/// How often a pool may have another replica of the same volume, in the bits of its id above the pool's.
const AGAIN: u32 = 32;

/// The pool of a replica.
pub(super) fn pool_of(id: ReplicaId) -> usize {
    usize::try_from((id.0 & ((1 << AGAIN) - 1)) - 1).expect("few pools")
}

/// Those that a volume has at first.
pub(super) fn first_seats(config: &ClusterConfig, volume: usize) -> Vec<Seat> {
    let data = (0..config.replicas).map(|pool| (pool, false));
    let witness = config.witness.map(|_| (config.replicas, true));
    let seat = |(pool, witness)| Seat { id: replica_id(volume, pool), pool, witness };
    data.chain(witness).map(seat).collect()
}

/// Whether a child is a member, or may be: all that the nexus knows while it does not serve.
#[must_use]
pub(crate) fn is_member(child: &ChildReport) -> bool {
    child.state != "idle"
}

/// Whether it has all that it is to have.
#[must_use]
pub(crate) fn is_whole(child: &ChildReport) -> bool {
    child.in_sync || (child.witness && child.state == "witness")
}

impl Cluster {
    /// The pool of a replica.
    #[must_use]
    pub fn pool_of(&self, id: ReplicaId) -> usize {
        pool_of(id)
    }

    /// The replicas that a volume was made with.
    #[must_use]
    pub fn first_seats(&self, volume: usize) -> Vec<Seat> {
        first_seats(&self.config, volume)
    }

    /// A replica of a volume that is to be made in a pool.
    pub fn new_seat(&mut self, volume: usize, pool: usize, witness: bool) -> Seat {
        let again = self.seats[volume].iter().filter(|seat| seat.pool == pool).count();
        let id = ReplicaId(replica_id(volume, pool).0 | (again as u128) << AGAIN);
        let seat = Seat { id, pool, witness };
        self.seats[volume].push(seat);
        seat
    }

    /// All replicas of a volume that ever were to be made.
    #[must_use]
    pub fn seats(&self, volume: usize) -> &[Seat] {
        &self.seats[volume]
    }

    pub(super) fn replica_spec(&self, volume: usize, seat: Seat) -> ReplicaSpec {
        ReplicaSpec {
            id: seat.id,
            volume: VolumeId(volume as u128 + 1),
            name: format!("volume{volume}"),
            blocks: if seat.witness { 1 } else { self.config.blocks },
            block_size: BlockSize::B4096,
            thick: false,
            source: None,
        }
    }

    /// A replica, as a machine that serves volumes is told of it.
    pub(super) fn place_of(&self, which: usize, seat: Seat) -> VolumeReplica {
        let id = seat.id;
        let local = self.home(seat.pool) == Some(which) && !self.config.pools_in_front;
        let place = if local {
            ChildAddress::Local { pool: pool_name(seat.pool) }
        } else {
            ChildAddress::Remote {
                peer: address(self.machine_of(seat.pool)),
                nqn: format!("nqn.2026-11.io.cairn:replica:{id}"),
            }
        };
        VolumeReplica { id, address: place, witness: seat.witness }
    }

    /// Asks a process, where it runs, and does not wait.
    pub(super) fn ask<T: Send + 'static>(
        &mut self,
        node: Option<NodeId>,
        make: impl FnOnce(Reply<T>) -> SimCommand,
    ) -> Option<Receiver<Result<T, EngineError>>> {
        let node = node.filter(|node| !self.world().is_paused(*node))?;
        let Process::Shard(shard) = &mut self.processes[node.0] else { return None };
        let (tx, rx) = mpsc::channel();
        let reply = Reply::new(move |result| {
            // Nobody may look.
            let _told = tx.send(result);
        });
        shard.command(make(reply));
        self.run(node);
        Some(rx)
    }

    /// Has a replica made in its pool; nothing where that does not run.
    pub fn make_replica(&mut self, volume: usize, seat: Seat) -> Option<Answer> {
        let node = self.node_of(seat.pool);
        let spec = self.replica_spec(volume, seat);
        let (tx, rx) = mpsc::channel();
        self.ask::<cairn_engine::ReplicaReport>(node, |_| Command::CreateReplica {
            pool: pool_name(seat.pool),
            spec,
            reply: Reply::new(move |result| {
                // It may be there: an answer may have been lost with the process before.
                let result = match result {
                    Ok(_) => Ok(()),
                    Err(error) if error.to_string().contains("exists already") => Ok(()),
                    Err(error) => Err(error),
                };
                // Nobody may look.
                let _told = tx.send(result);
            }),
        })?;
        Some(rx)
    }

    /// Has a replica deleted that is no member any more; nothing where its pool does not run.
    pub fn delete_replica(&mut self, volume: usize, id: ReplicaId) -> Option<Answer> {
        self.taken.retain(|(_, _, of, _)| *of != id);
        self.named.iter_mut().for_each(|all| all[volume].retain(|seat| seat.id != id));
        let node = self.node_of(pool_of(id));
        self.ask(node, |reply| Command::DeleteReplica { replica: id, reply })
    }

    /// Asks a machine that serves a volume to make a replica a member of it.
    pub fn add_member(&mut self, which: usize, volume: usize, seat: Seat) -> Option<Answer> {
        let named = &mut self.named[which][volume];
        named.retain(|other| other.id != seat.id);
        named.push(seat);
        let replica = self.place_of(which, seat);
        let name = format!("volume{volume}");
        let id = seat.id;
        self.world().say(format_args!("nexus {which}: add replica {id} to volume {volume}"));
        self.ask(self.nexuses[which], |reply| Command::AddReplica { name, replica, reply })
    }

    /// Asks a machine that serves a volume to have a replica be no member of it any more.
    pub fn remove_member(&mut self, which: usize, volume: usize, id: ReplicaId) -> Option<Answer> {
        let name = format!("volume{volume}");
        self.world().say(format_args!("nexus {which}: remove replica {id} of volume {volume}"));
        self.ask(self.nexuses[which], |reply| Command::RemoveReplica { name, replica: id, reply })
    }

    /// What a machine that serves volumes says of one; nothing where it does not know it, or is stopped.
    pub fn report_of(&mut self, which: usize, volume: usize) -> Option<VolumeReport> {
        let node = self.nexuses[which];
        let answer = self.ask(node, |reply| Command::ListVolumes { reply })?;
        let reports = answer.try_recv().ok()?.ok()?;
        reports.into_iter().find(|report| report.id == VolumeId(volume as u128 + 1))
    }

    /// A nexus that serves knows all members: what it does not know is named to its machine no more.
    pub fn forget_strangers(&mut self, which: usize, volume: usize, report: &VolumeReport) {
        if report.serving {
            let known = |seat: &Seat| report.children.iter().any(|c| c.replica == seat.id);
            self.named[which][volume].retain(known);
        }
    }

    /// Whether a pool can be had, or will be again.
    #[must_use]
    pub fn is_gone(&self, at: usize) -> bool {
        self.gone.contains(&at)
    }

    /// Whether any pool is gone.
    #[must_use]
    pub fn any_is_gone(&self) -> bool {
        !self.gone.is_empty()
    }

    /// A machine with a pool goes away, and is not started before [`Cluster::come_back`].
    pub fn take_away(&mut self, at: usize) {
        self.world().say(format_args!("pool {at} is gone"));
        match self.home(at) {
            Some(which) => self.kill_process(which),
            None => self.kill_replica(at),
        }
        self.gone.insert(at);
        let machine = self.machine_of(at);
        self.lives[machine.0] += 1;
    }

    /// A pool that went away can be had again, as it was.
    pub fn come_back(&mut self, at: usize) {
        self.gone.remove(&at);
    }
}
