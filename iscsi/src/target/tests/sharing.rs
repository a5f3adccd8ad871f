//! What initiators do to each other: attentions, reservations, task management, access states.

use cairn_block::reservation::{Action, Registrant, ReservationType};

use super::*;
use crate::scsi::ports::{AccessState, PortGroup};

const TEST_UNIT_READY: [u8; 6] = [0; 6];
const TASK_ABORTED: u8 = 0x40;

fn reserve_out(world: &mut World, h: usize, action: u8, kind: u8, keys: (u64, u64)) -> Reply {
    reserve_out_flags(world, h, action, kind, keys, 0)
}

fn reserve_out_flags(
    world: &mut World,
    h: usize,
    action: u8,
    kind: u8,
    keys: (u64, u64),
    flags: u8,
) -> Reply {
    let mut list = [0; 24];
    put(&mut list, 0, &keys.0.to_be_bytes());
    put(&mut list, 8, &keys.1.to_be_bytes());
    list[20] = flags;
    world.scsi(h, 0, &[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list, 0)
}

#[test]
fn a_new_nexus_is_told_so_once() {
    let mut world = World::new();
    let h = world.connect(1);
    world.login(h, OPERATIONAL, Some(FULL_FEATURE), &[], true);
    assert_eq!(world.scsi(h, 0, &[0x12, 0, 0, 0, 36, 0], &[], 36).status, GOOD, "INQUIRY passes");
    assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).key(), (6, 0x29, 0));
    assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).status, GOOD);
    let sense = world.scsi(h, 1, &[0x03, 0, 0, 0, 18, 0], &[], 18).data;
    assert_eq!((sense[2], sense[12]), (6, 0x29), "REQUEST SENSE takes it");
    assert_eq!(world.scsi(h, 1, &TEST_UNIT_READY, &[], 0).status, GOOD);
    world.close();
}

#[test]
fn a_new_size_is_told() {
    let (mut world, h) = World::ready();
    world.target.resize_unit(world.node, 0, BLOCKS / 2).unwrap();
    assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).key(), (6, 0x2a, 9));
    let last = u32::try_from(BLOCKS / 2).unwrap();
    assert_eq!(world.scsi(h, 0, &read10(last, 1), &[], 512).key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 1, &TEST_UNIT_READY, &[], 0).status, GOOD);
    world.close();
}

#[test]
fn reserve_keeps_others_out() {
    let (mut world, a) = World::ready();
    let b = world.join(2);
    let (reserve, release) = ([0x16, 0, 0, 0, 0, 0], [0x17, 0, 0, 0, 0, 0]);
    assert_eq!(world.scsi(a, 0, &reserve, &[], 0).status, GOOD);
    assert_eq!(world.scsi(a, 0, &reserve, &[], 0).status, GOOD, "again");
    assert_eq!(world.scsi(b, 0, &reserve, &[], 0).status, CONFLICT);
    assert_eq!(world.scsi(b, 0, &TEST_UNIT_READY, &[], 0).status, CONFLICT);
    assert_eq!(world.scsi(b, 0, &read10(0, 1), &[], 512).status, CONFLICT);
    assert_eq!(world.scsi(b, 0, &[0x12, 0, 0, 0, 36, 0], &[], 36).status, GOOD);
    assert_eq!(world.scsi(b, 0, &release, &[], 0).status, GOOD, "not its own: nothing happens");
    assert_eq!(world.scsi(b, 0, &TEST_UNIT_READY, &[], 0).status, CONFLICT);
    assert_eq!(world.scsi(b, 1, &TEST_UNIT_READY, &[], 0).status, GOOD, "another unit");
    world.hang_up(a);
    assert_eq!(world.scsi(b, 0, &reserve, &[], 0).status, GOOD, "it ends with the nexus");
    world.close();
}

#[test]
fn persistent_reservations_outlive_the_session() {
    let (mut world, a) = World::ready();
    let b = world.join(2);
    assert_eq!(reserve_out(&mut world, a, 0, 0, (0, 11)).status, GOOD);
    assert_eq!(reserve_out(&mut world, a, 1, 1, (11, 0)).status, GOOD);
    assert_eq!(world.scsi(b, 0, &write10(0, 1), &[1; 512], 0).status, CONFLICT);
    assert_eq!(world.scsi(b, 0, &read10(0, 1), &[], 512).status, GOOD, "Write Exclusive");
    assert_eq!(world.scsi(b, 0, &[0x16, 0, 0, 0, 0, 0], &[], 0).status, CONFLICT);
    world.hang_up(a);
    assert_eq!(world.scsi(b, 0, &write10(0, 1), &[1; 512], 0).status, CONFLICT);
    let a = world.join(1);
    assert_eq!(world.scsi(a, 0, &write10(0, 1), &[1; 512], 0).status, GOOD, "the same nexus");
    // Preempted: the old holder's command is aborted, and it is told.
    assert_eq!(reserve_out(&mut world, b, 0, 0, (0, 22)).status, GOOD);
    world.hold = true;
    let aborted = world.start(a, 0, &write10(0, 1), &[3; 512], 512, 512);
    world.run();
    let mut list = [0; 24];
    list[7] = 22;
    list[15] = 11;
    let itt = world.start(b, 0, &[0x5f, 5, 3, 0, 0, 0, 0, 0, 24, 0], &list, 24, 24);
    world.run();
    assert!(world.receive(b).is_none(), "not before the write has ended");
    assert!(matches!(world.held[1], (_, Outcome::Reserve { .. })));
    world.hold = false;
    world.release_held();
    world.run();
    assert_eq!(world.finish(b, itt, &[]).status, GOOD);
    assert_eq!(world.finish(a, aborted, &[]).status, TASK_ABORTED);
    assert_eq!(world.scsi(a, 0, &TEST_UNIT_READY, &[], 0).key(), (6, 0x2a, 5));
    assert_eq!(world.scsi(a, 0, &read10(0, 1), &[], 512).status, CONFLICT);
    world.close();
}

/// A handle has one table, wherever it is a logical unit; what is stored goes to the next target.
#[test]
fn reservations_are_stored_and_belong_to_the_handle() {
    let (mut world, h) = World::ready();
    assert_eq!(reserve_out_flags(&mut world, h, 0, 0, (0, 11), 1).status, GOOD);
    assert_eq!(reserve_out(&mut world, h, 1, 3, (11, 0)).status, GOOD);
    assert_eq!(reserve_out(&mut world, h, 1, 1, (11, 0)).status, CONFLICT);
    assert_eq!(world.stored.len(), 2, "what is refused is not stored");
    let stored = Reservations::decode(&world.stored[1]).unwrap();
    assert!(stored.aptpl() && stored.reserved().is_some());
    assert_eq!(world.target.reservations(UnitHandle(0)), Some(&stored));
    let mut again = unit(3);
    again.handle = UnitHandle(0);
    let mut other = World::new();
    other.target.add_unit(other.node, again).unwrap();
    let effects = Effects::default();
    other.target.set_reservations(UnitHandle(0), stored.clone(), &effects).unwrap();
    let nowhere = other.target.set_reservations(UnitHandle(77), stored, &effects);
    assert_eq!(nowhere, Err(TargetError::UnknownUnit));
    let b = other.join(2);
    other.scsi(b, 3, &TEST_UNIT_READY, &[], 0);
    assert_eq!(other.scsi(b, 3, &read10(0, 1), &[], 512).status, CONFLICT);
    assert_eq!(other.scsi(b, 1, &read10(0, 1), &[], 512).status, GOOD);
    assert_eq!(other.scsi(b, 0, &read10(0, 1), &[], 512).status, CONFLICT);
    let a = other.join(1);
    assert_eq!(other.scsi(a, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.close();
    other.close();
}

#[test]
fn a_reservation_that_is_not_stored_does_not_hold() {
    let (mut world, a) = World::ready();
    let b = world.join(2);
    assert_eq!(reserve_out(&mut world, a, 0, 0, (0, 11)).status, GOOD);
    world.cut_off = true;
    assert_eq!(reserve_out(&mut world, a, 1, 3, (11, 0)).key(), (2, 4, 1));
    assert_eq!(world.scsi(b, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.cut_off = false;
    assert_eq!(reserve_out(&mut world, a, 1, 3, (11, 0)).status, GOOD);
    assert_eq!(world.scsi(b, 0, &read10(0, 1), &[], 512).status, CONFLICT);
    world.close();
}

/// Who loses a registration is told at each LUN that leads to the volume; so is it by a host of NVMe.
#[test]
fn a_change_is_told_wherever_the_volume_is() {
    let (mut world, h) = World::ready();
    let mut again = unit(3);
    again.handle = UnitHandle(0);
    world.target.add_unit(world.node, again).unwrap();
    for lun in [0, 1, 3] {
        world.scsi(h, lun, &TEST_UNIT_READY, &[], 0);
    }
    assert_eq!(reserve_out(&mut world, h, 0, 0, (0, 11)).status, GOOD);
    let mut table = world.target.reservations(UnitHandle(0)).unwrap().clone();
    let registrant = Registrant::Nvme { host_id: 5, host_nqn: "nqn.2025-01.io.cairn:host".into() };
    let register = Action::Register { new_key: 22, aptpl: None };
    table.apply(&Change { registrant: registrant.clone(), key: 0, action: register }).unwrap();
    let kind = ReservationType::ExclusiveAccess;
    let take = Action::Preempt { victim: 11, kind, abort: true };
    let effects = table.apply(&Change { registrant, key: 22, action: take }).unwrap();
    world.target.set_reservations(UnitHandle(0), table, &effects).unwrap();
    world.run();
    for lun in [0, 3] {
        assert_eq!(world.scsi(h, lun, &TEST_UNIT_READY, &[], 0).key(), (6, 0x2a, 5), "LUN {lun}");
    }
    assert_eq!(world.scsi(h, 1, &TEST_UNIT_READY, &[], 0).status, GOOD);
    world.close();
}

const ABORT_TASK: u8 = 1;
const ABORT_TASK_SET: u8 = 2;
const CLEAR_TASK_SET: u8 = 4;
const UNIT_RESET: u8 = 5;
const COLD_RESET: u8 = 7;

#[test]
fn a_task_is_aborted_wherever_it_is() {
    let (mut world, h) = World::ready();
    // Its data is on the way.
    let itt = world.start(h, 0, &write10(0, 8), &[1; 4096], 4096, 0);
    world.run();
    let ttt = world.r2t(h);
    assert_eq!(world.task_management(h, ABORT_TASK, 0, itt), 0);
    world.send_data(h, itt, ttt, 0, &[1; 4096]);
    world.run();
    assert!(world.receive(h).is_none() && world.disks[0][0] == 0);
    // It is being carried out: the answer waits for it.
    world.hold = true;
    let itt = world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    world.run();
    world.manage(h, ABORT_TASK, 0, itt);
    assert!(world.receive(h).is_none());
    world.hold = false;
    world.release_held();
    world.run();
    let (header, _) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::TaskManagementResponse { response: 0, .. }));
    assert!(world.receive(h).is_none(), "the task itself has no answer");
    assert_eq!(world.task_management(h, ABORT_TASK, 0, NOBODY), 1);
    assert_eq!(world.task_management(h, ABORT_TASK_SET, 9, 0), 2, "no such LUN");
    assert_eq!(world.task_management(h, 8, 0, 0), 4, "TASK REASSIGN");
    assert_eq!(world.task_management(h, 3, 0, 0), 5, "CLEAR ACA");
    world.close();
}

#[test]
fn resets_reach_the_others() {
    let (mut world, a) = World::ready();
    let b = world.join(2);
    assert_eq!(world.scsi(a, 0, &[0x16, 0, 0, 0, 0, 0], &[], 0).status, GOOD);
    let itt = world.start(b, 1, &write10(0, 8), &[1; 4096], 4096, 0);
    world.run();
    assert!(world.receive(b).is_some(), "an R2T");
    assert_eq!(world.task_management(a, CLEAR_TASK_SET, 1, 0), 0);
    assert_eq!(world.finish(b, itt, &[]).status, TASK_ABORTED);
    // TAS says so.
    assert_eq!(world.scsi(a, 0, &[0x1a, 8, 0x0a, 0, 255, 0], &[], 255).data[9], 0x40);
    assert_eq!(world.scsi(b, 1, &TEST_UNIT_READY, &[], 0).status, GOOD, "it knows by that");
    assert_eq!(world.scsi(a, 1, &TEST_UNIT_READY, &[], 0).status, GOOD);
    assert_eq!(world.task_management(b, UNIT_RESET, 0, 0), 0);
    for h in [a, b] {
        assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).key(), (6, 0x29, 3));
        assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).status, GOOD, "not reserved");
    }
    assert_eq!(world.task_management(a, COLD_RESET, 0, 0), 0);
    assert!(world.hosts[b].conn.is_none());
    assert!(world.hosts[a].conn.as_ref().unwrap().wants_close());
    world.close();
}

#[test]
fn access_states_decide() {
    let mut config = node_config();
    let group = |id, state, port| PortGroup { id, state, ports: vec![port] };
    config.port_groups =
        vec![group(1, AccessState::Standby, 1), group(2, AccessState::Optimized, 2)];
    let mut world = World::with(config, TargetConfig::default());
    let h = world.connect(1);
    world.login(h, OPERATIONAL, Some(FULL_FEATURE), &[], true);
    world.scsi(h, 0, &TEST_UNIT_READY, &[], 0);
    assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).key(), (2, 4, 0x0b));
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).key(), (2, 4, 0x0b));
    // What Linux makes a disk of: its cache and its size. Told late, it is a disk without either.
    assert_eq!(world.scsi(h, 0, &[0x1a, 8, 8, 0, 255, 0], &[], 255).status, GOOD);
    assert_eq!(world.scsi(h, 0, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8).status, GOOD);
    let capacity_16 = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    assert_eq!(world.scsi(h, 0, &capacity_16, &[], 32).status, GOOD);
    let read_keys = [0x5e, 0, 0, 0, 0, 0, 0, 0, 255, 0];
    assert_eq!(world.scsi(h, 0, &read_keys, &[], 255).key(), (2, 4, 0x0b));
    let groups = world.scsi(h, 0, &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[], 256).data;
    assert_eq!((groups[4], groups[16]), (2, 0));
    let now = vec![group(1, AccessState::NonOptimized, 1), group(2, AccessState::Unavailable, 2)];
    world.target.set_port_groups(world.node, now).unwrap();
    assert_eq!(world.scsi(h, 0, &TEST_UNIT_READY, &[], 0).key(), (6, 0x2a, 6));
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.close();
}

/// A write for a unit that is gone: what came at its LUN does not get it.
#[test]
fn tasks_of_a_unit_go_with_it() {
    let (mut world, h) = World::ready();
    let itt = world.start(h, 0, &write10(0, 8), &[1; 4096], 4096, 0);
    world.run();
    let ttt = world.r2t(h);
    world.target.remove_unit(world.node, 0).unwrap();
    let mut other = unit(0);
    other.handle = UnitHandle(1);
    world.target.add_unit(world.node, other).unwrap();
    world.run();
    world.send_data(h, itt, ttt, 0, &[1; 4096]);
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, TASK_ABORTED);
    assert!(world.receive(h).is_none());
    assert_eq!((world.disks[0][0], world.disks[1][0]), (0, 0));
    world.close();
}

/// Its abortion is waited for, though its unit is gone.
#[test]
fn a_task_of_a_unit_that_is_gone_is_aborted_in_time() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let itt = world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    world.run();
    world.target.remove_unit(world.node, 0).unwrap();
    world.run();
    world.manage(h, ABORT_TASK, 0, itt);
    assert!(world.receive(h).is_none());
    assert!(
        matches!(&world.held[1], (_, Outcome::Drain { units, .. }) if units[..] == [UnitHandle(0)])
    );
    world.close();
}

/// A copy that another's unit is the destination of is aborted with that unit's tasks.
#[test]
fn preemption_reaches_copies() {
    let (mut world, a) = World::ready();
    let b = world.join(2);
    let out = |action: u8, kind: u8, key: u8, other: u8| {
        let mut list = [0; 24];
        (list[7], list[15]) = (key, other);
        ([0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], list)
    };
    for (h, (cdb, list)) in [(a, out(0, 0, 0, 11)), (a, out(1, 1, 11, 0)), (b, out(0, 0, 0, 22))] {
        assert_eq!(world.scsi(h, 1, &cdb, &list, 0).status, GOOD);
    }
    world.hold = true;
    let (cdb, list) = blocks::copy();
    let copy = world.start(a, 0, &cdb, &list, len32(list.len()), list.len());
    world.run();
    let (cdb, list) = out(5, 1, 22, 11);
    let preempt = world.start(b, 1, &cdb, &list, 24, 24);
    world.run();
    world.release_held();
    world.run();
    assert_eq!(world.finish(a, copy, &[]).status, TASK_ABORTED);
    assert_eq!(world.finish(b, preempt, &[]).status, GOOD);
    world.close();
}
