//! The tasks of one shim: state + event → effects or refusal. Pure: no clock, no file, no
//! process is touched here, so that every race can be written down as a test.
//!
//! ```text
//! a task     Creating ──▶ Created ──▶ Running ◀──▶ Paused
//!               │            │           │           │      (exit, from any of the three)
//!               ▼            └─────┬─────┴───────────┘
//!            (gone)                ▼
//!                               Stopped ──▶ (gone)          Delete; of a created one too
//! an exec    Added ──▶ Starting ──▶ Running ──▶ Stopped ──▶ (gone)
//!                         └──▶ Failed ──────────────▲
//! ```
//!
//! What a task does right now, beside its phase, is its *work*: one runtime command, or the wait
//! of a Delete for stdio. Requests that need the task for themselves (Start, Pause, Resume,
//! Update, Delete) queue behind it, as they queue behind the stock shim's lock; State, Wait,
//! Pids, Connect, Stats, Exec and plain signals never do.
//!
//! An exit is remembered when it is seen and *told* (event, Wait, State) when its turn comes: not
//! before the start that it belongs to was told, and an init's not before those of its execs.

mod adoptee;
mod checkpoint;
mod settle;

use std::collections::BTreeMap;

pub use adoptee::{AdoptedExec, AdoptedMember, Adoptee, News};

use recoverd_common::{cgroup::Cgroup, timestamp::Timestamp, ttrpc::code};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{Checkpoint, Restore},
    connections::Caller,
    options::Options,
    resume::Settle,
    service::{Call, Create, Ended, Key, Mount, Refusal, Reply, State, StdioWish},
};
use recoverd_common::pb::task::Status;

/// Delete waits this long for output that a surviving descendant may still write, as the stock
/// shim does.
const DRAIN_MS: u64 = 10_000;
/// The runtime has deleted a container that had not exited; its exit is due at any moment.
const LATE_EXIT_MS: u64 = 5_000;
/// A runtime command that cleans up, or that no caller waits for, may take so long.
const OWN_MS: u64 = 10_000;

/// The moment of an event, by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Milliseconds of the monotonic clock: for deadlines.
    pub mono_ms: u64,
    /// The wall clock: for what is told.
    pub wall: Timestamp,
}

/// Numbers one short-lived child.
pub type JobId = u64;

/// A process, proof against a reused pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Field 22 of its `stat`, 0 if that could not be read.
    pub start_time: u64,
}

/// What happens to the tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// Somebody asks.
    Request {
        /// Who.
        from: Caller,
        /// What.
        call: Call,
        /// When the caller stops waiting, by the monotonic clock.
        until: Option<u64>,
    },
    /// The files that an exec needs are written, or could not be.
    ExecPrepared {
        /// Which exec.
        key: Key,
        /// Why not.
        result: Result<(), String>,
    },
    /// A short-lived child ended, or could not be started.
    JobEnded {
        /// Which.
        job: JobId,
        /// How.
        outcome: Outcome,
    },
    /// A process that was no job's child exited.
    Exited {
        /// Its pid, not yet reused.
        pid: u32,
        /// Exit code or 128 + signal.
        status: u32,
    },
    /// A process that we did not fork has exited.
    Ended {
        /// Whose.
        key: Key,
        /// Exit code or 128 + signal; or why it is not to be had.
        status: Result<u32, String>,
    },
    /// A predecessor's tasks, all at once: the record must never name some of them only.
    Adopt(Vec<Adoptee>),
    /// A predecessor was at this when it died; its tasks are adopted by now.
    Settle {
        /// Who waits.
        from: Caller,
        /// For what.
        what: Settle,
    },
    /// The kernel killed for want of memory.
    Oom {
        /// In which task.
        id: String,
        /// How often by now.
        #[serde(default)]
        kills: u64,
    },
    /// A process's stdio has nothing more to carry.
    Drained {
        /// Whose.
        key: Key,
    },
    /// A connection ended; nobody waits there any more.
    Disconnected {
        /// Which.
        connection: u64,
    },
    /// A deadline has come.
    Timer(Timer),
}

/// How a short-lived child ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Well.
    Done(Report),
    /// Badly.
    Failed(Failure),
}

/// What a successful child leaves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The process that Create or an exec's Start made.
    pub process: Option<Process>,
    /// Of Create: where it runs.
    pub cgroup: Option<Cgroup>,
    /// Of Create: the same in the kernel's words, line by line.
    #[serde(default)]
    pub memberships: Vec<String>,
    /// Of Create: a pid namespace of its own, which ends with its init.
    pub private_pids: bool,
    /// Of Create: the container's memory limit, bytes.
    #[serde(default)]
    pub memory_limit: Option<u64>,
}

/// What a failed child leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Of which kind, as `runc` sorts them.
    pub kind: FailureKind,
    /// One line.
    pub text: String,
}

/// Kinds of failure that requests answer differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The runtime knows no such container.
    NoContainer,
    /// The process to be signalled has gone.
    NoProcess,
    /// The runtime has a container of this id already, and it is not ours.
    Exists,
    /// Nothing was run, so there is nothing to undo.
    NotRun,
    /// Anything else.
    Other,
}

/// Deadlines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Timer {
    /// The caller of this job waits no longer.
    Job(JobId),
    /// A Delete has waited long enough for stdio.
    Drain(Key),
    /// A Delete has waited long enough for the exit.
    LateExit(String),
}

/// What is to be done, in this order, after the record is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Effect {
    /// Answer.
    Reply {
        /// Whom.
        to: Caller,
        /// What.
        reply: Result<Reply, Refusal>,
    },
    /// Tell containerd.
    Publish(Notice),
    /// Start a short-lived child; `JobEnded` follows in any case.
    Spawn {
        /// Its number.
        job: JobId,
        /// For which process.
        key: Key,
        /// What it does.
        work: Work,
    },
    /// End a short-lived child whose caller waits no longer; `JobEnded` follows.
    EndJob(JobId),
    /// Write what `runc exec` will read; `ExecPrepared` follows.
    PrepareExec {
        /// Which exec.
        key: Key,
        /// The OCI process.
        spec: Vec<u8>,
    },
    /// Signal a process that we have not reaped, so the pid is its own.
    Signal {
        /// Whom.
        process: Process,
        /// With what.
        signal: i32,
    },
    /// The task runs: watch it for OOM kills.
    WatchOom {
        /// Which.
        id: String,
        /// What its counter was at the last look; none: what happens from now on is new.
        already: Option<u64>,
    },
    /// No process writes any more: `Drained` follows when all is carried.
    FinishStdio(Key),
    /// Close what is left of a process's stdio, end its logger, remove its files.
    CloseStdio(Key),
    /// End its stdin once what the client has written is carried.
    CloseStdin(Key),
    /// Set the size of its terminal.
    Resize {
        /// Whose.
        key: Key,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Answer with the processes of the cgroup.
    Pids {
        /// Whom.
        to: Caller,
        /// Of which task.
        id: String,
    },
    /// Answer with the cgroup's figures.
    Stats {
        /// Whom.
        to: Caller,
        /// Of which task.
        id: String,
    },
    /// The task has gone: forget what belongs to it.
    Forget {
        /// Which.
        id: String,
    },
    /// At this time of the monotonic clock, `Timer`.
    Arm {
        /// When.
        at: u64,
        /// What.
        timer: Timer,
    },
    /// No task is left and containerd says go: tell the rest, answer, leave.
    Leave {
        /// Who asked.
        to: Caller,
    },
}

/// What containerd is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// `/tasks/create`.
    Create {
        /// Of which task.
        id: String,
        /// Its bundle.
        bundle: String,
        /// Its mounts.
        rootfs: Vec<Mount>,
        /// Its stdio.
        stdio: StdioWish,
        /// The checkpoint that Start will restore; empty for none.
        checkpoint: String,
        /// Its init, 0 when there is none before Start.
        pid: u32,
    },
    /// `/tasks/start`.
    Start {
        /// Of which task.
        id: String,
        /// Its init.
        pid: u32,
    },
    /// `/tasks/exec-added`.
    ExecAdded(Key),
    /// `/tasks/exec-started`.
    ExecStarted {
        /// Which.
        key: Key,
        /// Its process.
        pid: u32,
    },
    /// `/tasks/exit`.
    Exit {
        /// Of which process.
        key: Key,
        /// How.
        ended: Ended,
    },
    /// `/tasks/delete`.
    Delete {
        /// Of which task.
        id: String,
        /// How its init had ended.
        ended: Ended,
    },
    /// `/tasks/oom`.
    Oom(String),
    /// `/tasks/checkpointed`.
    Checkpointed {
        /// Which task.
        id: String,
        /// Where the images are.
        path: String,
    },
    /// `/tasks/paused`.
    Paused(String),
    /// `/tasks/resumed`.
    Resumed(String),
}

/// What a short-lived child does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Mount the rootfs, open stdio, `runc create`; of a task that is restored, the first only.
    Create,
    /// Undo what a failed Create left: `runc delete --force`, unmount.
    Cleanup,
    /// `runc start`.
    Start,
    /// `runc exec`.
    Exec,
    /// `runc pause`.
    Pause,
    /// `runc resume`.
    Resume,
    /// `runc update` with these resources.
    Update(Vec<u8>),
    /// `runc kill`.
    Kill {
        /// The signal.
        signal: i32,
        /// `--all`.
        all: bool,
    },
    /// `runc delete`, unmount.
    Delete,
    /// `runc checkpoint`.
    Checkpoint(Box<Checkpoint>),
    /// Open stdio, `runc restore`.
    Restore(Restore),
    /// Undo what a failed Restore left: `runc delete --force`. The task stays.
    Undo,
}

impl Work {
    /// True if it may leave us a process.
    pub fn starts_process(&self) -> bool {
        matches!(self, Work::Create | Work::Exec | Work::Restore(_))
    }

    /// The word for it in the record, the log and the runtime's own errors.
    pub fn word(&self) -> &'static str {
        match self {
            Work::Create => "create",
            Work::Cleanup => "cleanup",
            Work::Start => "start",
            Work::Exec => "exec",
            Work::Pause => "pause",
            Work::Resume => "resume",
            Work::Update(_) => "update",
            Work::Checkpoint(_) => "checkpoint",
            Work::Restore(_) => "restore",
            Work::Undo => "undo",
            Work::Kill { .. } => "kill",
            Work::Delete => "delete",
        }
    }
}

/// How far a task is; see the head of this file. Stopped is an exit that was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// `runc create` runs, or its failure is cleaned up. Nobody but its caller knows of it.
    Creating,
    /// Not started.
    Created,
    /// Started.
    Running,
    /// Frozen.
    Paused,
    /// Exited, and told.
    Stopped,
}

/// How far an exec is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecPhase {
    /// Registered.
    Added,
    /// `runc exec` runs.
    Starting,
    /// Started.
    Running,
    /// `runc exec` failed.
    Failed,
    /// Exited, and told.
    Stopped,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal; a stand-in when it is not known.
    pub status: u32,
    /// When it was seen.
    pub at: Timestamp,
    /// Why the status is not known.
    pub unknown: Option<String>,
}

impl Exit {
    /// As the kernel said it.
    pub fn observed(status: u32, at: Timestamp) -> Self {
        Self {
            status,
            at,
            unknown: None,
        }
    }

    /// It has ended, how is not to be had. The wire needs a number; this is the one that
    /// containerd itself puts in such a place.
    pub fn unknown(why: String, at: Timestamp) -> Self {
        Self {
            status: STAND_IN,
            at,
            unknown: Some(why),
        }
    }
}

/// What init and exec have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// None before there is one.
    pub process: Option<Process>,
    /// As requested.
    pub stdio: StdioWish,
    /// CloseIO was called.
    pub stdin_closed: bool,
    /// Set when it is seen; told later.
    pub exit: Option<Exit>,
    /// Its stdio has nothing more to carry.
    pub drained: bool,
    /// Callers of Wait.
    pub waiters: Vec<Caller>,
}

impl Member {
    fn new(stdio: StdioWish) -> Self {
        Self {
            process: None,
            stdio,
            stdin_closed: false,
            exit: None,
            drained: false,
            waiters: Vec::new(),
        }
    }

    fn pid(&self) -> u32 {
        self.process.map_or(0, |p| p.pid)
    }

    fn ended(&self) -> Ended {
        Ended {
            pid: self.pid(),
            status: self.exit.as_ref().map_or(0, |exit| exit.status),
            at: self.exit.as_ref().map(|exit| exit.at),
        }
    }
}

/// One exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// How far it is.
    pub phase: ExecPhase,
    /// Its process and stdio.
    pub member: Member,
    /// A Delete that waits for stdio.
    deleting: Option<Caller>,
    /// The Exec request, until its files are written.
    adding: Option<Caller>,
}

/// What a task is busy with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Busy {
    /// A runtime command.
    Job(JobId),
    /// Delete waits for stdio to drain.
    Draining(Caller, Option<u64>),
    /// Delete waits for the exit of what the runtime has killed.
    LateExit(Caller),
}

/// A request that waits until its task is free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Queued {
    from: Caller,
    call: Call,
    until: Option<u64>,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its bundle.
    pub bundle: String,
    /// How far it is.
    pub phase: Phase,
    /// Its init.
    pub init: Member,
    /// Its execs.
    pub execs: BTreeMap<String, Exec>,
    /// The runtime's options.
    pub options: Options,
    /// Mounted on `rootfs`.
    pub rootfs: Vec<Mount>,
    /// Where its init is restored from, until it is.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// Where it runs, once created.
    pub cgroup: Option<Cgroup>,
    /// The same in the kernel's words, for the record.
    pub memberships: Vec<String>,
    /// Its pid namespace ends with its init.
    pub private_pids: bool,
    /// Its memory limit, bytes: what its pipes hold counts.
    pub memory_limit: Option<u64>,
    /// When Create was accepted.
    pub created_at: Timestamp,
    /// An OOM kill was told.
    pub oom: bool,
    /// Its cgroup's counter of them at the last look; none before there is one.
    #[serde(default)]
    pub oom_kills: Option<u64>,
    busy: Option<Busy>,
    queue: Vec<Queued>,
}

/// A short-lived child at work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// For which process.
    pub key: Key,
    /// What it does.
    pub work: Work,
    /// Who waits for it.
    pub caller: Option<Caller>,
    /// The child, once there is one: a successor waits for its end.
    pub process: Option<Process>,
    /// Its deadline passed and it was ended.
    ended: bool,
    /// Of Cleanup: what the caller is told when it is done.
    then: Option<Refusal>,
}

/// Every task, and the short-lived children that work for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tasks {
    /// Our own pid, for Connect.
    shim_pid: u32,
    tasks: BTreeMap<String, Task>,
    jobs: BTreeMap<JobId, Job>,
    last_job: JobId,
    /// Callers of Shutdown that wait for the fate of what is being made.
    shutdown: Vec<Caller>,
    /// The record no longer says all.
    dirty: bool,
    /// The moment of the event at hand.
    mono_ms: u64,
}

impl Task {
    /// The process of an init that has not exited.
    fn living(&self) -> Option<Process> {
        self.init.process.filter(|_| self.init.exit.is_none())
    }

    /// True once the runtime may hold something of it.
    fn known(&self) -> bool {
        self.phase != Phase::Creating
    }

    /// Init or exec.
    pub fn member(&self, exec_id: &str) -> Option<&Member> {
        if exec_id.is_empty() {
            Some(&self.init)
        } else {
            self.execs.get(exec_id).map(|exec| &exec.member)
        }
    }

    fn member_mut(&mut self, exec_id: &str) -> Option<&mut Member> {
        if exec_id.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec_id).map(|exec| &mut exec.member)
        }
    }

    /// Execs whose files are being written, and who waits for it.
    pub fn adding(&self) -> impl Iterator<Item = (&String, Caller)> {
        let execs = self.execs.iter();
        execs.filter_map(|(id, exec)| Some((id, exec.adding?)))
    }

    /// True while Delete is at work.
    pub fn is_deleting(&self, jobs: &BTreeMap<JobId, Job>) -> bool {
        match &self.busy {
            Some(Busy::Job(job)) => jobs.get(job).is_some_and(|job| job.work == Work::Delete),
            Some(Busy::Draining(..) | Busy::LateExit(_)) => true,
            None => false,
        }
    }

    fn status(&self, jobs: &BTreeMap<JobId, Job>) -> Status {
        let pausing = |busy: &Busy| match busy {
            Busy::Job(job) => jobs.get(job).is_some_and(|job| job.work == Work::Pause),
            Busy::Draining(..) | Busy::LateExit(_) => false,
        };
        match self.phase {
            Phase::Creating => Status::Unknown,
            Phase::Created => Status::Created,
            Phase::Running if self.busy.as_ref().is_some_and(pausing) => Status::Pausing,
            Phase::Running => Status::Running,
            Phase::Paused => Status::Paused,
            Phase::Stopped => Status::Stopped,
        }
    }
}

fn no_task() -> Refusal {
    Refusal::not_found("container not created")
}

fn no_exec(exec_id: &str) -> Refusal {
    Refusal::not_found(format!("process does not exist {exec_id}"))
}

fn finished() -> Refusal {
    Refusal::not_found("process already finished")
}

impl Tasks {
    /// No tasks; `shim_pid` is ours.
    pub fn new(shim_pid: u32) -> Self {
        Self {
            shim_pid,
            tasks: BTreeMap::new(),
            jobs: BTreeMap::new(),
            last_job: 0,
            shutdown: Vec::new(),
            dirty: true,
            mono_ms: 0,
        }
    }

    /// A task by id.
    pub fn get(&self, id: &str) -> Option<&Task> {
        self.tasks.get(id)
    }

    /// All tasks by id.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Task)> {
        self.tasks.iter()
    }

    /// True without tasks and children at work.
    pub fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.jobs.is_empty()
    }

    /// How many tasks and execs there are that have not exited.
    pub fn living(&self) -> usize {
        self.tasks
            .values()
            .map(|task| {
                let execs = task.execs.values().map(|exec| &exec.member);
                let members = std::iter::once(&task.init).chain(execs);
                members.filter(|member| member.exit.is_none()).count()
            })
            .sum()
    }

    /// The children at work.
    pub fn jobs(&self) -> &BTreeMap<JobId, Job> {
        &self.jobs
    }

    /// True when the record has to be written before the effects; false from then on.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// The record could not be written.
    pub fn still_dirty(&mut self) {
        self.dirty = true;
    }

    /// A short-lived child has been started.
    pub fn started(&mut self, job: JobId, process: Process) {
        if let Some(job) = self.jobs.get_mut(&job) {
            job.process = Some(process);
            self.dirty = true;
        }
    }

    /// Takes an event, gives what is to be done.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        self.mono_ms = now.mono_ms;
        match event {
            Event::Request { from, call, until } => self.request(from, call, until, now, &mut out),
            Event::ExecPrepared { key, result } => self.exec_prepared(&key, result, &mut out),
            Event::JobEnded { job, outcome } => self.job_ended(job, outcome, now, &mut out),
            Event::Exited { pid, status } => self.exited(pid, status, now, &mut out),
            Event::Ended { key, status } => {
                let exit = match status {
                    Ok(status) => Exit::observed(status, now.wall),
                    Err(why) => Exit::unknown(why, now.wall),
                };
                self.ended(&key, exit, now, &mut out);
            }
            Event::Adopt(adoptees) => self.adopt(adoptees, now, &mut out),
            Event::Settle { from, what } => self.settle(from, what, now, &mut out),
            Event::Oom { id, kills } => self.oom(id, kills, &mut out),
            Event::Drained { key } => self.drained(&key, now, &mut out),
            Event::Disconnected { connection } => self.disconnected(connection, now, &mut out),
            Event::Timer(timer) => self.timer(timer, now, &mut out),
        }
        self.shut_down(&mut out);
        out
    }

    /// Decides on Shutdown when there is nothing more to wait for.
    fn shut_down(&mut self, out: &mut Vec<Effect>) {
        if self.shutdown.is_empty() {
            return;
        }
        if self.tasks.values().any(Task::known) {
            for to in std::mem::take(&mut self.shutdown) {
                answer(Some(to), Ok(Reply::Empty), out);
            }
        } else if self.is_idle() {
            let callers = std::mem::take(&mut self.shutdown);
            out.extend(callers.into_iter().map(|to| Effect::Leave { to }));
        }
    }

    fn request(
        &mut self,
        from: Caller,
        call: Call,
        until: Option<u64>,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
        let result = match call {
            Call::Connect(id) | Call::Join(id) => Ok(Some(Reply::Connected {
                shim_pid: self.shim_pid,
                task_pid: self.tasks.get(&id).map_or(0, |task| task.init.pid()),
            })),
            Call::Shutdown => {
                // The stock shim says yes and stays while it has containers. What is still being
                // made, or cleaned up, decides when it is done: a client that gave up on Create
                // asks once and does not come back.
                if self.tasks.values().any(Task::known) {
                    Ok(Some(Reply::Empty))
                } else {
                    self.shutdown.push(from);
                    Ok(None)
                }
            }
            // The loop's own business.
            Call::Upgrade(_) => Err(Refusal::unknown("not a call of the task API")),
            Call::Create(create) => self.create(from, *create, until, now, out),
            Call::State(key) => self.state(&key).map(Some),
            Call::Wait(key) => self.wait(from, &key),
            Call::Pids(id) => self.pids(from, &id, out),
            Call::Stats(id) => self.stats(from, &id, out),
            Call::Kill { key, signal, all } => self.kill(from, &key, signal, all, until, out),
            Call::Exec { key, stdio, spec } => self.exec(from, key, stdio, spec, out),
            Call::ResizePty { key, width, height } => self.resize(key, width, height, out),
            Call::CloseIo(key) => self.close_io(key, out),
            Call::Start(key) if !key.is_init() => self.start_exec(from, &key, until, out),
            Call::Delete(key) if !key.is_init() => self.delete_exec(from, &key, now, out),
            Call::Start(_)
            | Call::Checkpoint(_)
            | Call::Delete(_)
            | Call::Pause(_)
            | Call::Resume(_)
            | Call::Update { .. } => self.exclusive(Queued { from, call, until }, now, out),
        };
        match result {
            Ok(None) => {}
            Ok(Some(reply)) => out.push(Effect::Reply {
                to: from,
                reply: Ok(reply),
            }),
            Err(refusal) => out.push(Effect::Reply {
                to: from,
                reply: Err(refusal),
            }),
        }
    }

    fn task(&self, id: &str) -> Result<&Task, Refusal> {
        self.tasks
            .get(id)
            .filter(|task| task.known())
            .ok_or_else(no_task)
    }

    fn task_mut(&mut self, id: &str) -> Result<&mut Task, Refusal> {
        self.tasks
            .get_mut(id)
            .filter(|task| task.known())
            .ok_or_else(no_task)
    }

    fn member(&self, key: &Key) -> Result<(&Task, &Member), Refusal> {
        let task = self.task(&key.id)?;
        let member = task
            .member(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        Ok((task, member))
    }

    /// Decides on a child; the caller's deadline becomes the child's.
    fn spawn(
        &mut self,
        key: Key,
        work: Work,
        caller: Option<Caller>,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) -> JobId {
        self.dirty = true;
        self.last_job += 1;
        let job = self.last_job;
        // What nobody waits for with a deadline of his own must not hang for ever either.
        let own = caller.is_none() || matches!(work, Work::Cleanup | Work::Undo);
        let until = until.or_else(|| own.then(|| self.mono_ms.saturating_add(OWN_MS)));
        if let Some(at) = until {
            out.push(Effect::Arm {
                at,
                timer: Timer::Job(job),
            });
        }
        out.push(Effect::Spawn {
            job,
            key: key.clone(),
            work: work.clone(),
        });
        let kept = Job {
            key,
            // Resources may be long and are never looked at again.
            work: match work {
                Work::Update(_) => Work::Update(Vec::new()),
                work => work,
            },
            caller,
            process: None,
            ended: false,
            then: None,
        };
        self.jobs.insert(job, kept);
        job
    }

    fn create(
        &mut self,
        from: Caller,
        create: Create,
        until: Option<u64>,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        if self.tasks.contains_key(&create.id) {
            return Err(Refusal::new(
                code::ALREADY_EXISTS,
                format!("task {} already exists", create.id),
            ));
        }
        let key = Key::init(&create.id);
        let job = self.spawn(key, Work::Create, Some(from), until, out);
        let task = Task {
            bundle: create.bundle,
            phase: Phase::Creating,
            init: Member::new(create.stdio),
            execs: BTreeMap::new(),
            options: create.options,
            rootfs: create.rootfs,
            restore: create.restore,
            cgroup: None,
            memberships: Vec::new(),
            private_pids: false,
            memory_limit: None,
            created_at: now.wall,
            oom: false,
            oom_kills: None,
            busy: Some(Busy::Job(job)),
            queue: Vec::new(),
        };
        self.tasks.insert(create.id, task);
        Ok(None)
    }

    fn state(&self, key: &Key) -> Result<Reply, Refusal> {
        if self.tasks.get(&key.id).is_some_and(|task| !task.known()) {
            // Not NotFound: our own `delete` would take it for nobody's, and clean up beside us.
            return Err(Refusal::new(
                code::FAILED_PRECONDITION,
                format!("task {} is being created", key.id),
            ));
        }
        let (task, member) = self.member(key)?;
        let of_task = task.status(&self.jobs);
        let status = match task.execs.get(&key.exec_id).map(|exec| exec.phase) {
            None => of_task,
            Some(ExecPhase::Stopped | ExecPhase::Failed) => Status::Stopped,
            Some(_) if matches!(of_task, Status::Paused | Status::Pausing) => of_task,
            Some(ExecPhase::Added | ExecPhase::Starting) => Status::Created,
            Some(ExecPhase::Running) => Status::Running,
        };
        Ok(Reply::State(Box::new(State {
            key: key.clone(),
            bundle: task.bundle.clone(),
            pid: member.pid(),
            status: status as i32,
            stdio: member.stdio.clone(),
            exit: member
                .exit
                .as_ref()
                .filter(|_| status == Status::Stopped)
                .map(|exit| (exit.status, exit.at)),
        })))
    }

    fn wait(&mut self, from: Caller, key: &Key) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let told = match task.execs.get(&key.exec_id).map(|exec| exec.phase) {
            None => task.phase == Phase::Stopped,
            Some(ExecPhase::Stopped) => true,
            Some(ExecPhase::Failed) => return Err(never_started(&key.exec_id)),
            Some(ExecPhase::Added | ExecPhase::Starting | ExecPhase::Running) => false,
        };
        let member = task
            .member_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        if told {
            return Ok(Some(Reply::Exited(member.ended())));
        }
        member.waiters.push(from);
        Ok(None)
    }

    fn pids(
        &self,
        from: Caller,
        id: &str,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task(id)?;
        if task.phase == Phase::Stopped || task.restore.is_some() {
            // A shim without pids is a leaked one in the eyes of containerd 1.7 and later, which
            // would delete the task and lose its exit status; one that waits to be restored, too.
            return Ok(Some(Reply::Pids(vec![(task.init.pid(), String::new())])));
        }
        out.push(Effect::Pids {
            to: from,
            id: id.to_owned(),
        });
        Ok(None)
    }

    fn stats(
        &self,
        from: Caller,
        id: &str,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        if self.task(id)?.cgroup.is_none() {
            return Err(Refusal::not_found("cgroup does not exist"));
        }
        out.push(Effect::Stats {
            to: from,
            id: id.to_owned(),
        });
        Ok(None)
    }

    fn kill(
        &mut self,
        from: Caller,
        key: &Key,
        signal: i32,
        all: bool,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task(&key.id)?;
        let process = if key.is_init() {
            let process = task.living().ok_or_else(finished)?;
            // The runtime knows how to reach every process, and a frozen one.
            let pausing = task.status(&self.jobs) == Status::Pausing;
            if all || pausing || task.phase == Phase::Paused {
                let work = Work::Kill { signal, all };
                self.spawn(key.clone(), work, Some(from), until, out);
                return Ok(None);
            }
            process
        } else {
            let exec = task
                .execs
                .get(&key.exec_id)
                .ok_or_else(|| no_exec(&key.exec_id))?;
            if exec.member.exit.is_some() || exec.phase == ExecPhase::Failed {
                return Err(finished());
            }
            exec.member
                .process
                .ok_or_else(|| Refusal::new(code::FAILED_PRECONDITION, "process not created"))?
        };
        out.push(Effect::Signal { process, signal });
        Ok(Some(Reply::Empty))
    }

    fn exec(
        &mut self,
        from: Caller,
        key: Key,
        stdio: StdioWish,
        spec: Vec<u8>,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        if task.execs.contains_key(&key.exec_id) || key.exec_id == key.id {
            return Err(Refusal::new(
                code::ALREADY_EXISTS,
                format!("id {} is in use", key.exec_id),
            ));
        }
        if task.phase == Phase::Paused {
            return Err(Refusal::unknown("cannot exec in a paused state"));
        }
        if task.restore.is_some() {
            return Err(Refusal::unknown("cannot exec in a created state"));
        }
        if task.init.exit.is_some() {
            return Err(Refusal::unknown("cannot exec in a stopped state"));
        }
        let exec = Exec {
            phase: ExecPhase::Added,
            member: Member::new(stdio),
            deleting: None,
            adding: Some(from),
        };
        task.execs.insert(key.exec_id.clone(), exec);
        self.dirty = true;
        out.push(Effect::PrepareExec { key, spec });
        Ok(None)
    }

    fn exec_prepared(&mut self, key: &Key, result: Result<(), String>, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&key.id) else {
            return;
        };
        let Some(to) = task
            .execs
            .get_mut(&key.exec_id)
            .and_then(|exec| exec.adding.take())
        else {
            return;
        };
        self.dirty = true;
        let reply = match result {
            Ok(()) => {
                out.push(Effect::Publish(Notice::ExecAdded(key.clone())));
                Ok(Reply::Empty)
            }
            Err(why) => {
                task.execs.remove(&key.exec_id);
                Err(Refusal::unknown(why))
            }
        };
        out.push(Effect::Reply { to, reply });
    }

    fn start_exec(
        &mut self,
        from: Caller,
        key: &Key,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let gone = task.init.exit.is_some();
        let exec = task
            .execs
            .get_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        match exec.phase {
            ExecPhase::Added if gone => {
                return Err(Refusal::new(
                    code::FAILED_PRECONDITION,
                    format!("container {} init process is not running", key.id),
                ));
            }
            ExecPhase::Added => exec.phase = ExecPhase::Starting,
            ExecPhase::Starting | ExecPhase::Running => {
                return Err(Refusal::unknown("cannot start a running process"));
            }
            ExecPhase::Failed | ExecPhase::Stopped => {
                return Err(Refusal::unknown("cannot start a stopped process"));
            }
        }
        self.spawn(key.clone(), Work::Exec, Some(from), until, out);
        Ok(None)
    }

    fn delete_exec(
        &mut self,
        from: Caller,
        key: &Key,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let exec = task
            .execs
            .get_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        match exec.phase {
            ExecPhase::Starting | ExecPhase::Running => {
                return Err(Refusal::unknown("cannot delete a running process"));
            }
            // A second Delete of the same exec while the first waits.
            _ if exec.deleting.is_some() => return Err(no_exec(&key.exec_id)),
            ExecPhase::Stopped if !exec.member.drained => {
                exec.deleting = Some(from);
                out.push(Effect::Arm {
                    at: now.mono_ms.saturating_add(DRAIN_MS),
                    timer: Timer::Drain(key.clone()),
                });
                return Ok(None);
            }
            ExecPhase::Added | ExecPhase::Failed | ExecPhase::Stopped => {}
        }
        Ok(self.forget_exec(key, out))
    }

    /// Removes an exec; gives the answer to its Delete.
    fn forget_exec(&mut self, key: &Key, out: &mut Vec<Effect>) -> Option<Reply> {
        let task = self.tasks.get_mut(&key.id)?;
        let exec = task.execs.remove(&key.exec_id)?;
        self.dirty = true;
        out.push(Effect::CloseStdio(key.clone()));
        for to in exec.member.waiters.iter().chain(&exec.adding) {
            out.push(Effect::Reply {
                to: *to,
                reply: Err(no_exec(&key.exec_id)),
            });
        }
        let reply = Reply::Deleted(exec.member.ended());
        // A Delete of it that waits for stdio, when its task goes first.
        answer(exec.deleting, Ok(reply.clone()), out);
        Some(reply)
    }

    fn resize(
        &self,
        key: Key,
        width: u16,
        height: u16,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let (_, member) = self.member(&key)?;
        if member.stdio.terminal {
            out.push(Effect::Resize { key, width, height });
        }
        Ok(Some(Reply::Empty))
    }

    fn close_io(&mut self, key: Key, out: &mut Vec<Effect>) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let member = task
            .member_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        if !member.stdin_closed {
            member.stdin_closed = true;
            self.dirty = true;
            out.push(Effect::CloseStdin(key));
        }
        Ok(Some(Reply::Empty))
    }

    /// Requests that need the task for themselves: queued while it is busy.
    fn exclusive(
        &mut self,
        request: Queued,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let id = match &request.call {
            Call::Start(key) | Call::Delete(key) => key.id.clone(),
            Call::Pause(id) | Call::Resume(id) | Call::Update { id, .. } => id.clone(),
            Call::Checkpoint(checkpoint) => checkpoint.id.clone(),
            // Never queued; listed so that a new call has to be thought about.
            Call::State(_)
            | Call::Create(_)
            | Call::Pids(_)
            | Call::Kill { .. }
            | Call::Exec { .. }
            | Call::ResizePty { .. }
            | Call::CloseIo(_)
            | Call::Wait(_)
            | Call::Stats(_)
            | Call::Connect(_)
            | Call::Join(_)
            | Call::Shutdown
            | Call::Upgrade(_) => return Err(Refusal::unknown("not queued")),
        };
        if matches!(request.call, Call::Delete(_)) && self.give_up_create(&id, out) {
            // Answered when nothing of it is left: the client removes the bundle then.
            if let Some(task) = self.tasks.get_mut(&id) {
                task.queue.push(request);
            }
            return Ok(None);
        }
        let task = self.task_mut(&id)?;
        if task.busy.is_some() {
            task.queue.push(request);
            return Ok(None);
        }
        let Queued { from, call, until } = request;
        let phase = task.phase;
        let exited = task.init.exit.is_some();
        let work = match call {
            Call::Start(_) => match phase {
                Phase::Created if !exited => match &task.restore {
                    Some(restore) => Work::Restore(restore.clone()),
                    None => Work::Start,
                },
                Phase::Running => return Err(Refusal::unknown("cannot start a running process")),
                Phase::Paused => return Err(Refusal::unknown("cannot start a paused process")),
                _ => return Err(Refusal::unknown("cannot start a stopped process")),
            },
            Call::Pause(_) => match phase {
                Phase::Running if !exited => Work::Pause,
                Phase::Paused => return Err(Refusal::unknown("cannot pause a paused container")),
                Phase::Created => {
                    return Err(Refusal::unknown("cannot pause task in created state"));
                }
                _ => return Err(Refusal::unknown("cannot pause a stopped container")),
            },
            Call::Resume(_) => match phase {
                Phase::Paused => Work::Resume,
                Phase::Running => return Err(Refusal::unknown("cannot resume a running process")),
                Phase::Created => {
                    return Err(Refusal::unknown("cannot resume task in created state"));
                }
                _ => return Err(Refusal::unknown("cannot resume a stopped container")),
            },
            Call::Checkpoint(checkpoint) => match phase {
                Phase::Running | Phase::Paused if !exited => {
                    // Its caller's deadline is not passed on: a CRIU that is killed at work leaves
                    // processes frozen, or with its own code in them.
                    self.spawn_busy(&id, Work::Checkpoint(checkpoint), from, None, out);
                    return Ok(None);
                }
                Phase::Created => {
                    return Err(Refusal::unknown(
                        "cannot checkpoint a task in created state",
                    ));
                }
                _ => return Err(Refusal::unknown("cannot checkpoint a stopped container")),
            },
            Call::Update { resources, .. } => {
                if exited {
                    return Err(Refusal::unknown("cannot update a stopped container"));
                }
                Work::Update(resources)
            }
            _ => match phase {
                Phase::Stopped if !task.init.drained => {
                    task.busy = Some(Busy::Draining(from, until));
                    self.dirty = true;
                    out.push(Effect::Arm {
                        at: now.mono_ms.saturating_add(DRAIN_MS),
                        timer: Timer::Drain(Key::init(&id)),
                    });
                    return Ok(None);
                }
                Phase::Stopped | Phase::Created => Work::Delete,
                _ => return Err(Refusal::unknown("cannot delete a running process")),
            },
        };
        self.spawn_busy(&id, work, from, until, out);
        Ok(None)
    }

    /// Delete of a task that is being made: its client has given up. True if there is one.
    fn give_up_create(&mut self, id: &str, out: &mut Vec<Effect>) -> bool {
        let Some(task) = self.tasks.get(id).filter(|task| !task.known()) else {
            return false;
        };
        if let Some(Busy::Job(number)) = &task.busy
            && let Some(job) = self.jobs.get_mut(number)
            && job.work == Work::Create
            && !job.ended
        {
            job.ended = true;
            out.push(Effect::EndJob(*number));
        }
        true
    }

    fn spawn_busy(
        &mut self,
        id: &str,
        work: Work,
        from: Caller,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) {
        let job = self.spawn(Key::init(id), work, Some(from), until, out);
        if let Some(task) = self.tasks.get_mut(id) {
            task.busy = Some(Busy::Job(job));
        }
    }

    /// The task is free: those who waited go on, until one makes it busy again.
    fn free(&mut self, id: &str, now: Now, out: &mut Vec<Effect>) {
        if let Some(task) = self.tasks.get_mut(id) {
            task.busy = None;
            let queue = std::mem::take(&mut task.queue);
            for Queued { from, call, until } in queue {
                self.request(from, call, until, now, out);
            }
        }
    }

    fn job_ended(&mut self, number: JobId, outcome: Outcome, now: Now, out: &mut Vec<Effect>) {
        let Some(job) = self.jobs.remove(&number) else {
            return;
        };
        self.dirty = true;
        let result = match outcome {
            Outcome::Done(report) => Ok(report),
            Outcome::Failed(failure) => Err((failure.kind, self.refusal(&job, failure))),
        };
        match &job.work {
            Work::Create => self.created(&job, result, now, out),
            Work::Cleanup => {
                // Half-cleaned is not hidden: the record keeps nothing, the log says it.
                let refusal = job
                    .then
                    .clone()
                    .unwrap_or_else(|| Refusal::unknown("create failed"));
                self.gone(&job.key.id, out);
                answer(job.caller, Err(refusal), out);
            }
            Work::Start => self.init_started(&job, result, now, out),
            Work::Restore(_) => self.restored(&job, result, now, out),
            Work::Undo => self.undone(&job, now, out),
            Work::Checkpoint(checkpoint) => {
                self.checkpointed(&job, &checkpoint.path, result, now, out);
            }
            Work::Exec => self.exec_started(&job, result, now, out),
            Work::Pause => {
                if result.is_ok() {
                    self.turn(&job.key.id, Phase::Paused, Notice::Paused, out);
                }
                answer(job.caller, empty(result), out);
                self.free(&job.key.id, now, out);
                // It may have been killed while it froze.
                self.thaw_if_exited(&job.key.id, out);
            }
            Work::Resume => {
                // Without a caller it was the thaw of a container whose init has exited.
                if job.caller.is_some() {
                    if result.is_ok() {
                        self.turn(&job.key.id, Phase::Running, Notice::Resumed, out);
                    }
                    answer(job.caller, empty(result), out);
                    self.free(&job.key.id, now, out);
                    self.tell_init(&job.key.id, now, out);
                }
            }
            Work::Update(_) => {
                answer(job.caller, empty(result), out);
                self.free(&job.key.id, now, out);
            }
            Work::Kill { .. } => {
                let result = match result {
                    Err((FailureKind::NoProcess | FailureKind::NoContainer, _)) => {
                        Err((FailureKind::NoProcess, finished()))
                    }
                    other => other,
                };
                answer(job.caller, empty(result), out);
            }
            Work::Delete => self.deleted(&job, result, now, out),
        }
    }

    /// What a caller is told about a failed child.
    fn refusal(&self, job: &Job, failure: Failure) -> Refusal {
        let word = job.work.word();
        if job.ended {
            return Refusal::new(
                DEADLINE_EXCEEDED,
                format!("runtime {word} of {} did not end in time", job.key.id),
            );
        }
        match &job.work {
            // The stock shim leaves the text of these as it is.
            Work::Delete
            | Work::Update(_)
            | Work::Kill { .. }
            | Work::Cleanup
            | Work::Undo
            | Work::Checkpoint(_) => Refusal::unknown(failure.text),
            Work::Create
            | Work::Start
            | Work::Restore(_)
            | Work::Exec
            | Work::Pause
            | Work::Resume => {
                Refusal::unknown(format!("OCI runtime {word} failed: {}", failure.text))
            }
        }
    }

    fn created(&mut self, job: &Job, result: JobResult, now: Now, out: &mut Vec<Effect>) {
        let id = &job.key.id;
        let result = result.and_then(|report| match report.process {
            // Its client has given up; what was made nevertheless goes again.
            _ if job.ended => Err((
                FailureKind::Other,
                Refusal::new(code::UNAVAILABLE, format!("create of {id} was given up")),
            )),
            Some(process) => Ok((Some(process), report)),
            None if self.waits_for_restore(id) => Ok((None, report)),
            None => Err((
                FailureKind::Other,
                Refusal::unknown("OCI runtime create failed: it wrote no pid file"),
            )),
        });
        match result {
            Ok((process, report)) => {
                let Some(task) = self.tasks.get_mut(id) else {
                    return;
                };
                task.phase = Phase::Created;
                task.init.process = process;
                let pid = task.init.pid();
                task.cgroup = report.cgroup;
                task.memberships = report.memberships;
                task.private_pids = report.private_pids;
                task.memory_limit = report.memory_limit;
                // A cgroup that was there before may say more; then the watch tells.
                task.oom_kills = Some(0);
                out.push(Effect::WatchOom {
                    id: id.clone(),
                    already: None,
                });
                out.push(Effect::Publish(Notice::Create {
                    id: id.clone(),
                    bundle: task.bundle.clone(),
                    rootfs: task.rootfs.clone(),
                    stdio: task.init.stdio.clone(),
                    checkpoint: task
                        .restore
                        .as_ref()
                        .map_or(String::new(), |r| r.image.clone()),
                    pid,
                }));
                answer(job.caller, Ok(Reply::Pid(pid)), out);
                self.free(id, now, out);
            }
            Err((kind @ (FailureKind::Exists | FailureKind::NotRun), refusal)) => {
                // Cleaning up would end what somebody else has made.
                let refusal = match kind {
                    FailureKind::Exists => Refusal::new(code::ALREADY_EXISTS, refusal.message),
                    _ => refusal,
                };
                out.push(Effect::CloseStdio(job.key.clone()));
                self.gone(id, out);
                answer(job.caller, Err(refusal), out);
            }
            Err((_, refusal)) => {
                out.push(Effect::CloseStdio(job.key.clone()));
                let cleanup = self.spawn(job.key.clone(), Work::Cleanup, job.caller, None, out);
                if let Some(job) = self.jobs.get_mut(&cleanup) {
                    job.then = Some(refusal);
                }
                if let Some(task) = self.tasks.get_mut(id) {
                    task.busy = Some(Busy::Job(cleanup));
                }
            }
        }
    }

    fn init_started(&mut self, job: &Job, result: JobResult, now: Now, out: &mut Vec<Effect>) {
        let id = &job.key.id;
        if result.is_ok() {
            if let Some(task) = self.tasks.get_mut(id) {
                task.phase = Phase::Running;
                let pid = task.init.pid();
                out.push(Effect::Publish(Notice::Start {
                    id: id.clone(),
                    pid,
                }));
                answer(job.caller, Ok(Reply::Pid(pid)), out);
            }
        } else {
            answer(job.caller, empty(result), out);
        }
        self.free(id, now, out);
        self.tell_init(id, now, out);
    }

    fn exec_started(&mut self, job: &Job, result: JobResult, now: Now, out: &mut Vec<Effect>) {
        let key = &job.key;
        let exec_id = &key.exec_id;
        let Some(exec) = self
            .tasks
            .get_mut(&key.id)
            .and_then(|task| task.execs.get_mut(exec_id))
        else {
            // Its task was deleted meanwhile.
            answer(job.caller, Err(no_exec(exec_id)), out);
            return;
        };
        let result = result.and_then(|report| {
            report.process.ok_or((
                FailureKind::Other,
                Refusal::unknown("OCI runtime exec failed: it wrote no pid file"),
            ))
        });
        match result {
            Ok(process) => {
                exec.phase = ExecPhase::Running;
                exec.member.process = Some(process);
                out.push(Effect::Publish(Notice::ExecStarted {
                    key: key.clone(),
                    pid: process.pid,
                }));
                answer(job.caller, Ok(Reply::Pid(process.pid)), out);
            }
            Err((_, refusal)) => {
                exec.phase = ExecPhase::Failed;
                exec.member.drained = true;
                let waiters = std::mem::take(&mut exec.member.waiters);
                out.push(Effect::CloseStdio(key.clone()));
                answer(job.caller, Err(refusal), out);
                for to in waiters {
                    answer(Some(to), Err(never_started(exec_id)), out);
                }
            }
        }
        self.tell_init(&key.id, now, out);
    }

    fn deleted(&mut self, job: &Job, result: JobResult, now: Now, out: &mut Vec<Effect>) {
        let id = &job.key.id;
        // A container that the runtime no longer knows is as good as deleted.
        let refusal = match result {
            Ok(_) | Err((FailureKind::NoContainer, _)) => None,
            Err((_, refusal)) => Some(refusal),
        };
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        match (refusal, job.caller) {
            (Some(refusal), caller) => {
                answer(caller, Err(refusal), out);
                self.free(id, now, out);
            }
            (None, Some(caller)) if task.living().is_some() => {
                task.busy = Some(Busy::LateExit(caller));
                out.push(Effect::Arm {
                    at: now.mono_ms.saturating_add(LATE_EXIT_MS),
                    timer: Timer::LateExit(id.clone()),
                });
            }
            (None, caller) => self.delete_done(id, caller, out),
        }
    }

    fn delete_done(&mut self, id: &str, caller: Option<Caller>, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        if task.phase != Phase::Stopped && task.init.exit.is_some() {
            // It waited for an exec that nobody will hear of any more.
            task.phase = Phase::Stopped;
            tell(&Key::init(id), &mut task.init, out);
        }
        let ended = task.init.ended();
        out.push(Effect::CloseStdio(Key::init(id)));
        out.push(Effect::Publish(Notice::Delete {
            id: id.to_owned(),
            ended,
        }));
        answer(caller, Ok(Reply::Deleted(ended)), out);
        self.gone(id, out);
    }

    /// The task leaves; whoever still waits for something of it is told.
    fn gone(&mut self, id: &str, out: &mut Vec<Effect>) {
        let execs: Vec<String> = self
            .tasks
            .get(id)
            .map(|task| task.execs.keys().cloned().collect())
            .unwrap_or_default();
        for exec_id in execs {
            let key = Key {
                id: id.to_owned(),
                exec_id,
            };
            self.forget_exec(&key, out);
        }
        if let Some(task) = self.tasks.remove(id) {
            self.dirty = true;
            let queued = task.queue.iter().map(|queued| queued.from);
            for to in task.init.waiters.into_iter().chain(queued) {
                answer(Some(to), Err(no_task()), out);
            }
            out.push(Effect::Forget { id: id.to_owned() });
        }
    }

    fn turn(
        &mut self,
        id: &str,
        phase: Phase,
        notice: impl FnOnce(String) -> Notice,
        out: &mut Vec<Effect>,
    ) {
        if let Some(task) = self.tasks.get_mut(id) {
            if task.phase == Phase::Stopped {
                return;
            }
            task.phase = phase;
            out.push(Effect::Publish(notice(id.to_owned())));
        }
    }

    fn exited(&mut self, pid: u32, status: u32, now: Now, out: &mut Vec<Effect>) {
        let is = |member: &Member| {
            member.exit.is_none() && member.process.is_some_and(|process| process.pid == pid)
        };
        let found = self.tasks.iter().find_map(|(id, task)| {
            if is(&task.init) {
                return Some(Key::init(id));
            }
            let exec_id = task.execs.iter().find(|(_, exec)| is(&exec.member))?.0;
            Some(Key {
                id: id.clone(),
                exec_id: exec_id.clone(),
            })
        });
        if let Some(key) = found {
            self.ended(&key, Exit::observed(status, now.wall), now, out);
        }
    }

    /// A process of ours has ended.
    fn ended(&mut self, key: &Key, exit: Exit, now: Now, out: &mut Vec<Effect>) {
        let living = |member: &&Member| member.exit.is_none();
        let member = self.tasks.get(&key.id).and_then(|t| t.member(&key.exec_id));
        if member.filter(living).is_none() {
            return;
        }
        self.dirty = true;
        let Some(task) = self.tasks.get_mut(&key.id) else {
            return;
        };
        if key.is_init() {
            task.init.exit = Some(exit);
            if !task.private_pids {
                // What shares the host's pid namespace outlives its init; it must not.
                let work = Work::Kill {
                    signal: SIGKILL,
                    all: true,
                };
                self.spawn(key.clone(), work, None, None, out);
            }
            self.thaw_if_exited(&key.id, out);
            // They cannot succeed any more, and the exit is told after them.
            let held_by =
                |job: &Job| job.key.id == key.id && matches!(job.work, Work::Start | Work::Exec);
            self.limit_jobs(held_by, now, out);
            self.tell_init(&key.id, now, out);
        } else if let Some(exec) = task.execs.get_mut(&key.exec_id) {
            exec.member.exit = Some(exit);
            exec.phase = ExecPhase::Stopped;
            tell(key, &mut exec.member, out);
            self.tell_init(&key.id, now, out);
        }
    }

    /// A frozen container whose init was killed holds its other processes: thaw it.
    fn thaw_if_exited(&mut self, id: &str, out: &mut Vec<Effect>) {
        let frozen = self
            .tasks
            .get(id)
            .is_some_and(|task| task.phase == Phase::Paused && task.init.exit.is_some());
        if frozen {
            self.spawn(Key::init(id), Work::Resume, None, None, out);
        }
    }

    /// Tells the init's exit, if it has exited and nothing has to be told before.
    fn tell_init(&mut self, id: &str, now: Now, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let starting = match &task.busy {
            Some(Busy::Job(job)) => self
                .jobs
                .get(job)
                .is_some_and(|job| matches!(job.work, Work::Start | Work::Restore(_))),
            Some(Busy::Draining(..) | Busy::LateExit(_)) | None => false,
        };
        let execs_live = task.execs.values().any(|exec| match exec.phase {
            ExecPhase::Starting | ExecPhase::Running => true,
            ExecPhase::Added | ExecPhase::Failed | ExecPhase::Stopped => false,
        });
        let told = task.phase == Phase::Stopped;
        if task.init.exit.is_none() || told || starting || execs_live {
            return;
        }
        task.phase = Phase::Stopped;
        self.dirty = true;
        tell(&Key::init(id), &mut task.init, out);
        match task.busy.clone() {
            Some(Busy::LateExit(caller)) => self.delete_done(id, Some(caller), out),
            Some(Busy::Job(_) | Busy::Draining(..)) => {}
            None => self.free(id, now, out),
        }
    }

    /// A task's cgroup is older than the task: what its counter said at the beginning.
    pub fn oom_kills_began(&mut self, id: &str, kills: u64) {
        if let Some(task) = self.tasks.get_mut(id)
            && task.oom_kills != Some(kills)
        {
            task.oom_kills = Some(kills);
            self.dirty = true;
        }
    }

    fn oom(&mut self, id: String, kills: u64, out: &mut Vec<Effect>) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.oom = true;
            task.oom_kills = Some(kills);
            self.dirty = true;
            out.push(Effect::Publish(Notice::Oom(id)));
        }
    }

    fn drained(&mut self, key: &Key, now: Now, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&key.id) else {
            return;
        };
        if let Some(member) = task.member_mut(&key.exec_id) {
            member.drained = true;
        }
        if key.is_init() {
            if let Some(Busy::Draining(caller, until)) = task.busy.clone() {
                self.spawn_busy(&key.id, Work::Delete, caller, until, out);
            }
        } else {
            let waiting = task
                .execs
                .get_mut(&key.exec_id)
                .and_then(|exec| exec.deleting.take());
            if let Some(caller) = waiting {
                let reply = self.forget_exec(key, out);
                answer(
                    Some(caller),
                    reply.ok_or_else(|| no_exec(&key.exec_id)),
                    out,
                );
            }
        }
        // Draining decides nothing that waits in the queue.
        let _ = now;
    }

    fn disconnected(&mut self, connection: u64, now: Now, out: &mut Vec<Effect>) {
        // Nobody will ever hear of a Create whose caller has gone, and a task that is being made
        // cannot be used by anybody else: a runtime that hangs must not keep its id for ever.
        let forsaken = |job: &Job| {
            job.work == Work::Create && job.caller.is_some_and(|c| c.connection == connection)
        };
        self.limit_jobs(forsaken, now, out);
        let keep = |caller: &Caller| caller.connection != connection;
        for task in self.tasks.values_mut() {
            task.init.waiters.retain(keep);
            for exec in task.execs.values_mut() {
                exec.member.waiters.retain(keep);
            }
        }
    }

    /// Gives jobs that may have been promised any time a deadline from now.
    fn limit_jobs(&self, which: impl Fn(&Job) -> bool, now: Now, out: &mut Vec<Effect>) {
        for (number, _) in self.jobs.iter().filter(|(_, job)| which(job)) {
            out.push(Effect::Arm {
                at: now.mono_ms.saturating_add(OWN_MS),
                timer: Timer::Job(*number),
            });
        }
    }

    fn timer(&mut self, timer: Timer, now: Now, out: &mut Vec<Effect>) {
        match timer {
            Timer::Job(number) => {
                if let Some(job) = self.jobs.get_mut(&number)
                    && !job.ended
                {
                    job.ended = true;
                    out.push(Effect::EndJob(number));
                }
            }
            Timer::Drain(key) => {
                let waits = self.tasks.get(&key.id).is_some_and(|task| {
                    if key.is_init() {
                        matches!(task.busy, Some(Busy::Draining(..)))
                    } else {
                        let exec = task.execs.get(&key.exec_id);
                        exec.is_some_and(|exec| exec.deleting.is_some())
                    }
                });
                if waits {
                    self.drained(&key, now, out);
                }
            }
            Timer::LateExit(id) => {
                let Some(task) = self.tasks.get_mut(&id) else {
                    return;
                };
                let Some(Busy::LateExit(caller)) = task.busy else {
                    return;
                };
                task.init.exit.get_or_insert_with(|| {
                    let why = "the runtime has killed it, and its end was never seen";
                    Exit::unknown(why.to_owned(), now.wall)
                });
                self.delete_done(&id, Some(caller), out);
            }
        }
    }
}

type JobResult = Result<Report, (FailureKind, Refusal)>;

/// `google.rpc.Code`; the shim's own answers use it only here.
const DEADLINE_EXCEEDED: i32 = 4;
const SIGKILL: i32 = 9;
/// What containerd says of a task whose exit nobody saw.
const STAND_IN: u32 = 137;

fn never_started(exec_id: &str) -> Refusal {
    Refusal::new(
        code::FAILED_PRECONDITION,
        format!("exec {exec_id} did not start"),
    )
}

fn empty(result: JobResult) -> Result<Reply, Refusal> {
    match result {
        Ok(_) => Ok(Reply::Empty),
        Err((_, refusal)) => Err(refusal),
    }
}

fn answer(to: Option<Caller>, reply: Result<Reply, Refusal>, out: &mut Vec<Effect>) {
    if let Some(to) = to {
        out.push(Effect::Reply { to, reply });
    }
}

/// Tells an exit: event first, then those who wait.
fn tell(key: &Key, member: &mut Member, out: &mut Vec<Effect>) {
    let ended = member.ended();
    out.push(Effect::FinishStdio(key.clone()));
    out.push(Effect::Publish(Notice::Exit {
        key: key.clone(),
        ended,
    }));
    for to in std::mem::take(&mut member.waiters) {
        answer(Some(to), Ok(Reply::Exited(ended)), out);
    }
}

#[cfg(test)]
mod tests;
