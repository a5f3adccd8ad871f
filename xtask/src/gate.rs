//! `cargo xtask gate`: builds the program that counts instructions, and one of another commit where that is asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;

use crate::process::cargo;

/// Options of `cargo xtask gate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Count this commit, too, and compare with it instead of the baseline.
    #[arg(long, value_name = "COMMIT")]
    base: Option<String>,
    /// Write the baseline anew.
    #[arg(long, conflicts_with = "base")]
    update: bool,
    /// Percent that a request may take more instructions than before.
    #[arg(long, default_value_t = 3.0)]
    tolerance: f64,
}

/// What is built.
pub(crate) const BUILD: &[&str] =
    &["build", "-q", "--release", "-p", "cairn-benches", "--bin", "gate"];

/// Whether no row has grown.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let metadata = MetadataCommand::new().no_deps().exec().context("cargo metadata failed")?;
    let (root, target) =
        (metadata.workspace_root.as_std_path(), metadata.target_directory.as_std_path());
    if !Command::new(cargo()).args(BUILD).current_dir(root).status()?.success() {
        return Ok(false);
    }
    let mut gate = Command::new(target.join("release/gate"));
    gate.current_dir(root).args(["--tolerance", &options.tolerance.to_string()]);
    if options.update {
        gate.arg("--update");
    }
    if let Some(commit) = &options.base {
        gate.arg("--against").arg(base(&target.join("gate-base"), commit)?);
    }
    Ok(gate.status()?.success())
}

/// The same program, of another commit. Its folder is kept: the next one builds only what differs.
fn base(dir: &Path, commit: &str) -> Result<PathBuf> {
    let tree = dir.join("tree");
    let git = |args: &[&str]| -> Result<()> {
        let status = Command::new("git").args(args).status().context("cannot start git")?;
        if !status.success() {
            bail!("git {} failed", args.join(" "));
        }
        Ok(())
    };
    let path = tree.to_string_lossy().into_owned();
    if tree.join(".git").exists() {
        git(&["-C", &path, "checkout", "-q", "--detach", commit])?;
    } else {
        std::fs::create_dir_all(dir)?;
        git(&["worktree", "add", "-q", "--force", "--detach", &path, commit])?;
    }
    let mut build = Command::new(cargo());
    build.args(BUILD).current_dir(&tree).env("CARGO_TARGET_DIR", dir.join("target"));
    if !build.status()?.success() {
        bail!(
            "{commit} has no program that counts, or does not build; compare with the baseline instead"
        );
    }
    Ok(dir.join("target/release/gate"))
}
