//! A shim becomes another image. It dies at it, and containerd with it; or `recoverd upgrade` does,
//! which has asked it to, with an image that is good, dies or hangs.

use std::path::Path;
use std::time::{Duration, Instant};

use recoverd_common::handoff::{SERVICE, UPGRADE, UpgradeRequest, UpgradeResponse};
use recoverd_common::shim_client::{CallError, ShimClient};
use recoverd_tests::{Armed, Installed, ServiceManager, VERSION, record_at, wait_for};

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
        // One that is no shim is refused, and nothing has changed.
        let refused = ask(ground, &life, Path::new("/bin/true"));
        assert!(refused.is_err(), "{refused:?}");
        let asked = ask(ground, &life, &ground.built.shim());
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

/// Asks the pod's shim to become this executable.
#[track_caller]
pub fn ask(ground: &Ground, life: &Life, executable: &Path) -> Result<UpgradeResponse, CallError> {
    let socket = ground.node.path(life.socket(ground));
    let request = UpgradeRequest {
        executable: executable.display().to_string(),
    };
    ShimClient::connect(&socket, NAMESPACE, Instant::now() + ANSWERS)
        .and_then(|mut shim| shim.call(SERVICE, UPGRADE, &request))
}

/// recoverd asks, and the new image serves.
#[track_caller]
pub fn play_asked(ground: &mut Ground, armed: &Armed) -> bool {
    play_image(ground, armed, Image::Good, None)
}

/// The new image dies, and containerd dies with recoverd: nobody is left who has the connections.
#[track_caller]
pub fn play_dead_image(ground: &mut Ground, armed: &Armed) -> bool {
    armed.and(&ground.containerd.process());
    play_image(ground, armed, Image::Dies, None)
}

/// The new image dies; containerd runs on, for a supervisor has the connections too.
#[track_caller]
pub fn play_dead_image_supervised(ground: &mut Ground, armed: &Armed) -> bool {
    let supervisor = ground.supervise(None);
    play_image(ground, armed, Image::Dies, Some(supervisor))
}

/// The new image hangs. containerd runs on.
#[track_caller]
pub fn play_hung_image(ground: &mut Ground, armed: &Armed) -> bool {
    play_image(ground, armed, Image::Hangs, None)
}

/// What a shim is to become.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Image {
    Good,
    Dies,
    Hangs,
}

impl Image {
    /// It can read the message, and comes as far as its first step.
    #[track_caller]
    fn install(self, ground: &mut Ground, installed: &Installed) {
        let fault = match self {
            Image::Good => return installed.install(VERSION),
            Image::Dies => "",
            Image::Hangs => "RECOVERD_FAILPOINT_STOPS=1",
        };
        let said = ground.round() + "-image";
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *-handoff=*) export RECOVERD_FAILPOINT=upgrade.image.before \
             RECOVERD_FAILPOINT_FILE={} {fault};; esac\nexec {} \"$@\"\n",
            ground.node.folder().join(said).display(),
            ground.built.shim().display()
        );
        installed.put(script.as_bytes());
    }
}

#[track_caller]
fn play_image(
    ground: &mut Ground,
    armed: &Armed,
    image: Image,
    supervisor: Option<ServiceManager>,
) -> bool {
    let installed = Installed::copy_of(&ground.node, &ground.built.shim());
    let mut life = Life::new(ground);
    let folder = ground.round();
    let relayed = ground.events.shim(&ground.node, &folder, installed.path());
    life.shim_binary(&relayed);
    assert!(life.run(ground, &RUNNING, None).is_ok());
    if supervisor.is_some() {
        ground.wait_watching(1);
    }
    image.install(ground, &installed);
    let upgrade = ["upgrade", "--all"];
    let output = ground.recoverd(&upgrade, Some(armed));
    let hit = armed.was_hit(&ground.node);
    let expected = i32::from(image != Image::Good);
    assert!(hit || output.status.code() == Some(expected), "{output:?}");
    Image::Good.install(ground, &installed);
    if supervisor.is_some() {
        wait_for("a shim that serves", || {
            let shim = record_at(&ground.node, &life.socket(ground)).shim.process;
            let shim = ground.node.process(shim.pid)?;
            ground.node.alive(&shim).then_some(())
        });
        ground.wait_watching(1);
    } else if hit && image == Image::Dies {
        ground.wait_ended();
        recover(ground, &mut life, || ());
    }
    let mut output = ground.recoverd(&upgrade, None);
    if hit && image == Image::Hangs && output.status.code() == Some(1) {
        // Nobody has ended it: that is done while containerd is down.
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("runs that executable already, but"), "{said}");
        ground.kill();
        recover(ground, &mut life, || ());
        output = ground.recoverd(&upgrade, None);
    }
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    life.check(ground);
    assert!(life.run(ground, &WHOLE, None).is_ok());
    life.finish(ground);
    drop(supervisor);
    ground.assert_restored();
    hit
}
