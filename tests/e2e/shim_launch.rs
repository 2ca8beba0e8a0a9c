//! How containerd starts our shim: every form of the start protocol, and the files that let a task
//! outlive a change of release.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use prost_types::Any;
use recoverd_common::paths::socket;
use recoverd_common::pb::bootstrap::{BootstrapParams, Extension};
use recoverd_common::pb::info::RuntimeInfo;
use recoverd_common::pb::runc::Options;
use recoverd_common::pb::task::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, ShutdownRequest,
};
use recoverd_common::pb::type_url;
use recoverd_common::ttrpc::code;
use recoverd_tests::{
    Container, Node, Process, Release, ShimUnderTest, Traces, call, refusal, wait_for,
};

recoverd_tests::tests! {
    on_every_release: [
        every_release_finds_the_address_that_it_reads,
        two_runs_at_once_for_one_group_share_one_shim,
    ],
    once: [
        start_tells_both_forms_of_its_input_apart,
        many_starts_at_once_for_one_group_leave_one_shim,
        start_never_sends_to_a_shim_that_leaves,
        version_and_info_are_told,
    ],
}

const ADDRESS: &str = "/run/containerd/containerd.sock";

fn ours(id: &str) -> Container {
    Container::new(id).shim(ShimUnderTest::Recoverd)
}

fn every_release_finds_the_address_that_it_reads(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let before = Traces::of(&node);
    let alone = containerd.run(&ours("alone"));
    let first = containerd.run(&ours("first").pod("first", "shop", "web-0", None));
    let member = containerd.run(&ours("member").pod("first", "shop", "web-0", Some("app")));
    assert_eq!(first.shim, member.shim);
    for (task, group) in [(&alone, "alone"), (&first, "first"), (&member, "first")] {
        let expected = socket(Path::new("/run/containerd/s"), ADDRESS, "e2e", group);
        let read = |name: &str| {
            let path = node.path(task.bundle().join(name));
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
        };
        // For 1.x, whatever runs now.
        let address = format!("unix://{}", expected.display());
        assert_eq!(read("address"), address, "{group}");
        // For 2.x.
        let bootstrap: serde_json::Value = serde_json::from_str(&read("bootstrap.json"))
            .unwrap_or_else(|error| panic!("bootstrap.json: {error}"));
        assert_eq!(bootstrap["version"], 2, "{bootstrap}");
        assert_eq!(bootstrap["address"], address, "{bootstrap}");
        assert_eq!(bootstrap["protocol"], "ttrpc", "{bootstrap}");
        // By this every release runs our own `delete`: the file that 2.x leaves out for pod
        // members of a version-3 shim.
        let program = node.built("containerd-shim-recoverd-v1");
        assert_eq!(Path::new(&read("shim-binary-path")), program, "{group}");
    }
    for task in [&member, &first, &alone] {
        containerd.remove(task);
    }
    before.wait_restored(&node);
}

fn two_runs_at_once_for_one_group_share_one_shim(release: &Release) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let before = Traces::of(&node);
    for round in 0..3 {
        let group = format!("io.containerd.runc.v2.group=group-{round}");
        let names = [format!("one-{round}"), format!("two-{round}")];
        let program = ShimUnderTest::Recoverd.runtime().display().to_string();
        let root = Release::rootfs().display().to_string();
        let mut runs = names.each_ref().map(|name| {
            let options = ["run", "--detach", "--runtime", &program];
            let container = ["--annotation", &group, "--env", "PATH=/bin", "--rootfs"];
            let command = [root.as_str(), name, "sleep", "100000"];
            let words = [&options[..], &container, &command].concat();
            containerd.ctr_spawn("e2e", words)
        });
        for run in &mut runs {
            assert!(run.wait().success(), "{}", run.text());
        }
        let addresses = names.each_ref().map(|name| {
            let bundle = Path::new("/run/containerd/io.containerd.runtime.v2.task/e2e").join(name);
            let path = node.path(bundle.join("address"));
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
        });
        assert_eq!(addresses[0], addresses[1]);
        wait_for("one shim more", || {
            (node.shims().len() == round + 1).then_some(())
        });
    }
    for row in containerd.tasks("e2e") {
        assert_eq!(row.status, "RUNNING");
        containerd.ctr_ok("e2e", ["tasks", "delete", "--force", &row.id]);
        containerd.ctr_ok("e2e", ["containers", "delete", &row.id]);
    }
    before.wait_restored(&node);
}

// ---- by hand ----

/// A bundle with no more in it than `start` reads.
fn bundle(node: &Node, id: &str, group: Option<&str>) -> PathBuf {
    let bundle = Path::new("/run/by-hand").join(id);
    let annotations = match group {
        Some(group) => format!("{{\"io.containerd.runc.v2.group\": \"{group}\"}}"),
        None => "{}".into(),
    };
    let outside = node.path(&bundle);
    fs::create_dir_all(&outside)
        .and_then(|()| {
            let config = format!("{{\"annotations\": {annotations}}}");
            fs::write(outside.join("config.json"), config)
        })
        .unwrap_or_else(|error| panic!("make {}: {error}", outside.display()));
    bundle
}

/// The command line of `start`, for a shell; its input comes from `input`.
fn start_line(node: &Node, bundle: &Path, id: &str, input: &Path) -> String {
    format!(
        "cd {} && GOMAXPROCS=2 TTRPC_ADDRESS={ADDRESS}.ttrpc {} -namespace e2e -address {ADDRESS} \
         -publish-binary /usr/bin/containerd -id {id} start <{}",
        bundle.display(),
        node.built("containerd-shim-recoverd-v1").display(),
        input.display(),
    )
}

/// The only shim, which names the first of its tasks: one of these.
#[track_caller]
fn only_shim(node: &Node, ids: &[&str]) -> Process {
    // One that has left its place to this one may need a moment to be gone.
    wait_for("one shim", || match node.shims().as_slice() {
        [shim] if ids.iter().any(|id| shim.flag("-id") == Some(id)) => Some(shim.clone()),
        _ => None,
    })
}

/// Asks an empty shim to leave, as containerd does, and waits until it has.
#[track_caller]
fn shut_down(node: &Node, socket: &Path, shim: &Process) {
    let connect = ConnectRequest { id: "any".into() };
    let answer: ConnectResponse = call(node, socket, "Connect", &connect)
        .unwrap_or_else(|error| panic!("Connect at {}: {error}", socket.display()));
    assert_eq!((answer.shim_pid, answer.task_pid), (shim.pid, 0));
    let shutdown = ShutdownRequest {
        id: "any".into(),
        now: false,
    };
    call::<()>(node, socket, "Shutdown", &shutdown)
        .unwrap_or_else(|error| panic!("Shutdown at {}: {error}", socket.display()));
    node.wait_gone(shim);
}

/// What containerd sends after `start`: Create. Its bundle is none, and only a shim says so.
#[track_caller]
fn come(node: &Node, socket: &Path, id: &str) {
    let create = CreateTaskRequest {
        id: id.into(),
        bundle: "/run/by-hand/none".into(),
        ..Default::default()
    };
    let (code, text) = refusal(call::<()>(node, socket, "Create", &create));
    assert_ne!(code, code::UNAVAILABLE, "{id}: {text}");
}

fn start_tells_both_forms_of_its_input_apart(_newest: &Release) {
    let node = Node::start();
    node.shell("mkdir -p /run/containerd/s");
    let before = Traces::of(&node);
    let options = Any {
        type_url: type_url::RUNC_OPTIONS.into(),
        value: Options {
            binary_name: "runc".into(),
            ..Default::default()
        }
        .encode_to_vec(),
    };
    let params = |id: &str| BootstrapParams {
        instance_id: id.into(),
        namespace: "e2e".into(),
        containerd_version: "2.4.0".into(),
        containerd_ttrpc_address: format!("{ADDRESS}.ttrpc"),
        containerd_grpc_address: ADDRESS.into(),
        containerd_binary: "/usr/bin/containerd".into(),
        extensions: vec![Extension {
            value: Some(options.clone()),
        }],
        socket_dir: Some("/run/containerd/s".into()),
        ..Default::default()
    };
    let inputs: [(&str, Vec<u8>); 7] = [
        // No options at all: every release up to 2.2.
        ("nothing", Vec::new()),
        // Decodes as BootstrapParams too, whose id would be `containerd.runc.v1.Options`.
        ("any", options.encode_to_vec()),
        // Decodes as Any too, whose type would be the id.
        ("params", params("params").encode_to_vec()),
        ("stranger", params("somebody-else").encode_to_vec()),
        ("text", b"{\"version\": 3}\n".to_vec()),
        ("garbage", vec![0xff; 100]),
        ("much", vec![b'x'; 100_000]),
    ];
    for (id, input) in inputs {
        let bundle = bundle(&node, id, None);
        let file = node.folder().join("input");
        fs::write(&file, input).unwrap_or_else(|error| panic!("write input: {error}"));
        let output = node.output("sh", ["-ec", &start_line(&node, &bundle, id, &file)]);
        let expected = socket(Path::new("/run/containerd/s"), ADDRESS, "e2e", id);
        // Both go down one pipe to containerd, so that a word on stderr would be in the address.
        let said = [output.stdout, output.stderr].concat();
        assert_eq!(
            String::from_utf8_lossy(&said),
            format!("unix://{}", expected.display()),
            "{id}"
        );
        assert!(output.status.success(), "{id}");
        let shim = only_shim(&node, &[id]);
        assert_eq!(shim.flag("-address"), Some(ADDRESS), "{id}");
        assert_eq!(shim.flag("-namespace"), Some("e2e"), "{id}");
        let address = fs::read_to_string(node.path(bundle.join("address")));
        assert_eq!(address.ok(), Some(format!("unix://{}", expected.display())));
        shut_down(&node, &expected, &shim);
        before.wait_restored(&node);
    }
}

fn many_starts_at_once_for_one_group_leave_one_shim(_newest: &Release) {
    let node = Node::start();
    node.shell("mkdir -p /run/containerd/s");
    let before = Traces::of(&node);
    for round in 0..5 {
        let group = format!("group-{round}");
        let ids: Vec<String> = (0..8).map(|n| format!("member-{round}-{n}")).collect();
        let lines: Vec<String> = ids
            .iter()
            .map(|id| {
                let bundle = bundle(&node, id, Some(&group));
                let line = start_line(&node, &bundle, id, Path::new("/dev/null"));
                format!("({line} >/run/by-hand/{id}/said 2>&1) &")
            })
            .collect();
        node.shell(&format!("{} wait", lines.join("\n")));
        let expected = socket(Path::new("/run/containerd/s"), ADDRESS, "e2e", &group);
        for id in &ids {
            for name in ["said", "address"] {
                let path = node.path(Path::new("/run/by-hand").join(id).join(name));
                let text = wait_for("what start said", || fs::read_to_string(&path).ok());
                assert_eq!(
                    text,
                    format!("unix://{}", expected.display()),
                    "{id} {name}"
                );
            }
        }
        // It waits for all that it was announced.
        for id in &ids {
            come(&node, &expected, id);
        }
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let shim = only_shim(&node, &ids);
        shut_down(&node, &expected, &shim);
        before.wait_restored(&node);
    }
}

/// A shim that `start` gave for another container of the group, while the last one of it was just
/// shutting it down, is there when that container comes.
fn start_never_sends_to_a_shim_that_leaves(_newest: &Release) {
    let node = Node::start();
    node.shell("mkdir -p /run/containerd/s");
    let before = Traces::of(&node);
    let start = |id: &str, group: &str| {
        let bundle = bundle(&node, id, Some(group));
        let line = start_line(&node, &bundle, id, Path::new("/dev/null"));
        let output = node.output("sh", ["-ec", &line]);
        assert!(output.status.success(), "{output:?}");
    };
    for round in 0..60u64 {
        let group = format!("group-{round}");
        let expected = socket(Path::new("/run/containerd/s"), ADDRESS, "e2e", &group);
        let (first, second) = (format!("first-{round}"), format!("second-{round}"));
        start(&first, &group);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // At another moment of the other's start each time.
                std::thread::sleep(Duration::from_millis(round % 20 * 3));
                let shutdown = ShutdownRequest {
                    id: first.clone(),
                    now: false,
                };
                // It may be gone before it has answered; that is its right.
                let _ = call::<()>(&node, &expected, "Shutdown", &shutdown);
            });
            start(&second, &group);
        });
        come(&node, &expected, &second);
        let shim = only_shim(&node, &[&first, &second]);
        shut_down(&node, &expected, &shim);
        before.wait_restored(&node);
    }
}

fn version_and_info_are_told(_newest: &Release) {
    let node = Node::start();
    let program = node.built("containerd-shim-recoverd-v1");
    let version = node.run(&program, ["-v"]);
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    for input in [
        Vec::new(),
        Any {
            type_url: type_url::RUNC_OPTIONS.into(),
            value: Vec::new(),
        }
        .encode_to_vec(),
        vec![0xff; 20],
    ] {
        let file = node.folder().join("input");
        fs::write(&file, input).unwrap_or_else(|error| panic!("write input: {error}"));
        let line = format!("{} -info <{}", program.display(), file.display());
        let output = node.output("sh", ["-ec", &line]);
        assert!(output.status.success(), "{output:?}");
        let info = RuntimeInfo::decode(output.stdout.as_slice())
            .unwrap_or_else(|error| panic!("decode RuntimeInfo: {error}"));
        assert_eq!(info.name, "io.containerd.recoverd.v1");
        let features = info.features.map(|any| any.type_url);
        assert_eq!(
            features.as_deref(),
            Some("types.containerd.io/opencontainers/runtime-spec/1/features/Features")
        );
        let version = info.version.map(|version| version.version);
        assert_eq!(version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
    }
    // And what `containerd` is not told on stdout is an error on stderr, in one line.
    let output = node.output(&program, ["-namespace", "e2e"]);
    assert!(!output.status.success());
    assert_eq!(output.stdout, b"");
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
}
