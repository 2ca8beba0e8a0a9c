//! The kernel kills for want of memory while neither shim nor containerd is there: whoever adopts
//! tells of it, before the exit that it may have caused.

use recoverd_common::record::Exit;
use recoverd_tests::{Container, Events, Failpoints, Release, Task, wait_for};

use crate::ground::Ground;

/// Of a child, and of the init itself.
pub fn kills_that_no_shim_saw_are_told(release: &Release, built: &Failpoints) {
    let mut ground = Ground::new(release, built);
    let node = ground.node.clone();
    let wait = |file: &str| format!("while [ ! -e /mnt/{file} ]; do usleep 20000; done");
    let run = |ground: &Ground, id: &str, line: String| -> Task {
        let container = Container::new(id).runtime(ground.built.shim());
        let container = container.shares(&node).memory_limit(16 << 20);
        ground
            .containerd
            .run(&container.command(["sh", "-c", &line]))
    };
    let eats = "tail /dev/zero; touch /mnt/eaten";
    let line = format!("{}; {eats}; {}; exit 23", wait("eat"), wait("end"));
    let child = run(&ground, "child", line);
    let line = format!("{}; exec tail /dev/zero", wait("eat"));
    let init = run(&ground, "init", line);
    let untouched = run(&ground, "untouched", format!("{}; exit 0", wait("end")));
    ground.kill();
    for task in [&child, &init, &untouched] {
        node.kill(&task.shim);
    }
    node.tell("eat");
    wait_for("a killed child", || {
        node.folder().join("eaten").exists().then_some(())
    });
    node.wait_gone(&init.init);
    let hook = ground.recoverd(&["pre-start", "--strict"], None);
    assert_eq!(hook.status.code(), Some(0), "{hook:?}");
    ground.start(None);
    let events = Events::of(&ground.containerd);
    child.assert_init_alive();
    for task in [&child, &init] {
        // Who comes late hears of it once more.
        wait_for(&format!("the OOM of {}", task.id()), || {
            events.of_topic(task.id(), "/tasks/oom").pop()
        });
        assert_eq!(task.recorded().oom_kills, Some(1), "{:?}", task.recorded());
    }
    let exit = init.recorded().exit;
    assert!(
        matches!(
            exit,
            Some(
                Exit::Unknown { .. }
                    | Exit::Observed {
                        status: 137,
                        oom: true,
                        ..
                    }
            )
        ),
        "{exit:?}"
    );
    node.tell("end");
    assert_eq!(child.wait("").exit_status, 23);
    assert_eq!(untouched.wait("").exit_status, 0);
    assert!(events.of_topic("untouched", "/tasks/oom").is_empty());
    for (task, status) in [(&child, 23), (&init, 137), (&untouched, 0)] {
        ground.containerd.delete(task, status);
    }
    ground.assert_restored();
}
