//! `cairn snapshot`: snapshots of volumes, and what is made of them.

use std::process::ExitCode;

use anyhow::{Result, bail};
use cairn_api::v1;
use clap::Subcommand;

use crate::cli::Global;
use crate::client::{block_on, connect, said, show_volume};
use crate::output;

/// `cairn snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List the snapshots of a volume, or of all that are served.
    List {
        /// The volume.
        volume: Option<String>,
    },
    /// Take a snapshot of a volume, or of several at one instant, while they are used.
    ///
    /// It holds every write that was answered before, on every in-sync replica. What an operating
    /// system has in memory is not in it: use fsfreeze or the like for more than that.
    #[command(after_help = "\
Examples:
  cairn snapshot create db --name before-upgrade
  cairn snapshot create db-data db-log --name nightly     # both at one instant")]
    Create {
        /// The volumes.
        #[arg(required = true)]
        volumes: Vec<String>,
        /// Its name.
        #[arg(long)]
        name: String,
    },
    /// Delete a snapshot; what only it holds is given back. What clones still read stays for them.
    Delete {
        /// The volume.
        volume: String,
        /// The snapshot: its name or its id.
        snapshot: String,
    },
    /// Take a volume back to a snapshot. All that was written since is given up.
    Restore {
        /// The volume.
        volume: String,
        /// The snapshot: its name or its id.
        snapshot: String,
        /// Yes, give up what was written since.
        #[arg(long)]
        yes: bool,
        /// Though hosts are connected: they go on with what they have in memory.
        #[arg(long)]
        force: bool,
        /// Though some replicas do not have it: they leave the volume, and are rebuilt from the others.
        #[arg(long)]
        partial: bool,
    },
    /// Make a volume that begins with what a snapshot holds, without copying it.
    #[command(after_help = "\
Example:
  cairn snapshot clone db before-upgrade db-test")]
    Clone {
        /// The volume.
        volume: String,
        /// The snapshot: its name or its id.
        snapshot: String,
        /// The new volume's name.
        name: String,
        /// A host that may connect to it. Default: any.
        #[arg(long, value_name = "NQN")]
        allow_host: Vec<String>,
        /// Though some replicas do not have it: the clone has fewer replicas than the volume.
        #[arg(long)]
        partial: bool,
    },
}

pub(crate) fn run(global: &Global, command: SnapshotCommand) -> Result<ExitCode> {
    block_on(async {
        let mut client = connect(&global.socket).await?;
        match command {
            SnapshotCommand::List { volume } => {
                let request = v1::ListSnapshotsRequest { volume: volume.unwrap_or_default() };
                let reply = client.list_snapshots(request).await.map_err(|s| said(&s))?;
                output::list(global.output, &reply.into_inner().snapshots)?;
            }
            SnapshotCommand::Create { volumes, name } => {
                let request = v1::CreateSnapshotRequest { volumes, name, id: String::new() };
                let reply = client.create_snapshot(request).await.map_err(|s| said(&s))?;
                output::list(global.output, &reply.into_inner().snapshots)?;
            }
            SnapshotCommand::Delete { volume, snapshot } => {
                let request = v1::DeleteSnapshotRequest { volume, snapshot };
                client.delete_snapshot(request).await.map_err(|s| said(&s))?;
            }
            SnapshotCommand::Restore { volume, snapshot, yes, force, partial } => {
                if !yes {
                    bail!(
                        "this gives up all that was written to volume `{volume}` since snapshot \
                         `{snapshot}`; say --yes to do it"
                    );
                }
                let request = v1::RestoreSnapshotRequest { volume, snapshot, force, partial };
                let volume = client.restore_snapshot(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            SnapshotCommand::Clone { volume, snapshot, name, allow_host, partial } => {
                let request = v1::CloneSnapshotRequest {
                    volume,
                    snapshot,
                    name,
                    id: String::new(),
                    allowed_hosts: allow_host,
                    partial,
                };
                let volume = client.clone_snapshot(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}
