//! What holds of every decision about a recorded task, whatever has become of its processes.

use std::collections::BTreeSet;

use proptest::{collection::vec, option, prelude::*};
use recoverd_common::record::{Context, Exec, Running, Runtime, Shim, Stdio, Task};

use super::*;

const WRITTEN: Timestamp = Timestamp {
    seconds: 1000,
    nanos: 0,
};

fn phase() -> impl Strategy<Value = Phase> {
    prop_oneof![
        Just(Phase::Creating),
        Just(Phase::Created),
        Just(Phase::Running),
        Just(Phase::Paused),
        Just(Phase::Stopped),
        Just(Phase::Deleting),
    ]
}

fn recorded() -> impl Strategy<Value = record::Process> {
    (1..9_u32, 1..9_u64).prop_map(|(pid, start_time)| record::Process { pid, start_time })
}

fn exit() -> impl Strategy<Value = Exit> {
    prop_oneof![
        (0..256_u32, any::<bool>()).prop_map(|(status, oom)| Exit::Observed {
            status,
            at: WRITTEN,
            oom,
        }),
        Just(Exit::Unknown {
            why: "nobody saw it".into()
        }),
    ]
}

fn life() -> impl Strategy<Value = Life> {
    prop_oneof![
        Just(Life::Living),
        (0..256_u32).prop_map(Life::Ended),
        Just(Life::Gone("its number is another process's".into())),
    ]
}

fn exec() -> impl Strategy<Value = (Exec, Option<ExecFacts>)> {
    let facts = (
        option::of(life()),
        option::of((recorded(), life())),
        any::<bool>(),
    );
    let facts = facts.prop_map(|(life, late, prepared)| ExecFacts {
        life,
        late: late.map(|(found, life)| (process(found), life)),
        prepared,
    });
    let exec = (phase(), option::of(recorded()), option::of(exit()));
    (exec, option::of(facts)).prop_map(|((phase, process, exit), facts)| {
        let exec = Exec {
            id: String::new(),
            phase,
            process,
            stdio: Stdio::default(),
            terminal: false,
            exit,
        };
        (exec, facts)
    })
}

/// A task, the record it stands in, and what was seen of it.
fn case() -> impl Strategy<Value = (Task, Record, Facts)> {
    let task = (phase(), option::of(recorded()), option::of(exit()));
    let container = prop_oneof![
        Just(Container::Absent),
        Just(Container::Created),
        Just(Container::Started),
        Just(Container::Unknown),
    ];
    let facts = (
        option::of(life()),
        option::of(any::<bool>()),
        container,
        any::<bool>(),
    );
    let op = prop_oneof![
        Just("create"),
        Just("cleanup"),
        Just("kill"),
        Just("delete")
    ];
    let running = option::of((op, option::of(recorded())));
    (task, vec(exec(), 0..4), facts, running).prop_map(|(task, execs, facts, running)| {
        let (phase, init, exit) = task;
        let (life, frozen, container, private_pids) = facts;
        let mut seen = BTreeMap::new();
        let mut named = Vec::new();
        for (number, (mut exec, facts)) in execs.into_iter().enumerate() {
            exec.id = format!("e{number}");
            seen.extend(facts.map(|facts| (exec.id.clone(), facts)));
            named.push(exec);
        }
        let task = Task {
            id: "c1".into(),
            bundle: "/b".into(),
            phase,
            init,
            runtime: Runtime {
                binary: "runc".into(),
                root: "/r".into(),
                systemd_cgroup: false,
            },
            rootfs: Vec::new(),
            cgroup: Vec::new(),
            stdio: Stdio::default(),
            terminal: false,
            created_at: WRITTEN,
            exit,
            oom: false,
            oom_kills: None,
            restore: None,
            execs: named,
        };
        let record = Record {
            written_at: WRITTEN,
            boot_id: "boot".into(),
            shim: Shim {
                version: String::new(),
                process: record::Process {
                    pid: 1,
                    start_time: 1,
                },
                exe: String::new(),
                containerd_address: "/a".into(),
                namespace: "default".into(),
                group_id: "c1".into(),
                socket: "/s".into(),
                api_versions: vec![2],
            },
            tasks: vec![task.clone()],
            context: Context::default(),
            running: running
                .map(|(op, process)| Running {
                    op: op.to_owned(),
                    id: "c1".into(),
                    exec_id: String::new(),
                    process,
                })
                .into_iter()
                .collect(),
            descriptors: Vec::new(),
            unanswered: Vec::new(),
            strays: Vec::new(),
        };
        let facts = Facts {
            // What is not recorded was not looked at.
            init: life.filter(|_| init.is_some()),
            execs: seen,
            frozen,
            container,
            options: Options::default(),
            private_pids,
            memory_limit: None,
            oom_kills: None,
            cgroup: None,
            restored: None,
        };
        (task, record, facts)
    })
}

/// Every status that somebody saw.
fn seen(facts: &Facts) -> BTreeSet<u32> {
    let execs = facts.execs.values();
    let lives = execs.flat_map(|exec| {
        let late = exec.late.as_ref().map(|(_, life)| life);
        exec.life.iter().chain(late)
    });
    let ended = lives.chain(&facts.init).filter_map(|life| match life {
        Life::Ended(status) => Some(*status),
        Life::Living | Life::Gone(_) => None,
    });
    ended.collect()
}

proptest! {
    #[test]
    fn no_exit_is_told_that_nobody_saw((task, record, facts) in case()) {
        let seen = seen(&facts);
        let living = facts.init == Some(Life::Living);
        let Decision::Adopt(adoptee) = decide(&task, &record, facts) else { return Ok(()) };
        for news in &adoptee.news {
            let News::Ended { exec_id, status } = news else { continue };
            match status {
                Ok(status) => prop_assert!(seen.contains(status), "{adoptee:#?}"),
                Err(why) => prop_assert!(!why.is_empty()),
            }
            prop_assert!(!(living && exec_id.is_empty()), "it lives: {adoptee:#?}");
        }
    }

    #[test]
    fn oom_kills_are_told_if_they_are_new_and_before_an_exit(
        (mut task, record, mut facts) in case(),
        then in option::of(0..3_u64),
        now in option::of(0..3_u64),
    ) {
        (task.oom_kills, facts.oom_kills) = (then, now);
        let Decision::Adopt(adoptee) = decide(&task, &record, facts) else { return Ok(()) };
        let at = |wanted: fn(&News) -> bool| adoptee.news.iter().position(wanted);
        let told = at(|news| matches!(news, News::Oom(_)));
        let exit = at(|news| matches!(news, News::Ended { .. }));
        let open = task.exit.is_none() && task.phase != Phase::Creating;
        let new = matches!((then, now), (Some(then), Some(now)) if now > then);
        prop_assert_eq!(told.is_some(), open && new, "{:#?}", adoptee);
        prop_assert!(told.is_none_or(|told| exit.is_none_or(|exit| told < exit)));
    }

    #[test]
    fn a_recorded_exit_stays_what_it_was((task, record, facts) in case()) {
        let Decision::Adopt(adoptee) = decide(&task, &record, facts) else { return Ok(()) };
        match &task.exit {
            Some(Exit::Observed { status, at, .. }) => {
                prop_assert_eq!(&adoptee.init.exit, &Some(tasks::Exit::observed(*status, *at)));
            }
            Some(Exit::Unknown { why }) => {
                let exit = adoptee.init.exit.as_ref().unwrap();
                prop_assert_eq!(&exit.unknown, &Some(why.clone()));
            }
            None => prop_assert_eq!(&adoptee.init.exit, &None),
        }
        let again = adoptee.news.iter().any(|news| {
            matches!(news, News::Ended { exec_id, .. } if exec_id.is_empty())
        });
        prop_assert!(task.exit.is_none() || !again, "told twice: {adoptee:#?}");
    }

    #[test]
    fn nobody_is_claimed_whom_the_record_or_the_runtime_does_not_name(
        (task, record, facts) in case(),
    ) {
        let late: Vec<Process> = facts
            .execs
            .values()
            .filter_map(|exec| exec.late.as_ref().map(|(process, _)| *process))
            .collect();
        let Decision::Adopt(adoptee) = decide(&task, &record, facts) else { return Ok(()) };
        prop_assert_eq!(adoptee.init.process, task.init.map(process));
        for (id, exec) in &adoptee.execs {
            let named = task.execs.iter().find(|exec| exec.id == *id);
            prop_assert!(named.is_some(), "{id}");
            if let Some(claimed) = exec.member.process {
                let recorded = named.and_then(|exec| exec.process).map(process);
                prop_assert!(recorded == Some(claimed) || late.contains(&claimed), "{adoptee:#?}");
            }
        }
    }

    #[test]
    fn only_what_was_never_made_is_undone_or_dropped((task, record, facts) in case()) {
        let half_made = task.phase == Phase::Creating;
        let absent = facts.container == Container::Absent;
        match decide(&task, &record, facts) {
            Decision::Drop(why) => prop_assert!(half_made && !absent && !why.is_empty()),
            Decision::Adopt(adoptee) => {
                let undone = adoptee.news.contains(&News::Undo);
                prop_assert_eq!(undone, half_made);
                // What the runtime has is ours for certain, or there is nothing.
                let ours = record.running.iter().any(|job| {
                    matches!(job.op.as_str(), "create" | "cleanup") && job.process.is_some()
                });
                prop_assert!(!undone || ours || absent, "{adoptee:#?}");
            }
        }
    }
}
