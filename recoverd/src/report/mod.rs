//! What is told of a look: everything, or the part that the command line narrows to. Pure; how it
//! is printed is in the files below.

pub mod json;
pub mod progress;
pub mod prometheus;
pub mod table;

use crate::{
    Verdict,
    classify::Suspicion,
    correlate::{Case, Cases, Init, Known, ShimOf},
    facts::{Gap, Instance, Look},
    findings::{Code, Severity, Subject},
    verify::Examined,
};

/// What the command line narrows a report to.
#[derive(Debug, Clone, Default)]
pub struct Narrow {
    /// The address of one containerd.
    pub address: Option<String>,
    /// One containerd namespace.
    pub namespace: Option<String>,
}

/// A report's content, sorted.
pub struct Report<'a> {
    /// The look.
    pub look: &'a Look,
    /// Containerds told of.
    pub instances: Vec<&'a Instance>,
    /// Tasks told of.
    pub cases: Vec<&'a Case<'a>>,
    /// Findings told of, worst first.
    pub findings: Vec<&'a Suspicion>,
    /// What could not be seen.
    pub gaps: Vec<&'a Gap>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl<'a> Report<'a> {
    /// Narrows.
    pub fn new(examined: &'a Examined, cases: &'a Cases<'a>, narrow: &Narrow) -> Self {
        let look = &examined.look;
        let chosen = |at: usize| match (&narrow.address, look.instances.get(at)) {
            (Some(address), Some(instance)) => instance.address == *address,
            (None, _) => true,
            (Some(_), None) => false,
        };
        let of_instance = |instance: Option<usize>| match (&narrow.address, instance) {
            (None, _) => true,
            (Some(_), Some(at)) => chosen(at),
            // What nobody claims is told where there is only one who could.
            (Some(_), None) => look.instances.len() <= 1,
        };
        let of_namespace = |namespace: &str| {
            narrow
                .namespace
                .as_deref()
                .is_none_or(|only| only == namespace)
        };
        let finding = |s: &&Suspicion| {
            of_instance(s.instance)
                && match &s.finding.subject {
                    Subject::Task { namespace, .. } => of_namespace(namespace),
                    Subject::Shim { .. } | Subject::Path { .. } => narrow.namespace.is_none(),
                }
        };
        let gap = |gap: &&Gap| match (&gap.instance, &narrow.address) {
            (Some(of), Some(only)) => of == only,
            (None, _) | (Some(_), None) => true,
        };
        Self {
            look,
            instances: (0..look.instances.len())
                .filter(|at| chosen(*at))
                .filter_map(|at| look.instances.get(at))
                .collect(),
            cases: cases
                .cases
                .iter()
                .filter(|case| is_task(case))
                .filter(|case| of_instance(case.instance) && of_namespace(&case.name.0))
                .collect(),
            findings: examined.suspicions.iter().filter(finding).collect(),
            gaps: examined.gaps.iter().filter(gap).collect(),
            seconds: examined.took.as_secs_f64(),
        }
    }

    /// How the command ends.
    pub fn verdict(&self) -> Verdict {
        if !self.gaps.is_empty() {
            Verdict::Gaps
        } else if !self.findings.is_empty() {
            Verdict::Findings
        } else {
            Verdict::Clean
        }
    }

    /// Codes of a task's findings: those about itself and those about the shim that it shares.
    pub fn codes(&self, case: &Case<'_>) -> Vec<Code> {
        let subject = Subject::Task {
            namespace: case.name.0.clone(),
            id: case.name.1.clone(),
        };
        let shim = case
            .shim
            .process()
            .map(|shim| Subject::Shim { shim: shim.id.pid });
        let mut codes: Vec<Code> = self
            .findings
            .iter()
            .filter(|s| s.instance == case.instance || s.instance.is_none())
            .filter(|s| s.finding.subject == subject || Some(&s.finding.subject) == shim.as_ref())
            .map(|s| s.finding.code)
            .collect();
        codes.sort();
        codes.dedup();
        codes
    }

    /// Findings of one severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|s| s.finding.severity == severity)
            .count()
    }

    /// Tasks without any finding.
    pub fn healthy(&self) -> usize {
        self.cases
            .iter()
            .filter(|case| self.codes(case).is_empty())
            .count()
    }
}

/// A leftover that bears a task's name is no task: runc's state of one that ended, without bundle
/// and shim.
fn is_task(case: &Case<'_>) -> bool {
    let lives = !matches!(case.init, Init::Dead(..) | Init::None);
    let served = !matches!(case.shim, ShimOf::None);
    lives || served || case.bundle.is_some() || matches!(case.containerd, Known::Yes(_))
}
