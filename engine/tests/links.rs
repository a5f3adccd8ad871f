//! Whole engines on io_uring in one process, over loopback, with the links between them cut and
//! mended by the test.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use cairn_engine::block::{IoStatus, Memory as _, ReplicaId};
use cairn_engine::control::{Command, ScrubAction, Sharing};
use cairn_engine::nexus::{Purpose, ScrubReport, change};
use cairn_engine::nvmf::initiator::{Submit, VendorData};
use cairn_engine::register;
use cairn_engine::upkeep::{self, SettleCall};
use cairn_engine::{ChildAddress, EngineError, VolumeReplica, VolumeReport, VolumeSpec};
use common::cable::Cable;
use common::{BLOCKS, Client, Engine, HOST, replica_nqn};

/// A process in miniature, with a pool `p` in most tests and one volume `v` at most.
struct Node(Engine);

impl std::ops::Deref for Node {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.0
    }
}

impl Node {
    fn start() -> Self {
        Self(Engine::start(1))
    }

    /// With an empty replica of this id.
    fn with_replica(id: u128) -> Self {
        let node = Self::start();
        node.add_pool("p");
        node.add_replica("p", id, 99);
        node
    }

    fn listens(&self) -> SocketAddr {
        self.address
    }

    fn add_volume(&self, purpose: Purpose, children: Vec<(ReplicaId, ChildAddress)>) {
        self.add_shared(purpose, children, None);
    }

    fn add_shared(
        &self,
        purpose: Purpose,
        children: Vec<(ReplicaId, ChildAddress)>,
        sharing: Option<Sharing>,
    ) {
        let spec = VolumeSpec { purpose, sharing, ..Engine::spec("v", 99, children) };
        self.call(|reply| Command::AddVolume { spec, reply }).unwrap();
    }

    fn remove_volume(&self) {
        self.0.remove_volume("v");
    }

    fn volume(&self) -> VolumeReport {
        self.volumes().remove(0)
    }

    /// Waits until the volume looks as it should.
    fn wait(&self, wanted: impl Fn(&VolumeReport) -> bool) -> VolumeReport {
        self.0.wait("v", wanted)
    }
}

fn remote(id: u128, peer: SocketAddr) -> (ReplicaId, ChildAddress) {
    (ReplicaId(id), ChildAddress::Remote { peer, nqn: replica_nqn(id) })
}

/// A volume is assembled from two replicas while the third is away, so the third has not promised
/// the new epoch. When it came back, it answered the nexus that took the epoch up there as if a
/// newer nexus had been before it; the nexus believed it was fenced and served nothing any more.
#[test]
fn a_replica_that_missed_the_promise_does_not_fence_the_volume() {
    let replicas: Vec<Node> = (1..=3).map(Node::with_replica).collect();
    let cables: Vec<Cable> = replicas.iter().map(|r| Cable::to(r.listens())).collect();
    let children: Vec<_> =
        (1..=3).zip(&cables).map(|(id, cable)| remote(id, cable.address)).collect();
    let nexus = Node::start();
    nexus.add_volume(Purpose::Create, children.clone());
    nexus.wait(|v| v.serving);
    nexus.remove_volume();

    cables[2].plug(false);
    nexus.add_volume(Purpose::Assemble, children);
    let volume = nexus.wait(|v| v.serving);
    assert!(!volume.children[2].in_sync);

    cables[2].plug(true);
    nexus.wait(|v| !v.children[2].reason.contains(';') || !v.serving);
    thread::sleep(Duration::from_millis(200));
    let volume = nexus.volume();
    assert!(volume.serving, "{volume:#?}");
}

/// An address that takes a connection and never answers it: its queue is full.
fn black_hole() -> (Vec<TcpStream>, std::os::fd::OwnedFd, SocketAddr) {
    use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrIn};
    use std::os::fd::AsRawFd as _;
    let family = AddressFamily::Inet;
    let fd = socket::socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
    socket::bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    socket::listen(&fd, Backlog::new(0).unwrap()).unwrap();
    let bound: SockaddrIn = socket::getsockname(fd.as_raw_fd()).unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, bound.port()));
    let mut held = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        held.push(stream);
    }
    (held, fd, address)
}

/// A volume is removed while the connection to its replica is still being tried, and another volume
/// gets its number. When the connect gave up at last, it told the other volume that its replica was
/// gone; a local replica is never connected again, so that volume stood still from then on.
#[test]
fn the_link_of_a_removed_volume_does_not_touch_the_next_one() {
    let (_held, _fd, nowhere) = black_hole();
    let engine = Node::with_replica(1);
    engine.add_volume(Purpose::Assemble, vec![remote(2, nowhere)]);
    thread::sleep(Duration::from_millis(200));
    engine.remove_volume();
    let local = ChildAddress::Local { pool: "p".to_owned() };
    engine.add_volume(Purpose::Create, vec![(ReplicaId(1), local)]);
    engine.wait(|v| v.serving);
    // The connect gives up after three seconds.
    thread::sleep(Duration::from_millis(3_500));
    let volume = engine.volume();
    assert_eq!(volume.children[0].state, "online", "{volume:#?}");
}

/// A replica that did not answer was not added, and the next one got its place. When the connect to the first gave up
/// at last, it told the volume that the second was gone, which stayed so: its own link was up.
#[test]
fn the_link_of_a_replica_that_was_not_added_does_not_touch_the_next_one() {
    let (_held, _fd, nowhere) = black_hole();
    let (first, second) = (Node::with_replica(1), Node::with_replica(3));
    let local = ChildAddress::Local { pool: "p".to_owned() };
    first.add_volume(Purpose::Create, vec![(ReplicaId(1), local)]);
    first.wait(|v| v.serving);
    let add = |replica: (ReplicaId, ChildAddress)| {
        let replica = VolumeReplica { witness: true, ..replica.into() };
        first.call(|reply| Command::AddReplica { name: "v".to_owned(), replica, reply })
    };
    add(remote(2, nowhere)).unwrap_err();
    add(remote(3, second.listens())).unwrap();
    assert_eq!(first.volume().children[1].number, 1, "it has the other's place");
    // The connect gives up after three seconds.
    thread::sleep(Duration::from_millis(3_500));
    let volume = first.volume();
    assert_eq!(volume.children[1].state, "witness", "{volume:#?}");
}

/// A replica in the nexus's own process was not asked what it had promised: when another process took
/// the volume over, the first went on reading and writing it.
#[test]
fn a_replica_of_the_same_process_is_fenced_too() {
    let first = Node::with_replica(1);
    let peer = first.listens();
    let local = ChildAddress::Local { pool: "p".to_owned() };
    first.add_volume(Purpose::Create, vec![(ReplicaId(1), local)]);
    first.wait(|v| v.serving);

    let second = Node::start();
    second.add_volume(Purpose::Assemble, vec![remote(1, peer)]);
    second.wait(|v| v.serving);

    let scrub = |engine: &Engine| {
        let action = ScrubAction::Start(ScrubReport { rate_mib_s: 1000, ..ScrubReport::default() });
        let name = "v".to_owned();
        engine.call(|reply| Command::ScrubVolume { name, action, reply }).unwrap();
    };
    scrub(&second);
    let finished = |v: &VolumeReport| v.scrub.as_ref().is_some_and(|s| s.cursor == BLOCKS);
    second.wait(finished);
    // The first thing that the first asks of its replica tells it.
    scrub(&first);
    first.wait(|v| v.state == "fenced");
    assert_eq!(second.volume().state, "online");
}

/// A process that stands by was told to stop while one of its links could not be closed at once. It read in its own
/// replica where the others are, linked to them anew, and did not end before that was given up for.
#[test]
fn a_process_that_stands_by_ends_though_it_knows_where_the_others_are() {
    let (_held, _fd, nowhere) = black_hole();
    let (first, second) = (Node::with_replica(1), Node::with_replica(2));
    let local = |id| (ReplicaId(id), ChildAddress::Local { pool: "p".to_owned() });
    let sharing =
        Some(Sharing { elsewhere: Vec::new(), iscsi_elsewhere: Vec::new(), auto_after_ms: None });
    let children = vec![local(1), remote(2, second.listens())];
    first.add_shared(Purpose::Create, children, sharing.clone());
    first.wait(|v| v.state == "online");
    let children = vec![local(2), remote(1, first.listens()), remote(3, nowhere)];
    second.add_shared(Purpose::StandBy { auto_after_ms: None }, children, sharing);
    second.wait(|v| v.state == "standby" && v.children[1].connected);
    let began = Instant::now();
    drop(second);
    // The connect gives up after three seconds.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
}

/// Replicas of other processes become members of a volume that is served, and are none any more; a
/// restart knows of it.
#[test]
fn replicas_are_added_to_a_volume_and_removed() {
    let first = Node::with_replica(1);
    let others: Vec<Node> = (2..=4).map(Node::with_replica).collect();
    let peers: Vec<SocketAddr> = others.iter().map(Node::listens).collect();
    let local = (ReplicaId(1), ChildAddress::Local { pool: "p".to_owned() });
    first.add_volume(Purpose::Create, vec![local.clone()]);
    first.wait(|v| v.serving);

    let add = |replica: (ReplicaId, ChildAddress), witness| {
        let replica = VolumeReplica { witness, ..replica.into() };
        let name = "v".to_owned();
        first.call(|reply| Command::AddReplica { name, replica, reply })
    };
    let remove = |id| {
        let (name, replica) = ("v".to_owned(), ReplicaId(id));
        first.call(|reply| Command::RemoveReplica { name, replica, reply })
    };
    add(remote(2, peers[0]), false).unwrap();
    let volume = first.wait(|v| v.state == "online");
    assert_eq!((volume.children.len(), volume.children[1].in_sync), (2, true), "{volume:#?}");
    add(remote(3, peers[1]), true).unwrap();
    let volume = first.volume();
    assert_eq!((volume.children[2].state.as_str(), volume.children[2].witness), ("witness", true));
    let refused = add(remote(3, peers[1]), true).unwrap_err();
    assert!(refused.to_string().contains("member of the volume already"), "{refused}");
    // Where nobody is, nothing is added, and the volume is as it was.
    let (_held, _fd, nowhere) = black_hole();
    let refused = add(remote(4, nowhere), false).unwrap_err();
    assert!(refused.to_string().contains("does not answer"), "{refused}");
    assert_eq!(first.volume().children.len(), 3);

    remove(2).unwrap();
    let volume = first.volume();
    assert_eq!((volume.state.as_str(), volume.children.len()), ("online", 2), "{volume:#?}");
    // Findings of scrubs name children by their number, which stays.
    assert_eq!(volume.children.iter().map(|c| c.number).collect::<Vec<_>>(), [0, 2]);
    assert!(volume.children.iter().all(|c| c.connected), "{volume:#?}");
    let refused = remove(1).unwrap_err();
    assert!(refused.to_string().contains("the only one"), "{refused}");
    add(remote(4, peers[2]), false).unwrap();
    remove(3).unwrap();
    first.wait(|v| v.state == "online");
    first.remove_volume();

    // The one that was removed does not know better than those that decided it.
    first.add_volume(Purpose::Assemble, vec![local, remote(2, peers[0])]);
    // Where the fourth is the configuration tells, and somebody does just then: it is taken up once.
    let told = add(remote(4, peers[2]), false);
    let volume = first.wait(|v| v.serving && v.children[1].state == "idle");
    assert!(volume.children[1].reason.contains("not a member"), "{volume:#?}");
    assert!(volume.children.iter().any(|c| c.replica == ReplicaId(4)), "{told:?}, {volume:#?}");
}

/// A volume with a replica in a pool of the process was not served at all once that pool was gone, though
/// the others had all of it.
#[test]
fn a_volume_comes_up_without_a_local_pool_that_is_gone() {
    let first = Node::with_replica(1);
    let others: Vec<Node> = (2..=3).map(Node::with_replica).collect();
    let remotes = || others.iter().zip(2..).map(|(engine, id)| remote(id, engine.listens()));
    let local = || (ReplicaId(1), ChildAddress::Local { pool: "p".to_owned() });
    first.add_volume(Purpose::Create, std::iter::once(local()).chain(remotes()).collect());
    first.wait(|v| v.serving);
    first.remove_volume();

    let again = Node::start();
    again.add_volume(Purpose::Assemble, std::iter::once(local()).chain(remotes()).collect());
    let volume = again.wait(|v| v.serving);
    let gone = &volume.children[0];
    assert_eq!((volume.state.as_str(), gone.connected), ("degraded", false), "{volume:#?}");
    assert!(gone.reason.contains("have pool `p` opened"), "{volume:#?}");
}

/// What a person types as a replica's address went to the initiator as it was; a name too long for
/// a Connect was a panic there, which ended the engine with all its volumes. A local replica that
/// is too small was taken, and failed at the first write past its end.
#[test]
fn children_that_cannot_be_are_refused() {
    let engine = Node::with_replica(1);
    let spec = |blocks, child| VolumeSpec { blocks, ..Engine::spec("v", 99, vec![child]) };
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let long = ChildAddress::Remote { peer, nqn: format!("nqn.{}", "x".repeat(300)) };
    let local = ChildAddress::Local { pool: "p".to_owned() };
    for spec in [spec(BLOCKS, (ReplicaId(2), long)), spec(BLOCKS + 1, (ReplicaId(1), local))] {
        let refused = engine.call(|reply| Command::AddVolume { spec, reply });
        assert!(matches!(refused, Err(EngineError::Invalid(_))), "{refused:?}");
    }
}

/// A nexus by hand: a session with a replica, on plain sockets.
struct Nexus(Client);

impl std::ops::Deref for Nexus {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl std::ops::DerefMut for Nexus {
    fn deref_mut(&mut self) -> &mut Client {
        &mut self.0
    }
}

impl Nexus {
    fn to(peer: SocketAddr, replica: u128) -> Self {
        Self(Client::connect(peer, &replica_nqn(replica), HOST, true, usize::MAX).unwrap())
    }

    fn page(&mut self, opcode: u8, cdw: (u32, u32), fill: impl FnOnce(&mut [u8])) -> IoStatus {
        let buf = self.mem.alloc(upkeep::PAGE).unwrap();
        fill(self.mem.bytes_mut(buf.slice()));
        let data = if opcode & 3 == 1 {
            VendorData::Out(buf.slice())
        } else {
            VendorData::In(buf.slice())
        };
        let status = self.wait(0, Submit::Vendor { opcode, cdw10: cdw.0, cdw11: cdw.1, data });
        self.mem.release(buf);
        status
    }

    fn settle(&mut self, call: SettleCall) -> IoStatus {
        self.page(upkeep::OPCODE_SETTLE, (0, 0), |page| upkeep::encode(call, page))
    }

    fn changes(&mut self, first: u32, since: u32, len: u32) -> Result<Vec<u8>, IoStatus> {
        let buf = self.mem.alloc(len).unwrap();
        let data = VendorData::In(buf.slice());
        let opcode = upkeep::OPCODE_CHANGES;
        let status = self.wait(0, Submit::Vendor { opcode, cdw10: first, cdw11: since, data });
        let bytes = self.mem.bytes(buf.slice()).to_vec();
        self.mem.release(buf);
        if status.is_ok() { Ok(bytes) } else { Err(status) }
    }
}

/// What a nexus elsewhere asks about changes, over the wire; and that an older one is refused.
#[test]
fn changes_are_told_and_settled_over_the_wire() {
    let replica = Node::with_replica(1);
    let peer = replica.listens();
    let mut client = Nexus::to(peer, 1);
    client.write(0, 7);
    client.write(3 * 256, 7);
    let open = change::MAPPED | change::OPEN;
    let told = client.changes(0, 1, 64 << 10).unwrap();
    assert_eq!(told[..8], [open, 0, 0, open, 0, 0, 0, 0]);
    assert!(told[8..].iter().all(|&byte| byte == 0));
    assert_eq!(client.settle(SettleCall::Begin { round: 9 }), IoStatus::Ok);
    client.write(1, 7);
    assert_eq!(
        client.settle(SettleCall::End { round: 9, stamp: 4, below: u32::MAX }),
        IoStatus::Ok
    );
    assert_eq!(client.changes(3, 4, 2).unwrap(), [change::MAPPED | change::SINCE, 0]);
    assert_eq!(client.changes(0, 4, 1).unwrap(), [open]);
    assert_eq!(client.changes(0, 1, 65 << 10), Err(IoStatus::InvalidField), "that is too much");
    let junk = client.page(upkeep::OPCODE_SETTLE, (0, 0), |page| page.fill(1));
    assert_eq!(junk, IoStatus::InvalidField);
    // Another nexus takes the replica over: what the first one says counts no more.
    let mut next = Nexus::to(peer, 1);
    assert_eq!(next.page(register::OPCODE_PROMISE, (7, 0), |_| ()), IoStatus::Ok);
    assert_eq!(client.settle(SettleCall::Begin { round: 10 }), IoStatus::Fenced);
    assert_eq!(client.changes(0, 4, 8), Err(IoStatus::Fenced));
    assert_eq!(next.changes(0, 0, 1).unwrap(), [open | change::SINCE]);
}

/// A takeover that was refused left the volume refused, until somebody asked for another.
#[test]
fn a_process_that_was_refused_stands_by_again_and_says_why() {
    let engine = Node::with_replica(1);
    let local = (ReplicaId(1), ChildAddress::Local { pool: "p".to_owned() });
    let by_hand = Purpose::StandBy { auto_after_ms: None };
    engine.add_shared(by_hand, vec![local.clone()], Some(Sharing::default()));
    let take = || engine.call(|reply| Command::TakeOver { name: "v".to_owned(), reply });
    for _ in 0..2 {
        // Nothing was ever stored there.
        let refused = take().unwrap_err();
        assert!(refused.to_string().contains("no replica holds a configuration"), "{refused}");
        let told = |v: &VolumeReport| v.detail.contains("no replica holds a configuration");
        engine.wait(|v| v.state == "standby" && told(v));
    }
    engine.remove_volume();
    // Once there is something to be taken over it is.
    engine.add_volume(Purpose::Create, vec![local.clone()]);
    engine.wait(|v| v.serving);
    engine.remove_volume();
    engine.add_shared(by_hand, vec![local], Some(Sharing::default()));
    take().unwrap();
    assert!(engine.volume().serving);
    engine.call(|reply| Command::StandBy { name: "v".to_owned(), reply }).unwrap();
    let volume = engine.wait(|v| v.blocks == BLOCKS);
    assert_eq!((volume.state.as_str(), volume.unfit.as_str()), ("standby", ""), "{volume:#?}");
}
