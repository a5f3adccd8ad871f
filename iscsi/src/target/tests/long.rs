//! Transfers that are longer than one request of the disk.

use super::*;

/// Blocks of one step, and of a transfer of several, the last of them short.
const STEP: u32 = 2048;
const LONG: u16 = 4001;

fn bytes(blocks: u32) -> Vec<u8> {
    (0..blocks * 512).map(|n| (n / 512 * 7 + n % 251).to_le_bytes()[0]).collect()
}

#[test]
fn long_transfers_are_several_requests_and_one_command() {
    for digests in ["None", "CRC32C"] {
        let mut world = World::new();
        let keys = [("HeaderDigest", digests), ("DataDigest", digests)];
        let h = world.join_with(1, &keys);
        world.clear_attentions(h);
        let data = bytes(u32::from(LONG));
        let reply = world.scsi(h, 0, &write10(9, LONG), &data, 0);
        assert_eq!((reply.status, reply.residual), (GOOD, Residual::None));
        assert_eq!(world.disks[0][9 * BLOCK..][..data.len()], data);
        assert!(world.disks[0][..9 * BLOCK].iter().all(|b| *b == 0));
        let reply = world.scsi(h, 0, &read10(9, LONG), &[], len32(data.len()));
        assert_eq!((reply.status, reply.residual), (GOOD, Residual::None));
        assert!(reply.data == data);
        // WRITE AND VERIFY.
        let reply = world.scsi(h, 0, &ten(0x2e, 5, LONG), &data, 0);
        assert_eq!(reply.status, GOOD);
        assert_eq!(world.disks[0][5 * BLOCK..][..data.len()], data);
        world.close();
    }
}

#[test]
fn the_longest_transfer_takes_the_memory_of_one_step() {
    let (mut world, h) = World::ready();
    let mut large = unit(4);
    (large.blocks, large.handle) = (32768, UnitHandle(0));
    world.target.add_unit(world.node, large).unwrap();
    assert_eq!(world.scsi(h, 4, &[0; 6], &[], 0).key(), (6, 0x3f, 0x0e));
    world.disks[0].resize(32768 * BLOCK, 0);
    let data = bytes(32768);
    assert_eq!(world.scsi(h, 4, &write10(0, 32768), &data, 0).status, GOOD);
    assert!(world.scsi(h, 4, &read10(0, 32768), &[], len32(data.len())).data == data);
    world.close();
}

#[test]
fn residuals_of_long_transfers_are_of_all_of_them() {
    let (mut world, h) = World::ready();
    let data = bytes(u32::from(LONG));
    // Room for less than all, which ends within the second step.
    let room = (STEP + 3) * 512 + 100;
    world.disks[0][..data.len()].copy_from_slice(&data);
    let reply = world.scsi(h, 0, &read10(0, LONG), &[], room);
    assert_eq!(reply.residual, Residual::Overflow(u32::from(LONG) * 512 - room));
    assert!(reply.data == data[..room as usize]);
    let reply = world.scsi(h, 0, &read10(0, LONG), &[], len32(data.len()) + 512);
    assert_eq!(reply.residual, Residual::Underflow(512));
    assert!(reply.data == data);
    // A write that ends within the second step, and one that ends with the first.
    for blocks in [STEP + 3, STEP] {
        world.disks[0].fill(0);
        let reply = world.scsi_edtl(h, 0, &write10(0, LONG), &data, blocks * 512, 0);
        let written = blocks as usize * BLOCK;
        assert_eq!(
            (reply.status, reply.residual),
            (GOOD, Residual::Overflow((u32::from(LONG) - blocks) * 512),)
        );
        assert!(world.disks[0][..written] == data[..written]);
        assert!(world.disks[0][written..].iter().all(|b| *b == 0));
    }
    world.close();
}

#[test]
fn a_step_that_fails_ends_the_command() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let total = u32::from(LONG) * 512;
    let itt = world.start(h, 0, &read10(0, LONG), &[], total, 0);
    world.run();
    // The first step is carried out; the second is not.
    world.release_held();
    world.run();
    let (_, Outcome::Io(io)) = world.held.remove(0) else { panic!("the second step") };
    world.hosts[h].conn.as_mut().unwrap().complete(
        io.slot,
        cairn_block::IoStatus::MediaError,
        &mut world.mem,
    );
    world.run();
    let reply = world.finish(h, itt, &[]);
    assert_eq!((reply.key(), reply.data.len()), ((3, 0x11, 0), (STEP * 512) as usize));
    assert_eq!(reply.residual, Residual::Underflow(total - STEP * 512));
    world.close();
}

#[test]
fn an_aborted_transfer_begins_no_other_step() {
    const ABORT_TASK: u8 = 1;
    let data = bytes(u32::from(LONG));
    let total = len32(data.len());
    // While a step of a read is carried out, and while it is on its way.
    for deaf in [false, true] {
        let (mut world, h) = World::ready();
        world.hold = true;
        let itt = world.start(h, 0, &read10(0, LONG), &[], total, 0);
        world.run();
        world.deaf = deaf;
        if deaf {
            world.release_held();
            world.run();
        }
        world.manage(h, ABORT_TASK, 0, itt);
        world.run();
        (world.hold, world.deaf) = (false, false);
        world.release_held();
        world.run();
        let mut sent = 0;
        while let Some((header, data)) = world.receive(h) {
            assert!(!matches!(header.body, Body::ScsiResponse { .. }), "{header:?}");
            sent += if matches!(header.body, Body::DataIn { .. }) { data.len() } else { 0 };
        }
        assert!(sent <= (STEP * 512) as usize, "{sent} bytes");
        assert_eq!(world.scsi(h, 0, &read10(0, 1), &[], 512).status, GOOD);
        world.close();
    }
}

#[test]
fn what_happens_between_steps_is_told_to_the_next_command() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let total = u32::from(LONG) * 512;
    let itt = world.start(h, 0, &read10(0, LONG), &[], total, 0);
    world.run();
    world.target.set_read_only(world.node, 0, true).unwrap();
    world.hold = false;
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, GOOD);
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).key(), (6, 0x2a, 1));
    assert_eq!(world.scsi(h, 0, &write10(0, 1), &[1; 512], 0).key(), (7, 0x27, 0));
    assert_eq!(world.scsi(h, 0, &[0x1a, 0, 8, 0, 32, 0], &[], 32).data[2] & 0x80, 0x80, "WP");
    // A sanitize that began since is not written over.
    world.target.set_read_only(world.node, 0, false).unwrap();
    assert_eq!(world.scsi(h, 0, &[0; 6], &[], 0).key(), (6, 0x2a, 1));
    world.hold = true;
    let itt = world.start(h, 0, &read10(0, LONG), &[], total, 0);
    world.run();
    let state = crate::scsi::SanitizeState::Running { progress: 0 };
    world.target.set_sanitize(UnitHandle(0), Some(state));
    world.hold = false;
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).key(), (2, 0x04, 0x1b));
    world.close();
}
