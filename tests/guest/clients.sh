# What a Linux host does with a volume when nothing goes wrong.
. /job/lib.sh

discover() {
    step "nvme discover"
    timeout 60 nvme discover -t tcp -a "$ADDR" -s "$PORT" >/tmp/discover
    cat /tmp/discover
    grep -q "^subnqn: *$NQN\$" /tmp/discover || fail "the log does not list $NQN"
    grep -q "^traddr: *$ADDR\$" /tmp/discover || fail "the log does not give $ADDR"
    grep -q "^trsvcid: *$PORT\$" /tmp/discover || fail "the log does not give port $PORT"
}

# The kernel refuses a connection whose ICResp does not echo the digests it asked for, so a
# connection that stands uses them.
digest_io() {
    attach "$@"
    verify small --rw=randwrite --bs=4k --iodepth=16 --size=8m
    verify large --rw=write --bs=256k --iodepth=4 --size=16m --offset=8m
    detach
    [ -z "$(host_state)" ] || fail "the controller is still there after disconnect"
}
connect_plain() { digest_io; }
connect_header() { digest_io --hdr-digest; }
connect_data() { digest_io --data-digest; }
connect_both() { digest_io --hdr-digest --data-digest; }

fio_randrw() {
    attach
    verify randrw4k --rw=randrw --bs=4k --iodepth=32 --size=24m --verify_backlog=512
    verify randrw128k --rw=randrw --bs=128k --iodepth=8 --size=96m --offset=64m --verify_backlog=64
    verify odd --rw=randrw --bssplit=4k/40:12k/30:36k/30 --blockalign=4k --iodepth=16 --size=16m \
        --offset=256m --verify_backlog=128
    step "fio with flush and FUA"
    verify sync --rw=randwrite --bs=4k --iodepth=1 --size=1m --fsync=4 --offset=512m
    detach
}

# filesystem MKFS FSCK MOUNT-TYPE: copy, checksum after the caches are gone, trim, check.
filesystem() {
    attach
    step "mkfs $3"
    $1 "$D"
    step "mount"
    mount -t "$3" "$D" /mnt
    step "write files"
    mkdir /mnt/a
    n=0
    while [ $n -lt 24 ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=/mnt/a/f$n bs=37k count=$((n * 2)) 2>/dev/null
    done
    cp -r /mnt/a /mnt/b
    (cd /mnt && find a b -type f -exec md5sum {} +) >/tmp/sums
    [ "$(wc -l </tmp/sums)" = 48 ] || fail "expected 48 files"
    remount "$3"
    step "md5 after a remount with cold caches"
    (cd /mnt && md5sum -c /tmp/sums) >/tmp/md5 || fail "$(grep -vc OK /tmp/md5) files differ"
    step "fstrim"
    rm -r /mnt/b
    sync
    fstrim -v /mnt >/tmp/trim
    cat /tmp/trim
    trimmed=$(sed -n 's/.*[( ]\([0-9]*\) bytes.*/\1/p' /tmp/trim)
    [ "${trimmed:-0}" -gt 0 ] || fail "fstrim discarded nothing"
    remount "$3"
    step "md5 after fstrim"
    grep ' a/' /tmp/sums >/tmp/sums-a
    (cd /mnt && md5sum -c /tmp/sums-a) >/tmp/md5 || fail "fstrim took live data"
    step "unmount"
    umount /mnt
    step "fsck"
    $2 "$D" >/tmp/fsck 2>&1 || fail "fsck: $(tail -2 /tmp/fsck | tr '\n' ' ')"
    tail -2 /tmp/fsck
    detach
}
remount() {
    step "remount"
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    mount -t "$1" "$D" /mnt
}
ext4() { filesystem "mkfs.ext4 -q -F" "e2fsck -fn" ext4; }
xfs() { filesystem "mkfs.xfs -q -f" "xfs_repair -n" xfs; }

begin
run_case discover discover
run_case connect-plain connect_plain
run_case connect-header-digest connect_header
run_case connect-data-digest connect_data
run_case connect-both-digests connect_both
run_case fio-randrw fio_randrw
run_case ext4 ext4
run_case xfs xfs
finish
