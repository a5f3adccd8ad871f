//! What happened, by time: one line an event. Faults and changes of state are written as they happen; requests are
//! kept, and those of a block that failed are told with the rest.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use cairn_engine::block::IoOp;
use parking_lot::Mutex;

use crate::plan::NODES;

/// Faults and changes of state.
#[derive(Debug)]
pub(crate) struct Trace {
    dir: PathBuf,
    file: Mutex<File>,
    loud: bool,
}

/// How an attempt at a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Failed(String),
    /// The path was lost; whether it was done is not known.
    Unknown,
}

/// An attempt at a request.
#[derive(Debug, Clone)]
pub(crate) struct Io {
    pub(crate) began: SystemTime,
    pub(crate) ended: SystemTime,
    pub(crate) host: usize,
    pub(crate) node: usize,
    pub(crate) op: IoOp,
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    /// The history's time of its beginning.
    pub(crate) invoked: u64,
    /// What was written.
    pub(crate) value: u64,
    /// What was read, block by block.
    pub(crate) seen: Vec<u64>,
    pub(crate) outcome: Outcome,
}

impl Trace {
    pub(crate) fn new(dir: &Path, loud: bool) -> Result<Self> {
        let file = File::create(dir.join("events"))
            .with_context(|| format!("writing into {}", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), file: Mutex::new(file), loud })
    }

    /// An event of now.
    pub(crate) fn say(&self, kind: &str, what: &str) {
        let line = format!("{} {kind:<6} {what}", stamp(SystemTime::now()));
        if self.loud {
            println!("{line}");
        }
        // A trace that cannot be written must not end the run.
        let _written = writeln!(self.file.lock(), "{line}");
    }

    /// One file of everything, by time: events, the processes' logs, and the requests to a block.
    pub(crate) fn merge(&self, requests: &[Io], block: Option<u64>) -> Result<PathBuf> {
        let mut lines: Vec<String> = Vec::new();
        let events = std::fs::read_to_string(self.dir.join("events"))?;
        lines.extend(events.lines().map(str::to_owned));
        for node in 1..=NODES {
            let log = std::fs::read_to_string(self.dir.join(format!("n{node}.log")));
            for line in log.unwrap_or_default().lines() {
                match line.split_once(char::is_whitespace) {
                    Some((at, rest)) if at.starts_with("20") => {
                        lines.push(format!("{at} n{node}     {}", rest.trim_start()));
                    }
                    // A part of what the line before it says.
                    _ => {
                        if let Some(last) = lines.last_mut() {
                            let _written = write!(last, " | {line}");
                        }
                    }
                }
            }
        }
        for io in requests.iter().filter(|io| block.is_none_or(|block| io.covers(block))) {
            let what = io.what(block);
            lines.push(format!("{} io     {what} is sent", stamp(io.began)));
            let (took, end) = (io.took().as_millis(), stamp(io.ended));
            lines.push(format!("{end} io     {what} {} after {took} ms", io.end(block)));
        }
        lines.sort();
        let path = self.dir.join("trace");
        std::fs::write(&path, lines.join("\n") + "\n")?;
        Ok(path)
    }
}

impl Io {
    fn covers(&self, block: u64) -> bool {
        self.op == IoOp::Flush || (self.lba..self.lba + self.blocks).contains(&block)
    }

    fn took(&self) -> Duration {
        self.ended.duration_since(self.began).unwrap_or_default()
    }

    fn what(&self, block: Option<u64>) -> String {
        let Self { host, node, op, lba, blocks, invoked, value, .. } = self;
        let value = if op.is_mutation() { format!(" of {value}") } else { String::new() };
        let at = match block {
            Some(_) if *op == IoOp::Flush => String::new(),
            _ => format!(" {lba}+{blocks}"),
        };
        format!("host {host} by n{}: {op:?}{value}{at} ({invoked})", node + 1)
    }

    fn end(&self, block: Option<u64>) -> String {
        match &self.outcome {
            Outcome::Done if self.op == IoOp::Read => {
                let at = block.and_then(|block| usize::try_from(block - self.lba).ok());
                let seen = at.and_then(|at| self.seen.get(at));
                seen.map_or_else(|| "is done".to_owned(), |value| format!("returns {value}"))
            }
            Outcome::Done => "is acked".to_owned(),
            Outcome::Failed(why) => format!("fails: {why}"),
            Outcome::Unknown => "is not answered".to_owned(),
        }
    }
}

fn stamp(at: SystemTime) -> String {
    humantime::format_rfc3339_micros(at).to_string()
}
