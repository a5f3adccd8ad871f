# Snapshots under a mounted file system: each is as after a loss of power, and never changes.
. /job/lib.sh

# fill TYPE MKFS: files whose sums are known, synced; then writes that go on while a snapshot is taken.
fill() {
    step "mkfs $1"
    $2 "$D"
    mount -t "$1" "$D" /mnt
    step "write files"
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of="/mnt/kept$i" bs=64k count=$((i * 8)) 2>/dev/null
    done
    sync
    (cd /mnt && md5sum kept*) >/tmp/sums
    (
        i=0
        while [ ! -e /tmp/enough ]; do
            i=$((i + 1))
            dd if=/dev/urandom of="/mnt/moving$((i % 16))" bs=16k count=20 conv=fsync 2>/dev/null
        done
    ) &
    writer=$!
    sleep 1
}

# crash_consistent TYPE MKFS CHECK
crash_consistent() {
    rm -f /tmp/enough
    attach
    fill "$1" "$2"
    host_do snapshot one
    sleep 1
    touch /tmp/enough
    wait $writer
    step "overwrite what the snapshot has"
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/dev/zero of="/mnt/kept$i" bs=64k count=$((i * 8)) conv=notrunc 2>/dev/null
    done
    rm /mnt/kept3
    sync
    fstrim /mnt || fail "fstrim after a snapshot"
    umount /mnt
    step "$3 of the volume"
    $3 "$D" >/tmp/fsck 2>&1 || fail "fsck: $(tail -2 /tmp/fsck | tr '\n' ' ')"
    detach
    host_do clone one
    origin=$NQN
    NQN=$NQN-copy
    look "$1" "$3" "the clone"
    NQN=$origin
    host_do drop-clone
    host_do restore one
    look "$1" "$3" "the restored volume"
    host_do drop-snapshot one
    look "$1" "$3" "the volume, its snapshot deleted"
}

# look TYPE CHECK WHAT: the journal is replayed, nothing is broken, and every kept file is as it was.
look() {
    attach
    step "replay the journal of $3"
    mount -t "$1" "$D" /mnt || fail "cannot mount $3"
    (cd /mnt && md5sum -c /tmp/sums) >/tmp/md5 2>&1 || fail "$3: $(grep -v OK /tmp/md5 | head -2 | tr '\n' ' ')"
    umount /mnt
    step "$2 of $3"
    $2 "$D" >/tmp/fsck 2>&1 || fail "fsck of $3: $(tail -2 /tmp/fsck | tr '\n' ' ')"
    detach
}

ext4() { crash_consistent ext4 "mkfs.ext4 -q -F" "e2fsck -fn"; }
xfs() { crash_consistent xfs "mkfs.xfs -q -f" "xfs_repair -n"; }

begin
run_case snapshot-ext4 ext4
run_case snapshot-xfs xfs
finish
