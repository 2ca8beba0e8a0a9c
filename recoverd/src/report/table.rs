//! `recoverd scan` for people: the tasks, then what was found, then what could not be seen. The
//! same words as the JSON. Two looks at the same state print the same text, so no times of day.

use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};

use super::Report;
use crate::{
    correlate::{Case, Init, Known, ShimOf},
    facts::{Api, one_line},
    findings::Severity,
};

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// With ANSI colours.
    pub color: bool,
    /// Columns of the terminal; `None` in a pipe, where nothing is wrapped.
    pub width: Option<u16>,
    /// Leave healthy tasks out.
    pub quiet: bool,
}

/// The whole report.
pub fn scan(report: &Report<'_>, style: Style) -> String {
    let mut text = String::new();
    for instance in &report.instances {
        let state = match &instance.api {
            Api::Up(api) => format!("up, {}", api.version),
            Api::Down => "down".into(),
            Api::Unknown(why) => format!("unknown, {why}"),
        };
        text.push_str(&one_line(&format!(
            "containerd {} ({state})",
            instance.address
        )));
        text.push('\n');
    }
    if report.instances.is_empty() {
        text.push_str("no containerd was found\n");
    }
    let shown: Vec<_> = report
        .cases
        .iter()
        .filter(|c| !style.quiet || !report.codes(c).is_empty())
        .collect();
    if !shown.is_empty() {
        text.push('\n');
        text.push_str(&tasks(report, &shown, style));
    }
    for suspicion in &report.findings {
        let finding = &suspicion.finding;
        let head = format!("{} {}", finding.severity.word(), finding.code.word());
        text.push_str(&format!(
            "\n{} {}\n",
            paint(&head, color_of(finding.severity), style),
            one_line(&finding.subject.text())
        ));
        for evidence in &finding.evidence {
            text.push_str(&format!("  {:<10} {}\n", evidence.by, evidence.fact));
        }
        text.push_str(&format!("  {:<10} {}\n", "action", finding.action));
    }
    if !report.gaps.is_empty() {
        text.push_str("\ncould not be seen:\n");
        for gap in &report.gaps {
            text.push_str(&format!("  {}: {}\n", gap.what, gap.why));
        }
    }
    text.push_str(&summary(report));
    text
}

fn summary(report: &Report<'_>) -> String {
    let counts: Vec<String> = Severity::ALL
        .iter()
        .map(|severity| (report.count(*severity), severity.word()))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    let found = if counts.is_empty() {
        "nothing found".to_owned()
    } else {
        format!("found {}", counts.join(", "))
    };
    let tasks = report.cases.len();
    let plural = if tasks == 1 { "" } else { "s" };
    let gaps = if report.gaps.is_empty() {
        ""
    } else {
        "; not everything could be seen"
    };
    format!(
        "\n{tasks} task{plural}, {} healthy; {found}{gaps}\n",
        report.healthy()
    )
}

fn tasks(report: &Report<'_>, cases: &[&&Case<'_>], style: Style) -> String {
    let pods = cases.iter().any(|case| case.pod.is_some());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    if let Some(width) = style.width {
        table.set_width(width);
    } else {
        // In a pipe a line is a line.
        table.set_content_arrangement(ContentArrangement::Disabled);
    }
    if !style.color {
        table.force_no_tty();
    } else {
        table.enforce_styling();
    }
    let mut header = vec![
        "TASK",
        "PHASE",
        "INIT",
        "SHIM",
        "KIND",
        "CONTAINERD",
        "FINDINGS",
    ];
    if pods {
        header.insert(1, "POD");
    }
    table.set_header(
        header
            .into_iter()
            .map(|word| Cell::new(word).add_attribute(Attribute::Bold)),
    );
    for case in cases {
        let codes = report.codes(case);
        let worst = codes.iter().map(|code| code.severity()).min();
        let words: Vec<&str> = codes.iter().map(|code| code.word()).collect();
        let mut findings = Cell::new(if words.is_empty() {
            "-".into()
        } else {
            words.join(" ")
        });
        if let Some(worst) = worst {
            findings = findings.fg(color_of(worst));
        }
        let mut row = vec![
            Cell::new(one_line(&format!("{}/{}", case.name.0, case.name.1))),
            Cell::new(case.phase().word()),
            Cell::new(init(case)),
            Cell::new(shim(case)),
            Cell::new(case.kind().map_or("-", |kind| kind.word())),
            Cell::new(containerd(case)),
            findings,
        ];
        if pods {
            let pod = case.pod.as_ref().map_or("-".into(), |pod| {
                let name = format!("{}/{}", pod.namespace, pod.name);
                one_line(&match pod.container.as_str() {
                    "" => name,
                    container => format!("{name}/{container}"),
                })
            });
            row.insert(1, Cell::new(pod));
        }
        table.add_row(row);
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn init(case: &Case<'_>) -> String {
    match &case.init {
        Init::Alive(id) => id.pid.to_string(),
        Init::Dead(..) => "ended".into(),
        Init::None => "-".into(),
        Init::Unknown(_) => "unknown".into(),
    }
}

fn shim(case: &Case<'_>) -> String {
    match &case.shim {
        ShimOf::Lives(shim) => shim.id.pid.to_string(),
        ShimOf::Stranger(_) => "stranger".into(),
        ShimOf::None => "none".into(),
        ShimOf::Unknown(_) => "unknown".into(),
    }
}

fn containerd(case: &Case<'_>) -> &'static str {
    match case.containerd {
        Known::Yes(task) => task.phase.word(),
        Known::No => "unlisted",
        Known::CannotSay => "-",
    }
}

fn color_of(severity: Severity) -> Color {
    match severity {
        Severity::Critical => Color::Red,
        Severity::Warning => Color::Yellow,
        Severity::Info => Color::Cyan,
    }
}

fn paint(text: &str, color: Color, style: Style) -> String {
    if !style.color {
        return text.to_owned();
    }
    let code = match color {
        Color::Red => "31",
        Color::Yellow => "33",
        _ => "36",
    };
    format!("\x1b[1;{code}m{text}\x1b[0m")
}
