//! What the disk gives: one file, and three files written by one process that counts a write when all
//! three have it. No replication over processes can be faster than the second.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use cairn_block::{Buf, ByteOffset, Memory};
use cairn_reactor::{
    Attach, BlockFile, Completion, DeviceId, Driver, DriverConfig, IoMode, Op, OpenError, Token,
    UringDriver,
};
use clap::Args;
use hdrhistogram::Histogram;

use super::{Group, Place, Running, Stack, full_file};
use crate::fio::{self, Fio};
use crate::load::{Client, Load, Measured, Pattern, tell};
use crate::procs::{run_json, wait_for};

pub(crate) const ONE: Stack = Stack {
    name: "one-file",
    title: "floor: fio, io_uring, one file",
    group: Group::Files,
    programs: &[fio::PROGRAM],
    start: one,
};

pub(crate) const THREE: Stack = Stack {
    name: "three-files",
    title: "floor: one process, three files",
    group: Group::Files,
    programs: &[],
    start: three,
};

struct One(Fio);

fn one(place: &Place) -> Result<Box<dyn Running>> {
    let path = place.dir.join("file");
    full_file(&path, place.size)?;
    Ok(Box::new(One(Fio::file(&path, place.size))))
}

impl Running for One {
    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        self.0.load(load, seconds)
    }

    fn servers(&self) -> Vec<u32> {
        Vec::new()
    }
}

struct Three {
    own: PathBuf,
    files: Vec<PathBuf>,
}

fn three(place: &Place) -> Result<Box<dyn Running>> {
    let files: Vec<PathBuf> = (0..3).map(|i| place.dir.join(format!("file{i}"))).collect();
    for file in &files {
        full_file(file, place.size)?;
    }
    Ok(Box::new(Three { own: place.own.clone(), files }))
}

impl Running for Three {
    /// Reads of three replicas are reads of one file.
    fn takes(&self, load: &Load) -> bool {
        load.write
    }

    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        let mut command = Command::new(&self.own);
        command.arg("fan-out");
        load.tell(&mut command, seconds, 0);
        Measured::told(&run_json(command.args(&self.files))?, load)
    }

    fn servers(&self) -> Vec<u32> {
        Vec::new()
    }
}

/// `fan-out`: writes everything to each of the files.
#[derive(Debug, Args)]
pub(crate) struct FanOut {
    /// The files, of the same size.
    files: Vec<PathBuf>,
    #[command(flatten)]
    load: Client,
}

/// A write under way.
struct Slot {
    buf: Buf,
    begun_ns: u64,
    /// Completions that are still to come.
    missing: usize,
    flushing: bool,
}

struct Fan {
    driver: UringDriver,
    devices: Vec<DeviceId>,
    pattern: Pattern,
}

impl Fan {
    fn write(&mut self, at: u64, slot: &mut Slot) {
        let offset = ByteOffset(self.pattern.next());
        slot.begun_ns = self.driver.now_ns();
        slot.missing = self.devices.len();
        slot.flushing = false;
        for &device in &self.devices {
            let op = Op::Write { device, offset, buf: slot.buf.slice(), fua: false };
            self.driver.submit(op, Token::new(at));
        }
    }

    fn flush(&mut self, at: u64, slot: &mut Slot) {
        slot.missing = self.devices.len();
        slot.flushing = true;
        for &device in &self.devices {
            self.driver.submit(Op::Flush { device }, Token::new(at));
        }
    }
}

/// The kernel closes the files of a ring some time after the process that had it has ended: that of the run before.
fn open(path: &Path) -> Result<BlockFile> {
    let mut file = BlockFile::open(path, IoMode::Direct);
    wait_for("the run before", 10, || {
        if matches!(file, Err(OpenError::Busy { .. })) {
            file = BlockFile::open(path, IoMode::Direct);
        }
        Ok(!matches!(file, Err(OpenError::Busy { .. })))
    })?;
    Ok(file?)
}

/// Prints what it measured as JSON.
pub(crate) fn fan_out(options: &FanOut) -> Result<()> {
    let mut driver = UringDriver::new(&DriverConfig { spin_ns: 0, ..DriverConfig::default() })?;
    let (mut devices, mut shortest) = (Vec::new(), u64::MAX);
    for path in &options.files {
        let file = open(path)?;
        shortest = shortest.min(file.len());
        devices.push(driver.attach_device(Attach::File(file))?);
    }
    let load = &options.load;
    let pattern = load.pattern(if devices.is_empty() { 0 } else { shortest })?;
    let mut slots = Vec::new();
    for _ in 0..load.qd {
        let buf = driver.memory().alloc(load.bs).context("no memory")?;
        driver.memory().bytes_mut(buf.slice()).fill(0xa7);
        slots.push(Slot { buf, begun_ns: 0, missing: 0, flushing: false });
    }
    let mut fan = Fan { driver, devices, pattern };
    let begun = fan.driver.now_ns();
    let end = begun + u64::try_from(load.time().as_nanos())?;
    for (at, slot) in (0..).zip(&mut slots) {
        fan.write(at, slot);
    }
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3)?;
    let mut out = Vec::with_capacity(1024);
    let mut busy = slots.len();
    while busy > 0 {
        fan.driver.poll(&mut out, None);
        for completion in out.drain(..) {
            let Completion::Disk { token, result } = completion else { continue };
            result.map_err(|fault| anyhow::anyhow!("a file failed: {fault}"))?;
            let slot = &mut slots[usize::try_from(token.value())?];
            slot.missing -= 1;
            if slot.missing > 0 {
                continue;
            }
            if load.durable && !slot.flushing {
                fan.flush(token.value(), slot);
                continue;
            }
            let now = fan.driver.now_ns();
            latency.saturating_record(now - slot.begun_ns);
            if now < end {
                fan.write(token.value(), slot);
            } else {
                busy -= 1;
            }
        }
    }
    let took = Duration::from_nanos(fan.driver.now_ns() - begun);
    tell(&latency, took, Some(crate::procs::cpu_seconds(&[std::process::id()])));
    Ok(())
}
