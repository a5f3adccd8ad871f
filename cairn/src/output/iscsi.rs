//! What is shown of a volume's logical unit.

use std::fmt::Write as _;

use cairn_api::v1;
use serde_json::{Value, json};

pub(super) fn unit_json(unit: &v1::IscsiUnit) -> Value {
    let export = unit.export.clone().unwrap_or_default();
    let session = |s: &v1::IscsiSession| {
        json!({
            "initiator": s.initiator, "isid": s.isid, "tsih": s.tsih, "portal_group": s.portal_group,
            "header_digest": s.header_digest, "data_digest": s.data_digest,
        })
    };
    json!({
        "iqn": export.iqn, "lun": export.lun, "initiators": export.initiators, "read_only": export.read_only,
        "removable": export.removable, "chap": unit.chap,
        "mutual_chap": unit.mutual_chap, "access_state": unit.access_state, "port_group": unit.port_group,
        "portals": unit.portals, "sessions": unit.sessions.iter().map(session).collect::<Vec<_>>(),
    })
}

/// Lines for people.
pub(super) fn unit_text(unit: &v1::IscsiUnit) -> String {
    let export = unit.export.clone().unwrap_or_default();
    let state = if unit.access_state.is_empty() { "not there yet" } else { &unit.access_state };
    let who = match export.initiators.as_slice() {
        [] => "nobody may log in".to_owned(),
        names => format!("for {}", names.join(", ")),
    };
    let proof = match (unit.chap, unit.mutual_chap) {
        (false, _) => "",
        (true, false) => ", with CHAP",
        (true, true) => ", with CHAP both ways",
    };
    let writes = if export.read_only { ", read-only" } else { "" };
    let medium = if export.removable { ", removable" } else { "" };
    let (iqn, lun) = (&export.iqn, export.lun);
    let mut text = format!("iscsi     {iqn} LUN {lun}: {state}{writes}{medium}, {who}{proof}");
    if !unit.portals.is_empty() {
        let _infallible = write!(text, "\nportals   {}", unit.portals.join(" "));
    }
    for s in &unit.sessions {
        let digests = match (s.header_digest, s.data_digest) {
            (false, false) => "none",
            (true, false) => "of headers",
            (false, true) => "of data",
            (true, true) => "of headers and data",
        };
        let _infallible = write!(
            text,
            "\n  initiator {} (isid {}), portal group {}, digests: {digests}",
            s.initiator, s.isid, s.portal_group
        );
    }
    text
}
