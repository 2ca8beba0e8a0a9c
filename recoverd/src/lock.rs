//! One recoverd at a time changes the host: `flock` on `<run-dir>/lock`.
//!
//! The kernel drops the lock when its holder ends, however it ends, so a killed recoverd leaves
//! none behind. The file's one line says who holds it; it is for people and decides nothing.
//! The descriptor is close-on-exec: a shim that we start must not hold it on.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use recoverd_common::{own_file, timestamp::Timestamp};

use crate::{facts::one_line, own_dir};

/// The lock of whoever changes the host.
pub const ALL: &str = "lock";
/// How long between two tries of a caller that waits. Holders work for seconds.
const AGAIN: Duration = Duration::from_millis(50);
/// A line is shorter.
const MAX_LINE: u64 = 512;

/// Held until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another recoverd is at work.
    #[error("{} is held by {by}", .path.display())]
    Held {
        /// The file.
        path: PathBuf,
        /// What its line says.
        by: String,
    },
    /// It cannot be taken at all.
    #[error("take lock {}: {error}", .path.display())]
    Failed {
        /// The file, or the folder that cannot be used.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Tries once. `who` is the command, as its line will say.
pub fn take(run_dir: &Path, who: &str) -> Result<Lock, Refused> {
    take_named(run_dir, ALL, who)
}

/// As [`take`], a lock of another name: of what there is to be one only, whatever others do.
pub fn take_named(run_dir: &Path, name: &str, who: &str) -> Result<Lock, Refused> {
    let path = run_dir.join(name);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| Refused::Failed { path, error }
    };
    own_dir::open(run_dir).map_err(failed(run_dir))?;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    let file = own_file::open(options, &path).map_err(failed(&path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut file) => {
            // Only for people: a full file system must not stop a repair of just that.
            let pid = std::process::id();
            let line = format!("{who}, pid {pid}, since {}\n", Timestamp::now());
            let _ = file.set_len(0);
            let _ = file.write_all(line.as_bytes());
            Ok(Lock { _file: file })
        }
        Err((file, Errno::EWOULDBLOCK)) => Err(Refused::Held {
            path,
            by: holder(file),
        }),
        Err((_, errno)) => Err(failed(&path)(errno.into())),
    }
}

/// Tries until `patience` is over: for a hook that may not give up at once.
pub fn take_within(
    run_dir: &Path,
    name: &str,
    who: &str,
    patience: Duration,
) -> Result<Lock, Refused> {
    let began = Instant::now();
    loop {
        match take_named(run_dir, name, who) {
            Err(Refused::Held { .. }) if began.elapsed() < patience => std::thread::sleep(AGAIN),
            other => return other,
        }
    }
}

fn holder(file: File) -> String {
    let mut line = String::new();
    // Between its flock and its write there is no line yet.
    match file.take(MAX_LINE).read_to_string(&mut line) {
        Ok(_) if !line.trim().is_empty() => one_line(line.trim()),
        Ok(_) | Err(_) => "another recoverd".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn one_holder_at_a_time_and_the_other_is_told_who() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("run");
        let lock = take(&dir, "repair").unwrap();
        let meta = std::fs::metadata(dir.join("lock")).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        let refused = take(&dir, "pre-start").unwrap_err();
        let said = refused.to_string();
        assert!(matches!(refused, Refused::Held { .. }), "{said}");
        assert!(
            said.contains(&format!("repair, pid {}", std::process::id())),
            "{said}"
        );
        let waited = take_within(&dir, ALL, "pre-start", Duration::from_millis(80));
        assert!(matches!(waited, Err(Refused::Held { .. })));
        drop(lock);
        take_within(&dir, ALL, "pre-start", Duration::ZERO).unwrap();
    }

    #[test]
    fn a_waiting_caller_gets_it_when_it_is_free() {
        let temporary = tempfile::tempdir().unwrap();
        let lock = take(temporary.path(), "repair").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                drop(lock);
            });
            take_within(temporary.path(), ALL, "pre-start", Duration::from_secs(30)).unwrap();
        });
    }

    #[test]
    fn no_child_holds_it_on() {
        let temporary = tempfile::tempdir().unwrap();
        let lock = take(temporary.path(), "repair").unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("300")
            .spawn()
            .unwrap();
        drop(lock);
        let again = take(temporary.path(), "repair");
        child.kill().unwrap();
        child.wait().unwrap();
        again.unwrap();
    }

    #[test]
    fn only_a_regular_file_is_a_lock() {
        let temporary = tempfile::tempdir().unwrap();
        let target = temporary.path().join("target");
        std::os::unix::fs::symlink(&target, temporary.path().join("lock")).unwrap();
        let refused = take(temporary.path(), "repair");
        assert!(matches!(refused, Err(Refused::Failed { .. })));
        assert!(!target.exists());
    }
}
