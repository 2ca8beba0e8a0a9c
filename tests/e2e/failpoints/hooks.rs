//! The hooks around containerd's start, and the shims that they start: shims were killed, or hang,
//! while containerd was down. Whoever dies at the point, `recoverd pre-start` is run again.

use recoverd_tests::Armed;

use crate::ground::Ground;
use crate::life::{Goal, Life, RUNNING, Stage, WHOLE, Who};

/// The pod's shim was killed.
#[track_caller]
pub fn play_killed(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, false)
}

/// It was stopped.
#[track_caller]
pub fn play_hung(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, true)
}

fn play(ground: &mut Ground, armed: &Armed, hung: bool) -> bool {
    let mut life = Life::new(ground);
    let mut well = Life::new(ground);
    let started = life.run(ground, &RUNNING, None);
    let beside = well.run(ground, &[Goal::To(Who::First, Stage::Started)], None);
    assert!(started.is_ok() && beside.is_ok());
    let shim = life.shim(ground);
    ground.kill();
    match hung {
        true => ground.node.freeze(&shim),
        false => ground.node.kill(&shim),
    }
    // Bundles that a containerd of 1.x would not find a shim by, one of them of a shim that is
    // well; and a full history.
    let (orphaned, bundle) = (
        life.bundle(ground, Who::First),
        well.bundle(ground, Who::First),
    );
    ground.node.shell(&format!(
        "rm {}/address {}/address; mkdir -p -m 0700 /var/lib/recoverd
         head -c 4194304 /dev/zero | tr '\\0' '\\n' >/var/lib/recoverd/history.jsonl",
        orphaned.display(),
        bundle.display()
    ));
    let before = ["pre-start", "--strict"];
    let hook = ground.recoverd(&before, Some(armed));
    let hit = armed.was_hit(&ground.node);
    assert!(hit || hook.status.code() == Some(0), "{hook:?}");
    let hook = ground.recoverd(&before, None);
    assert_eq!(hook.status.code(), Some(0), "{hook:?}");
    assert!(ground.node.path(bundle.join("address")).exists());
    ground.start(None);
    let after = ["post-start", "--strict"];
    let hook = ground.recoverd(&after, Some(armed));
    let hit = armed.was_hit(&ground.node);
    assert!(hit || hook.status.code() == Some(0), "{hook:?}");
    let hook = ground.recoverd(&after, None);
    assert_eq!(hook.status.code(), Some(0), "{hook:?}");
    ground.node.wait_gone(&shim);
    for mut life in [life, well] {
        life.check(ground);
        let rest = life.run(ground, &WHOLE, None);
        assert!(rest.is_ok());
        life.finish(ground);
    }
    ground.assert_restored();
    hit
}
