//! A containerd of 1.x starts where one of 2.x ran: the stock shim of 2.x has the third task API
//! only, which 1.x does not speak. The start ends its workloads; with the hook before it, none.

use std::fs;

use recoverd_common::pb::task::Status;
use recoverd_tests::{
    Container, Containerd, Events, Fifos, Input, Node, Output, Reader, Release, ShimUnderTest,
    Task, Traces, numbers, oci_spec, wait_for,
};
use serde_json::json;

recoverd_tests::tests! {
    once: [
        an_older_containerd_ends_what_it_cannot_speak_to,
        workloads_outlive_the_way_down_to_1_7_and_up_again,
        workloads_outlive_the_way_down_to_1_6_and_up_again,
        exits_that_containerd_never_heard_of_are_told_on_the_way_down,
    ],
}

#[track_caller]
fn needed(newest: &Release, name: &'static str) -> Release {
    assert_eq!(newest.major(), 2, "only 2.x has a shim of the third API");
    let older = newest.other(name);
    older.unwrap_or_else(|| panic!("containerd {name} is not there: run tests/setup"))
}

/// The control: what is done about it is done because nothing less helps.
fn an_older_containerd_ends_what_it_cannot_speak_to(newest: &Release) {
    for name in ["1.7", "1.6"] {
        let older = needed(newest, name);
        let node = Node::start();
        let mut containerd = node.containerd(newest);
        let stock = |id| Container::new(id).shim(ShimUnderTest::Stock);
        let plain = containerd.run(&stock("plain"));
        let named = containerd.run(&stock("named"));
        containerd.stop();
        // The file that 1.x reads, as its own shims write it.
        let address = node.path(named.bundle()).join("address");
        assert!(!address.exists(), "2.x writes none");
        let text = format!("unix://{}", named.socket().display());
        fs::write(&address, text).unwrap_or_else(|error| panic!("{error}"));
        containerd.switch_to(&older);
        containerd.start();
        for task in [&plain, &named] {
            assert!(!node.alive(&task.init), "{name}: {} lives", task.id());
            assert_eq!(
                containerd.task("e2e", task.id()).map(|row| row.status),
                None
            );
        }
    }
}

fn workloads_outlive_the_way_down_to_1_7_and_up_again(newest: &Release) {
    there_and_back(newest, &needed(newest, "1.7"));
}

fn workloads_outlive_the_way_down_to_1_6_and_up_again(newest: &Release) {
    there_and_back(newest, &needed(newest, "1.6"));
}

#[track_caller]
fn status(containerd: &Containerd, task: &Task) -> Option<(u32, String)> {
    let row = containerd.task("e2e", task.id());
    row.map(|row| (row.pid, row.status))
}

fn there_and_back(newest: &Release, older: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(newest);
    let before = Traces::of(&node);
    let stock = |id: &str| Container::new(id).shim(ShimUnderTest::Stock);

    // A numbered log, an exec with another.
    let line = numbers("/mnt/go", "/mnt/stop", "/mnt/init.count");
    let line = format!("{line}; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 23");
    let single = stock("single").shares(&node).command(["sh", "-c", &line]);
    let single = containerd.run(&single);
    let line = numbers("/mnt/go", "/mnt/stop", "/mnt/exec.count");
    let line = format!("{line}; while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7");
    containerd.exec(&single, "session", &["sh", "-c", &line, "session"]);
    let session = node.shell_with("session");
    let init_stream = Reader::open(&node.stdout_of("single"));
    let exec_stream = Reader::open(&node.stdout_of("session"));

    // A terminal with a shell, and a held stdin, whose fifos only their shims know of.
    let api = containerd.api("e2e");
    let shell_fifos = Fifos::make_terminal(&node, "shell-io");
    let cat_fifos = Fifos::make(&node, "cat-io");
    let output = |fifos: &Fifos| Output::of(&node.path(&fifos.stdio.stdout));
    let (screen, copy) = (output(&shell_fifos), output(&cat_fifos));
    let _errors = Output::of(&node.path(&cat_fifos.stdio.stderr));
    let mut spec = oci_spec("shell", &["sh"]);
    spec["process"]["terminal"] = json!(true);
    let shim = ShimUnderTest::Stock;
    api.run("shell", &spec, shim, &shell_fifos.stdio);
    api.run("cat", &oci_spec("cat", &["cat"]), shim, &cat_fifos.stdio);
    let shell = containerd.task_of(&stock("shell"));
    let cat = containerd.task_of(&stock("cat"));
    let mut keys = Input::of(&node.path(&shell_fifos.stdio.stdin));
    let mut lines = Input::of(&node.path(&cat_fifos.stdio.stdin));
    keys.write("echo before=$((1+1))\n");
    screen.wait_text("before=2");
    lines.write("before\n");
    copy.wait_text("before\n");

    // A pod, one of whose members has ended: how, only its shim knows. One of ours.
    let member = |id: &str, name| {
        let line = "trap 'exit 42' TERM; while :; do sleep 1000 & wait $!; done";
        let container = stock(id).pod("pause", "prod", "web-0", name);
        containerd.run(&container.command(["sh", "-c", line]))
    };
    let pod = [
        member("pause", None),
        member("app", Some("app")),
        member("job", Some("job")),
    ];
    node.signal(&pod[2].init, "TERM");
    assert_eq!(api.status("job", ""), 42);
    let ours = containerd.run(&Container::new("ours").shim(ShimUnderTest::Recoverd));
    node.tell("go");
    init_stream.wait_advance();
    exec_stream.wait_advance();

    // It is said before.
    let mut words = containerd.flags();
    words.extend(["preflight", "--to", older.name].map(str::to_owned));
    let said = node.recoverd(&words);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let line = format!(
        "6 tasks have shims that containerd {} cannot speak to",
        older.name
    );
    assert!(said.contains(&line), "{said}");

    containerd.stop();
    for stream in [&init_stream, &exec_stream] {
        stream.away();
        stream.may_lose_a_buffer();
    }
    containerd.switch_to(older);
    let living = [&single, &shell, &cat, &pod[0], &pod[1]];
    // Nobody says what is about to start, or it is one that speaks the third.
    let hook = containerd.pre_start();
    assert!(
        hook.line.contains("the release that starts is not known"),
        "{hook:?}"
    );
    let hook = containerd.pre_start_of(newest);
    assert!(
        !hook.line.contains("replaced") && !hook.line.contains("not known"),
        "{hook:?}"
    );
    for task in living {
        task.assert_shim_alive();
    }
    let hook = containerd.pre_start_of(older);
    assert_eq!(hook.exit, 0, "{hook:?}");
    assert!(hook.line.contains("6 replaced"), "{hook:?}");
    for task in living {
        node.wait_gone(&task.shim);
    }
    ours.assert_shim_alive();
    containerd.start();
    init_stream.back();
    exec_stream.back();
    let report = containerd.post_start();
    assert_eq!(report.exit, 0, "{report:#?}");
    for task in living {
        task.assert_init_alive();
        let fate = report.fate(task.id());
        let became = (fate.became.as_str(), fate.pid, fate.why.as_str());
        assert_eq!(became, ("adopted", Some(task.init.pid), ""), "{report:#?}");
        let running = Some((task.init.pid, "RUNNING".to_owned()));
        assert_eq!(status(&containerd, task), running, "{}", task.id());
    }
    assert_eq!(report.fate("ours").became, "kept", "{report:#?}");
    assert_eq!(report.fate("single").execs, (1, 1), "{report:#?}");
    assert!(node.alive(&session), "the exec session ended");
    let row = status(&containerd, &pod[2]).map(|(_, status)| status);
    assert_eq!(row.as_deref(), Some("STOPPED"));
    assert_eq!(pod[2].wait("").exit_status, 42);
    assert_eq!(pod[1].shim_now(), pod[0].shim_now());
    let screen = reopened(screen, || output(&shell_fifos));
    let copy = reopened(copy, || output(&cat_fifos));
    keys.write("echo down=$((2+2)); tty\n");
    screen.wait_text("down=4");
    screen.wait_text("/dev/pts/0");
    lines.write("down\n");
    copy.wait_text("down\n");
    init_stream.wait_advance();
    exec_stream.wait_advance();
    let mut hello = containerd.exec_attached(&single, "hello", &["echo", "hello"]);
    assert!(hello.wait().success(), "{}", hello.text());
    let fresh = containerd.run(&stock("fresh"));

    // The way up again: nobody has to be replaced for it.
    let successors: Vec<_> = living.iter().map(|task| task.shim_now()).collect();
    containerd.stop();
    containerd.switch_to(newest);
    let hook = containerd.pre_start_of(newest);
    assert_eq!(hook.exit, 0, "{hook:?}");
    assert!(!hook.line.contains("replaced"), "{hook:?}");
    containerd.start();
    for (task, successor) in living.iter().zip(&successors) {
        task.assert_init_alive();
        let running = Some((task.init.pid, "RUNNING".to_owned()));
        assert_eq!(status(&containerd, task), running, "{}", task.id());
        assert_eq!(task.shim_now(), *successor);
    }
    fresh.assert_shim_alive();
    containerd.remove(&fresh);
    containerd.remove(&ours);

    // How it all ends is true.
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
    keys.write("echo up=$((3+3)); exit 9\n");
    screen.wait_text("up=6");
    let api = containerd.api("e2e");
    assert_eq!(api.status("shell", ""), 9);
    drop(lines);
    api.close_stdin("cat", "")
        .unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(api.status("cat", ""), 0);
    containerd.delete(&shell, 9);
    containerd.delete(&cat, 0);
    containerd.delete(&pod[2], 42);
    containerd.remove(&pod[1]);
    containerd.remove(&pod[0]);
    before.wait_restored(&node);
}

/// The stock shim has seen the ends of an exec and of two inits, and could tell nobody: it tries for
/// 15 s, and its successor comes earlier.
fn exits_that_containerd_never_heard_of_are_told_on_the_way_down(newest: &Release) {
    for name in ["1.7", "1.6"] {
        let older = needed(newest, name);
        let node = Node::start();
        let mut containerd = node.containerd(newest);
        let before = Traces::of(&node);
        let run = |id: &str, line: &str, pod: Option<&str>| {
            let container = Container::new(id).shim(ShimUnderTest::Stock).shares(&node);
            let container = match pod {
                Some(name) => container.pod("lives", "prod", "web-0", Some(name)),
                None if id == "lives" => container.pod("lives", "prod", "web-0", None),
                None => container,
            };
            containerd.run(&container.command(["sh", "-c", line]))
        };
        let until = |file: &str, status| {
            format!("while [ ! -e /mnt/{file} ]; do usleep 20000; done; exit {status}")
        };
        let lives = run("lives", &until("stop", 5), None);
        let member = run("member", &until("end", 42), Some("job"));
        let single = run("single", &until("end", 23), None);
        let line = until("end", 7);
        containerd.exec(&lives, "session", &["sh", "-c", &line, "session"]);
        containerd.stop();
        node.tell("end");
        let ended = [(&lives, "session", 7), (&member, "", 42), (&single, "", 23)];
        for (task, exec_id, status) in ended {
            wait_for("its shim to see it", || {
                let state = task.state(exec_id);
                let seen = state.status == i32::from(Status::Stopped);
                seen.then(|| assert_eq!(state.exit_status, status))
            });
        }
        containerd.switch_to(&older);
        let hook = containerd.pre_start_of(&older);
        assert!(hook.line.contains("3 replaced"), "{hook:?}");
        containerd.start();
        let events = Events::of(&containerd);
        for (task, exec_id, status) in ended {
            let id = if exec_id.is_empty() {
                task.id()
            } else {
                exec_id
            };
            let told = wait_for("the exit to be told", || {
                let told = events.of_topic(task.id(), "/tasks/exit");
                told.into_iter().find(|event| event.text("id") == id)
            });
            assert_eq!(told.number("exit_status"), u64::from(status), "{id}");
            assert_eq!(task.wait(exec_id).exit_status, status, "{id}");
        }
        lives.assert_init_alive();
        containerd.delete(&member, 42);
        containerd.delete(&single, 23);
        node.tell("stop");
        assert_eq!(lives.wait("").exit_status, 5);
        containerd.delete(&lives, 5);
        before.wait_restored(&node);
    }
}

/// A client whose daemon was away opens its fifos again.
fn reopened(output: Output, again: impl Fn() -> Output) -> Output {
    if output.has_ended() { again() } else { output }
}
