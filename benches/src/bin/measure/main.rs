//! Measurements of the pool, each with a bar. `cargo xtask measure NAME` runs one; docs/performance.md
//! tells what each does.
#![forbid(unsafe_code)]

mod amplification;
mod checksums;
mod discard;
mod open;
mod rig;
mod served;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};

/// Measures the pool.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask measure")]
struct Args {
    #[command(subcommand)]
    what: What,

    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,

    /// Where files are made, and removed again. It needs a file system with O_DIRECT and sparse files.
    #[arg(long, global = true, default_value = "target")]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Bytes written to the device for each byte that the host writes.
    Amplification,
    /// Opening 1 TiB with 4,096 dirty extents after a kill: time and memory.
    Open(open::Options),
    /// What checksums cost.
    Checksums(checksums::Options),
    /// What comes back to the file system when everything is discarded.
    Discard(discard::Options),
    /// All of them.
    All,
    /// Part of `open`: dirties the pool and waits to be killed.
    #[command(hide = true)]
    OpenDirty(open::Child),
    /// Part of `open`: opens the pool and says what it took.
    #[command(hide = true)]
    OpenServe(open::Child),
}

/// A figure, and the bar that it is held to.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// At most so much; at least, where `least` is set.
    pub(crate) bar: Option<f64>,
    pub(crate) least: bool,
    pub(crate) note: String,
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, bar: None, least: false, note: String::new() }
    }

    pub(crate) fn at_most(self, bar: f64) -> Self {
        Self { bar: Some(bar), ..self }
    }

    pub(crate) fn at_least(self, bar: f64) -> Self {
        Self { bar: Some(bar), least: true, ..self }
    }

    pub(crate) fn note(self, note: impl Into<String>) -> Self {
        Self { note: note.into(), ..self }
    }

    fn met(&self) -> Option<bool> {
        let bar = self.bar?;
        Some(if self.least { self.value >= bar } else { self.value <= bar })
    }

    fn verdict(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        }
    }

    fn bar_text(&self) -> String {
        let sign = if self.least { ">=" } else { "<=" };
        self.bar.map_or_else(String::new, |bar| format!("{sign} {bar}"))
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name, "value": self.value, "unit": self.unit, "bar": self.bar,
            "met": self.met(), "note": self.note,
        })
    }
}

fn print(figures: &[Figure], as_json: bool) -> Result<()> {
    if as_json {
        let all: Vec<Value> = figures.iter().map(Figure::json).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let width = figures.iter().map(|f| f.name.len()).max().unwrap_or(0);
    for f in figures {
        println!(
            "{:width$}  {:>12.3} {:8} {:>9} {:6}  {}",
            f.name,
            f.value,
            f.unit,
            f.bar_text(),
            f.verdict(),
            f.note
        );
    }
    Ok(())
}

fn run(args: &Args) -> Result<Vec<Figure>> {
    let dir = &args.dir;
    Ok(match &args.what {
        What::Amplification => amplification::run()?,
        What::Open(options) => open::run(dir, options)?,
        What::Checksums(options) => checksums::run(dir, options)?,
        What::Discard(options) => discard::run(dir, options)?,
        What::All => {
            let mut all = amplification::run()?;
            all.extend(open::run(dir, &open::Options::default())?);
            all.extend(checksums::run(dir, &checksums::Options::default())?);
            all.extend(discard::run(dir, &discard::Options::default())?);
            all
        }
        What::OpenDirty(child) => open::dirty(child)?,
        What::OpenServe(child) => open::serve(child)?,
    })
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = run(&args).and_then(|figures| print(&figures, args.json));
    match result {
        // A bar that is missed is told and is no failure: the machine may have been busy.
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("measure: {e:#}");
            ExitCode::FAILURE
        }
    }
}
