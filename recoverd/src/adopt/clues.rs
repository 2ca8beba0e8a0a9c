//! What only adoption needs to know of a task, beside a look: its client's fifos, its pid files,
//! how runc and the kernel see it, and what a shim that is well says of its execs before another
//! takes its place. Reads and asks; judges and changes nothing.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use recoverd_common::{
    cgroup::{Cgroup, Roots as CgroupRoots, parse_memberships},
    exec_files::pid_files,
    pb::task::{StateResponse, Status},
    proc::{Proc, ProcessId},
    read::read_text,
    record::{Context, Stdio},
    seen::Seen,
    shim_client::ShimClient,
    timestamp::Timestamp,
};

use super::decide::Group;
use crate::{
    correlate::Case,
    facts::{FifoFolder, Instance, Look},
    observe::Roots,
};

/// Longest small file that is read here.
const SMALL: u64 = 64 << 10;
/// The largest `oom_score_adj` that the kernel takes.
const OOM_SCORE_MAX: i32 = 1000;
/// The PATH of a containerd that cannot be asked: systemd's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// For all shims that are well to say what has become of their execs.
const SAID_WITHIN: Duration = Duration::from_secs(2);
/// `<exec-root>/containerd` of a dockerd that nobody has told another.
const DOCKER: &str = "/run/docker/containerd";
/// Clients make fifos just before the task; clocks of file systems are coarse.
const FIFO_SLACK: Duration = Duration::from_secs(2);

/// What was found.
#[derive(Debug, Default)]
pub struct Clues {
    /// By bundle.
    pub tasks: HashMap<PathBuf, TaskClues>,
    /// The surroundings that a shim of each containerd has, by its index.
    pub contexts: HashMap<usize, Context>,
}

/// Of one task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TaskClues {
    /// `/proc/<init>/cgroup`, line by line.
    pub cgroup: Vec<String>,
    /// Its client's fifos.
    pub stdio: Stdio,
    /// runc waits for its start.
    pub created: bool,
    /// Its cgroup is frozen.
    pub paused: bool,
    /// What its pid files name.
    pub execs: Vec<ExecClue>,
}

/// One exec's pid file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecClue {
    /// The exec's id.
    pub id: String,
    /// The pid in it.
    pub pid: i32,
    /// Its client's fifos.
    pub stdio: Stdio,
    /// It has a terminal.
    pub terminal: bool,
    /// How it ended, on the word of its shim.
    pub exit: Option<(u32, Timestamp)>,
}

/// Looks for all groups that no record describes.
pub fn observe(roots: &Roots, look: &Look, groups: &[Group<'_>], unit: Option<&str>) -> Clues {
    let mut clues = Clues::default();
    let until = Instant::now() + SAID_WITHIN;
    for group in groups.iter().filter(|group| !group.recorded) {
        let mut shim = Predecessor::of(group, until);
        if let Some(instance) = look.instances.get(group.instance) {
            clues
                .contexts
                .entry(group.instance)
                .or_insert_with(|| context(roots, look, instance, unit));
        }
        for case in &group.members {
            if let Some(bundle) = case.bundle {
                let task = task(roots, look, group, case, &bundle.path, &mut shim);
                clues.tasks.insert(bundle.path.clone(), task);
            }
        }
    }
    clues
}

fn task(
    roots: &Roots,
    look: &Look,
    group: &Group<'_>,
    case: &Case<'_>,
    bundle: &Path,
    shim: &mut Predecessor,
) -> TaskClues {
    let proc = Proc::new(&roots.proc);
    let id = &case.name.1;
    let written = case
        .bundle
        .and_then(|bundle| Some(bundle.init_pid.present()?.written_at));
    let cgroup = match case.init.alive() {
        Some(init) => lines(&proc.path(init.pid, "cgroup")),
        None => Vec::new(),
    };
    let created = case
        .runc
        .is_some_and(|entry| entry.path.join("exec.fifo").exists());
    let stdio = |id: &str, at| stdio(look, group.instance, &case.name.1, id, at);
    let mut own = stdio(id, written);
    let alone = group.members.len() == 1;
    if own.stdout.is_empty()
        && let (true, Some(shim)) = (alone, group.predecessor)
        && let Some(uri) = log_file(&proc, shim.id.pid)
    {
        own.stdout.clone_from(&uri);
        own.stderr = uri;
    }
    TaskClues {
        paused: frozen(roots, &cgroup),
        cgroup,
        stdio: own,
        created,
        execs: pid_files(bundle)
            .into_iter()
            .map(|file| (file.id.to_string(), file.pid, file.written_at))
            .map(|(exec_id, pid, at)| match shim.says(id, &exec_id) {
                Some(state) => ExecClue {
                    exit: exit_of(&state),
                    terminal: state.terminal,
                    stdio: Stdio {
                        stdin: state.stdin,
                        stdout: state.stdout,
                        stderr: state.stderr,
                        ..Stdio::default()
                    },
                    id: exec_id,
                    pid,
                },
                None => ExecClue {
                    stdio: stdio(&exec_id, at),
                    terminal: has_terminal(&proc, pid),
                    id: exec_id,
                    pid,
                    exit: None,
                },
            })
            .collect(),
    }
}

/// A shim whose place is to be taken: asked for what nobody will know after it.
struct Predecessor(Option<ShimClient>);

impl Predecessor {
    /// That of `group`, if it is well.
    fn of(group: &Group<'_>, until: Instant) -> Self {
        let well = group.predecessor.is_some() && group.members.iter().all(|case| case.answered());
        let connect = || ShimClient::connect(&group.socket, &group.namespace, until).ok();
        Self(well.then(connect).flatten())
    }

    /// Its word on an exec of `task`.
    fn says(&mut self, task: &str, exec_id: &str) -> Option<StateResponse> {
        let said = self.0.as_mut()?.exec_state(task, exec_id);
        if said.as_ref().is_err_and(|error| !error.is_answer()) {
            // It will not say more of the others.
            self.0 = None;
        }
        said.ok()
    }
}

fn exit_of(state: &StateResponse) -> Option<(u32, Timestamp)> {
    let at = state.exited_at.filter(|at| at.seconds > 0)?;
    let at = Timestamp {
        seconds: at.seconds,
        nanos: u32::try_from(at.nanos).unwrap_or(0),
    };
    (state.status == i32::from(Status::Stopped)).then_some((state.exit_status, at))
}

fn lines(path: &Path) -> Vec<String> {
    match read_text(path, SMALL) {
        Seen::Present(text) => text.lines().map(str::to_owned).collect(),
        Seen::Absent | Seen::Unknown(_) => Vec::new(),
    }
}

fn frozen(roots: &Roots, memberships: &[String]) -> bool {
    let cgroup_roots = CgroupRoots {
        proc: roots.proc.clone(),
        cgroup: roots.cgroup.clone(),
        ..CgroupRoots::default()
    };
    let memberships = parse_memberships(&memberships.join("\n"));
    let Seen::Present(cgroup) = Cgroup::of_memberships(&cgroup_roots, &memberships) else {
        return false;
    };
    let (file, word) = match &cgroup {
        Cgroup::V1(_) => ("freezer.state", "FROZEN"),
        Cgroup::V2(_) => ("cgroup.freeze", "1"),
    };
    let Some(folder) = cgroup.folder("freezer") else {
        return false;
    };
    let text = read_text(&folder.join(file), SMALL);
    text.present().is_some_and(|text| text.trim() == word)
}

fn has_terminal(proc: &Proc, pid: i32) -> bool {
    // The container's own /dev/pts: the kernel names the file as the process sees it.
    fs::read_link(proc.path(pid, "fd/0")).is_ok_and(|target| target.starts_with("/dev/pts"))
}

/// The fifos of the process `id` (an init or an exec) of `task`. Of several folders (a client's
/// that was killed stays) the newest that is not younger than the process.
fn stdio(
    look: &Look,
    instance: usize,
    task: &str,
    id: &str,
    started_at: Option<SystemTime>,
) -> Stdio {
    let of_task = |folder: &&FifoFolder| {
        folder.ids.contains(id)
            && folder.instance.is_none_or(|of| {
                // The CRI's: containers/<task>/io/<random>.
                let container = folder.path.parent().and_then(Path::parent);
                of == instance
                    && container.and_then(Path::file_name) == Some(std::ffi::OsStr::new(task))
            })
    };
    let in_time = |folder: &FifoFolder| match (folder.changed_at, started_at) {
        (Some(made), Some(started)) => {
            made.duration_since(started).unwrap_or_default() <= FIFO_SLACK
        }
        (Some(_) | None, _) => false,
    };
    let folder = look
        .fifos
        .iter()
        .filter(of_task)
        .max_by_key(|folder| (in_time(folder), folder.changed_at));
    match (folder, look.instances.get(instance)) {
        (Some(folder), _) => fifos_in(&folder.path, id),
        (None, Some(instance)) => of_docker(instance, task, id),
        (None, None) => Stdio::default(),
    }
}

/// The fifos that dockerd has made for the process `id` of `task`, in a folder of the task's. Its own
/// containerd listens beside these folders.
fn of_docker(instance: &Instance, task: &str, id: &str) -> Stdio {
    let beside = Path::new(&instance.address).parent();
    let folders = beside.into_iter().chain([Path::new(DOCKER)]);
    folders
        .map(|folder| folder.join(task))
        .flat_map(|folder| {
            // Older releases call every init so.
            let init = (id == task).then_some("init");
            let names = std::iter::once(id).chain(init);
            names.map(move |name| fifos_in(&folder, name))
        })
        .find(|found| *found != Stdio::default())
        .unwrap_or_default()
}

/// The fifos of the process that a client calls `name`.
fn fifos_in(folder: &Path, name: &str) -> Stdio {
    let path = |stream: &str| {
        let path = folder.join(format!("{name}-{stream}"));
        let is_fifo = fs::symlink_metadata(&path).is_ok_and(|meta| meta.file_type().is_fifo());
        let path = is_fifo.then(|| path.to_string_lossy().into_owned());
        path.unwrap_or_default()
    };
    Stdio {
        stdin: path("stdin"),
        stdout: path("stdout"),
        stderr: path("stderr"),
        ..Stdio::default()
    }
}

/// The log file, as a URI, of the only task of a living stock shim: where its output goes stands in
/// its memory alone, but it has the file open. Only where it is certain: it appends to one file.
fn log_file(proc: &Proc, shim: i32) -> Option<String> {
    let descriptors = proc.descriptors(shim);
    let appended: BTreeSet<&str> = descriptors
        .present()?
        .iter()
        .filter(|open| appends(proc, shim, open.number))
        .filter_map(|open| open.target.to_str())
        .collect();
    let mut appended = appended.into_iter();
    let (Some(path), None) = (appended.next(), appended.next()) else {
        return None;
    };
    // As a URI it would mean another file.
    let plain = path.starts_with('/') && !path.contains(['%', '?', '#', ' ']);
    plain.then(|| format!("file://{path}"))
}

/// A regular file, open for appending only.
fn appends(proc: &Proc, pid: i32, number: i32) -> bool {
    let info = lines(&proc.path(pid, &format!("fdinfo/{number}")));
    let flags = info.iter().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    let append = flags.is_some_and(|flags| {
        flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0
    });
    append && fs::metadata(proc.path(pid, &format!("fd/{number}"))).is_ok_and(|meta| meta.is_file())
}

/// The surroundings of a shim of this containerd: as containerd itself would give them. It is
/// asked of whoever has them: this process when it runs in containerd's unit (its start hooks do),
/// the daemon, another of its shims; at last this process anyway.
fn context(roots: &Roots, look: &Look, instance: &Instance, unit: Option<&str>) -> Context {
    let proc = Proc::new(&roots.proc);
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let in_unit = unit.is_some_and(|unit| {
        let groups = lines(&proc.path(own, "cgroup"));
        groups
            .iter()
            .any(|line| line.split('/').any(|part| part == unit))
    });
    let shim = || -> Option<ProcessId> {
        let mut shims = look.shims.iter();
        shims
            .find(|shim| instance.is(&shim.address))
            .map(|shim| shim.id)
    };
    // A daemon's shims are one more likely to be killed than it is; a shim's successor equally.
    let (source, more) = match (in_unit, instance.daemon, shim()) {
        (true, _, _) | (false, None, None) => (own, 1),
        (false, Some(daemon), _) => (daemon.pid, 1),
        (false, None, Some(shim)) => (shim.pid, 0),
    };
    let score = read_text(&proc.path(source, "oom_score_adj"), SMALL)
        .present()
        .and_then(|text| text.trim().parse::<i32>().ok())
        .unwrap_or(0);
    // An operator's shell is no measure of anything.
    let score = if source == own && !in_unit {
        score
    } else {
        score.saturating_add(more).min(OOM_SCORE_MAX)
    };
    let path = environment(&proc, source, "PATH").unwrap_or_else(|| DEFAULT_PATH.to_owned());
    let temporary = environment(&proc, source, "TMPDIR");
    let temporary = temporary.map(|folder| ("TMPDIR".to_owned(), folder));
    Context {
        cgroup: lines(&proc.path(source, "cgroup")),
        oom_score_adj: score,
        umask: 0o022,
        env: [
            ("PATH".to_owned(), path),
            (
                "TTRPC_ADDRESS".to_owned(),
                format!("{}.ttrpc", instance.address),
            ),
            ("GRPC_ADDRESS".to_owned(), instance.address.clone()),
        ]
        .into_iter()
        .chain(temporary)
        .collect(),
        ..Context::default()
    }
}

fn environment(proc: &Proc, pid: i32, name: &str) -> Option<String> {
    let bytes = recoverd_common::read::read_file(&proc.path(pid, "environ"), SMALL);
    let bytes = bytes.present()?;
    bytes.split(|byte| *byte == 0).find_map(|pair| {
        let text = std::str::from_utf8(pair).ok()?;
        let value = text.strip_prefix(name)?.strip_prefix('=')?;
        (!value.is_empty()).then(|| value.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::fixture::healthy;

    #[test]
    fn dockerd_calls_an_init_by_its_task_or_init_and_an_exec_by_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let mut instance = healthy().instances.remove(0);
        instance.address = dir.path().join("containerd.sock").display().to_string();
        let fifo = |task: &str, name: &str| {
            let folder = dir.path().join(task);
            fs::create_dir_all(&folder).unwrap();
            let path = folder.join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path.display().to_string()
        };
        let new = fifo("new", "new-stdout");
        let exec = fifo("new", "e-stderr");
        let old = fifo("old", "init-stdout");
        fs::write(dir.path().join("new/file-stdout"), "").unwrap();
        let found = |task: &str, id: &str| of_docker(&instance, task, id);
        assert_eq!(found("new", "new").stdout, new);
        assert_eq!(found("new", "e").stderr, exec);
        assert_eq!(found("old", "old").stdout, old);
        for (task, id) in [
            ("new", "file"),
            ("old", "init-"),
            ("old", "e"),
            ("none", "none"),
        ] {
            assert_eq!(found(task, id), Stdio::default(), "{task} {id}");
        }
    }
}
