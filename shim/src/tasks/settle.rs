//! Answers to requests that a predecessor was at when it died: by what has become of its tasks,
//! which are adopted by now. Pure.

use recoverd_common::ttrpc::code;

use super::{Busy, Effect, ExecPhase, Phase, Queued, Tasks, answer, no_exec, no_task};
use crate::{
    connections::Caller,
    resume::Settle,
    service::{Call, Key, Refusal, Reply},
    tasks::Now,
};

fn died(what: &str) -> Refusal {
    Refusal::new(code::UNAVAILABLE, format!("shim died while {what}"))
}

impl Tasks {
    /// Answers one of them.
    pub(super) fn settle(&mut self, from: Caller, what: Settle, now: Now, out: &mut Vec<Effect>) {
        let reply = match what {
            Settle::Create(id) => match self.undoing(&id, from) {
                // Answered when nothing is left: the client removes the bundle then.
                true => return,
                false => Err(died("creating the task")),
            },
            Settle::Start(key) => self.started_by_predecessor(&key),
            Settle::Add(key) => {
                self.forget_exec(&key, out);
                Err(died("adding the exec"))
            }
            Settle::Pause(id) => match self.tasks.get(&id).map(|task| task.phase) {
                Some(Phase::Paused) => Ok(Reply::Empty),
                Some(_) => return self.once_more(from, Call::Pause(id), now, out),
                None => Err(no_task()),
            },
            Settle::Resume(id) => match self.tasks.get(&id).map(|task| task.phase) {
                Some(Phase::Running) => Ok(Reply::Empty),
                Some(_) => return self.once_more(from, Call::Resume(id), now, out),
                None => Err(no_task()),
            },
        };
        answer(Some(from), reply, out);
    }

    fn once_more(&mut self, from: Caller, call: Call, now: Now, out: &mut Vec<Effect>) {
        let request = Queued {
            from,
            call,
            until: None,
        };
        match self.exclusive(request, now, out) {
            Ok(None) => {}
            other => answer(
                Some(from),
                other.map(|reply| reply.unwrap_or(Reply::Empty)),
                out,
            ),
        }
    }

    /// True if a half-made task is being undone; `from` hears of its end.
    fn undoing(&mut self, id: &str, from: Caller) -> bool {
        let Some(task) = self.tasks.get(id).filter(|task| !task.known()) else {
            return false;
        };
        let Some(Busy::Job(number)) = &task.busy else {
            return false;
        };
        let Some(job) = self.jobs.get_mut(number) else {
            return false;
        };
        job.caller = Some(from);
        job.then = Some(died("creating the task"));
        true
    }

    fn started_by_predecessor(&self, key: &Key) -> Result<Reply, Refusal> {
        let task = self.tasks.get(&key.id).ok_or_else(no_task)?;
        let (started, member) = if key.is_init() {
            (
                matches!(task.phase, Phase::Running | Phase::Paused | Phase::Stopped),
                &task.init,
            )
        } else {
            let exec = task.execs.get(&key.exec_id);
            let exec = exec.ok_or_else(|| no_exec(&key.exec_id))?;
            (
                matches!(exec.phase, ExecPhase::Running | ExecPhase::Stopped),
                &exec.member,
            )
        };
        match started {
            true => Ok(Reply::Pid(member.pid())),
            false => Err(died("starting the process")),
        }
    }
}
