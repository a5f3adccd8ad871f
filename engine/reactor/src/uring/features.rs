//! What this kernel can do, found out by asking it.

use std::io;

use io_uring::{IoUring, Probe, opcode};

/// Parts of io_uring that speed Cairn up; it runs without any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// `IORING_SETUP_SINGLE_ISSUER` and `DEFER_TASKRUN` (Linux 6.1).
    pub deferred_task_work: bool,
    /// Multishot accept (Linux 5.19).
    pub multishot_accept: bool,
    /// Multishot receive (Linux 6.0).
    pub multishot_receive: bool,
    /// A table of registered descriptors.
    pub registered_files: bool,
    /// The arena as a registered buffer; needs `RLIMIT_MEMLOCK` or `CAP_IPC_LOCK`.
    pub registered_buffers: bool,
}

impl Features {
    /// All of them.
    #[must_use]
    pub const fn all() -> Self {
        Self {
            deferred_task_work: true,
            multishot_accept: true,
            multishot_receive: true,
            registered_files: true,
            registered_buffers: true,
        }
    }

    /// None of them.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            deferred_task_work: false,
            multishot_accept: false,
            multishot_receive: false,
            registered_files: false,
            registered_buffers: false,
        }
    }
}

/// Why there is no driver. Each names what is missing and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// io_uring is switched off or forbidden.
    #[error(
        "io_uring is not available ({source}); check that kernel.io_uring_disabled is 0 and that no \
         seccomp profile of the container forbids io_uring_setup"
    )]
    Unavailable {
        /// What the system said.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("this kernel's io_uring has no {feature}; Cairn needs Linux {since} or newer")]
    Missing {
        /// The feature.
        feature: &'static str,
        /// The first kernel that has it.
        since: &'static str,
    },
    /// A step of the set-up failed.
    #[error("setting up {what} failed: {source}")]
    Setup {
        /// Which.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// No room for the arena.
    #[error("no address space for the buffer arena: {0}")]
    Arena(io::Error),
}

/// Open descriptors that this process may have.
pub(super) fn descriptor_limit() -> u32 {
    use nix::sys::resource::{Resource, getrlimit};
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    u32::try_from(soft).unwrap_or(u32::MAX)
}

/// A ring with as much of `allow` as the kernel has.
pub(super) fn build_ring(
    entries: u32,
    allow: Features,
) -> Result<(IoUring, Features), DriverError> {
    let mut features = allow;
    let ring = loop {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries * 4).dontfork();
        if features.deferred_task_work {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        }
        match builder.build(entries) {
            Ok(ring) => break ring,
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && features.deferred_task_work => {
                features.deferred_task_work = false;
            }
            Err(source) => return Err(DriverError::Unavailable { source }),
        }
    };
    if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_ext_arg() {
        return Err(DriverError::Missing { feature: "EXT_ARG", since: "5.19" });
    }
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|source| DriverError::Setup { what: "the io_uring probe", source })?;
    let needed = [
        (opcode::Read::CODE, "IORING_OP_READ"),
        (opcode::Write::CODE, "IORING_OP_WRITE"),
        (opcode::Fsync::CODE, "IORING_OP_FSYNC"),
        (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
        (opcode::Accept::CODE, "IORING_OP_ACCEPT"),
        (opcode::Connect::CODE, "IORING_OP_CONNECT"),
        (opcode::Recv::CODE, "IORING_OP_RECV"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL"),
        (opcode::LinkTimeout::CODE, "IORING_OP_LINK_TIMEOUT"),
    ];
    for (code, feature) in needed {
        if !probe.is_supported(code) {
            return Err(DriverError::Missing { feature, since: "5.19" });
        }
    }
    // No flag tells of the multishot operations. IORING_OP_SEND_ZC came with multishot receive in
    // 6.0, IORING_OP_SOCKET with multishot accept in 5.19.
    features.multishot_receive &= probe.is_supported(opcode::SendZc::CODE);
    features.multishot_accept &= probe.is_supported(opcode::Socket::CODE);
    Ok((ring, features))
}
