//! Runs seeds with each deliberate bug until it is caught.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cairn_block::mutants::{Mutant, choose};

use crate::{Options, run_seed};

/// How one was caught.
struct Caught {
    seed: u64,
    tried: u64,
    why: String,
    took: Duration,
}

/// Hunts all of them, or the one that is named; fails where one survives.
pub(crate) fn run(options: &Options) -> ExitCode {
    let name = options.mutants.clone().unwrap_or_default();
    let all: Vec<Mutant> = Mutant::ALL
        .iter()
        .copied()
        .filter(|m| name.is_empty() || format!("{m:?}") == name)
        .collect();
    if all.is_empty() {
        eprintln!("there is no mutant `{name}`; there are: {:?}", Mutant::ALL);
        return ExitCode::from(2);
    }
    let alone = all.len() == 1;
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                while let Some(&mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = hunt(mutant, options);
                    print(mutant, found.as_ref(), alone);
                    rows.lock().expect("no thread panics here").push(found.is_some());
                }
            });
        }
    });
    let rows = rows.into_inner().expect("no thread panics here");
    let caught = rows.iter().filter(|caught| **caught).count();
    println!("{caught} of {} mutants were caught", rows.len());
    if caught == rows.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(mutant: Mutant, found: Option<&Caught>, whole: bool) {
    let name = format!("{mutant:?}");
    match found {
        Some(Caught { seed, tried, why, took }) => {
            // The name of a check, or the place of an assertion.
            let by = match (why.split_once(']'), why.rfind('(')) {
                (Some((name, _)), _) if name.starts_with('[') => name[1..].to_owned(),
                (_, Some(at)) => why[at..].to_owned(),
                _ => why.clone(),
            };
            println!(
                "{name:26} seed {seed:6}, {tried:5} tried, {:5.1} s  {by}",
                took.as_secs_f64()
            );
            if whole {
                println!("  {why}");
            }
        }
        None => println!("{name:26} SURVIVED: {}", mutant.what()),
    }
}

fn hunt(mutant: Mutant, options: &Options) -> Option<Caught> {
    let start = Instant::now();
    let limit = Duration::from_secs(options.seconds.unwrap_or(120));
    let most = options.seeds.min(1 << 32);
    let tried = AtomicU64::new(0);
    for seed in options.first..options.first.saturating_add(most) {
        if start.elapsed() > limit {
            return None;
        }
        choose(Some(mutant));
        let result = run_seed(seed, None);
        choose(None);
        let tried = tried.fetch_add(1, Ordering::Relaxed) + 1;
        if let Err(why) = result {
            return Some(Caught { seed, tried, why, took: start.elapsed() });
        }
    }
    None
}
