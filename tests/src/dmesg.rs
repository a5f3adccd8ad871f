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

/// A message about NVMe, SCSI, iSCSI or multipath with one of these is trouble too.
const TRANSPORT_TROUBLE: &[&str] = &[
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

/// What such a message has, in lower case.
const TRANSPORTS: [&str; 6] = ["nvme", "scsi", "] sd ", " connection", " session", "multipath"];

/// What Linux always says of a disk over SCSI.
const ALWAYS: &[&str] = &["power-on or device reset occurred", "alua: transition timeout set to"];

/// What a host says of a target that went away and came back. Excused from [`TRANSPORT_TROUBLE`] only.
const RECONNECT: &[&str] = &[
    "starting error recovery",
    "reconnecting in",
    "failed to connect socket: -111",
    "failed to connect socket: -110",
    "failed reconnect attempt",
    "successfully reconnected",
    "failed to send request -32",
    "failed to send request -104",
    "failed nvme_keep_alive_end_io error=",
    // A keep alive that a process which hangs does not answer.
    "type 4 opcode 0x18 (admin cmd) qid 0 timeout",
    // Nor what a host tells such a process when it gives its connection up.
    "type 4 opcode 0x7f (fabrics cmd) qid 0 timeout",
    // A path that is given up for good: requests go to another one, and there is nobody to be told.
    "failfast expired",
    "property set error: 88",
    // The same of a session: its connection is closed, reset, or silent.
    "detected conn error (1020)",
    "detected conn error (1021)",
    "detected conn error (1022)",
];

/// A warning that the emulator of the host's processor causes, not what runs on it: a single-step trap that
/// nobody asked for, while the kernel patches its own code. Its whole report is excused, and nothing else.
const EMULATOR: &str = "at arch/x86/kernel/traps.c";

/// The lines without the reports of warnings that the emulator causes.
fn without_emulator(lines: &[String]) -> Vec<&String> {
    let mut kept = Vec::new();
    let mut report = false;
    for line in lines {
        let warning = line.contains("WARNING: ");
        report |= warning && line.contains(EMULATOR) && line.contains(" exc_debug_kernel+");
        if !report {
            kept.push(line);
        }
        report &= !line.contains("---[ end trace");
    }
    kept
}

/// The messages that should not be there.
pub(crate) fn trouble(lines: &[String], reconnect_expected: bool) -> Vec<String> {
    let bad = |line: &&String| {
        let line = line.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|w| line.contains(w));
        if has(TROUBLE) {
            return true;
        }
        has(&TRANSPORTS)
            && has(TRANSPORT_TROUBLE)
            && !has(ALWAYS)
            && !(reconnect_expected && has(RECONNECT))
    };
    without_emulator(lines).into_iter().filter(bad).cloned().collect()
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
    fn a_disk_over_iscsi_says_more_where_it_fails() {
        for line in [
            "[   12.9] scsi host0: iSCSI Initiator over TCP/IP",
            "[   22.4] sd 0:0:0:0: Power-on or device reset occurred",
            "[   22.4] sd 0:0:0:0: alua: transition timeout set to 60 seconds",
            "[   22.5] sd 0:0:0:0: [sda] Write cache: enabled, read cache: enabled, supports DPO and FUA",
            "[   26.7] sd 0:0:0:0: [sda] Synchronizing SCSI cache",
        ] {
            assert!(!found(line, false), "{line}");
        }
        for line in [
            "[   12.5] sd 0:0:0:0: [sdb] Read Capacity(16) failed: Result: hostbyte=DID_OK driverbyte=DRIVER_OK",
            "[   14.2] device-mapper: multipath: 254:0: Failing path 8:16.",
            "[   20.0]  session1: session recovery timed out after 5 secs",
            "[   20.0]  connection1:0: detected conn error (1011)",
        ] {
            assert!(found(line, true), "{line}");
        }
        let closed = "[   13.0]  connection1:0: detected conn error (1020)";
        assert!(found(closed, false) && !found(closed, true));
    }

    #[test]
    fn a_trap_of_the_emulator_is_excused_with_its_report_and_nothing_after_it() {
        let report = |place: &str| {
            [
                "[   12.526926] ------------[ cut here ]------------".to_owned(),
                format!("[   12.526928] WARNING: CPU: 0 PID: 187 at {place}"),
                "[   12.528478] Modules linked in: nvme_tcp nvme_fabrics net_failover".to_owned(),
                "[   12.529768] Call Trace:".to_owned(),
                "[   12.529769]  <#DB>".to_owned(),
                "[   12.530000] ---[ end trace 0000000000000000 ]---".to_owned(),
            ]
        };
        let trap = "arch/x86/kernel/traps.c:1120 exc_debug_kernel+0xca/0x160";
        assert_eq!(trouble(&report(trap), false), Vec::<String>::new());
        let other = "arch/x86/kernel/traps.c:900 exc_other+0xca/0x160";
        assert_eq!(trouble(&report(other), false).len(), 3);
        let error = "[   12.6] I/O error, dev nvme0c0n1, sector 0".to_owned();
        let lines = [&report(trap)[..], std::slice::from_ref(&error)].concat();
        assert_eq!(trouble(&lines, false), [error]);
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
