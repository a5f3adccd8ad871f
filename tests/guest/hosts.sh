# What docs/hosts.md says of Linux hosts: each setting is taken, and a path whose process is gone for good is given
# up by the host in its time, without an error for whoever uses the device.
. /job/lib.sh

# The controller of the path through a port; nothing where there is none.
controller() {
    for c in /sys/class/nvme/nvme*; do
        grep -q "trsvcid=$1" "$c/address" 2>/dev/null && echo "$c" && return 0
    done
    return 0
}

# is PATH VALUE: what an attribute says.
is() { [ "$(cat "$1")" = "$2" ] || fail "$1 is '$(cat "$1")', not '$2'"; }

is_given_up() { [ -z "$(controller "$1")" ]; }
stands_by() { [ "$(path_state "$1")" = inaccessible ]; }

settings() {
    step "native multipath"
    is /sys/module/nvme_core/parameters/multipath Y
    host_do share
    attach --ctrl-loss-tmo=600 --queue-size=16
    add_path "$OTHER_PORT" --queue-size=64
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    D=$(device) || fail "there is no one device for both paths"
    step "what the host made of the settings"
    first=$(controller "$PORT")
    second=$(controller "$OTHER_PORT")
    is "$first/ctrl_loss_tmo" 600
    is "$first/reconnect_delay" 1
    is "$first/fast_io_fail_tmo" off
    is "$first/sqsize" 15
    is "$second/sqsize" 63
    step "settings of a connection that is there"
    echo 1800 >"$first/ctrl_loss_tmo"
    is "$first/ctrl_loss_tmo" 1800
    echo 2 >"$first/reconnect_delay"
    is "$first/reconnect_delay" 2
    echo 5 >"$first/fast_io_fail_tmo"
    is "$first/fast_io_fail_tmo" 5
    for policy in round-robin numa queue-depth; do
        for s in /sys/class/nvme-subsystem/nvme-subsys*; do
            echo $policy >"$s/iopolicy"
            is "$s/iopolicy" $policy
        done
        verify "$policy" --rw=randrw --bs=4k --iodepth=8 --size=4m --verify_backlog=256
    done
    step "hand over with queues of different depths"
    host_do hand-over
    await 10 "the other path to be the one to use" is_optimized "$OTHER_PORT"
    verify deep --rw=randrw --bs=4k --iodepth=64 --size=4m --verify_backlog=256
    host_do hand-back
    await 10 "the first path to be the one to use" is_optimized "$PORT"
    verify shallow --rw=randrw --bs=4k --iodepth=64 --size=4m --verify_backlog=256
}

stale_path() {
    attach --ctrl-loss-tmo=8
    echo 2 >"$(controller "$PORT")/fast_io_fail_tmo"
    add_path "$OTHER_PORT"
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    D=$(device) || fail "there is no one device for both paths"
    verify stale --rw=randrw --bs=4k --iodepth=8 --size=24m --verify_backlog=256 --rate_iops=200,200 &
    fio_pid=$!
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    sleep 3
    undisturbed
    step "kill the nexus for good"
    killed=$(now_ms)
    host_do kill-nexus
    await 30 "the other process to take over by itself" is_optimized "$OTHER_PORT"
    sleep 1
    pause "killed" 6000
    await 30 "the path to be given up" is_given_up "$PORT"
    tell "PAUSE given up after $(($(now_ms) - killed)) ms"
    pause "given up" 1500
    [ -b "$D" ] || fail "the device went with the path"
    step "the process is back, and the host is told to connect"
    host_do start-nexus
    host_do expect-standby
    add_path "$PORT"
    await 20 "the path to be there" stands_by "$PORT"
    host_do hand-back
    await 10 "the first path to be the one to use" is_optimized "$PORT"
    sleep 1
    pause "connected again, and handed back" 1500
    rm -f /tmp/probing
    step "fio across it all"
    wait $fio_pid || fail "fio: $(cat /tmp/why 2>/dev/null)"
    wait
}

begin
run_case host-settings settings
run_case stale-path stale_path
finish
