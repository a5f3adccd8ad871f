//! The jobs (one boot each), their cases, and how a guest's lines become results.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Layout;
use crate::disk;
use crate::dmesg;
use crate::guest::{Boot, Guest};
use crate::image::Image;
use crate::net::{CLIENT_IP, Net};
use crate::peer::Peer;

/// One boot. Besides its cases, every job checks the host's kernel log and the servers' end.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) name: &'static str,
    script: &'static str,
    cases: &'static [&'static str],
    /// Whether the host's log may speak of a lost and regained connection.
    reconnects: bool,
    /// Whether the volume is encrypted.
    pub(crate) encrypted: bool,
    /// Whether the guest's root file system is on the volume, for which QEMU is the initiator.
    root: bool,
    pub(crate) layout: Layout,
    /// Whether it runs only where it is asked for by name: what takes long, and measures.
    pub(crate) on_demand: bool,
    /// What the host's log may say besides.
    excused: &'static [&'static str],
    /// For the whole boot, set-up included.
    limit: Duration,
}

/// Proves the harness without any server.
pub(crate) const SMOKE: Job = Job {
    name: "smoke",
    script: include_str!("../guest/smoke.sh"),
    cases: &["smoke-network", "smoke-acknowledgement", "smoke-tools"],
    reconnects: false,
    encrypted: false,
    root: false,
    layout: Layout::Apart,
    on_demand: false,
    excused: &[],
    limit: Duration::from_secs(120),
};

/// The jobs whose volume grows, is copied, or moves, or is reached over iSCSI: the kernel's target is not asked to.
pub(crate) const OURS: [&str; 10] = [
    "grow",
    "snapshot",
    "takeover",
    "rolling",
    "hosts",
    "failures",
    "outages",
    "iscsi",
    "iscsi-multipath",
    "iscsi-root",
];

pub(crate) const JOBS: [Job; 13] = [
    Job {
        name: "clients",
        script: include_str!("../guest/clients.sh"),
        cases: &[
            "discover",
            "connect-plain",
            "connect-header-digest",
            "connect-data-digest",
            "connect-both-digests",
            "fio-randrw",
            "ext4",
            "xfs",
        ],
        reconnects: false,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(480),
    },
    Job {
        name: "replica-kill",
        script: include_str!("../guest/replica-kill.sh"),
        cases: &["replica-kill"],
        reconnects: false,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(240),
    },
    Job {
        name: "nexus-restart",
        script: include_str!("../guest/nexus-restart.sh"),
        cases: &["nexus-restart"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(240),
    },
    Job {
        name: OURS[0],
        script: include_str!("../guest/grow.sh"),
        cases: &["grow-fio", "grow-ext4", "grow-xfs"],
        reconnects: false,
        encrypted: true,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(300),
    },
    Job {
        name: OURS[1],
        script: include_str!("../guest/snapshot.sh"),
        cases: &["snapshot-ext4", "snapshot-xfs"],
        reconnects: false,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(240),
    },
    Job {
        name: OURS[2],
        script: include_str!("../guest/takeover.sh"),
        cases: &["hand-over", "take-over"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(300),
    },
    Job {
        name: OURS[3],
        script: include_str!("../guest/rolling.sh"),
        cases: &["rolling"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Together,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(420),
    },
    Job {
        name: OURS[4],
        script: include_str!("../guest/hosts.sh"),
        cases: &["host-settings", "stale-path"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(420),
    },
    Job {
        name: OURS[5],
        script: include_str!("../guest/failures.sh"),
        cases: &["failures"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Together,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(420),
    },
    Job {
        name: OURS[6],
        script: include_str!("../guest/outages.sh"),
        cases: &[
            "cut-replica",
            "cut-active",
            "vanish-active",
            "dead-disk",
            "hung-disk",
            "full-pool",
            "lost-power",
            "fail-fast",
        ],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Faulty,
        on_demand: true,
        // What a full pool is to a host, which is told of it; and what waits for no path where it is not to.
        excused: &[
            "critical space allocation error",
            "(sct 0x0 / sc 0x81)",
            "no available path - failing I/O",
            "I/O error, dev nvme",
        ],
        limit: Duration::from_secs(900),
    },
    Job {
        name: OURS[7],
        script: include_str!("../guest/initiators.sh"),
        cases: &[
            "iscsi-access",
            "iscsi-chap",
            "iscsi-digests",
            "iscsi-ext4",
            "iscsi-reinstatement",
            "iscsi-reservation",
            "iscsi-nvme-reservation",
            "iscsi-replica-kill",
        ],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        // What a reservation keeps out; any other failure of a request is told in another line too.
        excused: &[
            "FAILED Result: hostbyte=DID_OK driverbyte=DRIVER_OK",
            "reservation conflict error, dev nvme",
            "I/O Error (sct 0x0 / sc 0x83)",
            "using deprecated NVME_IOCTL",
        ],
        limit: Duration::from_secs(420),
    },
    Job {
        name: OURS[8],
        script: include_str!("../guest/multipath.sh"),
        cases: &["multipath-hand-over", "multipath-take-over"],
        reconnects: true,
        encrypted: false,
        root: false,
        layout: Layout::Apart,
        on_demand: false,
        // What Linux says of a path that is left: what was sent there fails, and is sent on another one.
        excused: &[
            ": Failing path ",
            "FAILED Result",
            "I/O error, dev sd",
            "session recovery timed out",
            "alua: rtpg failed",
            // At the logout of one that stands by.
            "Synchronize Cache(10) failed",
        ],
        limit: Duration::from_secs(300),
    },
    Job {
        name: OURS[9],
        script: include_str!("../guest/root.sh"),
        cases: &["root-replica-kill"],
        reconnects: false,
        encrypted: false,
        root: true,
        layout: Layout::Apart,
        on_demand: false,
        excused: &[],
        limit: Duration::from_secs(300),
    },
];

/// What became of one case.
#[derive(Debug)]
pub(crate) struct Outcome {
    job: &'static str,
    case: String,
    /// Why it failed, if it did.
    pub(crate) failure: Option<String>,
    time: Duration,
}

impl Outcome {
    pub(crate) fn report(&self) {
        let Self { job, case, .. } = self;
        let time = self.time.as_secs_f64();
        match &self.failure {
            None => println!("case {job}/{case} ... ok ({time:.1} s)"),
            Some(why) => println!("case {job}/{case} ... FAIL ({time:.1} s)\n    {why}"),
        }
    }
}

impl Job {
    /// Whether the job has a case that is asked for; nothing asked for means all but those on demand.
    pub(crate) fn wanted(&self, only: &[String]) -> bool {
        match only {
            [] => !self.on_demand,
            _ => only.iter().any(|o| o == self.name) || self.cases(only).next().is_some(),
        }
    }

    /// The cases to run, of those asked for. A job's own name stands for all of its cases.
    fn cases<'a>(&self, only: &'a [String]) -> impl Iterator<Item = &'static str> + use<'a> {
        let (all, name) = (self.cases, self.name);
        all.iter().copied().filter(move |c| {
            only.is_empty() || only.iter().any(|o| o == c) || only.iter().any(|o| o == name)
        })
    }

    /// Every name that `--only` may give.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> + use<> {
        std::iter::once(self.name).chain(self.cases.iter().copied())
    }

    /// Boots a guest against the servers that `start` brings up.
    pub(crate) fn run<'p>(
        &self,
        image: &Image,
        net: &Net,
        logs: &Path,
        only: &[String],
        strict: bool,
        start: impl FnOnce() -> Result<Box<dyn Peer + 'p>>,
    ) -> Vec<Outcome> {
        let mut run =
            Run { job: self, strict, outcomes: Vec::new(), messages: None, began: Instant::now() };
        let cases: Vec<_> = self.cases(only).collect();
        let mut peer = match start() {
            Ok(peer) => Some(peer),
            Err(e) => {
                run.fail_rest(&cases, &format!("the servers did not start: {e:#}"));
                None
            }
        };
        if let Some(peer) = &mut peer {
            let ended = run.drive(image, net, logs, &cases, peer.as_mut());
            let why = ended.err().map_or_else(
                || "the guest never reported it".to_owned(),
                |e| format!("the guest did not finish: {e:#}"),
            );
            run.fail_rest(&cases, &why);
            run.check_messages();
            run.began = Instant::now();
            let failure = peer.finish().err().map(|e| format!("{e:#}"));
            run.add(&format!("{}-servers", self.name), failure);
        }
        run.outcomes
    }
}

struct Run<'a> {
    job: &'a Job,
    /// Whether a longer pause than is promised fails its case.
    strict: bool,
    outcomes: Vec<Outcome>,
    /// The kernel's messages, once the guest has sent all of them.
    messages: Option<Vec<String>>,
    /// When the current case began.
    began: Instant,
}

impl Run<'_> {
    fn add(&mut self, case: &str, failure: Option<String>) {
        let (job, time) = (self.job.name, self.began.elapsed());
        let outcome = Outcome { job, case: case.to_owned(), failure, time };
        outcome.report();
        self.outcomes.push(outcome);
    }

    fn fail_rest(&mut self, cases: &[&str], why: &str) {
        for case in cases {
            if !self.outcomes.iter().any(|o| o.case == *case) {
                self.add(case, Some(why.to_owned()));
            }
        }
    }

    fn check_messages(&mut self) {
        self.began = Instant::now();
        let failure = match &self.messages {
            None => Some("the guest did not send its kernel log".to_owned()),
            Some(lines) => {
                let excused = |line: &String| self.job.excused.iter().any(|e| line.contains(e));
                let mut bad = dmesg::trouble(lines, self.job.reconnects);
                bad.retain(|line| !excused(line));
                let shown = bad.iter().take(8).cloned().collect::<Vec<_>>().join("\n    ");
                (!bad.is_empty()).then(|| format!("{} messages, first:\n    {shown}", bad.len()))
            }
        };
        self.add(&format!("{}-dmesg", self.job.name), failure);
    }

    /// From boot to power-off.
    fn drive(
        &mut self,
        image: &Image,
        net: &Net,
        logs: &Path,
        cases: &[&str],
        peer: &mut dyn Peer,
    ) -> Result<()> {
        let deadline = Instant::now() + self.job.limit;
        let endpoint = peer.endpoint();
        if self.job.root {
            peer.act(&format!("export {}", disk::INITIATOR))?;
            let failure = disk::install(image, net, &endpoint.unit, logs).err();
            self.add(&format!("{}-convert", self.job.name), failure.map(|e| format!("{e:#}")));
            self.began = Instant::now();
        }
        let env = vec![
            ("ADDR", endpoint.address),
            ("PORT", endpoint.port.to_string()),
            ("OTHER_PORT", (endpoint.port + 1).to_string()),
            ("NQN", endpoint.nqn),
            ("IQN", endpoint.unit.iqn.clone()),
            ("ISCSI_PORT", endpoint.unit.port.to_string()),
            ("ONLY", cases.join(" ")),
            ("STRICT", if self.strict { "1".to_owned() } else { String::new() }),
        ];
        let boot = Boot {
            name: self.job.name,
            tap: "tap0",
            ip: CLIENT_IP,
            // fio's libraries alone take half of it.
            memory_mib: 768,
            script: self.job.script,
            env,
            root: self.job.root.then_some(&endpoint.unit),
        };
        let mut guest = Guest::boot(image, net, logs, &boot)?;
        guest.expect("GUEST-UP", Duration::from_secs(90))?;
        println!(
            "guest: {} is up after {:.1} s",
            self.job.name,
            self.began.elapsed().as_secs_f64()
        );
        let mut messages = Vec::new();
        while let Some(line) = guest.line(deadline)? {
            match Line::parse(&line) {
                Line::Start => self.began = Instant::now(),
                Line::Case(case, failure) => self.add(case, failure),
                Line::HostDo(verb) => {
                    let answer = match peer.act(verb) {
                        Ok(text) => format!("ACK ok {}", one_line(&text)),
                        Err(e) => format!("ACK FAIL {}", one_line(&format!("{e:#}"))),
                    };
                    println!("guest: {verb}: {answer}");
                    guest.send(&answer)?;
                }
                Line::Pause(text) => println!("guest: pause: {text}"),
                Line::Dmesg(text) => messages.push(text.to_owned()),
                Line::DmesgEnd => self.messages = Some(std::mem::take(&mut messages)),
                Line::Done => return Ok(()),
                Line::Other => {}
            }
        }
        Err(anyhow::anyhow!("{}", guest.tail())).context("the guest died; its console ends")
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(400).collect()
}

/// A line of the protocol that `guest/lib.sh` describes.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Start,
    Case(&'a str, Option<String>),
    HostDo(&'a str),
    Pause(&'a str),
    Dmesg(&'a str),
    DmesgEnd,
    Done,
    Other,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "CASE-START" => Self::Start,
            "CASE" => match rest.split_once(' ') {
                Some((name, "ok")) => Self::Case(name, None),
                Some((name, detail)) => {
                    let why = detail.strip_prefix("FAIL ").unwrap_or(detail);
                    Self::Case(name, Some(why.to_owned()))
                }
                None => Self::Case(rest, Some("reported without a result".to_owned())),
            },
            "HOST-DO" => Self::HostDo(rest),
            "PAUSE" => Self::Pause(rest),
            "DMESG" => Self::Dmesg(rest),
            "DMESG-END" => Self::DmesgEnd,
            "GUEST-DONE" => Self::Done,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{JOBS, Line, SMOKE};

    #[test]
    fn only_a_plain_ok_is_a_pass() {
        assert_eq!(Line::parse("CASE ext4 ok"), Line::Case("ext4", None));
        let failed = Line::Case("ext4", Some("at 'mount': exit code 32".to_owned()));
        assert_eq!(Line::parse("CASE ext4 FAIL at 'mount': exit code 32"), failed);
        assert!(matches!(Line::parse("CASE ext4 okay"), Line::Case("ext4", Some(_))));
        assert!(matches!(Line::parse("CASE ext4"), Line::Case("ext4", Some(_))));
        assert_eq!(Line::parse("HOST-DO kill-replica"), Line::HostDo("kill-replica"));
        assert_eq!(Line::parse("rubbish"), Line::Other);
    }

    #[test]
    fn every_case_of_the_table_is_run_by_its_script() {
        for job in JOBS.iter().chain([&SMOKE]) {
            for case in job.cases {
                assert!(job.script.contains(&format!("run_case {case} ")), "{}: {case}", job.name);
            }
            let run = job.script.lines().filter(|l| l.starts_with("run_case ")).count();
            assert_eq!(run, job.cases.len(), "{}", job.name);
        }
    }

    #[test]
    fn a_case_brings_its_job_and_no_other() {
        let only = ["xfs".to_owned()];
        let wanted: Vec<_> = JOBS.iter().filter(|j| j.wanted(&only)).map(|j| j.name).collect();
        assert_eq!(wanted, ["clients"]);
        assert!(JOBS.iter().all(|j| j.wanted(&[]) != j.on_demand));
        assert_eq!(JOBS[0].cases(&only).collect::<Vec<_>>(), ["xfs"]);
        assert_eq!(JOBS[0].cases(&["clients".to_owned()]).count(), JOBS[0].cases.len());
    }
}
