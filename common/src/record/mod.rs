//! What a shim remembers about itself and its tasks (SPEC, section 4), as the program uses it.
//!
//! The shim writes a record before it tells anybody what the record says; `recoverd` and a
//! successor read it. How it looks on disk is in [`version`], how it is read and replaced in
//! [`store`].

pub mod store;
pub mod version;

use std::collections::BTreeMap;

use crate::timestamp::Timestamp;

pub use store::read;

/// Everything that one shim remembers.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// When it was written.
    pub written_at: Timestamp,
    /// `/proc/sys/kernel/random/boot_id` at that time; pids of another boot mean nothing.
    pub boot_id: String,
    /// Who wrote it.
    pub shim: Shim,
    /// Its tasks, in the order of their creation.
    pub tasks: Vec<Task>,
    /// What a successor has to restore before it serves.
    pub context: Context,
    /// Short-lived children at work: a successor finds out how each ended.
    pub running: Vec<Running>,
    /// Descriptors held, by name.
    pub descriptors: Vec<Descriptor>,
    /// Requests that change something and have not been answered.
    pub unanswered: Vec<Unanswered>,
    /// Processes of ours that hold fifos of tasks and execs that are no longer named here: whoever
    /// comes after the shim ends them, as it would have done itself at once.
    pub strays: Vec<Process>,
}

/// A process, proof against a reused pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// The pid in the shim's pid namespace.
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`; 0 when it could not be read (the process had gone).
    pub start_time: u64,
}

/// The shim that wrote the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shim {
    /// Our version.
    pub version: String,
    /// The shim itself.
    pub process: Process,
    /// Its executable.
    pub exe: String,
    /// The `-address` argument: the owner.
    pub containerd_address: String,
    /// The containerd namespace.
    pub namespace: String,
    /// The id that the shim was started for (its first container, a pod's sandbox).
    pub group_id: String,
    /// Where it listens.
    pub socket: String,
    /// Versions of the task API that it serves.
    pub api_versions: Vec<u32>,
}

/// How far a task or exec is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Create was accepted; mounts and the runtime's container may or may not exist.
    Creating,
    /// Created (a task), added (an exec); not started.
    Created,
    /// Started. With an exit beside it: it has ended, and whether that was told is not known. Who
    /// describes the tasks of another's shim says so.
    Running,
    /// Frozen.
    Paused,
    /// Exited, not deleted. The exit was told, or its event is on disk.
    Stopped,
    /// Delete was accepted; what it removes may or may not be gone.
    Deleting,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The kernel said so.
    Observed {
        /// Exit code, or 128 + signal.
        status: u32,
        /// When it was seen.
        at: Timestamp,
        /// The container had an OOM kill before.
        oom: bool,
    },
    /// It ended, how is not to be had.
    Unknown {
        /// Why.
        why: String,
    },
}

/// The OCI runtime of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Name (looked up in PATH) or path.
    pub binary: String,
    /// Its `--root`, the namespace included.
    pub root: String,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
}

/// A mount of the root file system, as the client asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File system, or `bind`.
    pub kind: String,
    /// Device or folder.
    pub source: String,
    /// Below the rootfs; empty for the rootfs itself.
    pub target: String,
    /// As in `mount -o`.
    pub options: Vec<String>,
}

/// Where a process reads and writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// As requested; empty for none.
    pub stdin: String,
    /// As requested: a path or a URI.
    pub stdout: String,
    /// As requested.
    pub stderr: String,
    /// CloseIO was called.
    pub stdin_closed: bool,
    /// The process behind `binary://`.
    pub logger: Option<Logger>,
    /// Pipes of the shim whose bytes it carries on: the inode of each, and of the fifo that they
    /// go to. Whoever has kept a pipe's read end can carry on what its writer has left.
    pub carried: Vec<(u64, u64)>,
    /// Processes of ours that hold the client's fifos open, whatever becomes of the shim: whoever
    /// comes after it ends them.
    pub holders: Vec<Process>,
}

/// A logger of `binary://`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logger {
    /// The logger.
    pub process: Process,
    /// How it was started.
    pub argv: Vec<String>,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The container's id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// How far it is.
    pub phase: Phase,
    /// Its init, once there is one.
    pub init: Option<Process>,
    /// Who runs it.
    pub runtime: Runtime,
    /// Mounted on the bundle's `rootfs` by the shim.
    pub rootfs: Vec<Mount>,
    /// `/proc/<init>/cgroup` when it was created, line by line.
    pub cgroup: Vec<String>,
    /// Its init's stdio.
    pub stdio: Stdio,
    /// Whether the init has a terminal.
    pub terminal: bool,
    /// When Create was accepted.
    pub created_at: Timestamp,
    /// How its init ended.
    pub exit: Option<Exit>,
    /// An OOM kill was seen and told.
    pub oom: bool,
    /// How far its cgroup's counter of OOM kills was when it was last looked at; none before it was
    /// started, and where nobody has said.
    pub oom_kills: Option<u64>,
    /// Where its init is restored from, until it is.
    pub restore: Option<Restore>,
    /// Its execs.
    pub execs: Vec<Exec>,
}

/// A checkpoint that Start restores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restore {
    /// CRIU's images.
    pub image: String,
    /// The images that those build upon; empty for none.
    pub parent: String,
}

/// One exec of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The exec's id.
    pub id: String,
    /// How far it is.
    pub phase: Phase,
    /// Its process, once there is one.
    pub process: Option<Process>,
    /// Its stdio.
    pub stdio: Stdio,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// What a successor restores.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Context {
    /// `/proc/self/cgroup`, line by line.
    pub cgroup: Vec<String>,
    /// `/proc/self/oom_score_adj`.
    pub oom_score_adj: i32,
    /// Soft and hard limits by name (`nofile`); `u64::MAX` is infinity.
    pub rlimits: BTreeMap<String, (u64, u64)>,
    /// File creation mask.
    pub umask: u32,
    /// Scheduling priority.
    pub nice: i32,
    /// Environment variables that children need.
    pub env: BTreeMap<String, String>,
}

/// A short-lived child at work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// `create`, `start`, `exec`, `delete`…
    pub op: String,
    /// Of which task.
    pub id: String,
    /// Of which exec; empty for the task itself.
    pub exec_id: String,
    /// The child; none between deciding and forking.
    pub process: Option<Process>,
}

/// A descriptor that matters to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What it is, such as `listener` or `stdin:<id>`.
    pub name: String,
    /// Its number in the shim.
    pub number: i32,
}

/// A request without its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unanswered {
    /// Which connection: the inode of its socket.
    pub connection: u64,
    /// The stream id that the answer has to carry.
    pub stream: u32,
    /// What is done for it: a word of `running`, or `add` of an exec that is being added.
    pub method: String,
    /// Of which task.
    pub id: String,
    /// Of which exec; empty for the task itself.
    pub exec_id: String,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp { seconds, nanos: 5 }
    }

    fn process(pid: u32) -> Process {
        Process {
            pid,
            start_time: 1000 + u64::from(pid),
        }
    }

    /// A record with something in every field.
    pub fn full() -> Record {
        let stdio = Stdio {
            stdin: "/fifo/in".into(),
            stdout: "binary:///bin/log?a=b".into(),
            stderr: String::new(),
            stdin_closed: true,
            logger: Some(Logger {
                process: process(9),
                argv: vec!["/bin/log".into(), "a".into(), "b".into()],
            }),
            carried: Vec::new(),
            holders: vec![process(12)],
        };
        Record {
            written_at: at(1_795_449_900),
            boot_id: "0a".into(),
            shim: Shim {
                version: "0.1.0".into(),
                process: process(7),
                exe: "/usr/bin/containerd-shim-recoverd-v1".into(),
                containerd_address: "/run/containerd/containerd.sock".into(),
                namespace: "k8s.io".into(),
                group_id: "pod".into(),
                socket: "/run/containerd/s/00".into(),
                api_versions: vec![2, 3],
            },
            tasks: vec![Task {
                id: "c".into(),
                bundle: "/b/c".into(),
                phase: Phase::Stopped,
                init: Some(process(8)),
                runtime: Runtime {
                    binary: "runc".into(),
                    root: "/run/containerd/runc/k8s.io".into(),
                    systemd_cgroup: true,
                },
                rootfs: vec![Mount {
                    kind: "overlay".into(),
                    source: "overlay".into(),
                    target: String::new(),
                    options: vec!["lowerdir=/l".into()],
                }],
                cgroup: vec!["0::/c".into()],
                stdio: stdio.clone(),
                terminal: false,
                created_at: at(1),
                exit: Some(Exit::Observed {
                    status: 137,
                    at: at(2),
                    oom: true,
                }),
                oom: true,
                oom_kills: Some(3),
                restore: Some(Restore {
                    image: "/images".into(),
                    parent: "../before".into(),
                }),
                execs: vec![Exec {
                    id: "e".into(),
                    phase: Phase::Running,
                    process: Some(process(10)),
                    stdio: Stdio {
                        carried: vec![(70, 71)],
                        holders: vec![process(13), process(14)],
                        ..Stdio::default()
                    },
                    terminal: true,
                    exit: Some(Exit::Unknown {
                        why: "adopted after its end".into(),
                    }),
                }],
            }],
            context: Context {
                cgroup: vec!["0::/system.slice".into()],
                oom_score_adj: -998,
                rlimits: [("nofile".into(), (1024, u64::MAX))].into(),
                umask: 0o22,
                nice: -5,
                env: [("PATH".into(), "/bin".into())].into(),
            },
            running: vec![Running {
                op: "delete".into(),
                id: "c".into(),
                exec_id: String::new(),
                process: Some(process(11)),
            }],
            descriptors: vec![Descriptor {
                name: "listener".into(),
                number: 3,
            }],
            unanswered: vec![Unanswered {
                connection: 1,
                stream: 11,
                method: "Delete".into(),
                id: "c".into(),
                exec_id: String::new(),
            }],
            strays: vec![process(15)],
        }
    }
}
