//! `start`, or the daemon that it has started, dies while containerd is up: the same call again
//! brings the task about.

use std::os::unix::net::UnixListener;

use recoverd_tests::Armed;

use crate::ground::{Ground, NAMESPACE};
use crate::life::{Goal, Life, Stage, WHOLE, Who};

/// As containerd runs `start`, with a stale socket in its place.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    ground.kill();
    ground.start(Some(armed));
    let mut life = Life::new(ground);
    let socket = life.socket(ground);
    ground
        .node
        .run("mkdir", ["-p".as_ref(), socket.parent().unwrap_or(&socket)]);
    let listener = UnixListener::bind(ground.node.path(&socket));
    drop(listener.unwrap_or_else(|error| panic!("bind {}: {error}", socket.display())));
    let died = life.run(ground, &WHOLE, Some(armed)).is_err();
    if died {
        life.check(ground);
        let rest = life.run(ground, &WHOLE, None);
        assert!(rest.is_ok());
    }
    life.finish(ground);
    ground.assert_restored();
    died || armed.was_hit(&ground.node)
}

/// As containerd would run it for a pod whose shim has died; then `start` adopts the pod first.
#[track_caller]
pub fn play_dead_group(ground: &mut Ground, armed: &Armed) -> bool {
    let mut life = Life::new(ground);
    let begun = [
        Goal::To(Who::First, Stage::Started),
        Goal::To(Who::Session, Stage::Started),
    ];
    assert!(life.run(ground, &begun, None).is_ok());
    let shim = life.shim(ground);
    ground.kill();
    ground.node.kill(&shim);
    let (first, second) = (
        life.bundle(ground, Who::First),
        life.bundle(ground, Who::Second),
    );
    ground.node.shell(&format!(
        "mkdir {second}; cp {first}/config.json {second}",
        first = first.display(),
        second = second.display()
    ));
    let start = |armed: Option<&Armed>| {
        let line = "cd $1; shift; exec \"$@\"";
        let mut command = ground.node.command("sh", ["-c", line, "sh"]);
        command.arg(&second).arg(ground.built.shim());
        command.args(["-namespace", NAMESPACE, "-address"]);
        command.arg(ground.containerd.address());
        command.args(["-id", life.id(Who::Second), "start"]);
        command.envs(armed.map(Armed::environment).unwrap_or_default());
        command
            .output()
            .unwrap_or_else(|error| panic!("start {command:?}: {error}"))
    };
    let output = start(Some(armed));
    let hit = armed.was_hit(&ground.node);
    assert!(hit || output.status.success(), "{output:?}");
    let output = start(None);
    let said = format!("unix://{}", life.socket(ground).display());
    assert_eq!(String::from_utf8_lossy(&output.stdout), said, "{output:?}");
    ground.node.run("rm", ["-r".as_ref(), second.as_os_str()]);
    ground.start(None);
    life.check(ground);
    assert!(life.run(ground, &WHOLE, None).is_ok());
    life.finish(ground);
    ground.assert_restored();
    hit
}
