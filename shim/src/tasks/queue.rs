//! Requests that need their task for themselves, and what they wait for. Pure.

use recoverd_common::ttrpc::code;

use super::{Busy, DRAIN_MS, Effect, Now, Phase, Queued, Tasks, Timer, Work, answer};
use crate::{
    connections::Caller,
    service::{Call, Create, Key, Refusal, Reply},
};

impl Tasks {
    /// Requests that need the task for themselves: queued while it is busy.
    pub(super) fn exclusive(
        &mut self,
        request: Queued,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let id = match &request.call {
            Call::Start(key) | Call::Delete(key) => key.id.clone(),
            Call::Pause(id) | Call::Resume(id) | Call::Update { id, .. } => id.clone(),
            Call::Checkpoint(checkpoint) => checkpoint.id.clone(),
            // Never queued; listed so that a new call has to be thought about.
            Call::State(_)
            | Call::Create(_)
            | Call::Pids(_)
            | Call::Kill { .. }
            | Call::Exec { .. }
            | Call::ResizePty { .. }
            | Call::CloseIo(_)
            | Call::Wait(_)
            | Call::Stats(_)
            | Call::Connect(_)
            | Call::Join(_)
            | Call::Shutdown
            | Call::Upgrade(_) => return Err(Refusal::unknown("not queued")),
        };
        if matches!(request.call, Call::Delete(_)) && self.give_up_create(&id, out) {
            for given_up in self.take_creates(&id) {
                let refusal = format!("create of {id} was given up");
                let refusal = Refusal::new(code::UNAVAILABLE, refusal);
                answer(Some(given_up.from), Err(refusal), out);
            }
            // Answered when nothing of it is left: the client removes the bundle then.
            if let Some(task) = self.tasks.get_mut(&id) {
                task.queue.push(request);
            }
            return Ok(None);
        }
        let task = self.task_mut(&id)?;
        if task.busy.is_some() {
            task.queue.push(request);
            return Ok(None);
        }
        let Queued { from, call, until } = request;
        let phase = task.phase;
        let exited = task.init.exit.is_some();
        let work = match call {
            Call::Start(_) => match phase {
                Phase::Created if !exited => match &task.restore {
                    Some(restore) => Work::Restore(restore.clone()),
                    None => Work::Start,
                },
                Phase::Running => return Err(Refusal::unknown("cannot start a running process")),
                Phase::Paused => return Err(Refusal::unknown("cannot start a paused process")),
                _ => return Err(Refusal::unknown("cannot start a stopped process")),
            },
            Call::Pause(_) => match phase {
                Phase::Running if !exited => Work::Pause,
                Phase::Paused => return Err(Refusal::unknown("cannot pause a paused container")),
                Phase::Created => {
                    return Err(Refusal::unknown("cannot pause task in created state"));
                }
                _ => return Err(Refusal::unknown("cannot pause a stopped container")),
            },
            Call::Resume(_) => match phase {
                Phase::Paused => Work::Resume,
                Phase::Running => return Err(Refusal::unknown("cannot resume a running process")),
                Phase::Created => {
                    return Err(Refusal::unknown("cannot resume task in created state"));
                }
                _ => return Err(Refusal::unknown("cannot resume a stopped container")),
            },
            Call::Checkpoint(checkpoint) => match phase {
                Phase::Running | Phase::Paused if !exited => {
                    // Its caller's deadline is not passed on: a CRIU that is killed at work leaves
                    // processes frozen, or with its own code in them.
                    self.spawn_busy(&id, Work::Checkpoint(checkpoint), from, None, out);
                    return Ok(None);
                }
                Phase::Created => {
                    return Err(Refusal::unknown(
                        "cannot checkpoint a task in created state",
                    ));
                }
                _ => return Err(Refusal::unknown("cannot checkpoint a stopped container")),
            },
            Call::Update { resources, .. } => {
                if exited {
                    return Err(Refusal::unknown("cannot update a stopped container"));
                }
                Work::Update(resources)
            }
            _ => match phase {
                Phase::Stopped if !task.init.drained => {
                    task.busy = Some(Busy::Draining(from, until));
                    self.dirty = true;
                    out.push(Effect::Arm {
                        at: now.mono_ms.saturating_add(DRAIN_MS),
                        timer: Timer::Drain(Key::init(&id)),
                    });
                    return Ok(None);
                }
                Phase::Stopped | Phase::Created => Work::Delete,
                _ => return Err(Refusal::unknown("cannot delete a running process")),
            },
        };
        self.spawn_busy(&id, work, from, until, out);
        Ok(None)
    }

    /// What a Create has left whose caller has gone is being cleaned up: a predecessor's, or one of a
    /// containerd that has died.
    pub(super) fn is_being_cleaned(&self, id: &str) -> bool {
        let busy = self.tasks.get(id).and_then(|task| task.busy.as_ref());
        matches!(busy, Some(Busy::Job(number)) if self
            .jobs
            .get(number)
            .is_some_and(|job| job.work == Work::Cleanup && job.caller.is_none()))
    }

    /// A client that has a bundle for this id knows nothing of what is being cleaned up: it was never
    /// told of it, and its own task is to be made when that is gone.
    pub(super) fn await_cleanup(&mut self, from: Caller, create: Create, until: Option<u64>) {
        if let Some(task) = self.tasks.get_mut(&create.id) {
            let call = Call::Create(Box::new(create));
            task.queue.push(Queued { from, call, until });
            self.dirty = true;
        }
    }

    /// Creates that waited for the end of a cleanup.
    pub(super) fn take_creates(&mut self, id: &str) -> Vec<Queued> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Vec::new();
        };
        let queue = std::mem::take(&mut task.queue);
        let (creates, others) = queue
            .into_iter()
            .partition(|queued| matches!(queued.call, Call::Create(_)));
        task.queue = others;
        creates
    }

    /// Delete of a task that is being made: its client has given up. True if there is one.
    fn give_up_create(&mut self, id: &str, out: &mut Vec<Effect>) -> bool {
        let Some(task) = self.tasks.get(id).filter(|task| !task.known()) else {
            return false;
        };
        if let Some(Busy::Job(number)) = &task.busy
            && let Some(job) = self.jobs.get_mut(number)
            && job.work == Work::Create
            && !job.ended
        {
            job.ended = true;
            out.push(Effect::EndJob(*number));
        }
        true
    }

    pub(super) fn spawn_busy(
        &mut self,
        id: &str,
        work: Work,
        from: Caller,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) {
        let job = self.spawn(Key::init(id), work, Some(from), until, out);
        if let Some(task) = self.tasks.get_mut(id) {
            task.busy = Some(Busy::Job(job));
        }
    }

    /// The task is free: those who waited go on, until one makes it busy again.
    pub(super) fn free(&mut self, id: &str, now: Now, out: &mut Vec<Effect>) {
        if let Some(task) = self.tasks.get_mut(id) {
            task.busy = None;
            let queue = std::mem::take(&mut task.queue);
            for Queued { from, call, until } in queue {
                self.request(from, call, until, now, out);
            }
        }
    }
}
