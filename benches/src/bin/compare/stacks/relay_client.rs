//! The client of `relay`: one thread, one connection; what is ready is read at once, and asked for anew at once.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use hdrhistogram::Histogram;

use super::loopback::{CAPSULE, HEADER, read};
use super::relay::{Asked, FLUSH, READ, WRITE};
use crate::load::tell;

/// `relay-client`: asks.
#[derive(Debug, Args)]
pub(crate) struct RelayClient {
    peer: SocketAddr,
    #[arg(long)]
    rw: String,
    #[arg(long)]
    bs: u32,
    #[arg(long)]
    qd: u32,
    #[arg(long)]
    size: u64,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    spin_us: u64,
    /// A flush after each write.
    #[arg(long)]
    durable: bool,
}

struct Client<'a> {
    options: &'a RelayClient,
    begun: Vec<Instant>,
    next: u64,
    out: Vec<u8>,
}

impl Client<'_> {
    fn writes(&self) -> bool {
        self.options.rw.ends_with("write")
    }

    fn ask(&mut self, tag: u32, verb: u8) {
        let bs = self.options.bs;
        let units = self.options.size / u64::from(bs);
        self.next = if self.options.rw.starts_with("rand") {
            self.next
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407)
        } else {
            self.next + (1 << 33)
        };
        let offset = (self.next >> 33) % units * u64::from(bs);
        let at = self.out.len();
        let data = if verb == WRITE { bs as usize } else { 0 };
        self.out.resize(at + CAPSULE as usize + data, 0xa7);
        Asked { verb, tag, len: bs, offset }.put(&mut self.out[at..]);
    }
}

/// Prints what it measured as JSON.
pub(crate) fn client_main(options: &RelayClient) -> Result<()> {
    let mut stream = TcpStream::connect(options.peer)?;
    stream.set_nodelay(true)?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(options.seconds);
    let mut client =
        Client { options, begun: vec![begun; options.qd as usize], next: 1, out: Vec::new() };
    let verb = if client.writes() { WRITE } else { READ };
    (0..options.qd).for_each(|tag| client.ask(tag, verb));
    let reply = HEADER as usize + if verb == READ { options.bs as usize } else { 0 };
    let mut buf = vec![0; (1 << 20) + reply];
    let (mut held, mut busy) = (0, options.qd);
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3)?;
    while busy > 0 {
        stream.write_all(&client.out)?;
        client.out.clear();
        let got = read(&mut stream, &mut buf[held..], options.spin_us)?;
        if got == 0 {
            bail!("the server is gone");
        }
        held += got;
        let now = Instant::now();
        let mut at = 0;
        while held - at >= reply {
            let answer = Asked::get(&buf[at..]);
            at += reply;
            if options.durable && answer.verb == WRITE {
                client.ask(answer.tag, FLUSH);
                continue;
            }
            let begun = &mut client.begun[answer.tag as usize];
            latency.saturating_record(u64::try_from((now - *begun).as_nanos())?);
            *begun = now;
            if now < end {
                client.ask(answer.tag, verb);
            } else {
                busy -= 1;
            }
        }
        buf.copy_within(at..held, 0);
        held -= at;
    }
    tell(&latency, begun.elapsed(), None);
    Ok(())
}
