//! A guest: one qemu process, its console log, and the line protocol over its second serial port.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;
use crate::disk;
use crate::host::{check_interrupted, tail};
use crate::image::Image;
use crate::net::Net;
use crate::peer::Unit;

/// What to boot.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    /// Names the log files.
    pub(crate) name: &'a str,
    pub(crate) tap: &'a str,
    pub(crate) ip: &'a str,
    pub(crate) memory_mib: u32,
    /// The job: run with `env` already sourced.
    pub(crate) script: &'a str,
    /// Shell variables for the job.
    pub(crate) env: Vec<(&'a str, String)>,
    /// A logical unit that QEMU logs in to and gives to the guest as a disk, with the guest's root file system on it.
    pub(crate) root: Option<&'a Unit>,
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    console: PathBuf,
}

const KERNEL_LINE: &str = "console=ttyS0 panic=-1 reboot=t loglevel=4 log_buf_len=1M \
                           mitigations=off random.trust_cpu=on nokaslr";
/// `guest/init` looks for it.
const ROOT_LINE: &str = " root=/dev/vda rootfstype=ext4";
const INIT: &str = include_str!("../guest/init");
const LIB: &str = include_str!("../guest/lib.sh");
const ISCSI: &str = include_str!("../guest/iscsi.sh");

impl Guest {
    pub(crate) fn boot(image: &Image, net: &Net, logs: &Path, boot: &Boot<'_>) -> Result<Self> {
        let initrd = logs.join(format!("{}.initrd", boot.name));
        write_initrd(image, boot, &initrd)?;
        let console = logs.join(format!("{}.console.log", boot.name));
        let errors = File::create(logs.join(format!("{}.qemu.log", boot.name)))?;
        let ip = boot.ip.rsplit('.').next().unwrap_or_default();
        let mut qemu = net.in_hosts(Path::new("qemu-system-x86_64"));
        // Emulation only: it works wherever the tests do. One-gigabyte pages of the five-level kind
        // and the devices that the guest does not use only cost boot time.
        qemu.args(["-M", "q35,smm=off,sata=off,usb=off,vmport=off,graphics=off"])
            .args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,la57=off", "-smp", "2"])
            .args(["-m", &boot.memory_mib.to_string(), "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-monitor", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&initrd)
            .args(["-append", &format!("{KERNEL_LINE}{}", boot.root.map_or("", |_| ROOT_LINE))])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-serial", "stdio"])
            .args(["-netdev", &format!("tap,id=n0,ifname={},script=no,downscript=no", boot.tap)])
            .args([
                "-device",
                &format!("virtio-net-pci,romfile=,netdev=n0,mac=52:54:00:00:00:{ip}"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        if let Some(unit) = boot.root {
            qemu.args(["-blockdev", &disk::blockdev(unit)]);
            qemu.args(["-device", "virtio-blk-pci,drive=root"]);
        }
        let mut qemu = qemu.spawn().context("could not start qemu-system-x86_64")?;
        let input = qemu.stdin.take().context("qemu has no input")?;
        let output = qemu.stdout.take().context("qemu has no output")?;
        let mut log = File::create(logs.join(format!("{}.protocol.log", boot.name)))?;
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                let _ = writeln!(log, "{line}");
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { qemu, input, lines, console })
    }

    /// The next line of the protocol; `None` when the guest has ended.
    pub(crate) fn line(&self, deadline: Instant) -> Result<Option<String>> {
        loop {
            check_interrupted()?;
            match self.lines.recv_timeout(Duration::from_millis(200)) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    bail!("the guest said nothing in time; its console ends:\n{}", self.tail())
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Reads until a line starts with `start`, and returns that line.
    pub(crate) fn expect(&self, start: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        while let Some(line) = self.line(deadline).with_context(|| format!("no {start}"))? {
            if line.starts_with(start) {
                return Ok(line);
            }
        }
        bail!("the guest ended before {start}; its console ends:\n{}", self.tail())
    }

    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")
            .and_then(|()| self.input.flush())
            .context("the guest's serial port is closed")
    }

    pub(crate) fn tail(&self) -> String {
        tail(&self.console, 15)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The image's archive followed by a second one with init and the job: the kernel unpacks both, so
/// no disk is needed to get a job in, and a changed script needs no new image.
fn write_initrd(image: &Image, boot: &Boot<'_>, to: &Path) -> Result<()> {
    let mut bytes = fs::read(&image.initrd)
        .with_context(|| format!("no image at {}", image.initrd.display()))?;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut env = format!("export GUEST_IP='{}'\n", boot.ip);
    for (name, value) in &boot.env {
        env.push_str(&format!("export {name}='{value}'\n"));
    }
    let mut job = Cpio::new(bytes);
    job.dir("job")?;
    job.file("init", 0o755, INIT.as_bytes())?;
    job.file("job/lib.sh", 0o644, LIB.as_bytes())?;
    job.file("job/iscsi.sh", 0o644, ISCSI.as_bytes())?;
    job.file("job/env", 0o644, env.as_bytes())?;
    job.file("job/run.sh", 0o644, boot.script.as_bytes())?;
    fs::write(to, job.finish()?)?;
    Ok(())
}
