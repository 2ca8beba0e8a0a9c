//! What `repair` would do: findings and facts in, steps out. Pure.
//!
//! ```text
//! findings + cases + grounds + policy ──▶ Plan { steps, by_hand, left_out }
//! ```
//!
//! A step says what it is *because* of, what it *requires* (looked at again just before), what it
//! *does* (every pid, path and signal by name), what it *promises* (looked at afterwards) and
//! whether it *destroys*. Where a finding has no step there is a line that says why, and what
//! somebody can do by hand.
//!
//! Three rules hold for every step. What is foreign is in none. *Unknown* leads to no step that
//! ends a process or deletes. And a process is named by pid and start time, never by pid alone.

mod files;
mod step;
mod tasks;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use recoverd_common::{
    proc::{FileId, ProcessId},
    seen::Seen,
};
use serde::Serialize;
pub use step::{Act, Exited, PATIENCE, Promise, Requirement, Step};

use crate::{
    adopt::Decision,
    classify::Suspicion,
    correlate::{Case, Cases, Kind, Known, kind},
    facts::{Api, Grounds, Instance, Look, TaskName, one_line},
    findings::{Code, Subject},
    permit::Word,
};

/// What the operator wants.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What is younger stays.
    pub min_age: Duration,
    /// At most so many steps in one run, of those that may be done.
    pub max_actions: usize,
    /// What `--allow` says. Other steps are in the plan too, and take nobody's place.
    pub allowed: BTreeSet<Word>,
    /// Findings that are to be mended.
    pub only: Only,
}

/// `--only`, as it was typed; nothing means everything.
#[derive(Debug, Clone, Default)]
pub struct Only {
    /// These findings.
    pub codes: BTreeSet<Code>,
    /// These tasks.
    pub tasks: BTreeSet<TaskName>,
}

impl Only {
    fn wants(&self, code: Code, task: Option<&TaskName>) -> bool {
        let code_fits = self.codes.is_empty() || self.codes.contains(&code);
        let task_fits = self.tasks.is_empty() || task.is_some_and(|t| self.tasks.contains(t));
        code_fits && task_fits
    }
}

/// What a plan is made of.
pub struct Input<'a> {
    /// The look.
    pub look: &'a Look,
    /// Its cases.
    pub cases: &'a Cases<'a>,
    /// What was found, worst first.
    pub findings: Vec<&'a Suspicion>,
    /// Who could be adopted.
    pub adoption: &'a Decision,
    /// What else was looked at.
    pub grounds: &'a Grounds,
    /// Exits that containerd was told of before: by whom they were of.
    pub told: &'a BTreeSet<(TaskName, ProcessId)>,
    /// What was tried in this run. It is not tried again.
    pub tried: &'a [&'a Act],
}

/// What is to be done.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// What is for people to do, or for nobody.
    pub by_hand: Vec<ByHand>,
    /// Steps beyond the limit of one run.
    pub left_out: usize,
}

/// A finding without a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ByHand {
    /// Which finding.
    pub code: Code,
    /// About what.
    pub subject: String,
    /// Why nothing is done, and what could be, one line.
    pub why: String,
}

/// The answer for one finding.
enum Answer {
    Step(Box<Step>),
    ByHand(String),
    /// Another finding's step does it.
    Covered,
}

fn by_hand(why: impl Into<String>) -> Answer {
    Answer::ByHand(one_line(&why.into()))
}

/// Plans.
pub fn plan(input: &Input<'_>, policy: &Policy) -> Plan {
    let mut planner = Planner {
        input,
        policy,
        adopted: BTreeSet::new(),
        replaced: 0,
    };
    let mut plan = Plan::default();
    for suspicion in &input.findings {
        let finding = &suspicion.finding;
        let task = planner.task_of(suspicion);
        if !policy.only.wants(finding.code, task.as_ref()) {
            continue;
        }
        let subject = one_line(&finding.subject.text());
        match planner.answer(suspicion, task.as_ref()) {
            Answer::Step(step) => plan.steps.push(*step),
            Answer::ByHand(why) => plan.by_hand.push(ByHand {
                code: finding.code,
                subject,
                why,
            }),
            Answer::Covered => {}
        }
    }
    // Who adopts sets the record aside that is in the way.
    let set_aside: BTreeSet<PathBuf> = plan
        .steps
        .iter()
        .filter_map(|step| match &step.does {
            Act::Adopt(order) | Act::Replace(order, _) => order.unreadable.clone(),
            Act::EndShim(_)
            | Act::EndInit(_)
            | Act::Publish(_)
            | Act::RemoveBundle { .. }
            | Act::Quarantine { .. }
            | Act::RemoveSocket { .. }
            | Act::RemoveRecord { .. }
            | Act::Unmount { .. }
            | Act::RemoveCgroup(_)
            | Act::RemoveFifos { .. }
            | Act::RemoveRuncState { .. } => None,
        })
        .collect();
    plan.steps.retain(
        |step| !matches!(&step.does, Act::Quarantine { path, .. } if set_aside.contains(path)),
    );
    // Findings come worst first, and a sort keeps that among equals.
    plan.steps.sort_by_key(|step| step.does.rank());
    limit(&mut plan, input.tried, policy);
    plan
}

/// Leaves what was tried, and of what may be done as much as one run may do. What may not be done is
/// only shown, so that it keeps nothing from being done however much of it there is.
fn limit(plan: &mut Plan, tried: &[&Act], policy: &Policy) {
    let mut room = policy.max_actions;
    let mut left_out = 0_usize;
    plan.steps.retain(|step| {
        if tried.contains(&&step.does) {
            return false;
        }
        let may = step
            .destroys
            .is_none_or(|word| policy.allowed.contains(&word));
        match (may, room.checked_sub(1)) {
            (false, _) => true,
            (true, Some(less)) => {
                room = less;
                true
            }
            (true, None) => {
                left_out = left_out.saturating_add(1);
                false
            }
        }
    });
    plan.left_out = left_out;
}

struct Planner<'a, 'p> {
    input: &'p Input<'a>,
    policy: &'p Policy,
    /// Sockets that get a successor already.
    adopted: BTreeSet<PathBuf>,
    /// Shims that are replaced already.
    replaced: usize,
}

impl<'a> Planner<'a, '_> {
    fn answer(&mut self, suspicion: &Suspicion, task: Option<&TaskName>) -> Answer {
        let finding = &suspicion.finding;
        if let Some(name) = task
            && let Some(why) = self.foreign(name, suspicion.instance)
        {
            return by_hand(why);
        }
        match finding.code {
            Code::OrphanedTask | Code::UnresponsiveShim | Code::SocketMissing => {
                self.adopt(suspicion)
            }
            Code::TaskUnknownToContainerd => self.end_init(suspicion),
            Code::LeakedShim => self.end_shim(suspicion),
            Code::StuckTask | Code::ExitUnreported => self.publish(suspicion),
            Code::StaleBundle => self.bundle(suspicion),
            Code::StaleSocket => self.socket(suspicion),
            Code::StaleRecord => self.record(suspicion),
            Code::UnreadableRecord => self.unreadable(suspicion),
            Code::LeakedMount => self.mount(suspicion),
            Code::LeakedCgroup => self.cgroup(suspicion),
            Code::LeakedFifo => self.fifos(suspicion),
            Code::LeakedRuncState => self.runc_state(suspicion),
            Code::OutdatedShim | Code::BloatedShim => {
                by_hand(format!("repair ends no working shim: {}", finding.action))
            }
            Code::DuplicateWorkload | Code::RunNearlyFull | Code::LeakedExec => {
                by_hand(finding.action.clone())
            }
            Code::Foreign => by_hand(format!("foreign, never touched: {}", finding.action)),
        }
    }

    fn look(&self) -> &'a Look {
        self.input.look
    }

    fn instance(&self, suspicion: &Suspicion) -> Option<&'a Instance> {
        self.look().instances.get(suspicion.instance?)
    }

    /// The case that a finding is about.
    fn case(&self, suspicion: &Suspicion) -> Option<&'a Case<'a>> {
        let Subject::Task { namespace, id } = &suspicion.finding.subject else {
            return None;
        };
        self.input.cases.cases.iter().find(|case| {
            case.name.0 == *namespace && case.name.1 == *id && case.instance == suspicion.instance
        })
    }

    /// The task that a finding is about, also where its subject is a path.
    fn task_of(&self, suspicion: &Suspicion) -> Option<TaskName> {
        let look = self.look();
        match &suspicion.finding.subject {
            Subject::Task { namespace, id } => Some((namespace.clone(), id.clone())),
            Subject::Shim { shim } => look
                .shims
                .iter()
                .find(|found| found.id.pid == *shim)
                .map(|found| (found.namespace.clone(), found.task.clone())),
            Subject::Path { path } => {
                let path = Path::new(path);
                self.task_of_socket(path)
                    .or_else(|| self.task_of_mount(path))
                    .or_else(|| self.task_of_cgroup(path))
                    .or_else(|| self.task_of_runc(path))
                    .or_else(|| self.task_of_fifos(path))
            }
        }
    }

    fn task_of_runc(&self, path: &Path) -> Option<TaskName> {
        let entry = self.look().runc.iter().find(|entry| entry.path == path)?;
        Some(entry.name.clone())
    }

    /// Why a task is none of ours, or might be none.
    fn foreign(&self, name: &TaskName, instance: Option<usize>) -> Option<String> {
        const FOREIGN: &str = "foreign, never touched";
        let look = self.look();
        for case in &self.input.cases.cases {
            let same = case.name == *name && (instance.is_none() || case.instance == instance);
            if same && case.kind() == Some(Kind::Foreign) {
                return Some(format!("{FOREIGN}: its shim is no runc shim"));
            }
        }
        for facts in &look.bundles {
            let bundle = &facts.bundle;
            let same = bundle.namespace.as_str() == name.0
                && bundle.id.as_str() == name.1
                && instance.is_none_or(|at| at == facts.instance);
            if !same {
                continue;
            }
            let made_by_runc = bundle.runtime.present().is_some();
            match &bundle.shim_binary {
                Seen::Present(binary) => {
                    let file = binary.file_name().unwrap_or_default().to_string_lossy();
                    if kind(&file, made_by_runc) == Kind::Foreign {
                        return Some(format!("{FOREIGN}: its shim is {file}"));
                    }
                }
                Seen::Unknown(why) => {
                    return Some(format!(
                        "whose shim it had is unknown: shim-binary-path {why}"
                    ));
                }
                Seen::Absent => {}
            }
        }
        let runtimes = look.instances.iter().enumerate().filter_map(|(at, found)| {
            let of_it = instance.is_none_or(|instance| instance == at);
            let container = found.api.up()?.containers.get(name)?;
            of_it.then_some(container.runtime.as_str())
        });
        for runtime in runtimes {
            if foreign_runtime(runtime) {
                return Some(format!("{FOREIGN}: its runtime is {runtime}"));
            }
        }
        None
    }

    fn old(&self, changed_at: Option<SystemTime>) -> bool {
        changed_at.is_some_and(|at| {
            let age = self.look().at.duration_since(at).unwrap_or_default();
            age >= self.policy.min_age
        })
    }

    fn young(&self) -> Answer {
        by_hand(format!(
            "younger than {} s (--min-age): its client may be at work",
            self.policy.min_age.as_secs()
        ))
    }

    fn file(&self, path: &Path) -> Option<FileId> {
        self.input.grounds.files.get(path)?.present().copied()
    }

    /// What must hold of containerd for something of a task to be removed: it is down, or up
    /// without the task. `None` when that is not known.
    fn not_in_use(&self, instance: &Instance, name: &TaskName) -> Option<Requirement> {
        let address = instance.address.clone();
        match &instance.api {
            // While it starts it listens nowhere, and ends and begins with shims.
            Api::Down if instance.daemon.is_some() => None,
            Api::Down => Some(Requirement::Down(address)),
            Api::Unknown(_) => None,
            Api::Up(api) => {
                let tasks = api.tasks.as_ref()?;
                let silent = api.by_record && !api.containers.contains_key(name);
                let known = tasks.contains_key(name) || silent;
                (!known).then(|| Requirement::Unlisted(address, name.clone()))
            }
        }
    }

    fn step(
        &self,
        suspicion: &Suspicion,
        task: Option<TaskName>,
        requires: Vec<Requirement>,
        does: Act,
        promises: Vec<Promise>,
        destroys: Option<Word>,
    ) -> Answer {
        Answer::Step(Box::new(Step {
            code: suspicion.finding.code,
            subject: one_line(&suspicion.finding.subject.text()),
            task,
            requires,
            does,
            promises,
            destroys,
        }))
    }
}

/// A runtime by its name or the path of its shim: not runc's, and not ours.
fn foreign_runtime(runtime: &str) -> bool {
    if runtime.is_empty() {
        return false;
    }
    if let Some(file) = Path::new(runtime).file_name()
        && runtime.starts_with('/')
    {
        // A file of any other name may be a runc shim; then something else says so.
        let file = file.to_string_lossy();
        return file.starts_with("containerd-shim-") && kind(&file, true) == Kind::Foreign;
    }
    // `io.containerd.runc.v2` starts `containerd-shim-runc-v2`.
    let mut parts = runtime.rsplit('.');
    match (parts.next(), parts.next()) {
        (Some(version), Some(name)) => {
            let file = format!("containerd-shim-{name}-{version}");
            kind(&file, true) == Kind::Foreign
        }
        (Some(_) | None, _) => true,
    }
}

/// containerd lists the task as running.
fn listed_as_running(case: &Case<'_>) -> bool {
    matches!(case.containerd, Known::Yes(task) if task.phase == crate::facts::Phase::Running)
}

#[cfg(test)]
mod tests;
