//! Cairn processes on the host: three replicas and a nexus, or three that are both. The one place that
//! knows the configuration file and the command line of `cairn`.

mod faults;
mod iscsi;
mod rolling;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::host::{output, run, tail, wait_for};
use crate::net::{Net, STORAGE_IP};
use crate::peer::{Endpoint, Peer, Unit};

const NEXUS: &str = "nexus";
const NEXUS_PORT: u16 = 4420;
/// Each replica process by name, with its port.
const REPLICAS: [(&str, u16); 3] = [("r1", 4421), ("r2", 4422), ("r3", 4423)];
/// The one that `HOST-DO kill-replica` kills.
const VICTIM: &str = "r2";
/// The one that stands by for the volume, where it is shared: the one after the nexus by its port.
const STANDBY: &str = "r1";
const VOLUME: &str = "guest";
const VOLUME_SIZE: &str = "1GiB";
const POOL_SIZE: &str = "2GiB";
/// Less than is written.
const SMALL_POOL_SIZE: &str = "192MiB";

const START: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(15);
const STATE: Duration = Duration::from_secs(30);

/// Which processes there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Three with a replica each, and one that serves the volume.
    Apart,
    /// Three with a replica each, every one of which can serve the volume.
    Together,
    /// Likewise, by a program whose disks can be made to fail. The last one's pool is small.
    Faulty,
}

/// A volume with three replicas, each process in its own state directory.
#[derive(Debug)]
pub(crate) struct Cluster<'a> {
    net: &'a Net,
    cairn: PathBuf,
    /// State and pools.
    dir: PathBuf,
    /// Sockets: their paths may have no more than 107 bytes, which `dir` may exceed.
    sockets: PathBuf,
    logs: PathBuf,
    running: BTreeMap<&'static str, Child>,
    layout: Layout,
    /// Which process serves the volume.
    active: &'static str,
    /// Processes that run a newer program: the same one, from somewhere else.
    newer: BTreeSet<&'static str>,
    /// All others stand by for the volume.
    shared: bool,
    nqn: String,
}

impl<'a> Cluster<'a> {
    pub(crate) fn start(
        net: &'a Net,
        cairn: &Path,
        dir: &Path,
        logs: &Path,
        encrypted: bool,
        layout: Layout,
    ) -> Result<Self> {
        if !cairn.exists() {
            let how = match layout {
                Layout::Faulty => "cargo xtask guest builds it",
                Layout::Apart | Layout::Together => "cargo build --release -p cairn",
            };
            bail!("there is no {}: {how}", cairn.display());
        }
        let sockets = std::env::temp_dir().join(format!("cairn-guest-{}", std::process::id()));
        fs::create_dir_all(&sockets)?;
        let mut cluster = Self {
            net,
            cairn: cairn.canonicalize()?,
            dir: dir.to_owned(),
            sockets,
            logs: logs.to_owned(),
            running: BTreeMap::new(),
            layout,
            active: match layout {
                Layout::Apart => NEXUS,
                Layout::Together | Layout::Faulty => REPLICAS[0].0,
            },
            newer: BTreeSet::new(),
            shared: false,
            nqn: String::new(),
        };
        for (name, port) in REPLICAS {
            cluster.configure(name, port, true)?;
            if layout == Layout::Faulty {
                cluster.new_machine(name)?;
            }
            cluster.launch(name)?;
        }
        if layout == Layout::Apart {
            cluster.configure(NEXUS, NEXUS_PORT, false)?;
            cluster.launch(NEXUS)?;
        }
        cluster.create_volume(encrypted)?;
        Ok(cluster)
    }

    fn configure(&self, name: &str, port: u16, pool: bool) -> Result<()> {
        let state = self.dir.join(name);
        fs::create_dir_all(&state)?;
        let (state, socket) = (state.display(), self.socket(name));
        let mut text = format!(
            "name = \"{name}\"\nstate_dir = \"{state}\"\n\
             [api]\nsocket = \"{}\"\n\
             [nvmf]\nlisten = [\"{STORAGE_IP}:{port}\"]\n\
             [iscsi]\nlisten = [\"{STORAGE_IP}:{}\"]\nportal_group = {}\n",
            socket.display(),
            iscsi::port(port),
            iscsi::group(port),
        );
        // Every connection is one that the shard which listens has handed over.
        let shards = self.layout == Layout::Together;
        if shards {
            text.push_str("[engine]\nshards = 2\n");
        }
        if pool {
            let small = self.layout == Layout::Faulty && name == REPLICAS[2].0;
            let size = if small { SMALL_POOL_SIZE } else { POOL_SIZE };
            text.push_str(&format!(
                "[[pool]]\nname = \"p1\"\npath = \"{state}/pool.img\"\nsize = \"{size}\"\n\
                 create = true\n"
            ));
            if shards {
                text.push_str("shard = 1\n");
            }
        }
        fs::write(self.config(name), text)?;
        Ok(())
    }

    fn config(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.toml"))
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(format!("{name}.sock"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Starts the process and waits until its API answers.
    fn launch(&mut self, name: &'static str) -> Result<()> {
        let socket = self.socket(name);
        let _ = fs::remove_file(&socket);
        let log = File::options().create(true).append(true).open(self.log(name))?;
        let newer = self.newer_program();
        let program = if self.newer.contains(name) { &newer } else { &self.cairn };
        let mut serve = self.net.in_storage(program, group_of(name));
        serve.env(faults::VARIABLE, self.control(name));
        serve.arg("serve").arg("--config").arg(self.config(name));
        serve.stdout(log.try_clone()?).stderr(log);
        let mut child = serve.spawn().context("could not start cairn")?;
        let ready = wait_for(&format!("API of {name}"), START, || {
            if let Some(status) = child.try_wait()? {
                bail!("{name} ended at start ({status})");
            }
            Ok(UnixStream::connect(&socket).ok())
        });
        self.running.insert(name, child);
        ready.map(drop).map_err(|e| anyhow!("{e:#}; {}", self.said(name)))
    }

    fn said(&self, name: &str) -> String {
        format!("{name}'s log ends:\n{}", tail(&self.log(name), 10))
    }

    fn create_volume(&mut self, encrypted: bool) -> Result<()> {
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let uuid = uuid.trim();
        let mut uris = Vec::new();
        for (name, _) in REPLICAS {
            let made = self.call(
                name,
                &["replica", "create", "--pool", "p1", "--volume", uuid, "--size", VOLUME_SIZE],
            )?;
            uris.push(match (name == self.active, text(&made, "uri")?) {
                (true, _) => format!("local:p1/{}", text(&made, "id")?),
                (false, uri) => uri,
            });
        }
        let mut create = vec!["volume", "create", VOLUME, "--size", VOLUME_SIZE];
        for uri in &uris {
            create.extend(["--replica", uri]);
        }
        if encrypted {
            create.extend(["--encrypt", "--key-command", "printf %064d 7"]);
        }
        let made = self.call(self.active, &create)?;
        self.nqn = text(&made, "nqn")?;
        self.await_state("online").map(drop)
    }

    /// One `cairn` command against a process's API; its JSON.
    /// A call that says nothing where it succeeds.
    fn tell(&self, name: &str, args: &[&str]) -> Result<String> {
        let mut c = Command::new("timeout");
        c.arg("30").arg(&self.cairn).arg("--socket").arg(self.socket(name));
        output(c.args(args).args(["--output", "json"]))
    }

    fn call(&self, name: &str, args: &[&str]) -> Result<Value> {
        let said = self.tell(name, args)?;
        serde_json::from_str(&said).with_context(|| format!("not JSON: {said}"))
    }

    /// One of the others stands by for the volume, and takes over by itself.
    fn share(&self) -> Result<String> {
        let from = self.socket(NEXUS).display().to_string();
        let args = ["volume", "standby", VOLUME, "--from", &from];
        let auto = ["--auto", "--auto-after-ms", "1000"];
        Ok(self.call(STANDBY, &[&args[..], &auto].concat())?.to_string())
    }

    fn move_volume(&self, from: &str, to: &str) -> Result<String> {
        let to = self.socket(to).display().to_string();
        Ok(self.call(from, &["volume", "takeover", VOLUME, "--to", &to])?.to_string())
    }

    fn await_state(&self, wanted: &str) -> Result<String> {
        let mut last = String::new();
        let waited = wait_for(&format!("volume state '{wanted}'"), STATE, || {
            let status = self.call(self.active, &["volume", "status", VOLUME])?;
            last = status.to_string();
            Ok((text(&status, "state")? == wanted).then_some(()))
        });
        waited.with_context(|| format!("last status: {last}"))?;
        Ok(last)
    }

    /// SIGKILL, as a power cut or the kernel's out-of-memory killer would.
    fn kill(&mut self, name: &'static str) -> Result<()> {
        let mut child =
            self.running.remove(name).with_context(|| format!("{name} is not running"))?;
        if let Some(status) = child.try_wait()? {
            bail!("{name} had ended by itself ({status}); {}", self.said(name));
        }
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGTERM, then a clean exit within [`STOP`].
    fn stop(&mut self, name: &'static str) -> Result<()> {
        let Some(mut child) = self.running.remove(name) else { return Ok(()) };
        if let Some(status) = child.try_wait()? {
            bail!("{name} ended by itself ({status}); {}", self.said(name));
        }
        run(&format!("kill -TERM {}", child.id()))?;
        let ended =
            wait_for(&format!("end of {name} after SIGTERM"), STOP, || Ok(child.try_wait()?));
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let status = ended.map_err(|e| anyhow!("{e:#}; {}", self.said(name)))?;
        if !status.success() {
            bail!("{name} answered SIGTERM with {status}; {}", self.said(name));
        }
        Ok(())
    }
}

impl Peer for Cluster<'_> {
    fn endpoint(&self) -> Endpoint {
        let port = match self.layout {
            Layout::Apart => NEXUS_PORT,
            Layout::Together | Layout::Faulty => REPLICAS[0].1,
        };
        let unit = Unit {
            address: STORAGE_IP.to_owned(),
            port: iscsi::port(port),
            iqn: iscsi::IQN.to_owned(),
        };
        Endpoint { address: STORAGE_IP.to_owned(), port, nqn: self.nqn.clone(), unit }
    }

    fn act(&mut self, verb: &str) -> Result<String> {
        if let Some(done) = self.act_iscsi(verb) {
            return done;
        }
        if self.layout != Layout::Apart {
            return self.act_together(verb);
        }
        match verb {
            "kill-replica" => self.kill(VICTIM).map(|()| format!("killed {VICTIM}")),
            "expect-degraded" => self.await_state("degraded"),
            "kill-nexus" => self.kill(NEXUS).map(|()| "killed the nexus".to_owned()),
            "start-nexus" => self.launch(NEXUS).map(|()| "the nexus runs".to_owned()),
            "share" => self.share(),
            "hand-over" => self.move_volume(NEXUS, STANDBY),
            "hand-back" => self.move_volume(STANDBY, NEXUS),
            "expect-standby" => self.await_state("standby"),
            _ if verb.starts_with("grow ") => {
                let size = &verb["grow ".len()..];
                let grown = self.call(NEXUS, &["volume", "resize", VOLUME, "--size", size])?;
                Ok(grown.to_string())
            }
            _ if verb.starts_with("snapshot ") => {
                let name = &verb["snapshot ".len()..];
                let taken = self.call(NEXUS, &["snapshot", "create", VOLUME, "--name", name])?;
                Ok(taken.to_string())
            }
            _ if verb.starts_with("clone ") => {
                let name = &verb["clone ".len()..];
                let copy = format!("{VOLUME}-copy");
                Ok(self.call(NEXUS, &["snapshot", "clone", VOLUME, name, &copy])?.to_string())
            }
            "drop-clone" => {
                let copy = format!("{VOLUME}-copy");
                self.tell(NEXUS, &["volume", "delete", &copy])?;
                Ok("stopped the clone".to_owned())
            }
            _ if verb.starts_with("restore ") => {
                let name = &verb["restore ".len()..];
                let args = ["snapshot", "restore", VOLUME, name, "--yes"];
                Ok(self.call(NEXUS, &args)?.to_string())
            }
            _ if verb.starts_with("drop-snapshot ") => {
                let name = &verb["drop-snapshot ".len()..];
                self.tell(NEXUS, &["snapshot", "delete", VOLUME, name])?;
                Ok("deleted the snapshot".to_owned())
            }
            _ => bail!("the cluster knows no {verb}"),
        }
    }

    fn finish(&mut self) -> Result<()> {
        let mut wrong = Vec::new();
        // The one that serves first.
        let others = REPLICAS.map(|(name, _)| name).into_iter().filter(|name| *name != self.active);
        let names: Vec<_> = std::iter::once(self.active).chain(others).collect();
        for name in names {
            if let Err(e) = self.stop(name) {
                wrong.push(format!("{e:#}"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { bail!("{}", wrong.join("; ")) }
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.sockets);
        // The pools are large and of no use once the job is over.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The group that a process runs in, by which its packets are told from others': its port.
fn group_of(name: &str) -> u16 {
    REPLICAS.iter().find(|(known, _)| *known == name).map_or(NEXUS_PORT, |(_, port)| *port)
}

fn text(value: &Value, key: &str) -> Result<String> {
    let found = value.get(key).and_then(Value::as_str).map(str::to_owned);
    found.with_context(|| format!("cairn's answer has no \"{key}\": {value}"))
}
