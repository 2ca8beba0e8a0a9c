//! Shims that are well, and that the containerd about to start cannot speak to. Pure.
//!
//! The stock shim of containerd 2.x serves the third task API only; containerd 1.x speaks the second
//! and no other. No file in the bundle helps: that start gets no answer that it understands, runs
//! `delete`, and the workload ends. Our shim serves both, so it takes such a shim's place before.
//!
//! A shim that is well is ended only where leaving it is certain to cost its task, so each of these
//! has been proven, and everything else leaves it alone:
//!
//! ```text
//! containerd  is down, and is the one that the shim was started by
//! its release is what the very program said that is to start, and is 1.x
//! the shim    is stock, answered in the third API, and refused the second one as not its own
//! its task    is what the shim says that it is: the same living init, or an exit that it tells
//! ```

use std::collections::{BTreeMap, BTreeSet};

use recoverd_common::{proc::ProcessId, seen::Seen};

use super::twins;
use crate::{
    adopt::decide::told_exit,
    correlate::{Case, Kind},
    facts::{Address, Look, TaskName},
    release::Release,
};

/// A shim that may not be heard: it answered in the third task API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspect {
    /// It.
    pub shim: ProcessId,
    /// Where it listens.
    pub socket: Address,
    /// Its tasks, at least one; all of one containerd namespace.
    pub tasks: Vec<TaskName>,
}

/// The suspects among the shims of the containerd at index `at`.
pub fn suspects<'a>(
    look: &Look,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    at: usize,
) -> Vec<Suspect> {
    let Some(instance) = look.instances.get(at) else {
        return Vec::new();
    };
    let mut found: BTreeMap<ProcessId, (bool, Suspect)> = BTreeMap::new();
    let cases: Vec<&Case<'_>> = cases.into_iter().collect();
    // Where a shim's name says nothing, runc's state of each task does.
    let others: BTreeSet<ProcessId> = cases
        .iter()
        .filter(|case| case.kind().is_some_and(|kind| kind != Kind::Stock))
        .filter_map(|case| Some(case.shim.process()?.id))
        .collect();
    for case in cases {
        let (Some(shim), Some(answer), Some(address)) =
            (case.shim.process(), case.answer, &case.address)
        else {
            continue;
        };
        let says_so =
            |greeting: &crate::facts::Greeting| greeting.shim_pid == shim.id.pid.unsigned_abs();
        let it_answers = answer.greeting.said().is_some_and(says_so);
        let third = answer.api == Some(3);
        let stock = case.kind() == Some(Kind::Stock) && !others.contains(&shim.id);
        let of_instance = case.instance == Some(at) && instance.is(&shim.address);
        if !(it_answers && third && stock && of_instance && case.bundle.is_some()) {
            continue;
        }
        let (worth, suspect) = found.entry(shim.id).or_insert_with(|| {
            let suspect = Suspect {
                shim: shim.id,
                socket: address.clone(),
                tasks: Vec::new(),
            };
            (false, suspect)
        });
        suspect.tasks.push(case.name.clone());
        *worth = *worth || twins::proven(case) || told_exit(case).is_some();
    }
    let worth = found.into_values().filter(|(worth, _)| *worth);
    worth.map(|(_, suspect)| suspect).collect()
}

/// What is to be done about the suspects.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// To be replaced; why, to be read after "shim PID".
    pub replace: BTreeMap<ProcessId, String>,
    /// Who is left although nobody knows whether it will be heard; one line each.
    pub left: Vec<String>,
}

/// Decides on `suspects`: `release` is that of the containerd about to start, `spoken` the lowest
/// task API that each of them has.
pub fn decide(
    suspects: &[Suspect],
    release: &Seen<Release>,
    spoken: &BTreeMap<ProcessId, Seen<u8>>,
) -> Decision {
    let mut decision = Decision::default();
    let release = match release {
        Seen::Present(release) if release.is_1() => release,
        // It speaks the third.
        Seen::Present(_) => return decision,
        Seen::Absent if suspects.is_empty() => return decision,
        Seen::Unknown(_) if suspects.is_empty() => return decision,
        Seen::Absent => {
            decision.left.push(unknown(suspects, "nothing names it"));
            return decision;
        }
        Seen::Unknown(why) => {
            decision.left.push(unknown(suspects, why));
            return decision;
        }
    };
    for suspect in suspects {
        let pid = suspect.shim.pid;
        match spoken.get(&suspect.shim) {
            Some(Seen::Present(3)) => {
                let why = format!("speaks task API 3 only, containerd {release} speaks 2");
                decision.replace.insert(suspect.shim, why);
            }
            Some(Seen::Present(_)) => {}
            Some(Seen::Unknown(why)) => decision.left.push(format!(
                "shim {pid} was left: whether it speaks task API 2, as containerd {release} does, \
                 is not known: {why}"
            )),
            Some(Seen::Absent) | None => {
                decision
                    .left
                    .push(format!("shim {pid} was left: it was not asked"));
            }
        }
    }
    decision
}

fn unknown(suspects: &[Suspect], why: &str) -> String {
    let tasks: usize = suspects.iter().map(|suspect| suspect.tasks.len()).sum();
    format!(
        "{tasks} tasks have shims that containerd 1.x could not speak to, and the release that \
         starts is not known: {why}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adopt::{
            Order,
            clues::Clues,
            decide::{Wish, select},
            orders::orders,
        },
        classify::tests::random::{Broken, broken},
        correlate::{Cases, Init, correlate},
        facts::{
            Api, Phase, Reply,
            fixture::{C1, SOCKET_DIR, Task, healthy},
        },
    };
    use proptest::prelude::*;
    use recoverd_common::record::{self, Exit};

    const OLD: &str = "1.7.24";

    fn release(text: &str) -> Seen<Release> {
        Seen::Present(Release::parse(text).unwrap())
    }

    /// A task of the stock shim of 2.x, whose containerd is down.
    fn third() -> Look {
        down(with_third(healthy(), u8::MAX))
    }

    /// The shims with a bit answer in the third task API.
    fn with_third(mut look: Look, bits: u8) -> Look {
        for (at, answer) in look.answers.values_mut().enumerate() {
            if bits >> (at % 8) & 1 == 1 {
                answer.api = answer.api.and(Some(3));
            }
        }
        look
    }

    fn down(mut look: Look) -> Look {
        for instance in &mut look.instances {
            instance.api = Api::Down;
            instance.daemon = None;
        }
        look
    }

    fn suspects_of(look: &Look, at: usize) -> Vec<Suspect> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        suspects(look, &cases.cases, at)
    }

    fn all_say(suspects: &[Suspect], says: &Seen<u8>) -> BTreeMap<ProcessId, Seen<u8>> {
        let said = suspects.iter().map(|suspect| (suspect.shim, says.clone()));
        said.collect()
    }

    /// Who would be replaced under 1.7 if each suspect refuses the second API.
    fn replaced(look: &Look) -> Vec<i32> {
        let suspects = suspects_of(look, 0);
        let spoken = all_say(&suspects, &Seen::Present(3));
        let decision = decide(&suspects, &release(OLD), &spoken);
        decision.replace.keys().map(|shim| shim.pid).collect()
    }

    #[test]
    fn a_healthy_shim_that_the_release_cannot_speak_to_is_replaced() {
        let look = third();
        assert_eq!(replaced(&look), [C1.shim]);
        let suspects = suspects_of(&look, 0);
        let spoken = all_say(&suspects, &Seen::Present(3));
        for old in ["1.6.20", "1.7.0", "1.7"] {
            assert_eq!(decide(&suspects, &release(old), &spoken).replace.len(), 1);
        }
        for new in ["2.0.0", "2.1.9", "2.4", "3.0"] {
            let decision = decide(&suspects, &release(new), &spoken);
            assert_eq!(decision, Decision::default(), "{new}");
        }
    }

    #[test]
    fn what_is_not_known_replaces_nobody_and_is_said() {
        let suspects = suspects_of(&third(), 0);
        let third = all_say(&suspects, &Seen::Present(3));
        let hidden = || Seen::Unknown("hidden".to_owned());
        for (release, spoken) in [
            (hidden().map(|never: Release| never), third.clone()),
            (Seen::Absent, third),
            (
                release(OLD),
                all_say(&suspects, &Seen::Unknown("hidden".into())),
            ),
            (release(OLD), BTreeMap::new()),
        ] {
            let decision = decide(&suspects, &release, &spoken);
            assert!(decision.replace.is_empty(), "{release:?} {spoken:?}");
            assert_eq!(decision.left.len(), 1, "{release:?} {spoken:?}");
            // With nobody in question there is nothing to say.
            assert_eq!(decide(&[], &release, &spoken), Decision::default());
        }
    }

    #[test]
    fn a_shim_that_has_the_second_api_too_is_heard() {
        let suspects = suspects_of(&third(), 0);
        let spoken = all_say(&suspects, &Seen::Present(2));
        assert_eq!(
            decide(&suspects, &release(OLD), &spoken),
            Decision::default()
        );
        assert_eq!(
            replaced(&down(healthy())),
            [0; 0],
            "it answered in the second"
        );
    }

    #[test]
    fn what_is_not_its_own_or_not_proven_is_left_alone() {
        type Change = fn(&mut Look);
        let rows: [(&str, Change); 7] = [
            ("ours", |l| {
                l.shim_of(&C1).name = "containerd-shim-recoverd-v1".into()
            }),
            ("foreign", |l| {
                l.shim_of(&C1).name = "containerd-shim-kata-v2".into()
            }),
            ("another containerd's", |l| {
                l.shim_of(&C1).address = "/run/unseen/containerd.sock".into();
            }),
            ("another process answers", |l| {
                l.answer_of(&C1).greeting = Reply::Said(crate::facts::Greeting {
                    shim_pid: 4711,
                    version: String::new(),
                });
            }),
            ("it hangs", |l| l.answer_of(&C1).greeting = Reply::Silent),
            ("it does not know the task", |l| {
                l.answer_of(&C1).states.clear()
            }),
            ("its init is not known", |l| {
                l.processes = Seen::Unknown("hidden".into());
            }),
        ];
        for (what, change) in rows {
            let mut look = third();
            change(&mut look);
            assert_eq!(replaced(&look), [0; 0], "{what}");
        }
    }

    fn order_of(look: &Look) -> Vec<Order> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let suspects = suspects(look, &cases.cases, 0);
        let spoken = all_say(&suspects, &Seen::Present(3));
        let decision = decide(&suspects, &release(OLD), &spoken);
        ordered(look, &cases, &decision)
    }

    /// Who is adopted when nothing else is wrong.
    fn ordered(look: &Look, cases: &Cases<'_>, decision: &Decision) -> Vec<Order> {
        let none = BTreeSet::new();
        let wish = Wish {
            address: None,
            namespace: None,
            only: None,
            unresponsive: &none,
            unheard: Some(&decision.replace),
            unit: None,
        };
        orders(look, select(look, cases, &wish), &Clues::default()).orders
    }

    #[test]
    fn its_successor_is_told_what_it_says_itself() {
        let mut look = third();
        let Some(Reply::Said(state)) = look.answer_of(&C1).states.get_mut(C1.id) else {
            panic!("it says its state")
        };
        state.stdio = ["/in".into(), "/out".into(), String::new()];
        let [order] = order_of(&look).try_into().unwrap();
        assert!(order.replaces(look.shims[0].id));
        assert!(order.because[0].contains("task API 3 only"), "{order:?}");
        let task = &order.adoption.record.unwrap().tasks[0];
        assert_eq!(
            (task.stdio.stdin.as_str(), task.stdio.stdout.as_str()),
            ("/in", "/out")
        );
    }

    #[test]
    fn an_exit_that_only_the_shim_knows_is_kept() {
        const APP: Task = Task {
            instance: 0,
            id: "app",
            group: "c1",
            shim: 6,
            init: 8,
        };
        let mut look = healthy();
        look.add(&APP);
        let mut look = down(with_third(look, u8::MAX));
        look.table().remove(&APP.init);
        look.told(&APP, Phase::Stopped);
        let Some(Reply::Said(state)) = look.answer_of(&APP).states.get_mut(APP.id) else {
            panic!("it says its state")
        };
        state.exited_at = Some(1234);
        let [order] = order_of(&look).try_into().unwrap();
        let record = order.adoption.record.unwrap();
        let app = record.tasks.iter().find(|task| task.id == APP.id).unwrap();
        // Whether it was told is not known.
        assert_eq!(app.phase, record::Phase::Running);
        assert!(
            matches!(&app.exit, Some(Exit::Observed { status: 42, at, .. }) if at.seconds == 1234),
            "{app:?}"
        );
    }

    #[test]
    fn while_containerd_runs_nobody_is_replaced() {
        let look = with_third(healthy(), u8::MAX);
        assert_eq!(replaced(&look), [C1.shim], "in principle");
        assert_eq!(order_of(&look), []);
    }

    fn look_of(broken: &Broken, third: u8, stopped: bool) -> Look {
        let look = with_third(broken.look(), third);
        if stopped { down(look) } else { look }
    }

    fn any_release() -> impl Strategy<Value = Seen<Release>> {
        let of = |text: &'static str| Just(release(text));
        prop_oneof![
            of("1.6.20"),
            of(OLD),
            of("2.0.3"),
            of("2.1.9"),
            Just(Seen::Absent),
            Just(Seen::Unknown("hidden".into())),
        ]
    }

    fn any_word() -> impl Strategy<Value = Seen<u8>> {
        prop_oneof![
            1 => Just(Seen::Present(2)),
            3 => Just(Seen::Present(3)),
            1 => Just(Seen::Absent),
            1 => Just(Seen::Unknown("hidden".into())),
        ]
    }

    proptest! {
        #[test]
        fn who_is_replaced_is_well_stock_its_containerds_and_not_to_be_heard(
            broken in broken(), third: u8, stopped: bool,
            release in any_release(), words in proptest::collection::vec(any_word(), 8),
        ) {
            let look = look_of(&broken, third, stopped);
            let cases = correlate(&look, SOCKET_DIR.as_ref());
            for (at, instance) in look.instances.iter().enumerate() {
                let suspects = suspects(&look, &cases.cases, at);
                let spoken: BTreeMap<ProcessId, Seen<u8>> = suspects
                    .iter()
                    .zip(&words)
                    .map(|(suspect, word)| (suspect.shim, word.clone()))
                    .collect();
                let decision = decide(&suspects, &release, &spoken);
                for (id, why) in &decision.replace {
                    prop_assert!(!why.is_empty());
                    prop_assert!(matches!(&release, Seen::Present(r) if r.is_1()));
                    prop_assert_eq!(spoken.get(id), Some(&Seen::Present(3)));
                    let shim = look.shims.iter().find(|shim| shim.id == *id).unwrap();
                    prop_assert!(instance.is(&shim.address));
                    let of_it: Vec<&Case<'_>> = cases.cases.iter().filter(|case| {
                        case.shim.process().is_some_and(|found| found.id == *id)
                    }).collect();
                    prop_assert!(of_it.iter().any(|case| case.answered()));
                    prop_assert!(of_it.iter().all(|case| case.kind() != Some(Kind::Foreign)
                        && case.kind() != Some(Kind::Ours)));
                    let lives = |case: &&&Case<'_>| {
                        let state = case.state().unwrap();
                        matches!(case.init, Init::Alive(id) if id.pid.unsigned_abs() == state.pid)
                    };
                    let worth = of_it.iter().any(|case| {
                        told_exit(case).is_some() || case.state().is_some() && lives(&case)
                    });
                    prop_assert!(worth);
                }
                for order in ordered(&look, &cases, &decision) {
                    if order.adoption.predecessor.is_none() { continue }
                    prop_assert!(decision.replace.keys().any(|shim| order.replaces(*shim)));
                    prop_assert!(instance.is(&order.address));
                    prop_assert!(matches!(instance.api, Api::Down) && instance.daemon.is_none());
                }
            }
        }
    }
}
