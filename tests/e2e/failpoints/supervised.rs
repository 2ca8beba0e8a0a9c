//! containerd runs on, and so does a supervisor, or its service manager starts it again: whoever
//! dies at the point, no client notices. A Wait is blocked all the while.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;

use recoverd_tests::{Armed, record_at, wait_for};

use crate::ground::{Ground, NAMESPACE};
use crate::life::{Goal, Life, RUNNING, Stage, WHOLE, Who};
use crate::upgrade::ask;

/// Who dies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// Or the successor of the pod's shim, which is killed.
    Supervisor,
    Shim,
    /// A shim that becomes its own next image, before it or after it.
    Upgraded,
    /// The next image alone.
    NextImage,
}

/// The supervisor dies, or a successor that it has started.
#[track_caller]
pub fn play_supervisor(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, Victim::Supervisor)
}

/// A shim dies, maybe while it is at work for a client.
#[track_caller]
pub fn play_shim(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, Victim::Shim)
}

/// A shim dies of becoming another image.
#[track_caller]
pub fn play_upgraded(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, Victim::Upgraded)
}

/// An image dies that an unharmed shim has become, maybe while it is at work for a client.
#[track_caller]
pub fn play_next_image(ground: &mut Ground, armed: &Armed) -> bool {
    play(ground, armed, Victim::NextImage)
}

#[track_caller]
fn play(ground: &mut Ground, armed: &Armed, victim: Victim) -> bool {
    if matches!(victim, Victim::Shim | Victim::Upgraded) {
        ground.kill();
        ground.start(Some(armed));
    }
    let supervisor = ground.supervise((victim == Victim::Supervisor).then_some(armed));
    let mut life = Life::new(ground);
    let mut died = false;
    go(
        ground,
        &mut life,
        &[Goal::To(Who::First, Stage::Created)],
        armed,
        &mut died,
    );
    let (api, id) = (
        ground.containerd.api(NAMESPACE),
        life.id(Who::First).to_owned(),
    );
    let blocked = thread::spawn(move || api.wait(&id, ""));
    go(ground, &mut life, &RUNNING, armed, &mut died);
    match victim {
        Victim::Supervisor => {
            ground.wait_watching(1);
            let shim = life.shim(ground);
            ground.node.kill(&shim);
            wait_for("a successor", || {
                let now = record_at(&ground.node, &life.socket(ground)).shim.process;
                let now = ground
                    .node
                    .process(now.pid)
                    .filter(|now| now.pid != shim.pid)?;
                ground.node.alive(&now).then_some(())
            });
        }
        Victim::Shim => {}
        Victim::Upgraded | Victim::NextImage => {
            ground.wait_watching(1);
            let image = match victim {
                Victim::Upgraded => ground.built.shim(),
                _ => armed_image(ground, armed),
            };
            let asked = ask(ground, &life, &image);
            let dead = armed.was_hit(&ground.node);
            assert!(dead || asked.is_ok(), "{asked:?}");
        }
    }
    go(ground, &mut life, &WHOLE, armed, &mut died);
    let ended = blocked.join();
    let ended = ended.unwrap_or_else(|_| panic!("the blocked Wait has no answer"));
    assert_eq!(ended.map(|ended| ended.status), Ok(23));
    ground.wait_watching(0);
    life.finish(ground);
    supervisor.stop();
    ground.assert_restored();
    armed.was_hit(&ground.node)
}

/// Until all of it is done, whether somebody dies on the way or has died.
#[track_caller]
fn go(ground: &mut Ground, life: &mut Life, goals: &[Goal], armed: &Armed, died: &mut bool) {
    if !*died {
        if life.run(ground, goals, Some(armed)).is_ok() {
            return;
        }
        *died = true;
        life.check(ground);
    }
    let rest = life.run(ground, goals, None);
    rest.unwrap_or_else(|_| panic!("died twice"));
}

/// A shim that may die at `armed`, and not as long as it is only tried.
fn armed_image(ground: &mut Ground, armed: &Armed) -> PathBuf {
    let name = ground.round() + "-image";
    let path = ground.node.folder().join(name);
    let environment = armed.environment();
    let words = environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    let words: Vec<String> = words.collect();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *-handoff=*) export {};; esac\nexec {} \"$@\"\n",
        words.join(" "),
        ground.built.shim().display()
    );
    let write = || {
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
    };
    write().unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    path
}
