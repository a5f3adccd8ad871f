# The guest's root file system is on the volume, and QEMU is the initiator.
. /job/lib.sh

begin() { echo "cairn: job begins" >/dev/kmsg; }
detach() { true; }

root_replica_kill() {
    step "the root file system"
    grep -q '^/dev/vda / ext4 ' /proc/mounts || fail "it is on $(grep ' / ' /proc/mounts)"
    step "write files"
    mkdir /kept
    for n in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=/kept/f$n bs=64k count=$((n * 4)) 2>/dev/null
    done
    (cd / && find kept bin sbin usr lib -type f -exec md5sum {} +) >/tmp/sums
    sync
    D=/load
    dd if=/dev/zero of=$D bs=1M count=32 conv=fsync 2>/dev/null
    verify kill --rw=randrw --bs=4k --iodepth=16 --size=32m --verify_backlog=512 --rate_iops=500,500 &
    fio_pid=$!
    sleep 3
    kill -0 $fio_pid || fail "fio ended before the kill: $(cat /tmp/why 2>/dev/null)"
    step "kill a replica"
    host_do kill-replica
    sleep 1
    kill -0 $fio_pid || fail "fio ended with the kill: the load did not span it"
    host_do expect-degraded
    step "fio across the kill"
    wait $fio_pid || fail "fio across the kill: $(cat /tmp/why 2>/dev/null)"
    step "md5 with cold caches"
    sync
    echo 3 >/proc/sys/vm/drop_caches
    (cd / && md5sum -c /tmp/sums) >/tmp/md5 || fail "$(grep -vc OK /tmp/md5) files differ"
    step "discard"
    rm $D
    sync
    fstrim -v / || fail "fstrim"
}

begin
run_case root-replica-kill root_replica_kill
sync
finish
