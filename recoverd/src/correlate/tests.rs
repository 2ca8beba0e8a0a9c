use recoverd_common::bundle::Bootstrap;

use super::*;
use crate::facts::fixture::{self, C1, OLD, SOCKET, SOCKET_DIR, Task, healthy, process, stat};

type Break = fn(&mut Look);
type IsSo = fn(&Init) -> bool;

/// Two containers of one pod: the sandbox and one that its shim serves too.
const SANDBOX: Task = Task {
    instance: 0,
    id: "pod",
    group: "pod",
    shim: 20,
    init: 21,
};
const APP: Task = Task {
    id: "app",
    group: "pod",
    init: 22,
    ..SANDBOX
};

fn join(look: &Look) -> Cases<'_> {
    correlate(look, Path::new(SOCKET_DIR))
}

fn broken(change: Break) -> Look {
    let mut look = healthy();
    change(&mut look);
    look
}

/// The only case of a look.
fn only<'c, 'a>(cases: &'c Cases<'a>) -> &'c Case<'a> {
    assert_eq!(cases.cases.len(), 1, "{cases:#?}");
    &cases.cases[0]
}

fn unknown<T>() -> Seen<T> {
    Seen::Unknown("permission denied".into())
}

#[test]
fn a_healthy_task_has_all_its_facts_in_one_case() {
    let look = healthy();
    let cases = join(&look);
    let case = only(&cases);
    assert_eq!(case.name, C1.name());
    assert_eq!(case.instance, Some(0));
    assert!(case.bundle.is_some() && case.runc.is_some() && case.cgroup.is_some());
    assert_eq!(case.init, Init::Alive(process(C1.init, OLD)));
    assert_eq!(case.address.as_deref(), Some(SOCKET));
    assert_eq!(case.written, case.address);
    assert_eq!(case.shim.process().unwrap().id.pid, C1.shim);
    assert_eq!(case.state().unwrap().phase, Phase::Running);
    assert_eq!(case.phase(), Phase::Running);
    assert_eq!(case.kind(), Some(Kind::Stock));
    assert_eq!(case.pod, None);
    assert!(matches!(case.containerd, Known::Yes(task) if task.phase == Phase::Running));
    assert!(cases.idle_shims.is_empty());
}

#[test]
fn an_init_is_alive_dead_or_unknown_by_what_proves_it() {
    let alive: IsSo = |init| matches!(init, Init::Alive(id) if id.pid == C1.init);
    let dead: IsSo = |init| matches!(init, Init::Dead(..));
    let unknown_: IsSo = |init| matches!(init, Init::Unknown(_));
    let none: IsSo = |init| *init == Init::None;
    let table: &[(&str, Break, IsSo)] = &[
        ("runc names it and it runs", |_| {}, alive),
        ("it is no more", |l| l.end_init(&C1), dead),
        (
            "it is a zombie",
            |l| l.table().get_mut(&C1.init).unwrap().state = 'Z',
            dead,
        ),
        (
            "its pid belongs to a later process",
            |l| {
                l.table().insert(C1.init, stat(process(C1.init, 1), 1));
            },
            dead,
        ),
        (
            "the process table is hidden",
            |l| l.processes = unknown(),
            unknown_,
        ),
        (
            "there is no process table",
            |l| l.processes = Seen::Absent,
            unknown_,
        ),
        (
            "runc has created none yet, and no pid file is there",
            |l| {
                l.uncreated(&C1);
                l.bundle_of(&C1).init_pid = Seen::Absent;
            },
            none,
        ),
        (
            "runc has created none yet, and the pid file cannot be read",
            |l| {
                l.uncreated(&C1);
                l.bundle_of(&C1).init_pid = unknown();
            },
            unknown_,
        ),
        (
            "runc's state cannot be read, and nothing else names one",
            |l| {
                l.runc_of(&C1).state = unknown();
                l.bundle_of(&C1).init_pid = Seen::Absent;
            },
            unknown_,
        ),
        (
            "runc's state cannot be read, init.pid can",
            |l| l.runc_of(&C1).state = unknown(),
            alive,
        ),
        (
            "neither can be read",
            |l| {
                l.runc_of(&C1).state = unknown();
                l.bundle_of(&C1).init_pid = unknown();
            },
            unknown_,
        ),
        (
            "init.pid names it and its cgroup proves it",
            |l| l.remove_runc(&C1),
            alive,
        ),
        (
            "init.pid alone, and nothing there",
            |l| {
                l.remove_runc(&C1);
                l.bundle_of(&C1).init_pid = Seen::Absent;
            },
            none,
        ),
        (
            "init.pid names no process",
            |l| {
                l.remove_runc(&C1);
                l.end_init(&C1);
            },
            dead,
        ),
        (
            "init.pid names a zombie",
            |l| {
                l.remove_runc(&C1);
                l.table().get_mut(&C1.init).unwrap().state = 'Z';
            },
            dead,
        ),
        (
            "init.pid names a process of another cgroup",
            |l| {
                l.remove_runc(&C1);
                let elsewhere = Seen::Present(vec!["/default/c10".into(), "/xc1.scope".into()]);
                l.memberships.insert(C1.init, elsewhere);
            },
            unknown_,
        ),
        (
            "init.pid names a process whose cgroup cannot be read",
            |l| {
                l.remove_runc(&C1);
                l.memberships.insert(C1.init, unknown());
            },
            unknown_,
        ),
        (
            "init.pid names a process whose cgroup nobody read",
            |l| {
                l.remove_runc(&C1);
                l.memberships.clear();
            },
            unknown_,
        ),
        (
            "init.pid names a process below the task's systemd scope",
            |l| {
                l.remove_runc(&C1);
                let scope = "/system.slice/cri-containerd-c1.scope/init".to_owned();
                l.memberships.insert(C1.init, Seen::Present(vec![scope]));
            },
            alive,
        ),
        (
            "init.pid is older than the process that has the pid now",
            |l| {
                l.remove_runc(&C1);
                l.table()
                    .insert(C1.init, stat(process(C1.init, OLD - 10), 1));
            },
            dead,
        ),
        (
            "init.pid and the process are a rounding apart",
            |l| {
                l.remove_runc(&C1);
                l.table()
                    .insert(C1.init, stat(process(C1.init, OLD - 2), 1));
            },
            alive,
        ),
        (
            "init.pid is much younger than the process",
            |l| {
                l.remove_runc(&C1);
                l.table()
                    .insert(C1.init, stat(process(C1.init, OLD + 3000), 1));
            },
            unknown_,
        ),
    ];
    for (what, change, expected) in table {
        let look = broken(*change);
        let cases = join(&look);
        let init = &only(&cases).init;
        assert!(expected(init), "{what}: {init:?}");
    }
}

#[test]
fn a_shim_is_found_by_every_word_that_ties_it_to_the_task() {
    /// The shim listens nowhere that is seen, and its command line names another task.
    fn hide(look: &mut Look) {
        look.listeners_mut().clear();
        let shim = look.shim_of(&C1);
        shim.listens.clear();
        shim.task = "first".into();
        look.answers.clear();
        look.table().get_mut(&C1.init).unwrap().ppid = 1;
    }
    let table: &[(&str, Break)] = &[
        ("by its socket", |l| {
            hide(l);
            l.shim_of(&C1).listens = vec![SOCKET.into()];
        }),
        ("by its name", |l| {
            hide(l);
            l.shim_of(&C1).task = "c1".into();
        }),
        ("by another spelling of its containerd's address", |l| {
            hide(l);
            l.instances[0].aliases = vec!["/var/run/containerd/containerd.sock".into()];
            l.shim_of(&C1).address = "/var/run/containerd/containerd.sock".into();
            l.shim_of(&C1).task = "c1".into();
        }),
        ("by its working folder", |l| {
            hide(l);
            l.shim_of(&C1).cwd = Seen::Present((C1.bundle(), false));
        }),
        ("by its child", |l| {
            hide(l);
            l.table().get_mut(&C1.init).unwrap().ppid = C1.shim;
        }),
    ];
    for (what, change) in table {
        let look = broken(*change);
        let cases = join(&look);
        let found = only(&cases).shim.process().map(|shim| shim.id.pid);
        assert_eq!(found, Some(C1.shim), "{what}");
        assert!(cases.idle_shims.is_empty(), "{what}");
    }
    let near: &[(&str, Break)] = &[
        ("nothing ties it", |_| {}),
        ("the same name in another namespace", |l| {
            l.shim_of(&C1).task = "c1".into();
            l.shim_of(&C1).namespace = "other".into();
        }),
        ("the same name at another containerd", |l| {
            l.shim_of(&C1).task = "c1".into();
            l.shim_of(&C1).address = "/run/other/containerd.sock".into();
        }),
        ("its child is a later process with the init's pid", |l| {
            l.table()
                .insert(C1.init, stat(process(C1.init, 1), C1.shim));
        }),
    ];
    for (what, change) in near {
        let mut look = broken(hide);
        change(&mut look);
        let cases = join(&look);
        assert!(matches!(only(&cases).shim, ShimOf::None), "{what}");
        assert_eq!(cases.idle_shims.len(), 1, "{what}");
    }
}

#[test]
fn without_a_shim_process_the_socket_says_who_is_there() {
    let mut look = healthy();
    look.end_shim(&C1);
    assert!(matches!(only(&join(&look)).shim, ShimOf::None));

    look.listeners_mut().insert(SOCKET.into(), vec![99]);
    assert!(matches!(&only(&join(&look)).shim, ShimOf::Stranger(pids) if *pids == [99]));

    // A supervisor keeps it for the next shim.
    look.supervisors = vec![99];
    assert!(matches!(only(&join(&look)).shim, ShimOf::None));
    look.listeners_mut().insert(SOCKET.into(), vec![98, 99]);
    assert!(matches!(&only(&join(&look)).shim, ShimOf::Stranger(pids) if *pids == [98]));

    // The listener is not in the table, but it answers.
    look.listeners_mut().clear();
    *look.answer_of(&C1) = fixture::answer(&C1, Phase::Running);
    assert!(matches!(&only(&join(&look)).shim, ShimOf::Stranger(pids) if *pids == [C1.shim]));

    look.listeners = unknown();
    assert!(matches!(only(&join(&look)).shim, ShimOf::Unknown(_)));
}

#[test]
fn the_containers_of_a_pod_share_the_shim_of_their_sandbox() {
    let mut look = fixture::empty();
    look.add(&SANDBOX);
    look.add(&APP);
    // What containerd 2.x leaves: no container of the pod but the first has the address.
    let bundle = look.bundle_of(&APP);
    (bundle.address, bundle.bootstrap) = (Seen::Absent, Seen::Absent);
    let cases = join(&look);
    let [app, sandbox] = cases.cases.as_slice() else {
        panic!("{cases:#?}")
    };
    assert_eq!(app.address, sandbox.address);
    assert_eq!(app.written, None);
    for case in [app, sandbox] {
        assert_eq!(case.shim.process().unwrap().id.pid, SANDBOX.shim);
        assert_eq!(case.state().unwrap().phase, Phase::Running);
    }
    let names = Pod {
        namespace: "prod".into(),
        name: "web-0".into(),
        container: "app".into(),
        uid: String::new(),
    };
    assert_eq!((&app.pod, &sandbox.pod), (&Some(names), &None));
    assert!(cases.idle_shims.is_empty());

    // With its bundle's specification gone, runc's copy of the annotations says it.
    look.bundle_of(&APP).config = Seen::Absent;
    assert_eq!(join(&look).cases[0].address, Some(SANDBOX.socket()));
    // And without runc, containerd's record.
    look.remove_runc(&APP);
    look.api(0).containers.get_mut(&APP.name()).unwrap().group = Some("pod".into());
    assert_eq!(join(&look).cases[0].address, Some(SANDBOX.socket()));
    look.api(0).containers.clear();
    let alone = Task {
        group: "app",
        ..APP
    };
    assert_eq!(join(&look).cases[0].address, Some(alone.socket()));
}

#[test]
fn two_containerds_with_a_task_of_one_name_have_a_case_each() {
    const OTHER: Task = Task {
        instance: 1,
        shim: 16,
        init: 17,
        ..C1
    };
    let mut look = healthy();
    look.add(&OTHER);
    let check = |look: &Look| {
        let cases = join(look);
        assert_eq!(cases.cases.len(), 2, "{cases:#?}");
        for (case, task) in cases.cases.iter().zip([C1, OTHER]) {
            assert_eq!(case.instance, Some(task.instance));
            assert_eq!(case.shim.process().unwrap().id.pid, task.shim);
            assert_eq!(case.init.alive().unwrap().pid, task.init);
            assert_eq!(case.bundle.unwrap().path, task.bundle());
            assert!(matches!(case.containerd, Known::Yes(_)));
        }
        assert!(cases.idle_shims.is_empty());
    };
    check(&look);
    // One of them forgets: it is unknown to that one only.
    look.unlisted(&OTHER);
    let cases = join(&look);
    assert!(matches!(cases.cases[0].containerd, Known::Yes(_)));
    assert_eq!(cases.cases[1].containerd, Known::No);
}

#[test]
fn a_containerd_that_does_not_answer_knows_nothing_and_denies_nothing() {
    let table: &[(&str, Break)] = &[
        ("down", |l| l.instances[0].api = crate::facts::Api::Down),
        ("not asked", |l| {
            l.instances[0].api = crate::facts::Api::Unknown("slow".into())
        }),
        ("no list in time", |l| l.api(0).tasks = None),
    ];
    for (what, change) in table {
        let look = broken(*change);
        assert_eq!(only(&join(&look)).containerd, Known::CannotSay, "{what}");
    }
    assert_eq!(
        only(&join(&broken(|l| l.unlisted(&C1)))).containerd,
        Known::No
    );
}

#[test]
fn the_bundle_says_where_containerd_will_look() {
    const ELSEWHERE: &str = "/run/containerd/s/elsewhere";
    let json = |address: &str| format!(r#"{{"version":2,"address":"{address}","protocol":"x"}}"#);
    let written = |look: &Look| only(&join(look)).written.clone();
    let mut look = healthy();
    let bundle = look.bundle_of(&C1);
    bundle.address = Seen::Present(format!("unix://{ELSEWHERE}"));
    assert_eq!(
        written(&look).as_deref(),
        Some(SOCKET),
        "bootstrap.json comes first"
    );
    // The shim listens on its own: that is where it can be asked.
    look.bundle_of(&C1).bootstrap = Seen::Absent;
    assert_eq!(written(&look).as_deref(), Some(ELSEWHERE));
    let cases = join(&look);
    assert_eq!(only(&cases).address.as_deref(), Some(SOCKET));
    assert!(only(&cases).shim.process().is_some());

    look.bundle_of(&C1).address = Seen::Present(json("unix:///x"));
    assert_eq!(
        written(&look).as_deref(),
        Some("/x"),
        "1.7 reads JSON in address too"
    );
    look.bundle_of(&C1).address = Seen::Present("/containerd-shim/ab.sock".into());
    assert_eq!(written(&look).as_deref(), Some("@/containerd-shim/ab.sock"));
    look.bundle_of(&C1).bootstrap = Seen::Present(Bootstrap {
        version: 2,
        address: String::new(),
        protocol: String::new(),
    });
    look.bundle_of(&C1).address = Seen::Absent;
    assert_eq!(written(&look), None);
    assert_eq!(only(&join(&look)).address.as_deref(), Some(SOCKET));
}

#[test]
fn a_task_that_only_one_word_names_is_a_case() {
    let runc_only = broken(|l| {
        let entry = l.runc_of(&C1).clone();
        l.remove(&C1);
        l.runc.push(entry);
    });
    let cases = join(&runc_only);
    assert_eq!(
        only(&cases).instance,
        Some(0),
        "its bundle's path says whose it is"
    );
    assert!(only(&cases).bundle.is_none());

    let nobodys = broken(|l| {
        let mut entry = l.runc_of(&C1).clone();
        l.remove(&C1);
        entry.state = unknown();
        l.runc.push(entry);
    });
    assert_eq!(only(&join(&nobodys)).instance, None);

    let listed_only = broken(|l| {
        l.remove(&C1);
        l.listed(&C1, Phase::Stopped);
    });
    let cases = join(&listed_only);
    assert!(matches!(only(&cases).containerd, Known::Yes(_)));
    assert_eq!(only(&cases).phase(), Phase::Unknown);
}

#[test]
fn runcs_unreadable_state_joins_the_one_task_of_its_name() {
    let look = broken(|l| l.runc_of(&C1).state = unknown());
    assert!(only(&join(&look)).runc.is_some());
}

#[test]
fn a_runc_container_belongs_to_the_containerd_that_its_shim_names() {
    // A stale bundle of the first containerd, and a living task of the same name of another one
    // whose state folder nobody knows.
    const OTHER: Task = Task {
        instance: 1,
        shim: 16,
        init: 17,
        ..C1
    };
    let mut look = healthy();
    look.end_init(&C1);
    look.end_shim(&C1);
    look.unlisted(&C1);
    look.remove_runc(&C1);
    look.add(&OTHER);
    look.remove_bundle(&OTHER);
    look.instances[1].state = None;
    let cases = join(&look);
    let [stale, living] = cases.cases.as_slice() else {
        panic!("{cases:#?}")
    };
    assert_eq!((stale.instance, stale.runc.is_some()), (Some(0), false));
    assert!(matches!(stale.init, Init::Dead(..)) && stale.shim.process().is_none());
    assert_eq!(living.instance, Some(1));
    assert_eq!(living.init.alive().unwrap().pid, OTHER.init);
    assert!(matches!(living.containerd, Known::Yes(_)));
}

#[test]
fn a_shim_that_serves_nothing_is_idle_and_one_of_another_runtime_is_a_case() {
    let mut look = healthy();
    let shim = look.shim_of(&C1).clone();
    look.remove(&C1);
    look.shims.push(shim);
    let cases = join(&look);
    assert!(cases.cases.is_empty());
    assert_eq!(cases.idle_shims.len(), 1);

    look.shims[0].name = "containerd-shim-kata-v2".into();
    let cases = join(&look);
    assert_eq!(only(&cases).kind(), Some(Kind::Foreign));
    assert!(cases.idle_shims.is_empty());
}

#[test]
fn a_shim_of_any_other_name_is_a_runc_shim_when_runc_or_the_bundle_shows_its_task() {
    use recoverd_common::bundle::Options;
    let mut look = healthy();
    look.shim_of(&C1).name = "my-shim".into();
    assert_eq!(only(&join(&look)).kind(), Some(Kind::Stock));
    look.remove_runc(&C1);
    assert_eq!(only(&join(&look)).kind(), Some(Kind::Foreign));
    look.bundle_of(&C1).options = Seen::Present(Options::default());
    assert_eq!(only(&join(&look)).kind(), Some(Kind::Stock));
    for (name, expected) in [
        ("containerd-shim-recoverd-v1", Kind::Ours),
        ("containerd-shim-runc-v1", Kind::Stock),
        ("containerd-shim-runc-v2", Kind::Stock),
        ("containerd-shim-runsc-v1", Kind::Foreign),
        ("containerd-shim-runc-v2-tdx", Kind::Foreign),
    ] {
        look.shim_of(&C1).name = name.into();
        assert_eq!(only(&join(&look)).kind(), Some(expected), "{name}");
    }
}

#[test]
fn the_kernel_says_how_far_a_task_is_when_its_shim_does_not() {
    let mut look = healthy();
    look.answers.clear();
    assert_eq!(only(&join(&look)).phase(), Phase::Running);
    look.end_init(&C1);
    assert_eq!(only(&join(&look)).phase(), Phase::Stopped);
}

#[test]
fn cases_are_sorted_by_name() {
    let mut look = fixture::empty();
    look.add(&SANDBOX);
    look.add(&C1);
    look.add(&APP);
    look.bundles.reverse();
    let cases = join(&look);
    let ids: Vec<&str> = cases
        .cases
        .iter()
        .map(|case| case.name.1.as_str())
        .collect();
    assert_eq!(ids, ["app", "c1", "pod"]);
}
