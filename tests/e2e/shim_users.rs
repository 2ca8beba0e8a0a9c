//! Users of their own: mapped roots, and who may open a stdio again, with the stock shim and ours.

use std::fs;
use std::path::Path;
use std::process::Stdio as Pipe;

use containerd_client::types::Mount;
use prost::Message;
use recoverd_common::pb::{info::RuntimeInfo, runc};
use recoverd_tests::{
    Code, Container, Fifos, Node, Release, ShimUnderTest, Stdio, Traces, assert_refused,
    oci_process, oci_spec, runc_options, wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    once_with_each_shim: [
        a_mapped_root_opens_its_stdio_again,
        a_user_opens_a_log_file_again,
        a_mapped_root_runs_on_a_mounted_image,
        an_image_is_mapped_to_its_root_and_not_changed,
        a_folder_is_mapped_to_its_root_and_not_changed,
        mounts_are_not_mapped_by_a_runtime_that_cannot,
    ],
    with_newer_runc: [
        mounts_are_mapped_by_a_runtime_that_can,
    ],
}

/// Root of the container is this user of the node.
const MAPPED: u32 = 100_000;

/// Opens its own output three times.
const SPEAKER: [&str; 3] = [
    "sh",
    "-c",
    "echo one >/dev/stdout && echo two >>/proc/self/fd/1 && echo three >/dev/stderr && id -u",
];

/// With a user namespace, on a root file system that the mapped root can reach.
fn mapped_spec(node: &Node, id: &str, args: &[&str]) -> Value {
    let rootfs = node.folder().join("rootfs");
    if !rootfs.exists() {
        let (from, to) = (Release::rootfs(), rootfs.display().to_string());
        node.run("cp", ["-a", &from.display().to_string(), &to]);
    }
    let mut spec = oci_spec(id, args);
    spec["root"]["path"] = json!(rootfs);
    let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
    all.push(json!({"type": "user"}));
    for mapping in ["uidMappings", "gidMappings"] {
        spec["linux"][mapping] = mapping_of_root();
    }
    spec
}

fn mapping_of_root() -> Value {
    json!([{"containerID": 0, "hostID": MAPPED, "size": 65536}])
}

fn owned() -> runc::Options {
    runc::Options {
        io_uid: MAPPED,
        io_gid: MAPPED,
        ..runc::Options::default()
    }
}

fn file(path: &Path) -> Stdio {
    let uri = format!("file://{}", path.display());
    Stdio {
        stdout: uri.clone(),
        stderr: uri,
        ..Stdio::default()
    }
}

/// The stock shim carries the two streams apart.
fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

fn a_mapped_root_opens_its_stdio_again(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let run = |id: &str, stdio: &Stdio| {
        api.container(id, &mapped_spec(&node, id, &SPEAKER), shim, Some(&owned()));
        let pid = api.create(id, stdio).unwrap();
        let map = node.run("cat", [format!("/proc/{pid}/uid_map")]);
        let map: Vec<&str> = map.split_whitespace().collect();
        assert_eq!(map, ["0", "100000", "65536"]);
        api.start(id, "").unwrap();
        let status = api.status(id, "");
        api.delete(id, "").unwrap();
        status
    };
    let fifos = Fifos::make(&node, "fifo");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    assert_eq!(run("fifo", &fifos.stdio), 0);
    assert_eq!(stdout.wait_end(), "one\ntwo\n0\n");
    assert_eq!(stderr.wait_end(), "three\n");

    let log = node.folder().join("speaker.out");
    assert_eq!(run("file", &file(&log)), 0);
    let text = || fs::read_to_string(&log).unwrap_or_default();
    wait_for("every line", || (text().lines().count() == 4).then_some(()));
    assert_eq!(sorted(&text()), ["0", "one", "three", "two"]);
    assert_eq!(run("none", &Stdio::default()), 0);

    // An exec, and stdin, which is owned likewise.
    let args = ["sleep", "1000"];
    api.container(
        "host",
        &mapped_spec(&node, "host", &args),
        shim,
        Some(&owned()),
    );
    api.create("host", &Stdio::default()).unwrap();
    api.start("host", "").unwrap();
    let fifos = Fifos::make(&node, "exec");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    let process = oci_process(&["sh", "-c", &format!("cat </dev/stdin; {}", SPEAKER[2])]);
    api.run_exec("host", "e", &process, &fifos.stdio);
    let mut stdin = fifos.stdin();
    stdin.write("in\n");
    drop(stdin);
    api.close_stdin("host", "e").unwrap();
    assert_eq!(api.status("host", "e"), 0);
    api.delete("host", "e").unwrap();
    assert_eq!(stdout.wait_end(), "in\none\ntwo\n0\n");
    assert_eq!(stderr.wait_end(), "three\n");
    api.end("host");
}

fn a_user_opens_a_log_file_again(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let log = node.folder().join("speaker.out");
    for (id, stdio) in [("file", file(&log)), ("none", Stdio::default())] {
        let mut spec = oci_spec(id, &SPEAKER);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        api.run(id, &spec, shim, &stdio);
        let expected = u32::from(id == "none" && !null_is_writable(&node));
        assert_eq!(api.status(id, ""), expected, "{id}");
        api.delete(id, "").unwrap();
    }
    let text = || fs::read_to_string(&log).unwrap_or_default();
    wait_for("every line", || (text().lines().count() == 4).then_some(()));
    assert_eq!(sorted(&text()), ["1000", "one", "three", "two"]);
}

/// `/dev/null` is everybody's everywhere; a node where it is not would fail for its own reasons.
fn null_is_writable(node: &Node) -> bool {
    node.run("stat", ["-c", "%a", "/dev/null"]).trim() == "666"
}

/// The shim mounts the image below a bundle that only the mapped group may pass.
fn a_mapped_root_runs_on_a_mounted_image(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let mapping = format!("0:{MAPPED}:65536");
    let container = Container::new("c")
        .image()
        .shim(shim)
        .option(&["--uidmap", &mapping, "--gidmap", &mapping])
        .command(["sh", "-c", "id -u; touch /made; exec sleep 1000"]);
    let task = containerd.run(&container);
    let mode = node.run(
        "stat",
        ["-c", "%a %u %g", &task.bundle().display().to_string()],
    );
    assert_eq!(mode.trim(), format!("710 0 {MAPPED}"));
    let made = task.bundle().join("rootfs/made");
    let owner = wait_for("a file of the container", || {
        let found = node.output("stat", ["-c", "%u", &made.display().to_string()]);
        found
            .status
            .success()
            .then(|| String::from_utf8_lossy(&found.stdout).into_owned())
    });
    assert_eq!(owner.trim(), MAPPED.to_string());
    let mut exec = containerd.exec_attached(&task, "e", &["sh", "-c", "echo hi >/dev/stdout"]);
    let said = (exec.wait().success(), exec.text());
    assert_eq!(said, (true, "hi\n".to_owned()));
    containerd.remove(&task);
}

/// Where its kernel can, containerd has the shim map the ids of an image's layers.
fn an_image_is_mapped_to_its_root_and_not_changed(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    containerd.import_image("e2e");
    let before = Traces::of(&node);
    let mapping = format!("0:{MAPPED}:65536");
    let maps = ["--uidmap", &mapping, "--gidmap", &mapping, "--remap-labels"];
    let container = Container::new("c")
        .image()
        .shim(shim)
        .option(&maps)
        .command(["sh", "-c", "touch /made; exec sleep 1000"]);
    let task = containerd.run(&container);
    let made = task.bundle().join("rootfs/made");
    wait_for("a file of the container", || made_on(&node, &made));
    let words = ["stat", "-c", "%u %g", "/bin/busybox", "/made"];
    let mut exec = containerd.exec_attached(&task, "e", &words);
    let said = (exec.wait().success(), exec.text());
    assert_eq!(said, (true, "0 0\n0 0\n".to_owned()));
    // On disk the image is as it was, and what the container makes is its root's.
    let layers = containerd
        .root()
        .join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let owners = |file: &str| {
        let files = format!("{}/*/fs/{file}", layers.display());
        let owners = node.shell(&format!("stat -c '%u %g' {files}"));
        owners.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(owners("bin/busybox"), ["0 0"]);
    assert_eq!(owners("made"), [format!("{MAPPED} {MAPPED}")]);
    // One mount more than before, and that one goes.
    let mounts = before.new_since(&node);
    let mounts = mounts.iter().filter(|trace| trace.starts_with("mount "));
    let rootfs = task.bundle().join("rootfs");
    assert_eq!(
        mounts.collect::<Vec<_>>(),
        [&format!("mount {}", rootfs.display())]
    );
    containerd.remove(&task);
    before.wait_restored(&node);
}

fn made_on(node: &Node, path: &Path) -> Option<()> {
    let there = node.output("test", ["-e".as_ref(), path.as_os_str()]);
    there.status.success().then_some(())
}

/// The same for what is no overlay.
fn a_folder_is_mapped_to_its_root_and_not_changed(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let before = Traces::of(&node);
    let fifos = Fifos::make(&node, "c");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    let image = node.folder().join("image").display().to_string();
    let from = Release::rootfs().display().to_string();
    node.run("cp", ["-a", &from, &image]);
    let mut spec = mapped_spec(&node, "c", &["stat", "-c", "%u", "/bin/busybox"]);
    spec["root"]["path"] = json!("rootfs");
    api.container("c", &spec, shim, Some(&owned()));
    let ids = format!("0:{MAPPED}:65536");
    let mount = |options: &[&str]| Mount {
        r#type: "bind".into(),
        source: image.clone(),
        target: String::new(),
        options: options.iter().map(|word| (*word).to_owned()).collect(),
    };
    let (uids, gids) = (format!("uidmap={ids}"), format!("gidmap={ids}"));
    api.create_on(
        "c",
        &fifos.stdio,
        vec![mount(&["rbind", "rw", &uids, &gids])],
    )
    .unwrap();
    api.start("c", "").unwrap();
    assert_eq!(api.status("c", ""), 0);
    api.delete("c", "").unwrap();
    assert_eq!(
        (stdout.wait_end(), stderr.wait_end()),
        ("0\n".into(), String::new())
    );
    let owner = node.run("stat", ["-c", "%u", &format!("{image}/bin/busybox")]);
    assert_eq!(owner.trim(), "0");

    if shim == ShimUnderTest::Recoverd {
        // Half a mapping is none; the stock shim does without a word what nobody meant.
        api.container("half", &spec, shim, Some(&owned()));
        let half = vec![mount(&["rbind", "rw", &uids])];
        assert_refused(
            api.create_on("half", &Stdio::default(), half),
            Code::Unknown,
            "only uids and gids together can be mapped",
        );
    }
    before.wait_restored(&node);
}

/// What `-info` says of the runtime that is found first in `path`: can it map a mount's ids?
#[track_caller]
fn says_idmap(node: &Node, release: &Release, shim: ShimUnderTest, path: &str) -> bool {
    let program = match shim {
        ShimUnderTest::Stock => release.stock_shim(),
        ShimUnderTest::Recoverd => shim.runtime(),
    };
    let mut command = node.command("env", [format!("PATH={path}")]);
    command
        .arg(program)
        .arg("-info")
        .stdin(Pipe::piped())
        .stdout(Pipe::piped());
    let mut child = command.spawn().unwrap();
    let options = runc_options(&runc::Options::default()).encode_to_vec();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &options).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let info = RuntimeInfo::decode(output.stdout.as_slice()).unwrap();
    let features: Value = match info.features {
        Some(features) => serde_json::from_slice(&features.value).unwrap(),
        None => Value::Null,
    };
    features["linux"]["mountExtensions"]["idmap"]["enabled"].as_bool() == Some(true)
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A container whose mount of a folder of root's is mapped to its own root.
fn with_mapped_mount(node: &Node) -> Value {
    node.shell("mkdir -p /run/shared && echo text >/run/shared/file");
    let mut spec = mapped_spec(node, "c", &["stat", "-c", "%u", "/mnt/file"]);
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/mnt", "type": "bind", "source": "/run/shared", "options": ["bind", "rw"],
        "uidMappings": mapping_of_root(), "gidMappings": mapping_of_root(),
    }));
    spec
}

fn mounts_are_not_mapped_by_a_runtime_that_cannot(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    // Of a machine with a newer one there is nothing to say here.
    let version = node.run("runc", ["--version"]);
    assert!(
        !version.contains("runc version 1.0"),
        "no `features` before 1.1: {version}"
    );
    let can = says_idmap(&node, release, shim, PATH);
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    api.container("c", &with_mapped_mount(&node), shim, Some(&owned()));
    if can {
        api.create("c", &Stdio::default()).unwrap();
        api.end("c");
    } else {
        assert_refused(api.create("c", &Stdio::default()), Code::Unknown, "idmap");
    }
}

fn mounts_are_mapped_by_a_runtime_that_can(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd_with(release, &["runc"]);
    let path = format!("{}:{PATH}", node.folder().join("newer").display());
    assert!(says_idmap(&node, release, shim, &path));
    let api = containerd.api("e2e");
    let fifos = Fifos::make(&node, "c");
    let (stdout, stderr) = (fifos.stdout(), fifos.stderr());
    api.container("c", &with_mapped_mount(&node), shim, Some(&owned()));
    api.create("c", &fifos.stdio).unwrap();
    api.start("c", "").unwrap();
    let status = api.status("c", "");
    api.delete("c", "").unwrap();
    assert_eq!((status, stderr.wait_end()), (0, String::new()));
    assert_eq!(stdout.wait_end(), "0\n");
}
