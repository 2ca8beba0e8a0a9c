//! What happens to the tasks. Pure.

use recoverd_common::cgroup::Cgroup;
use serde::{Deserialize, Serialize};

use super::{Adoptee, JobId, Process};
use crate::{
    connections::Caller,
    resume::Settle,
    service::{Call, Key},
};

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
