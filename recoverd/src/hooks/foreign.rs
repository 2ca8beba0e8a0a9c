//! Shims of another runtime that hang when containerd is about to start. Pure.
//!
//! Nobody can succeed them: only their own runtime knows their tasks. containerd would wait 5 s for
//! each and then end its workload, or, for one that hangs in its second answer, wait for ever
//! (releases from 1.7 on). An operator may therefore allow that they are ended before it starts
//! (`pre-start.foreign`): containerd then finds at once that nobody listens. A busy one, and one
//! that waits for a device, may still answer, and stays.

use std::collections::{BTreeMap, BTreeSet};

use recoverd_common::proc::ProcessId;

use crate::{
    adopt::decide::{Stillness, stillness},
    correlate::{Case, Kind},
    facts::{Instance, TaskName},
};

/// A foreign shim that does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreigner {
    /// It.
    pub shim: ProcessId,
    /// Its file name.
    pub runtime: String,
    /// The tasks that it serves.
    pub tasks: Vec<TaskName>,
    /// It is to be ended; else why not, one line.
    pub left: Option<String>,
}

/// The foreign shims among `cases`, all of `instance`, that two looks saw unresponsive; at most
/// `at_once` of them are to be ended.
pub fn foreigners<'a>(
    instance: &Instance,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    unresponsive: &BTreeSet<ProcessId>,
    allowed: bool,
    at_once: usize,
) -> Vec<Foreigner> {
    let mut found: BTreeMap<ProcessId, Foreigner> = BTreeMap::new();
    for case in cases {
        let Some(shim) = case.shim.process() else {
            continue;
        };
        let hangs = unresponsive.contains(&shim.id) && case.kind() == Some(Kind::Foreign);
        if !hangs {
            continue;
        }
        let ending = found.values().filter(|one| one.left.is_none()).count();
        let foreigner = found.entry(shim.id).or_insert_with(|| {
            let why = match stillness(shim) {
                _ if !instance.is(&shim.address) => Some("another containerd started it"),
                Stillness::Busy => Some("it is busy, not hung: it may answer yet"),
                Stillness::Device => Some("it waits for a device: it may answer yet"),
                Stillness::Stopped | Stillness::Idle if !allowed => {
                    Some("it is foreign (pre-start.foreign = true lets it be ended)")
                }
                Stillness::Stopped | Stillness::Idle if ending >= at_once => {
                    Some("so many are not ended at once: the node may be ill, not they")
                }
                Stillness::Stopped | Stillness::Idle => None,
            };
            Foreigner {
                shim: shim.id,
                runtime: shim.name.clone(),
                tasks: Vec::new(),
                left: why.map(|why| format!("shim {} does not answer, and {why}", shim.id.pid)),
            }
        });
        foreigner.tasks.push(case.name.clone());
    }
    found.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::{
            Look,
            fixture::{C1, SOCKET_DIR, healthy},
        },
    };

    fn hung(state: char) -> Look {
        let mut look = healthy();
        let shim = look.shim_of(&C1);
        shim.name = "containerd-shim-kata-v2".into();
        shim.state = state;
        shim.cpu_ticks_after = Some(shim.cpu_ticks);
        look
    }

    fn of(look: &Look, allowed: bool, at_once: usize) -> Vec<Foreigner> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let unresponsive = look.shims.iter().map(|shim| shim.id).collect();
        let instance = &look.instances[0];
        foreigners(instance, &cases.cases, &unresponsive, allowed, at_once)
    }

    #[test]
    fn one_that_is_stopped_or_idle_is_ended_if_that_is_allowed() {
        for state in ['T', 'S'] {
            let [one] = of(&hung(state), true, 5).try_into().unwrap();
            assert_eq!((one.left, one.tasks), (None, vec![C1.name()]));
        }
        let [one] = of(&hung('T'), false, 5).try_into().unwrap();
        assert!(one.left.unwrap().contains("pre-start.foreign"));
    }

    #[test]
    fn what_may_answer_yet_or_is_somebody_elses_stays() {
        let [one] = of(&hung('D'), true, 5).try_into().unwrap();
        assert!(one.left.unwrap().contains("device"));
        let mut look = hung('S');
        look.shim_of(&C1).cpu_ticks_after = None;
        assert!(of(&look, true, 5)[0].left.is_some(), "nobody knows");
        let mut look = hung('T');
        look.shim_of(&C1).address = "/run/unseen/containerd.sock".into();
        assert!(of(&look, true, 5)[0].left.is_some());
        assert!(of(&hung('T'), true, 0)[0].left.is_some());
    }

    #[test]
    fn a_runc_shim_is_none_and_one_that_answers_is_none() {
        let mut look = hung('T');
        look.shim_of(&C1).name = "containerd-shim-runc-v2".into();
        assert_eq!(of(&look, true, 5), []);
        let look = hung('T');
        let cases = correlate(&look, SOCKET_DIR.as_ref());
        let none = foreigners(&look.instances[0], &cases.cases, &BTreeSet::new(), true, 5);
        assert_eq!(none, []);
    }
}
