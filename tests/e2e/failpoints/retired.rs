//! A shim that has left its place on disk and still has something to tell dies at it.

use recoverd_common::pb::task::{DeleteRequest, DeleteResponse, ShutdownRequest};
use recoverd_tests::{Armed, call, wait_for};

use crate::ground::Ground;
use crate::life::{Goal, Life, Stage, Who};

/// The last task is deleted, and the shim told to go, while containerd is away.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    ground.kill();
    ground.start(Some(armed));
    let mut life = Life::new(ground);
    let goals = [Goal::To(Who::First, Stage::Ended)];
    assert!(life.run(ground, &goals, None).is_ok());
    let shim = life.shim(ground);
    ground.kill();
    let (node, socket) = (ground.node.clone(), life.socket(ground));
    let id = life.id(Who::First).to_owned();
    let delete = DeleteRequest {
        id: id.clone(),
        exec_id: String::new(),
    };
    let deleted: DeleteResponse = call(&node, &socket, "Delete", &delete)
        .unwrap_or_else(|error| panic!("Delete of {id}: {error}"));
    assert_eq!(deleted.exit_status, 23);
    // Its answer may be lost: it leaves meanwhile.
    let _answer = call::<()>(
        &node,
        &socket,
        "Shutdown",
        &ShutdownRequest { id, now: false },
    );
    wait_for("the shim to leave its place", || {
        (!node.path(&socket).exists()).then_some(())
    });
    ground.start(None);
    node.wait_gone(&shim);
    life.abandon(ground);
    armed.was_hit(&node)
}
