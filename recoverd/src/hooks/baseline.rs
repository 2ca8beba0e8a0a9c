//! What was there before containerd started: `<run-dir>/baseline.json`, one entry for each
//! containerd, each task by its identity. `pre-start` writes it before it acts, so that a killed
//! one leaves it too, and again with what it did; `post-start` compares.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use recoverd_common::{
    failpoint,
    proc::ProcessId,
    read::{MAX_FILE, read_file},
    record,
    seen::Seen,
    timestamp::Timestamp,
};
use serde::{Deserialize, Serialize};

use crate::{
    adopt::Order,
    correlate::{Case, Kind},
    facts::{Look, Phase, TaskName},
    own_dir,
};

/// The file below the run folder.
pub const FILE: &str = "baseline.json";
/// The format's name.
const SCHEMA: &str = "recoverd/baseline/1";

/// One containerd's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// When it was looked.
    pub at: Timestamp,
    /// In which boot: pids of another one mean nothing.
    pub boot_id: Option<String>,
    /// Every task that had a bundle.
    pub tasks: Vec<Task>,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// How far it was.
    pub phase: String,
    /// Its living init.
    pub init: Option<Identity>,
    /// Its exit status, where its shim or record knew one.
    pub exit: Option<u32>,
    /// Its living execs, by id.
    pub execs: BTreeMap<String, Identity>,
    /// Its shim, when one lived.
    pub shim: Option<Identity>,
    /// `ours` or `stock`, when known.
    pub kind: Option<String>,
    /// What pre-start did with it.
    pub did: Did,
    /// Why, or what could not be had back; one line, may be empty.
    pub why: String,
}

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid.
    pub pid: i32,
    /// When it started, clock ticks after boot.
    pub start_time: u64,
}

impl From<ProcessId> for Identity {
    fn from(id: ProcessId) -> Self {
        Self {
            pid: id.pid,
            start_time: id.start_time,
        }
    }
}

/// What pre-start did with a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Did {
    /// Nothing (yet).
    Nothing,
    /// A new shim serves it; there was none.
    Adopted,
    /// A new shim serves it; the old one hung, or could not be spoken to.
    Replaced,
    /// It should have been adopted and was not.
    Failed,
    /// Its bundle was set aside: nothing of it lived.
    SetAside,
}

#[derive(Serialize, Deserialize)]
struct File {
    schema: String,
    containerds: BTreeMap<String, Baseline>,
}

/// What the look shows of the tasks of `instance`.
pub fn of<'a>(
    look: &Look,
    cases: impl IntoIterator<Item = &'a Case<'a>>,
    instance: usize,
) -> Baseline {
    let tasks = cases
        .into_iter()
        .filter(|case| case.instance == Some(instance) && case.bundle.is_some())
        .map(|case| task(look, case))
        .collect();
    Baseline {
        at: Timestamp::from(look.at),
        boot_id: look.host.boot_id.clone(),
        tasks,
    }
}

fn task(look: &Look, case: &Case<'_>) -> Task {
    let execs = match recorded(look, case) {
        Some(task) => living_execs(look, task).into_iter().collect(),
        None => look
            .execs
            .iter()
            .filter(|exec| exec.name == case.name)
            .filter_map(|exec| Some((exec.exec_id.clone()?, exec.id.into())))
            .collect(),
    };
    Task {
        namespace: case.name.0.clone(),
        id: case.name.1.clone(),
        phase: case.phase().word().to_owned(),
        init: case.init.alive().map(Identity::from),
        exit: exit(look, case),
        execs,
        shim: case.shim.process().map(|shim| shim.id.into()),
        kind: case.kind().map(|kind: Kind| kind.word().to_owned()),
        did: Did::Nothing,
        why: String::new(),
    }
}

/// The status that is known: the shim's word, else its record's.
fn exit(look: &Look, case: &Case<'_>) -> Option<u32> {
    if let Some(state) = case.state() {
        return (state.phase == Phase::Stopped).then_some(state.exit_status);
    }
    match recorded_exit(look, case)? {
        record::Exit::Observed { status, .. } => Some(*status),
        record::Exit::Unknown { .. } => None,
    }
}

/// How its record says that it ended.
pub fn recorded_exit<'a>(look: &'a Look, case: &Case<'_>) -> Option<&'a record::Exit> {
    recorded(look, case)?.exit.as_ref()
}

/// What the record beside its socket says of it, if it is of this boot.
fn recorded<'a>(look: &'a Look, case: &Case<'_>) -> Option<&'a record::Task> {
    let address = case.address.as_ref()?;
    let file = look.records.iter().find(|file| file.socket == *address)?;
    let record = file.record.present()?;
    if Some(&record.boot_id) != look.host.boot_id.as_ref() {
        return None;
    }
    record.tasks.iter().find(|task| task.id == case.name.1)
}

/// The execs of a recorded task that live: without their shim they are nobody's children.
fn living_execs(look: &Look, task: &record::Task) -> Vec<(String, Identity)> {
    let Some(table) = look.processes.present() else {
        return Vec::new();
    };
    let living = |exec: &record::Exec| {
        let process = exec.process?;
        let pid = i32::try_from(process.pid).ok()?;
        let stat = table.get(&pid)?;
        let same = stat.id.start_time == process.start_time && stat.alive();
        same.then(|| (exec.id.clone(), stat.id.into()))
    };
    task.execs.iter().filter_map(living).collect()
}

impl Baseline {
    /// Adds what adoption found out: the execs of a task whose shim kept no record.
    pub fn learn(&mut self, look: &Look, order: &Order) {
        let records = order.adoption.record.iter();
        for task in records.flat_map(|record| &record.tasks) {
            let name = (order.namespace.clone(), task.id.clone());
            if let Some(own) = self.task_mut(&name) {
                own.execs.extend(living_execs(look, task));
            }
        }
    }

    /// A task of it.
    pub fn task(&self, name: &TaskName) -> Option<&Task> {
        let mut tasks = self.tasks.iter();
        tasks.find(|task| task.namespace == name.0 && task.id == name.1)
    }

    /// A task of it, to be changed.
    pub fn task_mut(&mut self, name: &TaskName) -> Option<&mut Task> {
        let mut tasks = self.tasks.iter_mut();
        tasks.find(|task| task.namespace == name.0 && task.id == name.1)
    }
}

/// Reads the baseline of the containerd at `address`.
pub fn read(run_dir: &Path, address: &str) -> Seen<Baseline> {
    read_all(&run_dir.join(FILE)).and_then(|mut file| match file.containerds.remove(address) {
        Some(baseline) => Seen::Present(baseline),
        None => Seen::Absent,
    })
}

fn read_all(path: &Path) -> Seen<File> {
    read_file(path, MAX_FILE).and_then(|bytes| match serde_json::from_slice::<File>(&bytes) {
        Ok(file) if file.schema == SCHEMA => Seen::Present(file),
        Ok(file) => Seen::Unknown(format!("is {:?}, not {SCHEMA}", file.schema)),
        Err(error) => Seen::Unknown(error.to_string()),
    })
}

/// Replaces the baseline of the containerd at `address`; those of others stay.
pub fn write(run_dir: &Path, address: &str, baseline: &Baseline) -> io::Result<()> {
    own_dir::open(run_dir)?;
    let path = run_dir.join(FILE);
    // What cannot be read is nobody's any more: every containerd's hook writes it anew.
    let mut containerds = match read_all(&path) {
        Seen::Present(file) => file.containerds,
        Seen::Absent | Seen::Unknown(_) => BTreeMap::new(),
    };
    containerds.insert(address.to_owned(), baseline.clone());
    let file = File {
        schema: SCHEMA.to_owned(),
        containerds,
    };
    let spare = run_dir.join(format!("{FILE}.new"));
    match fs::remove_file(&spare) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&spare)?;
    failpoint!("prestart.baseline.opened");
    out.write_all(&serde_json::to_vec(&file)?)?;
    drop(out);
    failpoint!("prestart.baseline.written");
    fs::rename(&spare, &path)?;
    failpoint!("prestart.baseline.after");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        correlate::correlate,
        facts::fixture::{C1, SOCKET_DIR, healthy},
    };

    #[test]
    fn each_containerd_has_its_own_and_reads_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        assert_eq!(read(&run, "/a"), Seen::Absent);
        let look = healthy();
        let cases = correlate(&look, SOCKET_DIR.as_ref());
        let mut first = of(&look, &cases.cases, 0);
        assert_eq!(first.tasks.len(), 1);
        assert_eq!(first.tasks[0].init.unwrap().pid, C1.init);
        write(&run, "/a", &first).unwrap();
        let name = ("default".to_owned(), C1.id.to_owned());
        first.task_mut(&name).unwrap().did = Did::Adopted;
        write(&run, "/b", &first).unwrap();
        let did = |address| read(&run, address).present().unwrap().tasks[0].did;
        assert_eq!((did("/a"), did("/b")), (Did::Nothing, Did::Adopted));
    }

    #[test]
    fn what_is_no_baseline_is_unknown_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let look = healthy();
        let cases = correlate(&look, SOCKET_DIR.as_ref());
        for text in [
            "",
            "{}",
            r#"{"schema":"recoverd/baseline/9","containerds":{}}"#,
        ] {
            fs::write(dir.path().join(FILE), text).unwrap();
            assert!(matches!(read(dir.path(), "/a"), Seen::Unknown(_)), "{text}");
        }
        write(dir.path(), "/a", &of(&look, &cases.cases, 0)).unwrap();
        assert!(read(dir.path(), "/a").present().is_some());
    }
}
