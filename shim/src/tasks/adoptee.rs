//! Taking over a predecessor's tasks: what `adopt` has decided, as the state machine takes it.
//! Pure.

use std::collections::BTreeMap;

use recoverd_common::{cgroup::Cgroup, timestamp::Timestamp};
use serde::{Deserialize, Serialize};

use super::{
    Busy, Effect, Exec, ExecPhase, Exit, Member, Notice, Now, Phase, Process, SIGKILL, Task, Tasks,
    Work, tell,
};
use crate::{
    checkpoint::Restore,
    options::Options,
    service::{Key, Mount, StdioWish},
};

/// A predecessor's task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adoptee {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// As the world was last told.
    pub phase: Phase,
    /// Its init.
    pub init: AdoptedMember,
    /// Its execs.
    pub execs: BTreeMap<String, AdoptedExec>,
    /// The runtime's options.
    pub options: Options,
    /// Mounted on `rootfs`.
    pub rootfs: Vec<Mount>,
    /// Where its init is restored from, until it is.
    #[serde(default)]
    pub restore: Option<Restore>,
    /// Where it runs.
    pub cgroup: Option<Cgroup>,
    /// The same in the kernel's words.
    pub memberships: Vec<String>,
    /// Its pid namespace ends with its init.
    pub private_pids: bool,
    /// Its memory limit, bytes.
    pub memory_limit: Option<u64>,
    /// When Create was accepted.
    pub created_at: Timestamp,
    /// An OOM kill was told.
    pub oom: bool,
    /// Its cgroup's counter of them.
    #[serde(default)]
    pub oom_kills: Option<u64>,
    /// What has happened since, in this order.
    pub news: Vec<News>,
}

/// Init or exec of a predecessor's task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdoptedMember {
    /// None before there was one.
    pub process: Option<Process>,
    /// As requested.
    pub stdio: StdioWish,
    /// CloseIO was called.
    pub stdin_closed: bool,
    /// As the predecessor has recorded it.
    pub exit: Option<Exit>,
    /// Of what it wrote before that, something is still on its way to its client.
    #[serde(default)]
    pub draining: bool,
}

/// An exec of a predecessor's task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdoptedExec {
    /// How far it is.
    pub phase: ExecPhase,
    /// Its process and stdio.
    pub member: AdoptedMember,
}

/// What a predecessor has not told any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum News {
    /// The task was started.
    Started,
    /// It was frozen.
    Paused,
    /// It was thawed.
    Resumed,
    /// An exec was started.
    ExecStarted(String),
    /// The kernel killed for want of memory, this often by now.
    Oom(u64),
    /// An exec, or the init (empty), has ended.
    Ended {
        /// Which.
        exec_id: String,
        /// Exit code or 128 + signal; or why it is not to be had.
        status: Result<u32, String>,
    },
    /// Its Create was never answered: what there is of it has to go.
    Undo,
    /// The init has ended; what shares its pid namespace may have not.
    EndRest,
}

impl Adoptee {
    /// Nobody was ever told of it, and nobody will be.
    pub fn is_undone(&self) -> bool {
        self.news.contains(&News::Undo)
    }
}

impl AdoptedMember {
    fn into_member(self, told: bool) -> Member {
        Member {
            process: self.process,
            stdio: self.stdio,
            stdin_closed: self.stdin_closed,
            drained: told && !self.draining,
            exit: self.exit,
            waiters: Vec::new(),
        }
    }
}

impl Tasks {
    /// Takes over `adoptees`; for a successor that has no tasks yet.
    pub(super) fn adopt(&mut self, adoptees: Vec<Adoptee>, now: Now, out: &mut Vec<Effect>) {
        self.dirty = true;
        let mut news = Vec::new();
        for adoptee in adoptees {
            let id = adoptee.id.clone();
            news.push((id.clone(), adoptee.news.clone()));
            let task = task(adoptee);
            if task.init.exit.is_none() && task.cgroup.is_some() && task.phase != Phase::Creating {
                out.push(Effect::WatchOom {
                    id: id.clone(),
                    already: task.oom_kills,
                });
            }
            self.tasks.insert(id, task);
        }
        for (id, news) in news {
            for piece in news {
                self.catch_up(&id, piece, now, out);
            }
            self.tell_execs(&id, out);
            // An exit that waited for an exec which has ended by now, or was perhaps never told.
            self.tell_init(&id, now, out);
        }
    }

    /// Tells the exits of execs that a predecessor has seen, and perhaps never told.
    fn tell_execs(&mut self, id: &str, out: &mut Vec<Effect>) {
        let execs = self.tasks.get_mut(id).map(|task| &mut task.execs);
        for (exec_id, exec) in execs.into_iter().flatten() {
            if exec.phase == ExecPhase::Running && exec.member.exit.is_some() {
                exec.phase = ExecPhase::Stopped;
                tell(&key(id, exec_id.clone()), &mut exec.member, out);
            }
        }
    }

    fn catch_up(&mut self, id: &str, news: News, now: Now, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        match news {
            News::Started => {
                task.phase = Phase::Running;
                out.push(Effect::Publish(Notice::Start {
                    id: id.to_owned(),
                    pid: task.init.pid(),
                }));
            }
            News::Paused => self.turn(id, Phase::Paused, Notice::Paused, out),
            News::Resumed => self.turn(id, Phase::Running, Notice::Resumed, out),
            News::ExecStarted(exec_id) => {
                if let Some(exec) = task.execs.get_mut(&exec_id) {
                    exec.phase = ExecPhase::Running;
                    let pid = exec.member.pid();
                    let key = key(id, exec_id);
                    out.push(Effect::Publish(Notice::ExecStarted { key, pid }));
                }
            }
            News::Oom(kills) => self.oom(id.to_owned(), kills, out),
            News::Ended { exec_id, status } => {
                let exit = match status {
                    Ok(status) => Exit::observed(status, now.wall),
                    Err(why) => Exit::unknown(why, now.wall),
                };
                self.ended(&key(id, exec_id), exit, now, out);
            }
            News::Undo => {
                task.phase = Phase::Creating;
                let job = self.spawn(Key::init(id), Work::Cleanup, None, None, out);
                if let Some(task) = self.tasks.get_mut(id) {
                    task.busy = Some(Busy::Job(job));
                }
            }
            News::EndRest => {
                let work = Work::Kill {
                    signal: SIGKILL,
                    all: true,
                };
                self.spawn(Key::init(id), work, None, None, out);
            }
        }
    }
}

fn key(id: &str, exec_id: String) -> Key {
    Key {
        id: id.to_owned(),
        exec_id,
    }
}

fn task(adoptee: Adoptee) -> Task {
    let execs = adoptee.execs.into_iter().map(|(id, exec)| {
        let told = matches!(exec.phase, ExecPhase::Failed | ExecPhase::Stopped);
        let exec = Exec {
            phase: exec.phase,
            member: exec.member.into_member(told),
            deleting: None,
            adding: None,
        };
        (id, exec)
    });
    Task {
        bundle: adoptee.bundle,
        phase: adoptee.phase,
        init: adoptee.init.into_member(adoptee.phase == Phase::Stopped),
        execs: execs.collect(),
        options: adoptee.options,
        rootfs: adoptee.rootfs,
        restore: adoptee.restore,
        cgroup: adoptee.cgroup,
        memberships: adoptee.memberships,
        private_pids: adoptee.private_pids,
        memory_limit: adoptee.memory_limit,
        created_at: adoptee.created_at,
        oom: adoptee.oom,
        oom_kills: adoptee.oom_kills,
        busy: None,
        queue: Vec::new(),
    }
}
