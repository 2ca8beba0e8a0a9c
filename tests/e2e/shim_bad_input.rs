//! Our shim and what it should refuse: one clear line to the caller, and nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use prost_types::Any;
use recoverd_common::pb::runc::Options;
use recoverd_common::pb::task::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest,
    KillRequest, StartRequest, StartResponse, Status,
};
use recoverd_common::pb::type_url;
use recoverd_common::record::Exit;
use recoverd_common::ttrpc::code;
use recoverd_tests::{
    Container, Containerd, Node, Process, Release, ShimUnderTest, Task, Traces, refusal, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        runtime_that_cannot_run_fails_or_hangs,
        full_run_refuses_new_work_and_nothing_else,
    ],
    with_each_shim: [
        what_ctr_can_get_wrong,
    ],
    once: [
        create_refuses_what_it_cannot_do,
        calls_at_the_wrong_time_are_refused_and_harm_nothing,
    ],
}

fn ours(id: &str) -> Container {
    Container::new(id).shim(ShimUnderTest::Recoverd)
}

/// Runs `ctr run`, which must fail with one line on stderr that says `says`.
#[track_caller]
fn assert_run_refused(containerd: &Containerd, options: &[&str], id: &str, says: &[&str]) {
    let output = try_run(containerd, options, id);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{id} ran: {output:?}");
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    // `ctr` writes warnings of its own (of an old default runtime, of GODEBUG) before the error.
    let last = lines.last().copied().unwrap_or_default();
    for part in says {
        assert!(last.contains(part), "{part:?} is not in {text:?}");
    }
    // containerd 1.x and 2.x keep the container's record; the task is what must not be there.
    containerd
        .ctr("e2e", ["containers", "delete", id])
        .output()
        .unwrap_or_else(|error| panic!("start ctr: {error}"));
}

fn try_run(containerd: &Containerd, options: &[&str], id: &str) -> Output {
    let shim = ShimUnderTest::Recoverd.runtime().display().to_string();
    let root = Release::rootfs().display().to_string();
    let mut args = options.to_vec();
    args.extend([
        "run",
        "--detach",
        "--runtime",
        &shim,
        "--env",
        "PATH=/bin",
        "--rootfs",
    ]);
    args.extend([root.as_str(), id, "sleep", "100000"]);
    containerd
        .ctr("e2e", &args)
        .output()
        .unwrap_or_else(|error| panic!("start ctr: {error}"))
}

/// A script in the test's own folder.
fn script(node: &Node, name: &str, text: &str) -> PathBuf {
    let path = node.folder().join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    path
}

/// Puts `what` in runc's place, in this node only, for as long as `meanwhile` runs.
fn instead_of_runc(node: &Node, what: &Path, meanwhile: impl FnOnce()) {
    let runc = node.shell("readlink -f \"$(command -v runc)\"");
    node.run(
        "mount",
        ["--bind".as_ref(), what.as_os_str(), runc.trim().as_ref()],
    );
    meanwhile();
    node.run("umount", [runc.trim()]);
}

fn runtime_that_cannot_run_fails_or_hangs(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let before = Traces::of(&node);
    instead_of_runc(&node, Path::new("/dev/null"), || {
        assert_run_refused(&containerd, &[], "denied", &["runc", "ermission denied"]);
        before.wait_restored_but_mounts(&node);
    });
    let failing = script(
        &node,
        "failing",
        "echo 'no cgroup left on this moon' >&2; exit 1",
    );
    instead_of_runc(&node, &failing, || {
        // As with the stock shim, what the runtime says beside its log goes where the container
        // would have written: here to the terminal of `ctr`.
        assert_run_refused(&containerd, &[], "failing", &["ended with status 1"]);
        before.wait_restored_but_mounts(&node);
    });
    let silent = script(&node, "silent", "exit 3");
    instead_of_runc(&node, &silent, || {
        assert_run_refused(&containerd, &[], "silent", &["runc", "3"]);
        before.wait_restored_but_mounts(&node);
    });
    // Says that all is well and has made nothing.
    let lying = script(&node, "lying", "exit 0");
    instead_of_runc(&node, &lying, || {
        assert_run_refused(&containerd, &[], "lying", &["pid file"]);
        before.wait_restored_but_mounts(&node);
    });
    // Its caller waits three seconds. Clean-up and the `delete` verb find a runtime that works.
    let hanging = script(
        &node,
        "hanging",
        "case \" $* \" in *' create '*) exec sleep 1000 ;; esac; exit 0",
    );
    instead_of_runc(&node, &hanging, || {
        assert_run_refused(&containerd, &["--timeout", "3s"], "hanging", &["eadline"]);
        before.wait_restored_but_mounts(&node);
    });
    before.wait_restored(&node);
    let task = containerd.run(&ours("well"));
    containerd.remove(&task);
    before.wait_restored(&node);
}

fn what_ctr_can_get_wrong(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let before = Traces::of(&node);
    let shim = shim.runtime().display().to_string();
    let run = |options: &[&str], id: &str, command: &[&str]| {
        let mut args = vec!["run", "--detach", "--runtime", &shim];
        args.extend(options);
        // A root that containerd asks the shim to mount: it has to go as well.
        args.extend(["localhost/busybox:latest", id]);
        args.extend(command);
        let output = containerd
            .ctr("e2e", &args)
            .output()
            .unwrap_or_else(|error| panic!("start ctr: {error}"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{id} ran: {output:?}");
        containerd.ctr_ok("e2e", ["containers", "delete", id]);
        before.wait_restored(&node);
        text
    };
    let text = run(&["--log-uri", "carrier-pigeon:///x"], "uri", &["true"]);
    assert!(text.contains("carrier-pigeon"), "{text}");
    let text = run(
        &["--log-uri", "binary:///no/such/logger"],
        "logger",
        &["true"],
    );
    assert!(text.contains("/no/such/logger"), "{text}");
    let text = run(
        &["--log-uri", "file:///proc/no/such/log"],
        "file",
        &["true"],
    );
    assert!(text.contains("/proc/no"), "{text}");
    let text = run(&[], "program", &["/no/such/program"]);
    assert!(text.contains("/no/such/program"), "{text}");
    let text = run(&["--cwd", "/proc/self/no"], "folder", &["true"]);
    assert!(text.contains("runtime create failed"), "{text}");
}

/// `/run` of the node, so full that not one more byte, or file, fits.
struct Full<'a>(&'a Node);

impl Full<'_> {
    fn of_bytes(node: &Node) -> Full<'_> {
        node.shell(
            "mount -o remount,size=24m /run; \
             dd if=/dev/zero of=/run/ballast bs=64k 2>/dev/null || :; \
             dd if=/dev/zero of=/run/ballast-2 bs=1 2>/dev/null || :",
        );
        Full(node)
    }

    fn of_inodes(node: &Node) -> Full<'_> {
        node.shell(
            "used=$(df -i /run | awk 'END { print $3 }'); \
             mount -o remount,size=24m,nr_inodes=$((used + 200)) /run; mkdir /run/ballast; \
             n=0; while true >/run/ballast/$n; do n=$((n + 1)); done 2>/dev/null || :",
        );
        Full(node)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        self.0
            .output("sh", ["-c", "rm -rf /run/ballast /run/ballast-2"]);
        self.0
            .output("mount", ["-o", "remount,size=64m,nr_inodes=100000", "/run"]);
    }
}

fn full_run_refuses_new_work_and_nothing_else(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let before = Traces::of(&node);
    for (round, fill) in [
        ("bytes", Full::of_bytes as fn(&Node) -> Full<'_>),
        ("inodes", Full::of_inodes),
    ] {
        let task = containerd.run(&ours(&format!("{round}-old")).command([
            "sh",
            "-c",
            "trap 'exit 23' TERM; while :; do sleep 1000 & wait $!; done",
        ]));
        let full = fill(&node);
        let output = try_run(&containerd, &[], &format!("{round}-new"));
        assert!(!output.status.success(), "{output:?}");
        // Straight to the shim: a client of containerd would fail before.
        let exec = ExecProcessRequest {
            id: task.id().into(),
            exec_id: "exec".into(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: br#"{"args":["true"],"cwd":"/"}"#.to_vec(),
            }),
            ..Default::default()
        };
        let (_, text) = refusal(task.call::<()>("Exec", &exec));
        assert!(text.contains("o space left"), "{round}: {text}");
        task.assert_init_alive();
        task.assert_shim_alive();
        assert_eq!(task.state("").status(), Status::Running);
        node.signal(&task.init, "TERM");
        assert_eq!(task.wait("").exit_status, 23);
        let recorded = wait_for("the exit in the record", || task.recorded().exit);
        assert!(
            matches!(recorded, Exit::Observed { status: 23, .. }),
            "{recorded:?}"
        );
        wait_for("containerd to learn of the exit", || {
            (containerd.task("e2e", task.id())?.status == "STOPPED").then_some(())
        });
        let output = containerd
            .ctr("e2e", ["tasks", "delete", task.id()])
            .output()
            .unwrap_or_else(|error| panic!("start ctr: {error}"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("code 23"), "{output:?}");
        drop(full);
        // What was refused left nothing, not even after the room came back.
        for id in [task.id().to_owned(), format!("{round}-new")] {
            containerd
                .ctr("e2e", ["containers", "delete", &id])
                .output()
                .unwrap_or_else(|error| panic!("start ctr: {error}"));
        }
        before.wait_restored(&node);
    }
    let task = containerd.run(&ours("well"));
    containerd.remove(&task);
    before.wait_restored(&node);
}

// ---- past containerd, at a shim that serves another container already ----

/// A host whose one shim is asked for further tasks.
struct Bench {
    node: Arc<Node>,
    containerd: Containerd,
    host: Task,
    before: Traces,
}

impl Bench {
    fn start(release: &Release) -> Bench {
        let node = Node::start();
        let containerd = node.containerd(release);
        let host = containerd.run(&ours("host"));
        wait_for("what its shell starts", || {
            let mut all = node.processes().into_iter();
            all.find(|p| p.parent == host.init.pid && p.argv == ["sleep", "1000"])
        });
        let before = Traces::of(&node);
        Bench {
            node,
            containerd,
            host,
            before,
        }
    }

    /// A bundle as containerd makes it, of a container that would run.
    fn bundle(&self, id: &str) -> PathBuf {
        let bundle = Path::new("/run/bundles").join(id);
        let config = self.node.path(self.host.bundle().join("config.json"));
        let config = fs::read_to_string(&config)
            .unwrap_or_else(|error| panic!("read {}: {error}", config.display()))
            .replace("/e2e/host", &format!("/e2e/{id}"));
        let outside = self.node.path(&bundle);
        fs::create_dir_all(&outside)
            .and_then(|()| fs::write(outside.join("config.json"), config))
            .unwrap_or_else(|error| panic!("make {}: {error}", outside.display()));
        bundle
    }

    fn create(&self, request: &CreateTaskRequest) -> (i32, String) {
        refusal(self.host.call::<CreateTaskResponse>("Create", request))
    }

    /// Refused, with `says` in the one line; nothing is left, and the id is free.
    #[track_caller]
    fn assert_refused(&self, request: &CreateTaskRequest, says: &str) {
        let (_, text) = self.create(request);
        assert!(text.contains(says), "{says:?} is not in {text:?}");
        let state = recoverd_common::pb::task::StateRequest {
            id: request.id.clone(),
            exec_id: String::new(),
        };
        let (code, _) = refusal(
            self.host
                .call::<recoverd_common::pb::task::StateResponse>("State", &state),
        );
        assert_eq!(code, code::NOT_FOUND);
        let record = self.host.record();
        let ids: Vec<&str> = record.tasks.iter().map(|task| task.id.as_str()).collect();
        assert_eq!(ids, ["host"]);
        assert_eq!(record.running, []);
        self.before.wait_restored(&self.node);
        self.host.assert_init_alive();
        self.host.assert_shim_alive();
        // In the log too, with the line that the caller got.
        wait_for("the refusal in the log", || {
            self.containerd.log().contains(says).then_some(())
        });
    }

    /// Creates, starts, ends and deletes; to show that what was refused before left no harm.
    #[track_caller]
    fn assert_runs(&self, request: &CreateTaskRequest) {
        let created: CreateTaskResponse = self.expect("Create", request);
        let start = StartRequest {
            id: request.id.clone(),
            exec_id: String::new(),
        };
        let started: StartResponse = self.expect("Start", &start);
        assert_eq!(created.pid, started.pid);
        let kill = KillRequest {
            id: request.id.clone(),
            signal: 9,
            ..Default::default()
        };
        self.expect::<()>("Kill", &kill);
        let wait = recoverd_common::pb::task::WaitRequest {
            id: request.id.clone(),
            exec_id: String::new(),
        };
        let waited: recoverd_common::pb::task::WaitResponse = self.expect("Wait", &wait);
        assert_eq!(waited.exit_status, 137);
        let delete = DeleteRequest {
            id: request.id.clone(),
            exec_id: String::new(),
        };
        let deleted: DeleteResponse = self.expect("Delete", &delete);
        assert_eq!(deleted.exit_status, 137);
        self.before.wait_restored(&self.node);
    }

    #[track_caller]
    fn expect<R: prost::Message + Default>(
        &self,
        method: &str,
        request: &impl prost::Message,
    ) -> R {
        self.host
            .call(method, request)
            .unwrap_or_else(|error| panic!("{method}: {error}"))
    }
}

fn options(options: &Options) -> Option<Any> {
    Some(Any {
        type_url: type_url::RUNC_OPTIONS.into(),
        value: prost::Message::encode_to_vec(options),
    })
}

fn binary(path: &Path) -> Option<Any> {
    options(&Options {
        binary_name: path.display().to_string(),
        ..Default::default()
    })
}

fn create_refuses_what_it_cannot_do(release: &Release) {
    let bench = Bench::start(release);
    let node = &bench.node;
    let bundle = bench.bundle("new");
    let good = CreateTaskRequest {
        id: "new".into(),
        bundle: bundle.display().to_string(),
        ..Default::default()
    };
    let with = |change: &dyn Fn(&mut CreateTaskRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };

    // The bundle.
    bench.assert_refused(
        &with(&|r| r.bundle = "/run/bundles/none".into()),
        "/run/bundles/none",
    );
    bench.assert_refused(&with(&|r| r.bundle = "relative".into()), "relative");
    bench.assert_refused(&with(&|r| r.id = "../new".into()), "../new");
    let config = node.path(bundle.join("config.json"));
    let whole = fs::read(&config).unwrap_or_else(|error| panic!("read config.json: {error}"));
    let write = |bytes: &[u8]| {
        fs::write(&config, bytes).unwrap_or_else(|error| panic!("write config.json: {error}"));
    };
    for broken in [&b"{"[..], b"", b"[]", b"\0\xff\xfe", b"{\"linux\": 7}"] {
        write(broken);
        bench.assert_refused(&good, "config.json");
    }
    // Good JSON that the runtime refuses.
    write(b"{\"ociVersion\": \"1.0.2\", \"process\": {}}");
    bench.assert_refused(&good, "OCI runtime create failed");
    let inside = bundle.join("config.json").display().to_string();
    node.shell(&format!("rm {inside} && mkfifo {inside}"));
    let with_fifo = Traces::of(node);
    wait_for("nothing to be new but that", || {
        (bench.before.new_since(node) == [format!("file {inside}")]).then_some(())
    });
    let (_, text) = bench.create(&good);
    assert!(text.contains("config.json"), "{text}");
    with_fifo.wait_restored(node);
    node.shell(&format!("rm {inside}"));
    bench.assert_refused(&good, "config.json");
    write(&whole);
    bench.assert_runs(&good);

    // The runtime.
    let missing = Path::new("/no/such/runc");
    bench.assert_refused(&with(&|r| r.options = binary(missing)), "/no/such/runc");
    let failing = script(node, "failing", "echo 'out of moons' >&2; exit 1");
    bench.assert_refused(
        &with(&|r| r.options = binary(&failing)),
        "ended with status 1",
    );
    let killed = script(node, "killed", "kill -9 $$");
    bench.assert_refused(&with(&|r| r.options = binary(&killed)), "137");
    let rubbish = node.folder().join("rubbish");
    fs::write(&rubbish, "rubbish").unwrap_or_else(|error| panic!("write: {error}"));
    bench.assert_refused(&with(&|r| r.options = binary(&rubbish)), "rubbish");
    let strange = Any {
        type_url: "example.Strange".into(),
        value: vec![1, 2, 3],
    };
    bench.assert_refused(
        &with(&|r| r.options = Some(strange.clone())),
        "example.Strange",
    );
    let garbled = Any {
        type_url: type_url::RUNC_OPTIONS.into(),
        value: vec![0xff; 9],
    };
    bench.assert_refused(&with(&|r| r.options = Some(garbled.clone())), "ptions");

    // Its stdio.
    node.shell("mkdir -p /run/io/folder; echo text >/run/io/file");
    let nobody = "/run/io/none/fifo";
    bench.assert_refused(&with(&|r| r.stdin = nobody.into()), nobody);
    bench.assert_refused(&with(&|r| r.stdout = nobody.into()), nobody);
    bench.assert_refused(&with(&|r| r.stderr = nobody.into()), nobody);
    bench.assert_refused(&with(&|r| r.stdin = "/run/io/file".into()), "/run/io/file");
    bench.assert_refused(
        &with(&|r| r.stdin = "/run/io/folder".into()),
        "/run/io/folder",
    );
    bench.assert_refused(
        &with(&|r| r.stdout = "/run/io/folder".into()),
        "/run/io/folder",
    );
    bench.assert_refused(&with(&|r| r.stdout = "pigeon:///x".into()), "pigeon");
    bench.assert_refused(&with(&|r| r.stderr = "pigeon:///x".into()), "pigeon");
    bench.assert_refused(&with(&|r| r.stdout = "relative".into()), "relative");
    bench.assert_refused(
        &with(&|r| r.stdout = "binary:///no/logger".into()),
        "/no/logger",
    );
    bench.assert_refused(
        &with(&|r| {
            r.terminal = true;
            r.stdout = nobody.into();
        }),
        nobody,
    );
    assert!(!node.path("/run/io/none").exists());
    let kept = fs::read_to_string(node.path("/run/io/file")).unwrap_or_default();
    assert_eq!(kept, "text\n");

    // A root file system that cannot be mounted: what was mounted before it goes again.
    let mount = |kind: &str, source: &str| recoverd_common::pb::task::Mount {
        r#type: kind.into(),
        source: source.into(),
        ..Default::default()
    };
    bench.assert_refused(
        &with(&|r| r.rootfs = vec![mount("tmpfs", "tmpfs"), mount("no-such-fs", "x")]),
        "no-such-fs",
    );
    let rootfs = node.path(bundle.join("rootfs"));
    assert!(
        fs::read_dir(&rootfs).map_or(0, Iterator::count) == 0,
        "something is in {}",
        rootfs.display()
    );
    bench.assert_runs(&good);
}

fn calls_at_the_wrong_time_are_refused_and_harm_nothing(release: &Release) {
    let bench = Bench::start(release);
    let host = &bench.host;
    let bundle = bench.bundle("host");
    let same_id = CreateTaskRequest {
        id: "host".into(),
        bundle: bundle.display().to_string(),
        ..Default::default()
    };
    let (code, text) = bench.create(&same_id);
    assert_eq!(
        (code, text.contains("host")),
        (code::ALREADY_EXISTS, true),
        "{text}"
    );

    let start = StartRequest {
        id: "host".into(),
        exec_id: String::new(),
    };
    let (code, text) = refusal(host.call::<StartResponse>("Start", &start));
    assert_eq!(code, code::UNKNOWN, "{text}");

    let delete = DeleteRequest {
        id: "host".into(),
        exec_id: String::new(),
    };
    let (code, text) = refusal(host.call::<DeleteResponse>("Delete", &delete));
    assert_eq!(
        (code, text.contains("running")),
        (code::UNKNOWN, true),
        "{text}"
    );

    let exec = ExecProcessRequest {
        id: "host".into(),
        exec_id: "session".into(),
        spec: Some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: br#"{"args":["/bin/sleep","100000"],"cwd":"/"}"#.to_vec(),
        }),
        ..Default::default()
    };
    bench.expect::<()>("Exec", &exec);
    let (code, text) = refusal(host.call::<()>("Exec", &exec));
    assert_eq!(
        (code, text.contains("session")),
        (code::ALREADY_EXISTS, true),
        "{text}"
    );
    let start = StartRequest {
        exec_id: "session".into(),
        ..start
    };
    let started: StartResponse = bench.expect("Start", &start);
    let session: Process = wait_for("the exec", || bench.node.process(started.pid));
    // A used id, and started twice.
    let (code, _) = refusal(host.call::<()>("Exec", &exec));
    assert_eq!(code, code::ALREADY_EXISTS);
    refusal(host.call::<StartResponse>("Start", &start));
    let delete = DeleteRequest {
        exec_id: "session".into(),
        ..delete
    };
    let (_, text) = refusal(host.call::<DeleteResponse>("Delete", &delete));
    assert!(text.contains("running"), "{text}");
    let kill = |exec_id: &str, signal| KillRequest {
        id: "host".into(),
        exec_id: exec_id.into(),
        signal,
        all: false,
    };
    for signal in [65, 1 << 31, u32::MAX] {
        let (_, text) = refusal(host.call::<()>("Kill", &kill("", signal)));
        assert!(text.contains(&signal.to_string()), "{text}");
    }
    assert!(bench.node.alive(&session), "the exec is gone");
    host.assert_init_alive();
    host.assert_shim_alive();
    assert_eq!(host.state("").status(), Status::Running);
    assert_eq!(host.state("session").status(), Status::Running);
    let same = bench.containerd.task("e2e", "host").map(|row| row.status);
    assert_eq!(same.as_deref(), Some("RUNNING"));

    bench.expect::<()>("Kill", &kill("session", 9));
    assert_eq!(host.wait("session").exit_status, 137);
    let deleted: DeleteResponse = bench.expect("Delete", &delete);
    assert_eq!(deleted.exit_status, 137);
    // Free again.
    bench.expect::<()>("Exec", &exec);
    bench.expect::<DeleteResponse>("Delete", &delete);
    bench.before.wait_restored(&bench.node);
    for (exec_id, spec) in [("text", "{"), ("empty", ""), ("list", "[]")] {
        let bad = ExecProcessRequest {
            exec_id: exec_id.into(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: spec.into(),
            }),
            ..exec.clone()
        };
        let (_, text) = refusal(host.call::<()>("Exec", &bad));
        assert!(text.contains("spec"), "{exec_id}: {text}");
    }
    // What an exec cannot have is said at its Start, and only that exec is none.
    for (exec_id, stdout, spec, says) in [
        (
            "path",
            "/run/none/fifo",
            r#"{"args":["true"],"cwd":"/"}"#,
            "/run/none/fifo",
        ),
        (
            "scheme",
            "pigeon:///x",
            r#"{"args":["true"],"cwd":"/"}"#,
            "pigeon",
        ),
        ("folder", "/run", r#"{"args":["true"],"cwd":"/"}"#, "/run"),
        (
            "args",
            "",
            r#"{"args":[],"cwd":"/"}"#,
            "OCI runtime exec failed",
        ),
    ] {
        let bad = ExecProcessRequest {
            id: "host".into(),
            exec_id: exec_id.into(),
            stdout: stdout.into(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: spec.into(),
            }),
            ..Default::default()
        };
        bench.expect::<()>("Exec", &bad);
        let start = StartRequest {
            id: "host".into(),
            exec_id: exec_id.into(),
        };
        let (_, text) = refusal(host.call::<StartResponse>("Start", &start));
        assert!(text.contains(says), "{exec_id}: {text}");
        let delete = DeleteRequest {
            id: "host".into(),
            exec_id: exec_id.into(),
        };
        bench.expect::<DeleteResponse>("Delete", &delete);
        assert_eq!(host.state("").status(), Status::Running);
        bench.before.wait_restored(&bench.node);
    }
    // A task that is created and not started may be deleted, as with the stock shim.
    let fresh = bench.bundle("fresh");
    let create = CreateTaskRequest {
        id: "fresh".into(),
        bundle: fresh.display().to_string(),
        ..Default::default()
    };
    bench.expect::<CreateTaskResponse>("Create", &create);
    bench.assert_gone_after_delete("fresh");
    bench.containerd.remove(host);
}

impl Bench {
    #[track_caller]
    fn assert_gone_after_delete(&self, id: &str) {
        let delete = DeleteRequest {
            id: id.into(),
            exec_id: String::new(),
        };
        self.expect::<DeleteResponse>("Delete", &delete);
        self.before.wait_restored(&self.node);
    }
}
