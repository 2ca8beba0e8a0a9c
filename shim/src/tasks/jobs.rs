//! What the end of a short-lived child means. Pure.

use recoverd_common::ttrpc::code;

use super::{
    Busy, Effect, Failure, FailureKind, Job, JobId, JobResult, Notice, Now, OWN_MS, Outcome, Phase,
    Queued, Tasks, Timer, Work, answer, empty, finished, no_task, tell,
};
use crate::{
    connections::Caller,
    service::{Key, Refusal, Reply},
};

/// `google.rpc.Code`; the shim's own answers use it only here.
const DEADLINE_EXCEEDED: i32 = 4;
/// The runtime has deleted a container that had not exited; its exit is due at any moment.
const LATE_EXIT_MS: u64 = 5_000;

impl Tasks {
    pub(super) fn job_ended(
        &mut self,
        number: JobId,
        outcome: Outcome,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
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
                let next = self.take_creates(&job.key.id);
                self.gone(&job.key.id, out);
                answer(job.caller, Err(refusal), out);
                for Queued { from, call, until } in next {
                    self.request(from, call, until, now, out);
                }
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

    pub(super) fn turn(
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

    pub(super) fn delete_done(&mut self, id: &str, caller: Option<Caller>, out: &mut Vec<Effect>) {
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

    /// Gives jobs that may have been promised any time a deadline from now.
    pub(super) fn limit_jobs(&self, which: impl Fn(&Job) -> bool, now: Now, out: &mut Vec<Effect>) {
        for (number, _) in self.jobs.iter().filter(|(_, job)| which(job)) {
            out.push(Effect::Arm {
                at: now.mono_ms.saturating_add(OWN_MS),
                timer: Timer::Job(*number),
            });
        }
    }
}
