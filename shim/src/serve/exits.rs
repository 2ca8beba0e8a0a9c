//! Signals to the shim, and children that have exited: each is looked at, recorded, collected, and
//! only then told.

use nix::{
    sys::{signal::Signal, signalfd::SignalFd},
    unistd::Pid,
};

use recoverd_common::failpoint;

use super::{Shim, now};
use crate::{
    log::Level,
    reaper,
    state::Input,
    tasks::{Event, JobId},
};

impl Shim {
    pub(super) fn signalled(&mut self, signals: &SignalFd) {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if number == Signal::SIGTERM as i32 || number == Signal::SIGINT as i32 {
                self.log.say(Level::Info, "shim leaves on a signal");
                let now = now();
                for output in self.state.leave_now() {
                    self.perform(output, now);
                }
                return;
            }
            if number == Signal::SIGUSR1 as i32 {
                // The stock shim writes its stacks then; operators send it to every shim.
                let state = &self.state;
                let text = format!(
                    "{} tasks, {} children at work, {} connections, events waiting: {}",
                    state.tasks.iter().count(),
                    state.tasks.jobs().len(),
                    state.connections.numbers().len(),
                    !state.outbox.is_empty(),
                );
                self.log.say(Level::Info, &text);
            }
        }
        self.reap();
    }

    pub(super) fn reap(&mut self) {
        while let Some(exited) = reaper::peek(None) {
            if self.trial_ended() {
                continue;
            }
            // What a runtime command started comes to us when the command has ended: that end
            // comes first, it says whose the process is.
            let ended: Vec<(JobId, Pid, u32)> = self
                .children
                .iter()
                .filter_map(|(job, child)| {
                    let seen = reaper::peek(Some(child.pid))?;
                    Some((*job, child.pid, seen.status))
                })
                .collect();
            if !ended.is_empty() {
                for (job, pid, status) in ended {
                    failpoint!("serve.ended.before");
                    self.child_ended(job, status);
                    failpoint!("serve.ended.after");
                    reaper::collect(pid);
                }
                continue;
            }
            if self.is_known(exited.pid) || !self.starts_processes() {
                self.exited(exited);
                continue;
            }
            // A runtime has many threads, which end one by one: what it started can become ours,
            // and exit, before the runtime itself can be seen to have ended. Then nobody knows
            // yet whose this is; the kernel keeps it until the runtime's end comes.
            let others: Vec<reaper::Exited> = self
                .known()
                .filter_map(|pid| reaper::peek(Some(pid)))
                .collect();
            if others.is_empty() {
                return;
            }
            for other in others {
                self.exited(other);
            }
        }
    }

    /// True while a runtime command is at work that may leave us a process.
    fn starts_processes(&self) -> bool {
        self.children
            .values()
            .any(|child| child.work.starts_process())
    }

    fn is_known(&self, pid: Pid) -> bool {
        self.known().any(|known| known == pid)
    }

    /// Every process whose exit we wait for, but for the short-lived children.
    fn known(&self) -> impl Iterator<Item = Pid> {
        let members = self.state.tasks.iter().flat_map(|(_, task)| {
            let execs = task.execs.values().map(|exec| &exec.member);
            std::iter::once(&task.init).chain(execs)
        });
        members
            .filter(|member| member.exit.is_none())
            .filter_map(|member| member.process)
            .filter_map(|process| i32::try_from(process.pid).ok().map(Pid::from_raw))
            .chain(self.stdio.loggers())
    }

    /// An exit that is no short-lived child's; the kernel still knows it.
    fn exited(&mut self, exited: reaper::Exited) {
        let mut heard = Vec::new();
        let (status, at) = (Some(exited.status), now().mono_ms);
        if self
            .stdio
            .logger_exited(exited.pid, status, at, &self.epoll, &mut heard)
        {
            reaper::collect(exited.pid);
            self.hear(heard);
            self.work_off();
            return;
        }
        let pid = u32::try_from(exited.pid.as_raw()).unwrap_or(0);
        // The exit may be seen before what caused it.
        let id = self
            .state
            .tasks
            .iter()
            .find(|(_, task)| task.init.process.is_some_and(|p| p.pid == pid))
            .map(|(id, _)| id.clone());
        if let Some(id) = id {
            self.look_for_oom(&id);
        }
        failpoint!("serve.exit.before");
        self.uncollected = Some(exited.pid);
        self.handle(Input::Event(Event::Exited {
            pid,
            status: exited.status,
        }));
        // Never seen twice, whatever became of it.
        if let Some(pid) = self.uncollected.take() {
            reaper::collect(pid);
        }
        failpoint!("serve.exit.after");
    }
}
