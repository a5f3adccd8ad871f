//! `nemesis`: real `cairn` processes in network namespaces, everything that can go wrong, and hosts whose every
//! answer is judged by the simulator's checker. docs/nemesis.md tells of it.
#![forbid(unsafe_code)]

mod api;
mod host;
mod net;
mod nodes;
mod operator;
mod plan;
mod run;
mod shared;
mod trace;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use run::{Options, Report};

/// Torments real cairn processes, and judges what hosts see.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask nemesis")]
struct Args {
    /// For how long.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,

    /// What the cluster, its hosts and the faults are drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Run with this deliberate bug (engine/block/src/mutants.rs) until it is caught; not being caught is a failure.
    #[arg(long)]
    mutant: Option<String>,

    /// Run with each of five deliberate bugs, each for --minutes at most.
    #[arg(long, conflicts_with = "mutant")]
    mutants: bool,

    /// The binary, built with the feature `nemesis`.
    #[arg(long, value_name = "PATH")]
    cairn: PathBuf,

    /// Where pools and logs are kept meanwhile, and after a failure. Default: the system's temporary folder.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Keep the folder of a run that passed.
    #[arg(long)]
    keep: bool,

    /// Print each event.
    #[arg(long)]
    trace: bool,
}

/// Bugs that show in real processes.
const MUTANTS: [&str; 5] =
    ["AckBeforeAll", "FlushAtReplica", "NoLease", "NoOpenMark", "ReadOutOfSync"];

fn main() -> ExitCode {
    match all() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("nemesis: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all() -> Result<bool> {
    let args = Args::parse();
    if let Some(why) = net::lacks() {
        println!("nemesis: {why}");
        println!("0 passed, 0 failed, 1 skipped");
        return Ok(true);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    ctrlc::set_handler(move || asked.store(true, Ordering::Relaxed)).context("signals")?;
    // Checks that fail are told of by the run, once.
    std::panic::set_hook(Box::new(|_| {}));
    if args.mutants {
        return mutants(&args, &stop);
    }
    let report = one(&args, args.seed, args.mutant.as_deref(), &stop)?;
    let caught = report.failure.is_some();
    let passed = caught == args.mutant.is_some() && !report.interrupted;
    println!("{} passed, {} failed, 0 skipped", u8::from(passed), u8::from(!passed));
    Ok(passed)
}

fn one(args: &Args, seed: u64, mutant: Option<&str>, stop: &Arc<AtomicBool>) -> Result<Report> {
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = run::folder(&parent, seed, &mutant.map(|m| format!("-{m}")).unwrap_or_default());
    let options = Options {
        cairn: args.cairn.canonicalize().with_context(|| args.cairn.display().to_string())?,
        dir,
        seed,
        run: Duration::try_from_secs_f64(args.minutes * 60.0).context("--minutes")?,
        mutant: mutant.map(str::to_owned),
        loud: args.trace,
    };
    println!(
        "nemesis: seed {seed}, {} min{}, commit {}, in {}",
        args.minutes,
        mutant.map(|m| format!(", with {m}")).unwrap_or_default(),
        commit(),
        options.dir.display()
    );
    let report = run::run(&options, stop)?;
    tell(args, &options, &report);
    if report.failure.is_none() && !args.keep {
        std::fs::remove_dir_all(&options.dir)?;
    }
    Ok(report)
}

fn commit() -> String {
    std::env::var("CAIRN_COMMIT").unwrap_or_else(|_| "unknown".to_owned())
}

fn tell(args: &Args, options: &Options, report: &Report) {
    let faults: Vec<String> = report.faults.iter().map(|(k, n)| format!("{k} {n}")).collect();
    println!("  faults      {}", faults.join(", "));
    println!(
        "  processes   {} killed in {:.0} s, {} of them with what their disks had not flushed",
        report.kills,
        report.took.as_secs_f64(),
        report.power
    );
    println!(
        "  power       {} losses after which nothing may be missing, {} that left a choice of what was not flushed",
        report.strict, report.lots
    );
    let did = &report.did;
    println!(
        "  requests    {} reads, {} writes, {} trims, {} flushes; {} made again, {} errors, {} connections lost",
        did.reads, did.writes, did.trims, did.flushes, did.retries, did.errors, did.moves
    );
    println!(
        "  judged      {} blocks read ({} MiB), {} changes acked, {} nexuses; the longest request took {:.1} s",
        report.judged,
        report.judged * 4 / 1024,
        report.acked,
        report.epochs,
        did.longest.as_secs_f64()
    );
    println!(
        "  operator    {} snapshots read whole by their clones, {} replicas replaced",
        report.snapshots, report.replaced
    );
    match &report.failure {
        None if report.interrupted => println!("  interrupted: nothing was read afterwards"),
        None => println!(
            "  afterwards  all is served and every block read after {:.1} s",
            report.recovered.as_secs_f64()
        ),
        Some(failure) => {
            let mut what = failure.what.clone();
            if let Some((at, _)) = what.char_indices().nth(1_500) {
                what.truncate(at);
                what.push_str(" ...");
            }
            println!("  FAILED      {what}");
            if let Some(trace) = &report.trace {
                println!("  everything  by time: {}", trace.display());
            }
            let mutant =
                options.mutant.as_ref().map(|m| format!(" --mutant {m}")).unwrap_or_default();
            println!(
                "  again       cargo xtask nemesis --minutes {} --seed {}{mutant} (commit {})",
                args.minutes,
                options.seed,
                commit()
            );
        }
    }
}

/// Each of the deliberate bugs, until it is caught.
fn mutants(args: &Args, stop: &Arc<AtomicBool>) -> Result<bool> {
    let mut rows = Vec::new();
    for (seed, mutant) in (args.seed..).zip(MUTANTS) {
        let report = one(args, seed, Some(mutant), stop)?;
        if report.interrupted {
            return Ok(false);
        }
        rows.push((mutant, report));
    }
    println!("\n{:18} {:>8} {:>6}  caught by", "mutant", "minutes", "kills");
    let mut caught = 0;
    for (mutant, report) in &rows {
        let by = report.failure.as_ref().map_or("nobody", |failure| {
            failure.what.split_once(']').map_or("?", |(name, _)| name.trim_start_matches('['))
        });
        caught += usize::from(report.failure.is_some());
        println!("{mutant:18} {:>8.1} {:>6}  {by}", report.took.as_secs_f64() / 60.0, report.kills);
    }
    println!("{caught} passed, {} failed, 0 skipped", rows.len() - caught);
    Ok(caught == rows.len())
}
