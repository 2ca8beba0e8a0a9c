//! What goes in and out of inits and execs, for every kind of stdio, with the stock shim and ours.

use std::path::Path;
use std::time::{Duration, Instant};

use recoverd_common::pb::runc;
use recoverd_tests::{
    Api, Container, Fifos, Node, Output, Release, SLEEPER, ShimUnderTest, Stdio, oci_process,
    oci_spec, wait_for,
};
use serde_json::json;

recoverd_tests::tests! {
    with_each_shim: [
        fifos_carry_everything_in_order,
        files_take_both_streams,
        loggers_get_both_streams_and_may_die,
        terminals_resize_and_are_attached_again,
    ],
    // Between shim and runtime only: the release has no part in it.
    once_with_each_shim: [
        users_other_than_root_own_their_stdio,
        grandchild_that_keeps_the_output_of_an_exec_holds_nobody,
        without_stdio_there_is_dev_null,
        much_from_a_terminal_arrives_whole,
        much_into_a_terminal_arrives_whole,
        processes_of_a_user_namespace_have_their_stdio,
        nothing_stays_open,
    ],
    // The stock shim copies, through pipes of its own.
    once: [
        fifos_are_as_large_as_the_memory_allows,
    ],
}

/// Says something on stderr, repeats its stdin, ends with its end.
const ECHO: [&str; 3] = ["sh", "-c", "echo aside >&2; cat; echo end; exit 3"];

/// More than any pipe holds.
const LINES: u32 = 300_000;

fn numbers() -> String {
    (1..=LINES).map(|n| format!("{n}\n")).collect()
}

/// The init of a container, or an exec in the container `host`, both made of the same parts.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Init,
    Exec,
}

const KINDS: [Kind; 2] = [Kind::Init, Kind::Exec];

/// A process that was created and not started.
struct Added<'a> {
    api: &'a Api,
    id: String,
    exec_id: String,
}

impl Added<'_> {
    #[track_caller]
    fn start(&self) -> u32 {
        self.api
            .start(&self.id, &self.exec_id)
            .unwrap_or_else(|refused| panic!("start {} {:?}: {refused:?}", self.id, self.exec_id))
    }

    #[track_caller]
    fn status(&self) -> u32 {
        self.api.status(&self.id, &self.exec_id)
    }

    #[track_caller]
    fn delete(&self) {
        self.api
            .delete(&self.id, &self.exec_id)
            .unwrap_or_else(|refused| panic!("delete {} {:?}: {refused:?}", self.id, self.exec_id));
    }

    fn close_stdin(&self) {
        assert_eq!(self.api.close_stdin(&self.id, &self.exec_id), Ok(()));
    }
}

/// Makes one; `name` is used once per test.
#[track_caller]
fn add<'a>(
    api: &'a Api,
    kind: Kind,
    name: &str,
    args: &[&str],
    shim: ShimUnderTest,
    stdio: &Stdio,
) -> Added<'a> {
    let mut process = oci_process(args);
    process["terminal"] = json!(stdio.terminal);
    match kind {
        Kind::Init => {
            let mut spec = oci_spec(name, args);
            spec["process"] = process;
            api.container(name, &spec, shim, None);
            api.create(name, stdio)
                .unwrap_or_else(|refused| panic!("create {name}: {refused:?}"));
            Added {
                api,
                id: name.into(),
                exec_id: String::new(),
            }
        }
        Kind::Exec => {
            api.exec("host", name, &process, stdio)
                .unwrap_or_else(|refused| panic!("exec {name}: {refused:?}"));
            Added {
                api,
                id: "host".into(),
                exec_id: name.into(),
            }
        }
    }
}

/// The container that the execs run in.
#[track_caller]
fn host(api: &Api, shim: ShimUnderTest) {
    api.run("host", &oci_spec("host", &SLEEPER), shim, &Stdio::default());
}

fn fifos_carry_everything_in_order(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    for kind in KINDS {
        let name = |what: &str| {
            format!(
                "{what}-{}",
                if kind == Kind::Init { "init" } else { "exec" }
            )
        };

        // Three streams, each for itself; stdin ends with CloseIO.
        let fifos = Fifos::make(&node, &name("echo"));
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let process = add(&api, kind, &name("echo"), &ECHO, shim, &fifos.stdio);
        // The shim of an exec opens the fifos at Start.
        let started = (kind == Kind::Exec).then(|| process.start());
        let mut stdin = fifos.stdin();
        stdin.write("one\n");
        started.unwrap_or_else(|| process.start());
        stdin.write("two\n");
        stdout.wait_text("one\ntwo\n");
        assert!(!stdout.has_ended() && !stderr.has_ended());
        drop(stdin);
        process.close_stdin();
        assert_eq!(process.status(), 3);
        assert_eq!(stdout.wait_end(), "one\ntwo\nend\n");
        assert_eq!(stderr.wait_end(), "aside\n");
        process.delete();

        // A client that asks for CloseIO and still holds its end: ours ends the stdin, as the
        // client asked; the stock shim goes on waiting for the client.
        if shim == ShimUnderTest::Recoverd {
            let fifos = Fifos::make(&node, &name("held"));
            let (stdout, _stderr) = (fifos.stdout(), fifos.stderr());
            let process = add(&api, kind, &name("held"), &ECHO, shim, &fifos.stdio);
            process.start();
            let mut stdin = fifos.stdin();
            stdin.write("held\n");
            stdout.wait_text("held\n");
            process.close_stdin();
            assert_eq!(process.status(), 3);
            assert_eq!(stdout.wait_end(), "held\nend\n");
            process.delete();
        }

        // Much, both ways: complete, in order, also what was written last.
        let fifos = Fifos::make(&node, &name("much"));
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let command = format!("seq 1 {LINES}; seq 1 {LINES} >&2");
        let process = add(
            &api,
            kind,
            &name("much"),
            &["sh", "-c", &command],
            shim,
            &fifos.stdio,
        );
        process.start();
        assert_eq!(process.status(), 0);
        process.delete();
        assert!(
            stdout.wait_end() == numbers(),
            "stdout differs: {} bytes",
            stdout.bytes().len()
        );
        assert!(
            stderr.wait_end() == numbers(),
            "stderr differs: {} bytes",
            stderr.bytes().len()
        );

        let fifos = Fifos::make(&node, &name("count"));
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let process = add(&api, kind, &name("count"), &["md5sum"], shim, &fifos.stdio);
        process.start();
        let mut stdin = fifos.stdin();
        stdin.write(&numbers());
        drop(stdin);
        process.close_stdin();
        assert_eq!(process.status(), 0);
        let sum = node.shell(&format!("seq 1 {LINES} | md5sum"));
        assert_eq!(stdout.wait_end(), sum);
        assert_eq!(stderr.wait_end(), "");
        process.delete();

        // A reader that comes after the end finds the last words. The stock shim cannot be asked:
        // its Create (or Start of an exec) waits for a reader of each stream.
        if shim == ShimUnderTest::Recoverd {
            let fifos = Fifos::make(&node, &name("late"));
            let _stderr = fifos.stderr();
            let last_words = ["sh", "-c", "echo last words; exit 4"];
            let process = add(&api, kind, &name("late"), &last_words, shim, &fifos.stdio);
            process.start();
            assert_eq!(process.status(), 4);
            assert_eq!(fifos.stdout().wait_end(), "last words\n");
            process.delete();
        }
    }
    api.end("host");
}

#[track_caller]
fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// Lines may come in any order: the two streams are two pipes in the stock shim.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

fn files_take_both_streams(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    for (kind, word) in KINDS.into_iter().zip(["init", "exec"]) {
        let file = node.folder().join(format!("made/for/{word}.log"));
        let stdio = Stdio {
            stdout: format!("file://{}", file.display()),
            stderr: format!("file://{}", file.display()),
            ..Stdio::default()
        };
        // Twice: the second is appended.
        for round in ["first", "second"] {
            let command = format!("echo {round} out; echo {round} err >&2; exit 5");
            let name = format!("{word}-{round}");
            let process = add(&api, kind, &name, &["sh", "-c", &command], shim, &stdio);
            process.start();
            assert_eq!(process.status(), 5);
            process.delete();
        }
        let text = read(&file);
        let mut lines = sorted(&text);
        let mut expected = vec!["first err", "first out", "second err", "second out"];
        if shim == ShimUnderTest::Stock {
            // It copies both streams, each by itself, and was seen to lose a line of stderr.
            lines.retain(|line| line.ends_with("out"));
            expected.retain(|line| line.ends_with("out"));
        }
        assert_eq!(lines, expected, "{word}");
        assert!(text.starts_with("first"), "{text:?}");

        // Much.
        let command = format!("seq 1 {LINES}");
        let process = add(
            &api,
            kind,
            &format!("{word}-much"),
            &["sh", "-c", &command],
            shim,
            &stdio,
        );
        process.start();
        assert_eq!(process.status(), 0);
        process.delete();
        assert!(read(&file) == text + &numbers(), "{word}: the file differs");
    }
    api.end("host");
}

/// Writes an executable script; its path.
#[track_caller]
fn script(node: &Node, name: &str, text: &str) -> String {
    let path = node.folder().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n"))
        .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    node.run("chmod", ["+x".as_ref(), path.as_os_str()]);
    path.display().to_string()
}

fn loggers_get_both_streams_and_may_die(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    let wait_file = |path: &Path| {
        wait_for(&format!("{}", path.display()), || {
            path.exists().then_some(())
        });
    };
    // Ready when `go` exists; says so by closing its third descriptor.
    let logger = script(
        &node,
        "logger",
        // The stock shim ends its loggers when it has closed their pipes.
        "trap '' TERM
         echo \"$1 $CONTAINER_NAMESPACE/$CONTAINER_ID\" >$2.who
         while [ ! -e $2.go ]; do sleep 0.02; done
         exec 5>&-
         cat <&4 >$2.err &
         cat <&3 >$2.out
         wait
         : >$2.end",
    );
    let dying = script(&node, "dying", "exec 5>&-");
    for (kind, word) in KINDS.into_iter().zip(["init", "exec"]) {
        let base = node.folder().join(format!("{word}-log"));
        let file = |suffix: &str| base.with_extension(suffix);
        let uri = |program: &str| Stdio {
            stdout: format!("binary://{program}?out={}", base.display()),
            stderr: format!("binary://{program}?out={}", base.display()),
            ..Stdio::default()
        };
        // What waits for the logger's readiness: Create of an init, Start of an exec.
        let name = format!("{word}-logged");
        let command = format!("seq 1 {LINES}; echo err >&2; exit 6");
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                let process = add(
                    &api,
                    kind,
                    &name,
                    &["sh", "-c", &command],
                    shim,
                    &uri(&logger),
                );
                process.start();
                let status = process.status();
                process.delete();
                status
            });
            wait_file(&file("who"));
            assert!(!running.is_finished());
            // Meanwhile others are answered; the stock shim keeps them waiting for the logger.
            if shim == ShimUnderTest::Recoverd {
                assert_eq!(api.phase("host", ""), recoverd_tests::Status::Running);
                if kind == Kind::Exec {
                    let state = api
                        .state("host", &name)
                        .expect("state of an exec that starts");
                    assert_eq!(
                        (state.status(), state.pid),
                        (recoverd_tests::Status::Created, 0)
                    );
                }
            }
            std::fs::write(file("go"), "").expect("write a file");
            assert_eq!(running.join().expect("a logged process"), 6);
        });
        wait_file(&file("end"));
        // An exec's logger is told the exec's id.
        assert_eq!(read(&file("who")), format!("out e2e/{name}\n"));
        assert!(read(&file("out")) == numbers(), "{word}: stdout differs");
        assert_eq!(read(&file("err")), "err\n");

        // A logger that dies costs no container. With ours it may even go on writing; the stock
        // shim's pipe fills up and stops it.
        let lines = if shim == ShimUnderTest::Recoverd {
            LINES
        } else {
            100
        };
        let command = format!("seq 1 {lines}; sleep 0.1; seq 1 {lines} >&2; exit 7");
        let name = format!("{word}-bereaved");
        let process = add(
            &api,
            kind,
            &name,
            &["sh", "-c", &command],
            shim,
            &uri(&dying),
        );
        process.start();
        assert_eq!(process.status(), 7);
        process.delete();
    }
    // The newer form, of containerd 2.3: readiness is a word, and a logger that dies without one is
    // none. (The stock shims at hand do not know it.)
    if shim == ShimUnderTest::Recoverd {
        let says = script(
            &node,
            "says",
            "printf x >&5; cat <&4 >/dev/null & cat <&3 >$2; wait; : >$2.end",
        );
        let out = node.folder().join("v2");
        let uri = |program: &str| Stdio {
            stdout: format!("binary-v2://{program}?out={}", out.display()),
            stderr: format!("binary-v2://{program}?out={}", out.display()),
            ..Stdio::default()
        };
        let process = add(&api, Kind::Init, "v2", &["echo", "two"], shim, &uri(&says));
        process.start();
        assert_eq!(process.status(), 0);
        process.delete();
        wait_file(&out.with_extension("end"));
        assert_eq!(read(&out), "two\n");
        api.exec("host", "v2-dying", &oci_process(&["true"]), &uri(&dying))
            .expect("exec");
        let refused = api
            .start("host", "v2-dying")
            .expect_err("a logger that is never ready");
        assert!(
            refused.message.contains("before it was ready"),
            "{refused:?}"
        );
    }
    // A logger that is not there: one clear refusal, and nothing runs.
    let nowhere = Stdio {
        stdout: "binary:///no/such/logger".into(),
        stderr: "binary:///no/such/logger".into(),
        ..Stdio::default()
    };
    api.container("unlogged", &oci_spec("unlogged", &SLEEPER), shim, None);
    let refused = api
        .create("unlogged", &nowhere)
        .expect_err("a logger that is not there");
    assert!(refused.message.contains("/no/such/logger"), "{refused:?}");
    api.exec("host", "unlogged", &oci_process(&["true"]), &nowhere)
        .expect("exec");
    let refused = api
        .start("host", "unlogged")
        .expect_err("a logger that is not there");
    assert!(refused.message.contains("/no/such/logger"), "{refused:?}");
    assert_eq!(api.phase("host", ""), recoverd_tests::Status::Running);
}

fn terminals_resize_and_are_attached_again(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    let shell =
        "echo ready; while read line; do echo \"<$line>\"; stty size; done; echo over; exit 8";
    for (kind, word) in KINDS.into_iter().zip(["init", "exec"]) {
        let name = format!("{word}-terminal");
        let fifos = Fifos::make_terminal(&node, &name);
        let stdout = fifos.stdout();
        let process = add(&api, kind, &name, &["sh", "-c", shell], shim, &fifos.stdio);
        process.start();
        stdout.wait_text("ready\r\n");
        // One descriptor for both ways: a node with many terminals has many shims' worth.
        wait_masters(&node, 1);
        for (width, height) in [(100, 40), (80, 24), (132, 50)] {
            assert_eq!(
                api.resize(&process.id, &process.exec_id, width, height),
                Ok(())
            );
            let mut stdin = fifos.stdin();
            stdin.write(&format!("{width}\n"));
            // Each client that goes leaves the terminal open for the next.
            stdout.wait_text(&format!("<{width}>\r\n{height} {width}\r\n"));
        }
        // End of input as a terminal has it.
        fifos.stdin().write("\u{4}");
        assert_eq!(process.status(), 8);
        assert!(
            stdout.wait_end().ends_with("over\r\n"),
            "{:?}",
            stdout.text()
        );
        process.delete();
        wait_masters(&node, 0);
    }
    api.end("host");

    // A real client comes, goes and comes again.
    let counter = "n=0; while :; do n=$((n+1)); echo \"tick $n.\"; sleep 0.1; done";
    let container = Container::new("counter")
        .shim(shim)
        .terminal()
        .command(["sh", "-c", counter]);
    let task = containerd.run(&container);
    let last_tick = |text: &str| -> u32 {
        let ticks = text
            .split("tick ")
            .filter_map(|rest| rest.split_once('.')?.0.parse().ok());
        ticks.max().unwrap_or(0)
    };
    let mut last = 0;
    for _ in 0..3 {
        let attached =
            containerd.on_terminal("e2e", &["tasks".into(), "attach".into(), "counter".into()]);
        last = wait_for("ticks after the last ones", || {
            Some(last_tick(&attached.text())).filter(|tick| *tick > last + 3)
        });
        drop(attached);
        task.assert_init_alive();
    }
    containerd.remove(&task);
    node.wait_gone(&task.shim);
}

/// runc gives a process's stdio to its user, so that it can open `/dev/stdout` again; the group
/// stays what the options say.
fn users_other_than_root_own_their_stdio(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let command = [
        "sh",
        "-c",
        "echo out >/dev/stdout; echo err >/dev/stderr; cat </dev/stdin; exec sleep 1000",
    ];
    let options = runc::Options {
        io_uid: 1000,
        io_gid: 1234,
        ..runc::Options::default()
    };
    for (id, options, group) in [("plain", None, 0), ("owned", Some(&options), 1234)] {
        let fifos = Fifos::make(&node, id);
        let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
        let mut spec = oci_spec(id, &command);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        api.container(id, &spec, shim, options);
        let pid = api.create(id, &fifos.stdio).expect("create");
        api.start(id, "").expect("start");
        fifos.stdin().write("in\n");
        stdout.wait_text("out\n");
        stderr.wait_text("err\n");
        let owner = node.run("stat", ["-L", "-c", "%u:%g", &format!("/proc/{pid}/fd/1")]);
        assert_eq!(owner.trim(), format!("1000:{group}"), "{id}");

        let fifos = Fifos::make(&node, &format!("{id}-exec"));
        let (exec_stdout, exec_stderr) = (fifos.stdout(), fifos.stderr());
        let mut process = oci_process(&[
            "sh",
            "-c",
            "echo out >/dev/stdout; echo err >/dev/stderr; cat </dev/stdin; id -u",
        ]);
        process["user"] = json!({"uid": 1001, "gid": 1001});
        process["capabilities"] = json!({});
        api.run_exec(id, "other", &process, &fifos.stdio);
        let mut stdin = fifos.stdin();
        stdin.write("in\n");
        exec_stdout.wait_text("in\n");
        drop(stdin);
        api.close_stdin(id, "other").expect("close stdin");
        assert_eq!(api.status(id, "other"), 0);
        assert_eq!(exec_stdout.wait_end(), "out\nin\n1001\n");
        assert_eq!(exec_stderr.wait_end(), "err\n");
        api.delete(id, "other").expect("delete an exec");
        stdout.wait_text("in\n");
        api.end(id);
        assert_eq!(stdout.wait_end(), "out\nin\n");
    }
}

fn grandchild_that_keeps_the_output_of_an_exec_holds_nobody(
    release: &Release,
    shim: ShimUnderTest,
) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    let fifos = Fifos::make(&node, "parent");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    let process = oci_process(&["sh", "-c", "sleep 4000 & echo started; exit 9"]);
    api.run_exec("host", "parent", &process, &fifos.stdio);
    assert_eq!(api.status("host", "parent"), 9);
    let began = Instant::now();
    // State and Start of others go on while Delete waits for the output to end.
    std::thread::scope(|scope| {
        let deleting = scope.spawn(|| api.delete("host", "parent"));
        while !deleting.is_finished() {
            api.run_exec("host", "other", &oci_process(&["true"]), &Stdio::default());
            assert_eq!(api.status("host", "other"), 0);
            api.delete("host", "other").expect("delete an exec");
        }
        let deleted = deleting.join().expect("delete").expect("delete");
        assert_eq!(deleted.status, 9);
    });
    // 10 s by the shim's own limit; the rest is for a busy machine.
    assert!(
        began.elapsed() < Duration::from_secs(40),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(stdout.wait_end(), "started\n");
    assert_eq!(stderr.wait_end(), "");
    let grandchild = node
        .processes()
        .into_iter()
        .find(|p| p.argv == ["sleep", "4000"]);
    assert!(grandchild.is_some(), "the grandchild was ended");
    api.end("host");
}

fn without_stdio_there_is_dev_null(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    let files =
        |pid: u32| [0, 1, 2].map(|fd| node.run("readlink", [format!("/proc/{pid}/fd/{fd}")]));
    for kind in KINDS {
        let process = add(
            &api,
            kind,
            "none",
            &["sleep", "1000"],
            shim,
            &Stdio::default(),
        );
        let pid = process.start();
        assert_eq!(files(pid), ["/dev/null\n"; 3]);
        api.kill(&process.id, &process.exec_id, 9).expect("kill");
        assert_eq!(process.status(), 137);
        process.delete();
    }
    // Only some of them: the stock shim opens "" and fails, ours takes it for what it says, none.
    if shim == ShimUnderTest::Stock {
        return;
    }
    let fifos = Fifos::make(&node, "some");
    let stdout = Output::of(Path::new(&fifos.stdio.stdout));
    let stdio = Stdio {
        stdout: fifos.stdio.stdout.clone(),
        ..Stdio::default()
    };
    let process = add(
        &api,
        Kind::Init,
        "some",
        &["sh", "-c", "cat; echo only; echo nothing >&2"],
        shim,
        &stdio,
    );
    process.start();
    assert_eq!(process.status(), 0);
    assert_eq!(stdout.wait_end(), "only\n");
    process.delete();
    api.end("host");
}

/// Several MiB, read by a client that is slow at first.
/// Waits until the node's shims hold so many masters of terminals.
#[track_caller]
fn wait_masters(node: &Node, expected: usize) {
    let masters = || {
        let folders = node.shims().into_iter();
        let folders = folders.map(|shim| node.path(format!("/proc/{}/fd", shim.pid)));
        let links = folders.filter_map(|folder| std::fs::read_dir(folder).ok());
        let links = links.flatten().filter_map(Result::ok);
        links
            .filter_map(|link| std::fs::read_link(link.path()).ok())
            .filter(|what| what.ends_with("ptmx"))
            .count()
    };
    wait_for(&format!("{expected} masters"), || {
        (masters() == expected).then_some(())
    });
}

/// More than a terminal takes: who carries it has to wait for room.
fn much_into_a_terminal_arrives_whole(release: &Release, shim: ShimUnderTest) {
    const MANY: usize = 40_000;
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    for (kind, word) in KINDS.into_iter().zip(["init", "exec"]) {
        let name = format!("{word}-typed");
        let fifos = Fifos::make_terminal(&node, &name);
        let stdout = fifos.stdout();
        let counts = ["sh", "-c", "stty -echo; echo ready; wc -l"];
        let process = add(&api, kind, &name, &counts, shim, &fifos.stdio);
        process.start();
        stdout.wait_text("ready\r\n");
        let mut stdin = fifos.stdin();
        stdin.write(&"0123456\n".repeat(MANY));
        stdin.write("\u{4}");
        assert_eq!(process.status(), 0);
        assert_eq!(stdout.wait_end(), format!("ready\r\n{MANY}\r\n"));
        process.delete();
    }
    api.end("host");
}

fn much_from_a_terminal_arrives_whole(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    host(&api, shim);
    let expected: String = (1..=LINES).map(|n| format!("{n}\r\n")).collect();
    for (kind, word) in KINDS.into_iter().zip(["init", "exec"]) {
        let fifos = Fifos::make_terminal(&node, &format!("{word}-much"));
        let command = format!("seq 1 {LINES}; exit 9");
        let name = format!("{word}-much");
        let stdout = (shim == ShimUnderTest::Stock).then(|| fifos.stdout());
        let process = add(
            &api,
            kind,
            &name,
            &["sh", "-c", &command],
            shim,
            &fifos.stdio,
        );
        process.start();
        // The stock shim waits at Create (or Start of an exec) for who reads; ours does not, and the
        // terminal stops its writer meanwhile.
        let stdout = stdout.unwrap_or_else(|| {
            let state = api.state(&process.id, &process.exec_id).expect("state");
            assert_eq!(state.status(), recoverd_tests::Status::Running);
            fifos.stdout()
        });
        assert_eq!(process.status(), 9);
        assert!(
            stdout.wait_end() == expected,
            "{word}: {} bytes of {}",
            stdout.bytes().len(),
            expected.len()
        );
        process.delete();
    }
    api.end("host");
}

/// Root in there is nobody out here; its stdio is its own all the same.
fn processes_of_a_user_namespace_have_their_stdio(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let fifos = Fifos::make(&node, "mapped");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    let command = "id -u; cat /proc/self/uid_map >/dev/stdout; echo err >/dev/stderr; cat; exit 7";
    let mut spec = oci_spec("mapped", &["sh", "-c", command]);
    // Where everybody may look.
    let root = spec["root"]["path"].as_str().expect("a path").to_owned();
    node.shell(&format!(
        "mkdir -p /run/mapped; mount --bind {root} /run/mapped; chmod 0711 /run /run/containerd"
    ));
    spec["root"]["path"] = json!("/run/mapped");
    let mapping = json!([{"containerID": 0, "hostID": 5000, "size": 1000}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces")
        .push(json!({"type": "user"}));
    let options = runc::Options {
        io_uid: 5000,
        io_gid: 5000,
        ..runc::Options::default()
    };
    api.container("mapped", &spec, shim, Some(&options));
    let pid = api.create("mapped", &fifos.stdio).expect("create");
    let owner = |fd: u32| {
        node.run(
            "stat",
            ["-L", "-c", "%u:%g", &format!("/proc/{pid}/fd/{fd}")],
        )
    };
    for fd in 0..3 {
        assert_eq!(owner(fd).trim(), "5000:5000", "{fd}");
    }
    api.start("mapped", "").expect("start");
    let others = Fifos::make(&node, "other");
    let (other_out, _other_err) = (others.stdout(), others.stderr());
    let process = oci_process(&["sh", "-c", "id -u >/dev/stdout; exit 8"]);
    api.run_exec("mapped", "other", &process, &others.stdio);
    assert_eq!(api.status("mapped", "other"), 8);
    assert_eq!(other_out.wait_end(), "0\n");
    api.delete("mapped", "other").expect("delete an exec");
    let mut stdin = fifos.stdin();
    stdin.write("in\n");
    stdout.wait_text("in\n");
    drop(stdin);
    api.close_stdin("mapped", "").expect("close stdin");
    assert_eq!(api.status("mapped", ""), 7);
    let said = stdout.wait_end();
    assert!(said.starts_with("0\n") && said.contains("5000"), "{said}");
    assert_eq!(stderr.wait_end(), "err\n");
    api.delete("mapped", "").expect("delete");
}

/// Tasks and execs come and go, well and badly, with every kind of stdio: the shim has no more open
/// afterwards than before.
fn nothing_stays_open(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let task = containerd.run(&Container::new("host").shim(shim).group("host"));
    let files = node.folder().join("log");
    let logger = script(
        &node,
        "logger",
        "exec 5>&-; cat <&3 >/dev/null; cat <&4 >/dev/null",
    );
    let open = || -> Vec<String> {
        let list = node.shell(&format!(
            "for f in /proc/{}/fd/*; do readlink $f; done | sed 's/[0-9][0-9]*//g' | sort",
            task.shim.pid
        ));
        list.lines().map(str::to_owned).collect()
    };
    let round = |number: u32| {
        let name = |what: &str| format!("{what}-{number}");
        for kind in KINDS {
            let of = |what: &str| {
                let kind = if kind == Kind::Init { "init" } else { "exec" };
                name(&format!("{kind}-{what}"))
            };
            let add = |what: &str, args: &[&str], stdio: &Stdio| -> Option<(String, String)> {
                let id = of(what);
                let mut process = oci_process(args);
                process["terminal"] = json!(stdio.terminal);
                if kind == Kind::Exec {
                    api.exec("host", &id, &process, stdio).expect("exec");
                    return Some(("host".to_owned(), id));
                }
                let mut spec = oci_spec(&id, args);
                spec["process"] = process;
                spec["annotations"] = json!({"io.containerd.runc.v2.group": "host"});
                api.container(&id, &spec, shim, None);
                api.create(&id, stdio).ok()?;
                Some((id, String::new()))
            };
            let finish = |what: &str, args: &[&str], stdio: &Stdio| {
                let (id, exec_id) = add(what, args, stdio).expect("create");
                api.start(&id, &exec_id).expect("start");
                api.status(&id, &exec_id);
                api.delete(&id, &exec_id).expect("delete");
            };
            finish("null", &["true"], &Stdio::default());
            let fifos = Fifos::make(&node, &of("fifos"));
            let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
            finish("fifos", &["echo", "x"], &fifos.stdio);
            let fifos = Fifos::make_terminal(&node, &of("terminal"));
            let _stdout = fifos.stdout();
            finish("terminal", &["echo", "x"], &fifos.stdio);
            let uri = |uri: String| Stdio {
                stdout: uri.clone(),
                stderr: uri,
                ..Stdio::default()
            };
            finish(
                "file",
                &["echo", "x"],
                &uri(format!("file://{}", files.display())),
            );
            finish("binary", &["echo", "x"], &uri(format!("binary://{logger}")));
            // What fails, at Create or at Start. (A Start of an exec that fails makes the stock
            // shims of 1.7.24 and 2.1.9 panic in the end.)
            if kind == Kind::Init || shim == ShimUnderTest::Recoverd {
                let fifos = Fifos::make(&node, &of("absent"));
                let (_stdout, _stderr) = (fifos.stdout(), fifos.stderr());
                if let Some((id, exec_id)) = add("absent", &["/no/such/program"], &fifos.stdio) {
                    api.start(&id, &exec_id).expect_err("started nothing");
                    api.delete(&id, &exec_id).expect("delete what failed");
                }
            }
        }
    };
    round(0);
    // The last logger of a round may still be ending.
    let (mut before, mut since) = (open(), Instant::now());
    wait_for("a round to be over", || {
        let now = open();
        if now != before {
            (before, since) = (now, Instant::now());
        }
        (since.elapsed() >= Duration::from_millis(300)).then_some(())
    });
    for number in 1..4 {
        round(number);
    }
    let began = Instant::now();
    loop {
        let now = open();
        // Fewer is fine: a connection of containerd's may have gone. Go closes some only when it
        // collects its garbage: there it may be one of each kind and round.
        let garbage = if shim == ShimUnderTest::Stock { 6 } else { 0 };
        if now.len() <= before.len() + garbage {
            break;
        }
        let late = began.elapsed() > Duration::from_secs(60);
        assert!(!late, "before {before:#?}\nnow {now:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    task.assert_shim_alive();
    if shim == ShimUnderTest::Recoverd {
        let status = node.run("cat", [format!("/proc/{}/status", task.shim.pid)]);
        assert!(status.contains("Threads:\t1\n"), "{status}");
    }
    containerd.remove(&task);
}

/// What a fifo holds counts against its writer's limit; and the larger it is, the longer may its
/// reader be away.
fn fifos_are_as_large_as_the_memory_allows(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let most: i32 = node
        .shell("cat /proc/sys/fs/pipe-max-size")
        .trim()
        .parse()
        .expect("a size");
    for (id, limit, size) in [
        ("none", None, 1 << 20),
        ("large", Some(64 << 20), 1 << 20),
        ("small", Some(8 << 20), 512 << 10),
    ] {
        let fifos = Fifos::make(&node, id);
        let mut spec = oci_spec(id, &SLEEPER);
        if let Some(limit) = limit {
            spec["linux"]["resources"]["memory"] = json!({"limit": limit});
        }
        api.run(id, &spec, ShimUnderTest::Recoverd, &fifos.stdio);
        for path in [&fifos.stdio.stdout, &fifos.stdio.stderr, &fifos.stdio.stdin] {
            let fifo = std::fs::File::options().read(true).write(true).open(path);
            let fifo = fifo.unwrap_or_else(|error| panic!("open {path}: {error}"));
            let found = nix::fcntl::fcntl(&fifo, nix::fcntl::FcntlArg::F_GETPIPE_SZ);
            assert_eq!(found, Ok(size.min(most)), "{path}");
        }
        api.end(id);
    }
}
