//! Counted instructions for each request. `cargo xtask gate` runs it, and compares.
//!
//! It runs itself under callgrind, which counts only what [`counted`] does: shards and a host on one thread, on a
//! driver in memory.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use cairn_benches::cluster::{Cluster, Shape};
use cairn_block::IoOp;
use clap::{Parser, Subcommand};
use serde_json::{Map, json};

/// Prints instructions for each request as JSON.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Runs one row, for callgrind to count.
    #[command(hide = true)]
    Row {
        row: usize,
        /// Requests.
        count: u64,
    },
}

/// What is counted.
#[derive(Debug, Clone, Copy)]
struct Row {
    shape: Shape,
    write: bool,
    /// Blocks in a request.
    blocks: u64,
    depth: u32,
}

impl Row {
    fn name(self) -> String {
        let Self { shape, write, blocks, depth } = self;
        let what = if write { "write" } else { "read" };
        format!("{}, {}K {what} QD{depth}", shape.title(), blocks * 4)
    }

    fn op(self) -> IoOp {
        if self.write { IoOp::Write { fua: false } } else { IoOp::Read }
    }
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for shape in Shape::ALL {
        for write in [false, true] {
            rows.push(Row { shape, write, blocks: 1, depth: 32 });
        }
    }
    for write in [false, true] {
        // Alone in its turn: what it does not share with others.
        rows.push(Row { shape: Shape::Remote(3), write, blocks: 1, depth: 1 });
        rows.push(Row { shape: Shape::Remote(3), write, blocks: 32, depth: 16 });
    }
    rows
}

/// Requests that are counted: so many that what happens once in a while shows.
const COUNT: u64 = 2_000;

/// What callgrind counts. It is found by its name.
#[inline(never)]
fn counted(cluster: &mut Cluster, op: IoOp, count: u64) {
    cluster.run(op, count);
}

fn row(at: usize, count: u64) -> Result<()> {
    let row = *rows().get(at).context("there is no such row")?;
    let mut cluster = Cluster::new(row.shape, row.depth, row.blocks);
    cluster.run(row.op(), count / 10);
    counted(&mut cluster, row.op(), count);
    Ok(())
}

fn count(own: &Path, at: usize) -> Result<u64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    command.args(["--toggle-collect=gate::counted*"]).arg(own);
    let output = command.args(["row", &at.to_string(), &COUNT.to_string()]).output();
    let output =
        output.context("cannot start valgrind; it is in the Debian package of that name")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("valgrind ended with {}: {said}", output.status);
    }
    // ==1234== Collected : 123456
    let line = said.lines().find_map(|line| line.split("Collected : ").nth(1));
    let total: u64 = line.and_then(|l| l.trim().parse().ok()).context("callgrind told no count")?;
    if total == 0 {
        bail!("callgrind counted nothing: it does not find the function");
    }
    Ok(total / COUNT)
}

fn all() -> Result<()> {
    let own = std::env::current_exe()?;
    let mut found = Map::new();
    for (at, row) in rows().iter().enumerate() {
        found.insert(row.name(), json!(count(&own, at)?));
    }
    println!("{}", serde_json::to_string_pretty(&found)?);
    Ok(())
}

fn main() -> ExitCode {
    let result = match Args::parse().part {
        Some(Part::Row { row: at, count }) => row(at, count),
        None => all(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gate: {error:#}");
            ExitCode::FAILURE
        }
    }
}
