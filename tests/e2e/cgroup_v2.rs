//! cgroup v2 with every controller, which this machine may not have: in a vm. What it runs there
//! are this project's own tests, and a container in a cgroup of systemd's making.

use std::fs;
use std::path::{Path, PathBuf};

use recoverd_tests::{InVm, Release, run_in_vm};

recoverd_tests::tests! {
    in_a_vm: [stats_and_oom_kills_are_told_on_cgroup_v2_in_a_vm],
}

/// The binary of another test file, built beside this one's.
#[track_caller]
fn test_binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_else(|error| panic!("find this test: {error}"));
    let folder = own.parent().unwrap_or(Path::new("/nonexistent"));
    let built = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("read {}: {error}", folder.display()))
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_none())
        .filter(|path| {
            let stem = path.file_name().and_then(|name| name.to_str());
            stem.and_then(|stem| stem.rsplit_once('-'))
                .is_some_and(|(stem, _)| stem == name)
        });
    // Older builds stay there.
    built
        .max_by_key(|path| fs::metadata(path).and_then(|file| file.modified()).ok())
        .unwrap_or_else(|| panic!("{name} is not built: cargo build --workspace --tests"))
}

/// A container whose cgroup systemd makes, as `SystemdCgroup = true` has it for pods. `ctr` asks
/// for one of the stock runtime only: here our shim has its name and comes first in PATH.
const SYSTEMD: &str = r#"
    cp /root/recoverd/target/shim/containerd-shim-recoverd-v1 /usr/local/bin/containerd-shim-runc-v2
    systemctl start containerd
    ctr events >/tmp/events &
    eats='while [ ! -e /tmp/eat ]; do usleep 20000; done; exec tail /dev/zero'
    ctr run -d --runc-systemd-cgroup --cgroup system.slice:recoverd:sd --memory-limit 16777216 \
        --rootfs /usr/share/box/rootfs sd /bin/sh -c "$eats"
    systemctl is-active recoverd-sd.scope
    readlink /proc/[0-9]*/exe | grep containerd-shim
    ctr task metrics --format json sd
    ctr task exec --exec-id eat sd /bin/touch /tmp/eat
    for try in $(seq 600); do
        if grep -q /tasks/oom /tmp/events && ctr task list | grep -q STOPPED; then break; fi
        sleep 0.2
    done
    grep -E '/tasks/(oom|exit)' /tmp/events
    ctr task delete sd || echo "deleted with $?"
    systemctl is-active recoverd-sd.scope || echo no scope
"#;

fn stats_and_oom_kills_are_told_on_cgroup_v2_in_a_vm() {
    let release = Release::available()
        .pop()
        .unwrap_or_else(|| panic!("no release of containerd"));
    let node = Path::new(env!("CARGO_MANIFEST_DIR")).join("node");
    let cache = release.folder.parent().unwrap_or(Path::new("/nonexistent"));
    let inside = Path::new("/root/.cache/recoverd");
    let mut files = vec![
        format!("{0}:{0}", node.display()),
        "/usr/bin/tini:/usr/bin/tini".to_owned(),
    ];
    for name in ["containerd-shim-recoverd-v1", "recoverd"] {
        let from = recoverd_tests::built(name);
        files.push(format!("{}:/e2e/{name}", from.display()));
    }
    for name in ["shim_stats", "cri_survival"] {
        let from = test_binary(name);
        files.push(format!("{}:/e2e/deps/{name}", from.display()));
    }
    let release_folder = format!("containerd-{}", release.name);
    for name in [&*release_folder, "rootfs", "busybox.tar", "pause.tar"] {
        let (from, to) = (cache.join(name), inside.join(name));
        files.push(format!("{}:{}", from.display(), to.display()));
    }
    let suffix = release_folder.replace(['-', '.'], "_");
    let line = format!(
        "export RECOVERD_CACHE={cache}; test -e /sys/fs/cgroup/cgroup.controllers
         systemctl stop containerd
         /e2e/deps/shim_stats --exact stats_are_the_stock_shims_field_by_field::{suffix}
         /e2e/deps/cri_survival --exact an_oom_kill_is_told_in_a_downtime_and_without_one
         {SYSTEMD}",
        cache = inside.display()
    );
    let InVm { code, text } = run_in_vm(&files, 580, &line);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(
        text.matches("test result: ok. 1 passed").count(),
        2,
        "{text}"
    );
    let said = text.rsplit("test result: ok").next().unwrap_or_default();
    for words in [
        "active\n",
        "/usr/local/bin/containerd-shim-runc-v2\n",
        "\"usage_limit\": 16777216",
        "/tasks/oom",
        "\"exit_status\":137",
        "no scope\n",
    ] {
        assert!(said.contains(words), "no {words:?} in {text}");
    }
}
