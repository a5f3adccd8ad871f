//! Running a suite's commands: output to a log, a limit on the time, nothing left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(30);

/// Runs the command with its output appended to `log`; an error if it outlives `limit`.
pub(crate) fn run(command: &mut Command, log: &Path, limit: Duration) -> Result<ExitStatus> {
    let out = File::options().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("could not start {program}"))?;
    let began = Instant::now();
    let mut asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            if asked {
                bail!("{program} was stopped: it took longer than {} s", limit.as_secs());
            }
            return Ok(status);
        }
        if !asked && began.elapsed() > limit {
            // Cargo does not pass a signal on to what it runs.
            signal("TERM", &descendants(child.id()));
            asked = true;
        }
        if began.elapsed() > limit + GRACE {
            signal("KILL", &descendants(child.id()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn signal(name: &str, pids: &[u32]) {
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg(format!("-{name}")).args(pids).stderr(Stdio::null()).status();
}

/// The process and all below it, leaves first.
fn descendants(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let children = PathBuf::from(format!("/proc/{0}/task/{0}/children", found[at]));
        let text = fs::read_to_string(children).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|w| w.parse::<u32>().ok()));
        at += 1;
    }
    found.reverse();
    found
}

/// Whether a program of this name is on the path (or where only root's path looks).
pub(crate) fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path);
    dirs.chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).is_file())
}

/// Whether a cargo subcommand answers.
pub(crate) fn cargo_has(subcommand: &str) -> bool {
    let asked = Command::new(cargo()).args([subcommand, "--version"]).output();
    asked.is_ok_and(|out| out.status.success())
}

/// The cargo that runs us.
pub(crate) fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|l| l.strip_prefix("Uid:"));
    uids.and_then(|l| l.split_whitespace().nth(1)) == Some("0")
}
