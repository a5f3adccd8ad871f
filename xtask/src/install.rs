//! Installs the Debian packages that a suite's programs come from.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{self, installed, is_root};

/// Packages of which all have to be there in one version, where the last is needed.
const QEMU: [&str; 3] = ["qemu-system-x86", "qemu-utils", "qemu-block-extra"];

/// What the guest suite runs on this machine, with the package that holds it.
pub(crate) const GUEST: &[(&str, &str)] = &[
    ("qemu-system-x86_64", QEMU[0]),
    ("qemu-img", QEMU[1]),
    // QEMU's initiator. It is loaded by the other two, which take only that of their own version.
    ("/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so", QEMU[2]),
    ("ip", "iproute2"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("setpriv", "util-linux"),
    ("kill", "procps"),
    ("nft", "nftables"),
    ("mkfs.ext4", "e2fsprogs"),
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
    let missing = programs.iter().filter(|(program, _)| !installed(program));
    let mut packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    let qemu = programs.iter().any(|(_, package)| *package == QEMU[2]);
    if qemu && mixed(&versions()) {
        packages.retain(|package| !QEMU.contains(package));
        packages.extend(QEMU);
    }
    if packages.is_empty() {
        return Ok(None);
    }
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
    let version = if packages.contains(&QEMU[2]) { candidate(QEMU[2])? } else { String::new() };
    let named: Vec<String> = packages.iter().map(|package| of_version(package, &version)).collect();
    if !version.is_empty() {
        install.push("--allow-downgrades");
    }
    install.extend(named.iter().map(String::as_str));
    apt(log, &install)?;
    Ok(None)
}

/// The package as apt is told of it: those of QEMU in this version.
fn of_version(package: &str, version: &str) -> String {
    match QEMU.contains(&package) && !version.is_empty() {
        true => format!("{package}={version}"),
        false => package.to_owned(),
    }
}

/// The versions of QEMU's packages that are installed, a line each; nothing where they are no packages of Debian.
fn versions() -> String {
    let mut ask = Command::new("dpkg-query");
    let told = ask.args(["-W", "-f", "${Version}\n"]).args(QEMU).output();
    told.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
}

/// Whether there are some, and not all in one version. A package that is known and not installed has none.
fn mixed(versions: &str) -> bool {
    let mut found: Vec<&str> = versions.lines().collect();
    let all = found.len() == QEMU.len();
    found.dedup();
    !found.is_empty() && (found.len() > 1 || !all)
}

/// The version that apt would install.
fn candidate(package: &str) -> Result<String> {
    let out = Command::new("apt-cache").args(["policy", package]).output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    match line {
        Some(version) if version != "(none)" => Ok(version.to_owned()),
        _ => bail!("apt knows no {package}"),
    }
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

#[cfg(test)]
mod tests {
    use super::{mixed, of_version};

    /// A machine came with qemu-img of another release than the packages that were installed beside it: it could not
    /// load their initiator, and there was nothing to say why.
    #[test]
    fn packages_of_qemu_are_wanted_in_one_version() {
        assert!(!mixed("1:7.2\n1:7.2\n1:7.2\n"));
        assert!(mixed("1:7.2\n1:10.0\n1:7.2\n"));
        assert!(mixed("1:10.0\n"));
        assert!(mixed("1:7.2\n\n1:7.2\n"));
        assert!(!mixed(""));
        assert_eq!(of_version("qemu-utils", "1:7.2"), "qemu-utils=1:7.2");
        assert_eq!(of_version("zstd", "1:7.2"), "zstd");
        assert_eq!(of_version("qemu-utils", ""), "qemu-utils");
    }
}
