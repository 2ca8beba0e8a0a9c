//! Bundles that would stop or stall containerd's start, and hold nothing that lives. Pure.
//!
//! containerd connects to the shim of every bundle: one that does not answer costs it 5 s each, one
//! that answers `Connect` and hangs afterwards costs it everything (releases from 1.7 on). Where
//! the init has ended for certain and no successor could take the shim's place, the bundle is set
//! aside. A bundle whose init lives, or may live, stays where it is, and so does that of a shim that
//! is busy or waits for a device: it may answer yet, and only it knows how the init ended.
//!
//! A shim without any living process is ended, too: whoever starts a task under the same name would
//! be given its address, and wait for it.

use std::{collections::BTreeSet, path::PathBuf};

use recoverd_common::proc::{ProcessId, Stat};

use crate::{
    adopt::decide::{Stillness, stillness, zombie},
    correlate::{Case, Init, Kind},
    facts::{Instance, Look, Shim, TaskName},
};

/// A bundle to be set aside.
#[derive(Debug, Clone)]
pub struct Stopper<'a> {
    /// Whose.
    pub name: TaskName,
    /// The bundle.
    pub bundle: PathBuf,
    /// Its shim.
    pub shim: &'a Shim,
    /// Why, one line.
    pub why: String,
}

/// Which of `cases` would stop containerd; `unresponsive` are the shims that two looks saw so and
/// that still are there.
pub fn stoppers<'a>(
    look: &Look,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    unresponsive: &BTreeSet<ProcessId>,
) -> Vec<Stopper<'a>> {
    let stops = |case: &'a Case<'a>| {
        let bundle = case.bundle?;
        let shim = case.shim.process()?;
        let Init::Dead(_, why) = &case.init else {
            return None;
        };
        let foreign = case.kind() == Some(Kind::Foreign);
        let hangs = unresponsive.contains(&shim.id) && may_be_ended(stillness(shim));
        (hangs && !foreign && is_over(look, case)).then(|| Stopper {
            name: case.name.clone(),
            bundle: bundle.path.clone(),
            shim,
            why: format!(
                "its init ended ({why}), and shim {} does not answer: containerd would wait for it",
                shim.id.pid
            ),
        })
    };
    cases.into_iter().filter_map(stops).collect()
}

fn may_be_ended(stillness: Stillness) -> bool {
    match stillness {
        Stillness::Stopped | Stillness::Idle => true,
        Stillness::Busy | Stillness::Device => false,
    }
}

/// Nothing of a task lives, and nobody could tell more of it.
fn is_over(look: &Look, case: &Case<'_>) -> bool {
    let pids = case.cgroup.map(|cgroup| &cgroup.processes);
    let empty = pids.is_none_or(|seen| seen.present().is_some_and(Vec::is_empty));
    match &case.init {
        Init::None => empty,
        // A zombie's status can still be told by whoever replaces the shim.
        Init::Dead(..) => {
            empty && look.processes.present().is_some() && zombie(look, case).is_none()
        }
        Init::Alive(_) | Init::Unknown(_) => false,
    }
}

/// The shim of a stopper is of use to nobody: the containerd that is about to start has started it,
/// all its tasks are over and none is foreign, among all `cases` there are, and it has no living
/// child.
pub fn serves_nothing<'a>(
    look: &Look,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    instance: &Instance,
    shim: &Shim,
) -> bool {
    let of_it = |case: &&Case<'_>| case.shim.process().is_some_and(|s| s.id == shim.id);
    let over = cases
        .into_iter()
        .filter(of_it)
        .all(|case| is_over(look, case) && case.kind() != Some(Kind::Foreign));
    // It is the parent of its inits and execs; what it forked a moment ago is its as well.
    let childless = look.processes.present().is_some_and(|table| {
        let child = |stat: &Stat| stat.ppid == shim.id.pid && stat.alive();
        !table.values().any(child)
    });
    over && childless && instance.is(&shim.address)
}

/// `now`, a look at the same process, shows the shim as it was: it has not gone on since.
pub fn is_still(shim: &Shim, now: &Stat) -> bool {
    let later = Shim {
        state: now.state,
        cpu_ticks_after: Some(now.cpu_ticks),
        ..shim.clone()
    };
    now.id == shim.id && stillness(&later) == stillness(shim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::fixture::{C1, SOCKET_DIR, Task, healthy, stat},
    };
    use recoverd_common::seen::Seen;

    /// Its shim is stopped, its init has been collected.
    fn dead_and_hung() -> Look {
        let mut look = healthy();
        look.shim_of(&C1).state = 'T';
        look.table().remove(&C1.init);
        look.cgroups.clear();
        look
    }

    fn names(look: &Look) -> Vec<String> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let hung = look.shims.iter().map(|shim| shim.id).collect();
        let found = stoppers(look, &cases.cases, &hung);
        found.into_iter().map(|s| s.name.1).collect()
    }

    #[test]
    fn only_a_bundle_whose_init_has_ended_for_certain_is_one() {
        let mut look = healthy();
        look.shim_of(&C1).state = 'T';
        assert!(names(&look).is_empty(), "the init lives");
        let Seen::Present(table) = &mut look.processes else {
            panic!("a table")
        };
        let init = table.remove(&C1.init);
        look.cgroups.clear();
        assert_eq!(names(&look), [C1.id]);
        let Seen::Present(table) = &mut look.processes else {
            panic!("a table")
        };
        let mut zombie = init.unwrap();
        zombie.state = 'Z';
        table.insert(C1.init, zombie);
        assert!(names(&look).is_empty(), "its status can be read yet");
        look.processes = Seen::Unknown("hidden".into());
        assert!(names(&look).is_empty(), "nobody knows");
    }

    #[test]
    fn a_shim_that_may_answer_yet_keeps_its_bundle() {
        let (ticks, after) = (7, 8);
        let rows = [
            ('T', None, true),
            ('t', Some(ticks), true),
            ('S', Some(ticks), true),
            ('S', Some(after), false),
            ('S', None, false),
            ('R', Some(after), false),
            ('D', Some(ticks), false),
        ];
        for (state, cpu_ticks_after, is_one) in rows {
            let mut look = dead_and_hung();
            let shim = look.shim_of(&C1);
            (shim.state, shim.cpu_ticks) = (state, ticks);
            shim.cpu_ticks_after = cpu_ticks_after;
            assert_eq!(names(&look).len(), usize::from(is_one), "{state}");
        }
    }

    fn ends(look: &Look) -> bool {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        serves_nothing(look, &cases.cases, &look.instances[0], &look.shims[0])
    }

    #[test]
    fn its_shim_is_ended_only_if_nothing_else_of_it_may_live() {
        const APP: Task = Task {
            id: "app",
            init: 8,
            ..C1
        };
        assert!(ends(&dead_and_hung()));
        assert!(!ends(&healthy()));
        let mut look = healthy();
        look.add(&APP);
        look.table().remove(&C1.init);
        assert!(!ends(&look), "another task of the pod lives");
        look.table().remove(&APP.init);
        assert!(!ends(&look), "something is in its cgroup");
        look.cgroups.clear();
        assert!(ends(&look));
        let child = stat(crate::facts::fixture::process(99, 5), C1.shim);
        look.table().insert(99, child);
        assert!(!ends(&look), "a process of which nothing else is known");
        let mut look = dead_and_hung();
        look.shim_of(&C1).address = "/run/unseen/containerd.sock".into();
        assert!(!ends(&look), "another containerd's");
        let mut look = dead_and_hung();
        look.shim_of(&C1).name = "containerd-shim-kata-v2".into();
        assert!(!ends(&look), "foreign");
        let mut look = dead_and_hung();
        look.processes = Seen::Unknown("hidden".into());
        assert!(!ends(&look), "nobody knows");
    }

    #[test]
    fn one_that_has_gone_on_since_is_left_alone() {
        let look = dead_and_hung();
        let shim = &look.shims[0];
        let mut now = stat(shim.id, 1);
        now.state = 'T';
        assert!(is_still(shim, &now));
        now.state = 'S';
        assert!(!is_still(shim, &now), "it goes on");
        let mut idle = shim.clone();
        (idle.state, idle.cpu_ticks_after) = ('S', Some(idle.cpu_ticks));
        assert!(is_still(&idle, &now));
        now.cpu_ticks += 1;
        assert!(!is_still(&idle, &now), "it works");
        now.cpu_ticks -= 1;
        now.id.start_time += 1;
        assert!(!is_still(&idle, &now), "it is another one");
    }
}
