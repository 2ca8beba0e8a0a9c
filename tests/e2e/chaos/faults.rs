//! What goes wrong: who is killed, and which executables shims are told to become.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use recoverd_tests::{OTHER, Process, VERSION, record_at, wait_for};

use crate::World;

/// A shim may be killed this often in a minute: the supervisor gives up at five.
const KILLS: usize = 3;

/// What happens while shims are upgraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    ShimDies,
    SupervisorDies,
    ContainerdDies,
    AskerDies,
}

/// What is no shim that could go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Refuses,
    Garbage,
    /// It reads the message, and dies when it is its turn.
    Dies,
}

impl World<'_> {
    /// False: it has died too often lately.
    pub fn may_die(&mut self, group: &str) -> bool {
        let kills = self.kills.entry(group.to_owned()).or_default();
        kills.retain(|at| at.elapsed() < Duration::from_secs(65));
        kills.len() < KILLS
    }

    pub fn killed(&mut self, groups: Vec<String>) {
        self.faults += u64::try_from(groups.len()).unwrap_or(0);
        for group in groups {
            self.kills.entry(group).or_default().push(Instant::now());
        }
    }

    /// Those of all tasks that may die.
    fn groups(&mut self) -> Vec<String> {
        let mut groups: Vec<String> = self.tasks.values().map(|run| run.group.clone()).collect();
        groups.sort();
        groups.dedup();
        groups.retain(|group| self.may_die(group));
        groups
    }

    fn shims_of(&self, groups: &[String]) -> Vec<Process> {
        let of = |group: &String| {
            let run = self.tasks.values().find(|run| run.group == *group)?;
            Some(run.task.shim_now())
        };
        groups.iter().filter_map(of).collect()
    }

    fn a_group(&mut self) -> Option<String> {
        let one = self.pick(|_| true)?;
        let group = self.tasks.get(&one)?.group.clone();
        self.may_die(&group).then_some(group)
    }

    /// One or all of them, while a client is at work.
    pub fn kill_shims(&mut self) {
        let all = self.dice.chance(4);
        let groups = match all {
            true => self.groups(),
            false => self.a_group().into_iter().collect(),
        };
        self.note(format!("kill shims of {groups:?}"));
        let shims = self.shims_of(&groups);
        let echo = self.echo();
        thread::sleep(self.dice.moment(200));
        for shim in &shims {
            self.node.signal(shim, "KILL");
        }
        for shim in &shims {
            self.node.wait_gone(shim);
        }
        if let Some(echo) = echo {
            echo.assert_said(true);
        }
        self.killed(groups);
    }

    pub fn kill_supervisor(&mut self) {
        self.note("kill supervisor".into());
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.kill();
        }
        // Something ends that nobody watches but its shim.
        if self.dice.chance(2) {
            self.signal();
        }
        self.supervise();
        self.faults += 1;
    }

    pub fn kill_containerd(&mut self) {
        let with_shims = self.dice.chance(2);
        let with_supervisor = self.dice.chance(3);
        let end = self.dice.chance(2);
        // Clients end with their daemon, or they do not. Nobody has to live for what an exec writes
        // to be kept, and to end no sooner than it does, as long as it lives itself.
        let away = self.dice.chance(2);
        self.note(format!(
            "kill containerd, shims: {with_shims}, supervisor: {with_supervisor}, readers: {away}, an init ends: {end}"
        ));
        if away {
            self.readers(true);
        }
        self.told.assert_late();
        self.containerd.kill();
        self.faults += 1;
        if with_supervisor && let Some(supervisor) = self.supervisor.take() {
            supervisor.kill();
        }
        if with_shims {
            let groups = self.groups();
            for shim in &self.shims_of(&groups) {
                self.node.kill(shim);
            }
            self.killed(groups);
        }
        let mut ended = Vec::new();
        // Without a witness it would be unknown, truly.
        if end
            && (self.supervisor.is_some() || !with_shims)
            && let Some(id) = self.pick(|run| run.init.ended.is_none())
            && let Some(run) = self.tasks.get_mut(&id)
        {
            self.log.push(format!("meanwhile {id} ends"));
            let with_it = run.living_execs();
            run.end(&Arc::clone(&self.node), None, false);
            for exec_id in with_it.into_iter().chain([String::new()]) {
                let status = run.ended(&exec_id);
                ended.push((id.clone(), exec_id, status));
            }
        }
        self.start_containerd();
        for (id, exec_id, status) in ended {
            self.told.expect_late(&id, &exec_id, status);
        }
        if self.supervisor.is_none() {
            self.supervise();
        }
        if away {
            self.readers(false);
        }
    }

    fn readers(&mut self, away: bool) {
        for run in self.tasks.values_mut() {
            run.all().for_each(|work| work.away(away));
        }
    }

    /// As its unit does: the hook, then the daemon.
    fn start_containerd(&mut self) {
        let hook = self.recoverd(&["pre-start", "--strict", "--deadline", "120s"]);
        assert!(hook.status.success(), "{hook:?}");
        self.containerd.start();
        self.told = self.told.anew(&self.containerd);
    }

    /// The other version is installed, and every shim told to become it.
    pub fn upgrade(&mut self) {
        let to = if self.version == VERSION {
            OTHER
        } else {
            VERSION
        };
        let meanwhile = match self.dice.below(6) {
            0 => Meanwhile::ShimDies,
            1 => Meanwhile::SupervisorDies,
            2 => Meanwhile::ContainerdDies,
            3 => Meanwhile::AskerDies,
            _ => Meanwhile::Nothing,
        };
        let victim = self.a_group();
        let victim = victim.filter(|_| meanwhile == Meanwhile::ShimDies);
        self.note(format!(
            "upgrade to {to}, meanwhile {meanwhile:?} {victim:?}"
        ));
        let before = self.shims();
        self.installed.install(to);
        self.version = to;
        match meanwhile {
            Meanwhile::ContainerdDies => self.told.assert_late(),
            Meanwhile::Nothing
            | Meanwhile::ShimDies
            | Meanwhile::SupervisorDies
            | Meanwhile::AskerDies => self.told.assert_all(),
        }
        let doomed = victim
            .as_ref()
            .map(|group| self.shims_of(std::slice::from_ref(group)));
        // With its daemon it would lose its answer.
        let echo = match meanwhile {
            Meanwhile::ContainerdDies => None,
            _ => self.echo(),
        };
        let mut asker = self.recoverd_spawn(&["upgrade", "--all"]);
        thread::sleep(self.dice.moment(250));
        match meanwhile {
            Meanwhile::Nothing => {}
            Meanwhile::ShimDies => {
                for shim in doomed.iter().flatten() {
                    self.node.kill(shim);
                }
            }
            Meanwhile::SupervisorDies => {
                if let Some(supervisor) = self.supervisor.take() {
                    supervisor.kill();
                }
            }
            Meanwhile::ContainerdDies => self.containerd.kill(),
            Meanwhile::AskerDies => {
                // It may have done all of it.
                let pid = asker.process.pid.to_string();
                let _gone_already = self.node.output("kill", ["-s", "KILL", &pid]);
            }
        }
        let status = asker.wait().code();
        let said = asker.text();
        if meanwhile == Meanwhile::AskerDies {
            // A shim that it has asked goes on, and refuses others until it is done.
            wait_for("the upgrade that it began", || {
                let rest = self.recoverd(&["upgrade", "--all"]);
                rest.status.success().then_some(())
            });
        }
        self.note(format!("it ended with {status:?}: {}", said.trim()));
        self.faults += 1;
        if let Some(echo) = echo {
            echo.assert_said(victim.is_some());
        }
        match meanwhile {
            Meanwhile::SupervisorDies => self.supervise(),
            Meanwhile::ContainerdDies => self.start_containerd(),
            Meanwhile::ShimDies | Meanwhile::AskerDies | Meanwhile::Nothing => {}
        }
        match meanwhile {
            Meanwhile::ShimDies | Meanwhile::AskerDies => {}
            // It may not have seen all that containerd knows.
            Meanwhile::ContainerdDies => assert!(matches!(status, Some(0 | 3)), "{said}"),
            Meanwhile::Nothing | Meanwhile::SupervisorDies => assert_eq!(status, Some(0), "{said}"),
        }
        self.killed(victim.into_iter().collect());
        if !matches!(meanwhile, Meanwhile::ShimDies | Meanwhile::AskerDies) {
            assert_eq!(self.shims(), before);
            for run in self.tasks.values() {
                let version = record_at(&self.node, run.task.socket()).shim.version;
                assert_eq!(version, to, "{}", run.task.id());
            }
        }
    }

    /// Something is installed that is no good; then what was there before.
    pub fn break_shim(&mut self) {
        let Some(id) = self.pick(|_| true) else {
            return;
        };
        let Some(group) = self.tasks.get(&id).map(|run| run.group.clone()) else {
            return;
        };
        let broken = match self.dice.below(3) {
            0 if self.may_die(&group) => Broken::Dies,
            1 => Broken::Garbage,
            _ => Broken::Refuses,
        };
        self.note(format!("upgrade {id} to one that is broken: {broken:?}"));
        let dies = format!(
            "#!/bin/sh\ncase \"$*\" in *-handoff-check*) exec {} \"$@\";; esac\nexit 1\n",
            self.node.built("containerd-shim-recoverd-v1").display()
        );
        let before = self.shims();
        self.installed.put(match broken {
            Broken::Refuses => b"#!/bin/sh\necho 'no such format' >&2\nexit 1\n",
            Broken::Garbage => &[0x7f, b'E', b'L', b'F', 0, 1, 2, 3],
            Broken::Dies => dies.as_bytes(),
        });
        let output = self.recoverd(&["upgrade", &format!("e2e/{id}")]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        self.note(format!(
            "it ended with {:?}: {}",
            output.status,
            said.trim()
        ));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        self.faults += 1;
        match broken {
            Broken::Refuses | Broken::Garbage => assert_eq!(self.shims(), before),
            Broken::Dies => {
                assert!(said.contains("came-back"), "{said}");
                self.killed(vec![group.clone()]);
                // The supervisor has tried to start what is broken, and counts that as ends.
                let kills = self.kills.entry(group).or_default();
                kills.extend([Instant::now(); KILLS]);
            }
        }
        self.installed.install(self.version);
    }

    /// The process that serves each task, once it is served.
    fn shims(&self) -> Vec<(String, u32)> {
        let all = self.tasks.iter();
        all.map(|(id, run)| {
            let pid = wait_for(&format!("a shim of {id}"), || Some(run.task.shim_now().pid));
            (id.clone(), pid)
        })
        .collect()
    }
}
