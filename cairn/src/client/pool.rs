//! `cairn pool`.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use cairn_api::v1;
use clap::Subcommand;

use super::{absolute, block_on, connect, said};
use crate::cli::{Global, parse_size};
use crate::output;

/// `cairn pool`.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// List the pools.
    List {
        /// List their devices instead.
        #[arg(long)]
        devices: bool,
    },
    /// Check a pool that no process has open, and mend it.
    #[command(after_help = "\
Examples:
  cairn pool check /srv/pool.img
  cairn pool check /dev/nvme1n1 --data --repair

Exit codes, as fsck's: 0 clean, 1 repaired, 4 damage is left, 8 it could not be checked.")]
    Check(crate::fsck::CheckArgs),
    /// Make a pool, or open one that exists. It is opened at every start from then on.
    #[command(after_help = "\
Examples:
  cairn pool create fast /dev/nvme1n1
  cairn pool create wide /dev/nvme1n1 /dev/nvme2n1 /dev/nvme3n1
  cairn pool create file /srv/pool.img --size 100GiB")]
    Create {
        /// Its name in this process.
        name: String,
        /// A file, a block device, or mem:SIZE; several for a pool of several devices, in any order.
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<String>,
        /// Open the pool without this device, which is gone for good. What only it held is lost.
        #[arg(long, value_name = "DEVICE-ID")]
        without: Vec<String>,
        /// Size of each file that is to be made or grown.
        #[arg(long, value_parser = parse_size)]
        size: Option<ByteSize>,
        /// Overwrite what is there.
        #[arg(long)]
        force: bool,
        /// Go through the page cache: for filesystems that refuse O_DIRECT.
        #[arg(long)]
        buffered: bool,
        /// The shard of the process that is to have it; the first is 0. Default: one after the other.
        #[arg(long)]
        shard: Option<u32>,
    },
    /// Take a device into a pool.
    #[command(after_help = "\
Example:
  cairn pool add-device wide /dev/nvme4n1")]
    AddDevice {
        /// The pool.
        pool: String,
        /// The device.
        path: String,
        #[command(flatten)]
        how: DeviceArgs,
    },
    /// Remove a device from a pool: what it holds moves to the others, and then it leaves.
    #[command(after_help = "\
Example:
  cairn pool remove-device wide /dev/nvme1n1
  cairn pool list --devices        # how far it is")]
    RemoveDevice {
        /// The pool.
        pool: String,
        /// Its id, or its path.
        device: String,
    },
    /// Take a device into a pool and remove another.
    #[command(after_help = "\
Example:
  cairn pool replace-device wide /dev/nvme1n1 /dev/nvme4n1")]
    ReplaceDevice {
        /// The pool.
        pool: String,
        /// The id or the path of the device that goes.
        old: String,
        /// The path of the one that comes.
        new: String,
        #[command(flatten)]
        how: DeviceArgs,
    },
    /// Use what a pool lies on up to its new end.
    #[command(after_help = "\
Examples:
  cairn pool grow fast                   # its device has grown
  cairn pool grow file --size 200GiB     # makes the file longer first")]
    Grow {
        /// The pool.
        name: String,
        /// The size that the file is to have.
        #[arg(long, value_parser = parse_size)]
        size: Option<ByteSize>,
    },
}

/// How a device is taken in.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Size of a file that is to be made or grown.
    #[arg(long, value_parser = parse_size)]
    size: Option<ByteSize>,
    /// Overwrite what is there.
    #[arg(long)]
    force: bool,
    /// Go through the page cache: for filesystems that refuse O_DIRECT.
    #[arg(long)]
    buffered: bool,
}

impl DeviceArgs {
    fn request(self, pool: String, path: &str) -> Result<v1::AddDeviceRequest> {
        Ok(v1::AddDeviceRequest {
            pool,
            path: absolute(path)?,
            size_bytes: self.size.map_or(0, |s| s.as_u64()),
            force: self.force,
            buffered: self.buffered,
        })
    }
}

/// A path as the process knows it; an id stays as it is.
fn device_name(text: &str) -> Result<String> {
    if uuid::Uuid::parse_str(text).is_ok() { Ok(text.to_owned()) } else { absolute(text) }
}

pub(crate) fn pool(global: &Global, command: PoolCommand) -> Result<ExitCode> {
    if let PoolCommand::Check(args) = &command {
        return Ok(crate::fsck::run(global, args));
    }
    block_on(async {
        let mut client = connect(&global.socket).await?;
        match command {
            PoolCommand::Check(_) => unreachable!("needs no process"),
            PoolCommand::List { devices } => {
                let reply =
                    client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
                let pools = reply.into_inner().pools;
                if devices {
                    output::list(global.output, &output::devices(&pools))?;
                } else {
                    output::list(global.output, &pools)?;
                }
            }
            PoolCommand::Grow { name, size } => {
                let size_bytes = size.map_or(0, |s| s.as_u64());
                let request = v1::GrowPoolRequest { name, size_bytes };
                let pool = client.grow_pool(request).await.map_err(|s| said(&s))?;
                output::one(global.output, &pool.into_inner())?;
            }
            PoolCommand::Create { name, paths, without, size, force, buffered, shard } => {
                let size_bytes = size.map_or(0, |s| s.as_u64());
                let mut paths = paths.iter().map(|path| absolute(path));
                let path = paths.next().context("a path")??;
                let more_paths = paths.collect::<Result<Vec<_>>>()?;
                let request = v1::CreatePoolRequest {
                    name,
                    path,
                    size_bytes,
                    force,
                    buffered,
                    more_paths,
                    without,
                    shard,
                };
                let pool = client.create_pool(request).await.map_err(|s| said(&s))?;
                output::one(global.output, &pool.into_inner())?;
            }
            PoolCommand::AddDevice { pool, path, how } => {
                let request = how.request(pool, &path)?;
                let pool = client.add_device(request).await.map_err(|s| said(&s))?;
                output::list(global.output, &output::devices(&[pool.into_inner()]))?;
            }
            PoolCommand::RemoveDevice { pool, device } => {
                let device = device_name(&device)?;
                let request = v1::RemoveDeviceRequest { pool, device };
                let pool = client.remove_device(request).await.map_err(|s| said(&s))?;
                output::list(global.output, &output::devices(&[pool.into_inner()]))?;
            }
            PoolCommand::ReplaceDevice { pool, old, new, how } => {
                let device = device_name(&old)?;
                let reply =
                    client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
                let known = output::devices(&reply.into_inner().pools)
                    .into_iter()
                    .any(|d| d.pool == pool && (d.device.id == device || d.device.path == device));
                if !known {
                    bail!("pool `{pool}` has no device `{old}`; nothing was changed");
                }
                let request = how.request(pool.clone(), &new)?;
                client.add_device(request).await.map_err(|s| said(&s))?;
                let request = v1::RemoveDeviceRequest { pool, device };
                let pool = client.remove_device(request).await.map_err(|s| {
                    said(&s).context("the new device is in the pool, and the old one stays")
                })?;
                output::list(global.output, &output::devices(&[pool.into_inner()]))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}
