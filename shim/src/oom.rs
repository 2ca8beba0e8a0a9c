//! Notices that the kernel killed a process of a task for want of memory.
//!
//! v2: `memory.events` itself, which has an exceptional condition for poll(2) whenever one of its
//! counters changes. (Not inotify, which the stock shim takes: a user has 128 instances of it unless
//! told otherwise, fewer than a node may have containers.)
//! v1: an eventfd registered in `cgroup.event_control` for `memory.oom_control`. Both only say
//! *look*: what is reported is by how much the counter `oom_kill` has grown since the last look,
//! so that a wake-up for something else tells nothing and a lost one loses nothing. (A v1 kernel
//! before 4.13 has no such counter; there every wake-up counts as one, as in the stock shim.) Nor
//! does one that could not be had: there is a last look when the init has exited. Where the cgroup
//! is gone before that, the kernel's log tells.

mod kernel_log;

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::EpollFlags,
        eventfd::{EfdFlags, EventFd},
    },
};
use recoverd_common::{
    cgroup::{Cgroup, MAX_FILE, parse_pairs},
    read::read_text,
    seen::Seen,
    timestamp::Timestamp,
};

use kernel_log::Clocks;

/// Why a task's memory cgroup cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The memory controller is off, or on another hierarchy than the task's.
    #[error("watch for OOM: the task has no memory cgroup")]
    NoMemoryCgroup,
    /// A file or a descriptor is not to be had.
    #[error("watch for OOM: {verb} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        cause: io::Error,
    },
}

/// A watch on one task, for as long as it lives.
#[derive(Debug)]
pub struct OomWatch {
    /// Without one nothing wakes us, and it takes looks to know.
    source: Result<Source, WatchError>,
    /// Which of the hierarchies it is on.
    root: &'static str,
    /// The file with the counter `oom_kill`.
    counter: PathBuf,
    /// Its value at the last look.
    seen: u64,
    /// Its value when the watch began, and when that was by the kernel's clock, microseconds.
    began: (u64, u64),
}

#[derive(Debug)]
enum Source {
    V1(EventFd),
    V2(File),
}

impl OomWatch {
    /// Starts to watch `cgroup`; kills that happened before count from `already` on (what the
    /// record says of an adopted task; `None`: only what happens from now on). Without a memory
    /// cgroup there is nothing to watch.
    pub fn new(cgroup: &Cgroup, already: Option<u64>) -> Result<Self, WatchError> {
        let folder = cgroup.folder("memory").ok_or(WatchError::NoMemoryCgroup)?;
        let (source, root) = match cgroup {
            Cgroup::V1(_) => (watch_v1(folder), ROOT_V1),
            Cgroup::V2(_) => (watch_v2(folder), ROOT_V2),
        };
        let counter = counter(cgroup, folder);
        // Looked at after the watch began: nothing falls between the two.
        let seen = already.or_else(|| kills(&counter)).unwrap_or(0);
        Ok(Self {
            source,
            root,
            counter,
            seen,
            began: (seen, Clocks::now().log()),
        })
    }

    /// What wakes us when there may be something new, and by which events; why nothing does.
    pub fn waker(&self) -> Result<(BorrowedFd<'_>, EpollFlags), &WatchError> {
        match self.source.as_ref()? {
            Source::V1(event) => Ok((event.as_fd(), EpollFlags::EPOLLIN)),
            // Once for each change: the condition stays until this very descriptor is read, and
            // for ever when the group is gone.
            Source::V2(events) => {
                let changes = EpollFlags::EPOLLPRI | EpollFlags::EPOLLET;
                Ok((events.as_fd(), changes))
            }
        }
    }

    /// How many OOM kills there have been since the last look; to be called when something woke
    /// us, and once more when the init has exited (the exit may be seen first).
    pub fn read(&mut self) -> u64 {
        let woken = self.drain();
        match kills(&self.counter).or_else(|| self.logged()) {
            Some(now) => {
                let new = now.saturating_sub(self.seen);
                self.seen = self.seen.max(now);
                new
            }
            // An old kernel, or nobody knows.
            None => match self.source {
                // v1 also wakes when the group is removed: that is no OOM.
                Ok(Source::V1(_)) if self.counter.exists() => woken,
                Ok(Source::V1(_) | Source::V2(_)) | Err(_) => 0,
            },
        }
    }

    /// What the counter of a group that is gone was at least, as the kernel's log tells.
    fn logged(&self) -> Option<u64> {
        let (before, since) = self.began;
        let kills = logged(self.counter.parent()?, self.root, since)?;
        Some(before.saturating_add(kills))
    }

    /// The counter at the last look, for the record.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Empties an eventfd; how many times it was woken.
    fn drain(&self) -> u64 {
        match &self.source {
            Ok(Source::V1(event)) => event.read().unwrap_or(0),
            Ok(Source::V2(_)) | Err(_) => 0,
        }
    }
}

/// How often the kernel has killed in `cgroup`; none when it does not say.
pub fn kills_of(cgroup: &Cgroup) -> Option<u64> {
    kills(&counter(cgroup, cgroup.folder("memory")?))
}

/// The file with the counter.
fn counter(cgroup: &Cgroup, folder: &Path) -> PathBuf {
    folder.join(match cgroup {
        Cgroup::V1(_) => "memory.oom_control",
        Cgroup::V2(_) => "memory.events",
    })
}

/// The counter `oom_kill` of a file of `key value` lines.
fn kills(counter: &Path) -> Option<u64> {
    match read_text(counter, MAX_FILE) {
        Seen::Present(text) => parse_pairs(&text)
            .find(|(key, _)| *key == "oom_kill")
            .map(|(_, n)| n),
        Seen::Absent | Seen::Unknown(_) => None,
    }
}

/// Where hierarchies with a memory controller are mounted.
const ROOT_V1: &str = "/sys/fs/cgroup/memory";
const ROOT_V2: &str = "/sys/fs/cgroup";

/// How often the kernel's log tells of kills in a group since then; none of one that is there.
fn logged(folder: &Path, root: &str, since_us: u64) -> Option<u64> {
    (!folder.exists()).then(|| kernel_log::kills_since(folder, root.as_ref(), since_us))
}

/// How often the kernel has killed in `cgroup`, which is gone with its counter, since a record was
/// written that names an init of this boot; none of one that is there.
pub fn kills_after(cgroup: &Cgroup, written_at: Timestamp, init_start: u64) -> Option<u64> {
    let root = match cgroup {
        Cgroup::V1(_) => ROOT_V1,
        Cgroup::V2(_) => ROOT_V2,
    };
    let since = Clocks::now().since(written_at, init_start);
    logged(cgroup.folder("memory")?, root, since)
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WatchError {
    let path = path.to_owned();
    move |cause| WatchError::Io { verb, path, cause }
}

fn errno(verb: &'static str, path: &Path) -> impl FnOnce(Errno) -> WatchError {
    let failed = failed(verb, path);
    move |errno| failed(errno.into())
}

fn watch_v1(folder: &Path) -> Result<Source, WatchError> {
    let path = folder.join("memory.oom_control");
    let control: OwnedFd = File::open(&path).map_err(failed("open", &path))?.into();
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let event =
        EventFd::from_value_and_flags(0, flags).map_err(errno("make eventfd for", &path))?;
    let register = folder.join("cgroup.event_control");
    let line = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
    fs::write(&register, line).map_err(failed("write", &register))?;
    Ok(Source::V1(event))
}

fn watch_v2(folder: &Path) -> Result<Source, WatchError> {
    let path = folder.join("memory.events");
    let events = File::open(&path).map_err(failed("open", &path))?;
    Ok(Source::V2(events))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};

    /// What this machine does not show is said: by `tests/run` too, which names the file.
    fn skipped(why: &str) {
        eprintln!("SKIPPED: {why}");
        if let Some(file) = std::env::var_os("RECOVERD_SKIPPED") {
            let file = File::options().append(true).create(true).open(file);
            let text = format!("a part of the shim's unit tests: {why}\n");
            file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
                .unwrap();
        }
    }

    /// As the shim is woken.
    fn wakes(watch: &OomWatch) -> Epoll {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let (fd, events) = watch.waker().unwrap();
        epoll.add(fd, EpollEvent::new(events, 0)).unwrap();
        epoll
    }

    fn woken(epoll: &Epoll, within_ms: u16) -> bool {
        epoll.wait(&mut [EpollEvent::empty()], within_ms).unwrap() == 1
    }

    #[test]
    fn v2_kills_are_counted_once_and_other_events_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory.events");
        fs::write(&file, "max 0\noom 0\noom_kill 2\n").unwrap();
        let cgroup = Cgroup::V2(dir.path().into());
        let mut watch = OomWatch::new(&cgroup, None).unwrap();
        assert_eq!(watch.read(), 0);
        fs::write(&file, "max 9\noom 1\noom_kill 2\n").unwrap();
        assert_eq!(watch.read(), 0);
        fs::write(&file, "max 9\noom 2\noom_kill 4\n").unwrap();
        assert_eq!((watch.read(), watch.read(), watch.seen()), (2, 0, 4));
        fs::remove_file(&file).unwrap();
        assert_eq!(watch.read(), 0);
    }

    #[test]
    fn an_adopter_learns_of_kills_that_happened_while_nobody_watched() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.events"), "oom_kill 3\n").unwrap();
        let cgroup = Cgroup::V2(dir.path().into());
        let mut watch = OomWatch::new(&cgroup, Some(1)).unwrap();
        assert_eq!(watch.read(), 2);
        assert_eq!(kills_of(&cgroup), Some(3));
        // v1 names it in another file.
        let cgroup = Cgroup::V1(vec![("memory".into(), dir.path().into())]);
        assert_eq!(kills_of(&cgroup), None);
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n";
        fs::write(dir.path().join("memory.oom_control"), text).unwrap();
        assert_eq!(kills_of(&cgroup), Some(7));
    }

    #[test]
    fn a_task_without_memory_cgroup_is_refused() {
        assert!(matches!(
            OomWatch::new(&Cgroup::V1(Vec::new()), None),
            Err(WatchError::NoMemoryCgroup)
        ));
    }

    #[test]
    fn what_cannot_be_watched_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("memory.oom_control");
        fs::write(&control, "oom_kill 1\n").unwrap();
        // Nothing that could be written to register.
        fs::create_dir(dir.path().join("cgroup.event_control")).unwrap();
        let cgroup = Cgroup::V1(vec![("memory".into(), dir.path().into())]);
        let mut watch = OomWatch::new(&cgroup, None).unwrap();
        assert!(watch.waker().is_err());
        fs::write(&control, "oom_kill 2\n").unwrap();
        assert_eq!((watch.read(), watch.read(), watch.seen()), (1, 0, 2));
    }

    #[test]
    fn a_change_of_a_v2_group_wakes_once_and_its_end_not_for_ever() {
        let mounts = recoverd_common::mounts::read(Path::new("/proc"));
        let Seen::Present(mounts) = mounts else {
            panic!("{mounts:?}")
        };
        let root = mounts.iter().find(|mount| mount.kind == "cgroup2");
        let name = format!("recoverd-oom-{}", std::process::id());
        let folder = root.map(|root| root.point.join(name)).unwrap_or_default();
        if fs::create_dir(&folder).is_err() {
            return skipped("no cgroup v2 group can be made");
        }
        // Its memory controller may be another hierarchy's; its other files are as those of one.
        let changes = File::open(folder.join("cgroup.events")).unwrap();
        let watch = OomWatch {
            source: Ok(Source::V2(changes)),
            root: ROOT_V2,
            counter: folder.join("memory.events"),
            seen: 0,
            began: (0, 0),
        };
        let epoll = wakes(&watch);
        let _at_first = woken(&epoll, 0);
        let still = woken(&epoll, 0);
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let moved = fs::write(folder.join("cgroup.procs"), child.id().to_string());
        let changed = woken(&epoll, 10_000);
        child.kill().unwrap();
        child.wait().unwrap();
        let emptied = woken(&epoll, 10_000);
        // A process that is dying holds its group for a moment.
        let removed = (0..1000).any(|_| {
            let removed = fs::remove_dir(&folder).is_ok();
            if !removed {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            removed
        });
        let wakes_then = (0..100).filter(|_| woken(&epoll, 0)).count();
        moved.unwrap();
        assert!(removed, "{}", folder.display());
        assert_eq!((still, changed, emptied), (false, true, true));
        assert!(wakes_then < 10, "{wakes_then} times in vain");
    }

    #[test]
    fn kills_of_a_real_kernel_are_counted_and_the_end_of_the_group_is_none() {
        let name = format!("recoverd-oom-{}", std::process::id());
        // A machine whose cgroups limit no memory runs no OOM test at all.
        let v1 = Path::new(ROOT_V1).is_dir();
        let (root, file) = match v1 {
            true => (ROOT_V1, "memory.limit_in_bytes"),
            false => (ROOT_V2, "memory.max"),
        };
        let folder = Path::new(root).join(name);
        fs::create_dir(&folder).unwrap();
        let limited = fs::write(folder.join(file), "8388608");
        // Where there is swap to be limited.
        let _ = fs::write(folder.join("memory.swap.max"), "0");
        let cgroup = match v1 {
            true => Cgroup::V1(vec![("memory".into(), folder.clone())]),
            false => Cgroup::V2(folder.clone()),
        };
        let mut watch = OomWatch::new(&cgroup, None).unwrap();
        let epoll = wakes(&watch);
        let written_at = Timestamp::now();
        let there = kills_after(&cgroup, written_at, 0);
        // A shell that joins the group and doubles a string until it is killed.
        let hungry = "echo $$ > \"$0/cgroup.procs\"; x=x; while :; do x=$x$x; done";
        let killed = std::process::Command::new("sh")
            .args(["-c", hungry])
            .arg(&folder)
            .status()
            .unwrap();
        let told = woken(&epoll, 2000);
        let (first, second) = (watch.read(), watch.read());
        let removed = fs::remove_dir(&folder);
        let after = (woken(&epoll, 2000), watch.read());
        limited.unwrap();
        removed.unwrap();
        assert!(!killed.success() && told, "{killed:?}");
        assert_eq!((first, second), (1, 0));
        // v1 wakes for the removal as well.
        assert!(after.0 || !v1);
        assert_eq!(after.1, 0);
        if File::open("/dev/kmsg").is_err() {
            return skipped("the kernel's log cannot be read");
        }
        // Whoever comes now learns of it from the log; of a process that is younger it is no news.
        let clocks = Clocks::now();
        assert_eq!(there, None, "while the group is there, it has the word");
        assert_eq!(kills_after(&cgroup, written_at, 0), Some(1), "{clocks:?}");
        assert_eq!(kills_after(&cgroup, written_at, u64::MAX), Some(0));
    }
}
