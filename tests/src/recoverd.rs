//! The binary under test, and its JSON report, read as strictly as SPEC states it.

use std::process::Output;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::node::Node;

/// What one `recoverd … scan -o json` said.
#[derive(Debug)]
pub struct Scan {
    /// Its exit code; -1 when a signal ended it.
    pub exit: i32,
    /// The report.
    pub report: Report,
    /// What it wrote beside the report.
    pub stderr: String,
}

/// `recoverd/scan/1`.
#[derive(Debug, Deserialize)]
pub struct Report {
    /// The format's name.
    pub schema: String,
    /// The host.
    pub host: Value,
    /// Every containerd that was found.
    pub instances: Vec<Instance>,
    /// Every task.
    pub tasks: Vec<TaskCase>,
    /// Every finding.
    pub findings: Vec<Finding>,
    /// What could not be seen, and why.
    pub gaps: Vec<Gap>,
    /// Counts.
    pub summary: Summary,
}

/// One containerd.
#[derive(Debug, Deserialize)]
pub struct Instance {
    /// Its gRPC socket.
    pub address: String,
    /// Its state folder.
    pub state: Option<String>,
    /// Its root folder.
    pub root: Option<String>,
    /// Whether it answers.
    pub up: bool,
    /// What it says it is.
    pub version: Option<String>,
}

/// One task.
#[derive(Debug, Deserialize)]
pub struct TaskCase {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// Its pod, from its annotations.
    pub pod: Option<Pod>,
    /// Its phase.
    pub phase: Value,
    /// Its first process.
    pub init: Option<Init>,
    /// Its shim.
    pub shim: Option<Shim>,
    /// containerd's word.
    pub containerd: Option<Known>,
    /// Codes of its findings.
    pub findings: Vec<String>,
}

/// A task's pod.
#[derive(Debug, Deserialize)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod.
    pub name: String,
    /// Container; none for the pause container.
    pub container: Option<String>,
}

/// A task's first process.
#[derive(Debug, Deserialize)]
pub struct Init {
    /// Its pid.
    pub pid: u32,
    /// Its start time.
    pub start_time: u64,
}

/// A task's shim.
#[derive(Debug, Deserialize)]
pub struct Shim {
    /// Its pid.
    pub pid: Option<u32>,
    /// Whose shim it is.
    pub kind: Value,
    /// Its executable.
    pub exe: Option<String>,
    /// Whether it runs an older executable than the installed one.
    pub outdated: Option<bool>,
    /// Its socket.
    pub socket: Option<String>,
    /// Whether it answers.
    pub answers: Value,
    /// Its memory.
    pub pss_kib: Option<u64>,
}

/// What containerd says of a task.
#[derive(Debug, Deserialize)]
pub struct Known {
    /// Whether it lists it.
    pub known: bool,
    /// In which phase.
    pub phase: Option<String>,
}

/// One finding.
#[derive(Debug, Deserialize)]
pub struct Finding {
    /// Its code.
    pub code: String,
    /// `critical`, `warning` or `info`.
    pub severity: String,
    /// What it is about.
    pub subject: Value,
    /// Facts, and whose word each is.
    pub evidence: Vec<Value>,
    /// What to do.
    pub action: Value,
}

/// Something that could not be seen.
pub type Gap = Value;

/// Counts of a report.
#[derive(Debug, Deserialize)]
pub struct Summary {
    /// Tasks seen.
    pub tasks: usize,
    /// Tasks without finding.
    pub healthy: usize,
    /// Findings by severity.
    pub findings: Severities,
    /// How long the look took.
    pub seconds: f64,
}

/// Findings by severity.
#[derive(Debug, Deserialize)]
pub struct Severities {
    /// A workload is in danger.
    pub critical: usize,
    /// Something is wrong.
    pub warning: usize,
    /// Something to know.
    pub info: usize,
}

impl Scan {
    /// The task `namespace/id`, which must be there once.
    #[track_caller]
    pub fn task(&self, name: &str) -> &TaskCase {
        let mut found = self
            .report
            .tasks
            .iter()
            .filter(|task| format!("{}/{}", task.namespace, task.id) == name);
        match (found.next(), found.next()) {
            (Some(task), None) => task,
            (None, _) => panic!("no task {name} in {self:#?}"),
            _ => panic!("two tasks {name} in {self:#?}"),
        }
    }

    /// The codes of one task's findings, sorted.
    #[track_caller]
    pub fn codes(&self, name: &str) -> Vec<&str> {
        let mut codes: Vec<&str> = self
            .task(name)
            .findings
            .iter()
            .map(String::as_str)
            .collect();
        codes.sort_unstable();
        codes
    }

    /// The codes of all findings, sorted, each as often as it occurs.
    pub fn all_codes(&self) -> Vec<&str> {
        let mut codes: Vec<&str> = self
            .report
            .findings
            .iter()
            .map(|finding| finding.code.as_str())
            .collect();
        codes.sort_unstable();
        codes
    }

    /// The one finding with that code.
    #[track_caller]
    pub fn finding(&self, code: &str) -> &Finding {
        let mut found = self
            .report
            .findings
            .iter()
            .filter(|finding| finding.code == code);
        match (found.next(), found.next()) {
            (Some(finding), None) => finding,
            (None, _) => panic!("no finding {code} in {self:#?}"),
            _ => panic!("more than one finding {code} in {self:#?}"),
        }
    }

    /// Fails unless the scan saw everything, found nothing, and says so in every way it has.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.exit, 0, "{self:#?}");
        assert!(
            self.report.findings.is_empty() && self.report.gaps.is_empty(),
            "{self:#?}"
        );
        assert!(
            self.report
                .tasks
                .iter()
                .all(|task| task.findings.is_empty()),
            "{self:#?}"
        );
        let summary = &self.report.summary;
        assert_eq!(summary.tasks, self.report.tasks.len(), "{self:#?}");
        assert_eq!(summary.healthy, summary.tasks, "{self:#?}");
    }

    /// Fails unless exactly these findings are there, whatever their subjects, and the exit code
    /// fits.
    #[track_caller]
    pub fn assert_codes(&self, expected: &[&str]) {
        assert_eq!(self.all_codes(), expected, "{self:#?}");
        assert!(self.report.gaps.is_empty(), "{self:#?}");
        assert_eq!(self.exit, i32::from(!expected.is_empty()), "{self:#?}");
    }
}

impl Finding {
    /// Whether its subject or evidence says `text`.
    pub fn mentions(&self, text: &str) -> bool {
        let said = |value: &Value| value.to_string().contains(text);
        said(&self.subject) || self.evidence.iter().any(said)
    }
}

impl Node {
    /// Runs `recoverd` in the node.
    #[track_caller]
    pub fn recoverd<I, S>(&self, args: I) -> Output
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        self.output(self.built("recoverd"), args)
    }

    /// `recoverd scan -o json` without flags: everything it finds by itself.
    #[track_caller]
    pub fn scan(self: &Arc<Node>) -> Scan {
        scan(self, &[], &[])
    }

    /// The same as if everything were old: by default what is young is somebody's who is at work.
    #[track_caller]
    pub fn scan_of_any_age(self: &Arc<Node>) -> Scan {
        let config = self.folder().join("any-age.toml");
        std::fs::write(&config, "[scan]\nsettle = \"0s\"\n")
            .unwrap_or_else(|error| panic!("write {}: {error}", config.display()));
        let flags = ["--config".to_owned(), config.display().to_string()];
        scan(self, &flags, &["--min-age", "0s"])
    }

    /// The same with global flags.
    #[track_caller]
    pub fn scan_with(self: &Arc<Node>, flags: &[&str]) -> Scan {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        scan(self, &flags, &[])
    }
}

/// One scan with these global flags, and the invariants that hold for every report.
#[track_caller]
pub(crate) fn scan(node: &Node, flags: &[String], options: &[&str]) -> Scan {
    let mut args = flags.to_vec();
    args.extend(
        ["scan", "-o", "json"]
            .iter()
            .chain(options)
            .map(|word| (*word).to_owned()),
    );
    let scan = parse(&node.recoverd(&args));
    let report = &scan.report;
    assert_eq!(report.schema, "recoverd/scan/1");
    let expected = match (report.gaps.is_empty(), report.findings.is_empty()) {
        (false, _) => 3,
        (true, false) => 1,
        (true, true) => 0,
    };
    assert_eq!(
        scan.exit, expected,
        "the exit code contradicts the report: {scan:#?}"
    );
    let counted = &report.summary.findings;
    for (severity, count) in [
        ("critical", counted.critical),
        ("warning", counted.warning),
        ("info", counted.info),
    ] {
        let listed = report
            .findings
            .iter()
            .filter(|f| f.severity == severity)
            .count();
        assert_eq!(count, listed, "the summary miscounts {severity}: {scan:#?}");
    }
    scan
}

/// Reads what `scan -o json` printed.
#[track_caller]
pub fn parse(output: &Output) -> Scan {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "recoverd did not print a report ({}): {error}\n{}{stderr}",
            output.status,
            String::from_utf8_lossy(&output.stdout)
        )
    });
    Scan {
        exit: output.status.code().unwrap_or(-1),
        report,
        stderr,
    }
}
