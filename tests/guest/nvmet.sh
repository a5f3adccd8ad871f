# A reference target for the harness's own proof: the kernel's nvmet-tcp over a memory-backed disk.
# Takes "stop" and "start" from the harness, which stand for the death and return of a nexus.
set -e
modprobe nvmet-tcp
modprobe null_blk nr_devices=0
mount -t configfs none /sys/kernel/config 2>/dev/null
B=/sys/kernel/config/nullb/b0
mkdir $B
echo 1024 >$B/size
echo 4096 >$B/blocksize
echo 1 >$B/memory_backed
echo 1 >$B/discard
echo 1 >$B/power
N=/sys/kernel/config/nvmet
mkdir $N/subsystems/"$NQN"
echo 1 >$N/subsystems/"$NQN"/attr_allow_any_host
mkdir $N/subsystems/"$NQN"/namespaces/1
echo /dev/b0 >$N/subsystems/"$NQN"/namespaces/1/device_path
echo 1 >$N/subsystems/"$NQN"/namespaces/1/enable
P=$N/ports/1
mkdir $P
echo tcp >$P/addr_trtype
echo ipv4 >$P/addr_adrfam
echo "$GUEST_IP" >$P/addr_traddr
echo "$PORT" >$P/addr_trsvcid
start() { ln -s $N/subsystems/"$NQN" $P/subsystems/"$NQN"; }
stop() { rm $P/subsystems/"$NQN"; }
start && echo "SERVING" >&9
while read -r verb <&9; do
    case $verb in
    start | stop) $verb && echo "DONE $verb" >&9 ;;
    quit) break ;;
    esac
done
dmesg | tail -20
