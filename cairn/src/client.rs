//! `cairn pool|replica|volume`: manage a running process over its API socket.

mod iscsi;
mod members;
mod pool;
pub(crate) mod share;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use bytesize::ByteSize;
use cairn_api::v1::{self, cairn_client::CairnClient};
use clap::{Args, Subcommand};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};

pub(crate) use self::pool::{PoolCommand, pool};
use crate::cli::{Global, Output, parse_size};
use crate::output;
use crate::output::say;

/// Size of a witness: one block.
pub(crate) const WITNESS_BYTES: u64 = 4096;

/// Where a key comes from.
#[derive(Debug, Clone, Args)]
pub(crate) struct KeyArgs {
    /// A file with the key, on the machine of the process: 32 bytes, or 64 hexadecimal digits.
    #[arg(long, value_name = "PATH", conflicts_with = "key_command")]
    key_file: Option<String>,
    /// A command that prints the key, run by the process without a shell; words are split at spaces.
    #[arg(long, value_name = "CMD ...")]
    key_command: Option<String>,
    /// Take a key file that others than its owner may read.
    #[arg(long)]
    allow_open_key_file: bool,
}

/// Where a new key comes from.
#[derive(Debug, Clone, Args)]
pub(crate) struct NewKeyArgs {
    /// As --key-file of `cairn volume create`.
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "new_key_command",
        required_unless_present = "new_key_command"
    )]
    new_key_file: Option<String>,
    /// As --key-command of `cairn volume create`.
    #[arg(long, value_name = "CMD ...")]
    new_key_command: Option<String>,
    /// Take a key file that others than its owner may read.
    #[arg(long)]
    allow_open_key_file: bool,
}

/// What a call says of a key, where something is said.
fn key_source(
    file: Option<&str>,
    command: Option<&str>,
    allow_open_file: bool,
) -> Result<Option<v1::KeySource>> {
    if file.is_none() && command.is_none() {
        return Ok(None);
    }
    let file = file.map(absolute).transpose()?.unwrap_or_default();
    let words = command.unwrap_or_default().split_whitespace();
    Ok(Some(v1::KeySource { file, command: words.map(str::to_owned).collect(), allow_open_file }))
}

impl KeyArgs {
    fn source(&self) -> Result<Option<v1::KeySource>> {
        let (file, command) = (self.key_file.as_deref(), self.key_command.as_deref());
        key_source(file, command, self.allow_open_key_file)
    }
}

/// `cairn replica`.
#[derive(Debug, Subcommand)]
pub(crate) enum ReplicaCommand {
    /// List the replicas.
    List,
    /// Make a replica in a pool.
    #[command(after_help = "\
Examples:
  cairn replica create --pool fast --volume $(uuidgen) --size 10GiB
  cairn replica create --witness --pool small --volume UUID    # 4 KiB: votes, holds no data")]
    Create {
        /// The pool.
        #[arg(long)]
        pool: String,
        /// The volume that it is of: a UUID that all its replicas share. Default: a new one.
        #[arg(long, visible_alias = "volume-id", value_name = "UUID")]
        volume: Option<String>,
        /// Size of the volume.
        #[arg(long, value_parser = parse_size, required_unless_present = "witness")]
        size: Option<ByteSize>,
        /// Make a witness: a replica of one block, which votes and holds no data.
        #[arg(long, conflicts_with_all = ["size", "thick"], requires = "volume")]
        witness: bool,
        /// A name for people. Of a witness by default: witness.
        #[arg(long)]
        name: Option<String>,
        /// Its own id. Default: a new one.
        #[arg(long, value_name = "UUID", default_value = "")]
        id: String,
        /// Reserve all of its size: a write to it never finds the pool full.
        #[arg(long)]
        thick: bool,
    },
    /// Delete a replica and its data.
    Delete {
        /// Its id.
        id: String,
        /// Yes, delete the data.
        #[arg(long)]
        yes: bool,
    },
}

/// `cairn volume`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List the volumes.
    List,
    /// Make a volume of empty replicas and serve it.
    #[command(after_help = "\
Examples:
  cairn volume create db --size 10GiB \\
      --replica nvme+tcp://192.0.2.11:4420/nqn.2026-11.io.cairn:replica:UUID \\
      --replica nvme+tcp://192.0.2.12:4420/nqn.2026-11.io.cairn:replica:UUID \\
      --replica local:fast/UUID
  cairn volume create two --size 10GiB --replica URI1 --replica URI2 --witness URI3
  cairn volume create scratch --size 1GiB --pool fast   # one replica, made in this process
  cairn volume create safe --size 1GiB --pool fast --encrypt --key-file /etc/cairn/safe.key")]
    Create {
        /// Its name; hosts connect to nqn.2026-11.io.cairn:NAME.
        name: String,
        /// Its size.
        #[arg(long, value_parser = parse_size)]
        size: ByteSize,
        /// Bytes of the blocks that hosts see: 4096, or 512 for hosts that insist on it.
        #[arg(long, value_name = "BYTES", default_value_t = 4096)]
        block_size: u32,
        /// A replica, as `cairn replica list` names it. Once for each.
        #[arg(long, value_name = "URI")]
        replica: Vec<String>,
        /// A witness: it votes and holds no data, so that two replicas survive the loss of one. It is named as a
        /// replica is; `cairn replica create --witness` makes one.
        #[arg(long, value_name = "URI")]
        witness: Vec<String>,
        /// Make a replica in this pool of the process and use it.
        #[arg(long, value_name = "POOL")]
        pool: Vec<String>,
        /// The volume's id. Default: a new one.
        #[arg(long, value_name = "UUID")]
        id: Option<String>,
        /// A host that may connect. Default: any.
        #[arg(long, value_name = "NQN")]
        allow_host: Vec<String>,
        /// A replica that does not answer for so long is taken out. Default: the process's.
        #[arg(long, value_name = "MS", default_value_t = 0)]
        child_deadline_ms: u64,
        /// Reserve all of its size in the pools that --pool names.
        #[arg(long, requires = "pool")]
        thick: bool,
        /// Encrypt it, with a key of its own that is wrapped with the one given here.
        #[arg(long)]
        encrypt: bool,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Grow a volume and its replicas, while it is used. It cannot shrink.
    Resize {
        /// Its name.
        name: String,
        /// Its new size.
        #[arg(long, value_parser = parse_size)]
        size: ByteSize,
    },
    /// Serve an encrypted volume whose key could not be had, or was another.
    Unlock {
        /// Its name.
        name: String,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Wrap an encrypted volume's key with another one, while it is used. No data is rewritten.
    RotateKey {
        /// Its name.
        name: String,
        #[command(flatten)]
        key: NewKeyArgs,
    },
    /// Tell all about a volume, or about each.
    Status {
        /// Its name.
        name: Option<String>,
    },
    /// Verify every block of every replica and heal what is bad; without options: tell how far it is.
    #[command(after_help = "\
Examples:
  cairn volume scrub db                      # the one that runs, or the last one
  cairn volume scrub db --start --rate 200   # MiB a second
  cairn volume scrub db --stop               # --start takes it up where it was
  cairn volume scrub db --compare            # and compare the replicas byte by byte")]
    Scrub {
        /// The volume's name.
        name: String,
        /// Start, or take up where it was stopped.
        #[arg(long, conflicts_with_all = ["stop", "compare"])]
        start: bool,
        /// Stop.
        #[arg(long, conflicts_with_all = ["compare", "rate"])]
        stop: bool,
        /// Start, and compare the replicas with each other.
        #[arg(long)]
        compare: bool,
        /// MiB of the volume a second: of the one that starts, or of the one that runs.
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
    },
    /// Make a replica a member of a volume, while it is used. It is rebuilt after that, by itself.
    #[command(after_help = "\
Examples:
  cairn replica create --pool fast --volume VOLUME-ID --size 10GiB       # where it is to be
  cairn volume add-replica db nvme+tcp://192.0.2.14:4420/nqn.2026-11.io.cairn:replica:UUID
  cairn volume add-replica db local:small/UUID --witness
  cairn volume rebuild db                                                # how far it is")]
    AddReplica {
        /// The volume's name.
        volume: String,
        /// The replica, as `cairn replica list` names it. It is empty, or was of this volume before.
        uri: String,
        /// It is to vote and to hold no data.
        #[arg(long)]
        witness: bool,
    },
    /// Make a replica no member of its volume any more. Its data stays in its pool.
    #[command(after_help = "\
Example:
  cairn volume remove-replica db 3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10
  cairn replica delete 3f2c1a60-5d1c-4b6e-9f0a-2b7f6f1f9a10 --yes     # where it is")]
    RemoveReplica {
        /// The volume's name.
        volume: String,
        /// The replica's id.
        replica: String,
    },
    /// Add a replica, wait until it is rebuilt, and remove another.
    ///
    /// It goes on by itself once it has begun, also after a restart of the process; the same command shows how
    /// far it is. To give it up: `cairn volume remove-replica VOLUME NEW-ID`.
    #[command(after_help = "\
Examples:
  cairn volume replace-replica db OLD-ID nvme+tcp://192.0.2.14:4420/nqn.2026-11.io.cairn:replica:UUID
  cairn volume replace-replica db OLD-ID URI --now      # the old one is gone for good")]
    ReplaceReplica {
        /// The volume's name.
        volume: String,
        /// The id of the replica that goes.
        old: String,
        /// The replica that comes, as `cairn replica list` names it.
        new: String,
        /// Remove the old one as soon as the new one is a member: where it is gone for good.
        #[arg(long)]
        now: bool,
        /// Only begin it.
        #[arg(long)]
        no_wait: bool,
    },
    /// Serve a volume from one replica, whatever the others hold. Acked writes may be lost.
    ///
    /// For when the replicas that hold all writes, or a majority, are gone for good. Without the flag it tells
    /// what is known of the replicas, and changes nothing.
    #[command(after_help = "\
Examples:
  cairn volume force-start db --replica ID                       # tells what would be lost
  cairn volume force-start db --replica ID --yes-i-lose-writes
  cairn volume add-replica db URI                                # the others again: they get a copy")]
    ForceStart {
        /// The volume's name.
        volume: String,
        /// The replica that it is taken from.
        #[arg(long, value_name = "ID")]
        replica: String,
        /// Yes: acked writes that the replica lacks are lost.
        #[arg(long)]
        yes_i_lose_writes: bool,
    },
    /// Let other processes stand by for a volume that this one serves, or change how.
    #[command(after_help = "\
Example:
  cairn volume share db --elsewhere 192.0.2.12:4420       # then, there: cairn volume standby db ...")]
    Share {
        /// The volume's name.
        name: String,
        #[command(flatten)]
        sharing: share::SharingArgs,
    },
    /// Stand by for a volume that another process serves: hosts connect, and use this path once this
    /// process takes over.
    #[command(after_help = "\
Examples:
  cairn volume standby db --from /run/cairn/other.sock --auto
  cairn volume standby db --id VOLUME-ID --replica URI1 --replica URI2 --replica URI3 \\
      --elsewhere 192.0.2.11:4420
  cairn volume takeover db                                # serve it here from now on")]
    Standby(share::StandByArgs),
    /// Serve a volume here that this process stands by for, whoever serves it now; with --to, hand it over
    /// to another process, which serves it at once.
    #[command(after_help = "\
Examples:
  cairn volume takeover db                                # here, also where the other one is dead
  cairn volume takeover db --to /run/cairn/other.sock     # from here to there; no host sees an error")]
    Takeover {
        /// The volume's name.
        name: String,
        /// The API socket of the process that is to serve it.
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
    },
    /// Tell how far a rebuild is, and of those that ended; set how fast they copy.
    #[command(after_help = "\
Examples:
  cairn volume rebuild db              # the one that runs, and the last 32
  cairn volume rebuild db --rate 100   # MiB a second at most, until the process ends
  cairn volume rebuild db --rate 0     # as fast as it can beside the hosts")]
    Rebuild {
        /// The volume's name.
        volume: String,
        /// MiB a second at most; 0: as fast as it can.
        #[arg(long, value_name = "MIB")]
        rate: Option<u32>,
    },
    /// Have initiators of iSCSI reach a volume too, or change who may. All of it is as said from then on.
    #[command(after_help = "\
Examples:
  cairn volume export db --iscsi --initiator iqn.1993-08.org.debian:01:abcdef
  cairn volume export db --iscsi --initiator IQN1 --initiator IQN2 --chap-file /etc/cairn/db.chap
  cairn volume export log --iscsi --target iqn.2026-11.io.cairn:db --lun 1    # beside it, for the same initiators")]
    Export(iscsi::ExportArgs),
    /// Have initiators of iSCSI reach a volume no more: they are cut off.
    Unexport {
        /// The volume's name.
        name: String,
        /// Over iSCSI.
        #[arg(long, required = true)]
        iscsi: bool,
    },
    /// Stop serving a volume. Its replicas and their data stay.
    Delete {
        /// Its name.
        name: String,
    },
}

/// A client of the process behind a socket.
pub(crate) async fn connect(socket: &Path) -> Result<CairnClient<Channel>> {
    let path = socket.to_owned();
    // The URI names nothing: the connector goes to the socket.
    let channel = Endpoint::from_static("http://cairn.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .with_context(|| {
            format!(
                "no process answers on {}; name its API socket with --socket or CAIRN_SOCKET",
                socket.display()
            )
        })?;
    Ok(CairnClient::new(channel))
}

/// What the process said, without the machinery's words.
pub(crate) fn said(status: &tonic::Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}

pub(crate) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// The process may stand in another folder than the caller.
fn absolute(path: &str) -> Result<String> {
    if path.starts_with("mem:") {
        return Ok(path.to_owned());
    }
    let path = std::path::absolute(path)?;
    path.into_os_string().into_string().map_err(|p| anyhow!("{} is not UTF-8", p.display()))
}

pub(crate) fn replica(global: &Global, command: ReplicaCommand) -> Result<ExitCode> {
    block_on(async {
        let mut client = connect(&global.socket).await?;
        match command {
            ReplicaCommand::List => {
                let reply =
                    client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
                output::list(global.output, &reply.into_inner().replicas)?;
            }
            ReplicaCommand::Create { pool, volume, size, witness, name, id, thick } => {
                let default = if witness { "witness" } else { "" };
                let request = v1::CreateReplicaRequest {
                    pool,
                    volume_id: volume.unwrap_or_default(),
                    name: name.unwrap_or_else(|| default.to_owned()),
                    size_bytes: size.map_or(WITNESS_BYTES, |size| size.as_u64()),
                    id,
                    thick,
                };
                let replica = client.create_replica(request).await.map_err(|s| said(&s))?;
                output::one(global.output, &replica.into_inner())?;
            }
            ReplicaCommand::Delete { id, yes } => {
                if !yes {
                    bail!("this deletes the data of replica {id}; say --yes to do it");
                }
                let request = v1::DeleteReplicaRequest { id };
                client.delete_replica(request).await.map_err(|s| said(&s))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

pub(crate) fn volume(global: &Global, command: VolumeCommand) -> Result<ExitCode> {
    block_on(async {
        if let VolumeCommand::Takeover { name, to } = command {
            share::take_over(global, name, to).await?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut client = connect(&global.socket).await?;
        match command {
            VolumeCommand::List => {
                output::list(global.output, &volumes(&mut client).await?)?;
            }
            VolumeCommand::Create {
                name,
                size,
                block_size,
                replica,
                witness,
                pool,
                id,
                allow_host,
                child_deadline_ms,
                thick,
                encrypt,
                key,
            } => {
                let encryption = key.source()?;
                if encrypt != encryption.is_some() {
                    bail!("--encrypt goes with --key-file or --key-command, and they with it");
                }
                let id = id.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
                let mut replicas = replica;
                // Before replicas are made that the volume could not have.
                on_one_shard(&mut client, &pool).await?;
                for pool in pool {
                    let request = v1::CreateReplicaRequest {
                        pool: pool.clone(),
                        volume_id: id.clone(),
                        name: name.clone(),
                        size_bytes: size.as_u64(),
                        id: String::new(),
                        thick,
                    };
                    let made = client.create_replica(request).await.map_err(|s| said(&s))?;
                    replicas.push(format!("local:{pool}/{}", made.into_inner().id));
                }
                let request = v1::CreateVolumeRequest {
                    block_size,
                    name,
                    size_bytes: size.as_u64(),
                    replicas,
                    witnesses: witness,
                    id,
                    allowed_hosts: allow_host,
                    child_deadline_ms,
                    encryption,
                };
                let volume = client.create_volume(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            VolumeCommand::Status { name } => {
                let all = volumes(&mut client).await?;
                match name {
                    Some(name) => show_volume(global.output, &named(all, &name)?)?,
                    None if global.output == Output::Json => output::list(global.output, &all)?,
                    None => {
                        let texts: Vec<String> = all.iter().map(output::volume_status).collect();
                        say!("{}", texts.join("\n\n"));
                    }
                }
            }
            VolumeCommand::Share { name, sharing } => {
                share::share(global, &mut client, name, sharing).await?;
            }
            VolumeCommand::Standby(args) => share::stand_by(global, &mut client, args).await?,
            VolumeCommand::Takeover { .. } => unreachable!("may have no process here"),
            VolumeCommand::Resize { name, size } => {
                let request = v1::ResizeVolumeRequest { name, size_bytes: size.as_u64() };
                let volume = client.resize_volume(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            VolumeCommand::Unlock { name, key } => {
                let request = v1::UnlockVolumeRequest { name, key: key.source()? };
                let volume = client.unlock_volume(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            VolumeCommand::RotateKey { name, key } => {
                let (file, command) = (key.new_key_file.as_deref(), key.new_key_command.as_deref());
                let key = key_source(file, command, key.allow_open_key_file)?;
                let request = v1::RotateVolumeKeyRequest { name, key };
                let volume = client.rotate_volume_key(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            VolumeCommand::Scrub { name, start, stop, compare, rate } => {
                use v1::scrub_volume_request::Action;
                let action = match (start, stop, compare, rate) {
                    (true, ..) => Action::Start,
                    (_, true, ..) => Action::Stop,
                    (_, _, true, _) => Action::Compare,
                    (.., Some(_)) => Action::Rate,
                    _ => Action::Unspecified,
                };
                let request = v1::ScrubVolumeRequest {
                    name,
                    action: action.into(),
                    rate_mib_s: rate.unwrap_or_default(),
                };
                let volume = client.scrub_volume(request).await.map_err(|s| said(&s))?.into_inner();
                let scrub = volume.scrub.unwrap_or_default();
                match global.output {
                    Output::Table => say!("{}", output::scrub_status(&scrub)),
                    Output::Json => output::one(global.output, &scrub)?,
                }
            }
            VolumeCommand::AddReplica { volume, uri, witness } => {
                members::add(global, &mut client, volume, uri, witness).await?;
            }
            VolumeCommand::RemoveReplica { volume, replica } => {
                members::remove(global, &mut client, volume, replica).await?;
            }
            VolumeCommand::ReplaceReplica { volume, old, new, now, no_wait } => {
                let request =
                    v1::ReplaceReplicaRequest { name: volume, replica_id: old, uri: new, now };
                members::replace(global, &mut client, request, no_wait).await?;
            }
            VolumeCommand::ForceStart { volume, replica, yes_i_lose_writes } => {
                let request = v1::ForceStartVolumeRequest {
                    name: volume,
                    replica_id: replica,
                    lose_writes: yes_i_lose_writes,
                };
                members::force_start(global, &mut client, request).await?;
            }
            VolumeCommand::Rebuild { volume, rate } => {
                members::rebuild(global, &mut client, volume, rate).await?;
            }
            VolumeCommand::Export(args) => iscsi::export(global, &mut client, args).await?,
            VolumeCommand::Unexport { name, .. } => {
                let request = v1::UnexportVolumeRequest { name };
                let volume = client.unexport_volume(request).await.map_err(|s| said(&s))?;
                show_volume(global.output, &volume.into_inner())?;
            }
            VolumeCommand::Delete { name } => {
                let request = v1::DeleteVolumeRequest { name };
                client.delete_volume(request).await.map_err(|s| said(&s))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Whether the volume that has replicas in these pools can be served by one shard.
async fn on_one_shard(client: &mut CairnClient<Channel>, pools: &[String]) -> Result<()> {
    let known = client.list_pools(v1::ListPoolsRequest {}).await.map_err(|s| said(&s))?;
    let known = known.into_inner().pools;
    let used: Vec<&v1::Pool> = known.iter().filter(|p| pools.contains(&p.name)).collect();
    if used.iter().any(|pool| pool.shard != used[0].shard) {
        let at: Vec<String> =
            used.iter().map(|pool| format!("`{}` is on shard {}", pool.name, pool.shard)).collect();
        bail!(
            "the pools are on several shards of the process: {}. Give them the same `shard` in its configuration file \
             and restart it, or make the replicas with `cairn replica create` and name one by its nvme+tcp:// URI, \
             which is slower. Nothing was made",
            at.join(", ")
        );
    }
    Ok(())
}

pub(crate) async fn volumes(client: &mut CairnClient<Channel>) -> Result<Vec<v1::Volume>> {
    let reply = client.list_volumes(v1::ListVolumesRequest {}).await.map_err(|s| said(&s))?;
    Ok(reply.into_inner().volumes)
}

/// The volume of this name.
fn named(volumes: Vec<v1::Volume>, name: &str) -> Result<v1::Volume> {
    let found = volumes.into_iter().find(|v| v.name == name);
    found.with_context(|| format!("there is no volume `{name}` in this process"))
}

pub(crate) fn show_volume(output: Output, volume: &v1::Volume) -> Result<()> {
    match output {
        Output::Table => say!("{}", output::volume_status(volume)),
        Output::Json => output::one(output, volume)?,
    }
    Ok(())
}
