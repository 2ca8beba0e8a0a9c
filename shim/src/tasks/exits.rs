//! How processes end, when that is told, and what ends with them. Pure.

use super::{
    Busy, Effect, ExecPhase, Exit, Job, Member, Notice, Now, Phase, Queued, SIGKILL, Tasks, Timer,
    Work, answer, no_exec, tell,
};
use crate::{
    connections::Caller,
    service::{Call, Key},
};

impl Tasks {
    pub(super) fn exited(&mut self, pid: u32, status: u32, now: Now, out: &mut Vec<Effect>) {
        let is = |member: &Member| {
            member.exit.is_none() && member.process.is_some_and(|process| process.pid == pid)
        };
        let found = self.tasks.iter().find_map(|(id, task)| {
            if is(&task.init) {
                return Some(Key::init(id));
            }
            let exec_id = task.execs.iter().find(|(_, exec)| is(&exec.member))?.0;
            Some(Key {
                id: id.clone(),
                exec_id: exec_id.clone(),
            })
        });
        if let Some(key) = found {
            self.ended(&key, Exit::observed(status, now.wall), now, out);
        }
    }

    /// A process of ours has ended.
    pub(super) fn ended(&mut self, key: &Key, exit: Exit, now: Now, out: &mut Vec<Effect>) {
        let living = |member: &&Member| member.exit.is_none();
        let member = self.tasks.get(&key.id).and_then(|t| t.member(&key.exec_id));
        if member.filter(living).is_none() {
            return;
        }
        self.dirty = true;
        let Some(task) = self.tasks.get_mut(&key.id) else {
            return;
        };
        if key.is_init() {
            task.init.exit = Some(exit);
            if !task.private_pids {
                // What shares the host's pid namespace outlives its init; it must not.
                let work = Work::Kill {
                    signal: SIGKILL,
                    all: true,
                };
                self.spawn(key.clone(), work, None, None, out);
            }
            self.thaw_if_exited(&key.id, out);
            // They cannot succeed any more, and the exit is told after them.
            let held_by =
                |job: &Job| job.key.id == key.id && matches!(job.work, Work::Start | Work::Exec);
            self.limit_jobs(held_by, now, out);
            self.tell_init(&key.id, now, out);
        } else if let Some(exec) = task.execs.get_mut(&key.exec_id) {
            exec.member.exit = Some(exit);
            exec.phase = ExecPhase::Stopped;
            tell(key, &mut exec.member, out);
            self.tell_init(&key.id, now, out);
        }
    }

    /// A frozen container whose init was killed holds its other processes: thaw it.
    pub(super) fn thaw_if_exited(&mut self, id: &str, out: &mut Vec<Effect>) {
        let frozen = self
            .tasks
            .get(id)
            .is_some_and(|task| task.phase == Phase::Paused && task.init.exit.is_some());
        if frozen {
            self.spawn(Key::init(id), Work::Resume, None, None, out);
        }
    }

    /// Tells the init's exit, if it has exited and nothing has to be told before.
    pub(super) fn tell_init(&mut self, id: &str, now: Now, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        let starting = match &task.busy {
            Some(Busy::Job(job)) => self
                .jobs
                .get(job)
                .is_some_and(|job| matches!(job.work, Work::Start | Work::Restore(_))),
            Some(Busy::Draining(..) | Busy::LateExit(_)) | None => false,
        };
        let execs_live = task.execs.values().any(|exec| match exec.phase {
            ExecPhase::Starting | ExecPhase::Running => true,
            ExecPhase::Added | ExecPhase::Failed | ExecPhase::Stopped => false,
        });
        let told = task.phase == Phase::Stopped;
        if task.init.exit.is_none() || told || starting || execs_live {
            return;
        }
        task.phase = Phase::Stopped;
        self.dirty = true;
        tell(&Key::init(id), &mut task.init, out);
        match task.busy.clone() {
            Some(Busy::LateExit(caller)) => self.delete_done(id, Some(caller), out),
            Some(Busy::Job(_) | Busy::Draining(..)) => {}
            None => self.free(id, now, out),
        }
    }

    pub(super) fn drained(&mut self, key: &Key, now: Now, out: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get_mut(&key.id) else {
            return;
        };
        if let Some(member) = task.member_mut(&key.exec_id) {
            member.drained = true;
        }
        if key.is_init() {
            if let Some(Busy::Draining(caller, until)) = task.busy.clone() {
                self.spawn_busy(&key.id, Work::Delete, caller, until, out);
            }
        } else {
            let waiting = task
                .execs
                .get_mut(&key.exec_id)
                .and_then(|exec| exec.deleting.take());
            if let Some(caller) = waiting {
                let reply = self.forget_exec(key, out);
                answer(
                    Some(caller),
                    reply.ok_or_else(|| no_exec(&key.exec_id)),
                    out,
                );
            }
        }
        // Draining decides nothing that waits in the queue.
        let _ = now;
    }

    /// A task's cgroup is older than the task: what its counter said at the beginning.
    pub fn oom_kills_began(&mut self, id: &str, kills: u64) {
        if let Some(task) = self.tasks.get_mut(id)
            && task.oom_kills != Some(kills)
        {
            task.oom_kills = Some(kills);
            self.dirty = true;
        }
    }

    pub(super) fn oom(&mut self, id: String, kills: u64, out: &mut Vec<Effect>) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.oom = true;
            task.oom_kills = Some(kills);
            self.dirty = true;
            out.push(Effect::Publish(Notice::Oom(id)));
        }
    }

    pub(super) fn disconnected(&mut self, connection: u64, now: Now, out: &mut Vec<Effect>) {
        // Nobody will ever hear of a Create whose caller has gone, and a task that is being made
        // cannot be used by anybody else: a runtime that hangs must not keep its id for ever.
        let forsaken = |job: &Job| {
            job.work == Work::Create && job.caller.is_some_and(|c| c.connection == connection)
        };
        self.limit_jobs(forsaken, now, out);
        let keep = |caller: &Caller| caller.connection != connection;
        for job in self.jobs.values_mut() {
            if job.work == Work::Cleanup {
                job.caller = job.caller.filter(keep);
            }
        }
        let waits = |queued: &Queued| !matches!(queued.call, Call::Create(_)) || keep(&queued.from);
        for task in self.tasks.values_mut() {
            task.queue.retain(waits);
            task.init.waiters.retain(keep);
            for exec in task.execs.values_mut() {
                exec.member.waiters.retain(keep);
            }
        }
    }

    pub(super) fn timer(&mut self, timer: Timer, now: Now, out: &mut Vec<Effect>) {
        match timer {
            Timer::Job(number) => {
                if let Some(job) = self.jobs.get_mut(&number)
                    && !job.ended
                {
                    job.ended = true;
                    out.push(Effect::EndJob(number));
                }
            }
            Timer::Drain(key) => {
                let waits = self.tasks.get(&key.id).is_some_and(|task| {
                    if key.is_init() {
                        matches!(task.busy, Some(Busy::Draining(..)))
                    } else {
                        let exec = task.execs.get(&key.exec_id);
                        exec.is_some_and(|exec| exec.deleting.is_some())
                    }
                });
                if waits {
                    self.drained(&key, now, out);
                }
            }
            Timer::LateExit(id) => {
                let Some(task) = self.tasks.get_mut(&id) else {
                    return;
                };
                let Some(Busy::LateExit(caller)) = task.busy else {
                    return;
                };
                task.init.exit.get_or_insert_with(|| {
                    let why = "the runtime has killed it, and its end was never seen";
                    Exit::unknown(why.to_owned(), now.wall)
                });
                self.delete_done(&id, Some(caller), out);
            }
        }
    }
}
