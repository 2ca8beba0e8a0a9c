//! Pods, as kubelet has them made: containerd's CRI plugin with the stock shim and with ours.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1::LinuxContainerResources;
use recoverd_tests::{
    Code, ContainerSpec, Containerd, Cri, Handler, Node, Pod, Release, ShimUnderTest, Task, Traces,
    built, numbers, readme, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        a_pod_by_runtime_path_lives_its_life,
        the_readme_makes_it_the_default_runtime,
    ],
    with_each_shim: [
        a_pod_lives_its_life,
        a_session_has_its_streams_and_its_exit_code,
        an_exec_ends_with_its_process_or_says_who_holds_its_output,
        members_die_one_by_one,
    ],
}

const MIB: i64 = 1 << 20;
/// Nobody in particular.
const USER: i64 = 1000;

fn a_pod_by_runtime_path_lives_its_life(release: &Release) {
    life(release, Handler::recommended(release));
}

fn a_pod_lives_its_life(release: &Release, shim: ShimUnderTest) {
    life(release, shim.into());
}

/// As the README writes it, but that the shim is where cargo has put it, and that runc is told of
/// another root instead of systemd's cgroups: no systemd is on a node, and a folder can be seen.
fn the_readme_makes_it_the_default_runtime(release: &Release) {
    let above = match (release.major(), &*release.version) {
        (1, "1.6.20") => "Older ones",
        (1, _) => "containerd 1.7 from",
        _ => "containerd 2.x:",
    };
    let node = Node::start();
    let options = node.folder().join("recoverd-runc.toml");
    let (root, line) = ("/run/of-readme", "Root = \"/run/of-readme\"");
    fs::write(&options, line).unwrap_or_else(|error| panic!("write options: {error}"));
    let installed = "/usr/local/bin/containerd-shim-recoverd-v1";
    let shim = built("containerd-shim-recoverd-v1").display().to_string();
    let toml = readme(above, "toml")
        .replace(installed, &shim)
        .replace("SystemdCgroup = true", line)
        .replace(
            "/etc/containerd/recoverd-runc.toml",
            &options.display().to_string(),
        );
    let class = readme("For some pods only", "yaml");
    let named = class.lines().find_map(|line| line.strip_prefix("handler:"));
    let named = named.map(|rest| rest.split('#').next().unwrap_or_default().trim());
    let named = named.unwrap_or_else(|| panic!("no handler in {class}"));
    let containerd = node.kubernetes_by(release, &toml);
    let cri = containerd.cri();
    for handler in ["", named] {
        let name = format!("web-{handler}");
        let pod = cri
            .try_run_pod(&name, handler)
            .unwrap_or_else(|refused| panic!("run pod {name}: {refused:?}"));
        let pause = containerd.member(&pod, &pod.id);
        assert_eq!(pause.shim.program(), "containerd-shim-recoverd-v1");
        let state = node.path(root).join("k8s.io").join(&pod.id);
        assert!(
            state.exists(),
            "the options did not arrive: no {}",
            state.display()
        );
        cri.stop_pod(&pod);
        cri.remove_pod(&pod);
    }
}

/// A line of shell that writes numbers to both streams, then waits for the word `end`.
fn writer(name: &str, status: u8) -> ContainerSpec {
    let line = numbers("/mnt/go", "/mnt/stop", &format!("/mnt/{name}.count"));
    let line = format!(
        "{line}; echo last words >&2; while [ ! -e /mnt/end ]; do usleep 20000; done; exit {status}"
    );
    ContainerSpec::shell(name, &line)
}

/// The numbers that a [`writer`] has logged, all of them.
#[track_caller]
fn assert_logged(node: &Node, cri: &Cri, pod: &Pod, name: &str) {
    let count = node.count_in(&format!("{name}.count"));
    let expected: Vec<String> = (1..=count).map(|n| n.to_string()).collect();
    wait_for("the last words in the log", || {
        (cri.log(pod, name, "stderr") == ["last words"]).then_some(())
    });
    wait_for("every number in the log", || {
        let logged = cri.log(pod, name, "stdout");
        (logged.len() >= expected.len()).then_some(())
    });
    // No `assert_eq`: nobody reads ten thousand lines of it.
    let logged = cri.log(pod, name, "stdout");
    assert!(logged == expected, "{} of {count} lines", logged.len());
}

fn life(release: &Release, handler: Handler) {
    let node = Node::start();
    let containerd = node.kubernetes(release);
    let cri = containerd.cri();
    let before = Traces::of(&node);
    let pod = cri.run_pod("web-0", handler);
    assert_eq!(cri.pod_ready(&pod), Some(true));

    let limited = LinuxContainerResources {
        memory_limit_in_bytes: 64 * MIB,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..LinuxContainerResources::default()
    };
    let app = cri.run(&pod, &writer("app", 23));
    let side = cri.run(
        &pod,
        &ContainerSpec::until_term("side", 5)
            .resources(limited)
            .user(USER),
    );
    // Ends only when it is made to.
    let deaf = ContainerSpec::shell(
        "deaf",
        "trap '' TERM; while :; do sleep 1000 & wait $!; done",
    );
    let deaf = cri.run(&pod, &deaf);
    let tasks = [&pod.id, &app, &side, &deaf].map(|id| containerd.member(&pod, id));
    let [pause, app_task, side_task, _] = &tasks;
    for task in &tasks {
        assert_eq!(task.shim, pause.shim, "not one shim");
    }
    let expected = match handler {
        Handler::Stock => "containerd-shim-runc-v2",
        Handler::ByType | Handler::ByPath => "containerd-shim-recoverd-v1",
    };
    assert_eq!(pause.shim.program(), expected);
    let state = Path::new(handler.runc_root(release))
        .join("k8s.io")
        .join(&app);
    assert!(
        node.path(state.join("state.json")).exists(),
        "the options did not arrive: no {}",
        state.display()
    );
    assert_scan_knows(
        &containerd,
        &tasks,
        &[None, Some("app"), Some("side"), Some("deaf")],
    );

    // An exec is the container's user, and opens its own output again.
    assert_eq!(
        cri.sh(&side, "echo hello >/dev/stdout; id -u >/dev/stderr; exit 3"),
        (3, "hello\n".into())
    );
    assert_eq!(cri.sh(&side, "kill -9 $$").0, 137);
    let answer = cri.exec_sync(&side, "echo out; echo err >&2", 30);
    let answer = answer.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(
        (answer.exit_code, &*answer.stdout, &*answer.stderr),
        (0, &b"out\n"[..], &b"err\n"[..])
    );
    let megabytes = cri.sh(&side, "head -c 3000000 /dev/zero | tr '\\0' x").1;
    assert_eq!(megabytes.len(), 3_000_000);

    stats_tell_what_the_cgroup_says(&cri, side_task);
    let more = LinuxContainerResources {
        memory_limit_in_bytes: 96 * MIB,
        cpu_period: 100_000,
        cpu_quota: 75_000,
        ..LinuxContainerResources::default()
    };
    cri.update(&side, more);
    let of_side = |v1, v2| node.cgroup_number(side_task.init.pid, v1, v2);
    let limit = of_side(("memory", "memory.limit_in_bytes"), "memory.max");
    assert_eq!(limit, 96 << 20);
    assert_eq!(of_side(("cpu", "cpu.cfs_quota_us"), "cpu.max"), 75_000);

    node.tell("go");
    wait_for("lines in the log", || {
        (cri.log(&pod, "app", "stdout").len() > 100).then_some(())
    });
    node.tell("stop");
    node.count_in("app.count");
    node.tell("end");
    assert_eq!(cri.exited(&app), (23, "Error".into()));
    assert_logged(&node, &cri, &pod, "app");
    node.wait_gone(&app_task.init);

    cri.stop(&side, 30);
    assert_eq!(cri.exited(&side), (5, "Error".into()));
    cri.stop(&deaf, 1);
    assert_eq!(cri.exited(&deaf), (137, "Error".into()));
    pause.assert_init_alive();
    pause.assert_shim_alive();
    for id in [&app, &side, &deaf] {
        cri.remove(id);
        assert!(
            cri.status(id)
                .is_err_and(|refused| refused.code == Code::NotFound)
        );
    }
    cri.stop_pod(&pod);
    cri.wait_pod_down(&pod);
    node.wait_gone(&pause.shim);
    cri.remove_pod(&pod);
    assert_eq!(cri.pod_ready(&pod), None);
    before.wait_restored(&node);
}

/// What the kernel says of a task's memory, bytes.
#[track_caller]
fn memory_of(task: &Task) -> u64 {
    let v1 = ("memory", "memory.usage_in_bytes");
    task.node()
        .cgroup_number(task.init.pid, v1, "memory.current")
}

/// What the kernel says of a task's processor time; v1 has nanoseconds, v2 microseconds.
#[track_caller]
fn cpu_of(task: &Task) -> u64 {
    let v1 = ("cpuacct", "cpuacct.usage");
    task.node().cgroup_number(task.init.pid, v1, "cpu.stat")
}

#[track_caller]
fn stats_tell_what_the_cgroup_says(cri: &Cri, task: &Task) {
    let cpu_before = cpu_of(task);
    let stats = cri.stats(task.id());
    let cpu_after = cpu_of(task);
    let said = stats
        .cpu
        .and_then(|cpu| cpu.usage_core_nano_seconds)
        .map_or(0, |n| n.value);
    let in_unit = [said, said / 1000].map(|n| (cpu_before..=cpu_after).contains(&n));
    assert!(in_unit.contains(&true), "{cpu_before} {said} {cpu_after}");
    // What an exec leaves behind goes page by page.
    let (said, usage) = wait_for("memory at rest", || {
        let said = cri.stats(task.id()).memory.unwrap_or_default();
        let usage = said.usage_bytes.map_or(0, |n| n.value);
        let kernel = memory_of(task);
        (usage.abs_diff(kernel) <= kernel / 20).then_some((said, usage))
    });
    assert!(
        said.working_set_bytes
            .is_some_and(|n| n.value > 0 && n.value <= usage)
    );
    assert!(
        said.rss_bytes
            .is_some_and(|n| n.value > 0 && n.value <= usage)
    );
    assert!(said.page_faults.is_some_and(|n| n.value > 0));
}

/// Every task has its pod's names, and nothing is wrong with any.
#[track_caller]
fn assert_scan_knows(containerd: &Containerd, tasks: &[Task], names: &[Option<&str>]) {
    let scan = containerd.scan();
    assert_eq!(scan.exit, 0, "{scan:?}");
    for (task, name) in tasks.iter().zip(names) {
        let case = scan.task(&task.name());
        let pod = case
            .pod
            .as_ref()
            .unwrap_or_else(|| panic!("no pod in {case:?}"));
        let said = (&*pod.namespace, &*pod.name, pod.container.as_deref());
        assert_eq!(said, ("prod", "web-0", *name), "{case:?}");
    }
}

fn a_session_has_its_streams_and_its_exit_code(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.kubernetes(release);
    let cri = containerd.cri();
    let before = Traces::of(&node);
    let pod = cri.run_pod("web-0", shim.into());
    let echo = "while read line; do echo \"got $line\"; [ \"$line\" != bye ] || exit 7; done";
    let plain = cri.run(&pod, &ContainerSpec::shell("plain", echo).stdin());
    let tty = cri.run(&pod, &ContainerSpec::shell("tty", echo).stdin().terminal());

    let mut exec = cri.exec(
        &plain,
        "read x; echo \"out $x\"; echo \"err $x\" >&2; exit 5",
        true,
        false,
    );
    exec.write("word\n");
    assert_eq!(exec.finish(), Some(5));
    assert_eq!((&*exec.stdout, &*exec.stderr), ("out word\n", "err word\n"));

    let lines = "while [ \"$(stty size)\" != '43 132' ]; do usleep 20000; done; echo sized; seq 1 20000; exit 6";
    let mut exec = cri.exec(&plain, lines, true, true);
    exec.resize(132, 43);
    assert_eq!(exec.finish(), Some(6));
    assert!(exec.stdout.contains("sized\r\n"), "{:.200}", exec.stdout);
    let numbers: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
    assert!(
        exec.stdout.ends_with(&numbers),
        "{} bytes",
        exec.stdout.len()
    );

    // A client that goes away takes nothing with it.
    let mut first = cri.attach(&plain, true, false);
    first.wait_attached();
    first.write("one\n");
    first.wait_for("got one\n");
    drop(first);
    let mut second = cri.attach(&plain, true, false);
    second.wait_attached();
    second.write("two\n");
    second.wait_for("got two\n");
    let mut terminal = cri.attach(&tty, true, true);
    terminal.wait_attached();
    terminal.write("three\n");
    terminal.wait_for("got three\r\n");

    second.write("bye\n");
    second.wait_for("got bye\n");
    second.finish();
    assert_eq!(cri.exited(&plain).0, 7);
    // containerd writes the log beside everything else that it does.
    let said = wait_for("the last line in the log", || {
        let said = cri.log(&pod, "plain", "stdout");
        (said.last().map(String::as_str) == Some("got bye")).then_some(said)
    });
    let said: Vec<String> = said.into_iter().filter(|line| line != "got ?").collect();
    assert_eq!(said, ["got one", "got two", "got bye"]);
    terminal.write("bye\n");
    terminal.finish();
    assert_eq!(cri.exited(&tty).0, 7);
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    before.wait_restored(&node);
}

fn an_exec_ends_with_its_process_or_says_who_holds_its_output(
    release: &Release,
    shim: ShimUnderTest,
) {
    let node = Node::start();
    let containerd = node.kubernetes(release);
    let cri = containerd.cri();
    let before = Traces::of(&node);
    let pod = cri.run_pod("web-0", shim.into());
    let app = cri.run(&pod, &ContainerSpec::until_term("app", 0));

    // A grandchild that lets go in time: all that it wrote is there.
    let answer = cri.sh(&app, "(sleep 1; echo late) & echo early; exit 4");
    assert_eq!(answer, (4, "early\nlate\n".into()));
    // One that does not: containerd gives up after what its configuration says. 1.6.20 has no such
    // limit, and whoever calls waits as long as the grandchild lives.
    if release.version != "1.6.20" {
        let began = Instant::now();
        let held = cri.exec_sync(&app, "sleep 1000 & echo early", 0);
        let took = began.elapsed();
        let refused = held.expect_err("output that somebody holds is said to be complete");
        assert!(refused.message.contains("drain"), "{refused:?}");
        // Three seconds are containerd's, as it is configured here; then it deletes the exec, and
        // the shim waits for the output. The stock shim of 1.7 gives up after 2 s, that of 2.x and
        // ours, with every containerd, after 10 s. Once: what a busy machine adds is less than that.
        let limit = match (shim, release.name) {
            (ShimUnderTest::Stock, "1.7") => 2,
            (ShimUnderTest::Stock | ShimUnderTest::Recoverd, _) => 10,
        };
        let least = Duration::from_secs(3 + limit);
        let most = least + Duration::from_secs(9);
        assert!((least..most).contains(&took), "it took {took:?}");
    }
    // One that takes too long itself.
    let late = cri.exec_sync(&app, "sleep 1000", 1);
    let refused = late.expect_err("an exec of 1000 s ended within one");
    assert_eq!(refused.code, Code::DeadlineExceeded, "{refused:?}");

    assert_eq!(cri.sh(&app, "echo well"), (0, "well\n".into()));
    // No exec of those is still somebody's: the shim knows the init and its children only.
    cri.stop(&app, 10);
    assert_eq!(cri.exited(&app), (0, "Completed".into()));
    cri.remove(&app);
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    before.wait_restored(&node);
}

fn members_die_one_by_one(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.kubernetes(release);
    let cri = containerd.cri();
    let before = Traces::of(&node);
    let pod = cri.run_pod("web-0", shim.into());
    let pause = containerd.member(&pod, &pod.id);
    let ids =
        ["one", "two", "three"].map(|name| cri.run(&pod, &ContainerSpec::until_term(name, 9)));
    let [one, two, three] = ids.each_ref().map(|id| containerd.member(&pod, id));

    node.kill(&one.init);
    assert_eq!(cri.exited(one.id()), (137, "Error".into()));
    assert_eq!(cri.pod_ready(&pod), Some(true));
    cri.remove(one.id());
    // The pause first: the others are told of it and nothing else happens to them.
    node.kill(&pause.init);
    cri.wait_pod_down(&pod);
    for task in [&two, &three] {
        task.assert_init_alive();
        task.assert_shim_alive();
        cri.assert_running(task.id());
        assert_eq!(cri.sh(task.id(), "echo well"), (0, "well\n".into()));
    }
    node.signal(&two.init, "TERM");
    assert_eq!(cri.exited(two.id()), (9, "Error".into()));
    three.assert_shim_alive();
    // With the last of them the shim leaves.
    cri.stop(three.id(), 10);
    assert_eq!(cri.exited(three.id()), (9, "Error".into()));
    cri.stop_pod(&pod);
    cri.remove_pod(&pod);
    if shim == ShimUnderTest::Stock && release.major() == 2 {
        // containerd 2.1 leaves a stock shim behind whose pause died first.
        node.kill(&three.shim);
        return;
    }
    before.wait_restored(&node);
    let socket = node.path(three.socket());
    assert!(
        fs::symlink_metadata(&socket).is_err(),
        "{} is left",
        socket.display()
    );
}
