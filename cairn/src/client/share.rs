//! `cairn volume share|standby|takeover`.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use cairn_api::v1::{self, cairn_client::CairnClient};
use clap::Args;
use tonic::transport::Channel;

use super::{KeyArgs, connect, named, said, show_volume, volumes};
use crate::cli::{Global, Output};
use crate::output::say;

/// How a volume is shared.
#[derive(Debug, Clone, Args)]
pub(crate) struct SharingArgs {
    /// While this process stands by, take over by itself once nobody serves the volume.
    #[arg(long)]
    pub(crate) auto: bool,
    /// But not before it has stood by for so long.
    #[arg(long, value_name = "MS", default_value_t = 10_000, requires = "auto")]
    pub(crate) auto_after_ms: u64,
    /// Where hosts reach another process that shares the volume: discovery tells of it. Once for each.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) elsewhere: Vec<String>,
    /// Where initiators of iSCSI reach it, and its portal group. Once for each.
    #[arg(long, value_name = "ADDRESS:PORT,GROUP")]
    pub(crate) iscsi_elsewhere: Vec<String>,
}

impl SharingArgs {
    fn message(self) -> v1::Sharing {
        let Self { auto, auto_after_ms, elsewhere, iscsi_elsewhere } = self;
        let auto_after_ms = if auto { auto_after_ms } else { 0 };
        v1::Sharing { auto, auto_after_ms, elsewhere, iscsi_elsewhere }
    }
}

/// Which volume to stand by for.
#[derive(Debug, Clone, Args)]
pub(crate) struct StandByArgs {
    /// The volume's name.
    name: String,
    /// The API socket of the process that serves it: all else is asked there, and it is told to share the
    /// volume.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["id", "replica", "witness", "block_size"])]
    from: Option<PathBuf>,
    /// The volume's id.
    #[arg(long, value_name = "UUID", required_unless_present = "from")]
    id: Option<String>,
    /// A member of the volume, as this process reaches it. Once for each; one is enough where its configuration
    /// tells of the others.
    #[arg(long, value_name = "URI")]
    replica: Vec<String>,
    /// A witness of the volume.
    #[arg(long, value_name = "URI")]
    witness: Vec<String>,
    /// Bytes of the blocks that hosts see. Default: what its configuration tells.
    #[arg(long, value_name = "BYTES")]
    block_size: Option<u32>,
    /// A host that may connect. Default: any.
    #[arg(long, value_name = "NQN")]
    allow_host: Vec<String>,
    #[command(flatten)]
    key: KeyArgs,
    #[command(flatten)]
    sharing: SharingArgs,
}

pub(super) async fn share(
    global: &Global,
    client: &mut CairnClient<Channel>,
    name: String,
    sharing: SharingArgs,
) -> Result<()> {
    let request = v1::ShareVolumeRequest { name, sharing: Some(sharing.message()) };
    let volume = client.share_volume(request).await.map_err(|s| said(&s))?;
    show_volume(global.output, &volume.into_inner())
}

pub(super) async fn stand_by(
    global: &Global,
    client: &mut CairnClient<Channel>,
    args: StandByArgs,
) -> Result<()> {
    let mut request = v1::StandByVolumeRequest {
        name: args.name.clone(),
        id: args.id.unwrap_or_default(),
        replicas: args.replica,
        witnesses: args.witness,
        block_size: args.block_size.unwrap_or_default(),
        allowed_hosts: args.allow_host,
        child_deadline_ms: 0,
        encryption: args.key.source()?,
        sharing: Some(args.sharing.clone().message()),
        iscsi: None,
    };
    if let Some(socket) = &args.from {
        let mut serving = connect(socket).await?;
        learn(client, &mut serving, &mut request, args.sharing).await?;
    }
    let volume = client.stand_by_volume(request).await.map_err(|s| said(&s))?;
    show_volume(global.output, &volume.into_inner())
}

/// What a process that is to stand by tells of itself.
pub(crate) struct Here {
    /// Where hosts reach it.
    pub(crate) nvmf: Vec<String>,
    /// Where initiators do.
    pub(crate) iscsi: Vec<String>,
    /// Those in its pools.
    pub(crate) replicas: Vec<v1::Replica>,
}

/// Asks the process that serves the volume what it is, and has it share it.
pub(crate) async fn learn(
    client: &mut CairnClient<Channel>,
    serving: &mut CairnClient<Channel>,
    request: &mut v1::StandByVolumeRequest,
    sharing: SharingArgs,
) -> Result<()> {
    let here = client.get_info(v1::GetInfoRequest {}).await.map_err(|s| said(&s))?.into_inner();
    let own = client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
    let here = Here { nvmf: here.nvmf, iscsi: here.iscsi, replicas: own.into_inner().replicas };
    request.sharing = Some(sharing.message());
    learn_from(&here, serving, request).await
}

/// The same for a process that tells this of itself; how it shares the volume is in the request.
pub(crate) async fn learn_from(
    here: &Here,
    serving: &mut CairnClient<Channel>,
    request: &mut v1::StandByVolumeRequest,
) -> Result<()> {
    let volume = named(volumes(serving).await?, &request.name)?;
    let there = serving.get_info(v1::GetInfoRequest {}).await.map_err(|s| said(&s))?.into_inner();
    let Some(address) = there.nvmf.first() else {
        bail!("process `{}` listens nowhere", there.name);
    };
    request.id.clone_from(&volume.id);
    request.block_size = volume.block_size;
    for child in volume.children {
        let local = here.replicas.iter().find(|r| r.id == child.replica_id);
        let uri = match (local, child.uri.starts_with("local:")) {
            (Some(local), _) => format!("local:{}/{}", local.pool, local.id),
            (None, true) => {
                format!("nvme+tcp://{address}/nqn.2026-11.io.cairn:replica:{}", child.replica_id)
            }
            (None, false) => child.uri,
        };
        let list = if child.witness { &mut request.witnesses } else { &mut request.replicas };
        list.push(uri);
    }
    let message = request.sharing.clone().unwrap_or_default();
    // What it does while it stands by itself is for whoever set it up to say.
    let mut shared = volume.sharing.unwrap_or_else(|| message.clone());
    add(&mut shared.elsewhere, &here.nvmf);
    // Initiators find it there where it is a logical unit of a process that listens for them.
    let exported = volume.iscsi.and_then(|unit| unit.export).filter(|_| !here.iscsi.is_empty());
    if exported.is_some() {
        add(&mut shared.iscsi_elsewhere, &here.iscsi);
    }
    let call = v1::ShareVolumeRequest { name: request.name.clone(), sharing: Some(shared) };
    serving.share_volume(call).await.map_err(|s| said(&s))?;
    let mut message = message;
    add(&mut message.elsewhere, &there.nvmf);
    if exported.is_some() {
        add(&mut message.iscsi_elsewhere, &there.iscsi);
    }
    request.iscsi = request.iscsi.take().or(exported);
    request.sharing = Some(message);
    Ok(())
}

/// Adds what is not on the list.
fn add(list: &mut Vec<String>, more: &[String]) {
    for one in more {
        if !list.contains(one) {
            list.push(one.clone());
        }
    }
}

pub(super) async fn take_over(global: &Global, name: String, to: Option<PathBuf>) -> Result<()> {
    let target = to.as_ref().unwrap_or(&global.socket);
    let mut taker = connect(target).await?;
    let mut handed_by = None;
    if to.is_some() {
        // Nobody lets go of a volume that the other could not serve.
        let there = named(volumes(&mut taker).await?, &name)?;
        if !there.unfit.is_empty() {
            bail!(
                "volume `{name}` cannot be taken over there, and stays where it is: {}",
                there.unfit
            );
        }
        match hand_over(global, &name).await {
            Ok(serving) => handed_by = Some(serving),
            Err(error) if global.output == Output::Table => {
                say!("not handed over, it is taken from whoever serves it: {error:#}");
            }
            Err(_) => {}
        }
    }
    let request = v1::TakeOverVolumeRequest { name };
    let taken = taker.take_over_volume(request.clone()).await;
    let error = match (taken, &mut handed_by) {
        (Ok(volume), _) => return show_volume(global.output, &volume.into_inner()),
        (Err(status), None) => return Err(said(&status)),
        (Err(status), Some(serving)) if status.code() != tonic::Code::DeadlineExceeded => {
            let back = serving.take_over_volume(request).await;
            back.map_err(|s| said(&s)).context("it could not be taken back either")?;
            said(&status)
                .context("the volume is served where it was; the other could not take it over")
        }
        (Err(status), Some(_)) => said(&status),
    };
    Err(error)
}

/// Has the process that serves a volume hand it over.
async fn hand_over(global: &Global, name: &str) -> Result<CairnClient<Channel>> {
    let mut serving = connect(&global.socket).await?;
    let request = v1::HandOverVolumeRequest { name: name.to_owned() };
    serving.hand_over_volume(request).await.map_err(|s| said(&s))?;
    Ok(serving)
}
