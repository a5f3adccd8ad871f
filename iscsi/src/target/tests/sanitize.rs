//! SANITIZE, and what a unit answers meanwhile.

use super::*;
use crate::scsi::SanitizeState;

const IN_PROGRESS: (u8, u8, u8) = (2, 0x04, 0x1b);
const FAILED: (u8, u8, u8) = (3, 0x31, 0x03);
const INVALID_LIST: (u8, u8, u8) = (5, 0x26, 0);
const OVERWRITE: u8 = 1;
const ERASE: u8 = 2;
const EXIT: u8 = 0x1f;
const AUSE: u8 = 0x20;

fn sanitize(action: u8, len: usize) -> [u8; 10] {
    let [high, low] = u16::try_from(len).unwrap().to_be_bytes();
    [0x48, action, 0, 0, 0, 0, 0, high, low, 0]
}

/// The parameter list of OVERWRITE.
fn list(flags: u8, pattern: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(pattern.len()).unwrap().to_be_bytes();
    [&[flags, 0, high, low], pattern].concat()
}

fn overwrite(world: &mut World, h: usize, list: &[u8]) -> Reply {
    world.scsi(h, 0, &sanitize(OVERWRITE, list.len()), list, 0)
}

#[test]
fn blocks_are_overwritten_and_erased() {
    let (mut world, h) = World::ready();
    assert_eq!(overwrite(&mut world, h, &list(1, &[1, 2, 3])).status, GOOD);
    assert_eq!(world.disks[0][BLOCK - 3..BLOCK + 3], [3, 1, 2, 1, 2, 3]);
    assert_eq!(world.scsi(h, 0, &sanitize(ERASE, 0), &[], 0).status, GOOD);
    assert!(world.disks[0].iter().all(|b| *b == 0));
    assert_eq!(world.scsi(h, 0, &sanitize(EXIT, 0), &[], 0).status, GOOD, "nothing failed");
    world.close();
}

#[test]
fn a_sanitize_that_makes_no_sense_is_refused() {
    let (mut world, h) = World::ready();
    world.disks[0].fill(9);
    for len in (0..5).chain([517]) {
        let reply = world.scsi(h, 0, &sanitize(OVERWRITE, len), &vec![1; len], 0);
        assert_eq!(reply.key(), INVALID_CDB, "{len} bytes");
    }
    for action in [ERASE, EXIT] {
        assert_eq!(world.scsi(h, 0, &sanitize(action, 8), &[0; 8], 0).key(), INVALID_CDB);
    }
    for (wrong, why) in [
        (list(0, &[1]), "no passes"),
        (list(0x21, &[1]), "TEST"),
        (vec![1, 1, 0, 1, 1], "reserved"),
        (vec![1, 0, 0, 0, 1], "no pattern"),
        (vec![1, 0, 0, 2, 1], "a pattern longer than the list"),
    ] {
        assert_eq!(overwrite(&mut world, h, &wrong).key(), INVALID_LIST, "{why}");
    }
    let mut protected = unit(7);
    (protected.read_only, protected.handle) = (true, UnitHandle(0));
    world.target.add_unit(world.node, protected).unwrap();
    assert_eq!(world.scsi(h, 7, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e), "it is new");
    assert_eq!(world.scsi(h, 7, &sanitize(ERASE, 0), &[], 0).key(), (7, 0x27, 0));
    assert!(world.disks[0].iter().all(|b| *b == 9), "nothing was done");
    world.close();
}

#[test]
fn little_is_carried_out_while_a_unit_is_sanitized() {
    let (mut world, h) = World::ready();
    let running = SanitizeState::Running { progress: 0x4000 };
    world.target.set_sanitize(UnitHandle(0), Some(running));
    let refused: [&[u8]; 6] = [
        &[0; 6],
        &read10(0, 1),
        &[0x1b, 0, 0, 0, 1, 0],
        &[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0],
        &sanitize(ERASE, 0),
        &sanitize(EXIT, 0),
    ];
    for cdb in refused {
        let reply = world.scsi(h, 0, cdb, &[], 0);
        assert_eq!(reply.key(), IN_PROGRESS, "{:#x}", cdb[0]);
        assert_eq!(reply.sense[15..18], [0x80, 0x40, 0], "how far it is");
    }
    let reply = world.scsi(h, 0, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!((reply.status, reply.data[2], reply.data[13]), (GOOD, 2, 0x1b), "REQUEST SENSE");
    assert_eq!(reply.data[15..18], [0x80, 0x40, 0]);
    let carried: [&[u8]; 4] = [
        &[0x12, 0, 0, 0, 96, 0],
        &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0],
        &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0],
        &[0xa3, 0x0c, 0x02, 0x48, 0, 1, 0, 0, 0, 96, 0, 0],
    ];
    for cdb in carried {
        assert_eq!(world.scsi(h, 0, cdb, &[], 96).status, GOOD, "{:#x}", cdb[0]);
    }
    assert_eq!(world.scsi(h, 1, &read10(0, 1), &[], 512).status, GOOD, "another unit");
    world.target.set_sanitize(UnitHandle(0), None);
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.close();
}

#[test]
fn what_failed_is_left_as_it_was_agreed_on() {
    let (mut world, h) = World::ready();
    let failed = |unrestricted| Some(SanitizeState::Failed { unrestricted });
    world.target.set_sanitize(UnitHandle(0), failed(false));
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).key(), FAILED);
    assert_eq!(world.scsi(h, 0, &sanitize(EXIT, 0), &[], 0).key(), INVALID_CDB, "restricted");
    assert_eq!(world.scsi(h, 0, &sanitize(ERASE | AUSE, 0), &[], 0).key(), INVALID_CDB);
    assert_eq!(world.scsi(h, 0, &sanitize(ERASE, 0), &[], 0).status, GOOD, "it is done anew");
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).status, GOOD);
    world.target.set_sanitize(UnitHandle(0), failed(true));
    let reply = world.scsi(h, 0, &[0x03, 0, 0, 0, 18, 0], &[], 18);
    assert_eq!((reply.data[2], reply.data[12], reply.data[13]), FAILED);
    assert_eq!(world.scsi(h, 0, &sanitize(EXIT, 0), &[], 0).status, GOOD);
    assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).status, GOOD);
    world.close();
}
