//! Settling, reconcile and rebuild, against children with simulated contents, marks and stamps.

use super::mend::World;
use super::*;

fn world(n: u8) -> World {
    let mut w = World::new(n);
    w.b.nexus.config.pace.rebuild = true;
    w.b.mem = HeapMemory::new(32 << 20);
    w
}

/// Lets time pass and everybody work until nothing is left to do.
fn rest(w: &mut World) {
    for _ in 0..60 {
        w.b.pass(1000);
        w.run();
    }
}

/// Writes the first blocks.
fn fill(w: &mut World, tag: u64, blocks: u64, byte: u8) {
    for start in (0..blocks).step_by(100) {
        w.write(tag * 1000 + start, start, 100.min(blocks - start), byte);
    }
}

fn asked(w: &World, of: impl Fn(&ChildOp) -> bool) -> usize {
    w.b.asked.iter().filter(|io| of(&io.op)).count()
}

fn copied(w: &World) -> Vec<u64> {
    w.b.nexus.rebuild_history().iter().map(|r| r.bytes >> 20).collect()
}

#[test]
fn what_was_written_is_settled_once_and_then_nothing_is_asked() {
    let mut w = world(3);
    rest(&mut w);
    w.b.asked.clear();
    w.write(1, 0, 1, 7);
    w.run();
    rest(&mut w);
    assert!(w.b.extents.iter().all(|e| e[0] == change::MAPPED), "{:?}", w.b.extents);
    let generation = w.b.nexus.generation;
    assert!(w.b.stamps.iter().all(|s| s[0] == generation && s[1] == 0));
    assert_eq!(asked(&w, |op| matches!(op, ChildOp::SettleEnd { .. })), 3);
    assert_eq!(w.b.nexus.poll_timeout(w.b.now), None, "idle");
}

#[test]
fn a_round_waits_for_what_was_submitted_and_flushes_before_it_ends() {
    let mut w = world(3);
    rest(&mut w);
    w.write(1, 0, 1, 7);
    w.b.asked.clear();
    // Two have it, one is slow.
    for child in [0, 1] {
        let at = w.b.io.iter().position(|io| io.child == ChildId(child)).unwrap();
        w.serve(at);
    }
    w.b.nexus.config.child_deadline_ms = 100_000;
    w.b.nexus.config.child_deadline_min_ms = 100_000;
    w.b.pass(6000);
    assert_eq!(asked(&w, |op| matches!(op, ChildOp::SettleBegin { .. })), 3);
    w.b.pass(6000);
    let flush = |op: &ChildOp| matches!(op, ChildOp::Io(r) if r.op == IoOp::Flush);
    assert_eq!(asked(&w, flush), 0, "the slow one is waited for");
    w.run();
    w.b.pass(10);
    assert_eq!(asked(&w, flush), 3);
    assert_eq!(asked(&w, |op| matches!(op, ChildOp::SettleEnd { .. })), 3);
}

/// What is written all the time stays open for good: closed and opened anew it would cost a record and a flush each
/// time. A round ends for what is not, no sooner than half of the time after it began.
#[test]
fn a_round_sees_for_a_while_what_is_written_again() {
    let mut w = world(3);
    rest(&mut w);
    let blocks = crate::upkeep::EXTENT_BLOCKS;
    w.write(1, blocks, 1, 7);
    let end = |w: &World| asked(w, |op| matches!(op, ChildOp::SettleEnd { .. }));
    w.b.asked.clear();
    for tag in 0..80 {
        w.write(10 + tag, 0, 1, 8);
        w.run();
        w.b.pass(100);
        let open = |w: &World, at: usize| w.b.extents.iter().all(|e| e[at] & change::OPEN != 0);
        assert!(open(&w, 0), "{tag}");
        assert_eq!(end(&w) == 0, open(&w, 1), "{tag}");
        assert!(tag > 45 || end(&w) == 0, "{tag}");
    }
    assert!(end(&w) >= 3);
}

#[test]
fn what_a_dead_nexus_left_is_alike_before_it_is_read() {
    let mut w = world(3);
    rest(&mut w);
    // A write reaches one of three, and the nexus dies; another extent was discarded on one.
    w.write(1, 10, 1, 9);
    let at = w.b.io.iter().position(|io| io.child == ChildId(1)).unwrap();
    w.serve(at);
    w.b.extents[2].resize(16, 0);
    w.b.extents[2][2] = change::MAPPED;
    w.disks[2].data[600] = 5;
    w.restart();
    assert_eq!(*w.b.nexus.state(), VolumeState::Online);
    assert_eq!(w.b.nexus.unreconciled(), (2, 2));
    w.submit(2, IoOp::Read, 300, 1, 0);
    w.submit(3, IoOp::Read, 10, 1, 0);
    let host = |w: &World, lba| {
        w.b.io.iter().any(|io| {
            matches!(io.op, ChildOp::Io(r) if r.range.start().0 == lba && r.range.blocks() == 1)
        })
    };
    assert!(host(&w, 300), "what cannot differ is read at once");
    assert!(!host(&w, 10));
    w.run();
    assert_eq!((w.b.status_of(2), w.b.status_of(3)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
    let now: Vec<u8> = w.disks.iter().map(|d| d.data[10]).collect();
    assert_eq!(w.got(3), [now[0]]);
    w.assert_alike();
    assert_eq!(w.b.nexus.unreconciled(), (0, 0));
    rest(&mut w);
    assert!(w.b.extents.iter().all(|e| e.iter().all(|m| m & change::OPEN == 0)));
}

#[test]
fn who_lost_power_is_not_believed() {
    for (liar, again) in (0..3).flat_map(|liar| [(liar, false), (liar, true)]) {
        let mut w = world(3);
        for register in &mut w.b.registers {
            register.incarnation = 1;
        }
        w.restart();
        rest(&mut w);
        w.write(1, 10, 1, 9);
        w.run();
        assert_eq!(w.b.status_of(1), Some(IoStatus::Ok));
        // Acked, not flushed: two lose it.
        for other in (0..3).filter(|&other| other != liar) {
            w.disks[other].data[10] = 0;
            w.b.registers[other].incarnation = 2;
        }
        w.restart();
        if again {
            // It had stored a configuration, and had made nothing alike.
            w.restart();
        }
        w.run();
        assert!(w.disks.iter().all(|d| d.data[10] == 9));
        // Now they are believed again, as what is stored says.
        let stored = Config::decode(&w.b.registers[0].config).unwrap();
        let lives = w.b.registers.iter().map(|r| r.incarnation);
        assert!(stored.members.iter().map(|m| m.incarnation).eq(lives));
    }
}

/// One that came back from a loss of power, with nothing written since, was taken out for what it had lost, and
/// then stayed out for as long as its session lasted.
#[test]
fn who_lost_power_is_rebuilt_in_the_session_that_it_came_back_with() {
    let mut w = world(3);
    rest(&mut w);
    w.write(1, 10, 1, 9);
    w.run();
    assert_eq!(w.b.status_of(1), Some(IoStatus::Ok));
    // Acked, not flushed, and lost.
    w.b.disconnect(1);
    w.disks[1].data[10] = 0;
    w.b.registers[1].incarnation += 1;
    w.b.connect(1);
    assert_eq!(w.in_sync(), [0, 2]);
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

/// The only member in sync lost power while another was rebuilt from it: what it had lost was there on the other,
/// and the two were taken for alike.
#[test]
fn what_the_source_of_a_rebuild_lost_is_taken_back() {
    let mut w = world(3);
    fill(&mut w, 1, 300, 3);
    w.run();
    rest(&mut w);
    w.b.nexus.config.pace.rebuild = false;
    w.b.disconnect(1);
    w.write(2, 5, 1, 4);
    w.run();
    w.b.connect(1);
    w.b.disconnect(2);
    w.write(3, 290, 1, 4);
    w.run();
    assert_eq!(w.in_sync(), [0]);
    w.b.nexus.config.pace.rebuild = true;
    // The first extent was copied, the second was not.
    let bytes = |w: &World| w.b.nexus.rebuild().map_or(0, |r| r.bytes_done);
    while bytes(&w) < 1 << 20 {
        match w.b.io.is_empty() {
            true => w.b.pass(10),
            false => w.serve(0),
        }
    }
    w.b.disconnect(0);
    w.disks[0].data[5] = 3;
    w.b.registers[0].incarnation += 1;
    w.b.connect(0);
    w.run();
    for _ in 0..3 {
        rest(&mut w);
    }
    assert_eq!(w.in_sync(), [0, 1]);
    let now: Vec<u8> = w.disks[..2].iter().map(|d| d.data[5]).collect();
    assert_eq!(now, [3, 3]);
}

/// A member lost power under one nexus and with it what it had written for the nexus before: this one took it that
/// nothing was lost, and settled the difference.
#[test]
fn who_lost_what_an_earlier_nexus_had_it_write_is_rebuilt() {
    let mut w = world(3);
    rest(&mut w);
    w.write(1, 10, 1, 9);
    w.run();
    assert_eq!(w.b.status_of(1), Some(IoStatus::Ok));
    w.restart();
    w.run();
    w.b.disconnect(1);
    w.disks[1].data[10] = 0;
    w.b.registers[1].incarnation += 1;
    w.b.connect(1);
    assert_eq!(w.in_sync(), [0, 2]);
    rest(&mut w);
    w.assert_alike();
    // What a round has flushed cannot be lost.
    w.restart();
    rest(&mut w);
    w.b.disconnect(1);
    w.b.registers[1].incarnation += 1;
    w.b.connect(1);
    assert_eq!(w.in_sync(), [0, 1, 2]);
}

#[test]
fn a_member_that_was_away_gets_what_was_written_meanwhile_and_no_more() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    w.write(2, 260, 3, 4);
    w.run();
    assert_eq!(w.b.status_of(2), Some(IoStatus::Ok));
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 2]);
    w.b.connect(1);
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    assert_eq!(copied(&w), [1]);
    w.assert_alike();
    assert_eq!(w.b.stored_in_sync(0), [true; 3]);
    w.assert_idle();
}

#[test]
fn what_it_alone_has_is_undone_and_what_it_alone_lacks_is_copied() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    // Its last write reached nobody else.
    w.write(2, 5, 1, 8);
    let at = w.b.io.iter().position(|io| io.child == ChildId(1)).unwrap();
    w.serve(at);
    w.b.disconnect(1);
    w.b.disconnect(0);
    w.b.disconnect(2);
    w.b.io.clear();
    w.b.extents[1][3] = change::MAPPED;
    let members = w.b.registers.clone();
    w.restart();
    w.run();
    assert_eq!(w.b.registers.len(), members.len());
    rest(&mut w);
    w.assert_alike();
}

/// A flush was slow at a member for as long as the rebuild of another took. That one had joined by then,
/// had never been sent the flush, and was waited for for ever.
#[test]
fn a_flush_that_outlasts_a_rebuild_is_answered() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    w.write(2, 260, 3, 4);
    w.run();
    w.b.nexus.config.child_deadline_ms = 1 << 30;
    w.b.nexus.config.child_deadline_min_ms = 1 << 30;
    w.submit(3, IoOp::Flush, 0, 0, 0);
    let is_slow = |io: &ChildIo| io.child == ChildId(0);
    let slow = w.b.io.iter().position(is_slow).unwrap();
    let slow = w.b.io.remove(slow).unwrap();
    w.b.connect(1);
    rest(&mut w);
    assert_eq!((w.in_sync(), w.b.status_of(3)), (vec![0, 2], None), "it does not join before");
    w.b.nexus.handle_io(slow.child, slow.ticket, IoStatus::Ok, w.b.now);
    w.b.pump();
    assert_eq!(w.b.status_of(3), Some(IoStatus::Ok));
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
}

#[test]
fn hosts_do_not_wait_for_a_target_until_it_joins_and_it_misses_nothing() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    fill(&mut w, 2, 900, 4);
    w.run();
    w.b.connect(1);
    w.b.pass(2000);
    assert!(w.b.nexus.rebuild().is_some());
    // Nobody has copied anything yet: the target gets the write and is not waited for.
    w.write(3, 990, 1, 6);
    let mut others = true;
    while core::mem::take(&mut others) {
        if let Some(at) = w.b.io.iter().position(|io| {
            io.child != ChildId(1) && matches!(io.op, ChildOp::Io(r) if r.range.start().0 == 990)
        }) {
            w.serve(at);
            others = true;
        }
    }
    assert_eq!(w.b.status_of(3), Some(IoStatus::Ok));
    assert!(w.b.io.iter().any(|io| io.child == ChildId(1)));
    w.run();
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

#[test]
fn a_target_that_fails_ends_the_rebuild_and_hosts_see_nothing() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    fill(&mut w, 2, 900, 4);
    w.run();
    w.disks[1].dead = true;
    w.b.connect(1);
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 2]);
    assert!(matches!(w.b.nexus.rebuild_history()[0].end, RebuildEnd::Aborted(_)));
    w.write(3, 7, 1, 9);
    w.run();
    assert_eq!(w.b.status_of(3), Some(IoStatus::Ok));
    w.disks[1].dead = false;
    for _ in 0..10 {
        rest(&mut w);
    }
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

/// A member was away, and is back without what it had of some extents.
fn back_with_losses(extents: &[usize]) -> World {
    let mut w = world(3);
    fill(&mut w, 1, 1000, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    w.write(2, 7, 1, 4);
    w.run();
    rest(&mut w);
    for &extent in extents {
        w.disks[1].lost.insert(extent);
        w.b.extents[1][extent] = change::MAPPED | change::OPEN | change::LOST;
    }
    w.b.connect(1);
    w
}

/// A pool that has lost one of its devices cannot change a part of an extent that it held: what is around that
/// part is not known. A rebuild, which copies parts, and a host that went on writing there, had it given up
/// for ever.
#[test]
fn what_a_target_has_lost_is_given_up_there_and_copied() {
    let mut w = back_with_losses(&[1, 3]);
    // Hosts write there meanwhile: the target cannot take that at first.
    w.write(3, 300, 2, 5);
    w.write(4, 900, 20, 6);
    w.run();
    rest(&mut w);
    assert_eq!((w.b.status_of(3), w.b.status_of(4)), (Some(IoStatus::Ok), Some(IoStatus::Ok)));
    assert_eq!(w.in_sync(), [0, 1, 2], "{:?}", w.b.nexus.rebuild_history());
    assert_eq!(w.b.nexus.rebuild_history().len(), 1, "it was never given up");
    assert_eq!(asked(&w, |op| *op == ChildOp::GiveUpLost), 1);
    assert!(w.disks[1].lost.is_empty());
    w.assert_alike();
    w.assert_idle();
}

/// A target that has given up what it lost does not tell of it any more. A nexus that takes over in the middle copies
/// it all the same: it is a hole there, or open.
#[test]
fn what_a_target_gave_up_is_copied_by_the_next_nexus() {
    for kill_after in 0..40 {
        let mut w = back_with_losses(&[2]);
        w.write(3, 600, 2, 5);
        for _ in 0..kill_after {
            w.b.pass(1);
            if !w.b.io.is_empty() {
                w.serve(0);
            }
        }
        w.b.io.clear();
        w.restart();
        for _ in 0..6 {
            w.run();
            rest(&mut w);
        }
        assert_eq!(w.in_sync(), [0, 1, 2], "killed after {kill_after}");
        assert!(w.disks[1].lost.is_empty());
        w.assert_alike();
    }
}

#[test]
fn a_rebuild_goes_on_where_a_dead_nexus_left_it() {
    let mut w = world(2);
    fill(&mut w, 1, 1000, 3);
    w.run();
    rest(&mut w);
    w.b.registers.push(Register::default());
    w.b.registers.pop();
    // Two replicas cannot go on with one: the second is taken out while both vote.
    w.disks[1].dead = true;
    fill(&mut w, 2, 1000, 4);
    w.run();
    assert_eq!(w.in_sync(), [0]);
    w.disks[1].dead = false;
    w.b.nexus.config.pace.rebuild_mib_s = 1;
    w.b.nexus.config.pace.checkpoint_ms = 500;
    for _ in 0..24 {
        w.b.pass(100);
        w.run();
    }
    let stored = Config::decode(&w.b.registers[0].config).unwrap();
    let member = stored.members[1];
    assert!(member.copied >= 1 && !member.in_sync, "{member:?}");
    let before = w.b.nexus.rebuild().expect("it goes on").bytes_done >> 20;
    assert!(before < 4);
    w.restart();
    w.run();
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1]);
    let again = copied(&w)[0];
    assert!(again <= 4 - member.copied, "{again} MiB again, though {} were there", member.copied);
    w.assert_alike();
}

#[test]
fn random_faults_end_with_everybody_in_sync_and_alike() {
    for seed in 0..100 {
        let mut w = world(3);
        w.below(1);
        for _ in 0..seed {
            w.below(2);
        }
        w.b.nexus.config.pace.checkpoint_ms = 200;
        let mut tag = 0;
        let mut up = [true; 3];
        for _ in 0..120 {
            match w.below(12) {
                0..=4 => {
                    tag += 1;
                    let (start, byte) = (w.below(960), u8::try_from(w.below(200)).unwrap());
                    let blocks = 1 + w.below(40);
                    if w.b.nexus.state().is_serving() && w.b.nexus.has_room() && tag < 100 {
                        w.write(tag, start, blocks, byte);
                    }
                }
                5..=7 => {
                    for _ in 0..w.below(12) {
                        if w.b.io.is_empty() {
                            break;
                        }
                        let n = w.b.io.len() as u64;
                        let i = usize::try_from(w.below(n)).unwrap();
                        w.serve(i);
                    }
                }
                8 => {
                    let child = u8::try_from(w.below(3)).unwrap();
                    let at = usize::from(child);
                    if up[at] {
                        w.b.disconnect(child);
                    } else {
                        w.b.connect(child);
                    }
                    up[at] = !up[at];
                }
                9 if w.below(6) == 0 => {
                    w.restart();
                    up = [true; 3];
                }
                _ => {
                    let ms = [10, 300, 3000][usize::try_from(w.below(3)).unwrap()];
                    w.b.pass(ms);
                }
            }
        }
        for (child, up) in (0u8..).zip(up) {
            if !up {
                w.b.connect(child);
            }
        }
        for _ in 0..12 {
            rest(&mut w);
        }
        assert_eq!(w.in_sync(), [0, 1, 2], "seed {seed}: {:?}", w.b.nexus.status());
        w.assert_alike();
        assert!(w.b.extents.iter().flatten().all(|m| m & change::OPEN == 0), "seed {seed}");
    }
}

/// The connection to the source had failed and was being closed, so that whatever it was asked was answered at
/// once, with an error of the path, and it was asked again at once: the thread never came to close it.
#[test]
fn a_source_that_is_closing_is_not_asked_again_in_the_same_turn() {
    let mut w = world(2);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.disks[1].dead = true;
    w.write(2, 5, 1, 4);
    w.run();
    w.disks[1].dead = false;
    assert_eq!(w.in_sync(), [0]);
    while w.b.io.is_empty() {
        w.b.pass(100);
    }
    assert!(w.b.nexus.rebuild().is_some());
    let before = w.b.io.len();
    let reads = w.b.io.iter().filter(|io| io.child == ChildId(0)).count();
    assert!(reads > 0);
    for _ in 0..reads {
        w.b.answer(0, IoStatus::PathError);
    }
    assert_eq!(w.b.io.len(), before - reads, "it is asked later");
    assert!(w.b.nexus.poll_timeout(w.b.now).is_some());
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1]);
    w.assert_alike();
}

/// Its new session was up before it was stored that it is out. It was not taken for bound to the epoch then, and
/// was never rebuilt.
#[test]
fn a_member_that_is_back_before_it_is_out_is_rebuilt() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.hold_registers = true;
    w.disks[1].dead = true;
    w.write(2, 5, 1, 4);
    w.run();
    w.disks[1].dead = false;
    assert!(!w.b.held.is_empty(), "it is being stored");
    let commit = core::mem::take(&mut w.b.held);
    w.b.disconnect(1);
    w.b.hold_registers = false;
    w.b.connect(1);
    for io in commit.into_iter().filter(|io| io.child != ChildId(1)) {
        let reply = w.b.obey(&io);
        w.b.nexus.handle_register(io.child, io.ticket, reply, w.b.now);
        w.b.pump();
    }
    w.run();
    assert_eq!(w.b.status_of(2), Some(IoStatus::Ok));
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

/// The configuration with the target was on its way, and another took its place. The first may be stored all the
/// same: the rebuild was given up at once, and what was acked from then on could be read from a member without it.
#[test]
fn who_joins_by_a_configuration_that_was_given_up_leaves_by_one_that_is_stored() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    w.write(2, 5, 1, 4);
    w.run();
    w.b.connect(1);
    while w.b.nexus.rebuild().is_none() {
        w.b.pass(100);
    }
    w.b.hold_registers = true;
    let joins = |io: &ChildIo| match &io.op {
        ChildOp::Register(RegisterOp::Accept(new)) => {
            Config::decode(&new.config).unwrap().members[1].in_sync
        }
        _ => false,
    };
    while !w.b.held.iter().any(joins) {
        w.b.answer_registers();
        w.b.hold_registers = true;
        w.run();
        w.b.pass(10);
    }
    w.b.nexus.commit_wanted();
    w.b.pump();
    w.b.disconnect(1);
    w.write(3, 900, 1, 9);
    while w.b.pending(1) > 0 {
        w.b.answer(1, IoStatus::PathError);
    }
    w.run();
    // The last replica has the first of the two, which is a majority's with the target.
    let at = w.b.held.iter().position(|io| io.child == ChildId(2)).unwrap();
    let io = w.b.held.remove(at).unwrap();
    w.b.obey(&io).unwrap();
    assert_eq!(w.b.stored_in_sync(2), [true; 3]);
    assert_eq!(w.b.status_of(3), None, "the replica that is gone may be read next");
    w.b.answer_registers();
    w.run();
    assert_eq!(w.b.status_of(3), Some(IoStatus::Ok));
    assert_eq!(w.b.stored_in_sync(2), [true, false, true]);
    w.b.connect(1);
    rest(&mut w);
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

#[test]
fn who_misses_a_restore_gets_everything() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    let now = w.b.now;
    w.b.nexus.set_restoring(Some(cairn_block::SnapshotId(9)), now).unwrap();
    w.run();
    w.submit(2, IoOp::Snapshot(cairn_block::SnapshotVerb::Restore), 0, 1000, 0);
    for child in [0, 2] {
        w.b.answer(child, IoStatus::Ok);
    }
    w.b.disconnect(1);
    assert_eq!(w.b.status_of(2), Some(IoStatus::Ok));
    let stored = Config::decode(&w.b.registers[0].config).unwrap();
    assert_eq!((stored.members[1].in_sync, stored.members[1].since), (false, 0));
}

#[test]
fn what_the_target_lacks_since_a_round_began_is_not_said_to_be_copied() {
    let mut w = world(3);
    fill(&mut w, 1, 1000, 3);
    w.run();
    rest(&mut w);
    // No round begins by itself.
    w.b.nexus.config.pace.settle_ms = 1 << 30;
    w.b.disconnect(1);
    fill(&mut w, 2, 1000, 4);
    w.run();
    w.b.nexus.config.pace.rebuild_mib_s = 1;
    w.b.nexus.config.pace.checkpoint_ms = 1 << 30;
    w.b.connect(1);
    while w.b.nexus.rebuild().is_none_or(|r| r.bytes_done < 2 << 20) {
        w.b.pass(100);
        w.run();
    }
    w.b.nexus.config.child_deadline_ms = 1 << 30;
    w.b.nexus.config.child_deadline_min_ms = 1 << 30;
    // One write is slow, another meets a full pool, and a round begins.
    w.write(3, 990, 1, 5);
    w.write(4, 10, 1, 6);
    w.b.nexus.settle_by(w.b.now);
    w.b.pass(1);
    let is = |io: &ChildIo, lba| matches!(io.op, ChildOp::Io(r) if r.range.start().0 == lba);
    for child in [0, 1] {
        let at = w.b.io.iter().position(|io| io.child == ChildId(child) && is(io, 10)).unwrap();
        w.serve(at);
    }
    let at = w.b.io.iter().position(|io| is(io, 10)).unwrap();
    let io = w.b.io.remove(at).unwrap();
    w.b.nexus.handle_io(io.child, io.ticket, IoStatus::NoSpace, w.b.now);
    w.b.pump();
    while let Some(at) = w.b.io.iter().position(|io| !is(io, 990)) {
        w.serve(at);
    }
    assert_eq!(w.b.status_of(4), Some(IoStatus::NoSpace));
    w.run();
    let stored = Config::decode(&w.b.registers[0].config).unwrap();
    assert_eq!(stored.members[1].copied, 0, "its first extent is to be copied once more");
    w.b.nexus.config.pace.rebuild_mib_s = 0;
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

/// A member had it and its session was lost before it could say so; the other one refused. They were taken to
/// be as alike as before.
#[test]
fn a_write_that_nobody_owns_up_to_leaves_the_members_alike() {
    let mut w = world(2);
    rest(&mut w);
    w.write(1, 5, 1, 9);
    w.disks[0].data[5] = 9;
    w.b.answer(0, IoStatus::PathError);
    w.b.answer(1, IoStatus::MediaError);
    w.run();
    assert!(w.b.status_of(1).is_some_and(|status| !status.is_ok()));
    assert_eq!(w.in_sync(), [0, 1]);
    w.assert_alike();
}

#[test]
fn a_target_that_is_removed_is_rebuilt_no_more() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    fill(&mut w, 2, 900, 4);
    w.run();
    w.b.connect(1);
    while w.b.nexus.rebuild().is_none() {
        w.b.pass(100);
    }
    w.b.nexus.remove_voter(ChildId(1), w.b.now).unwrap();
    w.b.pump();
    assert!(w.b.nexus.rebuild().is_none());
    assert!(w.b.nexus.forget_child(ChildId(1)));
    w.b.disconnect(1);
    rest(&mut w);
    assert_eq!(w.b.nexus.status().children[1].state, ChildState::Removed);
    w.assert_idle();
}

/// A write met a full pool while the target was being taken back. The others were asked what they hold, then the
/// target was in, and then the others were made alike without it.
#[test]
fn nobody_joins_while_members_are_made_alike() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.b.disconnect(1);
    w.write(2, 5, 1, 4);
    w.run();
    w.b.connect(1);
    let joins = |io: &ChildIo| match &io.op {
        ChildOp::Register(RegisterOp::Accept(new)) => {
            Config::decode(&new.config).unwrap().members[1].in_sync
        }
        _ => false,
    };
    while !w.b.held.iter().any(joins) {
        w.b.answer_registers();
        w.b.hold_registers = true;
        w.run();
        w.b.pass(10);
    }
    w.write(3, 900, 1, 9);
    for child in [0, 1] {
        let at = w.b.io.iter().position(|io| io.child == ChildId(child)).unwrap();
        w.serve(at);
    }
    w.b.answer(2, IoStatus::NoSpace);
    // They are being read.
    w.b.answer_registers();
    w.run();
    assert_eq!(w.b.status_of(3), Some(IoStatus::NoSpace));
    w.assert_alike();
    for _ in 0..3 {
        rest(&mut w);
    }
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}

/// A new volume's first configuration did not say which life each machine was in, nor did one say so when a
/// machine had come back without having lost anything: who had lost power since could not be told.
#[test]
fn the_stored_configuration_says_in_which_life_each_machine_is() {
    let lives = |b: &Bench| {
        let stored = Config::decode(&b.registers[0].config).unwrap();
        stored.members.iter().map(|m| m.incarnation).collect::<Vec<_>>()
    };
    let registers = vec![Register { incarnation: 7, ..Register::default() }; 3];
    let mut b = Bench::new(3, Purpose::Create, registers);
    (0..3).for_each(|child| b.connect(child));
    assert_eq!(lives(&b), [7, 7, 7]);
    b.disconnect(1);
    b.registers[1].incarnation = 8;
    b.connect(1);
    assert_eq!(*b.nexus.state(), VolumeState::Online);
    assert_eq!(lives(&b), [7, 8, 7]);
    let seq = b.nexus.status().seq;
    b.disconnect(1);
    b.connect(1);
    assert_eq!(b.nexus.status().seq, seq, "it is the same");
}

/// A block could be read from nobody who was there, and from one who was away: it was tried again and again as
/// fast as disks answered.
#[test]
fn what_only_a_member_that_is_away_can_read_is_tried_again_after_a_while() {
    let mut w = world(3);
    fill(&mut w, 1, 900, 3);
    w.run();
    rest(&mut w);
    w.disks[1].dead = true;
    w.write(2, 5, 1, 4);
    w.run();
    w.disks[1].dead = false;
    assert_eq!(w.in_sync(), [0, 2]);
    w.b.disconnect(2);
    w.disks[0].bad.insert(5);
    let mut served = 0;
    for _ in 0..100 {
        w.b.pass(100);
        while !w.b.io.is_empty() {
            w.serve(0);
            served += 1;
            assert!(served < 2_000, "it is tried all the time");
        }
    }
    assert!(w.b.nexus.rebuild().is_some());
    w.b.connect(2);
    rest(&mut w);
    assert_eq!(w.in_sync(), [0, 1, 2]);
    assert!(w.disks[0].bad.is_empty());
    w.assert_alike();
}

#[test]
fn the_list_of_a_rebuild_that_was_given_up_is_not_taken_for_the_next_ones() {
    let mut w = world(3);
    rest(&mut w);
    w.b.disconnect(1);
    w.b.disconnect(2);
    fill(&mut w, 1, 300, 7);
    w.run();
    rest(&mut w);
    // The first to come back is late with its list, and the source cannot tell of its own.
    w.b.late_lists = ChildSet::of(ChildId(1));
    w.b.no_list = Some(0);
    w.b.connect(1);
    w.b.connect(2);
    for _ in 0..400 {
        w.b.pass(100);
        w.run();
        if w.b.nexus.rebuild().is_some_and(|r| r.child == ChildId(2)) {
            break;
        }
    }
    assert_eq!(w.b.late.len(), 1);
    w.b.late_lists = ChildSet::EMPTY;
    w.b.no_list = None;
    let late = w.b.late.remove(0);
    // It has nothing: taken for the source's, nobody would need anything.
    w.b.extents[1].fill(0);
    w.b.answer_upkeep(&late);
    w.b.pump();
    for _ in 0..10 {
        rest(&mut w);
    }
    assert_eq!(w.in_sync(), [0, 1, 2]);
    w.assert_alike();
}
