//! Things that happen at once: a runtime that is slow or hangs while its caller gives up, while its
//! init dies, while somebody deletes. The same on the stock shim, which is the control; where ours
//! does otherwise, the test says why.

use std::path::PathBuf;
use std::time::Duration;

use recoverd_common::pb::runc;
use recoverd_tests::{
    Api, Code, Container, KILLED, Node, Process, Release, SLEEPER, ShimUnderTest, Status, Stdio,
    Traces, assert_refused, oci_process, oci_spec, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        create_that_nobody_waits_for_any_more_leaves_nothing,
    ],
    with_each_shim: [
        kill_of_what_is_just_going_is_done_or_not_found,
    ],
    once_with_each_shim: [
        delete_while_an_exec_starts_is_refused_and_harms_nothing,
        exec_that_was_given_up_is_not_there,
        init_that_the_runtime_itself_lost_is_stopped,
        what_stands_in_for_runc_works_in_the_bundle,
        who_hears_of_an_exit_finds_no_process,
    ],
}

/// A runtime in runc's place that does something else on one of its commands.
struct Runtime<'a> {
    node: &'a Node,
    program: PathBuf,
}

impl<'a> Runtime<'a> {
    /// On `command` it says so (see [`Runtime::wait_for_command`]) and does `script`, where `runc
    /// "$@"` is the command itself.
    #[track_caller]
    fn with(node: &'a Node, name: &str, command: &str, script: &str) -> Runtime<'a> {
        let program = node.folder().join(name);
        let text = format!(
            "#!/bin/sh\nbase={}\ncase \" $* \" in *' {command} '*)\n: >$base.begun\n{script}\nexit\n;; \
             esac\nexec runc \"$@\"\n",
            program.display(),
        );
        std::fs::write(&program, text)
            .unwrap_or_else(|error| panic!("write {}: {error}", program.display()));
        node.run("chmod", ["+x".as_ref(), program.as_os_str()]);
        Runtime { node, program }
    }

    /// On `command` it waits for [`Runtime::go_on`].
    #[track_caller]
    fn that_waits(node: &'a Node, name: &str, command: &str) -> Runtime<'a> {
        let script = "while [ ! -e $base.go ]; do sleep 0.02; done; exec runc \"$@\"";
        Runtime::with(node, name, command, script)
    }

    fn options(&self) -> runc::Options {
        runc::Options {
            binary_name: self.program.display().to_string(),
            ..runc::Options::default()
        }
    }

    /// Waits until the command is at work; then it may be waited for again.
    #[track_caller]
    fn wait_for_command(&self) {
        let begun = self.program.with_extension("begun");
        wait_for("the runtime", || std::fs::remove_file(&begun).ok());
    }

    #[track_caller]
    fn go_on(&self) {
        let go = self.program.with_extension("go");
        std::fs::write(&go, "").unwrap_or_else(|error| panic!("write {}: {error}", go.display()));
    }

    #[track_caller]
    fn stop_again(&self) {
        let go = self.program.with_extension("go");
        std::fs::remove_file(&go)
            .unwrap_or_else(|error| panic!("remove {}: {error}", go.display()));
    }

    /// A process of the node that sleeps so long, in the container or not.
    fn sleeping(&self, seconds: &str) -> Option<Process> {
        let mut all = self.node.processes().into_iter();
        all.find(|process| process.state != 'Z' && process.argv == ["sleep", seconds])
    }
}

/// Makes a task of this runtime and starts it.
#[track_caller]
fn run(api: &Api, id: &str, shim: ShimUnderTest, runtime: &Runtime<'_>) -> u32 {
    api.container(id, &oci_spec(id, &SLEEPER), shim, Some(&runtime.options()));
    let pid = api
        .create(id, &Stdio::default())
        .unwrap_or_else(|refused| panic!("create {id}: {refused:?}"));
    api.start(id, "")
        .unwrap_or_else(|refused| panic!("start {id}: {refused:?}"));
    pid
}

fn delete_while_an_exec_starts_is_refused_and_harms_nothing(
    release: &Release,
    shim: ShimUnderTest,
) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let ours = shim == ShimUnderTest::Recoverd;
    let runtime = Runtime::that_waits(&node, "gate", "exec");
    let id = "host";
    let init = run(&api, id, shim, &runtime);
    let init = node.process(init).expect("an init that runs");

    let sleep = oci_process(&["sleep", "2000"]);
    api.exec(id, "slow", &sleep, &Stdio::default())
        .expect("exec");
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| api.start(id, "slow"));
        runtime.wait_for_command();
        let deleting = scope.spawn(|| api.delete(id, "slow"));
        let refused = api.delete(id, "").expect_err("a running task was deleted");
        assert!(
            refused.message.contains("cannot delete a running process")
                || refused.code == Code::FailedPrecondition,
            "{refused:?}"
        );
        if ours {
            // The stock shim keeps this caller waiting for the runtime, and says the same then.
            wait_for("the refusal", || deleting.is_finished().then_some(()));
            assert!(!starting.is_finished());
        }
        runtime.go_on();
        let pid = starting.join().expect("start").expect("start an exec");
        assert_refused(
            deleting.join().expect("delete"),
            Code::Unknown,
            "cannot delete a running process",
        );
        // The runtime answers before its child is the program.
        wait_for("the program", || {
            let process = runtime.sleeping("2000")?;
            (process.pid == pid).then_some(())
        });
    });
    assert_eq!(api.phase(id, "slow"), Status::Running);
    api.kill(id, "slow", 9).expect("kill an exec");
    assert_eq!(api.status(id, "slow"), KILLED);
    api.delete(id, "slow").expect("delete an exec");

    // The init dies while an exec starts: that Start fails, the init's exit is told after it. (The
    // stock shim of 1.7.24 and 2.1.9 miscounts a Start that fails, and panics.)
    if !ours {
        api.end(id);
        return;
    }
    runtime.stop_again();
    api.exec(id, "late", &sleep, &Stdio::default())
        .expect("exec");
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| api.start(id, "late"));
        runtime.wait_for_command();
        let waiting = scope.spawn(|| api.status(id, ""));
        api.kill(id, "", 9).expect("kill");
        // Not told, so not to be deleted.
        assert_refused(
            api.delete(id, "late").map(drop),
            Code::Unknown,
            "cannot delete a running process",
        );
        assert!(!waiting.is_finished());
        // Until then the container runs, as far as anybody was told: what comes too late is added
        // and does not start.
        node.wait_gone(&init);
        assert_eq!(api.phase(id, ""), Status::Running);
        api.exec(id, "later", &sleep, &Stdio::default())
            .expect("exec");
        assert_refused(
            api.start(id, "later"),
            Code::FailedPrecondition,
            "init process is not running",
        );
        assert_eq!(api.phase(id, "later"), Status::Created);
        runtime.go_on();
        let refused = starting
            .join()
            .expect("start")
            .expect_err("started in a dead container");
        assert_eq!(refused.code, Code::Unknown, "{refused:?}");
        assert_eq!(waiting.join().expect("wait"), KILLED);
    });
    assert_eq!(api.phase(id, "late"), Status::Created);
    api.delete(id, "late")
        .expect("delete an exec that did not start");
    api.delete(id, "later")
        .expect("delete an exec that was never started");
    assert_eq!(api.delete(id, "").expect("delete").status, KILLED);
    node.wait_no_shims();
}

/// The stock shim kills the runtime when its caller has given up, and the process that the runtime
/// had started lives on in the container: nobody knows of it, and nobody can signal it. Ours ends
/// it, because its caller was told that the exec did not start.
fn exec_that_was_given_up_is_not_there(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let ours = shim == ShimUnderTest::Recoverd;
    // Three ways to hang: before anything was started; with a process of its own session beside it;
    // after the exec's process has begun.
    let hangs = [
        ("nothing", "exec sleep 3001", "3001"),
        ("session", "setsid sleep 3002 & sleep 3003", "3002"),
        ("begun", "runc \"$@\"; exec sleep 3004", "2000"),
    ];
    for (id, script, left) in hangs {
        let runtime = Runtime::with(&node, id, "exec", script);
        let init = run(&api, id, shim, &runtime);
        api.exec(
            id,
            "late",
            &oci_process(&["sleep", "2000"]),
            &Stdio::default(),
        )
        .expect("exec");
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| {
                let limit = Duration::from_secs(15);
                let started = api.start_within(limit, id, "late");
                started.expect_err("a runtime that hangs has started an exec")
            });
            runtime.wait_for_command();
            wait_for("what the runtime has started", || runtime.sleeping(left));
            // By containerd or by its client, whichever is first.
            starting.join().expect("start");
        });
        if !ours {
            if id == "begun" {
                assert!(runtime.sleeping(left).is_some(), "the control ends it too");
            }
            // This very exit ends the stock shim, which may go before it has answered.
            let _said = containerd
                .ctr("e2e", ["tasks", "kill", "--signal", "KILL", id])
                .output();
            continue;
        }
        wait_for("its end", || runtime.sleeping(left).is_none().then_some(()));
        assert!(runtime.sleeping("3003").is_none() && runtime.sleeping("3004").is_none());
        // Refused until the start has failed.
        wait_for("the exec's removal", || api.delete(id, "late").ok());
        // The container is untouched, and its id free.
        assert_eq!(api.phase(id, ""), Status::Running);
        let pids = api.pids(id).expect("pids");
        assert!(
            pids.contains(&(init, String::new())) && pids.len() == 2,
            "{pids:?}"
        );
        assert_eq!(api.end(id).status, KILLED);
    }
}

/// Whoever asks for a Create may go: the client, and containerd itself. No deadline was given.
fn create_that_nobody_waits_for_any_more_leaves_nothing(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let before = Traces::of(&node);
    let shim = ShimUnderTest::Recoverd.runtime().display().to_string();
    let root = Release::rootfs().display().to_string();
    for (id, who) in [("client", "ctr"), ("daemon", "containerd")] {
        let runtime = Runtime::with(&node, id, "create", "exec sleep 3005");
        let program = runtime.program.display().to_string();
        node.shell(&format!(
            "mkdir -p /run/real; cp $(command -v runc) /run/real/; \
             mount --bind {program} $(readlink -f $(command -v runc))"
        ));
        let mut words = vec!["run", "--detach", "--runtime", &shim, "--env", "PATH=/bin"];
        words.extend(["--rootfs", &root, id, "sleep", "100000"]);
        let client = containerd.ctr_spawn("e2e", words);
        runtime.wait_for_command();
        node.shell("umount --lazy $(readlink -f $(command -v runc)); rm -r /run/real");
        if who == "ctr" {
            node.kill(&client.process);
        } else {
            containerd.restart();
            // 1.6 keeps what is being made, in whatever state; it can be deleted at any time.
            while containerd.task("e2e", id).is_some() {
                let delete = ["tasks", "delete", "--force", id];
                containerd.ctr("e2e", delete).output().expect("start ctr");
            }
        }
        drop(client);
        containerd
            .ctr("e2e", ["containers", "delete", id])
            .output()
            .expect("start ctr");
        before.wait_restored(&node);
        assert!(runtime.sleeping("3005").is_none());
    }
    // And the ids are free.
    for id in ["client", "daemon"] {
        let task = containerd.run(&Container::new(id).shim(ShimUnderTest::Recoverd));
        containerd.remove(&task);
    }
    before.wait_restored(&node);
}

fn kill_of_what_is_just_going_is_done_or_not_found(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let done_or_gone = |result: Result<(), recoverd_tests::Refused>| match result {
        Ok(()) => true,
        Err(refused) if refused.code == Code::NotFound => false,
        Err(refused) => panic!("{refused:?}"),
    };
    api.run("host", &oci_spec("host", &SLEEPER), shim, &Stdio::default());
    for round in 0..15 {
        let exec_id = format!("quick{round}");
        // Longer and shorter than the way of a Kill.
        let script = format!("usleep {}; exit 3", round * 2000);
        let process = oci_process(&["sh", "-c", &script]);
        api.run_exec("host", &exec_id, &process, &Stdio::default());
        while done_or_gone(api.kill("host", &exec_id, 9)) {}
        let status = api.status("host", &exec_id);
        assert!([3, KILLED].contains(&status), "{status}");
        assert_eq!(api.delete("host", &exec_id).expect("delete").status, status);
    }
    for round in 0..5 {
        let id = format!("quick{round}");
        let script = format!("usleep {}; exit 3", round * 5000);
        api.run(
            &id,
            &oci_spec(&id, &["sh", "-c", &script]),
            shim,
            &Stdio::default(),
        );
        while done_or_gone(api.kill(&id, "", 9)) {}
        let status = api.status(&id, "");
        assert!([3, KILLED].contains(&status), "{status}");
        assert_eq!(api.delete(&id, "").expect("delete").status, status);
        assert!(!done_or_gone(api.kill(&id, "", 9)));
    }
    api.end("host");
}

/// The OOM killer likes a container's init before it has become its program.
fn init_that_the_runtime_itself_lost_is_stopped(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    // The pid file's name is the word after its flag.
    let script = "runc \"$@\"; while [ \"$1\" != --pid-file ]; do shift; done; kill -9 $(cat $2)";
    let runtime = Runtime::with(&node, "loses", "create", script);
    for round in 0..3 {
        let id = format!("lost{round}");
        api.container(
            &id,
            &oci_spec(&id, &SLEEPER),
            shim,
            Some(&runtime.options()),
        );
        let pid = api.create(&id, &Stdio::default()).expect("create");
        wait_for("the exit to be seen", || {
            (api.phase(&id, "") == Status::Stopped).then_some(())
        });
        assert_eq!(api.status(&id, ""), KILLED);
        assert_refused(
            api.start(&id, ""),
            Code::Unknown,
            "cannot start a stopped process",
        );
        let deleted = api.delete(&id, "").expect("delete");
        assert_eq!((deleted.pid, deleted.status), (pid, KILLED));
    }
    node.wait_no_shims();
}

/// Programs around runc read `config.json` where they are: the stock shim's runtimes work in the
/// bundle, whatever they are asked for.
fn what_stands_in_for_runc_works_in_the_bundle(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    // What every command has.
    let every = "--root";
    let runtime = Runtime::with(
        &node,
        "reads",
        every,
        "pwd >>$base.folders; exec runc \"$@\"",
    );
    let id = "read";
    run(&api, id, shim, &runtime);
    api.exec(id, "more", &oci_process(&["true"]), &Stdio::default())
        .expect("exec");
    api.start(id, "more").expect("start an exec");
    assert_eq!(api.status(id, "more"), 0);
    api.delete(id, "more").expect("delete an exec");
    api.pause(id).expect("pause");
    api.resume(id).expect("resume");
    api.kill_all(id, 9).expect("kill all");
    assert_eq!(api.status(id, ""), KILLED);
    api.delete(id, "").expect("delete");

    let folders = std::fs::read_to_string(runtime.program.with_extension("folders"))
        .expect("read what the runtime saw");
    let bundle = containerd
        .state()
        .join("io.containerd.runtime.v2.task/e2e")
        .join(id);
    let bundle = bundle.display().to_string();
    // Create, start, exec, pause, resume, kill, delete.
    assert!(folders.lines().count() >= 7, "{folders}");
    assert!(folders.lines().all(|folder| folder == bundle), "{folders}");

    // One that is not there is named as the stock shim names it.
    let options = runc::Options {
        binary_name: "no-such-runtime".into(),
        ..runc::Options::default()
    };
    api.container("none", &oci_spec("none", &SLEEPER), shim, Some(&options));
    assert_refused(
        api.create("none", &Stdio::default()),
        Code::Unknown,
        "exec: \"no-such-runtime\": executable file not found in $PATH",
    );
}

/// Not even a dead one: whoever signals its pid after Wait has answered signals nobody.
fn who_hears_of_an_exit_finds_no_process(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    api.run("host", &oci_spec("host", &SLEEPER), shim, &Stdio::default());
    for round in 0..20 {
        let exec_id = format!("short{round}");
        let sleep = oci_process(&["sleep", "1000"]);
        let pid = api.run_exec("host", &exec_id, &sleep, &Stdio::default());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let status = api.status("host", &exec_id);
                (status, node.process(pid))
            });
            api.kill("host", &exec_id, 9).expect("kill an exec");
            let (status, process) = waiting.join().expect("wait");
            assert_eq!(status, KILLED);
            assert!(process.is_none(), "{process:?}");
        });
        api.delete("host", &exec_id).expect("delete an exec");
    }
    api.end("host");
}
