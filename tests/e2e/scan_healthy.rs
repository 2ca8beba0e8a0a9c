//! `recoverd scan` on nodes where nothing is wrong: no finding, whatever goes on there.

use recoverd_tests::{Container, Containerd, Node, Release, Scan, Task, beside, wait_for};

recoverd_tests::tests! {
    on_every_release: [
        healthy_tasks_of_every_kind_have_no_finding,
        healthy_tasks_have_no_finding_while_containerd_is_down,
        exited_task_that_containerd_knows_has_no_finding,
        two_containerds_on_one_socket_folder_see_only_their_own,
        containerd_that_restarts_causes_no_finding,
        healthy_shim_of_another_runtime_has_no_finding,
        crowd_scanned_a_hundred_times_has_no_finding,
    ],
    once: [
        empty_node_has_no_finding,
    ],
}

/// Fails unless the report says of this task what is true of it.
#[track_caller]
fn assert_described(scan: &Scan, task: &Task, phase: &str) {
    let case = scan.task(&task.name());
    let said = case.phase.as_str().unwrap_or_default().to_lowercase();
    assert_eq!(said, phase, "{case:?}");
    let init = case.init.as_ref().map(|init| (init.pid, init.start_time));
    assert_eq!(
        init,
        Some((task.init.pid, task.init.start_time)),
        "{case:?}"
    );
    let Some(shim) = &case.shim else {
        panic!("no shim in {case:?}")
    };
    assert_eq!(shim.pid, Some(task.shim.pid), "{case:?}");
    assert_eq!(shim.socket.as_deref(), task.socket().to_str(), "{case:?}");
    assert_eq!(shim.outdated, Some(false), "{case:?}");
    assert!(shim.pss_kib.is_some_and(|kib| kib > 100), "{case:?}");
    assert_eq!(case.findings, Vec::<String>::new(), "{case:?}");
}

#[track_caller]
fn assert_known(scan: &Scan, task: &Task, phase: &str) {
    let case = scan.task(&task.name());
    let Some(known) = &case.containerd else {
        panic!("containerd's word is missing in {case:?}")
    };
    assert!(known.known, "{case:?}");
    let said = known.phase.as_deref().unwrap_or_default().to_lowercase();
    assert_eq!(said, phase, "{case:?}");
}

/// Fails unless these are the only tasks and each is the very process that it was.
#[track_caller]
fn assert_only_and_untouched(scan: &Scan, tasks: &[&Task]) {
    assert_eq!(scan.report.tasks.len(), tasks.len(), "{scan:#?}");
    for task in tasks {
        task.assert_init_alive();
        task.assert_shim_alive();
    }
}

fn empty_node_has_no_finding(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    for scan in [node.scan(), containerd.scan()] {
        scan.assert_clean();
        assert_eq!(scan.report.tasks.len(), 0);
        let instances: Vec<(&str, bool)> = scan
            .report
            .instances
            .iter()
            .map(|i| (i.address.as_str(), i.up))
            .collect();
        assert_eq!(instances, [("/run/containerd/containerd.sock", true)]);
    }
}

fn healthy_tasks_of_every_kind_have_no_finding(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let plain = containerd.run(&Container::new("plain"));
    let image = containerd.run(&Container::new("image").image());
    let busy = containerd.run(&Container::new("busy"));
    let mut exec = containerd.exec_attached(&busy, "job", &["sleep", "3000"]);
    wait_for("the exec to run", || {
        node.processes()
            .into_iter()
            .find(|process| process.argv == ["sleep", "3000"])
    });
    let terminal = containerd.run(&Container::new("terminal").terminal());
    let paused = containerd.run(&Container::new("paused"));
    containerd.pause(&paused);
    let member = |id: &str, name: Option<&str>| {
        let container = Container::new(id)
            .namespaced("k8s.io")
            .pod("pause", "shop", "web-0", name);
        containerd.run(&container)
    };
    let pause = member("pause", None);
    let (app, sidecar) = (member("app", Some("app")), member("sidecar", Some("proxy")));
    let running = [&plain, &image, &busy, &terminal, &pause, &app, &sidecar];

    for scan in [containerd.scan(), node.scan(), node.scan_of_any_age()] {
        scan.assert_clean();
        for task in running {
            assert_described(&scan, task, "running");
            assert_known(&scan, task, "running");
        }
        assert_described(&scan, &paused, "paused");
        assert_known(&scan, &paused, "paused");
        let all: Vec<&Task> = running.iter().copied().chain([&paused]).collect();
        assert_only_and_untouched(&scan, &all);

        let pod = |task: &Task| {
            let pod = scan.task(&task.name()).pod.as_ref()?;
            Some((
                pod.namespace.clone(),
                pod.name.clone(),
                pod.container.clone(),
            ))
        };
        let names = |container: &str| {
            Some((
                "shop".to_owned(),
                "web-0".to_owned(),
                Some(container.to_owned()),
            ))
        };
        assert_eq!(pod(&plain), None);
        assert_eq!(pod(&app), names("app"));
        assert_eq!(pod(&sidecar), names("proxy"));
        assert!(pod(&pause).is_some_and(|(_, name, container)| {
            name == "web-0" && container.is_none_or(|container| container.is_empty())
        }));
        let instance = scan.report.instances.first();
        let version = instance
            .and_then(|instance| instance.version.clone())
            .unwrap_or_default();
        assert!(version.contains(&release.version), "{version:?}");
    }
    assert!(exec.is_running(), "the scan ended an exec");

    // A scan of one namespace tells of that one only.
    let narrowed = node.scan_with(&["--namespace", "k8s.io"]);
    narrowed.assert_clean();
    assert_eq!(narrowed.report.tasks.len(), 3, "{narrowed:#?}");
}

fn healthy_tasks_have_no_finding_while_containerd_is_down(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let one = containerd.run(&Container::new("one"));
    let two = containerd.run(&Container::new("two").group("one"));
    let paused = containerd.run(&Container::new("paused"));
    containerd.pause(&paused);
    for stop in [Containerd::kill, Containerd::stop] {
        stop(&mut containerd);
        for scan in [containerd.scan(), node.scan(), node.scan_of_any_age()] {
            scan.assert_clean();
            assert_described(&scan, &one, "running");
            assert_described(&scan, &two, "running");
            assert_described(&scan, &paused, "paused");
            assert_only_and_untouched(&scan, &[&one, &two, &paused]);
            let known = scan
                .report
                .tasks
                .iter()
                .filter(|t| t.containerd.is_some())
                .count();
            assert_eq!(
                known, 0,
                "containerd is down and yet said something: {scan:#?}"
            );
            let up: Vec<bool> = scan.report.instances.iter().map(|i| i.up).collect();
            assert_eq!(up, [false], "{scan:#?}");
        }
        containerd.start();
    }
    containerd.scan().assert_clean();
}

fn exited_task_that_containerd_knows_has_no_finding(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("done"));
    node.signal(&task.init, "TERM");
    wait_for("containerd to learn of the exit", || {
        (containerd.task("e2e", "done")?.status == "STOPPED").then_some(())
    });
    let scan = node.scan();
    scan.assert_clean();
    assert_known(&scan, &task, "stopped");
    assert_eq!(
        scan.task("e2e/done")
            .phase
            .as_str()
            .unwrap_or_default()
            .to_lowercase(),
        "stopped"
    );
    task.assert_shim_alive();
}

fn two_containerds_on_one_socket_folder_see_only_their_own(release: &Release) {
    let node = Node::start();
    let first = node.containerd(release);
    let mut second = node.second_containerd(release, "second");
    // The same namespace and id in both: only the address tells them apart.
    let one = first.run(&Container::new("twin"));
    let two = second.run(&Container::new("other"));
    let three = second.run(&Container::new("witness"));

    for _ in ["up", "down"] {
        let of_first = first.scan();
        of_first.assert_clean();
        assert_only_and_untouched(&of_first, &[&one]);
        let of_second = second.scan();
        of_second.assert_clean();
        assert_only_and_untouched(&of_second, &[&two, &three]);
        let of_all = node.scan();
        of_all.assert_clean();
        assert_only_and_untouched(&of_all, &[&one, &two, &three]);
        assert_eq!(of_all.report.instances.len(), 2, "{of_all:#?}");
        if second.is_running() {
            second.kill();
        }
    }

    // What is broken in one is nothing to the other.
    node.kill(&two.shim);
    first.scan().assert_clean();
    let of_second = second.scan();
    of_second.assert_codes(&["orphaned-task"]);
    assert_eq!(of_second.codes("e2e/other"), ["orphaned-task"]);
    assert_eq!(node.scan().codes("e2e/other"), ["orphaned-task"]);
    two.assert_init_alive();
}

fn containerd_that_restarts_causes_no_finding(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let tasks: Vec<Task> = (0..5)
        .map(|n| containerd.run(&Container::new(&format!("task-{n}"))))
        .collect();
    let all: Vec<&Task> = tasks.iter().collect();
    let flags = containerd.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let look = || {
        let scan = node.scan_with(&flags);
        assert!(scan.report.findings.is_empty(), "{scan:#?}");
        assert_eq!(scan.report.tasks.len(), 5, "{scan:#?}");
    };
    let (scans, ()) = beside(look, || {
        for _ in 0..5 {
            containerd.restart();
            containerd.scan().assert_clean();
        }
    });
    assert!(scans >= 5, "only {scans} scans beside 5 restarts");
    assert_only_and_untouched(&containerd.scan(), &all);
}

fn healthy_shim_of_another_runtime_has_no_finding(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let ours = containerd.run(&Container::new("runc"));
    // A real shim under a name that is nobody's here: what it would do with a plan is unknown.
    let foreign = node.folder().join("containerd-shim-foo-v1");
    node.run("cp", [release.stock_shim(), foreign.clone()]);
    let task = containerd.run(&Container::new("foo").runtime(&foreign));
    for scan in [containerd.scan(), node.scan()] {
        scan.assert_clean();
        let shim = scan.task("e2e/foo").shim.as_ref();
        let kind = |shim: Option<&recoverd_tests::Shim>| shim.map(|shim| shim.kind.to_string());
        assert_ne!(
            kind(shim),
            kind(scan.task("e2e/runc").shim.as_ref()),
            "{scan:#?}"
        );
    }
    ours.assert_shim_alive();
    task.assert_shim_alive();
}

fn crowd_scanned_a_hundred_times_has_no_finding(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let crowd: Vec<Task> = (0..50)
        .map(|n| {
            // Ten pods of three, twenty alone.
            let container = Container::new(&format!("crowd-{n:02}")).command(["sleep", "100000"]);
            if n < 30 {
                containerd.run(&container.group(&format!("crowd-{:02}", n / 3 * 3)))
            } else {
                containerd.run(&container)
            }
        })
        .collect();
    let mut guests = 0;
    let come_and_go = || {
        let guest = Container::new(&format!("guest-{guests}")).command(["sleep", "100000"]);
        let task = containerd.run(&guest);
        let mut exec = containerd.exec_attached(&task, "short", &["true"]);
        assert!(exec.wait().success(), "{}", exec.text());
        containerd.remove(&task);
        guests += 1;
    };
    let (rounds, ()) = beside(come_and_go, || {
        for look in 0..100 {
            // Flags and none in turn: both ways of finding things must be quiet.
            let scan = if look % 2 == 0 {
                node.scan()
            } else {
                containerd.scan()
            };
            let tasks = scan.report.tasks.iter();
            let seen = tasks.filter(|task| task.id.starts_with("crowd-")).count();
            assert!(scan.report.findings.is_empty(), "look {look}: {scan:#?}");
            assert!(scan.report.gaps.is_empty(), "look {look}: {scan:#?}");
            assert_eq!(seen, 50, "look {look}: {scan:#?}");
        }
    });
    assert!(rounds >= 5, "only {rounds} tasks came and went");
    for task in &crowd {
        task.assert_init_alive();
        task.assert_shim_alive();
    }
}
