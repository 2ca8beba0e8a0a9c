//! `recoverd supervise`: SPEC's row F6 (a shim of ours dies while containerd is up), the witness of
//! exits, F4 with terminals and writers, and what is never hidden.

use std::fs::{self, File};
use std::io::Write;
use std::panic::resume_unwind;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use recoverd_common::paths::Beside;
use recoverd_common::pb::task::Status;
use recoverd_common::shim_client::ShimClient;
use recoverd_tests::{
    Container, Containerd, Events, Fifos, HeldRunc, HeldStdio, HeldTerminal, Input, Node, Output,
    Process, Reader, Release, ShimUnderTest, Supervisor, Task, Traces, make_fifo, numbers,
    oci_spec, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        a_killed_shim_is_nobodys_end,
        ends_are_not_held_back_by_a_supervisor_that_came_later_or_a_shim_that_died,
        what_is_asked_for_when_a_shim_dies_is_done_once_or_refused,
        clients_go_on_when_shim_and_supervisor_die_in_turns,
        an_exit_that_only_the_supervisor_saw_is_told_truly,
        writers_and_terminals_of_a_stock_shim_outlive_it,
        intended_ends_are_not_hidden_and_nothing_is_kept,
        a_hung_supervisor_holds_back_no_end_of_an_output,
        a_hung_supervisor_holds_back_an_end_of_stdin_until_it_goes_on_or_ends,
        clients_go_on_when_shims_and_containerd_die_under_a_supervisor,
    ],
    once: [
        a_shim_that_dies_five_times_in_a_minute_is_given_up_and_adopted_by_hand,
        what_a_shim_says_with_its_last_breath_is_heard,
        one_supervisor_at_a_time,
        a_configuration_that_is_no_good_keeps_no_supervisor_away,
        metrics_are_told_on_loopback_and_nowhere_else,
        a_shim_whose_record_is_lost_has_a_successor,
    ],
}

/// A line of shell that writes 1, 2, 3, … until `stop` exists, slowly enough to be alive for long.
fn counting(stop: &str, exit: u32) -> String {
    format!(
        "n=0; while [ ! -e {stop} ]; do n=$((n+1)); echo $n; \
         [ $((n % 20)) -ne 0 ] || usleep 5000; done; exit {exit}"
    )
}

/// Every line, each after the one before it; how many.
#[track_caller]
fn assert_numbered(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        assert_eq!(line.parse(), Ok(at + 1), "line {at} of {}", lines.len());
    }
    lines.len()
}

fn ours(id: &str) -> Container {
    Container::new(id).shim(ShimUnderTest::Recoverd)
}

/// Counts until `/mnt/stop` exists, then exits with 23.
fn counter(node: &Node, id: &str) -> Container {
    let line = counting("/mnt/stop", 23);
    ours(id).shares(node).command(["sh", "-c", &line])
}

/// SIGKILLs whoever serves the task and waits for the successor, and until the supervisor has it for
/// one; which that is.
#[track_caller]
fn kill_and_await(node: &Node, supervisor: &Supervisor, task: &Task) -> Process {
    let adopted = || supervisor.metric("recoverd_resumes_total{result=\"adopted\"}");
    let (old, before) = (task.shim_now(), adopted());
    node.kill(&old);
    let new = task.shim_now();
    assert_ne!(new.pid, old.pid);
    wait_for("a successor", || (adopted() > before).then_some(()));
    new
}

#[track_caller]
fn assert_running(containerd: &Containerd, task: &Task) {
    task.assert_init_alive();
    let row = containerd.task(task.namespace(), task.id());
    let row = row.map(|row| (row.pid, row.status));
    assert_eq!(row, Some((task.init.pid, "RUNNING".to_owned())));
}

/// What is typed into a terminal.
struct Typed(File);

impl Typed {
    #[track_caller]
    fn new(node: &Node, name: &str) -> (Typed, Stdio) {
        let path = make_fifo(node, name);
        let open = || {
            let both = File::options().read(true).write(true).open(&path);
            both.unwrap_or_else(|e| panic!("open {}: {e}", path.display()))
        };
        (Typed(open()), Stdio::from(open()))
    }

    #[track_caller]
    fn line(&mut self, line: &str) {
        let written = self.0.write_all(format!("{line}\n").as_bytes());
        written.unwrap_or_else(|e| panic!("type {line:?}: {e}"));
    }
}

/// Types a line and waits for what it prints.
#[track_caller]
fn type_and_see(typed: &mut Typed, terminal: &recoverd_tests::Running, word: &str) {
    let (first, rest) = word.split_at(1);
    // Its echo does not hold the word itself.
    typed.line(&format!("echo '{first}''{rest}'"));
    wait_for(&format!("{word} on the terminal"), || {
        terminal.text().contains(word).then_some(())
    });
}

fn a_killed_shim_is_nobodys_end(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let before = Traces::of(&node);
    let supervisor = node.supervise();
    let events = Events::of(&containerd);

    let (blocked, mut client) = containerd.run_attached(&counter(&node, "blocked"));
    let (mut typed, stdin) = Typed::new(&node, "typed");
    let (terminal, mut shown) =
        containerd.run_typed(&ours("terminal").terminal().command(["sh"]), stdin);
    type_and_see(&mut typed, &shown, "before");
    let mut exec = containerd.exec_attached(
        &blocked,
        "session",
        &["sh", "-c", &counting("/mnt/exec-stop", 7), "session"],
    );
    let session = node.shell_with("session");
    let pod: Vec<Task> = [
        ("pause", None),
        ("app", Some("app")),
        ("side", Some("side")),
    ]
    .into_iter()
    .map(|(id, name)| containerd.run(&ours(id).pod("pause", "prod", "web-0", name)))
    .collect();
    supervisor.wait_watching("ours", 3);

    for round in 0..3 {
        for task in [&blocked, &terminal, &pod[0]] {
            kill_and_await(&node, &supervisor, task);
        }
        type_and_see(&mut typed, &shown, &format!("round-{round}"));
        for task in pod.iter().chain([&blocked, &terminal]) {
            assert_running(&containerd, task);
        }
        assert!(node.alive(&session), "the exec session ended");
        for running in [&mut client, &mut shown, &mut exec] {
            assert!(running.is_running(), "{}", running.text());
        }
        let (was, was_exec) = (client.text().len(), exec.text().len());
        wait_for("both streams to go on", || {
            (client.text().len() > was && exec.text().len() > was_exec).then_some(())
        });
    }
    assert_eq!(pod[1].shim_now(), pod[0].shim_now());
    for (name, value) in [
        ("recoverd_supervised_shims{kind=\"ours\"}", 3.0),
        ("recoverd_supervised_tasks{kind=\"ours\"}", 5.0),
        ("recoverd_supervised_tasks{kind=\"stock\"}", 0.0),
        (
            "recoverd_shim_deaths_total{kind=\"ours\",follows=\"successor\"}",
            9.0,
        ),
        ("recoverd_resumes_total{result=\"adopted\"}", 9.0),
        ("recoverd_resume_seconds_count", 9.0),
    ] {
        assert_eq!(supervisor.metric(name), value, "{name}");
    }
    // Their number has no bound.
    let text = supervisor.metrics();
    for sample in text.lines().filter(|line| line.starts_with("recoverd_")) {
        for id in ["blocked", "terminal", "session", "pause", "app", "side"] {
            assert!(!sample.contains(id), "{sample}");
        }
    }
    // containerd has noticed nothing.
    for id in ["blocked", "terminal", "pause", "app", "side"] {
        for topic in ["/tasks/exit", "/tasks/delete"] {
            let told = events.of_topic(id, topic);
            let of_exec = |event: &recoverd_tests::Event| event.text("id") == "session";
            assert!(told.iter().all(of_exec), "{id} {topic}: {told:?}");
        }
    }

    node.tell("exec-stop");
    assert_eq!(exec.wait().code(), Some(7), "{}", exec.text());
    assert!(assert_numbered(&exec.text()) > 100);
    node.tell("stop");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    assert!(assert_numbered(&client.text()) > 100);
    typed.line("exit 5");
    assert_eq!(shown.wait().code(), Some(5), "{}", shown.text());
    for id in ["blocked", "terminal"] {
        containerd.ctr_ok("e2e", ["containers", "delete", id]);
    }
    for task in pod.iter().rev() {
        containerd.remove(task);
    }
    nothing_is_kept(&supervisor);
    supervisor.stop();
    drop(events);
    fs::remove_dir_all(node.path("/run/recoverd")).unwrap_or_else(|e| panic!("{e}"));
    let _ = fs::remove_dir_all(node.path("/var/lib/recoverd"));
    before.wait_restored(&node);
}

#[track_caller]
fn nothing_is_kept(supervisor: &Supervisor) {
    wait_for("nothing to be kept any more", || {
        let text = supervisor.metrics();
        let mut kept = text
            .lines()
            .filter(|line| line.starts_with("recoverd_kept_descriptors{"));
        kept.all(|line| line.ends_with(" 0")).then_some(())
    });
}

fn clients_go_on_when_shim_and_supervisor_die_in_turns(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    // No supervisor yet: nothing was pushed to anybody.
    let (blocked, mut client) = containerd.run_attached(&counter(&node, "blocked"));
    let (mut typed, stdin) = Typed::new(&node, "typed");
    let (terminal, mut shown) =
        containerd.run_typed(&ours("terminal").terminal().command(["sh"]), stdin);
    for round in 0..3 {
        let supervisor = node.supervise();
        supervisor.wait_watching("ours", 2);
        for task in [&blocked, &terminal] {
            kill_and_await(&node, &supervisor, task);
            assert_running(&containerd, task);
        }
        type_and_see(&mut typed, &shown, &format!("round-{round}"));
        let was = client.text().len();
        wait_for("the stream to go on", || {
            (client.text().len() > was).then_some(())
        });
        assert!(client.is_running() && shown.is_running());
        if round == 1 {
            supervisor.stop();
        } else {
            supervisor.kill();
        }
    }
    let supervisor = node.supervise();
    node.tell("stop");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    assert_numbered(&client.text());
    typed.line("exit 5");
    assert_eq!(shown.wait().code(), Some(5), "{}", shown.text());
    nothing_is_kept(&supervisor);
}

fn ends_are_not_held_back_by_a_supervisor_that_came_later_or_a_shim_that_died(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&writer(&node, "late"));
    let stream = Reader::open(&node.stdout_of("late"));
    node.tell("late.go");
    stream.wait_advance();
    let supervisor = node.supervise();
    supervisor.wait_watching("ours", 1);
    node.tell("late.stop");
    stream.finish(node.count_in("late.count"));
    assert_eq!(task.wait("").exit_status, 0);
    containerd.delete(&task, 0);

    // An init and an exec that end while a successor is on its way: it has nothing to open of them.
    let config = slow_shim(&node, "go-on");
    supervisor.kill();
    let supervisor = node.supervise_with(&config);
    let pod = containerd.run(&ours("pod").shares(&node));
    let ends = containerd.run(&writer(&node, "ends").group("pod"));
    let line = numbers("/mnt/e.go", "/mnt/e.stop", "/mnt/e.count");
    containerd.exec(&pod, "session", &["sh", "-c", &line, "session"]);
    let streams = ["ends", "session"].map(|name| Reader::open(&node.stdout_of(name)));
    let session = node.shell_with("session");
    for name in ["ends.go", "e.go"] {
        node.tell(name);
    }
    streams.iter().for_each(Reader::wait_advance);
    let shim = pod.shim_now();
    supervisor.wait_watches(&[&shim, &pod.init, &ends.init, &session]);
    node.kill(&shim);
    for name in ["ends.stop", "e.stop"] {
        node.tell(name);
    }
    node.wait_gone(&ends.init);
    node.wait_gone(&session);
    node.tell("go-on");
    for (stream, count) in streams.into_iter().zip(["ends.count", "e.count"]) {
        stream.finish(node.count_in(count));
    }
    assert_eq!(pod.wait("session").exit_status, 0);
    containerd.delete(&ends, 0);
    containerd.remove(&pod);
    nothing_is_kept(&supervisor);
}

/// It has nothing that could: no write end of a fifo that somebody reads.
fn a_hung_supervisor_holds_back_no_end_of_an_output(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = node.supervise();
    let (task, mut client) = containerd.run_attached(&counter(&node, "blocked"));
    let (mut typed, stdin) = Typed::new(&node, "typed");
    let (terminal, mut shown) =
        containerd.run_typed(&ours("terminal").terminal().command(["sh"]), stdin);
    let mut exec = containerd.exec_attached(
        &task,
        "session",
        &["sh", "-c", &counting("/mnt/exec-stop", 7), "session"],
    );
    // A start in the middle would be refused.
    wait_for("the exec to run", || {
        let state = task.exec_state("session")?;
        (state.status() == Status::Running).then_some(())
    });
    supervisor.wait_watching("ours", 2);
    // Once more: what it has not been told it finds by looking.
    for task in [&task, &terminal] {
        kill_and_await(&node, &supervisor, task);
    }
    type_and_see(&mut typed, &shown, "after");
    wait_for("the exec's pipe to be kept", || {
        (supervisor.kept("output") >= 1.0).then_some(())
    });
    let pid = supervisor.process().pid;
    let table = node.run("ls", ["-l", &format!("/proc/{pid}/fd")]);
    assert!(table.contains("ptmx"), "{table}");
    for line in table.lines() {
        let line = line.trim_end();
        assert!(
            !line.ends_with("-stdout") && !line.ends_with("-stderr"),
            "{table}"
        );
    }

    node.signal(supervisor.process(), "STOP");
    node.tell("exec-stop");
    assert_eq!(exec.wait().code(), Some(7), "{}", exec.text());
    node.tell("stop");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    typed.line("exit 5");
    assert_eq!(shown.wait().code(), Some(5), "{}", shown.text());
    node.signal(supervisor.process(), "CONT");
    for (stream, least) in [(&exec, 100), (&client, 100)] {
        assert!(assert_numbered(&stream.text()) > least);
    }
    nothing_is_kept(&supervisor);
}

/// It has a spare write end of a stdin; whoever asks for CloseIO is answered all the same.
fn a_hung_supervisor_holds_back_an_end_of_stdin_until_it_goes_on_or_ends(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = node.supervise();
    let api = containerd.api("e2e");
    let reads = ["first", "second"].map(|id| {
        let fifos = Fifos::make(&node, id);
        let copy = fifos.stdout();
        api.run(
            id,
            &oci_spec(id, &["cat"]),
            ShimUnderTest::Recoverd,
            &fifos.stdio,
        );
        (id, copy, fifos.stdin())
    });
    wait_for("both stdins to be kept", || {
        (supervisor.kept("stdin") == 2.0).then_some(())
    });
    let close = |(id, copy, mut lines): (&'static str, Output, Input)| {
        node.freeze(supervisor.process());
        lines.write("the last\n");
        drop(lines);
        let closed = api.close_stdin(id, "");
        closed.unwrap_or_else(|refused| panic!("{id}: {refused:?}"));
        copy.wait_text("the last\n");
        (id, copy)
    };
    let assert_ended = |(id, copy): (&str, Output)| {
        assert_eq!(api.status(id, ""), 0);
        assert_eq!(copy.wait_end(), "the last\n");
        let ended = api.delete(id, "");
        assert_eq!(ended.map(|ended| ended.status), Ok(0), "{id}");
    };
    let [first, second] = reads;
    let first = close(first);
    node.signal(supervisor.process(), "CONT");
    assert_ended(first);
    wait_for("its stdin to be kept no more", || {
        (supervisor.kept("stdin") == 1.0).then_some(())
    });
    let second = close(second);
    supervisor.kill();
    assert_ended(second);
}

fn writer(node: &Node, id: &str) -> Container {
    let [go, stop, count] = ["go", "stop", "count"].map(|word| format!("/mnt/{id}.{word}"));
    let line = numbers(&go, &stop, &count);
    ours(id).shares(node).command(["sh", "-c", &line])
}

/// SPEC's row F7: the shim dies while runc is at it.
fn what_is_asked_for_when_a_shim_dies_is_done_once_or_refused(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let runc = HeldRunc::of(&mut containerd);
    let supervisor = node.supervise();
    let of = |id: &str| {
        let line = "trap 'exit 7' TERM; while :; do sleep 1000 & wait $!; done";
        ours(id).command(["sh", "-c", line])
    };
    let pod = containerd.run(&of("pod"));
    // The client's end, its text, and how often runc was asked for it since.
    let dies_at = |shim: &Task, verb: &str, args: &[String]| {
        let before = runc.calls(verb);
        let mut client = runc.held(verb, || containerd.ctr_spawn("e2e", args));
        node.kill(&shim.shim_now());
        runc.go_on(verb);
        let done = client.wait().success();
        assert!(done || !client.text().is_empty(), "{verb} says nothing");
        pod.assert_init_alive();
        (done, client.text(), runc.calls(verb) - before)
    };
    let words =
        |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };

    for verb in ["create", "start"] {
        let container = of(verb).group("pod");
        let (done, text, asked) = dies_at(&pod, verb, &containerd.run_words(&container));
        assert_eq!(asked, 1, "{verb}: {text}");
        if done {
            let task = containerd.running(&container);
            node.signal(&task.init, "TERM");
            assert_eq!(task.wait("").exit_status, 7);
            containerd.delete(&task, 7);
        } else {
            assert!(text.contains("shim died"), "{verb}: {text}");
            // What its client itself leaves.
            for words in [
                ["tasks", "delete", "--force", verb].as_slice(),
                &["containers", "delete", verb],
            ] {
                let _gone_already = containerd.ctr("e2e", words).output();
            }
            wait_for(&format!("nothing to be left of {verb}"), || {
                let state = node.path(format!("/run/containerd/runc/e2e/{verb}"));
                (!state.exists() && containerd.task("e2e", verb).is_none()).then_some(())
            });
            // And it can be had.
            containerd.remove(&containerd.run(&container));
        }
    }

    let line = "echo said; exit 5";
    let args = words(&["tasks", "exec", "--exec-id", "e", "pod", "sh", "-c", line]);
    let (_, text, asked) = dies_at(&pod, "exec", &args);
    assert_eq!(asked, 1, "{text}");
    match pod.exec_state("e").map(|state| state.exit_status) {
        // Its client has heard all of it, and deleted it.
        None => assert!(text.starts_with("said\n"), "{text}"),
        Some(_) => assert!(text.contains("shim died"), "{text}"),
    }

    // A shim that dies five times in a minute would be given up.
    let second = containerd.run(&of("second"));
    let task = containerd.run(&of("victim").group("second"));
    node.wait_trap(&task.init);
    let (done, text, _) = dies_at(
        &second,
        "kill",
        &words(&["tasks", "kill", "--all", "--signal", "TERM", "victim"]),
    );
    if !done {
        assert!(text.contains("shim died"), "{text}");
        // It may have been done.
        let _gone = node.output("kill", ["-s", "TERM", &task.init.pid.to_string()]);
    }
    assert_eq!(task.wait("").exit_status, 7);
    let (done, text, _) = dies_at(&second, "delete", &words(&["tasks", "delete", "victim"]));
    if done {
        assert!(containerd.task("e2e", "victim").is_none(), "{text}");
        containerd.ctr_ok("e2e", ["containers", "delete", "victim"]);
    } else {
        containerd.delete(&task, 7);
    }
    for task in [&pod, &second] {
        task.assert_init_alive();
        containerd.remove(task);
    }
    nothing_is_kept(&supervisor);
}

/// A shim that starts only when `NAME` exists in the node's folder.
#[track_caller]
fn slow_shim(node: &Arc<Node>, name: &str) -> String {
    let path = node.folder().join("slow-shim");
    let script = format!(
        "#!/bin/sh\nwhile [ ! -e {} ]; do sleep 0.02; done\nexec {} \"$@\"\n",
        node.folder().join(name).display(),
        node.built("containerd-shim-recoverd-v1").display()
    );
    fs::write(&path, script).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    node.run("chmod", ["0755", &path.display().to_string()]);
    format!(
        "[adopt]\nbinary = {:?}\ndeadline = \"60s\"\n",
        path.display().to_string()
    )
}

fn an_exit_that_only_the_supervisor_saw_is_told_truly(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let config = slow_shim(&node, "go-on");
    let supervisor = node.supervise_with(&config);
    let events = Events::of(&containerd);
    let (task, mut client) = containerd.run_attached(&ours("seen").command([
        "sh",
        "-c",
        "trap 'exit 23' TERM; while :; do sleep 1000 & wait $!; done",
    ]));
    containerd.exec(
        &task,
        "session",
        &[
            "sh",
            "-c",
            "trap 'exit 7' TERM; while :; do sleep 1000 & wait $!; done",
            "session",
        ],
    );
    let session = node.shell_with("session");
    supervisor.wait_watches(&[&task.shim, &task.init, &session]);
    node.kill(&task.shim);
    for process in [&session, &task.init] {
        node.signal(process, "TERM");
        node.wait_gone(process);
    }
    wait_for("both exits to be witnessed", || {
        let seen = node.witnessed();
        let exits = seen["exits"].as_array()?;
        let of = |pid: u32| exits.iter().find(|exit| exit["process"][0] == pid);
        (of(session.pid)?["status"] == 7 && of(task.init.pid)?["status"] == 23).then_some(())
    });
    assert!(client.is_running(), "{}", client.text());
    node.tell("go-on");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    for (id, status) in [("session", 7), ("seen", 23)] {
        let told = wait_for(&format!("the exit of {id}"), || {
            let exits = events.of_topic("seen", "/tasks/exit");
            exits.into_iter().find(|event| event.text("id") == id)
        });
        assert_eq!(told.number("exit_status"), status, "{told:?}");
    }
    supervisor.stop();

    // It outlives the supervisor: what it saw is on disk.
    let supervisor = node.supervise_with("[adopt]\nbinary = \"/bin/false\"\n");
    let task = containerd.run(&ours("later").command([
        "sh",
        "-c",
        "trap 'exit 42' TERM; while :; do sleep 1000 & wait $!; done",
    ]));
    supervisor.wait_watches(&[&task.shim, &task.init]);
    containerd.kill();
    node.kill(&task.shim);
    node.signal(&task.init, "TERM");
    node.wait_gone(&task.init);
    wait_for("the exit to be witnessed", || {
        let seen = node.witnessed();
        let exits = seen["exits"].as_array()?;
        exits.iter().find(|exit| exit["status"] == 42).map(drop)
    });
    supervisor.kill();
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    assert_eq!(task.wait("").exit_status, 42);
    containerd.delete(&task, 42);
}

/// Counts from when `/mnt/go` exists until `/mnt/hush` does, and says in `/mnt/hushed` how far that
/// was; from `/mnt/go-on` on a hundred more, and says so in `/mnt/alone`; then until `/mnt/stop`
/// exists, and says how many these were in `/mnt/count`.
const COUNTING_IN_PARTS: &str = "n=0; \
    line() { n=$((n+1)); echo $n; [ $((n % 20)) -ne 0 ] || usleep 5000; }; \
    until_there() { while [ ! -e /mnt/$1 ]; do usleep 20000; done; }; \
    until_there go; while [ ! -e /mnt/hush ]; do line; done; echo $n >/mnt/hushed; \
    until_there go-on; i=0; while [ $i -lt 100 ]; do i=$((i+1)); line; done; echo $n >/mnt/alone; \
    while [ ! -e /mnt/stop ]; do line; done; echo $n >/mnt/count; exit 23";

fn writers_and_terminals_of_a_stock_shim_outlive_it(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let supervisor = node.supervise();
    let of = |id: &str, line: &str| {
        let container = Container::new(id).shares(&node);
        containerd.run(&container.command(["sh", "-c", line]))
    };
    let writer = of("writer", COUNTING_IN_PARTS);
    let fifo = node.stdout_of("writer");
    let stream = Reader::open(&fifo);
    // A stock shim's end is the end of its streams to those who read them: not to this one.
    let fifo_held = File::options().read(true).write(true).open(&fifo);
    let fifo_held = fifo_held.unwrap_or_else(|e| panic!("open {}: {e}", fifo.display()));
    // It is silent until it is adopted: nobody keeps what an exec of a stock shim writes into.
    let line = numbers("/mnt/e.go", "/mnt/e.stop", "/mnt/e.count");
    let line = format!("{line}; exit 7");
    containerd.exec(&writer, "session", &["sh", "-c", &line, "session"]);
    let session = node.shell_with("session");
    let of_session = Reader::open(&node.stdout_of("session"));
    let held = HeldTerminal::run(&containerd, ShimUnderTest::Stock);
    let shell = &held.shell;
    let line = "trap 'exit 41' TERM; while :; do sleep 1000 & wait $!; done";
    let ends = of("ends", line);
    supervisor.wait_watching("stock", 3);
    supervisor.wait_watches(&[&writer.shim, &shell.shim, &ends.shim]);
    supervisor.wait_watches(&[&writer.init, &shell.init, &ends.init]);
    wait_for("its pipes and its terminal to be kept", || {
        (supervisor.kept("output") >= 4.0 && supervisor.kept("master") == 1.0).then_some(())
    });
    assert_eq!(supervisor.kept("stdin"), 0.0);
    node.tell("go");
    stream.wait_advance();
    // What a stock shim has read and not yet written is lost with it: here it is nothing.
    node.tell("hush");
    let hushed = node.count_in("hushed");
    wait_for("the stream to be quiet", || {
        (stream.last() == hushed).then_some(())
    });
    of_session.away();

    containerd.kill();
    // It exits with 0 then, as if all were done.
    node.signal(&writer.shim, "TERM");
    node.wait_gone(&writer.shim);
    for task in [shell, &ends] {
        node.kill(&task.shim);
    }
    node.signal(&ends.init, "TERM");
    node.wait_gone(&ends.init);
    // Without a reader these lines would be nobody's, and a shell without a terminal dead by now.
    node.tell("go-on");
    assert_eq!(node.count_in("alone"), hushed + 100);
    wait_for("the deaths to be told", || {
        let seen = node.witnessed();
        let deaths = seen["deaths"].as_array()?;
        let losses = deaths.iter().filter(|death| death["follows"] == "loss");
        (losses.count() == 3).then_some(())
    });
    let said = || node.witnessed()["stdio"].as_array().map_or(0, Vec::len);
    assert_eq!(
        said(),
        3,
        "their exits may be told yet, and what they wrote be read"
    );
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    for task in [&writer, shell] {
        assert_running(&containerd, task);
    }
    assert!(node.alive(&session), "the exec session ended");
    of_session.back();
    node.tell("e.go");
    of_session.wait_advance();
    wait_for("the stream to go on", || {
        (stream.last() > hushed).then_some(())
    });
    drop(fifo_held);
    assert_eq!(ends.wait("").exit_status, 41);
    containerd.delete(&ends, 41);
    held.assert_goes_on(&containerd);

    node.tell("e.stop");
    of_session.finish(node.count_in("e.count"));
    assert_eq!(writer.wait("session").exit_status, 7);
    node.tell("stop");
    stream.finish(node.count_in("count"));
    assert_eq!(writer.wait("").exit_status, 23);
    containerd.delete(&writer, 23);
    nothing_is_kept(&supervisor);
    wait_for("what the shims said to be forgotten", || {
        (said() == 0).then_some(())
    });
}

fn intended_ends_are_not_hidden_and_nothing_is_kept(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = node.supervise();
    // stdin's end reaches the process, its output's end the client, and its own the shim.
    for shim in [ShimUnderTest::Recoverd, ShimUnderTest::Stock] {
        let id = format!("cat-{}", shim.runtime().display().to_string().len());
        let container = Container::new(&id).shim(shim).command(["cat"]);
        let output = containerd.run_to_end(&container, "some words\n");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(output.stdout, b"some words\n");
        containerd.ctr_ok("e2e", ["containers", "delete", &id]);
    }
    // A shim that is asked to end has no successor.
    let task = containerd.run(&ours("asked"));
    supervisor.wait_watching("ours", 1);
    node.signal(&task.shim, "TERM");
    node.wait_gone(&task.shim);
    wait_for("containerd to see its end", || {
        containerd.task("e2e", "asked").is_none().then_some(())
    });
    let resumed = supervisor.metric("recoverd_resumes_total{result=\"adopted\"}");
    assert_eq!(resumed, 0.0);
    nothing_is_kept(&supervisor);
}

fn a_shim_that_dies_five_times_in_a_minute_is_given_up_and_adopted_by_hand(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = node.supervise();
    let (task, mut client) = containerd.run_attached(&counter(&node, "dies"));
    supervisor.wait_watching("ours", 1);
    for _ in 0..5 {
        // As soon as its end would be seen, whatever else is still to be done about it.
        let shim = task.shim_now();
        supervisor.wait_watches(&[&shim]);
        node.kill(&shim);
    }
    wait_for("it to be given up", || {
        (supervisor.metric("recoverd_given_up_shims") == 1.0).then_some(())
    });
    task.assert_init_alive();
    assert!(
        supervisor.text().contains("five times in a minute"),
        "{}",
        supervisor.text()
    );
    let scan = node.scan_of_any_age();
    assert_eq!(scan.codes("e2e/dies"), ["orphaned-task"], "{scan:#?}");
    assert!(
        scan.finding("orphaned-task").mentions("given-up"),
        "{scan:#?}"
    );
    // The client waits on, and has its answer from whoever comes.
    assert!(client.is_running(), "{}", client.text());
    let adopted = node.recoverd(["adopt"]);
    assert!(adopted.status.success(), "{adopted:?}");
    wait_for("it to be watched again", || {
        (supervisor.metric("recoverd_given_up_shims") == 0.0).then_some(())
    });
    assert_running(&containerd, &task);
    node.tell("stop");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    assert_numbered(&client.text());
}

fn what_a_shim_says_with_its_last_breath_is_heard(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    // Without a supervisor: it has never spoken to one.
    let task = containerd.run(&ours("last"));
    let supervisor = node.supervise();
    supervisor.wait_watching("ours", 1);
    // It hears of the connection and of the death at once.
    node.freeze(supervisor.process());
    let until = Instant::now() + Duration::from_secs(60);
    let client = ShimClient::connect(&node.path(task.socket()), task.namespace(), until);
    let mut client = client.unwrap_or_else(|error| panic!("connect: {error}"));
    let mut serves = || {
        let answer = client.connect_task(task.id());
        answer.unwrap_or_else(|error| panic!("{error}")).shim_pid
    };
    let old = serves();
    assert_eq!(old, task.shim.pid);
    node.kill(&task.shim);
    node.signal(supervisor.process(), "CONT");
    // On the very connection.
    assert_ne!(serves(), old);
    assert_running(&containerd, &task);
}

fn one_supervisor_at_a_time(_release: &Release) {
    let node = Node::start();
    let supervisor = node.supervise();
    let second = node.recoverd(["supervise"]);
    assert_eq!(second.status.code(), Some(4), "{second:?}");
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        said.contains(&format!("supervise, pid {}", supervisor.process().pid)),
        "{said}"
    );
    let mode = node.run(
        "stat",
        ["-c", "%a", "/run/recoverd/supervise.sock", "/run/recoverd"],
    );
    assert_eq!(mode, "600\n700\n");
    supervisor.kill();
    node.supervise().stop();
    assert!(!node.path("/run/recoverd/supervise.sock").exists());
}

fn a_configuration_that_is_no_good_keeps_no_supervisor_away(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&ours("looked-after"));
    let supervisor = node.supervise_with("[supervise]\nmetrics-listn = \"127.0.0.1:1\"\n");
    let said = supervisor.text();
    let words = [
        "supervise.toml:2: ",
        "metrics-listn",
        "going on with the defaults",
    ];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    supervisor.wait_watching("ours", 1);
    kill_and_await(&node, &supervisor, &task);
    assert_running(&containerd, &task);
    // Wrong words on the command line are nobody's slip of today: its unit does not try again.
    let refused = node.recoverd(["supervise", "--nonsense"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

fn metrics_are_told_on_loopback_and_nowhere_else(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let _task = containerd.run(&ours("counted"));
    let listen = |address: &str| format!("[supervise]\nmetrics-listen = \"{address}\"\n");
    let ask = || node.output("busybox", ["wget", "-qO-", "http://127.0.0.1:9464/metrics"]);
    let supervisor = node.supervise_with(&listen("127.0.0.1:9464"));
    supervisor.wait_watching("ours", 1);
    // Between two looks a number may change.
    let told = wait_for("the same metrics on both", || {
        let told = ask();
        assert!(told.status.success(), "{told:?}");
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        supervisor.metrics().ends_with(&told).then_some(told)
    });
    let sample = "\nrecoverd_supervised_shims{kind=\"ours\"} 1\n";
    assert!(told.contains(sample), "{told}");
    supervisor.stop();

    let supervisor = node.supervise_with(&listen("0.0.0.0:9464"));
    let text = supervisor.text();
    let said: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("metrics-listen"))
        .collect();
    assert!(
        matches!(said[..], [line] if line.contains("supervise.toml:2: ") && line.contains("loopback")),
        "{text}"
    );
    assert!(!ask().status.success());
    supervisor.stop();

    // Somebody else has the port: the shims are looked after all the same.
    let _other = node.spawn("busybox", ["nc", "-l", "-p", "9464"]);
    wait_for("the port to be taken", || {
        let listeners = node.shell("busybox netstat -ltn");
        listeners.contains(":9464 ").then_some(())
    });
    let supervisor = node.supervise_with(&listen("127.0.0.1:9464"));
    supervisor.wait_watching("ours", 1);
    let text = supervisor.text();
    let words = ["no metrics", "127.0.0.1:9464"];
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

/// SPEC's row F11 in the middle of F6.
fn a_shim_whose_record_is_lost_has_a_successor(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let supervisor = node.supervise();
    let (task, mut client) = containerd.run_attached(&counter(&node, "counts"));
    supervisor.wait_watching("ours", 1);
    let record = format!("{}.record", task.socket().display());
    for line in [
        format!("rm {record} {record}.spare"),
        // Cut, as far as it may be.
        format!(": >{record}"),
        format!("echo nonsense >{record}"),
    ] {
        // What it has written last is what is lost.
        supervisor.wait_watches(&[&task.shim_now(), &task.init]);
        node.shell(&line);
        kill_and_await(&node, &supervisor, &task);
        assert_running(&containerd, &task);
        let was = client.text().len();
        wait_for("the stream to go on", || {
            (client.text().len() > was).then_some(())
        });
        assert!(client.is_running(), "{}", client.text());
    }
    node.tell("stop");
    assert_eq!(client.wait().code(), Some(23), "{}", client.text());
    assert_numbered(&client.text());
    nothing_is_kept(&supervisor);
}

/// SPEC's row F3 with what only a supervisor keeps: a terminal, a stdin that its client holds, and
/// the connection of somebody who waits.
fn clients_go_on_when_shims_and_containerd_die_under_a_supervisor(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    // It starts no successor that comes up: pre-start does.
    let supervisor = node.supervise_with("[adopt]\nbinary = \"/bin/false\"\n");
    let held = HeldStdio::run(&containerd, ShimUnderTest::Recoverd);
    let [shell, cat] = held.tasks();
    let counts = containerd.run(&writer(&node, "counts"));
    let line = numbers("/mnt/e.go", "/mnt/e.stop", "/mnt/e.count");
    let line = format!("{line}; exit 7");
    containerd.exec(&counts, "session", &["sh", "-c", &line, "session"]);
    let session = node.shell_with("session");
    let streams = ["counts", "session"].map(|name| Reader::open(&node.stdout_of(name)));
    for name in ["counts.go", "e.go"] {
        node.tell(name);
    }
    streams.iter().for_each(Reader::wait_advance);
    let tasks = [shell, cat, &counts];
    for task in tasks {
        supervisor.wait_watches(&[&task.shim, &task.init]);
    }
    supervisor.wait_watches(&[&session]);
    wait_for("terminal, stdin and the exec's pipe to be kept", || {
        let all = ["master", "stdin", "output"].map(|what| supervisor.kept(what));
        all.iter().all(|kept| *kept >= 1.0).then_some(())
    });

    thread::scope(|scope| {
        let waits = scope.spawn(|| counts.wait("session"));
        // Its connection was given away before.
        let noted = node.path(Beside::of(counts.socket()).requests);
        wait_for("the question to be noted", || {
            let noted = fs::read(&noted).ok()?;
            noted.windows(4).any(|word| word == b"Wait").then_some(())
        });
        containerd.kill();
        for task in tasks {
            node.kill(&task.shim);
        }
        // It writes to its reader without either.
        streams[0].wait_advance();
        let hook = containerd.pre_start();
        assert_eq!(hook.exit, 0, "{hook:?}");
        assert!(hook.line.contains("3 adopted"), "{hook:?}");
        containerd.start();
        for task in tasks {
            assert_running(&containerd, task);
            assert_ne!(task.shim_now(), task.shim);
        }
        assert!(node.alive(&session), "the exec session ended");
        streams.iter().for_each(Reader::wait_advance);
        assert!(!waits.is_finished(), "an end was told that was none");
        node.tell("e.stop");
        let told = waits.join().unwrap_or_else(|why| resume_unwind(why));
        assert_eq!(told.exit_status, 7);
    });
    node.tell("counts.stop");
    for (stream, count) in streams.into_iter().zip(["counts.count", "e.count"]) {
        stream.finish(node.count_in(count));
    }
    assert_eq!(counts.wait("").exit_status, 0);
    containerd.delete(&counts, 0);
    held.assert_goes_on(&containerd);
    nothing_is_kept(&supervisor);
}
