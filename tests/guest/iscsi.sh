# Beside lib.sh: what jobs over iSCSI use, with open-iscsi as the initiator.
#   ISCSI_PORT, IQN   where the volume is a logical unit, once the job has had it exported
. /job/lib.sh

INITIATOR=$(sed -n 's/^InitiatorName=//p' /etc/iscsi/initiatorname.iscsi)
PORTAL=$ADDR:$ISCSI_PORT

begin() {
    echo "cairn: job begins" >/dev/kmsg
    mkdir -p /run/lock/iscsi
    modprobe -q crc32c-intel
    modprobe -q crc32c_generic
    modprobe sd_mod
    modprobe scsi_dh_alua
    modprobe iscsi_tcp || fail "the guest's kernel has no iscsi_tcp"
    iscsid || fail "iscsid does not start"
}

discover() {
    step "discover"
    timeout 30 iscsiadm -m discovery -t sendtargets -p "$PORTAL" >/tmp/discovery 2>/tmp/discovery-error
}

# set_all NAME=VALUE...: settings of the target's records.
set_all() {
    for setting in "$@"; do
        iscsiadm -m node -T "$IQN" -o update -n "${setting%%=*}" -v "${setting#*=}"
    done
}

log_in() { timeout 60 iscsiadm -m node -T "$IQN" -p "$PORTAL" "$@" --login >/tmp/login 2>&1; }

# refused CODE WHO: the login is, for good (19) or since the initiator did not prove who it is (24).
refused() {
    rc=0
    log_in || rc=$?
    [ $rc = "$1" ] || fail "$2: the login ended with $rc: $(tail -1 /tmp/login)"
}

# The disks of all sessions with the target.
disks() {
    for s in /sys/class/iscsi_session/session*; do
        [ "$(cat "$s/targetname" 2>/dev/null)" = "$IQN" ] || continue
        for b in "$s"/device/target*/*/block/sd*; do
            [ ! -d "$b" ] || [ ! -b "/dev/${b##*/}" ] || echo "/dev/${b##*/}"
        done
    done
}

have_disks() { [ "$(disks | wc -l)" = "$1" ]; }

# attach [NAME=VALUE...]: discovers, sets, logs in, and sets D to the disk.
attach() {
    discover || fail "discovery: $(tail -1 /tmp/discovery-error)"
    set_all "$@"
    step "log in $*"
    log_in || fail "login: $(tail -1 /tmp/login)"
    await 20 "a disk" have_disks 1
    D=$(disks)
    echo "   $D $(cat "/sys/block/${D##*/}/size") sectors"
}

detach() {
    [ -n "$(ls /sys/class/iscsi_session 2>/dev/null)" ] && timeout 60 iscsiadm -m session -u >/dev/null 2>&1
    iscsiadm -m node -o delete >/dev/null 2>&1
    return 0
}

# How often the kernel has lost a connection since the job began.
lost() { dmesg | sed -n '/cairn: job begins/,$p' | grep -c 'detected conn error' || true; }

# What an attribute of the only connection says.
connection() { cat /sys/class/iscsi_connection/connection*/"$1"; }
session() { cat /sys/class/iscsi_session/session*/"$1"; }

# load NAME FIO-OPTIONS...: verify in the background, held back for what happens to it to happen in its middle.
load() {
    verify "$@" &
    fio_pid=$!
    sleep 3
    still_loaded
}

still_loaded() { kill -0 $fio_pid || fail "fio ended early: $(cat /tmp/why 2>/dev/null)"; }
end_load() {
    step "fio across it all"
    wait $fio_pid || fail "fio: $(cat /tmp/why 2>/dev/null)"
}
