//! `recoverd preflight`: will a restart or upgrade of containerd be harmless now?

use std::fmt::Write as _;

use serde::Serialize;

use crate::{
    cli,
    config::Config,
    correlate::Case,
    facts::{Gap, Look},
    findings::Finding,
    observe::{Limits, premises},
    preflight::{self, Hop, Input, Reason, Report},
};

/// Judges a look; asks systemd and containerd for what only preflight needs.
pub async fn report(
    args: &cli::Preflight,
    config: &Config,
    limits: Limits,
    look: &Look,
    cases: &[Case<'_>],
    findings: &[Finding],
) -> Report {
    let premises = premises::observe(look, &args.unit, limits).await;
    preflight::judge(&Input {
        look,
        cases,
        findings,
        premises: &premises,
        to: args.to,
        run_full: config.scan.run_full,
    })
}

/// The report as text or JSON, with a newline at the end.
pub fn print(report: &Report, format: cli::TextOrJson) -> Result<String, serde_json::Error> {
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
    for Gap { what, why } in &report.gaps {
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
            gaps: vec![Gap {
                what: "mounts".into(),
                why: "not root".into(),
            }],
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
