//! QEMU as an initiator: an image goes to the volume and comes back, and a guest's disk is the volume.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::host::output;
use crate::image::{Image, ROOT_MIB};
use crate::net::Net;
use crate::peer::Unit;

/// Who QEMU says it is.
pub(crate) const INITIATOR: &str = "iqn.2026-11.test:qemu";

/// The disk of a guest, for `-blockdev`. Discards reach the volume.
pub(crate) fn blockdev(unit: &Unit) -> String {
    format!("node-name=root,driver=raw,discard=unmap,{}", options(unit, "file."))
}

/// The unit, for programs of QEMU that take `--image-opts`.
fn image_options(unit: &Unit) -> String {
    format!("driver=raw,{}", options(unit, "file."))
}

fn options(unit: &Unit, of: &str) -> String {
    let Unit { address, port, iqn } = unit;
    format!(
        "{of}driver=iscsi,{of}transport=tcp,{of}portal={address}:{port},{of}target={iqn},{of}lun=0,\
         {of}initiator-name={INITIATOR}"
    )
}

/// Writes the image's root file system to the volume, reads it back, and compares them.
pub(crate) fn install(image: &Image, net: &Net, unit: &Unit, scratch: &Path) -> Result<()> {
    let qemu_img = |args: &[&str]| -> Result<String> {
        let mut command: Command = net.in_hosts(Path::new("qemu-img"));
        output(command.args(args))
    };
    let (there, from) = (image_options(unit), image.root.display().to_string());
    qemu_img(&["convert", "-n", "-f", "raw", "--target-image-opts", &from, &there])?;
    let back = scratch.join("back.raw");
    let to = back.display().to_string();
    qemu_img(&["convert", "--image-opts", "-O", "raw", &there, &to])?;
    // The volume is larger than the image: what comes after that was never written.
    let size = u64::from(ROOT_MIB) << 20;
    let whole = fs::metadata(&back)?.len();
    ensure!(whole > size, "{whole} bytes came back, and the volume is larger than {size}");
    let compared = qemu_img(&["compare", "-f", "raw", "-F", "raw", &from, &to]);
    let gone = fs::remove_file(&back);
    compared.context("what came back from the volume differs")?;
    gone.context("removing what came back")
}
