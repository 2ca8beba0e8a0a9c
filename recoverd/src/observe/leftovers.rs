//! What may be left behind: socket files, mounts, fifos, execs; and how full `/run` is.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use recoverd_common::{
    exec_files::pid_files,
    mounts::{self, Mount},
    paths,
    proc::{Proc, Stat},
    seen::Seen,
};

use super::{Plan, bundles::changed_at, processes};
use crate::facts::{
    BundleFacts, CgroupFacts, Exec, FifoFolder, Filesystem, Gap, Instance, RuncEntry, Shim,
    SocketFile, TaskName,
};

/// What [`observe`] found.
pub struct Leftovers {
    /// Files in the socket folder.
    pub sockets: Vec<SocketFile>,
    /// The mount table.
    pub mounts: Seen<Vec<Mount>>,
    /// When the folders of mount points were last changed.
    pub mount_ages: HashMap<PathBuf, SystemTime>,
    /// Fifo folders; their users are not known yet.
    pub fifos: Vec<FifoFolder>,
    /// Fill of the file systems.
    pub filesystems: Vec<Filesystem>,
}

/// Looks at all of them.
pub fn observe(plan: &Plan, instances: &[Instance], gaps: &mut Vec<Gap>) -> Leftovers {
    let roots = &plan.roots;
    let mounts = mounts::read(&roots.proc);
    if let Seen::Unknown(why) = &mounts {
        gaps.push(Gap::new("mounts", why.clone()));
    }
    let states: Vec<&Path> = instances
        .iter()
        .filter_map(|i| i.state.as_deref())
        .collect();
    let below_bundles = |mount: &&Mount| {
        states
            .iter()
            .any(|state| mount.point.starts_with(state.join(paths::TASK_PLUGIN)))
    };
    let mount_ages = mounts
        .present()
        .map_or(&[][..], Vec::as_slice)
        .iter()
        .filter(below_bundles)
        .filter_map(|mount| Some((mount.point.clone(), changed_at(mount.point.parent()?)?)))
        .collect();
    Leftovers {
        sockets: sockets(&roots.socket_dir, gaps),
        mount_ages,
        fifos: fifos(&roots.fifo_dir, instances),
        filesystems: filesystems(
            plan,
            &states,
            mounts.present().map_or(&[], Vec::as_slice),
            gaps,
        ),
        mounts,
    }
}

fn sockets(dir: &Path, gaps: &mut Vec<Gap>) -> Vec<SocketFile> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            gaps.push(Gap::new(dir.display().to_string(), error.to_string()));
            return Vec::new();
        }
    };
    let mut found: Vec<SocketFile> = entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(paths::is_socket_name)
        })
        .map(|entry| SocketFile {
            path: entry.path(),
            changed_at: changed_at(&entry.path()),
            is_socket: entry.file_type().is_ok_and(|kind| kind.is_socket()),
        })
        .collect();
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Fifo folders of clients and of each instance's CRI plugin.
fn fifos(dir: &Path, instances: &[Instance]) -> Vec<FifoFolder> {
    let mut found = Vec::new();
    for folder in folders(dir) {
        found.extend(fifo_folder(folder, None));
    }
    for (index, instance) in instances.iter().enumerate() {
        let Some(state) = &instance.state else {
            continue;
        };
        let containers = state.join("io.containerd.grpc.v1.cri/containers");
        for container in folders(&containers) {
            for folder in folders(&container.join("io")) {
                found.extend(fifo_folder(folder, Some(index)));
            }
        }
    }
    found
}

/// Folders directly below `dir`, sorted; none if it cannot be listed.
fn folders(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

fn fifo_folder(path: PathBuf, instance: Option<usize>) -> Option<FifoFolder> {
    let ids: BTreeSet<String> = fs::read_dir(&path)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_fifo()))
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let stem = ["-stdin", "-stdout", "-stderr"]
                .iter()
                .find_map(|s| name.strip_suffix(s))?;
            Some(stem.to_owned())
        })
        .collect();
    (!ids.is_empty()).then(|| FifoFolder {
        changed_at: changed_at(&path),
        path,
        ids,
        instance,
        users: Seen::Unknown("not looked at: its task is there".into()),
    })
}

/// Finds out who has the fifos open that belong to no task that is there.
pub fn fifo_users(
    proc: &Proc,
    mut fifos: Vec<FifoFolder>,
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
    table: &Seen<HashMap<i32, Stat>>,
) -> Vec<FifoFolder> {
    let lives = |entry: &&RuncEntry| {
        let init = entry.state.present().and_then(|state| state.init);
        // What cannot be told counts as living.
        init.is_none_or(|init| {
            table
                .present()
                .is_none_or(|table| table.get(&init.pid).is_some_and(|s| s.id == init))
        })
    };
    let mut known: BTreeSet<&str> = runc
        .iter()
        .filter(lives)
        .map(|entry| entry.name.1.as_str())
        .collect();
    known.extend(bundles.iter().map(|facts| facts.bundle.id.as_str()));
    let unowned = |folder: &FifoFolder| !folder.ids.iter().any(|id| known.contains(id.as_str()));
    let files = |folder: &FifoFolder| -> Vec<PathBuf> {
        let names = |id: &String| ["stdin", "stdout", "stderr"].map(|s| format!("{id}-{s}"));
        folder
            .ids
            .iter()
            .flat_map(names)
            .map(|name| folder.path.join(name))
            .collect()
    };
    let wanted: BTreeSet<PathBuf> = fifos
        .iter()
        .filter(|f| unowned(f))
        .flat_map(files)
        .collect();
    if wanted.is_empty() {
        return fifos;
    }
    let users = processes::users_of(proc, &wanted);
    for folder in fifos.iter_mut().filter(|folder| unowned(folder)) {
        let mine = files(folder);
        let has = |open: &BTreeSet<PathBuf>| mine.iter().any(|file| open.contains(file));
        let mut pids: Vec<i32> = users
            .iter()
            .filter(|(_, open)| has(open))
            .map(|(pid, _)| *pid)
            .collect();
        pids.sort_unstable();
        folder.users = table.clone().map(|_| pids);
    }
    fifos
}

/// The living execs: children of a shim that are in a task's cgroup and are not its init.
pub fn execs(
    proc: &Proc,
    shims: &[Shim],
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
    table: &Seen<HashMap<i32, Stat>>,
    cgroups: &[CgroupFacts],
) -> Vec<Exec> {
    let Some(table) = table.present() else {
        return Vec::new();
    };
    let shim_pids: BTreeSet<i32> = shims.iter().map(|shim| shim.id.pid).collect();
    let inits: BTreeSet<i32> = runc
        .iter()
        .filter_map(|entry| Some(entry.state.present()?.init?.pid))
        .collect();
    let mut whose: HashMap<i32, &TaskName> = HashMap::new();
    for cgroup in cgroups {
        if let (Some(name), Seen::Present(processes)) = (&cgroup.name, &cgroup.processes) {
            whose.extend(processes.iter().map(|process| (process.id.pid, name)));
        }
    }
    let mut found: Vec<Exec> = table
        .values()
        .filter(|stat| {
            stat.alive() && shim_pids.contains(&stat.ppid) && !inits.contains(&stat.id.pid)
        })
        .filter_map(|stat| {
            let name = *whose.get(&stat.id.pid)?;
            let bundle = bundles
                .iter()
                .map(|facts| &facts.bundle)
                .find(|bundle| bundle.namespace.as_str() == name.0 && bundle.id.as_str() == name.1);
            let exec_id = bundle.and_then(|bundle| {
                let files = pid_files(&bundle.path).into_iter();
                let mut named = files.filter(|file| file.pid == stat.id.pid);
                Some(named.next()?.id.to_string())
            });
            let fifos = exec_id
                .as_deref()
                .map_or(Vec::new(), |id| open_fifos(proc, stat.ppid, id));
            Some(Exec {
                id: stat.id,
                shim: stat.ppid,
                name: name.clone(),
                exec_id,
                fifos,
                fifo_users: Seen::Absent,
            })
        })
        .collect();
    found.sort_by_key(|exec| exec.id);
    let wanted: BTreeSet<PathBuf> = found.iter().flat_map(|exec| exec.fifos.clone()).collect();
    if wanted.is_empty() {
        return found;
    }
    let users = processes::users_of(proc, &wanted);
    for exec in &mut found {
        let others = users.iter().filter(|(pid, open)| {
            **pid != exec.shim
                && **pid != exec.id.pid
                && exec.fifos.iter().any(|f| open.contains(f))
                // Our shim's: it is no client.
                && !processes::holds_for_a_shim(proc, **pid)
        });
        let mut pids: Vec<i32> = others.map(|(pid, _)| *pid).collect();
        pids.sort_unstable();
        exec.fifo_users = Seen::Present(pids);
    }
    found
}

fn open_fifos(proc: &Proc, shim: i32, exec_id: &str) -> Vec<PathBuf> {
    let names = ["stdin", "stdout", "stderr"].map(|stream| format!("{exec_id}-{stream}"));
    let descriptors = proc.descriptors(shim);
    let mut found: Vec<PathBuf> = descriptors
        .present()
        .map_or(&[][..], Vec::as_slice)
        .iter()
        .map(|descriptor| descriptor.target.clone())
        .filter(|target| {
            target
                .file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| names.iter().any(|x| x == n))
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

fn filesystems(
    plan: &Plan,
    states: &[&Path],
    mounts: &[Mount],
    gaps: &mut Vec<Gap>,
) -> Vec<Filesystem> {
    let mut places: Vec<&Path> = vec![&plan.roots.socket_dir];
    places.extend(states);
    let mut devices = BTreeSet::new();
    let mut found = Vec::new();
    for place in places {
        let meta = match fs::metadata(place) {
            Ok(meta) => meta,
            // A node without any containerd yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                gaps.push(Gap::new(place.display().to_string(), error.to_string()));
                continue;
            }
        };
        let stat = match nix::sys::statvfs::statvfs(place) {
            Ok(stat) => stat,
            Err(error) => {
                gaps.push(Gap::new(
                    format!("room on {}", place.display()),
                    error.to_string(),
                ));
                continue;
            }
        };
        if !devices.insert(meta.dev()) {
            continue;
        }
        let block = stat.fragment_size();
        let top = mounts
            .iter()
            .filter(|mount| place.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.as_os_str().len());
        let mut system = Filesystem {
            path: place.to_owned(),
            tmpfs: top.is_some_and(|mount| mount.kind == "tmpfs" || mount.kind == "ramfs"),
            bytes: (
                stat.blocks().saturating_mul(block),
                stat.blocks_available().saturating_mul(block),
            ),
            inodes: (stat.files(), stat.files_available()),
            eaters: Vec::new(),
        };
        if let Some(top) = top
            && system.tmpfs
            && system.used_percent() >= plan.limits.run_full
        {
            system.eaters = eaters(&top.point, meta.dev());
        }
        found.push(system);
    }
    found
}

impl Filesystem {
    /// How full it is, percent: of bytes or of inodes, whichever is worse.
    pub fn used_percent(&self) -> u64 {
        let used = |(all, free): (u64, u64)| {
            all.saturating_sub(free)
                .saturating_mul(100)
                .checked_div(all)
                .unwrap_or(0)
        };
        used(self.bytes).max(used(self.inodes))
    }
}

/// Files and folders directly below `top`, with what they hold, the five largest.
fn eaters(top: &Path, device: u64) -> Vec<(PathBuf, u64)> {
    let Ok(entries) = fs::read_dir(top) else {
        return Vec::new();
    };
    let mut budget = 200_000_u32;
    let mut sizes: Vec<(PathBuf, u64)> = entries
        .flatten()
        .map(|entry| {
            let path = entry.path();
            let size = size_of(&path, device, 0, &mut budget);
            (path, size)
        })
        .collect();
    sizes.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    sizes.truncate(5);
    sizes
}

fn size_of(path: &Path, device: u64, depth: u32, budget: &mut u32) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return 0;
    };
    // Other file systems are not this one's eaters; a node has bounds, and so has this walk.
    if meta.dev() != device || depth > 32 || *budget == 0 {
        return 0;
    }
    *budget = budget.saturating_sub(1);
    let mut size = meta.blocks().saturating_mul(512);
    if meta.is_dir()
        && let Ok(entries) = fs::read_dir(path)
    {
        for entry in entries.flatten() {
            let inner = size_of(&entry.path(), device, depth.saturating_add(1), budget);
            size = size.saturating_add(inner);
        }
    }
    size
}
