//! Which kernel messages of a host are trouble.

/// Any message with one of these is trouble, in lower case.
const TROUBLE: &[&str] = &[
    "i/o error",
    "blk_update_request",
    "critical target error",
    "critical medium error",
    "protection error",
    "ext4-fs error",
    "ext4-fs warning",
    "jbd2: error",
    "corruption",
    "bug:",
    "oops",
    "warning:",
    "call trace",
    "blocked for more than",
];

/// A message about NVMe with one of these is trouble too.
const NVME_TROUBLE: &[&str] = &[
    "timeout",
    "timed out",
    "fail",
    "invalid",
    "error",
    "mismatch",
    "unexpected",
    "unsupported",
    "unrecognized",
    "bad ",
    "could not",
    "cannot",
    "reset",
    "aborting",
    "duplicate",
    "ignoring",
    "reconnect",
];

/// What a host says of a target that went away and came back. Excused from [`NVME_TROUBLE`] only.
const RECONNECT: &[&str] = &[
    "starting error recovery",
    "reconnecting in",
    "failed to connect socket: -111",
    "failed reconnect attempt",
    "successfully reconnected",
    "failed to send request -32",
    "failed to send request -104",
    "failed nvme_keep_alive_end_io error=",
    // A keep alive that a process which hangs does not answer.
    "type 4 opcode 0x18 (admin cmd) qid 0 timeout",
    // A path that is given up for good: requests go to another one, and there is nobody to be told.
    "failfast expired",
    "property set error: 880,",
];

/// The messages that should not be there.
pub(crate) fn trouble(lines: &[String], reconnect_expected: bool) -> Vec<String> {
    let bad = |line: &&String| {
        let line = line.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|w| line.contains(w));
        if has(TROUBLE) {
            return true;
        }
        line.contains("nvme") && has(NVME_TROUBLE) && !(reconnect_expected && has(RECONNECT))
    };
    lines.iter().filter(bad).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::trouble;

    fn found(line: &str, reconnect: bool) -> bool {
        !trouble(&[line.to_owned()], reconnect).is_empty()
    }

    #[test]
    fn a_connection_that_works_says_nothing_bad() {
        for line in [
            "nvme nvme0: creating 2 I/O queues.",
            "nvme nvme0: mapped 2/0/0 default/read/poll queues.",
            "nvme nvme0: new ctrl: NQN \"nqn.2026-01.test:a\", addr 10.99.0.1:4420",
            "nvme nvme0: Removing ctrl: NQN \"nqn.2026-01.test:a\"",
            "block nvme0n1: no usable path - requeuing I/O",
            "EXT4-fs (nvme0n1): mounted filesystem with ordered data mode",
            "XFS (nvme0n1): Ending clean mount",
        ] {
            assert!(!found(line, false), "{line}");
        }
    }

    #[test]
    fn errors_are_trouble_even_where_a_reconnect_is_expected() {
        for line in [
            "I/O error, dev nvme0c0n1, sector 0 op 0x1:(WRITE)",
            "Buffer I/O error on dev nvme0n1, logical block 0",
            "nvme nvme0: I/O tag 12 (100c) type 4 opcode 0x1 (Write) QID 1 timeout",
            "nvme nvme0: Connect Invalid Data Parameter, cntlid: 1",
            "nvme nvme0: queue 1: data digest error, recv 0x1 expected 0x2",
            "nvme nvme0: queue 0: header digest mismatch host: enabled, ctrl: disabled",
            "WARNING: CPU: 1 PID: 77 at drivers/nvme/host/tcp.c:1 nvme_tcp_x+0x1/0x2",
        ] {
            assert!(found(line, true), "{line}");
        }
    }

    #[test]
    fn a_reconnect_is_trouble_only_where_none_is_expected() {
        for line in [
            "nvme nvme0: starting error recovery",
            "nvme nvme0: Reconnecting in 1 seconds...",
            "nvme nvme0: failed to connect socket: -111",
            "nvme nvme0: Failed reconnect attempt 3/60",
            "nvme nvme0: Successfully reconnected (attempt 3/60)",
        ] {
            assert!(found(line, false), "{line}");
            assert!(!found(line, true), "{line}");
        }
    }
}
