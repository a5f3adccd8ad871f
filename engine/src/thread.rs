//! The thread that runs a shard, and the handle by which other threads talk to it.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::thread::JoinHandle;

use cairn_reactor::{Attach, Driver, DriverConfig, DriverError, Features, UringDriver, Waker};
use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::control::{EngineError, Reply};
use crate::shard::{Shard, ShardConfig};

/// A command for a shard on io_uring.
pub type Command = crate::control::Command<TcpListener, Attach>;

/// Talks to a running shard. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    waker: Waker,
    features: Features,
}

impl EngineHandle {
    /// Hands a command over. Where the shard has stopped, its reply is dropped unanswered.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }

    /// Hands over the command that `make` builds around a reply, and waits for the answer.
    ///
    /// # Errors
    /// The command's own; [`EngineError::Stopped`] where the shard is gone.
    pub fn call<T: Send + 'static>(
        &self,
        make: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, EngineError> {
        let (tx, rx) = crossbeam::channel::bounded(1);
        self.send(make(Reply::new(move |result| {
            // The caller may have given up.
            let _delivered = tx.send(result);
        })));
        rx.recv().unwrap_or(Err(EngineError::Stopped))
    }

    /// What the shard uses of the kernel.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }
}

/// Starts a shard on a thread of its own.
///
/// # Errors
/// [`DriverError`] where io_uring cannot be set up; it says what is missing.
pub fn start(
    driver: DriverConfig,
    config: ShardConfig,
) -> Result<(EngineHandle, JoinHandle<()>), DriverError> {
    let (commands, inbox) = unbounded();
    let (ready, started) = crossbeam::channel::bounded(1);
    let thread = std::thread::Builder::new()
        .name("cairn-shard-0".to_owned())
        .spawn(move || match UringDriver::new(&driver) {
            Ok(driver) => {
                let told = ready.send(Ok((driver.waker(), driver.features())));
                if told.is_ok() {
                    run(Shard::new(dressed(driver), config), &inbox);
                }
            }
            Err(error) => {
                // The starter waits for this; where it is gone there is nobody to tell.
                let _told = ready.send(Err(error));
            }
        })
        .map_err(|source| DriverError::Setup { what: "the shard's thread", source })?;
    let gone = || DriverError::Setup {
        what: "the shard's thread",
        source: io::Error::other("it ended before it was ready"),
    };
    let (waker, features) = started.recv().map_err(|_| gone())??;
    Ok((EngineHandle { commands, waker, features }, thread))
}

#[cfg(not(feature = "nemesis"))]
fn dressed(driver: UringDriver) -> UringDriver {
    driver
}

/// With the disks, the clock and the bugs that the nemesis asks for.
#[cfg(feature = "nemesis")]
fn dressed(driver: UringDriver) -> crate::nemesis::FaultyDriver {
    crate::nemesis::choose_mutant();
    crate::nemesis::FaultyDriver::new(driver)
}

fn run<D: Driver<Device = Attach, Listener = TcpListener>>(
    mut shard: Shard<D>,
    inbox: &Receiver<Command>,
) {
    while !shard.is_stopped() {
        if shard.turn() {
            while let Ok(command) = inbox.try_recv() {
                shard.command(command);
            }
        }
    }
}

/// A listening socket, and the address that it got.
///
/// # Errors
/// Where the address is taken or not this machine's.
pub fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}
