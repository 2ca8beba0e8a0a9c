# shellcheck shell=bash
# Sourced by tests/bench/upgrade and tests/bench/supervise after figures.sh: tasks with our shim,
# installed as a package does, and $silence, who asks it.

manifest=$here/../Cargo.toml
cargo build --quiet --manifest-path "$manifest" --release -p recoverd
cargo build --quiet --manifest-path "$manifest" --profile shim -p recoverd-shim
cargo build --quiet --manifest-path "$manifest" -p recoverd-tests --example bench-silence
silence=$(target_folder)/debug/examples/bench-silence
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$manifest" | head -n1)
# Beside each other: recoverd finds the shim there.
mkdir "$folder/bin"
cp "$(target_folder)/release/recoverd" "$folder/bin"
install_shim() { # version that it says it is, as long as the true one
    LC_ALL=C sed "s/${version//./\\.}/$1/g" "$(target_folder)/shim/containerd-shim-recoverd-v1" >"$folder/bin/new"
    chmod 755 "$folder/bin/new"
    mv "$folder/bin/new" "$folder/bin/containerd-shim-recoverd-v1"
}
install_shim "$version"

run_tasks() { # how many, four at a time: creating is not what is measured
    seq 1 "$1" | xargs -P 4 -I '{}' "$here/node" --in "$host_init" "$programs/ctr" --namespace bench \
        run --detach --null-io --env PATH=/bin --runtime "$folder/bin/containerd-shim-recoverd-v1" \
        --rootfs "$cache/rootfs" 'task-{}' sleep 1000000
    printf 'node: containerd %s, %s tasks with our shim, %s cores, load %s\n' \
        "$(cat "$programs/VERSION")" "$1" "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg)"
}
shims_now() { inside pgrep -f 'containerd-shim-recoverd-v1 -namespace bench .*-address' | sort; }
milliseconds() { printf '%d.%d ms' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }
