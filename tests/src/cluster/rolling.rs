//! Replacing the processes of a volume by newer ones, one after the other.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Cluster, POOL_SIZE, REPLICAS, STATE, VOLUME, text};
use crate::host::{run, wait_for};

/// What is written to at all while a process is away, and so what a rebuild may copy at most: fio's part of the
/// volume. Far more is mapped.
const WRITTEN_MIB: u64 = 24;

impl Cluster<'_> {
    /// Where a program is that is newer than the one that the processes were started with.
    pub(super) fn newer_program(&self) -> PathBuf {
        self.dir.join("cairn-newer")
    }

    pub(super) fn act_together(&mut self, verb: &str) -> Result<String> {
        let (verb, name) = verb.split_once(' ').unwrap_or((verb, self.active));
        let (name, rest) = name.split_once(' ').unwrap_or((name, ""));
        let at = REPLICAS.iter().position(|(known, _)| *known == name);
        let at = at.with_context(|| format!("there is no process {name}"))?;
        let name = REPLICAS[at].0;
        match verb {
            "share-all" => self.share_all(),
            "hand-over" => {
                let next = REPLICAS[(at + 1) % REPLICAS.len()].0;
                let moved = self.move_volume(name, next)?;
                self.active = next;
                Ok(moved)
            }
            "kill" => self.kill(name).map(|()| format!("killed {name}")),
            "kill-active" => self.kill(self.active).map(|()| format!("killed {}", self.active)),
            "kill-all" => {
                let all: Vec<_> = self.running.keys().copied().collect();
                all.into_iter().try_for_each(|name| self.kill(name))?;
                Ok("killed all".to_owned())
            }
            "start" => self.launch(name).map(|()| format!("{name} runs again")),
            "start-missing" => {
                for (name, _) in REPLICAS {
                    if !self.running.contains_key(name) {
                        self.launch(name)?;
                    }
                }
                Ok("all run".to_owned())
            }
            "pause" => self.signal(name, "STOP"),
            "resume" => self.signal(name, "CONT"),
            "fault" => self.say(name, rest).map(|()| format!("{name}: {rest}")),
            "cure" => self.say(name, "").map(|()| format!("{name} is well")),
            "lose-power" => self.lose_power(name),
            "cut" => self.cut(name, false),
            "vanish" => self.cut(name, true),
            "heal" => self.heal(),
            "grow-pool" => self.tell(name, &["pool", "grow", "p1", "--size", POOL_SIZE]),
            "expect-degraded" => self.find_active(None, "degraded"),
            "expect-served" => self.find_active(Some(name), "degraded"),
            "expect-online" => self.find_active(None, "online"),
            "stop" => self.stop(name).map(|()| format!("stopped {name}")),
            "start-newer" => {
                let to = self.newer_program();
                if !to.exists() {
                    fs::copy(&self.cairn, &to).context("could not copy the program")?;
                }
                self.newer.insert(name);
                self.launch(name)?;
                Ok(format!("{name} runs again"))
            }
            "expect-whole" => self.expect_whole(name),
            _ => bail!("the cluster knows no {verb}"),
        }
    }

    fn signal(&self, name: &str, signal: &str) -> Result<String> {
        let child = self.running.get(name).with_context(|| format!("{name} is not running"))?;
        run(&format!("kill -{signal} {}", child.id()))
    }

    /// Waits until a process serves the volume in this state, and not the one that is left out.
    fn find_active(&mut self, without: Option<&str>, state: &str) -> Result<String> {
        let mut last = Vec::new();
        let waited = wait_for(&format!("process that serves, '{state}'"), STATE, || {
            last.clear();
            for (name, _) in REPLICAS {
                if Some(name) == without || !self.running.contains_key(name) {
                    continue;
                }
                let status = self.call(name, &["volume", "status", VOLUME])?;
                if text(&status, "state")? == state {
                    return Ok(Some(name));
                }
                last.push(format!(
                    "{name}: {}, {}",
                    text(&status, "state")?,
                    text(&status, "detail")?
                ));
            }
            Ok(None)
        });
        self.active = waited.with_context(|| last.join("; "))?;
        Ok(format!("{} serves it", self.active))
    }

    /// All others stand by for the volume, and the first one serves it.
    fn share_all(&mut self) -> Result<String> {
        if self.shared {
            let first = REPLICAS[0].0;
            if self.active != first {
                self.move_volume(self.active, first)?;
                self.active = first;
            }
            return Ok("the first one serves it".to_owned());
        }
        let from = self.socket(self.active).display().to_string();
        let others = REPLICAS.iter().filter(|(name, _)| *name != self.active);
        for (name, _) in others {
            self.call(name, &["volume", "standby", VOLUME, "--from", &from, "--auto"])?;
        }
        self.shared = true;
        Ok("the others stand by".to_owned())
    }

    /// The replica of a process that was away is in sync again, and got no more than was written meanwhile.
    fn expect_whole(&self, name: &str) -> Result<String> {
        let own = self.call(name, &["replica", "list"])?;
        let own = own.as_array().and_then(|all| all.first()).context("it has no replica")?;
        let own = text(own, "id")?;
        let mut last = Value::Null;
        let waited = wait_for(&format!("rebuild of {name}'s replica"), STATE, || {
            last = self.call(self.active, &["volume", "status", VOLUME])?;
            Ok((text(&last, "state")? == "online").then(|| rebuilds_of(&last, &own)).flatten())
        });
        let copied = waited.with_context(|| format!("last status: {last}"))?;
        ensure!(
            copied <= WRITTEN_MIB << 20,
            "{copied} bytes were copied to {name}'s replica, and only {WRITTEN_MIB} MiB can have been \
             written while it was away"
        );
        Ok(format!("{name}'s replica is in sync, {copied} bytes were copied"))
    }
}

/// What was copied to a replica in the rebuilds that its status tells of, where there were any.
fn rebuilds_of(status: &Value, replica: &str) -> Option<u64> {
    let all = status.get("rebuilt").and_then(Value::as_array)?;
    let of = |r: &&Value| r.get("replica_id").and_then(Value::as_str) == Some(replica);
    let bytes: Vec<u64> =
        all.iter().filter(of).filter_map(|r| r.get("bytes").and_then(Value::as_u64)).collect();
    (!bytes.is_empty()).then(|| bytes.iter().sum())
}
