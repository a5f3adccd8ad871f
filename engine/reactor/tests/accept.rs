//! Accepting when the process has no descriptor left. Alone in its file: it changes a limit of the
//! whole process.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use cairn_reactor::{Completion, Driver as _, DriverConfig, Op, SocketFault, Token, UringDriver};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More connections came than the process may have descriptors. Accepting failed and was tried
/// again at once, for ever: a full core, and a log line each time (half a million a second).
#[test]
fn accepting_rests_while_there_is_no_descriptor() {
    let mut driver = UringDriver::new(&DriverConfig::default()).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let listener = driver.attach_listener(socket).unwrap();
    let client = TcpStream::connect(address).unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next_free = client.try_clone().unwrap().as_raw_fd();
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next_free).unwrap(), hard).unwrap();

    driver.submit(Op::Accept { listener }, Token::new(1));
    let mut seen = Vec::new();
    let until = Instant::now() + Duration::from_millis(700);
    while Instant::now() < until {
        let deadline = driver.now_ns() + 50_000_000;
        driver.poll(&mut seen, Some(deadline));
    }
    let refused = |c: &Completion| {
        let fault = SocketFault::Errno(nix::errno::Errno::EMFILE as i32);
        matches!(c, Completion::Accepted { result: Err(f), .. } if *f == fault)
    };
    assert!(!seen.is_empty() && seen.iter().all(refused), "{seen:?}");
    assert!(seen.len() < 8, "{} tries in 0.7 s", seen.len());

    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    seen.clear();
    let until = Instant::now() + Duration::from_secs(10);
    while !seen.iter().any(|c| matches!(c, Completion::Accepted { result: Ok(_), .. })) {
        assert!(Instant::now() < until, "{seen:?}");
        let deadline = driver.now_ns() + 50_000_000;
        driver.poll(&mut seen, Some(deadline));
    }
}
