//! Ceph RBD, three copies on three OSDs (BlueStore on files), one monitor, no manager, no client cache.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Group, Place, Running, Stack};
use crate::fio::{self, Fio};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, run, wait_for};

pub(crate) const STACK: Stack = Stack {
    name: "ceph",
    title: "Ceph RBD, size 3, cache off",
    group: Group::Files,
    programs: &[
        ("ceph-mon", "ceph-mon"),
        ("ceph-osd", "ceph-osd"),
        ("ceph", "ceph-common"),
        ("rbd", "ceph-common"),
        ("rados", "ceph-common"),
        ("monmaptool", "ceph-common"),
        fio::PROGRAM,
    ],
    start,
};

const FSID: &str = "5d0a3c52-9c37-4a0e-8a43-6f5b6f3a1c02";
/// MiB that an OSD may keep in memory: three of them and their clients are to fit beside the rest.
const MEMORY_MIB: u64 = 1024;

struct Ceph {
    fio: Fio,
    daemons: Vec<Daemon>,
}

fn config(place: &Place, address: &str) -> String {
    let dir = place.dir.display();
    let mut text = format!(
        "[global]\nfsid = {FSID}\nmon_host = {address}\nauth_cluster_required = none\n\
         auth_service_required = none\nauth_client_required = none\npublic_network = 127.0.0.0/8\n\
         run_dir = {dir}\nadmin_socket = {dir}/$name.asok\npid_file =\nlog_file = {dir}/$name.said\n\
         crash_dir = {dir}\nkeyring = {dir}/keyring\n\
         osd_pool_default_size = 3\nosd_pool_default_min_size = 2\nosd_crush_chooseleaf_type = 0\n\
         osd_pool_default_pg_autoscale_mode = off\nmon_data = {dir}/mon\nosd_data = {dir}/osd$id\n"
    );
    let (memory, block) = (MEMORY_MIB << 20, place.size * 2 + (2 << 30));
    write!(text, "osd_memory_target = {memory}\nbluestore_block_size = {block}\n")
        .expect("a string takes anything");
    text + "mon_data_avail_warn = 1\nmon_data_avail_crit = 0\n[client]\nrbd_cache = false\n"
}

/// An address with a free port.
fn free_address() -> Result<String> {
    Ok(format!("v2:{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?))
}

fn start(place: &Place) -> Result<Box<dyn Running>> {
    let address = free_address()?;
    let path = place.dir.join("ceph.conf");
    std::fs::write(&path, config(place, &address))?;
    let program = |name: &str| {
        let mut command = Command::new(name);
        command.arg("-c").arg(&path).env("CEPH_CONF", &path);
        command
    };
    let monmap = place.dir.join("monmap");
    let mut make = Command::new("monmaptool");
    make.args(["--create", "--clobber", "--fsid", FSID, "--addv", "a", &format!("[{address}]")]);
    run(make.arg(&monmap))?;
    std::fs::create_dir_all(place.dir.join("mon"))?;
    run(program("ceph-mon").args(["--mkfs", "-i", "a", "--monmap"]).arg(&monmap))?;
    let mut daemons = Vec::new();
    let log = place.log("mon");
    let mut monitor = Daemon::start(program("ceph-mon").args(["-f", "-i", "a"]), &log)?;
    let ceph =
        |args: &str| run(program("ceph").args(["--connect-timeout", "5"]).args(args.split(' ')));
    wait_for("the Ceph monitor", 30, || {
        monitor.check(&log)?;
        Ok(ceph("mon stat").is_ok())
    })?;
    daemons.push(monitor);
    for i in 0..3 {
        let uuid = format!("{}{}", &FSID[..FSID.len() - 1], i + 4);
        ceph(&format!("osd new {uuid} {i}"))?;
        std::fs::create_dir_all(place.dir.join(format!("osd{i}")))?;
        let id = i.to_string();
        run(program("ceph-osd").args(["-i", &id, "--mkfs", "--osd-uuid", &uuid]))?;
        let log = place.log(&format!("osd{i}"));
        daemons.push(Daemon::start(program("ceph-osd").args(["-f", "-i", &id]), &log)?);
    }
    wait_for("the OSDs", 60, || Ok(ceph("osd stat")?.contains("3 up")))?;
    ceph("osd pool create compare 64 64")?;
    wait_for("the placement groups", 60, || Ok(ready(&path)))?;
    let mib = (place.size >> 20).to_string();
    let mut image = program("rbd");
    run(image.args(["create", "compare/v", "--size", &mib, "--image-feature", "layering"]))?;
    let fio = Fio {
        engine: ["--ioengine=rbd", "--clientname=admin", "--pool=compare", "--rbdname=v"]
            .map(str::to_owned)
            .to_vec(),
        sync: "--fsync=1",
        size: place.size,
        env: vec![("CEPH_CONF", path)],
        ..Fio::default()
    };
    fio.fill().context("writing the image")?;
    Ok(Box::new(Ceph { fio, daemons }))
}

/// Without a manager nobody counts placement groups: that one can be written to has to do.
fn ready(config: &Path) -> bool {
    let mut put = Command::new("timeout");
    put.args(["5", "rados", "-c"]).arg(config).args(["-p", "compare", "put", "probe"]).arg(config);
    let well = run(&mut put).is_ok();
    std::thread::sleep(Duration::from_millis(200));
    well
}

impl Running for Ceph {
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
