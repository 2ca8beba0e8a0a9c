//! When what is there is looked at: records, bundles, and the folders that they are in.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use notify::Watcher;
use recoverd_common::{
    paths::{Beside, TASK_PLUGIN},
    record::version,
    seen::Seen,
};

use super::{
    super::{
        decide::{Input, Kind, Sighting},
        look::{self, Found, Place},
    },
    Daemon,
};
use crate::observe;

/// The whole node is looked at this often, whatever hints come.
const LOOK: Duration = Duration::from_secs(30);
/// And this often without hints.
const LOOK_BLIND: Duration = Duration::from_secs(3);
/// Which containerds there are changes seldom, and asking takes a walk over all processes.
const INSTANCES: Duration = Duration::from_secs(300);
/// Several changes of one record within this time are one.
const SETTLE: Duration = Duration::from_millis(5);
/// Between two looks at a bundle that is on its way: at first, at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), LOOK);
/// Bundles that are asked about at the same time.
const ASKED_AT_ONCE: usize = 8;

/// How far a bundle is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Looked at right now.
    Asked(u32),
    /// To be looked at again; after how many looks.
    Waits(Instant, u32),
    /// A task of the stock shim at this socket.
    Task(PathBuf),
    /// Our shim's, or nothing that is watched.
    Settled,
}

/// Not that something was opened or read: each of our own looks would be the cause of the next.
pub(super) fn is_change(kind: &notify::EventKind) -> bool {
    !kind.is_access()
}

impl Daemon {
    pub(super) fn hinted(&mut self, path: &Path) {
        let now = Instant::now();
        if let Some(socket) = look::socket_of(path) {
            if *path != Beside::of(&socket).record {
                // Requests and events are noted beside it all the time.
                return;
            }
            self.changed.entry(socket).or_insert(now + SETTLE);
        } else if path
            .parent()
            .is_some_and(|folder| self.watched.contains(folder))
        {
            // A bundle or a namespace came or went.
            self.look_at = self.look_at.min(now + SETTLE);
        }
    }

    pub(super) fn look_around(&mut self) {
        let now = Instant::now();
        self.metrics.looked();
        self.watch_the_rest();
        let blind = self.watcher.is_none();
        self.look_at = now + if blind { LOOK_BLIND } else { LOOK };
        if self.instances_at <= now {
            self.instances_at = now + INSTANCES;
            self.states = observe::states(&self.setup.plan);
        }
        let records = look::records(&self.setup.plan.roots.socket_dir);
        for (socket, version) in &records {
            if self.versions.get(socket) != Some(version) {
                self.changed.insert(socket.clone(), now);
            }
        }
        let ours = self.state.sockets().filter(|(_, kind)| *kind == Kind::Ours);
        let gone: Vec<PathBuf> = ours
            .map(|(socket, _)| socket.clone())
            .filter(|socket| !records.contains_key(socket))
            .collect();
        self.changed
            .extend(gone.into_iter().map(|socket| (socket, now)));
        self.versions = records;
        self.read_changed(now);

        let (places, mut folders) = look::bundles(&self.states);
        folders.insert(self.setup.plan.roots.socket_dir.clone());
        folders.extend(self.states.iter().map(|state| state.join(TASK_PLUGIN)));
        self.watch_folders(folders);
        let gone: Vec<Place> = self
            .places
            .keys()
            .filter(|place| !places.contains(place) && look::is_gone(&place.path))
            .cloned()
            .collect();
        if !gone.is_empty() {
            self.dirty |= self.witnessed.forget(look::is_gone);
        }
        for place in gone {
            if let Some(Standing::Task(socket)) = self.places.remove(&place) {
                let id = place.id.to_string();
                self.inbox.push(Input::TaskGone(socket, id));
            }
        }
        for place in places {
            if !self.places.contains_key(&place) {
                self.ask(place, 0);
            }
        }
    }

    /// Watches these folders; for one that is not there yet, the one in which it will be made.
    pub(super) fn watch_folders(&mut self, folders: BTreeSet<PathBuf>) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        let there = |folder: &PathBuf| {
            let found = folder.ancestors().find(|folder| folder.is_dir());
            found.map(Path::to_owned)
        };
        let folders: BTreeSet<PathBuf> = folders.iter().filter_map(there).collect();
        for folder in folders.difference(&self.watched) {
            let mode = notify::RecursiveMode::NonRecursive;
            if let Err(error) = watcher.watch(folder, mode) {
                tracing::info!(folder = %folder.display(), %error, "no hints");
            }
        }
        for folder in self.watched.difference(&folders) {
            // It is gone, mostly, and its watch with it.
            let _ = watcher.unwatch(folder);
        }
        self.watched = folders;
    }

    pub(super) fn read_changed(&mut self, now: Instant) {
        let due: Vec<PathBuf> = self
            .changed
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(socket, _)| socket.clone())
            .collect();
        for socket in due {
            self.changed.remove(&socket);
            self.read_record(&socket);
        }
    }

    pub(super) fn read_record(&mut self, socket: &Path) {
        match look::record(socket) {
            Seen::Present(record) => {
                if record.boot_id == self.witnessed.boot_id {
                    let bytes = version::encode(&record).into_boxed_slice();
                    self.records.insert(socket.to_owned(), bytes);
                    let sighting = Sighting::of_record(&record);
                    self.inbox.push(Input::Seen(socket.to_owned(), sighting));
                }
            }
            Seen::Absent => {
                let ours = self.state.sighting(socket);
                if ours.is_some_and(|sighting| sighting.kind == Kind::Ours) {
                    self.inbox.push(Input::Gone(socket.to_owned()));
                } else {
                    self.records.remove(socket);
                }
            }
            // It stays as it was.
            Seen::Unknown(why) => tracing::info!(socket = %socket.display(), why, "record"),
        }
    }

    pub(super) fn ask(&mut self, place: Place, looks: u32) {
        let looks = looks.saturating_add(1);
        if self.bundles.len() >= ASKED_AT_ONCE {
            let again = Instant::now() + AGAIN.0;
            self.places
                .insert(place, Standing::Waits(again, looks.saturating_sub(1)));
            return;
        }
        self.places.insert(place.clone(), Standing::Asked(looks));
        let proc = self.proc.clone();
        let runc_root = self.setup.plan.roots.runc_root.clone();
        self.bundles.spawn_blocking(move || {
            let found = look::bundle(&proc, &runc_root, &place);
            (place, found)
        });
    }

    pub(super) fn found(&mut self, place: Place, found: Found) {
        let Some(Standing::Asked(looks)) = self.places.get(&place).cloned() else {
            // It has gone meanwhile.
            return;
        };
        let standing = match found {
            Found::Ours | Found::Nothing => Standing::Settled,
            Found::NotYet => {
                let pause = AGAIN.0.saturating_mul(1 << looks.min(10)).min(AGAIN.1);
                Standing::Waits(Instant::now() + pause, looks)
            }
            Found::Task(task) => {
                self.dirty |= self.witnessed.said(task.words);
                let socket = task.socket;
                self.inbox
                    .push(Input::SeenAlso(socket.clone(), task.sighting));
                self.missed.insert(socket.clone(), Instant::now());
                Standing::Task(socket)
            }
        };
        self.places.insert(place, standing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, sync::mpsc};

    #[test]
    fn looking_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "x").unwrap();
        let (tell, told) = mpsc::channel();
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                let _ = tell.send(event.unwrap());
            })
            .unwrap();
        let mode = notify::RecursiveMode::NonRecursive;
        watcher.watch(dir.path(), mode).unwrap();
        fs::read(&file).unwrap();
        fs::read_dir(dir.path()).unwrap().count();
        fs::rename(&file, dir.path().join("b")).unwrap();
        let first = told.iter().find(|event| is_change(&event.kind)).unwrap();
        assert!(matches!(
            first.kind,
            notify::EventKind::Modify(notify::event::ModifyKind::Name(_))
        ));
    }
}
