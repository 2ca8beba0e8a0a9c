//! What is wrong with a task.

use super::*;
use crate::facts::{
    Answer, CgroupProcess, Phase, Reply, Shim, TaskState,
    fixture::{OLD, process, stat},
};

/// A pod's sandbox, and the same container of it twice.
const SANDBOX: Task = Task {
    instance: 0,
    id: "pod",
    group: "pod",
    shim: 20,
    init: 21,
};
const FIRST: Task = Task {
    id: "app-1",
    group: "pod",
    init: 22,
    ..SANDBOX
};
const SECOND: Task = Task {
    id: "app-2",
    group: "pod",
    init: 23,
    ..SANDBOX
};

#[test]
fn an_init_without_a_shim_is_orphaned() {
    finds(
        Code::OrphanedTask,
        |l| l.end_shim(&C1),
        &[
            ("the init ended too", end_init),
            ("nobody can see processes", blind),
            ("nobody can see listeners", deaf),
            ("somebody listens there", |l| {
                l.listeners_mut().insert(C1.socket(), vec![99]);
            }),
            ("somebody answers there", |l| {
                *l.answer_of(&C1) = fixture::answer(&C1, Phase::Running);
            }),
            ("a shim of its name runs", |l| {
                let shim = fixture::shim(&C1);
                l.shims.push(Shim {
                    listens: Vec::new(),
                    ..shim
                });
            }),
            ("nothing names an init yet", |l| {
                l.uncreated(&C1);
                l.bundle_of(&C1).init_pid = Seen::Absent;
            }),
        ],
    );
}

#[test]
fn a_task_is_orphaned_whatever_containerd_says() {
    let table: &[(&str, Break)] = &[
        ("lists the task as running", |_| {}),
        ("is down", down),
        ("cannot be asked: timed out", unsure),
        ("is up and does not list the task", unlisted),
        ("did not list its tasks in time", |l| l.api(0).tasks = None),
    ];
    for (what, change) in table {
        let mut look = healthy();
        look.end_shim(&C1);
        change(&mut look);
        let found = only(&look);
        assert_eq!(
            (found.finding.code, found.hold),
            (Code::OrphanedTask, Hold::Twice)
        );
        assert_eq!(
            (found.instance, found.address.clone()),
            (Some(0), Some(C1.socket()))
        );
        assert!(facts(&found).contains(what), "{what}: {}", facts(&found));
    }
    // Nor does a removed bundle help.
    let mut look = healthy();
    look.end_shim(&C1);
    look.remove_bundle(&C1);
    let shown = facts(&only(&look));
    assert!(shown.contains("bundle: there is none"), "{shown}");
    look.instances.clear();
    let shown = facts(&only(&look));
    assert!(
        shown.contains("of a containerd that is not known here"),
        "{shown}"
    );
}

#[test]
fn a_second_init_in_the_cgroup_is_a_duplicate() {
    fn second(look: &mut Look) {
        let other = CgroupProcess {
            id: process(99, OLD),
            ppid: 1,
            first_of_namespace: true,
        };
        if let Seen::Present(processes) = &mut look.cgroup_of(&C1).processes {
            processes.push(other);
        }
    }
    fn change(look: &mut Look, change: fn(&mut CgroupProcess)) {
        if let Seen::Present(processes) = &mut look.cgroup_of(&C1).processes {
            processes
                .iter_mut()
                .filter(|p| p.id.pid == 99)
                .for_each(change);
        }
    }
    finds(
        Code::DuplicateWorkload,
        second,
        &[
            ("it is first of no pid namespace", |l| {
                change(l, |p| p.first_of_namespace = false)
            }),
            ("it is a child of the shim", |l| {
                change(l, |p| p.ppid = C1.shim)
            }),
            ("it is a nested container's", |l| {
                change(l, |p| p.ppid = C1.init)
            }),
            ("it went away while it was looked at", |l| {
                change(l, |p| p.id.start_time = 0)
            }),
            ("the cgroup's processes are unknown", |l| {
                l.cgroup_of(&C1).processes = unknown()
            }),
            ("the task's own init is not known", blind),
            ("the shim is foreign", foreign),
            (
                "it is the init of another containerd's task of this name",
                |l| {
                    const OTHER: Task = Task {
                        instance: 1,
                        shim: 98,
                        init: 99,
                        ..C1
                    };
                    let both = l.cgroup_of(&C1).clone();
                    l.add(&OTHER);
                    l.cgroups = vec![both];
                },
            ),
            ("the task's own init ended", |l| {
                l.table().remove(&C1.init);
            }),
        ],
    );
    // In the cgroup of a task of which nothing else is left, any init is one too many.
    let mut look = healthy();
    second(&mut look);
    let cgroup = look.cgroup_of(&C1).clone();
    look.remove(&C1);
    look.cgroups.push(cgroup);
    look.listed(&C1, Phase::Running);
    assert_eq!(codes(&look), [Code::DuplicateWorkload]);
}

#[test]
fn two_inits_of_one_container_of_one_pod_are_duplicates() {
    fn twice(look: &mut Look) {
        for task in [SANDBOX, FIRST, SECOND] {
            look.add(&task);
        }
        look.init_started(&SECOND, OLD - 100);
    }
    finds(
        Code::DuplicateWorkload,
        twice,
        &[
            ("one of them ended", |l| l.end_init(&FIRST)),
            ("their shim is foreign", |l| {
                l.shim_of(&SANDBOX).name = "containerd-shim-kata-v2".into();
            }),
            ("nobody can see processes", blind),
            ("they are different containers", |l| {
                rename(l, "container-name", "side")
            }),
        ],
    );
    let mut look = healthy();
    twice(&mut look);
    let found = only(&look);
    assert_eq!(
        found.finding.subject.text(),
        "default/app-1",
        "the older is named"
    );
    assert!(
        facts(&found).contains("app-2: init 23"),
        "{}",
        facts(&found)
    );
}

#[test]
fn a_container_that_survived_in_the_sandbox_before_is_a_duplicate() {
    const ANEW: Task = Task {
        id: "pod-2",
        group: "pod-2",
        shim: 30,
        init: 31,
        ..SANDBOX
    };
    const AGAIN: Task = Task {
        id: "app-2",
        init: 32,
        ..ANEW
    };
    let mut look = healthy();
    for task in [SANDBOX, FIRST, ANEW, AGAIN] {
        look.add(&task);
    }
    look.init_started(&AGAIN, YOUNG);
    let found = only(&look);
    assert_eq!(found.finding.code, Code::DuplicateWorkload);
    assert_eq!(found.finding.subject.text(), "default/app-1");
    assert!(
        facts(&found).contains("container app of pod prod/web-0"),
        "{}",
        facts(&found)
    );
}

/// Changes an annotation of [`SECOND`].
fn rename(look: &mut Look, key: &str, value: &str) {
    let key = format!("io.kubernetes.cri.{key}");
    if let Seen::Present(config) = &mut look.bundle_of(&SECOND).config {
        config.annotations.insert(key, value.into());
    }
}

#[test]
fn a_living_task_that_its_containerd_does_not_list_is_unknown_to_it() {
    finds(
        Code::TaskUnknownToContainerd,
        unlisted,
        &[
            ("containerd is down", down),
            ("containerd cannot be asked", unsure),
            ("the list did not come", |l| l.api(0).tasks = None),
            ("the init ended", end_init),
            ("nobody can see processes", blind),
            ("the shim ended", |l| l.end_shim(&C1)),
            ("the shim is foreign", foreign),
            ("its shim is another containerd's", |l| {
                l.shim_of(&C1).address = "/run/unseen/containerd.sock".into();
            }),
            ("the shim answers nothing", |l| {
                l.answer_of(&C1).greeting = Reply::Silent
            }),
            ("it is just being created", |l| {
                l.told(&C1, Phase::Created);
                l.init_started(&C1, NEW);
            }),
            ("it was just created and its shim was not asked", |l| {
                l.answer_of(&C1).states.clear();
                l.init_started(&C1, NEW);
            }),
        ],
    );
    let mut look = healthy();
    look.unlisted(&C1);
    look.init_started(&C1, NEW);
    assert_eq!(
        codes(&look),
        [Code::TaskUnknownToContainerd],
        "what was started was listed"
    );
    look.told(&C1, Phase::Created);
    look.init_started(&C1, YOUNG);
    assert_eq!(
        codes(&look),
        [Code::TaskUnknownToContainerd],
        "it is created for too long"
    );
}

#[test]
fn an_exit_that_containerd_does_not_take_is_stuck() {
    fn ended(look: &mut Look) {
        look.end_init(&C1);
        look.told(&C1, Phase::Stopped);
    }
    finds(
        Code::StuckTask,
        ended,
        &[
            ("containerd took it", |l| l.listed(&C1, Phase::Stopped)),
            ("containerd is down", down),
            ("containerd cannot be asked", unsure),
            ("containerd does not list it", unlisted),
            ("nobody can see processes", blind),
            ("the shim is foreign", foreign),
            ("the shim was not asked", |l| {
                l.answer_of(&C1).states.clear()
            }),
        ],
    );
    let mut look = healthy();
    ended(&mut look);
    assert_eq!(only(&look).hold, Hold::Twice);
}

#[test]
fn an_exit_that_the_shim_does_not_see_is_stuck_when_it_stays_so() {
    finds(
        Code::StuckTask,
        end_init,
        &[
            ("containerd lists it as created", |l| {
                l.listed(&C1, Phase::Created)
            }),
            ("nobody can see processes", blind),
            ("the shim is foreign", foreign),
            ("the init lives", |l| {
                l.table()
                    .insert(C1.init, stat(process(C1.init, OLD), C1.shim));
            }),
        ],
    );
    let mut look = healthy();
    look.end_init(&C1);
    assert_eq!(only(&look).hold, Hold::Settle);
    // A zombie is an exit that its parent does not take.
    let mut look = healthy();
    look.table().get_mut(&C1.init).unwrap().state = 'Z';
    assert_eq!(codes(&look), [Code::StuckTask]);
}

#[test]
fn what_stays_in_the_cgroup_of_a_stopped_task_is_told_by_pid() {
    fn left(look: &mut Look) {
        let processes = look.cgroup_of(&C1).processes.clone();
        look.end_init(&C1);
        look.cgroup_of(&C1).processes = processes;
        look.told(&C1, Phase::Stopped);
        look.listed(&C1, Phase::Stopped);
    }
    finds(
        Code::StuckTask,
        left,
        &[
            ("nothing is in it", |l| {
                l.cgroup_of(&C1).processes = Seen::Present(Vec::new())
            }),
            ("it cannot be read", |l| {
                l.cgroup_of(&C1).processes = unknown()
            }),
            ("it is gone", |l| l.cgroups.clear()),
            ("nobody can see processes", blind),
        ],
    );
    let mut look = healthy();
    left(&mut look);
    assert!(facts(&only(&look)).contains("still holds 1 processes: 7"));
}

#[test]
fn a_task_created_and_never_started_is_stuck_after_ten_minutes() {
    fn created(look: &mut Look) {
        look.told(&C1, Phase::Created);
        look.listed(&C1, Phase::Created);
    }
    finds(
        Code::StuckTask,
        created,
        &[
            ("it is younger", |l| l.init_started(&C1, 599)),
            ("its age is unknown", blind),
            ("the shim is foreign", foreign),
        ],
    );
    let mut look = healthy();
    created(&mut look);
    look.init_started(&C1, 600);
    assert_eq!(only(&look).hold, Hold::Once);
}

#[test]
fn a_paused_task_whose_exit_waits_is_stuck() {
    fn paused(look: &mut Look) {
        look.end_init(&C1);
        look.told(&C1, Phase::Paused);
        look.listed(&C1, Phase::Paused);
    }
    finds(
        Code::StuckTask,
        paused,
        &[
            ("it lives", |l| {
                l.table()
                    .insert(C1.init, stat(process(C1.init, OLD), C1.shim));
            }),
            ("nobody can see processes", blind),
        ],
    );
}

#[test]
fn an_exit_while_containerd_is_down_is_unreported() {
    fn exited(look: &mut Look) {
        look.end_init(&C1);
        look.told(&C1, Phase::Stopped);
        look.instances[0].api = Api::Down;
    }
    finds(
        Code::ExitUnreported,
        exited,
        &[
            ("whether containerd is down is unknown", unsure),
            ("the shim says that it runs", |l| {
                l.told(&C1, Phase::Running)
            }),
            ("whether it ended is unknown", blind),
            ("the shim is foreign", foreign),
            ("the shim is ours and keeps it", |l| {
                l.shim_of(&C1).name = "containerd-shim-recoverd-v1".into();
            }),
            ("the shim does not answer", |l| {
                l.answer_of(&C1).states.clear()
            }),
        ],
    );
    let mut look = healthy();
    exited(&mut look);
    let Answer { states, .. } = look.answer_of(&C1);
    let state = TaskState {
        exited_at: Some(0),
        ..fixture::state(&C1, Phase::Stopped)
    };
    states.insert(C1.id.into(), Reply::Said(state));
    let shown = facts(&only(&look));
    assert!(
        shown.contains("exited with 42 at 1970-01-01T00:00:00"),
        "{shown}"
    );
}

#[test]
fn an_orphan_is_told_the_command_that_adopts_it_and_one_without_bundle_that_there_is_none() {
    let mut look = healthy();
    look.end_shim(&C1);
    let action = only(&look).finding.action;
    assert!(action.starts_with("recoverd adopt default/c1,"), "{action}");
    look.remove_bundle(&C1);
    let found = judge(&look);
    let orphan = found.iter().find(|s| s.finding.code == Code::OrphanedTask);
    let action = &orphan.unwrap().finding.action;
    assert!(!action.contains("recoverd"), "{action}");
}
