//! What `delete` sees before it decides: who answers at the socket, what the record, the bundle and
//! the runtime's state say, whether the init lives. Changes nothing; takes the lock if nobody
//! answers, so that what was seen stays true.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use recoverd_common::{
    bundle::Bundle,
    cgroup::{Cgroup, Roots, parse_memberships},
    paths::{self, Beside},
    proc::{Proc, ProcessId},
    read::{MAX_FILE, read_file},
    record::{self, Record, Task},
    runc::{self, RuncState},
    seen::Seen,
    shim_client::{CallError, ShimClient},
    ttrpc::code,
};

use crate::{
    args::Flags,
    delete_rule::{Answer, Facts, Init, Recorded},
    lock::{self, Attempt},
    options::Options,
    tasks::Process,
};

/// For the shim to answer, and for a shim that is just leaving to be gone.
const SHIM: Duration = Duration::from_millis(1500);

/// Everything known of the task, looked at once.
#[derive(Debug)]
pub struct Observed {
    /// `<namespace>/<id>`, for messages.
    pub label: String,
    /// The task's id.
    pub name: String,
    /// The bundle, whether it is there or not.
    pub bundle: PathBuf,
    /// Where its shim listens or listened.
    pub socket: PathBuf,
    /// Who answers there.
    pub answer: Answer,
    /// `<socket>.lock`, shared with other `delete`s; held until the end.
    pub lock: Option<fs::File>,
    /// The shim's record, of this boot.
    pub record: Seen<Record>,
    /// The init process.
    pub init: Init,
    /// The runtime's binary.
    pub binary: String,
    /// The runtime's `--root`, the namespace included.
    pub root: PathBuf,
    /// Whether the runtime is told `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// Cgroup folders that are the task's alone.
    pub cgroups: Vec<PathBuf>,
    /// What the runtime has under this id, if that is another bundle's: not ours to touch.
    pub stranger: Option<Stranger>,
    /// Whoever ran us has ended.
    pub abandoned: bool,
}

/// A container of the same id, made from another bundle.
#[derive(Debug)]
pub struct Stranger {
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its cgroup folders, which may have the names of ours.
    pub cgroups: Vec<PathBuf>,
}

impl Observed {
    /// Looks. Waits at most [`SHIM`] for an answer and the lock.
    pub fn look(flags: &Flags, bundle: PathBuf) -> Self {
        let roots = Roots::default();
        let proc = Proc::new(&roots.proc);
        let namespace = flags.namespace.as_str();
        let id = flags.id.as_str();

        let files = Bundle::read(bundle.clone(), flags.namespace.clone(), flags.id.clone());
        let socket = socket_of(files.present(), flags);
        let (answer, lock) = ask(&socket, namespace, id);
        let record = read_record(&socket, namespace, &proc);
        let task = record.present().and_then(|record| find(record, id));

        // The record knows what was used; the bundle what was asked for.
        let options = Options::read(&bundle);
        let options = options.present().cloned().unwrap_or_default();
        let (binary, root, systemd_cgroup) = match task {
            Some(Task { runtime, .. }) => (
                runtime.binary.clone(),
                PathBuf::from(&runtime.root),
                runtime.systemd_cgroup,
            ),
            None => (
                options.binary().to_owned(),
                options.root(namespace),
                options.systemd_cgroup,
            ),
        };
        let (state, stranger) = whose(read_state(&root, id), &bundle);
        let init = task
            .and_then(|task| task.init)
            .and_then(|process| {
                Some(ProcessId {
                    pid: i32::try_from(process.pid).ok()?,
                    start_time: process.start_time,
                })
            })
            .or_else(|| state.as_ref().and_then(|state| state.init))
            .filter(|init| init.pid > 0 && init.start_time > 0);
        let cgroups = cgroups(&roots, task, state.as_ref());
        Self {
            label: format!("{namespace}/{id}"),
            name: id.to_owned(),
            bundle,
            socket,
            answer,
            lock,
            init: init.map_or(Init::Unknown, |init| look_at(&proc, init)),
            record,
            binary,
            root,
            systemd_cgroup,
            cgroups,
            stranger,
            abandoned: abandoned(&proc),
        }
    }

    /// Whether the record, which is of this boot, names the task.
    pub fn is_recorded(&self) -> bool {
        let record = self.record.present();
        record.is_some_and(|record| find(record, &self.name).is_some())
    }

    /// What still holds the fifos of its clients, and those of what has been deleted before.
    pub fn holders(&self) -> Vec<Process> {
        let record = self.record.present();
        let task = record.and_then(|record| find(record, &self.name));
        let all = task.into_iter().flat_map(|task| {
            let execs = task.execs.iter().map(|exec| &exec.stdio);
            std::iter::once(&task.stdio).chain(execs)
        });
        let strays = record.into_iter().flat_map(|record| &record.strays);
        all.flat_map(|stdio| &stdio.holders)
            .chain(strays)
            .map(|holder| Process {
                pid: holder.pid,
                start_time: holder.start_time,
            })
            .collect()
    }

    /// Cgroup folders of the other tasks in the record.
    pub fn recorded_beside(&self) -> Vec<PathBuf> {
        let roots = Roots::default();
        let tasks = self.record.present().into_iter().flat_map(|r| &r.tasks);
        tasks
            .filter(|task| task.id != self.name)
            .flat_map(|task| recorded_folders(&roots, task).unwrap_or_default())
            .collect()
    }

    /// What the decision depends on.
    pub fn facts(&self) -> Facts {
        let task = self
            .record
            .present()
            .and_then(|record| find(record, &self.name));
        let recorded = match (&self.record, task) {
            (Seen::Present(_), Some(task)) => Recorded::Named(task.exit.clone()),
            (Seen::Present(_), None) | (Seen::Absent, _) => Recorded::NotNamed,
            (Seen::Unknown(why), _) => Recorded::Unusable(why.clone()),
        };
        Facts {
            answer: self.answer,
            locked_by_us: self.lock.is_some(),
            recorded,
            init: self.init,
            abandoned: self.abandoned,
        }
    }
}

/// Where the task's shim listens or listened: what the bundle says (an adopted task may have
/// moved), else what its name has to be.
fn socket_of(bundle: Option<&Bundle>, flags: &Flags) -> PathBuf {
    let written = bundle
        .and_then(Bundle::socket_address)
        .and_then(|address| address.strip_prefix("unix://").map(PathBuf::from))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            path.is_absolute() && name.is_some_and(paths::is_socket_name)
        });
    written.unwrap_or_else(|| {
        let config = bundle.and_then(|bundle| bundle.config.present());
        let group = config
            .and_then(|config| config.group())
            .unwrap_or(flags.id.as_str());
        let folder = Path::new(paths::SOCKET_DIR);
        paths::socket(folder, &flags.address, flags.namespace.as_str(), group)
    })
}

/// Asks at the socket, and takes the lock if nobody answers. A shim that is just leaving has the
/// lock for a moment longer than the socket, so that case is looked at again until the deadline.
fn ask(socket: &Path, namespace: &str, id: &str) -> (Answer, Option<fs::File>) {
    let deadline = Instant::now() + SHIM;
    let lock_path = Beside::of(socket).lock;
    loop {
        let asked = ShimClient::connect(socket, namespace, deadline)
            .and_then(|mut client| client.state(id));
        // A shim that is being killed closes its descriptors one by one: the connection and the
        // lock may be gone while the socket still takes connections.
        let dying = matches!(asked, Err(CallError::Closed | CallError::Io(_)));
        let answer = match asked {
            Ok(_) => Answer::Claims,
            Err(CallError::Status {
                code: code::NOT_FOUND,
                ..
            }) => Answer::Disclaims,
            // It answers, and knows what it says no to: better not to touch it.
            Err(CallError::Status { .. }) => Answer::Claims,
            Err(CallError::NobodyListens(_)) => Answer::Nobody,
            Err(
                CallError::Silent
                | CallError::Closed
                | CallError::Garbage(_)
                | CallError::Foreign(_)
                | CallError::Io(_),
            ) => Answer::Silent,
        };
        match answer {
            Answer::Claims | Answer::Disclaims => return (answer, None),
            Answer::Silent | Answer::Nobody => {}
        }
        match lock::attempt_shared(&lock_path) {
            Ok(Attempt::Taken(lock)) => {
                if answer == Answer::Nobody {
                    return (answer, Some(lock));
                }
                if dying && Instant::now() < deadline {
                    drop(lock);
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                // A silent stranger without a lock: leave no file of ours.
                let _ = fs::remove_file(&lock_path);
                return (answer, None);
            }
            Ok(Attempt::Held) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            // Held by somebody who does not answer, or no place for a lock at all.
            Ok(Attempt::Held) => return (Answer::Silent, None),
            Err(_) => return (answer, None),
        }
    }
}

/// The record beside `socket`, if it is of this boot and this namespace. One from before the
/// machine was started counts as none: nothing that it names exists any more.
fn read_record(socket: &Path, namespace: &str, proc: &Proc) -> Seen<Record> {
    let record = match record::read(&Beside::of(socket).record) {
        Seen::Present(record) => record,
        Seen::Absent => return Seen::Absent,
        Seen::Unknown(why) => return Seen::Unknown(format!("the record {why}")),
    };
    if record.shim.namespace != namespace {
        let other = &record.shim.namespace;
        return Seen::Unknown(format!("the record is of namespace {other:?}"));
    }
    match proc.boot_id() {
        Seen::Present(boot) if boot == record.boot_id => Seen::Present(record),
        Seen::Present(_) => Seen::Absent,
        Seen::Absent => Seen::Unknown("this machine tells no boot id".into()),
        Seen::Unknown(why) => Seen::Unknown(format!("the boot id {why}")),
    }
}

fn find<'a>(record: &'a Record, id: &str) -> Option<&'a Task> {
    record.tasks.iter().find(|task| task.id == id)
}

/// runc's state; other runtimes have other files, and are not asked.
pub fn read_state(root: &Path, id: &str) -> Option<RuncState> {
    let path = root.join(id).join("state.json");
    match read_file(&path, MAX_FILE) {
        Seen::Present(bytes) => runc::parse(&bytes).ok(),
        Seen::Absent | Seen::Unknown(_) => None,
    }
}

/// Sorts the runtime's state by its bundle: ours, or a stranger's. A state that names no bundle is
/// of the only container of this id, ours.
fn whose(state: Option<RuncState>, bundle: &Path) -> (Option<RuncState>, Option<Stranger>) {
    match state {
        Some(RuncState {
            bundle: Some(other),
            cgroups,
            ..
        }) if !is_same(&other, bundle) => {
            let cgroups = cgroups.into_values().collect();
            let stranger = Stranger {
                bundle: other,
                cgroups,
            };
            (None, Some(stranger))
        }
        state => (state, None),
    }
}

/// Two names of one folder, links resolved.
fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        Some((meta.dev(), meta.ino()))
    };
    one == other || id(one).is_some_and(|found| id(other) == Some(found))
}

/// How `init` is now.
pub fn look_at(proc: &Proc, init: ProcessId) -> Init {
    match proc.stat(init.pid) {
        Seen::Present(stat) if stat.id != init => Init::Gone(init),
        Seen::Present(stat) if stat.alive() => Init::Alive(init),
        Seen::Present(stat) => match exit_status(stat.exit_code) {
            Some(status) => Init::Zombie(init, status),
            None => Init::Gone(init),
        },
        Seen::Absent => Init::Gone(init),
        // Not seen is not gone, but nothing can be ended either; the runtime will try.
        Seen::Unknown(_) => Init::Unknown,
    }
}

/// A containerd is its verb's parent. One that has ended left it to PID 1, which may be a containerd
/// itself, in a container; what cannot be told counts as a caller that is there.
fn abandoned(proc: &Proc) -> bool {
    const PID_1: i32 = 1;
    let comm = proc.stat(PID_1).present().map(|stat| stat.comm.clone());
    let of_pid_1 = nix::unistd::getppid().as_raw() == PID_1;
    of_pid_1 && comm.is_some_and(|comm| !comm.contains("containerd"))
}

/// What containerd says for a raw wait status: the code, or 128 and the signal.
fn exit_status(raw: i32) -> Option<u32> {
    let raw = u32::try_from(raw).ok()?;
    match raw & 0x7f {
        0 => Some((raw >> 8) & 0xff),
        0x7f => None,
        signal => Some(signal.saturating_add(128)),
    }
}

/// The cgroup folders that the record names for `task`; none when it names none.
fn recorded_folders(roots: &Roots, task: &Task) -> Option<Vec<PathBuf>> {
    let memberships = parse_memberships(&task.cgroup.join("\n"));
    match Cgroup::of_memberships(roots, &memberships) {
        Seen::Present(Cgroup::V1(folders)) => {
            Some(folders.into_iter().map(|(_, path)| path).collect())
        }
        Seen::Present(Cgroup::V2(folder)) => Some(vec![folder]),
        Seen::Absent | Seen::Unknown(_) => None,
    }
}

/// The task's own cgroup folders, as the record or runc's state names them. A group that is not
/// the task's alone (the root, ours, one above ours) is left out.
fn cgroups(roots: &Roots, task: Option<&Task>, state: Option<&RuncState>) -> Vec<PathBuf> {
    let recorded = task.and_then(|task| recorded_folders(roots, task));
    let mut folders = match (recorded, state) {
        (Some(folders), _) => folders,
        (None, Some(state)) => state.cgroups.values().cloned().collect(),
        (None, None) => Vec::new(),
    };
    let own = i32::try_from(std::process::id())
        .ok()
        .map(|pid| Cgroup::of(roots, pid));
    let own: Vec<PathBuf> = match own.as_ref().and_then(Seen::present) {
        Some(Cgroup::V1(folders)) => folders.iter().map(|(_, path)| path.clone()).collect(),
        Some(Cgroup::V2(folder)) => vec![folder.clone()],
        None => Vec::new(),
    };
    folders.retain(|folder| {
        let hierarchy_root = folder
            .parent()
            .is_none_or(|up| up == roots.cgroup || up == Path::new("/"));
        let upwards = folder.components().any(|part| part == Component::ParentDir);
        folder.starts_with(&roots.cgroup)
            && !upwards
            && !hierarchy_root
            && !own.iter().any(|own| own.starts_with(folder))
    });
    folders
}
