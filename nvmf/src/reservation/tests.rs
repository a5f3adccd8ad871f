use cairn_block::reservation::{Registrant, ReservationType as Type};
use proptest::prelude::*;

use super::*;

fn host(id: u128) -> Registrant {
    Registrant::Nvme { host_id: id, host_nqn: "nqn.2014-08.org.nvmexpress:h".into() }
}

fn asked(opcode: u8, cdw10: u32, keys: [u64; 2]) -> Result<(u64, Action), Status> {
    let data = [keys[0].to_le_bytes(), keys[1].to_le_bytes()].concat();
    let sqe = Sqe::new(opcode).with_cdw(10, cdw10);
    change(host(1), &sqe, &data).map(|change| {
        assert_eq!(change.registrant, host(1));
        (change.key, change.action)
    })
}

/// NVMe Base, Reservation Register, Acquire and Release: CDW10 and data.
#[test]
fn commands_mean_what_they_say() {
    let invalid = Err(Status::INVALID_FIELD.with_dnr());
    let register = |cdw10, keys| asked(0x0d, cdw10, keys);
    let kept = |aptpl| Ok((7, Action::Join { new_key: 9, aptpl }));
    assert_eq!(register(0, [7, 9]), kept(None));
    assert_eq!(register(2 << 30, [7, 9]), kept(Some(false)));
    // What Linux sends for PR_FL_IGNORE_KEY: IEKEY, and CPTPL 3.
    assert_eq!(register(3 << 30 | 8, [7, 9]), kept(Some(true)));
    assert_eq!(register(1 << 30, [7, 9]), invalid);
    for ignore in [false, true] {
        let iekey = if ignore { 8 } else { 0 };
        let replace = |new_key| Action::Replace { new_key, aptpl: None, ignore };
        assert_eq!(register(1 | iekey, [7, 9]), Ok((7, replace(0))));
        assert_eq!(register(2 | iekey, [7, 9]), Ok((7, replace(9))));
    }
    assert_eq!((register(0, [7, 0]), register(2, [7, 0])), (invalid, invalid));
    assert_eq!(register(3, [7, 9]), invalid);

    let acquire = |cdw10| asked(0x11, cdw10, [7, 9]);
    assert_eq!(acquire(0x0300), Ok((7, Action::Reserve(Type::WriteExclusiveRegistrantsOnly))));
    for (action, abort) in [(1, false), (2, true)] {
        let preempt = Action::Preempt { victim: 9, kind: Type::ExclusiveAccess, abort };
        assert_eq!(acquire(0x0200 | action), Ok((7, preempt)));
    }
    for wrong in [0, 0x0700, 0x0103, 0x0108] {
        assert_eq!(acquire(wrong), invalid, "{wrong:x}");
    }

    let release = |cdw10| asked(0x15, cdw10, [7, 9]);
    assert_eq!(release(0x0600), Ok((7, Action::Release(Type::ExclusiveAccessAllRegistrants))));
    assert_eq!(release(1), Ok((7, Action::Clear)));
    assert_eq!((release(0), release(2), release(9)), (invalid, invalid, invalid));
    let short = change(host(1), &Sqe::new(0x0d), &[0; 15]);
    assert_eq!(short, Err(Status::SGL_DATA_LENGTH_INVALID.with_dnr()));
}

#[test]
fn a_report_tells_of_hosts_of_all_transports() {
    let mut table = Reservations::default();
    let id = 0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978;
    let initiator = Registrant::Iscsi { initiator: "iqn.a".into(), isid: [1; 6], port_group: 1 };
    for (registrant, key) in [(host(id), 0x0a0b), (initiator, 0x0c)] {
        let action = Action::Join { new_key: key, aptpl: Some(true) };
        table.apply(&Change { registrant, key: 0, action }).unwrap();
    }
    let action = Action::Reserve(Type::ExclusiveAccess);
    table.apply(&Change { registrant: host(id), key: 0x0a0b, action }).unwrap();
    let mut out = [0xff; 256];
    encode_report(&table, &mut out);
    // GEN 2, RTYPE 2, REGSTRNT 2, PTPLS 1.
    assert_eq!(out[..12], [2, 0, 0, 0, 2, 2, 0, 0, 0, 1, 0, 0]);
    assert_eq!(out[12..64], [0; 52]);
    assert_eq!(out[64..80], [0xff, 0xff, 1, 0, 0, 0, 0, 0, 0x0b, 0x0a, 0, 0, 0, 0, 0, 0]);
    assert_eq!(out[80..96], id.to_be_bytes());
    assert_eq!(out[96..128], [0; 32]);
    assert_eq!(out[128..144], [0xff, 0xff, 0, 0, 0, 0, 0, 0, 0x0c, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(out[144..256], [0; 112]);
    // As much as there is room for.
    let mut cut = [0xff; 84];
    encode_report(&table, &mut cut);
    assert_eq!(cut[..], out[..84]);
}

proptest! {
    #[test]
    fn no_command_panics(
        opcode in prop::sample::select(vec![0x0d_u8, 0x11, 0x15]),
        cdw10 in any::<u32>(),
        data in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let _ = change(host(1), &Sqe::new(opcode).with_cdw(10, cdw10), &data);
    }
}
