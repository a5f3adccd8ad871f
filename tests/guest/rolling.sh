# Three processes, each with a replica and each able to serve the volume; the host has a path to each. Every one is
# replaced by a newer program under fio: no request fails, and what is rebuilt is what was written meanwhile.
. /job/lib.sh

# replace NAME PORT NEXT-PORT: the process serves the volume until it is handed over to the next one.
replace() {
    step "hand over from $1"
    host_do "hand-over $1"
    await 10 "the path after $1's to be the one to use" is_optimized "$3"
    sleep 1
    pause "$1 hands over" 1500
    step "stop $1"
    host_do "stop $1"
    # What is written meanwhile is what it lacks.
    sleep 4
    pause "$1 stops" 1500
    step "start $1 anew"
    host_do "start-newer $1"
    host_do "expect-whole $1"
    await 20 "the path to $1 to come back" is_there "$2"
    pause "$1 starts" 1500
}

is_there() { [ "$(path_state "$1")" = inaccessible ]; }

rolling() {
    three_paths
    step "fill a part of the volume"
    dd if=/dev/zero of="$D" bs=1M seek=64 count=160 oflag=direct 2>/dev/null || fail "could not write"
    touch /tmp/probing
    rm -f /tmp/probe-error
    begin_work 24m
    probe &
    sleep 5
    still_works
    undisturbed
    replace r1 "$PORT" "$OTHER_PORT"
    replace r2 "$OTHER_PORT" "$THIRD_PORT"
    replace r3 "$THIRD_PORT" "$PORT"
    still_works
    end_work
}

begin
run_case rolling rolling
finish
