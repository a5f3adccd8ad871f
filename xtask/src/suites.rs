//! The test suites: one table, one runner, one summary. The local gate and CI are the same.

use std::cell::OnceCell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;

use crate::process::{self, cargo, cargo_has, is_root};
use crate::{gate as counting, install, iscsi as conformance, nemesis as torment};

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run only this suite; may be given again.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// List the suites and exit.
    #[arg(long)]
    list: bool,
    /// Keep the logs of suites that passed.
    #[arg(long)]
    keep_logs: bool,
}

struct Suite {
    name: &'static str,
    what: &'static str,
    run: fn(&Bench) -> Result<Counts>,
}

const SUITES: &[Suite] = &[
    Suite { name: "fmt", what: "cargo fmt --check", run: fmt },
    Suite { name: "clippy", what: "cargo clippy, warnings denied", run: clippy },
    Suite { name: "tidy", what: "cargo xtask tidy", run: tidy },
    Suite { name: "unit", what: "unit, property and doc tests", run: unit },
    Suite { name: "doc", what: "cargo doc, warnings denied", run: doc },
    Suite { name: "deny", what: "licences, sources, advisories", run: deny },
    Suite { name: "fuzz", what: "each fuzz target for a few seconds", run: fuzz },
    Suite { name: "crash", what: "the pool, crashed and recovered", run: crash },
    Suite { name: "sim", what: "simulated clusters from seeds, for a few minutes", run: sim },
    Suite { name: "check", what: "cairn up --check", run: check },
    Suite { name: "rot", what: "bits flipped in a running cluster's pools", run: rot },
    Suite { name: "iscsi", what: "libiscsi's conformance tests", run: iscsi },
    Suite { name: "gate", what: "instructions a request, against the baseline", run: gate },
    Suite { name: "nemesis", what: "real processes killed, stopped, cut off", run: nemesis },
    Suite { name: "guest", what: "a Linux guest uses a volume", run: guest },
];

/// Tests by result.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Why something was skipped, or what failed.
    note: String,
}

impl Counts {
    fn one_passed() -> Self {
        Self { passed: 1, ..Self::default() }
    }

    fn one_failed(note: impl Into<String>) -> Self {
        Self { failed: 1, note: note.into(), ..Self::default() }
    }

    fn skipped(count: usize, why: impl Into<String>) -> Self {
        Self { skipped: count.max(1), note: why.into(), ..Self::default() }
    }

    /// A suite that counts as one test, by how its command ended.
    fn of(passed: bool) -> Self {
        if passed { Self::one_passed() } else { Self::one_failed("") }
    }

    /// A command that counts its own tests must agree with its exit code.
    fn checked(mut self, ended_well: bool) -> Self {
        if !ended_well && self.failed == 0 {
            self.failed = 1;
            "it ended with a failure".clone_into(&mut self.note);
        }
        self
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        if self.note.is_empty() {
            self.note.clone_from(&other.note);
        }
    }

    fn verdict(&self) -> &'static str {
        match (self.failed, self.passed) {
            (0, 0) => "skipped",
            (0, _) => "ok",
            _ => "FAILED",
        }
    }
}

/// Where one suite runs.
struct Bench<'a> {
    root: &'a Path,
    target: &'a Path,
    log: PathBuf,
    keep_logs: bool,
    /// Whether the release build of cairn worked; made once, by the first suite that needs it.
    release: &'a OnceCell<bool>,
}

/// How long the simulator begins new seeds, and how many at most.
const SIM_SECONDS: u64 = 120;
const SIM_SEEDS: u64 = 4_500;
/// The same, about each of what no seed draws by itself.
const SIM_FOCUS_SECONDS: u64 = 30;
const BUILD_LIMIT: Duration = Duration::from_secs(1_800);

impl Bench<'_> {
    fn run(&self, command: &mut Command, limit: Duration) -> Result<bool> {
        Ok(process::run(command.current_dir(self.root), &self.log, limit)?.success())
    }

    fn cargo(&self, args: &[&str]) -> Result<bool> {
        self.run(Command::new(cargo()).args(args), BUILD_LIMIT)
    }

    fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The release build of cairn.
    fn cairn(&self) -> Result<PathBuf> {
        let built = match self.release.get() {
            Some(built) => *built,
            None => {
                let built = self.cargo(&["build", "--release", "-p", "cairn"])?;
                *self.release.get_or_init(|| built)
            }
        };
        if !built {
            bail!("the release build of cairn fails");
        }
        Ok(self.target.join("release/cairn"))
    }
}

/// Runs the suites; whether none failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        SUITES.iter().for_each(|suite| println!("{:8}{}", suite.name, suite.what));
        return Ok(true);
    }
    if let Some(wrong) = options.only.iter().find(|o| !SUITES.iter().any(|s| s.name == **o)) {
        bail!("there is no suite '{wrong}'; --list names them");
    }
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata failed")?;
    let root = metadata.workspace_root.as_std_path();
    let target = metadata.target_directory.as_std_path();
    let logs = target.join("xtask-logs");
    fs::create_dir_all(&logs)?;
    let release = OnceCell::new();

    let mut rows = Vec::new();
    for suite in SUITES.iter().filter(|s| options.only.is_empty() || wanted(s, &options.only)) {
        let log = logs.join(format!("{}.log", suite.name));
        let _ = fs::remove_file(&log);
        let bench = Bench { root, target, log, keep_logs: options.keep_logs, release: &release };
        print!("{:8}{} ... ", suite.name, suite.what);
        std::io::stdout().flush()?;
        let began = Instant::now();
        let counts = (suite.run)(&bench).unwrap_or_else(|e| Counts::one_failed(format!("{e:#}")));
        let time = began.elapsed();
        println!("{} ({:.1} s)", counts.verdict(), time.as_secs_f64());
        if counts.failed > 0 {
            show_tail(&bench, &counts);
        } else if !options.keep_logs {
            let _ = fs::remove_file(&bench.log);
        }
        rows.push((suite.name, counts, time));
    }
    Ok(summary(&rows))
}

fn wanted(suite: &Suite, only: &[String]) -> bool {
    only.iter().any(|o| o == suite.name)
}

fn show_tail(bench: &Bench, counts: &Counts) {
    const SHOWN: usize = 60;
    let output = bench.output();
    let lines: Vec<_> = output.lines().collect();
    println!("---- {} ends:", bench.log.display());
    for line in &lines[lines.len().saturating_sub(SHOWN)..] {
        println!("| {line}");
    }
    println!("---- {}", counts.note);
}

fn summary(rows: &[(&str, Counts, Duration)]) -> bool {
    let mut total = Counts::default();
    println!(
        "\n{:8} {:8} {:>8} {:>7} {:>7} {:>8}  note",
        "suite", "result", "time", "passed", "failed", "skipped"
    );
    for (name, counts, time) in rows {
        total.add(counts);
        let Counts { passed, failed, skipped, note } = counts;
        let (verdict, time) = (counts.verdict(), format!("{:.1} s", time.as_secs_f64()));
        let note = note.lines().next().unwrap_or_default();
        println!("{name:8} {verdict:8} {time:>8} {passed:>7} {failed:>7} {skipped:>8}  {note}");
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    total.failed == 0
}

fn fmt(bench: &Bench) -> Result<Counts> {
    if !cargo_has("fmt") {
        return Ok(Counts::skipped(1, "rustfmt is not installed (rustup component add rustfmt)"));
    }
    bench.cargo(&["fmt", "--all", "--check"]).map(Counts::of)
}

fn clippy(bench: &Bench) -> Result<Counts> {
    if !cargo_has("clippy") {
        return Ok(Counts::skipped(1, "clippy is not installed (rustup component add clippy)"));
    }
    let args = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    bench.cargo(&args).map(Counts::of)
}

fn tidy(bench: &Bench) -> Result<Counts> {
    let mut this = Command::new(std::env::current_exe()?);
    bench.run(this.arg("tidy"), Duration::from_secs(60)).map(Counts::of)
}

/// nextest where it is installed; it leaves out doc tests, which plain cargo runs after it.
fn unit(bench: &Bench) -> Result<Counts> {
    if !cargo_has("nextest") {
        let ended = bench.cargo(&["test", "--workspace", "--no-fail-fast"])?;
        return Ok(test_result_lines(&bench.output()).checked(ended));
    }
    let run = ["nextest", "run", "--workspace", "--no-fail-fast", "--no-tests=pass"];
    let ended = bench.cargo(&[&run[..], &["--color=never"]].concat())?;
    let mut counts = nextest_summary(&bench.output()).checked(ended);
    let before = bench.output().len();
    let ended = bench.cargo(&["test", "--workspace", "--doc", "--no-fail-fast"])?;
    let said = bench.output();
    counts.add(&test_result_lines(&said[before..]).checked(ended));
    Ok(counts)
}

fn doc(bench: &Bench) -> Result<Counts> {
    let mut doc = Command::new(cargo());
    doc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
    bench.run(&mut doc, BUILD_LIMIT).map(Counts::of)
}

fn deny(bench: &Bench) -> Result<Counts> {
    if !cargo_has("deny") {
        return Ok(Counts::skipped(1, "cargo-deny is not installed (cargo install cargo-deny)"));
    }
    let mut counts = Counts::of(bench.cargo(&["deny", "check", "bans", "licenses", "sources"])?);
    let advisories = bench.cargo(&["deny", "check", "advisories"])?;
    // The data base is fetched from outside; a machine without a way there checks the rest.
    let unreachable = !advisories && bench.output().contains("failed to fetch advisory database");
    counts.add(&match unreachable {
        true => Counts::skipped(1, "advisories: their data base could not be fetched"),
        false => Counts::of(advisories),
    });
    Ok(counts)
}

fn fuzz(bench: &Bench) -> Result<Counts> {
    let ended = bench.cargo(&["run", "-q", "-p", "cairn-fuzz", "--", "--total-seconds", "20"])?;
    Ok(last_line(&bench.output()).checked(ended))
}

fn crash(bench: &Bench) -> Result<Counts> {
    let tester = ["run", "-q", "-p", "cairn-fuzz", "--bin", "crash", "--"];
    let options = ["--exhaustive", "1", "--states", "3000"];
    bench.cargo(&[&tester[..], &options].concat()).map(Counts::of)
}

fn sim(bench: &Bench) -> Result<Counts> {
    let (seconds, seeds) = (SIM_SECONDS.to_string(), SIM_SEEDS.to_string());
    let args = ["run", "-q", "--release", "-p", "cairn-sim", "--", "--seconds", &seconds];
    let ended = bench.cargo(&[&args[..], &["--seeds", &seeds]].concat())?;
    let mut counts = last_line(&bench.output()).checked(ended);
    let seconds = SIM_FOCUS_SECONDS.to_string();
    for focus in ["standby", "initiators", "whole"] {
        let args = ["run", "-q", "--release", "-p", "cairn-sim", "--", "--focus", focus];
        let ended =
            bench.cargo(&[&args[..], &["--seconds", &seconds, "--seeds", &seeds]].concat())?;
        counts.add(&last_line(&bench.output()).checked(ended));
    }
    Ok(counts)
}

fn check(bench: &Bench) -> Result<Counts> {
    let mut check = Command::new(bench.cairn()?);
    bench.run(check.args(["up", "--check"]), Duration::from_secs(600)).map(Counts::of)
}

fn rot(bench: &Bench) -> Result<Counts> {
    let mut rot = Command::new(bench.cairn()?);
    bench.run(rot.args(["up", "--rot", "60"]), Duration::from_secs(300)).map(Counts::of)
}

fn iscsi(bench: &Bench) -> Result<Counts> {
    if let Some(why) = install::provide(install::ISCSI, &bench.log)? {
        return Ok(Counts::skipped(1, why));
    }
    let cairn = bench.cairn()?;
    let outcome = conformance::run(&cairn, &bench.target.join("xtask-iscsi"), &bench.log)?;
    Ok(Counts {
        passed: outcome.passed,
        failed: outcome.failed.len(),
        skipped: outcome.excused,
        note: match outcome.failed.as_slice() {
            [] => format!(
                "{} tests are skipped in all, the others fail: see xtask/src/iscsi.rs",
                outcome.skipped
            ),
            failed => failed.join("; "),
        },
    })
}

fn gate(bench: &Bench) -> Result<Counts> {
    if let Some(why) = install::provide(install::GATE, &bench.log)? {
        return Ok(Counts::skipped(1, why));
    }
    if !bench.cargo(counting::BUILD)? {
        return Ok(Counts::one_failed("the program that counts does not build"));
    }
    let mut count = Command::new(bench.target.join("release/gate"));
    let ended = bench.run(&mut count, Duration::from_secs(600))?;
    let said = bench.output();
    let mut counts = last_line(&said).checked(ended);
    if counts.skipped > 0 {
        "counted with another compiler, valgrind or C library than the baseline"
            .clone_into(&mut counts.note);
    }
    Ok(counts)
}

fn nemesis(bench: &Bench) -> Result<Counts> {
    if !is_root() {
        return Ok(Counts::skipped(1, "needs root, for network namespaces"));
    }
    if let Some(why) = install::provide(install::NEMESIS, &bench.log)? {
        return Ok(Counts::skipped(1, why));
    }
    let built = torment::build(|args| bench.cargo(args))?;
    let mut run = built.command(&["--minutes", "1", "--seed", "1"]);
    let ended = bench.run(&mut run, Duration::from_secs(400))?;
    let said = bench.output();
    let mut counts = last_line(&said).checked(ended);
    if counts.skipped > 0 {
        let why = said.lines().rfind(|line| line.starts_with("nemesis: ")).unwrap_or_default();
        counts.note = why.trim_start_matches("nemesis: ").to_owned();
    }
    Ok(counts)
}

fn guest(bench: &Bench) -> Result<Counts> {
    if !bench.cargo(&["build", "-p", "cairn-tests"])? {
        return Ok(Counts::one_failed("the harness does not build"));
    }
    let harness = bench.target.join("debug/guest");
    let listed = Command::new(&harness).arg("--list").output().context("guest --list failed")?;
    let cases = String::from_utf8_lossy(&listed.stdout).lines().count();
    if !is_root() {
        return Ok(Counts::skipped(cases, "needs root, for network namespaces and TAP"));
    }
    if !process::installed("apt-get") {
        return Ok(Counts::skipped(cases, "needs apt: the guest is made of Debian packages"));
    }
    if let Some(why) = install::provide(install::GUEST, &bench.log)? {
        return Ok(Counts::skipped(cases, why));
    }
    let mut run = Command::new(&harness);
    run.arg("--cairn").arg(bench.cairn()?);
    if bench.keep_logs {
        run.arg("--keep");
    }
    let ended = bench.run(&mut run, Duration::from_secs(2_100))?;
    Ok(last_line(&bench.output()).checked(ended))
}

/// The number before `word` in a summary such as `3 passed, 1 failed`.
fn number_before(text: &str, word: &str) -> usize {
    let words: Vec<&str> =
        text.split(|c: char| c.is_whitespace() || c == ',' || c == ';').collect();
    let words: Vec<&str> = words.into_iter().filter(|w| !w.is_empty()).collect();
    let at = words.windows(2).find(|pair| pair[1] == word);
    at.and_then(|pair| pair[0].trim_start_matches('(').parse().ok()).unwrap_or(0)
}

/// `Summary [ 0.1s] 9 tests run: 8 passed (1 slow), 1 failed, 1 timed out, 0 skipped`
fn nextest_summary(output: &str) -> Counts {
    let line = output.lines().rfind(|l| l.trim_start().starts_with("Summary [")).unwrap_or("");
    Counts {
        passed: number_before(line, "passed"),
        failed: number_before(line, "failed") + number_before(line, "timed"),
        skipped: number_before(line, "skipped"),
        note: String::new(),
    }
}

/// `test result: ok. 8 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out`
fn test_result_lines(output: &str) -> Counts {
    let mut counts = Counts::default();
    for line in output.lines().filter(|l| l.starts_with("test result:")) {
        counts.passed += number_before(line, "passed");
        counts.failed += number_before(line, "failed");
        counts.skipped += number_before(line, "ignored");
    }
    counts
}

/// `N passed, N failed, N skipped`, as our own runners end.
fn last_line(output: &str) -> Counts {
    let line = output.lines().rfind(|l| l.contains(" passed, ")).unwrap_or("");
    Counts {
        passed: number_before(line, "passed"),
        failed: number_before(line, "failed"),
        skipped: number_before(line, "skipped"),
        note: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(counts: &Counts) -> [usize; 3] {
        [counts.passed, counts.failed, counts.skipped]
    }

    #[test]
    fn summaries_of_each_runner_are_read() {
        let nextest = "     Summary [   0.012s] 9 tests run: 7 passed (1 slow), 1 failed, 1 timed out, 2 skipped";
        assert_eq!(numbers(&nextest_summary(nextest)), [7, 2, 2]);
        let libtest = "test result: ok. 8 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                       test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured";
        assert_eq!(numbers(&test_result_lines(libtest)), [9, 2, 1]);
        assert_eq!(
            numbers(&last_line("case x passed\n3 passed, 1 failed, 2 skipped\n")),
            [3, 1, 2]
        );
    }

    #[test]
    fn a_runner_that_fails_without_a_failed_test_counts_as_one() {
        let counts = last_line("error: does not build").checked(false);
        assert_eq!(numbers(&counts), [0, 1, 0]);
        assert_eq!(last_line("2 passed, 1 failed, 0 skipped").checked(false).failed, 1);
    }

    #[test]
    fn nothing_run_is_no_pass() {
        assert_eq!(Counts::skipped(0, "why").verdict(), "skipped");
        assert_eq!(Counts::one_failed("").verdict(), "FAILED");
    }
}
