//! The record of this shim: from the loop's state to the file, before anybody is told.

use std::{io, path::Path};

use recoverd_common::{
    record::{self, Record, store::Store, version},
    timestamp::Timestamp,
};

use crate::{
    connections::Caller,
    service::Key,
    state::LoopState,
    stdio::Stdio,
    tasks::{Exec, ExecPhase, Job, Member, Phase, Process, Task},
};

/// What does not change while the shim lives.
#[derive(Debug)]
pub struct Fixed {
    /// Of this boot.
    pub boot_id: String,
    /// The shim.
    pub shim: record::Shim,
    /// What a successor restores.
    pub context: record::Context,
}

/// Room that the tasks and execs there are may still need, bytes.
fn owed(state: &LoopState) -> usize {
    GROWTH.saturating_mul(state.tasks.living())
}

/// Writes the record.
#[derive(Debug)]
pub struct Journal {
    fixed: Fixed,
    store: Store,
    /// Bytes of the last record, without the room behind it.
    length: usize,
}

/// Later changes of one task or exec (pid, cgroups, exit, oom, a runtime command and its caller)
/// add at most this much, bytes.
const GROWTH: usize = 4096;

impl Journal {
    /// For the record at `path`.
    pub fn new(path: &Path, fixed: Fixed) -> Self {
        Self {
            fixed,
            store: Store::new(path),
            length: 0,
        }
    }

    /// Makes room for a request of `bytes` that adds a task or an exec, for all that will happen
    /// to it, and for what the others are still owed: its paths come twice as long when every
    /// byte has to be escaped, and once more in what the shim derives from them.
    pub fn reserve(&mut self, bytes: usize, state: &LoopState) -> io::Result<()> {
        self.store
            .reserve(self.length + bytes.saturating_mul(3) + GROWTH + owed(state))
    }

    /// Keeps the room that a predecessor has reserved: the disk may be full by now.
    pub fn take_over(&mut self) {
        let length = self.store.length();
        // What is not there cannot be kept, and is asked for by the next request.
        let _ = self.store.reserve(length);
    }

    /// Writes what `state` says.
    pub fn write(&mut self, state: &LoopState, stdio: &Stdio) -> io::Result<()> {
        let bytes = version::encode(&self.record(state, stdio));
        let length = bytes.len();
        self.store.write_bytes(bytes, length + owed(state))?;
        self.length = length;
        Ok(())
    }

    /// Removes it.
    pub fn remove(&self) -> io::Result<()> {
        self.store.remove()
    }

    /// What the record says of one task.
    pub fn task(&self, id: &str, state: &LoopState, stdio: &Stdio) -> Option<record::Task> {
        let task = state.tasks.get(id)?;
        let deleting = task.is_deleting(state.tasks.jobs());
        let namespace = &self.fixed.shim.namespace;
        Some(task_of(id, task, namespace, deleting, stdio))
    }

    fn record(&self, state: &LoopState, stdio: &Stdio) -> Record {
        let jobs = state.tasks.jobs();
        let tasks = state
            .tasks
            .iter()
            .map(|(id, task)| {
                let deleting = task.is_deleting(jobs);
                task_of(id, task, &self.fixed.shim.namespace, deleting, stdio)
            })
            .collect();
        let of_jobs = jobs.values().filter_map(unanswered);
        let adding = state.tasks.iter().flat_map(|(id, task)| {
            let execs = task.adding();
            execs.map(|(exec_id, from)| adding(id, exec_id, from))
        });
        Record {
            written_at: Timestamp::now(),
            boot_id: self.fixed.boot_id.clone(),
            shim: self.fixed.shim.clone(),
            tasks,
            context: self.fixed.context.clone(),
            running: jobs.values().map(running).collect(),
            // Which descriptors there are follows from the tasks; their numbers are of use to a
            // handoff only, which carries them itself.
            descriptors: Vec::new(),
            unanswered: of_jobs.chain(adding).collect(),
            // The outputs of what has been deleted are ended once that is on record.
            strays: stdio
                .holders_but(|key| state.tasks.is_member(key))
                .map(process)
                .collect(),
        }
    }
}

fn process(process: Process) -> record::Process {
    record::Process {
        pid: process.pid,
        start_time: process.start_time,
    }
}

fn running(job: &Job) -> record::Running {
    record::Running {
        op: job.work.word().to_owned(),
        id: job.key.id.clone(),
        exec_id: job.key.exec_id.clone(),
        process: job.process.map(process),
    }
}

fn unanswered(job: &Job) -> Option<record::Unanswered> {
    let caller = job.caller?;
    Some(record::Unanswered {
        connection: caller.connection,
        stream: caller.stream,
        method: job.work.word().to_owned(),
        id: job.key.id.clone(),
        exec_id: job.key.exec_id.clone(),
    })
}

fn adding(id: &str, exec_id: &str, from: Caller) -> record::Unanswered {
    record::Unanswered {
        connection: from.connection,
        stream: from.stream,
        method: "add".to_owned(),
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    }
}

fn task_of(id: &str, task: &Task, namespace: &str, deleting: bool, stdio: &Stdio) -> record::Task {
    let key = Key::init(id);
    record::Task {
        id: id.to_owned(),
        bundle: task.bundle.clone(),
        phase: match task.phase {
            _ if deleting => record::Phase::Deleting,
            Phase::Creating => record::Phase::Creating,
            // The exit is known even when it is not yet told.
            _ if task.init.exit.is_some() => record::Phase::Stopped,
            Phase::Created => record::Phase::Created,
            Phase::Running => record::Phase::Running,
            Phase::Paused => record::Phase::Paused,
            Phase::Stopped => record::Phase::Stopped,
        },
        init: task.init.process.map(process),
        runtime: record::Runtime {
            binary: task.options.binary().to_owned(),
            root: task.options.root(namespace).to_string_lossy().into_owned(),
            systemd_cgroup: task.options.systemd_cgroup,
        },
        rootfs: task
            .rootfs
            .iter()
            .map(|mount| record::Mount {
                kind: mount.kind.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            })
            .collect(),
        cgroup: task.memberships.clone(),
        stdio: stdio_of(&key, &task.init, stdio),
        terminal: task.init.stdio.terminal,
        created_at: task.created_at,
        exit: exit(&task.init, task.oom),
        oom: task.oom,
        oom_kills: task.oom_kills,
        restore: task.restore.as_ref().map(|from| record::Restore {
            image: from.image.clone(),
            parent: from.parent.clone(),
        }),
        execs: task
            .execs
            .iter()
            .map(|(exec_id, exec)| exec_of(id, exec_id, exec, stdio))
            .collect(),
    }
}

fn exec_of(id: &str, exec_id: &str, exec: &Exec, stdio: &Stdio) -> record::Exec {
    let key = Key {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    };
    record::Exec {
        id: exec_id.to_owned(),
        phase: match exec.phase {
            ExecPhase::Added => record::Phase::Created,
            ExecPhase::Starting => record::Phase::Creating,
            ExecPhase::Running => record::Phase::Running,
            ExecPhase::Failed | ExecPhase::Stopped => record::Phase::Stopped,
        },
        process: exec.member.process.map(process),
        stdio: stdio_of(&key, &exec.member, stdio),
        terminal: exec.member.stdio.terminal,
        exit: exit(&exec.member, false),
    }
}

fn exit(member: &Member, oom: bool) -> Option<record::Exit> {
    let exit = member.exit.as_ref()?;
    Some(match &exit.unknown {
        None => record::Exit::Observed {
            status: exit.status,
            at: exit.at,
            oom,
        },
        Some(why) => record::Exit::Unknown { why: why.clone() },
    })
}

fn stdio_of(key: &Key, member: &Member, stdio: &Stdio) -> record::Stdio {
    record::Stdio {
        stdin: member.stdio.stdin.clone(),
        stdout: member.stdio.stdout.clone(),
        stderr: member.stdio.stderr.clone(),
        stdin_closed: member.stdin_closed,
        logger: stdio.logger(key).map(|logger| record::Logger {
            process: record::Process {
                pid: u32::try_from(logger.pid.as_raw()).unwrap_or(0),
                start_time: logger.start_time,
            },
            argv: logger.argv.clone(),
        }),
        carried: stdio.carried(key),
        holders: stdio.holders(key).into_iter().map(process).collect(),
    }
}
