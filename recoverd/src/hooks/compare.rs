//! What became of every task over containerd's start: the baseline against a new look. Pure.
//! By identity: a process of the same number that started at another time is another one.

use std::collections::BTreeSet;

use recoverd_common::{record, seen::Seen};
use serde::Serialize;

use super::baseline::{Baseline, Did, Identity, Task, recorded_exit};
use crate::{
    correlate::{Case, Init, Known},
    facts::{Look, Phase, TaskName, one_line},
};

/// What became of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Became {
    /// Its workload is gone, or containerd does not know it any more.
    Lost,
    /// It ended, and what is known of it is told.
    Exited,
    /// Its init is the same, its shim a new one.
    Adopted,
    /// It is as it was.
    Kept,
    /// It was not there before.
    New,
}

impl Became {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Became::Lost => "lost",
            Became::Exited => "exited",
            Became::Adopted => "adopted",
            Became::Kept => "kept",
            Became::New => "new",
        }
    }
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// What became of it.
    pub became: Became,
    /// Its init now, when it lives.
    pub pid: Option<i32>,
    /// Its exit status, when it ended and somebody knows it.
    pub exit: Option<u32>,
    /// Execs before and still alive.
    pub execs: (usize, usize),
    /// Why, or what should be known; one line, may be empty.
    pub why: String,
}

/// Compares; the worst first.
pub fn compare(baseline: &Baseline, look: &Look, cases: &[&Case<'_>]) -> Vec<Row> {
    let same_boot = baseline.boot_id.is_some() && baseline.boot_id == look.host.boot_id;
    let mut rows: Vec<Row> = Vec::new();
    let mut before: BTreeSet<TaskName> = BTreeSet::new();
    for task in &baseline.tasks {
        let name = (task.namespace.clone(), task.id.clone());
        let case = cases.iter().find(|case| case.name == name).copied();
        rows.push(if same_boot {
            became(task, look, case)
        } else {
            row(task, Became::Lost, "the machine was booted since".into())
        });
        before.insert(name);
    }
    let new = cases
        .iter()
        .filter(|case| !before.contains(&case.name))
        .filter_map(|case| {
            let init = case.init.alive()?;
            Some(Row {
                namespace: case.name.0.clone(),
                id: case.name.1.clone(),
                became: Became::New,
                pid: Some(init.pid),
                exit: None,
                execs: (0, 0),
                why: String::new(),
            })
        });
    rows.extend(new);
    rows.sort_by(|a, b| {
        let key = |row: &Row| (row.became, row.namespace.clone(), row.id.clone());
        key(a).cmp(&key(b))
    });
    rows
}

fn row(task: &Task, became: Became, why: String) -> Row {
    Row {
        namespace: task.namespace.clone(),
        id: task.id.clone(),
        became,
        pid: None,
        exit: None,
        execs: (task.execs.len(), 0),
        why: one_line(&why),
    }
}

fn became(task: &Task, look: &Look, case: Option<&Case<'_>>) -> Row {
    let Some(case) = case else {
        return gone(task);
    };
    let alive = case.init.alive().map(Identity::from);
    match (task.init, alive) {
        (Some(was), Some(is)) if was == is => lives(task, look, case, is),
        (Some(_), Some(_)) => row(
            task,
            Became::Lost,
            "another init runs under its name".into(),
        ),
        (None, Some(is)) => Row {
            pid: Some(is.pid),
            ..row(task, Became::New, "it was not running before".into())
        },
        (_, None) => match &case.init {
            Init::Unknown(why) => row(
                task,
                Became::Lost,
                format!("its init cannot be told: {why}"),
            ),
            Init::None | Init::Dead(..) | Init::Alive(_) => ended(task, look, case),
        },
    }
}

fn lives(task: &Task, look: &Look, case: &Case<'_>, init: Identity) -> Row {
    let alive = task
        .execs
        .values()
        .filter(|exec| living(look, exec))
        .count();
    let mut why = match (task.did, task.why.as_str()) {
        (Did::Adopted | Did::Replaced, why) => why.to_owned(),
        (Did::Nothing | Did::Failed | Did::SetAside, _) => String::new(),
    };
    let known = match case.containerd {
        Known::Yes(listed) if listed.phase == Phase::Stopped => {
            why = "its init lives, containerd says that it stopped".into();
            false
        }
        Known::Yes(_) => true,
        Known::No => {
            why = "its init lives, containerd does not know it".into();
            false
        }
        // It was up and did not list its tasks in time: that is no loss.
        Known::CannotSay => true,
    };
    let became = match (known, task.did) {
        (false, _) => Became::Lost,
        (true, Did::Adopted | Did::Replaced) => Became::Adopted,
        (true, Did::Nothing | Did::Failed | Did::SetAside) => {
            let shim = case.shim.process().map(|shim| Identity::from(shim.id));
            match (task.shim, shim) {
                (Some(was), Some(is)) if was != is => Became::Adopted,
                _ => Became::Kept,
            }
        }
    };
    Row {
        pid: Some(init.pid),
        execs: (task.execs.len(), alive),
        ..row(task, became, why)
    }
}

fn living(look: &Look, exec: &Identity) -> bool {
    let table = look.processes.present();
    table.is_some_and(|table| {
        table
            .get(&exec.pid)
            .is_some_and(|stat| stat.id.start_time == exec.start_time && stat.alive())
    })
}

/// The init has ended, and the task is still there.
fn ended(task: &Task, look: &Look, case: &Case<'_>) -> Row {
    if let Some(record::Exit::Unknown { why }) = recorded_exit(look, case) {
        return row(task, Became::Exited, format!("status unknown: {why}"));
    }
    match case.state() {
        Some(state) if state.phase == Phase::Stopped => Row {
            exit: Some(state.exit_status),
            ..row(task, Became::Exited, String::new())
        },
        Some(_) | None => gone(task),
    }
}

/// Nothing of the task is there any more.
fn gone(task: &Task) -> Row {
    match (task.init, task.exit, task.did) {
        (_, _, Did::SetAside) => row(task, Became::Exited, task.why.clone()),
        (None, Some(status), _) => Row {
            exit: Some(status),
            ..row(
                task,
                Became::Exited,
                "had exited before; containerd has forgotten it".into(),
            )
        },
        (None, None, _) => row(
            task,
            Became::Exited,
            told(task, "had ended before; nobody knows how"),
        ),
        (Some(_), _, _) => row(
            task,
            Became::Lost,
            told(task, "containerd or a client ended it, or it ended since"),
        ),
    }
}

fn told(task: &Task, otherwise: &str) -> String {
    match task.why.as_str() {
        "" => otherwise.to_owned(),
        why => why.to_owned(),
    }
}

/// One line for the journal.
pub fn summary(rows: &[Row]) -> String {
    let count = |became| rows.iter().filter(|row| row.became == became).count();
    let execs: (usize, usize) = rows.iter().fold((0, 0), |sum, row| {
        (
            sum.0.saturating_add(row.execs.0),
            sum.1.saturating_add(row.execs.1),
        )
    });
    let mut text = [
        Became::Kept,
        Became::Adopted,
        Became::Exited,
        Became::New,
        Became::Lost,
    ]
    .map(|became| format!("{} {}", count(became), became.word()))
    .join(", ");
    if execs.0 > 0 {
        text.push_str(&format!(", {} of {} execs alive", execs.1, execs.0));
    }
    const SHOWN: usize = 5;
    let lost: Vec<String> = rows
        .iter()
        .filter(|row| row.became == Became::Lost)
        .take(SHOWN)
        .map(|row| format!("{}/{}: {}", row.namespace, row.id, row.why))
        .collect();
    if !lost.is_empty() {
        text.push_str(&format!(" ({})", lost.join("; ")));
    }
    text
}

/// Something of this is not known because the look did not see it.
pub fn unseen(look: &Look) -> bool {
    !matches!(look.processes, Seen::Present(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::fixture::{C1, OLD, SOCKET_DIR, Task as Fixture, healthy, process, stat},
        hooks::baseline,
    };

    const OTHER: Fixture = Fixture {
        instance: 0,
        id: "c2",
        group: "c2",
        shim: 8,
        init: 9,
    };

    fn before(look: &Look) -> Baseline {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        baseline::of(look, &cases.cases, 0)
    }

    fn after(baseline: &Baseline, look: &Look) -> Vec<Row> {
        let cases = correlate(look, SOCKET_DIR.as_ref());
        let all: Vec<&Case<'_>> = cases.cases.iter().collect();
        compare(baseline, look, &all)
    }

    fn one(baseline: &Baseline, look: &Look) -> (Became, Option<u32>, String) {
        let rows = after(baseline, look);
        assert_eq!(rows.len(), 1, "{rows:?}");
        (rows[0].became, rows[0].exit, rows[0].why.clone())
    }

    #[test]
    fn what_did_not_change_is_kept_and_what_came_is_new() {
        let mut look = healthy();
        let baseline = before(&look);
        assert_eq!(one(&baseline, &look).0, Became::Kept);
        look.add(&OTHER);
        let became: Vec<Became> = after(&baseline, &look).iter().map(|r| r.became).collect();
        assert_eq!(became, [Became::Kept, Became::New]);
    }

    #[test]
    fn a_new_shim_of_the_same_init_is_an_adoption() {
        let mut look = healthy();
        let mut baseline = before(&look);
        look.shim_started(&C1, 1);
        assert_eq!(one(&baseline, &look).0, Became::Adopted);
        let mut look = healthy();
        look.unlisted(&C1);
        baseline.tasks[0].did = Did::Adopted;
        let (became, _, why) = one(&baseline, &look);
        assert_eq!(
            became,
            Became::Lost,
            "alive, and containerd does not know it"
        );
        assert!(why.contains("does not know"), "{why}");
    }

    #[test]
    fn an_exit_has_the_status_that_somebody_observed() {
        let mut look = healthy();
        let baseline = before(&look);
        look.end_init(&C1);
        look.told(&C1, Phase::Stopped);
        assert_eq!(
            one(&baseline, &look),
            (Became::Exited, Some(42), String::new())
        );
    }

    #[test]
    fn a_task_that_is_gone_is_lost_with_what_pre_start_knew() {
        let look = healthy();
        let mut baseline = before(&look);
        let mut gone = healthy();
        gone.remove(&C1);
        let (became, exit, _) = one(&baseline, &gone);
        assert_eq!((became, exit), (Became::Lost, None));
        baseline.tasks[0].why = "its address is abstract".into();
        assert_eq!(one(&baseline, &gone).2, "its address is abstract");
        baseline.tasks[0].init = None;
        baseline.tasks[0].exit = Some(3);
        let (became, exit, _) = one(&baseline, &gone);
        assert_eq!((became, exit), (Became::Exited, Some(3)));
    }

    #[test]
    fn another_process_of_the_same_number_is_another() {
        let mut look = healthy();
        let baseline = before(&look);
        look.init_started(&C1, 1);
        assert_eq!(one(&baseline, &look).0, Became::Lost);
        let mut rebooted = baseline.clone();
        rebooted.boot_id = Some("before".into());
        assert_eq!(one(&rebooted, &healthy()).0, Became::Lost);
    }

    #[test]
    fn execs_are_counted_by_identity() {
        let mut look = healthy();
        let mut baseline = before(&look);
        for (name, pid) in [("a", 50), ("b", 51)] {
            let id = process(pid, OLD);
            baseline.tasks[0].execs.insert(name.into(), id.into());
            look.table().insert(pid, stat(id, C1.shim));
        }
        look.table().insert(51, stat(process(51, 1), C1.shim));
        let rows = after(&baseline, &look);
        assert_eq!(rows[0].execs, (2, 1));
        assert_eq!(
            summary(&rows),
            "1 kept, 0 adopted, 0 exited, 0 new, 0 lost, 1 of 2 execs alive"
        );
    }
}
