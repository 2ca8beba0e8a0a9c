//! containerd's start runs `delete` for what has no shim, and `delete` dies: the next start, or
//! `recoverd repair` where containerd has forgotten the task meanwhile, cleans up all the same.

use recoverd_tests::Armed;

use crate::ground::Ground;
use crate::life::{Life, RUNNING, Who};

/// One of the pod's inits has ended; the other lives, and the runtime has forgotten it.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    let mut life = Life::new(ground);
    assert!(life.run(ground, &RUNNING, None).is_ok());
    let shim = life.shim(ground);
    ground.kill();
    ground.node.kill(&shim);
    ground.node.kill(life.process(Who::First));
    let forgotten = format!("/run/containerd/runc/e2e/{}", life.id(Who::Second));
    ground.node.run("rm", ["-r", &forgotten]);
    ground.start(Some(armed));
    let hit = armed.was_hit(&ground.node);
    ground.kill();
    ground.start(None);
    ground.repair();
    life.abandon(ground);
    hit
}
