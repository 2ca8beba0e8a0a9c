//! Who is responsible for a group's tasks keeps its lock; whoever removes what is left of them takes
//! it meanwhile, as the shim's own `delete` does. Never makes one: where none is, nobody of ours was.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use recoverd_common::{own_file, paths::Beside, proc::FileId, seen::Seen};

use super::effects::{NotDone, failed};

/// Keeps shims, starts and adopters of the group at `socket` away as long as it is kept. A stock shim's
/// has no lock.
pub fn take(socket: &Path) -> Result<Option<Flock<File>>, NotDone> {
    let beside = Beside::of(socket);
    let Some(lock) = locked(&beside.lock, FlockArg::LockExclusiveNonblock)? else {
        return Ok(None);
    };
    // An adopter that ends a holder has a lock waiting that takes the place of his: between the two
    // his own is free for everybody, but the tasks are not. One that is free was left by a dead one.
    locked(&beside.next_lock, FlockArg::LockSharedNonblock)?;
    // In this order: it waits no more once it is in this one's place.
    let meta = lock.metadata().map_err(failed("look at", &beside.lock))?;
    let taken = FileId {
        dev: meta.dev(),
        ino: meta.ino(),
    };
    match FileId::of_entry(&beside.lock) {
        Seen::Present(there) if there == taken => Ok(Some(lock)),
        Seen::Present(_) | Seen::Absent => Err(NotDone::Changed(format!(
            "{} was replaced: somebody is responsible",
            beside.lock.display()
        ))),
        Seen::Unknown(why) => {
            let unseen = io::Error::other(why);
            Err(failed("look at", &beside.lock)(unseen))
        }
    }
}

/// The lock of the file at `path`, if there is one.
fn locked(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>, NotDone> {
    let file = match own_file::open(OpenOptions::new().read(true).write(true), path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    match Flock::lock(file, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => {
            let why = format!("{} is held: somebody is responsible", path.display());
            Err(NotDone::Changed(why))
        }
        Err((_, errno)) => Err(failed("lock", path)(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_group_is_taken_only_from_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("0");
        let beside = Beside::of(&socket);
        assert!(take(&socket).unwrap().is_none(), "a lock of nobody");
        assert!(!beside.lock.exists());
        let hold = |path: &Path| {
            let file = File::create(path).unwrap();
            Flock::lock(file, FlockArg::LockExclusive).unwrap()
        };
        let holder = hold(&beside.lock);
        let refused = |words: &str| {
            let why = take(&socket).unwrap_err();
            assert!(
                matches!(&why, NotDone::Changed(text) if text.contains(words)),
                "{why:?}"
            );
        };
        refused(".lock is held");
        // He was ended, and his successor's lock is about to take the place of his.
        let adopter = hold(&beside.next_lock);
        drop(holder);
        refused(".lock.next is held");
        fs::rename(&beside.next_lock, &beside.lock).unwrap();
        refused(".lock is held");
        drop(adopter);
        assert!(take(&socket).unwrap().is_some());
        // Left by an adopter that died.
        fs::write(&beside.next_lock, "").unwrap();
        assert!(take(&socket).unwrap().is_some());
    }
}
