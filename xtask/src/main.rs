//! Development tasks: `cargo xtask tidy`, `cargo xtask test`, `cargo xtask crash`, `cargo xtask rot`, `cargo xtask sim`,
//! `cargo xtask nemesis`, `cargo xtask measure`, `cargo xtask compare`, `cargo xtask gate`.
#![forbid(unsafe_code)]

mod gate;
mod install;
mod iscsi;
mod nemesis;
mod process;
mod source;
mod suites;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check what the compiler does not: arrows between crates, unsafe, links, leftovers, length.
    Tidy,
    /// Run the test suites; the last line is `N passed, N failed, N skipped`.
    Test(suites::Options),
    /// Crash the pool in many ways, recover it, and hold it to its model: the options are those of the
    /// crash tester (`--states N`, `--seed S`, `--exhaustive DEPTH`).
    #[command(disable_help_flag = true)]
    Crash {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Flip bits in the pools of a running cluster: every read is right or an error, and a scrub heals
    /// what can be healed.
    Rot {
        /// In how many places.
        #[arg(long, default_value_t = 1000)]
        flips: u16,
    },
    /// Measure the pool against its bars: amplification, open, checksums, discard, or all (`--json`,
    /// `--dir DIR`). docs/performance.md tells of each.
    #[command(disable_help_flag = true)]
    Measure {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Run Cairn beside other stacks and beside what the machine gives, and hold it to its bars (`--list`,
    /// `[ROWS..]`, `--seconds N`, `--rounds N`, `--json FILE`, `--svg DIR`, `--strict`). docs/performance.md
    /// tells of it.
    #[command(disable_help_flag = true)]
    Compare {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Count the instructions that a request takes, with valgrind, and hold them to those of before.
    Gate(gate::Options),
    /// Torment real processes in network namespaces, and judge what hosts see: `--minutes N`, `--seed S`,
    /// `--mutant NAME` with one of the deliberate bugs, `--mutants` with each of five until it is caught,
    /// `--trace`, `--keep`. Needs root, iproute2 and nftables. docs/nemesis.md tells of it.
    #[command(disable_help_flag = true)]
    Nemesis {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Let a Linux guest use a volume, also in what `test` leaves out since it takes long: `--only JOB|CASE`, such as
    /// `--only outages` for what a host notices of each failure, `--keep`, `--list`. Needs root.
    #[command(disable_help_flag = true)]
    Guest {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Run simulated clusters from seeds; the options are those of the simulator (`--seeds N`, `--seed S`,
    /// `--seconds T`, `--trace`). With `--mutants`, run them with each of the deliberate bugs until it is
    /// caught.
    #[command(disable_help_flag = true)]
    Sim {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    match Args::parse().task {
        Task::Tidy => tidy::run(),
        Task::Test(options) => suites::run(&options),
        Task::Crash { options } => tool(&["-p", "cairn-fuzz", "--bin", "crash"], &options),
        Task::Rot { flips } => tool(&["-p", "cairn"], &["up".into(), format!("--rot={flips}")]),
        // The real thing is measured, too.
        Task::Measure { options } => {
            Ok(release()? && tool(&["-p", "cairn-benches", "--bin", "measure"], &options)?)
        }
        Task::Compare { options } => {
            Ok(release()? && tool(&["-p", "cairn-benches", "--bin", "compare"], &options)?)
        }
        Task::Gate(options) => gate::run(&options),
        Task::Nemesis { options } => nemesis::run(&options),
        Task::Guest { options } => nemesis::guest(&options),
        Task::Sim { options } if options.iter().any(|o| o == "--mutants") => {
            tool(&["-p", "cairn-sim", "--features", "mutants"], &options)
        }
        Task::Sim { options } => tool(&["-p", "cairn-sim"], &options),
    }
}

/// The commit that is built, for whoever is to run a seed again.
fn commit() -> String {
    let git = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let found = git.ok().filter(|out| out.status.success());
    let found = found.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    found.unwrap_or_else(|| "unknown".to_owned())
}

/// Builds cairn for speed.
fn release() -> Result<bool> {
    let mut build = std::process::Command::new(process::cargo());
    Ok(build.args(["build", "-q", "--release", "-p", "cairn"]).status()?.success())
}

/// Runs a tool of the workspace, built for speed, with the caller's options.
fn tool(which: &[&str], options: &[String]) -> Result<bool> {
    let mut run = std::process::Command::new(process::cargo());
    run.args(["run", "-q", "--release"]).args(which).arg("--").args(options);
    run.env("CAIRN_COMMIT", commit());
    Ok(run.status()?.success())
}
