//! `recoverd scan` on what dead tasks leave behind, made by real faults of real shims.

use std::sync::Arc;

use recoverd_tests::{Container, Containerd, Node, Release, Scan, ShimUnderTest, Task, wait_for};

recoverd_tests::tests! {
    on_every_release: [
        bundle_without_shim_and_init_is_stale,
        socket_of_a_dead_shim_is_stale,
        fifos_of_a_vanished_task_are_leaked,
        runc_state_and_cgroup_without_task_are_leaked,
        mount_without_task_is_leaked,
        leftovers_that_somebody_uses_are_nobodys_leak,
    ],
    with_each_shim: [exec_whose_client_is_gone_is_leaked],
}

/// The codes of findings that name `text` in subject or evidence, sorted.
fn codes_that_mention<'a>(scan: &'a Scan, text: &str) -> Vec<&'a str> {
    let mut codes: Vec<&str> = scan
        .report
        .findings
        .iter()
        .filter(|finding| finding.mentions(text))
        .map(|finding| finding.code.as_str())
        .collect();
    codes.sort_unstable();
    codes
}

#[track_caller]
fn assert_severity(scan: &Scan, code: &str, severity: &str) {
    for finding in scan
        .report
        .findings
        .iter()
        .filter(|finding| finding.code == code)
    {
        assert_eq!(finding.severity, severity, "{finding:?}");
    }
}

/// A task that is well, to be left alone by everything.
fn bystander(containerd: &Containerd) -> Task {
    containerd.run(&Container::new("bystander"))
}

#[track_caller]
fn assert_left_alone(scan: &Scan, task: &Task) {
    assert_eq!(scan.codes(&task.name()), [""; 0]);
    task.assert_init_alive();
    task.assert_shim_alive();
}

fn bundle_without_shim_and_init_is_stale(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well = bystander(&containerd);
    let dead = containerd.run(&Container::new("dead"));
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    for scan in [containerd.scan(), node.scan(), node.scan_of_any_age()] {
        let case = scan.task("e2e/dead");
        assert!(
            case.findings.contains(&"stale-bundle".to_owned()),
            "{scan:#?}"
        );
        assert!(case.init.is_none(), "{case:?}");
        assert_severity(&scan, "stale-bundle", "warning");
        let finding = scan.finding("stale-bundle");
        assert!(
            finding.mentions(&dead.bundle().display().to_string()),
            "{finding:?}"
        );
        assert_eq!(scan.report.summary.findings.critical, 0, "{scan:#?}");
        assert_left_alone(&scan, &well);
    }
    assert!(node.path(dead.bundle()).join("config.json").exists());
    assert!(node.path(dead.runc_state()).exists());
}

fn socket_of_a_dead_shim_is_stale(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let dead = containerd.run(&Container::new("dead"));
    // containerd is up: it cleans everything but the socket, which none of them ever removes.
    node.kill(&dead.shim);
    wait_for("containerd to clean up", || {
        (containerd.task("e2e", "dead").is_none() && !node.path(dead.bundle()).exists())
            .then_some(())
    });
    assert!(node.path(dead.socket()).exists());
    let scan = node.scan();
    scan.assert_codes(&["stale-socket"]);
    let finding = scan.finding("stale-socket");
    assert_eq!(finding.severity, "info");
    assert!(
        finding.mentions(&dead.socket().display().to_string()),
        "{finding:?}"
    );
    assert_left_alone(&scan, &well);
    assert!(node.path(dead.socket()).exists(), "a scan removed a socket");
}

fn fifos_of_a_vanished_task_are_leaked(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let dead = containerd.run(&Container::new("dead"));
    node.kill(&dead.shim);
    wait_for("containerd to clean up", || {
        (containerd.task("e2e", "dead").is_none() && !node.path(dead.bundle()).exists())
            .then_some(())
    });
    let fifos = node.shell("find /run/containerd/fifo -name 'dead-stdout'");
    assert_eq!(fifos.lines().count(), 1, "{fifos}");
    // Young ones may be those of a client that is about to create its task.
    node.scan().assert_codes(&["stale-socket"]);
    let scan = node.scan_of_any_age();
    assert_severity(&scan, "leaked-fifo", "warning");
    assert!(
        codes_that_mention(&scan, "dead-std").contains(&"leaked-fifo"),
        "{scan:#?}"
    );
    assert!(
        !codes_that_mention(&scan, "bystander-std").contains(&"leaked-fifo"),
        "{scan:#?}"
    );
    assert_left_alone(&scan, &well);
}

/// A workload that outlived bundle and shim and then ended: runc's state and the cgroup remain.
fn leave_runc_state(node: &Arc<Node>, containerd: &Containerd, id: &str) -> Task {
    let task = containerd.run(&Container::new(id));
    node.run("rm", ["-rf".as_ref(), task.bundle().as_os_str()]);
    node.kill(&task.shim);
    wait_for("containerd to give the task up", || {
        containerd.task("e2e", id).is_none().then_some(())
    });
    node.kill(&task.init);
    task
}

fn runc_state_and_cgroup_without_task_are_leaked(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let dead = leave_runc_state(&node, &containerd, "dead");
    assert!(node.path(dead.runc_state()).exists());
    let cgroups = node.shell("find /sys/fs/cgroup -type d -path '*/e2e/dead'");
    assert!(!cgroups.is_empty());
    let young = node.scan();
    assert_eq!(young.report.summary.findings.warning, 0, "{young:#?}");
    let scan = node.scan_of_any_age();
    let codes = scan.all_codes();
    assert!(codes.contains(&"leaked-runc-state"), "{scan:#?}");
    assert!(codes.contains(&"leaked-cgroup"), "{scan:#?}");
    assert_severity(&scan, "leaked-runc-state", "warning");
    assert_severity(&scan, "leaked-cgroup", "warning");
    let state = dead.runc_state();
    let state = state
        .parent()
        .map(|folder| folder.display().to_string())
        .unwrap_or_default();
    assert!(
        scan.finding("leaked-runc-state").mentions(&state),
        "{scan:#?}"
    );
    assert!(
        codes_that_mention(&scan, "e2e/dead").contains(&"leaked-cgroup"),
        "{scan:#?}"
    );
    assert_left_alone(&scan, &well);
    assert!(
        node.path(dead.runc_state()).exists(),
        "a scan removed runc's state"
    );
}

fn mount_without_task_is_leaked(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    containerd.import_image("e2e");
    let well = containerd.run(&Container::new("bystander").image());
    let dead = containerd.run(&Container::new("dead").image());
    containerd.kill();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    // The root stays mounted: containerd removed the files around it and then found it busy.
    node.shell(&format!(
        "cd {}; find . -mindepth 1 -maxdepth 1 ! -name rootfs -exec rm -rf {{}} +",
        dead.bundle().display()
    ));
    let root = dead.bundle().join("rootfs").display().to_string();
    assert!(node.run("cat", ["/proc/self/mountinfo"]).contains(&root));
    let scan = node.scan_of_any_age();
    assert!(
        codes_that_mention(&scan, &root).contains(&"leaked-mount"),
        "{scan:#?}"
    );
    assert_severity(&scan, "leaked-mount", "warning");
    let other = well.bundle().join("rootfs").display().to_string();
    assert_eq!(codes_that_mention(&scan, &other), [""; 0], "{scan:#?}");
    assert_left_alone(&scan, &well);
    assert!(
        node.run("cat", ["/proc/self/mountinfo"]).contains(&root),
        "a scan unmounted a root"
    );
}

fn leftovers_that_somebody_uses_are_nobodys_leak(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let well = bystander(&containerd);
    let dead = leave_runc_state(&node, &containerd, "dead");
    // Somebody reads a fifo of it, and somebody sits in its cgroup.
    let fifo = node
        .shell("find /run/containerd/fifo -name 'dead-stdout'")
        .trim()
        .to_owned();
    let reader = node.spawn("sh", ["-c", "exec 3<>\"$1\"; exec sleep 1000", "sh", &fifo]);
    wait_for("the reader to sleep", || {
        (node.process(reader.process.pid)?.program() == "sleep").then_some(())
    });
    node.shell(&format!(
        "for cgroup in $(find /sys/fs/cgroup -type d -path '*/e2e/dead'); do
            echo {} >$cgroup/cgroup.procs
        done",
        reader.process.pid
    ));
    let scan = node.scan_of_any_age();
    let codes = scan.all_codes();
    assert!(
        !codes.contains(&"leaked-fifo")
            || !codes_that_mention(&scan, &fifo).contains(&"leaked-fifo"),
        "{scan:#?}"
    );
    assert!(!codes.contains(&"leaked-cgroup"), "{scan:#?}");
    assert!(codes.contains(&"leaked-runc-state"), "{scan:#?}");
    assert_left_alone(&scan, &well);
    assert!(dead.init.pid != reader.process.pid && node.alive(&reader.process));
}

fn exec_whose_client_is_gone_is_leaked(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("bystander").shim(shim));
    let mut held = containerd.exec_attached(&task, "held", &["sleep", "3000"]);
    wait_for("the exec to run", || {
        node.processes()
            .into_iter()
            .find(|process| process.argv == ["sleep", "3000"])
    });
    node.scan_of_any_age().assert_clean();
    // A detached one: its client ended with nobody at the other end of its fifos.
    containerd.exec(&task, "left", &["sleep", "2000"]);
    let left = wait_for("the exec to run", || {
        node.processes()
            .into_iter()
            .find(|process| process.argv == ["sleep", "2000"])
    });
    node.scan().assert_clean();
    let scan = node.scan_of_any_age();
    scan.assert_codes(&["leaked-exec"]);
    let finding = scan.finding("leaked-exec");
    assert_eq!(finding.severity, "info");
    assert!(
        finding.mentions(&left.pid.to_string()) && finding.mentions("left"),
        "{finding:?}"
    );
    assert!(held.is_running() && node.alive(&left));
    task.assert_shim_alive();
}
