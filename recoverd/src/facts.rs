//! What one look at a node saw, before anybody judges it. Plain data: `observe` fills it,
//! `correlate` and `classify` read it, tests write it by hand.

#[cfg(test)]
pub mod fixture;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use recoverd_common::{
    bundle::Bundle,
    mounts::Mount,
    paths,
    proc::{Exe, FileId, Memory, ProcessId, Stat},
    record::Record,
    runc::RuncState,
    seen::Seen,
};

use crate::witnessed::Witnessed;

/// What files and processes say may hold anything: shown, it is one line of bounded length that
/// moves no terminal's cursor.
pub fn one_line(text: &str) -> String {
    const LONGEST: usize = 1000;
    text.chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// A task's name: containerd namespace and id.
pub type TaskName = (String, String);

/// Everything that one look saw.
#[derive(Debug)]
pub struct Look {
    /// When it began.
    pub at: SystemTime,
    /// The machine.
    pub host: Host,
    /// The containerds of the node, sorted by address.
    pub instances: Vec<Instance>,
    /// Shim processes that serve (not those that run `start` or `delete`).
    pub shims: Vec<Shim>,
    /// Tasks for which a shim binary runs `start` or `delete` right now.
    pub busy_verbs: BTreeSet<TaskName>,
    /// Bundles of all instances.
    pub bundles: Vec<BundleFacts>,
    /// Containers that runc knows.
    pub runc: Vec<RuncEntry>,
    /// Files in the socket folder that bear a shim socket's name.
    pub sockets: Vec<SocketFile>,
    /// Who listens where: address to pids. *Unknown* without the right to see descriptors.
    pub listeners: Seen<HashMap<Address, Vec<i32>>>,
    /// Supervisors among them: they keep the listeners of shims and serve no task.
    pub supervisors: Vec<i32>,
    /// What each asked socket answered.
    pub answers: BTreeMap<Address, Answer>,
    /// The process table, read after bundles and runc's state; *unknown* when some processes are
    /// hidden from us.
    pub processes: Seen<HashMap<i32, Stat>>,
    /// Cgroup paths of processes that only a bundle's `init.pid` names.
    pub memberships: HashMap<i32, Seen<Vec<String>>>,
    /// The mount table.
    pub mounts: Seen<Vec<Mount>>,
    /// When the folder that holds a mount point below a bundle was last changed.
    pub mount_ages: HashMap<PathBuf, SystemTime>,
    /// Cgroups that belong to containers, by name and by runc's word.
    pub cgroups: Vec<CgroupFacts>,
    /// Folders of client fifos.
    pub fifos: Vec<FifoFolder>,
    /// Execs: living children of shims that are no init.
    pub execs: Vec<Exec>,
    /// Files of ours beside the sockets.
    pub records: Vec<RecordFile>,
    /// What `recoverd supervise` has seen over time.
    pub witnessed: Witnessed,
    /// File systems that must not fill up.
    pub filesystems: Vec<Filesystem>,
    /// What could not be seen, and why.
    pub gaps: Vec<Gap>,
}

/// The machine.
#[derive(Debug, Clone)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Kernel release.
    pub kernel: String,
    /// This boot, when `/proc` tells.
    pub boot_id: Option<String>,
    /// When it booted.
    pub booted_at: SystemTime,
    /// Clock ticks in a second.
    pub ticks: u64,
    /// `v1`, `v2` or `hybrid`.
    pub cgroup: &'static str,
    /// The user who looks may see everything.
    pub root: bool,
}

impl Host {
    /// When a process with this start time started.
    pub fn started_at(&self, id: ProcessId) -> SystemTime {
        let ticks = self.ticks.max(1);
        let millis = id.start_time.saturating_mul(1000) / ticks;
        self.booted_at + Duration::from_millis(millis)
    }
}

/// One containerd.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Its gRPC address, a path without scheme: what shims get as `-address`.
    pub address: String,
    /// Where it keeps bundles; *unknown* for one that only a shim names.
    pub state: Option<PathBuf>,
    /// Where it keeps the rest, as far as anything says.
    pub root: Option<PathBuf>,
    /// Whose word state and root are: `command line`, `configuration`, `default`, `shim 123`…
    pub source: String,
    /// The daemon's process, when one is seen.
    pub daemon: Option<ProcessId>,
    /// Its API.
    pub api: Api,
    /// Other spellings of the address (`/var/run` for `/run`) that something uses: socket names
    /// are hashes of the very text.
    pub aliases: Vec<String>,
}

impl Instance {
    /// Every spelling of its address.
    pub fn spellings(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.address.as_str()).chain(self.aliases.iter().map(String::as_str))
    }

    /// This is its address.
    pub fn is(&self, address: &str) -> bool {
        self.spellings().any(|spelling| spelling == address)
    }
}

/// What a containerd answered.
#[derive(Debug, Clone)]
pub enum Api {
    /// It answers.
    Up(Box<ApiFacts>),
    /// Nobody listens on its address.
    Down,
    /// It may be there, but did not answer, or we may not ask.
    Unknown(String),
}

impl Api {
    /// The answers, when it is up.
    pub fn up(&self) -> Option<&ApiFacts> {
        match self {
            Api::Up(facts) => Some(facts),
            Api::Down | Api::Unknown(_) => None,
        }
    }
}

/// What a containerd that is up says.
#[derive(Debug, Clone, Default)]
pub struct ApiFacts {
    /// `1.7.24~ds1` and the like.
    pub version: String,
    /// Its namespaces.
    pub namespaces: Vec<String>,
    /// Its container records.
    pub containers: BTreeMap<TaskName, Container>,
    /// Its tasks; *unknown* when the list did not come in time.
    pub tasks: Option<BTreeMap<TaskName, ContainerdTask>>,
    /// The list did not come in time, and tasks were asked for by the names of the container
    /// records: of a task without a record nothing is known.
    pub by_record: bool,
}

/// A container record of containerd.
#[derive(Debug, Clone, Default)]
pub struct Container {
    /// Runtime name.
    pub runtime: String,
    /// `linux.cgroupsPath` of its spec.
    pub cgroups_path: Option<String>,
    /// The sandbox that groups it, or another group annotation.
    pub group: Option<String>,
}

/// A task as containerd lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContainerdTask {
    /// What it says.
    pub phase: Phase,
    /// The init, as it says.
    pub pid: u32,
}

/// How far a task is, in the words that recoverd prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nobody knows.
    Unknown,
    /// Not started yet.
    Created,
    /// Started.
    Running,
    /// Exited, not deleted.
    Stopped,
    /// Frozen.
    Paused,
    /// Being frozen.
    Pausing,
}

impl Phase {
    /// From the number of `containerd.task.*.Status` and `containerd.v1.types.Status`.
    pub fn of_number(number: i32) -> Self {
        match number {
            1 => Phase::Created,
            2 => Phase::Running,
            3 => Phase::Stopped,
            4 => Phase::Paused,
            5 => Phase::Pausing,
            _ => Phase::Unknown,
        }
    }

    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Unknown => "unknown",
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Stopped => "stopped",
            Phase::Paused => "paused",
            Phase::Pausing => "pausing",
        }
    }
}

/// Where a shim listens: a path, or `@name` for an abstract socket.
pub type Address = String;

/// What containerd reads as an address: anything without `unix://` is an abstract name.
pub fn address_of(text: &str) -> Address {
    match text.strip_prefix("unix://") {
        Some(path) => path.to_owned(),
        None if text.starts_with('@') => text.to_owned(),
        None => format!("@{text}"),
    }
}

/// A shim process that serves.
#[derive(Debug, Clone)]
pub struct Shim {
    /// Who.
    pub id: ProcessId,
    /// `-namespace`.
    pub namespace: String,
    /// `-id`: the task it was started for, a pod's sandbox.
    pub task: String,
    /// `-address`: its containerd.
    pub address: String,
    /// File name of the executable, or of the first argument when that cannot be seen.
    pub name: String,
    /// The executable.
    pub exe: Seen<Exe>,
    /// The file that stands at the executable's path now.
    pub installed: Seen<FileId>,
    /// Working folder (the first bundle), and whether it was removed.
    pub cwd: Seen<(PathBuf, bool)>,
    /// `R`, `S`, `T`…
    pub state: char,
    /// Threads.
    pub threads: u32,
    /// CPU time, ticks, when the look began.
    pub cpu_ticks: u64,
    /// CPU time, ticks, after its socket was asked.
    pub cpu_ticks_after: Option<u64>,
    /// Addresses it listens on.
    pub listens: Vec<Address>,
    /// Open descriptors.
    pub descriptors: Option<usize>,
    /// Memory; *absent* when nobody asked for it.
    pub memory: Seen<Memory>,
}

/// A bundle and whose it is.
#[derive(Debug, Clone)]
pub struct BundleFacts {
    /// Index in [`Look::instances`].
    pub instance: usize,
    /// What it holds.
    pub bundle: Bundle,
}

/// A container that runc knows.
#[derive(Debug, Clone)]
pub struct RuncEntry {
    /// The folder `<root>/<namespace>/<id>`.
    pub path: PathBuf,
    /// Namespace and id.
    pub name: TaskName,
    /// When the folder was last changed.
    pub changed_at: Option<SystemTime>,
    /// `state.json`.
    pub state: Seen<RuncState>,
}

/// A file in the socket folder.
#[derive(Debug, Clone)]
pub struct SocketFile {
    /// Its path, which is also the address.
    pub path: PathBuf,
    /// When it was made.
    pub changed_at: Option<SystemTime>,
    /// It is a socket.
    pub is_socket: bool,
}

/// What one socket answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// How the connection went.
    pub connection: Connection,
    /// The shim's answer to `Connect`.
    pub greeting: Reply<Greeting>,
    /// Its answers to `State`, by task id.
    pub states: BTreeMap<String, Reply<TaskState>>,
    /// 2 or 3: the task API that it speaks, once it has spoken.
    pub api: Option<u8>,
    /// How long the first answer took.
    pub took: Option<Duration>,
    /// How often it was asked.
    pub asked: u32,
    /// The questions were a second apart or more, so that no answer is no slow answer.
    pub patient: bool,
}

/// How connecting went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// Accepted, or queued for it.
    Made,
    /// Nobody listens.
    Refused,
    /// There is no such file.
    NoFile,
    /// The queue of waiting connections is full: it has not accepted for a long time.
    QueueFull,
    /// Could not be tried.
    Failed(String),
}

/// An answer to one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply<T> {
    /// What it says.
    Said(T),
    /// An error with its gRPC status code.
    Error(i32, String),
    /// Nothing in time.
    Silent,
    /// Something that is no ttrpc, or the connection was closed.
    Garbage(String),
    /// Not asked.
    NotAsked,
}

impl<T> Reply<T> {
    /// The answer, when there is a good one.
    pub fn said(&self) -> Option<&T> {
        match self {
            Reply::Said(value) => Some(value),
            Reply::Error(..) | Reply::Silent | Reply::Garbage(_) | Reply::NotAsked => None,
        }
    }
}

/// `ConnectResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The shim, as it says.
    pub shim_pid: u32,
    /// Its version, where it says one (ours does).
    pub version: String,
}

/// `StateResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskState {
    /// How far it is.
    pub phase: Phase,
    /// The init.
    pub pid: u32,
    /// Exit status; means something when stopped.
    pub exit_status: u32,
    /// When it exited, seconds after 1970, when stopped and known.
    pub exited_at: Option<i64>,
    /// It has a terminal.
    pub terminal: bool,
    /// Where standard input, output and error go.
    pub stdio: [String; 3],
}

/// A container's cgroup.
#[derive(Debug, Clone)]
pub struct CgroupFacts {
    /// Below the hierarchies' roots, `/default/c1`.
    pub path: String,
    /// Whose it is, when its path or a spec says.
    pub name: Option<TaskName>,
    /// Its folders, one a hierarchy; of one with processes the first only.
    pub folders: Vec<PathBuf>,
    /// When the first folder was made or last changed.
    pub changed_at: Option<SystemTime>,
    /// Processes in it and below; 0 stands for one that our pid namespace does not show.
    pub processes: Seen<Vec<CgroupProcess>>,
}

/// A process in a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupProcess {
    /// Who; start time 0 when it could not be read.
    pub id: ProcessId,
    /// Its parent.
    pub ppid: i32,
    /// It is process 1 of its own pid namespace.
    pub first_of_namespace: bool,
}

/// A folder with the fifos of one task or exec.
#[derive(Debug, Clone)]
pub struct FifoFolder {
    /// `/run/containerd/fifo/<random>` or the CRI's.
    pub path: PathBuf,
    /// Ids that its fifos name.
    pub ids: BTreeSet<String>,
    /// Whose state folder holds it (the CRI's), else nobody's in particular.
    pub instance: Option<usize>,
    /// When it was last changed.
    pub changed_at: Option<SystemTime>,
    /// Processes that have one of them open; *unknown* when somebody's descriptors are hidden.
    pub users: Seen<Vec<i32>>,
}

/// A living exec of a stock shim's or our task.
#[derive(Debug, Clone)]
pub struct Exec {
    /// Its first process.
    pub id: ProcessId,
    /// The shim.
    pub shim: i32,
    /// The task whose cgroup it is in.
    pub name: TaskName,
    /// Its id, from the name of its pid file.
    pub exec_id: Option<String>,
    /// The fifos that the shim has open for it.
    pub fifos: Vec<PathBuf>,
    /// Processes other than the shim that have one of them open.
    pub fifo_users: Seen<Vec<i32>>,
}

/// A record beside a socket.
#[derive(Debug, Clone)]
pub struct RecordFile {
    /// `<socket>.record`.
    pub path: PathBuf,
    /// The socket it belongs to.
    pub socket: Address,
    /// What it says; *unknown* with the reason when it cannot be trusted.
    pub record: Seen<Record>,
}

/// A file system's fill.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    /// A path on it.
    pub path: PathBuf,
    /// It lives in memory.
    pub tmpfs: bool,
    /// Size and free space, bytes.
    pub bytes: (u64, u64),
    /// Inodes and free ones; (0, 0) where it counts none.
    pub inodes: (u64, u64),
    /// The largest things on it, largest first: path and bytes; looked for when it is nearly full.
    pub eaters: Vec<(PathBuf, u64)>,
}

/// Something that could not be seen.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Gap {
    /// What.
    pub what: String,
    /// Why.
    pub why: String,
    /// The containerd that alone is concerned, by its address.
    #[serde(skip)]
    pub instance: Option<String>,
}

impl Gap {
    /// A gap that concerns the whole look.
    pub fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            what: one_line(&what.into()),
            why: one_line(&why.into()),
            instance: None,
        }
    }

    /// As [`Gap::new`], for one containerd's part of it.
    pub fn of(instance: &Instance, what: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            instance: Some(instance.address.clone()),
            ..Self::new(what, why)
        }
    }
}

impl Look {
    /// The listeners of an address; `None` when listeners cannot be seen.
    pub fn listening(&self, address: &str) -> Option<&[i32]> {
        let listeners = self.listeners.present()?;
        Some(listeners.get(address).map_or(&[], Vec::as_slice))
    }

    /// The address that a task's shim has by containerd's rule.
    pub fn computed_address(
        socket_dir: &std::path::Path,
        instance: &Instance,
        namespace: &str,
        group: &str,
    ) -> Address {
        paths::socket(socket_dir, &instance.address, namespace, group)
            .to_string_lossy()
            .into_owned()
    }
}

/// What only `repair` asks for, beside a look.
#[derive(Debug, Clone, Default)]
pub struct Grounds {
    /// What stands at a path; a symlink is itself.
    pub files: BTreeMap<PathBuf, Seen<FileId>>,
    /// By socket: there are events that containerd has not acknowledged.
    pub unsent: BTreeMap<Address, Seen<bool>>,
    /// By pid of a shim: how many are connected to its sockets.
    pub connected: BTreeMap<i32, Seen<usize>>,
    /// By pid of a shim: where its containerd takes events.
    pub ttrpc: BTreeMap<i32, PathBuf>,
}

/// What only `preflight` asks for, beside a look.
#[derive(Debug)]
pub struct Premises {
    /// The systemd unit that runs containerd; *absent* when systemd does not run this machine.
    pub unit: Seen<Unit>,
    /// Every `shim-binary-path` of a bundle: is the file executable?
    pub binaries: BTreeMap<PathBuf, Seen<bool>>,
    /// The CRI's sandboxes by instance, as containerd's container records tell; *unknown* while
    /// it cannot be asked.
    pub sandboxes: Vec<Seen<Vec<Sandbox>>>,
    /// By instance, sandboxes run by a shim's own sandbox service (their bundles).
    pub shim_sandboxes: Vec<Seen<usize>>,
    /// Processors.
    pub cpus: usize,
}

/// What systemd says of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// `loaded`, `not-found`, `masked`…
    pub load_state: String,
    /// `process`, `control-group`, `mixed`, `none`.
    pub kill_mode: String,
    /// It may make cgroups of its own.
    pub delegate: bool,
    /// Time for its start; `None` is endless.
    pub start_timeout: Option<Duration>,
    /// Its main process, when it runs.
    pub main_pid: Option<i32>,
}

/// A sandbox that the CRI plugin remembers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sandbox {
    /// Its id, also the id of its pause task.
    pub id: String,
    /// The name that it reserves: `<pod>_<namespace>_<uid>_<attempt>`.
    pub name: String,
}
