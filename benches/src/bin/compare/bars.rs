//! The bars that Cairn is held to: ratios of what was measured in the same run, and a few figures.

use std::fmt;

use serde_json::{Value, json};

use crate::load::{LOADS, Measured};
use crate::report::Report;

/// A bar and what was measured.
#[derive(Debug)]
pub(crate) struct Verdict {
    what: String,
    figure: f64,
    /// At least so much; at most, where `most` is set; nothing, where it is only told.
    bar: Option<f64>,
    most: bool,
    unit: &'static str,
    note: String,
    pub(crate) held: bool,
}

impl Verdict {
    fn new(what: impl Into<String>, figure: f64, bar: f64, most: bool, unit: &'static str) -> Self {
        let held = if most { figure <= bar } else { figure >= bar };
        let (what, note) = (what.into(), String::new());
        Self { what, figure, bar: Some(bar), most, unit, note, held }
    }

    /// A figure that is held to nothing.
    pub(crate) fn told(what: impl Into<String>, figure: f64, unit: &'static str) -> Self {
        Self { bar: None, held: true, ..Self::new(what, figure, 0.0, false, unit) }
    }

    pub(crate) fn at_most(
        what: impl Into<String>,
        figure: f64,
        bar: f64,
        unit: &'static str,
    ) -> Self {
        Self::new(what, figure, bar, true, unit)
    }

    pub(crate) fn at_least(
        what: impl Into<String>,
        figure: f64,
        bar: f64,
        unit: &'static str,
    ) -> Self {
        Self::new(what, figure, bar, false, unit)
    }

    pub(crate) fn note(self, note: String) -> Self {
        Self { note, ..self }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "bar": self.what, "figure": self.figure, "is_to_be": self.bar, "at_most": self.most,
            "unit": self.unit, "held": self.held, "note": self.note,
        })
    }
}

impl Verdict {
    /// The figure, the bar, and whether it is held.
    fn words(&self) -> (String, String, &'static str) {
        let digits = if self.figure >= 1000.0 { 0 } else { 2 };
        let figure = format!("{:.digits$}{}", self.figure, self.unit);
        let sign = if self.most { "<=" } else { ">=" };
        let bar = self.bar.map_or_else(String::new, |bar| format!("{sign} {bar}{}", self.unit));
        let verdict = match (self.bar, self.held) {
            (None, _) => "",
            (Some(_), true) => "held",
            (Some(_), false) => "MISSED",
        };
        (figure, bar, verdict)
    }

    /// A row of a table.
    pub(crate) fn markdown(&self) -> String {
        let (figure, bar, verdict) = self.words();
        format!("| {} | {figure} | {bar} | {verdict} |\n", self.what)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (figure, bar, verdict) = self.words();
        write!(f, "{:66} {figure:>12} {bar:>12}  {verdict:6}  {}", self.what, self.note)
    }
}

/// Collects the verdicts on what there is.
struct Judge<'a> {
    report: &'a Report,
    verdicts: Vec<Verdict>,
}

type Pick = fn(&Measured) -> Option<f64>;

const IOPS: Pick = |m| Some(m.iops);
const CPU: Pick = |m| m.cpu_s_per_100k;

impl Judge<'_> {
    fn of(&self, stack: &str, load: &str, pick: Pick) -> Option<f64> {
        self.report.find(stack, load).and_then(pick)
    }

    /// A figure by itself.
    fn figure(
        &mut self,
        what: &str,
        figure: Option<f64>,
        bar: f64,
        most: bool,
        unit: &'static str,
    ) {
        self.verdicts.extend(figure.map(|figure| Verdict::new(what, figure, bar, most, unit)));
    }

    /// A stack's figure against another one's, with the same load.
    fn ratio(
        &mut self,
        what: &str,
        load: &str,
        pick: Pick,
        pair: (&str, &str),
        bar: f64,
        most: bool,
    ) {
        let (Some(ours), Some(theirs)) = (self.of(pair.0, load, pick), self.of(pair.1, load, pick))
        else {
            return;
        };
        if theirs > 0.0 {
            let digits = if ours > 100.0 { 0 } else { 2 };
            let note = format!("{ours:.digits$} of {theirs:.digits$} ({})", pair.1);
            self.verdicts.push(Verdict::new(what, ours / theirs, bar, most, "x").note(note));
        }
    }

    /// Either so many IOPS, or so much of the ceiling.
    fn or_ceiling(&mut self, what: &str, stack: &str, load: &str, iops: f64) {
        let Some(ours) = self.of(stack, load, IOPS) else { return };
        let ceiling = self.of("loopback", load, IOPS).filter(|c| *c > 0.0);
        let mut verdict = Verdict::new(what, ours, iops, false, "");
        if let Some(ceiling) = ceiling {
            verdict.note = format!("or 0.9x of the ceiling {ceiling:.0}: {:.2}x", ours / ceiling);
            verdict.held |= ours >= 0.9 * ceiling;
        }
        self.verdicts.push(verdict);
    }
}

/// Microseconds that three processes may add to a write that is alone.
const ADDED_US: f64 = 120.0;

pub(crate) fn judge(report: &Report) -> Vec<Verdict> {
    let mut judge = Judge { report, verdicts: Vec::new() };
    for (stack, name) in [("replica", "1 replica"), ("volume", "a volume of 1")] {
        let what = |rest: &str| format!("{name} in memory, {rest}");
        judge.or_ceiling(&what("4K randread QD32"), stack, "read32", 350_000.0);
        judge.or_ceiling(&what("4K randwrite QD32"), stack, "write32", 300_000.0);
        for (load, title) in [("read32", "read"), ("write32", "write")] {
            // Seconds for 100,000 are ten microseconds for each.
            let cpu = judge.of(stack, load, CPU).map(|seconds| seconds * 10.0);
            judge.figure(&what(&format!("server CPU a {title}, QD32")), cpu, 2.5, true, " us");
        }
    }
    for (stack, name, bar) in
        [("over-tcp", "over TCP", 100_000.0), ("local", "local children", 200_000.0)]
    {
        let what = |rest: &str| format!("3 replicas in memory, {name}, {rest}");
        let write = judge.of(stack, "write32", IOPS);
        judge.figure(&what("4K randwrite QD32"), write, bar, false, "");
        let read = judge.of(stack, "read32", IOPS);
        judge.figure(&what("4K randread QD32"), read, 200_000.0, false, "");
    }
    judge.ratio(
        "3 replicas in memory, writes: local children against over TCP",
        "write32",
        IOPS,
        ("local", "over-tcp"),
        2.0,
        false,
    );
    // Three processes have the replicas either way: the nexus has one of its own, or is in one of these.
    in_files(&mut judge, "files", "3 replicas in files");
    in_files(&mut judge, "files-beside", "3 replicas in files, nexus beside one");
    beside_minimal_programs(&mut judge);
    over_iscsi(&mut judge);
    judge.verdicts
}

fn in_files(judge: &mut Judge<'_>, ours: &str, name: &str) {
    let what = |rest: &str| format!("{name}, {rest}");
    let write = what("4K randwrite QD32 against ");
    for (peer, name, bar) in [
        ("three-files", "three files", 0.85),
        ("quorum", "qemu quorum", 2.0),
        ("ceph", "Ceph", 5.0),
    ] {
        judge.ratio(&format!("{write}{name}"), "write32", IOPS, (ours, peer), bar, false);
    }
    for (load, title) in [("write1", "QD1"), ("write32", "QD32")] {
        let title = what(&format!("CPU a 4K write {title} against qemu quorum"));
        judge.ratio(&title, load, CPU, (ours, "quorum"), 0.5, true);
    }
    let mean: Pick = |m| Some(m.mean_us);
    if let (Some(mine), Some(floor)) =
        (judge.of(ours, "write1", mean), judge.of("three-files", "write1", mean))
    {
        let title = what("4K randwrite QD1: latency beyond three files");
        judge.figure(&title, Some(mine - floor), ADDED_US, true, " us");
    }
    let idle = judge.report.facts(ours).and_then(|facts| facts.idle_percent);
    judge.figure(&what("idle CPU of all processes, of a core"), idle, 1.0, true, " %");
    for (load, title, floor, bar) in [
        ("read32", "4K randread QD32 against one file", "one-file", 0.8),
        ("seqwrite", "128K write QD16 against three files", "three-files", 0.8),
        ("seqread", "128K read QD16 against one file", "one-file", 0.8),
        ("durable1", "4K write + flush QD1 against one file", "one-file", 0.6),
    ] {
        judge.ratio(&what(title), load, IOPS, (ours, floor), bar, false);
    }
}

fn over_iscsi(judge: &mut Judge<'_>) {
    let pair = ("iscsi-memory", "tgt");
    for (load, title) in [("read32", "4K randread QD32"), ("write32", "4K randwrite QD32")] {
        let what = |rest: &str| format!("over iSCSI in memory, {title}{rest}");
        judge.ratio(&what(" against tgt"), load, IOPS, pair, 2.0, false);
        judge.ratio(&what(": CPU against tgt"), load, CPU, pair, 0.5, true);
    }
    let mean: Pick = |m| Some(m.mean_us);
    for (load, title) in [("read1", "4K randread QD1"), ("write1", "4K randwrite QD1")] {
        let title = format!("over iSCSI in memory, {title}: latency against tgt");
        judge.ratio(&title, load, mean, pair, 1.0, true);
    }
}

/// Beside programs that do nothing but pass on what they are asked, over as many connections.
fn beside_minimal_programs(judge: &mut Judge<'_>) {
    let pairs = [
        ("over-tcp", "relay-memory", "3 replicas in memory, over TCP"),
        ("files", "relay", "3 replicas in files"),
    ];
    for (load, (ours, relay, name)) in LOADS.iter().flat_map(|load| pairs.map(|p| (load, p))) {
        let (Some(mine), Some(most)) =
            (judge.of(ours, load.name, IOPS), judge.of(relay, load.name, IOPS))
        else {
            continue;
        };
        let title = format!("{name}, {} against minimal programs", load.title);
        let note = format!("{mine:.0} of {most:.0} ({relay})");
        judge.verdicts.push(Verdict::told(title, mine / most, "x").note(note));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_holds_on_its_own_side() {
        assert!(Verdict::new("most", 1.0, 2.0, true, "").held);
        assert!(!Verdict::new("least", 1.0, 2.0, false, "").held);
        let told = Verdict::new("least", 1.0, 2.0, false, "x").to_string();
        assert!(told.contains("MISSED") && told.contains(">= 2x"), "{told}");
    }
}
