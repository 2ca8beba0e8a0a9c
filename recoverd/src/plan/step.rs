//! One step of a plan: what it requires, does and promises, and how that is said.

use std::{path::PathBuf, time::Duration};

use recoverd_common::{
    proc::{FileId, ProcessId},
    timestamp::Timestamp,
};

use crate::{
    adopt::Order,
    facts::{TaskName, one_line},
    findings::Code,
    permit::Word,
};

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The finding.
    pub code: Code,
    /// About what it is.
    pub subject: String,
    /// The task, where there is one.
    pub task: Option<TaskName>,
    /// What must still be so just before.
    pub requires: Vec<Requirement>,
    /// What is done.
    pub does: Act,
    /// What is so afterwards.
    pub promises: Vec<Promise>,
    /// What `--allow` has to say first.
    pub destroys: Option<Word>,
}

/// Something that must still be so. Unknown is not so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Requirement {
    /// This very process lives.
    Lives(ProcessId),
    /// It has no living child.
    Childless(ProcessId),
    /// This very process does not live any more.
    Gone(ProcessId),
    /// This very file is there.
    Same(PathBuf, FileId),
    /// Nobody accepts connections there.
    NobodyListens(String),
    /// Nobody is connected there.
    NobodyConnected(String),
    /// No shim's process names this task and this containerd.
    NoShim(TaskName, String),
    /// This very mount is there.
    Mounted(PathBuf, u64),
    /// This containerd is up and does not list the task.
    Unlisted(String, TaskName),
    /// This containerd does not run.
    Down(String),
    /// This containerd lists the task as running.
    Running(String, TaskName),
    /// No process has one of these files open.
    NobodyHas(Vec<PathBuf>),
}

/// What a step does.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// Start a shim of ours for the tasks.
    Adopt(Box<Order>),
    /// As [`Act::Adopt`], after the shim that does not answer was ended.
    Replace(Box<Order>, ProcessId),
    /// Send SIGTERM, and SIGKILL if it lives on.
    EndShim(ProcessId),
    /// Send SIGTERM to the init, and SIGKILL if it lives on.
    EndInit(ProcessId),
    /// Tell containerd of an exit.
    Publish(Exited),
    /// Unmount what is mounted in it, remove runc's state of it, remove it.
    RemoveBundle {
        /// The bundle.
        path: PathBuf,
        /// Which file it is.
        file: FileId,
        /// Mounts in it, innermost first.
        mounts: Vec<(PathBuf, u64)>,
        /// runc's folder of it, whose init has ended.
        runc: Option<(PathBuf, FileId)>,
        /// Its shim's socket, whose lock is held meanwhile.
        socket: Option<PathBuf>,
    },
    /// Set a record aside.
    Quarantine {
        /// The record.
        path: PathBuf,
        /// Which file it is.
        file: FileId,
        /// The folder that gets the quarantine.
        state: PathBuf,
        /// Its socket.
        socket: PathBuf,
    },
    /// Remove a socket's file.
    RemoveSocket {
        /// The socket.
        path: PathBuf,
        /// Which file it is.
        file: FileId,
    },
    /// Remove a record and what belongs to it.
    RemoveRecord {
        /// Its socket.
        socket: PathBuf,
        /// Its files, the lock last.
        files: Vec<(PathBuf, FileId)>,
    },
    /// Unmount, not lazily.
    Unmount {
        /// Where.
        point: PathBuf,
        /// Which mount.
        id: u64,
    },
    /// Remove empty cgroups.
    RemoveCgroup(Vec<PathBuf>),
    /// Remove fifos, and their folder if nothing else is in it.
    RemoveFifos {
        /// The folder.
        folder: PathBuf,
        /// Which file it is.
        file: FileId,
        /// Names of the fifos.
        names: Vec<String>,
    },
    /// Remove runc's folder of a container.
    RemoveRuncState {
        /// The folder.
        path: PathBuf,
        /// Which file it is.
        file: FileId,
    },
}

/// An exit as containerd is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exited {
    /// Where containerd takes events.
    pub ttrpc: PathBuf,
    /// Of which task.
    pub name: TaskName,
    /// Of which process.
    pub init: ProcessId,
    /// With which status.
    pub status: u32,
    /// When; unknown where only the kernel's zombie tells the status.
    pub at: Option<Timestamp>,
}

/// What is so after a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Promise {
    /// This process does not live any more.
    Gone(ProcessId),
    /// This process lives as before.
    Lives(ProcessId),
    /// This file is not there any more.
    Removed(PathBuf, FileId),
    /// There is no such folder.
    NoFolder(PathBuf),
    /// This mount is not there any more.
    Unmounted(PathBuf, u64),
    /// A shim answers there.
    Served(PathBuf),
    /// containerd has acknowledged it.
    Told,
}

impl Act {
    /// In words, with every pid, path and signal.
    pub fn text(&self) -> String {
        let text = match self {
            Act::Adopt(order) => format!(
                "start containerd-shim-recoverd-v1 on {} for {}",
                order.adoption.socket.display(),
                members(order)
            ),
            Act::Replace(order, shim) => format!(
                "send SIGKILL to shim {} and start containerd-shim-recoverd-v1 on {} for {}",
                who(*shim),
                order.adoption.socket.display(),
                members(order)
            ),
            Act::EndShim(shim) => format!(
                "send SIGTERM to shim {}, and SIGKILL if it lives on for {} s",
                who(*shim),
                PATIENCE.as_secs()
            ),
            Act::EndInit(init) => format!(
                "send SIGTERM to init {}, and SIGKILL if it lives on for {} s",
                who(*init),
                PATIENCE.as_secs()
            ),
            Act::Publish(exited) => format!(
                "publish at {} that init {} exited with {}",
                exited.ttrpc.display(),
                who(exited.init),
                exited.status
            ),
            Act::RemoveBundle {
                path, mounts, runc, ..
            } => {
                let mut parts = Vec::new();
                parts.extend(
                    mounts
                        .iter()
                        .map(|(p, _)| format!("unmount {}", p.display())),
                );
                parts.extend(runc.iter().map(|(p, _)| format!("remove {}", p.display())));
                parts.push(format!("remove {}", path.display()));
                parts.join(", ")
            }
            Act::Quarantine { path, state, .. } => format!(
                "move {} into {}",
                path.display(),
                state.join(crate::quarantine::FOLDER).display()
            ),
            Act::RemoveSocket { path, .. } | Act::RemoveRuncState { path, .. } => {
                format!("remove {}", path.display())
            }
            Act::RemoveRecord { files, .. } => {
                let all: Vec<String> = files.iter().map(|(p, _)| p.display().to_string()).collect();
                format!("remove {}", all.join(", "))
            }
            Act::Unmount { point, .. } => format!("unmount {}", point.display()),
            Act::RemoveCgroup(folders) => {
                let all: Vec<String> = folders.iter().map(|p| p.display().to_string()).collect();
                format!("remove {}", all.join(", "))
            }
            Act::RemoveFifos { folder, names, .. } => {
                format!(
                    "remove {} in {}, and it",
                    names.join(", "),
                    folder.display()
                )
            }
        };
        one_line(&text)
    }

    /// The processes that it ends.
    pub fn ends(&self) -> Vec<ProcessId> {
        match self {
            Act::EndShim(id) | Act::EndInit(id) | Act::Replace(_, id) => vec![*id],
            Act::Adopt(_)
            | Act::Publish(_)
            | Act::RemoveBundle { .. }
            | Act::Quarantine { .. }
            | Act::RemoveSocket { .. }
            | Act::RemoveRecord { .. }
            | Act::Unmount { .. }
            | Act::RemoveCgroup(_)
            | Act::RemoveFifos { .. }
            | Act::RemoveRuncState { .. } => Vec::new(),
        }
    }

    /// What comes first: workloads before processes, those before what they leave, and a socket
    /// last, because others are found by it.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Act::Adopt(_) => 0,
            Act::Replace(..) => 1,
            Act::Publish(_) => 2,
            Act::Quarantine { .. } => 3,
            Act::EndInit(_) => 4,
            Act::EndShim(_) => 5,
            Act::Unmount { .. } => 6,
            Act::RemoveBundle { .. } => 7,
            Act::RemoveRuncState { .. } => 8,
            Act::RemoveCgroup(_) => 9,
            Act::RemoveFifos { .. } => 10,
            Act::RemoveRecord { .. } => 11,
            Act::RemoveSocket { .. } => 12,
        }
    }
}

impl Requirement {
    /// In words.
    pub fn text(&self) -> String {
        let task = |name: &TaskName| format!("{}/{}", name.0, name.1);
        one_line(&match self {
            Requirement::Lives(id) => format!("{} lives", who(*id)),
            Requirement::Childless(id) => format!("{} has no living child", who(*id)),
            Requirement::Gone(id) => format!("{} does not live", who(*id)),
            Requirement::Same(path, file) => {
                format!("{} is still inode {}", path.display(), file.ino)
            }
            Requirement::NobodyListens(address) => format!("nobody listens on {address}"),
            Requirement::NobodyConnected(address) => format!("nobody is connected to {address}"),
            Requirement::NoShim(name, _) => format!("no shim serves {}", task(name)),
            Requirement::Mounted(point, id) => {
                format!("{} is still mount {id}", point.display())
            }
            Requirement::Unlisted(address, name) => {
                format!("containerd at {address} does not list {}", task(name))
            }
            Requirement::Down(address) => format!("containerd at {address} is down"),
            Requirement::Running(address, name) => {
                format!("containerd at {address} lists {} as running", task(name))
            }
            Requirement::NobodyHas(files) => {
                let all: Vec<String> = files.iter().map(|p| p.display().to_string()).collect();
                format!("nobody has {} open", all.join(", "))
            }
        })
    }
}

impl Promise {
    /// In words.
    pub fn text(&self) -> String {
        one_line(&match self {
            Promise::Gone(id) => format!("{} is gone", who(*id)),
            Promise::Lives(id) => format!("{} lives on", who(*id)),
            Promise::Removed(path, _) | Promise::NoFolder(path) => {
                format!("{} is gone", path.display())
            }
            Promise::Unmounted(point, _) => format!("{} is unmounted", point.display()),
            Promise::Served(socket) => format!("a shim answers on {}", socket.display()),
            Promise::Told => "containerd has acknowledged it".into(),
        })
    }
}

/// How long a process has to leave by itself.
pub const PATIENCE: Duration = Duration::from_secs(5);

fn who(id: ProcessId) -> String {
    format!("{} (started at tick {})", id.pid, id.start_time)
}

fn members(order: &Order) -> String {
    let one = |member: &crate::adopt::Member| {
        let (namespace, id) = &member.name;
        match member.init {
            Some(init) => format!("{namespace}/{id} (init {})", who(init)),
            None => format!("{namespace}/{id} (ended)"),
        }
    };
    let all: Vec<String> = order.members.iter().map(one).collect();
    all.join(", ")
}
