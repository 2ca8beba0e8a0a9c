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

/// The executable of a process's parent.
fn shim_of(pid: u32) -> PathBuf {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.map_or("", str::trim);
    fs::read_link(format!("/proc/{parent}/exe")).unwrap_or_default()
}

fn main() {
    let sandbox = std::env::args().nth(1).unwrap_or_default();
    let folder = Path::new("/root/pods");
    let prepared = fs::create_dir_all(folder).and_then(|()| {
        let eat = folder.join("eat");
        if eat.exists() {
            fs::remove_file(eat)
        } else {
            Ok(())
        }
    });
    prepared.unwrap_or_else(|error| panic!("prepare {}: {error}", folder.display()));
    let cri = Cri::of_machine(folder, SLICE);
    cri.wait_for(&[IMAGE, &sandbox]);
    // Without a handler: the default runtime.
    let pod = cri.try_run_pod("web-0", "");
    let pod = pod.unwrap_or_else(|refused| panic!("run pod: {refused:?}"));
    let app = ContainerSpec::until_term("app", 23).memory_limit(64 << 20);
    let app = cri.run(&pod, &app);
    let line = "while [ ! -e /mnt/eat ]; do usleep 20000; done; exec tail /dev/zero";
    let eater = cri.run(
        &pod,
        &ContainerSpec::shell("eater", line).memory_limit(16 << 20),
    );
    let all = [&pod.id, &app, &eater];
    for id in all {
        assert!(is_active(id), "systemd has no scope of {id}");
        assert!(number(id, "pids.current") > 0, "{id} is not in its scope");
    }
    assert_eq!(number(&app, "memory.max"), 64 * MIB);
    let shim = shim_of(cri.pid(&app));
    assert_eq!(
        shim,
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

    let told = fs::write(folder.join("eat"), "");
    told.unwrap_or_else(|error| panic!("tell the eater: {error}"));
    wait_for("an OOM kill", || {
        let (code, why) = cri.exited(&eater);
        assert_eq!(code, 137);
        // It is an event of its own, and follows.
        (why == "OOMKilled").then_some(())
    });
    cri.stop(&app, 30);
    assert_eq!(cri.exited(&app), (23, "Error".into()));
    for id in [&eater, &app] {
        cri.remove(id);
    }
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    for id in all {
        wait_for("systemd to forget a scope", || {
            (!is_active(id) && !scope(id).exists()).then_some(())
        });
    }
    println!("pods-of-systemd: all well");
}
