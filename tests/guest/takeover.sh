# Two processes share the volume, and the host has a path to each. It is handed over and taken over under
# fio: no request fails, and the pauses are bounded.
. /job/lib.sh

both_paths() {
    attach
    step "connect the second path"
    add_path "$OTHER_PORT"
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    [ "$(path_state "$OTHER_PORT")" = inaccessible ] ||
        fail "the second path is '$(path_state "$OTHER_PORT")', not inaccessible"
    D=$(device) || fail "there is no one device for both paths"
}

load() {
    verify "$1" --rw=randrw --bs=4k --iodepth=8 --size=24m --verify_backlog=256 --rate_iops=300,300 &
    fio_pid=$!
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    sleep 3
    kill -0 $fio_pid || fail "fio ended early: $(cat /tmp/why 2>/dev/null)"
    undisturbed
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
