//! Devices and the operations in flight on them.

use std::io;

use cairn_block::{BufSlice, ByteOffset, Memory};
use io_uring::{opcode, squeue, types};

use super::{Attach, Core, Kind, Target, with_target};
use crate::arena::settle_stores;
use crate::device::{BlockFile, MemRegion};
use crate::seam::{Completion, DeviceId, DiskFault, Token};

/// The registered buffer that is the arena.
const ARENA: u16 = 0;

#[derive(Debug, Clone, Copy)]
pub(super) enum Request {
    Read { offset: ByteOffset, buf: BufSlice },
    Write { offset: ByteOffset, buf: BufSlice, fua: bool },
    Flush,
    Zero { offset: ByteOffset, len: u64, punch: bool },
}

#[derive(Debug)]
enum Device {
    File { target: Target, file: BlockFile },
    Memory(MemRegion),
}

#[derive(Debug, Clone, Copy)]
struct InFlight {
    token: Token,
    target: Target,
    /// What is still to be done: a short transfer goes on where it stopped.
    request: Request,
    /// How often a zero was tried in another way.
    retries: u8,
}

#[derive(Debug)]
pub(super) struct Disks {
    /// What is to be done on devices that are memory.
    copies: Vec<(Token, DeviceId, Request)>,
    devices: Vec<Option<Device>>,
    ops: Vec<Option<InFlight>>,
    free: Vec<u32>,
}

impl Disks {
    pub(super) fn new() -> Self {
        Self {
            copies: Vec::with_capacity(1024),
            devices: Vec::new(),
            ops: Vec::with_capacity(1024),
            free: Vec::with_capacity(1024),
        }
    }

    pub(super) fn attach(&mut self, core: &mut Core, device: Attach) -> io::Result<DeviceId> {
        let device = match device {
            Attach::File(file) => {
                core.arena.received().demand_alignment(file.memory_alignment());
                Device::File { target: core.register(file.raw_fd()), file }
            }
            Attach::Memory(region) => Device::Memory(region),
        };
        let id = u32::try_from(self.devices.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.devices.push(Some(device));
        Ok(DeviceId(id))
    }

    pub(super) fn detach(&mut self, core: &mut Core, device: DeviceId) -> Option<Attach> {
        self.copy(core);
        match self.devices.get_mut(device.0 as usize)?.take()? {
            Device::File { target, file } => {
                core.unregister(target);
                Some(Attach::File(file))
            }
            Device::Memory(region) => Some(Attach::Memory(region)),
        }
    }

    pub(super) fn submit(
        &mut self,
        core: &mut Core,
        token: Token,
        device: DeviceId,
        request: Request,
    ) {
        match self.devices.get_mut(device.0 as usize) {
            Some(Some(Device::File { file, .. })) if lies_badly(file, request) => {
                let result = write_now(core, file, request);
                core.ready.push_back(Completion::Disk { token, result });
            }
            Some(Some(Device::File { target, .. })) => {
                let op = InFlight { token, target: *target, request, retries: 0 };
                let index = match self.free.pop() {
                    Some(index) => {
                        self.ops[index as usize] = Some(op);
                        index
                    }
                    None => {
                        self.ops.push(Some(op));
                        u32::try_from(self.ops.len() - 1).expect("fewer than 2^32 operations")
                    }
                };
                start(core, index, op);
            }
            Some(Some(Device::Memory(_))) => self.copies.push((token, device, request)),
            _ => core
                .ready
                .push_back(Completion::Disk { token, result: Err(DiskFault::Errno(libc::ENODEV)) }),
        }
    }

    /// Does what was submitted to devices that are memory, one after the other: the processor goes on while such memory, which
    /// no cache has, is being written, but what else there is to do would soon have to wait for it.
    pub(super) fn copy(&mut self, core: &mut Core) {
        let mut written = false;
        for (token, device, request) in self.copies.drain(..) {
            if written && !matches!(request, Request::Write { .. }) {
                settle_stores();
            }
            written = matches!(request, Request::Write { .. });
            let result = match self.devices.get_mut(device.0 as usize) {
                Some(Some(Device::Memory(region))) => {
                    on_memory(core, region, request).map_err(|_| DiskFault::Short)
                }
                _ => Err(DiskFault::Errno(libc::ENODEV)),
            };
            core.ready.push_back(Completion::Disk { token, result });
        }
        if written {
            settle_stores();
        }
    }

    pub(super) fn handle(
        &mut self,
        core: &mut Core,
        index: u32,
        result: i32,
    ) -> Option<Completion> {
        let slot = &mut self.ops[index as usize];
        let op = slot.as_mut().expect("a completion of an operation that is in flight");
        let outcome = match u32::try_from(result) {
            Ok(moved) => progress(op, moved),
            Err(_) => fault(op, -result),
        };
        let result = match outcome {
            Outcome::Again => {
                let op = *op;
                start(core, index, op);
                return None;
            }
            Outcome::Done(result) => result,
        };
        let token = op.token;
        *slot = None;
        self.free.push(index);
        Some(Completion::Disk { token, result })
    }
}

enum Outcome {
    Again,
    Done(Result<(), DiskFault>),
}

/// A transfer moved some bytes: all of them, or it goes on.
fn progress(op: &mut InFlight, moved: u32) -> Outcome {
    let (offset, buf) = match &mut op.request {
        Request::Read { offset, buf } | Request::Write { offset, buf, .. } => (offset, buf),
        Request::Flush | Request::Zero { .. } => return Outcome::Done(Ok(())),
    };
    if moved == buf.len() {
        return Outcome::Done(Ok(()));
    }
    // A direct transfer stops short at the end of the device, or between two of its segments.
    match offset.checked_add(u64::from(moved)) {
        Some(next) if moved > 0 && moved < buf.len() => {
            *offset = next;
            *buf = buf.from(moved);
            Outcome::Again
        }
        _ => Outcome::Done(Err(DiskFault::Short)),
    }
}

fn fault(op: &mut InFlight, errno: i32) -> Outcome {
    match (errno, &mut op.request) {
        (libc::EINTR | libc::EAGAIN, _) => Outcome::Again,
        // Not every filesystem and device has both ways of zeroing.
        (libc::EOPNOTSUPP, Request::Zero { punch, .. }) if op.retries == 0 => {
            *punch = !*punch;
            op.retries += 1;
            Outcome::Again
        }
        _ => Outcome::Done(Err(fault_of(errno))),
    }
}

fn fault_of(errno: i32) -> DiskFault {
    match errno {
        libc::ENOSPC | libc::EDQUOT => DiskFault::NoSpace,
        _ => DiskFault::Errno(errno),
    }
}

fn start(core: &mut Core, index: u32, op: InFlight) {
    let fixed = core.features.registered_buffers;
    let entry: squeue::Entry = match op.request {
        Request::Read { offset, buf } => {
            let (ptr, len) = (core.arena.ptr(buf), buf.len());
            if fixed {
                with_target!(op.target, |fd| opcode::ReadFixed::new(fd, ptr, len, ARENA)
                    .offset(offset.0)
                    .build())
            } else {
                with_target!(op.target, |fd| opcode::Read::new(fd, ptr, len)
                    .offset(offset.0)
                    .build())
            }
        }
        Request::Write { offset, buf, fua } => {
            let (ptr, len) = (core.arena.ptr(buf), buf.len());
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            // Of a registered buffer some kernels look at each page: what begins within one is refused, since its
            // pieces are no whole sectors.
            if fixed && buf.offset().is_multiple_of(4096) {
                with_target!(op.target, |fd| opcode::WriteFixed::new(fd, ptr, len, ARENA)
                    .offset(offset.0)
                    .rw_flags(flags)
                    .build())
            } else {
                with_target!(op.target, |fd| opcode::Write::new(fd, ptr, len)
                    .offset(offset.0)
                    .rw_flags(flags)
                    .build())
            }
        }
        Request::Flush => with_target!(op.target, |fd| opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build()),
        Request::Zero { offset, len, punch } => {
            let way = if punch { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
            with_target!(op.target, |fd| opcode::Fallocate::new(fd, len)
                .offset(offset.0)
                .mode(way | libc::FALLOC_FL_KEEP_SIZE)
                .build())
        }
    };
    core.push(&entry.user_data(Kind::Disk.user_data(index)));
}

/// Whether it is a write of bytes that were kept where they had been received before the device was there, and that do not
/// lie as it wants it.
fn lies_badly(file: &BlockFile, request: Request) -> bool {
    matches!(request, Request::Write { buf, .. } if !buf.offset().is_multiple_of(file.memory_alignment()))
}

/// Does a write at once, by way of memory that lies well.
fn write_now(core: &Core, file: &BlockFile, request: Request) -> Result<(), DiskFault> {
    let Request::Write { offset, buf, fua } = request else { return Ok(()) };
    let written = file.write_at(offset.0, core.arena.bytes(buf));
    let written = if fua { written.and_then(|()| file.flush()) } else { written };
    written.map_err(|e| e.raw_os_error().map_or(DiskFault::Short, fault_of))
}

fn on_memory(core: &mut Core, region: &mut MemRegion, request: Request) -> io::Result<()> {
    match request {
        Request::Read { offset, buf } => region.read_at(offset.0, core.arena.bytes_mut(buf)),
        Request::Write { offset, buf, .. } => {
            region.write_past_caches(offset.0, core.arena.bytes(buf))
        }
        Request::Flush => Ok(()),
        Request::Zero { offset, len, .. } => region.zero(offset.0, len),
    }
}
