//! `recoverd history`: what recoverd did, oldest first.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use recoverd_common::timestamp::Timestamp;
use serde_json::json;

use crate::{
    Failure, Verdict,
    cli::{self, TableOrJson},
    config::Config,
    facts::{Gap, one_line},
    history::{self, Entry},
};

/// Reads and prints.
pub fn run(args: &cli::History, config: &Config) -> Result<Verdict, Failure> {
    let (mut entries, gaps) = history::read(&config.history);
    if let Some(since) = args.since {
        let since = since.moment(Timestamp::now());
        entries.retain(|entry| entry.at >= since);
    }
    if let Some(limit) = args.limit {
        entries.drain(..entries.len().saturating_sub(limit));
    }
    let text = match args.output {
        TableOrJson::Table => table(&entries, &gaps),
        TableOrJson::Json => {
            let all = json!({"schema": "recoverd/history/1", "entries": entries, "gaps": gaps});
            format!("{all:#}\n")
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(if gaps.is_empty() {
        Verdict::Clean
    } else {
        Verdict::Gaps
    })
}

fn table(entries: &[Entry], gaps: &[Gap]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    // A line is a line, on a terminal too: the text comes last and may be long.
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.force_no_tty();
    table.set_header(["TIME", "COMMAND", "EVENT", "SUBJECT", "WHAT"]);
    for entry in entries {
        let at = Timestamp {
            nanos: 0,
            ..entry.at
        };
        let subject = match entry.subject.as_str() {
            "" => "-".into(),
            subject => one_line(subject),
        };
        table.add_row([
            at.to_string(),
            one_line(&entry.command),
            one_line(&entry.event),
            subject,
            one_line(&entry.text),
        ]);
    }
    let mut text = String::new();
    if entries.is_empty() {
        text.push_str("nothing was done\n");
    } else {
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    if !gaps.is_empty() {
        text.push_str("\ncould not be read:\n");
        for gap in gaps {
            text.push_str(&format!("  {}: {}\n", gap.what, gap.why));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_entry_and_moves_no_cursor() {
        let entry = Entry {
            at: "2026-11-24T05:00:00.5Z".parse().unwrap(),
            run: "1-2".into(),
            command: "repair".into(),
            event: "done".into(),
            subject: "ns/\u{1b}[2Ja".into(),
            text: "removed /run/containerd/s/0a".into(),
            details: serde_json::Map::new(),
        };
        let run = Entry {
            subject: String::new(),
            ..entry.clone()
        };
        let text = table(&[entry, run], &[Gap::new("/var/x", "is a symlink")]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("2026-11-24T05:00:00Z"), "{text}");
        assert!(lines[1].ends_with("removed /run/containerd/s/0a"), "{text}");
        assert_eq!(lines[2].split_whitespace().nth(3), Some("-"));
        assert!(!text.contains('\u{1b}') && text.contains("is a symlink"));
        assert!(table(&[], &[]).starts_with("nothing was done"));
    }
}
