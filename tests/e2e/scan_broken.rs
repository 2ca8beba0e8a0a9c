//! `recoverd scan` on tasks that are in danger or in disorder: each fault is made on real
//! containers and must be found under its one name, with nothing else beside it.

use std::fs;
use std::path::Path;

use recoverd_tests::{Container, Node, Process, Release, wait_for};

recoverd_tests::tests! {
    on_every_release: [
        orphaned_task_is_found_while_containerd_is_down,
        orphaned_pod_is_found_container_by_container,
        orphaned_task_without_bundle_is_found,
        unresponsive_shim_is_found_and_said_to_be_stopped,
        missing_socket_is_found,
        shim_that_listens_elsewhere_than_its_bundle_says_is_found,
        process_of_another_user_is_no_shim,
        task_unknown_to_containerd_is_found,
        shim_without_process_is_found,
        exit_while_containerd_is_down_is_found,
        shim_with_deleted_executable_is_found,
        orphan_beside_its_pods_successor_is_found,
        two_living_workloads_of_one_pod_container_are_found,
        reused_pid_is_not_taken_for_the_init,
        unresponsive_shim_of_another_runtime_is_foreign,
    ],
    once: [
        full_run_is_found,
    ],
}

fn orphaned_task_is_found_while_containerd_is_down(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well = containerd.run(&Container::new("well"));
    let orphan = containerd.run(&Container::new("orphan"));
    containerd.kill();
    node.kill(&orphan.shim);
    for scan in [containerd.scan(), node.scan()] {
        scan.assert_codes(&["orphaned-task"]);
        assert_eq!(scan.codes("e2e/orphan"), ["orphaned-task"]);
        assert_eq!(scan.codes("e2e/well"), [""; 0]);
        let finding = scan.finding("orphaned-task");
        assert_eq!(finding.severity, "critical");
        assert!(
            finding.mentions("e2e/orphan") || finding.mentions("orphan"),
            "{finding:?}"
        );
        assert!(
            finding.mentions(&orphan.init.pid.to_string()),
            "{finding:?}"
        );
        assert!(
            !finding.action.to_string().trim_matches('"').is_empty(),
            "{finding:?}"
        );
        let case = scan.task("e2e/orphan");
        assert_eq!(
            case.init.as_ref().map(|init| init.pid),
            Some(orphan.init.pid)
        );
        assert!(
            case.shim.as_ref().is_none_or(|shim| shim.pid.is_none()),
            "{case:?}"
        );
        assert_eq!(scan.report.summary.healthy, 1);
    }
    orphan.assert_init_alive();
    well.assert_init_alive();
    well.assert_shim_alive();
}

fn orphaned_pod_is_found_container_by_container(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let member = |id: &str, name: Option<&str>| {
        let container = Container::new(id)
            .namespaced("k8s.io")
            .pod("pause", "shop", "web-0", name);
        containerd.run(&container)
    };
    let pod = [
        member("pause", None),
        member("app", Some("app")),
        member("log", Some("log")),
    ];
    containerd.stop();
    node.kill(&pod[0].shim);
    let scan = containerd.scan();
    scan.assert_codes(&["orphaned-task"; 3]);
    for task in &pod {
        assert_eq!(scan.codes(&task.name()), ["orphaned-task"]);
        task.assert_init_alive();
    }
    let app = scan
        .task("k8s.io/app")
        .pod
        .as_ref()
        .map(|pod| pod.name.clone());
    assert_eq!(app.as_deref(), Some("web-0"));
}

fn orphaned_task_without_bundle_is_found(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("stray"));
    // containerd, up, cannot run `shim delete` without the bundle: it says the task has ended, and
    // the workload lives on with nobody.
    node.run("rm", ["-rf".as_ref(), task.bundle().as_os_str()]);
    node.kill(&task.shim);
    wait_for("containerd to give the task up", || {
        containerd.task("e2e", "stray").is_none().then_some(())
    });
    task.assert_init_alive();
    let scan = node.scan();
    assert_eq!(scan.codes("e2e/stray"), ["orphaned-task"], "{scan:#?}");
    scan.assert_codes(&["orphaned-task"]);
    task.assert_init_alive();
}

fn unresponsive_shim_is_found_and_said_to_be_stopped(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well = containerd.run(&Container::new("well"));
    let hung = containerd.run(&Container::new("hung"));
    node.freeze(&hung.shim);
    for state in ["up", "down"] {
        for scan in [containerd.scan(), node.scan()] {
            scan.assert_codes(&["unresponsive-shim"]);
            assert_eq!(
                scan.codes("e2e/hung"),
                ["unresponsive-shim"],
                "containerd {state}"
            );
            assert_eq!(scan.codes("e2e/well"), [""; 0], "containerd {state}");
            let finding = scan.finding("unresponsive-shim");
            assert_eq!(finding.severity, "critical");
            assert!(finding.mentions(&hung.shim.pid.to_string()), "{finding:?}");
            assert!(finding.mentions("stopped"), "{finding:?}");
            assert!(scan.report.summary.seconds < 20.0, "{scan:#?}");
        }
        if containerd.is_running() {
            containerd.kill();
        }
    }
    // Looking neither woke nor ended it.
    assert_eq!(
        node.process(hung.shim.pid).map(|shim| shim.state),
        Some('T')
    );
    hung.assert_init_alive();
    node.signal(&hung.shim, "CONT");
    containerd.scan().assert_clean();
    well.assert_shim_alive();
}

fn missing_socket_is_found(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.run(&Container::new("well"));
    let task = containerd.run(&Container::new("cut"));
    node.run("rm", [task.socket()]);
    for state in ["up", "down"] {
        for scan in [containerd.scan(), node.scan()] {
            scan.assert_codes(&["socket-missing"]);
            assert_eq!(
                scan.codes("e2e/cut"),
                ["socket-missing"],
                "containerd {state}"
            );
            let finding = scan.finding("socket-missing");
            assert_eq!(finding.severity, "critical");
            assert!(
                finding.mentions(&task.socket().display().to_string()),
                "{finding:?}"
            );
        }
        if containerd.is_running() {
            containerd.kill();
        }
    }
    task.assert_init_alive();
    task.assert_shim_alive();
}

fn shim_that_listens_elsewhere_than_its_bundle_says_is_found(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.run(&Container::new("well"));
    let task = containerd.run(&Container::new("astray"));
    containerd.kill();
    let bundle = task.bundle().display().to_string();
    let away = format!("/run/containerd/s/{}", "0".repeat(64));
    for edit in [
        format!("rm -f {bundle}/address {bundle}/bootstrap.json"),
        format!("printf unix://{away} >{bundle}/address"),
    ] {
        node.shell(&edit);
        let scan = node.scan();
        scan.assert_codes(&["socket-missing"]);
        assert_eq!(scan.codes("e2e/astray"), ["socket-missing"], "{edit}");
        let finding = scan.finding("socket-missing");
        assert!(
            finding.mentions(&task.socket().display().to_string()),
            "{finding:?}"
        );
    }
    assert!(node.scan().finding("socket-missing").mentions(&away));
    task.assert_init_alive();
    task.assert_shim_alive();
}

fn process_of_another_user_is_no_shim(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("orphan"));
    containerd.kill();
    node.kill(&task.shim);
    // Anybody can have these arguments, and working folders, and escapes in their arguments.
    let script = "chdir '/tmp'; sleep 1000";
    let address = "/run/containerd/containerd.sock";
    let false_shim = |address: &str| {
        let words = [
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
            "perl",
            "-e",
            script,
            "--",
            "-namespace",
            "e2e",
            "-id",
            "orphan",
            "-address",
            address,
        ];
        node.spawn("setpriv", words)
    };
    let pretenders = [false_shim(address), false_shim("/tmp/\u{1b}[31mred.sock")];
    wait_for("the pretenders", || {
        let all = node.processes();
        let pretends = |p: &&Process| p.program() == "perl" && p.argv.iter().any(|a| a == "orphan");
        (all.iter().filter(pretends).count() == 2).then_some(())
    });
    let scan = node.scan();
    scan.assert_codes(&["orphaned-task"]);
    assert_eq!(scan.report.instances.len(), 1, "{scan:#?}");
    let table = node.recoverd(["scan"]);
    assert!(!table.stdout.contains(&0x1b), "{table:?}");
    drop(pretenders);
    task.assert_init_alive();
}

fn task_unknown_to_containerd_is_found(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well = containerd.run(&Container::new("well"));
    let lost = containerd.run(&Container::new("lost"));
    containerd.kill();
    node.run("rm", ["-rf".as_ref(), lost.bundle().as_os_str()]);
    containerd.start();
    assert_eq!(containerd.task("e2e", "lost"), None);
    let scan = node.scan();
    assert_eq!(
        scan.codes("e2e/lost"),
        ["task-unknown-to-containerd"],
        "{scan:#?}"
    );
    scan.assert_codes(&["task-unknown-to-containerd"]);
    assert_eq!(
        scan.finding("task-unknown-to-containerd").severity,
        "warning"
    );
    lost.assert_init_alive();
    lost.assert_shim_alive();
    well.assert_shim_alive();
}

fn shim_without_process_is_found(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("empty"));
    containerd.kill();
    node.run("rm", ["-rf".as_ref(), task.bundle().as_os_str()]);
    containerd.start();
    task.kill_init();
    let scan = node.scan();
    assert!(scan.all_codes().contains(&"leaked-shim"), "{scan:#?}");
    let finding = scan.finding("leaked-shim");
    assert_eq!(finding.severity, "warning");
    assert!(finding.mentions(&task.shim.pid.to_string()), "{finding:?}");
    scan.assert_codes(&["leaked-shim"]);
    task.assert_shim_alive();
}

fn exit_while_containerd_is_down_is_found(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("unheard").command([
        "sh",
        "-c",
        "trap 'exit 42' TERM; while :; do sleep 0.1; done",
    ]));
    containerd.run(&Container::new("well"));
    containerd.kill();
    node.signal(&task.init, "TERM");
    task.wait_collected();
    let scan = containerd.scan();
    scan.assert_codes(&["exit-unreported"]);
    assert_eq!(scan.codes("e2e/unheard"), ["exit-unreported"]);
    let finding = scan.finding("exit-unreported");
    assert_eq!(finding.severity, "warning");
    assert!(
        finding.mentions("42"),
        "the true status is known to the shim: {finding:?}"
    );
    task.assert_shim_alive();
    containerd.start();
    // 1.6 takes it over as stopped, later ones have thrown it away: nothing is wrong any more.
    if release.name != "1.6" {
        node.wait_gone(&task.shim);
    }
    let after = containerd.scan();
    after.assert_clean();
    assert_eq!(
        after.report.tasks.len(),
        if release.name == "1.6" { 2 } else { 1 },
        "{after:#?}"
    );
}

fn shim_with_deleted_executable_is_found(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.run(&Container::new("well"));
    // As a package upgrade does it: a new file takes the old one's name.
    let shim = node.folder().join("containerd-shim-runc-v2");
    node.run("cp", [release.stock_shim(), shim.clone()]);
    let task = containerd.run(&Container::new("old").runtime(&shim));
    containerd.scan().assert_clean();
    let fresh = node.folder().join("fresh");
    node.run("cp", [release.stock_shim(), fresh.clone()]);
    node.run("mv", [&fresh, &shim]);
    let executable = node.executable(task.shim.pid).unwrap_or_default();
    assert!(
        executable.display().to_string().ends_with("(deleted)"),
        "{executable:?}"
    );
    let scan = node.scan();
    scan.assert_codes(&["outdated-shim"]);
    assert_eq!(scan.codes("e2e/old"), ["outdated-shim"]);
    assert_eq!(scan.finding("outdated-shim").severity, "info");
    assert_eq!(
        scan.task("e2e/old")
            .shim
            .as_ref()
            .and_then(|shim| shim.outdated),
        Some(true)
    );
    assert_eq!(
        scan.task("e2e/well")
            .shim
            .as_ref()
            .and_then(|shim| shim.outdated),
        Some(false)
    );
    task.assert_shim_alive();
}

fn orphan_beside_its_pods_successor_is_found(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let member = |id: &str, sandbox: &str, name: Option<&str>| {
        let container = Container::new(id)
            .namespaced("k8s.io")
            .pod(sandbox, "shop", "web-0", name);
        containerd.run(&container)
    };
    // The workload of the pod outlives shim and bundle; containerd says it has ended, and the
    // kubelet, who believes it, starts the pod anew.
    let old_pause = member("pause-1", "pause-1", None);
    let old = member("app-1", "pause-1", Some("app"));
    node.run("rm", ["-rf".as_ref(), old.bundle().as_os_str()]);
    node.kill(&old_pause.shim);
    wait_for("containerd to give the pod up", || {
        containerd.tasks("k8s.io").is_empty().then_some(())
    });
    old.assert_init_alive();
    member("pause-2", "pause-2", None);
    let new = member("app-2", "pause-2", Some("app"));
    let scan = node.scan();
    // Without its bundle the old one's names are gone; its cgroup and runc's state are not.
    assert!(
        scan.codes("k8s.io/app-1").contains(&"orphaned-task"),
        "{scan:#?}"
    );
    assert_eq!(scan.codes("k8s.io/pause-2"), [""; 0]);
    old.assert_init_alive();
    new.assert_init_alive();
    new.assert_shim_alive();
}

fn two_living_workloads_of_one_pod_container_are_found(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let member = |id: &str, name: Option<&str>| {
        let container = Container::new(id)
            .namespaced("k8s.io")
            .pod("pause", "shop", "web-0", name);
        containerd.run(&container)
    };
    let pause = member("pause", None);
    let first = member("app-0", Some("app"));
    // Another container of the pod is no second workload of the first.
    let other = member("log-0", Some("log"));
    containerd.scan().assert_clean();
    // The next attempt, while the one before it still runs.
    let second = member("app-1", Some("app"));
    let scan = node.scan();
    scan.assert_codes(&["duplicate-workload"]);
    let finding = scan.finding("duplicate-workload");
    assert_eq!(finding.severity, "critical");
    for task in [&first, &second] {
        assert!(finding.mentions(&task.init.pid.to_string()), "{finding:?}");
        task.assert_init_alive();
    }
    // The one that should not be there any more is named.
    assert_eq!(scan.codes("k8s.io/app-0"), ["duplicate-workload"]);
    for task in [&pause, &other, &second] {
        assert_eq!(scan.codes(&task.name()), [""; 0]);
    }
}

/// Starts a process that gets exactly this pid in the node.
fn occupy(node: &Node, pid: u32) -> Process {
    wait_for("a process with the wanted pid", || {
        let last = pid - 1;
        node.shell(&format!(
            "echo {last} >/proc/sys/kernel/ns_last_pid; setsid sleep 1000 </dev/null >/dev/null 2>&1 &"
        ));
        node.process(pid)
            .filter(|process| process.argv == ["sleep", "1000"])
    })
}

fn reused_pid_is_not_taken_for_the_init(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("gone"));
    containerd.kill();
    node.kill(&task.shim);
    node.kill(&task.init);
    let stranger = occupy(&node, task.init.pid);
    let named = fs::read_to_string(node.path(task.bundle().join("init.pid")));
    assert_eq!(
        named.ok().as_deref(),
        Some(stranger.pid.to_string().as_str())
    );
    for scan in [containerd.scan(), node.scan()] {
        let case = scan.task("e2e/gone");
        assert!(
            case.init.is_none(),
            "a stranger is taken for the init: {case:?}"
        );
        assert!(
            case.findings.contains(&"stale-bundle".to_owned()),
            "{scan:#?}"
        );
        assert!(!scan.all_codes().contains(&"orphaned-task"), "{scan:#?}");
        assert_eq!(scan.report.summary.findings.critical, 0, "{scan:#?}");
    }
    assert!(node.alive(&stranger));
}

fn unresponsive_shim_of_another_runtime_is_foreign(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let foreign = node.folder().join("containerd-shim-foo-v1");
    node.run("cp", [release.stock_shim(), foreign.clone()]);
    let task = containerd.run(&Container::new("foo").runtime(&foreign));
    node.freeze(&task.shim);
    let scan = node.scan();
    scan.assert_codes(&["foreign"]);
    let finding = scan.finding("foreign");
    assert_eq!(finding.severity, "info");
    assert!(finding.mentions(&task.shim.pid.to_string()), "{finding:?}");
    assert_eq!(
        node.process(task.shim.pid).map(|shim| shim.state),
        Some('T')
    );
}

fn full_run_is_found(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("well"));
    node.run("mount", ["-o", "remount,size=20m", "/run"]);
    containerd.scan().assert_clean();
    // The file that eats the room is not containerd's: its name is what an operator needs.
    node.shell(
        "mkdir -p /run/hog; dd if=/dev/zero of=/run/hog/big bs=1M count=19 2>/dev/null || :",
    );
    let scan = containerd.scan();
    scan.assert_codes(&["run-nearly-full"]);
    let finding = scan.finding("run-nearly-full");
    assert_eq!(finding.severity, "warning");
    assert!(finding.mentions("/run"), "{finding:?}");
    node.run("rm", [Path::new("/run/hog/big")]);
    containerd.scan().assert_clean();
    task.assert_shim_alive();
}
