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

/// containerd has ended: what systemd does with the drop-in, `between` its first hook and the start;
/// then the pod is looked at.
#[track_caller]
pub fn recover(ground: &mut Ground, life: &mut Life, between: impl FnOnce()) {
    start_again(ground, life.in_flight(), between);
    life.check(ground);
}

/// The same without a look. Of what was under way the hooks may have something to say.
#[track_caller]
pub fn start_again(ground: &mut Ground, in_flight: bool, between: impl FnOnce()) {
    let hook = |ground: &Ground, name: &str| {
        let hook = ground.recoverd(&[name, "--strict"], None);
        let code = hook.status.code();
        assert!(code == Some(0) || code == Some(1) && in_flight, "{hook:?}");
    };
    hook(ground, "pre-start");
    between();
    ground.start(None);
    hook(ground, "post-start");
}
