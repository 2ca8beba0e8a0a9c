//! Facts about one bundle, `<state>/io.containerd.runtime.v2.task/<namespace>/<id>`: what
//! containerd of every generation, the shim and runc left in it (facts, section 3).

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;

use crate::{
    ids::{Id, Namespace},
    read::{absent_or_unknown, read_file, read_text},
    seen::Seen,
};

/// Longest of the one-line files that is read, bytes.
const SMALL: u64 = 4 << 10;
/// Longest `config.json` that is read, bytes; a spec with thousands of mounts has some 2 MiB.
const MAX_CONFIG: u64 = 8 << 20;

/// One bundle.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Its folder.
    pub path: PathBuf,
    /// The containerd namespace.
    pub namespace: Namespace,
    /// The task's id.
    pub id: Id,
    /// When the folder was last changed; creation and removal of its files count.
    pub changed_at: SystemTime,
    /// It holds nothing at all: containerd removes such a bundle at its start.
    pub empty: bool,
    /// `address`, what 1.x reads, as it stands there.
    pub address: Seen<String>,
    /// `bootstrap.json`, what 2.x reads and writes.
    pub bootstrap: Seen<Bootstrap>,
    /// `shim-binary-path`: which binary runs `delete`.
    pub shim_binary: Seen<PathBuf>,
    /// `runtime`, the runc binary; there once a runc shim has created a task.
    pub runtime: Seen<String>,
    /// `options.json`.
    pub options: Seen<Options>,
    /// `init.pid`, and when it was written.
    pub init_pid: Seen<InitPid>,
    /// `config.json`.
    pub config: Seen<Config>,
}

/// `bootstrap.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Bootstrap {
    /// 2 or 3: which task API.
    #[serde(default)]
    pub version: i32,
    /// `unix://…`.
    #[serde(default)]
    pub address: String,
    /// `ttrpc` or `grpc`.
    #[serde(default)]
    pub protocol: String,
}

/// The part of `options.json` (runc options as Go writes them) that says where runc's state is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Options {
    /// Replaces `/run/containerd/runc`.
    #[serde(default)]
    pub root: String,
    /// The runc binary.
    #[serde(default)]
    pub binary_name: String,
    /// Cgroups are made by systemd.
    #[serde(default)]
    pub systemd_cgroup: bool,
}

/// `init.pid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitPid {
    /// The number in it, above 0.
    pub pid: i32,
    /// When it was written. The process ran then, so one that started later is another.
    pub written_at: SystemTime,
}

/// What is used of `config.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// All annotations.
    pub annotations: BTreeMap<String, String>,
    /// `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// `process.terminal`.
    pub terminal: bool,
    /// The container has a pid namespace of its own (`linux.namespaces`, without a path).
    pub own_pid_namespace: bool,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    process: Option<SpecProcess>,
    #[serde(default)]
    linux: Option<SpecLinux>,
}

#[derive(Deserialize)]
struct SpecProcess {
    #[serde(default)]
    terminal: bool,
}

#[derive(Deserialize)]
struct SpecLinux {
    #[serde(default, rename = "cgroupsPath")]
    cgroups_path: Option<String>,
    #[serde(default)]
    namespaces: Option<Vec<SpecNamespace>>,
}

#[derive(Deserialize)]
struct SpecNamespace {
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Config {
    /// Parses an OCI runtime spec.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let spec: Spec = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let (cgroups_path, namespaces) = match spec.linux {
            Some(linux) => (linux.cgroups_path, linux.namespaces.unwrap_or_default()),
            None => (None, Vec::new()),
        };
        Ok(Self {
            annotations: spec.annotations.unwrap_or_default(),
            cgroups_path: cgroups_path.filter(|path| !path.is_empty()),
            terminal: spec.process.is_some_and(|process| process.terminal),
            own_pid_namespace: namespaces
                .iter()
                .any(|n| n.kind == "pid" && n.path.is_empty()),
        })
    }

    /// The group whose members share one shim, when the annotations name one.
    pub fn group(&self) -> Option<&str> {
        crate::paths::group(&self.annotations)
    }
}

impl Bundle {
    /// Reads the bundle at `path`. *Absent* when there is no such folder; *unknown* when it is
    /// something else or cannot be read.
    pub fn read(path: PathBuf, namespace: Namespace, id: Id) -> Seen<Self> {
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => meta,
            Ok(_) => return Seen::Unknown("is not a folder".into()),
            Err(error) => return absent_or_unknown(&error),
        };
        let empty = match fs::read_dir(&path) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => return absent_or_unknown(&error),
        };
        let file = |name: &str| path.join(name);
        Seen::Present(Self {
            changed_at: changed_at(&meta),
            empty,
            address: text(&file("address")),
            bootstrap: json(&file("bootstrap.json"), SMALL),
            shim_binary: text(&file("shim-binary-path")).map(PathBuf::from),
            runtime: text(&file("runtime")),
            options: json(&file("options.json"), SMALL),
            init_pid: init_pid(&file("init.pid")),
            config: read_file(&file("config.json"), MAX_CONFIG).and_then(
                |bytes| match Config::parse(&bytes) {
                    Ok(config) => Seen::Present(config),
                    Err(why) => Seen::Unknown(why),
                },
            ),
            path,
            namespace,
            id,
        })
    }

    /// Where the shim listens, as the bundle says: `bootstrap.json` before `address` (2.x reads
    /// them in this order; 1.7 understands JSON in `address` as well).
    pub fn socket_address(&self) -> Option<String> {
        let from_bootstrap = self.bootstrap.present().map(|b| b.address.clone());
        let address = from_bootstrap.filter(|a| !a.is_empty()).or_else(|| {
            let text = self.address.present()?;
            match serde_json::from_str::<Bootstrap>(text) {
                Ok(json) => Some(json.address),
                Err(_) => Some(text.clone()),
            }
        })?;
        Some(address).filter(|address| !address.is_empty())
    }

    /// Files that are there and could not be read, each with the reason.
    pub fn unreadable(&self) -> Vec<(&'static str, &str)> {
        fn why<T>(file: &Seen<T>) -> Option<&str> {
            match file {
                Seen::Unknown(why) => Some(why),
                Seen::Present(_) | Seen::Absent => None,
            }
        }
        [
            ("address", why(&self.address)),
            ("bootstrap.json", why(&self.bootstrap)),
            ("shim-binary-path", why(&self.shim_binary)),
            ("runtime", why(&self.runtime)),
            ("options.json", why(&self.options)),
            ("init.pid", why(&self.init_pid)),
            ("config.json", why(&self.config)),
        ]
        .into_iter()
        .filter_map(|(file, why)| Some((file, why?)))
        .collect()
    }

    /// The task API version that the bundle names, when it does.
    pub fn api_version(&self) -> Option<i32> {
        self.bootstrap.present().map(|bootstrap| bootstrap.version)
    }
}

fn changed_at(meta: &fs::Metadata) -> SystemTime {
    let seconds = u64::try_from(meta.ctime()).unwrap_or(0);
    let nanos = u32::try_from(meta.ctime_nsec()).unwrap_or(0);
    UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanos.min(999_999_999)))
        .unwrap_or(UNIX_EPOCH)
}

fn text(path: &Path) -> Seen<String> {
    read_text(path, SMALL).map(|text| text.trim().to_owned())
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path, limit: u64) -> Seen<T> {
    read_file(path, limit).and_then(|bytes| match serde_json::from_slice(&bytes) {
        Ok(value) => Seen::Present(value),
        Err(error) => Seen::Unknown(error.to_string()),
    })
}

fn init_pid(path: &Path) -> Seen<InitPid> {
    text(path).and_then(|text| {
        let written_at = match fs::symlink_metadata(path).and_then(|meta| meta.modified()) {
            Ok(time) => time,
            Err(error) => return absent_or_unknown(&error),
        };
        match text.parse::<i32>() {
            Ok(pid @ 1..) => Seen::Present(InitPid { pid, written_at }),
            Ok(_) | Err(_) => {
                let shown: String = text.chars().take(20).collect();
                Seen::Unknown(format!("holds {shown:?}, which is no pid"))
            }
        }
    })
}

/// A folder below `<state>/io.containerd.runtime.v2.task`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listed {
    /// A bundle.
    Bundle(Namespace, Id),
    /// Something that is no bundle, as containerd's loader sees it (a dot name is a half-removed
    /// bundle, skipped and never cleaned), with its path.
    Other(PathBuf),
}

/// Lists the bundles of a containerd; sorted.
pub fn list(state: &Path) -> Seen<Vec<Listed>> {
    let top = state.join(crate::paths::TASK_PLUGIN);
    let namespaces = match fs::read_dir(&top) {
        Ok(entries) => entries,
        Err(error) => return absent_or_unknown(&error),
    };
    let mut found = Vec::new();
    for namespace in namespaces.flatten() {
        let path = namespace.path();
        let name = namespace
            .file_name()
            .to_str()
            .and_then(|n| Namespace::new(n).ok());
        let Some(name) = name else {
            found.push((path.clone(), Listed::Other(path)));
            continue;
        };
        let Ok(ids) = fs::read_dir(&path) else {
            continue;
        };
        for id in ids.flatten() {
            let path = id.path();
            let listed = match id.file_name().to_str().and_then(|n| Id::new(n).ok()) {
                Some(id) => Listed::Bundle(name.clone(), id),
                None => Listed::Other(path.clone()),
            };
            found.push((path, listed));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Seen::Present(found.into_iter().map(|(_, listed)| listed).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(files: &[(&str, &str)]) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let (namespace, id) = (Namespace::new("n").unwrap(), Id::new("c").unwrap());
        let read = Bundle::read(dir.path().to_owned(), namespace, id);
        (dir, read.present().unwrap().clone())
    }

    #[test]
    fn the_address_is_found_as_each_generation_of_containerd_wrote_it() {
        let bootstrap = r#"{"version":3,"address":"unix:///b","protocol":"ttrpc"}"#;
        assert_eq!(bundle(&[]).1.socket_address(), None);
        assert!(bundle(&[]).1.empty);
        let (_dir, old) = bundle(&[("address", "unix:///a")]);
        assert_eq!(
            (old.socket_address().as_deref(), old.api_version()),
            (Some("unix:///a"), None)
        );
        assert_eq!(
            bundle(&[("address", bootstrap)])
                .1
                .socket_address()
                .as_deref(),
            Some("unix:///b")
        );
        let (_dir, new) = bundle(&[("address", "unix:///a"), ("bootstrap.json", bootstrap)]);
        assert_eq!(
            (new.socket_address().as_deref(), new.api_version()),
            (Some("unix:///b"), Some(3))
        );
        let (_dir, emptied) = bundle(&[("address", "unix:///a"), ("bootstrap.json", "")]);
        assert_eq!(emptied.socket_address().as_deref(), Some("unix:///a"));
        assert!(matches!(emptied.bootstrap, Seen::Unknown(_)));
    }

    #[test]
    fn hostile_files_are_unknown_and_harm_nothing() {
        let (_dir, b) = bundle(&[
            ("init.pid", "-7"),
            ("config.json", "{\"annotations\":[]}"),
            ("options.json", "null"),
        ]);
        assert!(matches!(b.init_pid, Seen::Unknown(_)));
        assert!(matches!(b.config, Seen::Unknown(_)));
        assert!(matches!(b.options, Seen::Unknown(_)));
    }

    #[test]
    fn a_spec_gives_group_terminal_cgroup_and_pid_namespace() {
        let text = br#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"},
            "process":{"terminal":true},
            "linux":{"cgroupsPath":"/default/c","namespaces":[{"type":"pid"},{"type":"ipc","path":"/x"}]}}"#;
        let config = Config::parse(text).unwrap();
        assert_eq!(config.group(), Some("pod"));
        assert!(config.terminal && config.own_pid_namespace);
        assert_eq!(config.cgroups_path.as_deref(), Some("/default/c"));
        let shared = br#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#;
        assert!(!Config::parse(shared).unwrap().own_pid_namespace);
    }
}
