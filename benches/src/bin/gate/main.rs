//! Counted instructions for each request, held to those of before. `cargo xtask gate` runs it.
//!
//! It runs itself under callgrind, which counts only what [`counted`] does, without the copies of the driver in
//! memory: shards and a host on one thread.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail};
use cairn_benches::cluster::{Cluster, Shape};
use cairn_block::IoOp;
use clap::{Parser, Subcommand};
use serde::{Deserialize, Serialize};

/// Holds the instructions that a request takes to those that it took before.
///
/// The last line is `N passed, N failed, N skipped`, a row each.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask gate")]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,

    /// What it is held to.
    #[arg(long, default_value = "benches/gate.json")]
    baseline: PathBuf,

    /// Hold it to what this build of the same program counts, instead.
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,

    /// Write the baseline anew.
    #[arg(long)]
    update: bool,

    /// Only print what was counted, as JSON.
    #[arg(long)]
    json: bool,

    /// Percent that a row may have more than before.
    #[arg(long, default_value_t = 3.0)]
    tolerance: f64,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Runs one row, for callgrind to count.
    #[command(hide = true)]
    Row { row: usize },
}

/// What is counted.
#[derive(Debug, Clone, Copy)]
struct Row {
    shape: Shape,
    write: bool,
    /// Blocks in a request.
    blocks: u64,
    depth: u32,
    /// Requests: so many that what happens once in a while shows.
    count: u64,
}

impl Row {
    fn name(self) -> String {
        let Self { shape, write, blocks, depth, .. } = self;
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
            rows.push(Row { shape, write, blocks: 1, depth: 32, count: 2_000 });
        }
    }
    for write in [false, true] {
        let row = Row { shape: Shape::Remote(3), write, blocks: 1, depth: 1, count: 500 };
        // One that is alone in its turn shares nothing with others; a long one is copied and hashed.
        rows.extend([row, Row { blocks: 32, depth: 16, count: 64, ..row }]);
    }
    rows
}

/// What callgrind counts. It is found by its name.
#[inline(never)]
fn counted(cluster: &mut Cluster, op: IoOp, count: u64) {
    cluster.run(op, count);
}

fn run_row(at: usize) -> Result<()> {
    let row = *rows().get(at).context("there is no such row")?;
    let mut cluster = Cluster::new(row.shape, row.depth, row.blocks);
    cluster.run(row.op(), row.count / 4);
    cluster.count(true);
    counted(&mut cluster, row.op(), row.count);
    Ok(())
}

fn count(own: &Path, at: usize, row: Row) -> Result<u64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    command.args(["--toggle-collect=gate::counted*", "--toggle-collect=*memory::not_counted*"]);
    let output = command.arg(own).args(["row", &at.to_string()]).output();
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
    Ok(total / row.count)
}

/// Instructions for each request, by row.
type Counts = BTreeMap<String, u64>;

/// All rows, as many at a time as there are cores.
fn count_all() -> Result<Counts> {
    let own = std::env::current_exe()?;
    let work: Mutex<Vec<_>> = Mutex::new(rows().into_iter().enumerate().rev().collect());
    let found = Mutex::new(Counts::new());
    let worker = || -> Result<()> {
        loop {
            let next = work.lock().map_err(|_| anyhow!("another thread panicked"))?.pop();
            let Some((at, row)) = next else { return Ok(()) };
            let counted = count(&own, at, row)?;
            found
                .lock()
                .map_err(|_| anyhow!("another thread panicked"))?
                .insert(row.name(), counted);
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores.min(4)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| anyhow!("a thread panicked"))?)
    })?;
    found.into_inner().map_err(|_| anyhow!("a thread panicked"))
}

/// What was counted, and what the counts depend on besides the code.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    made_with: String,
    instructions: Counts,
}

/// The compiler, the counter and the C library, whose memcpy counts.
fn made_with() -> String {
    let version = |program: &str, argument: &str| {
        let output = Command::new(program).arg(argument).output();
        let said = output.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
        said.unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned()
    };
    #[cfg(target_arch = "x86_64")]
    let wide = if std::arch::is_x86_feature_detected!("avx2") { "avx2" } else { "no avx2" };
    #[cfg(not(target_arch = "x86_64"))]
    let wide = std::env::consts::ARCH;
    let parts = [version("rustc", "--version"), version("valgrind", "--version")];
    format!("{}, {}, {wide}", parts.join(", "), version("getconf", "GNU_LIBC_VERSION"))
}

/// By what percentage a row has more than before.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn more(before: u64, now: u64) -> f64 {
    (now as f64 / before as f64 - 1.0) * 100.0
}

/// Prints the table, and how many rows passed, failed and were skipped.
fn compare(before: &Counts, now: &Counts, tolerance: f64) -> (usize, usize, usize) {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    println!("{:46} {:>10} {:>10} {:>9}", "instructions a request", "before", "now", "more");
    for (name, &now) in now {
        let Some(&before) = before.get(name) else {
            println!("{name:46} {:>10} {now:>10}", "-");
            skipped += 1;
            continue;
        };
        let more = more(before, now);
        let verdict = if more > tolerance {
            failed += 1;
            "TOO MANY"
        } else {
            passed += 1;
            if more < -tolerance { "fewer: keep it with --update" } else { "" }
        };
        println!("{name:46} {before:>10} {now:>10} {more:>8.2}%  {verdict}");
    }
    (passed, failed, skipped)
}

fn gate(args: &Args) -> Result<bool> {
    let now = count_all()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&now)?);
        return Ok(true);
    }
    let made_with = made_with();
    if args.update {
        let baseline = Baseline { made_with, instructions: now };
        let text = serde_json::to_string_pretty(&baseline)? + "\n";
        std::fs::write(&args.baseline, text)
            .with_context(|| format!("cannot write {}", args.baseline.display()))?;
        println!("{} is written anew", args.baseline.display());
        return Ok(true);
    }
    let before = if let Some(program) = &args.against {
        let output = Command::new(program).arg("--json").output();
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        if !output.status.success() {
            bail!("{}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout)?
    } else {
        let text = std::fs::read_to_string(&args.baseline)
            .with_context(|| format!("cannot read {}", args.baseline.display()))?;
        let baseline: Baseline = serde_json::from_str(&text)?;
        if baseline.made_with != made_with {
            println!("the baseline was counted with {}", baseline.made_with);
            println!(
                "here it is {made_with}; `cargo xtask gate --base COMMIT` compares all the same"
            );
            println!("0 passed, 0 failed, {} skipped", now.len());
            return Ok(true);
        }
        baseline.instructions
    };
    let (passed, failed, skipped) = compare(&before, &now, args.tolerance);
    if failed > 0 {
        println!(
            "requests take more than {} % more instructions than before. Make them fewer; or say why it is worth \
             it, and run `cargo xtask gate --update`",
            args.tolerance
        );
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.part {
        Some(Part::Row { row }) => run_row(*row).map(|()| true),
        None => gate(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(&str, u64)]) -> Counts {
        of.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn a_row_that_grew_fails_and_one_that_is_new_is_skipped() {
        let before = counts(&[("a", 1000), ("b", 1000), ("c", 1000)]);
        let now = counts(&[("a", 1029), ("b", 1031), ("c", 900), ("d", 7)]);
        assert_eq!(compare(&before, &now, 3.0), (2, 1, 1));
    }

    #[test]
    fn rows_have_names_of_their_own() {
        let names: std::collections::BTreeSet<String> = rows().into_iter().map(Row::name).collect();
        assert_eq!(names.len(), rows().len());
    }
}
