//! `cairn serve`: a process with pools, volumes, or both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use cairn_engine::control::Command;
use cairn_engine::reactor::{DriverConfig, Features};
use cairn_engine::{EngineHandle, IscsiConfig, IscsiPortal, ShardConfig};
use clap::Args;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

use crate::config::{Config, PortalGroup};
use crate::pools;
use crate::service::Service;
use crate::state::State;

/// What a process that was killed had open may be in use for so long after it.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is tried meanwhile.
const RELEASE_POLL: Duration = Duration::from_millis(50);

/// Options of `cairn serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// The configuration file.
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,

    /// End when standard input is closed: for a parent that must not leave processes behind.
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let config = Config::load(&args.config)?;
    let state = State::load(&config.state_dir)?;
    raise_descriptor_limit();
    // Held for as long as the engine lives.
    let holder = crate::holder::take(&config.state_dir, boot_id());
    let groups = config.iscsi.portal_groups(holder.id);
    let shard = ShardConfig {
        holder: holder.id,
        iscsi: iscsi_config(&config, &groups)?,
        ..shard_config(&config, holder.id)
    };
    let shards = config.engine.shards;
    let (engine, thread) = cairn_engine::start_shards(&driver_config(&config), &shard, shards)
        .context("the data engine cannot start")?;
    tracing::info!(name = %config.name, shards, features = ?engine.features(), "engine started");

    pools::open_all(&engine, &config, &state)?;
    let mut addresses = Vec::new();
    for &wanted in &config.nvmf.listen {
        addresses.push(listen(&engine, &config, wanted)?);
    }
    let mut portals = Vec::new();
    for group in &groups {
        for &wanted in &group.listen {
            portals.push(listen_for_initiators(&engine, group, wanted)?);
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .enable_all()
        .build()?;
    let service = Arc::new(Service::new(&config, engine.clone(), addresses, portals, state));
    service.resume_volumes();
    // An engine that panicked serves nothing: the process ends, for its supervisor to start again.
    let (ended, engine_ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::spawn(move || {
        let joined = thread.join();
        // The API may have ended before.
        let _told = ended.send(());
        joined
    });
    runtime.spawn(crate::scrub::run(Arc::clone(&service)));
    let served = runtime.block_on(serve(&config, service, args.exit_with_stdin, engine_ended));
    tracing::info!("draining");
    let stopped = engine.call(|reply| Command::Shutdown { reply });
    runtime.shutdown_background();
    let joined = thread.join().and_then(|joined| joined);
    drop(holder);
    joined.map_err(|_| anyhow!("a thread of the engine panicked; see the log above"))?;
    served?;
    stopped?;
    tracing::info!("stopped");
    Ok(())
}

fn driver_config(config: &Config) -> DriverConfig {
    let mut allow = Features::all();
    allow.registered_files = config.engine.registered;
    allow.registered_buffers = config.engine.registered;
    DriverConfig {
        arena_len: u32::try_from(config.engine.buffers.as_u64()).unwrap_or(u32::MAX),
        spin_ns: config.engine.spin_us * 1_000,
        allow,
        ..DriverConfig::default()
    }
}

fn shard_config(config: &Config, holder: u128) -> ShardConfig {
    let node = uuid::Uuid::new_v4();
    let [cntlid_min, cntlid_max] =
        config.nvmf.controller_ids(if holder == 0 { node.as_u128() } else { holder });
    ShardConfig {
        node_nqn: format!("nqn.2026-11.io.cairn:node:{}", config.name),
        node_id: node.as_u128(),
        lease_ms: config.nexus.lease_ms,
        pace: config.nexus.pace(),
        incarnation: boot_id().unwrap_or(node.as_u128()),
        cntlid_min,
        cntlid_max,
        replica_header_digest: config.nexus.header_digest,
        replica_data_digest: config.nexus.data_digest,
        child_deadline_min_ms: config.nexus.child_deadline_min_ms,
        assembly_wait_ms: config.nexus.assembly_wait_ms,
        overcommit: config.overcommit,
        sanitize_mib_s: config.nexus.sanitize_mib_s(),
        ..ShardConfig::default()
    }
}

/// What initiators of iSCSI meet.
fn iscsi_config(config: &Config, groups: &[PortalGroup]) -> Result<IscsiConfig> {
    let file = config.iscsi.discovery_chap_file.as_ref();
    let halves = [uuid::Uuid::new_v4(), uuid::Uuid::new_v4()].map(uuid::Uuid::into_bytes);
    let mut entropy = [0; 32];
    entropy[..16].copy_from_slice(&halves[0]);
    entropy[16..].copy_from_slice(&halves[1]);
    let config = IscsiConfig {
        portal_groups: groups.iter().map(|group| group.tag).collect(),
        entropy,
        discovery_chap: file.map(|path| crate::chap::read(path, false)).transpose()?,
        nop_interval_ms: config.iscsi.nop_interval.0.saturating_mul(1_000),
    };
    config.check().context("discovery_chap_file")?;
    Ok(config)
}

/// Which boot of the machine this is. Where it is not told, every process counts as another one: then a
/// replica that restarts with writes that were not flushed is taken out, which is safe.
fn boot_id() -> Option<u128> {
    #[cfg(feature = "nemesis")]
    if let Some(told) = cairn_engine::nemesis::boot_id() {
        return Some(told);
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(uuid::Uuid::parse_str(text.trim()).ok()?.as_u128())
}

/// A connection is a descriptor: take as many as the hard limit allows.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "the limit of open descriptors stays as it is");
    }
}

/// Tries for a while: the kernel takes the sockets and files of a process that was killed away only
/// some time after it is gone, when it has taken down its ring.
pub(crate) fn patiently<T, E: std::fmt::Display>(
    in_use: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + RELEASE_TIMEOUT;
    let mut told = false;
    loop {
        match attempt() {
            Err(e) if in_use(&e) && Instant::now() < until => {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!("waiting: {e}");
                }
                std::thread::sleep(RELEASE_POLL);
            }
            done => return done,
        }
    }
}

fn listen(engine: &EngineHandle, config: &Config, wanted: SocketAddr) -> Result<SocketAddr> {
    let taken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::AddrInUse;
    let (listener, bound) = patiently(taken, || cairn_engine::thread::listen(wanted))
        .with_context(|| format!("cannot listen on {wanted} (is another process there?)"))?;
    let advertise = match config.nvmf.advertise {
        Some(ip) => SocketAddr::new(ip, bound.port()),
        None if bound.ip().is_unspecified() => bail!(
            "listen = \"{wanted}\" is every address; set `advertise` to the one that hosts are told"
        ),
        None => bound,
    };
    engine.call(|reply| Command::AddListener { listener, advertise, reply })?;
    tracing::info!(%bound, %advertise, "listening for NVMe/TCP");
    Ok(advertise)
}

fn listen_for_initiators(
    engine: &EngineHandle,
    group: &PortalGroup,
    wanted: SocketAddr,
) -> Result<IscsiPortal> {
    let taken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::AddrInUse;
    let (listener, bound) = patiently(taken, || cairn_engine::thread::listen(wanted))
        .with_context(|| format!("cannot listen on {wanted} (is another process there?)"))?;
    let address = SocketAddr::new(group.advertise.unwrap_or(bound.ip()), bound.port());
    let portal = IscsiPortal { address, group: group.tag };
    engine.call(|reply| Command::AddIscsiListener { listener, portal, reply })?;
    tracing::info!(%bound, advertise = %address, group = group.tag, "listening for iSCSI");
    Ok(portal)
}

async fn serve(
    config: &Config,
    service: Arc<Service>,
    exit_with_stdin: bool,
    engine_ended: tokio::sync::oneshot::Receiver<()>,
) -> Result<()> {
    let socket = config.socket();
    if let Some(parent) = socket.parent() {
        std::fs::create_dir_all(parent)
            .with_context(|| format!("cannot make the folder {}", parent.display()))?;
    }
    // A socket file that nobody answers on is left over from a process that was killed.
    if socket.exists() && tokio::net::UnixStream::connect(&socket).await.is_err() {
        std::fs::remove_file(&socket)?;
    }
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot serve the API on {}", socket.display()))?;
    restrict(&socket)?;
    tracing::info!(socket = %socket.display(), "serving the API");
    if let Some(wanted) = config.metrics.listen {
        crate::metrics::run(Arc::clone(&service), wanted).await?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM"),
            _ = interrupt.recv() => tracing::info!("SIGINT"),
            _ = engine_ended => tracing::error!("the engine has ended"),
            () = stdin_closed(), if exit_with_stdin => tracing::info!("the parent is gone"),
        }
    };
    let settling = Arc::clone(&service);
    tokio::spawn(async move { settling.settle_keys().await });
    let members = Arc::clone(&service);
    tokio::spawn(async move { members.look_after_members().await });
    tokio::spawn(Arc::clone(&service).look_after_standbys());
    let api = cairn_api::v1::cairn_server::CairnServer::from_arc(service);
    let served = tonic::transport::Server::builder()
        .add_service(api)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await;
    // Left behind it would only be found dead at the next start.
    let _removed = std::fs::remove_file(&socket);
    served.context("the API failed")
}

/// Only this user manages the process.
fn restrict(socket: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot restrict {}", socket.display()))
}

async fn stdin_closed() {
    use tokio::io::AsyncReadExt as _;
    let mut byte = [0; 1];
    while matches!(tokio::io::stdin().read(&mut byte).await, Ok(n) if n > 0) {}
}
