//! What came of a comparison: one table, and the same as JSON.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::bars::{self, Verdict};
use crate::load::{LOADS, Load, Measured};
use crate::stacks::{Group, Stack};

/// Under what it was measured.
#[derive(Debug)]
pub(crate) struct Settings {
    seconds: f64,
    rounds: u32,
    mib: u64,
    machine: String,
    commit: String,
    /// Of the last minute, at the start and after each round.
    loads: Vec<f64>,
}

fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

impl Settings {
    pub(crate) fn new(seconds: f64, rounds: u32, mib: u64, dir: &Path) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.unwrap_or_default().trim_start_matches([' ', '\t', ':']).to_owned();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let made = std::fs::create_dir_all(dir).is_ok();
        let file_system = if made { crate::file_system(dir) } else { String::new() };
        Self {
            seconds,
            rounds,
            mib,
            machine: format!("{cores} cores ({model}), Linux {}, {file_system}", kernel.trim()),
            commit: std::env::var("CAIRN_COMMIT").unwrap_or_else(|_| "unknown".to_owned()),
            loads: vec![load_average()],
        }
    }

    pub(crate) fn note_load(&mut self) {
        self.loads.push(load_average());
    }

    pub(crate) fn print(&self) {
        println!("{}, commit {}", self.machine, self.commit);
        println!(
            "volumes of {} MiB; {} rounds of {} s in turns, medians; load average {:.2} at the start",
            self.mib, self.rounds, self.seconds, self.loads[0]
        );
    }

    fn most_load(&self) -> f64 {
        self.loads.iter().copied().fold(0.0, f64::max)
    }
}

/// A figure, or that there is none.
fn some(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// A stack under a load.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) stack: Stack,
    pub(crate) load: Load,
    pub(crate) median: Measured,
    pub(crate) rounds: Vec<Measured>,
}

/// What does not depend on the load.
#[derive(Debug)]
pub(crate) struct StackFacts {
    pub(crate) stack: Stack,
    pub(crate) resident_mib: f64,
    /// Of one core.
    pub(crate) idle_percent: Option<f64>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) settings: Settings,
    pub(crate) rows: Vec<Row>,
    pub(crate) stacks: Vec<StackFacts>,
    /// What could not be measured, and why.
    gaps: Vec<String>,
    verdicts: Vec<Verdict>,
}

impl Report {
    pub(crate) fn new(settings: Settings) -> Self {
        Self {
            settings,
            rows: Vec::new(),
            stacks: Vec::new(),
            gaps: Vec::new(),
            verdicts: Vec::new(),
        }
    }

    pub(crate) fn skip(&mut self, stack: &Stack, why: impl std::fmt::Display) {
        self.gaps.push(format!("{} ({}) was skipped: {why}", stack.title, stack.name));
    }

    pub(crate) fn failed(&mut self, stack: &Stack, load: &Load, why: &anyhow::Error) {
        self.gaps.push(format!("{}, {}: a run failed: {why:#}", stack.title, load.title));
    }

    pub(crate) fn find(&self, stack: &str, load: &str) -> Option<&Measured> {
        let row = self.rows.iter().find(|r| r.stack.name == stack && r.load.name == load)?;
        Some(&row.median)
    }

    pub(crate) fn facts(&self, stack: &str) -> Option<&StackFacts> {
        self.stacks.iter().find(|facts| facts.stack.name == stack)
    }

    /// Holds what was measured to the bars.
    pub(crate) fn finish(&mut self) {
        self.verdicts = bars::judge(self);
    }

    /// Whether no bar was missed.
    pub(crate) fn held(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.held)
    }

    /// What a row is held against: the floor or the ceiling of its group.
    fn base(&self, row: &Row) -> Option<f64> {
        let name = match (row.stack.group, row.load.write, row.load.durable) {
            (Group::Memory, ..) => "loopback",
            (Group::Files, true, false) => "three-files",
            (Group::Files, ..) => "one-file",
            (Group::Iscsi, ..) => return None,
        };
        self.find(name, row.load.name).map(|m| m.iops).filter(|iops| *iops > 0.0)
    }

    /// The row of Cairn that others are compared with.
    fn ours(&self, row: &Row) -> Option<f64> {
        let name = match row.stack.group {
            Group::Memory => "volume",
            Group::Files => "files",
            Group::Iscsi if row.stack.name.ends_with("file") => "iscsi-file",
            Group::Iscsi => "iscsi-memory",
        };
        self.find(name, row.load.name).map(|m| m.iops)
    }

    pub(crate) fn print(&self) {
        for group in Group::ALL {
            self.print_group(group);
        }
        if !self.stacks.is_empty() {
            println!("\n{:48} {:>12} {:>14}", "servers", "resident MiB", "idle % a core");
        }
        for facts in &self.stacks {
            let idle = some(facts.idle_percent, 2);
            println!("{:48} {:>12.0} {idle:>14}", facts.stack.title, facts.resident_mib);
        }
        println!();
        self.gaps.iter().for_each(|gap| println!("{gap}"));
        println!(
            "load average: {:.2} at the start, {:.2} at most",
            self.settings.loads[0],
            self.settings.most_load()
        );
        if !self.verdicts.is_empty() {
            println!("\n{:66} {:>12} {:>12}", "bar", "figure", "is to be");
        }
        for verdict in &self.verdicts {
            println!("{verdict}");
        }
    }

    fn print_group(&self, group: Group) {
        let rows: Vec<&Row> = self.rows.iter().filter(|r| r.stack.group == group).collect();
        if rows.is_empty() {
            return;
        }
        println!(
            "\n{:48} {:>9} {:>8} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}",
            group.title(),
            "IOPS",
            "MiB/s",
            "mean us",
            "p99 us",
            "p99.9 us",
            "CPU/100k",
            "x limit",
            "cairn is"
        );
        for load in LOADS {
            let of_load: Vec<&&Row> = rows.iter().filter(|r| r.load.name == load.name).collect();
            if !of_load.is_empty() {
                println!("{}", load.title);
            }
            for row in of_load {
                self.print_row(row);
            }
        }
    }

    fn print_row(&self, row: &Row) {
        let m = &row.median;
        let of_base = self.base(row).map(|base| m.iops / base);
        let of_ours = self.ours(row).filter(|_| m.iops > 0.0).map(|ours| ours / m.iops);
        println!(
            "  {:46} {:>9.0} {:>8.1} {:>9.1} {:>9} {:>9} {:>9} {:>8} {:>8}",
            row.stack.title,
            m.iops,
            m.mib_s,
            m.mean_us,
            some(m.p99_us, 1),
            some(m.p999_us, 1),
            some(m.cpu_s_per_100k, 3),
            some(of_base, 2),
            some(of_ours, 2),
        );
    }

    /// The tables, for a page of the documentation.
    pub(crate) fn write_markdown(&self, file: &Path) -> Result<()> {
        let mut text = format!(
            "{}; volumes of {} MiB, {} rounds of {} s; load average {:.1} at the start, {:.1} at most; commit {}.\n",
            self.settings.machine,
            self.settings.mib,
            self.settings.rounds,
            self.settings.seconds,
            self.settings.loads[0],
            self.settings.most_load(),
            self.settings.commit
        );
        for group in Group::ALL {
            text += &self.markdown_group(group);
        }
        if !self.stacks.is_empty() {
            text += "\n| servers | resident MiB | idle, % of a core |\n| --- | --- | --- |\n";
        }
        for facts in &self.stacks {
            let idle = some(facts.idle_percent, 2);
            text += &format!("| {} | {:.0} | {idle} |\n", facts.stack.title, facts.resident_mib);
        }
        if !self.verdicts.is_empty() {
            text += "\n| bar | figure | is to be | |\n| --- | --- | --- | --- |\n";
        }
        for verdict in &self.verdicts {
            text += &verdict.markdown();
        }
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    fn markdown_group(&self, group: Group) -> String {
        let rows: Vec<&Row> = self.rows.iter().filter(|r| r.stack.group == group).collect();
        if rows.is_empty() {
            return String::new();
        }
        let mut text = format!(
            "\n| {} | IOPS | mean us | p99 us | CPU-s per 100k | x limit | cairn is |\n{}\n",
            group.title(),
            "| --- ".repeat(7) + "|"
        );
        for row in LOADS.iter().flat_map(|l| rows.iter().filter(|r| r.load.name == l.name)) {
            let m = &row.median;
            let of_base = self.base(row).map(|base| m.iops / base);
            let of_ours = self.ours(row).filter(|_| m.iops > 0.0).map(|ours| ours / m.iops);
            text += &format!(
                "| {}: {} | {:.0} | {:.0} | {} | {} | {} | {} |\n",
                row.load.title,
                row.stack.title,
                m.iops,
                m.mean_us,
                some(m.p99_us, 0),
                some(m.cpu_s_per_100k, 2),
                some(of_base, 2),
                some(of_ours, 2),
            );
        }
        text
    }

    pub(crate) fn write_json(&self, file: &Path) -> Result<()> {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "stack": row.stack.name, "load": row.load.name, "median": row.median,
                    "rounds": row.rounds, "of_limit": self.base(row).map(|b| row.median.iops / b),
                })
            })
            .collect();
        let stacks: Vec<Value> = self
            .stacks
            .iter()
            .map(|facts| {
                json!({
                    "stack": facts.stack.name, "title": facts.stack.title,
                    "resident_mib": facts.resident_mib, "idle_percent": facts.idle_percent,
                })
            })
            .collect();
        let verdicts: Vec<Value> = self.verdicts.iter().map(Verdict::json).collect();
        let value = json!({
            "machine": self.settings.machine, "commit": self.settings.commit,
            "seconds": self.settings.seconds, "rounds": self.settings.rounds,
            "volume_mib": self.settings.mib, "load_averages": self.settings.loads,
            "rows": rows, "stacks": stacks, "gaps": self.gaps, "bars": verdicts,
        });
        std::fs::write(file, serde_json::to_string_pretty(&value)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}
