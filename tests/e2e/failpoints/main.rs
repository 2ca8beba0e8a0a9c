//! Every step at which a process of ours may die: the binaries print the list, this test walks all
//! of it, on real containerd with real containers. A scenario is played until somebody dies at the
//! point; what was at work is done again, and then SPEC's promises hold: the workload lives, its
//! exit is true or *unknown, because*, no byte is lost or doubled, every event comes and in order,
//! nothing is left behind.
//!
//! A point that no scenario comes by is a failure: a new point needs a scenario at most, and none
//! when one passes there already. Most points are passed many times; the first, the third, the
//! ninth… time is a death of its own, up to `RECOVERD_WALK_TIMES`. Points of areas that are passed
//! in more than one world (containerd up and supervised, an image that was upgraded) are died at
//! in each.
//!
//! Each step (`adopt.lock` of `adopt.lock.after`) is a test of its own, on one containerd release,
//! in turn.

mod again;
mod checkpoint;
mod crash;
mod delete;
mod ground;
mod half_done;
mod hooks;
mod life;
mod oom;
mod random;
mod repair;
mod retired;
mod supervised;
mod upgrade;

use std::collections::BTreeMap;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use recoverd_tests::{Armed, Failpoints, Release, newest_with};

use ground::Ground;

/// Plays for one armed point, and says whether somebody has died there.
type Scenario = fn(&mut Ground, &Armed) -> bool;

/// What is no walk of points.
type Whole = fn(&Release, &Failpoints);

/// So often one point is died at, if nothing else is said.
const TIMES: u64 = 3;

/// The scenarios that may come by a step, by its first word; those of an area that is not named here
/// are all tried.
fn scenarios(step: &str) -> Vec<Scenario> {
    let all: [Scenario; 10] = [
        crash::play,
        again::play,
        hooks::play_killed,
        hooks::play_hung,
        again::play_dead_group,
        delete::play,
        repair::play,
        repair::play_untold,
        retired::play,
        upgrade::play,
    ];
    if needs_criu(step) {
        return vec![checkpoint::play];
    }
    match step.split('.').next().unwrap_or_default() {
        "record" | "events" | "requests" | "serve" | "retire" => vec![crash::play, retired::play],
        "upgrade" => vec![
            upgrade::play,
            upgrade::play_asked,
            upgrade::play_dead_image,
            upgrade::play_hung_image,
        ],
        "supervise" | "handoff" => vec![
            supervised::play_supervisor,
            supervised::play_shim,
            supervised::play_hook,
        ],
        "start" | "daemon" => vec![again::play, again::play_dead_group],
        "delete" => vec![delete::play],
        "adopt" | "order" | "prestart" | "poststart" | "history" => {
            vec![hooks::play_killed, hooks::play_hung]
        }
        "repair" | "quarantine" => vec![repair::play, repair::play_untold],
        _ => all.to_vec(),
    }
}

/// Another world in which the points of an area are died at once more. One that nobody comes by there
/// any more would be a death that is not tried, so each has to be, but for those that are named here:
/// what leads to them is not in that world, or depends on who is faster.
struct World {
    play: Scenario,
    /// What these points' names begin with.
    elsewhere: &'static [&'static str],
}

const OF_A_SHIM: World = World {
    play: supervised::play_shim,
    // A reader that comes or goes later than its writer's start.
    elsewhere: &["stdio.held."],
};

const OF_THE_NEXT_IMAGE: World = World {
    play: supervised::play_next_image,
    elsewhere: &[
        // The first image has made these files, with their room; nobody has died that it adopts of.
        "events.open.",
        "events.reserve.",
        "events.takeover.",
        "record.rename.",
        "requests.begin.",
        // All containers are there by then.
        "serve.options.",
        // As above.
        "stdio.held.",
    ],
};

const OF_AN_UPGRADE: World = World {
    play: supervised::play_upgraded,
    // `recoverd upgrade` comes by, and here nobody runs it.
    elsewhere: &["upgrade.ask."],
};

const OF_A_HUNG_IMAGE: World = World {
    play: upgrade::play_hung_image,
    elsewhere: &[],
};

const OF_A_DEAD_IMAGE: World = World {
    play: upgrade::play_dead_image_supervised,
    elsewhere: &[],
};

const OF_A_SUPERVISOR: World = World {
    play: supervised::play_supervisor,
    elsewhere: &[
        // Its shims are killed, and do not hang.
        "adopt.kill.",
        "adopt.relock.",
        "adopt.stop.",
        // It has kept their sockets.
        "adopt.socket.",
        // That takes a long history.
        "history.rotate.",
    ],
};

/// The other worlds that come by a step.
fn also(step: &str) -> Vec<World> {
    if needs_criu(step) {
        return Vec::new();
    }
    if step == "upgrade.back" {
        return vec![OF_A_HUNG_IMAGE, OF_A_DEAD_IMAGE];
    }
    match step.split('.').next().unwrap_or_default() {
        "record" | "events" | "requests" | "serve" | "stdio" => {
            vec![OF_A_SHIM, OF_THE_NEXT_IMAGE]
        }
        "upgrade" => vec![OF_AN_UPGRADE],
        "adopt" | "order" | "history" => vec![OF_A_SUPERVISOR],
        _ => Vec::new(),
    }
}

/// Whether only a task that is checkpointed or restored comes by.
fn needs_criu(step: &str) -> bool {
    step.starts_with("checkpoint.") || step == "serve.restore"
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let found = Failpoints::find().and_then(|built| Ok((built.names()?, built)));
    let trials = match found {
        Ok((names, built)) => trials(names, &built),
        Err(why) => vec![Trial::test("failpoints_are_built", || {
            Err(Failed::from(why))
        })],
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trials(names: Vec<String>, built: &Failpoints) -> Vec<Trial> {
    let mut steps: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in names {
        let step: Vec<&str> = name.split('.').take(2).collect();
        steps.entry(step.join(".")).or_default().push(name);
    }
    let releases = ["1.6", "1.7", "2.1"];
    let turn = releases.iter().cycle();
    let newest = Release::available().pop();
    let newest = newest.ok_or_else(|| "no release of containerd is there".to_owned());
    let others: [(&str, Whole); 2] = [
        (
            "calls_are_done_or_undone",
            half_done::calls_are_done_or_undone,
        ),
        (
            "kills_that_no_shim_saw_are_told",
            oom::kills_that_no_shim_saw_are_told,
        ),
    ];
    let others = others.map(|(name, run)| {
        let (built, newest) = (built.clone(), newest.clone());
        recoverd_tests::trial(name.into(), newest, move |release| run(release, &built))
    });
    let random = releases.map(|release| {
        let built = built.clone();
        let title = format!(
            "killed_at_random_instants::containerd_{}",
            release.replace('.', "_")
        );
        recoverd_tests::trial(title, Release::find(release), move |release| {
            random::killed_at_random_instants(release, &built);
        })
    });
    steps
        .into_iter()
        .zip(turn)
        .map(|((step, points), release)| {
            let built = built.clone();
            let needed = match needs_criu(&step) {
                true => newest_with("criu"),
                false => Release::find(release),
            };
            let name = needed.as_ref().map_or("newest", |release| release.name);
            let title = format!("{step}::containerd_{}", name.replace('.', "_"));
            recoverd_tests::trial(title, needed, move |release| {
                walk(release, &built, &step, &points);
            })
        })
        .chain(others)
        .chain(random)
        .collect()
}

fn walk(release: &Release, built: &Failpoints, step: &str, points: &[String]) {
    let times = std::env::var("RECOVERD_WALK_TIMES").ok();
    let times = times.and_then(|times| times.parse().ok()).unwrap_or(TIMES);
    let programs: &[&str] = if needs_criu(step) { &["criu"] } else { &[] };
    let mut ground = Ground::with(release, built, programs);
    for point in points {
        let reached = scenarios(step)
            .into_iter()
            .find(|scenario| die(&mut ground, *scenario, point, 1));
        let Some(scenario) = reached else {
            panic!("no scenario comes by {point}");
        };
        let mut time = 3;
        while time <= times && die(&mut ground, scenario, point, time) {
            time *= 3;
        }
        for world in also(step) {
            let died = die(&mut ground, world.play, point, 1);
            let elsewhere = world.elsewhere.iter().any(|name| point.starts_with(name));
            assert!(
                died || elsewhere,
                "nobody comes by {point} in a world that it is of"
            );
        }
    }
}

/// One death, or none.
fn die(ground: &mut Ground, scenario: Scenario, point: &str, time: u64) -> bool {
    let point = format!("{point}:{time}");
    let armed = Armed::new(&ground.node, &point);
    let began = std::time::Instant::now();
    // A failed test shows this line.
    eprintln!("-- {point}");
    let died = scenario(ground, &armed);
    ground.disarm();
    eprintln!("-- {point}: {died}, {} ms", began.elapsed().as_millis());
    died
}
