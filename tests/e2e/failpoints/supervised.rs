//! containerd runs on, and so does a supervisor, or its service manager starts it again: whoever
//! dies at the point, no client notices. A Wait is blocked all the while.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;

use recoverd_tests::{Armed, Fifos, Output, oci_process, record_at, wait_for};

use crate::crash::recover;
use crate::ground::{Ground, NAMESPACE};
use crate::life::{Goal, Life, RUNNING, Stage, WHOLE, Who};
use crate::upgrade::ask;

/// Who dies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// Or the successor of the pod's shim, which is killed with a terminal in its hands.
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

/// containerd is down and the pod's shim hangs: whoever replaces it asks the supervisor, which dies
/// of that, for what it keeps.
#[track_caller]
pub fn play_hook(ground: &mut Ground, armed: &Armed) -> bool {
    let supervisor = ground.supervise(Some(armed));
    let mut life = Life::new(ground);
    life.sees_ends();
    let mut died = false;
    go(ground, &mut life, &RUNNING, armed, &mut died);
    ground.wait_watching(1);
    let shim = life.shim(ground);
    ground.kill();
    ground.node.freeze(&shim);
    recover(ground, &mut life, || ());
    died |= armed.was_hit(&ground.node);
    go(ground, &mut life, &WHOLE, armed, &mut died);
    ground.wait_watching(0);
    life.finish(ground);
    supervisor.stop();
    ground.assert_restored();
    armed.was_hit(&ground.node)
}

#[track_caller]
fn play(ground: &mut Ground, armed: &Armed, victim: Victim) -> bool {
    if matches!(victim, Victim::Shim | Victim::Upgraded) {
        ground.kill();
        ground.start(Some(armed));
    }
    let supervisor = ground.supervise((victim == Victim::Supervisor).then_some(armed));
    let mut life = Life::new(ground);
    life.sees_ends();
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
            let mut typed = Typed::begin(ground, life.id(Who::First));
            typed.answers("before");
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
            typed.answers("after");
            typed.end(ground);
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

/// A shell on a terminal, an exec of a task. The client keeps its stdin from ending: for a shim and a
/// supervisor that die together nobody else does. What it reads is not to end either way.
struct Typed {
    task: String,
    shown: Output,
    keys: File,
}

impl Typed {
    #[track_caller]
    fn begin(ground: &mut Ground, task: &str) -> Typed {
        let name = ground.round();
        let fifos = Fifos::make_terminal(&ground.node, &name);
        let stdio = &fifos.stdio;
        let keys = File::options().read(true).write(true).open(&stdio.stdin);
        let keys = keys.unwrap_or_else(|error| panic!("open {}: {error}", stdio.stdin));
        let mut process = oci_process(&["sh"]);
        process["terminal"] = true.into();
        ground.api().run_exec(task, "typed", &process, stdio);
        Typed {
            task: task.to_owned(),
            shown: fifos.stdout(),
            keys,
        }
    }

    fn line(&mut self, line: &str) {
        let written = self.keys.write_all(format!("{line}\n").as_bytes());
        written.unwrap_or_else(|error| panic!("type: {error}"));
    }

    /// Types a line and waits for what it prints.
    #[track_caller]
    fn answers(&mut self, word: &str) {
        let (first, rest) = word.split_at(1);
        // Its echo does not hold the word itself.
        self.line(&format!("echo '{first}''{rest}'"));
        self.shown.wait_text(word);
    }

    #[track_caller]
    fn end(mut self, ground: &mut Ground) {
        self.line("exit 4");
        let api = ground.api();
        assert_eq!(api.status(&self.task, "typed"), 4);
        let deleted = api.delete(&self.task, "typed");
        deleted.unwrap_or_else(|refused| panic!("delete exec: {refused:?}"));
        self.shown.wait_end();
    }
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
