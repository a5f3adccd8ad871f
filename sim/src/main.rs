#![forbid(unsafe_code)]
//! Runs the simulator over many seeds: `cairn-sim [--seeds N] [--seed S] [--trace]`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use cairn_sim::scenario::{self, Outcome};
use cairn_sim::world::Sink;

const USAGE: &str = "usage: cairn-sim [--seeds N] [--seed S] [--trace]
  --seeds N  run N seeds (default 1000)
  --seed S   begin at seed S (default 0); alone: run only that one
  --trace    print a line for each event that matters";

struct Options {
    first: u64,
    seeds: u64,
    trace: bool,
}

fn options() -> Result<Options, String> {
    let (mut first, mut seeds, mut trace) = (None, None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || {
            let text = args.next().ok_or(format!("{arg} needs a number"))?;
            text.parse::<u64>().map_err(|_| format!("`{text}` is no number"))
        };
        match arg.as_str() {
            "--seed" => first = Some(number()?),
            "--seeds" => seeds = Some(number()?),
            "--trace" => trace = true,
            _ => return Err(USAGE.to_owned()),
        }
    }
    let seeds = seeds.unwrap_or(if first.is_some() { 1 } else { 1000 });
    Ok(Options { first: first.unwrap_or(0), seeds, trace })
}

fn print_line(now_ns: u64, line: std::fmt::Arguments<'_>) {
    println!("{:>12.3} ms  {line}", now_ns as f64 / 1e6);
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let (mut failed, mut acked, mut judged, mut faults) = (0u64, 0, 0, 0);
    let (mut healed, mut converged) = (0, 0);
    for seed in options.first..options.first.saturating_add(options.seeds) {
        let sink = options.trace.then(|| Box::new(print_line) as Sink);
        match catch_unwind(AssertUnwindSafe(|| scenario::run(seed, sink))) {
            Ok(outcome) => {
                let Outcome { trace_hash, steps, virtual_ms, .. } = outcome;
                acked += outcome.acked;
                judged += outcome.judged;
                faults += outcome.faults;
                healed += outcome.healed;
                converged += outcome.converged;
                if options.seeds == 1 {
                    println!("{outcome:?}");
                    println!("seed {seed}: {steps} events, {virtual_ms} ms, {trace_hash:016x}");
                }
            }
            Err(_) => {
                failed += 1;
                println!("seed {seed} FAILED; see it with: cairn-sim --seed {seed} --trace");
            }
        }
    }
    println!(
        "{} seeds, {failed} failed; {acked} writes acked, {judged} blocks judged, {faults} faults, \
         {healed} copies healed, {converged} writes met a full pool, {:.1} s",
        options.seeds,
        start.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
