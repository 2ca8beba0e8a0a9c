//! The daemon's numbers in Prometheus' text format. No ids in labels: their number has no bound.

use std::{
    fmt,
    sync::atomic::AtomicU64,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{
    bag::KINDS,
    decide::{Count, Follows, Kind},
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDeath {
    kind: &'static str,
    follows: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfResult {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWhat {
    what: &'static str,
}

/// All numbers.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    shims: Family<OfKind, Gauge>,
    tasks: Family<OfKind, Gauge>,
    given_up: Gauge,
    kept: Family<OfWhat, Gauge>,
    deaths: Family<OfDeath, Counter>,
    resumes: Family<OfResult, Counter>,
    resume_seconds: Histogram,
    exits: Family<OfResult, Counter>,
    looks: Counter,
}

impl Metrics {
    /// All zero, from now on.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("recoverd");
        let shims = Family::default();
        let tasks = Family::default();
        let given_up = Gauge::default();
        let kept = Family::default();
        let deaths = Family::default();
        let resumes = Family::default();
        let bounds = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];
        let resume_seconds = Histogram::new(bounds);
        let exits = Family::default();
        let looks = Counter::default();
        registry.register(
            "supervised_shims",
            "Shims watched, by kind",
            Clone::clone(&shims),
        );
        registry.register(
            "supervised_tasks",
            "Init processes watched, by kind of shim",
            Clone::clone(&tasks),
        );
        registry.register(
            "given_up_shims",
            "Shims that ended too often and have no successor",
            Gauge::clone(&given_up),
        );
        registry.register(
            "kept_descriptors",
            "Descriptors kept for successors",
            Clone::clone(&kept),
        );
        registry.register(
            "shim_deaths",
            "Ends of shims, by kind and by what followed",
            Clone::clone(&deaths),
        );
        registry.register(
            "resumes",
            "Successors started, by result",
            Clone::clone(&resumes),
        );
        registry.register_with_unit(
            "resume",
            "From a shim's end to its successor's answer",
            Unit::Seconds,
            Histogram::clone(&resume_seconds),
        );
        registry.register(
            "witnessed_exits",
            "Ends of init processes and execs, by whether the kernel told the status",
            Clone::clone(&exits),
        );
        registry.register(
            "supervisor_looks",
            "Looks at the whole node",
            Counter::clone(&looks),
        );
        let began: Gauge<f64, AtomicU64> = Gauge::default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        began.set(now.unwrap_or_default().as_secs_f64());
        registry.register(
            "supervisor_start_time_seconds",
            "When the supervisor began, seconds after 1970",
            began,
        );
        for result in ["adopted", "stood-back", "failed"] {
            let _ = Family::get_or_create(&resumes, &OfResult { result });
        }
        Self {
            registry,
            shims,
            tasks,
            given_up,
            kept,
            deaths,
            resumes,
            resume_seconds,
            exits,
            looks,
        }
    }

    /// A shim has ended.
    pub fn died(&self, kind: Kind, follows: Follows) {
        let (kind, follows) = (kind.word(), follows.word());
        self.deaths.get_or_create(&OfDeath { kind, follows }).inc();
    }

    /// A successor was started: `adopted`, `stood-back`, `failed`; how long after the end.
    pub fn resumed(&self, result: &'static str, took: Duration) {
        self.resumes.get_or_create(&OfResult { result }).inc();
        if result == "adopted" {
            self.resume_seconds.observe(took.as_secs_f64());
        }
    }

    /// An init or exec has ended.
    pub fn exited(&self, known: bool) {
        let result = if known { "observed" } else { "unknown" };
        self.exits.get_or_create(&OfResult { result }).inc();
    }

    /// The whole node was looked at.
    pub fn looked(&self) {
        self.looks.inc();
    }

    /// The text; `counts` and `kept` are what there is now.
    pub fn text<'a>(
        &self,
        counts: impl Fn(Kind) -> Count,
        kept: impl Iterator<Item = &'a str>,
    ) -> Result<String, fmt::Error> {
        let mut given_up = 0;
        for of in [Kind::Ours, Kind::Stock] {
            let count = counts(of);
            let kind = of.word();
            let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            self.shims
                .get_or_create(&OfKind { kind })
                .set(number(count.shims));
            self.tasks
                .get_or_create(&OfKind { kind })
                .set(number(count.inits));
            given_up += number(count.given_up);
        }
        self.given_up.set(given_up);
        for what in KINDS {
            self.kept.get_or_create(&OfWhat { what }).set(0);
        }
        for name in kept {
            if let Some(what) = KINDS.into_iter().find(|what| *what == name) {
                self.kept.get_or_create(&OfWhat { what }).inc();
            }
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_what_the_documentation_says() {
        let metrics = Metrics::new();
        metrics.died(Kind::Ours, Follows::Successor);
        metrics.resumed("adopted", Duration::from_millis(40));
        metrics.exited(true);
        metrics.looked();
        let count = |_| Count {
            shims: 2,
            inits: 3,
            given_up: 0,
        };
        let kept = ["connection", "connection", "no such thing"];
        let text = metrics.text(count, kept.into_iter()).unwrap();
        for line in [
            r#"recoverd_supervised_shims{kind="ours"} 2"#,
            r#"recoverd_supervised_tasks{kind="stock"} 3"#,
            r#"recoverd_kept_descriptors{what="connection"} 2"#,
            r#"recoverd_kept_descriptors{what="stdin"} 0"#,
            r#"recoverd_shim_deaths_total{kind="ours",follows="successor"} 1"#,
            r#"recoverd_resumes_total{result="adopted"} 1"#,
            r#"recoverd_resumes_total{result="failed"} 0"#,
            r#"recoverd_resume_seconds_bucket{le="0.05"} 1"#,
            r#"recoverd_witnessed_exits_total{result="observed"} 1"#,
            "recoverd_supervisor_looks_total 1",
            "recoverd_given_up_shims 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        assert!(!text.contains("no such"));
    }
}
