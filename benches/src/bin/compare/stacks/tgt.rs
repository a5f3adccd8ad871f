//! tgt, the iSCSI target in user space, over a file in memory; `qemu-img bench` is the client, since Debian's
//! fio has no iSCSI. Requests walk through the disk with a stride: in memory that is as good as anywhere.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Group, Place, Running, Stack, full_file};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, pinned, run, wait_for};

pub(crate) const STACK: Stack = Stack {
    name: "tgt",
    title: "tgt: iSCSI, 1 copy in memory",
    group: Group::Memory,
    programs: &[
        ("tgtd", "tgt"),
        ("tgtadm", "tgt"),
        ("qemu-img", "qemu-utils"),
        // What qemu-img reaches iSCSI with is a library beside it.
        ("/usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so", "qemu-block-extra"),
    ],
    start,
};

const IQN: &str = "iqn.2026-11.io.cairn:compare";
/// An address of the loopback network that nobody else listens on.
const PORTAL: &str = "127.0.0.87:13260";

struct Tgt {
    place: Place,
    daemon: Daemon,
    backing: PathBuf,
}

impl Drop for Tgt {
    fn drop(&mut self) {
        // Memory that is not given back by ending the process.
        let _removed = std::fs::remove_file(&self.backing);
    }
}

fn start(place: &Place) -> Result<Box<dyn Running>> {
    let backing = PathBuf::from(format!("/dev/shm/cairn-compare-{}", std::process::id()));
    let socket = place.dir.join("tgtd");
    let log = place.log("tgtd");
    let mut command = pinned("tgtd".as_ref(), place.cores.map(|(server, _)| server));
    command.args(["-f", "--iscsi", &format!("portal={PORTAL}")]).env("TGT_IPC_SOCKET", &socket);
    let daemon = Daemon::start(&command, &log)?;
    let mut tgt = Tgt { place: place.clone(), daemon, backing };
    full_file(&tgt.backing, place.size)?;
    let admin = |args: &str| {
        let mut command = Command::new("tgtadm");
        command
            .args(["--lld", "iscsi", "--op"])
            .args(args.split(' '))
            .env("TGT_IPC_SOCKET", &socket);
        run(&mut command)
    };
    wait_for("tgtd", 10, || {
        tgt.daemon.check(&log)?;
        Ok(admin("show --mode target").is_ok())
    })?;
    admin(&format!("new --mode target --tid 1 -T {IQN}"))?;
    let unit = format!("new --mode logicalunit --tid 1 --lun 1 -b {}", tgt.backing.display());
    admin(&unit)?;
    admin("bind --mode target --tid 1 -I ALL")?;
    Ok(Box::new(tgt))
}

impl Tgt {
    /// Seconds that so many requests take.
    fn requests(&self, load: &Load, count: u64) -> Result<f64> {
        let core = self.place.cores.map(|(_, client)| client);
        let mut bench = pinned("qemu-img".as_ref(), core);
        bench.args(["bench", "-f", "raw", "-t", "none", "-d", &load.qd.to_string()]);
        bench.args(["-s", &load.bs.to_string(), "-c", &count.to_string()]);
        if load.random {
            // An odd number of blocks.
            bench.args(["-S", &(4096 * 4097).to_string()]);
        }
        if load.write {
            bench.arg("-w");
        }
        let said = run(bench.arg(format!("iscsi://{PORTAL}/{IQN}/1")))?;
        let line = said.lines().find_map(|line| line.strip_prefix("Run completed in "));
        let seconds = line.and_then(|line| line.split_whitespace().next());
        seconds.and_then(|s| s.parse().ok()).context("qemu-img measured nothing")
    }
}

/// Requests that tell how many fill the time.
const TRIAL: u64 = 2_000;

impl Running for Tgt {
    /// A flush of memory says nothing.
    fn takes(&self, load: &Load) -> bool {
        !load.durable
    }

    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        let trial = self.requests(load, TRIAL)?.max(1e-3);
        let before = crate::procs::cpu_seconds(&self.servers());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "about so many requests"
        )]
        let count = (seconds / trial * TRIAL as f64) as u64 + 1;
        let took = self.requests(load, count)?;
        let cpu = crate::procs::cpu_seconds(&self.servers()) - before;
        #[expect(clippy::cast_precision_loss, reason = "figures for people")]
        let (iops, ios) = (count as f64 / took, count as f64);
        Ok(Measured {
            iops,
            mib_s: iops * f64::from(load.bs) / f64::from(1 << 20),
            mean_us: 1e6 * f64::from(load.qd) / iops,
            p99_us: None,
            p999_us: None,
            cpu_s_per_100k: Some(cpu / ios * 100_000.0),
        })
    }

    fn servers(&self) -> Vec<u32> {
        vec![self.daemon.pid()]
    }
}
