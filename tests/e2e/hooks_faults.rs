//! The hooks around containerd's start, beyond one shim that is dead or hangs: held terminals and
//! standard inputs, log files, exits that nobody saw, many at once, everything killed at once, and
//! what the hooks leave alone.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use recoverd_common::record::Exit;
use recoverd_tests::{
    Container, Containerd, HeldStdio, Node, Process, Release, ShimUnderTest, Task, Traces, built,
    numbers, wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    with_each_shim: [
        a_held_terminal_and_stdin_outlive_a_hung_shim,
        an_end_of_stdin_outlives_a_hung_shim,
        a_log_file_goes_on_with_what_is_known_of_it,
        an_exit_that_nobody_saw_is_unknown_and_not_guessed,
        a_shim_whose_socket_was_removed_is_replaced,
    ],
    on_every_release: [
        fifty_orphans_are_adopted_half_ours_half_stock,
        everything_killed_at_once_under_load,
        pre_start_leaves_a_containerd_that_runs_alone,
        a_dead_bundle_that_would_stall_the_start_is_set_aside,
        a_foreign_shim_that_hangs_is_ended_only_if_told,
    ],
    once_with_each_shim: [a_logger_reads_on_whoever_its_shim_is],
    once: [
        one_that_cannot_be_replaced_costs_no_other_its_task,
        a_containerd_that_comes_meanwhile_loses_no_other_shim,
        what_is_orphaned_is_adopted_whoever_holds_the_lock,
        what_there_was_no_time_for_is_said_and_an_orphan_comes_first,
        a_start_a_hook_and_two_repairs_at_once_have_one_winner,
        a_verb_of_a_containerd_that_is_gone_ends_no_workload,
        the_journal_gets_one_line_of_each_hook_and_people_a_table,
    ],
}

/// Both hooks around a start, as the unit runs them; what the second one told of these tasks.
#[track_caller]
fn start_with_hooks(containerd: &mut Containerd, adopted: &[&Task]) {
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    let report = containerd.post_start();
    assert_eq!(report.exit, 0, "{report:#?}");
    for task in adopted {
        task.assert_init_alive();
        let fate = report.fate(task.id());
        assert_eq!(
            (fate.became.as_str(), fate.pid),
            ("adopted", Some(task.init.pid)),
            "{report:#?}"
        );
    }
}

fn a_held_terminal_and_stdin_outlive_a_hung_shim(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let held = HeldStdio::run(&containerd, shim);
    containerd.kill();
    for task in held.tasks() {
        node.freeze(&task.shim);
    }
    start_with_hooks(&mut containerd, &held.tasks());
    for task in held.tasks() {
        assert!(!node.alive(&task.shim), "{}", task.name());
    }
    held.assert_goes_on(&containerd);
}

/// The client has ended it, and the process has not come to that yet.
fn an_end_of_stdin_outlives_a_hung_shim(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let line = "trap '' TERM; while [ ! -e /mnt/go ]; do usleep 20000; done; cat >/mnt/got; exit 9";
    let reads = Container::new("reads").shim(shim).shares(&node);
    let (task, mut client) = containerd.run_given(&reads.command(["sh", "-c", line]), "all of it");
    let theirs = fs::read_link(node.path(format!("/proc/{}/fd/0", task.init.pid)));
    let theirs = theirs.unwrap_or_else(|error| panic!("its stdin: {error}"));
    wait_for("the shim to have closed its side", || {
        let shim = node.path(format!("/proc/{}", task.shim.pid));
        let all = fs::read_dir(shim.join("fd")).unwrap_or_else(|error| panic!("{error}"));
        let writes = all.filter_map(Result::ok).any(|entry| {
            let info = fs::read_to_string(shim.join("fdinfo").join(entry.file_name()));
            let is_it = fs::read_link(entry.path()).is_ok_and(|target| target == theirs);
            // Octal, and the last digit is 1 or 2 for who writes.
            let reads = info.is_ok_and(|info| {
                let mut flags = info.lines().filter_map(|line| line.strip_prefix("flags:"));
                flags.any(|flags| flags.ends_with(['0', '4']))
            });
            is_it && !reads
        });
        (!writes).then_some(())
    });
    containerd.kill();
    client.wait();
    node.freeze(&task.shim);
    start_with_hooks(&mut containerd, &[&task]);
    assert!(!node.alive(&task.shim));
    node.tell("go");
    assert_eq!(task.wait("").exit_status, 9);
    let got = fs::read_to_string(node.folder().join("got"));
    assert_eq!(got.ok().as_deref(), Some("all of it"));
    containerd.delete(&task, 9);
}

fn a_log_file_goes_on_with_what_is_known_of_it(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let log = |id: &str| node.folder().join(format!("{id}.log"));
    let writer = |id: &str| {
        let line = numbers(
            &format!("/mnt/{id}-go"),
            "/mnt/stop",
            &format!("/mnt/{id}.count"),
        );
        let line = format!("{line}; exit 4");
        let uri = format!("file://{}", log(id).display());
        let container = Container::new(id).shim(shim).shares(&node).log_uri(&uri);
        containerd.run(&container.command(["sh", "-c", &line]))
    };
    let (killed, hung) = (writer("killed"), writer("hung"));
    let length = |id: &str| fs::metadata(log(id)).map_or(0, |meta| meta.len());
    let grows = |id: &str| {
        let before = length(id);
        wait_for(&format!("{id}.log to grow"), || {
            (length(id) > before).then_some(())
        });
    };
    node.tell("hung-go");
    grows("hung");
    let ours = shim == ShimUnderTest::Recoverd;
    // Without its stock shim a writer gets EPIPE (SPEC, F4): it begins after the adoption.
    if ours {
        node.tell("killed-go");
        grows("killed");
    }
    containerd.kill();
    node.kill(&killed.shim);
    node.freeze(&hung.shim);
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    let report = containerd.post_start();
    assert_eq!(report.exit, 0, "{report:#?}");
    node.tell("killed-go");
    grows("hung");
    if ours {
        grows("killed");
    } else {
        // Where a stock shim wrote was in its memory only: nothing is guessed, and it is told.
        let why = &report.fate("killed").why;
        assert!(why.contains("stdout"), "{report:#?}");
    }
    node.tell("stop");
    for task in [&killed, &hung] {
        assert_eq!(task.wait("").exit_status, 4);
        let id = task.id();
        let count = node.count_in(&format!("{id}.count"));
        containerd.delete(task, 4);
        if ours || id == "hung" {
            let text = fs::read_to_string(log(id)).unwrap_or_else(|error| panic!("{error}"));
            assert_numbered(&text, count, ours);
        }
    }
}

/// A logger reads the pipe itself: a successor that read it too would take lines from it.
fn a_logger_reads_on_whoever_its_shim_is(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let log = node.folder().join("logged");
    let logger = node.folder().join("logger");
    let script = "#!/bin/sh\nexec 5>&-\nexec cat <&3 >\"$2\"\n";
    fs::write(&logger, script).unwrap_or_else(|error| panic!("{error}"));
    node.run("chmod", ["+x".as_ref(), logger.as_os_str()]);
    let line = numbers("/mnt/go", "/mnt/stop", "/mnt/count");
    let uri = format!("binary://{}?out={}", logger.display(), log.display());
    let container = Container::new("logged")
        .shim(shim)
        .shares(&node)
        .log_uri(&uri);
    let task = containerd.run(&container.command(["sh", "-c", &format!("{line}; exit 4")]));
    let length = || fs::metadata(&log).map_or(0, |meta| meta.len());
    let grows = || {
        let before = length();
        wait_for("the log to grow", || (length() > before).then_some(()));
    };
    node.tell("go");
    grows();
    containerd.kill();
    node.freeze(&task.shim);
    let hook = containerd.pre_start();
    assert!(hook.line.contains("1 replaced"), "{hook:?}");
    containerd.start();
    assert_ne!(task.shim_now(), task.shim);
    grows();
    node.tell("stop");
    assert_eq!(task.wait("").exit_status, 4);
    let count = node.count_in("count");
    let all: String = (1..=count).map(|number| format!("{number}\n")).collect();
    wait_for("the logger to be done", || {
        (length() >= all.len() as u64).then_some(())
    });
    let text = fs::read_to_string(&log).unwrap_or_else(|error| panic!("{error}"));
    assert!(text == all, "{} of {} bytes", text.len(), all.len());
    containerd.delete(&task, 4);
}

/// Every number from 1 to `count` in order. A stock shim copies through its own memory: what it had
/// read and not yet written when it was stopped dies with it, one buffer at most.
#[track_caller]
fn assert_numbered(text: &str, count: u64, whole: bool) {
    const BUFFER: usize = 32 << 10;
    let all: String = (1..=count).map(|number| format!("{number}\n")).collect();
    if text == all {
        return;
    }
    let same = |(a, b): &(u8, u8)| a == b;
    let before = text.bytes().zip(all.bytes()).take_while(same).count();
    let rest = text.len().saturating_sub(before);
    let resumes = all.len().saturating_sub(rest);
    let lost = resumes.saturating_sub(before);
    let in_order = text.get(before..) == all.get(resumes..);
    assert!(
        !whole && in_order && lost <= BUFFER,
        "{} of {} bytes, the first {before} in order",
        text.len(),
        all.len()
    );
}

fn an_exit_that_nobody_saw_is_unknown_and_not_guessed(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);
    let waits = |id: &str| {
        let line = format!("while [ ! -e /mnt/{id}-end ]; do usleep 20000; done; exit 23");
        Container::new(id)
            .shim(shim)
            .shares(&node)
            .command(["sh", "-c", &line])
    };
    let single = containerd.run(&waits("single"));
    let pause = containerd.run(&waits("pause").pod("pause", "prod", "web-0", None));
    let app = containerd.run(&waits("app").pod("pause", "prod", "web-0", Some("app")));
    containerd.kill();
    node.kill(&single.shim);
    node.kill(&pause.shim);
    for task in [&single, &app] {
        node.tell(&format!("{}-end", task.id()));
        // By its new parent: from now on nobody can know.
        task.wait_collected();
    }
    let hook = containerd.pre_start();
    containerd.start();
    let report = containerd.post_start();
    for task in [&single, &app] {
        let fate = report.fate(task.id());
        assert_eq!(
            (fate.became.as_str(), fate.exit),
            ("exited", None),
            "{report:#?}"
        );
        assert!(!fate.why.is_empty(), "{report:#?}");
    }
    pause.assert_init_alive();
    assert_eq!(report.fate("pause").became, "adopted", "{report:#?}");
    let row = |id: &str| containerd.task("e2e", id).map(|row| row.status);
    assert_eq!(row("pause").as_deref(), Some("RUNNING"));
    // A pod is one shim's: its ended member is known, with the status that containerd itself makes
    // up where it has none, and the record says that it is none.
    let known: Vec<&Task> = match shim {
        ShimUnderTest::Recoverd => {
            assert_eq!(hook.exit, 0, "{hook:?}");
            vec![&app, &single]
        }
        ShimUnderTest::Stock => {
            assert!(hook.line.contains("1 lost before"), "{hook:?}");
            assert_eq!(row("single"), None);
            vec![&app]
        }
    };
    for task in known {
        assert_eq!(row(task.id()).as_deref(), Some("STOPPED"));
        let recorded = task.recorded().exit;
        assert!(
            matches!(recorded, Some(Exit::Unknown { .. })),
            "{recorded:?}"
        );
        let stand_in = task.wait("").exit_status;
        assert!([137, 255].contains(&stand_in), "{stand_in}");
        containerd.delete(task, stand_in);
    }
    containerd.remove(&pause);
    if shim == ShimUnderTest::Stock {
        // The socket of the dead stock shim: containerd never removes it, and knows whose it was.
        let words = [
            "repair",
            "--apply",
            "--only",
            "stale-socket",
            "--min-age",
            "0s",
        ];
        let output = node.recoverd(words);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        containerd.ctr_ok("e2e", ["containers", "delete", "single"]);
    }
    before.wait_restored(&node);
}

fn a_shim_whose_socket_was_removed_is_replaced(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("lost").shim(shim));
    // Its address is lost, and it listens: that is put right, and nobody is replaced.
    let well = containerd.run(&Container::new("moved").shim(shim));
    containerd.kill();
    node.run("rm", [task.socket()]);
    let bundle = well.bundle().display();
    node.shell(&format!("rm -f {bundle}/address {bundle}/bootstrap.json"));
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    assert!(hook.line.contains("1 address files written"), "{hook:?}");
    assert_names_its_socket(
        &well,
        shim == ShimUnderTest::Recoverd || release.major() < 2,
    );
    node.wait_gone(&task.shim);
    containerd.start();
    for task in [&task, &well] {
        task.assert_init_alive();
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"), "{}", task.name());
    }
    well.assert_shim_alive();
    let report = containerd.post_start();
    assert_eq!(report.fate("lost").became, "adopted", "{report:#?}");
    assert_eq!(report.fate("moved").became, "kept", "{report:#?}");
}

/// One file is enough for whoever can speak to its shim: `address` for every containerd, and
/// `bootstrap.json` where the shim has the third API only, which 1.x could do nothing with.
#[track_caller]
fn assert_names_its_socket(task: &Task, speaks_second: bool) {
    let text = |name: &str| fs::read_to_string(task.node().path(task.bundle()).join(name)).ok();
    let socket = format!("unix://{}", task.socket().display());
    let (address, bootstrap) = (text("address"), text("bootstrap.json"));
    if speaks_second {
        assert_eq!((address, bootstrap), (Some(socket), None));
        return;
    }
    let json: Option<Value> = bootstrap.and_then(|text| serde_json::from_str(&text).ok());
    let expected = json!({"version": 3, "address": socket, "protocol": "ttrpc"});
    assert_eq!((address, json), (None, Some(expected)));
}

fn fifty_orphans_are_adopted_half_ours_half_stock(release: &Release) {
    const EACH: usize = 25;
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut tasks: Vec<Task> = Vec::new();
    for (shim, word) in [
        (ShimUnderTest::Recoverd, "ours"),
        (ShimUnderTest::Stock, "stock"),
    ] {
        for n in 0..EACH {
            let id = format!("{word}-{n}");
            let container = Container::new(&id).shim(shim);
            tasks.push(containerd.run(&container.command(["sleep", "100000"])));
        }
    }
    containerd.kill();
    let pids: Vec<String> = tasks.iter().map(|task| task.shim.pid.to_string()).collect();
    node.shell(&format!("kill -KILL {}", pids.join(" ")));
    for task in &tasks {
        node.wait_gone(&task.shim);
    }
    let all: Vec<&Task> = tasks.iter().collect();
    start_with_hooks(&mut containerd, &all);
    let rows = containerd.tasks("e2e");
    assert_eq!(rows.len(), tasks.len());
    assert!(rows.iter().all(|row| row.status == "RUNNING"), "{rows:#?}");
    let serving: BTreeSet<u32> = tasks.iter().map(|task| task.shim_now().pid).collect();
    assert_eq!(serving.len(), tasks.len(), "each has a shim of its own");
    assert_eq!(node.shims().len(), tasks.len(), "and there is no other");
}

fn everything_killed_at_once_under_load(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut steady: Vec<Task> = Vec::new();
    for (shim, word) in [
        (ShimUnderTest::Recoverd, "ours"),
        (ShimUnderTest::Stock, "stock"),
    ] {
        for n in 0..2 {
            let container = Container::new(&format!("{word}-{n}")).shim(shim);
            steady.push(containerd.run(&container.command(["sleep", "100000"])));
        }
    }
    let address = containerd.address().display().to_string();
    let ctr = containerd
        .release()
        .folder
        .join("ctr")
        .display()
        .to_string();
    let root = Release::rootfs().display().to_string();
    let ours = ShimUnderTest::Recoverd.runtime().display().to_string();
    // Containers and execs come and go in both kinds of shims; some call is always under way.
    let churn = |runtime: &str, word: &str| {
        let line = format!(
            "n=0; while [ ! -e {folder}/over ]; do n=$((n+1))
             {ctr} --address {address} -n e2e run --rm --env PATH=/bin --runtime {runtime} --rootfs {root} churn-{word}-$n true
             {ctr} --address {address} -n e2e tasks exec --exec-id e-{word}-$n {word}-0 true
             echo $n >{folder}/churn-{word}; done",
            folder = node.folder().display(),
        );
        node.spawn("sh", ["-c", &line])
    };
    let load = [
        churn(&ours, "ours"),
        churn("io.containerd.runc.v2", "stock"),
    ];
    wait_for("the load to be under way", || {
        let round = |word| fs::read_to_string(node.folder().join(format!("churn-{word}"))).ok();
        (round("ours").is_some() && round("stock").is_some()).then_some(())
    });
    // One command for all of them, containerd first: one that sees a shim's end ends its workload.
    let daemon = containerd.process();
    let shims: Vec<Process> = node.shims();
    let all = [&daemon].into_iter().chain(&shims);
    let pids: Vec<String> = all.map(|process| process.pid.to_string()).collect();
    let words = ["-KILL"].into_iter().chain(pids.iter().map(String::as_str));
    node.output("kill", words);
    node.tell("over");
    containerd.gone();
    for process in &shims {
        node.wait_gone(process);
    }
    let all: Vec<&Task> = steady.iter().collect();
    let hook = containerd.pre_start();
    // Whoever reads the output of an exec sees its end with the adoption at the latest.
    for running in &load {
        node.wait_gone(&running.process);
    }
    // Of what was half made, some may have nobody to tell how it ended.
    for task in &all {
        task.assert_init_alive();
        assert!(!hook.line.contains(&task.name()), "not adopted: {hook:?}");
    }
    containerd.start();
    let report = containerd.post_start();
    for task in &all {
        task.assert_init_alive();
        assert_eq!(report.fate(task.id()).became, "adopted", "{report:#?}");
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"));
        let mut exec = containerd.exec_attached(task, "hello", &["echo", "hello"]);
        assert!(exec.wait().success(), "{}", exec.text());
    }
    // What was half made is gone, or can be ended in the usual way.
    for row in containerd.tasks("e2e") {
        if row.id.starts_with("churn-") {
            containerd.ctr_ok("e2e", ["tasks", "delete", "--force", &row.id]);
        }
    }
}

fn pre_start_leaves_a_containerd_that_runs_alone(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let mut other = node.second_containerd(release, "other");
    let hung = containerd.run(&Container::new("hung"));
    let orphan = other.run(&Container::new("orphan"));
    node.freeze(&hung.shim);
    other.kill();
    node.kill(&orphan.shim);
    let before = node.shims();
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 1, "{hook:?}");
    let pid = containerd.process().pid;
    assert!(
        hook.line
            .contains(&format!("runs (pid {pid}): nothing done")),
        "{hook:?}"
    );
    assert!(node.alive(&hung.shim));
    hung.assert_init_alive();
    assert_eq!(node.shims(), before, "a shim was started or ended");
    // The other one is down, and is helped while the first one runs; that one's are not touched.
    start_with_hooks(&mut other, &[&orphan]);
    assert!(node.alive(&hung.shim));
    hung.assert_init_alive();
}

/// A bundle with a dead init and a shim that hangs, as it is found while containerd is down.
fn dead_and_hung(node: &Arc<Node>, task: &Task) {
    // Its shim collects it first: a zombie would still tell its status.
    task.kill_init();
    node.freeze(&task.shim);
}

fn a_dead_bundle_that_would_stall_the_start_is_set_aside(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well = containerd.run(&Container::new("well"));
    let stock = containerd.run(&Container::new("dead"));
    let ours = containerd.run(&Container::new("kept").shim(ShimUnderTest::Recoverd));
    containerd.kill();
    dead_and_hung(&node, &stock);
    dead_and_hung(&node, &ours);
    let hook = containerd.pre_start();
    let done = "1 bundles set aside, 1 hung shims ended";
    assert!(hook.line.contains(done), "{hook:?}");
    assert!(!node.path(stock.bundle()).exists());
    let kept = node.shell("ls /run/containerd/recoverd-quarantine");
    assert!(kept.contains("e2e-dead"), "{kept}");
    containerd.start();
    well.assert_init_alive();
    well.assert_shim_alive();
    assert_eq!(containerd.task("e2e", "dead"), None);
    let report = containerd.post_start();
    assert_eq!(report.fate("well").became, "kept");
    let fate = report.fate("dead");
    assert_eq!(
        (fate.became.as_str(), fate.exit),
        ("exited", None),
        "{report:#?}"
    );
    // Ours had written down how it ended: its successor tells it.
    let fate = report.fate("kept");
    assert_eq!(
        (fate.became.as_str(), fate.exit),
        ("exited", Some(137)),
        "{report:#?}"
    );
    containerd.delete(&ours, 137);
    // Nobody listens on its socket any more: the id is free as soon as runc has forgotten it.
    assert!(!node.alive(&stock.shim));
    containerd.ctr_ok("e2e", ["containers", "delete", "dead"]);
    node.recoverd(["repair", "--apply", "--allow", "delete", "--min-age", "0s"]);
    containerd.run(&Container::new("dead"));
}

/// More than one batch of hung shims, and the very first of them cannot be replaced.
fn one_that_cannot_be_replaced_costs_no_other_its_task(release: &Release) {
    const AT_ONCE: usize = 5;
    let node = Node::start();
    let mut containerd = node.containerd(release);
    // The eldest comes first.
    let tasks: Vec<Task> = (0..AT_ONCE + 2)
        .map(|n| containerd.run(&Container::new(&format!("hung-{n}"))))
        .collect();
    let (lost, others) = tasks
        .split_first()
        .unwrap_or_else(|| panic!("no task was run"));
    containerd.kill();
    for task in &tasks {
        node.freeze(&task.shim);
    }
    // Whoever would be responsible for it cannot say so.
    node.shell(&format!("mkdir {}.lock", lost.socket().display()));
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 1, "{hook:?}");
    let done = format!("{} replaced, 1 not adopted (e2e/hung-0: lock", others.len());
    assert!(hook.line.contains(&done), "{hook:?}");
    // Nothing was done to it.
    lost.assert_init_alive();
    lost.assert_shim_alive();
    for task in others {
        assert!(!node.alive(&task.shim), "{}", task.name());
        task.assert_init_alive();
    }
    containerd.start();
    for task in others {
        task.assert_init_alive();
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"), "{}", task.name());
    }
    let report = containerd.post_start();
    assert_eq!(report.fate("hung-0").became, "lost", "{report:#?}");
}

/// Somebody starts it by hand while the hook is at work: nobody else is ended.
fn a_containerd_that_comes_meanwhile_loses_no_other_shim(release: &Release) {
    const AT_ONCE: usize = 5;
    let node = Node::start();
    let mut containerd = node.containerd(release);
    // The eldest come first.
    let tasks: Vec<Task> = (0..AT_ONCE + 2)
        .map(|n| containerd.run(&Container::new(&format!("hung-{n}"))))
        .collect();
    let (first, others) = tasks.split_at(AT_ONCE);
    containerd.kill();
    for task in &tasks {
        node.freeze(&task.shim);
    }
    // Their successors begin when they are told to.
    let began = node.folder().join("began");
    let waits = node.folder().join("shim-that-waits");
    let script = format!(
        "#!/bin/sh\ntouch {}\nwhile [ ! -e {} ]; do sleep 0.05; done\nexec {} \"$@\"\n",
        began.display(),
        node.folder().join("go").display(),
        node.built("containerd-shim-recoverd-v1").display(),
    );
    fs::write(&waits, script).unwrap_or_else(|error| panic!("{error}"));
    node.run("chmod", ["+x".as_ref(), waits.as_os_str()]);
    let config = node.folder().join("waits.toml");
    let text = format!("[adopt]\nbinary = {waits:?}\ndeadline = \"60s\"\n");
    fs::write(&config, text).unwrap_or_else(|error| panic!("{error}"));
    let mut args = vec!["--config".to_owned(), config.display().to_string()];
    args.extend(containerd.flags());
    args.extend(["pre-start", "--deadline", "120s"].map(str::to_owned));
    let mut hook = node.spawn(node.built("recoverd").display().to_string(), &args);
    wait_for("the first successors", || began.exists().then_some(()));
    containerd.launch();
    // It may have connected to some of the first by now, and miss their shims.
    containerd.freeze();
    node.tell("go");
    assert_eq!(hook.wait().code(), Some(0), "{}", hook.text());
    let said = hook.text();
    let pid = containerd.process().pid;
    for words in [
        format!("{AT_ONCE} replaced, {} not adopted", others.len()),
        format!("is not certainly down: {pid} starts or ends"),
    ] {
        assert!(said.contains(&words), "{words:?}: {said}");
    }
    for task in first {
        assert!(!node.alive(&task.shim), "{}", task.name());
    }
    for task in others {
        task.assert_shim_alive();
        node.signal(&task.shim, "CONT");
    }
    containerd.thaw();
    containerd.await_answer();
    for task in others {
        wait_for("containerd to know it", || {
            let row = containerd.task("e2e", task.id())?;
            (row.status == "RUNNING").then_some(())
        });
        task.assert_init_alive();
    }
}

/// Another recoverd is at work, and for longer than the hook may wait.
fn what_is_orphaned_is_adopted_whoever_holds_the_lock(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let orphan = containerd.run(&Container::new("orphan"));
    let hung = containerd.run(&Container::new("hung"));
    containerd.kill();
    node.kill(&orphan.shim);
    node.freeze(&hung.shim);
    let lock = "/run/recoverd/lock";
    let held = node.folder().join("held");
    node.shell("mkdir -p -m 700 /run/recoverd");
    let line = format!("touch {}; exec sleep 1000", held.display());
    let _holder = node.spawn("flock", [lock, "sh", "-c", &line]);
    wait_for("the lock", || held.exists().then_some(()));
    let mut args = containerd.flags();
    // It waits for a quarter of that.
    args.extend(["pre-start", "--strict", "--deadline", "40s"].map(str::to_owned));
    let output = node.recoverd(&args);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    for words in [
        "2 tasks, 1 adopted, 1 not adopted (e2e/hung: /run/recoverd/lock is held by",
        "only orphaned tasks were seen to",
    ] {
        assert!(line.contains(words), "{words:?}: {output:?}");
    }
    assert_ne!(orphan.shim_now(), orphan.shim);
    // Nobody is ended.
    hung.assert_shim_alive();
    node.signal(&hung.shim, "CONT");
    containerd.start();
    for task in [&orphan, &hung] {
        task.assert_init_alive();
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"), "{}", task.name());
    }
}

/// Whatever hangs takes all the time that there is, and more is left.
fn what_there_was_no_time_for_is_said_and_an_orphan_comes_first(release: &Release) {
    const DEADLINE: u64 = 12;
    const AT_ONCE: usize = 5;
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let hung: Vec<Task> = (0..AT_ONCE)
        .map(|n| containerd.run(&Container::new(&format!("hung-{n}"))))
        .collect();
    // The youngest of each kind.
    let last = containerd.run(&Container::new("at-last"));
    let orphan = containerd.run(&Container::new("orphan"));
    containerd.kill();
    node.kill(&orphan.shim);
    for task in hung.iter().chain([&last]) {
        node.freeze(&task.shim);
    }
    // A successor of any of those is never done.
    let slow = node.folder().join("slow-shim");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in\n*' -id orphan '*) exec {} \"$@\";;\nesac\nexec sleep 1000\n",
        node.built("containerd-shim-recoverd-v1").display(),
    );
    fs::write(&slow, script).unwrap_or_else(|error| panic!("{error}"));
    node.run("chmod", ["+x".as_ref(), slow.as_os_str()]);
    let config = node.folder().join("slow.toml");
    let text = format!(
        "[scan]\nshim-deadline = \"500ms\"\n[adopt]\nbinary = {slow:?}\ndeadline = \"60s\"\n"
    );
    fs::write(&config, text).unwrap_or_else(|error| panic!("{error}"));
    let mut args = vec!["--config".to_owned(), config.display().to_string()];
    args.extend(containerd.flags());
    let deadline = format!("{DEADLINE}s");
    args.extend(["pre-start", "--deadline", &deadline].map(str::to_owned));
    let began = Instant::now();
    let output = node.recoverd(&args);
    let took = began.elapsed();
    // It keeps containerd from starting no longer than it may, on a slow machine either.
    assert!(took < Duration::from_secs(4 * DEADLINE), "{took:?}");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    for words in [
        "7 tasks, 1 adopted, 6 not adopted",
        "e2e/at-last: no time was left for it",
        "e2e/hung-0: was not done in ",
    ] {
        assert!(line.contains(words), "{words:?}: {output:?}");
    }
    assert_ne!(orphan.shim_now(), orphan.shim);

    // Nothing was done to the others. Those that go on are well.
    for task in &hung {
        task.assert_shim_alive();
        node.signal(&task.shim, "CONT");
    }
    last.assert_shim_alive();
    node.kill(&last.shim);
    containerd.start();
    let report = containerd.post_start();
    for task in &hung {
        task.assert_init_alive();
        assert_eq!(report.fate(task.id()).became, "kept", "{report:#?}");
    }
    orphan.assert_init_alive();
    assert_eq!(report.fate("orphan").became, "adopted", "{report:#?}");
    let fate = report.fate("at-last");
    assert_eq!(fate.became, "lost", "{report:#?}");
    assert!(fate.why.contains("no time was left"), "{report:#?}");
}

fn a_foreign_shim_that_hangs_is_ended_only_if_told(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let program = node.folder().join("containerd-shim-foo-v1");
    node.run("cp", [containerd.release().stock_shim(), program.clone()]);
    let foreign = containerd.run(&Container::new("foreign").runtime(&program));
    let well = containerd.run(&Container::new("well"));
    containerd.kill();
    node.freeze(&foreign.shim);
    let hook = containerd.pre_start();
    assert!(hook.line.contains("pre-start.foreign"), "{hook:?}");
    assert!(node.alive(&foreign.shim));
    foreign.assert_init_alive();
    let config = node.folder().join("foreign.toml");
    fs::write(&config, "[pre-start]\nforeign = true\n").unwrap_or_else(|error| panic!("{error}"));
    let mut args = vec!["--config".to_owned(), config.display().to_string()];
    args.extend(containerd.flags());
    args.push("pre-start".into());
    let output = node.recoverd(&args);
    let line = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(line.contains("1 foreign shims ended"), "{output:?}");
    assert!(!node.alive(&foreign.shim));
    // It is ended, and nothing else is done to it: the rest is containerd's and its runtime's.
    foreign.assert_init_alive();
    assert!(node.path(foreign.bundle()).join("config.json").exists());
    well.assert_shim_alive();
    let told = node.recoverd(["history", "-o", "json"]);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(
        told.contains("send SIGKILL to containerd-shim-foo-v1"),
        "{told}"
    );
    containerd.start();
    let report = containerd.post_start();
    let fate = report.fate("foreign");
    assert_eq!(fate.became, "lost", "{report:#?}");
    assert!(fate.why.contains("foreign shim"), "{report:#?}");
    assert_eq!(report.fate("well").became, "kept", "{report:#?}");
}

fn a_start_a_hook_and_two_repairs_at_once_have_one_winner(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let well: Vec<Task> = [ShimUnderTest::Recoverd, ShimUnderTest::Stock]
        .into_iter()
        .enumerate()
        .map(|(n, shim)| containerd.run(&Container::new(&format!("well-{n}")).shim(shim)))
        .collect();
    let orphans: Vec<Task> = (0..6)
        .map(|n| {
            let shim = [ShimUnderTest::Recoverd, ShimUnderTest::Stock][n % 2];
            containerd.run(&Container::new(&format!("orphan-{n}")).shim(shim))
        })
        .collect();
    let hung = containerd.run(&Container::new("hung"));
    containerd.kill();
    for orphan in &orphans {
        node.kill(&orphan.shim);
    }
    node.freeze(&hung.shim);
    let recoverd = node.built("recoverd").display().to_string();
    let repair = || {
        node.spawn(
            &recoverd,
            ["repair", "--apply", "--allow", "kill", "--allow", "delete"],
        )
    };
    let mut args = containerd.flags();
    args.push("pre-start".into());
    let mut acting = [repair(), node.spawn(&recoverd, &args), repair()];
    containerd.start();
    let codes: Vec<Option<i32>> = acting.iter_mut().map(|one| one.wait().code()).collect();
    let said: Vec<String> = acting.iter().map(|one| one.text()).collect();
    for code in [codes[0], codes[2]] {
        assert!(matches!(code, Some(0 | 1 | 3 | 4)), "{codes:?} {said:#?}");
    }
    assert_eq!(codes[1], Some(0), "the hook: {said:#?}");
    for task in &well {
        task.assert_init_alive();
        task.assert_shim_alive();
        let row = containerd.task("e2e", task.id()).map(|row| row.status);
        assert_eq!(row.as_deref(), Some("RUNNING"), "{said:#?}");
    }
    // An orphan may have died of the start: that comes first, or not. Nobody else has ended one.
    let ended = |entry: &Value| word(entry, "text").starts_with("send SIGTERM to init ");
    let history = history_of(&node);
    assert!(!history.iter().any(ended), "{history:#?}");
    // Whoever came first: none of them is served twice, and none is known in two ways for long.
    wait_for("one word on every orphan", || {
        node.recoverd([
            "repair",
            "--apply",
            "--allow",
            "kill",
            "--allow",
            "delete",
            "--min-age",
            "0s",
        ]);
        let settled = orphans.iter().chain([&hung]).all(|task| {
            let listed = containerd
                .task("e2e", task.id())
                .is_some_and(|row| row.status == "RUNNING");
            let shims = node.shims();
            let serving = shims
                .iter()
                .filter(|shim| shim.flag("-id") == Some(task.id()))
                .count();
            match node.alive(&task.init) {
                true => listed && serving == 1,
                false => serving == 0 || (serving == 1 && !listed),
            }
        });
        settled.then_some(())
    });
    let history = history_of(&node);
    for task in orphans.iter().chain([&hung]) {
        let adopted = |entry: &&Value| {
            (word(entry, "event"), word(entry, "subject")) == ("done", &task.name())
                && word(entry, "text").contains(" serves ")
        };
        let adopted: Vec<&Value> = history.iter().filter(adopted).collect();
        assert!(adopted.len() <= 1, "adopted twice: {adopted:#?}");
        // Whoever says that it did is the one.
        if let [won] = adopted.as_slice()
            && node.alive(&task.init)
        {
            let serves = format!("shim {} serves ", task.shim_now().pid);
            assert!(word(won, "text").starts_with(&serves), "{serves}: {won:#}");
        }
    }
}

/// What `recoverd history` tells, one by one.
#[track_caller]
fn history_of(node: &Node) -> Vec<Value> {
    let told = node.recoverd(["history", "-o", "json"]);
    let told: Option<Value> = serde_json::from_slice(&told.stdout).ok();
    let entries = told.as_ref().and_then(|told| told["entries"].as_array());
    entries
        .unwrap_or_else(|| panic!("no history: {told:?}"))
        .clone()
}

/// A word of a history's entry, empty if it has none.
fn word<'a>(entry: &'a Value, name: &str) -> &'a str {
    entry[name].as_str().unwrap_or_default()
}

/// Shim and containerd are killed at once, and containerd had just seen the shim's end.
fn a_verb_of_a_containerd_that_is_gone_ends_no_workload(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let task = containerd.run(&Container::new("task").shim(ShimUnderTest::Recoverd));
    containerd.kill();
    node.kill(&task.shim);
    let said = node.folder().join("said");
    let verb = format!(
        "{shim} -namespace e2e -address {address} -publish-binary containerd -id task -bundle {bundle} delete",
        shim = ShimUnderTest::Recoverd.runtime().display(),
        address = containerd.address().display(),
        bundle = task.bundle().display(),
    );
    // Its parent has gone before it looks.
    let orphan = "until grep -q \"^PPid:.1$\" /proc/$$/status; do sleep 0.02; done";
    node.shell(&format!(
        "sh -c '{orphan}; exec {verb}' >/dev/null 2>{} </dev/null &",
        said.display()
    ));
    wait_for("the verb's word", || {
        let text = fs::read_to_string(&said).ok()?;
        text.contains("nothing was touched").then_some(())
    });
    task.assert_init_alive();
    start_with_hooks(&mut containerd, &[&task]);
}

fn the_journal_gets_one_line_of_each_hook_and_people_a_table(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let ours = |id| Container::new(id).shim(ShimUnderTest::Recoverd);
    containerd.run(&ours("kept"));
    let job = containerd.run(&ours("job"));
    containerd.stop();
    node.signal(&job.init, "TERM");
    node.wait_gone(&job.init);
    // As systemd starts a unit's program: standard output is the journal, and it is told which
    // stream that is.
    let program = built("recoverd").display().to_string();
    let flags = containerd.flags().join(" ");
    let said = |hook: &str, stream: &str| {
        let file = node.folder().join("journal");
        node.shell(&format!(
            "exec >{0}; JOURNAL_STREAM={stream} {program} {flags} {hook}",
            file.display()
        ));
        fs::read_to_string(&file).unwrap_or_else(|error| panic!("{error}"))
    };
    let journal = node.folder().join("journal");
    let of_stdout = format!("$(stat -c %d:%i {})", journal.display());
    let before = said("pre-start", &of_stdout);
    assert!(
        before.starts_with("recoverd: pre-start: 2 tasks, "),
        "{before}"
    );
    assert_eq!(before.lines().count(), 1, "{before}");
    containerd.start();
    let line = "recoverd: post-start: 1 kept, 0 adopted, 1 exited, 0 new, 0 lost\n";
    assert_eq!(said("post-start", &of_stdout), line);
    // A shell that was started from a service has the variable too, and another output.
    for stream in ["0:0", ""] {
        let table = said("post-start", stream);
        assert!(
            table.ends_with(line) && table.lines().count() == 3,
            "{table}"
        );
        assert!(table.contains("e2e/job   exited with 0"), "{table}");
    }
}
