//! A network of its own: the hosts and a bridge in a namespace without a name, which this process enters, and a
//! namespace for each node. Nothing of the machine's network is touched.
//!
//! ```text
//! hosts (this process) -- bridge 10.98.0.100 --+-- veth -- node 1, 10.98.0.1
//!                                              +-- veth -- node 2, 10.98.0.2
//!                                              +-- veth -- node 3, 10.98.0.3
//! ```

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};

use crate::plan::{Cut, NODES};

const PREFIX: &str = "cairn-nemesis-";
const HOSTS: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 100);
const PORT: u16 = 4420;

/// The namespaces of the nodes; gone when dropped.
#[derive(Debug)]
pub(crate) struct Net {
    pid: u32,
}

/// Runs a command, and tells what it said where it failed.
pub(crate) fn run(line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command")?;
    let out = Command::new(program).args(words).output();
    let out = out.with_context(|| format!("`{line}` cannot be run: is {program} installed?"))?;
    if !out.status.success() {
        bail!("`{line}` failed: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

pub(crate) fn ip(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 98, 0, u8::try_from(node + 1).expect("a few nodes"))
}

pub(crate) fn address(node: usize) -> SocketAddr {
    (ip(node), PORT).into()
}

/// Why there can be no nemesis here; nothing where there can.
pub(crate) fn lacks() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root, for network namespaces".to_owned());
    }
    for program in ["ip", "nft", "setpriv"] {
        let found = Command::new(program).arg("-V").stdout(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            return Some(format!("needs `{program}` (apt install iproute2 nftables util-linux)"));
        }
    }
    let probe = format!("{PREFIX}probe-{}", std::process::id());
    let made = run(&format!("ip netns add {probe}"))
        .and_then(|()| run(&format!("ip netns exec {probe} nft list tables")));
    // It may not be there.
    let _gone = run(&format!("ip netns del {probe}"));
    made.err().map(|error| format!("network namespaces are not allowed here: {error:#}"))
}

impl Net {
    /// Builds it. The calling thread, and those that it starts from then on, are where the hosts are.
    pub(crate) fn up() -> Result<Self> {
        sweep();
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for the hosts")?;
        let net = Self { pid: std::process::id() };
        net.build().context("building the network")?;
        Ok(net)
    }

    fn build(&self) -> Result<()> {
        run("ip link set lo up")?;
        run("ip link add br0 type bridge")?;
        run(&format!("ip addr add {HOSTS}/24 dev br0"))?;
        run("ip link set br0 up")?;
        for node in 0..NODES {
            let name = self.name(node);
            run(&format!("ip netns add {name}"))?;
            run(&format!("ip link add v{node} type veth peer name eth0 netns {name}"))?;
            run(&format!("ip link set v{node} master br0 up"))?;
            run(&format!("ip -n {name} link set lo up"))?;
            run(&format!("ip -n {name} addr add {}/24 dev eth0", ip(node)))?;
            run(&format!("ip -n {name} link set eth0 up"))?;
        }
        Ok(())
    }

    pub(crate) fn name(&self, node: usize) -> String {
        format!("{PREFIX}{}-n{}", self.pid, node + 1)
    }

    /// Drops packets at a node; the cut that was there before ends.
    pub(crate) fn cut(&self, node: usize, cut: Option<Cut>) -> Result<()> {
        let peers = (0..NODES).filter(|n| *n != node).map(|n| ip(n).to_string());
        let peers = peers.collect::<Vec<_>>().join(", ");
        let (input, output) = match cut {
            None => (String::new(), String::new()),
            Some(Cut::Node) => ("iif eth0 drop".to_owned(), "oif eth0 drop".to_owned()),
            Some(Cut::Peers) => {
                (format!("ip saddr {{ {peers} }} drop"), format!("ip daddr {{ {peers} }} drop"))
            }
            Some(Cut::Hosts) => {
                (format!("ip saddr {HOSTS} drop"), format!("ip daddr {HOSTS} drop"))
            }
            Some(Cut::Deaf) => ("iif eth0 drop".to_owned(), String::new()),
            Some(Cut::Mute) => (String::new(), "oif eth0 drop".to_owned()),
            Some(Cut::Lossy(percent)) => {
                let lose = format!("numgen random mod 100 < {percent} drop");
                (format!("iif eth0 {lose}"), format!("oif eth0 {lose}"))
            }
        };
        let rules = format!(
            "table inet nemesis {{}}\ndelete table inet nemesis\ntable inet nemesis {{\n\
             chain in {{ type filter hook input priority 0; {input}\n}}\n\
             chain out {{ type filter hook output priority 0; {output}\n}}\n}}\n"
        );
        let mut nft = Command::new("ip")
            .args(["netns", "exec", &self.name(node), "nft", "-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        nft.stdin.take().context("no pipe to nft")?.write_all(rules.as_bytes())?;
        let out = nft.wait_with_output()?;
        if !out.status.success() {
            bail!("nft refused {rules}: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for node in 0..NODES {
            // The bridge and its ports go with the process.
            let _gone = run(&format!("ip netns del {}", self.name(node)));
        }
    }
}

/// Takes away what runs left behind that were killed.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').find(|p| !p.is_empty() && *p != "probe"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _gone = run(&format!("ip netns del {name}"));
        }
    }
}
