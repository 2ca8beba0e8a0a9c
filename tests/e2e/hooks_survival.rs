//! The hooks around containerd's start: SPEC's rows F3 (our shim was killed while containerd was
//! down), F4 (a stock one was) and F5 (either hangs).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
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
    once: [a_successor_has_its_predecessors_surroundings],
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

/// What a shim has from whoever started it, by the kernel's word.
#[derive(Debug, PartialEq, Eq)]
struct Surroundings {
    /// The table of all limits.
    limits: String,
    umask: String,
    nice: String,
    oom_score_adj: String,
    cgroup: String,
    /// The variables that the shim's children need, or that say whose it is; absent ones are not in it.
    variables: BTreeMap<String, String>,
}

impl Surroundings {
    #[track_caller]
    fn of(node: &Node, shim: &Process) -> Surroundings {
        const NAMES: [&str; 6] = [
            "PATH",
            "TTRPC_ADDRESS",
            "GRPC_ADDRESS",
            "NAMESPACE",
            "MAX_SHIM_VERSION",
            "TMPDIR",
        ];
        let text = |file: &str| {
            let path = node.path(format!("/proc/{}/{file}", shim.pid));
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let status = text("status");
        let umask = status.lines().find(|line| line.starts_with("Umask:"));
        // Its name is in parentheses; the first field behind it is the third.
        let stat = text("stat");
        let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
        let environment = text("environ");
        let pairs = environment
            .split('\0')
            .filter_map(|pair| pair.split_once('='));
        let kept = pairs.filter(|(name, _)| NAMES.contains(name));
        Surroundings {
            limits: text("limits"),
            umask: umask.unwrap_or_default().to_owned(),
            nice: fields
                .split_whitespace()
                .nth(16)
                .unwrap_or_default()
                .to_owned(),
            oom_score_adj: text("oom_score_adj"),
            cgroup: text("cgroup"),
            variables: kept
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }
}

/// Our shim, started in surroundings that nothing else here has.
#[track_caller]
fn shim_in_its_own_surroundings(node: &Node) -> PathBuf {
    let path = node.folder().join("containerd-shim-recoverd-v1");
    let script = format!(
        "#!/bin/sh\numask 027; ulimit -n 3001; ulimit -s 9001; unset TMPDIR\n\
         renice -n 5 -p $$ >/dev/null\n\
         PATH=$PATH:/of/containerd exec {} \"$@\"\n",
        node.built("containerd-shim-recoverd-v1").display()
    );
    let write = || {
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
    };
    write().unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    path
}

/// An operator runs the hook by hand, from a shell that has little in common with containerd's unit.
fn a_successor_has_its_predecessors_surroundings(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let runtime = shim_in_its_own_surroundings(&node);
    let task = containerd.run(&Container::new("task").runtime(&runtime));
    let before = Surroundings::of(&node, &task.shim);
    let has_limit = |name: &str, value: &str| {
        let mut lines = before.limits.lines();
        lines.any(|line| line.starts_with(name) && line.contains(value))
    };
    assert!(has_limit("Max open files", " 3001 "), "{before:#?}");
    assert!(has_limit("Max stack size", " 9217024 "), "{before:#?}");
    assert_eq!(
        (before.umask.as_str(), before.nice.as_str()),
        ("Umask:\t0027", "5")
    );
    let of_containerd = format!("{}.ttrpc", containerd.address().display());
    assert_eq!(before.variables["TTRPC_ADDRESS"], of_containerd);
    assert!(
        before.variables["PATH"].ends_with(":/of/containerd"),
        "{before:#?}"
    );

    containerd.kill();
    node.kill(&task.shim);
    let config = node.folder().join("patient.toml");
    fs::write(&config, "[adopt]\ndeadline = \"60s\"\n").unwrap_or_else(|error| panic!("{error}"));
    let line = "umask 077; ulimit -Sn 1001; ulimit -Ss 8001; echo 500 >/proc/self/oom_score_adj
        export PATH=$PATH:/of/a/shell TTRPC_ADDRESS=/of/a/shell GRPC_ADDRESS=/of/a/shell
        export NAMESPACE=shell MAX_SHIM_VERSION=1 TMPDIR=/of/a/shell
        renice -n 9 -p $$ >/dev/null; exec \"$@\"";
    let mut words = vec!["-ec".to_owned(), line.to_owned(), "sh".to_owned()];
    words.push(node.built("recoverd").display().to_string());
    words.extend(["--config".to_owned(), config.display().to_string()]);
    words.extend(containerd.flags());
    words.extend(["pre-start", "--strict", "--deadline", "120s"].map(str::to_owned));
    let hook = node.output("sh", &words);
    assert_eq!(hook.status.code(), Some(0), "{hook:?}");
    let successor = task.shim_now();
    assert_ne!(successor, task.shim);
    assert_eq!(Surroundings::of(&node, &successor), before);
    containerd.start();
    assert_running(&containerd, &task);
    let mut exec = containerd.exec_attached(&task, "hello", &["echo", "hello"]);
    assert!(exec.wait().success(), "{}", exec.text());
    containerd.remove(&task);
}
