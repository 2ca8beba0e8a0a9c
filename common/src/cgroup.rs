//! Where a process's cgroups are, on cgroup v1, v2 and the hybrid of both, and how the kernel
//! writes numbers there. Reads below the given roots only; never changes anything.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    read::{read_file, read_text},
    seen::Seen,
};

/// Longest file of a cgroup that is read, bytes. `memory.stat` has 2 KiB, `cgroup.procs` of a
/// group with a hundred thousand processes less than one MiB.
pub const MAX_FILE: u64 = 4 << 20;

/// Where the kernel shows processes and cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
    /// `/sys/kernel/mm/hugepages`, a folder for each size of huge page that the machine has.
    pub hugepages: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            cgroup: "/sys/fs/cgroup".into(),
            hugepages: "/sys/kernel/mm/hugepages".into(),
        }
    }
}

/// One line of `/proc/<pid>/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Controllers of a v1 hierarchy; `name=systemd` for a named one; empty for v2.
    pub controllers: Vec<String>,
    /// The group's path below the hierarchy's root, `/` for the root itself.
    pub path: String,
}

impl Membership {
    /// The v2 line, `0::/path`.
    pub fn is_unified(&self) -> bool {
        self.controllers.is_empty()
    }
}

/// Parses `/proc/<pid>/cgroup`; lines of another form are skipped, the kernel adds fields at
/// the end only.
pub fn parse_memberships(text: &str) -> Vec<Membership> {
    let line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some(Membership {
            controllers: controllers
                .split(',')
                .filter(|c| !c.is_empty())
                .map(str::to_owned)
                .collect(),
            path: path.to_owned(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// The cgroups of one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cgroup {
    /// One folder per v1 controller (also on hybrid hosts, where v2 has no controllers).
    V1(Vec<(String, PathBuf)>),
    /// The folder in the one v2 hierarchy.
    V2(PathBuf),
}

impl Cgroup {
    /// The cgroups of `pid`. Read it once, at Create: an init that is itself a service manager
    /// moves into a group of its own below.
    pub fn of(roots: &Roots, pid: i32) -> Seen<Self> {
        read_text(&roots.proc.join(pid.to_string()).join("cgroup"), MAX_FILE)
            .and_then(|text| Self::of_memberships(roots, &parse_memberships(&text)))
    }

    /// The cgroups that `/proc/<pid>/cgroup` named when it was read (the record keeps it).
    pub fn of_memberships(roots: &Roots, memberships: &[Membership]) -> Seen<Self> {
        let unified = roots.cgroup.join("cgroup.controllers").exists();
        match Self::locate(roots, memberships, unified, &mount_roots(roots)) {
            Some(cgroup) => Seen::Present(cgroup),
            None => Seen::Absent,
        }
    }

    /// Pure part of [`Cgroup::of`]; `mounts` as of [`parse_mount_roots`].
    fn locate(
        roots: &Roots,
        memberships: &[Membership],
        unified: bool,
        mounts: &[(PathBuf, String)],
    ) -> Option<Self> {
        if unified {
            let own = memberships.iter().find(|m| m.is_unified())?;
            return Some(Self::V2(folder(&roots.cgroup, &own.path, mounts)));
        }
        let folders: Vec<_> = memberships
            .iter()
            .flat_map(|m| m.controllers.iter().map(move |c| (c, &m.path)))
            .filter(|(controller, _)| !controller.starts_with("name="))
            .map(|(controller, path)| {
                (
                    controller.clone(),
                    folder(&roots.cgroup.join(controller), path, mounts),
                )
            })
            .collect();
        (!folders.is_empty()).then_some(Self::V1(folders))
    }

    /// The folder of `controller`; on v2 it is the same for all.
    pub fn folder(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V1(folders) => folders
                .iter()
                .find(|(name, _)| name == controller)
                .map(|(_, path)| path.as_path()),
            Self::V2(path) => Some(path),
        }
    }

    /// A folder whose `cgroup.procs` lists every process of the task: `pids`, else `memory`, else
    /// the first there is.
    pub fn any_folder(&self) -> Option<&Path> {
        match self {
            Self::V1(folders) => self
                .folder("pids")
                .or_else(|| self.folder("memory"))
                .or_else(|| folders.first().map(|(_, path)| path.as_path())),
            Self::V2(path) => Some(path),
        }
    }
}

/// Where `path` of a hierarchy that is mounted at `mount` is. When only a part of the hierarchy
/// is mounted there (containerd inside a container on cgroup v1), the kernel's path begins with
/// that part and the folder does not.
fn folder(mount: &Path, path: &str, mounts: &[(PathBuf, String)]) -> PathBuf {
    let below = mounts
        .iter()
        .find(|(point, root)| point == mount && root != "/")
        .and_then(|(_, root)| Path::new(path).strip_prefix(root).ok())
        .map_or(path, |rest| rest.to_str().unwrap_or(path));
    mount.join(below.trim_start_matches('/'))
}

/// Mount point and root of every cgroup mount in `/proc/self/mountinfo`; none when it cannot be
/// read, which is right on every ordinary host.
fn mount_roots(roots: &Roots) -> Vec<(PathBuf, String)> {
    match read_text(&roots.proc.join("self/mountinfo"), MAX_FILE) {
        Seen::Present(text) => parse_mount_roots(&text),
        Seen::Absent | Seen::Unknown(_) => Vec::new(),
    }
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAGS] - TYPE SOURCE OPTIONS`.
pub fn parse_mount_roots(text: &str) -> Vec<(PathBuf, String)> {
    let line = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let kind = back.split(' ').next()?;
        if !matches!(kind, "cgroup" | "cgroup2") {
            return None;
        }
        let mut fields = front.split(' ').skip(3);
        let root = fields.next()?.to_owned();
        Some((PathBuf::from(fields.next()?), root))
    };
    text.lines().filter_map(line).collect()
}

/// One number, the only content of its file. `max` is `u64::MAX`; negative numbers, with which v1
/// files may say *none*, are 0.
pub fn parse_number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        text if text.starts_with('-') => text.parse::<i128>().ok().map(|_| 0),
        text => text.parse().ok(),
    }
}

/// `key number` lines; a line of another form is skipped.
pub fn parse_pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, parse_number(value)?))
    })
}

/// The number in `folder/file`.
pub fn read_number(folder: &Path, file: &str) -> Seen<u64> {
    read_text(&folder.join(file), MAX_FILE).and_then(|text| match parse_number(&text) {
        Some(number) => Seen::Present(number),
        None => Seen::Unknown(format!("{file} is not a number")),
    })
}

/// The pids in `folder/cgroup.procs`. A pid of another pid namespace is shown as 0 and left out.
pub fn read_procs(folder: &Path) -> Seen<Vec<i32>> {
    read_file(&folder.join("cgroup.procs"), MAX_FILE).map(|bytes| {
        String::from_utf8_lossy(&bytes)
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid > 0)
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    // Recorded in `ctr run` containers: Linux 6.18 with hybrid cgroups, and 6.1 with v2.
    const HYBRID: &str = "9:name=systemd:/default/c1\n8:pids:/default/c1\n7:blkio:/default/c1\n\
                          4:memory:/default/c1\n2:cpu,cpuacct:/default/c1\n0::/\n";
    const UNIFIED: &str = "0::/system.slice/default-c1.scope\n";

    fn roots() -> Roots {
        Roots {
            proc: "/p".into(),
            cgroup: "/c".into(),
            ..Roots::default()
        }
    }

    #[test]
    fn each_v1_controller_has_a_folder_and_v2_one_for_all() {
        let all = parse_memberships(HYBRID);
        assert_eq!(all.len(), 6);
        let v1 = Cgroup::locate(&roots(), &all, false, &[]).unwrap();
        assert_eq!(
            v1.folder("cpuacct"),
            Some(Path::new("/c/cpuacct/default/c1"))
        );
        assert_eq!(v1.folder("hugetlb"), None);
        assert_eq!(v1.any_folder(), Some(Path::new("/c/pids/default/c1")));

        let v2 = Cgroup::locate(&roots(), &parse_memberships(UNIFIED), true, &[]).unwrap();
        let folder = Path::new("/c/system.slice/default-c1.scope");
        assert_eq!(v2.folder("memory"), Some(folder));
        assert_eq!(v2.any_folder(), Some(folder));

        assert_eq!(
            Cgroup::locate(&roots(), &parse_memberships("0::/\n"), false, &[]),
            None
        );
        assert_eq!(Cgroup::locate(&roots(), &all[..5], true, &[]), None);
        assert_eq!(
            parse_memberships("x\n1:\n2:a,b:/x:y\n"),
            [Membership {
                controllers: vec!["a".into(), "b".into()],
                path: "/x:y".into(),
            }]
        );
    }

    #[test]
    fn a_hierarchy_that_is_mounted_in_part_loses_that_part_of_the_path() {
        // Recorded in a container with cgroup v1 mounts of its own.
        let mounts = parse_mount_roots(
            "31 23 0:28 / /c rw,relatime - tmpfs tmpfs rw\n\
             35 31 0:32 /docker/d1 /c/memory ro,nosuid master:11 - cgroup cgroup rw,memory\n\
             41 31 0:38 / /c/unified rw,relatime - cgroup2 cgroup2 rw\nbroken\n",
        );
        assert_eq!(mounts.len(), 2);
        let memory = |path| folder(Path::new("/c/memory"), path, &mounts);
        assert_eq!(
            memory("/docker/d1/default/c1"),
            Path::new("/c/memory/default/c1")
        );
        assert_eq!(memory("/elsewhere"), Path::new("/c/memory/elsewhere"));
    }

    #[test]
    fn numbers_are_read_as_the_kernel_writes_them() {
        for (text, number) in [
            ("12\n", Some(12)),
            ("max\n", Some(u64::MAX)),
            ("-1\n", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            ("1 2", None),
        ] {
            assert_eq!(parse_number(text), number, "{text:?}");
        }
        let pairs: Vec<_> = parse_pairs("a 1\nb max\nbad\nc d\n").collect();
        assert_eq!(pairs, [("a", 1), ("b", u64::MAX)]);
    }

    #[test]
    fn a_process_is_found_below_the_given_roots() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            proc: dir.path().join("p"),
            cgroup: dir.path().join("c"),
            ..Roots::default()
        };
        fs::create_dir_all(roots.proc.join("7")).unwrap();
        fs::write(roots.proc.join("7/cgroup"), UNIFIED).unwrap();
        assert_eq!(Cgroup::of(&roots, 8), Seen::Absent);
        assert_eq!(Cgroup::of(&roots, 7), Seen::Absent);
        let own = roots.cgroup.join("system.slice/default-c1.scope");
        fs::create_dir_all(&own).unwrap();
        fs::write(roots.cgroup.join("cgroup.controllers"), "cpu memory\n").unwrap();
        assert_eq!(
            Cgroup::of(&roots, 7),
            Seen::Present(Cgroup::V2(own.clone()))
        );
        fs::write(own.join("cgroup.procs"), "7\n0\n9\n").unwrap();
        assert_eq!(read_procs(&own), Seen::Present(vec![7, 9]));
        fs::write(own.join("pids.max"), "max\n").unwrap();
        assert_eq!(read_number(&own, "pids.max"), Seen::Present(u64::MAX));
        assert_eq!(read_number(&own, "pids.current"), Seen::Absent);
    }
}
