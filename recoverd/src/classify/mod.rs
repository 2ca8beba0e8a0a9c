//! Judges cases and leftovers: one function for each finding of the contract. Pure. What is wrong
//! with a task is in `tasks`, with a shim process in `shims`, and what stays behind in `leftovers`.
//!
//! Two rules hold for all of them. *Unknown* is no finding: what could not be seen is a gap. And
//! what is normal for a moment (a task being created or deleted, a client that has made its fifos
//! and not yet its task) must be told from what stays: by age, by a verb that runs right now, or
//! by [`Hold`], which asks for another look.

mod action;
mod leftovers;
mod shims;
mod tasks;

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use recoverd_common::{proc::ProcessId, seen::Seen, timestamp::Timestamp};

use crate::{
    correlate::{Case, Cases, Init, Known},
    facts::{Address, Api, Connection, Gap, Instance, Look, TaskName, one_line},
    findings::{Code, Evidence, Finding, Subject},
};

pub use shims::outdated;

/// Ages and limits that decide.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Leaked resources younger than this are not reported.
    pub min_age: Duration,
    /// A shim without task, or a phase that contradicts the kernel, is normal for this long.
    pub settle: Duration,
    /// Percent of a file system in use.
    pub run_full: u64,
}

/// How often a finding must be seen before it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Once: it is no matter of moments.
    Once,
    /// In a second look too.
    Twice,
    /// In every look for as long as [`Settings::settle`].
    Settle,
}

/// A finding, if it stays.
#[derive(Debug, Clone)]
pub struct Suspicion {
    /// What it would be.
    pub finding: Finding,
    /// How often it must be seen.
    pub hold: Hold,
    /// The socket to ask again, when the shim's answers are part of it.
    pub address: Option<Address>,
    /// Its containerd, when known.
    pub instance: Option<usize>,
}

/// Judges everything.
pub fn classify(look: &Look, cases: &Cases<'_>, settings: &Settings) -> Vec<Suspicion> {
    let context = Context { look, settings };
    let mut found = Vec::new();
    for case in &cases.cases {
        found.extend(context.orphaned_task(case));
        found.extend(context.unresponsive(case));
        found.extend(context.second_init(case, cases));
        found.extend(context.socket_missing(case));
        found.extend(context.task_unknown(case));
        found.extend(context.leaked_shim(case, cases));
        found.extend(context.stuck_task(case));
        found.extend(context.exit_unreported(case));
        found.extend(context.stale_bundle(case));
    }
    found.extend(context.duplicates(cases));
    for shim in &look.shims {
        found.extend(context.outdated(shim, cases));
        found.extend(context.bloated(shim, cases));
    }
    for shim in &cases.idle_shims {
        found.extend(context.idle_shim(shim));
    }
    found.extend(context.stale_sockets(cases));
    found.extend(context.records(cases));
    found.extend(context.mounts(cases));
    found.extend(context.cgroups(cases));
    found.extend(context.fifos(cases));
    found.extend(context.runc_states(cases));
    found.extend(context.full());
    found.extend(context.execs(cases));
    found.sort_by(|a, b| {
        let key = |s: &Suspicion| {
            (
                s.finding.severity,
                s.finding.code,
                s.finding.subject.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    found
}

fn evidence(by: &'static str, fact: impl Into<String>) -> Evidence {
    Evidence {
        by,
        fact: one_line(&fact.into()),
    }
}

fn task_subject(name: &TaskName) -> Subject {
    Subject::Task {
        namespace: name.0.clone(),
        id: name.1.clone(),
    }
}

fn path_subject(path: &Path) -> Subject {
    Subject::Path {
        path: path.display().to_string(),
    }
}

/// What every judgement reads beside its case.
struct Context<'a> {
    look: &'a Look,
    settings: &'a Settings,
}

impl Suspicion {
    fn new(
        code: Code,
        subject: Subject,
        hold: Hold,
        evidence: Vec<Evidence>,
        action: impl Into<String>,
    ) -> Suspicion {
        Suspicion {
            finding: Finding {
                code,
                severity: code.severity(),
                subject,
                evidence,
                action: action.into(),
            },
            hold,
            address: None,
            instance: None,
        }
    }

    /// A suspicion about a case.
    fn about(
        case: &Case<'_>,
        code: Code,
        hold: Hold,
        evidence: Vec<Evidence>,
        action: impl Into<String>,
    ) -> Suspicion {
        Suspicion {
            address: case.address.clone(),
            instance: case.instance,
            ..Suspicion::new(code, task_subject(&case.name), hold, evidence, action)
        }
    }
}

impl Context<'_> {
    fn instance(&self, case: &Case<'_>) -> Option<&Instance> {
        self.look.instances.get(case.instance?)
    }

    fn process(&self, what: &str, id: ProcessId) -> Evidence {
        let since = Timestamp::from(self.look.host.started_at(id));
        evidence("kernel", format!("{what} {} lives since {since}", id.pid))
    }

    fn age(&self, time: SystemTime) -> Duration {
        self.look.at.duration_since(time).unwrap_or_default()
    }

    fn age_of(&self, id: ProcessId) -> Duration {
        self.age(self.look.host.started_at(id))
    }

    /// Old enough to be a leak; what has no age any more went away.
    fn old(&self, changed_at: Option<SystemTime>) -> bool {
        changed_at.is_some_and(|at| self.age(at) >= self.settings.min_age)
    }

    fn said_by_containerd(&self, case: &Case<'_>) -> Evidence {
        let fact = match (case.containerd, self.instance(case)) {
            (Known::Yes(task), _) => format!("lists the task as {}", task.phase.word()),
            (Known::No, Some(i)) => format!("at {} is up and does not list the task", i.address),
            (Known::No, None) => "does not list the task".into(),
            (Known::CannotSay, Some(i)) => match &i.api {
                Api::Down => format!("at {} is down", i.address),
                Api::Unknown(why) => format!("at {} cannot be asked: {why}", i.address),
                Api::Up(_) => format!("at {} did not list its tasks in time", i.address),
            },
            (Known::CannotSay, None) => "is not known: no bundle or shim names it".into(),
        };
        evidence("containerd", fact)
    }
}

/// What the joined facts leave unknown, beside what the look itself could not see.
pub fn gaps(look: &Look, cases: &Cases<'_>) -> Vec<Gap> {
    let mut found = look.gaps.clone();
    // Without the right to look, one reason says it all.
    if !look.host.root {
        return found;
    }
    for case in &cases.cases {
        let instance = case.instance.and_then(|at| look.instances.get(at));
        let mut gap = |what: String, why: &str| {
            found.push(Gap {
                instance: instance.map(|instance| instance.address.clone()),
                ..Gap::new(what, why)
            });
        };
        if let Some(bundle) = case.bundle {
            for (file, why) in bundle.unreadable() {
                gap(bundle.path.join(file).display().to_string(), why);
            }
        }
        if let Some(entry) = case.runc
            && let Seen::Unknown(why) = &entry.state
        {
            gap(entry.path.join("state.json").display().to_string(), why);
        }
        if let Init::Unknown(why) = &case.init {
            gap(format!("init of {}/{}", case.name.0, case.name.1), why);
        }
        if let (Some(address), Some(answer)) = (&case.address, case.answer)
            && let Connection::Failed(why) = &answer.connection
        {
            gap(address.clone(), why);
        }
    }
    for instance in &look.instances {
        if instance.api.up().is_some_and(|api| api.tasks.is_none()) {
            let what = format!("tasks of containerd at {}", instance.address);
            found.push(Gap::of(instance, what, "it did not list them in time"));
        }
    }
    found.sort();
    found.dedup();
    found
}

#[cfg(test)]
pub(crate) mod tests;
