//! What becomes of requests, where replicas answer, fail, or are late.

use super::*;

#[test]
fn a_write_is_acked_when_the_last_replica_has_it() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(1), None);
    b.answer(2, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.released, [1]);
}

/// One replica refused, and the nexus took it for a fault of that replica's: it left it out, told the
/// others so, and went on.
#[test]
fn one_replica_that_has_promised_a_newer_epoch_ends_it_all() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.submit(2, IoOp::Read, 100, 1);
    b.answer(1, IoStatus::Fenced);
    assert_eq!(*b.nexus.state(), VolumeState::Fenced);
    // Of the path, not of the volume: a host looks for another nexus.
    assert_eq!(b.status_of(1), Some(IoStatus::PathError));
    assert_eq!(b.status_of(2), Some(IoStatus::PathError));
    assert_eq!(b.stored_in_sync(0), [true, true, true]);
    b.write(3, 0, 8);
    assert_eq!(b.status_of(3), Some(IoStatus::PathError));
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!(b.released.len(), 3);
    assert_eq!(b.nexus.in_flight(), 0);
}

#[test]
fn flush_and_fua_reach_every_replica() {
    let mut b = Bench::online(3);
    b.submit(1, IoOp::Flush, 0, 0);
    b.submit(2, IoOp::Write { fua: true }, 0, 1);
    for child in 0..3 {
        assert_eq!(b.pending(child), 2);
    }
    assert!(
        b.io.iter()
            .any(|i| matches!(i.op, ChildOp::Io(IoRequest { op: IoOp::Write { fua: true }, .. })))
    );
}

#[test]
fn a_failed_replica_is_out_on_a_majority_before_the_ack() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(2, IoStatus::Ok);
    b.answer(1, IoStatus::MediaError);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    // The bench answers registers at once; what counts is that they hold it.
    assert_eq!(b.stored_in_sync(0), [true, false, true]);
    assert_eq!(b.stored_in_sync(2), [true, false, true]);
    assert_eq!(*b.nexus.state(), VolumeState::Degraded);
    let committed = b.events.iter().rposition(|e| matches!(e, Event::Committed { .. })).unwrap();
    let failing = b.events.iter().position(|e| matches!(e, Event::ChildFailing(..))).unwrap();
    assert!(failing < committed);
    // Later writes go to the two that are left.
    b.write(2, 0, 8);
    assert_eq!(b.pending(1), 0);
}

#[test]
fn without_a_majority_the_write_is_held_until_one_is_back() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.disconnect(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(1), None);
    assert_eq!(*b.nexus.state(), VolumeState::Suspended);
    b.connect(2);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, false, false]);
    assert_eq!(b.stored_in_sync(2), [true, false, false]);
}

#[test]
fn a_replica_that_is_late_is_reset_and_taken_out_but_keeps_the_buffer() {
    let mut b = Bench::online(3);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.pass(DEADLINE);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert!(b.events.contains(&Event::ResetChild(ChildId(2))));
    assert!(b.released.is_empty(), "the late replica may still read the buffer");
    b.disconnect(2);
    assert_eq!(b.released, [1]);
}

#[test]
fn a_replica_that_was_fast_is_given_up_sooner_and_a_flush_has_its_time() {
    let mut b = Bench::online(3);
    let fast = NexusConfig { child_deadline_min_ms: 100, ..config(3, Purpose::Assemble) };
    b.nexus.config = fast;
    for tag in 0..500 {
        b.write(tag, 0, 1);
        (0..3).for_each(|child| b.answer(child, IoStatus::Ok));
    }
    b.submit(1000, IoOp::Flush, 0, 0);
    (0..2).for_each(|child| b.answer(child, IoStatus::Ok));
    b.pass(DEADLINE - 101);
    assert_eq!(b.status_of(1000), None);
    assert_eq!(b.stored_in_sync(0), [true; 3]);
    b.write(1001, 0, 1);
    (0..2).for_each(|child| b.answer(child, IoStatus::Ok));
    b.pass(100);
    assert_eq!(b.status_of(1001), Some(IoStatus::Ok));
    assert_eq!(b.stored_in_sync(0), [true, true, false]);
    assert_eq!(b.nexus.status().children[2].failures, 1);
    assert!(b.nexus.hold_off_ms(ChildId(2), b.now).is_some_and(|ms| ms <= 1_000));
    assert_eq!(b.nexus.hold_off_ms(ChildId(1), b.now), None);
}

#[test]
fn a_failure_of_all_is_the_hosts_to_know_and_nobody_is_dropped() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.answer(0, IoStatus::MediaError);
    b.answer(1, IoStatus::MediaError);
    assert_eq!(b.status_of(1), None, "a part may be done, and they are made alike first");
    while let Some(child) = b.io.front().map(|io| io.child.0) {
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!(b.status_of(1), Some(IoStatus::MediaError));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.write(2, 0, 8);
    b.answer(0, IoStatus::InvalidField);
    b.answer(1, IoStatus::InvalidField);
    assert_eq!(b.status_of(2), Some(IoStatus::InvalidField));
}

/// A snapshot call: one that has it not to do is as good a member as before, one that fails is out.
#[test]
fn snapshot_calls_tell_a_refusal_from_a_failure() {
    use cairn_block::SnapshotVerb::{Clone, Create, Restore};
    let call = |b: &mut Bench, tag, verb, second| {
        let blocks = b.nexus.blocks();
        b.submit(tag, IoOp::Snapshot(verb), 0, blocks);
        b.answer(0, IoStatus::Ok);
        b.answer(1, second);
        (b.status_of(tag), b.nexus.is_whole())
    };
    for verb in [Create, Clone] {
        let mut b = Bench::online(3);
        b.disconnect(2);
        b.write(1, 0, 1);
        (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
        let told = call(&mut b, 2, verb, IoStatus::InvalidField);
        assert_eq!(told.0, Some(IoStatus::InvalidField), "{verb:?}");
        assert_eq!(b.nexus.status().children.iter().filter(|c| c.in_sync).count(), 2);
    }
    for (verb, status) in [(Create, IoStatus::MediaError), (Restore, IoStatus::InvalidField)] {
        let mut b = Bench::online(3);
        b.disconnect(2);
        b.write(1, 0, 1);
        (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
        b.connect(2);
        let told = call(&mut b, 2, verb, status);
        assert_eq!(told.0, Some(IoStatus::Ok), "{verb:?}: whoever is in sync has done it");
        assert_eq!(b.nexus.status().children.iter().filter(|c| c.in_sync).count(), 1);
    }
}

#[test]
fn overlapping_writes_reach_every_replica_in_one_order() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.write(2, 4, 8);
    b.write(3, 100, 1);
    assert_eq!(b.pending(0), 2, "the overlapping one waits");
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(b.pending(0), 2, "and runs when its turn has come");
}

#[test]
fn a_read_waits_for_a_write_in_flight_that_it_overlaps() {
    let mut b = Bench::online(2);
    b.write(1, 0, 8);
    b.submit(2, IoOp::Read, 7, 1);
    assert_eq!(b.io.len(), 2);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.io.len(), 1);
    assert_eq!(b.status_of(2), None);
}

#[test]
fn reads_go_to_the_least_loaded_a_few_in_a_row() {
    let mut b = Bench::online(3);
    for tag in 0..24 {
        b.submit(tag, IoOp::Read, tag, 1);
    }
    assert!((0..3).all(|c| b.pending(c) == 8), "each has a run");
    (0..24).for_each(|_| b.answer(b.io[0].child.0, IoStatus::Ok));
    // One at a time they go round.
    let mut readers = Vec::new();
    for tag in 24..72 {
        b.submit(tag, IoOp::Read, tag, 1);
        readers.push(b.io[0].child.0);
        b.answer(b.io[0].child.0, IoStatus::Ok);
    }
    assert!((0..3).all(|c| readers.iter().filter(|&&r| r == c).count() == 16), "{readers:?}");
    // Who is behind is left out.
    (0..3).for_each(|tag| b.submit(100 + tag, IoOp::Read, tag, 1));
    let slow = b.io[0].child.0;
    for tag in 0..30 {
        b.submit(200 + tag, IoOp::Read, tag, 1);
        let other = b.io.iter().map(|io| io.child.0).find(|&c| c != slow);
        if let Some(other) = other {
            b.answer(other, IoStatus::Ok);
        }
    }
    assert!(b.pending(slow) <= 16, "{}", b.pending(slow));
}

#[test]
fn reads_are_retried_elsewhere() {
    let mut b = Bench::online(3);
    for tag in 0..3 {
        b.submit(tag, IoOp::Read, tag, 1);
    }
    let first = b.io[0].child.0;
    assert_eq!(b.pending(first), 3);
    b.answer(first, IoStatus::MediaError);
    assert_eq!(b.status_of(0), None);
    assert_eq!(b.pending(first), 3, "it is asked again under the lock");
    while let Some(io) = b.io.front().map(|io| io.child.0) {
        b.answer(io, IoStatus::MediaError);
    }
    for tag in 0..3 {
        assert_eq!(b.status_of(tag), Some(IoStatus::MediaError));
    }
    assert_eq!(*b.nexus.state(), VolumeState::Online);
}

#[test]
fn a_local_replica_is_read_first() {
    let mut cfg = config(3, Purpose::Create);
    cfg.children[2].local = true;
    let mut b = Bench::new(3, Purpose::Create, vec![Register::default(); 3]);
    b.nexus = Nexus::new(cfg);
    (0..3).for_each(|i| b.connect(i));
    for tag in 0..4 {
        b.submit(tag, IoOp::Read, 0, 1);
    }
    assert_eq!(b.pending(2), 4);
}

/// The only member that was left came back from a loss of power, and the next flush was acked.
#[test]
fn a_flush_does_not_succeed_over_what_was_lost() {
    let mut b = Bench::online(1);
    b.registers[0].incarnation = 1;
    b.disconnect(0);
    b.connect(0);
    let losses = b.nexus.losses();
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.submit(2, IoOp::Flush, 0, 0);
    b.disconnect(0);
    b.registers[0].incarnation = 2;
    b.connect(0);
    assert_eq!(b.nexus.losses(), losses + 1);
    assert_eq!(b.status_of(2), Some(IoStatus::MediaError));
    // What is written from now on is there, and a loss of nothing is none.
    b.submit(3, IoOp::Flush, 0, 0);
    b.answer(0, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
    b.disconnect(0);
    b.registers[0].incarnation = 3;
    b.connect(0);
    assert_eq!(b.nexus.losses(), losses + 1);
}

/// A disk that failed a flush forgot what that was to cover, and the pool went offline. Once its process was started
/// again, on the same machine, the next flush was acked.
#[test]
fn a_flush_does_not_succeed_over_what_a_failed_one_lost() {
    let mut b = Bench::online(1);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.submit(2, IoOp::Flush, 0, 0);
    b.answer(0, IoStatus::MediaError);
    assert_eq!((b.status_of(2), b.nexus.losses()), (Some(IoStatus::MediaError), 0));
    b.disconnect(0);
    b.connect(0);
    assert_eq!(b.nexus.losses(), 1, "other hosts' flushes fail, too");
    b.disconnect(0);
    b.connect(0);
    assert_eq!(b.nexus.losses(), 1);
    // A member of several is taken out, though nothing was written since.
    let mut b = Bench::online(3);
    b.write(1, 0, 1);
    (0..3).for_each(|child| b.answer(child, IoStatus::Ok));
    b.no_flush = Some(1);
    (0..2).for_each(|_| b.pass(Pace::default().settle_ms));
    b.disconnect(1);
    b.connect(1);
    assert_eq!(b.stored_in_sync(0), [true, false, true]);
}

/// A volume is removed while its requests are held for want of a majority: they were never answered
/// and the removal never ended.
#[test]
fn a_closed_nexus_lets_go_of_what_it_held() {
    let mut b = Bench::online(3);
    b.disconnect(1);
    b.disconnect(2);
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.write(2, 0, 1);
    assert!(b.done.is_empty());
    b.nexus.close();
    b.pump();
    assert_eq!((b.nexus.in_flight(), b.released.len()), (0, 2));
}

/// What it saw may be taken back, and it must not be the only one that ever saw it.
#[test]
fn a_read_that_a_write_overtakes_is_done_again_after_it() {
    let mut b = Bench::online(2);
    b.submit(1, IoOp::Read, 10, 4);
    let asked = b.io.front().unwrap().child.0;
    b.write(2, 12, 1);
    b.answer(asked, IoStatus::Ok);
    assert_eq!(b.status_of(1), None, "it waits for the write");
    // And another write waits for it.
    b.write(3, 12, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));
    assert_eq!(b.io.len(), 1);
    let again = b.io.front().unwrap().clone();
    assert!(matches!(again.op, ChildOp::Io(IoRequest { op: IoOp::Read, .. })));
    b.answer(again.child.0, IoStatus::Ok);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    assert_eq!(b.status_of(3), Some(IoStatus::Ok));
    // One that does not overlap overtakes nothing.
    b.submit(4, IoOp::Read, 10, 4);
    b.write(5, 14, 1);
    let asked = b.io.front().unwrap().child.0;
    b.answer(asked, IoStatus::Ok);
    assert_eq!(b.status_of(4), Some(IoStatus::Ok));
}

/// Its member died, and another one was asked in the middle of the write that had begun meanwhile: the host saw what no
/// other member had yet, and what was gone when the nexus died.
#[test]
fn a_read_whose_member_goes_away_is_not_done_in_the_middle_of_a_write() {
    // The member that was asked goes away, or refuses it.
    for goes in [true, false] {
        let mut b = Bench::online(3);
        b.submit(1, IoOp::Read, 10, 4);
        let asked = b.io.front().unwrap().child.0;
        b.write(2, 12, 1);
        if goes {
            b.disconnect(asked);
        } else {
            b.answer(asked, IoStatus::PathError);
        }
        let reads = |b: &Bench| {
            let is = |io: &&ChildIo| matches!(io.op, ChildOp::Io(IoRequest { op: IoOp::Read, .. }));
            b.io.iter().filter(is).count()
        };
        assert_eq!(reads(&b), 0, "it waits for the write");
        let rest: Vec<u8> = (0..3).filter(|&c| !goes || c != asked).collect();
        rest.iter().for_each(|&child| b.answer(child, IoStatus::Ok));
        assert_eq!(b.status_of(2), Some(IoStatus::Ok));
        assert_eq!(reads(&b), 1);
        let again = b.io.iter().find(|io| matches!(io.op, ChildOp::Io(r) if r.op == IoOp::Read));
        let again = again.unwrap().child.0;
        b.answer(again, IoStatus::Ok);
        assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    }
}

#[test]
fn a_read_that_has_its_range_for_itself_gives_it_back_where_nobody_can_answer() {
    let mut b = Bench::online(2);
    b.submit(1, IoOp::Read, 10, 4);
    let asked = b.io.front().unwrap().child.0;
    b.write(2, 12, 1);
    b.answer(asked, IoStatus::Ok);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.disconnect(0);
    b.disconnect(1);
    assert_eq!(b.status_of(1), None);
    b.write(3, 12, 1);
    b.connect(0);
    b.connect(1);
    while let Some(io) = b.io.front() {
        let child = io.child.0;
        b.answer(child, IoStatus::Ok);
    }
    assert_eq!((b.status_of(1), b.status_of(3)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
}
