# What a host notices of each failure, with the defaults: three processes, each with a replica and each able to serve
# the volume, and a path to each. No request may fail; the figures are those of docs/operations.md.
. /job/lib.sh

THIRD_PORT=$((OTHER_PORT + 1))

# Writes a block over and over, as probe reads one.
probe_writes() {
    echo 0 >/tmp/worst-write
    while [ -e /tmp/probing ]; do
        before=$(now_ms)
        dd if=/dev/zero of="$D" bs=4k count=1 seek=200000 oflag=direct conv=notrunc 2>/dev/null ||
            echo "a write failed" >/tmp/probe-error
        took=$(($(now_ms) - before))
        [ $took -le "$(cat /tmp/worst-write)" ] || echo $took >/tmp/worst-write
    done
}

# noticed WHAT LIMIT: the longest write and read since the last call.
noticed() {
    worst=$(cat /tmp/worst-write)
    echo 0 >/tmp/worst-write
    tell "PAUSE $1: a write $worst ms"
    [ "$worst" -le "$2" ] || fail "$1: a write took $worst ms, more than $2"
    pause "$1" "$2"
}

paths() {
    host_do share-all
    attach --ctrl-loss-tmo=600
    add_path "$OTHER_PORT"
    add_path "$THIRD_PORT"
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    D=$(device) || fail "there is no one device for all paths"
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    probe_writes &
    # What stands by takes over 10 s after it began to at the earliest.
    sleep 11
    noticed "nothing" 1500
}

failures() {
    paths
    step "a replica's process dies"
    host_do "kill r3"
    sleep 3
    noticed "a replica's process killed" 3000
    host_do "start r3"
    host_do "expect-whole r3"
    noticed "it is back" 3000
    step "a replica hangs"
    host_do "pause r3"
    sleep 6
    noticed "a replica hangs" 4000
    host_do "resume r3"
    host_do "expect-whole r3"
    noticed "it goes on" 3000
    step "the process that serves hangs"
    host_do "pause r1"
    host_do "expect-served r1"
    sleep 4
    noticed "the process that serves hangs" 25000
    host_do "resume r1"
    host_do "expect-whole r1"
    noticed "it goes on, fenced" 6000
    sleep 11
    step "the process that serves dies, and its replica with it"
    host_do "kill-active"
    host_do "expect-served"
    sleep 4
    noticed "the process that serves killed" 15000
    host_do "start-missing"
    host_do "expect-online"
    noticed "it is back" 3000
    step "all processes die"
    host_do "kill-all"
    sleep 2
    down=$(now_ms)
    host_do "start-missing"
    host_do "expect-online"
    sleep 2
    tell "PAUSE all: online again $(($(now_ms) - down - 2000)) ms after the start"
    noticed "all processes killed, and started after 2 s" 30000
    rm -f /tmp/probing
    wait
}

begin
run_case failures failures
finish
