//! Who votes: witnesses, members that are added and removed, and what is found after a crash in between.

use super::*;

const fn id(at: u8) -> ReplicaId {
    ReplicaId(at as u128 + 1)
}

fn spec(at: u8, witness: bool) -> ChildSpec {
    ChildSpec { replica: id(at), local: false, witness, place: Place::default() }
}

/// A nexus of these children; true: a witness.
fn nexus(children: &[(u8, bool)], purpose: Purpose) -> Nexus {
    let mut config = config(1, purpose);
    config.children = children.iter().map(|&(at, witness)| spec(at, witness)).collect();
    Nexus::new(config)
}

/// `data` replicas and a witness after them, all there.
fn with_witness(data: u8) -> Bench {
    let n = usize::from(data) + 1;
    let mut b = Bench::new(data + 1, Purpose::Create, vec![Register::default(); n]);
    let children: Vec<_> = (0..=data).map(|at| (at, at == data)).collect();
    b.nexus = nexus(&children, Purpose::Create);
    (0..=data).for_each(|at| b.connect(at));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b
}

fn members(b: &Bench, child: usize) -> Vec<(ReplicaId, bool, bool)> {
    let config = Config::decode(&b.registers[child].config).unwrap();
    config.members.iter().map(|m| (m.replica, m.witness, m.in_sync)).collect()
}

fn text(b: &Bench) -> String {
    let state = b.nexus.state();
    assert!(matches!(state, VolumeState::Assembling(_)), "{state:?}");
    state.detail().to_owned()
}

impl Bench {
    /// One more child.
    fn add(&mut self, at: u8, witness: bool) -> ChildId {
        let child = self.nexus.add_child(spec(at, witness)).unwrap();
        let place = usize::from(child.0);
        if place == self.up.len() {
            self.registers.push(Register::default());
            self.up.push(false);
            self.broken.push(false);
        } else {
            self.registers[place] = Register::default();
        }
        child
    }

    /// Under a new nexus of these children, whose registers are those of the old one's places.
    fn again(self, children: &[(u8, bool)], places: &[usize]) -> Self {
        let registers = places.iter().map(|&at| self.registers[at].clone()).collect();
        let n = u8::try_from(children.len()).unwrap();
        let mut b = Self::new(n, Purpose::Assemble, registers);
        b.nexus = nexus(children, Purpose::Assemble);
        b
    }

    fn unchanged(&self) -> Option<&str> {
        self.events.iter().rev().find_map(|e| match e {
            Event::VotersUnchanged(_, why) => Some(why.as_str()),
            _ => None,
        })
    }
}

#[test]
fn a_witness_votes_and_takes_no_io() {
    let mut b = with_witness(2);
    assert_eq!(members(&b, 2), [(id(0), false, true), (id(1), false, true), (id(2), true, false)]);
    assert_eq!(b.nexus.status().children[2].state, ChildState::Witness);
    b.write(1, 0, 8);
    b.submit(2, IoOp::Read, 100, 1);
    b.submit(3, IoOp::Flush, 0, 0);
    assert_eq!(b.pending(2), 0);
    // With one of two gone, the other goes on, by the witness's vote.
    b.disconnect(1);
    while b.pending(0) > 0 {
        b.answer(0, IoStatus::Ok);
    }
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert_eq!(members(&b, 2)[1], (id(1), false, false));
    // Its coming and going changes nothing.
    b.disconnect(2);
    b.connect(2);
    assert_eq!(b.nexus.status().children[2].state, ChildState::Witness);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
}

#[test]
fn what_a_witness_knows_keeps_a_stale_replica_from_starting() {
    let mut b = with_witness(2);
    b.disconnect(1);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    let mut b = b.restarted();
    b.nexus = nexus(&[(0, false), (1, false), (2, false)], Purpose::Assemble);
    b.connect(1);
    assert!(text(&b).contains("2 of 3 voters are needed to decide, and only"), "{}", text(&b));
    b.connect(2);
    b.pass(WAIT);
    let said = text(&b);
    assert!(said.contains(&format!("missed writes; waiting for replica {}", id(0))), "{said}");
    b.connect(0);
    b.pass(5_000);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert_eq!(b.nexus.status().children[2].state, ChildState::Witness, "the stored word counts");
}

#[test]
fn a_replica_is_added_out_of_sync_and_removed_again() {
    let mut b = Bench::online(2);
    let third = b.add(2, false);
    b.nexus.add_voter(third, b.now).unwrap();
    assert_eq!(b.nexus.resize(2000, 0), Err(ChangeError::Busy));
    b.connect(2);
    assert!(b.events.contains(&Event::VoterAdded(third)));
    let all = [(id(0), false, true), (id(1), false, true), (id(2), false, false)];
    for child in 0..3 {
        assert_eq!(members(&b, child), all);
    }
    let state = ChildState::OutOfSync(FaultReason::Stale);
    assert_eq!(b.nexus.status().children[2].state, state);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert_eq!(b.nexus.add_voter(third, b.now), Err(ChangeError::Member(id(2))));

    // One in sync is removed while it has a write in hand.
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.nexus.remove_voter(ChildId(1), b.now).unwrap();
    b.pump();
    assert!(b.events.contains(&Event::VoterRemoved(ChildId(1))));
    assert_eq!(members(&b, 2), [(id(0), false, true), (id(2), false, false)]);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert!(b.released.is_empty(), "it may still read the buffer");
    assert_eq!(b.nexus.remove_voter(ChildId(0), b.now), Err(ChangeError::LastInSync(id(0))));
    assert!(b.nexus.forget_child(ChildId(1)));
    assert_eq!(b.nexus.add_child(spec(3, true)), Some(ChildId(3)), "its place is not free yet");
    b.disconnect(1);
    assert_eq!(b.released, [1]);
    assert_eq!(b.nexus.add_child(spec(4, true)), Some(ChildId(1)));
    b.write(2, 0, 8);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
}

#[test]
fn a_change_of_voters_needs_a_majority_of_both() {
    let mut b = Bench::online(3);
    let fourth = b.add(3, false);
    b.connect(3);
    b.hold_registers = true;
    b.nexus.add_voter(fourth, b.now).unwrap();
    b.pump();
    // The promise of the one that comes.
    let promise = b.held.pop_front().unwrap();
    let reply = b.obey(&promise);
    b.nexus.handle_register(promise.child, promise.ticket, reply, b.now);
    b.pump();
    // The new one has to know of it before anybody else does; and two of three before it are not three of four.
    assert_eq!((b.held.len(), b.held[0].child), (1, fourth));
    for at in [3u8, 0] {
        let io = b.held.iter().position(|io| io.child == ChildId(at)).unwrap();
        let io = b.held.remove(io).unwrap();
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
        assert!(!b.events.contains(&Event::VoterAdded(fourth)));
    }
    b.answer_registers();
    assert!(b.events.contains(&Event::VoterAdded(fourth)));
}

#[test]
fn a_change_that_cannot_be_stored_is_given_up_by_storing_what_was() {
    let mut b = Bench::online(2);
    let third = b.add(2, false);
    b.connect(2);
    b.broken[2] = true;
    b.registers[2].promised_epoch = b.nexus.status().epoch;
    b.nexus.add_voter(third, b.now).unwrap();
    b.pump();
    assert_eq!(members(&b, 0).len(), 2, "nobody is asked before the one that comes");
    // Meanwhile a member fails: the write waits, since that is stored with the change or without it.
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    assert_eq!(b.status_of(1), None);
    b.pass(DEADLINE * 2);
    assert!(b.unchanged().is_some());
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(members(&b, 0), [(id(0), false, true), (id(1), false, false)]);
    assert_eq!(members(&b, 1), members(&b, 0));
    // And another change can be made.
    assert!(b.nexus.forget_child(third));
    b.disconnect(2);
    let witness = b.add(4, true);
    assert_eq!(witness, third);
    b.broken[2] = false;
    b.nexus.add_voter(witness, b.now).unwrap();
    b.connect(2);
    assert_eq!(members(&b, 0).len(), 3);
    assert_eq!(b.nexus.status().children[2].state, ChildState::Witness);
}

#[test]
fn a_replica_of_another_volume_is_not_added() {
    let mut b = Bench::online(1);
    let second = b.add(1, false);
    let other = Config {
        volume: VolumeId(5),
        blocks: 1000,
        lineage: 1,
        generation: 9,
        encryption: Vec::new(),
        holder: 0,
        restoring: None,
        deleted: Vec::new(),
        reservations: Vec::new(),
        sanitize: Vec::new(),
        undo: false,
        block_size: 0,
        members: vec![Member { replica: id(1), in_sync: true, ..Member::default() }],
    };
    b.registers[1].config = other.encode();
    b.registers[1].promised_epoch = Epoch(1);
    b.connect(1);
    b.nexus.add_voter(second, b.now).unwrap();
    b.pump();
    assert!(b.unchanged().unwrap().contains("belongs to volume"), "{:?}", b.unchanged());
    assert_eq!(b.registers[1].promised_epoch, Epoch(1), "its own nexus goes on");
    // Nor by a new volume that is to be made of it.
    let mut new = Bench::new(2, Purpose::Create, vec![Register::default(), b.registers[1].clone()]);
    (0..2).for_each(|i| new.connect(i));
    assert!(matches!(new.nexus.state(), VolumeState::Refused(_)));
    assert_eq!(new.registers[1].promised_epoch, Epoch(1));
    // One that has promised a newer epoch to somebody does not fence the volume.
    let third = b.add(2, false);
    b.registers[2].promised_epoch = Epoch(99);
    b.connect(2);
    b.nexus.add_voter(third, b.now).unwrap();
    b.pump();
    assert!(b.unchanged().unwrap().contains("newer epoch"), "{:?}", b.unchanged());
    // One that never comes is not waited for.
    let fourth = b.add(3, false);
    b.nexus.add_voter(fourth, b.now).unwrap();
    b.pass(DEADLINE * 2);
    assert_eq!(b.unchanged(), Some("it does not answer"));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn a_small_replica_grows_before_it_is_added() {
    let mut b = Bench::online(1);
    let second = b.add(1, false);
    b.registers[1].blocks = 10;
    b.connect(1);
    assert_eq!(b.registers[1].blocks, 10, "one that is no member is left as it is");
    b.nexus.add_voter(second, b.now).unwrap();
    b.pump();
    assert_eq!(b.registers[1].blocks, 1000);
    assert_eq!(members(&b, 1).len(), 2);
    // A witness stays as small as it is.
    let third = b.add(2, true);
    b.registers[2].blocks = 1;
    b.connect(2);
    b.nexus.add_voter(third, b.now).unwrap();
    b.pump();
    assert_eq!((b.registers[2].blocks, members(&b, 1).len()), (1, 3));
}

/// Every way in which a change can be cut off, and every set of replicas that comes back: whoever serves
/// serves what was committed last, or what was proposed after it. Three of four always do: one that was to be
/// added, and had stored nothing while others had, was not counted, and the volume waited for another.
#[test]
fn a_change_that_is_cut_off_is_recovered_or_was_never_made() {
    let all: [(u8, bool); 4] = [(0, false), (1, false), (2, false), (3, false)];
    for accepted in 0..16u8 {
        for there in 0..16u8 {
            for adds in [false, true] {
                let mut b = Bench::online(if adds { 3 } else { 4 });
                let child = if adds { b.add(3, false) } else { ChildId(3) };
                if adds {
                    b.connect(3);
                }
                b.hold_registers = true;
                if adds {
                    b.nexus.add_voter(child, b.now).unwrap();
                    b.pump();
                    let promise = b.held.pop_front().unwrap();
                    let reply = b.obey(&promise);
                    b.nexus.handle_register(promise.child, promise.ticket, reply, b.now);
                } else {
                    b.nexus.remove_voter(child, b.now).unwrap();
                }
                b.pump();
                while let Some(io) = b.held.pop_front() {
                    if accepted & (1 << io.child.0) != 0 {
                        let reply = b.obey(&io);
                        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
                        b.pump();
                    }
                }
                let made = b.nexus.voters.has(child) == adds;
                let (epoch, before) = (b.nexus.status().epoch, b.registers.clone());
                let mut b = b.again(&all, &[0, 1, 2, 3]);
                (0..4).filter(|at| there & (1 << at) != 0).for_each(|at| b.connect(at));
                b.pass(WAIT);
                let many = there.count_ones() >= 3;
                assert!(!many || b.nexus.state().is_serving(), "{accepted:04b} {there:04b}");
                if !b.nexus.state().is_serving() {
                    // With all of them it does, whoever could not decide before.
                    (0..4).filter(|at| there & (1 << at) == 0).for_each(|at| b.connect(at));
                    b.pass(5_000);
                    b.pass(5_000);
                }
                let what = format!("{accepted:04b} {there:04b} {adds}: {:?}", b.nexus.state());
                assert!(b.nexus.state().is_serving(), "{what}");
                assert!(b.nexus.status().epoch > epoch, "{what}");
                let votes = b.nexus.voters.has(ChildId(3));
                assert!(!made || votes == adds, "{what}: {before:?}");
            }
        }
    }
}

#[test]
fn a_replica_that_the_configuration_names_and_nobody_else_is_asked_for() {
    let b = Bench::online(3);
    let mut b = b.again(&[(0, false), (1, false)], &[0, 1]);
    b.connect(0);
    b.connect(1);
    b.pass(WAIT);
    let said = text(&b);
    assert!(said.contains(&format!("has a replica {} that is not among", id(2))), "{said}");
    assert_eq!(b.registers[0].promised_epoch, Epoch(1), "nobody was fenced for it");
    let third = b.nexus.add_child(spec(2, false)).unwrap();
    b.registers.push(b.registers[0].clone());
    b.up.push(false);
    b.broken.push(false);
    b.connect(third.0);
    b.pass(5_000);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn children_that_are_no_members_are_idle_until_they_are_added() {
    let b = Bench::online(2);
    let mut b = b.again(&[(0, false), (1, false), (7, false)], &[0, 1, 1]);
    b.registers[2] = Register::default();
    b.connect(0);
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Online, "nobody waits for one that has no vote");
    b.connect(2);
    assert_eq!(b.nexus.status().children[2].state, ChildState::Idle(FaultReason::NotMember));
    b.write(1, 0, 8);
    assert_eq!(b.pending(2), 0);
    b.nexus.add_voter(ChildId(2), b.now).unwrap();
    b.pump();
    assert_eq!(members(&b, 0).len(), 3);
}

#[test]
fn a_member_that_was_made_anew_is_not_taken_for_what_it_was() {
    let mut b = Bench::online(3);
    b.disconnect(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.registers[1] = Register::default();
    let mut b = b.restarted();
    b.connect(1);
    b.connect(2);
    b.pass(WAIT);
    assert!(!b.nexus.state().is_serving(), "{:?}", b.nexus.state());
    b.connect(0);
    b.pass(5_000);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    let state = b.nexus.status().children[1].state;
    assert_eq!(state, ChildState::OutOfSync(FaultReason::Blank));
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
}

/// Where those that are here are too few to decide, what is missing may only be unknown here: a replica that
/// another nexus has added was told of as missing, and its process ran.
#[test]
fn replicas_that_a_nexus_was_never_told_of_are_not_called_missing() {
    let mut b = Bench::online(3).again(&[(0, false), (1, false)], &[0, 1]);
    b.connect(0);
    b.pass(WAIT);
    let said = text(&b);
    assert!(said.contains(&format!("missing: replica {}; not among", id(1))), "{said}");
    assert!(said.contains(&format!("named for it here: replica {}; add", id(2))), "{said}");
}

/// A replica was removed and added again while its old place was not free yet. What was stored of it went to the old
/// place, so that it was stored again, for ever.
#[test]
fn a_replica_that_was_removed_is_a_member_again_in_another_place() {
    let mut b = Bench::online(2);
    let third = b.add(2, false);
    b.registers[2].incarnation = 7;
    b.nexus.add_voter(third, b.now).unwrap();
    b.connect(2);
    b.nexus.remove_voter(third, b.now).unwrap();
    b.pump();
    assert!(b.events.contains(&Event::VoterRemoved(third)));
    let again = b.add(2, false);
    assert_ne!(again, third, "its place is not free yet");
    b.registers[usize::from(again.0)].incarnation = 7;
    b.nexus.add_voter(again, b.now).unwrap();
    b.connect(again.0);
    (0..20).for_each(|_| b.pass(Pace::default().settle_ms));
    let stored = Config::decode(&b.registers[0].config).unwrap();
    assert_eq!((stored.members[2].replica, stored.members[2].incarnation), (id(2), 7));
    assert_eq!(b.nexus.children[usize::from(again.0)].member, stored.members[2]);
}
