//! What each finding leads to, and what holds of every plan whatever is wrong with the node.

use std::{collections::BTreeMap, path::Path};

use proptest::prelude::*;

use super::*;
use crate::{
    adopt::{clues::Clues, decide, orders},
    classify::{
        self,
        tests::{SETTINGS, random::broken},
    },
    correlate::correlate,
    facts::{
        Connection, FifoFolder, Phase, RecordFile, Reply,
        fixture::{C1, OLD, SOCKET, SOCKET_DIR, Task, ago, healthy, mount, process},
    },
};

/// Every path is there, each as another file; nobody is connected to anybody.
fn grounds(look: &Look) -> Grounds {
    let mut paths: Vec<PathBuf> = Vec::new();
    paths.extend(look.bundles.iter().map(|facts| facts.bundle.path.clone()));
    paths.extend(look.runc.iter().map(|entry| entry.path.clone()));
    paths.extend(look.sockets.iter().map(|file| file.path.clone()));
    paths.extend(look.records.iter().map(|file| file.path.clone()));
    paths.extend(look.fifos.iter().map(|folder| folder.path.clone()));
    let files = (1..).zip(paths).map(|(ino, path)| {
        let file = FileId { dev: 1, ino };
        (path, Seen::Present(file))
    });
    let shims = || look.shims.iter().map(|shim| shim.id.pid);
    Grounds {
        files: files.collect(),
        unsent: BTreeMap::new(),
        connected: shims().map(|pid| (pid, Seen::Present(0))).collect(),
        ttrpc: shims().map(|pid| (pid, "/run/c.ttrpc".into())).collect(),
    }
}

fn policy() -> Policy {
    Policy {
        min_age: SETTINGS.min_age,
        max_actions: 1000,
        allowed: [Word::Kill, Word::Delete].into(),
        only: Only::default(),
    }
}

fn planned_on(look: &Look, grounds: &Grounds, policy: &Policy) -> Plan {
    planned_after(look, grounds, policy, &[])
}

fn planned_after(look: &Look, grounds: &Grounds, policy: &Policy, tried: &[&Act]) -> Plan {
    let cases = correlate(look, Path::new(SOCKET_DIR));
    let found = classify::classify(look, &cases, &SETTINGS);
    let unresponsive = look.shims.iter().map(|shim| shim.id).collect();
    let wish = decide::Wish {
        address: None,
        namespace: None,
        only: None,
        unresponsive: &unresponsive,
        unheard: None,
        unit: None,
    };
    let selection = decide::select(look, &cases, &wish);
    let adoption = orders::orders(look, selection, &Clues::default());
    let input = Input {
        look,
        cases: &cases,
        findings: found.iter().collect(),
        adoption: &adoption,
        grounds,
        told: &BTreeSet::new(),
        tried,
    };
    plan(&input, policy)
}

fn planned(look: &Look) -> Plan {
    planned_on(look, &grounds(look), &policy())
}

/// The only step of a plan.
#[track_caller]
fn only_step(look: &Look) -> Step {
    let mut plan = planned(look);
    assert_eq!(plan.steps.len(), 1, "{plan:#?}");
    plan.steps.remove(0)
}

/// No step, and a line that says so.
#[track_caller]
fn refused(look: &Look, words: &str) {
    let plan = planned(look);
    assert_eq!(plan.steps, [], "{plan:#?}");
    let said = plan.by_hand.iter().any(|line| line.why.contains(words));
    assert!(said, "{words}: {plan:#?}");
}

fn down(look: &mut Look) {
    look.instances[0].api = Api::Down;
    look.instances[0].daemon = None;
}

fn dead() -> Look {
    let mut look = healthy();
    look.end_init(&C1);
    look.end_shim(&C1);
    look.unlisted(&C1);
    look.sockets.clear();
    look.cgroups.clear();
    look
}

fn leaked_shim() -> Look {
    let mut look = healthy();
    look.end_init(&C1);
    look.told(&C1, Phase::Stopped);
    look.unlisted(&C1);
    look
}

#[test]
fn a_healthy_node_has_no_plan() {
    assert_eq!(planned(&healthy()), Plan::default());
}

#[test]
fn a_dead_bundle_is_removed_with_all_that_belongs_to_it_and_needs_a_word() {
    let mut look = dead();
    let root = C1.bundle().join("rootfs");
    look.mounts = Seen::Present(vec![mount("/", "ext4"), mount(root.clone(), "overlay")]);
    let step = only_step(&look);
    assert_eq!(step.code, Code::StaleBundle);
    assert_eq!(step.destroys, Some(Word::Delete));
    let Act::RemoveBundle {
        path, mounts, runc, ..
    } = &step.does
    else {
        panic!("{step:#?}")
    };
    assert_eq!(*path, C1.bundle());
    assert_eq!(*mounts, [(root, 1)]);
    assert!(runc.is_some());
    let address = look.instances[0].address.clone();
    for wanted in [
        Requirement::Unlisted(address.clone(), C1.name()),
        Requirement::NoShim(C1.name(), address),
        Requirement::NobodyListens(SOCKET.into()),
    ] {
        assert!(step.requires.contains(&wanted), "{step:#?}");
    }
}

#[test]
fn a_bundle_that_could_be_needed_stays() {
    let mut look = dead();
    look.bundle_of(&C1).changed_at = ago(60);
    refused(&look, "younger");
    let mut look = dead();
    look.bundle_of(&C1).config = Seen::Unknown("is a symlink".into());
    refused(&look, "is a symlink");
    let mut look = dead();
    look.mounts = Seen::Unknown("permission denied".into());
    refused(&look, "mounts");
    let mut look = dead();
    look.instances[0].api = Api::Unknown("timed out".into());
    refused(&look, "unknown");
    let mut look = dead();
    look.instances[0].api = Api::Down;
    refused(&look, "unknown");
    look.instances[0].daemon = None;
    assert!(
        only_step(&look)
            .requires
            .contains(&Requirement::Down(look.instances[0].address.clone()))
    );
    let mut look = dead();
    look.bundle_of(&C1).shim_binary = Seen::Present("/opt/containerd-shim-kata-v2".into());
    refused(&look, "foreign");
}

#[test]
fn a_leaked_shim_is_ended_unless_somebody_is_connected_to_it() {
    let look = leaked_shim();
    let step = only_step(&look);
    assert_eq!(step.does, Act::EndShim(process(C1.shim, OLD)));
    assert_eq!(step.destroys, Some(Word::Kill));
    assert!(
        step.requires
            .contains(&Requirement::NobodyConnected(SOCKET.into()))
    );
    for (connected, words) in [
        (Seen::Present(1), "connections to it are open"),
        (Seen::Unknown("x".into()), "unknown"),
    ] {
        let mut grounds = grounds(&look);
        grounds.connected.insert(C1.shim, connected);
        let plan = planned_on(&look, &grounds, &policy());
        assert_eq!(plan.steps, []);
        assert!(plan.by_hand[0].why.contains(words), "{plan:#?}");
    }
}

#[test]
fn a_task_that_containerd_does_not_know_has_its_init_ended() {
    let mut look = healthy();
    look.unlisted(&C1);
    let step = only_step(&look);
    assert_eq!(step.does, Act::EndInit(process(C1.init, OLD)));
    assert_eq!(step.destroys, Some(Word::Kill));
}

#[test]
fn an_orphan_is_adopted_without_a_word_and_a_hung_shim_replaced_only_with_containerd_down() {
    let mut look = healthy();
    look.end_shim(&C1);
    down(&mut look);
    let step = only_step(&look);
    assert!(matches!(&step.does, Act::Adopt(order) if order.adoption.predecessor.is_none()));
    assert_eq!(step.destroys, None);
    assert!(
        step.requires
            .contains(&Requirement::Lives(process(C1.init, OLD)))
    );

    let mut look = healthy();
    look.answer_of(&C1).greeting = Reply::Silent;
    look.answer_of(&C1).states.clear();
    look.shim_of(&C1).state = 'T';
    refused(&look, "its containerd runs");
    look.instances[0].api = Api::Down;
    refused(&look, "its containerd runs");
    down(&mut look);
    let step = only_step(&look);
    assert_eq!(step.does.ends(), [process(C1.shim, OLD)]);
    assert_eq!(step.destroys, Some(Word::Kill));
}

#[test]
fn a_shim_that_is_foreign_by_one_of_its_tasks_is_not_ended_for_another() {
    const APP: Task = Task {
        instance: 0,
        id: "app",
        group: "c1",
        shim: 6,
        init: 8,
    };
    let pod = || {
        let mut look = healthy();
        look.add(&APP);
        look.shim_of(&C1).name = "my-shim".into();
        // Its name says nothing, and runc knows nothing of this one.
        look.remove_runc(&C1);
        look
    };
    let mut hung = pod();
    hung.answer_of(&C1).greeting = Reply::Silent;
    hung.answer_of(&C1).states.clear();
    hung.shim_of(&C1).state = 'T';
    down(&mut hung);
    let mut leaked = pod();
    for task in [&C1, &APP] {
        leaked.end_init(task);
        leaked.unlisted(task);
    }
    for look in [hung, leaked] {
        let cases = correlate(&look, Path::new(SOCKET_DIR));
        let kinds: Vec<_> = cases.cases.iter().map(|case| case.kind()).collect();
        for kind in [Kind::Stock, Kind::Foreign] {
            assert!(kinds.contains(&Some(kind)), "{kinds:?}");
        }
        let plan = planned(&look);
        let ended = plan.steps.iter().flat_map(|step| step.does.ends());
        assert_eq!(ended.collect::<Vec<_>>(), [], "{plan:#?}");
    }
}

#[test]
fn an_exit_is_published_only_if_somebody_observed_it() {
    let mut look = healthy();
    look.end_init(&C1);
    look.told(&C1, Phase::Stopped);
    let step = only_step(&look);
    let Act::Publish(exited) = &step.does else {
        panic!("{step:#?}")
    };
    assert_eq!(exited.init, process(C1.init, OLD));
    look.told(&C1, Phase::Running);
    refused(&look, "nobody observed");
    look.shim_of(&C1).name = "containerd-shim-recoverd-v1".into();
    refused(&look, "our shim");
}

#[test]
fn a_wait_status_is_counted_as_containerd_counts_it() {
    assert_eq!(tasks::status_of(42 << 8), 42);
    assert_eq!(tasks::status_of(9), 137);
    assert_eq!(tasks::status_of(0), 0);
}

#[test]
fn leftovers_without_an_owner_are_for_people() {
    let mut look = healthy();
    look.remove(&C1);
    let mut file = healthy().sockets.remove(0);
    file.changed_at = Some(ago(OLD));
    look.sockets.push(file);
    look.api(0).containers.clear();
    refused(&look, "by hand");
}

#[test]
fn a_records_events_that_nobody_has_had_keep_it() {
    let mut look = healthy();
    look.remove(&C1);
    look.records.push(RecordFile {
        path: format!("{SOCKET}.record").into(),
        socket: SOCKET.into(),
        record: Seen::Unknown("is cut".into()),
    });
    let step = only_step(&look);
    assert!(matches!(step.does, Act::Quarantine { .. }));
    assert_eq!(step.destroys, None);
    look.listeners_mut().insert(SOCKET.into(), vec![C1.shim]);
    refused(&look, "its shim lives");
}

#[test]
fn only_and_the_limit_narrow_a_plan() {
    let look = dead();
    let mut narrowed = policy();
    narrowed.only.codes.insert(Code::LeakedShim);
    assert_eq!(
        planned_on(&look, &grounds(&look), &narrowed),
        Plan::default()
    );
    let mut other = policy();
    other.only.tasks.insert(("default".into(), "other".into()));
    assert_eq!(planned_on(&look, &grounds(&look), &other), Plan::default());
    let mut none = policy();
    none.max_actions = 0;
    let plan = planned_on(&look, &grounds(&look), &none);
    assert_eq!((plan.steps.len(), plan.left_out), (0, 1));
}

#[test]
fn what_may_not_be_done_or_was_tried_takes_nobodys_place() {
    // A bundle, which needs a word and comes first, and two folders of fifos, which need none.
    let mut look = dead();
    for number in 1..=2 {
        look.fifos.push(FifoFolder {
            path: format!("/run/containerd/fifo/{number}").into(),
            ids: ["gone".to_owned()].into(),
            instance: None,
            changed_at: Some(ago(OLD)),
            users: Seen::Present(Vec::new()),
        });
    }
    let mut narrow = policy();
    narrow.max_actions = 1;
    let codes = |plan: &Plan| -> Vec<Code> { plan.steps.iter().map(|step| step.code).collect() };
    let plan = planned_on(&look, &grounds(&look), &narrow);
    assert_eq!(
        (codes(&plan), plan.left_out),
        (vec![Code::StaleBundle], 2),
        "{plan:#?}"
    );
    narrow.allowed.clear();
    let plan = planned_on(&look, &grounds(&look), &narrow);
    let shown = vec![Code::StaleBundle, Code::LeakedFifo];
    assert_eq!((codes(&plan), plan.left_out), (shown, 1), "{plan:#?}");
    // The next round of the run, after the first fifos could not be removed.
    let tried: Vec<&Act> = plan.steps.iter().map(|step| &step.does).collect();
    let next = planned_after(&look, &grounds(&look), &narrow, &tried);
    assert_eq!(
        (codes(&next), next.left_out),
        (vec![Code::LeakedFifo], 0),
        "{next:#?}"
    );
    assert!(!tried.contains(&&next.steps[0].does));
}

#[test]
fn runtimes_are_told_by_name_and_by_path() {
    for runtime in [
        "",
        "io.containerd.runc.v2",
        "io.containerd.recoverd.v1",
        "/opt/my-shim",
    ] {
        assert!(!foreign_runtime(runtime), "{runtime}");
    }
    for runtime in [
        "io.containerd.kata.v2",
        "wasm",
        "/x/containerd-shim-kata-v2",
    ] {
        assert!(foreign_runtime(runtime), "{runtime}");
    }
}

/// What a step does to the node, on plain data.
fn done(look: &mut Look, step: &Step) {
    let end = |look: &mut Look, id: ProcessId| {
        if let Seen::Present(table) = &mut look.processes
            && table.get(&id.pid).is_some_and(|stat| stat.id == id)
        {
            table.remove(&id.pid);
        }
        look.shims.retain(|shim| shim.id != id);
        if let Seen::Present(listeners) = &mut look.listeners {
            listeners.retain(|_, pids| {
                pids.retain(|pid| *pid != id.pid);
                !pids.is_empty()
            });
        }
        for cgroup in &mut look.cgroups {
            if let Seen::Present(processes) = &mut cgroup.processes {
                processes.retain(|process| process.id != id);
            }
        }
    };
    match &step.does {
        // What a successor does is the shim's; here it only ends.
        Act::Adopt(_) | Act::Publish(_) => {}
        Act::Replace(_, id) | Act::EndShim(id) | Act::EndInit(id) => {
            end(look, *id);
            // Nobody answers for a shim that is gone.
            let listening: Vec<String> = look
                .listeners
                .present()
                .map(|l| l.keys().cloned().collect())
                .unwrap_or_default();
            for (address, answer) in &mut look.answers {
                if !listening.contains(address) {
                    answer.connection = Connection::Refused;
                    answer.greeting = Reply::NotAsked;
                    answer.states.clear();
                }
            }
        }
        Act::RemoveBundle { path, runc, .. } => {
            look.bundles.retain(|facts| facts.bundle.path != *path);
            look.runc
                .retain(|entry| runc.as_ref().is_none_or(|(path, _)| entry.path != *path));
            if let Seen::Present(mounts) = &mut look.mounts {
                mounts.retain(|mount| !mount.point.starts_with(path));
            }
        }
        Act::Quarantine { path, .. } => look.records.retain(|file| file.path != *path),
        Act::RemoveSocket { path, .. } => look.sockets.retain(|file| file.path != *path),
        Act::RemoveRecord { files, .. } => look
            .records
            .retain(|file| !files.iter().any(|(path, _)| *path == file.path)),
        Act::Unmount { point, .. } => {
            if let Seen::Present(mounts) = &mut look.mounts
                && let Some(at) = mounts.iter().rposition(|mount| mount.point == *point)
            {
                mounts.remove(at);
            }
        }
        Act::RemoveCgroup(folders) => look.cgroups.retain(|c| c.folders != *folders),
        Act::RemoveFifos { folder, .. } => look.fifos.retain(|f| f.path != *folder),
        Act::RemoveRuncState { path, .. } => look.runc.retain(|entry| entry.path != *path),
    }
}

/// A step that is done by somebody else's hand, or whose finding stays by design.
fn mended(step: &Step) -> bool {
    !matches!(
        step.does,
        Act::Adopt(_) | Act::Replace(..) | Act::Publish(_)
    )
}

/// It changes or removes something at `path` or below.
fn touches(act: &Act, path: &Path) -> bool {
    let touched: Vec<&Path> = match act {
        Act::Adopt(order) | Act::Replace(order, _) => {
            let unreadable = order.unreadable.iter().map(PathBuf::as_path);
            unreadable
                .chain([order.adoption.socket.as_path()])
                .collect()
        }
        Act::Publish(_) | Act::EndShim(_) | Act::EndInit(_) => Vec::new(),
        Act::RemoveBundle {
            path, runc, mounts, ..
        } => {
            let mounts = mounts.iter().map(|(point, _)| point.as_path());
            let runc = runc.iter().map(|(path, _)| path.as_path());
            mounts.chain(runc).chain([path.as_path()]).collect()
        }
        Act::Quarantine { path, .. }
        | Act::RemoveSocket { path, .. }
        | Act::RemoveRuncState { path, .. } => vec![path],
        Act::RemoveRecord { files, .. } => files.iter().map(|(path, _)| path.as_path()).collect(),
        Act::Unmount { point, .. } => vec![point],
        Act::RemoveCgroup(folders) => folders.iter().map(PathBuf::as_path).collect(),
        Act::RemoveFifos { folder, .. } => vec![folder],
    };
    touched.iter().any(|touched| touched.starts_with(path))
}

/// It is about this task.
fn is_about(step: &Step, name: &TaskName) -> bool {
    let members = match &step.does {
        Act::Adopt(order) | Act::Replace(order, _) => &order.members[..],
        _ => &[],
    };
    step.task.as_ref() == Some(name)
        || step.subject == format!("{}/{}", name.0, name.1)
        || members.iter().any(|member| member.name == *name)
}

/// It requires that the very containerd of its task is down, and that one is.
fn own_is_down(look: &Look, step: &Step) -> bool {
    let cases = correlate(look, Path::new(SOCKET_DIR));
    let of_it = cases
        .cases
        .iter()
        .filter(|case| step.task.as_ref() == Some(&case.name));
    let mut own = of_it.filter_map(|case| look.instances.get(case.instance?));
    own.any(|instance| {
        let down = Requirement::Down(instance.address.clone());
        matches!(instance.api, Api::Down) && step.requires.contains(&down)
    })
}

proptest! {
    #[test]
    fn who_is_ended_is_named_by_pid_and_start_time_and_lives(broken in broken()) {
        let look = broken.look();
        for step in planned(&look).steps {
            for id in step.does.ends() {
                let table = look.processes.present().unwrap();
                prop_assert!(id.start_time != 0);
                prop_assert!(table.get(&id.pid).is_some_and(|stat| stat.id == id), "{step:#?}");
                prop_assert!(step.requires.contains(&Requirement::Lives(id)), "{step:#?}");
                prop_assert_eq!(step.destroys, Some(Word::Kill));
            }
        }
    }

    #[test]
    fn what_is_foreign_is_in_no_plan(broken in broken()) {
        let look = broken.look();
        let cases = correlate(&look, Path::new(SOCKET_DIR));
        let foreign: Vec<&Case<'_>> = cases
            .cases
            .iter()
            .filter(|case| case.kind() == Some(Kind::Foreign))
            .collect();
        for step in planned(&look).steps {
            for case in &foreign {
                // One of the same name may be in another containerd.
                let namesakes = cases.cases.iter().filter(|other| other.name == case.name);
                prop_assert!(!is_about(&step, &case.name) || namesakes.count() > 1, "{step:#?}");
                let pids = [case.shim.process().map(|shim| shim.id), case.init.alive()];
                prop_assert!(!step.does.ends().iter().any(|id| pids.contains(&Some(*id))), "{step:#?}");
                let paths = case.bundle.iter().map(|bundle| &bundle.path);
                for path in paths.chain(case.runc.iter().map(|entry| &entry.path)) {
                    prop_assert!(!touches(&step.does, path), "{step:#?}");
                }
            }
        }
    }

    #[test]
    fn unknown_destroys_nothing(broken in broken(), which in 0..5) {
        let mut look = broken.look();
        let mut grounds = grounds(&look);
        match which {
            0 => look.processes = Seen::Unknown("needs root".into()),
            1 => for instance in &mut look.instances {
                instance.api = Api::Unknown("timed out".into());
            },
            2 => for at in 0..2 {
                if let Api::Up(api) = &mut look.instances[at].api { api.tasks = None }
            },
            3 => grounds.files.values_mut().for_each(|f| *f = Seen::Unknown("x".into())),
            _ => grounds.connected.values_mut().for_each(|c| *c = Seen::Unknown("x".into())),
        }
        let plan = planned_on(&look, &grounds, &policy());
        for step in plan.steps {
            let harmless = match (which, &step.does) {
                // A containerd that is down is known to be down.
                (2, _) => own_is_down(&look, &step),
                // Whose files are not known keeps no process alive, and the other way round.
                (3, Act::EndInit(_) | Act::EndShim(_) | Act::Replace(..) | Act::Unmount { .. }) => true,
                (4, act) => !matches!(act, Act::EndShim(_)),
                (_, _) => step.destroys.is_none(),
            };
            prop_assert!(harmless || step.destroys.is_none(), "{which}: {step:#?}");
        }
    }

    #[test]
    fn a_plan_that_was_done_is_not_made_again_and_done_twice_is_done_once(broken in broken()) {
        let mut look = broken.look();
        let first = planned(&look);
        for step in &first.steps {
            done(&mut look, step);
        }
        let once = planned(&look);
        for step in first.steps.iter().filter(|step| mended(step)) {
            prop_assert!(!once.steps.iter().any(|s| s.does == step.does), "{step:#?}\n{once:#?}");
        }
        for step in &first.steps {
            done(&mut look, step);
        }
        prop_assert_eq!(planned(&look), once);
    }

    #[test]
    fn a_few_rounds_leave_nothing_to_do(broken in broken()) {
        let mut look = broken.look();
        for _ in 0..6 {
            for step in planned(&look).steps {
                done(&mut look, &step);
            }
        }
        let left: Vec<Step> = planned(&look).steps.into_iter().filter(mended).collect();
        prop_assert_eq!(left, []);
    }
}

#[test]
fn fifos_are_removed_by_name_and_only_when_nobody_has_them() {
    let mut look = healthy();
    look.remove(&C1);
    let folder = |users| FifoFolder {
        path: "/run/containerd/fifo/1".into(),
        ids: ["gone".to_owned()].into(),
        instance: None,
        changed_at: Some(ago(OLD)),
        users,
    };
    look.fifos.push(folder(Seen::Present(Vec::new())));
    let step = only_step(&look);
    let Act::RemoveFifos { names, .. } = &step.does else {
        panic!("{step:#?}")
    };
    assert_eq!(*names, ["gone-stdin", "gone-stdout", "gone-stderr"]);
    assert_eq!(step.destroys, None);
    for users in [Seen::Present(vec![9]), Seen::Unknown("x".into())] {
        look.fifos = vec![folder(users)];
        assert_eq!(planned(&look).steps, []);
    }
}
