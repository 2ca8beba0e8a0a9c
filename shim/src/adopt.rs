//! Becoming responsible for the tasks of a shim that is gone, or that lives and does not answer:
//! what to do about each of them. Pure; the files below look and act.
//!
//! ```text
//! launch   the verb: starts the daemon, waits for its word, says what it has adopted
//! claim    lock; whoever answers is left alone; the unresponsive one is robbed and ended
//! kept     descriptors of it that somebody else has kept open
//! look     which of the recorded processes live, and what is known of those that do not
//! (here)   record + looks → tasks, news
//! stdio    reopens what the processes read and write
//! bundles  what containerd reads at its start
//! ```
//!
//! *Unknown never leads to destruction*: a process that cannot be proven to be the recorded one
//! is not claimed, and never signalled.

mod bundles;
mod claim;
mod kept;
mod launch;
mod look;
mod loot;
#[cfg(test)]
mod random;

use std::collections::BTreeMap;

use recoverd_common::{
    cgroup::Cgroup,
    record::{self, Exit, Phase, Record},
    timestamp::Timestamp,
};

use crate::{
    checkpoint::Restore,
    options::Options,
    service::{Mount, StdioWish},
    tasks::{self, AdoptedExec, AdoptedMember, Adoptee, ExecPhase, News, Process},
};

pub use bundles::{forget as forget_bundle, write as write_bundle};
pub use claim::{Claimed, claim};
pub use kept::{Kept, inherited, streams_within};
pub use launch::{ADOPTED, BACK, REFUSED, Refused, executable, launch, record_of, run};
pub use look::{Look, has_living, look};
pub use loot::Loot;

/// What has become of a recorded process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// It is this very process.
    Living,
    /// It has ended, with this exit code or 128 + signal.
    Ended(u32),
    /// It has ended, or cannot be proven to be the one that lives; why nobody knows how.
    Gone(String),
}

/// What the runtime holds of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// Nothing.
    Absent,
    /// A container that waits to be started.
    Created,
    /// One that was started.
    Started,
    /// It could not be seen.
    Unknown,
}

/// What was seen of one task.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Of the recorded init, if one is recorded.
    pub init: Option<Life>,
    /// Of its execs.
    pub execs: BTreeMap<String, ExecFacts>,
    /// Its cgroup is frozen; none when that could not be seen.
    pub frozen: Option<bool>,
    /// What the runtime holds.
    pub container: Container,
    /// The runtime's options.
    pub options: Options,
    /// Its pid namespace ends with its init.
    pub private_pids: bool,
    /// Its memory limit.
    pub memory_limit: Option<u64>,
    /// How often the kernel has killed in its cgroup.
    pub oom_kills: Option<u64>,
    /// Where it runs.
    pub cgroup: Option<Cgroup>,
    /// What `runc restore` has started after the record was written.
    pub restored: Option<Restored>,
}

/// An init that was being restored.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// It.
    pub process: Process,
    /// What has become of it.
    pub life: Life,
    /// Where it runs, in the kernel's words.
    pub memberships: Vec<String>,
}

/// What was seen of one exec.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExecFacts {
    /// Of the recorded process, if one is recorded.
    pub life: Option<Life>,
    /// What `runc exec` has started after the record was written.
    pub late: Option<(Process, Life)>,
    /// The file that the runtime reads is there.
    pub prepared: bool,
}

/// What is to be done about a task.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Take it over.
    Adopt(Box<Adoptee>),
    /// It was never made, and there is nothing to undo that is surely its own.
    Drop(String),
}

/// Decides on one task of `record`.
pub fn decide(task: &record::Task, record: &Record, mut facts: Facts) -> Decision {
    let running = &record.running;
    let op = |word: &str| {
        running
            .iter()
            .find(|job| job.op == word && job.id == task.id && job.exec_id.is_empty())
    };
    let mut news = Vec::new();
    let mut execs = BTreeMap::new();
    for exec in &task.execs {
        let seen = facts.execs.get(&exec.id).cloned().unwrap_or_default();
        let named = |named: &record::Unanswered| {
            named.method == "add" && (&named.id, &named.exec_id) == (&task.id, &exec.id)
        };
        if record.unanswered.iter().any(named) {
            // Nobody was told of it: its caller has no answer, or is refused.
            continue;
        }
        if let Some(adopted) = decide_exec(exec, seen, record.written_at, &mut news) {
            execs.insert(exec.id.clone(), adopted);
        }
    }
    let half_made = task.phase == Phase::Creating;
    let restored = facts.restored.take().filter(|_| !half_made);
    let mut restore = task.restore.as_ref().map(|from| Restore {
        image: from.image.clone(),
        parent: from.parent.clone(),
    });
    let mut init = task.init.map(process);
    let mut memberships = task.cgroup.clone();
    if let Some(restored) = restored {
        restore = None;
        init = Some(restored.process);
        memberships = restored.memberships;
        facts.init = Some(restored.life);
        facts.container = Container::Started;
    }
    let waits_for_restore = restore.is_some();
    if half_made {
        // Its caller was never answered. Without a child of ours on record, what the runtime has
        // may be somebody else's of the same name.
        let ours = ["create", "cleanup"]
            .iter()
            .filter_map(|word| op(word))
            .any(|job| job.process.is_some());
        if !ours && facts.container != Container::Absent {
            let why = "its creation was not begun, and the runtime has a container of that name";
            return Decision::Drop(why.to_owned());
        }
        news = vec![News::Undo];
        execs = BTreeMap::new();
    }
    let recorded = task.exit.as_ref();
    let recorded = recorded.map(|exit| exit_of(exit, record.written_at));
    let waits = execs.values().any(|exec| {
        exec.member.exit.is_none() && matches!(exec.phase, ExecPhase::Starting | ExecPhase::Running)
    });
    let phase = match (&recorded, task.phase) {
        (_, Phase::Creating) => tasks::Phase::Creating,
        // Told when its execs have ended.
        (Some(_), _) if waits => tasks::Phase::Running,
        // Nobody knows whether it was told.
        (Some(_), Phase::Running) => tasks::Phase::Running,
        (Some(_), _) => tasks::Phase::Stopped,
        // It has no init, so none can have ended.
        (None, Phase::Created | Phase::Deleting) if waits_for_restore => tasks::Phase::Created,
        // A container that had not run, and whose deletion was under way.
        (None, Phase::Created | Phase::Deleting) => {
            let started = facts.container == Container::Started && task.phase == Phase::Created;
            if started {
                news.insert(0, News::Started);
            }
            tasks::Phase::Created
        }
        (None, Phase::Running | Phase::Stopped) => {
            if facts.frozen == Some(true) && facts.init == Some(Life::Living) {
                news.push(News::Paused);
            }
            tasks::Phase::Running
        }
        (None, Phase::Paused) => {
            if facts.frozen == Some(false) && facts.init == Some(Life::Living) {
                news.push(News::Resumed);
            }
            tasks::Phase::Paused
        }
    };
    if recorded.is_none() && !half_made && !waits_for_restore {
        // Before the exit that it may have brought about.
        if let (Some(then), Some(now)) = (task.oom_kills, facts.oom_kills)
            && now > then
        {
            let at = usize::from(news.first() == Some(&News::Started));
            news.insert(at, News::Oom(now));
        }
        let status = match facts.init {
            Some(Life::Living) => None,
            Some(Life::Ended(status)) => Some(Ok(status)),
            Some(Life::Gone(why)) => Some(Err(why)),
            None => Some(Err("its record names no init process".to_owned())),
        };
        news.extend(status.map(|status| News::Ended {
            exec_id: String::new(),
            status,
        }));
    } else if recorded.is_some() && !facts.private_pids && op("kill").is_some() {
        news.push(News::EndRest);
    }
    Decision::Adopt(Box::new(Adoptee {
        id: task.id.clone(),
        bundle: task.bundle.clone(),
        phase,
        init: AdoptedMember {
            process: init,
            stdio: wish(&task.stdio, task.terminal),
            stdin_closed: task.stdio.stdin_closed,
            exit: recorded,
            draining: false,
        },
        execs,
        options: facts.options,
        rootfs: task.rootfs.iter().map(mount).collect(),
        restore,
        cgroup: facts.cgroup,
        memberships,
        private_pids: facts.private_pids,
        memory_limit: facts.memory_limit,
        created_at: task.created_at,
        oom: task.oom,
        oom_kills: facts.oom_kills.or(task.oom_kills),
        news,
    }))
}

/// None: it was never added.
fn decide_exec(
    exec: &record::Exec,
    seen: ExecFacts,
    written_at: Timestamp,
    news: &mut Vec<News>,
) -> Option<AdoptedExec> {
    let mut process = exec.process.map(process);
    let ended = |status| News::Ended {
        exec_id: exec.id.clone(),
        status,
    };
    let lost = |life: Option<Life>| match life {
        Some(Life::Living) => None,
        Some(Life::Ended(status)) => Some(ended(Ok(status))),
        Some(Life::Gone(why)) => Some(ended(Err(why))),
        None => Some(ended(Err("its record names no process".to_owned()))),
    };
    let exit = exec.exit.as_ref().map(|exit| exit_of(exit, written_at));
    let phase = match (&exit, exec.phase) {
        // Nobody knows whether it was told.
        (Some(_), Phase::Running) => ExecPhase::Running,
        (Some(_), _) => ExecPhase::Stopped,
        // Nobody was told of it before its files were written.
        (None, Phase::Created) if !seen.prepared => return None,
        (None, Phase::Created) => ExecPhase::Added,
        (None, Phase::Creating) => match seen.late {
            Some((late, life)) => {
                process = Some(late);
                news.push(News::ExecStarted(exec.id.clone()));
                news.extend(lost(Some(life)));
                ExecPhase::Starting
            }
            // Its start was never answered and has left no process: it can be started again.
            None if seen.prepared => ExecPhase::Added,
            None => ExecPhase::Failed,
        },
        (None, Phase::Stopped) => ExecPhase::Failed,
        (None, Phase::Running | Phase::Paused | Phase::Deleting) => {
            news.extend(lost(seen.life));
            ExecPhase::Running
        }
    };
    Some(AdoptedExec {
        phase,
        member: AdoptedMember {
            process,
            stdio: wish(&exec.stdio, exec.terminal),
            stdin_closed: exec.stdio.stdin_closed,
            exit,
            draining: false,
        },
    })
}

fn exit_of(exit: &Exit, written_at: Timestamp) -> tasks::Exit {
    match exit {
        Exit::Observed { status, at, .. } => tasks::Exit::observed(*status, *at),
        // The moment was not recorded; it was before this one.
        Exit::Unknown { why } => tasks::Exit::unknown(why.clone(), written_at),
    }
}

fn process(process: record::Process) -> Process {
    Process {
        pid: process.pid,
        start_time: process.start_time,
    }
}

fn wish(stdio: &record::Stdio, terminal: bool) -> StdioWish {
    StdioWish {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal,
    }
}

fn mount(mount: &record::Mount) -> Mount {
    Mount {
        kind: mount.kind.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting_for_restore() -> record::Task {
        record::Task {
            id: "c".into(),
            bundle: "/b".into(),
            phase: Phase::Created,
            init: None,
            runtime: record::Runtime {
                binary: "runc".into(),
                root: "/r".into(),
                systemd_cgroup: false,
            },
            rootfs: Vec::new(),
            cgroup: Vec::new(),
            stdio: record::Stdio::default(),
            terminal: false,
            created_at: Timestamp::now(),
            exit: None,
            oom: false,
            oom_kills: None,
            restore: Some(record::Restore {
                image: "/images".into(),
                parent: String::new(),
            }),
            execs: Vec::new(),
        }
    }

    fn record() -> Record {
        Record {
            written_at: Timestamp::now(),
            boot_id: "b".into(),
            shim: record::Shim {
                version: String::new(),
                process: record::Process {
                    pid: 1,
                    start_time: 1,
                },
                exe: String::new(),
                containerd_address: String::new(),
                namespace: "ns".into(),
                group_id: "c".into(),
                socket: String::new(),
                api_versions: vec![2],
            },
            tasks: vec![waiting_for_restore()],
            context: record::Context::default(),
            running: Vec::new(),
            descriptors: Vec::new(),
            unanswered: Vec::new(),
            strays: Vec::new(),
        }
    }

    fn adoptee(restored: Option<Restored>) -> Adoptee {
        of_record(&record(), restored, BTreeMap::new())
    }

    fn of_record(
        record: &Record,
        restored: Option<Restored>,
        execs: BTreeMap<String, ExecFacts>,
    ) -> Adoptee {
        let facts = Facts {
            init: None,
            execs,
            frozen: None,
            container: Container::Absent,
            options: Options::default(),
            private_pids: true,
            memory_limit: None,
            oom_kills: None,
            cgroup: None,
            restored,
        };
        match decide(&record.tasks[0], record, facts) {
            Decision::Adopt(adoptee) => *adoptee,
            Decision::Drop(why) => panic!("{why}"),
        }
    }

    #[test]
    fn an_exec_whose_adding_was_not_answered_is_not_there() {
        let mut record = record();
        let exec = |id: &str| record::Exec {
            id: id.into(),
            phase: Phase::Created,
            process: None,
            stdio: record::Stdio::default(),
            terminal: false,
            exit: None,
        };
        record.tasks[0].execs = vec![exec("told"), exec("adding")];
        record.unanswered = vec![record::Unanswered {
            connection: 1,
            stream: 1,
            method: "add".into(),
            id: "c".into(),
            exec_id: "adding".into(),
        }];
        let prepared = ExecFacts {
            prepared: true,
            ..ExecFacts::default()
        };
        let seen = ["told", "adding"].map(|id| (id.to_owned(), prepared.clone()));
        let adoptee = of_record(&record, None, seen.into());
        assert_eq!(adoptee.execs.keys().collect::<Vec<_>>(), ["told"]);
    }

    /// The exits that are told of a task which has ended, as has its exec, of how whoever wrote the
    /// record knows.
    fn told(phase: Phase) -> Vec<(String, u32)> {
        let exit = |status| {
            Some(Exit::Observed {
                status,
                at: Timestamp::now(),
                oom: false,
            })
        };
        let mut record = record();
        record.tasks[0].restore = None;
        record.tasks[0].phase = phase;
        record.tasks[0].exit = exit(42);
        record.tasks[0].execs = vec![record::Exec {
            id: "e".into(),
            phase,
            process: None,
            stdio: record::Stdio::default(),
            terminal: false,
            exit: exit(7),
        }];
        let adoptee = of_record(&record, None, BTreeMap::new());
        let now = tasks::Now {
            mono_ms: 0,
            wall: Timestamp::now(),
        };
        let mut tasks = tasks::Tasks::new(1);
        let effects = tasks.handle(tasks::Event::Adopt(vec![adoptee]), now);
        let task = tasks.get("c").unwrap();
        assert_eq!(task.phase, tasks::Phase::Stopped);
        assert_eq!(task.execs["e"].phase, ExecPhase::Stopped);
        let exit = |effect| match effect {
            tasks::Effect::Publish(tasks::Notice::Exit { key, ended }) => {
                Some((key.exec_id, ended.status))
            }
            _ => None,
        };
        effects.into_iter().filter_map(exit).collect()
    }

    #[test]
    fn an_exit_is_told_again_unless_it_surely_was() {
        // That of the exec first.
        let both = [("e".to_owned(), 7), (String::new(), 42)];
        assert_eq!(told(Phase::Running), both);
        assert_eq!(told(Phase::Stopped), []);
    }

    #[test]
    fn a_task_without_an_init_waits_on_for_its_restore() {
        let adoptee = adoptee(None);
        assert_eq!(adoptee.phase, tasks::Phase::Created);
        assert_eq!(adoptee.news, []);
        assert_eq!(adoptee.restore.unwrap().image, "/images");
    }

    #[test]
    fn a_restore_that_a_dead_shim_has_begun_is_taken_over() {
        let process = Process {
            pid: 7,
            start_time: 8,
        };
        let restored = |life| Restored {
            process,
            life,
            memberships: vec!["0::/c".into()],
        };
        let living = adoptee(Some(restored(Life::Living)));
        assert_eq!(living.news, [News::Started]);
        assert_eq!(living.init.process, Some(process));
        assert_eq!((living.restore, living.memberships.len()), (None, 1));
        let ended = adoptee(Some(restored(Life::Ended(3))));
        let end = News::Ended {
            exec_id: String::new(),
            status: Ok(3),
        };
        assert_eq!(ended.news, [News::Started, end]);
    }
}
