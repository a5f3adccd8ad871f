//! A cable between two engines that can be unplugged, and made to hold what is sent.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(10);

#[derive(Debug)]
struct State {
    plugged: AtomicBool,
    holds: AtomicBool,
    peer: Mutex<SocketAddr>,
}

/// Connections to `address` lead to where it was made to.
#[derive(Debug)]
pub(crate) struct Cable {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

impl Cable {
    pub(crate) fn to(peer: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            plugged: AtomicBool::new(true),
            holds: AtomicBool::new(false),
            peer: Mutex::new(peer),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for near in listener.incoming() {
                let near = near.unwrap();
                if !shared.plugged.load(Ordering::Acquire) {
                    continue;
                }
                let peer = *shared.peer.lock().unwrap();
                let Ok(far) = TcpStream::connect(peer) else { continue };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let state = Arc::clone(&shared);
                    thread::spawn(move || carry(from, to, &state));
                }
            }
        });
        Self { address, state }
    }

    pub(crate) fn plug(&self, plugged: bool) {
        self.state.plugged.store(plugged, Ordering::Release);
    }

    /// What is sent arrives only once it is not held any more.
    pub(crate) fn hold(&self, holds: bool) {
        self.state.holds.store(holds, Ordering::Release);
        // What was read before has been sent by then.
        thread::sleep(2 * TICK);
    }

    /// Another process has taken the place of the one that it led to.
    pub(crate) fn lead_to(&self, peer: SocketAddr) {
        *self.state.peer.lock().unwrap() = peer;
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, state: &State) {
    let mut bytes = [0; 64 << 10];
    from.set_read_timeout(Some(TICK)).unwrap();
    to.set_nodelay(true).unwrap();
    let is = |flag: &AtomicBool| flag.load(Ordering::Acquire);
    while is(&state.plugged) {
        if is(&state.holds) {
            thread::sleep(TICK);
            continue;
        }
        match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(n) => {
                while is(&state.holds) && is(&state.plugged) {
                    thread::sleep(TICK);
                }
                if to.write_all(&bytes[..n]).is_err() {
                    break;
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    let _gone = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
