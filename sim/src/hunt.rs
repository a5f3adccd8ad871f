//! Runs seeds with each deliberate bug until it is caught.

use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cairn_block::mutants::{Mutant, choose};

use cairn_sim::scenario::Focus;

use crate::{About, Options, print_failure, run_seed};

/// How one was caught.
struct Caught {
    seed: String,
    tried: String,
    by: String,
    took: Duration,
}

/// Hunts all of them, each in a process of its own; fails where one survives. With a name, hunts that one in
/// this process.
pub(crate) fn run(options: &Options) -> ExitCode {
    let name = options.mutants.clone().unwrap_or_default();
    if let Some(&mutant) = Mutant::ALL.iter().find(|m| format!("{m:?}") == name) {
        return hunt(mutant, options);
    }
    if !name.is_empty() {
        eprintln!("there is no mutant `{name}`; there are: {:?}", Mutant::ALL);
        return ExitCode::from(2);
    }
    let next = AtomicUsize::new(0);
    let rows = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                while let Some(&mutant) = Mutant::ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = hunt_elsewhere(mutant, options);
                    print(mutant, found.as_ref());
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

fn print(mutant: Mutant, found: Option<&Caught>) {
    let name = format!("{mutant:?}");
    match found {
        Some(Caught { seed, tried, by, took, .. }) => {
            println!(
                "{name:26} seed {seed:>6}, {tried:>5} tried, {:5.1} s  {by}",
                took.as_secs_f64()
            );
        }
        None => println!("{name:26} SURVIVED: {}", mutant.what()),
    }
}

/// What the seeds are about in which one is hunted that hardly shows elsewhere.
fn haunt(mutant: Mutant) -> Option<Focus> {
    match mutant {
        Mutant::StandbyIgnoresLeases | Mutant::HandOverDoesNotDrain => Some(Focus::Standby),
        Mutant::HoldsNothing | Mutant::ReservationsForgotten | Mutant::ReservationsNotStored => {
            Some(Focus::Initiators)
        }
        Mutant::JoinerNotAwaited | Mutant::JoinBeforeFlush | Mutant::NoLock => Some(Focus::Rebuild),
        Mutant::LeaseFromAnswer
        | Mutant::NoLease
        | Mutant::TakeoverDoesNotWait
        | Mutant::NoFence => Some(Focus::Takeover),
        Mutant::NoDrain
        | Mutant::ReadOvertakes
        | Mutant::ReadOvertaken
        | Mutant::ReadBeforeReconcile => Some(Focus::Reconcile),
        Mutant::AtomicInPlace | Mutant::UndoForgotten => Some(Focus::Whole),
        Mutant::SettleWithoutDrain
        | Mutant::SettleWithoutFlush
        | Mutant::CandidateStays
        | Mutant::IgnoreFua
        | Mutant::LossNotTold => Some(Focus::Power),
        Mutant::StaleExtent | Mutant::SnapshotLetsWriteThrough => Some(Focus::Churn),
        Mutant::LostReadsAsZeros => Some(Focus::Disks),
        _ => None,
    }
}

/// Runs seeds until one fails, and says so as any failure of a seed. One that fails without the bug, too, has
/// caught nothing.
fn hunt(mutant: Mutant, options: &Options) -> ExitCode {
    let start = Instant::now();
    let limit = Duration::from_secs(options.seconds.unwrap_or(120));
    let most = options.seeds.min(1 << 32);
    let about = match (options.about, haunt(mutant)) {
        (About::Drawn, Some(focus)) => About::This(focus),
        (about, _) => about,
    };
    for seed in options.first..options.first.saturating_add(most) {
        if start.elapsed() > limit {
            break;
        }
        choose(Some(mutant));
        let result = run_seed(seed, about, None);
        choose(None);
        let Err(why) = result else { continue };
        if run_seed(seed, about, None).is_err() {
            println!("seed {seed} fails without {mutant:?}, too");
            continue;
        }
        print_failure(seed, about, &why);
        return ExitCode::FAILURE;
    }
    println!("{mutant:?} survived");
    ExitCode::SUCCESS
}

/// An endless loop ends the process that it is in.
fn hunt_elsewhere(mutant: Mutant, options: &Options) -> Option<Caught> {
    let start = Instant::now();
    let this = std::env::current_exe().expect("the program knows where it is");
    let mut command = Command::new(this);
    command.args(["--mutants", &format!("{mutant:?}")]);
    command.args(["--seed", &options.first.to_string(), "--seeds", &options.seeds.to_string()]);
    command.args(["--seconds", &options.seconds.unwrap_or(120).to_string()]);
    command.args(options.about.to_string().split_whitespace());
    let output = command.output().expect("it can be run again");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| line.contains(" FAILED: "))?;
    let (head, why) = line.split_once(" FAILED: ")?;
    let seed = head.split(' ').nth(1)?.to_owned();
    let tried = seed.parse::<u64>().ok()? - options.first + 1;
    // The name of a check, or the place of an assertion.
    let by = match (why.split_once(']'), why.rfind('(')) {
        (Some((name, _)), _) if name.starts_with('[') => name[1..].to_owned(),
        (_, Some(at)) => why[at..].to_owned(),
        _ => why.to_owned(),
    };
    Some(Caught { seed, tried: tried.to_string(), by, took: start.elapsed() })
}
