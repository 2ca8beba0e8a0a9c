//! The harness against itself: every other test rests on what these promise.

use recoverd_tests::{Container, Node, Release};

recoverd_tests::tests! {
    on_every_release: [
        task_outlives_its_containerd,
        terminal_and_exec_and_pod_run,
        image_root_is_mounted_in_the_bundle,
        attached_run_reports_the_exit_status,
        two_containerds_share_one_socket_folder,
    ],
    once: [
        task_outlives_an_upgrade_of_containerd,
        a_node_is_nobody_elses,
    ],
}

fn task_outlives_its_containerd(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let version = containerd.ctr_ok("e2e", ["version"]);
    assert!(version.contains(&release.version), "{version}");
    let task = containerd.run(&Container::new("survivor"));
    assert_eq!(node.executable(task.shim.pid), Some(release.stock_shim()));
    containerd.restart();
    task.assert_init_alive();
    task.assert_shim_alive();
    let row = containerd
        .task("e2e", "survivor")
        .map(|row| (row.pid, row.status));
    assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())));
    containerd.stop();
    containerd.start();
    task.assert_init_alive();
    containerd.remove(&task);
    node.wait_gone(&task.init);
    node.wait_gone(&task.shim);
}

fn terminal_and_exec_and_pod_run(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let pause = containerd.run(&Container::new("pause").pod("pause", "shop", "web-0", None));
    let app = containerd.run(&Container::new("app").pod("pause", "shop", "web-0", Some("app")));
    assert_eq!(pause.shim, app.shim);
    assert_eq!(pause.socket(), app.socket());
    let terminal = containerd.run(&Container::new("terminal").terminal());
    let terminals = node.run("ls", ["-l", &format!("/proc/{}/fd/0", terminal.init.pid)]);
    assert!(terminals.contains("/dev/pts/"), "{terminals}");
    containerd.exec(&app, "extra", &["sleep", "3000"]);
    // The runtime answers before its child is the program.
    recoverd_tests::wait_for("the exec to run", || {
        let mut all = node.processes().into_iter();
        all.find(|process| process.argv == ["sleep", "3000"])
    });
}

fn image_root_is_mounted_in_the_bundle(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let task = containerd.run(&Container::new("image").image());
    let mounts = node.run("cat", ["/proc/self/mountinfo"]);
    let root = task.bundle().join("rootfs").display().to_string();
    assert!(mounts.contains(&root), "{mounts}");
    assert!(node.path(task.runc_state()).exists());
    assert!(node.path(task.socket()).exists());
}

fn attached_run_reports_the_exit_status(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let container = Container::new("attached").command([
        "sh",
        "-c",
        "echo hello; trap 'exit 42' TERM; while :; do sleep 0.1; done",
    ]);
    let (task, mut ctr) = containerd.run_attached(&container);
    recoverd_tests::wait_for("the container's output", || {
        ctr.text().contains("hello").then_some(())
    });
    node.signal(&task.init, "TERM");
    assert_eq!(ctr.wait().code(), Some(42));
}

fn two_containerds_share_one_socket_folder(release: &Release) {
    let node = Node::start();
    let first = node.containerd(release);
    let second = node.second_containerd(release, "second");
    let one = first.run(&Container::new("same").namespaced("one"));
    let two = second.run(&Container::new("same").namespaced("two"));
    assert_ne!(one.socket(), two.socket());
    assert_eq!(one.socket().parent(), two.socket().parent());
    assert_eq!(first.tasks("two"), []);
    assert_eq!(second.tasks("two").len(), 1);
}

fn task_outlives_an_upgrade_of_containerd(_newest: &Release) {
    let releases = Release::available();
    let Some((oldest, newer)) = releases.split_first() else {
        panic!("no release is there")
    };
    let node = Node::start();
    let mut containerd = node.containerd(oldest);
    let task = containerd.run(&Container::new("upgraded"));
    for release in newer {
        containerd.kill();
        containerd.switch_to(release);
        containerd.start();
        task.assert_init_alive();
        assert_eq!(containerd.tasks("e2e").len(), 1);
    }
}

fn a_node_is_nobody_elses(release: &Release) {
    let (one, two) = (Node::start(), Node::start());
    let containerd = one.containerd(release);
    containerd.run(&Container::new("private"));
    assert_eq!(one.shims().len(), 1);
    assert_eq!(two.shims(), []);
    assert!(!two.path("/run/containerd").exists());
    let cgroups = |node: &Node| {
        node.shell("find /sys/fs/cgroup -name private | wc -l")
            .trim()
            .to_owned()
    };
    assert_ne!(cgroups(&one), "0");
    assert_eq!(cgroups(&two), "0");
}
