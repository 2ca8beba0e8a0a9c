//! `delete`: cleans up after a task whose shim is gone, and answers with its exit status.
//!
//! Runs while containerd waits: 5 s at its start, after which it kills this process and goes on
//! waiting for our pipes to close. So there is one budget for everything, and every child has a
//! stdio of its own. Nothing here stops at the first failure: what could not be done is said on
//! standard error (containerd logs it), and the rest is done. Only an init that is still alive in
//! the end makes it fail: then the bundle must stay.

use std::{
    env, fs, io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use prost::Message;
use recoverd_common::{
    bundle::Bundle,
    cgroup::{self, Cgroup, Roots, parse_memberships},
    mounts,
    paths::{self, Beside},
    pb::task::DeleteResponse,
    proc::{Proc, ProcessId},
    record::{self, Record, Task, store::Store},
    runc::RuncState,
    seen::Seen,
    shim_client::{CallError, ShimClient},
    timestamp::Timestamp,
    ttrpc::code,
};

use crate::{
    args::Flags,
    delete_rule::{
        Answer, CleanUp, Facts, Group, Init, Recorded, STAND_IN, Status, Verdict, decide,
    },
    lock::{self, Attempt},
    options::Options,
    remains,
    sys::{self, Hold},
};

/// For everything; containerd allows 5 s at its start.
const BUDGET: Duration = Duration::from_millis(4500);
/// For the shim to answer, and for a shim that is just leaving to be gone.
const SHIM: Duration = Duration::from_millis(1500);
/// For the init to be gone after SIGKILL.
const KILL: Duration = Duration::from_millis(700);
/// For the runtime; a healthy one takes 30 ms.
const RUNTIME: Duration = Duration::from_millis(1700);
/// For unmounting.
const UNMOUNT: Duration = Duration::from_millis(400);

/// Why `delete` fails.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There is no place to look for the bundle.
    #[error("find bundle: {0}")]
    NoBundle(io::Error),
    /// The caller means something else than it says.
    #[error("bundle {} is not of task {id}", bundle.display())]
    OtherBundle {
        /// `-bundle`.
        bundle: PathBuf,
        /// `-id`.
        id: String,
    },
    /// In a call that cannot be interrupted, or beyond our rights.
    #[error("init process {pid} of {id} is still alive")]
    StillAlive {
        /// The init.
        pid: i32,
        /// The task.
        id: String,
    },
}

/// What was done and is to be told.
#[derive(Debug)]
pub struct Outcome {
    /// `DeleteResponse` for standard output; empty when nothing was touched.
    pub answer: Vec<u8>,
    /// Lines for standard error.
    pub remarks: Vec<String>,
}

/// Does it.
pub fn run(flags: &Flags) -> Result<Outcome, DeleteError> {
    let here = env::current_dir();
    let bundle = match (&flags.bundle, here) {
        (Some(bundle), _) if bundle.is_absolute() => bundle.clone(),
        (_, Ok(here)) => flags.bundle_to_delete(&here),
        (_, Err(e)) => return Err(DeleteError::NoBundle(e)),
    };
    if bundle.file_name().map(OsStrExt::as_bytes) != Some(flags.id.as_str().as_bytes()) {
        let id = flags.id.to_string();
        return Err(DeleteError::OtherBundle { bundle, id });
    }
    let task = Observed::look(flags, bundle);
    let clean_up = match decide(&task.facts()) {
        Verdict::LeaveAlone => {
            let remark = format!(
                "{} is served by a living shim: nothing was touched",
                task.id
            );
            return Ok(Outcome {
                answer: Vec::new(),
                remarks: vec![remark],
            });
        }
        Verdict::CleanUp(clean_up) => clean_up,
    };
    task.perform(&clean_up)
}

// ---- look ----

/// Everything known of the task, looked at once.
struct Observed {
    deadline: Instant,
    id: String,
    bundle: PathBuf,
    socket: PathBuf,
    answer: Answer,
    /// Held until the end.
    lock: Option<fs::File>,
    record: Seen<Record>,
    init: Init,
    binary: String,
    /// The runtime's `--root`, the namespace included.
    root: PathBuf,
    systemd_cgroup: bool,
    cgroups: Vec<PathBuf>,
}

impl Observed {
    fn look(flags: &Flags, bundle: PathBuf) -> Self {
        let deadline = Instant::now() + BUDGET;
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
        let state = read_state(&root, id);
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
            deadline,
            id: format!("{namespace}/{id}"),
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
        }
    }

    fn name(&self) -> &str {
        self.id.rsplit('/').next().unwrap_or(&self.id)
    }

    fn facts(&self) -> Facts {
        let task = self
            .record
            .present()
            .and_then(|record| find(record, self.name()));
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
fn read_state(root: &Path, id: &str) -> Option<RuncState> {
    let path = root.join(id).join("state.json");
    match recoverd_common::read::read_file(&path, recoverd_common::read::MAX_FILE) {
        Seen::Present(bytes) => recoverd_common::runc::parse(&bytes).ok(),
        Seen::Absent | Seen::Unknown(_) => None,
    }
}

fn look_at(proc: &Proc, init: ProcessId) -> Init {
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

/// What containerd says for a raw wait status: the code, or 128 and the signal.
fn exit_status(raw: i32) -> Option<u32> {
    let raw = u32::try_from(raw).ok()?;
    match raw & 0x7f {
        0 => Some((raw >> 8) & 0xff),
        0x7f => None,
        signal => Some(signal.saturating_add(128)),
    }
}

/// The task's own cgroup folders, as the record or runc's state names them. A group that is not
/// the task's alone (the root, ours, one above ours) is left out.
fn cgroups(roots: &Roots, task: Option<&Task>, state: Option<&RuncState>) -> Vec<PathBuf> {
    let recorded = task.map(|task| parse_memberships(&task.cgroup.join("\n")));
    let recorded = recorded.and_then(|all| Cgroup::of_memberships(roots, &all).present().cloned());
    let mut folders = match (recorded, state) {
        (Some(Cgroup::V1(folders)), _) => folders.into_iter().map(|(_, path)| path).collect(),
        (Some(Cgroup::V2(folder)), _) => vec![folder],
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
        folder.starts_with(&roots.cgroup)
            && !hierarchy_root
            && !own.iter().any(|own| own.starts_with(folder))
    });
    folders
}

// ---- do ----

impl Observed {
    fn perform(&self, clean_up: &CleanUp) -> Result<Outcome, DeleteError> {
        let mut remarks = Vec::new();
        let mut remark = |text: String| remarks.push(format!("{}: {text}", self.id));
        if let Some(init) = clean_up.end
            && let Err(e) = end(init, self.until(KILL))
        {
            remark(format!("end init process {}: {e}", init.pid));
        }
        let deleted = match self.delete_container() {
            Ok(deleted) => deleted,
            Err(why) => {
                remark(why);
                false
            }
        };
        // Not after the runtime has done its work: others may share the task's cgroup.
        if !deleted && (clean_up.end.is_some() || self.has_state()) {
            for why in self.sweep_cgroups() {
                remark(why);
            }
        }
        if let Err(why) = self.unmount() {
            remark(why);
        }
        if let Some(init) = clean_up.end
            && matches!(look_at(&Proc::new("/proc"), init), Init::Alive(_))
        {
            let (pid, id) = (init.pid, self.id.clone());
            return Err(DeleteError::StillAlive { pid, id });
        }
        if clean_up.group == Group::Settle
            && let Err(e) = self.settle()
        {
            remark(format!("take task out of the record: {e}"));
        }
        let (exit_status, at) = match &clean_up.status {
            Status::Recorded { status, at } => (*status, *at),
            Status::Now(status) => (*status, Timestamp::now()),
            Status::StandIn(why) => {
                remark(format!(
                    "exit status unknown, because {why}; {STAND_IN} is a stand-in"
                ));
                (STAND_IN, Timestamp::now())
            }
            Status::Nothing => (STAND_IN, Timestamp::now()),
        };
        let answer = DeleteResponse {
            pid: u32::try_from(clean_up.pid).unwrap_or(0),
            exit_status,
            exited_at: Some(prost_types::Timestamp {
                seconds: at.seconds,
                nanos: i32::try_from(at.nanos).unwrap_or(0),
            }),
        };
        Ok(Outcome {
            answer: answer.encode_to_vec(),
            remarks,
        })
    }

    /// `wait` from now, but never beyond the whole budget.
    fn until(&self, wait: Duration) -> Instant {
        (Instant::now() + wait).min(self.deadline)
    }

    /// The runtime's own `delete --force`, which also ends what is left in the cgroup and removes
    /// it. False when it knows no such container.
    fn delete_container(&self) -> Result<bool, String> {
        if !self.has_state() {
            return Ok(false);
        }
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
            .args(["delete", "--force", self.name()])
            .current_dir("/")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let child = command
            .spawn()
            .map_err(|e| format!("execute {}: {e}", self.binary))?;
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        let what = format!("{} delete --force", self.binary);
        finish(pid, self.until(RUNTIME)).map_err(|why| format!("{what}: {why}"))?;
        if self.has_state() {
            Err(format!("{what} left its state"))
        } else {
            Ok(true)
        }
    }

    /// Whether the runtime knows the container; runc and crun have a folder of its name, others
    /// files that begin with it. A runtime is started only then: after a normal deletion there is
    /// nothing for it to do.
    fn has_state(&self) -> bool {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return false;
        };
        let name = self.name().as_bytes();
        entries.flatten().any(
            |entry| match entry.file_name().as_bytes().strip_prefix(name) {
                Some(rest) => rest.is_empty() || rest.starts_with(b".") || rest.starts_with(b"_"),
                None => false,
            },
        )
    }

    /// Cgroups that another container of the runtime's names as its own.
    fn shared_cgroups(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|other| other != self.name())
            .filter_map(|other| read_state(&self.root, &other))
            .flat_map(|state| state.cgroups.into_values())
            .collect()
    }

    /// When the runtime is missing or failed: ends what is in the task's cgroups, removes them.
    fn sweep_cgroups(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let until = self.until(KILL);
        let shared = self.shared_cgroups();
        for folder in self
            .cgroups
            .iter()
            .filter(|folder| !shared.contains(folder))
        {
            // v2, Linux 5.14 on: all at once, forks included.
            let all = fs::write(folder.join("cgroup.kill"), "1").is_ok();
            while let Seen::Present(pids) = cgroup::read_procs(folder) {
                if pids.is_empty() {
                    break;
                }
                if Instant::now() >= until {
                    failures.push(format!(
                        "{} processes live on in {}",
                        pids.len(),
                        folder.display()
                    ));
                    break;
                }
                if !all {
                    pids.iter().for_each(|pid| kill_member(*pid, folder));
                }
                thread::sleep(Duration::from_millis(5));
            }
            match fs::remove_dir(folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    failures.push(format!("remove cgroup {}: {e}", folder.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        failures
    }

    /// Unmounts everything at and below `rootfs`, in a child: a dead device may hold it for ever.
    fn unmount(&self) -> Result<(), String> {
        let rootfs = self.bundle.join("rootfs");
        let below = |mounts: Vec<mounts::Mount>| -> Vec<PathBuf> {
            mounts
                .into_iter()
                .map(|m| m.point)
                .filter(|point| point.starts_with(&rootfs))
                .collect()
        };
        let points = match mounts::read(Path::new("/proc")) {
            Seen::Present(mounts) => below(mounts),
            Seen::Absent => return Err("unmount: /proc shows no mounts".into()),
            Seen::Unknown(why) => return Err(format!("unmount: the mount table {why}")),
        };
        if points.is_empty() {
            return Ok(());
        }
        let child = sys::apart(|| {
            // Later mounts cover earlier ones.
            let failed = points
                .iter()
                .rev()
                .filter(|point| unmount_one(point).is_err())
                .count();
            u8::try_from(failed).unwrap_or(u8::MAX)
        });
        let child = child.map_err(|e| format!("unmount {}: {e}", rootfs.display()))?;
        finish(child, self.until(UNMOUNT))
            .map_err(|why| format!("unmount {}: {why}", rootfs.display()))
    }

    /// Takes the task out of the record, and removes everything of the group with its last one.
    /// One `delete` at a time, by a lock on the folder: each has to see what the others took out.
    fn settle(&self) -> io::Result<()> {
        let folder = fs::File::open(self.socket.parent().unwrap_or(Path::new("/")))?;
        while !sys::try_lock(&folder, Hold::Alone)? {
            if Instant::now() >= self.deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            thread::sleep(Duration::from_millis(2));
        }
        // Another `delete` may have removed everything, the lock file too, and a new shim may be
        // there already: then there is nothing of ours any more.
        let beside = Beside::of(&self.socket);
        match &self.lock {
            Some(lock) if lock::is_at(lock, &beside.lock)? => {}
            Some(_) | None => return Ok(()),
        }
        let path = beside.record;
        let mut record = match record::read(&path) {
            Seen::Present(record) => record,
            Seen::Absent => {
                remains::remove_group(&self.socket);
                return Ok(());
            }
            Seen::Unknown(why) => return Err(io::Error::other(why)),
        };
        record.tasks.retain(|task| task.id != self.name());
        record.running.retain(|running| running.id != self.name());
        record.written_at = Timestamp::now();
        let of_this_boot = self.record.present().is_some();
        if record.tasks.is_empty() || !of_this_boot {
            remains::remove_group(&self.socket);
            return Ok(());
        }
        Store::new(&path).write(&record)
    }
}

fn unmount_one(point: &Path) -> nix::Result<()> {
    match umount2(point, MntFlags::UMOUNT_NOFOLLOW) {
        // Somebody outside looks into it: it goes when he leaves.
        Err(nix::errno::Errno::EBUSY) => {
            umount2(point, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        }
        // Gone meanwhile.
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// Ends `init` and waits for its end. The descriptor is opened before the start time is looked
/// at once more, so the signal cannot reach another process.
fn end(init: ProcessId, until: Instant) -> io::Result<()> {
    let gone = |e: &io::Error| e.raw_os_error() == Some(libc::ESRCH);
    let pidfd = match sys::pidfd_open(init.pid) {
        Ok(pidfd) => pidfd,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(e),
    };
    if !matches!(look_at(&Proc::new("/proc"), init), Init::Alive(_)) {
        return Ok(());
    }
    match sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL) {
        Err(e) if gone(&e) => return Ok(()),
        other => other?,
    }
    if wait_for(pidfd.as_fd(), until)? {
        return Ok(());
    }
    Err(io::Error::from(io::ErrorKind::TimedOut))
}

/// Kills `pid` if it is still a member of the v1 or v2 group `folder` once its descriptor is ours.
fn kill_member(pid: i32, folder: &Path) {
    let Ok(pidfd) = sys::pidfd_open(pid) else {
        return;
    };
    let member = cgroup::read_procs(folder);
    if member.present().is_some_and(|pids| pids.contains(&pid)) {
        let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
    }
}

/// Waits for the end of the process behind `pidfd`; false when the time is over.
fn wait_for(pidfd: std::os::fd::BorrowedFd<'_>, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Waits for our child `pid`; one that does not end in time is killed and left to PID 1.
fn finish(pid: i32, until: Instant) -> Result<(), String> {
    let pidfd = sys::pidfd_open(pid).map_err(|e| e.to_string())?;
    if !wait_for(pidfd.as_fd(), until).map_err(|e| e.to_string())? {
        let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        // And what it started, if it leads a group: not reaped yet, it still owns the number.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        return Err("did not end in time".into());
    }
    match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        Ok(WaitStatus::Exited(_, code)) => Err(format!("ended with status {code}")),
        Ok(other) => Err(format!("ended by {other:?}")),
        Err(e) => Err(e.to_string()),
    }
}
