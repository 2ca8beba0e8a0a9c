//! The cgroups of containers: where runc says, where specs say, and what stands below the name
//! of a containerd namespace.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use recoverd_common::{
    cgroup::{parse_memberships, read_procs},
    ids::Id,
    proc::{Proc, ProcessId, Stat},
    read,
    seen::Seen,
};

use super::{Roots, bundles::changed_at};
use crate::facts::{BundleFacts, CgroupFacts, CgroupProcess, Instance, RuncEntry, TaskName};

/// Deeper nesting than this below a container is not walked.
const MAX_DEPTH: usize = 16;
/// More processes than this are not listed for one container.
const MAX_PROCESSES: usize = 100_000;

/// Finds and reads them.
pub fn observe(
    proc: &Proc,
    roots: &Roots,
    instances: &[Instance],
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
    table: &Seen<HashMap<i32, Stat>>,
) -> Vec<CgroupFacts> {
    let hierarchies = hierarchies(roots);
    let mut found: BTreeMap<String, Option<TaskName>> = BTreeMap::new();
    for entry in runc {
        let Some(state) = entry.state.present() else {
            continue;
        };
        // The path is the same in every hierarchy.
        if let Some(path) = state.cgroups.values().find_map(|f| below(&hierarchies, f)) {
            found.insert(path, Some(entry.name.clone()));
        }
    }
    let specs = bundles.iter().filter_map(|facts| {
        let path = facts.bundle.config.present()?.cgroups_path.clone()?;
        let bundle = &facts.bundle;
        Some((path, (bundle.namespace.to_string(), bundle.id.to_string())))
    });
    let records = instances.iter().filter_map(|i| i.api.up()).flat_map(|api| {
        let path = |(name, c): (&TaskName, &crate::facts::Container)| {
            Some((c.cgroups_path.clone()?, name.clone()))
        };
        api.containers.iter().filter_map(path)
    });
    for (path, name) in specs.chain(records) {
        found.entry(spec_path(&path)).or_insert(Some(name));
    }
    for namespace in namespaces(instances, bundles, runc) {
        for hierarchy in &hierarchies {
            let Ok(entries) = fs::read_dir(hierarchy.join(&namespace)) else {
                continue;
            };
            for entry in entries.flatten() {
                let id = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| Id::new(name).ok());
                let folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if let (Some(id), true) = (id, folder) {
                    let name = (namespace.clone(), id.to_string());
                    found
                        .entry(format!("/{namespace}/{id}"))
                        .or_insert(Some(name));
                }
            }
        }
    }
    let inits: BTreeSet<ProcessId> = runc
        .iter()
        .filter_map(|entry| entry.state.present()?.init)
        .collect();
    let found: Vec<_> = found.into_iter().collect();
    found
        .into_par_iter()
        .filter_map(|(path, name)| read_one(proc, &hierarchies, path, name, &inits, table))
        .collect()
}

/// Cgroup paths of the processes that a bundle's `init.pid` names where runc's state does not say
/// who the init is.
pub fn memberships(
    roots: &Roots,
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
) -> HashMap<i32, Seen<Vec<String>>> {
    let told: BTreeSet<(&str, &str)> = runc
        .iter()
        .filter(|entry| entry.state.present().is_some())
        .map(|entry| (entry.name.0.as_str(), entry.name.1.as_str()))
        .collect();
    bundles
        .iter()
        .map(|facts| &facts.bundle)
        .filter(|bundle| !told.contains(&(bundle.namespace.as_str(), bundle.id.as_str())))
        .filter_map(|bundle| {
            let pid = bundle.init_pid.present()?.pid;
            let path = roots.proc.join(pid.to_string()).join("cgroup");
            let paths = read::read_text(&path, 64 << 10).map(|text| {
                parse_memberships(&text)
                    .into_iter()
                    .map(|group| group.path)
                    .collect()
            });
            Some((pid, paths))
        })
        .collect()
}

/// The top folder of every mounted hierarchy.
fn hierarchies(roots: &Roots) -> Vec<PathBuf> {
    let mut found: BTreeSet<PathBuf> = BTreeSet::new();
    let mounts = recoverd_common::mounts::read(&roots.proc);
    for mount in mounts.present().map_or(&[][..], Vec::as_slice) {
        if mount.point.starts_with(&roots.cgroup)
            && matches!(mount.kind.as_str(), "cgroup" | "cgroup2")
        {
            found.insert(mount.point.clone());
        }
    }
    found.into_iter().collect()
}

/// The part of a cgroup's folder below its hierarchy, which is the same in all of them.
fn below(hierarchies: &[PathBuf], folder: &Path) -> Option<String> {
    // The deepest hierarchy counts: a v2 tree may be mounted inside the folder of the others.
    let top = hierarchies
        .iter()
        .filter(|top| folder.starts_with(top))
        .max_by_key(|t| t.as_os_str().len())?;
    let rest = folder.strip_prefix(top).ok()?.to_str()?;
    // The root of a hierarchy is nobody's cgroup.
    (!rest.is_empty()).then(|| format!("/{rest}"))
}

/// `linux.cgroupsPath` as a path: systemd's `slice:prefix:name` becomes the scope's folder.
fn spec_path(text: &str) -> String {
    let mut parts = text.split(':');
    if let (Some(slice), Some(prefix), Some(name), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    {
        // a-b.slice lies in a.slice.
        let stem = slice.strip_suffix(".slice").unwrap_or(slice);
        let mut path = String::new();
        let mut joined = String::new();
        for part in stem.split('-').filter(|part| !part.is_empty()) {
            if !joined.is_empty() {
                joined.push('-');
            }
            joined.push_str(part);
            path.push_str(&format!("/{joined}.slice"));
        }
        return format!("{path}/{prefix}-{name}.scope");
    }
    format!("/{}", text.trim_start_matches('/'))
}

fn namespaces(
    instances: &[Instance],
    bundles: &[BundleFacts],
    runc: &[RuncEntry],
) -> BTreeSet<String> {
    let mut all: BTreeSet<String> = BTreeSet::new();
    all.extend(
        instances
            .iter()
            .filter_map(|i| i.api.up())
            .flat_map(|api| api.namespaces.clone()),
    );
    all.extend(
        bundles
            .iter()
            .map(|facts| facts.bundle.namespace.to_string()),
    );
    all.extend(runc.iter().map(|entry| entry.name.0.clone()));
    all
}

fn read_one(
    proc: &Proc,
    hierarchies: &[PathBuf],
    path: String,
    name: Option<TaskName>,
    inits: &BTreeSet<ProcessId>,
    table: &Seen<HashMap<i32, Stat>>,
) -> Option<CgroupFacts> {
    let relative = path.trim_start_matches('/');
    // A spec is input: it must not lead out of the hierarchy.
    if relative.split('/').any(|part| part == "..") || relative.is_empty() {
        return None;
    }
    let mut found = hierarchies
        .iter()
        .map(|top| top.join(relative))
        .filter(|f| f.is_dir());
    let mut folders = vec![found.next()?];
    // All hierarchies hold the same processes, but one without controllers may hold none: the
    // next is looked at only while none was found, so that *empty* means empty in all of them.
    let mut processes = Seen::Present(Vec::new());
    let mut pids: BTreeSet<i32> = BTreeSet::new();
    let mut at = 0;
    while let Some(folder) = folders.get(at) {
        if let Err(why) = walk(folder, 0, &mut pids) {
            processes = Seen::Unknown(why);
        }
        if !pids.is_empty() {
            break;
        }
        folders.extend(found.next());
        at += 1;
    }
    Some(CgroupFacts {
        changed_at: folders.first().and_then(|folder| changed_at(folder)),
        processes: processes.map(|_: Vec<CgroupProcess>| {
            pids.into_iter()
                .map(|pid| process(proc, pid, inits, table))
                .collect()
        }),
        folders,
        path,
        name,
    })
}

fn process(
    proc: &Proc,
    pid: i32,
    inits: &BTreeSet<ProcessId>,
    table: &Seen<HashMap<i32, Stat>>,
) -> CgroupProcess {
    let stat = table.present().and_then(|table| table.get(&pid));
    let first_of_namespace = || {
        let inner = proc.namespace_pids(pid);
        let inner = inner.present().map_or(&[][..], Vec::as_slice);
        inner.len() > 1 && inner.last() == Some(&1)
    };
    CgroupProcess {
        id: ProcessId {
            pid,
            start_time: stat.map_or(0, |stat| stat.id.start_time),
        },
        ppid: stat.map_or(0, |stat| stat.ppid),
        // Of an init that runc names nobody asks, and most processes are one.
        first_of_namespace: !stat.is_some_and(|stat| inits.contains(&stat.id))
            && first_of_namespace(),
    }
}

fn walk(folder: &Path, depth: usize, pids: &mut BTreeSet<i32>) -> Result<(), String> {
    if depth > MAX_DEPTH || pids.len() > MAX_PROCESSES {
        return Err("nested too deep or too many processes".into());
    }
    match read_procs(folder) {
        Seen::Present(found) => pids.extend(found),
        Seen::Absent => return Ok(()),
        Seen::Unknown(why) => return Err(why),
    }
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            return match read::absent_or_unknown::<()>(&error) {
                Seen::Absent => Ok(()),
                Seen::Present(()) | Seen::Unknown(_) => Err(error.to_string()),
            };
        }
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), depth.saturating_add(1), pids)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_names_its_cgroup_plainly_or_by_systemds_words() {
        assert_eq!(spec_path("/default/c1"), "/default/c1");
        assert_eq!(spec_path("k8s/c1"), "/k8s/c1");
        assert_eq!(
            spec_path("kubepods-besteffort-podab.slice:cri-containerd:c1"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podab.slice/cri-containerd-c1.scope"
        );
        assert_eq!(
            spec_path("system.slice:runc:x"),
            "/system.slice/runc-x.scope"
        );
    }

    #[test]
    fn the_deepest_hierarchy_counts() {
        let tops = [
            PathBuf::from("/sys/fs/cgroup"),
            PathBuf::from("/sys/fs/cgroup/pids"),
        ];
        assert_eq!(
            below(&tops, Path::new("/sys/fs/cgroup/pids/a/b")).as_deref(),
            Some("/a/b")
        );
        assert_eq!(below(&tops, Path::new("/sys/fs/cgroup/pids")), None);
        assert_eq!(below(&tops, Path::new("/elsewhere/a")), None);
    }
}
