use super::*;
use crate::chap::Credentials;
use crate::login::{FULL_FEATURE, LoginStatus, OPERATIONAL};
use crate::loopback::{
    BLOCK, BLOCKS, IQN, NOBODY, Reply, World, node_config, read10, ten, unit, write10,
};
use crate::pdu::{Body, Header, NO_TAG, Residual};
use crate::wire::{len32, put, u16_at, u32_at, u64_at};

mod blocks;
mod long;
mod removable;
mod sanitize;
mod sharing;

const GOOD: u8 = 0;
const CONFLICT: u8 = 0x18;

/// Sense key, ASC and ASCQ of what a test means to provoke.
const INVALID_CDB: (u8, u8, u8) = (5, 0x24, 0);
const INVALID_OPCODE: (u8, u8, u8) = (5, 0x20, 0);
const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);

fn text_request(world: &mut World, h: usize, text: &str, ttt: u32) -> (String, u32) {
    let (itt, sn) = world.next_sn(h);
    let body = Body::Text { last: true, more: false, ttt, sn };
    world.send(h, Header::new(itt, 0, body), text.as_bytes());
    world.run();
    let (header, data) = world.receive(h).expect("a text response");
    let Body::TextResponse { last, ttt, .. } = header.body else { panic!("{header:?}") };
    assert_eq!(last, ttt == NO_TAG);
    (String::from_utf8(data).unwrap(), ttt)
}

#[test]
fn discovery_tells_of_what_may_be_reached() {
    let mut world = World::new();
    let mut closed = node_config();
    closed.iqn = "iqn.2025-01.io.cairn:closed".into();
    closed.initiators = Initiators::default();
    world.target.add_node(closed).unwrap();
    let h = world.join_with(1, &[("SessionType", "Discovery")]);
    let (text, _) = text_request(&mut world, h, "SendTargets=All\0", NO_TAG);
    let want = format!(
        "TargetName={IQN}\0TargetAddress=192.0.2.1:3260,1\0TargetAddress=[2001:db8::1]:3260,1\0"
    );
    assert_eq!(text, want);
    let (text, _) =
        text_request(&mut world, h, "SendTargets=iqn.2025-01.io.cairn:closed\0", NO_TAG);
    assert_eq!(text, "");
    assert_eq!(text_request(&mut world, h, "SendTargets=\0", NO_TAG).0, "");
    assert_eq!(text_request(&mut world, h, "X-key=1\0", NO_TAG).0, "X-key=NotUnderstood\0");
    for wrong in ["SendTargets=Alle\0", "sENDtARGETS=aLL\0", "nothing\0"] {
        let (itt, sn) = world.next_sn(h);
        let body = Body::Text { last: true, more: false, ttt: NO_TAG, sn };
        world.send(h, Header::new(itt, 0, body), wrong.as_bytes());
        world.run();
        let (header, offending) = world.receive(h).unwrap();
        assert!(matches!(header.body, Body::Reject { reason: 4, .. }), "{wrong}");
        assert_eq!(u32_at(&offending, 16), itt);
    }
    // There is no SCSI here.
    world.start(h, 0, &[0; 6], &[], 0, 0);
    world.run();
    assert!(world.hosts[h].conn.as_ref().unwrap().wants_close());
    world.close();
}

#[test]
fn many_targets_come_in_parts_and_in_normal_sessions_too() {
    let (mut world, h) = World::ready();
    for n in 0..200 {
        let iqn = format!("iqn.2025-01.io.cairn:more-{n}");
        world.target.add_node(NodeConfig { iqn, ..node_config() }).unwrap();
    }
    let (mut all, mut ttt) = text_request(&mut world, h, "SendTargets=All\0", NO_TAG);
    let mut parts = 1;
    while ttt != NO_TAG {
        let (text, next) = text_request(&mut world, h, "", ttt);
        all.push_str(&text);
        (ttt, parts) = (next, parts + 1);
    }
    assert!(parts > 1 && all.matches("TargetName=").count() == 201);
    let (text, _) = text_request(&mut world, h, "SendTargets=\0", NO_TAG);
    assert_eq!(text.matches("TargetName=").count(), 1, "the session's own");
    world.close();
}

fn login_status(world: &mut World, n: u8, keys: &[(&str, &str)]) -> (u8, u8) {
    let h = world.connect(n);
    let (response, _) = world.login(h, OPERATIONAL, Some(FULL_FEATURE), keys, true);
    response.status
}

#[test]
fn only_those_on_the_list_get_in() {
    let mut config = node_config();
    config.initiators = Initiators::default();
    let mut world = World::with(config, TargetConfig::default());
    // As if there were no such target.
    assert_eq!(login_status(&mut world, 1, &[]), (2, 3));
    let named = Initiators::Named(vec!["iqn.2025-01.io.cairn:HOST-1".into()]);
    world.target.set_access(world.node, named, None).unwrap();
    assert_eq!(login_status(&mut world, 1, &[]), (0, 0));
    assert_eq!(login_status(&mut world, 2, &[]), (2, 3));
    let refused = world.hosts.last().unwrap().conn.as_ref().unwrap().close_reason();
    let why = LoginStatus::AuthorizationFailure;
    assert_eq!(refused, Some(CloseReason::Login(why)), "here it is told apart");
    assert_eq!(login_status(&mut world, 1, &[("TargetName", "iqn.2025-01.io.cairn:no")]), (2, 3));
    world.close();
    let mut elsewhere = node_config();
    elsewhere.portal_groups = vec![2];
    let mut world = World::with(elsewhere, TargetConfig::default());
    assert_eq!(login_status(&mut world, 1, &[]), (2, 3), "not at this portal");
    world.close();
    let few = TargetConfig { max_sessions: 1, ..TargetConfig::default() };
    let mut world = World::with(node_config(), few);
    assert_eq!(login_status(&mut world, 1, &[]), (0, 0));
    assert_eq!(login_status(&mut world, 2, &[]), (3, 2));
    assert_eq!(login_status(&mut world, 1, &[]), (0, 0), "it takes its own place");
    world.close();
}

#[test]
fn secrets_have_to_be_long_and_two() {
    let of = |name: &str, secret: &str| Credentials {
        name: name.into(),
        secret: secret.as_bytes().to_vec(),
    };
    let mut target = Target::new(TargetConfig::default()).unwrap();
    let mut add = |initiator, target_secret: Option<Credentials>| {
        let chap = Some(Chap { initiator, target: target_secret });
        target.add_node(NodeConfig { chap, ..node_config() }).unwrap_err().to_string()
    };
    assert!(add(of("host", "short"), None).contains("12 bytes"));
    let same = "the same secret";
    assert!(add(of("host", same), Some(of("disk", same))).contains("take two"));
    let discovery_chap = Some(Chap { initiator: of("host", "short"), target: None });
    let config = TargetConfig { discovery_chap, ..TargetConfig::default() };
    assert!(Target::new(config).unwrap_err().to_string().contains("12 bytes"));
}

/// A login that has begun without a secret does not get in where one is wanted by now.
#[test]
fn a_secret_that_is_set_during_a_login_holds() {
    let mut world = World::new();
    let h = world.connect(1);
    let (response, _) = world.login(h, OPERATIONAL, None, &[], true);
    assert_eq!(response.status, (0, 0));
    let initiator = Credentials { name: "host".into(), secret: b"a secret of some length".into() };
    let chap = Some(Chap { initiator, target: None });
    world.target.set_access(world.node, Initiators::Any, chap).unwrap();
    let (response, _) = world.login(h, OPERATIONAL, Some(FULL_FEATURE), &[], false);
    assert_eq!(response.status, (2, 1));
    assert!(world.target.sessions(world.node).is_empty());
    world.close();
}

/// Strangers who only ask for targets keep nobody out, and do not end each other's sessions.
#[test]
fn discovery_sessions_are_few_and_apart() {
    let few = TargetConfig { max_sessions: 1, ..TargetConfig::default() };
    let mut world = World::with(node_config(), few);
    let discovery = [("SessionType", "Discovery")];
    let most = 64;
    for _ in 0..most {
        assert_eq!(login_status(&mut world, 1, &discovery), (0, 0));
    }
    assert!(world.hosts.iter().all(|host| host.conn.is_some()), "each is a session of its own");
    assert_eq!(login_status(&mut world, 2, &discovery), (3, 2));
    assert_eq!(login_status(&mut world, 2, &[]), (0, 0));
    world.hang_up(0);
    assert_eq!(login_status(&mut world, 2, &discovery), (0, 0));
    world.close();
}

/// A new session's first command comes after the last of the one before, however that ended.
#[test]
fn a_session_begins_once_the_one_before_is_over() {
    for disconnected in [false, true] {
        let (mut world, old) = World::ready();
        world.hold = true;
        world.start(old, 0, &write10(0, 1), &[1; 512], 512, 512);
        world.run();
        if disconnected {
            world.hang_up(old);
        }
        let new = world.connect(1);
        let request = world.login_request(new, OPERATIONAL, Some(FULL_FEATURE));
        let names = format!("InitiatorName={}\0TargetName={IQN}\0", world.hosts[new].initiator);
        world.send(new, Header::new(0, 0, Body::Login(request)), names.as_bytes());
        world.run();
        assert!(world.hosts[old].conn.is_none() && world.receive(new).is_none());
        assert!(matches!(&world.held[1], (_, Outcome::Drain { units, .. }) if units.len() == 2));
        world.release_held();
        world.run();
        assert_eq!(world.disks[0][0], 1);
        let (header, _) = world.receive(new).unwrap();
        let Body::LoginResponse(response) = header.body else { panic!("{header:?}") };
        assert_eq!((response.status, response.transit), ((0, 0), true));
        assert_ne!(response.tsih, 0);
        world.hold = false;
        world.clear_attentions(new);
        assert_eq!(world.scsi(new, 0, &read10(0, 1), &[], 512).data, [1; 512]);
        world.close();
    }
}

#[test]
fn a_logout_is_answered_once_all_is_over() {
    let (mut world, h) = World::ready();
    world.hold = true;
    let itt = world.start(h, 0, &write10(0, 1), &[1; 512], 512, 512);
    let (_, sn) = world.next_sn(h);
    world.send(h, Header::new(77, 0, Body::Logout { reason: 0, cid: 9, sn }), &[]);
    world.run();
    assert!(world.receive(h).is_none());
    world.release_held();
    world.run();
    assert_eq!(world.finish(h, itt, &[]).status, GOOD);
    let (header, _) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::LogoutResponse { response: 0, .. }));
    world.close();
}

#[test]
fn the_same_initiator_port_takes_its_session_over() {
    let (mut world, h) = World::ready();
    assert_eq!(world.scsi(h, 0, &[0x16, 0, 0, 0, 0, 0], &[], 0).status, GOOD, "RESERVE");
    let again = world.join(1);
    assert!(world.hosts[h].conn.is_none(), "the old connection is closed");
    let sessions = world.target.sessions(world.node);
    assert_eq!((sessions.len(), sessions[0].conn), (1, world.hosts[again].id));
    let other = world.join(2);
    assert_eq!(world.scsi(other, 0, &[0; 6], &[], 0).status, GOOD, "its reservation is gone");
    assert_eq!(world.target.sessions(world.node).len(), 2);
    // A second connection of a session.
    let tsih = world.target.sessions(world.node)[0].tsih;
    let h = world.connect(1);
    for (tsih, status) in [(tsih, (2, 6)), (999, (2, 0x0a))] {
        let mut request = world.login_request(h, OPERATIONAL, Some(FULL_FEATURE));
        request.tsih = tsih;
        let mut text = Vec::new();
        crate::text::push(&mut text, "InitiatorName", &world.hosts[h].initiator);
        crate::text::push(&mut text, "TargetName", IQN);
        let h = world.connect(1);
        world.send(h, Header::new(0, 0, Body::Login(request)), &text);
        world.run();
        let (header, _) = world.receive(h).unwrap();
        let Body::LoginResponse(response) = header.body else { panic!("{header:?}") };
        assert_eq!(response.status, status);
    }
    world.close();
}

#[test]
fn a_login_may_come_in_parts_but_not_for_ever() {
    let mut world = World::new();
    let h = world.connect(1);
    let mut request = world.login_request(h, OPERATIONAL, None);
    request.more = true;
    world.send(h, Header::new(0, 0, Body::Login(request)), b"InitiatorName=iqn.2025-01.io.cai");
    world.run();
    let (header, text) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::LoginResponse(r) if r.status == (0, 0) && !r.transit));
    assert!(text.is_empty());
    let request = world.login_request(h, OPERATIONAL, Some(FULL_FEATURE));
    let rest = format!("rn:host-1\0TargetName={IQN}\0");
    world.send(h, Header::new(0, 0, Body::Login(request)), rest.as_bytes());
    world.run();
    let (header, _) = world.receive(h).unwrap();
    assert!(matches!(header.body, Body::LoginResponse(r) if r.status == (0, 0) && r.transit));
    assert_eq!(world.target.sessions(world.node)[0].initiator, "iqn.2025-01.io.cairn:host-1");
    let h = world.connect(2);
    for _ in 0..3 {
        let mut request = world.login_request(h, OPERATIONAL, None);
        request.more = true;
        world.send(h, Header::new(0, 0, Body::Login(request)), &[b'a'; 8000]);
        world.run();
    }
    assert!(world.hosts[h].conn.as_ref().unwrap().wants_close());
    world.close();
}

#[test]
fn logout_ends_the_session() {
    let (mut world, h) = World::ready();
    for (reason, cid, want) in [(2, 9, 2), (1, 1, 1), (1, 9, 0)] {
        let (itt, sn) = world.next_sn(h);
        world.send(h, Header::new(itt, 0, Body::Logout { reason, cid, sn }), &[]);
        world.run();
        let (header, _) = world.receive(h).unwrap();
        assert!(
            matches!(header.body, Body::LogoutResponse { response, .. } if response == want),
            "{header:?}"
        );
    }
    assert!(world.target.sessions(world.node).is_empty());
    let conn = world.hosts[h].conn.as_ref().unwrap();
    assert_eq!(conn.close_reason(), Some(CloseReason::LoggedOut));
    world.close();
}

#[test]
fn the_target_may_end_a_session() {
    let (mut world, h) = World::ready();
    let World { hosts, mem, .. } = &mut world;
    let conn = hosts[h].conn.as_mut().unwrap();
    conn.request_logout(5, mem);
    conn.drop_session(mem);
    world.run();
    let event = |world: &mut World| match world.receive(h) {
        Some((Header { body: Body::Async { event, parameters, .. }, .. }, _)) => {
            (event, parameters)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(event(&mut world), (1, [0, 0, 5]));
    assert_eq!(event(&mut world), (3, [0, 2, 0]));
    assert!(world.hosts[h].conn.as_ref().unwrap().wants_close());
    let closing = world.target.remove_node(world.node);
    assert_eq!(closing, [world.hosts[h].id]);
    world.close();
}

#[test]
fn inquiry_and_its_like() {
    let (mut world, h) = World::ready();
    let reply = world.scsi(h, 0, &[0x12, 0, 0, 0, 255, 0], &[], 255);
    assert_eq!((reply.data.len(), &reply.data[8..13]), (96, b"CAIRN".as_slice()));
    assert_eq!(reply.residual, Residual::Underflow(159));
    let reply = world.scsi(h, 0, &[0x12, 0, 0, 0, 36, 0], &[], 36);
    assert_eq!((reply.data.len(), reply.residual), (36, Residual::None));
    let reply = world.scsi(h, 0, &[0x12, 1, 0xb0, 1, 0, 0], &[], 256);
    assert_eq!((u32_at(&reply.data, 8), u32_at(&reply.data, 12)), (32768, 2048), "in steps");
    assert_eq!(u32_at(&reply.data, 28), 8);
    assert_eq!(world.scsi(h, 0, &[0x12, 1, 0xc0, 1, 0, 0], &[], 256).key(), INVALID_CDB);
    assert_eq!(world.scsi(h, 0, &[0x12, 0, 0x80, 1, 0, 0], &[], 256).key(), INVALID_CDB);
    // There is no LUN 7, and it says so.
    assert_eq!(world.scsi(h, 7, &[0x12, 0, 0, 0, 36, 0], &[], 36).data[0], 0x7f);
    assert_eq!(world.scsi(h, 7, &[0; 6], &[], 0).key(), (5, 0x25, 0));
    assert_eq!(world.scsi(h, 7, &[0x03, 0, 0, 0, 18, 0], &[], 18).data[12], 0x25);
    let luns = world.scsi(h, 0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[], 256).data;
    assert_eq!((u32_at(&luns, 0), luns[9], luns[17]), (16, 0, 1));
    let mut capacity = vec![0x9e, 0x10];
    capacity.resize(16, 0);
    capacity[13] = 32;
    let reply = world.scsi(h, 0, &capacity, &[], 32);
    assert_eq!((u64_at(&reply.data, 0), reply.data[13]), (BLOCKS - 1, 3));
    // READ DEFECT DATA (10) and (12), of both lists.
    let defects = [0x37, 0, 0x18, 0, 0, 0, 0, 0, 32, 0];
    assert_eq!(world.scsi(h, 0, &defects, &[], 32).data, [0, 0x18, 0, 0]);
    let defects = [0xb7, 0x18, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    assert_eq!(world.scsi(h, 0, &defects, &[], 32).data, [0, 0x18, 0, 0, 0, 0, 0, 0]);
    let reply = world.scsi(h, 0, &ten(0x25, 0, 0), &[], 8);
    assert_eq!(u32_at(&reply.data, 0), u32::try_from(BLOCKS).unwrap() - 1);
    assert_eq!(world.scsi(h, 0, &ten(0x25, 1, 0), &[], 8).key(), INVALID_CDB);
    let groups = world.scsi(h, 0, &[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[], 256).data;
    assert_eq!((u32_at(&groups, 0), u16_at(&groups, 6), u16_at(&groups, 14)), (12, 1, 1));
    world.close();
}

#[test]
fn what_is_not_there_is_refused() {
    let (mut world, h) = World::ready();
    for cdb in [[0x4c, 0], [0xff, 0], [0x04, 0], [0x1d, 0]] {
        assert_eq!(world.scsi(h, 0, &cdb, &[], 0).key(), INVALID_OPCODE, "{cdb:02x?}");
    }
    let reply = world.scsi(h, 0, &[0, 0, 0, 0, 0, 0x04], &[], 0);
    assert_eq!(reply.key(), INVALID_CDB, "NACA");
    assert_eq!(reply.sense[15..18], [0xca, 0, 5]);
    let reply = world.scsi(h, 0, &[0x5e, 0x1f, 0, 0, 0, 0, 0, 0, 8, 0], &[], 8);
    assert_eq!(reply.key(), INVALID_CDB);
    world.close();
}
