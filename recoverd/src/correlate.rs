//! Joins what a look saw into one case per task. Pure: no case is judged here, and nothing is
//! looked up that the look did not bring.
//!
//! A task is named by a bundle, by runc's state, by a shim's command line or by containerd's
//! list; whatever names it, its other facts are found by these joins:
//!
//! ```text
//! bundle ──address──▶ socket ──listener──▶ shim ──▶ answer
//!   │                    ▲
//!   └─▶ config.json ──group──▶ sha256(address/namespace/group)
//! runc state ──▶ init ──▶ process table      bundle/init.pid ──▶ process table
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    time::Duration,
};

use recoverd_common::{
    bundle::{Bundle, InitPid},
    paths,
    proc::{ProcessId, Stat},
    runc::RuncState,
    seen::Seen,
};

use crate::facts::{
    Address, Answer, CgroupFacts, ContainerdTask, Look, Phase, Reply, RuncEntry, Shim, TaskName,
    TaskState, address_of,
};

/// Everything known of one task.
#[derive(Debug)]
pub struct Case<'a> {
    /// Namespace and id.
    pub name: TaskName,
    /// Index of its containerd, when known.
    pub instance: Option<usize>,
    /// Its bundle.
    pub bundle: Option<&'a Bundle>,
    /// runc's entry.
    pub runc: Option<&'a RuncEntry>,
    /// Its init process.
    pub init: Init,
    /// Where its shim listens or should.
    pub address: Option<Address>,
    /// Where containerd will look for the shim: what the bundle says.
    pub written: Option<Address>,
    /// Its shim.
    pub shim: ShimOf<'a>,
    /// What that address answered.
    pub answer: Option<&'a Answer>,
    /// Its cgroup.
    pub cgroup: Option<&'a CgroupFacts>,
    /// What containerd says of it.
    pub containerd: Known,
    /// Its names in Kubernetes.
    pub pod: Option<Pod>,
}

/// What is known of a task's init process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Init {
    /// Nothing names one: the task was not created yet, or everything about it is gone.
    None,
    /// It lives, proven by its start time.
    Alive(ProcessId),
    /// It ended.
    Dead(Option<ProcessId>, String),
    /// Cannot be told; never treated as dead.
    Unknown(String),
}

impl Init {
    /// The living init.
    pub fn alive(&self) -> Option<ProcessId> {
        match self {
            Init::Alive(id) => Some(*id),
            Init::None | Init::Dead(..) | Init::Unknown(_) => None,
        }
    }
}

/// A task's shim.
#[derive(Debug, Clone)]
pub enum ShimOf<'a> {
    /// This process, which listens on the task's address (or did, if its socket is gone).
    Lives(&'a Shim),
    /// Somebody listens there whom the process table does not show as a shim.
    Stranger(Vec<i32>),
    /// There is none: nobody listens and no process serves the task.
    None,
    /// Cannot be told.
    Unknown(String),
}

impl<'a> ShimOf<'a> {
    /// The process.
    pub fn process(&self) -> Option<&'a Shim> {
        match self {
            ShimOf::Lives(shim) => Some(shim),
            ShimOf::Stranger(_) | ShimOf::None | ShimOf::Unknown(_) => None,
        }
    }
}

/// What containerd says of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It lists it.
    Yes(ContainerdTask),
    /// It is up and does not list it.
    No,
    /// It is down, did not say, or nobody knows which containerd it is.
    CannotSay,
}

/// Names in Kubernetes, from the CRI's annotations.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Pod {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod.
    pub name: String,
    /// The container in it; empty for the sandbox itself.
    pub container: String,
    /// Which pod of that name; empty where the CRI does not say.
    #[serde(skip)]
    pub uid: String,
}

/// What kind of shim it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `containerd-shim-recoverd-v1`.
    Ours,
    /// A runc shim that is not ours.
    Stock,
    /// Not a runc shim.
    Foreign,
}

impl Kind {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::Stock => "stock",
            Kind::Foreign => "foreign",
        }
    }
}

impl<'a> Case<'a> {
    /// How far the task is: the shim's word, else the kernel's.
    pub fn phase(&self) -> Phase {
        if let Some(state) = self.state() {
            return state.phase;
        }
        match &self.init {
            Init::Alive(_) => Phase::Running,
            Init::Dead(..) => Phase::Stopped,
            Init::None | Init::Unknown(_) => Phase::Unknown,
        }
    }

    /// The shim's answer to `State`.
    pub fn state(&self) -> Option<&'a TaskState> {
        self.answer?.states.get(&self.name.1)?.said()
    }

    /// The shim spoke, about anything.
    pub fn answered(&self) -> bool {
        self.answer
            .is_some_and(|a| matches!(a.greeting, Reply::Said(_) | Reply::Error(..)))
    }

    /// What kind of shim serves it. A shim of another name is a runc shim if runc has, or the
    /// bundle shows, the task that it serves.
    pub fn kind(&self) -> Option<Kind> {
        let shim = self.shim.process()?;
        Some(kind(
            &shim.name,
            self.runc.is_some() || self.made_by_runc_shim(),
        ))
    }

    /// The bundle holds what a runc shim, and no other, writes when it creates a task.
    fn made_by_runc_shim(&self) -> bool {
        self.bundle.is_some_and(|bundle| {
            bundle.runtime.present().is_some() && bundle.options.present().is_some()
        })
    }
}

/// Sorts a shim by its executable's name. Another runtime's shim says so by its own name, whatever
/// it uses underneath; a file of any other name is a runc shim if runc has a task of it.
pub fn kind(name: &str, runc_knows: bool) -> Kind {
    match name.strip_prefix("containerd-shim-") {
        Some("recoverd-v1") => Kind::Ours,
        Some("runc-v1" | "runc-v2") => Kind::Stock,
        Some(_) => Kind::Foreign,
        None if runc_knows => Kind::Stock,
        None => Kind::Foreign,
    }
}

/// All cases of a look, sorted by name, and the shims that serve none of them.
#[derive(Debug)]
pub struct Cases<'a> {
    /// One per task.
    pub cases: Vec<Case<'a>>,
    /// Shims without a task that anything names.
    pub idle_shims: Vec<&'a Shim>,
}

/// Joins.
pub fn correlate<'a>(look: &'a Look, socket_dir: &Path) -> Cases<'a> {
    let index = Index::of(look);
    let mut names: BTreeMap<(TaskName, Option<usize>), Parts<'a>> = BTreeMap::new();
    for facts in &look.bundles {
        let bundle = &facts.bundle;
        let name = (bundle.namespace.to_string(), bundle.id.to_string());
        names
            .entry((name, Some(facts.instance)))
            .or_default()
            .bundle = Some(bundle);
    }
    for entry in &look.runc {
        let instance = index.instance_of_runc(look, entry);
        // Without a word on whose it is, it joins the one case of that name if there is just one.
        let instance = instance.or_else(|| {
            let mut same = names.keys().filter(|(name, _)| *name == entry.name);
            match (same.next(), same.next()) {
                (Some((_, only)), None) => *only,
                (Some(_) | None, _) => None,
            }
        });
        names
            .entry((entry.name.clone(), instance))
            .or_default()
            .runc = Some(entry);
    }
    for shim in &look.shims {
        // Only the first task of a shim is on its command line. It makes a case where the shim
        // has nothing else: no bundle (removed under it), no runc state (not a runc shim).
        let name = (shim.namespace.clone(), shim.task.clone());
        let instance = index.by_address.get(shim.address.as_str()).copied();
        let known = names.contains_key(&(name.clone(), instance));
        let foreign = kind(&shim.name, false) == Kind::Foreign;
        if !known && foreign {
            names.entry((name, instance)).or_default();
        }
    }
    for (at, instance) in look.instances.iter().enumerate() {
        let tasks = instance.api.up().and_then(|api| api.tasks.as_ref());
        for name in tasks.iter().flat_map(|tasks| tasks.keys()) {
            names.entry((name.clone(), Some(at))).or_default();
        }
    }
    let cases: Vec<Case<'a>> = names
        .into_iter()
        .map(|((name, instance), parts)| index.case(look, socket_dir, name, instance, &parts))
        .collect();
    let serving: BTreeSet<ProcessId> = cases
        .iter()
        .filter_map(|case| Some(case.shim.process()?.id))
        .collect();
    Cases {
        idle_shims: look
            .shims
            .iter()
            .filter(|shim| !serving.contains(&shim.id))
            .collect(),
        cases,
    }
}

#[derive(Default)]
struct Parts<'a> {
    bundle: Option<&'a Bundle>,
    runc: Option<&'a RuncEntry>,
}

/// Look-ups that every case needs.
struct Index<'a> {
    by_address: HashMap<&'a str, usize>,
    listening: HashMap<&'a str, &'a Shim>,
    by_task: HashMap<(&'a str, &'a str, &'a str), &'a Shim>,
    by_pid: HashMap<i32, &'a Shim>,
    by_cwd: HashMap<&'a Path, &'a Shim>,
    cgroups: HashMap<&'a TaskName, &'a CgroupFacts>,
}

impl<'a> Index<'a> {
    fn of(look: &'a Look) -> Self {
        let shims = || look.shims.iter();
        Self {
            by_address: look
                .instances
                .iter()
                .enumerate()
                .flat_map(|(at, instance)| instance.spellings().map(move |text| (text, at)))
                .collect(),
            listening: shims()
                .flat_map(|s| s.listens.iter().map(move |a| (a.as_str(), s)))
                .collect(),
            by_task: shims()
                .map(|s| {
                    (
                        (s.address.as_str(), s.namespace.as_str(), s.task.as_str()),
                        s,
                    )
                })
                .collect(),
            by_pid: shims().map(|s| (s.id.pid, s)).collect(),
            by_cwd: shims()
                .filter_map(|s| Some((s.cwd.present()?.0.as_path(), s)))
                .collect(),
            cgroups: look
                .cgroups
                .iter()
                .filter_map(|cgroup| Some((cgroup.name.as_ref()?, cgroup)))
                .collect(),
        }
    }

    /// Whose container it is: by the bundle that runc's state names, else (the folder has another
    /// spelling, or is not known) by the shim whose child the init is.
    fn instance_of_runc(&self, look: &Look, entry: &RuncEntry) -> Option<usize> {
        let state = entry.state.present()?;
        let of_bundle = state.bundle.as_deref().and_then(|bundle| {
            look.instances.iter().position(|instance| {
                instance.state.as_deref().is_some_and(|state| {
                    let below = |plugin: &str| bundle.starts_with(state.join(plugin));
                    below(paths::TASK_PLUGIN) || below(paths::SANDBOX_PLUGIN)
                })
            })
        });
        of_bundle.or_else(|| {
            let shim = self.parent(look, state)?;
            self.by_address.get(shim.address.as_str()).copied()
        })
    }

    /// The shim whose child the init is.
    fn parent(&self, look: &Look, state: &RuncState) -> Option<&'a Shim> {
        let init = state.init?;
        let stat = look.processes.present()?.get(&init.pid)?;
        (stat.id == init)
            .then(|| self.by_pid.get(&stat.ppid).copied())
            .flatten()
    }

    fn case(
        &self,
        look: &'a Look,
        socket_dir: &Path,
        name: TaskName,
        instance: Option<usize>,
        parts: &Parts<'a>,
    ) -> Case<'a> {
        let state = parts.runc.and_then(|entry| entry.state.present());
        let config = parts.bundle.and_then(|bundle| bundle.config.present());
        let annotations = config
            .map(|config| &config.annotations)
            .or_else(|| state.map(|state| &state.annotations));
        let record = instance
            .and_then(|at| look.instances.get(at)?.api.up()?.containers.get(&name))
            .and_then(|container| container.group.clone());
        let group = annotations
            .and_then(|annotations| paths::group(annotations).map(str::to_owned))
            .or(record)
            .unwrap_or_else(|| name.1.clone());
        let written = parts.bundle.and_then(Bundle::socket_address);
        let written = written.map(|text| address_of(&text));
        let address = written.clone().or_else(|| {
            let instance = look.instances.get(instance?)?;
            Some(Look::computed_address(
                socket_dir, instance, &name.0, &group,
            ))
        });
        let shim = self.shim(look, &name, instance, &group, address.as_deref(), parts);
        // A shim whose bundle lost its address still listens where containerd's rule says.
        let address = match (&shim, &address) {
            (ShimOf::Lives(shim), Some(a)) if !shim.listens.contains(a) => {
                shim.listens.first().cloned().or_else(|| address.clone())
            }
            (ShimOf::Lives(shim), None) => shim.listens.first().cloned(),
            _ => address,
        };
        Case {
            instance: instance.or_else(|| {
                let shim = shim.process()?;
                self.by_address.get(shim.address.as_str()).copied()
            }),
            bundle: parts.bundle,
            runc: parts.runc,
            init: init(look, parts),
            answer: address
                .as_ref()
                .and_then(|address| look.answers.get(address)),
            address,
            written,
            shim,
            cgroup: self.cgroups.get(&name).copied(),
            containerd: known(look, instance, &name),
            pod: annotations.and_then(pod),
            name,
        }
    }

    fn shim(
        &self,
        look: &'a Look,
        name: &TaskName,
        instance: Option<usize>,
        group: &str,
        address: Option<&str>,
        parts: &Parts<'a>,
    ) -> ShimOf<'a> {
        if let Some(shim) = address.and_then(|address| self.listening.get(address)) {
            return ShimOf::Lives(shim);
        }
        // Not found by its socket: the socket may be gone or the address wrong, so every other
        // word that ties a process to the task counts before we say that there is none.
        let owner = instance.and_then(|at| look.instances.get(at));
        let (namespace, task) = (name.0.as_str(), name.1.as_str());
        let started_for = |task| {
            let mut spellings = owner?.spellings();
            spellings.find_map(|owner| self.by_task.get(&(owner, namespace, task)).copied())
        };
        let by_cwd = || {
            let bundle = parts.bundle?;
            self.by_cwd.get(bundle.path.as_path()).copied()
        };
        let by_parent = || self.parent(look, parts.runc?.state.present()?);
        if let Some(shim) = started_for(task)
            .or_else(|| started_for(group))
            .or_else(by_cwd)
            .or_else(by_parent)
        {
            return ShimOf::Lives(shim);
        }
        if let Seen::Unknown(why) = &look.listeners {
            return ShimOf::Unknown(why.clone());
        }
        // A supervisor keeps the listener of a shim that died for the next one.
        let serves = |pid: &i32| !look.supervisors.contains(pid);
        let listening = address.and_then(|address| look.listening(address));
        let strangers: Vec<i32> = listening
            .into_iter()
            .flatten()
            .copied()
            .filter(serves)
            .collect();
        match strangers.is_empty() {
            false => ShimOf::Stranger(strangers),
            true => {
                // In the table nobody listens there. That somebody answers is stronger.
                let answer = address.and_then(|address| look.answers.get(address));
                match answer.map(|answer| &answer.greeting) {
                    Some(Reply::Said(greeting)) => {
                        ShimOf::Stranger(i32::try_from(greeting.shim_pid).into_iter().collect())
                    }
                    Some(
                        Reply::Error(..) | Reply::Silent | Reply::Garbage(_) | Reply::NotAsked,
                    )
                    | None => ShimOf::None,
                }
            }
        }
    }
}

fn known(look: &Look, instance: Option<usize>, name: &TaskName) -> Known {
    let instance = instance.and_then(|at| look.instances.get(at));
    let Some(api) = instance.and_then(|instance| instance.api.up()) else {
        return Known::CannotSay;
    };
    match api.tasks.as_ref().map(|tasks| tasks.get(name)) {
        Some(Some(task)) => Known::Yes(*task),
        Some(None) if api.by_record && !api.containers.contains_key(name) => Known::CannotSay,
        Some(None) => Known::No,
        None => Known::CannotSay,
    }
}

fn pod(annotations: &BTreeMap<String, String>) -> Option<Pod> {
    let of = |key: &str| {
        annotations
            .get(&format!("io.kubernetes.cri.{key}"))
            .cloned()
    };
    let name = of("sandbox-name");
    let namespace = of("sandbox-namespace");
    (name.is_some() || namespace.is_some()).then(|| Pod {
        namespace: namespace.unwrap_or_default(),
        name: name.unwrap_or_default(),
        container: of("container-name").unwrap_or_default(),
        uid: of("sandbox-uid").unwrap_or_default(),
    })
}

fn init(look: &Look, parts: &Parts<'_>) -> Init {
    let table = match &look.processes {
        Seen::Present(table) => table,
        Seen::Absent => return Init::Unknown("no process table".into()),
        Seen::Unknown(why) => return Init::Unknown(why.clone()),
    };
    match parts.runc.map(|entry| &entry.state) {
        Some(Seen::Present(state)) => return init_of_runc(table, state, parts),
        Some(Seen::Unknown(why)) => {
            let by_pid_file = init_of_pid_file(look, table, parts);
            return match by_pid_file {
                Init::None | Init::Unknown(_) => Init::Unknown(format!("runc's state {why}")),
                Init::Alive(_) | Init::Dead(..) => by_pid_file,
            };
        }
        Some(Seen::Absent) | None => {}
    }
    init_of_pid_file(look, table, parts)
}

fn init_of_runc(table: &HashMap<i32, Stat>, state: &RuncState, parts: &Parts<'_>) -> Init {
    let Some(id) = state.init else {
        // runc writes the pid when the container is created; until then there is none.
        return match parts.bundle.map(|bundle| &bundle.init_pid) {
            Some(Seen::Unknown(why)) => Init::Unknown(format!("init.pid {why}")),
            Some(Seen::Present(_) | Seen::Absent) | None => Init::None,
        };
    };
    match table.get(&id.pid) {
        Some(stat) if stat.id == id && stat.alive() => Init::Alive(id),
        Some(stat) if stat.id == id => Init::Dead(Some(id), "is a zombie".into()),
        Some(_) => Init::Dead(Some(id), "its pid belongs to a later process now".into()),
        None => Init::Dead(Some(id), "there is no such process".into()),
    }
}

/// `init.pid` holds no start time. But the init ran when it was written: a process with this pid
/// that started before is it, one that started after is another.
fn init_of_pid_file(look: &Look, table: &HashMap<i32, Stat>, parts: &Parts<'_>) -> Init {
    // Start times are rounded to ticks and the boot time to seconds; clocks are set.
    const SLACK: Duration = Duration::from_secs(3);
    const SLOWEST: Duration = Duration::from_secs(600);
    let InitPid { pid, written_at } = match parts.bundle.map(|bundle| &bundle.init_pid) {
        Some(Seen::Present(init)) => *init,
        Some(Seen::Unknown(why)) => return Init::Unknown(format!("init.pid {why}")),
        Some(Seen::Absent) | None => return Init::None,
    };
    let Some(stat) = table.get(&pid) else {
        return Init::Dead(None, format!("there is no process {pid}"));
    };
    if !stat.alive() {
        return Init::Dead(Some(stat.id), "is a zombie".into());
    }
    // A number in a file proves nothing by itself: the process has to be where the task's
    // processes are.
    let id = parts.bundle.map_or("", |bundle| bundle.id.as_str());
    match look.memberships.get(&pid) {
        Some(Seen::Present(paths)) if paths.iter().any(|path| names_task(path, id)) => {}
        Some(Seen::Present(_)) => {
            return Init::Unknown(format!("process {pid} is in no cgroup of this task"));
        }
        Some(Seen::Unknown(why)) => return Init::Unknown(format!("cgroup of {pid}: {why}")),
        Some(Seen::Absent) | None => return Init::Unknown(format!("cgroup of {pid} not seen")),
    }
    let started = look.host.started_at(stat.id);
    if started.duration_since(written_at).unwrap_or_default() > SLACK {
        return Init::Dead(
            None,
            format!("process {pid} started after init.pid was written"),
        );
    }
    // An init writes its pid file within moments; runc is slow on a loaded node, not hours.
    if written_at.duration_since(started).unwrap_or_default() > SLOWEST {
        return Init::Unknown(format!("process {pid} is much older than init.pid"));
    }
    Init::Alive(stat.id)
}

/// A cgroup of the task: its folder, or one below it, is named by the id, plainly
/// (`/default/<id>`) or as systemd's scope (`cri-containerd-<id>.scope`).
fn names_task(path: &str, id: &str) -> bool {
    path.split('/').any(|part| {
        part == id
            || part.strip_suffix(".scope").is_some_and(|scope| {
                scope
                    .strip_suffix(id)
                    .is_some_and(|prefix| prefix.ends_with('-'))
            })
    })
}

#[cfg(test)]
mod random;
#[cfg(test)]
mod tests;
