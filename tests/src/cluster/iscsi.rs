//! The volume as a logical unit of an iSCSI target.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Cluster, NEXUS_PORT, REPLICAS, VOLUME};

pub(super) const IQN: &str = "iqn.2026-11.io.cairn:guest";
const PORT: u16 = 3260;
/// What `guest/iscsi.sh` proves, and what is proved to it.
const CHAP: &str = "guest what-the-guest-proves\n";
const MUTUAL_CHAP: &str = "guest what-the-guest-proves\ntarget what-the-target-proves\n";
/// Longer than a host takes to see that its connection is gone, and to be refused once or twice.
const RESET: Duration = Duration::from_millis(2_500);

/// Where a process listens for initiators, by its port for hosts of NVMe.
pub(super) const fn port(nvmf: u16) -> u16 {
    nvmf - NEXUS_PORT + PORT
}

/// The portal group of that.
pub(super) const fn group(nvmf: u16) -> u16 {
    nvmf - NEXUS_PORT + 1
}

impl Cluster<'_> {
    /// What jobs over iSCSI ask for; nothing where it is no verb of theirs.
    pub(super) fn act_iscsi(&self, verb: &str) -> Option<Result<String>> {
        let (verb, rest) = verb.split_once(' ').unwrap_or((verb, ""));
        Some(match verb {
            "export" => self.export(rest, ""),
            "export-chap" => self.export(rest, CHAP),
            "export-mutual" => self.export(rest, MUTUAL_CHAP),
            "reset-initiators" => self.reset_initiators(),
            "allocated" => self.allocated(),
            "sessions" => self.sessions(),
            _ => return None,
        })
    }

    /// Makes the volume a logical unit for these initiators.
    fn export(&self, initiators: &str, chap: &str) -> Result<String> {
        let mut args = vec!["volume", "export", VOLUME, "--iscsi"];
        for name in initiators.split_whitespace() {
            args.extend(["--initiator", name]);
        }
        let file = self.dir.join("chap").display().to_string();
        if !chap.is_empty() {
            fs::write(&file, chap)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            args.extend(["--chap-file", &file]);
        }
        Ok(self.call(self.active, &args)?["iscsi"].to_string())
    }

    /// Breaks the connections of initiators to the process that serves, and lets them connect again after a while.
    fn reset_initiators(&self) -> Result<String> {
        let port = port(super::group_of(self.active));
        self.net.reset(Some(port))?;
        std::thread::sleep(RESET);
        self.net.reset(None)?;
        Ok("they can connect again".to_owned())
    }

    /// The most bytes that a replica of the volume has in its pool.
    fn allocated(&self) -> Result<String> {
        let mut most = 0;
        for (name, _) in REPLICAS.iter().filter(|(name, _)| self.running.contains_key(name)) {
            let own = self.call(name, &["replica", "list"])?;
            let own = own.as_array().and_then(|all| all.first()).context("it has no replica")?;
            let bytes = own.get("allocated_bytes").and_then(Value::as_u64);
            most = most.max(bytes.context("cairn tells no allocated_bytes")?);
        }
        Ok(most.to_string())
    }

    /// How many initiators are logged in, as the process that serves tells it.
    fn sessions(&self) -> Result<String> {
        let status = self.call(self.active, &["volume", "status", VOLUME])?;
        let sessions = status["iscsi"]["sessions"].as_array().context("cairn tells no sessions")?;
        Ok(sessions.len().to_string())
    }
}
