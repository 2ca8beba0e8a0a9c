//! `recoverd preflight`: will a restart or upgrade of containerd be harmless now?

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use serde::Serialize;

use super::look;
use crate::{
    Failure, Verdict, cli,
    config::Config,
    facts::Gap,
    findings::Finding,
    observe::premises,
    preflight::{self, Hop, Input, Reason, Report},
    report::Narrow,
};

/// Looks, asks systemd and containerd for what only preflight needs, judges and prints.
pub fn run(
    args: &cli::Preflight,
    global: &cli::Global,
    config: &Config,
) -> Result<Verdict, Failure> {
    let plan = look::plan(global, config);
    let narrow = Narrow {
        // containerd starts with all its namespaces, whatever one wants to read of.
        namespace: None,
        ..look::narrow(global, &plan)
    };
    let runtime = look::runtime()?;
    let examined = look::examine_in(&runtime, &plan, config);
    let premises = runtime.block_on(premises::observe(&examined.look, &args.unit, plan.limits));
    let cases = examined.cases(&plan);
    let seen = crate::report::Report::new(&examined, &cases, &narrow);
    let findings: Vec<Finding> = seen.findings.iter().map(|s| s.finding.clone()).collect();
    let gaps: Vec<Gap> = seen.gaps.iter().map(|gap| (*gap).clone()).collect();
    let report = preflight::judge(&Input {
        look: &examined.look,
        cases: &cases.cases,
        findings: &findings,
        gaps: &gaps,
        only: narrow.address.as_deref(),
        premises: &premises,
        to: args.to,
        run_full: config.scan.run_full,
    });
    let text = print(&report, args.output)
        .map_err(|error| Failure::Blind(format!("encode the report: {error}")))?;
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(match report.exit_code() {
        0 => Verdict::Clean,
        1 => Verdict::Findings,
        _ => Verdict::Gaps,
    })
}

/// The report as text or JSON, with a newline at the end.
fn print(report: &Report, format: cli::TextOrJson) -> Result<String, serde_json::Error> {
    match format {
        cli::TextOrJson::Text => Ok(text(report)),
        cli::TextOrJson::Json => Ok(serde_json::to_string_pretty(&Json::of(report))? + "\n"),
    }
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    harmless: bool,
    instances: &'a [Hop],
    reasons: &'a [Reason],
    gaps: &'a [Gap],
}

impl<'a> Json<'a> {
    fn of(report: &'a Report) -> Self {
        Self {
            schema: "recoverd/preflight/1",
            harmless: report.exit_code() == 0,
            instances: &report.instances,
            reasons: &report.reasons,
            gaps: &report.gaps,
        }
    }
}

/// One line per reason, then what could not be seen, then the answer.
fn text(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    for Reason {
        severity,
        check,
        subject,
        why,
    } in &report.reasons
    {
        let (severity, check) = (severity.word(), check.word());
        let _ = writeln!(out, "{severity:<8}  {subject}  {check}: {why}");
    }
    for Gap { what, why, .. } in &report.gaps {
        let _ = writeln!(out, "{:<8}  {what}: {why}", "unseen");
    }
    for hop in &report.instances {
        let known = |release: &Option<String>| match release {
            Some(release) => release.clone(),
            None => "unknown".to_owned(),
        };
        let (from, to) = (known(&hop.from), known(&hop.to));
        let _ = writeln!(out, "containerd at {}: {from} to {to}", hop.address);
    }
    let against = report.against();
    let _ = match (against, report.gaps.len()) {
        (0, 0) => writeln!(out, "harmless"),
        (0, gaps) => writeln!(out, "cannot say: {gaps} not seen"),
        (against, 0) => writeln!(out, "not harmless: {against} against it"),
        (against, gaps) => writeln!(out, "not harmless: {against} against it, {gaps} not seen"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{findings::Severity, preflight::Check};

    fn report() -> Report {
        Report {
            instances: vec![Hop {
                address: "/run/containerd/containerd.sock".into(),
                from: Some("2.1.9".into()),
                to: Some("1.7".into()),
            }],
            reasons: vec![Reason {
                severity: Severity::Critical,
                check: Check::ShimAddress,
                subject: "default/c1".into(),
                why: "because".into(),
            }],
            gaps: vec![Gap::new("mounts", "not root")],
        }
    }

    #[test]
    fn a_report_reads_like_this() {
        let golden = "\
critical  default/c1  shim-address: because
unseen    mounts: not root
containerd at /run/containerd/containerd.sock: 2.1.9 to 1.7
not harmless: 1 against it, 1 not seen
";
        assert_eq!(print(&report(), cli::TextOrJson::Text).unwrap(), golden);
        let empty = Report {
            instances: Vec::new(),
            reasons: Vec::new(),
            gaps: Vec::new(),
        };
        assert_eq!(print(&empty, cli::TextOrJson::Text).unwrap(), "harmless\n");
    }

    #[test]
    fn the_object_has_the_same_words() {
        let json = print(&report(), cli::TextOrJson::Json).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["schema"], "recoverd/preflight/1");
        assert_eq!(json["harmless"], false);
        assert_eq!(json["reasons"][0]["check"], "shim-address");
        assert_eq!(json["reasons"][0]["severity"], "critical");
        assert_eq!(json["instances"][0]["to"], "1.7");
        assert_eq!(json["gaps"][0]["why"], "not root");
    }
}
