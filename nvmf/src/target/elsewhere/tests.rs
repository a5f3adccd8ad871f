use cairn_block::{HeapMemory, Memory};
use proptest::prelude::*;

use super::*;
use crate::log::{DiscoveryEntry, DiscoveryHeader};
use crate::loopback::{HOST, NQN, subsystem, target};
use crate::pdu::{Body, Digests, Header};
use crate::sqe::Sqe;
use crate::target::tests::{connect_capsule, property_get};
use crate::target::{ConnId, Outcome, Queue, QueueConfig, SubsystemConfig, TargetConfig};

const OWNER: Owner = Owner(3);

fn here(discoverable: bool, allowed_hosts: Option<Vec<String>>) -> Listing {
    Listing::Here { nqn: NQN.to_owned(), allowed_hosts, discoverable, elsewhere: Vec::new() }
}

fn front() -> Target {
    let mut front = Target::new(TargetConfig::default());
    front.set_ports(vec![Port { traddr: "192.0.2.1".into(), trsvcid: 4420 }]);
    front
}

/// A host's capsule.
fn capsule(sqe: Sqe, data: &[u8], digests: Digests) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let header = Header::new(Body::CapsuleCmd(sqe), digests, len, 0);
    let mut bytes = header.encode().as_bytes().to_vec();
    bytes.extend_from_slice(data);
    if digests.data && !data.is_empty() {
        bytes.extend_from_slice(&crc32c::crc32c(data).to_le_bytes());
    }
    bytes
}

fn icreq(digests: Digests) -> Vec<u8> {
    // type 0, hlen 128, plen 128, PFV 0, HPDA 0, DGST, MAXR2T 0.
    let mut bytes = vec![0; 128];
    (bytes[2], bytes[4]) = (128, 128);
    bytes[11] = digests.to_wire();
    bytes
}

/// One target and a connection of its.
struct End {
    target: Target,
    queue: Queue,
    mem: HeapMemory,
    sent: Vec<u8>,
}

impl End {
    fn new(target: Target) -> Self {
        let mut mem = HeapMemory::new(4 << 20);
        let queue = Queue::new(&QueueConfig::default(), &mut mem).unwrap();
        Self { target, queue, mem, sent: Vec::new() }
    }

    fn load(&mut self, bytes: &[u8]) -> cairn_block::Buf {
        let chunk = self.mem.alloc(u32::try_from(bytes.len()).unwrap()).unwrap();
        self.mem.bytes_mut(chunk.slice()).copy_from_slice(bytes);
        chunk
    }

    /// Feeds all of it, and carries out what comes of that: whose the connection is, where it is another's.
    fn feed(&mut self, bytes: &[u8]) -> Option<Owner> {
        if bytes.is_empty() {
            return None;
        }
        let chunk = self.load(bytes);
        assert_eq!(self.queue.handle_recv(chunk.slice(), &mut self.mem), chunk.len());
        self.mem.release(chunk);
        self.carry_out()
    }

    fn carry_out(&mut self) -> Option<Owner> {
        while let Some(cmd) = self.queue.poll_command() {
            let (queue, mem) = (&mut self.queue, &mut self.mem);
            match self.target.handle_command(ConnId(1), queue, cmd, 0, mem) {
                Outcome::Done => {}
                Outcome::Elsewhere(owner) => return Some(owner),
                other => panic!("{other:?}"),
            }
        }
        None
    }

    fn send(&mut self) {
        let mut windows = Vec::with_capacity(64);
        while self.queue.tx().wants_send() {
            self.queue.tx().take_batch(&mut windows);
            for &window in &windows {
                self.sent.extend_from_slice(self.mem.bytes(window));
            }
            self.queue.tx().handle_sent(&mut self.mem);
        }
    }

    fn close(mut self) {
        self.queue.close(&mut self.mem);
        assert_eq!(self.mem.in_use(), 0, "a buffer is lost");
    }
}

/// What a host hears that sends `pieces` to a target which has another one take up its connection.
fn by_way_of_another(pieces: &[&[u8]]) -> Vec<u8> {
    let mut front = End::new(front());
    front.target.handle_listing(OWNER, here(true, None));
    let mut received = Vec::new();
    let mut left = pieces.iter();
    let owner = loop {
        let piece = left.next().expect("a Connect is in it");
        received.extend_from_slice(piece);
        front.send();
        if let Some(owner) = front.feed(piece) {
            break owner;
        }
    };
    assert_eq!(owner, OWNER);
    front.send();
    let mut back = End::new(target().0);
    let again = back.load(&received);
    assert!(back.queue.resume(again.slice(), front.queue.queued(), &mut back.mem));
    back.mem.release(again);
    assert_eq!(back.carry_out(), None);
    for piece in left {
        assert_eq!(back.feed(piece), None);
    }
    back.send();
    let heard = [std::mem::take(&mut front.sent), std::mem::take(&mut back.sent)].concat();
    front.close();
    back.close();
    heard
}

proptest! {
    /// A host cannot tell whether its connection was handed on, wherever its bytes were cut, with digests and
    /// without, also where it did not wait for the answer to its Connect.
    #[test]
    fn a_connection_is_taken_up_by_another_target_wherever_it_is_cut(
        cuts in prop::collection::vec(0usize..1600, 0..6),
        header in any::<bool>(),
        data in any::<bool>(),
        more in 0usize..4,
    ) {
        let digests = Digests { header, data };
        let (sqe, connect) = connect_capsule(0, 0xffff, NQN, HOST);
        let mut stream = icreq(digests);
        // ICReq and ICResp have no digests.
        stream.extend(capsule(sqe, &connect, digests));
        for _ in 0..more {
            stream.extend(capsule(property_get(0, true), &[], digests));
        }
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(stream.len())).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|at| &stream[at[0]..at[1]]).collect();

        let mut only = End::new(target().0);
        for piece in &pieces {
            prop_assert_eq!(only.feed(piece), None);
        }
        only.send();
        prop_assert_eq!(by_way_of_another(&pieces), only.sent.clone());
        only.close();
    }
}

#[test]
fn what_does_not_come_to_the_same_is_refused() {
    let digests = Digests::default();
    let (sqe, connect) = connect_capsule(0, 0xffff, NQN, HOST);
    let whole = [icreq(digests), capsule(sqe, &connect, digests)].concat();
    let mut broken = whole.clone();
    broken[128] = 0xee;
    for (bytes, queued) in [(&whole, 0), (&whole, 2), (&broken, 1)] {
        let mut back = End::new(target().0);
        let again = back.load(bytes);
        assert!(!back.queue.resume(again.slice(), queued, &mut back.mem), "{queued}");
        back.mem.release(again);
        back.close();
    }
}

#[test]
fn only_a_first_command_goes_elsewhere() {
    let mut end = End::new(front());
    end.target.handle_listing(OWNER, here(true, None));
    let digests = Digests::default();
    assert_eq!(end.feed(&icreq(digests)), None);
    assert_eq!(end.feed(&capsule(property_get(0, true), &[], digests)), None);
    assert!(end.queue.is_settled());
    let (sqe, connect) = connect_capsule(0, 0xffff, NQN, HOST);
    assert_eq!(end.feed(&capsule(sqe, &connect, digests)), None, "it is too late for that");
    end.close();
}

/// The subsystems that the log lists for a host, and its generation.
fn log(target: &Target, hostnqn: &str) -> (Vec<String>, u64) {
    let page = target.discovery_log(hostnqn);
    let header = DiscoveryHeader::decode(&page).unwrap();
    let entries = page[1024..].chunks(1024).map(|e| DiscoveryEntry::decode(e).unwrap().subnqn);
    (entries.skip(1).collect(), header.genctr)
}

#[test]
fn the_log_lists_what_others_have_and_counts_its_changes() {
    let mut front = front();
    let (mut seen, mut before) = (Vec::new(), log(&front, HOST).1);
    let mut step = |front: &mut Target, owner, listing| {
        front.handle_listing(owner, listing);
        let (listed, genctr) = log(front, HOST);
        seen.push((listed.len(), genctr - before));
        before = genctr;
    };
    step(&mut front, OWNER, here(true, None));
    // Nothing new.
    step(&mut front, OWNER, here(true, None));
    // Another host's now.
    step(&mut front, OWNER, here(true, Some(vec!["nqn.2014-08.org:other".to_owned()])));
    step(&mut front, OWNER, here(true, Some(vec![HOST.to_owned()])));
    // One of a replica is not told of.
    let hidden = Listing::Here {
        nqn: format!("{NQN}-hidden"),
        allowed_hosts: None,
        discoverable: false,
        elsewhere: Vec::new(),
    };
    step(&mut front, OWNER, hidden);
    step(&mut front, OWNER, Listing::Gone { nqn: format!("{NQN}-hidden") });
    // Somebody else's of that name.
    step(&mut front, Owner(1), Listing::Gone { nqn: NQN.to_owned() });
    step(&mut front, OWNER, Listing::Gone { nqn: NQN.to_owned() });
    assert_eq!(seen, [(1, 1), (1, 0), (0, 1), (1, 1), (1, 0), (1, 0), (1, 0), (0, 1)]);
}

#[test]
fn a_target_tells_of_its_subsystems() {
    let mut target = Target::new(TargetConfig::default());
    target.add_subsystem(SubsystemConfig { nqn: format!("{NQN}-before"), ..subsystem() }).unwrap();
    assert_eq!(target.poll_listing(), None, "nobody asked");
    target.announce_subsystems();
    let id = target.add_subsystem(subsystem()).unwrap();
    assert_eq!(target.poll_listing(), Some(here(true, None)));
    let other = Port { traddr: "192.0.2.2".into(), trsvcid: 4420 };
    for _ in 0..2 {
        target.set_elsewhere(id, vec![other.clone()]).unwrap();
    }
    let Some(Listing::Here { elsewhere, .. }) = target.poll_listing() else { panic!("a change") };
    assert_eq!(elsewhere, [other]);
    target.remove_subsystem(id);
    assert_eq!(target.poll_listing(), Some(Listing::Gone { nqn: NQN.to_owned() }));
    assert_eq!(target.poll_listing(), None);
}
