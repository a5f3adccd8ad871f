//! Replicas that become voters of a volume which is served, and that are none any more.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use cairn_block::{Epoch, ReplicaId};
use cairn_nexus::{ChangeError, ChildId, ChildSpec, ChildState, PLACE, Place, VolumeState};
use cairn_reactor::Driver;

use super::Shard;
use super::links::Link;
use super::volumes::{LocalRoute, PendingChange, Route};
use crate::control::{ChildAddress, EngineError, Reply, VolumeReplica};

impl<D: Driver> Shard<D> {
    /// Adds a replica to a volume. Answered once it is a member; it gets its data after that.
    pub(super) fn add_replica(
        &mut self,
        name: String,
        replica: VolumeReplica,
        reply: Reply<()>,
        now: u64,
    ) {
        let Some(at) = self.find_volume(&name) else {
            return reply.send(Err(EngineError::NotFound { kind: "volume", name }));
        };
        if self.volumes[at].change.is_some() || self.volumes[at].removing() {
            return reply.send(Err(EngineError::Busy(ChangeError::Busy.to_string())));
        }
        if let Err(error) = self.check_child(&replica, &self.volumes[at].spec) {
            return reply.send(Err(error));
        }
        // One that is there and does not vote is taken up anew: it may be somewhere else now.
        if let Some(child) = self.child_of(at, replica.id)
            && !self.drop_child(at, child, now)
        {
            let error = ChangeError::Member(replica.id).to_string();
            return reply.send(Err(EngineError::Invalid(error)));
        }
        let Some(child) = self.start_child(at, replica, now) else {
            return reply.send(Err(EngineError::Invalid(ChangeError::TooMany.to_string())));
        };
        let volume = &mut self.volumes[at];
        if matches!(volume.nexus.state(), VolumeState::Assembling(_)) {
            // It is a member already, or the configuration that is found says that it is none.
            reply.send(Ok(()));
        } else {
            match volume.nexus.add_voter(child, now) {
                Ok(()) => volume.change = Some(PendingChange::Member(reply)),
                Err(error) => {
                    self.drop_child(at, child, now);
                    reply.send(Err(EngineError::Busy(error.to_string())));
                }
            }
        }
        self.touch_volume(at);
    }

    /// Makes a replica no member of its volume any more. Answered once that is stored.
    pub(super) fn remove_replica(
        &mut self,
        name: String,
        replica: ReplicaId,
        reply: Reply<()>,
        now: u64,
    ) {
        let Some(at) = self.find_volume(&name) else {
            return reply.send(Err(EngineError::NotFound { kind: "volume", name }));
        };
        let Some(child) = self.child_of(at, replica) else {
            let error = ChangeError::NotMember(replica).to_string();
            return reply.send(Err(EngineError::Invalid(error)));
        };
        let volume = &mut self.volumes[at];
        if volume.change.is_some() || volume.removing() {
            return reply.send(Err(EngineError::Busy(ChangeError::Busy.to_string())));
        }
        match volume.nexus.remove_voter(child, now) {
            Ok(()) => volume.change = Some(PendingChange::Member(reply)),
            // One that does not vote only has to be let go of.
            Err(ChangeError::NotMember(_)) => {
                self.drop_child(at, child, now);
                reply.send(Ok(()));
            }
            Err(error) => reply.send(Err(EngineError::Busy(error.to_string()))),
        }
        self.touch_volume(at);
    }

    /// The child of a volume that is this replica.
    fn child_of(&self, at: u32, replica: ReplicaId) -> Option<ChildId> {
        let volume = &self.volumes[at];
        let status = volume.nexus.status();
        let found = (0u8..).zip(&status.children);
        let mut there = found.filter(|(_, c)| c.state != ChildState::Removed);
        there.find(|(_, c)| c.replica == replica).map(|(child, _)| ChildId(child))
    }

    /// Has the nexus know one more replica, and opens the way to it.
    fn start_child(&mut self, at: u32, replica: VolumeReplica, now: u64) -> Option<ChildId> {
        let local = matches!(replica.address, ChildAddress::Local { .. });
        let place = self.place_of(&replica);
        let spec = ChildSpec { replica: replica.id, local, witness: replica.witness, place };
        let child = self.volumes[at].nexus.add_child(spec)?;
        // One that was there before may still be connecting; how that ends is nothing to this one.
        self.detach_child_links(at, child);
        let place = usize::from(child.0);
        let volume = &mut self.volumes[at];
        if place == volume.routes.len() {
            volume.routes.push(Route::Gone);
            volume.spec.children.push(replica);
        } else {
            volume.routes[place] = Route::Gone;
            volume.spec.children[place] = replica;
        }
        self.route_child(at, child, now);
        Some(child)
    }

    /// Where a replica is, as others are told.
    pub(super) fn place_of(&self, replica: &VolumeReplica) -> Place {
        let peer = match &replica.address {
            ChildAddress::Local { .. } => self.addresses.first().copied(),
            // The subsystem's name is not told besides.
            ChildAddress::Remote { peer, nqn } => {
                (*nqn == Self::replica_nqn(replica.id)).then_some(*peer)
            }
        };
        peer.map_or(Place::default(), place_at)
    }

    /// The configuration says where a member is that is not known here, or that is known somewhere else and does
    /// not come up.
    pub(super) fn learn_place(
        &mut self,
        at: u32,
        (id, witness): (ReplicaId, bool),
        place: Place,
        now: u64,
    ) {
        let volume = &self.volumes[at];
        if volume.removing() || volume.hand_over.is_some() {
            return;
        }
        let Some(peer) = peer_at(place) else { return };
        if let Some(child) = self.child_of(at, id) {
            if let Route::Remote { link } = self.volumes[at].routes[usize::from(child.0)] {
                self.links[link].try_also(peer);
            }
            return;
        }
        let own =
            self.find_replica(id).map(|(pool, ..)| self.pools[usize::from(pool)].name.clone());
        let address = match own {
            Some(pool) => ChildAddress::Local { pool },
            None => ChildAddress::Remote { peer, nqn: Self::replica_nqn(id) },
        };
        let name = &self.volumes[at].spec.name;
        tracing::info!(volume = %name, replica = %id, ?address, "the volume has one more replica");
        if self.start_child(at, VolumeReplica { id, address, witness }, now).is_none() {
            let name = &self.volumes[at].spec.name;
            tracing::warn!(volume = %name, replica = %id, "there is no room for one more replica");
        }
        self.touch_volume(at);
    }

    /// The way to a child leads to another place than before.
    pub(super) fn child_moved(&mut self, at: u32, child: ChildId, peer: SocketAddr) {
        let Some(volume) = self.volumes.get_mut(at) else { return };
        let place = usize::from(child.0);
        let Some(replica) = volume.spec.children.get_mut(place) else { return };
        if let ChildAddress::Remote { peer: known, .. } = &mut replica.address
            && *known != peer
        {
            tracing::info!(volume = %volume.spec.name, replica = %replica.id, %peer, "the replica is elsewhere now");
            *known = peer;
            let replica = replica.clone();
            let place = self.place_of(&replica);
            self.volumes[at].nexus.set_place(child, place);
        }
    }

    /// Opens the way to a child, as the volume's spec has it.
    pub(super) fn route_child(&mut self, at: u32, child: ChildId, now: u64) {
        let place = usize::from(child.0);
        let VolumeReplica { id, address, .. } = self.volumes[at].spec.children[place].clone();
        match address {
            ChildAddress::Local { .. } => {
                let Some((pool, slot, _)) = self.find_replica(id) else { return };
                self.volumes[at].routes[place] = Route::Local(LocalRoute {
                    pool,
                    slot,
                    epoch: Epoch::default(),
                    fenced: true,
                    leaving: false,
                    in_flight: 0,
                });
                self.volumes[at].nexus.handle_child_up(child, now);
            }
            ChildAddress::Remote { peer, nqn } => {
                let link = self.links.insert(Link::new(at, child, id, peer, nqn, now));
                self.wants_timeout(Some(now));
                self.volumes[at].routes[place] = Route::Remote { link };
            }
        }
    }

    /// Lets go of a child that does not vote; false where it does.
    pub(super) fn drop_child(&mut self, at: u32, child: ChildId, now: u64) -> bool {
        let volume = &mut self.volumes[at];
        if !volume.nexus.forget_child(child) {
            return false;
        }
        match &mut volume.routes[usize::from(child.0)] {
            Route::Local(local) => {
                (local.fenced, local.leaving) = (true, true);
                if local.in_flight == 0 {
                    volume.routes[usize::from(child.0)] = Route::Gone;
                }
                volume.nexus.handle_child_down(child, now);
            }
            Route::Remote { link } => {
                let link = *link;
                volume.routes[usize::from(child.0)] = Route::Gone;
                self.retire_link(link);
            }
            Route::Gone => {}
        }
        self.touch_volume(at);
        true
    }

    /// A replica is a member now.
    pub(super) fn voter_added(&mut self, at: u32, child: ChildId) {
        let volume = &mut self.volumes[at];
        let VolumeReplica { id, witness, .. } = &volume.spec.children[usize::from(child.0)];
        tracing::info!(volume = %volume.spec.name, replica = %id, witness, "replica added");
        volume.member_changed(Ok(()));
    }

    /// A replica is a member no more: its session ends.
    pub(super) fn voter_removed(&mut self, at: u32, child: ChildId, now: u64) {
        let volume = &mut self.volumes[at];
        let replica = volume.spec.children[usize::from(child.0)].id;
        tracing::info!(volume = %volume.spec.name, %replica, "replica removed");
        volume.member_changed(Ok(()));
        self.drop_child(at, child, now);
    }

    /// The members stay as they were.
    pub(super) fn voters_unchanged(&mut self, at: u32, child: ChildId, why: &str, now: u64) {
        let volume = &self.volumes[at];
        let replica = volume.spec.children[usize::from(child.0)].id;
        let why = match volume.routes[usize::from(child.0)] {
            Route::Remote { link } => match self.link_report(link).1 {
                error if error.is_empty() => why.to_owned(),
                error => format!("{why} ({error})"),
            },
            Route::Local(_) | Route::Gone => why.to_owned(),
        };
        let volume = &mut self.volumes[at];
        tracing::warn!(volume = %volume.spec.name, %replica, why, "the members stay as they were");
        let text = format!("replica {replica}: {why}; the volume's members stay as they were");
        volume.member_changed(Err(EngineError::Storage(text)));
        // One that was to be added is let go of; one that was to be removed votes, and stays.
        self.drop_child(at, child, now);
    }
}

/// An address as configurations have it: as of IPv6, then the port, both with the highest byte first.
fn place_at(peer: SocketAddr) -> Place {
    let ip = match peer.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut bytes = [0; PLACE];
    bytes[..16].copy_from_slice(&ip.octets());
    bytes[16..].copy_from_slice(&peer.port().to_be_bytes());
    Place(bytes)
}

fn peer_at(place: Place) -> Option<SocketAddr> {
    let (ip, port) = place.0.split_first_chunk::<16>()?;
    let port = u16::from_be_bytes(port.try_into().ok()?);
    let ip = IpAddr::V6(Ipv6Addr::from(*ip)).to_canonical();
    (port != 0 && !ip.is_unspecified()).then_some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_the_address_that_it_was_made_of() {
        for text in ["192.0.2.11:4420", "[2001:db8::1]:65535", "127.0.0.1:1"] {
            let peer = text.parse().unwrap();
            assert_eq!(peer_at(place_at(peer)), Some(peer), "{text}");
        }
        assert_eq!(peer_at(Place::default()), None);
        assert_eq!(peer_at(place_at("0.0.0.0:4420".parse().unwrap())), None);
    }
}
