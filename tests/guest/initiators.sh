# What Linux's iSCSI initiator does with a volume: open-iscsi, its kernel part, a file system, fio.
. /job/iscsi.sh

access() {
    host_do export
    step "nobody may log in"
    discover || true
    ! grep -q "$IQN" /tmp/discovery || fail "discovery tells a stranger of the target"
    iscsiadm -m node -T "$IQN" -p "$PORTAL" -o new >/dev/null
    refused 19 "a stranger"
    iscsiadm -m node -o delete >/dev/null 2>&1 || true
    host_do export "$INITIATOR"
    attach
    grep -q "^$PORTAL,[0-9]* $IQN\$" /tmp/discovery || fail "discovery says '$(cat /tmp/discovery)'"
    step "what the kernel was told"
    b=/sys/block/${D##*/}
    [ "$(cat "$b/queue/logical_block_size")" = 4096 ] || fail "blocks of $(cat "$b/queue/logical_block_size")"
    [ "$(cat "$b/queue/write_cache")" = "write back" ] || fail "the cache is $(cat "$b/queue/write_cache")"
    [ "$(cat "$b/queue/fua")" = 1 ] || fail "no FUA"
    [ "$(cat "$b/queue/rotational")" = 0 ] || fail "it rotates"
    [ "$(cat "$b/queue/discard_max_bytes")" -gt 0 ] || fail "no discards"
    [ "$(cat "$b/device/access_state")" = "active/optimized" ] || fail "access: $(cat "$b/device/access_state")"
    verify plain --rw=randrw --bssplit=4k/40:12k/30:36k/30 --blockalign=4k --iodepth=16 --size=16m \
        --verify_backlog=128
    verify large --rw=write --bs=256k --iodepth=4 --size=16m --offset=16m
    verify sync --rw=randwrite --bs=4k --iodepth=1 --size=1m --fsync=4 --offset=64m
    host_do sessions
    [ "$reply" = "ACK ok 1" ] || fail "cairn tells of other sessions: $reply"
    detach
    host_do sessions
    [ "$reply" = "ACK ok 0" ] || fail "cairn tells of sessions after the logout: $reply"
}

AUTH=node.session.auth
chap() {
    host_do export-chap "$INITIATOR"
    discover || fail "discovery: $(tail -1 /tmp/discovery-error)"
    refused 24 "no secret"
    set_all $AUTH.authmethod=CHAP $AUTH.username=guest $AUTH.password=what-someone-else-proves
    refused 24 "a wrong secret"
    set_all $AUTH.username=another $AUTH.password=what-the-guest-proves
    refused 24 "a wrong name"
    set_all $AUTH.username=guest
    attach $AUTH.authmethod=CHAP $AUTH.username=guest $AUTH.password=what-the-guest-proves
    verify chap --rw=randwrite --bs=4k --iodepth=16 --size=4m
    detach
    host_do export-mutual "$INITIATOR"
    attach $AUTH.authmethod=CHAP $AUTH.username=guest $AUTH.password=what-the-guest-proves \
        $AUTH.username_in=target $AUTH.password_in=what-the-target-proves
    verify mutual --rw=randwrite --bs=4k --iodepth=16 --size=4m
    detach
    step "a target that cannot prove itself"
    discover || fail "discovery: $(tail -1 /tmp/discovery-error)"
    set_all $AUTH.authmethod=CHAP $AUTH.username=guest $AUTH.password=what-the-guest-proves \
        $AUTH.username_in=target $AUTH.password_in=what-another-proves
    ! log_in || fail "the initiator took it"
    detach
    host_do export "$INITIATOR"
}

# digest_io HEADER DATA
digest_io() {
    attach "node.conn[0].iscsi.HeaderDigest=$1" "node.conn[0].iscsi.DataDigest=$2"
    for of in header data; do
        [ $of = header ] && wanted=$1 || wanted=$2
        case "$wanted $(connection ${of}_digest)" in
        "CRC32C 1" | "None 0") ;;
        *) fail "the $of digest is $(connection ${of}_digest), where $wanted was asked for" ;;
        esac
    done
    verify small --rw=randrw --bs=4k --iodepth=16 --size=4m --verify_backlog=128
    verify large --rw=write --bs=256k --iodepth=4 --size=8m --offset=8m
    detach
}
digests() {
    host_do export "$INITIATOR"
    digest_io CRC32C None
    digest_io None CRC32C
    digest_io CRC32C CRC32C
}

# allocated MIB: whether no replica has more than that in its pool.
allocated() {
    host_do allocated
    bytes=${reply#ACK ok }
    [ "$bytes" -le $(($1 << 20)) ]
}

ext4() {
    host_do export "$INITIATOR"
    attach
    step "discard everything"
    blkdiscard "$D"
    await 20 "the space to come back" allocated 4
    step "mkfs"
    mkfs.ext4 -q -F -E lazy_itable_init=1 "$D"
    mount -t ext4 "$D" /mnt
    step "write files"
    mkdir /mnt/a
    for n in 1 2 3 4 5 6 7 8 9 10 11 12; do
        dd if=/dev/urandom of=/mnt/a/f$n bs=37k count=$((n * 4)) 2>/dev/null
    done
    (cd /mnt && md5sum a/*) >/tmp/sums
    dd if=/dev/zero of=/mnt/large bs=1M count=96 conv=fsync 2>/dev/null
    ! allocated 96 || fail "96 MiB were written, and no replica has them: $reply"
    step "fstrim"
    rm /mnt/large
    sync
    fstrim -v /mnt
    await 20 "what was trimmed to come back to the pools" allocated 80
    step "md5 with cold caches"
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    mount -t ext4 "$D" /mnt
    (cd /mnt && md5sum -c /tmp/sums) >/tmp/md5 || fail "$(grep -vc OK /tmp/md5) files differ"
    umount /mnt
    step "fsck"
    e2fsck -fn "$D" >/tmp/fsck 2>&1 || fail "fsck: $(tail -2 /tmp/fsck | tr '\n' ' ')"
    detach
}

reinstated() { [ "$(session state)" = LOGGED_IN ] && [ "$(lost)" -gt "$1" ]; }

reinstatement() {
    host_do export "$INITIATOR"
    attach
    before=$(lost)
    load reinstated --rw=randrw --bs=4k --iodepth=8 --size=24m --verify_backlog=256 --rate_iops=300,300
    step "the connection breaks"
    host_do reset-initiators
    await 20 "the session to be reinstated" reinstated "$before"
    still_loaded
    step "the connection breaks while there is no iscsid"
    before=$(lost)
    kill -9 $(pidof iscsid)
    host_do reset-initiators
    [ "$(session state)" = FAILED ] || fail "the session is $(session state), and nobody has reinstated it"
    iscsid || fail "iscsid does not start again"
    await 20 "the session to be reinstated" reinstated "$before"
    still_loaded
    end_load
    host_do sessions
    [ "$reply" = "ACK ok 1" ] || fail "cairn tells of other sessions: $reply"
    detach
}

OTHER=iqn.2026-11.test:other
KEY=0xca1

# The kernel's write through a path: whether it is done.
can_write() { dd if=/dev/zero of="$1" bs=4k count=1 seek=1000 oflag=direct conv=notrunc 2>/tmp/write; }

reservation() {
    host_do export "$INITIATOR $OTHER"
    attach
    first=$D
    step "another initiator"
    iscsiadm -m iface -I other -o new >/dev/null
    iscsiadm -m iface -I other -o update -n iface.initiatorname -v $OTHER >/dev/null
    timeout 30 iscsiadm -m discovery -t sendtargets -p "$PORTAL" -I other >/dev/null
    log_in -I other || fail "login: $(tail -1 /tmp/login)"
    await 20 "two disks" have_disks 2
    second=$(disks | grep -v "^$first\$")
    can_write "$second" || fail "a write without reservations: $(cat /tmp/write)"
    step "register and reserve"
    sg_persist -n --out --register --param-sark=$KEY "$first"
    sg_persist -n --out --reserve --param-rk=$KEY --prout-type=5 "$first"
    sg_persist -n --in --read-reservation "$second" >/tmp/reservation
    grep -q "Key=$KEY" /tmp/reservation || fail "the other is told $(cat /tmp/reservation)"
    grep -q "Write Exclusive, registrants only" /tmp/reservation || fail "of another type: $(cat /tmp/reservation)"
    can_write "$first" || fail "a write of the holder: $(cat /tmp/write)"
    step "the other conflicts"
    ! can_write "$second" || fail "it wrote"
    dd if="$second" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/read || fail "it may not read: $(cat /tmp/read)"
    ! sg_persist -n --out --reserve --param-rk=$KEY --prout-type=5 "$second" 2>/dev/null || fail "it reserved"
    step "the other registers, and preempts"
    sg_persist -n --out --register --param-sark=0xbeef "$second"
    can_write "$second" || fail "a registrant's write: $(cat /tmp/write)"
    sg_persist -n --out --preempt --param-rk=0xbeef --param-sark=$KEY --prout-type=5 "$second"
    ! can_write "$first" || fail "who was preempted wrote"
    sg_persist -n --out --clear --param-rk=0xbeef "$second"
    can_write "$first" || fail "a write after it all was cleared: $(cat /tmp/write)"
    detach
    iscsiadm -m iface -I other -o delete >/dev/null
    host_do export "$INITIATOR"
}

# report DEVICE: what a controller is told of reservations.
report() { nvme resv-report "$1" --namespace-id=1 --eds --numd=255 >/tmp/report; }
says() { grep -q "^ *$1 *: $2\$" /tmp/report || fail "$1 is not $2: $(tr '\n' ' ' </tmp/report)"; }

# Hosts of NVMe and initiators of iSCSI, and two hosts, each with a controller: what is sent to that is its host's.
both_transports() {
    host_do export "$INITIATOR"
    attach
    step "hosts of NVMe"
    modprobe nvme-tcp
    await 5 "the driver" test -c /dev/nvme-fabrics
    first=11111111-1111-1111-1111-111111111111
    other=22222222-2222-2222-2222-222222222222
    for host in $first $other; do
        # nvme-cli takes the second for the first.
        printf 'transport=tcp,traddr=%s,trsvcid=%s,nqn=%s,hostid=%s,hostnqn=%s,nr_io_queues=1' "$ADDR" "$PORT" "$NQN" \
            $host nqn.2014-08.org.nvmexpress:uuid:$host >/dev/nvme-fabrics
    done
    await 20 "a disk" device
    N=$(device)
    step "register, and reserve"
    nvme resv-register /dev/nvme0 --namespace-id=1 --nrkey=0xa1 --rrega=0
    nvme resv-register /dev/nvme1 --namespace-id=1 --nrkey=0xb2 --rrega=0
    ! nvme resv-register /dev/nvme1 --namespace-id=1 --nrkey=0xb3 --rrega=0 2>/dev/null || fail "it registered twice"
    sg_persist -n --out --register --param-sark=$KEY "$D"
    nvme resv-acquire /dev/nvme0 --namespace-id=1 --crkey=0xa1 --rtype=1 --racqa=0
    ! nvme resv-acquire /dev/nvme1 --namespace-id=1 --crkey=0xb2 --rtype=1 --racqa=0 2>/dev/null || fail "it reserved"
    report /dev/nvme1
    says rtype 1
    says regctl 3
    says rkey a1
    says rkey b2
    says rkey ${KEY#0x}
    sg_persist -n --in --read-keys "$D" >/tmp/keys
    grep -qi 0xa1 /tmp/keys || fail "the initiator is told $(cat /tmp/keys)"
    ! can_write "$D" || fail "the initiator wrote"
    step "the initiator preempts a host"
    sg_persist -n --out --preempt --param-rk=$KEY --param-sark=0xa1 --prout-type=1 "$D"
    can_write "$D" || fail "a write of the holder: $(cat /tmp/write)"
    ! can_write "$N" || fail "a host wrote"
    dd if="$N" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/read || fail "a host may not read: $(cat /tmp/read)"
    nvme get-log /dev/nvme0 --log-id=0x80 --log-len=64 --raw-binary >/tmp/notice
    [ "$(od -An -tu1 -j8 -N1 /tmp/notice | tr -d ' ')" = 1 ] || fail "the host is told $(od -An -tu1 /tmp/notice)"
    step "the other host preempts the initiator, and aborts"
    nvme resv-acquire /dev/nvme1 --namespace-id=1 --crkey=0xb2 --prkey=$KEY --rtype=3 --racqa=2
    report /dev/nvme0
    says rtype 3
    says regctl 1
    ! can_write "$D" || fail "who was preempted wrote"
    step "cleared"
    nvme resv-release /dev/nvme1 --namespace-id=1 --crkey=0xb2 --rrela=1
    can_write "$D" || fail "a write after it all was cleared: $(cat /tmp/write)"
    can_write "$N" || fail "a host's: $(cat /tmp/write)"
    nvme disconnect -n "$NQN" >/dev/null
    detach
}

replica_kill() {
    host_do export "$INITIATOR"
    attach
    load kill --rw=randrw --bs=4k --iodepth=16 --size=32m --verify_backlog=512 --rate_iops=600,600
    step "kill a replica"
    host_do kill-replica
    sleep 1
    still_loaded
    host_do expect-degraded
    end_load
    verify after --rw=randrw --bs=16k --iodepth=8 --size=16m --offset=256m --verify_backlog=128
    detach
}

begin
run_case iscsi-access access
run_case iscsi-chap chap
run_case iscsi-digests digests
run_case iscsi-ext4 ext4
run_case iscsi-reinstatement reinstatement
run_case iscsi-reservation reservation
run_case iscsi-nvme-reservation both_transports
run_case iscsi-replica-kill replica_kill
finish
