//! Changes of a volume's size and key, and its sanitize.

use cairn_block::SnapshotId;
use cairn_block::sanitize::{Method, Sanitize};

use super::*;
use crate::ChangeError;

/// A new volume of 1000 blocks on replicas that tell their size.
fn sized(n: u8) -> Bench {
    let register = Register { blocks: 1000, ..Register::default() };
    let mut b = Bench::new(n, Purpose::Create, vec![register; usize::from(n)]);
    (0..n).for_each(|i| b.connect(i));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b.events.clear();
    b
}

fn resize(b: &mut Bench, blocks: u64) -> Result<(), ChangeError> {
    let result = b.nexus.resize(blocks, b.now);
    b.pump();
    result
}

fn sizes(b: &Bench) -> Vec<u64> {
    b.registers.iter().map(|r| r.blocks).collect()
}

fn stored(b: &Bench, child: usize) -> Config {
    Config::decode(&b.registers[child].config).unwrap()
}

#[test]
fn replicas_grow_before_the_size_is_committed_and_it_before_it_is_served() {
    let mut b = sized(3);
    b.write(1, 1000, 1);
    assert_eq!(b.status_of(1), Some(IoStatus::OutOfRange));
    b.hold_registers = true;
    resize(&mut b, 2000).unwrap();
    assert!(
        b.held
            .iter()
            .all(|io| matches!(io.op, ChildOp::Register(RegisterOp::Resize { blocks: 2000, .. })))
    );
    assert_eq!(b.held.len(), 3);
    assert_eq!(resize(&mut b, 3000), Err(ChangeError::Busy));
    // Two have grown: nothing is committed yet.
    for _ in 0..2 {
        let io = b.held.pop_front().unwrap();
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
    }
    assert_eq!(b.held.len(), 1);
    assert_eq!((b.nexus.blocks(), stored(&b, 0).blocks), (1000, 1000));
    b.answer_registers();
    assert_eq!(b.nexus.blocks(), 2000);
    assert!(b.events.contains(&Event::Resized(2000)));
    assert_eq!(sizes(&b), [2000; 3]);
    assert!((0..3).all(|i| stored(&b, i).blocks == 2000));
    b.write(2, 1999, 1);
    (0..3).for_each(|i| b.answer(i, IoStatus::Ok));
    assert_eq!(b.status_of(2), Some(IoStatus::Ok));

    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!((b.nexus.blocks(), b.nexus.state()), (2000, &VolumeState::Online));
}

#[test]
fn it_does_not_shrink_and_needs_a_majority() {
    let mut b = sized(3);
    let error = resize(&mut b, 999).unwrap_err();
    assert_eq!(error, ChangeError::Shrink { has: 1000, asked: 999 });
    assert!(error.to_string().contains("copy"), "{error}");
    resize(&mut b, 1000).unwrap();
    assert_eq!(b.events, [Event::Resized(1000)]);
    b.disconnect(1);
    b.disconnect(2);
    assert_eq!(resize(&mut b, 2000), Err(ChangeError::NotServing));
}

/// It is in sync all the time, for nothing was written while it was away.
#[test]
fn a_replica_that_was_away_grows_before_it_is_used() {
    let mut b = sized(3);
    b.disconnect(2);
    resize(&mut b, 2000).unwrap();
    assert_eq!((b.nexus.blocks(), sizes(&b)), (2000, vec![2000, 2000, 1000]));
    b.hold_registers = true;
    b.up[2] = true;
    b.nexus.handle_child_up(ChildId(2), b.now);
    b.pump();
    b.write(1, 1500, 1);
    assert_eq!(b.pending(0), 0, "a write waits for a member that is joining");
    b.answer_registers();
    assert_eq!(sizes(&b), [2000; 3]);
    assert_eq!((b.pending(0), b.pending(1), b.pending(2)), (1, 1, 1));

    // And so it does where the nexus started anew meanwhile.
    let mut b = sized(3);
    b.disconnect(2);
    resize(&mut b, 2000).unwrap();
    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!((b.nexus.state(), sizes(&b)), (&VolumeState::Online, vec![2000; 3]));
    b.write(1, 1500, 1);
    assert_eq!((b.pending(0), b.pending(1), b.pending(2)), (1, 1, 1));
}

/// Each step of a resize is the last before the nexus is gone: afterwards the volume has the old size or
/// the new one, and what is used of it has at least that.
#[test]
fn a_resize_that_is_cut_off_is_done_or_has_no_effect() {
    let mut seen = Vec::new();
    for steps in 0..6 {
        for first in 0..3 {
            let mut b = sized(3);
            b.hold_registers = true;
            resize(&mut b, 2000).unwrap();
            for _ in 0..steps {
                let at = b.held.iter().position(|io| io.child.0 >= first).unwrap_or(0);
                let Some(io) = b.held.remove(at) else { break };
                let reply = b.obey(&io);
                b.nexus.handle_register(io.child, io.ticket, reply, b.now);
                b.pump();
            }
            let was = b.nexus.blocks();
            let mut b = b.restarted();
            (0..3).for_each(|i| b.connect(i));
            assert_eq!(*b.nexus.state(), VolumeState::Online);
            let now = b.nexus.blocks();
            assert!(now >= was, "what was served is not taken back");
            assert!(sizes(&b).iter().all(|&size| size >= now), "{:?} {now}", sizes(&b));
            seen.push(now);
        }
    }
    assert!(seen.contains(&1000) && seen.contains(&2000), "{seen:?}");
}

#[test]
fn a_replica_that_cannot_grow_ends_the_resize() {
    let mut b = sized(3);
    b.hold_registers = true;
    resize(&mut b, 2000).unwrap();
    let refused = b.held.remove(1).unwrap();
    b.nexus.handle_register(refused.child, refused.ticket, Err(IoStatus::InvalidField), b.now);
    b.pump();
    b.answer_registers();
    let failed = Event::ResizeFailed(Some(refused.child), IoStatus::InvalidField);
    assert!(b.events.contains(&failed), "{:?}", b.events);
    assert_eq!((b.nexus.blocks(), stored(&b, 0).blocks), (1000, 1000));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    resize(&mut b, 2000).unwrap();
    assert_eq!((b.nexus.blocks(), sizes(&b)), (2000, vec![2000; 3]));
}

#[test]
fn a_replica_that_hangs_ends_the_resize_and_may_answer_later() {
    let mut b = sized(3);
    b.hold_registers = true;
    resize(&mut b, 2000).unwrap();
    let hung = b.held.remove(0).unwrap();
    b.answer_registers();
    assert!(b.nexus.poll_timeout(b.now).is_some());
    b.pass(DEADLINE);
    assert!(b.events.contains(&Event::ResizeFailed(Some(hung.child), IoStatus::TimedOut)));
    assert_eq!((b.nexus.blocks(), b.nexus.state()), (1000, &VolumeState::Online));
    let reply = b.obey(&hung);
    b.nexus.handle_register(hung.child, hung.ticket, reply, b.now);
    b.pump();
    assert_eq!(b.nexus.status().children[0].state, ChildState::Online);
    resize(&mut b, 2000).unwrap();
    assert_eq!((b.nexus.blocks(), sizes(&b)), (2000, vec![2000; 3]));
}

#[test]
fn a_replica_that_goes_while_it_grows_is_not_waited_for() {
    let mut b = sized(3);
    b.hold_registers = true;
    resize(&mut b, 2000).unwrap();
    let lost = b.held.iter().position(|io| io.child == ChildId(1)).unwrap();
    let lost = b.held.remove(lost).unwrap();
    b.nexus.handle_register(lost.child, lost.ticket, Err(IoStatus::PathError), b.now);
    b.disconnect(1);
    b.answer_registers();
    assert_eq!((b.nexus.blocks(), sizes(&b)), (2000, vec![2000, 1000, 2000]));
    b.connect(1);
    assert_eq!(sizes(&b), [2000; 3]);
    assert_eq!(b.nexus.status().children[1].state, ChildState::Online);
}

#[test]
fn a_member_that_fails_while_the_volume_grows_goes_with_the_same_commit_or_the_next() {
    let mut b = sized(3);
    b.hold_registers = true;
    resize(&mut b, 2000).unwrap();
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    // In the order in which they were asked, as on a session.
    while let Some(io) = b.held.pop_front() {
        let reply = b.obey(&io);
        b.nexus.handle_register(io.child, io.ticket, reply, b.now);
        b.pump();
    }
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!((b.nexus.blocks(), b.stored_in_sync(0)), (2000, vec![true, true, false]));
    assert_eq!(stored(&b, 0).blocks, 2000);
}

#[test]
fn a_new_volume_needs_replicas_that_are_large_enough() {
    let small = Register { blocks: 999, ..Register::default() };
    let mut b = Bench::new(1, Purpose::Create, vec![small]);
    b.connect(0);
    let VolumeState::Refused(why) = b.nexus.state() else { panic!("{:?}", b.nexus.state()) };
    assert!(why.contains("too small: it has 999 blocks, the volume 1000"), "{why}");
}

// ---- the key

fn encrypted(purpose: Purpose, registers: Vec<Register>, section: &[u8]) -> Bench {
    let mut b = Bench::new(3, purpose, registers);
    b.nexus = Nexus::new(NexusConfig { encryption: Some(section.to_vec()), ..config(3, purpose) });
    b
}

fn made() -> Bench {
    let mut b = encrypted(Purpose::Create, vec![Register::default(); 3], b"wrapped");
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    b
}

#[test]
fn an_encrypted_volume_waits_for_its_key_and_takes_nobodys_epoch_before() {
    let b = made();
    assert!((0..3).all(|i| stored(&b, i).encryption == b"wrapped"));
    let epoch = b.registers[0].promised_epoch;
    let mut b = encrypted(Purpose::Assemble, b.registers, b"");
    (0..3).for_each(|i| b.connect(i));
    assert!(b.events.contains(&Event::Locked));
    assert_eq!(b.nexus.locked(), b"wrapped");
    b.nexus.refuse_key("the key is another");
    assert_eq!(*b.nexus.state(), VolumeState::Refused("the key is another".to_owned()));
    b.write(1, 0, 1);
    assert_eq!(b.status_of(1), Some(IoStatus::NotReady));
    assert!(b.registers.iter().all(|r| r.promised_epoch == epoch));
    b.nexus.unlock(b.now);
    b.pump();
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    assert_eq!(b.nexus.encryption(), b"wrapped");
}

#[test]
fn a_volume_that_is_to_be_encrypted_and_is_not_is_not_served_nor_the_other_way_round() {
    let plain = Bench::online(3);
    let mut b = encrypted(Purpose::Assemble, plain.registers, b"");
    (0..3).for_each(|i| b.connect(i));
    assert!(!b.nexus.state().is_serving() && b.nexus.locked().is_empty());
    assert!(b.events.contains(&Event::Locked));

    let mut b = Bench::new(3, Purpose::Assemble, made().registers);
    (0..3).for_each(|i| b.connect(i));
    assert!(!b.nexus.state().is_serving());
    assert_eq!(b.nexus.locked(), b"wrapped");
    // Not even where it is told to go on.
    b.nexus.unlock(b.now);
    b.pump();
    assert!(!b.nexus.state().is_serving());

    let mut b = encrypted(Purpose::Create, vec![Register::default(); 3], b"");
    (0..3).for_each(|i| b.connect(i));
    assert!(!b.nexus.state().is_serving(), "a new volume without its key");
}

#[test]
fn another_wrapping_is_committed_and_kept_by_every_later_commit() {
    let mut b = made();
    b.events.clear();
    b.nexus.set_encryption(b"again".to_vec(), b.now).unwrap();
    b.pump();
    assert!(b.events.contains(&Event::KeyChanged));
    assert!((0..3).all(|i| stored(&b, i).encryption == b"again"));
    b.write(1, 0, 1);
    b.answer(0, IoStatus::Ok);
    b.answer(1, IoStatus::Ok);
    b.answer(2, IoStatus::MediaError);
    assert_eq!(b.status_of(1), Some(IoStatus::Ok));
    assert_eq!(
        (stored(&b, 0).encryption, b.nexus.encryption()),
        (b"again".to_vec(), &b"again"[..])
    );

    let mut plain = Bench::online(3);
    let refused = plain.nexus.set_encryption(b"x".to_vec(), plain.now);
    assert_eq!(refused, Err(ChangeError::NotEncrypted));
}

/// The key was rotated between the first look at the registers and the promises: the old key, which was
/// at hand, is no longer the volume's.
#[test]
fn a_key_that_changes_while_the_volume_is_taken_over_is_looked_for_again() {
    let b = made();
    let mut taken = encrypted(Purpose::Assemble, b.registers.clone(), b"");
    (0..3).for_each(|i| taken.connect(i));
    taken.hold_registers = true;
    taken.nexus.unlock(taken.now);
    taken.pump();
    // The registers are read; the promises are on their way.
    for io in std::mem::take(&mut taken.held) {
        let reply = taken.obey(&io);
        taken.nexus.handle_register(io.child, io.ticket, reply, taken.now);
    }
    taken.pump();
    let mut b = b;
    b.nexus.set_encryption(b"again".to_vec(), b.now).unwrap();
    b.pump();
    taken.registers = b.registers;
    taken.events.clear();
    taken.answer_registers();
    assert!(taken.events.contains(&Event::Locked));
    assert_eq!(taken.nexus.locked(), b"again");
    assert!(!taken.nexus.state().is_serving());
    taken.nexus.unlock(taken.now);
    taken.pump();
    assert_eq!(*taken.nexus.state(), VolumeState::Online);
}

#[test]
fn a_nexus_finds_stored_that_the_volume_is_being_taken_back() {
    let snapshot = cairn_block::SnapshotId(7);
    let mut b = sized(3);
    b.hold_registers = true;
    b.nexus.set_restoring(Some(snapshot), b.now).unwrap();
    b.pump();
    // From the first moment: a host's write could come before a replica goes back, and be lost there.
    assert_eq!(b.nexus.restoring(), Some(snapshot));
    assert!(b.events.iter().all(|e| !matches!(e, Event::Restoring(_))));
    b.answer_registers();
    b.hold_registers = false;
    assert!(b.events.contains(&Event::Restoring(Some(snapshot))));
    assert_eq!(stored(&b, 0).restoring, Some(snapshot));
    assert_eq!(resize(&mut b, 2000), Err(ChangeError::Restoring(snapshot)));
    // One that goes out now may have gone back or not.
    b.disconnect(2);
    b.write(1, 0, 1);
    (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
    assert_eq!((stored(&b, 0).members[2].in_sync, stored(&b, 0).members[2].since), (false, 0));

    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(b.nexus.restoring(), Some(snapshot));
    assert!(b.events.contains(&Event::Restoring(Some(snapshot))));
    b.nexus.set_restoring(None, b.now).unwrap();
    b.pump();
    assert!(b.events.contains(&Event::Restoring(None)));
    assert_eq!((b.nexus.restoring(), stored(&b, 0).restoring), (None, None));

    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert!(b.events.iter().all(|e| !matches!(e, Event::Restoring(_))));
}

#[test]
fn deleted_snapshots_are_stored_until_they_are_forgotten() {
    let ids = vec![cairn_block::SnapshotId(7), cairn_block::SnapshotId(8)];
    let mut b = sized(3);
    b.hold_registers = true;
    b.nexus.set_deleted(ids.clone(), b.now).unwrap();
    b.pump();
    // Not before a majority has it.
    assert!(b.nexus.deleted().is_empty());
    assert_eq!(b.nexus.set_deleted(Vec::new(), b.now), Err(ChangeError::Busy));
    b.answer_registers();
    b.hold_registers = false;
    assert_eq!((b.nexus.deleted(), &stored(&b, 0).deleted), (&ids[..], &ids));
    assert!(b.nexus.is_whole());
    b.disconnect(2);
    b.write(1, 0, 1);
    (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
    assert!(!b.nexus.is_whole());

    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!((b.nexus.deleted(), b.nexus.is_whole()), (&ids[..], false));
    b.nexus.set_deleted(ids[1..].to_vec(), b.now).unwrap();
    b.pump();
    assert_eq!((b.nexus.deleted(), &stored(&b, 1).deleted[..]), (&ids[1..], &ids[1..]));
}

/// It is taken up again once it has grown, also where it is asked for more meanwhile.
#[test]
fn a_replica_that_comes_back_is_asked_to_grow_twice() {
    let mut b = sized(3);
    b.disconnect(2);
    b.write(1, 0, 1);
    (0..2).for_each(|i| b.answer(i, IoStatus::Ok));
    resize(&mut b, 1500).unwrap();
    b.hold_registers = true;
    b.connect(2);
    // The promise.
    let io = b.held.pop_front().unwrap();
    let reply = b.obey(&io);
    b.nexus.handle_register(io.child, io.ticket, reply, b.now);
    b.pump();
    assert!(matches!(b.held[0].op, ChildOp::Register(RegisterOp::Resize { blocks: 1500, .. })));
    resize(&mut b, 2000).unwrap();
    b.answer_registers();
    b.hold_registers = false;
    assert_eq!(b.nexus.blocks(), 2000);
    assert!(b.nexus.children[2].bound, "it is rebuilt");
}

#[test]
fn a_sanitize_is_stored_and_nothing_else_changes_meanwhile() {
    let mut b = sized(3);
    let begun = Sanitize::new(Method::Erase, false);
    let half = Sanitize { next: 500, ..begun.clone() };
    b.nexus.set_sanitize(begun.encode(), b.now).unwrap();
    assert_eq!(b.nexus.set_sanitize(half.encode(), b.now), Err(ChangeError::Busy));
    assert!(b.nexus.sanitize().is_empty(), "a majority has not stored it yet");
    b.pump();
    assert!(b.events.contains(&Event::Sanitize));
    assert_eq!(b.nexus.sanitize(), begun.encode());
    let refused = Err(ChangeError::Sanitizing);
    assert_eq!(resize(&mut b, 2000), refused);
    assert_eq!(b.nexus.set_restoring(Some(SnapshotId(1)), b.now), refused);
    assert_eq!(b.nexus.set_deleted(vec![SnapshotId(1)], b.now), refused);
    // What others store meanwhile, and a replica that goes, leave it as it is.
    b.nexus.set_reservations(vec![1, 0, 0, 0xff, 1, 0, 0, 0], b.now).unwrap();
    b.pump();
    b.nexus.set_sanitize(half.encode(), b.now).unwrap();
    b.pump();
    assert!((0..3).all(|i| stored(&b, i).sanitize == half.encode()));

    let mut b = b.restarted();
    (0..3).for_each(|i| b.connect(i));
    assert_eq!(b.nexus.sanitize(), half.encode(), "the next nexus goes on");
    assert!(b.nexus.is_whole());
    b.nexus.set_sanitize(Vec::new(), b.now).unwrap();
    b.pump();
    assert!((0..3).all(|i| stored(&b, i).sanitize.is_empty()));
    resize(&mut b, 2000).unwrap();
}
