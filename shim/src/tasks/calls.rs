//! Requests that wait for nothing: answered, or begun, as they come. Pure.

use std::collections::BTreeMap;

use recoverd_common::{pb::task::Status, ttrpc::code};

use super::{
    Busy, Effect, ExecPhase, Member, Now, Phase, Task, Tasks, Work, finished, never_started,
    no_exec,
};
use crate::{
    connections::Caller,
    service::{Create, Key, Refusal, Reply, State},
};

impl Tasks {
    pub(super) fn create(
        &mut self,
        from: Caller,
        create: Create,
        until: Option<u64>,
        now: Now,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        if self.is_being_cleaned(&create.id) {
            self.await_cleanup(from, create, until);
            return Ok(None);
        }
        if self.tasks.contains_key(&create.id) {
            return Err(Refusal::new(
                code::ALREADY_EXISTS,
                format!("task {} already exists", create.id),
            ));
        }
        let key = Key::init(&create.id);
        let job = self.spawn(key, Work::Create, Some(from), until, out);
        let task = Task {
            bundle: create.bundle,
            phase: Phase::Creating,
            init: Member::new(create.stdio),
            execs: BTreeMap::new(),
            options: create.options,
            rootfs: create.rootfs,
            restore: create.restore,
            cgroup: None,
            memberships: Vec::new(),
            private_pids: false,
            memory_limit: None,
            created_at: now.wall,
            oom: false,
            oom_kills: None,
            busy: Some(Busy::Job(job)),
            queue: Vec::new(),
        };
        self.tasks.insert(create.id, task);
        Ok(None)
    }

    pub(super) fn state(&self, key: &Key) -> Result<Reply, Refusal> {
        if self.tasks.get(&key.id).is_some_and(|task| !task.known()) {
            // Not NotFound: our own `delete` would take it for nobody's, and clean up beside us.
            return Err(Refusal::new(
                code::FAILED_PRECONDITION,
                format!("task {} is being created", key.id),
            ));
        }
        let (task, member) = self.member(key)?;
        let of_task = task.status(&self.jobs);
        let status = match task.execs.get(&key.exec_id).map(|exec| exec.phase) {
            None => of_task,
            Some(ExecPhase::Stopped) => Status::Stopped,
            Some(_) if matches!(of_task, Status::Paused | Status::Pausing) => of_task,
            // What failed to start has not run: *stopped* would promise an exit status. It is
            // deleted like any other that was never started.
            Some(ExecPhase::Added | ExecPhase::Starting | ExecPhase::Failed) => Status::Created,
            Some(ExecPhase::Running) => Status::Running,
        };
        Ok(Reply::State(Box::new(State {
            key: key.clone(),
            bundle: task.bundle.clone(),
            pid: member.pid(),
            status: status as i32,
            stdio: member.stdio.clone(),
            exit: member
                .exit
                .as_ref()
                .filter(|_| status == Status::Stopped)
                .map(|exit| (exit.status, exit.at)),
        })))
    }

    pub(super) fn wait(&mut self, from: Caller, key: &Key) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let told = match task.execs.get(&key.exec_id).map(|exec| exec.phase) {
            None => task.phase == Phase::Stopped,
            Some(ExecPhase::Stopped) => true,
            Some(ExecPhase::Failed) => return Err(never_started(&key.exec_id)),
            Some(ExecPhase::Added | ExecPhase::Starting | ExecPhase::Running) => false,
        };
        let member = task
            .member_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        if told {
            return Ok(Some(Reply::Exited(member.ended())));
        }
        member.waiters.push(from);
        Ok(None)
    }

    pub(super) fn pids(
        &self,
        from: Caller,
        id: &str,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task(id)?;
        if task.phase == Phase::Stopped || task.restore.is_some() {
            // A shim without pids is a leaked one in the eyes of containerd 1.7 and later, which
            // would delete the task and lose its exit status; one that waits to be restored, too.
            return Ok(Some(Reply::Pids(vec![(task.init.pid(), String::new())])));
        }
        out.push(Effect::Pids {
            to: from,
            id: id.to_owned(),
        });
        Ok(None)
    }

    pub(super) fn stats(
        &self,
        from: Caller,
        id: &str,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        if self.task(id)?.cgroup.is_none() {
            return Err(Refusal::not_found("cgroup does not exist"));
        }
        out.push(Effect::Stats {
            to: from,
            id: id.to_owned(),
        });
        Ok(None)
    }

    pub(super) fn kill(
        &mut self,
        from: Caller,
        key: &Key,
        signal: i32,
        all: bool,
        until: Option<u64>,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task(&key.id)?;
        let process = if key.is_init() {
            let process = task.living().ok_or_else(finished)?;
            // The runtime knows how to reach every process, and a frozen one.
            let pausing = task.status(&self.jobs) == Status::Pausing;
            if all || pausing || task.phase == Phase::Paused {
                let work = Work::Kill { signal, all };
                self.spawn(key.clone(), work, Some(from), until, out);
                return Ok(None);
            }
            process
        } else {
            let exec = task
                .execs
                .get(&key.exec_id)
                .ok_or_else(|| no_exec(&key.exec_id))?;
            if exec.member.exit.is_some() {
                return Err(finished());
            }
            exec.member
                .process
                .ok_or_else(|| Refusal::new(code::FAILED_PRECONDITION, "process not created"))?
        };
        out.push(Effect::Signal { process, signal });
        Ok(Some(Reply::Empty))
    }

    pub(super) fn resize(
        &self,
        key: Key,
        width: u16,
        height: u16,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let (_, member) = self.member(&key)?;
        if member.stdio.terminal {
            out.push(Effect::Resize { key, width, height });
        }
        Ok(Some(Reply::Empty))
    }

    pub(super) fn close_io(
        &mut self,
        key: Key,
        out: &mut Vec<Effect>,
    ) -> Result<Option<Reply>, Refusal> {
        let task = self.task_mut(&key.id)?;
        let member = task
            .member_mut(&key.exec_id)
            .ok_or_else(|| no_exec(&key.exec_id))?;
        if !member.stdin_closed {
            member.stdin_closed = true;
            self.dirty = true;
            out.push(Effect::CloseStdin(key));
        }
        Ok(Some(Reply::Empty))
    }
}
