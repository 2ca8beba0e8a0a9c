//! A shim and containerd die in the same instant, while one of the pod's calls is under way; then
//! `pre-start`, containerd's start, `post-start`.

use recoverd_tests::Armed;

use crate::ground::Ground;
use crate::life::{Life, WHOLE};

/// False: nobody has come by.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    ground.kill();
    ground.start(Some(armed));
    armed.and(&ground.containerd.process());
    let mut life = Life::new(ground);
    let died = life.run(ground, &WHOLE, Some(armed)).is_err();
    // The last answer may come before the death.
    let died = died || armed.was_hit(&ground.node);
    if died {
        ground.wait_ended();
        recover(ground, &mut life, || ());
        let rest = life.run(ground, &WHOLE, None);
        rest.unwrap_or_else(|_| panic!("died twice"));
    }
    life.finish(ground);
    ground.assert_restored();
    died || armed.was_hit(&ground.node)
}

/// What systemd does with the drop-in, containerd having ended; `between` its first hook and the
/// start.
#[track_caller]
pub fn recover(ground: &mut Ground, life: &mut Life, between: impl FnOnce()) {
    let hook = ground.recoverd(&["pre-start", "--strict"], None);
    let code = hook.status.code();
    assert!(
        code == Some(0) || code == Some(1) && life.in_flight(),
        "{hook:?}"
    );
    between();
    ground.start(None);
    let hook = ground.recoverd(&["post-start", "--strict"], None);
    let code = hook.status.code();
    assert!(
        code == Some(0) || code == Some(1) && life.in_flight(),
        "{hook:?}"
    );
    life.check(ground);
}
