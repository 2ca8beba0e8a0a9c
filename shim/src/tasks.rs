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
mod calls;
mod checkpoint;
mod effect;
mod event;
mod execs;
mod exits;
mod jobs;
mod queue;
mod settle;
mod task;

use std::collections::BTreeMap;

pub use adoptee::{AdoptedExec, AdoptedMember, Adoptee, News};
pub use effect::{Effect, Notice, Work};
pub use event::{Event, Failure, FailureKind, Outcome, Report, Timer};
use task::{Busy, Queued};
pub use task::{Exec, ExecPhase, Exit, Job, Member, Phase, Task};

use recoverd_common::{timestamp::Timestamp, ttrpc::code};
use serde::{Deserialize, Serialize};

use crate::{
    connections::Caller,
    service::{Call, Key, Refusal, Reply},
};

/// Delete waits this long for output that a surviving descendant may still write, as the stock
/// shim does.
const DRAIN_MS: u64 = 10_000;
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

    /// True if there is this task, or exec of a task.
    pub fn is_member(&self, key: &Key) -> bool {
        self.get(&key.id)
            .is_some_and(|task| key.is_init() || task.execs.contains_key(&key.exec_id))
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
}

type JobResult = Result<Report, (FailureKind, Refusal)>;

const SIGKILL: i32 = 9;

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
