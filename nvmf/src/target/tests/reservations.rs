//! Reservations as hosts see them, on the wire.

use super::*;
use crate::reservation;

const OTHER: u128 = 0x0b0b;

/// An admin and an I/O queue of a controller of this host.
fn host_of(host: &mut Host, id: u128) -> (usize, usize) {
    let connect = |host: &mut Host, qid, cntlid| {
        let q = host.open();
        let (sqe, mut data) = connect_capsule(qid, cntlid, NQN, HOST);
        data[..16].copy_from_slice(&id.to_be_bytes());
        (q, host.ok(q, sqe, &data).cqe.result())
    };
    let (admin, cntlid) = connect(host, 0, 0xffff);
    host.ok(admin, property_set(0x0046_0061), &[]);
    let (io, _) = connect(host, 1, u16::try_from(cntlid).unwrap());
    (admin, io)
}

fn reserve(host: &mut Host, q: usize, opcode: u8, cdw10: u32, keys: &[u64]) -> Status {
    let data: Vec<u8> = keys.iter().flat_map(|key| key.to_le_bytes()).collect();
    let len = u32::try_from(data.len()).unwrap();
    let sgl = Sgl { address: 0, len, kind: SGL_IN_CAPSULE };
    let sqe = Sqe::new(opcode).with_nsid(1).with_cdw(10, cdw10).with_sgl(sgl);
    host.command(q, sqe, &data).cqe.status()
}

fn register(host: &mut Host, q: usize, key: u64) {
    assert_eq!(reserve(host, q, 0x0d, 0, &[0, key]), Status::SUCCESS);
}

fn report(eds: u32, len: u32) -> Sqe {
    let sqe = Sqe::new(0x0e).with_nsid(1).with_cdw(10, len / 4 - 1).with_cdw(11, eds);
    reading(sqe, len)
}

fn feature(set: bool, fid: u32, value: u32) -> Sqe {
    let opcode = if set { 0x09 } else { 0x0a };
    Sqe::new(opcode).with_nsid(1).with_cdw(10, fid).with_cdw(11, value)
}

#[test]
fn a_host_is_one_registrant_on_all_its_controllers() {
    let mut host = Host::new();
    let (admin, first) = host_of(&mut host, ID);
    let (_, second) = host_of(&mut host, ID);
    let (_, other) = host_of(&mut host, OTHER);
    let page = host.ok(admin, identify(0x01, 0), &[]).data;
    assert_eq!(IdentifyController::decode(&page).unwrap().oncs & 1 << 5, 1 << 5);
    let page = host.ok(admin, identify(0x00, 1), &[]).data;
    assert_eq!(IdentifyNamespace::decode(&page).unwrap().rescap, 0xff);
    assert_eq!(host.ok(admin, identify(0x08, 1), &[]).data[2], 0xff);
    let effects = host.ok(admin, log_page(5, 4096), &[]).data;
    for opcode in [0x0d, 0x0e, 0x11, 0x15] {
        assert_eq!(effects[1024 + 4 * opcode], 1);
    }

    register(&mut host, first, 7);
    register(&mut host, second, 7);
    let conflict = Status::RESERVATION_CONFLICT.with_dnr();
    assert_eq!(reserve(&mut host, second, 0x0d, 0, &[0, 8]), conflict);
    register(&mut host, other, 9);
    assert_eq!(reserve(&mut host, second, 0x11, 0x0100, &[7, 0]), Status::SUCCESS);
    assert_eq!(reserve(&mut host, other, 0x11, 0x0100, &[9, 0]), conflict);
    let told = host.ok(first, report(1, 192), &[]).data;
    assert_eq!((told[4], told[5], told[64 + 2], told[128 + 2]), (1, 2, 1, 0));
    assert_eq!(told[80..96], ID.to_be_bytes());
    assert_eq!(told[144..160], OTHER.to_be_bytes());
    // As much as is asked for, in whatever room.
    assert_eq!(host.ok(first, reading(report(1, 64), 4096), &[]).data, told[..64]);
    let answer = host.command(first, report(0, 192), &[]);
    assert_eq!(answer.cqe.status(), Status::HOST_ID_INCONSISTENT.with_dnr());
    // The wrong type, and what it is.
    let invalid = Status::INVALID_FIELD.with_dnr();
    assert_eq!(reserve(&mut host, first, 0x15, 0x0200, &[7]), invalid);
    assert_eq!(reserve(&mut host, first, 0x15, 0x0100, &[7]), Status::SUCCESS);
    assert_eq!(host.world.reservations.reserved(), None);
    host.world.close();
}

#[test]
fn who_says_not_who_it_is_reserves_nothing() {
    let mut host = Host::new();
    let (_, nobody) = host_of(&mut host, 0);
    let refused = Status::COMMAND_SEQUENCE_ERROR.with_dnr();
    assert_eq!(reserve(&mut host, nobody, 0x0d, 0, &[0, 7]), refused);
    host.ok(nobody, report(1, 64), &[]);
    host.world.close();
}

#[test]
fn a_namespace_that_cannot_be_reserved_says_so() {
    let mut host = Host::new();
    let subsystem = host.world.subsystem;
    let target = &mut host.world.target;
    target.remove_namespace(subsystem, 1).unwrap();
    target
        .add_namespace(subsystem, NamespaceConfig { reservations: false, ..namespace() })
        .unwrap();
    let (admin, io) = host_of(&mut host, ID);
    let page = host.ok(admin, identify(0x01, 0), &[]).data;
    assert_eq!(IdentifyController::decode(&page).unwrap().oncs & 1 << 5, 0);
    let page = host.ok(admin, identify(0x00, 1), &[]).data;
    assert_eq!(IdentifyNamespace::decode(&page).unwrap().rescap, 0);
    let unknown = Status::INVALID_OPCODE.with_dnr();
    assert_eq!(reserve(&mut host, io, 0x0d, 0, &[0, 7]), unknown);
    let page = host.command(admin, log_page(0x80, 64), &[]);
    assert_eq!(page.cqe.status(), Status::INVALID_LOG_PAGE.with_dnr());
    for fid in [0x82, 0x83] {
        let answer = host.command(admin, feature(false, fid, 0), &[]);
        assert_eq!(answer.cqe.status(), Status::INVALID_FIELD.with_dnr());
    }
    host.world.close();
}

#[test]
fn what_is_kept_can_be_asked_for_and_said() {
    let mut host = Host::new();
    let (admin, io) = host_of(&mut host, ID);
    let kept = |host: &mut Host| host.ok(admin, feature(false, 0x83, 0), &[]).cqe.result();
    assert_eq!(kept(&mut host), 0);
    host.ok(admin, feature(true, 0x83, 1), &[]);
    assert_eq!(kept(&mut host), 1);
    assert_eq!(host.ok(io, report(1, 64), &[]).data[9], 1);
    host.ok(admin, feature(true, 0x83, 0).with_nsid(u32::MAX), &[]);
    assert_eq!(kept(&mut host), 0);
    let invalid = Status::INVALID_FIELD.with_dnr();
    for wrong in [
        feature(true, 0x83, 2),
        feature(true, 0x83, 1).with_nsid(2),
        feature(false, 0x83, 0).with_nsid(u32::MAX),
        feature(false, 0x83 | 1 << 8, 0),
        feature(true, 0x82, 1),
        feature(true, 0x82, 2).with_nsid(2),
        feature(false, 0x82, 0).with_nsid(u32::MAX),
    ] {
        assert_eq!(host.command(admin, wrong, &[]).cqe.status(), invalid, "{wrong:?}");
    }
    let saved = feature(true, 0x83 | 1 << 31, 1);
    let answer = host.command(admin, saved, &[]);
    assert_eq!(answer.cqe.status(), Status::FEATURE_NOT_SAVEABLE.with_dnr());
    host.world.close();
}

/// Each notification is a log page; one event tells that there are some.
#[test]
fn who_loses_something_is_told_once() {
    let mut host = Host::new();
    let (admin, first) = host_of(&mut host, ID);
    let (other_admin, other) = host_of(&mut host, OTHER);
    host.capsule(admin, Sqe::new(0x0c).with_cid(5), &[]);
    host.capsule(other_admin, Sqe::new(0x0c).with_cid(5), &[]);
    let notice = |host: &mut Host, rae: bool| {
        let lsp = if rae { 1 << 15 } else { 0 };
        let page = reading(Sqe::new(0x02).with_cdw(10, 0x80 | lsp | 15 << 16), 64);
        let data = host.ok(admin, page, &[]).data;
        assert_eq!(data[1..8], [0; 7]);
        (data[0], data[8], data[9], data[12])
    };
    assert_eq!(notice(&mut host, false), (0, 0, 0, 0));
    // A reservation of registrants that is released.
    register(&mut host, first, 7);
    register(&mut host, other, 9);
    assert_eq!(reserve(&mut host, other, 0x11, 0x0300, &[9, 0]), Status::SUCCESS);
    assert_eq!(host.answers(admin), []);
    assert_eq!(reserve(&mut host, other, 0x15, 0x0300, &[9]), Status::SUCCESS);
    let event = host.answers(admin);
    assert_eq!((event.len(), event[0].cqe.result()), (1, 0x0080_0006));
    // Preempted before that was read: it waits, without another event.
    host.capsule(admin, Sqe::new(0x0c).with_cid(6), &[]);
    assert_eq!(reserve(&mut host, other, 0x11, 0x0101, &[9, 7]), Status::SUCCESS);
    assert_eq!(host.answers(admin), []);
    assert_eq!(notice(&mut host, true), (1, 2, 1, 1), "retained");
    assert_eq!(notice(&mut host, false), (1, 2, 1, 1));
    assert_eq!(notice(&mut host, false), (2, 1, 0, 1));
    assert_eq!(notice(&mut host, false), (0, 0, 0, 0));
    // Cleared.
    register(&mut host, first, 7);
    assert_eq!(reserve(&mut host, other, 0x15, 1, &[9]), Status::SUCCESS);
    assert_eq!(host.answers(admin).len(), 1);
    assert_eq!(notice(&mut host, false), (3, 3, 0, 1));
    // What a host does not want to hear it is not told; whoever does it never is.
    host.ok(admin, feature(true, 0x82, 1 << 3).with_nsid(u32::MAX), &[]);
    assert_eq!(host.ok(admin, feature(false, 0x82, 0), &[]).cqe.result(), 1 << 3);
    host.capsule(admin, Sqe::new(0x0c).with_cid(7), &[]);
    register(&mut host, first, 7);
    register(&mut host, other, 9);
    assert_eq!(reserve(&mut host, other, 0x15, 1, &[9]), Status::SUCCESS);
    assert_eq!(host.answers(admin), []);
    assert_eq!(notice(&mut host, false), (0, 0, 0, 0));
    assert_eq!(host.answers(other_admin), []);
    host.world.close();
}

#[test]
fn notifications_that_nobody_reads_are_bounded_and_counted() {
    let mut host = Host::new();
    let (admin, first) = host_of(&mut host, ID);
    let (_, other) = host_of(&mut host, OTHER);
    for _ in 0..70 {
        register(&mut host, first, 7);
        register(&mut host, other, 9);
        assert_eq!(reserve(&mut host, other, 0x15, 1, &[9]), Status::SUCCESS);
    }
    let data = host.ok(admin, log_page(0x80, 64), &[]).data;
    assert_eq!((data[0], data[8], data[9]), (7, 3, 63));
    host.world.close();
}

/// A report without memory waits for it, as any data does.
#[test]
fn a_report_waits_for_memory() {
    let mut host = Host::new();
    let (_, io) = host_of(&mut host, ID);
    let mut taken = Vec::new();
    for len in [1 << 20, 64 << 10, 4096] {
        taken.extend(std::iter::from_fn(|| host.world.mem.alloc(len)));
    }
    host.world.starved = true;
    host.capsule(io, report(1, 4096), &[]);
    assert_eq!(host.answers(io), []);
    taken.into_iter().for_each(|buf| host.world.mem.release(buf));
    host.world.starved = false;
    host.world.run();
    assert_eq!(host.answers(io).len(), 1);
    host.world.close();
}

#[test]
fn a_report_is_what_the_table_says() {
    let mut host = Host::new();
    let (_, io) = host_of(&mut host, ID);
    register(&mut host, io, 7);
    let mut expected = [0; 128];
    reservation::encode_report(&host.world.reservations, &mut expected);
    assert_eq!(host.ok(io, report(1, 128), &[]).data, expected);
    host.world.close();
}
