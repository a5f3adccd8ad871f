# What a host notices of each failure, with the defaults: three processes, each with a replica and each able to serve
# the volume, and a path to each. No request may fail; the figures are those of docs/operations.md.
. /job/lib.sh

failures() {
    three_paths
    begin_probes
    # What stands by takes over 10 s after it began to at the earliest.
    sleep 11
    noticed "nothing" 1500
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
    sleep 8
    noticed "the process that serves hangs" 12000
    host_do "resume r1"
    host_do "expect-whole r1"
    noticed "it goes on, fenced" 6000
    sleep 11
    step "the process that serves dies, and its replica with it"
    host_do "kill-active"
    host_do "expect-served"
    sleep 4
    noticed "the process that serves killed" 8000
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
