//! Installs the Debian packages that a suite's programs come from.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{self, installed, is_root};

/// What the guest suite runs on this machine, with the package that holds it.
pub(crate) const GUEST: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("ip", "iproute2"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("setpriv", "util-linux"),
    ("kill", "procps"),
];

/// What the nemesis runs.
pub(crate) const NEMESIS: &[(&str, &str)] =
    &[("ip", "iproute2"), ("nft", "nftables"), ("setpriv", "util-linux")];

/// What the gate counts with.
pub(crate) const GATE: &[(&str, &str)] = &[("valgrind", "valgrind")];

/// What tries the iSCSI target.
pub(crate) const ISCSI: &[(&str, &str)] = &[("iscsi-test-cu", "libiscsi-bin")];

const LIMIT: Duration = Duration::from_secs(600);

/// Makes the programs available; the reason if they cannot be, for the suite to be skipped by.
pub(crate) fn provide(programs: &[(&str, &str)], log: &Path) -> Result<Option<String>> {
    let missing: Vec<_> = programs.iter().filter(|(program, _)| !installed(program)).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if !installed("apt-get") {
        return Ok(Some(format!("needs {}, and this is not Debian", packages.join(", "))));
    }
    if !is_root() {
        return Ok(Some(format!("needs {}; install them or run as root", packages.join(", "))));
    }
    print!("installing {} ... ", packages.join(", "));
    std::io::stdout().flush()?;
    apt(log, &["update", "-q"])?;
    let mut install = vec!["install", "-y", "-q", "--no-install-recommends"];
    install.extend(&packages);
    apt(log, &install)?;
    Ok(None)
}

fn apt(log: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
    // Another apt may hold the lock for a while on a fresh machine.
    command.args(["-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3"]);
    if !process::run(&mut command, log, LIMIT)?.success() {
        bail!("apt-get {} failed", args.join(" "));
    }
    Ok(())
}
