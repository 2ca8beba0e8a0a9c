//! Which shims are ours, what they run, and what they are to run. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use recoverd_common::{proc::ProcessId, seen::Seen};

use crate::{
    classify,
    correlate::{self, Case, Cases, Kind},
    facts::{Look, Shim, TaskName},
    report::Narrow,
};

/// A shim of ours.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Who.
    pub shim: ProcessId,
    /// containerd's namespace.
    pub namespace: String,
    /// The containerd's gRPC address.
    pub address: String,
    /// The group's id.
    pub group: String,
    /// `-id` of its command line.
    pub started_for: String,
    /// Where it listens; none when it cannot be told.
    pub socket: Option<PathBuf>,
    /// As its record says; none when that cannot be read.
    pub version: Option<String>,
    /// Why it is outdated, if it is.
    pub outdated: Option<String>,
    /// The path of its executable.
    pub exe: Option<PathBuf>,
    /// Its tasks.
    pub tasks: Vec<TaskName>,
}

/// Which of them are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Every one.
    All,
    /// Those of these tasks.
    Tasks(BTreeSet<TaskName>),
}

/// A task that was named, and whose shim cannot be upgraded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its name.
    pub name: TaskName,
    /// Why not.
    pub why: &'static str,
}

/// The shims of `choice`, by namespace and group, and what was named in vain.
pub fn candidates(
    look: &Look,
    cases: &Cases<'_>,
    narrow: &Narrow,
    choice: &Choice,
) -> (Vec<Candidate>, Vec<Refused>) {
    let mut tasks: BTreeMap<i32, Vec<&Case<'_>>> = BTreeMap::new();
    for case in &cases.cases {
        if let Some(shim) = case.shim.process() {
            tasks.entry(shim.id.pid).or_default().push(case);
        }
    }
    let mut found = Vec::new();
    for shim in &look.shims {
        let is_ours = correlate::kind(&shim.name, false) == Kind::Ours;
        let address = narrow.address.as_ref();
        let namespace = narrow.namespace.as_ref();
        if !is_ours
            || address.is_some_and(|address| *address != shim.address)
            || namespace.is_some_and(|namespace| *namespace != shim.namespace)
        {
            continue;
        }
        let own = tasks.get(&shim.id.pid).map(Vec::as_slice).unwrap_or(&[]);
        found.push(candidate(look, shim, own));
    }
    // A shim's child looks like it until it has become something else.
    let recorded: BTreeSet<(String, String)> = found
        .iter()
        .filter(|candidate| candidate.version.is_some())
        .map(|candidate| (candidate.namespace.clone(), candidate.started_for.clone()))
        .collect();
    found.retain(|candidate| {
        let place = (candidate.namespace.clone(), candidate.started_for.clone());
        candidate.version.is_some() || !recorded.contains(&place)
    });
    found.sort_by(|a, b| (&a.namespace, &a.group).cmp(&(&b.namespace, &b.group)));
    let Choice::Tasks(names) = choice else {
        return (found, Vec::new());
    };
    found.retain(|candidate| candidate.tasks.iter().any(|name| names.contains(name)));
    let has = |name: &TaskName| found.iter().any(|candidate| candidate.tasks.contains(name));
    let refused = names.iter().filter(|name| !has(name));
    let refused = refused.map(|name| Refused {
        name: name.clone(),
        why: why_not(cases, name),
    });
    let refused = refused.collect();
    (found, refused)
}

fn why_not(cases: &Cases<'_>, name: &TaskName) -> &'static str {
    let mut all = cases.cases.iter().filter(|case| case.name == *name);
    match all.next().map(|case| (case.kind(), case.shim.process())) {
        None => "no such task is seen",
        Some((_, None)) => "no shim serves it",
        Some((Some(Kind::Stock), _)) => {
            "its shim is a stock one: only a restart of the container renews that"
        }
        Some((Some(Kind::Foreign) | None, _)) => "its shim is foreign",
        Some((Some(Kind::Ours), _)) => "its shim is of another containerd or namespace",
    }
}

fn candidate(look: &Look, shim: &Shim, own: &[&Case<'_>]) -> Candidate {
    let record = look.records.iter().find_map(|file| {
        let record = file.record.present()?;
        let process = record.shim.process;
        let is_its = i32::try_from(process.pid).ok() == Some(shim.id.pid)
            && process.start_time == shim.id.start_time;
        is_its.then_some(&record.shim)
    });
    let exe = shim.exe.present();
    let mut tasks: Vec<TaskName> = own.iter().map(|case| case.name.clone()).collect();
    tasks.sort();
    Candidate {
        shim: shim.id,
        namespace: shim.namespace.clone(),
        address: shim.address.clone(),
        group: match record {
            Some(shim) => shim.group_id.clone(),
            None => shim.task.clone(),
        },
        started_for: shim.task.clone(),
        socket: record.map(|shim| PathBuf::from(&shim.socket)),
        version: record.map(|shim| shim.version.clone()),
        outdated: classify::outdated(shim),
        exe: exe.map(|exe| exe.path.clone()),
        tasks,
    }
}

/// How many shims run which version, the newest name first; *unknown* where no record tells.
pub fn versions<'a>(all: impl Iterator<Item = Option<&'a str>>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for version in all {
        let version = version.unwrap_or("unknown").to_owned();
        *counts.entry(version).or_default() += 1;
    }
    counts
}

/// What this candidate is to become: what is configured, else what stands where it was started
/// from, else `found` beside us or in PATH.
pub fn target(
    candidate: &Candidate,
    configured: Option<&PathBuf>,
    stands: impl Fn(&PathBuf) -> Seen<()>,
    found: Option<&PathBuf>,
) -> Result<PathBuf, &'static str> {
    if let Some(path) = configured {
        return Ok(path.clone());
    }
    let own = candidate.exe.as_ref();
    if let Some(path) = own.filter(|path| stands(path).present().is_some()) {
        return Ok(path.clone());
    }
    found.cloned().ok_or("no shim is installed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::fixture::{C1, healthy};

    const OURS: &str = "containerd-shim-recoverd-v1";
    const ANY: Narrow = Narrow {
        address: None,
        namespace: None,
    };

    fn found(look: &Look, narrow: &Narrow, choice: &Choice) -> (Vec<Candidate>, Vec<Refused>) {
        let cases = correlate::correlate(look, "/run/containerd/s".as_ref());
        candidates(look, &cases, narrow, choice)
    }

    fn named(id: &str) -> Choice {
        Choice::Tasks([("default".to_owned(), id.to_owned())].into())
    }

    #[test]
    fn only_ours_are_upgraded_and_what_was_named_in_vain_is_told() {
        let mut look = healthy();
        let (none, refused) = found(&look, &ANY, &named(C1.id));
        assert!(none.is_empty());
        assert!(refused[0].why.contains("stock"), "{refused:?}");
        let (none, refused) = found(&look, &ANY, &named("nobody"));
        assert!(none.is_empty());
        assert_eq!(refused[0].why, "no such task is seen");
        assert_eq!(found(&look, &ANY, &Choice::All), (vec![], vec![]));

        look.shim_of(&C1).name = OURS.into();
        for choice in [Choice::All, named(C1.id)] {
            let (some, refused) = found(&look, &ANY, &choice);
            assert_eq!((some.len(), refused.len()), (1, 0));
            let names: Vec<&str> = some[0].tasks.iter().map(|name| name.1.as_str()).collect();
            assert!(names.contains(&C1.id));
            assert_eq!(some[0].outdated, None);
            assert_eq!(some[0].version, None);
        }
        let elsewhere = Narrow {
            address: Some("/other".into()),
            namespace: None,
        };
        assert_eq!(found(&look, &elsewhere, &Choice::All).0, []);
        let (_, refused) = found(&look, &elsewhere, &named(C1.id));
        assert!(refused[0].why.contains("another containerd"));
    }

    #[test]
    fn what_is_configured_counts_then_its_own_place_then_what_is_found() {
        let mut look = healthy();
        look.shim_of(&C1).name = OURS.into();
        let (mut some, _) = found(&look, &ANY, &Choice::All);
        let mut candidate = some.remove(0);
        candidate.exe = Some("/own".into());
        let (configured, found) = (PathBuf::from("/set"), PathBuf::from("/found"));
        let there = |_: &PathBuf| Seen::Present(());
        let gone = |_: &PathBuf| Seen::Absent;
        let to = |configured, there: fn(&PathBuf) -> Seen<()>, found| {
            target(&candidate, configured, there, found)
        };
        assert_eq!(to(Some(&configured), there, None), Ok(configured.clone()));
        assert_eq!(to(None, there, Some(&found)), Ok("/own".into()));
        assert_eq!(to(None, gone, Some(&found)), Ok(found.clone()));
        assert_eq!(to(None, gone, None), Err("no shim is installed"));
    }

    #[test]
    fn shims_are_counted_by_version() {
        let counts = versions([Some("1"), None, Some("2"), Some("1")].into_iter());
        let expected = [("1", 2), ("2", 1), ("unknown", 1)];
        let expected = expected.map(|(version, count)| (version.to_owned(), count));
        assert_eq!(counts, expected.into());
    }
}
