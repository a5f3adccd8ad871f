//! `cairn pool check`: the check of a pool that no process has open.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use cairn_engine::device::PoolDevice;
use cairn_engine::reactor::{Attach, BlockFile, IoMode};
use cairn_engine::replica::{
    CheckOptions, CheckReport, Finding, Severity, check_pool as check_device,
};
use clap::Args;
use serde_json::{Value, json};

use crate::cli::{Global, Output};
use crate::output::say;

/// Options of `cairn pool check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The pool's file or block device. No process may have it open.
    path: PathBuf,

    /// Mend what can be mended without guessing; never touches data.
    #[arg(long)]
    repair: bool,

    /// Read and verify every block as well.
    #[arg(long)]
    data: bool,

    /// Go through the page cache: for filesystems that refuse O_DIRECT.
    #[arg(long)]
    buffered: bool,
}

/// As those of fsck(8): nothing wrong, all mended, damage is left, it could not be checked.
const REPAIRED: u8 = 1;
const DAMAGED: u8 = 4;
const NOT_RUN: u8 = 8;

pub(crate) fn run(global: &Global, args: &CheckArgs) -> ExitCode {
    match check(args).and_then(|report| print(global.output, &args.path, args.repair, &report)) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("cairn: {e:#}");
            ExitCode::from(NOT_RUN)
        }
    }
}

fn check(args: &CheckArgs) -> Result<CheckReport> {
    let mode = if args.buffered { IoMode::Buffered } else { IoMode::Direct };
    // Open for writing even where nothing is written: that takes the lock that a process has.
    let file = BlockFile::open(&args.path, mode)?;
    let mut dev = PoolDevice(Attach::File(file));
    let options = CheckOptions { repair: args.repair, data: args.data };
    check_device(&mut dev, &options)
        .with_context(|| format!("{} cannot be checked", args.path.display()))
}

fn code(report: &CheckReport) -> u8 {
    match (report.is_damaged(), report.is_repaired()) {
        (true, _) => DAMAGED,
        (false, true) => REPAIRED,
        (false, false) => 0,
    }
}

fn verdict(finding: &Finding) -> &'static str {
    match (finding.repaired, finding.problem.severity()) {
        (true, _) => "repaired",
        (false, Severity::Note) => "note",
        (false, Severity::Mendable) => "mendable",
        (false, Severity::Damage) => "damage",
    }
}

fn print(output: Output, path: &Path, repair: bool, report: &CheckReport) -> Result<u8> {
    let (c, code) = (&report.checked, code(report));
    if let Output::Json = output {
        let findings: Vec<Value> = report
            .findings
            .iter()
            .map(|f| {
                json!({
                    "severity": verdict(f), "repaired": f.repaired,
                    "what": f.problem.to_string(), "means": f.problem.meaning(),
                })
            })
            .collect();
        let body = json!({
            "pool": path.display().to_string(), "findings": findings, "code": code,
            "checked": {
                "extents": c.extents, "allocated": c.allocated, "dirty": c.dirty, "open": c.open,
                "replicas": c.replicas, "snapshots": c.snapshots, "good_blocks": c.good_blocks,
            },
        });
        say!("{}", serde_json::to_string_pretty(&body)?);
        return Ok(code);
    }
    for finding in &report.findings {
        say!("{:9} {}", verdict(finding), finding.problem);
        say!("{:9} {}", "", finding.problem.meaning());
    }
    say!(
        "{} extents, {} of them in use ({} dirty, {} open); {} replicas, {} snapshots; {} blocks verified",
        c.extents,
        c.allocated,
        c.dirty,
        c.open,
        c.replicas,
        c.snapshots,
        c.good_blocks
    );
    let mendable =
        report.findings.iter().any(|f| f.problem.severity() == Severity::Mendable && !f.repaired);
    match code {
        0 => say!("{} is clean", path.display()),
        REPAIRED => say!("{} was damaged and is repaired", path.display()),
        _ if mendable && !repair => {
            say!("{} is damaged; `--repair` mends what is mendable", path.display());
        }
        _ => say!("{} is damaged", path.display()),
    }
    Ok(code)
}
