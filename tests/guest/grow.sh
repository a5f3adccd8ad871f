# The volume grows under a host: it sees the new size by itself, on the connection that it has.
. /job/lib.sh

sectors() { cat "/sys/block/${D##*/}/size"; }
is_size() { [ "$(sectors)" = "$1" ]; }

# grow MIB: the servers grow the volume; the host must hear of it without being asked to look.
grow() {
    before=$(sectors)
    [ "$before" -lt $(($1 * 2048)) ] || fail "the volume has $before sectors already"
    step "grow the volume to $1 MiB"
    host_do grow "$1MiB"
    await 10 "the host to see $1 MiB" is_size $(($1 * 2048))
    [ "$(host_state)" = live ] || fail "the controller is $(host_state), not live"
}

fio_across() {
    attach
    step "start fio"
    # The rate holds the writing long enough for the growth to land in the middle of it.
    verify across --rw=randrw --bs=4k --iodepth=16 --size=48m --verify_backlog=512 \
        --rate_iops=1000,1000 &
    fio_pid=$!
    sleep 2
    kill -0 $fio_pid || fail "fio ended before the volume grew: $(cat /tmp/why 2>/dev/null)"
    grow 1280
    kill -0 $fio_pid || fail "fio ended before the volume had grown: the load did not span it"
    verify beyond --rw=randrw --bs=16k --iodepth=8 --size=16m --offset=1264m --verify_backlog=128
    step "fio across the growth"
    wait $fio_pid || fail "fio across the growth: $(cat /tmp/why 2>/dev/null)"
    detach
}

# filesystem MKFS FSCK MOUNT-TYPE GROWER TARGET MIB: grows, mounted and in use. No TARGET: the device.
filesystem() {
    attach
    step "mkfs $3"
    $1 "$D"
    mount -t "$3" "$D" /mnt
    step "write files"
    dd if=/dev/urandom of=/mnt/before bs=1M count=32 2>/dev/null
    (cd /mnt && md5sum before) >/tmp/sums
    small=$(df -m /mnt | awk 'END { print $2 }')
    grow "$6"
    step "$4"
    $4 "${5:-$D}" >/tmp/grown 2>&1 || fail "$4: $(tail -2 /tmp/grown | tr '\n' ' ')"
    large=$(df -m /mnt | awk 'END { print $2 }')
    [ "$large" -gt $((small + 200)) ] || fail "the file system has $large MiB, and had $small"
    # More than there was room for before.
    step "fill what it grew by"
    dd if=/dev/zero of=/mnt/after bs=1M count=$((small + 64)) conv=fsync 2>/dev/null
    step "md5 after the growth"
    (cd /mnt && md5sum -c /tmp/sums) >/tmp/md5 || fail "the file written before differs"
    umount /mnt
    step "fsck"
    $2 "$D" >/tmp/fsck 2>&1 || fail "fsck: $(tail -2 /tmp/fsck | tr '\n' ' ')"
    detach
}
ext4() { filesystem "mkfs.ext4 -q -F" "e2fsck -fn" ext4 resize2fs "" 1536; }
xfs() { filesystem "mkfs.xfs -q -f" "xfs_repair -n" xfs xfs_growfs /mnt 1792; }

begin
run_case grow-fio fio_across
run_case grow-ext4 ext4
run_case grow-xfs xfs
finish
