//! Two isolated hosts, as network namespaces. Nothing listens outside them and no address of the
//! machine is touched, so any number of runs live side by side.
//!
//! ```text
//! hosts namespace:   qemu -- tap0 --\
//!                    qemu -- tap1 --+-- br0 10.99.0.2 -- veth --\
//! storage namespace:                                             veth 10.99.0.1 -- cairn processes
//! ```

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::host::{command, output, run};

/// Where the storage processes listen.
pub(crate) const STORAGE_IP: &str = "10.99.0.1";
/// Programs of the hosts' namespace that are initiators by themselves.
const HOSTS_IP: &str = "10.99.0.2";
/// The guest that uses the volume.
pub(crate) const CLIENT_IP: &str = "10.99.0.10";
/// The guest that serves one, when the harness proves itself against the kernel's target.
pub(crate) const NVMET_IP: &str = "10.99.0.11";

const PREFIX: &str = "cairn-guest-";

/// The two namespaces; gone when dropped.
#[derive(Debug)]
pub(crate) struct Net {
    hosts: String,
    storage: String,
}

impl Net {
    pub(crate) fn up() -> Result<Self> {
        sweep();
        let pid = std::process::id();
        let net = Self { hosts: format!("{PREFIX}{pid}-h"), storage: format!("{PREFIX}{pid}-s") };
        net.build().context("could not build the test network (network namespaces and TAP)")?;
        Ok(net)
    }

    fn build(&self) -> Result<()> {
        let (h, s) = (&self.hosts, &self.storage);
        for line in [
            format!("ip netns add {h}"),
            format!("ip netns add {s}"),
            format!("ip link add veth0 netns {h} type veth peer name veth0 netns {s}"),
            format!("ip -n {s} addr add {STORAGE_IP}/24 dev veth0"),
            format!("ip -n {s} link set veth0 up"),
            format!("ip -n {s} link set lo up"),
            format!("ip -n {h} link set lo up"),
            format!("ip -n {h} link add br0 type bridge"),
            format!("ip -n {h} addr add {HOSTS_IP}/24 dev br0"),
            format!("ip -n {h} link set br0 up"),
            format!("ip -n {h} link set veth0 master br0 up"),
        ] {
            run(&line)?;
        }
        for tap in ["tap0", "tap1"] {
            run(&format!("ip -n {h} tuntap add {tap} mode tap"))?;
            run(&format!("ip -n {h} link set {tap} master br0 up"))?;
        }
        Ok(())
    }

    /// A command in the hosts' namespace; the kernel kills it if the harness dies.
    pub(crate) fn in_hosts(&self, program: &Path) -> Command {
        in_namespace(&self.hosts, "", program)
    }

    /// A command in the storage processes' namespace, in a group of its own; the kernel kills it if the harness dies.
    pub(crate) fn in_storage(&self, program: &Path, group: u16) -> Command {
        in_namespace(&self.storage, &format!("--regid {group} --clear-groups"), program)
    }

    /// Drops what these processes send, each known by its group, and what is sent to where each listens, which is the
    /// port of the same number; of all, or of other processes only. The cut that was there before ends.
    pub(crate) fn cut(&self, ports: &[u16], from_hosts_too: bool) -> Result<()> {
        let mut rules = "table inet guest {}\ndelete table inet guest\n".to_owned();
        let to = if from_hosts_too { String::new() } else { format!("ip daddr {STORAGE_IP}") };
        rules.push_str("table inet guest {\nchain out { type filter hook output priority 0;\n");
        for port in ports {
            rules.push_str(&format!("{to} meta skgid {port} drop\n"));
            rules.push_str(&format!(
                "ip daddr {STORAGE_IP} tcp dport {port} meta skgid != {port} drop\n"
            ));
        }
        rules.push_str("}\nchain in { type filter hook input priority 0;\n");
        for port in ports.iter().filter(|_| from_hosts_too) {
            rules.push_str(&format!("tcp dport {port} drop\n"));
        }
        rules.push_str("}\n}\n");
        self.filter(&rules)
    }

    /// Breaks the connections to a port, each once something is sent on it, and lets none be made; or lets all be.
    pub(crate) fn reset(&self, port: Option<u16>) -> Result<()> {
        let mut rules = "table inet resets {}\ndelete table inet resets\n".to_owned();
        if let Some(port) = port {
            rules.push_str("table inet resets {\nchain in { type filter hook input priority 0;\n");
            rules.push_str(&format!("tcp dport {port} reject with tcp reset\n}}\n}}\n"));
        }
        self.filter(&rules)
    }

    fn filter(&self, rules: &str) -> Result<()> {
        let mut nft = command(&format!("ip netns exec {} nft -f -", self.storage));
        let mut nft = nft.stdin(Stdio::piped()).spawn().context("could not start nft")?;
        nft.stdin.take().context("nft has no input")?.write_all(rules.as_bytes())?;
        ensure!(nft.wait()?.success(), "nft refused {rules}");
        Ok(())
    }
}

/// `ip netns exec` and `setpriv` both exec, so the child's process id is the program's own.
fn in_namespace(namespace: &str, options: &str, program: &Path) -> Command {
    let mut c =
        command(&format!("ip netns exec {namespace} setpriv --pdeathsig KILL {options} --"));
    c.arg(program);
    c
}

impl Drop for Net {
    fn drop(&mut self) {
        remove(&self.hosts);
        remove(&self.storage);
    }
}

fn remove(namespace: &str) {
    if let Err(e) = output(&mut command(&format!("ip netns del {namespace}"))) {
        eprintln!("guest: could not remove network namespace {namespace}: {e:#}");
    }
}

/// Removes what a run that was killed outright has left.
fn sweep() {
    for line in run("ip netns list").unwrap_or_default().lines() {
        let Some(name) = line.split_whitespace().next() else { continue };
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if !pid.is_empty() && !Path::new("/proc").join(pid).exists() {
            remove(name);
        }
    }
}
