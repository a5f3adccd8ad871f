//! PDU headers and digests.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use cairn_nvmf::pdu::{Body, Digests, Header, Transfer};
use cairn_nvmf::sqe::Sqe;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn headers(c: &mut Criterion) {
    let none = Digests::default();
    let both = Digests { header: true, data: true };
    let sqe = Sqe([0x5a; 64]);
    for (name, digests) in [("no digests", none), ("header digest", both)] {
        let command = Header::new(Body::CapsuleCmd(sqe), digests, 4096, 0);
        let bytes = command.encode();
        c.bench_function(&format!("CapsuleCmd decode, {name}"), |b| {
            b.iter(|| Header::decode(black_box(bytes.as_bytes())));
        });
        let transfer = Transfer { cccid: 7, ttag: 0, offset: 0, len: 4096 };
        c.bench_function(&format!("C2HData encode, {name}"), |b| {
            b.iter(|| {
                let header = Header::new(Body::C2hData(black_box(transfer)), digests, 4096, 0);
                black_box(header.encode());
            });
        });
    }
}

fn digests(c: &mut Criterion) {
    let mut group = c.benchmark_group("data digest");
    for len in [4096_usize, 131_072] {
        let data = vec![0xa5_u8; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} bytes"), |b| {
            b.iter(|| crc32c::crc32c(black_box(&data)));
        });
    }
    group.finish();
}

criterion_group!(benches, headers, digests);
criterion_main!(benches);
