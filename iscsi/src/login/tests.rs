use super::*;
use crate::chap::Credentials;

/// The stage to go on to and the text, or how the login ends.
type Answered = Result<(Option<u8>, Vec<(String, String)>), LoginStatus>;

const INITIATOR: &str = "iqn.2025-01.io.cairn:host";
const TARGET: &str = "iqn.2025-01.io.cairn:volume";

fn request(csg: u8, nsg: Option<u8>) -> LoginRequest {
    LoginRequest {
        transit: nsg.is_some(),
        csg,
        nsg: nsg.unwrap_or(0),
        isid: [1; 6],
        ..LoginRequest::default()
    }
}

fn chap() -> Chap {
    let of = |name: &str, secret: &str| Credentials {
        name: name.into(),
        secret: secret.as_bytes().to_vec(),
    };
    Chap { initiator: of("host", "secret of the host"), target: Some(of("disk", "the other one")) }
}

/// A login with what has to be proved.
struct Case {
    login: Login,
    chap: Option<Chap>,
}

impl Case {
    fn new(chap: Option<Chap>) -> Self {
        Self { login: Login::new(&[9; 32]), chap }
    }

    fn step(&mut self, csg: u8, nsg: Option<u8>, keys: &[(&str, &str)]) -> Answered {
        let mut out = Vec::new();
        for (key, value) in keys {
            text::push(&mut out, key, value);
        }
        let chap = self.chap.clone();
        let reply =
            self.login.handle(&request(csg, nsg), &out, &Offer::default(), |names| match names
                .target
                .as_deref()
            {
                Some(TARGET) | None => {
                    Ok(Terms { portal_group: Some(1), alias: Some("alias".into()), chap })
                }
                Some(_) => Err(LoginStatus::NotFound),
            })?;
        let pairs = text::parse(&reply.text).unwrap();
        Ok((
            reply.transit_to,
            pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect(),
        ))
    }

    fn first(&mut self, csg: u8, nsg: Option<u8>, keys: &[(&str, &str)]) -> Answered {
        let mut all = vec![("InitiatorName", INITIATOR), ("TargetName", TARGET)];
        all.extend_from_slice(keys);
        self.step(csg, nsg, &all)
    }
}

fn value<'a>(pairs: &'a [(String, String)], key: &str) -> &'a str {
    pairs.iter().find(|(k, _)| k == key).map_or("", |(_, v)| v)
}

#[test]
fn the_shortest_login_is_one_request() {
    let mut case = Case::new(None);
    let (to, pairs) = case.first(OPERATIONAL, Some(FULL_FEATURE), &[]).unwrap();
    assert_eq!(to, Some(FULL_FEATURE));
    assert_eq!(value(&pairs, "TargetPortalGroupTag"), "1");
    assert_eq!(value(&pairs, "MaxRecvDataSegmentLength"), "262144");
    assert_eq!(case.login.names().initiator, INITIATOR);
}

#[test]
fn security_then_operational_then_full_feature() {
    let mut case = Case::new(None);
    let (to, pairs) =
        case.first(SECURITY, Some(OPERATIONAL), &[("AuthMethod", "CHAP,None")]).unwrap();
    assert_eq!((to, value(&pairs, "AuthMethod")), (Some(OPERATIONAL), "None"));
    assert_eq!(value(&pairs, "TargetAlias"), "alias");
    let (to, pairs) = case.step(OPERATIONAL, None, &[("MaxBurstLength", "8192")]).unwrap();
    assert_eq!((to, value(&pairs, "MaxBurstLength")), (None, "8192"));
    let (to, pairs) = case.step(OPERATIONAL, Some(FULL_FEATURE), &[]).unwrap();
    assert_eq!((to, pairs.len()), (Some(FULL_FEATURE), 0));
    assert_eq!(case.login.params().first_burst, 8192);
}

/// Answers the target's challenge as `name` with `secret`, and asks it back with `challenge`.
fn prove(
    case: &mut Case,
    algorithm: &str,
    name: &str,
    secret: &str,
    challenge: Option<&str>,
) -> Answered {
    let (_, pairs) = case.first(SECURITY, Some(OPERATIONAL), &[("AuthMethod", "None,CHAP")])?;
    assert_eq!(value(&pairs, "TargetAlias"), "", "not before it is known who asks");
    let (to, pairs) = case.step(SECURITY, Some(OPERATIONAL), &[("CHAP_A", algorithm)])?;
    assert_eq!(to, None, "not before the answer");
    let id = number(value(&pairs, "CHAP_I")).unwrap().to_le_bytes()[0];
    let theirs = binary(value(&pairs, "CHAP_C"), 64).unwrap();
    let chosen = Algorithm::from_number(number(value(&pairs, "CHAP_A")).unwrap()).unwrap();
    let response = hex(&chosen.respond(id, secret.as_bytes(), &theirs));
    let mut keys = vec![("CHAP_N", name), ("CHAP_R", response.as_str())];
    let same = hex(&theirs);
    if let Some(challenge) = challenge {
        keys.push(("CHAP_I", "5"));
        keys.push(("CHAP_C", if challenge == "same" { &same } else { challenge }));
    }
    case.step(SECURITY, Some(OPERATIONAL), &keys)
}

#[test]
fn chap_proves_both_ends() {
    for (algorithm, chosen) in [
        ("5", Algorithm::Md5),
        ("6,7", Algorithm::Sha256),
        ("8,5", Algorithm::Sha3),
        ("0x5", Algorithm::Md5),
    ] {
        let mut case = Case::new(Some(chap()));
        let secret = "secret of the host";
        let (to, pairs) = prove(&mut case, algorithm, "host", secret, Some("0bAQIDBA==")).unwrap();
        assert_eq!((to, value(&pairs, "CHAP_N")), (Some(OPERATIONAL), "disk"));
        let right = chosen.respond(5, b"the other one", &[1, 2, 3, 4]);
        assert_eq!(value(&pairs, "CHAP_R"), hex(&right));
        let (to, _) = case.step(OPERATIONAL, Some(FULL_FEATURE), &[]).unwrap();
        assert_eq!(to, Some(FULL_FEATURE));
    }
    let (_, pairs) =
        prove(&mut Case::new(Some(chap())), "5", "host", "secret of the host", None).unwrap();
    assert_eq!(value(&pairs, "TargetAlias"), "alias");
    assert_eq!(pairs.len(), 1, "nobody asked the target");
}

#[test]
fn who_does_not_prove_itself_stays_out() {
    const NO: LoginStatus = LoginStatus::AuthenticationFailure;
    let new = || Case::new(Some(chap()));
    let secret = "secret of the host";
    assert_eq!(prove(&mut new(), "5", "host", "wrong", None), Err(NO));
    assert_eq!(prove(&mut new(), "5", "other", secret, None), Err(NO));
    assert_eq!(prove(&mut new(), "6", "host", secret, None), Err(NO), "SHA-1");
    assert_eq!(prove(&mut new(), "5", "host", secret, Some("same")), Err(NO), "reflection");
    assert_eq!(prove(&mut new(), "5", "host", secret, Some("0x")), Err(NO));
    let one_way = Chap { target: None, ..chap() };
    let mut case = Case::new(Some(one_way));
    assert_eq!(prove(&mut case, "5", "host", secret, Some("0x0102")), Err(NO));
    assert_eq!(new().first(OPERATIONAL, Some(FULL_FEATURE), &[]), Err(NO));
    assert_eq!(new().first(SECURITY, Some(FULL_FEATURE), &[]), Err(NO));
    assert_eq!(new().first(SECURITY, None, &[("AuthMethod", "None")]), Err(NO));
    assert_eq!(new().first(SECURITY, None, &[("CHAP_R", "0x00")]), Err(NO));
    let mut case = new();
    case.first(SECURITY, Some(OPERATIONAL), &[("AuthMethod", "CHAP")]).unwrap();
    assert_eq!(case.step(SECURITY, None, &[("CHAP_N", "host"), ("CHAP_R", "0x00")]), Err(NO));
    assert_eq!(
        case.step(OPERATIONAL, Some(FULL_FEATURE), &[]),
        Err(LoginStatus::InvalidDuringLogin),
        "it is in the security stage still"
    );
}

#[test]
fn each_fault_has_its_status() {
    use LoginStatus as S;
    let step = |csg, nsg, keys: &[(&str, &str)]| Case::new(None).step(csg, nsg, keys);
    let named =
        |target: &str| step(1, None, &[("InitiatorName", INITIATOR), ("TargetName", target)]);
    assert_eq!(named("iqn.2025-01.io.cairn:nothing"), Err(S::NotFound));
    assert_eq!(named("no name"), Err(S::InitiatorError));
    assert!(named("IQN.2025-01.io.cairn:VOLUME").is_ok(), "names know no case");
    assert_eq!(step(1, None, &[("TargetName", TARGET)]), Err(S::MissingParameter));
    assert_eq!(step(1, None, &[("InitiatorName", INITIATOR)]), Err(S::MissingParameter));
    let kind = |kind| step(1, None, &[("InitiatorName", INITIATOR), ("SessionType", kind)]);
    assert!(kind("Discovery").is_ok());
    assert_eq!(kind("Other"), Err(S::SessionTypeNotSupported));
    let first = |csg, nsg| Case::new(None).first(csg, nsg, &[]);
    assert_eq!(first(2, None), Err(S::InvalidDuringLogin));
    assert_eq!(first(3, None), Err(S::InvalidDuringLogin));
    assert_eq!(first(1, Some(1)), Err(S::InvalidDuringLogin));
    assert_eq!(first(0, Some(2)), Err(S::InvalidDuringLogin));
    let twice = [("MaxBurstLength", "8192"), ("MaxBurstLength", "4096")];
    assert_eq!(Case::new(None).first(1, None, &twice), Err(S::InitiatorError));
    let short = [("MaxRecvDataSegmentLength", "1")];
    assert_eq!(Case::new(None).first(1, None, &short), Err(S::InitiatorError));
    let mut login = Login::new(&[0; 32]);
    let newer = LoginRequest { version_min: 1, ..request(1, None) };
    let failed = login.handle(&newer, b"", &Offer::default(), |_| Err(S::NotFound));
    assert_eq!(failed, Err(S::UnsupportedVersion));
    assert_eq!(S::UnsupportedVersion.code(), (2, 5));
}

#[test]
fn a_login_that_gets_nowhere_ends() {
    let mut case = Case::new(None);
    case.first(OPERATIONAL, None, &[]).unwrap();
    for _ in 1..MAX_REQUESTS {
        case.step(OPERATIONAL, None, &[]).unwrap();
    }
    assert_eq!(case.step(OPERATIONAL, None, &[]), Err(LoginStatus::InvalidDuringLogin));
}

#[test]
fn a_request_tells_its_target() {
    assert_eq!(target_name(b"InitiatorName=iqn.a\0TargetName=iqn.b\0"), Some("iqn.b"));
    assert_eq!(target_name(b"SessionType=Discovery\0"), None);
    assert_eq!(target_name(b"nothing\0"), None);
}

#[test]
fn names_are_of_three_kinds() {
    for name in ["iqn.2025-01.io.cairn:a.b-c", "eui.02004567a425678d", "naa.52004567ba64678d"] {
        assert!(is_name(name), "{name}");
    }
    for name in ["", "iqn.", "abc.x", "iqn.a b", "iqn.a,b", "iqn.a\0b"] {
        assert!(!is_name(name), "{name}");
    }
    assert!(!is_name(&format!("iqn.{}", "a".repeat(220))));
}
