//! `cairn volume add-replica|remove-replica|replace-replica|force-start|rebuild`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use cairn_api::v1::{self, cairn_client::CairnClient};
use tonic::transport::Channel;

use super::{named, said, show_volume, volumes};
use crate::cli::{Global, Output};
use crate::output::{rebuilds, say};

/// How often it is looked how far a replacement is.
const POLL: Duration = Duration::from_millis(500);
/// And how often a line says so.
const TELL: Duration = Duration::from_secs(5);

pub(super) async fn add(
    global: &Global,
    client: &mut CairnClient<Channel>,
    name: String,
    uri: String,
    witness: bool,
) -> Result<()> {
    let request = v1::AddReplicaRequest { name, uri, witness };
    let volume = client.add_replica(request).await.map_err(|s| said(&s))?;
    show_volume(global.output, &volume.into_inner())
}

pub(super) async fn remove(
    global: &Global,
    client: &mut CairnClient<Channel>,
    name: String,
    replica_id: String,
) -> Result<()> {
    let request = v1::RemoveReplicaRequest { name, replica_id };
    let volume = client.remove_replica(request).await.map_err(|s| said(&s))?;
    show_volume(global.output, &volume.into_inner())
}

pub(super) async fn replace(
    global: &Global,
    client: &mut CairnClient<Channel>,
    request: v1::ReplaceReplicaRequest,
    no_wait: bool,
) -> Result<()> {
    let (name, old) = (request.name.clone(), request.replica_id.clone());
    let mut volume = client.replace_replica(request).await.map_err(|s| said(&s))?.into_inner();
    if no_wait {
        return show_volume(global.output, &volume);
    }
    let tell = |text: &str| {
        if global.output == Output::Table {
            say!("{text}");
        }
    };
    if volume.replacement.is_some() {
        tell(&format!(
            "it goes on by itself if this is cut off; to see how far it is: cairn volume rebuild {name}"
        ));
    }
    let (mut told, mut silent) = (String::new(), Duration::ZERO);
    while let Some(replacement) = &volume.replacement {
        if replacement.old_replica_id != old {
            break;
        }
        let line = rebuilds::replacement_line(replacement);
        if line != told || silent >= TELL {
            let progress = volume.rebuild.as_ref().map(rebuilds::running_line);
            tell(&progress.map_or_else(|| line.clone(), |p| format!("{line}; {p}")));
            (told, silent) = (line, Duration::ZERO);
        }
        tokio::time::sleep(POLL).await;
        silent += POLL;
        volume = named(volumes(client).await?, &name)?;
    }
    if volume.children.iter().any(|c| c.replica_id == old) {
        bail!("the replacement was given up: replica {old} is still a member of volume `{name}`");
    }
    tell(&format!(
        "replica {old} is replaced; its data stays in its pool until `cairn replica delete {old}`\n"
    ));
    show_volume(global.output, &volume)
}

pub(super) async fn force_start(
    global: &Global,
    client: &mut CairnClient<Channel>,
    request: v1::ForceStartVolumeRequest,
) -> Result<()> {
    let name = request.name.clone();
    let volume = client.force_start_volume(request).await.map_err(|s| said(&s))?.into_inner();
    show_volume(global.output, &volume)?;
    if global.output == Output::Table {
        say!(
            "\nvolume `{name}` serves from this replica alone, and has a new lineage. Look at what it holds \
             before hosts write to it. Then make it redundant again: cairn volume add-replica {name} URI. \
             A replica that was a member before may be added as it is: it gets a whole copy."
        );
    }
    Ok(())
}

pub(super) async fn rebuild(
    global: &Global,
    client: &mut CairnClient<Channel>,
    name: String,
    rate: Option<u32>,
) -> Result<()> {
    let volume = match rate {
        Some(rate_mib_s) => {
            let request = v1::RebuildRateRequest { name, rate_mib_s };
            client.set_rebuild_rate(request).await.map_err(|s| said(&s))?.into_inner()
        }
        None => named(volumes(client).await?, &name)?,
    };
    match global.output {
        Output::Json => {
            let json = rebuilds::volume_rebuilds_json(&volume);
            say!("{}", serde_json::to_string_pretty(&json).context("writing JSON")?);
        }
        Output::Table => {
            match rate {
                Some(0) => say!("rate      as fast as it can, until the process ends"),
                Some(rate) => say!("rate      {rate} MiB/s at most, until the process ends"),
                None => {}
            }
            say!("{}", rebuilds::volume_rebuilds(&volume));
        }
    }
    Ok(())
}
