//! The machine itself.

use std::time::{Duration, UNIX_EPOCH};

use recoverd_common::{mounts, proc::Proc, read, seen::Seen};

use super::Roots;
use crate::facts::{Gap, Host};

/// Reads what identifies the machine and this boot.
pub fn observe(roots: &Roots, gaps: &mut Vec<Gap>) -> Host {
    let proc = Proc::new(&roots.proc);
    let text = |name: &str| read::read_text(&roots.proc.join(name), 4096);
    let line = |name: &str| {
        text(name)
            .present()
            .map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned())
    };
    let booted = match proc.boot_time() {
        Seen::Present(seconds) => seconds,
        Seen::Absent | Seen::Unknown(_) => {
            gaps.push(Gap::new(
                "the time of boot",
                format!("{} tells none", roots.proc.join("stat").display()),
            ));
            0
        }
    };
    let root = nix::unistd::geteuid().is_root();
    if !root {
        gaps.push(Gap::new("shims, their answers and descriptors", "not root"));
    }
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK);
    Host {
        name: line("sys/kernel/hostname"),
        kernel: line("sys/kernel/osrelease"),
        boot_id: proc.boot_id().present().cloned(),
        booted_at: UNIX_EPOCH
            .checked_add(Duration::from_secs(booted))
            .unwrap_or(UNIX_EPOCH),
        // 100 on every Linux that containerd runs on.
        ticks: ticks
            .ok()
            .flatten()
            .and_then(|t| u64::try_from(t).ok())
            .unwrap_or(100),
        cgroup: cgroup_mode(roots),
        root,
    }
}

/// Which cgroup hierarchies are mounted below the cgroup root.
fn cgroup_mode(roots: &Roots) -> &'static str {
    let mounts = mounts::read(&roots.proc);
    let kinds: Vec<&str> = mounts.present().map_or(Vec::new(), |mounts| {
        let below = |m: &&mounts::Mount| m.point.starts_with(&roots.cgroup);
        mounts
            .iter()
            .filter(below)
            .map(|m| m.kind.as_str())
            .collect()
    });
    match (kinds.contains(&"cgroup"), kinds.contains(&"cgroup2")) {
        (true, true) => "hybrid",
        (true, false) => "v1",
        (false, true) => "v2",
        (false, false) => "none",
    }
}
