//! The client of `relay`: one thread, one connection; what is ready is read at once, and asked for anew at once.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use hdrhistogram::Histogram;

use super::loopback::{CAPSULE, HEADER, read};
use super::relay::{Asked, FLUSH, READ, WRITE};
use crate::load::{Client, Pattern, tell};

/// `relay-client`: asks.
#[derive(Debug, Args)]
pub(crate) struct RelayClient {
    peer: SocketAddr,
    #[arg(long)]
    size: u64,
    #[command(flatten)]
    load: Client,
}

struct Asker {
    pattern: Pattern,
    bs: u32,
    out: Vec<u8>,
}

impl Asker {
    fn ask(&mut self, tag: u32, verb: u8) {
        let at = self.out.len();
        let data = if verb == WRITE { self.bs as usize } else { 0 };
        self.out.resize(at + CAPSULE as usize + data, 0xa7);
        let offset = if verb == FLUSH { 0 } else { self.pattern.next() };
        Asked { verb, tag, len: self.bs, offset }.put(&mut self.out[at..]);
    }
}

/// Prints what it measured as JSON.
pub(crate) fn client_main(options: &RelayClient) -> Result<()> {
    let mut stream = TcpStream::connect(options.peer)?;
    stream.set_nodelay(true)?;
    let begun = Instant::now();
    let load = &options.load;
    let end = begun + load.time();
    let mut since = vec![begun; load.qd as usize];
    let mut asker = Asker { pattern: load.pattern(options.size)?, bs: load.bs, out: Vec::new() };
    let verb = if load.write { WRITE } else { READ };
    (0..load.qd).for_each(|tag| asker.ask(tag, verb));
    let reply = HEADER as usize + if verb == READ { load.bs as usize } else { 0 };
    let mut buf = vec![0; (1 << 20) + reply];
    let (mut held, mut busy) = (0, load.qd);
    let mut latency = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3)?;
    while busy > 0 {
        stream.write_all(&asker.out)?;
        asker.out.clear();
        let got = read(&mut stream, &mut buf[held..], load.spin_us)?;
        if got == 0 {
            bail!("the server is gone");
        }
        held += got;
        let now = Instant::now();
        let mut at = 0;
        while held - at >= reply {
            let answer = Asked::get(&buf[at..]);
            at += reply;
            if load.durable && answer.verb == WRITE {
                asker.ask(answer.tag, FLUSH);
                continue;
            }
            let begun = &mut since[answer.tag as usize];
            latency.saturating_record(u64::try_from((now - *begun).as_nanos())?);
            *begun = now;
            if now < end {
                asker.ask(answer.tag, verb);
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
