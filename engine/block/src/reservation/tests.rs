use proptest::prelude::*;

use super::ReservationType as Type;
use super::*;

fn iscsi(n: u8) -> Registrant {
    Registrant::Iscsi {
        initiator: format!("iqn.2025-01.io.cairn:host-{n}"),
        isid: [n; 6],
        port_group: 1,
    }
}

fn nvme(n: u8) -> Registrant {
    Registrant::Nvme { host_id: u128::from(n), host_nqn: format!("nqn.2025-01.io.cairn:host-{n}") }
}

/// Hosts of both transports: the odd ones come by iSCSI.
fn host(n: u8) -> Registrant {
    if n.is_multiple_of(2) { nvme(n) } else { iscsi(n) }
}

fn ask(r: &mut Reservations, n: u8, key: u64, action: Action) -> Result<Effects, Refusal> {
    r.apply(&Change { registrant: host(n), key, action })
}

const fn register(new_key: u64) -> Action {
    Action::Register { new_key, aptpl: None }
}

const fn preempt(victim: u64, kind: Type) -> Action {
    Action::Preempt { victim, kind, abort: false }
}

/// Hosts 1 to 3, with the keys 10, 20 and 30.
fn three() -> Reservations {
    let mut r = Reservations::default();
    for n in 1..=3 {
        ask(&mut r, n, 0, register(u64::from(n) * 10)).unwrap();
    }
    r
}

fn holder(r: &Reservations) -> Option<Registrant> {
    r.holder().map(|r| r.registrant.clone())
}

#[test]
fn types_have_a_code_in_each_transport() {
    assert_eq!(Type::ALL.map(Type::scsi_code), [1, 3, 5, 6, 7, 8]);
    assert_eq!(Type::ALL.map(Type::nvme_code), [1, 2, 3, 4, 5, 6]);
    for kind in Type::ALL {
        assert_eq!(Type::from_scsi(kind.scsi_code()), Some(kind));
        assert_eq!(Type::from_nvme(kind.nvme_code()), Some(kind));
    }
    assert_eq!((Type::from_scsi(0), Type::from_scsi(2), Type::from_nvme(7)), (None, None, None));
}

#[test]
fn a_host_of_nvme_is_its_id() {
    let mut renamed = nvme(2);
    if let Registrant::Nvme { host_nqn, .. } = &mut renamed {
        host_nqn.push('x');
    }
    assert!(renamed.is(&nvme(2)) && !nvme(2).is(&nvme(4)) && !iscsi(1).is(&iscsi(3)));
    assert_eq!(three().find(&renamed).map(|r| r.key), Some(20));
}

#[test]
fn a_key_has_to_be_known_to_be_changed() {
    let mut r = three();
    assert_eq!(r.generation(), 3);
    assert_eq!(ask(&mut r, 1, 11, register(5)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 4, 9, register(5)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 4, 0, Action::Clear), Err(Refusal::Conflict));
    assert_eq!(r, three(), "what is refused changes nothing");
    let ignore = Action::RegisterAndIgnore { new_key: 5, aptpl: Some(true) };
    ask(&mut r, 1, 99, ignore).unwrap();
    assert!(r.aptpl() && r.registrations()[0].key == 5);
    ask(&mut r, 1, 5, register(6)).unwrap();
    assert!(r.aptpl(), "nobody said otherwise");
}

#[test]
fn hosts_of_nvme_register_once_and_replace_what_they_have() {
    let mut r = three();
    let join = |new_key| Action::Join { new_key, aptpl: None };
    let replace = |new_key, ignore| Action::Replace { new_key, aptpl: None, ignore };
    // A second time with the same key is no error, with another one it is, whatever CRKEY says.
    ask(&mut r, 2, 99, join(20)).unwrap();
    assert_eq!(ask(&mut r, 2, 20, join(21)), Err(Refusal::Conflict));
    ask(&mut r, 4, 99, join(40)).unwrap();
    assert_eq!(r.find(&host(4)).map(|r| r.key), Some(40));
    // Who is not registered has nothing to replace, with key 0 neither.
    assert_eq!(ask(&mut r, 6, 0, replace(60, false)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 6, 0, replace(0, false)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 6, 0, replace(0, true)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 2, 21, replace(22, false)), Err(Refusal::Conflict));
    ask(&mut r, 2, 20, replace(22, false)).unwrap();
    ask(&mut r, 4, 0, replace(44, true)).unwrap();
    ask(&mut r, 6, 0, replace(60, true)).unwrap();
    assert_eq!([2, 4, 6].map(|n| r.find(&host(n)).unwrap().key), [22, 44, 60]);
    ask(&mut r, 4, 0, replace(0, true)).unwrap();
    ask(&mut r, 2, 22, replace(0, false)).unwrap();
    assert!(r.find(&host(2)).is_none() && r.find(&host(4)).is_none());
    // Whether it is kept anybody may say.
    let before = r.generation();
    ask(&mut r, 9, 0, Action::Persist(true)).unwrap();
    assert!(r.aptpl() && r.generation() == before);
}

#[test]
fn who_is_nobody_does_not_turn_aptpl_off() {
    let mut r = Reservations::default();
    ask(&mut r, 1, 0, Action::Register { new_key: 1, aptpl: Some(true) }).unwrap();
    let before = r.clone();
    ask(&mut r, 2, 0, Action::Register { new_key: 0, aptpl: Some(false) }).unwrap();
    assert_eq!(r, before);
}

/// SPC-5, table 68, in short: who may read and write under each type.
#[test]
fn each_type_lets_in_whom_it_should() {
    for (kind, registered, others_read) in [
        (Type::WriteExclusive, false, true),
        (Type::ExclusiveAccess, false, false),
        (Type::WriteExclusiveRegistrantsOnly, true, true),
        (Type::ExclusiveAccessRegistrantsOnly, true, false),
        (Type::WriteExclusiveAllRegistrants, true, true),
        (Type::ExclusiveAccessAllRegistrants, true, false),
    ] {
        let mut r = three();
        ask(&mut r, 1, 10, Action::Reserve(kind)).unwrap();
        let may = |n: Option<u8>, guard| !r.conflicts(n.map(host).as_ref(), guard);
        for guard in [Guard::Free, Guard::Reads, Guard::Writes] {
            assert!(may(Some(1), guard), "the holder, {kind:?}");
        }
        assert_eq!(may(Some(2), Guard::Reads), registered || others_read, "{kind:?}");
        assert_eq!(may(Some(2), Guard::Writes), registered, "{kind:?}");
        for stranger in [Some(9), None] {
            assert_eq!(may(stranger, Guard::Reads), others_read, "{kind:?}");
            assert!(!may(stranger, Guard::Writes) && may(stranger, Guard::Free));
        }
    }
    assert!(!three().conflicts(None, Guard::Writes), "nothing is reserved");
}

#[test]
fn one_reservation_at_a_time() {
    const HELD: Type = Type::WriteExclusiveRegistrantsOnly;
    const OTHER: Type = Type::ExclusiveAccessRegistrantsOnly;
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(HELD)).unwrap();
    assert!(ask(&mut r, 1, 10, Action::Reserve(HELD)).is_ok(), "again the same");
    assert_eq!(ask(&mut r, 1, 10, Action::Reserve(OTHER)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 2, 20, Action::Reserve(HELD)), Err(Refusal::Conflict));
    ask(&mut r, 2, 20, Action::Release(HELD)).unwrap();
    assert_eq!(holder(&r), Some(host(1)), "not its own: nothing happens");
    assert_eq!(ask(&mut r, 1, 10, Action::Release(OTHER)), Err(Refusal::InvalidRelease));
    let effects = ask(&mut r, 1, 10, Action::Release(HELD)).unwrap();
    let told = [2, 3].map(|n| (host(n), Notice::ReservationsReleased));
    assert_eq!(effects, Effects { notices: told.to_vec(), abort: vec![] });
    assert_eq!((r.reserved(), holder(&r)), (None, None));
}

#[test]
fn a_holder_that_leaves_takes_the_reservation_along() {
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(Type::WriteExclusive)).unwrap();
    let effects = ask(&mut r, 1, 10, register(0)).unwrap();
    assert_eq!((r.reserved(), effects), (None, Effects::default()));
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(Type::WriteExclusiveAllRegistrants)).unwrap();
    ask(&mut r, 1, 10, register(0)).unwrap();
    assert!(r.reserved().is_some(), "the others hold it too");
    ask(&mut r, 2, 20, register(0)).unwrap();
    ask(&mut r, 3, 30, register(0)).unwrap();
    assert_eq!(r.reserved(), None);
}

#[test]
fn preemption_takes_the_reservation_and_the_registration() {
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(Type::ExclusiveAccess)).unwrap();
    let take = Action::Preempt { victim: 10, kind: Type::WriteExclusive, abort: true };
    let effects = ask(&mut r, 2, 20, take).unwrap();
    assert_eq!(effects.abort, [host(1)]);
    let told = [(host(1), Notice::RegistrationsPreempted), (host(3), Notice::ReservationsReleased)];
    assert_eq!(effects.notices, told);
    assert_eq!((holder(&r), r.reserved()), (Some(host(2)), Some(Type::WriteExclusive)));
    // A registration of somebody who holds nothing.
    ask(&mut r, 2, 20, preempt(30, Type::ExclusiveAccess)).unwrap();
    assert_eq!((r.registrations().len(), r.reserved()), (1, Some(Type::WriteExclusive)));
    assert_eq!(ask(&mut r, 2, 20, preempt(77, Type::WriteExclusive)), Err(Refusal::Conflict));
    assert_eq!(ask(&mut r, 2, 20, preempt(0, Type::WriteExclusive)), Err(Refusal::InvalidKey));
    // Its own reservation: another type.
    ask(&mut r, 2, 20, preempt(20, Type::ExclusiveAccess)).unwrap();
    assert_eq!((holder(&r), r.reserved()), (Some(host(2)), Some(Type::ExclusiveAccess)));
    // All registrants: key 0 stands for all others.
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(Type::ExclusiveAccessAllRegistrants)).unwrap();
    ask(&mut r, 3, 30, preempt(0, Type::WriteExclusiveRegistrantsOnly)).unwrap();
    assert_eq!(r.registrations().len(), 1);
    let kind = Some(Type::WriteExclusiveRegistrantsOnly);
    assert_eq!((holder(&r), r.reserved()), (Some(host(3)), kind));
}

#[test]
fn clear_leaves_nothing() {
    let mut r = three();
    ask(&mut r, 1, 10, Action::Reserve(Type::ExclusiveAccess)).unwrap();
    let effects = ask(&mut r, 2, 20, Action::Clear).unwrap();
    let told = [1, 3].map(|n| (host(n), Notice::ReservationsPreempted));
    assert_eq!(effects.notices, told);
    assert!(r.is_empty() && r.reserved().is_none());
    assert_eq!(r.generation(), 4);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut r = Reservations::default();
    let refused = (0..=u8::MAX).find(|n| ask(&mut r, *n, 0, register(1)).is_err()).unwrap();
    let (len, before) = (r.encode().len(), r.clone());
    assert!(refused > 20 && len <= MAX_ENCODED && len > MAX_ENCODED - 70, "{refused}, {len}");
    assert_eq!(ask(&mut r, refused, 0, register(1)), Err(Refusal::NoRoom));
    assert_eq!(r, before);
    assert!(ask(&mut r, 0, 1, register(2)).is_ok(), "another key takes no more room");
    let long = Registrant::Nvme { host_id: 1, host_nqn: "n".repeat(224) };
    let change = Change { registrant: long, key: 0, action: register(1) };
    assert_eq!(Reservations::default().apply(&change), Err(Refusal::NoRoom));
}

#[test]
fn the_encoding_is_this() {
    let mut r = Reservations::default();
    let short = Registrant::Iscsi { initiator: "iqn.a".into(), isid: [1; 6], port_group: 0x102 };
    let action = Action::Register { new_key: 0x0a, aptpl: Some(true) };
    r.apply(&Change { registrant: short.clone(), key: 0, action }).unwrap();
    let of_nvme = Registrant::Nvme { host_id: 0x0102, host_nqn: "nqn".into() };
    r.apply(&Change { registrant: of_nvme, key: 0, action }).unwrap();
    let reserve = Action::Reserve(Type::ExclusiveAccess);
    r.apply(&Change { registrant: short, key: 0x0a, action: reserve }).unwrap();
    let mut want = vec![1, 1, 3, 0, 2, 0, 0, 0];
    want.extend([0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 5, 1, 1, 1, 1, 1, 1, 2, 1]);
    want.extend(b"iqn.a");
    want.extend([0x0a, 0, 0, 0, 0, 0, 0, 0, 1, 3]);
    want.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    want.extend(b"nqn");
    assert_eq!(r.encode(), want);
    assert_eq!(Reservations::decode(&[2, 0, 0, 0xff]), Err(DecodeError::UnknownVersion(2)));
    assert_eq!(Reservations::decode(&[1, 0, 0, 0, 0, 0, 0, 0]), Err(DecodeError::Damaged(3)));
    assert_eq!(Reservations::decode(&[1, 0, 7, 0xff, 0, 0, 0, 0]), Err(DecodeError::Damaged(3)));
    for len in 0..want.len() {
        // A whole registration less is none the worse, where nobody misses it.
        assert_eq!(Reservations::decode(&want[..len]).is_ok(), len == 31, "{len}");
    }
}

fn actions() -> impl Strategy<Value = Action> {
    let kind = || (0..6_usize).prop_map(|i| Type::ALL[i]);
    let aptpl = prop::option::of(any::<bool>());
    prop_oneof![
        (0..4_u64, aptpl.clone())
            .prop_map(|(new_key, aptpl)| Action::RegisterAndIgnore { new_key, aptpl }),
        (0..4_u64, aptpl.clone()).prop_map(|(new_key, aptpl)| Action::Register { new_key, aptpl }),
        (1..4_u64, aptpl.clone()).prop_map(|(new_key, aptpl)| Action::Join { new_key, aptpl }),
        (0..4_u64, aptpl, any::<bool>()).prop_map(|(new_key, aptpl, ignore)| Action::Replace {
            new_key,
            aptpl,
            ignore
        }),
        any::<bool>().prop_map(Action::Persist),
        kind().prop_map(Action::Reserve),
        kind().prop_map(Action::Release),
        Just(Action::Clear),
        (0..4_u64, kind(), any::<bool>()).prop_map(|(victim, kind, abort)| Action::Preempt {
            victim,
            kind,
            abort
        }),
    ]
}

/// A table that so many changes have come to, each right in its key where `right` says so.
fn tables() -> impl Strategy<Value = Reservations> {
    let change = (0..60_u8, any::<bool>(), 0..4_u64, actions());
    prop::collection::vec(change, 0..80).prop_map(|changes| {
        let mut r = Reservations::default();
        for (n, right, key, action) in changes {
            let key = if right { r.find(&host(n)).map_or(0, |r| r.key) } else { key };
            let before = r.clone();
            if ask(&mut r, n, key, action).is_err() {
                assert_eq!(r, before, "what is refused changes nothing");
            }
            let holders = r.registrations.iter().filter(|r| r.holder).count();
            let alone = r.reserved.is_some_and(|kind| !kind.is_held_by_all());
            assert_eq!(holders, usize::from(alone));
            assert!(r.reserved.is_none() || !r.is_empty());
        }
        r
    })
}

proptest! {
    #[test]
    fn what_is_encoded_comes_back(table in tables()) {
        let bytes = table.encode();
        prop_assert!(bytes.len() <= MAX_ENCODED);
        prop_assert_eq!(Reservations::decode(&bytes), Ok(table));
    }

    /// What is read for all that is what is written again.
    #[test]
    fn damaged_bytes_are_refused_or_mean_something(
        table in tables(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = table.encode();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        if let Ok(table) = Reservations::decode(&bytes) {
            prop_assert_eq!(table.encode(), bytes);
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let _ = Reservations::decode(&bytes);
    }
}
