use super::*;

fn nexus(n: u8) -> Registrant {
    let initiator = format!("iqn.2025-01.io.cairn:host-{n}");
    Registrant::Iscsi { initiator, isid: [n; 6], port_group: 1 }
}

fn list(key: u64, action_key: u64, flags: u8) -> [u8; OUT_LEN] {
    let mut out = [0; OUT_LEN];
    put(&mut out, 0, &key.to_be_bytes());
    put(&mut out, 8, &action_key.to_be_bytes());
    out[20] = flags;
    out
}

fn asked(action: u8, scope_type: u8, list: &[u8]) -> Result<Action, Sense> {
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[2]) = (0x5f, action, scope_type);
    change(&nexus(1), &cdb, list).map(|change| {
        assert_eq!((change.registrant, change.key), (nexus(1), 5));
        change.action
    })
}

#[test]
fn each_service_action_asks_for_its_change() {
    use ReservationType as Type;
    let list = list(5, 6, 1);
    let (new_key, aptpl) = (6, Some(true));
    assert_eq!(asked(0, 0, &list), Ok(Action::Register { new_key, aptpl }));
    assert_eq!(asked(6, 0, &list), Ok(Action::RegisterAndIgnore { new_key, aptpl }));
    assert_eq!(asked(1, 3, &list), Ok(Action::Reserve(Type::ExclusiveAccess)));
    assert_eq!(asked(2, 1, &list), Ok(Action::Release(Type::WriteExclusive)));
    assert_eq!(asked(3, 0, &list), Ok(Action::Clear));
    for (action, abort) in [(4, false), (5, true)] {
        let kind = Type::ExclusiveAccessAllRegistrants;
        assert_eq!(asked(action, 8, &list), Ok(Action::Preempt { victim: 6, kind, abort }));
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let good = list(5, 6, 0);
    assert_eq!(asked(1, 0x15, &good), Err(Sense::invalid_cdb(2, 7)), "a scope");
    assert_eq!(asked(1, 2, &good), Err(Sense::invalid_cdb(2, 3)), "a type");
    assert_eq!(asked(7, 0, &good), Err(Sense::invalid_cdb(1, 4)), "REGISTER AND MOVE");
    assert_eq!(asked(0, 0, &list(5, 6, 8)), Err(Sense::invalid_parameter(20)), "SPEC_I_PT");
    assert_eq!(asked(0, 0, &good[..23]), Err(Sense::PARAMETER_LIST_LENGTH));
    assert_eq!(asked(0, 0, &[0; 25]), Err(Sense::PARAMETER_LIST_LENGTH));
}

#[test]
fn reports_tell_of_hosts_of_both_transports() {
    let mut table = Reservations::default();
    let of_nvme = Registrant::Nvme { host_id: 7, host_nqn: "nqn.2025-01.io.cairn:host-2".into() };
    for (registrant, new_key) in [(nexus(1), 10), (of_nvme, 20)] {
        let action = Action::Register { new_key, aptpl: Some(true) };
        table.apply(&Change { registrant, key: 0, action }).unwrap();
    }
    assert_eq!(report(&table, 1), [0, 0, 0, 2, 0, 0, 0, 0]);
    let action = Action::Reserve(ReservationType::ExclusiveAccess);
    table.apply(&Change { registrant: nexus(1), key: 10, action }).unwrap();
    let keys = report(&table, 0);
    assert_eq!(keys[..8], [0, 0, 0, 2, 0, 0, 0, 16]);
    assert_eq!((u64_at(&keys, 8), u64_at(&keys, 16)), (10, 20));
    let reservation = [0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 3, 0, 0];
    assert_eq!(report(&table, 1)[4..], reservation);
    assert_eq!(report(&table, 2), [0, 8, 1, 0x81, 0xea, 1, 0, 0]);
    let full = report(&table, 3);
    assert_eq!(full[8..16], 10_u64.to_be_bytes());
    assert_eq!((full[20], full[21], full[27]), (1, 3, 1));
    let text = b"iqn.2025-01.io.cairn:host-1,i,0x010101010101\0";
    assert_eq!(full[32], 0x45);
    assert_eq!(&full[36..36 + text.len()], text);
    let second = &full[32 + 4 + text.len().next_multiple_of(4)..];
    assert_eq!((u64_at(second, 0), second[12], second[19], second[24]), (20, 0, 0, 0x05));
    assert!(second[28..].starts_with(b"nqn.2025-01.io.cairn:host-2\0"));
    assert_eq!((full.len() - 8) % 4, 0);
}
