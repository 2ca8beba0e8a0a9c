//! What is to be done, and what is told. Pure.

use serde::{Deserialize, Serialize};

use super::{JobId, Process, Timer};
use crate::{
    checkpoint::{Checkpoint, Restore},
    connections::Caller,
    service::{Ended, Key, Mount, Refusal, Reply, StdioWish},
};

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
