//! The in-process runner: mutates each target's seeds for a while and reports what panics.
//!
//! There is no coverage to steer by on stable Rust. What stands in for it is seeds that reach deep
//! (each target brings well-formed inputs) and a corpus that keeps a share of the mutated ones, so
//! that changes pile up over a run.
#![forbid(unsafe_code)]

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cairn_fuzz::mutate::mutate;
use cairn_fuzz::{Target, targets};
use clap::Parser;
use fastrand::Rng;

/// Feeds mutated inputs to the decoders; the last line is `N passed, N failed, N skipped`.
#[derive(Debug, Parser)]
struct Args {
    /// Run only this target; may be given again.
    #[arg(long, value_name = "NAME")]
    target: Vec<String>,
    /// For how long each target runs.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// For how long all targets run together, in equal shares.
    #[arg(long, conflicts_with = "seconds")]
    total_seconds: Option<f64>,
    /// Starts the sequence of inputs; the default is the same every time.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this one input instead, without catching the panic.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
    /// List the targets and exit.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("fuzz: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let all = targets();
    if let Some(wrong) = args.target.iter().find(|n| !all.iter().any(|t| t.name == **n)) {
        bail!("there is no target '{wrong}'; --list names them");
    }
    let chosen: Vec<_> = all
        .iter()
        .filter(|t| args.target.is_empty() || args.target.iter().any(|n| n == t.name))
        .collect();
    if args.list {
        chosen.iter().for_each(|t| println!("{}", t.name));
        return Ok(true);
    }
    if let Some(file) = &args.input {
        let input = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        chosen.iter().for_each(|t| (t.run)(&input));
        println!("{} bytes ran without a panic", input.len());
        return Ok(true);
    }

    panic::set_hook(Box::new(|info| {
        let mut message = PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *message = info.to_string();
    }));
    #[expect(clippy::cast_precision_loss, reason = "a handful of targets")]
    let share = args.total_seconds.map_or(args.seconds, |t| t / chosen.len().max(1) as f64);
    let share = Duration::try_from_secs_f64(share).context("not a time")?;
    let mut failed = 0;
    for target in &chosen {
        let found = fuzz(target, args.seed, share);
        println!(
            "{:32} {:>10} execs {:>9.0}/s  {}",
            target.name,
            found.execs,
            found.rate,
            if found.panic.is_some() { "PANIC" } else { "ok" }
        );
        if let Some(found) = found.panic {
            failed += 1;
            report(target, &found)?;
        }
    }
    println!("{} passed, {failed} failed, 0 skipped", chosen.len() - failed);
    Ok(failed == 0)
}

/// What the last panic said. The hook may run on any thread that a target starts.
static PANIC: Mutex<String> = Mutex::new(String::new());

struct Found {
    execs: u64,
    /// Executions per second.
    rate: f64,
    panic: Option<Panic>,
}

struct Panic {
    input: Vec<u8>,
    message: String,
}

/// Inputs kept beside the seeds; older ones make room.
const CORPUS_LEN: usize = 512;

fn fuzz(target: &Target, seed: u64, time: Duration) -> Found {
    // Each target has a sequence of its own, whichever others run.
    let mut rng = Rng::with_seed(seed ^ fnv(target.name.as_bytes()));
    let seeds = (target.seeds)();
    let mut corpus = if seeds.is_empty() { vec![Vec::new()] } else { seeds };
    let fixed = corpus.len();
    let began = Instant::now();
    let mut execs = 0_u64;
    let mut panic = corpus.iter().find_map(|input| attempt(target, input));
    while panic.is_none() && began.elapsed() < time {
        let input = mutate(&mut rng, &corpus, target.words);
        panic = attempt(target, &input);
        execs += 1;
        if rng.u32(..64) == 0 {
            if corpus.len() < fixed + CORPUS_LEN {
                corpus.push(input);
            } else {
                let at = fixed + rng.usize(..CORPUS_LEN);
                corpus[at] = input;
            }
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate for people to read")]
    let rate = execs as f64 / began.elapsed().as_secs_f64();
    let panic = panic.map(|found| shrink(target, found));
    Found { execs, rate, panic }
}

fn attempt(target: &Target, input: &[u8]) -> Option<Panic> {
    panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input))).err()?;
    let message = PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    Some(Panic { input: input.to_vec(), message })
}

/// Takes stretches out for as long as it still panics; at most this many tries.
const SHRINK_TRIES: usize = 2_000;

fn shrink(target: &Target, mut found: Panic) -> Panic {
    let mut tries = 0;
    let mut length = found.input.len() / 2;
    while length > 0 {
        let mut at = 0;
        while at + length <= found.input.len() && tries < SHRINK_TRIES {
            let mut shorter = found.input.clone();
            shorter.drain(at..at + length);
            tries += 1;
            match attempt(target, &shorter) {
                Some(smaller) => found = smaller,
                None => at += length,
            }
        }
        length /= 2;
    }
    found
}

fn report(target: &Target, found: &Panic) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no repository root")?;
    let dir = root.join("target/fuzz-failures");
    fs::create_dir_all(&dir)?;
    let file = dir.join(format!("{}-{:016x}", target.name, fnv(&found.input)));
    fs::write(&file, &found.input)?;
    println!("    {}", found.message.replace('\n', "\n    "));
    println!("    {} bytes saved; replay with:", found.input.len());
    let (name, file) = (target.name, file.display());
    println!("    cargo run -p cairn-fuzz -- --target {name} --input {file}");
    Ok(())
}

/// FNV-1a.
fn fnv(bytes: &[u8]) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325_u64;
    bytes.iter().fold(start, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails_on_ff(bytes: &[u8]) {
        assert!(!bytes.contains(&0xff), "an ff");
    }

    #[test]
    fn a_panic_is_found_and_made_small() {
        let target = Target::new("ff", fails_on_ff, || vec![vec![0x7f; 64]]);
        let found = fuzz(&target, 1, Duration::from_secs(20));
        assert_eq!(found.panic.expect("not found").input, [0xff]);
    }
}
