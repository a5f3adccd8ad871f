use super::*;

fn nexus(n: u8) -> Registrant {
    Registrant { initiator: format!("iqn.2025-01.io.cairn:host-{n}"), isid: [n; 6], port_group: 1 }
}

fn list(key: u64, action_key: u64, flags: u8) -> [u8; OUT_LEN] {
    let mut out = [0; OUT_LEN];
    put(&mut out, 0, &key.to_be_bytes());
    put(&mut out, 8, &action_key.to_be_bytes());
    out[20] = flags;
    out
}

fn three() -> Reservations {
    let mut r = Reservations::default();
    for n in 1..=3 {
        r.change(&nexus(n), 0, 0, &list(0, u64::from(n) * 10, 0)).unwrap();
    }
    r
}

const CONFLICT: Status = Status::ReservationConflict;

#[test]
fn a_key_has_to_be_known_to_be_changed() {
    let mut r = three();
    assert_eq!(r.generation, 3);
    assert_eq!(r.change(&nexus(1), 0, 0, &list(11, 5, 0)).unwrap_err(), CONFLICT);
    assert_eq!(r.change(&nexus(4), 0, 0, &list(9, 5, 0)).unwrap_err(), CONFLICT);
    r.change(&nexus(1), 6, 0, &list(99, 5, 1)).unwrap();
    assert!(r.aptpl);
    let keys = r.report(0);
    assert_eq!(keys[..8], [0, 0, 0, 4, 0, 0, 0, 24]);
    assert_eq!(u64_at(&keys, 8), 5);
    let refused = r.change(&nexus(1), 0, 0, &list(5, 6, 0x08)).unwrap_err();
    assert_eq!(refused, Sense::invalid_parameter(20).into(), "SPEC_I_PT");
    let refused = r.change(&nexus(1), 0, 0, &[0; 23]).unwrap_err();
    assert_eq!(refused, Sense::PARAMETER_LIST_LENGTH.into());
}

/// SPC-5, table 68, in short: who may read and write under each type.
#[test]
fn each_type_lets_in_whom_it_should() {
    for (kind, registered, others_read) in [
        (1, false, true),
        (3, false, false),
        (5, true, true),
        (6, true, false),
        (7, true, true),
        (8, true, false),
    ] {
        let mut r = three();
        r.change(&nexus(1), 1, kind, &list(10, 0, 0)).unwrap();
        for guard in [Guard::Free, Guard::Reads, Guard::Changes] {
            assert!(!r.conflicts(&nexus(1), guard), "the holder, type {kind}");
        }
        let reads = guard_of(&r, 2, Guard::Reads);
        assert_eq!(reads, registered || others_read, "type {kind}");
        assert_eq!(guard_of(&r, 2, Guard::Changes), registered, "type {kind}");
        assert_eq!(guard_of(&r, 9, Guard::Reads), others_read, "type {kind}");
        assert!(!guard_of(&r, 9, Guard::Changes) && guard_of(&r, 9, Guard::Free));
    }
}

fn guard_of(r: &Reservations, n: u8, guard: Guard) -> bool {
    !r.conflicts(&nexus(n), guard)
}

#[test]
fn one_reservation_at_a_time() {
    let mut r = three();
    r.change(&nexus(1), 1, 5, &list(10, 0, 0)).unwrap();
    assert!(r.change(&nexus(1), 1, 5, &list(10, 0, 0)).is_ok(), "again the same");
    assert_eq!(r.change(&nexus(1), 1, 6, &list(10, 0, 0)).unwrap_err(), CONFLICT);
    assert_eq!(r.change(&nexus(2), 1, 5, &list(20, 0, 0)).unwrap_err(), CONFLICT);
    assert_eq!(r.report(1)[4..], [0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 5, 0, 0]);
    // Not the holder's: nothing happens.
    r.change(&nexus(2), 2, 5, &list(20, 0, 0)).unwrap();
    assert!(r.reservation.is_some());
    let wrong = r.change(&nexus(1), 2, 1, &list(10, 0, 0)).unwrap_err();
    assert_eq!(wrong, Sense::INVALID_RELEASE.into());
    let effects = r.change(&nexus(1), 2, 5, &list(10, 0, 0)).unwrap();
    assert_eq!(effects.attentions.len(), 2, "the other registrants are told");
    assert!(r.reservation.is_none());
    let wrong = r.change(&nexus(1), 1, 0x15, &list(10, 0, 0)).unwrap_err();
    assert_eq!(wrong, Sense::invalid_cdb(2, 7).into(), "a scope");
    let wrong = r.change(&nexus(1), 1, 2, &list(10, 0, 0)).unwrap_err();
    assert_eq!(wrong, Sense::invalid_cdb(2, 3).into(), "a type");
}

#[test]
fn a_holder_that_leaves_takes_the_reservation_along() {
    let mut r = three();
    r.change(&nexus(1), 1, 1, &list(10, 0, 0)).unwrap();
    r.change(&nexus(1), 0, 0, &list(10, 0, 0)).unwrap();
    assert!(r.reservation.is_none());
    let mut r = three();
    r.change(&nexus(1), 1, 7, &list(10, 0, 0)).unwrap();
    r.change(&nexus(1), 0, 0, &list(10, 0, 0)).unwrap();
    assert!(r.reservation.is_some(), "the others hold it too");
    r.change(&nexus(2), 0, 0, &list(20, 0, 0)).unwrap();
    r.change(&nexus(3), 0, 0, &list(30, 0, 0)).unwrap();
    assert!(r.reservation.is_none());
}

#[test]
fn preemption_takes_the_reservation_and_the_registration() {
    let mut r = three();
    r.change(&nexus(1), 1, 3, &list(10, 0, 0)).unwrap();
    let effects = r.change(&nexus(2), 5, 1, &list(20, 10, 0)).unwrap();
    assert_eq!(effects.abort, [nexus(1)]);
    assert!(effects.attentions.contains(&(nexus(1), Attention::RegistrationsPreempted)));
    assert!(effects.attentions.contains(&(nexus(3), Attention::ReservationsReleased)));
    assert_eq!(r.reservation, Some(Reservation { kind: 1, holder: Some(nexus(2)) }));
    // A registration of somebody who holds nothing.
    r.change(&nexus(2), 4, 1, &list(20, 30, 0)).unwrap();
    assert_eq!(r.registrations.len(), 1);
    assert_eq!(r.change(&nexus(2), 4, 1, &list(20, 77, 0)).unwrap_err(), CONFLICT);
    let wrong = r.change(&nexus(2), 4, 1, &list(20, 0, 0)).unwrap_err();
    assert_eq!(wrong, Sense::invalid_parameter(8).into());
    // All registrants: key 0 stands for all others.
    let mut r = three();
    r.change(&nexus(1), 1, 8, &list(10, 0, 0)).unwrap();
    r.change(&nexus(3), 4, 5, &list(30, 0, 0)).unwrap();
    assert_eq!(r.registrations.len(), 1);
    assert_eq!(r.reservation, Some(Reservation { kind: 5, holder: Some(nexus(3)) }));
}

#[test]
fn clear_leaves_nothing() {
    let mut r = three();
    r.change(&nexus(1), 1, 3, &list(10, 0, 0)).unwrap();
    let effects = r.change(&nexus(2), 3, 0, &list(20, 0, 0)).unwrap();
    assert_eq!(effects.attentions.len(), 2);
    assert!(r.is_empty() && r.reservation.is_none());
    assert_eq!(r.generation, 4);
}

#[test]
fn full_status_names_the_ports() {
    let mut r = three();
    r.change(&nexus(1), 1, 3, &list(10, 0, 0)).unwrap();
    let full = r.report(3);
    assert_eq!(full[8..16], 10_u64.to_be_bytes());
    assert_eq!((full[20], full[21], full[27]), (1, 3, 1));
    let text = b"iqn.2025-01.io.cairn:host-1,i,0x010101010101\0";
    assert_eq!(full[32], 0x45);
    assert_eq!(&full[36..36 + text.len()], text);
    assert_eq!((full.len() - 8) % 4, 0);
    assert_eq!(r.report(2), [0, 8, 1, 0x80, 0xea, 1, 0, 0]);
}
