//! `recoverd scan`.

use std::io::{self, IsTerminal, Write};

use super::look;
use crate::{
    Failure, Verdict,
    cli::{Color, Global, Scan, ScanFormat},
    config::Config,
    report::{Report, json, prometheus, table},
};

/// Looks and prints.
pub fn run(args: &Scan, global: &Global, config: &Config) -> Result<Verdict, Failure> {
    let plan = look::plan(global, config);
    let narrow = look::narrow(global, &plan);
    let examined = look::examine(&plan, config)?;
    let cases = examined.cases(&plan);
    let report = Report::new(&examined, &cases, &narrow);
    let text = match args.output {
        ScanFormat::Table => table::scan(&report, style(config, args.quiet)),
        ScanFormat::Json => json::scan(&report),
        ScanFormat::Prometheus => {
            prometheus::scan(&report).map_err(|_| Failure::Blind("encode metrics".into()))?
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(report.verdict())
}

/// How to print for whoever reads standard output.
pub fn style(config: &Config, quiet: bool) -> table::Style {
    let terminal = io::stdout().is_terminal();
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    table::Style {
        color: match config.color {
            Color::Auto => terminal && !plain,
            Color::Always => true,
            Color::Never => false,
        },
        width: terminal
            .then(|| comfy_table::Table::new().width())
            .flatten(),
        quiet,
    }
}
