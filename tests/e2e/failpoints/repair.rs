//! `recoverd repair` dies in the middle of a mess; run again, it finishes the job and touches
//! nothing else.

use recoverd_tests::{Armed, Container, Task, wait_for};

use crate::ground::Ground;
use crate::life::{Life, RUNNING, WHOLE};

const APPLY: [&str; 8] = [
    "repair",
    "--apply",
    "--allow",
    "kill",
    "--allow",
    "delete",
    "--min-age",
    "0s",
];

/// Ended tasks with all that belongs to them, an orphaned pod, a record that is none, and a task
/// that containerd has forgotten.
#[track_caller]
pub fn play(ground: &mut Ground, armed: &Armed) -> bool {
    let mut life = Life::new(ground);
    assert!(life.run(ground, &RUNNING, None).is_ok());
    let round = ground.round();
    let run = |ground: &Ground, name: &str| {
        ground
            .containerd
            .run(&Container::new(&format!("{round}-{name}")))
    };
    let dead = run(ground, "dead");
    let lost = run(ground, "lost");
    let shim = life.shim(ground);
    ground.kill();
    let node = ground.node.clone();
    node.kill(&dead.shim);
    node.kill(&dead.init);
    node.kill(&shim);
    let bad = format!("/run/containerd/s/{}.record", "a".repeat(64));
    node.shell(&format!(
        "mount -t tmpfs left {}/rootfs; echo '{{\"format\":' >{bad}",
        dead.bundle().display()
    ));
    let output = ground.recoverd(&APPLY, Some(armed));
    let hit = armed.was_hit(&node);
    assert!(hit || output.status.code() == Some(0), "{output:?}");
    ground.repair();
    assert!(!node.path(dead.bundle()).exists() && !node.path(&bad).exists());
    // containerd does not find this one at its start.
    node.run("rm", ["-r".as_ref(), lost.bundle().as_os_str()]);
    ground.start(None);
    life.check(ground);
    let output = ground.recoverd(&APPLY, Some(armed));
    let hit = armed.was_hit(&node);
    assert!(hit || output.status.code() == Some(0), "{output:?}");
    ground.repair();
    assert!(!node.alive(&lost.init) && !node.alive(&lost.shim));
    for task in [&dead, &lost] {
        forget(ground, task);
    }
    assert!(life.run(ground, &WHOLE, None).is_ok());
    life.finish(ground);
    ground.assert_restored();
    node.run("rm", ["-rf", "/run/containerd/recoverd-quarantine"]);
    hit
}

fn forget(ground: &Ground, task: &Task) {
    let containerd = &ground.containerd;
    containerd.ctr_ok("e2e", ["containers", "delete", task.id()]);
}

/// An init has ended, and neither its shim nor containerd can know: a debugger keeps its zombie. The
/// kernel tells recoverd, and that tells containerd.
#[track_caller]
pub fn play_untold(ground: &mut Ground, armed: &Armed) -> bool {
    let round = ground.round();
    let node = ground.node.clone();
    let task = ground.containerd.run(&Container::new(&round));
    let debugger = node.spawn("perl", ["-e", SEIZE, &task.init.pid.to_string()]);
    wait_for("a debugger", || {
        debugger.text().contains("seized").then_some(())
    });
    node.signal(&task.init, "KILL");
    wait_for("a zombie", || {
        (node.process(task.init.pid)?.state == 'Z').then_some(())
    });
    let output = ground.recoverd(&APPLY, Some(armed));
    let hit = armed.was_hit(&node);
    assert!(hit || output.status.code() == Some(0), "{output:?}");
    ground.repair();
    let told = ground.recoverd(&["history"], None);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains(&format!("{round} exited with 137")), "{told}");
    drop(debugger);
    assert_eq!(ground.api().status(&round, ""), 137);
    ground.containerd.delete(&task, 137);
    ground.assert_restored();
    hit
}

/// Seizes a process and never waits for it.
const SEIZE: &str = "
    my %number = (x86_64 => 101, aarch64 => 117);
    my $machine = `uname -m`; chomp $machine;
    syscall($number{$machine}, 0x4206, $ARGV[0] + 0, 0, 0) == 0 or die \"seize: $!\";
    $| = 1; print \"seized\"; sleep 1000";
