//! `recoverd post-start`: what became of every task over containerd's start.

use std::io::{self, Write};

use recoverd_common::{failpoint, seen::Seen};
use serde_json::{Map, json};

use super::look;
use crate::{
    Failure, Verdict,
    cli::{self, TableOrJson},
    config::Config,
    facts::Api,
    history::{Event, History},
    hooks::{
        baseline,
        compare::{self, Became, Row},
    },
    verify::Again,
};

/// Compares and prints. Exits 0 unless told otherwise: containerd is up, and stays up.
pub fn run(
    args: &cli::PostStart,
    global: &cli::Global,
    config: &Config,
) -> Result<Verdict, Failure> {
    match compared(args, global, config) {
        Ok(verdict) if args.strict => Ok(verdict),
        Ok(_) => Ok(Verdict::Clean),
        Err(failure) if args.strict => Err(failure),
        Err(failure) => {
            crate::complain(&format!("post-start: {failure}"));
            Ok(Verdict::Clean)
        }
    }
}

fn compared(
    args: &cli::PostStart,
    global: &cli::Global,
    config: &Config,
) -> Result<Verdict, Failure> {
    let (plan, address) = look::plan_of_one(global, config);
    let baseline = match baseline::read(&config.run_dir, &address) {
        Seen::Present(baseline) => baseline,
        Seen::Absent => {
            let what = format!("no baseline of containerd at {address}: did pre-start run?");
            return Err(Failure::Blind(what));
        }
        Seen::Unknown(why) => return Err(Failure::Blind(format!("read baseline: {why}"))),
    };
    let runtime = look::runtime()?;
    let examined = look::examine_once(&runtime, &plan, config, Again::Only(&[]));
    let look = &examined.look;
    if !look.host.root {
        return Err(Failure::Blind("needs root".into()));
    }
    let at = look.instances.iter().position(|i| i.is(&address));
    let instance = at.and_then(|at| look.instances.get(at));
    let up = instance.is_some_and(|instance| matches!(instance.api, Api::Up(_)));
    let cases = examined.cases(&plan);
    let of_instance: Vec<_> = cases
        .cases
        .iter()
        .filter(|case| case.instance == at)
        .collect();
    let rows = compare::compare(&baseline, look, &of_instance);
    let mut line = compare::summary(&rows);
    if !up {
        line = format!("containerd at {address} does not answer; {line}");
    }
    let history = History::new(&config.history, "post-start");
    failpoint!("poststart.history.before");
    if let Err(error) = write_history(&history, &rows, &line) {
        crate::complain(&error.to_string());
    }
    failpoint!("poststart.history.after");
    let text = match args.output {
        TableOrJson::Table if in_journal() => last_line(&line),
        TableOrJson::Table => table(&rows, &line),
        TableOrJson::Json => {
            let all = json!({
                "schema": "recoverd/post-start/1",
                "containerd": address,
                "up": up,
                "tasks": rows,
                "summary": line,
                "gaps": examined.gaps,
            });
            format!("{all:#}\n")
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    failpoint!("poststart.said.after");
    Ok(if rows.iter().any(|row| row.became == Became::Lost) {
        Verdict::Unkept
    } else if !up || compare::unseen(look) {
        Verdict::Gaps
    } else {
        Verdict::Clean
    })
}

fn write_history(
    history: &History,
    rows: &[Row],
    line: &str,
) -> Result<(), crate::history::NotWritten> {
    for row in rows.iter().filter(|row| row.became != Became::Kept) {
        let subject = format!("{}/{}", row.namespace, row.id);
        let event = match row.became {
            Became::Lost => Event::Failed,
            Became::Exited | Became::Adopted | Became::Kept | Became::New => Event::Noted,
        };
        history.tell(event, &subject, &told(row), Map::new())?;
    }
    history.tell(Event::Ended, "", line, Map::new())
}

/// `adopted, init 7: …`, `exited with 23`.
fn told(row: &Row) -> String {
    let mut text = row.became.word().to_owned();
    if let Some(status) = row.exit {
        text.push_str(&format!(" with {status}"));
    }
    if let Some(pid) = row.pid {
        text.push_str(&format!(", init {pid}"));
    }
    if row.execs.0 > 0 {
        text.push_str(&format!(", {} of {} execs alive", row.execs.1, row.execs.0));
    }
    if !row.why.is_empty() {
        text.push_str(&format!(": {}", row.why));
    }
    text
}

/// Aligned, for people; the line comes last.
fn table(rows: &[Row], line: &str) -> String {
    let name = |row: &Row| format!("{}/{}", row.namespace, row.id);
    let width = rows.iter().map(|row| name(row).len()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        text.push_str(&format!("{:<width$}  {}\n", name(row), told(row)));
    }
    text + &last_line(line)
}

fn last_line(line: &str) -> String {
    format!("recoverd: post-start: {line}\n")
}

/// Standard output is the journal: it gets one line, and the history has the rest.
fn in_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    let stat = nix::sys::stat::fstat(io::stdout());
    stat.is_ok_and(|stat| stream.to_str() == Some(&format!("{}:{}", stat.st_dev, stat.st_ino)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_looks_like_this() {
        let row = |id: &str, became, pid, exit, why: &str| Row {
            namespace: "demo".into(),
            id: id.into(),
            became,
            pid,
            exit,
            execs: (0, 0),
            why: why.into(),
        };
        let lost = "containerd or a client ended it, or it ended since";
        let mut rows = vec![
            row("db", Became::Lost, None, None, lost),
            row("job", Became::Exited, None, Some(42), ""),
            row("web-frontend", Became::Adopted, Some(7), None, ""),
        ];
        rows[2].execs = (2, 1);
        let golden = "\
demo/db            lost: containerd or a client ended it, or it ended since
demo/job           exited with 42
demo/web-frontend  adopted, init 7, 1 of 2 execs alive
recoverd: post-start: 1 lost
";
        assert_eq!(table(&rows, "1 lost"), golden);
    }
}
