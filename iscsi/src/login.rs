//! The login phase (RFC 7143, section 6.3): who is there, whether it may, and what is agreed on.

use crate::chap::{Algorithm, Chap, MAX_CHALLENGE_LEN, MAX_RESPONSE_LEN, matches};
use crate::keys::{Answer, Offer, Params, list};
use crate::pdu::LoginRequest;
use crate::text::{self, binary, hex, number};

/// The longest iSCSI name, in bytes.
pub const MAX_NAME_LEN: usize = 223;
/// Stages of a login.
pub const SECURITY: u8 = 0;
/// Operational negotiation.
pub const OPERATIONAL: u8 = 1;
/// Full feature phase.
pub const FULL_FEATURE: u8 = 3;
/// Requests of one login at most: a login that gets nowhere ends.
const MAX_REQUESTS: u32 = 64;

/// How a login ends that does not succeed (section 11.13.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LoginStatus {
    /// Something of the initiator's makes no sense.
    #[error("the login request makes no sense")]
    InitiatorError,
    /// It did not prove who it is.
    #[error("the initiator did not authenticate itself")]
    AuthenticationFailure,
    /// It may not.
    #[error("the initiator is not on the target's list of allowed initiators")]
    AuthorizationFailure,
    /// There is no such target here.
    #[error("there is no such target at this portal")]
    NotFound,
    /// The target is gone.
    #[error("the target has been removed")]
    TargetRemoved,
    /// Version-min is above ours.
    #[error("the initiator speaks only newer versions of iSCSI")]
    UnsupportedVersion,
    /// A session here has one connection.
    #[error("the session has a connection already")]
    TooManyConnections,
    /// InitiatorName or TargetName was not given.
    #[error("the initiator did not name itself or its target")]
    MissingParameter,
    /// SessionType is neither Normal nor Discovery.
    #[error("the session type is not supported")]
    SessionTypeNotSupported,
    /// The TSIH names no session.
    #[error("there is no such session")]
    SessionDoesNotExist,
    /// The request does not fit the stage.
    #[error("the request does not belong to this stage of the login")]
    InvalidDuringLogin,
    /// There is no room for it, or the target is not ready.
    #[error("the target takes no sessions at the moment")]
    ServiceUnavailable,
    /// Sessions, or what else they need, are used up.
    #[error("the target has no room for another session")]
    OutOfResources,
}

impl LoginStatus {
    /// Status-Class and Status-Detail.
    #[must_use]
    pub const fn code(self) -> (u8, u8) {
        match self {
            Self::InitiatorError => (2, 0x00),
            Self::AuthenticationFailure => (2, 0x01),
            // A stranger is not told which targets there are: Authorization Failure would be 2, 2.
            Self::AuthorizationFailure | Self::NotFound => (2, 0x03),
            Self::TargetRemoved => (2, 0x04),
            Self::UnsupportedVersion => (2, 0x05),
            Self::TooManyConnections => (2, 0x06),
            Self::MissingParameter => (2, 0x07),
            Self::SessionTypeNotSupported => (2, 0x09),
            Self::SessionDoesNotExist => (2, 0x0a),
            Self::InvalidDuringLogin => (2, 0x0b),
            Self::ServiceUnavailable => (3, 0x01),
            Self::OutOfResources => (3, 0x02),
        }
    }
}

/// Who logs in, and to what.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// InitiatorName.
    pub initiator: String,
    /// InitiatorAlias.
    pub alias: Option<String>,
    /// TargetName; nothing in a discovery session.
    pub target: Option<String>,
    /// Initiator session id.
    pub isid: [u8; 6],
    /// The session to join; 0 for a new one.
    pub tsih: u16,
}

/// What a login has to do to get in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// TargetPortalGroupTag, for normal sessions.
    pub portal_group: Option<u16>,
    /// TargetAlias, if there is one.
    pub alias: Option<String>,
    /// What it has to prove.
    pub chap: Option<Chap>,
}

/// What to say to a login request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Go on to this stage.
    pub transit_to: Option<u8>,
    /// The text of the response.
    pub text: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Auth {
    /// AuthMethod was not agreed on.
    Start,
    /// CHAP was; CHAP_A has not come.
    Algorithm,
    /// The challenge was sent.
    Challenged(Algorithm),
    /// The initiator is who it says, or nobody asked.
    Done,
}

/// One login, from the first request on.
#[derive(Debug)]
pub struct Login {
    names: Names,
    terms: Option<Terms>,
    stage: u8,
    auth: Auth,
    params: Params,
    /// Keys that were negotiated; none is twice.
    seen: Vec<String>,
    declared: bool,
    /// TargetAlias was told.
    introduced: bool,
    requests: u32,
    chap_id: u8,
    challenge: [u8; 24],
}

impl Login {
    /// A login whose challenge is made of `entropy`.
    #[must_use]
    pub fn new(entropy: &[u8; 32]) -> Self {
        let mut challenge = [0; 24];
        challenge.copy_from_slice(&entropy[8..]);
        Self {
            names: Names::default(),
            terms: None,
            stage: SECURITY,
            auth: Auth::Start,
            params: Params::default(),
            seen: Vec::new(),
            declared: false,
            introduced: false,
            requests: 0,
            chap_id: entropy[0],
            challenge,
        }
    }

    /// Who logs in, once the first request was taken.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Whether a discovery session logs in.
    #[must_use]
    pub fn is_discovery(&self) -> bool {
        self.names.target.is_none()
    }

    /// What was agreed on.
    #[must_use]
    pub fn params(&self) -> Params {
        self.params.settled()
    }

    /// Takes a request with all of its text. `terms` is asked once, when the names are known.
    ///
    /// # Errors
    /// How the login ends; close the connection after the response.
    pub fn handle(
        &mut self,
        request: &LoginRequest,
        text: &[u8],
        offer: &Offer,
        terms: impl FnOnce(&Names) -> Result<Terms, LoginStatus>,
    ) -> Result<Reply, LoginStatus> {
        self.requests += 1;
        if self.requests > MAX_REQUESTS || request.csg > OPERATIONAL {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        if request.transit && (request.nsg <= request.csg || request.nsg == 2 || request.nsg > 3) {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        let pairs = text::parse(text).map_err(|_| LoginStatus::InitiatorError)?;
        let mut out = Vec::new();
        if self.terms.is_none() {
            self.begin(request, &pairs, terms, &mut out)?;
        } else if request.csg != self.stage || request.isid != self.names.isid {
            return Err(LoginStatus::InvalidDuringLogin);
        }
        if request.csg == OPERATIONAL && self.auth == Auth::Start {
            // Security was skipped.
            self.allow_without_auth()?;
        }
        if request.csg == OPERATIONAL && self.auth != Auth::Done {
            return Err(LoginStatus::AuthenticationFailure);
        }
        self.security(&pairs, &mut out)?;
        for (key, value) in &pairs {
            if !self.is_for_others(key) {
                self.operational(key, value, offer, &mut out)?;
            }
        }
        if request.csg == OPERATIONAL && !self.declared {
            self.declared = true;
            self.params.max_recv_segment = offer.max_recv_segment;
            text::push(&mut out, "MaxRecvDataSegmentLength", &offer.max_recv_segment.to_string());
        }
        let mut transit_to = None;
        if request.transit {
            if self.auth == Auth::Start {
                self.allow_without_auth()?;
            }
            if self.auth == Auth::Done {
                transit_to = Some(request.nsg);
                self.stage = request.nsg;
            }
        }
        if self.auth == Auth::Done && !std::mem::replace(&mut self.introduced, true) {
            let alias = self.terms.as_ref().and_then(|terms| terms.alias.as_deref());
            if let Some(alias) = alias {
                text::push(&mut out, "TargetAlias", alias);
            }
        }
        Ok(Reply { transit_to, text: out })
    }

    /// The first request: names, then terms.
    fn begin(
        &mut self,
        request: &LoginRequest,
        pairs: &[(&str, &str)],
        terms: impl FnOnce(&Names) -> Result<Terms, LoginStatus>,
        out: &mut Vec<u8>,
    ) -> Result<(), LoginStatus> {
        if request.version_min > 0 {
            return Err(LoginStatus::UnsupportedVersion);
        }
        let value = |key: &str| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        let name = |key: &str| match value(key) {
            Some(name) if is_name(name) => Ok(Some(name.to_ascii_lowercase())),
            Some(_) => Err(LoginStatus::InitiatorError),
            None => Ok(None),
        };
        let discovery = match value("SessionType") {
            None | Some("Normal") => false,
            Some("Discovery") => true,
            Some(_) => return Err(LoginStatus::SessionTypeNotSupported),
        };
        let target = name("TargetName")?;
        if target.is_none() && !discovery {
            return Err(LoginStatus::MissingParameter);
        }
        self.names = Names {
            initiator: name("InitiatorName")?.ok_or(LoginStatus::MissingParameter)?,
            alias: value("InitiatorAlias").map(|a| a.chars().take(255).collect()),
            target: target.filter(|_| !discovery),
            isid: request.isid,
            tsih: request.tsih,
        };
        let terms = terms(&self.names)?;
        if let Some(tag) = terms.portal_group {
            text::push(out, "TargetPortalGroupTag", &tag.to_string());
        }
        self.terms = Some(terms);
        self.stage = request.csg;
        Ok(())
    }

    /// What the initiator has to prove.
    pub(crate) fn chap(&self) -> Option<&Chap> {
        self.terms.as_ref().and_then(|terms| terms.chap.as_ref())
    }

    /// The initiator wants to go on and has not authenticated itself.
    fn allow_without_auth(&mut self) -> Result<(), LoginStatus> {
        if self.chap().is_some() {
            return Err(LoginStatus::AuthenticationFailure);
        }
        self.auth = Auth::Done;
        Ok(())
    }

    /// Whether a key is no operational one: it was dealt with elsewhere.
    fn is_for_others(&self, key: &str) -> bool {
        matches!(
            key,
            "InitiatorName"
                | "InitiatorAlias"
                | "TargetName"
                | "SessionType"
                | "AuthMethod"
                | "CHAP_A"
                | "CHAP_I"
                | "CHAP_C"
                | "CHAP_N"
                | "CHAP_R"
        )
    }

    fn operational(
        &mut self,
        key: &str,
        value: &str,
        offer: &Offer,
        out: &mut Vec<u8>,
    ) -> Result<(), LoginStatus> {
        if self.seen.iter().any(|seen| seen == key) {
            return Err(LoginStatus::InitiatorError);
        }
        self.seen.push(key.to_owned());
        let discovery = self.is_discovery();
        let answer = self.params.negotiate(key, value, offer, discovery);
        if let Some(value) = answer.value() {
            text::push(out, key, value);
        }
        // A login cannot go on without these.
        match (answer, key) {
            (Answer::Reject, "MaxRecvDataSegmentLength") => Err(LoginStatus::InitiatorError),
            _ => Ok(()),
        }
    }

    fn security(&mut self, pairs: &[(&str, &str)], out: &mut Vec<u8>) -> Result<(), LoginStatus> {
        let value = |key: &str| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        if let Some(methods) = value("AuthMethod") {
            if self.auth != Auth::Start || self.stage != SECURITY {
                return Err(LoginStatus::InitiatorError);
            }
            let ours: &[&str] = if self.chap().is_some() { &["CHAP"] } else { &["None"] };
            let chosen = list(methods, ours).ok_or(LoginStatus::AuthenticationFailure)?;
            self.auth = if chosen == "CHAP" { Auth::Algorithm } else { Auth::Done };
            text::push(out, "AuthMethod", &chosen);
        }
        if let Some(algorithms) = value("CHAP_A") {
            if self.auth != Auth::Algorithm {
                return Err(LoginStatus::AuthenticationFailure);
            }
            let algorithm = algorithms
                .split(',')
                .find_map(|a| number(a).and_then(Algorithm::from_number))
                .ok_or(LoginStatus::AuthenticationFailure)?;
            self.auth = Auth::Challenged(algorithm);
            text::push(out, "CHAP_A", &algorithm.number().to_string());
            text::push(out, "CHAP_I", &self.chap_id.to_string());
            text::push(out, "CHAP_C", &hex(&self.challenge));
            return Ok(());
        }
        if let Some(response) = value("CHAP_R") {
            let Auth::Challenged(algorithm) = self.auth else {
                return Err(LoginStatus::AuthenticationFailure);
            };
            let back = value("CHAP_I").zip(value("CHAP_C"));
            self.check_response(algorithm, value("CHAP_N"), response, back, out)?;
            self.auth = Auth::Done;
        }
        Ok(())
    }

    /// The initiator's response, and the target's to the challenge `back`.
    fn check_response(
        &self,
        algorithm: Algorithm,
        name: Option<&str>,
        response: &str,
        back: Option<(&str, &str)>,
        out: &mut Vec<u8>,
    ) -> Result<(), LoginStatus> {
        const FAILURE: LoginStatus = LoginStatus::AuthenticationFailure;
        let chap = self.chap().ok_or(FAILURE)?;
        let response = binary(response, MAX_RESPONSE_LEN).ok_or(FAILURE)?;
        let secret = &chap.initiator.secret;
        let right = algorithm.respond(self.chap_id, secret, &self.challenge);
        if name != Some(chap.initiator.name.as_str()) || !matches(&right, &response) {
            return Err(FAILURE);
        }
        let Some((id, challenge)) = back else { return Ok(()) };
        let id = number(id).and_then(|id| u8::try_from(id).ok()).ok_or(FAILURE)?;
        let challenge = binary(challenge, MAX_CHALLENGE_LEN).ok_or(FAILURE)?;
        // Our own challenge sent back would make us answer for the initiator.
        let target = chap.target.as_ref().filter(|_| challenge != self.challenge).ok_or(FAILURE)?;
        text::push(out, "CHAP_N", &target.name);
        text::push(out, "CHAP_R", &hex(&algorithm.respond(id, &target.secret, &challenge)));
        Ok(())
    }
}

/// The target that the text of a first login request names: whoever moves connections to where their
/// target is asks for it.
#[must_use]
pub fn target_name(text: &[u8]) -> Option<&str> {
    let pairs = text::parse(text).ok()?;
    pairs.iter().find(|(key, _)| *key == "TargetName").map(|(_, name)| *name)
}

/// Whether a text can be an iSCSI name: iqn., eui. or naa., and nothing that a name may not hold.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let known = ["iqn.", "eui.", "naa."]
        .iter()
        .any(|p| name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(p)));
    known
        && name.len() > 4
        && name.len() <= MAX_NAME_LEN
        && name.chars().all(|c| !c.is_ascii() || c.is_ascii_alphanumeric() || ".-:_".contains(c))
}

#[cfg(test)]
mod tests;
