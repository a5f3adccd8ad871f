//! The threads that run the shards of a process.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;

use cairn_reactor::{Attach, Driver, DriverConfig, DriverError, Features, UringDriver, Waker};
use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use crate::process::EngineHandle;
use crate::shard::{Message, Shard, ShardConfig};

/// A command for a shard on io_uring.
pub type Command = crate::control::Command<TcpListener, Attach>;

/// The most shards that a process may have.
pub const MAX_SHARDS: u16 = 64;

/// What reaches a shard from other threads.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "few are on their way at once")]
pub(crate) enum Input {
    /// Of the control side.
    Command(Command),
    /// Of another shard.
    Message(Message<TcpStream>),
}

/// The way to a running shard.
#[derive(Debug, Clone)]
pub(crate) struct ShardHandle {
    inputs: Sender<Input>,
    waker: Waker,
}

impl ShardHandle {
    /// Hands something over. Where the shard has stopped it is dropped: a command's reply goes unanswered, a
    /// connection is closed.
    pub(crate) fn send(&self, input: Input) {
        if self.inputs.send(input).is_ok() {
            self.waker.wake();
        }
    }
}

/// Starts a process with one shard, on a thread of its own.
///
/// # Errors
/// [`DriverError`] where io_uring cannot be set up; it says what is missing.
pub fn start(
    driver: &DriverConfig,
    config: &ShardConfig,
) -> Result<(EngineHandle, JoinHandle<()>), DriverError> {
    start_shards(driver, config, 1)
}

/// Starts a process with so many shards, each on a thread and with a driver of its own. The thread that is told of ends
/// when all have ended, or one has panicked; then it has, too.
///
/// # Errors
/// As [`start`].
///
/// # Panics
/// Where there are to be none, or more than [`MAX_SHARDS`].
pub fn start_shards(
    driver: &DriverConfig,
    config: &ShardConfig,
    shards: u16,
) -> Result<(EngineHandle, JoinHandle<()>), DriverError> {
    assert!((1..=MAX_SHARDS).contains(&shards), "a process with {shards} shards");
    let (ended, ends) = unbounded();
    let mut threads = Vec::new();
    let mut handles = Vec::new();
    let mut starters = Vec::new();
    let mut features = Features::all();
    for shard in 0..shards {
        let config = ShardConfig { shard, shards, ..config.clone() };
        let (starter, peers) = bounded(1);
        let (handle, of, thread) = spawn(driver.clone(), config, peers, ended.clone())?;
        if shard == 0 {
            features = of;
        }
        threads.push(thread);
        handles.push(handle);
        starters.push(starter);
    }
    for starter in starters {
        // One that has ended already is seen below.
        let _started = starter.send(handles.clone());
    }
    let handle = EngineHandle::new(handles, features);
    if threads.len() == 1
        && let Some(thread) = threads.pop()
    {
        return Ok((handle, thread));
    }
    let thread = std::thread::Builder::new()
        .name("cairn-shards".to_owned())
        .spawn(move || join_all(threads, &ends))
        .map_err(|source| DriverError::Setup { what: "the shards' thread", source })?;
    Ok((handle, thread))
}

/// Tells that a shard's thread has ended, however it does.
struct Ended(Sender<u16>, u16);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody asks where the others could not be started.
        let _told = self.0.send(self.1);
    }
}

fn join_all(threads: Vec<JoinHandle<()>>, ends: &Receiver<u16>) {
    let mut threads: Vec<_> = threads.into_iter().map(Some).collect();
    while threads.iter().any(Option::is_some) {
        let Ok(shard) = ends.recv() else { return };
        let thread = threads[usize::from(shard)].take();
        // A process without one of its shards serves only some of what it should.
        if let Some(Err(panic)) = thread.map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

type Spawned = (ShardHandle, Features, JoinHandle<()>);

/// Starts the thread of one shard, which waits for the others.
fn spawn(
    driver: DriverConfig,
    config: ShardConfig,
    peers: Receiver<Vec<ShardHandle>>,
    ended: Sender<u16>,
) -> Result<Spawned, DriverError> {
    let shard = config.shard;
    let (inputs, inbox) = unbounded();
    let (ready, started) = bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("cairn-shard-{shard}"))
        .spawn(move || {
            let _ended = Ended(ended, shard);
            match UringDriver::new(&driver) {
                Ok(driver) => {
                    let told = ready.send(Ok((driver.waker(), driver.features())));
                    let peers = peers.recv();
                    if let (Ok(()), Ok(peers)) = (told, peers) {
                        run(Shard::new(dressed(driver), config), &inbox, &peers);
                    }
                }
                Err(error) => {
                    // The starter waits for this; where it is gone there is nobody to tell.
                    let _told = ready.send(Err(error));
                }
            }
        })
        .map_err(|source| DriverError::Setup { what: "a shard's thread", source })?;
    let gone = || DriverError::Setup {
        what: "a shard's thread",
        source: io::Error::other("it ended before it was ready"),
    };
    let (waker, features) = started.recv().map_err(|_| gone())??;
    Ok((ShardHandle { inputs, waker }, features, thread))
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

fn run<D: Driver<Device = Attach, Listener = TcpListener, Socket = TcpStream>>(
    mut shard: Shard<D>,
    inbox: &Receiver<Input>,
    peers: &[ShardHandle],
) {
    while !shard.is_stopped() {
        let woken = shard.turn();
        deliver(&mut shard, peers);
        if !woken {
            continue;
        }
        while let Ok(input) = inbox.try_recv() {
            match input {
                Input::Command(command) => shard.command(command),
                Input::Message(message) => shard.handle_message(message),
            }
            deliver(&mut shard, peers);
        }
    }
}

/// Tells the other shards what they are to be told, before anybody can have heard of it from elsewhere.
fn deliver<D: Driver<Socket = TcpStream>>(shard: &mut Shard<D>, peers: &[ShardHandle]) {
    if peers.len() == 1 {
        return;
    }
    while let Some((to, message)) = shard.poll_message() {
        peers[usize::from(to)].send(Input::Message(message));
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
