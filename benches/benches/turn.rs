//! Whole shards and a host on a driver in memory: what a request costs in time, and how often it allocates.
//!
//! The driver copies what a kernel would have copied. Allocations are printed before each figure.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use cairn_benches::cluster::{Cluster, Shape};
use cairn_block::IoOp;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// Requests that allocations are counted over.
const COUNTED: u64 = 5_000;

fn turns(c: &mut Criterion) {
    let write = IoOp::Write { fua: false };
    for (name, depth, blocks) in [("4K QD32", 32, 1), ("4K QD1", 1, 1), ("128K QD16", 16, 32)] {
        for shape in Shape::ALL {
            let mut cluster = Cluster::new(shape, depth, blocks);
            let mut group = c.benchmark_group(format!("{}, {name}", shape.title()));
            group.throughput(Throughput::Elements(1));
            for (what, op) in [("read", IoOp::Read), ("write", write)] {
                cluster.run(op, COUNTED);
                let counted = allocation_counter::measure(|| cluster.run(op, COUNTED));
                println!("{} heap allocations in {COUNTED} {what}s", counted.count_total);
                group.bench_function(what, |b| {
                    b.iter_custom(|count| {
                        let begun = std::time::Instant::now();
                        cluster.run(op, count);
                        begun.elapsed()
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, turns);
criterion_main!(benches);
