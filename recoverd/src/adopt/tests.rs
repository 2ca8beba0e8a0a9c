//! Decisions of adoption, on plain data.

use std::{collections::BTreeSet, path::Path};

use recoverd_common::{
    proc::ProcessId,
    record::{self, Exit, Record},
    seen::Seen,
};

use super::{
    clues::{Clues, ExecClue, TaskClues},
    decide::{Decision, Stillness, Wish, select, stillness},
    orders::orders,
};
use crate::{
    correlate::correlate,
    facts::{
        Answer, Api, CgroupProcess, Connection, Look, RecordFile, Reply,
        fixture::{C1, OLD, SOCKET_DIR, Task, healthy, process, stat},
    },
};

const POD: [Task; 3] = [
    Task {
        instance: 0,
        id: "pause",
        group: "pause",
        shim: 20,
        init: 21,
    },
    Task {
        instance: 0,
        id: "app",
        group: "pause",
        shim: 20,
        init: 22,
    },
    Task {
        instance: 0,
        id: "side",
        group: "pause",
        shim: 20,
        init: 23,
    },
];

/// containerd is down, as it is when its hook runs.
fn down(mut look: Look) -> Look {
    for instance in &mut look.instances {
        instance.api = Api::Down;
        instance.daemon = None;
    }
    look
}

fn silent(connection: Connection, greeting: Reply<crate::facts::Greeting>) -> Answer {
    Answer {
        connection,
        greeting,
        states: Default::default(),
        api: None,
        took: None,
        asked: 2,
        patient: true,
    }
}

/// The shim of a task hangs.
fn hang(look: &mut Look, task: &Task, state: char) -> ProcessId {
    look.answers
        .insert(task.socket(), silent(Connection::Made, Reply::Silent));
    let shim = look.shim_of(task);
    shim.state = state;
    shim.cpu_ticks_after = Some(shim.cpu_ticks);
    shim.id
}

fn wish(unresponsive: &BTreeSet<ProcessId>) -> Wish<'_> {
    Wish {
        address: None,
        namespace: None,
        only: None,
        unresponsive,
        unheard: None,
        unit: None,
    }
}

fn decide_with(look: &Look, clues: &Clues, wish: &Wish<'_>) -> Decision {
    let cases = correlate(look, SOCKET_DIR.as_ref());
    orders(look, select(look, &cases, wish), clues)
}

fn decide(look: &Look, unresponsive: &[ProcessId]) -> Decision {
    let unresponsive = unresponsive.iter().copied().collect();
    decide_with(look, &Clues::default(), &wish(&unresponsive))
}

fn record_of(look: &mut Look, task: &Task, change: impl Fn(&mut Record)) {
    let base = decide(
        &{
            let mut orphaned = down(healthy());
            orphaned.add_down(task);
            orphaned.end_shim(task);
            orphaned
        },
        &[],
    );
    let order = base.orders.into_iter().find(|o| o.group == task.group);
    let mut record = order.unwrap().adoption.record.unwrap();
    change(&mut record);
    look.records.push(RecordFile {
        path: format!("{}.record", task.socket()).into(),
        socket: task.socket(),
        record: Seen::Present(record),
    });
}

impl Look {
    /// As `add`, under a containerd that is down.
    fn add_down(&mut self, task: &Task) {
        if self.bundles.iter().any(|b| b.bundle.id.as_str() == task.id) {
            return;
        }
        let api = std::mem::replace(&mut self.instances[0].api, Api::Down);
        let up = crate::facts::fixture::instance(0).api;
        self.instances[0].api = up;
        self.add(task);
        self.instances[0].api = api;
    }
}

#[test]
fn a_healthy_node_has_nobody_to_adopt() {
    let decision = decide(&down(healthy()), &[]);
    assert!(decision.orders.is_empty() && decision.refused.is_empty());
}

#[test]
fn an_orphan_of_a_stock_shim_is_adopted_with_the_record_it_would_have_had() {
    let mut look = down(healthy());
    look.end_shim(&C1);
    let decision = decide(&look, &[]);
    let [order] = decision.orders.as_slice() else {
        panic!("{decision:?}")
    };
    assert_eq!(order.adoption.socket, Path::new(&C1.socket()));
    assert_eq!(order.adoption.predecessor, None);
    assert_eq!((order.group.as_str(), order.living()), ("c1", 1));
    let record = order.adoption.record.as_ref().unwrap();
    assert_eq!(record.boot_id, "boot");
    assert_eq!(record.shim.containerd_address, look.instances[0].address);
    let task = &record.tasks[0];
    assert_eq!(task.bundle, C1.bundle().to_string_lossy());
    assert_eq!(task.phase, record::Phase::Running);
    assert_eq!(task.init.unwrap().pid, 7);
    assert_eq!(task.init.unwrap().start_time, process(7, OLD).start_time);
    assert_eq!(task.runtime.root, "/run/containerd/runc/default");
    assert_eq!(task.exit, None);
}

#[test]
fn a_pod_is_adopted_as_one_and_its_ended_member_with_it() {
    let mut look = healthy();
    for task in &POD {
        look.add(task);
    }
    let mut look = down(look);
    look.end_shim(&POD[0]);
    look.table().remove(&POD[2].init);
    let decision = decide(&look, &[]);
    let [order] = decision.orders.as_slice() else {
        panic!("{decision:?}")
    };
    let record = order.adoption.record.as_ref().unwrap();
    let ids: Vec<&str> = record.tasks.iter().map(|t| t.id.as_str()).collect();
    assert_eq!(ids, ["pause", "app", "side"], "the sandbox first");
    assert_eq!(order.living(), 2);
    // Ended, and nobody knows whether that was told.
    assert_eq!(record.tasks[2].phase, record::Phase::Running);
    assert!(matches!(record.tasks[2].exit, Some(Exit::Unknown { .. })));
}

#[test]
fn one_of_a_pod_is_asked_for_and_the_pod_is_adopted() {
    let mut look = healthy();
    for task in &POD {
        look.add(task);
    }
    let mut look = down(look);
    look.end_shim(&POD[0]);
    look.end_shim(&C1);
    let none = BTreeSet::new();
    let only = BTreeSet::from([POD[1].name(), ("default".into(), "nobody".into())]);
    let wish = Wish {
        only: Some(&only),
        ..wish(&none)
    };
    let decision = decide_with(&look, &Clues::default(), &wish);
    assert_eq!(decision.orders.len(), 1);
    assert_eq!(decision.orders[0].members.len(), 3);
    let refused: Vec<&str> = decision.refused.iter().map(|r| r.name.1.as_str()).collect();
    assert_eq!(refused, ["nobody"]);
}

#[test]
fn a_stock_task_that_ended_unseen_is_lost_because() {
    let mut look = down(healthy());
    look.end_shim(&C1);
    look.table().remove(&C1.init);
    let decision = decide(&look, &[]);
    assert!(decision.orders.is_empty());
    assert!(decision.refused[0].lost, "{decision:?}");
    // While nobody has reaped it, its status can be had.
    let mut zombie = stat(process(C1.init, OLD), 1);
    zombie.state = 'Z';
    look.table().insert(C1.init, zombie);
    let decision = decide(&look, &[]);
    let task = &decision.orders[0].adoption.record.as_ref().unwrap().tasks[0];
    assert_eq!((task.phase, &task.exit), (record::Phase::Running, &None));
}

#[test]
fn ours_is_adopted_from_its_record_even_when_it_ended() {
    let mut look = down(healthy());
    record_of(&mut look, &C1, |_| {});
    look.end_shim(&C1);
    assert_eq!(decide(&look, &[]).orders[0].adoption.record, None);
    look.table().remove(&C1.init);
    let decision = decide(&look, &[]);
    assert_eq!(decision.orders[0].adoption.record, None);
    assert_eq!(decision.orders[0].living(), 0);
}

#[test]
fn a_record_that_is_not_this_tasks_does_not_count() {
    let changes: [&dyn Fn(&mut Record); 4] = [
        &|record| record.boot_id = "another".into(),
        &|record| record.shim.namespace = "another".into(),
        &|record| record.shim.containerd_address = "/another".into(),
        &|record| {
            record.tasks[0].init = Some(record::Process {
                pid: 7,
                start_time: 1,
            })
        },
    ];
    for (at, change) in changes.iter().enumerate() {
        let mut look = down(healthy());
        record_of(&mut look, &C1, change);
        look.end_shim(&C1);
        let decision = decide(&look, &[]);
        assert!(decision.orders[0].adoption.record.is_some(), "change {at}");
        assert_eq!(decision.orders[0].unreadable, None);
    }
    let mut look = down(healthy());
    look.records.push(RecordFile {
        path: format!("{}.record", C1.socket()).into(),
        socket: C1.socket(),
        record: Seen::Unknown("is cut".into()),
    });
    look.end_shim(&C1);
    let decision = decide(&look, &[]);
    assert!(decision.orders[0].adoption.record.is_some());
    assert!(
        decision.orders[0].unreadable.is_some(),
        "it is set aside first"
    );
}

#[test]
fn a_hung_shim_is_replaced_only_when_stopped_or_idle_and_containerd_is_down() {
    for (state, replaced) in [('T', true), ('t', true), ('S', true), ('D', false)] {
        let mut look = down(healthy());
        let shim = hang(&mut look, &C1, state);
        let decision = decide(&look, &[shim]);
        assert_eq!(decision.orders.len(), usize::from(replaced), "{state}");
        if replaced {
            let predecessor = decision.orders[0].adoption.predecessor.unwrap();
            assert_eq!(predecessor.pid, C1.shim.unsigned_abs());
            assert_eq!(predecessor.start_time, shim.start_time);
        } else {
            assert!(decision.refused[0].why.contains("state D"));
        }
        // Without a second look, nothing.
        assert!(decide(&look, &[]).orders.is_empty());
    }
    let mut look = down(healthy());
    let shim = hang(&mut look, &C1, 'S');
    look.shim_of(&C1).cpu_ticks_after = Some(1000);
    assert_eq!(stillness(look.shim_of(&C1)), Stillness::Busy);
    assert!(decide(&look, &[shim]).orders.is_empty(), "busy");
    let mut look = healthy();
    let shim = hang(&mut look, &C1, 'T');
    let decision = decide(&look, &[shim]);
    assert!(decision.orders.is_empty(), "containerd runs");
    assert!(decision.refused[0].why.contains("runs"), "{decision:?}");
}

#[test]
fn a_shim_whose_socket_is_gone_is_replaced_even_if_it_is_busy() {
    for (state, replaced) in [('S', true), ('R', true), ('D', false)] {
        let mut look = down(healthy());
        let shim = hang(&mut look, &C1, state);
        look.answer_of(&C1).connection = Connection::NoFile;
        look.answer_of(&C1).greeting = Reply::NotAsked;
        look.shim_of(&C1).cpu_ticks_after = None;
        let decision = decide(&look, &[shim]);
        assert_eq!(decision.orders.len(), usize::from(replaced), "{state}");
        // Without a second look, nothing.
        assert!(decide(&look, &[]).orders.is_empty());
    }
}

#[test]
fn nothing_is_adopted_on_unknown_or_foreign() {
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Look));
    let changes: [Change<'_>; 6] = [
        ("hidden processes", &|look| {
            look.processes = Seen::Unknown("hidden".into())
        }),
        ("hidden listeners", &|look| {
            look.listeners = Seen::Unknown("hidden".into())
        }),
        ("a verb at work", &|look| {
            look.busy_verbs.insert(C1.name());
        }),
        ("kata", &|look| {
            let bundle = &mut look.bundles[0].bundle;
            bundle.shim_binary = Seen::Present("/bin/containerd-shim-kata-v2".into());
        }),
        ("an abstract address", &|look| {
            let bundle = &mut look.bundles[0].bundle;
            bundle.address = Seen::Present("abstract".into());
            bundle.bootstrap = Seen::Absent;
        }),
        ("a stranger's socket", &|look| {
            look.listeners_mut().insert(C1.socket(), vec![4711]);
        }),
    ];
    for (what, change) in changes {
        let mut look = down(healthy());
        look.end_shim(&C1);
        change(&mut look);
        let decision = decide(&look, &[]);
        assert!(decision.orders.is_empty(), "{what}: {decision:?}");
        assert!(decision.refused.iter().all(|r| !r.why.is_empty()), "{what}");
    }
}

#[test]
fn execs_are_what_a_pid_file_names_in_the_cgroup_and_no_child_of_the_container() {
    let mut look = down(healthy());
    look.end_shim(&C1);
    // An exec, its child, a child of the init, and a pid file's number that left the cgroup.
    for (pid, ppid, inside) in [(50, 1, true), (51, 50, true), (52, 7, true), (53, 1, false)] {
        let id = process(pid, 100);
        look.table().insert(pid, stat(id, ppid));
        let cgroup = &mut look.cgroups[0];
        if let (true, Seen::Present(processes)) = (inside, &mut cgroup.processes) {
            processes.push(CgroupProcess {
                id,
                ppid,
                first_of_namespace: false,
            });
        }
    }
    let clue = |pid| ExecClue {
        id: format!("e{pid}"),
        pid,
        stdio: Default::default(),
        terminal: pid == 50,
        exit: None,
    };
    let mut clues = Clues::default();
    let task = TaskClues {
        execs: [50, 51, 52, 53, 54].map(clue).to_vec(),
        paused: true,
        ..TaskClues::default()
    };
    clues.tasks.insert(C1.bundle(), task);
    let none = BTreeSet::new();
    let decision = decide_with(&look, &clues, &wish(&none));
    let task = &decision.orders[0].adoption.record.as_ref().unwrap().tasks[0];
    let execs: Vec<&str> = task.execs.iter().map(|exec| exec.id.as_str()).collect();
    assert_eq!(execs, ["e50"]);
    assert!(task.execs[0].terminal);
    assert_eq!(task.phase, record::Phase::Paused);
}

#[test]
fn an_exec_that_its_shim_saw_end_is_described_with_its_exit() {
    let mut look = down(healthy());
    let shim = hang(&mut look, &C1, 'T');
    let at = recoverd_common::timestamp::Timestamp {
        seconds: 1234,
        nanos: 5,
    };
    let clue = |id: &str, exit| ExecClue {
        id: id.into(),
        pid: 50,
        stdio: Default::default(),
        terminal: false,
        exit,
    };
    let mut clues = Clues::default();
    let task = TaskClues {
        execs: vec![clue("ended", Some((7, at))), clue("unseen", None)],
        ..TaskClues::default()
    };
    clues.tasks.insert(C1.bundle(), task);
    let unresponsive = BTreeSet::from([shim]);
    let decision = decide_with(&look, &clues, &wish(&unresponsive));
    let task = &decision.orders[0].adoption.record.as_ref().unwrap().tasks[0];
    let [exec] = task.execs.as_slice() else {
        panic!("{task:?}")
    };
    assert_eq!(
        (exec.id.as_str(), exec.phase),
        ("ended", record::Phase::Running)
    );
    let exit = Exit::Observed {
        status: 7,
        at,
        oom: false,
    };
    assert_eq!(exec.exit, Some(exit));
}

#[test]
fn the_most_valuable_comes_first() {
    let mut look = healthy();
    for task in &POD {
        look.add(task);
    }
    let mut look = down(look);
    record_of(&mut look, &C1, |_| {});
    look.end_shim(&C1);
    look.end_shim(&POD[0]);
    look.table().remove(&C1.init);
    let decision = decide(&look, &[]);
    let groups: Vec<&str> = decision.orders.iter().map(|o| o.group.as_str()).collect();
    assert_eq!(groups, ["pause", "c1"]);
}
