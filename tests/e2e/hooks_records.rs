//! What a shim left on disk cannot be trusted, or says something that is no longer so: SPEC's rows
//! F11 (records of every bad kind, a full `/run`) and F12 (pids that are somebody else's by now, a
//! reboot), through the hooks and through `repair`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use recoverd_common::{paths::Beside, pb::task::Status};
use recoverd_tests::{
    Container, Containerd, Node, Process, Reader, Release, ShimUnderTest, Task, numbers, wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    on_every_release: [
        no_record_is_bad_enough_to_cost_a_workload,
        a_full_run_costs_no_workload,
        a_pid_that_is_somebody_elses_is_left_alone,
        a_record_from_before_a_reboot_names_nobody,
    ],
    once: [repair_takes_bad_records_as_the_hook_does],
}

/// Ends with 23 when it is asked to.
const ENDS: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 23' TERM; while :; do sleep 1000 & wait $!; done",
];

/// Every bad record: its name, and the line of shell that makes it of a good one, `$1`.
const BAD: [(&str, &str); 11] = [
    ("missing", "rm $1"),
    ("empty", ": >$1"),
    ("cut", "truncate -s 100 $1"),
    ("garbage", "head -c 4096 /dev/urandom >$1"),
    ("other", "echo '[{\"format\": 1}]' >$1"),
    (
        "future",
        "sed -i 's/\"format\": *1/\"format\":99/' $1; grep -q 99 $1",
    ),
    ("link", "rm $1; ln -s /run/precious $1"),
    ("huge", "truncate -s 1G $1"),
    ("theirs", "chown 1234 $1"),
    ("loose", "chmod 0666 $1"),
    ("fifo", "rm $1; mkfifo $1"),
];

fn record_of(task: &Task) -> PathBuf {
    Beside::of(task.socket()).record
}

/// The orphans of our shim, one with each bad record.
struct Orphans {
    /// Each with an exec of its own.
    tasks: Vec<(Task, Process)>,
    /// Three of one shim, whose record is garbage; the last has an exec.
    pod: [Task; 3],
    pod_exec: Process,
    streaming: Streaming,
}

/// A task without a record whose init and exec write numbers, the init without a pause.
struct Streaming {
    task: Task,
    exec: Process,
    of_init: Reader,
    of_exec: Reader,
}

/// A pod: three containers in one shim.
#[track_caller]
fn pod_of<const N: usize>(
    containerd: &Containerd,
    shim: ShimUnderTest,
    sandbox: &str,
    command: [&str; N],
) -> [Task; 3] {
    [None, Some("app"), Some("side")].map(|name| {
        let id = name.map_or_else(|| sandbox.to_owned(), |name| format!("{sandbox}-{name}"));
        let container = Container::new(&id).shim(shim).command(command);
        containerd.run(&container.pod(sandbox, "prod", sandbox, name))
    })
}

/// An exec that lives for ever, of a container of our shim.
#[track_caller]
fn exec_in(containerd: &Containerd, task: &Task) -> Process {
    let id = exec_of(task.id());
    let line = "while :; do sleep 1000; done";
    containerd.exec(task, &id, &["sh", "-c", line, &id]);
    containerd.node().shell_with(&id)
}

/// The id of a task's exec.
fn exec_of(task: &str) -> String {
    format!("in-{task}")
}

impl Streaming {
    #[track_caller]
    fn start(node: &Arc<Node>, containerd: &Containerd) -> Streaming {
        let init = numbers("/mnt/go", "/mnt/stop", "/mnt/init.count");
        let init = format!("{init}; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 23");
        let container = Container::new("streaming").shim(ShimUnderTest::Recoverd);
        let task = containerd.run(&container.shares(node).command(["sh", "-c", &init]));
        let exec = numbers("/mnt/exec-go", "/mnt/stop", "/mnt/exec.count");
        let exec = format!("{exec}; while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7");
        let id = exec_of("streaming");
        containerd.exec(&task, &id, &["sh", "-c", &exec, &id]);
        let streaming = Streaming {
            exec: node.shell_with(&id),
            of_init: Reader::open(&node.stdout_of("streaming")),
            of_exec: Reader::open(&node.stdout_of(&id)),
            task,
        };
        // It would see the end of its stream: the shim is the only writer of an exec's.
        streaming.of_exec.away();
        node.tell("go");
        streaming.of_init.wait_advance();
        streaming
    }

    /// Its exec lives under its own name, and no byte of either is lost.
    #[track_caller]
    fn finish(self, containerd: &Containerd) {
        let node = containerd.node();
        let (task, id) = (self.task, exec_of("streaming"));
        task.assert_init_alive();
        assert!(node.alive(&self.exec));
        assert_eq!(task.state(&id).status(), Status::Running);
        // Before its adoption it would have had EPIPE: its pipe was its shim's.
        node.tell("exec-go");
        self.of_exec.back();
        self.of_init.wait_advance();
        self.of_exec.wait_advance();
        node.tell("stop");
        let counts = [node.count_in("init.count"), node.count_in("exec.count")];
        node.tell("exec-end");
        assert_eq!(task.wait(&id).exit_status, 7);
        node.tell("end");
        assert_eq!(task.wait("").exit_status, 23);
        self.of_init.finish(counts[0]);
        self.of_exec.finish(counts[1]);
        containerd.delete(&task, 23);
    }
}

/// One orphan of our shim with each bad record; containerd is down.
#[track_caller]
fn orphans_with_bad_records(node: &Arc<Node>, containerd: &mut Containerd) -> Orphans {
    node.shell("echo precious >/run/precious");
    let run = |(name, _): &(&str, &str)| {
        let container = Container::new(name).shim(ShimUnderTest::Recoverd);
        let task = containerd.run(&container.command(ENDS));
        let exec = exec_in(containerd, &task);
        (task, exec)
    };
    let tasks: Vec<(Task, Process)> = BAD.iter().map(run).collect();
    let pod = pod_of(containerd, ShimUnderTest::Recoverd, "pod", ENDS);
    let pod_exec = exec_in(containerd, &pod[2]);
    let streaming = Streaming::start(node, containerd);
    containerd.kill();
    let all = tasks.iter().map(|(task, _)| task).zip(BAD);
    let garbage = BAD.iter().find(|(name, _)| *name == "garbage");
    let garbage = *garbage.unwrap_or_else(|| panic!("no record is garbage"));
    let more = [(&streaming.task, BAD[0]), (&pod[0], garbage)];
    for (task, (_, line)) in all.chain(more) {
        node.kill(&task.shim);
        let record = record_of(task).display().to_string();
        node.run("sh", ["-ec", line, "sh", &record]);
    }
    Orphans {
        tasks,
        pod,
        pod_exec,
        streaming,
    }
}

/// All live, work, and end with their true status, and so do their execs, under their own names.
#[track_caller]
fn assert_orphans_well(node: &Arc<Node>, containerd: &Containerd, orphans: Orphans) {
    let serves = orphans.pod[0].shim_now();
    for member in &orphans.pod {
        assert_eq!(member.shim_now(), serves, "{}", member.name());
    }
    let of_pod = [(&orphans.pod[2], &orphans.pod_exec)];
    let singles = orphans.tasks.iter().map(|(task, exec)| (task, exec));
    for (task, exec) in singles.chain(of_pod) {
        let id = exec_of(task.id());
        assert!(node.alive(exec), "{}", task.name());
        assert_eq!(task.state(&id).status(), Status::Running);
        node.kill(exec);
        assert_eq!(task.wait(&id).exit_status, 137, "{}", task.name());
    }
    let tasks: Vec<Task> = orphans.tasks.into_iter().map(|(task, _)| task).collect();
    assert_well(node, containerd, &tasks);
    let last_first: Vec<Task> = orphans.pod.into_iter().rev().collect();
    assert_well(node, containerd, &last_first);
    orphans.streaming.finish(containerd);
}

/// All live, work, and end with their true status.
#[track_caller]
fn assert_well(node: &Arc<Node>, containerd: &Containerd, tasks: &[Task]) {
    for task in tasks {
        task.assert_init_alive();
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"), "{}", task.name());
        assert_eq!(task.shim_now().program(), "containerd-shim-recoverd-v1");
        node.signal(&task.init, "TERM");
        assert_eq!(task.wait("").exit_status, 23, "{}", task.name());
        containerd.delete(task, 23);
    }
}

#[track_caller]
fn assert_precious(node: &Node) {
    assert_eq!(node.shell("cat /run/precious"), "precious\n");
}

fn no_record_is_bad_enough_to_cost_a_workload(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let orphans = orphans_with_bad_records(&node, &mut containerd);
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    let report = containerd.post_start();
    let singles = orphans.tasks.iter().map(|(task, _)| (task, 1));
    let members = orphans.pod.iter().zip([0, 0, 1]);
    for (task, execs) in singles.chain(members) {
        let fate = report.fate(task.id());
        assert_eq!(
            (fate.became.as_str(), fate.execs.1),
            ("adopted", execs),
            "{report:#?}"
        );
    }
    assert_orphans_well(&node, &containerd, orphans);
    assert_precious(&node);
}

fn repair_takes_bad_records_as_the_hook_does(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let orphans = orphans_with_bad_records(&node, &mut containerd);
    // How long it takes is not what is proven here.
    let config = node.folder().join("patient.toml");
    fs::write(&config, "[adopt]\ndeadline = \"60s\"\n").unwrap_or_else(|error| panic!("{error}"));
    let config = config.display().to_string();
    let output = node.recoverd(["--config", &config, "repair", "--apply"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // What was wrong is kept for whoever wants to know, and is a finding no more.
    let kept = node.shell("ls /run/containerd/recoverd-quarantine");
    assert!(kept.lines().count() >= BAD.len(), "{kept}");
    let scan = node.scan();
    assert_eq!(scan.all_codes(), [""; 0], "{scan:#?}");
    containerd.start();
    assert_orphans_well(&node, &containerd, orphans);
    assert_precious(&node);
}

fn a_full_run_costs_no_workload(release: &Release) {
    for (what, limit) in [
        (
            "bytes",
            "size=$(df -k --output=used /run | tail -n1 | tr -d ' ')k",
        ),
        (
            "inodes",
            "nr_inodes=$(df --output=iused /run | tail -n1 | tr -d ' ')",
        ),
    ] {
        let node = Node::start();
        let mut containerd = node.containerd(release);
        let tasks: Vec<Task> = [ShimUnderTest::Recoverd, ShimUnderTest::Stock]
            .into_iter()
            .map(|shim| {
                let id = format!("{shim:?}").to_lowercase();
                containerd.run(&Container::new(&id).shim(shim).command(ENDS))
            })
            .collect();
        containerd.kill();
        for task in &tasks {
            node.kill(&task.shim);
        }
        node.shell(&format!("mount -o remount,{limit} /run"));
        let full = node.output("sh", ["-c", "echo more >/run/more"]);
        assert!(!full.status.success(), "{what}: there is room");
        let hook = containerd.pre_start();
        tasks[0].assert_init_alive();
        assert_eq!(tasks[0].shim_now().program(), "containerd-shim-recoverd-v1");
        if what == "bytes" {
            assert_eq!(hook.exit, 0, "{hook:?}");
        } else {
            // Ours has its files already. A stock shim's task has none, and there is none to be had.
            assert_eq!(hook.exit, 1, "{hook:?}");
            assert!(
                hook.line.contains("e2e/stock: lock") && hook.line.contains("No space left"),
                "{hook:?}"
            );
        }
        node.shell("mount -o remount,size=50%,nr_inodes=1000000 /run");
        let hook = containerd.pre_start();
        assert_eq!(hook.exit, 0, "{what}: {hook:?}");
        containerd.start();
        assert_well(&node, &containerd, &tasks);
    }
}

/// A process of the node that has got this very pid.
#[track_caller]
fn stranger(node: &Arc<Node>, pid: u32) -> Process {
    let line = format!(
        "echo {} >/proc/sys/kernel/ns_last_pid; setsid sleep 100001 >/dev/null 2>&1 </dev/null & echo $!",
        pid - 1
    );
    wait_for(&format!("a stranger with pid {pid}"), || {
        let got: u32 = node.shell(&line).trim().parse().ok()?;
        let process = node.process(got)?;
        if got == pid {
            // It begins as a copy of the shell.
            return wait_for("its program", || {
                let now = node.process(pid)?;
                (now.program() == "sleep").then_some(Some(now))
            });
        }
        node.kill(&process);
        None
    })
}

/// Everything that recoverd and containerd do about what is dead leaves these processes alone, and
/// how the tasks ended whose place they have is unknown, and said with the reason.
#[track_caller]
fn assert_strangers_outlive_everything(
    node: &Arc<Node>,
    containerd: &mut Containerd,
    strangers: &[Process],
    ended: &[&Task],
) {
    let untouched = |after: &str| {
        for stranger in strangers {
            assert!(node.alive(stranger), "{stranger:?} was ended by {after}");
        }
    };
    let all = ["repair", "--apply", "--allow", "kill", "--allow", "delete"];
    containerd.pre_start();
    untouched("pre-start");
    node.recoverd(all);
    untouched("repair");
    containerd.start();
    untouched("containerd's start");
    let report = containerd.post_start();
    for task in ended {
        let fate = report.fate(task.id());
        let became = (fate.became.as_str(), fate.exit);
        assert_eq!(became, ("exited", None), "{report:#?}");
        let told = ["status unknown: ", "nobody recorded how"];
        assert!(told.iter().any(|why| fate.why.contains(why)), "{report:#?}");
    }
    let age = ["--min-age", "0s"];
    node.recoverd(all.into_iter().chain(age));
    untouched("the last repair");
}

fn a_pid_that_is_somebody_elses_is_left_alone(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let sleeps = ["sleep", "100000"];
    let of_each = |shim: ShimUnderTest| {
        let id = format!("{shim:?}").to_lowercase();
        let single = containerd.run(&Container::new(&id).shim(shim).command(sleeps));
        let pod = pod_of(&containerd, shim, &format!("{id}-pod"), sleeps);
        [single].into_iter().chain(pod)
    };
    let both = [ShimUnderTest::Recoverd, ShimUnderTest::Stock].into_iter();
    let tasks: Vec<Task> = both.flat_map(of_each).collect();
    containerd.kill();
    // A pod has one shim.
    let shims: BTreeMap<u32, &Process> = tasks.iter().map(|t| (t.shim.pid, &t.shim)).collect();
    shims.values().for_each(|shim| node.kill(shim));
    tasks.iter().for_each(|task| node.kill(&task.init));
    let inits = tasks.iter().map(|task| &task.init);
    let dead: Vec<&Process> = shims.into_values().chain(inits).collect();
    for process in &dead {
        wait_for("the pid to be free", || {
            node.process(process.pid).is_none().then_some(())
        });
    }
    let strangers = dead.iter().map(|process| stranger(&node, process.pid));
    let strangers: Vec<Process> = strangers.collect();
    // What looks like a shim by its number is none, and what has an init's number is no init.
    let scan = node.scan();
    for task in &tasks {
        let seen = scan.task(&task.name());
        assert!(seen.shim.is_none(), "{seen:?}");
        assert_eq!(seen.phase, json!("stopped"), "{seen:?}");
    }
    let ended: Vec<&Task> = tasks.iter().collect();
    assert_strangers_outlive_everything(&node, &mut containerd, &strangers, &ended);
    for task in &tasks {
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_ne!(row.as_deref(), Some("RUNNING"), "{}", task.name());
    }
}

fn a_record_from_before_a_reboot_names_nobody(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let ours = Container::new("before").shim(ShimUnderTest::Recoverd);
    let task = containerd.run(&ours.command(["sleep", "100000"]));
    containerd.kill();
    node.kill(&task.shim);
    node.kill(&task.init);
    wait_for("the pid to be free", || {
        node.process(task.init.pid).is_none().then_some(())
    });
    let stranger = stranger(&node, task.init.pid);
    // By chance the stranger has even the start time: only the boot is another one.
    let path = node.path(record_of(&task));
    let text = fs::read(&path).unwrap_or_else(|error| panic!("{error}"));
    let mut record: Value = serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{error}"));
    record["boot_id"] = json!("00000000-0000-0000-0000-000000000000");
    record["tasks"][0]["init"]["start_time"] = json!(stranger.start_time);
    fs::write(&path, record.to_string()).unwrap_or_else(|error| panic!("{error}"));
    let scan = node.scan();
    assert!(scan.all_codes().contains(&"stale-record"), "{scan:#?}");
    assert_eq!(scan.task("e2e/before").phase, json!("stopped"), "{scan:#?}");
    assert_strangers_outlive_everything(&node, &mut containerd, &[stranger], &[&task]);
    assert_eq!(containerd.task("e2e", "before"), None);
}
