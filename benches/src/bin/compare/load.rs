//! What is asked of every stack, and what came of it.

use std::time::Duration;

use anyhow::{Context, Result};
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
    fn one_run_that_was_disturbed_does_not_count() {
        let run = |iops, cpu| Measured { iops, cpu_s_per_100k: cpu, ..Measured::default() };
        let all = [run(10.0, Some(3.0)), run(900.0, None), run(12.0, Some(1.0))];
        let middle = medians(&all);
        assert!((middle.iops - 12.0).abs() < 1e-9);
        assert_eq!(middle.cpu_s_per_100k, Some(3.0));
        assert_eq!(middle.p99_us, None);
    }
}
