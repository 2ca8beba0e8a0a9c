//! What surrounds the shim's process: cgroup, OOM score, limits, umask, priority, environment.
//! Captured for the record; restored by a successor before it serves, wherever it was started
//! from (SPEC 5.10); and set by `start` for the daemon.

use std::{
    fmt, fs, io,
    path::{Component, Path, PathBuf},
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    stat::{Mode, umask},
};
use recoverd_common::{
    cgroup::{Membership, Roots, parse_memberships},
    read::read_text,
    record::Context,
    seen::Seen,
};

use crate::sys;

/// Longest file of `/proc` read here.
const MAX_PROC: u64 = 64 << 10;
/// The largest `oom_score_adj` that the kernel takes.
const OOM_SCORE_MAX: i32 = 1000;

/// Environment variables that the shim's children need, or that say who the shim belongs to. Not
/// all: containerd's environment may hold secrets (proxies with passwords), and the record lasts.
pub const KEPT_VARIABLES: [&str; 6] = [
    "PATH",
    "TTRPC_ADDRESS",
    "GRPC_ADDRESS",
    "NAMESPACE",
    "MAX_SHIM_VERSION",
    "TMPDIR",
];

/// The limits by the names that `prlimit(1)` uses.
const LIMITS: [(&str, Resource); 16] = [
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

// ---- capture ----

/// What surrounds this process now. What cannot be read is left at its default, which
/// [`restore`] leaves alone.
pub fn capture(roots: &Roots) -> Context {
    let own = roots.proc.join("self");
    let text = |file: &str| match read_text(&own.join(file), MAX_PROC) {
        Seen::Present(text) => text,
        Seen::Absent | Seen::Unknown(_) => String::new(),
    };
    let rlimits = LIMITS
        .iter()
        .filter_map(|(name, resource)| Some(((*name).to_owned(), getrlimit(*resource).ok()?)))
        .collect();
    let env = KEPT_VARIABLES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
        .collect();
    Context {
        cgroup: text("cgroup").lines().map(str::to_owned).collect(),
        oom_score_adj: text("oom_score_adj").trim().parse().unwrap_or(0),
        rlimits,
        umask: parse_umask(&text("status")).unwrap_or(0o022),
        nice: parse_nice(&text("stat")).unwrap_or(0),
        env,
    }
}

/// `Umask:\t0022` of `/proc/<pid>/status`. Asking the kernel by umask(2) would change it.
fn parse_umask(status: &str) -> Option<u32> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(value.trim(), 8).ok()
}

/// Field 19 of `/proc/<pid>/stat`; the second field is a name in parentheses that may hold both
/// blanks and parentheses.
fn parse_nice(stat: &str) -> Option<i32> {
    let (_, after) = stat.rsplit_once(')')?;
    // The first of these is field 3.
    after.split_ascii_whitespace().nth(16)?.parse().ok()
}

// ---- restore ----

/// What could not be restored, one line each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unrestored(pub Vec<String>);

impl fmt::Display for Unrestored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

/// Gives this process the surroundings of its predecessor. Goes on after a failure (a machine may
/// forbid a negative OOM score, a cgroup may be gone) and says what it could not do. The
/// environment is not set here: a successor is started with it.
pub fn restore(roots: &Roots, context: &Context) -> Unrestored {
    let mut unrestored = Unrestored::default();
    let mut tell = |what: &str, result: io::Result<()>| {
        if let Err(e) = result {
            unrestored.0.push(format!("{what}: {e}"));
        }
    };
    for membership in parse_memberships(&context.cgroup.join("\n")) {
        if let Some(folder) = hierarchy(roots, &membership) {
            let folder = folder.join(membership.path.trim_start_matches('/'));
            let joined = fs::write(folder.join("cgroup.procs"), std::process::id().to_string());
            tell(&format!("join cgroup {}", folder.display()), joined);
        }
    }
    // Raising a soft limit below the hard one always works; raising a hard one needs a capability.
    for (name, (soft, hard)) in &context.rlimits {
        if let Some((_, resource)) = LIMITS.iter().find(|(known, _)| known == name)
            && getrlimit(*resource).ok() != Some((*soft, *hard))
        {
            let set = setrlimit(*resource, *soft, *hard).map_err(io::Error::from);
            tell(&format!("set limit {name}"), set);
        }
    }
    umask(Mode::from_bits_truncate(context.umask & 0o777));
    let now = capture(roots);
    if now.nice != context.nice {
        tell("set priority", sys::set_nice(context.nice));
    }
    // Last: everything before this may still need memory that the score protects.
    if now.oom_score_adj != context.oom_score_adj {
        let path = roots.proc.join("self/oom_score_adj");
        tell(
            "set oom_score_adj",
            fs::write(path, context.oom_score_adj.to_string()),
        );
    }
    unrestored
}

/// Where the hierarchy of `membership` is mounted; none when this host does not show it.
fn hierarchy(roots: &Roots, membership: &Membership) -> Option<PathBuf> {
    let candidates = match membership.controllers.as_slice() {
        // v2: the root itself, or beside v1.
        [] => [roots.cgroup.clone(), roots.cgroup.join("unified")],
        [first, ..] => {
            let joint = membership.controllers.join(",");
            let name = first.strip_prefix("name=").unwrap_or(first);
            [roots.cgroup.join(name), roots.cgroup.join(joint)]
        }
    };
    candidates
        .into_iter()
        .find(|folder| folder.join("cgroup.procs").exists())
}

// ---- for `start` ----

/// Why the shim is not in the cgroup that the options ask for.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A path that leads out of the hierarchy.
    #[error("shim cgroup {0:?} is not a path below the cgroup root")]
    NotBelow(String),
    /// No hierarchy has it.
    #[error("shim cgroup {0:?} does not exist")]
    Missing(String),
    /// As it says.
    #[error("move shim into cgroup {}: {cause}", path.display())]
    Join {
        /// The group.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// Moves `pid` into `group` of every hierarchy that has it (the v2 one on v2), as the stock
/// `start` does with `shim_cgroup`. Groups are not made: who names one has set its limits.
pub fn join_shim_cgroup(roots: &Roots, pid: u32, group: &str) -> Result<(), CgroupError> {
    let below = Path::new(group.trim_start_matches('/'));
    let plain = below
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if below.as_os_str().is_empty() || !plain {
        return Err(CgroupError::NotBelow(group.to_owned()));
    }
    let own = match read_text(&roots.proc.join("self/cgroup"), MAX_PROC) {
        Seen::Present(text) => parse_memberships(&text),
        Seen::Absent | Seen::Unknown(_) => Vec::new(),
    };
    let mut joined = false;
    for folder in own
        .iter()
        .filter_map(|membership| hierarchy(roots, membership))
    {
        let path = folder.join(below);
        if !path.is_dir() {
            continue;
        }
        fs::write(path.join("cgroup.procs"), pid.to_string())
            .map_err(|cause| CgroupError::Join { path, cause })?;
        joined = true;
    }
    if joined {
        Ok(())
    } else {
        Err(CgroupError::Missing(group.to_owned()))
    }
}

/// Makes `pid` a little more likely to be killed than containerd (`parent`), so that containerd
/// outlives its shims and not the other way round. Not fatal: a sandboxed or unprivileged machine
/// forbids it, and a container without this is better than none.
pub fn adjust_oom_score(roots: &Roots, parent: i32, pid: u32) {
    let score = |text: String| text.trim().parse::<i32>().ok();
    let of_parent = roots.proc.join(parent.to_string()).join("oom_score_adj");
    if let Seen::Present(text) = read_text(&of_parent, MAX_PROC)
        && let Some(score) = score(text)
    {
        let score = score.saturating_add(1).min(OOM_SCORE_MAX);
        let _ = fs::write(
            roots.proc.join(pid.to_string()).join("oom_score_adj"),
            score.to_string(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake() -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            proc: dir.path().join("p"),
            cgroup: dir.path().join("c"),
            ..Roots::default()
        };
        fs::create_dir_all(roots.proc.join("self")).unwrap();
        fs::create_dir_all(&roots.cgroup).unwrap();
        (dir, roots)
    }

    fn group(roots: &Roots, path: &str) -> PathBuf {
        let folder = roots.cgroup.join(path);
        fs::create_dir_all(&folder).unwrap();
        for part in folder.ancestors().take_while(|p| *p != roots.cgroup) {
            fs::write(part.join("cgroup.procs"), "").unwrap();
        }
        folder.join("cgroup.procs")
    }

    #[test]
    fn umask_and_nice_are_read_where_the_kernel_shows_them() {
        // Recorded; the name is made worse.
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 39 19 1 0 5 6 7";
        assert_eq!(parse_nice(stat), Some(19));
        assert_eq!(parse_nice("7"), None);
        assert_eq!(
            parse_umask("Name:\tx\nUmask:\t0077\nState:\tS"),
            Some(0o077)
        );
        let own = capture(&Roots::default());
        assert!(own.rlimits.contains_key("nofile") && !own.cgroup.is_empty());
        assert_eq!(
            restore(
                &Roots {
                    cgroup: "/nonexistent".into(),
                    ..Roots::default()
                },
                &own
            ),
            Unrestored::default()
        );
    }

    #[test]
    fn a_successor_joins_its_predecessors_groups_and_says_where_it_could_not() {
        let (_dir, roots) = fake();
        let memory = group(&roots, "memory/system.slice/containerd.service");
        let named = group(&roots, "systemd/x");
        group(&roots, "pids");
        let context = Context {
            cgroup: vec![
                "4:memory:/system.slice/containerd.service".into(),
                "9:name=systemd:/x".into(),
                "8:pids:/gone".into(),
                "3:hugetlb:/not/mounted".into(),
            ],
            umask: 0o22,
            ..Context::default()
        };
        let unrestored = restore(&roots, &context);
        for joined in [memory, named] {
            assert_eq!(
                fs::read_to_string(joined).unwrap(),
                std::process::id().to_string()
            );
        }
        assert_eq!(unrestored.0.len(), 1, "{unrestored}");
        assert!(unrestored.0[0].contains("pids/gone"));
    }

    #[test]
    fn the_shim_cgroup_is_joined_in_every_hierarchy_that_has_it() {
        let (_dir, roots) = fake();
        fs::write(
            roots.proc.join("self/cgroup"),
            "2:cpu,cpuacct:/\n4:memory:/\n0::/\n",
        )
        .unwrap();
        let cpu = group(&roots, "cpu/shims");
        group(&roots, "memory");
        join_shim_cgroup(&roots, 42, "/shims").unwrap();
        assert_eq!(fs::read_to_string(cpu).unwrap(), "42");
        assert!(matches!(
            join_shim_cgroup(&roots, 42, "none"),
            Err(CgroupError::Missing(_))
        ));
        for bad in ["", "/", "../x", "a/../../b"] {
            assert!(
                matches!(
                    join_shim_cgroup(&roots, 42, bad),
                    Err(CgroupError::NotBelow(_))
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_oom_score_is_one_more_than_containerds() {
        let (_dir, roots) = fake();
        for (parent, shim) in [("-999\n", "-998"), ("0\n", "1"), ("1000\n", "1000")] {
            for pid in ["1", "2"] {
                fs::create_dir_all(roots.proc.join(pid)).unwrap();
            }
            fs::write(roots.proc.join("1/oom_score_adj"), parent).unwrap();
            adjust_oom_score(&roots, 1, 2);
            assert_eq!(
                fs::read_to_string(roots.proc.join("2/oom_score_adj")).unwrap(),
                shim
            );
        }
        // Nobody there: nothing happens.
        adjust_oom_score(&roots, 7, 8);
    }
}
