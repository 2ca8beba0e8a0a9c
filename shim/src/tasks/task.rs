//! One task, its execs, and the short-lived children that work for it. Pure.

use std::collections::BTreeMap;

use recoverd_common::{cgroup::Cgroup, pb::task::Status, timestamp::Timestamp};
use serde::{Deserialize, Serialize};

use super::{JobId, Process, Work};
use crate::{
    checkpoint::Restore,
    connections::Caller,
    options::Options,
    service::{Call, Ended, Key, Mount, Refusal, StdioWish},
};

/// What containerd says of a task whose exit nobody saw.
const STAND_IN: u32 = 137;

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
    pub(super) fn new(stdio: StdioWish) -> Self {
        Self {
            process: None,
            stdio,
            stdin_closed: false,
            exit: None,
            drained: false,
            waiters: Vec::new(),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.map_or(0, |p| p.pid)
    }

    pub(super) fn ended(&self) -> Ended {
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
    pub(super) deleting: Option<Caller>,
    /// The Exec request, until its files are written.
    pub(super) adding: Option<Caller>,
}

/// What a task is busy with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Busy {
    /// A runtime command.
    Job(JobId),
    /// Delete waits for stdio to drain.
    Draining(Caller, Option<u64>),
    /// Delete waits for the exit of what the runtime has killed.
    LateExit(Caller),
}

/// A request that waits until its task is free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Queued {
    pub(super) from: Caller,
    pub(super) call: Call,
    pub(super) until: Option<u64>,
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
    pub(super) busy: Option<Busy>,
    pub(super) queue: Vec<Queued>,
}

impl Task {
    /// The process of an init that has not exited.
    pub(super) fn living(&self) -> Option<Process> {
        self.init.process.filter(|_| self.init.exit.is_none())
    }

    /// True once the runtime may hold something of it.
    pub(super) fn known(&self) -> bool {
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

    pub(super) fn member_mut(&mut self, exec_id: &str) -> Option<&mut Member> {
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

    pub(super) fn status(&self, jobs: &BTreeMap<JobId, Job>) -> Status {
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
    pub(super) ended: bool,
    /// Of Cleanup: what the caller is told when it is done.
    pub(super) then: Option<Refusal>,
}
