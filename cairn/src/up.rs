//! `cairn up`: three replica processes and a nexus on this machine.

use std::io::IsTerminal as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use cairn_api::v1::{self, cairn_client::CairnClient};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Channel;

use crate::cli::parse_size;
use crate::client::{connect, said, volumes};
use crate::config::{self, Config};
use crate::output::say;
use crate::{check, output, recovery, rot};

/// Replicas of the demo volume.
pub(crate) const REPLICAS: usize = 3;
/// The demo volume.
pub(crate) const VOLUME: &str = "demo";
/// A process must serve its API within this time.
const START_TIMEOUT: Duration = Duration::from_secs(15);
/// A process must end within this time after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(25);
/// How often the live table is brought up to date.
const REFRESH: Duration = Duration::from_secs(2);

/// Options of `cairn up`.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Where pools, sockets and logs are kept.
    #[arg(long, value_name = "DIR", default_value = "cairn-data")]
    data: PathBuf,

    /// Size of the volume, the first time.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    size: ByteSize,

    /// The nexus listens here, the replicas on the three ports after it.
    #[arg(long, default_value_t = 4420)]
    port: u16,

    /// Check volumes in a temporary folder, on free ports, byte by byte: an encrypted one that grows, one
    /// that loses a replica half-way and has it rebuilt, and one of two replicas and a witness whose
    /// replicas are replaced, by itself and on demand, and which is started by force.
    #[arg(long, conflicts_with_all = ["data", "size", "port"])]
    check: bool,

    /// Flip bits in so many places of the pools of a volume in a temporary folder, under load and at
    /// rest, and check that every read is right or an error, and that a scrub heals what can be.
    #[arg(long, value_name = "FLIPS", conflicts_with_all = ["data", "size", "port", "check"])]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=8000), hide = true)]
    rot: Option<u16>,

    /// Measure in a temporary folder how a volume recovers: after its nexus was killed, and while a
    /// replica of so much is rebuilt.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, hide = true)]
    #[arg(conflicts_with_all = ["data", "size", "port", "check", "rot"])]
    recovery: Option<ByteSize>,
}

pub(crate) fn run(args: &UpArgs) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if args.check {
        return runtime.block_on(check::run());
    }
    if let Some(flips) = args.rot {
        return runtime.block_on(rot::run(usize::from(flips)));
    }
    if let Some(size) = args.recovery {
        return runtime.block_on(recovery::run(recovery::size_of(size)?));
    }
    runtime.block_on(up(args))
}

async fn up(args: &UpArgs) -> Result<ExitCode> {
    std::fs::create_dir_all(&args.data)
        .with_context(|| format!("cannot make the folder {}", args.data.display()))?;
    let data = std::fs::canonicalize(&args.data)?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let started = Instant::now();
    let mut cluster = Cluster::start(&data, Some(args.port), args.size.as_u64(), |text| {
        say!("{text}");
    })
    .await?;
    let volume = cluster.volume(args.size.as_u64()).await?;
    let address = volume.addresses.first().cloned().unwrap_or_default();
    say!(
        "\nvolume `{VOLUME}` ({}) is {} after {:.1} s. To use it on this machine:\n",
        output::size(volume.size_bytes),
        volume.state,
        started.elapsed().as_secs_f64()
    );
    say!("  sudo modprobe nvme-tcp");
    say!("  sudo {}", output::connect_line(&address, &volume.nqn));
    say!("  cairn bench nvme+tcp://{address}/{} --rw randwrite --qd 32", volume.nqn);
    say!("\nManage it:  cairn volume status --socket {}", cluster.nexus_socket().display());
    say!("Data and logs are in {}. Ctrl-C ends it; the data stays.\n", data.display());
    let screen = console::Term::stdout();
    let live = std::io::stdout().is_terminal();
    let mut shown = String::new();
    loop {
        let text = match volumes(&mut cluster.client).await {
            Ok(all) => all.iter().map(output::volume_status).collect::<Vec<_>>().join("\n\n"),
            Err(error) => format!("the nexus does not answer: {error:#}"),
        };
        if text != shown {
            if live && !shown.is_empty() {
                screen.clear_last_lines(shown.lines().count())?;
            }
            // Without a terminal a line is printed for a change of state, not for every request.
            let (old, new) = (state_line(&shown), state_line(&text));
            if live {
                screen.write_line(&text)?;
            } else if old != new {
                say!("{}", new.unwrap_or(&text));
            }
            shown = text;
        }
        if let Some(name) = cluster.ended()? {
            say!("process {name} has ended; its log is {}", data.join(&name).join("log").display());
        }
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            () = tokio::time::sleep(REFRESH) => {}
        }
    }
    say!("\nstopping");
    cluster.stop().await?;
    say!("stopped; `cairn up --data {}` brings it back", args.data.display());
    Ok(ExitCode::SUCCESS)
}

fn state_line(text: &str) -> Option<&str> {
    text.lines().find(|line| line.starts_with("state"))
}

/// A process of the cluster.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    pub(crate) address: String,
    ended: bool,
}

/// The four processes. Dropped, it leaves none behind.
#[derive(Debug)]
pub(crate) struct Cluster {
    data: PathBuf,
    /// The replicas, then the nexus.
    pub(crate) processes: Vec<Process>,
    pub(crate) client: CairnClient<Channel>,
    pub(crate) replicas: Vec<v1::Replica>,
    nexus: NexusSettings,
}

/// What the nexus' process is told beyond the usual.
#[derive(Debug, Clone, Default)]
pub(crate) struct NexusSettings {
    pub(crate) nexus: config::Nexus,
    pub(crate) metrics: config::Metrics,
    pub(crate) standbys: Vec<config::Standby>,
    pub(crate) engine: config::Engine,
    pub(crate) pools: Vec<config::Pool>,
    /// 0: one that is free.
    pub(crate) port: u16,
}

/// The API socket of a process of the cluster. A socket's path is at most 107 bytes.
pub(crate) fn socket_path(data: &Path, name: &str) -> PathBuf {
    data.join(name).join("api.sock")
}

impl Cluster {
    /// Starts the processes, replicas first. Without a port each takes one that is free.
    pub(crate) async fn start(
        data: &Path,
        port: Option<u16>,
        size_bytes: u64,
        tell: impl FnMut(&str),
    ) -> Result<Self> {
        Self::start_with(data, port, size_bytes, NexusSettings::default(), tell).await
    }

    /// The same, with settings for the nexus.
    pub(crate) async fn start_with(
        data: &Path,
        port: Option<u16>,
        size_bytes: u64,
        nexus: NexusSettings,
        mut tell: impl FnMut(&str),
    ) -> Result<Self> {
        if socket_path(data, "nexus").as_os_str().len() > 100 {
            bail!(
                "{} is too deep for a socket, whose path may have 107 bytes; use another --data",
                data.display()
            );
        }
        let port_of = |i: usize| port.map_or(0, |p| p + u16::try_from(i).unwrap_or(0));
        if port.is_some() {
            for i in 0..=REPLICAS {
                let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port_of(i)));
                TcpListener::bind(address).with_context(|| {
                    format!("{address} is taken; choose other ports with --port")
                })?;
            }
        }
        let mut processes = Vec::new();
        let mut replicas = Vec::new();
        for i in 1..=REPLICAS {
            let name = format!("r{i}");
            let dir = data.join(&name);
            // Room for the volume, the pool's own tables, and a little more.
            let pool_size = ByteSize(size_bytes + size_bytes / 16 + (64 << 20));
            let path = dir.join("pool.img");
            let size = (!path.exists()).then_some(pool_size);
            let pool = config::Pool::new("pool", path.display().to_string(), size, true);
            let (process, mut client) =
                start_process(data, &name, port_of(i), vec![pool], None).await?;
            tell(&format!("started {name} on {}", process.address));
            processes.push(process);
            let held =
                client.list_replicas(v1::ListReplicasRequest {}).await.map_err(|s| said(&s))?;
            replicas.push(held.into_inner().replicas);
        }
        let (process, mut client) =
            start_process(data, "nexus", port_of(0), Vec::new(), Some(&nexus)).await?;
        tell(&format!("started nexus on {}", process.address));
        processes.push(process);
        let new = volumes(&mut client).await?.is_empty();
        let mut chosen = Vec::new();
        if new {
            let volume_id = uuid::Uuid::new_v4().to_string();
            for i in 1..=REPLICAS {
                let mut replica = connect(&socket_path(data, &format!("r{i}"))).await?;
                let request = v1::CreateReplicaRequest {
                    pool: "pool".to_owned(),
                    volume_id: volume_id.clone(),
                    name: VOLUME.to_owned(),
                    size_bytes,
                    id: String::new(),
                    thick: false,
                };
                let made = replica.create_replica(request).await.map_err(|s| said(&s))?;
                chosen.push(made.into_inner());
            }
            tell(&format!("made {REPLICAS} replicas of {}", output::size(size_bytes)));
        } else {
            chosen.extend(replicas.into_iter().flatten());
        }
        Ok(Self { data: data.to_owned(), processes, client, replicas: chosen, nexus })
    }

    /// The demo volume: made the first time, waited for afterwards.
    pub(crate) async fn volume(&mut self, size_bytes: u64) -> Result<v1::Volume> {
        if volumes(&mut self.client).await?.is_empty() {
            let request = v1::CreateVolumeRequest {
                name: VOLUME.to_owned(),
                block_size: 4096,
                size_bytes,
                replicas: self.replicas.iter().map(|r| r.uri.clone()).collect(),
                id: self.replicas.first().map_or_else(String::new, |r| r.volume_id.clone()),
                ..v1::CreateVolumeRequest::default()
            };
            let made = self.client.create_volume(request).await.map_err(|s| said(&s))?;
            return Ok(made.into_inner());
        }
        let until = Instant::now() + START_TIMEOUT;
        loop {
            let all = volumes(&mut self.client).await?;
            let volume = all
                .into_iter()
                .find(|v| v.name == VOLUME)
                .with_context(|| format!("the nexus serves no volume `{VOLUME}`"))?;
            if volume.serving {
                return Ok(volume);
            }
            if Instant::now() > until {
                bail!("volume `{VOLUME}` is {}: {}", volume.state, volume.detail);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) fn nexus_socket(&self) -> PathBuf {
        socket_path(&self.data, "nexus")
    }

    /// The API socket of a process.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        socket_path(&self.data, name)
    }

    /// Kills the nexus at once, and starts it again.
    pub(crate) async fn restart_nexus(&mut self) -> Result<()> {
        self.kill(REPLICAS)?;
        self.start_nexus().await
    }

    /// Kills the nexus at once.
    pub(crate) fn kill_nexus(&mut self) -> Result<()> {
        self.kill(REPLICAS)
    }

    /// Starts the nexus that was killed.
    pub(crate) async fn start_nexus(&mut self) -> Result<()> {
        let (process, client) =
            start_process(&self.data, "nexus", 0, Vec::new(), Some(&self.nexus)).await?;
        self.processes[REPLICAS] = process;
        self.client = client;
        Ok(())
    }

    /// Starts one more process.
    pub(crate) async fn start_other(
        &self,
        name: &str,
        settings: &NexusSettings,
    ) -> Result<(Process, CairnClient<Channel>)> {
        start_process(&self.data, name, settings.port, Vec::new(), Some(settings)).await
    }

    /// Starts a replica's process that was killed, at this port; 0: at one that is free.
    pub(crate) async fn move_replica(&mut self, at: usize, port: u16) -> Result<()> {
        let name = self.processes[at].name.clone();
        let path = self.data.join(&name).join("pool.img");
        let pool = config::Pool::new("pool", path.display().to_string(), None, true);
        let (process, _) = start_process(&self.data, &name, port, vec![pool], None).await?;
        self.processes[at] = process;
        Ok(())
    }

    /// Starts a replica's process that was killed, where it was.
    pub(crate) async fn start_replica(&mut self, at: usize) -> Result<()> {
        let address = &self.processes[at].address;
        let port = address.parse::<SocketAddr>().context("its address")?.port();
        self.move_replica(at, port).await
    }

    /// Kills one process at once, as a crash would.
    pub(crate) fn kill(&mut self, at: usize) -> Result<()> {
        self.processes[at].kill()
    }

    /// A process that has ended of its own accord since the last call.
    fn ended(&mut self) -> Result<Option<String>> {
        for process in &mut self.processes {
            if !process.ended && process.child.try_wait()?.is_some() {
                process.ended = true;
                return Ok(Some(process.name.clone()));
            }
        }
        Ok(None)
    }

    /// Ends the processes cleanly, the nexus first.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let mut problems = Vec::new();
        while let Some(mut process) = self.processes.pop() {
            if process.ended {
                continue;
            }
            process.ended = true;
            let pid = Pid::from_raw(i32::try_from(process.child.id())?);
            kill(pid, Signal::SIGTERM)?;
            let until = Instant::now() + STOP_TIMEOUT;
            loop {
                if let Some(status) = process.child.try_wait()? {
                    if !status.success() {
                        problems.push(format!("{} ended with {status}", process.name));
                    }
                    break;
                }
                if Instant::now() > until {
                    process.child.kill()?;
                    process.child.wait()?;
                    problems.push(format!("{} had to be killed", process.name));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        if !problems.is_empty() {
            bail!("{}; the logs are in {}", problems.join(", "), self.data.display());
        }
        Ok(())
    }
}

impl Process {
    /// Kills it at once, as a crash would.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended {
            // It may have ended by itself; its standard input, which closes now, ends it otherwise.
            let _killed = self.child.kill();
            let _waited = self.child.wait();
        }
    }
}

async fn start_process(
    data: &Path,
    name: &str,
    port: u16,
    mut pools: Vec<config::Pool>,
    settings: Option<&NexusSettings>,
) -> Result<(Process, CairnClient<Channel>)> {
    let dir = data.join(name);
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("cannot make the folder {}", dir.display()))?;
    let settings = settings.cloned().unwrap_or_default();
    pools.extend(settings.pools);
    let config = Config {
        name: name.to_owned(),
        state_dir: dir.clone(),
        overcommit: 20,
        api: config::Api::default(),
        iscsi: config::Iscsi::default(),
        nvmf: config::Nvmf {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))],
            ..config::Nvmf::default()
        },
        engine: settings.engine,
        nexus: settings.nexus,
        metrics: settings.metrics,
        pools,
        standbys: settings.standbys,
    };
    let file = dir.join("config.toml");
    std::fs::write(&file, toml::to_string(&config)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let log_path = dir.join("log");
    let log = std::fs::File::create(&log_path)
        .with_context(|| format!("cannot write {}", log_path.display()))?;
    let child = Command::new(std::env::current_exe()?)
        .arg("serve")
        .arg("--config")
        .arg(&file)
        .arg("--exit-with-stdin")
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("cannot start a process")?;
    let mut process =
        Process { name: name.to_owned(), child, address: String::new(), ended: false };
    let socket = socket_path(data, name);
    let until = Instant::now() + START_TIMEOUT;
    let mut client = loop {
        if let Some(status) = process.child.try_wait()? {
            process.ended = true;
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(3).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("process {name} ended with {status}:\n{}", tail.join("\n"));
        }
        match connect(&socket).await {
            Ok(client) => break client,
            Err(error) if Instant::now() > until => {
                return Err(error.context(format!("process {name} does not answer")));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let info = client.get_info(v1::GetInfoRequest {}).await.map_err(|s| said(&s))?;
    process.address = info.into_inner().nvmf.into_iter().next().unwrap_or_default();
    Ok((process, client))
}
