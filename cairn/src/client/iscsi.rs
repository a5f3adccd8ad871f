//! `cairn volume export`.

use anyhow::{Context as _, Result};
use cairn_api::v1::{self, cairn_client::CairnClient};
use clap::Args;
use tonic::transport::Channel;

use super::{absolute, said, show_volume};
use crate::cli::{Global, Output};
use crate::output::say;

/// How a volume is exported.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExportArgs {
    /// The volume's name.
    name: String,
    /// Over iSCSI.
    #[arg(long, required = true)]
    iscsi: bool,
    /// The target's name. Default: iqn.2026-11.io.cairn:NAME.
    #[arg(long, value_name = "IQN", default_value = "")]
    target: String,
    /// The logical unit's number.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=255))]
    lun: u16,
    /// An initiator that may log in; `*` for any. Once for each. Default: nobody.
    #[arg(long, value_name = "IQN")]
    initiator: Vec<String>,
    /// A file with what initiators have to prove, on the machine of the process: `NAME SECRET`, and in a second line,
    /// where there is one, what the target proves. Secrets have 12 to 255 characters.
    #[arg(long, value_name = "PATH")]
    chap_file: Option<String>,
    /// Take such a file that others than its owner may read.
    #[arg(long, requires = "chap_file")]
    allow_open_chap_file: bool,
    /// Initiators may read and not write. What else writes to the volume, as hosts of NVMe/TCP, is not affected.
    #[arg(long)]
    read_only: bool,
    /// The unit says that its medium can be taken out, and initiators may have that done. Hosts of NVMe/TCP are not affected.
    #[arg(long)]
    removable: bool,
}

pub(super) async fn export(
    global: &Global,
    client: &mut CairnClient<Channel>,
    args: ExportArgs,
) -> Result<()> {
    let chap_file = args.chap_file.as_deref().map(absolute).transpose()?;
    let request = v1::ExportVolumeRequest {
        name: args.name,
        iscsi: Some(v1::IscsiExport {
            iqn: args.target,
            lun: u32::from(args.lun),
            initiators: args.initiator,
            chap_file: chap_file.unwrap_or_default(),
            allow_open_file: args.allow_open_chap_file,
            read_only: args.read_only,
            removable: args.removable,
        }),
    };
    let volume = client.export_volume(request).await.map_err(|s| said(&s))?.into_inner();
    show_volume(global.output, &volume)?;
    let unit = volume.iscsi.context("the process says nothing of the logical unit")?;
    if global.output == Output::Table && unit.portals.is_empty() {
        say!(
            "the process listens for no initiators yet: set `listen` in [iscsi] of its configuration file"
        );
    }
    if let (Output::Table, Some(export)) = (global.output, unit.export)
        && export.initiators.is_empty()
    {
        say!("nobody may log in yet: name initiators with --initiator");
    }
    Ok(())
}
