//! Looks at the host that a request or an event asks for: pids, figures, OOM kills.

use std::{fs, path::Path};

use nix::sys::epoll::EpollEvent;
use recoverd_common::{
    cgroup::{Cgroup, read_procs},
    seen::Seen,
};

use super::{MAX_DEPTH, Shim};
use crate::{
    connections::Caller,
    log::Level,
    oom::{OomWatch, WatchError},
    service::{Refusal, Reply},
    state::Input,
    stats,
    tasks::{Event, Exec, Task},
};

impl Shim {
    // ---- out of memory ----

    pub(super) fn watch_oom(&mut self, id: String, already: Option<u64>) {
        let Some(cgroup) = self
            .state
            .tasks
            .get(&id)
            .and_then(|task| task.cgroup.as_ref())
        else {
            return;
        };
        let watch = OomWatch::new(cgroup, already);
        if already.is_none()
            && let Ok(watch) = &watch
        {
            self.state.tasks.oom_kills_began(&id, watch.seen());
        }
        self.add_oom_watch(id.clone(), watch);
        if already.is_some() {
            // What was before the watch wakes nobody.
            let event = self.new_kills(&id);
            self.inbox.extend(event.map(Input::Event));
        }
    }

    pub(super) fn add_oom_watch(&mut self, id: String, watch: Result<OomWatch, WatchError>) {
        let watch = match watch {
            Ok(watch) => watch,
            Err(e) => {
                self.log.say(Level::Warning, &format!("{id}: {e}"));
                return;
            }
        };
        self.last_oom += 1;
        let token = self.last_oom;
        let waker = watch.waker().map_err(ToString::to_string);
        let wakes = waker.and_then(|(fd, events)| {
            let added = self.epoll.add(fd, EpollEvent::new(events, token));
            added.map_err(|e| format!("watch for OOM: {e}"))
        });
        if let Err(why) = wakes {
            let text = format!("{id}: {why}; a kill is told when the task ends");
            self.log.say(Level::Warning, &text);
        }
        self.oom.insert(id, (token, watch));
    }

    pub(super) fn oom_ready(&mut self, token: u64) {
        let id = self
            .oom
            .iter()
            .find(|(_, (other, _))| *other == token)
            .map(|(id, _)| id.clone());
        if let Some(id) = id {
            self.look_for_oom(&id);
        }
    }

    pub(super) fn look_for_oom(&mut self, id: &str) {
        if let Some(event) = self.new_kills(id) {
            self.handle(Input::Event(event));
        }
    }

    fn new_kills(&mut self, id: &str) -> Option<Event> {
        let (_, watch) = self.oom.get_mut(id)?;
        let new = watch.read() > 0;
        new.then(|| Event::Oom {
            id: id.to_owned(),
            kills: watch.seen(),
        })
    }

    // ---- looks at the host ----

    pub(super) fn pids(&self, task: &Task) -> Vec<(u32, String)> {
        let mut pids = Vec::new();
        if let Some(folder) = task.cgroup.as_ref().and_then(Cgroup::any_folder) {
            collect_pids(folder, MAX_DEPTH, &mut pids);
        }
        let init = task.init.process.map(|process| process.pid);
        if pids.is_empty() {
            pids.extend(init);
        }
        let exec_of = |pid: u32| {
            let has = |exec: &Exec| {
                exec.member.exit.is_none() && exec.member.process.is_some_and(|p| p.pid == pid)
            };
            let found = task.execs.iter().find(|(_, exec)| has(exec));
            found.map(|(id, _)| id.clone()).unwrap_or_default()
        };
        pids.into_iter().map(|pid| (pid, exec_of(pid))).collect()
    }

    pub(super) fn stats(&mut self, to: Caller, id: &str) {
        let cgroup = self
            .state
            .tasks
            .get(id)
            .and_then(|task| task.cgroup.as_ref());
        let seen = cgroup.map_or(Seen::Absent, |cgroup| stats::read(&self.roots, cgroup));
        let reply = match seen {
            Seen::Present(any) => Ok(Reply::Stats(any.type_url, any.value)),
            Seen::Absent => Err(Refusal::not_found("cgroup does not exist")),
            Seen::Unknown(why) => Err(Refusal::unknown(why)),
        };
        self.inbox.push_back(Input::Reply(to, reply));
    }
}

/// The pids in `folder` and below: a container may make groups of its own.
fn collect_pids(folder: &Path, depth: u32, pids: &mut Vec<u32>) {
    if let Seen::Present(found) = read_procs(folder) {
        pids.extend(found.into_iter().filter_map(|pid| u32::try_from(pid).ok()));
    }
    if depth == 0 {
        return;
    }
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_pids(&entry.path(), depth - 1, pids);
        }
    }
}
