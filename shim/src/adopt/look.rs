//! Which recorded processes live, how those ended that do not, and what the runtime holds. Reads
//! only, but for ending runtime commands that hang.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use recoverd_common::{
    adoption::Observed,
    cgroup::{Cgroup, Roots, parse_memberships},
    paths::Beside,
    proc::Proc,
    read::read_text,
    record::{self, Phase, Record},
    seen::Seen,
    supervision,
};

use super::{Container, ExecFacts, Facts, Life, Restored};
use crate::{
    config::Config,
    oom,
    options::{DEFAULT_BINARY, Options},
    runc::Place,
    service::Key,
    sys,
    tasks::Process,
    witness::{self, Answer, Teller},
};

/// So long a predecessor's runtime commands are waited for; a healthy one takes 50 ms.
const RUNTIME_ENDS: Duration = Duration::from_millis(3_000);
/// And so long after SIGKILL.
const KILLED_ENDS: Duration = Duration::from_millis(500);
/// The supervisor is asked so long: the kernel tells it of an end within 100 ms.
const WITNESS_TELLS: Duration = Duration::from_millis(500);
/// Longest `/proc/<pid>/cgroup` that is read, bytes.
const MAX_CGROUP: u64 = 64 << 10;
/// Why a status is not to be had, mostly.
const UNSEEN: &str = "it ended while no shim was there to see it";

/// The recorded processes.
#[derive(Debug, Default)]
pub struct Look {
    /// Inits and execs without a recorded exit: a descriptor if it is this very process, dead or
    /// alive; else why not.
    pub members: BTreeMap<Key, (Process, Result<OwnedFd, String>)>,
    /// Loggers that live.
    pub loggers: BTreeMap<Key, (Process, OwnedFd)>,
    /// Holders of what clients read, that live.
    pub holders: Vec<(Key, Process)>,
    /// Holders of what is not there any more, that live.
    pub strays: Vec<Process>,
    /// Who tells how they ended, or will.
    pub teller: Teller,
    /// Runtime commands that are at work.
    running: Vec<OwnedFd>,
    /// What a supervisor has seen of those that nobody can say of any more.
    observed: Vec<(Process, u32)>,
    /// The machine has booted since.
    booted: bool,
    /// Until when the supervisor is asked what it has seen since.
    asks_until: Option<Instant>,
}

/// Takes hold of every process of `record`. To be done before its shim is ended: an exit is told
/// to who has a descriptor only, and by a `teller` that was there before.
pub fn look(
    roots: &Roots,
    record: &Record,
    teller: Teller,
    observed: &[Observed],
    mut pidfds: Vec<(Process, OwnedFd)>,
) -> Look {
    let proc = Proc::new(&roots.proc);
    let booted = match proc.boot_id() {
        Seen::Present(id) => id != record.boot_id,
        Seen::Absent | Seen::Unknown(_) => false,
    };
    let mut open = |process: Process, cgroup: &[String]| {
        if booted {
            return Err("the machine has booted since it was started".to_owned());
        }
        let kept = pidfds.iter().position(|(other, _)| *other == process);
        let pidfd = match kept {
            Some(at) => pidfds.swap_remove(at).1,
            None => witness::open(&proc, process)?,
        };
        // A zombie has left its groups.
        if !is_within(roots, process.pid, cgroup) && !witness::has_ended(&pidfd) {
            let pid = process.pid;
            return Err(format!("pid {pid} is not in the cgroup of its container"));
        }
        Ok(pidfd)
    };
    let seen = |seen: &Observed| (super::process(seen.process), seen.status);
    let mut look = Look {
        teller,
        observed: observed.iter().map(seen).collect(),
        booted,
        ..Look::default()
    };
    for task in &record.tasks {
        let init = (task.exit.is_none(), task.init, &task.stdio);
        let execs = task.execs.iter().map(|exec| {
            let member = (exec.exit.is_none(), exec.process, &exec.stdio);
            (exec_key(task, exec), member)
        });
        for (key, (unended, recorded, stdio)) in
            std::iter::once((Key::init(&task.id), init)).chain(execs)
        {
            if let Some(logger) = &stdio.logger
                && let process = super::process(logger.process)
                && let Ok(pidfd) = open(process, &[])
                && !witness::has_ended(&pidfd)
            {
                look.loggers.insert(key.clone(), (process, pidfd));
            }
            let holders = stdio.holders.iter().map(|holder| super::process(*holder));
            let living = holders.filter(|holder| open(*holder, &[]).is_ok());
            look.holders
                .extend(living.map(|holder| (key.clone(), holder)));
            if let Some(process) = recorded.filter(|_| unended).map(super::process) {
                let found = open(process, &task.cgroup);
                look.members.insert(key, (process, found));
            }
        }
    }
    let strays = record.strays.iter().map(|stray| super::process(*stray));
    look.strays = strays.filter(|stray| open(*stray, &[]).is_ok()).collect();
    let children = record.running.iter().filter_map(|job| job.process);
    look.running = children
        .filter_map(|child| open(super::process(child), &[]).ok())
        .collect();
    look
}

/// True if the record beside `socket` names an init that lives.
pub fn has_living(socket: &Path) -> bool {
    let Seen::Present(record) = record::read(&Beside::of(socket).record) else {
        return false;
    };
    let look = look(
        &Roots::default(),
        &record,
        Teller::default(),
        &[],
        Vec::new(),
    );
    look.members
        .iter()
        .filter_map(|(key, (_, found))| Some((key, found.as_ref().ok()?)))
        .any(|(key, pidfd)| key.is_init() && !witness::has_ended(pidfd))
}

fn exec_key(task: &record::Task, exec: &record::Exec) -> Key {
    Key {
        id: task.id.clone(),
        exec_id: exec.id.clone(),
    }
}

/// True if the process is where the record says, in one hierarchy at least: it may have moved
/// below (a service manager does), and on v1 out of some. A record without groups says nothing.
fn is_within(roots: &Roots, pid: u32, recorded: &[String]) -> bool {
    let recorded = parse_memberships(&recorded.join("\n"));
    // The root group is everybody's.
    let mut telling = recorded.iter().filter(|m| m.path != "/").peekable();
    if telling.peek().is_none() {
        return true;
    }
    let path = roots.proc.join(pid.to_string()).join("cgroup");
    let Seen::Present(text) = read_text(&path, MAX_CGROUP) else {
        return false;
    };
    let now = parse_memberships(&text);
    telling.any(|then| {
        now.iter().any(|now| {
            now.controllers == then.controllers && Path::new(&now.path).starts_with(&then.path)
        })
    })
}

impl Look {
    /// Lets the predecessor's runtime commands finish: what they leave is looked at then. One
    /// that hangs is ended.
    pub fn await_running(&mut self) {
        self.await_all(RUNTIME_ENDS);
        for pidfd in &self.running {
            let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        }
        self.await_all(KILLED_ENDS);
    }

    fn await_all(&mut self, longest: Duration) {
        let until = Instant::now() + longest;
        self.running.retain(|pidfd| {
            !witness::await_end(pidfd, until.saturating_duration_since(Instant::now()))
        });
    }

    fn life(&mut self, proc: &Proc, key: &Key) -> Option<Life> {
        let (process, found) = self.members.get(key)?;
        let life = match found {
            Err(why) => Life::Gone(why.clone()),
            Ok(pidfd) if !witness::has_ended(pidfd) => Life::Living,
            Ok(pidfd) => match witness::await_answer(&mut self.teller, proc, *process, pidfd) {
                Answer::Status(status) => Life::Ended(status),
                Answer::Unknown(why) => Life::Gone(why),
                Answer::NotYet => Life::Gone(UNSEEN.to_owned()),
            },
        };
        let process = *process;
        Some(match life {
            Life::Gone(why) => self.witnessed(process).map_or(Life::Gone(why), Life::Ended),
            life => life,
        })
    }

    /// How a process ended, of which this is all that is left, as a supervisor saw it: before it had
    /// us started, or since.
    fn witnessed(&mut self, process: Process) -> Option<u32> {
        let mut observed = self.observed.iter();
        if let Some((_, status)) = observed.find(|(other, _)| *other == process) {
            return Some(*status);
        }
        if self.booted || process.start_time == 0 {
            return None;
        }
        // For all of them: who does not answer answers nothing.
        let until = *self
            .asks_until
            .get_or_insert_with(|| Instant::now() + WITNESS_TELLS);
        let process = record::Process {
            pid: process.pid,
            start_time: process.start_time,
        };
        supervision::how_ended(Path::new(supervision::RUN_DIR), process, until)
    }

    /// What there is to decide on `task`, a task of `record`. What an exec has become that was
    /// being started is taken hold of.
    pub fn facts(&mut self, roots: &Roots, record: &Record, task: &record::Task) -> Facts {
        let proc = Proc::new(&roots.proc);
        let namespace = &record.shim.namespace;
        let options = options(task, namespace);
        let bundle = Path::new(&task.bundle);
        let place = Place {
            bundle,
            namespace,
            options: &options,
        };
        let restored = self.restored(roots, record, task, &place);
        let memberships = match &restored {
            Some(restored) => parse_memberships(&restored.memberships.join("\n")),
            None => parse_memberships(&task.cgroup.join("\n")),
        };
        let cgroup = match Cgroup::of_memberships(roots, &memberships) {
            Seen::Present(cgroup) => Some(cgroup),
            Seen::Absent | Seen::Unknown(_) => None,
        };
        let mut execs = BTreeMap::new();
        for exec in &task.execs {
            let key = exec_key(task, exec);
            let starting = exec.phase == Phase::Creating && exec.exit.is_none();
            let late = starting
                .then(|| self.late(roots, &place.pid_file(&key), task, record, ("exec", &key)))
                .flatten();
            let facts = ExecFacts {
                life: self.life(&proc, &key),
                late,
                prepared: place.process_file(&key).exists(),
            };
            execs.insert(exec.id.clone(), facts);
        }
        let config = Config::read(bundle).ok();
        Facts {
            init: self.life(&proc, &Key::init(&task.id)),
            execs,
            frozen: cgroup.as_ref().and_then(frozen),
            container: container(&options.root(namespace).join(&task.id)),
            private_pids: config.as_ref().is_some_and(Config::private_pids),
            memory_limit: config.as_ref().and_then(Config::memory_limit),
            oom_kills: cgroup.as_ref().and_then(|cgroup| {
                oom::kills_of(cgroup).or_else(|| self.logged(cgroup, record, task))
            }),
            cgroup,
            restored,
            options,
        }
    }

    /// The counter of a cgroup that has gone since its last look, as the kernel's log tells.
    fn logged(&self, cgroup: &Cgroup, record: &Record, task: &record::Task) -> Option<u64> {
        let (then, init) = (task.oom_kills?, task.init?);
        if self.booted || init.start_time == 0 {
            return None;
        }
        let new = oom::kills_after(cgroup, record.written_at, init.start_time)?;
        Some(then.saturating_add(new))
    }

    /// The init that a predecessor's `runc restore` has made, if it has come so far.
    fn restored(
        &mut self,
        roots: &Roots,
        record: &Record,
        task: &record::Task,
        place: &Place<'_>,
    ) -> Option<Restored> {
        let key = Key::init(&task.id);
        let op = |job: &&record::Running| job.op == "restore" && job.id == task.id;
        let waits = task.restore.is_some() && task.init.is_none();
        // The pid file may be older than the attempt; the runtime says whether there is one.
        let state = place.options.root(place.namespace).join(&task.id);
        if !waits || container(&state) != Container::Started {
            return None;
        }
        record.running.iter().find(op)?;
        let (process, life) = self.late(
            roots,
            &place.pid_file(&key),
            task,
            record,
            ("restore", &key),
        )?;
        let path = roots.proc.join(process.pid.to_string()).join("cgroup");
        let memberships = match read_text(&path, MAX_CGROUP) {
            Seen::Present(text) => text.lines().map(str::to_owned).collect(),
            Seen::Absent | Seen::Unknown(_) => Vec::new(),
        };
        Some(Restored {
            process,
            life,
            memberships,
        })
    }

    /// The process of an exec, or an init, that was being started: by its pid file, if it is in the container
    /// and no older than the command that has started it.
    fn late(
        &mut self,
        roots: &Roots,
        pid_file: &Path,
        task: &record::Task,
        record: &Record,
        (op, key): (&str, &Key),
    ) -> Option<(Process, Life)> {
        let Seen::Present(text) = read_text(pid_file, 32) else {
            return None;
        };
        let pid: u32 = text.trim().parse().ok().filter(|pid| *pid > 0)?;
        let proc = Proc::new(&roots.proc);
        let start_time = match proc.stat(i32::try_from(pid).ok()?) {
            Seen::Present(stat) => stat.id.start_time,
            Seen::Absent | Seen::Unknown(_) => 0,
        };
        let process = Process { pid, start_time };
        let starter = record
            .running
            .iter()
            .find(|job| job.op == op && job.id == key.id && job.exec_id == key.exec_id)
            .and_then(|job| job.process);
        let earlier = starter.is_some_and(|starter| start_time < starter.start_time);
        let found = match witness::open(&proc, process) {
            Ok(pidfd) if !earlier => {
                if is_within(roots, pid, &task.cgroup) || witness::has_ended(&pidfd) {
                    Ok(pidfd)
                } else {
                    Err(UNSEEN.to_owned())
                }
            }
            Ok(_) => Err(UNSEEN.to_owned()),
            Err(why) => Err(why),
        };
        self.members.insert(key.clone(), (process, found));
        self.life(&proc, key).map(|life| (process, life))
    }
}

/// The options of Create: the bundle keeps most of them, the record decides on the runtime.
fn options(task: &record::Task, namespace: &str) -> Options {
    let mut options = match Options::read(Path::new(&task.bundle)) {
        Seen::Present(options) => options,
        Seen::Absent | Seen::Unknown(_) => Options::default(),
    };
    let runtime = &task.runtime;
    if !runtime.binary.is_empty() && options.binary() != runtime.binary {
        options.binary_name = match runtime.binary.as_str() {
            DEFAULT_BINARY => String::new(),
            other => other.to_owned(),
        };
    }
    options.systemd_cgroup = runtime.systemd_cgroup;
    let root = Path::new(&runtime.root);
    if options.root(namespace) != root
        && root.file_name().is_some_and(|name| name == namespace)
        && let Some(parent) = root.parent()
    {
        options.root = parent.to_string_lossy().into_owned();
    }
    options
}

/// By the fifo that runc and crun keep in a container's state until it is started.
fn container(state: &Path) -> Container {
    let is_absent = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    match fs::symlink_metadata(state) {
        Ok(meta) if meta.is_dir() => {}
        Err(e) if is_absent(&e) => return Container::Absent,
        Ok(_) | Err(_) => return Container::Unknown,
    }
    match fs::symlink_metadata(state.join("exec.fifo")) {
        Ok(_) => Container::Created,
        Err(e) if is_absent(&e) => Container::Started,
        Err(_) => Container::Unknown,
    }
}

fn frozen(cgroup: &Cgroup) -> Option<bool> {
    let folder = cgroup.folder("freezer")?;
    let (file, frozen) = match cgroup {
        Cgroup::V1(_) => ("freezer.state", "FROZEN"),
        Cgroup::V2(_) => ("cgroup.events", "frozen 1"),
    };
    match read_text(&folder.join(file), 4096) {
        Seen::Present(text) => Some(text.lines().any(|line| line.trim() == frozen)),
        Seen::Absent | Seen::Unknown(_) => None,
    }
}
