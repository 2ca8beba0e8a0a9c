//! Sets a bundle or a file aside: it is renamed into `<state>/recoverd-quarantine/` and a note is
//! written beside it, so that nothing is lost and somebody can look at it later. The caller has
//! proved that nothing uses it; here is checked only that it is still the same file.
//!
//! Never copies (a rename is whole or not at all), never follows a symlink: the folder that holds
//! it is opened without following, and the rename works on its descriptor.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2},
    sys::stat::{Mode, fstatat},
};
use recoverd_common::{failpoint, proc::FileId, timestamp::Timestamp};
use serde_json::json;

use crate::own_dir;

/// The folder's name below the state folder.
pub const FOLDER: &str = "recoverd-quarantine";

/// What is to be set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thing<'a> {
    /// Where it is: a bundle, or a file.
    pub path: &'a Path,
    /// What was looked at when it was decided; something else at that path is left alone.
    pub file: FileId,
    /// What it is called there: `<namespace>-<id>`, or a file's name.
    pub name: &'a str,
    /// Why, one line.
    pub why: &'a str,
    /// Which run of which command, as the history says it.
    pub run: &'a str,
}

/// Why it stayed where it is.
#[derive(Debug, thiserror::Error)]
pub enum Kept {
    /// It has gone, or something else has its name now.
    #[error("{} is not what it was", .0.display())]
    Changed(PathBuf),
    /// A step failed.
    #[error("{what} {}: {error}", .path.display())]
    Failed {
        /// The step.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Kept {
    let path = path.to_owned();
    move |error| Kept::Failed { what, path, error }
}

/// Sets `thing` aside below `state` and returns where it is now.
pub fn set_aside(state: &Path, thing: &Thing<'_>) -> Result<PathBuf, Kept> {
    let dir = state.join(FOLDER);
    let quarantine = own_dir::open(&dir).map_err(failed("open", &dir))?;
    let (Some(parent), Some(name)) = (thing.path.parent(), thing.path.file_name()) else {
        let error = io::Error::other("names no file");
        return Err(failed("set aside", thing.path)(error));
    };
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(parent)
        .map_err(failed("open", parent))?;
    let now = Timestamp::now();
    let target = format!("{}-{}", compact(now), thing.name);
    let note = format!("{target}.note");
    // First the note: what is found there without one could be anybody's.
    failpoint!("quarantine.note.before");
    write_note(&quarantine, &note, thing, now).map_err(failed("write", &dir.join(&note)))?;
    failpoint!("quarantine.note.after");
    let moved = still(&folder, name, thing).and_then(|()| {
        renameat2(
            folder.as_fd(),
            name,
            quarantine.as_fd(),
            target.as_str(),
            RenameFlags::RENAME_NOREPLACE,
        )
        .map_err(|errno| failed("rename", thing.path)(errno.into()))
    });
    failpoint!("quarantine.move.after");
    if let Err(kept) = moved {
        // A note about nothing; that it stays does no harm.
        let _ = nix::unistd::unlinkat(
            quarantine.as_fd(),
            note.as_str(),
            nix::unistd::UnlinkatFlags::NoRemoveDir,
        );
        return Err(kept);
    }
    Ok(dir.join(target))
}

fn still(folder: &File, name: &std::ffi::OsStr, thing: &Thing<'_>) -> Result<(), Kept> {
    match fstatat(folder.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) if (stat.st_dev, stat.st_ino) == (thing.file.dev, thing.file.ino) => Ok(()),
        Ok(_) | Err(Errno::ENOENT) => Err(Kept::Changed(thing.path.to_owned())),
        Err(errno) => Err(failed("look at", thing.path)(errno.into())),
    }
}

fn write_note(quarantine: &File, name: &str, thing: &Thing<'_>, at: Timestamp) -> io::Result<()> {
    let note = json!({
        "format": 1,
        "at": at,
        "from": thing.path.to_string_lossy(),
        "why": thing.why,
        "run": thing.run,
    });
    let file = openat(
        quarantine.as_fd(),
        name,
        OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
        Mode::S_IRUSR | Mode::S_IWUSR,
    )?;
    File::from(file).write_all(format!("{note}\n").as_bytes())
}

/// `20261124T051700.123456789Z`: sorts by time, and no shell trips over it.
fn compact(at: Timestamp) -> String {
    at.to_string().replace(['-', ':'], "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn thing<'a>(path: &'a Path, name: &'a str) -> Thing<'a> {
        Thing {
            path,
            file: FileId::of_entry(path).present().copied().unwrap(),
            name,
            why: "the init ended, the shim does not answer",
            run: "1-2",
        }
    }

    #[test]
    fn a_bundle_moves_whole_and_its_note_says_from_where() {
        let state = tempfile::tempdir().unwrap();
        let bundle = state.path().join("tasks/ns/a");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), "{}").unwrap();
        let there = set_aside(state.path(), &thing(&bundle, "ns-a")).unwrap();
        assert!(!bundle.exists());
        assert!(there.join("rootfs").is_dir());
        assert_eq!(fs::read(there.join("config.json")).unwrap(), b"{}");
        let note = format!("{}.note", there.display());
        let note: serde_json::Value = serde_json::from_slice(&fs::read(note).unwrap()).unwrap();
        assert_eq!(note["from"], bundle.to_string_lossy().as_ref());
        // The same name again, a moment later.
        fs::create_dir(&bundle).unwrap();
        assert_ne!(
            set_aside(state.path(), &thing(&bundle, "ns-a")).unwrap(),
            there
        );
    }

    #[test]
    fn what_has_become_something_else_stays() {
        let state = tempfile::tempdir().unwrap();
        let (bundle, other) = (state.path().join("a"), state.path().join("b"));
        fs::create_dir(&bundle).unwrap();
        fs::create_dir(&other).unwrap();
        let before = thing(&bundle, "ns-a");
        fs::remove_dir(&bundle).unwrap();
        assert!(matches!(
            set_aside(state.path(), &before),
            Err(Kept::Changed(_))
        ));
        symlink(&other, &bundle).unwrap();
        assert!(matches!(
            set_aside(state.path(), &before),
            Err(Kept::Changed(_))
        ));
        assert!(bundle.is_symlink() && other.is_dir());
        // No note is left for what was not set aside.
        let left = fs::read_dir(state.path().join(FOLDER)).unwrap();
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_symlink_is_set_aside_itself_and_a_linked_folder_is_refused() {
        let state = tempfile::tempdir().unwrap();
        let target = state.path().join("target");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("file"), "").unwrap();
        let link = state.path().join("link");
        symlink(&target, &link).unwrap();
        let inside = link.join("file");
        let refused = set_aside(state.path(), &thing(&inside, "file"));
        assert!(matches!(refused, Err(Kept::Failed { .. })));
        let there = set_aside(state.path(), &thing(&link, "ns-a")).unwrap();
        assert!(there.is_symlink() && target.join("file").exists());
        // A quarantine that leads elsewhere takes nothing.
        let other = tempfile::tempdir().unwrap();
        symlink(&target, other.path().join(FOLDER)).unwrap();
        let file = other.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(set_aside(other.path(), &thing(&file, "file")).is_err());
        assert!(file.exists());
    }
}
