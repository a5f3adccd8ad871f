//! What checksums cost a host: two processes with a pool in memory each, one without, loaded over
//! NVMe/TCP on loopback in turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::Figure;
use crate::checksums::median;

/// A `cairn serve` of its own, ended with this.
#[derive(Debug)]
struct Served {
    process: Child,
    dir: PathBuf,
    uri: String,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It holds nothing that is worth a clean stop.
        let _killed = self.process.kill();
        let _waited = self.process.wait();
        let _removed = std::fs::remove_dir_all(&self.dir);
    }
}

/// `cairn`, built beside this program.
fn cairn() -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name("cairn");
    if !path.exists() {
        bail!("{} is not there; build it: cargo build --release -p cairn", path.display());
    }
    Ok(path)
}

fn json(command: &mut Command) -> Result<Value> {
    let output = command.output()?;
    if !output.status.success() {
        bail!("cairn says: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cairn printed no JSON")
}

impl Served {
    fn start(dir: &Path, checksums: bool) -> Result<Self> {
        let name = if checksums { "with" } else { "without" };
        let dir =
            std::path::absolute(dir)?.join(format!("measure-served-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let state = dir.join("state");
        let config = format!(
            "name = \"{name}\"\nstate_dir = {state:?}\n[nvmf]\nlisten = [\"127.0.0.1:0\"]\n\
             [[pool]]\nname = \"p\"\npath = \"mem:320MiB\"\ncreate = true\n\
             disable_checksums_for_benchmark = {}\n",
            !checksums
        );
        let file = dir.join("node.toml");
        std::fs::write(&file, config)?;
        let process = Command::new(cairn()?)
            .args(["serve", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut served = Self { process, dir, uri: String::new() };
        let socket = state.join("api.sock");
        let begun = Instant::now();
        let replica = loop {
            let mut create = Command::new(cairn()?);
            create.arg("--socket").arg(&socket).args(["-o", "json", "replica", "create"]);
            match json(create.args(["--pool", "p", "--size", "256MiB"])) {
                Ok(replica) => break replica,
                Err(e) if begun.elapsed() > Duration::from_secs(10) => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        replica["uri"].as_str().context("a replica without a URI")?.clone_into(&mut served.uri);
        served.bench("write", "64k", 1.0)?;
        Ok(served)
    }

    /// Requests each second, and the server's CPU-seconds for 100,000 of them.
    fn bench(&self, rw: &str, bs: &str, seconds: f64) -> Result<(f64, f64)> {
        let mut bench = Command::new(cairn()?);
        bench.args(["bench", &self.uri, "--rw", rw, "--bs", bs, "--qd", "32", "--ramp", "0.2"]);
        bench.args(["--time", &seconds.to_string(), "--json"]);
        bench.args(["--server-pid", &self.process.id().to_string()]);
        let said = json(&mut bench)?;
        let iops = |side: &str| said[side]["iops"].as_f64().unwrap_or(0.0);
        let cpu = said["server_cpu_s_per_100k"].as_f64().unwrap_or(0.0);
        Ok((iops("read") + iops("write"), cpu))
    }
}

pub(crate) fn run(dir: &Path, pairs: u32, seconds: f64) -> Result<Vec<Figure>> {
    let (with, without) = (Served::start(dir, true)?, Served::start(dir, false)?);
    let mut figures = Vec::new();
    for rw in ["randread", "randwrite"] {
        let (mut ratios, mut costs, mut on, mut off) = (vec![], vec![], vec![], vec![]);
        for pair in 0..pairs.max(5) {
            let once = |served: &Served| served.bench(rw, "4k", seconds);
            let (a, b) = if pair % 2 == 0 {
                let a = once(&with)?;
                (a, once(&without)?)
            } else {
                let b = once(&without)?;
                (once(&with)?, b)
            };
            ratios.push(a.0 / b.0);
            costs.push(a.1 / b.1);
            on.push(a.0);
            off.push(b.0);
        }
        let note = format!(
            "{:.0} IOPS with, {:.0} without; the server's CPU for each I/O {:.3}x; median of {} pairs",
            median(&mut on),
            median(&mut off),
            median(&mut costs),
            ratios.len()
        );
        let lost = 100.0 * (1.0 - median(&mut ratios));
        let name = format!("checksums, served, {rw} 4K QD 32: IOPS lost");
        figures.push(Figure::new(name, lost, "%").at_most(10.0).note(note));
    }
    Ok(figures)
}
