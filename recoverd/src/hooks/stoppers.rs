//! Bundles that would stop or stall containerd's start, and hold nothing that lives. Pure.
//!
//! containerd connects to the shim of every bundle: one that does not answer costs it 5 s each, one
//! that answers `Connect` and hangs afterwards costs it everything (releases from 1.7 on). Where
//! the init has ended for certain and no successor could take the shim's place, the bundle is set
//! aside. A bundle whose init lives, or may live, stays where it is.

use std::{collections::BTreeSet, path::PathBuf};

use recoverd_common::proc::ProcessId;

use crate::{
    correlate::{Case, Init, Kind},
    facts::{Look, TaskName},
};

/// A bundle to be set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopper {
    /// Whose.
    pub name: TaskName,
    /// The bundle.
    pub bundle: PathBuf,
    /// Why, one line.
    pub why: String,
}

/// Which of `cases` would stop containerd; `unresponsive` are the shims that two looks saw so and
/// that still are there.
pub fn stoppers<'a>(
    look: &Look,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    unresponsive: &BTreeSet<ProcessId>,
) -> Vec<Stopper> {
    let stops = |case: &Case<'_>| {
        let bundle = case.bundle?;
        let shim = case.shim.process()?;
        let Init::Dead(id, why) = &case.init else {
            return None;
        };
        // A zombie's status can still be told by whoever replaces the shim.
        let table = look.processes.present()?;
        let zombie = id.is_some_and(|id| table.get(&id.pid).is_some_and(|stat| stat.id == id));
        let foreign = case.kind() == Some(Kind::Foreign);
        let hangs = unresponsive.contains(&shim.id);
        let pids = case.cgroup.map(|cgroup| &cgroup.processes);
        let empty = pids.is_none_or(|seen| seen.present().is_some_and(Vec::is_empty));
        (hangs && !zombie && !foreign && empty).then(|| Stopper {
            name: case.name.clone(),
            bundle: bundle.path.clone(),
            why: format!(
                "its init ended ({why}), and shim {} does not answer: containerd would wait for it",
                shim.id.pid
            ),
        })
    };
    cases.into_iter().filter_map(stops).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::fixture::{C1, SOCKET_DIR, healthy},
    };
    use recoverd_common::seen::Seen;

    fn names(look: &Look) -> Vec<String> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let hung = look.shims.iter().map(|shim| shim.id).collect();
        let found = stoppers(look, &cases.cases, &hung);
        found.into_iter().map(|s| s.name.1).collect()
    }

    #[test]
    fn only_a_bundle_whose_init_has_ended_for_certain_is_one() {
        let mut look = healthy();
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
}
