//! fio as the client, with its words.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::load::{Load, Measured};
use crate::procs::run_json;

/// The program and its Debian package.
pub(crate) const PROGRAM: (&str, &str) = ("fio", "fio");

/// How fio reaches a stack.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fio {
    /// `--ioengine=` and what that engine needs.
    pub(crate) engine: Vec<String>,
    /// The option that flushes after each write: not every engine takes both.
    pub(crate) sync: &'static str,
    /// Bytes of the volume.
    pub(crate) size: u64,
    pub(crate) env: Vec<(&'static str, PathBuf)>,
    /// What runs it, and that one's arguments.
    pub(crate) prefix: Vec<String>,
}

impl Fio {
    /// On a raw file, past the page cache.
    pub(crate) fn file(path: &Path, size: u64) -> Self {
        let file = format!("--filename={}", path.display());
        let engine = vec!["--ioengine=io_uring".to_owned(), "--direct=1".to_owned(), file];
        Self { engine, sync: "--fdatasync=1", size, ..Self::default() }
    }

    fn command(&self) -> Command {
        let mut fio = match self.prefix.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(PROGRAM.0);
                command
            }
            None => Command::new(PROGRAM.0),
        };
        fio.envs(self.env.iter().map(|(name, value)| (name, value)));
        fio.args(["--name=load", "--output-format=json", "--lat_percentiles=1", "--norandommap"]);
        fio.args(["--randrepeat=0", "--thread", &format!("--size={}", self.size)])
            .args(&self.engine);
        fio
    }

    /// Writes all of it once.
    pub(crate) fn fill(&self) -> Result<()> {
        let mut fio = self.command();
        run_json(fio.args(["--rw=write", "--bs=1M", "--iodepth=8"])).map(|_| ())
    }

    pub(crate) fn load(&self, load: &Load, seconds: f64) -> Result<Measured> {
        let mut fio = self.command();
        fio.args([format!("--rw={}", load.rw()), format!("--bs={}", load.bs)]);
        fio.args([format!("--iodepth={}", load.qd), "--time_based".to_owned()]);
        fio.arg(format!("--runtime={}ms", (seconds * 1000.0).round()));
        if load.durable {
            fio.arg(self.sync);
        }
        let said = run_json(&mut fio)?;
        let job = said["jobs"].get(0).context("fio measured nothing")?;
        Ok(measured(&job[if load.write { "write" } else { "read" }], load))
    }

    /// One that is connected and asks for one block each second.
    pub(crate) fn silent(&self, seconds: u64) -> Command {
        let mut fio = self.command();
        fio.args(["--rw=randread", "--bs=4096", "--iodepth=1", "--rate_iops=1", "--time_based"]);
        fio.arg(format!("--runtime={seconds}s"));
        fio
    }
}

fn measured(side: &Value, load: &Load) -> Measured {
    let iops = side["iops"].as_f64().unwrap_or(0.0);
    let us = |q: &str| side["lat_ns"]["percentile"][q].as_f64().map(|ns| ns / 1000.0);
    // Of a write that is flushed fio tells the write's and the flush's latency apart.
    let mean = side["lat_ns"]["mean"].as_f64().unwrap_or(0.0) / 1000.0;
    Measured {
        iops,
        mib_s: iops * f64::from(load.bs) / f64::from(1 << 20),
        mean_us: if load.durable { 1e6 * f64::from(load.qd) / iops.max(1.0) } else { mean },
        p99_us: us("99.000000").filter(|_| !load.durable),
        p999_us: us("99.900000").filter(|_| !load.durable),
        cpu_s_per_100k: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::LOADS;
    use serde_json::json;

    #[test]
    fn the_words_of_fio_are_read() {
        let side = json!({
            "iops": 2000.0,
            "lat_ns": {"mean": 16_000_000.0, "percentile": {"99.000000": 20_000_000, "99.900000": 30_000_000}},
        });
        let read = measured(&side, &LOADS[1]);
        assert!((read.mean_us - 16_000.0).abs() < 1e-6);
        assert_eq!(read.p999_us, Some(30_000.0));
        let durable = measured(&side, LOADS.iter().find(|load| load.durable).unwrap());
        assert!((durable.mean_us - 500.0).abs() < 1e-6);
        assert_eq!(durable.p99_us, None);
    }
}
