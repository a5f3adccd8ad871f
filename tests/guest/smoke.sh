# Proves the harness itself: boot, network, protocol, acknowledgement, dmesg.
. /job/lib.sh

network() {
    step "ping $ADDR"
    ping -c 2 -w 10 "$ADDR" || fail "the host namespace does not answer"
}

acknowledgement() {
    step "ask the host"
    host_do ping
}

tools() {
    for t in nvme fio mkfs.ext4 e2fsck mkfs.xfs xfs_repair fstrim dmesg; do
        step "find $t"
        command -v "$t" || fail "no $t in the image"
    done
    step "nvme version"
    nvme version
    step "fio version"
    fio --version
    for m in nvme-tcp ext4 xfs; do
        step "modprobe $m"
        modprobe "$m"
    done
}

begin
run_case smoke-network network
run_case smoke-acknowledgement acknowledgement
run_case smoke-tools tools
finish
