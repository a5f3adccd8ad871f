//! A nexus that stands by, and takes over.

use super::*;

const AUTO: Purpose = Purpose::StandBy { auto_after_ms: Some(2 * LEASE) };
const BY_HAND: Purpose = Purpose::StandBy { auto_after_ms: None };

/// Another nexus on the replicas that `b` had; it tells of leases as the test sets them.
fn standing_by(b: Bench, purpose: Purpose) -> Bench {
    let n = u8::try_from(b.up.len()).unwrap();
    let mut b = Bench::new(n, purpose, b.registers);
    (0..n).for_each(|i| b.connect(i));
    b.pass(1);
    b
}

fn lease(b: &mut Bench, left_ms: u64) {
    for register in &mut b.registers {
        register.lease_ms = left_ms;
    }
}

fn stands_by(b: &Bench) -> &str {
    match b.nexus.state() {
        VolumeState::StandBy(text) => text,
        other => panic!("{other:?}"),
    }
}

/// Rounds of looking go by.
fn look(b: &mut Bench, rounds: u64) {
    for _ in 0..rounds {
        b.pass(LEASE / 2);
    }
}

#[test]
fn it_promises_nothing_and_says_who_serves() {
    let mut b = standing_by(Bench::online(3), BY_HAND);
    let promised = b.registers[0].promised_epoch;
    lease(&mut b, 500);
    look(&mut b, 2);
    assert!(stands_by(&b).contains("another nexus serves"), "{}", stands_by(&b));
    b.write(1, 0, 1);
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    lease(&mut b, 0);
    look(&mut b, 50);
    assert!(stands_by(&b).contains("cairn volume takeover"), "{}", stands_by(&b));
    assert_eq!(b.registers[0].promised_epoch, promised);
    b.disconnect(1);
    b.disconnect(2);
    look(&mut b, 2);
    assert!(stands_by(&b).contains("too few replicas"), "{}", stands_by(&b));
}

#[test]
fn it_takes_over_when_it_is_told_to() {
    let mut b = standing_by(Bench::online(3), BY_HAND);
    let epoch = b.registers[0].promised_epoch;
    assert!(b.nexus.activate(b.now));
    b.pump();
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    assert!(b.registers.iter().all(|r| r.promised_epoch > epoch));
    assert!(!b.nexus.activate(b.now), "it serves already");
}

#[test]
fn it_takes_over_by_itself_once_a_majority_tells_of_no_lease_and_not_before() {
    let mut b = standing_by(Bench::online(3), AUTO);
    lease(&mut b, 500);
    look(&mut b, 50);
    stands_by(&b);
    // One that is heard and tells of a lease is enough.
    lease(&mut b, 0);
    b.registers[2].lease_ms = 1;
    look(&mut b, 50);
    stands_by(&b);
    // Too few to tell.
    b.registers[2].lease_ms = 0;
    b.disconnect(0);
    b.disconnect(1);
    look(&mut b, 50);
    stands_by(&b);
    b.connect(0);
    look(&mut b, 4);
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
}

#[test]
fn it_gives_a_nexus_that_has_just_stopped_time_to_be_followed_by_another() {
    let mut b = standing_by(Bench::online(3), AUTO);
    look(&mut b, 3);
    assert!(stands_by(&b).contains("in a moment"));
    look(&mut b, 2);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn it_does_not_cross_one_that_comes_up() {
    let mut b = standing_by(Bench::online(3), AUTO);
    lease(&mut b, 500);
    look(&mut b, 50);
    lease(&mut b, 0);
    b.pass(LEASE / 2);
    for _ in 0..10 {
        // Somebody takes an epoch each time that it looks.
        b.registers[1].promised_epoch.0 += 1;
        b.pass(LEASE / 8);
        stands_by(&b);
    }
    b.pass(LEASE / 8);
    b.pass(LEASE / 8);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn it_learns_that_the_volume_has_grown() {
    let mut b = Bench::online(3);
    b.nexus.resize(1500, b.now).unwrap();
    b.pump();
    let b = standing_by(b, BY_HAND);
    assert_eq!(b.nexus.blocks(), 1500);
    assert!(b.events.contains(&Event::Resized(1500)));
}

#[test]
fn a_volume_that_others_stand_by_for_keeps_its_lease() {
    let mut b = Bench::online(3);
    b.nexus.config.shared = true;
    b.hold_registers = true;
    let mut renewed = 0;
    for _ in 0..20 {
        b.pass(LEASE / 4);
        renewed += b
            .held
            .iter()
            .filter(|io| matches!(io.op, ChildOp::Register(RegisterOp::Renew { .. })))
            .count();
        b.answer_registers();
        b.hold_registers = true;
    }
    assert!((3 * 8..=3 * 12).contains(&renewed), "{renewed}");
    b.nexus.release_lease();
    b.pump();
    b.held.clear();
    b.pass(LEASE);
    assert!(b.held.is_empty(), "it was given back");
}

fn placed(b: &mut Bench, child: usize, place: u8) {
    let mut config = Config::decode(&b.registers[child].config).unwrap();
    for (at, member) in (0u8..).zip(&mut config.members) {
        member.place = Place([place + at; PLACE]);
    }
    let config = config.encode();
    b.registers.iter_mut().for_each(|r| r.config.clone_from(&config));
}

/// Stands by as `configure` has it.
fn standing_by_as(b: Bench, purpose: Purpose, configure: impl Fn(&mut NexusConfig)) -> Bench {
    let n = u8::try_from(b.up.len()).unwrap();
    let mut b = Bench::new(n, purpose, b.registers);
    let mut as_told = config(n, purpose);
    configure(&mut as_told);
    b.nexus = Nexus::new(as_told);
    (0..n).for_each(|i| b.connect(i));
    b.pass(1);
    b
}

#[test]
fn it_never_takes_the_volume_for_smaller_than_it_was() {
    let mut b = Bench::online(3);
    let before = b.registers[2].clone();
    b.nexus.resize(1500, b.now).unwrap();
    b.pump();
    b.registers[2] = before;
    let mut b = standing_by(b, BY_HAND);
    assert_eq!(b.nexus.blocks(), 1500);
    // Only the one is left that has not heard of it.
    b.disconnect(0);
    b.disconnect(1);
    look(&mut b, 3);
    assert_eq!(b.nexus.blocks(), 1500);
    assert!(!b.events.contains(&Event::Resized(1000)));
}

#[test]
fn it_is_told_where_members_are_that_it_does_not_know_and_those_that_do_not_come() {
    let mut b = Bench::online(3);
    placed(&mut b, 0, 1);
    let place = |replica, place| Event::Place {
        replica: ReplicaId(replica),
        witness: false,
        place: Place([place; PLACE]),
    };
    let mut b = Bench { up: vec![false; 2], ..b };
    b.nexus = Nexus::new(config(2, BY_HAND));
    b.connect(0);
    b.pass(1);
    assert!(b.events.contains(&place(2, 2)), "it may be there: {:?}", b.events);
    assert!(b.events.contains(&place(3, 3)), "nobody has named it: {:?}", b.events);
    assert!(!b.events.contains(&place(1, 1)), "it is up");
    // Once it knows it, it serves with it, and says what it has learnt.
    let third =
        ChildSpec { replica: ReplicaId(3), local: false, witness: false, place: Place([3; PLACE]) };
    b.up.push(false);
    b.nexus.add_child(third).unwrap();
    b.connect(2);
    look(&mut b, 2);
    assert!(b.nexus.activate(b.now));
    b.pump();
    b.pass(WAIT);
    assert!(b.nexus.state().is_serving(), "{:?}", b.nexus.state());
    let stored = Config::decode(&b.registers[0].config).unwrap();
    assert_eq!(
        stored.member(ReplicaId(2)).unwrap().place,
        Place([2; PLACE]),
        "kept as it was found"
    );
    b.connect(1);
    b.nexus.set_place(ChildId(1), Place([9; PLACE]));
    b.nexus.resize(1100, b.now).unwrap();
    b.pump();
    let stored = Config::decode(&b.registers[0].config).unwrap();
    assert_eq!(stored.member(ReplicaId(2)).unwrap().place, Place([9; PLACE]));
}

#[test]
fn blocks_of_another_size_keep_it_from_taking_over() {
    let mut b = Bench::new(3, Purpose::Create, vec![Register::default(); 3]);
    b.nexus = Nexus::new(NexusConfig { block_size: 512, ..config(3, Purpose::Create) });
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    let mut b = standing_by_as(b, AUTO, |c| c.block_size = 4096);
    let promised = b.registers[0].promised_epoch;
    look(&mut b, 50);
    assert!(stands_by(&b).contains("blocks of 512 bytes"), "{}", stands_by(&b));
    assert!(b.nexus.unfit().is_some_and(|why| why.contains("4096")));
    assert_eq!(b.registers[0].promised_epoch, promised, "the volume is left alone");
    // Even where nobody asks first.
    assert!(b.nexus.activate(b.now));
    b.pump();
    assert!(matches!(b.nexus.state(), VolumeState::Refused(why) if why.contains("512")));
    assert_eq!(b.registers[0].promised_epoch, promised);

    let mut b = standing_by_as(b, AUTO, |c| c.block_size = 0);
    assert_eq!((b.nexus.block_size(), b.nexus.unfit()), (512, None));
    look(&mut b, 8);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn without_its_key_it_says_so_and_does_not_take_over() {
    let mut b = Bench::new(3, Purpose::Create, vec![Register::default(); 3]);
    let encryption = Some(b"one".to_vec());
    b.nexus = Nexus::new(NexusConfig { encryption, ..config(3, Purpose::Create) });
    (0..3).for_each(|i| b.connect(i));
    let mut b = standing_by_as(b, AUTO, |c| c.encryption = Some(Vec::new()));
    let asked = |b: &Bench| b.events.iter().filter(|e| **e == Event::Locked).count();
    assert_eq!((asked(&b), b.nexus.locked()), (1, &b"one"[..]));
    b.nexus.refuse_key("no key file");
    let promised = b.registers[0].promised_epoch;
    look(&mut b, 50);
    assert!(stands_by(&b).contains("no key file"), "{}", stands_by(&b));
    assert_eq!((asked(&b), b.registers[0].promised_epoch), (1, promised));
    // The key was changed where the volume is served: it is looked for again, and this one is there.
    let mut config = Config::decode(&b.registers[0].config).unwrap();
    config.encryption = b"two".to_vec();
    for register in &mut b.registers {
        (register.config, register.seq) = (config.encode(), register.seq + 1);
    }
    look(&mut b, 1);
    assert_eq!((asked(&b), b.nexus.locked()), (2, &b"two"[..]));
    b.nexus.unlock(b.now);
    assert_eq!(b.nexus.unfit(), None);
    look(&mut b, 8);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn it_tells_why_it_was_refused_the_last_time() {
    let mut b = standing_by(Bench::online(3), BY_HAND);
    b.nexus.note_refusal("two of them differ");
    look(&mut b, 1);
    assert!(stands_by(&b).contains("two of them differ"), "{}", stands_by(&b));
}

#[test]
fn of_two_that_take_over_by_themselves_one_gives_way() {
    let mut b = standing_by(Bench::online(3), AUTO);
    // One replica hangs: its register is waited for.
    b.hold_registers = true;
    look(&mut b, 1);
    let answer = |b: &mut Bench| {
        let held: Vec<ChildIo> = b.held.drain(..).collect();
        for io in held {
            if io.child == ChildId(2) {
                b.held.push_back(io);
                continue;
            }
            let reply = b.obey(&io);
            b.nexus.handle_register(io.child, io.ticket, reply, b.now);
            b.pump();
        }
    };
    while matches!(b.nexus.state(), VolumeState::StandBy(_)) {
        answer(&mut b);
        b.pass(LEASE / 8);
    }
    answer(&mut b);
    assert!(matches!(b.nexus.state(), VolumeState::Assembling(_)), "{:?}", b.nexus.state());
    // Meanwhile another one has come up.
    for register in &mut b.registers[..2] {
        register.promised_epoch.0 += 1;
        register.lease_ms = LEASE;
    }
    let promised = b.registers[0].promised_epoch;
    for _ in 0..8 {
        b.pass(WAIT / 2);
        answer(&mut b);
    }
    assert!(stands_by(&b).contains("another nexus serves"), "{}", stands_by(&b));
    assert_eq!(b.registers[0].promised_epoch, promised, "it was left alone");
    // Told to by hand it does take over.
    assert!(b.nexus.activate(b.now));
    for _ in 0..8 {
        b.pass(WAIT / 2);
        answer(&mut b);
    }
    assert!(b.registers[0].promised_epoch > promised);
}

/// Whoever serves died: its lease lasts until `until_ms`. How long after that the volume is served again.
fn taken_over_after(b: &mut Bench, until_ms: u64) -> u64 {
    while !b.nexus.state().is_serving() {
        let left = until_ms.saturating_sub(b.now);
        lease(b, left);
        b.pass(1);
        assert!(b.now < until_ms + 50 * LEASE, "{:?}", b.nexus.state());
    }
    b.now.saturating_sub(until_ms)
}

/// It stands by for a volume that is served, and takes over from now on.
fn ready_to_take_over(n: u8) -> Bench {
    let mut b = standing_by(Bench::online(n), AUTO);
    lease(&mut b, LEASE);
    look(&mut b, 8);
    b
}

#[test]
fn it_sees_the_end_of_a_lease_at_once() {
    for left in [LEASE / 2, LEASE / 2 + 1, LEASE - 20, LEASE] {
        let mut b = ready_to_take_over(3);
        let until = b.now + left;
        let took = taken_over_after(&mut b, until);
        assert!((LEASE / 8..=LEASE / 4 + 5).contains(&took), "{left}: {took}");
    }
}

#[test]
fn a_replica_that_died_with_the_nexus_has_had_its_time_by_then() {
    for n in [3, 5] {
        let mut b = ready_to_take_over(n);
        let died = b.now;
        b.disconnect(0);
        taken_over_after(&mut b, died + LEASE);
        assert_eq!(*b.nexus.state(), VolumeState::Degraded);
        let took = b.now - died;
        assert!((WAIT..WAIT + 10).contains(&took), "{n}: {took} ms, it was given {WAIT}");
    }
}

#[test]
fn a_replica_that_hangs_with_the_nexus_has_had_its_time_by_then() {
    let mut b = ready_to_take_over(3);
    b.hold_registers = true;
    let died = b.now;
    while !b.nexus.state().is_serving() {
        let left = (died + LEASE).saturating_sub(b.now);
        lease(&mut b, left);
        for io in std::mem::take(&mut b.held) {
            if io.child != ChildId(0) {
                let reply = b.obey(&io);
                b.nexus.handle_register(io.child, io.ticket, reply, b.now);
                b.pump();
            }
        }
        b.pass(1);
        assert!(b.now < died + 50 * LEASE, "{:?}", b.nexus.state());
    }
    // It is asked something every half lease.
    let took = b.now - died;
    assert!((WAIT..WAIT + LEASE / 2 + 20).contains(&took), "{took}");
}

#[test]
fn one_that_is_back_when_the_volume_is_taken_over_is_waited_for() {
    let mut b = ready_to_take_over(3);
    b.disconnect(0);
    look(&mut b, 10);
    b.connect(0);
    let until = b.now;
    taken_over_after(&mut b, until);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn who_is_away_while_too_few_are_there_has_its_time_from_when_enough_are() {
    let mut b = ready_to_take_over(3);
    b.disconnect(0);
    b.disconnect(1);
    lease(&mut b, 0);
    b.pass(20 * WAIT);
    look(&mut b, 10);
    stands_by(&b);
    b.connect(1);
    let back = b.now;
    taken_over_after(&mut b, back);
    assert!(b.now >= back + WAIT, "{} ms", b.now - back);
}

#[test]
fn those_who_see_the_end_of_a_lease_at_the_same_moment_do_not_take_over_at_the_same_moment() {
    let of = |holder| {
        let b = standing_by(Bench::online(3), AUTO);
        let mut b = standing_by_as(b, AUTO, |c| c.holder = holder);
        lease(&mut b, LEASE);
        look(&mut b, 8);
        let until = b.now + LEASE;
        taken_over_after(&mut b, until)
    };
    let all: std::collections::BTreeSet<u64> = (1..20).map(of).collect();
    assert!(all.len() > 8, "{all:?}");
}
