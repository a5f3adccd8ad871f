#![forbid(unsafe_code)]
//! `cairn`: the daemons and the command line, in one binary.

mod bench;
mod chap;
mod check;
mod cli;
mod client;
mod clock;
mod config;
mod fsck;
mod holder;
mod inspect;
mod keys;
mod metrics;
mod nvme;
mod output;
mod pattern;
mod pools;
mod rebuilds;
mod recovery;
mod rot;
mod scrub;
mod serve;
mod service;
mod snapshot;
mod state;
mod up;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cairn: {error:#}");
            ExitCode::FAILURE
        }
    }
}
