//! Our shim outlives containerd: SPEC's rows F1 (restarts, upgrades, downgrades) and F2 (exits
//! while containerd is down).

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use recoverd_common::pb::task::{DeleteRequest, DeleteResponse, ShutdownRequest, Status};
use recoverd_common::record::Exit;
use recoverd_tests::{
    Container, Containerd, Events, Node, Reader, Release, ShimUnderTest, Task, Traces, beside,
    numbers, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        workload_exec_and_streams_outlive_every_switch_of_release,
        exits_of_a_short_and_of_a_long_downtime_are_told_truly,
        delete_verb_gives_the_recorded_exit,
        scan_and_show_know_our_shim,
        what_happened_meanwhile_is_told_exactly_twice,
    ],
    // Between shims only, and the event service, which is the same in every release.
    once: [
        events_outlive_their_task_and_their_shim,
    ],
}

/// Longer than the stock shim keeps events (15 s), and than containerd's own timeouts.
const LONG: Duration = Duration::from_secs(21);

fn ours(id: &str) -> Container {
    Container::new(id).shim(ShimUnderTest::Recoverd)
}

fn workload_exec_and_streams_outlive_every_switch_of_release(first: &Release) {
    // Every pair of releases in both directions over the three tests.
    let words: &[&'static str] = match first.name {
        "1.6" => &["1.6", "1.7", "2.1", "1.6"],
        "1.7" => &["1.7", "1.6", "2.1", "1.7"],
        _ => &["2.1", "1.7", "2.1", "1.6"],
    };
    let node = Node::start();
    let mut containerd = node.containerd(first);
    let before = Traces::of(&node);
    let writer = numbers("/mnt/go", "/mnt/stop", "/mnt/init.count");
    let task = containerd.run(&ours("survivor").shares(&node).command([
        "sh",
        "-c",
        &format!("{writer}; while [ ! -e /mnt/end ]; do usleep 20000; done; exit 23"),
    ]));
    let of_exec = numbers("/mnt/go", "/mnt/stop", "/mnt/exec.count");
    let of_exec = format!("{of_exec}; while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7");
    containerd.exec(&task, "session", &["sh", "-c", &of_exec, "session"]);
    let session = node.shell_with("session");
    // `ctr` has gone, and with it the readers that it had.
    let init_stream = Reader::open(&node.stdout_of("survivor"));
    let exec_stream = Reader::open(&node.stdout_of("session"));
    node.tell("go");

    for (step, name) in words.iter().enumerate() {
        let Some(release) = first.other(name) else {
            eprintln!("no containerd {name}: not switched to");
            continue;
        };
        init_stream.wait_advance();
        exec_stream.wait_advance();
        containerd.kill();
        // A client's fifos lose their reader when it dies, and it may die with its daemon.
        for stream in [&init_stream, &exec_stream] {
            stream.away();
        }
        containerd.switch_to(&release);
        containerd.start();
        for stream in [&init_stream, &exec_stream] {
            stream.back();
            stream.wait_advance();
        }
        task.assert_init_alive();
        task.assert_shim_alive();
        assert!(node.alive(&session), "the exec session ended");
        assert_eq!(task.state("session").status(), Status::Running);
        let row = containerd.task("e2e", "survivor");
        let row = row.map(|row| (row.pid, row.status));
        assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())), "{name}");

        // It is not only there: it works.
        let mut exec =
            containerd.exec_attached(&task, &format!("hello-{step}"), &["echo", "hello"]);
        assert!(exec.wait().success(), "{}", exec.text());
        assert_eq!(exec.text(), "hello\n");
        let pids = containerd.ctr_ok("e2e", ["tasks", "ps", "survivor"]);
        assert!(pids.contains(&session.pid.to_string()), "{pids}");
        // Neither of the two writes while frozen; both go on after it.
        containerd.pause(&task);
        containerd.ctr_ok("e2e", ["tasks", "resume", "survivor"]);
        // A further container of the same pod finds the same shim, whoever started it.
        let member = containerd.run(&ours(&format!("member-{step}")).group("survivor"));
        assert_eq!(member.shim, task.shim, "{name}");
        assert_eq!(member.socket(), task.socket(), "{name}");
        containerd.remove(&member);
        node.wait_gone(&member.init);
        task.assert_shim_alive();
    }

    node.tell("stop");
    let counts = [node.count_in("init.count"), node.count_in("exec.count")];
    // The last words wait for a reader that comes only when the writer has gone.
    init_stream.away();
    exec_stream.away();
    node.tell("exec-end");
    assert_eq!(task.wait("session").exit_status, 7);
    node.tell("end");
    assert_eq!(task.wait("").exit_status, 23);
    init_stream.back();
    exec_stream.back();
    init_stream.finish(counts[0]);
    exec_stream.finish(counts[1]);
    containerd.delete(&task, 23);
    node.wait_gone(&task.shim);
    before.wait_restored(&node);
}

/// How the containers of one downtime end.
struct Ending {
    id: String,
    status: u32,
    oom: bool,
    task: Task,
}

fn start_endings(containerd: &Containerd, round: &str) -> Vec<Ending> {
    let node = containerd.node();
    let exiting = |status: u32| {
        let script = format!("trap 'exit {status}' TERM; while :; do sleep 1000 & wait $!; done");
        move |container: Container| container.command(["sh", "-c", &script])
    };
    let run = |kind: &str, status, oom, change: &dyn Fn(Container) -> Container| {
        let id = format!("{round}-{kind}");
        let task = containerd.run(&change(ours(&id).shares(node)));
        Ending {
            id,
            status,
            oom,
            task,
        }
    };
    let eats =
        format!("while [ ! -e /mnt/{round}-eat ]; do usleep 20000; done; exec tail /dev/zero");
    vec![
        run("zero", 0, false, &exiting(0)),
        run("some", 23, false, &exiting(23)),
        run("killed", 137, false, &|container| container),
        run("oom", 137, true, &|container| {
            container
                .memory_limit(16 << 20)
                .command(["sh", "-c", &eats])
        }),
    ]
}

fn end_all(node: &Node, round: &str, endings: &[Ending]) {
    for ending in endings {
        match (ending.status, ending.oom) {
            (_, true) => node.tell(&format!("{round}-eat")),
            (137, false) => node.signal(&ending.task.init, "KILL"),
            _ => node.signal(&ending.task.init, "TERM"),
        }
    }
    for ending in endings {
        node.wait_gone(&ending.task.init);
    }
}

/// containerd is back: every exit is there in every way in which one can ask for it.
fn assert_told(containerd: &Containerd, events: &Events, endings: &[Ending]) {
    for Ending {
        id,
        status,
        oom,
        task,
    } in endings
    {
        task.assert_shim_alive();
        let row = containerd.task("e2e", id);
        let row = row.map(|row| (row.pid, row.status));
        assert_eq!(row, Some((task.init.pid, "STOPPED".to_owned())), "{id}");
        let state = task.state("");
        assert_eq!(
            (state.status(), state.exit_status, state.pid),
            (Status::Stopped, *status, task.init.pid),
            "{id}"
        );
        let waited = task.wait("");
        assert_eq!(
            (waited.exit_status, waited.exited_at),
            (*status, state.exited_at),
            "{id}"
        );
        match task.recorded().exit {
            Some(Exit::Observed {
                status: recorded,
                at,
                oom: recorded_oom,
            }) => {
                assert_eq!((recorded, recorded_oom), (*status, *oom), "{id}");
                let told = state.exited_at.map(|at| at.seconds);
                assert_eq!(Some(at.seconds), told, "{id}");
            }
            other => panic!("{id} is recorded as {other:?}"),
        }
    }
    for ending in endings {
        let id = &ending.id;
        let exit = wait_for(&format!("the exit event of {id}"), || {
            events.of_topic(id, "/tasks/exit").pop()
        });
        assert_eq!(exit.number("exit_status"), u64::from(ending.status), "{id}");
        assert_eq!(exit.number("pid"), u64::from(ending.task.init.pid), "{id}");
        if ending.oom {
            // A subscriber that came between the two hears of the kill when both are told again.
            wait_for(
                &format!("the OOM event of {id} and its exit after it"),
                || {
                    let told = events.of_container(id).into_iter();
                    let mut after_oom = told.skip_while(|event| event.topic != "/tasks/oom");
                    after_oom
                        .any(|event| event.topic == "/tasks/exit")
                        .then_some(())
                },
            );
        }
    }
    // Acknowledged and told again: nothing waits any more.
    for ending in endings {
        wait_for("the events to be acknowledged", || {
            waiting_events(&ending.task).is_none().then_some(())
        });
    }
    for ending in endings {
        // True to the end, whoever asks.
        containerd.delete(&ending.task, ending.status);
    }
}

/// How many events a shim's `.events` file still holds, if any.
fn waiting_events(task: &Task) -> Option<usize> {
    let path = recoverd_common::paths::Beside::of(&task.node().path(task.socket())).events;
    let bytes = fs::read(&path).unwrap_or_default();
    // An entry that waits has its flags' lowest bit clear; see shim/src/event_log.rs.
    let mut rest = bytes.get(8..)?;
    let mut waiting = 0;
    while let Some(head) = rest.get(..20) {
        let word = |at: usize| {
            let bytes = head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u32::from_le_bytes(bytes.unwrap_or_default())
        };
        let length = word(0) as usize;
        if length == 0 {
            break;
        }
        waiting += usize::from(word(16) & 1 == 0);
        rest = rest
            .get(20 + length.next_multiple_of(8)..)
            .unwrap_or_default();
    }
    (waiting > 0).then_some(waiting)
}

fn exits_of_a_short_and_of_a_long_downtime_are_told_truly(first: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(first);
    let before = Traces::of(&node);
    let lasting = containerd.run(&ours("lasting").shares(&node));
    let until = "while [ ! -e /mnt/exec-end ]; do usleep 20000; done; exit 7";
    containerd.exec(&lasting, "session", &["sh", "-c", until, "session"]);
    let session = node.shell_with("session");
    let short = start_endings(&containerd, "short");
    let long = start_endings(&containerd, "long");
    let release = |name| first.other(name).unwrap_or_else(|| first.clone());
    // Back on the same release first, then on another one: an upgrade or a downgrade.
    let then = match first.name {
        "1.6" => release("2.1"),
        "1.7" => release("1.6"),
        _ => release("1.7"),
    };
    for (round, endings, downtime, back) in [
        ("short", short, Duration::ZERO, first.clone()),
        ("long", long, LONG, then),
    ] {
        containerd.kill();
        let down = Instant::now();
        end_all(&node, round, &endings);
        if downtime > Duration::ZERO {
            node.tell("exec-end");
            node.wait_gone(&session);
        }
        // The one place where time itself is the condition.
        thread::sleep(downtime.saturating_sub(down.elapsed()));
        for ending in &endings {
            let kept = format!("the events of {} to be kept", ending.id);
            wait_for(&kept, || waiting_events(&ending.task));
        }
        containerd.switch_to(&back);
        containerd.start();
        let events = Events::of(&containerd);
        assert_told(&containerd, &events, &endings);
        lasting.assert_init_alive();
        if downtime > Duration::ZERO {
            let exit = wait_for("the exit event of an exec", || {
                events.of_topic("lasting", "/tasks/exit").pop()
            });
            assert_eq!(
                (exit.text("id"), exit.number("exit_status")),
                ("session", 7)
            );
            assert_eq!(task_exec_status(&lasting, "session"), (Status::Stopped, 7));
        }
        for ending in &endings {
            node.wait_gone(&ending.task.shim);
        }
    }
    containerd.remove(&lasting);
    before.wait_restored(&node);
}

fn task_exec_status(task: &Task, exec_id: &str) -> (Status, u32) {
    let state = task.state(exec_id);
    (state.status(), state.exit_status)
}

/// `delete` as containerd runs it.
#[track_caller]
fn delete_by_hand(containerd: &Containerd, task: &Task) -> DeleteResponse {
    let node = containerd.node();
    let file = node.folder().join("deleted");
    let program = node.built("containerd-shim-recoverd-v1");
    node.shell(&format!(
        "cd {bundle} && {program} -namespace e2e -address {address} -publish-binary /x -id {id} \
         -bundle {bundle} delete >{file} </dev/null",
        bundle = task.bundle().display(),
        program = program.display(),
        address = containerd.address().display(),
        id = task.id(),
        file = file.display(),
    ));
    let bytes = fs::read(&file).unwrap_or_else(|error| panic!("read {}: {error}", file.display()));
    prost::Message::decode(bytes.as_slice())
        .unwrap_or_else(|error| panic!("decode what delete said: {error}"))
}

fn exits_with_23(id: &str) -> Container {
    ours(id).command([
        "sh",
        "-c",
        "trap 'exit 23' TERM; while :; do sleep 1000 & wait $!; done",
    ])
}

fn delete_verb_gives_the_recorded_exit(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);
    // containerd is up: it runs the verb itself when the connection to the shim ends.
    let up = containerd.run(&exits_with_23("up"));
    let events = Events::of(&containerd);
    node.signal(&up.init, "TERM");
    wait_for("containerd to learn of the exit", || {
        (containerd.task("e2e", "up")?.status == "STOPPED").then_some(())
    });
    node.kill(&up.shim);
    wait_for("containerd to forget the task", || {
        containerd.task("e2e", "up").is_none().then_some(())
    });
    let deleted = wait_for("the delete event", || {
        events.of_topic("up", "/tasks/delete").pop()
    });
    assert_eq!(deleted.number("exit_status"), 23);
    for exit in events.of_topic("up", "/tasks/exit") {
        assert_eq!(exit.number("exit_status"), 23, "{exit:?}");
    }
    containerd.ctr_ok("e2e", ["containers", "delete", "up"]);
    before.wait_restored(&node);
    drop(events);

    // containerd is down, task exited, shim dead: the verb says what was recorded.
    let down = containerd.run(&exits_with_23("down"));
    let living = containerd.run(&ours("living"));
    containerd.kill();
    // A living shim that claims the id: nothing is touched, nothing is said.
    assert_eq!(
        delete_by_hand(&containerd, &living),
        DeleteResponse::default()
    );
    living.assert_init_alive();
    living.assert_shim_alive();
    node.signal(&down.init, "TERM");
    let recorded = wait_for("the exit in the record", || down.recorded().exit);
    node.kill(&down.shim);
    let response = delete_by_hand(&containerd, &down);
    assert_eq!((response.exit_status, response.pid), (23, down.init.pid));
    let Exit::Observed { status: 23, at, .. } = recorded else {
        panic!("recorded as {recorded:?}")
    };
    assert_eq!(response.exited_at.map(|at| at.seconds), Some(at.seconds));
    // containerd does the same at its start; it must not trip over what is gone. And the exit, of
    // which the dead shim could not tell it, is told.
    containerd.start();
    let events = Events::of(&containerd);
    let exit = wait_for("the exit event", || {
        events.of_topic("down", "/tasks/exit").pop()
    });
    assert_eq!(exit.number("exit_status"), 23);
    assert_eq!(containerd.task("e2e", "down"), None);
    living.assert_init_alive();
    containerd.ctr_ok("e2e", ["containers", "delete", "down"]);
    containerd.remove(&living);
    before.wait_restored(&node);
}

/// How often containerd was handed an event of that topic; it says so at log level `trace`.
fn forwarded(containerd: &Containerd, topic: &str) -> usize {
    let topic = format!("topic={topic} ");
    let log = containerd.log();
    let lines = log.lines().filter(|line| line.contains("event forwarded"));
    lines.filter(|line| line.contains(&topic)).count()
}

/// Whoever subscribes while containerd comes back hears of what happened meanwhile, sooner or later;
/// nobody hears of it a third time.
fn what_happened_meanwhile_is_told_exactly_twice(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let eats = "while [ ! -e /mnt/eat ]; do usleep 20000; done; exec tail /dev/zero";
    let task = containerd.run(
        &ours("meanwhile")
            .shares(&node)
            .memory_limit(16 << 20)
            .command(["sh", "-c", eats]),
    );
    containerd.exec(
        &task,
        "session",
        &["sh", "-c", "sleep 100000; :", "session"],
    );
    let session = node.shell_with("session");
    containerd.kill();
    // An exec's exit, an OOM kill, the init's exit.
    node.kill(&session);
    node.tell("eat");
    node.wait_gone(&task.init);
    let topics = [("/tasks/exit", 2), ("/tasks/oom", 1)];
    let waiting = topics.iter().map(|(_, count)| count).sum();
    wait_for("all to be kept", || {
        (waiting_events(&task) == Some(waiting)).then_some(())
    });
    containerd.log_level("trace");
    containerd.start();
    let before = topics.map(|(topic, _)| forwarded(&containerd, topic));
    for (topic, count) in topics {
        wait_for("the first telling", || {
            (forwarded(&containerd, topic) >= count).then_some(())
        });
    }
    // Now, too late for that one.
    let late = Events::of(&containerd);
    for (topic, count) in topics {
        wait_for("the second telling", || {
            (late.of_topic("meanwhile", topic).len() >= count).then_some(())
        });
    }
    wait_for("all to be acknowledged", || {
        waiting_events(&task).is_none().then_some(())
    });
    // Another restart changes nothing: it is told.
    containerd.restart();
    containerd.delete(&task, 137);
    node.wait_gone(&task.shim);
    for (topic, count) in topics {
        assert_eq!(
            forwarded(&containerd, topic),
            2 * count,
            "{topic}, {before:?}"
        );
    }
    let order: Vec<String> = late
        .of_container("meanwhile")
        .into_iter()
        .map(|event| format!("{} {}", event.topic, event.text("id")))
        .collect();
    let told = [
        "/tasks/exit session",
        "/tasks/oom ",
        "/tasks/exit meanwhile",
    ];
    assert_eq!(order, told);
}

/// Delete and Shutdown while containerd is away: the events wait on disk, whatever becomes of those
/// who could send them.
fn events_outlive_their_task_and_their_shim(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);
    for id in ["by-delete", "by-the-next"] {
        let task = containerd.run(&exits_with_23(id));
        containerd.kill();
        node.signal(&task.init, "TERM");
        wait_for("the exit in the record", || task.recorded().exit);
        let delete = DeleteRequest {
            id: id.into(),
            exec_id: String::new(),
        };
        let deleted: DeleteResponse = task.call("Delete", &delete).expect("delete");
        assert_eq!(deleted.exit_status, 23);
        let shutdown = ShutdownRequest {
            id: id.into(),
            now: false,
        };
        task.call::<()>("Shutdown", &shutdown).expect("shutdown");
        // It has gone from its place and still tries.
        let beside = recoverd_common::paths::Beside::of(&node.path(task.socket()));
        assert!(!node.path(task.socket()).exists() && !beside.record.exists());
        assert_eq!(waiting_events(&task), Some(2));
        task.assert_shim_alive();
        node.kill(&task.shim);
        assert_eq!(waiting_events(&task), Some(2));
        if id == "by-the-next" {
            // No `delete` comes by.
            node.run("rm", ["-r".as_ref(), task.bundle().as_os_str()]);
        }
        // Told while it starts, before anybody can subscribe: its own log says so.
        containerd.log_level("trace");
        containerd.start();
        if id == "by-the-next" {
            let events = Events::of(&containerd);
            // It may be told by now; a shim of the group that comes must be there for that.
            assert_eq!(waiting_events(&task), Some(2));
            containerd.ctr_ok("e2e", ["containers", "delete", id]);
            let next = containerd.run(&exits_with_23(id));
            let told = wait_for("the exit", || {
                let told = events.of_container(id);
                told.iter()
                    .any(|event| event.topic == "/tasks/start")
                    .then_some(told)
            });
            let topics: Vec<&str> = told.iter().map(|event| event.topic.as_str()).collect();
            let expected = [
                "/tasks/exit",
                "/tasks/delete",
                "/tasks/create",
                "/tasks/start",
            ];
            let tasks: Vec<&str> = topics
                .into_iter()
                .filter(|topic| topic.starts_with("/tasks/"))
                .collect();
            assert_eq!(tasks, expected);
            assert_eq!(told[0].number("pid"), u64::from(task.init.pid));
            assert_eq!(told[0].number("exit_status"), 23);
            containerd.remove(&next);
        } else {
            for topic in ["/tasks/exit", "/tasks/delete"] {
                wait_for("the telling", || {
                    (forwarded(&containerd, topic) == 1).then_some(())
                });
            }
            containerd.ctr_ok("e2e", ["containers", "delete", id]);
        }
        before.wait_restored(&node);
    }
}

fn scan_and_show_know_our_shim(release: &Release) {
    let node: Arc<Node> = Node::start();
    let mut containerd = node.containerd(release);
    containerd.import_image("e2e");
    let running = containerd.run(&ours("running").image());
    let mut client = containerd.exec_attached(
        &running,
        "session",
        &["sh", "-c", "sleep 100000; :", "session"],
    );
    let session = node.shell_with("session");
    let member = containerd.run(&ours("member").group("running"));
    let paused = containerd.run(&ours("paused"));
    containerd.pause(&paused);
    let terminal = containerd.run(&ours("terminal").terminal());
    let stopped = containerd.run(&exits_with_23("stopped"));
    node.signal(&stopped.init, "TERM");
    wait_for("containerd to learn of the exit", || {
        (containerd.task("e2e", "stopped")?.status == "STOPPED").then_some(())
    });
    let late = containerd.run(&exits_with_23("late"));
    let all = [&running, &member, &paused, &terminal, &stopped, &late];

    let look = |containerd: &Containerd, phase_of_late: &str| {
        for scan in [node.scan(), containerd.scan(), node.scan_of_any_age()] {
            scan.assert_clean();
            assert_eq!(scan.report.tasks.len(), all.len(), "{scan:#?}");
            for task in all {
                let case = scan.task(&task.name());
                let shim = case.shim.as_ref();
                let shim = shim.unwrap_or_else(|| panic!("no shim in {case:?}"));
                assert_eq!(shim.kind, "ours", "{case:?}");
                assert_eq!(shim.pid, Some(task.shim.pid), "{case:?}");
                assert_eq!(shim.socket.as_deref(), task.socket().to_str(), "{case:?}");
                assert_eq!(shim.outdated, Some(false), "{case:?}");
                let expected = match task.id() {
                    "late" => phase_of_late,
                    id @ ("paused" | "stopped") => id,
                    _ => "running",
                };
                assert_eq!(case.phase, expected, "{case:?}");
            }
        }
        for task in all {
            task.assert_shim_alive();
        }
    };
    look(&containerd, "running");
    let (_, ()) = beside(
        || assert_shown(&node, &running, "running"),
        || look(&containerd, "running"),
    );
    assert_shown(&node, &member, "running");
    assert_shown(&node, &paused, "paused");
    assert_shown(&node, &stopped, "stopped");
    // An exec without its client would be a finding, and a true one.
    node.kill(&session);
    // It removes its fifos itself.
    client.wait();
    containerd.kill();
    look(&containerd, "running");
    node.signal(&late.init, "TERM");
    wait_for("the exit in the record", || late.recorded().exit);
    look(&containerd, "stopped");
    assert_shown(&node, &late, "stopped");
    containerd.start();
    look(&containerd, "stopped");
}

/// `recoverd show` says what the record says.
#[track_caller]
fn assert_shown(node: &Node, task: &Task, phase: &str) {
    let output = node.recoverd(["show", &task.name()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}{output:?}");
    let record = recoverd_common::paths::Beside::of(Path::new(task.socket())).record;
    let line = text
        .lines()
        .find(|line| line.contains(&record.display().to_string()))
        .unwrap_or_else(|| panic!("the record is not shown: {text}"));
    assert!(line.contains("record"), "{line}");
    assert!(line.contains(&format!("shim {} ", task.shim.pid)), "{line}");
    assert!(line.contains(phase), "{line}");
}
