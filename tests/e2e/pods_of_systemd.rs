//! A pod whose cgroups systemd makes, through the CRI of the machine's own containerd: the life of
//! one, its numbers, an OOM kill, and nothing left. `cgroup_v2.rs` runs it in a vm, as
//! `pods-of-systemd SANDBOX-IMAGE`, after it has configured containerd as the README says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use recoverd_tests::{ContainerSpec, Cri, wait_for};

const IMAGE: &str = "localhost/busybox:latest";
/// As kubelet names those of pods without guarantees.
const SLICE: &str = "kubepods-burstable.slice";
const MIB: u64 = 1 << 20;

/// The folder of a scope below the pods' slice.
fn scope(id: &str) -> PathBuf {
    let slices = "/sys/fs/cgroup/kubepods.slice";
    Path::new(slices)
        .join(SLICE)
        .join(format!("cri-containerd-{id}.scope"))
}

/// systemd's word on a scope.
fn is_active(id: &str) -> bool {
    let unit = format!("cri-containerd-{id}.scope");
    let mut systemctl = Command::new("systemctl");
    let status = systemctl.args(["is-active", "--quiet", &unit]).status();
    status.is_ok_and(|status| status.success())
}

fn number(id: &str, file: &str) -> u64 {
    let path = scope(id).join(file);
    let text = fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
    let number = text.trim().parse();
    number.unwrap_or_else(|error| panic!("{}: {text:?}: {error}", path.display()))
}

fn parent(pid: u32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.map_or("", str::trim).to_owned()
}

fn signal(pid: &str, name: &str) {
    let sent = Command::new("kill").args(["-s", name, pid]).status();
    assert!(sent.is_ok_and(|status| status.success()), "kill {pid}");
}

/// The eater of this round begins.
fn eat(folder: &Path, round: usize) {
    let path = folder.join(format!("eat-{round}"));
    fs::write(&path, "").unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
}

fn main() {
    let sandbox = std::env::args().nth(1).unwrap_or_default();
    let folder = Path::new("/root/pods");
    for left in [1, 2].map(|round| folder.join(format!("eat-{round}"))) {
        if left.exists() {
            fs::remove_file(&left).unwrap_or_else(|e| panic!("remove {}: {e}", left.display()));
        }
    }
    fs::create_dir_all(folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
    let cri = Cri::of_machine(folder, SLICE);
    cri.wait_for(&[IMAGE, &sandbox]);
    // Without a handler: the default runtime.
    let pod = cri.try_run_pod("web-0", "");
    let pod = pod.unwrap_or_else(|refused| panic!("run pod: {refused:?}"));
    let app = ContainerSpec::until_term("app", 23).memory_limit(64 << 20);
    let app = cri.run(&pod, &app);
    let run_eater = |round: usize| {
        let line =
            format!("while [ ! -e /mnt/eat-{round} ]; do usleep 20000; done; exec tail /dev/zero");
        let name = format!("eater-{round}");
        let eater = ContainerSpec::shell(&name, &line).memory_limit(16 << 20);
        cri.run(&pod, &eater)
    };
    let mut eaters = vec![run_eater(1)];
    for id in [&pod.id, &app, &eaters[0]] {
        assert!(is_active(id), "systemd has no scope of {id}");
        assert!(number(id, "pids.current") > 0, "{id} is not in its scope");
    }
    assert_eq!(number(&app, "memory.max"), 64 * MIB);
    let shim = parent(cri.pid(&app));
    assert_eq!(
        fs::read_link(format!("/proc/{shim}/exe")).unwrap_or_default(),
        Path::new("/usr/local/bin/containerd-shim-recoverd-v1")
    );

    assert_eq!(cri.sh(&app, "echo well; exit 3"), (3, "well\n".into()));
    let stats = cri.stats(&app);
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
    assert!(cpu.as_ref().is_some_and(|n| n.value > 0), "{cpu:?}");
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes);
    let within = |n: u64| n > 0 && n <= 64 * MIB;
    assert!(
        memory.as_ref().is_some_and(|n| within(n.value)),
        "{memory:?}"
    );

    eat(folder, 1);
    cri.wait_oom_killed(&eaters[0]);
    // systemd removes the scope, and the kernel's count with it, the moment it is empty: it may come
    // before any shim that looks.
    eaters.push(run_eater(2));
    signal(&shim, "STOP");
    eat(folder, 2);
    wait_for("systemd to remove the scope", || {
        (!scope(&eaters[1]).exists()).then_some(())
    });
    signal(&shim, "CONT");
    cri.wait_oom_killed(&eaters[1]);
    cri.stop(&app, 30);
    assert_eq!(cri.exited(&app), (23, "Error".into()));
    for id in eaters.iter().chain([&app]) {
        cri.remove(id);
    }
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    for id in eaters.iter().chain([&pod.id, &app]) {
        wait_for("systemd to forget a scope", || {
            (!is_active(id) && !scope(id).exists()).then_some(())
        });
    }
    println!("pods-of-systemd: all well");
}
