//! Stacks side by side: the same volume, the same requests, one after the other in rounds, medians, one table.
//! `cargo xtask compare` builds and runs it; docs/performance.md tells how it measures.
#![forbid(unsafe_code)]

mod bars;
mod chart;
mod fio;
mod hosts;
mod limits;
mod load;
mod procs;
mod report;
mod stacks;

use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use load::{LOADS, Load, Measured, medians};
use report::{Report, Row, Settings, StackFacts};
use stacks::{Group, Place, Running, STACKS, Stack};

/// Runs stacks side by side, and holds Cairn to its bars.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask compare", args_conflicts_with_subcommands = true)]
struct Args {
    /// Only these stacks and loads, as --list names them, or stacks of these groups: memory, disk, iscsi; default: all.
    rows: Vec<String>,

    /// Print what there is to name, and what is missing on this machine.
    #[arg(long)]
    list: bool,

    /// Seconds of each run.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,

    /// Runs of each row; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,

    /// MiB of the volume.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    mib: u64,

    /// Write everything that was measured to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write the tables as Markdown to this file.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Draw charts into this folder.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,

    /// Where files are made, and removed again. It needs a file system with O_DIRECT.
    #[arg(long, default_value = "target/compare")]
    dir: PathBuf,

    /// In memory, where it has a core of its own, let the client of Cairn and of the ceiling look for answers so
    /// long before it sleeps, in microseconds.
    #[arg(long, default_value_t = 1000)]
    client_spin_us: u64,

    /// `spin_us` of Cairn's processes, in microseconds [default: as theirs is]
    #[arg(long)]
    spin_us: Option<u64>,

    /// Fail where a bar is missed.
    #[arg(long)]
    strict: bool,

    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Many volumes and many hosts: shares, memory, idle CPU, latency under load.
    Limits(limits::Options),
    /// Part of `three-files`.
    #[command(hide = true)]
    FanOut(stacks::floor::FanOut),
    /// Part of `relay`: a process of it.
    #[command(hide = true)]
    RelayNode(stacks::relay::RelayNode),
    /// Part of `relay`: the client.
    #[command(hide = true)]
    RelayClient(stacks::relay_client::RelayClient),
    /// Part of what is over iSCSI: the client.
    #[command(hide = true)]
    IscsiClient(stacks::iscsi_client::IscsiClient),
    /// Part of `loopback`: the server.
    #[command(hide = true)]
    Reply(stacks::loopback::Reply),
    /// Part of `loopback`: the client.
    #[command(hide = true)]
    Request(stacks::loopback::Request),
}

fn main() -> ExitCode {
    let args = Args::parse();
    let limits = matches!(&args.part, Some(Part::Limits(options)) if options.strict);
    let strict = args.strict || limits;
    let result = match &args.part {
        Some(Part::FanOut(options)) => stacks::floor::fan_out(options).map(|()| true),
        Some(Part::RelayNode(options)) => stacks::relay::node_main(options).map(|()| true),
        Some(Part::RelayClient(options)) => {
            stacks::relay_client::client_main(options).map(|()| true)
        }
        Some(Part::IscsiClient(options)) => {
            stacks::iscsi_client::client_main(options).map(|()| true)
        }
        Some(Part::Reply(options)) => stacks::loopback::reply(options).map(|()| true),
        Some(Part::Request(options)) => stacks::loopback::request(options).map(|()| true),
        Some(Part::Limits(options)) => at_limits(options),
        None if args.list => {
            list();
            Ok(true)
        }
        None => compare(&args),
    };
    match result {
        // A bar that is missed is told and is no failure, unless it is asked for: the machine may have been busy.
        Ok(held) if held || !strict => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for stack in STACKS {
        let why = procs::missing(stack.programs).unwrap_or_default();
        println!("{:14} {:48} {why}", stack.name, stack.title);
    }
    LOADS.iter().for_each(|load| println!("{:14} {}", load.name, load.title));
}

/// What the command line names of `all`; all, where it names none of them.
fn chosen<T: Copy>(all: &[T], rows: &[String], name: impl Fn(&T) -> &'static str) -> Vec<T> {
    let named: Vec<T> =
        all.iter().filter(|t| rows.iter().any(|row| row == name(t))).copied().collect();
    if named.is_empty() { all.to_vec() } else { named }
}

fn compare(args: &Args) -> Result<bool> {
    let group = |row: &str| Group::ALL.into_iter().find(|group| group.name() == row);
    let known = |row: &str| {
        group(row).is_some()
            || STACKS.iter().any(|s| s.name == row)
            || LOADS.iter().any(|l| l.name == row)
    };
    if let Some(wrong) = args.rows.iter().find(|row| !known(row)) {
        bail!("there is no stack and no load `{wrong}`; --list names them");
    }
    let of_groups = args.rows.iter().filter_map(|row| group(row)).flat_map(|group| {
        STACKS.iter().filter(move |s| s.group == group).map(|s| s.name.to_owned())
    });
    let rows: Vec<String> = args.rows.iter().cloned().chain(of_groups).collect();
    let stacks = chosen(STACKS, &rows, |stack| stack.name);
    let loads = chosen(LOADS, &args.rows, |load| load.name);
    let place = Place {
        size: args.mib << 20,
        client_spin_us: args.client_spin_us,
        spin_us: args.spin_us,
        ..Place::new(&args.dir)?
    };
    let mut report = Report::new(Settings::new(args.seconds, args.rounds, args.mib, &args.dir));
    report.settings.print();
    let result = Group::ALL.iter().try_for_each(|&group| {
        let of_group: Vec<Stack> = stacks.iter().filter(|s| s.group == group).copied().collect();
        measure(args, &place, &of_group, &loads, &mut report)
    });
    place.remove()?;
    result?;
    report.finish();
    report.print();
    if let Some(file) = &args.json {
        report.write_json(file)?;
    }
    if let Some(file) = &args.markdown {
        report.write_markdown(file)?;
    }
    if let Some(dir) = &args.svg {
        chart::draw(&report, dir)?;
    }
    Ok(report.held())
}

fn at_limits(options: &limits::Options) -> Result<bool> {
    let place = Place::new(&options.dir)?;
    let result = limits::run(options, &place);
    place.remove()?;
    result
}

/// A stack that is up, with what was measured of it.
struct Up {
    stack: Stack,
    running: Box<dyn Running>,
}

fn measure(
    args: &Args,
    place: &Place,
    stacks: &[Stack],
    loads: &[Load],
    report: &mut Report,
) -> Result<()> {
    if stacks.is_empty() {
        return Ok(());
    }
    let mut up = Vec::new();
    for stack in stacks {
        let missing = procs::missing(stack.programs);
        let begun = match missing {
            Some(why) => Err(why),
            None => {
                eprintln!("starting {}", stack.title);
                (stack.start)(&place.of(stack.name)?).map_err(|error| format!("{error:#}"))
            }
        };
        match begun {
            Ok(running) => up.push(Up { stack: *stack, running }),
            Err(why) => {
                eprintln!("skipping {}: {why}", stack.title);
                report.skip(stack, why);
            }
        }
    }
    for load in loads {
        let mut runs: Vec<Vec<Measured>> = vec![Vec::new(); up.len()];
        for round in 0..args.rounds {
            // Who goes first changes from round to round.
            let (first, count) = (usize::try_from(round)?, up.len());
            for i in (0..count).map(|i| (i + first) % count) {
                let Up { stack, running } = &mut up[i];
                if !running.takes(load) {
                    continue;
                }
                match one(running.as_mut(), load, args.seconds) {
                    Ok(measured) => runs[i].push(measured),
                    Err(error) => {
                        eprintln!("{}, {}: {error:#}", stack.title, load.title);
                        report.failed(stack, load, &error);
                    }
                }
            }
            report.settings.note_load();
        }
        for (up, rounds) in up.iter().zip(runs) {
            if !rounds.is_empty() {
                let median = medians(&rounds);
                report.rows.push(Row { stack: up.stack, load: *load, median, rounds });
            }
        }
        eprintln!("measured {} {}", load.title, stacks.first().map_or("", |s| s.group.title()));
    }
    idle(&up, report)
}

/// One run. CPU time counts from before the client comes to after it has gone: nothing is left out.
fn one(running: &mut dyn Running, load: &Load, seconds: f64) -> Result<Measured> {
    let before = procs::cpu_seconds(&running.servers());
    let mut measured = running.load(load, seconds)?;
    // Servers that the load itself had started have done nothing before.
    let servers = running.servers();
    if !servers.is_empty() && measured.cpu_s_per_100k.is_none() {
        let cpu = procs::cpu_seconds(&servers) - before;
        let ios = measured.iops * seconds;
        measured.cpu_s_per_100k = (ios > 0.0).then(|| cpu / ios * 100_000.0);
    }
    Ok(measured)
}

/// Seconds that pass before servers are taken to be idle: what was written is settled by then.
const REST: u64 = 8;
/// Seconds that their idle CPU time is counted for.
const IDLE: u64 = 5;

/// What they use when nothing is asked of them, all at the same time.
fn idle(up: &[Up], report: &mut Report) -> Result<()> {
    if up.iter().all(|up| up.running.silent(0).is_none()) {
        return Ok(());
    }
    let mut clients: Vec<Option<Child>> = Vec::new();
    for up in up {
        let command = up.running.silent(REST + IDLE + 2);
        let client = command.map(|mut command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        });
        clients.push(client.transpose()?);
    }
    std::thread::sleep(Duration::from_secs(REST));
    let servers: Vec<Vec<u32>> = up.iter().map(|up| up.running.servers()).collect();
    let before: Vec<f64> = servers.iter().map(|pids| procs::fine_cpu_seconds(pids)).collect();
    std::thread::sleep(Duration::from_secs(IDLE));
    for (((up, servers), before), client) in up.iter().zip(&servers).zip(before).zip(clients) {
        let used = procs::fine_cpu_seconds(servers) - before;
        let Some(mut client) = client else { continue };
        let stayed = matches!(client.try_wait(), Ok(None));
        let _killed = client.kill();
        let _waited = client.wait();
        report.stacks.push(StackFacts {
            stack: up.stack,
            resident_mib: procs::resident_mib(servers),
            // Without its client it would have been idle in another way.
            idle_percent: stayed.then(|| used / Duration::from_secs(IDLE).as_secs_f64() * 100.0),
        });
    }
    Ok(())
}

/// The file system of a folder, as mount names it.
fn file_system(dir: &Path) -> String {
    let out = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(dir).output();
    out.map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned()).unwrap_or_default()
}
