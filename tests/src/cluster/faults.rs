//! What goes wrong around a process: its disk, its machine, its network.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{Cluster, group_of};

/// Names the file that a program with the feature `nemesis` is told by what is wrong (`engine/src/nemesis.rs`).
pub(super) const VARIABLE: &str = "CAIRN_NEMESIS";

impl Cluster<'_> {
    pub(super) fn control(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("nemesis")
    }

    /// The next start of the process is on a machine that was switched on since, with a disk that has a volatile
    /// cache.
    pub(super) fn new_machine(&self, name: &str) -> Result<()> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
        let life = format!("boot={boot}\ncache=volatile\ntears=1\nseed={}\n", &boot_seed(&boot));
        fs::write(self.life(name), &life)?;
        self.say(name, "")
    }

    fn life(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("life")
    }

    /// What is wrong with the process's disk from now on, as the control file has it; nothing: nothing.
    pub(super) fn say(&self, name: &str, wrong: &str) -> Result<()> {
        let life =
            fs::read_to_string(self.life(name)).context("only some jobs have faulty disks")?;
        let (to, new) = (self.control(name), self.control(name).with_extension("new"));
        fs::write(&new, format!("{life}{}\n", wrong.replace(' ', "\n")))?;
        Ok(fs::rename(&new, &to)?)
    }

    pub(super) fn lose_power(&mut self, name: &'static str) -> Result<String> {
        self.kill(name)?;
        self.new_machine(name)?;
        Ok(format!("{name} lost power"))
    }

    pub(super) fn cut(&self, name: &str, from_hosts_too: bool) -> Result<String> {
        self.net.cut(&[group_of(name)], from_hosts_too)?;
        Ok(format!("{name} is cut off"))
    }

    pub(super) fn heal(&self) -> Result<String> {
        self.net.cut(&[], false)?;
        Ok("the network is whole".to_owned())
    }
}

/// What chance in a life is drawn from.
fn boot_seed(boot: &str) -> u64 {
    u64::from_str_radix(&boot[..8], 16).unwrap_or(1)
}
