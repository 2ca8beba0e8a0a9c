//! cgroup v2 with every controller, which this machine may not have: in a vm. What it runs there
//! are this project's own tests, and pods and a container in cgroups of systemd's making.

use std::fs;
use std::path::{Path, PathBuf};

use recoverd_tests::{InVm, Release, readme, readme_words, run_in_vm};

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
/// for one of the stock runtime only: here our shim has its name and comes first in PATH. inotify
/// is used up by then, as on a node with many containers of stock shims.
const SYSTEMD: &str = r#"
    cp /root/recoverd/target/shim/containerd-shim-recoverd-v1 /usr/local/bin/containerd-shim-runc-v2
    systemctl start containerd
    instances=$(cat /proc/sys/fs/inotify/max_user_instances)
    echo 1 >/proc/sys/fs/inotify/max_user_instances
    ctr events >/tmp/events &
    eats='while [ ! -e /tmp/eat ]; do usleep 20000; done; exec tail /dev/zero'
    ctr run -d --runc-systemd-cgroup --cgroup system.slice:recoverd:sd --memory-limit 16777216 \
        --rootfs /usr/share/box/rootfs sd /bin/sh -c "$eats"
    systemctl is-active recoverd-sd.scope
    readlink /proc/[0-9]*/exe | grep containerd-shim
    ctr task metrics --format json sd
    ctr task exec --exec-id eat sd /bin/touch /tmp/eat
    for try in $(seq 600); do
        if grep -q /tasks/oom /tmp/events && grep -q '"exit_status":137' /tmp/events &&
            ctr task list | grep -q STOPPED; then break; fi
        sleep 0.2
    done
    grep -E '/tasks/(oom|exit)' /tmp/events
    ! grep -q /tasks/oom /tmp/events || echo "sd: its OOM kill is told"
    ctr task delete sd || echo "deleted with $?"
    systemctl is-active recoverd-sd.scope || echo no scope
    echo $instances >/proc/sys/fs/inotify/max_user_instances
"#;

/// The same once more, of a container whose shim is dead then: its scope, with the kernel's counter,
/// has gone before a successor comes.
const LATE: &str = r#"
    # An emulated processor needs a multiple of the usual 5 s.
    mkdir -p /etc/recoverd
    printf '[adopt]\ndeadline = "60s"\n' >/etc/recoverd/config.toml
    eats='while [ ! -e /tmp/late ]; do usleep 20000; done; exec tail /dev/zero'
    ctr run -d --runc-systemd-cgroup --cgroup system.slice:recoverd:late --memory-limit 16777216 \
        --rootfs /usr/share/box/rootfs late /bin/sh -c "$eats"
    systemctl stop containerd
    kill -KILL $(pgrep --full -- '-id [l]ate ')
    touch /usr/share/box/rootfs/tmp/late
    for try in $(seq 600); do
        test -e /sys/fs/cgroup/system.slice/recoverd-late.scope || break
        sleep 0.2
    done
    /e2e/recoverd --address /run/containerd/containerd.sock pre-start --deadline 120s
    systemctl start containerd
    ctr events >/tmp/late-events &
    # Who comes in the middle of the first telling hears of both at the second.
    told() { grep -oE '/tasks/(oom|exit)' /tmp/late-events | tail -n 2 | tr '\n' ' '; }
    for try in $(seq 300); do
        if [ "$(told)" = '/tasks/oom /tasks/exit ' ]; then break; fi
        sleep 0.2
    done
    echo "late: $(told)"
"#;

/// Pods in systemd's cgroups by every release, each configured as the README says. The image of
/// sandboxes is none of the README's affair: whichever the release asks for is there.
const PODS: &str = r#"
    install /root/recoverd/target/shim/containerd-shim-recoverd-v1 /usr/local/bin/
    mkdir -p /etc/containerd /etc/systemd/system/containerd.service.d
    cp /e2e/recoverd-runc.toml /etc/containerd/
    for release in 1.6 1.7 2.1; do
        programs=$RECOVERD_CACHE/containerd-$release
        systemctl stop containerd
        printf '[Service]\nExecStart=\nExecStart=%s\n' $programs/containerd \
            >/etc/systemd/system/containerd.service.d/50-release.conf
        cp /e2e/config-$release.toml /etc/containerd/config.toml
        systemctl daemon-reload
        systemctl start containerd
        echo "containerd $release, $(ctr version | grep -A1 Server)"
        sandbox=$($programs/containerd config dump | sed -nE "s/^ *sandbox(_image)? = ['\"](.+)['\"]$/\2/p")
        for image in pause busybox; do
            $programs/ctr --namespace k8s.io images import $RECOVERD_CACHE/$image.tar
        done
        $programs/ctr --namespace k8s.io images tag --force localhost/pause:latest $sandbox
        /e2e/pods-of-systemd $sandbox
    done
    systemctl stop containerd
    rm /etc/systemd/system/containerd.service.d/50-release.conf /etc/containerd/config.toml
    systemctl daemon-reload
"#;

/// Files for [`PODS`], word for word from the README; written into `folder`.
fn configurations(folder: &Path) -> Vec<String> {
    let said = "where `/etc/containerd/recoverd-runc.toml` has the line `";
    let line = readme_words(said, "`");
    let files = [
        ("config-1.6.toml", readme("Older ones", "toml")),
        ("config-1.7.toml", readme("containerd 1.7 from", "toml")),
        ("config-2.1.toml", readme("containerd 2.x:", "toml")),
        ("recoverd-runc.toml", line + "\n"),
    ];
    let write = |(name, text): (&str, String)| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
        format!("{}:/e2e/{name}", path.display())
    };
    files.map(write).to_vec()
}

fn stats_and_oom_kills_are_told_on_cgroup_v2_in_a_vm() {
    let release = Release::available()
        .pop()
        .unwrap_or_else(|| panic!("no release of containerd"));
    let node = Path::new(env!("CARGO_MANIFEST_DIR")).join("node");
    let cache = release.folder.parent().unwrap_or(Path::new("/nonexistent"));
    let inside = Path::new("/root/.cache/recoverd");
    let mut files = vec![
        format!("{}:/e2e/node", node.display()),
        "/usr/bin/tini:/usr/bin/tini".to_owned(),
    ];
    for name in ["containerd-shim-recoverd-v1", "recoverd", "pods-of-systemd"] {
        let from = recoverd_tests::built(name);
        files.push(format!("{}:/e2e/{name}", from.display()));
    }
    for name in ["shim_stats", "cri_survival"] {
        let from = test_binary(name);
        files.push(format!("{}:/e2e/deps/{name}", from.display()));
    }
    let release_folder = format!("containerd-{}", release.name);
    let folders = Release::available();
    let folders: Vec<String> = folders
        .iter()
        .map(|release| format!("containerd-{}", release.name))
        .collect();
    assert_eq!(folders.len(), 3, "not every release is there");
    let images = ["rootfs", "busybox.tar", "pause.tar"];
    for name in folders.iter().map(String::as_str).chain(images) {
        let (from, to) = (cache.join(name), inside.join(name));
        files.push(format!("{}:{}", from.display(), to.display()));
    }
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("make a folder: {error}"));
    files.extend(configurations(folder.path()));
    let suffix = release_folder.replace(['-', '.'], "_");
    let line = format!(
        "export RECOVERD_CACHE={cache}; test -e /sys/fs/cgroup/cgroup.controllers
         systemctl stop containerd
         # Where it was built; below /tmp there is another file system than was copied to.
         mkdir -p {place}; cp /e2e/node {place}/
         /e2e/deps/shim_stats --exact stats_are_the_stock_shims_field_by_field::{suffix}
         /e2e/deps/cri_survival --exact an_oom_kill_is_told_in_a_downtime_and_without_one
         {PODS}
         {SYSTEMD}
         {LATE}",
        cache = inside.display(),
        place = env!("CARGO_MANIFEST_DIR"),
    );
    let InVm { code, text } = run_in_vm(&files, 1100, &line);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(
        text.matches("test result: ok. 1 passed").count(),
        2,
        "{text}"
    );
    assert_eq!(
        text.matches("pods-of-systemd: all well").count(),
        3,
        "{text}"
    );
    let said = text.rsplit("test result: ok").next().unwrap_or_default();
    for words in [
        "active\n",
        "/usr/local/bin/containerd-shim-runc-v2\n",
        "\"usage_limit\": 16777216",
        "sd: its OOM kill is told\n",
        "\"exit_status\":137",
        "no scope\n",
        "late: /tasks/oom /tasks/exit ",
    ] {
        assert!(said.contains(words), "no {words:?} in {text}");
    }
}
