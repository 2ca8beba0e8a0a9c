//! recoverd itself is killed at any instant, again and again (SPEC, F10): run to its end once more,
//! ten tasks are as they were.

use std::thread;
use std::time::Duration;

use recoverd_tests::{Failpoints, Release};

use crate::ground::Ground;
use crate::life::{Goal, Life, Stage, WHOLE, Who};

/// Pods of two tasks each.
const PODS: usize = 5;
/// Deaths of each command.
const DEATHS: u32 = 5;
/// A command is done by then, mostly.
const LONGEST_MS: u64 = 1200;

/// Of a run that is told no other by `RECOVERD_WALK_SEED`: a change is judged by the same moments as
/// the one before it.
const SEED: u64 = 7;

/// One run; its seed is shown.
pub fn killed_at_random_instants(release: &Release, built: &Failpoints) {
    let given = std::env::var("RECOVERD_WALK_SEED").ok();
    let mut seed = given.and_then(|seed| seed.parse().ok()).unwrap_or(SEED) | 1;
    eprintln!("RECOVERD_WALK_SEED={seed}");
    let mut random = || {
        // xorshift
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut ground = Ground::new(release, built);
    let mut lives: Vec<Life> = (0..PODS).map(|_| Life::new(&mut ground)).collect();
    let running = [
        Goal::To(Who::First, Stage::Started),
        Goal::To(Who::Second, Stage::Started),
    ];
    for life in &mut lives {
        assert!(life.run(&mut ground, &running, None).is_ok());
    }
    let commands: [&[&str]; 3] = [
        &["pre-start", "--strict"],
        &["adopt"],
        &["repair", "--apply", "--allow", "kill", "--min-age", "0s"],
    ];
    for command in commands {
        let shims: Vec<_> = lives.iter().map(|life| life.shim(&ground)).collect();
        ground.kill();
        for shim in &shims {
            ground.node.kill(shim);
        }
        for _ in 0..DEATHS {
            let mut running = ground.spawn_recoverd(command);
            // No wait for a condition: any instant will do.
            thread::sleep(Duration::from_millis(random() % LONGEST_MS));
            if ground.node.alive(&running.process) {
                // It may end in between.
                let pid = running.process.pid.to_string();
                ground.node.output("kill", ["-s", "KILL", &pid]);
            }
            running.wait();
        }
        // Successors that the last one has started may be on their way, and hold their locks: whoever
        // stands back from them says that it has not done it. The hook has one run only.
        let again = if command[0] == "pre-start" { 0 } else { 3 };
        let mut output = ground.recoverd(command, None);
        for _ in 0..again {
            if output.status.success() {
                break;
            }
            output = ground.recoverd(command, None);
        }
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        ground.start(None);
        for life in &mut lives {
            life.check(&mut ground);
        }
    }
    for mut life in lives {
        assert!(life.run(&mut ground, &WHOLE, None).is_ok());
        life.finish(&mut ground);
    }
    ground.assert_restored();
}
