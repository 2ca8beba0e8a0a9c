//! Will a start of containerd be harmless now? Follows, for each bundle, the steps that
//! containerd takes at its start, and says what it would do (pure: facts in, reasons out).
//!
//! ```text
//! bundle ─▶ shim-binary-path ─▶ address or bootstrap.json ─▶ Connect (5 s) ─▶ Pids (1.7+)
//!   │ empty    │ missing, binary gone   │ missing, not understood  │ no answer    │ none
//!   ▼          ▼                        ▼                          ▼              ▼
//! dropped    dropped                  killed                     killed         deleted
//! ```
//!
//! *Dropped*: the workload goes on, unknown to containerd. *Killed*: `<shim> delete` ends it.
//! What cannot be seen is a gap; it never counts as fine.

mod bundle;
mod host;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    correlate::Case,
    facts::{Api, Gap, Instance, Look, Premises, TaskName, one_line},
    findings::{Code, Finding, Severity, Subject},
    release::Release,
};

/// What a reason is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// A finding of the scan.
    Finding,
    /// The bundle itself.
    Bundle,
    /// The binary that containerd would run.
    ShimBinary,
    /// Where containerd would look for the shim.
    ShimAddress,
    /// Whether shim and containerd understand each other.
    Protocol,
    /// What the shim answers.
    ShimAnswer,
    /// How far the task is.
    Phase,
    /// The CRI's names of sandboxes.
    SandboxName,
    /// Sandboxes that a shim's sandbox service runs.
    ShimSandbox,
    /// The two releases.
    Hop,
    /// The systemd unit.
    Unit,
    /// The state folder's file system.
    StateFolder,
}

impl Check {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Check::Finding => "finding",
            Check::Bundle => "bundle",
            Check::ShimBinary => "shim-binary",
            Check::ShimAddress => "shim-address",
            Check::Protocol => "protocol",
            Check::ShimAnswer => "shim-answer",
            Check::Phase => "phase",
            Check::SandboxName => "sandbox-name",
            Check::ShimSandbox => "shim-sandbox",
            Check::Hop => "hop",
            Check::Unit => "unit",
            Check::StateFolder => "state-folder",
        }
    }
}

/// Why a start would not be harmless; of severity info when it is only worth knowing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reason {
    /// Critical: a workload is lost, or containerd does not start.
    pub severity: Severity,
    /// About what.
    pub check: Check,
    /// About whom: a task, an instance, a unit, a folder.
    pub subject: String,
    /// One line.
    pub why: String,
}

/// A containerd and the release that it is now and that is to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hop {
    /// Which containerd.
    pub address: String,
    /// What runs now, as it says.
    pub from: Option<String>,
    /// What is to start.
    pub to: Option<String>,
}

/// What preflight found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The containerds that were judged.
    pub instances: Vec<Hop>,
    /// Worst first.
    pub reasons: Vec<Reason>,
    /// What could not be seen.
    pub gaps: Vec<Gap>,
}

impl Report {
    /// Reasons against a start: those that are not only worth knowing.
    pub fn against(&self) -> usize {
        let against = |reason: &&Reason| match reason.severity {
            Severity::Critical | Severity::Warning => true,
            Severity::Info => false,
        };
        self.reasons.iter().filter(against).count()
    }

    /// 0 harmless, 1 reasons against, 3 could not see everything.
    pub fn exit_code(&self) -> u8 {
        match (self.gaps.is_empty(), self.against()) {
            (false, _) => 3,
            (true, 0) => 0,
            (true, _) => 1,
        }
    }
}

/// What is judged.
#[derive(Debug)]
pub struct Input<'a> {
    /// One look.
    pub look: &'a Look,
    /// Its tasks.
    pub cases: &'a [Case<'a>],
    /// What the scan finds in it.
    pub findings: &'a [Finding],
    /// What it could not see.
    pub gaps: &'a [Gap],
    /// The address of the only containerd to judge.
    pub only: Option<&'a str>,
    /// What only preflight looks at.
    pub premises: &'a Premises,
    /// The release that is to start; else the one that runs.
    pub to: Option<Release>,
    /// Percent from which on a file system is nearly full.
    pub run_full: u8,
}

/// Judges.
pub fn judge(input: &Input<'_>) -> Report {
    let mut judge = Judge {
        input,
        reasons: BTreeSet::new(),
        gaps: input.gaps.iter().cloned().collect(),
        told: told(input.findings),
    };
    if input.look.instances.is_empty() {
        judge.gap(
            "containerd",
            "none was found; name it with --address and --state",
        );
    }
    let mut hops = Vec::new();
    let mut latest = None;
    for (at, instance) in input.look.instances.iter().enumerate() {
        if input.only.is_some_and(|only| only != instance.address) {
            continue;
        }
        if judge.is_empty_place(at, instance) {
            continue;
        }
        let running = instance.api.up().map(|api| api.version.as_str());
        let from = running.and_then(Release::parse);
        let to = input.to.or(from);
        latest = latest.max(to);
        judge.hop(instance, running, from, to);
        judge.sandboxes(at, instance, to);
        judge.unheard(at, instance, to);
        judge.state_folder(instance);
        for case in input.cases.iter().filter(|case| case.instance == Some(at)) {
            if let Some(bundle) = case.bundle {
                judge.bundle(instance, case, bundle, to);
            }
        }
        hops.push(Hop {
            address: instance.address.clone(),
            from: running.map(str::to_owned),
            to: to.map(|release| release.to_string()),
        });
    }
    for finding in input.findings {
        judge.finding(finding, input.to.or(latest));
    }
    for (namespace, id) in &input.look.busy_verbs {
        let why = "its shim runs `start` or `delete` right now: wait until it is done";
        judge.add(Severity::Warning, Check::Phase, task(namespace, id), why);
    }
    for filesystem in &input.look.filesystems {
        judge.room(filesystem);
    }
    judge.unit(input.to.or(latest));
    Report {
        instances: hops,
        reasons: judge.reasons.into_iter().collect(),
        gaps: judge.gaps.into_iter().collect(),
    }
}

/// Tasks of which a finding already says that containerd's start ends them because of their shim.
fn told(findings: &[Finding]) -> BTreeSet<TaskName> {
    let ends = |code: Code| {
        matches!(
            code,
            Code::OrphanedTask | Code::UnresponsiveShim | Code::SocketMissing
        )
    };
    let named = |finding: &Finding| match &finding.subject {
        Subject::Task { namespace, id } => Some((namespace.clone(), id.clone())),
        Subject::Shim { .. } | Subject::Path { .. } => None,
    };
    let ending = findings.iter().filter(|finding| ends(finding.code));
    ending.filter_map(named).collect()
}

fn task(namespace: &str, id: &str) -> String {
    format!("{namespace}/{id}")
}

/// What would happen to a workload that may be alive.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Killed,
    Dropped,
}

struct Judge<'a> {
    input: &'a Input<'a>,
    reasons: BTreeSet<Reason>,
    gaps: BTreeSet<Gap>,
    told: BTreeSet<TaskName>,
}

impl Judge<'_> {
    fn add(&mut self, severity: Severity, check: Check, subject: String, why: impl Into<String>) {
        self.reasons.insert(Reason {
            severity,
            check,
            subject: one_line(&subject),
            why: one_line(&why.into()),
        });
    }

    fn gap(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.gaps.insert(Gap::new(what, why));
    }

    /// One of several places of containerd at which none runs and nothing is left: no start of it
    /// can cost anything.
    fn is_empty_place(&self, at: usize, instance: &Instance) -> bool {
        let bundle = |case: &Case<'_>| case.instance == Some(at) && case.bundle.is_some();
        self.input.look.instances.len() > 1
            && self.input.only.is_none()
            && matches!(instance.api, Api::Down)
            && instance.daemon.is_none()
            && !self.input.cases.iter().any(bundle)
    }

    fn finding(&mut self, finding: &Finding, to: Option<Release>) {
        let asks_pids = !to.is_some_and(Release::is_1_6);
        let effect = match finding.code {
            Code::OrphanedTask | Code::SocketMissing => {
                Some((Severity::Critical, "containerd's start kills the workload"))
            }
            Code::UnresponsiveShim => Some((
                Severity::Critical,
                "containerd's start waits 5 s for it, then kills the workload",
            )),
            Code::DuplicateWorkload => Some((
                Severity::Warning,
                "containerd knows one of the two at most; end the other one first",
            )),
            Code::StuckTask => Some((
                Severity::Warning,
                "containerd's start may drop it with its exit status",
            )),
            Code::ExitUnreported if asks_pids => Some((
                Severity::Warning,
                "containerd's start deletes it and its exit status is lost",
            )),
            // 1.6 asks the shim and keeps the status.
            Code::ExitUnreported => None,
            Code::UnreadableRecord => Some((
                Severity::Warning,
                "should its shim die, nobody can take over from this record",
            )),
            // Told with numbers by `room`.
            Code::RunNearlyFull => None,
            // A start changes nothing for these, or cleans them without anybody's loss.
            Code::TaskUnknownToContainerd
            | Code::LeakedShim
            | Code::OutdatedShim
            | Code::StaleBundle
            | Code::StaleSocket
            | Code::StaleRecord
            | Code::LeakedMount
            | Code::LeakedCgroup
            | Code::LeakedFifo
            | Code::LeakedRuncState
            | Code::LeakedExec
            | Code::BloatedShim
            | Code::Foreign => None,
        };
        if let Some((severity, effect)) = effect {
            let why = format!("{}: {effect}", finding.code.word());
            self.add(severity, Check::Finding, finding.subject.text(), why);
        }
    }
}
