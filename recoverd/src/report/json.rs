//! `recoverd scan -o json`, schema `recoverd/scan/1`. Sorted and stable: fields are added, never
//! renamed.

use recoverd_common::{proc::ProcessId, seen::Seen, timestamp::Timestamp};
use serde::Serialize;

use super::Report;
use crate::{
    classify::outdated,
    correlate::{Case, Kind, Known, Pod},
    facts::{Connection, Gap, Reply},
    findings::{Code, Finding, Severity},
};

#[derive(Serialize)]
struct Scan<'a> {
    schema: &'static str,
    host: Host<'a>,
    instances: Vec<Instance<'a>>,
    tasks: Vec<Task<'a>>,
    findings: Vec<&'a Finding>,
    gaps: &'a [&'a Gap],
    summary: Summary,
}

#[derive(Serialize)]
struct Host<'a> {
    name: &'a str,
    kernel: &'a str,
    boot_id: Option<&'a str>,
    booted_at: String,
    cgroup: &'a str,
    seen_at: String,
}

#[derive(Serialize)]
struct Instance<'a> {
    address: &'a str,
    state: Option<String>,
    root: Option<String>,
    up: bool,
    version: Option<&'a str>,
    source: &'a str,
}

/// One task, as `scan` lists it and `show` begins.
#[derive(Serialize)]
pub struct Task<'a> {
    namespace: &'a str,
    id: &'a str,
    /// The address of its containerd.
    instance: Option<&'a str>,
    pod: Option<TaskPod<'a>>,
    phase: &'static str,
    init: Option<ProcessId>,
    shim: Option<Shim<'a>>,
    containerd: Option<Containerd>,
    findings: Vec<Code>,
}

#[derive(Serialize)]
struct TaskPod<'a> {
    namespace: &'a str,
    name: &'a str,
    container: Option<&'a str>,
}

#[derive(Serialize)]
struct Shim<'a> {
    pid: i32,
    start_time: u64,
    kind: Kind,
    version: Option<&'a str>,
    exe: Option<String>,
    outdated: bool,
    socket: Option<&'a str>,
    /// `null` when it was not asked.
    answers: Option<bool>,
    pss_kib: Option<u64>,
}

#[derive(Serialize)]
struct Containerd {
    known: bool,
    phase: Option<&'static str>,
}

#[derive(Serialize)]
struct Summary {
    tasks: usize,
    healthy: usize,
    findings: Counts,
    seconds: f64,
}

#[derive(Serialize)]
struct Counts {
    critical: usize,
    warning: usize,
    info: usize,
}

/// The whole report, one object and a new-line.
pub fn scan(report: &Report<'_>) -> String {
    let look = report.look;
    let scan = Scan {
        schema: "recoverd/scan/1",
        host: Host {
            name: &look.host.name,
            kernel: &look.host.kernel,
            boot_id: look.host.boot_id.as_deref(),
            booted_at: Timestamp::from(look.host.booted_at).to_string(),
            cgroup: look.host.cgroup,
            seen_at: Timestamp::from(look.at).to_string(),
        },
        instances: report
            .instances
            .iter()
            .map(|instance| Instance {
                address: &instance.address,
                state: instance.state.as_ref().map(|p| p.display().to_string()),
                root: instance.root.as_ref().map(|p| p.display().to_string()),
                up: instance.api.up().is_some(),
                version: instance.api.up().map(|api| api.version.as_str()),
                source: &instance.source,
            })
            .collect(),
        tasks: report.cases.iter().map(|case| task(report, case)).collect(),
        findings: report.findings.iter().map(|s| &s.finding).collect(),
        gaps: &report.gaps,
        summary: Summary {
            tasks: report.cases.len(),
            healthy: report.healthy(),
            findings: Counts {
                critical: report.count(Severity::Critical),
                warning: report.count(Severity::Warning),
                info: report.count(Severity::Info),
            },
            seconds: (report.seconds * 1000.0).round() / 1000.0,
        },
    };
    line(&scan)
}

/// One task as an object.
pub fn task<'a>(report: &Report<'a>, case: &'a Case<'a>) -> Task<'a> {
    let instance = case.instance.and_then(|at| report.look.instances.get(at));
    Task {
        namespace: &case.name.0,
        id: &case.name.1,
        instance: instance.map(|instance| instance.address.as_str()),
        pod: case.pod.as_ref().map(
            |Pod {
                 namespace,
                 name,
                 container,
                 uid: _,
             }| TaskPod {
                namespace,
                name,
                container: (!container.is_empty()).then_some(container),
            },
        ),
        phase: case.phase().word(),
        init: case.init.alive(),
        shim: shim(case),
        containerd: match case.containerd {
            Known::Yes(task) => Some(Containerd {
                known: true,
                phase: Some(task.phase.word()),
            }),
            Known::No => Some(Containerd {
                known: false,
                phase: None,
            }),
            Known::CannotSay => None,
        },
        findings: report.codes(case),
    }
}

fn shim<'a>(case: &'a Case<'a>) -> Option<Shim<'a>> {
    let shim = case.shim.process()?;
    let greeting = case.answer.and_then(|answer| answer.greeting.said());
    Some(Shim {
        pid: shim.id.pid,
        start_time: shim.id.start_time,
        kind: case.kind().unwrap_or(Kind::Foreign),
        // A stock shim does not tell its version.
        version: greeting
            .map(|g| g.version.as_str())
            .filter(|version| !version.is_empty()),
        exe: shim.exe.present().map(|exe| exe.path.display().to_string()),
        outdated: outdated(shim).is_some(),
        socket: case.address.as_deref(),
        answers: answers(case),
        pss_kib: match &shim.memory {
            Seen::Present(memory) => Some(memory.pss_kib),
            Seen::Absent | Seen::Unknown(_) => None,
        },
    })
}

fn answers(case: &Case<'_>) -> Option<bool> {
    let answer = case.answer?;
    match (&answer.connection, &answer.greeting) {
        (Connection::Failed(_), _) => None,
        (Connection::Refused | Connection::NoFile | Connection::QueueFull, _) => Some(false),
        (Connection::Made, Reply::Said(_) | Reply::Error(..)) => Some(!matches!(
            answer.states.get(&case.name.1),
            Some(Reply::Silent)
        )),
        (Connection::Made, Reply::Silent | Reply::Garbage(_)) => Some(false),
        (Connection::Made, Reply::NotAsked) => None,
    }
}

/// An object and a new-line.
pub fn line(value: &impl Serialize) -> String {
    // Maps with keys that are no strings are the only failure, and there are none.
    let mut text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.push('\n');
    text
}
