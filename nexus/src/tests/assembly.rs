//! How a volume comes up, and who is given up while it serves.

use super::*;

#[test]
fn a_restart_takes_a_newer_epoch_and_serves_the_same_members() {
    let mut b = Bench::online(3);
    let epoch = b.nexus.status().epoch;
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    let status = b.nexus.status();
    assert!(status.epoch > epoch);
    assert!(!status.children[2].in_sync, "a stale member stays out");
    assert_eq!(status.children[2].state, ChildState::OutOfSync(FaultReason::Stale));
}

#[test]
fn a_stale_member_never_starts_a_volume() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    let mut b = b.restarted();
    b.connect(1);
    b.connect(2);
    b.pass(WAIT);
    let VolumeState::Assembling(why) = b.nexus.state() else { panic!("{:?}", b.nexus.state()) };
    assert!(why.contains(&ReplicaId(1).to_string()), "{why}");
    b.connect(0);
    b.pass(WAIT * 10);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert!(b.nexus.status().children[0].in_sync);
}

#[test]
fn two_nexuses_cannot_both_serve() {
    let mut b = Bench::online(3);
    let epoch = b.nexus.status().epoch;
    // Another nexus has taken the volume over behind this one's back.
    for r in &mut b.registers {
        r.promised_epoch = Epoch(epoch.0 + 1);
    }
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::Fenced);
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    b.write(2, 0, 1);
    assert_eq!(b.status_of(2), Some(IoStatus::PathError));
}

#[test]
fn replicas_of_another_volume_are_refused() {
    let b = Bench::online(2);
    let mut cfg = config(2, Purpose::Assemble);
    cfg.volume = VolumeId(5);
    let mut b = b.restarted();
    b.nexus = Nexus::new(cfg);
    b.connect(0);
    b.connect(1);
    assert!(matches!(b.nexus.state(), VolumeState::Refused(_)));
    // And a volume is not created over another one.
    let registers = b.registers.clone();
    let mut cfg = config(2, Purpose::Create);
    cfg.volume = VolumeId(5);
    let mut b = Bench::new(2, Purpose::Create, registers);
    b.nexus = Nexus::new(cfg);
    b.connect(0);
    b.connect(1);
    assert!(matches!(b.nexus.state(), VolumeState::Refused(_)));
}

#[test]
fn a_short_absence_without_writes_costs_nothing() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.write(1, 0, 1);
    assert_eq!(b.pending(1), 1);
}

/// Both replicas failed a write of their own before the first failure was recorded. The second, by
/// then the only member left, was marked as failing too; nothing ever took that mark away, and the
/// volume served nothing any more, not even when its replica was healthy again.
#[test]
fn the_last_member_is_never_given_up() {
    let mut b = Bench::online(2);
    b.write(1, 0, 1);
    b.write(2, 8, 1);
    b.hold_registers = true;
    b.answer(0, IoStatus::MediaError);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    assert_eq!((b.status_of(1), b.status_of(2)), (None, None));
    b.answer_registers();
    assert_eq!(b.status_of(1), Some(IoStatus::Ok), "the member that stays has it");
    assert_eq!(b.status_of(2), Some(IoStatus::MediaError), "only the one that left has it");
    assert!(b.nexus.status().children[1].state == ChildState::Online);
    b.write(3, 0, 1);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
}

/// All replicas stood still for longer than the deadline (their machine was suspended, a switch
/// rebooted). Each was given up, the last one too; the write was answered with an error while every
/// replica could still carry it out, and a later write to the same blocks could be overtaken by it.
#[test]
fn when_everybody_is_late_nobody_is_given_up() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.pass(DEADLINE * 3);
    assert_eq!(b.status_of(1), None);
    assert!(!b.events.iter().any(|e| matches!(e, Event::ResetChild(_) | Event::ChildFailing(..))));
    b.write(2, 0, 8);
    assert_eq!(b.pending(0), 1, "the later write still waits for its turn");
    (0..3).for_each(|c| b.answer(c, IoStatus::Ok));
    (0..3).for_each(|c| b.answer(c, IoStatus::Ok));
    assert_eq!((b.status_of(1), b.status_of(2)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

/// A late last member: as above, with one replica in sync.
/// A nexus was stopped while one of three lost power: to it the other two were late, it went on with the third alone, and
/// what that one had lost was gone.
#[test]
fn nobody_is_given_up_for_one_that_is_silent() {
    let mut b = Bench::online(3);
    (10..19).for_each(|tag| b.submit(tag, IoOp::Read, 8 * tag, 1));
    b.submit(3, IoOp::Flush, 0, 0);
    b.answer(2, IoStatus::Ok);
    assert_eq!([b.pending(0), b.pending(1), b.pending(2)], [9, 2, 0], "a run of reads, and one");
    b.hold_registers = true;
    b.pass(DEADLINE * 2);
    assert_eq!(b.stored_in_sync(0), [true; 3]);
    let asked: Vec<u8> = b.held.iter().map(|io| io.child.0).collect();
    assert_eq!(asked, [0, 1, 2], "whether they are there");
    b.pass(DEADLINE);
    assert_eq!(b.held.len(), 3, "once");
    b.held.retain(|io| io.child == ChildId(2));
    b.answer_registers();
    assert_eq!(b.stored_in_sync(2), [false, false, true], "one is, and goes on");
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
}

#[test]
fn a_late_last_member_answers_in_the_end() {
    let mut b = Bench::online(1);
    b.submit(1, IoOp::Read, 0, 1);
    b.write(2, 8, 1);
    b.pass(DEADLINE * 2);
    b.answer(0, IoStatus::Ok);
    b.answer(0, IoStatus::Ok);
    assert_eq!((b.status_of(1), b.status_of(2)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
}

/// Two of three pools failed in the same moment. Replicas that failed were not asked to store the
/// configuration, though they were there; no majority was left, and the write hung for ever.
#[test]
fn a_replica_that_failed_a_write_still_votes() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
}

/// A voter could not store the configuration just then (no memory for the page, say). It was never
/// asked again while its session lived, and the writes that waited for the commit hung.
#[test]
fn a_voter_that_refused_is_asked_again() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.broken = vec![true; 3];
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    assert!(b.nexus.poll_timeout(b.now).is_some());
    b.broken = vec![false; 3];
    b.pass(DEADLINE / 8);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(1), [true, true, false]);
}

/// Every session is lost for a moment, as when the replicas' machine restarts. What was in flight
/// and what came meanwhile was answered with a path error, which a Linux host without another path
/// repeats five times in a row and then makes an I/O error of.
#[test]
fn requests_wait_while_no_member_is_there() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.submit(2, IoOp::Read, 8, 1);
    (0..3).for_each(|c| b.disconnect(c));
    b.write(3, 16, 1);
    b.submit(4, IoOp::Read, 24, 1);
    b.pass(DEADLINE * 2);
    assert!(b.done.is_empty(), "{:?}", b.done);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    (0..3).for_each(|c| b.connect(c));
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    for tag in 1..=4 {
        assert_eq!(b.status_of(tag), Some(IoStatus::Ok), "{tag}");
    }
    // Whoever is back first has it all; the others went when the writes were done without them.
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(b.nexus.in_flight(), 0);
    b.released.sort_unstable();
    assert_eq!(b.released, [1, 2, 3, 4]);
}

/// The disk of one replica is dead: its register can be read and not written. The promise failed
/// there, assembly began again with everybody, failed there again, and so on for ever.
#[test]
fn a_replica_with_a_dead_disk_does_not_hold_up_assembly() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.broken[2] = true;
    (0..3).for_each(|i| b.connect(i));
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    assert_eq!(b.stored_in_sync(0), [true, true, false]);
    // A new volume still wants all of them.
    let mut b = Bench::new(2, Purpose::Create, vec![Register::default(); 2]);
    b.broken[1] = true;
    (0..2).for_each(|i| b.connect(i));
    b.pass(WAIT * 10);
    assert!(!b.nexus.state().is_serving());
}

/// A replica that comes and goes. Each time it came assembly began again, so the wait for it never
/// ended.
#[test]
fn a_replica_that_flaps_does_not_hold_up_assembly() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    for _ in 0..4 {
        b.pass(WAIT / 4);
        b.hold_registers = true;
        b.connect(2);
        b.disconnect(2);
        b.answer_registers();
    }
    b.pass(WAIT / 4);
    assert!(b.nexus.state().is_serving(), "{:?}", b.nexus.state());
}

/// The sessions with two of three replicas are lost while the epoch's first configuration is being
/// stored. They came back and were not asked again: the volume never came up. And the one of them
/// whose answer was not needed any more was used without its new session being bound to the epoch:
/// its first write was refused, and that took it out of the volume.
#[test]
fn a_replica_that_comes_back_while_the_first_configuration_is_stored() {
    let b = Bench::online(3);
    let mut b = b.restarted();
    b.connect(0);
    b.connect(1);
    b.hold_registers = true;
    b.connect(2);
    // The registers are read and promised; then the answers to the commit are lost.
    while !b.held.iter().any(|io| matches!(io.op, ChildOp::Register(RegisterOp::Accept(_)))) {
        let io = b.held.pop_front().unwrap();
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
    }
    let lost: Vec<ChildIo> = b.held.drain(..).filter(|io| io.child != ChildId(0)).collect();
    for io in &lost {
        b.nexus.handle_register(io.child, io.ticket, Err(IoStatus::PathError), b.now);
    }
    b.disconnect(1);
    b.disconnect(2);
    b.connect(1);
    b.connect(2);
    let mut bound = Vec::new();
    while let Some(io) = b.held.pop_front() {
        if matches!(io.op, ChildOp::Register(RegisterOp::Promise { again: true, .. })) {
            bound.push(io.child.0);
        }
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
        if b.nexus.state().is_serving() {
            break;
        }
    }
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    // They are before they tell what they have.
    assert_eq!(bound, [1, 2]);
    b.answer_registers();
    b.write(1, 0, 1);
    assert_eq!((b.pending(0), b.pending(1), b.pending(2)), (1, 1, 1));
}

/// A process makes a volume and is killed before it remembers that it did. At its next start it
/// found its own volume on the replicas and refused to create it over itself: the data on it could
/// not be reached any more.
#[test]
fn a_volume_that_was_created_already_is_taken_up() {
    let b = Bench::online(3);
    let mut b = Bench::new(3, Purpose::Create, b.registers);
    b.connect(0);
    b.connect(1);
    b.pass(WAIT);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded, "and one of three may be missing");
}

/// It may have lost power meanwhile, and they have all.
#[test]
fn members_that_are_late_are_not_given_up_for_one_that_is_away() {
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.disconnect(0);
    b.pass(DEADLINE * 2);
    assert_eq!(b.nexus.in_sync.iter().count(), 3);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
}
