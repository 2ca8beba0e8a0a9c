//! Who needs a successor, and what it has to know. Pure.
//!
//! ```text
//! case, its shim gone        init lives, or a zombie nobody reaped   ─▶ adopted
//!                            init ended, our record knows the task   ─▶ adopted: its exit is told
//!                            init ended, nothing recorded            ─▶ lost, because
//! case, its shim unresponsive (seen twice), stopped or idle          ─▶ adopted with predecessor
//!                                           busy, waiting for a device ─▶ refused: it may come back
//! case, its shim well, containerd down and about to be one that cannot
//!                                           speak to it              ─▶ adopted with predecessor
//! foreign, no bundle, a verb at work, abstract address, unknown init ─▶ refused, because
//! ```
//!
//! Tasks of one socket are adopted together. One of them that cannot be adopted keeps nobody else
//! from it: containerd ends each bundle by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
    time::SystemTime,
};

use recoverd_common::{
    proc::ProcessId,
    record::{Process, Record},
    seen::Seen,
    timestamp::Timestamp,
};

use super::Order;
use crate::{
    correlate::{Case, Cases, Init, Kind, ShimOf, kind},
    facts::{Api, Connection, Instance, Look, Phase, Shim, TaskName, one_line},
};

/// A path of a unix socket has at most this many bytes.
const MAX_SOCKET_PATH: usize = 107;

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// Of this containerd only, by its address.
    pub address: Option<&'a str>,
    /// Tasks of this containerd namespace only.
    pub namespace: Option<&'a str>,
    /// Groups with one of these tasks only.
    pub only: Option<&'a BTreeSet<TaskName>>,
    /// Shims that two looks saw unresponsive. Empty: none is replaced.
    pub unresponsive: &'a BTreeSet<ProcessId>,
    /// Shims that are well and cannot be heard by the containerd that is about to start; why, each.
    pub unheard: Option<&'a BTreeMap<ProcessId, String>>,
    /// The systemd unit of containerd: who runs in it has the surroundings that its shims have.
    pub unit: Option<&'a str>,
}

/// A task that is not adopted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refused {
    /// Which.
    pub name: TaskName,
    /// Why, one line.
    pub why: String,
    /// Its init has ended and nobody knows how: there is nothing to adopt.
    pub lost: bool,
}

/// The result.
#[derive(Debug, Default)]
pub struct Decision {
    /// Who is adopted, most valuable first.
    pub orders: Vec<Order>,
    /// Who is not, by name. Healthy tasks are named only if they were asked for.
    pub refused: Vec<Refused>,
}

/// A group that needs a successor.
#[derive(Debug)]
pub struct Group<'a> {
    /// Index of its containerd.
    pub instance: usize,
    /// The containerd namespace.
    pub namespace: String,
    /// Its id.
    pub id: String,
    /// Where containerd will look for its shim.
    pub socket: PathBuf,
    /// Its tasks that have a successor's work in them.
    pub members: Vec<&'a Case<'a>>,
    /// The shim that is there and does not answer.
    pub predecessor: Option<&'a Shim>,
    /// The record beside the socket says it all.
    pub recorded: bool,
    /// Why, one line each.
    pub because: Vec<String>,
}

/// Groups, and who is in none.
#[derive(Debug, Default)]
pub struct Selection<'a> {
    /// To be adopted.
    pub groups: Vec<Group<'a>>,
    /// Not.
    pub refused: Vec<Refused>,
}

/// What one case has to do with adoption.
enum Standing<'a> {
    /// Its shim answers, or there is nothing that a shim would serve.
    Healthy(&'static str),
    /// In a group.
    Needs {
        socket: PathBuf,
        instance: usize,
        predecessor: Option<&'a Shim>,
        recorded: bool,
        because: String,
    },
    /// Cannot be adopted.
    No(String),
    /// Ended, and nobody knows how.
    Lost(String),
}

/// Sorts the cases.
pub fn select<'a>(look: &'a Look, cases: &'a Cases<'a>, wish: &Wish<'_>) -> Selection<'a> {
    let mut groups: BTreeMap<(usize, PathBuf), Group<'a>> = BTreeMap::new();
    let mut refused = Vec::new();
    let mut seen = BTreeSet::new();
    // Where a shim's name says nothing, runc's state of each of its tasks does.
    let foreign: BTreeSet<ProcessId> = cases
        .cases
        .iter()
        .filter(|case| case.kind() == Some(Kind::Foreign))
        .filter_map(|case| Some(case.shim.process()?.id))
        .collect();
    for case in cases.cases.iter().filter(|case| wanted(look, case, wish)) {
        seen.insert(case.name.clone());
        let asked_for = wish.only.is_some_and(|only| only.contains(&case.name));
        let mut refuse = |why: String, lost| {
            refused.push(Refused {
                name: case.name.clone(),
                why: one_line(&why),
                lost,
            });
        };
        match standing(look, case, wish) {
            Standing::Healthy(why) if asked_for => refuse(why.into(), false),
            Standing::Healthy(_) => {}
            Standing::No(why) => refuse(why, false),
            Standing::Lost(why) => refuse(why, true),
            Standing::Needs {
                predecessor: Some(shim),
                ..
            } if foreign.contains(&shim.id) => {
                let pid = shim.id.pid;
                refuse(
                    format!("shim {pid} is no runc shim by another of its tasks: never touched"),
                    false,
                );
            }
            Standing::Needs {
                socket,
                instance,
                predecessor,
                recorded,
                because,
            } => {
                let group = groups
                    .entry((instance, socket.clone()))
                    .or_insert_with(|| Group {
                        instance,
                        namespace: case.name.0.clone(),
                        id: group_of(case),
                        socket,
                        members: Vec::new(),
                        predecessor,
                        recorded,
                        because: Vec::new(),
                    });
                group.members.push(case);
                group.because.push(because);
            }
        }
    }
    // Whoever asks for one task of a pod gets the pod: it has one shim.
    let groups = groups.into_values().filter(|group| {
        let named =
            |only: &BTreeSet<TaskName>| group.members.iter().any(|m| only.contains(&m.name));
        wish.only.is_none_or(named)
    });
    let mut selection = Selection {
        groups: Vec::new(),
        refused,
    };
    for group in groups {
        selection.take(look, group);
    }
    if let Some(only) = wish.only {
        selection
            .refused
            .retain(|refused| only.contains(&refused.name));
        selection
            .refused
            .extend(only.difference(&seen).map(|name| Refused {
                name: name.clone(),
                why: "no bundle, shim, runc or containerd knows this task".into(),
                lost: false,
            }));
    }
    selection.refused.sort();
    selection
}

impl<'a> Selection<'a> {
    /// Takes a group in, or refuses its members.
    fn take(&mut self, look: &Look, mut group: Group<'a>) {
        // Only what has a living process, or an exit on record, is worth a shim.
        let worth = |case: &&Case<'_>| {
            let seen_to_end = |id: &ProcessId| witnessed(look, *id);
            case.init.alive().is_some()
                || told_exit(case).is_some()
                || zombie(look, case).is_some()
                || matches!(&case.init, Init::Dead(Some(id), _) if seen_to_end(id))
        };
        if !group.recorded && !group.members.iter().any(worth) {
            for case in &group.members {
                self.refused.push(lost(case));
            }
            return;
        }
        group
            .members
            .sort_by_key(|case| (case.name.1 != group.id, created_at(case), &case.name));
        group.because.sort();
        group.because.dedup();
        self.groups.push(group);
    }
}

fn lost(case: &Case<'_>) -> Refused {
    let why = match &case.init {
        Init::Dead(_, why) => format!("its init ended ({why}) and nobody recorded how"),
        Init::None => "it has no init, and no record says how far it came".into(),
        Init::Alive(_) | Init::Unknown(_) => "nobody recorded anything of it".into(),
    };
    Refused {
        name: case.name.clone(),
        why: one_line(&why),
        lost: true,
    }
}

fn wanted(look: &Look, case: &Case<'_>, wish: &Wish<'_>) -> bool {
    let instance = case.instance.and_then(|at| look.instances.get(at));
    let of_instance = wish
        .address
        .is_none_or(|address| instance.is_some_and(|instance| instance.is(address)));
    let of_namespace = wish
        .namespace
        .is_none_or(|namespace| case.name.0 == namespace);
    of_instance && of_namespace
}

fn standing<'a>(look: &'a Look, case: &'a Case<'a>, wish: &Wish<'_>) -> Standing<'a> {
    let unheard = case
        .shim
        .process()
        .and_then(|shim| wish.unheard?.get(&shim.id));
    if case.answered() && unresponsive(case, wish).is_none() && unheard.is_none() {
        return Standing::Healthy("its shim answers");
    }
    if kind_of(case) == Kind::Foreign {
        return Standing::No("its shim is no runc shim: foreign tasks are never touched".into());
    }
    let predecessor = match &case.shim {
        ShimOf::None => None,
        ShimOf::Lives(shim) => match unresponsive(case, wish) {
            Some(shim) => match replaceable(look, case, shim) {
                Ok(()) => Some(shim),
                Err(why) => return Standing::No(why),
            },
            None if unheard.is_some() => match containerd_is_down(look, case) {
                Ok(()) => Some(*shim),
                Err(why) => {
                    let pid = shim.id.pid;
                    return Standing::No(format!("shim {pid} is not replaced: {why}"));
                }
            },
            None if case.answered() => return Standing::Healthy("its shim answers"),
            None => {
                return Standing::No(format!(
                    "its shim {} lives: only containerd's start hook replaces one that does not answer",
                    shim.id.pid
                ));
            }
        },
        ShimOf::Stranger(pids) => {
            return Standing::No(format!("{pids:?} listens on its address and is no shim"));
        }
        ShimOf::Unknown(why) => return Standing::No(format!("its shim cannot be seen: {why}")),
    };
    let Some(instance_at) = case.instance else {
        return Standing::No("its containerd is not known".into());
    };
    let Some(instance) = look.instances.get(instance_at) else {
        return Standing::No("its containerd is not known".into());
    };
    let Some(bundle) = case.bundle else {
        return match case.init.alive() {
            Some(_) => {
                Standing::No("it has no bundle: containerd would never look for its shim".into())
            }
            None => Standing::Healthy("nothing of it lives"),
        };
    };
    if bundle.empty {
        return Standing::Lost("its bundle is empty".into());
    }
    if look.busy_verbs.contains(&case.name) {
        return Standing::No("its shim binary runs start or delete for it right now".into());
    }
    if let Init::Unknown(why) = &case.init {
        return Standing::No(format!("its init cannot be told: {why}"));
    }
    let socket = match socket_of(case) {
        Ok(socket) => socket,
        Err(why) => return Standing::No(why),
    };
    let recorded = recorded(look, case, instance, &socket);
    let because = match (predecessor, &case.init) {
        (Some(shim), _) if unheard.is_some() => {
            let why = unheard.map_or("", String::as_str);
            format!("shim {} {why}", shim.id.pid)
        }
        (Some(shim), _) if unreachable(case) => {
            format!("shim {} lives and its socket is gone", shim.id.pid)
        }
        (Some(shim), _) => format!("shim {} lives and does not answer", shim.id.pid),
        (None, Init::Alive(init)) => format!("init {} lives and has no shim", init.pid),
        (None, _) => "its shim is gone".to_owned(),
    };
    Standing::Needs {
        socket,
        instance: instance_at,
        predecessor,
        recorded,
        because,
    }
}

/// What serves the task, or did: the living shim's name, else what the bundle says will run
/// `delete`.
fn kind_of(case: &Case<'_>) -> Kind {
    if let Some(kind) = case.kind() {
        return kind;
    }
    let made_by_runc = case.bundle.is_some_and(|bundle| {
        bundle.runtime.present().is_some() && bundle.options.present().is_some()
    });
    let name = case
        .bundle
        .and_then(|bundle| bundle.shim_binary.present())
        .and_then(|path| path.file_name())
        .map(|name| name.to_string_lossy().into_owned());
    kind(
        &name.unwrap_or_default(),
        case.runc.is_some() || made_by_runc,
    )
}

fn unresponsive<'a>(case: &Case<'a>, wish: &Wish<'_>) -> Option<&'a Shim> {
    let shim = case.shim.process()?;
    wish.unresponsive.contains(&shim.id).then_some(shim)
}

/// A shim that hangs may be replaced when containerd does not run and it is certain that it does
/// not merely need time.
fn replaceable(look: &Look, case: &Case<'_>, shim: &Shim) -> Result<(), String> {
    let pid = shim.id.pid;
    containerd_is_down(look, case)
        .map_err(|why| format!("shim {pid} does not answer, and {why}"))?;
    match stillness(shim) {
        Stillness::Stopped | Stillness::Idle => Ok(()),
        // It is well: only, containerd will not find it, whatever it does.
        Stillness::Busy if unreachable(case) => Ok(()),
        Stillness::Busy => Err(format!("shim {pid} is busy, not hung: it may answer yet")),
        Stillness::Device => Err(format!(
            "shim {pid} waits for a device (state D): it may answer yet"
        )),
    }
}

/// Only then may a shim that lives be ended: containerd ends the task of one that ends.
fn containerd_is_down(look: &Look, case: &Case<'_>) -> Result<(), &'static str> {
    let instance = case.instance.and_then(|at| look.instances.get(at));
    match instance.map(|instance| (&instance.api, instance.daemon)) {
        Some((Api::Down, None)) => Ok(()),
        Some(_) => Err("its containerd runs: ending it would end the task"),
        None => Err("its containerd is not known"),
    }
}

/// Its shim's socket is gone, or another file stands in its place.
pub fn unreachable(case: &Case<'_>) -> bool {
    case.answer
        .is_some_and(|answer| matches!(answer.connection, Connection::NoFile | Connection::Refused))
}

/// What a shim that does not answer does instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stillness {
    /// Stopped, by a signal or a tracer.
    Stopped,
    /// Sleeps, and used no CPU while it was asked.
    Idle,
    /// Works.
    Busy,
    /// In an uninterruptible wait.
    Device,
}

/// As the kernel shows it.
pub fn stillness(shim: &Shim) -> Stillness {
    let busy = shim
        .cpu_ticks_after
        .is_none_or(|after| after > shim.cpu_ticks);
    match shim.state {
        'T' | 't' => Stillness::Stopped,
        'D' => Stillness::Device,
        _ if busy => Stillness::Busy,
        _ => Stillness::Idle,
    }
}

/// Where containerd will look: what the bundle says, else what its own rule gives.
fn socket_of(case: &Case<'_>) -> Result<PathBuf, String> {
    let address = case.written.as_ref().or(case.address.as_ref());
    let Some(address) = address else {
        return Err("nothing says where its shim should listen".into());
    };
    if address.starts_with('@') {
        return Err(format!("its address {address} is abstract"));
    }
    let path = Path::new(address);
    let plain = path.is_absolute()
        && address.len() <= MAX_SOCKET_PATH
        && !path.components().any(|part| part == Component::ParentDir);
    if plain {
        Ok(path.to_owned())
    } else {
        Err(format!("its address {address:?} is no path of a socket"))
    }
}

/// The group that the task belongs to: as its annotations say, else it is one of its own.
fn group_of(case: &Case<'_>) -> String {
    let of_bundle = case
        .bundle
        .and_then(|bundle| bundle.config.present()?.group());
    let of_runc = || case.runc.and_then(|entry| entry.state.present()?.group());
    of_bundle
        .or_else(of_runc)
        .unwrap_or(&case.name.1)
        .to_owned()
}

/// The record beside the socket is of this boot and this containerd, and knows the task.
fn recorded(look: &Look, case: &Case<'_>, instance: &Instance, socket: &Path) -> bool {
    let Some(Seen::Present(record)) = record_at(look, socket) else {
        return false;
    };
    Some(&record.boot_id) == look.host.boot_id.as_ref()
        && record.shim.namespace == case.name.0
        && instance.is(&record.shim.containerd_address)
        && record.tasks.iter().any(|task| {
            let same = |init: ProcessId| task.init.is_none_or(|known| known == process(init));
            task.id == case.name.1 && case.init.alive().is_none_or(same)
        })
}

pub(super) fn record_at<'a>(look: &'a Look, socket: &Path) -> Option<&'a Seen<Record>> {
    let found = look
        .records
        .iter()
        .find(|file| Path::new(&file.socket) == socket)?;
    Some(&found.record)
}

/// The init, when it is a zombie: its status can still be read.
pub fn zombie(look: &Look, case: &Case<'_>) -> Option<ProcessId> {
    let Init::Dead(Some(id), _) = &case.init else {
        return None;
    };
    let stat = look.processes.present()?.get(&id.pid)?;
    (stat.id == *id && !stat.alive()).then_some(*id)
}

/// A supervisor has seen how this very process ended.
pub(super) fn witnessed(look: &Look, id: ProcessId) -> bool {
    let process = process(id);
    let exit = look.witnessed.exit_of((process.pid, process.start_time));
    exit.is_some_and(|exit| exit.status.is_some())
}

/// How it ended, as its shim says: only the shim knows once the process is gone.
pub fn told_exit(case: &Case<'_>) -> Option<(u32, Timestamp)> {
    let state = case.state()?;
    // A stock shim always knows when it saw the end.
    let seconds = state.exited_at?;
    let at = Timestamp { seconds, nanos: 0 };
    (state.phase == Phase::Stopped).then_some((state.exit_status, at))
}

pub(super) fn created_at(case: &Case<'_>) -> SystemTime {
    let bundle = case.bundle;
    let written = bundle.and_then(|b| Some(b.init_pid.present()?.written_at));
    written
        .or_else(|| bundle.map(|b| b.changed_at))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// As records have it.
pub(super) fn process(id: ProcessId) -> Process {
    Process {
        // A pid of ours comes from /proc: it is positive.
        pid: id.pid.unsigned_abs(),
        start_time: id.start_time,
    }
}
