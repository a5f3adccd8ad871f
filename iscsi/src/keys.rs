//! What a session's two ends agree on: the operational keys (RFC 7143, section 13) and the rules
//! by which each is answered.

use crate::rx::Digests;
use crate::text::number;

/// The least that MaxRecvDataSegmentLength and the burst lengths may be.
const MIN_LENGTH: u32 = 512;
/// The most.
const MAX_LENGTH: u32 = (1 << 24) - 1;
/// MaxRecvDataSegmentLength until it is declared.
pub const DEFAULT_SEGMENT_LEN: u32 = 8192;

/// What this end brings to a negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// MaxRecvDataSegmentLength of the target, declared to the initiator.
    pub max_recv_segment: u32,
    /// MaxBurstLength at most.
    pub max_burst: u32,
    /// FirstBurstLength at most.
    pub first_burst: u32,
}

impl Default for Offer {
    fn default() -> Self {
        Self { max_recv_segment: 256 << 10, max_burst: 1 << 20, first_burst: 256 << 10 }
    }
}

/// What was agreed on; at first the values that hold without agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// HeaderDigest and DataDigest.
    pub digests: Digests,
    /// MaxRecvDataSegmentLength of the initiator: the most data in one PDU to it.
    pub max_send_segment: u32,
    /// MaxRecvDataSegmentLength of the target: the most data in one PDU from the initiator.
    pub max_recv_segment: u32,
    /// MaxBurstLength.
    pub max_burst: u32,
    /// FirstBurstLength.
    pub first_burst: u32,
    /// InitialR2T: no unsolicited Data-Out.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            max_send_segment: DEFAULT_SEGMENT_LEN,
            max_recv_segment: DEFAULT_SEGMENT_LEN,
            max_burst: 256 << 10,
            first_burst: 64 << 10,
            initial_r2t: true,
            immediate_data: true,
        }
    }
}

/// How a key is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A declaration: nothing to say.
    Silent,
    /// With this value.
    Value(String),
    /// The value makes no sense, or nothing of it can be agreed on.
    Reject,
    /// The key means nothing in this session.
    Irrelevant,
    /// Nobody here knows the key.
    NotUnderstood,
}

impl Answer {
    /// The value to send, if any.
    #[must_use]
    pub fn value(&self) -> Option<&str> {
        match self {
            Self::Silent => None,
            Self::Value(value) => Some(value),
            Self::Reject => Some("Reject"),
            Self::Irrelevant => Some("Irrelevant"),
            Self::NotUnderstood => Some("NotUnderstood"),
        }
    }
}

/// Keys that a discovery session has no use for.
const NORMAL_ONLY: [&str; 9] = [
    "MaxConnections",
    "InitialR2T",
    "ImmediateData",
    "MaxBurstLength",
    "FirstBurstLength",
    "MaxOutstandingR2T",
    "DataPDUInOrder",
    "DataSequenceInOrder",
    "TaskReporting",
];

/// The iSCSIProtocolLevel of RFC 7143.
const PROTOCOL_LEVEL: u32 = 1;

impl Params {
    /// Takes the initiator's value of an operational key, and answers it.
    pub fn negotiate(&mut self, key: &str, value: &str, offer: &Offer, discovery: bool) -> Answer {
        if discovery && NORMAL_ONLY.contains(&key) {
            return Answer::Irrelevant;
        }
        // An answer where a question was expected: the target asked nothing.
        if matches!(value, "Reject" | "Irrelevant" | "NotUnderstood") {
            return Answer::Silent;
        }
        match key {
            "HeaderDigest" => digest(value, &mut self.digests.header),
            "DataDigest" => digest(value, &mut self.digests.data),
            "MaxRecvDataSegmentLength" => match within(value, MIN_LENGTH, MAX_LENGTH) {
                Some(length) => {
                    self.max_send_segment = length;
                    Answer::Silent
                }
                None => Answer::Reject,
            },
            "MaxBurstLength" => {
                let answer = least(value, MIN_LENGTH, MAX_LENGTH, offer.max_burst);
                set(&mut self.max_burst, answer);
                // First burst is never the longer one.
                self.first_burst = self.first_burst.min(self.max_burst);
                say(answer)
            }
            "FirstBurstLength" => {
                let most = offer.first_burst.min(offer.max_burst);
                let answer = least(value, MIN_LENGTH, MAX_LENGTH, most);
                set(&mut self.first_burst, answer);
                say(answer)
            }
            "InitialR2T" => boolean(value, |theirs| theirs, &mut self.initial_r2t),
            "ImmediateData" => boolean(value, |theirs| theirs, &mut self.immediate_data),
            // Data comes in order, whatever the initiator would bear.
            "DataPDUInOrder" | "DataSequenceInOrder" => boolean(value, |_| true, &mut true),
            "MaxConnections" => say(least(value, 1, 65_535, 1)),
            "MaxOutstandingR2T" => say(least(value, 1, 65_535, 1)),
            "ErrorRecoveryLevel" => say(least(value, 0, 2, 0)),
            "DefaultTime2Wait" => say(within(value, 0, 3600).map(|theirs| theirs.max(2))),
            "DefaultTime2Retain" => say(least(value, 0, 3600, 0)),
            "iSCSIProtocolLevel" => say(least(value, 0, 31, PROTOCOL_LEVEL)),
            "TaskReporting" => list(value, &["RFC3720"]).map_or(Answer::Reject, Answer::Value),
            // Markers are obsolete.
            "IFMarker" | "OFMarker" => boolean(value, |_| false, &mut false),
            "IFMarkInt" | "OFMarkInt" => Answer::Irrelevant,
            _ => Answer::NotUnderstood,
        }
    }

    /// First burst after everything has been agreed on.
    #[must_use]
    pub fn settled(mut self) -> Self {
        self.first_burst = self.first_burst.min(self.max_burst);
        self
    }
}

fn within(value: &str, min: u32, max: u32) -> Option<u32> {
    number(value).filter(|n| (min..=max).contains(n))
}

/// The smaller of both ends' values.
fn least(value: &str, min: u32, max: u32, ours: u32) -> Option<u32> {
    within(value, min, max).map(|theirs| theirs.min(ours))
}

fn set(field: &mut u32, value: Option<u32>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn say(value: Option<u32>) -> Answer {
    value.map_or(Answer::Reject, |n| Answer::Value(n.to_string()))
}

/// `result` gives what follows from the initiator's value.
fn boolean(value: &str, result: impl Fn(bool) -> bool, field: &mut bool) -> Answer {
    let theirs = match value {
        "Yes" => true,
        "No" => false,
        _ => return Answer::Reject,
    };
    *field = result(theirs);
    Answer::Value(if *field { "Yes" } else { "No" }.to_owned())
}

/// The first value of a list that is also ours.
#[must_use]
pub fn list(value: &str, ours: &[&str]) -> Option<String> {
    value.split(',').find(|v| ours.contains(v)).map(str::to_owned)
}

fn digest(value: &str, field: &mut bool) -> Answer {
    match list(value, &["CRC32C", "None"]) {
        Some(chosen) => {
            *field = chosen == "CRC32C";
            Answer::Value(chosen)
        }
        None => Answer::Reject,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(params: &mut Params, key: &str, value: &str) -> String {
        let answer = params.negotiate(key, value, &Offer::default(), false);
        answer.value().unwrap_or("-").to_owned()
    }

    #[test]
    fn each_key_follows_its_rule() {
        let p = &mut Params::default();
        for (key, value, answer) in [
            ("HeaderDigest", "None,CRC32C", "None"),
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("DataDigest", "X-sum,CRC32C", "CRC32C"),
            ("DataDigest", "X-sum", "Reject"),
            ("MaxConnections", "8", "1"),
            ("MaxConnections", "0", "Reject"),
            ("InitialR2T", "No", "No"),
            ("InitialR2T", "Yes", "Yes"),
            ("ImmediateData", "Yes", "Yes"),
            ("ImmediateData", "maybe", "Reject"),
            ("MaxRecvDataSegmentLength", "65536", "-"),
            ("MaxRecvDataSegmentLength", "100", "Reject"),
            ("MaxBurstLength", "16776192", "1048576"),
            ("MaxBurstLength", "0x10000", "65536"),
            ("FirstBurstLength", "262144", "262144"),
            ("DefaultTime2Wait", "0", "2"),
            ("DefaultTime2Retain", "20", "0"),
            ("MaxOutstandingR2T", "16", "1"),
            ("DataPDUInOrder", "No", "Yes"),
            ("DataSequenceInOrder", "Yes", "Yes"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("ErrorRecoveryLevel", "3", "Reject"),
            ("IFMarker", "Yes", "No"),
            ("OFMarkInt", "2048~8192", "Irrelevant"),
            ("iSCSIProtocolLevel", "2", "1"),
            ("TaskReporting", "FastAbort,RFC3720", "RFC3720"),
            ("X-com.example", "1", "NotUnderstood"),
            ("MaxBurstLength", "Irrelevant", "-"),
        ] {
            assert_eq!(ask(p, key, value), answer, "{key}={value}");
        }
        let p = p.settled();
        assert_eq!((p.max_send_segment, p.max_burst, p.first_burst), (65_536, 65_536, 65_536));
        assert!(p.digests.header && p.digests.data && p.initial_r2t && p.immediate_data);
    }

    #[test]
    fn a_discovery_session_negotiates_no_data_transfer() {
        let mut p = Params::default();
        let answer = p.negotiate("MaxBurstLength", "262144", &Offer::default(), true);
        assert_eq!(answer, Answer::Irrelevant);
        let answer = p.negotiate("HeaderDigest", "None", &Offer::default(), true);
        assert_eq!(answer, Answer::Value("None".into()));
    }
}
