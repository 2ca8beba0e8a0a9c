//! The binary as containerd runs it (`start`, `delete`, `-v`, `-info`), without containerd: every
//! test has a socket folder and bundles of its own. `start` learns the folder as it does from
//! containerd 2.3, `delete` from the bundle.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message;
use prost_types::Any;
use recoverd_common::{
    paths::{self, Beside},
    pb::{bootstrap, info::RuntimeInfo, runc, task, ttrpc as pb},
    proc::{Proc, ProcessId},
    record::{self, Context, Exit, Phase, Process, Record, Runtime, Shim, Stdio as Io, Task},
    seen::Seen,
    shim_client::ShimClient,
    timestamp::Timestamp,
    ttrpc::{HEADER, Header, Kind, code},
};

mod logged;

use logged::logged;

const BINARY: &str = env!("CARGO_BIN_EXE_containerd-shim-recoverd-v1");
const GRPC: &str = "/run/test/containerd.sock";
/// What a runtime does, whose root is its second word, with the container that its last word names.
const DELETES: &str = "for id; do :; done; rmdir \"$2/$id\"";

/// A node of its own: socket folder, bundles, the runtime's root.
struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["s", "bundles", "runtime"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
        }
        Self { dir }
    }

    fn sockets(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn socket(&self, group: &str) -> PathBuf {
        paths::socket(&self.sockets(), GRPC, "ns", group)
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.dir.path().join("bundles").join(id)
    }

    fn make_bundle(&self, id: &str, config: &str) -> PathBuf {
        let bundle = self.bundle(id);
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("config.json"), config).unwrap();
        bundle
    }

    /// What containerd 2.3 writes to standard input.
    fn params(&self, id: &str, options: Option<runc::Options>) -> Vec<u8> {
        let any = options.map(|options| Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.encode_to_vec(),
        });
        bootstrap::BootstrapParams {
            instance_id: id.into(),
            namespace: "ns".into(),
            containerd_ttrpc_address: "unix:///run/test/events.sock".into(),
            extensions: vec![bootstrap::Extension { value: any }],
            socket_dir: Some(self.sockets().to_str().unwrap().into()),
            ..Default::default()
        }
        .encode_to_vec()
    }

    fn start(&self, id: &str, options: Option<runc::Options>) -> Output {
        let words = [
            "-namespace",
            "ns",
            "-address",
            GRPC,
            "-publish-binary",
            "/x",
            "-id",
            id,
        ];
        run(
            &self.bundle(id),
            &[&words[..], &["start"]].concat(),
            &self.params(id, options),
        )
    }

    fn delete(&self, id: &str) -> Output {
        self.delete_as(Command::new(BINARY).env_remove("TTRPC_ADDRESS"), id)
    }

    fn delete_as(&self, command: &mut Command, id: &str) -> Output {
        let bundle = self.bundle(id);
        let path = bundle.to_str().unwrap();
        let words = [
            "-namespace",
            "ns",
            "-address",
            GRPC,
            "-publish-binary",
            "/x",
            "-id",
            id,
            "-bundle",
            path,
            "delete",
        ];
        let here = if bundle.is_dir() {
            bundle.as_path()
        } else {
            Path::new("/")
        };
        run_as(command, here, &words, b"")
    }

    /// A bundle as a shim leaves it: its address, and a runtime that is `script`.
    fn deserted(&self, id: &str, group: &str, script: &str) -> PathBuf {
        let bundle = self.make_bundle(id, "{}");
        let address = format!("unix://{}", self.socket(group).display());
        fs::write(bundle.join("address"), address).unwrap();
        let runtime = self.dir.path().join(format!("runtime-{id}"));
        fs::write(&runtime, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(bundle.join("runtime"), runtime.to_str().unwrap()).unwrap();
        let root = self.dir.path().join("runtime");
        let options = format!(r#"{{"root":"{}"}}"#, root.display());
        fs::write(bundle.join("options.json"), options).unwrap();
        fs::create_dir_all(root.join("ns").join(id)).unwrap();
        bundle
    }

    /// The names in the socket folder.
    fn leftovers(&self) -> Vec<String> {
        names(&self.sockets())
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn run(here: &Path, words: &[&str], input: &[u8]) -> Output {
    run_as(
        Command::new(BINARY).env_remove("TTRPC_ADDRESS"),
        here,
        words,
        input,
    )
}

fn run_as(command: &mut Command, here: &Path, words: &[&str], input: &[u8]) -> Output {
    let mut child = command
        .args(words)
        .current_dir(here)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Some invocations never read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Failed with one line that holds `says`, and printed nothing else.
#[track_caller]
fn assert_refused(output: &Output, status: i32, says: &str) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains(says), "{said}");
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    assert_eq!(output.stdout, b"", "{said}");
}

#[track_caller]
fn deleted(output: &Output) -> task::DeleteResponse {
    assert!(output.status.success(), "{}", text(&output.stderr));
    task::DeleteResponse::decode(output.stdout.as_slice()).unwrap()
}

/// A shim that answers every request with `response`, until the process of the test ends.
fn fake_shim(socket: &Path, response: pb::Response) {
    fake_shim_of(socket, move |_| response.clone());
}

/// As above, by service.
fn fake_shim_of(socket: &Path, answer: impl Fn(&str) -> pb::Response + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        while let Ok((mut peer, _)) = listener.accept() {
            let mut header = [0; HEADER];
            while peer.read_exact(&mut header).is_ok() {
                let request = Header::parse(&header).unwrap();
                let mut body = vec![0; request.length as usize];
                peer.read_exact(&mut body).unwrap();
                let asked = pb::Request::decode(body.as_slice()).unwrap();
                let payload = answer(&asked.service).encode_to_vec();
                let header = Header {
                    length: u32::try_from(payload.len()).unwrap(),
                    kind: Kind::Response,
                    ..request
                };
                let frame = [header.bytes().as_slice(), &payload].concat();
                if peer.write_all(&frame).is_err() {
                    break;
                }
            }
        }
    });
}

fn refusal(code: i32) -> pb::Response {
    let message = "no".into();
    let status = pb::Status {
        code,
        message,
        details: vec![],
    };
    pb::Response {
        status: Some(status),
        payload: vec![],
    }
}

fn not_found() -> pb::Response {
    refusal(code::NOT_FOUND)
}

fn lock(socket: &Path) -> fs::File {
    let file = fs::File::create(Beside::of(socket).lock).unwrap();
    // SAFETY: flock touches no memory and the descriptor is open.
    let taken = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    assert_eq!(taken, 0);
    file
}

fn recorded(id: &str, init: Option<Process>, exit: Option<Exit>) -> Task {
    Task {
        id: id.into(),
        bundle: String::new(),
        phase: if exit.is_some() {
            Phase::Stopped
        } else {
            Phase::Running
        },
        init,
        runtime: Runtime {
            binary: "/nonexistent/runtime".into(),
            root: "/nonexistent/root".into(),
            systemd_cgroup: false,
        },
        rootfs: vec![],
        cgroup: vec![],
        stdio: Io::default(),
        terminal: false,
        created_at: Timestamp::now(),
        exit,
        oom: false,
        oom_kills: None,
        restore: None,
        execs: vec![],
    }
}

fn write_record(socket: &Path, tasks: Vec<Task>) {
    let Seen::Present(boot_id) = Proc::new("/proc").boot_id() else {
        panic!("no boot id")
    };
    let record = Record {
        written_at: Timestamp::now(),
        boot_id,
        shim: Shim {
            version: "0.1.0".into(),
            process: Process {
                pid: 4_000_000,
                start_time: 1,
            },
            exe: BINARY.into(),
            containerd_address: GRPC.into(),
            namespace: "ns".into(),
            group_id: "group".into(),
            socket: socket.to_str().unwrap().into(),
            api_versions: vec![2, 3],
        },
        tasks,
        context: Context::default(),
        running: vec![],
        descriptors: vec![],
        unanswered: vec![],
        strays: vec![],
    };
    record::store::Store::new(&Beside::of(socket).record)
        .write(&record)
        .unwrap();
}

/// A process to be ended, and what names it.
struct Victim(Child);

impl Victim {
    fn new() -> (Self, Process) {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = child.id();
        let Seen::Present(stat) = Proc::new("/proc").stat(i32::try_from(pid).unwrap()) else {
            panic!("no stat of {pid}");
        };
        let ProcessId { start_time, .. } = stat.id;
        (Self(child), Process { pid, start_time })
    }

    fn ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// ---- command line, -v, -info ----

#[test]
fn wrong_usage_is_one_line_and_a_status() {
    for (words, status, says) in [
        (
            &["-nonsense"][..],
            2,
            "flag provided but not defined: -nonsense",
        ),
        (
            &["-namespace", "ns", "-id", "c", "stop"],
            2,
            "unknown action",
        ),
        (&["-id", "c", "start"], 1, "shim namespace cannot be empty"),
        (
            &["-namespace", "a/b", "-id", "c", "delete"],
            1,
            "is not a containerd identifier",
        ),
        (
            &["-namespace", "ns", "-id", "c"],
            1,
            "descriptor 3 is not a listening unix socket",
        ),
    ] {
        assert_refused(&run(Path::new("/"), words, b""), status, says);
    }
}

#[test]
fn the_version_is_printed() {
    let output = run(Path::new("/"), &["-v"], b"");
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(text(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn info_answers_whatever_the_runtime_does() {
    let node = Node::new();
    let ask = |binary_name: &str| {
        let options = runc::Options {
            binary_name: binary_name.into(),
            ..Default::default()
        };
        let any = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.encode_to_vec(),
        };
        let output = run(Path::new("/"), &["-info"], &any.encode_to_vec());
        assert!(output.status.success() && output.stderr.is_empty());
        let info = RuntimeInfo::decode(output.stdout.as_slice()).unwrap();
        assert_eq!(info.options, Some(any));
        assert!(info.version.is_some());
        info.features
    };
    assert_eq!(ask("/nonexistent/runc"), None);
    let bundle = node.deserted("c", "c", "echo '{\"ociVersionMin\":\"1.0.0\"}'");
    let runtime = fs::read_to_string(bundle.join("runtime")).unwrap();
    let features = ask(&runtime).unwrap();
    assert_eq!(
        features.type_url,
        "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    );
    assert_eq!(features.value, b"{\"ociVersionMin\":\"1.0.0\"}\n");

    let garbage = run(Path::new("/"), &["-info"], &[0xff; 100]);
    assert!(
        RuntimeInfo::decode(garbage.stdout.as_slice())
            .unwrap()
            .options
            .is_none()
    );
}

// ---- start ----

#[test]
fn a_bundle_that_cannot_be_read_is_named_and_nothing_is_left() {
    let node = Node::new();
    let config = |name: &str| node.bundle(name).join("config.json");
    for name in ["missing", "folder", "link", "fifo"] {
        fs::create_dir(node.bundle(name)).unwrap();
    }
    fs::create_dir(config("folder")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", config("link")).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(config("fifo"))
            .status()
            .unwrap()
            .success()
    );
    node.make_bundle("broken", "{\"annotations\":");
    node.make_bundle(
        "strange",
        "{\"annotations\":{\"io.kubernetes.cri.sandbox-id\":[]}}",
    );
    for (name, says) in [
        ("missing", "config.json: no such file"),
        ("folder", "config.json: is not a regular file"),
        ("link", "config.json: is a symlink"),
        ("fifo", "config.json: is not a regular file"),
        ("broken", "config.json: EOF while parsing"),
        ("strange", "config.json: invalid type"),
    ] {
        let before = names(&node.bundle(name));
        let output = node.start(name, None);
        assert_refused(&output, 1, says);
        assert_eq!(names(&node.bundle(name)), before);
    }
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_shim_that_serves_the_group_is_joined_and_its_address_left_for_every_containerd() {
    let node = Node::new();
    let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
    let bundle = node.make_bundle("app", config);
    let socket = node.socket("pod");
    // It knows no such task, as a shim that has not been asked to create it.
    fake_shim(&socket, not_found());
    let output = node.start("app", None);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let address = format!("unix://{}", socket.display());
    assert_eq!(
        (text(&output.stdout), output.stderr),
        (address.clone(), vec![])
    );
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
    let bootstrap = fs::read_to_string(bundle.join("bootstrap.json")).unwrap();
    assert_eq!(
        bootstrap,
        format!(r#"{{"version":2,"address":"{address}","protocol":"ttrpc"}}"#)
    );
    assert_eq!(names(&bundle), ["address", "bootstrap.json", "config.json"]);
    assert_eq!(node.leftovers().len(), 1);
}

#[test]
fn a_stock_shim_that_has_only_version_3_is_answered_as_such() {
    let node = Node::new();
    let bundle = node.make_bundle("c", "{}");
    let socket = node.socket("c");
    fake_shim_of(&socket, |service| match service {
        "containerd.task.v3.Task" => pb::Response::default(),
        _ => refusal(code::UNIMPLEMENTED),
    });
    let output = node.start("c", None);
    let json = format!(
        r#"{{"version":3,"address":"unix://{}","protocol":"ttrpc"}}"#,
        socket.display()
    );
    assert_eq!(text(&output.stdout), json);
    assert_eq!(
        fs::read_to_string(bundle.join("bootstrap.json")).unwrap(),
        json
    );
}

#[test]
fn what_is_in_the_sockets_place_and_no_socket_is_not_removed() {
    let node = Node::new();
    let bundle = node.make_bundle("c", "{}");
    fs::write(node.socket("c"), "precious").unwrap();
    assert_refused(
        &node.start("c", None),
        1,
        "is in the way: it is not a socket",
    );
    assert_eq!(fs::read(node.socket("c")).unwrap(), b"precious");
    assert_eq!(
        (node.leftovers().len(), names(&bundle)),
        (1, vec!["config.json".to_owned()])
    );
}

#[test]
fn a_start_that_fails_late_takes_its_daemon_and_its_files_with_it() {
    let node = Node::new();
    let bundle = node.make_bundle("c", "{}");
    // A stale socket has to go too.
    drop(UnixListener::bind(node.socket("c")).unwrap());
    let options = runc::Options {
        shim_cgroup: "/no/such/group".into(),
        ..Default::default()
    };
    assert_refused(
        &node.start("c", Some(options)),
        1,
        "shim cgroup \"/no/such/group\" does not exist",
    );
    assert_eq!(
        (node.leftovers(), names(&bundle)),
        (vec![], vec!["config.json".to_owned()])
    );
    let ours = bundle.to_str().unwrap().to_owned();
    let running = fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.to_str() == Some(&ours))
    });
    assert!(!running, "a daemon is left");
}

#[test]
fn a_full_run_is_one_line_and_leaves_nothing() {
    let node = Node::new();
    let sockets = node.sockets();
    for (options, fill) in [("size=4k,nr_inodes=2", false), ("size=4k", true)] {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&sockets)
            .status();
        assert!(mount.is_ok_and(|status| status.success()));
        let id = if fill { "bytes" } else { "inodes" };
        let bundle = node.make_bundle(id, "{}");
        if fill {
            fs::write(sockets.join("ballast"), [0; 4096]).unwrap();
        } else {
            fs::write(sockets.join("ballast"), b"").unwrap();
        }
        let output = node.start(id, None);
        let left = node.leftovers();
        assert!(
            Command::new("umount")
                .arg(&sockets)
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
        let said = text(&output.stderr);
        assert!(
            said.matches('\n').count() == 1 && output.stdout.is_empty(),
            "{said}"
        );
        assert_eq!(
            (left, names(&bundle)),
            (vec!["ballast".into()], vec!["config.json".into()])
        );
    }
}

/// Who answers at `socket`.
fn shim_at(socket: &Path) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut client = ShimClient::connect(socket, "ns", deadline).unwrap();
    let response = client.connect_task("c").unwrap();
    assert_eq!(response.task_pid, 0);
    response.shim_pid
}

/// A daemon that ends with the test.
struct Daemon(u32);

impl Daemon {
    fn at(socket: &Path) -> Self {
        Self(shim_at(socket))
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0).unwrap()), signal).unwrap();
    }

    fn link(&self, name: &str) -> PathBuf {
        fs::read_link(format!("/proc/{}/{name}", self.0)).unwrap()
    }

    /// Ends it and waits until its socket refuses.
    fn end(self, socket: &Path) {
        drop(self);
        until(|| std::os::unix::net::UnixStream::connect(socket).is_err());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

#[track_caller]
fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "it never came to that");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn start_brings_up_a_daemon_of_its_own_session_with_nothing_of_ours() {
    let node = Node::new();
    let bundle = node.make_bundle(
        "c",
        r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#,
    );
    let output = node.start("c", None);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let socket = node.socket("g");
    let address = format!("unix://{}", socket.display());
    assert_eq!((text(&output.stdout), output.stderr), (address, vec![]));
    assert_eq!(
        fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let daemon = Daemon::at(&socket);
    assert_eq!(daemon.link("cwd"), bundle);
    let environment = fs::read(format!("/proc/{}/environ", daemon.0)).unwrap();
    let variables: Vec<_> = environment.split(|byte| *byte == 0).collect();
    assert!(variables.contains(&b"TTRPC_ADDRESS=/run/test/events.sock".as_slice()));
    for number in ["fd/0", "fd/1"] {
        assert_eq!(daemon.link(number), Path::new("/dev/null"));
    }
    let words = Proc::new("/proc").arguments(i32::try_from(daemon.0).unwrap());
    let expected = [
        BINARY,
        "-namespace",
        "ns",
        "-id",
        "c",
        "-address",
        GRPC,
        "-group=g",
    ];
    assert_eq!(words, Seen::Present(expected.map(str::to_owned).to_vec()));
    let session = nix::unistd::getsid(Some(Pid::from_raw(i32::try_from(daemon.0).unwrap())));
    assert_eq!(session.unwrap().as_raw(), i32::try_from(daemon.0).unwrap());
    let score = |pid: u32| -> i32 {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse().unwrap()
    };
    assert_eq!(score(daemon.0), (score(std::process::id()) + 1).min(1000));
    assert!(matches!(
        record::read(&Beside::of(&socket).record),
        Seen::Present(_)
    ));

    // The next of the group joins it; after its death the next replaces it.
    node.make_bundle(
        "d",
        r#"{"annotations":{"io.containerd.runc.v2.group":"g"}}"#,
    );
    assert_eq!(node.start("d", None).stdout, output.stdout);
    assert_eq!(shim_at(&socket), daemon.0);
    let before = daemon.0;
    daemon.end(&socket);
    assert_eq!(node.start("d", None).stdout, output.stdout);
    let next = Daemon::at(&socket);
    assert_ne!(next.0, before);
    next.end(&socket);
    deleted(&node.delete("d"));
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn the_daemon_is_in_the_cgroup_that_the_options_name() {
    let node = Node::new();
    node.make_bundle("c", "{}");
    let name = format!("recoverd-shims-{}", std::process::id());
    let root = Path::new("/sys/fs/cgroup");
    // One v1 hierarchy is enough; on v2 it is the only one.
    let parent = if root.join("pids").is_dir() {
        root.join("pids")
    } else {
        root.into()
    };
    let folder = parent.join(&name);
    fs::create_dir(&folder).unwrap();
    let options = runc::Options {
        shim_cgroup: format!("/{name}"),
        ..Default::default()
    };
    let output = node.start("c", Some(options));
    let members = fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    let started = output
        .status
        .success()
        .then(|| Daemon::at(&node.socket("c")));
    let pid = started.as_ref().map_or(0, |daemon| daemon.0);
    if let Some(daemon) = started {
        daemon.end(&node.socket("c"));
    }
    until(|| fs::remove_dir(&folder).is_ok());
    assert_eq!(members.trim(), pid.to_string(), "{}", text(&output.stderr));
}

#[test]
fn starts_of_one_group_at_once_bring_up_one_daemon() {
    let node = Node::new();
    let ids = ["a", "b", "c", "d", "e", "f"];
    let socket = node.socket("pod");
    for id in ids {
        let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        node.make_bundle(id, config);
    }
    for round in 0..5 {
        let outputs = thread::scope(|scope| {
            let starts: Vec<_> = ids.map(|id| scope.spawn(|| node.start(id, None))).into();
            starts
                .into_iter()
                .map(|start| start.join().unwrap())
                .collect::<Vec<_>>()
        });
        for output in &outputs {
            assert!(
                output.status.success(),
                "round {round}: {}",
                text(&output.stderr)
            );
            assert_eq!(text(&output.stdout), format!("unix://{}", socket.display()));
        }
        let ours = socket.to_str().unwrap();
        let table = fs::read_to_string("/proc/net/unix").unwrap();
        let listening = |line: &&str| line.ends_with(ours) && line.contains(" 00010000 ");
        assert_eq!(table.lines().filter(listening).count(), 1, "{table}");
        // The next round finds a stale socket.
        Daemon::at(&socket).end(&socket);
    }
}

#[test]
fn a_daemon_with_a_socket_of_its_own_takes_no_file_and_no_listener_away() {
    let node = Node::new();
    let serve = |path: &Path| {
        let socket = path.to_str().unwrap();
        let words = [
            "-namespace",
            "ns",
            "-address",
            GRPC,
            "-id",
            "c",
            "-socket",
            socket,
        ];
        run(node.dir.path(), &words, b"")
    };
    let file = node.sockets().join("file");
    fs::write(&file, "precious").unwrap();
    assert_eq!(serve(&file).status.code(), Some(1));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let socket = node.socket("c");
    fake_shim(&socket, not_found());
    assert_refused(&serve(&socket), 1, "another shim is responsible");
    let held = lock(&node.socket("held"));
    assert_refused(
        &serve(&node.socket("held")),
        1,
        "another shim is responsible",
    );
    drop(held);
    assert!(!Beside::of(&file).lock.exists() && !Beside::of(&socket).lock.exists());
}

#[test]
fn a_start_of_which_nobody_reads_the_answer_leaves_nothing() {
    let node = Node::new();
    let bundle = node.make_bundle("c", "{}");
    let (reads, writes) = std::io::pipe().unwrap();
    drop(reads);
    let mut child = Command::new(BINARY)
        .args(["-namespace", "ns", "-address", GRPC, "-id", "c", "start"])
        .current_dir(&bundle)
        .stdin(Stdio::piped())
        .stdout(writes)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(&node.params("c", None))
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(
        (node.leftovers(), names(&bundle)),
        (vec![], vec!["config.json".to_owned()])
    );
}

#[test]
fn a_stopped_shim_is_neither_joined_nor_replaced() {
    let node = Node::new();
    node.make_bundle("c", "{}");
    let socket = node.socket("c");
    assert!(node.start("c", None).status.success());
    let daemon = Daemon::at(&socket);
    daemon.signal(Signal::SIGSTOP);
    assert_refused(
        &node.start("c", None),
        1,
        "shim of group \"c\" is unresponsive",
    );
    daemon.signal(Signal::SIGCONT);
    assert!(node.start("c", None).status.success());
    assert_eq!(shim_at(&socket), daemon.0);
}

#[test]
fn a_stranger_that_does_not_answer_keeps_its_socket_while_it_lives() {
    let node = Node::new();
    node.make_bundle("c", "{}");
    let socket = node.socket("c");
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    // A stock shim that is slow: it listens, and has no lock.
    let listener = UnixListener::bind(&socket).unwrap();
    let before = fs::metadata(&socket).unwrap().ino();
    assert_refused(
        &node.start("c", None),
        1,
        "shim of group \"c\" is unresponsive",
    );
    assert_eq!(fs::metadata(&socket).unwrap().ino(), before);
    assert!(!Beside::of(&socket).lock.exists());
    drop(listener);
    assert!(node.start("c", None).status.success());
    let _daemon = Daemon::at(&socket);
}

// ---- delete ----

#[test]
fn delete_of_what_is_not_there_succeeds_with_the_stand_in_any_number_of_times() {
    let node = Node::new();
    for _ in 0..2 {
        let output = node.delete("gone");
        let response = deleted(&output);
        assert_eq!((response.pid, response.exit_status), (0, 137));
        assert!(response.exited_at.is_some());
        // Nor is containerd's log filled: this is what follows every normal deletion.
        assert_eq!(text(&output.stderr), "");
    }
    // A bundle of which everything is missing or unreadable.
    let bundle = node.bundle("empty");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("options.json"), "{").unwrap();
    fs::write(bundle.join("address"), "unix:///etc/passwd").unwrap();
    assert_eq!(deleted(&node.delete("empty")).exit_status, 137);
}

#[test]
fn delete_refuses_a_bundle_of_another_name() {
    let words = [
        "-namespace",
        "ns",
        "-address",
        GRPC,
        "-id",
        "a",
        "-bundle",
        "/tmp/b",
        "delete",
    ];
    assert_refused(
        &run(Path::new("/"), &words, b""),
        1,
        "bundle /tmp/b is not of task a",
    );
}

#[test]
fn delete_answers_the_recorded_exit_and_removes_the_group_with_its_last_task() {
    let node = Node::new();
    node.deserted("c", "c", DELETES);
    let socket = node.socket("c");
    drop(UnixListener::bind(&socket).unwrap());
    let at = Timestamp {
        seconds: 1_700_000_000,
        nanos: 5,
    };
    let exit = Exit::Observed {
        status: 42,
        at,
        oom: false,
    };
    let init = Process {
        pid: 4_000_000,
        start_time: 9,
    };
    write_record(&socket, vec![recorded("c", Some(init), Some(exit))]);
    fs::write(Beside::of(&socket).events, "x").unwrap();
    let output = node.delete("c");
    let response = deleted(&output);
    assert_eq!((response.pid, response.exit_status), (4_000_000, 42));
    assert_eq!(response.exited_at.unwrap().seconds, 1_700_000_000);
    assert_eq!(
        (text(&output.stderr).as_str(), node.leftovers()),
        ("", vec![])
    );
    assert_eq!(deleted(&node.delete("c")).exit_status, 137);
}

#[test]
fn what_a_dead_shim_had_not_told_is_told_after_its_delete() {
    let node = Node::new();
    node.deserted("c", "c", DELETES);
    let socket = node.socket("c");
    drop(UnixListener::bind(&socket).unwrap());
    write_record(&socket, vec![recorded("c", None, None)]);
    let events = Beside::of(&socket).events;
    let unsent = [
        b"rcvd-ev1",
        &logged(1, b"first")[..],
        &logged(2, b"second"),
        &[0; 8],
    ];
    fs::write(&events, unsent.concat()).unwrap();
    // containerd is away; it runs `delete` before it listens, and older ones run it twice.
    let address = node.dir.path().join("events");
    let delete = || node.delete_as(Command::new(BINARY).env("TTRPC_ADDRESS", &address), "c");
    thread::scope(|scope| {
        for one in [scope.spawn(delete), scope.spawn(delete)] {
            assert!(one.join().unwrap().status.success());
        }
    });
    deleted(&delete());
    let name = events.file_name().unwrap().to_str().unwrap();
    until(|| node.leftovers() == [name]);
    let listener = UnixListener::bind(&address).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    for expected in [&b"first"[..], b"second"] {
        let mut header = [0; HEADER];
        peer.read_exact(&mut header).unwrap();
        let request = Header::parse(&header).unwrap();
        let mut body = vec![0; request.length as usize];
        peer.read_exact(&mut body).unwrap();
        let asked = pb::Request::decode(body.as_slice()).unwrap();
        assert_eq!(
            (asked.method.as_str(), &asked.payload[..]),
            ("Forward", expected)
        );
        let header = Header {
            length: 0,
            kind: Kind::Response,
            ..request
        };
        peer.write_all(&header.bytes()).unwrap();
    }
    // By one process, which leaves, and nothing of it stays.
    assert_eq!(peer.read(&mut [0; 9]).unwrap(), 0);
    until(|| node.leftovers() == [""; 0]);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "a second one told it too");
}

#[test]
fn delete_ends_a_living_init_and_never_the_owner_of_a_reused_pid() {
    let node = Node::new();
    for (id, reused) in [("living", false), ("reused", true)] {
        let (mut victim, mut init) = Victim::new();
        init.start_time += u64::from(reused);
        node.make_bundle(id, "{}");
        let socket = node.socket(id);
        fs::write(
            node.bundle(id).join("address"),
            format!("unix://{}", socket.display()),
        )
        .unwrap();
        write_record(&socket, vec![recorded(id, Some(init), None)]);
        let response = deleted(&node.delete(id));
        assert_eq!((response.pid, response.exit_status), (init.pid, 137));
        assert_eq!(victim.ended(), !reused, "{id}");
    }
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn delete_ends_what_holds_an_output_of_its_task_or_of_what_was_deleted_before() {
    let node = Node::new();
    let (mut own, of_task) = Victim::new();
    let (mut stray, of_exec) = Victim::new();
    let (mut stranger, mut reused) = Victim::new();
    reused.start_time += 1;
    let socket = node.socket("c");
    node.deserted("c", "c", DELETES);
    let mut task = recorded("c", None, None);
    task.stdio.holders = vec![of_task];
    write_record(&socket, vec![task]);
    let Seen::Present(mut record) = record::read(&Beside::of(&socket).record) else {
        panic!("{:?}", node.leftovers());
    };
    record.strays = vec![reused, of_exec];
    record::store::Store::new(&Beside::of(&socket).record)
        .write(&record)
        .unwrap();
    deleted(&node.delete("c"));
    until(|| own.ended() && stray.ended());
    assert!(!stranger.ended());
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn delete_empties_the_cgroup_that_the_record_names_when_the_init_and_the_runtime_are_gone() {
    let node = Node::new();
    let root = Path::new("/sys/fs/cgroup");
    // As the kernel says it in /proc/<init>/cgroup, which the record keeps.
    let (controller, parent) = if root.join("pids").is_dir() {
        ("9:pids", root.join("pids"))
    } else {
        ("0:", root.to_owned())
    };
    let name = format!("recoverd-delete-{}", std::process::id());
    let outer = parent.join(&name);
    let folder = outer.join("c");
    fs::create_dir_all(&folder).unwrap();
    let (mut victim, process) = Victim::new();
    fs::write(folder.join("cgroup.procs"), process.pid.to_string()).unwrap();
    node.deserted("c", "c", "exit 1");
    fs::remove_dir(node.dir.path().join("runtime/ns/c")).unwrap();
    let gone = Process {
        pid: process.pid,
        start_time: process.start_time + 1,
    };
    let mut task = recorded("c", Some(gone), None);
    task.cgroup = vec![format!("{controller}:/{name}/c")];
    write_record(&node.socket("c"), vec![task]);
    deleted(&node.delete("c"));
    // Reaped, or it stays a member of its group.
    let ended = victim.ended();
    drop(victim);
    until(|| !folder.exists() || fs::remove_dir(&folder).is_ok());
    let _ = fs::remove_dir(&outer);
    assert!(ended);
}

#[test]
fn delete_takes_a_shim_that_does_not_answer_for_dead_and_leaves_its_files_to_it() {
    let node = Node::new();
    node.deserted("c", "c", DELETES);
    let socket = node.socket("c");
    let (mut victim, init) = Victim::new();
    write_record(&socket, vec![recorded("c", Some(init), None)]);
    // Listens, holds the lock, and never accepts: as under SIGSTOP.
    let _listener = UnixListener::bind(&socket).unwrap();
    let _held = lock(&socket);
    let before = node.leftovers();
    let started = Instant::now();
    let response = deleted(&node.delete("c"));
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    assert_eq!((response.pid, response.exit_status), (init.pid, 137));
    assert!(victim.ended());
    assert_eq!(node.leftovers(), before);
}

#[test]
fn delete_asks_the_kernel_for_the_status_of_an_init_that_nobody_has_reaped() {
    let node = Node::new();
    node.make_bundle("c", "{}");
    let socket = node.socket("c");
    let address = format!("unix://{}", socket.display());
    fs::write(node.bundle("c").join("address"), address).unwrap();
    let mut child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
    let stat = || {
        Proc::new("/proc")
            .stat(i32::try_from(child.id()).unwrap())
            .present()
            .cloned()
    };
    until(|| stat().is_some_and(|stat| !stat.alive()));
    let init = Process {
        pid: child.id(),
        start_time: stat().unwrap().id.start_time,
    };
    write_record(&socket, vec![recorded("c", Some(init), None)]);
    let output = node.delete("c");
    let response = deleted(&output);
    child.wait().unwrap();
    assert_eq!(
        (response.exit_status, text(&output.stderr).as_str()),
        (7, "")
    );
}

#[test]
fn delete_touches_nothing_that_a_living_shim_claims() {
    let node = Node::new();
    let bundle = node.deserted("c", "c", "touch \"$0.was-run\"");
    let socket = node.socket("c");
    fake_shim(
        &socket,
        pb::Response {
            status: None,
            payload: vec![],
        },
    );
    let held = lock(&socket);
    let (mut victim, init) = Victim::new();
    write_record(&socket, vec![recorded("c", Some(init), None)]);
    let before = (node.leftovers(), names(&bundle));
    let output = node.delete("c");
    assert!(output.status.success() && output.stdout.is_empty());
    assert_eq!((node.leftovers(), names(&bundle)), before);
    assert!(!victim.ended());
    assert!(!node.dir.path().join("runtime-c.was-run").exists());
    drop(held);
}

#[test]
fn delete_cleans_up_for_a_living_shim_that_has_forgotten_the_task() {
    let node = Node::new();
    node.deserted("app", "pod", DELETES);
    let socket = node.socket("pod");
    fake_shim(&socket, not_found());
    let _held = lock(&socket);
    write_record(&socket, vec![recorded("other", None, None)]);
    let before = node.leftovers();
    deleted(&node.delete("app"));
    assert!(!node.dir.path().join("runtime/ns/app").exists());
    assert_eq!(node.leftovers(), before);
}

#[test]
fn delete_of_one_of_a_dead_shims_tasks_keeps_the_record_of_the_others() {
    let node = Node::new();
    let socket = node.socket("pod");
    let exit = |status| {
        Some(Exit::Observed {
            status,
            at: Timestamp::now(),
            oom: false,
        })
    };
    write_record(
        &socket,
        vec![recorded("a", None, exit(3)), recorded("b", None, exit(4))],
    );
    for id in ["a", "b"] {
        node.deserted(id, "pod", DELETES);
    }
    // The record's runtime does not exist, which is no reason to stop.
    assert_eq!(deleted(&node.delete("a")).exit_status, 3);
    let Seen::Present(record) = record::read(&Beside::of(&socket).record) else {
        panic!("{:?}", node.leftovers());
    };
    assert_eq!(
        record
            .tasks
            .iter()
            .map(|t| t.id.as_str())
            .collect::<Vec<_>>(),
        ["b"]
    );
    assert_eq!(deleted(&node.delete("b")).exit_status, 4);
    assert_eq!(node.leftovers(), [""; 0]);
}

#[test]
fn a_runtime_that_hangs_does_not_hold_delete_or_its_pipes() {
    let node = Node::new();
    node.deserted("c", "c", "sleep 30 & sleep 30");
    let started = Instant::now();
    let output = node.delete("c");
    // wait_with_output has seen the end of both pipes.
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(deleted(&output).exit_status, 137);
    assert!(text(&output.stderr).contains("delete --force: did not end in time"));
}

#[test]
fn why_the_runtime_failed_is_said_and_it_works_in_the_bundle() {
    let fails = "pwd > where; echo '{\"level\":\"error\",\"msg\":\"it is written\"}' >> \"$4\"";
    for (script, says) in [
        (
            format!("{fails}; exit 3"),
            "delete --force: ended with status 3: it is written",
        ),
        (
            fails.to_owned(),
            "delete --force left its state: it is written",
        ),
        ("exit 3".to_owned(), "delete --force: ended with status 3\n"),
    ] {
        let node = Node::new();
        let bundle = node.deserted("c", "c", &script);
        let older = r#"{"level":"error","msg":"of an earlier command"}"#;
        fs::write(bundle.join("log.json"), format!("{older}\n")).unwrap();
        let output = node.delete("c");
        deleted(&output);
        let said = text(&output.stderr);
        assert!(said.contains(says), "{said}");
        if let Ok(place) = fs::read_to_string(bundle.join("where")) {
            assert_eq!(Path::new(place.trim()), bundle);
        }
    }
}

#[test]
fn without_a_place_for_its_log_the_runtime_deletes_all_the_same() {
    type Change = fn(&Path);
    let changes: [Change; 2] = [
        |log| std::os::unix::fs::symlink("/dev/full", log).unwrap(),
        |log| nix::unistd::mkfifo(log, nix::sys::stat::Mode::S_IRWXU).unwrap(),
    ];
    for change in changes {
        let node = Node::new();
        let script = format!("echo \"$3\" > \"$2/third\"; {DELETES}");
        let bundle = node.deserted("c", "c", &script);
        change(&bundle.join("log.json"));
        deleted(&node.delete("c"));
        let root = node.dir.path().join("runtime/ns");
        assert_eq!(names(&root), ["third"]);
        assert_eq!(fs::read_to_string(root.join("third")).unwrap(), "delete\n");
    }
}

#[test]
fn delete_unmounts_the_root_file_system_below_a_link_too() {
    for linked in [false, true] {
        let node = Node::new();
        let bundle = node.deserted("c", "c", DELETES);
        if linked {
            let elsewhere = node.dir.path().join("elsewhere");
            fs::rename(&bundle, &elsewhere).unwrap();
            std::os::unix::fs::symlink(&elsewhere, &bundle).unwrap();
        }
        let rootfs = fs::canonicalize(&bundle).unwrap().join("rootfs");
        fs::create_dir(&rootfs).unwrap();
        let mount = |to: &Path| {
            Command::new("mount")
                .args(["-t", "tmpfs", "tmpfs"])
                .arg(to)
                .status()
        };
        assert!(mount(&rootfs).unwrap().success());
        fs::create_dir(rootfs.join("below")).unwrap();
        assert!(mount(&rootfs.join("below")).unwrap().success());
        deleted(&node.delete("c"));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left = mounts.contains(rootfs.to_str().unwrap());
        // Nothing is left behind when it fails either.
        for point in [rootfs.join("below"), rootfs.clone()] {
            let _ = nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH);
        }
        assert!(!left, "linked: {linked}: {mounts}");
    }
}

#[test]
fn delete_leaves_a_container_of_the_same_id_and_another_bundle_alone() {
    for (whose, ours) in [("other", false), ("link", true)] {
        let node = Node::new();
        // It says by this file that it was called.
        let bundle = node.deserted("c", "c", &format!("touch \"$2/called\"; {DELETES}"));
        let (mut victim, init) = Victim::new();
        let its_bundle = node.dir.path().join(whose);
        if ours {
            std::os::unix::fs::symlink(&bundle, &its_bundle).unwrap();
        } else {
            fs::create_dir(&its_bundle).unwrap();
        }
        let root = node.dir.path().join("runtime/ns");
        let state = format!(
            r#"{{"init_process_pid":{},"init_process_start":{},"config":{{"labels":["bundle={}"]}}}}"#,
            init.pid,
            init.start_time,
            its_bundle.display()
        );
        fs::write(root.join("c/state.json"), state).unwrap();
        let output = node.delete("c");
        assert_eq!(deleted(&output).exit_status, 137);
        assert_eq!(victim.ended(), ours, "{whose}");
        assert_eq!(root.join("called").exists(), ours, "{whose}");
        assert_eq!(
            text(&output.stderr).contains("is of bundle"),
            !ours,
            "{whose}: {}",
            text(&output.stderr)
        );
    }
}
