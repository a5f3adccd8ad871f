//! What processes use, from proc(5); and programs that run beside this one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde_json::Value;

/// These processes and all below them.
fn with_descendants(pids: &[u32]) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = pids.iter().copied().collect();
    let mut ahead = pids.to_vec();
    while let Some(pid) = ahead.pop() {
        ahead.extend(children(pid).into_iter().filter(|&child| found.insert(child)));
    }
    found
}

/// What a process has started.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return found };
    for task in tasks.flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse::<u32>().ok()));
    }
    found
}

/// CPU time so far in seconds, user and system, with what ended below them.
pub(crate) fn cpu_seconds(pids: &[u32]) -> f64 {
    let hertz = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    let mut ticks = 0_u64;
    for pid in with_descendants(pids) {
        // One that has just ended is counted by its parent.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name, in parentheses, may hold anything. After it, utime, stime, cutime, cstime are 11 to 14.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        ticks += fields.skip(11).take(4).filter_map(|f| f.parse::<u64>().ok()).sum::<u64>();
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let seconds = ticks as f64 / hertz as f64;
    seconds
}

/// The same to the nanosecond, without threads that have ended: for those that do next to nothing.
pub(crate) fn fine_cpu_seconds(pids: &[u32]) -> f64 {
    let mut ns = 0_u64;
    for pid in with_descendants(pids) {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let stat = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            ns += stat.split_whitespace().next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Duration::from_nanos(ns).as_secs_f64()
}

/// Resident memory in MiB; what several share is counted for each.
pub(crate) fn resident_mib(pids: &[u32]) -> f64 {
    let mut kib = 0;
    for pid in with_descendants(pids) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        kib += line.split_whitespace().next().and_then(|w| w.parse::<u32>().ok()).unwrap_or(0);
    }
    f64::from(kib) / 1024.0
}

/// A program that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    name: String,
}

impl Daemon {
    /// What it says goes to `log`.
    pub(crate) fn start(command: &Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let out =
            fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        // It ends with this process, however that ends.
        let mut bound = Command::new("setpriv");
        bound.args(["--pdeathsig", "KILL"]).arg(command.get_program()).args(command.get_args());
        bound.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        bound.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = bound.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An error where it has ended, with what it said last.
    pub(crate) fn check(&mut self, log: &Path) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let said = fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<&str> = said.lines().rev().take(3).collect();
            bail!("{} ended with {status}: {}", self.name, tail.join(" / "));
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let asked =
            i32::try_from(self.child.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(asked, Ok(Ok(()))) && Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // It holds nothing that anybody needs.
        let _killed = self.child.kill();
        let _waited = self.child.wait();
    }
}

/// Runs a command to its end; an error with what it said where that was a bad one.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {name}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let complaint = if complaint.trim().is_empty() { said.trim() } else { complaint.trim() };
        let tail: Vec<&str> = complaint.lines().rev().take(3).collect();
        bail!("{name} ended with {}: {}", output.status, tail.join(" / "));
    }
    Ok(said)
}

/// The same, of a command that prints JSON.
pub(crate) fn run_json(command: &mut Command) -> Result<Value> {
    let said = run(command)?;
    // fio puts warnings before it.
    let json = said.find(['{', '[']).map_or(said.as_str(), |at| &said[at..]);
    serde_json::from_str(json).context("it printed no JSON")
}

/// A command on one core, or on any.
pub(crate) fn pinned(program: &Path, core: Option<usize>) -> Command {
    let Some(core) = core else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(program);
    command
}

/// Waits until `ready` says so.
pub(crate) fn wait_for(
    what: &str,
    seconds: u64,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(seconds);
    while !ready()? {
        if Instant::now() > until {
            bail!("{what} was not there in {seconds} s");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Whether a program of this name can be run.
pub(crate) fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path);
    // A path from the root stays one.
    dirs.chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).is_file())
}

/// Which of these programs are not there, and how to get them; each comes with its Debian package.
pub(crate) fn missing(programs: &[(&str, &str)]) -> Option<String> {
    let gone: Vec<_> = programs.iter().filter(|(program, _)| !installed(program)).collect();
    if gone.is_empty() {
        return None;
    }
    let names: Vec<&str> = gone.iter().map(|(program, _)| *program).collect();
    let packages: BTreeSet<&str> = gone.iter().map(|(_, package)| *package).collect();
    let packages: Vec<&str> = packages.into_iter().collect();
    Some(format!(
        "{} not there; apt-get install --no-install-recommends {}",
        names.join(", "),
        packages.join(" ")
    ))
}
