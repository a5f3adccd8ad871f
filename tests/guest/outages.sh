# What a host notices, with the defaults, of failures that need more than a signal: networks that are cut, disks that
# fail or hang, pools that fill up, machines that lose power. Layout and probes as in failures.sh, under fio with
# checksums; the figures are those of docs/operations.md. The processes are run by a program built with the feature
# `nemesis`, which is slower than a release.
. /job/lib.sh

# begin_outage: paths, and work that has been done for long enough that what stands by would take over.
begin_outage() {
    three_paths
    begin_probes
    begin_work 16m
    sleep 12
    still_works
    noticed "nothing" 3000
}

end_outage() {
    still_works
    end_work
}

# A member that is not the one that serves is cut off and comes back.
cut_replica() {
    begin_outage
    step "the network between a replica and the others is cut"
    host_do "cut r3"
    host_do "expect-degraded"
    sleep 4
    noticed "a replica cut off" 8000
    step "it is whole again"
    host_do "heal"
    host_do "expect-online"
    noticed "a replica is back in the network" 3000
    end_outage
}

cut_active() {
    begin_outage
    step "the process that serves is cut off from the others, and not from its hosts"
    host_do "cut r1"
    host_do "expect-served r1"
    sleep 20
    noticed "the process that serves cut off from the others" 60000
    step "the network is whole again"
    host_do "heal"
    host_do "expect-online"
    noticed "it is back in the network" 6000
    end_outage
}

vanish_active() {
    begin_outage
    step "the machine of the process that serves vanishes from the network"
    host_do "vanish r1"
    host_do "expect-served r1"
    sleep 12
    noticed "the machine that serves vanished" 60000
    step "it is back"
    host_do "heal"
    host_do "expect-online"
    noticed "the machine is back" 6000
    end_outage
}

dead_disk() {
    begin_outage
    step "the only disk of a replica fails everything"
    host_do "fault r3 eio_read=0..1099511627776 eio_write=0..1099511627776"
    host_do "expect-degraded"
    sleep 2
    noticed "a replica's disk dead" 5000
    step "the process is started again on a disk that works"
    host_do "kill r3"
    host_do "cure r3"
    host_do "start r3"
    host_do "expect-online"
    noticed "the disk is back" 3000
    step "the disk of the process that serves fails everything"
    host_do "fault r1 eio_read=0..1099511627776 eio_write=0..1099511627776"
    host_do "expect-degraded"
    sleep 2
    noticed "the disk of the process that serves dead" 5000
    step "the volume is handed over, and the process started again on a disk that works"
    host_do "hand-over r1"
    sleep 1
    noticed "the process without a disk hands over" 3000
    host_do "kill r1"
    host_do "cure r1"
    host_do "start r1"
    host_do "expect-online"
    noticed "the disk is back again" 3000
    end_outage
}

hung_disk() {
    begin_outage
    step "the disk of a replica hangs"
    host_do "fault r3 slow_ms=30000"
    host_do "expect-degraded"
    sleep 4
    noticed "a replica's disk hangs" 8000
    step "the process is started again on a disk that works"
    host_do "kill r3"
    host_do "cure r3"
    host_do "start r3"
    host_do "expect-online"
    noticed "the disk that hung is back" 3000
    end_outage
}

# fill: writes until there is no room; what was said of that is in /tmp/filled.
fill() {
    if dd if=/dev/zero of="$D" bs=1M seek=64 count=240 oflag=direct conv=notrunc 2>/tmp/filled; then
        fail "a pool of 192 MiB took it all"
    fi
    grep -q "No space left on device" /tmp/filled || fail "not 'no space': $(cat /tmp/filled)"
    tell "PAUSE filled: $(tail -1 /tmp/filled)"
}

full_pool() {
    begin_outage
    step "the pool of a replica fills up"
    fill
    noticed "a pool is full" 8000
    host_do "expect-online"
    sleep 4
    noticed "it stays full" 3000
    step "what was there can be written still"
    dd if=/dev/zero of="$D" bs=1M seek=64 count=16 oflag=direct conv=notrunc 2>/dev/null || fail "it cannot"
    step "a discard makes room"
    blkdiscard -o $((64 << 20)) -l $((240 << 20)) "$D" || fail "the discard failed"
    dd if=/dev/zero of="$D" bs=1M seek=320 count=32 oflag=direct conv=notrunc 2>/dev/null ||
        fail "there is no room after the discard"
    noticed "discarded" 8000
    step "it fills up again, and is made larger"
    fill
    host_do "grow-pool r3"
    dd if=/dev/zero of="$D" bs=1M seek=64 count=240 oflag=direct conv=notrunc 2>/dev/null ||
        fail "there is no room in the larger pool"
    noticed "made larger" 8000
    host_do "expect-online"
    end_outage
}

lost_power() {
    begin_outage
    step "the machine of a replica loses power, and what its disk had not flushed"
    host_do "lose-power r3"
    host_do "expect-degraded"
    sleep 3
    noticed "a replica's machine lost power" 3000
    host_do "start r3"
    host_do "expect-online"
    noticed "it has power again" 3000
    step "the machine of the process that serves loses power"
    host_do "lose-power r1"
    host_do "expect-served r1"
    sleep 3
    noticed "the machine that serves lost power" 10000
    host_do "start r1"
    host_do "expect-online"
    noticed "it has power again too" 3000
    # What was acked and not flushed may be gone after this: nobody compares it.
    end_outage
    begin_probes
    sleep 11
    noticed "nothing again" 3000
    step "all machines lose power"
    for name in r1 r2 r3; do host_do "lose-power $name"; done
    sleep 2
    down=$(now_ms)
    host_do "start-missing"
    host_do "expect-online"
    sleep 2
    tell "PAUSE all: online again $(($(now_ms) - down - 2000)) ms after the start"
    noticed "all machines lost power, and had it again after 2 s" 30000
    rm -f /tmp/probing
    wait
}

# With fast_io_fail_tmo on every path, and no path that is left: what waits fails, and it works again afterwards.
fail_fast() {
    three_paths
    for c in /sys/class/nvme/nvme*; do
        [ "$(cat "$c/subsysnqn")" = "$NQN" ] && echo 3 >"$c/fast_io_fail_tmo"
    done
    step "all processes die, and hosts are told to wait for 3 s only"
    host_do "kill-all"
    began=$(now_ms)
    ! dd if="$D" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/failed || fail "a read was answered by nobody"
    took=$(($(now_ms) - began))
    tell "PAUSE no path is left: a read failed after $took ms: $(head -1 /tmp/failed)"
    [ $took -le 10000 ] || fail "it waited for $took ms"
    [ -b "$D" ] || fail "the device is gone"
    step "they are started again"
    host_do "start-missing"
    host_do "expect-online"
    began=$(now_ms)
    until dd if="$D" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/failed; do
        [ $(($(now_ms) - began)) -le 20000 ] || fail "it still fails: $(head -1 /tmp/failed)"
        sleep 0.2
    done
    tell "PAUSE a path is back: reads work $(($(now_ms) - began)) ms after the volume is online"
}

begin
run_case cut-replica cut_replica
run_case cut-active cut_active
run_case vanish-active vanish_active
run_case dead-disk dead_disk
run_case hung-disk hung_disk
run_case full-pool full_pool
run_case lost-power lost_power
run_case fail-fast fail_fast
finish
