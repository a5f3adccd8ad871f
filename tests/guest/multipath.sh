# Two processes share the volume; open-iscsi is logged in to both, and multipathd makes one device of them. The volume
# is handed over and taken over under fio: no request fails, and the pauses are bounded.
. /job/iscsi.sh

OTHER_PORTAL=$ADDR:$((ISCSI_PORT + 1))

# As docs/hosts.md has it.
settings() {
    mkdir -p /etc/multipath /run/udev /dev/mapper
    cat >/etc/multipath.conf <<'CONF'
blacklist {
    devnode ".*"
}
blacklist_exceptions {
    devnode "^sd"
}
devices {
    device {
        vendor "CAIRN"
        product "VOLUME"
        path_grouping_policy group_by_prio
        prio alua
        hardware_handler "1 alua"
        path_checker tur
        failback immediate
        no_path_retry queue
        fast_io_fail_tmo 5
        dev_loss_tmo 600
    }
}
defaults {
    find_multipaths no
    polling_interval 1
    max_polling_interval 2
}
CONF
}

state() { multipathd show paths format "%d %t %T %o %s %p" 2>/dev/null; }
mapped() { D=$(ls /dev/mapper/* 2>/dev/null | grep -v control | head -1) && [ -n "$D" ]; }

# The disk of the path through a portal.
disk_of() {
    for s in /sys/class/iscsi_session/session*; do
        [ "$(cat "$s"/device/connection*/iscsi_connection/connection*/persistent_port)" = "$1" ] || continue
        basename "$(ls -d "$s"/device/target*/*/block/sd*)"
    done
}

# is_used PORT: whether the path through it leads to where the volume is served.
is_used() {
    disk=$(disk_of "$1")
    multipathd show paths format "%d %t %T" 2>/dev/null | grep -q "^$disk *active *ready" &&
        [ "$(multipathd show paths format "%d %p" 2>/dev/null | sed -n "s/^$disk *//p" | tr -d ' ')" = 50 ]
}

# start_multipath: what turns the disks of both paths into one device, once for the job.
start_multipath() {
    settings
    modprobe dm-multipath
    modprobe dm-service-time
    udevd --daemon
    udevadm trigger --type=subsystems --action=add
    udevadm trigger --type=devices --action=add
    multipathd
}

both_paths() {
    if [ -z "$(pidof multipathd)" ]; then
        step "share the volume"
        host_do export "$INITIATOR"
        host_do share
        step "udevd and multipathd"
        start_multipath
    fi
    discover || fail "discovery: $(tail -1 /tmp/discovery-error)"
    for portal in "$PORTAL" "$OTHER_PORTAL"; do
        grep -q "^$portal,[0-9]* $IQN\$" /tmp/discovery || fail "discovery does not tell of $portal"
    done
    set_all node.session.timeo.replacement_timeout=5
    step "log in to both"
    timeout 60 iscsiadm -m node -T "$IQN" --login >/tmp/login 2>&1 || fail "login: $(tail -1 /tmp/login)"
    await 20 "two disks" have_disks 2
    await 30 "one device for both" mapped
    await 20 "the first path to be the one to use" is_used "$ISCSI_PORT"
    step "what the host made of the path that stands by"
    first=/sys/block/$(disk_of "$ISCSI_PORT")
    other=/sys/block/$(disk_of $((ISCSI_PORT + 1)))
    [ "$(cat "$other/device/access_state")" = standby ] || fail "it is $(cat "$other/device/access_state")"
    for what in size queue/logical_block_size queue/write_cache queue/fua queue/discard_max_bytes; do
        [ "$(cat "$other/$what")" = "$(cat "$first/$what")" ] || fail "$what is $(cat "$other/$what")"
    done
    multipath -ll
}

detach() {
    multipath -F >/dev/null 2>&1
    [ -z "$(ls /sys/class/iscsi_session 2>/dev/null)" ] || timeout 60 iscsiadm -m session -u >/dev/null 2>&1
    iscsiadm -m node -o delete >/dev/null 2>&1
    return 0
}

# stands_by PORT: whether there is a path through it, which leads to where the volume is not served.
stands_by() {
    disk=$(disk_of "$1")
    multipathd show paths format "%d %t %T" 2>/dev/null | grep -q "^$disk .* ghost"
}

begin_load() {
    load "$1" --rw=randrw --bs=4k --iodepth=8 --size=24m --verify_backlog=256 --rate_iops=200,200
    touch /tmp/probing
    rm -f /tmp/probe-error
    probe &
    sleep 3
    undisturbed
}

stop_load() {
    rm -f /tmp/probing
    end_load
    wait
}

hand_over() {
    both_paths
    begin_load handover
    step "hand over"
    host_do hand-over
    await 20 "the other path to be the one to use" is_used $((ISCSI_PORT + 1))
    sleep 1
    pause "handed over" 6000
    state
    step "hand back"
    host_do hand-back
    await 20 "the first path to be the one to use" is_used "$ISCSI_PORT"
    sleep 1
    pause "handed back" 6000
    state
    stop_load
}

take_over() {
    both_paths
    begin_load takeover
    step "kill the nexus"
    host_do kill-nexus
    await 40 "the other path to be the one to use" is_used $((ISCSI_PORT + 1))
    sleep 1
    pause "killed" 15000
    state
    step "start the nexus again: it stands by"
    host_do start-nexus
    host_do expect-standby
    await 30 "the path to it" stands_by "$ISCSI_PORT"
    pause "started again" 3000
    step "hand back"
    host_do hand-back
    await 20 "the first path to be the one to use" is_used "$ISCSI_PORT"
    sleep 1
    pause "handed back" 6000
    stop_load
}

begin
run_case multipath-hand-over hand_over
run_case multipath-take-over take_over
finish
