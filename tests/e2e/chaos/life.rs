//! What clients do: start, exec, signal, delete; under a fault or not.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::process::Output;
use std::sync::Arc;
use std::thread;

use recoverd_common::pb::task::Status;
use recoverd_tests::{Running, wait_for};

use crate::World;
use crate::work::{Run, Work, line};

impl World<'_> {
    /// A new task, one in three in the pod of another. `fault`: its shim dies meanwhile.
    pub fn start(&mut self, fault: bool) {
        let id = self.name("t");
        let code = self.code();
        let mut container = self.installed.container(&id).shares(&self.node);
        container = container.command(["sh", "-c", &line(&id, code)]);
        // The fault needs a shim that is there before.
        let join = (fault || self.dice.chance(3))
            .then(|| self.pick(|run| run.init.ended.is_none()))
            .flatten();
        let group = join.and_then(|other| Some(self.tasks.get(&other)?.group.clone()));
        if let Some(group) = &group {
            container = container.group(group);
        }
        let target = group.clone().filter(|_| fault);
        self.note(format!(
            "start {id} (exits {code}) in {group:?}, shim dies: {target:?}"
        ));
        let args = self.containerd.run_words(&container);
        let output = self.ctr_under_fault(&args, target);
        if !output.status.success() {
            assert!(fault, "start {id}: {output:?}");
            self.note(format!("start {id} was refused: {}", text(&output)));
            self.assert_nothing_left(&id);
            return;
        }
        let task = self.containerd.running(&container);
        let init = Work::new(&self.node, &id, task.init.clone(), code);
        let run = Run {
            task,
            group: group.unwrap_or_else(|| id.clone()),
            init,
            execs: BTreeMap::new(),
        };
        self.tasks.insert(id.clone(), run);
        for topic in ["/tasks/create", "/tasks/start"] {
            self.told.expect(&id, topic, "", None);
        }
    }

    /// After a refusal: what `ctr` leaves of a container can be removed, and nothing else is there.
    fn assert_nothing_left(&mut self, id: &str) {
        let node = Arc::clone(&self.node);
        for words in [
            ["tasks", "delete", "--force", id].as_slice(),
            &["containers", "delete", id],
        ] {
            let _gone_already = self.containerd.ctr("e2e", words).output();
        }
        wait_for(&format!("nothing to be left of {id}"), || {
            let state = node.path(format!("/run/containerd/runc/e2e/{id}"));
            let bundle = node.path(format!(
                "/run/containerd/io.containerd.runtime.v2.task/e2e/{id}"
            ));
            (!state.exists() && !bundle.exists()).then_some(())
        });
        assert!(self.containerd.task("e2e", id).is_none());
    }

    pub fn exec(&mut self, fault: bool) {
        let Some(id) = self.pick(|run| run.init.ended.is_none() && run.execs.len() < 3) else {
            return;
        };
        let exec_id = self.name("e");
        let code = self.code();
        let word = format!("word-{exec_id}");
        let target = self
            .tasks
            .get(&id)
            .map(|run| run.group.clone())
            .filter(|_| fault);
        self.note(format!(
            "exec {exec_id} in {id} (exits {code}), shim dies: {target:?}"
        ));
        let line = line(&exec_id, code);
        let args = ["tasks", "exec", "--detach", "--exec-id", &exec_id, &id];
        let args = args.into_iter().chain(["sh", "-c", &line, &word]);
        let args: Vec<String> = args.map(str::to_owned).collect();
        let output = self.ctr_under_fault(&args, target);
        let Some(run) = self.tasks.get_mut(&id) else {
            return;
        };
        let state = run.task.exec_state(&exec_id);
        let lives = state
            .as_ref()
            .is_some_and(|s| s.status() == Status::Running);
        if output.status.success() {
            assert!(lives, "{exec_id}: {state:?}");
        } else {
            assert!(fault, "exec {exec_id}: {output:?}");
            // It lives, or there is none, or one that was never started.
            self.log.push(format!(
                "exec {exec_id} was refused, lives: {lives}: {}",
                text(&output)
            ));
            if !lives {
                let shell = self.node.processes();
                let shell = shell.iter().find(|p| p.argv.contains(&word));
                assert!(shell.is_none(), "{exec_id} was refused and runs: {shell:?}");
                return;
            }
        }
        let process = self.node.shell_with(&word);
        let exec = Work::new(&self.node, &exec_id, process, code);
        run.execs.insert(exec_id.clone(), exec);
        for topic in ["/tasks/exec-added", "/tasks/exec-started"] {
            self.told.expect(&id, topic, &exec_id, None);
        }
    }

    /// Ends an init or an exec, by its own hand or by SIGKILL.
    pub fn signal(&mut self) {
        let Some(id) = self.pick(|run| run.init.ended.is_none()) else {
            return;
        };
        let kill = self.dice.chance(3);
        let of_exec = self.dice.chance(2);
        let node = Arc::clone(&self.node);
        let Some(run) = self.tasks.get_mut(&id) else {
            return;
        };
        let living = run.execs.iter().find(|(_, exec)| exec.ended.is_none());
        let exec_id = living
            .map(|(exec_id, _)| exec_id.clone())
            .filter(|_| of_exec);
        self.log
            .push(format!("signal {id} {exec_id:?}, kill: {kill}"));
        let lived: Vec<String> = run.living_execs();
        run.end(&node, exec_id.as_deref(), kill);
        run.assert_told(exec_id.as_deref());
        let ended = match exec_id {
            Some(exec_id) => vec![exec_id],
            None => lived.into_iter().chain([String::new()]).collect(),
        };
        for exec_id in ended {
            let status = run.ended(&exec_id);
            self.told.expect(&id, "/tasks/exit", &exec_id, status);
        }
    }

    pub fn delete(&mut self, fault: bool) {
        let Some(id) = self.pick(|run| run.init.ended.is_some()) else {
            return;
        };
        let Some(mut run) = self.tasks.remove(&id) else {
            return;
        };
        // Of a task that is deleted nothing is told any more.
        self.told.assert_late();
        // Nobody reads it to its end after that.
        run.assert_output(&self.node);
        // A shim whose last task this is may end by itself.
        let group = run.group.clone();
        let target = Some(group).filter(|group| fault && self.members(group) > 0);
        self.note(format!("delete {id}, shim dies: {target:?}"));
        let under_fault = target.is_some();
        let args = ["tasks", "delete", &id].map(str::to_owned);
        let output = self.ctr_under_fault(&args, target);
        if output.status.success() {
            self.told.expect(&id, "/tasks/delete", "", run.init.ended);
        } else {
            assert!(under_fault, "delete {id}: {output:?}");
            self.note(format!("delete {id} was refused: {}", text(&output)));
        }
        self.assert_nothing_left(&id);
        let init = &run.init.process;
        assert!(!self.node.alive(init));
    }

    fn members(&self, group: &str) -> usize {
        self.tasks.values().filter(|run| run.group == group).count()
    }

    /// A client that execs in some task and shows what comes of it; see [`Echo::assert_said`].
    pub fn echo(&mut self) -> Option<Echo> {
        let id = self.pick(|run| run.init.ended.is_none())?;
        let word = self.name("echo");
        let task = &self.tasks.get(&id)?.task;
        let running = self.containerd.exec_attached(task, &word, &["echo", &word]);
        Some(Echo { word, running })
    }

    /// Runs `ctr`; meanwhile the shim of `group` is killed.
    fn ctr_under_fault(&mut self, args: &[String], group: Option<String>) -> Output {
        let mut command = self.containerd.ctr("e2e", args);
        let group = group.filter(|group| self.may_die(group));
        let shim = group.as_ref().and_then(|group| {
            let run = self.tasks.values().find(|run| run.group == *group)?;
            Some(run.task.shim_now())
        });
        let moment = self.dice.moment(90);
        let node = Arc::clone(&self.node);
        let output = thread::scope(|scope| {
            let client = scope.spawn(move || command.output());
            if let Some(shim) = &shim {
                thread::sleep(moment);
                if node.alive(shim) {
                    node.kill(shim);
                }
            }
            client.join()
        });
        if let (Some(group), Some(_)) = (group, shim) {
            self.killed(vec![group]);
        }
        match output {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => panic!("start ctr {args:?}: {error}"),
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// An attached client.
pub struct Echo {
    word: String,
    running: Running,
}

impl Echo {
    /// It has ended well, with all that was said, or, where that `may_fail`, with an error.
    #[track_caller]
    pub fn assert_said(mut self, may_fail: bool) {
        let status = self.running.wait();
        let text = self.running.text();
        if status.success() {
            assert_eq!(text, format!("{}\n", self.word));
        } else {
            assert!(
                may_fail && !text.is_empty(),
                "{} {status}: {text}",
                self.word
            );
        }
    }
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
