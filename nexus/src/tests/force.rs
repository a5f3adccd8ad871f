//! Starts by force, from one replica, and what is said of the others after that.

use super::*;

const fn id(at: u8) -> ReplicaId {
    ReplicaId(at as u128 + 1)
}

/// The replicas of `b` under a nexus that takes the volume from one of them.
fn forced(b: Bench, source: u8, random: u32) -> Bench {
    let n = u8::try_from(b.up.len()).unwrap();
    let mut b = b.restarted();
    b.nexus = Nexus::new(config(n, Purpose::ForceStart { source: id(source), random }));
    b
}

fn lineage(b: &Bench, child: usize) -> u64 {
    Config::decode(&b.registers[child].config).unwrap().lineage
}

/// A volume of three whose third member has missed a write.
fn stale_third() -> Bench {
    let mut b = Bench::online(3);
    b.disconnect(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    b
}

#[test]
fn a_stale_replica_starts_a_volume_by_force_and_nobody_else_does_after_that() {
    let mut b = forced(stale_third(), 2, 7);
    b.connect(1);
    b.pass(5_000);
    assert!(!b.nexus.state().is_serving(), "without its source it does not start");
    b.disconnect(1);
    b.connect(2);
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Online, "of one member");
    assert!(b.events.contains(&Event::Forced { source: id(2), lineage: 1 << 32 | 7 }));
    assert_eq!(lineage(&b, 2), 1 << 32 | 7);
    let config = Config::decode(&b.registers[2].config).unwrap();
    assert_eq!(config.members.len(), 1);
    b.write(1, 0, 1);
    b.answer(2, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));

    // The others come back to a nexus that knows of it.
    b.connect(0);
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    let state = b.nexus.status().children[0].state;
    assert_eq!(state, ChildState::Idle(FaultReason::OldLineage));
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    b.connect(2);
    b.pass(5_000);
    b.pass(5_000);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    let states: Vec<_> = b.nexus.status().children.iter().map(|c| c.state).collect();
    let old = ChildState::Idle(FaultReason::OldLineage);
    assert_eq!(states, [old, old, ChildState::Online]);
    // Added anew, one is a member without anything that counts.
    b.nexus.add_voter(ChildId(0), b.now).unwrap();
    b.pump();
    let config = Config::decode(&b.registers[0].config).unwrap();
    let first = config.member(id(0)).unwrap();
    assert_eq!((first.in_sync, first.since, config.lineage), (false, 0, 1 << 32 | 7));
}

#[test]
fn those_that_are_there_at_a_forced_start_hear_of_it() {
    let mut b = forced(stale_third(), 2, 7);
    b.connect(0);
    b.connect(1);
    b.connect(2);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    assert_eq!([lineage(&b, 0), lineage(&b, 1)], [1 << 32 | 7; 2]);
    // They do not come up without it, although they were a majority of the older lineage.
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    b.pass(5_000);
    let said = b.nexus.state().detail().to_owned();
    assert!(said.contains(&format!("none is here; missing: replica {}", id(2))), "{said}");
}

#[test]
fn two_forced_starts_that_did_not_know_of_each_other_are_told_apart() {
    let stale = stale_third();
    let before = stale.registers.clone();
    let mut b = forced(stale, 2, 7);
    b.connect(2);
    b.pass(WAIT);
    let third = b.registers[2].clone();
    let mut b = Bench::new(3, Purpose::Assemble, before);
    b = forced(b, 0, 9);
    b.connect(0);
    b.pass(WAIT);
    assert_eq!(lineage(&b, 0), 1 << 32 | 9);
    b.registers[2] = third;
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    b.connect(2);
    b.pass(WAIT);
    let state = b.nexus.state().clone();
    assert!(
        matches!(&state, VolumeState::Refused(why) if why.contains("by force twice")),
        "{state:?}"
    );
    // A third settles it.
    let mut b = forced(b, 0, 11);
    (0..3).for_each(|at| b.connect(at));
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    assert_eq!(lineage(&b, 2), 2 << 32 | 11);
}

#[test]
fn an_empty_replica_is_not_taken_by_force() {
    let mut b = stale_third();
    b.registers[2] = Register::default();
    let mut b = forced(b, 2, 7);
    (0..3).for_each(|at| b.connect(at));
    b.pass(WAIT);
    let state = b.nexus.state();
    assert!(
        matches!(state, VolumeState::Refused(why) if why.contains("holds nothing")),
        "{state:?}"
    );
}
