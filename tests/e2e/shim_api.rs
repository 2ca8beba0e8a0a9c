//! The task API through containerd: what each call does, what it answers, when it refuses. The
//! same code runs on the stock shim, which is the control; where ours answers otherwise, the test
//! says why.

use std::time::{Duration, Instant};

use recoverd_common::pb::task;
use recoverd_common::shim_client::{CallError, ShimClient};
use recoverd_common::ttrpc::code;
use recoverd_tests::{
    Api, Code, Container, KILLED, Node, Process, Release, SLEEPER, ShimUnderTest, Status, Stdio,
    Task, assert_refused, oci_process, oci_spec, wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    with_each_shim: [
        every_call_of_a_life_is_answered,
        refusals_have_their_codes,
        exits_of_any_haste_are_told_truly,
        containers_of_one_group_share_a_shim,
    ],
    once_with_each_shim: [
        restart_monitor_brings_a_task_back_under_its_id,
    ],
    on_every_release: [
        both_versions_of_the_api_on_one_socket,
    ],
}

fn none() -> Stdio {
    Stdio::default()
}

/// A process of the node by its whole command line.
#[track_caller]
fn process_of(node: &Node, argv: &[&str]) -> Process {
    wait_for(&format!("a process {argv:?}"), || {
        node.processes().into_iter().find(|p| p.argv == argv)
    })
}

/// Reads a file of the node's cgroups, which are v1 or v2.
fn cgroup_file(node: &Node, pid: u32, v1: &str, v2: &str) -> String {
    node.shell(&format!(
        "path=$(sed -n 's/^[0-9]*:[a-z,]*pids[a-z,]*://p' /proc/{pid}/cgroup); \
         if [ -n \"$path\" ]; then cat /sys/fs/cgroup/pids/$path/{v1}; \
         else cat /sys/fs/cgroup/$(sed -n 's/^0:://p' /proc/{pid}/cgroup)/{v2}; fi"
    ))
}

fn every_call_of_a_life_is_answered(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");

    // Create, and Connect, by which containerd learns the pid.
    api.container("life", &oci_spec("life", &SLEEPER), shim, None);
    let pid = api.create("life", &none()).expect("create");
    let init = node
        .process(pid)
        .expect("the init is a process of the node");
    let created = api.state("life", "").expect("state");
    assert_eq!((created.status(), created.pid), (Status::Created, pid));
    assert_eq!(created.exit_status, 0);

    // Start.
    assert_eq!(api.start("life", ""), Ok(pid));
    assert_eq!(api.phase("life", ""), Status::Running);
    let sleeper = process_of(&node, &["sleep", "1000"]);
    assert_eq!(sleeper.parent, pid);

    // Exec: added, then started.
    let worker = oci_process(&["sleep", "2000"]);
    api.exec("life", "worker", &worker, &none()).expect("exec");
    let added = api.state("life", "worker").expect("state of an exec");
    assert_eq!((added.status(), added.pid), (Status::Created, 0));
    let worker_pid = api.start("life", "worker").expect("start an exec");
    let running = api.state("life", "worker").expect("state of an exec");
    assert_eq!(
        (running.status(), running.pid),
        (Status::Running, worker_pid)
    );
    assert_eq!(process_of(&node, &["sleep", "2000"]).pid, worker_pid);

    // Pids: every process of the container, the exec's with its id.
    let mut pids = api.pids("life").expect("pids");
    pids.sort_unstable();
    let mut expected = vec![
        (pid, String::new()),
        (sleeper.pid, String::new()),
        (worker_pid, "worker".to_owned()),
    ];
    expected.sort_unstable();
    assert_eq!(pids, expected);

    // ResizePty without a terminal is no error and has no effect. CloseIO without stdin neither.
    assert_eq!(api.resize("life", "", 80, 24), Ok(()));
    assert_eq!(api.resize("life", "worker", 80, 24), Ok(()));
    assert_eq!(api.close_stdin("life", ""), Ok(()));
    assert_eq!(api.close_stdin("life", "worker"), Ok(()));

    // Pause and Resume; a paused container's execs are paused too.
    assert_eq!(api.pause("life"), Ok(()));
    assert_eq!(api.phase("life", ""), Status::Paused);
    assert_eq!(api.phase("life", "worker"), Status::Paused);
    assert_eq!(api.resume("life"), Ok(()));
    assert_eq!(api.phase("life", ""), Status::Running);
    assert_eq!(api.phase("life", "worker"), Status::Running);

    // Update.
    let limits = json!({"pids": {"limit": 77}, "memory": {"limit": 64 << 20}});
    assert_eq!(api.update("life", &limits), Ok(()));
    let limit = cgroup_file(&node, pid, "pids.max", "pids.max");
    assert_eq!(limit.trim(), "77");

    // Stats, of a type that containerd knows and `ctr` decodes.
    let kind = api.metrics_type("life").expect("metrics");
    assert!(kind.starts_with("io.containerd.cgroups.v"), "{kind:?}");
    let metrics: Value = serde_json::from_str(
        &containerd.ctr_ok("e2e", ["tasks", "metrics", "--format", "json", "life"]),
    )
    .expect("metrics are JSON");
    let pids = &metrics["pids"];
    assert_eq!(
        (&pids["current"], &pids["limit"]),
        (&json!(3), &json!(77)),
        "{metrics}"
    );
    let usage = |path: &str| metrics.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let cpu = usage("/cpu/usage/total").max(usage("/cpu/usage_usec"));
    let memory = usage("/memory/usage/usage").max(usage("/memory/usage"));
    let limit = usage("/memory/usage/limit").max(usage("/memory/usage_limit"));
    assert!(cpu > 0 && memory > 0, "{metrics}");
    assert_eq!(limit, 64 << 20, "{metrics}");

    // Wait before the end, from two callers at once; Kill of an exec.
    let waited = std::thread::scope(|scope| {
        let waiters = [(); 2].map(|()| scope.spawn(|| api.status("life", "worker")));
        assert_eq!(api.kill("life", "worker", 9), Ok(()));
        waiters.map(|waiter| waiter.join().expect("wait"))
    });
    assert_eq!(waited, [KILLED, KILLED]);
    let stopped = api
        .state("life", "worker")
        .expect("state of a stopped exec");
    assert_eq!(
        (stopped.status(), stopped.exit_status),
        (Status::Stopped, KILLED)
    );
    let ended = api.wait("life", "worker").expect("wait after the end");
    let deleted = api.delete("life", "worker").expect("delete an exec");
    assert_eq!(
        (deleted.pid, deleted.status, deleted.at),
        (worker_pid, KILLED, ended.at)
    );
    assert_refused(api.state("life", "worker"), Code::NotFound, "");

    // Its id may be used again.
    let again = oci_process(&["sh", "-c", "exit 5"]);
    api.run_exec("life", "worker", &again, &none());
    assert_eq!(api.status("life", "worker"), 5);
    api.delete("life", "worker").expect("delete an exec");

    // Kill, Wait, State and Delete of the init agree; the shim leaves, nothing stays.
    let before = wall();
    assert_eq!(api.kill("life", "", 15), Ok(()));
    let ended = api.wait("life", "").expect("wait");
    assert_eq!(ended.status, 0);
    assert!(
        (before - 1..=wall()).contains(&ended.at.0),
        "{ended:?} but {before}"
    );
    let stopped = api.state("life", "").expect("state of a stopped task");
    assert_eq!(
        (stopped.status(), stopped.exit_status, stopped.pid),
        (Status::Stopped, 0, pid)
    );
    let at = stopped.exited_at.map(|at| (at.seconds, at.nanos));
    assert_eq!(at, Some(ended.at));
    let deleted = api.delete("life", "").expect("delete");
    assert_eq!(
        (deleted.pid, deleted.status, deleted.at),
        (pid, 0, ended.at)
    );
    assert_refused(api.state("life", ""), Code::NotFound, "");
    node.wait_gone(&init);
    node.wait_no_shims();

    // A task that was never started is deleted too, its init with it.
    api.container("unborn", &oci_spec("unborn", &SLEEPER), shim, None);
    let pid = api.create("unborn", &none()).expect("create");
    let init = node
        .process(pid)
        .expect("the init is a process of the node");
    let deleted = api
        .delete("unborn", "")
        .expect("delete what was never started");
    assert_eq!(deleted.pid, pid);
    node.wait_gone(&init);
    node.wait_no_shims();
    let left = node.shell("ls -A /run/containerd/s /run/containerd/runc/e2e /run/containerd/io.containerd.runtime.v2.task/e2e 2>/dev/null | grep -v : || :");
    // The stock shim of 1.x leaves nothing here either: its group is its id.
    assert_eq!(left.trim(), "");
}

/// Seconds since 1970.
fn wall() -> i64 {
    let since = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .expect("a clock after 1970");
    i64::try_from(since.as_secs()).expect("seconds fit")
}

fn refusals_have_their_codes(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let sleep = oci_process(&["sleep", "2000"]);

    // A Start of an exec that fails makes the stock shims of 1.7.24 and 2.1.9 count less than no
    // running execs: they panic at the init's exit ("makechan: size out of range") and take its
    // status along. There the control leaves such a Start out, or asks no more of that task.
    let ours = shim == ShimUnderTest::Recoverd;
    let survives = ours || release.name == "1.6";

    // A task that is created only.
    let id = "refusals";
    api.container(id, &oci_spec(id, &SLEEPER), shim, None);
    let pid = api.create(id, &none()).expect("create");
    assert_refused(api.pause(id), Code::Unknown, "");
    assert_refused(api.resume(id), Code::Unknown, "");
    assert_refused(api.create(id, &none()), Code::AlreadyExists, "");
    // What does not exist.
    assert_refused(api.state(id, "nobody"), Code::NotFound, "");
    assert_refused(api.start(id, "nobody"), Code::NotFound, "");
    assert_refused(api.kill(id, "nobody", 15), Code::NotFound, "");
    assert_refused(api.wait(id, "nobody"), Code::NotFound, "");
    assert_refused(api.delete(id, "nobody"), Code::NotFound, "");
    assert_refused(api.resize(id, "nobody", 1, 1), Code::NotFound, "");
    assert_refused(api.close_stdin(id, "nobody"), Code::NotFound, "");

    // A task that runs.
    assert_eq!(api.start(id, ""), Ok(pid));
    assert_refused(
        api.start(id, ""),
        Code::Unknown,
        "cannot start a running process",
    );
    // The stock shim of 1.6 and 1.7 says Unknown here, that of 2.1 FailedPrecondition in
    // containerd itself: what counts is that it is refused and the task runs on.
    let refused = api.delete(id, "").expect_err("a running task was deleted");
    assert!(
        refused.message.contains("cannot delete a running process")
            || refused.code == Code::FailedPrecondition,
        "{refused:?}"
    );
    assert_refused(api.resume(id), Code::Unknown, "");
    assert_eq!(api.phase(id, ""), Status::Running);

    // Signals: real-time ones are signals, what is out of range is refused and hurts nobody. (A
    // signal without a handler does not reach the init of a pid namespace, hence the exec.)
    for bad in [65, 1000, u32::MAX] {
        let refused = api
            .kill(id, "", bad)
            .expect_err("a signal out of range was sent");
        assert_eq!(refused.code, Code::Unknown, "signal {bad}: {refused:?}");
    }
    for (exec_id, signal) in [("rt37", 37), ("rt64", 64), ("usr1", 10)] {
        let pid = api.run_exec(id, exec_id, &sleep, &none());
        // Until it is what was asked for, it is a runc that drops signals.
        wait_for("the exec's own program", || {
            (node.process(pid)?.argv == ["sleep", "2000"]).then_some(())
        });
        for bad in [65, u32::MAX] {
            let refused = api
                .kill(id, exec_id, bad)
                .expect_err("a signal out of range was sent");
            assert_eq!(refused.code, Code::Unknown, "signal {bad}: {refused:?}");
        }
        assert_eq!(api.kill(id, exec_id, signal), Ok(()));
        assert_eq!(api.status(id, exec_id), 128 + signal);
        // Kill of what is gone.
        assert_refused(
            api.kill(id, exec_id, 9),
            Code::NotFound,
            "process already finished",
        );
        if survives {
            assert_refused(
                api.start(id, exec_id),
                Code::Unknown,
                "cannot start a stopped process",
            );
        }
    }

    // Exec ids.
    assert_refused(
        api.exec(id, "rt37", &sleep, &none()),
        Code::AlreadyExists,
        "",
    );
    api.delete(id, "rt37").expect("delete an exec");
    api.exec(id, "rt37", &sleep, &none())
        .expect("an id may be used again after its delete");
    assert_refused(
        api.kill(id, "rt37", 15),
        Code::FailedPrecondition,
        "process not created",
    );
    api.start(id, "rt37").expect("start an exec");
    if survives {
        assert_refused(
            api.start(id, "rt37"),
            Code::Unknown,
            "cannot start a running process",
        );
    }

    assert_refused(
        api.delete(id, "rt37"),
        Code::Unknown,
        "cannot delete a running process",
    );

    // A paused one.
    assert_eq!(api.pause(id), Ok(()));
    assert_refused(api.pause(id), Code::Unknown, "");
    assert_refused(
        api.exec(id, "late", &sleep, &none()),
        Code::Unknown,
        "paused",
    );
    let refused = api.delete(id, "").expect_err("a paused task was deleted");
    assert!(
        matches!(refused.code, Code::Unknown | Code::FailedPrecondition),
        "{refused:?}"
    );
    assert_eq!(api.resume(id), Ok(()));

    // A stopped one: its execs have been told as well.
    api.exec(id, "unstarted", &sleep, &none()).expect("exec");
    assert_eq!(api.kill(id, "", 9), Ok(()));
    assert_eq!(api.status(id, "rt37"), KILLED);
    assert_eq!(api.status(id, ""), KILLED);
    assert_refused(api.kill(id, "", 9), Code::NotFound, "");
    assert_refused(
        api.start(id, ""),
        Code::Unknown,
        "cannot start a stopped process",
    );
    assert_refused(api.pause(id), Code::Unknown, "");
    assert_refused(
        api.exec(id, "late", &sleep, &none()),
        Code::Unknown,
        "stopped",
    );
    assert_refused(
        api.update(id, &json!({"pids": {"limit": 9}})),
        Code::Unknown,
        "",
    );
    if survives {
        let late = api.start(id, "unstarted");
        let late = late.expect_err("an exec was started in a stopped container");
        // The stock shim of 1.6.20 forks a runc that fails, newer ones say what ours says.
        let code = if ours {
            Code::FailedPrecondition
        } else {
            Code::Unknown
        };
        assert_eq!(late.code, code, "{late:?}");
    }
    api.delete(id, "")
        .expect("delete, with an exec that was never started");
    for refused in [
        api.state(id, "").map(drop),
        api.kill(id, "", 9),
        api.wait(id, "").map(drop),
        api.delete(id, "").map(drop),
    ] {
        assert_refused(refused, Code::NotFound, "");
    }
    node.wait_no_shims();

    // What cannot be executed fails at Start, with runc's words, and costs only itself.
    let id = "failures";
    api.run(id, &oci_spec(id, &SLEEPER), shim, &none());
    api.exec(id, "absent", &oci_process(&["/no/such/program"]), &none())
        .expect("exec");
    assert_refused(
        api.start(id, "absent"),
        Code::Unknown,
        "OCI runtime exec failed",
    );
    assert_eq!(api.phase(id, "absent"), Status::Created);
    assert_refused(
        api.kill(id, "absent", 9),
        Code::FailedPrecondition,
        "process not created",
    );
    if ours {
        assert_refused(
            api.start(id, "absent"),
            Code::FailedPrecondition,
            "did not start",
        );
        assert_refused(
            api.wait(id, "absent"),
            Code::FailedPrecondition,
            "did not start",
        );
    }
    api.delete(id, "absent")
        .expect("delete an exec that did not start");
    assert_eq!(api.phase(id, ""), Status::Running);
    if ours {
        assert_eq!(api.end(id).status, KILLED);
        node.wait_no_shims();
    } else {
        // This very exit ends the stock shim, which may go before it has answered.
        let _said = containerd
            .ctr("e2e", ["tasks", "kill", "--signal", "KILL", id])
            .output();
        wait_no_running(&api, id);
    }

    // A command that does not exist: Create or Start fails, with runc's words, nothing stays.
    api.container(
        "absent",
        &oci_spec("absent", &["/no/such/program"]),
        shim,
        None,
    );
    let failed = api
        .create("absent", &none())
        .expect_err("created a task without a program");
    assert!(
        failed.message.contains("OCI runtime create failed")
            && failed.message.contains("/no/such/program"),
        "{failed:?}"
    );
    assert_refused(api.state("absent", ""), Code::NotFound, "");
    if ours {
        node.wait_no_shims();
    }
}

/// Waits until a task is stopped or gone.
#[track_caller]
fn wait_no_running(api: &Api, id: &str) {
    wait_for(&format!("the end of {id}"), || match api.state(id, "") {
        Ok(state) => (state.status() == Status::Stopped).then_some(()),
        Err(_) => Some(()),
    });
}

fn exits_of_any_haste_are_told_truly(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");

    // The init dies at once: Start succeeds all the same, whoever came first.
    for round in 0..5_u32 {
        let id = format!("hasty{round}");
        let code = (40 + round).to_string();
        let spec = oci_spec(&id, &["sh", "-c", &format!("exit {code}")]);
        api.container(&id, &spec, shim, None);
        let pid = api.create(&id, &none()).expect("create");
        assert_eq!(api.start(&id, ""), Ok(pid), "round {round}");
        assert_eq!(api.status(&id, ""), 40 + round);
        let deleted = api.delete(&id, "").expect("delete");
        assert_eq!((deleted.pid, deleted.status), (pid, 40 + round));
    }

    // The init is killed before Start: Start fails, the status is there.
    api.container("slain", &oci_spec("slain", &SLEEPER), shim, None);
    let pid = api.create("slain", &none()).expect("create");
    let init = node
        .process(pid)
        .expect("the init is a process of the node");
    node.kill(&init);
    assert_eq!(api.status("slain", ""), KILLED);
    let failed = api.start("slain", "").expect_err("a dead init was started");
    assert_eq!(failed.code, Code::Unknown, "{failed:?}");
    assert_eq!(api.delete("slain", "").expect("delete").status, KILLED);

    // Execs that die before their Start has returned, many side by side.
    api.run("host", &oci_spec("host", &SLEEPER), shim, &none());
    std::thread::scope(|scope| {
        for worker in 0..4_u32 {
            let api = &api;
            scope.spawn(move || {
                for round in 0..3 {
                    let exec_id = format!("blink{worker}-{round}");
                    let process = oci_process(&["sh", "-c", &format!("exit {}", 10 + worker)]);
                    let pid = api.run_exec("host", &exec_id, &process, &none());
                    assert_eq!(api.status("host", &exec_id), 10 + worker);
                    let deleted = api.delete("host", &exec_id).expect("delete an exec");
                    assert_eq!((deleted.pid, deleted.status), (pid, 10 + worker));
                }
            });
        }
        // Meanwhile the task's state is told at once, again and again.
        for _ in 0..20 {
            assert_eq!(api.phase("host", ""), Status::Running);
        }
    });

    // The container dies with its execs in it; each has its own status.
    for exec_id in ["one", "two"] {
        api.run_exec("host", exec_id, &oci_process(&["sleep", "2000"]), &none());
    }
    api.run_exec(
        "host",
        "three",
        &oci_process(&["sh", "-c", "exit 3"]),
        &none(),
    );
    assert_eq!(api.status("host", "three"), 3);
    assert_eq!(api.kill_all("host", 9), Ok(()));
    assert_eq!(api.status("host", ""), KILLED);
    for (exec_id, status) in [("one", KILLED), ("two", KILLED), ("three", 3)] {
        assert_eq!(api.status("host", exec_id), status, "{exec_id}");
    }
    // Delete with execs that nobody has deleted.
    assert_eq!(api.delete("host", "").expect("delete").status, KILLED);

    // A container in the node's pid namespace: what its init leaves behind ends with it.
    let mut spec = oci_spec("open", &["sh", "-c", "sleep 3000 & exec sleep 3001"]);
    spec["linux"]["namespaces"] = json!([{"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]);
    api.run("open", &spec, shim, &none());
    let child = process_of(&node, &["sleep", "3000"]);
    let init = process_of(&node, &["sleep", "3001"]);
    node.signal(&init, "KILL");
    assert_eq!(api.status("open", ""), KILLED);
    node.wait_gone(&child);
    api.delete("open", "").expect("delete");

    // Paused and killed: the exit is told though the container is frozen.
    api.run("frozen", &oci_spec("frozen", &SLEEPER), shim, &none());
    assert_eq!(api.pause("frozen"), Ok(()));
    assert_eq!(api.kill("frozen", "", 9), Ok(()));
    assert_eq!(
        api.resume("frozen")
            .map_err(|refused| refused.code)
            .err()
            .filter(|c| *c != Code::Unknown),
        None
    );
    assert_eq!(api.status("frozen", ""), KILLED);
    api.delete("frozen", "").expect("delete");
    node.wait_no_shims();
}

fn containers_of_one_group_share_a_shim(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let by_group = |id: &str| Container::new(id).shim(shim).group("lead");
    let by_pod = |id: &str, name: Option<&str>| {
        Container::new(id)
            .shim(shim)
            .pod("pause", "shop", "web-0", name)
    };
    let lead = containerd.run(&by_group("lead"));
    let member = containerd.run(&by_group("member"));
    let pause = containerd.run(&by_pod("pause", None));
    let app = containerd.run(&by_pod("app", Some("app")));
    let alone = containerd.run(&Container::new("alone").shim(shim));
    let served = |task: &Task| (task.shim.pid, task.socket().to_owned());
    assert_eq!(served(&lead), served(&member));
    assert_eq!(served(&pause), served(&app));
    assert_eq!(node.shims().len(), 3);
    assert_ne!(served(&lead), served(&pause));
    assert_ne!(served(&alone), served(&pause));

    // Each answers for itself, at the same time.
    let api = containerd.api("e2e");
    assert_eq!(api.phase("lead", ""), Status::Running);
    api.pause("member").expect("pause one of a group");
    assert_eq!(api.phase("lead", ""), Status::Running);
    assert_eq!(api.phase("member", ""), Status::Paused);
    api.resume("member").expect("resume one of a group");
    api.run_exec(
        "member",
        "same",
        &oci_process(&["sh", "-c", "exit 1"]),
        &none(),
    );
    api.run_exec(
        "lead",
        "same",
        &oci_process(&["sh", "-c", "exit 2"]),
        &none(),
    );
    assert_eq!(
        (api.status("member", "same"), api.status("lead", "same")),
        (1, 2)
    );

    // The first goes, the shim stays for the other; the last takes it along.
    for (first, last) in [(&lead, &member), (&pause, &app)] {
        containerd.remove(first);
        last.assert_init_alive();
        last.assert_shim_alive();
        assert_eq!(api.phase(last.id(), ""), Status::Running);
        containerd.remove(last);
        node.wait_gone(&last.shim);
    }
    alone.assert_shim_alive();
    containerd.remove(&alone);
    node.wait_no_shims();
}

/// A call to a shim past containerd.
fn direct<R: prost::Message + Default>(
    node: &Node,
    socket: &std::path::Path,
    service: &str,
    method: &str,
    request: &impl prost::Message,
) -> Result<R, CallError> {
    let deadline = Instant::now() + Duration::from_secs(60);
    ShimClient::connect(&node.path(socket), "e2e", deadline)?.call(service, method, request)
}

/// Only ours has both: the stock shims of 1.x have v2 only, that of 2.x has v3 only, so that a
/// daemon of the other kind cannot talk to their tasks (and a downgrade kills them).
fn both_versions_of_the_api_on_one_socket(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let task = containerd.run(&Container::new("both").shim(ShimUnderTest::Recoverd));
    let state = task::StateRequest {
        id: "both".into(),
        exec_id: String::new(),
    };
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let answer: task::StateResponse =
            direct(&node, task.socket(), service, "State", &state).expect(service);
        assert_eq!(answer.pid, task.init.pid, "{service}");
        let request = task::ConnectRequest { id: "both".into() };
        let answer: task::ConnectResponse =
            direct(&node, task.socket(), service, "Connect", &request).expect(service);
        assert_eq!(
            (answer.shim_pid, answer.task_pid),
            (task.shim.pid, task.init.pid)
        );
        // An unknown id has no pid, and is no error.
        let request = task::ConnectRequest { id: "other".into() };
        let answer: task::ConnectResponse =
            direct(&node, task.socket(), service, "Connect", &request).expect(service);
        assert_eq!((answer.shim_pid, answer.task_pid), (task.shim.pid, 0));
        // Shutdown is ignored while there is a task.
        let request = task::ShutdownRequest {
            id: "both".into(),
            now: true,
        };
        let _empty: () =
            direct(&node, task.socket(), service, "Shutdown", &request).expect(service);
        task.assert_shim_alive();
        task.assert_init_alive();
    }
    for (service, method) in [
        ("containerd.task.v2.Task", "Fly"),
        ("containerd.task.v3.Task", ""),
        ("containerd.task.v4.Task", "State"),
        ("containerd.runtime.sandbox.v1.Sandbox", "PingSandbox"),
        ("", ""),
    ] {
        match direct::<task::StateResponse>(&node, task.socket(), service, method, &state) {
            Err(CallError::Status { code, .. }) => {
                assert_eq!(code, code::UNIMPLEMENTED, "{service}/{method}");
            }
            other => panic!("{service}/{method}: {other:?}"),
        }
    }
    task.assert_shim_alive();
    containerd.remove(&task);
    node.wait_no_shims();
}

/// containerd's own restart monitor: kills what is left of a task, deletes it, and makes a new one of
/// the same id at once, every ten seconds if need be.
fn restart_monitor_brings_a_task_back_under_its_id(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let label = "containerd.io/restart.status=running";
    let container = Container::new("phoenix").shim(shim);
    let task = containerd.run(&container.option(&["--label", label]));
    node.signal(&task.init, "KILL");
    let again = wait_for("the task to be back", || {
        let row = containerd.task("e2e", "phoenix")?;
        (row.status == "RUNNING" && row.pid != task.init.pid).then_some(row.pid)
    });
    let init = node.process(again).expect("the new init");
    node.wait_gone(&task.shim);
    let api = containerd.api("e2e");
    api.run_exec(
        "phoenix",
        "hello",
        &oci_process(&["sh", "-c", "exit 6"]),
        &none(),
    );
    assert_eq!(api.status("phoenix", "hello"), 6);
    // The one of before took nothing of it along, and its `delete` came by.
    assert!(node.alive(&init));
    let stay = "containerd.io/restart.status=stopped";
    containerd.ctr_ok("e2e", ["containers", "label", "phoenix", stay]);
    // The monitor may be at it at the same time.
    let _either = containerd
        .ctr("e2e", ["tasks", "delete", "--force", "phoenix"])
        .output();
    node.wait_gone(&init);
    node.wait_no_shims();
}
