# A replica process dies under load: the host must not notice.
. /job/lib.sh

replica_kill() {
    attach
    step "start fio"
    # The rate holds the writing long enough for the kill to land in the middle of it.
    verify kill --rw=randrw --bs=4k --iodepth=16 --size=48m --verify_backlog=512 \
        --rate_iops=800,800 &
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
    [ "$(host_state)" = live ] || fail "the controller is $(host_state), not live"
    verify after --rw=randrw --bs=16k --iodepth=8 --size=16m --offset=256m --verify_backlog=128
    detach
}

begin
run_case replica-kill replica_kill
finish
