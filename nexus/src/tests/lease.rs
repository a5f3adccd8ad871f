//! Reads are answered under a lease, and whoever takes a volume over waits for it.

use super::*;

/// Renewals that are waiting to be answered, as children.
fn renewals(b: &Bench) -> Vec<u8> {
    let renewals =
        b.held.iter().filter(|io| matches!(io.op, ChildOp::Register(RegisterOp::Renew { .. })));
    renewals.map(|io| io.child.0).collect()
}

/// Answers one of them.
fn renew(b: &mut Bench, child: u8, reply: ChildReply) {
    let is = |io: &ChildIo| {
        io.child.0 == child && matches!(io.op, ChildOp::Register(RegisterOp::Renew { .. }))
    };
    let at = b.held.iter().position(is).expect("a renewal");
    let io = b.held.remove(at).unwrap();
    b.nexus.handle_register(io.child, io.ticket, reply, b.now);
    b.pump();
}

fn ok() -> ChildReply {
    Ok(Register::default())
}

fn read(b: &mut Bench, tag: u64) {
    b.submit(tag, IoOp::Read, tag * 10, 1);
    let child = b.io.front().expect("it is read at once").child.0;
    b.answer(child, IoStatus::Ok);
}

#[test]
fn a_read_is_answered_once_a_majority_has_granted_a_lease() {
    let mut b = Bench::online(3);
    b.hold_registers = true;
    read(&mut b, 1);
    assert_eq!(renewals(&b), [0, 1, 2]);
    assert_eq!(b.status_of(1), None);
    renew(&mut b, 0, ok());
    assert_eq!(b.status_of(1), None);
    renew(&mut b, 2, ok());
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    // Nothing more is sent before half of it is over, nor while nobody reads.
    read(&mut b, 2);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
    b.pass(LEASE / 2);
    assert_eq!(renewals(&b), [1]);
    read(&mut b, 3);
    assert_eq!(renewals(&b), [1, 0, 2]);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok), "there is half of it left");
    // It counts from when it was asked for, however late the answer is.
    b.pass(LEASE / 2 - 1);
    renew(&mut b, 1, ok());
    renew(&mut b, 0, ok());
    b.pass(1);
    read(&mut b, 4);
    assert_eq!(b.status_of(4), None, "one of the two was sent at the beginning");
    renew(&mut b, 2, ok());
    assert_eq!(b.status_of(4), Some(IoStatus::Ok));
    // Writes ask nobody but the members.
    b.pass(LEASE * 10);
    let asked = b.held.len();
    b.write(5, 0, 1);
    (0..3).for_each(|child| b.answer(child, IoStatus::Ok));
    assert_eq!((b.status_of(5), b.held.len()), (Some(IoStatus::Ok), asked));
}

/// What is told of the configuration is as old as what is read, at most.
#[test]
fn whoever_wants_a_lease_gets_one_when_a_majority_is_there() {
    let mut b = Bench::online(3);
    b.hold_registers = true;
    assert!(!b.nexus.has_lease(b.now));
    b.nexus.want_lease(b.now);
    b.pump();
    assert_eq!(renewals(&b), [0, 1, 2]);
    renew(&mut b, 1, ok());
    assert!(!b.nexus.has_lease(b.now));
    renew(&mut b, 2, ok());
    assert!(b.nexus.has_lease(b.now + LEASE - 1) && !b.nexus.has_lease(b.now + LEASE));
    renew(&mut b, 0, ok());
    // Nobody asks again who has it.
    b.pass(LEASE * 2);
    assert_eq!(renewals(&b), []);

    // While too few are there, those that are are asked again and again.
    b.disconnect(0);
    b.disconnect(1);
    b.nexus.want_lease(b.now);
    b.pump();
    assert_eq!(renewals(&b), [2]);
    renew(&mut b, 2, ok());
    b.pass(LEASE);
    assert_eq!(renewals(&b), [2]);
    assert!(!b.nexus.has_lease(b.now));
    b.nexus.close();
    assert!(!b.nexus.has_lease(b.now));
}

#[test]
fn a_nexus_that_is_cut_off_with_a_stale_replica_answers_no_reads() {
    let mut b = Bench::online(3);
    b.submit(1, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    b.disconnect(1);
    b.disconnect(2);
    // The lease lasts for a while: nobody else serves before it is over.
    b.submit(2, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
    b.pass(LEASE);
    b.submit(3, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.pass(LEASE * 3);
    assert_eq!(b.status_of(3), None);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    // Nobody has taken it over: it goes on where it was.
    b.connect(1);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.disconnect(1);
    b.pass(LEASE * 3);
    b.submit(4, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    // Somebody has.
    for register in &mut b.registers[1..] {
        register.promised_epoch = Epoch(99);
    }
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    assert_eq!(b.status_of(4), Some(IoStatus::PathError));
}

#[test]
fn a_majority_that_refuses_renewals_fences() {
    let mut b = Bench::online(3);
    b.hold_registers = true;
    read(&mut b, 1);
    renew(&mut b, 0, Err(IoStatus::Fenced));
    assert!(b.nexus.state().is_serving(), "one may have promised to somebody who got no further");
    renew(&mut b, 1, Err(IoStatus::Fenced));
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    assert_eq!(b.released, [1]);
}

/// A nexus of the same replicas, of this node, to which they tell that a lease lasts so long.
fn taken_over(b: Bench, holder: u128, lease_ms: u64) -> Bench {
    let n = u8::try_from(b.up.len()).unwrap();
    let mut b = b.restarted();
    b.nexus = Nexus::new(NexusConfig { holder, ..config(n, Purpose::Assemble) });
    b.registers.iter_mut().for_each(|r| r.lease_ms = lease_ms);
    (0..n).for_each(|child| b.connect(child));
    b
}

#[test]
fn whoever_takes_a_volume_over_waits_for_what_was_granted() {
    let mut b = taken_over(Bench::online(3), 5, 200);
    let said = b.nexus.state().detail().to_owned();
    assert!(said.contains("answers no reads any more"), "{said}");
    assert_eq!(b.stored_in_sync(0), [true; 3]);
    let accepted = b.registers[0].accepted_epoch;
    // One that goes meanwhile is left out, as if it had not come.
    b.disconnect(2);
    b.pass(200);
    assert!(!b.nexus.state().is_serving(), "clocks do not go alike");
    b.pass(11);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert!(b.registers[0].accepted_epoch > accepted);

    // The node that stored that comes up again, and knows that nobody else serves; another does not.
    let b = taken_over(b, 5, 200);
    assert!(b.nexus.state().is_serving());
    let b = taken_over(b, 6, 200);
    assert!(!b.nexus.state().is_serving());
    let b = taken_over(b, 0, 200);
    assert!(!b.nexus.state().is_serving());
    // One that was killed while it waited, on the same node, has proved nothing.
    let b = taken_over(b, 6, 200);
    assert!(!b.nexus.state().is_serving());
}

#[test]
fn a_nexus_that_closes_gives_its_lease_back() {
    let mut b = Bench::online(3);
    b.submit(1, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.hold_registers = true;
    b.submit(2, IoOp::Read, 0, 1);
    b.nexus.close();
    b.pump();
    assert_eq!(renewals(&b), [0, 1, 2]);
    assert!(
        b.held
            .iter()
            .all(|io| matches!(io.op, ChildOp::Register(RegisterOp::Renew { lease_ms: 0, .. })))
    );
    assert_eq!(b.status_of(2), Some(IoStatus::NotReady));
    // One that answered no reads has none to give back.
    let mut b = Bench::online(3);
    b.hold_registers = true;
    b.nexus.close();
    b.pump();
    assert!(b.held.is_empty());
}

#[test]
fn held_reads_are_answered_after_a_change_of_voters() {
    let mut b = Bench::online(1);
    let second = b.nexus.add_child(ChildSpec {
        replica: ReplicaId(2),
        local: false,
        witness: true,
        place: Place::default(),
    });
    b.registers.push(Register::default());
    b.up.push(false);
    b.broken.push(false);
    b.submit(1, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    b.connect(1);
    b.nexus.add_voter(second.unwrap(), b.now).unwrap();
    b.pump();
    // The new one has granted nothing yet.
    b.submit(2, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
    b.disconnect(1);
    b.pass(LEASE);
    b.submit(3, IoOp::Read, 0, 1);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(3), None);
}

fn states(b: &Bench) -> Vec<ChildState> {
    b.nexus.status().children.iter().map(|c| c.state).collect()
}

/// Two replicas and a witness, whose pool goes offline.
fn with_a_dead_witness() -> Bench {
    let mut registers = vec![Register::default(); 3];
    registers[2].blocks = 1;
    let mut b = Bench::new(3, Purpose::Create, registers);
    let mut config = config(3, Purpose::Create);
    config.children[2].witness = true;
    b.nexus = Nexus::new(config);
    (0..3).for_each(|i| b.connect(i));
    read(&mut b, 1);
    b.pass(LEASE);
    assert_eq!(states(&b)[2], ChildState::Witness);
    b.broken[2] = true;
    b
}

#[test]
fn a_witness_whose_pool_is_offline_shows_as_such_and_is_not_counted_on() {
    let mut b = with_a_dead_witness();
    read(&mut b, 2);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok), "the other two are a majority");
    assert_eq!(states(&b)[2], ChildState::Offline);
    assert!(
        b.nexus.status().children[2].offline && b.events.contains(&Event::ChildOffline(ChildId(2)))
    );
    // Without the other replica there is no majority that could store anything.
    assert!(matches!(b.nexus.remove_voter(ChildId(1), b.now), Err(ChangeError::NoMajority(_))));
    b.disconnect(1);
    b.pass(LEASE);
    read(&mut b, 3);
    assert_eq!(b.status_of(3), None);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    // Its process is started anew, with a pool that works.
    b.disconnect(2);
    b.broken[2] = false;
    b.connect(2);
    assert_eq!(states(&b)[2], ChildState::Witness);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
}

#[test]
fn a_witness_that_cannot_promise_keeps_its_session_and_shows_why() {
    let mut b = with_a_dead_witness().restarted();
    b.broken[2] = true;
    b.nexus = Nexus::new(NexusConfig {
        children: {
            let mut children = config(3, Purpose::Assemble).children;
            children[2].witness = true;
            children
        },
        ..config(3, Purpose::Assemble)
    });
    (0..2).for_each(|i| b.connect(i));
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.connect(2);
    assert_eq!(states(&b)[2], ChildState::Offline);
    assert!(
        !b.events.contains(&Event::ResetChild(ChildId(2))),
        "nothing would come of another session"
    );
    // It is asked with the others, and taken up should it answer after all.
    b.broken[2] = false;
    b.pass(LEASE);
    read(&mut b, 4);
    b.pump();
    assert_eq!(states(&b)[2], ChildState::Witness);
}

#[test]
fn where_nobody_reads_a_round_of_settling_tells_of_the_witness() {
    let mut b = with_a_dead_witness();
    b.write(2, 0, 1);
    (0..2).for_each(|child| b.answer(child, IoStatus::Ok));
    b.pass(LEASE);
    assert_eq!(states(&b)[2], ChildState::Witness);
    b.pass(Pace::default().settle_ms);
    assert_eq!(states(&b)[2], ChildState::Offline);
}

/// No write has to fail for it.
#[test]
fn a_replica_whose_pool_is_offline_is_taken_out_by_a_renewal_and_not_rebuilt() {
    let mut b = Bench::online(3);
    b.broken[1] = true;
    read(&mut b, 1);
    let out = ChildState::OutOfSync(FaultReason::PoolOffline);
    assert_eq!((states(&b)[1], b.nexus.state()), (out, &VolumeState::Degraded));
    assert_eq!(b.stored_in_sync(0), [true, false, true]);
    // The last one is kept, whatever it says.
    let mut b = Bench::online(1);
    b.broken[0] = true;
    b.submit(1, IoOp::Read, 0, 1);
    assert_eq!(states(&b)[0], ChildState::Offline);
    assert!(b.nexus.status().children[0].in_sync);
}

#[test]
fn a_nexus_that_reaches_no_majority_knows_once_its_lease_is_over_that_another_may_serve() {
    let mut b = Bench::online(3);
    b.nexus.config.shared = true;
    (0..8).for_each(|_| b.pass(LEASE / 8));
    b.disconnect(1);
    b.pass(LEASE);
    assert!(!b.nexus.is_cut_off(b.now), "two of three are there");
    b.disconnect(2);
    let since = b.now;
    while !b.nexus.is_cut_off(b.now) {
        b.pass(1);
        assert!(b.now < since + 2 * LEASE);
    }
    // What it had left of the lease, and half of one.
    let took = b.now - since;
    assert!((LEASE..=LEASE + LEASE / 2).contains(&took), "{took}");
    b.connect(2);
    assert!(!b.nexus.is_cut_off(b.now));
}

/// A process that was told to end stood by instead, and did not end: its sessions were closed already.
#[test]
fn who_gives_its_lease_back_is_not_cut_off() {
    let mut b = Bench::online(3);
    b.nexus.config.shared = true;
    (0..8).for_each(|_| b.pass(LEASE / 8));
    b.nexus.release_lease();
    b.pump();
    (0..3).for_each(|child| b.disconnect(child));
    b.pass(10 * LEASE);
    assert!(!b.nexus.is_cut_off(b.now));
}

#[test]
fn a_volume_that_nobody_stands_by_for_is_never_another_nexuss() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.disconnect(2);
    b.pass(100 * LEASE);
    assert!(!b.nexus.is_cut_off(b.now));
}
