//! Boots a real Linux 6.12 host in a virtual machine and lets its NVMe/TCP initiator, its file
//! systems and fio at a volume that `cairn` processes serve. Needs root: network namespaces, TAP.
//!
//! `--peer nvmet` runs the same jobs against the kernel's own target, which proves the jobs;
//! `--peer none` runs a job that needs no target, which proves the harness.
#![forbid(unsafe_code)]

mod cluster;
mod cpio;
mod disk;
mod dmesg;
mod guest;
mod host;
mod image;
mod jobs;
mod net;
mod peer;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use crate::cluster::{Cluster, Layout};
use crate::jobs::{JOBS, Job, OURS, SMOKE};
use crate::net::Net;
use crate::peer::{Nothing, Nvmet, Peer};

/// Runs the guest cases; the last line is `N passed, N failed, N skipped`.
#[derive(Debug, Parser)]
struct Args {
    /// The cairn binary to test.
    #[arg(long, default_value = "target/release/cairn")]
    cairn: PathBuf,
    /// The cairn binary with the feature `nemesis`, for cases whose disks fail.
    #[arg(long, default_value = "target/nemesis/cairn")]
    nemesis: PathBuf,
    /// Run only this case, or this job's cases; may be given again.
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// List the cases that run where none is named, and exit.
    #[arg(long)]
    list: bool,
    /// Keep the logs of a run that passed.
    #[arg(long)]
    keep: bool,
    /// Fail a case whose host waited longer for a request than docs/operations.md promises; for a quiet machine.
    /// Without it that is printed, and only a pause that a host would not have waited for (30 s) fails.
    #[arg(long)]
    strict: bool,
    /// What serves the volume.
    #[arg(long, value_enum, default_value = "cairn")]
    peer: PeerKind,
    /// Make the guest image and exit.
    #[arg(long)]
    prepare: bool,
    /// Ask the package archive for a newer kernel.
    #[arg(long)]
    refresh: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PeerKind {
    /// Cairn processes on this machine.
    Cairn,
    /// The kernel's nvmet-tcp in a second guest.
    Nvmet,
    /// Nothing: only the harness is proven.
    None,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("guest: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let jobs: &[Job] = if args.peer == PeerKind::None { &[SMOKE] } else { &JOBS };
    if args.list {
        let usual = jobs.iter().filter(|job| job.wanted(&[]));
        usual.for_each(|job| job.names().skip(1).for_each(|case| println!("{case}")));
        return Ok(true);
    }
    let known = |name: &str| jobs.iter().any(|job| job.names().any(|n| n == name));
    if let Some(wrong) = args.only.iter().find(|name| !known(name)) {
        bail!("there is no case '{wrong}'; --list names them");
    }
    host::catch_interrupts()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no repository root")?;
    let image = image::prepare(&root.join(".cache/guest"), args.refresh)?;
    if args.prepare {
        return Ok(true);
    }

    let run_dir = root.join("target/guest").join(std::process::id().to_string());
    let outcome = run_jobs(args, jobs, &image, &run_dir);
    let passed = matches!(outcome, Ok(true));
    if passed && !args.keep {
        let _ = fs::remove_dir_all(&run_dir);
    } else {
        eprintln!("guest: logs are in {}", run_dir.display());
    }
    outcome
}

fn run_jobs(args: &Args, jobs: &[Job], image: &image::Image, run_dir: &Path) -> Result<bool> {
    let began = Instant::now();
    let net = Net::up()?;
    let mut outcomes = Vec::new();
    let can = |job: &&Job| args.peer != PeerKind::Nvmet || !OURS.contains(&job.name);
    for job in jobs.iter().filter(can).filter(|job| job.wanted(&args.only)) {
        host::check_interrupted()?;
        let logs = run_dir.join(job.name);
        fs::create_dir_all(&logs)?;
        println!("guest: booting {}", job.name);
        outcomes.extend(job.run(image, &net, &logs, &args.only, args.strict, || {
            Ok(match args.peer {
                PeerKind::Cairn => {
                    let state = logs.join("state");
                    let (encrypted, layout) = (job.encrypted, job.layout);
                    let cairn = if layout == Layout::Faulty { &args.nemesis } else { &args.cairn };
                    Box::new(Cluster::start(&net, cairn, &state, &logs, encrypted, layout)?)
                        as Box<dyn Peer>
                }
                PeerKind::Nvmet => Box::new(Nvmet::start(image, &net, &logs)?),
                PeerKind::None => Box::new(Nothing),
            })
        }));
        // As large as the image each, and soon made again.
        for name in [job.name, "nvmet"] {
            let _ = fs::remove_file(logs.join(format!("{name}.initrd")));
        }
    }
    println!("guest: {:.0} s", began.elapsed().as_secs_f64());
    let failures = outcomes.iter().filter(|outcome| outcome.failure.is_some());
    let failed = failures.map(|outcome| outcome.report()).count();
    println!("{} passed, {failed} failed, 0 skipped", outcomes.len() - failed);
    Ok(failed == 0)
}
