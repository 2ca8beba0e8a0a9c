//! What is wrong with a task: nobody serves it, nobody knows it, it runs twice, or those who know it
//! do not agree on how far it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use recoverd_common::timestamp::Timestamp;

use crate::{
    correlate::{Case, Cases, Init, Kind, Known, Pod, ShimOf},
    facts::{Api, Phase},
    findings::{Code, Evidence},
    permit::Word,
};

use super::{Context, Hold, Suspicion, action, evidence, shims::unanswered};

/// A created task that nobody starts for this long is stuck.
const CREATED_TOO_LONG: Duration = Duration::from_secs(600);

impl Context<'_> {
    pub(super) fn orphaned_task(&self, case: &Case<'_>) -> Option<Suspicion> {
        let init = case.init.alive()?;
        if !matches!(case.shim, ShimOf::None) || case.answered() {
            return None;
        }
        let mut facts = vec![self.process("init", init)];
        if let Some(address) = &case.address {
            facts.push(evidence("kernel", format!("nobody listens on {address}")));
        }
        facts.push(evidence("kernel", "no shim process serves the task"));
        let address = case.written.as_ref().or(case.address.as_ref());
        let death = address.and_then(|address| self.look.witnessed.death_at(address));
        facts.extend(death.map(|death| evidence("supervisor", death)));
        match case.bundle {
            Some(bundle) => facts.push(evidence("bundle", bundle.path.display().to_string())),
            None => facts.push(no_bundle(case)),
        }
        facts.push(self.said_by_containerd(case));
        Some(Suspicion::about(
            case,
            Code::OrphanedTask,
            Hold::Twice,
            facts,
            match case.bundle {
                Some(_) => format!(
                    "{}, before containerd starts: that start ends the workload",
                    action::adopt(&case.name)
                ),
                // containerd would never look for a shim of it.
                None => "end it by hand if it is not wanted: without a bundle no shim can serve it"
                    .to_owned(),
            },
        ))
    }

    /// A living init in the container's cgroup that is not the task's.
    pub(super) fn second_init(&self, case: &Case<'_>, cases: &Cases<'_>) -> Option<Suspicion> {
        if case.kind() == Some(Kind::Foreign) {
            return None;
        }
        let cgroup = case.cgroup?;
        let processes = cgroup.processes.present()?;
        let members: BTreeSet<i32> = processes.iter().map(|process| process.id.pid).collect();
        let own = match &case.init {
            Init::Alive(id) => id.pid,
            // With nothing that names an init, nothing tells which one would be the other.
            Init::None if case.runc.is_none() && case.bundle.is_none() => 0,
            Init::None | Init::Dead(..) | Init::Unknown(_) => return None,
        };
        let shim = case.shim.process().map_or(0, |shim| shim.id.pid);
        let other = processes.iter().find(|process| {
            // Deeper pid namespaces have their first process below one of the container's own.
            process.first_of_namespace
                && process.id.pid != own
                && process.id.start_time != 0
                && process.ppid != shim
                && !members.contains(&process.ppid)
                // Tasks of one name of two containerds share a cgroup.
                && !cases.cases.iter().any(|case| case.init.alive() == Some(process.id))
        })?;
        Some(Suspicion::about(
            case,
            Code::DuplicateWorkload,
            Hold::Twice,
            vec![
                self.process("a second init", other.id),
                evidence("kernel", format!("it is in cgroup {}", cgroup.path)),
                evidence(
                    "kernel",
                    format!("its parent {} is not the task's shim", other.ppid),
                ),
            ],
            "find out which one is meant to run, and end the other by hand",
        ))
    }

    /// Two living inits for one container of one pod.
    pub(super) fn duplicates(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        // A sandbox that was made anew is still the same pod.
        let mut by_name: BTreeMap<(Option<usize>, &Pod), Vec<&Case<'_>>> = BTreeMap::new();
        for case in &cases.cases {
            let Some(pod) = &case.pod else { continue };
            // The sandbox itself has no container name.
            let foreign = case.kind() == Some(Kind::Foreign);
            if case.init.alive().is_some() && !pod.container.is_empty() && !foreign {
                let same = by_name.entry((case.instance, pod)).or_default();
                same.push(case);
            }
        }
        let mut found = Vec::new();
        for ((_, pod), same) in by_name {
            // The newest is the one that the kubelet means; the finding names the oldest.
            let (2.., Some(oldest)) = (same.len(), same.iter().min_by_key(|case| started(case)))
            else {
                continue;
            };
            let facts = same
                .iter()
                .filter_map(|case| {
                    let init = case.init.alive()?;
                    Some(self.process(&format!("{}: init", case.name.1), init))
                })
                .chain([evidence(
                    "bundle",
                    format!(
                        "all are container {} of pod {}/{}",
                        pod.container, pod.namespace, pod.name
                    ),
                )])
                .collect();
            found.push(Suspicion::about(
                oldest,
                Code::DuplicateWorkload,
                Hold::Twice,
                facts,
                "find out which one is meant to run, and end the other by hand",
            ));
        }
        found
    }

    pub(super) fn task_unknown(&self, case: &Case<'_>) -> Option<Suspicion> {
        let init = case.init.alive()?;
        let shim = case.shim.process()?;
        if case.containerd != Known::No || case.kind() == Some(Kind::Foreign) {
            return None;
        }
        if !self.owns(case, shim) {
            return None;
        }
        // A task being created is not listed yet. One that was started is.
        match case.state().map(|state| state.phase) {
            Some(Phase::Running | Phase::Paused | Phase::Pausing) => {}
            Some(Phase::Created | Phase::Stopped | Phase::Unknown) | None => {
                if self.age_of(init) < self.settings.settle {
                    return None;
                }
            }
        }
        // A shim that answers nothing is another finding, and its task is known to nobody then.
        if case
            .answer
            .is_some_and(|answer| unanswered(answer).is_some())
        {
            return None;
        }
        Some(Suspicion::about(
            case,
            Code::TaskUnknownToContainerd,
            Hold::Twice,
            vec![
                self.process("init", init),
                self.process("shim", shim.id),
                match case.bundle {
                    Some(bundle) => evidence("bundle", bundle.path.display().to_string()),
                    None => evidence("bundle", "there is none"),
                },
                self.said_by_containerd(case),
            ],
            format!(
                "if it is not wanted: {}; nobody can end it through containerd",
                action::repair_task(&case.name, Some(Word::Kill))
            ),
        ))
    }

    pub(super) fn stuck_task(&self, case: &Case<'_>) -> Option<Suspicion> {
        if case.kind() == Some(Kind::Foreign) {
            return None;
        }
        let state = case.state()?;
        let shim_says = evidence("shim", format!("the task is {}", state.phase.word()));
        let publish = || action::repair_task(&case.name, None);
        let (facts, hold, remedy) = match (state.phase, &case.init, case.containerd) {
            (Phase::Running, Init::Dead(_, why), Known::Yes(task))
                if task.phase == Phase::Running =>
            {
                (
                    vec![evidence("kernel", format!("the init ended: {why}"))],
                    Hold::Settle,
                    format!("{}: publishes the exit, if it was observed", publish()),
                )
            }
            (Phase::Stopped, Init::Dead(_, why), Known::Yes(task))
                if task.phase == Phase::Running =>
            {
                (
                    vec![evidence("kernel", format!("the init ended: {why}"))],
                    Hold::Twice,
                    format!("{}: publishes the exit", publish()),
                )
            }
            (Phase::Stopped, Init::Dead(..), Known::Yes(task)) if task.phase == Phase::Stopped => {
                let left = case.cgroup?.processes.present()?;
                if left.is_empty() {
                    return None;
                }
                let pids: Vec<String> = left
                    .iter()
                    .take(10)
                    .map(|process| process.id.pid.to_string())
                    .collect();
                (
                    vec![evidence(
                        "kernel",
                        format!(
                            "its cgroup still holds {} processes: {}",
                            left.len(),
                            pids.join(" ")
                        ),
                    )],
                    Hold::Twice,
                    "delete the task; what is left in its cgroup is named here".to_owned(),
                )
            }
            (Phase::Created, Init::Alive(init), Known::Yes(_) | Known::CannotSay)
                if self.age_of(*init) >= CREATED_TOO_LONG =>
            {
                (
                    vec![self.process("init", *init)],
                    Hold::Once,
                    "start or delete the task: its client went away".to_owned(),
                )
            }
            (Phase::Paused | Phase::Pausing, Init::Dead(_, why), _) => (
                vec![evidence("kernel", format!("the init ended: {why}"))],
                Hold::Twice,
                "resume the task: its exit waits for that".to_owned(),
            ),
            (
                Phase::Running
                | Phase::Stopped
                | Phase::Created
                | Phase::Paused
                | Phase::Pausing
                | Phase::Unknown,
                Init::None | Init::Alive(_) | Init::Dead(..) | Init::Unknown(_),
                Known::Yes(_) | Known::No | Known::CannotSay,
            ) => return None,
        };
        let mut all = vec![shim_says];
        all.extend(facts);
        all.push(self.said_by_containerd(case));
        Some(Suspicion::about(case, Code::StuckTask, hold, all, remedy))
    }

    pub(super) fn exit_unreported(&self, case: &Case<'_>) -> Option<Suspicion> {
        let state = case.state()?;
        let down = matches!(self.instance(case)?.api, Api::Down);
        let ended = matches!(case.init, Init::Dead(..));
        // Ours names a pid to containerd until the task is deleted, so that no release takes it
        // for leaked, and keeps its events until they are acknowledged: nothing is lost.
        let keeps = matches!(case.kind(), Some(Kind::Ours | Kind::Foreign));
        if state.phase != Phase::Stopped || !down || !ended || keeps {
            return None;
        }
        let at = state.exited_at.map_or_else(String::new, |seconds| {
            format!(" at {}", Timestamp { seconds, nanos: 0 })
        });
        Some(Suspicion::about(
            case,
            Code::ExitUnreported,
            Hold::Twice,
            vec![
                evidence(
                    "shim",
                    format!("the task exited with {}{at}", state.exit_status),
                ),
                self.said_by_containerd(case),
            ],
            "note its status now: containerd 1.7 and later forget it at their start",
        ))
    }
}

/// Why a case has no bundle.
fn no_bundle(case: &Case<'_>) -> Evidence {
    let named = case
        .runc
        .and_then(|entry| entry.state.present()?.bundle.as_deref());
    match (case.instance, named) {
        (None, Some(path)) => evidence(
            "runc",
            format!(
                "its bundle is {}, of a containerd that is not known here",
                path.display()
            ),
        ),
        (Some(_), _) | (None, None) => evidence("bundle", "there is none"),
    }
}

fn started(case: &Case<'_>) -> u64 {
    case.init.alive().map_or(0, |id| id.start_time)
}
