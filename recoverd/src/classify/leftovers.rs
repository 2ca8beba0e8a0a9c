//! What stays behind when its task or its client is gone, and a file system that is filled by it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use recoverd_common::{
    paths,
    record::{self, Record},
    seen::Seen,
};

use crate::{
    correlate::{Case, Cases, Init, Kind, Known, ShimOf},
    facts::{Address, ApiFacts, Connection, FifoFolder, Filesystem, TaskName},
    findings::{Code, Subject},
    permit::Word,
};

use super::{Context, Hold, Suspicion, action, evidence, path_subject};

impl Context<'_> {
    pub(super) fn stale_bundle(&self, case: &Case<'_>) -> Option<Suspicion> {
        let bundle = case.bundle?;
        let gone = match &case.init {
            Init::None => "nothing names an init".to_owned(),
            Init::Dead(_, why) => format!("the init ended: {why}"),
            Init::Alive(_) | Init::Unknown(_) => return None,
        };
        let listed = matches!(case.containerd, Known::Yes(_));
        let busy = self.look.busy_verbs.contains(&case.name);
        if !matches!(case.shim, ShimOf::None) || case.answered() || listed || busy {
            return None;
        }
        let mut facts = vec![
            evidence("bundle", bundle.path.display().to_string()),
            evidence("kernel", gone),
            evidence(
                "kernel",
                "no shim process serves it and nobody listens on its socket",
            ),
        ];
        facts.push(self.said_by_containerd(case));
        let remove = action::repair_task(&case.name, Some(Word::Delete));
        let remedy = match bundle.empty {
            true => format!("{remove}: an empty bundle makes a new task of this id fail"),
            false => remove,
        };
        Some(Suspicion::about(
            case,
            Code::StaleBundle,
            Hold::Twice,
            facts,
            remedy,
        ))
    }

    pub(super) fn stale_sockets(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        // What an orphaned task's socket is needed for, adoption says.
        let mut owners: BTreeMap<&str, &Case<'_>> = BTreeMap::new();
        for case in &cases.cases {
            if let Some(address) = &case.address {
                let lives = !matches!(case.init, Init::Dead(..) | Init::None);
                if lives || !owners.contains_key(address.as_str()) {
                    owners.insert(address, case);
                }
            }
        }
        let records = self.owners_by_record();
        // A living task whose containerd is not known has a socket whose name is not known.
        let homeless = cases.cases.iter().any(|case| {
            let gone = matches!(case.init, Init::Dead(..) | Init::None);
            case.address.is_none() && !gone
        });
        let Some(listeners) = self.look.listeners.present() else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for file in &self.look.sockets {
            let address = file.path.display().to_string();
            let answered = self
                .look
                .answers
                .get(&address)
                .is_some_and(|answer| answer.connection != Connection::Refused);
            if !file.is_socket || listeners.contains_key(&address) || answered {
                continue;
            }
            let owner = match owners.get(address.as_str()) {
                Some(case) if !matches!(case.init, Init::Dead(..) | Init::None) => continue,
                Some(case) => Some((case.instance, case.name.clone())),
                None => records
                    .get(&address)
                    .map(|(at, name)| (Some(*at), name.clone())),
            };
            // A shim being started has made its socket and does not listen yet.
            let starting = owner
                .as_ref()
                .is_some_and(|(_, n)| self.look.busy_verbs.contains(n));
            if starting {
                continue;
            }
            let (instance, fact, remedy) = match owner {
                Some((instance, name)) => (
                    instance,
                    evidence(
                        "recoverd",
                        format!("its name is that of {}/{}", name.0, name.1),
                    ),
                    action::repair_all(Code::StaleSocket, None),
                ),
                None if self.old(file.changed_at) && !homeless => (
                    None,
                    evidence(
                        "recoverd",
                        "no bundle or container that is known gives this name",
                    ),
                    "remove it by hand if no containerd that recoverd does not see owns it"
                        .to_owned(),
                ),
                None => continue,
            };
            let facts = vec![
                evidence("kernel", format!("nobody listens on {address}")),
                fact,
            ];
            let subject = path_subject(&file.path);
            found.push(Suspicion {
                instance,
                ..Suspicion::new(Code::StaleSocket, subject, Hold::Twice, facts, remedy)
            });
        }
        found
    }

    /// Socket names of every container that some containerd has a record of.
    fn owners_by_record(&self) -> BTreeMap<Address, (usize, TaskName)> {
        let Some(dir) = self
            .look
            .sockets
            .first()
            .and_then(|file| file.path.parent())
        else {
            return BTreeMap::new();
        };
        let mut found = BTreeMap::new();
        for (at, instance) in self.look.instances.iter().enumerate() {
            let containers = instance.api.up().map(|api| &api.containers);
            for (name, container) in containers.into_iter().flatten() {
                let group = container.group.as_deref().unwrap_or(&name.1);
                for spelling in instance.spellings() {
                    let address = paths::socket(dir, spelling, &name.0, group);
                    let address = address.to_string_lossy().into_owned();
                    found.insert(address, (at, name.clone()));
                }
            }
        }
        found
    }

    pub(super) fn records(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for file in &self.look.records {
            let subject = path_subject(&file.path);
            let case = cases
                .cases
                .iter()
                .find(|case| case.address.as_ref() == Some(&file.socket));
            let suspicion = match &file.record {
                Seen::Absent => continue,
                Seen::Unknown(why) => Suspicion::new(
                    Code::UnreadableRecord,
                    subject,
                    Hold::Twice,
                    vec![evidence("record", format!("{} {why}", file.path.display()))],
                    format!(
                        "{} sets it aside; its tasks can be adopted from runc's state",
                        action::repair_all(Code::UnreadableRecord, None)
                    ),
                ),
                Seen::Present(record) => {
                    let other_boot = self
                        .look
                        .host
                        .boot_id
                        .as_ref()
                        .is_some_and(|id| *id != record.boot_id);
                    let lives = self
                        .look
                        .shims
                        .iter()
                        .any(|s| s.listens.contains(&file.socket));
                    let socket = self
                        .look
                        .sockets
                        .iter()
                        .any(|s| s.path.to_string_lossy() == file.socket.as_str());
                    let init_lives =
                        case.is_some_and(|case| !matches!(case.init, Init::Dead(..) | Init::None));
                    let why = if other_boot {
                        "it is from another boot of this machine"
                    } else if !lives && !socket && !init_lives && !self.names_living(record) {
                        "neither its socket nor a process of it is there"
                    } else {
                        continue;
                    };
                    Suspicion::new(
                        Code::StaleRecord,
                        subject,
                        Hold::Twice,
                        vec![evidence("record", why)],
                        action::repair_all(Code::StaleRecord, None),
                    )
                }
            };
            found.push(Suspicion {
                instance: case.and_then(|case| case.instance),
                ..suspicion
            });
        }
        found
    }

    /// A process of this boot that the record names lives, or may. A record may be the last word
    /// on who the init is.
    fn names_living(&self, record: &Record) -> bool {
        let Some(table) = self.look.processes.present() else {
            return true;
        };
        let lives = |process: &record::Process| {
            let stat = i32::try_from(process.pid)
                .ok()
                .and_then(|pid| table.get(&pid));
            stat.is_some_and(|stat| stat.alive() && stat.id.start_time == process.start_time)
        };
        let of_tasks = record.tasks.iter().flat_map(|task| {
            let execs = task.execs.iter().filter_map(|exec| exec.process.as_ref());
            task.init.iter().chain(execs)
        });
        lives(&record.shim.process) || of_tasks.into_iter().any(lives)
    }

    /// Names of tasks that live, may live, or are served by somebody.
    fn in_use<'c>(&self, cases: &'c Cases<'_>) -> BTreeSet<&'c TaskName> {
        let used = |case: &&Case<'_>| {
            let gone = matches!(case.init, Init::Dead(..) | Init::None);
            let listed = matches!(case.containerd, Known::Yes(_));
            !gone || listed || !matches!(case.shim, ShimOf::None)
        };
        cases
            .cases
            .iter()
            .filter(used)
            .map(|case| &case.name)
            .collect()
    }

    pub(super) fn mounts(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let Some(mounts) = self.look.mounts.present() else {
            return Vec::new();
        };
        let used = self.in_use(cases);
        let mut found = Vec::new();
        for mount in mounts {
            let Some((at, name)) = self.bundle_of(&mount.point) else {
                continue;
            };
            let age = self.look.mount_ages.get(&mount.point).copied();
            if used.contains(&name) || self.look.busy_verbs.contains(&name) || !self.old(age) {
                continue;
            }
            found.push(Suspicion {
                instance: Some(at),
                ..Suspicion::new(
                    Code::LeakedMount,
                    path_subject(&mount.point),
                    Hold::Twice,
                    vec![
                        evidence("kernel", format!("{} is mounted there", mount.kind)),
                        evidence("recoverd", format!("task {}/{} is gone", name.0, name.1)),
                    ],
                    action::repair_all(
                        Code::LeakedMount,
                        matches!(mount.kind.as_str(), "tmpfs" | "ramfs").then_some(Word::Delete),
                    ),
                )
            });
        }
        found
    }

    /// The task in whose bundle a path is.
    fn bundle_of(&self, path: &Path) -> Option<(usize, TaskName)> {
        self.look
            .instances
            .iter()
            .enumerate()
            .find_map(|(at, instance)| {
                let top: PathBuf = instance.state.as_ref()?.join(paths::TASK_PLUGIN);
                let mut parts = path.strip_prefix(&top).ok()?.iter();
                let namespace = parts.next()?.to_str()?.to_owned();
                let id = parts.next()?.to_str()?.to_owned();
                Some((at, (namespace, id)))
            })
    }

    pub(super) fn cgroups(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let used = self.in_use(cases);
        let mut found = Vec::new();
        for cgroup in &self.look.cgroups {
            let Some(name) = &cgroup.name else { continue };
            let Some(processes) = cgroup.processes.present() else {
                continue;
            };
            let busy = self.look.busy_verbs.contains(name);
            if used.contains(name) || !processes.is_empty() || busy || !self.old(cgroup.changed_at)
            {
                // Processes without a task are told by `second_init` where they are an init.
                continue;
            }
            let subject = match cgroup.folders.as_slice() {
                [only] => path_subject(only),
                _ => Subject::Path {
                    path: cgroup.path.clone(),
                },
            };
            let in_folders: Vec<String> = cgroup
                .folders
                .iter()
                .map(|folder| folder.display().to_string())
                .collect();
            found.push(Suspicion {
                instance: self.owner(cases, name),
                ..Suspicion::new(
                    Code::LeakedCgroup,
                    subject,
                    Hold::Twice,
                    vec![
                        evidence(
                            "kernel",
                            format!("no process is in {}", in_folders.join(" ")),
                        ),
                        evidence("recoverd", format!("task {}/{} is gone", name.0, name.1)),
                    ],
                    action::repair_all(Code::LeakedCgroup, None),
                )
            });
        }
        found
    }

    /// Whose a task is or was: its case's containerd, or the one that has its record.
    fn owner(&self, cases: &Cases<'_>, name: &TaskName) -> Option<usize> {
        let of_case = cases.cases.iter().find(|case| case.name == *name);
        of_case.and_then(|case| case.instance).or_else(|| {
            self.look.instances.iter().position(|instance| {
                instance
                    .api
                    .up()
                    .is_some_and(|api| api.containers.contains_key(name))
            })
        })
    }

    pub(super) fn fifos(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let used: BTreeSet<&str> = self
            .in_use(cases)
            .into_iter()
            .map(|name| name.1.as_str())
            .collect();
        let mut found = Vec::new();
        for folder in &self.look.fifos {
            let taken = folder.ids.iter().any(|id| used.contains(id.as_str()));
            let free = folder.users.present().is_some_and(Vec::is_empty);
            if taken || !free || !self.old(folder.changed_at) || self.fifo_of_exec(folder) {
                continue;
            }
            let files: Vec<String> = folder
                .ids
                .iter()
                .map(|id| format!("{}/{id}-std*", folder.path.display()))
                .collect();
            let owner = folder.ids.iter().find_map(|id| {
                self.look.instances.iter().position(|instance| {
                    let known = |api: &ApiFacts| api.containers.keys().any(|name| name.1 == *id);
                    instance.api.up().is_some_and(known)
                })
            });
            found.push(Suspicion {
                instance: folder.instance.or(owner),
                ..Suspicion::new(
                    Code::LeakedFifo,
                    path_subject(&folder.path),
                    Hold::Twice,
                    vec![
                        evidence("kernel", format!("nobody has {} open", files.join(", "))),
                        evidence("recoverd", "no task of that name is there"),
                    ],
                    action::repair_all(Code::LeakedFifo, None),
                )
            });
        }
        found
    }

    /// An exec's fifos bear the exec's id, which no list of tasks has: they are in use while their
    /// shim has them open, and `users` says that. So here only: an exec that is known to live.
    fn fifo_of_exec(&self, folder: &FifoFolder) -> bool {
        self.look
            .execs
            .iter()
            .any(|exec| exec.fifos.iter().any(|fifo| fifo.starts_with(&folder.path)))
    }

    pub(super) fn runc_states(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for case in &cases.cases {
            let Some(entry) = case.runc else { continue };
            let gone = match &case.init {
                Init::Dead(_, why) => why,
                Init::None | Init::Alive(_) | Init::Unknown(_) => continue,
            };
            let served = !matches!(case.shim, ShimOf::None);
            let listed = matches!(case.containerd, Known::Yes(_));
            let busy = self.look.busy_verbs.contains(&case.name);
            // With its bundle it is part of a stale bundle.
            if case.bundle.is_some() || served || listed || busy || !self.old(entry.changed_at) {
                continue;
            }
            found.push(Suspicion {
                instance: case.instance,
                ..Suspicion::new(
                    Code::LeakedRuncState,
                    path_subject(&entry.path),
                    Hold::Twice,
                    vec![
                        evidence("runc", format!("{} is there", entry.path.display())),
                        evidence("kernel", format!("the init ended: {gone}")),
                        evidence("bundle", "there is none"),
                    ],
                    format!(
                        "{}: a new task of this id fails while it is there",
                        action::repair_all(Code::LeakedRuncState, Some(Word::Delete))
                    ),
                )
            });
        }
        found
    }

    pub(super) fn full(&self) -> Vec<Suspicion> {
        let nearly =
            |system: &&Filesystem| system.tmpfs && system.used_percent() >= self.settings.run_full;
        self.look
            .filesystems
            .iter()
            .filter(nearly)
            .map(|system| {
                let mut facts = vec![evidence(
                    "kernel",
                    format!(
                        "{} of {} KiB and {} of {} inodes are free",
                        system.bytes.1 / 1024,
                        system.bytes.0 / 1024,
                        system.inodes.1,
                        system.inodes.0
                    ),
                )];
                facts.extend(system.eaters.iter().map(|(path, size)| {
                    evidence(
                        "kernel",
                        format!("{} holds {} KiB", path.display(), size / 1024),
                    )
                }));
                Suspicion::new(
                    Code::RunNearlyFull,
                    path_subject(&system.path),
                    Hold::Once,
                    facts,
                    "make room: no task can be created, and none recorded, when it is full",
                )
            })
            .collect()
    }

    pub(super) fn execs(&self, cases: &Cases<'_>) -> Vec<Suspicion> {
        let mut found = Vec::new();
        for exec in &self.look.execs {
            let alone = exec.fifo_users.present().is_some_and(Vec::is_empty);
            let old = self.age_of(exec.id) >= self.settings.min_age;
            if exec.fifos.is_empty() || !alone || !old {
                continue;
            }
            let Some(case) = cases.cases.iter().find(|case| case.name == exec.name) else {
                continue;
            };
            if case.kind() == Some(Kind::Foreign) {
                continue;
            }
            let id = exec.exec_id.as_deref().unwrap_or("unknown");
            let fifos: Vec<String> = exec.fifos.iter().map(|f| f.display().to_string()).collect();
            found.push(Suspicion::about(
                case,
                Code::LeakedExec,
                Hold::Twice,
                vec![
                    self.process(&format!("exec {id}: process"), exec.id),
                    evidence(
                        "kernel",
                        format!("only shim {} has {} open", exec.shim, fifos.join(", ")),
                    ),
                ],
                "end the exec if it is not wanted: its client went away",
            ));
        }
        found
    }
}
