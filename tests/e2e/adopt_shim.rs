//! The verb `adopt` of our shim under real containerd and runc: SPEC's rows F3 and F5 for our own
//! shims, without `recoverd`.

use std::io::Write;
use std::process::Stdio;

use recoverd_common::adoption::{Adopted, Adoption};
use recoverd_common::pb::task::Status;
use recoverd_common::record::{self, Record};
use recoverd_common::timestamp::Timestamp;
use recoverd_tests::{
    Container, Containerd, Node, Process, Reader, Release, ShimUnderTest, Task, Traces, numbers,
};

recoverd_tests::tests! {
    on_every_release: [
        tasks_of_a_dead_shim_outlive_the_start_of_containerd,
        a_stopped_shim_is_replaced_and_its_terminal_lives,
        a_stock_shims_task_becomes_ours_dead_stopped_or_at_work,
        a_stock_shims_terminal_lives_when_it_was_only_stopped,
    ],
}

fn ours(id: &str) -> Container {
    Container::new(id).shim(ShimUnderTest::Recoverd)
}

/// Has `task`'s group adopted; the successor is its shim from then on.
#[track_caller]
fn adopt(containerd: &Containerd, task: &mut Task, stopped: bool) -> Adopted {
    adopt_as(containerd, task, stopped, None)
}

/// The record that a stock shim of `task` would have had.
fn stock_record(containerd: &Containerd, task: &Task, terminal: bool) -> Record {
    let node = containerd.node();
    // As the node numbers and names it: it has a cgroup namespace of its own.
    let cgroup = node.shell(&format!("cat /proc/{}/cgroup", task.init.pid));
    let boot_id = node.shell("cat /proc/sys/kernel/random/boot_id");
    let fifo = |name: &str| {
        let found = node.output(
            "sh",
            ["-c", &format!("ls -d /run/containerd/fifo/*/{name}")],
        );
        String::from_utf8_lossy(&found.stdout).trim().to_owned()
    };
    let process = |process: &recoverd_tests::Process| record::Process {
        pid: process.pid,
        start_time: process.start_time,
    };
    Record {
        written_at: Timestamp::now(),
        boot_id: boot_id.trim().to_owned(),
        shim: record::Shim {
            version: String::new(),
            process: process(&task.shim),
            exe: String::new(),
            containerd_address: containerd.address().display().to_string(),
            namespace: task.namespace().to_owned(),
            group_id: task.id().to_owned(),
            socket: task.socket().display().to_string(),
            api_versions: vec![2],
        },
        tasks: vec![record::Task {
            id: task.id().to_owned(),
            bundle: task.bundle().display().to_string(),
            phase: record::Phase::Running,
            init: Some(process(&task.init)),
            runtime: record::Runtime {
                binary: "runc".to_owned(),
                root: format!("/run/containerd/runc/{}", task.namespace()),
                systemd_cgroup: false,
            },
            rootfs: Vec::new(),
            cgroup: cgroup.lines().map(str::to_owned).collect(),
            stdio: record::Stdio {
                stdin: fifo(&format!("{}-stdin", task.id())),
                stdout: fifo(&format!("{}-stdout", task.id())),
                stderr: match terminal {
                    true => String::new(),
                    false => fifo(&format!("{}-stderr", task.id())),
                },
                stdin_closed: false,
                logger: None,
                carried: Vec::new(),
                holders: Vec::new(),
            },
            terminal,
            created_at: Timestamp::now(),
            exit: None,
            oom: false,
            oom_kills: None,
            restore: None,
            execs: Vec::new(),
        }],
        context: record::Context {
            umask: 0o22,
            ..record::Context::default()
        },
        running: Vec::new(),
        descriptors: Vec::new(),
        unanswered: Vec::new(),
        strays: Vec::new(),
    }
}

#[track_caller]
fn adopt_as(
    containerd: &Containerd,
    task: &mut Task,
    stopped: bool,
    record: Option<Record>,
) -> Adopted {
    let node = containerd.node();
    let group = match &record {
        Some(record) => record.shim.group_id.clone(),
        None => task.record().shim.group_id,
    };
    let adoption = Adoption {
        socket: task.socket().to_owned(),
        record,
        predecessor: stopped.then_some(record::Process {
            pid: task.shim.pid,
            start_time: task.shim.start_time,
        }),
        descriptors: Vec::new(),
        observed: Vec::new(),
    };
    let address = containerd.address().display().to_string();
    let mut command = node.command(
        node.built("containerd-shim-recoverd-v1"),
        ["-namespace", task.namespace(), "-address", &address, "-id"],
    );
    command.args([&group, "adopt"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped());
    let mut verb = command
        .spawn()
        .unwrap_or_else(|error| panic!("start adopt: {error}"));
    if let Some(mut stdin) = verb.stdin.take() {
        stdin
            .write_all(&adoption.encode())
            .unwrap_or_else(|error| panic!("write adoption: {error}"));
    }
    let output = verb
        .wait_with_output()
        .unwrap_or_else(|error| panic!("wait for adopt: {error}"));
    assert!(output.status.success(), "{output:?}");
    let adopted = Adopted::decode(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    let shim = node.process(adopted.shim.pid);
    task.shim = shim.unwrap_or_else(|| panic!("no such process: {adopted:?}"));
    adopted
}

/// The process that holds what a client may read of an exec; there is one.
#[track_caller]
fn holder(node: &Node) -> Process {
    let mut found = node.holders();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

fn tasks_of_a_dead_shim_outlive_the_start_of_containerd(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);
    let writer = numbers("/mnt/go", "/mnt/stop", "/mnt/init.count");
    let mut task = containerd.run(&ours("pod").shares(&node).command([
        "sh",
        "-c",
        &format!("{writer}; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 23"),
    ]));
    let mut members: Vec<Task> = (0..2)
        .map(|n| containerd.run(&ours(&format!("member-{n}")).shares(&node).group("pod")))
        .collect();
    for member in &members {
        assert_eq!(member.shim, task.shim);
    }
    let of_exec = numbers("/mnt/exec-go", "/mnt/stop", "/mnt/exec.count");
    let of_exec = format!("{of_exec}; while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7");
    containerd.exec(&task, "session", &["sh", "-c", &of_exec, "session"]);
    let init_stream = Reader::open(&node.stdout_of("pod"));
    node.tell("go");
    init_stream.wait_advance();

    // Twice: an adopted task is adopted like any other.
    for round in 0..2 {
        containerd.kill();
        init_stream.away();
        let holder = holder(&node);
        node.kill(&task.shim);
        // Nobody reads what the exec writes: there is nothing to hold.
        node.wait_gone(&holder);
        let adopted = adopt(&containerd, &mut task, false);
        for member in &mut members {
            member.shim = task.shim.clone();
        }
        let said: Vec<&String> = adopted.tasks.iter().flat_map(|t| &t.remarks).collect();
        assert!(said.is_empty(), "{said:?}");
        assert_eq!(adopted.tasks.len(), 3);
        containerd.start();
        init_stream.back();
        init_stream.wait_advance();
        for task in std::iter::once(&task).chain(&members) {
            task.assert_init_alive();
            task.assert_shim_alive();
            let row = containerd.task("e2e", task.id());
            let row = row.map(|row| (row.pid, row.status));
            assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())));
        }
        assert_eq!(task.state("session").status(), Status::Running);
        // It is not only there: it works.
        let mut exec = containerd.exec_attached(&task, &format!("hello-{round}"), &["echo", "hi"]);
        assert!(exec.wait().success(), "{}", exec.text());
        assert_eq!(exec.text(), "hi\n");
        containerd.pause(&task);
        containerd.ctr_ok("e2e", ["tasks", "resume", "pod"]);
        containerd.ctr_ok("e2e", ["tasks", "metrics", "pod"]);
        containerd.ctr_ok("e2e", ["tasks", "ps", "pod"]);
    }

    // The exec's bytes go through its shim: from now on through this one.
    let exec_stream = Reader::open(&node.stdout_of("session"));
    node.tell("exec-go");
    exec_stream.wait_advance();
    // Without any supervisor: a reader that stays meets no end between the two.
    containerd.kill();
    node.kill(&task.shim);
    let adopted = adopt(&containerd, &mut task, false);
    for member in &mut members {
        member.shim = task.shim.clone();
    }
    assert_eq!(adopted.tasks.len(), 3);
    containerd.start();
    exec_stream.wait_advance();
    node.tell("stop");
    let counts = [node.count_in("init.count"), node.count_in("exec.count")];
    init_stream.away();
    exec_stream.away();
    node.tell("exec-end");
    assert_eq!(task.wait("session").exit_status, 7);
    node.tell("end");
    assert_eq!(task.wait("").exit_status, 23);
    let recorded = task.recorded().exit;
    assert!(
        matches!(recorded, Some(record::Exit::Observed { status: 23, .. })),
        "{recorded:?}"
    );
    init_stream.back();
    exec_stream.back();
    init_stream.finish(counts[0]);
    exec_stream.finish(counts[1]);
    for member in &members {
        containerd.remove(member);
    }
    containerd
        .ctr("e2e", ["tasks", "delete", "pod"])
        .output()
        .unwrap_or_else(|e| panic!("{e}"));
    containerd.ctr_ok("e2e", ["containers", "delete", "pod"]);
    node.wait_gone(&task.shim);
    before.wait_restored(&node);
}

fn a_stopped_shim_is_replaced_and_its_terminal_lives(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut task = containerd.run(&ours("shell").shares(&node).terminal().command([
        "sh",
        "-c",
        "trap 'touch /mnt/hup' HUP; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 5",
    ]));
    containerd.kill();
    node.freeze(&task.shim);
    let adopted = adopt(&containerd, &mut task, true);
    assert_eq!(adopted.tasks[0].remarks, [""; 0]);
    containerd.start();
    task.assert_init_alive();
    task.assert_shim_alive();
    // A terminal without a master is gone: its session would have heard a HUP.
    let width = "stty size </proc/self/fd/0 >/dev/null 2>&1; echo ok";
    let mut exec = containerd.exec_attached(&task, "look", &["sh", "-c", width]);
    assert!(exec.wait().success(), "{}", exec.text());
    assert!(!node.folder().join("hup").exists());
    node.tell("end");
    assert_eq!(task.wait("").exit_status, 5, "{:?}", task.recorded());
    assert!(!node.folder().join("hup").exists());
    let deleted = containerd.ctr("e2e", ["tasks", "delete", "shell"]).output();
    deleted.unwrap_or_else(|e| panic!("{e}"));
    containerd.ctr_ok("e2e", ["containers", "delete", "shell"]);
    node.wait_gone(&task.shim);
}

fn a_stock_shims_task_becomes_ours_dead_stopped_or_at_work(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    for id in ["dead", "stopped", "at-work"] {
        let lives = id != "dead";
        let writer = numbers(
            &format!("/mnt/{id}-go"),
            &format!("/mnt/{id}-stop"),
            &format!("/mnt/{id}.count"),
        );
        let writer =
            format!("{writer}; while [ ! -e /mnt/{id}-end ]; do usleep 20000; done; exit 23");
        let container = Container::new(id)
            .shares(&node)
            .command(["sh", "-c", &writer]);
        let mut task = containerd.run(&container);
        let stream = Reader::open(&node.stdout_of(id));
        let go = format!("{id}-go");
        if lives {
            // Robbed before it is ended: no write of the init ever fails.
            node.tell(&go);
            stream.wait_advance();
        }
        let record = stock_record(&containerd, &task, false);
        containerd.kill();
        stream.away();
        match id {
            "dead" => node.kill(&task.shim),
            "stopped" => node.freeze(&task.shim),
            // It is met between two things that it does.
            _ => {}
        }
        if lives {
            stream.may_lose_a_buffer();
        }
        let adopted = adopt_as(&containerd, &mut task, lives, Some(record));
        assert_eq!(adopted.remarks, [""; 0]);
        assert_eq!(adopted.tasks[0].remarks, [""; 0]);
        stream.back();
        node.tell(&go);
        containerd.start();
        stream.wait_advance();
        task.assert_init_alive();
        task.assert_shim_alive();
        let row = containerd.task("e2e", id);
        let row = row.map(|row| (row.pid, row.status));
        assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())));
        let mut exec = containerd.exec_attached(&task, "hello", &["echo", "hi"]);
        assert!(exec.wait().success(), "{}", exec.text());
        assert_eq!(exec.text(), "hi\n");
        node.tell(&format!("{id}-stop"));
        let count = node.count_in(&format!("{id}.count"));
        node.tell(&format!("{id}-end"));
        assert_eq!(task.wait("").exit_status, 23);
        stream.finish(count);
        let deleted = containerd.ctr("e2e", ["tasks", "delete", id]).output();
        deleted.unwrap_or_else(|e| panic!("{e}"));
        containerd.ctr_ok("e2e", ["containers", "delete", id]);
        node.wait_gone(&task.shim);
    }
}

fn a_stock_shims_terminal_lives_when_it_was_only_stopped(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut task = containerd.run(&Container::new("shell").shares(&node).terminal().command([
        "sh",
        "-c",
        "trap 'touch /mnt/hup' HUP; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 5",
    ]));
    let record = stock_record(&containerd, &task, true);
    containerd.kill();
    node.freeze(&task.shim);
    let adopted = adopt_as(&containerd, &mut task, true, Some(record));
    assert_eq!(adopted.tasks[0].remarks, [""; 0]);
    containerd.start();
    task.assert_init_alive();
    task.assert_shim_alive();
    node.tell("end");
    assert_eq!(task.wait("").exit_status, 5, "{:?}", task.recorded());
    assert!(!node.folder().join("hup").exists());
    let deleted = containerd.ctr("e2e", ["tasks", "delete", "shell"]).output();
    deleted.unwrap_or_else(|e| panic!("{e}"));
    containerd.ctr_ok("e2e", ["containers", "delete", "shell"]);
    node.wait_gone(&task.shim);
}
