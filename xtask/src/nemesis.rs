//! `cargo xtask nemesis`: builds `cairn` with the feature `nemesis`, and torments it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;

use crate::process::cargo;

/// The program with the feature `nemesis`; `cargo` runs a command and says whether it went well.
fn faulty(target: &Path, mut cargo: impl FnMut(&[&str]) -> Result<bool>) -> Result<PathBuf> {
    if !cargo(&["build", "-q", "-p", "cairn", "--features", "nemesis"])? {
        bail!("cairn does not build with the feature nemesis");
    }
    // Moved away from where the usual build lies, so that nobody takes it for that.
    let (usual, cairn) = (target.join("debug/cairn"), target.join("nemesis/cairn"));
    std::fs::create_dir_all(target.join("nemesis"))?;
    std::fs::copy(&usual, &cairn).context("copying the binary")?;
    std::fs::remove_file(&usual)?;
    Ok(cairn)
}

fn target() -> Result<PathBuf> {
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata failed")?;
    Ok(metadata.target_directory.into_std_path_buf())
}

/// The binaries that a run needs.
pub(crate) struct Built {
    pub(crate) nemesis: PathBuf,
    pub(crate) cairn: PathBuf,
}

/// Builds them; `cargo` runs a command and says whether it went well.
pub(crate) fn build(mut cargo: impl FnMut(&[&str]) -> Result<bool>) -> Result<Built> {
    let target = target()?;
    let cairn = faulty(&target, &mut cargo)?;
    if !cargo(&["build", "-q", "-p", "cairn-nemesis"])? {
        bail!("the nemesis does not build");
    }
    Ok(Built { nemesis: target.join("debug/nemesis"), cairn })
}

impl Built {
    /// The nemesis, with these options.
    pub(crate) fn command(&self, options: &[impl AsRef<std::ffi::OsStr>]) -> Command {
        let mut command = Command::new(&self.nemesis);
        command.arg("--cairn").arg(&self.cairn).args(options);
        command.env("CAIRN_COMMIT", crate::commit());
        command
    }
}

/// Runs it with the caller's options.
pub(crate) fn run(options: &[String]) -> Result<bool> {
    Ok(build(run_cargo)?.command(options).status()?.success())
}

/// Runs the guest with the caller's options.
pub(crate) fn guest(options: &[String]) -> Result<bool> {
    let target = target()?;
    let nemesis = faulty(&target, run_cargo)?;
    let built = run_cargo(&["build", "-q", "--release", "-p", "cairn"])?
        && run_cargo(&["build", "-q", "-p", "cairn-tests"])?;
    if !built {
        return Ok(false);
    }
    let mut guest = Command::new(target.join("debug/guest"));
    guest.arg("--cairn").arg(target.join("release/cairn")).arg("--nemesis").arg(nemesis);
    Ok(guest.args(options).status()?.success())
}

fn run_cargo(args: &[&str]) -> Result<bool> {
    Ok(Command::new(cargo()).args(args).status()?.success())
}
