//! The hooks around containerd's start: SPEC's rows F3 (our shim was killed while containerd was
//! down), F4 (a stock one was) and F5 (either hangs).

use std::sync::Arc;

use recoverd_common::pb::task::Status;
use recoverd_tests::{
    Container, Containerd, Events, Node, Process, Reader, Release, ShimUnderTest, Task, Traces,
    numbers, wait_for,
};

recoverd_tests::tests! {
    with_each_shim: [
        a_killed_shim_costs_nothing,
        a_hung_shim_costs_nothing,
    ],
}

/// What happens to the shims while containerd is down.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Killed,
    Hung,
}

fn a_killed_shim_costs_nothing(release: &Release, shim: ShimUnderTest) {
    workloads_outlive(release, shim, Fault::Killed);
}

fn a_hung_shim_costs_nothing(release: &Release, shim: ShimUnderTest) {
    workloads_outlive(release, shim, Fault::Hung);
}

/// How the containers of this test end: with 0, with 23, by SIGKILL, by the OOM killer.
struct Ending {
    task: Task,
    status: u32,
    oom: bool,
}

fn endings(containerd: &Containerd, shim: ShimUnderTest) -> Vec<Ending> {
    let node = containerd.node();
    let exiting = |id: &str, status: u32| Ending {
        task: containerd.run(&Container::new(id).shim(shim).command([
            "sh",
            "-c",
            &format!("trap 'exit {status}' TERM; while :; do sleep 1000 & wait $!; done"),
        ])),
        status,
        oom: false,
    };
    let eats = "while [ ! -e /mnt/eat ]; do usleep 20000; done; exec tail /dev/zero";
    vec![
        exiting("zero", 0),
        exiting("some", 23),
        Ending {
            task: containerd.run(&Container::new("killed").shim(shim)),
            status: 137,
            oom: false,
        },
        Ending {
            task: containerd.run(
                &Container::new("oom")
                    .shim(shim)
                    .shares(node)
                    .memory_limit(16 << 20)
                    .command(["sh", "-c", eats]),
            ),
            status: 137,
            oom: true,
        },
    ]
}

/// A pod: three containers in one shim.
fn pod(containerd: &Containerd, shim: ShimUnderTest) -> Vec<Task> {
    let member = |id: &str, name| {
        let container = Container::new(id).shim(shim);
        containerd.run(&container.pod("pause", "prod", "web-0", name))
    };
    vec![
        member("pause", None),
        member("app", Some("app")),
        member("side", Some("side")),
    ]
}

#[track_caller]
fn harm(node: &Node, shims: &[Process], fault: Fault) {
    for shim in shims {
        match fault {
            Fault::Killed => node.kill(shim),
            Fault::Hung => node.freeze(shim),
        }
    }
}

/// The distinct shims of these tasks.
fn shims_of(tasks: &[&Task]) -> Vec<Process> {
    let mut shims: Vec<Process> = Vec::new();
    for task in tasks {
        if !shims.contains(&task.shim) {
            shims.push(task.shim.clone());
        }
    }
    shims
}

#[track_caller]
fn assert_running(containerd: &Containerd, task: &Task) {
    task.assert_init_alive();
    let row = containerd.task(task.namespace(), task.id());
    let row = row.map(|row| (row.pid, row.status));
    assert_eq!(
        row,
        Some((task.init.pid, "RUNNING".to_owned())),
        "{}",
        task.name()
    );
}

fn workloads_outlive(release: &Release, shim: ShimUnderTest, fault: Fault) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);

    let writer = numbers("/mnt/go", "/mnt/stop", "/mnt/init.count");
    let line = format!("{writer}; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 23");
    let single = Container::new("single").shim(shim).shares(&node);
    let single = containerd.run(&single.command(["sh", "-c", &line]));
    let of_exec = numbers("/mnt/exec-go", "/mnt/stop", "/mnt/exec.count");
    let of_exec = format!("{of_exec}; while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7");
    containerd.exec(&single, "session", &["sh", "-c", &of_exec, "session"]);
    let session = node.shell_with("session");
    let init_stream = Reader::open(&node.stdout_of("single"));
    let exec_stream = Reader::open(&node.stdout_of("session"));
    // Between its stock shim's death and its adoption a writer would get EPIPE (SPEC, F4).
    if shim == ShimUnderTest::Recoverd || fault == Fault::Hung {
        for (word, stream) in [("go", &init_stream), ("exec-go", &exec_stream)] {
            node.tell(word);
            stream.wait_advance();
        }
    }
    let pod = pod(&containerd, shim);
    let endings = endings(&containerd, shim);

    containerd.kill();
    // A reader of a fifo whose only writer was the shim would see its end.
    init_stream.away();
    exec_stream.away();
    if shim == ShimUnderTest::Stock && fault == Fault::Hung {
        init_stream.may_lose_a_buffer();
        exec_stream.may_lose_a_buffer();
    }
    let mut all: Vec<&Task> = vec![&single];
    all.extend(&pod);
    all.extend(endings.iter().map(|ending| &ending.task));
    let shims = shims_of(&all);
    harm(&node, &shims, fault);
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    for shim in &shims {
        node.wait_gone(shim);
    }
    containerd.start();
    init_stream.back();
    exec_stream.back();
    let events = Events::of(&containerd);
    let report = containerd.post_start();
    assert_eq!(report.exit, 0, "{report:#?}");
    for task in &all {
        assert_running(&containerd, task);
        let fate = report.fate(task.id());
        assert_eq!(
            (fate.became.as_str(), fate.pid),
            ("adopted", Some(task.init.pid)),
            "{report:#?}"
        );
        let serves = task.shim_now();
        assert!(!shims.contains(&serves));
        assert_eq!(serves.program(), "containerd-shim-recoverd-v1");
    }
    assert!(node.alive(&session), "the exec session ended");
    assert_eq!(report.fate("single").execs.1, 1, "{report:#?}");
    assert_eq!(single.state("session").status(), Status::Running);
    assert_eq!(pod[1].shim_now(), pod[0].shim_now());

    // It is not only there: it works.
    let mut exec = containerd.exec_attached(&single, "hello", &["echo", "hello"]);
    assert!(exec.wait().success(), "{}", exec.text());
    assert_eq!(exec.text(), "hello\n");
    let pids = containerd.ctr_ok("e2e", ["tasks", "ps", "single"]);
    assert!(pids.contains(&session.pid.to_string()), "{pids}");
    containerd.pause(&single);
    containerd.ctr_ok("e2e", ["tasks", "resume", "single"]);

    node.tell("go");
    node.tell("exec-go");
    init_stream.wait_advance();
    exec_stream.wait_advance();
    node.tell("stop");
    let counts = [node.count_in("init.count"), node.count_in("exec.count")];
    node.tell("exec-end");
    assert_eq!(single.wait("session").exit_status, 7);
    node.tell("end");
    assert_eq!(single.wait("").exit_status, 23);
    init_stream.finish(counts[0]);
    exec_stream.finish(counts[1]);
    containerd.delete(&single, 23);

    assert_endings(&containerd, &events, &endings);
    for task in pod.iter().rev() {
        containerd.remove(task);
    }
    before.wait_restored(&node);
}

fn assert_endings(containerd: &Containerd, events: &Events, endings: &[Ending]) {
    let node: &Arc<Node> = containerd.node();
    for ending in endings {
        match (ending.status, ending.oom) {
            (_, true) => node.tell("eat"),
            (137, false) => node.signal(&ending.task.init, "KILL"),
            _ => node.signal(&ending.task.init, "TERM"),
        }
    }
    for Ending { task, status, oom } in endings {
        let id = task.id();
        assert_eq!(task.wait("").exit_status, *status, "{id}");
        let exit = wait_for(&format!("the exit event of {id}"), || {
            events.of_topic(id, "/tasks/exit").pop()
        });
        assert_eq!(exit.number("exit_status"), u64::from(*status), "{id}");
        if *oom {
            wait_for("the OOM event", || events.of_topic(id, "/tasks/oom").pop());
        }
        containerd.delete(task, *status);
    }
}
