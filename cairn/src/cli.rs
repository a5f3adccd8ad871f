//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use bytesize::ByteSize;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::{bench, client, serve, up};

/// Where a process manages itself unless it is told otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/run/cairn/api.sock";

/// Replicated block storage in user space.
///
/// A volume's nexus writes to every replica before it answers; replicas live in pools on files or
/// block devices; hosts connect over NVMe/TCP.
#[derive(Debug, Parser)]
#[command(name = "cairn", version, about, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    global: Global,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The API socket of the process to manage.
    #[arg(long, global = true, env = "CAIRN_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// How results are printed.
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,

    /// How logs are printed.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Human)]
    pub(crate) log_format: LogFormat,
}

/// The form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The form of logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

const EXAMPLES: &str = "\
Examples:
  cairn up                                   a 3-replica volume on this machine, exported on loopback
  cairn up --check                           the same in a temporary folder, checked byte by byte
  cairn serve --config /etc/cairn/node.toml  a storage or nexus process
  cairn volume status --socket cairn-data/nexus/api.sock
  cairn bench nvme+tcp://127.0.0.1:4420/nqn.2026-11.io.cairn:demo --rw randwrite --qd 32

`cairn COMMAND --help` tells more of each. Logs go to standard error; RUST_LOG sets their level.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring up a 3-replica volume on this machine, in four processes.
    ///
    /// Needs no root. Data is kept in the data folder and is there again next time.
    #[command(after_help = "\
Examples:
  cairn up
  cairn up --data /mnt/nvme/cairn --size 20GiB --port 4420
  cairn up --check")]
    Up(up::UpArgs),

    /// Run a process that serves pools, volumes, or both.
    #[command(after_help = "\
Example of a configuration (TOML):
  name = \"node1\"
  state_dir = \"/var/lib/cairn\"
  [nvmf]
  listen = [\"192.0.2.10:4420\"]        # default 127.0.0.1:4420
  [[pool]]
  name = \"fast\"
  path = \"/dev/nvme1n1\"               # or a file with size = \"100GiB\", create = true

docs/operations.md tells of every setting.")]
    Serve(serve::ServeArgs),

    /// Pools of a running process; and the check of one that none has open.
    #[command(subcommand)]
    Pool(client::PoolCommand),

    /// Replicas of a running process.
    #[command(subcommand)]
    Replica(client::ReplicaCommand),

    /// Volumes of a running process.
    #[command(subcommand)]
    Volume(client::VolumeCommand),

    /// Snapshots of the volumes of a running process, and clones.
    #[command(subcommand)]
    Snapshot(crate::snapshot::SnapshotCommand),

    /// Print the structures of a pool, read-only, also of a damaged one or one that is in use.
    #[command(after_help = "\
Examples:
  cairn inspect superblock /srv/pool.img
  cairn inspect extents /dev/nvme1n1 -o json | jq '.[] | select(.state == \"allocated\")'
  cairn inspect map /srv/pool.img --replica ID
  cairn inspect checksums /srv/pool.img --verify

A pool in use changes while it is read: what two runs say may differ.")]
    Inspect(crate::inspect::InspectArgs),

    /// Put load on a volume or a replica over NVMe/TCP, and measure it.
    #[command(after_help = "\
Examples:
  cairn bench nvme+tcp://127.0.0.1:4420/nqn.2026-11.io.cairn:demo --rw randread --qd 128
  cairn bench TARGET --rw randwrite --bs 4k --qd 32 --jobs 2 --time 10 --verify
  cairn bench TARGET --rw randrw --server-pid 4711 --server-pid 4712 --json")]
    Bench(bench::BenchArgs),

    /// Print a completion script for a shell.
    #[command(after_help = "\
Example:
  cairn completions bash > /etc/bash_completion.d/cairn")]
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

impl Cli {
    pub(crate) fn run(self) -> Result<ExitCode> {
        let global = self.global;
        let quiet = !matches!(self.command, Command::Serve(_));
        init_logs(global.log_format, quiet);
        match self.command {
            Command::Up(args) => up::run(&args),
            Command::Serve(args) => serve::run(&args).map(|()| ExitCode::SUCCESS),
            Command::Pool(command) => client::pool(&global, command),
            Command::Replica(command) => client::replica(&global, command),
            Command::Volume(command) => client::volume(&global, command),
            Command::Snapshot(command) => crate::snapshot::run(&global, command),
            Command::Inspect(args) => crate::inspect::run(&global, &args),
            Command::Bench(args) => bench::run(&global, &args),
            Command::Completions { shell } => {
                let mut command = Self::command();
                clap_complete::generate(shell, &mut command, "cairn", &mut std::io::stdout());
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn init_logs(format: LogFormat, quiet: bool) {
    use tracing_subscriber::EnvFilter;
    let level = if quiet { "error" } else { "info" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Human => logs.with_ansi(console::user_attended_stderr()).init(),
        LogFormat::Json => logs.json().init(),
    }
}

/// Reads a size such as `4k`, `1GiB` or `1048576`. As in fio, `k`, `m`, `g`, `t` are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<ByteSize, String> {
    let wrong = || format!("`{text}` is not a size; write one such as 4k, 512MiB or 10GiB");
    let trimmed = text.trim();
    let short = trimmed.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T']);
    if let Some(number) = short {
        let number: u64 = number.trim().parse().map_err(|_| wrong())?;
        let shift = match trimmed.as_bytes().last().map(u8::to_ascii_lowercase) {
            Some(b'k') => 10,
            Some(b'm') => 20,
            Some(b'g') => 30,
            _ => 40,
        };
        return number.checked_mul(1 << shift).map(ByteSize).ok_or_else(wrong);
    }
    trimmed.parse().map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_fio_and_as_people_write_them() {
        for (text, bytes) in
            [("4k", 4096), ("1GiB", 1 << 30), ("2M", 2 << 20), ("512", 512), ("1 MiB", 1 << 20)]
        {
            assert_eq!(parse_size(text), Ok(ByteSize(bytes)), "{text}");
        }
        assert!(parse_size("4q").unwrap_err().contains("4q"));
        assert!(parse_size("99999999999999999T").is_err());
    }
}
