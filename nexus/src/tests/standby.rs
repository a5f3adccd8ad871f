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
