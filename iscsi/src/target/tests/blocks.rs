//! Commands on blocks.

use super::*;

fn sixteen(code: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    let mut cdb = vec![0; 16];
    (cdb[0], cdb[1]) = (code, flags);
    put(&mut cdb, 2, &lba.to_be_bytes());
    put(&mut cdb, 10, &blocks.to_be_bytes());
    cdb
}

fn caw(lba: u64, blocks: u8) -> Vec<u8> {
    let mut cdb = vec![0; 16];
    cdb[0] = 0x89;
    put(&mut cdb, 2, &lba.to_be_bytes());
    cdb[13] = blocks;
    cdb
}

#[test]
fn reads_and_writes_of_every_length_of_cdb() {
    let (mut world, h) = World::ready();
    let block = |n: u8| vec![n; BLOCK];
    let twelve = |code| {
        let mut cdb = vec![0; 12];
        (cdb[0], cdb[5], cdb[9]) = (code, 9, 1);
        cdb
    };
    let writes =
        [vec![0x0a, 0, 0, 9, 1, 0], write10(9, 1), twelve(0xaa), sixteen(0x8a, 0x18, 9, 1)];
    let reads = [vec![0x08, 0, 0, 9, 1, 0], read10(9, 1), twelve(0xa8), sixteen(0x88, 0x10, 9, 1)];
    for (n, (write, read)) in (1..).zip(writes.iter().zip(&reads)) {
        assert_eq!(world.scsi(h, 0, write, &block(n), 0).status, GOOD);
        assert_eq!(world.scsi(h, 0, read, &[], 512).data, block(n));
    }
    let verify: [&[u8]; 2] = [&ten(0x2e, 9, 1), &sixteen(0x8e, 2, 9, 1)];
    for cdb in verify {
        assert_eq!(world.scsi(h, 0, cdb, &block(7), 0).status, GOOD, "WRITE AND VERIFY");
    }
    // Six bytes: none stands for 256.
    assert_eq!(world.scsi(h, 0, &[0x08, 0, 0, 0, 0, 0], &[], 256 * 512).data.len(), 256 * 512);
    world.close();
}

#[test]
fn ranges_end_with_the_unit() {
    let (mut world, h) = World::ready();
    let last = u32::try_from(BLOCKS).unwrap() - 1;
    assert_eq!(world.scsi(h, 0, &read10(last, 1), &[], 512).status, GOOD);
    assert_eq!(world.scsi(h, 0, &read10(last, 2), &[], 1024).key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 0, &read10(last + 2, 0), &[], 0).key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 0, &read10(last, 0), &[], 0).status, GOOD);
    assert_eq!(world.scsi(h, 0, &write10(last, 2), &[1; 1024], 0).key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 0, &sixteen(0x88, 0, u64::MAX, 2), &[], 512).key(), OUT_OF_RANGE);
    let mut large = unit(4);
    (large.blocks, large.handle) = (1 << 20, UnitHandle(0));
    world.target.add_unit(world.node, large).unwrap();
    assert_eq!(world.scsi(h, 4, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e));
    assert_eq!(world.scsi(h, 4, &read10(0, 32769), &[], 512).key(), INVALID_CDB, "MTL");
    let long = world.scsi_edtl(h, 4, &write10(0, 32769), &[1; 512], 32769 * 512, 0);
    assert_eq!((long.key(), long.r2ts), (INVALID_CDB, 0), "its data is not even asked for");
    let long = world.scsi(h, 4, &sixteen(0x8b, 0, 0, 2049), &[1; 512], 0);
    assert_eq!(long.key(), INVALID_CDB, "ORWRITE is one step");
    world.close();
}

#[test]
fn verify_compares_where_it_is_told_to() {
    let (mut world, h) = World::ready();
    world.disks[0][..1024].fill(5);
    assert_eq!(world.scsi(h, 0, &ten(0x2f, 0, 2), &[], 0).status, GOOD);
    let mut cdb = ten(0x2f, 0, 2);
    cdb[1] = 2;
    assert_eq!(world.scsi(h, 0, &cdb, &[5; 1024], 0).status, GOOD);
    let mut other = vec![5; 1024];
    other[700] = 6;
    let reply = world.scsi(h, 0, &cdb, &other, 0);
    assert_eq!((reply.key(), u32_at(&reply.sense, 3)), ((0x0e, 0x1d, 0), 700));
    cdb[1] = 6;
    assert_eq!(world.scsi(h, 0, &cdb, &[5; 512], 0).status, GOOD, "one block for all");
    assert_eq!(world.scsi(h, 0, &cdb, &[4; 512], 0).key(), (0x0e, 0x1d, 0));
    cdb[1] = 4;
    assert_eq!(world.scsi(h, 0, &cdb, &[], 0).key(), INVALID_CDB, "BYTCHK 2");
    world.disks[0][0] = 0xbd;
    assert_eq!(world.scsi(h, 0, &ten(0x2f, 0, 2), &[], 0).key(), (3, 0x11, 0));
    world.close();
}

#[test]
fn compare_and_write_is_exact() {
    let (mut world, h) = World::ready();
    let two = |a: u8, b: u8| [vec![a; BLOCK], vec![b; BLOCK]].concat();
    assert_eq!(world.scsi(h, 0, &caw(3, 1), &two(0, 1), 0).status, GOOD);
    assert_eq!(world.disks[0][3 * BLOCK], 1);
    let reply = world.scsi(h, 0, &caw(3, 1), &two(0, 2), 0);
    assert_eq!((reply.key(), u32_at(&reply.sense, 3)), ((0x0e, 0x1d, 0), 0));
    assert_eq!(world.disks[0][3 * BLOCK], 1);
    assert_eq!(world.scsi(h, 0, &caw(3, 2), &two(1, 2), 0).key(), INVALID_CDB, "too little");
    assert_eq!(world.scsi(h, 0, &caw(3, 0), &[], 0).status, GOOD);
    world.close();
}

#[test]
fn write_same_and_unmap() {
    let (mut world, h) = World::ready();
    assert_eq!(world.scsi(h, 0, &ten(0x41, 2, 3), &[7; 512], 0).status, GOOD);
    assert_eq!(world.disks[0][2 * BLOCK..5 * BLOCK], [7; 3 * BLOCK]);
    assert_eq!(world.scsi(h, 0, &sixteen(0x93, 0x09, 2, 1), &[], 0).status, GOOD, "NDOB");
    assert_eq!(world.disks[0][2 * BLOCK], 0);
    assert_eq!(world.scsi(h, 0, &sixteen(0x93, 0x08, 3, 1), &[0; 512], 0).status, GOOD);
    assert_eq!((world.disks[0][3 * BLOCK], world.disks[0][4 * BLOCK]), (0, 7));
    assert_eq!(world.scsi(h, 0, &sixteen(0x93, 0x10, 3, 1), &[0; 512], 0).key(), INVALID_CDB);
    let all = u32::try_from(BLOCKS).unwrap();
    let reply = world.scsi(h, 0, &sixteen(0x93, 0, 1, all), &[0; 512], 0);
    assert_eq!(reply.key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 0, &sixteen(0x93, 0, 4, 0), &[0; 512], 0).key(), INVALID_CDB, "WSNZ");
    world.disks[0].fill(9);
    let list = |ranges: &[(u64, u32)]| {
        let mut b = vec![0; 8 + ranges.len() * 16];
        let len = u16::try_from(ranges.len() * 16).unwrap();
        put(&mut b, 0, &(len + 6).to_be_bytes());
        put(&mut b, 2, &len.to_be_bytes());
        for (i, (lba, blocks)) in ranges.iter().enumerate() {
            put(&mut b, 8 + i * 16, &lba.to_be_bytes());
            put(&mut b, 16 + i * 16, &blocks.to_be_bytes());
        }
        b
    };
    let unmap = |world: &mut World, list: &[u8]| {
        let len = u16::try_from(list.len()).unwrap();
        world.scsi(h, 0, &ten(0x42, 0, len), list, 0)
    };
    assert_eq!(unmap(&mut world, &list(&[(1, 2), (10, 1)])).status, GOOD);
    let zeros = [0, 1, 2, 3, 10].map(|n: usize| world.disks[0][n * BLOCK] == 0);
    assert_eq!(zeros, [false, true, true, false, true]);
    assert_eq!(unmap(&mut world, &list(&[(1, 2), (BLOCKS, 1)])).key(), OUT_OF_RANGE);
    assert_eq!(unmap(&mut world, &[]).status, GOOD);
    assert_eq!(unmap(&mut world, &list(&[])).status, GOOD);
    assert_eq!(unmap(&mut world, &[0; 7]).key(), (5, 0x1a, 0));
    world.close();
}

#[test]
fn the_rest_of_the_block_commands() {
    let (mut world, h) = World::ready();
    world.disks[0][..512].fill(0x0f);
    assert_eq!(world.scsi(h, 0, &sixteen(0x8b, 0, 0, 1), &[0xf0; 512], 0).status, GOOD, "ORWRITE");
    assert_eq!(world.disks[0][0], 0xff);
    assert_eq!(world.scsi(h, 0, &ten(0x35, 0, 0), &[], 0).status, GOOD);
    assert_eq!(world.scsi(h, 0, &sixteen(0x91, 2, 0, 0), &[], 0).status, GOOD);
    assert_eq!(world.scsi(h, 0, &[0x1b, 0, 0, 0, 0, 0], &[], 0).status, GOOD, "STOP");
    assert_eq!(world.flushes, 3);
    assert_eq!(world.scsi(h, 0, &ten(0x34, 0, 4), &[], 0).status, 0x04, "CONDITION MET");
    let far = u32::try_from(BLOCKS).unwrap();
    assert_eq!(world.scsi(h, 0, &ten(0x34, far, 4), &[], 0).key(), OUT_OF_RANGE);
    assert_eq!(world.scsi(h, 0, &ten(0x35, far, 4), &[], 0).key(), OUT_OF_RANGE);
    let mut atomic = sixteen(0x9c, 0, 8, 0);
    atomic[13] = 8;
    assert_eq!(world.scsi(h, 0, &atomic, &[1; 4096], 0).status, GOOD);
    atomic[13] = 9;
    assert_eq!(world.scsi(h, 0, &atomic, &[1; 4608], 0).key(), INVALID_CDB);
    // As much as one transfer brings, at most.
    let mut whole = unit(6);
    (whole.atomic_blocks, whole.handle) = (u32::MAX, UnitHandle(1));
    world.target.add_unit(world.node, whole).unwrap();
    world.clear_attentions(h);
    let told = world.scsi(h, 6, &[0x12, 1, 0xb0, 1, 0, 0], &[], 256).data;
    let told = [44, 48, 52, 56, 60].map(|at| u32_at(&told, at));
    assert_eq!(told, [2048, 1, 1, 0, 0], "length, alignment, granularity, and no boundary");
    let mut none = unit(7);
    (none.atomic_blocks, none.handle) = (0, UnitHandle(1));
    world.target.add_unit(world.node, none).unwrap();
    world.clear_attentions(h);
    assert_eq!(world.scsi(h, 7, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e), "LUNs have changed");
    assert_eq!(world.scsi(h, 7, &atomic, &[1; 4608], 0).key(), INVALID_OPCODE);
    let status = |lba, room: u32| sixteen(0x9e, 0x12, lba, room);
    let reply = world.scsi(h, 0, &status(3, 40), &[], 40);
    assert_eq!((u32_at(&reply.data, 0), u64_at(&reply.data, 8)), (36, 3));
    assert_eq!((u32_at(&reply.data, 16), reply.data[20], reply.data[36]), (5, 0, 1));
    assert_eq!(world.scsi(h, 0, &status(BLOCKS, 40), &[], 40).key(), OUT_OF_RANGE);
    world.close();
}

#[test]
fn a_cache_that_is_turned_off_is_written_through() {
    let (mut world, h) = World::ready();
    let mut list = world.scsi(h, 0, &[0x1a, 8, 8, 0, 255, 0], &[], 255).data;
    assert_eq!(list[6], 4, "WCE");
    (list[0], list[2], list[6]) = (0, 0, 0);
    let len = list.len().to_le_bytes()[0];
    let other = world.join(2);
    assert_eq!(world.scsi(h, 0, &[0x15, 0x10, 0, 0, len, 0], &list, 0).status, GOOD);
    assert_eq!(world.scsi(other, 0, &[0; 6], &[], 0).key(), (6, 0x2a, 1), "the other is told");
    world.hold = true;
    world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    world.run();
    let (_, Outcome::Io(io)) = &world.held[0] else { panic!("no request") };
    assert!(matches!(io.command, IoCommand::Write { fua: true, .. }));
    world.close();
}

#[test]
fn write_protection_holds() {
    let (mut world, h) = World::ready();
    let mut read_only = unit(5);
    (read_only.read_only, read_only.handle) = (true, UnitHandle(1));
    world.target.add_unit(world.node, read_only).unwrap();
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e), "LUNs have changed");
    assert_eq!(world.scsi(h, 5, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e), "here too");
    assert_eq!(world.scsi(h, 5, &write10(0, 1), &[1; 512], 0).key(), (7, 0x27, 0));
    assert_eq!(world.scsi(h, 5, &read10(0, 1), &[], 512).status, GOOD);
    assert_eq!(world.scsi(h, 5, &[0x1a, 8, 8, 0, 255, 0], &[], 255).data[2] & 0x80, 0x80);
    world.close();
}

/// EXTENDED COPY of 4 blocks from block 5 of LUN 0 to block 1 of LUN 1, and its parameter list.
pub(super) fn copy() -> (Vec<u8>, Vec<u8>) {
    let mut list = vec![0; 16 + 64 + 28];
    list[0] = 0x42;
    list[3] = 64;
    list[11] = 28;
    for lun in 0..2_u16 {
        let at = 16 + 32 * usize::from(lun);
        put(&mut list, at, &[0xe4, 0, 0, 0, 1, 3, 0, 8]);
        put(&mut list, at + 8, &crate::scsi::inquiry::naa(&unit(lun)));
        put(&mut list, at + 30, &512_u16.to_be_bytes());
    }
    put(&mut list, 80, &[2, 0, 0, 24, 0, 0, 0, 1, 0, 0, 0, 4]);
    list[80 + 19] = 5;
    list[80 + 27] = 1;
    let mut cdb = vec![0; 16];
    (cdb[0], cdb[13]) = (0x83, 108);
    (cdb, list)
}

#[test]
fn a_copy_goes_from_unit_to_unit() {
    let (mut world, h) = World::ready();
    world.disks[0][5 * BLOCK..9 * BLOCK].fill(8);
    let (cdb, list) = copy();
    let mut status = vec![0; 16];
    (status[0], status[2], status[13]) = (0x84, 0x42, 12);
    assert_eq!(world.scsi(h, 0, &status, &[], 12).key(), INVALID_CDB, "there was no copy");
    assert_eq!(world.scsi(h, 0, &cdb, &list, 0).status, GOOD);
    assert_eq!(world.disks[1][BLOCK..5 * BLOCK], [8; 4 * BLOCK]);
    assert_eq!(world.scsi(h, 0, &status, &[], 12).data[4..7], [1, 0, 1]);
    status[13] = 5;
    assert_eq!(world.scsi(h, 0, &status, &[], 12).data.len(), 5, "as much as there is room for");
    // What another has reserved is not copied over.
    let other = world.join(2);
    assert_eq!(world.scsi(other, 1, &[0x16, 0, 0, 0, 0, 0], &[], 0).status, GOOD);
    assert_eq!(world.scsi(h, 0, &cdb, &list, 0).status, CONFLICT);
    status[1] = 3;
    status[13] = 46;
    assert_eq!(world.scsi(h, 0, &status, &[], 46).data.len(), 46);
    world.close();
}

/// Nothing was written: that is no success, unless nothing was to be sent.
#[test]
fn a_write_without_its_data_fails() {
    let (mut world, h) = World::ready();
    let (itt, sn) = world.next_sn(h);
    let mut cdb = [0; 16];
    cdb[..10].copy_from_slice(&write10(0, 1));
    let body =
        Body::ScsiCommand { last: true, read: true, write: false, attr: 1, edtl: 512, sn, cdb };
    world.send(h, Header::new(itt, 0, body), &[]);
    world.run();
    assert_eq!(world.finish(h, itt, &[]).key(), (5, 0x0e, 3));
    let reply = world.scsi(h, 0, &write10(0, 1), &[], 0);
    assert_eq!((reply.status, reply.residual), (GOOD, Residual::Overflow(512)));
    world.close();
}

/// The data of a command is measured when it comes; the unit may be another when it is carried out.
#[test]
fn a_unit_that_changes_under_a_command_makes_it_come_again() {
    const BUSY: u8 = 8;
    let (mut world, h) = World::ready();
    let mut wider = unit(1);
    wider.block_size = cairn_block::BlockSize::B4096;
    wider.blocks = BLOCKS / 8;
    world.target.remove_unit(world.node, 1).unwrap();
    world.target.add_unit(world.node, wider).unwrap();
    let mut new = unit(5);
    new.handle = UnitHandle(0);
    world.target.add_unit(world.node, new).unwrap();
    for lun in [1, 5] {
        // The host is told of it by the first command, when the second has come already.
        world.start(h, lun, &[0; 6], &[], 0, 0);
        let itt = world.start(h, lun, &write10(0, 1), &[1; 512], 512, 512);
        if lun == 1 {
            continue;
        }
        world.run();
        let mut busy = 0;
        while let Some((header, _)) = world.receive(h) {
            let Body::ScsiResponse { status, .. } = header.body else { panic!("{header:?}") };
            assert_ne!(status, GOOD);
            busy += usize::from(status == BUSY && header.itt <= itt);
        }
        assert_eq!(busy, 2);
    }
    assert_eq!((world.disks[0][0], world.disks[1][0]), (0, 0));
    assert_eq!(world.scsi(h, 5, &write10(0, 1), &[1; 512], 0).status, GOOD);
    world.close();
}

/// Its parameter list was used up when it was given back.
#[test]
fn a_copy_that_is_given_back_comes_again() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let (cdb, list) = copy();
    let itt = world.start(h, 0, &cdb, &list, 108, 108);
    world.run();
    let (_, Outcome::Io(io)) = world.held.remove(0) else { panic!("no copy") };
    world.conn(h).park(io.slot, None);
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, 8, "BUSY");
    world.close();
}
