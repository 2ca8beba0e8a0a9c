//! runc's own state of a container, `<root>/<namespace>/<id>/state.json`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    ids::{Id, Namespace},
    proc::ProcessId,
    read::{MAX_FILE, absent_or_unknown, read_file},
    seen::Seen,
};

/// What is used of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuncState {
    /// The init process with its start time; `None` for a container that was never started.
    pub init: Option<ProcessId>,
    /// The bundle, from the label that runc writes.
    pub bundle: Option<PathBuf>,
    /// The spec's annotations, which runc keeps as labels.
    pub annotations: BTreeMap<String, String>,
    /// The container's cgroup in each hierarchy (controller name, empty for v2), absolute paths.
    pub cgroups: BTreeMap<String, PathBuf>,
}

impl RuncState {
    /// The group whose members share one shim, when the annotations name one.
    pub fn group(&self) -> Option<&str> {
        crate::paths::group(&self.annotations)
    }
}

#[derive(Deserialize)]
struct Persisted {
    #[serde(default)]
    init_process_pid: i64,
    #[serde(default)]
    init_process_start: u64,
    #[serde(default)]
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(default)]
    config: PersistedConfig,
}

#[derive(Deserialize, Default)]
struct PersistedConfig {
    #[serde(default)]
    labels: Vec<String>,
}

/// Parses `state.json`. A pid that no kernel gives is an error, not a process.
pub fn parse(bytes: &[u8]) -> Result<RuncState, String> {
    let state: Persisted = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let init = match i32::try_from(state.init_process_pid) {
        Ok(0) => None,
        Ok(pid @ 1..) => Some(ProcessId {
            pid,
            start_time: state.init_process_start,
        }),
        Ok(_) | Err(_) => return Err(format!("names the pid {}", state.init_process_pid)),
    };
    let mut annotations: BTreeMap<String, String> = BTreeMap::new();
    for label in &state.config.labels {
        if let Some((key, value)) = label.split_once('=') {
            annotations.insert(key.to_owned(), value.to_owned());
        }
    }
    let bundle = annotations.remove("bundle");
    Ok(RuncState {
        init,
        bundle: bundle.map(PathBuf::from),
        annotations,
        cgroups: state.cgroup_paths,
    })
}

/// Reads the state of one container below `root` (`/run/containerd/runc`).
pub fn read(root: &Path, namespace: &Namespace, id: &Id) -> Seen<RuncState> {
    let path = root
        .join(namespace.as_str())
        .join(id.as_str())
        .join("state.json");
    read_file(&path, MAX_FILE).and_then(|bytes| match parse(&bytes) {
        Ok(state) => Seen::Present(state),
        Err(why) => Seen::Unknown(why),
    })
}

/// Containers that have a folder below `root`, sorted; names that are none are skipped.
pub fn list(root: &Path) -> Seen<Vec<(Namespace, Id)>> {
    let namespaces = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut found = Vec::new();
    for entry in namespaces.flatten() {
        let Some(namespace) = entry
            .file_name()
            .to_str()
            .and_then(|n| Namespace::new(n).ok())
        else {
            continue;
        };
        // A namespace's folder that goes away meanwhile held nothing.
        let Ok(ids) = fs::read_dir(entry.path()) else {
            continue;
        };
        for id in ids
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        {
            if let Some(id) = id.file_name().to_str().and_then(|n| Id::new(n).ok()) {
                found.push((namespace.clone(), id));
            }
        }
    }
    found.sort();
    Seen::Present(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_bundle_and_cgroups_are_found_and_hostile_pids_refused() {
        let text = br#"{"id":"c1","init_process_pid":812,"init_process_start":39122,
            "config":{"labels":["x=y","bundle=/run/b/c1"]},"cgroup_paths":{"":"/sys/fs/cgroup/default/c1"}}"#;
        let state = parse(text).unwrap();
        assert_eq!(
            state.init,
            Some(ProcessId {
                pid: 812,
                start_time: 39122
            })
        );
        assert_eq!(state.bundle.as_deref(), Some(Path::new("/run/b/c1")));
        assert_eq!(state.cgroups.len(), 1);
        assert_eq!(state.annotations.get("x").map(String::as_str), Some("y"));
        assert_eq!(parse(b"{}").unwrap().init, None);
        for bad in [
            "",
            "7",
            r#"{"init_process_pid":-1}"#,
            r#"{"init_process_pid":4294967297}"#,
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
