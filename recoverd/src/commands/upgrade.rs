//! `recoverd upgrade`: has our shims become the installed executable, one by one, in place.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use recoverd_common::proc::FileId;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{adopt::Complaint, look};
use crate::{
    Failure, Verdict,
    adopt::run::find_binary,
    cli::{self, TableOrJson},
    config::Config,
    facts::{Gap, TaskName},
    history::{Event, History},
    lock,
    upgrade::{self, Candidate, Choice, Outcome, Refused, decide, run::How},
    verify::Again,
};

/// One shim, and what became of it or is to become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    pid: i32,
    namespace: String,
    group: String,
    tasks: Vec<String>,
    /// What it ran when we looked.
    version: Option<String>,
    outdated: bool,
    /// The executable that it is to become.
    to: Option<PathBuf>,
    /// `current`, `outdated`; or `upgraded`, `refused`, `came-back`, `failed`, `left`.
    verdict: &'static str,
    /// The version that serves now.
    now: Option<String>,
    /// Who serves now, if not the same process.
    successor: Option<u32>,
    why: String,
    millis: Option<u64>,
}

#[derive(Serialize)]
struct Sheet<'a> {
    schema: &'static str,
    shims: Vec<Row>,
    refused: Vec<Value>,
    versions: BTreeMap<String, usize>,
    gaps: &'a [Gap],
}

/// Looks, and upgrades unless told only to look.
pub fn run(args: &cli::Upgrade, global: &cli::Global, config: &Config) -> Result<Verdict, Failure> {
    let looks_only = args.check || args.dry_run;
    let choice = choice(args)?;
    let history = History::new(&config.history, "upgrade");
    let _lock = match looks_only {
        true => None,
        false => Some(lock::take(&config.run_dir, "upgrade").map_err(super::adopt::refused)?),
    };
    let plan = look::plan(global, config);
    let narrow = look::narrow(global, &plan);
    let runtime = look::runtime()?;
    let examined = look::examine_once(&runtime, &plan, config, Again::Only(&[]));
    if !examined.look.host.root && !looks_only {
        return Err(Failure::Blind("upgrading needs root".into()));
    }
    let cases = examined.cases(&plan);
    let (all, refused) = upgrade::candidates(&examined.look, &cases, &narrow, &choice);
    let configured = config.adopt.binary.clone();
    let found = find_binary(configured.as_deref()).ok();
    let stands = |path: &PathBuf| FileId::of(path).map(drop);
    let to = |candidate: &Candidate| {
        decide::target(candidate, configured.as_ref(), stands, found.as_ref())
    };
    let mut printer = Printer::new(args.output);
    if looks_only {
        for candidate in &all {
            printer.row(before(candidate, to(candidate)))?;
        }
    } else {
        let mut complaint = Complaint::default();
        let text = format!("{} shims to be looked at", all.len());
        complaint.of(history.tell(Event::Began, "", &text, Map::new()));
        let how = How {
            proc: config.proc.clone(),
        };
        let mut unfit: Option<&'static str> = None;
        for candidate in all {
            let row = match (&unfit, to(&candidate)) {
                (Some(why), to) => left(&candidate, to, why),
                (None, Err(why)) => left(&candidate, Err(why), why),
                (None, Ok(to)) => {
                    complaint.of(intend(&history, &candidate, &to));
                    let outcome = upgrade::run(candidate, to, &how);
                    complaint.of(tell(&history, &outcome));
                    if is_of_all(&outcome.verdict) {
                        unfit = Some("the one before could not go on as that");
                    }
                    after(&outcome)
                }
            };
            printer.row(row)?;
        }
        complaint.of(history.tell(Event::Ended, "", &summary(&printer.rows), Map::new()));
        complaint.say();
    }
    printer.end(&refused, &examined.gaps, looks_only)?;
    Ok(verdict(&printer.rows, &refused, &examined.gaps, looks_only))
}

fn choice(args: &cli::Upgrade) -> Result<Choice, Failure> {
    match args.tasks.as_slice() {
        [] if args.all || args.check => Ok(Choice::All),
        [] => Err(Failure::Usage(
            "name the tasks whose shims are to be upgraded, or --all".into(),
        )),
        names => names
            .iter()
            .map(|name| look::task_name(name))
            .collect::<Result<_, _>>()
            .map(Choice::Tasks),
    }
}

/// An executable that one shim could not become is none for the next: others keep what they have.
fn is_of_all(verdict: &upgrade::Verdict) -> bool {
    match verdict {
        upgrade::Verdict::Unfit(_)
        | upgrade::Verdict::CameBack(..)
        | upgrade::Verdict::Failed(_) => true,
        upgrade::Verdict::Upgraded(_)
        | upgrade::Verdict::Current
        | upgrade::Verdict::Refused(_) => false,
    }
}

fn of(candidate: &Candidate, verdict: &'static str) -> Row {
    let name = |(namespace, id): &TaskName| format!("{namespace}/{id}");
    Row {
        pid: candidate.shim.pid,
        namespace: candidate.namespace.clone(),
        group: candidate.group.clone(),
        tasks: candidate.tasks.iter().map(name).collect(),
        version: candidate.version.clone(),
        outdated: candidate.outdated.is_some(),
        to: None,
        verdict,
        now: candidate.version.clone(),
        successor: None,
        why: String::new(),
        millis: None,
    }
}

fn before(candidate: &Candidate, to: Result<PathBuf, &'static str>) -> Row {
    let word = match candidate.outdated {
        Some(_) => "outdated",
        None => "current",
    };
    let why = candidate.outdated.clone().unwrap_or_default();
    Row {
        why: match &to {
            Ok(_) => why,
            Err(missing) => (*missing).to_owned(),
        },
        to: to.ok(),
        ..of(candidate, word)
    }
}

fn left(candidate: &Candidate, to: Result<PathBuf, &'static str>, why: &str) -> Row {
    Row {
        to: to.ok(),
        why: why.to_owned(),
        ..of(candidate, "left")
    }
}

fn after(outcome: &Outcome) -> Row {
    let row = |verdict| Row {
        to: Some(outcome.to.clone()),
        millis: u64::try_from(outcome.took.as_millis()).ok(),
        ..of(&outcome.candidate, verdict)
    };
    let because = |verdict, why: &str| Row {
        why: why.to_owned(),
        ..row(verdict)
    };
    match &outcome.verdict {
        upgrade::Verdict::Upgraded(version) => Row {
            now: Some(version.clone()),
            ..row("upgraded")
        },
        upgrade::Verdict::Current => row("current"),
        upgrade::Verdict::Refused(why) | upgrade::Verdict::Unfit(why) => because("refused", why),
        upgrade::Verdict::CameBack(pid, why) => Row {
            successor: Some(*pid),
            ..because("came-back", why)
        },
        upgrade::Verdict::Failed(why) => Row {
            now: None,
            ..because("failed", why)
        },
    }
}

fn intend(
    history: &History,
    candidate: &Candidate,
    to: &std::path::Path,
) -> Result<(), crate::history::NotWritten> {
    let text = format!("shim {} becomes {}", candidate.shim.pid, to.display());
    history.tell(Event::Intended, &subject(candidate), &text, Map::new())
}

fn tell(history: &History, outcome: &Outcome) -> Result<(), crate::history::NotWritten> {
    let row = after(outcome);
    let event = match &outcome.verdict {
        upgrade::Verdict::Upgraded(_) => Event::Done,
        upgrade::Verdict::Current | upgrade::Verdict::Refused(_) | upgrade::Verdict::Unfit(_) => {
            Event::Skipped
        }
        upgrade::Verdict::CameBack(..) | upgrade::Verdict::Failed(_) => Event::Failed,
    };
    let details = match json!({"from": row.version, "now": row.now, "millis": row.millis}) {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    history.tell(event, &subject(&outcome.candidate), &line(&row), details)
}

fn subject(candidate: &Candidate) -> String {
    format!("{}/{}", candidate.namespace, candidate.group)
}

/// What there is to say about a shim, one line.
fn line(row: &Row) -> String {
    let of = |version: &Option<String>| version.clone().unwrap_or_else(|| "unknown".to_owned());
    let versions = match row.verdict {
        "upgraded" => format!("{} -> {}", of(&row.version), of(&row.now)),
        _ => of(&row.version),
    };
    let mut text = format!("shim {} {versions}", row.pid);
    if let Some(pid) = row.successor {
        text.push_str(&format!(", served by shim {pid} now"));
    }
    if let Some(millis) = row.millis {
        text.push_str(&format!(" in {millis} ms"));
    }
    if !row.why.is_empty() {
        text.push_str(&format!(": {}", row.why));
    }
    text
}

fn counts(rows: &[Row]) -> BTreeMap<String, usize> {
    let now = rows.iter().map(|row| row.now.as_deref());
    decide::versions(now)
}

fn summary(rows: &[Row]) -> String {
    let counts = counts(rows);
    let words = counts.iter().map(|(version, count)| match count {
        1 => format!("1 shim of {version}"),
        count => format!("{count} shims of {version}"),
    });
    let words: Vec<String> = words.collect();
    match words.is_empty() {
        true => "no shim of ours".to_owned(),
        false => words.join(", "),
    }
}

/// Prints as it goes: a node has hundreds of shims, and somebody waits.
struct Printer {
    format: TableOrJson,
    rows: Vec<Row>,
}

impl Printer {
    fn new(format: TableOrJson) -> Self {
        Self {
            format,
            rows: Vec::new(),
        }
    }

    fn row(&mut self, row: Row) -> io::Result<()> {
        if self.format == TableOrJson::Table {
            let mut out = io::stdout().lock();
            let names = match row.tasks.is_empty() {
                true => format!("{}/{}", row.namespace, row.group),
                false => row.tasks.join(" "),
            };
            writeln!(out, "{:<9}  {names}  {}", row.verdict, line(&row))?;
            out.flush()?;
        }
        self.rows.push(row);
        Ok(())
    }

    fn end(&self, refused: &[Refused], gaps: &[Gap], looked: bool) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self.format {
            TableOrJson::Json => {
                let refused = refused.iter().map(|refused| {
                    json!({
                        "namespace": refused.name.0,
                        "id": refused.name.1,
                        "why": refused.why,
                    })
                });
                let sheet = Sheet {
                    schema: "recoverd/upgrade/1",
                    shims: self.rows.clone(),
                    refused: refused.collect(),
                    versions: counts(&self.rows),
                    gaps,
                };
                writeln!(out, "{:#}", json!(sheet))?;
            }
            TableOrJson::Table => {
                for Refused { name, why } in refused {
                    writeln!(out, "{:<9}  {}/{}: {why}", "refused", name.0, name.1)?;
                }
                for gap in gaps {
                    writeln!(out, "{:<9}  {}: {}", "unseen", gap.what, gap.why)?;
                }
                let now = if looked { "" } else { "now " };
                writeln!(out, "{now}{}", summary(&self.rows))?;
            }
        }
        out.flush()
    }
}

fn verdict(rows: &[Row], refused: &[Refused], gaps: &[Gap], looked: bool) -> Verdict {
    let fine = |row: &Row| matches!(row.verdict, "current" | "upgraded");
    if !rows.iter().all(fine) || !refused.is_empty() {
        return match looked {
            true => Verdict::Findings,
            false => Verdict::Unkept,
        };
    }
    match gaps.is_empty() {
        true => Verdict::Clean,
        false => Verdict::Gaps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(verdict: &'static str, now: Option<&str>) -> Row {
        Row {
            pid: 7,
            namespace: "ns".into(),
            group: "c".into(),
            tasks: vec!["ns/c".into()],
            version: Some("1.0.0".into()),
            outdated: true,
            to: None,
            verdict,
            now: now.map(str::to_owned),
            successor: None,
            why: String::new(),
            millis: Some(9),
        }
    }

    #[test]
    fn a_line_says_what_became_of_a_shim() {
        let upgraded = row("upgraded", Some("2.0.0"));
        assert_eq!(line(&upgraded), "shim 7 1.0.0 -> 2.0.0 in 9 ms");
        let back = Row {
            successor: Some(8),
            why: "died".into(),
            ..row("came-back", Some("1.0.0"))
        };
        assert_eq!(
            line(&back),
            "shim 7 1.0.0, served by shim 8 now in 9 ms: died"
        );
        let rows = [upgraded, back, row("failed", None)];
        assert_eq!(
            summary(&rows),
            "1 shim of 1.0.0, 1 shim of 2.0.0, 1 shim of unknown"
        );
        assert_eq!(summary(&[]), "no shim of ours");
    }

    #[test]
    fn the_exit_code_says_whether_all_run_what_they_should() {
        let refused = [Refused {
            name: ("ns".into(), "x".into()),
            why: "no",
        }];
        let good = [row("upgraded", Some("2")), row("current", Some("2"))];
        for (rows, refused, looked, expected) in [
            (&good[..], &[][..], false, Verdict::Clean),
            (&good, &refused, false, Verdict::Unkept),
            (&[row("outdated", None)], &[], true, Verdict::Findings),
            (&[row("left", None)], &[], false, Verdict::Unkept),
            (&[row("came-back", None)], &[], false, Verdict::Unkept),
            (&[], &[], true, Verdict::Clean),
        ] {
            assert_eq!(verdict(rows, refused, &[], looked), expected);
        }
    }
}
