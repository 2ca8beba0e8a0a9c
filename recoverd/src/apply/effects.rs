//! What steps do to the host, one function each. No policy: each does what the step says, to
//! exactly what it names, or says why not.
//!
//! Nothing here follows a symlink: folders are opened without following, and entries are removed
//! through the descriptor of their folder.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::mpsc,
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    mount::{MntFlags, umount2},
    sys::{
        signal::Signal,
        stat::{FileStat, Mode, SFlag, fstatat},
    },
    unistd::{UnlinkatFlags, unlinkat},
};
use prost::Message;
use recoverd_common::{
    failpoint,
    pb::events,
    proc::{FileId, ProcessId},
    seen::Seen,
    shim_client::ShimClient,
    timestamp::Timestamp,
};

use super::{CALL, Hands, UNMOUNT, checks, group};
use crate::{
    adopt::{self, Order, Verdict},
    ending::{self, NotEnded},
    facts::one_line,
    permit::{Delete, Kill, Missing},
    plan::{Act, Exited, PATIENCE, Step},
    quarantine::{self, Kept, Thing},
};

/// A bundle's folders are a few deep; what is deeper is none.
const DEEPEST: u32 = 32;

/// Why a step was not done.
#[derive(Debug, PartialEq, Eq)]
pub enum NotDone {
    /// Something is not what it was; nothing was done to it.
    Changed(String),
    /// It was tried.
    Failed(String),
    /// A word is missing.
    Missing(Missing),
}

impl From<Missing> for NotDone {
    fn from(missing: Missing) -> Self {
        Self::Missing(missing)
    }
}

pub(super) fn failed(what: &str, path: &Path) -> impl Fn(io::Error) -> NotDone {
    let what = format!("{what} {}", path.display());
    move |error| NotDone::Failed(one_line(&format!("{what}: {error}")))
}

fn failed_errno(what: &str, path: &Path) -> impl Fn(Errno) -> NotDone {
    let failed = failed(what, path);
    move |errno| failed(errno.into())
}

/// Does what `step` says. The answer says what was done.
pub fn act(step: &Step, hands: &Hands<'_>) -> Result<String, NotDone> {
    match &step.does {
        Act::Adopt(order) => adopt(order, hands),
        Act::Replace(order, _) => {
            // The successor ends its predecessor, after it took what only that one has.
            hands.permits.kill()?;
            adopt(order, hands)
        }
        Act::EndShim(id) | Act::EndInit(id) => end(*id, hands, hands.permits.kill()?),
        Act::Publish(exited) => publish(exited),
        Act::RemoveBundle {
            path,
            file,
            mounts,
            runc,
            socket,
        } => {
            let permit = hands.permits.delete()?;
            let _group = socket.as_deref().map(group::take).transpose()?;
            for (point, id) in mounts {
                unmount(point, *id, hands)?;
            }
            if let Some((path, file)) = runc {
                remove_tree(path, *file, permit)?;
            }
            remove_tree(path, *file, permit)?;
            Ok(format!("removed {}", path.display()))
        }
        Act::Quarantine {
            path,
            file,
            state,
            socket,
        } => {
            let _group = group::take(socket)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let thing = Thing {
                path,
                file: *file,
                name: &name,
                why: step.code.word(),
                run: hands.history.run(),
            };
            match quarantine::set_aside(state, &thing) {
                Ok(there) => Ok(format!("moved {} to {}", path.display(), there.display())),
                Err(kept @ Kept::Changed(_)) => Err(NotDone::Changed(kept.to_string())),
                Err(kept @ Kept::Failed { .. }) => Err(NotDone::Failed(kept.to_string())),
            }
        }
        Act::RemoveSocket { path, file } => {
            let _group = group::take(path)?;
            remove_file(path, *file, SFlag::S_IFSOCK)?;
            Ok(format!("removed {}", path.display()))
        }
        Act::RemoveRecord { socket, files } => {
            let _group = group::take(socket)?;
            for (path, file) in files {
                remove_file(path, *file, SFlag::S_IFREG)?;
            }
            Ok(format!("removed the record of {}", socket.display()))
        }
        Act::Unmount { point, id } => {
            unmount(point, *id, hands)?;
            Ok(format!("unmounted {}", point.display()))
        }
        Act::RemoveCgroup(folders) => {
            for folder in folders {
                remove_cgroup(folder, 0)?;
            }
            Ok(format!("removed {} cgroups", folders.len()))
        }
        Act::RemoveFifos {
            folder,
            file,
            names,
        } => remove_fifos(folder, *file, names),
        Act::RemoveRuncState { path, file } => {
            remove_tree(path, *file, hands.permits.delete()?)?;
            Ok(format!("removed {}", path.display()))
        }
    }
}

fn adopt(order: &Order, hands: &Hands<'_>) -> Result<String, NotDone> {
    let how = match &hands.shim {
        Ok(how) => adopt::How {
            until: Instant::now() + how.deadline,
            ..how.clone()
        },
        Err(why) => return Err(NotDone::Failed(why.clone())),
    };
    let outcomes = hands
        .runtime
        .block_on(adopt::run(vec![order.clone()], &how));
    match outcomes.into_iter().next().map(|outcome| outcome.verdict) {
        Some(Verdict::Adopted(adopted)) => Ok(format!(
            "shim {} serves {} tasks on {}",
            adopted.shim.pid,
            adopted.tasks.len(),
            order.adoption.socket.display()
        )),
        Some(Verdict::StoodBack(why)) => Err(NotDone::Changed(one_line(&why))),
        Some(Verdict::Failed(why)) => Err(NotDone::Failed(one_line(&why.to_string()))),
        None => Err(NotDone::Failed("nothing was started".into())),
    }
}

fn end(id: ProcessId, hands: &Hands<'_>, leave: &Kill) -> Result<String, NotDone> {
    let signals = [Signal::SIGTERM, Signal::SIGKILL];
    match ending::end(&hands.proc, id, &signals, PATIENCE, leave) {
        Ok(signal) => Ok(format!("{} ended by {signal:?}", id.pid)),
        Err(changed @ NotEnded::Changed { .. }) => Err(NotDone::Changed(changed.to_string())),
        Err(NotEnded::Failed(why)) => Err(NotDone::Failed(why)),
    }
}

fn publish(exited: &Exited) -> Result<String, NotDone> {
    const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
    let (namespace, id) = &exited.name;
    let now = Timestamp::now();
    let event = events::TaskExit {
        container_id: id.clone(),
        id: id.clone(),
        pid: exited.init.pid.unsigned_abs(),
        exit_status: exited.status,
        exited_at: Some(proto_time(exited.at.unwrap_or(now))),
    };
    let request = events::ForwardRequest {
        envelope: Some(events::Envelope {
            timestamp: Some(proto_time(now)),
            namespace: namespace.clone(),
            topic: "/tasks/exit".into(),
            event: Some(prost_types::Any {
                type_url: "containerd.events.TaskExit".into(),
                value: event.encode_to_vec(),
            }),
        }),
    };
    let until = Instant::now() + CALL;
    failpoint!("repair.publish.before");
    let sent = ShimClient::connect(&exited.ttrpc, namespace, until)
        .and_then(|mut client| client.call::<()>(SERVICE, "Forward", &request));
    failpoint!("repair.publish.after");
    match sent {
        Ok(()) => Ok(format!(
            "told containerd that {namespace}/{id} exited with {}",
            exited.status
        )),
        Err(error) => Err(NotDone::Failed(format!(
            "publish at {}: {error}",
            exited.ttrpc.display()
        ))),
    }
}

fn proto_time(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: at.seconds,
        nanos: i32::try_from(at.nanos).unwrap_or(0),
    }
}

/// Opens the folder that holds `path`, and gives the entry's name in it.
fn parent(path: &Path) -> Result<(OwnedFd, &std::ffi::OsStr), NotDone> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(NotDone::Failed(format!("{} has no folder", path.display())));
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(folder)
        .map_err(failed("open", folder))?;
    Ok((opened.into(), name))
}

fn entry(folder: &OwnedFd, name: &std::ffi::OsStr) -> Result<Option<FileStat>, Errno> {
    match fstatat(folder.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn is(stat: &FileStat, file: FileId) -> bool {
    (stat.st_dev, stat.st_ino) == (file.dev, file.ino)
}

/// Removes this very file. Gone already is as good.
fn remove_file(path: &Path, file: FileId, wanted: SFlag) -> Result<(), NotDone> {
    let (folder, name) = parent(path)?;
    let Some(stat) = entry(&folder, name).map_err(failed_errno("look at", path))? else {
        return Ok(());
    };
    if !is(&stat, file) || kind(&stat) != wanted {
        return Err(NotDone::Changed(format!(
            "{} is not what it was",
            path.display()
        )));
    }
    unlink(&folder, name, UnlinkatFlags::NoRemoveDir).map_err(failed_errno("remove", path))
}

/// Every file and folder that is removed, but cgroups, is removed here.
fn unlink(folder: &OwnedFd, name: &std::ffi::OsStr, what: UnlinkatFlags) -> Result<(), Errno> {
    failpoint!("repair.remove.before");
    let removed = unlinkat(folder.as_fd(), name, what);
    failpoint!("repair.remove.after");
    match removed {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Removes this very folder and all in it, but nothing on another mount.
fn remove_tree(path: &Path, file: FileId, _leave: &Delete) -> Result<(), NotDone> {
    let (folder, name) = parent(path)?;
    let Some(stat) = entry(&folder, name).map_err(failed_errno("look at", path))? else {
        return Ok(());
    };
    if !is(&stat, file) || kind(&stat) != SFlag::S_IFDIR {
        return Err(NotDone::Changed(format!(
            "{} is not what it was",
            path.display()
        )));
    }
    let top = open_folder(&folder, name).map_err(failed_errno("open", path))?;
    let mount = mount_of(&top).map_err(failed("look at", path))?;
    if mount_of(&folder).map_err(failed("look at", path))? != mount {
        return Err(NotDone::Changed(format!("{} is a mount", path.display())));
    }
    failpoint!("repair.tree.before");
    empty(&top, path, mount, 0)?;
    failpoint!("repair.tree.emptied");
    unlink(&folder, name, UnlinkatFlags::RemoveDir).map_err(failed_errno("remove", path))
}

fn open_folder(folder: &OwnedFd, name: &std::ffi::OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(folder.as_fd(), name, flags, Mode::empty())
}

/// The mount that an open folder is on.
fn mount_of(folder: &OwnedFd) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", folder.as_raw_fd()))?;
    text.lines()
        .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("fdinfo has no mnt_id"))
}

/// The entries of an open folder, by its descriptor and not by its path.
fn names(folder: &OwnedFd) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

fn empty(folder: &OwnedFd, path: &Path, mount: u64, depth: u32) -> Result<(), NotDone> {
    if depth > DEEPEST {
        return Err(NotDone::Failed(format!("{} is too deep", path.display())));
    }
    for name in names(folder).map_err(failed("list", path))? {
        let inner = path.join(&name);
        let Some(stat) = entry(folder, &name).map_err(failed_errno("look at", &inner))? else {
            continue;
        };
        if kind(&stat) != SFlag::S_IFDIR {
            unlink(folder, &name, UnlinkatFlags::NoRemoveDir)
                .map_err(failed_errno("remove", &inner))?;
            failpoint!("repair.tree.between");
            continue;
        }
        let below = open_folder(folder, &name).map_err(failed_errno("open", &inner))?;
        if mount_of(&below).map_err(failed("look at", &inner))? != mount {
            return Err(NotDone::Failed(format!("{} is a mount", inner.display())));
        }
        empty(&below, &inner, mount, depth.saturating_add(1))?;
        unlink(folder, &name, UnlinkatFlags::RemoveDir).map_err(failed_errno("remove", &inner))?;
    }
    Ok(())
}

/// Removes a cgroup and those in it. The kernel refuses one that has a process.
fn remove_cgroup(folder: &Path, depth: u32) -> Result<(), NotDone> {
    if depth > DEEPEST {
        return Err(NotDone::Failed(format!("{} is too deep", folder.display())));
    }
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("list", folder)(error)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path(), depth.saturating_add(1))?;
        }
    }
    failpoint!("repair.cgroup.before");
    let removed = fs::remove_dir(folder);
    failpoint!("repair.cgroup.after");
    match removed {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(NotDone::Changed(format!("{} is in use", folder.display())))
        }
        Err(error) => Err(failed("remove", folder)(error)),
    }
}

fn remove_fifos(path: &Path, file: FileId, fifos: &[String]) -> Result<String, NotDone> {
    let (folder, name) = parent(path)?;
    let Some(stat) = entry(&folder, name).map_err(failed_errno("look at", path))? else {
        return Ok(format!("{} is gone", path.display()));
    };
    if !is(&stat, file) || kind(&stat) != SFlag::S_IFDIR {
        return Err(NotDone::Changed(format!(
            "{} is not what it was",
            path.display()
        )));
    }
    let inside = open_folder(&folder, name).map_err(failed_errno("open", path))?;
    for fifo in fifos {
        let (full, fifo) = (path.join(fifo), std::ffi::OsStr::new(fifo));
        let Some(stat) = entry(&inside, fifo).map_err(failed_errno("look at", &full))? else {
            continue;
        };
        if kind(&stat) != SFlag::S_IFIFO {
            return Err(NotDone::Changed(format!("{} is no fifo", full.display())));
        }
        unlink(&inside, fifo, UnlinkatFlags::NoRemoveDir).map_err(failed_errno("remove", &full))?;
        failpoint!("repair.fifo.between");
    }
    // What else is in it is somebody's, and keeps the folder.
    match unlink(&folder, name, UnlinkatFlags::RemoveDir) {
        Ok(()) => Ok(format!("removed {}", path.display())),
        Err(Errno::ENOTEMPTY) => Ok(format!(
            "removed the fifos in {}; other files keep the folder",
            path.display()
        )),
        Err(errno) => Err(failed_errno("remove", path)(errno)),
    }
}

/// Unmounts this very mount, not lazily: what is still used stays. In a thread of its own, because
/// it waits for ever where a device or a server is away.
fn unmount(point: &Path, id: u64, hands: &Hands<'_>) -> Result<(), NotDone> {
    match checks::mounted(point, id, hands) {
        Seen::Present(()) => {}
        Seen::Absent => return Ok(()),
        Seen::Unknown(why) => return Err(NotDone::Changed(why)),
    }
    failpoint!("repair.unmount.before");
    let (done, result) = mpsc::channel();
    let place: PathBuf = point.to_owned();
    std::thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = done.send(umount2(&place, MntFlags::UMOUNT_NOFOLLOW));
    });
    let ended = result.recv_timeout(UNMOUNT);
    failpoint!("repair.unmount.after");
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) => Err(failed_errno("unmount", point)(errno)),
        Err(_) => Err(NotDone::Failed(format!(
            "unmount {}: no end after {} s",
            point.display(),
            UNMOUNT.as_secs()
        ))),
    }
}

#[cfg(test)]
mod tests;
