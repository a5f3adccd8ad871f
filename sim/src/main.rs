#![forbid(unsafe_code)]
//! Runs the simulator over many seeds: `cairn-sim [--seeds N] [--seed S] [--seconds T] [--trace]`, and with
//! the feature `mutants` over deliberate bugs: `cairn-sim --mutants`.

use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cairn_sim::scenario::{self, Focus, Outcome};
use cairn_sim::world::Sink;

#[cfg(feature = "mutants")]
mod hunt;

const USAGE: &str = "usage: cairn-sim [--seeds N] [--seed S] [--seconds T] [--jobs J] [--trace] [--focus F | --plain] [--mutants [NAME]]
  --seeds N    run N seeds (default 1000)
  --seed S     begin at seed S (default 0); alone: run only that one
  --seconds T  begin no more seeds after so long
  --jobs J     run so many at once (default 2)
  --trace      print a line for each event that matters (with --seed alone)
  --focus F    all seeds about this: everything, rebuild, takeover, power, reconcile, churn, standby, lone,
               restore, disks, shards, initiators or whole
  --plain      no seed about anything, and members as volumes are made with
  --mutants    with each deliberate bug, or the one of this name, run seeds until it is caught: at most N
               (default 2000), at most T seconds for each (default 120)";

/// What seeds are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Drawn,
    This(Focus),
    Plain,
}

impl fmt::Display for About {
    /// The flag that asks for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drawn => Ok(()),
            Self::This(focus) => write!(f, " --focus {}", format!("{focus:?}").to_lowercase()),
            Self::Plain => f.write_str(" --plain"),
        }
    }
}

/// What was asked for.
#[derive(Debug)]
struct Options {
    first: u64,
    seeds: u64,
    seconds: Option<u64>,
    jobs: u64,
    trace: bool,
    mutants: Option<String>,
    about: About,
}

fn options() -> Result<Options, String> {
    let (mut first, mut seeds, mut seconds, mut jobs) = (None, None, None, 2);
    let (mut trace, mut mutants, mut about) = (false, None, About::Drawn);
    let mut args = std::env::args().skip(1).peekable();
    while let Some(arg) = args.next() {
        if arg == "--mutants" {
            mutants = Some(args.next_if(|name| !name.starts_with("--")).unwrap_or_default());
            continue;
        }
        if arg == "--focus" {
            let name = args.next().unwrap_or_default();
            let is = |f: &Focus| format!("{f:?}").eq_ignore_ascii_case(&name);
            about = About::This(Focus::ALL.into_iter().find(is).ok_or(USAGE.to_owned())?);
            continue;
        }
        if arg == "--plain" {
            about = About::Plain;
            continue;
        }
        let mut number = || {
            let text = args.next().ok_or(format!("{arg} needs a number"))?;
            text.parse::<u64>().map_err(|_| format!("`{text}` is no number"))
        };
        match arg.as_str() {
            "--seed" => first = Some(number()?),
            "--seeds" => seeds = Some(number()?),
            "--seconds" => seconds = Some(number()?),
            "--jobs" => jobs = number()?.max(1),
            "--trace" => trace = true,
            _ => return Err(USAGE.to_owned()),
        }
    }
    let usual = if mutants.is_some() { 2000 } else { 1000 };
    let usual = match (first, seconds) {
        (_, Some(_)) => u64::MAX,
        (Some(_), None) if mutants.is_none() => 1,
        _ => usual,
    };
    let seeds = seeds.unwrap_or(usual);
    Ok(Options { first: first.unwrap_or(0), seeds, seconds, jobs, trace, mutants, about })
}

fn print_line(now_ns: u64, line: std::fmt::Arguments<'_>) {
    println!("{:>12.3} ms  {line}", now_ns as f64 / 1e6);
}

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps what a panic says for the line about its seed.
fn note_panic(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("a panic");
    let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
    LAST_PANIC.with(|last| *last.borrow_mut() = format!("{text}{place}"));
}

/// Seeds that run, and since when.
static RUNNING: Mutex<Vec<(u64, About, Instant)>> = Mutex::new(Vec::new());
/// A seed takes a second or so.
const SEED_LIMIT: Duration = Duration::from_secs(40);

/// Ends the process where a seed does not end: nothing else stops a shard in an endless turn.
fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let running = RUNNING.lock().expect("nobody panics with it").clone();
        if let Some((seed, about, _)) =
            running.iter().find(|(_, _, since)| since.elapsed() > SEED_LIMIT)
        {
            let why = format!("[liveness] it does not end within {} s", SEED_LIMIT.as_secs());
            print_failure(*seed, *about, &why);
            std::process::exit(1);
        }
    }
}

fn print_failure(seed: u64, about: About, why: &str) {
    let why: String = why.chars().take(2500).collect();
    let commit = std::env::var("CAIRN_COMMIT").unwrap_or_else(|_| "unknown".to_owned());
    println!(
        "seed {seed} of commit {commit} FAILED: {why}\n  see it with: cargo xtask sim --seed {seed}{about} --trace"
    );
}

/// Runs one seed; what was wrong where something was.
fn run_seed(seed: u64, about: About, sink: Option<Sink>) -> Result<Outcome, String> {
    let run = || match about {
        About::Drawn => scenario::run(seed, sink),
        About::This(focus) => scenario::run_at(seed, focus, sink),
        About::Plain => scenario::run_plain(seed, sink),
    };
    RUNNING.lock().expect("nobody panics with it").push((seed, about, Instant::now()));
    let result = catch_unwind(AssertUnwindSafe(run));
    RUNNING.lock().expect("nobody panics with it").retain(|(other, ..)| *other != seed);
    result.map_err(|_| LAST_PANIC.with(RefCell::take))
}

#[derive(Debug, Default)]
struct Total {
    seeds: u64,
    failed: u64,
    acked: u64,
    judged: u64,
    faults: u64,
    healed: u64,
    converged: u64,
    changes: u64,
    forced: u64,
}

impl Total {
    fn add(&mut self, seed: u64, about: About, result: Result<Outcome, String>) {
        self.seeds += 1;
        match result {
            Ok(outcome) => {
                self.acked += outcome.acked;
                self.judged += outcome.judged;
                self.faults += outcome.faults;
                self.healed += outcome.healed;
                self.converged += outcome.converged;
                self.changes += outcome.changes;
                self.forced += outcome.forced;
            }
            Err(why) => {
                self.failed += 1;
                print_failure(seed, about, &why);
            }
        }
    }
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    std::panic::set_hook(Box::new(note_panic));
    std::thread::spawn(watch);
    if options.mutants.is_some() {
        #[cfg(feature = "mutants")]
        return hunt::run(&options);
        #[cfg(not(feature = "mutants"))]
        {
            eprintln!("built without the feature `mutants`; use: cargo xtask sim --mutants");
            return ExitCode::from(2);
        }
    }
    let start = Instant::now();
    let total = Mutex::new(Total::default());
    if options.trace || options.seeds == 1 {
        let sink = options.trace.then(|| Box::new(print_line) as Sink);
        let result = run_seed(options.first, options.about, sink);
        if let Ok(outcome) = &result {
            println!("{outcome:?}");
        }
        total.lock().expect("one thread").add(options.first, options.about, result);
    } else {
        run_all(&options, start, &total);
    }
    let total = total.into_inner().expect("no thread panics while it adds");
    println!(
        "{} seeds, {} failed; {} writes acked, {} blocks judged, {} faults, {} copies healed, {} writes \
         met a full pool, {} changes of members, {} forced starts, {:.1} s",
        total.seeds,
        total.failed,
        total.acked,
        total.judged,
        total.faults,
        total.healed,
        total.converged,
        total.changes,
        total.forced,
        start.elapsed().as_secs_f64()
    );
    let range = options.first..options.first.saturating_add(options.seeds);
    let open: Vec<_> = OPEN.iter().filter(|(seed, _)| range.contains(seed)).collect();
    for (seed, why) in &open {
        println!("skipped seed {seed}, which is open: {why}");
    }
    let passed = total.seeds - total.failed;
    println!("{passed} passed, {} failed, {} skipped", total.failed, open.len());
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Seeds that fail, and it is not known yet whether for a bug or for something that is asked wrongly. They are
/// left out of runs of many, and told as skipped; alone each runs.
const OPEN: [(u64, &str); 0] = [];

fn run_all(options: &Options, start: Instant, total: &Mutex<Total>) {
    let next = AtomicU64::new(options.first);
    let end = options.first.saturating_add(options.seeds);
    let limit = options.seconds.map(Duration::from_secs);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end || limit.is_some_and(|limit| start.elapsed() > limit) {
                return;
            }
            if options.about == About::Drawn && OPEN.iter().any(|(open, _)| *open == seed) {
                continue;
            }
            let result = run_seed(seed, options.about, None);
            total.lock().expect("no thread panics while it adds").add(seed, options.about, result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(work);
        }
    });
}
