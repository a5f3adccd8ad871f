//! The processes: `cairn serve`, each in its namespace, with a control file that says what is wrong with it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{self, Net};
use crate::plan::{Life, NODES, Shape};
use crate::shared::Shared;

/// The pool of each node.
pub(crate) const POOL: &str = "pool";
/// What the pool's file has room for.
const POOL_SIZE: &str = "48MiB";

/// A node.
#[derive(Debug)]
struct Node {
    child: Option<Child>,
    /// Starts so far.
    starts: u64,
    life: Life,
    /// The boot of its machine, as it is to believe.
    boot: u128,
    /// What is wrong with it now, as its control file says it.
    trouble: BTreeMap<&'static str, String>,
}

/// All nodes. Dropped, they are killed.
#[derive(Debug)]
pub(crate) struct Nodes {
    cairn: PathBuf,
    dir: PathBuf,
    net: Net,
    seed: u64,
    tears: bool,
    mutant: Option<String>,
    shared: Arc<Shared>,
    nodes: Vec<Node>,
}

pub(crate) fn socket(dir: &Path, node: usize) -> PathBuf {
    dir.join(format!("n{}", node + 1)).join("api.sock")
}

impl Nodes {
    /// Writes the configurations. Nothing is started.
    pub(crate) fn new(
        cairn: &Path,
        dir: &Path,
        net: Net,
        (seed, shape): (u64, &Shape),
        mutant: Option<String>,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        for node in 0..NODES {
            write_config(dir, node, shape)?;
        }
        let fresh = |node| Node {
            child: None,
            starts: 0,
            life: Life::drawn(seed, node, 0),
            boot: uuid::Uuid::new_v4().as_u128(),
            trouble: BTreeMap::new(),
        };
        Ok(Self {
            cairn: cairn.to_owned(),
            dir: dir.to_owned(),
            net,
            seed,
            tears: shape.tears,
            mutant,
            shared,
            nodes: (0..NODES).map(fresh).collect(),
        })
    }

    pub(crate) fn net(&self) -> &Net {
        &self.net
    }

    /// Says what is wrong with a node from now on; without a value nothing of that kind.
    pub(crate) fn trouble(
        &mut self,
        node: usize,
        key: &'static str,
        value: Option<String>,
    ) -> Result<()> {
        match value {
            Some(value) => self.nodes[node].trouble.insert(key, value),
            None => self.nodes[node].trouble.remove(key),
        };
        self.write_control(node)
    }

    /// From now on what its disk has not flushed dies with the process.
    pub(crate) fn cache(&mut self, node: usize) -> Result<()> {
        self.nodes[node].life.volatile = true;
        self.write_control(node)
    }

    fn control(&self, node: usize) -> PathBuf {
        self.dir.join(format!("n{}", node + 1)).join("control")
    }

    fn write_control(&self, node: usize) -> Result<()> {
        let Node { life, boot, trouble, .. } = &self.nodes[node];
        let mut text = format!("boot={boot:032x}\nseed={}\n", life.seed);
        writeln!(text, "rate_ppm={}", life.rate_ppm)?;
        if life.volatile {
            writeln!(text, "cache=volatile")?;
        }
        if self.tears {
            writeln!(text, "tears=1")?;
        }
        if let Some(mutant) = &self.mutant {
            writeln!(text, "mutant={mutant}")?;
        }
        for (key, value) in trouble {
            writeln!(text, "{key}={value}")?;
        }
        // Never seen half-written.
        let path = self.control(node);
        let new = path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(&new, &path).context("writing a control file")
    }

    /// Starts a process, where none runs.
    pub(crate) fn start(&mut self, node: usize) -> Result<()> {
        if self.nodes[node].child.is_some() {
            return Ok(());
        }
        let life = Life::drawn(self.seed, node, self.nodes[node].starts);
        self.nodes[node].life = life;
        self.nodes[node].starts += 1;
        self.write_control(node)?;
        let log = self.dir.join(format!("n{}.log", node + 1));
        let log = File::options().append(true).create(true).open(log)?;
        let child = Command::new("ip")
            .args(["netns", "exec", &self.net.name(node), "setpriv", "--pdeathsig", "KILL"])
            .arg(&self.cairn)
            .args(["serve", "--config"])
            .arg(self.dir.join(format!("n{}.toml", node + 1)))
            .env("CAIRN_NEMESIS", self.control(node))
            .env("RUST_LOG", "info")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting a process")?;
        let what = format!("n{} pid {} {life:?}", node + 1, child.id());
        self.nodes[node].child = Some(child);
        self.shared.began(node);
        self.shared.trace.say("start", &what);
        Ok(())
    }

    /// SIGKILL to these that run. Returns those, and of them the ones whose disks had a volatile cache.
    pub(crate) fn kill(&mut self, nodes: &[usize]) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut killed = Vec::new();
        for &node in nodes {
            if let Some(child) = &mut self.nodes[node].child {
                child.kill().context("killing a process")?;
                killed.push(node);
            }
        }
        let mut volatile = Vec::new();
        for &node in &killed {
            let this = &mut self.nodes[node];
            if let Some(mut child) = this.child.take() {
                child.wait()?;
            }
            self.shared.ended(node);
            if this.life.volatile {
                volatile.push(node);
                this.boot = uuid::Uuid::new_v4().as_u128();
            }
        }
        Ok((killed, volatile))
    }

    pub(crate) fn signal(&self, node: usize, signal: Signal) -> Result<()> {
        let Some(child) = &self.nodes[node].child else { return Ok(()) };
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        kill(pid, signal).context("a signal to a process")
    }

    /// A process that ended though nobody killed it.
    pub(crate) fn ended(&mut self) -> Result<Option<String>> {
        for (node, this) in self.nodes.iter_mut().enumerate() {
            let Some(child) = &mut this.child else { continue };
            if let Some(status) = child.try_wait()? {
                this.child = None;
                self.shared.ended(node);
                let how = match (status.code(), status.signal()) {
                    (_, Some(signal)) => format!("by signal {signal}"),
                    (code, None) => format!("with {code:?}"),
                };
                return Ok(Some(format!("n{} ended by itself, {how}", node + 1)));
            }
        }
        Ok(None)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(child) = &mut node.child {
                // It may have ended already.
                let _killed = child.kill();
                let _waited = child.wait();
            }
        }
    }
}

fn write_config(dir: &Path, node: usize, shape: &Shape) -> Result<()> {
    let name = format!("n{}", node + 1);
    let state = dir.join(&name);
    std::fs::create_dir_all(&state)?;
    let text = format!(
        "name = \"{name}\"\nstate_dir = {state:?}\n\
         [nvmf]\nlisten = [\"{address}\"]\ncontroller_ids = [{first}, {last}]\n\
         [engine]\nbuffers = \"16MiB\"\n\
         [nexus]\nlease_ms = {lease}\nsettle_ms = {settle}\nchild_deadline_ms = {deadline}\n\
         child_deadline_min_ms = 500\nassembly_wait_ms = 500\n\
         [[pool]]\nname = \"{POOL}\"\npath = {pool:?}\nsize = \"{POOL_SIZE}\"\ncreate = true\n",
        address = net::address(node),
        first = node * 1000 + 1,
        last = node * 1000 + 900,
        lease = shape.lease_ms,
        settle = shape.settle_ms,
        deadline = shape.child_deadline_ms,
        pool = state.join("pool.img"),
    );
    std::fs::write(dir.join(format!("{name}.toml")), text).context("writing a configuration")
}
