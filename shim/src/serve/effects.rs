//! Effects on processes: one short-lived child each, from its plan to its report, and signals.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, unistd::Pid};
use recoverd_common::{
    cgroup::Cgroup,
    failpoint,
    proc::{Proc, ProcessId},
    read::read_text,
    seen::Seen,
};
use serde::{Deserialize, Serialize};

use super::Shim;
use crate::{
    carry,
    checkpoint::{self, Dump},
    children::{self, ChildFile, Gate, Plan, Spawned, Step},
    config::Config,
    log::Level,
    reaper,
    runc::{self, Place},
    service::Key,
    state::Input,
    stdio::{self, Wanted},
    sys,
    tasks::{Event, Failure, FailureKind, JobId, Outcome, Process, Report, Work},
};

/// A short-lived child at work.
#[derive(Debug, Serialize, Deserialize)]
pub struct Child {
    #[serde(with = "carry::pid")]
    pub(super) pid: Pid,
    #[serde(with = "carry::fd")]
    words: OwnedFd,
    /// Until its pid is on record, which is before anything else is done.
    #[serde(skip)]
    gate: Option<Gate>,
    key: Key,
    pub(super) work: Work,
    log: PathBuf,
    log_offset: u64,
    program: String,
    private_pids: bool,
    memory_limit: Option<u64>,
}

/// Longest `/proc/<pid>/cgroup` that is kept, bytes; real ones are below two KiB.
const MAX_CGROUP: u64 = 64 << 10;

/// How often what an ended child has started is looked for.
const LOOKS: usize = 8;
/// No runtime starts more processes than this for one command.
const MOST_DESCENDANTS: usize = 256;

/// Why a child was not started.
pub(super) enum NotStarted {
    /// The runtime knows the container's id.
    Exists,
    /// Anything else, one line.
    Because(String),
}

impl From<String> for NotStarted {
    fn from(text: String) -> Self {
        NotStarted::Because(text)
    }
}

impl Shim {
    pub(super) fn spawn(&mut self, job: JobId, key: &Key, work: &Work) {
        self.log.say(
            Level::Debug,
            &format!("{} {} {}", work.word(), key.id, key.exec_id),
        );
        match self.start_child(key, work) {
            Ok(child) => {
                self.state.tasks.started(job, process_of(child.pid));
                self.children.insert(job, child);
            }
            Err(NotStarted::Exists) => {
                let failure = Failure {
                    kind: FailureKind::Exists,
                    text: format!("the runtime has a container {} already", key.id),
                };
                self.inbox.push_back(Input::Event(Event::JobEnded {
                    job,
                    outcome: Outcome::Failed(failure),
                }));
            }
            Err(NotStarted::Because(text)) => {
                let failure = Failure {
                    kind: FailureKind::NotRun,
                    text,
                };
                self.inbox.push_back(Input::Event(Event::JobEnded {
                    job,
                    outcome: Outcome::Failed(failure),
                }));
            }
        }
    }

    pub(super) fn start_child(&mut self, key: &Key, work: &Work) -> Result<Child, NotStarted> {
        let task = self
            .state
            .tasks
            .get(&key.id)
            .ok_or_else(|| format!("task {} is gone", key.id))?;
        let bundle = Path::new(&task.bundle);
        let place = Place {
            bundle,
            namespace: &self.namespace,
            options: &task.options,
        };
        let rootfs = place.rootfs();
        let log = place.log(key);
        let log_offset = runc::log_length(&log);
        let mut plan = Plan {
            files: vec![ChildFile::Null, ChildFile::Words, ChildFile::Words],
            folder: bundle.to_owned(),
            steps: Vec::new(),
            to_the_end: false,
            program: None,
            argv: Vec::new(),
            env: None,
            extra_env: None,
        };
        let mut private_pids = task.private_pids;
        let mut memory_limit = task.memory_limit;
        match work {
            Work::Create | Work::Exec | Work::Restore(_) => {
                if *work != Work::Exec {
                    // Somebody else's: a task of another shim that shares the runtime's root, or
                    // one whose shim has died. Nothing of it may be touched.
                    if task.options.root(&self.namespace).join(&key.id).exists() {
                        return Err(NotStarted::Exists);
                    }
                }
                if *work == Work::Create {
                    let config = Config::read(bundle)?;
                    private_pids = config.private_pids();
                    memory_limit = config.memory_limit();
                    failpoint!("serve.options.before");
                    task.options.write(bundle).map_err(|e| e.to_string())?;
                    failpoint!("serve.options.after");
                    if !task.rootfs.is_empty() {
                        plan.steps.push(Step::MakeFolder(rootfs.clone()));
                    }
                    let mounts = task.rootfs.iter().cloned();
                    plan.steps
                        .extend(mounts.map(|mount| Step::Mount(mount, rootfs.clone())));
                }
                if let Work::Restore(restore) = work {
                    failpoint!("serve.restore.before");
                    plan.extra_env = checkpoint::restore_environment(bundle, restore)?;
                    failpoint!("serve.restore.after");
                }
                let member = task
                    .member(&key.exec_id)
                    .ok_or_else(|| format!("exec {} is gone", key.exec_id))?;
                // What is restored gets its stdio when it is.
                if *work != Work::Create || task.restore.is_none() {
                    let wanted = Wanted {
                        key,
                        wish: &member.stdio,
                        stdin_closed: member.stdin_closed,
                        bundle,
                        namespace: &self.namespace,
                        owner: (task.options.io_uid, task.options.io_gid),
                        memory_limit,
                    };
                    failpoint!("serve.stdio.before");
                    let opened = self.stdio.open(&wanted, &self.epoll)?;
                    failpoint!("serve.stdio.after");
                    if opened.wait_for_logger {
                        plan.steps.push(Step::LoggerReady {
                            at: 3,
                            says: opened.logger_says,
                        });
                    }
                    plan.files = opened.files;
                    plan.argv = place.argv(key, work, opened.console.as_deref());
                }
            }
            Work::Update(resources) => {
                let stdin =
                    children::memory_file(resources).map_err(|e| format!("pass resources: {e}"))?;
                if let Some(first) = plan.files.first_mut() {
                    *first = ChildFile::Fd(stdin);
                }
                plan.argv = place.argv(key, work, None);
            }
            Work::Checkpoint(checkpoint) => {
                let wish = &task.init.stdio;
                let named = [(1, &wish.stdout), (2, &wish.stderr)]
                    .into_iter()
                    .filter(|_| !wish.terminal);
                plan.steps.push(Step::Dump(Dump {
                    argv: place.argv(key, work, None),
                    image: PathBuf::from(&checkpoint.path),
                    work: checkpoint.work(bundle),
                    keep_work: !checkpoint.work_path.is_empty(),
                    bundle: bundle.to_owned(),
                    stdio: named
                        .filter_map(|(number, uri)| Some((number, stdio::path_of(uri)?)))
                        .collect(),
                }));
            }
            Work::Undo => {
                plan.steps.push(Step::Run {
                    argv: place.argv(key, work, None),
                    log: log.clone(),
                });
            }
            Work::Delete | Work::Cleanup => {
                plan.to_the_end = *work == Work::Cleanup;
                let run = Step::Run {
                    argv: place.argv(key, work, None),
                    log: log.clone(),
                };
                let unmount = (!task.rootfs.is_empty()).then_some(Step::Unmount(rootfs));
                if *work == Work::Delete {
                    plan.steps.push(run);
                    plan.steps.extend(unmount);
                } else {
                    // A runtime that hangs takes its child with it when its time is up.
                    plan.steps.extend(unmount);
                    plan.steps.push(run);
                }
            }
            Work::Start | Work::Pause | Work::Resume | Work::Kill { .. } => {
                plan.argv = place.argv(key, work, None);
            }
        }
        let program = task.options.binary().to_owned();
        failpoint!("serve.spawn.before");
        let Spawned { pid, words, gate } =
            children::spawn(plan).map_err(|e| format!("fork: {e}"))?;
        failpoint!("serve.spawn.after");
        Ok(Child {
            pid,
            words,
            gate: Some(gate),
            key: key.clone(),
            work: work.clone(),
            log,
            log_offset,
            program,
            private_pids,
            memory_limit,
        })
    }

    /// Has what a client reads held over our death, and let go where it has ended; and copied what
    /// somebody has ended the copier of.
    pub(super) fn hold_outputs(&mut self) {
        let mut heard = Vec::new();
        let now = super::now().mono_ms;
        let copies = self.stdio.copy_again(&self.namespace, now, &mut heard);
        if self.stdio.hold(&self.namespace, now, &mut heard) || copies {
            failpoint!("stdio.held.before");
            self.write_record();
            self.let_go();
            failpoint!("stdio.held.after");
        }
        self.hear(heard);
    }

    /// The children that were started are on record: they begin. If it cannot be written, those
    /// begin whose work cannot wait; what holds an output over our death would never be found.
    pub(super) fn let_go(&mut self) {
        match self.journal_broken {
            true => self.stdio.hold_back(super::now().mono_ms),
            false => self.stdio.let_go(),
        }
        self.stdio.begin_copiers();
        let waiting = self.children.values_mut();
        for gate in waiting.filter_map(|child| child.gate.take()) {
            failpoint!("serve.gate.before");
            gate.open();
            failpoint!("serve.gate.after");
        }
    }

    /// A short-lived child has ended; the kernel still knows it.
    pub(super) fn child_ended(&mut self, job: JobId, status: u32) {
        let Some(child) = self.children.remove(&job) else {
            return;
        };
        let outcome = if status == 0 {
            Outcome::Done(self.report(&child))
        } else {
            self.end_leftover(&child);
            let logged = match child.work {
                // It has read what the runtime says itself.
                Work::Checkpoint(_) => None,
                _ => runc::last_error(&child.log, child.log_offset),
            };
            Outcome::Failed(children::failure(
                child.words,
                logged,
                &child.program,
                status,
            ))
        };
        if !child.key.is_init() {
            let _ = fs::remove_file(&child.log);
        }
        if child.work.starts_process() {
            let mut heard = Vec::new();
            self.stdio.receive(&child.key, &self.epoll, &mut heard);
            self.hear(heard);
        }
        self.handle(Input::Event(Event::JobEnded { job, outcome }));
    }

    /// Ends a short-lived child with all that it has started. A runtime's own child leads a session
    /// of its own, so that the group's signal does not reach it: it would live on in the container,
    /// and nobody would know of it.
    pub(super) fn end_child(&self, leader: Pid) {
        // Stopped, it starts nothing more while we look.
        sys::signal_group(leader, libc::SIGSTOP);
        let proc = Proc::new(&self.roots.proc);
        // Each look may find what was started during the one before; what was killed stays there
        // as a zombie, because its parent is stopped.
        for _ in 0..LOOKS {
            let living: Vec<ProcessId> = descendants(&proc, leader.as_raw());
            if living.is_empty() {
                break;
            }
            for process in living {
                self.signal(
                    Process {
                        pid: u32::try_from(process.pid).unwrap_or(0),
                        start_time: process.start_time,
                    },
                    libc::SIGKILL,
                );
            }
        }
        sys::signal_group(leader, libc::SIGKILL);
    }

    /// A runtime that failed, or was ended, after it had started an exec's process: nobody was told
    /// of that process, so it must not be there. Only if it is ours to end, as its child.
    fn end_leftover(&self, child: &Child) {
        if child.work != Work::Exec {
            return;
        }
        let Some(process) = self.report(child).process else {
            return;
        };
        let proc = Proc::new(&self.roots.proc);
        let stat = i32::try_from(process.pid).map_or(Seen::Absent, |pid| proc.stat(pid));
        let ours = i32::try_from(std::process::id()).ok();
        if let Seen::Present(stat) = stat
            && stat.id.start_time == process.start_time
            && Some(stat.ppid) == ours
        {
            self.signal(process, libc::SIGKILL);
        }
    }

    pub(super) fn report(&self, child: &Child) -> Report {
        let mut report = Report {
            private_pids: child.private_pids,
            memory_limit: child.memory_limit,
            ..Report::default()
        };
        if !child.work.starts_process() {
            return report;
        }
        let Some(task) = self.state.tasks.get(&child.key.id) else {
            return report;
        };
        let place = Place {
            bundle: Path::new(&task.bundle),
            namespace: &self.namespace,
            options: &task.options,
        };
        let pid = match read_text(&place.pid_file(&child.key), 32) {
            Seen::Present(text) => text.trim().parse::<i32>().ok().filter(|pid| *pid > 0),
            Seen::Absent | Seen::Unknown(_) => None,
        };
        if let Some(pid) = pid {
            report.process = Some(process_of(Pid::from_raw(pid)));
            if child.work != Work::Exec {
                let proc = format!("/proc/{pid}/cgroup");
                if let Seen::Present(text) = read_text(proc.as_ref(), MAX_CGROUP) {
                    report.memberships = text.lines().map(str::to_owned).collect();
                }
                report.cgroup = match Cgroup::of(&self.roots, pid) {
                    Seen::Present(cgroup) => Some(cgroup),
                    Seen::Absent | Seen::Unknown(_) => None,
                };
            }
        }
        report
    }

    pub(super) fn prepare_exec(&self, key: &Key, spec: &[u8]) -> Result<(), String> {
        let task = self
            .state
            .tasks
            .get(&key.id)
            .ok_or_else(|| format!("task {} is gone", key.id))?;
        let place = Place {
            bundle: Path::new(&task.bundle),
            namespace: &self.namespace,
            options: &task.options,
        };
        let path = place.process_file(key);
        failpoint!("serve.prepare.before");
        let result = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
            .open(&path)
            .and_then(|mut file| file.write_all(spec));
        failpoint!("serve.prepare.after");
        result.map_err(|e| {
            let _ = fs::remove_file(&path);
            format!("write {}: {e}", path.display())
        })
    }

    pub(super) fn remove_exec_files(&self, key: &Key) {
        if key.is_init() {
            return;
        }
        if let Some(task) = self.state.tasks.get(&key.id) {
            let place = Place {
                bundle: Path::new(&task.bundle),
                namespace: &self.namespace,
                options: &task.options,
            };
            // Any of them may never have been there.
            for path in [place.process_file(key), place.pid_file(key), place.log(key)] {
                let _ = fs::remove_file(path);
                failpoint!("serve.forget.after");
            }
        }
    }

    /// Only to the process that we mean: its pidfd is taken first, then its start time compared.
    pub(super) fn signal(&self, process: Process, signal: i32) {
        let Ok(pid) = i32::try_from(process.pid) else {
            return;
        };
        failpoint!("serve.signal.before");
        let result = sys::pidfd_open(pid).and_then(|pidfd| {
            let found = reaper::start_time(Pid::from_raw(pid));
            if process.start_time != 0 && found != process.start_time {
                return Err(io::Error::other("pid belongs to another process"));
            }
            sys::pidfd_signal(pidfd.as_fd(), signal)
        });
        failpoint!("serve.signal.after");
        if let Err(e) = result {
            self.log
                .say(Level::Warning, &format!("signal {pid} with {signal}: {e}"));
        }
    }
}

/// Those below `parent` that have not ended.
fn descendants(proc: &Proc, parent: i32) -> Vec<ProcessId> {
    let mut found = Vec::new();
    let mut parents = vec![parent];
    while let Some(parent) = parents.pop() {
        for child in proc.children(parent) {
            if let Seen::Present(stat) = proc.stat(child)
                && found.len() < MOST_DESCENDANTS
            {
                parents.push(child);
                if stat.alive() {
                    found.push(stat.id);
                }
            }
        }
    }
    found
}

fn process_of(pid: Pid) -> Process {
    Process {
        // A pid is positive.
        pid: u32::try_from(pid.as_raw()).unwrap_or(0),
        start_time: reaper::start_time(pid),
    }
}
