#!/bin/bash
# Runs in a vm of tests/systemd-box, for tests/e2e/older_kernel.rs, which judges what this leaves in
# /box/out: tasks of both shims are adopted by the hook of containerd.service, then end in every way.
set -euo pipefail
out=/box/out
mkdir -p $out/records /root/share
cd /root

# KIND-ID RUNTIME COMMAND [OPTION of ctr run...]: all of one kind in one shim, as a pod's are
run() {
    local id=$1 runtime=$2 command=$3
    shift 3
    ctr run --detach --runtime "$runtime" --annotation "io.containerd.runc.v2.group=${id%-*}" --mount type=bind,src=/root/share,dst=/mnt,options=rbind:rw "$@" \
        --rootfs /usr/share/box/rootfs "$id" /bin/sh -c "$command" </dev/null >/dev/null
}
exits_with() { echo "trap 'exit $1' TERM; while :; do sleep 1000 & wait \$!; done"; }
init_of() { cat "/run/containerd/io.containerd.runtime.v2.task/default/$1/init.pid"; }
# Those that serve: what holds their outputs has no address.
shims() { pgrep --full "containerd-shim-$1 .*-address" || :; }
# LIMIT in seconds, then a command that must succeed within them
within() {
    local until=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $until ] || { echo "in vain: $*"; exit 1; }
        sleep 0.2
    done
}

uname -r >$out/kernel
bash /root/install
# An emulated processor, and those who run beside it, need a multiple of the usual 5 s.
mkdir -p /etc/recoverd
printf '[adopt]\ndeadline = "15s"\n' >/etc/recoverd/config.toml
for shim in stock:io.containerd.runc.v2 ours:io.containerd.recoverd.v1; do
    kind=${shim%%:*} runtime=${shim#*:}
    run "$kind-zero" "$runtime" "$(exits_with 0)"
    run "$kind-some" "$runtime" "$(exits_with 23)"
    run "$kind-killed" "$runtime" "$(exits_with 1)"
    run "$kind-oom" "$runtime" 'while [ ! -e /mnt/eat ]; do usleep 200000; done; exec tail /dev/zero' \
        --memory-limit 33554432
    ctr task exec --detach --exec-id session "$kind-zero" /bin/sh -c "$(exits_with 7)" </dev/null >/dev/null
done
score_before=$(cat /proc/"$(shims recoverd-v1 | head -n1)"/oom_score_adj)

systemctl stop containerd
killed="$(shims runc-v2) $(shims recoverd-v1)"
echo $killed | wc -w >$out/killed
kill -KILL $killed
systemctl start containerd
journalctl --sync
journalctl --quiet --unit containerd --output cat --grep '^recoverd: ' >$out/journal

for pid in $(shims recoverd-v1); do
    echo "$score_before $(cat /proc/$pid/oom_score_adj)"
done >$out/oom-scores
# Sockets of the connector's protocol, by whose they are.
for pid in $(shims recoverd-v1); do
    awk -v pid="$pid" '$2 == 11 && $3 == pid' /proc/net/netlink
done | wc -l >$out/listeners
for id in ours-zero ours-oom stock-zero stock-oom; do
    ctr task metrics "$id" >"$out/metrics-$id"
done

ctr events >$out/events 2>&1 &
events=$!
# It listens when it tells of something.
said() {
    ctr container label ours-zero seen=yes >/dev/null
    grep -q /containers/update $out/events
}
within 200 said
for kind in stock ours; do
    pid=$(ctr task ps "$kind-zero" | awk '/session/ { print $1 }')
    kill -TERM "$pid"
    ended() { grep -q "/tasks/exit.*\"$kind-zero\".*\"session\"" $out/events; }
    within 200 ended
    kill -TERM "$(init_of "$kind-zero")" "$(init_of "$kind-some")"
    kill -KILL "$(init_of "$kind-killed")"
done
touch share/eat
ended() { [ "$(grep -c '/tasks/exit' $out/events)" -ge 10 ]; }
within 200 ended
sleep 1 # nothing more comes, or it is seen
kill $events
cp /run/containerd/s/*.record $out/records/

# Ends that only the supervisor sees: its connector has been there since before. No successor of a
# shim of ours comes up before they are seen; containerd, whose hook adopts what a stock shim left, is
# down.
mkdir $out/seen
cat >/root/late-shim <<'SCRIPT'
#!/bin/sh
[ -e /root/share/now ] || exit 1
# What the supervisor has ordered by now is written: an end that it sees after that.
if [ -e /root/share/between ]; then
    kill -TERM "$(cat /root/share/between)"
    while kill -0 "$(cat /root/share/between)"; do sleep 0.1; done
fi
exec /usr/local/bin/containerd-shim-recoverd-v1 "$@"
SCRIPT
chmod 755 /root/late-shim
printf '[adopt]\ndeadline = "60s"\nbinary = "/root/late-shim"\n' >/etc/recoverd/config.toml
bash /root/supervise
run late io.containerd.recoverd.v1 "$(exits_with 41)"
run gone io.containerd.runc.v2 "$(exits_with 43)"
ctr task exec --detach --exec-id session late /bin/sh -c "$(exits_with 42)" </dev/null >/dev/null
session=$(ctr task ps late | awk '/session/ { print $1 }')
ends="$session $(init_of late) $(init_of gone)"
supervisor=$(systemctl show --property MainPID --value recoverd)
watched() { grep -qsE "^Pid:[[:space:]]+$1\$" /proc/"$supervisor"/fdinfo/*; }
for pid in $ends; do within 200 watched "$pid"; done
systemctl stop containerd
# shellcheck disable=SC2046 # two pids
kill -KILL $(pgrep --full -- '-id (late|gone) ')
# First the exec: the end of its init would end it as well.
kill -TERM "$session"
has_ended() { ! kill -0 "$session" 2>/dev/null; }
within 200 has_ended
# shellcheck disable=SC2086 # two pids
kill -TERM ${ends#* }
witnessed() { [ "$(grep -oE '"status":4[123]\b' /run/recoverd/witnessed.json | sort -u | wc -l)" = 3 ]; }
within 200 witnessed
cp /run/recoverd/witnessed.json $out/seen/
touch share/now
systemctl start containerd
recorded() { cat /run/containerd/s/*.record | grep -qE "\"status\": ?$1\b"; }
for status in 41 42 43; do within 200 recorded $status; done
mkdir $out/seen/records
cp /run/containerd/s/*.record $out/seen/records/

# An end between the supervisor's order and the successor's look.
run window io.containerd.recoverd.v1 "trap 'exit 44' TERM; : >/mnt/window; while :; do sleep 1000 & wait \$!; done"
window=$(init_of window)
# Its trap is set: the signal comes at once, and once.
within 60 test -e share/window
within 60 watched "$window"
echo "$window" >share/between
kill -KILL "$(pgrep --full -- '-id [w]indow ')"
within 120 recorded 44
cp /run/recoverd/witnessed.json $out/seen/
cp /run/containerd/s/*.record $out/seen/records/
