//! Checkpoint and restore by CRIU, with the stock shim as control.

use std::fs;
use std::path::{Path, PathBuf};

use recoverd_common::pb::runc::CheckpointOptions;
use recoverd_tests::{
    Code, Container, Events, Fifos, Node, Output, Release, ShimUnderTest, Status, Stdio, Traces,
    assert_refused, oci_process, oci_spec, wait_for,
};

recoverd_tests::tests! {
    with_criu_and_each_shim: [
        a_container_goes_on_where_its_checkpoint_was_taken,
        a_container_outlives_its_checkpoint,
        a_terminal_and_a_log_file_are_restored,
        what_cannot_be_restored_leaves_nothing_behind,
        ctr_takes_a_checkpoint_and_restores_it,
    ],
    with_criu: [
        a_restored_task_is_adopted_and_its_status_is_true,
        a_checkpoint_of_the_stock_shim_is_restored_by_ours,
    ],
}

/// Says 1, 2, 3, … slowly; a line of its own at a time.
const COUNTER: [&str; 3] = [
    "sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done",
];

/// A folder for images, which the runtime makes.
fn images(node: &Node, name: &str) -> PathBuf {
    node.folder().join(name)
}

fn options(images: &Path) -> CheckpointOptions {
    CheckpointOptions {
        image_path: images.display().to_string(),
        ..CheckpointOptions::default()
    }
}

/// stdout and stderr go to one client; the stock shim wants both.
fn only_stdout(fifos: &Fifos) -> Stdio {
    Stdio {
        stdout: fifos.stdio.stdout.clone(),
        stderr: fifos.stdio.stdout.clone(),
        ..Stdio::default()
    }
}

/// Waits for a few numbers.
#[track_caller]
fn wait_numbers(output: &Output, more_than: usize) {
    wait_for("numbers", || {
        (output.text().lines().count() > more_than).then_some(())
    });
}

fn parsed(text: &str) -> Vec<u64> {
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn a_container_goes_on_where_its_checkpoint_was_taken(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    let api = containerd.api("e2e");
    let events = Events::of(&containerd);
    let spec = oci_spec("c", &COUNTER);

    let fifos = Fifos::make(&node, "before");
    let before = fifos.stdout();
    api.run("c", &spec, shim, &only_stdout(&fifos));
    wait_numbers(&before, 5);
    let images = images(&node, "images");
    let exit = CheckpointOptions {
        exit: true,
        ..options(&images)
    };
    api.checkpoint("c", &exit).unwrap();
    assert_eq!(api.status("c", ""), 137);
    assert_eq!(api.phase("c", ""), Status::Stopped);
    assert_refused(
        api.checkpoint("c", &exit),
        Code::Unknown,
        "cannot checkpoint a stopped container",
    );
    assert_eq!(api.delete("c", "").unwrap().status, 137);
    let before = parsed(&before.wait_end());

    // Nothing runs before Start.
    let fifos = Fifos::make(&node, "after");
    assert_eq!(api.create_from("c", &only_stdout(&fifos), &images), Ok(0));
    assert_eq!(api.phase("c", ""), Status::Created);
    assert_refused(
        api.checkpoint("c", &exit),
        Code::Unknown,
        "cannot checkpoint a task in created state",
    );
    assert_refused(
        api.exec("c", "early", &oci_process(&["true"]), &Stdio::default()),
        Code::Unknown,
        "cannot exec in a created state",
    );
    let after = fifos.stdout();
    let pid = api.start("c", "").unwrap();
    assert!(pid > 0);
    assert_eq!(api.phase("c", ""), Status::Running);
    wait_numbers(&after, 5);
    api.run_exec(
        "c",
        "e",
        &oci_process(&["sh", "-c", "exit 7"]),
        &Stdio::default(),
    );
    assert_eq!(api.status("c", "e"), 7);
    api.delete("c", "e").unwrap();
    api.kill("c", "", 9).unwrap();
    assert_eq!(api.status("c", ""), 137);
    assert_eq!(api.delete("c", "").unwrap().pid, pid);
    let after = parsed(&after.wait_end());

    // What was in the fifo when the checkpoint was taken is in the images too.
    let all: Vec<u64> = before.iter().chain(&after).copied().collect();
    let last = *after.last().unwrap();
    for number in 1..=last {
        assert!(
            all.contains(&number),
            "{number} is missing: {before:?} {after:?}"
        );
    }
    // It begins with what was in the fifo then, which may have been read meanwhile, too.
    let seen = before[before.len() - 1];
    let in_order = after.windows(2).all(|pair| pair[1] == pair[0] + 1);
    assert!(
        in_order && after[0] <= seen + 1 && after[0] + 64 > seen,
        "{before:?} {after:?}"
    );

    // The stock shim may leave before its last delete is sent.
    let ours = shim == ShimUnderTest::Recoverd;
    let (last, times) = if ours {
        ("/tasks/delete", 2)
    } else {
        ("/tasks/exit", 3)
    };
    let topics: Vec<String> = wait_for("all events", || {
        let all = events.of_container("c");
        let seen = all.iter().filter(|event| event.topic == last).count();
        (seen == times).then(|| all.into_iter().map(|event| event.topic).collect())
    });
    let counts = |topic: &&str| *topic != "checkpointed" && (ours || *topic != "delete");
    let of_tasks: Vec<&str> = topics
        .iter()
        .filter_map(|topic| topic.strip_prefix("/tasks/"))
        .filter(counts)
        .collect();
    let whole = [
        "create",
        "start",
        "exit",
        "delete",
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "exit",
        "delete",
    ];
    let expected: Vec<&str> = whole.into_iter().filter(counts).collect();
    assert_eq!(of_tasks, expected);
    // The stock shim never tells it, though the API has it.
    let told = topics
        .iter()
        .filter(|topic| *topic == "/tasks/checkpointed");
    assert_eq!(told.count(), usize::from(ours));
    let second = &events.of_topic("c", "/tasks/create")[1];
    assert_eq!(second.text("checkpoint"), images.display().to_string());
}

fn a_container_outlives_its_checkpoint(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    let api = containerd.api("e2e");
    let fifos = Fifos::make(&node, "c");
    let output = fifos.stdout();
    let pid = api.run("c", &oci_spec("c", &COUNTER), shim, &only_stdout(&fifos));
    wait_numbers(&output, 5);
    let first = images(&node, "first");
    let work = node.folder().join("work");
    let keep = CheckpointOptions {
        work_path: work.display().to_string(),
        ..options(&first)
    };
    api.checkpoint("c", &keep).unwrap();
    assert!(work.join("dump.log").exists());
    assert_eq!(api.phase("c", ""), Status::Running);
    let seen = output.text().lines().count();
    wait_numbers(&output, seen + 5);
    // As containerd's client does it: paused meanwhile.
    api.pause("c").unwrap();
    let second = images(&node, "second");
    api.checkpoint("c", &options(&second)).unwrap();
    assert_eq!(api.phase("c", ""), Status::Paused);
    api.resume("c").unwrap();
    let seen = output.text().lines().count();
    wait_numbers(&output, seen + 5);
    assert_eq!(api.end("c").pid, pid);
    let numbers = parsed(&output.wait_end());
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected);
    for folder in [first, second] {
        let count = fs::read_dir(&folder).unwrap().count();
        assert!(count > 5, "{} has {count} files", folder.display());
    }
}

fn a_terminal_and_a_log_file_are_restored(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    let api = containerd.api("e2e");
    let mut spec = oci_spec(
        "t",
        &["sh", "-c", "while read line; do echo got $line; done"],
    );
    spec["process"]["terminal"] = true.into();
    let fifos = Fifos::make_terminal(&node, "t1");
    let before = fifos.stdout();
    api.run("t", &spec, shim, &fifos.stdio);
    fifos.stdin().write("one\n");
    before.wait_text("got one");
    let images_of_t = images(&node, "images-t");
    let exit = CheckpointOptions {
        exit: true,
        ..options(&images_of_t)
    };
    api.checkpoint("t", &exit).unwrap();
    assert_eq!(api.status("t", ""), 137);
    api.delete("t", "").unwrap();
    let fifos = Fifos::make_terminal(&node, "t2");
    let after = fifos.stdout();
    api.create_from("t", &fifos.stdio, &images_of_t).unwrap();
    api.start("t", "").unwrap();
    fifos.stdin().write("two\n");
    after.wait_text("got two");
    api.end("t");

    let log = node.folder().join("counter.out");
    let stdio = Stdio {
        stdout: format!("file://{}", log.display()),
        stderr: format!("file://{}", log.display()),
        ..Stdio::default()
    };
    let lines = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().count()
    };
    api.run("f", &oci_spec("f", &COUNTER), shim, &stdio);
    wait_for("numbers", || (lines() > 5).then_some(()));
    let images_of_f = images(&node, "images-f");
    let exit = CheckpointOptions {
        exit: true,
        ..options(&images_of_f)
    };
    api.checkpoint("f", &exit).unwrap();
    assert_eq!(api.status("f", ""), 137);
    api.delete("f", "").unwrap();
    let seen = lines();
    api.create_from("f", &stdio, &images_of_f).unwrap();
    api.start("f", "").unwrap();
    wait_for("more numbers", || (lines() > seen + 5).then_some(()));
    api.end("f");
    let numbers = parsed(&fs::read_to_string(&log).unwrap());
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected);
}

fn what_cannot_be_restored_leaves_nothing_behind(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    let before = Traces::of(&node);
    let api = containerd.api("e2e");
    let empty = images(&node, "empty");
    fs::create_dir(&empty).unwrap();
    let spec = oci_spec("c", &COUNTER);
    api.container("c", &spec, shim, None);
    assert_eq!(api.create_from("c", &Stdio::default(), &empty), Ok(0));
    for _ in 0..2 {
        assert_refused(
            api.start("c", ""),
            Code::Unknown,
            "OCI runtime restore failed: ",
        );
        assert_eq!(api.phase("c", ""), Status::Created);
    }
    // It never ran.
    assert_eq!(api.delete("c", "").unwrap().pid, 0);
    before.wait_restored(&node);

    // A container that cannot be dumped lives on, and the refusal says where CRIU's log is.
    // CRIU dumps no namespace within a namespace.
    let mut spec = oci_spec(
        "d",
        &[
            "sh",
            "-c",
            &format!("unshare -u sleep 1000 & {}", COUNTER[2]),
        ],
    );
    for set in ["bounding", "effective", "permitted"] {
        let all = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        all.push("CAP_SYS_ADMIN".into());
    }
    let fifos = Fifos::make(&node, "d");
    let output = fifos.stdout();
    let pid = api.run("d", &spec, shim, &only_stdout(&fifos));
    wait_numbers(&output, 5);
    let refused = api
        .checkpoint("d", &options(&images(&node, "images")))
        .unwrap_err();
    assert_eq!(refused.code, Code::Unknown);
    let log = Path::new("/run/containerd/io.containerd.runtime.v2.task/e2e/d/criu-dump.log");
    let end = format!(" path= {}", log.display());
    assert!(
        refused
            .message
            .starts_with("runc did not terminate successfully: exit status 1: criu failed: ")
            && refused.message.ends_with(&end),
        "{refused:?}"
    );
    assert!(node.path(log).exists());
    assert_eq!(api.phase("d", ""), Status::Running);
    let seen = output.text().lines().count();
    wait_numbers(&output, seen + 5);
    assert_eq!(api.end("d").pid, pid);
}

fn ctr_takes_a_checkpoint_and_restores_it(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    containerd.import_image("e2e");
    let task = containerd.run(&Container::new("c").image().shim(shim));
    containerd.ctr_freezing(
        "e2e",
        &[
            "containers",
            "checkpoint",
            "--task",
            "--rw",
            "c",
            "localhost/c:1",
        ],
    );
    task.assert_init_alive();
    containerd.remove(&task);
    containerd.ctr_ok(
        "e2e",
        ["containers", "restore", "--live", "c", "localhost/c:1"],
    );
    let row = containerd.task("e2e", "c").unwrap();
    assert_eq!(row.status, "RUNNING");
    containerd.ctr_ok("e2e", ["tasks", "exec", "--exec-id", "e", "c", "true"]);
    containerd.ctr_ok("e2e", ["tasks", "delete", "--force", "c"]);
}

/// SPEC's row F3 for a task whose init no `runc create` has started.
fn a_restored_task_is_adopted_and_its_status_is_true(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd_with(release, &["criu"]);
    let api = containerd.api("e2e");
    let shim = ShimUnderTest::Recoverd;
    let command = "trap 'exit 23' TERM; echo up; while :; do sleep 0.02; done";
    let fifos = Fifos::make(&node, "before");
    let output = fifos.stdout();
    api.run(
        "c",
        &oci_spec("c", &["sh", "-c", command]),
        shim,
        &only_stdout(&fifos),
    );
    output.wait_text("up");
    let images = images(&node, "images");
    let exit = CheckpointOptions {
        exit: true,
        ..options(&images)
    };
    api.checkpoint("c", &exit).unwrap();
    api.status("c", "");
    api.delete("c", "").unwrap();
    let fifos = Fifos::make(&node, "after");
    api.create_from("c", &only_stdout(&fifos), &images).unwrap();
    // A task that waits to be restored is kept by every start of containerd.
    containerd.restart();
    let api = containerd.api("e2e");
    assert_eq!(api.phase("c", ""), Status::Created);
    let pid = api.start("c", "").unwrap();

    containerd.kill();
    let shims = node.shims();
    assert_eq!(shims.len(), 1, "{shims:?}");
    node.kill(&shims[0]);
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    let api = containerd.api("e2e");
    let state = api.state("c", "").unwrap();
    assert_eq!((state.pid, state.status()), (pid, Status::Running));
    api.run_exec(
        "c",
        "e",
        &oci_process(&["sh", "-c", "exit 7"]),
        &Stdio::default(),
    );
    assert_eq!(api.status("c", "e"), 7);
    // Down, its true status is kept too.
    containerd.kill();
    node.run("kill", ["-s", "TERM", &pid.to_string()]);
    wait_for("the end of the init", || {
        node.process(pid)
            .is_none_or(|p| p.state == 'Z')
            .then_some(())
    });
    containerd.start();
    let api = containerd.api("e2e");
    assert_eq!(api.status("c", ""), 23);
    assert_eq!(api.delete("c", "").unwrap().status, 23);
}

fn a_checkpoint_of_the_stock_shim_is_restored_by_ours(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["criu"]);
    let api = containerd.api("e2e");
    let fifos = Fifos::make(&node, "stock");
    let before = fifos.stdout();
    let spec = |id: &str| oci_spec(id, &COUNTER);
    api.run(
        "stock",
        &spec("stock"),
        ShimUnderTest::Stock,
        &only_stdout(&fifos),
    );
    wait_numbers(&before, 5);
    let images = images(&node, "images");
    let exit = CheckpointOptions {
        exit: true,
        ..options(&images)
    };
    api.checkpoint("stock", &exit).unwrap();
    api.status("stock", "");
    api.delete("stock", "").unwrap();
    let last = *parsed(&before.wait_end()).last().unwrap();
    let fifos = Fifos::make(&node, "ours");
    let after = fifos.stdout();
    api.container("ours", &spec("ours"), ShimUnderTest::Recoverd, None);
    api.create_from("ours", &only_stdout(&fifos), &images)
        .unwrap();
    api.start("ours", "").unwrap();
    wait_numbers(&after, 5);
    api.end("ours");
    let first = parsed(&after.wait_end())[0];
    assert!((last..=last + 1).contains(&first), "{last}, then {first}");
}
