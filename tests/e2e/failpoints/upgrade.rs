//! A shim, and containerd with it, dies while it becomes another image; then as after any crash.

use std::time::{Duration, Instant};

use recoverd_common::handoff::{SERVICE, UPGRADE, UpgradeRequest, UpgradeResponse};
use recoverd_common::shim_client::ShimClient;
use recoverd_tests::Armed;

use crate::crash::recover;
use crate::ground::{Ground, NAMESPACE};
use crate::life::{Life, RUNNING, WHOLE};

const ANSWERS: Duration = Duration::from_secs(60);

/// It becomes itself again.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    ground.kill();
    ground.start(Some(armed));
    armed.and(&ground.containerd.process());
    let mut life = Life::new(ground);
    // Not every point of an area comes only with an upgrade.
    let mut died = life.run(ground, &RUNNING, Some(armed)).is_err();
    if !died {
        let socket = ground.node.path(life.socket(ground));
        let request = UpgradeRequest {
            executable: ground.built.shim().display().to_string(),
        };
        let asked = ShimClient::connect(&socket, NAMESPACE, Instant::now() + ANSWERS)
            .and_then(|mut shim| shim.call::<UpgradeResponse>(SERVICE, UPGRADE, &request));
        died = armed.was_hit(&ground.node);
        assert!(died || asked.is_ok(), "{asked:?}");
    }
    if !died {
        died = life.run(ground, &WHOLE, Some(armed)).is_err();
    }
    if died {
        ground.wait_ended();
        recover(ground, &mut life, || ());
        assert!(life.run(ground, &WHOLE, None).is_ok());
    }
    life.finish(ground);
    ground.assert_restored();
    died
}
