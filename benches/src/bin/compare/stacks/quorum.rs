//! qemu's quorum over three NBD exports on unix sockets: a synchronous fan-out between processes, as ours.
//!
//! Reads go to the first replica (`fifo`), writes to all three; each replica is a file past the page cache.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::{Group, Place, Running, Stack, full_file};
use crate::fio::{self, Fio};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, wait_for};

const PROGRAM: &str = "qemu-storage-daemon";

pub(crate) const STACK: Stack = Stack {
    name: "quorum",
    title: "qemu quorum, 3 NBD over unix sockets",
    group: Group::Files,
    programs: &[(PROGRAM, "qemu-system-common"), fio::PROGRAM],
    start,
};

struct Quorum {
    fio: Fio,
    daemons: Vec<Daemon>,
}

/// A storage daemon that exports `node` at a socket.
fn daemon(
    place: &Place,
    name: &str,
    node: &str,
    blockdevs: &[String],
) -> Result<(Daemon, PathBuf)> {
    let socket = place.dir.join(format!("{name}.sock"));
    let mut command = Command::new(PROGRAM);
    for blockdev in blockdevs {
        command.args(["--blockdev", blockdev]);
    }
    command.arg("--nbd-server");
    command.arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    command.arg("--export").arg(format!("nbd,id=e,node-name={node},name=disk,writable=on"));
    let log = place.log(name);
    let mut daemon = Daemon::start(&command, &log)?;
    wait_for("the socket of qemu-storage-daemon", 10, || {
        daemon.check(&log)?;
        Ok(socket.exists())
    })?;
    Ok((daemon, socket))
}

fn start(place: &Place) -> Result<Box<dyn Running>> {
    let mut daemons = Vec::new();
    let (mut nodes, mut children) = (Vec::new(), Vec::new());
    for i in 0..3 {
        let file = place.dir.join(format!("replica{i}"));
        full_file(&file, place.size)?;
        let driver = format!(
            "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring",
            file.display()
        );
        let (daemon, socket) = daemon(place, &format!("r{i}"), "disk", &[driver])?;
        daemons.push(daemon);
        nodes.push(format!(
            "driver=nbd,node-name=n{i},server.type=unix,server.path={},export=disk",
            socket.display()
        ));
        children.push(format!("children.{i}=n{i}"));
    }
    let children = children.join(",");
    nodes
        .push(format!("driver=quorum,node-name=all,vote-threshold=2,read-pattern=fifo,{children}"));
    let (front, socket) = daemon(place, "front", "all", &nodes)?;
    daemons.push(front);
    let uri = format!("--uri=nbd+unix:///disk?socket={}", socket.display());
    let engine = vec!["--ioengine=nbd".to_owned(), uri];
    let fio = Fio { engine, sync: "--fsync=1", size: place.size, ..Fio::default() };
    fio.fill()?;
    Ok(Box::new(Quorum { fio, daemons }))
}

impl Running for Quorum {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        self.fio.load(load, seconds)
    }

    fn servers(&self) -> Vec<u32> {
        self.daemons.iter().map(Daemon::pid).collect()
    }

    fn silent(&self, seconds: u64) -> Option<Command> {
        Some(self.fio.silent(seconds))
    }
}
