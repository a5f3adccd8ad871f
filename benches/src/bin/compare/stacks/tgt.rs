//! tgt, the iSCSI target in user space, over a file in memory, and over one of the disk past the page cache.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::iscsi_client::Unit;
use super::{Group, Place, Running, Stack, full_file};
use crate::load::{Load, Measured};
use crate::procs::{Daemon, pinned, run, wait_for};

const PROGRAMS: &[(&str, &str)] = &[("tgtd", "tgt"), ("tgtadm", "tgt")];

pub(crate) const MEMORY: Stack = Stack {
    name: "tgt",
    title: "tgt: 1 copy in memory",
    group: Group::Iscsi,
    programs: PROGRAMS,
    start: |place| {
        let backing = PathBuf::from(format!("/dev/shm/cairn-compare-{}", std::process::id()));
        start(place, "127.0.0.87:13260", backing, "")
    },
};

pub(crate) const FILE: Stack = Stack {
    name: "tgt-file",
    title: "tgt: 1 copy in a file",
    group: Group::Iscsi,
    programs: PROGRAMS,
    start: |place| start(place, "127.0.0.88:13260", place.dir.join("file"), " --bsoflags direct"),
};

const IQN: &str = "iqn.2026-11.io.cairn:compare";
struct Tgt {
    place: Place,
    daemon: Daemon,
    backing: PathBuf,
    unit: Unit,
}

impl Drop for Tgt {
    fn drop(&mut self) {
        // Memory that is not given back by ending the process.
        let _removed = std::fs::remove_file(&self.backing);
    }
}

/// `portal` is an address of the loopback network that nobody else listens on.
fn start(place: &Place, portal: &str, backing: PathBuf, how: &str) -> Result<Box<dyn Running>> {
    let socket = place.dir.join("tgtd");
    let log = place.log("tgtd");
    let mut command = pinned("tgtd".as_ref(), place.cores.map(|(server, _)| server));
    command.args(["-f", "--iscsi", &format!("portal={portal}")]).env("TGT_IPC_SOCKET", &socket);
    // Two of them are told apart by this number.
    command.args(["-C", if how.is_empty() { "0" } else { "1" }]);
    let daemon = Daemon::start(&command, &log)?;
    let unit = Unit { peer: portal.parse()?, iqn: IQN.to_owned(), lun: 1 };
    let mut tgt = Tgt { place: place.clone(), daemon, backing, unit };
    full_file(&tgt.backing, place.size)?;
    let admin = |args: &str| {
        let mut command = Command::new("tgtadm");
        command
            .args(["-C", if how.is_empty() { "0" } else { "1" }])
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
    admin(&format!("new --mode logicalunit --tid 1 --lun 1 -b {}{how}", tgt.backing.display()))?;
    admin("bind --mode target --tid 1 -I ALL")?;
    tgt.unit.fill(place)?;
    Ok(Box::new(tgt))
}

impl Running for Tgt {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        self.unit.load(&self.place, load, seconds)
    }

    fn servers(&self) -> Vec<u32> {
        vec![self.daemon.pid()]
    }
}
