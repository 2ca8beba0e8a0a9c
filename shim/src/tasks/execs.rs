//! An exec from its registration to its removal. Pure.

use recoverd_common::ttrpc::code;

use super::{
    DRAIN_MS, Effect, Exec, ExecPhase, FailureKind, Job, JobResult, Member, Notice, Now, Phase,
    Tasks, Timer, Work, answer, never_started, no_exec,
};
use crate::{
    connections::Caller,
    service::{Key, Refusal, Reply, StdioWish},
};

impl Tasks {
    pub(super) fn exec(
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
        // An exit that waits for an exec's is not told yet: what is added now will not start.
        if task.phase == Phase::Stopped {
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

    pub(super) fn exec_prepared(
        &mut self,
        key: &Key,
        result: Result<(), String>,
        out: &mut Vec<Effect>,
    ) {
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

    pub(super) fn start_exec(
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
            ExecPhase::Failed => return Err(never_started(&key.exec_id)),
            ExecPhase::Stopped => {
                return Err(Refusal::unknown("cannot start a stopped process"));
            }
        }
        self.spawn(key.clone(), Work::Exec, Some(from), until, out);
        Ok(None)
    }

    pub(super) fn exec_started(
        &mut self,
        job: &Job,
        result: JobResult,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
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

    pub(super) fn delete_exec(
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
    pub(super) fn forget_exec(&mut self, key: &Key, out: &mut Vec<Effect>) -> Option<Reply> {
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
}
