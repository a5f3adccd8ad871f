//! Units whose medium can be taken out: START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL, and who is told.

use super::*;

const PREVENTED: (u8, u8, u8) = (5, 0x53, 0x02);
const NO_MEDIUM: (u8, u8, u8) = (2, 0x3a, 0);
const MAY_HAVE_CHANGED: (u8, u8, u8) = (6, 0x28, 0);

const READY: [u8; 6] = [0; 6];
const PREVENT: [u8; 6] = [0x1e, 0, 0, 0, 1, 0];
const ALLOW: [u8; 6] = [0x1e, 0, 0, 0, 0, 0];
const STOP: [u8; 6] = [0x1b, 0, 0, 0, 0, 0];
const START: [u8; 6] = [0x1b, 0, 0, 0, 1, 0];
const EJECT: [u8; 6] = [0x1b, 0, 0, 0, 2, 0];
const LOAD: [u8; 6] = [0x1b, 0, 0, 0, 3, 0];

/// A world whose LUN 0 is removable, and a host of it that has nothing left to be told.
fn removable() -> (World, usize) {
    let (mut world, h) = World::ready();
    world.target.set_removable(world.node, 0, true).unwrap();
    assert_eq!(world.scsi(h, 0, &READY, &[], 0).key(), (6, 0x3f, 3), "INQUIRY data has changed");
    (world, h)
}

fn other(world: &mut World) -> usize {
    let h = world.join(2);
    world.clear_attentions(h);
    h
}

fn good(world: &mut World, h: usize, cdb: &[u8]) {
    let reply = world.scsi(h, 0, cdb, &[], 0);
    assert_eq!(reply.status, GOOD, "{cdb:x?}: {:x?}", reply.sense);
}

fn refused(world: &mut World, h: usize, cdb: &[u8], key: (u8, u8, u8)) {
    assert_eq!(world.scsi(h, 0, cdb, &[], 0).key(), key, "{cdb:x?}");
}

#[test]
fn only_a_removable_unit_says_so_and_ejects() {
    let (mut world, h) = removable();
    let rmb = |world: &mut World, lun| world.scsi(h, lun, &[0x12, 0, 0, 0, 96, 0], &[], 96).data[1];
    assert_eq!((rmb(&mut world, 0), rmb(&mut world, 1)), (0x80, 0));
    for cdb in [PREVENT, EJECT, STOP] {
        assert_eq!(world.scsi(h, 1, &cdb, &[], 0).status, GOOD);
        assert_eq!(world.scsi(h, 1, &READY, &[], 0).status, GOOD, "it does nothing");
    }
    good(&mut world, h, &EJECT);
    refused(&mut world, h, &READY, NO_MEDIUM);
    good(&mut world, h, &PREVENT);
    // A unit that is so no more has its medium, and nobody keeps it in.
    world.target.set_removable(world.node, 0, false).unwrap();
    refused(&mut world, h, &READY, MAY_HAVE_CHANGED);
    refused(&mut world, h, &READY, (6, 0x3f, 3));
    good(&mut world, h, &READY);
    assert_eq!(rmb(&mut world, 0), 0);
    world.target.set_removable(world.node, 0, true).unwrap();
    refused(&mut world, h, &READY, (6, 0x3f, 3));
    good(&mut world, h, &EJECT);
    world.close();
}

#[test]
fn little_is_carried_out_without_the_medium() {
    let (mut world, h) = removable();
    good(&mut world, h, &EJECT);
    let capacity_16 = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    let none: [&[u8]; 7] = [
        &READY,
        &read10(0, 1),
        &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &capacity_16,
        &ten(0x35, 0, 0),
        &[0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0],
        &START,
    ];
    for cdb in none {
        refused(&mut world, h, cdb, NO_MEDIUM);
    }
    assert_eq!(world.scsi(h, 0, &write10(0, 1), &[1; 512], 0).key(), NO_MEDIUM);
    assert_eq!(world.disks[0][0], 0);
    let asked = world.scsi(h, 0, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!(asked.status, GOOD);
    assert_eq!((asked.data[2], asked.data[12], asked.data[13]), NO_MEDIUM, "REQUEST SENSE");
    let some: [&[u8]; 8] = [
        &[0x12, 0, 0, 0, 96, 0],
        &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0],
        &[0x1a, 8, 8, 0, 96, 0],
        &[0x5e, 0, 0, 0, 0, 0, 0, 0, 96, 0],
        &[0xa3, 0x0c, 0, 0x1b, 0, 0, 0, 0, 0, 96, 0, 0],
        &STOP,
        &EJECT,
        &LOAD,
    ];
    for cdb in some {
        assert_eq!(world.scsi(h, 0, cdb, &[], 96).status, GOOD, "{:#x}", cdb[0]);
    }
    good(&mut world, h, &READY);
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.close();
}

/// Nor is it copied from or to, whichever unit is asked.
#[test]
fn copies_need_the_medium() {
    let (mut world, h) = removable();
    good(&mut world, h, &EJECT);
    let (cdb, list) = blocks::copy();
    assert_eq!(world.scsi(h, 1, &cdb, &list, 0).key(), NO_MEDIUM);
    good(&mut world, h, &LOAD);
    assert_eq!(world.scsi(h, 1, &cdb, &list, 0).status, GOOD);
    world.close();
}

/// Others use the unit: nothing but an eject takes it from them.
#[test]
fn a_unit_does_not_stop() {
    let (mut world, h) = removable();
    good(&mut world, h, &STOP);
    assert_eq!(world.flushes, 1);
    good(&mut world, h, &READY);
    // Where there is a power condition, the other bits do not count.
    for condition in 1..16 {
        good(&mut world, h, &[0x1b, 1, 0, 0, condition << 4 | 2, 0]);
        good(&mut world, h, &READY);
    }
    good(&mut world, h, &EJECT);
    for condition in 1..16 {
        good(&mut world, h, &[0x1b, 1, 0, 0, condition << 4 | 3, 0]);
        refused(&mut world, h, &READY, NO_MEDIUM);
    }
    world.close();
}

/// STOP and eject wait for what was written, and neither happens where that does not become durable.
#[test]
fn what_was_written_is_durable_before_it_goes() {
    for cdb in [EJECT, STOP] {
        let (mut world, h) = removable();
        let b = other(&mut world);
        world.hold = true;
        let itt = world.start(h, 0, &cdb, &[], 0, 0);
        world.run();
        let (_, Outcome::Io(io)) = world.held.remove(0) else { panic!("no flush") };
        assert!(matches!(io.command, IoCommand::Flush));
        good(&mut world, b, &READY);
        let conn = world.hosts[h].conn.as_mut().unwrap();
        conn.complete(io.slot, cairn_block::IoStatus::MediaError, &mut world.mem);
        world.run();
        assert_eq!(world.finish(h, itt, &[]).key(), (3, 0x11, 0));
        good(&mut world, h, &READY);
        world.hold = false;
        good(&mut world, h, &cdb);
        assert_eq!(world.flushes, 1);
        if cdb == EJECT {
            refused(&mut world, b, &READY, NO_MEDIUM);
        } else {
            good(&mut world, b, &READY);
        }
        world.close();
    }
}

/// What happens to the host, and to others, while it is flushed.
#[test]
fn an_eject_may_be_prevented_or_aborted_while_it_waits() {
    let (mut world, h) = removable();
    let b = other(&mut world);
    world.hold = true;
    let itt = world.start(h, 0, &EJECT, &[], 0, 0);
    world.run();
    good(&mut world, b, &PREVENT);
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).key(), PREVENTED);
    good(&mut world, b, &ALLOW);
    let itt = world.start(h, 0, &EJECT, &[], 0, 0);
    world.run();
    world.manage(h, 1, 0, itt);
    world.hold = false;
    world.release_held();
    world.run();
    let (header, _) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::TaskManagementResponse { response: 0, .. }));
    good(&mut world, h, &READY);
    good(&mut world, b, &READY);
    assert_eq!(world.hosts[h].conn.as_ref().unwrap().outstanding(), 0);
    // What else has happened is for the next command.
    world.hold = true;
    let itt = world.start(h, 0, &EJECT, &[], 0, 0);
    world.run();
    world.target.set_read_only(world.node, 0, true).unwrap();
    world.hold = false;
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, GOOD);
    refused(&mut world, h, &READY, (6, 0x2a, 1));
    refused(&mut world, h, &READY, NO_MEDIUM);
    world.close();
}

#[test]
fn whoever_prevents_it_is_waited_for() {
    let (mut world, a) = removable();
    let b = other(&mut world);
    for h in [a, b, a] {
        good(&mut world, h, &PREVENT);
    }
    refused(&mut world, a, &EJECT, PREVENTED);
    refused(&mut world, b, &EJECT, PREVENTED);
    good(&mut world, a, &READY);
    // It holds against removal alone; a medium that is there can be loaded.
    good(&mut world, a, &STOP);
    good(&mut world, a, &LOAD);
    good(&mut world, a, &ALLOW);
    refused(&mut world, a, &EJECT, PREVENTED);
    good(&mut world, b, &ALLOW);
    good(&mut world, b, &EJECT);
    // One that is out stays there.
    good(&mut world, b, &PREVENT);
    refused(&mut world, a, &LOAD, PREVENTED);
    refused(&mut world, a, &READY, NO_MEDIUM);
    good(&mut world, b, &ALLOW);
    good(&mut world, a, &LOAD);
    world.close();
}

#[test]
fn others_are_told_that_the_medium_may_have_changed() {
    let (mut world, a) = removable();
    let b = other(&mut world);
    good(&mut world, a, &STOP);
    good(&mut world, a, &START);
    good(&mut world, b, &READY);
    good(&mut world, a, &EJECT);
    refused(&mut world, b, &READY, NO_MEDIUM);
    good(&mut world, a, &LOAD);
    good(&mut world, a, &READY);
    refused(&mut world, b, &READY, MAY_HAVE_CHANGED);
    good(&mut world, b, &READY);
    good(&mut world, a, &LOAD);
    good(&mut world, b, &READY);
    world.close();
}

/// What another process did to the medium meanwhile is not known here: it is there.
#[test]
fn a_unit_that_has_stood_by_has_its_medium() {
    let (mut world, h) = removable();
    let turn = |world: &mut World, state| {
        let groups = vec![PortGroup { id: 1, state, ports: vec![1] }];
        world.target.set_port_groups(world.node, groups).unwrap();
    };
    good(&mut world, h, &EJECT);
    turn(&mut world, AccessState::NonOptimized);
    refused(&mut world, h, &READY, (6, 0x2a, 6));
    refused(&mut world, h, &READY, NO_MEDIUM);
    turn(&mut world, AccessState::Standby);
    turn(&mut world, AccessState::Optimized);
    refused(&mut world, h, &READY, MAY_HAVE_CHANGED);
    refused(&mut world, h, &READY, (6, 0x2a, 6));
    good(&mut world, h, &READY);
    world.close();
}

#[test]
fn a_session_that_ends_prevents_nothing() {
    for logs_out in [false, true] {
        let (mut world, a) = removable();
        let b = other(&mut world);
        good(&mut world, b, &PREVENT);
        refused(&mut world, a, &EJECT, PREVENTED);
        if logs_out {
            let (itt, sn) = world.next_sn(b);
            world.send(b, Header::new(itt, 0, Body::Logout { reason: 0, cid: 9, sn }), &[]);
            world.run();
        } else {
            world.hang_up(b);
        }
        good(&mut world, a, &EJECT);
        world.close();
    }
}

#[test]
fn resets_let_the_medium_go_but_do_not_load_it() {
    const UNIT_RESET: u8 = 5;
    const WARM_RESET: u8 = 6;
    const COLD_RESET: u8 = 7;
    for function in [UNIT_RESET, WARM_RESET, COLD_RESET] {
        let (mut world, a) = removable();
        let b = other(&mut world);
        good(&mut world, b, &PREVENT);
        // Another unit's reset does nothing.
        assert_eq!(world.task_management(a, UNIT_RESET, 1, 0), 0);
        refused(&mut world, a, &EJECT, PREVENTED);
        assert_eq!(world.task_management(a, function, 0, 0), 0);
        let a = if function == COLD_RESET { world.join(3) } else { a };
        world.clear_attentions(a);
        good(&mut world, a, &EJECT);
        assert_eq!(world.task_management(a, UNIT_RESET, 0, 0), 0);
        refused(&mut world, a, &READY, (6, 0x29, 3));
        refused(&mut world, a, &READY, NO_MEDIUM);
        world.close();
    }
}

fn reserve_out(world: &mut World, h: usize, action: u8, kind: u8, keys: (u8, u8)) -> u8 {
    let mut list = [0; 24];
    (list[7], list[15]) = keys;
    world.scsi(h, 0, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list, 0).status
}

#[test]
fn preempt_and_abort_lets_the_medium_go() {
    const PREEMPT: u8 = 4;
    const PREEMPT_AND_ABORT: u8 = 5;
    for (action, lets_go) in [(PREEMPT, false), (PREEMPT_AND_ABORT, true)] {
        let (mut world, a) = removable();
        let b = other(&mut world);
        assert_eq!(reserve_out(&mut world, a, 0, 0, (0, 11)), GOOD);
        assert_eq!(reserve_out(&mut world, b, 0, 0, (0, 22)), GOOD);
        good(&mut world, b, &PREVENT);
        refused(&mut world, a, &EJECT, PREVENTED);
        assert_eq!(reserve_out(&mut world, a, action, 1, (11, 22)), GOOD);
        match lets_go {
            true => good(&mut world, a, &EJECT),
            false => refused(&mut world, a, &EJECT, PREVENTED),
        }
        world.close();
    }
}

/// Whom a reservation keeps out may let the medium go, and start it; no more than that.
#[test]
fn reservations_keep_others_from_the_medium() {
    // Exclusive access, persistent and not.
    for persistent in [true, false] {
        let (mut world, a) = removable();
        let b = other(&mut world);
        good(&mut world, b, &PREVENT);
        if persistent {
            assert_eq!(reserve_out(&mut world, a, 0, 0, (0, 11)), GOOD);
            assert_eq!(reserve_out(&mut world, a, 1, 3, (11, 0)), GOOD);
        } else {
            good(&mut world, a, &[0x16, 0, 0, 0, 0, 0]);
        }
        for cdb in [PREVENT, EJECT, STOP, [0x1b, 0, 0, 0, 0x10, 0]] {
            assert_eq!(world.scsi(b, 0, &cdb, &[], 0).status, CONFLICT, "{cdb:x?}");
        }
        good(&mut world, b, &ALLOW);
        good(&mut world, a, &EJECT);
        good(&mut world, b, &LOAD);
        good(&mut world, b, &START);
        world.close();
    }
}
