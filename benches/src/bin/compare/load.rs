//! What is asked of every stack, and what came of it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Value, json};

/// A pattern of requests, the same for every stack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// How it is chosen on the command line, and named in JSON.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) write: bool,
    pub(crate) random: bool,
    /// Bytes in a request.
    pub(crate) bs: u32,
    /// Requests in flight.
    pub(crate) qd: u16,
    /// Each write is flushed before the next one.
    pub(crate) durable: bool,
}

const fn small(name: &'static str, title: &'static str, write: bool, qd: u16) -> Load {
    Load { name, title, write, random: true, bs: 4096, qd, durable: false }
}

const fn long(name: &'static str, title: &'static str, write: bool) -> Load {
    Load { name, title, write, random: false, bs: 128 << 10, qd: 16, durable: false }
}

/// All of them, in the order of the table.
pub(crate) const LOADS: &[Load] = &[
    small("read1", "4K randread QD1", false, 1),
    small("read32", "4K randread QD32", false, 32),
    small("read128", "4K randread QD128", false, 128),
    small("write1", "4K randwrite QD1", true, 1),
    small("write32", "4K randwrite QD32", true, 32),
    small("write128", "4K randwrite QD128", true, 128),
    long("seqread", "128K read QD16", false),
    long("seqwrite", "128K write QD16", true),
    Load { durable: true, ..small("durable1", "4K randwrite + flush QD1", true, 1) },
];

impl Load {
    /// fio's and `cairn bench`'s word for it.
    pub(crate) fn rw(&self) -> &'static str {
        match (self.random, self.write) {
            (true, false) => "randread",
            (true, true) => "randwrite",
            (false, false) => "read",
            (false, true) => "write",
        }
    }

    /// Tells a client of this program of it: the arguments of [`Client`].
    pub(crate) fn tell(&self, client: &mut Command, seconds: f64, spin_us: u64) {
        let flags =
            [("--write", self.write), ("--random", self.random), ("--durable", self.durable)];
        client.args(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag));
        client.args(["--bs", &self.bs.to_string(), "--qd", &self.qd.to_string()]);
        client.args(["--seconds", &seconds.to_string(), "--spin-us", &spin_us.to_string()]);
    }
}

/// A load, as a client of this program is given it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Client {
    #[arg(long)]
    pub(crate) write: bool,
    #[arg(long)]
    random: bool,
    #[arg(long)]
    pub(crate) bs: u32,
    #[arg(long)]
    pub(crate) qd: u32,
    #[arg(long)]
    seconds: f64,
    /// So long it looks for answers before it sleeps.
    #[arg(long, default_value_t = 0)]
    pub(crate) spin_us: u64,
    /// A flush after each write.
    #[arg(long)]
    pub(crate) durable: bool,
}

impl Client {
    pub(crate) fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// The offsets of requests in so many bytes.
    pub(crate) fn pattern(&self, size: u64) -> Result<Pattern> {
        let units = size.checked_div(u64::from(self.bs)).filter(|&units| units > 0);
        let units = units.context("there is no room for a request")?;
        Ok(Pattern { random: self.random, units, bs: self.bs, state: 0, next: 0 })
    }
}

/// What is asked for, request by request.
#[derive(Debug)]
pub(crate) struct Pattern {
    random: bool,
    /// Requests that there is room for.
    pub(crate) units: u64,
    bs: u32,
    state: u64,
    next: u64,
}

impl Pattern {
    /// Bytes from the start.
    pub(crate) fn next(&mut self) -> u64 {
        let unit = if self.random {
            // Knuth's linear congruential generator; its lower bits are poor.
            self.state = self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            self.state >> 33
        } else {
            self.next += 1;
            self.next - 1
        };
        unit % self.units * u64::from(self.bs)
    }
}

/// What one run, or the median of several, came to. Latencies are in microseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Measured {
    pub(crate) iops: f64,
    pub(crate) mib_s: f64,
    pub(crate) mean_us: f64,
    pub(crate) p99_us: Option<f64>,
    pub(crate) p999_us: Option<f64>,
    /// Of all the stack's server processes.
    pub(crate) cpu_s_per_100k: Option<f64>,
}

/// Prints what a client of this program measured, in nanoseconds, as JSON.
pub(crate) fn tell(latency: &Histogram<u64>, took: Duration, cpu_s: Option<f64>) {
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let (ios, us) = (latency.len() as f64, |q| latency.value_at_quantile(q) as f64 / 1000.0);
    let value = json!({
        "iops": ios / took.as_secs_f64(), "mean_us": latency.mean() / 1000.0, "p99_us": us(0.99),
        "p999_us": us(0.999), "cpu_s_per_100k": cpu_s.map(|cpu| cpu / ios * 100_000.0),
    });
    println!("{value}");
}

impl Measured {
    /// What [`tell`] printed.
    pub(crate) fn told(said: &Value, load: &Load) -> Result<Self> {
        let of = |name: &str| said[name].as_f64();
        let iops = of("iops").context("no figure")?;
        Ok(Self {
            iops,
            mib_s: iops * f64::from(load.bs) / f64::from(1 << 20),
            mean_us: of("mean_us").unwrap_or(0.0),
            p99_us: of("p99_us"),
            p999_us: of("p999_us"),
            cpu_s_per_100k: of("cpu_s_per_100k"),
        })
    }
}

/// The middle one; of an even number, the upper of the two.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Each figure's own median.
pub(crate) fn medians(runs: &[Measured]) -> Measured {
    let of = |pick: fn(&Measured) -> f64| median(&mut runs.iter().map(pick).collect::<Vec<_>>());
    let some = |pick: fn(&Measured) -> Option<f64>| {
        let mut told: Vec<f64> = runs.iter().filter_map(pick).collect();
        (!told.is_empty()).then(|| median(&mut told))
    };
    Measured {
        iops: of(|m| m.iops),
        mib_s: of(|m| m.mib_s),
        mean_us: of(|m| m.mean_us),
        p99_us: some(|m| m.p99_us),
        p999_us: some(|m| m.p999_us),
        cpu_s_per_100k: some(|m| m.cpu_s_per_100k),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_go_through_all_of_it_in_order_or_not() {
        let client = |random| {
            let (bs, qd) = (4096, 1);
            Client { write: true, random, bs, qd, seconds: 1.0, spin_us: 0, durable: false }
        };
        let mut pattern = client(false).pattern(3 * 4096 + 1).unwrap();
        assert_eq!([0; 4].map(|_| pattern.next()), [0, 4096, 8192, 0]);
        let mut pattern = client(true).pattern(16 * 4096).unwrap();
        let seen: std::collections::BTreeSet<u64> = (0..200).map(|_| pattern.next()).collect();
        assert_eq!(seen.len(), 16);
        assert!(client(true).pattern(4095).is_err());
    }

    #[test]
    fn one_run_that_was_disturbed_does_not_count() {
        let run = |iops, cpu| Measured { iops, cpu_s_per_100k: cpu, ..Measured::default() };
        let all = [run(10.0, Some(3.0)), run(900.0, None), run(12.0, Some(1.0))];
        let middle = medians(&all);
        assert!((middle.iops - 12.0).abs() < 1e-9);
        assert_eq!(middle.cpu_s_per_100k, Some(3.0));
        assert_eq!(middle.p99_us, None);
    }
}
