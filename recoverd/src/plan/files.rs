//! Steps for what dead tasks leave behind: bundles, sockets, records, mounts, cgroups, fifos,
//! runc's state.

use std::path::{Path, PathBuf};

use recoverd_common::{paths, proc::FileId, record::Exit, seen::Seen};

use super::{Act, Answer, Planner, Promise, Requirement, by_hand};
use crate::{
    classify::Suspicion,
    correlate::{Case, Init, ShimOf},
    facts::{Api, CgroupFacts, FifoFolder, RecordFile, TaskName},
    findings::Subject,
    observe::grounds::of_group,
    permit::Word,
};

impl<'a> Planner<'a, '_> {
    pub(super) fn bundle(&self, suspicion: &Suspicion) -> Answer {
        let (Some(case), Some(instance)) = (self.case(suspicion), self.instance(suspicion)) else {
            return by_hand("its containerd is not known here");
        };
        let Some(bundle) = case.bundle else {
            return by_hand("the bundle is not there any more");
        };
        if let Some((file, why)) = bundle.unreadable().first() {
            return by_hand(format!("{file} {why}: what it belongs to is not known"));
        }
        if !matches!(case.init, Init::None | Init::Dead(..)) || !matches!(case.shim, ShimOf::None) {
            return by_hand("something of it lives or may live");
        }
        let runc = match self.dead_runc(case) {
            Ok(runc) => runc,
            Err(why) => return by_hand(why),
        };
        match case.cgroup.map(|cgroup| &cgroup.processes) {
            None | Some(Seen::Absent) => {}
            Some(Seen::Present(processes)) if processes.is_empty() => {}
            Some(Seen::Present(_)) => return by_hand("processes live in its cgroup"),
            Some(Seen::Unknown(why)) => return by_hand(format!("its cgroup: {why}")),
        }
        if let Some(why) = self.needed_by_record(case) {
            return by_hand(why);
        }
        let Some(unused) = self.not_in_use(instance, &case.name) else {
            return by_hand("whether containerd knows the task is unknown");
        };
        let mounts = match self.mounts_below(&bundle.path) {
            Ok(mounts) => mounts,
            Err(why) => return by_hand(why),
        };
        if !self.old(Some(bundle.changed_at)) {
            return self.young();
        }
        let Some(file) = self.file(&bundle.path) else {
            return by_hand("the bundle is not there any more");
        };
        let mut requires = vec![
            Requirement::Same(bundle.path.clone(), file),
            unused,
            Requirement::NoShim(case.name.clone(), instance.address.clone()),
        ];
        if let Init::Dead(Some(init), _) = &case.init {
            requires.push(Requirement::Gone(*init));
        }
        let socket = Self::socket_of(case);
        if let Some(socket) = &socket {
            requires.push(Requirement::NobodyListens(socket.display().to_string()));
        }
        if let Some((path, file)) = &runc {
            requires.push(Requirement::Same(path.clone(), *file));
        }
        let mut promises = vec![Promise::Removed(bundle.path.clone(), file)];
        promises.extend(runc.iter().map(|(p, f)| Promise::Removed(p.clone(), *f)));
        let act = Act::RemoveBundle {
            path: bundle.path.clone(),
            file,
            mounts,
            runc,
            socket,
        };
        let task = Some(case.name.clone());
        self.step(suspicion, task, requires, act, promises, Some(Word::Delete))
    }

    /// runc's folder of a task whose init has ended, if there is one.
    fn dead_runc(&self, case: &Case<'_>) -> Result<Option<(PathBuf, FileId)>, String> {
        let Some(entry) = case.runc else {
            return Ok(None);
        };
        match &entry.state {
            Seen::Present(_) | Seen::Absent => {}
            Seen::Unknown(why) => return Err(format!("runc's state {why}")),
        }
        let file = self.file(&entry.path);
        let file = file.ok_or("runc's state is not what it was")?;
        Ok(Some((entry.path.clone(), file)))
    }

    /// Why the record still needs a bundle: it is the last word on somebody who lives, or on an exit
    /// that containerd has not been told.
    fn needed_by_record(&self, case: &Case<'_>) -> Option<String> {
        let look = self.look();
        let address = case.address.as_ref()?;
        let file = look.records.iter().find(|file| file.socket == *address)?;
        let record = match &file.record {
            Seen::Present(record) => record,
            Seen::Absent => return None,
            Seen::Unknown(why) => return Some(format!("the record of its shim {why}")),
        };
        if look.host.boot_id.as_deref() != Some(record.boot_id.as_str()) {
            return None;
        }
        let task = record.tasks.iter().find(|task| task.id == case.name.1)?;
        let lives = |process: &recoverd_common::record::Process| {
            let Some(table) = look.processes.present() else {
                return true;
            };
            let stat = i32::try_from(process.pid)
                .ok()
                .and_then(|pid| table.get(&pid));
            stat.is_some_and(|s| s.alive() && s.id.start_time == process.start_time)
        };
        if task.init.as_ref().is_some_and(lives) {
            return Some("the record of its shim names an init that lives or may live".into());
        }
        let observed = matches!(task.exit, Some(Exit::Observed { .. }));
        (observed && !Self::known_no(case))
            .then(|| "its exit is in the record of our shim: containerd's start reports it".into())
    }

    /// Mounts in a folder, innermost first.
    fn mounts_below(&self, top: &Path) -> Result<Vec<(PathBuf, u64)>, String> {
        let mounts = match &self.look().mounts {
            Seen::Present(mounts) => mounts,
            Seen::Absent => return Err("there is no mount table".into()),
            Seen::Unknown(why) => return Err(format!("mounts: {why}")),
        };
        let below = mounts.iter().filter(|mount| mount.point.starts_with(top));
        // The table has them in the order of mounting.
        Ok(below.rev().map(|m| (m.point.clone(), m.id)).collect())
    }

    pub(super) fn socket(&self, suspicion: &Suspicion) -> Answer {
        let Subject::Path { path } = &suspicion.finding.subject else {
            return by_hand("it has no path");
        };
        let path = PathBuf::from(path);
        if suspicion.instance.is_none() {
            return by_hand(suspicion.finding.action.clone());
        }
        let Some(file) = self.file(&path) else {
            return by_hand("the socket is not there any more");
        };
        let requires = vec![
            Requirement::Same(path.clone(), file),
            Requirement::NobodyListens(path.display().to_string()),
        ];
        let promises = vec![Promise::Removed(path.clone(), file)];
        let task = self.task_of_socket(&path);
        self.step(
            suspicion,
            task,
            requires,
            Act::RemoveSocket { path, file },
            promises,
            None,
        )
    }

    /// The task after which a socket, or a file beside it, is named.
    pub(super) fn task_of_socket(&self, path: &Path) -> Option<TaskName> {
        let text = path.to_str()?;
        let socket = text.strip_suffix(".record").unwrap_or(text);
        let mut cases = self.input.cases.cases.iter();
        if let Some(case) = cases.find(|case| case.address.as_deref() == Some(socket)) {
            return Some(case.name.clone());
        }
        let (dir, file) = (Path::new(socket).parent()?, Path::new(socket));
        if !file
            .file_name()?
            .to_str()
            .is_some_and(paths::is_socket_name)
        {
            return None;
        }
        self.look().instances.iter().find_map(|instance| {
            let containers = &instance.api.up()?.containers;
            let mut named = containers.iter().filter(|(name, container)| {
                let group = container.group.as_deref().unwrap_or(&name.1);
                let mut all = instance.spellings();
                all.any(|address| paths::socket(dir, address, &name.0, group) == file)
            });
            named.next().map(|(name, _)| name.clone())
        })
    }

    fn record_at(&self, suspicion: &Suspicion) -> Option<&'a RecordFile> {
        let Subject::Path { path } = &suspicion.finding.subject else {
            return None;
        };
        let mut records = self.look().records.iter();
        records.find(|file| file.path == Path::new(path))
    }

    pub(super) fn record(&self, suspicion: &Suspicion) -> Answer {
        let Some(record) = self.record_at(suspicion) else {
            return by_hand("the record is not there any more");
        };
        let look = self.look();
        let this_boot = record.record.present().is_none_or(|record| {
            look.host
                .boot_id
                .as_deref()
                .is_none_or(|boot| boot == record.boot_id)
        });
        match self.input.grounds.unsent.get(&record.socket) {
            None | Some(Seen::Absent | Seen::Present(false)) => {}
            Some(Seen::Present(true)) if !this_boot => {}
            Some(Seen::Present(true)) => {
                return by_hand("events beside it were not acknowledged by containerd yet");
            }
            Some(Seen::Unknown(why)) => return by_hand(format!("events beside it: {why}")),
        }
        let socket = PathBuf::from(&record.socket);
        let all = of_group(&socket);
        let files: Vec<(PathBuf, FileId)> = all
            .into_iter()
            .filter_map(|path| Some((path.clone(), self.file(&path)?)))
            .collect();
        if !files.iter().any(|(path, _)| *path == record.path) {
            return by_hand("the record is not there any more");
        }
        let mut requires = vec![Requirement::NobodyListens(record.socket.clone())];
        requires.extend(files.iter().map(|(p, f)| Requirement::Same(p.clone(), *f)));
        let promises = files
            .iter()
            .map(|(p, f)| Promise::Removed(p.clone(), *f))
            .collect();
        let task = self.task_of_socket(&socket);
        let act = Act::RemoveRecord { socket, files };
        self.step(suspicion, task, requires, act, promises, None)
    }

    pub(super) fn unreadable(&self, suspicion: &Suspicion) -> Answer {
        let Some(record) = self.record_at(suspicion) else {
            return by_hand("the record is not there any more");
        };
        match self.look().listening(&record.socket) {
            Some([]) => {}
            Some(_) => {
                return by_hand("its shim lives, and writes it anew with its next change");
            }
            None => return by_hand("whether its shim lives is unknown"),
        }
        let socket = PathBuf::from(&record.socket);
        // Beside the socket folder, which is below the state folder and on its file system.
        let state = socket.parent().and_then(Path::parent);
        let (Some(file), Some(state)) = (self.file(&record.path), state) else {
            return by_hand("the record is not there any more");
        };
        let requires = vec![
            Requirement::Same(record.path.clone(), file),
            Requirement::NobodyListens(record.socket.clone()),
        ];
        let act = Act::Quarantine {
            path: record.path.clone(),
            file,
            state: state.to_owned(),
            socket: socket.clone(),
        };
        let promises = vec![Promise::Removed(record.path.clone(), file)];
        let task = self.task_of_socket(&socket);
        self.step(suspicion, task, requires, act, promises, None)
    }

    pub(super) fn task_of_mount(&self, path: &Path) -> Option<TaskName> {
        self.look().instances.iter().find_map(|instance| {
            let top = instance.state.as_ref()?.join(paths::TASK_PLUGIN);
            let mut parts = path.strip_prefix(&top).ok()?.iter();
            let namespace = parts.next()?.to_str()?.to_owned();
            Some((namespace, parts.next()?.to_str()?.to_owned()))
        })
    }

    pub(super) fn mount(&self, suspicion: &Suspicion) -> Answer {
        let Subject::Path { path } = &suspicion.finding.subject else {
            return by_hand("it has no path");
        };
        let Some(instance) = self.instance(suspicion) else {
            return by_hand("its containerd is not known here");
        };
        let point = PathBuf::from(path);
        let mounts = self.look().mounts.present().map_or(&[][..], Vec::as_slice);
        // Of several at one place, the last one is on top.
        let top = mounts.iter().rfind(|mount| mount.point == point);
        let (Some(mount), Some(task)) = (top, self.task_of_mount(&point)) else {
            return by_hand("it is not mounted any more");
        };
        let Some(unused) = self.not_in_use(instance, &task) else {
            return by_hand("whether containerd knows the task is unknown");
        };
        // What is in memory only is lost with its last mount.
        let volatile = matches!(mount.kind.as_str(), "tmpfs" | "ramfs");
        let requires = vec![
            Requirement::Mounted(point.clone(), mount.id),
            unused,
            Requirement::NoShim(task.clone(), instance.address.clone()),
        ];
        self.step(
            suspicion,
            Some(task),
            requires,
            Act::Unmount {
                point: point.clone(),
                id: mount.id,
            },
            vec![Promise::Unmounted(point, mount.id)],
            volatile.then_some(Word::Delete),
        )
    }

    fn cgroup_at(&self, path: &Path) -> Option<&'a CgroupFacts> {
        self.look().cgroups.iter().find(|cgroup| {
            Path::new(&cgroup.path) == path || cgroup.folders.iter().any(|folder| folder == path)
        })
    }

    pub(super) fn task_of_cgroup(&self, path: &Path) -> Option<TaskName> {
        self.cgroup_at(path)?.name.clone()
    }

    pub(super) fn cgroup(&self, suspicion: &Suspicion) -> Answer {
        let Subject::Path { path } = &suspicion.finding.subject else {
            return by_hand("it has no path");
        };
        let Some(cgroup) = self.cgroup_at(Path::new(path)) else {
            return by_hand("the cgroup is not there any more");
        };
        if !cgroup.processes.present().is_some_and(Vec::is_empty) || cgroup.folders.is_empty() {
            return by_hand("whether a process is in it is unknown");
        }
        let folders = cgroup.folders.clone();
        let promises = folders.iter().cloned().map(Promise::NoFolder).collect();
        // The kernel itself removes no cgroup that has a process.
        let act = Act::RemoveCgroup(folders);
        self.step(
            suspicion,
            cgroup.name.clone(),
            Vec::new(),
            act,
            promises,
            None,
        )
    }

    fn fifo_folder(&self, path: &Path) -> Option<&'a FifoFolder> {
        self.look().fifos.iter().find(|folder| folder.path == path)
    }

    pub(super) fn task_of_fifos(&self, path: &Path) -> Option<TaskName> {
        let folder = self.fifo_folder(path)?;
        let known = self.input.cases.cases.iter().map(|case| &case.name);
        let containers = self.look().instances.iter().filter_map(|i| i.api.up());
        let containers = containers.flat_map(|api| api.containers.keys());
        let mut all = known.chain(containers);
        all.find(|name| folder.ids.contains(&name.1)).cloned()
    }

    pub(super) fn fifos(&self, suspicion: &Suspicion) -> Answer {
        let Subject::Path { path } = &suspicion.finding.subject else {
            return by_hand("it has no path");
        };
        let Some(folder) = self.fifo_folder(Path::new(path)) else {
            return by_hand("the fifos are not there any more");
        };
        if !folder.users.present().is_some_and(Vec::is_empty) {
            return by_hand("whether somebody has them open is unknown");
        }
        // While the CRI is down, what it will find again must stay as it is.
        if let Some(at) = folder.instance
            && !self
                .look()
                .instances
                .get(at)
                .is_some_and(|i| matches!(i.api, Api::Up(_)))
        {
            return by_hand("they are the CRI's, and its containerd is down");
        }
        let Some(file) = self.file(&folder.path) else {
            return by_hand("the fifos are not there any more");
        };
        let streams = ["stdin", "stdout", "stderr"];
        let names: Vec<String> = folder
            .ids
            .iter()
            .flat_map(|id| streams.map(|stream| format!("{id}-{stream}")))
            .collect();
        let open = names.iter().map(|name| folder.path.join(name)).collect();
        let requires = vec![
            Requirement::Same(folder.path.clone(), file),
            Requirement::NobodyHas(open),
        ];
        let promises = names
            .iter()
            .map(|name| Promise::NoFolder(folder.path.join(name)))
            .collect();
        let act = Act::RemoveFifos {
            folder: folder.path.clone(),
            file,
            names,
        };
        let task = self.task_of_fifos(&folder.path);
        self.step(suspicion, task, requires, act, promises, None)
    }

    pub(super) fn runc_state(&self, suspicion: &Suspicion) -> Answer {
        let name = self.task_of(suspicion);
        let entry = match &suspicion.finding.subject {
            Subject::Path { path } => {
                let mut all = self.look().runc.iter();
                all.find(|entry| entry.path == Path::new(path))
            }
            Subject::Task { .. } | Subject::Shim { .. } => {
                let mut all = self.look().runc.iter();
                all.find(|entry| Some(&entry.name) == name.as_ref())
            }
        };
        let (Some(entry), Some(instance)) = (entry, self.instance(suspicion)) else {
            return by_hand("its containerd is not known here");
        };
        let Seen::Present(state) = &entry.state else {
            return by_hand("runc's state cannot be read: what it belongs to is not known");
        };
        let Some(unused) = self.not_in_use(instance, &entry.name) else {
            return by_hand("whether containerd knows the task is unknown");
        };
        let Some(file) = self.file(&entry.path) else {
            return by_hand("it is not there any more");
        };
        let Some(init) = state.init else {
            return by_hand("it names no init: whether one is being made is unknown");
        };
        let requires = vec![
            Requirement::Same(entry.path.clone(), file),
            Requirement::Gone(init),
            unused,
            Requirement::NoShim(entry.name.clone(), instance.address.clone()),
        ];
        self.step(
            suspicion,
            Some(entry.name.clone()),
            requires,
            Act::RemoveRuncState {
                path: entry.path.clone(),
                file,
            },
            vec![Promise::Removed(entry.path.clone(), file)],
            Some(Word::Delete),
        )
    }
}
