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
        unix::{ffi::OsStrExt, fs::OpenOptionsExt, process::CommandExt},
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
    cgroup::{self, Roots},
    failpoint,
    paths::Beside,
    pb::task::DeleteResponse,
    proc::{Proc, ProcessId},
    record::{self, store::Store},
    seen::Seen,
    timestamp::Timestamp,
};

use crate::{
    args::Flags,
    context,
    delete_look::{Observed, look_at, read_state},
    delete_rule::{Answer, CleanUp, Group, Init, STAND_IN, Status, Verdict, decide},
    event_log, lock, mounts,
    remains::{self, Unsent},
    runc,
    stdio::end_holder,
    sys::{self, Hold},
};

/// For everything; containerd allows 5 s at its start.
const BUDGET: Duration = Duration::from_millis(4500);
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
    let deadline = Instant::now() + BUDGET;
    let task = Observed::look(flags, bundle);
    let clean_up = match decide(&task.facts()) {
        Verdict::LeaveAlone => {
            let why = match task.answer {
                Answer::Claims => "is served by a living shim",
                Answer::Disclaims | Answer::Silent | Answer::Nobody => {
                    "lives, and whoever asked for its end has ended"
                }
            };
            let remark = format!("{} {why}: nothing was touched", task.label);
            return Ok(Outcome {
                answer: Vec::new(),
                remarks: vec![remark],
            });
        }
        Verdict::CleanUp(clean_up) => clean_up,
    };
    Deletion {
        task,
        deadline,
        flags,
    }
    .perform(&clean_up)
}

/// The acts, each within what is left of the budget.
struct Deletion<'a> {
    task: Observed,
    deadline: Instant,
    flags: &'a Flags,
}

impl Deletion<'_> {
    fn perform(&self, clean_up: &CleanUp) -> Result<Outcome, DeleteError> {
        let mut remarks = Vec::new();
        let mut remark = |text: String| remarks.push(format!("{}: {text}", self.task.label));
        failpoint!("delete.end.before");
        if let Some(init) = clean_up.end
            && let Err(e) = end(init, self.until(KILL))
        {
            remark(format!("end init process {}: {e}", init.pid));
        }
        if let Some(stranger) = &self.task.stranger {
            let other = stranger.bundle.display();
            remark(format!(
                "the runtime's container is of bundle {other}: it is left alone"
            ));
        }
        failpoint!("delete.end.after");
        let deleted = match self.delete_container() {
            Ok(deleted) => deleted,
            Err(why) => {
                remark(why);
                false
            }
        };
        failpoint!("delete.sweep.before");
        // Not after the runtime has done its work: others may share the task's cgroup.
        let known = clean_up.end.is_some() || self.task.is_recorded() || self.has_state();
        if !deleted && known {
            for why in self.sweep_cgroups() {
                remark(why);
            }
        }
        failpoint!("delete.unmount.before");
        if let Err(why) = self.unmount() {
            remark(why);
        }
        if let Some(init) = clean_up.end
            && matches!(look_at(&Proc::new("/proc"), init), Init::Alive(_))
        {
            let (pid, id) = (init.pid, self.task.label.clone());
            return Err(DeleteError::StillAlive { pid, id });
        }
        // Their clients are to see the end.
        self.task.holders().into_iter().for_each(end_holder);
        failpoint!("delete.settle.before");
        if clean_up.group == Group::Settle
            && let Err(e) = self.settle()
        {
            remark(format!("take task out of the record: {e}"));
        }
        failpoint!("delete.settle.after");
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
    /// it. False when it knows no such container. It runs where the shim's commands do, as long as
    /// there is that place, and says there why it fails.
    fn delete_container(&self) -> Result<bool, String> {
        if !self.has_state() {
            return Ok(false);
        }
        let bundle = Some(self.task.bundle.as_path()).filter(|bundle| bundle.is_dir());
        let log = bundle.map(runc::log_in).filter(|log| takes_lines(log));
        let logged = log.as_deref().map_or(0, runc::log_length);
        let mut command = Command::new(&self.task.binary);
        command.arg("--root").arg(&self.task.root);
        if let Some(log) = &log {
            command.arg("--log").arg(log).args(["--log-format", "json"]);
        }
        if self.task.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command
            .args(["delete", "--force", self.task.name.as_str()])
            .current_dir(bundle.unwrap_or(Path::new("/")))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let child = command
            .spawn()
            .map_err(|e| format!("execute {}: {e}", self.task.binary))?;
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        let what = format!("{} delete --force", self.task.binary);
        let failed = match finish(Pid::from_raw(pid), self.until(RUNTIME)) {
            Err(why) => format!("{what}: {why}"),
            Ok(()) if self.has_state() => format!("{what} left its state"),
            Ok(()) => return Ok(true),
        };
        let said = log.and_then(|log| runc::last_error(&log, logged));
        Err(match said {
            Some(said) => format!("{failed}: {}", said.replace('\n', " ")),
            None => failed,
        })
    }

    /// Whether the runtime knows the container; runc and crun have a folder of its name, others
    /// files that begin with it. A runtime is started only then: after a normal deletion there is
    /// nothing for it to do. A stranger's does not count.
    fn has_state(&self) -> bool {
        if self.task.stranger.is_some() {
            return false;
        }
        let Ok(entries) = fs::read_dir(&self.task.root) else {
            return false;
        };
        let name = self.task.name.as_bytes();
        entries.flatten().any(
            |entry| match entry.file_name().as_bytes().strip_prefix(name) {
                Some(rest) => rest.is_empty() || rest.starts_with(b".") || rest.starts_with(b"_"),
                None => false,
            },
        )
    }

    /// Cgroups that another container of the runtime's, or of the record's, names as its own.
    fn shared_cgroups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.task.root).into_iter().flatten();
        let stranger = self.task.stranger.iter().flat_map(|s| s.cgroups.clone());
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|other| other != self.task.name.as_str())
            .filter_map(|other| read_state(&self.task.root, &other))
            .flat_map(|state| state.cgroups.into_values())
            .chain(self.task.recorded_beside())
            .chain(stranger)
            .collect()
    }

    /// When the runtime is missing or failed: ends what is in the task's cgroups, removes them.
    fn sweep_cgroups(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let until = self.until(KILL);
        let shared = self.shared_cgroups();
        for folder in self
            .task
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
            failpoint!("delete.sweep.killed");
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
        let rootfs = self.task.bundle.join("rootfs");
        let points = mounts::points(&rootfs).map_err(|why| format!("unmount: {why}"))?;
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
        let folder = fs::File::open(self.task.socket.parent().unwrap_or(Path::new("/")))?;
        while !sys::try_lock(&folder, Hold::Alone)? {
            if Instant::now() >= self.deadline {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            thread::sleep(Duration::from_millis(2));
        }
        // Another `delete` may have removed everything, the lock file too, and a new shim may be
        // there already: then there is nothing of ours any more.
        let beside = Beside::of(&self.task.socket);
        match &self.task.lock {
            Some(lock) if lock::is_at(lock, &beside.lock)? => {}
            Some(_) | None => return Ok(()),
        }
        let path = beside.record;
        let mut record = match record::read(&path) {
            Seen::Present(record) => record,
            Seen::Absent => return self.close_group(),
            Seen::Unknown(why) => return Err(io::Error::other(why)),
        };
        record
            .tasks
            .retain(|task| task.id != self.task.name.as_str());
        record
            .running
            .retain(|running| running.id != self.task.name.as_str());
        record.written_at = Timestamp::now();
        if self.task.record.present().is_none() {
            // Of another boot: what has not been told of it is nobody's news any more.
            remains::remove_group(&self.task.socket, Unsent::Remove);
            return Ok(());
        }
        if record.tasks.is_empty() {
            return self.close_group();
        }
        failpoint!("delete.record.before");
        Store::new(&path).write(&record)
    }

    /// The group has no task left. Its shim may have died with events unsent: nobody else will come
    /// by who could send them.
    fn close_group(&self) -> io::Result<()> {
        let socket = &self.task.socket;
        remains::remove_group(socket, Unsent::Keep);
        let events = Beside::of(socket).events;
        if !event_log::is_wanted(&events, true) || event_log::is_wanted(&events, false) {
            return Ok(());
        }
        let exe = env::current_exe()?;
        let mut command = Command::new(exe);
        command
            .args(self.flags.of_daemon(self.flags.group()))
            .arg("-socket")
            .arg(socket)
            .arg("tell")
            .current_dir("/")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        sys::give(&mut command, &[], false)?;
        let child = command.spawn()?;
        // As likely to be killed as a shim.
        context::adjust_oom_score(
            &Roots::default(),
            nix::unistd::getppid().as_raw(),
            child.id(),
        );
        Ok(())
    }
}

/// A runtime refuses to work without the log that it is given: on a full disk there may be none, and
/// what is no file could hold it.
fn takes_lines(log: &Path) -> bool {
    fs::File::options()
        .append(true)
        .create(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(log)
        .and_then(|log| log.metadata())
        .is_ok_and(|meta| meta.is_file())
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
fn finish(pid: Pid, until: Instant) -> Result<(), String> {
    let pidfd = sys::pidfd_open(pid.as_raw()).map_err(|e| e.to_string())?;
    if !wait_for(pidfd.as_fd(), until).map_err(|e| e.to_string())? {
        let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        // And what it started, if it leads a group: not reaped yet, it still owns the number.
        let _ = killpg(pid, Signal::SIGKILL);
        return Err("did not end in time".into());
    }
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        Ok(WaitStatus::Exited(_, code)) => Err(format!("ended with status {code}")),
        Ok(other) => Err(format!("ended by {other:?}")),
        Err(e) => Err(e.to_string()),
    }
}
