//! The guest's kernel and first root file system, made from Debian packages.
//!
//! Everything lives under `.cache/guest` and is made once. apt runs with a state and a cache of its
//! own there: the machine's package state is neither used nor changed. The image's directory is
//! named after the kernel package, its version and a digest of the recipe below, so a change of
//! either makes a new image; `--refresh` asks the archive for a newer kernel.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cpio::Cpio;
use crate::host::{check_interrupted, command, output, run};

/// What the guest's programs come from; apt adds what they depend on.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "nvme-cli",
    "fio",
    "e2fsprogs",
    "xfsprogs",
    "util-linux",
    "kmod",
    "open-iscsi",
    "multipath-tools",
    "dmsetup",
    "sg3-utils",
    "udev",
];

/// Programs beside busybox's. Each is looked for at these places and must be found.
const PROGRAMS: &[&str] = &[
    "usr/sbin/nvme",
    "usr/bin/fio",
    "sbin/mke2fs",
    "sbin/e2fsck",
    "sbin/resize2fs",
    "sbin/mkfs.xfs",
    "sbin/xfs_repair",
    "usr/sbin/xfs_growfs",
    "sbin/blkdiscard",
    "sbin/fstrim",
    "bin/kmod",
    "sbin/iscsid",
    "sbin/iscsiadm",
    "sbin/multipath",
    "sbin/multipathd",
    "sbin/dmsetup",
    "usr/bin/sg_persist",
    "bin/udevadm",
    "lib/udev/scsi_id",
];

/// Folders that are there as the packages have them: rules of udev, and what multipath loads by name.
const FOLDERS: &[&str] = &["lib/udev/rules.d", "lib/multipath", "etc/iscsi"];

/// Links to the above by the names they are called by.
const LINKS: &[(&str, &str)] = &[
    ("sbin/mkfs.ext4", "mke2fs"),
    ("sbin/modprobe", "/bin/kmod"),
    ("sbin/insmod", "/bin/kmod"),
    ("sbin/rmmod", "/bin/kmod"),
    ("sbin/lsmod", "/bin/kmod"),
    ("sbin/udevd", "/bin/udevadm"),
];

/// With what each needs. A name that the kernel has built in, or not at all, adds nothing.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "nvme-core",
    "nvme-fabrics",
    "nvme-tcp",
    "nvmet",
    "nvmet-tcp",
    "null_blk",
    "configfs",
    "ext4",
    "xfs",
    "crc32c_generic",
    "crc32c-intel",
    "crc16",
    "libcrc32c",
    "sha256_generic",
    "hmac",
    "dh_generic",
    "iscsi_tcp",
    "sd_mod",
    "sg",
    "scsi_dh_alua",
    "dm-multipath",
    "dm-service-time",
];

/// Without these the image is no use; a kernel that lacks one is refused while it is made.
const REQUIRED_MODULES: &[&str] = &[
    "nvme-tcp",
    "ext4",
    "xfs",
    "virtio_net",
    "virtio_blk",
    "iscsi_tcp",
    "sd_mod",
    "scsi_dh_alua",
    "dm-multipath",
];

/// Raised when the code below makes a different image from the same lists.
const RECIPE: u32 = 3;

/// A bootable image.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// The same files as a file system, for a guest whose root is on a disk.
    pub(crate) root: PathBuf,
}

/// What it is as large as.
pub(crate) const ROOT_MIB: u32 = 512;

/// The cached image, made first if it is missing (or `refresh` asks the archive again).
pub(crate) fn prepare(cache: &Path, refresh: bool) -> Result<Image> {
    let current = cache.join("current");
    let recipe = recipe_digest();
    if !refresh && let Ok(name) = fs::read_to_string(&current) {
        let dir = cache.join(name.trim());
        if name.trim().ends_with(&recipe) && dir.join("complete").exists() {
            return Ok(image_in(&dir));
        }
    }
    println!("guest: making the guest image in {} (once)", cache.display());
    fs::create_dir_all(cache)?;
    let apt = Apt::new(cache)?;
    apt.update()?;
    let (kernel, version) = apt.newest_kernel()?;
    let name = format!("{kernel}_{version}_{recipe}").replace([':', '~', '/'], "-");
    let dir = cache.join(&name);
    if !dir.join("complete").exists() {
        // Made aside and renamed: an interrupted run leaves no half image under the real name.
        let making = cache.join(format!("making-{}", std::process::id()));
        let _ = fs::remove_dir_all(&making);
        let made = make(&apt, &kernel, &making);
        if let Err(e) = made {
            let _ = fs::remove_dir_all(&making);
            return Err(e.context("could not make the guest image"));
        }
        let _ = fs::remove_dir_all(&dir);
        fs::rename(&making, &dir)?;
    }
    fs::write(&current, &name)?;
    println!("guest: image {name} is ready");
    Ok(image_in(&dir))
}

fn image_in(dir: &Path) -> Image {
    Image { kernel: dir.join("kernel"), initrd: dir.join("initrd"), root: dir.join("root.ext4") }
}

/// FNV-1a over the lists that decide what is in the image.
fn recipe_digest() -> String {
    let links = LINKS.iter().flat_map(|(a, b)| [*a, *b]);
    let all = PACKAGES.iter().chain(PROGRAMS).chain(FOLDERS).chain(MODULES).copied().chain(links);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ u64::from(RECIPE);
    for byte in all.flat_map(|s| s.bytes().chain([0])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

/// apt with a state, lists and archives of its own.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn new(cache: &Path) -> Result<Self> {
        let dir = cache.join("apt");
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        // An empty status makes apt take every dependency, down to libc.
        fs::write(dir.join("status"), "")?;
        Ok(Self { dir })
    }

    fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        let d = self.dir.display();
        for option in [
            format!("Dir::State={d}/state"),
            format!("Dir::State::status={d}/status"),
            format!("Dir::Cache={d}/cache"),
            "Debug::NoLocking=1".to_owned(),
            // The cache belongs to whoever runs the tests, which apt's own user cannot write.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            c.arg("-o").arg(option);
        }
        c
    }

    fn update(&self) -> Result<()> {
        println!("guest: apt-get update");
        output(self.command("apt-get").args(["update", "-q"])).map(drop)
    }

    /// The newest Linux 6.12 image package, and its version. Not the one for virtual machines: that lacks what Linux
    /// knows of the access states of SCSI.
    fn newest_kernel(&self) -> Result<(String, String)> {
        let pattern = "^linux-image-6\\.12\\.[0-9][^-]*-amd64$";
        let found =
            output(self.command("apt-cache").args(["search", "--names-only"]).arg(pattern))?;
        let package = found
            .lines()
            .filter_map(|l| l.split_whitespace().next())
            .max_by_key(|name| number_after(name, "6.12."))
            .context(
                "the configured apt sources have no linux-image-6.12.*-amd64; \
                 add the distribution's security or backports suite",
            )?
            .to_owned();
        let shown =
            output(self.command("apt-cache").args(["show", "--no-all-versions", &package]))?;
        let version = shown
            .lines()
            .find_map(|l| l.strip_prefix("Version: "))
            .context("apt-cache show gave no version")?
            .to_owned();
        Ok((package, version))
    }

    /// Downloads the packages with all they need and unpacks them into `into`.
    fn unpack_closure(&self, packages: &[&str], into: &Path) -> Result<()> {
        println!("guest: downloading {}", packages.join(" "));
        let mut install = self.command("apt-get");
        install.args(["install", "-y", "-q", "--download-only", "--no-install-recommends"]);
        output(install.args(packages))?;
        let archives = self.dir.join("cache/archives");
        let mut debs = Vec::new();
        for entry in fs::read_dir(&archives)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                debs.push(path);
            }
        }
        debs.sort();
        println!("guest: unpacking {} packages", debs.len());
        for deb in debs {
            check_interrupted()?;
            output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(into))?;
        }
        // Downloaded versions must not pile up beside the next image's.
        fs::remove_dir_all(&archives)?;
        fs::create_dir_all(archives.join("partial"))?;
        Ok(())
    }

    fn unpack_one(&self, package: &str, work: &Path, into: &Path) -> Result<()> {
        println!("guest: downloading {package}");
        fs::create_dir_all(work)?;
        output(self.command("apt-get").current_dir(work).args(["download", package]))?;
        for entry in fs::read_dir(work)? {
            output(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(into))?;
        }
        Ok(())
    }
}

fn number_after(text: &str, prefix: &str) -> u32 {
    let rest = text.split_once(prefix).map_or("", |(_, rest)| rest);
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

fn make(apt: &Apt, kernel: &str, dir: &Path) -> Result<()> {
    let sysroot = dir.join("sysroot");
    fs::create_dir_all(&sysroot)?;
    apt.unpack_closure(PACKAGES, &sysroot)?;
    apt.unpack_one(kernel, &dir.join("deb"), &sysroot)?;
    let release = kernel.strip_prefix("linux-image-").unwrap_or(kernel);
    extract_kernel(&sysroot.join("boot").join(format!("vmlinuz-{release}")), &dir.join("kernel"))?;

    let root = dir.join("root");
    for sub in ["bin", "sbin", "etc/nvme", "dev", "proc", "sys", "run", "tmp", "mnt", "lib64"] {
        fs::create_dir_all(root.join(sub))?;
    }
    add_busybox(&sysroot, &root)?;
    for program in PROGRAMS {
        add_program(&sysroot, program, &root)?;
    }
    for folder in FOLDERS {
        add_folder(&sysroot, folder, &root)?;
    }
    for (link, to) in LINKS {
        replace_link(&root.join(link), to)?;
    }
    add_modules(&sysroot, release, &root)?;
    add_settings(&sysroot, &root)?;

    println!("guest: packing the initramfs");
    let mut pack = command("zstd -q -3 -T0 -f -o")
        .arg(dir.join("initrd"))
        .stdin(Stdio::piped())
        .spawn()
        .context("could not start zstd")?;
    let pipe = pack.stdin.take().context("zstd has no input")?;
    let mut cpio = Cpio::new(BufWriter::with_capacity(1 << 20, pipe));
    cpio.tree(&root)?;
    drop(cpio.finish()?);
    if !pack.wait()?.success() {
        bail!("zstd failed");
    }
    println!("guest: making a root file system");
    let mut make = command("mkfs.ext4 -q -F -d");
    make.arg(&root).arg(dir.join("root.ext4")).arg(format!("{ROOT_MIB}M"));
    output(&mut make)?;
    for scratch in ["sysroot", "root", "deb"] {
        fs::remove_dir_all(dir.join(scratch))?;
    }
    fs::write(dir.join("complete"), "")?;
    Ok(())
}

/// The ELF kernel out of a bzImage: emulated unpacking costs seconds at every boot. A kernel packed
/// in a way not known here boots as it is.
fn extract_kernel(image: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(image).with_context(|| format!("no kernel at {}", image.display()))?;
    let packers: [(&[u8], &str); 3] = [
        (b"\x28\xb5\x2f\xfd", "zstd -dc"),
        (b"\xfd7zXZ\0", "xz -dc --single-stream"),
        (b"\x1f\x8b\x08", "gzip -dc"),
    ];
    for (magic, unpack) in packers {
        for at in (0..bytes.len() - magic.len()).filter(|&i| bytes[i..].starts_with(magic)) {
            if let Some(elf) = filter(unpack, &bytes[at..])? {
                fs::write(to, elf)?;
                return Ok(());
            }
        }
    }
    fs::write(to, bytes)?;
    Ok(())
}

/// What `line` makes of `input`, if that is an ELF file. Trailing rubbish makes the tools complain
/// after they have given all the data, so the exit code says nothing.
fn filter(line: &str, input: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut child = command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("could not start `{line}`"))?;
    let mut pipe = child.stdin.take().context("no input")?;
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || drop(pipe.write_all(&input)));
    let out = child.wait_with_output()?.stdout;
    feeder.join().ok();
    Ok(out.starts_with(b"\x7fELF").then_some(out))
}

fn add_busybox(sysroot: &Path, root: &Path) -> Result<()> {
    let busybox = sysroot.join("bin/busybox");
    fs::copy(&busybox, root.join("bin/busybox")).context("the packages hold no busybox")?;
    for applet in output(Command::new(&busybox).arg("--list"))?.lines() {
        if applet != "busybox" {
            replace_link(&root.join("bin").join(applet), "busybox")?;
        }
    }
    Ok(())
}

fn add_program(sysroot: &Path, program: &str, root: &Path) -> Result<()> {
    let name = program.rsplit('/').next().unwrap_or(program);
    // Debian moves programs between / and /usr from release to release.
    let places = [program.to_owned(), format!("usr/{program}")];
    let place = places
        .iter()
        .find(|p| sysroot.join(p).exists())
        .with_context(|| format!("the packages hold no {program}"))?;
    let _ = fs::remove_file(root.join("bin").join(name));
    copy(&sysroot.join(place), &root.join(program))?;
    let mut list = command("chroot");
    list.arg(sysroot).args(["/lib64/ld-linux-x86-64.so.2", "--list"]).arg(format!("/{place}"));
    let listed = output(&mut list)?;
    for library in listed.split_whitespace().filter(|w| w.starts_with('/')) {
        let relative = library.trim_start_matches('/');
        let to = root.join(relative);
        if !to.exists() && sysroot.join(relative).exists() {
            copy(&sysroot.join(relative), &to)?;
        }
    }
    // fio cancels threads, and glibc loads this one by name when it does.
    let unwinder = "lib/x86_64-linux-gnu/libgcc_s.so.1";
    for from in [sysroot.join(unwinder), sysroot.join("usr").join(unwinder)] {
        if from.exists() && !root.join(unwinder).exists() {
            copy(&from, &root.join(unwinder))?;
        }
    }
    Ok(())
}

fn add_folder(sysroot: &Path, folder: &str, root: &Path) -> Result<()> {
    let places = [sysroot.join(folder), sysroot.join("usr").join(folder)];
    let found: Vec<_> = places.iter().filter(|place| place.is_dir()).collect();
    ensure!(!found.is_empty(), "the packages hold no {folder}");
    for place in found {
        for entry in fs::read_dir(place)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                copy(&entry.path(), &root.join(folder).join(entry.file_name()))?;
            }
        }
    }
    Ok(())
}

fn add_modules(sysroot: &Path, release: &str, root: &Path) -> Result<()> {
    let tool = |name: &str| {
        let mut c = command("chroot");
        c.arg(sysroot).arg(format!("/sbin/{name}"));
        c
    };
    // Newer kernel packages put modules under usr/lib.
    let modules = format!("lib/modules/{release}");
    if !sysroot.join(&modules).exists() {
        fs::create_dir_all(sysroot.join("lib/modules"))?;
        symlink(format!("/usr/{modules}"), sysroot.join(&modules))?;
    }
    output(tool("depmod").arg(release))?;
    let mut files = BTreeSet::new();
    for module in MODULES {
        let shown = tool("modprobe").args(["-S", release, "--show-depends", module]).output()?;
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        if REQUIRED_MODULES.contains(module) && !shown.status.success() {
            bail!("kernel {release} has no {module}");
        }
        let insmods = text.lines().filter_map(|l| l.strip_prefix("insmod "));
        files.extend(insmods.map(|l| l.trim().trim_start_matches('/').to_owned()));
    }
    for file in &files {
        let (from, to) = (sysroot.join(file), root.join(file));
        copy(&from, &to)?;
        if file.ends_with(".xz") {
            output(command("xz -d").arg(&to))?;
        } else if file.ends_with(".zst") {
            output(command("zstd -q -d --rm").arg(&to))?;
        }
    }
    for list in ["modules.builtin", "modules.order", "modules.builtin.modinfo"] {
        let from = sysroot.join(&modules).join(list);
        if from.exists() {
            copy(&from, &root.join(&modules).join(list))?;
        }
    }
    // depmod of the sysroot, over the guest's tree: names and paths differ once unpacked.
    let inside = sysroot.join("guest-root");
    fs::create_dir_all(inside.join("lib"))?;
    run(&format!("cp -a {} {}", root.join("lib/modules").display(), inside.join("lib").display()))?;
    output(tool("depmod").args(["-b", "/guest-root", release]))?;
    for entry in fs::read_dir(inside.join(&modules))? {
        let path = entry?.path();
        if path.is_file() {
            fs::copy(&path, root.join(&modules).join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

fn add_settings(sysroot: &Path, root: &Path) -> Result<()> {
    let etc = root.join("etc");
    fs::copy(sysroot.join("etc/mke2fs.conf"), etc.join("mke2fs.conf"))?;
    let uuid = "5f1c8a52-58c1-4bd4-9c3c-6f0d7ca1a001";
    for (name, text) in [
        ("passwd", "root:x:0:0:root:/:/bin/sh\n"),
        ("group", "root:x:0:\n"),
        ("nsswitch.conf", "hosts: files\n"),
        ("hosts", "127.0.0.1 localhost guest\n"),
        ("nvme/hostnqn", &format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}\n")),
        ("nvme/hostid", &format!("{uuid}\n")),
        ("iscsi/initiatorname.iscsi", "InitiatorName=iqn.2026-11.test:guest\n"),
    ] {
        fs::write(etc.join(name), text)?;
    }
    // Some packages want these before devtmpfs and the links that udev would make.
    replace_link(&etc.join("mtab"), "/proc/mounts")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to)
        .with_context(|| format!("could not copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn replace_link(link: &Path, to: &str) -> Result<()> {
    let _ = fs::remove_file(link);
    symlink(to, link).with_context(|| format!("could not link {}", link.display()))
}

#[cfg(test)]
mod tests {
    use super::number_after;

    #[test]
    fn the_newest_kernel_wins_by_number_not_by_letter() {
        let names = ["linux-image-6.12.99+deb12-amd64", "linux-image-6.12.100+deb12-amd64"];
        assert_eq!(names.map(|n| number_after(n, "6.12.")), [99, 100]);
    }
}
