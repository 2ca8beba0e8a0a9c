//! What there is to be watched: the records of our shims, and the bundles of stock ones. Reads;
//! asks a stock shim who it is and where its task's stdio goes, once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use recoverd_common::{
    bundle::Bundle,
    ids::{Id, Namespace},
    paths::{self, Beside, RUNC_ROOT},
    proc::{FileId, Proc},
    read::{MAX_FILE, read_file},
    record::{
        self, Process, Record,
        version::{self, Unreadable},
    },
    runc,
    seen::Seen,
    shim_client::ShimClient,
};

use super::decide::{Kind, Member, Sighting};
use crate::{correlate, facts, witnessed::Words};

/// For a stock shim to answer two questions.
const ANSWERS: Duration = Duration::from_secs(2);

/// A version of a file: whoever replaces it changes this.
pub type Version = (u64, i64, i64, u64);

/// A bundle by its folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Its folder.
    pub path: PathBuf,
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The container.
    pub id: Id,
}

/// What a look at a bundle brought.
#[derive(Debug)]
pub enum Found {
    /// A task of a stock shim.
    Task(Box<Task>),
    /// Its shim is ours: the record says all of it.
    Ours,
    /// Not yet: it is on its way, or nobody answers.
    NotYet,
    /// Nothing that is watched: no runc shim, or its init has ended.
    Nothing,
}

/// A task of a stock shim.
#[derive(Debug)]
pub struct Task {
    /// Where its shim listens.
    pub socket: PathBuf,
    /// It.
    pub sighting: Sighting,
    /// Where its stdio goes.
    pub words: Words,
}

/// Every socket in `dir` that has a record beside it, with the record's version.
pub fn records(dir: &Path) -> BTreeMap<PathBuf, Version> {
    let Ok(entries) = fs::read_dir(dir) else {
        return BTreeMap::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let socket = socket_of(&entry.path())?;
            let record = Beside::of(&socket).record;
            (entry.path() == record).then(|| Some((socket, version(&record)?)))?
        })
        .collect()
}

/// The socket beside which a file stands, by its name.
pub fn socket_of(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let socket = name.get(..64).filter(|name| paths::is_socket_name(name))?;
    Some(path.with_file_name(socket))
}

fn version(path: &Path) -> Option<Version> {
    let meta = fs::symlink_metadata(path).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
}

/// The record beside `socket`.
pub fn record(socket: &Path) -> Seen<Record> {
    record::read(&Beside::of(socket).record)
}

/// There is no record beside `socket`, or what is there was never one. One of a newer version is no
/// such thing: it is not ours to replace.
pub fn record_is_lost(socket: &Path) -> bool {
    match read_file(&Beside::of(socket).record, MAX_FILE) {
        Seen::Absent => true,
        Seen::Present(bytes) => match version::decode(&bytes) {
            Ok(_) | Err(Unreadable::Newer(_)) => false,
            Err(Unreadable::NotARecord(_) | Unreadable::Never(_) | Unreadable::Broken(_)) => true,
        },
        Seen::Unknown(_) => false,
    }
}

/// Every bundle below these state folders, and the folders whose entries are bundles.
pub fn bundles(states: &BTreeSet<PathBuf>) -> (BTreeSet<Place>, BTreeSet<PathBuf>) {
    let (mut places, mut folders) = (BTreeSet::new(), BTreeSet::new());
    for state in states {
        let plugin = state.join(paths::TASK_PLUGIN);
        let Ok(namespaces) = fs::read_dir(&plugin) else {
            continue;
        };
        folders.insert(plugin);
        for entry in namespaces.flatten() {
            let Ok(namespace) = Namespace::new(entry.file_name().to_string_lossy()) else {
                continue;
            };
            let Ok(bundles) = fs::read_dir(entry.path()) else {
                continue;
            };
            folders.insert(entry.path());
            places.extend(bundles.flatten().filter_map(|bundle| {
                Some(Place {
                    path: bundle.path(),
                    namespace: namespace.clone(),
                    // A hidden one is half removed, and no id.
                    id: Id::new(bundle.file_name().to_string_lossy()).ok()?,
                })
            }));
        }
    }
    (places, folders)
}

/// Nothing is at `path`, for certain: where its containerd is not seen to run, or a folder could not
/// be read, a bundle is not found, and is there all the same.
pub fn is_gone(path: &Path) -> bool {
    FileId::of_entry(path).is_absent()
}

/// Looks at one bundle.
pub fn bundle(proc: &Proc, runc_root: &Path, place: &Place) -> Found {
    let read = Bundle::read(
        place.path.clone(),
        place.namespace.clone(),
        place.id.clone(),
    );
    let Seen::Present(bundle) = read else {
        return Found::NotYet;
    };
    let Some(address) = bundle.socket_address() else {
        return Found::NotYet;
    };
    let socket = PathBuf::from(facts::address_of(&address));
    if !socket.is_absolute() {
        // Abstract: nothing that a successor could be given.
        return Found::Nothing;
    }
    let name = place.id.to_string();
    match record(&socket) {
        Seen::Present(record) if record.tasks.iter().any(|task| task.id == name) => {
            return Found::Ours;
        }
        Seen::Present(_) | Seen::Absent | Seen::Unknown(_) => {}
    }
    let root = bundle.options.present().map(|options| &options.root);
    let root = match root.filter(|root| !root.is_empty()) {
        Some(root) => Path::new(root),
        None if runc_root.as_os_str().is_empty() => Path::new(RUNC_ROOT),
        None => runc_root,
    };
    // Without runc's word for its start time a pid proves nothing.
    let state = match runc::read(root, &place.namespace, &place.id) {
        Seen::Present(state) => state,
        Seen::Absent | Seen::Unknown(_) => return Found::NotYet,
    };
    let Some(init) = state.init else {
        return Found::NotYet;
    };
    if !matches!(proc.living(init), Seen::Present(_)) {
        return Found::Nothing;
    }
    ask(proc, &bundle, socket, process(init))
}

fn process(id: recoverd_common::proc::ProcessId) -> Process {
    Process {
        // A pid of /proc is positive.
        pid: id.pid.unsigned_abs(),
        start_time: id.start_time,
    }
}

fn ask(proc: &Proc, bundle: &Bundle, socket: PathBuf, init: Process) -> Found {
    let (namespace, id) = (bundle.namespace.to_string(), bundle.id.to_string());
    let until = Instant::now() + ANSWERS;
    let Ok(mut client) = ShimClient::connect(&socket, &namespace, until) else {
        return Found::NotYet;
    };
    let Ok(greeting) = client.connect_task(&id) else {
        return Found::NotYet;
    };
    let Ok(pid) = i32::try_from(greeting.shim_pid) else {
        return Found::Nothing;
    };
    let Seen::Present(stat) = proc.stat(pid) else {
        return Found::NotYet;
    };
    let name = match proc.exe(pid) {
        Seen::Present(exe) => exe
            .path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned()),
        Seen::Absent | Seen::Unknown(_) => None,
    };
    match correlate::kind(&name.unwrap_or_default(), true) {
        correlate::Kind::Stock => {}
        // Its record comes.
        correlate::Kind::Ours => return Found::NotYet,
        correlate::Kind::Foreign => return Found::Nothing,
    }
    let Ok(state) = client.state(&id) else {
        return Found::NotYet;
    };
    let group = bundle.config.present().and_then(|config| config.group());
    let member = Member {
        id: id.clone(),
        exec_id: String::new(),
    };
    let address = match proc.arguments(pid) {
        Seen::Present(arguments) => {
            let at = arguments.iter().position(|word| word == "-address");
            at.and_then(|at| arguments.get(at.checked_add(1)?).cloned())
        }
        Seen::Absent | Seen::Unknown(_) => None,
    };
    Found::Task(Box::new(Task {
        socket,
        sighting: Sighting {
            kind: Kind::Stock,
            namespace: namespace.clone(),
            address: address.unwrap_or_default(),
            group: group.unwrap_or(&id).to_owned(),
            shim: process(stat.id),
            members: [(member, init)].into(),
            tasks: 1,
        },
        words: Words {
            namespace,
            id,
            bundle: bundle.path.clone(),
            init: (init.pid, init.start_time),
            stdin: state.stdin,
            stdout: state.stdout,
            stderr: state.stderr,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_beside_a_shims_socket_are_records() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("a".repeat(64));
        let record = Beside::of(&socket).record;
        for name in [
            record.clone(),
            Beside::of(&socket).lock,
            dir.path().join("x.record"),
            dir.path().join(format!("{}.record", "A".repeat(64))),
            dir.path().join("é".repeat(40)),
        ] {
            fs::write(name, "{").unwrap();
        }
        let seen = records(dir.path());
        assert_eq!(seen.keys().collect::<Vec<_>>(), [&socket]);
        assert!(matches!(super::record(&socket), Seen::Unknown(_)));
        fs::write(&record, "{}").unwrap();
        assert_ne!(records(dir.path()), seen);
        assert!(record_is_lost(&socket));
        fs::write(&record, r#"{"format": 99}"#).unwrap();
        assert!(!record_is_lost(&socket), "a newer version's");
        fs::remove_file(&record).unwrap();
        assert!(record_is_lost(&socket));
        assert!(records(&dir.path().join("none")).is_empty());
    }

    #[test]
    fn bundles_of_every_state_folder_are_found_and_half_removed_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let folder = state.join(paths::TASK_PLUGIN).join("k8s.io");
        for name in ["a", ".b", "c"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        let states = BTreeSet::from([state.clone(), dir.path().join("none")]);
        let (places, folders) = bundles(&states);
        let ids: Vec<_> = places.iter().map(|place| place.id.to_string()).collect();
        assert_eq!(ids, ["a", "c"]);
        assert_eq!(folders.len(), 2);
        let place = places.first().unwrap();
        let found = bundle(&Proc::new("/proc"), Path::new(""), place);
        assert!(matches!(found, Found::NotYet));
        // Its containerd is not found any more, or the folder is nothing that can be read.
        assert!(bundles(&BTreeSet::new()).0.is_empty());
        assert!(!is_gone(&place.path));
        fs::remove_dir_all(&folder).unwrap();
        fs::write(&folder, "").unwrap();
        assert!(!is_gone(&place.path));
        fs::remove_file(&folder).unwrap();
        assert!(is_gone(&place.path));
    }
}
