//! What encryption costs: the blocks of a request, in place.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use cairn_block::{BlockSize, Lba};
use cairn_crypt::VolumeKey;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn blocks(c: &mut Criterion) {
    let mut bytes = [0; cairn_crypt::DATA_KEY_LEN];
    for (i, byte) in (0u8..).zip(&mut bytes) {
        *byte = i;
    }
    let key = VolumeKey::new(bytes).expect("the halves differ");
    for len in [4 << 10, 128 << 10] {
        let mut group = c.benchmark_group(format!("xts/{}KiB", len >> 10));
        group.throughput(Throughput::Bytes(len));
        let mut data = vec![0x5a; usize::try_from(len).expect("it is small")];
        group.bench_function("encrypt", |b| {
            b.iter(|| key.encrypt(Lba(7), BlockSize::B4096, black_box(&mut data)));
        });
        group.bench_function("decrypt", |b| {
            b.iter(|| key.decrypt(Lba(7), BlockSize::B4096, black_box(&mut data)));
        });
        group.finish();
    }
}

criterion_group!(benches, blocks);
criterion_main!(benches);
