//! `cargo xtask nemesis`: builds `cairn` with the feature `nemesis`, and torments it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;

use crate::process::cargo;

/// The binaries that a run needs.
pub(crate) struct Built {
    pub(crate) nemesis: PathBuf,
    pub(crate) cairn: PathBuf,
}

/// Builds them; `cargo` runs a command and says whether it went well.
pub(crate) fn build(mut cargo: impl FnMut(&[&str]) -> Result<bool>) -> Result<Built> {
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata failed")?;
    let target = metadata.target_directory.as_std_path();
    if !cargo(&["build", "-q", "-p", "cairn", "--features", "nemesis"])? {
        bail!("cairn does not build with the feature nemesis");
    }
    // Moved away from where the usual build lies, so that nobody takes it for that.
    let (usual, cairn) = (target.join("debug/cairn"), target.join("nemesis/cairn"));
    std::fs::create_dir_all(target.join("nemesis"))?;
    std::fs::copy(&usual, &cairn).context("copying the binary")?;
    std::fs::remove_file(&usual)?;
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
    let built = build(|args| Ok(Command::new(cargo()).args(args).status()?.success()))?;
    Ok(built.command(options).status()?.success())
}
