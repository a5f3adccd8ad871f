//! Gluster, three replicas, reached by its library (gfapi), without the caches of its client: those answer
//! from memory. It listens on fixed ports and writes to fixed folders, so it gets namespaces of its own.

use std::process::Command;

use anyhow::{Context, Result};

use super::{Group, Place, Running, Stack};
use crate::fio::{self, Fio};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, children, run, wait_for};

pub(crate) const STACK: Stack = Stack {
    name: "gluster",
    title: "Gluster, replica 3, gfapi, no client caches",
    group: Group::Files,
    programs: &[
        ("glusterd", "glusterfs-server"),
        ("gluster", "glusterfs-cli"),
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        fio::PROGRAM,
    ],
    start,
};

const ADDRESS: &str = "10.231.87.1";

struct Gluster {
    fio: Fio,
    /// The first process of the namespaces; all others end with it.
    init: Daemon,
}

/// What the first process does.
const INIT: &str = "set -e
ip link set lo up
ip address add ADDRESS/32 dev lo
for dir in /var/log/glusterfs /var/run/gluster /run/gluster /var/lib/glusterd; do
  mkdir -p $dir; mount -t tmpfs none $dir
done
mkdir -p /var/log/glusterfs/bricks
glusterd
echo ready
exec sleep infinity";

fn start(place: &Place) -> Result<Box<dyn Running>> {
    let log = place.log("init");
    let mut command = Command::new("unshare");
    command.args(["-n", "-m", "-p", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]);
    let mut init = Daemon::start(command.arg(INIT.replace("ADDRESS", ADDRESS)), &log)?;
    wait_for("glusterd", 30, || {
        init.check(&log)?;
        Ok(std::fs::read_to_string(&log)?.contains("ready"))
    })?;
    let first = children(init.pid()).into_iter().next().context("the namespaces are empty")?;
    let enter: Vec<String> =
        ["nsenter", "-t", &first.to_string(), "-n", "-m", "-p"].map(str::to_owned).to_vec();
    let gluster = |args: &[&str]| {
        let mut command = Command::new(&enter[0]);
        run(command.args(&enter[1..]).args(["gluster", "--mode=script"]).args(args))
    };
    wait_for("glusterd's answer", 30, || Ok(gluster(&["volume", "list"]).is_ok()))?;
    let mut create = vec!["volume".to_owned(), "create".to_owned(), "v".to_owned()];
    create.extend(["replica".to_owned(), "3".to_owned()]);
    for i in 0..3 {
        let brick = place.dir.join(format!("brick{i}"));
        std::fs::create_dir_all(&brick)?;
        create.push(format!("{ADDRESS}:{}", brick.display()));
    }
    create.push("force".to_owned());
    gluster(&create.iter().map(String::as_str).collect::<Vec<_>>())?;
    for option in
        ["write-behind", "read-ahead", "io-cache", "quick-read", "stat-prefetch", "open-behind"]
    {
        gluster(&["volume", "set", "v", &format!("performance.{option}"), "off"])?;
    }
    gluster(&["volume", "set", "v", "performance.strict-o-direct", "on"])?;
    gluster(&["volume", "set", "v", "network.remote-dio", "disable"])?;
    gluster(&["volume", "start", "v"])?;
    let engine = ["--ioengine=gfapi_async", "--volume=v", "--filename=disk", "--direct=1"];
    let mut engine: Vec<String> = engine.map(str::to_owned).to_vec();
    engine.push(format!("--brick={ADDRESS}"));
    let fio =
        Fio { engine, sync: "--fdatasync=1", size: place.size, prefix: enter, ..Fio::default() };
    fio.fill().context("writing the file")?;
    Ok(Box::new(Gluster { fio, init }))
}

impl Running for Gluster {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        self.fio.load(load, seconds)
    }

    fn servers(&self) -> Vec<u32> {
        vec![self.init.pid()]
    }

    fn silent(&self, seconds: u64) -> Option<Command> {
        Some(self.fio.silent(seconds))
    }
}
