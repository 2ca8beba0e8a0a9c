//! Tasks that are written to files, and tasks that begin as such. Pure.
//!
//! ```text
//! Creating ──▶ Created, without an init ──Start──▶ Running, as if never ended
//!                      ▲        └──(runtime fails)──▶ undone ──┐
//!                      └───────────────────────────────────────┘
//! ```

use super::{
    Busy, Effect, FailureKind, Job, JobResult, Notice, Now, Phase, Refusal, Reply, Tasks, Work,
    answer, empty,
};

impl Tasks {
    /// Created, and without an init until Start.
    pub(super) fn waits_for_restore(&self, id: &str) -> bool {
        let task = self.tasks.get(id);
        task.is_some_and(|task| task.restore.is_some())
    }

    /// `runc restore` has ended.
    pub(super) fn restored(
        &mut self,
        job: &Job,
        result: JobResult,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
        let id = &job.key.id;
        let result = result.and_then(|report| match report.process {
            Some(process) => Ok((process, report)),
            None => Err((
                FailureKind::Other,
                Refusal::unknown("OCI runtime restore failed: it wrote no pid file"),
            )),
        });
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        match result {
            Ok((process, report)) => {
                task.phase = Phase::Running;
                task.restore = None;
                task.init.process = Some(process);
                task.cgroup = report.cgroup;
                task.memberships = report.memberships;
                task.oom_kills = Some(0);
                out.push(Effect::WatchOom {
                    id: id.clone(),
                    already: None,
                });
                out.push(Effect::Publish(Notice::Start {
                    id: id.clone(),
                    pid: process.pid,
                }));
                answer(job.caller, Ok(Reply::Pid(process.pid)), out);
                self.free(id, now, out);
                self.tell_init(id, now, out);
            }
            Err((FailureKind::Exists | FailureKind::NotRun, refusal)) => {
                // Undoing would end what somebody else has made.
                out.push(Effect::CloseStdio(job.key.clone()));
                answer(job.caller, Err(refusal), out);
                self.free(id, now, out);
            }
            Err((_, refusal)) => {
                out.push(Effect::CloseStdio(job.key.clone()));
                let undo = self.spawn(job.key.clone(), Work::Undo, job.caller, None, out);
                if let Some(job) = self.jobs.get_mut(&undo) {
                    job.then = Some(refusal);
                }
                if let Some(task) = self.tasks.get_mut(id) {
                    task.busy = Some(Busy::Job(undo));
                }
            }
        }
    }

    /// Nothing is left of a restore that failed; it may be asked for again.
    pub(super) fn undone(&mut self, job: &Job, now: Now, out: &mut Vec<Effect>) {
        let refusal = job
            .then
            .clone()
            .unwrap_or_else(|| Refusal::unknown("restore failed"));
        answer(job.caller, Err(refusal), out);
        self.free(&job.key.id, now, out);
    }

    /// `runc checkpoint` has ended. With `exit` the init's end is seen before or after, as it
    /// comes.
    pub(super) fn checkpointed(
        &mut self,
        job: &Job,
        path: &str,
        result: JobResult,
        now: Now,
        out: &mut Vec<Effect>,
    ) {
        let id = &job.key.id;
        if result.is_ok() {
            out.push(Effect::Publish(Notice::Checkpointed {
                id: id.clone(),
                path: path.to_owned(),
            }));
        }
        answer(job.caller, empty(result), out);
        self.free(id, now, out);
    }
}
