//! What loopback TCP gives to requests and replies of the sizes of NVMe/TCP's, with nothing behind it: one
//! thread a side, everything that is ready read at once, and the replies to it sent at once. Both sides look for
//! what comes next before they sleep, for as long as Cairn's do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::{Group, Place, Running, Stack};
use crate::load::{Load, Measured, tell};
use crate::procs::{Daemon, pinned, run_json, wait_for};

pub(crate) const STACK: Stack = Stack {
    name: "loopback",
    title: "ceiling: loopback TCP, sizes of NVMe/TCP",
    group: Group::Memory,
    programs: &[],
    start,
};

/// A command capsule, and the header and the completion of an answer. Source: NVMe/TCP, PDU formats.
pub(crate) const CAPSULE: u32 = 72;
pub(crate) const HEADER: u32 = 24;

/// Bytes of a request and of its reply. A write brings its data, a read's reply carries it.
fn sizes(load: &Load) -> (u32, u32) {
    if load.write { (CAPSULE + load.bs, HEADER) } else { (CAPSULE, HEADER + load.bs) }
}

struct Loopback {
    place: Place,
    servers: Vec<(u32, u32, SocketAddr, Daemon)>,
}

fn start(place: &Place) -> Result<Box<dyn Running>> {
    Ok(Box::new(Loopback { place: place.clone(), servers: Vec::new() }))
}

impl Loopback {
    /// A server for these sizes.
    fn server(&mut self, request: u32, reply: u32) -> Result<SocketAddr> {
        let known = self.servers.iter().find(|(a, b, ..)| (*a, *b) == (request, reply));
        if let Some((.., address, _)) = known {
            return Ok(*address);
        }
        let log = self.place.log(&format!("server-{request}-{reply}"));
        let mut command = pinned(&self.place.own, self.place.cores.map(|(server, _)| server));
        command.args(["reply", "--request", &request.to_string(), "--reply", &reply.to_string()]);
        command.args(["--spin-us", &SERVER_SPIN_US.to_string()]);
        let mut daemon = Daemon::start(&command, &log)?;
        let mut address = None;
        wait_for("the loopback server", 10, || {
            daemon.check(&log)?;
            address = std::fs::read_to_string(&log)?.trim().parse().ok();
            Ok(address.is_some())
        })?;
        let address = address.context("just found")?;
        self.servers.push((request, reply, address, daemon));
        Ok(address)
    }
}

impl Running for Loopback {
    fn takes(&self, load: &Load) -> bool {
        !load.durable
    }

    fn load(&mut self, load: &Load, seconds: f64) -> Result<Measured> {
        let (request, reply) = sizes(load);
        let address = self.server(request, reply)?;
        let mut command = pinned(&self.place.own, self.place.cores.map(|(_, client)| client));
        command.args(["request", "--request", &request.to_string(), "--reply", &reply.to_string()]);
        command.args(["--qd", &load.qd.to_string(), "--seconds", &seconds.to_string()]);
        command.args(["--spin-us", &self.place.client_spin_us.to_string()]);
        Measured::told(&run_json(command.arg(address.to_string()))?, load)
    }

    fn servers(&self) -> Vec<u32> {
        self.servers.iter().map(|(.., daemon)| daemon.pid()).collect()
    }

    fn silent(&self, _seconds: u64) -> Option<Command> {
        None
    }
}

/// `reply`: answers.
#[derive(Debug, Args)]
pub(crate) struct Reply {
    #[arg(long)]
    request: usize,
    #[arg(long)]
    reply: usize,
    #[arg(long)]
    spin_us: u64,
}

/// `request`: asks.
#[derive(Debug, Args)]
pub(crate) struct Request {
    peer: SocketAddr,
    #[arg(long)]
    request: usize,
    #[arg(long)]
    reply: usize,
    #[arg(long)]
    qd: usize,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    spin_us: u64,
}

/// What `spin_us` of a Cairn process is unless it is set.
const SERVER_SPIN_US: u64 = 20;

/// Reads what is there; looks for it for so long before it sleeps.
pub(crate) fn read(stream: &mut TcpStream, buf: &mut [u8], spin_us: u64) -> std::io::Result<usize> {
    let until = Instant::now() + Duration::from_micros(spin_us);
    while spin_us > 0 && Instant::now() < until {
        match recv(stream.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => std::hint::spin_loop(),
            got => return got.map_err(std::io::Error::from),
        }
    }
    stream.read(buf)
}

const RECEIVE: usize = 256 << 10;

/// Prints its address, and serves one connection after the other.
pub(crate) fn reply(options: &Reply) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    let mut buf = vec![0; RECEIVE.max(options.request)];
    let mut out = Vec::new();
    for stream in listener.incoming() {
        let mut stream = stream?;
        stream.set_nodelay(true)?;
        let mut held = 0;
        // A client that is gone ends its connection, one way or another.
        while let Ok(got) = read(&mut stream, &mut buf, options.spin_us) {
            if got == 0 {
                break;
            }
            let ready = (held + got) / options.request;
            held = (held + got) % options.request;
            out.resize(ready * options.reply, 0x5a);
            if stream.write_all(&out).is_err() {
                break;
            }
        }
    }
    Ok(())
}

/// Prints what it measured as JSON.
pub(crate) fn request(options: &Request) -> Result<()> {
    let mut stream = TcpStream::connect(options.peer)?;
    stream.set_nodelay(true)?;
    let requests = vec![0xa7; options.request * options.qd];
    let mut buf = vec![0; RECEIVE.max(options.reply)];
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3)?;
    let begun = Instant::now();
    let end = Duration::from_secs_f64(options.seconds);
    // Replies come in the order of the requests.
    let mut sent: std::collections::VecDeque<Instant> = (0..options.qd).map(|_| begun).collect();
    stream.write_all(&requests)?;
    let mut held = 0;
    while !sent.is_empty() {
        let got = read(&mut stream, &mut buf, options.spin_us)?;
        if got == 0 {
            bail!("the server is gone");
        }
        let ready = (held + got) / options.reply;
        held = (held + got) % options.reply;
        let now = Instant::now();
        for begun in sent.drain(..ready) {
            latency.saturating_record(u64::try_from((now - begun).as_nanos())?);
        }
        if ready > 0 && now - begun < end {
            stream.write_all(&requests[..ready * options.request])?;
            sent.extend(std::iter::repeat_n(now, ready));
        }
    }
    tell(&latency, begun.elapsed(), None);
    Ok(())
}
