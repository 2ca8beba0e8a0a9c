//! What holds of every join, whatever is wrong with the node.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{classify::tests::random::broken, facts::fixture::SOCKET_DIR};

fn join(look: &Look) -> Cases<'_> {
    correlate(look, Path::new(SOCKET_DIR))
}

/// What the join found out, without what it borrows.
fn found(cases: &Cases<'_>) -> Vec<(TaskName, Option<usize>, Init, Option<ProcessId>)> {
    let one = |case: &Case<'_>| {
        let shim = case.shim.process().map(|shim| shim.id);
        (case.name.clone(), case.instance, case.init.clone(), shim)
    };
    cases.cases.iter().map(one).collect()
}

proptest! {
    #[test]
    fn each_task_of_a_containerd_has_one_case_and_each_bundle_is_in_its_own(broken in broken()) {
        let look = broken.look();
        let cases = join(&look);
        let mut seen = BTreeSet::new();
        for case in &cases.cases {
            let bundle = case.bundle.map(|bundle| &bundle.path);
            prop_assert!(seen.insert((&case.name, case.instance, bundle)), "{case:#?}");
        }
        for facts in &look.bundles {
            let name = (facts.bundle.namespace.to_string(), facts.bundle.id.to_string());
            let of_it = cases.cases.iter().filter(|case| {
                case.bundle.is_some_and(|bundle| bundle.path == facts.bundle.path)
            });
            let of_it: Vec<_> = of_it.collect();
            prop_assert_eq!(of_it.len(), 1);
            prop_assert_eq!((&of_it[0].name, of_it[0].instance), (&name, Some(facts.instance)));
        }
    }

    #[test]
    fn a_shim_serves_or_is_idle_and_an_init_that_lives_is_in_the_table(broken in broken()) {
        let look = broken.look();
        let cases = join(&look);
        let table = look.processes.present().unwrap();
        for case in &cases.cases {
            if let Some(id) = case.init.alive() {
                let stat = table.get(&id.pid);
                prop_assert!(stat.is_some_and(|stat| stat.id == id && stat.alive()), "{case:#?}");
            }
            if let Some(shim) = case.shim.process() {
                prop_assert!(look.shims.iter().any(|known| known.id == shim.id));
                let idle = cases.idle_shims.iter().any(|idle| idle.id == shim.id);
                prop_assert!(!idle, "{case:#?}");
            }
        }
        for shim in &look.shims {
            let serves = cases.cases.iter().any(|case| {
                case.shim.process().is_some_and(|found| found.id == shim.id)
            });
            let idle = cases.idle_shims.iter().any(|idle| idle.id == shim.id);
            prop_assert!(serves != idle, "{shim:#?}");
        }
    }

    #[test]
    fn nobody_is_dead_or_alive_where_processes_are_not_seen(broken in broken()) {
        let mut look = broken.look();
        look.processes = Seen::Unknown("permission denied".into());
        for case in &join(&look).cases {
            prop_assert!(matches!(case.init, Init::None | Init::Unknown(_)), "{case:#?}");
        }
    }

    #[test]
    fn in_which_order_things_were_seen_does_not_matter(broken in broken()) {
        let look = broken.look();
        let mut other = broken.look();
        other.bundles.reverse();
        other.runc.reverse();
        other.shims.reverse();
        other.sockets.reverse();
        other.cgroups.reverse();
        prop_assert_eq!(found(&join(&look)), found(&join(&other)));
    }
}
