//! Development tasks: `cargo xtask tidy`, `cargo xtask test`.
#![forbid(unsafe_code)]

mod install;
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
    }
}
