//! A shim, and containerd with it, is killed while the runtime is at work for one of the calls; the
//! runtime then finishes, or hangs and is ended by who adopts. Either way the call was done or it
//! was not, and can be made again.

use std::fs;
use std::path::PathBuf;

use recoverd_tests::{Failpoints, Release};

use crate::crash::recover;
use crate::ground::Ground;
use crate::life::{Goal, Life, Stage, WHOLE, Who};

/// Which of the runtime's commands, of whom, who has come that far.
type Call = (&'static str, Who, Stage);

const CALLS: [Call; 5] = [
    ("create", Who::First, Stage::Nothing),
    ("start", Who::First, Stage::Created),
    ("exec", Who::Session, Stage::Created),
    ("kill", Who::Second, Stage::Started),
    ("delete", Who::First, Stage::Ended),
];

/// The runtime waits before or after its work; it is let go before anybody adopts, or never.
const WAYS: [(&str, bool); 3] = [("before", false), ("after", false), ("before", true)];

/// All calls in all ways.
pub fn calls_are_done_or_undone(release: &Release, built: &Failpoints) {
    let mut ground = Ground::new(release, built);
    for (command, who, stage) in CALLS {
        for (at, let_go) in WAYS {
            // A failed test shows this line.
            eprintln!("-- {command}, held {at} its work, let go: {let_go}");
            play(&mut ground, (command, who, stage), at, let_go);
        }
    }
}

#[track_caller]
fn play(ground: &mut Ground, (command, who, stage): Call, at: &str, let_go: bool) {
    let held = Held::new(ground, command, at);
    let mut life = Life::new(ground);
    life.runtime_binary(&held.runtime);
    let beside = [Goal::To(Who::First, Stage::Started), Goal::To(who, stage)];
    let goals: &[Goal] = match command {
        "create" => &[],
        "start" => &beside[1..],
        // The last call of all.
        "delete" => WHOLE.split_last().map_or(&[], |(_, before)| before),
        _ => &beside,
    };
    assert!(life.run(ground, goals, None).is_ok());
    held.hold();
    life.die_during(ground, who, &held.reached);
    if let_go {
        held.let_go();
    }
    recover(ground, &mut life, || held.let_go());
    assert!(life.run(ground, &WHOLE, None).is_ok());
    life.finish(ground);
    ground.assert_restored();
}

/// A runtime that waits at one command, for as long as a file is there.
struct Held {
    runtime: PathBuf,
    hold: PathBuf,
    reached: PathBuf,
}

impl Held {
    fn new(ground: &mut Ground, command: &str, at: &str) -> Held {
        let round = ground.round();
        let file = |name: &str| ground.node.folder().join(format!("{round}-{name}"));
        let held = Held {
            runtime: file("runc"),
            hold: file("hold"),
            reached: file("reached"),
        };
        let (hold, reached) = (held.hold.display(), held.reached.display());
        let before = match at {
            "before" => "touch \"$reached\"; wait_for_it; exec runc \"$@\"",
            _ => "runc \"$@\"; code=$?; touch \"$reached\"; wait_for_it; exit $code",
        };
        let text = format!(
            "#!/bin/sh\nhold={hold} reached={reached}\n\
             wait_for_it() {{ while [ -e \"$hold\" ]; do busybox usleep 20000; done; }}\n\
             for word; do\n    if [ \"$word\" = {command} ] && [ -e \"$hold\" ]; then {before}; fi\n\
             done\nexec runc \"$@\"\n"
        );
        fs::write(&held.runtime, text)
            .unwrap_or_else(|error| panic!("write {}: {error}", held.runtime.display()));
        ground
            .node
            .run("chmod", ["0755".as_ref(), held.runtime.as_os_str()]);
        held
    }

    fn hold(&self) {
        fs::write(&self.hold, "").unwrap_or_else(|e| panic!("{}: {e}", self.hold.display()));
    }

    fn let_go(&self) {
        let _gone_already = fs::remove_file(&self.hold);
    }
}
