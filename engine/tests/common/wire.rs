//! What lies between two processes, and can be made to carry nothing for a while.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(2);

/// Connections to `address` lead to where it was made to.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    paused: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

impl Wire {
    pub(crate) fn to(peer: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (paused, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let flags = (paused.clone(), over.clone());
        thread::spawn(move || {
            while !flags.1.load(Ordering::Relaxed) {
                let Ok((here, _)) = listener.accept() else {
                    thread::sleep(TICK);
                    continue;
                };
                let there = TcpStream::connect(peer).unwrap();
                for (from, to) in [(&here, &there), (&there, &here)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let flags = flags.clone();
                    thread::spawn(move || carry(from, to, &flags));
                }
            }
        });
        Self { address, paused, over }
    }

    /// What is sent from now on does not arrive.
    pub(crate) fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
        thread::sleep(4 * TICK);
    }

    /// It arrives, with what was sent meanwhile.
    pub(crate) fn resume(&self) {
        self.paused.store(false, Ordering::Relaxed);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, flags: &(Arc<AtomicBool>, Arc<AtomicBool>)) {
    from.set_nonblocking(false).unwrap();
    from.set_read_timeout(Some(TICK)).unwrap();
    to.set_nodelay(true).unwrap();
    let mut bytes = vec![0; 64 << 10];
    while !flags.1.load(Ordering::Relaxed) {
        if flags.0.load(Ordering::Relaxed) {
            thread::sleep(TICK);
            continue;
        }
        let ended = match from.read(&mut bytes) {
            Ok(0) => true,
            Ok(n) => {
                // Read before the pause, sent after it.
                while flags.0.load(Ordering::Relaxed) && !flags.1.load(Ordering::Relaxed) {
                    thread::sleep(TICK);
                }
                to.write_all(&bytes[..n]).is_err()
            }
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        };
        if ended {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
