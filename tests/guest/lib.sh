# What every job uses: the protocol with the harness, the NVMe/TCP steps, work and what is measured of it.
#   CASE-START name          a case begins
#   CASE name ok             it passed
#   CASE name FAIL detail    it did not
#   HOST-DO verb             the harness acts, then answers "ACK ok ..." or "ACK FAIL reason"
#   DMESG line               a kernel message since the job began
#   PAUSE text               a figure, which the harness prints

# The ports of three processes that can all serve the volume: PORT, this, and the next.
THIRD_PORT=$((OTHER_PORT + 1))

tell() {
    echo "$*" >&9
    echo "## $(cut -d' ' -f1 /proc/uptime) $*"
}

# step TEXT: what a failure from here on is reported as.
step() {
    echo "$*" >/tmp/step
    echo "-- $(cut -d' ' -f1 /proc/uptime) $*"
}

fail() {
    echo "$*" >/tmp/why
    echo "FAIL: $*"
    exit 1
}

# run_case NAME FUNCTION: runs it in a subshell that ends at the first command that fails.
run_case() {
    case " $ONLY " in
    "  " | *" $1 "*) ;;
    *) return 0 ;;
    esac
    rm -f /tmp/why /tmp/step
    tell "CASE-START $1"
    (
        set -eu
        "$2"
    )
    rc=$?
    if [ $rc = 0 ]; then
        tell "CASE $1 ok"
    else
        tell "CASE $1 FAIL at '$(cat /tmp/step 2>/dev/null)': $(cat /tmp/why 2>/dev/null || echo "exit code $rc")"
        umount /mnt 2>/dev/null
    fi
    rm -f /tmp/probing /tmp/working
    # A failed case must not take the next ones down with it.
    detach
}

# host_do VERB [ARGS]: asks the harness to act on the servers and waits until it has.
host_do() {
    tell "HOST-DO $*"
    reply=
    read -r -t 90 reply <&9 || fail "the harness did not answer '$*'"
    echo "   host: $reply"
    case $reply in
    "ACK ok"*) ;;
    *) fail "host could not '$*': $reply" ;;
    esac
}

begin() {
    echo "cairn: job begins" >/dev/kmsg
    modprobe nvme-tcp || fail "the guest's kernel has no nvme-tcp"
    modprobe -q crc32c-intel
    modprobe -q crc32c_generic
    true
}

finish() {
    detach
    dmesg | sed -n '/cairn: job begins/,$p' | sed 's/^/DMESG /' >&9
    tell "DMESG-END"
}

# The block device of namespace 1 of the subsystem under test. Node names do not follow namespace
# identifiers, so sysfs is asked. A path below a multipath device is there too, but has no node.
device() {
    for b in /sys/block/nvme*n*; do
        [ "$(cat "$b/nsid" 2>/dev/null)" = 1 ] || continue
        [ "$(cat "$b/device/subsysnqn" 2>/dev/null)" = "$NQN" ] || continue
        [ -b "/dev/${b##*/}" ] || continue
        echo "/dev/${b##*/}"
        return 0
    done
    return 1
}

# The controller's state as the host sees it: live, connecting, ...; empty when it is gone.
host_state() {
    for c in /sys/class/nvme/nvme*; do
        [ "$(cat "$c/subsysnqn" 2>/dev/null)" = "$NQN" ] && cat "$c/state" && return 0
    done
    return 0
}

# attach [FLAGS]: connects and sets D to the block device.
attach() {
    step "nvme connect $*"
    timeout 60 nvme connect -t tcp -a "$ADDR" -s "$PORT" -n "$NQN" --nr-io-queues=2 \
        --ctrl-loss-tmo=60 --reconnect-delay=1 --keep-alive-tmo=5 "$@"
    i=0
    until D=$(device); do
        i=$((i + 1))
        [ $i -lt 200 ] || fail "connected, but no block device appeared in 20 s"
        sleep 0.1
    done
    echo "   $D $(cat "/sys/block/${D##*/}/size") sectors"
}

detach() {
    [ -n "$(host_state)" ] || return 0
    timeout 60 nvme disconnect -n "$NQN" >/dev/null 2>&1
    i=0
    while [ -n "$(host_state)" ] && [ $i -lt 100 ]; do
        i=$((i + 1))
        sleep 0.1
    done
    return 0
}

# The state of the path through a port, as the host sees it: optimized, inaccessible, change.
path_state() {
    for c in /sys/class/nvme/nvme*; do
        grep -q "trsvcid=$1" "$c/address" 2>/dev/null || continue
        cat "$c"/nvme*c*n*/ana_state 2>/dev/null && return 0
    done
    return 0
}

is_optimized() { [ "$(path_state "$1")" = optimized ]; }

# add_path PORT [FLAGS]: connects one more path to the device.
add_path() {
    path_port=$1
    shift
    timeout 60 nvme connect -t tcp -a "$ADDR" -s "$path_port" -n "$NQN" --nr-io-queues=2 \
        --ctrl-loss-tmo=600 --reconnect-delay=1 --keep-alive-tmo=5 "$@"
}

# three_paths: three processes, each able to serve the volume, of which the first does; a path to each, and the device.
three_paths() {
    host_do share-all
    attach --ctrl-loss-tmo=600
    add_path "$OTHER_PORT"
    add_path "$THIRD_PORT"
    await 20 "the first path to be the one to use" is_optimized "$PORT"
    D=$(device) || fail "there is no one device for all paths"
}

now_ms() { sed 's/\([0-9]*\)\.\([0-9]*\) .*/\1\20/' /proc/uptime; }

# probe: reads a block over and over until /tmp/probing is gone; the longest that it took, in ms, is in /tmp/worst.
probe() {
    echo 0 >/tmp/worst
    while [ -e /tmp/probing ]; do
        now_ms >/tmp/reading
        dd if="$D" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null || echo "a read failed" >/tmp/probe-error
        began=$(cat /tmp/reading)
        took=$(($(now_ms) - ${began:-$(now_ms)}))
        [ $took -le "$(cat /tmp/worst)" ] || echo $took >/tmp/worst
    done
}

# longest WORST BEGAN: the longest that a request took, by these two files, one that is under way included: what it
# takes from now on counts the next time.
longest() {
    worst=$(cat "$1")
    now=$(now_ms)
    # It may be empty for a moment.
    began=$(cat "$2")
    so_far=$((now - ${began:-$now}))
    [ $worst -ge $so_far ] || worst=$so_far
    echo 0 >"$1"
    echo $now >"$2"
}

# in_time WHAT LIMIT: tells of the longest request, and whether it took longer than is promised on a quiet machine. Without
# STRICT only what a host would not have waited for fails: Linux waits 30 s for a request, and for one that is sent again too.
in_time() {
    if [ "$worst" -le "$2" ]; then
        tell "PAUSE $1 $worst ms"
    else
        tell "PAUSE $1 $worst ms, more than $2"
        most=30000
        [ -z "$STRICT" ] && [ "$2" -lt $most ] || most=$2
        [ "$worst" -le $most ] || fail "$1 $worst ms, more than $most"
    fi
}

# pause WHAT LIMIT: what the host noticed since the last call.
pause() {
    longest /tmp/worst /tmp/reading
    echo "   $1: a read took $worst ms at most"
    in_time "$1" "$2"
    [ ! -e /tmp/probe-error ] || fail "$1: $(cat /tmp/probe-error)"
}

# Writes a block over and over, as probe reads one; the longest is in /tmp/worst-write.
probe_writes() {
    echo 0 >/tmp/worst-write
    while [ -e /tmp/probing ]; do
        now_ms >/tmp/writing
        dd if=/dev/zero of="$D" bs=4k count=1 seek=200000 oflag=direct conv=notrunc 2>/dev/null ||
            echo "a write failed" >/tmp/probe-error
        began=$(cat /tmp/writing)
        took=$(($(now_ms) - ${began:-$(now_ms)}))
        [ $took -le "$(cat /tmp/worst-write)" ] || echo $took >/tmp/worst-write
    done
}

begin_probes() {
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    probe_writes &
}

# noticed WHAT LIMIT: the longest write and read since the last call.
noticed() {
    longest /tmp/worst-write /tmp/writing
    in_time "$1: a write" "$2"
    pause "$1" "$2"
}

# fio after fio, each with a check of all that it wrote, until there is no /tmp/working.
work() {
    n=0
    while [ -e /tmp/working ]; do
        n=$((n + 1))
        verify "work$n" --rw=randrw --bs=4k --iodepth=8 --size="$1" --verify_backlog=256 \
            --rate_iops=300,300 --randseed=$n || return 1
    done
}

# begin_work SIZE: work in the first so many bytes.
begin_work() {
    touch /tmp/working
    work "$1" &
    work_pid=$!
}

still_works() { kill -0 $work_pid || fail "fio ended early: $(cat /tmp/why 2>/dev/null)"; }

end_work() {
    rm -f /tmp/working /tmp/probing
    step "fio across it all"
    wait $work_pid || fail "fio: $(cat /tmp/why 2>/dev/null)"
    wait
}

# undisturbed: a guest whose processor is emulated is slow at times by itself; that is told, and not counted.
undisturbed() {
    echo "   a read took $(cat /tmp/worst) ms at most while nothing happened"
    tell "PAUSE undisturbed $(cat /tmp/worst) ms"
    echo 0 >/tmp/worst
}

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
    limit=$1
    what=$2
    shift 2
    step "wait for $what"
    i=0
    until "$@"; do
        i=$((i + 1))
        [ $i -lt $((limit * 5)) ] || fail "no $what after $limit s"
        sleep 0.2
    done
}

# verify NAME FIO-OPTIONS...: fio whose every block carries a checksum that is read back.
verify() {
    name=$1
    shift
    step "fio $name $*"
    timeout 120 fio --name="$name" --filename="$D" --direct=1 --ioengine=io_uring \
        --verify=crc32c --do_verify=1 --verify_fatal=1 --output="/tmp/fio-$name" "$@" ||
        fail "fio: $(grep -E 'verify:|error|bad|fio:' "/tmp/fio-$name" | head -2 | tr '\n' ' ')"
    grep -E 'READ:|WRITE:' "/tmp/fio-$name" || true
}
