//! Who makes a checkpoint dies, or the shim that restores one; containerd with them.

use recoverd_common::pb::runc::CheckpointOptions;
use recoverd_tests::{Armed, Status, Stdio, oci_spec, wait_for};

use crate::crash::start_again;
use crate::ground::Ground;

/// Ends with 23 when it is asked to.
const LINE: &str = "trap 'exit 23' TERM; while :; do sleep 0.02; done";

/// A task outlives its checkpoint, ends with a second one, and is restored from that.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    ground.kill();
    ground.start(Some(armed));
    armed.and(&ground.containerd.process());
    let id = ground.round();
    let shim = ground.built.shim();
    let spec = oci_spec(&id, &["sh", "-c", LINE]);
    let nothing = Stdio::default();
    ground.api().container_on(&id, &spec, &shim, None);
    let created = ground.api().create(&id, &nothing);
    let pid = created.unwrap_or_else(|refused| panic!("create {id}: {refused:?}"));
    must(ground.api().start(&id, ""));
    let init = ground.node.process(pid);
    let init = init.unwrap_or_else(|| panic!("the init {pid} is not there"));

    let mut died = false;
    for exit in [false, true] {
        let images = |time: usize| ground_images(ground, &id, exit, time);
        let options = |time| CheckpointOptions {
            image_path: images(time),
            exit,
            ..CheckpointOptions::default()
        };
        let (first, second) = (options(1), options(2));
        let taken = ground.api().checkpoint(&id, &first);
        if came_back(ground, armed, &mut died) {
            assert_eq!(ground.api().phase(&id, ""), Status::Running);
            assert!(ground.node.alive(&init), "{init:?} has ended");
            must(ground.api().checkpoint(&id, &second));
        } else {
            must(taken);
        }
    }
    assert_eq!(ground.api().status(&id, ""), 137);
    must(ground.api().delete(&id, ""));

    let images = [2, 1].map(|time| ground_images(ground, &id, true, time));
    let images = images
        .iter()
        .find(|path| std::path::Path::new(path).exists());
    let images = images.unwrap_or_else(|| panic!("no images of {id}"));
    must(ground.api().create_from(&id, &nothing, images.as_ref()));
    let started = ground.api().start(&id, "");
    let pid = match came_back(ground, armed, &mut died) {
        false => must(started),
        true => match ground.api().phase(&id, "") {
            Status::Running => must(ground.api().state(&id, "")).pid,
            _ => must(ground.api().start(&id, "")),
        },
    };
    let init = ground.node.process(pid);
    let init = init.unwrap_or_else(|| panic!("the init {pid} is not there"));
    wait_for("a restored task to run", || {
        (ground.api().phase(&id, "") == Status::Running).then_some(())
    });
    ground.node.signal(&init, "TERM");
    assert_eq!(ground.api().status(&id, ""), 23);
    let ended = must(ground.api().delete(&id, ""));
    assert_eq!(ended.status, 23);
    ground.api().remove_container(&id);
    ground.assert_restored();
    died
}

/// Where the images of one try go.
fn ground_images(ground: &Ground, id: &str, exit: bool, time: usize) -> String {
    let name = format!("{id}-images-{exit}-{time}");
    ground.node.folder().join(name).display().to_string()
}

/// Somebody has just died: everything runs again when this returns.
#[track_caller]
fn came_back(ground: &mut Ground, armed: &Armed, died: &mut bool) -> bool {
    if *died || !armed.was_hit(&ground.node) {
        return false;
    }
    *died = true;
    ground.wait_ended();
    start_again(ground, true, || ());
    true
}

#[track_caller]
fn must<T>(answer: Result<T, recoverd_tests::Refused>) -> T {
    answer.unwrap_or_else(|refused| panic!("{refused:?}"))
}
