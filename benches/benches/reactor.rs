//! The project's driver against tokio-uring: the same file work and the same echo work.
//!
//! Both sides use one thread, one file and one connection, 4 KiB a request and 32 in flight on the
//! file, one in flight on the connection. What is compared is what a request costs on the way to
//! the kernel and back.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::fs::OpenOptions;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cairn_block::{Buf, ByteOffset, Memory};
use cairn_reactor::{
    Attach, BlockFile, Completion, DeviceId, Driver, DriverConfig, IoMode, Op, SocketId, Token,
    UringDriver,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio_uring::buf::BoundedBuf as _;

const BLOCK: usize = 4096;
const DEPTH: u64 = 32;
const FILE: u64 = 64 << 20;

fn scratch() -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target");
    let path = dir.join(format!("bench-reactor-{}", std::process::id()));
    // A leftover of an earlier run is replaced.
    let _removed = std::fs::remove_file(&path);
    BlockFile::create(&path, FILE).expect("a file in the target folder");
    let file = BlockFile::open(&path, IoMode::Direct).expect("a file system with O_DIRECT");
    let data = vec![1; 1 << 20];
    (0..FILE >> 20).for_each(|i| file.write_at(i << 20, &data).expect("room for 64 MiB"));
    path
}

fn position(i: u64) -> u64 {
    (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % (FILE / BLOCK as u64) * BLOCK as u64
}

fn driver() -> UringDriver {
    UringDriver::new(&DriverConfig { arena_len: 8 << 20, spin_ns: 0, ..DriverConfig::default() })
        .expect("io_uring")
}

/// `count` requests on the file, `DEPTH` in flight.
fn ours_on_file(d: &mut UringDriver, device: DeviceId, bufs: &[Buf], count: u64, write: bool) {
    let mut out = Vec::with_capacity(64);
    let (mut sent, mut done) = (0, 0);
    let submit = |d: &mut UringDriver, i: u64, slot: usize| {
        let (offset, buf) = (ByteOffset(position(i)), bufs[slot].slice());
        let op = if write {
            Op::Write { device, offset, buf, fua: false }
        } else {
            Op::Read { device, offset, buf }
        };
        d.submit(op, Token::new(slot as u64));
    };
    for slot in 0..bufs.len().min(usize::try_from(count).unwrap_or(usize::MAX)) {
        submit(d, sent, slot);
        sent += 1;
    }
    while done < count {
        d.poll(&mut out, None);
        for completion in out.drain(..) {
            let Completion::Disk { token, result } = completion else { continue };
            result.expect("the file takes it");
            done += 1;
            if sent < count {
                submit(d, sent, usize::try_from(token.value()).expect("a slot"));
                sent += 1;
            }
        }
    }
}

fn theirs_on_file(path: &PathBuf, count: u64, write: bool) -> Duration {
    tokio_uring::start(async {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_DIRECT)
            .open(path)
            .expect("the file is there");
        let file = std::rc::Rc::new(tokio_uring::fs::File::from_std(file));
        let next = std::rc::Rc::new(std::cell::Cell::new(0));
        let begun = Instant::now();
        let mut tasks = Vec::new();
        for _ in 0..DEPTH {
            let (file, next) = (std::rc::Rc::clone(&file), std::rc::Rc::clone(&next));
            tasks.push(tokio_uring::spawn(async move {
                let room = vec![1_u8; 2 * BLOCK];
                let start = room.as_ptr().align_offset(BLOCK);
                let mut buf = room.slice(start..start + BLOCK);
                while next.get() < count {
                    let i = next.get();
                    next.set(i + 1);
                    buf = if write {
                        let (result, buf) = file.write_at(buf, position(i)).submit().await;
                        assert_eq!(result.expect("the file takes it"), BLOCK);
                        buf
                    } else {
                        let (result, buf) = file.read_at(buf, position(i)).await;
                        assert_eq!(result.expect("the file gives it"), BLOCK);
                        buf
                    };
                }
            }));
        }
        for task in tasks {
            task.await.expect("a task ends");
        }
        begun.elapsed()
    })
}

fn file_work(c: &mut Criterion) {
    let path = scratch();
    for (name, write) in [("4k random read", false), ("4k random write", true)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(1));
        let mut d = driver();
        let file = BlockFile::open(&path, IoMode::Direct).expect("the file is there");
        let device = d.attach_device(Attach::File(file)).expect("a device");
        let mut bufs = Vec::new();
        for _ in 0..DEPTH {
            bufs.push(d.memory().alloc(4096).expect("room in the arena"));
        }
        group.bench_function("cairn-reactor", |b| {
            b.iter_custom(|n| {
                let begun = Instant::now();
                ours_on_file(&mut d, device, &bufs, n, write);
                begun.elapsed()
            });
        });
        group.bench_function("tokio-uring", |b| {
            b.iter_custom(|n| theirs_on_file(&path, n, write));
        });
        group.finish();
    }
    // The target folder is cleaned by cargo otherwise.
    let _removed = std::fs::remove_file(path);
}

/// Answers every 4 KiB with the same bytes, on a thread of its own, without io_uring.
fn echo_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let _set = stream.set_nodelay(true);
                let mut block = [0; BLOCK];
                while stream.read_exact(&mut block).is_ok() && stream.write_all(&block).is_ok() {}
            });
        }
    });
    address
}

fn ours_connected(d: &mut UringDriver, address: std::net::SocketAddr) -> SocketId {
    d.submit(Op::Connect { peer: address, timeout_ms: 1_000 }, Token::new(1));
    let mut out = Vec::new();
    loop {
        d.poll(&mut out, None);
        for completion in out.drain(..) {
            if let Completion::Connected { result, .. } = completion {
                let socket = result.expect("the server is there");
                d.submit(Op::Receive { socket }, Token::new(2));
                return socket;
            }
        }
    }
}

fn ours_echo(d: &mut UringDriver, socket: SocketId, buf: &Buf, count: u64) {
    let mut out = Vec::with_capacity(16);
    for _ in 0..count {
        d.submit(Op::Send { socket, windows: &[buf.slice()] }, Token::new(3));
        let mut got = 0;
        let mut sent = false;
        while got < BLOCK || !sent {
            d.poll(&mut out, None);
            for completion in out.drain(..) {
                match completion {
                    Completion::Received { chunk, .. } => {
                        got += chunk.slice.len() as usize;
                        d.release_chunk(chunk);
                    }
                    Completion::Sent { result, .. } => {
                        result.expect("the server reads");
                        sent = true;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

fn theirs_echo(address: std::net::SocketAddr, count: u64) -> Duration {
    tokio_uring::start(async move {
        let stream = tokio_uring::net::TcpStream::connect(address).await.expect("the server");
        stream.set_nodelay(true).expect("a TCP socket");
        let mut out = vec![7_u8; BLOCK];
        let mut back = vec![0_u8; BLOCK];
        let begun = Instant::now();
        for _ in 0..count {
            let (result, buf) = stream.write_all(out).await;
            result.expect("the server reads");
            out = buf;
            let mut got = 0;
            while got < BLOCK {
                let (result, buf) = stream.read(back).await;
                got += result.expect("the server answers");
                back = buf;
            }
        }
        begun.elapsed()
    })
}

fn echo_work(c: &mut Criterion) {
    let address = echo_server();
    let mut group = c.benchmark_group("4k echo over loopback");
    group.throughput(Throughput::Elements(1));
    let mut d = driver();
    let socket = ours_connected(&mut d, address);
    let buf = d.memory().alloc(4096).expect("room in the arena");
    group.bench_function("cairn-reactor", |b| {
        b.iter_custom(|n| {
            let begun = Instant::now();
            ours_echo(&mut d, socket, &buf, n);
            begun.elapsed()
        });
    });
    group.bench_function("tokio-uring", |b| b.iter_custom(|n| theirs_echo(address, n)));
    group.finish();
}

criterion_group!(benches, file_work, echo_work);
criterion_main!(benches);
