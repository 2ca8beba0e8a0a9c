# shellcheck shell=bash
# Sourced by tests/demo and tests/bench/*: a host of its own (tests/node) with one containerd, for
# scripts that show or measure. It is up when this returns and goes when the script ends.
#
# Gives: $cache $programs $folder $host_init; inside, ctr (namespace $namespace), start_containerd,
# stop_containerd, target_folder.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
"$here/setup"
cache=${RECOVERD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/recoverd}
for release in ${RELEASE:-2.1 1.7 1.6}; do
    [ -s "$cache/containerd-$release/VERSION" ] && break
done
programs=$cache/containerd-$release
[ -s "$programs/VERSION" ] || { echo "containerd $release could not be had, see above" >&2; exit 1; }

# The name is one that `tests/node --sweep` knows.
host_name=recoverd-test-$$-script
folder=$(mktemp -d "${TMPDIR:-/tmp}/$host_name.XXXXXX")
mkfifo "$folder/ready"
"$here/node" "$host_name" "$folder" >"$folder/ready" 2>"$folder/node.log" &
host=$!
end_of_host() {
    # Its PID 1: with it everything in the node ends.
    [ -z "${host_init-}" ] || kill -KILL "$host_init" 2>/dev/null || :
    "$here/node" --gone "$host_name"
    kill -KILL "$host" 2>/dev/null || :
    wait "$host" 2>/dev/null || :
    rm -rf "$folder"
}
trap end_of_host EXIT
trap 'exit 130' INT TERM
read -r _ <"$folder/ready" || { cat "$folder/node.log" >&2; exit 1; }
host_init=$(tr -d ' ' <"/proc/$host/task/$host/children")

inside() { "$here/node" --in "$host_init" "$@"; }
ctr() { inside "$programs/ctr" --namespace "$namespace" "$@"; }

cat >"$folder/config.toml" <<TOML
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
TOML
start_containerd() {
    NODE_PIDFILE=$folder/containerd.pid inside env \
        "PATH=$programs:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
        "$programs/containerd" --config "$folder/config.toml" >>"$folder/containerd.log" 2>&1 &
    containerd=$!
    until ctr version >/dev/null 2>&1; do
        kill -0 "$containerd" 2>/dev/null || { tail "$folder/containerd.log" >&2; exit 1; }
        sleep 0.02
    done
}
stop_containerd() {
    inside kill -KILL "$(cat "$folder/containerd.pid")"
    wait "$containerd" 2>/dev/null || :
}

# Where cargo builds to.
target_folder() {
    cargo metadata --format-version 1 --no-deps --manifest-path "$here/../Cargo.toml" |
        sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}
