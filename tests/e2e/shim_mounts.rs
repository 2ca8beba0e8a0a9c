//! Root file systems that are neither folders nor overlays: image files on loop devices, and types
//! that a helper mounts; with the stock shim and ours.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use recoverd_tests::{
    Code, Fifos, LoopDevice, Node, Release, ShimUnderTest, Stdio, Traces, assert_refused, oci_spec,
    wait_for,
};
use serde_json::{Value, json};

recoverd_tests::tests! {
    with_loop_devices: [an_image_file_is_mounted_and_its_device_goes_with_it],
    once_with_each_shim: [a_helper_mounts_what_is_its],
}

/// On what is mounted in its bundle.
fn spec(id: &str, line: &str) -> Value {
    let mut spec = oci_spec(id, &["sh", "-c", line]);
    spec["root"]["path"] = json!("rootfs");
    spec
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        r#type: kind.into(),
        source: source.display().to_string(),
        target: String::new(),
        options: options.iter().map(|word| (*word).to_owned()).collect(),
    }
}

/// An ext4 image with the usual root file system.
fn image(node: &Node) -> PathBuf {
    let path = node.folder().join("image");
    let (image, rootfs) = (path.display(), Release::rootfs());
    node.shell(&format!(
        "truncate -s 32M {image}; mkfs.ext4 -q -d {} {image}",
        rootfs.display()
    ));
    path
}

fn wait_no_device(image: &Path) {
    wait_for("the loop device to go", || {
        LoopDevice::all_of(image).is_empty().then_some(())
    });
}

/// As the snapshotter `blockfile` has it, whose own options are `loop`.
fn an_image_file_is_mounted_and_its_device_goes_with_it(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let containerd = node.containerd(release);
    let api = containerd.api("e2e");
    let image = image(&node);
    let before = Traces::of(&node);
    let line = "touch /made 2>/dev/null && echo writes; ls /made; read end";
    for (id, options, said, read_only) in [
        ("writes", ["loop", "rw"], "writes\n/made\n", false),
        ("reads", ["ro", "loop"], "/made\n", true),
    ] {
        let fifos = Fifos::make(&node, id);
        let stdout = fifos.stdout();
        let _stderr = fifos.stderr();
        api.container(id, &spec(id, line), shim, None);
        api.create_on(id, &fifos.stdio, vec![mount("ext4", &image, &options)])
            .unwrap();
        api.start(id, "").unwrap();
        let stdin = fifos.stdin();
        stdout.wait_text(said);
        let devices = LoopDevice::all_of(&image);
        let kinds: Vec<bool> = devices.iter().map(|device| device.read_only).collect();
        assert_eq!(kinds, [read_only], "{id}: {devices:?}");
        drop(stdin);
        api.close_stdin(id, "").unwrap();
        api.status(id, "");
        api.delete(id, "").unwrap();
        assert_eq!(stdout.wait_end(), said);
        wait_no_device(&image);
    }
    // What cannot be mounted leaves no device either.
    api.container("no", &spec("no", line), shim, None);
    let wrong = vec![mount("vfat", &image, &["loop"])];
    let refused = api.create_on("no", &Stdio::default(), wrong);
    assert_refused(refused, Code::Unknown, "mount");
    wait_no_device(&image);
    let absent = vec![mount("ext4", Path::new("/nonexistent"), &["loop"])];
    let refused = api.create_on("no", &Stdio::default(), absent);
    assert_refused(refused, Code::Unknown, "/nonexistent");
    before.wait_restored(&node);
}

/// Tells how it was called, binds the folder that it is told to, and leaves a server.
const HELPER: &str = r#"#!/bin/sh
echo "$0 $*" >"${0%/*}/called"
[ "$1" != broken ] || { echo "cannot mount it" >&2; exit 3; }
mount --bind "${4#folder=}" "$2"
sleep 1000 </dev/null >/dev/null 2>&1 &
echo $! >"${0%/*}/server"
"#;

fn a_helper_mounts_what_is_its(release: &Release, shim: ShimUnderTest) {
    let node = Node::start();
    let mut containerd = node.containerd(release);
    let folder = node.folder().join("helpers");
    fs::create_dir(&folder).unwrap();
    for name in ["mount.fuse", "mount.fuse3"] {
        let helper = folder.join(name);
        fs::write(&helper, HELPER).unwrap();
        node.run("chmod", ["0755", &helper.display().to_string()]);
    }
    containerd.kill();
    containerd.programs_from(folder.clone());
    containerd.start();
    let api = containerd.api("e2e");
    let before = Traces::of(&node);
    let called = || fs::read_to_string(folder.join("called")).unwrap();
    let from = format!("folder={}", Release::rootfs().display());
    for helper in ["fuse", "fuse3"] {
        api.container(helper, &spec(helper, "exit 7"), shim, None);
        let kind = format!("{helper}.folders");
        let wanted = mount(&kind, Path::new("overlay"), &[&from, "ro"]);
        api.create_on(helper, &Stdio::default(), vec![wanted])
            .unwrap();
        api.start(helper, "").unwrap();
        assert_eq!(api.status(helper, ""), 7, "{helper}");
        let rootfs = containerd
            .state()
            .join(format!("io.containerd.runtime.v2.task/e2e/{helper}/rootfs"));
        assert_eq!(
            called(),
            format!(
                "{}/mount.{helper} overlay {} -o {from} -o ro -t folders\n",
                folder.display(),
                rootfs.display()
            )
        );
        let server = fs::read_to_string(folder.join("server")).unwrap();
        node.run("kill", [server.trim()]);
        api.delete(helper, "").unwrap();
    }
    api.container("no", &spec("no", "true"), shim, None);
    let wanted = mount("fuse.folders", Path::new("broken"), &[&from]);
    let refused = api.create_on("no", &Stdio::default(), vec![wanted]);
    assert_refused(refused, Code::Unknown, "cannot mount it");
    before.wait_restored(&node);
}
