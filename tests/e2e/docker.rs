//! Docker as a client of our shim, with `live-restore`; the stock shim as control.

use std::io::Write;
use std::process::Stdio;

use recoverd_tests::{Docker, Node, Process, Release, SystemdBox, readme, wait_for};

recoverd_tests::tests! {
    with_docker: [
        docker_runs_everything_that_it_runs_with_the_stock_shim,
        containers_outlive_dockerd_and_containerd,
        dockers_own_containerd_is_found,
        an_adopted_containers_log_goes_on,
    ],
    docker_in_a_box: [the_readme_makes_it_dockers_default_runtime],
}

const IMAGE: &str = "localhost/busybox:latest";
/// Docker's own name of the stock shim, and the two ways to name ours.
const RUNTIMES: [&str; 3] = ["io.containerd.runc.v2", "recoverd", "by-path"];

/// `docker run` without a network of its own.
fn run<'a>(runtime: &'a str, options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--network", "none", "--runtime", runtime];
    args.extend_from_slice(options);
    args.push(IMAGE);
    args.extend_from_slice(command);
    args
}

fn docker_runs_everything_that_it_runs_with_the_stock_shim(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let docker = Docker::on(&containerd);
    for runtime in RUNTIMES {
        let line = "echo out; echo err >&2; cat; exit 3";
        let mut command = docker.command(&run(runtime, &["--rm", "-i"], &["sh", "-c", line]));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut client = command.spawn().unwrap();
        client.stdin.take().unwrap().write_all(b"in\n").unwrap();
        let output = client.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{runtime}: {output:?}");
        assert_eq!(output.stdout, b"out\nin\n", "{runtime}");
        assert_eq!(output.stderr, b"err\n", "{runtime}");

        let mut terminal =
            docker.on_terminal(&run(runtime, &["--rm", "-t"], &["sh", "-c", "tty; exit 4"]));
        assert_eq!(
            terminal.wait().code(),
            Some(4),
            "{runtime}: {}",
            terminal.text()
        );
        assert!(
            terminal.text().contains("/dev/pts/0"),
            "{}",
            terminal.text()
        );

        let loops =
            "trap 'exit 5' TERM; trap 'echo attached' USR1; echo up; while :; do sleep 0.05; done";
        docker.ok(&run(
            runtime,
            &["-d", "--name", "service"],
            &["sh", "-c", loops],
        ));
        let said = docker.output(&["exec", "service", "sh", "-c", "echo hello; exit 7"]);
        assert_eq!(
            (said.status.code(), said.stdout),
            (Some(7), b"hello\n".to_vec())
        );
        let top = docker.ok(&["top", "service", "-o", "pid"]);
        let mut lines = top.lines();
        let pid = docker.init("service").pid.to_string();
        assert_eq!(lines.next(), Some("PID"), "{top}");
        assert!(lines.any(|line| line.trim() == pid), "no {pid} in {top}");
        let figures = [
            "stats",
            "--no-stream",
            "--format",
            "{{.MemUsage}}|{{.PIDs}}",
        ];
        let figures = docker.ok(&[&figures[..], &["service"]].concat());
        let (memory, pids) = figures.trim().split_once('|').unwrap();
        assert!(!memory.starts_with("0B"), "{runtime}: {figures}");
        let pids: Result<u64, _> = pids.parse();
        assert!(pids.is_ok_and(|pids| pids >= 1), "{runtime}: {figures}");
        wait_for("the freezer", || {
            let output = docker.output(&["pause", "service"]);
            let text = String::from_utf8_lossy(&output.stderr);
            let done = output.status.success();
            // runc gives up on one that takes long, as it may where much goes on.
            assert!(done || text.contains("unable to freeze"), "{text}");
            done.then_some(())
        });
        assert_eq!(docker.inspect("service", ".State.Status"), "paused");
        docker.ok(&["unpause", "service"]);
        docker.ok(&[
            "update",
            "--memory",
            "64m",
            "--memory-swap",
            "64m",
            "service",
        ]);
        let init = docker.init("service").pid;
        let v1 = ("memory", "memory.limit_in_bytes");
        assert_eq!(node.cgroup_number(init, v1, "memory.max"), 64 << 20);
        wait_for("its output", || {
            (docker.ok(&["logs", "service"]) == "up\n").then_some(())
        });
        docker.ok(&["stop", "service"]);
        assert_eq!(docker.wait_exited("service"), (5, false), "{runtime}");
        docker.ok(&["start", "service"]);
        let mut attached = docker.spawn(&["attach", "--sig-proxy=false", "service"]);
        wait_for("it to be attached", || {
            docker.ok(&["kill", "--signal", "USR1", "service"]);
            attached.text().contains("attached").then_some(())
        });
        docker.ok(&["kill", "--signal", "KILL", "service"]);
        assert_eq!(docker.wait_exited("service"), (137, false), "{runtime}");
        assert_eq!(
            attached.wait().code(),
            Some(137),
            "{runtime}: {}",
            attached.text()
        );
        docker.ok(&["rm", "service"]);

        let eater = "x=a; while :; do x=$x$x$x; done";
        let limit = [
            "-d",
            "--name",
            "eater",
            "--memory",
            "16m",
            "--memory-swap",
            "16m",
        ];
        docker.ok(&run(runtime, &limit, &["sh", "-c", eater]));
        // Each is an event of its own for it.
        wait_for("the kill for want of memory", || {
            let (code, oom) = docker.wait_exited("eater");
            assert_eq!(code, 137, "{runtime}");
            oom.then_some(())
        });
        docker.ok(&["rm", "eater"]);
        node.wait_no_shims();
    }
}

/// Numbers until SIGTERM.
const COUNTER: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 5' TERM; i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done",
];

/// Fails unless the log has the numbers from one on, and waits for more of them. A dockerd that is
/// ended takes along what it had read and not yet written, whatever the shim does.
#[track_caller]
fn assert_counts(docker: &Docker, container: &str, ends: usize) {
    let lines = || docker.ok(&["logs", container]);
    let seen = lines().lines().count();
    let text = wait_for("more numbers", || {
        let text = lines();
        (text.lines().count() > seen + 3).then_some(text)
    });
    assert_numbered(&text, ends);
}

/// Numbers from one on, each after the one before it, but for so many gaps.
#[track_caller]
fn assert_numbered(text: &str, gaps: usize) {
    let (mut previous, mut found) = (0u64, 0);
    for line in text.lines() {
        let number = line.parse().unwrap_or_else(|e| panic!("{line:?}: {e}"));
        assert!(number > previous, "{number} after {previous}");
        found += usize::from(number != previous + 1);
        previous = number;
    }
    assert!(found <= gaps, "{found} gaps up to {previous}");
}

fn containers_outlive_dockerd_and_containerd(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut docker = Docker::on(&containerd);
    let names = ["lives", "dockerd", "containerd", "both"];
    for name in names {
        docker.ok(&run("recoverd", &["-d", "--name", name], &COUNTER));
    }
    let inits: Vec<Process> = names.iter().map(|name| docker.init(name)).collect();
    let shims = node.shims();
    assert_eq!(shims.len(), names.len());
    let of_lives = shims.iter().find(|shim| shim.pid == inits[0].parent);
    let of_lives = of_lives.unwrap_or_else(|| panic!("whose is {:?}?", inits[0]));
    let check = |docker: &Docker, ends: usize| {
        assert_eq!(docker.init("lives"), inits[0]);
        let said = docker.output(&["exec", "lives", "sh", "-c", "echo hello; exit 7"]);
        assert_eq!(
            (said.status.code(), said.stdout),
            (Some(7), b"hello\n".to_vec())
        );
        assert_counts(docker, "lives", ends);
    };
    let end = |at: usize| {
        node.signal(&inits[at], "TERM");
        node.wait_gone(&inits[at]);
    };
    check(&docker, 0);

    docker.stop();
    docker.start();
    check(&docker, 1);
    docker.kill();
    end(1);
    docker.start();
    check(&docker, 2);
    assert_eq!(docker.wait_exited("dockerd"), (5, false));

    // Docker connects again by itself.
    containerd.kill();
    end(2);
    containerd.start();
    assert_eq!(docker.wait_exited("containerd"), (5, false));
    check(&docker, 2);
    containerd.stop();
    containerd.start();
    check(&docker, 2);

    docker.kill();
    containerd.kill();
    end(3);
    containerd.start();
    docker.start();
    assert_eq!(docker.wait_exited("both"), (5, false));
    check(&docker, 3);
    assert!(node.alive(of_lives));
    assert_eq!(docker.init("lives").parent, of_lives.pid);

    docker.ok(&["stop", "lives"]);
    assert_eq!(docker.wait_exited("lives"), (5, false));
    docker.ok(&["rm", "lives", "dockerd", "containerd", "both"]);
    node.wait_no_shims();
}

fn dockers_own_containerd_is_found(release: &Release) {
    let node = Node::start();
    let docker = Docker::alone(&node, release);
    docker.ok(&run("recoverd", &["-d", "--name", "own"], &COUNTER));
    let id = docker.inspect("own", ".Id");
    let scan = node.scan();
    let task = scan.task(&format!("moby/{id}"));
    assert_eq!(task.init.as_ref().unwrap().pid, docker.init("own").pid);
    assert_eq!(task.findings, [""; 0]);
    let own = "/docker/containerd/containerd.sock";
    let mut all = scan.report.instances.iter();
    assert!(
        all.any(|one| one.up && one.address.ends_with(own)),
        "{scan:?}"
    );
    docker.ok(&["rm", "--force", "own"]);
}

/// A stock shim tells nobody where the fifos of its container are, nor does one of ours whose record
/// is lost: dockerd's are found by their names.
fn an_adopted_containers_log_goes_on(release: &Release) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let mut docker = Docker::on(&containerd);
    let names = ["stock", "ours"];
    for (name, runtime) in names.into_iter().zip(RUNTIMES) {
        docker.ok(&run(runtime, &["-d", "--name", name], &COUNTER));
    }
    let lines = |docker: &Docker, name| docker.ok(&["logs", name]).lines().count();
    let inits: Vec<Process> = names.iter().map(|name| docker.init(name)).collect();
    for name in names {
        wait_for("numbers", || (lines(&docker, name) > 0).then_some(()));
    }
    docker.kill();
    containerd.kill();
    for shim in node.shims() {
        node.kill(&shim);
    }
    node.shell("rm /run/containerd/s/*.record");
    let hook = containerd.pre_start();
    assert_eq!(hook.exit, 0, "{hook:?}");
    containerd.start();
    docker.start();
    for (name, init) in names.into_iter().zip(&inits) {
        assert_eq!(docker.init(name), *init);
        let before = lines(&docker, name);
        wait_for("the log to go on", || {
            (lines(&docker, name) > before).then_some(())
        });
        docker.ok(&["stop", name]);
        assert_eq!(docker.wait_exited(name), (5, false));
    }
    docker.ok(&["rm", "stock", "ours"]);
    node.wait_no_shims();
}

/// Under systemd, word for word; only the image is not from a registry.
fn the_readme_makes_it_dockers_default_runtime() {
    const SECTION: &str = "### With Docker";
    let host = SystemdBox::start();
    // Docker of today wants a containerd of today.
    let newest = Release::available().pop();
    let newest = newest.unwrap_or_else(|| panic!("no release of containerd: run tests/setup"));
    host.put(newest.package(), "/root/containerd.deb");
    host.shell("dpkg --install /root/containerd.deb");
    host.install_docker();
    host.shell("systemctl start docker");
    host.docker_image();
    let runtime = || host.shell("docker info --format '{{.DefaultRuntime}}'");
    assert_eq!(runtime(), "runc\n");

    host.write("/etc/docker/daemon.json", &readme(SECTION, "json"));
    let commands = readme(SECTION, "sh").replace("sudo ", "");
    let said = host.shell(&commands);
    assert_eq!(said, "Hello from Docker!\n");
    assert_eq!(runtime(), "recoverd\n");

    let line = "trap \"exit 42\" TERM; n=0; while :; do n=$((n+1)); echo $n; usleep 100000; done";
    let run = |name: &str, options: &str| {
        host.shell(&format!(
            "docker run --detach --name {name} {options} hello-world /bin/sh -c '{line}'"
        ));
        let pid = host.shell(&format!(
            "docker inspect --format '{{{{.State.Pid}}}}' {name}"
        ));
        let pid = pid.trim().parse().ok();
        let init = pid.and_then(|pid| host.process(pid));
        let init = init.unwrap_or_else(|| panic!("{name} does not run"));
        let shim = host.process(init.parent);
        (init, shim.unwrap_or_else(|| panic!("{name} has no shim")))
    };
    let all = [run("stays", ""), run("ends", "--runtime recoverd")];
    for (_, shim) in &all {
        assert_eq!(shim.program(), "containerd-shim-recoverd-v1");
    }
    let lines = |name: &str| host.shell(&format!("docker logs {name}")).lines().count();
    for restarted in ["docker", "containerd"] {
        let before = lines("stays");
        host.shell(&format!("systemctl restart {restarted}"));
        for (init, shim) in &all {
            assert!(host.alive(init) && host.alive(shim), "{restarted}");
        }
        let running = host.shell("docker ps --format '{{.Names}}'");
        assert_eq!(running.lines().count(), 2, "{restarted}: {running}");
        wait_for("the log to go on", || {
            (lines("stays") > before).then_some(())
        });
        let said = host.shell("docker exec stays /bin/echo well");
        assert_eq!(said, "well\n", "{restarted}");
    }
    // One that ends while dockerd is away keeps its exit code.
    host.shell("systemctl stop docker.socket docker");
    host.signal(&all[1].0, "TERM");
    host.wait_gone(&all[1].0);
    host.shell("systemctl start docker");
    assert_eq!(host.shell("docker wait ends"), "42\n");
    host.shell("docker stop stays >/dev/null");
    assert_eq!(host.shell("docker wait stays"), "42\n");
    assert_numbered(&host.shell("docker logs stays"), 2);
    host.shell("docker rm stays ends");
}
