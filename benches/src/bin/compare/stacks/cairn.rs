//! Cairn itself, with replicas in memory and in files; `cairn bench` is the client.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Group, Place, Running, Stack};
use crate::load::{Load, Measured};
use crate::procs::{pinned, run_json};

const fn stack(
    name: &'static str,
    title: &'static str,
    group: Group,
    start: super::Start,
) -> Stack {
    Stack { name, title, group, programs: &[("taskset", "util-linux")], start }
}

pub(crate) const REPLICA: Stack =
    stack("replica", "cairn: a replica without a nexus", Group::Memory, |place| {
        let node = Node::start(place, "node", &["mem".to_owned()], true)?;
        let uri = node.replica("p0", place.size)?;
        Cairn::new(place, vec![node], uri, true)
    });

pub(crate) const VOLUME: Stack =
    stack("volume", "cairn: a volume of 1 replica", Group::Memory, |place| local(place, 1));

pub(crate) const LOCAL: Stack =
    stack("local", "cairn: a volume of 3, in one process", Group::Memory, |place| local(place, 3));

pub(crate) const OVER_TCP: Stack =
    stack("over-tcp", "cairn: a volume of 3, one process, over TCP", Group::Memory, |place| {
        let pools = vec!["mem".to_owned(); 3];
        let node = Node::start(place, "node", &pools, true)?;
        let mut uris = Vec::new();
        for i in 0..3 {
            uris.push(node.replica(&format!("p{i}"), place.size)?);
        }
        let uri = node.volume(place.size, &uris)?;
        Cairn::new(place, vec![node], uri, true)
    });

pub(crate) const FILES: Stack =
    stack("files", "cairn: a volume of 3, 3 processes and a nexus", Group::Files, |place| {
        in_files(place, false)
    });

pub(crate) const FILES_BESIDE: Stack = stack(
    "files-beside",
    "cairn: a volume of 3, 3 processes, nexus in one",
    Group::Files,
    |place| in_files(place, true),
);

fn local(place: &Place, replicas: usize) -> Result<Box<dyn Running>> {
    let node = Node::start(place, "node", &vec!["mem".to_owned(); replicas], true)?;
    let uri = node.local_volume("v", replicas, place.size)?;
    Cairn::new(place, vec![node], uri, true)
}

fn in_files(place: &Place, beside: bool) -> Result<Box<dyn Running>> {
    let (mut nodes, mut uris) = (Vec::new(), Vec::new());
    for i in 0..3 {
        let name = format!("r{i}");
        let file = place.dir.join(format!("{name}.pool"));
        let node = Node::start(place, &name, &[file.display().to_string()], false)?;
        uris.push(node.replica("p0", place.size)?);
        nodes.push(node);
    }
    if beside {
        // The URI ends in the replica's id.
        let id = uris[0].rsplit(':').next().context("a URI without an id")?;
        uris[0] = format!("local:p0/{id}");
    } else {
        nodes.insert(0, Node::start(place, "nexus", &[], false)?);
    }
    let uri = nodes[0].volume(place.size, &uris)?;
    Cairn::new(place, nodes, uri, false)
}

/// Of the volume that all replicas are of.
const VOLUME_ID: &str = "5d0a3c52-9c37-4a0e-8a43-6f5b6f3a1c01";

/// A `cairn serve` of its own, ended with this.
#[derive(Debug)]
pub(crate) struct Node {
    process: Child,
    cairn: PathBuf,
    socket: PathBuf,
}

impl Drop for Node {
    fn drop(&mut self) {
        // It holds nothing that is worth a clean stop.
        let _killed = self.process.kill();
        let _waited = self.process.wait();
    }
}

impl Node {
    /// A process with pools `p0`, `p1`, ...: files, or `mem`.
    pub(crate) fn start(place: &Place, name: &str, pools: &[String], pin: bool) -> Result<Self> {
        let dir = std::path::absolute(&place.dir)?;
        let state = dir.join(name);
        // Extents and what tells of them take some more than the volume.
        let room = place.size / (1 << 20) * 5 / 4 + 64;
        let mut config = format!(
            "name = \"{name}\"\nstate_dir = {state:?}\n[nvmf]\nlisten = [\"127.0.0.1:0\"]\n\
             controller_ids = [1, 4000]\n[iscsi]\nlisten = [\"127.0.0.1:0\"]\n"
        );
        if let Some(spin_us) = place.spin_us {
            config += &format!("[engine]\nspin_us = {spin_us}\n");
        }
        for (i, pool) in pools.iter().enumerate() {
            config += &format!("[[pool]]\nname = \"p{i}\"\ncreate = true\n");
            config += &if pool == "mem" {
                format!("path = \"mem:{room}MiB\"\n")
            } else {
                format!("path = {pool:?}\nsize = \"{room}MiB\"\n")
            };
        }
        let file = dir.join(format!("{name}.toml"));
        std::fs::write(&file, config)?;
        let log = std::fs::File::create(place.log(name))?;
        let core = place.cores.filter(|_| pin).map(|(server, _)| server);
        // It ends with this process, whatever happens to that.
        let process = pinned(&place.cairn, core)
            .args(["serve", "--exit-with-stdin", "--config"])
            .arg(&file)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start cairn")?;
        let node = Self { process, cairn: place.cairn.clone(), socket: state.join("api.sock") };
        let begun = Instant::now();
        loop {
            match node.ask(&["pool", "list"]) {
                Ok(_) => return Ok(node),
                Err(error) if begun.elapsed() > Duration::from_secs(10) => {
                    return Err(error.context(format!("{name} does not answer")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A command to its API.
    pub(crate) fn ask(&self, args: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.cairn);
        run_json(command.arg("--socket").arg(&self.socket).args(["-o", "json"]).args(args))
    }

    /// A new replica; its URI.
    pub(crate) fn replica(&self, pool: &str, size: u64) -> Result<String> {
        let size = size.to_string();
        let made = self
            .ask(&["replica", "create", "--pool", pool, "--volume", VOLUME_ID, "--size", &size])?;
        Ok(made["uri"].as_str().context("a replica without a URI")?.to_owned())
    }

    /// A volume of these replicas; its URI.
    fn volume(&self, size: u64, replicas: &[String]) -> Result<String> {
        let size = size.to_string();
        let mut args = vec!["volume", "create", "v", "--size", &size, "--id", VOLUME_ID];
        for replica in replicas {
            args.extend(["--replica", replica]);
        }
        self.serving("v", &args)
    }

    /// A volume with a replica in each of the first pools; its URI.
    pub(crate) fn local_volume(&self, name: &str, replicas: usize, size: u64) -> Result<String> {
        let size = size.to_string();
        let pools: Vec<String> = (0..replicas).map(|i| format!("p{i}")).collect();
        let mut args = vec!["volume", "create", name, "--size", &size];
        for pool in &pools {
            args.extend(["--pool", pool]);
        }
        self.serving(name, &args)
    }

    /// A volume with a new replica in the first pool of each of these; its URI.
    pub(crate) fn remote_volume(&self, name: &str, replicas: &[Self], size: u64) -> Result<String> {
        let size = size.to_string();
        let (mut id, mut uris) = (String::new(), Vec::new());
        for node in replicas {
            let mut args = vec!["replica", "create", "--pool", "p0", "--size", &size];
            if !id.is_empty() {
                args.extend(["--volume", &id]);
            }
            let made = node.ask(&args)?;
            made["volume_id"].as_str().context("a replica of no volume")?.clone_into(&mut id);
            uris.push(made["uri"].as_str().context("a replica without a URI")?.to_owned());
        }
        let mut args = vec!["volume", "create", name, "--size", &size, "--id", &id];
        for uri in &uris {
            args.extend(["--replica", uri]);
        }
        self.serving(name, &args)
    }

    fn serving(&self, name: &str, create: &[&str]) -> Result<String> {
        self.ask(create)?;
        let begun = Instant::now();
        loop {
            let volume = self.ask(&["volume", "status", name])?;
            if volume["serving"] == true {
                let nqn = volume["nqn"].as_str().context("a volume without an NQN")?;
                let address = volume["addresses"][0].as_str().context("it is exported nowhere")?;
                return Ok(format!("nvme+tcp://{address}/{nqn}"));
            }
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(20),
                "the volume is not served: {volume}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

struct Cairn {
    place: Place,
    nodes: Vec<Node>,
    uri: String,
    /// Server and client have a core each.
    pin: bool,
    runs: u64,
}

impl Cairn {
    #[expect(clippy::new_ret_no_self, reason = "what every stack starts as")]
    fn new(place: &Place, nodes: Vec<Node>, uri: String, pin: bool) -> Result<Box<dyn Running>> {
        let cairn = Self { place: place.clone(), nodes, uri, pin, runs: 0 };
        run_json(cairn.bench().args(["--rw", "write", "--bs", "1m", "--qd", "8", "--fill"]))?;
        Ok(Box::new(cairn))
    }

    fn bench(&self) -> Command {
        let core = self.place.cores.filter(|_| self.pin).map(|(_, client)| client);
        let mut command = pinned(&self.place.cairn, core);
        command.args(["bench", &self.uri, "--json", "--ramp", "0"]);
        let spin_us = if self.pin { self.place.client_spin_us } else { 0 };
        command.args(["--spin-us", &spin_us.to_string()]);
        command
    }
}

impl Running for Cairn {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        let mut bench = self.bench();
        bench.args(["--rw", load.rw(), "--bs", &load.bs.to_string(), "--qd", &load.qd.to_string()]);
        bench.args(["--time", &seconds.to_string()]);
        // Other blocks in every run.
        self.runs += 1;
        bench.args(["--seed", &self.runs.to_string()]);
        if load.durable {
            bench.arg("--fsync");
        }
        let said = run_json(&mut bench)?;
        Ok(measured(&said[if load.write { "write" } else { "read" }]))
    }

    fn servers(&self) -> Vec<u32> {
        self.nodes.iter().map(Node::pid).collect()
    }

    fn silent(&self, seconds: u64) -> Option<Command> {
        let mut bench = self.bench();
        bench.args(["--qd", "1", "--rate", "1", "--time", &seconds.to_string()]);
        Some(bench)
    }
}

/// One direction as `cairn bench --json` tells of it.
pub(crate) fn measured(side: &Value) -> Measured {
    let latency = |name: &str| side["latency_us"][name].as_f64();
    Measured {
        iops: side["iops"].as_f64().unwrap_or(0.0),
        mib_s: side["mib_per_s"].as_f64().unwrap_or(0.0),
        mean_us: latency("mean").unwrap_or(0.0),
        p99_us: latency("p99"),
        p999_us: latency("p99.9"),
        cpu_s_per_100k: None,
    }
}
