//! The lock that says who is responsible for a group's tasks: `flock` on `<socket>.lock`.
//!
//! `start` takes it before it touches the socket and hands it to the daemon together with the
//! listener; no other `start`, `delete` or adopter can come between. The daemon keeps it as long
//! as it lives. `delete` takes it before it ends anything, but shares it with the `delete`s of the
//! group's other tasks: containerd runs one for each at once.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use recoverd_common::own_file;

use crate::sys::{self, Hold};

/// What trying to take the lock found.
#[derive(Debug)]
pub enum Attempt {
    /// It is ours until the file (and every duplicate) is closed.
    Taken(File),
    /// Somebody is responsible.
    Held,
}

/// Tries once to take the lock at `path`, making the file if it is missing.
pub fn attempt(path: &Path) -> io::Result<Attempt> {
    unless_replaced(path, attempt_as(path, Hold::Alone)?)
}

/// As [`attempt`], for `delete`: keeps away everybody but other `delete`s.
pub fn attempt_shared(path: &Path) -> io::Result<Attempt> {
    unless_replaced(path, attempt_as(path, Hold::Shared)?)
}

/// Where the lock waits that will replace the one at `path`. One adopter at a time has it.
pub fn next(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".next");
    name.into()
}

/// Tries once to take the lock that will replace the one at `path`, whose holder is to be ended.
pub fn attempt_next(path: &Path) -> io::Result<Attempt> {
    attempt_as(&next(path), Hold::Alone)
}

/// Between the end of a holder and the rename of the lock that replaces his, his own is free for
/// everybody, but the tasks are not.
fn unless_replaced(path: &Path, attempt: Attempt) -> io::Result<Attempt> {
    let waiting = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(next(path));
    match waiting {
        Ok(waiting) if !sys::try_lock(&waiting, Hold::Shared)? => return Ok(Attempt::Held),
        // Left by an adopter that died.
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        // Nobody's lock.
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {}
        Err(e) => return Err(e),
    }
    match attempt {
        // It waited no more because it has just taken this one's place.
        Attempt::Taken(file) if !is_at(&file, path)? => Ok(Attempt::Held),
        Attempt::Taken(_) | Attempt::Held => Ok(attempt),
    }
}

fn attempt_as(path: &Path, hold: Hold) -> io::Result<Attempt> {
    // Whoever removes the files of a group holds the lock meanwhile, so a lock on a file that is
    // no longer at its path is worth nothing: again. A few times are plenty.
    for _ in 0..10 {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = own_file::open(options, path)?;
        if !sys::try_lock(&file, hold)? {
            return Ok(Attempt::Held);
        }
        if is_at(&file, path)? {
            return Ok(Attempt::Taken(file));
        }
    }
    Err(io::Error::other("is replaced again and again"))
}

/// Whether `file` is (still) what is at `path`.
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_a_removed_file_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let Attempt::Taken(first) = attempt(&path).unwrap() else {
            panic!("held")
        };
        assert_eq!(first.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(matches!(attempt(&path).unwrap(), Attempt::Held));
        // A duplicate keeps it: this is how the daemon inherits it.
        let duplicate = first.try_clone().unwrap();
        drop(first);
        assert!(matches!(attempt(&path).unwrap(), Attempt::Held));
        drop(duplicate);
        let Attempt::Taken(old) = attempt(&path).unwrap() else {
            panic!("held")
        };
        fs::remove_file(&path).unwrap();
        assert!(matches!(attempt(&path).unwrap(), Attempt::Taken(_)));
        drop(old);
    }

    #[test]
    fn deletes_share_it_and_keep_everybody_else_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let shared = [
            attempt_shared(&path).unwrap(),
            attempt_shared(&path).unwrap(),
        ];
        assert!(
            shared
                .iter()
                .all(|attempt| matches!(attempt, Attempt::Taken(_)))
        );
        assert!(matches!(attempt(&path).unwrap(), Attempt::Held));
        drop(shared);
        let alone = attempt(&path).unwrap();
        assert!(matches!(alone, Attempt::Taken(_)));
        assert!(matches!(attempt_shared(&path).unwrap(), Attempt::Held));
    }

    #[test]
    fn who_waits_for_the_end_of_a_holder_keeps_everybody_else_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let Attempt::Taken(holder) = attempt(&path).unwrap() else {
            panic!("held")
        };
        let Attempt::Taken(adopter) = attempt_next(&path).unwrap() else {
            panic!("held")
        };
        assert!(matches!(attempt_next(&path).unwrap(), Attempt::Held));
        drop(holder);
        assert!(matches!(attempt(&path).unwrap(), Attempt::Held));
        assert!(matches!(attempt_shared(&path).unwrap(), Attempt::Held));
        // Held, it waits; its holder dead, it says nothing.
        drop(adopter);
        assert!(matches!(attempt(&path).unwrap(), Attempt::Taken(_)));
    }

    #[test]
    fn a_lock_that_was_replaced_the_moment_it_was_taken_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let Attempt::Taken(adopter) = attempt_next(&path).unwrap() else {
            panic!("held")
        };
        let free = attempt_as(&path, Hold::Alone).unwrap();
        assert!(matches!(free, Attempt::Taken(_)));
        fs::rename(next(&path), &path).unwrap();
        assert!(matches!(
            unless_replaced(&path, free).unwrap(),
            Attempt::Held
        ));
        drop(adopter);
    }

    #[test]
    fn only_a_regular_file_is_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("target", &link).unwrap();
        assert!(attempt(&link).is_err());
        assert!(!dir.path().join("target").exists());
        assert!(attempt(dir.path()).is_err());
    }
}
