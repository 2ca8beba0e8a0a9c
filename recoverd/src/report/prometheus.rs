//! `recoverd scan -o prometheus`, for node_exporter's textfile collector. No ids in labels: their
//! number has no bound.

use std::fmt;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Report;
use crate::findings::Code;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfCode {
    code: &'static str,
    severity: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPhase {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

/// The metrics.
pub fn scan(report: &Report<'_>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("recoverd");
    let findings = Family::<OfCode, Gauge>::default();
    for code in Code::ALL {
        let count = report
            .findings
            .iter()
            .filter(|s| s.finding.code == *code)
            .count();
        let labels = OfCode {
            code: code.word(),
            severity: code.severity().word(),
        };
        findings.get_or_create(&labels).set(number(count));
    }
    registry.register("findings", "Findings of the last scan", findings);

    let tasks = Family::<OfPhase, Gauge>::default();
    let shims = Family::<OfKind, Gauge>::default();
    let mut seen = std::collections::BTreeSet::new();
    for case in &report.cases {
        let phase = case.phase().word();
        tasks.get_or_create(&OfPhase { phase }).inc();
        if let (Some(shim), Some(kind)) = (case.shim.process(), case.kind())
            && seen.insert(shim.id)
        {
            shims.get_or_create(&OfKind { kind: kind.word() }).inc();
        }
    }
    registry.register("tasks", "Tasks by phase", tasks);
    registry.register("shims", "Shims that serve a task, by kind", shims);

    let single = |registry: &mut Registry, name: &str, help: &str, value: i64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let healthy = number(report.healthy());
    let up = number(
        report
            .instances
            .iter()
            .filter(|i| i.api.up().is_some())
            .count(),
    );
    single(
        &mut registry,
        "tasks_healthy",
        "Tasks without finding",
        healthy,
    );
    single(
        &mut registry,
        "containerds",
        "containerds found",
        number(report.instances.len()),
    );
    single(
        &mut registry,
        "containerds_up",
        "containerds that answer",
        up,
    );
    single(
        &mut registry,
        "gaps",
        "Things that could not be seen",
        number(report.gaps.len()),
    );
    let seconds = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
    seconds.set(report.seconds);
    registry.register("scan_duration_seconds", "Time that the scan took", seconds);

    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
