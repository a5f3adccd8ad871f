//! What the guest talks to, and the harness's own proof that the jobs are right.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::guest::{Boot, Guest};
use crate::image::Image;
use crate::net::{NVMET_IP, Net, STORAGE_IP};

/// Where the guest finds the subsystem under test.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    pub(crate) address: String,
    pub(crate) port: u16,
    pub(crate) nqn: String,
    /// Where it is a logical unit too, once it is exported.
    pub(crate) unit: Unit,
}

/// A logical unit of an iSCSI target, number 0.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unit {
    pub(crate) address: String,
    pub(crate) port: u16,
    pub(crate) iqn: String,
}

/// The servers of one job; stopped when dropped.
pub(crate) trait Peer {
    fn endpoint(&self) -> Endpoint;

    /// Does what a job asked for with `HOST-DO`; the text goes back to the guest.
    fn act(&mut self, verb: &str) -> Result<String>;

    /// After the job: whatever should still run does, and stops cleanly when asked.
    fn finish(&mut self) -> Result<()>;
}

/// No server: for jobs that prove the harness only.
#[derive(Debug)]
pub(crate) struct Nothing;

impl Peer for Nothing {
    fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: STORAGE_IP.to_owned(),
            port: 4420,
            nqn: "nqn.none".to_owned(),
            unit: Unit::default(),
        }
    }

    fn act(&mut self, verb: &str) -> Result<String> {
        match verb {
            "ping" => Ok("pong".to_owned()),
            _ => bail!("there is no server to {verb}"),
        }
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

const NVMET: &str = include_str!("../guest/nvmet.sh");
const STEP: Duration = Duration::from_secs(60);

/// The kernel's own target in a second guest. A job that fails against it is wrong about Linux, not
/// about Cairn. It has no replicas, so what is asked of one is only acknowledged.
#[derive(Debug)]
pub(crate) struct Nvmet {
    guest: Guest,
    endpoint: Endpoint,
}

impl Nvmet {
    pub(crate) fn start(image: &Image, net: &Net, logs: &Path) -> Result<Self> {
        let endpoint = Endpoint {
            address: NVMET_IP.to_owned(),
            port: 4420,
            nqn: "nqn.2026-01.test:kernel".to_owned(),
            unit: Unit::default(),
        };
        let env = vec![("NQN", endpoint.nqn.clone()), ("PORT", endpoint.port.to_string())];
        let boot = Boot {
            name: "nvmet",
            tap: "tap1",
            ip: NVMET_IP,
            memory_mib: 1280,
            script: NVMET,
            env,
            root: None,
        };
        let guest = Guest::boot(image, net, logs, &boot)?;
        guest.expect("SERVING", STEP * 2)?;
        Ok(Self { guest, endpoint })
    }

    fn ask(&mut self, verb: &str) -> Result<String> {
        self.guest.send(verb)?;
        self.guest.expect(&format!("DONE {verb}"), STEP)
    }
}

impl Peer for Nvmet {
    fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    fn act(&mut self, verb: &str) -> Result<String> {
        match verb {
            "kill-nexus" => self.ask("stop"),
            "start-nexus" => self.ask("start"),
            "kill-replica" | "expect-degraded" => Ok("nothing to do".to_owned()),
            _ => bail!("the kernel target knows no {verb}"),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.guest.send("quit")?;
        self.guest.expect("GUEST-DONE rc=0", STEP).map(drop)
    }
}
