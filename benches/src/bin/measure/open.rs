//! Opening a large pool after a kill: how long until it serves, and how much memory it takes.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cairn_reactor::{Attach, BlockFile, IoMode, UringDriver};
use clap::Args;

use crate::Figure;
use crate::rig::{Ask, BLOCK, DEPTH, EXTENT, Real, Rig, make_file};

/// How large.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// GiB of the pool.
    #[arg(long, default_value_t = 1024)]
    gib: u64,
    /// Extents that are dirty when the process is killed: as many as may be, unless told otherwise.
    #[arg(long, default_value_t = 4096)]
    dirty: u64,
    /// Extents whose every block holds data, of the dirty ones; the others hold 64 KiB.
    #[arg(long, default_value_t = 1024)]
    full: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { gib: 1024, dirty: 4096, full: 1024 }
    }
}

/// What a child is told.
#[derive(Debug, Args)]
pub(crate) struct Child {
    path: PathBuf,
    gib: u64,
    dirty: u64,
    full: u64,
}

const GIB: u64 = 1 << 30;
const BLOCKS_PER_EXTENT: u64 = EXTENT / BLOCK;

fn rig(child: &Child, driver: UringDriver) -> Result<Rig<Real>> {
    let file = BlockFile::open(&child.path, IoMode::Direct)?;
    let (disk, pool) = Real::open_with(driver, Attach::File(file))?;
    Rig::new(pool, disk, child.gib * GIB / 10 * 9, 64 << 10)
}

/// Writes until so many extents are dirty, says so, and waits to be killed.
pub(crate) fn dirty(child: &Child) -> Result<Vec<Figure>> {
    let mut rig = rig(child, Real::driver()?)?;
    rig.fill();
    // Spread over the volume, so that the table is too.
    let apart = child.gib * GIB / 10 * 9 / EXTENT / child.dirty.max(1);
    let (mut extent, mut piece) = (0, 0);
    rig.run(DEPTH, || {
        if extent == child.dirty {
            return None;
        }
        let ask = Ask::write(extent * apart * BLOCKS_PER_EXTENT + piece * 16, 16);
        piece += 1;
        let pieces = if extent < child.full { 16 } else { 1 };
        if piece == pieces {
            (extent, piece) = (extent + 1, 0);
        }
        Some(ask)
    })?;
    println!("dirty {}", rig.pool.dirty_extents());
    loop {
        std::thread::park();
    }
}

/// Resident memory in KiB.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.context("no VmRSS in /proc/self/status")?.parse().context("VmRSS")
}

fn mib(kib: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let kib = kib as f64;
    kib / 1024.0
}

/// Opens what the killed process left.
pub(crate) fn serve(child: &Child) -> Result<Vec<Figure>> {
    let begun = Instant::now();
    // Its arena is pinned, and resident whatever is opened.
    let driver = Real::driver()?;
    let before = resident()?;
    let mut rig = rig(child, driver)?;
    let opened = begun.elapsed().as_secs_f64();
    let stale = rig.pool.dirty_extents();
    // The last one that would be hashed in the background: a read has it hashed at once.
    let apart = child.gib * GIB / 10 * 9 / EXTENT / child.dirty.max(1);
    let last = (child.dirty - 1) * apart * BLOCKS_PER_EXTENT;
    let mut one = Some(Ask::read(last));
    rig.run(1, || one.take())?;
    let serving = begun.elapsed().as_secs_f64();
    let at_service = resident()?;
    rig.settle()?;
    let hashed = begun.elapsed().as_secs_f64();
    let at_rest = resident()?;
    let tib = mib(child.gib) / 1.0;
    let per_tib = |kib: u64| mib(kib.saturating_sub(before)) / tib;
    Ok(vec![
        Figure::new("open: until Pool::open is back", opened, "s"),
        Figure::new("open: until a dirty extent is read", serving, "s")
            .at_most(5.0)
            .note(format!("{stale} extents were dirty")),
        Figure::new("open: until all are hashed", hashed, "s").note("in the background"),
        Figure::new("open: memory when it serves, per TiB", per_tib(at_service), "MiB")
            .at_most(64.0)
            .note(format!(
                "{:.1} MiB resident before, the driver's arena of 64 MiB among it",
                mib(before)
            )),
        Figure::new("open: memory when all are hashed, per TiB", per_tib(at_rest), "MiB")
            .note("checksums of the dirty extents, about 1.1 KiB each, and buffers among it"),
    ])
}

fn child(which: &str, path: &Path, options: &Options) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(which)
        .arg(path)
        .args([options.gib, options.dirty, options.full].map(|number| number.to_string()));
    Ok(command)
}

pub(crate) fn run(dir: &Path, options: &Options) -> Result<Vec<Figure>> {
    let path = dir.join(format!("measure-open-{}", std::process::id()));
    let measured = killed_and_opened(&path, options);
    std::fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
    measured
}

/// The kernel ends a killed process's ring, and lets go of its files, a little after the process.
fn wait_for_the_lock(path: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        match BlockFile::open(path, IoMode::Direct) {
            Ok(_) => return Ok(()),
            Err(e) if begun.elapsed() > Duration::from_secs(10) => return Err(e.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn killed_and_opened(path: &Path, options: &Options) -> Result<Vec<Figure>> {
    make_file(path, options.gib * GIB)?;
    let mut writer = child("open-dirty", path, options)?.stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let said = writer.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
    writer.kill()?;
    writer.wait()?;
    if !matches!(said, Some(Ok(n)) if n > 0) {
        bail!("the process that dirties the pool ended before it was done");
    }
    wait_for_the_lock(path)?;
    let output = child("open-serve", path, options)?.arg("--json").output()?;
    if !output.status.success() {
        bail!("opening failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let figures: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    figures.iter().map(figure).collect()
}

/// A figure that a child has printed.
fn figure(json: &serde_json::Value) -> Result<Figure> {
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    Ok(Figure {
        name: text("name"),
        value: json["value"].as_f64().context("a figure without a value")?,
        unit: if json["unit"] == "s" { "s" } else { "MiB" },
        bar: json["bar"].as_f64(),
        least: false,
        note: text("note"),
    })
}
