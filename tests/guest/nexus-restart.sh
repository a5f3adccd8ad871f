# The nexus dies and comes back under a connection: the host reconnects by itself.
. /job/lib.sh

is_state() { [ "$(host_state)" = "$1" ]; }
is_not_live() { [ "$(host_state)" != live ]; }

nexus_restart() {
    attach
    step "write the reference data"
    dd if=/dev/urandom of=/tmp/ref bs=1M count=16 2>/dev/null
    dd if=/tmp/ref of="$D" bs=1M oflag=direct conv=fsync 2>/dev/null
    before=$(md5sum </tmp/ref)
    step "start fio"
    verify across --rw=randrw --bs=4k --iodepth=8 --size=32m --offset=64m --verify_backlog=512 \
        --rate_iops=600,600 &
    fio_pid=$!
    sleep 2
    kill -0 $fio_pid || fail "fio ended before the kill: $(cat /tmp/why 2>/dev/null)"
    step "kill the nexus"
    host_do kill-nexus
    await 20 "the host to see the loss" is_not_live
    sleep 2
    [ "$(host_state)" = connecting ] || fail "the controller is '$(host_state)', not connecting"
    kill -0 $fio_pid || fail "fio ended while the nexus was away: I/O was failed, not held"
    step "start the nexus again"
    host_do start-nexus
    await 30 "the host to reconnect" is_state live
    step "data after the restart"
    echo 3 >/proc/sys/vm/drop_caches
    after=$(dd if="$D" bs=1M count=16 iflag=direct 2>/dev/null | md5sum)
    [ "$before" = "$after" ] || fail "the data written before the kill changed"
    step "fio across the restart"
    wait $fio_pid || fail "fio across the restart: $(cat /tmp/why 2>/dev/null)"
    verify after --rw=randrw --bs=16k --iodepth=8 --size=16m --offset=256m --verify_backlog=128
    detach
}

begin
run_case nexus-restart nexus_restart
finish
