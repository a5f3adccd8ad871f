# Two processes share the volume, and the host has a path to each. It is handed over and taken over under
# fio: no request fails, and the pauses are bounded.
. /job/lib.sh

# The state of the path through a port, as the host sees it: optimized, inaccessible, change.
path_state() {
    for c in /sys/class/nvme/nvme*; do
        grep -q "trsvcid=$1" "$c/address" 2>/dev/null || continue
        cat "$c"/nvme*c*n*/ana_state 2>/dev/null && return 0
    done
    return 0
}

is_optimized() { [ "$(path_state "$1")" = optimized ]; }

both_paths() {
    attach
    step "connect the second path"
    timeout 60 nvme connect -t tcp -a "$ADDR" -s "$OTHER_PORT" -n "$NQN" --nr-io-queues=2 \
        --ctrl-loss-tmo=600 --reconnect-delay=1 --keep-alive-tmo=5
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    [ "$(path_state "$OTHER_PORT")" = inaccessible ] ||
        fail "the second path is '$(path_state "$OTHER_PORT")', not inaccessible"
    D=$(device) || fail "there is no one device for both paths"
}

now_ms() { sed 's/\([0-9]*\)\.\([0-9]*\) .*/\1\20/' /proc/uptime; }

# Reads a block over and over; the longest that it took, in ms, is in /tmp/worst.
probe() {
    echo 0 >/tmp/worst
    while [ -e /tmp/probing ]; do
        before=$(now_ms)
        dd if="$D" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null || echo "a read failed" >/tmp/probe-error
        took=$(($(now_ms) - before))
        [ $took -le "$(cat /tmp/worst)" ] || echo $took >/tmp/worst
    done
}

# pause WHAT LIMIT: what the host noticed since the last call.
pause() {
    worst=$(cat /tmp/worst)
    echo 0 >/tmp/worst
    echo "   $1: a read took $worst ms at most"
    tell "PAUSE $1 $worst ms"
    [ "$worst" -le "$2" ] || fail "$1: a read took $worst ms, more than $2"
    [ ! -e /tmp/probe-error ] || fail "$1: $(cat /tmp/probe-error)"
}

load() {
    verify "$1" --rw=randrw --bs=4k --iodepth=8 --size=24m --verify_backlog=256 --rate_iops=300,300 &
    fio_pid=$!
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    sleep 3
    kill -0 $fio_pid || fail "fio ended early: $(cat /tmp/why 2>/dev/null)"
    # A guest whose processor is emulated is slow at times by itself.
    echo "   a read took $(cat /tmp/worst) ms at most while nothing happened"
    echo 0 >/tmp/worst
}

end_load() {
    rm -f /tmp/probing
    step "fio across it all"
    wait $fio_pid || fail "fio: $(cat /tmp/why 2>/dev/null)"
    wait
}

hand_over() {
    host_do share
    both_paths
    load handover
    step "hand over"
    host_do hand-over
    await 10 "the other path to be the one to use" is_optimized "$OTHER_PORT"
    sleep 1
    pause "handed over" 1500
    step "hand back"
    host_do hand-back
    await 10 "the first path to be the one to use" is_optimized "$PORT"
    sleep 1
    pause "handed back" 1500
    end_load
}

take_over() {
    both_paths
    load takeover
    step "kill the nexus"
    host_do kill-nexus
    await 30 "the other process to take over by itself" is_optimized "$OTHER_PORT"
    sleep 1
    pause "killed" 6000
    step "start the nexus again: it stands by"
    host_do start-nexus
    host_do expect-standby
    sleep 2
    pause "started again" 1500
    end_load
}

begin
run_case hand-over hand_over
run_case take-over take_over
finish
