//! The driver against the kernel it runs on, with every feature and with none.

use std::net::SocketAddr;

use cairn_block::{Buf, ByteOffset, Memory};

use super::*;
use crate::device::IoMode;
use crate::seam::{DiskFault, EndReason, SocketFault, SocketId};

fn driver(allow: Features) -> UringDriver {
    UringDriver::new(&DriverConfig {
        arena_len: 8 << 20,
        spin_ns: 0,
        ring_entries: 64,
        recv_buffers: 8,
        recv_buffer_len: 4096,
        allow,
        ..DriverConfig::default()
    })
    .unwrap()
}

fn both(run: fn(UringDriver)) {
    run(driver(Features::all()));
    run(driver(Features::none()));
}

/// Polls until `pick` takes a completion; the others are kept in `rest`.
fn until<T>(
    d: &mut UringDriver,
    rest: &mut Vec<Completion>,
    mut pick: impl FnMut(&Completion) -> Option<T>,
) -> T {
    let deadline = d.now_ns() + 5_000_000_000;
    loop {
        if let Some(at) = rest.iter().position(|c| pick(c).is_some()) {
            let c = rest.remove(at);
            return pick(&c).unwrap();
        }
        assert!(d.now_ns() < deadline, "nothing came in 5 s; seen {rest:?}");
        d.poll(rest, Some(deadline));
    }
}

fn disk_done(d: &mut UringDriver, op: Op<'_>) -> Result<(), DiskFault> {
    d.submit(op, Token::new(7));
    until(d, &mut Vec::new(), |c| match c {
        Completion::Disk { token, result } if token.value() == 7 => Some(*result),
        _ => None,
    })
}

fn disk_round_trip(d: &mut UringDriver, device: DeviceId) {
    let w = d.memory().alloc(16384).unwrap();
    let r = d.memory().alloc(16384).unwrap();
    d.memory().bytes_mut(w.slice()).fill(0x5a);
    let offset = ByteOffset(8192);
    let write = |fua| Op::Write { device, offset, buf: w.slice(), fua };
    assert_eq!(disk_done(d, write(false)), Ok(()));
    assert_eq!(disk_done(d, write(true)), Ok(()));
    assert_eq!(disk_done(d, Op::Flush { device }), Ok(()));
    assert_eq!(disk_done(d, Op::Read { device, offset, buf: r.slice() }), Ok(()));
    assert!(d.memory().bytes(r.slice()).iter().all(|&b| b == 0x5a));
    for punch in [true, false] {
        assert_eq!(disk_done(d, Op::Zero { device, offset, len: 4096, punch }), Ok(()));
    }
    assert_eq!(disk_done(d, Op::Read { device, offset, buf: r.slice() }), Ok(()));
    let head = r.slice().sub(0, 4096);
    assert!(d.memory().bytes(head).iter().all(|&b| b == 0));
    assert!(d.memory().bytes(r.slice().from(4096)).iter().all(|&b| b == 0x5a));
    let past = ByteOffset((1 << 20) - 4096);
    assert_eq!(
        disk_done(d, Op::Read { device, offset: past, buf: r.slice() }),
        Err(DiskFault::Short)
    );
    d.memory().release(w);
    d.memory().release(r);
}

#[test]
fn a_file_takes_every_disk_operation() {
    both(|mut d| {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
        let path = dir.join(format!("reactor-uring-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        BlockFile::create(&path, 1 << 20).unwrap();
        let file = BlockFile::open(&path, IoMode::Direct).unwrap();
        let device = d.attach_device(Attach::File(file)).unwrap();
        disk_round_trip(&mut d, device);
        // Kept as it was received, before the device was there.
        let buf = fill(&mut d, 12288);
        let odd = buf.slice().sub(72, 8192);
        let offset = ByteOffset(4096);
        for fua in [false, true] {
            assert_eq!(disk_done(&mut d, Op::Write { device, offset, buf: odd, fua }), Ok(()));
        }
        let back = d.memory().alloc(8192).unwrap();
        assert_eq!(disk_done(&mut d, Op::Read { device, offset, buf: back.slice() }), Ok(()));
        let want = d.memory().bytes(odd).to_vec();
        assert!(d.memory().bytes(back.slice()) == want);
        d.memory().release(buf);
        d.memory().release(back);
        assert!(d.detach_device(device).is_some());
        std::fs::remove_file(path).unwrap();
    });
}

#[test]
fn memory_takes_every_disk_operation() {
    both(|mut d| {
        let region = MemRegion::new(1 << 20).unwrap();
        let device = d.attach_device(Attach::Memory(region)).unwrap();
        disk_round_trip(&mut d, device);
        assert!(d.detach_device(device).is_some());
        assert!(disk_done(&mut d, Op::Flush { device }).is_err());
    });
}

fn pair(d: &mut UringDriver, rest: &mut Vec<Completion>) -> (SocketId, SocketId) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = d.attach_listener(listener).unwrap();
    let peer = d.local_addr(listener).unwrap();
    d.submit(Op::Accept { listener }, Token::new(1));
    d.submit(Op::Connect { peer, timeout_ms: 5000 }, Token::new(2));
    let client = until(d, rest, |c| match c {
        Completion::Connected { result, .. } => Some(result.unwrap()),
        _ => None,
    });
    let server = until(d, rest, |c| match c {
        Completion::Accepted { result, .. } => Some(result.unwrap()),
        _ => None,
    });
    (client, server)
}

fn fill(d: &mut UringDriver, len: u32) -> Buf {
    let buf = d.memory().alloc(len).unwrap();
    for (i, b) in d.memory().bytes_mut(buf.slice()).iter_mut().enumerate() {
        *b = u8::try_from(i % 253).unwrap();
    }
    buf
}

fn next_chunk(d: &mut UringDriver, rest: &mut Vec<Completion>) -> Chunk {
    let received = |c: &Completion| matches!(c, Completion::Received { .. });
    let deadline = d.now_ns() + 5_000_000_000;
    loop {
        if let Some(at) = rest.iter().position(received)
            && let Completion::Received { chunk, .. } = rest.remove(at)
        {
            return chunk;
        }
        assert!(d.now_ns() < deadline, "nothing arrives; seen {rest:?}");
        d.poll(rest, Some(deadline));
    }
}

/// Nothing is received over what is kept, half of the buffers are left to receive into, and what is kept comes back.
#[test]
fn what_was_received_can_be_kept() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, server) = pair(&mut d, &mut rest);
        d.submit(Op::Receive { socket: server }, Token::new(3));
        let body = fill(&mut d, 4096);
        let mut kept = Vec::new();
        for round in 0..20u8 {
            d.memory().bytes_mut(body.slice()).fill(round);
            d.submit(Op::Send { socket: client, windows: &[body.slice()] }, Token::new(4));
            until(&mut d, &mut rest, |c| matches!(c, Completion::Sent { .. }).then_some(()));
            let mut left = 4096;
            while left > 0 {
                let chunk = next_chunk(&mut d, &mut rest);
                left -= chunk.slice.len();
                if let Some(part) = d.memory().keep(chunk.slice) {
                    kept.push((round, part));
                }
                d.release_chunk(chunk);
            }
        }
        assert_eq!(kept.len(), 4);
        for (round, part) in &kept {
            assert!(d.memory().bytes(part.slice()).iter().all(|b| b == round), "{round}");
        }
        let before = kept.len();
        kept.drain(..).for_each(|(_, part)| d.memory().release(part));
        // As many as before can be kept again.
        for _ in 0..before {
            d.submit(Op::Send { socket: client, windows: &[body.slice()] }, Token::new(4));
            let chunk = next_chunk(&mut d, &mut rest);
            kept.push((0, d.memory().keep(chunk.slice).expect("those were given back")));
            d.release_chunk(chunk);
            until(&mut d, &mut rest, |c| matches!(c, Completion::Sent { .. }).then_some(()));
        }
        kept.drain(..).for_each(|(_, part)| d.memory().release(part));
        d.memory().release(body);
    });
}

/// Hosts that waited for memory held every receive buffer, and so the links to replicas, whose answers would have freed
/// it, were given up as silent.
#[test]
fn accepted_connections_leave_buffers_for_those_that_were_made() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, server) = pair(&mut d, &mut rest);
        d.submit(Op::Receive { socket: server }, Token::new(3));
        d.submit(Op::Receive { socket: client }, Token::new(5));
        let body = fill(&mut d, 256 << 10);
        d.submit(Op::Send { socket: client, windows: &[body.slice()] }, Token::new(4));
        let held: Vec<_> = (0..8).map(|_| next_chunk(&mut d, &mut rest)).collect();
        let soon = d.now_ns() + 20_000_000;
        while d.now_ns() < soon {
            d.poll(&mut rest, Some(soon));
        }
        let received = |c: &Completion| matches!(c, Completion::Received { .. });
        assert!(!rest.iter().any(received), "there are no more for accepted ones");
        let word = body.slice().sub(0, 8);
        for _ in 0..20 {
            d.submit(Op::Send { socket: server, windows: &[word] }, Token::new(6));
            let chunk = next_chunk(&mut d, &mut rest);
            assert_eq!(chunk.slice.len(), 8);
            d.release_chunk(chunk);
            until(&mut d, &mut rest, |c| match c {
                Completion::Sent { token, .. } if token.value() == 6 => Some(()),
                _ => None,
            });
        }
        held.into_iter().for_each(|chunk| d.release_chunk(chunk));
        assert!(next_chunk(&mut d, &mut rest).slice.len() > 8, "it goes on");
    });
}

#[test]
fn bytes_arrive_whole_and_in_order_even_when_buffers_run_out() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, server) = pair(&mut d, &mut rest);
        d.submit(Op::Receive { socket: server }, Token::new(3));
        let head = fill(&mut d, 72);
        let body = fill(&mut d, 512 << 10);
        let windows = [head.slice(), body.slice(), head.slice().sub(8, 1)];
        let total = 72 + (512 << 10) + 1;
        d.submit(Op::Send { socket: client, windows: &windows }, Token::new(4));
        let mut got = Vec::new();
        let mut held = Vec::new();
        let mut sent = false;
        while got.len() < total || !sent {
            d.poll(&mut rest, Some(d.now_ns() + 5_000_000_000));
            for c in rest.drain(..) {
                match c {
                    Completion::Received { chunk, token } => {
                        assert_eq!(token.value(), 3);
                        got.extend_from_slice(d.memory().bytes(chunk.slice));
                        held.push(chunk);
                    }
                    Completion::Sent { result, .. } => {
                        result.unwrap();
                        sent = true;
                    }
                    other => panic!("{other:?}"),
                }
            }
            // Every buffer is held until the ring is dry, then all come back at once.
            if held.len() == 8 || got.len() == total {
                held.drain(..).for_each(|chunk| d.release_chunk(chunk));
            }
        }
        let mut want = d.memory().bytes(head.slice()).to_vec();
        want.extend_from_slice(d.memory().bytes(body.slice()));
        want.push(8);
        assert!(got == want);
        d.memory().release(head);
        d.memory().release(body);
    });
}

/// As many as have to share the buffers: with the last one first, those in the middle never had one.
#[test]
fn sockets_that_want_more_buffers_than_there_are_take_turns() {
    const SOCKETS: usize = 40;
    both(|mut d| {
        let mut rest = Vec::new();
        let word = fill(&mut d, 8);
        let pairs: Vec<_> = (0..SOCKETS).map(|_| pair(&mut d, &mut rest)).collect();
        let send = |d: &mut UringDriver, at: usize| {
            let op = Op::Send { socket: pairs[at].0, windows: &[word.slice()] };
            d.submit(op, Token::new(1000 + at as u64));
        };
        for (at, (_, server)) in pairs.iter().enumerate() {
            send(&mut d, at);
            d.submit(Op::Receive { socket: *server }, Token::new(at as u64));
        }
        let mut got = [0; SOCKETS];
        let mut held = Vec::new();
        while got.iter().sum::<usize>() < SOCKETS * 50 {
            let deadline = d.now_ns() + 5_000_000_000;
            d.poll(&mut rest, Some(deadline));
            assert!(d.now_ns() < deadline, "somebody is left out: {got:?}");
            for c in rest.drain(..) {
                match c {
                    // Each asks for one thing at a time, and the next one at once.
                    Completion::Received { token, chunk } => {
                        let at = usize::try_from(token.value()).unwrap();
                        got[at] += 1;
                        send(&mut d, at);
                        held.push(chunk);
                    }
                    Completion::Sent { result, .. } => result.unwrap(),
                    other => panic!("{other:?}"),
                }
            }
            held.drain(..).for_each(|chunk| d.release_chunk(chunk));
        }
        let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
        assert!(2 * least >= *most, "not in turns: {got:?}");
        d.memory().release(word);
    });
}

#[test]
fn a_receive_pauses_resumes_and_ends_with_the_peer() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, server) = pair(&mut d, &mut rest);
        d.submit(Op::Receive { socket: server }, Token::new(3));
        d.submit(Op::PauseReceive { socket: server }, Token::new(3));
        let ended = |c: &Completion| match c {
            Completion::ReceiveEnded { reason, .. } => Some(*reason),
            _ => None,
        };
        assert_eq!(until(&mut d, &mut rest, ended), EndReason::Paused);
        d.submit(Op::Receive { socket: server }, Token::new(5));
        d.submit(Op::Close { socket: client }, Token::new(6));
        assert_eq!(until(&mut d, &mut rest, ended), EndReason::Eof);
        until(&mut d, &mut rest, |c| matches!(c, Completion::Closed { .. }).then_some(()));
        // A socket that is gone is refused, not mistaken for the next one in its slot.
        d.submit(Op::Send { socket: client, windows: &[] }, Token::new(8));
        let refused = until(&mut d, &mut rest, |c| match c {
            Completion::Sent { result, .. } => Some(*result),
            _ => None,
        });
        assert_eq!(refused, Err(SocketFault::Errno(libc::ENOTCONN)));
    });
}

#[test]
fn a_quiet_socket_moves_to_another_driver_with_what_has_arrived() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, server) = pair(&mut d, &mut rest);
        let ended = |c: &Completion| match c {
            Completion::ReceiveEnded { reason, .. } => Some(*reason),
            _ => None,
        };
        d.submit(Op::Receive { socket: server }, Token::new(3));
        assert!(d.detach_socket(server).is_none(), "it is received from");
        d.submit(Op::PauseReceive { socket: server }, Token::new(3));
        assert!(d.detach_socket(server).is_none(), "the end of that was not told yet");
        assert_eq!(until(&mut d, &mut rest, ended), EndReason::Paused);
        // Arrives while nobody receives.
        let body = fill(&mut d, 4096);
        d.submit(Op::Send { socket: client, windows: &[body.slice()] }, Token::new(4));
        until(&mut d, &mut rest, |c| matches!(c, Completion::Sent { .. }).then_some(()));
        let stream = d.detach_socket(server).expect("it is quiet");
        assert!(d.detach_socket(server).is_none(), "it is gone");
        // The slot is another's at once.
        let (next, _) = pair(&mut d, &mut rest);
        assert_ne!(next, server);
        let want = d.memory().bytes(body.slice()).to_vec();

        let mut other = driver(Features::all());
        let socket = other.attach_socket(stream).unwrap();
        other.submit(Op::Receive { socket }, Token::new(5));
        let mut got = Vec::new();
        while got.len() < want.len() {
            let chunk = next_chunk(&mut other, &mut rest);
            got.extend_from_slice(other.memory().bytes(chunk.slice));
            other.release_chunk(chunk);
        }
        assert!(got == want);
        // And back the other way, from its new place.
        let answer = fill(&mut other, 512);
        other.submit(Op::Send { socket, windows: &[answer.slice()] }, Token::new(6));
        until(&mut other, &mut rest, |c| matches!(c, Completion::Sent { .. }).then_some(()));
        d.submit(Op::Receive { socket: client }, Token::new(7));
        until(&mut d, &mut rest, |c| match c {
            Completion::Received { chunk, token } if token.value() == 7 => Some(chunk.slice.len()),
            _ => None,
        });
        d.memory().release(body);
        other.memory().release(answer);
    });
}

#[test]
fn a_socket_that_finds_no_slot_is_closed() {
    let small = DriverConfig { arena_len: 8 << 20, max_sockets: 1, ..DriverConfig::default() };
    let mut d = UringDriver::new(&small).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    };
    let (_near, first) = connect();
    d.attach_socket(first).unwrap();
    let (mut near, second) = connect();
    assert_eq!(d.attach_socket(second), Err(SocketFault::NoSlot));
    assert_eq!(std::io::Read::read(&mut near, &mut [0; 1]).unwrap(), 0, "the peer hears of it");
}

#[test]
fn a_close_answers_the_send_in_flight_first() {
    both(|mut d| {
        let mut rest = Vec::new();
        let (client, _server) = pair(&mut d, &mut rest);
        // Nobody reads: the send fills the socket's buffers and stays.
        let body = fill(&mut d, 1 << 20);
        let windows = [body.slice(); 16];
        d.submit(Op::Send { socket: client, windows: &windows }, Token::new(4));
        d.poll(&mut rest, Some(0));
        d.submit(Op::Close { socket: client }, Token::new(6));
        until(&mut d, &mut rest, |c| match c {
            Completion::Sent { result, .. } => {
                assert!(result.is_err());
                Some(())
            }
            Completion::Closed { .. } => panic!("closed while a send was in flight"),
            _ => None,
        });
        until(&mut d, &mut rest, |c| matches!(c, Completion::Closed { .. }).then_some(()));
        d.memory().release(body);
    });
}

#[test]
fn a_connect_that_is_refused_says_so() {
    both(|mut d| {
        let spare = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer: SocketAddr = spare.local_addr().unwrap();
        drop(spare);
        d.submit(Op::Connect { peer, timeout_ms: 1000 }, Token::new(2));
        let fault = until(&mut d, &mut Vec::new(), |c| match c {
            Completion::Connected { result, .. } => Some(result.unwrap_err()),
            _ => None,
        });
        assert_eq!(fault, SocketFault::Errno(libc::ECONNREFUSED));
    });
}

#[test]
fn another_thread_wakes_it_and_a_deadline_ends_the_wait() {
    both(|mut d| {
        let waker = d.waker();
        let thread = std::thread::spawn(move || waker.wake());
        until(&mut d, &mut Vec::new(), |c| matches!(c, Completion::Woken).then_some(()));
        thread.join().unwrap();
        let mut out = Vec::new();
        let at = d.now_ns() + 20_000_000;
        while d.now_ns() < at {
            d.poll(&mut out, Some(at));
        }
        assert!(out.is_empty(), "{out:?}");
    });
}
