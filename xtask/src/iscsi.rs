//! The suite `iscsi`: libiscsi's conformance tests against a volume of three replicas on a fresh `cairn serve`.
//!
//! Their runner counts a test that was skipped as one that passed, so its output is read: what fails or is skipped has to
//! be on a list here, with the reason. Some suites are runs of their own: Sanitize, at one address, for with a second one it
//! leaves a reservation behind that keeps its last test out; ReadOnly, of a unit that initiators may not write to; and
//! PreventAllow and StartStopUnit, of one whose medium they may take out.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::process;

const IQN: &str = "iqn.2026-11.io.cairn:db";
/// The server answers within this time.
const START: Duration = Duration::from_secs(20);
/// A run takes so long at most; a minute is usual, and twice that for Sanitize, which sleeps.
const LIMIT: Duration = Duration::from_secs(400);
/// Fewer tests than this are skipped on blocks of 512 bytes, those that skip a part among them, in all the cases together
/// that make up the whole suite.
const SKIPPED_LIMIT: usize = 12;

/// While a sanitize goes on a test looks again after a minute, and meanwhile answers nobody.
const SLEEP: &str = "70s";
/// So slow that a sanitize of 256 MiB is still under way when that test looks for the last time, after 5 s.
const SANITIZE_RATE: &str = "32MiB";

/// What a run is about.
struct Case {
    name: &'static str,
    block_size: u32,
    /// With CHAP both ways, and digests of headers and data.
    secure: bool,
    read_only: bool,
    removable: bool,
    runs: &'static [Run],
    failures: &'static [(&'static str, &'static str)],
}

impl Case {
    /// Whether it runs all tests but those of suites that are cases of their own.
    fn is_most(&self) -> bool {
        !self.read_only && !self.removable
    }
}

/// Which tests are run.
struct Run {
    tests: &'static str,
    /// What their runner is told besides.
    flags: &'static [&'static str],
    /// How many addresses it is given.
    addresses: usize,
    /// Suites of it that are a run of their own.
    elsewhere: &'static [&'static str],
}

const ELSEWHERE: &[&str] = &["PreventAllow.", "ReadOnly.", "Sanitize.", "StartStopUnit."];

const WRITABLE: &[Run] = &[
    // The second address is for tests of two initiators.
    Run { tests: "ALL", flags: &[], addresses: 2, elsewhere: ELSEWHERE },
    Run { tests: "ALL.Sanitize", flags: &["--allow-sanitize"], addresses: 1, elsewhere: &[] },
];

const READ_ONLY: &[Run] =
    &[Run { tests: "ALL.ReadOnly", flags: &[], addresses: 1, elsewhere: &[] }];

const REMOVABLE: &[Run] = &[
    Run { tests: "ALL.PreventAllow", flags: &[], addresses: 2, elsewhere: &[] },
    Run { tests: "ALL.StartStopUnit", flags: &[], addresses: 1, elsewhere: &[] },
];

const ABORT: &str = "it fails before anything is sent, with every target";
const SMALL: &str = "before libiscsi 1.20 it sends 512 bytes, whatever a block has";

/// Tests that fail for a reason of theirs, on blocks of 512 bytes.
const FAILURES_512: &[(&str, &str)] = &[
    ("GetLBAStatus.UnmapSingle", "it asks for one block, and compares with one 4 KiB further on"),
    ("iSCSITMF.AbortTaskSimpleAsync", ABORT),
];

/// And of 4096.
const FAILURES_4096: &[(&str, &str)] = &[
    ("ProutReserve.AccessEA", SMALL),
    ("ProutReserve.AccessEAAR", SMALL),
    ("ProutReserve.AccessEARO", SMALL),
    ("ProutReserve.AccessWE", SMALL),
    ("ProutReserve.AccessWEAR", SMALL),
    ("ProutReserve.AccessWERO", SMALL),
    ("iSCSITMF.AbortTaskSimpleAsync", ABORT),
];

/// Tests that are skipped; a name that ends with a dot is a suite.
const SKIPS: &[(&str, &str)] = &[
    ("Sanitize.CryptoErase", CRYPTO),
    ("WriteSame10.ZeroBlocks", "WSNZ: a count of zero blocks is refused"),
    ("WriteSame16.ZeroBlocks", "WSNZ: a count of zero blocks is refused"),
    // Where a physical block is a logical one.
    ("CompareAndWrite.InvalidDataOutSize", "blocks of 4096 bytes"),
    ("WriteSame10.InvalidDataOutSize", "blocks of 4096 bytes"),
    ("WriteSame10.UnmapUnaligned", "blocks of 4096 bytes"),
    ("WriteSame16.InvalidDataOutSize", "blocks of 4096 bytes"),
    ("WriteSame16.UnmapUnaligned", "blocks of 4096 bytes"),
];

const CRYPTO: &str = "CRYPTOGRAPHIC ERASE is not offered";

/// Tests that skip a part of what they do.
const PARTS: &[(&str, &str)] = &[("Sanitize.Readonly", CRYPTO), ("Sanitize.Reservations", CRYPTO)];

const PLAIN: Case = Case {
    name: "512",
    block_size: 512,
    secure: false,
    read_only: false,
    removable: false,
    runs: WRITABLE,
    failures: FAILURES_512,
};

const CASES: &[Case] = &[
    PLAIN,
    Case { name: "512-secure", secure: true, ..PLAIN },
    Case { name: "4096", block_size: 4096, failures: FAILURES_4096, ..PLAIN },
    Case { name: "512-read-only", read_only: true, runs: READ_ONLY, failures: &[], ..PLAIN },
    Case { name: "512-removable", removable: true, runs: REMOVABLE, failures: &[], ..PLAIN },
];

/// What came of the tests of a run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    /// Those that are expected to fail, or to be skipped.
    pub(crate) excused: usize,
    /// Those of them that are skipped.
    pub(crate) skipped: usize,
    /// Those that passed, and skipped a part.
    pub(crate) parts: usize,
    pub(crate) failed: Vec<String>,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.excused += other.excused;
        self.skipped += other.skipped;
        self.parts += other.parts;
        self.failed.extend(other.failed);
    }
}

/// Runs all cases; each in a folder of its own below `scratch`.
pub(crate) fn run(cairn: &Path, scratch: &Path, log: &Path) -> Result<Outcome> {
    let mut all = Outcome::default();
    let mut skipped = Vec::new();
    // Tests of what takes its time wait for most of it, and each case has a server of its own.
    let told = thread::scope(|scope| {
        let run = |case| scope.spawn(move || run_case(cairn, case, scratch, log));
        let runs: Vec<_> = CASES.iter().map(run).collect();
        runs.into_iter().map(|run| run.join().map_err(|_| anyhow!("a case panicked"))?).collect()
    });
    let told: Result<Vec<Outcome>> = told;
    for (case, of) in CASES.iter().zip(told?) {
        let (name, tests, parts) = (case.name, of.skipped, of.parts);
        let line = format!("iscsi, case {name}: {tests} tests skipped, {parts} in part\n");
        fs::File::options().append(true).open(log)?.write_all(line.as_bytes())?;
        skipped.push((case, tests + parts));
        all.passed += of.passed;
        all.excused += of.excused;
        all.skipped += of.skipped;
        all.parts += of.parts;
        all.failed.extend(of.failed.into_iter().map(|test| format!("{name}: {test}")));
    }
    all.failed.extend(too_many_skipped(&skipped));
    Ok(all)
}

/// Runs one in a folder of its own.
fn run_case(cairn: &Path, case: &Case, scratch: &Path, log: &Path) -> Result<Outcome> {
    let folder = scratch.join(case.name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let told =
        conform(cairn, case, &folder, log).with_context(|| format!("iscsi, case {}", case.name))?;
    let mut of = Outcome::default();
    for (run, text) in case.runs.iter().zip(&told) {
        of.add(judge(text, case.failures, run.elsewhere));
    }
    fs::remove_dir_all(&folder)?;
    Ok(of)
}

/// Complaints about cases of 512 bytes that run what can be run of the suite on one kind of unit: of each, with the cases that
/// run the rest of it, too many tests are skipped.
fn too_many_skipped(skipped: &[(&Case, usize)]) -> Vec<String> {
    let of_512 = || skipped.iter().filter(|(case, _)| case.block_size == 512);
    let rest: usize = of_512().filter(|(case, _)| !case.is_most()).map(|(_, count)| count).sum();
    let most = of_512().filter(|(case, _)| case.is_most());
    let told = most.map(|(case, count)| (case.name, count + rest));
    let too_many = told.filter(|(_, count)| *count >= SKIPPED_LIMIT);
    too_many
        .map(|(name, count)| {
            format!("{name}: {count} tests are skipped, and fewer than {SKIPPED_LIMIT} are to be")
        })
        .collect()
}

/// A running server; it ends with this process.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Its standard input closes: it drains and ends.
        drop(self.0.stdin.take());
        let _ended = self.0.wait();
    }
}

/// Starts a server, has the tests run, and gives what each run said.
fn conform(cairn: &Path, case: &Case, folder: &Path, log: &Path) -> Result<Vec<String>> {
    let config = folder.join("cairn.toml");
    let pools: String = ["a", "b", "c"]
        .map(|pool| format!("[[pool]]\nname = \"{pool}\"\npath = \"mem:512MiB\"\ncreate = true\n"))
        .concat();
    let state = folder.display();
    fs::write(
        &config,
        format!(
            "name = \"iscsi\"\nstate_dir = \"{state}\"\n[nvmf]\nlisten = [\"127.0.0.1:0\"]\n\
             [iscsi]\nlisten = [\"127.0.0.1:0\"]\nnop_interval = \"{SLEEP}\"\n\
             [nexus]\nsanitize_rate = \"{SANITIZE_RATE}\"\n{pools}"
        ),
    )?;
    let said = fs::File::options().append(true).create(true).open(log)?;
    let mut serve = Command::new(cairn);
    serve.args(["serve", "--exit-with-stdin", "--config"]).arg(&config);
    let child = serve.stdin(Stdio::piped()).stdout(said.try_clone()?).stderr(said).spawn()?;
    let _server = Server(child);
    let tell = |args: &[&str]| -> Result<String> {
        let mut command = Command::new(cairn);
        let told = command.arg("--socket").arg(folder.join("api.sock")).args(args).output()?;
        if !told.status.success() {
            bail!("cairn {}: {}", args.join(" "), String::from_utf8_lossy(&told.stderr));
        }
        Ok(String::from_utf8_lossy(&told.stdout).into_owned())
    };
    let until = Instant::now() + START;
    while let Err(error) = tell(&["volume", "list"]) {
        if Instant::now() > until {
            return Err(error.context("the server does not answer"));
        }
        thread::sleep(Duration::from_millis(50));
    }
    let size = case.block_size.to_string();
    let pools = ["--pool", "a", "--pool", "b", "--pool", "c", "--block-size", &size];
    tell(&[&["volume", "create", "db", "--size", "256MiB"][..], &pools].concat())?;
    let mut export = vec!["volume", "export", "db", "--iscsi", "--initiator", "*"];
    let secrets = folder.join("chap").display().to_string();
    if case.secure {
        fs::write(&secrets, "alice a-secret-of-hers\ntarget one-of-the-target\n")?;
        export.extend(["--chap-file", &secrets, "--allow-open-chap-file"]);
    }
    if case.read_only {
        export.push("--read-only");
    }
    if case.removable {
        export.push("--removable");
    }
    let told = tell(&export)?;
    let portal = told.lines().find_map(|line| line.strip_prefix("portals"));
    let portal = portal.and_then(|portal| portal.trim().split(',').next());
    let portal = portal.context("the server names no portal")?;
    let url = if case.secure {
        format!(
            "iscsi://alice%a-secret-of-hers@{portal}/{IQN}/0?target_user=target&\
             target_password=one-of-the-target&header_digest=crc32c&data_digest=crc32c"
        )
    } else {
        format!("iscsi://{portal}/{IQN}/0")
    };
    let mut told = Vec::new();
    for run in case.runs {
        // What the server says would come in between.
        let file = folder.join(format!("{}.log", run.tests));
        let mut tests = Command::new("iscsi-test-cu");
        tests.arg("--dataloss").args(run.flags).args(["-t", run.tests]);
        tests.args(vec![&url; run.addresses]);
        process::run(&mut tests, &file, LIMIT)?;
        let bytes = fs::read(file)?;
        fs::File::options().append(true).open(log)?.write_all(&bytes)?;
        told.push(String::from_utf8_lossy(&bytes).into_owned());
    }
    Ok(told)
}

/// One test, as it was told.
#[derive(Debug, Default)]
struct Test {
    name: String,
    /// Passed, or failed; nothing while it is not told.
    passed: Option<bool>,
    skipped: bool,
}

/// The tests that a run told of, in order.
fn tests(output: &str) -> Vec<Test> {
    let mut tests: Vec<Test> = Vec::new();
    let mut suite = "";
    for line in output.lines() {
        if let Some(name) = line.strip_prefix("Suite: ") {
            suite = name.trim();
            continue;
        }
        let begins = line.strip_prefix("  Test: ").and_then(|rest| rest.split_once(" ..."));
        let rest = match begins {
            Some((name, rest)) => {
                tests.push(Test { name: format!("{suite}.{name}"), ..Test::default() });
                rest
            }
            None => line,
        };
        let Some(test) = tests.last_mut() else { continue };
        test.skipped |= rest.contains("[SKIPPED]");
        if test.passed.is_none() {
            let verdicts = [("passed", true), ("FAILED", false)];
            let told = verdicts.into_iter().find(|(word, _)| rest.starts_with(word));
            test.passed = told.map(|(_, passed)| passed);
        }
    }
    tests
}

/// Holds what was told against what is expected; suites that are run elsewhere do not count.
fn judge(output: &str, failures: &[(&str, &str)], elsewhere: &[&str]) -> Outcome {
    let is = |test: &Test, name: &str| match name.strip_suffix('.') {
        Some(_) => test.name.starts_with(name),
        None => test.name == name,
    };
    let mut outcome = Outcome::default();
    let counts = |test: &Test| !elsewhere.iter().any(|name| is(test, name));
    for test in tests(output).into_iter().filter(counts) {
        let excused = |list: &[(&str, &str)]| list.iter().any(|(name, _)| is(&test, name));
        match test.passed {
            Some(true) if !test.skipped => outcome.passed += 1,
            Some(true) if excused(PARTS) => {
                outcome.passed += 1;
                outcome.parts += 1;
            }
            Some(true) if excused(SKIPS) => {
                outcome.excused += 1;
                outcome.skipped += 1;
            }
            Some(false) if excused(failures) => outcome.excused += 1,
            Some(true) => outcome.failed.push(format!("{} was skipped", test.name)),
            Some(false) => outcome.failed.push(format!("{} failed", test.name)),
            None => outcome.failed.push(format!("{} did not end", test.name)),
        }
    }
    if !output.contains("Run Summary:") {
        outcome.failed.push("the tests ended early".to_owned());
    }
    outcome
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn skips_and_failures_are_told_from_passes() {
        let output = "Suite: Read10\n  Test: Simple ...passed\n  Test: Odd ...    [FAILED] it said\nFAILED\n    1. x.c:1\n\
                      Suite: WriteSame10\n  Test: ZeroBlocks ...    [SKIPPED] refused\npassed\n\
                      Suite: Unmap\n  Test: Simple ...    [SKIPPED] why\npassed    [FAILED] of the next\n\
                      Suite: GetLBAStatus\n  Test: UnmapSingle ...FAILED\n\
                      Suite: Sanitize\n  Test: Readonly ...    [SKIPPED] of a part\npassed\n\
                      Suite: ReadOnly\n  Test: ReadOnlySBC ...    [SKIPPED] writable\npassed\nRun Summary:\n";
        let outcome = judge(output, FAILURES_512, &["ReadOnly."]);
        let failed = ["Read10.Odd failed".to_owned(), "Unmap.Simple was skipped".to_owned()];
        let expected =
            Outcome { passed: 2, excused: 2, skipped: 1, parts: 1, failed: failed.into() };
        assert_eq!(outcome, expected);
        assert_eq!(judge(output, FAILURES_512, &[]).failed.len(), 3, "it counts where it is run");
        let removable = "Suite: PreventAllow\n  Test: Eject ...    [SKIPPED] not removable\npassed\nRun Summary:\n";
        assert_eq!(judge(removable, &[], &[]).failed, ["PreventAllow.Eject was skipped"]);
        assert_eq!(judge(removable, &[], ELSEWHERE), Outcome::default());
        let cut = judge("Suite: Read10\n  Test: Simple ...", FAILURES_512, &[]);
        assert_eq!(cut.failed, ["Read10.Simple did not end", "the tests ended early"]);
    }

    #[test]
    fn what_is_skipped_counts_in_all_cases_of_a_whole() {
        let find = |name| CASES.iter().find(|case| case.name == name).unwrap();
        let count = |plain, read_only, large| {
            too_many_skipped(&[
                (find("512"), plain),
                (find("512-secure"), 0),
                (find("4096"), large),
                (find("512-read-only"), read_only),
                (find("512-removable"), 1),
            ])
        };
        assert!(count(SKIPPED_LIMIT - 4, 2, 99).is_empty());
        assert_eq!(count(SKIPPED_LIMIT - 3, 2, 0).len(), 1);
        assert_eq!(count(0, SKIPPED_LIMIT, 0).len(), 2, "it is of both wholes");
    }
}
